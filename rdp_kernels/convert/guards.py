"""Guards: Python values that a traced forward relies on, which are compared again before each call."""

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

from .called import classes_of
from .calls import CONSTANTS

_CONSTANTS = (*CONSTANTS, numbers.Number, enum.Enum, bytes, range, torch.memory_format, torch.layout)


class Missing(enum.Enum):
    """The value that a guard has where an attribute doesn't exist."""

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
"""How each kind of guard reads the value that it compares."""


def is_constant(value: Any) -> bool:
    """Whether a value can be pickled and compared by `==`: numbers, strings, dtypes and the like, in containers too."""
    named = isinstance(value, tuple) and hasattr(value, "_fields")
    if named or type(value) in (tuple, list, set, frozenset, torch.Size):
        return all(map(is_constant, value))
    if type(value) is dict:
        return all(map(is_constant, value)) and all(map(is_constant, value.values()))
    return isinstance(value, _CONSTANTS)


@dataclass(frozen=True)
class Guard:
    """The place of one value, and what the value was.

    Args:
        place: `"block"`, the name of a Python module, `"class"` for a class among the block's, or `"closure"` for a
            variable that encloses a function of the block's class.
        path: the names that lead to the value. In a block, `num_modules` names of submodules come first. In a class
            they are the class's qualified name and the attribute, in a closure the function's qualified name and the
            variable.
        value: what was found at the conversion; True for the kind `"present"`.
        num_modules: how many names of the path are those of submodules.
        kind: one of `KINDS`.
    """

    place: str
    path: tuple[str, ...]
    value: Any
    num_modules: int = 0
    kind: str = "value"

    def __deepcopy__(self, memo: object) -> Guard:
        return self

    def difference(self, value: Any) -> str:
        name = ".".join(self.path)
        if self.place == "closure":
            name = f"the variable {self.path[-1]!r} of an enclosing function"
        elif self.place == "block":
            name = f"its attribute {name!r}"
        elif self.place != "class":
            name = f"{self.place}.{name}"
        if self.kind == "names" and value is not MISSING:
            return f"{name} held {', '.join(self.value)} when it was converted, and holds {', '.join(value)} now"
        if self.kind == "value":
            return f"{name} was {self.value!r} when it was converted"
        return f"{name} was another object when it was converted"

    def expression(self, names: dict[str, Any], cells: Mapping[Any, types.CellType], base: type) -> str:
        """Python source that reads the value. The objects that the source refers to are added to `names`."""

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


class Findings:
    """The guards of a forward, and the reasons to refuse it."""

    def __init__(self) -> None:
        self._guards: dict[tuple[Any, ...], Guard] = {}
        self.refusals: list[str] = []

    @property
    def guards(self) -> tuple[Guard, ...]:
        return tuple(self._guards.values())

    def guard(self, place: str, path: Sequence[str], value: Any, num_modules: int = 0, kind: str = "value") -> None:
        """Adds a guard with a copy of the value, which may change in place, unless this place and kind have a guard."""
        copied = copy.deepcopy(value)
        self._guards.setdefault((place, tuple(path), kind), Guard(place, tuple(path), copied, num_modules, kind))

    def guard_of(self, place: str, path: Sequence[str], kind: str = "value") -> Guard | None:
        return self._guards.get((place, tuple(path), kind))

    def refuse(self, reason: str | None) -> None:
        """Adds a reason. None adds nothing."""
        if reason is not None:
            self.refusals.append(reason)


class Guards:
    """The guards of a class of blocks, compiled into one function because every call checks them."""

    def __init__(self, guards: Sequence[Guard], base: type[nn.Module]):
        self._guards, self._names = guards, dict[str, Any](MISSING=MISSING)
        cells = dict(cells_of(base)) if any(guard.place == "closure" for guard in guards) else {}
        self._expressions = [guard.expression(self._names, cells, base) for guard in guards]
        tests = []
        for number, (guard, text) in enumerate(zip(guards, self._expressions, strict=True)):
            self._names |= {f"was{number}": guard.value, f"kind{number}": type(guard.value)}
            # The type is compared too, as a tensor of one number equals that number.
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
    """The functions of a class and of its bases outside of torch, and the functions in their closures."""
    seen: set[int] = set()
    stack: list[Any] = [value for cls in classes_of(base) for value in vars(cls).values()]
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
    """Whether unpickling a function or class finds the same object by its name."""
    try:
        return pickle.loads(pickle.dumps(value)) is value
    except Exception:
        return False


def contents_of(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not filled yet
        return None
