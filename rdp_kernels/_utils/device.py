"""Host data on its way to a device."""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import host_has


def to_device(host: Tensor, device: torch.device) -> Tensor:
    """`host`, a CPU tensor, on `device`: to a GPU by one asynchronous copy from pinned memory."""
    if device.type == "cpu":
        return host
    pinned = device.type == "cuda" and host_has(host)
    return (host.pin_memory() if pinned else host).to(device, non_blocking=True)
