"""The code in docs/ runs, each block by itself or a page from top to bottom, and it names what exists."""

import re

import pytest
import torch

import rdp_kernels as rdp

from .markdown import ROOT, missing, python_blocks, run

DOCS = (
    "docs/diagnostics.md", "docs/evidence.md", "docs/integrations.md", "docs/limits.md", "docs/models.md",
    "docs/performance.md",
)  # fmt: skip
FROM_TOP_TO_BOTTOM = "docs/diagnostics.md"
BLOCKS = [
    pytest.param(name, block, id=f"{name}: {where}")
    for name in DOCS
    for where, block in python_blocks(name).items()
    if name != FROM_TOP_TO_BOTTOM
]


@pytest.mark.filterwarnings("default")  # other libraries' warnings aren't ours to mend
@pytest.mark.parametrize(("name", "block"), BLOCKS)
def test_code_blocks_run(name, block):
    if absent := missing(block):
        pytest.skip(f"not installed: {', '.join(absent)}")
    run(name, block, {"torch": torch, "rdp": rdp})


def test_code_blocks_run_from_top_to_bottom():
    namespace: dict = {}
    for block in python_blocks(FROM_TOP_TO_BOTTOM).values():
        run(FROM_TOP_TO_BOTTOM, block, namespace)
    assert namespace["study"].baseline > 0
    assert namespace["recorder"].norms.isnan().any(), "what is frozen has no gradient"


@pytest.mark.parametrize("name", DOCS)
def test_public_names_exist(name):
    for public in set(re.findall(r"\brdp\.(\w+)", "".join(python_blocks(name).values()))):
        assert public in rdp.__all__, public


@pytest.mark.parametrize("name", DOCS)
def test_what_is_named_exists(name):
    """Files, and headings that are linked to."""
    text = (ROOT / name).read_text(encoding="utf-8")
    for file in re.findall(r"`((?:tests|examples|benchmarks|rdp_kernels)/[\w./]+)`", text):
        assert (ROOT / file).exists(), file
    for file in re.findall(r"\]\((?!https?:)([\w./-]+)(?:#[\w-]+)?\)", text):
        assert (ROOT / name).parent.joinpath(file).exists(), file
    headings = {re.sub(r"[^\w -]", "", line).replace(" ", "-").lower() for line in re.findall(r"^#+ (.*)", text, re.M)}
    for link in re.findall(r"\]\(#([\w-]+)\)", text):
        assert link in headings, link


@pytest.mark.parametrize("name", ["CONTRIBUTING.md", "docs/architecture.md"])
def test_files_that_are_named_exist(name):
    """A file or folder may be named without the folders around it, as in a table about one of them."""
    tops = ("benchmarks", "csrc", "docs", "examples", "rdp_kernels", "tests")
    there = [f"/{path.relative_to(ROOT).as_posix()}" for top in tops for path in (ROOT / top).rglob("*")]
    there += [f"/{path.name}" for path in ROOT.iterdir()]
    named = set(re.findall(r"`([\w./-]+(?:\.(?:py|md|h|cpp|cu|txt)|/))`", (ROOT / name).read_text(encoding="utf-8")))
    assert len(named) > 10
    missing_files = [file for file in sorted(named) if not any(path.endswith(f"/{file.rstrip('/')}") for path in there)]
    assert not missing_files
