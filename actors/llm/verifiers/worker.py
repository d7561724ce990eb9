"""A verifier process: reads completions from stdin, writes verdicts to stdout, one JSON line for many of them.

Request: `[verifier, [[completion, data], …]]`. Answer: `[seconds, [[reward, passed, reason, shaped, steps] or "why it raised",
…]]`, in order, as many as are done. What runs at the moment stands in shared memory (`RUNNING`), since a process that hangs or
dies can no longer say.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import resource
import signal
import struct
import sys
import time
from collections.abc import Mapping
from io import RawIOBase
from typing import Any

from actors.llm.verifiers.verdict import Verifier, as_verdict, load_verifier

RUNNING = struct.Struct("dq")  # monotonic seconds at which it began, 0 between two; completions begun so far
LOAD_S = 60.0  # what importing a verifier may take beside its time for a completion
FLUSH_S = 0.01  # answers are held back no longer than this, one verifier's time aside
OUT_OF_MEMORY = 75  # exit status of a process that ran out: what fragments its heap would fail the next completion too
PR_SET_PDEATHSIG = 1


def die_with(parent: int) -> None:
    """Have the kernel kill this process when the thread that started it ends; `parent` is that process's id."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before the call
        os._exit(1)


def limit_memory(megabytes: int) -> None:
    """Allow `megabytes` of address space beside what is mapped now."""
    with open("/proc/self/statm", encoding="ascii") as file:
        mapped = int(file.read().split()[0]) * mmap.PAGESIZE
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    soft = mapped + megabytes * 1_000_000
    resource.setrlimit(resource.RLIMIT_AS, (soft if hard == resource.RLIM_INFINITY else min(soft, hard), hard))


class _Verifiers:
    """Verifiers by name. Importing one may take more memory than judging with it, and does not count."""

    def __init__(self, megabytes: int) -> None:
        self._megabytes = megabytes
        self._loaded: dict[str, Verifier] = {}

    def get(self, name: str) -> Verifier:
        if name not in self._loaded:
            hard = resource.getrlimit(resource.RLIMIT_AS)[1]
            resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
            try:
                self._loaded[name] = load_verifier(name)
            finally:
                limit_memory(self._megabytes)
        return self._loaded[name]


def judge(verifier: Verifier, completion: str, data: Mapping[str, Any]) -> list[Any] | str:
    """One completion's answer, as it is sent.

    Raises:
        MemoryError: the limit was reached.
    """
    try:
        verdict = as_verdict(verifier(completion, data))
        steps = [[int(end), float(reward)] for end, reward in verdict.steps]
        return [float(verdict.reward), bool(verdict.passed), str(verdict.reason), float(verdict.shaped), steps]
    except MemoryError:
        raise
    except Exception as error:  # a verifier may raise anything
        return _raised(error)


def _raised(error: Exception) -> str:
    return f"raised {type(error).__name__}: {str(error)[:500]}"


def main(parent: int, shared_fd: int, memory_mb: int) -> None:
    """Judge until stdin ends."""
    die_with(parent)
    shared = mmap.mmap(shared_fd, RUNNING.size)
    os.close(shared_fd)
    # What a verifier prints must not get among the answers.
    requests, answers = os.fdopen(os.dup(0), "rb", 1 << 20), os.fdopen(os.dup(1), "wb", 0)
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(2, 1)
    limit_memory(memory_mb)
    verifiers = _Verifiers(memory_mb)
    begun, own = 0, os.getpid()
    for line in requests:
        name, completions = json.loads(line)
        done: list[list[Any] | str] = []
        RUNNING.pack_into(shared, 0, time.monotonic() + LOAD_S, begun + 1)
        try:
            verifier = verifiers.get(name)
        except Exception as error:  # importing runs the user's code
            begun += len(completions)
            RUNNING.pack_into(shared, 0, 0.0, begun)
            _send(answers, 0.0, [_raised(error)] * len(completions))
            continue
        since = time.monotonic()
        for completion, data in completions:
            now = time.monotonic()
            if done and now - since > FLUSH_S:
                _send(answers, now - since, done)
                done, since = [], time.monotonic()
                now = since
            begun += 1
            RUNNING.pack_into(shared, 0, now, begun)
            try:
                done.append(judge(verifier, completion, data))
            except MemoryError:
                os._exit(OUT_OF_MEMORY)
            finally:
                if os.getpid() != own:  # a fork by the verifier, which must not read requests or answer them
                    os._exit(0)
            RUNNING.pack_into(shared, 0, 0.0, begun)
        _send(answers, time.monotonic() - since, done)


def _send(answers: RawIOBase, seconds: float, done: list[list[Any] | str]) -> None:
    data = memoryview(json.dumps([seconds, done]).encode() + b"\n")
    while data:
        data = data[answers.write(data) or 0 :]


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
