"""The FLOPs that an iteration needs, from a count of each part of the network.

Matmuls and convolutions count, as in `torch.utils.flop_counter`. A branch that runs costs its forward; the gradient
towards its input (dgrad) only where something before it learns; towards its weights (wgrad) only where they learn.
Whether something before it learns is asked of the whole batch, in sample mode too.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import rdp_kernels as rdp
from examples.models import ResidualClassifier
from rdp_kernels.frozen import freeze


@dataclass(frozen=True)
class PartCost:
    """FLOPs of one part of a network for the whole batch; `learn_first` where the input requires no grad."""

    forward: int = 0
    frozen: int = 0
    learn: int = 0
    learn_first: int = 0

    @classmethod
    def of(cls, part: nn.Module, x: Tensor) -> PartCost:
        """Counts `part(x)`. Leaves gradients behind."""
        forward = _count(part, x, False, False)
        backward = [_count(part, x, *grads) - forward for grads in ((True, False), (True, True), (False, True))]
        return cls(forward, *backward)

    def total(self, learns: bool, passes: bool) -> int:
        """Forward and backward; `passes`: something before it learns, so the gradient has to pass it."""
        if learns:
            return self.forward + (self.learn if passes else self.learn_first)
        return self.forward + self.frozen * passes


@dataclass(frozen=True)
class ModelCost:
    """`branches` and `shortcuts` in the order of the paths; an identity shortcut costs nothing."""

    embed: PartCost
    branches: list[PartCost]
    shortcuts: list[PartCost]
    classify: PartCost

    @classmethod
    @torch.no_grad()
    def of(cls, model: ResidualClassifier, images: Tensor) -> ModelCost:
        """Counts each part of a copy of `model` on a batch."""
        model = copy.deepcopy(model).eval()
        x, branches, shortcuts = model.embed(images), [], []
        for path in model.paths:
            branches.append(PartCost.of(_Part(path, "run_branch", (), {}), x))
            shortcuts.append(PartCost() if path.shortcut is None else PartCost.of(path.shortcut, x))
            x = path(x)
        embed = PartCost.of(_Part(model, "embed"), images)
        return cls(embed, branches, shortcuts, PartCost.of(_Part(model, "classify"), x))

    def plain(self) -> float:
        """FLOPs of an ordinary training step."""
        return self._iteration([1.0] * len(self.branches), [0.0] * len(self.branches), True, "none")

    def drop(self, kept: list[float]) -> float:
        """FLOPs of a drop iteration in which path l runs on the fraction `kept[l]` of the rows."""
        return self._iteration(kept, [0.0] * len(kept), True, "none")

    def reuse(self, kept: list[float], freeze: str = "parameters", train_rest: bool = False) -> float:
        """FLOPs of its reuse iteration: path l learns on the rows that it did not keep and is frozen on the others."""
        if freeze == "none":
            return self.plain()
        return self._iteration([1 - k for k in kept], kept, train_rest, freeze)

    def _iteration(self, learning: list[float], frozen: list[float], rest_learns: bool, freeze: str) -> float:
        total = float(self.embed.total(rest_learns, passes=False))
        passes = rest_learns  # something before learns
        for branch, shortcut, learns, frozes in zip(self.branches, self.shortcuts, learning, frozen, strict=True):
            total += shortcut.total(rest_learns, passes)
            total += learns * branch.total(True, passes)
            total += frozes * branch.total(False, passes and freeze != "branch")
            passes |= learns > 0
        return total + self.classify.total(rest_learns, passes)


def kept_fractions(plan: rdp.PathPlan) -> list[float]:
    """The share of the rows that each path keeps."""
    return plan.keep.view(plan.num_paths, -1).double().mean(dim=1).tolist()


class _Part(nn.Module):
    """A method of `module` as a module with all of its parameters."""

    def __init__(self, module: nn.Module, method: str, *args: object):
        super().__init__()
        self.module, self.method, self.args = module, method, args

    def forward(self, x: Tensor) -> Tensor:
        return getattr(self.module, self.method)(x, *self.args)


def _count(part: nn.Module, x: Tensor, input_grad: bool, weight_grad: bool) -> int:
    x = x.detach().requires_grad_(input_grad)
    frozen = [] if weight_grad else [(module, name) for module in part.modules() for name in module._parameters]
    with FlopCounterMode(display=False) as counter, torch.enable_grad(), freeze(frozen):
        out = part(x)
        if out.requires_grad:
            out.sum().backward()
    return counter.get_total_flops()
