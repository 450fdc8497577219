"""The trainers: ways to run a pair of training steps on a plan. `cases.py` makes providers of them.

`pair` yields after each of its two backwards. Parameters with a gradient then learn. `textbook` runs the same pair by
definition, and `needs` sums the FLOPs or bytes that the two iterations need.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

import rdp_kernels as rdp

from .networks import End, Network
from .parts import left_alone
from .textbook import Textbook


class Needs(Protocol):
    """The needs of iterations in FLOPs (`ModelCost`) or bytes (`traffic.Traffic`). `kept` has a fraction for each
    path."""

    def plain(self) -> float: ...
    def drop(self, kept: list[float]) -> float: ...
    def reuse(self, kept: list[float], freeze: str = "parameters") -> float: ...


class Plain:
    """Two ordinary training steps. Every trainer has its own network.

    Args:
        network: the network to train.
        mode: the mode of the plans.
        autocast: whether steps run under bf16 autocast. The weights' dtype doesn't change.
    """

    name = "plain"
    minimal = True
    """Whether it does only the needed work."""
    follows_scheme = False
    """Whether it freezes the kept paths of the plan, which isn't possible on some networks."""

    def __init__(self, network: Network, images: Tensor, labels: Tensor, mode: str, autocast: bool = False):
        self.network, self.model, self.images, self.labels = network, network.model, images, labels
        self._autocast = autocast
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)

    def train(self, plan: rdp.PathPlan | None = None) -> None:
        """Runs both steps. `plan` is None for trainers that draw their own masks."""
        for _ in self.pair(plan):
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)

    def pair(self, plan: rdp.PathPlan | None) -> Iterator[None]:
        for _ in range(2):
            self.backward()
            yield

    def backward(self, ends: Sequence[End] | None = None) -> None:
        """Runs forward and backward. `ends` are those of `Network.with_ends`."""
        with torch.autocast(self.images.device.type, torch.bfloat16, enabled=self._autocast):
            logits = self.network(self.images) if ends is None else self.network.with_ends(self.images, ends)
            loss = F.cross_entropy(logits, self.labels)
        loss.backward()

    def masks(self, plan: rdp.PathPlan) -> list[End]:
        """Returns the ends that apply drop-path with the masks of `plan`."""
        keep = plan.keep.to(self.images.device)
        return [_Mask(kept, p) for kept, p in zip(keep, plan.drop_probs, strict=True)]

    @staticmethod
    def textbook(book: Textbook, plan: rdp.PathPlan) -> Iterator[None]:
        for _ in range(2):
            book.plain()
            yield

    @staticmethod
    def needs(per: Needs, kept: list[float]) -> float:
        return 2 * per.plain()


class DropPath(Plain):
    """Two steps of ordinary drop-path as it is usually written: every branch is computed, then masked."""

    name = "drop-path"
    minimal = False

    def pair(self, plan: rdp.PathPlan) -> Iterator[None]:
        for _ in range(2):
            self.backward(self.masks(plan))
            yield

    @staticmethod
    def textbook(book: Textbook, plan: rdp.PathPlan) -> Iterator[None]:
        for _ in range(2):
            book.drop(plan.keep, plan.drop_probs, skip=False)
            yield

    @staticmethod
    def needs(per: Needs, kept: list[float]) -> float:
        return 2 * per.drop(kept)


class Naive(Plain):
    """The scheme without this package: a masked step, then a full one whose frozen gradients are thrown away.

    In sample mode the gradients of weights can't be thrown away for single samples. Here a weight that learns from any
    sample learns from all. The time is that of a naive pair, but the gradients differ from ours.
    """

    name = "naive"
    minimal = False
    follows_scheme = True

    def pair(self, plan: rdp.PathPlan) -> Iterator[None]:
        parts = list(zip(self.network.branches, plan.keep, strict=True))
        with left_alone(part for part, kept in parts if not kept.any()):
            self.backward(self.masks(plan))
        yield
        with left_alone([self.network.rest, *(part for part, kept in parts if kept.all())]):
            self.backward()
        yield

    @staticmethod
    def textbook(book: Textbook, plan: rdp.PathPlan) -> Iterator[None]:
        book.drop(plan.keep, plan.drop_probs)
        yield
        book.reuse(plan.keep.view(plan.num_paths, -1).all(dim=1), "parameters")
        yield

    @staticmethod
    def needs(per: Needs, kept: list[float]) -> float:
        return per.drop(kept) + per.reuse(kept)


class Exact(Plain):
    """Ours."""

    name = "ours exact"
    follows_scheme = True
    freeze = "parameters"

    def __init__(self, network: Network, images: Tensor, labels: Tensor, mode: str, autocast: bool = False):
        network.prepare(images[:2])
        super().__init__(network, images, labels, mode, autocast)
        self.scheme = rdp.ResidualDropPath(self.model, 0.5, mode=mode, freeze=self.freeze)  # plans have their own rates

    def pair(self, plan: rdp.PathPlan) -> Iterator[None]:
        for _ in self.scheme.iterations(plan=plan):
            self.backward()
            yield

    @classmethod
    def textbook(cls, book: Textbook, plan: rdp.PathPlan) -> Iterator[None]:
        book.drop(plan.keep, plan.drop_probs)
        yield
        book.reuse(plan.keep, cls.freeze)
        yield

    @classmethod
    def needs(cls, per: Needs, kept: list[float]) -> float:
        return per.drop(kept) + per.reuse(kept, cls.freeze)


class BranchFrozen(Exact):
    """Ours, approximate: frozen branches are detached."""

    name = "ours branch-frozen"
    freeze = "branch"


class _Mask:
    """Multiplies by mask / (1 − p), as drop-path is usually written. `kept` is bool `[]` or `[B]`."""

    def __init__(self, kept: Tensor, drop_prob: float):
        self._kept, self._drop_prob = kept, drop_prob

    def __call__(self, x: Tensor) -> Tensor:
        mask = self._kept.to(x).expand(len(x)).view(-1, *[1] * (x.dim() - 1))
        return x * (mask / (1 - self._drop_prob))


TRAINERS: tuple[type[Plain], ...] = (Plain, Naive, DropPath, Exact, BranchFrozen)
