"""Says why the compiled library can't serve a call."""

from __future__ import annotations

import torch

from ..spec import Operands
from .library import has_cuda, has_kernels_for, unavailable

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
CUDA_UPDATES = {
    torch.float32: (torch.float32, torch.bfloat16, torch.float16),
    torch.bfloat16: (torch.bfloat16,),
    torch.float16: (torch.float16,),
}
"""The dtypes of updates that CUDA kernels take with a residual, as in `csrc/cuda/fused_add.cu`."""


def why_not_kind(
    device: torch.device, dtypes: Operands, norm_width: int | None = None, forced: bool = False
) -> str | None:
    """Why calls on such tensors can't be served; None if they can.

    `dtypes` are those of a call's operands. `norm_width` and `forced` are for libraries that have norms, and for those
    that serve on request only.
    """
    reason = unavailable()
    if reason is not None:
        return reason
    for dtype in dtypes:
        if dtype is not None and dtype not in DTYPES:
            return f"the compiled library has float32, bfloat16, float16 and float64, not {dtype}"
    if device.type == "cuda":
        return _why_not_on_cuda(device, dtypes)
    if device.type != "cpu":
        return f"the tensors are on {device}, the compiled library runs on CPUs and NVIDIA GPUs"
    return None


def _why_not_on_cuda(device: torch.device, dtypes: Operands) -> str | None:
    if not has_cuda():
        return "the compiled library was built without CUDA"
    if not has_kernels_for(device):
        return f"the CUDA kernels of the compiled library weren't built for {device} or its driver"
    of_updates = [dtype for dtype in (dtypes.update, dtypes.frozen_update) if dtype is not None]
    residual = of_updates[0] if dtypes.residual is None else dtypes.residual
    if torch.float64 in (residual, dtypes.gamma, *of_updates):
        return "the CUDA kernels of the compiled library have no float64"
    if len(set(of_updates)) > 1:
        return "the CUDA kernels of the compiled library take frozen rows of the learning rows' dtype only"
    if of_updates and of_updates[0] not in CUDA_UPDATES[residual]:
        return (
            "the CUDA kernels of the compiled library take a branch of the residual's dtype, or a narrower one with a "
            f"float32 residual, not {of_updates[0]} with {residual}"
        )
    return None
