"""The share of a copy's bandwidth to expect of a launch on a GPU, from its compiled code.

Memory delivers a copy's bandwidth only while enough loaded bytes are on their way to each multiprocessor: bandwidth ×
latency / multiprocessors (Little's law). With fewer bytes it delivers less, and the latency is shorter: it is taken to
rise in proportion to the bandwidth, from that of an idle memory to that of a busy one. A kernel has on their way

    programs that fit × threads × bytes of a thread × share of the columns of its tiles that exist.

The bytes of a thread are those that it loads for each wait and, in a pipelined loop, those of its asynchronous copies.
Loads of small tensors (γ, indices) don't count, and neither do stores. Programs run in waves of as many as fit.
Arithmetic, barriers and the start of a kernel are left out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from rdp_kernels.kernels.triton.prepared import Launch

from .compiled_code import CudaCode
from .harness import Row

SMALL = 100
"""A tensor is small if it fits so many times into the largest one of its launch."""


@dataclass(frozen=True)
class GPU:
    """The figures of a GPU. Those without a unit are of one multiprocessor; shared memory is in bytes.

    Args:
        copy: bytes/s of a copy, read and written.
        idle_latency, busy_latency: seconds from a load to its data, when memory does nothing else, and when it delivers
            a copy's bandwidth.
        register_unit: a warp's registers are a multiple of it.
        reserved: shared memory that each program takes beside its own.
    """

    name: str
    multiprocessors: int
    copy: float
    idle_latency: float
    busy_latency: float
    registers: int = 65536
    register_unit: int = 256
    shared: int = 228 << 10
    reserved: int = 1 << 10
    warps: int = 64
    programs: int = 32

    @property
    def in_flight(self) -> float:
        """The bytes that must be on their way to a multiprocessor for a copy's bandwidth."""
        return self.copy * self.busy_latency / self.multiprocessors

    def speed(self, in_flight: float) -> float:
        """Returns the share of a copy's bandwidth with so many bytes on their way to each multiprocessor. It is the
        solution of share × latency = in_flight / needed × busy_latency, where the latency rises with the share. A
        kernel without loads waits for none."""
        if in_flight == 0:
            return 1.0
        idle = self.idle_latency / self.busy_latency
        share = (math.sqrt(idle**2 + 4 * (1 - idle) * in_flight / self.in_flight) - idle) / (2 * (1 - idle))
        return min(share, 1.0)

    def share_of_copy(self, waves: float, in_flight: float) -> float:
        """Returns the expected share of a copy's bandwidth over all waves. In the last one only a part of the programs
        that fit may run."""
        whole, part = divmod(waves, 1)
        return waves / (whole / self.speed(in_flight) + (part / self.speed(part * in_flight) if part else 0.0))

    def fitting(self, warps: int, registers: int, shared: int) -> int:
        """Returns how many programs of `warps` run on a multiprocessor at the same time."""
        of_a_warp = math.ceil(32 * registers / self.register_unit) * self.register_unit
        by_shared = self.shared // (shared + self.reserved)
        return min(self.registers // (of_a_warp * warps), by_shared, self.warps // warps, self.programs)


# A copy's speed is what H200s are reported to reach, of 4.8 TB/s. The busy latency makes 48 KiB in flight: NVIDIA's
# CCCL asks for so many on an H200, and for 32 on an H100 (`arch_to_min_bytes_in_flight` in its file
# cub/device/dispatch/tuning/tuning_transform.cuh). It is the pessimistic end of what is known. A load on an idle GH200,
# also a Hopper, takes 690 cycles (github.com/markdewing/AI_kernels, latency/README.md): 0.35 µs at 1.98 GHz.
GPUS = {"sm_90": GPU("H200", multiprocessors=132, copy=4.3e12, idle_latency=0.35e-6, busy_latency=1.5e-6)}


def small_of(launch: Launch) -> set[str]:
    """Returns the arguments whose tensors are small. Their loads come from a cache."""
    sizes = {name.removesuffix("_ptr"): x.nbytes for name, x in launch.arguments.items() if isinstance(x, torch.Tensor)}
    return {name for name, size in sizes.items() if SMALL * size <= max(sizes.values())}


def expectation(launch: Launch, code: CudaCode, gpu: GPU) -> Row:
    """Returns the columns of one launch. `bytes` are those of its large tensors."""
    tensors = {name.removesuffix("_ptr"): x for name, x in launch.arguments.items() if isinstance(x, torch.Tensor)}
    columns = launch.arguments.get("BLOCK_N", 1)
    width = next((launch.arguments[name] for name in ("width", "sample_size") if name in launch.arguments), columns)
    exist = width / (math.ceil(width / columns) * columns)
    warps, programs = launch.config.num_warps, launch.grid[0]
    fitting = gpu.fitting(warps, code.registers, code.shared_bytes)
    in_flight = fitting * 32 * warps * (code.bytes_per_wait + code.bytes_ahead) * exist
    waves = programs / (fitting * gpu.multiprocessors)
    share = gpu.share_of_copy(waves, in_flight)
    return {
        "kernel": launch.kernel.__name__.removeprefix("_").removesuffix("_kernel"),
        "gpu": gpu.name,
        "bytes": sum(x.nbytes for name, x in tensors.items() if name not in small_of(launch)),
        "programs": programs,
        "warps": warps,
        "registers": code.registers,
        "shared_bytes": code.shared_bytes,
        "barriers_in_loop": code.barriers_in_loop,
        "programs_fit": fitting,
        "in_flight": in_flight,
        "needed_in_flight": gpu.in_flight,
        "waves": waves,
        "lost_in_last_wave": 1 - share / gpu.speed(in_flight),
        "expected_share": share,
    }
