"""The residual add and the gather of CPU tensors, straight from their arguments to the compiled library: on small
tensors checks and dataclasses in Python would cost more than the work. The library's ops check everything themselves.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

from .._utils.checks import LARGEST_FLOAT32
from . import dispatch
from .autograd import check_untransformed, differentiable_once
from .layout import Layout

_PLAIN = (Tensor, Parameter)


def residual_add(
    residual: Tensor,
    branch: Tensor,
    gamma: Tensor | None,
    row_scale: Tensor | float | None,
    rows: Tensor | None = None,
    channel_dim: int = -1,
    activation: str | None = None,
) -> Tensor | None:
    """As the public op, on unchecked arguments. None where that has to see to it: another backend serves, a tensor has
    to be copied first, or an argument is wrong and wants its error."""
    kernels = _kernels_for(residual)
    if kernels is None or type(branch) not in _PLAIN:
        return None
    scale, factors = 1.0, None
    if row_scale is not None:
        if type(row_scale) is float and -LARGEST_FLOAT32 <= row_scale <= LARGEST_FLOAT32:
            scale = row_scale
        elif type(row_scale) is Tensor and not row_scale.requires_grad:
            factors = row_scale
        else:
            return None
    if gamma is not None and (type(gamma) not in _PLAIN or type(channel_dim) is not int):
        return None
    options: tuple = ()
    if rows is not None or scale != 1.0 or channel_dim != -1 or activation is not None:
        if activation not in (None, "relu") or not (rows is None or type(rows) is Tensor):
            return None
        options = (rows, scale, channel_dim, activation == "relu")
    learns = residual.requires_grad or branch.requires_grad or (gamma is not None and gamma.requires_grad)
    try:
        if learns and torch.is_grad_enabled():
            return _residual_add(residual, branch, gamma, (kernels, factors, options))
        return kernels.residual_add(residual, branch, gamma, factors, *options)
    except RuntimeError:
        return None


def plain_add(residual: Tensor, branch: Tensor, scale: float) -> Tensor | None:
    """`residual + scale · branch` by torch's own add, on any device: one kernel each way too, and no Python in its
    backward. None where a backend was asked for by name, and where that add would broadcast or promote.

    None for images as well: with a scale it rounds once where kernels, and other libraries' drop-path and add, round
    twice, and BatchNorm over few pixels magnifies the difference.
    """
    if branch.dim() > 3 or branch.shape != residual.shape or branch.dtype != residual.dtype:
        return None
    return torch.add(residual, branch, alpha=scale) if dispatch.is_free() else None


def gather_rows(residual: Tensor, rows: Tensor) -> Tensor | None:
    """As `residual_add`."""
    kernels = _kernels_for(residual)
    if kernels is None or type(rows) is not Tensor:
        return None
    try:
        if residual.requires_grad and torch.is_grad_enabled():
            return _gather_rows(residual, rows, kernels)
        return kernels.gather_rows(residual, rows)
    except RuntimeError:
        return None


def _kernels_for(residual: Tensor) -> ModuleType | None:
    if torch.compiler.is_compiling():
        return None
    kernels = dispatch.cpu_kernels()
    if (
        kernels is None
        or type(residual) not in _PLAIN
        or not residual.is_cpu
        or forward_ad._current_level >= 0
        or torch._C._are_functorch_transforms_active()
        or torch._C._is_tracing()
    ):
        return None
    return kernels


class _ResidualAdd(torch.autograd.Function):
    """`call`: kernels, row_scale, and the further options where they aren't the usual ones. Differentiable once."""

    @staticmethod
    def forward(ctx, residual, branch, gamma, call):
        kernels, row_scale, options = call
        out = kernels.residual_add(residual, branch, gamma, row_scale, *options)
        kept = branch if ctx.needs_input_grad[2] else None
        if options:
            rows, *ctx.options = options
            ctx.save_for_backward(kept, gamma, row_scale, rows, out if options[3] else None)
        else:
            ctx.options = None
            ctx.save_for_backward(kept, gamma, row_scale)
        ctx.kernels = kernels
        ctx.dtype = branch.dtype if branch.dtype != residual.dtype else None
        ctx.layout = None if residual.is_contiguous() else Layout.of(residual)
        return out

    @staticmethod
    def backward(ctx, dout):
        kernels = ctx.kernels
        branch, gamma, row_scale, *further = ctx.saved_tensors
        rows, out = further or (None, None)
        _, wants_branch, wants_gamma, _ = ctx.needs_input_grad
        if not (wants_branch or wants_gamma) and out is None:
            return dout, None, None, None
        if gamma is None and row_scale is None and not further and ctx.dtype is None:  # a plain sum
            return dout, dout, None, None
        check_untransformed(dout)
        like = dout.contiguous() if ctx.layout is None else ctx.layout.conform(dout)
        options: tuple = ()
        if further:
            scale, channel_dim, _ = ctx.options
            options = (wants_branch, out, rows, scale, channel_dim, ctx.dtype)
        elif not wants_branch or ctx.dtype is not None:
            options = (wants_branch, None, None, 1.0, -1, ctx.dtype)
        twice = torch.is_grad_enabled()
        if twice:
            with torch.no_grad():
                grads = kernels.residual_add_backward(like, branch, gamma, row_scale, *options)
        else:
            grads = kernels.residual_add_backward(like, branch, gamma, row_scale, *options)
        dresidual, dbranch, dgamma = grads
        if out is None:
            dresidual = dout
        if twice:
            return *differentiable_once((dresidual, dbranch, dgamma), (dout, branch, gamma, out)), None
        return dresidual, dbranch, dgamma, None


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, residual, rows, kernels):
        ctx.save_for_backward(rows)
        ctx.call = kernels, residual.shape[0]
        ctx.layout = None if residual.is_contiguous() else Layout.of(residual)
        return kernels.gather_rows(residual, rows)

    @staticmethod
    def backward(ctx, dout):
        (rows,) = ctx.saved_tensors
        kernels, batch_size = ctx.call
        check_untransformed(dout)
        like = dout.contiguous() if ctx.layout is None else ctx.layout.conform(dout)
        if not torch.is_grad_enabled():
            return kernels.gather_rows_backward(like, rows, batch_size), None, None
        with torch.no_grad():
            dresidual = kernels.gather_rows_backward(like, rows, batch_size)
        return *differentiable_once((dresidual,), (dout,)), None, None


# `Function.apply` without its look for functorch, which isn't active here: a quarter of what it costs.
_residual_add = super(torch.autograd.Function, _ResidualAdd).apply
_gather_rows = super(torch.autograd.Function, _GatherRows).apply
