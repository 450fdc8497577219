"""README.md and docs/: their code runs, their commands work, their links lead somewhere, and what they name exists.

`make test` runs the README's code and commands, `make test-all` those of docs/. The notebooks run in `make docs`.
"""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import pytest

import rdp_kernels as rdp
from rdp_kernels import diagnostics
from rdp_kernels.integrations import distributed, fsdp

from .commands import run_small, understand
from .markdown import PAGES, README, ROOT, blocks, commands, inline_commands, missing, prose, run, text_of

WITH_CODE = [page for page in PAGES if blocks(page, "python")]
ALL = [README, "CONTRIBUTING.md", *PAGES]
COMMANDS = dict.fromkeys(tuple(words) for page in ALL for words in commands(page))
INLINE = dict.fromkeys(tuple(words) for page in ALL for words in inline_commands(page))
OF_THE_README = [tuple(words) for words in commands(README)]
NAMES = {
    "rdp": rdp.__all__,
    "scheme": dir(rdp.ResidualDropPath),
    "plan": [*dir(rdp.PathPlan), "keep", "drop_probs", "mode"],
    "fsdp": fsdp.__all__,
    "distributed": distributed.__all__,
    "diagnostics": diagnostics.__all__,
}
"""What may stand behind a dot."""
OTHERS_OPTIONS = {"--no-build-isolation", "--max-restarts", "--threads", "--nproc-per-node", "--benchmark-only"}


def run_if_installed(page):
    if absent := missing(page):
        pytest.skip(f"not installed: {', '.join(absent)}")
    with warnings.catch_warnings():
        warnings.simplefilter("default")  # other libraries' warnings aren't ours to mend
        return run(page)


def test_the_readme_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # it saves a checkpoint
    namespace = run_if_installed(README)
    assert len(blocks(README, "python")) >= 3
    assert namespace["scheme"].phase is None


@pytest.mark.slow
@pytest.mark.parametrize("page", WITH_CODE)
def test_a_page_runs(page, tmp_path, monkeypatch):
    """A page may take 10 seconds."""
    monkeypatch.chdir(tmp_path)
    run_if_installed(page)


@pytest.mark.parametrize("words", COMMANDS | INLINE, ids=" ".join)
def test_commands_are_understood(words):
    """Up to where they would begin to work. Of those in tables, tests/benchmarks and tests/examples run the programs."""
    understand(list(words))


@pytest.mark.parametrize("words", OF_THE_README, ids=" ".join)
def test_the_readmes_commands_run(words, tmp_path):
    """In small."""
    run_small(list(words), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("words", [words for words in COMMANDS if words not in OF_THE_README], ids=" ".join)
def test_commands_run(words, tmp_path):
    """In small, each up to two minutes."""
    run_small(list(words), tmp_path)


@pytest.mark.parametrize("page", ALL)
def test_what_is_named_exists(page):
    text = text_of(page)
    for owner, name in set(re.findall(rf"(?<![\w./-])({'|'.join(NAMES)})\.(?!md|py)(\w+)", text)):
        assert name in NAMES[owner], f"{owner}.{name}"
    for file in re.findall(r"`((?:tests|examples|benchmarks|rdp_kernels|csrc|docs)/[\w./-]+)`", text):
        assert (ROOT / file).exists() or file.startswith("docs/_build/"), file
    variables = text_of("docs/reference/environment.md")
    for variable in set(re.findall(r"RDP_\w+", text)):
        assert f"`{variable}`" in variables or page == "CONTRIBUTING.md", variable


def test_options_that_are_named_exist():
    folders = ("benchmarks", "examples", "rdp_kernels", "tests")
    sources = "".join(file.read_text("utf-8") for folder in folders for file in (ROOT / folder).rglob("*.py"))
    known = set(re.findall(r'"(--[a-z][\w-]*)"', sources)) | OTHERS_OPTIONS
    for page in ALL:
        named = set(re.findall(r"`(--[a-z][\w-]*)[` ]", text_of(page)))
        assert named <= known, f"{page}: {named - known}"


def test_the_readme_lists_the_public_names():
    (section,) = re.findall(r"^## API\n(.*?)^## ", text_of(README), re.DOTALL | re.MULTILINE)
    assert set(re.findall(r"`(\w+)`", section)) - {"rdp"} == {n for n in rdp.__all__ if not n.startswith("__")}


def test_the_readmes_results_stand_in_the_evidence():
    evidence = text_of("docs/evidence.md")
    pairs = {(float(a), float(b)) for a, b in re.findall(r"(\d+\.\d+) ± (\d+\.\d+)", evidence)}
    for a, b in re.findall(r"(\d+\.\d+) ± (\d+\.\d+)", prose(README)):
        digits = len(a.partition(".")[2])
        assert any((f"{x:.{digits}f}", f"{y:.{digits}f}") == (a, b) for x, y in pairs), a
    for percent in re.findall(r"(\d+\.\d+) %", prose(README)):
        assert f"| {percent} ± " in evidence, percent


@pytest.mark.parametrize("page", ALL)
def test_links_lead_somewhere(page):
    """To files, and to headings as GitHub and Sphinx name them."""
    for file, heading in re.findall(r"\]\((?!https?:)([^)#]*)(?:#([^)]*))?\)", prose(page)):
        target = (ROOT / page).parent / file if file else ROOT / page
        assert target.exists(), file
        if heading:
            assert heading in anchors(target), f"{file}#{heading}"


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading).strip().replace(" ", "-").lower() for heading in headings}
