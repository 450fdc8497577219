"""Random choices of k out of n, all different."""

from __future__ import annotations

import itertools
import math

import torch


def subsets(n: int, k: int, limit: int, generator: torch.Generator) -> list[tuple[int, ...]]:
    """All choices of `k` out of `range(n)` where there are no more than `limit`, else `limit` different random ones."""
    if math.comb(n, k) <= limit:
        return list(itertools.combinations(range(n), k))
    drawn: dict[tuple[int, ...], None] = {}
    while len(drawn) < limit:
        drawn[tuple(sorted(torch.randperm(n, generator=generator)[:k].tolist()))] = None
    return list(drawn)
