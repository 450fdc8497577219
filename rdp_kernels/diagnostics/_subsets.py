"""Random subsets, all different."""

from __future__ import annotations

import itertools
import math

import torch


def subsets(n: int, k: int, limit: int, generator: torch.Generator) -> list[tuple[int, ...]]:
    """All subsets of `range(n)` with `k` elements, or `limit` different random ones where there are more."""
    if math.comb(n, k) <= limit:
        return list(itertools.combinations(range(n), k))
    drawn: dict[tuple[int, ...], None] = {}
    while len(drawn) < limit:
        drawn[tuple(sorted(torch.randperm(n, generator=generator)[:k].tolist()))] = None
    return list(drawn)
