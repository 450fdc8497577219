"""The one place that chooses which implementation serves an op, and that can say why not.

`"auto"` takes the first backend of `PREFERENCE` that is available. Today that is the eager reference; kernels join by
adding their module here.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from types import ModuleType

from . import reference
from ._checks import check_choice

PREFERENCE = ("native", "triton", "eager")
_CHOICES = ("auto", *PREFERENCE)
_NOT_BUILT = "this version of rdp_kernels has no {} kernels yet; every op runs in plain torch"
# One choice for the process: autograd recomputes checkpointed ops in threads of its own.
_chosen: str | None = None


def available_backends() -> dict[str, str | None]:
    """Each backend's name with None where it can be used, else the reason why not."""
    return {"eager": None, "triton": _NOT_BUILT.format("Triton"), "native": _NOT_BUILT.format("C++ or CUDA")}


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Runs the ops of a `with` block on one backend: `"auto"`, `"eager"`, `"triton"` or `"native"`.

    The environment variable `RDP_BACKEND` sets the same for a whole process. Raises `ValueError` for an unknown name
    and `RuntimeError`, with the reason, for a backend that is not available.
    """
    global _chosen
    _require("name", name)
    before, _chosen = _chosen, name
    try:
        yield
    finally:
        _chosen = before


def implementation() -> ModuleType:
    """The module whose functions serve the ops now."""
    if _chosen is None:
        _require("RDP_BACKEND", os.environ.get("RDP_BACKEND", "auto"))
    return reference


def _require(argument: str, name: str) -> None:
    if name == "auto":
        return
    check_choice(argument, name, _CHOICES)
    reason = available_backends()[name]
    if reason is not None:
        raise RuntimeError(f"{argument}: backend {name!r} is not available: {reason}")
