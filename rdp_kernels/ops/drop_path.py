"""Stochastic depth as functions: timm's `drop_path`, and the same with its residual add."""

from __future__ import annotations

import torch
from torch import Tensor

from .._utils.checks import check_batch, check_bool, check_probability, check_residual_add
from .._utils.device import to_device
from ..kernels.autograd import fused_add, unchecked_add
from ..kernels.recorded import drop_rows, is_recorded
from ..kernels.spec import Add, Operands, compute_dtype
from ..plan import kept_scale


def drop_path(x: Tensor, drop_prob: float = 0.0, training: bool = False, scale_by_keep: bool = True) -> Tensor:
    """Drops each sample of `x` with probability `drop_prob` in training; timm's function, same meaning.

    Args:
        x: `[B, ...]`, any floating dtype. Returned as it is when not training, and where `drop_prob` is 0.
        drop_prob: P(drop), in [0, 1].
        scale_by_keep: kept samples are scaled by 1 / (1 − drop_prob).

    Unlike timm's, a dropped row is never read: NaN or Inf there becomes 0. The mask comes from torch's global CPU
    generator on every device. Raises `ValueError` or `TypeError` naming the argument.
    """
    if torch.jit.is_scripting():  # its compiler takes neither the checks nor the kernels
        return drop_rows(x, drop_prob, kept_scale(drop_prob, scale_by_keep)) if training and drop_prob > 0 else x
    else:  # noqa: RET505 (what follows a return would be compiled)
        return _drop_path(x, drop_prob, training, scale_by_keep)


def _drop_path(x: Tensor, drop_prob: float, training: bool, scale_by_keep: bool) -> Tensor:
    recorded = not torch.compiler.is_compiling() and is_recorded(x)
    if not recorded:
        check_batch("x", x)
    drop_prob = check_probability("drop_prob", drop_prob)
    check_bool("scale_by_keep", scale_by_keep)
    if not training or drop_prob == 0:
        return x
    if recorded:
        return drop_rows(x, drop_prob, kept_scale(drop_prob, scale_by_keep))
    row_scale = draw_row_scale(x, drop_prob, scale_by_keep)
    dropped: Tensor = fused_add("drop_path", Operands(update=x), Add(row_scale=row_scale)).out
    return dropped


def drop_path_add(
    residual: Tensor,
    branch: Tensor,
    drop_prob: float = 0.0,
    training: bool = False,
    *,
    gamma: Tensor | None = None,
    scale_by_keep: bool = True,
) -> Tensor:
    """`residual + drop_path(γ · branch)` in one op; arguments as in `drop_path` and `residual_add`."""
    drop_prob = check_probability("drop_prob", drop_prob)
    check_bool("scale_by_keep", scale_by_keep)
    check_residual_add(residual, branch, None, None, gamma)
    dropping = training and drop_prob > 0
    row_scale = draw_row_scale(residual, drop_prob, scale_by_keep) if dropping else None
    out = unchecked_add(residual, branch, gamma, row_scale)
    if out is not None:
        return out
    operands = Operands(residual, branch, gamma=gamma)
    added: Tensor = fused_add("drop_path_add", operands, Add(row_scale=row_scale)).out
    return added


def draw_row_scale(x: Tensor, drop_prob: float, scale_by_keep: bool) -> Tensor:
    """`[B]` on x's device: 0 for dropped rows, 1 or 1 / (1 − p) for kept ones (float32; float64 for a float64 x)."""
    keep = torch.rand(x.shape[0]) >= drop_prob
    return to_device(keep.to(compute_dtype(x)) * kept_scale(drop_prob, scale_by_keep), x.device)
