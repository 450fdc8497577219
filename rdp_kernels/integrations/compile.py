"""`torch.compile` for the branches of a model: up to three graphs for each branch, for all plans.

If a whole model is compiled as it is, its graphs depend on Python's decisions, and there is a graph for each plan. Here
Python still decides which branches run, on which rows, and which learn. Only the branches are compiled.
"""

from __future__ import annotations

import itertools
import re
import types
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor, nn

from ..convert.converted import ConvertedPath
from ..paths.binding import PathModule
from ..paths.path import own_parameters_of
from .branches import BranchCall, BranchRunners, tensors_in, uncompiled_paths

__all__ = ["compile_branches"]


def compile_branches(model: nn.Module, *, dynamic: bool | None = None, **options: Any) -> BranchRunners:
    """Compiles the branch of every path of `model`, own or converted, with a scheme or without one.

    A branch has up to three graphs: learning, frozen, and frozen without gradients. Identical branches share them. A
    single row out of several runs uncompiled, because compilers would make another graph for the number 1. Copies and
    pickles of the model aren't compiled. If the model is also compiled as a whole, its branches aren't compiled
    separately.

    Args:
        model: a model with paths. It is compiled in place. Parameters, names and `state_dict` don't change.
        dynamic: as in `torch.compile`. With None, the default, the number of rows is always symbolic, because sample
            mode runs a branch on any number of rows. Use False for block mode with batches of one size.
        **options: further options of `torch.compile`. `fullgraph` is True by default.

    Returns:
        A handle. Its `remove()` undoes the compilation.

    Raises:
        RuntimeError: if a branch is already compiled or captured.
        TypeError: if `model` isn't a module.
        ValueError: if `model` has no paths.

    Example:
        >>> from rdp_kernels.integrations.compile import compile_branches
        >>> branches = [rdp.ResidualBranch(nn.Linear(8, 8)) for _ in range(4)]
        >>> model = nn.Sequential(*branches)
        >>> handle = compile_branches(model, backend="eager")  # the default backend is inductor
        >>> scheme = rdp.ResidualDropPath(model, drop_prob=0.5, mode="sample")
        >>> for _ in scheme.iterations(8):
        ...     model(torch.randn(8, 8)).square().mean().backward()
        >>> handle.remove()
    """
    shared: dict[Hashable, _CompiledBranch] = {}
    options = {"fullgraph": True, "dynamic": dynamic, **options}
    return BranchRunners(
        [
            (path_module, shared.setdefault(_likeness(path_module), _CompiledBranch(name, options)))
            for name, path_module in uncompiled_paths(model).items()
        ]
    )


_numbers = itertools.count()


class _CompiledBranch:
    """Runs a branch, and others identical to it, compiled."""

    def __init__(self, name: str, options: dict[str, Any]):
        self._name, self._options = name, options
        self._functions: dict[Hashable, Callable[..., Tensor]] = {}

    def __call__(self, path_module: PathModule, x: Tensor, args: tuple, kwargs: dict, normed: bool) -> Tensor:
        call = BranchCall.of(path_module, x, args, kwargs, normed)
        if self._options["dynamic"] is not False:
            _mark_rows(call.x)
            path_module.map_rows(_mark_rows, None, call.args, call.kwargs)
        need_grad = [t.requires_grad for t in tensors_in(call.args, call.kwargs)]
        function = self._function(call.kind, *need_grad)
        return call.run(function, path_module, call.x, call.args, call.kwargs, normed)

    def _function(self, kind: tuple[Hashable, ...], *need_grad: bool) -> Callable[..., Tensor]:
        """Returns the function of one variant.

        Each function has its own name and code object, because Dynamo counts graphs by code object and finds changing
        sizes by name.
        """
        key = (*kind, *need_grad)
        if key not in self._functions:
            name = re.sub(r"\W", "_", f"{self._name}_{kind[0]}_{next(_numbers)}")
            code = _run_branch.__code__.replace(co_name=name)
            self._functions[key] = torch.compile(types.FunctionType(code, globals(), name), **self._options)
        return self._functions[key]


def _mark_rows(tensor: Tensor) -> Tensor:
    torch._dynamo.maybe_mark_dynamic(tensor, 0)
    return tensor


def _run_branch(path_module: PathModule, x: Tensor, args: tuple, kwargs: dict, normed: bool) -> Tensor:
    return path_module.run_branch(x, args, kwargs, normed)


def _likeness(path_module: PathModule) -> Hashable:
    """Returns a key that is equal for branches with the same code and the same structure. They share graphs."""
    code = (type(path_module.block), path_module.index) if isinstance(path_module, ConvertedPath) else type(path_module)
    own = tuple(_metadata(p) for p in own_parameters_of(path_module))
    modules = [(name, m) for module in path_module.branch_modules() for name, m in module.named_modules()]
    return code, own, tuple((name, type(m), _constants(m)) for name, m in modules)


def _constants(module: nn.Module) -> tuple[Hashable, ...]:
    tensors = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
    parts = ("_parameters", "_buffers", "_modules")
    plain = [(k, repr(v)) for k, v in vars(module).items() if k not in parts and not isinstance(v, Tensor)]
    return tuple((name, _metadata(t)) for name, t in tensors), tuple(plain)


def _metadata(tensor: Tensor) -> tuple[Hashable, ...]:
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device
