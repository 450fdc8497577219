"""Launches of a kernel whose arguments differ only in pointers and counts, so that one compiled kernel serves them."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton
from triton import knobs
from triton.runtime import driver

from .launch import LaunchConfig, options_of


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
_hooks = knobs.runtime
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

    The first call is an ordinary launch, in which Triton finds the compiled kernel. Later calls launch that kernel
    directly, as an ordinary launch does in the end. This saves the host most of a launch's time, and uses private names
    of Triton 3.6 and 3.7. While hooks are set, or where a name is missing, all launches are ordinary ones. On AMD GPUs
    they always are: Triton compiles a kernel anew there for tensors beyond 2 GB, which the number of rows may decide.
    """

    direct = True
    """Whether kernels are launched directly; False as soon as this Triton can't."""

    def __init__(self, kernel: Any, config: LaunchConfig, device: torch.device):
        self.kernel, self.config, self.options = kernel, config, options_of(config, device)
        self._device = device.index or 0
        self._several_gpus = device.type == "cuda" and torch.cuda.device_count() > 1
        self._run: Any = None
        """Launches the compiled kernel; None as long as that isn't known."""

    def __call__(self, num_programs: int, *arguments: Any) -> None:
        """Launches with all arguments of the kernel, in order, on the current CUDA stream of their device. Without
        programs it does nothing."""
        if self._several_gpus and torch.cuda.current_device() != self._device:
            with torch.cuda.device(self._device):
                self(num_programs, *arguments)
        elif num_programs and self._run is not None and not (_observers or self._has_hooks()):
            stream = self._current_stream(self._device)
            self._run(num_programs, 1, 1, stream, self._function, self._metadata, None, None, None, *arguments)
        else:
            self._launch(num_programs, arguments)

    def _has_hooks(self) -> bool:
        enter, leave = _hooks.launch_enter_hook, _hooks.launch_exit_hook  # chains of hooks, or single ones
        return getattr(enter, "calls", enter) or getattr(leave, "calls", leave) or self.kernel.pre_run_hooks

    def _launch(self, num_programs: int, arguments: tuple[Any, ...]) -> None:
        """An ordinary launch. The first one finds the compiled kernel; interpreted kernels have none."""
        if num_programs == 0:
            return
        if _observers:
            by_name = dict(zip(self.kernel.arg_names, arguments, strict=True))
            _observers[-1](Launch(self.kernel, (num_programs,), by_name, self.config, self.options))
            return
        compiled = self.kernel[(num_programs,)](*arguments, **self.options)
        if compiled is not None and self._run is None and PreparedLaunch.direct and torch.version.hip is None:
            self._keep(compiled)

    def _keep(self, compiled: Any) -> None:
        """Keeps what a direct launch needs. Says once if this Triton doesn't have it."""
        try:
            self._function, self._metadata = compiled.function, compiled.packed_metadata
            self._current_stream = driver.active.get_current_stream
            self._has_hooks()
            self._run = compiled.run
        except AttributeError as error:
            PreparedLaunch.direct = False
            _log.warning(
                "rdp_kernels knows no direct launch in triton %s (%s): each launch takes the host longer",
                triton.__version__,
                error,
            )
