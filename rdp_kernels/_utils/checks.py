"""Argument checks that the public functions share. Each error names the argument, what was given and what is wanted."""

from __future__ import annotations

import math
import sys
from collections.abc import Collection
from numbers import Integral, Real

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad

LARGEST_FLOAT32 = torch.finfo(torch.float32).max


def check_choice(name: str, value: object, choices: Collection) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def check_probability(name: str, value: object) -> float:
    """Returns a real number in [0, 1] as a float. Refuses NaN, bools, tensors and strings."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number in [0, 1], got {value!r} ({type(value).__name__})")
    if not 0.0 <= float(value) <= 1.0:  # NaN fails this too
        raise ValueError(f"{name} must be in [0, 1], got {value!r}")
    return float(value)


def check_bool(name: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r} ({type(value).__name__})")
    return value


def check_count(name: str, value: object, minimum: int = 0) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be an integer, got {describe(value)}")
    if value < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {value}")
    return int(value)


def check_batch(name: str, value: object) -> Tensor:
    """Returns a floating-point tensor with rows in dimension 0."""
    if not isinstance(value, Tensor):
        hint = ""
        if isinstance(value, fx.Proxy):
            hint = (
                " of torch.fx, which can't record this function: use torch.export or torch.jit.trace, or torch.fx.wrap"
            )
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}{hint}")
    if value.dim() == 0:
        raise ValueError(f"{name} must have its rows in dimension 0, got a tensor without dimensions")
    if not value.is_floating_point():
        raise TypeError(f"{name} must be a floating-point tensor, got {value.dtype}")
    return value


def check_rows(name: str, rows: object, num_rows: int, device: torch.device) -> None:
    """Checks for int64 `[K]` on `device`; and the range and uniqueness of the values of a CPU tensor."""
    if not isinstance(rows, Tensor):
        raise TypeError(f"{name} must be an int64 tensor, got {type(rows).__name__}")
    if rows.dtype != torch.int64 or rows.dim() != 1:
        raise TypeError(f"{name} must be an int64 tensor of shape [K], got {rows.dtype} of shape {list(rows.shape)}")
    if rows.device != device:
        raise ValueError(f"{name} must be on {device} like the residual, got {rows.device}")
    if rows.device.type != "cpu" or rows.numel() == 0 or not host_has(rows):
        return
    low, high = (int(v) for v in torch.aminmax(rows))
    if low < 0 or high >= num_rows:
        raise ValueError(f"{name} must be in [0, {num_rows}), got values from {low} to {high}")
    if torch.bincount(rows).max() > 1:
        raise ValueError(f"{name} must not repeat a row, got {rows.tolist()}")


def check_residual_add(
    residual: object,
    branch: object,
    rows: Tensor | None,
    row_scale: Tensor | float | None,
    gamma: Tensor | None,
    channel_dim: int = -1,
) -> None:
    """Checks the arguments of `residual_add`, except for the values of `rows`, which cost a pass over them."""
    residual, branch = check_batch("residual", residual), check_batch("branch", branch)
    num_rows = residual.shape[0] if rows is None else rows.shape[0]
    wanted = [num_rows, *residual.shape[1:]]
    if list(branch.shape) != wanted:
        what = "the residual's shape" if rows is None else "a row for each entry of rows"
        raise ValueError(f"branch must have shape {wanted} ({what}), got {list(branch.shape)}")
    if branch.device != residual.device:
        raise ValueError(f"branch must be on {residual.device} like the residual, got {branch.device}")
    _check_row_scale(row_scale, num_rows, residual)
    if gamma is not None:
        _check_gamma(gamma, residual, channel_dim)


def _check_row_scale(row_scale: object, num_rows: int, residual: Tensor) -> None:
    if row_scale is None:
        return
    # float64 only where the residual is float64: elsewhere the kernels compute in float32.
    dtype = torch.float64 if residual.dtype == torch.float64 else torch.float32
    if not isinstance(row_scale, Tensor):
        if isinstance(row_scale, bool) or not isinstance(row_scale, Real):
            raise TypeError(f"row_scale must be a number or a float32 tensor, got {type(row_scale).__name__}")
        # Under torch.compile math.isfinite makes a graph for each number, and a symbol is taken to be below infinity.
        largest = sys.float_info.max if dtype == torch.float64 else LARGEST_FLOAT32
        if not -largest <= float(row_scale) <= largest:
            raise ValueError(f"row_scale must be finite in {dtype}, got {row_scale}")
        return
    if row_scale.dtype not in (torch.float32, dtype):
        raise TypeError(f"row_scale must be float32, got {row_scale.dtype}")
    if list(row_scale.shape) != [num_rows]:
        raise ValueError(f"row_scale must have shape [{num_rows}], a factor a row, got {list(row_scale.shape)}")
    if row_scale.device != residual.device:
        raise ValueError(f"row_scale must be on {residual.device} like the residual, got {row_scale.device}")
    if row_scale.requires_grad:
        raise ValueError("row_scale is data, not learned: pass row_scale.detach()")


def _check_gamma(gamma: object, residual: Tensor, channel_dim: int) -> None:
    if not isinstance(gamma, Tensor):
        raise TypeError(f"gamma must be a tensor, got {type(gamma).__name__}")
    if isinstance(channel_dim, bool) or not isinstance(channel_dim, int):
        raise TypeError(f"channel_dim must be an integer, got {channel_dim!r}")
    if not -residual.dim() <= channel_dim < residual.dim() or channel_dim % residual.dim() == 0:
        raise ValueError(
            f"channel_dim must name a dimension of the residual behind its rows, got {channel_dim} for "
            f"{residual.dim()} dimensions"
        )
    channels = residual.shape[channel_dim]
    if list(gamma.shape) != [channels] or not gamma.is_floating_point():
        raise ValueError(
            f"gamma must be a floating-point tensor of shape [{channels}] (channel_dim {channel_dim}), "
            f"got {gamma.dtype} of shape {list(gamma.shape)}"
        )
    if gamma.device != residual.device:
        raise ValueError(f"gamma must be on {residual.device} like the residual, got {gamma.device}")


def check_norm(residual: Tensor, weight: object, bias: object, eps: object) -> None:
    """Checks the arguments of a norm over the residual's last dimension."""
    if residual.dim() < 2:
        raise ValueError(f"residual must have rows and channels, got {residual.dim()} dimension")
    for name, value in (("weight", weight), ("bias", bias)):
        if value is None:
            continue
        if not isinstance(value, Tensor) or not value.is_floating_point():
            raise TypeError(f"{name} must be a floating-point tensor or None, got {describe(value)}")
        if list(value.shape) != [residual.shape[-1]]:
            raise ValueError(f"{name} must have shape [{residual.shape[-1]}], got {list(value.shape)}")
        if value.device != residual.device:
            raise ValueError(f"{name} must be on {residual.device} like the residual, got {value.device}")
    if isinstance(eps, bool) or not isinstance(eps, Real):
        raise TypeError(f"eps must be a number, got {type(eps).__name__}")
    if not 0 <= float(eps) < math.inf:
        raise ValueError(f"eps must be finite and at least 0, got {eps}")


def why_not_plain(tensors: Collection[Tensor]) -> str | None:
    """Why compiled kernels can't take these tensors, or None: their values may lie elsewhere, or a derivative is asked
    for that the kernels have no rule for."""
    for tensor in tensors:
        if type(tensor) not in (Tensor, torch.nn.Parameter):
            return f"{type(tensor).__name__}, a subclass of Tensor, may hold its values elsewhere"
    if torch._C._is_tracing():
        return "torch.jit.trace records torch's own ops alone, with their derivatives"
    return NO_RULE if is_transformed() else None


NO_RULE = (
    "within torch.func transforms and forward-mode AD compiled kernels, which have no rules for them, would lose "
    'derivatives: use rdp.use_backend("eager")'
)


def is_transformed() -> bool:
    """Whether forward-mode AD or a `torch.func` transform is active. These work with torch's own ops, but neither with
    kernels nor with autograd functions that only have a backward."""
    return forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()


def host_has(tensor: Tensor) -> bool:
    """Whether Python may read the values of a CPU tensor. It may not under `torch.compile`, of a fake tensor, and under
    `vmap`, where each value stands for many."""
    if torch.compiler.is_compiling() or isinstance(tensor, FakeTensor):
        return False
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        if torch._C._functorch.is_batchedtensor(tensor):
            return False
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return True


def describe(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of {value.dtype} and shape {list(value.shape)}"
    text = repr(value)
    return f"{text} ({type(value).__name__})" if len(text) <= 40 else type(value).__name__
