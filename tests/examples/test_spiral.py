"""Networks trained together equal each network trained alone, as a textbook would."""

import csv
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from examples import spiral
from examples.methods import DROP_PATH, DROP_THEN_FULL, EXACT, FROZEN, PLAIN, RANDOM
from examples.spirals.data import Points
from examples.spirals.measure import accuracy_without, logits, removals, similarity
from examples.spirals.study import BASE, needed_ratio, run_case, study, updates
from examples.spirals.training import FREEZE, KEPT, METHODS, Setting, Training
from rdp_kernels.diagnostics import linear_cka

SMALL = Setting(depth=5, width=4, points=12, noise=0.1, drop_prob=0.4, learning_rate=0.02, steps=12)


class Textbook:
    """One network of a `Training`, in plain torch with its own optimizer; frozen parameters have no gradients."""

    def __init__(self, training: Training, network: int):
        self.training, self.points = training, training.points
        self.x, self.labels = training.points.x[network], training.points.labels[network]
        self.layers = []
        model = training.model
        for stacked in (model.stem, *(linear for path in model.paths for linear in path.fn.linears), model.head):
            layer = torch.nn.Linear(*stacked.weight.shape[:0:-1], dtype=stacked.weight.dtype)
            with torch.no_grad():
                layer.weight.copy_(stacked.weight[network])
                layer.bias.copy_(stacked.bias[network])
            self.layers.append(layer)
        self.stem, *self.inner, self.head = self.layers
        parameters = [p for layer in self.layers for p in layer.parameters()]
        self.optimizer = torch.optim.Adam(parameters, training.setting.learning_rate)

    def branches(self):
        size = self.training.setting.layers
        return [self.inner[i : i + size] for i in range(0, len(self.inner), size)]

    def forward(self, factor=None, frozen=None, bypass=False):
        """`factor`, `frozen`: `[paths, 1 or points]`; frozen pairs use weights that get no gradient."""
        x = self.stem(self.x)
        for index, branch in enumerate(self.branches()):
            update = self.run(branch, x)
            if frozen is not None:
                constant = self.run(branch, x.detach() if bypass else x, detached=True)
                constant = constant.detach() if bypass else constant
                update = torch.where(frozen[index][:, None], constant, update)
            x = x + (
                update
                if factor is None
                else torch.where(factor[index][:, None] > 0, update * factor[index][:, None], 0)
            )
        return self.head(x)

    @staticmethod
    def run(branch, x, detached=False):
        for number, layer in enumerate(branch):
            weight, bias = (p.detach() if detached else p for p in (layer.weight, layer.bias))
            x = F.linear(x, weight, bias)
            x = x.relu() if number == 0 else x
        return x

    def step(self, learning_rate, **plan):
        self.optimizer.param_groups[0]["lr"] = learning_rate
        self.optimizer.zero_grad(set_to_none=True)
        rest = plan.pop("rest", True)
        learns = plan.pop("learns", None)
        F.cross_entropy(self.forward(**plan), self.labels).backward()
        for index, branch in enumerate(self.branches()):
            for layer in branch if learns is not None and not learns[index] else ():
                layer.weight.grad = layer.bias.grad = None
        for layer in () if rest else (self.stem, self.head):
            layer.weight.grad = layer.bias.grad = None
        self.optimizer.step()


def trained(method, setting, seeds=(0, 1, 5), steps=6):
    """A training in float64, and textbooks of its networks that took the same steps."""
    torch.set_default_dtype(torch.float64)
    try:
        training = Training(method, setting, list(seeds), setting.steps)
        spy = Training(method, setting, list(seeds), setting.steps)  # it draws the same plans
        books = [Textbook(training, network) for network in range(len(seeds))]
        scale = 1 / (1 - setting.drop_prob) if setting.scale_by_keep else 1.0
        keep = None
        for step in range(steps):
            rate = setting.learning_rate * 0.5 * (1 + math.cos(math.pi * step / setting.steps))
            reuse = training._scheme is not None and training._scheme.reuse_pending
            if method != PLAIN and not reuse:
                keep = spy.draw()
                second = spy.second_plan(keep)
            training.step()
            for network, book in enumerate(books):
                if method == PLAIN:
                    book.step(rate)
                elif not reuse:
                    mine = keep[:, network]
                    book.step(rate, factor=mine.double() * scale, learns=mine.any(dim=1))
                elif (~second[:, network]).any():
                    mine, freeze = second[:, network], FREEZE[method]
                    if freeze == "none":
                        book.step(rate)
                    else:
                        book.step(
                            rate,
                            frozen=mine,
                            bypass=freeze == "branch",
                            learns=(~mine).any(dim=1),
                            rest=setting.train_rest,
                        )
        return training, books
    finally:
        torch.set_default_dtype(torch.float32)


SETTINGS = [
    *((method, SMALL) for method in METHODS),
    (EXACT, replace(SMALL, layers=2, train_rest=True)),
    (EXACT, replace(SMALL, scale_by_keep=False, drop_prob=0.1)),  # often nothing is dropped
    (EXACT, replace(SMALL, mode="sample")),
    (FROZEN, replace(SMALL, mode="sample")),
    (RANDOM, replace(SMALL, mode="sample", layers=2)),
]


@pytest.mark.parametrize(("method", "setting"), SETTINGS, ids=lambda v: v if isinstance(v, str) else v.mode)
def test_every_network_is_trained_as_by_itself(method, setting):
    training, books = trained(method, setting)
    model = training.model
    stacked = (model.stem, *(linear for path in model.paths for linear in path.fn.linears), model.head)
    for network, book in enumerate(books):
        for mine, textbook in zip(stacked, book.layers, strict=True):
            torch.testing.assert_close(mine.weight[network], textbook.weight.detach(), rtol=0, atol=1e-10)
            torch.testing.assert_close(mine.bias[network], textbook.bias.detach(), rtol=0, atol=1e-10)


@pytest.mark.parametrize("method", [EXACT, RANDOM])
def test_a_network_does_not_depend_on_the_other_seeds(method):
    alone, among = (Training(method, SMALL, seeds, 12) for seeds in ([7], [3, 7, 9]))
    for training in (alone, among):
        for _ in range(6):
            training.step()
    for a, b in zip(alone.model.parameters(), among.model.parameters(), strict=True):
        torch.testing.assert_close(a[0], b[1], rtol=0, atol=1e-5)


def test_controls_differ_from_the_scheme_in_what_learns_alone():
    training = {method: Training(method, replace(SMALL, depth=40), [0, 1], 4) for method in (EXACT, RANDOM, KEPT)}
    keeps = {method: t.draw() for method, t in training.items()}
    assert torch.equal(keeps[EXACT], keeps[RANDOM])
    assert torch.equal(keeps[EXACT], keeps[KEPT])
    keep = keeps[EXACT]
    assert torch.equal(training[EXACT].second_plan(keep), keep)
    assert torch.equal(training[KEPT].second_plan(keep), ~keep)
    other = training[RANDOM].second_plan(keep)
    assert torch.equal(other.sum(dim=0), keep.sum(dim=0))  # equally many for each network
    assert not torch.equal(other, keep)


def test_needed_flops_are_those_of_the_plans():
    setting = replace(BASE, depth=6, width=64, drop_prob=0.3, points=8)
    assert needed_ratio(PLAIN, setting) == 1
    assert needed_ratio(DROP_PATH, setting) == pytest.approx(0.7, abs=0.02)
    # Drop iterations cost 3 (1 − p) a path. The full iteration doesn't run where nothing is dropped.
    happens = 1 - 0.7**6
    assert needed_ratio(DROP_THEN_FULL, setting) == pytest.approx((0.7 + happens) / (1 + happens), abs=0.02)
    ratios = [needed_ratio(method, setting) for method in (FROZEN, EXACT, DROP_THEN_FULL)]
    assert ratios == sorted(ratios)


def test_measures_equal_a_direct_computation():
    model = Training(PLAIN, SMALL, [0, 3], 1).model
    test = Points.draw([0, 3], 50, 0.1, "test points")
    found, similar = accuracy_without(model, test.x, test.labels, 2), similarity(model, test.x)
    for network, seed in enumerate((0, 3)):
        book = Textbook(Training(PLAIN, SMALL, [0, 3], 1), network)
        book.x = test.x[network]
        right = []
        for removed in removals(5, 2):
            keep = torch.tensor([[0.0 if index in removed else 1.0] for index in range(5)])
            right.append((book.forward(factor=keep).argmax(dim=1) == test.labels[network]).double().mean())
        assert found[network].item() == pytest.approx(torch.stack(right).mean().item(), abs=1e-12), seed
        first, last = book.stem(book.x), None
        last = first
        for branch in book.branches():
            last = last + book.run(branch, last)
        assert similar[network, 0, -1].item() == pytest.approx(linear_cka(first, last).item(), abs=1e-5)
        torch.testing.assert_close(logits(model, test.x)[network], book.head(last))


def test_removals_are_distinct_and_the_same_for_all():
    assert removals(5, 1) == [(i,) for i in range(5)]
    assert removals(32, 8) == removals(32, 8)
    assert all(len(set(removed)) == 8 for removed in removals(32, 8))


@pytest.mark.parametrize("method", [m for m in METHODS if m != PLAIN])
def test_updates_are_those_of_the_plans(method):
    setting = replace(BASE, depth=40, width=2, drop_prob=0.3, points=4)
    training = Training(method, setting, list(range(6)), 8)
    learned = torch.zeros(40, 6)
    for _ in range(8):
        before = [path.fn.linears[0].bias.detach().clone() for path in training.model.paths]
        states = {p: count.clone() for p, (_, _, count) in training.optimizer._states.items()}
        training.step()
        for index, path in enumerate(training.model.paths):
            bias = path.fn.linears[0].bias
            learned[index] += training.optimizer._states[bias][2] - states[bias]
            assert (learned[index] > 0).logical_or((bias == before[index]).all(dim=1)).all()
    assert learned.mean().item() / 8 == pytest.approx(updates(method, 0.3), abs=0.06)


def test_study_names_are_settings():
    by_name = {}
    for case in study():
        by_name.setdefault(case.study, set()).add(case.setting)
    assert all(len(settings) == 1 for settings in by_name.values())


def rows_of(folder):
    rows = csv.DictReader((folder / "results.csv").read_text().splitlines())
    return [{name: value for name, value in row.items() if name != "date"} for row in rows]


QUICK = ["--quick", "--seeds", "2", "--workers", "1", "--study", "--only", "schedule: linear"]


def test_a_study_is_resumed_where_it_was_cut_off(tmp_path, capsys, monkeypatch):
    """Nothing is run twice."""
    ran = []

    def run_here(cases, seeds, workers, watch):
        ran.extend(case.method for case in cases)
        return ((case, run_case(case, seeds, lambda _: None)) for case in cases)

    monkeypatch.setattr(spiral, "run_all", run_here)
    options, file = [*QUICK, "--out", str(tmp_path)], tmp_path / "results.csv"
    assert spiral.main(options) == 0
    rows, first = rows_of(tmp_path), file.read_text()
    each = [(method, seed) for method in (DROP_PATH, EXACT, RANDOM) for seed in "01"]
    assert [(row["method"], row["seed"]) for row in rows] == each
    with pytest.raises(SystemExit):
        spiral.main(options)
    assert "holds results" in capsys.readouterr().err
    assert file.read_text() == first
    file.write_text("".join(line for line in first.splitlines(keepends=True) if RANDOM not in line))
    ran.clear()
    assert spiral.main([*options, "--resume"]) == 0
    assert ran == [RANDOM]
    assert rows_of(tmp_path) == rows


@pytest.mark.slow
def test_workers_give_what_this_process_does(tmp_path):
    """Budget: 10 seconds."""
    assert spiral.main([*QUICK, "--out", str(tmp_path)]) == 0
    rows = rows_of(tmp_path)
    assert len(rows) == 6
    for case in (case for case in study(replace(BASE, **spiral.QUICK)) if case.study == QUICK[-1]):
        here, _ = run_case(case, [0, 1], lambda _: None)
        there = [row for row in rows if row["method"] == case.method]
        for mine, found in zip(here, there, strict=True):
            assert {name: found[name] for name in mine} == spiral._as_text(mine)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--drop-prob", "1.5"], "--drop-prob: must be in [0, 1], got 1.5"),
        (["--seeds", "0"], "--seeds: must be at least 1, got 0"),
        (["--only", "base"], "--only: needs --study"),
        (["--study", "--only", "nothing"], "no setting is called 'nothing'; there are: base, "),
    ],
)
def test_bad_options(options, said, capsys):
    with pytest.raises(SystemExit):
        spiral.main(options)
    assert said in capsys.readouterr().err
