"""Random numbers that follow from a seed and a position, and the tokens they choose.

Every token of a completion is chosen by one uniform number that is a hash of (the completion's seed, the token's position). There
is no generator whose state would depend on what else runs: a completion is the same alone, in a crowd, and in another process.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

_STEP = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio, odd: SplitMix64's increment
_SHORT = 1024  # a vocabulary below this is summed up as a whole


def uniform(seeds: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Uniform numbers in [0, 1), multiples of 2^-53: number `positions` of each seed's own SplitMix64 sequence.

    SplitMix64 (Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators", OOPSLA) computes its t-th number
    from the seed directly. The seed is mixed first, since plain SplitMix64 sequences of seeds that lie a multiple of the increment
    apart are the same one, shifted.

    Args:
        seeds: int64 (n,).
        positions: int64 (n,), not negative.

    Returns:
        float64 (n,).
    """
    mixed = _mix(_mix(seeds.astype(np.uint64) ^ _STEP) + (positions.astype(np.uint64) + np.uint64(1)) * _STEP)
    return (mixed >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mix(bits: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64, a bijection of 64 bits (arrays wrap silently, as it needs)."""
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    bits = bits ^ (bits >> np.uint64(31))
    return bits


def inverse_cdf(weights: Tensor, uniforms: Tensor) -> Tensor:
    """Tokens drawn in proportion to `weights`: the first at which the sum of the weights exceeds uniform × their total.

    Sums over blocks of the vocabulary are in the weights' type and what they add up to in float64, so that a token's chance is
    right to about 1e-6 of itself, however small it is and however large the vocabulary: sums in float32 throughout would not
    resolve what lies below 6e-8. A token without weight is never drawn. Memory: one copy of the weights at most.

    Args:
        weights: (n, V) float32, not negative, some above 0 in each row; they need not add up to 1.
        uniforms: float64 (n,) in [0, 1).

    Returns:
        int64 (n,).
    """
    count, vocab = weights.shape
    if vocab < _SHORT:
        cumulative = weights.cumsum(-1, dtype=torch.float64)
        return _first_above(cumulative, (uniforms * cumulative[:, -1]).unsqueeze(-1)).squeeze(-1)
    # Two levels: summing blocks up is some ten times faster than a running sum over the whole vocabulary.
    size = 1 << (vocab.bit_length() // 2)
    if vocab % size:
        weights = torch.nn.functional.pad(weights, (0, size - vocab % size))
    blocks = weights.view(count, -1, size)
    cumulative = blocks.sum(-1).cumsum(-1, dtype=torch.float64)
    target = (uniforms * cumulative[:, -1]).unsqueeze(-1)
    block = _first_above(cumulative, target)
    before = torch.where(block > 0, cumulative.gather(-1, (block - 1).clamp(min=0)), 0.0)
    inside = blocks.gather(1, block.unsqueeze(-1).expand(-1, -1, size)).squeeze(1).cumsum(-1, dtype=torch.float64)
    return (block * size + _first_above(inside, target - before)).squeeze(-1)


def _first_above(cumulative: Tensor, target: Tensor) -> Tensor:
    """int64 (n, 1): first column above `target` (n, 1), or, where rounding leaves none, the last that adds anything."""
    found = torch.searchsorted(cumulative, target, right=True)
    return torch.minimum(found, (cumulative < cumulative[:, -1:]).sum(-1, keepdim=True))
