"""The fixed table catches faults: a copy of the sources gets one fault at a time, and some row must fail."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.cuda_on_host import build

ROOT = Path(__file__).parents[2]
NUMBERS = r"FAILED \S+\[(?:triton|native)-(\S+)\] - AssertionError: (.*(?:off by|more than one rounding|other bits).*)"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux" or shutil.which("c++") is None, reason="no compiler"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="the table in small, on a CPU, is what is broken"),
]

# File, right line, wrong line. No fault makes a kernel leave a tensor's memory.
TRITON = {
    "mask: idle columns count in the variance": (
        "rdp_kernels/kernels/triton/residual_add_norm.py",
        "x = tl.where(in_width, x - mean[:, None], 0.0)",
        "x = x - mean[:, None]",
    ),
    "norm: its backward takes the mean for 0": (
        "rdp_kernels/kernels/triton/common.py",
        "return (x - mean[:, None]) * rstd[:, None]",
        "return x * rstd[:, None]",
    ),
    "stride: the residual's rows follow each other": (
        "rdp_kernels/kernels/triton/residual_add.py",
        "pointers(residual_ptr, b, p, n, residual_row_stride, width)",
        "pointers(residual_ptr, b, p, n, sample_size, width)",
    ),
    "scale: not in the gradient": (
        "rdp_kernels/kernels/triton/residual_add.py",
        "d = keep_rows(factor[:, None] * d, row_scale_ptr, update_mask)",
        "d = keep_rows(d, row_scale_ptr, update_mask)",
    ),
    "γ: the next position's": (
        "rdp_kernels/kernels/triton/residual_add.py",
        "load_positions(gamma_ptr, p % channels, exists, BLOCK_N)",
        "load_positions(gamma_ptr, (p + 1) % channels, exists, BLOCK_N)",
    ),
    "sums: the same samples in every program": (
        "rdp_kernels/kernels/triton/residual_add.py",
        "group = chunk * tiles + i // column_blocks",
        "group = i // column_blocks",
    ),
    "rows: those of a program's first sample": (
        "rdp_kernels/kernels/triton/residual_add_norm.py",
        "b = first_sample + sample + tl.arange(0, 1)",
        "b = first_sample + tl.arange(0, 1)",
    ),
    "rows: inverted to themselves": (
        "rdp_kernels/kernels/triton/rows.py",
        "tl.store(inverse_ptr + b, k.to(tl.int64), mask=exists)",
        "tl.store(inverse_ptr + b, b, mask=exists)",
    ),
}
CPU = {
    "mask: dropped rows are read": (
        "csrc/cpu/forward.cpp",
        "if (scale == 0) {",
        "if (!update_row.exists()) {",
    ),
    "stride: all rows follow each other": (
        "csrc/cpu/grid.h",
        "samples->row_stride == geometry.sample_size()",
        "samples->row_stride > 0",
    ),
    "scale: not in the gradient": (
        "csrc/cpu/backward.cpp",
        "loops_.scaled(to, d, factor, scaled, piece.n);",
        "loops_.scaled(to, d, factor, Acc(1), piece.n);",
    ),
    "γ: of the row's begin": (
        "csrc/cpu/stored.h",
        "return factors_ + piece.column;",
        "return factors_;",
    ),
    "rows: one frozen row for all": (
        "csrc/cpu/forward.cpp",
        "update_buffer.read(loops, learning_or_frozen, update_row.part_index, piece)",
        "update_buffer.read(loops, learning_or_frozen, update_row.learns ? update_row.part_index : 0, piece)",
    ),
}
CUDA = {
    "mask: dropped rows are read": (
        "csrc/cuda/residual_add.cuh",
        "const bool adds = scale != 0;",
        "const bool adds = update_row.exists();",
    ),
    "stride: the residual's rows follow each other": (
        "csrc/cuda/residual_add.cuh",
        "at<const S>(call.residual, sample, offset)",
        "static_cast<const S*>(call.residual.data) + sample * call.geometry.sample_size() + offset",
    ),
    "scale: not where there is a γ": (
        "csrc/cuda/residual_add.cuh",
        "sum[i] = added(sum[i], scale * factors[i], update[i]);",
        "sum[i] = added(sum[i], call.gamma ? factors[i] : scale, update[i]);",
    ),
    "γ: the next pack's": (
        "csrc/cuda/residual_add.cuh",
        "load_gamma(factors, gamma, modulo(offset, geometry.width));",
        "load_gamma(factors, gamma, modulo(offset + N, geometry.width));",
    ),
    "γ per position: the next channel's": (
        "csrc/cuda/residual_add.cuh",
        "load_gamma(factor, gamma, modulo(quotient(offset, geometry.width), geometry.channels));",
        "load_gamma(factor, gamma, modulo(quotient(offset, geometry.width) + 1, geometry.channels));",
    ),
    "sums: without the last partial": (
        "csrc/cuda/residual_add.cuh",
        "loaded[i] = row < num_partials ?",
        "loaded[i] = row < num_partials - 1 ?",
    ),
    "rows: one frozen row for all": (
        "csrc/cuda/residual_add.cuh",
        "at<const U>(learning_or_frozen, update_row.part_index, offset)",
        "at<const U>(learning_or_frozen, update_row.learns ? update_row.part_index : 0, offset)",
    ),
}


def test_in_triton_kernels(tmp_path):
    """Budget: two minutes."""
    copy_tree(tmp_path)
    check_caught(tmp_path, TRITON, "triton")


def test_in_cpu_kernels(tmp_path):
    """Budget: two minutes. Ninja compiles what a fault changes."""
    copy_tree(tmp_path)

    def compile_library():
        command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
        run(command, tmp_path, {"RDP_BUILD": "cpu"}, expected=0)

    check_caught(tmp_path, CPU, "native", compile_library)


def test_in_cuda_kernels(tmp_path):
    """Budget: two minutes. The kernels run on the host, as in `tests/cuda_on_host`."""
    build.copy_tree(tmp_path)
    build.compile_library(tmp_path, sanitize=False)
    check_caught(
        tmp_path,
        CUDA,
        "native",
        lambda: build.compile_library(tmp_path, sanitize=False, again=True),
        {"RDP_CUDA_ON_HOST": "1"},
    )


def copy_tree(to):
    for folder in ("csrc", "rdp_kernels", "tests"):
        shutil.copytree(ROOT / folder, to / folder, ignore=shutil.ignore_patterns("_C.*", "__pycache__"))
    for file in ("pyproject.toml", "setup.py", "README.md"):
        shutil.copy(ROOT / file, to)


def check_caught(tree, faults, library, compile_library=lambda: None, environment=None):
    """Prints which row caught which fault."""
    missed = []
    for fault, (file, right, wrong) in faults.items():
        path = tree / file
        text = path.read_text(encoding="utf-8")
        assert text.count(right) == 1, f"{file} has changed: {right}"
        path.write_text(text.replace(right, wrong), encoding="utf-8")
        compile_library()
        command = [sys.executable, "-m", "pytest", "-x", "--tb=no", "tests/kernels/test_fixed.py", "-k", library]
        said = run(command, tree, environment or {})
        path.write_text(text, encoding="utf-8")
        caught = re.search(NUMBERS, said)
        print(f"{library}, {fault}: {': '.join(caught.groups()) if caught else 'missed'}")
        if not caught:
            missed.append(f"{fault}\n{said[-2000:]}")
    assert not missed, "\n".join(missed)


def run(command, tree, environment, expected=None):
    ours = ("RDP_", "PYTEST_", "PYTHONPATH", "LD_PRELOAD", "TRITON_")
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    # whole lines; and no bytecode, as a source of the same second and length would reuse it
    fixed = {"PYTHONPATH": str(tree), "COLUMNS": "400", "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        command,
        cwd=tree,
        env=inherited | fixed | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert expected is None or result.returncode == expected, result.stdout
    return result.stdout
