"""Says why the Triton kernels can't serve a call, both when a backend is chosen and when this one is forced."""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import os
import re
from collections.abc import Iterable

import torch

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
MAX_NORM_WIDTH = 16384
"""A program of the norm's forward holds a row in registers: at this width 32 float32 in each of its 512 threads."""
MIN_CAPABILITY = (8, 0)
"""Older GPUs have no bfloat16, and no test compiles for them."""


def interpreted() -> bool:
    """Whether Triton runs kernels on the CPU, in Python. It reads the variable only when a kernel is defined."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@functools.cache
def unavailable() -> str | None:
    """Why no call can be served, or None. It doesn't import triton."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed: pip install triton"
    if interpreted():
        return _why_not_interpreted()
    if not torch.cuda.is_available():
        return "there is no GPU (with TRITON_INTERPRET=1 in the environment it takes CPU tensors, slowly, for tests)"
    return None


def _why_not_interpreted() -> str | None:
    """Why the interpreter can't run, or None. Triton before 3.7 converts one-element arrays to numbers implicitly, and
    numpy 2.4 removed that."""
    triton, numpy = _version_of("triton"), _version_of("numpy")
    if triton and numpy and triton[:2] < (3, 7) and numpy[:2] >= (2, 4):
        found = ".".join(map(str, triton))
        return f"the interpreter of triton {found} fails with numpy 2.4 or later: pip install 'numpy<2.4'"
    return None


def _version_of(package: str) -> tuple[int, ...] | None:
    """The numbers of the installed release; None where no package of that name is installed."""
    try:
        found = re.match(r"\d+(\.\d+)*", importlib.metadata.version(package))
    except importlib.metadata.PackageNotFoundError:
        return None
    return tuple(map(int, found[0].split("."))) if found else None


def why_not_kind(
    device: torch.device, dtypes: Iterable[torch.dtype | None], norm_width: int | None = None, forced: bool = False
) -> str | None:
    """Why calls on such tensors can't be served; None if they can.

    `norm_width` is the number of channels of the norm, if there is one. `forced` tells whether the user asked for this
    backend. The interpreter serves such calls only, as it is for tests.
    """
    reason = unavailable()
    if reason is not None:
        return reason
    if device.type == "cuda":
        reason = _why_not_device(device)
        if reason is not None:
            return reason
    elif not (device.type == "cpu" and interpreted()):
        return f"the tensors are on {device}, the Triton kernels run on GPUs"
    elif not forced:
        return "on the CPU the Triton interpreter serves on request only"
    for dtype in dtypes:
        if dtype is not None and dtype not in DTYPES:
            return f"the Triton kernels have float32, bfloat16, float16 and float64, not {dtype}"
    if norm_width is not None and norm_width > MAX_NORM_WIDTH:
        return f"a norm over {norm_width} channels is wider than {MAX_NORM_WIDTH}, the most that one kernel holds"
    return None


@functools.cache
def _why_not_device(device: torch.device) -> str | None:
    if torch.version.hip is not None or torch.cuda.get_device_capability(device) >= MIN_CAPABILITY:
        return None
    found = ".".join(map(str, torch.cuda.get_device_capability(device)))
    return f"{torch.cuda.get_device_name(device)} has compute capability {found}, the Triton kernels need 8.0 or more"
