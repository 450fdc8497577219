"""The modules of a branch, sorted by what a call asks about. They are looked up again only where they have changed.

Looking at every module in Python costs as much as everything else that a call does. Whether a branch is unchanged is
therefore asked by functions that loop in C.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain
from operator import attrgetter, methodcaller
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.modules.conv import _ConvNd

from .freezing import ParameterRef

children, parameters = attrgetter("_modules"), attrgetter("_parameters")
keys_of, _values_of = methodcaller("keys"), methodcaller("values")


def values_of(dicts: Iterable[Any]) -> Iterator[Any]:
    """The values of all `dicts`, one after the other."""
    return chain.from_iterable(map(_values_of, dicts))


def looked_at(modules: list[nn.Module]) -> tuple[list[Any], list[type]]:
    """The direct children and the classes of all `modules`. If they are equal again, the modules are the same trees."""
    return list(values_of(map(children, modules))), list(map(type, modules))


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
        self._seen = looked_at(self.modules)

    def hold_for(self, tops: list[nn.Module]) -> bool:
        """Whether the branch of `tops` has these modules, of the same classes, and no others.

        The lists hold the modules themselves, so that a new module never passes for an old one.
        """
        return tops == self.tops and looked_at(self.modules) == self._seen

    def parameter_refs(self) -> list[ParameterRef]:
        """The parameters that the modules have now."""
        return [(module, name) for module in self.modules for name in module._parameters]
