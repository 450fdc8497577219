"""Python code blocks of README.md and docs/, which run as tests."""

from __future__ import annotations

import re
from pathlib import Path

from examples.libraries import import_torchvision, installed

ROOT = Path(__file__).parent.parent


def python_blocks(name: str) -> dict[str, str]:
    """The blocks of a file, by the heading above and their number below it."""
    found: dict[str, str] = {}
    for section in re.split(r"^#+ ", (ROOT / name).read_text(encoding="utf-8"), flags=re.MULTILINE):
        heading = section.partition("\n")[0]
        for number, block in enumerate(re.findall(r"```python\n(.*?)```", section, re.DOTALL), 1):
            found[f"{heading}, {number}"] = block
    return found


def missing(block: str) -> list[str]:
    """Libraries that it imports and that aren't installed."""
    imported = re.findall(r"^\s*(?:import|from) (\w+)", block, re.MULTILINE)
    return [library for library in dict.fromkeys(imported) if not installed(library)]


def run(name: str, block: str, namespace: dict) -> dict:
    if installed("torchvision"):
        import_torchvision()  # timm, transformers and Lightning import it where they find it
    exec(compile(block, name, "exec"), namespace)
    return namespace
