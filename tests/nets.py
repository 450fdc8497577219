"""Small float64 networks of every kind of path, and the textbook computation of an iteration on them."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import rdp_kernels as rdp


class TokenMixing(nn.Module):
    """Mixes the tokens of a sample and then its channels; `[B, N, C]`."""

    def __init__(self, tokens: int, dim: int):
        super().__init__()
        self.tokens, self.channels = nn.Linear(tokens, tokens), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.channels(self.tokens(x.mT).mT.tanh())


class Transposed(nn.Module):
    """`fn` over the tokens instead of the channels."""

    def __init__(self, fn: nn.Module):
        super().__init__()
        self.fn = fn

    def forward(self, x: Tensor) -> Tensor:
        return self.fn(x.mT).mT


class Net(nn.Module):
    """With `chain` the paths form a `ResidualSequence`; otherwise they are called one by one."""

    def __init__(self, stem: nn.Module, paths: list[rdp.ResidualBranch], head: nn.Module, chain: bool = False):
        super().__init__()
        self.stem, self.head, self.chain = stem, head, chain
        self.paths = rdp.ResidualSequence(*paths) if chain else nn.ModuleList(paths)
        self.offset = nn.Parameter(torch.randn(()))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x) + self.offset
        if self.chain:
            return self.head(self.paths(x))
        for path in self.paths:
            x = path(x)
        return self.head(x)


def _mlp(dim: int) -> nn.Module:
    return nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))


def tokens_net() -> Net:
    """Token and token-mixing branches; with and without gamma and norm; two paths share a module."""
    shared = _mlp(4)
    paths = [
        rdp.ResidualBranch(_mlp(4), norm=nn.LayerNorm(4), gamma=torch.rand(4) + 0.5),
        rdp.ResidualBranch(TokenMixing(3, 4)),
        rdp.ResidualBranch(shared, norm=nn.RMSNorm(4)),
        rdp.ResidualBranch(nn.Sequential(nn.LayerNorm(4), TokenMixing(3, 4)), gamma=torch.rand(4)),
        rdp.ResidualBranch(shared, gamma=torch.rand(4), activation="relu"),
        rdp.ResidualBranch(nn.Tanh(), norm=nn.LayerNorm(4, elementwise_affine=False)),
    ]
    return Net(nn.Linear(5, 4), paths, nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 2))).double()


def tied_net() -> Net:
    """Weights that belong to two paths, and to a path and the rest."""
    stem = nn.Linear(4, 4)
    paths = [rdp.ResidualBranch(nn.Linear(4, 4), norm=nn.LayerNorm(4)) for _ in range(4)]
    paths[1].fn.weight = paths[3].fn.weight
    paths[2].fn.weight = stem.weight
    return Net(stem, paths, nn.Linear(4, 2)).double()


def chain_net() -> Net:
    """Paths that hand over to each other, with and without norm, gamma and parameters. One has relu and can't hand
    over; one is there twice."""
    shared = _mlp(4)
    paths = [
        rdp.ResidualBranch(_mlp(4), norm=nn.LayerNorm(4), gamma=torch.rand(4) + 0.5),
        rdp.ResidualBranch(shared, norm=nn.RMSNorm(4)),
        rdp.ResidualBranch(TokenMixing(3, 4), norm=nn.LayerNorm(4, bias=False), gamma=torch.rand(4)),
        rdp.ResidualBranch(TokenMixing(3, 4), gamma=torch.rand(4)),
        rdp.ResidualBranch(shared, norm=nn.LayerNorm(4), activation="relu"),
        rdp.ResidualBranch(nn.Tanh(), norm=nn.LayerNorm(4, elementwise_affine=False)),
        rdp.ResidualBranch(_mlp(4), norm=nn.LayerNorm(4)),
        rdp.ResidualBranch(Transposed(_mlp(3)), gamma=torch.rand(3), channel_dim=1, norm=nn.RMSNorm(4)),
        rdp.ResidualBranch(_mlp(4), norm=nn.LayerNorm(4), gamma=torch.rand(4)),
    ]
    return Net(nn.Linear(5, 4), paths, nn.Linear(4, 2), chain=True).double()


def conv_net() -> Net:
    """Convolutions with GroupNorm, `[B, C, H, W]`: a strided shortcut with BatchNorm, relu after the add, gamma on dim
    1."""

    def conv(inner: int, outer: int, stride: int = 1) -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(inner, outer, 3, stride, padding=1, bias=False),
            nn.GroupNorm(2, outer),
            nn.ReLU(),
            nn.Conv2d(outer, outer, 1),
        )

    paths = [
        rdp.ResidualBranch(conv(4, 4), activation="relu"),
        rdp.ResidualBranch(
            conv(4, 6, 2), shortcut=nn.Sequential(nn.Conv2d(4, 6, 1, 2), nn.BatchNorm2d(6)), activation="relu"
        ),
        rdp.ResidualBranch(conv(6, 6), gamma=torch.rand(6) + 0.5, channel_dim=1),
        rdp.ResidualBranch(nn.Conv2d(6, 6, 3, padding="same", groups=2), activation="relu"),
    ]
    return Net(
        nn.Conv2d(2, 4, 1), paths, nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 2))
    ).double()


def batch_norm_net(chain: bool = False) -> Net:
    """BatchNorm in the branches. Sample mode runs such branches on the whole batch and doesn't freeze them."""
    paths = [
        rdp.ResidualBranch(
            nn.Sequential(
                nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
            ),
            activation=None if chain else "relu",
        )
        for _ in range(3)
    ]
    stem = nn.Sequential(nn.Conv2d(2, 4, 1), nn.BatchNorm2d(4))
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    return Net(stem, paths, head, chain).double()


NETS = {"tokens": tokens_net, "tied": tied_net, "chain": chain_net, "conv": conv_net, "batch_norm": batch_norm_net}
INPUTS = {"tokens": (3, 5), "tied": (3, 4), "chain": (3, 5), "conv": (2, 5, 5), "batch_norm": (2, 4, 4)}


@dataclass
class Iteration:
    """What the textbook needs to know about one iteration. `keep` is bool [paths, batch]."""

    phase: str
    keep: Tensor
    drop_probs: list[float]
    freeze: str = "parameters"
    train_rest: bool = False
    scale_by_keep: bool = True
    freeze_bn: bool | str = True

    @property
    def rest_learns(self) -> bool:
        return self.phase == "drop" or self.train_rest or self.freeze == "none"

    @property
    def learns(self) -> Tensor:
        """bool [paths, batch]: the pairs whose branch parameters get a gradient."""
        if self.phase == "drop":
            return self.keep
        return torch.ones_like(self.keep) if self.freeze == "none" else ~self.keep


def textbook(net: Net, x: Tensor, iteration: Iteration) -> Tensor:
    """Runs all branches on all samples and masks them by `torch.where`; frozen pairs use detached copies of the
    modules."""
    constant = copy.deepcopy(net).requires_grad_(False)
    if iteration.freeze_bn == "running":
        for module in constant.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
    rest = net if iteration.rest_learns else constant
    x = rest.stem(x) + rest.offset
    for path, frozen_path, rest_path, keep, learns, p in zip(
        net.paths, constant.paths, rest.paths, iteration.keep, iteration.learns, iteration.drop_probs, strict=True
    ):
        shape = [-1] + [1] * (x.dim() - 1)
        keep, learns = keep.view(shape), learns.view(shape)
        residual = x if path.shortcut is None else rest_path.shortcut(x)
        if iteration.phase == "drop":
            scale = 1 / (1 - p) if iteration.scale_by_keep and p < 1 else 1.0
            x = residual + torch.where(keep, scale * _branch(path, x), 0.0)
        else:
            constant_x = x.detach() if iteration.freeze == "branch" else x
            parts = [
                _branch(path, x) if learns.any() else 0.0,
                _branch(frozen_path, constant_x) if not learns.all() else 0.0,
            ]
            x = residual + torch.where(learns, *parts)
        if path.activation == "relu":
            x = x.relu()
    return rest.head(x)


def _branch(path: rdp.ResidualBranch, x: Tensor) -> Tensor:
    out = path.fn(x if path.norm is None else path.norm(x))
    if path.gamma is None:
        return out
    return out * path.gamma.view([-1 if d == path.channel_dim % out.dim() else 1 for d in range(out.dim())])


def took_part(net: Net, iteration: Iteration) -> set[str]:
    """Names of the parameters that get a gradient in the iteration."""
    of_paths: dict[int, bool] = {}
    for path, learns in zip(net.paths, iteration.learns, strict=True):
        modules = [path.fn, *([] if path.norm is None else [path.norm])]
        for parameter in [*(p for m in modules for p in m.parameters()), *([] if path.gamma is None else [path.gamma])]:
            of_paths[id(parameter)] = of_paths.get(id(parameter), False) or bool(learns.any())
    in_rest = {id(p) for m in (net.stem, net.head) for p in m.parameters()} | {id(net.offset)}
    in_rest |= {id(p) for path in net.paths if path.shortcut is not None for p in path.shortcut.parameters()}
    return {
        name
        for name, p in net.named_parameters()
        if of_paths.get(id(p), False) or (id(p) in in_rest and iteration.rest_learns)
    }


def moving_statistics(net: Net, iteration: Iteration) -> set[str]:
    """Names of the BatchNorm statistics that the iteration moves."""
    found = set()
    for name, _ in net.named_buffers():
        parts = name.split(".")
        of_path = parts[0] == "paths" and parts[2] != "shortcut"
        learns = bool(iteration.learns[int(parts[1])].any()) if of_path else iteration.rest_learns
        frozen_moves = iteration.phase == "reuse" and not iteration.freeze_bn
        found |= {name} if learns or frozen_moves else set()
    return found
