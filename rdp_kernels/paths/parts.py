"""The modules of a branch, sorted by what a call asks about. They are looked up again only where they have changed."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.modules.conv import _ConvNd

from .freezing import ParameterRef


def walk(model: nn.Module, without: Iterable[int] = ()) -> list[nn.Module]:
    """As `model.modules()`, in a fraction of its function calls. Modules whose ids are in `without` are left out with
    all their children."""
    found: dict[int, nn.Module | None] = dict.fromkeys(without)
    stack: list[nn.Module | None] = [model]
    while stack:
        module = stack.pop()
        if module is None or (key := id(module)) in found:
            continue
        found[key] = module
        if module._modules:
            stack += reversed(module._modules.values())
    return [module for module in found.values() if module is not None]


class Tree:
    """Remembers the children and the classes of modules. To compare them costs a fraction of a walk."""

    def __init__(self, modules: list[nn.Module]):
        self._modules = modules
        # The copies hold the children themselves, so that a new module never passes for one that is gone.
        self._children = [dict(module._modules.items()) for module in modules]
        self._classes = list(map(type, modules))

    def is_unchanged(self) -> bool:
        """Whether the modules have the same children, under the same names, and the same classes."""
        modules = self._modules
        return [module._modules for module in modules] == self._children and list(map(type, modules)) == self._classes


class BranchParts:
    """All modules of a branch.

    Args:
        tops: the modules that hold all others.
    """

    def __init__(self, tops: list[nn.Module]):
        self.tops = tops
        self.modules = [module for top in tops for module in walk(top)]
        self.layers = [m for m in self.modules if isinstance(m, (_NormBase, _ConvNd))]
        """The layers that freezing treats in a way of their own."""
        self.batch_norms = [m for m in self.layers if isinstance(m, _BatchNorm)]
        self._tree = Tree(self.modules)

    def hold_for(self, tops: list[nn.Module]) -> bool:
        """Whether the branch of `tops` has these modules, of the same classes, and no others."""
        return tops == self.tops and self._tree.is_unchanged()

    def parameter_refs(self) -> list[ParameterRef]:
        """The parameters that the modules have now."""
        return [(module, name) for module in self.modules for name in module._parameters]
