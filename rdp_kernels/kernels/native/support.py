"""Says why the compiled library can't serve a call."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from .library import has_cuda, unavailable

CUDA_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DTYPES = (*CUDA_DTYPES, torch.float64)


def why_not_kind(
    device: torch.device, dtypes: Iterable[torch.dtype], norm_width: int | None = None, forced: bool = False
) -> str | None:
    """Why calls on such tensors can't be served; None if they can.

    On GPUs it serves only where the user asked for it (`forced`): no GPU has measured yet whether it is faster than
    Triton anywhere. `norm_width` is for libraries that have norms.
    """
    reason = unavailable()
    if reason is not None:
        return reason
    if device.type == "cuda":
        if not has_cuda():
            return "the compiled library was built without CUDA"
        if not forced:
            return "on GPUs the compiled library serves on request only"
    elif device.type != "cpu":
        return f"the tensors are on {device}, the compiled library runs on CPUs and NVIDIA GPUs"
    for dtype in dtypes:
        if dtype not in DTYPES:
            return f"the compiled library has float32, bfloat16, float16 and float64, not {dtype}"
        if device.type == "cuda" and dtype not in CUDA_DTYPES:
            return f"the CUDA kernels of the compiled library have float32, bfloat16 and float16, not {dtype}"
    return None
