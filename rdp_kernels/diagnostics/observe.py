"""Observes the calls of a model's paths, or replaces them, and leaves the model unchanged."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .._utils.modes import in_eval
from ..kernels.spec import activated
from ..paths.call import PathCall
from ..paths.path import find_path_modules

Override = Callable[[int, PathCall, Tensor], Tensor]
"""`(path, call, x) -> output`: replaces the call of a path, given by its index in `scheme.paths`."""


@dataclass(frozen=True)
class ObservedCall:
    """One call of a path. It is valid only during the call, because later code in the model may write to its tensors.

    Attributes:
        path: the path's index in registration order, as in `scheme.paths`.
        name: the path's name in the model.
        x: the input, `[B, ...]`.
        residual: what the update is added to: `x`, or `shortcut(x)`.
        update: `γ · fn(norm(x))`.
        out: the output, `act(residual + update)`.
    """

    path: int
    name: str
    x: Tensor
    residual: Tensor
    update: Tensor
    out: Tensor


@contextlib.contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Puts the model into eval mode within the context. It restores every module's mode and torch's random states.

    It may be used inside an iteration of a scheme: a forward in eval mode is plain inference and advances nothing.
    """
    devices = {t.device for t in (*model.parameters(), *model.buffers()) if t.is_cuda}
    with torch.random.fork_rng(devices=devices), in_eval(model):
        yield


@contextlib.contextmanager
def overriding(model: nn.Module, override: Override, only: Collection[int] | None = None) -> Iterator[list[str]]:
    """Replaces the calls of the model's paths by `override` within the context. Yields the names of all paths.

    With `only`, it replaces the calls of these paths.
    """
    path_modules = find_path_modules(model)
    bindings = {i: m.binding for i, m in enumerate(path_modules.values()) if only is None or i in only}
    before = {index: binding.call_override for index, binding in bindings.items()}
    for index, binding in bindings.items():
        binding.call_override = functools.partial(override, index)
    try:
        yield list(path_modules)
    finally:
        for index, binding in bindings.items():
            binding.call_override = before[index]


@contextlib.contextmanager
def observing(model: nn.Module, on_call: Callable[[ObservedCall], None]) -> Iterator[list[str]]:
    """Passes every call of a path to `on_call` within the context, in forward order. Yields the names of the paths."""

    def observe(path: int, call: PathCall, x: Tensor) -> Tensor:
        residual, update = call.residual(x), update_of(call, x)
        out = activated(residual + update, call.module.activation)
        on_call(ObservedCall(path, names[path], x, residual, update, out))
        return out

    with overriding(model, observe) as names:
        yield names


def update_of(call: PathCall, x: Tensor) -> Tensor:
    """Returns what the path adds to its residual, `γ · fn(norm(x))`."""
    path_module, update = call.module, call.branch(x)
    if path_module.gamma is None:
        return update
    dim = path_module.channel_dim % update.dim()
    return update * path_module.gamma.view([-1 if d == dim else 1 for d in range(update.dim())])


def forward(model: nn.Module, batch: Any) -> Any:
    """Runs `model` on a batch: one argument, a tuple or list of arguments, or a mapping of keyword arguments."""
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, tuple | list) else model(batch)


def as_batches(batches: Any) -> Iterable[Any]:
    """Returns an iterable of batches. A tensor or a mapping is one batch."""
    return [batches] if isinstance(batches, Tensor | Mapping) else batches
