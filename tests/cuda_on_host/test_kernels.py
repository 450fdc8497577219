"""The CUDA kernels and their host code, without a GPU: compiled for the host, where fibers stand for the threads of a
block, and checked by the numerics suite of `tests/kernels`.

This shows that indices, packs, alignment, dtypes, launches, sums and barriers are right, in any order of threads, and
that nothing outside a tensor is touched. It doesn't show effects of real parallelism (atomicity, memory order, streams)
or of nvcc (its `__CUDA_ARCH__` branches, registers, fused multiply-adds), nor the speed. Accesses outside a tensor and
misaligned ones are seen where the compiler has ASan and UBSan.
"""

import os
import shutil
import subprocess
import sys

import pytest
import torch

from . import build

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux" or shutil.which("c++") is None, reason="no compiler"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU runs the kernels itself"),
]


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    tree = tmp_path_factory.mktemp("cuda_on_host")
    build.copy_tree(tree)
    build.compile_library(tree)
    return tree


LOWERED = {
    "RDP_MAX_BLOCKS_X": "2",
    "RDP_MAX_BLOCKS_Y": "2",
    "RDP_CHUNK_STEPS": "1",
    "RDP_MAX_CHUNKS": "3",
    "RDP_MAX_SUM_BLOCKS": "3",
}


def test_numerics_suite(tree):
    """With the limits as they are and lowered, every kernel runs with all its template arguments. Budget: 3 minutes,
    with the build."""
    for limits in ({}, LOWERED):
        check_numerics(tree, limits)


def check_numerics(tree, limits):
    launches = tree / "launches.tsv"
    launches.unlink(missing_ok=True)
    ours = ("RDP_", "PYTEST_", "PYTHONPATH", "LD_PRELOAD", "TRITON_")
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    paths = {"PYTHONPATH": str(tree), "RDP_LAUNCHES": str(launches), "RDP_CUDA_ON_HOST": "1", "RDP_EXAMPLES": "0.5"}
    # a sanitizer's message comes last
    options = ("--capture=sys", "-k", "(against_float64 or fixed_row or test_nan) and not triton")
    result = subprocess.run(
        [sys.executable, "-m", "pytest", *options, "tests/kernels", "tests/cuda_on_host/rounds.py"],
        cwd=tree,
        env=inherited | build.sanitizers() | paths | limits,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert result.returncode == 0, f"{limits}\n{result.stdout[-20_000:]}"
    table = [line.split("\t") for line in launches.read_text(encoding="utf-8").splitlines()]
    assert len(table) > 0
    assert [kernel for count, kernel in table if count == "0"] == [], limits
