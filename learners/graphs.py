"""An update recorded once as a CUDA graph and replayed: one launch in place of some hundred."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

WARM_UPS = 3  # before recording, so that libraries have chosen their kernels and set up their workspaces


class Recorded:
    """A function of tensors, given as (nested) tuples, that changes tensors in place and returns nothing.

    It is recorded at the first call. `changed` lists what it changes: warming up calls the function, so these are put back,
    and `restored` is called to make anew what is derived from them. Arguments are copied to where the recording reads them, and
    must keep their shapes.
    """

    def __init__(
        self,
        function: Callable[..., None],
        changed: Callable[[], Iterable[Tensor]],
        restored: Callable[[], None],
    ) -> None:
        self._function = function
        self._changed = changed
        self._restored = restored
        self._graph: torch.cuda.CUDAGraph | None = None
        self._held: list[Tensor] = []

    def __call__(self, *arguments: Any) -> None:
        if self._graph is None:
            self._record(arguments)
        else:
            for held, given in zip(self._held, _tensors(arguments), strict=True):
                held.copy_(given, non_blocking=True)
        assert self._graph is not None
        self._graph.replay()

    def _record(self, arguments: tuple[Any, ...]) -> None:
        held = _cloned(arguments)
        changed = list(self._changed())
        before = [tensor.clone() for tensor in changed]
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UPS):
                self._function(*held)
        torch.cuda.current_stream().wait_stream(side)
        for tensor, value in zip(changed, before, strict=True):
            tensor.copy_(value)
        self._restored()
        graph = torch.cuda.CUDAGraph()
        # Of this thread alone: another one may be copying the next batch to the device.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            self._function(*held)
        self._graph, self._held = graph, list(_tensors(held))


def _tensors(values: Any) -> Iterable[Tensor]:
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, tuple):
        for value in values:
            yield from _tensors(value)


def _cloned(values: Any) -> Any:
    if isinstance(values, Tensor):
        return values.clone()
    if isinstance(values, tuple):
        cloned = [_cloned(value) for value in values]
        return type(values)(*cloned) if hasattr(values, "_fields") else tuple(cloned)
    return values
