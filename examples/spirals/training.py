"""One method on one setting, for all seeds at once."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rdp_kernels as rdp
from examples.digits.seeds import seed_of
from examples.methods import DROP_PATH, DROP_THEN_FULL, EXACT, FROZEN, PLAIN, RANDOM, nothing_runs
from examples.spirals.adam import StackedAdam
from examples.spirals.data import Points
from examples.spirals.networks import SpiralNetworks

KEPT = "kept paths learn again"
METHODS = {
    PLAIN: "every path runs and learns",
    DROP_PATH: "every step drops random paths; ordinary stochastic depth",
    EXACT: "drop iteration, then a reuse iteration in which only the dropped paths learn",
    FROZEN: 'the same with freeze="branch": frozen branches are detached',
    DROP_THEN_FULL: 'control, freeze="none": in the second iteration everything learns',
    RANDOM: "control: in the second iteration as many paths learn, but random ones",
    KEPT: "control: in the second iteration the kept paths learn, and the dropped ones are frozen",
}
FREEZE = {EXACT: "parameters", FROZEN: "branch", DROP_THEN_FULL: "none", RANDOM: "parameters", KEPT: "parameters"}


@dataclass(frozen=True)
class Setting:
    """All that the results depend on, except the method and the seeds.

    Args:
        depth, width, layers: number of paths, width of the residual, and layers of each branch.
        points, noise: size and noise of the training set. The test set has the same noise.
        mode: "block": a network drops a path for all its points; "sample": for each point.
        schedule, scale_by_keep, train_rest: see `rdp.ResidualDropPath`.
        steps: optimizer steps of plain training.
        equal: quantity that is equal for all methods: "steps"; "flops" (as many steps as plain's FLOPs allow);
            "updates" (every path learns equally often in the mean).
    """

    depth: int = 32
    width: int = 32
    layers: int = 1
    points: int = 400
    noise: float = 0.05
    drop_prob: float = 0.2
    mode: str = "block"
    schedule: str = "constant"
    scale_by_keep: bool = True
    train_rest: bool = False
    learning_rate: float = 5e-3
    steps: int = 1000
    equal: str = "steps"


class Training:
    """A training of all seeds. Row s of every tensor is the network of `seeds[s]`, and is independent of other
    seeds."""

    def __init__(self, method: str, setting: Setting, seeds: list[int], steps: int):
        per_point = setting.mode == "sample"
        self.method, self.setting, self.seeds, self.steps = method, setting, seeds, steps
        self.model = SpiralNetworks(seeds, setting.depth, setting.width, setting.layers, per_point)
        self.points = Points.draw(seeds, setting.points, setting.noise, "training points")
        self.optimizer = StackedAdam(self.model.parameters())
        self.steps_done = 0
        self.losses: list[Tensor] = []
        """For each step, `[seeds]`."""
        self._scheme = None
        if method != PLAIN:
            self._scheme = rdp.ResidualDropPath(
                self.model,
                setting.drop_prob,
                schedule=setting.schedule,
                mode="sample",
                freeze=FREEZE.get(method, "parameters"),
                scale_by_keep=setting.scale_by_keep,
                train_rest=setting.train_rest,
            )
            self._generators = [torch.Generator().manual_seed(seed_of(seed, "plans")) for seed in seeds]
            self._others = [torch.Generator().manual_seed(seed_of(seed, "control")) for seed in seeds]

    def step(self) -> None:
        """Takes one optimizer step."""
        scheme = self._scheme
        if scheme is None:
            self._learn(None)
        elif scheme.reuse_pending:
            with scheme.reuse_iteration():
                self._learn(scheme)
        else:
            keep = self.draw()
            with scheme.drop_iteration(plan=self._plan(keep)):
                self._learn(scheme)
            if self.method == DROP_PATH:
                scheme.reset()
            elif self.method in (RANDOM, KEPT):
                with nothing_runs(), scheme.drop_iteration(plan=self._plan(self.second_plan(keep))):
                    pass  # replaces the last plan; reuse trains its complement

    def draw(self) -> Tensor:
        """Draws the kept paths of a drop iteration, bool `[paths, networks, 1 or points]`. Each network has its own
        generator."""
        assert self._scheme is not None
        probs = torch.tensor([path.drop_prob for path in self._scheme.paths])[:, None]
        shape = (len(probs), self.setting.points if self.model.per_point else 1)
        return torch.stack([torch.rand(shape, generator=g) >= probs for g in self._generators], dim=1)

    def second_plan(self, keep: Tensor) -> Tensor:
        """Returns the frozen paths of the second iteration after a drop iteration with `keep`."""
        if self.method == KEPT:
            return ~keep
        if self.method != RANDOM:
            return keep
        # The decisions for each network, or each of its points, are permuted over its paths.
        depth, _, columns = keep.shape
        orders = [torch.rand(depth, columns, generator=g).argsort(dim=0) for g in self._others]
        return keep.gather(0, torch.stack(orders, dim=1))

    def _learn(self, scheme: rdp.ResidualDropPath | None) -> None:
        self.model.zero_grad(set_to_none=True)
        logits = self.model(self.points.x)
        losses = F.cross_entropy(logits.flatten(0, 1), self.points.labels.flatten(), reduction="none")
        losses = losses.view(len(self.seeds), -1).mean(dim=1)
        losses.sum().backward()  # losses of different networks are independent
        self.optimizer.step(self._learning_rate(), self._learns(scheme))
        self.losses.append(losses.detach())
        self.steps_done += 1

    def _learning_rate(self) -> float:
        """Returns half a cosine over all steps."""
        return self.setting.learning_rate * 0.5 * (1 + math.cos(math.pi * self.steps_done / self.steps))

    def _learns(self, scheme: rdp.ResidualDropPath | None) -> dict[nn.Parameter, Tensor]:
        """Returns for each parameter which networks' parts learn, bool `[networks]`."""
        everything = torch.ones(len(self.seeds), dtype=torch.bool)
        if scheme is None or scheme.plan is None:
            return dict.fromkeys(self.model.parameters(), everything)
        keep = scheme.plan.keep.view(self.setting.depth, len(self.seeds), -1)
        rest, paths = everything, keep.any(dim=-1)
        if scheme.phase == "reuse":
            dropped = (~keep).any(dim=-1)
            some = dropped.any(dim=0)  # a network that dropped nothing has no reuse iteration
            free = scheme.freeze == "none"
            paths = some.expand_as(dropped) if free else dropped
            rest = some & (free or self.setting.train_rest)
        learns = dict.fromkeys(self.model.parameters(), rest)
        for path, networks in zip(scheme.paths, paths, strict=True):
            learns |= dict.fromkeys(path.parameters(), networks)
        return learns

    def _plan(self, keep: Tensor) -> rdp.PathPlan:
        """Returns the scheme's plan for `keep [paths, networks, 1 or points]`."""
        assert self._scheme is not None
        return rdp.PathPlan(keep.flatten(1), [path.drop_prob for path in self._scheme.paths], "sample")
