"""Makes Triton's interpreter compute as its compiler does, and makes it faster."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch


def faithful_cast(cast: Any) -> Any:
    """The interpreter's cast to bfloat16 truncates, and takes float64 for an integer; a GPU rounds."""
    import triton.language as tl

    def cast_impl(builder: Any, src: Any, dst_type: Any) -> Any:
        if dst_type.scalar != tl.bfloat16 or src.dtype.scalar not in (tl.float32, tl.float64):
            return cast(builder, src, dst_type)
        rounded = torch.as_tensor(src.data).to(torch.bfloat16).view(torch.int16).numpy().view("uint16")
        return type(src)(rounded, dst_type.scalar)

    return cast_impl


def remembered_builtins(patch_attribute: Any, is_builtin: Any) -> Any:
    """The interpreter lists Triton's language again for every function that a kernel calls, in a third of its time."""

    @functools.cache
    def names_in(package: Any) -> list[str]:
        return [name for name, member in inspect.getmembers(package) if is_builtin(member)]

    def patch_builtin(package: Any, builder: Any, scope: Any) -> None:
        for name in names_in(package):
            if is_builtin(member := getattr(package, name)):  # else it is patched already
                patch_attribute(package, name, member, builder, scope)

    return patch_builtin
