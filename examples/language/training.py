"""The options of a run, and a training of one method on one seed. It can stop and continue between any two steps."""

from __future__ import annotations

import contextlib
import copy
import math
import time
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples.digits.analysis import weights_sha256
from examples.digits.seeds import seed_of
from examples.language.data import Text
from examples.language.model import ByteGPT
from examples.methods import Iterations
from rdp_kernels.estimate import ModelCost

EVALUATIONS = 10  # per training
REMOVALS = 12  # a loss is averaged over so many random choices of removed branches
WEIGHT_DECAY = 0.1  # for matrices
WARM_UP = 0.05  # share of the steps
CLIP = 1.0


@dataclass(frozen=True)
class Config:
    """All that the results of a run depend on, except the machine and the text."""

    preset: str
    depth: int
    width: int
    heads: int
    context: int
    method: tuple[str, ...]
    drop_prob: float
    mode: str
    schedule: str
    no_scale: bool
    train_rest: bool
    batch: str
    seeds: int
    steps: int
    equal: str
    learning_rate: float
    batch_size: int
    validation_windows: int
    train_bytes: int | None
    dtype: str
    compile: bool

    def build_model(self, seed: int) -> ByteGPT:
        torch.manual_seed(seed)
        return ByteGPT(self.depth, self.width, self.heads, self.context)


class Training:
    """A training of `method`, on a copy of `weights`.

    Losses are in bits per byte. Those for validation and with removed branches are at inference, over the same windows
    for all methods. `curve` has a row for each evaluation. FLOPs are the needed ones.
    """

    def __init__(self, method: str, weights: ByteGPT, cost: ModelCost, text: Text, config: Config, seed: int):
        self.method, self.text, self.config, self.seed = method, text, config, seed
        self.model = copy.deepcopy(weights)
        self.iterations = self._iterations(self.model, cost)
        self.steps = config.steps
        if config.equal == "flops":
            budget = config.steps * cost.plain() * (1 + 1e-9)  # rounding must not cost plain a step
            self.steps = self._iterations(copy.deepcopy(weights), cost).steps_within(budget, config.batch_size)
        if config.compile:
            from rdp_kernels.integrations.compile import compile_branches

            compile_branches(self.model, dynamic=False if config.mode == "block" else None)
        matrices = [p for p in self.model.parameters() if p.dim() > 1]
        others = [p for p in self.model.parameters() if p.dim() == 1]
        groups = [{"params": matrices}, {"params": others, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=WEIGHT_DECAY)
        self.step_count, self.flops, self.seconds = 0, 0.0, 0.0
        self.phases: dict[str, int] = {}
        self.losses: list[float] = []  # since the last evaluation
        self.curve: list[dict[str, float]] = []
        torch.manual_seed(seed_of(seed))  # for drop-path's draws

    def _iterations(self, model: ByteGPT, cost: ModelCost) -> Iterations:
        config = self.config
        return Iterations(
            self.method,
            model,
            cost,
            drop_prob=config.drop_prob,
            mode=config.mode,
            schedule=config.schedule,
            scale_by_keep=not config.no_scale,
            train_rest=config.train_rest,
            seed=self.seed,
        )

    def step(self) -> None:
        """Runs one optimizer step. Its time includes the batch, the draw of a plan, both passes and the optimizer."""
        synchronize = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
        synchronize()
        start = time.perf_counter()
        config, phase = self.config, self.iterations.phase
        number = self.step_count if config.batch == "next" else self.iterations.draws - (phase == "reuse")
        inputs, targets = self.text.batch(self.seed, number, config.batch_size, config.context)
        for group in self.optimizer.param_groups:
            group["lr"] = config.learning_rate * self._rate(self.step_count)
        with self.iterations.open(len(inputs)) as plan:
            loss = self.loss(inputs, targets)
            loss.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)  # parameters that don't learn have no gradient
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        synchronize()
        self.seconds += time.perf_counter() - start
        self.losses.append(loss.item() / math.log(2))
        self.flops += self.iterations.needed_flops(phase, plan)
        self.phases[phase] = self.phases.get(phase, 0) + 1
        self.iterations.close(phase, len(inputs))
        self.step_count += 1
        if self._evaluates():
            self._evaluate()

    def _rate(self, step: int) -> float:
        """Returns the learning rate's factor: a warm-up, then a cosine to 0 over this training's number of steps."""
        warm_up = math.ceil(WARM_UP * self.steps)
        return min(1.0, (step + 1) / warm_up) * (1 + math.cos(math.pi * step / self.steps)) / 2

    def loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Returns the cross-entropy in nats."""
        return cross_entropy(self._in_dtype(lambda: self.model(inputs)), targets)

    def _in_dtype(self, forward: Any) -> Tensor:
        low = self.config.dtype != "float32"
        device = self.model.position.device.type
        with torch.autocast(device, torch.bfloat16) if low else contextlib.nullcontext():
            return forward()

    def _evaluates(self) -> bool:
        """Returns True at `EVALUATIONS` evenly spread steps, including the last."""
        done = EVALUATIONS * self.step_count // self.steps
        return done > EVALUATIONS * (self.step_count - 1) // self.steps

    def _evaluate(self) -> None:
        self.curve.append(
            {
                "step": self.step_count,
                "flops": self.flops,
                "seconds": self.seconds,
                "training_loss": sum(self.losses) / len(self.losses),
                "validation_loss": self.evaluated(self.text.validation),
            }
        )
        self.losses = []

    @torch.no_grad()
    def evaluated(self, part: Tensor, removed: tuple[int, ...] = ()) -> float:
        """Returns the loss at inference on `part` of the text, without the branches of the paths `removed`."""
        config, model = self.config, self.model
        inputs, targets = self.text.spread(part, config.validation_windows, config.context)
        model.eval()
        losses = []
        for x, y in zip(inputs.split(config.batch_size), targets.split(config.batch_size), strict=True):
            logits = self._in_dtype(lambda x=x: logits_without(model, x, removed))
            losses.append(cross_entropy(logits, y).double() * len(x))
        model.train()
        return torch.stack(losses).sum().item() / len(inputs) / math.log(2)

    def result(self) -> dict[str, Any]:
        """Returns the results at the end, as plain types."""
        return {
            "method": self.method,
            "seed": self.seed,
            "steps": self.steps,
            "phases": self.phases,
            "curve": self.curve,
            "training_loss_at_inference": self.evaluated(self.text.train),
            "without": {count: self._without(count) for count in removal_counts(len(self.model.paths))},
            "weights_sha256": weights_sha256(self.model),
        }

    def _without(self, count: int) -> float:
        """Returns the mean loss over choices of `count` removed paths, the same for every training. If there are no
        more than `REMOVALS` choices, it takes all."""
        generator = torch.Generator().manual_seed(seed_of(count))
        paths, choices = len(self.model.paths), set()
        while len(choices) < min(REMOVALS, math.comb(paths, count)):
            choices.add(tuple(sorted(torch.randperm(paths, generator=generator)[:count].tolist())))
        return sum(self.evaluated(self.text.validation, choice) for choice in sorted(choices)) / len(choices)

    def state_dict(self) -> dict[str, Any]:
        """Returns the state that the rest of the training depends on, as plain types and tensors."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "iterations": self.iterations.state_dict(),
            "rng": torch.get_rng_state(),
            "record": {name: getattr(self, name) for name in RECORD},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.iterations.load_state_dict(state["iterations"])
        torch.set_rng_state(state["rng"].cpu())
        for name in RECORD:
            setattr(self, name, state["record"][name])


RECORD = ("step_count", "flops", "seconds", "phases", "losses", "curve")


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Returns the mean loss over all places in nats. Logits narrower than float32 are converted to float32."""
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def logits_without(model: ByteGPT, text: Tensor, removed: tuple[int, ...]) -> Tensor:
    if not removed:
        return model(text)
    x = model.embed(text)
    for index, path in enumerate(model.paths):
        x = x if index in removed else path(x)
    return model.classify(x)


def removal_counts(paths: int) -> list[int]:
    """Returns 1 and a quarter of the number of paths."""
    return sorted({1, max(1, round(paths / 4))})
