"""The masked residual add, followed by the norm of the next branch's rows."""

from __future__ import annotations

from torch import Tensor

from .._utils.checks import check_batch, check_choice, check_norm, check_residual_add, check_rows
from ..kernels.autograd import fused_add, unchecked_add_norm
from ..kernels.spec import NORMS, NextInput, NormName, Operands, RowSet
from .residual_add import add_of


def residual_add_norm(
    residual: Tensor,
    branch: Tensor,
    weight: Tensor | None,
    bias: Tensor | None = None,
    *,
    rows: Tensor | None = None,
    row_scale: Tensor | float | None = None,
    gamma: Tensor | None = None,
    next_rows: Tensor | None = None,
    norm: NormName = "layer",
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """Adds an update to the residual and normalises the rows that the next branch takes, in one kernel.

    Computes `out = residual + row_scale[b] · γ[c] · branch` and returns `(out, norm(out)[next_rows])`. The norm sees
    the sum as it is stored, in the residual's dtype. Arithmetic runs in float32, or in float64 where an argument is
    float64. The values of `rows` and `next_rows` are checked only where they are on the CPU. Both results are
    differentiable; second derivatives need `use_backend("eager")`. Where a backend has no norms, torch's norm follows
    its kernel.

    Args:
        residual: the residual, `[B, ..., C]`, any floating dtype.
        branch: the update, of the residual's shape, or `[K, ..., C]` where `rows` is given; any floating dtype.
        weight: the norm's weight, `[C]`, or None.
        bias: the norm's bias, `[C]`, or None. It must be None for RMSNorm, which has no bias.
        rows: int64 `[K]`, unique, in [0, B): the rows of the residual that `branch` is added to. None means all.
        row_scale: a factor for each row of `branch`, or a number, as in `residual_add`. None means 1.
        gamma: the LayerScale vector, `[C]`, along the last dimension. None means 1.
        next_rows: int64 `[K']`, unique, in [0, B): the rows that the next branch runs on. None means all.
        norm: `"layer"` (Ba et al., arXiv 1607.06450) or `"rms"` (Zhang & Sennrich, arXiv 1910.07467), over the last
            dimension.
        eps: added to the variance or to the mean square. The default is that of timm's ViTs, because torch's own
            defaults differ between its norms (1e-5 for LayerNorm, the dtype's `finfo.eps` for RMSNorm).

    Returns:
        The sum, `[B, ..., C]`, and the normed rows, `[K', ..., C]`, both in the residual's dtype.

    Raises:
        TypeError: if an argument has the wrong type or dtype. The error names the argument.
        ValueError: if an argument has the wrong shape, device or values. The error names the argument.
        RuntimeError: if the backend that `use_backend` asks for can't serve the call.

    Example:
        >>> residual, branch = torch.zeros(3, 2), torch.tensor([[3.0, 4.0]])
        >>> out, normed = rdp.residual_add_norm(
        ...     residual, branch, None, rows=torch.tensor([1]), next_rows=torch.tensor([1, 2]), norm="rms"
        ... )
        >>> out
        tensor([[0., 0.],
                [3., 4.],
                [0., 0.]])
        >>> normed  # 3 and 4 over the root of their mean square, 3.54
        tensor([[0.8485, 1.1314],
                [0.0000, 0.0000]])
    """
    operands = Operands(residual, branch, None, gamma, weight, bias)
    results = unchecked_add_norm(operands, rows, row_scale, next_rows, norm, eps)
    if results is not None:
        return results.out, results.next
    check_batch("residual", residual)
    for name, indices in (("rows", rows), ("next_rows", next_rows)):
        if indices is not None:
            check_rows(name, indices, residual.shape[0], residual.device)
    check_residual_add(residual, branch, rows, row_scale, gamma)
    check_choice("norm", norm, NORMS)
    check_norm(residual, weight, bias, eps)
    if bias is not None and not NORMS[norm].has_bias:
        raise ValueError(f"bias must be None: {NORMS[norm].module.__name__} has none")
    operands = Operands(residual, branch, gamma=gamma, weight=weight, bias=bias)
    results = fused_add(
        "residual_add_norm",
        operands,
        add_of(operands, rows, row_scale),
        NextInput(None if next_rows is None else RowSet(next_rows, next_rows.shape[0]), norm, eps),
    )
    return results.out, results.next
