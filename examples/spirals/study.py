"""The compared settings, and running them: a process for each method on a setting, with all seeds at once."""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from examples.methods import DROP_PATH, DROP_THEN_FULL, EXACT, FROZEN, PLAIN, RANDOM
from examples.spirals.data import TEST_POINTS, Points
from examples.spirals.measure import accuracy, accuracy_without, logits, loss, similarity
from examples.spirals.portrait import History, Portrait
from examples.spirals.training import FREEZE, KEPT, Setting, Training
from rdp_kernels.diagnostics import heatmap_rebound
from rdp_kernels.estimate import ModelCost

COST_SEEDS, COST_DRAWS = 32, 16  # costs are averaged over these
SIMILARITY_POINTS = 250


@dataclass(frozen=True)
class Case:
    """A method on a setting. `study` names the setting."""

    study: str
    method: str
    setting: Setting

    @property
    def label(self) -> str:
        return f"{self.study}: {self.method}"


BASE = Setting()
MAIN = (PLAIN, DROP_PATH, EXACT, DROP_THEN_FULL, RANDOM)
PAIR = (DROP_PATH, EXACT, RANDOM)


def study(base: Setting = BASE) -> list[Case]:
    """Returns the cases of the study. The name of a setting says how it differs from `base`. Settings with another
    size, data or length of training have all methods. If only the scheme differs, plain training is that of the
    base."""

    def cases(name: str, methods: Sequence[str], **changed: Any) -> list[Case]:
        return [Case(name, method, replace(base, **changed)) for method in methods]

    small = min(base.depth, 6)
    return [
        *cases("base", (*MAIN, FROZEN, KEPT)),
        *cases("equal FLOPs", (DROP_PATH, EXACT, DROP_THEN_FULL, RANDOM, FROZEN), equal="flops"),
        *cases("equal updates", (DROP_PATH, EXACT, RANDOM), equal="updates"),
        *cases("p = 0.1", PAIR, drop_prob=0.1),
        *cases("p = 0.5", (*PAIR, KEPT), drop_prob=0.5),
        *cases("p = 0.5, three times the steps", (EXACT, RANDOM), drop_prob=0.5, steps=3 * base.steps),
        *cases("mode: each point", PAIR, mode="sample"),
        *cases("schedule: linear", PAIR, schedule="linear"),
        *cases("kept branches not scaled", (DROP_PATH, EXACT, RANDOM), scale_by_keep=False),
        *cases("stem and head learn in both", (EXACT, RANDOM), train_rest=True),
        *cases(f"depth {small}, width {small}", MAIN, depth=small, width=small),
        *cases("depth 12", MAIN, depth=12),
        *cases("two-layer branches", MAIN, layers=2),
        *cases("a quarter of the points", MAIN, points=base.points // 4),
        *cases("three times the noise", MAIN, noise=3 * base.noise),
        *cases("three times the steps", MAIN, steps=3 * base.steps),
    ]


def demonstration(base: Setting = BASE) -> list[Case]:
    """Returns the cases of the four figures: `base`, and networks of the paper's other size."""
    small = replace(base, depth=min(base.depth, 6), width=min(base.width, 6))
    return [Case(f"depth {s.depth}, width {s.width}", method, s) for s in (base, small) for method in MAIN]


def needed_ratio(method: str, setting: Setting) -> float:
    """Returns the needed FLOPs of an optimizer step of `method` relative to plain training's, as a mean over drawn
    pairs."""
    if method == PLAIN:
        return 1.0
    cost = _cost(replace(setting, mode="block"))  # in both modes the cost of a path depends on the share that keeps it
    training = Training(method, setting, list(range(COST_SEEDS)), steps=1)
    drawn = [training.draw() for _ in range(COST_DRAWS)]
    keep, other = torch.cat(drawn, dim=1), torch.cat([training.second_plan(keep) for keep in drawn], dim=1)
    kept, learns_not, plain = keep.double().mean(dim=2).T, other.double().mean(dim=2).T, cost.plain()
    drop = cost.flops(cost.drop_shares(kept)).mean().item()
    if method == DROP_PATH:
        return drop / plain
    reuse = cost.flops(cost.reuse_shares(learns_not, FREEZE[method], setting.train_rest))
    happens = (~keep).flatten(2).any(dim=2).any(dim=0).double()  # without dropped paths there is no reuse iteration
    return (drop + (reuse * happens).mean().item()) / (1 + happens.mean().item()) / plain


@functools.cache
def _cost(setting: Setting) -> ModelCost:
    """Returns the cost of one network."""
    training = Training(PLAIN, setting, [0], steps=1)
    return ModelCost.of(training.model, training.points.x)


def updates(method: str, drop_prob: float) -> float:
    """Returns the mean number of times that a path learns per optimizer step, if a second iteration follows every drop
    iteration."""
    if method in (DROP_PATH, KEPT):
        return 1 - drop_prob
    return {PLAIN: 1.0, DROP_THEN_FULL: 1 - drop_prob / 2}.get(method, 0.5)


def steps_of(case: Case, ratio: float) -> int:
    """Returns the number of steps of a case. `ratio` is the FLOPs of its step relative to plain's."""
    setting = case.setting
    of_plain = {"steps": 1.0, "flops": ratio, "updates": updates(case.method, setting.drop_prob)}[setting.equal]
    return round(setting.steps / of_plain)


Done = tuple[list[dict[str, Any]], Portrait]


def run_case(case: Case, seeds: list[int], stepped: Callable[[float], None]) -> Done:
    """Returns a row for each seed, and the data of the figures. `stepped` is called with the share that is done."""
    setting, ratio = case.setting, needed_ratio(case.method, case.setting)
    training = Training(case.method, setting, seeds, steps_of(case, ratio))
    history = History(training)
    for step in range(training.steps):
        history.look(step)
        training.step()
        stepped((step + 1) / training.steps)
    history.look(training.steps)
    test = Points.draw(seeds, TEST_POINTS, setting.noise, "test points")
    answers, quarter = logits(training.model, test.x), max(1, setting.depth // 4)
    cka = similarity(training.model, test.x[:, :SIMILARITY_POINTS])
    measured = {
        "train_loss": torch.stack(training.losses[-2:]).mean(dim=0),  # mean over a pair of iterations
        "test_loss": loss(answers, test.labels),
        "accuracy": accuracy(answers, test.labels),
        "accuracy_without_1": accuracy_without(training.model, test.x, test.labels, 1),
        "accuracy_without_quarter": accuracy_without(training.model, test.x, test.labels, quarter),
        "rebound": heatmap_rebound(cka),
        "similarity_ends": cka[:, 0, -1],
    }
    shared = {"study": case.study, **asdict(setting), "method": case.method, "steps_taken": training.steps}
    shared |= {"needed_ratio": ratio, "quarter": quarter}
    rows = [
        {**shared, "seed": seed, **{name: values[row].item() for name, values in measured.items()}}
        for row, seed in enumerate(seeds)
    ]
    return rows, Portrait.of(training, test, cka, history)


def run_all(
    cases: Sequence[Case], seeds: list[int], workers: int, watch: Callable[[list[float]], None]
) -> Iterator[tuple[Case, Done]]:
    """Yields each case with its results when it is done. `watch` is regularly called with the share of each case that
    is done."""
    context = multiprocessing.get_context("spawn")
    shares = context.Array("d", len(cases))
    with ProcessPoolExecutor(workers, context, initializer=_begin_worker, initargs=(shares,)) as pool:
        pending = {pool.submit(_run_in_worker, number, case, seeds): case for number, case in enumerate(cases)}
        try:
            while pending:
                done = [future for future in pending if future.done()]
                watch(list(shares))
                for future in done:
                    yield pending.pop(future), future.result()
                if not done:
                    _wait(pending)
        finally:
            pool.shutdown(cancel_futures=True)


def _wait(pending: Any) -> None:
    with contextlib.suppress(TimeoutError):
        next(as_completed(pending, timeout=0.5))


_shares: Any = None


def _begin_worker(shares: Any) -> None:
    global _shares
    _shares = shares
    torch.set_num_threads(1)


def _run_in_worker(number: int, case: Case, seeds: list[int]) -> Done:
    def stepped(share: float) -> None:
        _shares[number] = share

    return run_case(case, seeds, stepped)
