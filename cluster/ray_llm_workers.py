"""The processes of a language-model run under Ray: shards with their queue, actors that sample, learners, the evaluator."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import ray

from cluster.curriculum.desk_client import DeskClient
from cluster.llm import parts
from cluster.ray_files import FolderMark, RunFiles
from cluster.ray_relay import Upstream
from cluster.ray_threads import RunProcess, Thread, failure_of, once, process
from cluster.warned import Warned
from configs.llm import LlmConfig
from replay.security import ListenError, Security, flight_client

if TYPE_CHECKING:
    from actors.assignments import Outcome
    from cluster.curriculum.desk_client import Exchange
    from learners.distributed import Group, Rendezvous
    from replay.queue_server import QueueServer

DESK_S = 0.05  # how often an actor talks to the head
POLL_S = 0.1
WARM_START_S = 7 * 86_400.0  # the longest that learners wait for the one that makes the first weights
FULL_S = 2.0  # how long an actor that is to stop waits for room in the queue


@ray.remote
class QueueShardWorker(RunProcess):
    """Serves one shard's part of the queue table."""

    def __init__(self, config: LlmConfig, index: int, run: str, security: Security, mark: FolderMark) -> None:
        self._called("shard", index, run=config.name)
        self._config = config
        self._files = RunFiles(mark)
        self._index = index
        self._run = run
        self._security = security
        self._server: QueueServer | None = None
        self._serving = threading.Lock()  # while it begins or ends
        self._saving = threading.Lock()
        # Imported while the other processes start.
        import replay.queue_server  # noqa: F401

    def start(self, port: int, checkpoint: str | None, recover: bool) -> dict[str, Any]:
        """Begin to serve. Returns its address, its port, its first status, whether it was recovered, and what `process` does.

        checkpoint: folder with the groups to begin with, where the queue of a dead shard is not taken over.
        recover: take over that queue, if it is there and whole.
        """
        from replay.queue_server import QueueServer
        from replay.queues import Queue

        settings = self._config.replay

        def prepare(queue: Queue) -> None:
            if checkpoint is not None:
                with self._files.reading(checkpoint) as folder:
                    parts.restore_shard(queue, folder, index=self._index, count=settings.shards)

        with self._serving:
            make = partial(
                QueueServer,
                parts.queue_spec(self._config),
                self._security,
                run=self._run,
                index=self._index,
                directory=settings.directory,
                host=ray.util.get_node_ip_address() if settings.host == "node" else settings.host,
                recover=recover,
                prepare=prepare,
            )
            try:
                server = self._server = make(port=port)
            except ListenError:
                if port == 0:
                    raise
                # That of the shard before it has gone to another program: whoever reads and writes is told of the new one.
                server = self._server = make(port=0)
        return {
            "address": server.address,
            "port": server.port,
            "status": self.status(),
            "recovered": server.recovered,
            "process": {**process(), "health": server.health_address},
        }

    def status(self) -> dict[str, Any]:
        """The queue's statistics."""
        assert self._server is not None
        return self._server.queue.stats()

    def save(self, replay: str, _previous: str | None) -> dict[str, int]:
        """Write this shard's part of a checkpoint. Returns the counters it holds."""
        assert self._server is not None
        with self._saving, self._files.writing(replay) as folder:
            return parts.save_shard(self._server.queue, folder, index=self._index)

    def settle(self) -> None:
        """Wait until nothing that a dead head asked for is written any more."""
        with self._saving:
            pass

    def end_writer(self, writer: str) -> None:
        """Drop what a dead writer has left incomplete."""
        assert self._server is not None
        self._server.queue.end_writer(writer)

    def end_reader(self, reader: str) -> None:
        """Give back what a dead learner has taken and not acknowledged."""
        assert self._server is not None
        self._server.queue.close_reader(reader)

    def close(self) -> None:
        """Stop serving and remove the queue's file."""
        with self._serving:
            if self._server is not None:
                self._server.close()


@ray.remote
class SamplerWorker(RunProcess):
    """Samples and judges groups, for one actor."""

    def __init__(self, config: LlmConfig, index: int, head: Any, incarnation: int, security: Security) -> None:
        self._called("actor", index, run=config.name)
        self._config = config
        self._index = index
        self._upstream = Upstream(head)
        self._incarnation = incarnation
        self._security = security
        self._stopping = threading.Event()
        self._fresh: tuple[int, Any] | None = None  # newest version and weights
        self._newest = 0  # version that the rollout was given
        self._desk = DeskClient(ahead=config.actors.prompts_ahead)
        self._unable: Exception | None = None
        try:
            import torch

            torch.set_num_threads(config.actors.threads)
            self._model = parts.make_sampling_model(config, gpus=config.actors.gpus)
        except Exception as error:  # raised here it would look like a death, after which another actor is tried
            self._unable = error

    @once
    def start(self, addresses: Sequence[str]) -> dict[str, Any]:
        """Connect to the shard and begin to sample. Returns what `process` does."""
        from learners.llm.rows import SCHEMA, TABLE
        from replay.queue_writers import QueueWriter

        if self._unable is not None:
            raise self._unable
        self._writer = QueueWriter(
            addresses[self._index % len(addresses)],
            SCHEMA,
            table=TABLE,
            name=parts.writer_name(self._index, self._incarnation),
            in_flight=1,  # so that while one waits for room, all before it are stored
            connect=partial(flight_client, security=self._security),
        )
        self._first_step_at: float | None = None
        made = threading.Event()
        self._sampling = Thread(lambda: self._sample(made), name=f"rollout-{self._index}")
        while not made.wait(0.1):
            if self._sampling.error is not None:
                raise self._sampling.error
        self._fetching = Thread(self._fetch, name=f"policy-{self._index}")
        self._asking = Thread(self._talk, name=f"desk-{self._index}")
        return {"process": process()}

    def _sample(self, made: threading.Event) -> None:
        import torch

        torch.set_num_threads(self._config.actors.threads)
        # Here, for the verifiers' processes end with the thread that started them.
        self._rollout = parts.make_rollout(self._config, self._model, self._writer, ask=self._desk.ask)
        made.set()
        while not self._stopping.is_set():
            fresh = self._fresh
            if fresh is None:
                self._stopping.wait(DESK_S)
                continue
            if fresh[0] > self._newest:
                self._newest = fresh[0]
                self._rollout.set_weights(*fresh)
            if self._rollout.step() and self._first_step_at is None:
                self._first_step_at = time.time()
            outcomes = self._rollout.take_outcomes()
            if any(outcome.fate == "kept" for outcome in outcomes):
                self._writer.flush()  # what the head hears of is stored
            self._desk.add(outcomes)
        self._rollout.close()

    def _talk(self) -> None:
        """Hand outcomes in and fetch assignments ahead of need; a head that is away for a while is asked again."""
        while not self._stopping.wait(DESK_S):
            self._desk.exchange(self._exchange_within(30.0), fetch=self._fresh is not None)

    def _exchange_within(self, timeout_s: float) -> Exchange:
        return self._upstream.exchange_within(f"actor {self._index}", self._incarnation, timeout_s)

    def _fetch(self) -> None:
        """Keep the newest weights at hand."""
        self._upstream.follow(self._stopping, self._config.actors.poll_policy_s, self._take)

    def _take(self, version: int, weights: np.ndarray) -> None:
        self._fresh = version, weights.data  # stays where it is mapped, for it may be large

    def relay(self, relay: Any) -> None:
        """Ask this relay for weights and assignments from now on; None: the head."""
        self._upstream.use(relay)

    def status(self) -> dict[str, Any]:
        """As `cluster.llm.parts.actor_status`, with completions for the report, and the error that ended the sampling, if one did."""
        status = parts.actor_status(self._rollout, self._writer.waiting_for)
        more = {"first_step_at": self._first_step_at, "examples": self._rollout.examples()}
        failed = (thread.failure() for thread in (self._sampling, self._fetching, self._asking))
        return {**status, **more, **next((found for found in failed if found), {})}

    def stop(self, timeout_s: float) -> None:
        """Stop sampling, and tell the head of every group that is stored; others are dropped, as is one that finds no room."""
        self._stopping.set()
        began, blocked_s = time.monotonic(), 0.0
        while not (has_ended := self._sampling.join(POLL_S)) and time.monotonic() - began < timeout_s:
            blocked_s = blocked_s + POLL_S if self._writer.waiting_for else 0.0
            if blocked_s > FULL_S:
                break
        if not has_ended:
            self._desk.add(_but_last_kept(self._rollout.take_outcomes()))
        if self._asking.join(timeout_s):
            self._desk.exchange(self._exchange_within(timeout_s), fetch=False)


def _but_last_kept(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """Without the last group that was written: it may not be stored."""
    kept = [number for number, outcome in enumerate(outcomes) if outcome.fate == "kept"]
    return [outcome for number, outcome in enumerate(outcomes) if not kept or number != kept[-1]]


@ray.remote
class LlmLearnerWorker(RunProcess):
    """Updates the model; learner 0 publishes its weights, saves its state and tells of it."""

    def __init__(
        self, config: LlmConfig, rank: int, head: Any, reader: str, security: Security, mark: FolderMark
    ) -> None:
        """
        rank: number of this learner among `learners.count`.
        reader: name under which it reads the queue.
        """
        self._called("learner", rank or None, run=config.name)
        from learners.loop import set_threads

        self._config = config
        self._rank = rank
        self._head = head
        self._reader = reader
        self._security = security
        self._stopping = threading.Event()
        self._saving = threading.Lock()
        self._newest: tuple[int, np.ndarray, int] | None = (
            None  # version, weights and learner steps that were published last
        )
        self._holding = threading.Lock()  # over which hold it is
        self._hold = 0
        self._is_closed = False
        self._group: Group | None = None
        self._rendezvous: Rendezvous | None = None
        self._warned = Warned()
        set_threads(config.learners.cpus, config.learners.threads)
        self._unable: Exception | None = None
        self._files = RunFiles(mark)
        try:
            self._model = parts.make_model(config, device=config.learners.device)
        except Exception as error:  # raised here it would look like a death, after which another learner is tried
            self._unable = error

    def rendezvous(self) -> str:
        """Address at which the learners of a group find each other; of learner 0."""
        from learners.distributed import Rendezvous

        local = self._config.replay.host in ("127.0.0.1", "localhost")
        if self._rendezvous is None:
            self._rendezvous = Rendezvous("127.0.0.1" if local else ray.util.get_node_ip_address())
        return self._rendezvous.address

    @once
    def start(
        self, routes: dict[int, str], checkpoint: str | None, version: int, rendezvous: str | None
    ) -> dict[str, Any]:
        """Begin to learn, from a checkpoint's learner file where one is given, else after the supervised phase.

        Returns what `process` does. routes: addresses of the shards. version: of the first weights published. rendezvous: of the group,
        where there are several learners.
        """
        from learners.loop import set_threads

        if self._unable is not None:
            raise self._unable
        config, rank = self._config, self._rank
        # Once more: flushing denormals is a setting of the thread.
        set_threads(config.learners.cpus, config.learners.threads)
        device = parts.device_of(config.learners.device)
        is_new = checkpoint is None and config.warm_start.steps > 0
        if is_new and rank == 0:
            self._tell(f"learner: {config.warm_start.steps} steps of supervised training come first")
            parts.warm_start(config, self._model, self._tell)
        if rendezvous is not None:
            from learners.distributed import JOIN_S, join

            # The others wait for learner 0 here while it warms up.
            patience_s = WARM_START_S if is_new else JOIN_S
            count = config.learners.count
            self._group = join(rank, count, rendezvous, device, rendezvous=self._rendezvous, join_s=patience_s)
            if is_new:
                parts.share_weights(self._model, self._group)
        self._learner = parts.make_learner(config, self._model, group=self._group)
        if checkpoint is not None:
            with self._files.reading(checkpoint) as path:
                parts.load_learner(path, self._learner)
        self._sampler = parts.make_sampler(
            config, list(routes.values()), name=self._reader, connect=partial(flight_client, security=self._security)
        )
        self._first = version, self._learner.updates
        self._loop = parts.make_loop(
            config,
            self._learner,
            self._sampler,
            publish=self._publish if rank == 0 else None,
            version=version,
            group=self._group,
        )
        self._updating = Thread(self._update, name="learner")
        return {"process": process()}

    def _tell(self, text: str) -> None:
        ray.get(self._head.tell.remote(text))  # lines that wait for a head to come back would come in any order

    def _publish(self, version: int, data: bytes) -> None:
        first, before = self._first
        # The weights may be older than the learner by now.
        step = min(self._learner.updates, before + (version - first) * self._config.learners.publish_every)
        # An array goes through shared memory, bytes are copied on the way.
        self._newest = version, np.frombuffer(data, np.uint8), step
        ray.get(self._head.publish.remote(*self._newest))

    def newest(self) -> tuple[int, np.ndarray, int] | None:
        """What was published last, for a head that takes the place of a dead one."""
        return self._newest

    def _update(self) -> None:
        from learners.loop import set_threads

        set_threads(self._config.learners.cpus, self._config.learners.threads)
        self._loop.run(self._stopping)

    def status(self, after: int = 0) -> dict[str, Any]:
        """As `cluster.llm.parts.learner_status`, with warnings from index `after` on, and the error that ended the updates."""
        failure = self._updating.failure()
        warnings = self._warned.after(after)
        told = {"warnings": warnings, "next_warning": after + len(warnings)}
        if not failure:
            try:
                return parts.learner_status(self._loop) | told
            except FloatingPointError as error:  # found before the next publication found it
                failure = failure_of(error)
        return {**self._loop.stats(), "metrics": {}, "waiting_for": None, **told, **failure}

    def save(self, path: str, hold: int) -> int:
        """Write the learner's state, and have all learners hold still until `release`. Returns the learner steps made.

        Held still they consume nothing, so that what the shards then save is exactly what was not learnt from. `hold` numbers the
        calls from 1 on; it is for learner 0.
        """
        with self._holding:
            if hold <= self._hold:
                raise RuntimeError("the head has given this checkpoint up")
            self._hold = hold
        try:
            state = self._loop.hold()
            version = int(self._loop.stats()["version"])
            with self._saving, self._files.writing(path) as file:
                return parts.save_learner(file, self._learner, version=version, state=state)
        except BaseException:
            self._loop.release()
            raise

    def release(self, hold: int) -> None:
        """Go on after `save`, which must have returned or is given up; a second call does nothing.

        Raises:
            TimeoutError: the learners had already gone on.
        """
        with self._holding:
            is_held, self._hold = self._hold == hold, max(self._hold, hold)
            if is_held and not self._loop.release():
                raise TimeoutError("the shards took so long to save that the learner went on meanwhile")

    def settle(self) -> None:
        """Wait until nothing that a dead head asked for is written any more."""
        with self._saving:
            pass

    def stop(self, timeout_s: float) -> None:
        """Stop updating, publish the last weights, and give back the groups not used.

        Raises:
            TimeoutError: a learner step takes longer than that; the loop ends after it.
        """
        self._stopping.set()
        if not self._updating.join(timeout_s):
            raise TimeoutError(f"a learner step takes longer than {timeout_s:g} s")
        with self._holding:
            if not self._is_closed:
                self._is_closed = True
                self._sampler.close()
                if self._group is not None:
                    self._group.close()


@ray.remote
class LlmEvaluatorWorker(RunProcess):
    """Evaluates policies on the held-out prompts."""

    def __init__(self, config: LlmConfig, gpus: float) -> None:
        """gpus: that Ray has set aside for it."""
        self._called("evaluator", None, run=config.name)
        self._config = config
        self._version = 0
        self._unable: Exception | None = None
        try:
            self._evaluator = parts.make_evaluator(config, parts.make_sampling_model(config, gpus=gpus))
        except Exception as error:  # raised here it would look like a death
            self._unable = error

    def evaluate(self, weights: np.ndarray) -> dict[str, float]:
        """As `actors.llm.evaluate.summary`."""
        import torch

        from actors.llm.evaluate import summary

        if self._unable is not None:
            raise self._unable
        torch.set_num_threads(self._config.actors.threads)
        self._version += 1
        settings = self._config.eval
        found = self._evaluator.run(self._version, weights.data)
        return summary(found, attempts=settings.attempts, families=settings.families)
