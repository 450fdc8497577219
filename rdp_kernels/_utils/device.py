"""Copies host data to a device."""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import host_has


def to_device(host: Tensor, device: torch.device) -> Tensor:
    """Returns the CPU tensor `host` on `device`. A GPU gets it by one asynchronous copy from pinned memory."""
    if device.type == "cpu":
        return host
    pinned = device.type == "cuda" and host_has(host)
    return (host.pin_memory() if pinned else host).to(device, non_blocking=True)
