"""The dtype of a sum as torch's own add promotes it, also where the branch that decides about it doesn't run."""

from __future__ import annotations

import contextlib
from collections.abc import Hashable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import _disable_current_modes

if TYPE_CHECKING:
    from ..convert.converted import ConvertedPath
    from .call import PathCall

MOST_KNOWN = 32
"""So many dtypes a path remembers."""


class Promotion:
    """Of one converted path: under autocast, or with weights of several dtypes, its sum may be wider than its stream.

    Args:
        whose: dtype the sum has. `"both"`: torch promotes the two. `"branch"`, `"residual"`: that of one of them, to
            which the other is added in place, or which zeros stand beside.
        dtype: that of the branch's output where all that it is computed from has it; None where that isn't known.
    """

    def __init__(self, whose: str, dtype: torch.dtype | None):
        self.whose, self._dtype = whose, dtype
        self._known: dict[Hashable, torch.dtype] = {}

    def of(self, residual: torch.dtype, branch: torch.dtype) -> torch.dtype:
        """The dtype of the sum."""
        if self.whose == "both":
            return torch.promote_types(residual, branch)
        return branch if self.whose == "branch" else residual

    def without_branch(self, call: PathCall, x: Tensor, residual: torch.dtype) -> torch.dtype:
        """The dtype of the sum where the branch on `x` isn't to run.

        Where what goes into the branch doesn't tell, the branch runs once without grad, in eval mode, for its dtype.
        That is remembered for inputs and weights of these dtypes. Ranks that leave out the same calls do so at the same
        time.
        """
        if self.whose == "residual" or (self.whose == "both" and residual == torch.float64):
            return residual
        module: Any = call.module
        dtypes = [t.dtype for t in (x, *_tensors(call.args), *_weights(module))]
        if self.whose == "both" and residual == torch.float32 and torch.float64 not in (self._dtype, *dtypes):
            return residual  # a branch that widens to float64 by itself did so in the conversion, and isn't added
        device = x.device.type
        autocast = device != "meta" and torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device)
        if not autocast and all(d == self._dtype or not d.is_floating_point for d in dtypes):
            return self.of(residual, x.dtype)
        key = (device, autocast, *dtypes, *(t.dim() > 0 for t in _tensors(call.args)))
        if key not in self._known:
            if len(self._known) == MOST_KNOWN:
                self._known.clear()
            with _unnoticed([*call.modules, module.block], x):
                self._known[key] = module.run_branch(x, call.args, call.kwargs).dtype
        return self.of(residual, self._known[key])


def _tensors(args: tuple) -> list[Tensor]:
    return [v for v in pytree.tree_leaves(args) if isinstance(v, Tensor)] if args else []


def _weights(path: ConvertedPath) -> list[Tensor]:
    """Parameters and buffers of a branch, shared ones more than once; and those that the block itself has."""
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
def _unnoticed(modules: Sequence[nn.Module], x: Tensor) -> Iterator[None]:
    """What runs within leaves no trace: in buffers, generators, autocast's cache, and what watches torch's operations,
    such as a checkpoint that caches some of them. In eval mode no statistics are exchanged between ranks."""
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
