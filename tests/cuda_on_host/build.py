"""A copy of the tree whose compiled library runs the CUDA kernels on the host.

Sources are compiled as they are, except for `EDITS`, with the headers of `include/` in place of CUDA's. Some functions
of torch's C interface are replaced by those of `host.cpp`.
"""

import ctypes
import re
import shutil
import subprocess
from pathlib import Path

import torch
from torch.utils import cpp_extension

ROOT = Path(__file__).parents[2]
HOST = Path("tests", "cuda_on_host")

KERNEL = r"__launch_bounds__\(([^,)]*)[^)]*\)\s+\w+_kernel\([^{]*\{"
LAUNCH = r"(?s)(\w+_kernel(?:<[^;{]*?>)?)\s*<<<(.*?)>>>\((.*?)\);"
COUNTED = r"\g<0> struct Here {}; host::enter<Here>(\1);"
SHARED, POISONED = r"__shared__ \w+ (\w+)[^;]*;", r"\g<0> host::poison(\1);"
LIMIT = r"constexpr int64_t (MAX_BLOCKS_Y|CHUNK_STEPS|MAX_CHUNKS|MAX_SUM_BLOCKS) = (\d+);"
LOWERED = r'inline const int64_t \1 = host::limit("RDP_\1", \2);'

EDITS = (
    # file, pattern, replacement, how often it is found
    ("csrc/cuda/fused_add.cu", LAUNCH, r"host::launch(\2, [&] { \1(\3); });", 7),
    ("csrc/cuda/residual_add.cuh", KERNEL, COUNTED, 5),
    ("csrc/cuda/gather_rows.cuh", KERNEL, COUNTED, 2),
    ("csrc/cuda/residual_add.cuh", SHARED, POISONED, 7),
    ("csrc/cuda/gather_rows.cuh", SHARED, POISONED, 1),
    # limits that only large tensors reach can be lowered
    ("csrc/cuda/residual_add.cuh", LIMIT, LOWERED, 3),
    ("csrc/cuda/steps.cuh", LIMIT, LOWERED, 1),
    ("csrc/cuda/fused_add.cu", r"1, 1024\);", r'1, host::limit("RDP_MAX_BLOCKS_X", 1024));', 1),
    # CPU tensors are treated as a GPU's
    ("csrc/checks.h", r"return tensor\.is_cuda\(\);", "return true;", 1),
    ("rdp_kernels/kernels/native/support.py", r'device\.type == "cuda"', "True", 1),
    ("rdp_kernels/kernels/native/library.py", r"torch\.cuda\.is_available\(\) and (.*)device\.index", r"\1-1", 1),
)
EXCHANGED = {
    "aoti_torch_device_type_cuda": "aoti_torch_device_type_cpu",
    "aoti_torch_empty_strided": "host_empty_strided",
    "aoti_torch_create_device_guard": "host_create_device_guard",
    "aoti_torch_delete_device_guard": "host_delete_device_guard",
    "aoti_torch_get_current_cuda_stream": "host_current_stream",
}


def copy_tree(to: Path) -> None:
    """Sources and tests, edited; fails where the sources have changed so that an edit no longer fits."""
    for folder in ("csrc", "rdp_kernels", "tests"):
        shutil.copytree(ROOT / folder, to / folder, ignore=shutil.ignore_patterns("_C.*", "__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", to)
    for file, pattern, replacement, times in EDITS:
        path = to / file
        text, found = re.subn(pattern, replacement, path.read_text(encoding="utf-8"))
        assert found == times, f"{file}: {found} instead of {times} places match {pattern}"
        path.write_text(text, encoding="utf-8")


def sanitizers() -> dict[str, str]:
    """The environment in which a library with sanitizers can be loaded; empty where the compiler has none."""
    needed = [_compiler("-print-file-name=" + name) for name in ("libasan.so", "libstdc++.so.6")]
    if not all(Path(path).is_absolute() for path in needed):
        return {}
    options = "detect_leaks=0:allocator_may_return_null=1"
    return {"LD_PRELOAD": " ".join(needed), "ASAN_OPTIONS": options, "UBSAN_OPTIONS": "print_stacktrace=1"}


def compile_library(tree: Path, sanitize: bool = True, again: bool = False, optimize: bool = False) -> None:
    """Compiles the library of a copy, without CPU kernels. UBSan sees misaligned packs, ASan accesses outside tensors.

    Args:
        tree: a folder that `copy_tree` has filled.
        sanitize: with the sanitizers, where the compiler has them.
        again: only the kernels have changed since.
        optimize: host code is as fast as in a build for a GPU. With RDP_NO_KERNELS in its environment a process then
            measures host time: launches are counted (`launches_of`) and run nothing.
    """
    stable_abi = re.search(r'STABLE_ABI = "(\w+)"', (ROOT / "setup.py").read_text(encoding="utf-8"))
    assert stable_abi is not None
    sanitized = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"] if sanitize and sanitizers() else []
    flags = ["-std=c++20", "-O3" if optimize else "-O1", "-g1", "-w", "-fPIC", "-fvisibility=hidden", *sanitized]
    flags += ["-ffp-contract=off", "-fno-strict-aliasing"]  # packs: nvcc has no such rule
    flags += ["-DRDP_CUDA", f"-DTORCH_TARGET_VERSION={stable_abi[1]}"]
    flags += [f"-I{path}" for path in (HOST / "include", "csrc", *cpp_extension.include_paths())]
    exchanges = [f"-D{torchs}={ours}" for torchs, ours in EXCHANGED.items()]
    if not again:
        _compiler(*flags, "-c", HOST / "host.cpp", "-o", "host.o", cwd=tree)
        _compiler(*flags, *exchanges, "-c", "csrc/bindings.cpp", "-o", "bindings.o", cwd=tree)
    _compiler(*flags, *exchanges, "-c", "-x", "c++", "csrc/cuda/fused_add.cu", "-o", "fused_add.o", cwd=tree)
    libraries = [f"-L{Path(torch.__file__).parent / 'lib'}", "-ltorch_cpu", "-lc10"]
    output = ["-o", "rdp_kernels/_C.abi3.so"]
    _compiler("-shared", *sanitized, "host.o", "bindings.o", "fused_add.o", *libraries, *output, cwd=tree)


def launches_of(library: Path) -> int:
    """The launches of CUDA kernels by this process so far; `library` is the compiled `_C.abi3.so` of a copy."""
    return ctypes.CDLL(str(library)).rdp_host_launches()


def scratch_bytes(library: Path) -> int:
    """The size of the memory that kernels last took for themselves: partial sums for dγ."""
    return ctypes.CDLL(str(library)).rdp_host_scratch_bytes()


def _compiler(*arguments: object, cwd: Path | None = None) -> str:
    command = ["c++", *map(str, arguments)]
    result = subprocess.run(command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert result.returncode == 0, result.stdout
    return result.stdout.strip()
