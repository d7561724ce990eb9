"""What the learner benchmark measures, by name, and what is to be reached."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any, Literal

import numpy as np

from replay.buffers import buffers
from replay.schema import Field, StepSchema, Window, WindowBatch

Data = Literal["continuous", "discrete", "frames"]

OBSERVATION_DIM, ACTION_DIM = 17, 6  # HalfCheetah
SCHEMAS: dict[Data, StepSchema] = {
    "continuous": StepSchema(
        {"observation": Field("observation", "float32", (OBSERVATION_DIM,))}, Field("action", "float32", (ACTION_DIM,))
    ),
    # LunarLander, and Atari's grey frames with the actions of Pong.
    "discrete": StepSchema({"observation": Field("observation", "float32", (8,))}, Field("action", "int64", choices=4)),
    "frames": StepSchema({"observation": Field("observation", "uint8", (84, 84))}, Field("action", "int64", choices=6)),
}


@dataclass(frozen=True)
class Case:
    """One line of the benchmark: settings of a run, laid over the defaults. Cases of a group are measured side by side."""

    name: str
    group: str
    settings: tuple[str, ...]
    data: Data = "continuous"

    @property
    def dtype(self) -> str:
        return "bfloat16" if "--learners.precision=bfloat16" in self.settings else "float32"


BFLOAT16, COMPILE, NO_GRAPHS = "--learners.precision=bfloat16", "--learners.compile=true", "--learners.graphs=false"
CALLS_OF_8 = "--learners.updates_per_call=8"


def cases(device: str) -> list[Case]:
    """Every case on a device, cpu or cuda; those of a group one after another."""
    return [*_speed(device), *_heads(), *_chains(), *_options(), *_chunks(), *_batches(device), *_discrete()]


def _speed(device: str) -> Iterator[Case]:
    """The SAC update, in every way it can be run."""
    ways: dict[str, tuple[str, ...]] = {
        "": (),
        "/bfloat16": (BFLOAT16,),
        "/compile": (COMPILE,),
        "/bfloat16/compile": (BFLOAT16, COMPILE),
        "/calls of 8": (CALLS_OF_8,),
    }
    if device == "cuda":
        ways |= {"/no graphs": (NO_GRAPHS,), "/bfloat16/no graphs": (BFLOAT16, NO_GRAPHS)}
    for suffix, settings in ways.items():
        yield Case(f"sac/256{suffix}", "sac", settings)


def _heads() -> Iterator[Case]:
    """Each value head on a support that is fixed, so that bins are as many as the case says."""
    support = ("--algorithm.head.low=-10", "--algorithm.head.high=10")
    yield Case("sac/256/mse", "heads", ())
    for kind, bins in (("hl_gauss", 51), ("hl_gauss", 101), ("two_hot", 101), ("c51", 51), ("c51", 101)):
        settings = (f"--algorithm.head.kind={kind}", f"--algorithm.head.bins={bins}", *support)
        yield Case(f"sac/256/{kind}/{bins} bins", "heads", settings)


def _chains() -> Iterator[Case]:
    """Iterated Q, with the two values that the policy can climb."""
    four = "--algorithm.chain.length=4"
    yield Case("sac/256/K=1", "chains", ())
    yield Case("sac/256/K=4/mean", "chains", (four,))
    yield Case("sac/256/K=4/one", "chains", (four, "--algorithm.chain.policy_value=one"))


def _options() -> Iterator[Case]:
    n_step = ("--algorithm.target.kind=n_step", "--algorithm.target.length=3")
    yield Case("sac/256/layer norm", "options", ("--algorithm.layer_norm=true",))
    yield Case("sac/256/3 steps", "options", n_step)
    yield Case("sac/256/10 critics", "options", ("--algorithm.ensemble=10", "--algorithm.subset=2"))
    yield Case("sac/256/normalised", "options", ("--algorithm.normalise_observations=true",))


def _chunks() -> Iterator[Case]:
    """Windows of 5 steps: chunks of as many actions, and of one by a distilled critic."""
    decoupled = ("--algorithm.target.kind=decoupled", "--algorithm.target.length=5", "--algorithm.chunk=1")
    expectile = "--algorithm.target.distill_expectile=0.8"
    chunk = ("--algorithm.target.kind=chunk", "--algorithm.target.length=5", "--algorithm.chunk=5")
    yield Case("sac/256/chunk of 5", "chunks", chunk)
    yield Case("sac/256/decoupled 5 to 1", "chunks", (*decoupled, expectile))
    yield Case("flow/256/decoupled 5 to 1", "chunks", ("--algorithm.name=flow", *decoupled, expectile))


def _batches(device: str) -> Iterator[Case]:
    for batch in (64, 1024, 8192):
        size = f"--learners.batch_size={batch}"
        yield Case(f"sac/{batch}", f"batch {batch}", (size,))
        yield Case(f"sac/{batch}/bfloat16", f"batch {batch}", (size, BFLOAT16))
        if device == "cuda":
            yield Case(f"sac/{batch}/compile", f"batch {batch}", (size, COMPILE))
            yield Case(f"sac/{batch}/bfloat16/compile", f"batch {batch}", (size, BFLOAT16, COMPILE))


def _discrete() -> Iterator[Case]:
    dqn = "--algorithm.name=dqn"
    head = ("--algorithm.head.kind=hl_gauss", "--algorithm.head.bins=51")
    support = ("--algorithm.head.low=-10", "--algorithm.head.high=10")
    yield Case("dqn/256", "dqn", (dqn,), "discrete")
    yield Case("dqn/256/dueling", "dqn", (dqn, "--algorithm.dueling=true"), "discrete")
    yield Case("dqn/256/hl_gauss/51 bins", "dqn", (dqn, *head, *support), "discrete")
    yield Case("dqn/256/K=4", "dqn", (dqn, "--algorithm.chain.length=4"), "discrete")
    yield Case("dqn/256/prioritised", "dqn", (dqn, "--replay.selector=prioritised"), "discrete")
    nature = (dqn, "--learners.batch_size=32", "--env.stack=4", "--algorithm.encoder=nature")
    frames = (*nature, "--algorithm.hidden=512")
    yield Case("dqn/32/nature", "frames", frames, "frames")
    yield Case("dqn/32/nature/bfloat16", "frames", (*frames, BFLOAT16), "frames")
    yield Case("r2d2/32", "r2d2", ("--algorithm.name=r2d2", "--learners.batch_size=32"), "discrete")


def chosen(found: Sequence[Case], pattern: str) -> list[Case]:
    """The cases whose name has `pattern`, a part of it or a pattern of wildcards."""
    return [case for case in found if fnmatch(case.name, f"*{pattern}*")]


def random_windows(schema: StepSchema, window: Window, count: int, *, seed: int) -> WindowBatch:
    """`count` whole windows of made-up steps, none of which ends an episode but one in a hundred."""
    rng = np.random.default_rng(seed)
    found = buffers(schema, window, count)

    def fill(rows: np.ndarray) -> None:
        for field in schema.fields:
            if field.name not in (rows.dtype.names or ()):
                continue
            shape = rows[field.name].shape
            if field.name == "action":
                rows["action"] = rng.integers(field.choices, size=shape) if field.choices else rng.uniform(-1, 1, shape)
            elif np.dtype(field.dtype).kind == "f":
                rows[field.name] = rng.standard_normal(shape)
            elif field.dtype == "uint8":
                rows[field.name] = rng.integers(0, 256, shape)

    fill(found.steps)
    found.length[:] = window.length
    ends = rng.random(count) < 0.01
    found.steps["is_terminal"][:, -1] = ends
    if found.ends is not None:
        fill(found.ends)
        found.ends["is_terminal"][:, 1] = ends
    if found.burn_in is not None:
        found.burn_in[:] = window.burn_in
    for frames in found.frames.values():
        frames[...] = rng.integers(0, 256, frames.shape)
    found.item[:] = np.arange(count)
    found.probability[:] = 1e-6 * rng.uniform(0.5, 2.0, count)
    found.size = 1_000_000
    return found


def judge(lines: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What is to be reached, and whether it is: of the goals whose cases were measured on one thread, or on a GPU."""
    known = {line["case"]: line for line in lines if "skipped" not in line and line["threads"] == 1}
    found: list[dict[str, Any]] = []

    def add(goal: str, value: float | None, sign: str, bound: float | None) -> None:
        if value is not None and bound is not None:
            met = value >= bound if sign == "≥" else value <= bound
            found.append({"goal": goal, "value": value, "wanted": f"{sign} {bound:.4g}", "met": met})

    def best(figure: str, *names: str) -> float | None:
        return max((known[name][figure] for name in names if name in known), default=None)

    def over(figure: str, name: str, base: str) -> float | None:
        mine, its = (known.get(case, {}).get(figure) for case in (name, base))
        return mine / its if mine and its else None

    on_gpu = any(line["device"] == "cuda" for line in known.values())
    if on_gpu:
        ways = [name for name in known if name.startswith("sac/256") and known[name]["group"] == "sac"]
        add("SAC, updates/s, the best way", best("updates_per_s", *ways), "≥", 3000.0)
    else:
        add("SAC in float32 over the plain loop", best("ratio", "sac/256", "sac/256/compile"), "≥", 2.6)
        half = ("sac/256/bfloat16", "sac/256/bfloat16/compile")
        add("SAC with bfloat16 over the plain loop", best("ratio", *half), "≥", 4.0)
    for bins, most in ((51, 1.25), (101, 1.4)):
        name = f"sac/256/hl_gauss/{bins} bins"
        add(f"time of HL-Gauss with {bins} bins over mse", over("ms_per_update", name, "sac/256/mse"), "≤", most)
    for value in ("mean", "one"):
        name = f"sac/256/K=4/{value}"
        flops = over("flops_per_update", name, "sac/256/K=1")
        add(
            f"time of a chain of 4 over 1, policy value {value}", over("ms_per_update", name, "sac/256/K=1"), "≤", flops
        )
    return found
