"""The layers of a model in a forward: the states of the residual, or the updates that paths add to it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ._progress import track
from .observe import ObservedCall, as_batches, forward, observing, undisturbed

T = TypeVar("T")

OF = ("stream", "branch")
"""The residual before the first path ("input") and after each path; the update that each path adds to it."""


def measure(
    models: Sequence[nn.Module],
    batches: Any,
    what: str,
    progress: bool | None,
    look: Callable[[nn.Module, Any], dict[str, T]],
    add: Callable[..., object],
) -> list[tuple[str, ...]]:
    """Calls `look(model, batch)` for each batch and model, in eval mode, then `add` with the values from each model.

    Returns the labels of each model. Raises `ValueError` without a batch, or where batches have different labels.
    """
    labels: list[tuple[str, ...]] = []
    with contextlib.ExitStack() as stack:
        for model in models:
            stack.enter_context(undisturbed(model))
        for batch in track(as_batches(batches), what, progress):
            found = [look(model, batch) for model in models]
            for before, now in zip(labels, map(tuple, found), strict=False):  # nothing before the first batch
                if before != now:
                    raise ValueError(
                        f"model must call the same paths on every batch, got {list(now)} after {list(before)}"
                    )
            labels = [tuple(layers) for layers in found]
            add(*([*layers.values()] for layers in found))
    if not labels:
        raise ValueError("batches must hold at least one batch, got none")
    return labels


def layers_of(model: nn.Module, batch: Any, of: str, look: Callable[[Tensor], T]) -> dict[str, T]:
    """Calls `look` on each layer in one forward, as `run` does. `look` gets a tensor in its shape in the path, which
    code behind the layer may write to."""

    def on_call(call: ObservedCall, found: dict[str, T]) -> None:
        if of == "stream" and not found:
            put(found, "input", look(call.x))
        put(found, call.name, look(call.out if of == "stream" else call.update))

    return run(model, batch, on_call)


def run(model: nn.Module, batch: Any, on_call: Callable[[ObservedCall, dict[str, T]], None]) -> dict[str, T]:
    """Runs one forward without gradients. `on_call` puts a value for each call into the dict that is returned.

    Raises `ValueError` where no path is called.
    """
    found: dict[str, T] = {}
    with torch.no_grad(), observing(model, lambda call: on_call(call, found)):
        forward(model, batch)
    if not found:
        raise ValueError("model calls none of its paths on these batches: does its forward use them?")
    return found


def put(found: dict[str, T], name: str, value: T) -> None:
    """Stores `value` under `name`, or under `name#2` in the second call of a path."""
    label, count = name, 1
    while label in found:
        count += 1
        label = f"{name}#{count}"
    found[label] = value
