"""The norms of gradients, by path: for one loss, and over the steps of a training."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from ..paths.call import PathCall
from ..paths.path import find_path_modules, parameters_of
from ._display import Axes, axes_or_new, label_layers
from .observe import overriding, undisturbed


@dataclass(frozen=True)
class GradientNorms:
    """Euclidean norms of a loss's gradients, for each path.

    `gradient_norms` returns it. A norm is NaN if there is no gradient.

    Attributes:
        names: the paths' names.
        parameters: ‖∂L/∂θ‖ for each path, over all its parameters that require grad. NaN if the loss depends on none.
        stream: ‖∂L/∂x‖ at the input x of each path, which is the residual before it. NaN if the loss doesn't depend on
            x. It is also NaN if nothing before the path learns and the path's shortcut is computed outside of it.

    Example:
        >>> from rdp_kernels import diagnostics
        >>> branches = [rdp.ResidualBranch(nn.Linear(8, 8)) for _ in range(4)]
        >>> model = nn.Sequential(*branches)
        >>> x = torch.randn(16, 8)
        >>> norms = diagnostics.gradient_norms(model, lambda m: m(x).square().mean())
        >>> norms.names, all(norm > 0 for norm in norms.parameters + norms.stream)
        (['0', '1', '2', '3'], True)
    """

    names: list[str]
    parameters: list[float]
    stream: list[float]

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draws both norms by path, on a logarithmic scale.

        Args:
            ax: where to draw. None makes a new pyplot figure.

        Returns:
            The axes.
        """
        ax = axes_or_new(ax)
        for values, label, style in ((self.parameters, "path's parameters", "o-"), (self.stream, "residual", "s--")):
            ax.plot(range(len(values)), values, style, label=f"norm of the gradient of the {label}")
        label_layers(ax, self.names)
        ax.set_xlabel("path")
        if any(value > 0 for value in self.parameters + self.stream):
            ax.set_yscale("log")
        ax.legend()
        return ax


def gradient_norms(model: nn.Module, loss: Callable[[Any], Tensor], *, training: bool = False) -> GradientNorms:
    """Measures the gradients of a loss in one forward and backward.

    By default the model is in eval mode. The result is then the gradient of the network as it is used for inference,
    and doesn't depend on random draws. With `training=True` the whole model is in training mode: drop-path and dropout
    draw masks, and BatchNorm uses the batch's statistics. In both cases modes, `.grad`, buffers and torch's random
    states don't change.

    Tied weights are in the norm of each path that has them. A path that is called several times has one norm over all
    its calls.

    Args:
        model: a model with paths.
        loss: `loss(model)` returns a scalar tensor.
        training: whether to measure in training mode.

    Returns:
        The norms, by path.

    Raises:
        RuntimeError: if `training` is true inside an iteration of a scheme, where a forward follows the plan.
        TypeError: if `loss` doesn't return a scalar that depends on the model by autograd.
        ValueError: if the model has no paths.

    Example:
        >>> from rdp_kernels import diagnostics
        >>> branches = [rdp.ResidualBranch(nn.Linear(8, 8)) for _ in range(4)]
        >>> model = nn.Sequential(*branches)
        >>> loss = lambda m: m(torch.randn(4, 8)).square().mean()
        >>> norms = diagnostics.gradient_norms(model, loss, training=True)
        >>> len(norms.parameters), model[0].fn.weight.grad is None
        (4, True)
    """
    path_modules = find_path_modules(model)
    for name, path_module in path_modules.items():
        scheme = path_module.binding.scheme
        if training and scheme is not None and scheme.phase is not None:
            raise RuntimeError(f"path {name!r} is in an open {scheme.phase} iteration: training must be False there")
    inputs: dict[int, list[GradientEdge]] = {}

    def note_input(path: int, call: PathCall, x: Tensor) -> Tensor:
        x, whole = requiring_grad(x, call)
        if whole:  # the edge belongs to this value, even if later code writes to the tensor
            inputs.setdefault(path, []).append(get_gradient_edge(x))
        return call.run(x)

    modules = path_modules.values()
    parameters = [[p for p in dict.fromkeys(parameters_of(module)) if p.requires_grad] for module in modules]
    with undisturbed(model), _own_buffers(model) if training else contextlib.nullcontext():
        model.train(training)
        with torch.enable_grad(), overriding(model, note_input):
            value = checked_loss(loss(model))
        groups: list[Sequence[Any]] = [*parameters, *(inputs.get(path, []) for path in range(len(path_modules)))]
        found = iter(torch.autograd.grad(value, [t for group in groups for t in group], allow_unused=True))
    norms = [_norm([next(found) for _ in group]) for group in groups]
    return GradientNorms(list(path_modules), norms[: len(path_modules)], norms[len(path_modules) :])


def checked_loss(value: object) -> Tensor:
    """Returns `value` if it is a scalar tensor that autograd can differentiate. Otherwise raises `TypeError`."""
    if not isinstance(value, Tensor) or value.numel() != 1 or not value.requires_grad:
        came = type(value).__name__
        if isinstance(value, Tensor):
            came = f"one of shape {list(value.shape)}, requires_grad={value.requires_grad}"
        raise TypeError(f"loss must return a scalar tensor that depends on the model by autograd, got {came}")
    return value


def requiring_grad(x: Tensor, call: PathCall) -> tuple[Tensor, bool]:
    """Makes the input of a path require grad. Returns it, and whether its gradient is all that comes through the path.

    It isn't the whole gradient if nothing before the path learns and a shortcut was computed before, from the original
    tensor.
    """
    if x.requires_grad:
        return x, True
    return x.detach().requires_grad_(), call.known_residual is None


def _norm(grads: list[Tensor | None]) -> float:
    squares = [grad.detach().double().square().sum().item() for grad in grads if grad is not None]
    return math.sqrt(sum(squares)) if squares else math.nan


@contextlib.contextmanager
def _own_buffers(model: nn.Module) -> Iterator[None]:
    """Replaces the model's buffers by copies within the context, so that writes of BatchNorm are discarded."""
    places = [(module, *place) for module in model.modules() for place in module.named_buffers(recurse=False)]
    for module, name, buffer in places:
        setattr(module, name, buffer.clone())
    try:
        yield
    finally:
        for module, name, buffer in places:
            setattr(module, name, buffer)


class GradientNormRecorder:
    """Records the norms of the paths' `.grad` over the steps of a training.

    It works in any loop, with a scheme or without one. A path without any gradient has NaN. With
    `zero_grad(set_to_none=True)`, torch's default, these are the paths that were dropped in a drop iteration or frozen
    in a reuse iteration.

    Args:
        model: a model with paths. Gradients have to be dense, plain tensors.

    Attributes:
        names: the paths' names.
        steps: the number of each recorded step.

    Raises:
        ValueError: if the model has no paths.

    Example:
        >>> from rdp_kernels import diagnostics
        >>> branches = [rdp.ResidualBranch(nn.Linear(8, 8)) for _ in range(4)]
        >>> model = nn.Sequential(*branches)
        >>> scheme = rdp.ResidualDropPath(model, drop_prob=0.5, sampling="fixed")
        >>> recorder = diagnostics.GradientNormRecorder(model)
        >>> for _ in scheme.iterations():
        ...     model(torch.randn(4, 8)).square().mean().backward()
        ...     recorder.record()  # before zero_grad; with a GradScaler after unscale_
        ...     model.zero_grad()
        >>> recorder.norms.isnan().sum(dim=1)  # two paths are dropped, then two are frozen
        tensor([2, 2])
    """

    def __init__(self, model: nn.Module):
        path_modules = find_path_modules(model)
        self.names = list(path_modules)
        self.steps: list[int] = []
        modules = enumerate(path_modules.values())
        self._parameters = [(i, p) for i, module in modules for p in dict.fromkeys(parameters_of(module))]
        self._recorded: list[tuple[list[int], Tensor]] = []  # for each step the path and the norm of each gradient

    def record(self, step: int | None = None) -> None:
        """Records the current norms.

        It takes one foreach norm over the gradients and doesn't wait for the device. Call it after `backward` and
        before the optimizer's `zero_grad`. With a GradScaler, call it after `scaler.unscale_`.

        Args:
            step: the number of the step. None is the number after the last one, or 0 at first.
        """
        found = [(path, p.grad) for path, p in self._parameters if p.grad is not None]
        grads = [grad for _, grad in found]
        each = torch.zeros(0)
        if grads:
            wide = torch.float64 if any(grad.dtype == torch.float64 for grad in grads) else torch.float32
            each = torch.stack([norm.to(grads[0].device) for norm in torch._foreach_norm(grads, 2, dtype=wide)])
        self._recorded.append(([path for path, _ in found], each))
        next_step = self.steps[-1] + 1 if self.steps else 0
        self.steps.append(next_step if step is None else step)

    @property
    def norms(self) -> Tensor:
        """‖grad‖ over all parameters of each path, float64 `[steps, paths]` on the CPU. NaN without a gradient."""
        norms = torch.full((len(self.steps), len(self.names)), torch.nan, dtype=torch.float64)
        for row, (found, each) in zip(norms, self._recorded, strict=True):
            paths = torch.tensor(found, dtype=torch.int64)
            squares = torch.zeros_like(row).index_add(0, paths, each.detach().cpu().double().square())
            row[paths] = squares.sqrt()[paths]
        return norms

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draws log₁₀ of the norms by step and path, grey without a gradient.

        Args:
            ax: where to draw. None makes a new pyplot figure.

        Returns:
            The axes.
        """
        ax = axes_or_new(ax)
        logs = self.norms.T.log10()
        logs[logs.isinf()] = torch.nan
        ax.set_facecolor("lightgrey")
        image = ax.imshow(logs.numpy(), aspect="auto", origin="lower", cmap="cividis", interpolation="nearest")
        label_layers(ax, [str(step) for step in self.steps], self.names)
        ax.set(xlabel="step", ylabel="path")
        ax.figure.colorbar(image, ax=ax, label="log₁₀ of the gradient's norm")
        return ax
