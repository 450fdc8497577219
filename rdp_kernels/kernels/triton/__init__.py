"""Triton kernels: the masked residual add, the gather of rows, and both with a norm between.

| file | holds |
|---|---|
| `residual_add.py` | `act(residual + scale · γ · branch)`, over all rows or some, with the rows of the next branch |
| `residual_add_norm.py` | the same with LayerNorm or RMSNorm over the next branch's rows |
| `residual_add_norm_wide.py` | its backward for rows that don't fit in registers |
| `rows.py` | rows gathered; a list of rows inverted |
| `launchers.py` | the launchers: which kernel serves a call |
| `parts.py` | what the kernels have in common |
| `reduce.py` | the second stage of sums over rows |
| `launch.py` | a launch as data, and every block size and number of warps |
| `support.py` | why a call can't be served; plain torch |

Importing this package imports neither triton nor a kernel: `kernels()` does, when one is wanted.
"""

from __future__ import annotations

from types import ModuleType

from .support import MAX_NORM_WIDTH, unavailable, why_not, why_not_kind

HAS_NORMS = True

__all__ = ["HAS_NORMS", "MAX_NORM_WIDTH", "kernels", "unavailable", "why_not", "why_not_kind"]


def kernels() -> ModuleType:
    """The launchers `fused_add_fwd` and `fused_add_bwd`."""
    from . import launchers

    return launchers
