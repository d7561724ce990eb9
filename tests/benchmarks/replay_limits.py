"""What the memory of this machine allows: numpy's gather of packed rows, and memcpy and `take` of frames.

Each is measured in a process of its own, over a mapped file as large as the table it is compared with, so that nothing sits in
cache; with `writer_rows_per_s`, another process meanwhile copies rows into that file at that pace.
"""

from __future__ import annotations

import json
import mmap
import os
import re
import select
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from tests.benchmarks.replay_peers import CALL_ROWS, FRAME, STACK, line, measure

MODULE = "tests.benchmarks.replay_limits"  # as a program its __name__ is another
FRAME_BYTES = FRAME[0] * FRAME[1]
ROW_BYTES = 104  # a packed HalfCheetah step: 17 + 6 + 1 float32, the policy version, 3 flags, padding
# What is measured, and the bytes of a row of its file.
KINDS = {
    "take of packed rows": ROW_BYTES,  # observation and next observation are rows i and i + 1: index (batch, 2)
    "memcpy of the delivered bytes": FRAME_BYTES,  # as many bytes as a batch of two stacks has, each time from elsewhere
    "take of stored stacks": STACK * FRAME_BYTES,  # index (batch, 2)
    "take of single frames": FRAME_BYTES,  # index (batch, 5): a stack and the frame after it; delivers the 5
}


def limits(directory: str, case: dict[str, Any]) -> dict[str, Any]:
    """The line of one limit. `case`: kind (of `KINDS`), rows, batch, seconds, writer_rows_per_s; its file lies in `directory`.

    Raises:
        OSError: the directory has too little room.
        RuntimeError: the measuring process failed; its error is in the message.
    """
    path = Path(directory) / "limit"
    size = case["rows"] * KINDS[case["kind"]]
    free = os.statvfs(directory).f_bavail * os.statvfs(directory).f_frsize
    if free < size:
        raise OSError(f"{directory} has {free / 1e9:.1f} GB free and '{case['kind']}' needs {size / 1e9:.1f} GB")
    try:
        found: dict[str, Any] = child(MODULE, "measure", {**case, "path": str(path)})
    finally:
        path.unlink(missing_ok=True)
    return found


def child(module: str, role: str, case: dict[str, Any]) -> Any:
    """The JSON that a module of this benchmark prints last, run as a program: its role as argument, `case` on standard input.

    Raises:
        RuntimeError: it failed; the message is the error it ended with.
    """
    done = subprocess.run(
        _command(module, role),
        input=json.dumps(case) + "\n",
        env=_environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        said = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raised = [text for text in said if re.match(r"[\w.]+(Error|Exception)\b", text)]
        raise RuntimeError(f"a measuring process failed: {(raised or said)[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def _command(module: str, role: str) -> list[str]:
    return [sys.executable, "-P", "-W", "ignore", "-m", module, role]


def _environment() -> dict[str, str]:
    """This source tree first; one BLAS thread, because a second one, spinning while it waits, takes a core."""
    root = str(Path(__file__).resolve().parents[2])
    paths = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}


@contextmanager
def writing(module: str, role: str, case: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Run a writing program, as `child` does, while the body runs; afterwards what it printed last is in what this gives.

    It prints a line when it begins to write, and ends with its standard input.

    Raises:
        RuntimeError: it failed.
    """
    found: dict[str, Any] = {}
    with subprocess.Popen(
        _command(module, role), env=_environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as writer:
        assert writer.stdin is not None
        assert writer.stdout is not None
        writer.stdin.write(json.dumps(case) + "\n")
        writer.stdin.flush()
        if not writer.stdout.readline():
            raise RuntimeError(f"the writer ended with exit status {writer.wait()}; its error is above")
        try:
            yield found
        finally:
            writer.stdin.close()
            said = writer.stdout.read()
    if writer.returncode != 0:
        raise RuntimeError(f"the writer failed with exit status {writer.returncode}; its error is above")
    found |= json.loads(said.splitlines()[-1])


def _map(path: str, size: int) -> np.ndarray:
    """A file of random bytes, mapped and read once, so that no page is missing: uint8 (size,)."""
    new = not os.path.exists(path)
    with open(path, "r+b" if not new else "w+b") as file:
        if new:
            os.posix_fallocate(file.fileno(), 0, size)
        mapped = np.frombuffer(mmap.mmap(file.fileno(), size), np.uint8)
    if new:
        noise = np.random.default_rng(0).bytes(1 << 20)
        for at in range(0, size, 1 << 20):
            mapped[at : at + (1 << 20)] = np.frombuffer(noise, np.uint8)[: size - at]
    mapped[::4096].sum()
    return mapped


def _measure(case: dict[str, Any]) -> dict[str, Any]:
    kind, rows, batch, seconds = case["kind"], case["rows"], case["batch"], case["seconds"]
    row_bytes = KINDS[kind]
    mapped = _map(case["path"], rows * row_bytes)
    if kind.startswith("memcpy"):
        out = np.empty(batch * 2 * STACK * FRAME_BYTES, np.uint8)
        out[:] = 0
        regions = max(1, len(mapped) // len(out))
        source = np.resize(mapped, len(out)) if len(out) > len(mapped) else mapped

        def call(k: int) -> None:
            at = k % regions * len(out)
            np.copyto(out, source[at : at + len(out)])

    else:
        across = STACK + 1 if kind == "take of single frames" else 2
        starts = np.random.default_rng(1).integers(0, rows - across, (max(4, 2 * rows // batch), batch))
        indices = starts[:, :, None] + np.arange(across)
        table = mapped.view(np.dtype((np.void, row_bytes)))
        out = np.zeros((batch, across), table.dtype)

        def call(k: int) -> None:  # mode: with `raise`, numpy gathers into a buffer of its own first
            table.take(indices[k % len(indices)], out=out, mode="clip")

    shape = "transition" if row_bytes == ROW_BYTES else "frames"
    known: dict[str, Any] = {
        "transport": "memcpy" if kind.startswith("memcpy") else "numpy",
        "op": "sample",
        "selector": "uniform",
    }
    known |= {"shape": shape, "shards": 1, "how": kind, "rows": rows, "bytes_per_step": row_bytes}
    if not case["writer_rows_per_s"]:
        return line(measure(call, seconds), batch=batch, nbytes=out.nbytes, **known)
    with writing(MODULE, "write", case) as wrote:
        timing = measure(call, seconds)
    return line(timing, batch=batch, nbytes=out.nbytes, **known, writer_rows_per_s=wrote["rows_per_s"])


def _write(case: dict[str, Any]) -> None:
    row_bytes = KINDS[case["kind"]]
    mapped = _map(case["path"], case["rows"] * row_bytes)
    count = CALL_ROWS * row_bytes
    block = mapped[:count].copy()
    places = len(mapped) // count

    def call(k: int) -> None:
        at = k % places * count
        mapped[at : at + count] = block

    print(json.dumps(write_until_closed(call, CALL_ROWS, case["writer_rows_per_s"])))


def write_until_closed(call: Callable[[int], object], rows_per_call: int, rows_per_s: float) -> dict[str, float]:
    """What a program run by `writing` does: call `call(k)` at most so many rows a second (0: as fast as it goes) until standard
    input ends; the rows/s reached."""
    print("writing", flush=True)
    began = due = looked = time.perf_counter()
    calls = 0
    while True:
        call(calls)
        calls += 1
        now = time.perf_counter()
        if rows_per_s:
            due = max(
                due + rows_per_call / rows_per_s, now - 0.1
            )  # what is long overdue is not made up for in one rush
            if due > now + 0.001:  # shorter sleeps take longer than they say
                time.sleep(due - now)
        if now - looked > 0.01:
            looked = now
            if select.select([sys.stdin], [], [], 0)[0]:
                return {"rows_per_s": calls * rows_per_call / (now - began)}


def main() -> None:
    case = json.loads(sys.stdin.readline())
    if sys.argv[1] == "write":
        _write(case)
    else:
        print(json.dumps(_measure(case)))


if __name__ == "__main__":
    main()
