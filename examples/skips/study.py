"""Measures a kind at a depth: gradients at the start and in training, then the effect of removing layers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from examples.digits.data import Digits
from examples.digits.seeds import seed_of
from examples.skips.networks import KINDS, PLAIN, Network, concatenation_sizes, parameters

WIDTH = 32  # plain and adding stacks; concatenating ones have about as many parameters
EARLY = (0, 20, 100)  # optimizer steps after which gradients are measured, as well as after the last
GRADIENT_IMAGES = 128
REMOVALS = 12  # random choices of a quarter of the layers
PATH_SETS = 4  # the least number of random sets of branches for each length of paths
PATH_LENGTHS = 32  # about the number of lengths, evenly spaced from 0 to depth
SKIP_RATE = 1e-2
PLAIN_RATES = {4: 1e-2, 8: 1e-2, 16: 3e-3, 32: 1e-3, 64: 3e-4}


@dataclass(frozen=True)
class Config:
    """The options shared by all networks of a study."""

    seeds: int = 10
    steps: int = 400
    normalise: bool = True
    validate: bool = False
    learning_rate: float | None = None
    """None: the rate chosen for each kind and depth."""

    def rate(self, kind: str, depth: int) -> float:
        """Returns Adam's first learning rate. It was chosen on the validation set from 0.0003, 0.001, 0.003 and 0.01.
        Deeper plain stacks need smaller rates, so they have a rate for each depth."""
        if self.learning_rate is not None:
            return self.learning_rate
        return PLAIN_RATES[min(PLAIN_RATES, key=lambda known: abs(known - depth))] if kind == PLAIN else SKIP_RATE


@dataclass
class Gradients:
    """log10 of the norms of the loss's gradients by each layer's weights and by its input, `[depth, S]`."""

    weights: Tensor
    states: Tensor


@dataclass
class Measured:
    """One kind at one depth. `metrics` are columns of `results.csv`, with a number for each seed."""

    kind: str
    depth: int
    width: int
    growth: int
    learning_rate: float
    metrics: dict[str, list[float]] = field(default_factory=dict)
    gradients: dict[int, Gradients] = field(default_factory=dict)
    """Number of optimizer steps taken → gradients."""

    @property
    def parameters(self) -> int:
        return parameters(self.depth, self.width, self.growth)


def measure(kind: str, depth: int, config: Config, digits: Digits, on_step: Callable[[], None]) -> Measured:
    width, growth = concatenation_sizes(depth, WIDTH) if KINDS[kind].concatenates else (WIDTH, 0)
    measured = Measured(kind, depth, width, growth, config.rate(kind, depth))
    network = Network(kind, depth, width, growth, range(config.seeds), config.normalise)
    network.to(digits.train_images.device)
    images, labels = digits.train_images[:GRADIENT_IMAGES].flatten(1), digits.train_labels[:GRADIENT_IMAGES]

    def look(step: int) -> None:
        measured.gradients[step] = gradients = gradient_norms(network, images, labels)
        for name, norms in (("weight", gradients.weights), ("state", gradients.states)):
            measured.metrics[f"{name}_gradient_ratio_{step}"] = (norms[0] - norms[-1]).tolist()
        with torch.no_grad():
            measured.metrics[f"alikeness_{step}"] = alikeness(network.states(images)[-1]).tolist()

    look(0)
    for step in train(network, digits, range(config.seeds), config.steps, measured.learning_rate):
        on_step()
        if step in EARLY or step == config.steps:
            look(step)
    measured.metrics |= lesions(network, digits.test_images.flatten(1), digits.test_labels)
    lengths = path_length(network, images, labels) if KINDS[kind].adds else torch.full([config.seeds], math.nan)
    measured.metrics["path_length"] = lengths.tolist()
    return measured


def train(network: Network, digits: Digits, seeds: Sequence[int], steps: int, learning_rate: float) -> Iterable[int]:
    """Trains, and yields the number of steps taken after each step. Each network is trained as it would be alone: Adam
    treats every number separately, and the loss is the sum of the seeds' losses."""
    optimizer = torch.optim.Adam(network.parameters(), learning_rate, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        images, labels = (torch.stack(parts) for parts in zip(*(digits.batch(s, step) for s in seeds), strict=True))
        losses(network(images.flatten(2)), labels).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        yield step + 1


def losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Returns the cross-entropy `[S]` of logits `[S, B, 10]` and labels `[B]` or `[S, B]`."""
    return F.cross_entropy(logits.mT, labels.expand(logits.shape[:-1]), reduction="none").mean(dim=1)


def gradient_norms(network: Network, images: Tensor, labels: Tensor) -> Gradients:
    """Returns the norms in float64, so that squares of tiny gradients don't vanish."""
    weights, states = network.weights(), network.states(images)
    loss = losses(network.classify(states[-1]), labels).sum()
    grads = torch.autograd.grad(loss, [*weights, *states[:-1]])
    norms = torch.stack([grad.double().flatten(1).norm(dim=1).clamp_min(1e-300).log10() for grad in grads])
    return Gradients(*norms.split(len(weights)))


def alikeness(state: Tensor) -> Tensor:
    """Returns `[S]`: the mean cosine between the normalised states of different images. It is 1 if all are equal."""
    directions = F.normalize(F.layer_norm(state, state.shape[-1:]).double(), dim=-1)
    images = state.shape[1]
    return (directions.sum(dim=1).square().sum(dim=-1) / images - 1) / (images - 1)


@torch.no_grad()
def lesions(network: Network, images: Tensor, labels: Tensor) -> dict[str, list[float]]:
    """Returns metrics of a trained network: the accuracy whole, without one layer (mean over layers) and without a
    quarter (mean over random choices, the same for all networks of a depth), and the number of layers that matter."""
    depth = len(network.layers)
    state, removed = network.first_state(images), []
    for index in range(depth):
        x = network.step(state, index, removed=True)
        for later in range(index + 1, depth):
            x = network.step(x, later)
        removed.append(network.classify(x))
        state = network.step(state, index)
    whole = network.classify(state)
    without = [network(images, choice) for choice in quarters(depth)]
    increases = torch.stack([losses(logits, labels) for logits in removed]) - losses(whole, labels)
    metrics = {
        "loss": losses(whole, labels),
        "accuracy": _accuracy(whole, labels),
        "accuracy_without_one": torch.stack([_accuracy(logits, labels) for logits in removed]).mean(dim=0),
        "accuracy_without_quarter": torch.stack([_accuracy(logits, labels) for logits in without]).mean(dim=0),
        "effective_depth": participation(increases),
    }
    return {name: values.tolist() for name, values in metrics.items()}


def quarters(depth: int) -> list[list[int]]:
    """Returns random choices of a quarter of the layers, at least one layer."""
    generator = torch.Generator().manual_seed(seed_of(depth))
    count = max(1, round(depth / 4))
    return [torch.randperm(depth, generator=generator)[:count].tolist() for _ in range(REMOVALS)]


def path_length(network: Network, images: Tensor, labels: Tensor) -> Tensor:
    """Returns `[S]`, for stacks that add: the mean number of branches that the gradient at the first layer's input
    passes.

    As in Veit et al., arXiv 1605.06431, section 4.3, the weight of k is the number of sets of k layers, times the norm
    of the gradient through the branches of such a set and the skip connections of the other layers. The norm is a mean
    over random sets. The forward is the ordinary one.
    """
    depth = len(network.layers)
    lengths = list(range(0, depth + 1, max(1, depth // PATH_LENGTHS)))
    logs = []
    for length in lengths:
        sets = path_sets(depth, length)
        norms = torch.stack([_norm_through(network, images, labels, chosen) for chosen in sets]).mean(dim=0)
        logs.append(norms.clamp_min(1e-300).log() + math.log(math.comb(depth, length)))
    shares = torch.stack(logs).softmax(dim=0)
    return shares.T @ torch.tensor(lengths, dtype=shares.dtype, device=shares.device)


def path_sets(depth: int, length: int) -> list[set[int]]:
    """Returns random sets of `length` layers. They are disjoint until every layer was used, because few layers may
    matter much."""
    generator, sets = torch.Generator().manual_seed(seed_of(depth, length)), [set[int]()]
    while length and len(sets) <= PATH_SETS:
        order = torch.randperm(depth, generator=generator).tolist()
        sets += [set(order[i : i + length]) for i in range(0, depth - length + 1, length)]
    return sets[1:] or sets


def _norm_through(network: Network, images: Tensor, labels: Tensor, through: set[int]) -> Tensor:
    """Returns `[S]`: the norm of the gradient at the first layer's input through the branches of these layers."""
    x = first = network.first_state(images).detach().requires_grad_()
    for index, layer in enumerate(network.layers):
        branch = layer.fn(x)
        x = x.detach() + branch if index in through else x + branch.detach()
    (grad,) = torch.autograd.grad(losses(network.classify(x), labels).sum(), first)
    return grad.double().flatten(1).norm(dim=1)


def participation(effects: Tensor) -> Tensor:
    """Returns `(Σe)² / Σe²` over dim 0 of `effects [depth, S]`, where negative effects count as 0. It is the number of
    layers that share an effect, from 1 to depth, or 0 if there is none."""
    effects = effects.double().clamp_min(0)
    squares = effects.square().sum(dim=0)
    return torch.where(squares > 0, effects.sum(dim=0).square() / squares.clamp_min(1e-300), 0.0)


def _accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    return (logits.argmax(dim=-1) == labels).double().mean(dim=-1)
