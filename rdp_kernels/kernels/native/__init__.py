"""The compiled library of `csrc/`: the masked residual add and the gather of rows, for CPUs and, where it was built
with a CUDA toolkit, for NVIDIA GPUs.

| file | holds |
|---|---|
| `library.py` | loads the library, and remembers why it is missing |
| `support.py` | says why a call can't be served |
| `launchers.py` | calls its ops |
| `short.py` | calls them for simple adds and gathers, with as little Python as possible |
"""

from __future__ import annotations

from types import ModuleType

from .library import has_cuda, unavailable
from .support import why_not_kind

HAS_NORMS = False
MAX_TILE_ROWS = None
"""Rows are numbered in 64 bits."""

__all__ = ["HAS_NORMS", "MAX_TILE_ROWS", "has_cuda", "kernels", "short_kernels", "unavailable", "why_not_kind"]


def kernels() -> ModuleType:
    """The module of the launchers `fused_add_fwd` and `fused_add_bwd`."""
    from . import launchers

    return launchers


def short_kernels() -> ModuleType:
    """Kernels for simple calls, which check their arguments themselves."""
    from . import short

    return short
