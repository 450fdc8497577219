"""Networks built from `ResidualBranch`, used by the examples, the benchmarks and the tests."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import rdp_kernels as rdp


class Attention(nn.Module):
    """Multi-head self-attention `[B, N, C]` with explicit matmuls, which `torch.utils.flop_counter` counts on every
    device (it counts 0 for scaled_dot_product_attention on the CPU)."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        weights = (q * q.shape[-1] ** -0.5 @ k.mT).softmax(dim=-1)
        return self.proj((weights @ v).transpose(1, 2).flatten(2))


class ViT(nn.Module):
    """A pre-norm vision transformer; each block is two paths, attention and MLP.

    Args:
        image: side of the square images, in pixels; `[B, channels, image, image]` in, `[B, classes]` out.
        patch: side of a patch, in pixels.
        drop_prob: P(drop) of every path.
        layer_scale: initial value of the paths' gamma; None for none.
    """

    def __init__(
        self,
        image: int = 8,
        patch: int = 2,
        channels: int = 1,
        classes: int = 10,
        dim: int = 64,
        depth: int = 6,
        heads: int = 4,
        drop_prob: float = 0.0,
        layer_scale: float | None = None,
    ):
        super().__init__()
        self.patches = nn.Conv2d(channels, dim, patch, stride=patch)
        self.position = nn.Parameter(0.02 * torch.randn(1, (image // patch) ** 2, dim))

        def path(fn: nn.Module) -> rdp.ResidualBranch:
            gamma = None if layer_scale is None else torch.full((dim,), layer_scale)
            return rdp.ResidualBranch(fn, norm=nn.LayerNorm(dim), gamma=gamma, drop_prob=drop_prob)

        def mlp() -> nn.Module:
            return nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

        self.paths = rdp.ResidualSequence(
            *(path(fn) for _ in range(depth) for fn in (Attention(dim, heads), mlp())),
        )
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, classes)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.patches(images).flatten(2).mT + self.position
        return self.head(self.norm(self.paths(tokens)).mean(dim=1))
