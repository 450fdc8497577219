"""Kernels compiled ahead of time, without a GPU, and the facts in their code.

A launch is caught on its way to the driver. It is compiled with the signature, the divisibility marks and the launch
numbers that such tensors get on a GPU.
"""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel, make_backend
from triton.runtime.jit import create_function_from_signature

from rdp_kernels.kernels.triton import launch as launching
from rdp_kernels.kernels.triton import launchers
from rdp_kernels.kernels.triton.prepared import Launch, observed

from .in_flight import in_flight, sass_bytes

CUDA = {f"sm_{number}": GPUTarget("cuda", number, 32) for number in (80, 90, 100)}
TARGETS = CUDA | {"gfx942": GPUTarget("hip", "gfx942", 64)}


@dataclass(frozen=True)
class CudaCode:
    """Facts from the code of one kernel.

    Facts of *the loop* are those of the longest loop in the PTX, which is the one over tiles. The machine code may hold
    several turns of it. Without a loop they are facts of the whole kernel, except that nothing counts as in the loop.

    Args:
        registers: of a thread.
        local_bytes: of a thread's local memory, as the kernel declares it.
        local_accesses: instructions that load from it or store there.
        shared_bytes: of a program's shared memory.
        barriers: instructions on which all warps of a program wait for each other.
        barriers_in_loop: those of one turn of the loop; 0 without a loop.
        async_copies: copies of one turn of the loop from global to shared memory (cp.async), by bytes of a thread;
            empty without a loop.
        loads_before_store: whether each load of the loop stands before its first store, in global memory. An
            asynchronous copy isn't one of these loads: it is for a later turn.
        loads_in_flight, bytes_in_flight: the most global loads, and the most bytes of them, that a thread waits for at
            the same time. Asynchronous copies are included. See `in_flight`.
        bytes_per_wait: the bytes that the ordinary loads of the loop fill in a thread, divided by the number of times
            that it waits for some of them.
        bytes_ahead: the most bytes of asynchronous copies on their way at the same time.
        accesses: how many instructions on global memory there are, by ("load" or "store", bytes). An asynchronous copy
            is a load.
        by_argument: the same by (argument, "load" or "store", bytes). Of the PTX, where an address can be followed back
            to the argument that it is an offset of; `accesses` says whether the machine code still has these widths.
    """

    registers: int
    local_bytes: int
    local_accesses: int
    shared_bytes: int
    barriers: int
    barriers_in_loop: int
    async_copies: Counter[int]
    loads_before_store: bool
    loads_in_flight: int
    bytes_in_flight: int
    bytes_per_wait: float
    bytes_ahead: int
    accesses: Counter[tuple[str, int]]
    by_argument: Counter[tuple[str, str, int]]

    def widths(self, but: frozenset[str] = frozenset()) -> dict[str, set[int]]:
        """For each argument, except those of `but`, the bytes of an access."""
        names = {name for name, _, _ in self.by_argument} - but
        return {name: {size for other, _, size in self.by_argument if other == name} for name in names}

    @property
    def accesses_in_ptx(self) -> Counter[tuple[str, int]]:
        total: Counter[tuple[str, int]] = Counter()
        for (_, op, size), count in self.by_argument.items():
            total[op, size] += count
        return total


def caught_launches(run: Callable[[], None], architecture: str) -> list[Launch]:
    """The launches in `run`, on CPU tensors, with the numbers for `architecture`. No kernel runs."""
    caught: list[Launch] = []
    on_it = mock.patch.object(launching, "architecture", return_value=architecture)
    with on_it, launchers.nothing_prepared(), observed(caught.append):
        run()
    return caught


def compile_launch(launch: Launch, target: GPUTarget) -> CompiledKernel:
    """Compiles as Triton's own launcher does at the first call with such arguments."""
    kernel, backend = launch.kernel, make_backend(target)
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, options = bind(**launch.arguments, **launch.options)
    options, signature, constants, marks = kernel._pack_args(backend, launch.options, bound, specialization, options)
    source = ASTSource(kernel, signature, constants, marks)
    return triton.compile(source, target=target, options=options.__dict__)


def read_cuda_code(compiled: CompiledKernel, folder: Path, cached: Collection[str] = ()) -> CudaCode:
    """`folder` takes the disassembler's input. `bytes_per_wait` and `bytes_ahead` leave out loads of the `cached`
    arguments, as if they took no time."""
    cubin = folder / f"{compiled.hash}.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    usage = _output_of(triton.knobs.nvidia.cuobjdump.path, "-res-usage", cubin)
    sass = _output_of(triton.knobs.nvidia.nvdisasm.path, "--print-code", "--no-dataflow", cubin)
    declared = {name: int(number) for name, number in re.findall(r"\b(REG|STACK|LOCAL|CONSTANT\[0\]):(\d+)", usage)}
    ptx, signature = compiled.asm["ptx"], compiled.src.signature
    loop = longest_loop(ptx)
    pointers = _pointers(ptx, signature, declared["CONSTANT[0]"])
    everywhere, turn = in_flight(sass), in_flight(sass, longest_loop(sass), pointers, cached)
    if turn.waits == 0:  # no loop, or none that loads
        turn = in_flight(sass, sass, pointers, cached)
    return CudaCode(
        registers=declared["REG"],
        local_bytes=declared["STACK"] + declared["LOCAL"],
        local_accesses=len(re.findall(r"\b(?:LDL|STL)\b", sass)),
        shared_bytes=compiled.metadata.shared,
        barriers=len(re.findall(r"\bBAR\.SYNC", sass)),
        barriers_in_loop=len(re.findall(r"\bbar(?:rier)?\.(?:cta\.)?sync", loop)),
        async_copies=async_copies(loop),
        loads_before_store=loads_before_store(loop or ptx),
        loads_in_flight=everywhere.loads,
        bytes_in_flight=everywhere.bytes,
        bytes_per_wait=turn.loaded / max(turn.waits, 1),
        bytes_ahead=turn.ahead,
        accesses=Counter(
            ("store" if op == "STG" else "load", sass_bytes(modifiers))
            for op, modifiers in re.findall(r"\b(LDG|LDGSTS|STG)\.([\w.]+) ", sass)
        ),
        by_argument=_accesses_by_argument(ptx, signature),
    )


def longest_loop(code: str) -> str:
    """The text from a label to the last branch back to it, the longest one without another loop in it; empty without a
    loop. For PTX and SASS."""
    labels = {label[1]: label.end() for label in re.finditer(r"^([$.]L\w+):", code, re.MULTILINE)}
    branches = re.finditer(r"\b(?:bra|BRA)\b[^;\n]*?([$.]L\w+)\)?\s*;", code)
    ends = {labels[branch[1]]: branch.start() for branch in branches if branch.start() > labels[branch[1]]}
    inner = {begin: end for begin, end in ends.items() if not any(begin < other < end for other in ends)}
    return max((code[begin:end] for begin, end in inner.items()), key=len, default="")


def async_copies(ptx: str) -> Counter[int]:
    """Copies from global to shared memory, by bytes."""
    return Counter(int(size, 16) for _, size in _ASYNC_COPY.findall(ptx))


def loads_before_store(ptx: str) -> bool:
    """Whether no load from global memory follows a store there."""
    ops = [op for op, *_ in _ACCESS.findall(ptx)]
    return "st" not in ops or "ld" not in ops[ops.index("st") :]


def read_amd_facts(compiled: CompiledKernel) -> dict[str, int]:
    """Threads of a program, and bytes and registers that are spilled."""
    names = "max_flat_workgroup_size|private_segment_fixed_size|sgpr_spill_count|vgpr_spill_count"
    return {name: int(n) for name, n in re.findall(rf"\.({names}): +(\d+)", compiled.asm["amdgcn"])}


def _output_of(*command: str | Path) -> str:
    done = subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    return done.stdout


def _pointers(ptx: str, signature: dict[str, str], constant_bytes: int) -> dict[int, str]:
    """The place of each pointer argument in the constant memory, which ends with the arguments."""
    at_run_time = [name for name, kind in signature.items() if kind != "constexpr"]
    places, end = [], 0
    for bits in re.findall(r"\.param \.[a-z](\d+) .*_param_\d+", ptx):
        size = int(bits) // 8
        places.append(-(-end // size) * size)
        end = places[-1] + size
    pointers = ((name, place) for name, place in zip(at_run_time, places, strict=False) if signature[name][0] == "*")
    return {constant_bytes - end + place: name.removesuffix("_ptr") for name, place in pointers}


_PARAMETER = re.compile(r"ld\.param\.\w+\s+(%rd\d+), \[\w+_param_(\d+)\];")
_COMPUTED = re.compile(r"^\s*(?:@!?%p\d+ )?[a-z][\w.]*\s+(%rd\d+), ([^\[\]\n]*);", re.MULTILINE)
_ACCESS = re.compile(r"\b(ld|st)\.global[\w.:]*?(?:\.v(\d))?\.[bfsu](\d+)\s[^\[]*\[\s*(%rd\d+)")
_ASYNC_COPY = re.compile(r"\bcp\.async\.c[ag]\.shared\.global[\w.:]*\s*\[[^\]]*\],\s*\[\s*(%rd\d+)[^\]]*\],\s*(0x\w+)")


def _accesses_by_argument(ptx: str, signature: dict[str, str]) -> Counter[tuple[str, str, int]]:
    """Follows the register of every address back to the one pointer that it was computed from."""
    at_run_time = [name for name, kind in signature.items() if kind != "constexpr"]
    pointers = {
        register: at_run_time[int(number)].removesuffix("_ptr")
        for register, number in _PARAMETER.findall(ptx)
        if int(number) < len(at_run_time) and signature[at_run_time[int(number)]].startswith("*")
    }
    sources: dict[str, set[str]] = {}
    for register, computed_from in _COMPUTED.findall(ptx):
        sources.setdefault(register, set()).update(re.findall(r"%rd\d+", computed_from))

    found = [(op, int(vector or 1) * int(bits) // 8, address) for op, vector, bits, address in _ACCESS.findall(ptx)]
    found += [("ld", int(size, 16), address) for address, size in _ASYNC_COPY.findall(ptx)]
    accesses: Counter[tuple[str, str, int]] = Counter()
    for op, size, address in found:
        reached, ahead = set(), {address}
        while ahead:
            reached |= ahead
            ahead = {source for register in ahead for source in sources.get(register, ())} - reached
        (name,) = {pointers[register] for register in reached & pointers.keys()}
        accesses[name, "load" if op == "ld" else "store", size] += 1
    return accesses
