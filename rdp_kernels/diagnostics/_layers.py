"""What the layers of a model are in a forward: the states of its stream, or what its paths add."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .observe import Pieces, forward, observing

T = TypeVar("T")

OF = ("stream", "branch")
"""The stream before the first path ("input") and after each path; what each path adds to it."""


def layers_of(model: nn.Module, batch: Any, of: str, look: Callable[[Tensor], T]) -> dict[str, T]:
    """`look` of each layer in one forward, by label, in the order of the calls.

    `look` gets tensors that what follows in the model may write to, of the shape that the path has them in. Raises
    `ValueError` where no path is called.
    """
    found: dict[str, T] = {}

    def on_call(call: Pieces) -> None:
        if of == "stream" and not found:
            put(found, "input", look(call.x))
        put(found, call.name, look(call.out if of == "stream" else call.branch))

    run(model, batch, on_call)
    return found


def run(model: nn.Module, batch: Any, on_call: Callable[[Pieces], None]) -> None:
    """One forward without gradients, on which `on_call` looks. Raises `ValueError` where no path is called."""
    calls = 0

    def counting(call: Pieces) -> None:
        nonlocal calls
        calls += 1
        on_call(call)

    with torch.no_grad(), observing(model, counting):
        forward(model, batch)
    if not calls:
        raise ValueError("model calls none of its paths on these batches: does its forward use them?")


def put(found: dict[str, T], name: str, value: T) -> None:
    """Under `name`; what a name has again, in a second call of a path, is `name#2`."""
    label, count = name, 1
    while label in found:
        count += 1
        label = f"{name}#{count}"
    found[label] = value


def same_labels(before: tuple[str, ...] | None, found: dict[str, T]) -> tuple[str, ...]:
    """Those of `found`. Raises `ValueError` where the batch before had others."""
    labels = tuple(found)
    if before not in (None, labels):
        raise ValueError(
            f"model must call the same paths on every batch, got {list(labels)} after {list(before or ())}"
        )
    return labels


def none_given() -> ValueError:
    return ValueError("batches must hold at least one batch, got none")
