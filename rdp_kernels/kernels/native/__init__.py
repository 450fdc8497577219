"""The compiled library of `csrc/`: the masked residual add and the gather of rows, for CPUs and, where it was built
with a CUDA toolkit, for NVIDIA GPUs.

| file | holds |
|---|---|
| `library.py` | loads it, and remembers why it is missing |
| `support.py` | why a call can't be served |
| `launchers.py` | the calls of its ops |
| `short.py` | the same for the simplest calls, with as little Python as possible |
"""

from __future__ import annotations

from types import ModuleType

from .library import unavailable
from .support import why_not, why_not_kind

HAS_NORMS = False

__all__ = ["HAS_NORMS", "kernels", "short_kernels", "unavailable", "why_not", "why_not_kind"]


def kernels() -> ModuleType:
    """The launchers `fused_add_fwd` and `fused_add_bwd`."""
    from . import launchers

    return launchers


def short_kernels() -> ModuleType:
    """The same for calls on CPU tensors with unchecked arguments."""
    from . import short

    return short
