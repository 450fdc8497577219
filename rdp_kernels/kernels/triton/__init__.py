"""Triton kernels: the masked residual add, the gather of rows, and both followed by a norm.

| file | what it holds |
|---|---|
| `residual_add.py` | `act(residual + scale · γ · update)` over all rows or some, with the rows of the next branch |
| `residual_add_norm.py` | the same, with LayerNorm or RMSNorm over the next branch's rows |
| `residual_add_norm_wide.py` | its backward, for rows that don't fit in registers |
| `rows.py` | gathers rows; inverts a list of rows |
| `launchers.py` | finds the prepared call that serves a call, and runs it |
| `keys.py` | what a prepared call depends on |
| `forward.py`, `backward.py` | prepared calls: kernel, tiles, and the order of its arguments, decided once for a key |
| `short.py` | the residual add and the gather for calls of a known kind, without checks |
| `prepared.py` | prepared launches, and launches as data |
| `common.py` | what the kernels have in common: rows, masks, activations |
| `reduce.py` | the second stage of sums over rows |
| `launch.py` | the table of block sizes and numbers of warps; how a call is cut into tiles |
| `support.py` | says why the kernels can't serve a call; needs no triton |

Importing this package imports neither triton nor a kernel; `kernels()` does.
"""

from __future__ import annotations

from types import ModuleType

from .launch import MAX_TILE_ROWS, why_not_rows
from .support import MAX_NORM_WIDTH, unavailable, why_not_kind

HAS_NORMS = True

__all__ = [
    "HAS_NORMS",
    "MAX_NORM_WIDTH",
    "MAX_TILE_ROWS",
    "kernels",
    "short_kernels",
    "unavailable",
    "why_not_kind",
    "why_not_rows",
]


def kernels() -> ModuleType:
    """The module of the launchers `fused_add_fwd` and `fused_add_bwd`."""
    from . import launchers

    return launchers


def short_kernels() -> ModuleType:
    """Kernels for simple calls whose arguments haven't been checked: see `kernels.short`."""
    from . import short

    return short
