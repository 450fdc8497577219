"""Networks built from `ResidualBranch`, used by the examples, the benchmarks and the tests."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rdp_kernels as rdp


class ResidualClassifier(nn.Module):
    """A classifier: `images [B, channels, H, W]` → `embed` → `paths` (`ResidualSequence`) → `classify` → logits
    `[B, classes]`."""

    paths: rdp.ResidualSequence

    def embed(self, images: Tensor) -> Tensor:
        """Returns the residual before the first path, `[B, ...]`."""
        raise NotImplementedError

    def classify(self, stream: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, images: Tensor) -> Tensor:
        return self.classify(self.paths(self.embed(images)))


def mlp(dim: int) -> nn.Module:
    return nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))


class Attention(nn.Module):
    """Multi-head self-attention `[B, N, C]` with explicit matmuls. `torch.utils.flop_counter` counts them on every
    device; it counts 0 for scaled_dot_product_attention on the CPU."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(self.mixed(q, k, v).transpose(1, 2).flatten(2))

    def mixed(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Returns `[B, heads, N, C / heads]`."""
        return (q * q.shape[-1] ** -0.5 @ k.mT).softmax(dim=-1) @ v


class ViT(ResidualClassifier):
    """A pre-norm vision transformer; each block is two paths, attention and MLP.

    Args:
        image: side of the square images in pixels. For other sizes the position embedding is interpolated.
        patch: side of a patch, in pixels.
        drop_prob: P(drop) of every path.
        layer_scale: initial value of the paths' gamma; None: no gamma.
        position_std: standard deviation of the position embedding's initial values.
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
        position_std: float = 0.02,
    ):
        super().__init__()
        self.patches = nn.Conv2d(channels, dim, patch, stride=patch)
        self.position = nn.Parameter(position_std * torch.randn(1, (image // patch) ** 2, dim))

        def path(fn: nn.Module) -> rdp.ResidualBranch:
            gamma = None if layer_scale is None else torch.full((dim,), layer_scale)
            return rdp.ResidualBranch(fn, norm=nn.LayerNorm(dim), gamma=gamma, drop_prob=drop_prob)

        self.paths = rdp.ResidualSequence(
            *(path(fn) for _ in range(depth) for fn in (Attention(dim, heads), mlp(dim))),
        )
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, classes)

    def embed(self, images: Tensor) -> Tensor:
        tokens, position = self.patches(images), self.position
        if tokens.shape[2:].numel() != position.shape[1]:
            side = math.isqrt(position.shape[1])
            grid = F.interpolate(position.mT.unflatten(2, (side, side)), tokens.shape[2:], mode="bilinear")
            position = grid.flatten(2).mT
        return tokens.flatten(2).mT + position

    def classify(self, stream: Tensor) -> Tensor:
        return self.head(self.norm(stream).mean(dim=1))


class ResNet(ResidualClassifier):
    """Basic blocks with BatchNorm (He et al., arXiv 1512.03385). Each is a path, relu(shortcut + branch).

    Args:
        widths: channels of each stage; every stage but the first halves the image.
        blocks: number of blocks in each stage.
        drop_prob: P(drop) of every path.
    """

    def __init__(
        self,
        channels: int = 1,
        classes: int = 10,
        widths: tuple[int, ...] = (16, 32, 64),
        blocks: int = 4,
        drop_prob: float = 0.0,
    ):
        super().__init__()
        self.stem = nn.Sequential(*conv_norm(channels, widths[0]), nn.ReLU())

        def path(inner: int, outer: int, stride: int) -> rdp.ResidualBranch:
            branch = nn.Sequential(*conv_norm(inner, outer, stride), nn.ReLU(), *conv_norm(outer, outer))
            same = inner == outer and stride == 1
            shortcut = None if same else nn.Sequential(*conv_norm(inner, outer, stride, kernel=1))
            return rdp.ResidualBranch(branch, shortcut=shortcut, activation="relu", channel_dim=1, drop_prob=drop_prob)

        stages = zip((widths[0], *widths), widths, range(len(widths)), strict=False)
        self.paths = rdp.ResidualSequence(
            *(
                path(outer if block else inner, outer, 2 if stage and not block else 1)
                for inner, outer, stage in stages
                for block in range(blocks)
            )
        )
        self.head = nn.Linear(widths[-1], classes)

    def embed(self, images: Tensor) -> Tensor:
        return self.stem(images)

    def classify(self, stream: Tensor) -> Tensor:
        return self.head(stream.mean(dim=(2, 3)))


def conv_norm(inner: int, outer: int, stride: int = 1, kernel: int = 3) -> tuple[nn.Module, nn.Module]:
    return nn.Conv2d(inner, outer, kernel, stride, padding=kernel // 2, bias=False), nn.BatchNorm2d(outer)


class ResidualMLP(ResidualClassifier):
    """Pre-norm MLP blocks on the flattened image. Each is a path."""

    def __init__(
        self,
        image: int = 8,
        channels: int = 1,
        classes: int = 10,
        dim: int = 64,
        depth: int = 12,
        drop_prob: float = 0.0,
    ):
        super().__init__()
        self.pixels = nn.Linear(channels * image * image, dim)
        self.paths = rdp.ResidualSequence(
            *(rdp.ResidualBranch(mlp(dim), norm=nn.LayerNorm(dim), drop_prob=drop_prob) for _ in range(depth))
        )
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, classes)

    def embed(self, images: Tensor) -> Tensor:
        return self.pixels(images.flatten(1))

    def classify(self, stream: Tensor) -> Tensor:
        return self.head(self.norm(stream))


def forward_with_ends(model: ResidualClassifier, images: Tensor, ends: Sequence[Callable[[Tensor], Tensor]]) -> Tensor:
    """Computes `model(images)` as residual networks are usually written: every branch runs, and `ends[l]` is applied to
    the update of branch l before the add. An end multiplies by a mask, for example."""
    x = model.embed(images)
    for path, end in zip(model.paths, ends, strict=True):
        update = path.fn(x if path.norm is None else path.norm(x))
        if path.gamma is not None:
            update = update * path.gamma.view([-1 if d == path.channel_dim % x.dim() else 1 for d in range(x.dim())])
        x = (x if path.shortcut is None else path.shortcut(x)) + end(update)
        x = x.relu() if path.activation == "relu" else x
    return model.classify(x)
