"""The typed settings of a run.

One pydantic model per room. YAML files, command-line flags and Python callers all end in a `RunConfig`, so a setting is
named, bounded and explained here and nowhere else.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Scalar = bool | int | float | str
Width = Annotated[int, Field(ge=1, le=65_536)]


def setting(default: Any, help: str, *, unit: str, allowed: str | None = None, **bounds: Any) -> Any:
    """A pydantic field with its help sentence and unit.

    `bounds` are pydantic's (`ge`, `le`, `pattern`, …); `allowed` says in words what a `pattern` lets through.
    """
    extra: dict[str, Any] = {"unit": unit} if allowed is None else {"unit": unit, "allowed": allowed}
    return Field(default, description=help, json_schema_extra=extra, **bounds)


class Settings(BaseModel):
    """Base of every group of settings: frozen, and an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


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
    kwargs: dict[str, Scalar] = setting({}, "Arguments passed on to the environment's constructor.", unit="name value")


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


class ReplaySettings(Settings):
    """The replay service: shards, their storage and the pace of sampling against inserting."""

    shards: int = setting(1, "Number of replay shard processes.", unit="processes", ge=1, le=4096)
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
    error_buffer: int | None = setting(
        None,
        "Steps by which inserting may run ahead of sampling, or sampling ahead of inserting, beyond the "
        "update-to-data ratio. None takes twice what the other settings need, and at least 100.",
        unit="steps",
        ge=1,
        le=10**9,
    )
    prefetch: int = setting(8, "Batches drawn ahead of the learner, over all shards.", unit="batches", ge=1, le=4096)
    transport: Literal["auto", "local", "flight"] = setting(
        "auto",
        "How the learner reads: local gathers windows from a shard's mapped storage on the same host, flight has the shard "
        "send them, auto is local where that can be.",
        unit="choice",
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


class LearnersSettings(Settings):
    """The process that draws windows, updates the networks and publishes weights."""

    batch_size: int = setting(256, "Windows in one update.", unit="windows", ge=1, le=1_048_576)
    updates_per_step: float = setting(
        1.0, "Update-to-data ratio: updates per environment step.", unit="updates per step", gt=0.0, le=1000.0
    )
    publish_every: int = setting(20, "Updates between two publications of weights.", unit="updates", ge=1, le=1_000_000)
    device: str = setting(
        "auto",
        "Torch device of the learner; auto takes CUDA where there is one.",
        unit="device",
        pattern=r"^(auto|cpu|cuda(:\d+)?)$",
        allowed="auto, cpu, cuda or cuda:<index>",
    )
    threads: int = setting(
        0, "Torch threads of the learner; 0 takes as many as Ray gave it CPUs.", unit="threads", ge=0, le=1024
    )
    cpus: float = setting(1.0, "CPUs that Ray sets aside for the learner.", unit="CPUs", ge=0.0, le=1024.0)
    gpus: float | None = setting(
        None,
        "GPUs that Ray sets aside for the learner; None takes one where the cluster has one and device is not cpu.",
        unit="GPUs",
        ge=0.0,
        le=64.0,
    )
    compile: bool = setting(
        False, "Compile the update with torch.compile; without a compiler it runs eagerly and says so.", unit="switch"
    )


class SacSettings(Settings):
    """Soft actor-critic (Haarnoja et al. 2018, arXiv 1812.05905)."""

    name: Literal["sac"] = setting("sac", "The algorithm.", unit="choice")
    discount: float = setting(0.99, "Discount of the return, gamma.", unit="per step", ge=0.0, le=1.0)
    n_step: int = setting(
        1,
        "Steps of reward summed before the value is bootstrapped; the entropy of the steps between is left out.",
        unit="steps",
        ge=1,
        le=1000,
    )
    hidden: tuple[Width, ...] = setting(
        (256, 256), "Widths of the hidden layers of policy and critics.", unit="units", min_length=1, max_length=16
    )
    policy_lr: float = setting(3e-4, "Adam step size of the policy.", unit="per update", gt=0.0, le=1.0)
    critic_lr: float = setting(3e-4, "Adam step size of the critics.", unit="per update", gt=0.0, le=1.0)
    temperature_lr: float = setting(3e-4, "Adam step size of the log temperature.", unit="per update", gt=0.0, le=1.0)
    initial_temperature: float = setting(
        1.0, "Temperature alpha before the first update.", unit="reward", gt=0.0, le=1000.0
    )
    target_entropy: float | None = setting(
        None,
        "Entropy the temperature steers to; None is minus the number of action dimensions.",
        unit="nats",
        ge=-1e6,
        le=1e6,
    )
    polyak: float = setting(
        0.005, "Share of the online critics mixed into their targets at each update, tau.", unit="share", gt=0.0, le=1.0
    )


class EvalSettings(Settings):
    """Evaluation while training: deterministic episodes on environments and seeds of their own, never stored."""

    every: int = setting(
        10_000,
        "Environment steps between two evaluations; 0 turns evaluation off.",
        unit="environment steps",
        ge=0,
        le=10**12,
    )
    episodes: int = setting(10, "Episodes in one evaluation.", unit="episodes", ge=1, le=100_000)
    seed: int = setting(
        1_000_003,
        "First seed of the evaluation environments; the same at every evaluation.",
        unit="seed",
        ge=0,
        le=2**31 - 1,
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


Algorithm = SacSettings


class RunConfig(Settings):
    """Everything that decides a run."""

    name: str | None = setting(
        None,
        "Name of the run and of its folder; None makes one from the environment, the algorithm and the time.",
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
    report_every_s: float = setting(1.0, "Time between two rows of metrics.", unit="seconds", ge=0.1, le=3600.0)
    env: EnvSettings = EnvSettings()
    algorithm: Algorithm = SacSettings()
    actors: ActorsSettings = ActorsSettings()
    replay: ReplaySettings = ReplaySettings()
    learners: LearnersSettings = LearnersSettings()
    eval: EvalSettings = EvalSettings()
    stop: StopSettings = StopSettings()
    checkpoints: CheckpointSettings = CheckpointSettings()
    ray: RaySettings = RaySettings()

    @property
    def lanes(self) -> int:
        """Environments over all actors."""
        return self.actors.count * self.actors.envs

    @property
    def samples_per_insert(self) -> float:
        """Windows drawn per inserted step: the update-to-data ratio times the batch size."""
        return self.learners.updates_per_step * self.learners.batch_size

    @property
    def error_buffer(self) -> int:
        """Steps of `replay.error_buffer`, where it is not set those that the other settings ask for.

        Each side must fit its requests into the room that the other side's limit leaves, or both wait. What is set is judged
        when a run starts (`cluster.parts.check_limits`). Where nothing is, there is room for all that may be under way: one
        write of each actor, `prefetch` batches and the one in use, and what every shard but the first has leased from the
        limiter, a write and a batch.
        """
        if self.replay.error_buffer is not None:
            return self.replay.error_buffer
        leases = self.replay.shards - 1
        write = max(self.actors.rows_per_write, self.actors.batch_size or self.actors.envs)
        inserts = write * (self.actors.count + leases)
        samples = self.learners.batch_size * (1 + self.replay.prefetch + leases)
        return max(100, 2 * math.ceil((inserts + samples / self.samples_per_insert) / 2))

    @model_validator(mode="after")
    def _combinations(self) -> RunConfig:
        conflicts = list(self._conflicts())
        if conflicts:
            raise ValueError("\n".join(conflicts))
        return self

    def _conflicts(self) -> Iterator[str]:
        """One line for each combination of settings, each legal by itself, that cannot run."""
        actors, replay, learners, stop = self.actors, self.replay, self.learners, self.stop
        if actors.batch_size is not None and actors.batch_size > actors.envs:
            yield f"actors.batch_size ({actors.batch_size}) must not exceed actors.envs ({actors.envs})"
        if self.mode == "sync" and actors.batch_size not in (None, actors.envs):
            yield (
                "actors.batch_size below actors.envs steps in completion order, which mode sync (lock step) rules out; "
                "leave it unset"
            )
        if self.mode == "sync" and self.address is not None:
            yield "address names a Ray cluster, and mode sync runs without Ray; drop one of the two"

        lanes_per_shard = math.ceil(self.lanes / replay.shards)
        capacity = 2 * lanes_per_shard * replay.segment_steps * replay.shards
        if replay.capacity < capacity:
            yield (
                f"replay.capacity ({replay.capacity}) is too small: {self.lanes} lanes (actors.count × actors.envs) need "
                f"two segments of replay.segment_steps ({replay.segment_steps}) each, {capacity} steps; raise the "
                f"capacity or lower replay.segment_steps"
            )
        if replay.min_size > replay.capacity // 2:
            yield f"replay.min_size ({replay.min_size}) must not exceed half of replay.capacity ({replay.capacity})"
        if self.algorithm.n_step >= replay.segment_steps:
            yield (
                f"algorithm.n_step ({self.algorithm.n_step}) must be below "
                f"replay.segment_steps ({replay.segment_steps})"
            )

        if (replay.tls_certificate is None) != (replay.tls_key is None):
            given, missing = ("certificate", "key") if replay.tls_key is None else ("key", "certificate")
            yield f"replay.tls_{given} is set and replay.tls_{missing} is not; set both, or neither to go without TLS"
        elif replay.tls_authority is not None and replay.tls_certificate is None:
            yield "replay.tls_authority is set and the shards serve without TLS; set replay.tls_certificate and replay.tls_key"

        if self.mode == "cluster" and learners.device.startswith("cuda") and learners.gpus == 0:
            yield "learners.device names a GPU and learners.gpus is 0: Ray would hide every GPU; leave learners.gpus unset"

        if stop.mean_return is not None and self.eval.every == 0:
            yield "stop.mean_return is measured by evaluations, and eval.every is 0; set eval.every"
        if stop.steps is None and stop.wall_s is None and stop.mean_return is None:
            yield "one of stop.steps, stop.wall_s and stop.mean_return must be set"
