"""The findings on one model, and the precision in which it can be compared."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from rdp_kernels.convert import ConversionReport

CHECKS = ("keys", "eval", "masks", "pair", "copies")
PRECISIONS = {"float64": 1e-9, "parts in float32": 2e-5, "float32": 2e-4}
"""The relative tolerance for each: all in float64, parts that compute in float32 by themselves, or all in float32."""
FLOORS = {"float64": 1e-4, "parts in float32": 1.0, "float32": 1.0}
"""A difference is relative to the tensor's largest element. Where a gradient is zero except for rounding (of a bias before
a norm, or of attention's keys), it is relative to the largest element of all gradients times this factor."""

Inputs = Tensor | dict[str, Tensor]


class Difference(Exception):
    """A check failed; the message says how."""


@dataclass
class Measured:
    """The findings on one model."""

    report: ConversionReport
    failures: dict[str, str] = field(default_factory=dict)
    """Failed checks of `CHECKS`, with the first difference."""
    notes: list[str] = field(default_factory=list)
    """What was not measured."""
    precision: str = "float64"
    error: float = 0.0
    """The largest relative difference."""

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
