"""The typed settings of a run.

One pydantic model per room. YAML files, command-line flags and Python callers all end in a `RunConfig`, so a setting is
named, bounded and explained here and nowhere else.
"""

from __future__ import annotations

import math
from typing import Literal

from pydantic import model_validator

from configs.algorithms import Algorithm, AlgorithmSettings, SacSettings
from configs.cluster import ControlSettings, OutsideSettings
from configs.conflicts import conflicts
from configs.curriculum import EpisodeCurriculumSettings
from configs.settings import Argument, Scalar, Settings, setting
from configs.tasks import EnvTasksSettings

__all__ = [
    "ActorsSettings",
    "Algorithm",
    "AlgorithmSettings",
    "CheckpointSettings",
    "CommonSettings",
    "ControlSettings",
    "EnvSettings",
    "EnvTasksSettings",
    "EpisodeCurriculumSettings",
    "EvalSettings",
    "LearnerProcessSettings",
    "LearnersSettings",
    "OutsideSettings",
    "PriorSettings",
    "RaySettings",
    "ReplaySettings",
    "RunConfig",
    "SacSettings",
    "Scalar",
    "ServiceSettings",
    "Settings",
    "StopSettings",
    "setting",
]


class EnvSettings(Settings):
    """The environment that actors step and the evaluator measures."""

    id: str = setting(
        "Pendulum-v1",
        "EnvPool or gymnasium environment id, or package.module:make for your own, called as make(**kwargs) to "
        "return a gymnasium.Env.",
        unit="name",
        min_length=1,
    )
    backend: Literal["auto", "envpool", "gymnasium"] = setting(
        "auto", "Library that builds the environment; auto takes EnvPool where it has the id.", unit="choice"
    )
    stack: int = setting(
        1,
        "Newest frames of an image observation that the networks see at once; the environment gives single frames, which "
        "replay stores once.",
        unit="frames",
        ge=1,
        le=64,
    )
    kwargs: dict[str, Argument] = setting(
        {}, "Arguments passed on to the environment's constructor.", unit="name value"
    )


class ActorsSettings(Settings):
    """Processes that step environments and write steps to the replay service."""

    count: int = setting(1, "Number of actor processes.", unit="processes", ge=1, le=100_000)
    envs: int = setting(8, "Environments (lanes) stepped by each actor.", unit="environments", ge=1, le=65_536)
    batch_size: int | None = setting(
        None,
        "Environments whose results an actor waits for before it acts; fewer than envs steps EnvPool "
        "asynchronously, None waits for all.",
        unit="environments",
        ge=1,
        le=65_536,
    )
    threads: int = setting(0, "EnvPool's threads in each actor; 0 lets EnvPool decide.", unit="threads", ge=0, le=1024)
    random_steps: int = setting(
        5_000,
        "Steps over all actors taken with uniform random actions before the policy acts.",
        unit="environment steps",
        ge=0,
        le=10**9,
    )
    rows_per_write: int = setting(
        64, "Most rows an actor gathers before it sends them to a shard.", unit="rows", ge=1, le=1_000_000
    )
    write_every_s: float = setting(
        0.02, "Longest time a row waits in an actor before it is sent.", unit="seconds", ge=0.0, le=60.0
    )
    poll_policy_s: float = setting(
        0.05, "Pause between two requests for newer weights.", unit="seconds", gt=0.0, le=60.0
    )
    cpus: float = setting(0.5, "CPUs that Ray sets aside for each actor.", unit="CPUs", ge=0.0, le=1024.0)
    resources: dict[str, float] = setting(
        {},
        "Ray's custom resources that each actor takes, such as spot=1: only nodes that have them are used.",
        unit="name amount",
    )


class ServiceSettings(Settings):
    """How the shards of the replay service are started, and who may reach them."""

    shards: int = setting(1, "Number of replay shard processes.", unit="processes", ge=1, le=4096)
    cpus: float = setting(0.1, "CPUs that Ray sets aside for each shard.", unit="CPUs", ge=0.001, le=1024.0)
    resources: dict[str, float] = setting(
        {},
        "Ray's custom resources that each shard takes, such as spot=1: only nodes that have them are used.",
        unit="name amount",
    )
    directory: str = setting("/dev/shm", "Folder of the memory-mapped storage files.", unit="path", min_length=1)
    host: str = setting(
        "127.0.0.1",
        "Address the shards listen on; node takes the address of the node each is on, for clusters of several nodes.",
        unit="address",
        min_length=1,
    )
    tls_certificate: str | None = setting(
        None,
        "PEM file of the certificate chain that the shards show, at the same path on every node; it must name the "
        "addresses they listen on. None serves without TLS.",
        unit="path",
        min_length=1,
    )
    tls_key: str | None = setting(
        None, "PEM file of the key of replay.tls_certificate, not encrypted.", unit="path", min_length=1
    )
    tls_authority: str | None = setting(
        None,
        "PEM file of the certificates that clients of the shards trust; None trusts replay.tls_certificate alone.",
        unit="path",
        min_length=1,
    )


class ReplaySettings(ServiceSettings):
    """The replay service: shards, their storage and the pace of sampling against inserting."""

    capacity: int = setting(
        1_000_000, "Steps stored over all shards; the oldest are overwritten.", unit="steps", ge=64, le=10**11
    )
    segment_steps: int = setting(
        256,
        "Steps in one segment, the unit in which a lane takes storage and in which old steps are recycled.",
        unit="steps",
        ge=4,
        le=1_048_576,
    )
    min_size: int = setting(5_000, "Steps stored before the first sample is drawn.", unit="steps", ge=1, le=10**11)
    selector: Literal["uniform", "prioritised"] = setting(
        "uniform",
        "How windows are drawn: alike, or by their last error (Schaul et al. 2016, arXiv 1511.05952).",
        unit="choice",
    )
    priority_exponent: float = setting(
        0.6, "Exponent of a priority in the probability of its window, alpha.", unit="exponent", ge=0.0, le=10.0
    )
    importance_exponent: float = setting(
        0.4,
        "Exponent of the importance weights of prioritised windows at the start, beta; it rises to 1.",
        unit="exponent",
        ge=0.0,
        le=1.0,
    )
    importance_updates: int = setting(
        1_000_000, "Updates over which the importance exponent rises to 1.", unit="updates", ge=1, le=10**12
    )
    error_buffer: int | None = setting(
        None,
        "Steps by which inserting may run ahead of sampling, or sampling ahead of inserting, beyond the "
        "update-to-data ratio. None takes twice what the other settings need, and at least 100.",
        unit="steps",
        ge=1,
        le=10**9,
    )
    prefetch: int = setting(8, "Batches drawn ahead of the learners, over all shards.", unit="batches", ge=1, le=4096)
    transport: Literal["auto", "local", "flight"] = setting(
        "auto",
        "How the learner reads: local gathers windows from a shard's mapped storage on the same host, flight has the shard "
        "send them, auto is local where that can be.",
        unit="choice",
    )


class PriorSettings(Settings):
    """Steps of an imported dataset, mixed into every batch (Ball et al. 2023, RLPD, arXiv 2302.02948).

    Every learner holds the whole dataset in its memory. `learners.updates_per_step` counts updates, so a table of the run is
    sampled for its own part of each batch alone: samples per insert are those windows, not the dataset's.
    """

    source: str | None = setting(
        None,
        "Dataset: a file of episodes or a folder of them as `millrace replay import` reads them, a snapshot (folder or URI), "
        "or another run's folder; None mixes nothing in.",
        unit="path",
        min_length=1,
    )
    share: float = setting(0.5, "Share of each batch that comes from the dataset.", unit="share", gt=0.0, lt=1.0)


class LearnerProcessSettings(Settings):
    """What each learner process is given."""

    device: str = setting(
        "auto",
        "Torch device of the learners; auto takes CUDA where each can have a GPU of its own.",
        unit="device",
        pattern=r"^(auto|cpu|cuda(:\d+)?)$",
        allowed="auto, cpu, cuda or cuda:<index>",
    )
    threads: int = setting(
        0, "Torch threads of each learner; 0 takes as many as Ray gave it CPUs.", unit="threads", ge=0, le=1024
    )
    cpus: float = setting(1.0, "CPUs that Ray sets aside for each learner.", unit="CPUs", ge=0.0, le=1024.0)
    gpus: float | None = setting(
        None,
        "GPUs that Ray sets aside for each learner; None takes one where the cluster has one for each and device is not cpu.",
        unit="GPUs",
        ge=0.0,
        le=64.0,
    )
    resources: dict[str, float] = setting(
        {},
        "Ray's custom resources that each learner takes, such as spot=1: only nodes that have them are used.",
        unit="name amount",
    )


class LearnersSettings(LearnerProcessSettings):
    """The processes that draw windows, update the networks and publish weights."""

    count: int = setting(
        1, "Learner processes, data parallel: each takes an equal part of every batch.", unit="processes", ge=1, le=1024
    )
    batch_size: int = setting(256, "Windows in one update, over all learners.", unit="windows", ge=1, le=1_048_576)
    updates_per_call: int = setting(
        1, "Updates made at once on windows drawn together.", unit="updates", ge=1, le=10_000
    )
    updates_per_step: float = setting(
        1.0, "Update-to-data ratio: updates per environment step.", unit="updates per step", gt=0.0, le=1000.0
    )
    publish_every: int = setting(20, "Updates between two publications of weights.", unit="updates", ge=1, le=1_000_000)
    compile: bool = setting(
        False, "Compile the update with torch.compile; without a compiler it runs eagerly and says so.", unit="switch"
    )
    graphs: bool = setting(
        True, "Record the update as a CUDA graph and replay it; without a GPU it has no effect.", unit="switch"
    )
    precision: Literal["float32", "bfloat16"] = setting(
        "float32",
        "Arithmetic of matrix products; with bfloat16 parameters, targets and losses stay float32.",
        unit="choice",
    )
    products: Literal["auto", "torch", "onednn"] = setting(
        "auto", "Library of matrix products on the CPU; auto times both when the learner starts.", unit="choice"
    )


class EvalSettings(Settings):
    """Evaluation while training: episodes on environments and seeds of their own, never stored."""

    every: int = setting(
        10_000,
        "Environment steps between two evaluations; 0 turns evaluation off.",
        unit="environment steps",
        ge=0,
        le=10**12,
    )
    episodes: int = setting(10, "Episodes in one evaluation, of each of its tasks.", unit="episodes", ge=1, le=100_000)
    seed: int = setting(
        1_000_003,
        "First seed of the evaluation environments; the same at every evaluation.",
        unit="seed",
        ge=0,
        le=2**31 - 1,
    )
    deterministic: bool = setting(
        True,
        "Act without noise for exploration; off acts as the lane that explores least, for policies that would run in circles "
        "where the environment is only partly observed.",
        unit="switch",
    )
    tasks: int | None = setting(
        64,
        "Most tasks that an evaluation plays, spread evenly over all of them and the same at every evaluation, each for "
        "eval.episodes; None plays all.",
        unit="tasks",
        ge=1,
        le=1_000_000,
    )


class StopSettings(Settings):
    """When training ends: at the first of these that is met."""

    steps: int | None = setting(
        1_000_000, "Environment steps, over all actors.", unit="environment steps", ge=1, le=10**13
    )
    wall_s: float | None = setting(
        None, "Wall time since the first environment step.", unit="seconds", gt=0.0, le=10**9
    )
    mean_return: float | None = setting(
        None, "Mean return of one evaluation that counts as solved.", unit="reward", ge=-1e12, le=1e12
    )
    success: float | None = setting(
        None,
        "Share of passed episodes of one evaluation, over all its tasks, that counts as solved.",
        unit="share",
        gt=0.0,
        le=1.0,
    )


class CheckpointSettings(Settings):
    """What is kept so that a run can go on after a stop or a crash."""

    every_s: float = setting(
        300.0, "Time between two checkpoints; one more is written at the end.", unit="seconds", ge=1.0, le=10**9
    )
    keep: int = setting(
        3,
        "Newest checkpoints kept; the one with the best evaluation is kept beside them.",
        unit="checkpoints",
        ge=1,
        le=10_000,
    )
    replay: bool = setting(
        True,
        "Store the replay's steps in the checkpoint, so that a resumed run learns from the same data.",
        unit="switch",
    )


class RaySettings(Settings):
    """How a run in cluster mode uses Ray."""

    dashboard: bool = setting(True, "Start Ray's dashboard with a private Ray.", unit="switch")
    object_store_mb: int = setting(
        256, "Memory of a private Ray's object store; attached clusters keep theirs.", unit="MB", ge=80, le=10**6
    )
    metrics: bool = setting(
        True, "Hand every figure to Ray's metrics as well, which its dashboard and Prometheus show.", unit="switch"
    )


class CommonSettings(Settings):
    """What every run has, whatever it trains."""

    name: str | None = setting(
        None,
        "Name of the run and of its folder; None makes one from what is trained and the time.",
        unit="name",
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$",
        allowed="up to 100 letters, digits, '.', '_' and '-', the first a letter or digit",
    )
    root: str = setting("runs", "Folder that holds the runs' folders.", unit="path", min_length=1)
    seed: int = setting(0, "Seed of every random number of the run.", unit="seed", ge=0, le=2**31 - 1)
    mode: Literal["cluster", "sync"] = setting(
        "cluster",
        "cluster runs processes under Ray; sync runs the same parts in one process, in lock step, without Ray.",
        unit="choice",
    )
    address: str | None = setting(
        None,
        "Ray cluster to attach to (auto, or host:port); None starts a private one, unless RAY_ADDRESS is set.",
        unit="address",
        min_length=1,
    )
    wait_for_resources: float = setting(
        0.0,
        "Longest time that a run waits for the cluster to have what it asks for, so that an autoscaler may add nodes; 0 stops "
        "at once and says what is missing.",
        unit="seconds",
        ge=0.0,
        le=10**9,
    )
    report_every_s: float = setting(1.0, "Time between two rows of metrics.", unit="seconds", ge=0.1, le=3600.0)
    checkpoints: CheckpointSettings = CheckpointSettings()
    control: ControlSettings = ControlSettings()
    ray: RaySettings = RaySettings()


class RunConfig(CommonSettings):
    """Everything that decides a run that trains a policy for control."""

    kind: Literal["control"] = setting(
        "control", "What is trained: a policy for control, or a language model (llm).", unit="choice"
    )
    env: EnvSettings = EnvSettings()
    tasks: EnvTasksSettings = EnvTasksSettings()
    curriculum: EpisodeCurriculumSettings = EpisodeCurriculumSettings()
    algorithm: Algorithm = SacSettings()
    actors: ActorsSettings = ActorsSettings()
    replay: ReplaySettings = ReplaySettings()
    prior: PriorSettings = PriorSettings()
    outside: OutsideSettings = OutsideSettings()
    learners: LearnersSettings = LearnersSettings()
    eval: EvalSettings = EvalSettings()
    stop: StopSettings = StopSettings()

    @property
    def has_tasks(self) -> bool:
        """Whether episodes are of tasks that a curriculum draws; else every episode plays `env`."""
        return self.tasks.configured

    @property
    def env_name(self) -> str:
        """What is played, in a few words: `env.id`, or the first of the tasks' ids and how many more there are."""
        first, *more = self.env_names
        return f"{first} and {len(more)} more" if more else first

    @property
    def env_names(self) -> list[str]:
        """The different ids of what is played; of tasks from a file or a generator its name alone."""
        tasks = self.tasks
        if tasks.source is not None:
            return [tasks.source]
        return list(dict.fromkeys(tasks.ids or [row.id or self.env.id for row in tasks.list] or [self.env.id]))

    @property
    def lanes(self) -> int:
        """Environments over all actors."""
        return self.actors.count * self.actors.envs

    @property
    def batch_part(self) -> int:
        """Windows of one update that each learner takes."""
        return self.learners.batch_size // self.learners.count

    @property
    def prior_part(self) -> int:
        """Windows among `batch_part` that come from the dataset."""
        return 0 if self.prior.source is None else round(self.prior.share * self.batch_part)

    @property
    def replay_windows(self) -> int:
        """Windows of one update, over all learners, that come from the run's own replay."""
        return self.learners.count * (self.batch_part - self.prior_part)

    @property
    def draw_size(self) -> int:
        """Windows that a learner asks the run's own replay for at once.

        Without a dataset those of all updates of a call; beside one the updates' parts are drawn one by one.
        """
        own = self.batch_part - self.prior_part
        return own if self.prior_part else own * self.learners.updates_per_call

    @property
    def prefetch_draws(self) -> int:
        """Draws of `draw_size` windows ahead of each learner: `replay.prefetch` batches, at least one draw."""
        return math.ceil(self.replay.prefetch * (self.batch_part - self.prior_part) / self.draw_size)

    @property
    def samples_per_insert(self) -> float:
        """Windows drawn from the run's own replay per inserted step: the update-to-data ratio times their number."""
        return self.learners.updates_per_step * self.replay_windows

    @property
    def insert_block(self) -> int:
        """Rows that a shard leases from the table's limiter at once: a write of each actor that writes to it.

        So however many actors there are, shard 0 is asked as often as one actor writes. Where the error buffer is set there may
        not be room for more than one write.
        """
        if self.replay.error_buffer is not None:
            return self.actors.rows_per_write
        return self.actors.rows_per_write * math.ceil(self.actors.count / self.replay.shards)

    @property
    def sample_block(self) -> int:
        """Windows that a shard leases at once: a draw of each learner; a draw alone where the error buffer is set."""
        return self.draw_size * (self.learners.count if self.replay.error_buffer is None else 1)

    @property
    def error_buffer(self) -> int:
        """Steps of `replay.error_buffer`, where it is not set those that the other settings ask for.

        Each side must fit its requests into the room that the other side's limit leaves, or both wait. What is set is judged
        when a run starts (`cluster.parts.check_limits`). Where nothing is, there is room for all that may be under way: one
        write of each actor, the batches drawn ahead and those of the call in use, and what every shard but the first has
        leased from the limiter, a block of writes and a draw.
        """
        if self.replay.error_buffer is not None:
            return self.replay.error_buffer
        leases = self.replay.shards - 1
        write = max(self.actors.rows_per_write, self.actors.batch_size or self.actors.envs)
        inserts = write * self.actors.count + max(write, self.insert_block) * leases
        draws = self.draw_size * self.learners.count * (self.prefetch_draws + leases)
        samples = self.replay_windows * self.learners.updates_per_call + draws
        return max(100, 2 * math.ceil((inserts + samples / self.samples_per_insert) / 2))

    @model_validator(mode="after")
    def _combinations(self) -> RunConfig:
        if found := list(conflicts(self)):
            raise ValueError("\n".join(found))
        return self
