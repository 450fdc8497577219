"""What is found on one model, and in which precision it can be compared."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from rdp_kernels.convert import ConversionReport

CHECKS = ("keys", "eval", "masks", "pair", "copies")
PRECISIONS = {"float64": 1e-9, "parts in float32": 2e-5, "float32": 2e-4}
"""The tolerance for each, relative: something may compute in float32 by itself, or everything has to."""
FLOORS = {"float64": 1e-4, "parts in float32": 1.0, "float32": 1.0}
"""A difference is relative to the tensor's largest element, or to that of all gradients times this, where a gradient is
zero but for rounding (that of a bias before a norm, or of attention's keys)."""

Inputs = Tensor | dict[str, Tensor]


class Difference(Exception):
    """Something isn't as it should be; the message says what."""


@dataclass
class Measured:
    """What was found on one model."""

    report: ConversionReport
    failures: dict[str, str] = field(default_factory=dict)
    """Of `CHECKS`, with the first difference that was seen."""
    notes: list[str] = field(default_factory=list)
    """What was not measured."""
    precision: str = "float64"
    error: float = 0.0
    """The largest difference, relative."""

    def note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)


def call(net: nn.Module, inputs: Inputs) -> Any:
    return net(**inputs) if isinstance(inputs, Mapping) else net(inputs)


def mapped(inputs: Inputs, function: Callable[[Tensor], Tensor]) -> Inputs:
    if isinstance(inputs, Mapping):
        return {name: function(t) for name, t in inputs.items()}
    return function(inputs)


def tensors_of(value: Any) -> list[Tensor]:
    """All floating-point tensors in what a model returns."""
    if isinstance(value, Tensor):
        return [value] if value.is_floating_point() else []
    if isinstance(value, Mapping):
        return [t for item in value.values() for t in tensors_of(item)]
    if isinstance(value, (list, tuple)):
        return [t for item in value for t in tensors_of(item)]
    return tensors_of(vars(value)) if hasattr(value, "__dataclass_fields__") else []
