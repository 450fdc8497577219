"""docs/reference/environment.md lists the variables `RDP_*` that code reads, all of them and no others."""

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
