"""Finds what running a drop-path doesn't show: attributes that others may change, and values that its code reads."""

from __future__ import annotations

import dis
import enum
import inspect
import numbers
import types
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .called import classes_of, codes_in

_BASE = frozenset(nn.Module().__dict__) | {"_is_replica", "_former_parameters", "_is_hf_initialized"}
"""Entries of a module's `__dict__` that don't change what its forward does."""
_CONSTANTS = (bool, str, bytes, type(None), enum.Enum, torch.dtype, torch.device, torch.layout, torch.memory_format)
_HARMLESS = (types.ModuleType, type, types.BuiltinFunctionType, types.BuiltinMethodType, torch.jit.ScriptFunction)
_TRUSTED = {"torch", "math", "numpy", "random", "operator", "functools", "typing", "warnings", "rdp_kernels"}
"""Packages whose functions are assumed to always do the same."""


class NoLaw(Exception):
    """A module isn't a drop-path that can be followed. The message is for users and calls the module "it"."""


def is_number(value: Any) -> bool:
    """Whether a value can be a rate: `float(value)` gives a number, and the value isn't a bool or str."""
    if isinstance(value, (float, int)):
        return not isinstance(value, bool)
    if isinstance(value, Tensor):
        real = value.dtype != torch.bool and not value.is_complex()
        return real and value.numel() == 1 and not value.is_meta and not value.requires_grad
    return isinstance(value, numbers.Real) or (
        type(value).__module__ == "numpy" and getattr(value, "size", 0) == 1 and value.dtype.kind in "fiu"
    )


def attributes_of(module: nn.Module) -> tuple[dict[str, Any], dict[str, Any]]:
    """The numbers and the constants that a module, its buffers or its classes have, by name. Raises `NoLaw` if it has
    other attributes."""
    if "forward" in module.__dict__:
        raise NoLaw("its forward was replaced on the instance")
    if any(child is not None for child in module._modules.values()):
        raise NoLaw("it holds other modules")
    if any(p is not None for p in module._parameters.values()):
        raise NoLaw("it has parameters")
    found_numbers, constants = dict[str, Any](), dict[str, Any]()
    own = {name: value for name, value in module.__dict__.items() if name not in _BASE}
    held = dict[str, Any]()
    for cls in reversed(classes_of(type(module))):  # without the methods
        held |= {name: v for name, v in vars(cls).items() if not name.startswith("__") and not hasattr(v, "__get__")}
    for name, value in (held | own | module._buffers).items():
        if is_number(value):
            found_numbers[name] = value
        elif _is_constant(value):
            constants[name] = value
        elif name in own or name in module._buffers:
            meta = isinstance(value, Tensor) and value.is_meta
            what = "has no numbers" if meta else "may be shared with others and change"
            raise NoLaw(f"its attribute {name!r} ({type(value).__name__}) {what}")
    return found_numbers, constants


def _is_constant(value: Any) -> bool:
    return all(map(_is_constant, value)) if type(value) in (tuple, torch.Size) else isinstance(value, _CONSTANTS)


def reads_training(kind: type[nn.Module]) -> bool:
    """Whether a method of the class reads an attribute named `training`."""
    methods = [f for cls in classes_of(kind) for f in vars(cls).values() if isinstance(f, types.FunctionType)]
    codes = [code for method in map(inspect.unwrap, methods) for code in codes_in(method.__code__)]  # type: ignore[attr-defined]
    return any("training" in code.co_names for code in codes)


FoundFunctions = tuple[tuple[Mapping[str, Any], str, Any], ...]
"""Functions, each with the namespace and the name that it is found by: the globals of a file, or a class."""


def check_code(kind: type[nn.Module]) -> FoundFunctions:
    """The Python functions that a drop-path's forward calls. Raises `NoLaw` if the forward or one of these functions
    reads something that may change: a number or an object of its file, its class or an enclosing function. Code of
    torch is trusted."""
    if kind.__call__ is not nn.Module.__call__:
        raise NoLaw("its class has a __call__ of its own")
    if kind.__getattr__ is not nn.Module.__getattr__ or kind.__getattribute__ is not nn.Module.__getattribute__:
        raise NoLaw("its class makes attributes by a method of its own")
    seen: dict[Any, Any] = {}
    _check_value("its forward", kind.forward, kind, seen)
    return tuple(place for place in seen.values() if place is not None)


def _check_function(function: types.FunctionType, kind: type, seen: dict[Any, Any]) -> None:
    if function in seen or function.__module__.partition(".")[0] in _TRUSTED:
        return
    seen[function] = None
    for value in (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()):
        if not _is_constant(value) and not is_number(value):
            _check_value("a default of its arguments", value, kind, seen)
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            _check_value(repr(name), cell.cell_contents, kind, seen)
        except ValueError:  # an empty cell
            continue
    for code in codes_in(function.__code__):
        for names in _reads(code):
            _check_name(names, function, kind, seen)


def _reads(code: types.CodeType) -> Iterator[list[str]]:
    """The names that code reads: a global and its attributes, or "." and the name of an attribute of any other object.
    Raises `NoLaw` for assignments to globals."""
    names: list[str] = []
    for step in dis.get_instructions(code):
        if step.opname in ("STORE_GLOBAL", "DELETE_GLOBAL"):
            raise NoLaw(f"its code changes {step.argval!r}, which is outside of the module")
        if step.opname == "LOAD_GLOBAL":
            yield names
            names = [step.argval]
        elif step.opname in ("LOAD_ATTR", "LOAD_METHOD", "LOAD_SUPER_ATTR", "LOAD_SUPER_METHOD"):
            names = [*names, step.argval] if names else [".", step.argval]
            if names[0] == ".":
                yield names
                names = []
        elif step.opname not in ("CACHE", "EXTENDED_ARG", "PUSH_NULL", "PRECALL"):
            yield names
            names = []
    yield names


def _check_name(names: list[str], function: types.FunctionType, kind: type, seen: dict[Any, Any]) -> None:
    if not names:
        return
    first, *rest = names
    if first == ".":  # perhaps an attribute of self
        for cls in classes_of(kind):
            value = vars(cls).get(rest[0])
            if value is not None and not is_number(value) and not _is_constant(value):
                seen[cls, rest[0]] = vars(cls), rest[0], value
                _check_value(f"{rest[0]!r} of its class", value, kind, seen)
        return
    space, last = function.__globals__, first
    value = space.get(first)
    for name in rest:
        if isinstance(value, types.ModuleType) and value.__name__.partition(".")[0] in _TRUSTED:
            return
        if not isinstance(value, (types.ModuleType, type)):
            break
        space, last, value = vars(value), name, getattr(value, name, None)
    if isinstance(value, types.FunctionType) and space.get(last) is value:
        seen[id(space), last] = space, last, value
    _check_value(repr(".".join(names)), value, kind, seen)


def _check_value(what: str, value: Any, kind: type, seen: dict[Any, Any]) -> None:
    while hasattr(value, "__wrapped__") and not isinstance(value, type):
        if isinstance(value, types.FunctionType):
            _check_function(value, kind, seen)
        value = value.__wrapped__
    if isinstance(value, (staticmethod, classmethod)):
        value = value.__func__
    if isinstance(value, property):
        value = value.fget
    if isinstance(value, types.FunctionType):
        _check_function(value, kind, seen)
        return
    of = value.__self__ if isinstance(value, types.MethodType) else value
    module = type(of).__module__.partition(".")[0]
    of_torch = module == "torch" and not isinstance(of, (Tensor, torch.Generator, nn.Module))
    if isinstance(value, _HARMLESS) or of_torch or module == "typing":
        return
    if _is_constant(value) and not isinstance(value, bool):
        return
    raise NoLaw(f"its code reads {what} ({type(value).__name__}), which is outside of the module and may change")
