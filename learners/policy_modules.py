"""The acting policies as torch modules that decide without noise: functions of tensors alone, whose graphs can be exported.

They read the weights that `policy_bytes` of an algorithm wrote and decide as `learners.policy` does in evaluation, but answer
in the environment's own units. What is drawn there (a flow's noise) or remembered (a recurrent state) is an input here.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from configs.algorithms import AlgorithmSettings, DqnSettings, FlowSettings, R2d2Settings, SacSettings
from learners.acting_networks import Tensors
from learners.encoders import Encoder
from learners.policy_parts import ActionSpace, Eyes, Group, Head, Scale, Seen, Trunk, regret
from replay.schema import StepSchema

__all__ = ["ActionSpace", "PolicyModule"]


class PolicyModule(nn.Module):
    """Observation fields in the schema's order, then noise or state, to the outputs named by `outputs`, `action` first.

    Inputs are (batch, *shape), large fields (batch, stack, *shape) where frames are stacked. Continuous actions are
    (batch, *shape) float32 within the environment's bounds, discrete ones (batch,) int64; chunks of more than one action are
    (batch, chunk, …). Greedy policies give `values` (batch, choices ** chunk) besides, recurrent ones `next_state`
    (batch, units) too.
    """

    def __init__(
        self, schema: StepSchema, settings: AlgorithmSettings, space: ActionSpace, data: bytes, *, stack: int = 1
    ) -> None:
        """
        Args:
            schema: of the environment's steps.
            settings: of the algorithm.
            space: the environment's actions.
            data: weights, a safetensors buffer.
            stack: frames that the networks see at once, `env.stack`.

        Raises:
            ValueError: the weights are another policy's, or the policy is a class of the user's.
        """
        if not isinstance(settings, SacSettings | FlowSettings | DqnSettings):
            raise ValueError(
                "policies of sac, flow, dqn and r2d2 are known as graphs, and that of a class of your own is not"
            )
        super().__init__()
        tensors = Tensors(data)
        self.eyes = Eyes(schema, settings.encoder, tensors, stack=stack)
        size, encoder = self.eyes.size, self.eyes.encoder
        self.decide: _SquashedGaussian | _BestOfN | _Greedy
        match settings:
            case SacSettings():
                self.decide = _SquashedGaussian(settings, space, tensors, size, encoder)
            case FlowSettings():
                self.decide = _BestOfN(settings, space, tensors, size, encoder)
            case DqnSettings():
                self.decide = _Greedy(settings, space, schema.action.choices, tensors, size, encoder)
        tensors.finish()
        extra = self.decide.extra
        self.inputs: tuple[str, ...] = (*(f.name for f in schema.observations), *(() if extra is None else extra[:1]))
        self.outputs = self.decide.outputs

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """`outputs` at `inputs`."""
        return self.evaluate(inputs)

    def evaluate(self, inputs: tuple[Tensor, ...], dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
        """`outputs` at `inputs`, with arithmetic of `dtype`; continuous actions are float32 all the same."""
        found: tuple[Tensor, ...] = self.decide(self._seen(inputs, dtype))
        return found

    def distance(self, inputs: tuple[Tensor, ...], action: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """How far each of `action` (batch, …) is from one that this policy may choose, (batch,); arithmetic is of `dtype`.

        Continuous actions are compared in [−1, 1]. One that is the best but for its value, by less than the distance, is as
        good: rounding decides between equals. Values are measured in units of the largest, and at least 1.
        """
        return self.decide.distance(self._seen(inputs, dtype), action)

    def example(self, count: int, generator: np.random.Generator) -> tuple[Tensor, ...]:
        """Random `inputs` for `count` decisions; observations that are normalised are spread as those that were seen."""
        found = self.eyes.example(count, generator)
        if self.decide.extra is not None:
            _, shape = self.decide.extra
            found.append(torch.from_numpy(generator.standard_normal((count, *shape), np.float32)))
        return tuple(found)

    def _seen(self, inputs: tuple[Tensor, ...], dtype: torch.dtype) -> Seen:
        vector, frames = self.eyes(inputs, dtype)
        return Seen(vector, frames, None if self.decide.extra is None else inputs[-1].to(dtype))


class _SquashedGaussian(nn.Module):
    """Tanh of the mean."""

    extra: tuple[str, tuple[int, ...]] | None = None
    outputs: tuple[str, ...] = ("action",)

    def __init__(
        self, settings: SacSettings, space: ActionSpace, tensors: Tensors, size: int, encoder: Encoder | None
    ) -> None:
        super().__init__()
        self._width = settings.chunk * len(space.low)
        self._flat = (settings.chunk, len(space.low))
        self.policy = Group(
            tensors, "policy", inputs=size, hidden=settings.hidden, outputs=2 * self._width, encoder=encoder
        )
        self.scale = Scale(space, settings.chunk)

    def forward(self, seen: Seen) -> tuple[Tensor, ...]:
        return (self.scale(self._action(seen).reshape(-1, *self._flat)),)

    def distance(self, seen: Seen, action: Tensor) -> Tensor:
        return self.scale.distances(action, self._action(seen).unsqueeze(1))[:, 0]

    def _action(self, seen: Seen) -> Tensor:
        return torch.tanh(self.policy(self.policy.inputs(seen))[0, :, : self._width])


class _BestOfN(nn.Module):
    """The best of the chunks that a flow carries noise to; its Euler steps are unrolled."""

    outputs: tuple[str, ...] = ("action",)

    def __init__(
        self, settings: FlowSettings, space: ActionSpace, tensors: Tensors, size: int, encoder: Encoder | None
    ) -> None:
        super().__init__()
        self._settings = settings
        self._width = width = settings.chunk * len(space.low)
        self._flat = (settings.chunk, len(space.low))
        self.extra: tuple[str, tuple[int, ...]] | None = ("noise", (settings.proposals, width))
        self.velocity = Group(
            tensors, "velocity", inputs=size + width + 1, hidden=settings.hidden, outputs=width, encoder=encoder
        )
        self.critics = Group(
            tensors,
            "critics",
            networks=settings.ensemble,
            inputs=size + width,
            hidden=settings.hidden,
            outputs=None,
            encoder=encoder,
        )
        self.head = Head(settings.head, tensors, self.critics, 1)
        self.scale = Scale(space, settings.chunk)

    def forward(self, seen: Seen) -> tuple[Tensor, ...]:
        proposals, values = self._proposals(seen)
        best = values.argmax(1).reshape(-1, 1, 1).expand(-1, 1, self._width)
        return (self.scale(proposals.gather(1, best).reshape(-1, *self._flat)),)

    def distance(self, seen: Seen, action: Tensor) -> Tensor:
        proposals, values = self._proposals(seen)
        return torch.maximum(self.scale.distances(action, proposals), regret(values)).amin(1)

    def _proposals(self, seen: Seen) -> tuple[Tensor, Tensor]:
        """Proposals (batch, proposals, width) and their values (batch, proposals)."""
        assert seen.extra is not None
        settings = self._settings
        x = seen.extra.reshape(1, -1, self._width)
        state = self._repeated(self.velocity.inputs(seen))
        for step in range(settings.flow_steps):
            tau = torch.full_like(x[..., :1], step / settings.flow_steps)
            x = x + self.velocity(torch.cat((state, x, tau), -1)) / settings.flow_steps
        x = x.clamp(-1.0, 1.0)
        state = self._repeated(self.critics.inputs(seen))
        values = self.head(self._logits(torch.cat((state, x.expand(settings.ensemble, -1, -1)), -1)))
        value = values.amin(0) if settings.aggregate == "min" else values.mean(0)
        return x.reshape(-1, settings.proposals, self._width), value.reshape(-1, settings.proposals)

    def _logits(self, x: Tensor) -> Tensor:
        logits: Tensor = self.critics(x)
        return logits

    def _repeated(self, state: Tensor) -> Tensor:
        """Each row (networks, batch, size) for every proposal, (networks, batch * proposals, size)."""
        networks, _, size = state.shape
        return state.unsqueeze(2).expand(-1, -1, self._settings.proposals, -1).reshape(networks, -1, size)


class _Greedy(nn.Module):
    """The sequence of discrete actions with the largest mean value over a chain's functions; recurrent where settings are."""

    def __init__(
        self,
        settings: DqnSettings,
        space: ActionSpace,
        choices: int,
        tensors: Tensors,
        size: int,
        encoder: Encoder | None,
    ) -> None:
        super().__init__()
        self.extra: tuple[str, tuple[int, ...]] | None = None
        self.outputs: tuple[str, ...] = ("action", "values")
        self._dueling, self._chunk = settings.dueling, settings.chunk
        self._choices, self._start = choices, space.start
        self._places = [choices**i for i in reversed(range(settings.chunk))]  # the first action's digit counts most
        self._values = choices**settings.chunk + settings.dueling
        hidden = settings.hidden
        self.trunk: Trunk | None = None
        if isinstance(settings, R2d2Settings):
            self.extra = ("state", (settings.recurrent,))
            self.outputs = (*self.outputs, "next_state")
            self.trunk = Trunk(settings, tensors, size, encoder)
            size, hidden, encoder = settings.recurrent, hidden[1:], None
        self.critics = Group(
            tensors,
            "critics",
            networks=settings.chain.length,
            inputs=size,
            hidden=hidden,
            outputs=None,
            encoder=encoder,
        )
        self.head = Head(settings.head, tensors, self.critics, self._values)

    def forward(self, seen: Seen) -> tuple[Tensor, ...]:
        values, state = self._valued(seen)
        index = values.argmax(1)
        digits = [index // place % self._choices for place in self._places]
        action = digits[0] if self._chunk == 1 else torch.stack(digits, 1)
        return (action + self._start, values, *(() if state is None else (state,)))

    def distance(self, seen: Seen, action: Tensor) -> Tensor:
        digits = (action - self._start).reshape(-1, self._chunk)
        index = (digits * torch.tensor(self._places)).sum(1, keepdim=True)
        return regret(self._valued(seen)[0]).gather(1, index)[:, 0]

    def _valued(self, seen: Seen) -> tuple[Tensor, Tensor | None]:
        """Values (batch, sequences), and the state after the observation, where there is one."""
        state = None
        if self.trunk is None:
            x = self.critics.inputs(seen)
        else:
            state = self.trunk(seen)
            x = state.unsqueeze(0)
        output = self.critics(x)
        logits = output.reshape(output.shape[0], -1, self._values, self.head.bins)
        if self._dueling:
            advantage = logits[:, :, 1:]
            logits = logits[:, :, :1] + advantage - advantage.mean(2, keepdim=True)
        return self.head(logits).mean(0), state
