"""README.md and docs/: their code runs, their commands work, their links lead somewhere, and what they name exists.

`make test` runs the README's code and commands, `make test-all` those of docs/. The notebooks run in `make docs`.
"""

from __future__ import annotations

import re
import warnings

import pytest

import rdp_kernels as rdp

from .commands import run_small, understand
from .markdown import PAGES, README, ROOT, blocks, commands, missing, run, text_of

WITH_CODE = [page for page in PAGES if blocks(page, "python")]
COMMANDS = [(page, words) for page in [README, "CONTRIBUTING.md", *PAGES] for words in commands(page)]


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


@pytest.mark.parametrize(("page", "words"), COMMANDS, ids=lambda value: value if isinstance(value, str) else "")
def test_commands_are_understood(page, words):
    """Up to where they would begin to work."""
    understand(words)


@pytest.mark.slow
@pytest.mark.parametrize("words", dict.fromkeys(tuple(words) for _, words in COMMANDS), ids=" ".join)
def test_commands_run(words, tmp_path):
    """In small, each up to two minutes."""
    run_small(list(words), tmp_path)


@pytest.mark.parametrize("page", [README, "CONTRIBUTING.md", *PAGES])
def test_what_is_named_exists(page):
    text = text_of(page)
    for name in set(re.findall(r"\brdp\.(\w+)", text)):
        assert name in rdp.__all__, name
    for file in re.findall(r"`((?:tests|examples|benchmarks|rdp_kernels|csrc|docs)/(?!_build/)[\w./-]+)`", text):
        assert (ROOT / file).exists(), file


@pytest.mark.parametrize("page", [README, "CONTRIBUTING.md", *PAGES])
def test_links_lead_somewhere(page):
    """To files, and to headings as GitHub and Sphinx name them."""
    prose = re.sub(r"^ *```.*?^ *```", "", text_of(page), flags=re.DOTALL | re.MULTILINE)
    for file, heading in re.findall(r"\]\((?!https?:)([\w./-]*)(?:#([\w-]+))?\)", prose):
        target = (ROOT / page).parent / file if file else ROOT / page
        assert target.exists(), file
        if heading:
            assert heading in anchors(target.read_text(encoding="utf-8")), f"{file}#{heading}"


def anchors(text: str) -> set[str]:
    headings = re.findall(r"^#+ (.*)", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading).strip().replace(" ", "-").lower() for heading in headings}
