"""The norm before a branch: whether it can be fused with the gather of its rows and with the add before."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from ..kernels.dispatch import resolve
from ..kernels.spec import NORMS, Detached, NextInput, Operands, RowSet

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@dataclass(frozen=True)
class Norm:
    """A norm as an argument of a tail. `kind` None: it isn't fused, the branch calls its module."""

    kind: str | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None
    eps: float = 0.0

    @property
    def fused(self) -> bool:
        return self.kind is not None

    def operands(self, detached: bool = False) -> Operands:
        """Weight and bias; `detached`: no gradient goes to them."""
        weight, bias = (t.detach() if detached and t is not None else t for t in (self.weight, self.bias))
        return Operands(weight=weight, bias=bias)

    def next_input(self, rows: RowSet | None, detached: Detached | None = None) -> NextInput:
        return NextInput(rows, self.kind, self.eps, detached)

    @classmethod
    def of(cls, module: nn.Module | None, x: Tensor, also_learns: Sequence[object] = ()) -> Norm:
        """Fused where that means exactly what calling `module` on `x` would, and kernels serve it.

        `also_learns`: parameters that learn although they don't require grad now; the module's own call sees to them.
        """
        if also_learns or torch.compiler.is_compiling():
            return cls()
        kind = next((name for name, norm in NORMS.items() if type(module) is norm.module), None)
        if kind is None or module is None or not _is_plain(module):
            return cls()
        if list(module.normalized_shape) != [x.shape[-1]] or x.dim() < 2 or not _keeps_dtype(module, x):
            return cls()
        eps = torch.finfo(x.dtype).eps if module.eps is None else module.eps  # RMSNorm's default
        norm = cls(kind, module.weight, module.bias if NORMS[kind].has_bias else None, eps)
        operands = Operands(x, weight=norm.weight, bias=norm.bias)
        served = resolve("path", operands, None, norm.next_input(None), required=False)
        return norm if served.library is not None and served.takes_norm else cls()


def has_hooks(module: nn.Module) -> bool:
    """Whether somebody sees what `module` gets or returns."""
    return _has_any_global_hook() or any(getattr(module, name) for name in _HOOKS)


def _is_plain(module: nn.Module) -> bool:
    """Whether a call of the module does what its class says, and nobody observes it."""
    return not has_hooks(module) and module._compiled_call_impl is None


def _keeps_dtype(module: nn.Module, x: Tensor) -> bool:
    """Whether torch, too, would compute in float32 and return the dtype of `x`."""
    if x.dtype not in (torch.float32, torch.float64) and torch.is_autocast_enabled(x.device.type):
        return False
    if module.eps is None and x.dtype not in (torch.float32, torch.float64):
        return False  # its default depends on the version of torch
    allowed = {x.dtype} if x.dtype == torch.float64 else {x.dtype, torch.float32}
    return all(p.dtype in allowed for p in module.parameters())
