"""Stochastic depth as functions: timm's `drop_path`, and the same with its residual add."""

from __future__ import annotations

import torch
from torch import Tensor

from .._utils.checks import check_batch, check_bool, check_probability, check_residual_add, is_transformed
from .._utils.device import to_device
from ..kernels.autograd import fused_add, unchecked_add
from ..kernels.recorded import drop_rows, is_recorded
from ..kernels.spec import Add, Operands
from ..plan import kept_scale


def drop_path(x: Tensor, drop_prob: float = 0.0, training: bool = False, scale_by_keep: bool = True) -> Tensor:
    """Sets random samples of `x` to zero in training, like timm's function of the same name.

    This is stochastic depth (Huang et al., arXiv 1603.09382) with probability `drop_prob`. Unlike timm's function, it
    never reads a dropped row, so that NaN or Inf there becomes 0. The mask comes from torch's global CPU generator on
    every device. A traced or scripted function draws it on the device of `x`.

    Args:
        x: the branch's output, `[B, ...]`, any floating dtype.
        drop_prob: P(drop), in [0, 1].
        training: whether to drop. If False, `x` is returned.
        scale_by_keep: whether kept samples are scaled by 1 / (1 − drop_prob).

    Returns:
        A tensor like `x`; `x` itself if not training, and if `drop_prob` is 0.

    Raises:
        TypeError: if an argument has the wrong type or dtype. The error names the argument.
        ValueError: if `drop_prob` isn't in [0, 1], or `x` has no dimensions.
        RuntimeError: if the backend that `use_backend` asks for can't serve the call.

    Example:
        >>> rdp.drop_path(torch.ones(4, 1), drop_prob=0.5, training=True).flatten()
        tensor([0., 2., 0., 0.])
    """
    if torch.jit.is_scripting():  # TorchScript compiles neither the checks nor the kernels
        return drop_rows(x, drop_prob, kept_scale(drop_prob, scale_by_keep)) if training and drop_prob > 0 else x
    else:  # noqa: RET505 (code after a return would be compiled as well)
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
    """Adds a branch's update to the residual, except for samples that are dropped at random.

    It equals `residual + drop_path(γ · branch)`, in one op. Arithmetic runs in float32, or in float64 where an argument
    is float64. The branch of a dropped row is never read. The mask comes from torch's global CPU generator on every
    device.

    Args:
        residual: the residual, `[B, ...]`, any floating dtype.
        branch: the update, of the residual's shape, any floating dtype.
        drop_prob: P(drop), in [0, 1].
        training: whether to drop. If False, every row of the branch is added, unscaled.
        gamma: the LayerScale vector, `[C]` along the last dimension, any floating dtype. None means 1.
        scale_by_keep: whether kept rows are scaled by 1 / (1 − drop_prob).

    Returns:
        The sum, `[B, ...]`, in the residual's dtype.

    Raises:
        TypeError: if an argument has the wrong type or dtype. The error names the argument.
        ValueError: if an argument has the wrong shape, device or values. The error names the argument.
        RuntimeError: if the backend that `use_backend` asks for can't serve the call.

    Example:
        >>> residual, branch = torch.full((4, 1), 10.0), torch.ones(4, 1)
        >>> rdp.drop_path_add(residual, branch, drop_prob=0.5, training=True).flatten()
        tensor([10., 12., 10., 10.])
    """
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
    """Draws a factor for each row: 0 for dropped rows, 1 or 1 / (1 − p) for kept ones.

    It is `[B]` on the device of `x`, float32, or float64 for a float64 `x`.
    """
    # In place, because these are small ops, for which a result costs most. The masks of `bernoulli`, a single op, would
    # depend on the processor, and its graphs on the probability.
    keep = torch.rand(x.shape[0], dtype=torch.float32, device="cpu")
    keep = (keep >= drop_prob).float() if is_transformed() else keep.ge_(drop_prob)  # vmap has no rule for ge_
    if x.dtype == torch.float64:
        keep = keep.double()
    return to_device(keep.mul_(kept_scale(drop_prob, scale_by_keep)), x.device)
