"""The typed settings of the algorithms: value head × target × chain × policy, and the networks they share.

`algorithm.name` names the policy and with it the family: `sac` a squashed Gaussian, `flow` the best of N proposals of a flow,
`dqn` greedy over discrete actions, `r2d2` the same with a recurrent network; `custom` takes classes of the user's. Head, target
and chain are chosen inside it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from configs.settings import CLASS, Scalar, Settings, setting

Width = Annotated[int, Field(ge=1, le=65_536)]

CLASSIFICATION = ("two_hot", "hl_gauss", "c51")  # value heads over bins
MAX_SEQUENCES = 4_096  # action sequences that a chunk critic over discrete actions lists


class HeadSettings(Settings):
    """How a network's outputs stand for a value (Farebrother et al. 2024, arXiv 2403.03950)."""

    kind: str = setting(
        "mse",
        "mse regresses a scalar; two_hot and hl_gauss classify the mean of the target, c51 its whole distribution; "
        "package.module:Class is a head of your own.",
        unit="name",
        pattern=rf"^(mse|{'|'.join(CLASSIFICATION)}|{CLASS})$",
        allowed=f"mse, {', '.join(CLASSIFICATION)} or package.module:Class",
        names=("mse", *CLASSIFICATION),
    )
    bins: int = setting(
        101, "Bins (hl_gauss) or atoms (two_hot, c51) between low and high.", unit="bins", ge=2, le=4096
    )
    max_bins: int = setting(
        401, "Bins to which an automatic support may grow before their width is doubled.", unit="bins", ge=2, le=16_384
    )
    low: float | None = setting(
        None, "Lowest value that is represented; None finds it in the data.", unit="reward", ge=-1e9, le=1e9
    )
    high: float | None = setting(
        None, "Highest value that is represented; None finds it in the data.", unit="reward", ge=-1e9, le=1e9
    )
    sigma: float = setting(
        0.75, "Standard deviation of the Gaussian of hl_gauss, in bins.", unit="bins", gt=0.0, le=10.0
    )
    margin: float = setting(
        0.25, "Share of the range found in the data that is added at both of its ends.", unit="share", ge=0.0, le=10.0
    )

    @property
    def classifies(self) -> bool:
        """Whether outputs weigh bins of a support, which may grow; of a head of the user's nobody else knows what they are."""
        return self.kind in CLASSIFICATION

    @property
    def is_own(self) -> bool:
        """Whether the head is a class of the user's."""
        return ":" in self.kind

    @property
    def is_automatic(self) -> bool:
        """Whether the values represented are to be found in the data."""
        return self.classifies and (self.low is None or self.high is None)


class TargetSettings(Settings):
    """What the critic regresses on."""

    kind: Literal["one_step", "n_step", "chunk", "decoupled"] = setting(
        "one_step",
        "one_step and n_step bootstrap after 1 and length steps; chunk values sequences of length actions (Li et al. 2025, "
        "arXiv 2507.07969); decoupled distils a chunk critic for the policy's shorter chunks (arXiv 2512.10926).",
        unit="choice",
    )
    length: int = setting(1, "Steps of a window, h.", unit="steps", ge=1, le=1000)
    distill_expectile: float = setting(
        0.5,
        "Expectile of the distilled critic of decoupled; above 0.5 it leans to the best completions of a chunk.",
        unit="expectile",
        ge=0.5,
        lt=1.0,
    )
    expectile: float = setting(
        0.5,
        "Expectile of the critic's loss at the start, annealed to 0.5 (Omura et al. 2025, AQL); 0.5 is the plain loss.",
        unit="expectile",
        ge=0.5,
        lt=1.0,
    )
    expectile_updates: int = setting(
        100_000, "Updates over which the expectile falls to 0.5.", unit="updates", ge=1, le=10**12
    )


class ChainSettings(Settings):
    """Iterated Q: K value functions, each learning the Bellman update of the one before (Vincent et al. 2025)."""

    length: int = setting(
        1, "Value functions in the chain, K; 1 is the plain algorithm.", unit="functions", ge=1, le=64
    )
    copy_every: int = setting(
        30,
        "Updates between two copies of online functions into the chain's later targets, D.",
        unit="updates",
        ge=1,
        le=10**9,
    )
    policy_value: Literal["mean", "one"] = setting(
        "mean",
        "Value that the policy climbs: the mean over the chain, or one function drawn per update.",
        unit="choice",
    )


class AlgorithmSettings(Settings):
    """What every algorithm has."""

    discount: float = setting(0.99, "Discount of the return, gamma.", unit="per step", ge=0.0, le=1.0)
    head: HeadSettings = HeadSettings()
    target: TargetSettings = TargetSettings()
    chain: ChainSettings = ChainSettings()
    chunk: int = setting(
        1, "Actions that the policy chooses at once and actors execute open loop, h_a.", unit="steps", ge=1, le=1000
    )
    hidden: tuple[Width, ...] = setting(
        (256, 256), "Widths of the hidden layers of policy and critics.", unit="units", min_length=1, max_length=16
    )
    layer_norm: bool = setting(False, "Layer normalisation in the hidden layers of the critics.", unit="switch")
    encoder: str = setting(
        "auto",
        "What comes before the hidden layers: none, nature or impala (convolutions for frames), package.module:Class for your "
        "own torch module; auto takes nature where there are frames and none elsewhere.",
        unit="name",
        min_length=1,
    )
    normalise_observations: bool = setting(
        False, "Scale observation vectors by their running mean and deviation.", unit="switch"
    )
    weight_decay: float = setting(
        0.0, "Decoupled weight decay of Adam, on every parameter of the critics.", unit="per update", ge=0.0, le=1.0
    )

    @property
    def window_steps(self) -> int:
        """Steps of the windows that are drawn."""
        return self.target.length

    @property
    def window_settings(self) -> str:
        """The settings that `window_steps` comes from."""
        return "algorithm.target.length"

    @property
    def labels_per_window(self) -> int:
        """Steps of a window that have a target of their own."""
        return 1

    @property
    def distils(self) -> bool:
        """Whether the critic of the policy's chunks is another one than that of the windows' chunks."""
        target = self.target
        return target.kind == "decoupled" and (self.chunk < target.length or target.distill_expectile != 0.5)

    def conflicts(self) -> Iterator[str]:
        """One line for each combination that is illegal."""
        head, target, chain = self.head, self.target, self.chain
        if head.low is not None and head.high is not None and head.low >= head.high:
            yield f"algorithm.head.low ({head.low:g}) must be below algorithm.head.high ({head.high:g})"
        if (head.low is None) != (head.high is None):
            yield "algorithm.head.low and algorithm.head.high must both be set, or both be left to the data"
        if head.kind == "mse" and (head.low, head.high) != (None, None):
            yield (
                "algorithm.head.low and algorithm.head.high are the ends of bins, which algorithm.head.kind mse has none of; "
                f"leave them out, or take {', '.join(CLASSIFICATION)}"
            )
        if head.is_automatic and head.bins > head.max_bins:
            yield (
                f"algorithm.head.bins ({head.bins}) must not exceed algorithm.head.max_bins ({head.max_bins}) where "
                "algorithm.head.low and algorithm.head.high are left to the data"
            )
        if target.kind == "one_step" and target.length != 1:
            yield (
                f"algorithm.target.kind one_step has windows of one step, and algorithm.target.length is {target.length}; "
                "take n_step, chunk or decoupled"
            )
        if target.kind != "decoupled" and target.distill_expectile != 0.5:
            yield (
                f"algorithm.target.distill_expectile ({target.distill_expectile:g}) needs algorithm.target.kind decoupled: "
                "nothing else distils"
            )
        if self.chunk > target.length and target.kind in ("chunk", "decoupled"):
            yield (
                f"algorithm.chunk ({self.chunk}) must not exceed algorithm.target.length ({target.length}): the critic "
                "values sequences of that length"
            )
        if target.kind == "chunk" and self.chunk != target.length:
            yield (
                f"algorithm.target.kind chunk needs algorithm.chunk ({self.chunk}) equal to algorithm.target.length "
                f"({target.length}); decoupled lets the policy's chunk be shorter"
            )
        if target.kind in ("one_step", "n_step") and self.chunk != 1:
            yield (
                f"algorithm.chunk ({self.chunk}) must be 1 with algorithm.target.kind {target.kind}: its critic values "
                "single actions; take chunk or decoupled"
            )
        if chain.length == 1 and chain.policy_value == "one":
            yield "algorithm.chain.policy_value one draws one of algorithm.chain.length functions, and there is one"


class ContinuousSettings(AlgorithmSettings):
    """What the algorithms for continuous actions share."""

    policy_lr: float = setting(3e-4, "Adam step size of the policy.", unit="per update", gt=0.0, le=1.0)
    critic_lr: float = setting(3e-4, "Adam step size of the critics.", unit="per update", gt=0.0, le=1.0)
    polyak: float = setting(
        0.005, "Share of the online critics mixed into their targets at each update, tau.", unit="share", gt=0.0, le=1.0
    )
    ensemble: int = setting(2, "Critics, E.", unit="critics", ge=1, le=64)
    subset: int | None = setting(
        None,
        "Critics drawn per update for the target's minimum (REDQ, arXiv 2101.05982); None takes all.",
        unit="critics",
        ge=1,
        le=64,
    )

    def conflicts(self) -> Iterator[str]:
        yield from super().conflicts()
        if self.subset is not None and self.subset > self.ensemble:
            yield f"algorithm.subset ({self.subset}) must not exceed algorithm.ensemble ({self.ensemble})"


class SacSettings(ContinuousSettings):
    """Soft actor-critic (Haarnoja et al. 2018, arXiv 1812.05905)."""

    name: Literal["sac"] = setting("sac", "The algorithm.", unit="choice")
    temperature_lr: float = setting(3e-4, "Adam step size of the log temperature.", unit="per update", gt=0.0, le=1.0)
    initial_temperature: float = setting(
        1.0, "Temperature alpha before the first update.", unit="reward", gt=0.0, le=1000.0
    )
    target_entropy: float | None = setting(
        None,
        "Entropy the temperature steers to; None is minus the number of action dimensions, over the whole chunk.",
        unit="nats",
        ge=-1e6,
        le=1e6,
    )


class FlowSettings(ContinuousSettings):
    """Implicit values and the best of N actions that a flow proposes (Li et al. 2025, arXiv 2512.10926)."""

    name: Literal["flow"] = setting("flow", "The algorithm.", unit="choice")
    proposals: int = setting(32, "Action chunks proposed per decision, N.", unit="chunks", ge=1, le=4096)
    flow_steps: int = setting(10, "Euler steps from noise to a proposal.", unit="steps", ge=1, le=1000)
    value_loss: Literal["quantile", "expectile"] = setting(
        "quantile", "Implicit regression of the value on the critics at replayed actions.", unit="choice"
    )
    value_expectile: float = setting(
        0.9, "Quantile or expectile that the value regresses to, kappa_b.", unit="share", gt=0.0, lt=1.0
    )
    aggregate: Literal["min", "mean"] = setting("min", "How critics are combined for the value.", unit="choice")

    def conflicts(self) -> Iterator[str]:
        yield from super().conflicts()
        if self.chain.length > 1:
            yield (
                f"algorithm.chain.length ({self.chain.length}) must be 1 with algorithm.name flow: its bootstrap is one "
                "value network, which no chain defines"
            )


class DqnSettings(AlgorithmSettings):
    """Deep Q-learning with double Q (van Hasselt et al. 2016, arXiv 1509.06461) and what was built on it."""

    name: Literal["dqn"] = setting("dqn", "The algorithm.", unit="choice")
    lr: float = setting(1e-4, "Adam step size.", unit="per update", gt=0.0, le=1.0)
    double: bool = setting(
        True, "Online networks choose the action that target networks value (arXiv 1509.06461).", unit="switch"
    )
    dueling: bool = setting(False, "Value and advantage streams (Wang et al. 2016, arXiv 1511.06581).", unit="switch")
    shift_every: int = setting(
        1000,
        "Updates between two shifts of the chain, T: with a chain of one, between two copies into the target network.",
        unit="updates",
        ge=1,
        le=10**9,
    )
    epsilon: float = setting(
        0.4,
        "Share of random actions of the first actor lane; that of lane i of N is epsilon^(1 + epsilon_ladder * i / (N - 1)) "
        "(Horgan et al. 2018, Ape-X, arXiv 1803.00933).",
        unit="share",
        ge=0.0,
        le=1.0,
    )
    epsilon_ladder: float = setting(
        7.0, "Exponent of the last lane; 0 gives every lane the same epsilon.", unit="exponent", ge=0.0, le=100.0
    )

    def conflicts(self) -> Iterator[str]:
        yield from super().conflicts()
        if self.chain.policy_value == "one":
            yield (
                f"algorithm.chain.policy_value one has no effect with algorithm.name {self.name}, which has no policy that "
                "climbs a value; leave it out"
            )
        if self.chain.length > 1 and self.chain.copy_every >= self.shift_every:
            yield (
                f"algorithm.chain.copy_every ({self.chain.copy_every}) must be below algorithm.shift_every "
                f"({self.shift_every}): targets inside the chain must move between its shifts"
            )


class R2d2Settings(DqnSettings):
    """Recurrent deep Q-learning with stored state and burn-in (Kapturowski et al. 2019, R2D2)."""

    name: Literal["r2d2"] = setting("r2d2", "The algorithm.", unit="choice")  # type: ignore[assignment]
    recurrent: int = setting(128, "Units of the recurrent layer.", unit="units", ge=1, le=65_536)
    burn_in: int = setting(8, "Steps that only warm the recurrent state up.", unit="steps", ge=0, le=1000)
    sequence: int = setting(16, "Steps of a sequence that are learnt from.", unit="steps", ge=1, le=1000)

    @property
    def window_steps(self) -> int:
        return self.burn_in + self.sequence

    @property
    def window_settings(self) -> str:
        return "algorithm.burn_in + algorithm.sequence"

    @property
    def labels_per_window(self) -> int:
        return self.sequence

    def conflicts(self) -> Iterator[str]:
        yield from super().conflicts()
        if self.target.kind not in ("one_step", "n_step"):
            yield (
                f"algorithm.target.kind {self.target.kind} values chunks of actions, which algorithm.name r2d2 has no "
                "network for; take one_step or n_step"
            )


class CustomSettings(AlgorithmSettings):
    """An algorithm of your own: a learner class and the class of the policy that it trains."""

    name: Literal["custom"] = setting("custom", "The algorithm.", unit="choice")
    learner: str | None = setting(
        None, "Class that learns.", unit="name", pattern=f"^{CLASS}$", allowed="package.module:Class"
    )
    policy: str | None = setting(
        None, "Class that acts.", unit="name", pattern=f"^{CLASS}$", allowed="package.module:Class"
    )
    options: dict[str, Scalar] = setting({}, "What the two classes want to be told besides.", unit="name value")
    observations: Literal["ends", "all"] = setting(
        "ends",
        "Observations of a window that the learner gets: the first and the last, or those of every step.",
        unit="choice",
    )

    def conflicts(self) -> Iterator[str]:
        yield from super().conflicts()
        for name, value in (("learner", self.learner), ("policy", self.policy)):
            if value is None:
                yield f"algorithm.name custom needs algorithm.{name}: the package.module:Class of your {name}"


Algorithm = Annotated[
    SacSettings | FlowSettings | DqnSettings | R2d2Settings | CustomSettings, Field(discriminator="name")
]
