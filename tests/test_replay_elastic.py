"""A service whose shards join, leave and move while actors write to it and learners read from it."""

from __future__ import annotations

import math
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from replay.handover import Bundle, HandOverError, deal, make_plan
from replay.layout import TableSpec
from replay.rate_limit import RateLimit
from replay.samplers import CallSource, Sampler, stream_sampler
from replay.schema import Window, WindowBatch
from replay.shard import ShardLeavingError
from replay.writers import FlightWriter
from tests.elastic_for_tests import LANE, Service, Stored, actor, check_episodes, numbers, service, steps
from tests.shards_for_tests import FRAMES, SCHEMA, SECURITY, check_whole, connect, mixed, spec_of, wait_until

EPISODE = 10


@pytest.fixture
def memory() -> Iterator[Path]:
    with TemporaryDirectory(prefix="millrace-elastic-", dir="/dev/shm") as folder:
        yield Path(folder)


def all_rows(made: Service) -> list[Stored]:
    return [row for number in made.shards for row in made.stored(number)]


def check_limiter(made: Service) -> None:
    """The leader's counters are those of a recount, and no item was counted twice. No writer and no reader is open."""
    made.settle()
    leader = made.shards[0].stats()["tables"]["steps"]["limiter"]
    tables = [made.table(number) for number in made.shards]
    rows = all_rows(made)
    items = sum(row.successor is not None for row in rows)
    assert sum(table["items"] for table in tables) == items
    assert leader["inserted"] - leader["removed"] == items
    assert leader["inserted"] == sum(table["inserted"] for table in [*tables, *made.gone])
    assert leader["sampled"] == sum(table["sampled"] for table in [*tables, *made.gone])
    assert sum(table["received"] for table in [*tables, *made.gone]) == sum(
        table["handed_over"] for table in [*tables, *made.gone]
    )


# -------------------------------------------------------------------------------------------------------- any changes

CHANGES = st.lists(
    st.one_of(
        st.tuples(st.just("write"), st.dictionaries(st.integers(0, 5), st.integers(1, 45), min_size=1)),
        st.tuples(st.just("route"), st.booleans()),
        st.tuples(st.just("join"), st.booleans()),
        st.tuples(st.just("leave"), st.integers(0, 3)),
    ),
    min_size=4,
    max_size=24,
)


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(CHANGES, st.integers(0, 3))
def test_whatever_joins_and_leaves_every_row_is_there_once(
    memory: Path, changes: list[tuple[str, object]], first: int
) -> None:
    with service(spec_of(memory, capacity=8192, segment_steps=16), 2) as made:
        with actor(made.routes, first=first, episode=EPISODE) as writing:
            forced = False
            for kind, what in changes:
                if kind == "write":
                    assert isinstance(what, dict)
                    writing.write(what)
                elif kind == "join" and len(made.shards) < 4:
                    made.join()
                elif kind == "leave" and len(made.shards) > 1:
                    assert isinstance(what, int)
                    leaving = sorted(made.shards)[1:][what % (len(made.shards) - 1)]
                    left = {number: address for number, address in made.routes.items() if number != leaving}
                    writing.writer.route(left, within_s=0.0)
                    writing.writer.append(np.empty(0, np.int32), SCHEMA.zeros(0))
                    wait_until(lambda: made.shards[leaving].stats()["writers"] == 0)  # noqa: B023
                    forced = True
                    assert made.leave(leaving) == 0
                if kind in ("route", "join"):
                    forced |= bool(what)
                    writing.writer.route(made.routes, within_s=0.0 if what else 60.0)
            assert set(made.shards) >= {0}
        rows = all_rows(made)
        assert numbers(rows) == writing.numbers()
        cuts = check_episodes(rows, episode=EPISODE)
        assert forced or cuts <= len(writing.written), "beside the ends of lanes nothing is cut"
        check_limiter(made)


# ------------------------------------------------------------------------------------------------------------- writers


def test_lanes_move_with_their_next_episode_and_as_few_as_have_to(memory: Path) -> None:
    with service(spec_of(memory), 1) as made, actor(made.routes, episode=EPISODE) as writing:
        writing.write(dict.fromkeys(range(6), 5))
        made.join()
        writing.writer.route(made.routes, within_s=60.0)
        writing.write(dict.fromkeys(range(6), 4))  # up to the last step but one
        writing.writer.flush()
        assert (len(made.stored(0)), len(made.stored(1))) == (54, 0)
        writing.write(dict.fromkeys(range(6), 5))  # the last step, and four of the next episode
        writing.writer.flush()
        assert numbers(made.stored(0)) == Counter(
            lane * LANE + k for lane in range(6) for k in range(10 if lane > 2 else 14)
        )
        assert all(row.is_first == (row.number % LANE == 10) for row in made.stored(1))
        assert writing.writer.connections == 2
        # The lanes that moved are ended, and hold no segments any more.
        assert made.shards[0].shard.count_lanes("actor") == 3


@pytest.mark.parametrize("writes_on", [False, True])
def test_after_the_grace_time_lanes_move_in_the_middle_of_an_episode(memory: Path, writes_on: bool) -> None:
    with service(spec_of(memory), 2) as made, actor(made.routes, episode=EPISODE) as writing:
        writing.write({0: 3, 1: 3})
        writing.writer.route({0: made.routes[0]}, within_s=0.3)
        assert writing.writer.connections == 2
        if writes_on:
            time.sleep(0.4)
            writing.write({0: 3, 1: 3})
            writing.writer.flush()
            assert [row.number for row in made.stored(0) if row.is_first] == [0, LANE + 3]
        wait_until(lambda: made.shards[1].stats()["writers"] == 0)
        wait_until(lambda: writing.writer.connections == 1)
        assert [(row.number - LANE, row.is_last) for row in made.stored(1)] == [(0, False), (1, False), (2, True)]


def test_a_lane_that_comes_back_is_written_to_again(memory: Path) -> None:
    with service(spec_of(memory), 2) as made:
        with actor(made.routes, episode=EPISODE) as writing:
            for shards in ([0], [1], [0, 1], [1], [0]) * 2:
                writing.write({0: 7, 1: 7, 2: 7})
                writing.writer.route({number: made.routes[number] for number in shards}, within_s=0.0)
        rows = all_rows(made)
        assert numbers(rows) == writing.numbers()
        check_episodes(rows, episode=EPISODE)
        assert all(server.stats()["writers"] == 0 for server in made.shards.values())


def test_a_shard_that_leaves_takes_no_new_writer_and_lets_known_ones_go_on(memory: Path) -> None:
    with service(spec_of(memory), 2) as made, actor({1: made.routes[1]}) as writing:
        writing.write({0: 5})
        made.shards[1].leave()
        with pytest.raises(ShardLeavingError, match="expected no new writers, received late: shard 1 leaves"):
            made.shards[1].shard.connect("late")
        writing.write({0: 5})
        writing.writer.flush()
        # One that was told of it too late waits until it is told where else to write, and has lost nothing.
        with actor({1: made.routes[1]}, name="late") as late:
            thread = threading.Thread(target=late.write, args=({3: 5},))
            thread.start()
            wait_until(lambda: "shard 1 leaves its service" in (late.writer.waiting_for or ""))
            late.writer.route({0: made.routes[0]}, within_s=60.0)
            thread.join(10.0)
            assert not thread.is_alive()
        assert numbers(made.stored(0)) == late.numbers()
        assert len(made.stored(1)) == 10


def test_wrong_routes_are_refused(memory: Path) -> None:
    with service(spec_of(memory)) as made, actor(made.routes) as writing:
        for routes in ({}, {-1: made.routes[0]}):
            with pytest.raises(ValueError, match="at least one shard"):
                writing.writer.route(routes, within_s=1.0)
        with pytest.raises(HandOverError, match="it was not; call leave"):
            made.shards[0].hand_over({1: "grpc://127.0.0.1:1"})
        with pytest.raises(HandOverError, match="holds the limiters"):
            made.shards[0].leave()


# -------------------------------------------------------------------------------------------------------- hand-over

TABLES = (
    TableSpec(),
    TableSpec("prioritised", "prioritised", priority_exponent=0.7),
    TableSpec("thirds", "max_heap", stride=3),
)


def known_of(made: Service, numbers_of: list[int]) -> dict[str, dict[tuple[int, ...], float]]:
    """What tables know of their items: observation and action of the row → its priority, 1 where there is none."""
    found: dict[str, dict[tuple[int, ...], float]] = {spec.name: {} for spec in TABLES}
    for number in numbers_of:
        for copy in made.shards[number].shard.copy()[1]:
            assert copy.rows is not None
            for name, table in copy.tables.items():
                for place in np.flatnonzero(table.member):
                    key = tuple(copy.rows["action"][place].tolist())
                    assert key not in found[name], "twice"
                    found[name][key] = 1.0 if table.priority is None else round(float(table.priority[place]), 9)
    return found


@pytest.mark.parametrize("frames", [False, True])
def test_tables_know_of_rows_handed_over_what_they_knew(memory: Path, frames: bool) -> None:
    schema = FRAMES if frames else SCHEMA
    spec = spec_of(
        memory, schema=schema.to_json(), tables=TABLES, capacity=2048, segment_steps=8, stack=3 if frames else 1
    )
    rng = np.random.default_rng(5)
    with service(spec, 3) as made:
        # The shard that leaves has recycled segments: its oldest episodes have lost their beginnings, and may not be stacked.
        small = made.join(capacity=400)
        writer = FlightWriter(made.routes[small], schema, name="a", message_rows=256, connect=connect)
        for k in range(0, 300, 50):
            for lane in range(3):
                rows = steps(lane, k, 50, episode=23, schema=schema)
                rows["action"] = np.stack([rows["action"][:, 0], mixed(rows["action"][:, 0])], axis=1)
                writer.append(np.full(50, lane, np.int32), rows)
        writer.close()
        shard = made.shards[small].shard
        for name in ("prioritised", "thirds"):
            draw = shard.draw(name, 64, 64, timeout_s=1.0)
            assert draw is not None
            ids = shard._storage.item_ids(np.unique(draw.rows))
            shard.update_priorities(name, ids, rng.exponential(size=len(ids)))
        before = known_of(made, [small])
        assert len(before["steps"]) > 300
        assert made.leave(small) == 0
        assert known_of(made, [0, 1, 2]) == before
        held = [made.table(number)["items"] for number in (0, 1, 2)]
        assert max(held) - min(held) <= 60, "dealt evenly"


def test_where_there_is_too_little_room_the_newest_rows_of_all_remain(memory: Path) -> None:
    with service(spec_of(memory, capacity=960, segment_steps=16), 3) as made:
        for number, address in made.routes.items():
            writer = FlightWriter(address, SCHEMA, name="a", message_rows=64, connect=connect)
            for k in range(0, 2000, 50):
                writer.append(np.full(50, number, np.int32), steps(number, k, 50, episode=EPISODE))
            writer.close()
        left_out = made.leave(1)
        assert 300 <= left_out <= 340, "each shard gives up its oldest third"
        rows = all_rows(made)
        assert max(numbers(rows).values()) == 1
        check_episodes(rows, episode=EPISODE)
        for number in range(3):  # of each shard's 960 rows the newest 640, but for bundles and segments begun
            kept = sorted(row.number % LANE for row in rows if row.number // LANE == number)
            assert kept == list(range(2000 - len(kept), 2000))
            assert 590 <= len(kept) <= 660
        check_limiter(made)


@given(
    st.integers(0, 600),
    st.dictionaries(st.integers(0, 40), st.tuples(st.integers(1, 200), st.floats(0, 1)), min_size=1, max_size=6),
)
def test_a_plan_gives_each_shard_what_it_has_room_for(held: int, others: dict[int, tuple[int, float]]) -> None:
    room = {shard: (capacity, int(capacity * free)) for shard, (capacity, free) in others.items()}
    plan = make_plan(held, room)
    assert plan.from_json(plan.to_json()) == plan
    assert plan.shares.keys() == room.keys()
    free = sum(free for _, free in room.values())
    if held <= free:
        assert plan.rows == held
        for shard, rows in plan.shares.items():
            assert abs(rows - held * room[shard][1] / max(1, free)) <= 1
        return
    # Every shard keeps so many of its newest rows, as many as all have room for.
    used = {shard: capacity - free for shard, (capacity, free) in room.items()}
    total = sum(capacity for capacity, _ in room.values())
    level = max(k for k in range(601) if min(held, k) + sum(min(rows, k) for rows in used.values()) <= total)
    assert plan.rows == min(held, level)
    for shard, rows in plan.shares.items():
        assert rows <= room[shard][0] - min(used[shard], level)


@given(st.lists(st.integers(1, 40), max_size=60), st.data())
def test_bundles_are_dealt_whole_and_in_order(sizes: list[int], data: st.DataObject) -> None:
    found = [
        Bundle(np.arange(begin, begin + size), 0, True, True)
        for begin, size in zip(np.cumsum([0, *sizes]), sizes, strict=False)
    ]
    room = {shard: (500, data.draw(st.integers(0, 500))) for shard in range(data.draw(st.integers(1, 4)))}
    plan = make_plan(sum(sizes), room)
    dealt, left_out = deal(found, plan)
    assert (dealt, left_out) == deal(found, plan)
    order = [id(bundle) for bundle in found]
    given_ids = sorted(order.index(id(bundle)) for bundles in dealt.values() for bundle in bundles)
    assert given_ids == list(range(len(found) - len(given_ids), len(found))), "the oldest are left out"
    assert left_out == sum(sizes[: len(found) - len(given_ids)]) <= sum(sizes) - plan.rows
    for shard, bundles in dealt.items():
        assert [order.index(id(bundle)) for bundle in bundles] == sorted(order.index(id(bundle)) for bundle in bundles)
        assert sum(len(bundle.rows) for bundle in bundles) <= plan.shares[shard] + 2 * 40


# ------------------------------------------------------------------------------------------------------------ samplers


REFUSED = 4.0  # deviations that one right sampler in 30 000 reaches


def deviations(counts: np.ndarray, expected: np.ndarray) -> float:
    """Pearson's statistic of counts against expected ones, as standard deviations of a normal (Wilson and Hilferty 1931)."""
    assert expected.min() >= 5
    freedom = len(counts) - 1
    spread = 2 / (9 * freedom)
    statistic = float(((counts - expected) ** 2 / expected).sum())
    return float((math.cbrt(statistic / freedom) - (1 - spread)) / math.sqrt(spread))


def sampler_of(made: Service, shards: list[int], **settings: Any) -> Sampler:
    routes = {number: made.routes[number] for number in shards}
    values: dict[str, Any] = {"batch_size": 64, "seed": 3, "security": SECURITY, "prefetch": 2, **settings}
    return stream_sampler(routes, SCHEMA, **values)


def fill(made: Service, number: int, lanes: range, count: int, *, name: str = "filler") -> None:
    """Steps of some lanes, written to one shard."""
    with actor({number: made.routes[number]}, name=name, episode=EPISODE) as writing:
        writing.write(dict.fromkeys(lanes, count))


@pytest.mark.parametrize("selector", ["uniform", "prioritised"])
@pytest.mark.parametrize("transport", ["local", "flight"])
def test_draws_over_shards_that_change_are_those_of_one_table(memory: Path, selector: Any, transport: Any) -> None:
    table = TableSpec("steps", selector, priority_exponent=0.8)
    with service(spec_of(memory, tables=(table,), segment_steps=16), 3) as made:
        fill(made, 0, range(1), 40)
        fill(made, 1, range(1, 3), 60)
        fill(made, 2, range(3, 6), 60)
        window = Window(2)
        with closing(
            sampler_of(made, [0, 1, 2], table=table, transport=transport, batch_size=256, window=window)
        ) as sampler:

            def weigh() -> None:
                """Priorities that follow from the number of the step."""
                for _ in range(8):
                    batch = sampler.sample(20.0)
                    sampler.update_priorities(batch, priority(batch.steps["action"][:, 0, 0]))
                wait_until(lambda: made.routes.keys() == sampler._sources.keys())

            def priority(number: np.ndarray) -> np.ndarray:
                return 0.2 + (number * 7 % 11).astype(np.float64)

            weigh()
            new = made.join()
            sampler.route(made.routes)
            fill(made, new, range(6, 10), 50)
            sampler.route({number: address for number, address in made.routes.items() if number != 1})
            assert made.leave(1) == 0
            for _ in range(12):
                weigh()
            items = np.array(sorted(row.number for row in all_rows(made) if row.successor is not None))
            for number, server in made.shards.items():  # every item has its priority by now, or gets it
                shard = server.shard
                rows = np.flatnonzero(shard._storage.flags & shard.tables["steps"].bit)
                shard.update_priorities(
                    "steps", shard._storage.item_ids(rows), priority(shard._storage.rows["action"][rows, 0])
                )
                mass = shard.tables["steps"].mass
                wait_until(lambda: abs(sampler._sources[number].mass - mass) < 1e-6)  # noqa: B023
            for _ in range(12):  # what was drawn ahead before
                sampler.sample(20.0)
            counts: Counter[int] = Counter()
            draws = 160
            for _ in range(draws):
                batch = sampler.sample(20.0)
                check_whole(batch, window)
                counts.update(batch.steps["action"][:, 0, 0].tolist())
        weight = priority(items) ** 0.8 if selector == "prioritised" else np.ones(len(items))
        expected = weight / weight.sum() * draws * 256
        found = np.array([counts[int(number)] for number in items])
        assert found.sum() == draws * 256
        shard_of = {row.number: number for number in made.shards for row in made.stored(number)}
        of_shard = np.array([shard_of[int(number)] for number in items])
        found_in, expected_in = (
            np.array([values[of_shard == number].sum() for number in made.shards]) for values in (found, expected)
        )
        assert deviations(found, expected) < REFUSED
        assert deviations(found_in, expected_in) < REFUSED
        # A shard drawn from 15 % too often would be found in 99 of 100 runs.
        rng = np.random.default_rng(0)
        for number in range(len(expected_in)):
            wrong = expected_in / (draws * 256)
            wrong[number] *= 1.15
            wrong /= wrong.sum()
            seen = [deviations(rng.multinomial(draws * 256, wrong), expected_in) for _ in range(500)]
            assert np.mean(np.array(seen) > REFUSED) > 0.99


def test_a_batch_that_waits_goes_to_shards_that_are_there_now(memory: Path) -> None:
    with service(spec_of(memory), 3) as made:
        for shards in ([1], [1, 2]):
            with closing(sampler_of(made, shards)) as sampler:
                found: list[WindowBatch] = []
                thread = threading.Thread(target=lambda s=sampler, f=found: f.append(s.sample(20.0)))
                thread.start()
                time.sleep(0.3)
                assert thread.is_alive()
                if made.table(0)["items"] == 0:
                    fill(made, 0, range(2), 50)
                sampler.route({0: made.routes[0]})
                thread.join(10.0)
                assert not thread.is_alive()
                assert (found[0].shard == 0).all()


def test_a_leaving_shard_is_drawn_from_no_more_though_it_is_still_read(memory: Path) -> None:
    with service(spec_of(memory), 2) as made:
        fill(made, 0, range(2), 60)
        fill(made, 1, range(2, 4), 60)
        with closing(sampler_of(made, [0, 1])) as sampler:
            assert set(sampler.sample(10.0).shard.tolist()) == {0, 1}
            made.shards[1].leave()
            wait_until(lambda: sampler._sources[1].mass == 0)
            sampler.sample(10.0)
            for _ in range(4):
                assert (sampler.sample(10.0).shard == 0).all()
            assert made.leave(1) == 0
            wait_until(lambda: sampler._sources[0].items == 4 * 54)


def test_what_was_drawn_ahead_of_a_shard_that_left_is_given_back(memory: Path) -> None:
    limit = RateLimit.from_min_size(1)
    with service(spec_of(memory, limits=(limit,)), 3) as made:
        for number in range(3):
            fill(made, number, range(2 * number, 2 * number + 2), 60)
        with closing(sampler_of(made, [0, 1, 2], prefetch=8)) as sampler:
            used = Counter[int]()
            for routes in ([0, 1, 2], [0, 2], [0, 1, 2]):
                sampler.route({number: made.routes[number] for number in routes})
                for _ in range(5):
                    used.update(sampler.sample(10.0).shard.tolist())
        for number in range(3):
            wait_until(lambda: made.table(number)["sampled"] == used[number])  # noqa: B023
        check_limiter(made)


def test_priorities_go_by_the_number_of_the_shard(memory: Path) -> None:
    table = TableSpec("steps", "prioritised", priority_exponent=1.0)
    with service(spec_of(memory, tables=(table,)), 4) as made:
        fill(made, 1, range(2), 60)
        fill(made, 3, range(2, 4), 60)
        with closing(sampler_of(made, [1, 3], table=table)) as sampler:
            batch = sampler.sample(10.0)
            assert set(batch.shard.tolist()) == {1, 3}
            sampler.route({0: made.routes[0], 3: made.routes[3]})
            sampler.sample(10.0)
            sampler.update_priorities(batch, np.full(64, 1e6))
            changed = len(np.unique(batch.item[batch.shard == 3]))
            wait_until(lambda: made.table(3)["mass"] == changed * 1e6 + (108 - changed))
            assert made.table(1)["mass"] == 108
            assert made.table(0)["evicted_updates"] == 0


def test_a_shard_that_comes_back_where_it_was_is_read_again(memory: Path) -> None:
    """Also where it was away for so long that nobody looked for it any more: by the same routes."""
    with service(spec_of(memory), 2) as made:
        fill(made, 0, range(2), 60)
        fill(made, 1, range(2, 4), 60)
        with closing(sampler_of(made, [0, 1])) as sampler:
            before = dict(sampler._sources)
            sampler.route(made.routes)
            assert set(sampler.sample(10.0).shard.tolist()) == {0, 1}
            assert sampler._sources == before
            before[1].close()  # as after so long a time: it sends nothing, and weighs nothing
            before[1].has_ended = True  # type: ignore[misc]
            sampler.route(made.routes)
            sampler.sample(10.0)
            assert sampler._sources[0] is before[0]
            wait_until(lambda: 1 in sampler.sample(10.0).shard.tolist())


def test_a_sampler_without_addresses_cannot_be_routed(memory: Path) -> None:
    with service(spec_of(memory)) as made:
        source = CallSource(made.shards[0].shard, window=Window())
        sampler = Sampler([source], SCHEMA, window=Window(), batch_size=4, seed=0)
        with pytest.raises(ValueError, match="made by stream_sampler"):
            sampler.route(made.routes)
        with closing(sampler_of(made, [0])) as routed, pytest.raises(ValueError, match="expected addresses of shards"):
            routed.route({})
