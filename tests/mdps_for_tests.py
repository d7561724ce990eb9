"""Small problems whose values are known, the values of every target by dynamic programming, and exact data to learn them from.

Each target has a fixed point of its own: where no network errs, a learner with that target ends there and nowhere else.
The finite problems are solved with float64 tables; the regulator's with a Chebyshev polynomial of the state.
Their windows list every action sequence and every outcome as often as they are probable, so a batch is the expectation.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

import numpy as np
from numpy.polynomial import chebyshev
from numpy.polynomial.hermite_e import hermegauss
from numpy.typing import NDArray

from replay.schema import Field, StepSchema, WindowBatch

Array = NDArray[np.float64]

VOID = 7.0  # reward in rows where none was earned: a learner that reads it does not get right answers
SWEEPS = 10_000  # of value iteration, many more than any of these problems needs

# ------------------------------------------------------------------------------------------------ finite problems


@dataclass(frozen=True)
class Mdp:
    """A finite problem. Nothing is earned behind a terminal state.

    counts: int (states, actions, states), a transition's probability is its share of the counts of its state and action.
    rewards: (states, actions, states).
    terminal: bool (states,).
    """

    name: str
    counts: NDArray[np.int64]
    rewards: Array
    terminal: NDArray[np.bool_]
    discount: float

    @property
    def states(self) -> int:
        return len(self.terminal)

    @property
    def actions(self) -> int:
        return int(self.counts.shape[1])

    @property
    def live(self) -> NDArray[np.int64]:
        """Numbers of the states that are not terminal."""
        return np.flatnonzero(~self.terminal)

    @property
    def probability(self) -> Array:
        """(states, actions, states)."""
        shares: Array = self.counts / self.counts.sum(-1, keepdims=True)
        return shares

    @property
    def schema(self) -> StepSchema:
        """Observations are one-hot vectors of the state."""
        return StepSchema(
            {"observation": Field("observation", "float32", (self.states,))},
            Field("action", "int64", choices=self.actions),
        )

    def observation(self, state: NDArray[np.int64]) -> NDArray[np.float32]:
        """(*shape, states) of states (*shape,)."""
        rows: NDArray[np.float32] = np.eye(self.states, dtype=np.float32)[state]
        return rows

    def one(self) -> tuple[Array, Array]:
        """Expected reward (states, actions), and γ P(s' | s, a) (states, actions, states), 0 where s' is terminal."""
        probability = self.probability
        return (probability * self.rewards).sum(-1), self.discount * probability * ~self.terminal

    def sequences(self, length: int) -> tuple[Array, Array]:
        """`one` for sequences of `length` actions executed open loop: (states, actions^length[, states]), first action
        most significant."""
        reward, step = self.one()
        total, reached = reward, step
        for _ in range(length - 1):
            later = np.einsum("ias,sq->iaq", step, total)
            total = (reward[..., None] + later).reshape(self.states, -1)
            reached = np.einsum("ias,sqt->iaqt", step, reached).reshape(self.states, -1, self.states)
        return total, reached


def chain() -> Mdp:
    """A corridor of five states: its right end pays 1 and its left end 0.2, both end the episode; actions left, right."""
    states = 7  # 0 and 6 are the ends
    counts, rewards = np.zeros((states, 2, states), np.int64), np.zeros((states, 2, states))
    for state in range(states):
        counts[state, 0, max(state - 1, 0)] = counts[state, 1, min(state + 1, states - 1)] = 1
    rewards[1, 0, 0], rewards[5, 1, 6] = 0.2, 1.0
    return Mdp("chain", counts, rewards, np.isin(np.arange(states), (0, 6)), 0.9)


def grid() -> Mdp:
    """Three by three cells, a goal (+1) in a corner with a pit (−1) below it; one move in three slips to its right.

    Actions are up, right, down, left; a move against the border stays where it is.
    """
    moves = [(-1, 0), (0, 1), (1, 0), (0, -1)]
    counts, rewards = np.zeros((9, 4, 9), np.int64), np.zeros((9, 4, 9))
    for row, column, action in itertools.product(range(3), range(3), range(4)):
        for turn, weight in ((0, 2), (1, 1)):
            down, right = moves[(action + turn) % 4]
            reached = 3 * min(max(row + down, 0), 2) + min(max(column + right, 0), 2)
            counts[3 * row + column, action, reached] += weight
    rewards[:, :, 2], rewards[:, :, 5] = 1.0, -1.0
    return Mdp("grid", counts, rewards, np.isin(np.arange(9), (2, 5)), 0.9)


# ------------------------------------------------------------------------------ fixed points of the finite problems


def expectile(values: Array, share: float) -> Array:
    """q with Σ w (y − q) = 0 over the last axis, w = `share` where y ≥ q and 1 − `share` below it.

    A classification head ends at the same q: cross-entropies with these weights are least where the probabilities are the
    weighted mean of the labels, whose mean is the weighted mean of the y.
    """
    q: Array = values.mean(-1, keepdims=True)
    while True:  # Newton's method on a piecewise linear, increasing function: ends after finitely many steps
        weight = np.where(values >= q, share, 1.0 - share)
        better: Array = (weight * values).sum(-1, keepdims=True) / weight.sum(-1, keepdims=True)
        if np.abs(better - q).max() < 1e-14:
            return better[..., 0]
        q = better


def fixed_point(operator: Callable[[Array], Array], start: Array) -> Array:
    """Where a contraction leaves its argument, to 1e-13."""
    value = start
    for _ in range(SWEEPS):
        value, before = operator(value), value
        if np.abs(value - before).max() < 1e-13:
            return value
    raise AssertionError("the operator does not contract")


def one_step(mdp: Mdp) -> Array:
    """Q* (states, actions)."""
    reward, step = mdp.one()
    return fixed_point(lambda q: reward + step @ q.max(-1), np.zeros_like(reward))


def n_step(mdp: Mdp, length: int, behaviour: NDArray[np.int64] | None = None, cut: Fraction = Fraction(0)) -> Array:
    """Fixed point (states, actions) of uncorrected n-step targets, whose later actions are those of the data.

    behaviour: (states, actions), how often the data's policy takes each action; None takes all evenly.
    cut: probability that a window is truncated before each of its steps but the first; it bootstraps from there.
    """
    reward, step = mdp.one()
    counts = np.ones_like(reward) if behaviour is None else behaviour
    policy = counts / counts.sum(-1, keepdims=True)

    def backup(q: Array) -> Array:
        best = q.max(-1)
        value = best
        for _ in range(length - 1):
            followed = (policy * (reward + step @ value)).sum(-1)
            value = float(cut) * best + float(1 - cut) * followed
        q = reward + step @ value
        return q

    return fixed_point(backup, np.zeros_like(reward))


def chunk(mdp: Mdp, length: int) -> Array:
    """Open-loop values (states, actions^length): the best sequence of `length` actions again and again after this one."""
    reward, reached = mdp.sequences(length)
    return fixed_point(lambda q: reward + reached @ q.max(-1), np.zeros_like(reward))


def decoupled(mdp: Mdp, length: int, prefix: int, share: float) -> tuple[Array, Array]:
    """The distilled critic (states, actions^prefix) and the chunk critic (states, actions^length) of uniformly random data.

    The distilled critic is the expectile `share` over the rest of a sequence, which is even and independent: also where
    the episode ended inside, as the missing actions are drawn so.
    """
    reward, reached = mdp.sequences(length)

    def distilled(q: Array) -> Array:
        return expectile(q.reshape(mdp.states, mdp.actions**prefix, -1), share)

    full = fixed_point(lambda q: reward + reached @ distilled(q).max(-1), np.zeros_like(reward))
    return distilled(full), full


# --------------------------------------------------------------------------------------- data of the finite problems


class Path(NamedTuple):
    """What may follow a state and a first action, and how probable it is."""

    states: tuple[int, ...]
    actions: tuple[int, ...]
    rewards: tuple[float, ...]
    terminal: bool
    probability: Fraction


def windows(
    mdp: Mdp, length: int, *, behaviour: NDArray[np.int64] | None = None, cut: Fraction = Fraction(0)
) -> WindowBatch:
    """Every window of up to `length` steps from every state and first action, repeated in proportion to its probability.

    `behaviour` and `cut` as in `n_step`. Each pair of state and first action has a multiple of its own.
    """
    paths = []
    for state, action in itertools.product(mdp.live.tolist(), range(mdp.actions)):
        begun = Path((state,), (), (), False, Fraction(1))
        cell = list(_follow(mdp, begun, [(action, Fraction(1))], length, behaviour, cut))
        scale = math.lcm(*(path.probability.denominator for path in cell))
        repeats = [int(path.probability * scale) for path in cell]
        common = math.gcd(*repeats)
        for path, repeat in zip(cell, repeats, strict=True):
            paths += [path] * (repeat // common)
    return _batch(mdp, paths, length)


def _follow(
    mdp: Mdp,
    path: Path,
    choices: Sequence[tuple[int, Fraction]],
    length: int,
    behaviour: NDArray[np.int64] | None,
    cut: Fraction,
) -> Iterator[Path]:
    """All ways on from `path` when its next action is one of `choices`."""
    for action, likely in choices:
        counts = mdp.counts[path.states[-1], action]
        for state in np.flatnonzero(counts).tolist():
            probability = path.probability * likely * Fraction(int(counts[state]), int(counts.sum()))
            reward = float(mdp.rewards[path.states[-1], action, state])
            ended = bool(mdp.terminal[state])
            longer = Path((*path.states, state), (*path.actions, action), (*path.rewards, reward), ended, probability)
            if ended or len(longer.actions) == length:
                yield longer
                continue
            if cut:
                yield longer._replace(probability=probability * cut)
            weights = [1] * mdp.actions if behaviour is None else behaviour[state].tolist()
            following = [(a, Fraction(w, sum(weights))) for a, w in enumerate(weights) if w]
            yield from _follow(
                mdp, longer._replace(probability=probability * (1 - cut)), following, length, behaviour, cut
            )


def _batch(mdp: Mdp, paths: Sequence[Path], length: int) -> WindowBatch:
    steps = np.zeros((len(paths), length + 1), mdp.schema.packed)
    steps["reward"] = VOID
    taken = np.array([len(path.actions) for path in paths], np.int32)
    for row, path in zip(steps, paths, strict=True):
        size = len(path.actions)
        row["observation"][: size + 1] = mdp.observation(np.array(path.states))
        row["action"][:size] = path.actions
        row["reward"][:size] = path.rewards
        row["is_last"][size] = path.terminal or size < length
        row["is_terminal"][size] = path.terminal
        row[size + 1 :] = row[size]
    return batch_of(steps, taken)


def batch_of(steps: np.ndarray, length: NDArray[np.int32]) -> WindowBatch:
    """The windows `steps` (batch, rows) as a table of just these would deliver them, each equally probable."""
    count = len(steps)
    return WindowBatch(
        steps=steps,
        length=length,
        item=np.arange(count, dtype=np.int64),
        shard=np.zeros(count, np.int32),
        probability=np.full(count, 1.0 / count),
        size=count,
    )


# ---------------------------------------------------------------------------------------- linear-quadratic regulator

REST = np.array([-0.75, -0.25, 0.25, 0.75])  # actions of the data after those that the policy chooses
NODES = 16  # values of the state at which the value is solved for
HERMITE = 12  # points per action over which the policy's expectations are taken
DENSE = 400  # evenly spaced actions that stand for uniformly random ones


def combinations(values: Array, times: int) -> Array:
    """Every sequence of `times` of `values`, (values^times, times)."""
    return np.array(list(itertools.product(values, repeat=times))).reshape(len(values) ** times, times)


@dataclass(frozen=True)
class Regulator:
    """x' = decay x + gain a, reward −x² − price a². With decay + gain ≤ 1, x and a in [−1, 1] keep x' there.

    temperature: that of the entropy, fixed.
    """

    decay: float = 0.5
    gain: float = 0.5
    price: float = 0.3
    discount: float = 0.7
    temperature: float = 0.05

    @property
    def schema(self) -> StepSchema:
        return StepSchema({"observation": Field("observation", "float32", (1,))}, Field("action", "float32", (1,)))

    def play(self, x: Array, actions: Array) -> tuple[Array, Array]:
        """Discounted reward and last state after `actions` (*shape, steps) from `x` (*shape,)."""
        total: Array = np.zeros(np.broadcast_shapes(x.shape, actions.shape[:-1]))
        for i in range(actions.shape[-1]):
            action = actions[..., i]
            total = total - self.discount**i * (x * x + self.price * action * action)
            x = self.decay * x + self.gain * action
        return total, x

    def riccati(self) -> tuple[float, float]:
        """p and k of V*(x) = −p x² and a* = −k x, without entropy and without bounds."""
        p = 0.0
        for _ in range(SWEEPS):
            k = self.discount * p * self.gain * self.decay / (self.price + self.discount * p * self.gain**2)
            p = 1.0 + self.price * k * k + self.discount * p * (self.decay - self.gain * k) ** 2
        return p, k


class Solution(NamedTuple):
    """Values of one target for a regulator.

    q: from states (*shape,) and action chunks (*shape, chunk) to the critic that the policy climbs (*shape,).
    v: from states to the value that targets bootstrap from.
    policy: means and log deviations before tanh at `states`, each (states, chunk); empty where no policy takes part.
    """

    q: Callable[[Array, Array], Array]
    v: Callable[[Array], Array]
    states: Array
    policy: tuple[Array, Array]


Backup = Callable[[Callable[[Array, Array], Array], Array], Array]


def solve(problem: Regulator, backup: Backup, *, length: int = 1, prefix: int = 1, share: float = 0.5) -> Solution:
    """The fixed point of windows of `length` steps with a critic over `prefix` of their actions.

    The rest of the actions are one of `REST` each, evenly, and the critic takes the expectile `share` over them. So one_step
    is (1, 1), n_step is (n, 1) with share 0.5, chunk is (h, h), and decoupled is (h, h_a).
    `backup` turns a critic and states into values: `SoftBackup` or `ImplicitBackup`.
    """
    rest = combinations(REST, length - prefix)
    nodes = chebyshev.chebpts1(NODES)

    def critic(value: Array) -> Callable[[Array, Array], Array]:
        coefficients = chebyshev.chebfit(nodes, value, NODES - 1)

        def q(x: Array, actions: Array) -> Array:
            shape = np.broadcast_shapes(x.shape, actions.shape[:-1])
            first = np.broadcast_to(actions[..., None, :], (*shape, len(rest), prefix))
            last = np.broadcast_to(rest, (*shape, len(rest), length - prefix))
            reward, after = problem.play(x[..., None], np.concatenate((first, last), -1))
            return expectile(reward + problem.discount**length * chebyshev.chebval(after, coefficients), share)

        return q

    value = fixed_point(lambda v: backup(critic(v), nodes), np.zeros(NODES))
    coefficients = chebyshev.chebfit(nodes, value, NODES - 1)
    policy = (backup.mean, backup.log_deviation) if isinstance(backup, SoftBackup) else (np.empty(0), np.empty(0))
    return Solution(critic(value), lambda x: np.asarray(chebyshev.chebval(x, coefficients)), nodes, policy)


class SoftBackup:
    """V(x) = max over squashed Gaussians of E[Q(x, a) − α log π(a)], the value that soft actor-critic reaches.

    Its policy is the best of its class in each state, not the softmax of Q. Keeps the policy, to start from it at the
    next call.
    """

    def __init__(self, temperature: float, chunk: int) -> None:
        self.temperature = temperature
        self.chunk = chunk
        points, weights = hermegauss(HERMITE)
        self.noise = combinations(points, chunk)  # (points^chunk, chunk)
        self.weight: Array = combinations(weights / weights.sum(), chunk).prod(-1)
        self.mean = np.zeros((NODES, chunk))
        self.log_deviation = np.full((NODES, chunk), -1.0)

    def __call__(self, q: Callable[[Array, Array], Array], x: Array) -> Array:
        """Newton's method with differences for derivatives, at every state at once."""
        size, step = 2 * self.chunk, 1e-4
        basis = np.eye(size)
        for _ in range(50):
            at = np.concatenate((self.mean, self.log_deviation), -1)
            points = [at + step * (i * basis[a] + j * basis[b]) for a, b, i, j in _crosses(size)]
            values = self.objective(q, x, np.stack(points)).reshape(size, size, 2, 2, len(x))
            gradient = np.stack([values[a, a, 1, 1] - values[a, a, 0, 0] for a in range(size)], -1) / (4 * step)
            bent = values[:, :, 1, 1] - values[:, :, 1, 0] - values[:, :, 0, 1] + values[:, :, 0, 0]
            curvature, axes = np.linalg.eigh(bent.transpose(2, 0, 1) / (4 * step * step))
            along = np.einsum("xij,xi->xj", axes, gradient) / np.maximum(np.abs(curvature), 1e-3)
            move = np.clip(np.einsum("xij,xj->xi", axes, along), -0.5, 0.5)
            tries = np.stack([at + share * move for share in (1.0, 0.5, 0.25, 0.05, 0.0)])
            heights = self.objective(q, x, tries)
            at = np.take_along_axis(tries, heights.argmax(0)[None, :, None], 0)[0]
            self.mean, self.log_deviation = at[:, : self.chunk], at[:, self.chunk :]
            if np.abs(move).max() < 1e-7:
                break
        best: Array = heights.max(0)
        return best

    def objective(self, q: Callable[[Array, Array], Array], x: Array, at: Array) -> Array:
        """E[Q − α log π] (*shape, states) of means and log deviations `at` (*shape, states, 2 chunk)."""
        mean, log_deviation = at[..., None, : self.chunk], at[..., None, self.chunk :]
        u = mean + np.exp(log_deviation) * self.noise
        # −E log N(u) in closed form; log(1 − tanh²) = 2 (log 2 − u − log(1 + e^(−2u))).
        entropy = (log_deviation[..., 0, :] + 0.5 * math.log(2.0 * math.pi * math.e)).sum(-1)
        squash = 2.0 * (math.log(2.0) - u - np.logaddexp(0.0, -2.0 * u)).sum(-1)
        value: Array = ((q(x[:, None], np.tanh(u)) + self.temperature * squash) * self.weight).sum(-1)
        return np.asarray(value + self.temperature * entropy)


def _crosses(size: int) -> Iterator[tuple[int, int, int, int]]:
    """Axes a, b and signs i, j of the corners that a mixed second difference takes."""
    return itertools.product(range(size), range(size), (-1, 1), (-1, 1))


@dataclass(frozen=True)
class ImplicitBackup:
    """V(x) = quantile or expectile `share` of Q(x, ·) over uniformly random action chunks of `chunk` steps."""

    kind: str
    share: float
    chunk: int = 1

    def __call__(self, q: Callable[[Array, Array], Array], x: Array) -> Array:
        count = DENSE if self.chunk == 1 else 60
        line = (np.arange(count) + 0.5) * 2.0 / count - 1.0
        actions = combinations(line, self.chunk)
        values = q(x[:, None], actions)
        if self.kind == "quantile":
            return np.quantile(values, self.share, axis=-1)
        return expectile(values, self.share)


def regulator_windows(
    problem: Regulator, *, length: int, prefix: int, count: int, batches: int, seed: int
) -> list[WindowBatch]:
    """Batches of windows of `length` steps. Their states and first `prefix` actions fill [−1, 1] evenly, `count` points a
    batch; each point is followed by every combination of `REST`. `seed` shifts the points of each batch."""
    generator = np.random.default_rng(seed)
    size = 1 + prefix
    root = 2.0
    for _ in range(64):  # the real root of r^(size + 1) = r + 1, which spreads the points (Roberts 2018, R-sequence)
        root = (1.0 + root) ** (1.0 / (size + 1))
    spread = np.arange(count)[:, None] * root ** -np.arange(1.0, size + 1)
    rest = combinations(REST, length - prefix)
    found = []
    for _ in range(batches):
        points = 2.0 * ((spread + generator.random(size)) % 1.0) - 1.0
        points = np.repeat(points, len(rest), 0)
        actions = np.concatenate((points[:, 1:], np.tile(rest, (count, 1))), 1)
        steps = np.zeros((len(points), length + 1), problem.schema.packed)
        steps["reward"] = VOID
        x = points[:, 0]
        for i in range(length):
            steps["observation"][:, i, 0], steps["action"][:, i, 0] = x, actions[:, i]
            steps["reward"][:, i], x = problem.play(x, actions[:, i : i + 1])
        steps["observation"][:, length, 0] = x
        found.append(batch_of(steps, np.full(len(points), length, np.int32)))
    return found
