"""`python -m benchmarks traffic`: it counts the bytes computed by hand, and no wrong results."""

import csv
import json
import os

import pytest

from benchmarks import op_traffic
from benchmarks.harness import CheckFailed
from benchmarks.op_cases import CHAIN, DENSE, GATHER, NORM, OPS, ROWS
from benchmarks.op_dense import ResidualAdd
from benchmarks.op_kinds import Setting
from benchmarks.op_traffic import FULL, PASSES, TrafficSession, count_kernels, interpreting
from tests.benchmarks.commands import run_command
from tests.traffic import needs_interpreter

SHAPE = (4, 2, 32)
SAMPLE = 2 * 32 * 4  # bytes


def rows_of(setting, count=count_kernels):
    session = TrafficSession(count)
    session.measure(setting)
    return {(row["pass"], row["provider"]): row for row in session.rows}


@needs_interpreter
def test_bytes_of_the_dense_add_are_those_of_a_hand_count():
    rows = rows_of(Setting(DENSE, SHAPE, 1, gamma=False))
    need = {"forward": (4 + 1 + 4) * SAMPLE, "backward": (1 + 4) * SAMPLE}  # residual, branch, sum; dout, dbranch
    mask = 4 * 4
    eager = {
        "forward": (4 + 4 + 4 + 4 + 4) * SAMPLE + mask,  # branch, branch · mask; that, residual, sum
        "backward": (4 + 4) * SAMPLE + mask,  # dout, dbranch
    }
    compiled = {"forward": (4 + 4 + 4) * SAMPLE, "backward": (4 + 4) * SAMPLE}
    for direction in PASSES:
        of = {provider: row for (passed, provider), row in rows.items() if passed == direction}
        assert {row["needed_bytes"] for row in of.values()} == {need[direction]}
        moved = {name: row["moved_bytes"] for name, row in of.items() if name != "ours eager"}
        assert moved == {
            "eager": eager[direction],
            "torch.compile": compiled[direction],
            "ours triton": need[direction],
        }
        assert of["ours triton"]["sector_bytes"] == need[direction]
        assert of["eager"]["bytes_ratio"] == eager[direction] / need[direction]
        assert {name: row["how"] for name, row in of.items()} == {
            "eager": "counted", "torch.compile": "model", "ours eager": "counted", "ours triton": "counted"
        }  # fmt: skip


@needs_interpreter
def test_rows_that_end_within_a_sector_take_more_of_them():
    row = rows_of(Setting(GATHER, (4, 1, 13), 2, gamma=False))["forward", "ours triton"]
    assert row["moved_bytes"] == row["needed_bytes"] == 2 * 2 * 13 * 4
    assert row["sector_bytes"] > row["moved_bytes"]


@needs_interpreter
@pytest.mark.parametrize("op", [ROWS, CHAIN, NORM])
def test_ours_moves_least(op):
    rows = rows_of(Setting(op, (6, 2, 32), 3))
    for direction in PASSES:
        of = {name: row for (passed, name), row in rows.items() if passed == direction}
        ours = of.pop("ours triton")
        assert ours["moved_bytes"] == ours["needed_bytes"]
        assert all(row["moved_bytes"] >= ours["needed_bytes"] for row in of.values())
        assert ours["moved_bytes"] < of["eager"]["moved_bytes"]


def test_a_wrong_result_is_not_counted(monkeypatch):
    right = ResidualAdd.ours
    monkeypatch.setattr(ResidualAdd, "ours", lambda self, *inputs: (1.001 * right(self, *inputs)[0],))
    with pytest.raises(CheckFailed, match="differs by"):
        rows_of(Setting(DENSE, SHAPE, 2), lambda setting: "not asked")


@needs_interpreter
def test_traffic_of_torch_beside_the_kernels_is_reported(monkeypatch):
    right = ResidualAdd.ours
    monkeypatch.setattr(ResidualAdd, "ours", lambda self, *inputs: (right(self, *inputs)[0].clone(),))
    with pytest.raises(CheckFailed, match=r"besides the kernels torch runs \['aten.clone.default'\]"):
        count_kernels(Setting(DENSE, SHAPE, 2))


def test_every_op_is_counted():
    assert {setting.op for setting in FULL} == set(OPS)


@needs_interpreter
def test_prints_and_writes_the_same_rows(tmp_path, capsys):
    paths = [tmp_path / "traffic.csv", tmp_path / "traffic.json"]
    ops = ["--op", "residual_add", "gather_rows"]
    assert run_command(op_traffic, "--tiny", *ops, "--csv", paths[0], "--json", paths[1]) == 0
    rows = json.loads(paths[1].read_text())
    as_text = [{key: "" if value is None else str(value) for key, value in row.items()} for row in rows]
    assert as_text == list(csv.DictReader(paths[0].read_text().splitlines()))
    assert len(rows) == 4 * 2 * 4
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 100
    assert "residual_add 6x5x32 bfloat16, 4 of 6, γ" in printed
    assert printed.splitlines()[-1] == "ours triton: exactly the needed bytes in 8 of 8 passes"


def test_without_triton_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(op_traffic.importlib.util, "find_spec", lambda name: None)
    assert run_command(op_traffic, "--tiny", "--op", "gather_rows") == 0
    printed = capsys.readouterr().out
    assert "– no ours triton: triton is not installed" in printed
    assert "ours eager" in printed
    assert "exactly" not in printed


@needs_interpreter
@pytest.mark.slow
def test_where_triton_was_imported_without_its_interpreter_another_process_counts(monkeypatch):
    """Budget: 30 seconds. It starts a fresh interpreter."""
    setting = Setting(DENSE, SHAPE, 2)
    here = count_kernels(setting)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with interpreting() as count:
        assert os.environ["TRITON_INTERPRET"] == "1", "for the new process"
        there = count(setting)
    assert os.environ["TRITON_INTERPRET"] == "0"
    assert there == here
