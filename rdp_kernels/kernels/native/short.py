"""The residual add and the gather of rows on CPU tensors whose arguments nobody has checked: the ops check them.

On small tensors, checks and copies in Python would cost more than the work. The ops give None where an argument is
wrong, or has to be copied first; the caller then takes the long way. `ShortAdd` and `ShortGather` are their calls
within the autograd function, as `autograd.FusedCall` is for all others.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..layout import Layout
from .launchers import without_python

residual_add = without_python(torch.ops.rdp.native_residual_add.default)
gather_rows = without_python(torch.ops.rdp.native_gather_rows.default)
_residual_add_backward = without_python(torch.ops.rdp.native_residual_add_backward.default)
_gather_rows_backward = without_python(torch.ops.rdp.native_gather_rows_backward.default)


class ShortAdd:
    """A residual add. `options` are rows, scale, channel_dim and the activation's code; or nothing where all of them
    are the usual ones, since each argument of an op costs time. The tensors leave with the forward: autograd has them.
    """

    __slots__ = ("layout", "options", "row_scale", "update_dtype")
    options: Sequence[Any]

    def __init__(self, row_scale: Tensor | None, options: tuple):
        self.row_scale, self.options = row_scale, options

    def forward(self, ctx: Any, residual: Tensor, update: Tensor, gamma: Tensor | None) -> Tensor | None:
        row_scale, options = self.row_scale, self.options
        out = residual_add(residual, update, gamma, row_scale, *options)
        if out is None:
            return None
        kept = update if ctx.needs_input_grad[3] else None
        if options:
            rows, *self.options = options
            ctx.save_for_backward(kept, gamma, row_scale, rows, out if options[3] else None)
        else:
            ctx.save_for_backward(kept, gamma, row_scale)
        self.row_scale = None
        self.update_dtype = None if update.dtype is residual.dtype else update.dtype
        self.layout = None if residual.is_contiguous() else Layout.of(residual)
        return out

    def passes_on(self, saved: tuple, needs: tuple) -> bool:
        """Whether the gradient of the sum is the gradient of every operand."""
        _, gamma, row_scale, *further = saved
        if not (needs[2] or needs[3]):
            return not further or further[1] is None
        return gamma is None and row_scale is None and not further and self.update_dtype is None

    def backward(self, saved: tuple, gradients: tuple, needs: tuple, twice: bool) -> tuple[Tensor | None, ...]:
        (dout,) = gradients
        update, gamma, row_scale, *further = saved
        wants_update, out = needs[2], None
        options: tuple = ()
        if further:
            rows, out = further
            scale, channel_dim, _ = self.options
            options = wants_update, out, rows, scale, channel_dim, self.update_dtype
        elif not wants_update or self.update_dtype is not None:
            options = wants_update, None, None, 1.0, -1, self.update_dtype
        dresidual, dupdate, dgamma = _residual_add_backward(
            _conformed(dout, self.layout), update, gamma, row_scale, *options
        )
        return dout if out is None else dresidual, dupdate, dgamma


class ShortGather:
    """A gather of rows."""

    __slots__ = ("batch_size", "layout", "rows")

    def __init__(self, rows: Tensor):
        self.rows: Tensor | None = rows

    def forward(self, ctx: Any, residual: Tensor) -> Tensor | None:
        out = gather_rows(residual, self.rows)
        if out is not None:
            ctx.save_for_backward(self.rows)
            self.rows, self.batch_size = None, residual.shape[0]
            self.layout = None if residual.is_contiguous() else Layout.of(residual)
        return out

    def passes_on(self, saved: tuple, needs: tuple) -> bool:
        return False

    def backward(self, saved: tuple, gradients: tuple, needs: tuple, twice: bool) -> tuple[Tensor]:
        return (_gather_rows_backward(_conformed(gradients[0], self.layout), *saved, self.batch_size),)


def _conformed(gradient: Tensor, layout: Layout | None) -> Tensor:
    return gradient.contiguous() if layout is None else layout.conform(gradient)
