"""The README's code runs, and it names what exists."""

import re
from pathlib import Path

import rdp_kernels as rdp

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")


def test_code_blocks_run():
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) == 2
    namespace = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), namespace)
    assert all(p.grad is None for p in namespace["model"].parameters())
    assert namespace["scheme"].phase is None


def test_public_names_exist():
    for name in set(re.findall(r"\brdp\.(\w+)", README)):
        assert name in rdp.__all__, name
