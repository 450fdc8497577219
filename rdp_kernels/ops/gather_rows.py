"""The gather of the rows that a branch runs on."""

from __future__ import annotations

from torch import Tensor

from .._utils.checks import check_batch, check_rows
from ..kernels.autograd import fused_add, unchecked_gather
from ..kernels.spec import NextInput, Operands, RowSet


def gather_rows(residual: Tensor, rows: Tensor) -> Tensor:
    """Copies some rows of a tensor, for a branch that runs on these only.

    It equals `residual[rows]`. The values of `rows` are checked only where they are on the CPU. The result is
    differentiable with respect to `residual`; second derivatives need `use_backend("eager")`.

    Args:
        residual: the residual, `[B, ...]`, any floating dtype.
        rows: int64 `[K]`, unique, in [0, B), on the residual's device.

    Returns:
        The rows, `[K, ...]`, in the residual's dtype.

    Raises:
        TypeError: if an argument has the wrong type or dtype. The error names the argument.
        ValueError: if an argument has the wrong shape, device or values. The error names the argument.
        RuntimeError: if the backend that `use_backend` asks for can't serve the call.

    Example:
        >>> rdp.gather_rows(torch.tensor([[0.0], [10.0], [20.0]]), torch.tensor([2, 0]))
        tensor([[20.],
                [ 0.]])
    """
    out = unchecked_gather(residual, rows)
    if out is not None:
        return out
    check_batch("residual", residual)
    check_rows("rows", rows, residual.shape[0], residual.device)
    next_input = NextInput(RowSet(rows, rows.shape[0]))
    gathered: Tensor = fused_add("gather_rows", Operands(residual), next_input=next_input).next
    return gathered
