"""Every op in a few lines of plain torch: the specification that kernels are tested against, and the eager backend.

Arguments are taken as checked. Arithmetic runs in float32 (float64 where an argument is float64) and is cast once, at
the end, to the residual's dtype. Double backward works.
"""

from __future__ import annotations

import torch
from torch import Tensor


def residual_add(
    residual: Tensor,
    branch: Tensor,
    *,
    rows: Tensor | None = None,
    row_scale: Tensor | float | None = None,
    gamma: Tensor | None = None,
    channel_dim: int = -1,
    activation: str | None = None,
    gamma_rows: int | None = None,
) -> Tensor:
    """`act(residual + row_scale · γ · branch)`, the sum over `rows` only where these are given.

    `gamma_rows`: how many leading rows of `branch` count in dγ (None: all). A row whose scale is 0 is never read.
    """
    dtype = compute_dtype(residual, branch, gamma)
    stream, update = residual.to(dtype), branch.to(dtype)
    scale = 1.0 if row_scale is None else row_scale
    if isinstance(scale, Tensor) or scale == 0:
        update, scale = drop_path(update, torch.as_tensor(scale, device=update.device).expand(len(update))), 1.0
    if gamma is not None:
        factor = gamma.to(dtype).view([-1 if d == channel_dim % branch.dim() else 1 for d in range(branch.dim())])
        if rows is None and gamma_rows is None:
            return _activate(torch.addcmul(stream, update, factor, value=scale), activation).to(residual.dtype)
        learning = len(update) if gamma_rows is None else gamma_rows
        update = torch.cat([update[:learning] * factor, update[learning:] * factor.detach()])
    out = torch.add(stream, update, alpha=scale) if rows is None else _AddRows.apply(stream, rows, update, scale)
    return _activate(out, activation).to(residual.dtype)


class _AddRows(torch.autograd.Function):
    """`stream.index_add(0, rows, update, alpha=scale)`, saving `rows` alone.

    Torch's own index_add keeps `update` alive until the backward, for its shape. Double backward works.
    """

    @staticmethod
    def forward(ctx, stream, rows, update, scale):
        ctx.save_for_backward(rows)
        ctx.scale = scale
        return stream.index_add(0, rows, update, alpha=scale)

    @staticmethod
    def backward(ctx, dout):
        (rows,) = ctx.saved_tensors
        dupdate = dout.index_select(0, rows) * ctx.scale if ctx.needs_input_grad[2] else None
        return dout, None, dupdate, None


def _activate(x: Tensor, activation: str | None) -> Tensor:
    return x.relu() if activation == "relu" else x


def gather_rows(residual: Tensor, rows: Tensor) -> Tensor:
    """`residual[rows]`."""
    return residual.index_select(0, rows)


def drop_path(x: Tensor, row_scale: Tensor) -> Tensor:
    """`row_scale[b] · x[b]`; a row whose scale is 0 is never read."""
    row_scale = row_scale.to(compute_dtype(x)).view(-1, *[1] * (x.dim() - 1))
    return (torch.where(row_scale != 0, x, 0.0) * row_scale).to(x.dtype)


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    """float64 if an argument is, else float32."""
    return torch.float64 if any(t is not None and t.dtype == torch.float64 for t in tensors) else torch.float32
