"""An actor's loop for language models: prompts in, whole judged groups out.

    assignments → engine (one decode step at a time) → verifiers → filter → queue of the replay service

All of it overlaps: completions decode while earlier ones are judged, and slots that fall free are filled from the next groups.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol, cast

import numpy as np
import pyarrow as pa

from actors.assignments import Assignment, Outcome
from actors.llm.engine import Engine, Request, Sample
from actors.llm.seeds import sample_seed
from actors.llm.tasks import Task
from actors.llm.verifiers.pool import VerifierPool
from actors.llm.verifiers.verdict import Unscored, Verdict
from learners.llm.rows import Completion, to_rows
from learners.llm.tokenizers import Tokenizer

IDLE_S = 0.01  # how long a step waits for verdicts where nothing is to be decoded
Ticket = tuple[int, int]  # group, index
EXAMPLES = 64  # completions kept for the report until they are fetched
FAILURES = ("errors", "timeouts", "deaths", "restarts")  # of a verifier pool's counts
MOST_FAILED = 64  # prompts that fail before any did not, after which sampling on is hopeless


class GroupWriter(Protocol):
    """Where whole groups go; `replay.queue_writers` has two."""

    def append(self, batch: pa.RecordBatch) -> None:
        """Blocks while the queue is full."""
        ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class Example:
    """A completion as text, for people."""

    family: str
    prompt: str
    hint: str  # the beginning of the answer, where it was given
    completion: str  # what was sampled
    reward: float
    passed: bool
    reason: str
    version: int  # of its newest token
    group: int


@dataclass
class _Group:
    assignment: Assignment[Task]
    prompt: np.ndarray
    next_index: int
    open: int = 0  # completions asked for and neither judged nor dropped
    tokens: int = 0
    completions: int = 0
    done: list[Completion] = field(default_factory=list)


class GroupRollout:
    """Samples and judges groups. One thread calls `step`; `stats` and `examples` may be called from others."""

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        verifiers: VerifierPool,
        writer: GroupWriter,
        *,
        ask: Callable[[int], Sequence[Assignment[Task]]],
        judge: Callable[[int, int], Literal["kept", "too_easy", "too_hard"]],
        group_size: int,
        slots: int,
        prompts_ahead: int,
        seed: int,
        hold_back: int = 0,
        lock_step: bool = False,
    ) -> None:
        """
        ask: at most so many assignments, those that are there now; never waits.
        judge: (passes, completions) of a whole group → what becomes of it.
        slots: completions that the engine decodes at once.
        prompts_ahead: groups asked for beyond what fills the slots.
        seed: of the run.
        hold_back: versions by which the weights are at least kept behind the newest, once there are so many.
        lock_step: wait for every verdict within the step, so that the same seeds give the same groups in the same order.
        """
        self._engine = engine
        self._tokenizer = tokenizer
        self._verifiers = verifiers
        self._writer = writer
        self._ask = ask
        self._judge = judge
        self._group_size = group_size
        self._slots = slots
        self._ahead = prompts_ahead
        self._seed = seed
        self._held: deque[tuple[int, bytes | memoryview]] = deque()
        self._hold_back = hold_back
        self._lock_step = lock_step
        self._groups: dict[int, _Group] = {}
        self._outcomes: list[Outcome] = []
        self._judged: dict[Ticket, Sample] = {}  # what waits for its verdict
        self._examples: deque[Example] = deque(maxlen=EXAMPLES)
        self._counts = dict.fromkeys(
            ("samples", "tokens", "groups", "kept_groups", "passes", "scored", "unscored", "cut_off", "failed"), 0
        ) | {f"{fate}_groups": 0 for fate in ("too_hard", "too_easy", "unscored")}
        self._unscored_reason = ""
        self._begun = 0
        self._seconds = dict.fromkeys(("decode_s", "verify_s", "write_s", "idle_s", "wall_s"), 0.0)

    # ------------------------------------------------------------------ driving

    @property
    def version(self) -> int:
        """Policy version that the engine samples with, 0 before the first weights."""
        return self._engine.version

    @property
    def unscored_reason(self) -> str:
        """Why the last completion that nobody could judge was not judged; empty before there is one."""
        return self._unscored_reason

    def set_weights(self, version: int, data: bytes | memoryview) -> None:
        """Newer weights; the engine takes them between two decode steps, or later where they are held back."""
        self._held.append((version, data))
        due: tuple[int, bytes | memoryview] | None = None
        # By number: an actor that polls for weights does not see every version.
        while self._held and self._held[0][0] <= version - self._hold_back:
            due = self._held.popleft()
        if due is None and self._engine.version == 0:
            due = self._held.popleft()
        if due is not None:
            self._engine.load(*due)

    def step(self) -> int:
        """Take new assignments, decode one token of every running completion, take in verdicts, write whole groups.

        Returns the completions that finished. Blocks while the queue is full.

        Raises:
            flight.FlightError: the shard refused rows, or stayed away too long.
            ValueError: no prompt can be sampled.
        """
        start = time.perf_counter()
        self._refill()
        began = time.perf_counter()
        if self._engine.running or self._engine.waiting:
            finished = self._engine.step()
            self._seconds["decode_s"] += time.perf_counter() - began
            wait = 0.0
        else:  # nothing to decode: wait for verdicts, or for assignments
            finished, wait = [], IDLE_S
        began = time.perf_counter()
        for sample in finished:
            self._take(sample)
        verdicts = self._verdicts(wait)
        self._seconds["idle_s" if wait else "verify_s"] += time.perf_counter() - began
        for ticket, verdict in verdicts:
            self._score(ticket, verdict)
        self._seconds["wall_s"] += time.perf_counter() - start
        return len(finished)

    def take_outcomes(self) -> list[Outcome]:
        """The outcomes since the last call."""
        found, self._outcomes = self._outcomes, []
        return found

    def examples(self) -> list[Example]:
        """Completions since the last call, at most `EXAMPLES`: of some groups the one with most and the one with least reward."""
        found = []
        while self._examples:
            found.append(self._examples.popleft())
        return found

    def stats(self) -> dict[str, float]:
        """Cumulative: completions and tokens sampled, groups ended, kept, and dropped for each reason, completions judged, passed,
        dropped as unscored, cut off at the most tokens; prompts that failed; failures of verifiers; seconds of `step`: decoding,
        handing to and waiting for verifiers, writing, idle, and in all."""
        running = {"running": float(self._engine.running), "waiting": float(self._engine.waiting)}
        judging = self._verifiers.counts()
        failures = {f"verifier/{name}": float(judging[name]) for name in FAILURES}
        return {**self._counts, **self._seconds, **running, **failures, **self._engine.stats()}

    def close(self) -> None:
        """End the verifiers and the writer; groups that are not whole are dropped."""
        self._verifiers.close()
        self._writer.close()

    # ---------------------------------------------------------------- its parts

    def _verdicts(self, wait_s: float) -> list[tuple[Ticket, Verdict | Unscored]]:
        if self._lock_step:
            found: list[tuple[Ticket, Verdict | Unscored]] = []
            while len(found) < len(self._judged):
                found += self._ready(IDLE_S)
            return sorted(found, key=lambda pair: pair[0])
        if wait_s and not self._judged:
            time.sleep(wait_s)
        return self._ready(wait_s if self._judged else 0.0)

    def _ready(self, wait_s: float) -> list[tuple[Ticket, Verdict | Unscored]]:
        return cast(list[tuple[Ticket, Verdict | Unscored]], self._verifiers.ready(wait_s))

    def _refill(self) -> None:
        """Keep so many completions in the engine that every slot which falls free has a next one."""
        wanted = self._slots + self._ahead * self._group_size - self._engine.running - self._engine.waiting
        # Where verifiers are slower than the engine, what waits for them must not grow without end.
        wanted -= max(0, len(self._judged) - self._slots)
        if wanted < self._group_size:
            return
        for assignment in self._ask(wanted // self._group_size):
            self._begin(assignment)

    def _begin(self, assignment: Assignment[Task]) -> None:
        try:
            prompt = np.asarray(self._tokenizer.encode_prompt(assignment.task.prompt, _hint(assignment)), np.int32)
            group = _Group(assignment, prompt, 0)
            self._groups[assignment.group] = group
            self._request(group, self._group_size)
            self._begun += 1
        except ValueError as error:  # a prompt that is too long, or has characters unknown to the tokenizer
            self._groups.pop(assignment.group, None)
            self._counts["failed"] += 1
            self._outcomes.append(Outcome(assignment.group, assignment.number, 0, 0, 0, 0, "failed", assignment.hint))
            if not self._begun and self._counts["failed"] >= MOST_FAILED:
                raise ValueError(
                    f"none of the first {MOST_FAILED} prompts can be sampled; the last one: {error}"
                ) from None

    def _request(self, group: _Group, count: int) -> None:
        one = group.assignment
        indices = range(group.next_index, group.next_index + count)
        group.next_index += count
        group.open += count
        self._engine.submit(
            [
                Request(one.group, index, group.prompt, sample_seed(self._seed, one.task.key, one.group, index))
                for index in indices
            ]
        )

    def _take(self, sample: Sample) -> None:
        group = self._groups[sample.request.group]
        group.tokens += len(sample.tokens)
        group.completions += 1
        self._counts["samples"] += 1
        self._counts["tokens"] += len(sample.tokens)
        self._counts["cut_off"] += sample.finish == "length"
        ticket = (sample.request.group, sample.request.index)
        self._judged[ticket] = sample
        task = group.assignment.task
        # A hint is the beginning of the answer: it is judged with what follows it.
        text = _hint(group.assignment) + self._tokenizer.decode(sample.tokens.tolist())
        self._verifiers.submit(ticket, task.verifier, text, task.data)

    def _score(self, ticket: Ticket, verdict: Verdict | Unscored) -> None:
        sample, group = self._judged.pop(ticket), self._groups[ticket[0]]
        group.open -= 1
        if isinstance(verdict, Unscored):
            self._counts["unscored"] += 1
            self._unscored_reason = verdict.reason
            # Another completion takes its place, so that the group stays whole; but not without end.
            if group.next_index < 2 * self._group_size:
                self._request(group, 1)
        else:
            self._counts["scored"] += 1
            self._counts["passes"] += verdict.passed
            group.done.append(self._completion(group, sample, verdict))
        if group.open == 0:
            del self._groups[ticket[0]]
            self._finish(group)

    def _completion(self, group: _Group, sample: Sample, verdict: Verdict) -> Completion:
        one, request = group.assignment, sample.request
        ends, rewards = self._steps(group, sample, verdict)
        return Completion(
            group=one.group,
            index=request.index,
            task=one.number,
            family=one.task.family,
            seed=request.seed,
            prompt=group.prompt,
            tokens=sample.tokens,
            log_probs=sample.log_probs,
            kept=sample.kept,
            versions=sample.versions,
            finish=sample.finish,
            reward=verdict.reward,
            passed=verdict.passed,
            shaped=verdict.shaped,
            reason=verdict.reason,
            hint=one.hint,
            step_ends=ends,
            step_rewards=rewards,
        )

    def _steps(self, group: _Group, sample: Sample, verdict: Verdict) -> tuple[np.ndarray, np.ndarray]:
        """The verifier's steps, which end at characters, as token counts. A step that ends within the hint earned nothing."""
        if not verdict.steps:
            return np.zeros(0, np.int32), np.zeros(0, np.float32)
        hint, tokens = len(_hint(group.assignment)), sample.tokens.tolist()

        def characters(count: int) -> int:
            return hint + len(self._tokenizer.decode(tokens[:count]))

        own = [(end, reward) for end, reward in verdict.steps if end > hint]
        # The first token that brings the text as far as the step's end; the last one where it never does.
        places = [1 + bisect_left(range(1, len(tokens)), end, key=characters) for end, _ in own]
        return np.array(places, np.int32), np.array([reward for _, reward in own], np.float32)

    def _finish(self, group: _Group) -> None:
        one = group.assignment
        passes, attempts = sum(c.passed for c in group.done), len(group.done)
        fate = "unscored" if attempts < self._group_size else self._judge(passes, attempts)
        self._counts["groups"] += 1
        if fate == "kept":
            began = time.perf_counter()
            self._writer.append(to_rows(group.done))
            self._seconds["write_s"] += time.perf_counter() - began
        self._counts[f"{fate}_groups"] += 1
        self._outcomes.append(
            Outcome(one.group, one.number, passes, attempts, group.completions, group.tokens, fate, one.hint)
        )
        if len(self._examples) < EXAMPLES - 1 and group.done:
            ordered = sorted(group.done, key=lambda c: c.reward)
            for completion in (ordered[-1], ordered[0])[: 1 + (len(ordered) > 1)]:
                self._examples.append(self._example(group, completion))

    def _example(self, group: _Group, one: Completion) -> Example:
        return Example(
            one.family,
            group.assignment.task.prompt,
            _hint(group.assignment),
            self._tokenizer.decode(one.tokens.tolist()),
            one.reward,
            one.passed,
            one.reason,
            int(one.versions.max(initial=0)),
            one.group,
        )


def _hint(assignment: Assignment[Task]) -> str:
    """The beginning of the reference solution that the prompt ends with; something of the solution is left to find."""
    solution = assignment.task.solution or ""
    if not assignment.hint:
        return ""
    return solution[: min(max(1, int(len(solution) * assignment.hint)), max(0, len(solution) - 1))]
