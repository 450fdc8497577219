"""The DINO example: gradients are the textbook's, the teacher is an average, interrupted runs lose nothing, and k-NN
accuracy rises."""

import argparse
import copy
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from examples import dino
from examples.digits.analysis import knn_accuracy, weights_sha256
from examples.digits.command import LAST
from examples.digits.data import Digits
from examples.digits.storage import Folder
from tests.nets import Iteration, textbook

SCRIPT = Path(dino.__file__)
TINY = ("--batch-size", "8", "--epochs", "1")  # 5 batches
EACH_SCHEME = pytest.mark.parametrize(
    "options",
    [
        ["--scheme", "plain"],
        ["--scheme", "drop-path"],
        ["--scheme", "residual-droppath"],
        ["--scheme", "residual-droppath", "--mode", "block"],
    ],
    ids=["plain", "drop-path", "residual-droppath", "residual-droppath in block mode"],
)


@pytest.fixture
def few(monkeypatch):
    """40 images, in float64 so that all arithmetic is."""
    torch.set_default_dtype(torch.float64)
    digits = Digits.load(torch.device("cpu"))
    parts = (digits.train_images[:40].double(), digits.train_labels[:40], digits.test_images[:20].double())
    monkeypatch.setattr(Digits, "load", lambda device: Digits(*parts, digits.test_labels[:20]))
    yield
    torch.set_default_dtype(torch.float32)


def training(*argv: str) -> dino.Training:
    options = vars(dino.build_parser().parse_args([*TINY, *argv]))
    return dino.Training(argparse.Namespace(**{k: v for k, v in options.items() if k not in LAST}), None)


def refused(argv: list[str], capsys) -> str:
    assert dino.main(argv) == 2
    message = capsys.readouterr().err
    assert message.startswith("dino.py: error: ")
    assert message.count("\n") == 1, "one line"
    return message


# The mathematics


class Spelled(nn.Module):
    """A student split into the parts that the textbook needs."""

    def __init__(self, student: dino.Network):
        super().__init__()
        self.student, self.offset = student, 0.0

    paths = property(lambda self: self.student.paths)
    stem = property(lambda self: self.student.embed)
    head = property(lambda self: self.student.classify)


def loss_by_hand(features: torch.Tensor, logits: torch.Tensor, answers: torch.Tensor) -> torch.Tensor:
    losses = [
        -(answer * (of_crop / 0.1).log_softmax(dim=-1)).sum(dim=-1).mean()
        for t, answer in enumerate(answers)
        for s, of_crop in enumerate(logits.chunk(10))
        if s != t
    ]
    assert len(losses) == 18
    for points in features.chunk(2):
        distances = torch.cdist(*[F.normalize(points, dim=-1)] * 2) + torch.eye(len(points)) * 10
        losses.append(18 * 0.3 / 2 * -(distances.min(dim=-1).values + 1e-8).log().mean())
    return sum(losses) / 18


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize("mode", ["sample", "block"])
def test_a_multi_crop_pair_equals_the_textbook(mode, monkeypatch):
    """Both forwards in both iterations: all branches are computed and masked, and frozen gradients are discarded. Both
    iterations use the crops, and the teacher's answers, from before the pair."""
    run = training("--mode", mode, "--seed", "3")
    run.center.normal_()
    teacher, found = copy.deepcopy(run.teacher), []

    def keep_gradients() -> None:
        grads = {name: p.grad.clone() for name, p in run.student.named_parameters() if p.grad is not None}
        found.append((run.scheme.phase, run.scheme.plan.keep, grads))

    monkeypatch.setattr(nn.utils, "clip_grad_norm_", lambda parameters, norm: None)
    run.optimizer.register_step_pre_hook(lambda *_: keep_gradients())
    run.optimizer.param_groups[0]["lr"] = 0.0  # the weights don't change
    twin, (large, small, _, _) = Spelled(copy.deepcopy(run.student)), run.draw_batch()
    assert (large.shape, small.shape) == ((16, 1, 12, 12), (64, 1, 8, 8))
    answers = ((teacher(large)[1] - run.center) / 0.04).softmax(dim=-1).chunk(2)
    run.step()
    run.step()
    assert [phase for phase, _, _ in found] == ["drop", "reuse"]
    assert run.record["batches"] == 1

    for phase, keep, grads in found:
        keeps = [keep[:, :16], keep[:, 16:]] if mode == "sample" else [keep[:, None].expand(-1, n) for n in (16, 64)]
        iterations = [Iteration(phase, part, [0.3] * len(keep)) for part in keeps]
        (features, logits), (_, of_small) = (
            textbook(twin, crops, iteration) for crops, iteration in zip((large, small), iterations, strict=True)
        )
        loss_by_hand(features, torch.cat([logits, of_small]), answers).backward()
        learns = (iterations[0].learns.any(dim=1) | iterations[1].learns.any(dim=1)).tolist()
        names = set()
        for name, p in twin.student.named_parameters():
            of_path = int(name.split(".")[1]) if name.startswith("paths.") else None
            if phase == "drop" if of_path is None else learns[of_path]:
                torch.testing.assert_close(
                    grads[name], p.grad, rtol=1e-10, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}"
                )
                names.add(name)
        assert set(grads) == names
        twin.zero_grad()


@pytest.mark.usefixtures("few")
@EACH_SCHEME
def test_the_teacher_is_an_average_without_a_scheme(options):
    """It takes w = 0.02 · (1 + cos π t/T) / 2 of the student after each batch: once for a pair."""
    run = training(*options)
    assert all(branch.binding.scheme is None for branch in run.teacher.paths)
    expected, center = [p.clone() for p in run.teacher.parameters()], run.center.clone()
    for batch in range(3):
        logits, before = run.draw_batch()[3], weights_sha256(run.teacher)
        run.step()
        if run.scheme is not None and run.scheme.reuse_pending:
            assert (run.record["batches"], weights_sha256(run.teacher)) == (batch, before)
            run.step()
        weight = 0.02 * (1 + math.cos(math.pi * batch / 5)) / 2
        expected = [(1 - weight) * p + weight * q for p, q in zip(expected, run.student.parameters(), strict=True)]
        center = 0.8 * center + 0.2 * logits
        torch.testing.assert_close([*run.teacher.parameters(), run.center], [*expected, center], rtol=1e-12, atol=1e-12)
    assert not any(p.requires_grad for p in run.teacher.parameters())
    assert not any(module.training for module in run.teacher.modules())
    assert all(module.training for module in run.student.modules())


def test_nearest_neighbours_vote():
    train, labels = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0]]), torch.tensor([0, 0, 1])
    test = torch.tensor([[5.0, 0.1], [0.1, 2.0]])
    assert knn_accuracy(train, labels, test, torch.tensor([0, 1])) == 1
    assert knn_accuracy(train, labels, test, torch.tensor([0, 0])) == 0.5


# Learning


@pytest.mark.slow
def test_nearest_neighbours_learn(tmp_path):
    """Budget: 60 seconds. Without a label in training, 4 epochs."""
    assert dino.main(["--epochs", "4", "--out", str(tmp_path)]) == 0
    before, *_, after = json.loads((tmp_path / "results.json").read_text())["epochs"]
    assert after["knn"] > before["knn"] + 0.05


# Interrupted runs lose nothing


@pytest.mark.slow
@pytest.mark.usefixtures("few")
@EACH_SCHEME
def test_resumes_to_the_bit(options, tmp_path, monkeypatch, capsys):
    """Budget: 5 seconds each. Stopped after each of the first steps, so also between the two iterations of a pair."""
    argv = [*TINY, *options, "--save-every", "1", "--out"]
    assert dino.main([*argv, str(tmp_path / "whole")]) == 0
    whole = (tmp_path / "whole" / "results.json").read_bytes()
    save, pending = Folder.save_checkpoint, set()
    for stop in (1, 2, 5):
        saved = []

        def save_and_stop(self, state, saved=saved, stop=stop):
            save(self, state)
            saved.append(state)
            if len(saved) == stop:
                raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(Folder, "save_checkpoint", save_and_stop)
            assert dino.main([*argv, str(tmp_path / str(stop))]) == 130
        pending.add(saved[-1].get("scheme", {}).get("phase"))
        torch.manual_seed(1234)  # a new process has another random state
        assert dino.main([*argv, str(tmp_path / str(stop)), "--resume"]) == 0
        assert (tmp_path / str(stop) / "results.json").read_bytes() == whole
    assert pending == ({"drop", "reuse"} if "residual-droppath" in options else {None})


@pytest.mark.slow
def test_killed_and_resumed_in_new_processes(tmp_path):
    """Budget: 60 seconds. SIGKILL as soon as there is a checkpoint."""
    argv = [sys.executable, str(SCRIPT), "--batch-size", "64", "--epochs", "1", "--save-every", "5", "--out"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([*argv, str(tmp_path / "killed")], env=environment, stdout=subprocess.DEVNULL)
    while process.poll() is None and not (tmp_path / "killed" / "checkpoint.pt").exists():
        time.sleep(0.005)
    process.kill()
    assert process.wait(60) == -signal.SIGKILL
    for command in ([*argv, str(tmp_path / "killed"), "--resume"], [*argv, str(tmp_path / "whole")]):
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stdout + done.stderr
    results = [(tmp_path / name / "results.json").read_bytes() for name in ("killed", "whole")]
    assert results[0] == results[1]


# Readable errors


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--drop-prob", "1.5"], ["argument --drop-prob", "[0, 1]", "1.5"]),
        (["--drop-prob", "nan"], ["argument --drop-prob", "nan"]),
        (["--epochs", "0"], ["argument --epochs", "got 0"]),
        (["--batch-size", "1"], ["argument --batch-size", "[2, 1000]", "got 1"]),
        (["--seed", "-1"], ["argument --seed", "got -1"]),
        (["--save-every", "0"], ["argument --save-every", "got 0"]),
        (["--scheme", "drop-path", "--mode", "block"], ["argument --mode", "sample", "drop-path"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) and value[0].startswith("--") else "",
)
def test_wrong_input_gets_one_line_and_leaves_nothing(argv, says, tmp_path, capsys):
    message = refused([*argv, "--out", str(tmp_path / "run")], capsys)
    for part in says:
        assert part in message
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("few")
def test_an_unfinished_run_is_not_overwritten_unasked_nor_resumed_with_other_options(tmp_path, capsys):
    argv = [*TINY, "--save-every", "3", "--out", str(tmp_path)]
    run = training("--save-every", "3")
    run.end_epoch(lambda line: None)
    Folder(tmp_path).save_checkpoint(run.state_dict())
    assert "holds an unfinished run: give --resume" in refused(argv, capsys)
    message = refused([*argv, "--resume", "--seed", "5"], capsys)
    assert "argument seed: the run in" in message
    assert "has 0, got 5" in message
    assert dino.main([*argv, "--resume"]) == 0
    assert dino.main([*argv, "--overwrite"]) == 0


def test_the_run_of_another_example_is_refused(tmp_path, capsys):
    Folder(tmp_path).save_checkpoint({"options": {"model": "test_vit"}, "epochs": []})
    assert "the run of another example" in refused(["--resume", "--out", str(tmp_path)], capsys)
