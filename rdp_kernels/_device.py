"""Host data on its way to a device."""

from __future__ import annotations

import torch
from torch import Tensor


def to_device(host: Tensor, device: torch.device) -> Tensor:
    """`host`, a CPU tensor, on `device`: to a GPU by one asynchronous copy from pinned memory."""
    if device.type == "cpu":
        return host
    return (host.pin_memory() if device.type == "cuda" else host).to(device, non_blocking=True)
