"""A stand-in for the driver of a GPU: Triton treats CPU tensors as a GPU's, and a launch runs nothing.

It counts compilations or launches without a GPU. It must be set up before the first kernel is defined, in a separate
process without TRITON_INTERPRET. Results are uninitialised memory.
"""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import torch

ARCHITECTURE = 90


class Launches:
    """Takes the place of Triton's compiled launcher: counts, and launches nothing."""

    count = 0

    def __init__(self, *_: object):
        pass

    def __call__(self, *_: object) -> None:
        Launches.count += 1


def set_up() -> set[str]:
    """Records requested kernels instead of compiling and launching them. Returns a collection that gets a text for each
    distinct one."""
    set_up_launches()
    from triton import knobs

    asked: set[str] = set()

    def ask(*, key: Any, fn: Any, **_: Any) -> bool:
        asked.add(f"{fn.name} {key}")
        return True  # handled: Triton compiles nothing

    knobs.runtime.jit_cache_hook = ask
    return asked


def set_up_launches() -> None:
    """Compiles kernels. `Launches` counts their launches."""
    os.environ["TRITON_INTERPRET"] = "0"
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    from rdp_kernels._utils import checks
    from rdp_kernels.kernels import dispatch, triton
    from rdp_kernels.kernels.triton import launch

    limits = {"max_shared_mem": 232448, "multiprocessor_count": 132}
    driver.set_active(
        SimpleNamespace(
            get_current_device=lambda: 0,
            get_current_stream=lambda device: 0,
            get_current_target=lambda: GPUTarget("cuda", ARCHITECTURE, 32),
            get_active_torch_device=lambda: torch.device("cpu"),
            launcher_cls=Launches,
            utils=SimpleNamespace(
                load_binary=lambda *_: (0, 0, 32, 0, 1024),  # module, function, registers, spills, threads
                get_device_properties=lambda device: limits,
            ),
        )
    )
    checks.host_has = lambda tensor: False  # as on a GPU, where values of rows aren't checked
    launch.architecture = lambda device: f"sm_{ARCHITECTURE}"  # type: ignore[assignment]
    dispatch._LIBRARIES["triton"] = SimpleNamespace(  # type: ignore[assignment]
        HAS_NORMS=True,
        unavailable=lambda: None,
        MAX_TILE_ROWS=None,
        why_not_kind=lambda *_: None,
        kernels=triton.kernels,
    )
