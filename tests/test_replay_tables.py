"""Tables over one storage: what they serve, what they drop and when, priorities, and weights."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from replay.layout import TableSpec
from replay.limiter import RateLimiter
from replay.rate_limit import RateLimit
from replay.samplers import CallSource, Sampler
from replay.schema import SchemaError, Window
from replay.selectors import SELECTORS
from replay.shard import Shard
from replay.writers import CallWriter

from .replay_for_tests import SCHEMA, draw_all, end, make_shard, numbered

ORDERED = ("fifo", "lifo", "max_heap", "min_heap")
ONE_STEP = Window()


def lane(count: int, writer: CallWriter, first: int = 0, number: int = 0) -> None:
    """Write steps of one episode that goes on."""
    writer.append(np.full(count, number, np.int32), numbered(count, first))


def drawn(shard: Shard, table: str, count: int) -> list[int]:
    """The numbers of the next items, none where the table has none to give."""
    found = shard.sample(table, 1, count, ONE_STEP, timeout_s=0.0)
    return [] if found is None else found[1].steps["policy_version"][:, 0].tolist()


@dataclass
class Held:
    """What a table holds of one step."""

    priority: float
    times: int


def contents(shard: Shard) -> tuple[set[int], dict[str, dict[int, Held]]]:
    """(numbers of all steps stored, of each table number → what it holds)."""
    _, segments = shard.copy()
    stored: set[int] = set()
    tables: dict[str, dict[int, Held]] = {name: {} for name in shard.tables}
    for copied in segments:
        assert copied.rows is not None
        numbers = copied.rows["policy_version"].tolist()
        stored |= set(numbers)
        for name, known in copied.tables.items():
            for k in np.flatnonzero(known.member).tolist():
                priority = 1.0 if known.priority is None else float(known.priority[k])
                times = 0 if known.times_sampled is None else int(known.times_sampled[k])
                tables[name][numbers[k]] = Held(priority, times)
    return stored, tables


def ids_of(shard: Shard, table: str) -> dict[int, int]:
    """Number → stable id of a table's items."""
    batch = draw_all(shard, table=table)
    return dict(zip(batch.steps["policy_version"][:, 0].tolist(), batch.item.tolist(), strict=True))


# -------------------------------------------------------- selectors and removers


def in_order(selector: str, priorities: dict[int, float], newest_first: list[int]) -> list[int]:
    """Items as an ordered selector serves them; those of equal priority in the order of their rows."""
    match selector:
        case "fifo":
            return newest_first[::-1]
        case "lifo":
            return newest_first
        case "max_heap":
            return sorted(newest_first, key=lambda number: (-priorities[number], number))
        case _:
            return sorted(newest_first, key=lambda number: (priorities[number], number))


@pytest.mark.parametrize("remover", SELECTORS)
@pytest.mark.parametrize("selector", SELECTORS)
def test_a_full_table_drops_what_its_remover_picks_and_serves_the_rest(selector: str, remover: str) -> None:
    table = TableSpec("t", selector, remover=remover, max_size=12, priority_exponent=1.0)  # type: ignore[arg-type]
    shard = make_shard(tables=(TableSpec("all"), table), segment_steps=4)
    writer = CallWriter(shard)
    lane(13, writer)
    ids = ids_of(shard, "all")
    priorities = {number: 1.0 + number * 5 % 12 for number in range(12)}  # 1 … 12 in a mixed order
    shard.update_priorities("t", np.array([ids[n] for n in range(12)]), np.array([priorities[n] for n in range(12)]))
    lane(5, writer, first=13)
    known = {"max_heap", "min_heap", "prioritised"} & {selector, remover}
    highest = max(priorities.values())  # that of new items
    priorities = {number: priorities.get(number, highest) if known else 1.0 for number in range(17)}
    _, held = contents(shard)
    left = set(held["t"])
    assert len(left) == 12
    if remover in ORDERED:
        assert left == set(range(17)) - set(in_order(remover, priorities, list(range(16, -1, -1)))[:5])
    assert set(held["all"]) == set(range(17))
    stats = shard.stats()["tables"]["t"]
    assert (stats["items"], stats["inserted"], stats["deleted"]) == (12, 17, 5)
    limiter = shard.tables["t"].limiter
    assert isinstance(limiter, RateLimiter)
    assert (limiter.inserted, limiter.removed) == (18, 5)  # the newest step counts already: it will be an item
    newest_first = sorted(left, reverse=True)
    if selector in ORDERED:
        assert drawn(shard, "t", 12) == in_order(selector, priorities, newest_first)
    else:
        weight = {number: priorities[number] if selector == "prioritised" else 1.0 for number in left}
        found = shard.sample("t", 500, 500, ONE_STEP, timeout_s=0.0)
        assert found is not None
        numbers = found[1].steps["policy_version"][:, 0].tolist()
        assert set(numbers) <= left
        expected = [weight[number] / sum(weight.values()) for number in numbers]
        np.testing.assert_allclose(found[1].probability, expected, rtol=1e-12)


@pytest.mark.parametrize("remover", ["uniform", "max_heap", "prioritised"])
@pytest.mark.parametrize("selector", ["fifo", "lifo"])
def test_items_are_served_by_age_also_where_many_come_within_a_microsecond(selector: str, remover: str) -> None:
    table = TableSpec("steps", selector, remover=remover, max_size=4000)  # type: ignore[arg-type]
    shard = make_shard(capacity=4096, segment_steps=64, tables=(table,))
    writer = CallWriter(shard)
    lane(2001, writer)
    for k in range(50):
        lane(4, writer, first=2001 + 4 * k)
    assert drawn(shard, "steps", 2200) == sorted(range(2200), reverse=selector == "lifo")


@pytest.mark.parametrize("selector", SELECTORS)
@pytest.mark.parametrize(("times", "batch"), [(1, 4), (2, 3), (3, 100)])
def test_an_item_is_drawn_as_often_as_it_may_be_and_then_leaves(selector: str, times: int, batch: int) -> None:
    table = TableSpec("t", selector, max_times_sampled=times)  # type: ignore[arg-type]
    shard = make_shard(tables=(table, TableSpec("all")))
    lane(12, CallWriter(shard))
    seen: Counter[int] = Counter()
    while found := drawn(shard, "t", batch):
        seen.update(found)
        stats = shard.stats()["tables"]["t"]
        assert stats["sampled"] == sum(seen.values())
        assert stats["items"] == sum(seen[number] < times for number in range(11))
        assert max(seen.values()) <= times
        _, held = contents(shard)
        assert {number: known.times for number, known in held["t"].items()} == {
            number: seen[number] for number in range(11) if seen[number] < times
        }
    assert seen == Counter(dict.fromkeys(range(11), times))
    limiter = shard.tables["t"].limiter
    assert isinstance(limiter, RateLimiter)
    assert (limiter.inserted, limiter.sampled, limiter.removed) == (12, 11 * times, 11)
    assert shard.tables["all"].items == 11


def test_fewer_draws_than_asked_for_at_least_wait_for_more_items() -> None:
    shard = make_shard(tables=(TableSpec("t", "fifo", max_times_sampled=2),))
    writer = CallWriter(shard)
    lane(3, writer)
    assert shard.sample("t", 5, 8, ONE_STEP, timeout_s=0.01) is None
    assert shard.stats()["tables"]["t"]["sampled"] == 0
    lane(1, writer, first=3)
    found = shard.draw("t", 5, 8, timeout_s=0.0)
    assert found is not None
    assert 5 <= len(found) <= 6


# ------------------------------------------------------------------ shared storage


def test_rows_stay_for_as_long_as_a_table_needs_them_and_no_longer() -> None:
    # 24 rows: one table keeps its oldest items for ever, another the newest eight.
    oldest = TableSpec("oldest", "uniform", remover="lifo", max_size=3)
    newest = TableSpec("newest", "uniform", remover="fifo", max_size=8)
    shard = make_shard(capacity=24, segment_steps=4, tables=(oldest, newest))
    writer = CallWriter(shard)
    written = 0
    for k in range(200):
        count = 1 + k % 3
        lane(count, writer, first=written)
        written += count
        _, held = contents(shard)
        items = range(written - 1)
        assert set(held["oldest"]) == set(items[:3])
        assert set(held["newest"]) == set(items[-8:])
    # Their windows reach into the segment after theirs, and end where the next one is gone.
    windows = draw_all(shard, 6, table="oldest")
    assert windows.steps["policy_version"][0].tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert windows.steps["policy_version"][2].tolist() == [2, 3, 4, 5, 6, 7, 7]
    assert windows.length.tolist() == [6, 6, 5]


def test_a_copy_leads_from_a_segment_only_to_the_one_its_lane_went_on_in() -> None:
    table = TableSpec("oldest", remover="lifo", max_size=3)
    shard = make_shard(capacity=24, segment_steps=4, tables=(table,))
    writer = CallWriter(shard)
    for k in range(50):
        lane(2, writer, first=2 * k)
    _, copied = shard.copy()
    segments = {segment.sequence: segment for segment in copied}
    for segment in segments.values():
        if segment.following in segments:
            rows, following = segment.rows, segments[segment.following].rows
            assert rows is not None
            assert following is not None
            assert following["policy_version"][0] == rows["policy_version"][-1] + 1
    assert segments[0].following == 1
    assert segments[1].following == -1  # its successor has been filled with others since


def test_an_item_in_a_recycled_row_has_not_been_sampled() -> None:
    shard = make_shard(capacity=16, segment_steps=4, tables=(TableSpec("t", "fifo", max_times_sampled=3),))
    writer = CallWriter(shard)
    lane(13, writer)
    assert drawn(shard, "t", 12) == list(range(12))
    lane(20, writer, first=13)
    _, held = contents(shard)
    assert {number: known.times for number, known in held["t"].items()} == dict.fromkeys(range(20, 32), 0)


def test_where_all_segments_hold_items_the_oldest_goes() -> None:
    # Segments that were freed early were filled again out of turn.
    table = TableSpec("steps", max_times_sampled=1)
    shard = make_shard(capacity=32, segment_steps=4, tables=(table,))
    writer = CallWriter(shard)
    rng = np.random.default_rng(0)
    written = 0
    for _ in range(300):
        count = int(rng.integers(1, 6))
        lane(count, writer, first=written, number=0)
        written += count
        before = contents(shard)
        if rng.random() < 0.4:
            assert drawn(shard, "steps", int(rng.integers(1, 12)))
        if before[1]["steps"] and (found := shard.sample("steps", 1, 1, Window(5), timeout_s=0.0)):
            window = found[1]
            first, length = int(window.steps["policy_version"][0, 0]), int(window.length[0])
            assert window.steps["policy_version"][0].tolist() == [first + min(k, length) for k in range(6)]


@dataclass
class Model:
    """What a table should hold: numbers in the order in which they became items."""

    spec: TableSpec
    items: dict[int, Held] = field(default_factory=dict)
    inserted: int = 0
    highest: float = 1.0

    def victims(self, count: int) -> list[int] | None:
        """Which leave; None where that is left to chance."""
        numbers = list(self.items)
        match self.spec.remover:
            case "fifo":
                return numbers[:count]
            case "lifo":
                return numbers[len(numbers) - count :]
        return None


TABLES = (
    TableSpec("uniform", stride=2, max_size=7),
    TableSpec("prioritised", "prioritised", priority_exponent=0.5, max_size=9, remover="min_heap"),
    TableSpec("once", "fifo", max_times_sampled=1, max_size=15, remover="lifo"),
    TableSpec("heap", "max_heap", stride=3, max_size=6, remover="uniform"),
    TableSpec("lifo", "lifo", max_times_sampled=2),
)


@st.composite
def operations(draw: st.DrawFn) -> list[tuple[str, int, int, int]]:
    kinds = st.sampled_from(["write", "write", "draw", "update"])
    return draw(
        st.lists(
            st.tuples(kinds, st.integers(0, len(TABLES) - 1), st.integers(1, 9), st.integers(0, 10**6)),
            min_size=1,
            max_size=25,
        )
    )


@settings(max_examples=80)
@given(operations(), st.integers(5, 9), st.integers(2, 6))
def test_tables_hold_what_the_reference_holds(
    todo: list[tuple[str, int, int, int]], segments: int, segment_steps: int
) -> None:
    shard = make_shard(capacity=segments * segment_steps, segment_steps=segment_steps, tables=TABLES)
    writer = CallWriter(shard)
    models = {table.name: Model(table) for table in TABLES}
    ids: dict[int, int] = {}  # number → id, of everything ever drawn
    evicted: Counter[str] = Counter()
    going: dict[int, tuple[int, int]] = {}  # lane → its newest step, its index, while the episode goes on
    written = 0
    for kind, which, count, seed in todo:
        rng = np.random.default_rng(seed)
        model = models[TABLES[which].name]
        name = model.spec.name
        if kind == "write":
            number = seed % 3
            rows = numbered(count, written)
            rows["is_first"][0] = number not in going
            if seed % 4 == 0:
                end(rows, terminal=True)
            writer.append(np.full(count, number, np.int32), rows)
            previous = going.get(number)
            new: list[tuple[int, int]] = []
            for step in range(written, written + count):
                if previous is not None:
                    new.append(previous)
                previous = step, 0 if previous is None else previous[1] + 1
            assert previous is not None
            going[number] = previous
            if seed % 4 == 0:
                del going[number]
            written += count
            stored, held = contents(shard)
            for known in models.values():
                for step, index in new:
                    if index % known.spec.stride == 0:
                        known.items[step] = Held(known.highest, 0)
                        known.inserted += 1
                known.items = {step: value for step, value in known.items.items() if step in stored}
                actual = held[known.spec.name]
                if (over := len(known.items) - (known.spec.max_size or 10**9)) > 0:
                    assert set(actual) <= set(known.items)
                    victims = known.victims(over)
                    if victims is None:
                        victims = sorted(set(known.items) - set(actual))
                        assert len(victims) == over
                    if known.spec.remover == "min_heap":
                        lowest = sorted(value.priority for value in known.items.values())[:over]
                        np.testing.assert_allclose(sorted(known.items[v].priority for v in victims), lowest)
                    for step in victims:
                        del known.items[step]
        elif kind == "draw":
            found = shard.sample(name, 1, count, Window(3), timeout_s=0.0)
            most = model.spec.max_times_sampled
            if found is None:
                assert not model.items
                continue
            steps = found[1].steps["policy_version"]
            for window, length in zip(steps.tolist(), found[1].length.tolist(), strict=True):
                assert window[0] in model.items
                assert 1 <= length <= 3
                assert window == sorted(window)
            if model.spec.selector == "max_heap":
                best = sorted((value.priority for value in model.items.values()), reverse=True)
                assert found[0].key is not None
                np.testing.assert_allclose(
                    found[0].key, np.resize(best[:count], len(steps)), err_msg="not the best, best first"
                )
            elif model.spec.selector != "uniform" and model.spec.selector != "prioritised":
                order = list(model.items)
                order = order if model.spec.selector == "fifo" else order[::-1]
                assert steps[0, 0] == order[0]
            for step, item in zip(steps[:, 0].tolist(), found[1].item.tolist(), strict=True):
                assert ids.setdefault(step, item) == item
                if most is not None:
                    model.items[step].times += 1
                    assert model.items[step].times <= most
            if most is not None:
                model.items = {step: value for step, value in model.items.items() if value.times < most}
        elif ids:
            chosen = rng.choice(sorted(ids), count)
            chosen = np.unique(chosen)
            priorities = rng.random(len(chosen)) * 3 + 0.01
            shard.update_priorities(name, np.array([ids[step] for step in chosen.tolist()]), priorities)
            there = [k for k, step in enumerate(chosen.tolist()) if step in model.items]
            evicted[name] += len(chosen) - len(there)
            for k in there:
                model.items[int(chosen[k])].priority = float(priorities[k])
                model.highest = max(model.highest, float(priorities[k]))
        stored, held = contents(shard)
        for name, known in models.items():
            assert set(held[name]) == set(known.items), name
            stats = shard.stats()["tables"][name]
            assert stats["items"] == len(known.items)
            assert (stats["inserted"], stats["deleted"]) == (known.inserted, known.inserted - len(known.items))
            assert stats["evicted_updates"] == evicted[name]
            limiter = shard.tables[name].limiter
            assert isinstance(limiter, RateLimiter)
            assert limiter.removed == known.inserted - len(known.items)
            if known.spec.max_times_sampled is not None:
                assert {n: value.times for n, value in held[name].items()} == {
                    n: value.times for n, value in known.items.items()
                }
            if known.spec.selector in ("prioritised", "max_heap"):
                assert {n: value.priority for n, value in held[name].items()} == pytest.approx(
                    {n: value.priority for n, value in known.items.items()}
                )
        weights = [value.priority**0.5 for value in models["prioritised"].items.values()]
        assert shard.tables["prioritised"].mass == pytest.approx(sum(weights))


# ------------------------------------------------------------ priorities and weights


def test_priorities_go_by_stable_id_and_those_of_evicted_items_are_counted() -> None:
    shard = make_shard(capacity=16, segment_steps=4, tables=(TableSpec("steps", "prioritised", priority_exponent=0.5),))
    writer = CallWriter(shard)
    lane(9, writer)
    ids = ids_of(shard, "steps")
    lane(11, writer, first=9)  # steps 0 to 3 are overwritten
    shard.update_priorities("steps", np.array([ids[0], ids[5], ids[3], ids[6]]), np.array([100.0, 4.0, 100.0, 9.0]))
    _, held = contents(shard)
    expected = {number: Held({5: 4.0, 6: 9.0}.get(number, 1.0), 0) for number in range(4, 19)}
    assert {n: h.priority for n, h in held["steps"].items()} == pytest.approx(
        {n: h.priority for n, h in expected.items()}
    )
    assert shard.tables["steps"].mass == pytest.approx(13 + 2 + 3)
    assert shard.stats()["tables"]["steps"]["evicted_updates"] == 2
    lane(1, writer, first=20)  # new items have the highest priority of a known item, not that of an evicted one
    _, held = contents(shard)
    assert held["steps"][19].priority == pytest.approx(9.0)


@pytest.mark.parametrize("selector", ["prioritised", "max_heap"])
@pytest.mark.parametrize("wrong", [np.nan, np.inf, -1.0])
def test_what_is_no_priority_is_refused_and_nothing_is_changed(selector: str, wrong: float) -> None:
    shard = make_shard(tables=(TableSpec("steps", selector),))  # type: ignore[arg-type]
    lane(5, CallWriter(shard))
    ids = ids_of(shard, "steps")
    before = contents(shard)
    items = np.array([ids[0], 10**9, ids[1]])  # of which one was never there
    with pytest.raises(SchemaError, match=r"expected a finite number >= 0"):
        shard.update_priorities("steps", items, np.array([2.0, 1.0, wrong]))
    assert contents(shard) == before
    assert shard.stats()["tables"]["steps"]["evicted_updates"] == 0


def test_unknown_tables_are_named() -> None:
    shard = make_shard(tables=(TableSpec("a"), TableSpec("b")))
    with pytest.raises(SchemaError, match=r"expected a table of shard 0, which has a, b; received 'c'"):
        shard.draw("c", 1, 1, timeout_s=0.0)


def test_weights_undo_the_preference_of_a_draw_over_all_shards() -> None:
    # Schaul et al. 2016, section 3.4: w_i = (N P(i))^-beta / max_j w_j with N and P of the whole table.
    alpha, beta = 0.7, 0.4
    table = TableSpec("steps", "prioritised", priority_exponent=alpha)
    shards = [make_shard(index=index, tables=(table,)) for index in range(2)]
    rng = np.random.default_rng(3)
    priorities: dict[tuple[int, int], float] = {}
    for index, count in enumerate((60, 9)):
        lane(count + 1, CallWriter(shards[index]))
        ids = ids_of(shards[index], "steps")
        values = rng.random(count) * 10 ** (2.0 * index)
        shards[index].update_priorities("steps", np.array([ids[n] for n in range(count)]), values)
        priorities |= {(index, n): float(values[n]) for n in range(count)}
    total = sum(priority**alpha for priority in priorities.values())
    sources = [CallSource(shard, window=ONE_STEP) for shard in shards]
    sampler = Sampler(sources, SCHEMA, window=ONE_STEP, batch_size=256, seed=0, table=table)
    batch = sampler.sample(1.0)
    assert batch.size == len(priorities) == 69
    drawn_from = list(zip(batch.shard.tolist(), batch.steps["policy_version"][:, 0].tolist(), strict=True))
    assert {shard for shard, _ in drawn_from} == {0, 1}
    probability = np.array([priorities[key] ** alpha / total for key in drawn_from])
    np.testing.assert_allclose(batch.probability, probability, rtol=1e-9)
    weights = (69 * probability) ** -beta
    np.testing.assert_allclose(batch.importance_weights(beta), weights / weights.max(), rtol=1e-5)
    assert batch.importance_weights(0.0).tolist() == [1.0] * 256
    # An expectation under the draw, weighted with beta = 1, is the plain mean over the table.
    full = np.array([priority**alpha / total for priority in priorities.values()])
    assert np.isclose((full * (69 * full) ** -1.0).sum(), 1.0)


def test_strides_count_from_the_start_of_each_episode() -> None:
    shard = make_shard(tables=(TableSpec("all"), TableSpec("third", stride=3)), segment_steps=4)
    writer = CallWriter(shard)
    for first in (0, 8):
        rows = numbered(8, first)
        rows["is_first"][0] = True
        end(rows, terminal=True)
        writer.append(np.zeros(8, np.int32), rows)
    assert sorted(ids_of(shard, "third")) == [0, 3, 6, 8, 11, 14]
    assert sorted(ids_of(shard, "all")) == [*range(7), *range(8, 15)]
    assert [shard.tables[name].inserted for name in ("all", "third")] == [14, 6]


def test_every_table_counts_the_time_of_inserts() -> None:
    shard = make_shard(tables=(TableSpec("a"), TableSpec("b")))
    lane(50, CallWriter(shard))
    tables = shard.stats()["tables"]
    assert tables["a"]["time/inserting_s"] > 0
    assert tables["b"]["time/inserting_s"] > 0


def test_a_source_with_fewer_items_that_may_be_drawn_than_asked_for_gives_none() -> None:
    table = TableSpec("steps", "prioritised", max_times_sampled=1)
    shard = make_shard(tables=(table,))
    lane(9, CallWriter(shard))
    _, held = contents(shard)
    rows = np.arange(8)
    shard.update_priorities("steps", shard._storage.item_ids(rows), np.where(rows < 3, 1.0, 0.0))
    assert len(held["steps"]) == 8
    source = CallSource(shard, window=ONE_STEP)
    out = Sampler([source], SCHEMA, window=ONE_STEP, batch_size=6, seed=0).buffers()
    out.frame_count = 0
    assert not source.take(6, out, 0, 0.0)
    assert out.frame_count == 0


# -------------------------------------------------------------------- uniformity


def chi_square(counts: np.ndarray, expected: np.ndarray) -> float:
    """Pearson's statistic, in standard deviations above its mean (it is near normal for so many cells)."""
    freedom = len(counts) - 1
    statistic = float((((counts - expected) ** 2) / expected).sum())
    return float((statistic - freedom) / np.sqrt(2 * freedom))


def fill(shard: Shard, lanes: int, count: int) -> None:
    """Lanes of `count` rows with episodes of uneven length."""
    writer = CallWriter(shard)
    for number in range(lanes):
        rows = numbered(count, number * count)
        rows["is_first"][0] = True
        for k in range(5 + number, count - 1, 11 + number):
            end(rows[: k + 1], terminal=True)
            rows["is_first"][k + 1] = True
        writer.append(np.full(count, number, np.int32), rows)


@pytest.mark.parametrize("rare", [False, True], ids=["guessed", "listed"])
def test_draws_are_uniform_over_items(rare: bool) -> None:
    # 200 draws per item: were half of the items 10 % likelier than the others, the statistic would lie
    # about 22 standard deviations above its mean; 4 is passed by chance 3 times in 100 000.
    shard = make_shard(capacity=64 * 1024 if rare else 1024, segment_steps=1024 if rare else 16)
    fill(shard, lanes=7, count=20 if rare else 140)
    items = shard.tables["steps"].items
    found = shard.sample("steps", 200 * items, 200 * items, ONE_STEP, timeout_s=0.0)
    assert found is not None
    assert np.all(found[1].probability == 1.0 / items)
    ids, counts = np.unique(found[1].item, return_counts=True)
    assert len(ids) == items
    assert abs(chi_square(counts, np.full(len(ids), 200.0))) < 4


def test_a_sampler_draws_as_from_one_table() -> None:
    shards = [make_shard(index=0, seed=1), make_shard(index=1, seed=1)]
    fill(shards[0], lanes=6, count=150)
    fill(shards[1], lanes=1, count=120)
    sources = [CallSource(shard, window=Window(2)) for shard in shards]
    sampler = Sampler(sources, SCHEMA, window=Window(2), batch_size=500, seed=5)
    total = sum(source.items for source in sources)
    out = sampler.buffers()
    keys = []
    for _ in range(400):
        batch = sampler.sample(1.0, out)
        assert np.allclose(batch.probability, 1.0 / total, rtol=1e-12)
        keys.append(batch.shard * 10**9 + batch.item)
    ids, counts = np.unique(np.concatenate(keys), return_counts=True)
    assert len(ids) == total
    # 200 000 draws over about 900 items: shares off by 10 % in half of the items would lie 24 deviations off.
    assert abs(chi_square(counts, np.full(total, 200_000 / total))) < 4
    # And the shards' shares alone, which a per-item test would see only faintly: within 4 binomial deviations.
    share = sources[1].items / total
    of_second = int(counts[ids >= 10**9].sum())
    assert abs(of_second - 200_000 * share) < 4 * np.sqrt(200_000 * share * (1 - share))


def test_the_same_seed_draws_the_same() -> None:
    found = []
    for _ in range(2):
        shard = make_shard(seed=3)
        fill(shard, lanes=3, count=100)
        batch = shard.sample("steps", 256, 256, Window(3), timeout_s=0.0)
        assert batch is not None
        found.append(batch[1])
    for name in ("steps", "length", "item", "probability"):
        assert np.array_equal(getattr(found[0], name), getattr(found[1], name))


def test_sampling_an_empty_shard_waits_and_says_so() -> None:
    shard = make_shard(limiters={"steps": RateLimiter(RateLimit.from_min_size(5))})
    assert shard.sample("steps", 1, 1, ONE_STEP, timeout_s=0.01) is None
    sampler = Sampler([CallSource(shard, window=ONE_STEP)], SCHEMA, window=ONE_STEP, batch_size=8, seed=0)
    with pytest.raises(TimeoutError, match=r"shard 0 gave no windows within 0\.01 s"):
        sampler.sample(0.01)
