"""The ways to run a pair of training steps on a plan: what `cases.py` makes its providers from.

`pair` yields after each of its two backwards; what has a gradient then learns. `textbook` does the same by definition,
and `needs` sums up what the two iterations cannot do without.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

import rdp_kernels as rdp
from examples.models import ResidualClassifier, masked_forward

from .parts import left_alone, parts_of
from .textbook import Textbook


class Needs(Protocol):
    """What iterations need, in FLOPs (`ModelCost`) or bytes (`traffic.Traffic`); `kept` as a fraction a path."""

    def plain(self) -> float: ...
    def drop(self, kept: list[float]) -> float: ...
    def reuse(self, kept: list[float], freeze: str = "parameters") -> float: ...


class Plain:
    """Two ordinary training steps. Every trainer has a model of its own.

    Args:
        model: is trained.
        mode: of the plans.
    """

    name = "plain"
    minimal = True
    """Whether it does no more than what its work needs."""
    follows_scheme = False
    """Whether it freezes what the plan keeps, which some networks forbid."""

    def __init__(self, model: ResidualClassifier, images: Tensor, labels: Tensor, mode: str):
        self.model, self.images, self.labels = model, images, labels
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def train(self, plan: rdp.PathPlan) -> None:
        for _ in self.pair(plan):
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)

    def pair(self, plan: rdp.PathPlan) -> Iterator[None]:
        for _ in range(2):
            self.backward(self.model(self.images))
            yield

    def masked(self, plan: rdp.PathPlan) -> Tensor:
        return masked_forward(self.model, self.images, plan.keep.to(self.images.device), plan.drop_probs)

    def backward(self, logits: Tensor) -> None:
        F.cross_entropy(logits, self.labels).backward()

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
            self.backward(self.masked(plan))
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

    In sample mode gradients of weights can't be thrown away for some samples: weights of any dropped sample learn
    from all, so that the time stands for a naive pair and the gradients differ from ours.
    """

    name = "naive"
    minimal = False
    follows_scheme = True

    def __init__(self, model: ResidualClassifier, images: Tensor, labels: Tensor, mode: str):
        super().__init__(model, images, labels, mode)
        self.branches, self.rest = parts_of(model)

    def pair(self, plan: rdp.PathPlan) -> Iterator[None]:
        parts = list(zip(self.branches, plan.keep, strict=True))
        with left_alone(part for part, kept in parts if not kept.any()):
            self.backward(self.masked(plan))
        yield
        with left_alone([self.rest, *(part for part, kept in parts if kept.all())]):
            self.backward(self.model(self.images))
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

    def __init__(self, model: ResidualClassifier, images: Tensor, labels: Tensor, mode: str):
        super().__init__(model, images, labels, mode)
        self.scheme = rdp.ResidualDropPath(model, mode=mode, freeze=self.freeze)

    def pair(self, plan: rdp.PathPlan) -> Iterator[None]:
        for _ in self.scheme.iterations(plan=plan):
            self.backward(self.model(self.images))
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
    """Ours, approximate: gradients pass a frozen branch by."""

    name = "ours branch-frozen"
    freeze = "branch"


TRAINERS: tuple[type[Plain], ...] = (Plain, Naive, DropPath, Exact, BranchFrozen)
