"""`python -m benchmarks estimate`: the costs that it prints and writes, and the options that it refuses."""

import argparse
import csv
import json
import sys

import pytest

from benchmarks import estimate
from benchmarks.cases import OWN_TINY
from benchmarks.machine import one_thread
from benchmarks.pages import RESULTS
from examples.libraries import installed


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    monkeypatch.setattr(estimate, "OWN_FULL", OWN_TINY)
    with one_thread():
        yield


def run(*arguments):
    parser = argparse.ArgumentParser()
    estimate.add_command(parser.add_subparsers())
    options = parser.parse_args(["estimate", *map(str, arguments)])
    return options.run(options)


def test_prints_and_writes_the_estimate(tmp_path, capsys):
    files = tmp_path / "rows.csv", tmp_path / "rows.json"
    options = ("--batch", 3, "--image", 8, "--dtype", "float64", "--drop-prob", 0.2)
    assert run("vit", "--quick", *options, "--csv", files[0], "--json", files[1]) == 0
    printed = capsys.readouterr().out
    assert "0.2 (own)" in printed
    assert "A plain step at batch 3" in printed
    assert "Recommendation" in printed
    with files[0].open() as file:
        table = list(csv.DictReader(file))
    rows = json.loads(files[1].read_text())
    described = (RESULTS / "README.md").read_text(encoding="utf-8")
    assert all(f"`{column}`" in described for column in rows[0])
    assert len(rows) == len(table) == 4 * 6
    assert {(row["model"], row["batch"], row["dtype"]) for row in rows} == {("vit", 3, "float64")}
    assert all(row["flop_ratio"] < 1 and row["time_ratio"] is None and row["threads"] == 1 for row in rows)


def test_checks_its_times_against_real_pairs(capsys):
    assert run("resnet", "--check", "--turns", 1, "--batch", 2, "--drop-prob", 0.5) == 0
    printed = capsys.readouterr().out
    assert "measured / estimated" in printed
    assert printed.count("│ block │ ") >= 2
    assert "refused: path 'paths.0'" in printed


@pytest.mark.slow
def test_a_model_of_timms_is_converted(capsys):
    """Budget: 10 seconds."""
    if not installed("timm"):
        pytest.skip("timm is not installed")
    assert run("vit_tiny_patch16_224", "--quick", "--batch", 1, "--image", 32) == 0
    assert "A plain step at batch 1" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["vit_tiny"], "unknown model 'vit_tiny'; near: "),
        (["lcnet_035", "--image", 32, "--batch", 2], "lcnet_035 has no path that can be converted"),
        (["vit", "--check", "--quick"], "--check compares times, and --quick takes none"),
        (["vit", "--device", "cuda"], "no cuda device"),
    ],
)
def test_refuses_invalid_options(arguments, message, capsys):
    if arguments[0] != "vit" and not installed("timm"):
        pytest.skip("timm is not installed")
    assert run(*arguments) == 2
    assert message in capsys.readouterr().err


def test_without_timm_it_says_so(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "timm", None)
    assert run("vit_tiny_patch16_224") == 2
    assert "is none of vit, resnet, and timm can't be imported" in capsys.readouterr().err


def test_options_are_checked(capsys):
    for option, value in (("--drop-prob", "0"), ("--batch", "0"), ("--dtype", "int8"), ("--image", "big")):
        with pytest.raises(SystemExit):
            run("vit", option, value)
        assert option in capsys.readouterr().err
