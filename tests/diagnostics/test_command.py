"""`python -m rdp_kernels.diagnostics`: its report has the functions' values, and wrong input gets a message of one
line."""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from examples.digits.data import Digits
from examples.libraries import import_torchvision, installed
from rdp_kernels.diagnostics import (
    branch_sizes,
    effective_depth,
    gradient_norms,
    layer_similarity,
    lesion_study,
    without,
)
from rdp_kernels.diagnostics.__main__ import build_parser, look, main
from rdp_kernels.plan import plan_generator

from . import nets

HERE = "tests.diagnostics.nets"
QUICK = ["--batches", "1", "--batch-size", "8", "--lesions", "2", "--samples", "1"]


def reported(capsys, *argv):
    assert main([str(part) for part in argv]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    return captured.out


def found(*argv):
    """The report, without files."""
    return look(build_parser().parse_args([str(part) for part in argv]))


def refused(capsys, *argv):
    assert main([str(part) for part in argv]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("diagnostics: error: ")
    assert captured.err.count("\n") == 1, "one line"
    return captured.err


@pytest.fixture
def checkpoint(tmp_path):
    torch.manual_seed(7)
    model, file = nets.tiny_vit().eval(), tmp_path / "weights.pt"
    torch.save({"epoch": 3, "model": model.state_dict()}, file)
    return model, file


def test_the_report_holds_what_the_functions_give(tmp_path, capsys, checkpoint):
    """On the whole test set of digits, whose order doesn't matter."""
    model, file = checkpoint
    argv = ["--data", "digits", "--batch-size", "450", "--batches", "1", "--checkpoint", file, "--samples", "9"]
    text = reported(capsys, f"{HERE}:tiny_vit", *argv, "--out", tmp_path / "new" / "out")
    report = json.loads((tmp_path / "new" / "out" / "report.json").read_text())
    digits = Digits.load(torch.device("cpu"))
    images, labels = digits.test_images, digits.test_labels

    def loss(m):
        return F.cross_entropy(m(images), labels)

    gradients, sizes = gradient_norms(model, loss), branch_sizes(model, images)
    study = lesion_study(model, lambda m: F.cross_entropy(m(images).double(), labels), counts=(), swaps=(1,))
    depth = effective_depth(model, loss)
    assert [row["name"] for row in report["paths"]] == ["paths.0", "paths.1"]
    for path, row in enumerate(report["paths"]):
        wanted = (sizes.ratio[path].item(), gradients.parameters[path], gradients.stream[path], study.effects[path])
        assert [row[key] for key in ("size", "gradient", "stream")] == pytest.approx(wanted[:3], rel=1e-3)
        assert row["effect"] == pytest.approx(wanted[3], abs=1e-5)
        assert f"{row['gradient']:.3g}" in text
    facts = report["facts"]
    accuracy = (model(images).argmax(dim=1) == labels).double().mean().item()
    assert facts["loss"] == pytest.approx(study.baseline, rel=1e-5)
    assert facts["accuracy"] == pytest.approx(accuracy, rel=1e-9)
    assert facts["effective depth"] == pytest.approx(depth.depth, rel=1e-3)
    assert facts["rebound of the similarity"] == pytest.approx(layer_similarity(model, images).rebound, abs=1e-4)
    assert report["checkpoint"] == str(file)
    assert not any("weights are untrained" in note or "random" in note for note in report["notes"])

    files = {file.name for file in (tmp_path / "new" / "out").iterdir()}
    page = (tmp_path / "new" / "out" / "report.md").read_text()
    if installed("matplotlib"):
        assert set(re.findall(r"\((\w+\.png)\)", page)) == {name for name in files if name.endswith(".png")}
        assert len(files) == 9
        assert (tmp_path / "new" / "out" / "lesions.png").read_bytes().startswith(b"\x89PNG")
    assert "| paths.1 |" in page
    assert f"accuracy: {accuracy:.4g}" in page


def test_without_labels_it_is_the_outputs_that_change():
    argv = [f"{HERE}:tiny_vit", "--image-size", "8", *QUICK]
    report = found(*argv, "--seed", "5")
    torch.manual_seed(5)
    model = nets.tiny_vit().eval()
    assert "random numbers" in report.text()
    assert "accuracy" not in report.text()
    images = torch.randn(8, 1, 8, 8, generator=plan_generator(5, 0))
    with torch.no_grad():
        y = model(images)
        for path, effect in enumerate(report.lesions.effects):
            with without(model, path):
                assert effect == pytest.approx(((model(images) - y).norm() / y.norm()).item(), rel=1e-4)
    assert report.lesions.baseline == 0
    assert found(*argv, "--seed", "5").data() == report.data()
    assert found(*argv, "--seed", "6").data() != report.data()


@pytest.mark.slow
def test_a_model_without_paths_is_converted(capsys):
    """Budget: 5 seconds."""
    text = reported(capsys, f"{HERE}:Unconverted", *QUICK, "--lesions", "0", "--samples", "0")
    assert "1 paths in 1 blocks converted" in text
    assert "block" in text
    assert "effective depth" not in text
    assert "random paths" not in text


def test_labels_of_other_classes_are_not_used(capsys):
    text = reported(capsys, f"{HERE}:wide_vit", "--data", "digits", *QUICK)
    assert "the data has 10 classes, and the model's outputs are [2]" in text
    assert "accuracy" not in text


def test_where_nothing_can_be_swapped_it_says_so():
    report = found(f"{HERE}:one_path", "--data", "digits", *QUICK)
    assert "as no two map the same shape" in report.text()
    assert "nan" not in report.text()
    assert "swapped" not in "".join(report.facts())


def test_a_loss_without_a_gradient_has_no_effective_depth(capsys):
    text = reported(capsys, f"{HERE}:zero_head", "--data", "digits", *QUICK)
    assert "No effective depth: loss must have a finite gradient" in text


@pytest.fixture
def images(tmp_path):
    image = pytest.importorskip("PIL.Image")
    if not installed("torchvision"):
        pytest.skip("torchvision is not installed")
    import_torchvision()
    for name, level in (("bright", 250), ("dark", 5)):
        (tmp_path / "images" / name).mkdir(parents=True)
        for number in range(3):
            image.new("RGB", (10 + number, 9), (level, number, 0)).save(tmp_path / "images" / name / f"{number}.png")
    return tmp_path / "images"


def test_a_folder_of_images(capsys, images, tmp_path):
    report = found(f"{HERE}:wide_vit", "--data", images, "--image-size", "8", *QUICK)
    torch.manual_seed(0)
    model = nets.wide_vit().eval()
    scaled = [
        torch.tensor([level, number, 0.0]).view(3, 1, 1).expand(3, 8, 8) / 127.5 - 1
        for level in (250, 5)
        for number in range(3)
    ]
    with torch.no_grad():
        loss = F.cross_entropy(model(torch.stack(scaled)), torch.tensor([0, 0, 0, 1, 1, 1])).item()
    assert report.facts()["loss"] == pytest.approx(loss, rel=1e-4)
    assert report.accuracy in [n / 6 for n in range(7)]
    for name in ("bright", "dark"):
        (images / name / "0.png").write_bytes(b"no image")
    assert "--data" in refused(capsys, f"{HERE}:wide_vit", "--data", images, "--image-size", "8")
    (images / "dark" / "0.png").unlink()
    for file in (images / "bright").iterdir():
        file.unlink()
    assert "a folder of class folders" in refused(capsys, f"{HERE}:wide_vit", "--data", images, "--image-size", "8")
    assert "a folder of class folders" in refused(capsys, f"{HERE}:wide_vit", "--data", tmp_path / "none")


@pytest.mark.slow
def test_models_of_timm(capsys, tmp_path):
    """Budget: 25 seconds."""
    if not installed("timm"):
        pytest.skip("timm is not installed")
    import_torchvision()
    import timm

    file, argv = tmp_path / "weights.pt", ["test_vit", "--image-size", "32", "--classes", "10", *QUICK]
    torch.save(timm.create_model("test_vit", img_size=32, num_classes=10).state_dict(), file)
    text = reported(capsys, *argv, "--checkpoint", file, "--data", "digits")
    assert "12 paths in 6 blocks converted" in text
    assert "weights are untrained" not in text
    assert "accuracy" in text
    text = reported(capsys, "test_byobnet", "--image-size", "32", *QUICK)  # takes images of any size
    assert "weights are untrained" in text


def test_models_that_are_not_there(capsys):
    if installed("timm"):
        import_torchvision()
        error = refused(capsys, "vit_tiny_patch16_223")
        assert "timm has no 'vit_tiny_patch16_223'; similar: vit_tiny_patch16_224" in error
    assert "ModuleNotFoundError" in refused(capsys, "no.such.module:model")
    assert "AttributeError" in refused(capsys, f"{HERE}:nothing")
    assert "OSError: no weights here" in refused(capsys, f"{HERE}:broken")
    assert "must return a torch.nn.Module, got int" in refused(capsys, f"{HERE}:no_module")
    assert "--pretrained" in refused(capsys, f"{HERE}:tiny_vit", "--pretrained")
    assert "no residual path was found" in refused(capsys, f"{HERE}:no_paths", "--data", "digits")
    error = refused(capsys, f"{HERE}:no_paths", "--data", "digits", "--image-size", "9")
    assert "can't run on images of shape [1, 9, 9]" in error
    assert "--device" in refused(capsys, f"{HERE}:tiny_vit", "--device", "nonsense")


def test_timm_is_missing(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    assert "'test_vit': timm can't be imported" in refused(capsys, "test_vit")


def test_bad_checkpoints(capsys, checkpoint, tmp_path):
    model, file = checkpoint
    weights = model.state_dict()
    argv = [f"{HERE}:tiny_vit", "--checkpoint", file]
    assert "can't read" in refused(capsys, *argv[:2], tmp_path / "none.pt")
    file.write_bytes(b"no checkpoint")
    assert "can't read" in refused(capsys, *argv)
    torch.save([1, 2], file)
    assert "must hold a state_dict, got list" in refused(capsys, *argv)
    torch.save({"weights": weights}, file)
    assert "must hold a state_dict, got a dict with ['weights']" in refused(capsys, *argv)
    torch.save({"state_dict": {"module." + key: value for key, value in weights.items()}}, file)
    error = refused(capsys, *argv)
    assert re.search(r"\d+ missing \(position, ", error)
    assert re.search(r"\d+ unexpected \(module.position, ", error)
    torch.save(weights | {"head.bias": torch.zeros(3)}, file)
    assert "1 of another shape (head.bias" in refused(capsys, *argv)
    torch.save(weights, file)
    assert "accuracy" in reported(capsys, *argv, "--data", "digits", *QUICK)


def test_a_folder_that_cannot_be_written(capsys, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    assert "--out: can't write to" in refused(capsys, f"{HERE}:tiny_vit", "--out", tmp_path / "file")
    monkeypatch.setattr(Path, "write_bytes", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    assert "No space left on device" in refused(capsys, f"{HERE}:tiny_vit", "--out", tmp_path / "full")


@pytest.mark.parametrize("option", ["--batch-size=3", "--batches=0", "--lesions=-1", "--image-size=x"])
def test_options_out_of_range(option, capsys):
    with pytest.raises(SystemExit) as exit:
        main([f"{HERE}:tiny_vit", option])
    assert exit.value.code == 2
    assert "must be an integer, at least" in capsys.readouterr().err


def test_values_that_are_no_numbers_are_null(tmp_path, capsys, checkpoint):
    model, file = checkpoint
    torch.save(model.state_dict() | {"head.bias": torch.full((10,), math.nan)}, file)
    argv = ["--checkpoint", file, "--data", "digits", *QUICK, "--out", tmp_path]
    text = reported(capsys, f"{HERE}:tiny_vit", *argv)
    assert "paths that matter, by what removing them does: unknown" in text
    report = json.loads((tmp_path / "report.json").read_text(), parse_constant=pytest.fail)
    assert report["facts"]["loss"] is None


@pytest.mark.slow
def test_it_is_a_command():
    """In a process of its own. Budget: 8 seconds."""
    run = subprocess.run(
        [sys.executable, "-m", "rdp_kernels.diagnostics", f"{HERE}:tiny_vit", "--image-size", "8", *QUICK],
        cwd=Path(__file__).parents[2],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert "effective depth" in run.stdout
    assert run.stderr == ""
