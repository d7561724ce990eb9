"""The processes of a run as Ray actors: thin shells that run the parts in a thread and answer the head.

Each is detached and named in the run's namespace, so that it outlives whoever made it. A part that fails keeps its process
alive and tells its error in `status`.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import ray

from cluster import parts
from cluster.curriculum.desk_client import DeskClient, Exchange
from cluster.evaluating import Evaluating
from cluster.ray_files import FolderMark, RunFiles
from cluster.ray_relay import Upstream
from cluster.ray_threads import RunProcess, Thread, failure_of, once, process
from cluster.warned import Warned
from configs.schema import RunConfig
from replay.routed_writer import RoutedWriter
from replay.schema import StepSchema
from replay.security import ListenError, Security, flight_client

if TYPE_CHECKING:
    from actors.task_env import TaskEnv
    from cluster.outside import Policy
    from learners.distributed import Group, Rendezvous
    from replay.server import ShardServer  # they compile kernels, which head and actors have no use for
    from replay.shard import Shard


DESK_S = 0.05  # how often an actor talks to the head
START_S = 30.0  # how long it waits for its first assignments
AHEAD = 2  # assignments at hand for each environment


@ray.remote
class ShardWorker(RunProcess):
    """Serves one replay shard."""

    def __init__(
        self,
        config: RunConfig,
        schema: str,
        index: int,
        run: str,
        incarnation: int,
        security: Security,
        mark: FolderMark,
    ) -> None:
        self._called("shard", index, run=config.name)
        self._config = config
        self._files = RunFiles(mark)
        rows = parts.row_schema(config, StepSchema.from_json(schema))
        self._spec = parts.shard_spec(config, rows, index, run=run, incarnation=incarnation)
        self._security = security
        self._server: ShardServer | None = None
        self._serving = threading.Lock()  # while it begins or ends
        self._saving = threading.Lock()
        self._handing_over = threading.Lock()
        self._left: dict[str, Any] | None = None  # what `hand_over` has answered
        # Imported, its compiled loops with it, while the other processes start.
        import replay.server  # noqa: F401

    def start(
        self,
        limiter_address: str | None,
        port: int,
        checkpoint: str | None,
        recover: bool,
        others: Sequence[dict[str, Any]] | None,
    ) -> dict[str, Any]:
        """Begin to serve. Returns its address, its port, its first status and what `process` does.

        checkpoint: folder with the steps to begin with, where the storage of a dead shard is not taken over.
        recover: take over that storage, if it is there and whole.
        others: statuses of the other shards; set on shard 0 where they are serving already, for the limiter's counters.
        """
        host = ray.util.get_node_ip_address() if self._spec.host == "node" else self._spec.host
        self._spec = replace(self._spec, limiter_address=limiter_address, host=host, port=port)
        prepare = partial(self._prepare, checkpoint=checkpoint, alone=recover, others=others)
        with self._serving:
            self._server = self._serve(prepare, recover)
        return {
            "address": self._server.address,
            "port": self._server.port,
            "status": self.status(),
            "recovered": self._server.shard.recovered,
            "damage": self._server.damage,
            "process": {**process(), "health": self._server.health_address},
        }

    def _serve(self, prepare: Callable[[Shard], None], recover: bool) -> ShardServer:
        from replay.server import ShardServer

        make = partial(
            ShardServer, security=self._security, recover=recover, afresh_if_damaged=recover, prepare=prepare
        )
        try:
            return make(self._spec)
        except ListenError:
            if self._spec.port == 0:
                raise
            # That of the shard before it has gone to another program: whoever reads and writes is told of the new one.
            self._spec = replace(self._spec, port=0)
            return make(self._spec)

    def _prepare(
        self, shard: Shard, *, checkpoint: str | None, alone: bool, others: Sequence[dict[str, Any]] | None
    ) -> None:
        if checkpoint is not None and not shard.recovered:
            # Among shards that live, one takes back what it has saved itself: the rest is with the others.
            shards = None if alone else self._config.replay.shards
            parts.restore_shard(shard, self._files.store(checkpoint), shards=shards)
        if others is not None:
            sums = parts.limiter_sums(self._config, [*others, parts.shard_status(shard.stats())])
            parts.set_limiter(shard, **sums)

    def status(self) -> dict[str, Any]:
        """As `cluster.parts.shard_status`."""
        assert self._server is not None
        return parts.shard_status(self._server.stats())

    def save(self, replay: str, previous: str | None) -> dict[str, int]:
        """As `cluster.parts.save_shard`."""
        assert self._server is not None
        with self._saving:
            before = None if previous is None else self._files.store(previous)
            return parts.save_shard(self._server.shard, self._files.store(replay), before)

    def settle(self) -> None:
        """Wait until nothing that a dead head asked for is written any more."""
        with self._saving:
            pass

    def follow(self, limiter_address: str) -> None:
        """Lease from the limiter at another address from now on; on any shard but 0."""
        assert self._server is not None
        self._server.follow(limiter_address)

    def set_limit(self, config: RunConfig) -> None:
        """Keep the pace of these settings from now on."""
        assert self._server is not None
        parts.set_limit(self._server.shard, config)

    def hand_over(self, routes: Mapping[int, str]) -> dict[str, Any]:
        """Give all steps to the shards at these addresses, and serve none any more. Returns how many, and the last status.

        One that failed goes on with the next call; one that is done answers again.
        """
        assert self._server is not None
        with self._handing_over:
            if self._left is None:
                self._server.leave()
                found = self._server.shard.hand_over(routes, self._security)
                self._left = {"handed_over": asdict(found), "status": self.status()}
            return self._left

    def restore_limiter(self, counters: dict[str, int]) -> None:
        """Set the counters of the limiter; on shard 0."""
        assert self._server is not None
        parts.set_limiter(self._server.shard, **counters)

    def lost(self, items: int) -> None:
        """Tell the limiter of items that another shard has lost; on shard 0."""
        assert self._server is not None
        self._server.lost(parts.TABLE, items)

    def end_writer(self, writer: str) -> None:
        """End the lanes of a dead writer, so that the one in its place finds room."""
        assert self._server is not None
        self._server.end_writer(writer)

    def close(self) -> None:
        """Stop serving and remove the storage file."""
        with self._serving:
            if self._server is not None:
                self._server.close()


@ray.remote
class ActorWorker(RunProcess):
    """Steps the environments of one actor."""

    def __init__(
        self,
        config: RunConfig,
        schema: str,
        index: int,
        head: Any,
        random_steps: int,
        incarnation: int,
        security: Security,
    ) -> None:
        self._called("actor", index, run=config.name)
        self._config = config
        self._schema = StepSchema.from_json(schema)
        self._security = security
        self._index = index
        self._upstream = Upstream(head)
        self._random_steps = random_steps
        self._incarnation = incarnation
        self._stopping = threading.Event()
        self._fresh: tuple[int, bytes] | None = None  # newest version and weights
        self._tasks = parts.make_tasks(config)
        self._desk = DeskClient(ahead=AHEAD * config.actors.envs)
        self._asking: Thread | None = None
        self._writer: RoutedWriter | None = None
        self._routes: dict[int, str] = {}
        self._routed = 0  # number of the routes
        self._routing = threading.Lock()
        # Imported while the shards start.
        import actors.envs
        import actors.rollout  # noqa: F401

    @once
    def start(self, number: int, routes: dict[int, str]) -> dict[str, Any]:
        """Connect to the shards at these addresses and begin to step; as `route`. Returns what `process` does."""
        name = parts.writer_name(self._index, self._incarnation)
        rows = parts.row_schema(self._config, self._schema)
        writer = RoutedWriter(
            routes,
            rows,
            name=name,
            first=self._index * self._config.actors.envs,  # actors of few lanes do not all begin on the same shards
            message_rows=self._config.actors.rows_per_write,  # the limiter lets a message in as a whole
            connect=partial(flight_client, security=self._security),
        )
        common = {"random_steps": self._random_steps, "incarnation": self._incarnation}
        self._task_env: TaskEnv | None = None
        if self._tasks is None:
            self._rollout = parts.make_rollout(self._config, self._schema, self._index, writer, **common)
        else:
            self._desk.exchange(self._exchange_within(START_S))  # first assignments, before the first episodes
            self._rollout, self._task_env = parts.make_task_rollout(
                self._config,
                self._schema,
                self._index,
                writer,
                tasks=self._tasks,
                ask=self._desk.ask,
                **common,
            )
            self._asking = Thread(self._talk, name=f"desk-{self._index}")
        self._first_step_at: float | None = None
        self._fetching = Thread(self._fetch, name=f"policy-{self._index}")
        self._stepping = Thread(self._step, name=f"rollout-{self._index}")
        with self._routing:
            self._writer = writer
            if self._routed > number:  # told meanwhile
                writer.route(self._routes, within_s=0.0)
        return {"process": process()}

    def route(self, number: int, routes: dict[int, str], within_s: float) -> None:
        """Write to the shards at these addresses; routes of a lower number than those it has are left out.

        within_s: how long a lane may go on with its episode where it is written now.
        """
        with self._routing:
            if number > self._routed:
                self._routed, self._routes = number, routes
                if self._writer is not None:
                    self._writer.route(routes, within_s=within_s)

    def _step(self) -> None:
        while not self._stopping.is_set():
            fresh = self._fresh
            if fresh is not None and fresh[0] != self._rollout.version:
                self._rollout.set_policy(*fresh)
            steps = self._rollout.step()
            if steps and self._first_step_at is None:
                self._first_step_at = time.time()
            if self._task_env is not None and (outcomes := self._task_env.take_outcomes()):
                self._desk.add(outcomes)
        self._rollout.close()

    def _talk(self) -> None:
        """Hand outcomes in and fetch assignments ahead of need; a head that is away for a while is asked again."""
        while not self._stopping.wait(DESK_S):
            self._desk.exchange(self._exchange_within(30.0))

    def _exchange_within(self, timeout_s: float) -> Exchange:
        return self._upstream.exchange_within(f"actor {self._index}", self._incarnation, timeout_s)

    def _fetch(self) -> None:
        """Keep the newest weights at hand."""
        self._upstream.follow(self._stopping, self._config.actors.poll_policy_s, self._take)

    def _take(self, version: int, weights: np.ndarray) -> None:
        self._fresh = version, weights.tobytes()

    def relay(self, relay: Any) -> None:
        """Ask this relay for weights and assignments from now on; None: the head."""
        self._upstream.use(relay)

    def status(self, after: int) -> dict[str, Any]:
        """As `cluster.parts.actor_status`, with the error that ended the stepping, if one did."""
        assert self._writer is not None
        status = parts.actor_status(self._rollout, self._writer, after=after, tasks=self._task_env)
        asking = {} if self._asking is None else self._asking.failure()
        return {**status, "first_step_at": self._first_step_at, **asking, **self._stepping.failure()}

    def stop(self, timeout_s: float) -> None:
        """Stop stepping, write what is complete, end the lanes, and tell the head of the last outcomes."""
        self._stopping.set()
        self._stepping.join(timeout_s)
        if self._asking is not None and self._asking.join(timeout_s):
            self._desk.exchange(self._exchange_within(timeout_s), fetch=False)


@ray.remote
class LearnerWorker(RunProcess):
    """Updates the networks; learner 0 publishes their weights, saves their state and tells of them."""

    def __init__(
        self,
        config: RunConfig,
        schema: str,
        rank: int,
        head: Any,
        incarnation: int,
        security: Security,
        mark: FolderMark,
    ) -> None:
        """
        schema: of the environment's steps, as JSON.
        rank: number of this learner among `learners.count`.
        incarnation: the same for all learners of a group.
        """
        self._called("learner", rank or None, run=config.name)
        from learners.loop import set_threads

        self._config = config
        self._files = RunFiles(mark)
        self._rows = parts.row_schema(config, StepSchema.from_json(schema))
        self._rank = rank
        self._head = head
        self._incarnation = incarnation
        self._security = security
        self._stopping = threading.Event()
        self._saving = threading.Lock()
        self._newest: tuple[int, np.ndarray] | None = None  # version and weights that were published last
        self._group: Group | None = None
        self._rendezvous: Rendezvous | None = None
        self._warned = Warned()
        self._routes: dict[int, str] = {}
        self._routed = 0  # number of the routes
        self._routing = threading.Lock()
        self._started = False
        set_threads(config.learners.cpus, config.learners.threads)
        self._unable: Exception | None = None
        try:
            parts.check_device(config)
            # What takes time is done while the shards start; in a group the algorithm needs to know its place first.
            if config.learners.count == 1:
                self._algorithm = parts.make_algorithm(config, self._rows, incarnation=incarnation)
        except Exception as error:  # raised here it would look like a death, after which another learner is tried
            self._unable = error
        import cluster.prior  # noqa: F401

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
        """Begin to update, from a checkpoint's learner file where one is given. Returns what `process` does.

        routes: addresses of the shards. version: of the first weights published. rendezvous: of the group, where there are several
        learners.
        """
        from cluster.prior import with_prior
        from replay.samplers import stream_sampler

        if self._unable is not None:
            raise self._unable
        config, rank = self._config, self._rank
        if rendezvous is not None:
            self._join(rendezvous)
        if checkpoint is not None and rank == 0:
            with self._files.reading(checkpoint) as path:
                parts.load_learner(path, self._algorithm)
        if self._group is not None:  # whatever one begins with, all begin with
            self._algorithm.load_state(self._group.broadcast(self._algorithm.state()))
        self._sampler = stream_sampler(
            routes,
            self._rows,
            batch_size=config.draw_size,
            security=self._security,
            window=parts.window(config, self._rows),
            table=parts.table(config),
            prefetch=config.prefetch_draws,
            transport=config.replay.transport,
            seed=parts.seed_of(config, "sampler", rank, self._incarnation),
        )
        seed = parts.seed_of(config, "prior", rank, self._incarnation)
        self._loop = parts.make_loop(
            config,
            self._algorithm,
            with_prior(config, self._rows, self._sampler, seed=seed),
            publish=self._publish if rank == 0 else None,
            prefetch=2,
            version=version,
            group=self._group,
        )
        self._updating = Thread(self._update, name="learner")
        with self._routing:
            self._started = True
            if self._routed:  # told meanwhile
                self._sampler.route(self._routes)
        return {"process": process()}

    def route(self, number: int, routes: dict[int, str]) -> None:
        """Read from the shards at these addresses; routes of a lower number than those it has are left out."""
        with self._routing:
            if number > self._routed:
                self._routed, self._routes = number, routes
                if self._started:
                    self._sampler.route(routes)

    def _join(self, address: str) -> None:
        """Become one of a group, and make the algorithm for a part of each batch."""
        from learners.distributed import join

        device = self._config.learners.device
        if device == "auto":
            import torch

            device = "cuda" if torch.cuda.is_available() else "cpu"
        self._group = join(self._rank, self._config.learners.count, address, device, rendezvous=self._rendezvous)
        self._algorithm = parts.make_algorithm(
            self._config, self._rows, incarnation=self._incarnation, group=self._group
        )

    def _publish(self, version: int, data: bytes) -> None:
        self._newest = version, np.frombuffer(data, np.uint8)  # an array goes through shared memory, bytes are copied
        ray.get(self._head.publish.remote(*self._newest))

    def newest(self) -> tuple[int, np.ndarray] | None:
        """What was published last, for a head that takes the place of a dead one."""
        return self._newest

    def observe_returns(self, low: float, high: float) -> None:
        """As `LearnerLoop.tell_returns`."""
        self._loop.tell_returns(low, high)

    def _update(self) -> None:
        from learners.loop import set_threads

        # Once more: flushing denormals is a setting of the thread.
        set_threads(self._config.learners.cpus, self._config.learners.threads)
        self._loop.run(self._stopping)

    def status(self, after: int = 0) -> dict[str, Any]:
        """As `cluster.parts.learner_status`, with the warnings from index `after` on, and the error that ended the updates."""
        failure = self._updating.failure()
        warnings = self._warned.after(after)
        told = {"warnings": warnings, "next_warning": after + len(warnings)}
        if not failure:
            try:
                return parts.learner_status(self._loop) | told
            except FloatingPointError as error:  # found before the next publication found it
                failure = failure_of(error)
        return {**self._loop.stats(), "metrics": {}, "waiting_for": None, **told, **failure}

    def save(self, path: str) -> int:
        """Write the learner's state, taken between two updates. Returns the updates made."""
        with self._saving, self._files.writing(path) as file, self._loop.between_updates():
            return parts.save_learner(file, self._algorithm, version=int(self._loop.stats()["version"]))

    def settle(self) -> None:
        """Wait until nothing that a dead head asked for is written any more."""
        with self._saving:
            pass

    def stop(self, timeout_s: float) -> None:
        """Stop updating, publish the last weights, and let go of the samples not used; a second call does nothing.

        Learners of a group stop after the same update, once one of them is told to.
        """
        if self._stopping.is_set():
            return
        self._stopping.set()
        self._updating.join(timeout_s)
        if self._updating.error is None:
            self._loop.publish()
        self._sampler.close()
        if self._group is not None:
            self._group.close()


@ray.remote
class ExporterWorker(RunProcess):
    """Writes the acting network as a file for actors outside Ray."""

    def __init__(self, config: RunConfig, schema: str) -> None:
        self._called("exporter", None, run=config.name)
        from cluster.acting_export import PolicyExporter

        self._exporter = PolicyExporter(config, StepSchema.from_json(schema))

    def export(self, version: int, weights: np.ndarray) -> Policy:
        """As `PolicyExporter.export`."""
        return self._exporter.export(version, weights.tobytes())


@ray.remote
class EvaluatorWorker(RunProcess):
    """Runs evaluations on environments of its own."""

    def __init__(self, config: RunConfig, schema: str) -> None:
        self._called("evaluator", None, run=config.name)
        self._config = config
        self._policy = parts.make_policy(config, StepSchema.from_json(schema))
        self._evaluating: Evaluating | None = None

    def evaluate(self, weights: np.ndarray) -> dict[str, Any]:
        """As `Evaluating.run`."""
        if self._evaluating is None:
            self._evaluating = Evaluating(self._config, parts.make_tasks(self._config), self._policy)
        return self._evaluating.run(weights.tobytes())
