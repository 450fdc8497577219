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
    """Adds a branch's update to the residual, with a factor for each row and for each channel.

    Returns `act(residual + row_scale[b] · γ[c] · branch)` and changes no argument. Arithmetic runs in float32, or in
    float64 where an argument is float64. The values of `rows` are checked only where they are on the CPU. The result is
    differentiable with respect to `residual`, `branch` and `gamma`; second derivatives need `use_backend("eager")`.

    Args:
        residual: the residual, `[B, ...]`, any floating dtype.
        branch: the update, of the residual's shape, or `[K, ...]` where `rows` is given; any floating dtype.
        rows: int64 `[K]`, unique, in [0, B), on the residual's device: the rows of the residual that `branch` is added
            to. None means all.
        row_scale: float32 `[B]` (`[K]` with `rows`; float64 is allowed where the residual is float64), or a finite
            number. A row whose scale is 0 is dropped: its branch is never read, so that NaN or Inf there reaches
            neither the result nor a gradient. It must not require grad. None means 1.
        gamma: the LayerScale vector, `[C]` along `channel_dim`, any floating dtype (Touvron et al., arXiv 2103.17239).
            None means 1.
        channel_dim: the dimension of the channels: −1 for `[..., C]`, 1 for NCHW.
        activation: None or `"relu"`, applied to every row after the sum.

    Returns:
        The sum, `[B, ...]`, in the residual's dtype.

    Raises:
        TypeError: if an argument has the wrong type or dtype. The error names the argument.
        ValueError: if an argument has the wrong shape, device or values. The error names the argument.
        RuntimeError: if the backend that `use_backend` asks for can't serve the call.

    Example:
        >>> residual, branch = torch.zeros(4, 2), torch.ones(2, 2)
        >>> rdp.residual_add(residual, branch, rows=torch.tensor([1, 3]), row_scale=2.0)
        tensor([[0., 0.],
                [2., 2.],
                [0., 0.],
                [2., 2.]])
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
    """Makes an `Add` from checked arguments. Under `torch.compile` a number becomes data: see `scale_of_rows`."""
    if row_scale is not None and torch.compiler.is_compiling():
        row_scale = scale_of_rows(operands, row_scale)
    row_set = None if rows is None else RowSet(rows, rows.shape[0])
    if isinstance(row_scale, Tensor):
        return Add(row_set, 1.0, row_scale, channel_dim, activation)
    return Add(row_set, 1.0 if row_scale is None else float(row_scale), None, channel_dim, activation)
