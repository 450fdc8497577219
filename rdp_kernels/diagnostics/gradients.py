"""How large gradients are, path by path: of one loss, and over the steps of a training."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from ..paths.binding import PathModule
from ..paths.call import PathCall
from ..paths.path import find_path_modules, parameters_of
from ._plots import axes_or_new, label_layers
from .observe import standing_in, undisturbed

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class GradientNorms:
    """Euclidean norms of a loss's gradients; NaN where there is none.

    Args:
        names: of the paths.
        parameters: ‖∂L/∂θ‖ of each path, over all its parameters that require grad; NaN if the loss depends on none.
        stream: ‖∂L/∂x‖ at each path's input x, the residual stream before it; NaN if the loss doesn't depend on it, or
            where nothing before the path learns and its shortcut is computed outside of it.
    """

    names: list[str]
    parameters: list[float]
    stream: list[float]

    def plot(self, ax: Axes | None = None) -> Axes:
        """Both by path, on a logarithmic scale. Returns the axes."""
        ax = axes_or_new(ax)
        for values, label, style in ((self.parameters, "path's parameters", "o-"), (self.stream, "stream", "s--")):
            ax.plot(range(len(values)), values, style, label=f"norm of the gradient of the {label}")
        label_layers(ax, self.names)
        ax.set_xlabel("path")
        if any(value > 0 for value in self.parameters + self.stream):
            ax.set_yscale("log")
        ax.legend()
        return ax


def gradient_norms(model: nn.Module, loss: Callable[[Any], Tensor], *, training: bool = False) -> GradientNorms:
    """Norms of the gradients of `loss(model)`, a scalar tensor, from one forward and backward.

    The model is in eval mode, as in all diagnostics: the gradient of the network that is used for inference, which
    doesn't depend on chance. With `training` all of it is in training mode: drop-path and dropout draw, and BatchNorm
    takes the batch's statistics. Either way `.grad`, modes, random states and buffers are left as they were.

    Where weights are tied, each path's norm counts them whole; a path that is called several times has one norm over
    all its calls. Raises `TypeError` where `loss` doesn't return a scalar that depends on the model by autograd, and
    `RuntimeError` for `training` inside an iteration of a scheme's, where a forward is the plan's.
    """
    path_modules = find_path_modules(model)
    for name, path_module in path_modules.items():
        scheme = path_module.binding.scheme
        if training and scheme is not None and scheme.phase is not None:
            raise RuntimeError(f"path {name!r} is in an open {scheme.phase} iteration: training must be False there")
    inputs: dict[int, list[GradientEdge]] = {}

    def look(path: int, call: PathCall, x: Tensor) -> Tensor:
        x, whole = requiring_grad(x, call)
        if whole:  # the edge stays that of this value, also if something behind writes to the tensor
            inputs.setdefault(path, []).append(get_gradient_edge(x))
        return call.run(x)

    parameters = [
        [p for p in {id(p): p for p in parameters_of(o)}.values() if p.requires_grad] for o in path_modules.values()
    ]
    with undisturbed(model), _own_buffers(model) if training else contextlib.nullcontext():
        model.train(training)
        with torch.enable_grad(), standing_in(model, look):
            value = checked_loss(loss(model))
        streams = [inputs.get(path, []) for path in range(len(path_modules))]
        groups: list[Sequence[Any]] = [*parameters, *streams]
        found = iter(torch.autograd.grad(value, [t for group in groups for t in group], allow_unused=True))
    norms = [_norm([next(found) for _ in group]) for group in groups]
    return GradientNorms(list(path_modules), norms[: len(path_modules)], norms[len(path_modules) :])


def checked_loss(value: object) -> Tensor:
    """A scalar tensor that autograd can differentiate. Raises `TypeError`."""
    if not isinstance(value, Tensor) or value.numel() != 1 or not value.requires_grad:
        came = type(value).__name__
        if isinstance(value, Tensor):
            came = f"one of shape {list(value.shape)}, requires_grad={value.requires_grad}"
        raise TypeError(f"loss must return a scalar tensor that depends on the model by autograd, got {came}")
    return value


def requiring_grad(x: Tensor, call: PathCall) -> tuple[Tensor, bool]:
    """A path's input as one that requires grad, also where nothing before it learns; and whether the gradient there is
    all that comes through the path. It is not where the shortcut was computed before, from what it was instead."""
    if x.requires_grad:
        return x, True
    return x.detach().requires_grad_(), call.known_residual is None


def _parameters(path_module: PathModule) -> list[nn.Parameter]:
    return list({id(p): p for p in parameters_of(path_module)}.values())


def _norm(grads: list[Tensor | None]) -> float:
    squares = [grad.detach().double().square().sum().item() for grad in grads if grad is not None]
    return math.sqrt(sum(squares)) if squares else math.nan


@contextlib.contextmanager
def _own_buffers(model: nn.Module) -> Iterator[None]:
    """Copies in the place of the model's buffers: what BatchNorm writes within is gone afterwards."""
    places = [(module, *place) for module in model.modules() for place in module.named_buffers(recurse=False)]
    for module, name, buffer in places:
        setattr(module, name, buffer.clone())
    try:
        yield
    finally:
        for module, name, buffer in places:
            setattr(module, name, buffer)


class GradientNormRecorder:
    """Norms of the paths' `.grad` over the steps of a training, in any loop, with a scheme or without one:

        recorder = GradientNormRecorder(model)
        loss.backward()
        recorder.record(step)      # before the optimizer's zero_grad; under AMP after scaler.unscale_
        recorder.plot()

    A path without any gradient has NaN: with `zero_grad(set_to_none=True)`, torch's default, that is what took no part,
    dropped paths of a drop iteration and frozen ones of a reuse iteration. `record` is one foreach norm over what is
    there, and doesn't wait for the device. Gradients must be dense, and of plain tensors.
    """

    def __init__(self, model: nn.Module):
        path_modules = find_path_modules(model)
        self.names = list(path_modules)
        self.steps: list[int] = []
        self._parameters = [
            (path, parameter)
            for path, path_module in enumerate(path_modules.values())
            for parameter in _parameters(path_module)
        ]
        self._recorded: list[tuple[list[int], Tensor]] = []  # of each gradient that was there: its path, its norm

    def record(self, step: int | None = None) -> None:
        """Notes the norms as they are now, as those of `step`; None: of the one after the last, from 0."""
        found = [(path, p.grad) for path, p in self._parameters if p.grad is not None]
        grads = [grad for _, grad in found]
        each = torch.zeros(0)
        if grads:
            wide = torch.float64 if any(grad.dtype == torch.float64 for grad in grads) else torch.float32
            each = torch.stack([norm.to(grads[0].device) for norm in torch._foreach_norm(grads, 2, dtype=wide)])
        self._recorded.append(([path for path, _ in found], each))
        self.steps.append(step if step is not None else self.steps[-1] + 1 if self.steps else 0)

    @property
    def norms(self) -> Tensor:
        """‖grad‖ over all parameters of a path, float64 `[steps, paths]` on the CPU; NaN where there was none."""
        norms = torch.full((len(self.steps), len(self.names)), torch.nan, dtype=torch.float64)
        for row, (found, each) in zip(norms, self._recorded, strict=True):
            paths = torch.tensor(found, dtype=torch.int64)
            squares = torch.zeros_like(row).index_add(0, paths, each.detach().cpu().double().square())
            row[paths] = squares.sqrt()[paths]
        return norms

    def plot(self, ax: Axes | None = None) -> Axes:
        """log₁₀ of the norms, steps from left to right, path 0 at the bottom; grey where there was no gradient. Returns
        the axes."""
        ax = axes_or_new(ax)
        logs = self.norms.T.log10()
        logs[logs.isinf()] = torch.nan
        ax.set_facecolor("lightgrey")
        image = ax.imshow(logs.numpy(), aspect="auto", origin="lower", cmap="cividis", interpolation="nearest")
        label_layers(ax, [str(step) for step in self.steps], self.names)
        ax.set(xlabel="step", ylabel="path")
        ax.figure.colorbar(image, ax=ax, label="log₁₀ of the gradient's norm")
        return ax
