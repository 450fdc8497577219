"""Runs a drop-path to find out how often it drops, whether it drops whole batches, and how it scales.

Laws are cached. `drop_probe.py` runs a copy; `drop_code.py` refuses modules that may do what running them doesn't show.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from .drop_code import FoundFunctions, NoLaw, attributes_of, check_code, is_number
from .drop_probe import Probe, rows_dropped, seen_in, undisturbed


@dataclass(frozen=True)
class Law:
    """What a drop-path does in training: it sets rows to 0 with P(drop) and scales the others. Eval is the identity."""

    kind: type[nn.Module]
    forward: Any
    size: int
    """The number of entries in the `__dict__` of the module that was observed."""
    constants: tuple[tuple[str, Any], ...]
    """The attributes that aren't numbers. If one changes, the module is observed again."""
    attribute: str | None
    """The attribute with the rate; None if the drop-path never drops."""
    keeps: bool = False
    """Whether the attribute is P(keep)."""
    mode: str = "sample"
    scale_by_keep: bool = True
    code: FoundFunctions = field(default=(), compare=False, repr=False)
    """The functions that its forward calls."""

    def holds_for(self, module: nn.Module) -> bool:
        """Whether the law still holds for `module`. This is checked at every draw."""
        kind, found = type(module), module.__dict__
        if kind is not self.kind or kind.forward is not self.forward:
            return False
        if not torch.compiler.is_compiling():  # Dynamo may have no len
            if len(found) != self.size:
                return False
            for space, name, function in self.code:
                if space.get(name) is not function:
                    return False
        for name, value in self.constants:
            now = found[name] if name in found else getattr(module, name, None)
            if now is not value and (type(now) is not type(value) or now != value):
                return False
        if self.attribute is None:
            return True
        rate = found.get(self.attribute)
        return type(rate) is float or is_number(_number(module, self.attribute))

    def drop_prob(self, module: nn.Module) -> float:
        """P(drop), read from the module as it is now. Raises `ValueError` if it isn't a probability."""
        if self.attribute is None:
            return 0.0
        value = module.__dict__.get(self.attribute)
        if type(value) is not float:  # a buffer, or an attribute of the class
            value = float(_number(module, self.attribute))
        if not 0.0 <= value <= 1.0:
            raise ValueError(f"{self.attribute} of a {self.kind.__name__} must be between 0 and 1, it is {value}")
        return 1 - value if self.keeps else value

    def __deepcopy__(self, memo: object) -> Law:
        return self

    def __reduce__(self) -> tuple:
        # Functions can't always be pickled. A law without a forward holds for no module, so it is made again.
        fields = (self.kind, None, self.size, self.constants, self.attribute, self.keeps, self.mode, self.scale_by_keep)
        return Law, fields


_laws: dict[tuple, Law | str] = {}
_drops: dict[tuple, bool | None] = {}


def law_of(module: nn.Module, dims: int) -> Law | str:
    """The law of a drop-path that is called with tensors of `dims` dimensions, or why it has none.

    The law doesn't depend on the module's numbers. Modules that differ only in these are observed once.
    """
    if _is_identity(module):
        return Law(nn.Identity, nn.Identity.forward, len(module.__dict__), (), None)
    try:
        key = (*key_of(module), dims)
    except NoLaw as reason:
        return str(reason)
    law = _cached(_laws, key, lambda: _observe(module, dims))
    return replace(law, size=len(module.__dict__)) if isinstance(law, Law) else law


def known_law_of(module: nn.Module) -> Law | str:
    """The law of a drop-path for the first number of dimensions that it can be called with, or why it has none."""
    try:
        key = () if _is_identity(module) else key_of(module)
    except NoLaw as reason:
        return str(reason)
    found: Law | str = "it can't be called with a tensor of 2 to 5 dimensions"
    for dims in sorted((3, 4, 2, 5), key=lambda dims: (*key, dims) not in _laws):
        found = law_of(module, dims)
        if isinstance(found, Law):
            return found
    return found


def drops_rows(module: nn.Module) -> bool | None:
    """Whether `module` is seen to set whole rows to zero in training, now or with another number in an attribute.

    It is False if the module always does the same to its input, and None if it does neither or can't be observed.
    """
    try:
        key = key_of(module)
    except NoLaw:
        return None
    return _cached(_drops, key, lambda: _seen_dropping(module))


def drops_now(module: nn.Module) -> float | None:
    """The fraction of rows that a module without a law is seen to drop now; None if it can't be observed."""
    calls, rows = 256, 4
    with _probes(module) as probes:
        for probe in probes:
            with contextlib.suppress(Exception):
                dropped = [float((probe.run() == 0).flatten(1).all(1).sum()) for _ in range(calls)]
                return sum(dropped) / (calls * rows)
    return None


@contextlib.contextmanager
def _probes(module: nn.Module) -> Iterator[list[Probe]]:
    """Probes that call the module with tensors of 3, 4 and 2 dimensions; none if it can't be observed."""
    try:
        numbers, _ = attributes_of(module)
        check_code(type(module))
    except NoLaw:
        yield []
        return
    with undisturbed(type(module)):
        yield [Probe(module, dims, numbers) for dims in (3, 4, 2)]


def key_of(module: nn.Module) -> tuple:
    """A key that is equal for modules with the same law. Raises `NoLaw`."""
    kind = type(module)
    numbers, constants = attributes_of(module)
    code = tuple(function for _, _, function in check_code(kind))
    return kind, kind.forward, code, tuple(numbers), tuple((n, type(v), v) for n, v in constants.items())


def has_hooks(module: nn.Module) -> bool:
    """Whether a call of the module runs more than its forward."""
    found = module.__dict__
    return bool(
        found["_forward_hooks"] or found["_forward_pre_hooks"] or found["_backward_hooks"]
        or found["_backward_pre_hooks"]
    )  # fmt: skip


def kind_of(module: nn.Module) -> int:
    """A number that is equal for drop-paths that differ only in their numbers."""
    try:
        return hash(nn.Identity if _is_identity(module) else key_of(module))
    except NoLaw:
        return id(module)


def _is_identity(module: nn.Module) -> bool:
    return type(module) is nn.Identity and "forward" not in module.__dict__


def _cached(found: dict, key: tuple, make: Callable[[], Any]) -> Any:
    if key not in found:
        if len(found) >= 256:  # more kinds of modules than a program has
            found.clear()
        found[key] = make()
    return found[key]


def _number(module: nn.Module, name: str) -> Any:
    found = module.__dict__
    return found[name] if name in found else getattr(module, name, None)


def _observe(module: nn.Module, dims: int) -> Law | str:
    kind = type(module)
    try:
        code = check_code(kind)
        numbers, constants = attributes_of(module)
        with undisturbed(kind):
            seen = seen_in(Probe(module, dims, numbers))
        return Law(kind, kind.forward, len(module.__dict__), tuple(constants.items()), *seen, code=code)
    except NoLaw as reason:
        return str(reason)
    except Exception as error:
        return f"it raises {type(error).__name__} when it is tried on a tensor of {dims} dimensions: {error}"


def _seen_dropping(module: nn.Module) -> bool | None:
    with _probes(module) as probes:
        for probe in probes:
            settings: list[Any] = [contextlib.nullcontext(), *(probe.having(name, 0.5) for name in probe.numbers)]
            seen = []
            for setting in settings:
                with contextlib.suppress(Exception), setting:
                    seen.append(rows_dropped(probe))
            if any(s == "dropped" for s in seen):
                return True
            if seen and all(s == "a function" for s in seen):
                return False
    return None
