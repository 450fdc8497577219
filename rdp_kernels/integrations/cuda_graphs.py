"""CUDA graphs for the branches of a model: each variant is captured once, then replayed from static buffers.

Small branches on a fast GPU wait for Python to launch their kernels. A replayed graph is a single launch. Python still
decides which branch runs, and in which variant.
"""

from __future__ import annotations

import functools
import warnings
import weakref
from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor, nn

from ..paths.binding import PathModule
from ..paths.path import own_parameters_of, parameters_of
from .branches import BranchCall, BranchRunners, tensors_in, uncompiled_paths

__all__ = ["capture_branches"]


def capture_branches(model: nn.Module) -> BranchRunners:
    """Captures the branch of every path of `model`, own or converted, at its first call in each variant.

    It is meant for block mode with batches of one size. Call `zero_grad(set_to_none=True)` before every backward.
    Replays overwrite gradients: copy the gradients that you keep.

    These calls run uncaptured, with the same results: a call with another shape than the captured one (it warns once
    for each path), a call with further arguments, a second forward before the backward of the first, and a learning
    branch whose weights have a gradient.

    The three variants of a branch (learning, frozen, and frozen without gradients) share memory. A variant whose
    BatchNorms run in several modes has a graph for each. Under autocast, autocast's weight cache has to be off.
    Checkpointing around captured branches isn't supported.

    Args:
        model: a model with paths on a CUDA device.

    Returns:
        A handle. Its `remove()` undoes the capture.

    Raises:
        RuntimeError: if CUDA isn't available, or if a branch is already compiled or captured.
        TypeError: if `model` isn't a module.
        ValueError: if `model` has no paths, is on another device, or has a scheme in sample mode.

    Example:
        >>> from rdp_kernels.integrations.cuda_graphs import capture_branches
        >>> branches = [rdp.ResidualBranch(nn.Linear(8, 8)) for _ in range(4)]
        >>> model = nn.Sequential(*branches)
        >>> scheme = rdp.ResidualDropPath(model, drop_prob=0.5)
        >>> if torch.cuda.is_available():
        ...     handle = capture_branches(model.cuda())
    """
    path_modules = uncompiled_paths(model)
    _check(model, path_modules)
    return BranchRunners([(module, _CapturedBranch(name)) for name, module in path_modules.items()])


def _check(model: nn.Module, path_modules: dict[str, PathModule]) -> None:
    if not torch.cuda.is_available():
        raise RuntimeError(
            "CUDA graphs need a GPU, but torch.cuda.is_available() is False: compile_branches of "
            "rdp_kernels.integrations.compile works on all machines"
        )
    for name, parameter in model.named_parameters():
        if not parameter.is_cuda:
            raise ValueError(f"model must be on a CUDA device, but its parameter {name!r} is on {parameter.device}")
    for name, module in path_modules.items():
        if module.binding.scheme is not None and module.binding.scheme.mode == "sample":
            raise ValueError(
                f"path {name!r} has a scheme in sample mode, where the number of rows changes: use mode='block'"
            )


class _CapturedBranch:
    """Runs one branch by its graphs."""

    def __init__(self, name: str):
        self._name, self._warned = name, False
        self._graphs: dict[Hashable, tuple[Hashable, Any]] = {}
        self._pool = torch.cuda.graph_pool_handle()
        self._in_flight: weakref.ref[Any] | None = None
        """The autograd node of the last replay. Until its backward has run, no replay may overwrite the buffers."""

    def __call__(self, module: PathModule, x: Tensor, args: tuple, kwargs: dict, normed: bool) -> Tensor:
        call = BranchCall.of(module, x, args, kwargs, normed)
        graph = self._graph(call)
        if graph is None:
            return call.run(module.run_branch, call.x, call.args, call.kwargs, normed)
        out = call.run(graph, call.x)
        if out.grad_fn is not None:
            self._in_flight = weakref.ref(out.grad_fn)
            out.register_hook(self._landed)
        return out

    def _landed(self, _: Tensor) -> None:
        self._in_flight = None

    def _graph(self, call: BranchCall) -> Any:
        """Returns the graph for the call, or None if the call has to run uncaptured."""
        if self._in_flight is not None and self._in_flight() is not None:
            return None
        if call.variant == "learning" and any(p.grad is not None for p in parameters_of(call.module)):
            return None  # the gradient may be the buffer that a replay overwrites
        kind, fits = call.kind, _fits(call)
        captured = self._graphs.get(kind)
        if captured is None and not tensors_in(call.args, call.kwargs):
            captured = self._graphs[kind] = fits, self._capture(call)
        if captured is not None and captured[0] == fits:
            return captured[1]
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"path {self._name!r} runs some calls uncaptured: they have further arguments, moved weights or an "
                f"input unlike the captured one, such as this one of shape {list(call.x.shape)}",
                stacklevel=2,
            )
        return None

    def _capture(self, call: BranchCall) -> Any:
        sample = call.x.detach().clone().requires_grad_(call.x.requires_grad)
        branch = _Branch(call)
        buffers = [(buffer, buffer.clone()) for buffer in branch.buffers()]
        try:
            make: Any = functools.partial(torch.cuda.make_graphed_callables, allow_unused_input=True, pool=self._pool)
            return call.run(make, branch, (sample,))
        finally:
            branch.call = None
            for buffer, before in buffers:  # the warm-up updates statistics of BatchNorm
                buffer.copy_(before)


class _Branch(nn.Module):
    """A branch as a module of one argument, with its parameters."""

    def __init__(self, call: BranchCall):
        super().__init__()
        self.parts = nn.ModuleList(call.module.branch_modules())
        self.own = nn.ParameterList(own_parameters_of(call.module))
        self.call: BranchCall | None = call
        """Set during the capture."""

    def forward(self, x: Tensor) -> Tensor:
        assert self.call is not None
        return self.call.module.run_branch(x, self.call.args, self.call.kwargs, self.call.normed)


def _fits(call: BranchCall) -> Hashable:
    """Returns a key that has to be the same as at the capture."""
    x = call.x
    autocast = torch.is_autocast_enabled(x.device.type) and torch.get_autocast_dtype(x.device.type)
    addresses = tuple(
        (p.data_ptr(), call.variant == "learning" and p.requires_grad) for p in parameters_of(call.module)
    )
    return len(tensors_in(call.args, call.kwargs)), x.shape, x.stride(), x.dtype, x.device, autocast, addresses
