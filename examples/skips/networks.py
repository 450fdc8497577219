"""Three ways to stack the same layer, for many seeds at once: every tensor has a leading dimension of seeds.

All three kinds stack the same layer: LayerNorm → ReLU → Linear, the order of pre-activation ResNets (He et al., arXiv
1603.05027) and of DenseNets (Huang et al., arXiv 1608.06993). The norm has no parameters. It makes the plain stack's
gradients independent of the initial weights' scale, so results don't depend on the choice of this scale.
`normalise=False` leaves the norm out. Then they do, and weights begin with He's scale, the best for a plain stack.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rdp_kernels as rdp
from examples.digits.seeds import seed_of

PIXELS, CLASSES = 64, 10
PLAIN, ADDITION, CONCATENATION = "plain", "addition", "concatenation"
SCALED, ZERO = "addition/√depth", "addition from 0"


@dataclass(frozen=True)
class Kind:
    """A way to stack layers.

    Args:
        formula: the formula of one layer, for readers.
        adds, concatenates: whether the skip connection adds or concatenates; neither in a plain stack.
        gain: function of the depth that returns a factor for the layers' initial weights (He's).
    """

    formula: str
    adds: bool = False
    concatenates: bool = False
    gain: Callable[[int], float] = lambda depth: 1.0


KINDS = {
    PLAIN: Kind("x ← f(x)"),
    ADDITION: Kind("x ← x + f(x)", adds=True),
    CONCATENATION: Kind("x ← [x, f(x)]", concatenates=True),
    SCALED: Kind("x ← x + f(x), f's initial weights divided by √depth", adds=True, gain=lambda depth: depth**-0.5),
    ZERO: Kind("x ← x + f(x), f's initial weights 0", adds=True, gain=lambda depth: 0.0),
}


class Linear(nn.Module):
    """`[S, B, inner]` → `[S, B, outer]`, with separate weights for each seed."""

    def __init__(self, inner: int, outer: int, generators: Sequence[torch.Generator], std: float):
        super().__init__()
        self.weight = nn.Parameter(torch.stack([std * torch.randn(inner, outer, generator=g) for g in generators]))
        self.bias = nn.Parameter(torch.zeros(len(generators), 1, outer))

    def forward(self, x: Tensor) -> Tensor:
        return torch.baddbmm(self.bias, x, self.weight)


class Layer(nn.Module):
    def __init__(self, linear: Linear, normalise: bool):
        super().__init__()
        self.linear, self.normalise = linear, normalise

    def forward(self, x: Tensor) -> Tensor:
        return self.linear((F.layer_norm(x, x.shape[-1:]) if self.normalise else x).relu())


class Network(nn.Module):
    """`images [B, 64]`, or `[S, B, 64]` with other images for each seed, → logits `[S, B, 10]`.

    Network s of the S depends only on `seeds[s]`. The state after the last layer is normalised for the head.
    """

    def __init__(self, kind: str, depth: int, width: int, growth: int, seeds: Sequence[int], normalise: bool = True):
        super().__init__()
        self.kind, self.growth, self.seeds = KINDS[kind], growth, len(seeds)
        generators = [torch.Generator().manual_seed(seed_of(seed, depth)) for seed in seeds]
        self.embed = Linear(PIXELS, width, generators, PIXELS**-0.5)
        added = growth if self.kind.concatenates else 0
        layers: list[nn.Module] = []
        for index in range(depth):
            inner = width + index * added
            std = (2 / inner) ** 0.5 * self.kind.gain(depth)
            layer = Layer(Linear(inner, added or width, generators, std), normalise)
            layers.append(rdp.ResidualBranch(layer) if self.kind.adds else layer)
        self.layers = nn.ModuleList(layers)
        last = width + depth * added
        self.head = Linear(last, CLASSES, generators, last**-0.5)

    def forward(self, images: Tensor, without: Collection[int] = ()) -> Tensor:
        return self.classify(self.states(images, without)[-1])

    def first_state(self, images: Tensor) -> Tensor:
        return self.embed(images.expand(self.seeds, -1, -1))

    def states(self, images: Tensor, without: Collection[int] = ()) -> list[Tensor]:
        """Returns the states after the embedding and after each layer, `[S, B, ...]`, with the layers `without`
        removed."""
        states = [self.first_state(images)]
        for index in range(len(self.layers)):
            states.append(self.step(states[-1], index, removed=index in without))
        return states

    def step(self, x: Tensor, index: int, removed: bool = False) -> Tensor:
        """Runs layer `index` with its skip connection. Removing a layer leaves only the skip connection: features that
        it would concatenate are 0, and in a plain stack it is the identity."""
        if not self.kind.concatenates:
            return x if removed else self.layers[index](x)
        return torch.cat([x, x.new_zeros(*x.shape[:-1], self.growth) if removed else self.layers[index](x)], dim=-1)

    def classify(self, state: Tensor) -> Tensor:
        return self.head(F.layer_norm(state, state.shape[-1:]))

    def weights(self) -> list[nn.Parameter]:
        """Returns the weights of the layers in order, `[S, inner, outer]`."""
        return [(layer.fn if self.kind.adds else layer).linear.weight for layer in self.layers]


def parameters(depth: int, width: int, growth: int = 0) -> int:
    """Returns the number of parameters of one network. `growth` is 0 for a stack of one width."""
    inner = [width + index * growth for index in range(depth)]
    last = width + depth * growth
    return (PIXELS + 1) * width + sum((i + 1) * (growth or width) for i in inner) + (last + 1) * CLASSES


def concatenation_sizes(depth: int, width: int) -> tuple[int, int]:
    """Returns the embedding's width (from half to twice `width`) and the growth of a concatenation with about as many
    parameters as a stack of `width`: among those within 2 % the one with the embedding nearest to `width`."""
    wanted = parameters(depth, width)
    sizes = [(w, g) for w in range(width // 2, 2 * width + 1) for g in range(1, width + 1)]
    return min(sizes, key=lambda s: (max(abs(parameters(depth, *s) / wanted - 1), 0.02), abs(s[0] - width)))
