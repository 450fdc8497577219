"""The classifiers that trainers use: the branches, their members, and a forward that can mask or detach the update of
each branch. These are this repository's own models; those of timm are in `library_models.py`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

from torch import Tensor, nn

from examples.models import ResidualClassifier, forward_with_ends

from .parts import Part, parts_of

End = Callable[[Tensor], Tensor]
"""A function of a branch's update, applied before it is added to the residual."""


class Network(ABC):
    """`model`, the `branches` of its paths in forward order, and the `rest`."""

    model: nn.Module
    branches: list[Part]
    rest: Part

    @abstractmethod
    def with_ends(self, images: Tensor, ends: Sequence[End]) -> Tensor:
        """Computes the logits with every branch, where `ends[l]` is applied to the update of branch l."""

    @abstractmethod
    def prepare(self, images: Tensor) -> None:
        """Prepares `model` for a scheme. `with_ends` must not be called afterwards.

        Args:
            images: two images of the training data.
        """

    def __call__(self, images: Tensor) -> Tensor:
        return self.model(images)


class Own(Network):
    """A network of `examples/models.py`."""

    model: ResidualClassifier

    def __init__(self, model: ResidualClassifier):
        self.model = model
        self.branches, self.rest = parts_of(model)

    def with_ends(self, images: Tensor, ends: Sequence[End]) -> Tensor:
        return forward_with_ends(self.model, images, ends)

    def prepare(self, images: Tensor) -> None:
        """Does nothing: the model already has paths."""
