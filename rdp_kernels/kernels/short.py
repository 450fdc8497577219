"""The residual add and the gather of rows where arguments haven't been checked, with as little Python as possible.

A library of kernels serves them by five functions, which `unchecked_add` and `unchecked_gather` of `autograd` call.
They take all tensors and numbers as plain arguments, because an object for a call would cost as much as a check. They
return None where an argument is wrong or has to be copied first, and where they don't serve such a call; the caller
then checks the arguments itself.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from .._utils import checks
from .layout import Layout


def rows_are_right(rows: object, residual: Tensor) -> bool:
    """Whether a list of rows needs no further check. The values of a list on the CPU do."""
    return (
        type(rows) is Tensor
        and rows.dtype is torch.int64
        and rows.dim() == 1
        and rows.device == residual.device
        and not (rows.is_cpu and checks.host_has(rows))
    )


class ShortKernels(Protocol):
    """The options of `residual_add` are rows, scale, channel_dim and the activation's code, in this order; absent ones
    have the defaults None, 1.0, −1 and 0. `residual_add_rows` also returns the inverse of its rows."""

    def residual_add(
        self, residual: Tensor, update: Tensor, gamma: Tensor | None, row_scale: Tensor | None, *options: Any
    ) -> Tensor | None: ...
    def residual_add_rows(
        self, residual: Tensor, update: Tensor, gamma: Tensor | None, row_scale: Tensor | None, *options: Any
    ) -> tuple[Tensor | None, Tensor | None]: ...
    def residual_add_backward(
        self, dout: Tensor, update: Tensor | None, gamma: Tensor | None, row_scale: Tensor | None, *options: Any
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The gradients of the residual (where `out` is given), the update and γ (where `update` is given). Options:
        wants_update, out, rows, scale, channel_dim, update_dtype, activation, inverse."""

    def gather_rows(self, residual: Tensor, rows: Tensor) -> Tensor | None: ...
    def gather_rows_backward(self, dout: Tensor, rows: Tensor, batch_size: int) -> Tensor: ...


class ShortAdd:
    """A residual add within the autograd function. A call is the library, the row scale and the options."""

    @staticmethod
    def forward(call: tuple, ctx: Any, residual: Tensor, update: Tensor, gamma: Tensor | None) -> Tensor | None:
        kernels, row_scale, options = call
        kept = update if gamma is not None and gamma.requires_grad else None
        if not options:
            out = kernels.residual_add(residual, update, gamma, row_scale)
            if out is None:
                return None
            ctx.save_for_backward(kept, gamma, row_scale)
        else:
            rows, *ctx.numbers = options
            if rows is None:
                out, inverse = kernels.residual_add(residual, update, gamma, row_scale, *options), None
            else:
                out, inverse = kernels.residual_add_rows(residual, update, gamma, row_scale, *options)
            if out is None:
                return None
            ctx.save_for_backward(kept, gamma, row_scale, rows, out if options[3] else None, inverse)
        ctx.kernels = kernels
        usual = update.dtype is residual.dtype and residual.is_contiguous()
        ctx.form = None if usual else (update.dtype, Layout.of(residual))
        return out

    @staticmethod
    def passed_on(ctx: Any, saved: tuple, gradients: tuple, needs: tuple) -> tuple | None:
        """The gradients, where each is the sum's own gradient, so that no kernel is needed; else None."""
        _, gamma, row_scale, *further = saved
        if needs[3] or needs[4]:
            same = gamma is None and row_scale is None and not further
            same = same and (ctx.form is None or ctx.form[0] is gradients[0].dtype)
            return (*gradients, *gradients, None) if same else None
        return (*gradients, None, None) if not further or further[1] is None else None

    @staticmethod
    def backward(ctx: Any, saved: tuple, gradients: tuple, needs: tuple, twice: bool) -> tuple[Tensor | None, ...]:
        (dout,) = gradients
        update, gamma, row_scale, *further = saved
        update_dtype, layout = ctx.form or (None, None)
        wants_update, out = needs[3], None
        options: tuple = ()
        if further:
            rows, out, inverse = further
            scale, channel_dim, activation = ctx.numbers
            rows, out, inverse = _conformed(rows), _conformed(out, layout), _conformed(inverse)
            options = wants_update, out, rows, scale, channel_dim, update_dtype, activation, inverse
        elif not wants_update or update_dtype is not None:
            options = wants_update, None, None, 1.0, -1, update_dtype
        dresidual, dupdate, dgamma = ctx.kernels.residual_add_backward(
            _conformed(dout, layout), _conformed(update, layout), _conformed(gamma), _conformed(row_scale), *options
        )
        return dout if out is None else dresidual, dupdate, dgamma


class ShortGather:
    """A gather of rows. A call is the library and these rows."""

    passed_on = None

    @staticmethod
    def forward(call: tuple, ctx: Any, residual: Tensor) -> Tensor | None:
        ctx.kernels, rows = call
        out = ctx.kernels.gather_rows(residual, rows)
        if out is not None:
            ctx.save_for_backward(rows)
            ctx.batch_size = residual.shape[0]
            ctx.layout = None if residual.is_contiguous() else Layout.of(residual)
        return out

    @staticmethod
    def backward(ctx: Any, saved: tuple, gradients: tuple, needs: tuple, twice: bool) -> tuple[Tensor]:
        dout, rows = _conformed(gradients[0], ctx.layout), _conformed(saved[0])
        return (ctx.kernels.gather_rows_backward(dout, rows, ctx.batch_size),)


def _conformed(x: Tensor | None, layout: Layout | None = None) -> Tensor | None:
    """A gradient or a saved tensor in the order of the residual's layout. Saved ones may come back with other strides,
    if autograd's hooks kept them elsewhere."""
    if x is None:
        return None
    return x.contiguous() if layout is None else layout.conform(x)
