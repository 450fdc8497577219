"""What runs branches in their owners' place, compiled or captured: which variants there are, how it is put in and out.

What a path does, and with it what learns, is decided in Python at each call; the branch alone is compiled or captured.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from ..paths.freezing import freeze, keeps_statistics
from ..paths.path import PathOwner, PathSlot, Runner, modules_of, parameters_of, paths_of, places_of


def owners_of(model: nn.Module) -> dict[str, PathOwner]:
    """The owners of the paths of `model`, by their names in a scheme.

    Raises `TypeError` for what is no module, `ValueError` where there are no paths and `RuntimeError` where a branch
    has a runner already.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    owners = {
        ".".join(part for part in (name, label) if part): owner
        for name, module in model.named_modules()
        for label, owner in paths_of(module)
    }
    if not owners:
        raise ValueError("model has no paths: call rdp.convert(model) first, or build it from ResidualBranch")
    for name, owner in owners.items():
        if owner.slot.runner is not None:
            raise RuntimeError(f"the branch of path {name!r} is compiled or captured already: call remove() first")
    return owners


def tensors_in(*values: Any) -> list[Tensor]:
    return [value for value in pytree.tree_leaves(values) if isinstance(value, Tensor)]


@dataclass(frozen=True)
class BranchCall:
    """A call of a branch in one of its variants, each of which has what requires grad one way.

    | variant | gradients |
    |---|---|
    | `"learning"` | of weights and of its input |
    | `"frozen"` | of its input |
    | `"constant"` | none, and saves nothing |

    A variant with norms in another mode, as frozen BatchNorm is, computes something else: see `kind`.
    """

    variant: str
    owner: PathOwner
    x: Tensor
    args: tuple
    kwargs: dict
    normed: bool

    @classmethod
    def of(cls, owner: PathOwner, x: Tensor, args: tuple, kwargs: dict, normed: bool) -> BranchCall:
        if torch.is_grad_enabled() and any(p.requires_grad for p in parameters_of(owner)):
            variant = "learning"
        elif torch.is_grad_enabled() and any(t.requires_grad for t in tensors_in(x, args, kwargs)):
            variant = "frozen"
        else:
            x, args, kwargs = pytree.tree_map_only(Tensor, Tensor.detach, (x, args, kwargs))
            return cls("constant", owner, x, args, kwargs, normed)
        return cls(variant, owner, x if x.requires_grad else x.detach().requires_grad_(), args, kwargs, normed)

    @property
    def kind(self) -> tuple[Hashable, ...]:
        """Equal for calls of the branch that may share a graph, the variant first."""
        norms = [m for m in modules_of(self.owner) if keeps_statistics(m)]
        modes = tuple((m.training, m.track_running_stats) for m in norms)
        return self.variant, self.normed, self.owner.training, modes

    def run(self, function: Callable[..., Tensor], *args: Any) -> Tensor:
        """`function(*args)`, which runs the branch, under the flags of the variant."""
        if self.variant != "constant":
            return function(*args)
        with torch.no_grad(), freeze(places_of(self.owner)):
            return function(*args)


class Runners:
    """The runners of some branches, until `remove()`."""

    def __init__(self, runners: Iterable[tuple[PathOwner, Runner]]):
        self._slots: list[PathSlot] = []
        for owner, runner in runners:
            owner.slot.runner = runner
            self._slots.append(owner.slot)

    def remove(self) -> None:
        """Branches run as before."""
        for slot in self._slots:
            slot.runner = None
        self._slots.clear()
