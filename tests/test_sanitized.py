"""The compiled library's CPU code under AddressSanitizer and UBSan: the numerics suite and the boundary's tests."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SANITIZE = "-fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer -g1"


def preloaded():
    """Libraries to preload: libasan has to come first, with libstdc++, as libasan alone fails at the first
    exception."""
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        pytest.skip(f"needs {compiler}")
    found = []
    for name in ("libasan.so", "libstdc++.so"):
        path = subprocess.run([compiler, f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
        if not Path(path).is_absolute():
            pytest.skip(f"{compiler} has no {name}")
        found.append(str(Path(path).resolve()))
    return " ".join(found)


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory):
    """A copy of the package with a sanitized library, and the environment to run it in."""
    libraries, root = preloaded(), tmp_path_factory.mktemp("sanitized")
    for name in ("rdp_kernels", "csrc", "tests", "benchmarks"):
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("_C.*", "__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, root)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    build = environment | {"RDP_BUILD": "cpu", "CFLAGS": SANITIZE, "CXXFLAGS": SANITIZE, "LDFLAGS": SANITIZE}
    run([sys.executable, "setup.py", "build_ext", "--inplace"], root, build)
    options = {"ASAN_OPTIONS": "detect_leaks=0:abort_on_error=0", "UBSAN_OPTIONS": "print_stacktrace=1"}
    return root, environment | options | {"LD_PRELOAD": libraries, "OMP_NUM_THREADS": "1"}


def run(command, folder, environment):
    done = subprocess.run(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert done.returncode == 0, done.stdout[-6000:]
    return done.stdout


@pytest.mark.slow
def test_nothing_is_reported(sanitized):
    """Budget: two minutes."""
    root, environment = sanitized
    tests = ["tests/kernels", "tests/test_native.py"]
    said = run([sys.executable, "-m", "pytest", *tests, "-k", "native and not instruction_sets"], root, environment)
    assert "no tests ran" not in said


FAULT = """
import numpy, torch, rdp_kernels
print(rdp_kernels.__file__)
memory = numpy.zeros((4, 1024), dtype=numpy.float32)
beyond = torch.from_numpy(numpy.lib.stride_tricks.as_strided(memory, (5, 1024)))
torch.ops.rdp.native_residual_add(beyond, beyond)
"""


@pytest.mark.slow
def test_a_fault_is_reported(sanitized):
    """Budget: seconds. Shows that the other test can fail: here a tensor claims a wrong size."""
    root, environment = sanitized
    done = subprocess.run([sys.executable, "-c", FAULT], cwd=root, env=environment, capture_output=True, text=True)
    assert done.stdout.startswith(str(root))
    assert "AddressSanitizer: heap-buffer-overflow" in done.stderr, done.stderr
