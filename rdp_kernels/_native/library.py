"""Loads the compiled library once; where it is missing everything else works without it."""

from __future__ import annotations

from pathlib import Path

import torch

_PACKAGE = Path(__file__).parent.parent
_HOW_TO_BUILD = "with a C++ compiler: RDP_BUILD=cpu pip install --no-build-isolation . (says what is wrong if it fails)"


def _load() -> str | None:
    """Why there is no library, or None."""
    files = sorted(_PACKAGE.glob("_C.*so")) + sorted(_PACKAGE.glob("_C.*pyd"))
    if not files:
        return f"it was not built; {_HOW_TO_BUILD}"
    try:
        torch.ops.load_library(str(files[0]))
    except (OSError, RuntimeError) as error:
        reason = str(error).strip().partition("\n")[0]
        return f"{files[0].name} can't be loaded by torch {torch.__version__} ({reason}); build it anew {_HOW_TO_BUILD}"
    return None


_reason = _load()


def unavailable() -> str | None:
    """Why no call can be served, or None."""
    return _reason


def has_cuda() -> bool:
    """Whether the library was built with CUDA kernels."""
    return _reason is None and torch._C._dispatch_has_kernel_for_dispatch_key("rdp::native_tail", "CUDA")
