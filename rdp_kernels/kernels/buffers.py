"""Allocates the results of a call and the gradients of its operands, and holds what its backward has to know."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .layout import Layout, Tiling
from .spec import NORMS, Add, NextInput, Operands, Results, RowSet, compute_dtype, residual_of


@dataclass(frozen=True, eq=False)
class Context:
    """What a backward needs to know of its forward besides tensors. Calls of one kind share one object.

    Args:
        shape: the residual's.
        compute: the dtype of the arithmetic.
        dtypes: the operands'.
        strides: those of a dense tensor of this shape.
        is_standard: whether the layout is that of a contiguous tensor.
    """

    shape: torch.Size
    device: torch.device
    layout: Layout
    compute: torch.dtype
    dtypes: Operands
    strides: tuple[int, ...]
    is_standard: bool

    def conform(self, x: Tensor | None) -> Tensor | None:
        """`x` itself where its samples are dense in this layout, else a copy."""
        if x is None or (self.is_standard and x.is_contiguous()):
            return x
        return self.layout.conform(x)

    def empty(self, num_rows: int, dtype: torch.dtype | None) -> Tensor:
        """Allocates `[num_rows, ...]` like the residual."""
        shape = (num_rows, *self.shape[1:])
        return torch.empty_strided(shape, self.strides, dtype=dtype or torch.float32, device=self.device)

    def tiling(self, add: Add | None, next_input: NextInput | None, has_gamma: bool) -> Tiling:
        """The tiling of the residual. A norm's tiles span the channels; other tiles run along γ, if there is one."""
        if next_input is not None and next_input.norm is not None:
            return self.layout.tiling(self.shape, -1)
        return self.layout.tiling(self.shape, add.channel_dim if add is not None and has_gamma else None)


def make_context(
    shape: tuple[int, ...], order: tuple[int, ...], device: torch.device, dtypes: Operands, compute: torch.dtype
) -> Context:
    """A context of its own; `known_context` gives one object for all equal arguments."""
    layout = Layout(order)
    is_standard = order == tuple(range(len(shape)))
    return Context(torch.Size(shape), device, layout, compute, dtypes, layout.strides(shape), is_standard)


known_context = functools.lru_cache(4096)(make_context)


def context_of(operands: Operands, norm: str | None) -> Context:
    """The context of a call on these tensors."""
    residual, update, frozen_update, gamma, weight, bias = operands
    like = update if residual is None else residual
    return context_from(
        like.shape,
        like.stride(),
        like.device,
        (
            like.dtype,
            update if update is None else update.dtype,
            frozen_update if frozen_update is None else frozen_update.dtype,
            gamma if gamma is None else gamma.dtype,
            weight if weight is None else weight.dtype,
            bias if bias is None else bias.dtype,
        ),
        norm is not None,
    )


def symbolic_context_of(operands: Operands, norm: str | None) -> Context:
    """The same, not kept, for tensors whose sizes may be symbols."""
    like = residual_of(operands)
    dtypes = Operands(*(None if t is None else t.dtype for t in operands))._replace(residual=like.dtype)
    layout = _layout_of(like.shape, like.stride(), norm is not None)
    return make_context(like.shape, layout.order, like.device, dtypes, compute_dtype(*operands))


@functools.lru_cache(4096)
def context_from(
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    device: torch.device,
    dtypes: tuple[torch.dtype | None, ...],
    normed: bool,
) -> Context:
    """The context of a call. `dtypes` are those of the operands, the first one the result's; shape and strides are the
    residual's, or the update's where there is no residual."""
    order = _layout_of(shape, strides, normed).order
    compute = torch.float64 if torch.float64 in dtypes else torch.float32
    return known_context(tuple(shape), order, device, Operands(*dtypes), compute)


def _layout_of(shape: Sequence[int], strides: Sequence[int], normed: bool) -> Layout:
    """A norm needs the channels, the last dimension, innermost."""
    layout = Layout.of_strides(shape, strides)
    if normed and layout.order[-1] != len(shape) - 1:
        return Layout(tuple(range(len(shape))))
    return layout


def empty_results(
    context: Context, add: Add | None, next_input: NextInput | None, num_saved: int, out: Any = None
) -> Results:
    """Allocates the results of a forward: `out` where an update is added, unless it is given; `norm_input` where some
    rows are normed. For all rows it is the sum itself, and None here."""
    dtype = context.dtypes.residual
    if add is not None and out is None:
        out = context.empty(context.shape[0], dtype)
    if next_input is None:
        return Results(out)
    num_learning, num_frozen = part_sizes(context, next_input.rows)
    results = Results(out, context.empty(num_learning, dtype), context.empty(num_frozen, dtype) if num_frozen else None)
    if next_input.norm is None or num_saved == 0:
        return results
    num_norms = num_saved * math.prod(context.shape[1:-1])
    statistic = partial(torch.empty, num_norms, dtype=context.compute, device=context.device)
    return results._replace(
        norm_input=None if next_input.rows is None else context.empty(num_saved, dtype),
        mean=statistic() if NORMS[next_input.norm].centers else None,
        rstd=statistic(),
    )


def empty_gradients(context: Context, add: Add | None, wanted: Operands) -> Operands:
    """Allocates the wanted gradients, except the residual's."""
    num_learning, num_frozen = part_sizes(context, None if add is None else add.rows)
    dtypes = context.dtypes

    def vector(dtype: Any, dim: int) -> Tensor:
        return torch.empty(context.shape[dim], dtype=dtype, device=context.device)

    return Operands(
        update=context.empty(num_learning, dtypes.update) if wanted.update else None,
        frozen_update=context.empty(num_frozen, dtypes.frozen_update) if wanted.frozen_update else None,
        gamma=vector(dtypes.gamma, -1 if add is None else add.channel_dim) if wanted.gamma else None,
        weight=vector(dtypes.weight, -1) if wanted.weight else None,
        bias=vector(dtypes.bias, -1) if wanted.bias else None,
    )


def part_sizes(context: Context, rows: RowSet | None) -> tuple[int, int]:
    """How many rows learn, and how many are frozen."""
    return (context.shape[0], 0) if rows is None else (rows.num_learning, rows.index.shape[0] - rows.num_learning)


# A call taken apart into its tensors, which autograd saves to notice changes in place and to free them, and all else.


def parted_add(add: Add) -> tuple[tuple[Tensor | None, ...], tuple[Any, ...]]:
    """The tensors of an `Add`, and all else."""
    rows, numbers = add.rows, (add.scale, add.channel_dim, add.activation)
    if rows is None:
        return (None, None, add.row_scale), (0, *numbers)
    return (rows.index, rows.inverse, add.row_scale), (rows.num_learning, *numbers)


def joined_add(tensors: Sequence[Tensor | None], numbers: Sequence[Any]) -> Add:
    """The inverse of `parted_add`."""
    (index, inverse, row_scale), (num_learning, scale, channel_dim, activation) = tensors, numbers
    rows = None if index is None else RowSet(index, num_learning, inverse)
    return Add(rows, scale, row_scale, channel_dim, activation)


def parted_next(next_input: NextInput) -> tuple[tuple[Tensor | None, ...], tuple[Any, ...]]:
    """The tensors of a `NextInput`, and all else."""
    rows, numbers = next_input.rows, (next_input.norm, next_input.eps, next_input.detached)
    if rows is None:
        return (None, None), (0, *numbers)
    return (rows.index, rows.inverse), (rows.num_learning, *numbers)


def joined_next(tensors: Sequence[Tensor | None], numbers: Sequence[Any]) -> NextInput:
    """The inverse of `parted_next`."""
    (index, inverse), (num_learning, norm, eps, detached) = tensors, numbers
    return NextInput(None if index is None else RowSet(index, num_learning, inverse), norm, eps, detached)
