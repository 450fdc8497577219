"""Makes Triton's interpreter compute as its compiler does, and makes it faster."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import pytest
import torch


def improve(patch: pytest.MonkeyPatch) -> None:
    from triton.language.core import is_builtin
    from triton.runtime import interpreter

    builder, function = interpreter.InterpreterBuilder, interpreter.InterpretedFunction
    patch.setattr(builder, "cast_impl", faithful_cast(builder.cast_impl))
    patch.setattr(interpreter, "_get_np_dtype", remembered_dtypes(interpreter._get_np_dtype))
    patch.setattr(interpreter, "_patch_builtin", remembered_builtins(interpreter._patch_attr, is_builtin))
    patch.setattr(function, "__call__", called_in_a_kernel(interpreter._patch_lang))


def faithful_cast(cast: Any) -> Any:
    """The interpreter's cast to bfloat16 truncates, and takes float64 for an integer; a GPU rounds."""
    import triton.language as tl

    def cast_impl(builder: Any, src: Any, dst_type: Any) -> Any:
        if dst_type.scalar != tl.bfloat16 or src.dtype.scalar not in (tl.float32, tl.float64):
            return cast(builder, src, dst_type)
        rounded = torch.as_tensor(src.data).to(torch.bfloat16).view(torch.int16).numpy().view("uint16")
        return type(src)(rounded, dst_type.scalar)

    return cast_impl


def remembered_dtypes(dtype_of: Any) -> Any:
    """The interpreter makes a table of all dtypes for every look into it."""
    found: dict[str, Any] = {}

    def get(kind: Any) -> Any:
        name = kind.scalar.name
        if name not in found:
            found[name] = dtype_of(kind)
        return found[name]

    return get


def remembered_builtins(patch_attribute: Any, is_builtin: Any) -> Any:
    """The interpreter lists Triton's language again for every kernel."""

    @functools.cache
    def names_in(package: Any) -> list[str]:
        return [name for name, member in inspect.getmembers(package) if is_builtin(member)]

    def patch_builtin(package: Any, builder: Any, scope: Any) -> None:
        for name in names_in(package):
            if is_builtin(member := getattr(package, name)):  # else it is patched already
                patch_attribute(package, name, member, builder, scope)

    return patch_builtin


def called_in_a_kernel(patch_language: Any) -> Any:
    """A kernel's call of another function. The interpreter patches Triton's language for each such call, though the
    kernel's own patches hold, and what they lack (`triton.language.core`, for `tl.sum` and its like) stays patched."""
    modules = set()

    def call(function: Any, *args: Any, **kwargs: Any) -> Any:
        if function.fn.__module__ not in modules:
            patch_language(function.fn)
            modules.add(function.fn.__module__)
        return function.rewrite()(*args, **kwargs)

    return call
