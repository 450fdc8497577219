"""The masked residual add."""

from __future__ import annotations

import torch
from torch import Tensor

from .._utils.checks import check_batch, check_choice, check_residual_add, check_rows
from ..kernels.autograd import fused_add, scale_of_rows, unchecked_add
from ..kernels.spec import ACTIVATIONS, ActivationName, Add, Operands, RowSet


def residual_add(
    residual: Tensor,
    branch: Tensor,
    *,
    rows: Tensor | None = None,
    row_scale: Tensor | float | None = None,
    gamma: Tensor | None = None,
    channel_dim: int = -1,
    activation: ActivationName | None = None,
) -> Tensor:
    """`act(residual + row_scale[b] · γ[c] · branch)`, out of place.

    Args:
        residual: `[B, ...]`; the result has its dtype.
        branch: the residual's shape, or `[K, ...]` when `rows` is given; any floating dtype.
        rows: int64 `[K]`, unique, in [0, B): the rows of the residual that `branch` is added to.
        row_scale: float32 `[B]` (`[K]` with rows) or a finite number. A row whose scale is 0 is dropped: its branch is
            never read, so that NaN or Inf there reaches neither the result nor a gradient. Not differentiated.
        gamma: LayerScale vector `[C]` along `channel_dim` (Touvron et al., arXiv 2103.17239).
        channel_dim: −1 for `[..., C]`, 1 for NCHW.
        activation: None or `"relu"`, applied to every row after the sum.

    Arithmetic runs in float32 (float64 where an argument is float64). Raises `ValueError` or `TypeError` naming the
    argument; values of `rows` are checked where they are on the CPU.
    """
    out = unchecked_add(residual, branch, gamma, row_scale, rows, channel_dim, activation)
    if out is not None:
        return out
    if rows is not None:
        check_batch("residual", residual)
        check_rows("rows", rows, residual.shape[0], residual.device)
    check_choice("activation", activation, (None, *ACTIVATIONS))
    check_residual_add(residual, branch, rows, row_scale, gamma, channel_dim)
    operands = Operands(residual, branch, gamma=gamma)
    added: Tensor = fused_add("residual_add", operands, add_of(operands, rows, row_scale, channel_dim, activation)).out
    return added


def add_of(
    operands: Operands,
    rows: Tensor | None,
    row_scale: Tensor | float | None,
    channel_dim: int = -1,
    activation: str | None = None,
) -> Add:
    """The checked options of `residual_add`. Under `torch.compile` a number becomes data: see `scale_of_rows`."""
    if row_scale is not None and torch.compiler.is_compiling():
        row_scale = scale_of_rows(operands, row_scale)
    row_set = None if rows is None else RowSet(rows, rows.shape[0])
    if isinstance(row_scale, Tensor):
        return Add(row_set, 1.0, row_scale, channel_dim, activation)
    return Add(row_set, 1.0 if row_scale is None else float(row_scale), None, channel_dim, activation)
