"""A small model and data for the training loops of other libraries, and the loop by hand that they must equal to the
bit."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn

import rdp_kernels as rdp
from examples.libraries import import_torchvision, installed

if installed("torchvision"):
    import_torchvision()  # as transformers, timm and Lightning do, but on any build of torch


class Net(nn.Module):
    """`dropout` draws random numbers; a resumed run has to draw the same ones."""

    def __init__(self, dropout: float = 0.0, dtype: torch.dtype = torch.float64):
        super().__init__()

        def path() -> rdp.ResidualBranch:
            fn = nn.Sequential(nn.Linear(6, 12), nn.GELU(), nn.Dropout(dropout), nn.Linear(12, 6))
            return rdp.ResidualBranch(fn, norm=nn.LayerNorm(6), gamma=torch.ones(6), drop_prob=0.5)

        torch.manual_seed(0)
        self.stem, self.paths, self.head = nn.Linear(4, 6), nn.Sequential(*(path() for _ in range(5))), nn.Linear(6, 3)
        self.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.paths(self.stem(x)))


def batches(count: int, size: int = 4, dtype: torch.dtype = torch.float64) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(count, size, 4, generator=generator, dtype=torch.float64).to(dtype)
    return list(zip(images, torch.randint(3, (count, size), generator=generator), strict=True))


def endless(scheme: rdp.ResidualDropPath) -> Iterator[str]:
    """Opens the iterations that `alternate` would open, without it."""
    while True:
        yield from scheme.iterations()


def by_hand(
    scheme: rdp.ResidualDropPath, steps: Iterable[list[Callable[[], Tensor]]], end_step: Callable[[], None]
) -> list[str]:
    """Each of `steps` is an iteration: the losses of its micro-batches and then `end_step`. Returns the phases."""
    phases = []
    iterations = endless(scheme)
    for losses in steps:
        phases.append(next(iterations))
        for loss in losses:
            loss().backward()
        end_step()
    scheme.reset()
    return phases


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def assert_equal(model: nn.Module, expected: nn.Module | dict[str, Tensor], tolerance: float = 0.0) -> None:
    wanted = expected.state_dict() if isinstance(expected, nn.Module) else expected
    actual = model.state_dict()
    assert actual.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(
            actual[name], value, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


class Watch:
    """Asserts in every step of `optimizer` that the learning parameters of the iteration moved, and no others."""

    def __init__(self, model: nn.Module, scheme: rdp.ResidualDropPath, optimizer: torch.optim.Optimizer):
        self.model, self.scheme = model, scheme
        self.phases: list[str] = []
        self._handles = [optimizer.register_step_pre_hook(self._before), optimizer.register_step_post_hook(self._after)]

    def _before(self, *_: object) -> None:
        self._weights = weights(self.model)
        self._learning = {id(p) for p in self.scheme.learning_parameters()}
        self.phases.append(self.scheme.phase)

    def _after(self, *_: object) -> None:
        moved = {id(p) for n, p in self.model.named_parameters() if not torch.equal(p, self._weights[n])}
        # in sample mode it lists the parameters that may learn on any rank
        assert moved == self._learning if self.scheme.mode == "block" else moved <= self._learning

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()


def isolate() -> Iterator[None]:
    """Restores what transformers and accelerate change in the process: environment variables and shared state."""
    before = dict(os.environ)
    _forget_accelerators()
    yield
    _forget_accelerators()
    os.environ.clear()
    os.environ.update(before)


def _forget_accelerators() -> None:
    if installed("accelerate"):
        from accelerate.state import AcceleratorState, GradientState, PartialState

        for state in (AcceleratorState, GradientState, PartialState):
            state._reset_state()
