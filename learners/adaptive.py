"""Keeps the support of an algorithm's value heads around what the data asks for, last layers included."""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from configs.algorithms import HeadSettings
from learners.critic import Critic, Part
from learners.heads import Classification, ValueHead, make_head
from learners.staging import Batch
from learners.support import NEW_BIAS, REFIT_ROWS, SupportTracker, grow, grow_columns, refit, resample_columns

LOG = logging.getLogger(__name__)

WARN_SHARE = 1e-2  # share of clipped targets, or of the support by which a refit moves a value, that is worth a line

Inputs = Callable[[Batch], Sequence[tuple[Critic, Tensor, Tensor | None]]]  # what each critic is evaluated on


class AdaptiveSupport:
    """Watches returns and targets, and widens the heads when they leave the support; `learners.support` says how.

    Recent batches are kept, as many as a refit needs, since a wider bin is fitted on replayed states.
    """

    def __init__(
        self, settings: HeadSettings, *, labels: int, dueling: bool, device: torch.device, dtype: torch.dtype
    ) -> None:
        """`labels` is their number in one update, over all functions of a chain; `dueling` networks give streams, not values."""
        self._dueling = dueling
        self._settings = settings
        self._tracker = SupportTracker(settings)
        self._device, self._dtype = device, dtype
        self._recent: deque[Batch] = deque()
        self._targets = torch.full(
            (labels,), math.nan, dtype=dtype, device=device
        )  # values of the last update's labels
        self.refit_error = 0.0  # largest share of the support by which a refit has moved a value

    def observe_returns(self, low: float, high: float) -> None:
        """Takes note of the extremes of discounted returns that actors saw."""
        self._tracker.observe_returns(low, high)

    def see(self, batch: Batch) -> None:
        """Keeps a batch, in place of an old one that no refit needs any more."""
        self._recent.append(batch)
        size = len(batch.reward)
        while (len(self._recent) - 1) * size >= REFIT_ROWS:
            self._recent.popleft()

    def keep(self, values: Tensor) -> None:
        """Copies the target values (K, batch) of an update, for `changed` to look at; part of the update itself."""
        self._targets.copy_(values.reshape(-1))

    def first(self, reward: Tensor) -> ValueHead:
        """The head to begin with, from the returns seen so far and a batch's rewards (batch,)."""
        self._tracker.observe_targets(reward)
        return make_head(self._settings, self._tracker.needed(), device=self._device, dtype=self._dtype)

    def changed(self, head: ValueHead, critics: Sequence[Critic], inputs: Inputs) -> ValueHead | None:
        """Widens `head` in all `critics` if the data has outgrown it: the new one, or None. Waits for the device."""
        assert isinstance(head, Classification)
        self._tracker.observe_targets(self._targets)
        if not self._tracker.outgrown(head.support):
            return None
        growth = grow(head, self._tracker.needed(), self._settings)
        rows = sum(len(batch.reward) for batch in self._recent)
        if growth.doublings and rows < REFIT_ROWS:
            return None  # until enough has been seen to fit wider bins
        wider = make_head(self._settings, growth.support, bins=growth.bins, device=self._device, dtype=self._dtype)
        assert isinstance(wider, Classification)
        features = self._features(critics, inputs) if growth.doublings else {}
        moved = [0.0]
        for critic in critics:

            def change(weight: Tensor, bias: Tensor, part: Part, critic: Critic = critic) -> tuple[Tensor, Tensor]:
                offset = 0.0 if part == "moment" else NEW_BIAS
                if not growth.doublings:
                    values = weight.shape[-1] // head.outputs
                    return grow_columns(weight, bias, growth.before, growth.after, values=values, offset=offset)
                if part == "moment":
                    return resample_columns(weight, bias, head, wider, offset=0.0)
                fitted = refit(features[id(critic)], weight, bias, head, wider, dueling=self._dueling)
                moved.append(fitted.share)
                return fitted.weight, fitted.bias

            critic.change_head(wider, change)
        LOG.info("value support is now %.4g to %.4g in %d bins", *growth.support, growth.bins)
        self.refit_error = max(self.refit_error, *moved)
        if max(moved) > WARN_SHARE:
            LOG.warning("wider bins moved values by up to %.2f %% of the support", 100.0 * max(moved))
        return wider

    def _features(self, critics: Sequence[Critic], inputs: Inputs) -> dict[int, Tensor]:
        """Inputs (networks, rows, width) of every critic's last layer on the recent batches.

        The targets' last layers are refit on the same: what lies below follows the online networks closely.
        """
        found: dict[int, list[Tensor]] = {id(critic): [] for critic in critics}
        for batch in self._recent:
            for critic, x, frames in inputs(batch):
                found[id(critic)].append(critic(x, frames).features.to(self._dtype))
        return {key: torch.cat(parts, 1) for key, parts in found.items()}

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint keeps of it."""
        return {f"support.{name}": tensor.clone() for name, tensor in self._tracker.state().items()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Continues from `state()`."""
        self._tracker.load_state(
            {name.removeprefix("support."): t for name, t in state.items() if name in self.state()}
        )
