"""The figures show the rows' numbers, measured or read back, and the same rows give the same files."""

import argparse
import csv
import importlib.util
import json
from pathlib import Path

import matplotlib
import pytest

from benchmarks import command, op_providers, plots
from benchmarks.__main__ import main
from benchmarks.machine import Device
from benchmarks.plot_style import NothingToPlot, number, save

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
MACHINE = {
    "device": "a CPU",
    "threads": 2,
    "torch": "2.13.0",
    "triton": "3.7.0",
    "python": "3.11.7",
    "commit": "12e4567",
    "date": "2026-11-21",
}


def op_row(provider, to_eager, ratio_min, direction="forward", kept=4, **more):
    row = MACHINE | {
        "op": "residual_add",
        "shape": "8x4",
        "layout": "..C",
        "dtype": "float32",
        "kept": kept,
        "gamma": True,
    }
    row |= {"pass": direction, "provider": provider, "to_eager": to_eager, "ratio_min": ratio_min, "unavailable": ""}
    return row | {"device_ms": None, "needed_gb": 0.5, "gbs": 10.0, "ceiling_gbs": 40.0} | more


OPS = [
    op_row("eager", 1.0, 1.0),
    op_row("torch.compile", 0.8, 0.7, needed_gb=0.25, gbs=20.0),
    op_row("ours native", 0.4, 0.5),
    op_row("timm", None, None, gbs=None, unavailable="timm is not installed"),
    op_row("eager", 1.0, 1.0, "both", 2),
    op_row("compiled index_add", 3.0, 2.0, "both", 2),
    op_row("ours native", 2.0, 1.6, "both", 2),
]


def step_row(provider, ratios, p=0.5, **more):
    row = MACHINE | {"model": "vit", "mode": "block", "p": p, "provider": provider, "unavailable": ""}
    names = ("needed_ratio", "counted_ratio", "ratio_rounds", "ratio_min")
    row |= dict(zip(names, ratios, strict=True))
    return (
        row
        | {"needed_gflop": 10.0, "needed_gb": 0.5, "p50_ms": 100.0, "ceiling_gflops": 200.0, "ceiling_gbs": 50.0}
        | more
    )


STEPS = [
    step_row("plain", (1.0, 1.0, 1.0, 1.0), needed_gflop=16.0),
    step_row("ours exact", (0.66, 0.67, 0.7, 0.69)),
    step_row("ours branch-frozen", (0.58, 0.59, 0.6, 0.61)),
    step_row("ours exact", (0.76, 0.77, 0.8, 0.79), p=0.1, model="resnet"),
    step_row("ours exact", (None,) * 4, p=0.3, p50_ms=None, unavailable="BatchNorm"),
]


def memory_row(iteration, saved, peak, provider="ours exact"):
    row = MACHINE | {"model": "vit", "mode": "block", "p": 0.5, "provider": provider, "iteration": iteration}
    largest = {"saved_max_ratio": saved + 0.1, "peak_max_ratio": peak + 0.1}
    return row | {"saved_ratio": saved, "peak_ratio": peak, "unavailable": ""} | largest


MEMORY = [memory_row("step", 1.0, 1.0, "plain"), memory_row("drop", 0.5, 0.6), memory_row("reuse", 0.7, 0.8)]
SCALING = [
    MACHINE | {"network": network, "paths": paths, "mode": mode, "provider": provider, "min_ms": factor * paths}
    for network, mode in (("tiny", "block"), ("tiny", "sample"), ("vit", "block"))
    for paths in (100, 12)
    for provider, factor in (("plain", 1.0), ("ours exact", 2.0))
]
DROP_PATH = [
    step_row(provider, (None, None, time, time - 0.1), 0.4, model="vit-s", batch=10, work=work, mode=mode)
    for work, mode, times in (
        ("scheme", "block", {"plain": 1.0, "naive": 1.1, "ours exact": 0.7}),
        ("drop-path", "sample", {"plain": 1.0, "drop-path": 1.2, "subset": 0.8, "ours drop-path": 0.75}),
    )
    for provider, time in times.items()
]
MADE_UP = {"ops": OPS, "step": STEPS, "drop-path": DROP_PATH, "memory": MEMORY, "scaling": SCALING}


def bars(axis):
    return [
        (round(patch.get_x(), 3), round(patch.get_y(), 3), round(patch.get_width(), 3), round(patch.get_height(), 3))
        for patch in axis.patches
    ]


def points(axis):
    """The points of every line and mark, except lines across the panel."""
    lines = [line.get_xydata().tolist() for line in axis.lines if line.get_transform() == axis.transData]
    return [[[pytest.approx(x), pytest.approx(y)] for x, y in line] for line in lines]


def as_text(rows):
    """Rows as text, as read from a CSV."""
    return [{key: "" if value is None else str(value) for key, value in row.items()} for row in rows]


@pytest.fixture(params=[lambda rows: rows, as_text], ids=["measured", "read back"])
def given(request):
    return request.param


# What figures show


def test_ratio_bars(given):
    figure = plots.ratio_bars(given(OPS))
    forward, both = figure.axes
    assert [width for *_, width, _ in bars(forward)] == [1.5, 1.0], "1 / 0.4 and 0.8 / 0.4, from 1 on"
    assert [width for *_, width, _ in bars(both)] == [-0.5, 0.5]
    assert {x for x, *_ in bars(forward) + bars(both)} == {1}
    assert [line[0][0] for line in points(forward)] == [2.0, 1.4], "ratios of the fastest turns"
    assert [line[0][0] for line in points(both)] == [0.625, 1.25]
    labels = [label.get_text() for label in forward.get_yticklabels()]
    assert labels == ["residual_add 8x4 float32, 4 of 8, γ", "residual_add 8x4 float32, 2 of 8, γ"]
    middles = [y + height / 2 for _, y, _, height in bars(forward) + bars(both)]
    assert middles == pytest.approx([-0.21, 0.21, 0.79, 1.21], abs=1e-3)
    assert [text.get_text() for text in figure.legends[0].texts] == [
        "eager / ours",
        "compiled / ours",
        "by the fastest turns",
    ]
    assert figure.get_suptitle().endswith("\na CPU, 2 threads, torch 2.13.0, triton 3.7.0, 12e4567, 2026-11-21")


def test_ratio_bars_of_a_gpu_are_tritons_without_marks_of_the_host():
    rows = [
        op_row("eager", 1.0, 1.0, device_ms=1.0),
        op_row("ours triton", 0.25, 0.5, device_ms=0.25),
        op_row("ours native", 0.5, 0.5),
    ]
    (forward,) = plots.ratio_bars(rows).axes
    assert [width for *_, width, _ in bars(forward)] == [3.0]
    assert points(forward) == []


def test_roofline_of_ops(given):
    forward, both = plots.roofline(given(OPS)).axes
    assert points(forward) == [[[500, 10]], [[250, 20]], [[500, 10]]], "eager, compiled, ours; MB and GB/s"
    assert both.get_title() == "forward + backward"
    assert [line.get_ydata() for line in forward.lines if line.get_transform() != forward.transData] == [[40.0, 40.0]]


def test_roofline_of_steps(given):
    alone = step_row("ours drop-path", (0.5, 0.5, 0.5, 0.5), work="drop-path")
    (axis,) = plots.roofline(given([*STEPS, alone])).axes
    *reached, roof = points(axis)
    assert reached == [[[32, 160]], [[20, 100]], [[20, 100]], [[20, 100]]]
    assert roof == [[1, 50], [4, 200], [roof[-1][0], 200]]
    assert axis.lines[-1].get_xdata()[-1] > 32


def test_step_cost(given):
    exact, frozen = plots.step_cost(given(STEPS)).axes
    assert [height for *_, height in bars(exact)] == [0.66, 0.67, 0.7, 0.76, 0.77, 0.8]
    assert [height for *_, height in bars(frozen)] == [0.58, 0.59, 0.6]
    assert [label.get_text() for label in frozen.get_xticklabels()] == ["vit\nblock\n0.5", "resnet\nblock\n0.1"]
    assert [line[0][1] for line in points(exact)] == [0.69, 0.79]
    middles = [x + width / 2 for x, _, width, _ in bars(exact)]
    assert middles == pytest.approx([-0.27, 0, 0.27, 0.73, 1, 1.27], abs=1e-3)


def test_drop_path_bars(given):
    figure = plots.drop_path_bars(given(DROP_PATH))
    (axis,) = figure.axes
    labels = [label.get_text() for label in axis.get_yticklabels()]
    assert labels[:3] == ["drop-path: timm", "drop-path: as in DINOv2", "drop-path: ours"]
    assert labels[3:] == ["scheme, block mode: naive", "scheme, block mode: ours"]
    assert [width for *_, width, _ in bars(axis)] == [1.2, 0.8, 0.75, 1.1, 0.7]
    assert [patch.get_hatch() for patch in axis.patches] == [None, None, "//", None, "//"]
    assert [line[0][0] for line in points(axis) if len(line) == 1] == pytest.approx([1.1, 0.7, 0.65, 1.0, 0.6])
    assert "vit-s, p = 0.4, 10 images\na CPU, 2 threads" in figure.get_suptitle()


def test_a_network_whose_needs_are_unknown_has_its_time(given):
    rows = [step_row("ours exact", (None, 0.77, 0.8, 0.79))]
    assert [height for *_, height in bars(plots.step_cost(given(rows)).axes[0])] == [0, 0.77, 0.8]


def test_memory_bars(given):
    saved, peak = plots.memory_bars(given(MEMORY)).axes
    assert [height for *_, height in bars(saved)] == [0.5, 0.7]
    assert [height for *_, height in bars(peak)] == [0.6, 0.8]
    assert [line[0][1] for line in points(saved)] == [0.6, 0.8]


def test_scaling_lines(given):
    axes = plots.scaling_lines(given(SCALING)).axes
    assert [axis.get_title() for axis in axes] == ["block mode", "sample mode"]
    for axis in axes:
        assert [label.get_text() for label in axis.get_xticklabels()] == ["12", "100"]
        assert points(axis) == [[[12, 12], [100, 100]], [[12, 24], [100, 200]]]


def test_values_of_a_csv_are_numbers_again():
    assert [number(text) for text in ("32", "0.5", "", "True", "8x4", "1e-05")] == [32, 0.5, None, True, "8x4", 1e-5]
    assert number(None) is None


# Files


@pytest.mark.parametrize(
    ("name", "suffix"), [*((name, ".svg") for name in MADE_UP), ("memory", ".png"), ("memory", ".pdf")]
)
def test_files_are_the_same_for_the_same_rows(name, suffix, tmp_path):
    before = dict(matplotlib.rcParams)
    paths = [tmp_path / f"{time}{suffix}" for time in ("first", "second")]
    for draw in plots.FIGURES[name].values():
        for path in paths:
            save(draw(MADE_UP[name]), path)
        assert paths[0].read_bytes() == paths[1].read_bytes()
        assert suffix != ".svg" or b"<text" in paths[0].read_bytes(), "text in the file stays text"
    assert dict(matplotlib.rcParams) == before


def test_committed_results_can_be_drawn():
    figures = plots.plots_of_results(RESULTS)
    assert {"ops-cpu", "ops-cpu-roofline", "step-cpu", "step-cpu-roofline"} <= set(figures)
    with (RESULTS / "step-cpu.csv").open() as file:
        exact = [r for r in csv.DictReader(file) if r["provider"] == "ours exact" and not r["unavailable"]]
    drawn = [patch.get_height() for patch in figures["step-cpu"]().axes[0].patches]
    assert drawn[2::3] == [float(row["ratio_rounds"]) for row in exact]


def test_a_command_draws_its_rows(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(op_providers, "COMPILER", "eager")
    monkeypatch.setattr(Device, "copy_rate", lambda self: 10e9)
    options = ["--op", "gather_rows", "--pass", "forward", "--json", str(tmp_path / "rows.json")]
    assert main(["ops", "--tiny", *options, "--plot", str(tmp_path / "ops.svg")]) == 0
    rows = json.loads((tmp_path / "rows.json").read_text())
    for ending, draw in plots.FIGURES["ops"].items():
        assert draw(rows).get_suptitle().split("\n")[0] in (tmp_path / f"ops{ending}.svg").read_text()


def test_rows_that_cannot_be_drawn_are_written_all_the_same(tmp_path, capsys):
    options = argparse.Namespace(command="ops", json=None, csv=tmp_path / "a.csv", plot=tmp_path / "a.svg")
    assert not command.written(options, OPS[:2])
    assert (tmp_path / "a.csv").exists()
    assert f"can't draw {tmp_path / 'a.svg'}: no row of ours has one" in capsys.readouterr().err


# Rows that can't be drawn


@pytest.mark.parametrize("draw", [draw for by_name in plots.FIGURES.values() for draw in by_name.values()])
def test_missing_columns_are_reported(draw):
    with pytest.raises(NothingToPlot, match="there are no rows"):
        draw([])
    with pytest.raises(NothingToPlot, match="the rows have no column .*, torch, triton, python, commit, date$"):
        draw([{"device": "a CPU", "threads": 1}])


def test_rows_without_ours_are_reported():
    with pytest.raises(NothingToPlot, match="no row of ours has one of another provider beside it"):
        plots.ratio_bars(OPS[:2])
    with pytest.raises(NothingToPlot, match="no row of ours exact or ours branch-frozen"):
        plots.step_cost(STEPS[:1])
    with pytest.raises(NothingToPlot, match="no row of drop-path or of the scheme"):
        plots.drop_path_bars(DROP_PATH[:1])
    with pytest.raises(NothingToPlot, match="no row of ours exact or ours branch-frozen"):
        plots.memory_bars(MEMORY[:1])
    with pytest.raises(NothingToPlot, match="no row of paths alone"):
        plots.scaling_lines([row | {"network": "vit"} for row in SCALING])


@pytest.mark.parametrize(
    ("path", "message"),
    [("a.gif", "must end in .svg, .png, .pdf, got "), ("no/such/folder/a.svg", "can't write "), ("a", "must end in ")],
)
def test_a_path_is_refused_before_anything_is_measured(path, message, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["ops", "--plot", str(tmp_path / path)])
    assert f"argument --plot: {message}" in capsys.readouterr().err


def test_without_matplotlib_it_says_so_before_anything_is_measured(tmp_path, monkeypatch, capsys):
    there = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else there(name))
    with pytest.raises(SystemExit):
        main(["step", "--plot", str(tmp_path / "a.svg")])
    assert "argument --plot: needs matplotlib, which is not installed" in capsys.readouterr().err


def test_only_commands_that_have_figures_draw_some(capsys):
    with pytest.raises(SystemExit):
        main(["overhead", "--plot", "a.svg"])
    assert "unrecognized arguments: --plot" in capsys.readouterr().err
