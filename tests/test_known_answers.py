"""Every legal combination of value head, target and chain ends at its own fixed point, found by dynamic programming.

The problems and their solutions are in mdps_for_tests; test_mdps holds them to enumeration and simulation. A third of the
combinations runs by default, every head, target and chain among them; the others are marked slow.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import Any, Protocol

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from configs.algorithms import (
    ChainSettings,
    DqnSettings,
    FlowSettings,
    HeadSettings,
    SacSettings,
    TargetSettings,
)
from configs.load import ConfigError, load_config
from learners.dqn import Dqn
from learners.flow import Flow
from learners.sac import Sac
from replay.schema import WindowBatch
from tests.mdps_for_tests import (
    Array,
    ImplicitBackup,
    Mdp,
    Regulator,
    SoftBackup,
    chain,
    chunk,
    decoupled,
    grid,
    n_step,
    one_step,
    regulator_windows,
    solve,
    windows,
)

HEADS = ("mse", "two_hot", "hl_gauss", "c51")
TARGETS = ("one_step", "n_step", "chunk", "decoupled")
CHAINS = (1, 3)
TOLERANCE = 0.01  # of the range of the fixed point's values
DISTILL = 0.8  # expectile of the distilled critic


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def combinations(every: int, chains: tuple[int, ...] = CHAINS, problems: tuple[Any, ...] = ()) -> list[Any]:
    """All combinations (head, target, chain, problem). By default those run of one in `every` diagonals of head × target,
    with alternating chains and problems."""
    found = []
    for (i, head), (j, target), (k, length), (p, problem) in itertools.product(
        enumerate(HEADS), enumerate(TARGETS), enumerate(chains), enumerate(problems or (None,))
    ):
        turn = (i + j) // every
        # Decoupled targets have the most windows on the grid, so by default they are on the chain.
        of_problem = len(problems) - 1 if target == "decoupled" else i // 2 % max(len(problems), 1)
        default = (i + j) % every == 0 and turn % len(chains) == k and (not problems or of_problem == p)
        values = (head, target, length, *([problem] if problems else []))
        name = f"{head}-{target}-{length}" + (f"-{problem.name}" if problems else "")
        found.append(pytest.param(*values, marks=() if default else pytest.mark.slow, id=name))
    return found


class Learner(Protocol):
    def update(self, batches: WindowBatch) -> Any: ...


def train(learner: Learner, batches: list[WindowBatch], updates: int, values: Callable[[], Array]) -> Array:
    """The mean of `values` over the last 40 % of updates on `batches` by turns.

    Adam's steps of constant size never come to rest, and actions missing behind an episode's end are drawn anew each time.
    """
    found = []
    for i in range(updates):
        learner.update(batches[i % len(batches)])
        if i >= 0.6 * updates and i % 10 == 0:
            found.append(values())
    return np.asarray(np.mean(found, 0))


def target_settings(kind: Any, length: int, **more: Any) -> TargetSettings:
    if kind == "decoupled":
        more = {"distill_expectile": DISTILL} | more
    return TargetSettings(kind=kind, length=1 if kind == "one_step" else length, **more)


def head_settings(kind: Any, bound: tuple[float, float], bins: int) -> HeadSettings:
    """Few bins: the mean is exact with any number of them, and updates cost as much as there are."""
    return HeadSettings(kind=kind, bins=bins, low=bound[0], high=bound[1])


# ------------------------------------------------------------------------------------------------ discrete actions

LENGTHS = {"chain": 3, "grid": 2}
PREFIXES = {"chain": 2, "grid": 1}  # actions of the distilled critic
DISCRETE_UPDATES = 2000


def discrete_chunk(problem: Mdp, target: str) -> int:
    return {"chunk": LENGTHS[problem.name], "decoupled": PREFIXES[problem.name]}.get(target, 1)


def dqn_settings(problem: Mdp, head: str, target: str, length: int, **more: Any) -> DqnSettings:
    return DqnSettings(
        head=head_settings(head, (-1.2, 1.2), 7),
        target=target_settings(target, LENGTHS[problem.name], **more),
        chain=ChainSettings(length=length, copy_every=5),
        chunk=discrete_chunk(problem, target),
        discount=problem.discount,
        hidden=(32,),
        # The asymmetric loss of a distilled critic does not average its own noise away: shorter steps make less of it.
        lr=2e-3 if target == "decoupled" else 3e-3,
        shift_every=20,
    )


def data_policy(problem: Mdp) -> NDArray[np.int64]:
    """Of n-step data: the best policy on the chain, where its fixed point must be Q*; on the grid up or right, evenly."""
    if problem.name == "chain":
        rows: NDArray[np.int64] = np.eye(problem.actions, dtype=np.int64)[one_step(problem).argmax(-1)]
        return rows
    return np.tile([1, 1, 0, 0], (problem.states, 1))


def discrete_answer(problem: Mdp, target: str) -> tuple[Array, WindowBatch]:
    """The fixed point of a target, and the data that it has."""
    length = 1 if target == "one_step" else LENGTHS[problem.name]
    # Windows that a time limit cut short: n-step targets bootstrap from there, chunk critics pass them over.
    cut = Fraction(1, 2) if problem.name == "chain" and length > 1 else Fraction(0)
    if target == "one_step":
        return one_step(problem), windows(problem, 1)
    if target == "n_step":
        policy = data_policy(problem)
        return n_step(problem, length, policy, cut), windows(problem, length, behaviour=policy, cut=cut)
    data = windows(problem, length, cut=cut)
    if target == "chunk":
        return chunk(problem, length), data
    return decoupled(problem, length, PREFIXES[problem.name], DISTILL)[0], data


def learnt(problem: Mdp, settings: DqnSettings, data: WindowBatch, updates: int = DISCRETE_UPDATES) -> Array:
    """Values (K, live states, sequences) that a learner ends with."""
    learner = Dqn(problem.schema, settings, batch_size=len(data), device="cpu", seed=0)
    observation = {"observation": problem.observation(problem.live)}
    if settings.target.kind == "decoupled":
        updates = 2 * updates  # the distilled critic follows one that has to settle first
    return train(learner, [data], updates, lambda: learner.values(observation))


@pytest.mark.parametrize(("head", "target", "length", "problem"), combinations(4, problems=(grid(), chain())))
def test_discrete_values_end_at_the_fixed_point(head: str, target: str, length: int, problem: Mdp) -> None:
    answer, data = discrete_answer(problem, target)
    values = learnt(problem, dqn_settings(problem, head, target, length), data)
    expected = answer[problem.live]
    assert values.shape == (length, *expected.shape)
    span = np.ptp(expected)
    error = np.abs(values - expected).max((1, 2)) / span
    assert error.max() < TOLERANCE, f"error of each function {error}"
    if problem.name == "chain" and target != "decoupled":
        best_rest = values.reshape(length, len(problem.live), problem.actions, -1).max(-1)
        assert np.abs(best_rest - one_step(problem)[problem.live]).max() < TOLERANCE * span


@pytest.mark.parametrize("head", ["mse", *(pytest.param(head, marks=pytest.mark.slow) for head in HEADS[1:])])
def test_annealed_expectile_ends_at_the_same_fixed_point(head: str) -> None:
    problem = chain()
    answer, data = discrete_answer(problem, "one_step")
    settings = dqn_settings(problem, head, "one_step", 1, expectile=0.9, expectile_updates=DISCRETE_UPDATES // 2)
    assert np.abs(learnt(problem, settings, data) - answer[problem.live]).max() < TOLERANCE * np.ptp(answer)


# ---------------------------------------------------------------------------------------------- continuous actions

LENGTH = 2
SHARE = 0.7  # quantile or expectile of the flow's value
CONTINUOUS_UPDATES = 1600
POINTS = 128  # states and first actions of a batch
GRID = np.linspace(-0.9, 0.9, 10)  # states and actions at which values are compared


def continuous_chunk(target: str) -> int:
    return LENGTH if target == "chunk" else 1


def continuous_data(problem: Regulator, target: str) -> list[WindowBatch]:
    length, prefix = (1 if target == "one_step" else LENGTH), continuous_chunk(target)
    count = POINTS if length == prefix else POINTS // 2
    return regulator_windows(problem, length=length, prefix=prefix, count=count, batches=16, seed=1)


def shared_settings(problem: Regulator, head: str, target: str) -> dict[str, Any]:
    return {
        "head": head_settings(head, (-3.5, 0.5), 21),
        "target": target_settings(target, LENGTH),
        "chunk": continuous_chunk(target),
        "discount": problem.discount,
        "hidden": (64, 64),
        "critic_lr": 3e-3,
        "policy_lr": 3e-3,
        "polyak": 0.05,
        # The smallest of several critics lies below the fixed point by what they err, however little that is.
        "ensemble": 1,
    }


def points(target: str) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """States (n, 1) and action chunks (n, chunk) at which values are compared."""
    axes = np.meshgrid(*[GRID] * (1 + continuous_chunk(target)), indexing="ij")
    rows = np.stack([axis.ravel() for axis in axes], -1).astype(np.float32)
    return rows[:, :1], rows[:, 1:]


def check_continuous(
    problem: Regulator, learner: Any, backup: SoftBackup | ImplicitBackup, target: str, length: int
) -> None:
    answer = solve(
        problem,
        backup,
        length=1 if target == "one_step" else LENGTH,
        prefix=continuous_chunk(target),
        share=DISTILL if target == "decoupled" else 0.5,
    )
    state, action = points(target)
    expected = answer.q(state[:, 0].astype(np.float64), action.astype(np.float64))
    values = train(
        learner,
        continuous_data(problem, target),
        CONTINUOUS_UPDATES * (2 if target == "decoupled" else 1),
        lambda: np.asarray(learner.values({"observation": state}, action)),
    )
    assert values.shape == (length, len(state))
    # A network of finite width cannot be exact everywhere: the root mean square is held to the tolerance.
    span = np.ptp(expected)
    error, bias = np.sqrt(np.square(values - expected).mean(-1)) / span, (values - expected).mean(-1) / span
    assert error.max() < TOLERANCE, f"error {error}, mean {bias}"


@pytest.mark.parametrize(("head", "target", "length"), combinations(4))
def test_soft_values_end_at_the_fixed_point(head: str, target: str, length: int) -> None:
    problem = Regulator()
    settings = SacSettings(
        **shared_settings(problem, head, target),
        chain=ChainSettings(length=length, copy_every=5),
        initial_temperature=problem.temperature,
        temperature_lr=1e-12,
    )
    size = len(continuous_data(problem, target)[0])
    learner = Sac(problem.schema, settings, batch_size=size, device="cpu", seed=0)
    backup = SoftBackup(problem.temperature, continuous_chunk(target))
    check_continuous(problem, learner, backup, target, length)


@pytest.mark.parametrize(("head", "target", "length"), combinations(4, (1,)))
@pytest.mark.parametrize("loss", ["quantile", pytest.param("expectile", marks=pytest.mark.slow)])
def test_implicit_values_end_at_the_fixed_point(loss: Any, head: str, target: str, length: int) -> None:
    problem = Regulator()
    settings = FlowSettings(**shared_settings(problem, head, target), value_loss=loss, value_expectile=SHARE)
    size = len(continuous_data(problem, target)[0])
    learner = Flow(problem.schema, settings, batch_size=size, device="cpu", seed=0)
    check_continuous(problem, learner, ImplicitBackup(loss, SHARE, continuous_chunk(target)), target, length)


# ------------------------------------------------------------------------------------------- which of them are legal

LAYOUTS = ((1, 1), (3, 1), (3, 2), (3, 3), (2, 3))  # window length h and policy chunk h_a

LEGAL = {
    "one_step": {(1, 1)},
    "n_step": {(1, 1), (3, 1)},
    "chunk": {(1, 1), (3, 3)},
    "decoupled": {(1, 1), (3, 1), (3, 2), (3, 3)},
}


@pytest.mark.parametrize("name", ["sac", "flow", "dqn", "r2d2"])
def test_exactly_these_combinations_are_legal(name: str) -> None:
    for head, target, (length, action_chunk), functions in itertools.product(HEADS, TARGETS, LAYOUTS, CHAINS):
        flags = [
            *("--algorithm.name", name),
            *("--algorithm.head.kind", head),
            *("--algorithm.target.kind", target),
            *("--algorithm.target.length", str(length)),
            *("--algorithm.chunk", str(action_chunk)),
            *("--algorithm.chain.length", str(functions)),
            *("--env.id", "CartPole-v1" if name in ("dqn", "r2d2") else "Pendulum-v1"),
            *("--stop.steps", "1000"),
        ]
        legal = (length, action_chunk) in LEGAL[target] and not (name == "flow" and functions > 1)
        legal &= not (name == "r2d2" and target in ("chunk", "decoupled"))
        if legal:
            algorithm = load_config(None, flags).algorithm
            assert (algorithm.head.kind, algorithm.target.kind, algorithm.chain.length) == (head, target, functions)
            continue
        with pytest.raises(ConfigError) as refusal:
            load_config(None, flags)
        assert (
            "algorithm.chain.length (3)" in str(refusal.value)
            or "algorithm.target.kind" in str(refusal.value)
            or (f"algorithm.chunk ({action_chunk}) must not exceed algorithm.target.length ({length})")
            in str(refusal.value)
        )
