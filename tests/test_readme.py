"""The README's code runs, and it names what exists."""

import re
import shlex

import pytest

import rdp_kernels as rdp
from benchmarks import __main__ as benchmarks
from examples import train_digits

from .markdown import ROOT, missing, python_blocks, run

README_PATH = ROOT / "README.md"
README = README_PATH.read_text(encoding="utf-8")


def test_code_blocks_run():
    """One after the other, in one namespace."""
    blocks = list(python_blocks("README.md").values())
    assert len(blocks) == 7
    absent = [library for block in blocks for library in missing(block)]
    assert set(absent) <= {"timm"}
    namespace: dict = {}
    for block in blocks:
        if not missing(block):
            run("README.md", block, namespace)
    assert all(p.grad is None for p in namespace["model"].parameters())
    assert namespace["scheme"].phase is None
    if absent:
        pytest.skip(f"not installed: {', '.join(absent)}; all other blocks ran")


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
