"""Finds differences between two values of any kind, such as the outputs of two forwards, and blocks that are alike."""

from __future__ import annotations

import types
from collections import deque
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from .libraries import is_drop_path

Close = Callable[[Tensor, Tensor], "str | None"]
"""Compares two tensors of one shape and dtype. Returns how they differ, such as "differs by 3", or None."""


def exactly(expected: Tensor, actual: Tensor) -> str | None:
    """Compares to the bit, except for the sign of zero; NaN is equal to NaN."""
    if torch.equal(expected, actual) or expected.numel() == 0:
        return None
    if not expected.is_floating_point():
        return f"differs from the original's in {int((expected != actual).sum())} elements"
    same = (expected == actual) | (expected.isnan() & actual.isnan())
    return None if bool(same.all()) else f"differs from the original's by {relative_difference(expected, actual):.1e}"


def rounded(dtype: torch.dtype, largest: float = 0.0) -> Close:
    """Allows for another order of sums: a few roundings of the largest element, or of `largest` if that is more, in the
    coarser of `dtype` and the tensor's own dtype."""

    def close(expected: Tensor, actual: Tensor) -> str | None:
        if exactly(expected, actual) is None:
            return None
        eps = max(torch.finfo(t).eps for t in (dtype, expected.dtype)) if expected.is_floating_point() else 0.0
        difference = relative_difference(expected, actual)
        allowed = ROUNDINGS * eps * max(1.0, largest / float(expected.abs().max().clamp_min(1.0)))
        return None if difference <= allowed else f"differs from the original's by {difference:.1e}"

    return close


def relative_difference(expected: Tensor, actual: Tensor) -> float:
    """The largest difference of elements, divided by the largest element or by 1, whichever is more."""
    expected, actual = expected.detach().double(), actual.detach().double()
    same = (expected == actual) | (expected.isnan() & actual.isnan())
    difference = (expected - actual).abs().masked_fill(same, 0.0)
    return float(difference.max() / expected.nan_to_num().abs().max().clamp_min(1.0))


class Differences:
    """Finds the first difference between two values, types and Python values included.

    It skips modules, functions and objects whose contents can't be seen.
    """

    def __init__(self, close: Close = exactly, requires_grad: bool = True):
        self._close = close
        self._asked = ("shape", "dtype", "device", *(["requires_grad"] if requires_grad else []))
        self._seen: dict[tuple[int, int], Any] = {}

    def between(self, name: str, expected: Any, actual: Any) -> str | None:
        """A sentence about `name` or a part of it; None where there is no difference."""
        key = (id(expected), id(actual))
        if expected is actual or key in self._seen or isinstance(expected, nn.Module):
            return None
        self._seen[key] = (expected, actual)  # kept, so that no other object gets the id
        if type(expected) is not type(actual):
            return f"{name} is of type {type(actual).__name__} instead of {type(expected).__name__}"
        if isinstance(expected, Tensor):
            return self._of_tensors(name, expected, actual)
        if isinstance(expected, torch.Generator):
            return self._close(expected.get_state(), actual.get_state()) and f"{name} was drawn from differently"
        if isinstance(expected, Mapping):
            return self._of_parts(name, "['{}']", dict(expected), dict(actual))
        if isinstance(expected, (list, tuple, deque)):
            return self._of_parts(name, "[{}]", dict(enumerate(expected)), dict(enumerate(actual)))
        if isinstance(expected, _CALLABLE):
            return None
        if hasattr(expected, "tobytes"):  # an array of numpy
            same = expected.tobytes() == actual.tobytes() and str(expected.dtype) == str(actual.dtype)
            return None if same else f"{name} differs from the original's"
        if isinstance(expected, _PLAIN):
            same = expected == actual or (expected != expected and actual != actual)
            return None if same else f"{name} is {actual!r} instead of {expected!r}"
        return self._of_parts(name, ".{}", *(getattr(value, "__dict__", {}) for value in (expected, actual)))

    def _of_tensors(self, name: str, expected: Tensor, actual: Tensor) -> str | None:
        for what in self._asked:
            wanted, got = getattr(expected, what), getattr(actual, what)
            if wanted != got:
                wanted, got = (list(v) if isinstance(v, torch.Size) else v for v in (wanted, got))
                return f"{name} has {what} {got} instead of {wanted}"
        found = self._close(expected.detach(), actual.detach())
        return found and f"{name} {found}"

    def _of_parts(self, name: str, place: str, expected: Mapping[Any, Any], actual: Mapping[Any, Any]) -> str | None:
        if list(expected) != list(actual):
            return f"{name} holds {list(actual)} instead of {list(expected)}"
        for part, value in expected.items():
            found = self.between(name + place.format(part), value, actual[part])
            if found:
                return found
        return None


_PLAIN = (int, float, complex, str, bytes, bool, type(None), set, frozenset, range, type, torch.dtype, torch.device)
_CALLABLE = (types.FunctionType, types.BuiltinFunctionType, types.MethodType)


def likeness(block: nn.Module, left_out: Collection[str] = ()) -> tuple[Any, ...]:
    """A hashable value that is equal for blocks that differ only in their weights and the rates of their drop-paths.
    Modules named in `left_out` don't count.

    The value holds types, shapes, which tensors and modules are shared, the attributes of modules, and the numbers in
    buffers except running statistics.
    """
    parts: list[Any] = []
    places: dict[int, int] = {}
    for path, module in block.named_modules(remove_duplicate=False):
        if path in left_out:
            continue
        parts.append((path, type(module), places.setdefault(id(module), len(places))))
        is_rate = is_drop_path(path.rpartition(".")[2], module)
        for name, value in module.__dict__.items():
            if name in ("_parameters", "_buffers", "_modules") or name.startswith("_rdp_"):
                continue
            if "_hooks" in name and isinstance(value, dict):
                parts.append((name, tuple(_seen(hook) for hook in value.values())))
            elif not (is_rate and _is_number(value)):
                parts.append((name, _seen(value)))
        for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is None:
                parts.append((name, None))
                continue
            place = places.setdefault(id(tensor), len(places))
            parts.append((name, place, tuple(tensor.shape), tensor.dtype, tensor.device, tensor.requires_grad))
            if name in module._buffers and not is_rate and not isinstance(module, _NormBase):
                parts.append(_seen(tensor))
    return tuple(parts)


def _is_number(value: Any) -> bool:
    return isinstance(value, (float, Tensor)) or (hasattr(value, "__float__") and not isinstance(value, int))


def _seen(value: Any) -> Any:
    """A hashable value. It compares constants, containers and small tensors by their contents, others by identity."""
    if isinstance(value, Tensor):
        if value.is_meta or value.numel() > _SMALL:
            return Tensor, id(value)
        return Tensor, value.dtype, tuple(value.shape), repr(value.detach().cpu().flatten().tolist())
    if isinstance(value, dict):
        return type(value), tuple((_seen(k), _seen(v)) for k, v in value.items())
    if isinstance(value, (list, tuple)):
        return type(value), tuple(map(_seen, value))
    if isinstance(value, (set, frozenset)):
        return type(value), frozenset(map(_seen, value))
    if isinstance(value, _PLAIN):
        return type(value), value if value == value else "nan"
    return type(value), id(value)


ROUNDINGS = 8
"""How many roundings of the largest element another order of sums may make: a pairwise sum of 256 terms makes 8."""
_SMALL = 100_000
"""Tensors with more elements aren't compared by their numbers, as writing these out is slow."""
