"""The functions whose code a conversion followed: a block's forward, and the methods and helpers that it names.

Tracing puts the operations of these functions into the converted class. That class is out of date if one of them is
replaced later, or has other code in the process that loads a pickle.
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

from .called import codes_in

_READS = {"LOAD_GLOBAL", "LOAD_ATTR", "LOAD_METHOD", "LOAD_SUPER_ATTR", "LOAD_SUPER_METHOD"}
_digests: dict[tuple[Any, ...], str] = {}


@dataclass(frozen=True)
class Followed:
    """Functions, each with the place where it was found.

    Args:
        methods: a class, the name of its attribute and the attribute's value.
        helpers: the globals of a Python module, a name in them and the function.
    """

    methods: tuple[tuple[type, str, Any], ...]
    helpers: tuple[tuple[dict[str, Any], str, Any], ...]

    @classmethod
    def of(cls, kind: type[nn.Module]) -> Followed:
        methods: dict[tuple[type, str], Any] = {}
        if getattr(kind, "forward", None) is getattr(kind, "forward", None):  # a descriptor may make new ones
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
        """A value that is equal if all functions are the same objects."""
        return tuple(value for _, _, value in (*self.methods, *self.helpers))

    def replaced(self) -> str | None:
        """The name of a function that was replaced; None if there is none."""
        for kind, name, value in self.methods:
            if getattr(kind, name, None) is not value:
                return f"{kind.__name__}.{name}"
        for space, name, value in self.helpers:
            if space.get(name) is not value:
                return name
        return None

    def replaced_on(self, block: nn.Module) -> str | None:
        """The name of a followed method, except `forward`, that the instance overrides; None if there is none."""
        return next((name for _, name, _ in self.methods if name != "forward" and name in block.__dict__), None)

    def digest(self) -> str:
        """A hash of the functions' source without comments, docstrings and annotations; "" if the forward has none."""
        key = self.identities()
        if key not in _digests:
            found = [source(value) for value in key]
            known = bool(found) and found[0] != ""  # the forward's
            _digests[key] = hashlib.sha256("\n".join(sorted(found)).encode()).hexdigest() if known else ""
        return _digests[key]


def _methods(kind: type, name: str) -> Iterator[tuple[type, Any]]:
    """The functions named `name` in a class and in its bases outside of torch, which `super()` may call."""
    for place in kind.__mro__:
        raw = place.__dict__.get(name)
        function = _plain(raw)
        # Reading a class method makes a new object each time.
        if isinstance(function, types.FunctionType) and not isinstance(raw, classmethod) and not _of_torch(place):
            yield place, function


def _plain(raw: Any) -> Any:
    """The function inside a property or a static method, else `raw` itself."""
    return getattr(raw, "fget", None) or getattr(raw, "__func__", None) or raw


def _of_torch(thing: Any) -> bool:
    return (getattr(thing, "__module__", None) or "").partition(".")[0] in ("torch", "builtins")


def _follow(function: Any, stack: list[str], helpers: dict[tuple[int, str], tuple[dict[str, Any], str, Any]]) -> None:
    """Adds the functions that a function names: methods to `stack`, functions of its module to `helpers`."""
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


@functools.lru_cache(1024)  # enough for the functions of a few models
def _names(code: types.CodeType) -> tuple[tuple[str, bool], ...]:
    """The names that a function's code reads, each with whether it is a global's or an attribute's."""
    read = (step for inner in codes_in(code) for step in dis.get_instructions(inner) if step.opname in _READS)
    return tuple(dict.fromkeys((step.argval, step.opname == "LOAD_GLOBAL") for step in read))


def source(function: Any) -> str:
    """Normalised source; empty if there is none. It is the same in all versions of Python in which `ast.unparse` is."""
    try:
        text = textwrap.dedent(inspect.getsource(_plain(function)))
    except (OSError, TypeError):
        return ""
    try:
        tree = ast.parse(text)
    except SyntaxError:  # a lambda inside an expression
        return text
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            if ast.get_docstring(node) is not None:
                node.body = node.body[1:] or [ast.Pass()]
            node.returns = None
        elif isinstance(node, ast.arg):
            node.annotation = None
    return ast.unparse(tree)
