"""The rows that a branch runs on."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _backend
from .._checks import check_rows, check_stream


def gather_rows(residual: Tensor, rows: Tensor) -> Tensor:
    """`residual[rows]`: `[K, ...]` from `[B, ...]`.

    Args:
        residual: `[B, ...]`, any floating dtype.
        rows: int64 `[K]`, unique, in [0, B), on the residual's device.

    Raises `ValueError` or `TypeError` naming the argument; values of `rows` are checked where they are on the CPU.
    """
    check_stream("residual", residual)
    check_rows("rows", rows, residual.shape[0], residual.device)
    return _backend.implementation().gather_rows(residual, rows)


def fork_rows(x: Tensor, *parts: Tensor) -> tuple[Tensor, ...]:
    """`(x, x[parts[0]], x[parts[1]], ...)`: the stream, and the rows that branches run on. `parts` are disjoint.

    As one autograd function the backward copies the stream's gradient once and adds the rows' gradients into it;
    separate gathers would each write a zero-filled `[B, ...]` for autograd to add.
    """
    return _ForkRows.apply(x, *parts)


class _ForkRows(torch.autograd.Function):
    """Saves the row indices only. The backward is made of differentiable ops, so double backward works."""

    @staticmethod
    def forward(ctx, x, *parts):
        ctx.save_for_backward(*parts)
        ctx.set_materialize_grads(False)
        ctx.like = x.shape
        return x, *(x.index_select(0, rows) for rows in parts)

    @staticmethod
    def backward(ctx, dstream, *dparts):
        pairs = [(rows, dpart) for rows, dpart in zip(ctx.saved_tensors, dparts, strict=True) if dpart is not None]
        dx, owned = dstream, False
        for rows, dpart in pairs:
            if dx is None:
                dx, owned = dpart.new_zeros(ctx.like), True
            dx = dx.index_add_(0, rows, dpart) if owned else dx.index_add(0, rows, dpart)
            owned = True
        return dx, *(None for _ in dparts)
