"""The acting policies as torch modules that decide as actors do, exploration included: functions of tensors alone.

`learners.policy_modules` decides without exploration, for deployment. Here all that an actor draws or remembers is an input,
and besides the environment's action the row's comes out, so that another program can act and write in an actor's place.
"""

from __future__ import annotations

from typing import NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn

from configs.algorithms import AlgorithmSettings, DqnSettings, FlowSettings, R2d2Settings, SacSettings
from learners.acting_continuous import LOG_STD_MAX, LOG_STD_MIN
from learners.policy_modules import ActionSpace, PolicyModule
from learners.policy_parts import Group, Head, Scale, Seen, Trunk
from replay.schema import StepSchema

NOISE, UNIFORM, RANK, STATE = "noise", "uniform", "rank", "state"  # inputs besides the observation


class Port(NamedTuple):
    """An input or output, (batch, *shape)."""

    name: str
    dtype: str  # numpy's name
    shape: tuple[int, ...]
    holds: str  # of an input: observation, standard_normal, uniform, rank or state; of an output: action, row or state


class ActingModule(nn.Module):
    """What an actor sees, draws and remembers, to the actions that it takes and writes.

    Inputs are the observation fields in the schema's order, (batch, *shape) and those of stacked frames (batch, stack, *shape);
    then, where the policy needs them,

        noise    standard normal numbers (batch, …): of a Gaussian policy (chunk * action_dim,), where zeros make it act
                 deterministically; of a flow's proposals (proposals, chunk * action_dim)
        uniform  numbers u from 0 to 1, 1 excluded, (batch, 2): the lane explores if u₀ is below its epsilon, and takes
                 action ⌊u₁ · choices⌋ then; of chains (batch, 3), where value function ⌊u₂ · functions⌋ decides, the same
                 u₂ in all lanes of a step
        rank     the lane's place on the ladder of exploration, (batch,), from 0 for the first lane to 1 for the last
        state    recurrent state (batch, units) before the step, zero at an episode's start

    Outputs are `action`, as the environment takes it; `row_action`, as the row's field `action` holds it: in [−1, 1], or a
    number from 0; both (batch, chunk, …) where a chunk is more than one action; and `next_state` of recurrent policies.
    """

    def __init__(
        self, schema: StepSchema, settings: AlgorithmSettings, space: ActionSpace, data: bytes, *, stack: int = 1
    ) -> None:
        """Arguments and errors as those of `learners.policy_modules.PolicyModule`."""
        super().__init__()
        width = len(space.low)
        # What PolicyModule scales to these bounds, it leaves as it is.
        as_in_rows = ActionSpace(schema.action.shape, np.full(width, -1.0, np.float32), np.ones(width, np.float32))
        self.policy = PolicyModule(schema, settings, as_in_rows, data, stack=stack)
        self._settings, self._observations = settings, len(schema.observations)
        self._start, self._choices = space.start, schema.action.choices
        self._chunks = (settings.chunk,) if settings.chunk > 1 else ()
        self.scale = None if isinstance(settings, DqnSettings) else Scale(space, settings.chunk)
        self.input_ports: tuple[Port, ...] = (*_observations(schema, stack), *_extra(settings, width))
        taken = Port("action", schema.action.dtype, (*self._chunks, *space.shape), "action")
        row = Port("row_action", schema.action.dtype, (*self._chunks, *schema.action.shape), "row")
        states = [port._replace(name="next_state") for port in self.input_ports if port.name == STATE]
        self.output_ports: tuple[Port, ...] = (taken, row, *states)
        self.inputs = tuple(port.name for port in self.input_ports)
        self.outputs = tuple(port.name for port in self.output_ports)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """`outputs` at `inputs`."""
        given = dict(zip(self.inputs, inputs, strict=True))
        if isinstance(self._settings, DqnSettings):
            return self._greedy(given, self._settings)
        row = self._gaussian(given) if isinstance(self._settings, SacSettings) else self.policy(*inputs)[0]
        assert self.scale is not None
        return self.scale(row.reshape(-1, self._settings.chunk, len(self.scale.low))), row

    def example(self, count: int, generator: np.random.Generator) -> tuple[Tensor, ...]:
        """Random `inputs` for `count` decisions; observations that are normalised are spread as those that were seen."""
        found = self.policy.eyes.example(count, generator)
        for port in self.input_ports[self._observations :]:
            normal = port.holds in ("standard_normal", "state")
            drawn = (generator.standard_normal if normal else generator.random)((count, *port.shape), np.float32)
            found.append(torch.from_numpy(drawn))
        return tuple(found)

    def _seen(self, given: dict[str, Tensor]) -> Seen:
        vector, frames = self.policy.eyes(tuple(given.values())[: self._observations], torch.float32)
        return Seen(vector, frames, given.get(STATE))

    def _gaussian(self, given: dict[str, Tensor]) -> Tensor:
        """Tanh of a Gaussian, as `SquashedGaussianPolicy`."""
        network, seen = cast(Group, self.policy.decide.policy), self._seen(given)
        mean, raw = network(network.inputs(seen))[0].chunk(2, 1)
        half = 0.5 * (LOG_STD_MAX - LOG_STD_MIN)
        sigma = torch.exp(half * torch.tanh(raw) + (LOG_STD_MIN + half))
        action = torch.tanh(mean + sigma * given[NOISE])
        return action.reshape(-1, *self._chunks, action.shape[1] // self._settings.chunk)

    def _greedy(self, given: dict[str, Tensor], settings: DqnSettings) -> tuple[Tensor, ...]:
        """Epsilon-greedy choice of a sequence of discrete actions, as `GreedyPolicy` and `RecurrentPolicy`."""
        values, state = self._values(given, settings)  # (functions, batch, sequences)
        uniform = given[UNIFORM]
        which = torch.zeros_like(uniform[:, 0], dtype=torch.int64)
        if settings.chain.length > 1:
            which = _among(uniform[:, 2], settings.chain.length)
        of_which = values.gather(0, which.reshape(1, -1, 1).expand(1, -1, values.shape[2]))[0]
        epsilon = torch.full_like(uniform[:, 0], settings.epsilon)
        if settings.epsilon_ladder:
            epsilon = epsilon ** (1.0 + settings.epsilon_ladder * given[RANK])
        index = torch.where(uniform[:, 0] < epsilon, _among(uniform[:, 1], values.shape[2]), of_which.argmax(1))
        digits = [index // self._choices**place % self._choices for place in reversed(range(settings.chunk))]
        row = torch.stack(digits, 1) if self._chunks else digits[0]
        return row + self._start, row, *(() if state is None else (state,))

    def _values(self, given: dict[str, Tensor], settings: DqnSettings) -> tuple[Tensor, Tensor | None]:
        """Values (functions, batch, sequences) of each value function, and the state after the observation, if any."""
        decide, seen, state = self.policy.decide, self._seen(given), None
        trunk, critics = cast(Trunk | None, decide.trunk), cast(Group, decide.critics)
        head = cast(Head, decide.head)
        if trunk is None:
            x = critics.inputs(seen)
        else:
            state = trunk(seen)
            x = state.unsqueeze(0)
        logits = critics(x).unflatten(2, (-1, head.bins))
        if settings.dueling:
            advantage = logits[:, :, 1:]
            logits = logits[:, :, :1] + advantage - advantage.mean(2, keepdim=True)
        return head(logits), state


def _observations(schema: StepSchema, stack: int) -> list[Port]:
    return [
        Port(f.name, f.dtype, ((stack,) if stack > 1 and f in schema.large else ()) + f.shape, "observation")
        for f in schema.observations
    ]


def _extra(settings: AlgorithmSettings, width: int) -> list[Port]:
    """What a decision depends on besides the observation; `width` numbers make a continuous action."""
    match settings:
        case SacSettings():
            return [Port(NOISE, "float32", (settings.chunk * width,), "standard_normal")]
        case FlowSettings():
            return [Port(NOISE, "float32", (settings.proposals, settings.chunk * width), "standard_normal")]
        case DqnSettings():
            ports = [Port(UNIFORM, "float32", (2 if settings.chain.length == 1 else 3,), "uniform")]
            if settings.epsilon_ladder:
                ports.append(Port(RANK, "float32", (), "rank"))
            if isinstance(settings, R2d2Settings):
                ports.append(Port(STATE, "float32", (settings.recurrent,), "state"))
            return ports
    return []


def _among(uniform: Tensor, count: int) -> Tensor:
    """Whole numbers below `count`, each as likely, from uniform numbers."""
    return (uniform * count).long().clamp(max=count - 1)
