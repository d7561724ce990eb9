"""Keys and values of the completions that run, one row each, in transformers' cache interface.

All rows write at the same column, the one after which time has advanced for all: a row that began later, or whose prompt is
shorter, merely starts at a later column. So a decode step writes one slice and reads one window without any indices, a fixed
shape for a given window; which columns belong to a row is the attention mask's matter. Positions are in the keys (rotary) or the
inputs (learned), never in the columns, which may therefore be moved together.

    row 0  . . p p p t t t t |          p: prompt, t: sampled; | : `column`, where the next step writes
    row 1  p p p p p p t t t |
    row 2  . . . . p p p p t |          `low` is the first column that any row needs
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

SPARE = 64  # columns allocated at least beyond those in use, so that rows are moved rarely


@dataclass
class _Window:
    """What the next step writes and reads, the same for all layers."""

    rows: int = 0
    low: int = 0
    column: int = 0
    capacity: int = 0


class SlotLayer(CacheLayerMixin):  # type: ignore[misc]  # transformers has no types here
    """One layer's keys and values, (slots, heads, capacity, units) each; allocated when the first ones come."""

    is_sliding = False

    def __init__(self, slots: int, window: _Window) -> None:
        super().__init__()
        self.slots = slots
        self.window = window
        self.keys: Tensor
        self.values: Tensor

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocates for states of these sizes, type and device."""
        self.keys, self.values = self._allocate(key_states), self._allocate(value_states)
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Writes the step's (rows, heads, 1, units) and returns the window (rows, heads, columns, units) with them."""
        at = self.window
        self.keys[: at.rows, :, at.column : at.column + 1] = key_states
        self.values[: at.rows, :, at.column : at.column + 1] = value_states
        return self.keys[: at.rows, :, at.low : at.column + 1], self.values[: at.rows, :, at.low : at.column + 1]

    def get_seq_length(self) -> int:
        """Columns in the window before the step."""
        return self.window.column - self.window.low

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Columns that attention sees, and the first one's number."""
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        """No maximum."""
        return -1

    def relocate(self, rows: int, low: int, column: int, new_low: int) -> None:
        """Columns `low` to `column` of the first rows to `new_low`, into as much room as the window now says."""
        self.keys, self.values = (
            self._relocated(states, rows, low, column, new_low) for states in (self.keys, self.values)
        )

    def _relocated(self, states: Tensor, rows: int, low: int, column: int, new_low: int) -> Tensor:
        used = states[:rows, :, low:column]
        if states.shape[2] == self.window.capacity:
            used = used.clone()  # the two places may overlap
        else:
            states = self._allocate(states)
        states[:rows, :, new_low : new_low + column - low] = used
        return states

    def _allocate(self, like: Tensor) -> Tensor:
        # Not empty: what a row does not need is masked, and masked infinities would still make NaN.
        return like.new_zeros((self.slots, like.shape[1], self.window.capacity, like.shape[3]))


class SlotCache(Cache):  # type: ignore[misc]  # as above
    """The layers' rows, the column they have reached, and how they are filled, moved and given more room."""

    def __init__(self, slots: int, layers: int) -> None:
        self._window = _Window()
        self.slots = slots
        super().__init__(layers=[SlotLayer(slots, self._window) for _ in range(layers)])

    @property
    def column(self) -> int:
        """The column that the next step writes."""
        return self._window.column

    def begin(self, rows: int, low: int) -> None:
        """The next forward pass writes the first `rows` rows and sees them from column `low` on."""
        self._window.rows, self._window.low = rows, low

    def advance(self) -> None:
        """A decode step is over."""
        self._window.column += 1

    def make_room(self, rows: int, low: int, before: int, after: int) -> int:
        """Sees to `before` columns up to the current one and `after` from it on, for rows that are in use from `low` on.

        Returns:
            by how many columns everything moved to the left (negative: to the right).
        """
        at = self._window
        if at.column >= before and at.column + after <= at.capacity:
            return 0
        used = at.column - low
        new_column = max(used, before)
        if new_column + max(after, SPARE // 2) > at.capacity:
            # By half as much again, so that growing to n columns copies a constant times n.
            at.capacity = max(new_column + after + SPARE, at.capacity + at.capacity // 2)
        new_low = new_column - used
        for layer in self.layers:
            if layer.is_initialized:
                layer.relocate(rows, low, at.column, new_low)
        at.column = new_column
        return low - new_low

    def place(self, rows: Tensor, sources: Tensor, states: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Prompts into rows, so that they end at the current column.

        Args:
            rows: int64 (n,), the rows to fill.
            sources: int64 (n,), which of the prompts each of them takes.
            states: keys and values (prompts, heads, columns, units) of each layer, the prompts ending in the last column.
        """
        end = self._window.column
        for layer, (keys, values) in zip(self.layers, states, strict=True):
            if not layer.is_initialized:
                layer.lazy_initialization(keys, values)
            layer.keys[:, :, end - keys.shape[2] : end].index_copy_(0, rows, keys.index_select(0, sources))
            layer.values[:, :, end - values.shape[2] : end].index_copy_(0, rows, values.index_select(0, sources))

    def move(self, sources: Tensor, targets: Tensor, low: int) -> None:
        """Rows `sources` over rows `targets`, from column `low` on; int64 (n,) each, none in both."""
        end = self._window.column
        for layer in self.layers:
            for states in (layer.keys[:, :, low:end], layer.values[:, :, low:end]):
                states.index_copy_(0, targets, states.index_select(0, sources))
