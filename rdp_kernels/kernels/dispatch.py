"""The one place that chooses which implementation serves a call, and that can say why not.

A kernel library is a package with three functions that give a reason or None without importing a kernel,
`unavailable()`, `why_not(...)` and `why_not_kind(...)`, and with `kernels()`, which gives the module of its launchers,
`fused_add_fwd` and `fused_add_bwd`. `HAS_NORMS` says whether these take a norm; where they don't, torch's own follows.
`"auto"` takes the first one that can serve the call, else the eager reference; the logger `rdp_kernels` tells at level
DEBUG what was passed over and why.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Literal

import torch
from torch import Tensor

from .._utils.checks import NO_RULE, check_choice
from . import native, triton

_LIBRARIES = {"native": native, "triton": triton}
_CHOICES = ("auto", "eager", *_LIBRARIES)
WIDEST_NORM = triton.MAX_NORM_WIDTH
_FIRST_ON_CPU = {} if native.unavailable() else dict.fromkeys(("auto", "native"), native.kernels())
# One choice for the process: autograd recomputes checkpointed ops in threads of its own.
_chosen: str | None = None
_log = logging.getLogger("rdp_kernels")
_logged: set[tuple[str, str, str]] = set()


def available_backends() -> dict[str, str | None]:
    """Each backend's name with None where it can be used, else the reason why not."""
    return {"eager": None} | {name: library.unavailable() for name, library in _LIBRARIES.items()}


@contextlib.contextmanager
def use_backend(name: Literal["auto", "eager", "triton", "native"]) -> Iterator[None]:
    """Runs the ops of a `with` block on one backend: `"auto"`, `"eager"`, `"triton"` or `"native"`.

    `"auto"` takes the fastest that can serve a call; a backend asked for by name raises `RuntimeError`, with the
    reason, on a call that it can't serve. Kernels serve no call within `torch.func` transforms and forward-mode AD, for
    which they have no rules: there `"auto"` is eager. The environment variable `RDP_BACKEND`, which is read once, sets
    the same for a whole process.
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
    op: str,
    *tensors: Tensor | None,
    norm_width: int | None = None,
    tile_rows: Callable[[], int] = lambda: 0,
    required: bool = True,
) -> ModuleType | None:
    """The kernels that serve `op` on `tensors`, the first of which is the stream; None for the eager reference.

    `norm_width`: how many elements the norm is over; None too where the library has no norms. `tile_rows`: counts the
    rows of all tiles (`layout.Tiling`). Raises `RuntimeError` where the backend was asked for by name and can't serve
    the call, if that is `required`; else None.
    """
    name = _serving(
        op,
        required,
        norm_width is not None,
        lambda library, forced: library.why_not(tensors, norm_width, forced, tile_rows),
    )
    return None if name is None else _LIBRARIES[name].kernels()


def compiled_kernels(
    op: str, device: torch.device, dtypes: tuple[torch.dtype, ...], normed: bool, transformed: bool
) -> str | None:
    """As `kernels_for`, under `torch.compile`, once for a graph: the library's name. Its calls become registered ops.
    A norm, if there is one, is no wider than `WIDEST_NORM`."""

    def why_not(library: ModuleType, forced: bool) -> str | None:
        return library.why_not_kind(device, dtypes, None, forced) or (NO_RULE if transformed else None)

    return _serving(op, True, normed, why_not)


def is_free() -> bool:
    """Whether no backend was asked for by name."""
    return _choice() == "auto"


# What torch.compiler.assume_constant_result does, without importing dynamo, and with it triton, here.
for _asked_in_graphs in (compiled_kernels, is_free):
    _asked_in_graphs._dynamo_marked_constant = True  # type: ignore[union-attr]


def kernels_named(name: str) -> ModuleType:
    """Those of a library."""
    return _LIBRARIES[name].kernels()


def cpu_kernels() -> ModuleType | None:
    """The compiled library's, where it comes first for CPU tensors: asked before all else, at every call."""
    return _FIRST_ON_CPU.get(_from_environment() if _chosen is None else _chosen)


def _serving(op: str, required: bool, normed: bool, why_not: Callable[[ModuleType, bool], str | None]) -> str | None:
    """The library that serves a call, by the choice of the moment."""
    chosen = _choice()
    if chosen == "eager":
        return None
    for name, library in _LIBRARIES.items() if chosen == "auto" else [(chosen, _LIBRARIES[chosen])]:
        reason = why_not(library, chosen != "auto")
        if reason is None and (library.HAS_NORMS or not normed):
            return name
        if reason is not None and chosen != "auto" and required:
            raise RuntimeError(f"{op}: backend {chosen!r} can't serve this call: {reason}")
        reason = reason or "it has no norms"
        if _log.isEnabledFor(logging.DEBUG) and (op, name, reason) not in _logged:
            _logged.add((op, name, reason))
            _log.debug("%s: passing over backend %r: %s", op, name, reason)
    return None


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
