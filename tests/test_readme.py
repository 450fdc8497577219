"""The README's code runs, and it names what exists."""

import re
import shlex
from pathlib import Path

import pytest

import rdp_kernels as rdp
from benchmarks import __main__ as benchmarks
from examples import train_digits

from .coverage.libraries import import_torchvision, installed

README_PATH = Path(__file__).parent.parent / "README.md"
README = README_PATH.read_text(encoding="utf-8")


def test_code_blocks_run():
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) == 5
    if not installed("timm"):
        pytest.skip("timm is not installed")
    import_torchvision()
    namespace = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), namespace)
    assert all(p.grad is None for p in namespace["model"].parameters())
    assert namespace["scheme"].phase is None


def test_public_names_exist():
    for name in set(re.findall(r"\brdp\.(\w+)", README)):
        assert name in rdp.__all__, name


@pytest.mark.parametrize("name", ["examples/train_digits.py", "-m benchmarks"])
def test_commands_are_understood(name, monkeypatch):
    """Every command of README.md and the Makefile, up to where it would begin to work."""
    monkeypatch.chdir(README_PATH.parent)
    makefile = README_PATH.with_name("Makefile").read_text(encoding="utf-8")
    found = re.findall(rf"python {name}([^`\n#]*)", README + makefile) + re.findall(rf"`{name}([^`]*)`", README)
    commands = [shlex.split(command.replace("$(ARGS)", "")) for command in found]
    assert len(commands) > 4
    for command in commands:
        if name.startswith("examples"):
            train_digits.build_parser().parse_args(command)
        elif "--help" not in command:
            for module in benchmarks.COMMANDS:
                monkeypatch.setattr(module, "run", lambda _: 0)
            assert benchmarks.main(command) == 0
