"""Between the head and its actors on other nodes: one relay for each node, so that the head's work grows with nodes, not actors.

    weights     head ──publish──▶ relay ◀──policy (waits until there are newer ones)── actors of its node
    statuses    head ──look─────▶ relay ──status──▶ actors
    desk        head ◀──exchange_many── relay ◀──exchange── actors

A relay keeps nothing that is not elsewhere too: one that dies is started again by Ray, and told again by the head. While it is
away, or where there is none, actors and head talk to each other, as they do on the head's own node.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from actors.assignments import Outcome
from cluster.curriculum.desk_client import Exchange
from cluster.ray_desk import Answer, exchange_with
from cluster.ray_threads import failure_of
from cluster.ray_weights import PublishedWeights

WAIT_S = 10.0  # how long an actor without news of weights waits for them in one call
HEAD_WAIT_S = 1.0  # the same of the head, where a waiting call keeps a thread
ANSWER_S = 30.0  # the longest that an actor waits for an answer that should come at once
TICK_S = 0.05  # between two calls of the desk, where there are few nodes
MOST_BATCHES = 500.0  # of exchanges that the head is handed each second, by all relays together
AGAIN_S = 0.5  # until an actor that could not be reached is asked again
LATE_S = 10.0
CALLS = 100_000  # that may wait in a relay at once, of all actors of its node
PREFIX = "relay-"  # of its name in Ray

Policy = tuple[int, Any]  # version, and Ray's reference to the weights
Status = dict[str, Any]
Request = tuple[str, int, int, Sequence[Outcome], int, int]  # arguments of `HeadDesk.exchange`


@dataclass(frozen=True)
class Looked:
    """What a relay answers to `look`."""

    version: int  # of the weights that it was given
    statuses: dict[str, Status]  # of the actors that have answered
    unknown: list[str]  # actors that it was never told of


@ray.remote
class RelayWorker:
    """The relay of one node, as a named detached asyncio Ray actor on it."""

    def __init__(self, head: Any) -> None:
        self._head = head
        self._actors: dict[str, Any] = {}
        self._asked: dict[str, asyncio.Task[Status]] = {}  # actors' statuses that nobody has taken yet
        self._given: Policy = (0, None)
        self._here: Policy = (0, None)  # those whose bytes are on this node
        self._arrived = asyncio.Condition()
        self._fetching: asyncio.Task[None] | None = None
        self._tick_s = TICK_S
        self._requests: list[tuple[Request, asyncio.Future[Answer | None]]] = []
        self._handing_in: asyncio.Task[None] | None = None

    async def attach(self, actors: Mapping[str, Any]) -> None:
        """Answer for these actors, given by name, from now on."""
        for name, actor in actors.items():
            if (asked := self._asked.pop(name, None)) is not None:  # of the actor before it
                asked.cancel()
            self._actors[name] = actor

    async def detach(self, name: str) -> None:
        """Forget an actor."""
        self._actors.pop(name, None)
        if (asked := self._asked.pop(name, None)) is not None:
            asked.cancel()

    # ------------------------------------------------------------------ weights

    async def publish(self, version: int, reference: Sequence[Any]) -> None:
        """Weights that actors should play with; `reference`, in a sequence so that Ray does not look it up, as of `policy`."""
        # The same version once more is that of a new head: what the dead one held is gone.
        if version >= self._given[0]:
            self._given = version, reference[0]
            if self._fetching is None or self._fetching.done():
                self._fetching = asyncio.create_task(self._fetch())

    async def _fetch(self) -> None:
        """Bring the newest weights to this node, before any actor hears of them: one fetches, not each."""
        while self._here is not self._given:
            wanted = self._given
            with suppress(ray.exceptions.RayError):  # gone, with the head that held them: the next will push its own
                await wanted[1]
            self._here = wanted
            async with self._arrived:
                self._arrived.notify_all()

    async def policy(self, have: int, wait_s: float = WAIT_S) -> Policy | None:
        """As `PublishedWeights.policy`, once there are newer weights than version `have`; None after `wait_s` seconds."""
        with suppress(TimeoutError):
            async with asyncio.timeout(wait_s), self._arrived:
                await self._arrived.wait_for(lambda: self._here[0] > have)
        return self._here if self._here[0] > have else None

    # ----------------------------------------------------------------- statuses

    async def look(self, arguments: Mapping[str, tuple[Any, ...]], timeout_s: float, tick_s: float = TICK_S) -> Looked:
        """Ask actors for their statuses; one that does not answer stays asked, and its answer is in a later call's.

        arguments: of `status`, by the actor's name.
        tick_s: the least time between two calls of the desk, from now on.

        Returns:
            A status is {"died": True} where the actor is dead, and an error's, as of `failure_of`, where it raised one.
        """
        self._tick_s = tick_s
        known = {name: arguments[name] for name in arguments if name in self._actors}
        for name, given in known.items():
            if name not in self._asked:
                self._asked[name] = asyncio.create_task(_status(self._actors[name], given))
        if asked := [self._asked[name] for name in known]:
            await asyncio.wait(asked, timeout=timeout_s)
        # An actor may have been taken away or replaced meanwhile.
        done = [name for name in known if name in self._asked and self._asked[name].done()]
        statuses = {name: self._asked.pop(name).result() for name in done}
        return Looked(self._given[0], statuses, [name for name in arguments if name not in known])

    # --------------------------------------------------------------------- desk

    async def exchange(self, *request: Any) -> Answer | None:
        """As `HeadDesk.exchange`, in one call for all actors that ask within a moment."""
        answer: asyncio.Future[Answer | None] = asyncio.get_running_loop().create_future()
        self._requests.append((request, answer))
        if self._handing_in is None or self._handing_in.done():
            self._handing_in = asyncio.create_task(self._hand_in())
        return await answer

    async def _hand_in(self) -> None:
        while self._requests:
            await asyncio.sleep(self._tick_s)
            batch, self._requests = self._requests, []
            answers: list[Answer | Exception | None]
            try:
                answers = await self._head.exchange_many.remote([request for request, _ in batch])
            except ray.exceptions.RayTaskError as error:
                answers = [error] * len(batch)
            except ray.exceptions.RayError:  # the head is away: the actors ask again
                answers = [None] * len(batch)
            for (_, waiting), answer in zip(batch, answers, strict=True):
                if waiting.done():
                    continue
                if isinstance(answer, Exception):
                    waiting.set_exception(answer)
                else:
                    waiting.set_result(answer)


async def _status(actor: Any, arguments: tuple[Any, ...]) -> Status:
    try:
        while True:
            try:
                status: Status = await actor.status.remote(*arguments)
                break
            except ray.exceptions.ActorUnavailableError:  # it lives, or Ray will find that it does not
                await asyncio.sleep(AGAIN_S)
    except ray.exceptions.RayActorError:
        return {"died": True}
    except ray.exceptions.RayError as error:
        return dict(failure_of(error))
    return status


# --------------------------------------------------------------------- the head


def tick_s(nodes: float) -> float:
    """Seconds between two calls of the desk by each of so many relays."""
    return max(TICK_S, nodes / MOST_BATCHES)


@dataclass
class _Relay:
    """A relay, as the head knows it."""

    handle: Any
    members: dict[str, Any] = field(default_factory=dict)  # handles of the actors that it answers for
    asked: Any = None  # answer to `look` that has not come yet
    asked_of: dict[str, Any] = field(default_factory=dict)  # members at that time
    asked_at: float = 0.0  # monotonic
    pushed: Any = None  # answer to `publish`
    version: int = 0  # of the weights that were pushed
    is_late: bool = False  # the head does without it until it answers


class Relays:
    """The relays of a run, in the head's process; any thread may call it."""

    def __init__(self, head: Any, weights: PublishedWeights, *, late_s: float = LATE_S) -> None:
        """
        head: its own handle, for the relays.
        late_s: after how many seconds without an answer the head does without a relay, and has Ray start it again.
        """
        self._head = head
        self._weights = weights
        self._late_s = late_s
        self._node = ray.get_runtime_context().get_node_id()
        self._relays: dict[str, _Relay] = {}  # by the id of their node
        self._node_of: dict[str, str] = {}  # of each member
        self._lock = threading.RLock()

    def attach(self, name: str, actor: Any, node: str) -> None:
        """Reach an actor, which runs on the node of an id, through the relay of that node, which is made where there is none.

        The actor's method `relay` is told, as it is of every change; actors on the head's own node have none. After the head's
        death its successor attaches every actor again, and finds the relays that live.
        """
        with self._lock:
            self.detach(name)
            if node == self._node:
                return
            if node not in self._relays:
                self._relays[node] = _Relay(self._find_or_make(node))
            relay = self._relays[node]
            relay.members[name] = actor
            self._node_of[name] = node
            relay.handle.attach.remote({name: actor})
            self._push(relay)
            if not relay.is_late:
                actor.relay.remote(relay.handle)

    def detach(self, name: str) -> None:
        """An actor is gone, or about to be."""
        with self._lock:
            if (node := self._node_of.pop(name, None)) is not None:
                relay = self._relays[node]
                del relay.members[name]
                relay.handle.detach.remote(name)

    def serves(self, name: str) -> bool:
        """Whether `look` is to be asked for an actor's status; else the head asks it itself."""
        with self._lock:
            node = self._node_of.get(name)
            return node is not None and not self._relays[node].is_late

    def publish(self) -> None:
        """Tell the relays of the newest weights; where one has not heard of the last ones yet, `look` does it later."""
        with self._lock:
            for relay in self._relays.values():
                self._push(relay)

    def look(self, arguments: Mapping[str, tuple[Any, ...]], timeout_s: float) -> dict[str, Status]:
        """Statuses of the actors that `serves` is true of, as of `RelayWorker.look`, in one call for each node.

        Those that do not come within about `timeout_s` come with a later call, which need not be asked for them again.

        arguments: of `status`, by the name of the actor.
        """
        with self._lock:
            for relay in self._relays.values():
                if relay.asked is None:
                    mine = {name: arguments[name] for name in relay.members if name in arguments}
                    relay.asked = relay.handle.look.remote(mine, timeout_s, tick_s(len(self._relays)))
                    relay.asked_of, relay.asked_at = dict(relay.members), time.monotonic()
            pending = [relay.asked for relay in self._relays.values() if not relay.is_late]
        if pending:
            # A relay answers after `timeout_s` even where an actor of its does not.
            ray.wait(pending, num_returns=len(pending), timeout=1.5 * timeout_s)
        found: dict[str, Status] = {}
        with self._lock:
            for node, relay in list(self._relays.items()):
                if relay.asked is None:  # made meanwhile
                    continue
                if ray.wait([relay.asked], timeout=0.0)[0]:
                    found |= self._take(node, relay)
                elif time.monotonic() - relay.asked_at > self._late_s:
                    self._do_without(node, relay)
        return found

    def names(self) -> set[str]:
        """What the relays are called in Ray."""
        with self._lock:
            return {_name(node) for node in self._relays}

    def close(self) -> None:
        """End all relays."""
        with self._lock:
            for node in list(self._relays):
                self._end(node)

    def _find_or_make(self, node: str) -> Any:
        options = RelayWorker.options(  # type: ignore[attr-defined]
            name=_name(node),
            get_if_exists=True,
            lifetime="detached",
            num_cpus=0,
            max_restarts=-1,
            max_task_retries=-1,
            max_concurrency=CALLS,
            scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False),
        )
        return options.remote(self._head)

    def _push(self, relay: _Relay) -> None:
        if relay.pushed is not None and not ray.wait([relay.pushed], timeout=0.0)[0]:
            return
        if (newer := self._weights.policy(relay.version)) is not None:
            relay.version, reference = newer
            relay.pushed = relay.handle.publish.remote(relay.version, [reference])

    def _take(self, node: str, relay: _Relay) -> dict[str, Status]:
        """Take in the answer of a relay to `look`."""
        answer, relay.asked = relay.asked, None
        try:
            looked: Looked = ray.get(answer)
        except ray.exceptions.ActorUnavailableError:
            return {}
        except ray.exceptions.RayError:  # it is gone for good, as its node is, or cannot start
            self._end(node)
            return {}
        if unknown := {name: relay.members[name] for name in looked.unknown if name in relay.members}:
            relay.handle.attach.remote(unknown)
        relay.version = min(relay.version, looked.version)
        self._push(relay)
        if relay.is_late:  # the statuses are old: the head has asked the actors since
            relay.is_late = False
            self._tell(relay, relay.handle)
            return {}
        return {
            name: status
            for name, status in looked.statuses.items()
            if name in relay.members and relay.members[name] is relay.asked_of.get(name)  # not one that took its place
        }

    def _do_without(self, node: str, relay: _Relay) -> None:
        if not relay.members:
            self._end(node)
        elif not relay.is_late:
            relay.is_late = True
            self._tell(relay, None)
            ray.kill(relay.handle, no_restart=False)

    def _end(self, node: str) -> None:
        relay = self._relays.pop(node)
        for name in relay.members:
            del self._node_of[name]
        self._tell(relay, None)
        ray.kill(relay.handle)

    def _tell(self, relay: _Relay, handle: Any) -> None:
        for actor in relay.members.values():
            actor.relay.remote(handle)


def _name(node: str) -> str:
    return f"{PREFIX}{node[:12]}"


# -------------------------------------------------------------------- the actor


class Upstream:
    """What an actor gets weights and assignments from: the relay of its node, or the head where there is none."""

    def __init__(self, head: Any) -> None:
        self._head = head
        self._relay: Any = None

    def use(self, relay: Any) -> None:
        """The relay to ask from now on; None where there is none."""
        self._relay = relay

    def follow(self, stopping: threading.Event, poll_s: float, take: Callable[[int, Any], None]) -> None:
        """Give every newer version of the weights, and the weights, to `take`, until `stopping` is set.

        A head that is away for a while is asked again.

        poll_s: the least time between two questions.
        """
        have = 0
        while not stopping.wait(poll_s):
            with suppress(ray.exceptions.RayError, TimeoutError):
                if (answer := self._policy(have)) is not None:
                    version, reference = answer
                    # The weights may be gone, with the head that held them.
                    take(version, ray.get(reference, timeout=ANSWER_S))
                    have = version

    def _policy(self, have: int) -> Policy | None:
        relay = self._relay
        answer: Policy | None
        if relay is None:
            answer = ray.get(self._head.policy.remote(have, HEAD_WAIT_S), timeout=ANSWER_S)
            return answer
        try:
            answer = ray.get(relay.policy.remote(have, WAIT_S), timeout=WAIT_S + ANSWER_S)
        except (ray.exceptions.RayError, TimeoutError):
            self._lose(relay)
            raise
        return answer

    def exchange_within(self, actor: str, incarnation: int, timeout_s: float) -> Exchange:
        """What a `DeskClient` calls, as of `exchange_with`."""
        relay = self._relay
        return exchange_with(self._head if relay is None else relay, actor, incarnation, timeout_s=timeout_s)

    def _lose(self, relay: Any) -> None:
        """Ask the head until it tells of another relay."""
        if self._relay is relay:
            self._relay = None
