"""The methods that are compared, and a training of one of them that can stop and go on between any two steps."""

from __future__ import annotations

import contextlib
import copy
import time
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.nn.functional as F

import rdp_kernels as rdp
from examples.digits.data import Digits
from examples.digits.seeds import seed_of
from examples.models import ResidualClassifier, ResidualMLP, ResNet, ViT
from rdp_kernels.estimate import ModelCost, kept_fractions

PLAIN, DROP_PATH, EXACT, FROZEN = "plain", "drop-path", "ResidualDroppath", "branch-frozen"
DROP_THEN_FULL, RANDOM = "drop, then full", "random paths frozen"
METHODS = {
    PLAIN: "every path runs and learns",
    DROP_PATH: "every step drops random paths; ordinary stochastic depth",
    EXACT: "drop iteration, then a reuse iteration in which only what was dropped learns; exact",
    FROZEN: 'the same with freeze="branch": gradients bypass frozen branches; approximate',
    DROP_THEN_FULL: 'control, freeze="none": in the second iteration everything learns',
    RANDOM: "control: in the second iteration other random paths learn than those that were dropped",
}
FREEZE = {EXACT: "parameters", FROZEN: "branch", DROP_THEN_FULL: "none", RANDOM: "parameters"}

WEIGHT_DECAY = 0.05


@dataclass(frozen=True)
class Network:
    """A network and how it is trained; learning rates were chosen on the validation set, of three values or two."""

    kind: type[ResidualClassifier]
    options: dict[str, Any]
    learning_rate: float

    def __str__(self) -> str:
        return f"{self.kind.__name__}({', '.join(f'{name}={value}' for name, value in self.options.items())})"


NETWORKS = {
    # The ViT averages its tokens: with positions told apart from the start it learns far sooner.
    "vit": Network(ViT, {"dim": 64, "depth": 6, "heads": 4, "position_std": 0.5}, learning_rate=2e-3),
    "resnet": Network(ResNet, {"widths": (16, 32, 64), "blocks": 4}, learning_rate=3e-3),
    "mlp": Network(ResidualMLP, {"dim": 64, "depth": 12}, learning_rate=1e-3),
}


@dataclass(frozen=True)
class Config:
    """What a run is: everything that its results depend on, but the machine."""

    model: str = "vit"
    mode: str = "block"
    drop_prob: float = 0.3
    seeds: int = 3
    epochs: float = 12
    validate: bool = False

    @property
    def network(self) -> Network:
        return NETWORKS[self.model]

    def build_model(self, seed: int) -> ResidualClassifier:
        torch.manual_seed(seed)
        return self.network.kind(**self.network.options)


@dataclass
class Record:
    """What one training was seen to do, step by step."""

    phases: dict[str, int] = field(default_factory=dict)
    losses: list[float] = field(default_factory=list)
    needed: list[float] = field(default_factory=list)
    """FLOPs that the step needs."""
    seconds: list[float] = field(default_factory=list)
    curve: list[dict[str, float]] = field(default_factory=list)


class Training:
    """A training of `method` for `steps` optimizer steps, on a copy of `weights`."""

    def __init__(
        self,
        method: str,
        weights: ResidualClassifier,
        cost: ModelCost,
        digits: Digits,
        config: Config,
        seed: int,
        steps: int,
    ):
        self.digits, self.config, self.seed, self.cost = digits, config, seed, cost
        self.model, self.scheme = copy.deepcopy(weights), None
        self.plans_reuse_by_hand = method == RANDOM
        if method == DROP_PATH:
            for branch in self.model.paths:
                branch.drop_prob, branch.mode = config.drop_prob, config.mode
        if method in FREEZE:
            self.scheme = rdp.ResidualDropPath(
                self.model, config.drop_prob, mode=config.mode, freeze=FREEZE[method], seed=seed
            )
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), config.network.learning_rate, weight_decay=WEIGHT_DECAY
        )
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, steps)
        self.batches = 0  # taken so far
        self.record = Record()

    def step(self) -> None:
        """One optimizer step, timed: the batch, the draw of a plan, both passes and the optimizer."""
        synchronize = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
        synchronize()
        start = time.perf_counter()
        phase = PLAIN if self.scheme is None else "reuse" if self.scheme.reuse_pending else "drop"
        if phase != "reuse":
            self.batches += 1
        images, labels = self.digits.batch(self.seed, self.batches - 1)
        with self._iteration(phase, len(images)) as plan:
            loss = F.cross_entropy(self.model(images), labels)
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        self.schedule.step()
        synchronize()
        self.record.seconds.append(time.perf_counter() - start)
        self.record.losses.append(loss.item())
        self.record.needed.append(self._needed_flops(phase, plan))
        self.record.phases[phase] = self.record.phases.get(phase, 0) + 1
        if self.plans_reuse_by_hand and phase == "drop":
            self._plan_reuse_by_hand(len(images))

    def _iteration(self, phase: str, batch_size: int) -> contextlib.AbstractContextManager[rdp.PathPlan | None]:
        if self.scheme is None:
            return contextlib.nullcontext()
        return self.scheme.reuse_iteration() if phase == "reuse" else self.scheme.drop_iteration(batch_size)

    def _plan_reuse_by_hand(self, batch_size: int) -> None:
        """Puts a plan drawn apart in the place of the one just carried out: its complement is what reuse trains."""
        assert self.scheme is not None
        drop_probs = [path.drop_prob for path in self.scheme.paths]
        generator = torch.Generator().manual_seed(seed_of(self.seed, self.batches))
        shape = (len(drop_probs), batch_size) if self.config.mode == "sample" else (len(drop_probs),)
        keep = torch.rand(shape, generator=generator) >= self.config.drop_prob
        with self.scheme.drop_iteration(batch_size, plan=rdp.PathPlan(keep, drop_probs, self.config.mode)):
            pass

    def _needed_flops(self, phase: str, plan: rdp.PathPlan | None) -> float:
        """Of the step just taken; for ordinary drop-path, whose draws aren't seen, the expectation."""
        if self.scheme is None or plan is None:
            return self.cost.drop([1 - path.drop_prob for path in self.model.paths])
        kept = kept_fractions(plan)
        return self.cost.drop(kept) if phase == "drop" else self.cost.reuse(kept, self.scheme.freeze)

    @torch.no_grad()
    def evaluate(self, last_steps: int) -> None:
        """Adds to the learning curve: test accuracy, and the mean loss of the last steps."""
        self.model.eval()
        right = self.model(self.digits.test_images).argmax(dim=-1) == self.digits.test_labels
        self.model.train()
        losses = self.record.losses[-last_steps:]
        point = {"step": len(self.record.losses), "loss": sum(losses) / len(losses)}
        self.record.curve.append(point | {"accuracy": right.double().mean().item()})

    def state_dict(self) -> dict[str, Any]:
        """All that the rest of the training depends on, and the record: plain types and tensors."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "scheme": None if self.scheme is None else self.scheme.state_dict(),
            "batches": self.batches,
            "record": asdict(self.record),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        if self.scheme is not None:
            self.scheme.load_state_dict(state["scheme"])
        self.batches, self.record = state["batches"], Record(**state["record"])
