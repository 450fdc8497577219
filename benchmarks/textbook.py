"""The scheme as its definition reads, in plain torch and without regard to cost: what providers are verified against.

Of rdp_kernels it uses the paths' submodules only, never their forward.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rdp_kernels as rdp
from examples.models import ResidualClassifier

from .parts import left_alone, parts_of

Update = Callable[[rdp.ResidualBranch, Tensor, Tensor, float], Tensor]
"""(path, x, which rows of x are kept, p) → what is added to the residual."""


class Textbook:
    """Iterations on a copy of `model`, each a forward and backward that leaves gradients in `self.model`."""

    def __init__(self, model: ResidualClassifier, images: Tensor, labels: Tensor):
        self.model = copy.deepcopy(model)
        self.images, self.labels = images, labels

    def plain(self) -> None:
        paths = len(self.model.paths)
        self.drop(torch.ones(paths, dtype=torch.bool), [0.0] * paths)

    def drop(self, keep: Tensor, drop_probs: Sequence[float], skip: bool = True) -> None:
        """Kept rows of a branch count 1 / (1 − p) times, dropped ones 0 times.

        Args:
            keep: bool `[paths]` or `[paths, B]`.
            skip: a branch without kept rows isn't run; else it gets gradients of 0, and its BatchNorms see the batch.
        """

        def update(path: rdp.ResidualBranch, x: Tensor, kept: Tensor, drop_prob: float) -> Tensor:
            if skip and not kept.any():
                return torch.zeros_like(kept, dtype=x.dtype)
            return torch.where(kept, _Branch(path)(x) / (1 - drop_prob), 0)

        self._iteration(keep, drop_probs, update)

    def reuse(self, keep: Tensor, freeze: str) -> None:
        """Every branch runs. Where `keep` is true its weights are constants and, with `freeze="branch"`, so is what
        it computes; the rest doesn't learn."""

        def update(path: rdp.ResidualBranch, x: Tensor, kept: Tensor, _: float) -> Tensor:
            branch = _Branch(path)
            if not kept.any():
                return branch(x)
            constants = {name: value.detach() for name, value in branch.state_dict().items()}
            frozen = torch.func.functional_call(branch, constants, (x,))
            frozen = frozen.detach() if freeze == "branch" else frozen
            return frozen if kept.all() else torch.where(kept, frozen, branch(x))

        branches, rest = parts_of(self.model)
        frozen = [part for part, kept in zip(branches, keep, strict=True) if kept.all()]
        with left_alone([*frozen, rest]):
            self._iteration(keep, [0.0] * len(keep), update)

    def _iteration(self, keep: Tensor, drop_probs: Sequence[float], update: Update) -> None:
        x = self.model.embed(self.images)
        for path, kept, drop_prob in zip(self.model.paths, keep, drop_probs, strict=True):
            rows = kept.to(x.device).expand(len(x)).view(-1, *[1] * (x.dim() - 1))
            x = (x if path.shortcut is None else path.shortcut(x)) + update(path, x, rows, drop_prob)
            x = torch.where(x > 0, x, 0) if path.activation == "relu" else x
        F.cross_entropy(self.model.classify(x), self.labels).backward()


class _Branch(nn.Module):
    """`γ · fn(norm(x))` with γ along the last dimension."""

    def __init__(self, path: rdp.ResidualBranch):
        super().__init__()
        self.norm, self.fn, self.gamma = path.norm, path.fn, path.gamma

    def forward(self, x: Tensor) -> Tensor:
        x = self.fn(x if self.norm is None else self.norm(x))
        return x if self.gamma is None else x * self.gamma


def state_after(model: nn.Module, backwards: Iterator[None]) -> list[dict[str, Tensor]]:
    """The gradients that there are, and the buffers, after each of `backwards`."""
    steps = []
    for _ in backwards:
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        steps.append(gradients | {name: buffer.clone() for name, buffer in model.named_buffers()})
        model.zero_grad(set_to_none=True)
    return steps


def largest_difference(wanted: list[dict[str, Tensor]], got: list[dict[str, Tensor]]) -> float:
    """Between two results of `state_after`: infinite where what learns differs, NaN where there is one."""
    if [step.keys() for step in wanted] != [step.keys() for step in got]:
        return float("inf")
    differences = [(w[name] - g[name]).abs().max() for w, g in zip(wanted, got, strict=True) for name in w]
    return torch.stack([difference.double() for difference in differences]).max().item()  # max() would lose a NaN
