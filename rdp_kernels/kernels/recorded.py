"""What `torch.fx` and `torch.jit` record in place of kernels: plain torch ops, and masks drawn in the graph."""

from __future__ import annotations

import torch
from torch import Tensor, fx


def is_recorded(x: object) -> bool:
    """Whether `x` is a proxy of `torch.fx`, or `torch.jit.trace` runs. Mustn't be called under `torch.compile`."""
    return torch._C._is_tracing() or isinstance(x, fx.Proxy)


def drop_rows(x: Tensor, drop_prob: float, scale: float, whole_batch: bool = False) -> Tensor:
    """`x * scale` with rows dropped at random, or the whole batch: those are 0 and never read. TorchScript takes it."""
    shape = (1 if whole_batch else x.shape[0],) + (1,) * (x.ndim - 1)
    keep = x.new_empty(shape, dtype=torch.float32).uniform_() >= drop_prob
    return torch.where(keep, x * scale, 0.0)
