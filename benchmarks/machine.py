"""The machine that is measured: its name, its clock, and its ceilings, the highest rates that it is seen to reach."""

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
        cache_bytes: of the last-level cache, L2 on a GPU.
        clock: seconds; a GPU is timed by events instead, on its own clock.
        dtype: that its peak of FLOPs is measured in.
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
        """How long `run()` takes; on a GPU until the device has finished."""
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
        """How many sets of inputs a provider cycles through so that it finds none in the cache: together they exceed
        twice its size."""
        return 2 * self.cache_bytes // max(bytes_of_one, 1) + 1

    def work_stream(self) -> contextlib.AbstractContextManager:
        """Inside, a GPU works on a stream of its own: a CUDA graph can only be captured on one, and a backward runs on
        the stream of its forward. On the CPU nothing."""
        if self.device.type == "cpu":
            return contextlib.nullcontext()
        return torch.cuda.stream(torch.cuda.Stream(self.device))

    def ceilings(self) -> Ceilings:
        """Measures them: about a second on two cores."""
        flops = [self._matmul_flops(size) for size in MATMUL_SIZES[self.device.type]]
        flops += [self._conv_flops(*shape) for shape in CONV_SHAPES]
        return Ceilings(max(flops), self.copy_rate())

    def _matmul_flops(self, size: int) -> float:
        a, b = torch.randn(2, size, size, device=self.device, dtype=self.dtype)
        return 2 * size**3 / self._best_seconds(lambda: a @ b)

    def _conv_flops(self, images: int, channels: int, side: int) -> float:
        """Of a 3 × 3 convolution: on some processors torch's convolutions are faster than its matmuls."""
        x = torch.randn(images, channels, side, side, device=self.device, dtype=self.dtype)
        weight = torch.randn(channels, channels, 3, 3, device=self.device, dtype=self.dtype)
        flops = 2 * images * channels * channels * 9 * side * side
        return flops / self._best_seconds(lambda: torch.nn.functional.conv2d(x, weight, padding=1))

    def copy_rate(self) -> float:
        """Bytes/s of a copy larger than the cache, read and written; on a GPU so large that its launch is nothing."""
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
    """For tensors so small that a second thread only waits, on a busy machine for very long."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def facts(device: Device) -> dict[str, str | int]:
    """What a row says of the machine and the versions."""
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
    """What RDP_COMMIT says, for a copy of the tree, which doesn't know. Else git's, with `-dirty` where the code isn't
    the commit's; what was measured before may have changed results and README. Empty without git or a clone."""

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
    """The largest cache that Linux lists for the first core."""
    sizes = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    kibibytes = [int(text[:-1]) for text in (size.read_text().strip() for size in sizes) if text.endswith("K")]
    return max(kibibytes, default=0) << 10 or CACHE_IF_UNKNOWN
