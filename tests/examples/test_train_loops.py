"""The examples with other libraries' training loops run, and run both kinds of iteration."""

import importlib
import re
import warnings

import pytest

from examples.libraries import installed
from tests.integrations.loops import isolate

isolated = pytest.fixture(autouse=True)(isolate)


@pytest.mark.filterwarnings("ignore:.*LeafSpec.*")
@pytest.mark.parametrize(
    ("name", "options"),
    [("transformers", []), ("accelerate", []), ("lightning", []), ("lightning", ["--pairs"]), ("timm", [])],
    ids=["transformers", "accelerate", "lightning", "lightning --pairs", "timm"],
)
def test_runs(name, options, capsys):
    if not installed(name):
        pytest.skip(f"{name} is not installed")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        example = importlib.import_module(f"examples.train_{name}")
    assert example.main(["--quick", "--drop-prob", "0.4", *options]) == 0
    printed = capsys.readouterr().out
    drops, reuses = map(int, re.search(r"optimizer steps: \{'drop': (\d+), 'reuse': (\d+)\}", printed).groups())
    pairs = name == "accelerate" or "--pairs" in options
    assert (drops if pairs else drops + reuses) == 8, "batches"
    assert reuses > 1
    assert re.search(r"accuracy on the test images: \d", printed)


def test_wrong_input_gets_a_readable_line(capsys):
    pytest.importorskip("accelerate")
    example = importlib.import_module("examples.train_accelerate")
    for option, value in [("--epochs", "0"), ("--drop-prob", "1.5"), ("--drop-prob", "nan"), ("--lr", "-1")]:
        with pytest.raises(SystemExit, match="2"):
            example.main([option, value])
        assert f"argument {option}: must be in [" in capsys.readouterr().err
