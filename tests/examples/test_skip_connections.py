"""The study of skip connections: stacked networks are separate, removed layers don't run, and numbers are right."""

import csv
import dataclasses
import functools
import io
import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from examples import skip_connections
from examples.digits.data import Digits
from examples.skips import study
from examples.skips.networks import (
    ADDITION,
    CONCATENATION,
    KINDS,
    PLAIN,
    SCALED,
    ZERO,
    Network,
    concatenation_sizes,
    parameters,
)
from examples.skips.results import findings, to_csv
from examples.skips.study import Config, Gradients, Measured

EXACT = dict(rtol=1e-10, atol=1e-12)
SEEDS, DEPTH, WIDTH, GROWTH = (0, 5, 2), 5, 6, 3


def build(kind, normalise=True):
    network = Network(kind, DEPTH, WIDTH, GROWTH, SEEDS, normalise).double()
    with torch.no_grad():  # biases and one kind's weights begin at 0, where tests would miss errors
        for parameter in network.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, dtype=torch.float64)
    return network


def separate(network, s):
    """Network s of the stack: weights and biases of the embedding, of each layer and of the head."""
    tensors = [parameter[s].detach().clone().requires_grad_() for parameter in network.parameters()]
    return list(zip(tensors[::2], tensors[1::2], strict=True))


def normed(x):
    mean = x.mean(dim=-1, keepdim=True)
    return (x - mean) / ((x - mean).square().mean(dim=-1, keepdim=True) + 1e-5).sqrt()


def textbook(kind, linears, x, without=(), normalise=True):
    """Logits and the states before each layer and after the last."""
    (embed, bias), *layers, (head, head_bias) = linears
    states = [x @ embed + bias]
    for index, (weight, bias) in enumerate(layers):
        x = states[-1]
        f = (normed(x) if normalise else x).clamp(min=0) @ weight + bias
        if kind == PLAIN:
            states.append(x if index in without else f)
        elif kind == CONCATENATION:
            states.append(torch.cat([x, 0 * f if index in without else f], dim=-1))
        else:
            states.append(x if index in without else x + f)
    return normed(states[-1]) @ head + head_bias, states


def toy_digits():
    images = torch.randn(192, 1, 8, 8, dtype=torch.float64)
    labels = torch.randint(10, (192,))
    return Digits(images[:128], labels[:128], images[128:], labels[128:])


@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize("kind", [PLAIN, ADDITION, CONCATENATION])
def test_the_stack_is_separate_networks(kind, normalise):
    """Logits, gradients and their norms, then three steps of Adam on each network's own batches."""
    digits, steps, rate = toy_digits(), 3, 0.01
    network = build(kind, normalise)
    images, labels = digits.test_images.flatten(1), digits.test_labels
    logits = network(images)
    norms = study.gradient_norms(network, images, labels)
    alone = [separate(network, s) for s in range(len(SEEDS))]
    for _ in study.train(network, digits, SEEDS, steps, rate):
        pass
    for s, (seed, linears) in enumerate(zip(SEEDS, alone, strict=True)):
        expected, states = textbook(kind, linears, images, normalise=normalise)
        torch.testing.assert_close(logits[s], expected, **EXACT)
        weights = [weight for weight, _ in linears[1:-1]]
        grads = torch.autograd.grad(F.cross_entropy(expected, labels), weights + states[:-1])
        for got, own in ((norms.weights, grads[:DEPTH]), (norms.states, grads[DEPTH:])):
            torch.testing.assert_close(got[:, s], torch.stack([g.square().sum().sqrt().log10() for g in own]), **EXACT)

        flat = [tensor for linear in linears for tensor in linear]
        optimizer = torch.optim.Adam(flat, rate)
        for step in range(steps):
            batch, wanted = digits.batch(seed, step)
            optimizer.param_groups[0]["lr"] = rate * (1 + math.cos(math.pi * step / steps)) / 2
            optimizer.zero_grad()
            F.cross_entropy(textbook(kind, linears, batch.flatten(1), normalise=normalise)[0], wanted).backward()
            optimizer.step()
        for got, own in zip(network.parameters(), flat, strict=True):
            torch.testing.assert_close(got[s], own, rtol=1e-8, atol=1e-10)  # Adam divides by small numbers


def test_a_network_depends_on_its_own_seed_alone():
    many, one = (Network(ADDITION, 2, 4, 0, seeds) for seeds in ((3, 7, 1), (7,)))
    for stacked, alone in zip(many.parameters(), one.parameters(), strict=True):
        assert torch.equal(stacked[1:2], alone)
    assert not torch.equal(many.embed.weight[0], many.embed.weight[1])


def test_initial_weights():
    weights = {kind: Network(kind, 4, 50, 40, range(20)).weights() for kind in KINDS}
    for kind, gain in ((PLAIN, 1), (ADDITION, 1), (CONCATENATION, 1), (SCALED, 0.5)):
        for weight in weights[kind]:
            assert weight.std().item() == pytest.approx(gain * (2 / weight.shape[1]) ** 0.5, rel=0.03)
    assert all((weight == 0).all() for weight in weights[ZERO])


@pytest.mark.parametrize("kind", [PLAIN, ADDITION, CONCATENATION])
def test_removed_layers_are_gone(kind):
    network, digits = build(kind), toy_digits()
    with torch.no_grad():
        network.head.weight *= 20  # so that each layer has an effect
    images, labels = digits.test_images.flatten(1), digits.test_labels
    found = study.lesions(network, images, labels)
    quarters = study.quarters(DEPTH)
    assert all(len(quarter) == 1 for quarter in quarters)

    def run_without(removed, linears):
        logits = textbook(kind, linears, images, removed)[0]
        return F.cross_entropy(logits, labels).item(), (logits.argmax(dim=1) == labels).double().mean().item()

    for s in range(len(SEEDS)):
        run = functools.partial(run_without, linears=separate(network, s))
        loss, accuracy = run([])
        ones = [run([index]) for index in range(DEPTH)]
        effects = [max(0, without - loss) for without, _ in ones]
        expected = {
            "loss": loss,
            "accuracy": accuracy,
            "accuracy_without_one": sum(accuracy for _, accuracy in ones) / DEPTH,
            "accuracy_without_quarter": sum(run(quarter)[1] for quarter in quarters) / len(quarters),
            "effective_depth": sum(effects) ** 2 / sum(effect**2 for effect in effects),
        }
        assert {name: values[s] for name, values in found.items()} == pytest.approx(expected, rel=1e-10)


def test_a_quarter_is_a_quarter():
    quarters = study.quarters(16)
    assert all(len(set(quarter)) == 4 and set(quarter) <= set(range(16)) for quarter in quarters)
    assert len({tuple(quarter) for quarter in quarters}) == study.REMOVALS


@pytest.mark.parametrize(("kind", "factor"), [(PLAIN, 0.5), (ADDITION, 1.5)])
def test_gradients_of_a_linear_stack(kind, factor):
    """All values are positive and every layer is half the identity: a layer multiplies the gradient by 1/2, with a skip
    connection by 3/2. A weight's gradient is its input times its output's gradient, and the same in every layer."""
    network = Network(kind, DEPTH, WIDTH, 0, SEEDS, normalise=False).double()
    with torch.no_grad():
        network.embed.weight.abs_()
        for weight in network.weights():
            weight.copy_(0.5 * torch.eye(WIDTH))
    norms = study.gradient_norms(network, torch.rand(8, 64, dtype=torch.float64), torch.arange(8))
    expected = torch.tensor([math.log10(factor) * (DEPTH - 1 - layer) for layer in range(DEPTH)], dtype=torch.float64)
    for s in range(len(SEEDS)):
        torch.testing.assert_close(norms.states[:, s] - norms.states[-1, s], expected, **EXACT)
        torch.testing.assert_close(norms.weights[:, s] - norms.weights[-1, s], 0 * expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("kind", [ADDITION, SCALED])
def test_length_of_paths(kind, monkeypatch):
    """Against all 2⁵ sets of branches; 60 random sets of each length are close. Lengths 0 and 5 have one set each."""
    network, digits = build(kind), toy_digits()
    images, labels = digits.test_images.flatten(1), digits.test_labels

    def norm_through(linears, through):
        (embed, bias), *layers, (head, head_bias) = linears
        x = first = (images @ embed + bias).detach().requires_grad_()
        for index, (weight, bias) in enumerate(layers):
            f = normed(x).clamp(min=0) @ weight + bias
            x = x.detach() + f if index in through else x + f.detach()
        loss = F.cross_entropy(normed(x) @ head + head_bias, labels)
        return torch.autograd.grad(loss, first)[0].square().sum().sqrt().item()

    monkeypatch.setattr(study, "PATH_SETS", 60)
    found = study.path_length(network, images, labels)
    for s in range(len(SEEDS)):
        linears = separate(network, s)
        sets = [set(chosen) for length in range(DEPTH + 1) for chosen in itertools.combinations(range(DEPTH), length)]
        norms = [norm_through(linears, chosen) for chosen in sets]
        expected = sum(len(chosen) * norm for chosen, norm in zip(sets, norms, strict=True)) / sum(norms)
        assert found[s].item() == pytest.approx(expected, abs=0.05)
        for chosen in ({0, 3}, {1, 2, 4}):
            got = study._norm_through(network, images, labels, chosen)[s].item()
            assert got == pytest.approx(norm_through(linears, chosen), rel=1e-10)


def test_sets_of_branches():
    assert study.path_sets(7, 0) == [set()]
    assert sorted(min(chosen) for chosen in study.path_sets(7, 1)) == list(range(7))
    for length in (2, 3, 6, 7):
        sets = study.path_sets(7, length)
        assert len(sets) >= study.PATH_SETS
        assert all(len(chosen) == length and chosen <= set(range(7)) for chosen in sets)
        turn = sets[: 7 // length]
        assert len(set().union(*turn)) == length * len(turn), "disjoint"


def test_length_of_paths_in_closed_form():
    """Every branch halves its input, so that paths through k of n have weight C(n, k) / 2ᵏ: n/3 on the mean. For depth
    70 every second length is measured, which gives the same mean."""
    for depth in (DEPTH, 70):
        network = Network(ADDITION, depth, WIDTH, 0, SEEDS, normalise=False).double()
        with torch.no_grad():
            network.embed.weight.abs_()
            for weight in network.weights():
                weight.copy_(0.5 * torch.eye(WIDTH))
        found = study.path_length(network, torch.rand(8, 64, dtype=torch.float64), torch.arange(8))
        assert found.tolist() == pytest.approx([depth / 3] * len(SEEDS), rel=1e-6)


def test_participation():
    effects = torch.tensor([[1.0, 2, 0, 0], [1, 0, -1, 3], [1, 0, 0, 1], [1, -5, 0, 0]])
    torch.testing.assert_close(study.participation(effects), torch.tensor([4, 1, 0, 1.6], dtype=torch.float64))


def test_alikeness():
    state = torch.randn(2, 7, 5, dtype=torch.float64)
    state[1] = state[1, :1]  # all images have the state of one
    rows = F.normalize(normed(state[0]), dim=-1)
    cosines = [(rows[i] @ rows[j]).item() for i in range(7) for j in range(7) if i != j]
    assert study.alikeness(state).tolist() == pytest.approx([sum(cosines) / 42, 1.0], rel=1e-10)


@pytest.mark.parametrize("depth", [4, 8, 16, 32, 64])
def test_concatenation_has_about_as_many_parameters(depth):
    width, growth = concatenation_sizes(depth, 32)
    for kind, size in ((PLAIN, (32, 0)), (CONCATENATION, (width, growth))):
        network = Network(kind, depth, *size, seeds=(0,))
        assert sum(p.numel() for p in network.parameters()) == parameters(depth, *size)
    assert parameters(depth, width, growth) == pytest.approx(parameters(depth, 32), rel=0.02)
    assert 16 <= width <= 64


def measured(kind, depth, accuracy, without_one=(0.5, 0.6)):
    metrics = {f"{name}_gradient_ratio_0": [-3.0, -3.5] for name in ("weight", "state")}
    metrics |= {"alikeness_0": [0.9, 0.8], "accuracy": list(accuracy), "accuracy_without_one": list(without_one)}
    metrics |= {"accuracy_without_quarter": [0.3, 0.2], "effective_depth": [2.0, 3.0]}
    metrics["path_length"] = [1.5, 1.5] if KINDS[kind].adds else [math.nan] * 2
    gradients = Gradients(torch.zeros(depth, 2), torch.zeros(depth, 2))
    return Measured(kind, depth, 32, 0, 0.01, metrics, {0: gradients})


def test_findings_follow_from_the_numbers():
    said = findings(
        [
            measured(PLAIN, 4, (0.9, 0.91)),
            measured(ADDITION, 4, (0.9, 0.95)),
            measured(PLAIN, 8, (0.2, 0.21)),
            measured(ADDITION, 8, (0.95, 0.961)),
        ]
    )
    assert "plain: from depth 4 to 8 accuracy changes by -70.0 ± 0.0 points." in said
    assert "addition: from depth 4 to 8 accuracy changes by +3.0 ± 24.8 points, which may be chance." in said
    assert "Accuracy at depth 8, 'addition' less 'plain': +75.0 ± 0.6 points." in said
    assert any(s.startswith("plain, depth 4, trained: without one layer") for s in said), "depth 8 learned nothing"
    assert any(
        s.startswith("addition, depth 8, trained: without one layer") and "1.5 ± 0.0 branches." in s for s in said
    )
    assert any("10^(-3.2 ± 3.2) after 0 steps" in s and "0.850" in s for s in said)
    nothing = findings([measured(PLAIN, 4, (0.1, 0.12))])
    assert nothing[-1] == "plain: no accuracy reaches 50%, so what removing layers does says nothing."


def test_csv_has_a_row_for_each_seed():
    text = to_csv([measured(PLAIN, 4, (0.25, 0.5)), measured(ADDITION, 8, (0.75, 1))], Config(seeds=2), {"torch": "x"})
    rows = list(csv.DictReader(io.StringIO(text)))
    seen = [(row["torch"], row["kind"], row["depth"], row["seed"], row["accuracy"]) for row in rows]
    assert seen == [
        ("x", PLAIN, "4", "0", "0.25"),
        ("x", PLAIN, "4", "1", "0.5"),
        ("x", ADDITION, "8", "0", "0.75"),
        ("x", ADDITION, "8", "1", "1"),
    ]
    assert rows[0]["parameters"] == str(parameters(4, 32))


def test_rates():
    assert [Config().rate(PLAIN, depth) for depth in (2, 8, 100)] == [1e-2, 1e-2, 3e-4]
    assert Config().rate(ADDITION, 64) == study.SKIP_RATE
    assert dataclasses.replace(Config(), learning_rate=0.5).rate(PLAIN, 64) == 0.5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--seeds", "0"], "--seeds: must be in [1, 1000], got 0"),
        (["--depths", "4", "0"], "--depths: must be in [1, 1000], got 0"),
        (["--learning-rate", "-1"], "--learning-rate: must be in [1e-09, 10], got -1.0"),
        (["--kinds", "DenseNet"], "invalid choice: 'DenseNet'"),
        (["--out", "{file}/below"], "argument --out: can't write to {file}/below: Not a directory"),
    ],
)
def test_bad_options(options, message, tmp_path, capsys):
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(SystemExit) as stopped:
        skip_connections.main([option.format(file=file) for option in options])
    assert stopped.value.code == 2
    assert message.format(file=file) in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("extra", [[], ["--no-norm", "--seeds", "1", "--steps", "2", "--depths", "2", "3"]])
def test_quick(extra, tmp_path, capsys):
    """Budget: 15 seconds each."""
    assert skip_connections.main(["--quick", *extra, "--out", str(tmp_path)]) == 0
    names = {"gradients_weights", "gradients_states", "accuracy", "lesions", "effective_depth", "alikeness"}
    files = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    assert files.keys() == {f"{name}.png" for name in names} | {"results.csv"}
    rows = list(csv.DictReader(io.StringIO(files["results.csv"].decode())))
    seeds = 1 if extra else 3
    assert [row["kind"] for row in rows] == [kind for _ in range(2) for kind in KINDS for _ in range(seeds)]
    assert {row["depth"] for row in rows} == ({"2", "3"} if extra else {"4", "16"})
    measures = list(rows[0])[list(rows[0]).index("learning_rate") :]
    assert len(measures) == (13 if extra else 16)
    for row in rows:
        assert {name for name in measures if not row[name]} == (set() if KINDS[row["kind"]].adds else {"path_length"})
        assert all(math.isfinite(float(row[name])) for name in measures if row[name])
    printed = capsys.readouterr().out
    assert "Before training" in printed
    assert "After training" in printed
    if not extra:
        accuracy = {(r["kind"], r["depth"], r["seed"]): float(r["accuracy"]) for r in rows}
        assert all(accuracy[ADDITION, "16", s] > accuracy[PLAIN, "16", s] > 0.2 for s in "012")
