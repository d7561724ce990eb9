"""A plain truncation of distributions, to compare with."""

from __future__ import annotations

import math

import numpy as np
import torch


def naive_truncation(scaled: torch.Tensor, top_k: int | None, top_p: float) -> tuple[torch.Tensor, np.ndarray]:
    """Which tokens may be sampled (n, V) and the log of their mass (n,), by sorting and adding up row by row."""
    allowed = torch.zeros_like(scaled, dtype=torch.bool)
    kept = []
    for row, probabilities in zip(allowed, torch.softmax(scaled.double(), -1), strict=True):
        order = probabilities.argsort(descending=True)[: top_k or len(probabilities)]
        inside = probabilities[order] / probabilities[order].sum()
        total, count = 0.0, 0
        while total < top_p - 1e-9 and count < len(order):
            total += float(inside[count])
            count += 1
        row[order[:count]] = True
        kept.append(math.log(float(probabilities[order[:count]].sum())))
    return allowed, np.array(kept)
