"""The measured machine: its name, its clock, and its ceilings (the highest rates that were measured on it)."""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

MATMUL_SIZES = {"cpu": (512, 1024, 2048), "cuda": (2048, 4096, 8192)}
CONV_SHAPES = ((24, 32, 32), (32, 256, 16), (64, 128, 8))  # images, channels, side
CEILING_REPEATS = 5
CACHE_IF_UNKNOWN = 64 << 20
GPU_COPY = 1 << 30
ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Device:
    """Where cases run and how they are timed.

    Args:
        cache_bytes: size of the last-level cache, L2 on a GPU.
        clock: returns seconds. A GPU is timed by events on its own clock instead.
        dtype: the dtype of the matmuls and convolutions that measure peak FLOP/s.
    """

    device: torch.device
    name: str
    cache_bytes: int
    clock: Callable[[], float] = time.perf_counter
    dtype: torch.dtype = torch.float32

    @classmethod
    def of(cls, kind: str) -> Device:
        """`kind` is `"cpu"` or `"cuda"`."""
        if kind == "cpu":
            return cls(torch.device("cpu"), _cpu_name(), _cpu_cache_bytes())
        properties = torch.cuda.get_device_properties(kind)
        return cls(torch.device(kind), properties.name, properties.L2_cache_size)

    def milliseconds(self, run: Callable[[], object]) -> float:
        """Returns the time of `run()`; on a GPU until the device has finished."""
        if self.device.type == "cpu":
            start = self.clock()
            run()
            return 1e3 * (self.clock() - start)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(self.device)
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)

    def input_sets(self, bytes_of_one: int) -> int:
        """Returns the number of input sets that a provider cycles through so that none is in the cache. Together they
        exceed twice its size."""
        return 2 * self.cache_bytes // max(bytes_of_one, 1) + 1

    def work_stream(self) -> contextlib.AbstractContextManager:
        """Runs GPU work within the `with` block on its own CUDA stream. Capturing a CUDA graph needs this, as a
        backward runs on the CUDA stream of its forward. On the CPU it does nothing."""
        if self.device.type == "cpu":
            return contextlib.nullcontext()
        return torch.cuda.stream(torch.cuda.Stream(self.device))

    def ceilings(self) -> Ceilings:
        """Measures the ceilings, which takes about a second on two cores."""
        flops = [self._matmul_flops(size) for size in MATMUL_SIZES[self.device.type]]
        flops += [self._conv_flops(*shape) for shape in CONV_SHAPES]
        return Ceilings(max(flops), self.copy_rate())

    def _matmul_flops(self, size: int) -> float:
        a, b = torch.randn(2, size, size, device=self.device, dtype=self.dtype)
        return 2 * size**3 / self._best_seconds(lambda: a @ b)

    def _conv_flops(self, images: int, channels: int, side: int) -> float:
        """FLOP/s of a 3 × 3 convolution. On some processors torch's convolutions are faster than its matmuls."""
        x = torch.randn(images, channels, side, side, device=self.device, dtype=self.dtype)
        weight = torch.randn(channels, channels, 3, 3, device=self.device, dtype=self.dtype)
        flops = 2 * images * channels * channels * 9 * side * side
        return flops / self._best_seconds(lambda: torch.nn.functional.conv2d(x, weight, padding=1))

    def copy_rate(self) -> float:
        """Bytes/s, read and written, of a copy larger than the cache. On a GPU it is so large that its launch time is
        negligible."""
        size = max(4 * self.cache_bytes, GPU_COPY if self.device.type == "cuda" else 0)
        source = torch.zeros(size, dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        return 2 * source.nbytes / self._best_seconds(lambda: target.copy_(source))

    def _best_seconds(self, run: Callable[[], object]) -> float:
        run()  # the first call allocates
        return min(self.milliseconds(run) for _ in range(CEILING_REPEATS)) / 1e3


@dataclass(frozen=True)
class Ceilings:
    """FLOP/s of a matmul or convolution in the device's dtype, and bytes/s of a copy larger than the cache (read and
    written)."""

    flops: float
    bytes: float

    def or_higher(self, other: Ceilings) -> Ceilings:
        return Ceilings(max(self.flops, other.flops), max(self.bytes, other.bytes))


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Uses one thread, for tensors so small that a second one would only wait (on a busy machine for very long)."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def facts(device: Device) -> dict[str, str | int]:
    """Returns the columns of the machine and the versions."""
    return {
        "device": device.name,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "python": platform.python_version(),
        "commit": _commit(),
        "date": datetime.date.today().isoformat(),
    }


def _commit() -> str:
    """Returns RDP_COMMIT if it is set, for a copy of the tree without git. Else returns git's commit, with `-dirty` if
    the code has changes; changes of results and README don't count. Empty without git or a clone."""

    def git(*command: str) -> str:
        return subprocess.run(["git", *command], capture_output=True, text=True, cwd=ROOT).stdout.strip()

    code = ("status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results", ":!README.md")
    if told := os.environ.get("RDP_COMMIT"):
        return told
    with contextlib.suppress(OSError):
        if commit := git("rev-parse", "--short", "HEAD"):
            return commit + ("-dirty" if git(*code) else "")
    return ""


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return name or platform.processor() or platform.machine()


def _cpu_cache_bytes() -> int:
    """Returns the size of the largest cache that Linux lists for the first core."""
    sizes = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    kibibytes = [int(text[:-1]) for text in (size.read_text().strip() for size in sizes) if text.endswith("K")]
    return max(kibibytes, default=0) << 10 or CACHE_IF_UNKNOWN
