"""Looking on at a model's paths, or standing in for them, with the model left as it was."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..paths.call import PathCall
from ..paths.path import find_path_modules

StandIn = Callable[[int, PathCall, Tensor], Tensor]
"""Path (its row in `scheme.paths`), call and input; returns the path's output."""


@dataclass(frozen=True)
class Pieces:
    """One call of a path. Valid while it lasts: what follows in a model may write to these tensors.

    Args:
        path: its index in registration order, as in `scheme.paths`.
        name: of the path in the model.
        x: its input, `[B, ...]`.
        residual: what the branch is added to: `x`, or `shortcut(x)`.
        branch: what is added, `γ · fn(norm(x))`.
        out: its output, `act(residual + branch)`.
    """

    path: int
    name: str
    x: Tensor
    residual: Tensor
    branch: Tensor
    out: Tensor


@contextlib.contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """The model in eval mode within; afterwards every module's mode and torch's random states are what they were.

    Inside an iteration of a scheme's too: a forward in eval mode is plain inference there and advances nothing.
    """
    modes = [(module, module.training) for module in model.modules()]
    devices = {t.device for t in (*model.parameters(), *model.buffers()) if t.is_cuda}
    with torch.random.fork_rng(devices=sorted(devices, key=str)):
        model.eval()
        try:
            yield
        finally:
            for module, training in modes:
                module.training = training


@contextlib.contextmanager
def standing_in(model: nn.Module, stand_in: StandIn, only: Collection[int] | None = None) -> Iterator[list[str]]:
    """`stand_in` gives what the paths of `model`, or these of them, would within; yields all paths' names."""
    path_modules = find_path_modules(model)
    chosen = [
        (index, path_module) for index, path_module in enumerate(path_modules.values()) if only is None or index in only
    ]
    before = [path_module.binding.call_override for _, path_module in chosen]
    for index, path_module in chosen:
        path_module.binding.call_override = functools.partial(stand_in, index)
    try:
        yield list(path_modules)
    finally:
        for (_, path_module), probe in zip(chosen, before, strict=True):
            path_module.binding.call_override = probe


@contextlib.contextmanager
def observing(model: nn.Module, on_call: Callable[[Pieces], None]) -> Iterator[list[str]]:
    """`on_call` sees every call of a path within, in the order of the forward; yields the paths' names."""
    names: list[str] = []

    def look(path: int, call: PathCall, x: Tensor) -> Tensor:
        residual, branch = call.residual(x), added(call, x)
        out = finish(call, residual + branch)
        on_call(Pieces(path, names[path], x, residual, branch, out))
        return out

    with standing_in(model, look) as found:
        names += found
        yield found


def added(call: PathCall, x: Tensor) -> Tensor:
    """What the path adds to its stream: `γ · fn(norm(x))`."""
    path_module, branch = call.module, call.branch(x)
    if path_module.gamma is None:
        return branch
    dim = path_module.channel_dim % branch.dim()
    return branch * path_module.gamma.view([-1 if d == dim else 1 for d in range(branch.dim())])


def finish(call: PathCall, out: Tensor) -> Tensor:
    """The path's activation after the add."""
    return out.relu() if call.module.activation == "relu" else out


def forward(model: nn.Module, batch: Any) -> Any:
    """`model` on a batch: one argument, a tuple or list of arguments, or a mapping of arguments by name."""
    if isinstance(batch, Mapping):
        return model(**batch)
    if isinstance(batch, tuple | list):
        return model(*batch)
    return model(batch)


def as_batches(batches: Any) -> Iterable[Any]:
    """A tensor or a mapping is one batch."""
    return [batches] if isinstance(batches, Tensor | Mapping) else batches
