"""The residual add and the gather of rows on CPU tensors whose arguments nobody has checked: the ops check them.

On small tensors, checks and copies in Python would cost more than the work. Each function gives None where an argument
is wrong, or has to be copied first; the caller then takes the long way.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..layout import Layout
from ..spec import Add, NextInput, Operands, Results, activation_code
from .launchers import without_python

residual_add = without_python(torch.ops.rdp.native_residual_add.default)
gather_rows = without_python(torch.ops.rdp.native_gather_rows.default)
_residual_add_backward = without_python(torch.ops.rdp.native_residual_add_backward.default)
_gather_rows_backward = without_python(torch.ops.rdp.native_gather_rows_backward.default)

READS_INVERSES = False
ONE_RESULT = True


class ShortContext(NamedTuple):
    """What the backward needs to know of the forward."""

    batch_size: int
    layout: Layout | None
    """None: contiguous."""
    update_dtype: torch.dtype | None
    """None: the residual's."""


def fused_add_fwd(
    operands: Operands,
    add: Add | None,
    next_input: NextInput | None,
    num_saved: int = 0,
    in_place: bool = False,
) -> tuple[Results | None, ShortContext | None]:
    """Adds an update to the residual, or gathers the next branch's rows."""
    residual, update, _, gamma, _, _ = operands
    if add is not None:
        out = residual_add(residual, update, gamma, add.row_scale, *_options(add))
        results = Results(out)
    elif next_input is not None and next_input.rows is not None:
        out = gather_rows(residual, next_input.rows.index)
        results = Results(next=out)
    if out is None:
        return None, None
    layout = None if residual.is_contiguous() else Layout.of(residual)
    same = update is None or update.dtype == residual.dtype
    return results, ShortContext(residual.shape[0], layout, None if same else update.dtype)


def fused_add_bwd(
    context: ShortContext,
    operands: Operands,
    results: Results,
    gradients: Results,
    add: Add | None,
    next_input: NextInput | None,
    wanted: Operands,
    in_place: bool = False,
) -> Operands:
    """The gradients of the wanted operands."""
    given = gradients.next if add is None else gradients.out
    if given is None:
        return Operands()
    gradient = given.contiguous() if context.layout is None else context.layout.conform(given)
    if add is None:
        assert next_input is not None
        assert next_input.rows is not None
        return Operands(_gather_rows_backward(gradient, next_input.rows.index, context.batch_size))
    out, options = results.out, _options(add)
    further: tuple = ()
    if options or context.update_dtype is not None or not wanted.update:
        rows, scale, channel_dim, _ = options or (None, 1.0, -1, 0)
        further = (bool(wanted.update), out, rows, scale, channel_dim, context.update_dtype)
    dresidual, dupdate, dgamma = _residual_add_backward(
        gradient, operands.update, operands.gamma, add.row_scale, *further
    )
    return Operands(given if out is None else dresidual, dupdate, None, dgamma)


def _options(add: Add) -> tuple:
    """The further arguments of the ops; none where they are the usual ones, since each costs time."""
    if add.rows is None and add.scale == 1.0 and add.channel_dim == -1 and add.activation is None:
        return ()
    rows = None if add.rows is None else add.rows.index
    return rows, add.scale, add.channel_dim, activation_code(add.activation)
