"""A stand-in for the driver of a GPU: Triton takes CPU tensors for a GPU's, and a launch runs nothing.

For counting what would be compiled for, and launched on, a GPU that isn't there. It has to be set up before the first
kernel is defined, in a process of its own without TRITON_INTERPRET; results are memory that nobody wrote.
"""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import torch

ARCHITECTURE = 90


def set_up() -> set[str]:
    """Kernels are asked for, and neither compiled nor launched. Returns what grows by a text for each distinct one."""
    os.environ["TRITON_INTERPRET"] = "0"
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    from rdp_kernels.kernels import dispatch, triton
    from rdp_kernels.kernels.triton import launch

    asked: set[str] = set()

    def ask(*, key: Any, fn: Any, **_: Any) -> bool:
        asked.add(f"{fn.name} {key}")
        return True  # it has been seen to: nothing is compiled

    driver.set_active(
        SimpleNamespace(
            get_current_device=lambda: 0,
            get_current_stream=lambda device: 0,
            get_current_target=lambda: GPUTarget("cuda", ARCHITECTURE, 32),
            get_active_torch_device=lambda: torch.device("cpu"),
        )
    )
    knobs.runtime.jit_cache_hook = ask
    launch.architecture = lambda device: f"sm_{ARCHITECTURE}"  # type: ignore[assignment]
    dispatch._LIBRARIES["triton"] = SimpleNamespace(  # type: ignore[assignment]
        HAS_NORMS=True,
        unavailable=lambda: None,
        MAX_TILE_ROWS=None,
        why_not_kind=lambda *_: None,
        kernels=triton.kernels,
    )
    return asked
