"""The replay buffers that people use instead, side by side: cpprb, Stable-Baselines3, TorchRL, Reverb.

Each lies in an environment of its own under `.peers/`, made with pip on first use (4 GB for all four with a CPU build of
torch). This file is also the program that runs there, so at its top it imports the standard library and numpy alone; timing
and the shape of the data, which the whole benchmark shares, stand here for that reason.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version as package_version
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
CALL_ROWS = 256  # rows handed over by one insertion
FRAME = (84, 84)  # uint8
STACK = 4
OBSERVATION_DIM, ACTION_DIM = 17, 6  # HalfCheetah, float32
ALPHA, BETA = 0.6, 0.4

# What pip installs for each peer, and about how many GB that takes.
PEERS: dict[str, tuple[tuple[str, ...], float]] = {
    "cpprb": (("cpprb==11.0.0", "numpy==2.4.6"), 0.2),
    "stable-baselines3": (("stable-baselines3==2.9.2", "torch==2.13.0", "numpy==2.4.6"), 1.0),
    "torchrl": (("torchrl==0.14.1", "tensordict==0.14.3", "torch==2.13.0", "numpy==2.4.6"), 1.1),
    "reverb": (("dm-reverb[tensorflow]==0.14.0", "tensorflow==2.15.1", "numpy==1.26.4"), 1.8),
}

Block = Mapping[str, np.ndarray]  # some transitions: observation, next_observation, action, reward, done
Insert = Callable[[int], object]  # hand over block k
Sample = Callable[[int], Sequence[Any]]  # a batch of so many; its arrays


class PeerMissingError(RuntimeError):
    """A peer that cannot be installed or run; the message says why."""


def measure(call: Callable[[int], object], seconds: float) -> dict[str, Any]:
    """Call `call(k)`, k = 0, 1, …, for so long after a warm-up of a fifth of it: calls/s, and latencies in µs."""
    count, took = 0, []
    warm = time.perf_counter_ns() + int(seconds * 0.2e9)
    while time.perf_counter_ns() < warm or count < 2:
        call(count)
        count += 1
    began = last = time.perf_counter_ns()
    limit = began + int(seconds * 1e9)
    while last < limit:
        call(count)
        now = time.perf_counter_ns()
        took.append(now - last)
        last = now
        count += 1
    p50, p99 = np.percentile(took, [50, 99]) / 1e3
    return {"calls_per_s": len(took) * 1e9 / (last - began), "p50_us": float(p50), "p99_us": float(p99)}


def medians(found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One line of several of the same case: the median of each figure; of those that failed, if only those there are, the first."""
    there = [line for line in found if "missing" not in line] or found[:1]
    figures = {name for name, value in there[0].items() if isinstance(value, float)}
    return {name: statistics.median(f[name] for f in there) if name in figures else v for name, v in there[0].items()}


def line(timing: Mapping[str, Any], *, batch: int, nbytes: int, **case: Any) -> dict[str, Any]:
    """One case: what it is, then how fast. A row is what was asked for: an inserted step or a sampled item."""
    calls = timing["calls_per_s"]
    return {**case, "batch": batch, "rows_per_s": calls * batch, "bytes_per_s": calls * nbytes, **timing}


def blocks(shape: str, *, seed: int = 0) -> list[Block]:
    """Transitions to insert again and again, 256 in a block. Frames are (n, 4, 84, 84): consecutive frames of a video."""
    rng = np.random.default_rng(seed)
    made: list[Block] = []
    for _ in range(64 if shape == "transition" else 4):
        if shape == "transition":
            observations = rng.standard_normal((CALL_ROWS + 1, OBSERVATION_DIM), np.float32)
        else:
            video = rng.integers(0, 256, (CALL_ROWS + STACK, *FRAME), np.uint8)
            observations = np.stack([video[k : k + CALL_ROWS + 1] for k in range(STACK)], axis=1)
        done = np.zeros((CALL_ROWS, 1), np.float32)
        done[-1] = 1.0
        made.append(
            {
                "observation": observations[:-1].copy(),
                "next_observation": observations[1:].copy(),
                "action": rng.standard_normal((CALL_ROWS, ACTION_DIM), np.float32),
                "reward": rng.standard_normal((CALL_ROWS, 1), np.float32),
                "done": done,
            }
        )
    return made


def priorities(*, seed: int = 1) -> Callable[[int], np.ndarray]:
    """New priorities, made beforehand: the next `count` of them at each call, float64 (count,)."""
    pool = np.random.default_rng(seed).random(1 << 18) + 0.05
    at = 0

    def fresh(count: int) -> np.ndarray:
        nonlocal at
        at = at + count if at + 2 * count <= len(pool) else 0
        return pool[at : at + count]

    return fresh


def python_of(peer: str) -> Path:
    """The Python of a peer's environment, which is made first where it is not there or is another version's.

    Raises:
        PeerMissingError: there is no room for it, or pip failed.
    """
    pinned, gigabytes = PEERS[peer]
    wanted = "\n".join(pinned)
    folder = ROOT / ".peers" / peer
    python, marker = folder / "bin" / "python", folder / "installed.txt"
    if marker.exists() and marker.read_text() == wanted:
        return python
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    free = shutil.disk_usage(folder).free / 1e9
    if free < 2 * gigabytes:  # pip unpacks beside what it has downloaded
        raise PeerMissingError(f"{folder} needs {2 * gigabytes:.1f} GB while installing; {free:.1f} GB are free")
    print(f"installing {peer} into {folder} (about {gigabytes:.1f} GB) …", file=sys.stderr)
    pip = [sys.executable, "-m", "pip", "--python", str(python), "--disable-pip-version-check", "--quiet"]
    environment = [sys.executable, "-m", "venv", "--without-pip", str(folder)]
    for command in (environment, [*pip, "install", *wanted.split("\n")]):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise PeerMissingError(f"not installed: {_reason(done.stderr, done.returncode)}")
    marker.write_text(wanted)
    return python


def _reason(stderr: str, code: int) -> str:
    """The line of a program's errors that tells most."""
    lines = [text.strip() for text in stderr.splitlines() if text.strip()]
    errors = [text for text in lines if "error" in text.lower()]
    return (errors or lines or [f"exit status {code}"])[-1]


def run_peer(
    peer: str,
    *,
    shape: str,
    selector: str,
    rows: int,
    batches: Sequence[int],
    seconds: float,
    repeats: int = 1,
    timeout_s: float = 1800,
) -> list[dict[str, Any]]:
    """The lines of one peer, measured in its environment: insertion, and samples of each batch size. A peer that cannot be
    installed, loaded or used so gives a line for each batch size whose `missing` says why."""
    case = {"peer": peer, "shape": shape, "selector": selector, "rows": rows, "batches": list(batches)}
    case |= {"seconds": seconds, "repeats": repeats}
    # One thread each, as for everything measured here; no GPU is used, nor is anything of this environment's.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment |= {"TF_CPP_MIN_LOG_LEVEL": "3"}
    try:
        command = [str(python_of(peer)), "-P", "-W", "ignore", __file__, json.dumps(case)]
        child = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=timeout_s)
        if child.returncode != 0:
            raise PeerMissingError(f"it failed: {_reason(child.stderr, child.returncode)}")
        found: list[dict[str, Any]] = [json.loads(t) for t in child.stdout.splitlines() if t.startswith("{")]
        if "missing" not in found[0]:
            return found
        missing = found[0]["missing"]
    except subprocess.TimeoutExpired:
        missing = f"it did not finish within {timeout_s:.0f} s"
    except PeerMissingError as error:
        missing = str(error)
    known = {"transport": peer, "op": "sample", "selector": selector, "shape": shape, "shards": 1}
    return [{**known, "batch": batch, "missing": missing} for batch in batches]


# From here on: the program that runs in a peer's environment.


def _cpprb(shape: str, selector: str, rows: int) -> tuple[Insert, dict[str, Sample], str]:
    import cpprb  # type: ignore[import-not-found]

    fields: dict[str, Any] = {"act": {"shape": ACTION_DIM}, "rew": {}, "done": {}}
    # Whole stacks, twice: with `next_of` and `stack_compress` cpprb needs an eighth of the memory and is a third as fast.
    observation = {"shape": (STACK, *FRAME), "dtype": np.uint8} if shape == "frames" else {"shape": OBSERVATION_DIM}
    fields |= {"obs": observation, "next_obs": observation}
    options: dict[str, Any] = {}
    kind = cpprb.PrioritizedReplayBuffer if selector == "prioritised" else cpprb.ReplayBuffer
    if selector == "prioritised":
        options["alpha"] = ALPHA
    buffer = kind(rows, fields, **options)
    keys = {"obs": "observation", "next_obs": "next_observation", "act": "action", "rew": "reward", "done": "done"}
    data = [{key: block[name] for key, name in keys.items()} for block in blocks(shape)]
    fresh = priorities()

    def insert(k: int) -> None:
        buffer.add(**data[k % len(data)])

    def sample(batch: int) -> Sequence[Any]:
        if selector == "uniform":
            return list(buffer.sample(batch).values())
        found = buffer.sample(batch, BETA)
        buffer.update_priorities(found["indexes"], fresh(batch))
        return list(found.values())

    return insert, {"in process": sample}, package_version("cpprb")


def _stable_baselines3(shape: str, selector: str, rows: int) -> tuple[Insert, dict[str, Sample], str]:
    import stable_baselines3  # type: ignore[import-not-found]
    import torch
    from gymnasium.spaces import Box
    from stable_baselines3.common.buffers import ReplayBuffer  # type: ignore[import-not-found]

    if selector == "prioritised":
        raise PeerMissingError("Stable-Baselines3 has no prioritised buffer")
    torch.set_num_threads(1)
    observations = (
        Box(-np.inf, np.inf, (OBSERVATION_DIM,), np.float32)
        if shape == "transition"
        else Box(0, 255, (STACK, *FRAME), np.uint8)
    )
    actions = Box(-1.0, 1.0, (ACTION_DIM,), np.float32)
    buffer = ReplayBuffer(rows, observations, actions, device="cpu", n_envs=CALL_ROWS, handle_timeout_termination=False)
    data = blocks(shape)
    infos: list[dict[str, Any]] = [{} for _ in range(CALL_ROWS)]

    def insert(k: int) -> None:
        b = data[k % len(data)]
        buffer.add(b["observation"], b["next_observation"], b["action"], b["reward"][:, 0], b["done"][:, 0], infos)

    def sample(batch: int) -> Sequence[Any]:
        return [part for part in buffer.sample(batch) if part is not None]

    return insert, {"in process": sample}, stable_baselines3.__version__


def _torchrl(shape: str, selector: str, rows: int) -> tuple[Insert, dict[str, Sample], str]:
    import torch
    import torchrl  # type: ignore[import-not-found]
    from tensordict import TensorDict  # type: ignore[import-not-found]
    from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer  # type: ignore[import-not-found]
    from torchrl.data.replay_buffers import samplers  # type: ignore[import-not-found]

    torch.set_num_threads(1)
    sampler = samplers.RandomSampler()
    if selector == "prioritised":
        try:
            import torchrl._torchrl  # type: ignore[import-not-found]  # its sum tree, built for one version of torch
        except ImportError as error:
            versions = f"torchrl {torchrl.__version__} with torch {torch.__version__}"
            raise PeerMissingError(
                f"the compiled part of {versions} does not load: {str(error).rpartition('/')[2][:120]}"
            ) from error
        sampler = samplers.PrioritizedSampler(rows, ALPHA, BETA)
    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(rows), sampler=sampler, batch_size=CALL_ROWS)
    data = [TensorDict({k: torch.from_numpy(v) for k, v in b.items()}, [CALL_ROWS]) for b in blocks(shape)]
    fresh = priorities()

    def insert(k: int) -> None:
        buffer.extend(data[k % len(data)])

    def sample(batch: int) -> Sequence[Any]:
        found = buffer.sample(batch)
        if selector == "prioritised":
            buffer.update_priority(found["index"], torch.from_numpy(fresh(batch)))
        return list(found.values())

    return insert, {"in process": sample}, torchrl.__version__


def _reverb(shape: str, selector: str, rows: int) -> tuple[Insert, dict[str, Sample], str]:
    import reverb  # type: ignore[import-not-found]

    server = subprocess.Popen(
        [sys.executable, "-P", __file__, "serve-reverb", shape, selector, str(rows)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )  # it ends with its standard input, so with this process
    assert server.stdout is not None
    port = server.stdout.readline().strip()
    if not port:
        raise PeerMissingError(f"its server ended with exit status {server.wait()}")
    client = reverb.Client(f"localhost:{port}")
    framed = shape == "frames"
    # As its users do with frames: every frame once, and items that refer to the stack and the frame after it.
    writer = client.trajectory_writer(STACK + 1 if framed else 1)
    data = blocks(shape)
    fresh = priorities()

    def insert(k: int) -> None:
        block = data[k % len(data)]
        for row in range(CALL_ROWS):
            step = {name: value[row] for name, value in block.items() if not framed or "observation" not in name}
            if framed:
                step["frame"] = block["next_observation"][row, -1]
            writer.append(step)
            if not framed or row >= STACK:
                taken = {n: c[-STACK - 1 :] if n == "frame" else c[-1:] for n, c in writer.history.items()}
                writer.create_item("table", 1.0, taken)
        writer.flush()
        if framed:
            writer.end_episode()

    def write_back(keys: Sequence[int]) -> None:
        if selector == "prioritised":
            client.mutate_priorities("table", dict(zip(keys, fresh(len(keys)).tolist(), strict=True)))

    def by_client(batch: int) -> Sequence[Any]:
        found = list(client.sample("table", batch, emit_timesteps=False))
        write_back([s.info.key for s in found])
        return [np.stack(column) for column in zip(*(s.data for s in found), strict=True)]

    iterators: dict[int, Any] = {}

    def by_dataset(batch: int) -> Sequence[Any]:
        if batch not in iterators:
            dataset = reverb.TrajectoryDataset.from_table_signature(
                f"localhost:{port}", "table", max_in_flight_samples_per_worker=2 * batch
            )
            iterators[batch] = dataset.batch(batch).prefetch(2).as_numpy_iterator()
        found = next(iterators[batch])
        write_back(found.info.key.tolist())
        return list(found.data.values())

    return insert, {"client": by_client, "tf.data": by_dataset}, package_version("dm-reverb")


def _serve_reverb(shape: str, selector: str, rows: int) -> None:
    import reverb
    import tensorflow as tf  # type: ignore[import-untyped]

    signature = {
        name: tf.TensorSpec((1, *value.shape[1:]), value.dtype)
        for name, value in blocks(shape)[0].items()
        if shape == "transition" or "observation" not in name
    }
    if shape == "frames":
        signature["frame"] = tf.TensorSpec((STACK + 1, *FRAME), tf.uint8)
    kinds = reverb.selectors
    table = reverb.Table(
        "table",
        sampler=kinds.Prioritized(ALPHA) if selector == "prioritised" else kinds.Uniform(),
        remover=kinds.Fifo(),
        max_size=rows,
        rate_limiter=reverb.rate_limiters.MinSize(1),
        signature=signature,
    )
    server = reverb.Server([table], port=None)
    print(server.port, flush=True)
    sys.stdin.read()
    os._exit(0)


_BUILDERS = {"cpprb": _cpprb, "stable-baselines3": _stable_baselines3, "torchrl": _torchrl, "reverb": _reverb}


def _run(case: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Fill a buffer of the peer, then measure it."""
    peer, shape, selector, seconds = case["peer"], case["shape"], case["selector"], case["seconds"]
    known = {"transport": peer, "selector": selector, "shape": shape, "shards": 1}
    try:
        insert, samples, version = _BUILDERS[peer](shape, selector, case["rows"])
    except (PeerMissingError, ImportError) as error:
        return [{"missing": str(error)}]
    for k in range(-(-case["rows"] // CALL_ROWS)):
        insert(k)
    known |= {"rows": case["rows"], "version": version}
    written = sum(part.nbytes for part in blocks(shape)[0].values())
    rounds: list[list[dict[str, Any]]] = []
    for _ in range(case["repeats"]):
        timing = measure(insert, seconds)
        found = [line(timing, batch=CALL_ROWS, nbytes=written, **known, op="insert")]
        for how, sample in samples.items():
            for batch in case["batches"]:
                nbytes = sum(int(part.nbytes) for part in sample(batch))
                timing = measure(lambda _, n=batch, draw=sample: draw(n), seconds)  # type: ignore[misc]
                found.append(line(timing, batch=batch, nbytes=nbytes, **known, op="sample", how=how))
        rounds.append(found)
    return [medians(same) for same in zip(*rounds, strict=True)]


def _main() -> None:
    if sys.argv[1] == "serve-reverb":
        _serve_reverb(sys.argv[2], sys.argv[3], int(sys.argv[4]))
    for found in _run(json.loads(sys.argv[1])):
        print(json.dumps(found))
    sys.stdout.flush()
    os._exit(0)  # threads of some peers would hold up the interpreter's own end


if __name__ == "__main__":
    _main()
