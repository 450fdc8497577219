"""The stacks are never hard dependencies: what isn't used isn't imported."""

import subprocess
import sys

import pytest

PROGRAM = """
import sys
import rdp_kernels, rdp_kernels.integrations
found = {"transformers", "accelerate", "lightning", "pytorch_lightning", "timm", "torchvision"} & set(sys.modules)
assert not found, found
assert not [name for name in sys.modules if name.startswith("rdp_kernels.integrations.")]
import rdp_kernels.integrations.timm
assert "timm" not in sys.modules
"""


def run(*command):
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=120)


def test_importing_the_package_imports_no_stack():
    done = run("-c", PROGRAM)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["transformers", "accelerate", "lightning", "timm"])
def test_an_example_without_its_library_says_so_in_a_line(name):
    hide = f"import sys, runpy; sys.modules[{name!r}] = None; sys.argv = ['train_{name}.py', '--quick'];"
    done = run("-W", "ignore", "-c", f"{hide} runpy.run_path('examples/train_{name}.py', run_name='__main__')")
    assert done.returncode == 1
    assert done.stderr.startswith(f"train_{name}.py: error: ")
    assert f"pip install {name}" in done.stderr
    assert done.stderr.count("\n") == 1
