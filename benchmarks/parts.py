"""What learns or is frozen together: the branch of each path, and the rest of the network."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from examples.models import ResidualClassifier


@dataclass(frozen=True)
class Part:
    parameters: list[nn.Parameter]
    batch_norms: list[_BatchNorm]

    @property
    def bytes(self) -> int:
        return sum(p.nbytes for p in self.parameters)


def parts_of(model: ResidualClassifier) -> tuple[list[Part], Part]:
    """Each path's branch with its norm and gamma, in forward order, and the rest: stem, head, final norm, shortcuts."""
    branches = []
    for path in model.paths:
        modules = [module for branch in path.branch_modules() for module in branch.modules()]
        parameters = [p for branch in path.branch_modules() for p in branch.parameters()]
        branches.append(Part(parameters + [path.gamma] * (path.gamma is not None), _batch_norms(modules)))
    owned = {id(member) for part in branches for member in (*part.parameters, *part.batch_norms)}
    rest = Part(
        [p for p in model.parameters() if id(p) not in owned],
        [m for m in _batch_norms(model.modules()) if id(m) not in owned],
    )
    return branches, rest


@contextlib.contextmanager
def left_alone(parts: Iterable[Part]) -> Iterator[None]:
    """A forward and backward inside leave `parts` as they were: their BatchNorms are in eval mode, and their gradients
    are thrown away at the end."""
    parts = list(parts)
    batch_norms = [m for part in parts for m in part.batch_norms if m.training]
    for batch_norm in batch_norms:
        batch_norm.eval()
    yield
    for batch_norm in batch_norms:
        batch_norm.train()
    for part in parts:
        for parameter in part.parameters:
            parameter.grad = None


def _batch_norms(modules: Iterable[nn.Module]) -> list[_BatchNorm]:
    return [m for m in modules if isinstance(m, _BatchNorm)]
