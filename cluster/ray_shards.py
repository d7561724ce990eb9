"""The shards of a control run, as its head keeps them: started, replaced, added, and taken away once their rows are elsewhere.

*Routes* say where each shard is reached: number → address. They change while a run goes, and whoever writes or reads is told.
A shard that leaves goes through two phases: *draining*, while the lanes of actors move to other shards with their next
episodes, and *handing over*, when nobody writes to it or reads from it any more and its rows go to the other shards.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray

from cluster import parts
from cluster.ray_children import ANSWER_S, CLOSE_S, Child, Children, short
from cluster.ray_files import FolderMark
from cluster.ray_placement import Placement
from cluster.ray_workers import ShardWorker
from cluster.recorder import replay_folder
from cluster.runs import RunFolder
from configs.schema import RunConfig

if TYPE_CHECKING:
    from cluster.checkpoint import Checkpoint
    from cluster.head import Head
    from replay.security import Security

MOVE_S = 30.0  # how long a lane may go on with its episode on a shard that leaves
DRAIN_S = 2 * MOVE_S + 10.0  # until a shard that leaves no longer waits for its writers
COUNTERS = ("inserted", "sampled", "items")

Routes = dict[int, str]


class Shards:
    """All shards of a run; used by the head's control loop alone."""

    def __init__(
        self,
        folder: RunFolder[RunConfig],
        head: Head,
        children: Children,
        placement: Placement,
        *,
        schema: str,
        security: Security,
        mark: FolderMark,
        incarnation: Callable[[], int],
        latest: Callable[[], Checkpoint | None],
        changed: Callable[[], None],
        keep: Callable[[], None],
        tell: Callable[..., None],
    ) -> None:
        """
        schema: StepSchema of the environment's steps, as JSON.
        mark: by which a process tells whether it sees the run's folder.
        incarnation: a number that no other process of the run has.
        latest: the newest checkpoint.
        changed: called when the routes have changed, or a shard is to be written to no more.
        keep: puts the head's state on disk.
        tell: `Recorder.event`.
        """
        self._folder = folder
        self._head = head
        self._children = children
        self._placement = placement
        self._schema = schema
        self._security = security
        self._mark = mark
        self._incarnation = incarnation
        self._latest = latest
        self._changed = changed
        self._keep = keep
        self._tell = tell
        self._leaders: dict[str, str | None] = {}  # address of shard 0 that each was told
        self.has_changed = False  # since somebody has looked: the newest checkpoint has rows where they are no more
        self._lost = 0  # items of other shards that are gone, which the limiter is to be told of
        self._told_away: set[str] = set()
        self._gone = dict.fromkeys(COUNTERS, 0)  # counters of shards that left: the table's limiter still counts them
        # Shards that start in the place of another, and what is to be told then.
        self._replaced: dict[str, dict[str, Any]] = {}
        self._failed: dict[str, str] = {}  # shards that could not hand over yet, and why

    @property
    def _config(self) -> RunConfig:
        return self._folder.config

    # ----------------------------------------------------------------- routes

    def routes(self, *, writing: bool) -> Routes:
        """Addresses of the shards that are written to, or that are read from."""
        shut = ("draining", "handing over") if writing else ("handing over",)
        return {
            child.index: child.address
            for child in sorted(self._children.of("shard"), key=lambda child: child.index)
            if child.address and child.leaving not in shut and not (writing and child.name in self._told_away)
        }

    @property
    def is_handing_over(self) -> bool:
        """Whether rows are on their way from one shard to another: a checkpoint would hold them twice."""
        return any(child.leaving == "handing over" for child in self._children.of("shard"))

    @property
    def is_settled(self) -> bool:
        """Whether all shards serve and none leaves."""
        shards = [child for child in self._children.of("shard") if child.address]
        return all(child.starting is None and child.leaving is None for child in shards)

    # ------------------------------------------------------------------ start

    def spawn(self, count: int) -> None:
        """Make the first shards, which begin to serve with `start`."""
        for index in range(count):
            self._spawn(index)

    def start(self, checkpoint: Path | None) -> None:
        """Have them all serve, with the rows of a checkpoint; waits for it.

        Raises:
            RunError: one could not start.
        """
        for child in sorted(self._children.of("shard"), key=lambda child: child.index):
            self._ask_start(child, checkpoint)
            if child.index == 0:  # the others lease from its limiter
                self.started(child, self._answer(child))
        for child in self._children.of("shard"):
            if child.starting is not None:
                self.started(child, self._answer(child))

    def _answer(self, child: Child) -> dict[str, Any]:
        answer: dict[str, Any] = self._children.answer(child.name, child.starting)
        child.starting = None
        self._children.started(child.name, answer["process"])
        return answer

    def _spawn(self, index: int) -> Child:
        return self._children.make(
            f"shard {index}",
            ShardWorker,
            self._config,
            self._schema,
            index,
            self._folder.path.name,
            self._incarnation(),
            self._security,
            self._mark,
            options=self._placement.shard(index),
        )

    def _ask_start(
        self,
        child: Child,
        checkpoint: Path | None,
        *,
        recover: bool = False,
        others: list[dict[str, Any]] | None = None,
    ) -> None:
        """Have a shard serve, with the steps of a checkpoint unless it recovers those of the one before; see its `start`."""
        leader = None if child.index == 0 else self._children["shard 0"].address
        self._leaders[child.name] = leader
        replay = None if checkpoint is None else str(replay_folder(checkpoint))
        child.starting_since = time.monotonic()
        child.starting = child.worker.start.remote(leader, child.port, replay, recover, others)

    def started(self, child: Child, answer: Mapping[str, Any]) -> None:
        """Take in what a shard that serves now has told."""
        child.address, child.port = answer["address"], answer["port"]
        child.status = dict(answer["status"])
        if answer["recovered"]:
            self._head.recovered(child.name, child.status)
        else:
            self._head.rebase(child.name, child.status)
        if (before := self._replaced.pop(child.name, None)) is not None:
            self._tell("restart", self._told(child, answer, before))
        self._tell_limiter(is_new=child.index == 0)
        self._lead()
        self._changed()

    def _tell_limiter(self, *, is_new: bool) -> None:
        """Tell shard 0, where it serves, of what it cannot know; one that is `new` was started with the counters of them all."""
        leader = self._children["shard 0"]
        if leader.starting is not None or leader.worker is None:
            return
        if is_new:
            leader.worker.set_limit.remote(self._config)  # the settings may have changed meanwhile
        if self._lost:
            leader.worker.lost.remote(self._lost)
        self._lost = 0

    def _lead(self) -> None:
        """Tell shards that lease from the limiter of shard 0 where that is, if it has moved since they were told."""
        address = self._children["shard 0"].address
        for child in self._children.of("shard"):
            told = self._leaders.get(child.name)
            if child.worker is not None and child.starting is None and told not in (None, address):
                self._leaders[child.name] = address
                child.worker.follow.remote(address)

    def _told(self, child: Child, answer: Mapping[str, Any], before: Mapping[str, Any]) -> str:
        """What became of the rows of the shard in whose place this one is."""
        kept, lost = int(answer["status"]["items"]), f"{child.name} {before['why']}"
        had = max(before["items"], kept)  # its last status may be older than the checkpoint
        if answer["recovered"]:
            return f"{lost}; a new one serves all its {kept} steps"
        if child.index != 0:
            self._lost += had - kept
        cause = f"its storage is damaged ({answer['damage']})" if answer["damage"] else "its storage is gone"
        source = ", from the last checkpoint" if before["checkpoint"] else ""
        return f"{lost}; {cause}; a new one serves {kept} of its {had} steps{source}"

    def resume_limiter(self) -> None:
        """Set the limiter of a run that goes on, before anybody inserts or samples."""
        counts = self._head.counts
        counts.sampled = parts.samples_used(self._config, counts)
        items = sum(int(child.status["items"]) for child in self._children.of("shard"))
        counters = parts.limiter_counters(self._config, inserted=counts.env_steps, sampled=counts.sampled, items=items)
        self._children.answer("shard 0", self._children["shard 0"].worker.restore_limiter.remote(counters))

    # ---------------------------------------------------------------- replace

    def replace(self, child: Child, why: str) -> None:
        """Begin to put a new shard in the place of a dead one; `started` tells what became of its rows."""
        checkpoint = self._latest() if self._config.checkpoints.replay else None
        if child.leaving == "handing over":  # what the checkpoint has of it may be with the other shards by now
            checkpoint = None
        path = checkpoint.path if checkpoint is not None and replay_folder(checkpoint.path).is_dir() else None
        self._replaced[child.name] = {
            "why": why,
            "items": int(child.status.get("items", 0)),
            "checkpoint": path is not None,
        }
        others = self._others() if child.index == 0 else None
        self._ask_start(self._spawn(child.index), path, recover=True, others=others)

    def _others(self) -> list[dict[str, Any]]:
        """Newest status of all shards but the first, from those that answer now, and the counters of those that left."""
        others = [child for child in self._children.of("shard") if child.index != 0]
        answers = {child.name: child.worker.status.remote() for child in others if child.worker and not child.starting}
        ray.wait(list(answers.values()), num_returns=len(answers), timeout=ANSWER_S) if answers else None
        found: list[dict[str, Any]] = [dict(self._gone)]
        for child in others:
            known = {**dict.fromkeys(COUNTERS, 0), **child.status}
            try:
                found.append(ray.get(answers[child.name], timeout=0.0) if child.name in answers else known)
            except (ray.exceptions.RayError, TimeoutError):
                found.append(known)
        return found

    # ------------------------------------------------------------------ scale

    def scale(self, count: int) -> None:
        """Take a step towards `count` shards: add those that lack, have those beyond leave; called at every look."""
        there = {child.index: child for child in self._children.of("shard")}
        for index in range(count):
            if index not in there:
                child = self._spawn(index)
                child.is_added = True
                self._ask_start(child, None)
        for index, child in there.items():
            if index >= count and not child.address:  # it has never served, and holds nothing
                self._drop(child)
                continue
            # One at a time: who takes in rows of another must stay until it has them all.
            if index >= count and child.leaving is None and not self.is_handing_over:
                child.leaving, child.leaving_since = "draining", time.monotonic()
                self._tell("scale", f"{child.name} leaves: its lanes move to other shards with their next episodes")
                self._changed()
            elif index < count and child.leaving == "draining":  # wanted again
                child.leaving = None
                self._changed()
        for child in self._children.of("shard"):
            self._follow(child)
        if (away := self._away()) != self._told_away:
            self._told_away = away
            self._changed()

    def _away(self) -> set[str]:
        """Shards that have been away for so long that their lanes are better off elsewhere, as long as there is an elsewhere."""
        shards = [child for child in self._children.of("shard") if child.address and child.leaving is None]
        now = time.monotonic()
        away = {c.name for c in shards if c.starting is not None and now - c.starting_since > MOVE_S}
        return away if len(away) < len(shards) else set()

    def _follow(self, child: Child) -> None:
        """Take a shard that leaves on to its next phase, once it is there."""
        if child.leaving is None or child.starting is not None or child.worker is None:
            return
        is_starting = any(other.starting is not None and other.address for other in self._children.of("shard"))
        if child.leaving == "draining" and (self.is_handing_over or is_starting):
            return
        if child.leaving == "draining":
            waited = time.monotonic() - child.leaving_since
            if child.status.get("writers", 0) == 0 or waited > DRAIN_S:
                child.leaving = "handing over"
                self._changed()
        elif child.left is None:
            if not is_starting:
                self._hand_over(child)
        elif ray.wait([child.left], timeout=0.0)[0]:
            self._remove(child)

    def _hand_over(self, child: Child) -> None:
        child.left = child.worker.hand_over.remote(self.routes(writing=True))

    def _remove(self, child: Child) -> None:
        answer, child.left = child.left, None
        try:
            found = ray.get(answer)
        except ray.exceptions.RayActorError:
            return  # the next look puts another in its place, which goes on handing over
        except ray.exceptions.RayError as error:  # another shard has died, perhaps: once more, from where it was
            if self._failed.get(child.name) != (why := short(error)):  # it is tried at every look
                self._failed[child.name] = why
                self._tell("warning", f"{child.name} could not hand its steps over yet: {why}")
            return
        status, told = found["status"], found["handed_over"]
        self._head.count_shards({child.name: status})
        self._head.forget(child.name)
        for key in COUNTERS[:2]:
            self._gone[key] += int(status[key])
        self.has_changed = True
        self._drop(child)
        text = f"{child.name} has left; {told['steps']} steps are with the other shards now"
        if told["left_out"]:
            text += f", and their oldest {told['left_out']} had no room, for the replay is smaller now"
        self._tell("scale", text)
        self._changed()

    def _drop(self, child: Child) -> None:
        """End a shard of which nothing is needed any more."""
        self._children.let_go(child.name)
        self._leaders.pop(child.name, None)
        self._keep()  # a head that dies from here on leaves one that nobody knows, and that the next head ends
        if child.worker is not None:
            if child.address:
                with suppress(ray.exceptions.RayError, TimeoutError):  # its storage would stay
                    ray.get(child.worker.close.remote(), timeout=CLOSE_S)
            child.end()
        self._placement.remove_shard(child.index)

    # ------------------------------------------------------------------ state

    def state(self) -> dict[str, Any]:
        """What a new head needs, as JSON."""
        return {"gone": self._gone, "leaders": self._leaders, "has_changed": self.has_changed}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take over what `state` has returned."""
        self._gone, self._leaders = dict(state["gone"]), dict(state["leaders"])
        self.has_changed = state["has_changed"]
