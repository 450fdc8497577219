"""Counts the kernels that a function launches on a GPU, and its allocations. On the CPU it counts the ops that torch
dispatches and that compute: no views, no allocations and no conversions to Python numbers. A call of ours is one op. On
a stand-in for a GPU's driver the launches of our kernels take the place of our calls.
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


def count_launches(run: Callable[[], object], device: torch.device, launched: Callable[[], int] | None = None) -> int:
    """Counts the launches of `run()`. It must have run before, so that one-time preparations aren't counted. On a
    stand-in for a driver, `launched` returns the number of kernels that we have launched so far."""
    if device.type == "cpu":
        before = launched() if launched else 0
        with _Ops(launched is None) as ops:
            run()
        return ops.count + (launched() - before if launched else 0)
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else it logs every start and stop
    torch.cuda.synchronize(device)
    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as profiler:
        run()
        torch.cuda.synchronize(device)
    on_device = [event.name for event in profiler.events() if event.device_type == DeviceType.CUDA]
    return sum(not name.startswith(("Memcpy", "Memset")) for name in on_device)


def count_allocations(run: Callable[[], object], device: torch.device) -> int:
    """Counts how often `run()` takes memory for tensors from torch's allocator, in Python or in C++."""
    if device.type == "cuda":
        before = torch.cuda.memory_stats(device)["allocation.all.allocated"]
        run()
        return torch.cuda.memory_stats(device)["allocation.all.allocated"] - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        run()
    events = profiler.profiler.kineto_results.events()
    return sum(event.name() == "[memory]" and event.nbytes() > 0 for event in events)


class _Ops(TorchDispatchMode):
    """Counts the ops that compute, with or without ours."""

    def __init__(self, ours: bool):
        super().__init__()
        self.ours, self.count = ours, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        to_python = func.overloadpacket is torch.ops.aten._local_scalar_dense
        left_out = func.namespace == "rdp" and not self.ours
        self.count += not (func.is_view or allocates(func) or to_python or left_out)
        return func(*args, **(kwargs or {}))
