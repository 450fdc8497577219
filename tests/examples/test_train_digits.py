"""The digits example: what it compares is comparable, and what it is given wrongly is refused before it trains."""

import json

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from examples import train_digits
from examples.train_digits import DROP_PATH, EXACT, FROZEN, METHODS, PLAIN, short


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(train_digits, "MODEL", {"dim": 16, "depth": 3, "heads": 2})
    monkeypatch.setattr(train_digits, "LEARNING_RATE", 5e-3)
    monkeypatch.setattr(train_digits, "COUNTED_STEPS", 40)


@pytest.mark.parametrize("mode", ["block", "sample"])
def test_compares_the_four_methods(mode, tiny, tmp_path, capsys):
    out = tmp_path / "digits.json"
    out.write_text("an older result")
    taken = []
    hook = register_optimizer_step_post_hook(lambda *_: taken.append(1))
    try:
        assert train_digits.main(["--epochs", "3", "--drop-prob", "0.2", "--mode", mode, "--out", str(out)]) == 0
    finally:
        hook.remove()

    results = json.loads(out.read_text())
    config, methods = results["config"], results["methods"]
    assert tuple(methods) == METHODS
    assert config["steps"] == 63  # 3 × 21 batches of 64
    assert len(taken) == 4 * (63 + 40), "optimizer steps of the trainings and of the repetitions that count FLOPs"
    for method in methods.values():
        assert method["optimizer_steps"] == [63]
        assert 0 <= method["accuracy_mean"] <= 1
        (curve,) = method["curves"]
        assert curve[-1]["loss"] < curve[0]["loss"]
    for method in (EXACT, FROZEN):
        (phases,) = methods[method]["iterations"]
        assert 0 < phases["reuse"] <= phases["drop"]

    ratio = {name: method["flops_ratio"] for name, method in methods.items()}
    assert ratio[PLAIN] == 1
    assert ratio[FROZEN] <= ratio[EXACT] < 1
    assert ratio[DROP_PATH] == pytest.approx(0.8, abs=0.1)
    assert list(tmp_path.iterdir()) == [out], "no temporary file stays"
    printed = capsys.readouterr().out
    assert all(name in printed for name in (*map(short, METHODS), "Try next", torch.__version__))


def test_stops_between_the_iterations_of_a_pair(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(train_digits, "COUNTED_STEPS", 2)
    out = tmp_path / "digits.json"
    assert train_digits.main(["--epochs", "0.05", "--drop-prob", "1", "--out", str(out)]) == 0
    methods = json.loads(out.read_text())["methods"]
    assert methods[EXACT]["iterations"] == [{"drop": 1}]
    assert {method["optimizer_steps"][0] for method in methods.values()} == {1}


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--drop-prob", "1.5"),
        ("--drop-prob", "-0.1"),
        ("--drop-prob", "nan"),
        ("--drop-prob", "half"),
        ("--seeds", "0"),
        ("--seeds", "1.5"),
        ("--epochs", "0"),
        ("--epochs", "inf"),
        ("--mode", "row"),
    ],
)
def test_refuses_invalid_options(option, value, capsys):
    with pytest.raises(SystemExit) as exit:
        train_digits.main([f"{option}={value}"])
    message = capsys.readouterr().err
    assert exit.value.code == 2
    assert f"argument {option}: " in message
    assert value in message


@pytest.mark.parametrize("place", ["file/digits.json", "missing/digits.json", "."])
def test_refuses_an_unwritable_out_before_it_trains(place, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train_digits.Digits, "load", lambda _: pytest.fail("it began to train"))
    (tmp_path / "file").write_text("precious")
    with pytest.raises(SystemExit) as exit:
        train_digits.main(["--out", str(tmp_path / place)])
    message = capsys.readouterr().err
    assert exit.value.code == 2
    assert "argument --out: can't write" in message
    assert "Traceback" not in message
    assert (tmp_path / "file").read_text() == "precious"
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]
