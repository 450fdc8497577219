"""A stand-in for the driver of a GPU: Triton treats CPU tensors as a GPU's, and a launch runs nothing.

It serves to count compilations and launches without a GPU. It must be set up before the first kernel is defined, in a
separate process without TRITON_INTERPRET. Results are uninitialised memory.
"""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import torch

ARCHITECTURE = 90


def set_up() -> set[str]:
    """Records requested kernels instead of compiling and launching them. Returns a collection that gets a text for each
    distinct one."""
    os.environ["TRITON_INTERPRET"] = "0"
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    from rdp_kernels.kernels import dispatch, triton
    from rdp_kernels.kernels.triton import launch

    asked: set[str] = set()

    def ask(*, key: Any, fn: Any, **_: Any) -> bool:
        asked.add(f"{fn.name} {key}")
        return True  # handled: Triton compiles nothing

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
