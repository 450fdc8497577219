"""The studies of docs/evidence.md, run in small by their own commands, give tables like those on the page."""

import csv
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import evidence, pages, tables
from benchmarks.evidence_plots import language_curves, spiral_accuracy
from examples import bytes_lm, skip_connections, spiral, train_digits
from examples.digits import analysis, training
from examples.methods import DROP_PATH, EXACT

PAGE = pages.ROOT / "docs" / "evidence.md"
FILES = {"spiral", "spiral-fresh-seeds", "digits", "language", "language-curves", "skips"}


def read(*paths: Path) -> list[dict]:
    rows = []
    for path in paths:
        with path.open(encoding="utf-8", newline="") as file:
            rows += csv.DictReader(file)
    return rows


def write(path: Path, rows: list[dict]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)


def columns(rows: list[dict]) -> set[str]:
    """Column names without step numbers: a short training ends at another step."""
    return {re.sub(r"gradient_ratio_\d+$|alikeness_\d+$", "N", name) for name in rows[0]}


def shape(markdown: str) -> tuple[list[str], list[list[str]]]:
    """Headings without numbers, and the cells of each row that aren't numbers."""
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in markdown.splitlines() if line[:1] == "|"]
    return [re.sub(r"\d+", "N", heading) for heading in lines[0]], [
        [cell for cell in row if not re.match(r"^[*+-]*\d|^$|^–$|^-?inf|^\*?\*?[+-]?nan", cell)] for row in lines[2:]
    ]


@pytest.fixture
def results(tmp_path, monkeypatch):
    """Files as in `benchmarks/results/`."""
    monkeypatch.setattr(analysis, "REMOVALS", 3)
    for name in ("mlp", "vit"):  # as deep as in the study, so that as many paths are removed
        network = training.NETWORKS[name]
        monkeypatch.setitem(training.NETWORKS, name, replace(network, options=network.options | {"dim": 16}))
    threads = torch.get_num_threads()
    small, out = ["--quick", "--seeds", "2"], {name: tmp_path / name for name in ("spiral", "skips")}
    assert spiral.main([*small, "--study", "--steps", "2", "--points", "20", "--out", str(out["spiral"])]) == 0
    assert skip_connections.main([*small, "--steps", "100", "--out", str(out["skips"])]) == 0
    digits = [tmp_path / "digits" / model for model in ("mlp", "vit")]
    for folder in digits:
        options = ["--model", folder.name, "--seeds", "2", "--epochs", "0.05", "--out", str(folder)]
        assert train_digits.main(options) == 0
    language = [tmp_path / "language" / name for name in ("steps", "flops", "small")]
    settings = [["--method", "all"], ["--method", DROP_PATH, EXACT, "--equal", "flops"]]
    small += ["--depth", "8"]  # as many paths as in the study, so that as many are removed
    settings += [[*settings[0], "--train-bytes", "20000"]]
    for folder, setting in zip(language, settings, strict=True):
        assert bytes_lm.main([*small, "--steps", "4", *setting, "--out", str(folder)]) == 0
    out["spiral-fresh-seeds"] = tmp_path / "spiral-fresh-seeds"
    fresh = ["--study", "--only", "equal updates", "--first-seed", "2", "--steps", "2", "--points", "20"]
    assert spiral.main([*small[:3], *fresh, "--out", str(out["spiral-fresh-seeds"])]) == 0
    for name, folder in out.items():
        write(tmp_path / f"{name}-cpu.csv", read(folder / "results.csv"))
    write(tmp_path / "digits-cpu.csv", read(*(folder / "results.csv" for folder in digits)))
    write(tmp_path / "language-cpu.csv", read(*(folder / "results.csv" for folder in language)))
    write(tmp_path / "language-curves-cpu.csv", read(*(folder / "curves.csv" for folder in language)))
    torch.set_num_threads(threads)
    return tmp_path


@pytest.mark.slow
def test_every_study_in_small_gives_the_pages_tables(results):
    """Budget: 150 seconds."""
    committed = {name: read(pages.RESULTS / f"{name}-cpu.csv") for name in FILES}
    for name, rows in committed.items():
        assert columns(read(results / f"{name}-cpu.csv")) == columns(rows), name
    page = pages.updated(PAGE.read_text(encoding="utf-8"), results)
    for name in (*evidence.TABLES, "digits"):
        file, make = tables.TABLES[name]
        wanted, found = shape(make(read(pages.RESULTS / file))), shape(make(read(results / file)))
        assert make(read(results / file)) in page
        assert found[0] == wanted[0], name
        labels, known = ({tuple(row) for row in rows} for rows in (found[1], wanted[1]))
        if file.startswith("spiral"):  # names of settings contain the sizes of networks
            labels, known = (
                {tuple(re.sub(r"\d+", "N", cell) for cell in row) for row in side} for side in (labels, known)
            )
            assert labels == known, name
        else:
            assert labels <= known, name
    assert len(spiral_accuracy(read(results / "spiral-cpu.csv")).axes) == 3
    assert len(language_curves(read(results / "language-curves-cpu.csv")).axes) == 4
