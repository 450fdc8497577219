"""The evidence page's tables against values by hand: means, pairs by seed, and the correction for many comparisons."""

import csv
import math
import re
import shlex
from pathlib import Path

import pytest

from benchmarks import evidence
from benchmarks.over_seeds import difference, grouped, over_seeds
from examples import bytes_lm, skip_connections, spiral
from examples.methods import DROP_PATH, EXACT, PLAIN, RANDOM
from examples.spirals.study import study
from examples.spirals.training import KEPT

MACHINE = {"device": "a CPU", "torch": "2.13", "commit": "abc", "date": "2026-11-22"}
T3 = 3.182446  # of Student's t, 0.975 at 3 degrees of freedom
ROOT = Path(evidence.__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def spiral_rows(study, method, accuracies, **changed):
    """Rows of four seeds; fields that aren't given are equal in all."""
    shared = MACHINE | {"study": study, "method": method, "steps_taken": "10", "needed_ratio": "0.75", "depth": "32"}
    shared |= {"quarter": "8", "accuracy_without_1": "0.9", "accuracy_without_quarter": "0.5", "test_loss": "0.2"}
    shared |= {"width": "32", "layers": "1", "points": "400", "noise": "0.05", "learning_rate": "0.005"}
    shared |= {"steps": "1000", "drop_prob": "0.2", "mode": "block", "schedule": "constant", "equal": "steps"}
    shared |= {"scale_by_keep": "True", "train_rest": "False"}
    shared |= {"train_loss": "0.1", "rebound": "0.3", "similarity_ends": "0.4"} | changed
    return [shared | {"seed": str(seed), "accuracy": str(value)} for seed, value in enumerate(accuracies)]


def cells(table, *labels):
    """The other cells of the row that begins with `labels`."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if line[:1] == "|"]
    (found,) = [row for row in rows if row[: len(labels)] == list(labels)]
    return found[len(labels) :]


def test_seeds_are_paired_whatever_their_order():
    ours = spiral_rows("base", EXACT, (0.9, 0.8, 0.7, 0.6))
    others = spiral_rows("base", PLAIN, (0.89, 0.78, 0.67, 0.56))
    by_case = grouped([*reversed(ours), *others], "method")
    estimate = difference(by_case[EXACT,], by_case[PLAIN,], "accuracy")
    assert estimate.mean == pytest.approx(0.025)
    deviation = math.sqrt((0.015**2 + 0.005**2) * 2 / 3)
    assert estimate.half_width == pytest.approx(T3 * deviation / 2, rel=1e-6)
    assert over_seeds(ours, "accuracy").mean == pytest.approx(0.75)
    with pytest.raises(ValueError, match="can't be compared"):
        difference(by_case[EXACT,], by_case[PLAIN,][1:], "accuracy")


def test_spiral_table():
    rows = [
        *spiral_rows("base", PLAIN, (0.9, 0.9, 0.92, 0.92)),
        *spiral_rows("base", EXACT, (0.91, 0.91, 0.94, 0.94)),
        *spiral_rows("equal FLOPs", EXACT, (0.9, 0.9, 0.92, 0.92), steps_taken="13"),
        *spiral_rows("depth 12", EXACT, (0.1, 0.1, 0.1, 0.1)),
    ]
    table = evidence.spiral_table(rows)
    half = 100 * T3 * math.sqrt(0.005**2 * 4 / 3) / 2
    assert cells(table, "steps", EXACT)[3] == f"**+1.5 ± {half:.1f}**"
    assert cells(table, "FLOPs", EXACT)[:4] == ["13", "0.75", "91.0 ± 1.8", "+0.0 ± 0.0"]
    assert cells(table, "steps", PLAIN)[3] == ""
    assert "8 of 32 removed" in table
    assert "10.0" not in table, "of another setting"


def test_settings_are_compared_with_methods_that_ignore_them():
    rows = [
        row
        for name, level, changed in (("base", 0.9, {}), ("depth 12", 0.8, {"depth": "12"}))
        for method, more in ((PLAIN, 0), (DROP_PATH, 0.02), (EXACT, 0.01))
        for row in spiral_rows(name, method, [level + more] * 4, **changed)
    ]
    rows += spiral_rows("rest", EXACT, [0.95] * 4, train_rest="True")
    rows += spiral_rows("p = 0.5", EXACT, [0.85] * 4, drop_prob="0.5")
    rows += spiral_rows("longer", EXACT, [0.85] * 4, steps="3000")
    table = evidence.spiral_settings_table(rows)
    assert cells(table, "depth 12")[3:5] == ["**+1.0 ± 0.0**", "**-1.0 ± 0.0**"]
    assert cells(table, "rest")[3:5] == ["**+5.0 ± 0.0**", "**+3.0 ± 0.0**"]
    assert cells(table, "p = 0.5")[:5] == ["90.0 ± 0.0", "–", "85.0 ± 0.0", "**-5.0 ± 0.0**", "–"]
    assert cells(table, "longer")[3:5] == ["–", "–"]


def test_separation_is_at_a_level_for_all_comparisons_together():
    """Two settings with two controls make 3 · 6 comparisons: a difference is bold if it excludes 0 at 0.05 / 18."""
    base = (0.9, 0.9, 0.9, 0.9)
    rows = [
        *spiral_rows("base", EXACT, (0.92, 0.925, 0.93, 0.925)),  # the same for every seed: far from 0
        *spiral_rows("base", RANDOM, base),
        *spiral_rows("base", KEPT, (0.90, 0.91, 0.92, 0.91)),
        *spiral_rows("p = 0.5", EXACT, (0.90, 0.91, 0.92, 0.91)),  # excludes 0 at 0.05, not at 0.05 / 18
        *spiral_rows("p = 0.5", RANDOM, (0.895, 0.899, 0.902, 0.899)),
    ]
    table = evidence.separation_table(rows)
    assert "0.05 / 18" in table
    assert cells(table, "base", RANDOM)[0].startswith("**+2.50 ± ")
    shown = cells(table, "p = 0.5", RANDOM)[0]
    mean, half = map(float, re.fullmatch(r"\+([\d.]+) ± ([\d.]+)", shown).groups())
    assert mean > half  # it would count if it were the only comparison
    assert "(Bonferroni): 1." in table


def test_fresh_seeds_table():
    rows = [
        *spiral_rows("equal updates", EXACT, (0.92, 0.92, 0.93, 0.93)),
        *spiral_rows("equal updates", RANDOM, (0.91, 0.91, 0.92, 0.92)),
    ]
    table = evidence.fresh_seeds_table(rows)
    assert cells(table, RANDOM)[:2] == ["**+1.00 ± 0.00**", "+0.00 ± 0.00"]
    assert "Seeds 0 to 3" in table


def test_every_committed_row_is_in_a_table_of_all_settings():
    with (RESULTS / "spiral-cpu.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {(row["study"], row["method"]) for row in rows} == {(case.study, case.method) for case in study()}
    seeds = {row["seed"] for row in rows}
    assert len(seeds) >= 12
    assert len(rows) == len(study()) * len(seeds)


def test_commands_are_understood():
    """The commands of docs/evidence.md and of `make evidence`, up to the point where work begins."""
    text = (ROOT / "docs" / "evidence.md").read_text(encoding="utf-8") + (ROOT / "Makefile").read_text(encoding="utf-8")
    parsers = {module.__name__.split(".")[-1]: module.build_parser() for module in (bytes_lm, skip_connections, spiral)}
    found = re.findall(r"python examples/(\w+)\.py((?:\\\n|[^\n#])*)", text)
    known = [(name, options) for name, options in found if name in parsers]
    assert len(known) >= 9
    for name, options in known:
        parsers[name].parse_args(shlex.split(options.replace("\\\n", " ")))
