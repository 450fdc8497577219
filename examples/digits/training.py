"""The networks, and a training of one network by one method. It can stop and continue between any two steps."""

from __future__ import annotations

import copy
import time
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.nn.functional as F

from examples.digits.data import Digits
from examples.methods import FREEZE_BN, Iterations
from examples.models import ResidualClassifier, ResidualMLP, ResNet, ViT
from rdp_kernels.estimate import ModelCost

WEIGHT_DECAY = 0.05


@dataclass(frozen=True)
class Network:
    """A network and its training. The learning rates were chosen on the validation set from two or three values."""

    kind: type[ResidualClassifier]
    options: dict[str, Any]
    learning_rate: float

    def __str__(self) -> str:
        return f"{self.kind.__name__}({', '.join(f'{name}={value}' for name, value in self.options.items())})"


NETWORKS = {
    # The ViT averages its tokens. It learns far sooner with positions that differ from the start.
    "vit": Network(ViT, {"dim": 64, "depth": 6, "heads": 4, "position_std": 0.5}, learning_rate=2e-3),
    "resnet": Network(ResNet, {"widths": (16, 32, 64), "blocks": 4}, learning_rate=3e-3),
    "mlp": Network(ResidualMLP, {"dim": 64, "depth": 12}, learning_rate=1e-3),
}


@dataclass(frozen=True)
class Config:
    """The options of a run: all that its results depend on, except the machine."""

    model: str = "vit"
    mode: str = "block"
    drop_prob: float = 0.3
    freeze_bn: str = "batch"
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
    """The record of one training, step by step."""

    phases: dict[str, int] = field(default_factory=dict)
    losses: list[float] = field(default_factory=list)
    worst: dict[str, float] = field(default_factory=dict)
    """By phase, the largest loss."""
    needed: list[float] = field(default_factory=list)
    """Needed FLOPs of each step."""
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
        self.digits, self.config, self.seed = digits, config, seed
        self.model = copy.deepcopy(weights)
        self.iterations = Iterations(
            method,
            self.model,
            cost,
            drop_prob=config.drop_prob,
            mode=config.mode,
            freeze_bn=FREEZE_BN[config.freeze_bn],
            seed=seed,
        )
        self.scheme = self.iterations.scheme
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), config.network.learning_rate, weight_decay=WEIGHT_DECAY
        )
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, steps)
        self.record = Record()

    def step(self) -> None:
        """Runs one optimizer step. Its time includes the batch, the draw of a plan, both passes and the optimizer."""
        synchronize = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
        synchronize()
        start = time.perf_counter()
        phase = self.iterations.phase
        images, labels = self.digits.batch(self.seed, self.iterations.draws - (phase == "reuse"))
        with self.iterations.open(len(images)) as plan:
            loss = F.cross_entropy(self.model(images), labels)
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        self.schedule.step()
        synchronize()
        self.record.seconds.append(time.perf_counter() - start)
        self.record.losses.append(loss.item())
        self.record.worst[phase] = max(self.record.worst.get(phase, 0.0), loss.item())
        self.record.needed.append(self.iterations.needed_flops(phase, plan))
        self.record.phases[phase] = self.record.phases.get(phase, 0) + 1
        self.iterations.close(phase, len(images))

    @torch.no_grad()
    def evaluate(self, last_steps: int) -> None:
        """Adds the test accuracy and the mean loss of the last steps to the learning curve."""
        self.model.eval()
        right = self.model(self.digits.test_images).argmax(dim=-1) == self.digits.test_labels
        self.model.train()
        losses = self.record.losses[-last_steps:]
        point = {"step": len(self.record.losses), "loss": sum(losses) / len(losses)}
        self.record.curve.append(point | {"accuracy": right.double().mean().item()})

    def state_dict(self) -> dict[str, Any]:
        """Returns the record and the state that the rest of the training depends on, as plain types and tensors."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "iterations": self.iterations.state_dict(),
            "record": asdict(self.record),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.iterations.load_state_dict(state["iterations"])
        self.record = Record(**state["record"])
