"""What a call allocates: its results, and the gradients of its operands. Plain torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .layout import Layout, Tiling
from .spec import NORMS, Add, NextInput, Operands, Results, RowSet, compute_dtype


@dataclass(frozen=True)
class Context:
    """What a backward needs to know of its forward beside tensors."""

    shape: torch.Size
    """Of the stream."""
    device: torch.device
    layout: Layout
    compute: torch.dtype
    dtypes: Operands
    """Of the operands."""

    def empty(self, num_rows: int, dtype: torch.dtype | None) -> Tensor:
        """`[num_rows, ...]` like the stream."""
        return self.layout.empty([num_rows, *self.shape[1:]], dtype or torch.float32, self.device)

    def tiling(self, add: Add | None, next_input: NextInput | None, has_gamma: bool) -> Tiling:
        """Of the stream: a norm's tiles span the channels, others run along γ where there is one."""
        if next_input is not None and next_input.norm is not None:
            return self.layout.tiling(self.shape, -1)
        return self.layout.tiling(self.shape, add.channel_dim if add is not None and has_gamma else None)


def context_of(operands: Operands, norm: str | None, batch_size: int | None) -> Context:
    """A norm wants the channels, the last dimension, innermost."""
    stream = operands.update if operands.residual is None else operands.residual
    stream = operands.frozen_update if stream is None else stream
    assert stream is not None
    layout = Layout.of(stream)
    if norm is not None and layout.order[-1] != stream.dim() - 1:
        layout = Layout(tuple(range(stream.dim())))
    return Context(
        shape=torch.Size([batch_size or stream.shape[0], *stream.shape[1:]]),
        device=stream.device,
        layout=layout,
        compute=compute_dtype(*operands),
        dtypes=Operands(*(None if t is None else t.dtype for t in operands))._replace(residual=stream.dtype),
    )


def empty_results(
    context: Context, add: Add | None, next_input: NextInput | None, num_saved: int, out: Any = None
) -> Results:
    """Of a forward; `out` is allocated where a branch is added, unless it is given. `norm_input` is allocated for some
    rows; that of all rows is the stream, and None here."""
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
    """Of the operands that are wanted, except the residual's."""
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
    return (context.shape[0], 0) if rows is None else (rows.num_learning, rows.index.shape[0] - rows.num_learning)
