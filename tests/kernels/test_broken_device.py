"""A kernel that breaks a process's CUDA fails one test, and not all tests after it. Shown with a stand-in for torch."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

CONFTEST = Path(__file__).parents[1] / "conftest.py"
TORCH = """
from types import SimpleNamespace
cuda = SimpleNamespace(is_available=lambda: True, synchronize=lambda: None)
manual_seed = set_num_threads = lambda number: None
"""
TESTS = """
import pytest
import torch

def fails():
    raise RuntimeError("CUDA error: an illegal memory access was encountered")

def test_ordinary():
    assert False, "an ordinary failure"

def test_breaks():
    torch.cuda.synchronize = fails
    fails()

@pytest.mark.parametrize("n", range(6))
def test_after(n):
    torch.cuda.synchronize()
"""


@pytest.mark.parametrize("processes", [0, 1])
def test_one_test_is_blamed(tmp_path, processes):
    shutil.copy(CONFTEST, tmp_path)
    (tmp_path / "torch.py").write_text(TORCH, encoding="utf-8")
    (tmp_path / "test_device.py").write_text(TESTS, encoding="utf-8")
    ours = ("PYTEST_", "TRITON_", "RDP_")
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    options = ["-p", "no:cacheprovider", "-rA", *(["-n", str(processes)] if processes else [])]
    result = subprocess.run(
        [sys.executable, "-m", "pytest", *options],
        cwd=tmp_path,
        env=inherited | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    said = result.stdout
    assert result.returncode == 1, said
    failed = {line.split("::")[1].split()[0] for line in said.splitlines() if line.startswith("FAILED")}
    assert failed == {"test_ordinary", "test_breaks"}, said
    assert "an illegal memory access" in said
    if processes:
        assert said.count("PASSED test_device.py::test_after") == 6, said
    else:
        assert "CUDA is broken since test_device.py::test_breaks" in said
        assert "test_after" not in said
