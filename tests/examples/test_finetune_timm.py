"""The timm example: each scheme trains, killed runs lose nothing, and wrong input gets a readable line."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from examples import finetune_timm
from examples.digits.data import Digits
from examples.digits.storage import Folder
from examples.libraries import import_torchvision, installed

if installed("torchvision"):
    import_torchvision()
pytest.importorskip("timm")

SCRIPT = Path(finetune_timm.__file__)
TINY = ("test_vit", "--batch-size", "100", "--epochs", "2", "--drop-prob", "0.4")  # 3 batches an epoch
EACH_SCHEME = pytest.mark.parametrize(
    ("scheme", "options"),
    [("plain", []), ("drop-path", []), ("residual-droppath", []), ("residual-droppath", ["--mode", "sample"])],
    ids=["plain", "drop-path", "residual-droppath", "residual-droppath per sample"],
)


@pytest.fixture(autouse=True)
def _few_digits(monkeypatch):
    few = Digits.load(torch.device("cpu"))
    few = Digits(few.train_images[:300], few.train_labels[:300], few.test_images[:50], few.test_labels[:50])
    monkeypatch.setattr(Digits, "load", lambda device: few)


def results_of(folder: Path) -> bytes:
    """results.json without times."""
    return re.sub(rb'"seconds": [\d.e-]+', b"", (folder / "results.json").read_bytes())


def refused(argv: list[str], capsys) -> str:
    assert finetune_timm.main(argv) == 2
    message = capsys.readouterr().err
    assert message.startswith("finetune_timm.py: error: ")
    assert message.count("\n") == 1, "one line"
    return message


@pytest.fixture
def images(tmp_path) -> Path:
    """A folder of dark and bright images, of other sizes than the model's."""
    from PIL import Image

    folder = tmp_path / "images"
    generator = torch.Generator().manual_seed(0)
    for part, count in (("train", 6), ("val", 2)):
        for label, bright in (("bright", 128), ("dark", 0)):
            (folder / part / label).mkdir(parents=True)
            for i in range(count):
                pixels = torch.randint(bright, bright + 128, (40, 50 + i, 3), generator=generator, dtype=torch.uint8)
                Image.fromarray(pixels.numpy()).save(folder / part / label / f"{i}.{'png' if i % 2 else 'jpg'}")
    return folder


# Trains


@EACH_SCHEME
def test_each_scheme_trains_and_writes_results(scheme, options, tmp_path, capsys):
    assert finetune_timm.main([*TINY, *options, "--scheme", scheme, "--out", str(tmp_path / "run")]) == 0
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["options"]["scheme"] == scheme
    assert results["data"] == {"train": 300, "val": 50, "classes": 10, "image size": 32}
    assert [epoch["epoch"] for epoch in results["epochs"]] == [1, 2]
    for epoch in results["epochs"]:
        if scheme == "residual-droppath":
            assert epoch["steps"]["drop"] == 3
            assert 1 <= epoch["steps"]["reuse"] <= 3
        else:
            assert epoch["steps"] == {scheme: 3}
        assert epoch["worst_loss"].keys() == epoch["steps"].keys()
        assert max(epoch["worst_loss"].values()) >= epoch["loss"]
        assert 0 <= epoch["accuracy"] <= 1
    assert results["epochs"][1]["loss"] < results["epochs"][0]["loss"]
    printed = capsys.readouterr().out
    assert ("12 paths in 6 blocks converted" in printed) == (scheme != "plain")
    assert "epoch 2: loss" in printed
    assert str(tmp_path / "run" / "results.json") in printed.replace("\n", "")


def test_freeze_bn_option_changes_the_training(tmp_path):
    """The first reuse iteration's loss differs for the same weights, so that all weights differ at the end."""
    weights = set()
    for kind in ("batch", "running", "moving"):
        argv = ["test_resnet", "--batch-size", "100", "--epochs", "1", "--drop-prob", "0.4", "--freeze-bn", kind]
        assert finetune_timm.main([*argv, "--out", str(tmp_path / kind)]) == 0
        weights.add(json.loads((tmp_path / kind / "results.json").read_text())["weights_sha256"])
    assert len(weights) == 3


def test_a_model_without_drop_path_gets_paths(tmp_path, capsys):
    options = ["dla46x_c", "--batch-size", "16", "--epochs", "1", "--out", str(tmp_path)]
    timm = finetune_timm.import_timm()
    args = finetune_timm.build_parser().parse_args(options)
    model = finetune_timm.build_model(timm, args, 10, 32, pretrained=False)
    scheme = finetune_timm.convert(model, args, 32)
    assert scheme is not None
    assert {path.drop_prob for path in scheme.paths} == {0.1}
    assert "refused" not in capsys.readouterr().out


def test_plain_is_the_model_untouched():
    args = finetune_timm.build_parser().parse_args([*TINY, "--scheme", "plain"])
    model = finetune_timm.build_model(finetune_timm.import_timm(), args, 10, 32, pretrained=False)
    assert finetune_timm.convert(model, args, 32) is None
    assert {type(block).__module__ for block in model.blocks} == {"timm.models.vision_transformer"}
    assert not [m for m in model.modules() if getattr(m, "drop_prob", 0)]


def test_without_rich_there_are_lines(tmp_path, capsys, monkeypatch):
    find = finetune_timm.importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *more: None if name == "rich" else find(name, *more))
    assert finetune_timm.main([*TINY, "--scheme", "plain", "--out", str(tmp_path)]) == 0
    assert [line[:7] for line in capsys.readouterr().out.splitlines()] == ["epoch 1", "epoch 2", "Results"]


# Interrupted runs lose nothing


def run_interrupted(argv: list[str], monkeypatch) -> None:
    """Stopped once the first checkpoint is written, and continued with --resume."""
    save = Folder.save_checkpoint

    def save_and_stop(self, state):
        save(self, state)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Folder, "save_checkpoint", save_and_stop)
        assert finetune_timm.main(argv) == 130
    torch.manual_seed(1234)  # a new process has another random state
    assert finetune_timm.main([*argv, "--resume"]) == 0


@pytest.mark.slow
@EACH_SCHEME
def test_resumes_to_the_bit(scheme, options, tmp_path, monkeypatch):
    """Budget: 5 seconds each."""
    argv = [*TINY, *options, "--scheme", scheme, "--out"]
    assert finetune_timm.main([*argv, str(tmp_path / "whole")]) == 0
    run_interrupted([*argv, str(tmp_path / "stopped")], monkeypatch)
    assert results_of(tmp_path / "stopped") == results_of(tmp_path / "whole")


def test_an_image_folder_resumes_to_the_bit(images, tmp_path, monkeypatch):
    """With timm's random crops and flips, and BatchNorm's statistics."""
    argv = ["test_resnet", "--data", str(images), "--image-size", "32", "--batch-size", "5", "--epochs", "2", "--out"]
    assert finetune_timm.main([*argv, str(tmp_path / "whole")]) == 0
    run_interrupted([*argv, str(tmp_path / "stopped")], monkeypatch)
    assert results_of(tmp_path / "stopped") == results_of(tmp_path / "whole")
    data = json.loads((tmp_path / "whole" / "results.json").read_text())["data"]
    assert data == {"train": 12, "val": 4, "classes": 2, "image size": 32}


@pytest.mark.slow
def test_killed_and_resumed_in_new_processes(tmp_path):
    """Budget: 60 seconds. SIGKILL as soon as there is a checkpoint, while the next epoch runs."""
    argv = [sys.executable, str(SCRIPT), *TINY, "--epochs", "3", "--out"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([*argv, str(tmp_path / "killed")], env=environment, stdout=subprocess.DEVNULL)
    while process.poll() is None and not (tmp_path / "killed" / "checkpoint.pt").exists():
        time.sleep(0.005)
    process.kill()
    assert process.wait(60) == -signal.SIGKILL
    assert not (tmp_path / "killed" / "results.json").exists()
    for command in ([*argv, str(tmp_path / "killed"), "--resume"], [*argv, str(tmp_path / "whole")]):
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stdout + done.stderr
    assert results_of(tmp_path / "killed") == results_of(tmp_path / "whole")


@pytest.fixture
def unfinished(tmp_path, monkeypatch) -> Path:
    """The folder of a run that was stopped after the first of its two epochs."""
    with monkeypatch.context() as patch:
        patch.setattr(finetune_timm.Training, "run", stop_after_one_epoch)
        assert finetune_timm.main([*TINY, "--scheme", "plain", "--out", str(tmp_path / "run")]) == 130
    return tmp_path / "run"


def stop_after_one_epoch(training, folder):
    folder.prepare()
    training.record["epochs"].append(training.run_epoch(1, lambda **_: None, print))
    folder.save_checkpoint(training.state_dict())
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("option", "value", "saved"),
    [("--drop-prob", "0.5", "0.4"), ("--epochs", "3", "2"), ("--scheme", "drop-path", "'plain'")],
)
def test_resuming_with_other_options_is_refused(option, value, saved, unfinished, capsys):
    message = refused(["--resume", option, value, "--out", str(unfinished)], capsys)
    assert f"argument {option[2:]}: the run in {unfinished} has {saved}" in message
    assert value in message


def test_resuming_takes_the_options_of_the_run(unfinished):
    assert finetune_timm.main(["--resume", "--out", str(unfinished)]) == 0
    options = json.loads((unfinished / "results.json").read_text())["options"]
    assert (options["model"], options["drop_prob"], options["scheme"]) == ("test_vit", 0.4, "plain")


def test_an_unfinished_run_is_not_overwritten_unasked(unfinished, capsys):
    checkpoint = (unfinished / "checkpoint.pt").read_bytes()
    message = refused([*TINY, "--out", str(unfinished)], capsys)
    assert "unfinished run" in message
    assert "--resume" in message
    assert (unfinished / "checkpoint.pt").read_bytes() == checkpoint
    assert finetune_timm.main([*TINY, "--overwrite", "--out", str(unfinished)]) == 0


def test_a_finished_run_is_not_trained_again(unfinished, monkeypatch):
    argv = ["--resume", "--out", str(unfinished)]
    assert finetune_timm.main(argv) == 0
    before = (unfinished / "results.json").read_bytes()
    (unfinished / "results.json").unlink()
    monkeypatch.setattr(finetune_timm.Training, "run_epoch", lambda *_: pytest.fail("it trained"))
    assert finetune_timm.main(argv) == 0
    assert (unfinished / "results.json").read_bytes() == before


def test_the_run_of_another_example_is_refused(tmp_path, capsys):
    Folder(tmp_path).save_checkpoint({"config": {}})
    assert "the run of another example" in refused(["--resume", "--out", str(tmp_path)], capsys)


def test_other_data_is_not_resumed_with(images, tmp_path, capsys, monkeypatch):
    argv = [
        "test_vit",
        "--scheme",
        "plain",
        "--data",
        str(images),
        "--image-size",
        "32",
        "--batch-size",
        "4",
        "--epochs",
        "2",
    ]
    argv += ["--out", str(tmp_path / "run")]
    with monkeypatch.context() as patch:
        patch.setattr(finetune_timm.Training, "run", stop_after_one_epoch)
        assert finetune_timm.main(argv) == 130
    (images / "train" / "dark" / "0.jpg").unlink()
    assert "'train': 11" in refused([*argv, "--resume"], capsys)


# Readable errors


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["vit_tinny_patch16_224"], ["argument MODEL", "'vit_tinny_patch16_224'", "similar: vit_tiny_patch16_224"]),
        (["xyzzy"], ["argument MODEL", "'xyzzy'", "timm.list_models()"]),
        (["test_vit", "--data", "/no/such/folder"], ["argument --data", "/no/such/folder/train", "train/CLASS"]),
        (["test_vit", "--image-size", "7"], ["test_vit --image-size 7", "can't be built"]),
        (["test_resnet", "--mode", "sample"], ["argument --mode", "BatchNorm"]),
        (["test_vit", "--scheme", "drop-path", "--mode", "block"], ["argument --mode", "sample", "drop-path"]),
        (["lcnet_035"], ["no residual branch", "--scheme plain"]),
        (["test_vit", "--batch-size", "301"], ["argument --batch-size", "300"]),
        (["test_vit", "--drop-prob", "1.5"], ["argument --drop-prob", "[0, 1]", "1.5"]),
        (["test_vit", "--drop-prob", "nan"], ["argument --drop-prob", "nan"]),
        (["test_vit", "--epochs", "0"], ["argument --epochs", "got 0"]),
        (["test_vit", "--image-size", "0"], ["argument --image-size", "got 0"]),
        (["test_vit", "--seed", "-1"], ["argument --seed", "got -1"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) and value[0].islower() else "",
)
def test_wrong_input_gets_one_line_and_leaves_nothing(argv, says, tmp_path, capsys):
    message = refused([*argv, "--out", str(tmp_path / "run")], capsys)
    for part in says:
        assert part in message
    assert not (tmp_path / "run").exists()


def test_without_timm(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    message = refused(["--out", str(tmp_path / "run")], capsys)
    assert "timm" in message
    assert "pip install" in message


def test_a_folder_without_the_classes_of_the_other(images, tmp_path, capsys):
    (images / "val" / "dark").rename(images / "val" / "black")
    assert "the same classes" in refused(["test_vit", "--data", str(images), "--out", str(tmp_path / "run")], capsys)


def test_refuses_an_out_of_other_things(tmp_path, capsys):
    (tmp_path / "thesis.tex").write_text("precious")
    assert "thesis.tex" in refused([*TINY, "--scheme", "plain", "--out", str(tmp_path)], capsys)
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.tex"]
