"""Evaluations as the head has them made by the child `evaluator`: one at a time, begun again where a process died."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import ray

from cluster.books import Books, Measured
from cluster.checkpoint import Checkpoints
from cluster.ray_children import Children, short
from cluster.ray_weights import Weights


@dataclass(frozen=True)
class _Running:
    """An evaluation that was asked for."""

    answer: Any  # Ray's reference
    step: int
    version: int
    data: bytes  # the weights


class Evaluations:
    """Has evaluations made, gives them to the books, and keeps the best policy until it is in a checkpoint."""

    def __init__(
        self,
        books: Books,
        children: Children,
        *,
        ask: Callable[[Any], Any],
        read: Callable[[Any, int, int], Measured],
        tell: Callable[[str, str], object],
    ) -> None:
        """
        ask: has the child `evaluator`, made where there is none, evaluate; takes the Ray reference to weights, returns another.
        read: makes the evaluation from the value of what `ask` returned, a step and a version.
        tell: takes the kind of an event and its text.
        """
        self._books = books
        self._children = children
        self._ask = ask
        self._read = read
        self._tell = tell
        self._running: _Running | None = None
        self._is_second_try = False
        self._is_lost = False
        self._unsaved_best: tuple[float, bytes] | None = None

    @property
    def is_running(self) -> bool:
        """Whether one was begun and not taken in."""
        return self._running is not None

    @property
    def is_lost(self) -> bool:
        """Whether one was lost with a head that died, so that another one should begin."""
        return self._is_lost

    @property
    def unsaved_best(self) -> tuple[float, bytes] | None:
        """Score and weights of the best policy, where it is in no checkpoint yet."""
        return self._unsaved_best

    def begin(self, step: int, weights: Weights) -> None:
        """Have weights evaluated; none must be running.

        step: that the evaluation is shown at.
        """
        self._is_lost = False
        self._running = _Running(self._ask(weights.reference), step, weights.version, weights.data)

    def wait(self, timeout_s: float) -> bool:
        """Wait for the one that is running; whether it has ended."""
        return self._running is None or bool(ray.wait([self._running.answer], timeout=timeout_s)[0])

    def follow(self) -> bool | None:
        """Take in the evaluation that has ended, or begin it again, once, where the evaluator died.

        Returns:
            Whether it is the best so far; None where nothing was taken in.
        """
        if self._running is None or not self.wait(0.0):
            return None
        ended, self._running = self._running, None
        try:
            found = ray.get(ended.answer)
        except ray.exceptions.RayError as error:
            again = isinstance(error, ray.exceptions.RayActorError) and not self._is_second_try
            ending = "; it is begun again" if again else ""
            self._tell("warning", f"the evaluation at step {ended.step} failed: {short(error)}{ending}")
            self._children.kill("evaluator")
            self._is_second_try = again
            if again:
                self._running = replace(ended, answer=self._ask(ray.put(np.frombuffer(ended.data, np.uint8))))
            return None
        self._is_second_try = False
        evaluation = self._read(found, ended.step, ended.version)
        is_best = self._books.evaluated(evaluation)
        self._tell("evaluation", evaluation.text)
        if is_best:
            self._unsaved_best = (evaluation.score, ended.data)
        return is_best

    def saved(self) -> None:
        """The best policy is in a checkpoint."""
        self._unsaved_best = None

    def state(self) -> dict[str, Any]:
        """What a new head needs, as JSON, with what the books leave to it."""
        evaluated: Any = self._books.last_evaluation
        return {
            "evaluated": None if evaluated is None else asdict(evaluated),
            "is_evaluation_row_due": self._books.evaluation_row_due,
            "is_evaluating": self._running is not None or self._is_lost,
            "has_unsaved_best": self._unsaved_best is not None,
        }

    def restore(
        self, kept: Mapping[str, Any], *, again: Callable[[Mapping[str, Any]], Measured], checkpoints: Checkpoints
    ) -> None:
        """Take over what `state` returned before the head died.

        again: makes an evaluation from what `dataclasses.asdict` gave, read from JSON.
        checkpoints: of the run, whose best counts where a better policy was lost.
        """
        if kept["evaluated"] is not None:
            self._books.restore_evaluation(again(kept["evaluated"]), row_due=kept["is_evaluation_row_due"])
        self._is_lost = kept["is_evaluating"]
        if kept["has_unsaved_best"]:  # that policy is gone
            best = checkpoints.best()
            self._books.best = None if best is None else best.eval_mean_return
            self._is_lost = True
