"""`torch.compile` for a whole model with a scheme. Plans are data, so one graph serves all plans.

The graph runs every branch on every row and multiplies by 0 or the scale. It is exact, but it skips no work.
`compile_branches` skips work.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .._utils.device import to_device
from ..paths.freezing import keeps_statistics
from ..paths.path import modules_of
from ..scheme.scheme import ResidualDropPath
from ._checks import check_scheme

__all__ = ["compile_whole"]


def compile_whole(model: nn.Module, scheme: ResidualDropPath, **options: Any) -> nn.Module:
    """Compiles `model` as a whole, for training with `scheme`.

    Outputs and gradients are those of the scheme for any plan, with one graph. The graph also computes gradients for
    idle parameters. Hooks discard these, so the `.grad` of idle parameters doesn't change. Run backward before the next
    iteration's forward. Weights and outputs have to be finite in dropped branches too: zeros go backward through these,
    and 0 · Inf is NaN.

    Args:
        model: the model that `scheme` was made for, or a module that contains it.
        scheme: in block mode, or with `freeze="branch"` or `"none"`.
        **options: options of `torch.compile`. `fullgraph` is True by default.

    Returns:
        The result of `torch.compile`. Call it instead of the model.

    Raises:
        TypeError: if `scheme` isn't a `ResidualDropPath`.
        ValueError: if it can't be exact: with BatchNorm in branches or frozen, with single samples frozen by
            `freeze="parameters"`, or with a frozen weight that is shared. Also if `model` isn't the scheme's.

    Example:
        >>> from rdp_kernels.integrations.compile_whole import compile_whole
        >>> branches = [rdp.ResidualBranch(nn.Linear(8, 8)) for _ in range(4)]
        >>> model = nn.Sequential(*branches)
        >>> scheme = rdp.ResidualDropPath(model, drop_prob=0.5)
        >>> compiled = compile_whole(model, scheme, backend="eager")  # the default backend is inductor
        >>> for _ in scheme.iterations():
        ...     compiled(torch.randn(8, 8)).square().mean().backward()
    """
    _check(model, scheme)
    compiled: Any = torch.compile(model, **{"fullgraph": True, **options})
    plan = _PlanAsData(scheme)
    compiled.register_forward_pre_hook(plan.hand_over)
    compiled.register_forward_hook(plan.take_back, always_call=True)
    return compiled


def _check(model: nn.Module, scheme: ResidualDropPath) -> None:
    check_scheme(scheme)
    if not any(m is scheme._rest.model for m in model.modules()):
        raise ValueError("model must be, or contain, the model that scheme was made for")
    rules = scheme._rules
    for path in scheme.paths:
        if any(map(keeps_statistics, modules_of(path.module))):
            raise ValueError(f"path {path.name!r}: in a graph a dropped branch would update its running statistics")
    if rules.freezes_rest and rules.freeze_bn and any(map(keeps_statistics, model.modules())):
        raise ValueError("BatchNorm can't be frozen in a graph: use train_rest=True or freeze_bn=False")
    if scheme.mode == "sample" and rules.freeze == "parameters":
        raise ValueError('weights can\'t be frozen for single samples in a graph: use freeze="branch", or mode="block"')
    holders = {id(p): "the rest" for p in scheme._rest.parameters()} if rules.freezes_rest else {}
    for path in scheme.paths:
        for parameter in path.parameters():
            other = holders.setdefault(id(parameter), path.name)
            if other != path.name and (rules.freeze == "parameters" or other == "the rest"):
                raise ValueError(f"in a graph, a parameter of path {path.name!r} that {other} shares can't be frozen")


class _PlanAsData:
    """Passes the plan to the paths for a forward, and determines which gradients are discarded."""

    def __init__(self, scheme: ResidualDropPath):
        self._scheme = weakref.ref(scheme)
        self._gradients = _Gradients()

    def hand_over(self, module: nn.Module, _: Any) -> None:
        self._gradients.ignored = set()
        scheme = self._scheme()
        if scheme is None:
            return
        scheme._rest.in_graph = True
        iteration = scheme._pairs.open if module.training else None
        if iteration is None:
            return
        scheme._rest.refresh()
        rest_learns = iteration.phase == "drop" or not scheme._rules.freezes_rest
        groups = [(scheme._rest.parameters(), rest_learns)]
        groups += [(path.parameters(), iteration.learns(path.index)) for path in scheme.paths]
        known = {id(p): p for parameters, _ in groups for p in parameters}
        self._gradients.ignored = known.keys() - {id(p) for parameters, learn in groups if learn for p in parameters}
        self._gradients.watch(known.values())
        masks = to_device(iteration.graph_masks(), next(iter(known.values())).device)
        for path, learns, frozen in zip(scheme.paths, *masks, strict=True):
            path.module.binding.graph_mask = (learns, frozen) if scheme.freeze == "branch" else (learns + frozen, None)

    def take_back(self, *_: Any) -> None:
        scheme = self._scheme()
        if scheme is not None:
            scheme._rest.in_graph = False
            for path in scheme.paths:
                path.module.binding.graph_mask = None


class _Gradients:
    """Discards what a backward accumulates into the `.grad` of the parameters in `ignored`, given by id."""

    def __init__(self) -> None:
        self.ignored: set[int] = set()
        self._set_aside: dict[int, Tensor | None] = {}
        self._watched: dict[int, weakref.ref[Tensor]] = {}

    def watch(self, parameters: Iterable[nn.Parameter]) -> None:
        for parameter in parameters:
            reference = self._watched.get(id(parameter))
            if parameter.requires_grad and (reference is None or reference() is not parameter):
                reference = self._watched[id(parameter)] = weakref.ref(parameter)
                parameter.register_hook(functools.partial(self._before, reference))
                parameter.register_post_accumulate_grad_hook(self._after)

    def _before(self, reference: weakref.ref[Tensor], _: Tensor) -> None:
        parameter = reference()
        if parameter is not None and id(parameter) in self.ignored:
            self._set_aside[id(parameter)], parameter.grad = parameter.grad, None

    def _after(self, parameter: Tensor) -> None:
        if id(parameter) in self._set_aside:
            parameter.grad = self._set_aside.pop(id(parameter))
