"""Triton kernels: the masked residual add, the gather of rows, and both followed by a norm.

| file | what it holds |
|---|---|
| `residual_add.py` | `act(residual + scale · γ · update)` over all rows or some, with the rows of the next branch |
| `residual_add_norm.py` | the same, with LayerNorm or RMSNorm over the next branch's rows |
| `residual_add_norm_wide.py` | its backward, for rows that don't fit in registers |
| `rows.py` | gathers rows; inverts a list of rows |
| `launchers.py` | chooses the kernel of a call, and its arguments |
| `common.py` | what the kernels have in common: rows, masks, activations |
| `reduce.py` | the second stage of sums over rows |
| `launch.py` | a launch as data; the table of block sizes and numbers of warps |
| `support.py` | says why the kernels can't serve a call; needs no triton |

Importing this package imports neither triton nor a kernel; `kernels()` does.
"""

from __future__ import annotations

from types import ModuleType

from .launch import MAX_TILE_ROWS, why_not_rows
from .support import MAX_NORM_WIDTH, unavailable, why_not_kind

HAS_NORMS = True

__all__ = ["HAS_NORMS", "MAX_NORM_WIDTH", "MAX_TILE_ROWS", "kernels", "unavailable", "why_not_kind", "why_not_rows"]


def kernels() -> ModuleType:
    """The module of the launchers `fused_add_fwd` and `fused_add_bwd`."""
    from . import launchers

    return launchers
