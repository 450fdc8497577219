"""Meters for a piece of a network: FLOPs, seconds, and the storages that autograd saves."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


class Flops(contextlib.ExitStack):
    """Counts the FLOPs of matmuls and convolutions within the context, as `torch.utils.flop_counter` does.

    On the CPU, scaled_dot_product_attention runs as matmuls here, because the counter doesn't know its fused CPU
    kernel.
    """

    def __init__(self, device: torch.device):
        super().__init__()
        self._device, self._counter = device, FlopCounterMode(display=False)

    def __enter__(self) -> Flops:
        super().__enter__()
        if self._device.type == "cpu":
            self.enter_context(sdpa_kernel(SDPBackend.MATH))
        self.enter_context(self._counter)
        return self

    def read(self) -> int:
        return self._counter.get_total_flops()

    @staticmethod
    def spent(start: int, end: int) -> float:
        return float(end - start)


class Clock:
    """Measures seconds. GPU time is measured by events on the GPU's own clock."""

    def __init__(self, device: torch.device):
        self._device = device

    def read(self) -> Any:
        if self._device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record(torch.cuda.current_stream(self._device))
            return event
        if self._device.type != "cpu":
            torch.accelerator.synchronize(self._device)
        return time.perf_counter()

    def spent(self, start: Any, end: Any) -> float:
        if self._device.type == "cuda":
            end.synchronize()
            return start.elapsed_time(end) / 1e3
        return end - start


class Saved:
    """The storages that autograd saves, each once, with the place where it was saved first.

    Args:
        own: parameters and buffers, which aren't counted.
        where: returns the number of the current place.
    """

    def __init__(self, own: Iterable[Tensor], where: Callable[[], int] = lambda: 0):
        self._own = {t.untyped_storage().data_ptr() for t in own}
        self._where = where
        self._found: dict[int, tuple[torch.UntypedStorage, int]] = {}  # kept so that addresses aren't reused

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        with torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor):
            yield

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._own:
            self._found.setdefault(storage.data_ptr(), (storage, self._where()))
        return tensor

    def take(self, tensor: Tensor) -> bool:
        """Returns whether the storage of `tensor` was saved. It isn't counted any more."""
        return self._found.pop(tensor.untyped_storage().data_ptr(), None) is not None

    def bytes(self, places: int = 1) -> list[float]:
        """The saved bytes by place."""
        totals = [0.0] * places
        for storage, where in self._found.values():
            totals[where] += storage.nbytes()
        return totals
