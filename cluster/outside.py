"""Actors outside Ray: programs that join a run by its control plane and write experience to its shards.

This is what the head keeps about them. Their tokens, and what a shard checks of what they write, are in `replay.guests`; how
the policy is made ready for them, in `cluster.acting_export`.
"""

from __future__ import annotations

import importlib.util
import json
import re
import secrets
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from cluster.onnx_graph import PACKAGES
from configs.algorithms import CustomSettings, R2d2Settings
from configs.schema import RunConfig
from replay.guests import PREFIX, guest_token
from replay.schema import Field, StepSchema
from replay.security import Security

if TYPE_CHECKING:
    from cluster.control import Process

LEASE_S = 60.0  # one that has not been heard of for this long is gone
_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")

RULES = """\
A row is one step: the observation, the action chosen at it, the reward that this action earned, and flags. `row_action` of
the policy goes into the row's field `action`, and `action` to the environment. `policy_version` is the policy's version, 0 of
random actions. The first row of an episode has is_first. Behind the last action of an episode comes one more row, with the
last observation, is_last, and is_terminal unless the episode was cut short; its action and reward are 0. Rows of one lane
are written in time order. A field `state` holds the recurrent state before the step.
A message is a record batch of at most `limits.message_rows` rows, whose app_metadata is its sequence number, a little-endian
int64, each one more than the one before. When the stream begins, the shard answers with the number of the last message that it
has stored, -1 where there was none; and then to each message with its number. Text behind the number says why the message was
refused: nothing of it is stored, and its lanes go on with rows that begin an episode.
After a lost connection join again and name the writer. If the reply names the same one, open the stream anew and send what lies
behind the first answer again, with the numbers it had: nothing is stored twice. If it names another one, begin anew, with
number 0 and a first row in every lane, and without the rows that were not answered. A message without a batch and with the
app_metadata `close` ends the writer in order; then leave.
"""


@dataclass(frozen=True)
class Limits:
    """What one outside actor may do."""

    lanes: int  # most lanes that it writes, numbered from 0
    message_rows: int  # most rows in one message
    rows_per_s: float  # what comes faster waits
    bad_messages: int  # refused messages after which it is shut out
    lease_s: float  # it asks for the policy, or joins again, at least so often


@dataclass(frozen=True)
class Joined:
    """What a program is told that has joined."""

    name: str  # its own
    writer: str  # for the descriptor of its DoPut stream, {"writer": …}; another one with each start of the program
    token: str  # for the stream's header `authorization: Bearer …`; good for that writer alone
    shard: str  # Flight address, grpc://host:port or grpc+tls://host:port
    arrow_schema: bytes  # of its messages: an Arrow IPC schema message
    step_schema: (
        str  # fields of a row, JSON: [[name, dtype, shape], …]; their offsets are in the metadata of `arrow_schema`
    )
    task: str  # what to play, JSON: `OutsideActors.task`
    limits: Limits
    rules: str  # of rows and sequence numbers, in words


@dataclass(frozen=True)
class Tensor:
    """An input or output of the acting network, with a leading batch dimension that `shape` leaves out."""

    name: str
    dtype: str  # numpy's name
    shape: tuple[int, ...]
    holds: str  # of an input: observation, standard_normal, uniform, rank or state; of an output: action, row or state


@dataclass(frozen=True)
class Policy:
    """One version of the acting network; `learners.acting_modules.ActingModule` says what its inputs and outputs are."""

    version: int  # to be written into `policy_version` of each row that it decided
    onnx: bytes
    weights: bytes  # the same as a safetensors buffer, as the learner has published it
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]


@dataclass
class _Place:
    """What an outside actor has."""

    writer: str
    lanes: int
    shard: int
    seen: float = field(default=0.0, compare=False)  # when it was last heard of, by the clock
    replaced: str = ""  # the writer that had the place before


class OutsideActors:
    """Who has joined, to which shard each writes, and who is gone. For any thread; no call waits for another process."""

    def __init__(
        self,
        config: RunConfig,
        schema: StepSchema,
        security: Security,
        *,
        state: Mapping[str, Any] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """
        Args:
            config: of the run.
            schema: of the environment's steps.
            security: of the run; the actors' tokens are derived from its token.
            state: what `state()` of an earlier head has returned; everybody in it was heard of just now.
            clock: seconds.
        """
        self._config, self._security, self._clock = config, security, clock
        self._schema = schema
        if isinstance(config.algorithm, R2d2Settings):
            self._schema = schema.with_extra(Field("state", "float32", (config.algorithm.recurrent,)))
        self._limits = Limits(
            lanes=config.outside.lanes,
            message_rows=config.actors.rows_per_write,
            rows_per_s=config.outside.rows_per_s,
            bad_messages=config.outside.bad_messages,
            lease_s=LEASE_S,
        )
        self._lock = threading.Lock()  # of all below
        state = state or {}
        self._places = {name: _Place(**place, seen=clock()) for name, place in state.get("places", {}).items()}
        self._shut_out: dict[str, str] = dict(state.get("shut_out", {}))  # name -> why
        self._counts: Counter[str] = Counter(state.get("counts", {}))
        self._ended: list[tuple[int, str]] = [(shard, writer) for shard, writer in state.get("ended", ())]

    def join(self, name: str, lanes: int, routes: Mapping[int, str], *, writer: str = "") -> Joined:
        """Give a program a place, or give it back its own.

        A program that was started again joins by its old name, and writes as another writer; `ended` tells the old one. One
        that has only lost a connection names the `writer` that it is, and goes on as that where its shard is still there.

        Args:
            name: of the program, 1 to 64 letters, digits, dots, dashes and underscores.
            lanes: environments that it will write, numbered from 0.
            routes: number of each live shard -> its Flight address.
            writer: as which it goes on, if it can.

        Raises:
            ValueError: the run takes none such, or no more; this one was shut out, or another program has taken its name; the
                name or the lanes do not fit.
            EnvError: the environment's spaces cannot be found.
        """
        self._check(name, lanes)
        task = self.task
        with self._lock:
            if name in self._shut_out:
                raise ValueError(
                    f"{name} was shut out: {self._shut_out[name]}; correct the program and give it another name"
                )
            self._sweep()
            place = self._places.get(name)
            if place is None and len(self._places) >= self._config.outside.most:
                raise ValueError(
                    f"this run has {len(self._places)} actors outside Ray and takes no more; try again when one has left, "
                    "or raise outside.most"
                )
            if place is not None and writer and writer == place.replaced:
                raise ValueError(f"another program has joined as {name} meanwhile; give each program a name of its own")
            if place is None or writer != place.writer or place.shard not in routes:
                place = self._new_place(name, place, routes)
            place.lanes, place.seen = lanes, self._clock()
            return Joined(
                name=name,
                writer=place.writer,
                token=guest_token(self._security, place.writer),
                shard=routes[place.shard],
                arrow_schema=self._schema.arrow().serialize().to_pybytes(),
                step_schema=self._schema.to_json(),
                task=json.dumps(task),
                limits=self._limits,
                rules=RULES,
            )

    def seen(self, name: str) -> None:
        """A program was heard of: it has asked for a policy. One without a place learns that when it writes."""
        with self._lock:
            if (place := self._places.get(name)) is not None:
                place.seen = self._clock()

    def leave(self, name: str) -> None:
        """A program has ended in order; once more does nothing."""
        with self._lock:
            if name in self._places:
                self._give_up(name, "left")

    def shut_out(self, writer: str, why: str) -> None:
        """A shard has shut a writer out: its program cannot join by its name again. Once more does nothing."""
        with self._lock:
            for name in [name for name, place in self._places.items() if place.writer == writer]:
                self._shut_out[name] = why
                self._give_up(name, "shut_out")

    def ended(self) -> list[tuple[int, str]]:
        """(shard, writer) of places given up since the last call: left, replaced, or not heard of for `LEASE_S`.

        The head tells these shards to end these writers, whose open episodes are cut there.
        """
        with self._lock:
            self._sweep()
            ended, self._ended = self._ended, []
            return ended

    def processes(self) -> list[Process]:
        """The actors that are here, for the control plane's status."""
        with self._lock:
            return [
                {
                    "name": f"outside {name}",
                    "kind": "outside",
                    "index": index,
                    "state": "running",
                    "figures": {
                        "lanes": place.lanes,
                        "shard": place.shard,
                        "silent_s": round(self._clock() - place.seen, 1),
                    },
                }
                for index, (name, place) in enumerate(sorted(self._places.items()))
            ]

    def stats(self) -> dict[str, int]:
        """For the metrics: actors and lanes here now, and how many joined, left, were lost and shut out since the run began."""
        with self._lock:
            return {
                "outside": len(self._places),
                "outside_lanes": sum(place.lanes for place in self._places.values()),
                **{f"outside_{what}": self._counts[what] for what in ("joined", "left", "lost", "shut_out")},
            }

    def state(self) -> dict[str, Any]:
        """What a new head needs to go on, JSON-able."""
        with self._lock:
            places = {name: asdict(place) for name, place in self._places.items()}
            for place in places.values():
                del place["seen"]
            return {
                "places": places,
                "shut_out": dict(self._shut_out),
                "counts": dict(self._counts),
                "ended": [list(one) for one in self._ended],
            }

    @cached_property
    def task(self) -> dict[str, Any]:
        """What to play and how. Found once; that may build the environment.

            {"environment": {"id", "backend", "kwargs"}, "algorithm", "discount",
             "action": {"shape", "low", "high"} or {"choices", "start"},   as the environment takes it
             "chunk": actions that one decision chooses, to be taken one after the other without asking again,
             "stack": newest frames of a large observation field that the policy sees; before an episode's start the first
                      repeats, and rows hold single frames}

        Raises:
            EnvError: the environment's spaces cannot be found.
        """
        from cluster.export import space_map

        config = self._config
        spaces = space_map(config.env)
        action: dict[str, Any]
        if spaces.actions is not None:
            action = {"choices": spaces.actions, "start": int(spaces.action(np.zeros(1, np.int64))[0])}
        else:  # what lies beyond [−1, 1] is cut at the bounds
            low, high = (spaces.action(np.full((1, *spaces.schema.action.shape), at, np.float32))[0] for at in (-2, 2))
            action = {"shape": list(low.shape), "low": low.tolist(), "high": high.tolist()}
        return {
            "environment": {"id": config.env.id, "backend": config.env.backend, "kwargs": dict(config.env.kwargs)},
            "algorithm": config.algorithm.name,
            "discount": config.algorithm.discount,
            "action": action,
            "chunk": config.algorithm.chunk,
            "stack": config.env.stack,
        }

    # ---------------------------------------------------------------------------------------------------------- places

    def _check(self, name: str, lanes: int) -> None:
        if self._config.outside.most == 0:
            raise ValueError("this run takes no actors outside Ray: outside.most is 0")
        if self._config.has_tasks:
            raise ValueError(
                "a run with tasks takes no actors outside Ray: only its own are told which task an episode plays"
            )
        if isinstance(self._config.algorithm, CustomSettings):
            raise ValueError("the policy of algorithm.name custom cannot be exported, which actors outside Ray need")
        if missing := [package for package in PACKAGES if importlib.util.find_spec(package) is None]:
            raise ValueError(
                f"actors outside Ray need {', '.join(missing)} where the run's head is: pip install 'millrace[export]'"
            )
        if _NAME.fullmatch(name) is None:
            raise ValueError(f"expected a name of 1 to 64 of A-Z a-z 0-9 . _ -; received {name[:100]!r}")
        if not 1 <= lanes <= self._limits.lanes:
            raise ValueError(f"expected 1 to {self._limits.lanes} lanes (outside.lanes), received {lanes}")

    def _new_place(self, name: str, before: _Place | None, routes: Mapping[int, str]) -> _Place:
        """A place as a new writer; of what the name had `before`, the writer ends and the shard stays if it can."""
        if not routes:
            raise ValueError("this run has no shard at present; try again later")
        on = Counter(place.shard for place in self._places.values())
        shard = min(routes, key=lambda number: (on[number], number))
        # By chance, so that a head that knows nothing of an earlier place makes another writer.
        place = _Place(f"{PREFIX}{name}-{secrets.token_hex(4)}", lanes=0, shard=shard)
        if before is None:
            self._counts["joined"] += 1
        else:
            self._ended.append((before.shard, before.writer))
            place.replaced = before.writer
            if before.shard in routes:
                place.shard = before.shard
        self._places[name] = place
        return place

    def _sweep(self) -> None:
        now = self._clock()
        for name in [name for name, place in self._places.items() if now - place.seen > LEASE_S]:
            self._give_up(name, "lost")

    def _give_up(self, name: str, why: str) -> None:
        place = self._places.pop(name)
        self._ended.append((place.shard, place.writer))
        self._counts[why] += 1
