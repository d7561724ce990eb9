"""Processes that verifiers run in, so that one that hangs, eats memory or dies costs no more than one completion its verdict.

All the work is done within `submit` and `ready`, by the thread that calls them: nothing is locked, and the pipes never block.
"""

from __future__ import annotations

import json
import mmap
import os
import select
import signal
import subprocess
import sys
import time
import weakref
from collections import Counter, deque
from collections.abc import Hashable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

from actors.llm.verifiers.verdict import Unscored, Verdict
from actors.llm.verifiers.worker import OUT_OF_MEMORY, RUNNING

BATCH_S = 0.02  # work sent to a process at once: enough to hide the pipes, little enough to spread over the processes
MOST_BATCH = 256  # completions
CHECK_S = 0.02  # between two looks at whether something has run too long
END_S = 0.5  # that a process which closed its pipes may take to end
LOOK_S = 1.0  # of the time between two looks at a process, most that counts as its own
STALL_S = 90.0  # that a process with work may neither begin nor answer any; starting it takes less
COUNTS = ("scored", "passed", "unscored", "retries", "errors", "timeouts", "deaths", "restarts")


@dataclass(eq=False, slots=True)
class _Job:
    ticket: Hashable
    verifier: str
    request: str  # JSON
    failures: int = 0
    alone: bool = False  # sent as a batch of its own, so that it is seen whether a process ends because of it
    spared: bool = False  # it was next when a process ended for no known reason


class VerifierPool:
    """Judges completions in worker processes.

    A verifier that raises, takes longer than `timeout_s`, allocates more than `memory_mb`, or ends its process (by exit or a
    crash) has failed for that completion, which is judged again up to `retries` times and is then `Unscored`; never reward 0.
    The others that were sent to the same process are judged as if nothing had happened. What a verifier started is killed
    with its process at the latest, unless it leaves the session; a fork that returns from the verifier ends there.

    A verifier that itself catches MemoryError and goes on to return a reward cannot be told from one that judged: let it, and
    every other error that is not the completion's fault, through.

    The processes die with the thread that made them or last called `submit` or `ready` when one had to be replaced: use a pool
    from one thread, which lives as long as it. They inherit stderr, and `print` in a verifier goes there.
    """

    def __init__(self, *, processes: int = 1, timeout_s: float = 5.0, memory_mb: int = 1024, retries: int = 1) -> None:
        """Start the processes.

        Args:
            processes: ≥ 1.
            timeout_s: wall time for one completion.
            memory_mb: address space that a process may map beside what it has when the verifiers are imported.
            retries: times that a completion is judged again.
        """
        if processes < 1 or timeout_s <= 0 or memory_mb < 1 or retries < 0:
            raise ValueError(
                "a verifier pool needs processes ≥ 1, timeout_s > 0, memory_mb ≥ 1 and retries ≥ 0, received "
                f"{processes}, {timeout_s}, {memory_mb} and {retries}"
            )
        self._timeout_s, self._memory_mb, self._retries = timeout_s, memory_mb, retries
        self._queue: deque[_Job] = deque()
        self._answers: list[tuple[Hashable, Verdict | Unscored]] = []
        self._waiting = 0
        self._seconds: dict[str, float] = {}  # that a verifier takes for a completion, about
        self._counts = Counter(dict.fromkeys(COUNTS, 0))
        self._workers: list[_Worker] = []
        self._end = weakref.finalize(self, _end_all, self._workers)
        for _ in range(processes):
            self._workers.append(_Worker(memory_mb))

    def submit(self, ticket: Hashable, verifier: str, completion: str, data: Mapping[str, Any]) -> None:
        """Have a completion judged; `ready` gives the answer with its `ticket`. Does not wait.

        Args:
            ticket: anything to know the answer by; need not be unique.
            verifier: a built-in one's name or package.module:function.
            completion: text of any kind.
            data: the task's; as in JSON.

        Raises:
            TypeError: `data` holds what JSON has no form for.
            RuntimeError: the pool is closed.
        """
        if not self._end.alive:
            raise RuntimeError("the verifier pool is closed")
        self._queue.append(_Job(ticket, verifier, json.dumps([completion, dict(data)])))
        self._waiting += 1
        if any(not worker.jobs for worker in self._workers):
            self._pump()

    def ready(self, timeout_s: float = 0.0) -> list[tuple[Hashable, Verdict | Unscored]]:
        """The answers since the last call, in any order; waits up to `timeout_s` for the first if any is still to come.

        Raises:
            RuntimeError: the pool is closed.
        """
        if not self._end.alive:
            raise RuntimeError("the verifier pool is closed")
        until = time.monotonic() + timeout_s
        while True:
            self._pump()
            left = until - time.monotonic()
            if self._answers or not self._waiting or left <= 0:
                break
            self._wait(min(left, CHECK_S))
        answers, self._answers = self._answers, []
        self._waiting -= len(answers)
        return answers

    @property
    def waiting(self) -> int:
        """Completions submitted whose answer `ready` has not given yet."""
        return self._waiting

    def counts(self) -> dict[str, int]:
        """What happened since the start.

        scored (of them passed) and unscored are answers; errors, timeouts and deaths are failures, after each of which comes
        one of retries or unscored; restarts are processes replaced.
        """
        return dict(self._counts)

    def close(self) -> None:
        """End all processes. Answers that `ready` has not given are lost. May be called again."""
        self._end()
        self._queue.clear()
        self._answers.clear()
        self._waiting = 0

    def __enter__(self) -> VerifierPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _pump(self) -> None:
        for number, worker in enumerate(self._workers):
            ended = worker.read()
            for seconds, answers in worker.take():
                self._answered(worker, seconds, answers)
            # The end of the pipe alone does not tell: another process that a verifier left behind may hold it open.
            if ended or worker.has_ended:
                self._replace(number, "")
            elif worker.running_s() > self._timeout_s:
                self._replace(number, f"took longer than {self._timeout_s:g} s")
            elif worker.stalled_s() > STALL_S:
                self._replace(number, f"neither answered nor ended its process for {STALL_S:g} s")
        for worker in self._workers:
            while self._queue and worker.batches_ahead < 2:
                worker.give(self._batch())
            worker.write()

    def _batch(self) -> list[_Job]:
        """The next jobs, all of one verifier: not so many that other processes would have nothing to do."""
        if self._queue[0].alone:
            return [self._queue.popleft()]
        verifier = self._queue[0].verifier
        most = min(
            MOST_BATCH,
            int(BATCH_S / self._seconds.get(verifier, BATCH_S)),
            len(self._queue) // len(self._workers),
        )
        batch = [self._queue.popleft()]
        while self._queue and len(batch) < most and self._queue[0].verifier == verifier and not self._queue[0].alone:
            batch.append(self._queue.popleft())
        return batch

    def _answered(self, worker: _Worker, seconds: float, answers: list[list[Any] | str]) -> None:
        for answer in answers:
            job = worker.jobs.popleft()
            if isinstance(answer, str):
                self._counts["errors"] += 1
                self._failed(job, answer)
                continue
            reward, passed, reason, shaped, steps = answer
            self._counts["scored"] += 1
            self._counts["passed"] += passed
            ends = tuple((end, score) for end, score in steps) if steps else ()
            self._answers.append((job.ticket, Verdict(reward, passed, reason, shaped, ends)))
            verifier = job.verifier
        if not isinstance(answers[-1], str):
            each = max(seconds / len(answers), 1e-6)
            self._seconds[verifier] = 0.5 * (self._seconds.get(verifier, each) + each)

    def _failed(self, job: _Job, reason: str) -> None:
        job.failures += 1
        if job.failures > self._retries:
            self._counts["unscored"] += 1
            self._answers.append((job.ticket, Unscored(f"verifier {job.verifier} {reason}")))
        else:
            self._counts["retries"] += 1
            self._queue.append(job)

    def _replace(self, number: int, reason: str) -> None:
        """Put a new process in the place of one that ended by itself (no `reason`) or is to be ended."""
        worker = self._workers[number]
        by_itself = not reason and worker.await_end()
        status = worker.kill()
        worker.read()
        for seconds, answers in worker.take():  # what it finished before
            self._answered(worker, seconds, answers)
        culprit = worker.culprit()
        if culprit is not None:
            self._counts["timeouts" if reason else "deaths"] += 1
            why = _why(status, self._memory_mb) if by_itself else "closed the pipes of its process"
            self._failed(culprit, reason or why)
        self._queue.extendleft(reversed(worker.jobs))
        worker.close()
        self._counts["restarts"] += 1
        self._workers[number] = _Worker(self._memory_mb)

    def _wait(self, timeout_s: float) -> None:
        poll = select.poll()
        for worker in self._workers:
            poll.register(worker.answers, select.POLLIN)
            if worker.unsent:
                poll.register(worker.requests, select.POLLOUT)
        poll.poll(max(1, round(1000 * timeout_s)))


def _why(status: int, memory_mb: int) -> str:
    if status == OUT_OF_MEMORY:
        return f"allocated more than {memory_mb} MB"
    if status < 0:
        return f"was ended by {signal.Signals(-status).name}"
    return f"ended its process with status {status}"


def _end_all(workers: list[_Worker]) -> None:
    for worker in workers:
        worker.kill()
        worker.close()


@dataclass(eq=False)
class _Worker:
    """A process, its pipes, and what it has been given."""

    memory_mb: int
    jobs: deque[_Job] = field(default_factory=deque)  # given and not answered, in order
    unsent: bytes = b""

    def __post_init__(self) -> None:
        shared = os.memfd_create("running")
        os.ftruncate(shared, RUNNING.size)
        self._shared = mmap.mmap(shared, RUNNING.size)
        self._received = bytearray()
        self._answered = 0
        self._batches: deque[int] = deque()  # jobs given in all, at the end of each batch that is not answered
        self._given = 0
        self._died: int | None = None
        self._seen: tuple[float, ...] = ()  # what `stalled_s` found
        self._looked = self._stalled_s = 0.0
        command = [sys.executable, "-P", "-m", "actors.llm.verifiers.worker"]
        try:
            self._process = subprocess.Popen(
                [*command, str(os.getpid()), str(shared), str(self.memory_mb)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                pass_fds=(shared,),
                env=_environment(),
                start_new_session=True,  # so that what a verifier starts can be killed with it
                bufsize=0,
            )
        finally:
            os.close(shared)
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self.requests, self.answers = self._process.stdin.fileno(), self._process.stdout.fileno()
        os.set_blocking(self.requests, False)
        os.set_blocking(self.answers, False)

    @property
    def batches_ahead(self) -> int:
        """Batches given and not answered: one that runs and one that waits keep the process busy."""
        while self._batches and self._batches[0] <= self._answered:
            self._batches.popleft()
        return len(self._batches)

    def give(self, batch: list[_Job]) -> None:
        self.jobs.extend(batch)
        self._given += len(batch)
        self._batches.append(self._given)
        requests = ", ".join(job.request for job in batch)
        self.unsent += f"[{json.dumps(batch[0].verifier)}, [{requests}]]\n".encode()

    def write(self) -> None:
        """Send what fits into the pipe."""
        with suppress(BlockingIOError, BrokenPipeError):  # a process that ended is found by `read`
            while self.unsent:
                self.unsent = self.unsent[os.write(self.requests, self.unsent) :]

    def read(self) -> bool:
        """Receive what there is; true where the process has ended."""
        with suppress(BlockingIOError):
            while data := os.read(self.answers, 1 << 20):
                self._received += data
            return True
        return False

    def take(self) -> list[tuple[float, list[list[Any] | str]]]:
        """Answers received, as (seconds they took, answers)."""
        whole, newline, rest = self._received.rpartition(b"\n")
        if not newline:
            return []
        self._received = bytearray(rest)
        lines = [json.loads(line) for line in whole.split(b"\n")]
        self._answered += sum(len(answers) for _, answers in lines)
        return [(seconds, answers) for seconds, answers in lines]

    def running_s(self) -> float:
        """Seconds that the running verifier has taken; 0 between two."""
        began, _ = RUNNING.unpack_from(self._shared)
        return time.monotonic() - began if began else 0.0

    def stalled_s(self) -> float:
        """Seconds that the process has been seen with work, but running none and answering none."""
        began, begun = RUNNING.unpack_from(self._shared)
        seen, now = (began, begun, self._answered, self._given, len(self.unsent)), time.monotonic()
        if not self.jobs or began or seen != self._seen:
            self._stalled_s = 0.0
        else:  # it may have waited for the rest of its work while nobody looked
            self._stalled_s += min(now - self._looked, LOOK_S)
        self._seen, self._looked = seen, now
        return self._stalled_s

    def culprit(self) -> _Job | None:
        """Take out the job at which the process ended; None where it is not known, or where nothing was given.

        A process that ended between two jobs may have lost the verdicts of several, at one of which its pipe was closed, say:
        each is sent alone from then on, and leaves no doubt. Where it had lost none, the next one is charged only if that happens
        to it again, alone too.
        """
        if not self.jobs:
            return None
        began, begun = RUNNING.unpack_from(self._shared)
        lost = begun - self._answered
        first = self.jobs[0]
        if not began and ((lost > 1 and not first.alone) or (not lost and not first.spared)):
            first.spared = first.spared or not lost
            for job in list(self.jobs)[: lost or None]:
                job.alone = True
            return None
        # What was sent alone is answered before the next one begins: the first without its verdict lost the others' too.
        job = self.jobs[lost - 1 if began else 0]
        self.jobs.remove(job)
        return job

    @property
    def has_ended(self) -> bool:
        """Whether the process is no more; its id stays taken until `kill`, which cannot hit another one then."""
        try:
            return os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
        except ChildProcessError:  # its status has been asked for, maybe by something else in this process
            return True

    def await_end(self) -> bool:
        """Its pipes close a moment before a process that ends has its exit status; false where it does not end."""
        until = time.monotonic() + END_S
        while not self.has_ended and time.monotonic() < until:
            time.sleep(0.001)
        return self.has_ended

    def kill(self) -> int:
        """End the process and all that it started; its exit status, negative for a signal."""
        if self._died is None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._died = self._process.wait()
        return self._died

    def close(self) -> None:
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()
        self._shared.close()


def _environment() -> dict[str, str]:
    """So that a process finds the same modules, and does not take every core for itself."""
    paths = [path or os.getcwd() for path in sys.path]
    return {"OMP_NUM_THREADS": "1"} | os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
