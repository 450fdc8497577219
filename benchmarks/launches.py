"""Counts the kernels that a function launches on a GPU. On the CPU it counts the ops that torch dispatches and that
compute: no views, no allocations and no conversions to Python numbers. A call of ours is one op.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from .op_bytes import allocates

KERNELS, OPS = "kernels", "ops"
"""The things that are counted."""


def counted_as(device: torch.device) -> str:
    return OPS if device.type == "cpu" else KERNELS


def count_launches(run: Callable[[], object], device: torch.device) -> int:
    """Counts the launches of `run()`. It must have run before, so that one-time preparations aren't counted."""
    if device.type == "cpu":
        with _Ops() as ops:
            run()
        return ops.count
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else it logs every start and stop
    torch.cuda.synchronize(device)
    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as profiler:
        run()
        torch.cuda.synchronize(device)
    on_device = [event.name for event in profiler.events() if event.device_type == DeviceType.CUDA]
    return sum(not name.startswith(("Memcpy", "Memset")) for name in on_device)


class _Ops(TorchDispatchMode):
    """Counts the ops that compute."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        to_python = func.overloadpacket is torch.ops.aten._local_scalar_dense
        self.count += not (func.is_view or allocates(func) or to_python)
        return func(*args, **(kwargs or {}))
