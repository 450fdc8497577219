"""The reference lists every command, and the variables `RDP_*` that code reads."""

import re

from .markdown import ROOT

FOLDERS = ("benchmarks", "csrc", "docs", "examples", "rdp_kernels", "tests")
MACROS = {"RDP_CUDA"}  # of the C++ code


def test_the_page_lists_the_variables_that_code_reads():
    sources = [ROOT / "setup.py"]
    for folder in FOLDERS:
        sources += [file for end in ("py", "cpp", "cu", "h", "cuh") for file in (ROOT / folder).rglob(f"*.{end}")]
    named = {name for file in sources for name in re.findall(r"[\"'](RDP_[A-Z_]+)[\"']", file.read_text("utf-8"))}
    page = (ROOT / "docs" / "reference" / "environment.md").read_text("utf-8")
    rows = [line.split("|")[1] for line in page.splitlines() if line.startswith("| `")]
    listed = {name for row in rows for name in re.findall(r"`(RDP_\w+)`", row)}
    assert listed == named - MACROS


def test_the_page_lists_every_command():
    page = (ROOT / "docs" / "reference" / "commands.md").read_text("utf-8")
    targets = re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)
    wanted = [f"`make {target}`" for target in targets]
    for file in (ROOT / "benchmarks").rglob("*.py"):
        wanted += [f"| `{name}" for name in re.findall(r'add_parser\(\s*"(\w+)"', file.read_text("utf-8"))]
    scripts = [file for file in (ROOT / "examples").glob("*.py") if "__main__" in file.read_text("utf-8")]
    wanted += [f" examples/{file.name}" for file in scripts]
    assert len(wanted) > 30
    assert not [command for command in wanted if command not in page]
