"""What a learner reports of its steps: sums over all learners' tokens, and means of them between two reports."""

from __future__ import annotations

import logging
from collections import Counter, defaultdict

import torch
from torch import Tensor

from configs.policy_gradient import PolicyGradientSettings
from learners.llm.batching import Rollouts
from learners.llm.objective import Targets, Terms
from learners.llm.parallel import Learners

LOG = logging.getLogger(__name__)
LAGS = 64  # versions; older tokens count as this old
SUMS = (
    *("completions", "reward", "shaped", "passed", "length", "cut"),  # over completions
    *("tokens", "learnt", "advantage", "squared_advantage", "zero_advantage", "controlled", "lag"),  # over tokens
    *("loss", "seen", "entropy", "ratio", "clipped", "reference", "teacher"),  # over those that updates are made of
    *("checked", "checked_gap"),  # over tokens of past weights, scored with these
)
MAXIMA = ("lag", "gap")  # reported; those of other numbers are for the message about losses that are not finite


class Measures:
    """The metrics of learner steps.

    The sampler–learner gap is |Δ log π| per token between what the actor stored and what the learner computes anew, taken before
    the first update of a step. At the same weights it is a test of their way to the actor (`gap/mean`, `gap/max`): of completions
    that were sampled wholly by the weights that the learner holds, and of those that `GapCheck` scores with the past weights that
    sampled them. By present weights, completions of older ones also show how far the policy has moved since
    (`gap/lag_<versions>`).
    """

    def __init__(
        self, settings: PolicyGradientSettings, learners: Learners, *, device: torch.device, gap_warning: float
    ) -> None:
        """gap_warning: mean gap at the same weights, in nats per token, above which a warning is logged."""
        self._settings = settings
        self._learners = learners
        self._device = device
        self._gap_warning = gap_warning
        self._gap_is_wide = False
        self._reset()
        self._begin()

    def _reset(self) -> None:
        self._sums: defaultdict[str, float] = defaultdict(float)  # since the last report
        self._largest: dict[str, float] = {}
        self._lags: Counter[int] = Counter()
        self._lag_gaps: defaultdict[int, list[float]] = defaultdict(lambda: [0.0, 0.0])
        self._norms: list[float] = []
        self._rate = 0.0

    def _begin(self) -> None:
        # Learners add these up, and one whose part has nothing to learn from needs them as well.
        self._step = {name: torch.zeros((), dtype=torch.float64, device=self._device) for name in SUMS}
        self._maxima: dict[str, Tensor] = {}

    def _add(self, **values: Tensor) -> None:
        for name, value in values.items():
            self._step[name] = self._step[name] + value.detach().sum(dtype=torch.float64)

    def _raise(self, **values: Tensor) -> None:
        for name, value in values.items():
            if value.numel():
                highest = value.detach().max().to(torch.float64)
                self._maxima[name] = torch.maximum(self._maxima[name], highest) if name in self._maxima else highest

    # ------------------------------------------------------------------------------------------ during a step

    def batch(self, batch: Rollouts, targets: Targets, *, version: int | None) -> None:
        """What is known before the forward pass. `version`: the newest published, None where none was."""
        self._begin()
        one = torch.ones_like(batch.reward)
        self._add(
            completions=one,
            reward=batch.reward,
            shaped=batch.shaped,
            passed=batch.passed,
            length=batch.length,
            cut=batch.cut,
            tokens=torch.ones_like(batch.old),
            learnt=targets.mask,
            advantage=targets.advantage,
            squared_advantage=targets.advantage.double().square(),
            zero_advantage=targets.advantage == 0,
        )
        self._raise(advantage=targets.advantage.abs(), reward=(batch.reward + batch.shaped).abs())
        for controlled in (targets.removed, targets.penalised):
            if controlled is not None:
                self._add(controlled=controlled)
        self._lag = torch.zeros(LAGS + 1, dtype=torch.float64, device=self._device)
        self._gap = torch.zeros(2, LAGS + 1, dtype=torch.float64, device=self._device)
        self._largest_gap = torch.zeros(LAGS + 1, dtype=torch.float64, device=self._device)
        if version is not None:
            lag = (version - batch.versions).clamp_min(0)
            self._add(lag=lag)
            self._raise(lag=lag)
            self._lag += torch.bincount(lag.clamp_max(LAGS), minlength=LAGS + 1)
            # Later tokens of a completion depend on keys and values of its earlier ones: its oldest token decides.
            oldest = torch.zeros_like(batch.length).scatter_reduce(0, batch.sequence, lag, "amax", include_self=False)
            self._oldest: Tensor | None = oldest[batch.sequence].clamp_max(LAGS)
        else:
            self._oldest = None

    def gap(self, batch: Rollouts, places: Tensor, new: Tensor) -> None:
        """The gap at the tokens at `places`, with the learner's log-probabilities under the weights that were last published."""
        if self._oldest is None or not len(places):
            return
        lag, apart = self._oldest[places], (new.detach() - batch.old[places]).abs().double()
        self._gap[0].index_add_(0, lag, apart)
        self._gap[1].index_add_(0, lag, torch.ones_like(apart))
        self._largest_gap.scatter_reduce_(0, lag, apart, "amax")

    def checked(self, gap: Tensor) -> None:
        """The gap at tokens (t,), each at the weights that sampled it."""
        self._add(checked=torch.ones_like(gap), checked_gap=gap)
        self._raise(gap=gap)

    def losses(self, terms: Terms, weights: Tensor, new: Tensor, old: Tensor, entropy: Tensor, mask: Tensor) -> None:
        """Of the t tokens of a micro-batch; `mask` are those learnt from."""
        ratio = (new.detach() - old).clamp(-20.0, 20.0).exp()
        self._add(
            loss=terms.per_token * weights,
            seen=mask,
            entropy=entropy * mask,
            ratio=ratio * mask,
            clipped=terms.clipped & mask,
        )
        if terms.reference is not None:
            self._add(reference=terms.reference * mask)
        if terms.teacher is not None:
            self._add(teacher=terms.teacher * mask)
        self._raise(log_ratio=((new.detach() - old) * mask).abs())

    def updated(self, norm: float, rate: float) -> None:
        """An update was made, with this norm of the gradient, before it was clipped, and this step size."""
        self._norms.append(norm)
        self._rate = rate

    def end(self) -> bool:
        """The step is made: adds what all learners counted, and warns where the gap at the same weights is wide.

        Returns whether there were completions of the weights that were last published, to which no update had been made.
        """
        self._raise(gap=self._largest_gap[:1])
        sums = torch.stack([self._step[name] for name in SUMS])
        packed = self._learners.sum_(torch.cat([sums, self._lag, self._gap.flatten()])).tolist()
        step = dict(zip(SUMS, packed, strict=False))
        lags, gaps, counts = (packed[len(SUMS) + i * (LAGS + 1) :][: LAGS + 1] for i in range(3))
        for name, value in step.items():
            self._sums[name] += value
        self._sums["steps"] += 1
        for lag in range(LAGS + 1):
            self._lags[lag] += round(lags[lag])
            self._lag_gaps[lag][0] += gaps[lag]
            self._lag_gaps[lag][1] += counts[lag]
        largest = {name: float(value) for name, value in self._maxima.items()}
        mine = torch.tensor([largest.get(name, 0.0) for name in MAXIMA], dtype=torch.float64, device=self._device)
        found = self._learners.gather(mine)[0].view(-1, len(MAXIMA)).amax(0).tolist()
        for name, value in zip(MAXIMA, found, strict=True):
            self._largest[name] = max(self._largest.get(name, 0.0), value)
        if same := counts[0] + step["checked"]:
            self._watch((gaps[0] + step["checked_gap"]) / same)
        return bool(counts[0])

    def _watch(self, gap: float) -> None:
        is_wide = gap > self._gap_warning
        if is_wide and not self._gap_is_wide and self._learners.rank == 0:
            LOG.warning(
                "log-probabilities of actors and learner at the same weights differ by %.3g nats per token in the mean, above "
                "learners.gap_warning (%g): weights may not arrive whole, or actors sample in another type or with other "
                "kernels (algorithm.correction_cap corrects for these)",
                gap,
                self._gap_warning,
            )
        self._gap_is_wide = is_wide

    # -------------------------------------------------------------------------------------------- between reports

    def statistics(self) -> str:
        """The extremes of this learner's part of the step, for the message about a loss that is not finite."""
        return ", ".join(
            f"largest |{name.replace('_', ' ')}| {float(value):.4g}" for name, value in self._maxima.items()
        )

    def report(self) -> dict[str, float]:
        """Metrics since the last call, empty if there were no steps; the counts `staleness/lag_<versions>` are sums, of tokens."""
        sums = self._sums
        steps = sums["steps"]
        if not steps:
            return {}
        completions, tokens = max(sums["completions"], 1.0), max(sums["tokens"], 1.0)
        seen = max(sums["seen"], 1.0)
        mean = sums["advantage"] / tokens
        updates = max(len(self._norms), 1)
        row = {
            "loss": sums["loss"] / updates,
            "gradient_norm": sum(self._norms) / updates,
            "learning_rate": self._rate,
            "entropy": sums["entropy"] / seen,
            "ratio/mean": sums["ratio"] / seen,
            "ratio/clipped_fraction": sums["clipped"] / seen,
            "advantage/mean": mean,
            "advantage/deviation": max(sums["squared_advantage"] / tokens - mean * mean, 0.0) ** 0.5,
            "advantage/zero_fraction": sums["zero_advantage"] / tokens,
            "reward/mean": sums["reward"] / completions,
            "reward/shaped_mean": sums["shaped"] / completions,
            "reward/pass_rate": sums["passed"] / completions,
            "length/mean": sums["length"] / completions,
            "length/cut_fraction": sums["cut"] / completions,
            "completions": sums["completions"] / steps,
            "tokens": sums["tokens"] / steps,
            "tokens_learnt_from": sums["learnt"] / steps,
        }
        settings = self._settings
        if settings.kl.coefficient:
            row["kl/reference"] = sums["reference"] / seen / settings.kl.coefficient
        if settings.teacher.path is not None and settings.teacher.coefficient:
            row["kl/teacher"] = sums["teacher"] / seen / settings.teacher.coefficient
        if settings.entropy.kind != "none":
            row["entropy/controlled_fraction"] = sums["controlled"] / tokens
        if any(self._lags.values()):
            row |= {"staleness/mean": sums["lag"] / tokens, "staleness/max": self._largest["lag"]}
            row |= {f"staleness/lag_{lag}": float(n) for lag, n in sorted(self._lags.items()) if n}
        for lag, (gap, count) in sorted(self._lag_gaps.items()):
            if count:
                row[f"gap/lag_{lag}"] = gap / count
        gap, count = self._lag_gaps[0]
        if same := count + sums["checked"]:
            row |= {"gap/mean": (gap + sums["checked_gap"]) / same, "gap/max": self._largest["gap"]}
        self._reset()
        return row
