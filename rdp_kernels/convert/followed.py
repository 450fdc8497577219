"""The functions whose code a conversion followed: a block's forward, and what that names of its class and its module.

Tracing follows these and puts what they did into the converted class. Where one of them is replaced later, or has other
code in the process that loads a pickle, the converted class is out of date.
"""

from __future__ import annotations

import ast
import dis
import functools
import hashlib
import inspect
import textwrap
import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

_READS = {"LOAD_GLOBAL", "LOAD_ATTR", "LOAD_METHOD", "LOAD_SUPER_ATTR", "LOAD_SUPER_METHOD"}
_digests: dict[tuple[Any, ...], str] = {}


@dataclass(frozen=True)
class Followed:
    """Functions, each with the place where it was found: a class and an attribute, or a module's globals and a name."""

    methods: tuple[tuple[type, str, Any], ...]
    helpers: tuple[tuple[dict[str, Any], str, Any], ...]

    @classmethod
    def of(cls, kind: type[nn.Module]) -> Followed:
        methods: dict[tuple[type, str], Any] = {}
        if getattr(kind, "forward", None) is getattr(kind, "forward", None):  # not of a descriptor that makes new ones
            methods[kind, "forward"] = kind.forward
        helpers: dict[tuple[int, str], tuple[dict[str, Any], str, Any]] = {}
        stack = ["forward"]
        seen: set[str] = set()
        while stack:
            name = stack.pop()
            if name in seen:
                continue
            seen.add(name)
            for place, function in _methods(kind, name):
                methods[place, name] = getattr(place, name)
                _follow(function, stack, helpers)
        return cls(tuple((place, name, value) for (place, name), value in methods.items()), tuple(helpers.values()))

    def identities(self) -> tuple[Any, ...]:
        """Equal where all functions are the same objects."""
        return tuple(value for _, _, value in (*self.methods, *self.helpers))

    def replaced(self) -> str | None:
        """The name of a function that is another one now; None where all are what they were."""
        for kind, name, value in self.methods:
            if getattr(kind, name, None) is not value:
                return f"{kind.__name__}.{name}"
        for space, name, value in self.helpers:
            if space.get(name) is not value:
                return name
        return None

    def replaced_on(self, block: nn.Module) -> str | None:
        """The name of a method behind forward that the instance has in the place of its class's; None where there is
        none."""
        for _, name, _ in self.methods:
            if name != "forward" and name in block.__dict__:
                return name
        return None

    def digest(self) -> str:
        """Of the functions' source without comments, docstrings and annotations; empty where there is no source."""
        key = self.identities()
        if key not in _digests:
            found = [source(value) for value in key]
            known = bool(found) and found[0] != ""  # the forward's
            _digests[key] = hashlib.sha256("\n".join(sorted(found)).encode()).hexdigest() if known else ""
        return _digests[key]


def _methods(kind: type, name: str) -> Iterator[tuple[type, Any]]:
    """The functions called `name` of a class and its bases, for `super()`, but for torch's own."""
    for place in kind.__mro__:
        raw = place.__dict__.get(name)
        function = _plain(raw)
        # A class method is another object at every look.
        if isinstance(function, types.FunctionType) and not isinstance(raw, classmethod) and not _of_torch(place):
            yield place, function


def _plain(raw: Any) -> Any:
    """The function in a property or a static method."""
    return getattr(raw, "fget", None) or getattr(raw, "__func__", None) or raw


def _of_torch(thing: Any) -> bool:
    return (getattr(thing, "__module__", None) or "").partition(".")[0] in ("torch", "builtins")


def _follow(function: Any, stack: list[str], helpers: dict[tuple[int, str], tuple[dict[str, Any], str, Any]]) -> None:
    """Adds what a function names: methods to `stack`, functions of its module to `helpers`."""
    function = inspect.unwrap(function)
    if not isinstance(function, types.FunctionType):
        return
    space = function.__globals__
    for name, is_global in _names(function.__code__):
        if not is_global:
            stack.append(name)
        elif (id(space), name) not in helpers:
            value = space.get(name)
            if isinstance(value, types.FunctionType) and not _of_torch(value):
                helpers[id(space), name] = space, name, value
                _follow(value, stack, helpers)


@functools.lru_cache(1024)
def _names(code: types.CodeType) -> tuple[tuple[str, bool], ...]:
    """The names of globals and of attributes that a function's code reads; whether it is a global's."""
    found = {
        (instruction.argval, instruction.opname == "LOAD_GLOBAL"): None
        for instruction in dis.get_instructions(code)
        if instruction.opname in _READS
    }
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            found |= dict.fromkeys(_names(constant))
    return tuple(found)


def source(function: Any) -> str:
    """Normalised source, the same in all versions of Python as far as `ast.unparse` is; empty where there is none."""
    try:
        text = textwrap.dedent(inspect.getsource(_plain(function)))
    except (OSError, TypeError):
        return ""
    try:
        tree = ast.parse(text)
    except SyntaxError:  # a lambda within an expression
        return text
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            if ast.get_docstring(node) is not None:
                node.body = node.body[1:] or [ast.Pass()]
            node.returns = None
        elif isinstance(node, ast.arg):
            node.annotation = None
    return ast.unparse(tree)
