"""Python values that a traced forward relies on, and how they are looked at again before each call."""

from __future__ import annotations

import copy
import enum
import importlib
import numbers
import pickle
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .calls import CONSTANTS

_CONSTANTS = (*CONSTANTS, numbers.Number, enum.Enum, bytes, range, torch.memory_format, torch.layout)


class Missing(enum.Enum):
    """What stands for an attribute that there isn't."""

    MISSING = "not set"

    def __repr__(self) -> str:
        return self.value


MISSING = Missing.MISSING
KINDS = {
    "value": "{}",
    "present": "({} is not None)",
    "names": "tuple({}._modules)",
    "type": "type({}).__qualname__",
}
"""How each kind of guard reads what it compares."""


def is_constant(value: Any) -> bool:
    """Whether a value can be compared with `==` later and pickled: numbers, strings, types of torch, and containers."""
    named = isinstance(value, tuple) and hasattr(value, "_fields")
    if named or type(value) in (tuple, list, set, frozenset, torch.Size):
        return all(map(is_constant, value))
    if type(value) is dict:
        return all(map(is_constant, value)) and all(map(is_constant, value.values()))
    return isinstance(value, _CONSTANTS)


@dataclass(frozen=True)
class Guard:
    """One value, where it is found and what it was.

    Args:
        place: `"block"`; the name of a Python module; `"class"`, one among the block's; or `"closure"`, that of a
            function that the block's class holds.
        path: the names that lead to it. Of a block: of its submodules first, `num_modules` of them. Of a class: its
            qualified name and the attribute. Of a closure: the function's qualified name and the variable.
        kind: of `KINDS`. Of `"present"` the value is True.
    """

    place: str
    path: tuple[str, ...]
    value: Any
    num_modules: int = 0
    kind: str = "value"

    @classmethod
    def of(cls, place: str, path: Sequence[str], value: Any, num_modules: int = 0, kind: str = "value") -> Guard:
        """With a copy of the value, as lists and dicts may change in place."""
        return cls(place, tuple(path), copy.deepcopy(value), num_modules, kind)

    def __deepcopy__(self, memo: object) -> Guard:
        return self

    def difference(self, value: Any) -> str:
        name = ".".join(self.path)
        if self.place == "closure":
            name = f"the variable {self.path[-1]!r} of an enclosing function"
        elif self.place == "class":
            pass
        elif self.place == "block":
            name = f"its attribute {name!r}"
        else:
            name = f"{self.place}.{name}"
        if self.kind == "names" and value is not MISSING:
            return f"{name} held {', '.join(self.value)} when it was converted, and holds {', '.join(value)} now"
        if self.kind == "value":
            return f"{name} was {self.value!r} when it was converted"
        return f"{name} was another when it was converted"

    def expression(self, names: dict[str, Any], cells: Mapping[Any, types.CellType], base: type) -> str:
        """Python source that reads it; `names` takes what the source refers to."""

        def named(value: Any) -> str:
            names[f"_{len(names)}"] = value
            return list(names)[-1]

        if self.place == "closure":
            return f"{named(cells[self.path])}.cell_contents"
        if self.place == "block":
            text, rest = "self", self.path[self.num_modules :]
            text += "".join(f"._modules[{name!r}]" for name in self.path[: self.num_modules])
        elif self.place == "class":
            text, rest = named(next(kind for kind in base.__mro__ if kind.__qualname__ == self.path[0])), self.path[1:]
        else:
            text, rest = named(importlib.import_module(self.place)), self.path
        for name in rest[:-1]:
            text += f".{name}"
        if self.value is MISSING:
            return f"getattr({text}, {rest[-1]!r}, MISSING)"
        return KINDS[self.kind].format(f"{text}.{rest[-1]}" if rest else text)


class Found:
    """What was seen of a forward: guards, and the reasons to refuse it."""

    def __init__(self) -> None:
        self._guards: dict[tuple[Any, ...], Guard] = {}
        self.refusals: list[str] = []

    @property
    def guards(self) -> tuple[Guard, ...]:
        return tuple(self._guards.values())

    def guard(self, place: str, path: Sequence[str], value: Any, num_modules: int = 0, kind: str = "value") -> None:
        """As `Guard.of`; the first value of a place counts."""
        self._guards.setdefault((place, tuple(path), kind), Guard.of(place, path, value, num_modules, kind))

    def guard_of(self, place: str, path: Sequence[str], kind: str = "value") -> Guard | None:
        return self._guards.get((place, tuple(path), kind))

    def refuse(self, reason: str | None) -> None:
        """Notes a reason, if it is one."""
        if reason is not None:
            self.refusals.append(reason)


class Guards:
    """Guards of a class of blocks, made to be looked at as fast as Python can."""

    def __init__(self, guards: Sequence[Guard], base: type[nn.Module]):
        self._guards, self._names = guards, dict[str, Any](MISSING=MISSING)
        cells = dict(cells_of(base)) if any(guard.place == "closure" for guard in guards) else {}
        self._expressions = [guard.expression(self._names, cells, base) for guard in guards]
        tests = []
        for number, (guard, text) in enumerate(zip(guards, self._expressions, strict=True)):
            self._names |= {f"was{number}": guard.value, f"kind{number}": type(guard.value)}
            # With the type, as a tensor of one number equals that number.
            tests.append(f"((v := {text}) is was{number} or type(v) is kind{number} and v == was{number})")
        exec(f"def holds(self):\n    return {' and '.join(tests) or True}", self._names)
        self._holds: Callable[[nn.Module], bool] = self._names["holds"]

    def hold(self, block: nn.Module) -> bool:
        try:
            return self._holds(block)
        except (AttributeError, KeyError, ValueError):
            return False

    def first_difference(self, block: nn.Module) -> str:
        for guard, expression in zip(self._guards, self._expressions, strict=True):
            try:
                value = eval(expression, self._names, {"self": block})
            except (AttributeError, KeyError, ValueError):
                value = MISSING
            if type(value) is not type(guard.value) or value != guard.value:
                return guard.difference(value)
        raise AssertionError("all guards hold")


def functions_of(base: type) -> Iterator[types.FunctionType]:
    """The functions that a class holds, its bases' outside of torch among them, and those in their closures."""
    seen: set[int] = set()
    stack: list[Any] = [
        value
        for cls in base.__mro__
        if not cls.__module__.startswith("torch.") and cls is not object
        for value in vars(cls).values()
    ]
    while stack:
        value = stack.pop(0)
        value = getattr(value, "__func__", value)
        if isinstance(value, property):
            stack += [value.fget, value.fset]
        if not isinstance(value, types.FunctionType) or id(value) in seen:
            continue
        seen.add(id(value))
        yield value
        stack += [contents_of(cell) for cell in value.__closure__ or ()]


def cells_of(base: type) -> Iterator[tuple[tuple[str, str], types.CellType]]:
    for function in functions_of(base):
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
            yield (getattr(function.__code__, "co_qualname", function.__qualname__), name), cell


def can_be_pickled(value: Any) -> bool:
    """Whether a function or class is found again by its name."""
    try:
        return pickle.loads(pickle.dumps(value)) is value
    except Exception:
        return False


def contents_of(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not filled yet
        return None
