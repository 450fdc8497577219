"""Training libraries are never hard dependencies: unused ones aren't imported."""

import runpy
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"

PROGRAM = """
import sys
import rdp_kernels, rdp_kernels.integrations
found = {"transformers", "accelerate", "lightning", "pytorch_lightning", "timm", "torchvision"} & set(sys.modules)
assert not found, found
assert not [name for name in sys.modules if name.startswith("rdp_kernels.integrations.")]
import rdp_kernels.integrations.timm
assert "timm" not in sys.modules
"""


def test_importing_the_package_imports_no_stack():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["transformers", "accelerate", "lightning", "timm"])
def test_an_example_without_its_library_says_so_in_a_line(name, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr("sys.argv", [f"train_{name}.py", "--quick"])
    monkeypatch.setattr("sys.path", sys.path[:])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(EXAMPLES / f"train_{name}.py"), run_name="__main__")
    message = stopped.value.code
    assert message.startswith(f"train_{name}.py: error: import of {name} halted")
    assert f"needed: pip install {name}" in message
    assert "\n" not in message
