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
RunLaunch = Callable[[int, tuple[Any, ...]], None]
"""Takes the number of programs and the kernel's arguments."""
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
    directly, which takes the host a twentieth of the time. Triton's hooks see all of them.
    """

    direct = True
    """Whether kernels are launched directly; False as soon as this Triton can't."""

    def __init__(self, kernel: Any, config: LaunchConfig, device: torch.device):
        self.kernel, self.config, self.options = kernel, config, options_of(config, device)
        several_gpus = device.type == "cuda" and torch.cuda.device_count() > 1
        self._device = device.index if several_gpus else None
        self._launch: RunLaunch = self._launch_first

    def __call__(self, num_programs: int, *arguments: Any) -> None:
        """Launches with all arguments of the kernel, in order, on the current CUDA stream of their device. Without
        programs it does nothing."""
        if num_programs == 0:
            return
        if _observers:
            by_name = dict(zip(self.kernel.arg_names, arguments, strict=True))
            _observers[-1](Launch(self.kernel, (num_programs,), by_name, self.config, self.options))
        elif self._device is None or torch.cuda.current_device() == self._device:
            self._launch(num_programs, arguments)
        else:
            with torch.cuda.device(self._device):
                self._launch(num_programs, arguments)

    def _launch_first(self, num_programs: int, arguments: tuple[Any, ...]) -> None:
        """An ordinary launch. It gives the compiled kernel, except where Triton interprets it."""
        compiled = self.kernel[(num_programs,)](*arguments, **self.options)
        if PreparedLaunch.direct and not interpreted():
            self._launch = direct_launch(compiled, self._launch_first) or self._launch_first


def direct_launch(compiled: Any, ordinary_launch: RunLaunch) -> RunLaunch | None:
    """A function that launches a compiled kernel as an ordinary launch does in the end, without finding it again.

    It uses private names of Triton 3.6 and 3.7. Where one is missing it returns None, and says so once. While hooks are
    set it leaves launches to `ordinary_launch`.
    """
    try:
        run, function, metadata = compiled.run, compiled.function, compiled.packed_metadata
        current_device, current_stream = driver.active.get_current_device, driver.active.get_current_stream
        before_run, runtime = compiled.src.fn.pre_run_hooks, knobs.runtime
        _ = runtime.launch_enter_hook.calls, runtime.launch_exit_hook.calls
    except AttributeError as error:
        PreparedLaunch.direct = False
        _log.warning(
            "rdp_kernels knows no direct launch in triton %s (%s): each launch takes the host about 20 µs more",
            triton.__version__,
            error,
        )
        return None

    def launch(num_programs: int, arguments: tuple[Any, ...]) -> None:
        if before_run or runtime.launch_enter_hook.calls or runtime.launch_exit_hook.calls:
            ordinary_launch(num_programs, arguments)
        else:
            stream = current_stream(current_device())
            run(num_programs, 1, 1, stream, function, metadata, None, None, None, *arguments)

    return launch
