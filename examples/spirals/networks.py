"""Many small residual networks as one module. Networks take the place of samples.

The residual is `[networks, points, width]`. So a plan in sample mode has a decision for each network, as the paper's
scheme has for a batch, and a path runs on the networks that keep it. For a decision for each point, the residual is
`[networks · points, width]`.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rdp_kernels as rdp
from examples.digits.seeds import seed_of


class StackedLinear(nn.Module):
    """A linear layer for each of `seeds`, initialised as `torch.nn.Linear`, with `weight [networks, out, in]`."""

    def __init__(self, generators: list[torch.Generator], inner: int, outer: int):
        super().__init__()
        bound = 1 / math.sqrt(inner)

        def uniform(*shape: int) -> nn.Parameter:
            drawn = [torch.empty(shape).uniform_(-bound, bound, generator=generator) for generator in generators]
            return nn.Parameter(torch.stack(drawn))

        self.weight, self.bias = uniform(outer, inner), uniform(outer)

    def forward(self, x: Tensor, network: Tensor) -> Tensor:
        """`x` is `[rows, points, in]` or `[rows, in]`. `network [rows]` has each row's network; equal ones are
        adjacent."""
        if x.dim() == 3:
            return torch.baddbmm(self.bias[network, None], x, self.weight[network].mT)
        which, rows = network.unique_consecutive(return_counts=True)
        parts = zip(which.tolist(), x.split(rows.tolist()), strict=True)
        return torch.cat([F.linear(part, self.weight[i], self.bias[i]) for i, part in parts])


class Branch(nn.Module):
    """Computes `relu(W x + b)` or, with two layers, `W' relu(W x + b) + b'`."""

    def __init__(self, generators: list[torch.Generator], width: int, layers: int):
        super().__init__()
        self.linears = nn.ModuleList(StackedLinear(generators, width, width) for _ in range(layers))

    def forward(self, x: Tensor, network: Tensor) -> Tensor:
        x = self.linears[0](x, network).relu()
        return self.linears[1](x, network) if len(self.linears) > 1 else x


class SpiralNetworks(nn.Module):
    """A residual network for each of `seeds`: points of the plane → residual → logits of two classes.

    Args:
        layers: number of layers of each branch, 1 or 2.
        per_point: whether a row of the residual is a point instead of a network.
    """

    def __init__(self, seeds: list[int], depth: int, width: int, layers: int = 1, per_point: bool = False):
        super().__init__()
        generators = [torch.Generator().manual_seed(seed_of(seed, "weights")) for seed in seeds]
        self.networks, self.per_point = len(seeds), per_point
        self.stem = StackedLinear(generators, 2, width)
        self.paths = rdp.ResidualSequence(
            *(rdp.ResidualBranch(Branch(generators, width, layers), per_sample=("network",)) for _ in range(depth))
        )
        self.head = StackedLinear(generators, width, 2)

    def forward(self, points: Tensor, run: Callable[[Tensor, Tensor], Tensor] | None = None) -> Tensor:
        """Computes logits `[networks, points, 2]` of `points [networks, points, 2]`. `run` replaces the paths."""
        network = torch.arange(self.networks)
        stream = self.stem(points, network)
        if self.per_point:
            rows = network.repeat_interleave(points.shape[1])
            return self.head((run or self.paths)(stream.flatten(0, 1), rows).view_as(stream), network)
        return self.head((run or self.paths)(stream, network), network)
