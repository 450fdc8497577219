"""The machine code that nvcc makes of `csrc/cuda`, for each architecture. Needs a CUDA toolkit and no GPU."""

import re
import shutil
import subprocess
from collections import Counter
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


def nvcc():
    for home in (cpp_extension.CUDA_HOME, "/usr/local/cuda"):
        if home is not None and Path(home, "bin", "nvcc").exists():
            return str(Path(home, "bin", "nvcc"))
    found = shutil.which("nvcc")
    return found or pytest.skip("needs a CUDA toolkit")


@pytest.fixture(scope="module", params=["80", "90", "100"])
def code(request, tmp_path_factory):
    """What ptxas says about each kernel, and its accesses to memory, as (mangled name: instruction: count)."""
    cubin = tmp_path_factory.mktemp("cuda") / "fused_add.cubin"
    includes = [f"-I{path}" for path in cpp_extension.include_paths()]
    defines = ["-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020a000000000000", *cpp_extension.COMMON_NVCC_FLAGS]
    arch = f"arch=compute_{request.param},code=sm_{request.param}"
    command = [nvcc(), "-O3", "-std=c++17", "-gencode", arch, "-Xptxas=-v", "-w", *defines, *includes, "-cubin"]
    done = subprocess.run([*command, "-o", cubin, ROOT / "csrc/cuda/fused_add.cu"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    frames = re.findall(
        r"properties for (\S+)\n\s+(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+)", done.stderr
    )
    accesses, kernel = {}, None
    for line in subprocess.run(
        [triton.knobs.nvidia.cuobjdump.path, "-sass", cubin], capture_output=True, text=True, check=True
    ).stdout.splitlines():
        if named := re.search(r"Function : (\S+)", line):
            kernel = accesses.setdefault(named[1], Counter())
        if access := re.search(r"\b(LDG|STG|LDL|STL|LD|ST)\.(E(?:\.\w+)*)", line):
            kernel[access[1] + "." + access[2]] += 1
    return {name: [int(n) for n in rest] for name, *rest in frames}, accesses


@pytest.mark.slow
def test_nothing_spills(code):
    """Budget: half a minute with the other test, for three architectures."""
    frames, accesses = code
    assert len(frames) == len(accesses) == len(ELEMENTWISE) * len(TYPES) * 2 + 3 + 3 + 1
    assert {name: frame for name, frame in frames.items() if any(frame)} == {}
    assert not [name for name, counts in accesses.items() if any(op.startswith(("LDL", "STL")) for op in counts)]


@pytest.mark.slow
@pytest.mark.parametrize("types", TYPES)
@pytest.mark.parametrize("kernel", ELEMENTWISE)
def test_aligned_tensors_move_in_128_bits(code, kernel, types):
    """All stores do, except those of partial sums. Other loads are of a row's place and scale, of a narrow γ, and of one
    factor for all of a pack."""
    _, accesses = code
    pack = PACKED.get(types, 8)
    (counts,) = [found for name, found in accesses.items() if f"{kernel}I{types}Li{pack}E" in name]
    stores = {op: n for op, n in counts.items() if op.startswith("ST")}
    loads = {op: n for op, n in counts.items() if op.startswith("LD")}
    partials = {"STG.E": 1 if "row_sums" in kernel else pack} if "sums" in kernel else {}
    assert stores == {"STG.E.128": stores["STG.E.128"]} | partials
    wide = sum(n for op, n in loads.items() if op.endswith(".128"))
    places = 1 if "fwd" in kernel else 2
    narrow_gamma = 2 if types == "ff" else 0
    assert wide >= 3
    assert sum(n for op, n in loads.items() if op.endswith(".64")) <= places + narrow_gamma
    assert counts["LDG.E"] + counts["LDG.E.U16"] <= 4, "a row's scale, and a position's factor in three dtypes"
    assert not [op for op in loads if op.endswith(("U8", "32"))]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["f", "13__nv_bfloat16", "6__half"])
def test_sums_of_partials_load_ahead(code, dtype):
    """The loads of one round don't wait for each other."""
    _, accesses = code
    (counts,) = [found for name, found in accesses.items() if f"sum_partials_kernelI{dtype}E" in name]
    assert counts["LDG.E"] == 8


@pytest.mark.slow
def test_gathered_rows_move_in_128_bits(code):
    _, accesses = code
    (counts,) = [found for name, found in accesses.items() if "gather_rows_kernelI4int4E" in name]
    assert set(counts) == {"LDG.E.64", "LDG.E.128", "STG.E.128"}
