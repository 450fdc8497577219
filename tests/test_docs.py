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
