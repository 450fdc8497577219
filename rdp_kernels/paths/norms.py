"""The norm before a branch: fused, where possible, with the gather of its rows and with the add before it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from ..kernels.dispatch import resolve
from ..kernels.spec import NORMS, Detached, NextInput, Operands, RowSet

_NAMES = {norm.module: name for name, norm in NORMS.items()}


@dataclass(frozen=True)
class Norm:
    """A norm as an argument of a fused call. With `kind` None it isn't fused: the branch calls its module."""

    kind: str | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None
    eps: float = 0.0

    @property
    def fused(self) -> bool:
        return self.kind is not None

    def detached(self) -> Norm:
        """This norm, with no gradient to its weight and bias."""
        weight, bias = (None if t is None else t.detach() for t in (self.weight, self.bias))
        return Norm(self.kind, weight, bias, self.eps)

    def next_input(self, rows: RowSet | None, detached: Detached | None = None) -> NextInput:
        return NextInput(rows, self.kind, self.eps, detached)

    @classmethod
    def of(cls, module: Any, x: Tensor, also_learns: Sequence[object] = ()) -> Norm:
        """The fused norm, where it computes exactly what `module(x)` does and kernels serve it.

        `also_learns` holds parameters that learn although they don't require grad now. With any, the norm isn't fused,
        because such parameters learn in the module's own call only.
        """
        name = _NAMES.get(type(module))
        if name is None or also_learns or torch.compiler.is_compiling():
            return NO_NORM
        if has_hooks(module) or module._compiled_call_impl is not None:
            return NO_NORM
        if list(module.normalized_shape) != [x.shape[-1]] or x.dim() < 2 or not _keeps_dtype(module, x):
            return NO_NORM
        eps = torch.finfo(x.dtype).eps if module.eps is None else module.eps
        norm = cls(name, module.weight, getattr(module, "bias", None), eps)
        operands = Operands(x, weight=norm.weight, bias=norm.bias)
        served = resolve("path", operands, None, norm.next_input(None), required=False)
        return norm if served.library is not None and served.takes_norm else NO_NORM


NO_NORM = Norm()


def has_hooks(module: nn.Module) -> bool:
    """Whether hooks see what `module` gets or returns."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or _has_any_global_hook()
    )


def _keeps_dtype(module: Any, x: Tensor) -> bool:
    """Whether torch, too, computes in float32 and returns the dtype of `x`."""
    if x.dtype not in (torch.float32, torch.float64) and torch.is_autocast_enabled(x.device.type):
        return False
    if module.eps is None and x.dtype not in (torch.float32, torch.float64):
        return False  # the default eps depends on the version of torch
    allowed = {x.dtype} if x.dtype == torch.float64 else {x.dtype, torch.float32}
    return all(p.dtype in allowed for p in module.parameters())
