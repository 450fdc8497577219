"""README.md and the pages of docs/: their code blocks and commands, which run as tests."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from examples.libraries import import_torchvision, installed

ROOT = Path(__file__).parent.parent
README = "README.md"
PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for path in (ROOT / "docs").rglob("*.md")
    if not any(part.startswith("_") for part in path.relative_to(ROOT).parts)
)


def text_of(page: str | Path) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page: str, language: str) -> list[str]:
    """The fenced blocks of `page` in `language`."""
    return re.findall(rf"^ *```{language}\n(.*?)^ *```", text_of(page), re.DOTALL | re.MULTILINE)


def prose(page: str | Path) -> str:
    """The text of `page` without its fenced blocks."""
    return re.sub(r"^ *```.*?^ *```", "", text_of(page), flags=re.DOTALL | re.MULTILINE)


def inline_commands(page: str) -> list[list[str]]:
    """The commands that stand in the prose and tables of `page`; not the forms of one."""
    found = re.findall(r"`((?:python (?:-m|docs|examples)|make|torchrun [^`]*\.py)[ /][^`]+)`", prose(page))
    return [shlex.split(line) for line in found if not re.search(r"COMMAND|\.\.\.|\[", line)]


def commands(page: str) -> list[list[str]]:
    """The shell commands of `page`, split into words; comments are left out."""
    lines = "".join(blocks(page, "sh")).replace("\\\n", " ").splitlines()
    return [words for words in (shlex.split(line, comments=True) for line in lines) if words]


def run(page: str) -> dict:
    """Runs the Python blocks of `page` from top to bottom, in a namespace that is empty at first; returns that."""
    if installed("torchvision"):
        import_torchvision()  # timm, transformers and Lightning import it where they find it
    namespace: dict = {"__name__": page}
    for number, block in enumerate(blocks(page, "python"), 1):
        exec(compile(block, f"{page}, block {number}", "exec"), namespace)
    return namespace


def missing(page: str) -> list[str]:
    """Libraries that the page imports and that aren't installed."""
    imported = re.findall(r"^\s*(?:import|from) (\w+)", "".join(blocks(page, "python")), re.MULTILINE)
    return [library for library in dict.fromkeys(imported) if not installed(library)]
