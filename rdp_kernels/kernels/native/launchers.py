"""The calls of the compiled library's ops. All samples must be dense in one order; other tensors are copied first."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..buffers import Context, context_of
from ..spec import ACTIVATION_CODES, Add, Gradients, NextInput, Operands, Results, RowSet


def without_python(op: Any) -> Callable[..., Any]:
    """An op without its `__call__`, a Python function that only passes its arguments on."""
    return getattr(op, "_op", op)


_forward = without_python(torch.ops.rdp.native_fused_add.default)
_backward = without_python(torch.ops.rdp.native_fused_add_backward.default)
_NO_ADD = Add()
_ALL_ROWS = None, None, 0


def fused_add_fwd(
    operands: Operands,
    add: Add | None,
    next_input: NextInput | None,
    num_saved: int = 0,
    in_place: bool = False,
) -> tuple[Results, Context]:
    """Adds an update to the residual, gathers the next branch's rows, or both. Arguments as in `triton.launchers`;
    `num_saved` is for libraries that have norms."""
    assert next_input is None or next_input.norm is None, "the compiled library has no norms"
    context = context_of(operands, None)
    residual, update, frozen_update, gamma, _, _ = operands
    conform = context.conform
    residual = conform(residual)
    spec = _NO_ADD if add is None else add
    next_rows = None if next_input is None else next_input.rows
    out, learning_next, frozen_next = _forward(
        residual,
        update if update is None else conform(update),
        frozen_update if frozen_update is None else conform(frozen_update),
        gamma if gamma is None else gamma.contiguous(),
        *(_ALL_ROWS if spec.rows is None else _rows(spec.rows)),
        _contiguous(spec.row_scale),
        spec.scale,
        spec.channel_dim,
        ACTIVATION_CODES[spec.activation],
        next_input is not None,
        *(_ALL_ROWS if next_rows is None else _rows(next_rows)),
        residual if in_place else None,
    )
    return Results(residual if in_place else out, learning_next, frozen_next), context


def fused_add_bwd(
    context: Context,
    operands: Operands,
    results: Results,
    gradients: Gradients,
    add: Add | None,
    next_input: NextInput | None,
    wanted: Operands,
    in_place: bool = False,
) -> Operands:
    """The gradients of the operands that are `wanted`. Arguments as in `triton.launchers`, without those of a norm."""
    dout, dnext, dfrozen_next = map(context.conform, gradients)
    if dout is None and dnext is None and dfrozen_next is None:
        return Operands()
    spec, dtypes = _NO_ADD if add is None else add, context.dtypes
    next_rows = None if next_input is None else next_input.rows
    gradient_changes = spec.activation is not None or dnext is not None or dfrozen_next is not None
    in_place = in_place and dout is not None and dout is gradients[0]
    dresidual, *others = _backward(
        dout,
        dnext,
        dfrozen_next,
        context.conform(operands.update),
        _contiguous(operands.gamma),
        context.conform(results.out),
        *(_ALL_ROWS if spec.rows is None else _rows(spec.rows)),
        _contiguous(spec.row_scale),
        spec.scale,
        spec.channel_dim,
        ACTIVATION_CODES[spec.activation],
        *(_ALL_ROWS if next_rows is None else _rows(next_rows)),
        context.shape[0],
        context.compute == torch.float64,
        bool(wanted.residual) and gradient_changes,
        dtypes.update if wanted.update else None,
        dtypes.frozen_update if wanted.frozen_update else None,
        dtypes.gamma if wanted.gamma else None,
        dout if in_place and gradient_changes else None,
    )
    if wanted.residual and (not gradient_changes or in_place):
        dresidual = dout
    return Operands(dresidual, *others)


def _contiguous(vector: Tensor | None) -> Tensor | None:
    return None if vector is None else vector.contiguous()


def _rows(rows: RowSet) -> tuple[Tensor | None, Tensor | None, int]:
    inverse = rows.inverse
    return rows.index.contiguous(), inverse if inverse is None else inverse.contiguous(), rows.num_learning
