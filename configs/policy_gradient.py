"""The typed settings of policy gradients for language models: advantage, loss, what is added to it, and extensions."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from configs.settings import CLASS, Settings, setting

Share = Annotated[float, Field(gt=0.0, lt=1.0)]

ADVANTAGES = ("grpo", "dr_grpo", "rloo", "whiten", "sign")
LOSSES = ("clip", "reinforce", "truncated", "gspo", "cispo", "decoupled", "nft")


class KlSettings(Settings):
    """Divergence from the frozen model that reinforcement began with."""

    coefficient: float = setting(
        0.0, "Weight of the divergence in the loss; 0 keeps no reference model.", unit="weight", ge=0.0, le=1e6
    )
    estimator: Literal["k1", "k2", "k3"] = setting(
        "k3", "Estimator at the sampled tokens (Schulman 2020); k3 is never negative.", unit="choice"
    )


class EntropySettings(Settings):
    """Against the collapse of entropy (Cui et al. 2025, arXiv 2505.22617): tokens whose log-probability and advantage covary most."""

    kind: Literal["none", "clip_cov", "kl_cov"] = setting(
        "none",
        "clip_cov takes some of those tokens out of the loss, kl_cov adds a divergence from the behaviour policy to theirs.",
        unit="choice",
    )
    fraction: float = setting(
        2e-4,
        "Such tokens among all tokens of a batch, as a fraction: 0.0002 is 0.02 %.",
        unit="fraction",
        gt=0.0,
        lt=1.0,
    )
    low: float = setting(
        1.0, "Lowest covariance of a token that clip_cov may take out.", unit="covariance", ge=-1e6, le=1e6
    )
    high: float = setting(
        5.0, "Highest covariance of a token that clip_cov may take out.", unit="covariance", ge=-1e6, le=1e6
    )
    coefficient: float = setting(1.0, "Weight of the divergence of kl_cov.", unit="weight", ge=0.0, le=1e6)


class OverlongSettings(Settings):
    """Completions that reach the most tokens allowed (Yu et al. 2025, DAPO, arXiv 2503.14476 §3.4)."""

    kind: Literal["none", "shape", "mask"] = setting(
        "none",
        "shape lowers the reward over the last `buffer` tokens before the limit, by up to `factor`; mask leaves cut-off "
        "completions out of the loss.",
        unit="choice",
    )
    buffer: int = setting(4, "Tokens before the limit over which the reward falls.", unit="tokens", ge=1, le=1_048_576)
    factor: float = setting(1.0, "Reward lost at the limit.", unit="reward", ge=0.0, le=1e6)


class HintSettings(Settings):
    """Prompts that no completion passed are sampled again with the beginning of their solution (GHPO, arXiv 2507.10628)."""

    shares: tuple[Share, ...] = setting(
        (), "Shares of the solution given, one after another; empty gives no hints.", unit="share", max_length=16
    )
    after: int = setting(0, "Learner steps before the first hint.", unit="learner steps", ge=0, le=10**9)


class TeacherSettings(Settings):
    """Reverse divergence to a teacher on the student's own completions (KDRL, arXiv 2506.02208)."""

    path: str | None = setting(
        None,
        "Folder of the teacher, a Hugging Face model with the same tokenizer; None has none.",
        unit="path",
        min_length=1,
    )
    coefficient: float = setting(5e-3, "Weight of the divergence in the loss.", unit="weight", ge=0.0, le=1e6)
    only_failed: bool = setting(False, "Leave completions that passed out of it.", unit="switch")


class StepCreditSettings(Settings):
    """Credit for the steps of a completion where the verifier scores them: min-form (PURE, arXiv 2504.15275)."""

    coefficient: float = setting(
        0.0, "Weight of the step advantage beside that of the outcome; 0 leaves it out.", unit="weight", ge=0.0, le=1e6
    )
    temperature: float = setting(
        0.1, "Temperature of the soft minimum over a completion's steps.", unit="reward", gt=0.0, le=1e6
    )


class SubsampleSettings(Settings):
    """Learning from part of what was sampled (D³S, arXiv 2509.22115)."""

    rollouts: int | None = setting(
        None,
        "Completions of each group that are learnt from, those that vary most in advantage; None takes all.",
        unit="completions",
        ge=2,
        le=4096,
    )
    tokens: float = setting(
        1.0,
        "Fraction of the tokens learnt from, those with the largest |advantage| · entropy.",
        unit="fraction",
        gt=0.0,
        le=1.0,
    )


class PolicyGradientSettings(Settings):
    """The advantage, the loss and what is added to it; extensions are off unless set."""

    advantage: str = setting(
        "grpo",
        "Of a completion within its group: grpo (reward − mean) / standard deviation; dr_grpo reward − mean; rloo reward − mean "
        "of the others; whiten reward − mean, divided by the deviation over the batch; sign ± without a baseline (PSR, NSR).",
        unit="name",
        pattern=rf"^({'|'.join(ADVANTAGES)}|{CLASS})$",
        allowed=f"{', '.join(ADVANTAGES)} or package.module:function",
        names=ADVANTAGES,
    )
    positive_weight: float = setting(
        0.1, "Weight of passed completions under the advantage sign, lambda.", unit="weight", ge=0.0, le=1e6
    )
    negative_weight: float = setting(
        1.0, "Weight of failed completions under the advantage sign.", unit="weight", ge=0.0, le=1e6
    )
    loss: str = setting(
        "clip",
        "clip is PPO's surrogate against the behaviour policy; reinforce has no correction; truncated weighs it by "
        "min(ratio, weight_cap); gspo clips the ratio of the whole completion; cispo clips the weight and keeps every gradient; "
        "decoupled clips against the learner's policy at the start of the step; nft is negative-aware fine-tuning.",
        unit="name",
        pattern=rf"^({'|'.join(LOSSES)}|{CLASS})$",
        allowed=f"{', '.join(LOSSES)} or package.module:function",
        names=LOSSES,
    )
    clip_low: float = setting(0.2, "The ratio is clipped below at 1 − this.", unit="ratio", ge=0.0, le=1.0)
    clip_high: float = setting(0.28, "The ratio is clipped above at 1 + this.", unit="ratio", ge=0.0, le=1e6)
    dual_clip: float | None = setting(
        None, "Largest ratio that a negative advantage is weighed with; None has none.", unit="ratio", gt=1.0, le=1e6
    )
    weight_cap: float = setting(
        2.0, "Cap C of the importance weight of truncated and decoupled.", unit="weight", gt=0.0, le=1e6
    )
    correction_cap: float | None = setting(
        None,
        "Weigh every token's loss by min(learner's / actor's probability at the same policy, this), for where actors sample "
        "with other kernels or types (truncated importance sampling); costs a forward pass; None leaves it out.",
        unit="weight",
        gt=0.0,
        le=1e6,
    )
    mean: Literal["token", "sequence", "constant"] = setting(
        "token",
        "Loss over the tokens of all completions of the batch alike; mean over each completion first; or their sum divided by "
        "sampling.max_tokens (Dr. GRPO).",
        unit="choice",
    )
    negative_floor: float = setting(
        1.0, "Lowest implicit ratio of a failed completion under the loss nft.", unit="ratio", gt=0.0, le=1e6
    )
    kl: KlSettings = KlSettings()
    entropy: EntropySettings = EntropySettings()
    overlong: OverlongSettings = OverlongSettings()
    hints: HintSettings = HintSettings()
    teacher: TeacherSettings = TeacherSettings()
    steps: StepCreditSettings = StepCreditSettings()
    subsample: SubsampleSettings = SubsampleSettings()

    def conflicts(self, *, group_size: int, max_tokens: int) -> Iterator[str]:
        """One line for each combination of settings that cannot run."""
        needs_group = self.advantage in ("grpo", "dr_grpo", "rloo", "whiten") or self.loss == "nft"
        if group_size == 1 and needs_group:
            yield f"sampling.group_size 1 has nothing to compare with: algorithm.advantage {self.advantage} needs at least 2"
        if self.loss == "nft" and (self.steps.coefficient or self.overlong.kind == "shape"):
            yield (
                "algorithm.loss nft learns from passes alone: algorithm.steps.coefficient and algorithm.overlong.kind shape would do "
                "nothing; leave them out"
            )
        if self.subsample.rollouts is not None and self.subsample.rollouts > group_size:
            yield (
                f"algorithm.subsample.rollouts ({self.subsample.rollouts}) must not exceed sampling.group_size "
                f"({group_size})"
            )
        if self.overlong.kind == "shape" and self.overlong.buffer > max_tokens:
            yield (
                f"algorithm.overlong.buffer ({self.overlong.buffer}) must not exceed sampling.max_tokens ({max_tokens})"
            )
        if self.advantage == "sign" and self.overlong.kind == "shape":
            yield (
                "algorithm.advantage sign looks at passes alone: algorithm.overlong.kind shape would do nothing; take mask, or "
                "another advantage"
            )
        if self.dual_clip is not None and self.loss not in ("clip", "decoupled"):
            yield f"algorithm.dual_clip has no effect on algorithm.loss {self.loss}; leave it out"
        if self.loss == "gspo" and self.clip_high > 0.1:
            yield (
                f"algorithm.loss gspo clips the ratio of whole completions, and algorithm.clip_high {self.clip_high:g} would "
                "never be reached; set algorithm.clip_low 3e-4 and algorithm.clip_high 4e-4, as its authors do, or others below 0.1"
            )
        if self.teacher.path is not None and not self.teacher.coefficient:
            yield "algorithm.teacher.coefficient is 0: the teacher would be computed for nothing; leave algorithm.teacher.path out"
        if self.entropy.low > self.entropy.high:
            yield f"algorithm.entropy.low ({self.entropy.low:g}) must not exceed algorithm.entropy.high ({self.entropy.high:g})"
        if list(self.hints.shares) != sorted(set(self.hints.shares)):
            yield f"algorithm.hints.shares must rise from one to the next, received {' '.join(map(str, self.hints.shares))}"
