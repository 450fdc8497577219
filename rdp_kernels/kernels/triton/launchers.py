"""The launchers: they choose the kernel for a call, and its arguments."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from ..buffers import Context, context_of, empty_gradients, empty_results, part_sizes
from ..layout import Tiling
from ..spec import NORMS, Add, NextInput, Operands, Results, RowSet
from .launch import Tiles
from .reduce import empty_partials, sum_partials
from .residual_add import _residual_add_bwd_kernel, _residual_add_fwd_kernel
from .residual_add_norm import _residual_add_norm_bwd_kernel, _residual_add_norm_fwd_kernel
from .residual_add_norm_wide import _residual_add_norm_bwd_wide_kernel
from .rows import _gather_rows_kernel, _invert_rows_kernel

READS_INVERSES = True
"""The kernels read `RowSet.inverse`."""
WIDEST_SUM_IN_REGISTERS = 4096
"""A program of the norm's backward keeps up to three rows of sums: at this width 24 of a thread's 128 registers, beside
the tile that it works on."""


def fused_add_fwd(
    operands: Operands,
    add: Add | None,
    next_input: NextInput | None,
    num_saved: int = 0,
    in_place: bool = False,
    batch_size: int | None = None,
) -> tuple[Results, Context]:
    """Adds an update to the residual, gathers the next branch's rows, or both.

    Args:
        operands: the tensors that the call computes with.
        add: how the update is added; None if nothing is added.
        next_input: what the next branch gets; None if there is none.
        num_saved: how many leading rows of the next branch keep what the norm's backward needs. Without a list of rows
            `norm_input` is no copy: it is `out`, or the residual where nothing is added.
        in_place: the sum overwrites `operands.residual`, which must be dense; not possible with an activation.
        batch_size: the result's, needed where there is no residual.

    Returns:
        The results, and the context that the backward needs.
    """
    norm = None if next_input is None else next_input.norm
    context = context_of(operands, norm, batch_size)
    residual, update, frozen_update = (_conformed(context, t) for t in operands[:3])
    gamma, weight, bias = map(_contiguous, operands[3:])
    if add is not None and add.scale == 0:
        update = frozen_update = gamma = None
    operands = Operands(residual, update, frozen_update, gamma, weight, bias)
    results = empty_results(context, add, next_input, num_saved, out=residual if in_place else None)
    if add is None and next_input is not None and norm is None:
        _gather(context, residual, results, next_input)
        return results, context

    tiling = context.tiling(add, next_input, gamma is not None)
    arguments = _fwd_arguments(context, tiling, operands, results, add, next_input) | {"IN_PLACE": in_place}
    if next_input is None or norm is None:
        tiles = _tiles("residual_add_fwd", context, tiling)
        tiles.run(_residual_add_fwd_kernel, context.device, **arguments, **_add_arguments(tiling, add))
        return results, context
    tiles = _tiles("residual_add_norm_fwd", context, tiling, whole_rows=True)
    tiles.run(
        _residual_add_norm_fwd_kernel,
        context.device,
        **arguments,
        norm_input_ptr=results.norm_input,
        mean_ptr=results.mean,
        rstd_ptr=results.rstd,
        weight_ptr=weight,
        bias_ptr=bias,
        num_saved=num_saved,
        CENTERS=NORMS[norm].centers,
        EPS=next_input.eps,
    )
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
    """Computes the gradients of the operands.

    Args:
        context: the forward's.
        operands: `update` where dγ is wanted, `gamma` and `weight` where a gradient passes through them; else None.
        results: `out` where there is an activation, `norm_input`, `mean` and `rstd` where there is a norm.
        gradients: the gradients of the results; None stands for zero.
        add: as in the forward.
        next_input: as in the forward.
        wanted: for each operand, whether its gradient is wanted.
        in_place: the residual's gradient may overwrite the gradient of `out`, which must be dense.

    Returns:
        The wanted gradients. None stands for zero.
    """
    if all(gradient is None for gradient in gradients[:3]):
        return Operands()
    given = _given(context, gradients)
    in_place = in_place and given.out is not None and given.out is gradients.out
    if add is None and (next_input is None or next_input.norm is None):
        return Operands(residual=_scattered(context, given, next_input, in_place))
    if gradients.next is None and gradients.frozen_next is None:
        wanted = wanted._replace(weight=False, bias=False)
    call = _Backward.of(context, operands, given, add, next_input, wanted, in_place)
    grads = call.grads
    for grad, stored in zip(grads[1:], call.stored[1:], strict=True):
        if grad is not None and stored is None:
            grad.zero_()
    if all(stored is None for stored in call.stored):
        return grads
    partials = _run_add_bwd(call, results.out) if call.norm is None else _run_norm_bwd(call, results)
    for name, sums in partials.items():
        sum_partials(sums, getattr(grads, name))
    return grads


def _given(context: Context, gradients: Results) -> Results:
    """The gradients in the layout of the call. A gradient of no rows of the next branch is None."""
    dout, dnext, dfrozen_next = (_conformed(context, gradient) for gradient in gradients[:3])
    return Results(dout, *(None if t is None or t.shape[0] == 0 else t for t in (dnext, dfrozen_next)))


def _scattered(context: Context, given: Results, next_input: NextInput | None, in_place: bool) -> Tensor | None:
    """The gradient of a residual from which rows were gathered: the forward of an add."""
    if next_input is None or (given.next is None and given.frozen_next is None):
        return given.out
    add, batch_size = Add(next_input.rows), context.shape[0]
    return fused_add_fwd(Operands(*given[:3]), add, None, in_place=in_place, batch_size=batch_size)[0].out


@dataclass(frozen=True)
class _Backward:
    """A backward as the kernels see it.

    Args:
        next_input: the next branch's input; None if no gradient comes back from it.
        gradients: the gradients of the results.
        read: the operands that the kernel reads.
        grads: the gradients of the operands.
        stored: the gradients among them that the kernel stores. Of the others, the residual's is the gradient of `out`
            itself, and the rest are zero.
        in_place: the kernel writes the residual's gradient over the gradient of `out`.
    """

    context: Context
    add: Add | None
    next_input: NextInput | None
    gradients: Results
    read: Operands
    grads: Operands
    stored: Operands
    in_place: bool

    @classmethod
    def of(
        cls,
        context: Context,
        operands: Operands,
        gradients: Results,
        add: Add | None,
        next_input: NextInput | None,
        wanted: Operands,
        in_place: bool,
    ) -> _Backward:
        dout, dnext, dfrozen_next = gradients[:3]
        if dnext is None and dfrozen_next is None:
            next_input = None
        activation = None if add is None else add.activation
        in_place = in_place and activation is None
        grads = stored = empty_gradients(context, add, wanted)
        if next_input is None:
            stored = stored._replace(weight=None, bias=None)
        update, gamma = operands.update if wanted.gamma else None, operands.gamma
        if add is not None and add.scale == 0:
            stored = stored._replace(update=None, frozen_update=None, gamma=None)
            update = gamma = None
        read = Operands(None, _conformed(context, update), None, *map(_contiguous, (gamma, operands.weight)))
        if wanted.residual and activation is None and next_input is None:
            grads = grads._replace(residual=dout)
        elif wanted.residual:
            dresidual = dout if in_place else context.empty(context.shape[0], context.dtypes.residual)
            grads, stored = grads._replace(residual=dresidual), stored._replace(residual=dresidual)
        elif stored.update is None and stored.frozen_update is None and stored.gamma is None:
            dout = dfrozen_next = None  # only sums over the next branch's learning rows are wanted
        return cls(context, add, next_input, Results(dout, dnext, dfrozen_next), read, grads, stored, in_place)

    @property
    def norm(self) -> str | None:
        return None if self.next_input is None else self.next_input.norm

    @property
    def tiling(self) -> Tiling:
        has_gamma = self.read.update is not None or self.read.gamma is not None
        return self.context.tiling(self.add, self.next_input, has_gamma)

    def arguments(self, tiling: Tiling) -> dict[str, Any]:
        """The arguments that all backward kernels take."""
        (dout, dnext, dfrozen_next), read, stored = self.gradients[:3], self.read, self.stored
        update = read.update if stored.update is None else stored.update
        return dict(
            **_with_strides(dout=dout, dnext=dnext, dfrozen_next=dfrozen_next, update=read.update),
            dresidual_ptr=stored.residual,
            dupdate_ptr=stored.update,
            dfrozen_update_ptr=stored.frozen_update,
            gamma_ptr=read.gamma,
            **_update_rows(self.context, self.add, update, stored.frozen_update),
            **_next_rows(self.context, self.next_input, dfrozen_next),
            **_tile_arguments(self.context, tiling),
            IN_PLACE=self.in_place,
        )


def _run_add_bwd(call: _Backward, out: Tensor | None) -> dict[str, Tensor]:
    """Runs the backward of an add without norm. Returns partial sums by the name of the gradient."""
    tiling, partials = call.tiling, {}
    tiles = _tiles("residual_add_bwd", call.context, tiling, sums=call.stored.gamma is not None)
    if call.stored.gamma is not None:
        num_partials, width = tiles.row_blocks, tiling.width
        if tiling.gamma_per == "position":
            width = tiling.channels
            num_partials = tiles.num_rows // max(width, 1) * tiles.column_blocks
        partials["gamma"] = empty_partials(call.context, num_partials, width)
    tiles.run(
        _residual_add_bwd_kernel,
        call.context.device,
        **call.arguments(tiling),
        **_add_arguments(tiling, call.add),
        **_with_strides(out=out),
        dgamma_ptr=partials.get("gamma"),
        tiles=tiles.tiles,
    )
    return partials


def _run_norm_bwd(call: _Backward, results: Results) -> dict[str, Tensor]:
    """Runs the backward of an add with a norm. Returns partial sums by the name of the gradient."""
    tiling = call.tiling
    wide = tiling.width > WIDEST_SUM_IN_REGISTERS
    op = "residual_add_norm_bwd_wide" if wide else "residual_add_norm_bwd"
    tiles = _tiles(op, call.context, tiling, whole_rows=True, sums=True)
    partials = {
        name: empty_partials(call.context, tiles.row_blocks, tiling.width)
        for name in ("gamma", "weight", "bias")
        if getattr(call.stored, name) is not None
    }
    arguments = call.arguments(tiling)
    arguments.pop("num_next_rows")  # `num_saved` takes its place
    norm_input = call.context.layout.conform(results.norm_input)
    only_learning = call.gradients.frozen_next is None
    assert call.norm is not None
    tiles.run(
        _residual_add_norm_bwd_wide_kernel if wide else _residual_add_norm_bwd_kernel,
        call.context.device,
        **arguments,
        **_with_strides(norm_input=norm_input),
        dgamma_ptr=partials.get("gamma"),
        dweight_ptr=partials.get("weight"),
        dbias_ptr=partials.get("bias"),
        mean_ptr=results.mean if NORMS[call.norm].centers else None,
        rstd_ptr=results.rstd,
        weight_ptr=call.read.weight,
        num_saved=arguments["num_next_learning"] if only_learning else norm_input.shape[0],
        tiles=tiles.tiles,
        CENTERS=NORMS[call.norm].centers,
    )
    return partials


def _fwd_arguments(
    context: Context,
    tiling: Tiling,
    operands: Operands,
    results: Results,
    add: Add | None,
    next_input: NextInput | None,
) -> dict[str, Any]:
    """The arguments that both forward kernels take."""
    residual, update, frozen_update = operands[:3]
    return dict(
        **_with_strides(out=results.out, residual=residual, update=update, frozen_update=frozen_update),
        next_ptr=results.next,
        frozen_next_ptr=results.frozen_next,
        gamma_ptr=operands.gamma,
        **_update_rows(context, add, update, frozen_update),
        **_next_rows(context, next_input, results.frozen_next),
        **_tile_arguments(context, tiling),
    )


def _with_strides(**tensors: Tensor | None) -> dict[str, Any]:
    """The arguments `<name>_ptr` and `<name>_row_stride` of tensors."""
    pointers = {f"{name}_ptr": x for name, x in tensors.items()}
    return pointers | {f"{name}_row_stride": 0 if x is None else x.stride(0) for name, x in tensors.items()}


def _add_arguments(tiling: Tiling, add: Add | None) -> dict[str, Any]:
    """The arguments that only kernels without a norm take."""
    return dict(
        channels=tiling.channels,
        GAMMA_PER_POSITION=tiling.gamma_per == "position",
        ACTIVATION=None if add is None else add.activation,
    )


def _tile_arguments(context: Context, tiling: Tiling) -> dict[str, Any]:
    return dict(
        num_positions=context.shape[0] * tiling.positions,
        positions=tiling.positions,
        width=tiling.width,
        sample_size=tiling.positions * tiling.width,
        COMPUTE=tl.float64 if context.compute == torch.float64 else tl.float32,
    )


def _gather(context: Context, x: Tensor | None, results: Results, next_input: NextInput) -> None:
    assert next_input.rows is not None
    rows, width = next_input.rows, math.prod(context.shape[1:])
    Tiles.of("gather_rows", context.device, rows.index.shape[0], width).run(
        _gather_rows_kernel,
        context.device,
        out_ptr=results.next,
        frozen_out_ptr=results.frozen_next,
        **_with_strides(x=x),
        index_ptr=rows.index.contiguous(),
        num_rows=rows.index.shape[0],
        num_learning=rows.num_learning,
        width=width,
    )


def _inverse(context: Context, rows: RowSet | None) -> Tensor | None:
    """int64 [B]: the place of each sample's row in the list of K rows; K or more for samples without a row."""
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
        num_rows=rows.index.shape[0],
    )
    return inverse


def _update_rows(
    context: Context, add: Add | None, update: Tensor | None, frozen_update: Tensor | None
) -> dict[str, Any]:
    """The arguments about samples that have an update. Float arguments have 32 bits: a float64 scale needs a tensor."""
    if add is None or (update is None and frozen_update is None):
        return dict(inverse_ptr=None, num_rows=0, num_learning=0, row_scale_ptr=None, scale=1.0)
    num_learning, num_frozen = part_sizes(context, add.rows)
    row_scale = add.row_scale
    if row_scale is None and context.compute == torch.float64 and add.scale != 1:
        row_scale = torch.full((num_learning + num_frozen,), add.scale, dtype=torch.float64, device=context.device)
    return dict(
        inverse_ptr=_inverse(context, add.rows),
        num_rows=num_learning + (0 if frozen_update is None else num_frozen),
        num_learning=num_learning,
        row_scale_ptr=_contiguous(row_scale),
        scale=float(add.scale),
    )


def _next_rows(context: Context, next_input: NextInput | None, frozen_next: Tensor | None) -> dict[str, Any]:
    if next_input is None:
        return dict(next_inverse_ptr=None, num_next_rows=0, num_next_learning=0)
    num_learning, num_frozen = part_sizes(context, next_input.rows)
    return dict(
        next_inverse_ptr=_inverse(context, next_input.rows),
        num_next_rows=num_learning + (0 if frozen_next is None else num_frozen),
        num_next_learning=num_learning,
    )


def _tiles(op: str, context: Context, tiling: Tiling, **how: bool) -> Tiles:
    return Tiles.of(op, context.device, context.shape[0] * tiling.positions, tiling.width, **how)


def _conformed(context: Context, x: Tensor | None) -> Tensor | None:
    return None if x is None else context.layout.conform(x)


def _contiguous(vector: Tensor | None) -> Tensor | None:
    """Kernels take vectors without strides."""
    return None if vector is None else vector.contiguous()
