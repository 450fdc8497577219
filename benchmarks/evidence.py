"""The tables of docs/evidence.md: the scheme's effect on accuracy and on networks, from files with a row for each
seed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from scipy import stats

from examples.intervals import Estimate
from examples.methods import DROP_PATH, EXACT, PLAIN, RANDOM
from examples.skips.results import LEARNED
from examples.spirals.training import KEPT

from .over_seeds import Row, difference, grouped, over_seeds

POINTS = 100  # accuracies are shown in percent, differences in points


def spiral_table(rows: list[Row]) -> str:
    """Every method on the base setting at equal steps, at equal FLOPs and at equal updates."""
    equals = {"base": "steps", "equal FLOPs": "FLOPs", "equal updates": "updates"}
    shown = [row for row in rows if row["study"] in equals]
    plain = grouped(shown, "study", "method")["base", PLAIN]
    removed = f"{plain[0]['quarter']} of {plain[0]['depth']} removed"
    lines = _head(
        *("equal", "method", "steps", "FLOPs of a step", "accuracy, %", "− plain", "1 removed", removed),
        *("test loss", "rebound", "CKA of first and last layer"),
    )
    for (study, method), group in grouped(shown, "study", "method").items():
        cells = [equals[study], method, group[0]["steps_taken"]]
        cells += [f"{float(group[0]['needed_ratio']):.2f}", over_seeds(group, "accuracy").percent()]
        cells += ["" if method == PLAIN else _points(difference(group, plain, "accuracy"))]
        cells += [over_seeds(group, f"accuracy_without_{count}").percent() for count in ("1", "quarter")]
        cells += [over_seeds(group, name).text(".3f") for name in ("test_loss", "rebound", "similarity_ends")]
        lines.append(_line(cells))
    return _joined(
        lines, f"Mean ± 95 % interval over {len(plain)} seeds; − plain: points, seed by seed; {_measured(rows)}."
    )


NETWORK = ("depth", "width", "layers", "points", "noise", "learning_rate", "steps")
DROPPING = (*NETWORK, "drop_prob", "mode", "schedule", "scale_by_keep", "equal")
"""The columns that plain training and drop-path depend on."""


def spiral_settings_table(rows: list[Row]) -> str:
    """The effect of each setting on the scheme: accuracy of the whole network, and without a quarter of the paths."""
    by_case = grouped(rows, "study", "method")
    plain_of, drop_of = grouped(rows, "method", *NETWORK), grouped(rows, "method", *DROPPING)
    lines = _head(
        *("setting", "plain, %", "drop-path", "ResidualDroppath", "− plain", "− drop-path"),
        *("a quarter removed: plain, %", "drop-path", "ResidualDroppath"),
    )
    for study in dict.fromkeys(row["study"] for row in rows):
        scheme = by_case[study, EXACT]
        plain = _each_seed_once(plain_of.get((PLAIN, *(scheme[0][name] for name in NETWORK)), []))
        drop = _each_seed_once(drop_of.get((DROP_PATH, *(scheme[0][name] for name in DROPPING)), []))
        groups = (plain, drop, scheme)
        cells = [study, *_accuracies(groups, "accuracy")]
        cells += [_points(difference(scheme, group, "accuracy")) if group else "–" for group in (plain, drop)]
        lines.append(_line([*cells, *_accuracies(groups, "accuracy_without_quarter")]))
    note = (
        f"{_means(rows)}; differences in points, seed by seed, bold where the interval excludes 0. A setting that "
        f"doesn't affect plain training or drop-path repeats the base's value; –: not trained; {_measured(rows)}."
    )
    return _joined(lines, note)


def _accuracies(groups: Sequence[Sequence[Row]], column: str) -> list[str]:
    return [over_seeds(group, column).percent() if group else "–" for group in groups]


def _each_seed_once(rows: Sequence[Row]) -> list[Row]:
    return list({row["seed"]: row for row in rows}.values())


def first_study_table(rows: list[Row]) -> str:
    """The findings of an earlier study (before this repository), and the same quantities here."""
    by_case = grouped(rows, "study", "method")

    def values(study: str, *methods: str, column: str = "accuracy") -> str:
        return " / ".join(over_seeds(by_case[study, method], column).percent() for method in methods)

    small = next(study for study, _ in by_case if study.startswith("depth 6, "))
    unscaled = difference(by_case["kept branches not scaled", EXACT], by_case["base", EXACT], "accuracy")
    random = difference(by_case["base", EXACT], by_case["base", RANDOM], "accuracy")
    lines = _head("finding, in %", "then", "here", "here, three times the steps")
    longer, removed = "three times the steps", "accuracy_without_quarter"
    pair, three = (EXACT, PLAIN), (EXACT, PLAIN, DROP_PATH)
    lines += map(
        _line,
        [
            ("accuracy: scheme / plain", "97.7 ± 0.3 / 97.6 ± 0.2", values("base", *pair), values(longer, *pair)),
            (
                "8 of 32 paths removed: scheme / plain / drop-path",
                "94.9 / 60.3 / 96.4",
                values("base", *three, column=removed),
                values(longer, *three, column=removed),
            ),
            ("scheme without scaling − with", "-0.7 ± 0.3", _points(unscaled), "–"),
            ("depth 6, width 6: scheme / plain", "84.9 / 92.6", values(small, *pair), "–"),
            (
                "scheme − random paths frozen",
                "as good",
                _points(random),
                _points(difference(by_case[longer, EXACT], by_case[longer, RANDOM], "accuracy")),
            ),
        ],
    )
    return _joined(lines, f"{_means(rows)}; {_measured(rows)}.")


@dataclass(frozen=True)
class Measure:
    """A column that compares two methods, and its format."""

    column: str
    factor: float = 1.0
    spec: str = ".3f"


def separation_table(rows: list[Row]) -> str:
    """The scheme against controls that differ only in which paths learn."""
    by_case = grouped(rows, "study", "method")
    cases = [
        (study, control)
        for control in (RANDOM, KEPT)
        for study in dict.fromkeys(row["study"] for row in rows)
        if (study, control) in by_case
    ]
    comparisons, found = len(cases) * len(SEPARATION), 0
    lines = _head("setting", "ResidualDroppath − …", *SEPARATION)
    for study, control in cases:
        cells = [study, control]
        for measure in SEPARATION.values():
            pair = by_case[study, EXACT], by_case[study, control]
            separates = _excludes_zero(*pair, measure.column, 0.05 / comparisons)
            found += separates
            text = _signed(difference(*pair, measure.column), measure.spec, measure.factor, bold=separates)
            cells.append(text)
        lines.append(_line(cells))
    note = (
        f"{_means(rows)}, of differences seed by seed. Bold: the interval excludes 0 at level 0.05 / {comparisons}, as "
        f"there are {comparisons} comparisons (Bonferroni): {found}. {_measured(rows)}."
    )
    return _joined(lines, note)


def fresh_seeds_table(rows: list[Row]) -> str:
    """`controls` for one setting, with seeds that weren't used to choose it."""
    by_method = grouped(rows, "method")
    lines = _head("ResidualDroppath − …", *SEPARATION)
    for (method,) in by_method:
        if method != EXACT:
            pair = by_method[EXACT,], by_method[method,]
            cells = [_signed(difference(*pair, m.column), m.spec, m.factor) for m in SEPARATION.values()]
            lines.append(_line([method, *cells]))
    seeds = sorted(int(row["seed"]) for row in rows)
    note = f"Seeds {seeds[0]} to {seeds[-1]}: mean ± 95 % interval, bold where it excludes 0; {_measured(rows)}."
    return _joined(lines, note)


SEPARATION = {
    "accuracy, points": Measure("accuracy", POINTS, ".2f"),
    "a quarter removed, points": Measure("accuracy_without_quarter", POINTS, ".2f"),
    "test loss": Measure("test_loss"),
    "training loss": Measure("train_loss"),
    "rebound": Measure("rebound"),
    "CKA of first and last layer": Measure("similarity_ends"),
}


def digits_pairs_table(rows: list[Row]) -> str:
    """Differences between methods on the digits, seed by seed."""
    most = _removed(rows, "accuracy_without_")[-1]
    removed = f"{most.split('_')[-1]} branches removed, points"
    lines = _head("model", "mode", "ResidualDroppath − …", "accuracy, points", removed)
    for (model, mode), group in grouped(rows, "model", "mode").items():
        by_method = {method: seeds for (method,), seeds in grouped(group, "method").items()}
        for other in by_method:
            if other != EXACT:
                values = [difference(by_method[EXACT], by_method[other], name) for name in ("accuracy", most)]
                lines.append(_line([model, mode, other, *map(_points, values)]))
    return _joined(lines, f"{_means(rows)}; bold where it excludes 0; {_measured(rows)}.")


def language_table(rows: list[Row]) -> str:
    """Bits per byte of every method, for each text size, at equal steps and at equal FLOPs."""
    losses = ["training_loss_at_inference", *_removed(rows, "validation_loss_without_")]
    lines = _head(
        *("training text, kB", "equal", "method", "steps", "FLOPs", "validation loss", "− plain"),
        *("training text's loss", *(f"{name.split('_')[-1]} removed" for name in losses[1:])),
    )
    cases = grouped(rows, "bytes", "equal", "method")
    for (size, equal, method), group in cases.items():
        plain = cases[size, "steps", PLAIN]
        cost = _sum(group, "flops") / _sum(plain, "flops")
        steps = round(_sum(group, "optimizer_steps") / len(group))
        cells = [f"{int(size) / 1e3:,.0f}", equal, method, str(steps), f"{cost:.2f}"]
        cells.append(over_seeds(group, "validation_loss").text(".3f"))
        cells.append("" if method == PLAIN else _signed(difference(group, plain, "validation_loss"), ".3f"))
        cells += [over_seeds(group, name).text(".3f") for name in losses]
        lines.append(_line(cells))
    row = rows[0]
    note = (
        f"Bits per byte. {_means(rows)}; − plain: seed by seed, bold where the interval excludes 0. {row['depth']} "
        f"blocks of two paths, width {row['width']}, context {row['context']}; p = {row['drop_prob']}, {row['mode']}. "
        f"FLOPs: of the whole training, plain = 1; {_measured(rows)}."
    )
    return _joined(lines, note)


def skips_table(rows: list[Row]) -> str:
    """Results by depth for each way to stack layers."""
    lines = _head(
        *("kind", "depth", "lg of first / last layer's gradient", "after 100 steps", "accuracy, %"),
        *("one layer removed, %", "a quarter removed, %", "layers that matter", "gradient's path length"),
    )
    for (kind, depth), group in grouped(rows, "kind", "depth").items():
        learned = over_seeds(group, "accuracy").mean >= LEARNED
        cells = [kind, depth]
        cells += [over_seeds(group, f"weight_gradient_ratio_{step}").text(".2f") for step in (0, 100)]
        for name in ("accuracy", "accuracy_without_one", "accuracy_without_quarter"):
            cells.append(over_seeds(group, name).percent())
        for name in ("effective_depth", "path_length"):
            known = learned and all(row[name] for row in group)
            cells.append(over_seeds(group, name).text(".1f") if known else "–")
        lines.append(_line(cells))
    note = (
        f"{_means(rows)}; {rows[0]['steps']} steps. –: no value, or a meaningless one, as accuracy is below "
        f"{LEARNED:.0%}; {_measured(rows)}."
    )
    return _joined(lines, note)


def _excludes_zero(rows: Sequence[Row], others: Sequence[Row], column: str, level: float) -> bool:
    """The interval at another level than 95 %."""
    estimate, count = difference(rows, others, column), len(rows)
    if estimate.half_width is None:
        return False
    if estimate.half_width == 0:
        return estimate.mean != 0
    wider = stats.t.ppf(1 - level / 2, count - 1) / stats.t.ppf(0.975, count - 1)
    return abs(estimate.mean) > wider * estimate.half_width


def _points(estimate: Estimate) -> str:
    return _signed(estimate, ".1f", POINTS)


def _signed(estimate: Estimate, spec: str, factor: float = 1.0, bold: bool | None = None) -> str:
    """Formats a difference with its sign. It is bold if its interval excludes 0, or as `bold` says."""
    text = ("+" if estimate.mean >= 0 else "") + estimate.text(spec, factor)
    return f"**{text}**" if (estimate.excludes_zero if bold is None else bold) else text


def _means(rows: Sequence[Row]) -> str:
    return f"Mean ± 95 % interval over {len({row['seed'] for row in rows})} seeds"


def _removed(rows: Sequence[Row], prefix: str) -> list[str]:
    """The columns for removed branches, ordered by their number."""
    return sorted((name for name in rows[0] if name.startswith(prefix)), key=lambda name: int(name.split("_")[-1]))


def _sum(rows: Sequence[Row], column: str) -> float:
    return sum(float(row[column]) for row in rows)


def _measured(rows: Sequence[Row]) -> str:
    row = rows[0]
    return f"{row['device']}, torch {row['torch']}, commit {row['commit']}, {row['date']}"


def _head(*names: str) -> list[str]:
    return [_line(names), "|" + "---|" * len(names)]


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _joined(lines: list[str], note: str) -> str:
    return "\n".join([*lines, "", note])


TABLES: dict[str, tuple[str, Callable[[list[Row]], str]]] = {
    "spiral": ("spiral-cpu.csv", spiral_table),
    "spiral-settings": ("spiral-cpu.csv", spiral_settings_table),
    "separation": ("spiral-cpu.csv", separation_table),
    "fresh-seeds": ("spiral-fresh-seeds-cpu.csv", fresh_seeds_table),
    "first-study": ("spiral-cpu.csv", first_study_table),
    "digits-pairs": ("digits-cpu.csv", digits_pairs_table),
    "language": ("language-cpu.csv", language_table),
    "skips": ("skips-cpu.csv", skips_table),
}
"""As `tables.TABLES`."""
