"""Tables of README.md and docs/ from CSV files: made, found stale, or refused with a message that says what is
wrong."""

import csv
import itertools
import re

import pytest

from benchmarks import pages, tables
from benchmarks.__main__ import main
from benchmarks.pairs import TRAINERS

README = "# Title\n\n<!-- table: step -->\nolder\n<!-- end -->\n\nThe end.\n"
MACHINE = {"device": "a CPU", "threads": "2", "torch": "2.13", "commit": "abc", "date": "2026-11-21", "turns": "12"}
MACHINE |= {"triton": "3.7", "python": "3.11"}
TABLE = """
| model | mode | p | exact: time | needed FLOPs | branch-frozen: time | needed FLOPs | exact / naive: time |
|---|---|---|---|---|---|---|---|
| vit | block | 0.5 | 0.75 (0.70) | 0.66 | 0.75 (0.70) | 0.66 | 0.50 (0.80) |
| resnet | sample | 0.5 | – | – | – | – | – |

Time as the median of the rounds' ratios to plain training (ratio of the minima); 12 rounds on a CPU, 2 threads, torch 2.13, commit abc, 2026-11-21.
–: BatchNorm in a branch.
"""


def rows(size="full"):
    for (model, mode), trainer in itertools.product((("vit", "block"), ("resnet", "sample")), TRAINERS):
        row = MACHINE | {
            "size": size,
            "model": model,
            "mode": mode,
            "p": "0.5",
            "provider": trainer.name,
            "work": "scheme",
        }
        missing = trainer.follows_scheme and model == "resnet"
        numbers = {"ratio_rounds": "0.75", "ratio_min": "0.7", "needed_ratio": "0.66"}
        if trainer.name == "naive":
            numbers |= {"ratio_rounds": "1.5", "ratio_min": "0.875"}
        numbers = dict.fromkeys(numbers, "") if missing else numbers
        yield row | numbers | {"unavailable": "BatchNorm in a branch" if missing else ""}


def write(path, lines):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, lines[0].keys())
        writer.writeheader()
        writer.writerows(lines)


@pytest.fixture
def place(tmp_path):
    (tmp_path / "README.md").write_text(README)
    write(tmp_path / "step-cpu.csv", list(rows()))
    return tmp_path


def run(place, *options):
    files = ["--pages", str(place / "README.md"), "--results", str(place), "--plots", str(place / "plots")]
    return main(["pages", *files, *options])


class TestPlots:
    """Plots on a page are drawn from the CSV, and found stale."""

    @pytest.fixture
    def place(self, tmp_path):
        (tmp_path / "README.md").write_text("![the cost](docs/plots/step-cpu.svg)\n")
        write(tmp_path / "step-cpu.csv", [row | {"counted_ratio": "0.66"} for row in rows()])
        return tmp_path

    def test_drawn_and_found_stale(self, place, capsys):
        plot = place / "plots/step-cpu.svg"
        assert run(place, "--check") == 1
        assert "step-cpu.svg: not what" in capsys.readouterr().out
        assert not plot.exists()
        assert run(place) == run(place, "--check") == 0
        assert [file.name for file in plot.parent.iterdir()] == ["step-cpu.svg"]
        first = plot.read_bytes()
        write(place / "step-cpu.csv", [row | {"counted_ratio": "0.7"} for row in rows()])
        assert run(place, "--check") == 1
        assert plot.read_bytes() == first
        assert run(place) == run(place, "--check") == 0
        assert plot.read_bytes() != first

    def test_plots_of_another_matplotlib_do_not_change(self, place):
        run(place)
        plot = place / "plots/step-cpu.svg"
        older = plot.read_bytes().replace(b"Matplotlib v", b"Matplotlib v0.")
        assert older != plot.read_bytes()
        plot.write_bytes(older)
        assert run(place) == run(place, "--check") == 0
        assert plot.read_bytes() == older

    def test_a_plot_that_does_not_exist(self, place, capsys):
        (place / "README.md").write_text("![the cost](docs/plots/setp-cpu.svg)\n")
        assert run(place) == 1
        assert "no plot is called ['setp-cpu']; there are: step-cpu" in capsys.readouterr().err


def test_makes_the_table_between_its_markers(place):
    assert run(place) == 0
    text = (place / "README.md").read_text()
    assert text == README.replace("older\n", f"{TABLE}\n")
    assert run(place) == run(place, "--check") == 0
    assert (place / "README.md").read_text() == text


def test_this_repositorys_pages_are_current(capsys):
    assert main(["pages", "--check"]) == 0, capsys.readouterr()
    text = "".join(page.read_text(encoding="utf-8") for page in pages.PAGES)
    assert {marker["name"] for marker in pages.MARKER.finditer(text) if marker["name"]} == set(tables.TABLES)


def drop_path_rows(size="full"):
    """`step --drop-path eager`: the scheme in both modes and drop-path alone."""
    alone = {"plain": "1", "drop-path": "1.25", "subset": "0.8", "ours drop-path": "0.75"}
    scheme = {"plain": "1", "drop-path": "1.5", "naive": "1.1", "ours exact": "0.7"}
    measured = {("scheme", "block"): scheme, ("scheme", "sample"): scheme, ("drop-path", "sample"): alone}
    for (work, mode), times in measured.items():
        for provider, time in times.items():
            row = MACHINE | {"size": size, "work": work, "model": "vit-s", "batch": "10", "mode": mode, "p": "0.4"}
            row |= {"provider": provider, "ratio_rounds": time, "ratio_min": time, "unavailable": ""}
            known = (work, mode, provider) == ("scheme", "sample", "drop-path")
            yield row | {"needed_ratio": "0.61" if known else ""}


def test_drop_path(tmp_path):
    write(tmp_path / "drop-path-cpu.csv", list(drop_path_rows()))
    text = pages.updated("<!-- table: drop-path -->\n<!-- end -->", tmp_path)
    assert "| timm's drop-path | 1.00 (1.00) | 1.25 (1.25) | 0.61 |" in text
    assert "as in DINOv2 | 0.64 (0.64) | 0.80 (0.80) | 0.61 |" in text
    assert "| **drop-path after `rdp.convert`** | 0.60 (0.60) | 0.75 (0.75) | 0.61 |" in text
    assert "timm's vit-s, p = 0.4, 10 images. Time as the median" in text
    write(tmp_path / "drop-path-cpu.csv", list(drop_path_rows("quick")))
    with pytest.raises(tables.TableError, match="it holds the rows of a --quick run"):
        pages.updated("<!-- table: drop-path -->\n<!-- end -->", tmp_path)


def test_digits(tmp_path):
    row = MACHINE | {"model": "vit", "mode": "block", "method": "plain", "seeds": "2", "steps": "420", "paths": "12"}
    row |= {"drop_prob": "0.3", "time_ratio": "0.754", "needed_ratio": "0.7"}
    rows = [
        row | {"seed": seed, "accuracy": accuracy, "accuracy_without_1": "0.5", "accuracy_without_3": "0.6"}
        for seed, accuracy in (("0", "0.98"), ("1", "0.982"))
    ]
    write(tmp_path / "digits-cpu.csv", rows)
    text = pages.updated("<!-- table: digits -->\n<!-- end -->", tmp_path)
    assert "| accuracy, % | 3 of 12 branches removed |" in text
    assert "| vit | block | plain | 98.1 ± 1.3 | 60.0 ± 0.0 | 0.75 | 0.70 |" in text  # t(0.975, 1) · 0.1
    assert "over 2 seeds; 420 optimizer steps, p = 0.3" in text


def test_check_finds_a_stale_table_and_changes_nothing(place, capsys):
    assert run(place, "--check") == 1
    assert "run `python -m benchmarks pages`" in capsys.readouterr().out
    assert (place / "README.md").read_text() == README


def test_two_tables(place, monkeypatch):
    monkeypatch.setitem(tables.TABLES, "count", ("step-cpu.csv", lambda rows: f"{len(rows)} rows"))
    text = f"{README}<!-- table: count -->\n<!-- end -->\n"
    wanted = README.replace("older\n", f"{TABLE}\n") + "<!-- table: count -->\n\n10 rows\n\n<!-- end -->\n"
    assert pages.updated(text, place) == wanted


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (README.replace("step", "setp"), "line 3: no table is called 'setp'; there are: "),
        (README.replace("<!-- end -->", ""), "table 'step' has no <!-- end --> after it"),
        (README * 2, None),
        (f"{README}<!-- end -->", "line 8: <!-- end --> where the start of a table should come"),
        (README.replace("older", "<!-- table: step -->"), "line 4: .* where the end of table 'step' should come"),
    ],
)
def test_markers(text, message, place, capsys):
    (place / "README.md").write_text(text)
    if message is None:
        assert run(place) == 0
        return
    with pytest.raises(tables.TableError, match=message):
        pages.updated(text, place)
    assert run(place) == 1
    assert capsys.readouterr().err.startswith("README.md: ")
    assert (place / "README.md").read_text() == text


def test_results_that_are_missing_quick_or_foreign(place):
    write(place / "step-cpu.csv", list(rows("quick")))
    with pytest.raises(tables.TableError, match=r"step-cpu.csv: it holds the rows of a --quick run"):
        pages.updated(README, place)
    write(place / "step-cpu.csv", [{"mode": "block"}])
    with pytest.raises(tables.TableError, match=r"step-cpu.csv: it has no 'size'"):
        pages.updated(README, place)
    (place / "step-cpu.csv").write_text("")
    with pytest.raises(tables.TableError, match=r"step-cpu.csv: it has no rows"):
        pages.updated(README, place)
    (place / "step-cpu.csv").unlink()
    with pytest.raises(tables.TableError, match=r"table 'step' needs .*step-cpu.csv, which isn't there"):
        pages.updated(README, place)


@pytest.mark.parametrize("file", sorted(pages.RESULTS.glob("*.csv")), ids=lambda file: file.name)
def test_every_file_and_column_is_described(file):
    """Microseconds, and names that end in a number, too."""
    described = (pages.RESULTS / "README.md").read_text(encoding="utf-8")
    assert f"`{file.name}`" in described
    names = set(re.findall(r"`(\w+)`", described))
    with file.open(newline="", encoding="utf-8") as stream:
        columns = next(csv.reader(stream))
    plain = {re.sub(r"_us$", "_ms", re.sub(r"_\d+$", "_N", column)) for column in columns if column not in names}
    assert plain <= names
