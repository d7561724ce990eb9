"""The selectors of one table against plain references."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from replay.selectors import SELECTORS, Drawn, Selector, check_priorities, make_selector

from .test_replay_trees import chi_square_limit

ORDERED = [name for name in SELECTORS if name not in ("uniform", "prioritised")]
BY_AGE = ("fifo", "lifo")
BIT = 4
OTHERS = 0xFF & ~BIT  # flag bits of other tables and of the storage, which say nothing here
DRAWS = 200_000


@dataclass
class Table:
    """A selector, the flags it reads, and the plain dictionary it is compared with."""

    name: str
    size: int
    exponent: float = 1.0
    reference: dict[int, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.flags = np.full(self.size, OTHERS, np.uint8)
        self.leaves = None if self.name == "uniform" else np.zeros(self.size)
        self.bound = self.size
        self.selector = self.make()

    def make(self) -> Selector:
        return make_selector(
            self.name,
            flags=self.flags,
            bit=BIT,
            rows_bound=lambda: self.bound,
            leaves=self.leaves,
            exponent=self.exponent,
        )

    def add(self, rows: list[int], keys: list[float]) -> None:
        self.flags[rows] |= BIT
        self.selector.add(np.array(rows, np.int64), np.array(keys, np.float64))
        self.reference.update(zip(rows, keys, strict=True))
        self.selector.items = len(self.reference)

    def remove(self, rows: list[int]) -> None:
        self.flags[rows] &= OTHERS
        self.selector.remove(np.array(rows, np.int64))
        for row in rows:
            self.reference.pop(row, None)
        self.selector.items = len(self.reference)

    def clear(self, begin: int, end: int) -> None:
        self.remove(list(range(begin, end)))

    def update(self, rows: list[int], priorities: list[float]) -> None:
        self.selector.update(np.array(rows, np.int64), np.array(priorities, np.float64))
        if self.name not in ("uniform", *BY_AGE):
            self.reference.update({row: p for row, p in zip(rows, priorities, strict=True) if row in self.reference})

    def in_order(self) -> list[int]:
        sign = -1.0 if self.name in ("lifo", "max_heap") else 1.0
        return sorted(self.reference, key=lambda row: (sign * self.reference[row], row))

    def masses(self) -> dict[int, float]:
        """Row → p^alpha, or 1 where uniform."""
        if self.name == "uniform":
            return dict.fromkeys(self.reference, 1.0)
        return {row: p**self.exponent if p else 0.0 for row, p in self.reference.items()}


def check(table: Table, rng: np.random.Generator, count: int) -> None:
    """What the selector says of its items and what it serves, against the reference."""
    selector, reference = table.selector, table.reference
    assert selector.items == len(reference)
    rows = np.array(sorted(reference), np.int64)
    if table.name != "uniform":
        assert selector.priorities(rows) == pytest.approx([reference[row] for row in rows], rel=1e-12)
    drawn = selector.draw(rng, count)
    assert drawn.rows.dtype == np.int64
    assert drawn.probability.dtype == np.float64
    victims = selector.victims(rng, count)
    assert len(victims) == len(set(victims.tolist())) == min(count, len(reference))
    assert set(victims.tolist()) <= set(reference)
    if selector.ordered:
        order = table.in_order()
        assert selector.mass == len(reference)
        assert victims.tolist() == order[:count]
        assert drawn.rows.tolist() == [order[k % len(order)] for k in range(count)] if order else not len(drawn.rows)
        assert drawn.key is not None
        assert drawn.key.tolist() == [reference[row] for row in drawn.rows.tolist()]
        assert (drawn.probability == 1.0).all()
        assert selector.largest_first == (table.name in ("lifo", "max_heap"))
    else:
        masses = table.masses()
        total = sum(masses.values())
        assert selector.mass == pytest.approx(total, rel=1e-12)
        assert len(drawn.rows) == (count if total > 0.0 else 0)
        assert all(masses[row] > 0.0 for row in drawn.rows.tolist())
        assert drawn.probability == pytest.approx([masses[row] / total for row in drawn.rows.tolist()], rel=1e-12)
        assert drawn.key is None
        zero = [masses[row] == 0.0 for row in victims.tolist()]
        assert zero == sorted(zero)  # those of priority 0 last


@st.composite
def histories(draw: st.DrawFn) -> tuple[str, int, float, list[tuple[str, list[int], list[float]]]]:
    name = draw(st.sampled_from(SELECTORS))
    size = draw(st.sampled_from([1, 5, 8, 63, 65, 300, 2000]))
    exponent = draw(st.sampled_from([0.5, 0.6, 1.0, 2.0]))
    row = st.integers(0, size - 1)
    priority = st.one_of(st.just(0.0), st.floats(1e-12, 1e12))
    steps: list[tuple[str, list[int], list[float]]] = []
    for _ in range(draw(st.integers(1, 10))):
        what = draw(st.sampled_from(["add", "add", "update", "remove", "clear", "rebuild"]))
        if what == "clear":
            begin = draw(st.integers(0, size))
            steps.append((what, [begin, draw(st.integers(begin, size))], []))
        else:
            rows = draw(st.lists(row, max_size=30, unique=what != "update"))
            steps.append((what, rows, [draw(priority) for _ in rows]))
    return name, size, exponent, steps


@given(histories(), st.integers(0, 60), st.integers(0, 2**32))
@settings(max_examples=300)
def test_a_selector_serves_what_its_history_says(
    history: tuple[str, int, float, list[tuple[str, list[int], list[float]]]], count: int, seed: int
) -> None:
    name, size, exponent, steps = history
    table, rng, age = Table(name, size, exponent), np.random.default_rng(seed), 1.7e15
    for what, rows, keys in steps:
        if what == "add":
            new = [row for row in rows if row not in table.reference]
            if name in BY_AGE:
                table.add(new, [age + k for k in range(len(new))])
                age += len(new)
            else:
                table.add(new, keys[: len(new)])
        elif what == "update":
            table.update(rows, keys)
        elif what == "remove":
            table.remove(rows)
        elif what == "clear":
            table.clear(rows[0], rows[1])
        else:
            table.selector = table.make()  # as a restarted shard does
        check(table, rng, count)


def statistic(table: Table, draw: Callable[[], Drawn]) -> tuple[float, int]:
    """Chi-square of DRAWS draws against the masses, over the items that can be drawn."""
    masses = table.masses()
    counts = np.zeros(table.size)
    while counts.sum() < DRAWS:
        counts += np.bincount(draw().rows, minlength=table.size)
    mass = np.zeros(table.size)
    mass[list(masses)] = list(masses.values())
    assert counts[mass == 0.0].sum() == 0
    expected = mass[mass > 0.0] / mass.sum() * counts.sum()
    return float(((counts[mass > 0.0] - expected) ** 2 / expected).sum()), len(expected)


@pytest.mark.parametrize(
    ("name", "exponent", "size", "share", "batch"),
    [
        ("uniform", 1.0, 1000, 1.0, 4096),
        ("uniform", 1.0, 1000, 0.5, 256),
        ("uniform", 1.0, 20_000, 0.01, 4),  # guessed at
        ("uniform", 1.0, 20_000, 0.01, 4096),  # listed
        ("prioritised", 1.0, 1000, 0.5, 256),
        ("prioritised", 0.6, 777, 1.0, 4096),
        ("prioritised", 0.0, 100, 0.7, 256),
    ],
)
def test_draws_follow_the_masses(name: str, exponent: float, size: int, share: float, batch: int) -> None:
    """Chi-square at level 1e-4 with 200 000 draws after items came, changed and went.

    Masses that are wrong by 5 % either way add about 200 000 · 0.0025 = 500 to the statistic, whose standard deviation
    is 45 over 1 000 cells (63 with the error): they pass with a probability below 1e-6.
    """
    rng = np.random.default_rng(7)
    table = Table(name, size, exponent)
    items = np.flatnonzero(rng.random(size) < share)
    table.add(items.tolist(), (rng.random(len(items)) + 0.05).tolist())
    table.clear(size // 4, size // 3)
    table.remove(items[::9].tolist())
    table.update(items.tolist(), np.where(rng.random(len(items)) < 0.1, 0.0, rng.random(len(items)) + 0.05).tolist())

    def draw() -> Drawn:
        if batch == 4:  # a change before every draw: no list is worth its while
            table.selector.add(np.empty(0, np.int64), np.empty(0))
        return table.selector.draw(rng, batch)

    found, cells = statistic(table, draw)
    assert found < chi_square_limit(cells)


@pytest.mark.parametrize("name", ["uniform", "prioritised"])
@pytest.mark.parametrize("count", [2, 4])
def test_victims_are_draws_without_replacement(name: str, count: int) -> None:
    """The last victim of 20 000 times, against the exact probabilities; chi-square at level 1e-4."""
    rng = np.random.default_rng(3)
    table = Table(name, 40)
    priorities = {3: 1.0, 9: 2.0, 17: 4.0, 18: 1.5, 39: 0.5}
    table.add(list(priorities), list(priorities.values()))
    masses = table.masses()
    exact = dict.fromkeys(masses, 0.0)

    def walk(chance: float, left: dict[int, float], more: int) -> None:
        for row, mass in left.items():
            p = chance * mass / sum(left.values())
            if more == 1:
                exact[row] += p
            else:
                walk(p, {r: m for r, m in left.items() if r != row}, more - 1)

    walk(1.0, masses, count)
    times = 20_000
    seen = dict.fromkeys(masses, 0)
    for _ in range(times):
        seen[int(table.selector.victims(rng, count)[-1])] += 1
    found = sum((seen[row] - times * exact[row]) ** 2 / (times * exact[row]) for row in masses)
    assert found < chi_square_limit(len(masses))


def test_victims_are_found_when_one_item_holds_all_the_mass() -> None:
    rng = np.random.default_rng(0)
    table = Table("prioritised", 1000)
    table.add(list(range(500)), [1e12] + [1e-12] * 300 + [0.0] * 199)
    victims = table.selector.victims(rng, 400).tolist()
    assert victims[0] == 0
    assert set(victims[:301]) == set(range(301))
    assert len(set(victims)) == 400
    assert set(table.selector.victims(rng, 1000).tolist()) == set(range(500))


@pytest.mark.parametrize("name", SELECTORS)
def test_an_empty_table_serves_nothing(name: str) -> None:
    table, rng = Table(name, 100), np.random.default_rng(0)
    for _ in range(2):
        drawn = table.selector.draw(rng, 5)
        assert len(drawn.rows) == len(drawn.probability) == 0
        assert len(table.selector.victims(rng, 5)) == 0
        assert table.selector.mass == 0.0
        table.add([4, 50], [1.0, 2.0])
        table.clear(0, 100)


def test_an_item_of_priority_0_is_kept_but_never_drawn() -> None:
    rng = np.random.default_rng(0)
    for exponent in (0.0, 0.6, 1.0):
        table = Table("prioritised", 10, exponent)
        table.add([2, 5], [0.0, 0.0])
        assert table.selector.items == 2
        assert len(table.selector.draw(rng, 8).rows) == 0
        table.selector = table.make()  # a restart does not take it for an item whose priority was lost
        assert table.selector.mass == 0.0
        table.update([5], [3.0])
        assert set(table.selector.draw(rng, 100).rows.tolist()) == {5}


@pytest.mark.parametrize("exponent", [0.5, 1.0, 3.0])
def test_extreme_priorities_stay_drawable(exponent: float) -> None:
    rng = np.random.default_rng(0)
    table = Table("prioritised", 10, exponent)
    table.add([1], [5e-324])
    assert table.selector.mass > 0.0
    assert set(table.selector.draw(rng, 10).rows.tolist()) == {1}
    table.add([2, 3], [1.7e308, 1.7e308])
    assert math.isfinite(table.selector.mass)
    assert set(table.selector.draw(rng, 100).rows.tolist()) == {2, 3}


@pytest.mark.parametrize("bad", [math.nan, -1.0, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["prioritised", "max_heap", "min_heap"])
def test_what_is_no_priority_changes_nothing(name: str, bad: float) -> None:
    table, rng = Table(name, 100), np.random.default_rng(0)
    table.add([1, 2, 3], [1.0, 2.0, 3.0])
    with pytest.raises(ValueError, match=f"priority {bad} at position 1 of 3: expected a finite number >= 0"):
        table.selector.update(np.array([1, 2, 3]), np.array([9.0, bad, 9.0]))
    with pytest.raises(ValueError, match="at position 0 of 1"):
        table.selector.add(np.array([7]), np.array([bad]))
    with pytest.raises(ValueError, match="at position 1 of 2"):
        check_priorities(np.array([0.0, bad]))
    check(table, rng, 10)


@pytest.mark.parametrize("name", SELECTORS)
def test_a_crash_between_flags_and_keys_is_mended(name: str) -> None:
    """Rows 2 and 6 were flagged and the shard died before their keys were written; 4 lost its key, not yet its flag."""
    rng = np.random.default_rng(0)
    table = Table(name, 10)
    table.add([1, 4, 5, 8], [11.0, 12.0, 13.0, 14.0])
    table.selector.remove(np.array([4]))
    table.flags[[2, 6]] |= BIT
    table.flags[8] &= OTHERS  # and 8 still has a key
    table.selector.rebuild()
    del table.reference[8]
    lost = {"fifo": (14.0, 15.0, 16.0), "lifo": (14.0, 15.0, 16.0)}.get(name, (13.0, 13.0, 13.0))
    table.reference.update(zip((2, 4, 6), lost, strict=True))
    check(table, rng, 20)
    table.selector = table.make()
    check(table, rng, 20)


@pytest.mark.parametrize("name", [name for name in SELECTORS if name != "uniform"])
def test_the_first_keys_after_a_crash_of_an_empty_table(name: str) -> None:
    table = Table(name, 10)
    table.flags[[3, 5]] |= BIT
    table.selector.rebuild()
    assert table.selector.items == 2
    assert table.selector.priorities(np.array([3, 5])).tolist() == ([1.0, 2.0] if name in BY_AGE else [1.0, 1.0])


def test_rows_in_use_bound_the_guesses() -> None:
    rng = np.random.default_rng(0)
    table = Table("uniform", 1_000_000)
    table.bound = 0
    assert len(table.selector.draw(rng, 4).rows) == 0
    table.add([0, 1, 2], [0.0] * 3)
    table.bound = 3
    assert set(table.selector.draw(rng, 100).rows.tolist()) == {0, 1, 2}


@pytest.mark.parametrize("size", [10, 1000])
def test_flags_changed_behind_the_selector_are_an_error_and_no_endless_loop(size: int) -> None:
    table = Table("uniform", size)
    table.add([1, 2], [0.0, 0.0])
    table.flags[:] = OTHERS
    with pytest.raises(RuntimeError, match=r"the selector counts 2 items, the flags show 0 .* call rebuild\(\)"):
        table.selector.draw(np.random.default_rng(0), size * 10)


def test_settings_that_do_not_fit_are_refused() -> None:
    flags, leaves = np.zeros(10, np.uint8), np.zeros(10)
    bound = lambda: 10  # noqa: E731
    with pytest.raises(ValueError, match="selector is 'best'; expected one of uniform, prioritised, fifo"):
        make_selector("best", flags=flags, bit=2, rows_bound=bound, leaves=leaves)
    with pytest.raises(ValueError, match="expected one for each of 10 rows"):
        make_selector("fifo", flags=flags, bit=2, rows_bound=bound)
    with pytest.raises(ValueError, match="expected one for each of 10 rows"):
        make_selector("fifo", flags=flags, bit=2, rows_bound=bound, leaves=np.zeros(9))
    with pytest.raises(ValueError, match="expected uint8"):
        make_selector("uniform", flags=flags.astype(np.int64), bit=2, rows_bound=bound)
    for exponent in (-0.1, math.nan, math.inf):
        with pytest.raises(ValueError, match="priority exponent"):
            make_selector("prioritised", flags=flags, bit=2, rows_bound=bound, leaves=leaves, exponent=exponent)
