"""What samples completions: the requests it takes, the samples it gives back, and the protocol between."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np

from configs.llm import SamplingSettings
from learners.classes import load_class

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TRANSFORMERS = "transformers"


@dataclass(frozen=True, slots=True, eq=False)
class Request:
    """One completion to sample; what comes of it follows from the prompt, the seed and the weights alone."""

    group: int
    index: int  # of the completion in its group
    prompt: np.ndarray  # int32 (prompt tokens,), at least one
    seed: int  # any 64-bit integer
    temperature: float | None = None  # None: the engine's; 0 takes the most probable token each time
    max_tokens: int | None = None  # None: the engine's


@dataclass(frozen=True, slots=True, eq=False)
class Sample:
    """A finished completion with the probabilities that its tokens were sampled with.

    `log_probs` are of the distribution after temperature and truncation, and `log_probs + kept` of the one after temperature
    alone. Both are 0 in a greedy completion, which was not sampled: it is for evaluation, never for training.
    """

    request: Request
    tokens: np.ndarray  # int32 (tokens,), with the end of sequence where that was sampled
    log_probs: np.ndarray  # float32 (tokens,), natural
    kept: np.ndarray  # float32 (tokens,), log of the probability that truncation left; 0 without truncation
    versions: np.ndarray  # int32 (tokens,), of the weights that sampled each
    finish: Literal["stop", "length"]  # stop: an end of sequence was sampled; length: `max_tokens` were


class Engine(Protocol):
    """Samples many completions at once, a token of each per step. For one thread only.

    Made by `make_engine(settings, network, end=..., slots=..., version=...)`, and so is a class named in `sampling.engine`.
    """

    @property
    def version(self) -> int:
        """Version of the weights that the next token is sampled with."""

    @property
    def running(self) -> int:
        """Completions that have begun and not finished."""

    @property
    def waiting(self) -> int:
        """Requests that have not begun."""

    def submit(self, requests: Sequence[Request]) -> None:
        """Queues requests, first come first served; those of one group best together, since they share their prompt.

        Raises:
            ValueError: a request cannot be served, for one too long for the model; then none of them is queued.
        """

    def step(self) -> list[Sample]:
        """Starts waiting requests where there is room, samples a token of each running one, and returns those that finished.

        Every request comes back exactly once, whatever weights are loaded meanwhile. Without requests it does nothing.
        """

    def load(self, version: int, data: bytes | memoryview) -> None:
        """New weights, as `weights_bytes` writes them.

        They are taken at once, that is between two steps, and running completions go on with them; with `sampling.swap` finish
        once all running completions have finished, before which none begins, and of several that wait the newest is taken.

        Raises:
            ValueError: these are not weights of this network.
        """

    def stats(self) -> dict[str, float]:
        """Totals since the start, such as tokens sampled."""


def make_engine(
    settings: SamplingSettings,
    network: PreTrainedModel,
    *,
    end: int | Collection[int],
    slots: int,
    version: int = 0,
) -> Engine:
    """The engine that `settings.engine` names.

    Args:
        settings: how completions are sampled.
        network: the language model, on the device and in the type that it shall sample with. It is the engine's from now on:
            `load` changes its weights.
        end: token that ends a completion, or all those that do.
        slots: most completions that run at once.
        version: of the weights that the network has now.

    Raises:
        ValueError: the network is of a kind that this engine cannot run.
        ModuleError: an engine of the user cannot be imported or has not what `Engine` demands.
    """
    if settings.engine == TRANSFORMERS:
        # Here, since the module needs what is defined above.
        from actors.llm.slots import SlotEngine

        return SlotEngine(settings, network, end=end, slots=slots, version=version)
    methods = ("version", "running", "waiting", "submit", "step", "load", "stats")
    kind = load_class(settings.engine, "sampling.engine", methods=methods)
    engine: Engine = kind(settings, network, end=end, slots=slots, version=version)
    return engine
