"""`python -m benchmarks host`: launches on a stand-in for a GPU's driver, and the values of the same calls where kernels
run."""

import csv
import json
import shutil
import sys

import pytest
import torch

import rdp_kernels as rdp
from benchmarks import host
from benchmarks.harness import CheckFailed
from benchmarks.op_providers import EAGER, OURS, OURS_NATIVE
from benchmarks.overhead import BOTH, FORWARD, NO_GRAD
from rdp_kernels.kernels import dispatch
from tests.benchmarks.commands import run_command

needs_compiler = pytest.mark.skipif(sys.platform != "linux" or shutil.which("c++") is None, reason="no compiler")
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """The rows of a tiny run, and the two files."""
    files = [tmp_path_factory.mktemp("host") / f"host.{kind}" for kind in ("csv", "json")]
    assert run_command(host, "--tiny", "--csv", files[0], "--json", files[1]) == 0
    return json.loads(files[1].read_text()), *files


# Eager, Triton, the compiled library: launches of a forward, and with its backward; or of a drop and a reuse iteration,
# where most are ops of torch: branches, sums and gradients. drop_path_add draws its mask by three ops.
LAUNCHES = {
    "residual_add": ((4, 8), (1, 3), (1, 3)),
    "residual_add, γ frozen": ((4, 6), (1, 2), (1, 2)),
    "residual_add without γ": ((3, 4), (1, 2), (1, 2)),
    "residual_add rows": ((2, 7), (2, 4), (2, 4)),
    "gather_rows": ((1, 3), (1, 3), (1, 3)),
    "drop_path_add": ((5, 9), (4, 6), (4, 6)),
    "residual_add_norm": ((5, 11), (1, 3), (6, 14)),
    "residual_add_norm, γ frozen": ((5, 9), (1, 3), (6, 13)),
    "residual_add_norm rms": ((12, 34), (1, 3), (10, 30)),
    "12 paths, block mode": ((56, 56), (59, 59), (59, 59)),
    "12 paths, sample mode": ((130, 209), (108, 132), (108, 132)),
    "sequence of 12 with norms, block mode": ((73, 81), (63, 68), (76, 97)),
    "sequence of 12 with norms, sample mode": ((155, 257), (99, 125), (121, 169)),
}


@needs_compiler
@pytest.mark.parametrize("op", LAUNCHES)
def test_launches(op, measured):
    found = {(row["provider"], row["pass"]): row["launches"] for row in measured[0] if row["op"] == op}
    passes = (FORWARD, BOTH) if (EAGER, BOTH) in found else host.ITERATIONS
    of_each = (tuple(found[name, each] for each in passes) for name in (EAGER, OURS, OURS_NATIVE))
    assert tuple(of_each) == LAUNCHES[op]
    if FORWARD in passes:
        assert all(found[name, NO_GRAD] == found[name, FORWARD] for name in (EAGER, OURS, OURS_NATIVE))


@needs_compiler
def test_rows_make_sense(measured):
    rows, as_csv, _ = measured
    as_text = [{key: "" if value is None else str(value) for key, value in row.items()} for row in rows]
    assert as_text == list(csv.DictReader(as_csv.read_text().splitlines()))
    assert {row["op"] for row in rows} == LAUNCHES.keys()
    assert {row["provider"] for row in rows} == {EAGER, OURS, OURS_NATIVE}
    for row in rows:
        assert (row["unavailable"], row["threads"], row["dtype"]) == ("", 1, "bfloat16")
        assert row["function_calls"] > 0
        assert row["min_us"] > 0
        assert row["allocations"] > 0
    of = {(row["op"], row["pass"], row["provider"]): row for row in rows}
    assert of["residual_add", FORWARD, EAGER]["allocations"] == 4, "γ · update, its mask, the product and the sum"
    assert [of["residual_add", FORWARD, name]["allocations"] for name in (OURS, OURS_NATIVE)] == [1, 1]
    assert of["residual_add", BOTH, OURS]["function_calls"] > of["residual_add", FORWARD, OURS]["function_calls"]


@pytest.mark.slow
@no_gpu
def test_without_a_compiler_triton_is_measured(monkeypatch, tmp_path):
    """Budget: 30 seconds."""
    monkeypatch.setattr(host.shutil, "which", lambda name: None)
    out = tmp_path / "host.json"
    assert run_command(host, "--quick", "--turns", 1, "--json", out) == 0
    missing = {row["unavailable"] for row in json.loads(out.read_text()) if row["provider"] == OURS_NATIVE}
    assert missing == {host.NO_COMPILER}


@pytest.mark.gpu
def test_on_a_gpu(tmp_path):
    out = tmp_path / "host.json"
    assert run_command(host, "--tiny", "--device", "cuda", "--json", out) == 0
    rows = [row for row in json.loads(out.read_text()) if row["provider"] == OURS and row["op"] == "residual_add"]
    assert [row["launches"] for row in rows] == [1, *LAUNCHES["residual_add"][1]]


@no_gpu
def test_without_a_gpu_it_says_so(capsys):
    assert run_command(host, "--device", "cuda") == 2
    assert "--device cuda: this machine, or this torch, has no cuda device" in capsys.readouterr().err


# Values


ON_CPU = host.Driver(host.HostDevice.of("cpu"), rdp.available_backends())
RUNS = host.Driver.real() if torch.cuda.is_available() else ON_CPU
"""Kernels run: on a GPU, or interpreted by Triton and in the compiled library for CPUs."""
COUNTS = host.Driver(ON_CPU.host, ON_CPU.missing | {"triton": "left out"}, launched=lambda: 0)
OPS = {op.setting.op: op for op in host.ops(RUNS.device)}


@pytest.mark.parametrize("op", OPS)
def test_every_call_is_right(op):
    for case in host.op_cases(OPS[op], 1, RUNS):
        case.verify()


@pytest.mark.parametrize("path", host.paths(), ids="-".join)
def test_every_iteration_is_right(path):
    host.path_case(*path, 1, RUNS).verify()


@pytest.mark.skipif(RUNS.missing["native"] is not None, reason="it is not built")
@pytest.mark.parametrize("driver", [RUNS, COUNTS], ids=["real", "stand-in"])
@pytest.mark.parametrize("change", [lambda out: 1.1 * out, lambda out: out.double()], ids=["values", "dtype"])
def test_a_wrong_result_is_caught(driver, change, monkeypatch):
    """Of the compiled library; on a stand-in only its shapes and dtypes count, and the eager backend's values."""
    right = rdp.residual_add

    def wrong(*arguments, **options):
        out = right(*arguments, **options)
        return change(out) if dispatch.choice() == "native" else out

    monkeypatch.setattr(rdp, "residual_add", wrong)
    for case in host.op_cases(OPS["residual_add"], 1, driver):
        if driver is COUNTS and change(torch.ones(())).dtype == torch.float32:
            case.verify()
        else:
            with pytest.raises(CheckFailed, match="'ours native' differs"):
                case.verify()


# Verdicts


def row_of(op, direction, ratio, launches, provider=OURS, unavailable=""):
    row = {"op": op, "pass": direction, "provider": provider, "unavailable": unavailable}
    return row | {"ratio_rounds": ratio, "ratio_min": 0.9, "launches": launches}


def test_verdicts():
    rows = [
        row_of("residual_add", FORWARD, 1.2, 1),
        row_of("residual_add", BOTH, 1.21, 4, OURS_NATIVE),
        row_of("residual_add", BOTH, None, None, OURS, "it was not built"),
        row_of("residual_add", NO_GRAD, 9.0, 9),
        row_of("residual_add", BOTH, 1.0, 8, EAGER),
        row_of("12 paths, block mode", "drop", 9.0, 9),
    ]
    assert list(host.verdicts_of(rows)) == [
        "residual_add, forward, ours triton: 1.20 (min 0.90) of eager, target 1.2: met",
        "residual_add, forward, ours triton: 1 launches, target 1: met",
        "residual_add, both, ours native: 1.21 (min 0.90) of eager, target 1.2: MISSED",
        "residual_add, both, ours native: 4 launches, target 3: MISSED",
    ]
