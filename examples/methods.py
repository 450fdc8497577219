"""The methods that the examples compare, and the iterations that they open, one for each optimizer step."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import torch

import rdp_kernels as rdp
from examples.digits.seeds import seed_of
from rdp_kernels.estimate import ModelCost, kept_fractions
from rdp_kernels.paths.freezing import FreezeBN

PLAIN, DROP_PATH, EXACT, FROZEN = "plain", "drop-path", "ResidualDroppath", "branch-frozen"
DROP_THEN_FULL, RANDOM = "drop, then full", "random paths frozen"
METHODS = {
    PLAIN: "every path runs and learns",
    DROP_PATH: "every step drops random paths; ordinary stochastic depth",
    EXACT: "drop iteration, then a reuse iteration in which only the dropped paths learn; exact",
    FROZEN: 'the same with freeze="branch": frozen branches are detached; approximate',
    DROP_THEN_FULL: 'control, freeze="none": in the second iteration everything learns',
    RANDOM: "control: in the second iteration random paths learn instead of the dropped ones",
}
FREEZE_BN: dict[str, FreezeBN] = {"batch": True, "running": "running", "moving": False}
"""Option --freeze-bn → `freeze_bn` of `rdp.ResidualDropPath`."""
FREEZE = {EXACT: "parameters", FROZEN: "branch", DROP_THEN_FULL: "none", RANDOM: "parameters"}


@contextlib.contextmanager
def nothing_runs() -> Iterator[None]:
    """Silences the scheme's warning about an iteration in which no path runs."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "ResidualDropPath: no path ran")
        yield


class Iterations:
    """Opens the iterations of `method` on `model`, and returns their needed FLOPs.

    Args:
        model: a model with a `ResidualSequence` as `paths`.
        cost: the cost of an equal model on a batch of the training's shape.
        drop_prob, mode, schedule, scale_by_keep, train_rest, freeze_bn, seed: see `rdp.ResidualDropPath`.
    """

    def __init__(
        self,
        method: str,
        model: Any,
        cost: ModelCost,
        *,
        drop_prob: float,
        mode: str,
        schedule: str = "constant",
        scale_by_keep: bool = True,
        train_rest: bool = False,
        freeze_bn: FreezeBN = True,
        seed: int,
    ):
        self.model, self.cost, self.mode, self.train_rest, self.seed = model, cost, mode, train_rest, seed
        self.scheme: rdp.ResidualDropPath | None = None
        self.draws = 0  # drop iterations so far, or steps if there is one kind only
        self._plans_reuse_by_hand = method == RANDOM
        if method == DROP_PATH:
            rates = rdp.drop_path_rates(drop_prob, len(model.paths), schedule)
            for branch, rate in zip(model.paths, rates, strict=True):
                branch.drop_prob, branch.mode, branch.scale_by_keep = rate, mode, scale_by_keep
        if method in FREEZE:
            self.scheme = rdp.ResidualDropPath(
                model,
                drop_prob,
                schedule=schedule,
                mode=mode,
                freeze=FREEZE[method],
                scale_by_keep=scale_by_keep,
                train_rest=train_rest,
                freeze_bn=freeze_bn,
                seed=seed,
            )

    @property
    def phase(self) -> str:
        """The phase of the next step: "plain", "drop" or "reuse"."""
        return PLAIN if self.scheme is None else "reuse" if self.scheme.reuse_pending else "drop"

    def open(self, batch_size: int) -> contextlib.AbstractContextManager[rdp.PathPlan | None]:
        """Opens the next step's iteration, around forward, backward and optimizer step."""
        phase = self.phase
        self.draws += phase != "reuse"
        if self.scheme is None:
            return contextlib.nullcontext()
        return self.scheme.reuse_iteration() if phase == "reuse" else self.scheme.drop_iteration(batch_size)

    def close(self, phase: str, batch_size: int) -> None:
        """Must be called after the step. The control with random paths replaces the plan here by a new one. The reuse
        iteration trains the complement of its plan."""
        if not self._plans_reuse_by_hand or phase != "drop":
            return
        assert self.scheme is not None
        drop_probs = [path.drop_prob for path in self.scheme.paths]
        generator = torch.Generator().manual_seed(seed_of(self.seed, self.draws))
        shape = (len(drop_probs), batch_size if self.mode == "sample" else 1)
        keep = torch.rand(shape, generator=generator) >= torch.tensor(drop_probs).unsqueeze(1)
        plan = rdp.PathPlan(keep if self.mode == "sample" else keep[:, 0], drop_probs, self.mode)
        with nothing_runs(), self.scheme.drop_iteration(batch_size, plan=plan):
            pass

    def needed_flops(self, phase: str, plan: rdp.PathPlan | None) -> float:
        """Returns the needed FLOPs of a step. For ordinary drop-path, whose masks aren't known, it is the
        expectation."""
        if self.scheme is None or plan is None:
            return self.cost.drop([1 - path.drop_prob for path in self.model.paths])
        kept = kept_fractions(plan)
        return self.cost.drop(kept) if phase == "drop" else self.cost.reuse(kept, self.scheme.freeze, self.train_rest)

    def steps_within(self, flops: float, batch_size: int) -> int:
        """Returns how many of the next steps need no more than `flops` together, at least 1. Opens their iterations
        without running them."""
        steps = 0
        while True:
            phase = self.phase
            with nothing_runs(), self.open(batch_size) as plan:
                flops -= self.needed_flops(phase, plan)
            self.close(phase, batch_size)
            if flops < 0:
                return max(steps, 1)
            steps += 1

    def state_dict(self) -> dict[str, Any]:
        return {"scheme": None if self.scheme is None else self.scheme.state_dict(), "draws": self.draws}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self.scheme is not None:
            self.scheme.load_state_dict(state["scheme"])
        self.draws = state["draws"]
