"""Soft actor-critic: the whole update in one method, `Sac._update`, top to bottom.

Haarnoja et al. 2018, "Soft Actor-Critic Algorithms and Applications" (arXiv 1812.05905), sections 4 to 6. The gradients
are written out beside the losses they belong to; the tests hold them to those that autograd finds. sac.md lists what is
logged and where implementations differ.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor
from torch.nn.functional import softplus

from configs.schema import SacSettings
from learners.networks import Mlp, forward, input_gradient, parameter_gradient
from learners.observations import ObservationVector
from learners.policy import LOG_STD_MAX, LOG_STD_MIN
from replay.schema import SchemaError, StepSchema, WindowBatch

LOG = logging.getLogger(__name__)

TWINS = 2
MEANS = (
    "loss/critic",
    "loss/policy",
    "loss/temperature",
    "temperature",
    "entropy",
    "q/mean",
    "q/target",
    "batch/reward",
)
LARGEST = ("batch/largest_observation", "batch/largest_action", "batch/largest_return")


@dataclass(frozen=True)
class SacBatch:
    """What one update reads, float32 on the learner's device."""

    observation: Tensor  # (2 * batch, observation_dim): at the windows' starts, then after their last transitions
    action: Tensor  # (batch, action_dim), in [-1, 1]
    reward: Tensor  # (batch,): discounted sum over the window
    discount: Tensor  # (batch,): gamma^length, or 0 where the window ends in a terminal state


class _Trained:
    """The parameters of one network group with their gradient and Adam moments, each one flat tensor."""

    def __init__(self, initial: Tensor, lr: float, device: torch.device) -> None:
        self.value = initial.to(device)
        self.grad = torch.zeros_like(self.value)
        self.first = torch.zeros_like(self.value)
        self.second = torch.zeros_like(self.value)
        self.steps = torch.zeros((), device=device)
        self.lr = lr

    def descend(self) -> None:
        """One Adam step along `grad` (Kingma and Ba 2015, arXiv 1412.6980): one fused operator, eager or compiled."""
        beta1, beta2, eps = 0.9, 0.999, 1e-8
        self.steps += 1.0
        if torch.compiler.is_compiling():  # the compiler fuses formulas, and cannot look into the operator below
            self.first.lerp_(self.grad, 1.0 - beta1)
            self.second.mul_(beta2).addcmul_(self.grad, self.grad, value=1.0 - beta2)
            scale = (self.second / (1.0 - beta2**self.steps)).sqrt_().add_(eps)
            self.value.sub_(self.lr / (1.0 - beta1**self.steps) * self.first / scale)
            return
        torch._fused_adam_(
            [self.value],
            [self.grad],
            [self.first],
            [self.second],
            [],
            [self.steps],
            lr=self.lr,
            beta1=beta1,
            beta2=beta2,
            weight_decay=0.0,
            eps=eps,
            amsgrad=False,
            maximize=False,
        )

    def state(self) -> dict[str, Tensor]:
        return {"value": self.value, "first": self.first, "second": self.second, "steps": self.steps}


@dataclass(frozen=True)
class Squashed:
    """A sample of the tanh-squashed Gaussian policy, and what its gradient needs; every tensor (batch, action_dim) but one."""

    action: Tensor  # tanh(u), u = mean + deviation
    log_prob: Tensor  # (batch,)
    deviation: Tensor  # sigma * noise
    slope: Tensor  # d log sigma / d raw

    @classmethod
    def sample(cls, head: Tensor, noise: Tensor) -> Squashed:
        """From `head` (batch, 2 * action_dim), means and raw log standard deviations, and standard normal `noise`."""
        mean, raw = head.chunk(2, -1)
        squashed = torch.tanh(raw)
        half = 0.5 * (LOG_STD_MAX - LOG_STD_MIN)
        log_std = half * squashed + (LOG_STD_MIN + half)
        deviation = log_std.exp() * noise
        u = mean + deviation
        # log N(u) - log(1 - tanh(u)^2), the latter as 2 (log 2 - u - softplus(-2u)): exact where tanh saturates.
        density = 2.0 * (u + softplus(-2.0 * u)) - 0.5 * noise.square() - log_std
        constant = noise.shape[-1] * (0.5 * math.log(2.0 * math.pi) + 2.0 * math.log(2.0))
        return cls(torch.tanh(u), density.sum(-1) - constant, deviation, half * (1.0 - squashed.square()))

    def gradient(self, of_action: Tensor, of_log_prob: Tensor) -> Tensor:
        """Gradient (rows, 2 * action_dim) of the first rows of the head.

        `of_action` (rows, action_dim) is that of their actions, `of_log_prob` that of each log-probability.
        """
        rows = len(of_action)
        action = self.action[:rows]
        # d log_prob / du = 2 tanh(u) at fixed noise, so sigma moves log_prob through u and by -1 directly.
        of_u = of_action * (1.0 - action.square()) + 2.0 * of_log_prob * action
        of_raw = (of_u * self.deviation[:rows] - of_log_prob) * self.slope[:rows]
        return torch.cat((of_u, of_raw), -1)


class Sac:
    """Soft actor-critic with twin critics, a learned temperature and n-step targets, on vectors of observations.

    Float and uint8 observation fields are flattened and concatenated. `device` is a torch device or "auto". The first
    update with `compile` takes up to a minute; where it fails the update runs eagerly, and one line is logged.
    """

    def __init__(
        self,
        schema: StepSchema,
        settings: SacSettings,
        *,
        batch_size: int,
        device: str,
        seed: int,
        compile: bool = False,
    ) -> None:
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        self.device = torch.device(device)
        self.updates = 0
        self._schema = schema
        self._settings = settings
        self._batch_size = batch_size
        self._observations = ObservationVector(schema)
        self._action_dim = int(np.prod(schema.action.shape, dtype=np.int64))
        self._entropy_goal = -float(self._action_dim) if settings.target_entropy is None else settings.target_entropy

        observation_dim = self._observations.size
        policy = Mlp(1, observation_dim, settings.hidden, 2 * self._action_dim)
        critics = Mlp(TWINS, observation_dim + self._action_dim, settings.hidden, 1)
        self._generator = torch.Generator(self.device).manual_seed(seed)
        start = torch.Generator().manual_seed(seed)
        self._policy = _Trained(policy.initial(start), settings.policy_lr, self.device)
        self._critics = _Trained(critics.initial(start), settings.critic_lr, self.device)
        log_temperature = torch.tensor([math.log(settings.initial_temperature)])
        self._log_temperature = _Trained(log_temperature, settings.temperature_lr, self.device)
        self._targets = self._critics.value.clone()
        self._policy_layers = policy.layers(self._policy.value)
        self._policy_grads = policy.layers(self._policy.grad)
        self._critic_layers = critics.layers(self._critics.value)
        self._critic_grads = critics.layers(self._critics.grad)
        self._target_layers = critics.layers(self._targets)

        # Row k holds gamma^0 … gamma^(k-1), then zeros: multiplied with a window of length k it leaves the return.
        powers = settings.discount ** np.arange(settings.n_step + 1)
        rows = np.broadcast_to(powers[:-1], (settings.n_step + 1, settings.n_step))
        self._return_weights = np.tril(rows, -1).astype("f4")
        self._bootstrap = powers.astype("f4")  # gamma^k by window length k
        self._sums = torch.zeros(len(MEANS), device=self.device)
        self._largest = torch.zeros(len(LARGEST), device=self.device)
        self._reported = 0
        self._run: Callable[..., None] = self._update
        if compile:
            self._compiled = torch.compile(self._update, fullgraph=True, dynamic=False)
            self._run = self._try_compiled

    # ------------------------------------------------------------------------------------------------ the update

    def _update(self, observation: Tensor, action: Tensor, reward: Tensor, discount: Tensor, noise: Tensor) -> None:
        """One gradient step of everything, in place; shapes as in `SacBatch`, `noise` (2 * batch, action_dim)."""
        batch = len(action)
        now, after = observation[:batch], observation[batch:]
        temperature = self._log_temperature.value.exp()

        # One forward pass of the policy serves the targets (second half) and its own loss (first half).
        policy_values = forward(self._policy_layers, observation)
        sample = Squashed.sample(policy_values[-1][0], noise)
        log_prob, next_log_prob = sample.log_prob[:batch], sample.log_prob[batch:]

        # Critics: half the squared error to y = r + discount (min Q' - alpha log pi), mean over the batch, sum over twins.
        next_q = forward(self._target_layers, torch.cat((after, sample.action[batch:]), -1))[-1]
        soft_value = next_q.amin(0).squeeze(-1) - temperature * next_log_prob
        target = reward + discount * soft_value
        critic_values = forward(self._critic_layers, torch.cat((now, action), -1))
        q = critic_values[-1]  # (twins, batch, 1)
        error = q - target.unsqueeze(-1)
        parameter_gradient(self._critic_layers, critic_values, error / batch, self._critic_grads)
        self._critics.descend()

        # Policy: E[alpha log pi - min Q], by the critics just updated; each sample's gradient goes through its smaller twin.
        critic_values = forward(self._critic_layers, torch.cat((now, sample.action[:batch]), -1))
        smallest, twin = critic_values[-1].min(0, keepdim=True)
        of_q = torch.zeros_like(q).scatter_(0, twin, -1.0 / batch)
        of_action = input_gradient(self._critic_layers, critic_values, of_q, start=observation.shape[1])
        of_head = sample.gradient(of_action, temperature / batch)
        values = [value[:, :batch] for value in policy_values]
        parameter_gradient(self._policy_layers, values, of_head.unsqueeze(0), self._policy_grads)
        self._policy.descend()

        # Temperature: E[-log alpha (log pi + goal)], with the log-probabilities the policy loss used.
        entropy = -log_prob.mean()
        torch.sub(entropy, self._entropy_goal, out=self._log_temperature.grad[0])
        log_temperature = self._log_temperature.value[0].clone()
        self._log_temperature.descend()

        self._targets.lerp_(self._critics.value, self._settings.polyak)

        alpha = temperature[0]
        critic_loss = error.square().sum() * (0.5 / batch)
        policy_loss = -alpha * entropy - smallest.mean()
        temperature_loss = log_temperature * self._log_temperature.grad[0]
        means = (critic_loss, policy_loss, temperature_loss, alpha, entropy, q.mean(), target.mean(), reward.mean())
        self._sums.add_(torch.stack(means))
        largest = (observation.abs().amax(), action.abs().amax(), reward.abs().amax())
        torch.maximum(self._largest, torch.stack(largest), out=self._largest)

    # ------------------------------------------------------------------------------------------- the learner's face

    def stage(self, batch: WindowBatch) -> SacBatch:
        """Copies what an update needs from sampled windows to the device; may run in another thread than the updates.

        Raises SchemaError when the windows are not this learner's: other fields, batch size or number of steps.
        """
        size, steps, length = self._batch_size, batch.steps, batch.length
        shape = (size, self._settings.n_step + 1)
        if steps.shape != shape or steps.dtype != self._schema.packed:
            raise SchemaError(
                f"expected windows of shape {shape} with {self._schema}, got {steps.shape} with {steps.dtype}; "
                "the table must serve windows of algorithm.n_step and batches of learners.batch_size"
            )
        observed, acted = 2 * size * self._observations.size, size * self._action_dim
        cuda = self.device.type == "cuda"
        packed = torch.empty(observed + acted + 2 * size, pin_memory=cuda)
        host = packed.numpy()
        first, last = steps[:, 0], steps[np.arange(size), length]
        observation = host[:observed].reshape(2 * size, -1)
        self._observations.write(_observed(batch, first, np.zeros(size, np.int32)), observation[:size])
        self._observations.write(_observed(batch, last, length), observation[size:])
        host[observed : observed + acted].reshape(size, -1)[:] = first["action"].reshape(size, -1)
        reward, discount = host[-2 * size : -size], host[-size:]
        if shape[1] == 2:
            reward[:] = first["reward"]
        else:
            np.einsum("bi,bi->b", steps["reward"][:, :-1], self._return_weights[length], out=reward)
        np.multiply(self._bootstrap[length], ~last["is_terminal"], out=discount)
        if cuda:
            packed = packed.to(self.device, non_blocking=True)
        return SacBatch(
            packed[:observed].view(2 * size, -1),
            packed[observed : observed + acted].view(size, -1),
            packed[-2 * size : -size],
            packed[-size:],
        )

    def update(self, batch: WindowBatch | SacBatch) -> None:
        """One gradient update of critics, policy, temperature and targets; waits for nothing on a GPU."""
        if isinstance(batch, WindowBatch):
            batch = self.stage(batch)
        shape = (2 * self._batch_size, self._action_dim)
        noise = torch.randn(shape, generator=self._generator, device=self.device)
        self._run(batch.observation, batch.action, batch.reward, batch.discount, noise)
        self.updates += 1

    def _try_compiled(self, *arguments: Tensor) -> None:
        """The first compiled update. `fullgraph` compiles all before anything runs, so a failure leaves no half update."""
        try:
            self._compiled(*arguments)
            self._run = self._compiled
        except Exception as error:
            # Torch wraps the cause: "backend='inductor' raised:", then a line that says what.
            lines = [line for line in str(error).splitlines() if line.strip() and not line.endswith("raised:")]
            reason = lines[0] if lines else type(error).__name__
            LOG.warning("torch.compile failed, so updates run eagerly: %s", reason)
            self._run = self._update
            self._run(*arguments)

    def check_finite(self) -> None:
        """Raises FloatingPointError if a loss since the last `metrics()` was not finite. Waits for the device."""
        values = dict(zip((*MEANS, *LARGEST), torch.cat((self._sums, self._largest)).tolist(), strict=True))
        broken = [f"{name} = {value}" for name, value in values.items() if not math.isfinite(value)]
        if broken:
            data = ", ".join(f"|{name.removeprefix('batch/largest_')}| {values[name]:.4g}" for name in LARGEST)
            raise FloatingPointError(
                f"not finite in updates {self._reported + 1} to {self.updates}: {', '.join(broken)}; expected finite losses. "
                f"Largest values in their batches: {data}. If these are not finite, look at the environment; if they are "
                "merely large, scale observations or rewards; otherwise lower algorithm.critic_lr and algorithm.policy_lr"
            )

    def metrics(self) -> dict[str, float]:
        """Means (and largest batch values) over the updates since the last call; empty if there were none.

        Raises FloatingPointError as `check_finite` does.
        """
        self.check_finite()
        count = self.updates - self._reported
        if count == 0:
            return {}
        row = dict(zip(MEANS, (self._sums / count).tolist(), strict=True))
        row |= dict(zip(LARGEST, self._largest.tolist(), strict=True))
        self._sums.zero_()
        self._largest.zero_()
        self._reported = self.updates
        return row

    def policy_bytes(self) -> bytes:
        """The policy for `SquashedGaussianPolicy.load`: safetensors with `<layer>.weight` (in, out) and `<layer>.bias` (out,)."""
        tensors = {}
        for i, layer in enumerate(self._policy_layers):
            tensors[f"{i}.weight"], tensors[f"{i}.bias"] = layer.weight[0].cpu(), layer.bias[0, 0].cpu()
        return save(tensors, {"policy": "squashed_gaussian"})

    def _tensors(self) -> dict[str, Tensor]:
        groups = {"policy": self._policy, "critics": self._critics, "log_temperature": self._log_temperature}
        tensors = {f"{name}.{part}": tensor for name, group in groups.items() for part, tensor in group.state().items()}
        return tensors | {"targets.value": self._targets}

    def state(self) -> dict[str, Tensor]:
        """Copies, on the CPU, of everything needed to go on exactly; keys such as `critics.value` and `critics.first`."""
        state = {name: tensor.detach().to("cpu", copy=True) for name, tensor in self._tensors().items()}
        return state | {"noise": self._generator.get_state(), "updates": torch.tensor(self.updates)}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Goes on where `state()` was taken. Raises ValueError, changing nothing, if networks or keys differ."""
        tensors = self._tensors()
        expected = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        got = {name: tuple(tensor.shape) for name, tensor in state.items() if name not in ("noise", "updates")}
        if got != expected or not {"noise", "updates"} <= state.keys():
            raise ValueError(
                f"expected learner state {expected} with noise and updates, got {got}: the checkpoint is of another "
                "algorithm, environment or algorithm.hidden; resume with the settings it was written with"
            )
        for name, tensor in tensors.items():
            tensor.copy_(state[name])
        self._generator.set_state(state["noise"].cpu())
        self.updates = self._reported = int(state["updates"])
        self._sums.zero_()
        self._largest.zero_()


def _observed(batch: WindowBatch, rows: np.ndarray, column: np.ndarray) -> Mapping[str, np.ndarray] | np.ndarray:
    """Observation fields by name, of `rows` (batch,), which are the windows' at `column` (batch,): large ones lie apart."""
    if not batch.frames:
        return rows
    small = {name: rows[name] for name in rows.dtype.names or ()}
    return small | {name: frames[np.arange(len(rows)), column, -1] for name, frames in batch.frames.items()}
