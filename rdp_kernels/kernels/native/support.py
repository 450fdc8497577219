"""Why the compiled library can't serve a call; one function, asked when choosing and when forced."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from ..._utils.checks import why_not_plain
from .library import has_cuda, unavailable

CUDA_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DTYPES = (*CUDA_DTYPES, torch.float64)
SMALL_ON_CUDA = 0
"""Below how many elements of the stream the CUDA kernels serve unasked. That is where launching a Triton kernel costs
more than running it; no GPU has measured it yet, so they serve on request only."""


def why_not(
    tensors: Sequence[Tensor | None],
    norm_width: int | None = None,
    forced: bool = False,
    tile_rows: Callable[[], int] = lambda: 0,
) -> str | None:
    """Why a call on `tensors`, the first of which is the stream or the branch, can't be served; None if it can.

    `norm_width`: of libraries that have norms. `tile_rows`: of those that don't number rows in 64 bits, as this does.
    """
    given = [tensor for tensor in tensors if tensor is not None]
    asked = forced or given[0].numel() < SMALL_ON_CUDA
    reason = why_not_kind(given[0].device, [tensor.dtype for tensor in given], norm_width, asked)
    return why_not_plain(given) if reason is None else reason


def why_not_kind(
    device: torch.device, dtypes: Iterable[torch.dtype], norm_width: int | None = None, forced: bool = False
) -> str | None:
    """The part of `why_not` that asks for no values and sizes, for `torch.compile`."""
    reason = unavailable()
    if reason is not None:
        return reason
    if device.type == "cuda":
        if not has_cuda():
            return "the compiled library was built without CUDA"
        if not forced:
            return f"on GPUs the compiled library serves on request only, or below {SMALL_ON_CUDA} elements"
    elif device.type != "cpu":
        return f"the tensors are on {device}, the compiled library runs on CPUs and NVIDIA GPUs"
    for dtype in dtypes:
        if dtype not in DTYPES:
            return f"the compiled library has float32, bfloat16, float16 and float64, not {dtype}"
        if device.type == "cuda" and dtype not in CUDA_DTYPES:
            return f"the CUDA kernels of the compiled library have float32, bfloat16 and float16, not {dtype}"
    return None
