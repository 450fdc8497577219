"""How tensors `[B, ...]` are cut into tiles: sample by sample, each a matrix of `positions` × `width` elements.

| layout | positions | width | γ |
|---|---|---|---|
| no γ | 1 | all of a sample | |
| channel last `[B, T, C]`, channels_last `[B, C, H, W]` | T; H · W | C | one factor a column |
| `[B, C, H, W]` | C | H · W | one factor a position |

A sample has to lie densely in memory, in any order of its dimensions that all tensors of a call share; samples may be
any distance apart. A tensor that is strided otherwise is copied first: that is the one copy a kernel call makes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Tiling:
    """Tile rows are positions of samples: `b · positions + position`. `gamma_per` is `"column"` or `"position"`, where
    position p has channel p mod `channels`."""

    positions: int
    width: int
    gamma_per: str = "column"
    channels: int = 1


@dataclass(frozen=True)
class Layout:
    """The order of a sample's dimensions in memory, outermost first; `order[0]` is 0, the batch."""

    order: tuple[int, ...]

    @classmethod
    def of(cls, x: Tensor) -> Layout:
        """The layout of `x`, or the standard one where a sample of x isn't dense."""
        standard = tuple(range(x.dim()))
        if x.dim() < 3 or x.is_contiguous():
            return cls(standard)
        strides = x.stride()
        by_stride = (0, *sorted(standard[1:], key=lambda d: -strides[d]))
        return cls(by_stride) if _is_dense(x, by_stride) else cls(standard)

    def fits(self, x: Tensor) -> bool:
        return _is_dense(x, self.order)

    def conform(self, x: Tensor) -> Tensor:
        """`x` itself where its samples are dense in this order, else a copy."""
        return x if self.fits(x) else self.empty(x.shape, x.dtype, x.device).copy_(x)

    def empty(self, shape: torch.Size | list[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Uninitialised, in this order."""
        inner = torch.empty([shape[d] for d in self.order], dtype=dtype, device=device)
        return inner if self.order == tuple(range(len(self.order))) else inner.permute(self._inverse())

    def tiling(self, shape: torch.Size, channel_dim: int | None) -> Tiling:
        """`channel_dim` None: no γ, a sample is one position."""
        sizes = [shape[d] for d in self.order]
        if channel_dim is None:
            return Tiling(1, math.prod(sizes[1:]))
        place = self.order.index(channel_dim % len(shape))
        channels, outer, inner = sizes[place], math.prod(sizes[1:place]), math.prod(sizes[place + 1 :])
        if inner == 1:
            return Tiling(outer, channels)
        return Tiling(outer * channels, inner, "position", channels)

    def _inverse(self) -> list[int]:
        return [self.order.index(d) for d in range(len(self.order))]


def _is_dense(x: Tensor, order: tuple[int, ...]) -> bool:
    """Whether each sample of `x` lies in one piece, with its dimensions in `order`."""
    if x.is_contiguous() and order == tuple(range(x.dim())):
        return True
    wanted = 1
    for dim in reversed(order[1:]):
        if x.shape[dim] != 1 and x.stride(dim) != wanted:
            return False
        wanted *= x.shape[dim]
    return True
