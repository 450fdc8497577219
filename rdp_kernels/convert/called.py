"""Tells which calls in a forward's own code a graph can't repeat, and why."""

from __future__ import annotations

import functools
import os
import re
import sysconfig
import types
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

_OURS = os.path.dirname(os.path.dirname(__file__)) + os.sep
TORCH = os.path.dirname(torch.__file__) + os.sep
_STDLIB = tuple(sysconfig.get_paths()[name] + os.sep for name in ("stdlib", "platstdlib"))
_PURE = {
    "functools", "typing", "enum", "collections", "copy", "dataclasses", "abc", "numbers", "operator", "types", "re",
    "math", "itertools", "inspect", "contextlib", "string", "_collections_abc", "_weakrefset",
}  # fmt: skip
"""Modules of the standard library whose functions depend only on their arguments."""
_PURE_BUILT_IN = {
    "builtins", "math", "cmath", "_operator", "itertools", "_functools", "_collections", "_abc", "_struct", "_typing"
}  # fmt: skip
_KNOWN_OWNERS = ("builtins", "collections", "torch")
_IMPURE = {"print", "open", "input", "exec", "eval", "id", "globals", "locals", "vars", "breakpoint"}
_AMBIENT = re.compile(
    r"(is|are|get|set|use)_(autocast|grad_enabled|inference_mode|anomaly|default|num_|float32|deterministic|rng)"
    r"|^(set_|is_|manual_seed|seed|initial_seed)|deterministic|_enabled$"
)
_FUNCTIONS_OF_TENSORS = {
    "is_tensor", "is_floating_point", "is_complex", "is_nonzero", "is_same_size", "is_signed", "is_conj", "is_neg",
    "is_storage", "is_scripting", "is_tracing", "is_compiling", "is_dynamo_compiling", "is_exporting", "set_",
    "is_distributed", "is_inference", "is_coalesced", "is_contiguous", "is_pinned", "is_set_to", "is_shared",
}  # fmt: skip
_IMPURE_TORCH = ("distributed", "random", "cuda", "backends", "amp", "autograd/graph", "autograd/grad_mode", "_C")


def classes_of(kind: type) -> list[type]:
    """A class and its bases outside of torch."""
    return [cls for cls in kind.__mro__ if not cls.__module__.startswith("torch.") and cls is not object]


def codes_in(code: types.CodeType) -> Iterator[types.CodeType]:
    """The code itself, and the code of the functions and classes that are defined in it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from codes_in(constant)


@functools.cache
def library_of(file: str) -> str:
    """The owner of a file: "user", "torch", "ours" or "stdlib"."""
    if file.startswith(_OURS) or file.startswith("<rdp.convert"):
        return "ours"
    if file.startswith(TORCH):
        return "torch"
    if file.startswith(_STDLIB) and "site-packages" not in file and "dist-packages" not in file:
        return "stdlib"
    return "stdlib" if file.startswith(("<frozen", "<string")) else "user"


def of_user(code: types.CodeType) -> bool:
    return library_of(code.co_filename) == "user"


def why_not_library(code: types.CodeType) -> str | None:
    """Why a graph can't repeat a call of a Python function of torch or of the standard library; None if it can."""
    file, name = code.co_filename, code.co_name
    if file.startswith(TORCH):
        place = file[len(TORCH) :].removesuffix(".py")
        if place == "nn/modules/module" and name.startswith(("register_", "add_", "_apply", "load_", "zero_", "apply")):
            return f"its forward calls {name} of a module, which changes it"
        if place == "utils/checkpoint":
            return (
                "its forward checkpoints: leave that out inside the block, and checkpoint the call of the block "
                "in the model around it"
            )
        if place == "autograd/function" and name == "apply":
            return "its forward calls an autograd function, whose backward a graph doesn't have"
        if place.startswith(_IMPURE_TORCH) or (_AMBIENT.search(name) and name not in _FUNCTIONS_OF_TENSORS):
            return f"its forward calls {name} of torch, which depends on more than its tensors"
        return None
    module = os.path.basename(os.path.dirname(file) if file.endswith("__init__.py") else file).removesuffix(".py")
    if not file.startswith("<") and module not in _PURE:
        return f"its forward calls {name} of Python's {module}, which would not be called again"
    return None


def why_not_built_in(called: Any) -> str | None:
    """Like `why_not_library`, for a function written in C."""
    name, owner = getattr(called, "__name__", ""), getattr(called, "__self__", None)
    module = getattr(called, "__module__", None) or getattr(owner, "__name__", None)
    if isinstance(owner, types.ModuleType) or (module or "").startswith("torch"):
        module = str(module)
        if module.startswith("torch"):
            if _AMBIENT.search(name) and name not in _FUNCTIONS_OF_TENSORS and not isinstance(owner, Tensor):
                return f"its forward calls {name} of torch, which depends on more than its tensors"
        elif module not in _PURE_BUILT_IN or name in _IMPURE:
            return f"its forward calls {name} of {module}, which would not be called again"
    elif not isinstance(owner, (type, Tensor, nn.Module, type(None))) and type(owner).__module__ not in _KNOWN_OWNERS:
        return f"its forward calls {name} of an object of type {type(owner).__name__}, which would not be called again"
    return None


def is_context(code: types.CodeType, caller: types.CodeType) -> bool:
    """Whether an `__enter__` with this code and caller is that of a context of torch, or is called by contextlib. A
    decorator of the forward may enter such a context too."""
    places = ("amp/autocast_mode.py", "autograd/grad_mode.py", "autograd/graph.py", "autograd/profiler.py", "random.py")
    return caller.co_filename.endswith("contextlib.py") or code.co_filename.startswith(tuple(TORCH + p for p in places))


def context_name(frame: types.FrameType) -> str:
    """The name of a context from the frame of its `__enter__`."""
    owner = frame.f_locals.get("self")
    function = getattr(owner, "func", None)  # the generator that contextlib made it from
    return getattr(function, "__name__", None) or type(owner).__name__


def ambient() -> tuple:
    """The global settings that a forward may change around some of its operations."""
    autocast = [(torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in ("cpu", "cuda")]
    backends = torch.backends.cuda
    attention = [backends.flash_sdp_enabled(), backends.mem_efficient_sdp_enabled(), backends.math_sdp_enabled()]
    grad = (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.get_default_dtype())
    return (*autocast, *attention, *grad)
