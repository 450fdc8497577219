"""Compiled or captured branches: which variants there are, and how they are put in and taken out.

What a path does, and with it what learns, is decided in Python at each call; the branch alone is compiled or captured.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from ..paths.binding import BranchRunner, PathBinding, PathModule
from ..paths.freezing import Frozen, keeps_statistics
from ..paths.path import modules_of, parameter_refs_of, parameters_of, paths_of


def owners_of(model: nn.Module) -> dict[str, PathModule]:
    """The path_modules of the paths of `model`, by their names in a scheme.

    Raises `TypeError` for what is no module, `ValueError` where there are no paths and `RuntimeError` where a branch
    has a runner already.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    path_modules = {
        ".".join(part for part in (name, label) if part): path_module
        for name, module in model.named_modules()
        for label, path_module in paths_of(module)
    }
    if not path_modules:
        raise ValueError("model has no paths: call rdp.convert(model) first, or build it from ResidualBranch")
    for name, path_module in path_modules.items():
        if path_module.binding.branch_runner is not None:
            raise RuntimeError(f"the branch of path {name!r} is compiled or captured already: call remove() first")
    return path_modules


def tensors_in(*values: Any) -> list[Tensor]:
    return [value for value in pytree.tree_leaves(values) if isinstance(value, Tensor)]


@dataclass(frozen=True)
class BranchCall:
    """A call of a branch in one of its variants, each of which has what requires grad one way.

    | variant | gradients |
    |---|---|
    | `"learning"` | of weights and of its input |
    | `"frozen"` | of its input |
    | `"detached"` | none, and saves nothing |

    A variant with norms in another mode, as frozen BatchNorm is, computes something else: see `kind`.
    """

    variant: str
    module: PathModule
    x: Tensor
    args: tuple
    kwargs: dict
    normed: bool

    @classmethod
    def of(cls, module: PathModule, x: Tensor, args: tuple, kwargs: dict, normed: bool) -> BranchCall:
        if torch.is_grad_enabled() and any(p.requires_grad for p in parameters_of(module)):
            variant = "learning"
        elif torch.is_grad_enabled() and any(t.requires_grad for t in tensors_in(x, args, kwargs)):
            variant = "frozen"
        else:
            x, args, kwargs = pytree.tree_map_only(Tensor, Tensor.detach, (x, args, kwargs))
            return cls("detached", module, x, args, kwargs, normed)
        return cls(variant, module, x if x.requires_grad else x.detach().requires_grad_(), args, kwargs, normed)

    @property
    def kind(self) -> tuple[Hashable, ...]:
        """Equal for calls of the branch that may share a graph, the variant first."""
        norms = [m for m in modules_of(self.module) if keeps_statistics(m)]
        modes = tuple((m.training, m.track_running_stats) for m in norms)
        return self.variant, self.normed, self.module.training, modes

    def run(self, function: Callable[..., Tensor], *args: Any) -> Tensor:
        """`function(*args)`, which runs the branch, under the flags of the variant."""
        if self.variant != "detached":
            return function(*args)
        with torch.no_grad(), Frozen(parameter_refs_of(self.module)):
            return function(*args)


class Runners:
    """The runners of some branches, until `remove()`."""

    def __init__(self, runners: Iterable[tuple[PathModule, BranchRunner]]):
        self._bindings: list[PathBinding] = []
        for path_module, runner in runners:
            path_module.binding.branch_runner = runner
            self._bindings.append(path_module.binding)

    def remove(self) -> None:
        """Branches run as before."""
        for binding in self._bindings:
            binding.branch_runner = None
        self._bindings.clear()
