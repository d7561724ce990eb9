"""The loop of an actor that samples groups: what it writes, what it tells of each group, and what it does when things fail."""

from __future__ import annotations

import secrets
import threading
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from actors.assignments import Assignment, Outcome
from actors.llm.engine import make_engine
from actors.llm.resample import resample
from actors.llm.rollout import EXAMPLES, MOST_FAILED, GroupRollout, GroupWriter
from actors.llm.seeds import sample_seed
from actors.llm.tasks import Task
from actors.llm.verifiers.pool import VerifierPool
from cluster.curriculum.filter import GroupFilter
from cluster.llm.parts import actor_status
from configs.llm import ModelSettings, SamplingSettings
from learners.llm.log_probs import token_log_probs
from learners.llm.models import Model, make_model, weights_bytes
from learners.llm.rows import SCHEMA, TABLE, ragged
from learners.llm.tokenizers import Tokenizer
from replay.queue_sampler import queue_sampler
from replay.queue_server import QueueServer
from replay.queue_spec import QueueSpec
from replay.queue_writers import CallQueueWriter, QueueWriter
from replay.queues import Queue
from replay.security import Security, flight_client
from tests.verifiers_for_tests import weight

SIZE, MOST, SEED = 4, 7, 11
EVEN, FRAGILE, BROKEN, SLOW, STEPWISE = (
    f"tests.verifiers_for_tests:{name}" for name in ("even", "fragile", "broken", "slow", "stepwise")
)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def model(seed: int = 0) -> Model:
    """With larger weights than at first, so that completions depend on their prompts and some end by themselves."""
    made = make_model(ModelSettings(layers=1, width=16, heads=2, inner=16), seed=seed)
    with torch.no_grad():
        for parameter in made.network.parameters():
            if parameter.ndim > 1:
                parameter.mul_(6.0)
    return made


def task(number: int, verifier: str = EVEN, **more: Any) -> Task:
    return Task(f"{number}:", "all", verifier, **more)


class Sampling:
    """A rollout with its queue, and the assignments it has yet to be given."""

    def __init__(
        self,
        folder: Path,
        tasks: Iterable[Task],
        *,
        hint: float = 0.0,
        judge: GroupFilter | None = None,
        pool: dict[str, Any] | None = None,
        tokenizer: Tokenizer | None = None,
        weights: bool = True,
        writer: GroupWriter | None = None,
        settings: dict[str, Any] | None = None,
        **options: Any,
    ) -> None:
        self.queue = Queue(QueueSpec(name=TABLE, schema=SCHEMA, capacity_bytes=1 << 22), folder / "queue")
        self.assigned = deque(Assignment(group, group, one, hint) for group, one in enumerate(tasks))
        self.count = len(self.assigned)
        self.outcomes: list[Outcome] = []
        made = model()
        self.settings = SamplingSettings(group_size=SIZE, **{"max_tokens": MOST, **(settings or {})})
        self.engine = make_engine(self.settings, made.network, end=made.tokenizer.end, slots=options.get("slots", 8))
        self.tokenizer = tokenizer or made.tokenizer
        self.rollout = GroupRollout(
            self.engine,
            self.tokenizer,
            VerifierPool(**{"processes": 1, "retries": 0, "timeout_s": 20.0, **(pool or {})}),
            writer or CallQueueWriter(self.queue),
            ask=self._ask,
            judge=(judge or GroupFilter(0.0, 1.0, SIZE)).verdict,
            group_size=SIZE,
            seed=SEED,
            **{"slots": 8, "prompts_ahead": 2, "lock_step": True, **options},
        )
        if weights:
            self.rollout.set_weights(1, weights_bytes(made.network))

    def _ask(self, count: int) -> Sequence[Assignment]:
        return [self.assigned.popleft() for _ in range(min(count, len(self.assigned)))]

    def run(self, steps: int = 10_000) -> list[Outcome]:
        """Step until every assignment has its outcome."""
        for _ in range(steps):
            self.rollout.step()
            self.outcomes += self.rollout.take_outcomes()
            if len(self.outcomes) == self.count:
                break
        return self.outcomes

    def rows(self) -> list[pa.RecordBatch]:
        """What the queue holds, group by group."""
        self.queue.open_reader("reader", "stream")
        found = []
        while self.queue.waiting_groups:
            delivery = self.queue.deliver("reader", "stream", groups=1, timeout_s=0.0)
            assert delivery is not None
            found.append(delivery.batch)
        return found

    def text(self, rows: pa.RecordBatch, row: int) -> str:
        return self.tokenizer.decode(ragged(rows, "tokens")[row].tolist())


@contextmanager
def sampling(folder: Path, tasks: Iterable[Task], **options: Any) -> Iterator[Sampling]:
    folder.mkdir(parents=True, exist_ok=True)
    made = Sampling(folder, tasks, **options)
    try:
        yield made
    finally:
        made.rollout.close()
        made.queue.close(remove=True)


def recomputed(network: torch.nn.Module, prompt: np.ndarray, tokens: np.ndarray, temperature: float) -> np.ndarray:
    sequence = torch.from_numpy(np.concatenate([prompt, tokens]).astype(np.int64))
    with torch.no_grad():
        logits = network(sequence[None]).logits[0, len(prompt) - 1 : -1]
    return token_log_probs(logits, sequence[len(prompt) :], temperature)[0].numpy()


def test_groups_are_written_whole_with_what_their_rows_must_tell(tmp_path: Path) -> None:
    with sampling(tmp_path, [task(n) for n in range(9)], settings={"temperature": 0.7}) as one:
        outcomes = one.run()
        found = one.rows()
        assert sorted(o.group for o in outcomes) == sorted(g.column("group")[0].as_py() for g in found)
        network, by_group = model().network, {o.group: o for o in outcomes}
        for rows in found:
            group = rows.column("group")[0].as_py()
            assert rows.schema.equals(SCHEMA)
            assert rows.num_rows == SIZE
            assert set(rows.column("group").to_pylist()) == {group}
            assert set(rows.column("group_size").to_pylist()) == {SIZE}
            assert sorted(rows.column("index").to_pylist()) == list(range(SIZE))
            assert set(rows.column("policy_version").to_pylist()) == {1}
            for row, values in enumerate(rows.to_pylist()):
                assert values["seed"] == sample_seed(SEED, task(group).key, group, values["index"])
                assert values["prompt"] == one.tokenizer.encode_prompt(f"{group}:")
                assert values["finish"] == ("stop" if values["tokens"][-1] == one.tokenizer.end else "length")
                assert len(values["tokens"]) == MOST or values["finish"] == "stop"
                text = one.text(rows, row)
                assert values["reason"] == text
                assert values["passed"] == (weight(text) % 2 == 0)
                assert (values["reward"], values["shaped"]) == (float(values["passed"]), 0.25)
                assert values["kept"] == [0.0] * len(values["tokens"])
                mine = recomputed(network, np.array(values["prompt"]), np.array(values["tokens"]), 0.7)
                np.testing.assert_allclose(values["log_probs"], mine, atol=1e-4)
            outcome = by_group[group]
            assert outcome.passes == sum(rows.column("passed").to_pylist())
            assert (outcome.attempts, outcome.sampled) == (SIZE, SIZE)
            assert outcome.units == len(ragged(rows, "tokens").values)
            assert outcome.fate == "kept"
        stats = one.rollout.stats()
        assert stats["samples"] == stats["scored"] == 9 * SIZE
        assert stats["passes"] == sum(o.passes for o in outcomes)
        assert stats["tokens"] == sum(o.units for o in outcomes)
        assert stats["groups"] == stats["kept_groups"] == 9
        assert stats["cut_off"] == sum(g.column("finish").to_pylist().count("length") for g in found)
        assert 0 < stats["cut_off"] < stats["samples"], "the model must end some completions by itself, and not all"
        parts = sum(stats[name] for name in ("decode_s", "verify_s", "write_s", "idle_s"))
        assert 0 < parts <= stats["wall_s"]


@pytest.mark.parametrize("truncation", [{}, {"top_k": 5}, {"top_p": 0.8, "temperature": 1.3}])
def test_a_row_of_the_queue_can_be_sampled_again(tmp_path: Path, truncation: dict[str, Any]) -> None:
    """In another engine, alone, from the seed in the row and the weights of its version."""
    with sampling(tmp_path, [task(n) for n in range(6)], settings=truncation) as one:
        one.run()
        found = one.rows()
        settings = one.settings
    fresh = model(seed=5)  # the weights come from what was published
    engine = make_engine(settings, fresh.network, end=fresh.tokenizer.end, slots=3)
    engine.load(1, weights_bytes(model().network))
    for rows in (found[3], found[0].slice(2, 1)):
        again = resample(engine, rows)
        assert len(again) == rows.num_rows
        for row, sample in enumerate(again):
            assert sample.tokens.tolist() == ragged(rows, "tokens")[row].tolist()
            np.testing.assert_allclose(sample.log_probs, ragged(rows, "log_probs")[row], atol=1e-5)
            np.testing.assert_allclose(sample.kept, ragged(rows, "kept")[row], atol=1e-5)
            assert sample.finish == rows.column("finish")[row].as_py()
    other = make_engine(settings, fresh.network, end=fresh.tokenizer.end, slots=3)
    other.load(1, weights_bytes(model(seed=5).network))
    assert any(
        s.tokens.tolist() != ragged(found[3], "tokens")[i].tolist() for i, s in enumerate(resample(other, found[3]))
    )
    engine.submit([again[0].request])
    with pytest.raises(ValueError, match="an engine with nothing to do"):
        resample(engine, found[0])


def test_a_completion_nobody_can_judge_is_replaced_by_the_next_and_never_has_a_reward(tmp_path: Path) -> None:
    with sampling(tmp_path, [task(n, FRAGILE) for n in range(12)]) as one:
        outcomes = one.run()
        found = one.rows()
        assert one.rollout.stats()["unscored"] > 0
        written = {g.column("group")[0].as_py() for g in found}
        assert written == {o.group for o in outcomes if o.fate == "kept"}
        replaced = 0
        for rows in found:
            assert rows.num_rows == SIZE
            indices = rows.column("index").to_pylist()
            assert len(set(indices)) == SIZE
            assert max(indices) < 2 * SIZE
            replaced += max(indices) >= SIZE
            for row in range(SIZE):
                assert weight(one.text(rows, row)) % 3 != 0
        assert replaced > 0
        for outcome in outcomes:
            assert outcome.fate in ("kept", "unscored")
            assert outcome.attempts == SIZE if outcome.fate == "kept" else outcome.attempts < SIZE
            assert SIZE <= outcome.sampled <= 2 * SIZE
        stats = one.rollout.stats()
        assert stats["samples"] == stats["scored"] + stats["unscored"] == sum(o.sampled for o in outcomes)


def test_a_group_that_cannot_be_judged_is_dropped_after_twice_its_size(tmp_path: Path) -> None:
    with sampling(tmp_path, [task(0, BROKEN), task(1), task(2, BROKEN)], hint=0.0) as one:
        by_group = {o.group: o for o in one.run()}
        for group in (0, 2):
            expected = Outcome(group, group, 0, 0, 2 * SIZE, by_group[group].units, "unscored")
            assert by_group[group] == expected
        assert by_group[1].fate == "kept"
        assert [g.column("group")[0].as_py() for g in one.rows()] == [1]
        stats = one.rollout.stats()
        assert (stats["unscored"], stats["scored"], stats["groups"], stats["kept_groups"]) == (4 * SIZE, SIZE, 3, 1)
        assert (stats["unscored_groups"], stats["too_hard_groups"], stats["too_easy_groups"]) == (2, 0, 0)
        assert (stats["verifier/errors"], stats["verifier/deaths"]) == (4 * SIZE, 0)
        status = actor_status(one.rollout, None)
        assert status["unscored_reason"] == one.rollout.unscored_reason
        assert "no opinion" in status["unscored_reason"]


def test_the_filter_decides_by_passes_and_every_assignment_has_one_outcome(tmp_path: Path) -> None:
    band = GroupFilter(0.5, 0.5, SIZE)
    with sampling(tmp_path, [task(n) for n in range(40)], judge=band) as one:
        outcomes = one.run()
        for _ in range(5):  # nothing more comes of them
            one.rollout.step()
        assert one.rollout.take_outcomes() == []
        assert Counter(o.group for o in outcomes) == Counter(range(40))
        assert {o.fate for o in outcomes} == {"kept", "too_easy", "too_hard"}
        for outcome in outcomes:
            assert outcome.fate == ("kept" if outcome.passes == 2 else "too_hard" if outcome.passes < 2 else "too_easy")
        found = one.rows()
        assert {g.column("group")[0].as_py() for g in found} == {o.group for o in outcomes if o.fate == "kept"}
        assert all(sum(g.column("passed").to_pylist()) == 2 for g in found)
        assert one.rollout.stats()["kept_groups"] == len(found) < one.rollout.stats()["groups"]


@pytest.mark.parametrize(
    ("solution", "share", "hint"),
    [("12345678", 0.25, "12"), ("12345678", 0.75, "123456"), ("12", 0.1, "1"), ("1", 0.75, ""), (None, 0.5, "")],
)
def test_a_hint_is_part_of_the_prompt_and_of_what_is_judged(
    tmp_path: Path, solution: str | None, share: float, hint: str
) -> None:
    with sampling(tmp_path, [task(3, solution=solution)], hint=share) as one:
        (outcome,) = one.run()
        assert outcome.hint == share
        (rows,) = one.rows()
        for row, values in enumerate(rows.to_pylist()):
            assert values["prompt"] == one.tokenizer.encode_prompt("3:") + (one.tokenizer.encode(hint))
            assert values["hint"] == pytest.approx(share)
            assert values["reason"] == hint + one.text(rows, row)
        examples = one.rollout.examples()
        assert {e.hint for e in examples} == {hint}
        assert {e.prompt for e in examples} == {"3:"}


def test_a_prompt_that_cannot_be_sampled_fails_alone(tmp_path: Path) -> None:
    longest = model().network.config.max_position_embeddings
    tasks = [task(0), Task("ü:", "all", EVEN), task(2), Task("1" * longest, "all", EVEN), task(4)]
    with sampling(tmp_path, tasks) as one:
        by_group = {o.group: o for o in one.run()}
        assert by_group[1] == Outcome(1, 1, 0, 0, 0, 0, "failed")
        assert by_group[3] == Outcome(3, 3, 0, 0, 0, 0, "failed")
        assert [by_group[group].fate for group in (0, 2, 4)] == ["kept"] * 3
        assert {g.column("group")[0].as_py() for g in one.rows()} == {0, 2, 4}
        assert one.rollout.stats()["failed"] == 2


def test_where_no_prompt_can_be_sampled_the_actor_says_so(tmp_path: Path) -> None:
    with (
        sampling(tmp_path, [Task(f"ü{n}:", "all", EVEN) for n in range(2 * MOST_FAILED)]) as one,
        pytest.raises(ValueError, match=rf"none of the first {MOST_FAILED} prompts can be sampled.*printable ASCII"),
    ):
        one.run()


def test_every_token_has_the_version_that_sampled_it(tmp_path: Path) -> None:
    with sampling(tmp_path, [task(n) for n in range(10)], settings={"max_tokens": 12}) as one:
        weights = weights_bytes(model(seed=1).network)
        sampled_with: dict[int, float] = {}
        for version in range(2, 40):
            sampled_with[version - 1] = one.rollout.stats()["engine/tokens"]
            one.rollout.step()
            one.outcomes += one.rollout.take_outcomes()
            one.rollout.set_weights(version, weights)
        one.run()
        versions: Counter[int] = Counter()
        mixed = 0
        for rows in one.rows():
            found = ragged(rows, "versions")
            for row in range(rows.num_rows):
                mine = found[row]
                versions.update(mine.tolist())
                assert len(mine) == len(ragged(rows, "tokens")[row])
                # A step of the engine between two versions: a completion's first gives two tokens, later ones give one.
                assert (np.diff(mine)[1:] == 1).all() or mine[-1] == 39
                assert set(np.diff(mine).tolist()) <= {0, 1}
                assert rows.column("policy_version")[row].as_py() == mine.min()
                mixed += mine[0] != mine[-1]
        assert mixed > 0
        ahead = {v: sampled_with[v + 1] - sampled_with[v] for v in range(1, 38)}
        assert {v: n for v, n in ahead.items() if n} == {v: n for v, n in versions.items() if v < 38}


@pytest.mark.parametrize(
    ("hold_back", "published", "used"),
    [
        (0, [1, 2, 3, 4], [1, 2, 3, 4]),
        (2, [1, 2, 3, 4, 5, 6], [1, 1, 1, 2, 3, 4]),
        (2, [1, 2, 5, 6, 9], [1, 1, 2, 2, 6]),  # an actor does not see every version
        (3, [57, 58, 59, 60, 61], [57, 57, 57, 57, 58]),  # after a resumption
    ],
)
def test_weights_are_held_back_by_version(
    tmp_path: Path, hold_back: int, published: list[int], used: list[int]
) -> None:
    with sampling(tmp_path, [], hold_back=hold_back, weights=False) as one:
        weights = weights_bytes(model().network)
        found = []
        for version in published:
            one.rollout.set_weights(version, weights)
            found.append(one.rollout.version)
        assert found == used


def test_examples_are_texts_of_best_and_worst_and_wait_in_limited_number(tmp_path: Path) -> None:
    with sampling(tmp_path, [task(n) for n in range(EXAMPLES)]) as one:
        outcomes = one.run()
        examples = one.rollout.examples()
        assert one.rollout.examples() == []
        assert EXAMPLES - 2 <= len(examples) <= EXAMPLES
        passes = {o.group: o.passes for o in outcomes}
        rows = {g.column("group")[0].as_py(): g for g in one.rows()}
        for best, worst in zip(examples[::2], examples[1::2], strict=True):
            assert best.group == worst.group
            assert best.reward == (1.0 if passes[best.group] else 0.0)
            assert worst.reward == (0.0 if passes[best.group] < SIZE else 1.0)
            assert best.passed == bool(best.reward)
            assert (best.prompt, best.hint, best.version) == (f"{best.group}:", "", 1)
            assert best.completion in [one.text(rows[best.group], row) for row in range(SIZE)]


class ThreeCharacters:
    """Every token is three characters long, but for the end."""

    pad, end, vocab_size = 0, 1, 99

    def encode(self, text: str) -> list[int]:
        return [int(text[i : i + 3]) for i in range(0, len(text), 3)]

    def encode_prompt(self, text: str, hint: str = "") -> list[int]:
        return [2, *self.encode(hint)]

    def decode(self, ids: Iterable[int]) -> str:
        return "".join(f"{index:03d}" for index in ids if index != self.end)


@pytest.mark.parametrize(
    ("hint", "ends", "expected"),
    [
        (0.0, [1, 3, 4, 7, 1000], [(1, 1.0), (1, 2.0), (2, 3.0), (3, 4.0), (None, 5.0)]),
        (0.5, [1, 3, 4, 6, 9, 10], [(1, 3.0), (1, 4.0), (2, 5.0), (3, 6.0)]),  # the first three characters were given
        (0.0, [0, 2], [(1, 2.0)]),  # nothing had been sampled where it ended
    ],
)
def test_steps_end_at_the_token_that_completes_them(
    tmp_path: Path, hint: float, ends: list[int], expected: list[tuple[int | None, float]]
) -> None:
    one_task = task(0, STEPWISE, data={"ends": ends}, solution="004005")
    with sampling(tmp_path, [one_task], hint=hint, tokenizer=ThreeCharacters()) as one:
        one.run()
        (rows,) = one.rows()
        for row in range(SIZE):
            length = len(ragged(rows, "tokens")[row])
            found = list(zip(ragged(rows, "step_ends")[row], ragged(rows, "step_rewards")[row], strict=True))
            assert found == [(min(end or length, length), reward) for end, reward in expected]


def test_in_lock_step_the_same_seeds_give_the_same_groups_in_the_same_order(tmp_path: Path) -> None:
    def groups(name: str, **options: Any) -> tuple[list[pa.RecordBatch], list[Outcome]]:
        tasks = [task(n, FRAGILE) for n in range(20)]
        with sampling(tmp_path / name, tasks, judge=GroupFilter(0.2, 0.8, SIZE), **options) as one:
            outcomes = one.run()
            return one.rows(), outcomes

    first, second = groups("a"), groups("b", pool={"processes": 3})
    assert first[1] == second[1]
    assert len(first[0]) > 3
    assert all(x.equals(y) for x, y in zip(first[0], second[0], strict=True))
    # Out of step only the order differs: a completion follows from its seed and the weights.
    free = groups("c", lock_step=False, slots=5)
    assert sorted(free[1], key=lambda o: o.group) == sorted(first[1], key=lambda o: o.group)

    def tokens(found: list[pa.RecordBatch]) -> dict[tuple[int, int], list[int]]:
        return {(r["group"], r["index"]): r["tokens"] for rows in found for r in rows.to_pylist()}

    assert tokens(free[0]) == tokens(first[0])


def test_a_full_queue_holds_the_actor_back_and_drops_nothing(tmp_path: Path) -> None:
    security = Security(token=secrets.token_hex(16))
    connect = partial(flight_client, security=security)
    spec = QueueSpec(name=TABLE, schema=SCHEMA, capacity_bytes=1 << 22, max_waiting_groups=2)
    server = QueueServer(spec, security, run="a", index=0, directory=str(tmp_path))
    writer = QueueWriter(server.address, SCHEMA, table=TABLE, name="actor-0-0", in_flight=2, connect=connect)
    done = threading.Event()
    count = 12
    made: list[Sampling] = []

    def act() -> None:
        with sampling(tmp_path / "actor", [task(n) for n in range(count)], writer=writer) as one:
            made.append(one)
            one.run()
            done.set()

    actor = threading.Thread(target=act)
    actor.start()
    try:
        deadline = time.monotonic() + 20.0
        while writer.waiting_for is None and time.monotonic() < deadline:
            time.sleep(0.02)
        assert writer.waiting_for is not None
        before = made[0].rollout.stats()
        time.sleep(0.5)
        assert not done.is_set()
        assert made[0].rollout.stats() == before  # it samples nothing meanwhile
        assert before["groups"] < count
        reader = queue_sampler([server.address], SCHEMA, table=TABLE, groups=1, connect=connect)
        seen = []
        for _ in range(count):
            batch = reader.sample(20.0, version=1)
            assert batch.sizes == [SIZE]
            seen.append(batch.rows.column("group")[0].as_py())
            reader.acknowledge(batch)
        reader.flush()
        assert sorted(seen) == list(range(count))
        assert done.wait(20.0)
        stats = server.queue.stats()
        assert stats["inserted_groups"] == stats["consumed_groups"] == count
        assert stats["dropped_stale_groups"] == stats["dropped_incomplete_groups"] == 0
        reader.close()
    finally:
        actor.join(30.0)
        server.close()


def test_slow_verifiers_hold_sampling_back(tmp_path: Path) -> None:
    tasks = [task(n, SLOW, data={"seconds": 0.01}) for n in range(40)]
    with sampling(tmp_path, tasks, lock_step=False, settings={"max_tokens": 1}) as one:
        most = 0
        while len(one.outcomes) < 8:
            one.rollout.step()
            one.outcomes += one.rollout.take_outcomes()
            begun = (one.count - len(one.assigned)) * SIZE
            most = max(most, begun - int(one.rollout.stats()["scored"]))
        assert most <= 8 + 8 + 2 * SIZE + SIZE  # judged and running as many as there are slots each, and those ahead


def test_groups_that_are_open_at_the_end_leave_nothing_behind(tmp_path: Path) -> None:
    with sampling(tmp_path, [task(n) for n in range(30)], lock_step=False) as one:
        while not one.outcomes:
            one.rollout.step()
            one.outcomes += one.rollout.take_outcomes()
        for _ in range(3):
            one.rollout.step()
            one.outcomes += one.rollout.take_outcomes()
        assert len(one.assigned) < 30 - len(one.outcomes), "some groups must be open"
        one.rollout.close()
        stats = one.queue.stats()
        assert stats["waiting_groups"] == len(one.outcomes)
        assert stats["incomplete_groups"] == stats["dropped_incomplete_groups"] == 0
        assert all(rows.num_rows == SIZE for rows in one.rows())
        with pytest.raises(RuntimeError, match="closed"):
            one.rollout.step()
