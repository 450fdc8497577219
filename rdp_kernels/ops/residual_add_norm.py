"""The masked residual add with the norm of the next branch's rows."""

from __future__ import annotations

from torch import Tensor

from .._utils.checks import check_batch, check_choice, check_norm, check_residual_add, check_rows
from ..kernels.autograd import fused_add
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
    """`(out, norm(out)[next_rows])` with `out = residual + row_scale[b] · γ[c] · branch`, in one kernel.

    Args:
        residual, branch, rows, row_scale, gamma: as in `residual_add`, with channels in the last dimension.
        weight, bias: the norm's, `[C]` or None; RMSNorm has no bias.
        next_rows: int64 `[K']`, unique, in [0, B): the rows that the next branch runs on; None for all.
        norm: `"layer"` (Ba et al., arXiv 1607.06450) or `"rms"` (Zhang & Sennrich, arXiv 1910.07467), over the last
            dimension.
        eps: added to the variance or the mean square. The default is that of timm's ViTs, as torch's own defaults
            differ between its norms (1e-5 for LayerNorm, the dtype's `finfo.eps` for RMSNorm).

    Returns the sum `[B, ...]` and the normed rows `[K', ...]`, both of the residual's dtype; the norm sees the sum as
    it is stored. Arithmetic runs in float32 (float64 where an argument is float64). Raises `ValueError` or
    `TypeError` naming the argument; values of `rows` and `next_rows` are checked where they are on the CPU.
    """
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
