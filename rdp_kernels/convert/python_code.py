"""Reads the code of a forward to find the globals, variables of enclosing functions and attributes that it names."""

from __future__ import annotations

import contextlib
import dis
import enum
import importlib.util
import itertools
import logging
import os
import sys
import types
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .called import codes_in, library_of, of_user
from .guards import Findings, can_be_pickled, cells_of, contents_of, functions_of, is_constant
from .snapshot import CONTAINERS

_FIXED = (types.FunctionType, types.BuiltinFunctionType, types.ModuleType, type)
"""Variables of enclosing functions with values of these types are assumed not to change."""
_HARMLESS = (type(None), types.ModuleType, logging.Logger, nn.Module, enum.Enum)


@dataclass
class RanCode:
    """The Python code that ran while a forward was traced, and what it may read."""

    codes: dict[types.CodeType, dict[str, Any]] = field(default_factory=dict)
    """The code of the user's functions, with their globals."""
    variables: list[tuple[types.CodeType, str, Any]] = field(default_factory=list)
    """The variables of enclosing functions that these functions read: the reader's code, the name and the value."""
    holders: list[Any] = field(default_factory=list)
    """Classes, modules and functions whose attributes may be read."""
    children: list[tuple[str, ...]] = field(default_factory=list)
    """The names that lead to the block's modules that were read."""


class CodeReader:
    """Reads the code of all functions that ran. A value that may be another later becomes a guard or a refusal.

    Args:
        block: the block whose forward was traced.
        run: the code that ran.
        found: takes the guards and refusals.
        several_inputs: whether the forward is called with more than one tensor.
    """

    def __init__(self, block: nn.Module, run: RanCode, found: Findings, several_inputs: bool):
        self._block, self._ran, self._findings, self._several_inputs = block, run, found, several_inputs

    def read(self) -> None:
        for function in functions_of(type(self._block)):
            self._see_defaults(function)
        read, written = set[str](), set[str]()
        for code, space in self._ran.codes.items():
            if f"{os.sep}numpy{os.sep}" in code.co_filename:
                continue
            self._read_globals(code, space)
            self._read_closure(code)
            names = _attributes_in(code)
            read |= names[0]
            written |= names[1]
            self._ran.holders += _imported_in(code, space)
            self._ran.holders += [space[name] for name in names_in(code) if name in space]
            if "__class__" in code.co_freevars or {"type", "__class__"} & set(code.co_names):
                self._ran.holders += [type(module) for module in self._block.modules()]
        self._ran.holders += [value for _, _, value in self._ran.variables]
        self._read_holders(read, written)

    def _read_holders(self, read: set[str], written: set[str]) -> None:
        """Looks at attributes of classes, modules and functions, whatever variable leads to them."""
        seen: set[int] = set()
        while self._ran.holders:
            holder = self._ran.holders.pop()
            if id(holder) in seen or not _is_holder(holder):
                continue
            seen.add(id(holder))
            if isinstance(holder, type):
                self._ran.holders += holder.__mro__
            for name, value in list(vars(holder).items()):
                if name in written and not _is_of_blocks(holder, self._block):
                    self._findings.refuse(f"its forward sets {name!r} of {holder.__name__}")
                if name not in read or name.startswith("__"):
                    continue
                if _is_holder(value):
                    self._ran.holders.append(value)
                elif is_constant(value) and not isinstance(value, enum.Enum):
                    self._guard_held(holder, name, value)
                elif not (callable(value) or hasattr(value, "__get__") or isinstance(value, _HARMLESS)):
                    what = f"{name!r} of {holder.__name__} ({type(value).__name__})"
                    self._findings.refuse(f"its forward may read {what}, whose contents may change")

    def _guard_held(self, holder: Any, name: str, value: Any) -> None:
        if isinstance(holder, types.ModuleType):
            place: str = holder.__name__
            path: tuple[str, ...] = (name,)
            known = sys.modules.get(place) is holder
        elif holder in type(self._block).__mro__:
            place, path, known = "class", (holder.__qualname__, name), True
        else:
            place, path, known = holder.__module__, (*holder.__qualname__.split("."), name), can_be_pickled(holder)
        if known:
            self._findings.guard(place, path, value)
        else:
            self._findings.refuse(f"it may read {name!r} of {holder.__name__}, which can't be imported by name")

    def _see_defaults(self, function: types.FunctionType) -> None:
        defaults = (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values())
        if function.__code__ not in self._ran.codes:
            return
        for value in defaults:
            fixed = is_constant(value) or callable(value) or isinstance(value, (*_HARMLESS, Tensor))
            if isinstance(value, (list, dict, set)) or not fixed:
                self._findings.refuse(
                    f"{function.__name__} has a default argument of type {type(value).__name__}, which may change"
                )

    def _read_globals(self, code: types.CodeType, space: dict[str, Any]) -> None:
        instructions = list(dis.get_instructions(code))
        for place, instruction in enumerate(instructions):
            name = instruction.opname
            if name in ("BEFORE_WITH", "SETUP_WITH") or (
                name == "LOAD_SPECIAL" and "enter" in str(instruction.argrepr)
            ):
                self._findings.refuse(f"{code.co_name} has a with statement, which a graph doesn't have")
            elif name in ("LOAD_ATTR", "LOAD_METHOD") and instruction.argval in ("__setattr__", "__delattr__"):
                self._findings.refuse(f"{code.co_name} calls {instruction.argval}, which would not be called again")
            elif name == "IS_OP" and self._several_inputs and _are_locals(instructions[max(place - 2, 0) : place]):
                self._findings.refuse(
                    f"{code.co_name} compares two variables by `is`; later calls don't check whether two arguments are "
                    "one object"
                )
            elif name in ("STORE_DEREF", "DELETE_DEREF") and instruction.argval in code.co_freevars:
                if not any(_holds(other, code) for other in self._ran.codes if other is not code):
                    self._findings.refuse(f"{code.co_name} assigns to {instruction.argval!r} of an enclosing function")
            elif name in ("STORE_GLOBAL", "DELETE_GLOBAL"):
                self._findings.refuse(f"{code.co_name} assigns to the global {instruction.argval!r}")
            elif name == "LOAD_GLOBAL" and instruction.argval in ("isinstance", "type", "issubclass"):
                for path in self._ran.children:
                    child = self._block.get_submodule(".".join(path))
                    self._findings.guard("block", path, type(child).__qualname__, len(path), "type")
            elif name in ("LOAD_GLOBAL", "LOAD_NAME") and instruction.argval in space:
                self._follow(code, space, [str(instruction.argval), *_attributes(instructions[place + 1 :])])

    def _follow(self, code: types.CodeType, space: dict[str, Any], names: list[str]) -> None:
        """Looks at a global and at the attributes that are read from it."""
        value, path = space[names[0]], names[:1]
        for name in names[1:]:
            if isinstance(value, types.ModuleType) and _is_library(value):
                found = getattr(value, name, None)
                if isinstance(found, types.BuiltinFunctionType | types.FunctionType):
                    value, path = found, [*path, name]
                    break
                if value.__name__.partition(".")[0] in ("numpy", "os", "sys") and name in ("random", "environ", "argv"):
                    self._findings.refuse(f"{code.co_name} reads {value.__name__}.{name}")
                return
            kept = value if isinstance(value, (types.ModuleType, type)) else None
            if kept is None and (isinstance(value, types.FunctionType) or name not in getattr(value, "__dict__", {})):
                break
            value = getattr(value, name, None)
            path.append(name)
        module = space.get("__name__")
        if isinstance(value, types.BuiltinFunctionType | types.FunctionType):
            self._see_function(code, value, path, module)
        elif isinstance(value, enum.Enum):
            pass
        elif is_constant(value):
            if not isinstance(module, str) or sys.modules.get(module) is None or vars(sys.modules[module]) is not space:
                self._findings.refuse(
                    f"{code.co_name} reads the global {'.'.join(path)!r} of a module that isn't imported"
                )
                return
            self._findings.guard(module, path, value)
        elif not (callable(value) or isinstance(value, (types.ModuleType, logging.Logger)) or value is torch):
            self._findings.refuse(
                f"{code.co_name} reads the global {'.'.join(path)!r} ({type(value).__name__}), which may change"
            )

    def _see_function(self, code: types.CodeType, function: Any, path: list[str], module: Any) -> None:
        """Guards a function that may be replaced in its module. `followed.py` compares those called by one name."""
        if isinstance(function, types.FunctionType):
            self._see_defaults(function)
            if len(path) == 1:
                return
        known = isinstance(module, str) and vars(sys.modules.get(module, torch)).get(path[0]) is not None
        if known and can_be_pickled(function):
            self._findings.guard(module, path, function)

    def _read_closure(self, code: types.CodeType) -> None:
        held = [(name, value) for other, name, value in self._ran.variables if other is code]
        names = [name for name in code.co_freevars if any(n == name and not isinstance(v, _FIXED) for n, v in held)]
        if not names or any(_holds(other, code) for other in self._ran.codes if other is not code):
            return  # the enclosing function ran too, so that its variables belong to the trace
        cells = dict(cells_of(type(self._block)))
        function = getattr(code, "co_qualname", code.co_name)  # Python 3.10 has no co_qualname
        for name in names:
            path = (function, name)
            value = contents_of(cells[path]) if path in cells else None
            several = len({id(value) for n, value in held if n == name}) > 1  # functions with this code
            if several or path not in cells:
                self._findings.refuse(f"{code.co_name} reads {name!r} of an enclosing function")
            elif is_constant(value):
                self._findings.guard("closure", path, value)
            elif not callable(value) and not isinstance(value, types.ModuleType):
                self._findings.refuse(
                    f"{code.co_name} reads {name!r} of an enclosing function ({type(value).__name__}), which may change"
                )


def global_containers(base: type) -> Iterator[tuple[str, Any]]:
    """Lists, dicts and sets, with their names, that functions of a class may reach, or functions that these call:
    globals, variables of enclosing functions and default arguments."""
    seen: set[types.CodeType] = set()
    stack: list[types.FunctionType] = list(functions_of(base))
    while stack:
        function = stack.pop()
        if function.__code__ in seen or not of_user(function.__code__):
            continue
        seen.add(function.__code__)
        held = [(name, function.__globals__.get(name)) for name in names_in(function.__code__)]
        held += zip(function.__code__.co_freevars, map(contents_of, function.__closure__ or ()), strict=True)
        held += [("a default argument", value) for value in function.__defaults__ or ()]
        for name, value in held:
            if isinstance(value, types.FunctionType):
                stack.append(value)
            elif type(value) in CONTAINERS:
                yield name, value


def names_in(code: types.CodeType) -> set[str]:
    return {name for inner in codes_in(code) for name in inner.co_names}


def class_of_user(cls: type) -> bool:
    file = getattr(sys.modules.get(cls.__module__), "__file__", None)
    return cls.__module__ != "builtins" and (file is None or library_of(file) == "user")


def _attributes(instructions: list[dis.Instruction]) -> Iterator[str]:
    """The attributes that the first instructions read, each from the one before."""
    reads = itertools.takewhile(lambda read: read.opname in ("LOAD_ATTR", "LOAD_METHOD"), instructions)
    return (str(read.argval) for read in reads)


def _is_holder(value: Any) -> bool:
    """Whether a value is a class, a Python module or a function of the user."""
    if isinstance(value, types.FunctionType):
        return of_user(value.__code__)
    if isinstance(value, types.ModuleType):
        return not _is_library(value)
    return isinstance(value, type) and class_of_user(value) and not issubclass(value, (enum.Enum, tuple))


def _is_of_blocks(holder: Any, block: nn.Module) -> bool:
    """Whether a holder is the class of a module in the block. `watch.py` compares the attributes of these classes."""
    return isinstance(holder, type) and any(isinstance(module, holder) for module in block.modules())


def _attributes_in(code: types.CodeType) -> tuple[set[str], set[str]]:
    """The names of attributes that code reads and sets. With `getattr` and the like, all its strings count."""
    found = list(dis.get_instructions(code))
    reads = ("LOAD_ATTR", "LOAD_METHOD", "LOAD_SUPER", "IMPORT_FROM")
    read = {str(i.argval) for i in found if i.opname.startswith(reads)}
    written = {str(i.argval) for i in found if i.opname in ("STORE_ATTR", "DELETE_ATTR")}
    strings = {constant for constant in code.co_consts if isinstance(constant, str)}
    if {"getattr", "hasattr", "attrgetter"} & set(code.co_names):
        read |= strings
    if {"setattr", "delattr"} & set(code.co_names):
        written |= strings
    return read, written


def _imported_in(code: types.CodeType, space: dict[str, Any]) -> Iterator[Any]:
    """The modules that a function imports when it is called."""
    for place, instruction in enumerate(instructions := list(dis.get_instructions(code))):
        if instruction.opname == "IMPORT_NAME":
            level = instructions[place - 2].argval
            name = "." * (level if isinstance(level, int) else 0) + str(instruction.argval)
            with contextlib.suppress(ImportError):
                full = importlib.util.resolve_name(name, space.get("__package__"))
                yield sys.modules.get(full)
                yield sys.modules.get(full.partition(".")[0])


def _are_locals(loads: list[dis.Instruction]) -> bool:
    """Whether the last two values that were loaded are local variables. One instruction may load two."""
    names = [i.opname for i in loads]
    return names[-1].count("LOAD_FAST") > 1 or all(name.startswith("LOAD_FAST") for name in names)


def _holds(outer: types.CodeType, inner: types.CodeType) -> bool:
    return any(code is inner for code in codes_in(outer))


def _is_library(module: types.ModuleType) -> bool:
    file = getattr(module, "__file__", None)
    return file is None or library_of(file) != "user" or module.__name__.partition(".")[0] == "numpy"
