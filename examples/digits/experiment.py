"""All trainings of a run, seed by seed. A run that continues from a checkpoint gives the same bits."""

from __future__ import annotations

import math
import signal
from collections.abc import Callable
from dataclasses import asdict, dataclass
from types import FrameType
from typing import Any, Protocol

import torch
from torch.utils.flop_counter import FlopCounterMode

from examples.digits.analysis import accuracy_without, layer_similarity, removal_counts, weights_sha256
from examples.digits.data import Digits
from examples.digits.training import Config, Training
from examples.methods import METHODS
from rdp_kernels.estimate import ModelCost

EVALUATIONS = 10  # per training; a checkpoint is written at each
COUNTED_STEPS = 24  # steps of the first seed, repeated under torch's FLOP counter


class Stopped(Exception):
    """The run was asked to stop, and its checkpoint is written."""

    def __init__(self, number: int):
        super().__init__(number)
        self.number = number


class StopSignals:
    """Within the `with` block the first SIGINT or SIGTERM is remembered, and a second one acts at once."""

    def __enter__(self) -> StopSignals:
        self.received: int | None = None
        self._before = {number: signal.signal(number, self._receive) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        for each in self._before:
            signal.signal(each, signal.SIG_DFL)


class Display(Protocol):
    """Shows the progress of a run."""

    def begin(self, seed: int, steps_done: int) -> None: ...
    def counting(self, method: str) -> None: ...
    def stepped(self, method: str, training: Training) -> None: ...
    def analysing(self, method: str) -> None: ...


@dataclass
class Experiment:
    """`run` does the trainings that are missing in `finished`. `save` gets the whole state at each checkpoint."""

    config: Config
    digits: Digits
    save: Callable[[dict[str, Any]], None]
    signals: StopSignals

    def __post_init__(self) -> None:
        self.finished: list[dict[str, Any]] = []
        """For each seed, the result of every method."""
        self._current: dict[str, Any] | None = None

    @property
    def steps(self) -> int:
        return max(1, round(self.config.epochs * self.digits.batches_per_epoch))

    @property
    def _counted_steps(self) -> int:
        return min(COUNTED_STEPS, self.steps)

    def state_dict(self) -> dict[str, Any]:
        return {"config": asdict(self.config), "finished": self.finished, "current": self._current}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.finished, self._current = state["finished"], state["current"]

    @property
    def complete(self) -> bool:
        return len(self.finished) == self.config.seeds

    def run(self, display: Display) -> None:
        """Runs the missing trainings. On a signal it saves the state and raises `Stopped`."""
        self.display = display
        self.save(self.state_dict())
        while not self.complete:
            self.finished.append(self._run_seed(len(self.finished)))
            self._current = None
            self.save(self.state_dict())

    def _run_seed(self, seed: int) -> dict[str, Any]:
        """Trains all methods in turn, step by step, so that disturbances of the machine affect all of them alike."""
        weights = self.config.build_model(seed).to(self.digits.train_images.device)
        cost = ModelCost.of(weights, self.digits.batch(seed, 0)[0])

        def begin(method: str) -> Training:
            return Training(method, weights, cost, self.digits, self.config, seed, self.steps)

        if self._current is None:
            self.display.begin(seed, 0)
            counted = {method: self._count_flops(method, begin, seed) for method in METHODS} if seed == 0 else {}
            torch.manual_seed(seed)  # for drop-path's draws, here and in _count_flops
            self._current = {"counted": counted, "step": 0, "rng": torch.get_rng_state(), "trainings": {}}
            trainings = {method: begin(method) for method in METHODS}
        else:
            trainings = {method: begin(method) for method in METHODS}
            for method, training in trainings.items():
                training.load_state_dict(self._current["trainings"][method])
            torch.set_rng_state(self._current["rng"].cpu())
            self.display.begin(seed, self._current["step"])

        interval = math.ceil(self.steps / EVALUATIONS)
        for step in range(self._current["step"] + 1, self.steps + 1):
            evaluating = step % interval == 0 or step == self.steps
            for method, training in trainings.items():
                training.step()
                if evaluating:
                    training.evaluate(interval)
                self.display.stepped(method, training)
            if evaluating or self.signals.received is not None:
                self._current |= {"step": step, "rng": torch.get_rng_state()}
                self._current["trainings"] = {method: training.state_dict() for method, training in trainings.items()}
                self.save(self.state_dict())
            self._check_signals()
        return {method: self._result(method, training) for method, training in trainings.items()}

    def _count_flops(self, method: str, begin: Callable[[str], Training], seed: int) -> float:
        """Returns the mean FLOPs of the first steps, repeated untimed with the same weights, batches and draws."""
        self._check_signals()
        self.display.counting(method)
        torch.manual_seed(seed)
        training = begin(method)
        with FlopCounterMode(display=False) as counter:
            for _ in range(self._counted_steps):
                training.step()
        return counter.get_total_flops() / self._counted_steps

    def _result(self, method: str, training: Training) -> dict[str, Any]:
        assert self._current is not None
        self._check_signals()
        self.display.analysing(method)
        model, record = training.model, training.record
        removed = {count: accuracy_without(model, self.digits, count) for count in removal_counts(len(model.paths))}
        return {
            **asdict(record),
            "counted": self._current["counted"].get(method),
            "counted_steps": self._counted_steps,
            "removed": removed,
            "similarity": layer_similarity(model, self.digits.test_images),
            "weights_sha256": weights_sha256(model),
        }

    def _check_signals(self) -> None:
        if self.signals.received is not None:
            raise Stopped(self.signals.received)
