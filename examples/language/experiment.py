"""All trainings of a run, seed by seed and method by method. A run that continues from a checkpoint gives the same
bits."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from examples.digits.experiment import Stopped, StopSignals
from examples.digits.storage import Folder
from examples.language.data import Text
from examples.language.training import Config, Training
from rdp_kernels.estimate import ModelCost

BEST = "best.pt"  # weights of the training with the lowest final validation loss


@dataclass
class Experiment:
    """`run` does the trainings that are missing in `finished`.

    Args:
        options: the command's options, saved in every checkpoint.
        save_every: seconds between checkpoints.
        advance: called with the progress of a training, and a text about it.
    """

    config: Config
    text: Text
    folder: Folder
    options: dict[str, Any]
    signals: StopSignals
    advance: Callable[..., None] = lambda **_: None
    save_every: float = 60.0
    finished: list[dict[str, Any]] = field(default_factory=list)
    """Results, in the order of `trainings`."""
    current: dict[str, Any] | None = None

    @property
    def trainings(self) -> list[tuple[int, str]]:
        """(seed, method) pairs, seed by seed, so that the finished trainings of a stopped run can be compared."""
        return [(seed, method) for seed in range(self.config.seeds) for method in self.config.method]

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.finished, self.current = state["finished"], state["current"]

    def run(self) -> None:
        """Runs the missing trainings. On a signal it saves the state and raises `Stopped`."""
        self._save()
        for seed, method in self.trainings[len(self.finished) :]:
            self.finished.append(self._train(self.begin(seed, method)))
            self.current = None
            self._save()
            self._check_signals()

    def begin(self, seed: int, method: str) -> Training:
        weights = self.config.build_model(seed).to(self.text.train.device)
        inputs, _ = self.text.batch(seed, 0, self.config.batch_size, self.config.context)
        training = Training(method, weights, ModelCost.of(weights, inputs), self.text, self.config, seed)
        if self.current is not None:
            training.load_state_dict(self.current)
        return training

    def _train(self, training: Training) -> dict[str, Any]:
        name = f"seed {training.seed}, {training.method}"
        self.advance(advance=training.step_count / training.steps, description=name)
        while training.step_count < training.steps:
            training.step()
            said = f"{name}: {training.curve[-1]['validation_loss']:.3f} bits/byte" if training.curve else name
            self.advance(advance=1 / training.steps, description=said)
            if self.signals.received is not None or time.monotonic() - self._saved > self.save_every:
                self.current = training.state_dict()
                self._save()
                self._check_signals()
        result = training.result()
        if all(final_loss(result) < final_loss(before) for before in self.finished):
            best = {"model": training.model.state_dict(), "method": training.method, "seed": training.seed}
            self.folder.save_checkpoint(best, BEST)
        return result

    def _save(self) -> None:
        state = {"options": self.options, "text": self.text.sha256, "finished": self.finished, "current": self.current}
        self.folder.save_checkpoint(state)
        self._saved = time.monotonic()

    def _check_signals(self) -> None:
        if self.signals.received is not None:
            raise Stopped(self.signals.received)


def is_finished(state: dict[str, Any]) -> bool:
    """Returns whether the run of a checkpoint is finished."""
    return len(state["finished"]) == state["options"]["seeds"] * len(state["options"]["method"])


def final_loss(result: dict[str, Any]) -> float:
    return result["curve"][-1]["validation_loss"]
