"""The digits example: its methods are comparable, interrupted runs lose nothing, and wrong input is refused before
training."""

import itertools
import json
import re
import signal
import statistics

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

import rdp_kernels as rdp
from examples import train_digits
from examples.digits import analysis, experiment, report, training
from examples.digits.data import Digits
from examples.digits.experiment import Experiment, Stopped, StopSignals
from examples.digits.storage import Folder
from examples.digits.training import Config, Training
from examples.methods import DROP_PATH, DROP_THEN_FULL, EXACT, FROZEN, METHODS, PLAIN, RANDOM
from examples.models import forward_with_ends

from .tiny_digits import TINY, shrink


@pytest.fixture(autouse=True)
def _tiny(monkeypatch):
    shrink(monkeypatch.setattr)


@pytest.fixture(scope="module")
def digits():
    return Digits.load(torch.device("cpu"))


@pytest.fixture
def undrawn(monkeypatch):
    """Makes reports without plots, which take most of the time of a short run."""
    monkeypatch.setattr(report, "draw_all", lambda *_: {})


class NoDisplay:
    def begin(self, *_): ...
    def counting(self, *_): ...
    def stepped(self, *_): ...
    def analysing(self, *_): ...


def results_of(folder) -> dict:
    return json.loads((folder / "results.json").read_text())


@pytest.mark.parametrize(
    ("model", "mode"),
    [
        ("vit", "block"),
        ("mlp", "sample"),
        pytest.param("resnet", "block", marks=pytest.mark.slow),
        pytest.param("vit", "sample", marks=pytest.mark.slow),
        pytest.param("mlp", "block", marks=pytest.mark.slow),
    ],
)
def test_compares_the_methods(model, mode, tmp_path, capsys):
    """Budget: 5 seconds each for those that are slow."""
    taken = []
    hook = register_optimizer_step_post_hook(lambda *_: taken.append(1))
    options = ["--model", model, "--mode", mode, "--epochs", "1", "--seeds", "2", "--drop-prob", "0.3"]
    try:
        assert train_digits.main([*options, "--out", str(tmp_path / "report")]) == 0
    finally:
        hook.remove()

    results = results_of(tmp_path / "report")
    methods = results["methods"]
    assert list(methods) == list(METHODS)
    assert results["settings"]["optimizer steps"] == 21  # batches of 64
    assert len(taken) == 6 * (2 * 21 + 10), "steps of the trainings, and of the repetitions that count FLOPs"
    for method in methods.values():
        assert [sum(run.values()) for run in method["iterations"]] == [21, 21]
        assert [worst.keys() for worst in method["worst_losses"]] == [run.keys() for run in method["iterations"]]
        assert all(0 <= accuracy <= 1 for accuracy in method["accuracies"])
        assert list(method["removed"]) == ["1", "2"]
        similarity = torch.tensor(method["similarity"])
        assert similarity.shape == (5, 5)
        assert torch.allclose(similarity.diagonal(), torch.ones(5))
        assert torch.allclose(similarity, similarity.mT, atol=1e-6)
    assert all(curve[-1]["loss"] < curve[0]["loss"] for curve in methods[PLAIN]["curves"])
    for method in (EXACT, FROZEN, DROP_THEN_FULL, RANDOM):
        assert all(0 < run["reuse"] <= run["drop"] for run in methods[method]["iterations"])

    needed = {name: statistics.fmean(method["seed_needed_flops"]) for name, method in methods.items()}
    assert needed[FROZEN] <= needed[EXACT] < needed[DROP_THEN_FULL] < needed[PLAIN]
    for name, method in methods.items():
        tolerance = 0.3 if name == DROP_PATH else 1e-9  # its draws are unknown: 10 steps against the expectation
        assert method["counted_flops"] == pytest.approx(method["needed_flops_counted_steps"], rel=tolerance)

    names = {"accuracy.png", "loss.png", "cost.png", "removed.png", "similarity.png"}
    files = {file.name: file.read_bytes() for file in (tmp_path / "report").iterdir()}
    assert files.keys() == names | {"results.json", "results.csv", "report.html", "checkpoint.pt"}
    page, printed = files["report.html"].decode(), capsys.readouterr().out
    assert page.count("data:image/png;base64,") == len(names)
    assert not re.search(r'(src|href)="(?!data:)', page), "self-contained"
    for method in METHODS:
        assert method in page
        assert method in printed
    assert str(tmp_path / "report" / "report.html") in printed
    assert "Try next" in printed


def test_every_seed_and_epoch_has_an_order_of_its_own(digits):
    """A resumed run uses the same order."""
    last = digits.batches_per_epoch - 1
    orders = [[digits.batch(seed, number)[0] for number in (0, last, last + 1)] for seed in (0, 1)]
    images = [image for order in orders for image in order]
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(images, 2))
    assert torch.equal(digits.batch(1, last + 1)[0], images[-1])


def test_validation_leaves_the_test_set_alone():
    whole, split = Digits.load(torch.device("cpu")), Digits.load(torch.device("cpu"), validate=True)
    assert len(split.train_images) + len(split.test_images) == len(whole.train_images)
    held_out = {image.numpy().tobytes() for image in whole.test_images}
    seen = {image.numpy().tobytes() for image in whole.train_images}
    for image in (*split.train_images, *split.test_images):
        assert image.numpy().tobytes() in seen
    assert len(held_out) > 400


def trained(method: str, digits: Digits, config: Config, steps: int) -> Training:
    weights = config.build_model(0)
    cost = training.ModelCost.of(weights, digits.batch(0, 0)[0])
    return Training(method, weights, cost, digits, config, 0, steps)


def test_random_control_breaks_the_match_alone(digits):
    """Not the dropped paths learn, but other ones, as many on average. Drop iterations are the exact scheme's."""
    config = Config(drop_prob=0.5)
    plans: dict[str, dict[str, list]] = {}
    for method in (EXACT, RANDOM):
        run, seen = trained(method, digits, config, 40), {"drop": [], "reuse": []}
        begin = run.scheme._pairs.begin
        run.scheme._pairs.begin = lambda it, begin=begin, seen=seen: (
            seen[it.phase].append(it.plan.keep.tolist()),
            begin(it),
        )
        for _ in range(40):
            run.step()
        plans[method] = seen
        assert run.record.phases["reuse"] == len(seen["reuse"])
    assert all(reuse in plans[EXACT]["drop"] for reuse in plans[EXACT]["reuse"])
    carried_out = plans[RANDOM]["drop"][::2]  # every other plan is set by hand
    shared = min(len(carried_out), len(plans[EXACT]["drop"]))
    assert carried_out[:shared] == plans[EXACT]["drop"][:shared]
    assert (
        plans[RANDOM]["reuse"]
        == [plan for plan in plans[RANDOM]["drop"][1::2] if not all(plan)][: len(plans[RANDOM]["reuse"])]
    )
    assert carried_out != plans[RANDOM]["drop"][1::2]


# Interrupted runs lose nothing


def run_experiment(mode: str, digits: Digits, folder: Folder, state=None, stop_in_round: int | None = None) -> list:
    """The results of each seed without times; a signal arrives in the middle of a round of steps."""
    calls = []

    def stepped(*_):
        calls.append(1)
        if stop_in_round is not None and len(calls) == 6 * stop_in_round + 2:
            signals.received = signal.SIGTERM

    with StopSignals() as signals:
        config = Config(model="mlp", mode=mode, epochs=0.25, seeds=2, drop_prob=0.4)
        run = Experiment(config, digits, folder.save_checkpoint, signals)
        if state is not None:
            run.load_state_dict(state)
        display = NoDisplay()
        display.stepped = stepped
        run.run(display)
    return [{name: result | {"seconds": None} for name, result in seed.items()} for seed in run.finished]


@pytest.mark.parametrize("mode", ["block", pytest.param("sample", marks=pytest.mark.slow)])
def test_resumes_to_the_bit(mode, digits, tmp_path, monkeypatch):
    """Budget: 10 seconds in sample mode. Stopped after any round of steps, between the iterations of a pair too, and
    resumed from the checkpoint."""
    monkeypatch.setattr(experiment, "COUNTED_STEPS", 2)
    folder = Folder(tmp_path)
    whole = run_experiment(mode, digits, folder)
    for stop_in_round in (0, 3, 4, 5):  # five rounds a seed
        with pytest.raises(Stopped):
            run_experiment(mode, digits, folder, stop_in_round=stop_in_round)
        torch.manual_seed(1234)  # a new process has another random state
        assert run_experiment(mode, digits, folder, folder.load_checkpoint(torch.device("cpu"))) == whole


def test_a_finished_run_is_reported_again_without_training(tmp_path, monkeypatch):
    options = ["--epochs", "0.1", "--seeds", "1", "--out", str(tmp_path)]
    assert train_digits.main(options) == 0
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    for name in before.keys() - {"checkpoint.pt"}:
        (tmp_path / name).unlink()
    monkeypatch.setattr(Training, "step", lambda _: pytest.fail("it trained"))
    assert train_digits.main(["--resume", "--out", str(tmp_path)]) == 0
    after = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    assert {name for name in before if before[name] != after[name]} <= {"checkpoint.pt"}


def refused(argv: list[str], capsys) -> str:
    with pytest.raises(SystemExit) as exit:
        train_digits.main(argv)
    message = capsys.readouterr().err
    assert exit.value.code == 2
    assert "Traceback" not in message
    return message


@pytest.fixture
def unfinished(tmp_path, monkeypatch, capsys):
    """A folder with the checkpoint of a stopped run, and the checkpoint's bytes."""
    folder = tmp_path / "report"
    with monkeypatch.context() as patch:
        patch.setattr(Experiment, "_run_seed", lambda *_: (_ for _ in ()).throw(Stopped(15)))
        assert train_digits.main(["--epochs", "0.1", "--drop-prob", "0.2", "--out", str(folder)]) == 128 + 15
    return folder, (folder / "checkpoint.pt").read_bytes()


def test_an_unfinished_run_is_not_overwritten_unasked(unfinished, capsys):
    folder, checkpoint = unfinished
    assert "--resume" in capsys.readouterr().out
    message = refused(["--epochs", "0.1", "--out", str(folder)], capsys)
    assert "unfinished run" in message
    assert "--resume" in message
    assert "--overwrite" in message
    assert (folder / "checkpoint.pt").read_bytes() == checkpoint


@pytest.mark.usefixtures("undrawn")
def test_overwrite_starts_again(unfinished):
    folder, _ = unfinished
    options = ["--epochs", "0.1", "--drop-prob", "0.4", "--seeds", "1"]
    assert train_digits.main([*options, "--overwrite", "--out", str(folder)]) == 0
    assert results_of(folder)["settings"]["drop_prob"] == 0.4


@pytest.mark.usefixtures("undrawn")
def test_resuming_takes_the_options_of_the_run(unfinished, capsys):
    folder, _ = unfinished
    message = refused(["--resume", "--drop-prob", "0.5", "--out", str(folder)], capsys)
    assert "argument --drop-prob" in message
    assert "0.2" in message
    assert "0.5" in message
    assert train_digits.main(["--resume", "--drop-prob", "0.2", "--out", str(folder)]) == 0
    settings = results_of(folder)["settings"]
    assert (settings["drop_prob"], settings["epochs"], settings["seeds"]) == (0.2, 0.1, 3)


@pytest.mark.usefixtures("undrawn")
def test_resuming_nothing_starts_at_the_beginning(tmp_path, capsys):
    assert train_digits.main(["--resume", "--epochs", "0.05", "--seeds", "1", "--out", str(tmp_path / "new")]) == 0
    assert "No checkpoint" in capsys.readouterr().out


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[: len(content) // 2],
        lambda content: content[:-1000] + bytes([content[-1000] ^ 1]) + content[-999:],
        lambda content: b"",
        lambda content: b"PK" + content,
    ],
    ids=["cut short", "one bit flipped", "empty", "another format"],
)
@pytest.mark.parametrize("option", [[], ["--resume"]])
def test_a_damaged_checkpoint_is_refused_and_kept(damage, option, unfinished, capsys):
    folder, checkpoint = unfinished
    damaged = damage(checkpoint)
    (folder / "checkpoint.pt").write_bytes(damaged)
    message = refused([*option, "--out", str(folder)], capsys)
    assert "is damaged" in message
    assert str(folder / "checkpoint.pt") in message
    assert (folder / "checkpoint.pt").read_bytes() == damaged


def test_checkpoints_run_no_code(unfinished, capsys):
    """`weights_only=True`: a checkpoint from elsewhere can't execute anything."""
    folder, _ = unfinished
    ran = []

    class Evil:
        def __reduce__(self):
            return ran.append, (1,)

    Folder(folder).save_checkpoint({"config": Evil()})
    assert "is damaged" in refused(["--resume", "--out", str(folder)], capsys)
    assert not ran


def test_a_full_disk_ends_the_run_and_keeps_the_checkpoint(unfinished, capsys, monkeypatch):
    folder, checkpoint = unfinished

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("examples.digits.storage.os.fsync", full)
    with pytest.raises(SystemExit):
        train_digits.main(["--resume", "--out", str(folder)])
    assert "No space left on device" in capsys.readouterr().err
    monkeypatch.setattr(Folder, "prepare", lambda _: None)  # the disk fills while it trains
    assert train_digits.main(["--resume", "--out", str(folder)]) == 1
    message = capsys.readouterr().err
    assert "No space left on device" in message
    assert "is kept" in message
    assert "--resume" in message
    assert [file.name for file in folder.iterdir()] == ["checkpoint.pt"]
    assert (folder / "checkpoint.pt").read_bytes() == checkpoint


@pytest.mark.parametrize("place", ["file", "file/report"])
def test_refuses_an_unwritable_out_before_it_trains(place, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Digits, "load", lambda *_: pytest.fail("it began to train"))
    (tmp_path / "file").write_text("precious")
    message = refused(["--out", str(tmp_path / place)], capsys)
    assert "argument --out: can't write to" in message
    assert (tmp_path / "file").read_text() == "precious"


def test_refuses_a_folder_of_other_things(tmp_path, capsys):
    (tmp_path / "thesis.tex").write_text("precious")
    assert "thesis.tex" in refused(["--out", str(tmp_path)], capsys)
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.tex"]


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
        ("--model", "vgg"),
    ],
)
def test_refuses_invalid_options(option, value, capsys, tmp_path):
    message = refused([f"{option}={value}", "--out", str(tmp_path / "report")], capsys)
    assert f"argument {option}: " in message
    assert value in message
    assert not (tmp_path / "report").exists()


def test_refuses_batch_norm_per_sample(capsys, tmp_path):
    message = refused(["--model", "resnet", "--mode", "sample", "--out", str(tmp_path / "report")], capsys)
    assert "argument --mode" in message
    assert "BatchNorm" in message


@pytest.mark.parametrize("drop_prob", [0.0, 1.0])
@pytest.mark.usefixtures("undrawn")
@pytest.mark.filterwarnings("ignore:ResidualDropPath. every path's drop_prob is 0")
def test_extreme_probabilities(drop_prob, tmp_path):
    options = ["--drop-prob", str(drop_prob), "--epochs", "0.1", "--seeds", "1", "--out", str(tmp_path)]
    assert train_digits.main(options) == 0
    iterations = results_of(tmp_path)["methods"][EXACT]["iterations"]
    assert iterations == [{"drop": 2} if drop_prob == 0 else {"drop": 1, "reuse": 1}]


def test_removing_branches_is_the_network_without_them(digits):
    """A removed path is its shortcut and activation. Compared with the forward written by hand, in every network."""
    for network in TINY.values():
        model = network.kind(**network.options).eval()
        ends = [torch.clone] * len(model.paths)
        ends[0] = ends[2] = torch.zeros_like  # in the ResNet path 2 has a shortcut whose output is negative in places
        wanted = forward_with_ends(model, digits.test_images, ends)
        got = analysis.logits_without(model, digits.test_images, (0, 2))
        torch.testing.assert_close(got, wanted)
        assert not torch.allclose(got, model(digits.test_images))


def test_drop_path_in_the_demo_is_the_modules_own(digits):
    run = trained(DROP_PATH, digits, Config(drop_prob=0.25, mode="sample"), 3)
    assert run.scheme is None
    assert {(branch.drop_prob, branch.mode) for branch in run.model.paths} == {(0.25, "sample")}
    assert isinstance(run.model.paths, rdp.ResidualSequence)
