"""Log-probabilities of actors and learner at the same weights, where the data lag behind: the weights of one version are kept."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from learners.llm.batching import Rollouts, micro_batch
from learners.llm.parallel import Learners, local, release_gathered
from learners.llm.scoring import Scorer

LOG = logging.getLogger(__name__)
EVERY = 10  # publications between a check and the weights kept for the next
OLDEST = 64  # versions behind the newest at which kept weights are given up
SPREAD = 8  # publications, at most, until the next try after a version that no actor took
MOST_BYTES = 2**35  # of weights that a learner keeps


class GapCheck:
    """Keeps the trained weights of a published version until its samples arrive, and scores these with them.

    Under asynchronous sampling nothing in a batch is of the learner's present weights, and its newest log-probabilities differ
    from the actors' since it has learnt. With the weights that sampled them they must agree, whatever the lag: the beginnings of
    completions up to the first token of another version, whose keys and values are all of that one. Weights that arrive at actors
    wrongly, or under a wrong version, show here first.

    One copy of the trained weights (with low-rank additions: of these alone; divided weights: this learner's part) lies in the
    CPU's memory while a check is pending, and there is none between a check and the `every`-th publication after it. Copies beyond
    `most_bytes` are not made, and there is no check. What updates compute is the same with and without.

    All learners make the same calls.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        scorer: Scorer,
        learners: Learners,
        *,
        is_divided: bool,
        every: int = EVERY,
        most_bytes: int = MOST_BYTES,
    ) -> None:
        """
        parameters: those trained; where they are divided, as they lie after that.
        scorer: of the network that they belong to.
        is_divided: whether a pass of the scorer needs all learners.
        every: publications between a check and the weights kept for the next one.
        most_bytes: of the copy that a learner keeps; larger ones are left out.
        """
        self._parameters = list(parameters)
        self._scorer = scorer
        self._learners = learners
        self._is_divided = is_divided
        self._every = every
        # Parts differ by a row among learners, and all must decide alike.
        size = sum(p.numel() * p.element_size() for p in self._parameters) // (learners.count if is_divided else 1)
        self._is_off = size > most_bytes
        if self._is_off and learners.rank == 0:
            LOG.info(
                "log-probabilities of actors and learner are compared only where no update lies between sampling and learning: the "
                "copy of the weights that a comparison under lag needs, %.1f GB, is above the limit of %.1f GB",
                size / 1e9,
                most_bytes / 1e9,
            )
        self._kept: list[Tensor] = []
        self._version: int | None = None
        self._newest = self._due = 0
        # Not the learner's: what it draws must be the same without checks.
        self._generator = np.random.default_rng(0)

    @property
    def version(self) -> int | None:
        """The version whose samples are waited for; None where no check is pending."""
        return self._version

    def published(self, version: int) -> None:
        """The present weights are out as `version`; they are kept if it is time."""
        self._newest = version
        if self._version is not None and version - self._version > OLDEST:
            self._forget(after=1)
        if self._version is None and version >= self._due and not self._is_off:
            release_gathered(self._scorer)
            self._kept = [local(p.detach()).to("cpu", copy=True) for p in self._parameters]
            self._version = version

    def measured(self, version: int | None) -> None:
        """`version` was compared otherwise: a pending check of it is done."""
        if version is not None and version == self._version:
            self._forget(after=self._every)

    def forget(self) -> None:
        """The weights were replaced: what is pending is dropped, and the next publication is kept."""
        self._forget(after=0)
        self._due = 0

    @torch.no_grad()
    def measure(self, batch: Rollouts, *, pad: int, micro_tokens: int) -> Tensor:
        """|Δ log π| in nats of this learner's tokens that the kept version sampled, with its weights; (0,) where there are none.

        Of no more completions than make a pass of `micro_tokens`, those with most such tokens. The first batch in which any
        learner finds some ends the check; one that is newer throughout ends it without, as actors may pass a version over.
        """
        nothing = torch.zeros_like(batch.old[:0])
        if self._version is None:
            return nothing
        leading = _leading(batch, self._version)
        rows = _choose(batch, leading, micro_tokens)
        oldest = int(batch.versions.min()) if len(batch.versions) else self._newest
        mine = torch.tensor([len(rows), oldest], dtype=torch.float64, device=batch.old.device)
        counts, versions = self._learners.gather(mine)[0].view(-1, 2).T.tolist()
        if not any(counts):
            if min(versions) > self._version:
                self._forget(after=1 + int(self._generator.integers(SPREAD)))
            return nothing
        gap = nothing
        if len(rows) or self._is_divided:
            # Learners that share weights need each other's passes: one with nothing to score takes any completion.
            micro = micro_batch(batch, rows if len(rows) else np.zeros(1, np.int64), pad=pad)
            places = micro.places
            with self._exchanged():
                found, _ = self._scorer(micro, batch.tokens[places], batch.kept[places])
            if len(rows):
                gap = (found - batch.old[places]).abs()[leading[places]]
        self._forget(after=self._every)
        return gap

    @contextmanager
    def _exchanged(self) -> Iterator[None]:
        """The kept weights are the network's within it; afterwards it has its own again, bit for bit."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    def _exchange(self) -> None:
        release_gathered(self._scorer)
        for parameter, kept in zip(self._parameters, self._kept, strict=True):
            present = local(parameter.detach())
            own = present.to("cpu", copy=True)  # one tensor at a time: a second whole copy is never held
            present.copy_(kept)
            kept.copy_(own)

    def _forget(self, *, after: int) -> None:
        self._kept, self._version = [], None
        self._due = self._newest + after


def _leading(batch: Rollouts, version: int) -> Tensor:
    """Tokens of `version` that none of another one precedes in their completion, bool (T,)."""
    others = torch.cat([batch.tokens.new_zeros(1), (batch.versions != version).long().cumsum(0)])
    begins = torch.from_numpy(batch.offsets[:-1]).to(others.device)
    return others[1:] == others[begins][batch.sequence]


def _choose(batch: Rollouts, leading: Tensor, micro_tokens: int) -> np.ndarray:
    """Numbers, int64, of the completions with most tokens in `leading` that fit in one pass; empty where there are none."""
    counts = torch.zeros_like(batch.length).index_add(0, batch.sequence, leading.long()).cpu().numpy()
    order = np.argsort(-counts, kind="stable")[: np.count_nonzero(counts)]
    widths = np.maximum.accumulate(batch.inputs.lengths[order])
    fits = widths * np.arange(1, len(order) + 1) <= micro_tokens
    return order[: max(1, int(fits.sum()))]
