"""Launches of a kernel whose arguments differ only in pointers and counts, so that one compiled kernel serves them."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton

from .launch import LaunchConfig, options_of
from .support import interpreted


@dataclass(frozen=True)
class Launch:
    """One launch as data, for tests and tuning. `arguments` holds the kernel's arguments by name, compile-time ones
    included. `options` are Triton's."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    config: LaunchConfig
    options: dict[str, int]

    def run(self) -> None:
        if self.grid[0]:
            self.kernel[self.grid](**self.arguments, **self.options)


_log = logging.getLogger("rdp_kernels")
_observers: list[Callable[[Launch], None]] = []


@contextlib.contextmanager
def observed(observer: Callable[[Launch], None]) -> Iterator[None]:
    """Within the `with` block each launch is given to `observer`, which may run it, and isn't run otherwise."""
    _observers.append(observer)
    try:
        yield
    finally:
        _observers.remove(observer)


class PreparedLaunch:
    """A kernel with its launch numbers. Calls of one object must differ in nothing that Triton specializes a kernel on:
    dtypes, pointers that are None, alignment, and the numbers that aren't in `common._VARYING`.

    The first call is an ordinary launch, in which Triton finds the compiled kernel. Later calls launch that kernel in
    the way of Triton's tutorials, `compiled[grid](*arguments)`, which takes a tenth of the time. Triton's hooks see
    both.
    """

    direct = True
    """Whether this Triton launches compiled kernels in that way."""

    def __init__(self, kernel: Any, config: LaunchConfig, device: torch.device):
        self.kernel, self.config, self.options = kernel, config, options_of(config, device)
        several_gpus = device.type == "cuda" and torch.cuda.device_count() > 1
        self._device = device.index if several_gpus else None
        self._compiled: Any = None

    def __call__(self, num_programs: int, *arguments: Any) -> None:
        """Launches with all arguments of the kernel, in order, on the current CUDA stream of their device. Without
        programs it does nothing."""
        if num_programs == 0:
            return
        if self._device is not None and torch.cuda.current_device() != self._device:
            with torch.cuda.device(self._device):
                return self(num_programs, *arguments)
        if _observers:
            by_name = dict(zip(self.kernel.arg_names, arguments, strict=True))
            return _observers[-1](Launch(self.kernel, (num_programs,), by_name, self.config, self.options))
        if self._compiled is not None and not self.kernel.pre_run_hooks:
            try:
                return self._compiled[num_programs, 1, 1](*arguments)
            except TypeError as error:
                self._give_up(str(error))
        compiled = self.kernel[(num_programs,)](*arguments, **self.options)
        if PreparedLaunch.direct and not interpreted():
            if hasattr(compiled, "__getitem__"):
                self._compiled = compiled
            else:
                self._give_up(f"an ordinary launch returns {type(compiled).__name__}")

    def _give_up(self, reason: str) -> None:
        """Makes all launches ordinary ones from now on, and says so once."""
        self._compiled = None
        if PreparedLaunch.direct:
            PreparedLaunch.direct = False
            _log.warning(
                "triton %s can't launch a compiled kernel directly (%s): each launch costs the host about 20 µs more",
                triton.__version__,
                reason,
            )
