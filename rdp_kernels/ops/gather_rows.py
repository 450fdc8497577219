"""The rows that a branch runs on."""

from __future__ import annotations

from torch import Tensor

from .._utils.checks import check_batch, check_rows
from ..kernels.autograd import fused_add, unchecked_gather
from ..kernels.spec import NextInput, Operands, RowSet


def gather_rows(residual: Tensor, rows: Tensor) -> Tensor:
    """`residual[rows]`: `[K, ...]` from `[B, ...]`.

    Args:
        residual: `[B, ...]`, any floating dtype.
        rows: int64 `[K]`, unique, in [0, B), on the residual's device.

    Raises `ValueError` or `TypeError` naming the argument; values of `rows` are checked where they are on the CPU.
    """
    out = unchecked_gather(residual, rows)
    if out is not None:
        return out
    check_batch("residual", residual)
    check_rows("rows", rows, residual.shape[0], residual.device)
    next_input = NextInput(RowSet(rows, rows.shape[0]))
    gathered: Tensor = fused_add("gather_rows", Operands(residual), next_input=next_input).next
    return gathered
