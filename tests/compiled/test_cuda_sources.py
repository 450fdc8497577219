"""The machine code that nvcc makes of `csrc/cuda`, for each architecture. Needs a CUDA toolkit and no GPU."""

import re
import shutil
import subprocess
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import triton
from torch.utils import cpp_extension

ROOT = Path(__file__).parents[2]
TYPES = ("ff", "f13__nv_bfloat16", "f6__half", "13__nv_bfloat16S2_", "6__halfS2_")
PACKED = {"ff": 4}
"""Elements of a pack; 8 for kernels that aren't listed."""
ELEMENTWISE = (
    "residual_add_fwd_kernel",
    "residual_add_bwd_kernel",
    "residual_add_bwd_sums_kernel",
    "residual_add_bwd_row_sums_kernel",
)
SHARED_MEMORY = {"80": 164, "90": 228, "100": 228}
"""KiB of a multiprocessor. CUDA takes 1 KiB for each block."""


def nvcc():
    for home in (cpp_extension.CUDA_HOME, "/usr/local/cuda"):
        if home is not None and Path(home, "bin", "nvcc").exists():
            return str(Path(home, "bin", "nvcc"))
    found = shutil.which("nvcc")
    return found or pytest.skip("needs a CUDA toolkit")


@dataclass
class Kernel:
    """What ptxas says about a kernel, and its accesses to memory and sums, in order."""

    frame_and_spills: tuple[int, int, int]
    registers: int
    shared_bytes: int
    instructions: list[str] = field(default_factory=list)

    @property
    def counts(self):
        return Counter(self.instructions)


@pytest.fixture(scope="module", params=list(SHARED_MEMORY))
def code(request, tmp_path_factory):
    """The architecture, and a `Kernel` for each mangled name."""
    cubin = tmp_path_factory.mktemp("cuda") / "fused_add.cubin"
    includes = [f"-I{path}" for path in cpp_extension.include_paths()]
    defines = ["-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020a000000000000", *cpp_extension.COMMON_NVCC_FLAGS]
    arch = f"arch=compute_{request.param},code=sm_{request.param}"
    command = [nvcc(), "-O3", "-std=c++17", "-gencode", arch, "-Xptxas=-v", "-w", *defines, *includes, "-cubin"]
    done = subprocess.run([*command, "-o", cubin, ROOT / "csrc/cuda/fused_add.cu"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    kernels = {}
    for name, *frame, used in re.findall(
        r"properties for (\S+)\n\s+(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) .*\n.*Used (.*)",
        done.stderr,
    ):
        shared = re.search(r"(\d+) bytes smem", used)
        kernels[name] = Kernel(tuple(map(int, frame)), int(used.split()[0]), int(shared[1]) if shared else 0)
    for line in subprocess.run(
        [triton.knobs.nvidia.cuobjdump.path, "-sass", cubin], capture_output=True, text=True, check=True
    ).stdout.splitlines():
        if named := re.search(r"Function : (\S+)", line):
            kernel = kernels[named[1]]
        if found := re.search(r"\b((?:LDG|STG|LDL|STL|LD|ST)\.E(?:\.\w+)*|LDGSTS[.\w]*|FADD|DEPBAR.*?(?=;))", line):
            kernel.instructions.append(found[1].strip())
    return request.param, kernels


def kernel_of(code, name, types, pack):
    (found,) = [kernel for mangled, kernel in code[1].items() if f"{name}I{types}Li{pack}E" in mangled]
    return found


@pytest.mark.slow
def test_nothing_spills(code):
    """Budget: half a minute with the other tests, for three architectures."""
    _, kernels = code
    assert len(kernels) == len(ELEMENTWISE) * len(TYPES) * 2 + 3 + 3 + 1
    assert {name: kernel for name, kernel in kernels.items() if any(kernel.frame_and_spills)} == {}
    assert not [name for name, kernel in kernels.items() if {"LDL", "STL"} & {op[:3] for op in kernel.instructions}]


@pytest.mark.slow
def test_1024_threads_fit_a_multiprocessor(code):
    arch, kernels = code
    for name, kernel in kernels.items():
        assert kernel.registers <= 64, name
        blocks = 4 if "residual_add" in name else 1
        assert blocks * (kernel.shared_bytes / 1024 + 1) <= SHARED_MEMORY[arch], name


@pytest.mark.slow
@pytest.mark.parametrize("types", TYPES)
@pytest.mark.parametrize("name", ELEMENTWISE)
def test_aligned_tensors_move_in_128_bits(code, name, types):
    """All stores do, except those of partial sums, and all loads of operands. Other loads are of γ and of a row's place
    and scale."""
    pack = PACKED.get(types, 8)
    counts = kernel_of(code, name, types, pack).counts
    partials = {"STG.E": 1 if "row_sums" in name else pack} if "sums" in name else {}
    assert {op: n for op, n in counts.items() if op.startswith("ST")} == {"STG.E.128": counts["STG.E.128"]} | partials
    gammas = 1 if "sums" in name else steps_ahead(name, types)
    packs_of_gamma = Counter({"LDG.E.128": 1, "LDG.E.64": 2} if types == "ff" else {"LDG.E.128": 4})
    places = 1 if "fwd" in name else 2
    assert counts["LDG.E.128"] <= gammas * packs_of_gamma["LDG.E.128"]
    assert counts["LDG.E.64"] <= gammas * packs_of_gamma["LDG.E.64"] + places
    assert counts["LDG.E"] + counts["LDG.E.U16"] <= gammas * 3 + 1, "a position's factor in three dtypes, a row's scale"
    assert not [op for op in counts if op.startswith("LD") and op.endswith(("U8", "32"))]


def words(name, types):
    """The words of 16 bytes that a step loads, if all operands are there."""
    of_residual = 2 if types[0] == "f" and types != "ff" else 1
    return 1 + (of_residual if "fwd" in name else 3 * of_residual)


def steps_ahead(name, types):
    """As many steps as 32 KiB of a block's shared memory hold, of 256 threads."""
    return min(2, 32 * 1024 // (256 * 16 * words(name, types)))


@pytest.mark.slow
@pytest.mark.parametrize("types", TYPES)
@pytest.mark.parametrize("name", ELEMENTWISE)
def test_operands_are_loaded_ahead(code, name, types):
    """A thread waits for all of a step at once, while the next step is on its way to shared memory."""
    counts = kernel_of(code, name, types, PACKED.get(types, 8)).counts
    ahead = steps_ahead(name, types)
    assert counts["LDGSTS.E.BYPASS.128"] == ahead * words(name, types)
    assert {op: n for op, n in counts.items() if "DEPBAR" in op} == {f"DEPBAR.LE SB0, 0x{ahead - 1}": ahead}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["f", "13__nv_bfloat16", "6__half"])
def test_sums_of_partials_load_ahead(code, dtype):
    """The loads of one round don't wait for each other."""
    (kernel,) = [found for name, found in code[1].items() if f"sum_partials_kernelI{dtype}E" in name]
    first = kernel.instructions.index("FADD")
    assert kernel.instructions[:first] == ["LDG.E"] * 8
    assert "LDG.E" not in kernel.instructions[first:]


@pytest.mark.slow
def test_gathered_rows_move_in_128_bits(code):
    (kernel,) = [found for name, found in code[1].items() if "gather_rows_kernelI4int4E" in name]
    assert set(kernel.counts) == {"LDG.E.64", "LDGSTS.E.BYPASS.128", "DEPBAR.LE SB0, 0x1", "STG.E.128"}
