"""The dtype of a sum as torch's own add promotes it, also where the branch doesn't run."""

from __future__ import annotations

import contextlib
from collections.abc import Hashable, Iterator, Sequence
from typing import Any, Protocol

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import _disable_current_modes

from .arguments import Args, Kwargs
from .parts import BranchParts

MOST_KNOWN = 32
"""How many dtypes a path remembers. A training meets a few; the bound is for programs that keep meeting new ones."""


class SkippedCall(Protocol):
    """The part of a `PathCall` that is used where its branch isn't to run. Its `module` is a converted block's path."""

    args: Args
    kwargs: Kwargs

    @property
    def module(self) -> Any: ...
    @property
    def parts(self) -> BranchParts: ...


class Promotion:
    """The dtype of a converted path's sum, which under autocast or with weights of several dtypes may be wider than the
    residual's.

    Args:
        whose: which operand gives the sum its dtype. `"both"`: torch promotes the two dtypes. `"branch"` or
            `"residual"`: the sum has the dtype of that operand, because the other one is added to it in place, or
            because it is added to zeros.
        dtype: the dtype of the branch's output where all its inputs and weights have that dtype. None: not known.
    """

    def __init__(self, whose: str, dtype: torch.dtype | None):
        self.whose, self._dtype = whose, dtype
        self._known: dict[Hashable, torch.dtype] = {}

    def of(self, residual: torch.dtype, branch: torch.dtype) -> torch.dtype:
        """The dtype of the sum."""
        if self.whose == "both":
            return torch.promote_types(residual, branch)
        return branch if self.whose == "branch" else residual

    def without_branch(self, call: SkippedCall, x: Tensor, residual: torch.dtype) -> torch.dtype:
        """The dtype of the sum where the branch on `x` isn't to run.

        Where the inputs of the branch don't tell its dtype, the branch runs once, without grad and in eval mode. The
        result is remembered for inputs and weights of these dtypes. Ranks that leave out the same calls run the branch
        at the same time.
        """
        if self.whose == "residual" or (self.whose == "both" and residual == torch.float64):
            return residual
        path = call.module
        dtypes = [t.dtype for t in (x, *_tensors(call.args), *_weights(path))]
        if self.whose == "both" and residual == torch.float32 and torch.float64 not in (self._dtype, *dtypes):
            return residual  # `convert` makes no path of a sum whose branch widens to float64 by itself
        device = x.device.type
        autocast = device != "meta" and torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device)
        if not autocast and all(d == self._dtype or not d.is_floating_point for d in dtypes):
            return self.of(residual, x.dtype)
        key = (device, autocast, *dtypes, *(t.dim() > 0 for t in _tensors(call.args)))
        if key not in self._known:
            if len(self._known) == MOST_KNOWN:
                self._known.clear()
            with _leaving_no_trace([*call.parts.modules, path.block], x):
                self._known[key] = path.run_branch(x, call.args, call.kwargs).dtype
        return self.of(residual, self._known[key])


def _tensors(args: Args) -> list[Tensor]:
    return [v for v in pytree.tree_leaves(args) if isinstance(v, Tensor)] if args else []


def _weights(path: Any) -> list[Tensor]:
    """Parameters and buffers of a branch, and those of the block itself. Shared ones are listed more than once."""
    found = [*path.block._parameters.values(), *path.block._buffers.values()]
    modules: list[nn.Module | None] = [*path.branch_modules()]
    while modules:
        module = modules.pop()
        if module is not None:
            found += module._parameters.values()
            found += module._buffers.values()
            modules += module._modules.values()
    return [t for t in found if t is not None]


@contextlib.contextmanager
def _leaving_no_trace(modules: Sequence[nn.Module], x: Tensor) -> Iterator[None]:
    """Context: what runs within changes no buffers, generators or autocast's cache, and is hidden from modes that watch
    torch's operations, such as a checkpoint's. `modules` are in eval mode, so that ranks exchange no statistics."""
    training = [m.training for m in modules]
    buffers = [m._buffers for m in modules]
    caches = torch.is_autocast_cache_enabled()
    devices = [] if x.device.type in ("cpu", "meta") else [x.device]
    modes = contextlib.nullcontext() if isinstance(x, FakeTensor) else _disable_current_modes()
    with torch.no_grad(), modes, torch.random.fork_rng(devices, device_type=x.device.type if devices else "cuda"):
        torch.set_autocast_cache_enabled(False)  # before torch 2.13 it hands out what was cast without grad
        try:
            for module in modules:
                module.training = False
                module._buffers = {name: None if b is None else b.clone() for name, b in module._buffers.items()}
            yield
        finally:
            torch.set_autocast_cache_enabled(caches)
            for module, flag, before in zip(modules, training, buffers, strict=True):
                module.training, module._buffers = flag, before
