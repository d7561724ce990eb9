"""What every algorithm of ours does around its update: staging, running it, sums of metrics, checks, its state.

An update is one function of (parameters, batch, noise) that changes the parameters in place, without autograd and without
waiting for the device. So it can be run eagerly, compiled into one graph, or recorded once as a CUDA graph and replayed.
"""

from __future__ import annotations

import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import TypedDict, Unpack

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor

from configs.algorithms import AlgorithmSettings, DqnSettings
from learners.adaptive import WARN_SHARE, AdaptiveSupport
from learners.critic import Critic, Part
from learners.encoders import make_network
from learners.graphs import Recorded
from learners.heads import Classification, Label, ValueHead, make_head
from learners.networks import Network
from learners.normaliser import Normaliser
from learners.products import Products, choose
from learners.staging import ALONE, Batch, Share, Staging
from learners.trained import Trained
from replay.schema import StepSchema, WindowBatch

LOG = logging.getLogger(__name__)

LARGEST = ("batch/largest_observation", "batch/largest_action", "batch/largest_return")

LABEL_METRICS = ("value/clipped_fraction",)  # of heads that classify
PROVISIONAL = (-1.0, 1.0)  # support of a value head until the first data are seen

Noise = tuple[Tensor, ...]


class Options(TypedDict, total=False):
    """How updates are computed, beside what they compute: keyword arguments of every algorithm.

    device: torch device; auto, the default, takes CUDA where there is one.
    compile: with torch.compile; where that fails the update runs eagerly, and one line is logged.
    graphs: record it as a CUDA graph, on a GPU where it is not compiled; True by default.
    precision: of matrix products, float32 or bfloat16; parameters, targets and losses keep `dtype`.
    products: library of matrix products on a CPU: auto, torch or onednn.
    updates_per_call: updates of one staged batch of windows, which holds as many batches.
    stack: frames that an encoder sees at once.
    dtype: of parameters, float32 by default.
    share: this learner's place among several.
    """

    device: str
    compile: bool
    graphs: bool
    precision: str
    products: str
    updates_per_call: int
    stack: int
    dtype: torch.dtype
    share: Share


class Updates(ABC):
    """An algorithm's parameters and its update, driven by `learners.loop.LearnerLoop`."""

    means: tuple[str, ...] = ()  # metrics that `_update` returns, in its order; reported as means

    def __init__(
        self,
        schema: StepSchema,
        settings: AlgorithmSettings,
        *,
        batch_size: int,
        seed: int,
        **options: Unpack[Options],
    ) -> None:
        """`batch_size` is this learner's own; the first compiled update takes up to a minute."""
        device = options.get("device", "auto")
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        self.device = torch.device(device)
        if self.device.type == "cuda" and not torch.cuda.is_available():
            raise ValueError(f"learners.device: expected a device that torch finds here, got {device}; it finds no GPU")
        self.updates = 0
        self._settings = settings
        self._batch_size = batch_size
        self._share = options.get("share", ALONE)
        self._dtype = options.get("dtype", torch.float32)
        self._precision = torch.bfloat16 if options.get("precision") == "bfloat16" else self._dtype
        self._products: Products = choose(options.get("products", "auto"), self.device, self._precision)
        self._staging = Staging(
            schema,
            settings,
            batch_size=batch_size,
            updates=options.get("updates_per_call", 1),
            stack=options.get("stack", 1),
            device=self.device,
            dtype=self._dtype,
            seed=seed,
            share=self._share,
        )
        self._generator = torch.Generator(self.device).manual_seed(seed)
        self._zero, self._one = (torch.tensor(value, dtype=self._dtype, device=self.device) for value in (0.0, 1.0))
        head = settings.head
        fixed = None if head.low is None or head.high is None else (head.low, head.high)
        self._head: ValueHead = make_head(head, fixed or PROVISIONAL, device=self.device, dtype=self._dtype)
        self._support: AdaptiveSupport | None = None  # where the data decides on the support
        if head.is_automatic:
            labels = settings.chain.length * batch_size * settings.labels_per_window
            dueling = isinstance(settings, DqnSettings) and settings.dueling
            self._support = AdaptiveSupport(head, labels=labels, dueling=dueling, device=self.device, dtype=self._dtype)
            self._began = False
        self._normaliser: Normaliser | None = None
        if settings.normalise_observations:
            self._normaliser = Normaliser(self._staging.observation_dim, device=self.device)
        expectile = settings.target.expectile
        self._expectile = None if expectile == 0.5 else torch.full_like(self._zero, expectile)
        self._errors = torch.zeros(batch_size, dtype=self._dtype, device=self.device)
        self._sums = torch.zeros(len(self.means), dtype=torch.float64, device=self.device)
        self._largest = torch.zeros(len(LARGEST), dtype=self._dtype, device=self.device)
        self._reported = 0
        self._clipping = 0  # reports in a row with more targets clipped than WARN_SHARE
        self._warned = False
        # What goes between learners cannot be compiled.
        self._compile = options.get("compile", False) and self._share.count == 1
        self._graphs = options.get("graphs", True) and self.device.type == "cuda" and self._share.count == 1
        self._prepare()

    def _prepare(self) -> None:
        """Decide how updates run; again when tensors have been replaced."""
        self._run: Callable[[Batch, Noise], None] = self._step
        if self._compile:
            torch.compiler.reset()  # recompilations are counted over the process, and each growth of a support is one
            self._compiled = torch.compile(self._step, fullgraph=True, dynamic=False)
            self._run = self._try_compiled
        elif self._graphs:
            self._run = Recorded(self._step, self._everything, self._refresh)

    # ------------------------------------------------------------------------------------- what an algorithm brings

    @abstractmethod
    def _update(self, batch: Batch, noise: Noise) -> Sequence[Tensor]:
        """One gradient step of everything, in place. Returns the values of `means`, 0-dimensional.

        Fills `_errors` where `batch.weight` is given.
        """

    @abstractmethod
    def _draw(self) -> Noise:
        """The random numbers of one update."""

    @abstractmethod
    def _tensors(self) -> dict[str, Tensor]:
        """Every tensor that an update changes and the next one reads, by its name in a checkpoint."""

    @abstractmethod
    def _policy(self) -> tuple[str, dict[str, Tensor]]:
        """The policy's kind and what actors need of it, by the names that `learners.policy` reads."""

    @abstractmethod
    def _critics(self) -> list[Critic]:
        """Its critics."""

    @abstractmethod
    def _inputs(self, batch: Batch) -> list[tuple[Critic, Tensor, Tensor | None]]:
        """What each critic is evaluated on to learn from a batch: vector and frames."""

    def _after_update(self) -> None:
        """What happens between updates, now that `updates` has been counted up: targets inside a chain."""
        chain = self._settings.chain
        if chain.length > 1 and self.updates % chain.copy_every == 0:
            for critic in self._critics():
                critic.copy_chain()

    def _refresh(self) -> None:
        """Called after parameters were loaded: what was derived from them is made again."""
        for critic in self._critics():
            critic.refresh()
        if self._normaliser is not None:
            self._normaliser.load_state(self._normaliser.state())

    # ------------------------------------------------------------------------------------------- the learner's face

    def stage(self, windows: WindowBatch, weights: np.ndarray | None = None) -> list[Batch]:
        """Copies what updates need from sampled windows to the device; may run in another thread than the updates.

        `weights` (windows,) are importance weights of prioritised draws, or 1 for each window so that its error is returned.
        Raises SchemaError when the windows are not this learner's.
        """
        return self._staging(windows, weights)

    def update(self, batches: WindowBatch | Sequence[Batch]) -> Tensor | None:
        """As many updates as there are batches; waits for nothing on a GPU.

        Returns the absolute errors (windows,), for new priorities and losses of tasks, where the batches have weights.
        """
        if isinstance(batches, WindowBatch):
            batches = self.stage(batches)
        if self._support is not None:
            self._see(batches)
        errors = []
        for batch in batches:
            self._observe(self._seen(batch))
            self._run(batch, self._draw())
            self.updates += 1
            self._anneal()
            self._after_update()
            if batch.weight is not None:
                errors.append(self._errors.clone())
        return torch.cat(errors) if errors else None

    def check_finite(self) -> None:
        """Raises FloatingPointError if a loss since the last `metrics()` was not finite. Waits for the device."""
        values = dict(zip((*self.means, *LARGEST), [*self._sums.tolist(), *self._largest.tolist()], strict=True))
        broken = [f"{name} = {value}" for name, value in values.items() if not math.isfinite(value)]
        if broken:
            data = ", ".join(f"|{name.removeprefix('batch/largest_')}| {values[name]:.4g}" for name in LARGEST)
            raise FloatingPointError(
                f"not finite in updates {self._reported + 1} to {self.updates}: {', '.join(broken)}; expected finite losses. "
                f"Largest values in their batches: {data}. If these are not finite, look at the environment; if they are "
                "merely large, scale observations or rewards; otherwise lower the step sizes (algorithm.*lr)"
            )

    def observe_returns(self, low: float, high: float) -> None:
        """Takes note of the extremes of discounted returns that actors saw: the support of value heads must hold them."""
        if self._support is not None:
            self._support.observe_returns(low, high)

    def metrics(self) -> dict[str, float]:
        """Means (and largest batch values) over the updates since the last call; empty if there were none.

        Value heads whose support the data decides are widened here where they must be: call it every second or so. Raises
        FloatingPointError as `check_finite` does.
        """
        self.check_finite()
        count = self.updates - self._reported
        if count == 0:
            return {}
        row = dict(zip(self.means, (self._sums / count).tolist(), strict=True))
        row |= dict(zip(LARGEST, self._largest.tolist(), strict=True))
        row |= self._watch_support(row)
        self._sums.zero_()
        self._largest.zero_()
        self._reported = self.updates
        return row

    def policy_bytes(self) -> bytes:
        """The policy's weights for actors: a safetensors buffer that names the policy's kind."""
        kind, tensors = self._policy()
        if self._normaliser is not None:
            tensors |= self._normaliser.published()
        return save(
            {name: t.detach().to("cpu", torch.float32).contiguous() for name, t in tensors.items()}, {"policy": kind}
        )

    def state(self) -> dict[str, Tensor]:
        """Copies, on the CPU, of everything that updates read, by names such as `critic.online.value`.

        The same batches then give the same parameters. (What stands for actions that are missing from a chunk is drawn when a
        batch is staged, ahead of the updates, and begins anew.)
        """
        state = {name: tensor.detach().to("cpu", copy=True) for name, tensor in self._kept().items()}
        if self._support is not None and isinstance(self._head, Classification):
            bins = [*self._head.support, float(self._head.outputs)]
            state |= self._support.state() | {"support": torch.tensor(bins, dtype=torch.float64)}
        return state | {"noise": self._generator.get_state(), "updates": torch.tensor(self.updates)}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Goes on where `state()` was taken. Raises ValueError, changing nothing, if networks or keys differ."""
        beside = {"noise", "updates"}
        before: dict[str, Tensor] | None = None
        if self._support is not None:
            beside |= {"support", *self._support.state()}
            if beside <= state.keys():
                before = self.state()
                self._take_support(state)
        tensors = self._kept()
        expected = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        got = {name: tuple(tensor.shape) for name, tensor in state.items() if name not in beside}
        differing = sorted(n for n in expected.keys() | got.keys() if expected.get(n) != got.get(n))
        if differing or not beside <= state.keys():
            if before is not None:
                self._take_support(before)
                self._fill(before)
            shown = "; ".join(f"{n}: expected {expected.get(n)}, got {got.get(n)}" for n in differing[:4])
            missing = ", ".join(sorted(beside - state.keys()))
            raise ValueError(
                "the checkpoint is of another algorithm, environment or algorithm.hidden; resume with the settings it was written "
                f"with ({len(differing)} tensors differ: {shown}{'; …' if len(differing) > 4 else ''}"
                f"{'; missing: ' + missing if missing else ''})"
            )
        self._fill(state)
        self._generator.set_state(state["noise"].cpu())
        self.updates = self._reported = int(state["updates"])
        self._sums.zero_()
        self._largest.zero_()
        self._anneal()

    # --------------------------------------------------------------------------------------------------- its parts

    def _step(self, batch: Batch, noise: Noise) -> None:
        """The update and the sums of its metrics: what is compiled, or recorded."""
        self._sums.add_(torch.stack(tuple(self._update(batch, noise))))
        largest = (_largest(batch.observation), _largest(batch.action).to(self._dtype), _largest(batch.reward))
        torch.maximum(self._largest, torch.stack(largest), out=self._largest)

    def _kept(self) -> dict[str, Tensor]:
        """`_tensors` and those of the parts that every algorithm may have."""
        if self._normaliser is None:
            return self._tensors()
        return self._tensors() | {f"normaliser.{name}": tensor for name, tensor in self._normaliser.state().items()}

    def _see(self, batches: Sequence[Batch]) -> None:
        """Keep batches for the support; before the first update take the support that the data asks for."""
        assert self._support is not None
        if not self._began:
            self._began = True
            self._change_head(self._support.first(torch.cat([batch.reward for batch in batches])))
        for batch in batches:
            self._support.see(batch)

    def _watch_support(self, row: Mapping[str, float]) -> dict[str, float]:
        """Widen the support if it must be; its metrics. One line where targets are clipped all the same."""
        share = row.get("value/clipped_fraction", 0.0)
        self._clipping = self._clipping + 1 if share > WARN_SHARE else 0
        found: dict[str, float] = {}
        if self._support is not None:
            wider = self._support.changed(self._head, self._critics(), self._inputs)
            if wider is not None:
                self._head = wider
                self._clipping = 0  # those of the support before
                self._prepare()
            found = {"support/refit_error": self._support.refit_error}
        if isinstance(self._head, Classification):
            low, high = self._head.support
            found |= {"support/low": low, "support/high": high, "support/bins": float(self._head.bins)}
            # A support that the data decides has one more report to catch up. Told once.
            if self._clipping == (1 if self._support is None else 2) and not self._warned:
                self._warned = True
                LOG.warning(
                    "%.1f %% of the targets lay outside the value support, %.4g to %.4g, and were clamped",
                    100 * share,
                    low,
                    high,
                )
        return found

    def _change_head(self, head: ValueHead) -> None:
        """Another support for networks that have learnt nothing yet: the same outputs stand for other values."""
        self._head = head
        for critic in self._critics():
            critic.head = head
        self._prepare()

    def _fill(self, state: Mapping[str, Tensor]) -> None:
        """Take the parameters of `state`, which must fit."""
        for name, tensor in self._kept().items():
            tensor.copy_(state[name])
        self._refresh()

    def _take_support(self, state: Mapping[str, Tensor]) -> None:
        """The support of a checkpoint, and networks of its size, whose parameters are still to be filled in."""
        assert self._support is not None
        low, high, outputs = state["support"].tolist()
        settings = self._settings.head
        bins = (
            settings.bins + int(outputs) - make_head(settings, PROVISIONAL).outputs
        )  # outputs beyond the bins stay as many
        head = make_head(settings, (low, high), bins=bins, device=self.device, dtype=self._dtype)
        self._support.load_state(state)
        self._began = int(state["updates"]) > 0

        def empty(weight: Tensor, bias: Tensor, part: Part) -> tuple[Tensor, Tensor]:
            width = weight.shape[-1] // self._head.outputs * head.outputs
            return weight.new_zeros(*weight.shape[:-1], width), bias.new_zeros(*bias.shape[:-1], width)

        for critic in self._critics():
            critic.change_head(head, empty)
        self._head = head
        self._prepare()

    def _anneal(self) -> None:
        """Bring the expectile down: at ½ the operator is the ordinary one (Omura et al. 2025, AQL)."""
        if self._expectile is not None:
            target = self._settings.target
            left = max(0.0, 1.0 - self.updates / target.expectile_updates)
            self._expectile.fill_(0.5 + (target.expectile - 0.5) * left)

    def _network(self, networks: int, inputs: int, outputs: int, *, layer_norm: bool = False) -> Network:
        """A group of networks of an observation and `inputs` numbers more."""
        return make_network(
            self._settings,
            networks=networks,
            inputs=self._staging.observation_dim + inputs,
            outputs=outputs,
            vector_size=self._staging.observation_dim,
            frame_shape=self._staging.frame_shape,
            layer_norm=layer_norm,
            products=self._products,
        )

    def _trained(self, network: Network, start: torch.Generator, *, lr: float) -> Trained:
        initial = network.initial(start).to(self.device, self._dtype)
        return Trained(network, initial, lr=lr, precision=self._precision, reduce=self._share.mean)

    def _make_critic(
        self, inputs: int, start: torch.Generator, *, lr: float, ensemble: int, values: int = 1, has_target: bool = True
    ) -> Critic:
        """A critic of an observation and `inputs` numbers more, with `values` values."""
        chain, outputs = self._settings.chain.length, values * self._head.outputs
        network = self._network(chain * ensemble, inputs, outputs, layer_norm=self._settings.layer_norm)
        return Critic(
            network,
            self._head,
            network.initial(start).to(self.device, self._dtype),
            chain=chain,
            lr=lr,
            weight_decay=self._settings.weight_decay,
            precision=self._precision,
            reduce=self._share.mean,
            has_target=has_target,
        )

    def _reduce(self, grad: Tensor) -> None:
        if self._share.mean is not None:
            self._share.mean(grad)

    def _seen(self, batch: Batch) -> Tensor:
        """The observation vectors (rows, dim) that the running mean and deviation take in."""
        return batch.observation[: len(batch.observation) // 2]

    def _normalised(self, observation: Tensor) -> Tensor:
        return observation if self._normaliser is None else self._normaliser(observation).to(self._dtype)

    def _observe(self, observation: Tensor) -> None:
        """Take observation vectors (rows, dim) into the running mean and deviation, those of all learners alike."""
        if self._normaliser is None:
            return
        sums = self._normaliser.sums(observation)
        if self._share.mean is not None:
            self._share.mean(sums)
            sums *= self._share.count
        self._normaliser.merge(sums)

    def _observed(self, observation: Mapping[str, np.ndarray]) -> tuple[Tensor, Tensor | None]:
        """Vector and frames of observation fields (n, *shape), as networks take them."""
        vector, frames = self._staging.observed(observation)
        return self._normalised(vector), frames

    def _support_tensor(self) -> dict[str, Tensor]:
        """The support of a head that classifies, as actors read it."""
        if not isinstance(self._head, Classification):
            return {}
        return {"support": torch.tensor(self._head.support)}

    def _normal(self, *shape: int) -> Tensor:
        """Standard normal numbers."""
        return torch.randn(shape, generator=self._generator, device=self.device, dtype=self._dtype)

    def _permutation(self, count: int) -> Tensor:
        """The numbers below `count` in random order."""
        return torch.randperm(count, generator=self._generator, device=self.device)

    def _integer(self, below: int) -> Tensor:
        """One random number (1,) int64 below `below`."""
        return torch.randint(below, (1,), generator=self._generator, device=self.device)

    def _label_metrics(self, label: Label) -> tuple[Tensor, ...]:
        """Values of LABEL_METRICS, where the head classifies; keeps the label's values for the support."""
        if self._support is not None:
            self._support.keep(label.value)
        return (self._head.clipped(label),) if self._settings.head.classifies else ()

    def _everything(self) -> list[Tensor]:
        """All that `_step` changes."""
        return [*self._tensors().values(), self._errors, self._sums, self._largest]

    def _try_compiled(self, batch: Batch, noise: Noise) -> None:
        """The first compiled update. `fullgraph` compiles all before anything runs, so a failure leaves no half update."""
        try:
            self._compiled(batch, noise)
            self._run = self._compiled
        except Exception as error:
            # Torch wraps the cause: "backend='inductor' raised:", then a line that says what.
            lines = [line for line in str(error).splitlines() if line.strip() and not line.endswith("raised:")]
            reason = lines[0] if lines else type(error).__name__
            LOG.warning("torch.compile failed, so updates run eagerly: %s", reason)
            self._compile = False
            self._prepare()
            self._run(batch, noise)


def _largest(values: Tensor) -> Tensor:
    """Largest absolute value; 0 of nothing, which the observation vector is where networks see frames alone."""
    return values.abs().amax() if values.numel() else values.new_zeros(())
