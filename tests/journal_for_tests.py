"""A Pendulum that notes on disk every observation it gives, and what of that is in the replay files of a checkpoint.

The notes of an environment outlive its process, so they tell what an actor had seen when it was killed: which steps are missing
in a replay, and which are there twice, need not be taken from the run's own counts.
"""

from __future__ import annotations

import itertools
import os
import platform
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pyarrow as pa

from tests import runs_for_tests as runs

NOTE = np.dtype([("step", "<u4"), ("observation", "<f4", (3,))])  # step: in its episode, 0 is the reset
_numbers = itertools.count()

Life = tuple[str, int, int]  # host name, process, and number of an environment in it


class NotedPendulum(gymnasium.Wrapper[Any, Any, Any, Any]):
    """Pendulum-v1, whose observations are in a file named after this process."""

    def __init__(self, folder: str) -> None:
        super().__init__(gymnasium.make("Pendulum-v1"))
        name = f"{platform.node()} {os.getpid()} {next(_numbers)}"
        self._file = os.open(Path(folder, name), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        self._step = 0

    def _note(self, observation: Any) -> None:
        os.write(self._file, np.array((self._step, observation), NOTE).tobytes())

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        observation, info = super().reset(seed=seed, options=options)
        self._step = 0
        self._note(observation)
        return observation, info

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        found = super().step(action)
        self._step += 1
        self._note(found[0])
        return found

    def close(self) -> None:
        os.close(self._file)
        super().close()


def make_pendulum(folder: str, render_mode: str | None = None) -> NotedPendulum:
    return NotedPendulum(folder)


@dataclass
class Compared:
    """Which noted steps are in a replay: for each environment, how often each of its notes is there as a step, int (notes,)."""

    notes: dict[Life, np.ndarray]
    there: dict[Life, np.ndarray] = field(default_factory=dict)

    @property
    def items(self) -> int:
        """Steps in the replay."""
        return sum(int(count.sum()) for count in self.there.values())

    @property
    def doubled(self) -> int:
        """Steps that are there more than once."""
        return sum(int((count > 1).sum()) for count in self.there.values())

    def missing(self, life: Life) -> np.ndarray:
        """Numbers of the notes whose steps were done, with an observation after them, and are not there."""
        step = self.notes[life]["step"]
        return np.flatnonzero((step[1:] == step[:-1] + 1) & (self.there[life][:-1] == 0))

    def missing_behind(self, life: Life) -> int:
        """How many steps are missing at the end of an environment's life.

        Raises:
            AssertionError: steps are missing before others that are there.
        """
        missing, there = self.missing(life), np.flatnonzero(self.there[life])
        assert not len(missing) or not len(there) or missing[0] > there[-1], f"{life}: missing in the middle: {missing}"
        return len(missing)

    def contains(self, other: Compared) -> bool:
        """Whether every step that is in the replay of `other`, an earlier one of the same notes, is in this one as well."""
        return all((self.there[life][: len(count)] >= count).all() for life, count in other.there.items())


def read_notes(folder: Path) -> dict[Life, np.ndarray]:
    """The notes of every environment, `NOTE` (notes,)."""
    found = {}
    for path in folder.iterdir():
        host, pid, number = path.name.split()
        data = path.read_bytes()
        found[host, int(pid), int(number)] = np.frombuffer(data[: len(data) // NOTE.itemsize * NOTE.itemsize], NOTE)
    return found


def compare(folder: Path, checkpoint: Path) -> Compared:
    """Find every step in the replay files of a checkpoint among the notes of the environments.

    Raises:
        AssertionError: one is not there, or the steps of an episode do not follow on each other.
    """
    compared = Compared(read_notes(folder))
    places: defaultdict[bytes, list[tuple[Life, int]]] = defaultdict(list)
    for life, notes in compared.notes.items():
        compared.there[life] = np.zeros(len(notes), int)
        for number, observation in enumerate(notes["observation"]):
            places[observation.tobytes()].append((life, number))
    for lane in runs.lanes(checkpoint, "observation", "is_last"):
        seen = observations(lane)
        last = lane["is_last"].to_numpy()
        begin = 0
        for end in [*np.flatnonzero(last).tolist(), *([] if last[-1] else [len(last) - 1])]:
            rows = seen[begin : end + 1]
            assert rows[0].tobytes() in places, "an observation that no environment has given"
            fits = [at for at in places[rows[0].tobytes()] if _follows(compared.notes[at[0]], at[1], rows)]
            assert fits, f"the {len(rows)} rows of an episode are not as they were observed"
            life, first = fits[0]
            compared.there[life][first : first + len(rows) - 1] += 1
            begin = end + 1
    return compared


def observations(lane: pa.Table) -> np.ndarray:
    """The observations of a table: float32 (rows, 3)."""
    column = lane["observation"].combine_chunks()
    values = column.storage if isinstance(column, pa.ExtensionArray) else column
    flat: np.ndarray = values.flatten().to_numpy()
    return flat.reshape(-1, 3)


def _follows(notes: np.ndarray, first: int, rows: np.ndarray) -> bool:
    """Whether notes from `first` on are of one episode and of these observations."""
    found = notes[first : first + len(rows)]
    whole = len(found) == len(rows) and bool((np.diff(found["step"].astype(int)) == 1).all())
    return whole and found["observation"].tobytes() == np.ascontiguousarray(rows).tobytes()
