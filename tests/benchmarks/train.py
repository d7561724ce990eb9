"""Speed of a whole training run, and of its learner alone on data that is there already."""

from __future__ import annotations

import json
import sys
import tempfile
import threading
import time
from typing import Any

import numpy as np

from configs.schema import RunConfig
from tests.benchmarks import run_child

ALONE_S = 0.2  # share of the run's time that the learner alone gets, half before and half after it


def bench(config: RunConfig, *, seconds: float) -> dict[str, Any]:
    """Train for `seconds` after the first environment step, with the learner alone before and after.

    The rates and the learner's shares are taken over the part of the run in which it updates (warm-up left out).
    Every part runs in a process of its own, as `millrace train` does.

    Raises:
        RuntimeError: a measuring process failed; its error is in the message.
    """
    alone = [run_child(__name__, "alone", str(seconds * ALONE_S / 2), config=config)]
    with tempfile.TemporaryDirectory(prefix="millrace-bench-") as root:
        trained = run_child(__name__, "train", str(seconds), config=_for_benchmark(config, root, seconds))
    alone.append(run_child(__name__, "alone", str(seconds * ALONE_S / 2), config=config))
    alone_per_s = sum(a["updates_per_s"] for a in alone) / len(alone)
    return {
        **trained,
        "learner_alone_updates_per_s": alone_per_s,
        "ratio": trained["updates_per_s"] / alone_per_s,
        "env_id": config.env.id,
        "actors": config.actors.count,
        "envs": config.actors.envs,
        "updates_per_step": config.learners.updates_per_step,
        "mode": config.mode,
        "seconds": seconds,
    }


def _for_benchmark(config: RunConfig, root: str, seconds: float) -> RunConfig:
    return config.model_copy(
        update={
            "root": root,
            "name": "bench",
            "eval": config.eval.model_copy(update={"every": 0}),
            "stop": config.stop.model_copy(update={"steps": None, "wall_s": seconds, "mean_return": None}),
            "checkpoints": config.checkpoints.model_copy(update={"replay": False}),
        }
    )


def _train(config: RunConfig) -> dict[str, Any]:
    from cluster.api import train
    from cluster.metrics import read_metrics

    run = train(config, show=lambda row, line: None, command=["millrace", "bench", "train"])
    rows = read_metrics(run.path).to_pylist()
    # From two ticks after the first update, when batches are under way, to the last tick before the processes stop.
    busy = [row for row in rows if row["updates"] > 0 and row.get("steps_per_s") is not None][2:]
    if len(busy) < 2:
        raise RuntimeError(
            "the run ended before its learner had begun; give it more --seconds or a smaller replay.min_size"
        )
    first, last = busy[0], busy[-1]

    def gained(name: str) -> float:
        return float(last[name] - first[name])

    wall = gained("time/learner/wall_s")
    return {
        "steps_per_s": gained("env_steps") / gained("time_s"),
        "updates_per_s": gained("updates") / gained("time_s"),
        "update_share": gained("time/learner/update_s") / wall,
        "wait_share": gained("time/learner/wait_s") / wall,
        "publish_share": gained("time/learner/publish_s") / wall,
        "first_step_s": rows[-1]["wall_s"] - rows[-1]["time_s"],
        "policy_lag": float(np.mean([row["policy_lag"] for row in busy if row["policy_lag"] is not None])),
    }


def _alone(config: RunConfig, seconds: float) -> dict[str, Any]:
    """The same learner loop on a shard in this process, filled with random steps, that lets every sample pass."""
    from actors.envs import check_env
    from cluster import parts
    from learners.loop import LearnerLoop, set_threads
    from replay.layout import Layout, TableSpec
    from replay.limiter import RateLimiter
    from replay.rate_limit import RateLimit
    from replay.samplers import CallSource, Sampler
    from replay.shard import Shard
    from replay.writers import CallWriter

    set_threads(config.learners.cpus, config.learners.threads)
    schema = check_env(config.env)
    capacity, steps = min(config.replay.capacity, 100_000), config.replay.segment_steps
    layout = Layout(schema, capacity // steps, steps, (TableSpec(parts.TABLE),))
    shard = Shard(layout, {parts.TABLE: RateLimiter(RateLimit.from_min_size(1))}, index=0, seed=0)
    rng = np.random.default_rng(0)
    writer = CallWriter(shard)
    lanes = np.arange(64, dtype=np.int32)
    for _ in range(capacity // len(lanes)):
        rows = schema.zeros(len(lanes))
        for field in (*schema.observations, schema.action):
            rows[field.name] = rng.uniform(-1, 1, rows[field.name].shape)
        rows["reward"] = rng.normal(size=len(lanes))
        writer.append(lanes, rows)
    loop = LearnerLoop(
        parts.make_algorithm(config, schema, incarnation=0),
        Sampler(
            [CallSource(shard, window=parts.window(config, schema))],
            schema,
            window=parts.window(config, schema),
            batch_size=config.learners.batch_size,
            seed=0,
        ),
        publish=lambda version, data: None,
        publish_every=config.learners.publish_every,
        prefetch=2,
        version=1,
    )
    until = threading.Event()

    def update() -> None:
        set_threads(config.learners.cpus, config.learners.threads)
        loop.run(until)

    thread = threading.Thread(target=update)
    thread.start()
    time.sleep(min(1.0, seconds / 5))  # warm caches first
    before, began = loop.stats()["updates"], time.perf_counter()
    time.sleep(seconds)
    rate = (loop.stats()["updates"] - before) / (time.perf_counter() - began)
    until.set()
    thread.join()
    return {"updates_per_s": rate}


if __name__ == "__main__":
    settings = RunConfig.model_validate_json(sys.stdin.read())
    print(json.dumps(_train(settings) if sys.argv[1] == "train" else _alone(settings, float(sys.argv[2]))))
