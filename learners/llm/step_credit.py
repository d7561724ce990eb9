"""Credit for the steps of a completion, where the verifier scores them (Cheng et al. 2025, PURE, arXiv 2504.15275).

A completion is worth what its worst step still to come is worth, not the sum of its steps: a sum is raised by adding steps.
"""

from __future__ import annotations

import torch
from torch import Tensor

from learners.llm.advantages import groups


def min_form(step_reward: Tensor, step_sequence: Tensor, *, temperature: float) -> Tensor:
    """w p of each step, float64 (S,), w the softmax of −p / temperature over its completion's steps: their sum is a soft minimum.

    Args:
        step_reward: float (S,), p.
        step_sequence: int64 (S,), the completion of each step, numbered from 0.
        temperature: of the softmax, in the unit of rewards; towards 0 the sum is the minimum, towards infinity the mean.
    """
    reward = step_reward.double()
    size = int(step_sequence.max()) + 1 if len(step_sequence) else 0
    # Less its completion's least, no exponent is above 0.
    least = reward.new_zeros(size).scatter_reduce(0, step_sequence, reward, "amin", include_self=False)
    raw = torch.exp((least[step_sequence] - reward) / temperature)
    return raw / reward.new_zeros(size).index_add(0, step_sequence, raw)[step_sequence] * reward


def step_advantage(
    step_reward: Tensor,
    step_end: Tensor,
    step_sequence: Tensor,
    *,
    length: Tensor,
    group: Tensor,
    temperature: float,
) -> Tensor:
    """The advantage of each token by the scored steps: float32 (T,), T the sum of `length`.

    A step's min-form reward r falls on its last token. A token's return is the sum of those on it and after it, and its baseline,
    for each token from it to the end, the others' reward per token, averaged over the others of the group. Of completions
    without scored steps, and of groups with one completion that has them, all tokens have 0; they are in no baseline.

    Args:
        step_reward: float (S,), of all completions' steps.
        step_end: int64 (S,), tokens of the completion up to the step's end, from 1 to its length.
        step_sequence: int64 (S,), the completion of each step, numbered from 0.
        length: int64 (N,), tokens of each completion.
        group: int64 (N,).
        temperature: of the soft minimum, see `min_form`.

    Raises:
        ValueError: shapes do not agree, or a step ends outside its completion.
    """
    if not step_reward.shape == step_end.shape == step_sequence.shape:
        raise ValueError(
            f"expected as many step ends and completions as step rewards ({len(step_reward)}), got {len(step_end)} and "
            f"{len(step_sequence)}"
        )
    if bool(((step_end < 1) | (step_end > length[step_sequence])).any()):
        raise ValueError("expected each step to end within its completion, at 1 to its length in tokens; one does not")
    completions, ends = len(length), length.cumsum(0)
    credit = min_form(step_reward, step_sequence, temperature=temperature)
    scored = torch.bincount(step_sequence, minlength=completions) > 0
    per_token = credit.new_zeros(completions).index_add(0, step_sequence, credit) / length.clamp_min(1)
    # The others' mean is what is left of the group's sum, to which those without steps add 0, over as many as are scored.
    sums = groups(per_token, group)
    others = (groups(scored, group).mean * sums.count).round() - 1
    baseline = (sums.mean * sums.count - per_token) / others.clamp_min(1)

    sequence = torch.repeat_interleave(torch.arange(completions, device=length.device), length)
    position = torch.arange(len(sequence), device=length.device)
    first = (ends - length)[step_sequence]
    at_token = credit.new_zeros(len(sequence)).index_add(0, first + step_end - 1, credit)
    through = at_token.cumsum(0)
    to_go = through[(ends - 1)[sequence]] - through + at_token
    advantage = to_go - baseline[sequence] * (ends[sequence] - position)
    return torch.where((scored & (others > 0))[sequence], advantage, 0.0).float()
