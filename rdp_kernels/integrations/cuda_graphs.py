"""CUDA graphs for the branches of a model: each variant captured once, then replayed from static buffers.

Small branches on a fast GPU wait for Python to launch their kernels; a replayed graph is one launch. Which branch runs,
and in which variant, is decided in Python as ever.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor, nn

from ..paths.binding import PathModule
from ..paths.path import own_parameters_of, parameters_of
from .branches import BranchCall, Runners, owners_of, tensors_in


def capture_branches(model: nn.Module) -> Runners:
    """Has the branch of every path of `model`, own or converted, captured at its first call in each variant.

    For block mode, on batches of one size: what a graph can't serve runs as before, namely another shape than the one
    captured (a warning says so, once a path), further arguments, a second forward before the backward of the first,
    and a branch whose weights have a gradient already. `zero_grad(set_to_none=True)` therefore belongs before every
    backward, and as replays overwrite gradients, they have to be copied to be kept.

    Returns a handle whose `remove()` undoes it. A branch's three variants (learning, frozen, and frozen where no
    gradient passes) share memory; a variant whose BatchNorms run in several modes has a graph for each. Under autocast
    its cache has to be off. Checkpointing around captured branches is not supported. Raises `RuntimeError` without
    CUDA and `ValueError` for a model that is elsewhere or in sample mode.
    """
    path_modules = owners_of(model)
    _check(model, path_modules)
    return Runners([(module, _CapturedBranch(name)) for name, module in path_modules.items()])


def _check(model: nn.Module, path_modules: dict[str, PathModule]) -> None:
    if not torch.cuda.is_available():
        raise RuntimeError(
            "CUDA graphs need a GPU, and torch.cuda.is_available() is False: compile_branches of "
            "rdp_kernels.integrations.compile is for all machines"
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
    """Runs one branch from its graphs."""

    def __init__(self, name: str):
        self._name, self._warned = name, False
        self._graphs: dict[Hashable, tuple[Hashable, Any]] = {}
        self._pool: Any = None
        self._in_flight: weakref.ref[Any] | None = None
        """The autograd node of the last replay, whose backward needs the buffers as they are."""

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
        """None where the call has to run as it is."""
        if self._in_flight is not None and self._in_flight() is not None:
            return None
        if call.variant == "learning" and any(p.grad is not None for p in parameters_of(call.module)):
            return None  # which may be the buffer that a replay overwrites
        kind = call.kind
        captured = self._graphs.get(kind)
        fits = _fits(call)
        if captured is None and not tensors_in(call.args, call.kwargs):
            captured = self._graphs[kind] = fits, self._capture(call)
        if captured is not None and captured[0] == fits:
            return captured[1]
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"path {self._name!r} runs some calls uncaptured, with further arguments, weights that were moved, "
                f"or an input unlike the captured one, as this of shape {list(call.x.shape)}",
                stacklevel=2,
            )
        return None

    def _capture(self, call: BranchCall) -> Any:
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        sample = call.x.detach().clone().requires_grad_(call.x.requires_grad)
        branch = _Branch(call)
        buffers = [(buffer, buffer.clone()) for buffer in branch.buffers()]
        try:
            return call.run(_make_graphed, branch, sample, self._pool)
        finally:
            branch.call = None
            for buffer, before in buffers:  # the warm-up moves a BatchNorm's statistics
                buffer.copy_(before)


class _Branch(nn.Module):
    """A branch of one argument, with its parameters."""

    def __init__(self, call: BranchCall):
        super().__init__()
        self.parts = nn.ModuleList(call.module.branch_modules())
        self.own = nn.ParameterList(own_parameters_of(call.module))
        self.call: BranchCall | None = call
        """While it is captured."""

    def forward(self, x: Tensor) -> Tensor:
        assert self.call is not None
        return self.call.module.run_branch(x, self.call.args, self.call.kwargs, self.call.normed)


def _make_graphed(branch: _Branch, sample: Tensor, pool: Any) -> Any:
    return torch.cuda.make_graphed_callables(branch, (sample,), allow_unused_input=True, pool=pool)


def _fits(call: BranchCall) -> Hashable:
    """What has to be as it was at the capture."""
    x = call.x
    autocast = torch.is_autocast_enabled(x.device.type) and torch.get_autocast_dtype(x.device.type)
    addresses = tuple(
        (p.data_ptr(), call.variant == "learning" and p.requires_grad) for p in parameters_of(call.module)
    )
    return len(tensors_in(call.args, call.kwargs)), x.shape, x.stride(), x.dtype, x.device, autocast, addresses
