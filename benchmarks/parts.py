"""Parts that learn or are frozen together: the branch of each path, and the rest of the network."""

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

    @classmethod
    def of(cls, members: Iterable[nn.Module | nn.Parameter]) -> Part:
        """Collects the parameters and BatchNorms of `members`."""
        parameters: list[nn.Parameter] = []
        batch_norms: list[_BatchNorm] = []
        for member in members:
            if isinstance(member, nn.Parameter):
                parameters.append(member)
            else:
                parameters += member.parameters()
                batch_norms += [m for m in member.modules() if isinstance(m, _BatchNorm)]
        return cls(parameters, batch_norms)

    @property
    def bytes(self) -> int:
        return sum(p.nbytes for p in self.parameters)


def parts_of(model: ResidualClassifier) -> tuple[list[Part], Part]:
    """Returns the branch of each path with its norm and gamma, in forward order, and the rest: stem, head, final norm,
    shortcuts."""
    branches = [
        Part.of([*path.branch_modules(), *([] if path.gamma is None else [path.gamma])]) for path in model.paths
    ]
    return branches, rest_of(model, branches)


def rest_of(model: nn.Module, branches: Iterable[Part]) -> Part:
    """Returns the part of `model` that belongs to none of `branches`."""
    owned = {id(member) for part in branches for member in (*part.parameters, *part.batch_norms)}
    everything = Part.of([model])
    return Part(
        [p for p in everything.parameters if id(p) not in owned],
        [m for m in everything.batch_norms if id(m) not in owned],
    )


@contextlib.contextmanager
def left_alone(parts: Iterable[Part]) -> Iterator[None]:
    """Keeps `parts` unchanged by a forward and backward within the `with` block. Their BatchNorms normalise by the
    batch without updating running statistics, and their gradients are thrown away at the end."""
    parts = list(parts)
    batch_norms = [m for part in parts for m in part.batch_norms if m.track_running_stats]
    for batch_norm in batch_norms:
        batch_norm.track_running_stats = False
    yield
    for batch_norm in batch_norms:
        batch_norm.track_running_stats = True
    for part in parts:
        for parameter in part.parameters:
            parameter.grad = None
