"""How the parts of a language-model run are made from its settings: the same for the one-process mode and for Ray."""

from __future__ import annotations

import importlib.util
import random
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from actors.assignments import Assignment
from actors.llm.tasks import Task, make_tasks
from actors.task_set import TaskSet
from cluster.checkpoint import load_tensors, save_tensors
from cluster.curriculum.filter import GroupFilter
from cluster.llm.desk import PromptDesk
from configs.llm import LlmConfig
from learners.llm.rows import SCHEMA, TABLE
from replay.queue_spec import QueueSpec

if TYPE_CHECKING:
    from torch import Tensor

    from actors.llm.engine import Engine
    from actors.llm.evaluate import Evaluator
    from actors.llm.rollout import GroupRollout, GroupWriter
    from actors.llm.verifiers.pool import VerifierPool
    from learners.distributed import Group
    from learners.llm.learner import PolicyGradient
    from learners.llm.loop import LlmLoop
    from learners.llm.models import Model
    from replay.queue_sampler import QueueSampler
    from replay.queue_writers import Connect
    from replay.queues import Queue

FIRST_VERSION = 1  # 0 stands for no weights yet
_TOKEN_BYTES = 16  # of the queue for a token: its number, its log-probability, the share kept of it, its version
_ROW_BYTES = 200  # for everything else of a completion, about
_GROUP_BYTES = 384  # that a queue counts for each delivery of a group
_ROLES = ("tasks", "model", "learner", "desk", "warm_start", "teacher")


def seed_of(config: LlmConfig, role: str, index: int = 0, incarnation: int = 0) -> int:
    """An independent seed for one use in a run."""
    sequence = np.random.SeedSequence([config.seed, 7, _ROLES.index(role), index, incarnation])
    return int(sequence.generate_state(1)[0])


def check(config: LlmConfig) -> list[str]:
    """Look for what would keep the run from starting. Returns lines worth saying at the start.

    Raises:
        ValueError: a package, a file or a device is missing, prompts or model cannot be used, a verifier or another function or
            class of the user cannot be imported, or a shard cannot hold what a learner step needs.
    """
    missing = [name for name in ("transformers", *(["peft"] if config.model.lora_rank else [])) if not _is_there(name)]
    if missing:
        raise ValueError(f"language models need {' and '.join(missing)}: pip install 'millrace[llm]'")
    folder = None if config.model.path is None else Path(config.model.path)
    if folder is not None and folder.is_dir() and not any(folder.glob("*.safetensors")):
        raise ValueError(f"model.path: {folder} holds no *.safetensors")
    if config.mode == "sync":
        _check_device("learners.device", config.learners.device)
        _check_device("actors.device", config.actors.device)
    elif config.actors.device.startswith("cuda") and not config.actors.gpus:
        raise ValueError(
            f"actors.gpus: expected a share of a GPU for each actor, as actors.device is {config.actors.device}, received 0: Ray "
            "hides every GPU then; set actors.gpus, or actors.device to cpu"
        )
    train, held_out = tasks_of(config)
    lines = [
        f"{len(train)} prompts to train on and {len(held_out)} held out, of the families {', '.join(train.families)}",
        group_filter(config).text,
    ]
    _check_own(config)
    _check_verifiers({task.verifier for tasks in (train, held_out) for task in tasks})
    lines += _check_capacity(config, max(len(task.prompt) for task in train))
    unknown = set(config.eval.families) - set(held_out.families)
    if unknown and config.eval.every:
        raise ValueError(
            f"eval.families: expected families of the held-out prompts, {', '.join(held_out.families)}; received "
            f"{', '.join(sorted(unknown))}"
        )
    return lines


def _check_own(config: LlmConfig) -> None:
    """Import what is the user's own, so that nothing is trained before it is found missing; ModuleError is a ValueError."""
    from learners.classes import load_class, load_function

    algorithm, engine = config.algorithm, config.sampling.engine
    if ":" in algorithm.advantage:
        load_function(algorithm.advantage, "algorithm.advantage", ("reward", "group", "passed"))
    if ":" in algorithm.loss:
        load_function(algorithm.loss, "algorithm.loss", ("tokens",))
    if ":" in engine:
        from actors.llm.engine import Engine

        demanded = [name for name in vars(Engine) if not name.startswith("_")]
        load_class(engine, "sampling.engine", methods=demanded)


def _check_verifiers(names: Collection[str]) -> None:
    from actors.llm.verifiers.verdict import load_verifier

    for name in sorted(names):
        try:
            load_verifier(name)
        except Exception as error:  # importing runs the user's code: anything may come
            raise ValueError(
                f"tasks.verifier: {error}; correct the name, or start where its module can be imported (now {Path.cwd()})"
            ) from error


def _check_capacity(config: LlmConfig, prompt: int) -> list[str]:
    """Refuse shards that could not hold one batch if all its completions had the most tokens. Returns what else may not fit.

    prompt: characters of the longest; tokens are seldom more.
    """
    spec, shards, size = queue_spec(config), config.replay.shards, config.sampling.group_size
    row = _TOKEN_BYTES * config.sampling.max_tokens + 4 * prompt + _ROW_BYTES
    group = size * row + _GROUP_BYTES * spec.times_sampled
    groups = -(-config.learners.batch_groups // min(shards, config.actors.count))  # of a batch, in one shard
    # A group is one message, which may be as large as a quarter of the capacity.
    wanted = max(groups, 4) * group
    if wanted > spec.capacity_bytes:
        raise ValueError(
            f"replay.capacity_mb: expected at least {-(-wanted * shards >> 20)}, received {config.replay.capacity_mb}: a learner "
            f"step uses {config.batch_rows} completions of up to sampling.max_tokens ({config.sampling.max_tokens}) tokens, about "
            f"{row} bytes each with their prompts, and a shard holds its part of them, and four groups at least; raise it, or "
            "lower learners.batch_groups, sampling.group_size or sampling.max_tokens"
        )
    if group <= spec.message_bytes:
        return []
    return [
        f"a group of {size} completions of {config.sampling.max_tokens} tokens would have {group} bytes, more than the "
        f"{spec.message_bytes} that the queue takes at once, and end the run; lower sampling.group_size or sampling.max_tokens if "
        "completions come to be so long"
    ]


def _is_there(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def _check_device(setting: str, device: str) -> None:
    if device.startswith("cuda"):
        import torch

        if not torch.cuda.is_available():
            raise ValueError(f"{setting}: expected a device that torch finds here, received {device}; set it to cpu")


@lru_cache(maxsize=2)
def _tasks(settings: str, seed: int, held_out: int) -> tuple[TaskSet[Task], TaskSet[Task]]:
    from configs.llm import TasksSettings

    return make_tasks(TasksSettings.model_validate_json(settings), seed=seed, held_out=held_out)


def tasks_of(config: LlmConfig) -> tuple[TaskSet[Task], TaskSet[Task]]:
    """The prompts to train on, and the held-out ones."""
    return _tasks(config.tasks.model_dump_json(), seed_of(config, "tasks"), config.eval.prompts)


def group_filter(config: LlmConfig) -> GroupFilter:
    """Which groups are worth learning from."""
    settings = config.curriculum
    low, high = (settings.low, settings.high) if settings.filter == "band" else (0.0, 1.0)
    return GroupFilter(low, high, config.sampling.group_size)


def make_desk(config: LlmConfig) -> PromptDesk:
    """The head's desk, with an empty record."""
    return PromptDesk(config, tasks_of(config)[0], seed=seed_of(config, "desk"))


def queue_spec(config: LlmConfig) -> QueueSpec:
    """Settings of each shard's part of the queue table. In mode sync nothing may block: the loop itself keeps the pace."""
    settings, sync = config.replay, config.mode == "sync"
    return QueueSpec(
        name=TABLE,
        schema=SCHEMA,
        capacity_bytes=(settings.capacity_mb << 20) // settings.shards,
        times_sampled=settings.times_used,
        max_policy_lag=settings.max_policy_lag,
        max_waiting_groups=None if sync else -(-config.waiting_groups // settings.shards),
    )


def device_of(name: str) -> str:
    """The torch device that a setting means."""
    import torch

    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name


def make_model(config: LlmConfig, *, device: str, precision: str = "float32") -> Model:
    """The language model with its first weights."""
    import torch

    from learners.llm.models import make_model

    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    return make_model(config.model, seed=seed_of(config, "model"), device=device_of(device), dtype=dtype)


def make_sampling_model(config: LlmConfig, *, gpus: float | None = None) -> Model:
    """The model that actors sample with: without low-rank additions, which its weights come merged with.

    gpus: that Ray has set aside for the process; None without Ray.
    """
    plain = config.model_copy(update={"model": config.model.model_copy(update={"lora_rank": None})})
    return make_model(plain, device="cpu" if gpus == 0.0 else config.actors.device, precision=config.actors.precision)


def make_engine(config: LlmConfig, model: Model, *, slots: int) -> Engine:
    """What samples; its weights are still to be loaded. The tokenizer's end token and all that the model lists end a completion."""
    from actors.llm.engine import make_engine

    # Chat models list several: the end of a turn and the end of all text.
    listed = getattr(getattr(model.network, "generation_config", None), "eos_token_id", None)
    others = listed if isinstance(listed, list | tuple) else [] if listed is None else [listed]
    ends = sorted({model.tokenizer.end, *map(int, others)})
    return make_engine(config.sampling, model.network, end=ends, slots=slots)


def make_verifiers(config: LlmConfig) -> VerifierPool:
    """Processes that judge completions."""
    from actors.llm.verifiers.pool import VerifierPool

    settings = config.tasks
    return VerifierPool(
        processes=settings.processes,
        timeout_s=settings.timeout_s,
        memory_mb=settings.memory_mb,
        retries=settings.retries,
    )


def make_rollout(
    config: LlmConfig, model: Model, writer: GroupWriter, *, ask: Callable[[int], Sequence[Assignment[Task]]]
) -> GroupRollout:
    """An actor: its engine, its verifiers, and the writer to its shard."""
    from actors.llm.rollout import GroupRollout

    return GroupRollout(
        make_engine(config, model, slots=config.actors.slots),
        model.tokenizer,
        make_verifiers(config),
        writer,
        ask=ask,
        judge=group_filter(config).verdict,
        group_size=config.sampling.group_size,
        slots=config.actors.slots,
        prompts_ahead=config.actors.prompts_ahead,
        seed=config.seed,
        # Under Ray the head holds them back: an actor does not see every version.
        hold_back=config.actors.hold_back if config.mode == "sync" else 0,
        lock_step=config.mode == "sync",
    )


def make_evaluator(config: LlmConfig, model: Model) -> Evaluator:
    """Evaluates policies on the held-out prompts."""
    from actors.llm.evaluate import Evaluator

    settings = config.eval
    return Evaluator(
        make_engine(config, model, slots=config.actors.slots),
        model.tokenizer,
        make_verifiers(config),
        tasks_of(config)[1],
        samples=settings.samples,
        temperature=settings.temperature,
        seed=settings.seed,
    )


def make_learner(config: LlmConfig, model: Model, *, group: Group | None = None) -> PolicyGradient:
    """The learner, for its part of each batch; the divergence from the reference is that from the model as it is now."""
    from learners.llm.learner import make_learner
    from learners.staging import Share

    share = Share() if group is None else Share(group.rank, group.count, group.mean_)
    return make_learner(config, model, share=share)


def warm_start(config: LlmConfig, model: Model, tell: Callable[[str], None]) -> None:
    """The supervised phase that comes before reinforcement, where one is wanted."""
    if not config.warm_start.steps:
        return
    from learners.llm.warm_start import warm_start

    warm_start(model, examples(config), config.warm_start, max_tokens=config.sampling.max_tokens, tell=tell)


def examples(config: LlmConfig) -> Iterator[tuple[str, str]]:
    """Prompts to train on with their solutions, without end, each once in a round."""
    families = config.warm_start.families
    solved = [t for t in tasks_of(config)[0] if t.solution is not None and (not families or t.family in families)]
    if not solved:
        of = f" of the families {', '.join(families)}" if families else ""
        raise ValueError(
            f"warm_start.steps needs prompts{of} with a solution, and none has one; set warm_start.steps to 0"
        )
    order = random.Random(seed_of(config, "warm_start"))
    while True:
        for task in order.sample(solved, len(solved)):
            assert task.solution is not None
            yield task.prompt, task.solution


def share_weights(model: Model, group: Group) -> None:
    """Make the weights of all learners those of learner 0; all of them call it."""
    import torch

    own = dict(model.network.named_parameters())
    with torch.no_grad():
        for name, tensor in group.broadcast({name: p.detach() for name, p in own.items()}).items():
            own[name].copy_(tensor)


def make_sampler(config: LlmConfig, addresses: Sequence[str], *, name: str, connect: Connect) -> QueueSampler:
    """A learner's batches, of its part of the groups, from all shards; `name` tells the learner from every other one alive."""
    from replay.queue_readers import QueueReader
    from replay.queue_sampler import QueueSampler

    groups, count = config.learners.batch_groups // config.learners.count, len(addresses)
    readers = [
        QueueReader(
            address,
            SCHEMA,
            table=TABLE,
            groups=-(-groups // count),
            partial=count > 1,
            prefetch=1,
            name=name,
            connect=connect,
        )
        for address in addresses
    ]
    return QueueSampler(readers, groups=groups)


def make_loop(
    config: LlmConfig,
    learner: PolicyGradient,
    sampler: QueueSampler,
    *,
    publish: Callable[[int, bytes], None] | None,
    version: int,
    group: Group | None = None,
) -> LlmLoop:
    """The loop that drives the learner; arguments as `LlmLoop`'s."""
    from learners.llm.loop import LlmLoop

    return LlmLoop(
        learner,
        sampler,
        publish=publish,
        publish_every=config.learners.publish_every,
        version=version,
        most_updates=config.stop.updates,
        group=group,
    )


def save_learner(
    path: Path, learner: PolicyGradient, *, version: int, state: Mapping[str, Tensor] | None = None
) -> int:
    """Write everything the learner needs to go on: its `state`, None for that of this moment. Returns the learner steps made.

    Raises:
        FloatingPointError: a loss or a parameter is not finite; nothing is written.
    """
    learner.check_finite()
    found = learner.state() if state is None else state
    arrays = {name: (t.float() if t.is_floating_point() else t).numpy() for name, t in found.items()}
    updates = int(found["updates"])
    save_tensors(path, arrays, {"updates": updates, "version": version})
    return updates


def load_learner(path: Path, learner: PolicyGradient) -> int:
    """Go on where `save_learner` was called. Returns the policy version then."""
    import torch

    arrays, metadata = load_tensors(path)
    learner.load_state({name: torch.from_numpy(np.array(array)) for name, array in arrays.items()})
    return int(metadata["version"])


def learner_status(loop: LlmLoop) -> dict[str, Any]:
    """Counters, metrics and what the learner waits for."""
    return {**loop.stats(), "metrics": loop.metrics(), "waiting_for": loop.waiting_for}


def save_shard(queue: Queue, replay: Path, *, index: int) -> dict[str, int]:
    """Write a shard's part of a checkpoint into the folder `replay`. Returns the counters it holds."""
    from replay.queue_snapshot import save_queue

    return save_queue(queue, replay, shard=index)


def restore_shard(queue: Queue, replay: Path, *, index: int, count: int) -> None:
    """Fill an empty queue with its part, of `count`, of what a checkpoint keeps; nothing where it keeps none."""
    from replay.queue_snapshot import queue_files, restore_queue

    if files := queue_files(replay, TABLE):
        restore_queue(queue, files, index=index, count=count)


def reader_name(rank: int, incarnation: int) -> str:
    """Name under which a learner reads; the one that replaces it has another."""
    return f"learner-{rank}-{incarnation}"


def writer_name(index: int, incarnation: int) -> str:
    """Name under which an actor writes; the one that replaces it has another."""
    return f"actor-{index}-{incarnation}"


def actor_status(rollout: GroupRollout, waiting_for: str | None) -> dict[str, Any]:
    """Counters of an actor, what it waits for, and why the last completion that nobody could judge was not judged."""
    more = {"version": rollout.version, "waiting_for": waiting_for, "unscored_reason": rollout.unscored_reason}
    return {**rollout.stats(), **more}
