"""A classifier as the trainers see it: its branches, what belongs to each, and a forward in which the output of every
branch can be masked or cut off. Of models that this repository built; those of timm are in `library_models.py`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

from torch import Tensor, nn

from examples.models import ResidualClassifier, forward_with_ends

from .parts import Part, parts_of

End = Callable[[Tensor], Tensor]
"""What becomes of a branch's output before it is added to the residual."""


class Network(ABC):
    """`model`, the `branches` of its paths in forward order, and the `rest`."""

    model: nn.Module
    branches: list[Part]
    rest: Part

    @abstractmethod
    def with_ends(self, images: Tensor, ends: Sequence[End]) -> Tensor:
        """Logits with every branch computed, and what branch l gives handed through `ends[l]`."""

    @abstractmethod
    def prepare(self, images: Tensor) -> None:
        """Makes `model` one that a scheme can be put on; `with_ends` is not called any more.

        Args:
            images: two of those that it is going to be trained on.
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
        """It is one."""
