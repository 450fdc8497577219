"""Compiled or captured branches: their variants, and how they are installed and removed.

Python decides at each call what a path does, and so what learns. Only the branch is compiled or captured.
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
from ..paths.path import find_path_modules, modules_of, parameter_refs_of, parameters_of


def uncompiled_paths(model: nn.Module) -> dict[str, PathModule]:
    """Returns the path modules of `model`, by their names in a scheme.

    Raises `TypeError` if `model` is no module, `ValueError` if it has no paths, and `RuntimeError` if a branch is
    already compiled or captured.
    """
    path_modules = find_path_modules(model, nested=True)
    for name, path_module in path_modules.items():
        if path_module.binding.branch_runner is not None:
            raise RuntimeError(f"the branch of path {name!r} is compiled or captured already: call remove() first")
    return path_modules


def tensors_in(*values: Any) -> list[Tensor]:
    return [value for value in pytree.tree_leaves(values) if isinstance(value, Tensor)]


@dataclass(frozen=True)
class BranchCall:
    """A call of a branch in one of its variants, which differ in what requires grad:

    | variant | gradients |
    |---|---|
    | `"learning"` | to the weights and the input |
    | `"frozen"` | to the input |
    | `"detached"` | none; nothing is saved |

    What a branch computes also depends on the modes of its norms, for example with a frozen BatchNorm. `kind` includes
    these modes.
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
        """A key that is equal for calls of the branch that may share a graph. It begins with the variant."""
        norms = [m for m in modules_of(self.module) if keeps_statistics(m)]
        modes = tuple((m.training, m.track_running_stats) for m in norms)
        return self.variant, self.normed, self.module.training, modes

    def run(self, function: Callable[..., Tensor], *args: Any) -> Tensor:
        """Calls `function(*args)`, which runs the branch, with the flags of the variant."""
        if self.variant != "detached":
            return function(*args)
        with torch.no_grad(), Frozen(parameter_refs_of(self.module)):
            return function(*args)


class BranchRunners:
    """The handle of compiled or captured branches.

    `compile_branches` and `capture_branches` return it.

    Args:
        runners: path modules, each with the callable that runs its branch.
    """

    def __init__(self, runners: Iterable[tuple[PathModule, BranchRunner]]):
        self._bindings: list[PathBinding] = []
        for path_module, runner in runners:
            path_module.binding.branch_runner = runner
            self._bindings.append(path_module.binding)

    def remove(self) -> None:
        """Removes the compiled or captured code. Branches run as before."""
        for binding in self._bindings:
            binding.branch_runner = None
        self._bindings.clear()
