"""Chooses the kernel library that serves a call, and can say why a library can't.

`"auto"` takes the first library that can serve the call, else the eager reference. The logger `rdp_kernels` reports at
level DEBUG which libraries were passed over, and why.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor
from torch._C import _are_functorch_transforms_active, _is_tracing
from torch.autograd import forward_ad
from torch.compiler import is_dynamo_compiling
from torch.nn import Parameter

from .._utils.checks import NO_RULE, check_choice, why_not_plain
from . import native, triton
from .buffers import context_of
from .short import ShortKernels
from .spec import Add, NextInput, Operands


class Library(Protocol):
    """A kernel library: a package that says what it can serve without importing a kernel. `kernels()` imports its
    launchers, a module with `fused_add_fwd` and `fused_add_bwd`."""

    HAS_NORMS: bool
    """Whether its kernels take norms. Without them torch's norm follows the kernel."""

    @property
    def MAX_TILE_ROWS(self) -> int | None:
        """The most rows that all tiles of a call may have (see `layout.Tiling`); None if there is no limit."""

    def unavailable(self) -> str | None:
        """Why no call can be served, or None."""

    def why_not_kind(self, device: torch.device, dtypes: Operands, norm_width: int | None, forced: bool) -> str | None:
        """Why calls on such tensors can't be served, or None. `dtypes` are those of the operands. `forced`: the backend
        was asked for by name."""

    def kernels(self) -> ModuleType:
        """The launchers."""


class Served(NamedTuple):
    """What serves a call: a library, or the eager reference (None). If the library doesn't take the call's norm, the
    norm of torch comes after it."""

    library: str | None
    takes_norm: bool = True

    @property
    def kernels(self) -> ModuleType | None:
        return None if self.library is None else kernels_named(self.library)


_LIBRARIES: dict[str, Library] = {"native": native, "triton": triton}
_CHOICES = ("auto", "eager", *_LIBRARIES)
PLAIN = (Tensor, Parameter)
"""The types of tensors whose values lie where kernels look for them."""
WIDEST_NORM = triton.MAX_NORM_WIDTH
# One choice for the process: autograd recomputes checkpointed ops in threads of its own.
_chosen: str | None = None
_preparing: ModuleType | None = None
_short_on_cpus: dict[str, tuple[ShortKernels, ...]] = {}
_short_on_gpus: dict[str, tuple[ShortKernels, ...]] = {}
"""By choice of a backend."""
if native.unavailable() is None:
    for _short in (_short_on_cpus, _short_on_gpus) if native.has_cuda() else (_short_on_cpus,):
        _short["auto"] = _short["native"] = (native.short_kernels(),)
_log = logging.getLogger("rdp_kernels")
_logged: set[tuple[str, str, str]] = set()


def available_backends() -> dict[str, str | None]:
    """Lists the backends and says why one can't be used on this machine.

    Returns:
        The name of each backend, with None where it can be used, else the reason why it can't.

    Example:
        >>> backends = rdp.available_backends()
        >>> sorted(backends)
        ['eager', 'native', 'triton']
        >>> backends["eager"] is None
        True
    """
    return {"eager": None} | {name: library.unavailable() for name, library in _LIBRARIES.items()}


@contextlib.contextmanager
def use_backend(name: Literal["auto", "eager", "triton", "native"]) -> Iterator[None]:
    """Chooses the backend of all functions and modules within a `with` block.

    `"auto"`, the default outside of such blocks, takes the first of `"native"`, `"triton"` and `"eager"` that can serve
    a call. A backend that was asked for by name raises `RuntimeError`, with the reason, on a call that it can't serve.
    Kernels have no rules for `torch.func` transforms and forward-mode AD: there `"auto"` takes `"eager"`. The choice
    holds for all threads. The environment variable `RDP_BACKEND`, which is read once, sets the default of a process.

    Args:
        name: `"auto"`, `"eager"` (plain torch, works for everything), `"triton"` or `"native"` (the compiled library).

    Yields:
        None: The `with` block runs on the backend.

    Raises:
        ValueError: if the name is unknown.
        RuntimeError: if the backend isn't available. The error says why.

    Example:
        >>> with rdp.use_backend("eager"):
        ...     rdp.residual_add(torch.ones(2, 2), torch.ones(2, 2), row_scale=0.5)
        tensor([[1.5000, 1.5000],
                [1.5000, 1.5000]])
    """
    global _chosen
    _require("name", name)
    before, _chosen = _chosen, name
    try:
        yield
    finally:
        _chosen = before


def resolve(
    op: str, operands: Operands, add: Add | None = None, next_input: NextInput | None = None, required: bool = True
) -> Served:
    """Finds what serves a call. `op` names the call in errors and in the log.

    If a backend that was asked for by name can't serve the call, raises `RuntimeError` where that is `required`; else
    the eager reference serves the call.
    """
    tensors = [t for t in (*operands, None if add is None else add.row_scale) if t is not None]
    residual = tensors[0]
    normed = next_input is not None and next_input.norm is not None
    dtypes = Operands(*(None if t is None else t.dtype for t in operands))

    def why_not(name: str, forced: bool, norm_width: int | None) -> str | None:
        reason = _why_not_kind(name, residual.device, dtypes, norm_width, forced)
        most = _LIBRARIES[name].MAX_TILE_ROWS
        if reason is None and most is not None and residual.numel() > most:
            context = context_of(operands, None if next_input is None else next_input.norm)
            tiling = context.tiling(add, next_input, operands.gamma is not None)
            reason = triton.why_not_rows(context.shape[0] * tiling.positions)
        return why_not_plain(tensors) if reason is None else reason

    return _first(op, residual.shape[-1] if normed else None, required, why_not)


def resolve_in_graph(
    op: str, device: torch.device, dtypes: tuple[torch.dtype | None, ...], normed: bool, transformed: bool
) -> str | None:
    """As `resolve`, under `torch.compile`, once for a graph: the library that serves the call with its norm, or None.
    `dtypes` are those of the operands. A norm, if there is one, is no wider than `WIDEST_NORM`."""

    def why_not(name: str, forced: bool, _: int | None) -> str | None:
        return _why_not_kind(name, device, Operands(*dtypes), None, forced) or (NO_RULE if transformed else None)

    served = _first(op, 1 if normed else None, True, why_not)
    return served.library if served.takes_norm else None


def short_kernels(residual: Tensor) -> tuple[ShortKernels, ...]:
    """The libraries that may serve a call on this residual without checks of its arguments. There are none for tensors
    and modes of torch that kernels can't take. Only types and flags are looked at, since this is asked at every call.
    """
    if (
        is_dynamo_compiling()  # where torch.export traces without dynamo, tensors aren't plain
        or type(residual) not in PLAIN
        or forward_ad._current_level >= 0
        or _are_functorch_transforms_active()
        or _is_tracing()
    ):
        return ()
    short = _short_on_cpus if residual.is_cpu else _short_on_gpus
    return short.get(_from_environment() if _chosen is None else _chosen, ())


def preparing_kernels() -> ModuleType | None:
    """The launchers that prepare calls, Triton's, where they may serve a call and have served one before."""
    return _preparing if _preparing is not None and choice() in ("auto", "triton") else None


def is_free() -> bool:
    """Whether no backend was asked for by name."""
    return choice() == "auto"


# What torch.compiler.assume_constant_result does, without importing dynamo here, which imports triton.
for _asked_in_graphs in (resolve_in_graph, is_free):
    _asked_in_graphs._dynamo_marked_constant = True  # type: ignore[union-attr]


@functools.cache
def kernels_named(name: str) -> ModuleType:
    """The launchers of a library."""
    global _preparing
    kernels = _LIBRARIES[name].kernels()
    if name == "triton":  # from now on there may be prepared calls
        _preparing, short = kernels, triton.short_kernels()
        _short_on_cpus["triton"] = _short_on_gpus["triton"] = (short,)
        _short_on_gpus["auto"] = (*_short_on_gpus.get("auto", ()), short)
    return kernels


def choice() -> str:
    """The backend that was asked for."""
    return _from_environment() if _chosen is None else _chosen


@functools.lru_cache(1024)  # more devices and dtypes than a program meets
def _why_not_kind(
    name: str, device: torch.device, dtypes: Operands, norm_width: int | None, forced: bool
) -> str | None:
    return _LIBRARIES[name].why_not_kind(device, dtypes, norm_width, forced)


def _first(
    op: str, norm_width: int | None, required: bool, why_not: Callable[[str, bool, int | None], str | None]
) -> Served:
    """The first library that serves the call with its norm; else the first one that serves it without."""
    chosen, without_norm = choice(), Served(None)
    if chosen == "eager":
        return without_norm
    forced = chosen != "auto"
    for name in (chosen,) if forced else _LIBRARIES:
        reason = why_not(name, forced, norm_width)
        if reason is None:
            if norm_width is None or _LIBRARIES[name].HAS_NORMS:
                return Served(name)
            reason = "it has no norms"
        elif forced and required:
            raise RuntimeError(f"{op}: backend {chosen!r} can't serve this call: {reason}")
        if norm_width is not None and without_norm.library is None and why_not(name, forced, None) is None:
            without_norm = Served(name, takes_norm=False)
        if _log.isEnabledFor(logging.DEBUG) and (op, name, reason) not in _logged:
            _logged.add((op, name, reason))
            _log.debug("%s: passing over backend %r: %s", op, name, reason)
    return without_norm


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
