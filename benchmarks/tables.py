"""Markdown tables from the rows of `benchmarks/results/`. `TABLES` lists them."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable

from .drop_path import Ours, OwnMasks, Subset
from .evidence import TABLES as EVIDENCE
from .memory import DROP, REUSE
from .op_providers import EAGER, OURS, OURS_NATIVE
from .over_seeds import grouped, over_seeds
from .pairs import BranchFrozen, DropPath, Exact, Naive
from .step import case_of

CsvRow = dict[str, str]


class TableError(Exception):
    """A table can't be made; the message says why."""


def step_table(rows: list[CsvRow]) -> str:
    """The exact and the branch-frozen scheme, for each model, mode and p."""
    _refuse_quick(rows)
    lines = [
        "| model | mode | p | exact: time | needed FLOPs | branch-frozen: time | needed FLOPs | exact / naive: time |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for _, group in itertools.groupby((row for row in rows if row["work"] == "scheme"), case_of):
        by_name = {row["provider"]: row for row in group}
        exact, frozen, naive = (by_name[kind.name] for kind in (Exact, BranchFrozen, Naive))
        cells = [exact["model"], exact["mode"], exact["p"]]
        for row in (exact, frozen):
            cells += [_time_ratio(row), _ratio(row["needed_ratio"])]
        lines.append(f"| {' | '.join([*cells, _time_ratio(exact, naive)])} |")
    reasons = dict.fromkeys(row["unavailable"] for row in rows if row["unavailable"])
    return "\n".join(
        [
            *lines,
            "",
            machine_line([row for row in rows if row["provider"] == Exact.name]),
            *(f"–: {reason}." for reason in reasons),
        ]
    )


WHO = {
    OwnMasks.name: "timm's drop-path",
    Subset.name: "drop-path on a fixed number of samples, as in DINOv2",
    Ours.name: "**drop-path after `rdp.convert`**",
}
"""Provider → its row of the table."""


def drop_path_table(rows: list[CsvRow]) -> str:
    """Ordinary drop-path, by providers that skip dropped samples and one that doesn't."""
    _refuse_quick(rows)
    lines = [
        "| an optimizer step of | time / timm's drop-path | time / plain training | needed FLOPs |",
        "|---|---|---|---|",
    ]
    by_name = {row["provider"]: row for row in rows if row["work"] == "drop-path"}
    timm = by_name[OwnMasks.name]
    same = ("scheme", "sample", DropPath.name)  # the same work on known plans, so that its needed FLOPs are counted
    planned = next(row for row in rows if (row["work"], row["mode"], row["provider"]) == same)
    for name, label in WHO.items():
        cells = [_time_ratio(by_name[name], timm), _time_ratio(by_name[name]), _ratio(planned["needed_ratio"])]
        lines.append(f"| {' | '.join([label, *cells])} |")
    setting = "timm's {model}, p = {p}, {batch} images".format_map(timm)
    return "\n".join([*lines, "", f"{setting}. {machine_line([timm])}"])


def machine_line(rows: list[CsvRow]) -> str:
    """Returns where and when the rows were measured, in one line."""
    models: dict[str, dict[str, None]] = {}
    for row in rows:
        if not row["unavailable"]:
            models.setdefault(measured_on(row), {})[row["model"]] = None
    on = [place if len(models) == 1 else f"{place} ({', '.join(names)})" for place, names in models.items()]
    return (
        "Time as the median of the rounds' ratios to plain training (ratio of the minima); "
        f"{rows[0]['turns']} rounds on {'; on '.join(on)}."
    )


def measured_on(row: CsvRow) -> str:
    return f"{row['device']}, {row['threads']} threads, torch {row['torch']}, commit {row['commit']}, {row['date']}"


def digits_table(rows: list[CsvRow]) -> str:
    """Every method of every run of `examples/train_digits.py` in the file, over its seeds."""
    without = max(int(name.split("_")[2]) for name in rows[0] if re.fullmatch(r"accuracy_without_\d+", name))
    removed = f"{without} of {rows[0]['paths']} branches removed"
    lines = [
        f"| model | mode | method | accuracy, % | {removed} | time | needed FLOPs |",
        "|---|---|---|---|---|---|---|",
    ]
    for labels, seeds in grouped(rows, "model", "mode", "method").items():
        values = [over_seeds(seeds, name) for name in ("accuracy", f"accuracy_without_{without}")]
        ratios = [over_seeds(seeds, name).mean for name in ("time_ratio", "needed_ratio")]
        cells = [*labels, *(value.percent() for value in values), *(f"{ratio:.2f}" for ratio in ratios)]
        lines.append(f"| {' | '.join(cells)} |")
    row = rows[0]
    note = (
        f"Mean ± 95 % interval over {row['seeds']} seeds; {row['steps']} optimizer steps, p = {row['drop_prob']}; "
        f"time and FLOPs per step as ratios to plain; {measured_on(row)}."
    )
    return "\n".join([*lines, "", note])


def ops_table(rows: list[CsvRow]) -> str:
    """The speed-up of the compiled library over eager and over the compiled formula, for each setting."""
    lines = [
        "| op | shape | dtype | rows kept | forward: eager / ours | compiled / ours | forward + backward: eager / ours "
        "| compiled / ours |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for _, group in itertools.groupby(
        rows, lambda row: [row[key] for key in ("op", "shape", "layout", "dtype", "kept")]
    ):
        by_pass: dict[str, dict[str, CsvRow]] = {}
        for row in group:
            by_pass.setdefault(row["pass"], {})[row["provider"]] = row
        cells = [row["op"], row["shape"].replace("x", " × "), row["dtype"], row["kept"] or "all"]
        for providers in (by_pass["forward"], by_pass["both"]):
            ours = providers[OURS_NATIVE]
            compiled = next(row for name, row in providers.items() if name.startswith(("compiled", "torch.compile")))
            cells += [_times_as_fast(providers[EAGER], ours), _times_as_fast(compiled, ours)]
        lines.append(f"| {' | '.join(cells)} |")
    note = (
        "How many times as fast ours is: median of the turns' ratios (ratio of the fastest turns); "
        f"{rows[0]['turns']} turns on {measured_on(rows[0])}; a copy: {float(rows[0]['ceiling_gbs']):.0f} GB/s."
    )
    return "\n".join([*lines, "", note])


def overhead_table(rows: list[CsvRow]) -> str:
    """Microseconds of a call on the smallest tensors: eager, ours, and their ratio."""
    passes = ("no grad", "forward", "both")
    lines = [
        "| op | no grad: eager | ours | forward: eager | ours | both: eager | ours | ours / eager |",
        "|" + "---|" * 8,
    ]
    smallest = rows[0]["shape"]
    for op, group in itertools.groupby((row for row in rows if row["shape"] == smallest), lambda row: row["op"]):
        by_call = {(row["pass"], row["provider"]): row for row in group}
        cells = [op]
        for name in passes:
            cells += [f"{float(by_call[name, provider]['p50_us']):.1f}" for provider in (EAGER, OURS_NATIVE)]
        lines.append(f"| {' | '.join([*cells, _ratio(by_call['both', OURS_NATIVE]['ratio_rounds'])])} |")
    shape = smallest.replace("x", " × ")
    turns = f"{rows[0]['turns']} turns of {rows[0]['calls']} calls"
    note = f"Microseconds, medians of {turns}, [{shape}]; {measured_on(rows[0])}."
    return "\n".join([*lines, "", note])


def host_table(rows: list[CsvRow]) -> str:
    """Host time of calls and iterations on a GPU or a stand-in for its driver, and their launches."""
    names = (OURS, OURS_NATIVE)
    lines = [
        "| call | pass | eager, µs | Triton, µs | / eager | compiled, µs | / eager | launches: eager | Triton "
        "| compiled |",
        "|" + "---|" * 10,
    ]
    for (op, direction), group in itertools.groupby(rows, lambda row: (row["op"], row["pass"])):
        by_name = {row["provider"]: row for row in group}
        cells = [op, direction, _number(by_name[EAGER]["p50_us"], ".1f")]
        for row in (by_name[name] for name in names):
            cells += [_number(row["p50_us"], ".1f"), _ratio(row["ratio_rounds"])]
        cells += [_number(by_name[name]["launches"], "g") for name in (EAGER, *names)]
        lines.append(f"| {' | '.join(cells)} |")
    note = f"Microseconds, medians of {rows[0]['turns']} turns of {rows[0]['calls']} calls; {measured_on(rows[0])}."
    return "\n".join([*lines, "", note])


def memory_table(rows: list[CsvRow]) -> str:
    """Saved and peak bytes of each iteration of the exact and the branch-frozen scheme."""
    _refuse_quick(rows)
    lines = [
        "| model | mode | p | drop: saved | peak | reuse, exact: saved | peak | branch-frozen: saved | peak |",
        "|" + "---|" * 9,
    ]
    for _, group in itertools.groupby(rows, case_of):
        by_name = {(row["provider"], row["iteration"]): row for row in group}
        exact = by_name[Exact.name, DROP]
        cells = [exact["model"], exact["mode"], exact["p"]]
        for row in (exact, by_name[Exact.name, REUSE], by_name[BranchFrozen.name, REUSE]):
            cells += [_ratio(row["saved_ratio"]), _ratio(row["peak_ratio"])]
        lines.append(f"| {' | '.join(cells)} |")
    note = f"Ratios to a plain step, plans averaged: {rows[0]['plans']}; counted on {measured_on(rows[0])}."
    return "\n".join([*lines, "", note])


def scaling_table(rows: list[CsvRow]) -> str:
    """Host time of the scheme on tiny paths."""
    lines = [
        "| mode | paths | plain pair, ms | ours, ms | overhead, µs a path | for the plan |",
        "|" + "---|" * 6,
    ]
    tiny = [row for row in rows if row["network"] == "tiny"]
    for (mode, paths), group in itertools.groupby(tiny, lambda row: (row["mode"], row["paths"])):
        by_name = {row["provider"]: row for row in group}
        plain, ours, plan = (by_name[name] for name in ("plain", Exact.name, "plan"))
        times = (float(plain["min_ms"]), float(ours["min_ms"]), float(ours["overhead_us_per_path"]))
        cells = (mode, f"{int(paths):,}", *(f"{t:.1f}" for t in (*times, 1e3 * float(plan["min_ms"]) / int(paths))))
        lines.append(f"| {' | '.join(cells)} |")
    note = f"A pair of iterations, forward and backward; fastest of {tiny[0]['turns']} turns; {measured_on(tiny[0])}."
    return "\n".join([*lines, "", note])


def shares_table(rows: list[CsvRow]) -> str:
    """The host time of the scheme as a share of a step of real networks."""
    lines = ["| network | depth | width | batch | mode | plain pair, ms | overhead, ms | share |", "|" + "---|" * 8]
    real = [row for row in rows if row["network"] != "tiny"]
    for row in real:
        numbers = (f"{float(row['min_ms']):,.0f}", f"{float(row['overhead_ms']):.2f}", f"{float(row['share']):.2%}")
        labels = (row[name] for name in ("network", "depth", "width", "batch", "mode"))
        lines.append(f"| {' | '.join([*labels, *numbers])} |")
    note = f"Pairs of plain steps (forward, backward, AdamW), the faster of {real[0]['turns']}; {measured_on(real[0])}."
    return "\n".join([*lines, "", note])


def traffic_table(rows: list[CsvRow]) -> str:
    """Moved bytes relative to needed bytes."""
    lines = ["| op | shape | dtype | rows kept | pass | eager | compiled (model) | ours, Triton |", "|" + "---|" * 8]
    setting = ("op", "shape", "dtype", "kept", "pass")
    for _, group in itertools.groupby(rows, lambda row: [row[key] for key in (*setting, "layout", "gamma")]):
        case = list(group)
        compiled = next(row for row in case if row["provider"].startswith(("compiled", "torch.compile")))
        by_name = {row["provider"]: row for row in case}
        op, shape, dtype, kept, direction = (case[0][key] for key in setting)
        cells = [op, shape.replace("x", " × "), dtype, kept or "all", direction]
        cells += [_ratio(row["bytes_ratio"]) for row in (by_name[EAGER], compiled, by_name[OURS])]
        lines.append(f"| {' | '.join(cells)} |")
    versions = "torch {torch}, triton {triton}, commit {commit}, {date}".format_map(rows[0])
    note = (
        "Bytes relative to the needed ones; counted op by op for eager, load by load under the interpreter for Triton; "
        f"–: no bytes are needed. {versions.capitalize()}."
    )
    return "\n".join([*lines, "", note])


def expected_table(rows: list[CsvRow], measured: list[CsvRow]) -> str:
    """The share of a copy's bandwidth to expect of each launch. `measured` are rows of `ops` on that GPU, if there are
    any. Their shares are those of a whole pass, and stand in the line of the launch that moves most."""
    lines = [
        "| op | shape | dtype | pass | kernel | registers | shared bytes | programs that fit | KiB in flight | waves "
        "| lost in the last | expected share of a copy | measured |",
        "|" + "---|" * 13,
    ]
    labels = ("op", "shape", "dtype", "layout", "kept", "gamma", "pass")
    shares = {tuple(row[key] for key in labels): row["copy_share"] for row in measured if row["provider"] == OURS}
    for key, group in itertools.groupby(rows, lambda row: tuple(row[key] for key in labels)):
        launches = [row for row in group if row["kernel"] != "invert_rows"]  # moves some hundred bytes
        most = max(launches, key=lambda row: float(row["bytes"]))
        for row in launches:
            cells = [row["op"], row["shape"].replace("x", " × "), row["dtype"], row["pass"], f"`{row['kernel']}`"]
            cells += [row[name] for name in ("registers", "shared_bytes", "programs_fit")]
            cells += [f"{float(row['in_flight']) / 1024:.0f}", f"{float(row['waves']):.2f}"]
            cells += [_number(row[name], ".0%") for name in ("lost_in_last_wave", "expected_share")]
            cells.append(_number(shares.get(key, "") if row is most else "", ".0%"))
            lines.append(f"| {' | '.join(cells)} |")
    row = rows[0]
    needed = f"{float(row['needed_in_flight']) / 1024:.0f} KiB in flight"
    note = (
        f"Expected on an {row['gpu']}, not measured; a copy's bandwidth needs {needed}. Compiled by triton "
        "{triton}, commit {commit}, {date}. Measured: ".format_map(row)
    )
    note += f"a whole pass, {measured_on(measured[0])}." if measured else f"no {row['gpu']} has run these calls yet."
    return "\n".join([*lines, "", note])


RANGES = (
    ("add's forward", ("residual_add", "residual_add rows"), "forward", ("residual_add_fwd",)),
    ("add's backward", ("residual_add", "residual_add rows"), "backward", ("residual_add_bwd",)),
    (
        "the same with its second stage",
        ("residual_add", "residual_add rows"),
        "backward",
        ("residual_add_bwd", "sum_partials"),
    ),
    ("norm's forward", ("residual_add_norm",), "forward", ("residual_add_norm_fwd",)),
    ("norm's backward", ("residual_add_norm",), "backward", ("residual_add_norm_bwd",)),
    ("the same with its second stage", ("residual_add_norm",), "backward", ("residual_add_norm_bwd", "sum_partials")),
    ("gather's forward", ("gather_rows",), "forward", ("gather_rows",)),
    ("gather's backward", ("gather_rows",), "backward", ("residual_add_fwd",)),
)
"""Name, ops, pass, and kernels whose launches count together."""


def expected_ranges_table(rows: list[CsvRow], before: list[CsvRow]) -> str:
    """The lowest and the highest expected share over all shapes, of the kernels before a change and after it."""

    def spread(rows: list[CsvRow], ops: tuple[str, ...], direction: str, kernels: tuple[str, ...], dtype: str) -> str:
        chosen = [r for r in rows if r["op"] in ops and r["pass"] == direction and r["kernel"] in kernels]
        shares = []
        for _, group in itertools.groupby((r for r in chosen if r["dtype"] == dtype), lambda r: (r["op"], r["shape"])):
            launches = [(float(row["bytes"]), float(row["expected_share"])) for row in group]
            shares.append(sum(size for size, _ in launches) / sum(size / share for size, share in launches))
        return f"{100 * min(shares):.0f} to {100 * max(shares):.0f} %"

    lines = ["| | bfloat16: before | now | float32: before | now |", "|" + "---|" * 5]
    for name, *what in RANGES:
        cells = [spread(each, *what, dtype) for dtype in ("bfloat16", "float32") for each in (before, rows)]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(
        [*lines, "", f"Expected on an {rows[0]['gpu']}, not measured. Before: the kernels of commit 6d8951a."]
    )


def _refuse_quick(rows: list[CsvRow]) -> None:
    if any(row["size"] != "full" for row in rows):
        raise TableError("it holds the rows of a --quick run")


def _times_as_fast(other: CsvRow, ours: CsvRow) -> str:
    if other["unavailable"] or ours["unavailable"]:
        return "–"
    rounds, low = (float(other[key]) / float(ours[key]) for key in ("ratio_rounds", "min_ms"))
    return f"{rounds:.2f} ({low:.2f})"


def _time_ratio(row: CsvRow, base: CsvRow | None = None) -> str:
    """Returns the median of the rounds' ratios to plain or to `base`, with the ratio of the minima in brackets."""
    if row["unavailable"]:
        return "–"
    keys = ("ratio_rounds", "ratio_min")
    rounds, low = (float(row[key]) / (float(base[key]) if base else 1) for key in keys)
    return f"{rounds:.2f} ({low:.2f})"


def _ratio(text: str) -> str:
    return _number(text, ".2f")


def _number(text: str, spec: str) -> str:
    return format(float(text), spec) if text else "–"


TABLES: dict[str, tuple[str, Callable[..., str]]] = {
    "step": ("step-cpu.csv", step_table),
    "drop-path": ("drop-path-cpu.csv", drop_path_table),
    "ops": ("ops-cpu.csv", ops_table),
    "overhead": ("overhead-cpu.csv", overhead_table),
    "host": ("host-cpu.csv", host_table),
    "memory": ("memory-cpu.csv", memory_table),
    "scaling": ("scaling-cpu.csv", scaling_table),
    "shares": ("scaling-cpu.csv", shares_table),
    "traffic": ("traffic.csv", traffic_table),
    "expected": ("expected-sm_90.csv", expected_table),
    "expected-ranges": ("expected-sm_90.csv", expected_ranges_table),
    "digits": ("digits-cpu.csv", digits_table),
    **EVIDENCE,
}
"""Name on a page → file in `benchmarks/results/`, and its rows → markdown."""
FURTHER = {"expected": "ops-h200.csv", "expected-ranges": "expected-sm_90-6d8951a.csv"}
"""Name on a page → a second file, whose rows the table shows too. It may be missing, and has no rows then."""
