"""The typed settings of a run that trains a language model by verifiable rewards.

Actors sample groups of completions for prompts and have them verified; whole groups go through a queue table of the replay
service to the learners, each used once; new weights reach the actors while they sample.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field, model_validator

from configs.conflicts import service_conflicts
from configs.curriculum import CurriculumSettings
from configs.policy_gradient import PolicyGradientSettings
from configs.schema import CommonSettings, LearnerProcessSettings, Scalar, ServiceSettings
from configs.settings import CLASS, Settings, setting

Family = Annotated[str, Field(min_length=1)]
Attempts = Annotated[int, Field(ge=1, le=1_000_000)]


class ModelSettings(Settings):
    """The language model that is trained."""

    path: str | None = setting(
        None,
        "Folder of a Hugging Face causal language model (safetensors, tokenizer), or its name on the hub; None takes the "
        "embedded model: small, Llama-shaped, over characters, with random weights.",
        unit="path",
        min_length=1,
    )
    layers: int = setting(2, "Layers of the embedded model.", unit="layers", ge=1, le=1024)
    width: int = setting(64, "Width of the embedded model's residual stream.", unit="units", ge=8, le=65_536)
    heads: int = setting(
        4, "Attention heads of the embedded model; they divide the width.", unit="heads", ge=1, le=1024
    )
    inner: int = setting(172, "Width of the embedded model's feed-forward layers.", unit="units", ge=8, le=262_144)
    lora_rank: int | None = setting(
        None,
        "Train low-rank additions of this rank to all linear layers instead of all weights (Hu et al. 2021, LoRA, arXiv "
        "2106.09685); needs the package peft.",
        unit="rank",
        ge=1,
        le=4096,
    )
    lora_alpha: float = setting(
        16.0, "The low-rank additions are scaled by alpha / rank.", unit="factor", gt=0.0, le=1e6
    )


class WarmStartSettings(Settings):
    """A short supervised phase on generated examples before reinforcement; an embedded model knows nothing without it."""

    steps: int = setting(200, "Steps of supervised training; 0 leaves it out.", unit="steps", ge=0, le=10**7)
    batch_size: int = setting(256, "Examples in one step.", unit="examples", ge=1, le=1_048_576)
    learning_rate: float = setting(1e-3, "Step size of Adam.", unit="step size", gt=0.0, le=1.0)
    families: tuple[Family, ...] = setting(
        (), "Families of prompts that the examples are of; empty takes all.", unit="name", max_length=256
    )


class TasksSettings(Settings):
    """Prompts, and how completions are judged."""

    source: str = setting(
        "countdown",
        "countdown or arithmetic generate prompts; package.module:function is a generator of your own; anything else is a "
        "file of prompts, .jsonl or .parquet.",
        unit="name",
        min_length=1,
        names=("countdown", "arithmetic"),
    )
    kwargs: dict[str, Scalar] = setting({}, "Arguments passed on to the generator.", unit="name value")
    count: int = setting(
        20_000,
        "Prompts generated for training; of a file, the most that are read.",
        unit="prompts",
        ge=1,
        le=10**9,
    )
    verifier: str = setting(
        "auto",
        "How a completion is judged: countdown, arithmetic, math (LaTeX answers by math-verify), regex, tests (unit tests in a "
        "sandbox) or package.module:function; auto takes the generator's own, or what each prompt of a file names.",
        unit="name",
        pattern=rf"^(auto|countdown|arithmetic|math|regex|tests|{CLASS})$",
        allowed="auto, countdown, arithmetic, math, regex, tests or package.module:function",
        names=("auto", "countdown", "arithmetic", "math", "regex", "tests"),
    )
    labelled: str | None = setting(
        None,
        "File of labelled completions (.jsonl: completion, data, passed) on which the verifier is audited when a run starts; None "
        "takes generated ones for the built-in verifiers.",
        unit="path",
        min_length=1,
    )
    processes: int = setting(1, "Verifier processes of each actor.", unit="processes", ge=1, le=1024)
    timeout_s: float = setting(
        5.0,
        "Time a verifier may take for one completion; beside it unit tests have a limit of CPU time, cpu_s in a task's data.",
        unit="seconds",
        gt=0.0,
        le=3600.0,
    )
    memory_mb: int = setting(
        1024, "Memory that a verifier process may allocate beside what it starts with.", unit="MB", ge=16, le=10**6
    )
    retries: int = setting(
        1,
        "Times that a completion is judged again after its verifier raised or ran out of time, before it is dropped.",
        unit="times",
        ge=0,
        le=100,
    )


class SamplingSettings(Settings):
    """How completions are sampled."""

    group_size: int = setting(16, "Completions of one prompt, G.", unit="completions", ge=1, le=4096)
    max_tokens: int = setting(24, "Most tokens of a completion.", unit="tokens", ge=1, le=1_048_576)
    temperature: float = setting(1.0, "Temperature of the distribution.", unit="temperature", gt=0.0, le=100.0)
    top_k: int | None = setting(
        None, "Sample among the most probable tokens only; None among all.", unit="tokens", ge=1, le=10**6
    )
    top_p: float = setting(
        1.0,
        "Sample among the most probable tokens whose probabilities add up to this (Holtzman et al. 2020).",
        unit="probability",
        gt=0.0,
        le=1.0,
    )
    swap: Literal["between_steps", "finish"] = setting(
        "between_steps",
        "New weights are taken between two decode steps, and running completions go on with them; or once all running ones "
        "have finished.",
        unit="choice",
    )
    cache: Literal["keep", "recompute"] = setting(
        "keep",
        "Keys and values of running completions when new weights are taken: kept from the old ones, or computed again.",
        unit="choice",
    )
    engine: str = setting(
        "transformers",
        "What samples: transformers, with continuous batching, or package.module:Class of your own.",
        unit="name",
        pattern=rf"^(transformers|{CLASS})$",
        allowed="transformers or package.module:Class",
        names=("transformers",),
    )


class SamplersSettings(Settings):
    """Processes that sample completions, have them verified, and write groups to the replay service."""

    count: int = setting(1, "Number of actor processes.", unit="processes", ge=1, le=100_000)
    slots: int = setting(256, "Completions that each actor decodes at once.", unit="completions", ge=1, le=65_536)
    threads: int = setting(1, "Torch threads of each actor.", unit="threads", ge=1, le=1024)
    device: str = setting(
        "auto",
        "Torch device of the actors; auto takes CUDA where each can have a GPU of its own.",
        unit="device",
        pattern=r"^(auto|cpu|cuda(:\d+)?)$",
        allowed="auto, cpu, cuda or cuda:<index>",
    )
    precision: Literal["float32", "bfloat16"] = setting(
        "float32", "Type of the weights that actors sample with.", unit="choice"
    )
    prompts_ahead: int = setting(
        8, "Groups that an actor has asked the head for ahead of need.", unit="groups", ge=1, le=100_000
    )
    hold_back: int = setting(
        0,
        "Versions by which actors keep behind the newest weights on purpose, to study how learning takes stale data.",
        unit="versions",
        ge=0,
        le=10_000,
    )
    poll_policy_s: float = setting(
        0.02, "Pause between two requests for newer weights.", unit="seconds", gt=0.0, le=60.0
    )
    cpus: float = setting(1.0, "CPUs that Ray sets aside for each actor.", unit="CPUs", ge=0.0, le=1024.0)
    resources: dict[str, float] = setting(
        {},
        "Ray's custom resources that each actor takes, such as spot=1: only nodes that have them are used.",
        unit="name amount",
    )
    gpus: float = setting(0.0, "GPUs that Ray sets aside for each actor.", unit="GPUs", ge=0.0, le=64.0)


class QueueSettings(ServiceSettings):
    """The replay service: shards that keep whole groups until the learners have used them."""

    max_waiting_groups: int | None = setting(
        None,
        "Groups that wait for the learners, over all shards, before actors are held back; None takes twice what one learner "
        "step uses.",
        unit="groups",
        ge=1,
        le=10**9,
    )
    max_policy_lag: int = setting(
        16,
        "Policy versions by which the oldest token of a group may be behind the learner's; older groups are dropped and "
        "counted.",
        unit="versions",
        ge=0,
        le=10**9,
    )
    times_used: int = setting(1, "Learner steps that a group is used in.", unit="times", ge=1, le=1000)
    capacity_mb: int = setting(256, "Memory of the groups, over all shards.", unit="MB", ge=1, le=10**8)


class LlmLearnersSettings(LearnerProcessSettings):
    """The processes that take batches of groups, update the model and publish its weights."""

    count: int = setting(
        1, "Learner processes; each takes an equal part of every batch.", unit="processes", ge=1, le=1024
    )
    batch_groups: int = setting(32, "Groups in one learner step, over all learners.", unit="groups", ge=1, le=2048)
    minibatches: int = setting(1, "Updates that a batch is divided into.", unit="updates", ge=1, le=1024)
    micro_tokens: int = setting(
        4_096, "Tokens, prompts and padding included, in one forward and backward pass.", unit="tokens", ge=1, le=10**8
    )
    learning_rate: float = setting(3e-4, "Step size of Adam.", unit="step size", gt=0.0, le=1.0)
    warm_up: int = setting(0, "Updates over which the step size rises from 0.", unit="updates", ge=0, le=10**9)
    weight_decay: float = setting(0.0, "Decoupled weight decay (AdamW).", unit="per update", ge=0.0, le=10.0)
    max_gradient_norm: float = setting(
        1.0, "Largest norm of the gradient; above it is scaled down.", unit="norm", gt=0.0, le=1e9
    )
    publish_every: int = setting(
        1, "Learner steps between two publications of weights.", unit="learner steps", ge=1, le=10**6
    )
    precision: Literal["float32", "bfloat16"] = setting(
        "float32", "Arithmetic of forward and backward passes; weights and optimiser stay float32.", unit="choice"
    )
    activation_checkpointing: bool = setting(
        False, "Compute the activations of each layer again in the backward pass, to save memory.", unit="switch"
    )
    shard_parameters: bool = setting(
        False,
        "Divide weights, gradients and optimiser among the learners (FSDP2) instead of keeping them whole on each.",
        unit="switch",
    )
    gap_warning: float = setting(
        0.05,
        "Warn when the mean difference per token between the log-probabilities of actor and learner at the same weights is "
        "above this: the first sign of weights that did not arrive whole.",
        unit="nats",
        gt=0.0,
        le=100.0,
    )


class LlmEvalSettings(Settings):
    """Evaluation while training, on prompts that are never trained on."""

    every: int = setting(
        20, "Learner steps between two evaluations; 0 turns evaluation off.", unit="learner steps", ge=0, le=10**9
    )
    prompts: int = setting(256, "Held-out prompts.", unit="prompts", ge=1, le=10**6)
    samples: int = setting(8, "Completions sampled for each of them.", unit="completions", ge=1, le=4096)
    attempts: tuple[Attempts, ...] = setting(
        (1, 8), "The k of pass@k, each at most `samples`.", unit="completions", min_length=1, max_length=16
    )
    families: tuple[Family, ...] = setting(
        (),
        'Families of prompts, such as "3 numbers", that the reported means are over; empty takes all. Each family is reported '
        "by itself besides.",
        unit="name",
        max_length=256,
    )
    temperature: float = setting(
        1.0,
        "Temperature of those completions; one greedy completion is taken beside them.",
        unit="temperature",
        gt=0.0,
        le=100.0,
    )
    seed: int = setting(
        1_000_003,
        "Seed of the held-out prompts' completions; the same at every evaluation.",
        unit="seed",
        ge=0,
        le=2**31 - 1,
    )


class LlmStopSettings(Settings):
    """When training ends: at the first of these that is met."""

    updates: int | None = setting(1_000, "Learner steps.", unit="learner steps", ge=1, le=10**12)
    samples: int | None = setting(None, "Completions sampled, over all actors.", unit="completions", ge=1, le=10**14)
    wall_s: float | None = setting(None, "Wall time since the first completion.", unit="seconds", gt=0.0, le=10**9)
    pass_at_1: float | None = setting(
        None, "pass@1 of one evaluation that counts as solved.", unit="pass rate", gt=0.0, le=1.0
    )


class LlmConfig(CommonSettings):
    """Everything that decides a run that trains a language model."""

    kind: Literal["llm"] = setting("llm", "What is trained: a language model.", unit="choice")
    model: ModelSettings = ModelSettings()
    warm_start: WarmStartSettings = WarmStartSettings()
    tasks: TasksSettings = TasksSettings()
    curriculum: CurriculumSettings = CurriculumSettings()
    sampling: SamplingSettings = SamplingSettings()
    actors: SamplersSettings = SamplersSettings()
    replay: QueueSettings = QueueSettings()
    algorithm: PolicyGradientSettings = PolicyGradientSettings()
    learners: LlmLearnersSettings = LlmLearnersSettings()
    eval: LlmEvalSettings = LlmEvalSettings()
    stop: LlmStopSettings = LlmStopSettings()

    @property
    def batch_rows(self) -> int:
        """Completions in one learner step, over all learners."""
        return self.learners.batch_groups * self.sampling.group_size

    @property
    def waiting_groups(self) -> int:
        """Groups that may wait for the learners, over all shards."""
        return self.replay.max_waiting_groups or 2 * self.learners.batch_groups

    @model_validator(mode="after")
    def _combinations(self) -> LlmConfig:
        if found := list(conflicts(self)):
            raise ValueError("\n".join(found))
        return self


def conflicts(config: LlmConfig) -> Iterator[str]:
    """One line for each combination of settings, each legal by itself, that cannot run."""
    model, curriculum, sampling, algorithm = config.model, config.curriculum, config.sampling, config.algorithm
    learners, replay, evaluation, stop = config.learners, config.replay, config.eval, config.stop
    if model.path is None and model.width % (2 * model.heads):
        yield f"model.width ({model.width}) must be a multiple of twice model.heads ({model.heads})"
    if model.path is not None and config.warm_start.steps:
        yield (
            "warm_start.steps trains the embedded model from nothing, and model.path names one that is trained; set "
            "warm_start.steps to 0"
        )
    yield from curriculum.conflicts(group_size=sampling.group_size)
    if curriculum.draw == "level_replay":
        yield (
            "curriculum.draw level_replay needs value losses, and language models have none; use band or learning_progress"
        )
    yield from algorithm.conflicts(group_size=sampling.group_size, max_tokens=sampling.max_tokens)
    if learners.shard_parameters and learners.count == 1:
        yield "learners.shard_parameters divides the weights among several learners, and learners.count is 1; leave it off"
    if learners.batch_groups % learners.count:
        yield (
            f"learners.batch_groups ({learners.batch_groups}) must be a multiple of learners.count ({learners.count}): each "
            "learner takes an equal part"
        )
    elif (learners.batch_groups // learners.count) % learners.minibatches:
        yield (
            f"learners.minibatches ({learners.minibatches}) must divide the groups of each learner "
            f"({learners.batch_groups // learners.count})"
        )
    if config.waiting_groups < learners.batch_groups:
        yield (
            f"replay.max_waiting_groups ({config.waiting_groups}) must be at least learners.batch_groups "
            f"({learners.batch_groups}), or no batch is ever full"
        )
    if config.waiting_groups < replay.shards:
        yield f"replay.max_waiting_groups ({config.waiting_groups}) must be at least replay.shards ({replay.shards})"
    if config.mode == "sync":
        for name, count in (
            ("actors.count", config.actors.count),
            ("learners.count", learners.count),
            ("replay.shards", replay.shards),
        ):
            if count > 1:
                yield f"{name} ({count}) must be 1 in mode sync, which is one process"
        if config.address is not None:
            yield "address names a Ray cluster, and mode sync runs without Ray; drop one of the two"
    if config.mode == "cluster" and learners.device.startswith("cuda") and learners.gpus == 0:
        yield "learners.device names a GPU and learners.gpus is 0: Ray would hide every GPU; leave learners.gpus unset"
    if config.actors.hold_back > replay.max_policy_lag:
        yield (
            f"actors.hold_back ({config.actors.hold_back}) must not exceed replay.max_policy_lag ({replay.max_policy_lag}), or "
            "every group is dropped"
        )
    yield from service_conflicts(replay)
    if any(k > evaluation.samples for k in evaluation.attempts):
        yield f"eval.attempts must not exceed eval.samples ({evaluation.samples}): pass@k needs k completions"
    if stop.pass_at_1 is not None and evaluation.every == 0:
        yield "stop.pass_at_1 is measured by evaluations, and eval.every is 0; set eval.every"
    if stop.updates is None and stop.samples is None and stop.wall_s is None and stop.pass_at_1 is None:
        yield "one of stop.updates, stop.samples, stop.wall_s and stop.pass_at_1 must be set"
