"""Many shards are one table: how items are drawn over them, how fast, and in which order. Shards are real processes."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from replay.layout import TableSpec
from replay.process import ShardProcess
from replay.rate_limit import RateLimit
from replay.samplers import Sampler, stream_sampler
from replay.schema import Window, WindowBatch
from replay.streams import Transport
from replay.writers import FlightWriter

from .shards_for_tests import (
    FREE,
    SCHEMA,
    SECURITY,
    addresses,
    check_whole,
    checked,
    number_of,
    shards,
    spec_of,
    wait_until,
    write,
    writer_to,
)

SIZES = (30, 600, 6000)  # items of each shard
SHARES = (0.55, 0.10, 0.35)  # of the mass: nothing like the sizes
APART = 1_000_000  # numbers of different shards' steps lie so far apart
DRAWS = 400_000
BATCH = 512
REFUSED = 4.75  # standard deviations: passed by chance once in a million tests
ALPHA = 0.6

PRIORITISED = TableSpec("prioritised", "prioritised", priority_exponent=ALPHA)
UNIFORM = TableSpec("uniform")
LIST = TableSpec("list", "fifo")  # to learn the ids of all items
TABLES = (PRIORITISED, UNIFORM, LIST)
TRANSPORTS: tuple[Transport, ...] = ("flight", "local")


@pytest.fixture(scope="module")
def memory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("rows")


# ------------------------------------------------------------------ chi-square


def chi_square(counts: np.ndarray, expected: np.ndarray) -> float:
    """Pearson's statistic of counts against expected ones, as standard deviations of a normal (Wilson and Hilferty 1931).

    Neighbours of whom few are expected are counted together: the approximation needs five at least.
    """
    begins, gathered = [0], 0.0
    for place, few in enumerate(expected[:-1].tolist()):
        gathered += few
        if gathered >= 10:
            begins.append(place + 1)
            gathered = 0.0
    counts, expected = np.add.reduceat(counts, begins), np.add.reduceat(expected, begins)
    assert len(counts) > 1
    assert expected[:-1].min() >= 5
    return deviations(float(((counts - expected) ** 2 / expected).sum()), len(counts) - 1)


def deviations(statistic: float, freedom: int) -> float:
    spread = 2 / (9 * freedom)
    return float((math.cbrt(statistic / freedom) - (1 - spread)) / math.sqrt(spread))


def power(shares: np.ndarray, wrong: int, by: float, draws: int) -> float:
    """With what probability a share that is `by` times too large is found in so many draws, the others being too small."""
    true = shares.copy()
    true[wrong] *= 1 + by
    true[np.arange(len(shares)) != wrong] *= (1 - true[wrong]) / (1 - shares[wrong])
    centre = draws * float(((true - shares) ** 2 / shares).sum())
    statistics = np.random.default_rng(0).noncentral_chisquare(len(shares) - 1, centre, 20_000)
    return float(np.mean([deviations(s, len(shares) - 1) > REFUSED for s in statistics]))


def test_five_percent_too_much_from_any_shard_would_be_found() -> None:
    """What the tests below can see: in 400 000 draws a share wrong by a twentieth, with more than 99 %; in 200 000 by a twelfth.

    And they do not refuse what is right: of 2 000 such samples none.
    """
    shares = np.array(SHARES)
    for wrong in range(3):
        assert power(shares, wrong, 0.05, DRAWS) > 0.99
        assert power(shares, wrong, 0.085, DRAWS // 2) > 0.99
    rng = np.random.default_rng(1)
    weights = np.concatenate([rng.dirichlet(np.full(30, 9.0)) * 0.6, rng.dirichlet(np.full(300, 9.0)) * 0.4])
    good = [chi_square(rng.multinomial(DRAWS, weights), DRAWS * weights) for _ in range(2000)]
    assert max(good) < REFUSED
    assert abs(float(np.mean(good))) < 0.1
    assert abs(float(np.std(good)) - 1) < 0.1


# ---------------------------------------------------------------- the service


class Service:
    """Three shards with items in very unequal numbers."""

    def __init__(self, processes: list[ShardProcess], writers: list[FlightWriter], sizes: tuple[int, ...]) -> None:
        self.processes = processes
        self.writers = writers
        self.written = [0] * len(processes)
        self.items = 0
        for index, size in enumerate(sizes):
            self.insert(index, size + 1)

    def insert(self, index: int, count: int) -> None:
        first = APART * index + self.written[index]
        self.items += count - (self.written[index] == 0)  # the newest step of a lane is no item yet
        self.written[index] += count
        write(self.writers[index], checked(SCHEMA, first, count))

    def sampler(
        self, table: TableSpec, *, batch: int = BATCH, transport: Transport = "auto", prefetch: int = 4
    ) -> Sampler:
        return stream_sampler(
            addresses(self.processes),
            SCHEMA,
            batch_size=batch,
            seed=0,
            security=SECURITY,
            table=table,
            transport=transport,
            prefetch=prefetch,
        )

    def everything(self) -> WindowBatch:
        """All items once, in the order of their numbers."""
        sampler = self.sampler(LIST, batch=self.items, prefetch=1)
        batch = sampler.sample(20.0)
        sampler.close()
        order = np.argsort(number_of(batch))
        assert len(np.unique(number_of(batch))) == len(batch)
        return WindowBatch(
            steps=batch.steps[order],
            length=batch.length[order],
            item=batch.item[order],
            shard=batch.shard[order],
            probability=batch.probability[order],
        )

    def masses(self, table: TableSpec) -> np.ndarray:
        return np.array([process.stats()["tables"][table.name]["mass"] for process in self.processes])

    def prioritise(self, sampler: Sampler, items: WindowBatch, masses: np.ndarray) -> None:
        """Give every item its mass p^alpha, (items,), and wait until the sampler draws by all of them."""
        sampler.update_priorities(items, masses ** (1 / ALPHA))
        of_shards = np.bincount(items.shard, masses, minlength=len(self.processes))
        wait_until(lambda: np.allclose(self.masses(PRIORITISED), of_shards, rtol=1e-9))
        settle(sampler, of_shards)


def settle(sampler: Sampler, masses: np.ndarray) -> None:
    """Draw until every shard's stream has told of these masses, and what was drawn before is used up."""
    taken = np.zeros(len(masses))
    for _ in range(10_000):
        batch = sampler.sample(20.0)
        known = np.array([source.mass for source in sampler._sources.values()])
        if np.allclose(known, masses, rtol=1e-9):
            taken += np.bincount(batch.shard, minlength=len(masses))
        if (taken[masses > 0] >= 4 * BATCH).all():
            return
    raise AssertionError("the streams did not see the new masses")


@pytest.fixture(scope="module")
def service(memory: Path) -> Iterator[Service]:
    spec = spec_of(memory, run="global", capacity=65_536, tables=TABLES)
    with shards(spec, 3) as processes:
        writers = [writer_to(process.address) for process in processes]
        yield Service(processes, writers, SIZES)
        for writer in writers:
            writer.close()


def masses_of(items: WindowBatch, shares: tuple[float, ...], seed: int) -> np.ndarray:
    """A mass for each item, varied by a factor of up to three, that add up to the shards' shares; float64 (items,)."""
    masses = np.random.default_rng(seed).uniform(0.5, 1.5, len(items))
    of_shards = np.bincount(items.shard, masses, minlength=len(shares))
    scaled: np.ndarray = masses * (np.array(shares) / of_shards)[items.shard] * 1000
    return scaled


def drawn_counts(sampler: Sampler, items: WindowBatch, masses: np.ndarray, draws: int) -> np.ndarray:
    """How often each item was drawn, int64 (items,); each batch checked against the masses."""
    numbers, counts = number_of(items), np.zeros(len(items), np.int64)
    probability = masses / masses.sum()
    out = sampler.buffers()
    for _ in range(-(-draws // BATCH)):
        batch = sampler.sample(20.0, out)
        place = np.searchsorted(numbers, number_of(batch))
        assert (numbers[place] == number_of(batch)).all()
        assert (items.item[place] == batch.item).all()
        assert (items.shard[place] == batch.shard).all()
        assert np.allclose(batch.probability, probability[place], rtol=1e-6)
        counts += np.bincount(place, minlength=len(items))
    check_whole(batch, Window())
    return counts


def check_distribution(counts: np.ndarray, items: WindowBatch, masses: np.ndarray) -> None:
    """Counts of items agree with one big table's: between the shards, and over all items."""
    draws, drawable = counts.sum(), masses > 0
    assert (counts[~drawable] == 0).all()
    expected = draws * masses / masses.sum()
    of_shards = np.bincount(items.shard, expected)
    there = of_shards > 0
    found = np.bincount(items.shard, counts)
    assert chi_square(found[there], of_shards[there]) < REFUSED
    assert chi_square(counts[drawable], expected[drawable]) < REFUSED


# ----------------------------------------------------------------- prioritised


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_prioritised_draw_over_shards_is_that_of_one_big_table(service: Service, transport: Transport) -> None:
    items = service.everything()
    sampler = service.sampler(PRIORITISED, transport=transport)
    masses = masses_of(items, SHARES, seed=1)
    service.prioritise(sampler, items, masses)
    counts = drawn_counts(sampler, items, masses, DRAWS)
    assert {source.transport for source in sampler._sources.values()} == {transport}  # type: ignore[attr-defined]
    check_distribution(counts, items, masses)
    # The same counts do not agree with a table one of whose shards weighs a twentieth more.
    for wrong in range(3):
        heavier = masses * np.where(items.shard == wrong, 1.05, 1.0)
        expected = np.bincount(items.shard, heavier / heavier.sum() * counts.sum())
        assert chi_square(np.bincount(items.shard, counts), expected) > REFUSED
    sampler.close()


def test_a_uniform_draw_over_shards_is_that_of_one_big_table(service: Service) -> None:
    items = service.everything()
    sampler = service.sampler(UNIFORM)
    masses = np.ones(len(items))
    settle(sampler, np.bincount(items.shard).astype(float))
    check_distribution(drawn_counts(sampler, items, masses, DRAWS // 2), items, masses)
    assert sampler.sample(5.0).size == len(items)
    sampler.close()


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_one_sampler_follows_known_changes_of_masses_and_items(service: Service, transport: Transport) -> None:
    """Between the changes its draws have the distribution of the table as it then is."""
    sampler = service.sampler(PRIORITISED, transport=transport)
    for step, shares in enumerate([SHARES, (0.2, 0.7, 0.1), (0.0, 0.45, 0.55), (0.9, 0.06, 0.04)]):
        for index, count in enumerate((300, 50, 20)):
            service.insert(index, count)
        items = service.everything()
        masses = masses_of(items, shares, seed=2 + step)
        service.prioritise(sampler, items, masses)
        check_distribution(drawn_counts(sampler, items, masses, DRAWS // 2), items, masses)
    sampler.close()


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_importance_weights_are_unbiased_while_rows_come_in_and_priorities_change(
    memory: Path, transport: Transport
) -> None:
    """Sums over the items there at the start are estimated from draws weighted by 1 / probability, while other items come in
    and all priorities change, faster than the readers' masses follow. Were a shard's share wrong by 5 %, the sum over its
    items would be off by so many standard errors that this were found with more than 99 %."""
    spec = spec_of(memory, run=f"moving-{transport}", capacity=65_536, tables=TABLES)
    sizes = (30, 300, 3000)
    with shards(spec, 3) as processes, ExitStack() as ends:
        writers = [writer_to(process.address) for process in processes]
        service = Service(processes, writers, sizes)
        items = service.everything()
        sampler = service.sampler(PRIORITISED, transport=transport)
        ends.callback(sampler.close)
        service.prioritise(sampler, items, masses_of(items, SHARES, seed=7))
        stop = threading.Event()
        failed: list[BaseException] = []
        done, batches = 0, 600

        def change() -> None:
            rng, updates = np.random.default_rng(8), service.sampler(PRIORITISED, batch=8, prefetch=1)
            try:
                while not stop.wait(0.003):
                    index = int(rng.integers(3))
                    if service.written[index] < sizes[index] * (1 + done / batches):
                        service.insert(index, 1 + int(rng.integers(1 + sizes[index] // 50)))
                    chosen = np.flatnonzero(items.shard == rng.integers(3))
                    chosen = rng.choice(chosen, max(1, len(chosen) // 3), replace=False)
                    part = WindowBatch(
                        steps=items.steps[chosen],
                        length=items.length[chosen],
                        item=items.item[chosen],
                        shard=items.shard[chosen],
                        probability=items.probability[chosen],
                    )
                    weight = rng.uniform(0.3, 1.0) * 400 / len(chosen)
                    updates.update_priorities(part, (rng.uniform(0.5, 1.5, len(chosen)) * weight) ** (1 / ALPHA))
            except BaseException as error:
                failed.append(error)
            finally:
                updates.close()

        value = np.random.default_rng(9).normal(1.0, 1.0, len(items))  # of a function known everywhere
        functions = np.stack([*(items.shard == k for k in range(3)), np.ones(len(items)), value]).astype(float)
        numbers = number_of(items)
        thread = threading.Thread(target=change)
        thread.start()
        totals, squares = np.zeros(5), np.zeros(5)
        sizes_seen, masses_seen = set(), set()
        try:
            for done in range(batches):  # noqa: B007  the other thread looks at it
                batch = sampler.sample(20.0)
                place = np.minimum(np.searchsorted(numbers, number_of(batch)), len(numbers) - 1)
                known = numbers[place] == number_of(batch)
                weighted = (functions[:, place] * (known / batch.probability)).mean(1)
                totals, squares = totals + weighted, squares + weighted**2
                sizes_seen.add(batch.size)
                masses_seen.add(round(sampler._sources[0].mass, 6))
                time.sleep(0.002)
        finally:
            stop.set()
            thread.join()
        assert not failed
        for writer in writers:
            writer.close()
        mean = totals / batches
        error = np.sqrt((squares / batches - mean**2) / batches)
        truth = functions.sum(1)
        assert len(sizes_seen) > 20, "no rows came in"
        assert len(masses_seen) > 20, "no priorities changed"
        assert (np.abs(mean - truth) < 4 * error).all(), (mean, truth, error)
        # Off by 4 standard errors beside a normal error beyond −2.33 of them, in one of a hundred runs.
        assert ((4 + 2.33) * error[:3] < 0.05 * truth[:3]).all(), (error, truth)


# ---------------------------------------------------------------------- pace


def test_samples_per_insert_hold_for_the_table_as_a_whole(memory: Path) -> None:
    """Three shards, unequal writers and a reader in a hurry: the limiter's own counts never leave the error buffer, and the
    shards' real counts differ from them by what is leased, drawn ahead, or written and no item yet."""
    spi, buffer, least, block = 2.0, 400.0, 200, 16
    limit = RateLimit.from_samples_per_insert(spi, min_size=least, error_buffer=buffer)
    spec = spec_of(memory, run="pace", limits=(limit,), capacity=65_536, insert_block=block, sample_block=2 * block)
    with shards(spec, 3) as processes, ExitStack() as ends:
        writers = [writer_to(process.address, message_rows=10, in_flight=1) for process in processes]
        stop, pause = threading.Event(), threading.Event()
        written = [0, 0, 0]

        def fill(index: int) -> None:
            while not stop.is_set():
                if pause.is_set():
                    time.sleep(0.005)
                    continue
                count = (1, 4, 10)[index]
                writers[index].append(np.zeros(count, np.int32), checked(SCHEMA, written[index], count))
                written[index] += count

        def count(what: str) -> int:
            return sum(int(process.stats()["tables"]["steps"][what]) for process in processes)

        def limiter() -> tuple[int, int]:
            found = processes[0].stats()["tables"]["steps"]["limiter"]
            return found["inserted"], found["sampled"]

        def check() -> None:
            inserted, sampled = limiter()
            assert inserted * spi - sampled <= least * spi + buffer
            assert sampled == 0 or inserted * spi - sampled >= least * spi - buffer

        threads = [threading.Thread(target=fill, args=(k,)) for k in range(3)]
        for thread in threads:
            thread.start()
        # Writers alone: they come as far as the buffer lets them, wherever the rows are.
        most = least + buffer / spi
        wait_until(lambda: limiter()[0] >= most - 10)
        wait_until(lambda: all(process.stats()["waiting"] for process in processes))
        leases = 2 * block  # of the two shards that do not hold the limiter, at most
        assert most - 10 - leases - 3 <= count("inserted") <= most
        check()
        sampler = stream_sampler(addresses(processes), SCHEMA, batch_size=24, seed=0, security=SECURITY, prefetch=2)
        ends.callback(sampler.close)
        used = 0
        for k in range(150):  # both at once
            sampler.sample(20.0)
            used += 24
            if k % 10 == 0:
                check()
                # What the shards have counted, the limiter has let them: asked last, it can only have let in more.
                inserted, sampled = count("inserted"), count("sampled")
                assert inserted <= limiter()[0]
                assert sampled <= limiter()[1] + 3 * 64  # windows given back meanwhile
        pause.set()
        try:  # a reader alone: until the buffer is used up
            for _ in range(1000):
                sampler.sample(2.0)
                used += 24
        except TimeoutError:
            pass
        check()
        inserted, sampled = limiter()
        # What is left allows no batch of the reader's, or lies leased on another shard.
        assert inserted * spi - sampled - (least * spi - buffer) <= 24 + 2 * 2 * block
        assert count("sampled") <= sampled
        assert used <= count("sampled") <= used + 3 * 48
        stop.set()
        for thread in threads:
            thread.join()
        real = count("inserted")
        assert real <= inserted <= real + 3 + leases + 30  # newest steps of three lanes, leases, messages on their way
        sampler.close()
        wait_until(lambda: used <= count("sampled") < used + 24)  # a batch may have been begun when the time was over
        for writer in writers:
            writer.close()


# --------------------------------------------------------------------- order

FIFO = TableSpec("fifo", "fifo", max_times_sampled=1)
LIFO = TableSpec("lifo", "lifo", max_times_sampled=1)
OLDEST = TableSpec("oldest", "fifo")
NEWEST = TableSpec("newest", "lifo")
LARGEST = TableSpec("largest", "max_heap")
SMALLEST = TableSpec("smallest", "min_heap")
ORDERED = (FIFO, LIFO, OLDEST, NEWEST, LARGEST, SMALLEST, LIST)


class InOrder(Service):
    """Three shards whose steps are numbered in the order in which they became items, over all shards."""

    def __init__(self, processes: list[ShardProcess], writers: list[FlightWriter]) -> None:
        super().__init__(processes, writers, ())

    def insert(self, index: int, count: int) -> None:
        """`count` items, one episode."""
        rows = checked(SCHEMA, self.items, count + 1)
        rows["is_first"][0], rows["is_last"][-1] = True, True
        write(self.writers[index], rows)
        self.items += count


@pytest.fixture
def in_order(memory: Path) -> Iterator[InOrder]:
    with shards(spec_of(memory, run="order", tables=ORDERED, limits=(FREE,) * len(ORDERED)), 3) as processes:
        writers = [writer_to(process.address) for process in processes]
        yield InOrder(processes, writers)
        for writer in writers:
            writer.close()


def test_fifo_over_shards_is_by_age_and_each_item_comes_once(in_order: InOrder) -> None:
    """What lies in the shards comes in order; what comes in meanwhile at most one batch too late."""
    size, rng = 16, np.random.default_rng(0)
    left = np.zeros(3, np.int64)
    given: list[np.ndarray] = []

    def insert() -> None:
        index, count = int(rng.integers(3)), int(rng.integers(1, 30))
        in_order.insert(index, count)
        left[index] += count

    def take() -> None:
        batch = sampler.sample(10.0)
        given.append(np.sort(number_of(batch)))
        np.subtract.at(left, batch.shard, 1)

    def have_come() -> bool:
        return all(len(source.keys(size, 0.0)) == min(size, left[k]) for k, source in sampler._sources.items())

    for _ in range(25):
        insert()
    sampler = in_order.sampler(FIFO, batch=size)
    for k in range(in_order.items // size - 1):
        take()
        assert given[-1].tolist() == list(range(k * size, (k + 1) * size))
    for _ in range(40):  # and while items come in
        insert()
        wait_until(have_come)
        while left.sum() >= size:
            take()
    for older, newer in zip(given, given[2:], strict=False):
        assert older.max() < newer.min()
    everything = np.sort(np.concatenate(given))
    assert everything.tolist() == list(range(len(everything)))
    with pytest.raises(TimeoutError, match=r"the shards have \d+ windows to give, 16 make a batch"):
        sampler.sample(0.2)
    sampler.close()


def test_lifo_over_shards_is_by_age_from_the_newest(in_order: InOrder) -> None:
    rng = np.random.default_rng(1)
    for _ in range(25):
        in_order.insert(int(rng.integers(3)), int(rng.integers(1, 30)))
    sampler = in_order.sampler(LIFO, batch=16, prefetch=1)
    for k in range(in_order.items // 16):
        newest = in_order.items - 16 * k
        assert np.sort(number_of(sampler.sample(10.0))).tolist() == list(range(newest - 16, newest))
    sampler.close()


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_items_that_stay_are_served_best_first_over_all_shards_in_every_batch(
    in_order: InOrder, transport: Transport
) -> None:
    """Though nearly all of the best lie on one shard; and new best ones after what was drawn ahead."""
    size, rng = 24, np.random.default_rng(2)
    for index in (0, 1, 0, 2, 1, 2, 2):
        in_order.insert(index, 40)
    with ExitStack() as ends:
        samplers = {spec: in_order.sampler(spec, batch=size, prefetch=1, transport=transport) for spec in ORDERED[2:6]}
        for sampler in samplers.values():
            ends.callback(sampler.close)
        for favoured in (1, 2):
            items = in_order.everything()
            priority = rng.permutation(len(items)) + 1000.0 * (items.shard == favoured)
            for spec in (LARGEST, SMALLEST):
                samplers[spec].update_priorities(items, priority)
            expected = {
                OLDEST: np.arange(size),
                NEWEST: np.arange(in_order.items - size, in_order.items),
                LARGEST: np.sort(np.argsort(priority)[-size:]),
                SMALLEST: np.sort(np.argsort(priority)[:size]),
            }
            for spec, sampler in samplers.items():
                served = partial(_is_served, sampler, expected[spec])
                wait_until(served)  # priorities are not acknowledged, and two batches may be drawn ahead
                assert all(served() for _ in range(8)), spec
            in_order.insert(0, 10)
        counted = [process.stats()["tables"][OLDEST.name]["sampled"] for process in in_order.processes]
        # All of the oldest lie on the first shard: what the others offered for each batch was given back.
        assert max(counted[1:]) <= 2 * size


def _is_served(sampler: Sampler, expected: np.ndarray) -> bool:
    return bool((np.sort(number_of(sampler.sample(10.0))) == expected).all())
