"""The one place that chooses which implementation serves a call, and that can say why not.

A kernel library is a package with three functions: `unavailable()` and `why_not(...)` give a reason or None without
importing a kernel, `kernels()` gives the module with `tail_fwd` and `tail_bwd`. `"auto"` takes the first one that can
serve the call, else the eager reference; the logger `rdp_kernels` tells at level DEBUG what was passed over and why.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
from collections.abc import Iterator
from types import ModuleType

import torch
from torch import Tensor

from . import _native, _triton
from ._checks import check_choice

_LIBRARIES = {"native": _native, "triton": _triton}
_CHOICES = ("auto", "eager", *_LIBRARIES)
_FIRST_ON_CPU = {} if _native.unavailable() else dict.fromkeys(("auto", "native"), _native.kernels())
# One choice for the process: autograd recomputes checkpointed ops in threads of its own.
_chosen: str | None = None
_log = logging.getLogger("rdp_kernels")
_logged: set[tuple[str, str, str]] = set()


def available_backends() -> dict[str, str | None]:
    """Each backend's name with None where it can be used, else the reason why not."""
    return {"eager": None} | {name: library.unavailable() for name, library in _LIBRARIES.items()}


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Runs the ops of a `with` block on one backend: `"auto"`, `"eager"`, `"triton"` or `"native"`.

    `"auto"` takes the fastest that can serve a call; a backend asked for by name raises `RuntimeError`, with the
    reason, on a call that it can't serve. The environment variable `RDP_BACKEND`, which is read once, sets the same for
    a whole process.
    Raises `ValueError` for an unknown name and `RuntimeError`, with the reason, for a backend that is not available.
    """
    global _chosen
    _require("name", name)
    before, _chosen = _chosen, name
    try:
        yield
    finally:
        _chosen = before


def kernels_for(
    op: str, *tensors: Tensor | None, norm_width: int | None = None, required: bool = True
) -> ModuleType | None:
    """The kernels that serve `op` on `tensors`, the first of which is the stream; None for the eager reference.

    `norm_width`: how many elements the norm is over. Raises `RuntimeError` where the backend was asked for by name and
    can't serve the call, if that is `required`; else None.
    """
    chosen = _choice()
    if chosen == "eager":
        return None
    if chosen != "auto":
        library = _LIBRARIES[chosen]
        reason = library.why_not(tensors, norm_width, forced=True)
        if reason is None:
            return library.kernels()
        if required:
            raise RuntimeError(f"{op}: backend {chosen!r} can't serve this call: {reason}")
        return None
    for name, library in _LIBRARIES.items():
        reason = library.why_not(tensors, norm_width)
        if reason is None:
            return library.kernels()
        if _log.isEnabledFor(logging.DEBUG) and (op, name, reason) not in _logged:
            _logged.add((op, name, reason))
            _log.debug("%s: passing over backend %r: %s", op, name, reason)
    return None


def compiled_kernels(
    op: str, device: torch.device, dtypes: tuple[torch.dtype, ...], norm_width: int | None
) -> str | None:
    """As `kernels_for`, under `torch.compile`, once for a graph: the library's name. Its calls become registered ops."""
    chosen = _choice()
    if chosen == "eager":
        return None
    for name, library in _LIBRARIES.items():
        if chosen not in ("auto", name):
            continue
        reason = library.why_not_kind(device, dtypes, norm_width, forced=chosen == name)
        if reason is None:
            return name
        if chosen == name:
            raise RuntimeError(f"{op}: backend {chosen!r} can't serve this call: {reason}")
    return None


# What torch.compiler.assume_constant_result does, without importing dynamo, and with it triton, here.
compiled_kernels._dynamo_marked_constant = True  # type: ignore[attr-defined]


def kernels_named(name: str) -> ModuleType:
    """Those of a library."""
    return _LIBRARIES[name].kernels()


def cpu_kernels() -> ModuleType | None:
    """The compiled library's, where it comes first for CPU tensors: asked before all else, at every call."""
    return _FIRST_ON_CPU.get(_from_environment() if _chosen is None else _chosen)


def _choice() -> str:
    return _from_environment() if _chosen is None else _chosen


@functools.cache
def _from_environment() -> str:
    chosen = os.environ.get("RDP_BACKEND", "auto")
    _require("RDP_BACKEND", chosen)
    return chosen


def _require(argument: str, name: str) -> None:
    if name == "auto":
        return
    check_choice(argument, name, _CHOICES)
    reason = available_backends()[name]
    if reason is not None:
        raise RuntimeError(f"{argument}: backend {name!r} is not available: {reason}")
