"""The data of the figures: the first seed's trained network, and the mean similarity over all networks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from examples.spirals.data import Points
from examples.spirals.measure import logits, streams
from examples.spirals.training import Training

LOOKS = 50  # looks per training
SHOWN_POINTS = 250
GRID = 120  # cells along a side of the map of decisions
EDGE = 1.25  # the map reaches from −EDGE to EDGE


class History:
    """The distance of the classes in each feature of each layer during a training.

    It is the distance of the classes' means, in standard deviations of the feature over all training points.
    """

    def __init__(self, training: Training):
        self._training, self._every = training, max(1, training.steps // LOOKS)
        self.steps: list[int] = []
        self.distances: list[Tensor] = []
        """For each look, `[paths + 1, width]`."""

    @torch.no_grad()
    def look(self, step: int) -> None:
        """Records the distances if a look is due at `step`."""
        if step % self._every and step != self._training.steps:
            return
        points = self._training.points
        states = torch.stack(streams(self._training.model, points.x))[:, 0]
        first = points.labels[0] == 0
        apart = states[:, first].mean(dim=1) - states[:, ~first].mean(dim=1)
        self.steps.append(step)
        self.distances.append(apart.abs() / states.std(dim=1).clamp_min(1e-6))


@dataclass(frozen=True)
class Portrait:
    """The data that is drawn for one method on one setting.

    Args:
        points, labels: the first network's training set.
        probability: probability of class 1 over the plane, `[GRID, GRID]`, from −EDGE to EDGE, rows along y.
        states: states of the residual, `[paths + 1, SHOWN_POINTS, width]`, for test points with `state_labels`.
        similarity: linear CKA of the states, mean over the networks.
        steps, distances: see `History`; `[looks, paths + 1, width]`.
    """

    points: Tensor
    labels: Tensor
    probability: Tensor
    states: Tensor
    state_labels: Tensor
    similarity: Tensor
    steps: list[int]
    distances: Tensor

    @classmethod
    def of(cls, training: Training, test: Points, similarity: Tensor, history: History) -> Portrait:
        model, line = training.model, torch.linspace(-EDGE, EDGE, GRID)
        y, x = torch.meshgrid(line, line, indexing="ij")
        plane = torch.stack([x, y], dim=-1).view(1, -1, 2).expand(model.networks, -1, -1)
        return cls(
            points=training.points.x[0],
            labels=training.points.labels[0],
            probability=logits(model, plane)[0].softmax(dim=-1)[:, 1].view(GRID, GRID),
            states=torch.stack(streams(model, test.x[:, :SHOWN_POINTS]))[:, 0],
            state_labels=test.labels[0, :SHOWN_POINTS],
            similarity=similarity.mean(dim=0),
            steps=history.steps,
            distances=torch.stack(history.distances),
        )
