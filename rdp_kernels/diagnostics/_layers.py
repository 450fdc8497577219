"""The layers of a model in a forward: the states of the residual, or the updates that paths add to it."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ._display import track
from .observe import ObservedCall, as_batches, forward, observing, undisturbed

T = TypeVar("T")

OnCall = Callable[[ObservedCall, dict[str, T]], None]
"""Gets each call of a path and stores values in a dict."""

OF = ("stream", "branch")
"""The residual before the first path ("input") and after each path, or the updates that paths add to it."""


def measure(
    models: Sequence[nn.Module],
    batches: Any,
    what: str,
    progress: bool | None,
    on_call: OnCall[T],
    add: Callable[..., object],
) -> list[tuple[str, ...]]:
    """Runs each model on each batch, in eval mode, and calls `add` with the values from each model.

    Returns the labels of each model. Raises `ValueError` if there is no batch, or if batches have different labels.
    """
    labels: list[tuple[str, ...]] = []
    with contextlib.ExitStack() as stack:
        for model in models:
            stack.enter_context(undisturbed(model))
        for batch in track(as_batches(batches), what, progress):
            found = [run(model, batch, on_call) for model in models]
            for before, now in zip(labels, map(tuple, found), strict=False):  # empty before the first batch
                if before != now:
                    raise ValueError(
                        f"model must call the same paths on every batch, got {list(now)} after {list(before)}"
                    )
            labels = [tuple(layers) for layers in found]
            add(*([*layers.values()] for layers in found))
    if not labels:
        raise ValueError("batches must hold at least one batch, got none")
    return labels


def run(model: nn.Module, batch: Any, on_call: OnCall[T]) -> dict[str, T]:
    """Runs one forward without gradients. Returns the values by label. Raises `ValueError` if no path is called."""
    found: dict[str, T] = {}
    with torch.no_grad(), observing(model, lambda call: on_call(call, found)):
        forward(model, batch)
    if not found:
        raise ValueError("model calls none of its paths on these batches: does its forward use them?")
    return found


def layers_of(of: str, look: Callable[[Tensor], T]) -> OnCall[T]:
    """Returns an `OnCall` that stores the result of `look` for each layer.

    `look` gets the tensor as the path has it. Later code in the model may write to this tensor.
    """

    def on_call(call: ObservedCall, found: dict[str, T]) -> None:
        if of == "stream" and not found:
            put(found, "input", look(call.x))
        put(found, call.name, look(call.out if of == "stream" else call.update))

    return on_call


def put(found: dict[str, T], name: str, value: T) -> None:
    """Stores `value` under `name`, or under `name#2` in the second call of a path."""
    labels = itertools.chain([name], (f"{name}#{count}" for count in itertools.count(2)))
    found[next(label for label in labels if label not in found)] = value
