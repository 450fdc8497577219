"""The byte-level language model: its methods are comparable, and interrupted runs lose nothing."""

import copy
import csv
import functools
import itertools
import math
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from examples import bytes_lm
from examples.digits.experiment import Stopped, StopSignals
from examples.digits.storage import Folder
from examples.language import experiment, training
from examples.language.data import FILE_START, Text, held_out, source_files
from examples.language.experiment import Experiment
from examples.language.model import ByteGPT, sample
from examples.language.training import Config, Training, cross_entropy, logits_without
from examples.methods import DROP_PATH, DROP_THEN_FULL, EXACT, FREEZE, FROZEN, METHODS, PLAIN, RANDOM
from examples.models import forward_with_ends
from rdp_kernels.estimate import ModelCost

SCRIPT = Path(bytes_lm.__file__)
CPU = torch.device("cpu")


def config(**options) -> Config:
    defaults = vars(bytes_lm.build_parser().parse_args([])) | bytes_lm.PRESETS["quick"]
    defaults = {name: value for name, value in defaults.items() if name not in bytes_lm.ABOUT_COMMAND}
    return Config(**defaults | {"method": tuple(METHODS)} | options)


@pytest.fixture(scope="module")
def text() -> Text:
    return Text.load(CPU)


def begun(method: str, text: Text, wanted: Config, seed: int = 0, weights: ByteGPT | None = None) -> Training:
    weights = wanted.build_model(seed) if weights is None else weights
    inputs, _ = text.batch(seed, 0, wanted.batch_size, wanted.context)
    return Training(method, weights, ModelCost.of(weights, inputs), text, wanted, seed)


# The text


def test_the_text_is_split_by_files(text, tmp_path):
    """On a made-up library: skipped files, and which part each file belongs to, by names and bytes alone."""
    names = ["abc.py", *(f"mod{i}.py" for i in range(40)), "pack/__init__.py", "pack/deep/x.py"]
    skipped = ["site-packages/a.py", "test/b.py", "pack/tests/c.py", "encodings/d.py", "_sysconfigdata_x.py", "e.txt"]
    for name in names + skipped:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(f"# {name}\n".encode())
    assert source_files(tmp_path) == sorted(names)
    found = Text.load(CPU, root=tmp_path)
    parts = [bytes(part.tolist()) for part in (found.train, found.validation)]
    files = [part.split(FILE_START)[1:] for part in parts]
    assert sorted(files[0] + files[1]) == sorted(f"# {name}\n".encode() for name in names)
    assert files[1] == [f"# {name}\n".encode() for name in sorted(names) if held_out(name)]
    assert len(files[1]) > 1
    assert not set(files[0]) & set(files[1])
    assert Text.load(CPU, root=tmp_path).sha256 == found.sha256
    inputs, targets = found.spread(found.train, 3, 9)
    length = len(found.train)
    for i, start in enumerate((0, (length - 10) // 2, length - 10)):
        assert bytes([*inputs[i].tolist(), targets[i, -1]]) == parts[0][start : start + 10]

    fewer = Text.load(CPU, 50, tmp_path)
    assert bytes(fewer.train.tolist()) == parts[0][:50]
    assert torch.equal(fewer.validation, found.validation)
    (tmp_path / "abc.py").write_bytes(b"# ABC.py\n")
    assert len({found.sha256, fewer.sha256, Text.load(CPU, root=tmp_path).sha256}) == 3


def test_the_text_is_the_standard_library(text):
    assert len(text.train) > 10 * len(text.validation) / 2 > 1_000_000
    share = len(text.validation) / (len(text.train) + len(text.validation))
    assert 0.05 < share < 0.2
    source = bytes(text.train.tolist()) + bytes(text.validation.tolist())
    assert b"class ArgumentParser(" in source
    assert b"def urlopen(" in source


def test_batches_are_windows_of_the_training_text(text):
    inputs, targets = text.batch(seed=1, number=5, size=3, context=7)
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    whole = bytes(text.train.tolist())
    for window, last in zip(inputs, targets[:, -1], strict=True):
        assert bytes([*window.tolist(), int(last)]) in whole
    others = [text.batch(*numbers, 3, 7)[0] for numbers in ((1, 5), (1, 6), (2, 5))]
    assert torch.equal(others[0], inputs)
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(others, 2))


# The model and its training step


def test_no_byte_sees_the_bytes_behind_it():
    model = config(depth=2).build_model(0).double().eval()
    for parameter in model.parameters():  # so that attention is far from uniform
        parameter.data.normal_(std=0.5)
    text = torch.randint(256, (2, 12))
    logits = model(text)
    for place in range(1, 12):
        changed = text.clone()
        changed[:, place] = (changed[:, place] + 1) % 256
        moved = (model(changed) - logits).abs().amax(dim=(0, 2))
        assert moved[:place].max() == 0
        assert moved[place:].min() > 1e-6


def textbook(
    model: ByteGPT, inputs: torch.Tensor, scale: torch.Tensor, learns: torch.Tensor, rest: bool
) -> torch.Tensor:
    """Logits. Every branch is computed on every window and multiplied by `scale` [paths, B]. Where a path (`learns`,
    [paths, B]) or the rest is frozen, it runs on constant copies of its weights."""
    constant = copy.deepcopy(model).requires_grad_(False)
    outer = model if rest else constant
    size, places = inputs.shape
    x = outer.embedding.weight[inputs] + outer.position[:places]
    for path, frozen, factor, learning in zip(model.paths, constant.paths, scale, learns, strict=True):
        parts = [textbook_branch(each, x) for each in (path, frozen)]
        x = x + factor.view(size, 1, 1) * torch.where(learning.view(size, 1, 1), *parts)
    return (
        torch.nn.functional.layer_norm(x, x.shape[-1:], outer.norm.weight, outer.norm.bias) @ outer.embedding.weight.T
    )


def textbook_branch(path, x: torch.Tensor) -> torch.Tensor:
    x = torch.nn.functional.layer_norm(x, x.shape[-1:], path.norm.weight, path.norm.bias)
    if isinstance(path.fn, torch.nn.Sequential):
        first, _, second = path.fn
        hidden = x @ first.weight.T + first.bias
        return hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2 @ second.weight.T + second.bias
    width = x.shape[-1]
    every = x @ path.fn.qkv.weight.T + path.fn.qkv.bias
    later = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
    heads = []
    for columns in torch.arange(width).view(path.fn.heads, -1):
        q, k, v = (every[..., start + columns] for start in (0, width, 2 * width))
        scores = (q @ k.mT / math.sqrt(len(columns))).masked_fill(later, -math.inf)
        heads.append(scores.softmax(-1) @ v)
    return torch.cat(heads, dim=-1) @ path.fn.proj.weight.T + path.fn.proj.bias


@pytest.mark.parametrize("mode", ["block", "sample"])
@pytest.mark.parametrize(("method", "train_rest"), [(EXACT, False), (EXACT, True), (DROP_THEN_FULL, False)])
def test_a_pair_of_steps_has_the_textbook_gradients(method, train_rest, mode, text, monkeypatch):
    """They are clipped by the norm over the learning parameters."""
    monkeypatch.setattr(Training, "_evaluates", lambda _: False)
    wanted = config(depth=3, drop_prob=0.8, mode=mode, batch_size=5, schedule="linear", train_rest=train_rest)
    weights = wanted.build_model(0).double()
    for parameter in weights.parameters():
        parameter.data.normal_(std=0.6)
    run = begun(method, text, wanted, weights=weights)
    rates = torch.tensor([0.8 * path / 5 for path in range(6)], dtype=torch.float64)
    seen = {}

    def look(*_) -> None:
        keep = run.iterations.scheme.plan.keep
        seen["keep"] = keep if mode == "sample" else keep.unsqueeze(1).expand(-1, 5)
        seen["grads"] = {name: p.grad for name, p in run.model.named_parameters()}

    run.optimizer.register_step_pre_hook(look)
    for phase in ("drop", "reuse"):
        model = copy.deepcopy(run.model)
        assert run.iterations.phase == phase
        run.step()
        keep, inputs_targets = seen["keep"], text.batch(0, 0, 5, wanted.context)
        assert 0 < keep.sum() < keep.numel()
        scale = keep / (1 - rates.unsqueeze(1)) if phase == "drop" else torch.ones_like(keep).double()
        everything = method == DROP_THEN_FULL or phase == "drop"
        learns = torch.ones_like(keep) if everything else ~keep
        logits = textbook(model, inputs_targets[0], scale, learns, everything or train_rest)
        loss = -logits.log_softmax(-1).gather(-1, inputs_targets[1].unsqueeze(-1)).mean()
        loss.backward()
        assert run.losses[-1] == pytest.approx(loss.item() / math.log(2), rel=1e-12)
        took_part = keep.any(1) if phase == "drop" else learns.any(1)
        wanted_grads = {}
        for name, parameter in model.named_parameters():
            part = took_part[int(name.split(".")[1])] if name.startswith("paths.") else everything or train_rest
            wanted_grads[name] = parameter.grad if part else None
        norm = math.sqrt(sum(g.square().sum().item() for g in wanted_grads.values() if g is not None))
        assert norm > 1 or phase == "reuse", "the drop iteration's norm must be clipped"
        for name, gradient in seen["grads"].items():
            assert (gradient is None) == (wanted_grads[name] is None), name
            if gradient is not None:
                torch.testing.assert_close(
                    gradient, wanted_grads[name] * min(1, 1 / (norm + 1e-6)), rtol=1e-10, atol=1e-10
                )


@pytest.mark.slow
def test_the_learning_rate_and_weight_decay(text):
    """Budget: 3 seconds. Warm-up over a twentieth of the steps, then a cosine that ends at 0; matrices decay, vectors
    don't."""
    run = begun(PLAIN, text, config(steps=100, learning_rate=0.5))
    rates = []
    run.optimizer.register_step_pre_hook(lambda *_: rates.append([group["lr"] for group in run.optimizer.param_groups]))
    for _ in range(100):
        run.step()
    for step, rate in enumerate(rates):
        assert rate == [pytest.approx(0.25 * min(1, (step + 1) / 5) * (1 + math.cos(math.pi * step / 100)))] * 2
    decays = {id(p): group["weight_decay"] for group in run.optimizer.param_groups for p in group["params"]}
    assert decays == {id(p): 0.1 if p.dim() > 1 else 0 for p in run.model.parameters()}
    assert [point["step"] for point in run.curve] == list(range(10, 101, 10))


@pytest.mark.parametrize("method", [m for m in METHODS if m != DROP_PATH])
def test_needed_flops_are_those_counted(method, text, monkeypatch):
    monkeypatch.setattr(Training, "_evaluates", lambda _: False)
    run = begun(method, text, config(drop_prob=0.4))
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # it counts 0 for the fused kernel
        for _ in range(6):
            run.step()
    assert run.flops == counter.get_total_flops() > 0
    assert run.phases == ({PLAIN: 6} if method == PLAIN else {"drop": 3, "reuse": 3})


@pytest.mark.slow
def test_compiled_branches_learn_the_same(text, monkeypatch):
    """Budget: 10 seconds."""
    from rdp_kernels.integrations import compile

    monkeypatch.setattr(compile, "compile_branches", functools.partial(compile.compile_branches, backend="aot_eager"))
    wanted = config(drop_prob=0.5, steps=4)
    weights = wanted.build_model(0).double()
    runs = [begun(EXACT, text, replace(wanted, compile=compiled), weights=weights) for compiled in (False, True)]
    assert [owner.binding.branch_runner is not None for run in runs for owner in run.model.paths] == [False] * 4 + [
        True
    ] * 4
    for _ in range(4):
        for run in runs:
            run.step()
    for run in runs:
        assert [point["validation_loss"] for point in run.curve] == pytest.approx(
            [point["validation_loss"] for point in runs[0].curve], rel=1e-10
        )
    assert runs[0].phases == {"drop": 2, "reuse": 2}


def test_drop_paths_flops_are_the_expectation(text):
    run = begun(DROP_PATH, text, config(drop_prob=0.5, schedule="linear", mode="sample", no_scale=True))
    assert [(b.drop_prob, b.mode, b.scale_by_keep) for b in run.model.paths] == [
        (0.5 * path / 3, "sample", False) for path in range(4)
    ]
    cost = run.iterations.cost
    run.step()
    branches = cost.plain() - cost.drop([0.0] * 4)
    assert branches > 0
    assert run.flops == cost.drop([1, 5 / 6, 2 / 3, 1 / 2])


# The methods


@pytest.mark.parametrize("batch", ["same", "next"])
def test_all_methods_see_the_same_batches(batch, text, monkeypatch):
    """Each seed has its own batches and weights, equal in all methods. "same": both iterations of a pair share a
    batch."""
    wanted = config(batch=batch, drop_prob=0.5, steps=8)
    taken: list[tuple[int, int]] = []
    draw = Text.batch
    monkeypatch.setattr(
        Text, "batch", lambda self, seed, number, *a: (taken.append((seed, number)), draw(self, seed, number, *a))[1]
    )
    begins = set()
    for method in METHODS if batch == "same" else (PLAIN, EXACT):
        run = Experiment(wanted, text, None, {}, StopSignals()).begin(1, method)
        begins.add(training.weights_sha256(run.model))
        taken.clear()
        phases = []
        for _ in range(8):
            phases.append(run.iterations.phase)
            run.step()
        numbers = list(range(8))
        if batch == "same" and method in FREEZE:
            numbers = list(itertools.accumulate(phase == "drop" for phase in phases))
            numbers = [number - 1 for number in numbers]
            assert phases.count("reuse") > 2
        assert taken == [(1, number) for number in numbers]
    assert len(begins) == 1
    assert training.weights_sha256(wanted.build_model(2)) not in begins


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["block", "sample"])
def test_equal_flops_are_spent(mode, text, monkeypatch):
    """Budget: 5 seconds each. One more step would exceed the FLOPs."""
    monkeypatch.setattr(Training, "evaluated", lambda *_: 0.0)
    steps = {}
    for method, seed in [(RANDOM, 1), (RANDOM, 2), *((method, 0) for method in METHODS)]:
        run = begun(method, text, config(equal="flops", drop_prob=0.4, mode=mode), seed)
        budget = 20 * run.iterations.cost.plain()
        while run.step_count < run.steps:
            run.step()
        assert run.curve[-1]["step"] == run.steps
        assert len(run.curve) == 10
        spent = run.flops
        run.step()
        assert spent <= budget < run.flops, method
        steps[method] = run.steps
    assert steps[PLAIN] == 20 < steps[DROP_THEN_FULL] < steps[EXACT] <= steps[FROZEN]


def test_removing_paths_is_the_model_without_them(text):
    model = config().build_model(0).double()
    for parameter in model.parameters():
        parameter.data.normal_(std=0.3)
    inputs, targets = text.batch(0, 0, 3, 16)
    ends = [torch.zeros_like if path in (1, 2) else torch.clone for path in range(4)]
    torch.testing.assert_close(logits_without(model.eval(), inputs, (1, 2)), forward_with_ends(model, inputs, ends))
    run = begun(PLAIN, text, config(batch_size=3), weights=model)  # 8 windows, the last batch smaller
    starts = [i * (len(text.validation) - 17) // 7 for i in range(8)]
    logits = forward_with_ends(model, torch.stack([text.validation[s : s + 16].long() for s in starts]), ends)
    targets = torch.stack([text.validation[s + 1 : s + 17].long() for s in starts])
    bits = cross_entropy(logits, targets).item() / math.log(2)
    assert run.evaluated(text.validation, (1, 2)) == pytest.approx(bits, rel=1e-12)
    assert run.evaluated(text.validation) != pytest.approx(bits, rel=1e-3)
    assert run.model.training


def test_random_removals_are_different_and_of_the_same_number(text, monkeypatch):
    run, seen = begun(PLAIN, text, config(depth=6)), []
    monkeypatch.setattr(Training, "evaluated", lambda _, part, removed: seen.append(removed) or 1.0)
    assert [run._without(1), run._without(3)] == [1.0, 1.0]
    assert Counter(map(len, seen)) == {1: 12, 3: 12}
    assert len(set(seen)) == 24
    assert all(len(set(removed)) == len(removed) and max(removed) < 12 for removed in seen)


def test_samples_are_bytes_and_the_seeds(text):
    model = config().build_model(0)
    written = sample(model, 40, 1.0, seed=3)  # longer than the context
    assert isinstance(written, bytes)
    assert len(written) == 40
    assert written == sample(model, 40, 1.0, seed=3) != sample(model, 40, 1.0, seed=4)
    likeliest = sample(model, 5, 0.0, seed=3)
    start = model(torch.zeros(1, 1, dtype=torch.long))
    assert likeliest[0] == start.argmax()
    assert likeliest == sample(model, 5, 0.0, seed=4)


# Interrupted runs lose nothing


def results(wanted: Config, text: Text, folder: Folder, state=None, stop_at: int | None = None) -> list:
    """The results of all trainings, without times. `stop_at`: a signal arrives after that step of the run."""
    steps = []

    def advance(advance: float, description: str) -> None:
        steps.append(1)
        if len(steps) == stop_at:
            signals.received = signal.SIGTERM

    with StopSignals() as signals:
        run = Experiment(wanted, text, folder, {}, signals, advance)
        if state is not None:
            run.load_state_dict(state)
        run.run()
    return [{**result, "curve": [{**point, "seconds": 0} for point in result["curve"]]} for result in run.finished]


@pytest.mark.parametrize(
    ("mode", "methods"),
    [("block", (EXACT, DROP_PATH)), pytest.param("sample", (RANDOM, DROP_PATH), marks=pytest.mark.slow)],
)
def test_resumes_to_the_bit(mode, methods, text, tmp_path):
    """Budget: 5 seconds in sample mode. Stopped and resumed between the iterations of a pair, between pairs, and in the
    second training."""
    wanted, folder = config(mode=mode, method=methods, drop_prob=0.4, steps=10), Folder(tmp_path)
    whole = results(wanted, text, folder)
    best = folder.load_checkpoint(CPU, experiment.BEST)
    pending = []
    for stop_at in (3, 4, 17):
        with pytest.raises(Stopped):
            results(wanted, text, folder, stop_at=stop_at)
        state = folder.load_checkpoint(CPU)
        pending.append(
            state["current"]["iterations"]["scheme"] is not None and begun_pair(state, wanted, text, methods)
        )
        torch.manual_seed(1234)  # a new process has another random state
        assert results(wanted, text, folder, state) == whole
    assert {True, False} <= set(pending)
    again = folder.load_checkpoint(CPU, experiment.BEST)
    assert all(torch.equal(again["model"][name], value) for name, value in best["model"].items())


def begun_pair(state: dict, wanted: Config, text: Text, methods: tuple[str, ...]) -> bool:
    run = begun(methods[0], text, wanted)
    run.load_state_dict(state["current"])
    return run.iterations.phase == "reuse"


def rows_of(folder: Path, name: str = "results.csv") -> list[dict]:
    with (folder / name).open() as file:
        return [
            {k: v for k, v in row.items() if k not in ("seconds", "date", "commit")} for row in csv.DictReader(file)
        ]


@pytest.mark.slow
def test_an_unfinished_run_is_not_overwritten_unasked(tmp_path, capsys, monkeypatch):
    """Budget: 5 seconds."""
    options = ["--quick", "--out", str(tmp_path), "--method", PLAIN, "--steps", "4"]
    with monkeypatch.context() as patch:
        patch.setattr(Experiment, "_train", lambda *_: (_ for _ in ()).throw(Stopped(15)))
        assert bytes_lm.main(options) == 128 + 15
    assert "--resume" in capsys.readouterr().out
    before = (tmp_path / "checkpoint.pt").read_bytes()
    assert bytes_lm.main(options) == 2
    message = capsys.readouterr().err
    assert "unfinished run" in message
    assert "--overwrite" in message
    assert bytes_lm.main(["--resume", "--out", str(tmp_path), "--steps", "5"]) == 2
    assert "argument steps: the run in" in capsys.readouterr().err
    assert (tmp_path / "checkpoint.pt").read_bytes() == before

    monkeypatch.setattr(Text, "load", classmethod(lambda cls, *_: cls(*torch.zeros(2, 99, dtype=torch.uint8), "other")))
    assert bytes_lm.main(["--resume", "--out", str(tmp_path)]) == 2
    assert "another Python's library" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--drop-prob", "1.5"], ["argument --drop-prob", "[0, 1]", "1.5"]),
        (["--width", "30", "--heads", "4"], ["argument --heads", "30", "4"]),
        (["--seeds", "0"], ["argument --seeds", "got 0"]),
        (["--temperature", "-1"], ["argument --temperature", "-1"]),
        (["--train-bytes", "10"], ["argument --context", "10 bytes", "got 96"]),
    ],
)
def test_refuses_invalid_options(options, said, tmp_path, capsys):
    assert bytes_lm.main([*options, "--out", str(tmp_path / "run")]) == 2
    message = capsys.readouterr().err
    assert all(part in message for part in said), message
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_the_command(tmp_path, capsys, monkeypatch):
    """Budget: 10 seconds. All methods, the files, and text written by a finished run without training."""
    options = ["--quick", "--method", "all", "--seeds", "2", "--equal", "flops", "--dtype", "bfloat16"]
    assert bytes_lm.main([*options, "--out", str(tmp_path)]) == 0
    assert {file.name for file in tmp_path.iterdir()} == {
        "checkpoint.pt",
        "best.pt",
        "results.csv",
        "curves.csv",
        "loss.png",
    }
    rows = rows_of(tmp_path)
    assert [(row["seed"], row["method"]) for row in rows] == [(seed, method) for seed in "01" for method in METHODS]
    assert all(float(row["validation_loss"]) < 8 for row in rows)
    assert {row["dtype"] for row in rows} == {"bfloat16"}
    assert len(rows_of(tmp_path, "curves.csv")) == 10 * len(rows)
    printed = capsys.readouterr().out
    assert "SHA-256" in printed
    monkeypatch.setattr(Training, "step", lambda _: pytest.fail("it trained"))
    written = []
    for _ in range(2):
        assert bytes_lm.main(["--resume", "--sample", "30", "--out", str(tmp_path)]) == 0
        written.append(capsys.readouterr().out)
    assert written[0] == written[1]
    best = min(rows, key=lambda row: float(row["validation_loss"]))
    assert f"Written by {best['method']}, seed {best['seed']}" in written[0]


@pytest.mark.slow
def test_killed_and_resumed_ends_in_the_same_weights(tmp_path):
    """Budget: 25 seconds. The tables hold digests of all final weights."""
    options = ("--quick", "--method", EXACT, RANDOM, "--steps", "400", "--save-every", "0.1")

    def start(out: str, *more: str) -> subprocess.Popen:
        command = [sys.executable, str(SCRIPT), "--out", str(tmp_path / out), *more]
        return subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )

    whole = start("whole", *options)
    _, errors = whole.communicate(timeout=120)
    assert whole.returncode == 0, errors
    rng = random.Random(0)
    for number in (signal.SIGKILL, signal.SIGTERM):
        process = start("killed", *options, "--resume")
        before = written(tmp_path / "killed")
        while process.poll() is None and written(tmp_path / "killed") == before:
            time.sleep(0.01)
        time.sleep(rng.uniform(0.2, 0.5))
        process.send_signal(number)
        output, errors = process.communicate(timeout=60)
        assert process.returncode in (-number, 128 + number), output + errors
        assert process.returncode == -number or "--resume" in output
    last = start("killed", "--resume")
    _, errors = last.communicate(timeout=120)
    assert last.returncode == 0, errors
    for name in ("results.csv", "curves.csv"):
        assert rows_of(tmp_path / "killed", name) == rows_of(tmp_path / "whole", name)


def written(folder: Path) -> int | None:
    file = folder / "checkpoint.pt"
    return file.stat().st_mtime_ns if file.exists() else None
