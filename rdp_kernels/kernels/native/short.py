"""The residual add and the gather of rows where arguments haven't been checked: the ops check them.

On small tensors, checks and copies in Python would cost more than the work. The ops return None where an argument is
wrong or has to be copied first, and where the device has no kernels for the dtypes. The caller then checks the
arguments itself. Within the autograd function `ShortAdd` and `ShortGather` run the ops, without an object for the call,
which would cost as much as a check.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..layout import Layout
from .launchers import without_python

residual_add = without_python(torch.ops.rdp.native_residual_add.default)
_residual_add_rows = without_python(torch.ops.rdp.native_residual_add_rows.default)
gather_rows = without_python(torch.ops.rdp.native_gather_rows.default)
_residual_add_backward = without_python(torch.ops.rdp.native_residual_add_backward.default)
_gather_rows_backward = without_python(torch.ops.rdp.native_gather_rows_backward.default)


class ShortAdd:
    """A residual add. A call is the row scale and the options: rows, scale, channel_dim and the activation's code. The
    options are empty where all have their defaults, because each argument of an op costs time."""

    @staticmethod
    def forward(call: tuple, ctx: Any, residual: Tensor, update: Tensor, gamma: Tensor | None) -> Tensor | None:
        row_scale, options = call
        inverse = None
        if options and options[0] is not None:
            out, inverse = _residual_add_rows(residual, update, gamma, row_scale, *options)
        else:
            out = residual_add(residual, update, gamma, row_scale, *options)
        if out is None:
            return None
        kept = update if gamma is not None and gamma.requires_grad else None
        if options:
            rows, *ctx.numbers = options
            ctx.save_for_backward(kept, gamma, row_scale, rows, out if options[3] else None, inverse)
        else:
            ctx.save_for_backward(kept, gamma, row_scale)
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
            options = wants_update, out, rows, scale, channel_dim, update_dtype, activation, inverse
        elif not wants_update or update_dtype is not None:
            options = wants_update, None, None, 1.0, -1, update_dtype
        dresidual, dupdate, dgamma = _residual_add_backward(
            _conformed(dout, layout), update, gamma, row_scale, *options
        )
        return dout if out is None else dresidual, dupdate, dgamma


class ShortGather:
    """A gather of rows. A call is these rows."""

    passed_on = None

    @staticmethod
    def forward(rows: Tensor, ctx: Any, residual: Tensor) -> Tensor | None:
        out = gather_rows(residual, rows)
        if out is not None:
            ctx.save_for_backward(rows)
            ctx.batch_size = residual.shape[0]
            ctx.layout = None if residual.is_contiguous() else Layout.of(residual)
        return out

    @staticmethod
    def backward(ctx: Any, saved: tuple, gradients: tuple, needs: tuple, twice: bool) -> tuple[Tensor]:
        return (_gather_rows_backward(_conformed(gradients[0], ctx.layout), *saved, ctx.batch_size),)


def _conformed(gradient: Tensor, layout: Layout | None) -> Tensor:
    return gradient.contiguous() if layout is None else layout.conform(gradient)
