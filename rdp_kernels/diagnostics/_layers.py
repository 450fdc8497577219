"""The layers of a model in a forward: the states of the residual, or the updates that paths add to it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .observe import ObservedCall, forward, observing

T = TypeVar("T")

OF = ("stream", "branch")
"""The residual before the first path ("input") and after each path; the update that each path adds to it."""


def layers_of(model: nn.Module, batch: Any, of: str, look: Callable[[Tensor], T]) -> dict[str, T]:
    """Calls `look` on each layer in one forward. Returns the results by label, in the order of the calls.

    Code behind a layer may write to the tensor that `look` gets. Its shape is the one that it has in the path. Raises
    `ValueError` where no path is called.
    """
    found: dict[str, T] = {}

    def on_call(call: ObservedCall) -> None:
        if of == "stream" and not found:
            put(found, "input", look(call.x))
        put(found, call.name, look(call.out if of == "stream" else call.update))

    run(model, batch, on_call)
    return found


def run(model: nn.Module, batch: Any, on_call: Callable[[ObservedCall], None]) -> None:
    """Runs one forward without gradients and passes its calls to `on_call`. Raises `ValueError` without any."""
    calls = 0

    def counting(call: ObservedCall) -> None:
        nonlocal calls
        calls += 1
        on_call(call)

    with torch.no_grad(), observing(model, counting):
        forward(model, batch)
    if not calls:
        raise ValueError("model calls none of its paths on these batches: does its forward use them?")


def put(found: dict[str, T], name: str, value: T) -> None:
    """Stores `value` under `name`, or under `name#2` in the second call of a path."""
    label, count = name, 1
    while label in found:
        count += 1
        label = f"{name}#{count}"
    found[label] = value


def same_labels(before: tuple[str, ...] | None, found: dict[str, T]) -> tuple[str, ...]:
    """The labels of `found`. Raises `ValueError` where the batch before had others."""
    labels = tuple(found)
    if before not in (None, labels):
        raise ValueError(
            f"model must call the same paths on every batch, got {list(labels)} after {list(before or ())}"
        )
    return labels


def none_given() -> ValueError:
    return ValueError("batches must hold at least one batch, got none")
