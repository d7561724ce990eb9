"""Sum tree and tournament tree against plain lists."""

from __future__ import annotations

import heapq
import math
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from replay.trees import BRANCHING, MOST, SumTree, TournamentTree

SIZES = [1, 2, 7, 8, 9, 63, 64, 65, 511, 513, 1000]
LAST = math.nextafter(1.0, 0.0)
CHI_SQUARE_Z = 3.72  # one-sided 1e-4


def chi_square_limit(cells: int) -> float:
    """The value that a chi-square of `cells` − 1 degrees exceeds with probability 1e-4 (Wilson and Hilferty 1931)."""
    degrees = cells - 1
    return degrees * (1 - 2 / (9 * degrees) + CHI_SQUARE_Z * math.sqrt(2 / (9 * degrees))) ** 3


def picked(leaves: list[float], target: float) -> int:
    """The leaf in whose span of the running sum `target` lies."""
    running = 0.0
    for row, value in enumerate(leaves):
        running += value
        if target < running:
            return row
    raise AssertionError("target is not below the total")


@st.composite
def changes(draw: st.DrawFn) -> tuple[int, list[tuple[str, list[int], list[int]]]]:
    """A size, and sets (rows, values) and clears (begin, end) in turn; whole values, so that every sum is exact."""
    size = draw(st.sampled_from(SIZES))
    row = st.integers(0, size - 1)
    steps: list[tuple[str, list[int], list[int]]] = []
    for _ in range(draw(st.integers(1, 8))):
        if draw(st.booleans()):
            rows = draw(st.lists(row, max_size=20))
            steps.append(("set", rows, [draw(st.integers(0, 5)) for _ in rows]))
        else:
            begin = draw(st.integers(0, size))
            steps.append(("clear", [begin], [draw(st.integers(begin, size))]))
    return size, steps


def apply(tree: SumTree | TournamentTree, reference: list[float], step: tuple[str, list[int], list[int]]) -> None:
    what, first, second = step
    if what == "set":
        tree.set(np.array(first, np.int64), np.array(second, np.float64))
        for row, value in zip(first, second, strict=True):
            reference[row] = float(value)
    else:
        tree.clear(first[0], second[0])
        reference[first[0] : second[0]] = [tree.empty] * (second[0] - first[0])


@given(changes(), st.lists(st.floats(0.0, LAST), min_size=1, max_size=20))
@settings(max_examples=150)
def test_a_sum_tree_picks_the_leaf_that_a_running_sum_picks(
    case: tuple[int, list[tuple[str, list[int], list[int]]]], uniforms: list[float]
) -> None:
    size, steps = case
    tree, reference = SumTree(np.zeros(size)), [0.0] * size
    for step in steps:
        apply(tree, reference, step)
        assert tree.leaves.tolist() == reference
        assert tree.total == sum(reference)
        if tree.total > 0:
            rows = tree.draw(np.array(uniforms))
            assert rows.tolist() == [picked(reference, u * tree.total) for u in uniforms]
        else:
            with pytest.raises(ValueError, match="nothing to draw"):
                tree.draw(np.array(uniforms))


@given(changes(), st.sampled_from(["max", "min"]), st.integers(0, 40))
@settings(max_examples=150)
def test_a_tournament_tree_serves_what_a_heap_serves(
    case: tuple[int, list[tuple[str, list[int], list[int]]]], best: Literal["max", "min"], count: int
) -> None:
    size, steps = case
    tree = TournamentTree(np.full(size, -np.inf if best == "max" else np.inf), best=best)
    reference = [tree.empty] * size
    sign = -1.0 if best == "max" else 1.0
    for step in steps:
        apply(tree, reference, step)
        heap = [(sign * value, row) for row, value in enumerate(reference) if value != tree.empty]
        heapq.heapify(heap)
        expected = [heapq.heappop(heap)[1] for _ in range(min(count, len(heap)))]
        assert tree.best(count).tolist() == expected


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("best", ["max", "min"])
def test_a_tournament_tree_sorts_all_its_leaves(size: int, best: Literal["max", "min"]) -> None:
    rng = np.random.default_rng(size)
    keys = rng.integers(-3, 4, size) * 10.0 ** rng.integers(-12, 13, size)
    tree = TournamentTree(keys.copy(), best=best)
    order = np.argsort(-keys if best == "max" else keys, kind="stable")
    assert tree.best(size + 5).tolist() == order.tolist()
    tree.set(order[:1], np.array([tree.empty]))
    assert tree.best(size + 5).tolist() == order[1:].tolist()


@pytest.mark.parametrize("size", SIZES)
def test_draws_follow_the_leaves(size: int) -> None:
    """Chi-square at level 1e-4 with 200 000 draws.

    Probabilities that are wrong by 5 % either way add about 200 000 · 0.0025 = 500 to the statistic, whose standard
    deviation is 45 over 1 000 cells (63 with the error): they pass with a probability below 1e-6.
    """
    rng = np.random.default_rng(size)
    values = rng.random(size) + 0.05
    values[rng.random(size) < 0.3] = 0.0
    values[size // 2] = 1.0
    tree = SumTree(np.zeros(size))
    tree.set(rng.permutation(size), rng.random(size))  # to be overwritten
    tree.set(np.arange(size), values)
    draws = 200_000
    counts = np.bincount(tree.draw(rng.random(draws)), minlength=size)
    assert counts[values == 0.0].sum() == 0
    expected = values[values > 0.0] / values.sum() * draws
    if len(expected) > 1:
        statistic = ((counts[values > 0.0] - expected) ** 2 / expected).sum()
        assert statistic < chi_square_limit(len(expected))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("seed", range(5))
def test_no_empty_leaf_is_drawn_between_huge_and_tiny_ones(size: int, seed: int) -> None:
    rng = np.random.default_rng([size, seed])
    values = 10.0 ** rng.uniform(-12, 12, size)
    values[rng.random(size) < 0.7] = 0.0
    values[rng.random(size) < 0.2] = -0.0
    values[rng.integers(size)] = 1e-12
    if seed % 2:
        values[-1] = 0.0  # the leaf a draw runs into when rounding carries it past the end
        values[0] = 1e-12
    tree = SumTree(values.copy())
    uniforms = np.concatenate([[0.0, 5e-324, LAST, math.nextafter(LAST, 0.0), 1 - 1e-12], rng.random(5000)])
    rows = tree.draw(uniforms)
    assert (values[rows] > 0.0).all()
    assert rows.min() >= 0
    assert rows.max() < size


@pytest.mark.parametrize("spread", [1, BRANCHING])
def test_a_draw_past_the_last_sum_falls_on_the_last_leaf_above_zero(spread: int) -> None:
    """Parents are summed in another order than a descent sums them: the target can lie at the sum of the children.

    spread: rows from one leaf above zero to the next; at BRANCHING the sum that falls short is one of inner nodes.
    """
    missed = 0
    for seed in range(3000):
        rng = np.random.default_rng(seed)
        values = np.zeros(BRANCHING * spread)
        values[: (BRANCHING - 2) * spread : spread] = rng.random(BRANCHING - 2)
        tree = SumTree(values)
        running = 0.0
        for value in values:
            running += value
        missed += LAST * tree.total >= running
        assert values[tree.draw(np.array([LAST]))[0]] > 0.0
    assert missed > 0  # or the test says nothing


@pytest.mark.parametrize("size", SIZES)
def test_no_drift_over_many_changes(size: int) -> None:
    rng = np.random.default_rng(size)
    tree = SumTree(np.zeros(size))
    for _ in range(300):
        rows = rng.integers(0, size, 16)
        tree.set(rows, 10.0 ** rng.uniform(-12, 12, 16))
    tree.clear(0, size)
    assert tree.total == 0.0
    tree.set(np.array([size - 1]), np.array([1e-12]))
    assert tree.total == 1e-12
    assert tree.draw(np.array([0.0, 0.5, LAST])).tolist() == [size - 1] * 3


def test_the_largest_leaves_do_not_overflow() -> None:
    tree = SumTree(np.full(1000, MOST))
    assert math.isfinite(tree.total)
    assert len(set(tree.draw(np.random.default_rng(0).random(100)).tolist())) > 50


def test_leaves_of_a_mapped_file_are_found_again(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    path = tmp_path / "leaves"
    size = 777
    mapped = np.memmap(path, np.float64, "w+", shape=(size,))
    tree = SumTree(np.asarray(mapped))
    tree.set(np.arange(size), rng.random(size))
    uniforms = rng.random(100)
    drawn, total = tree.draw(uniforms), tree.total
    mapped.flush()
    again = SumTree(np.asarray(np.memmap(path, np.float64, "r+", shape=(size,))))
    assert again.total == total
    assert again.draw(uniforms).tolist() == drawn.tolist()
    with pytest.raises(ValueError, match="map the file for reading and writing"):
        SumTree(np.asarray(np.memmap(path, np.float64, "r", shape=(size,))))


def test_rebuild_follows_leaves_changed_from_outside() -> None:
    leaves = np.zeros(100)
    tree = SumTree(leaves)
    leaves[37] = 2.5
    assert tree.total == 0.0
    tree.rebuild()
    assert tree.total == 2.5
    assert tree.draw(np.array([0.3])).tolist() == [37]


@pytest.mark.parametrize(
    ("row", "value"), [(-1, 1.0), (100, 1.0), (2, math.nan), (2, -1.0), (2, math.inf), (2, 2 * MOST)]
)
def test_what_does_not_fit_changes_nothing(row: int, value: float) -> None:
    leaves = np.zeros(100)
    tree = SumTree(leaves)
    with pytest.raises(ValueError, match=f"row {row} with value .* at position 1: expected a row in 0…99"):
        tree.set(np.array([5, row]), np.array([1.0, value]))
    assert not leaves.any()
    assert tree.total == 0.0


def test_arguments_that_do_not_fit_are_refused() -> None:
    tree = SumTree(np.zeros(100))
    with pytest.raises(ValueError, match="expected one for each row"):
        tree.set(np.arange(3), np.zeros(2))
    for begin, end in ((-1, 5), (5, 101), (6, 5)):
        with pytest.raises(ValueError, match="is no span of the 100 leaves"):
            tree.clear(begin, end)
    for leaves in (np.zeros(0), np.zeros(4, np.float32), np.zeros((2, 2)), np.zeros(8)[::2]):
        with pytest.raises(ValueError, match="expected contiguous float64"):
            SumTree(leaves)
    with pytest.raises(ValueError, match="position 0"):
        TournamentTree(np.zeros(4), best="max").set(np.array([0]), np.array([math.nan]))
    with pytest.raises(ValueError, match="position 0"):
        TournamentTree(np.zeros(4), best="max").set(np.array([0]), np.array([math.inf]))
