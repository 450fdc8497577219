"""Training of the original, with masks set by hooks, and of the converted model, with a scheme.

Both are in training mode with dropout off, as exactness is claimed for deterministic branches. BatchNorm is in eval
mode; separate measurements run it in training mode."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._python_dispatch import TorchDispatchMode

import rdp_kernels as rdp

from .found import FLOORS, PRECISIONS, Difference, Inputs, Measured, call, mapped, tensors_of
from .original import Mask, Masked, NoDropout, Place, place_of

Found = dict[str, Tensor | None]
"""Outputs and gradients; None where there is no gradient."""
SHARED = "reuse: gradients of weights that a dropped path shares with a kept one or with the rest"


class Whole(nn.Module):
    """A model that takes its inputs as one argument."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, inputs: Inputs) -> Any:
        return call(self.model, inputs)


class Twins:
    """Copies of the original and of the converted model, in float64 where it can be cast."""

    def __init__(self, original: nn.Module, model: nn.Module, inputs: Inputs, measured: Measured):
        self.measured = measured
        dtype = _precision(original, inputs, measured)
        self.inputs = mapped(inputs, lambda t: t.to(dtype) if t.is_floating_point() else t)
        self.rows = len(next(iter(inputs.values())) if isinstance(inputs, Mapping) else inputs)
        self.original, self.ours = (Whole(copy.deepcopy(net).to(dtype)).train() for net in (original, model))
        scheme = rdp.ResidualDropPath(self.ours)
        self.paths = scheme.paths
        scheme.remove()
        self.places = self._places()
        self.masked = Masked(self.original.model, [place for place in self.places if place is not None])
        self.batch_norms = any(path.module.spec.batch_norm for path in self.paths)
        self._silence_the_rest()
        self.state = {name: value.clone() for name, value in self.original.state_dict().items()}
        self.names = {id(p): f"the gradient of {name}" for name, p in self.ours.named_parameters()}

    def _places(self) -> list[Place | None]:
        names = {id(module): name for name, module in self.ours.model.named_modules()}
        numbers: dict[str, itertools.count[int]] = {}
        places = []
        for path in self.paths:
            block, spec = names[id(path.module.block)], path.module.spec
            number = next(numbers.setdefault(block, itertools.count()))
            before = self.original.model.get_submodule(block)
            places.append(place_of(before, block, spec.name, spec.drop_path, number))
        if None in places:
            self.measured.note(f"{places.count(None)} paths: where their branches end isn't written down here")
        return places

    def _silence_the_rest(self) -> None:
        """Turns off dropout, refused and nested drop-paths, and other calls of converted drop-paths."""
        converted = {id(path.module.drop_path) for path in self.paths}
        for net in (self.original, self.ours):
            for module in net.modules():
                if "Drop" in type(module).__name__ or "StochasticDepth" in type(module).__name__:
                    module.training = id(module) in converted
                if id(module) in converted and module is not None:
                    module.forward = lambda x, *_, **__: x  # type: ignore[method-assign]

    def _probs(self) -> list[float]:
        """A different rate for each path; 0 for a branch whose mask can't be set in the original."""
        return [0.0 if place is None else 0.1 + 0.15 * (i % 5) for i, place in enumerate(self.places)]

    def _begin(self, batch_norm: bool) -> None:
        """Restores the initial state, with BatchNorm in training mode or not."""
        for net in (self.original, self.ours):
            net.load_state_dict(self.state)
            for module in net.modules():
                if isinstance(module, _BatchNorm):
                    module.training, module.track_running_stats = batch_norm, module.running_mean is not None

    def _mask(self, keep: Iterable[Tensor]) -> None:
        masks = zip(self.places, keep, self._probs(), strict=True)
        self.masked.set({place: Mask(k, 1 / (1 - p)) for place, k, p in masks if place is not None})

    # Masks; everything learns

    def check_masks(self) -> None:
        """Keeps all, some and no rows."""
        some = self._some()
        self._check_masks("every row kept", torch.ones_like(some), batch_norm=False)
        self._check_masks("some rows kept", some, batch_norm=False)
        self._check_masks("no row kept", torch.zeros_like(some), batch_norm=False)
        if self.batch_norms:
            self._check_masks("some rows kept and BatchNorm in training mode", some, batch_norm=True)

    def _some(self) -> Tensor:
        """bool [paths, rows]; all or no rows for a path that is decided for the whole batch.

        Two rows or more where there is a BatchNorm: for one, torch 2.13's own backward of an eval-mode BatchNorm is
        wrong on CPUs, for a gradient of strides (C, 1, W · C, C).
        """
        generator = torch.Generator().manual_seed(0)
        keep = torch.ones(len(self.paths), self.rows, dtype=torch.bool)
        for path, row in zip(self.paths, keep, strict=True):
            most = max(2, self.rows - self.batch_norms)
            dropped = int(torch.randint(1, most, (), generator=generator))
            row[torch.randperm(self.rows, generator=generator)[:dropped]] = False
            if path.module.mode == "block":
                row[:] = row[0].clone()
        return keep

    def _check_masks(self, what: str, keep: Tensor, batch_norm: bool) -> None:
        keep = keep.clone()
        keep[[place is None for place in self.places]] = True
        self._begin(batch_norm)
        self._mask([k[0] if path.module.mode == "block" else k for path, k in zip(self.paths, keep, strict=True)])
        expected = self._run(self.original)
        scheme = rdp.ResidualDropPath(self.ours, 0.5, mode="sample", freeze="none")
        try:
            with scheme.drop_iteration(self.rows, plan=rdp.PathPlan(keep, self._probs(), "sample")):
                actual = self._run(self.ours)
        finally:
            scheme.remove()
        self._compare(f"with {what}", expected, actual)
        dropped = [path for path, k in zip(self.paths, keep, strict=True) if not k.any()]
        self._compare_buffers(f"with {what}", except_for=self._buffers_of(dropped))

    # The two iterations

    def check_pairs(self) -> None:
        """Drops half of the paths, and then the other half."""
        order = torch.randperm(len(self.paths), generator=torch.Generator().manual_seed(1))
        half = (torch.arange(len(self.paths)) % 2 == 1)[order]
        for batch_norm in (False, True) if self.batch_norms else (False,):
            for what, keep in (("half of the paths dropped", half), ("the others dropped", ~half)):
                keep = keep | torch.tensor([place is None for place in self.places])
                if not keep.all():
                    self._check_pair(what + ", BatchNorm in training mode" * batch_norm, keep, batch_norm)

    def _check_pair(self, what: str, keep: Tensor, batch_norm: bool) -> None:
        self._begin(batch_norm)
        pair = _Pair(self, keep)
        scheme, phases = rdp.ResidualDropPath(self.ours, 0.5, mode="block"), []
        try:
            for phase in scheme.iterations(plan=rdp.PathPlan(keep, self._probs(), "block")):
                phases.append(phase)
                (pair.drop if phase == "drop" else pair.reuse)(f"{what}, {phase} iteration:")
        finally:
            scheme.remove()
        if phases != (["drop", "reuse"] if pair.of_dropped else ["drop"]):
            raise Difference(f"{what}: the iterations are {phases}")

    def _buffers_of(self, paths: Iterable[Any]) -> set[str]:
        inside = {id(m) for path in paths for module in path.module.branch_modules() for m in module.modules()}
        named = [(name, module) for name, module in self.ours.named_modules() if id(module) in inside]
        return {f"{name}.{buffer}" for name, module in named for buffer in module._buffers}

    # Running and comparing

    def _run(self, net: Whole) -> Found:
        net.zero_grad(set_to_none=True)
        leaves: dict[str, Tensor] = {}

        def leaf(t: Tensor) -> Tensor:
            if not t.is_floating_point():
                return t
            t = leaves[f"the gradient of input {len(leaves)}"] = t.detach().clone().requires_grad_()
            return t.view_as(t)  # not a leaf: models work in place

        given = mapped(self.inputs, leaf)
        torch.manual_seed(0)
        with NoDropout():
            outputs = tensors_of(net(given))
        learning = [(t, torch.Generator().manual_seed(i)) for i, t in enumerate(outputs) if t.requires_grad]
        weights = [torch.rand(t.shape, generator=generator, dtype=t.dtype) + 0.5 for t, generator in learning]
        if learning:
            torch.autograd.backward([t for t, _ in learning], weights)
        found: Found = {f"output {i}": t.detach() for i, t in enumerate(outputs)}
        found |= {name: t.grad for name, t in leaves.items()}
        return found | {f"the gradient of {name}": p.grad for name, p in net.named_parameters()}

    def _compare(self, when: str, expected: Found, actual: Found, except_for: set[str] = frozenset()) -> None:  # type: ignore[assignment]
        if expected.keys() != actual.keys():
            raise Difference(f"{when} there are {len(actual)} outputs and gradients instead of {len(expected)}")
        floor, tolerance = FLOORS[self.measured.precision], PRECISIONS[self.measured.precision]
        largest = {True: 0.0, False: 0.0}
        for name, value in expected.items():
            largest[name.startswith("output")] = max(largest[name.startswith("output")], size(value))
        for name, value in expected.items():
            if name in except_for:
                continue
            unit = max(size(value), floor * largest[name.startswith("output")])
            difference = _difference(value, actual[name])
            error = 0.0 if difference == 0 else difference / unit if unit else float("inf")
            if not error <= tolerance:
                raise Difference(f"{when} {name} differs from the original's by {error:.1e} of its largest element")
            self.measured.error = max(self.measured.error, error)

    def _compare_buffers(self, when: str, except_for: set[str] = frozenset()) -> None:  # type: ignore[assignment]
        ours, tolerance = dict(self.ours.named_buffers()), PRECISIONS[self.measured.precision]
        for name, value in self.original.named_buffers():
            if name not in except_for and not torch.allclose(value, ours[name], tolerance, tolerance, equal_nan=True):
                raise Difference(f"{when} the buffer {name} differs from the original's")


class _Pair:
    """A drop iteration and its reuse iteration against the original, under one plan in block mode."""

    def __init__(self, twins: Twins, keep: Tensor):
        self.twins, self.keep = twins, keep
        dropped = [path for path, k in zip(twins.paths, keep, strict=True) if not k]
        kept = [path for path, k in zip(twins.paths, keep, strict=True) if k]
        self.of_dropped, self.of_kept = (
            {twins.names[id(p)] for path in paths for p in path.parameters()} for paths in (dropped, kept)
        )
        self.buffers = twins._buffers_of(dropped)
        self.elsewhere: set[str] = set()
        """Gradients of parameters of dropped paths that the rest uses too."""

    def drop(self, what: str) -> None:
        """Paths are masked. Dropped paths get no gradient, and their running statistics don't move."""
        twins = self.twins
        twins._mask(self.keep)
        before = {name: b.clone() for name, b in twins.original.named_buffers()}
        expected, actual = twins._run(twins.original), twins._run(twins.ours)
        alone = self.of_dropped - self.of_kept
        self.elsewhere = {name for name in alone if size(expected[name]) > 0}
        _check_none(what, actual, alone - self.elsewhere)
        twins._compare(what, expected, actual)
        for name, buffer in twins.original.named_buffers():
            if name in self.buffers:
                buffer.copy_(before[name])
        twins._compare_buffers(what)

    def reuse(self, what: str) -> None:
        """Nothing is masked. Only dropped paths get a gradient, and only their BatchNorms move."""
        twins = self.twins
        twins.masked.set({})
        for name, module in twins.original.named_modules():
            if isinstance(module, _BatchNorm) and f"{name}.running_mean" not in self.buffers:
                module.track_running_stats = False
        expected, actual = twins._run(twins.original), twins._run(twins.ours)
        frozen = set(twins.names.values()) - self.of_dropped
        shared = self.of_dropped & (self.of_kept | self.elsewhere)
        _check_none(what, actual, frozen)
        if shared:
            twins.measured.note(SHARED)
        twins._compare(what, expected, actual, except_for=frozen | shared)
        twins._compare_buffers(what)


def size(x: Tensor | None) -> float:
    """The largest finite element."""
    return 0.0 if x is None or x.numel() == 0 else float(x[x.isfinite()].abs().max() if x.isfinite().any() else 0.0)


def _difference(a: Tensor | None, b: Tensor | None) -> float:
    """The largest difference; infinities may be equal. None counts as zeros."""
    if a is None or b is None:
        given = b if a is None else a
        return 0.0 if given is None or given.numel() == 0 else float(given.abs().max())
    if a.shape != b.shape:
        return float("inf")
    same = (a == b) | (a.isnan() & b.isnan())
    return 0.0 if a.numel() == 0 else float((a - b).masked_fill(same, 0.0).abs().max())


def _check_none(what: str, found: Found, names: set[str]) -> None:
    for name in sorted(names):
        if found[name] is not None:
            raise Difference(f"{what} {name} is not None")


def _precision(original: nn.Module, inputs: Inputs, measured: Measured) -> torch.dtype:
    """Sets the precision in which the model can be compared, and returns the dtype that it is cast to."""
    wide = mapped(inputs, lambda t: t.double() if t.is_floating_point() else t)
    copied = copy.deepcopy(original).eval().double()
    try:
        with torch.no_grad(), _Narrow() as narrow:
            call(copied, wide)
    except Exception:
        measured.precision = "float32"
        return torch.float32
    measured.precision = "parts in float32" if narrow.seen else "float64"
    return torch.float64


class _Narrow(TorchDispatchMode):
    """Records whether anything is computed in less than float64."""

    seen = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.seen = self.seen or any(value.dtype != torch.float64 for value in tensors_of(out))
        return out
