"""The launchers: which kernel serves a tail, and with which arguments."""

from __future__ import annotations

import math
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from ..buffers import Context, context_of, empty_gradients, empty_results, part_sizes
from ..layout import Tiling
from ..spec import Add, NextInput, Operands, Results, RowSet
from .launch import Tiles
from .reduce import _sum_partials_kernel
from .residual_add import _residual_add_bwd_kernel, _residual_add_fwd_kernel
from .residual_add_norm import _residual_add_norm_bwd_kernel, _residual_add_norm_fwd_kernel
from .residual_add_norm_wide import _residual_add_norm_bwd_wide_kernel
from .rows import _gather_rows_kernel, _invert_rows_kernel

READS_INVERSES = True
WIDEST_SUM_IN_REGISTERS = 4096
"""A program of the norm's backward keeps up to three rows of sums."""


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
        num_saved: of the next branch's rows, how many leading ones keep what the norm's backward needs. Without a
            list of rows `norm_input` is no copy: it is `out`, or the residual where nothing is added.
        in_place: the sum overwrites `operands.residual`, which must be dense; without activation.
        batch_size: of the result, where there is no residual to tell.
    """
    context = context_of(operands, None if next_input is None else next_input.norm, batch_size)
    residual, branch, frozen = (None if t is None else context.layout.conform(t) for t in operands[:3])
    gamma, weight, bias = map(_contiguous, operands[3:])
    if add is not None and add.scale == 0:
        branch = frozen = gamma = None
    results = empty_results(context, add, next_input, num_saved, out=residual if in_place else None)
    if add is None and next_input is not None and next_input.norm is None:
        _gather(context, residual, results, next_input)
        return results, context
    arguments: dict[str, Any] = dict(
        out_ptr=results.out,
        next_ptr=results.next,
        frozen_next_ptr=results.frozen_next,
        residual_ptr=residual,
        update_ptr=branch,
        frozen_update_ptr=frozen,
        gamma_ptr=gamma,
        out_row_stride=_row_stride(results.out),
        residual_row_stride=_row_stride(residual),
        update_row_stride=_row_stride(branch),
        frozen_update_row_stride=_row_stride(frozen),
        IN_PLACE=in_place,
        **_update_rows(context, add, branch, frozen),
        **_next_rows(context, next_input, results.frozen_next),
    )
    tiling = context.tiling(add, next_input, gamma is not None)
    if next_input is None or next_input.norm is None:
        tiles = _tiles("residual_add_fwd", context, tiling)
        kernel, more = _residual_add_fwd_kernel, _gamma_arguments(tiling)
        more |= {"RELU": add is not None and add.activation == "relu"}
    else:
        tiles = _tiles("residual_add_norm_fwd", context, tiling, whole_rows=True)
        kernel = _residual_add_norm_fwd_kernel
        more = dict(
            norm_input_ptr=results.norm_input,
            mean_ptr=results.mean,
            rstd_ptr=results.rstd,
            weight_ptr=weight,
            bias_ptr=bias,
            num_saved=num_saved,
            LAYER_NORM=next_input.norm == "layer",
            EPS=next_input.eps,
        )
    tiles.run(kernel, context.device, **arguments, **more, **_sizes(context, tiling))
    if results.rstd is not None and results.norm_input is None:
        results = results._replace(norm_input=residual if add is None else results.out)
    return results, context


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
        operands: `branch` where dγ is wanted, `gamma` and `weight` where a gradient passes through them; else None.
        results: `out` where there is an activation, `norm_input`, `mean` and `rstd` where there is a norm.
        gradients: of the results; None for zero.
        in_place: the residual's gradient may overwrite that of `out`, which must be dense.
    """
    dout, dnext, dfrozen_next = (None if t is None else context.layout.conform(t) for t in gradients[:3])
    if dout is None and dnext is None and dfrozen_next is None:
        return Operands()
    if dnext is None and dfrozen_next is None:
        next_input = None
        wanted = wanted._replace(weight=False, bias=False)
    dnext, dfrozen_next = (None if t is None or t.shape[0] == 0 else t for t in (dnext, dfrozen_next))
    if dnext is None and dfrozen_next is None:
        next_input = None
    relu = add is not None and add.activation == "relu"
    in_place = in_place and dout is not None and dout is gradients.out and not relu
    grads = empty_gradients(context, add, wanted)
    if next_input is None:  # and there are weights: of a norm of no rows
        grads = grads._replace(weight=_zeroed(grads.weight), bias=_zeroed(grads.bias))
    if add is None and (next_input is None or next_input.norm is None):
        if next_input is None:
            return grads._replace(residual=dout)
        scattered, _ = fused_add_fwd(
            Operands(dout, dnext, dfrozen_next),
            Add(next_input.rows),
            None,
            in_place=in_place,
            batch_size=context.shape[0],
        )
        return Operands(scattered.out)

    stream_changes = relu or next_input is not None
    if wanted.residual:
        fresh = stream_changes and not in_place
        grads = grads._replace(residual=context.empty(context.shape[0], context.dtypes.residual) if fresh else dout)
    if add is not None and add.scale == 0:
        grads = Operands(grads.residual, *map(_zeroed, grads[1:]))
        add = Add(activation=add.activation)
        branch = dbranch = dfrozen = gamma = None
    else:
        branch = context.layout.conform(operands.update) if wanted.gamma else None
        dbranch, dfrozen, gamma = grads.update, grads.frozen_update, _contiguous(operands.gamma)
    if branch is None and dbranch is None and dfrozen is None:
        if not stream_changes:
            return grads
        if not wanted.residual:
            dout = dfrozen_next = None  # what is left are sums over the learning next rows
    arguments: dict[str, Any] = dict(
        dresidual_ptr=grads.residual if stream_changes else None,
        dupdate_ptr=dbranch,
        dfrozen_update_ptr=dfrozen,
        dout_ptr=dout,
        dnext_ptr=dnext,
        dfrozen_next_ptr=dfrozen_next,
        update_ptr=branch,
        gamma_ptr=gamma,
        dout_row_stride=_row_stride(dout),
        dnext_row_stride=_row_stride(dnext),
        dfrozen_next_row_stride=_row_stride(dfrozen_next),
        update_row_stride=_row_stride(branch),
        IN_PLACE=in_place,
        **_update_rows(context, add, branch if dbranch is None else dbranch, dfrozen),
        **_next_rows(context, next_input, dfrozen_next),
    )
    tiling = context.tiling(add, next_input, branch is not None or gamma is not None)
    if next_input is None or next_input.norm is None:
        tiles = _tiles("residual_add_bwd", context, tiling, sums=branch is not None)
        num_partials = tiles.row_blocks
        if tiling.gamma_per == "position":
            num_partials = tiles.num_rows // max(tiling.channels, 1) * tiles.column_blocks
        sums = {"gamma": _partials(context, num_partials, _channels(tiling), branch is not None)}
        kernel, more = _residual_add_bwd_kernel, _gamma_arguments(tiling)
        more |= dict(out_ptr=results.out, out_row_stride=_row_stride(results.out), RELU=relu)
    else:
        wide = tiling.width > WIDEST_SUM_IN_REGISTERS
        op = "residual_add_norm_bwd_wide" if wide else "residual_add_norm_bwd"
        tiles = _tiles(op, context, tiling, whole_rows=True, sums=True)
        sums = {
            name: _partials(context, tiles.row_blocks, tiling.width, is_wanted)
            for name, is_wanted in (("gamma", branch is not None), ("weight", wanted.weight), ("bias", wanted.bias))
        }
        kernel = _residual_add_norm_bwd_wide_kernel if wide else _residual_add_norm_bwd_kernel
        arguments.pop("num_next_rows")
        norm_input = context.layout.conform(results.norm_input)
        more = dict(
            dweight_ptr=sums["weight"],
            dbias_ptr=sums["bias"],
            norm_input_ptr=norm_input,
            mean_ptr=results.mean if next_input.norm == "layer" else None,
            rstd_ptr=results.rstd,
            weight_ptr=_contiguous(operands.weight),
            norm_input_row_stride=_row_stride(norm_input),
            num_saved=norm_input.shape[0] if dfrozen_next is not None else arguments["num_next_learning"],
            LAYER_NORM=next_input.norm == "layer",
        )
    more |= dict(dgamma_ptr=sums["gamma"], tiles=tiles.tiles)
    tiles.run(kernel, context.device, **arguments, **more, **_sizes(context, tiling))
    for name, partials in sums.items():
        if partials is not None:
            _sum(context, partials, getattr(grads, name))
    return grads


def _gather(context: Context, x: Tensor | None, results: Results, next_input: NextInput) -> None:
    assert next_input.rows is not None
    rows, width = next_input.rows, math.prod(context.shape[1:])
    Tiles.of("gather_rows", context.device, rows.num_rows, width).run(
        _gather_rows_kernel,
        context.device,
        out_ptr=results.next,
        frozen_out_ptr=results.frozen_next,
        x_ptr=x,
        index_ptr=rows.index.contiguous(),
        num_rows=rows.num_rows,
        num_learning=rows.num_learning,
        width=width,
        x_row_stride=_row_stride(x),
    )


def _partials(context: Context, num_rows: int, width: int, wanted: bool) -> Tensor | None:
    return torch.empty(num_rows, width, dtype=context.compute, device=context.device) if wanted else None


def _sum(context: Context, partials: Tensor, out: Tensor) -> None:
    num_rows, width = partials.shape
    tiles = Tiles.of("sum_partials", context.device, 1, width)
    block_m = tiles.config.tile // tiles.block_n
    tiles.run(
        _sum_partials_kernel,
        context.device,
        out_ptr=out,
        partials_ptr=partials,
        num_rows=num_rows,
        width=width,
        BLOCK_R=block_m,
    )


def _inverse(context: Context, rows: RowSet | None) -> Tensor | None:
    """int64 [B]: where each row of the batch stands among `rows`."""
    if rows is None or rows.inverse is not None:
        return None if rows is None else _contiguous(rows.inverse)
    batch_size = context.shape[0]
    inverse = torch.empty(batch_size, dtype=torch.int64, device=context.device)
    Tiles.of("invert_rows", context.device, 1, batch_size, whole_rows=True).run(
        _invert_rows_kernel,
        context.device,
        inverse_ptr=inverse,
        index_ptr=rows.index.contiguous(),
        batch_size=batch_size,
        num_rows=rows.num_rows,
    )
    return inverse


def _update_rows(context: Context, add: Add | None, branch: Tensor | None, frozen: Tensor | None) -> dict[str, Any]:
    """Which samples have a branch, and its scale. Float numbers reach a kernel in 32 bits: float64 gets a tensor."""
    if add is None or (branch is None and frozen is None):
        return dict(inverse_ptr=None, num_rows=0, num_learning=0, row_scale_ptr=None, scale=1.0)
    num_learning, num_frozen = part_sizes(context, add.rows)
    row_scale = add.row_scale
    if row_scale is None and context.compute == torch.float64 and add.scale != 1:
        row_scale = torch.full((num_learning + num_frozen,), add.scale, dtype=torch.float64, device=context.device)
    return dict(
        inverse_ptr=_inverse(context, add.rows),
        num_rows=num_learning + (0 if frozen is None else num_frozen),
        num_learning=num_learning,
        row_scale_ptr=_contiguous(row_scale),
        scale=float(add.scale),
    )


def _next_rows(context: Context, next_input: NextInput | None, frozen: Tensor | None) -> dict[str, Any]:
    if next_input is None:
        return dict(next_inverse_ptr=None, num_next_rows=0, num_next_learning=0)
    num_learning, num_frozen = part_sizes(context, next_input.rows)
    return dict(
        next_inverse_ptr=_inverse(context, next_input.rows),
        num_next_rows=num_learning + (0 if frozen is None else num_frozen),
        num_next_learning=num_learning,
    )


def _tiles(op: str, context: Context, tiling: Tiling, **how: bool) -> Tiles:
    return Tiles.of(op, context.device, context.shape[0] * tiling.positions, tiling.width, **how)


def _sizes(context: Context, tiling: Tiling) -> dict[str, Any]:
    return dict(
        num_positions=context.shape[0] * tiling.positions,
        positions=tiling.positions,
        width=tiling.width,
        sample_size=tiling.positions * tiling.width,
        COMPUTE=tl.float64 if context.compute == torch.float64 else tl.float32,
    )


def _gamma_arguments(tiling: Tiling) -> dict[str, Any]:
    return {"channels": tiling.channels, "GAMMA_PER_POSITION": tiling.gamma_per == "position"}


def _channels(tiling: Tiling) -> int:
    return tiling.channels if tiling.gamma_per == "position" else tiling.width


def _contiguous(vector: Tensor | None) -> Tensor | None:
    """Kernels take vectors without strides."""
    return None if vector is None else vector.contiguous()


def _zeroed(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.zero_()


def _row_stride(x: Tensor | None) -> int:
    return 0 if x is None else x.stride(0)
