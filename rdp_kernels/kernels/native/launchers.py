"""The calls of the compiled library's ops. These want samples that are dense in one order: others are copied first."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..buffers import Context, context_of
from ..layout import Layout
from ..spec import Add, NextInput, Operands, Results, RowSet


def _without_python(op: Callable) -> Callable:
    """What an op's `__call__`, a Python function, does nothing but pass its arguments on to."""
    return getattr(op, "_op", op)


residual_add = _without_python(torch.ops.rdp.native_residual_add.default)
residual_add_backward = _without_python(torch.ops.rdp.native_residual_add_backward.default)
gather_rows = _without_python(torch.ops.rdp.native_gather_rows.default)
gather_rows_backward = _without_python(torch.ops.rdp.native_gather_rows_backward.default)
_forward = torch.ops.rdp.native_fused_add.default
_backward = torch.ops.rdp.native_fused_add_backward.default


READS_INVERSES = False
"""Of `RowSet.inverse`."""


def fused_add_fwd(
    operands: Operands,
    add: Add | None,
    next_input: NextInput | None,
    num_saved: int = 0,
    in_place: bool = False,
    batch_size: int | None = None,
) -> tuple[Results, Context]:
    """Adds a branch to the stream, gathers the next branch's rows, or both.

    Args:
        in_place: the sum overwrites `operands.residual`, which must be dense; without activation.
        num_saved, batch_size: of libraries that have norms.
    """
    context = context_of(operands, None, batch_size)
    residual, branch, frozen = (_conform(context.layout, t) for t in operands[:3])
    spec = Add() if add is None else add
    out, following_rows, frozen_rows = _forward(
        residual,
        branch,
        frozen,
        _contiguous(operands.gamma),
        *_rows(spec.rows),
        _contiguous(spec.row_scale),
        spec.scale,
        spec.channel_dim,
        spec.activation == "relu",
        next_input is not None,
        *_rows(None if next_input is None else next_input.rows),
        residual if in_place else None,
    )
    return Results(residual if in_place else out, following_rows, frozen_rows), context


def fused_add_bwd(
    context: Context,
    operands: Operands,
    results: Results,
    gradients: Results,
    add: Add | None,
    next_input: NextInput | None,
    wanted: Operands,
    in_place: bool = False,
) -> Operands:
    """The gradients of the operands that are `wanted` (bools).

    Args:
        operands: `branch` where dγ is wanted, `gamma` where a gradient passes through it; else None.
        results: `out` where there is an activation.
        gradients: of the results; None for zero.
        in_place: the residual's gradient may overwrite that of `out`, which must be dense.
    """
    dout, dnext, dfrozen_next = (_conform(context.layout, t) for t in gradients[:3])
    if dout is None and dnext is None and dfrozen_next is None:
        return Operands()
    spec, dtypes = Add() if add is None else add, context.dtypes
    stream_changes = spec.activation is not None or dnext is not None or dfrozen_next is not None
    in_place = in_place and dout is not None and dout is gradients.out
    dresidual, *others = _backward(
        dout,
        dnext,
        dfrozen_next,
        _conform(context.layout, operands.update),
        _contiguous(operands.gamma),
        results.out,
        *_rows(spec.rows),
        _contiguous(spec.row_scale),
        spec.scale,
        spec.channel_dim,
        *_rows(None if next_input is None else next_input.rows),
        context.shape[0],
        context.compute == torch.float64,
        bool(wanted.residual) and stream_changes,
        dtypes.update if wanted.update else None,
        dtypes.frozen_update if wanted.frozen_update else None,
        dtypes.gamma if wanted.gamma else None,
        dout if in_place and stream_changes else None,
    )
    if wanted.residual and (not stream_changes or in_place):
        dresidual = dout
    return Operands(dresidual, *others)


def _conform(layout: Layout, x: Tensor | None) -> Tensor | None:
    return None if x is None else layout.conform(x)


def _contiguous(vector: Tensor | None) -> Tensor | None:
    return None if vector is None else vector.contiguous()


def _rows(rows: RowSet | None) -> tuple[Tensor | None, int]:
    return (None, 0) if rows is None else (rows.index.contiguous(), rows.num_learning)
