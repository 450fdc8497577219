"""How many kernels something launches: on a GPU counted as they run. On the CPU ops stand in for them, those that torch
dispatches and that compute: no views, no allocations, no number handed to Python. A call of ours is one.
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
"""What is counted."""


def counted_as(device: torch.device) -> str:
    return OPS if device.type == "cpu" else KERNELS


def count_launches(run: Callable[[], object], device: torch.device) -> int:
    """Of `run()`, which has run before: what it prepares once isn't meant."""
    if device.type == "cpu":
        with _Ops() as ops:
            run()
        return ops.count
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it tells of every start and stop
    torch.cuda.synchronize(device)
    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as profiler:
        run()
        torch.cuda.synchronize(device)
    on_device = [event.name for event in profiler.events() if event.device_type == DeviceType.CUDA]
    return sum(not name.startswith(("Memcpy", "Memset")) for name in on_device)


class _Ops(TorchDispatchMode):
    """Counts those that compute."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        to_python = func.overloadpacket is torch.ops.aten._local_scalar_dense
        self.count += not (func.is_view or allocates(func) or to_python)
        return func(*args, **(kwargs or {}))
