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
from collections.abc import Sequence
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
        return cls.of_strides(x.shape, x.stride())

    @classmethod
    def of_strides(cls, shape: Sequence[int], strides: Sequence[int]) -> Layout:
        """The layout of a tensor of this shape and these strides."""
        standard = cls(tuple(range(len(shape))))
        if len(shape) < 3 or standard.is_dense(shape, strides):
            return standard
        by_stride = cls((0, *sorted(standard.order[1:], key=lambda d: -strides[d])))
        return by_stride if by_stride.is_dense(shape, strides) else standard

    def is_dense(self, shape: Sequence[int], strides: Sequence[int]) -> bool:
        """Whether each sample lies in one piece, with its dimensions in this order. The number of samples is no part of
        the question."""
        if 0 in shape[1:]:
            return True
        wanted = 1
        for dim in reversed(self.order[1:]):
            if shape[dim] != 1 and strides[dim] != wanted:
                return False
            wanted *= shape[dim]
        return True

    def conform(self, x: Tensor) -> Tensor:
        """`x` itself where its samples are dense in this order, else a copy."""
        if self.is_dense(x.shape, x.stride()):
            return x
        return self.empty(x.shape, x.dtype, x.device).copy_(x)

    def empty(self, shape: torch.Size | list[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Uninitialised, in this order."""
        return torch.empty_strided(shape, self.strides(shape), dtype=dtype, device=device)

    def strides(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The strides of a tensor whose samples lie in this order, one right after the other."""
        strides, stride = [1] * len(shape), 1
        for dim in reversed(self.order):
            strides[dim] = stride
            stride *= max(shape[dim], 1)
        return tuple(strides)

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
