"""One call of a path: the single place where a residual branch is run, skipped, frozen or bypassed.

`ResidualBranch` and the paths of converted blocks call `run_path`. What to do comes as a `Decision`, from the scheme
whose iteration is open, else from the path's own drop probability.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .._utils.checks import check_residual_add, check_stream, host_has
from .._utils.device import to_device
from .._utils.ranks import world_size
from ..kernels.autograd import fused_add, plain_add, unchecked_add
from ..kernels.eager import residual_add
from ..kernels.recorded import is_recorded
from ..kernels.spec import Add, Operands, RowSet, activated, compute_dtype, row_set
from ..plan import kept_scale
from . import recorded
from .arguments import left_behind, name_of, not_a_tensor
from .freezing import (
    Frozen,
    RequiresGrad,
    SaveLess,
    bypass,
    check_freezable,
    refuse_second_derivatives,
    save_less_pays,
    touch,
)
from .norms import Norm
from .path import ROWS_OF_BATCH_NORM, WHOLE, Decision, PathModule, batch_norms_of, modules_of, places_of


def run_path(
    module: PathModule, x: Tensor, args: tuple, kwargs: dict[str, Any], residual: Tensor | None = None
) -> Tensor:
    """`act(shortcut(x) + row_scale · γ · branch(x))` with the branch run on the rows that the decision asks for;
    `residual`: what the shortcut gave, where that was computed already."""
    compiling = torch.compiler.is_compiling()
    if not compiling and is_recorded(x):
        return recorded.run_path(module, x, args, kwargs, residual)
    check_stream("x", x)
    call = PathCall(module, x.shape[0], args, kwargs, residual)
    if module.binding.call_override is not None:
        return module.binding.call_override(call, x)
    if compiling and module.training:
        if module.binding.graph_mask is not None:
            return call.planned_in_graph(x, *module.binding.graph_mask)
        if module.binding.scheme is None or module.binding.scheme.phase is None:
            return call.run(x, call.draw(x))
    return call.run(x, call.decide(x))


class PathCall:
    """One call of a path with its further arguments."""

    def __init__(
        self, module: PathModule, batch_size: int, args: tuple, kwargs: dict[str, Any], residual: Tensor | None = None
    ):
        self.module, self.batch_size, self.args, self.kwargs = module, batch_size, args, kwargs
        self.given_residual = residual

    @functools.cached_property
    def modules(self) -> list[nn.Module]:
        """Those of the branch. Looking them up costs as much as freezing them."""
        return modules_of(self.module)

    def decide(self, x: Tensor) -> Decision:
        module = self.module
        if not module.training:
            return WHOLE
        decision = module.binding.decide(x)
        return self.draw(x) if decision is None else decision

    def draw(self, x: Tensor) -> Decision:
        module = self.module
        drop_prob = module.drop_prob
        return WHOLE if drop_prob == 0 else draw_decision(x, drop_prob, module.mode, module.scale_by_keep)

    def run(self, x: Tensor, decision: Decision) -> Tensor:
        if not decision.dummy_calls:
            return self.run_here(x, decision)
        # In the order of the calls that other ranks make: collectives of theirs wait for ours.
        others = [self.run_dummy(x, decision, learning=False)] if "frozen" in decision.dummy_calls else []
        out = self.run_here(x, decision)
        if "learning" in decision.dummy_calls:
            gamma, branch = self.module.gamma, self.run_dummy(x, decision, learning=True)
            others += [branch, *([] if gamma is None else [gamma])]
            if not decision.runs:
                out = self.promoted(out, branch.dtype)
        return touch(out, others)

    def run_dummy(self, x: Tensor, decision: Decision, learning: bool) -> Tensor:
        """The branch on a row of zeros; with BatchNorm, whose statistics ranks may share, on the batch."""
        rows = None
        if not batch_norms_of(self.module):
            rows = torch.zeros(1, dtype=torch.int64, device=x.device)
            x = x.new_zeros(1, *x.shape[1:]).requires_grad_(x.requires_grad)
        return (self.learning_branch if learning else self.frozen_branch)(x, decision, rows)

    def run_here(self, x: Tensor, decision: Decision) -> Tensor:
        if decision.row_scale is not None:
            row_scale = self.for_rows(decision.row_scale, x)
            return self.add(self.residual(x), self.learning_branch(x, decision), row_scale=row_scale)
        if decision.rows is not None:
            return self.masked(x, decision) if self.needs_all_rows(decision.rows) else self.on_rows(x, decision)
        if decision.learning:
            return self.add(self.residual(x), self.learning_branch(x, decision), scale=decision.scale)
        if decision.frozen:
            return self.frozen(x, decision)
        residual = self.residual(x) if decision.dummy_calls else self.without_branch(x)
        return activated(residual, self.module.activation)

    def without_branch(self, x: Tensor) -> Tensor:
        """The residual, in the dtype that its sum with the branch would have."""
        residual, promotion = self.residual(x), self.module.promotion
        return residual if promotion is None else residual.to(promotion.without_branch(self, x, residual.dtype))

    def promoted(self, residual: Tensor, branch: torch.dtype) -> Tensor:
        """The residual, in the dtype of its sum with a branch of dtype `branch`."""
        promotion = self.module.promotion
        return residual if promotion is None else residual.to(promotion.of(residual.dtype, branch))

    def widened(self, residual: Tensor, branch: torch.dtype) -> Tensor:
        """The residual, for a sum that may be cast to a narrower dtype later, and is rounded once."""
        promotion = self.module.promotion
        if promotion is None or branch == residual.dtype:
            return residual
        return residual.to(torch.promote_types(residual.dtype, promotion.of(residual.dtype, branch)))

    def residual(self, x: Tensor) -> Tensor:
        if self.given_residual is not None:
            return self.given_residual
        if self.module.shortcut is None:
            return x
        out = self.module.shortcut(x)
        if not isinstance(out, Tensor):
            raise not_a_tensor(self.module, "shortcut", out)
        return out

    def branch(self, x: Tensor, rows: Tensor | None = None, normed: bool = False) -> Tensor:
        args, kwargs = self.args, self.kwargs
        if rows is not None:
            args, kwargs = self.module.map_rows(lambda t: _select(t, rows), self.batch_size, args, kwargs)
        runner = self.module.binding.branch_runner
        single = rows is not None and x.shape[0] == 1  # compilers make a graph of its own for a single row
        try:
            if runner is None or single or torch.compiler.is_compiling():
                out = self.module.run_branch(x, args, kwargs, normed)
            else:
                out = runner(self.module, x, args, kwargs, normed)
        except (RuntimeError, ValueError, TypeError, IndexError, AssertionError) as error:
            if rows is not None and not isinstance(error, torch.OutOfMemoryError):
                self._check_followed(x, args, kwargs, f"raises {type(error).__name__}: {error}", error)
            raise
        if not isinstance(out, Tensor):
            raise not_a_tensor(self.module, "branch", out)
        if rows is not None and out.shape[:1] != x.shape[:1]:
            self._check_followed(x, args, kwargs, f"returns shape {list(out.shape)}")
        return out

    def _check_followed(self, x: Tensor, args: tuple, kwargs: dict, what: str, cause: Exception | None = None) -> None:
        """Raises `ValueError` where arguments kept all their rows although the branch got some rows of x, and fails."""
        takes = getattr(self.module, "takes", None)
        if takes is None or x.shape[0] == self.batch_size:
            return
        names = left_behind(self.batch_size, self.args, self.kwargs, (args, kwargs), takes())
        if names:
            raise ValueError(
                f"the branch of {name_of(self.module)} {what}. It was run on {x.shape[0]} of {self.batch_size} "
                f"rows with all {self.batch_size} rows of {', '.join(map(repr, names))}: name in per_sample what has a "
                f"row per sample, as per_sample={tuple(names)}"
            ) from cause

    def learning_branch(
        self, x: Tensor, decision: Decision, rows: Tensor | None = None, normed: bool = False
    ) -> Tensor:
        if not decision.also_learns:
            return self.branch(x, rows, normed)
        with RequiresGrad(decision.also_learns, True):
            return self.branch(x, rows, normed)

    def frozen_branch(self, x: Tensor, decision: Decision, rows: Tensor | None = None, normed: bool = False) -> Tensor:
        recorded = torch.is_grad_enabled() and decision.freeze != "branch"
        with self._frozen(decision), torch.set_grad_enabled(recorded):
            out = self.branch(x, rows, normed)
        return self.guarded(out) if recorded else out

    def guarded(self, out: Tensor) -> Tensor:
        """A frozen call's output; second derivatives are refused here where the frozen rest around doesn't do so."""
        scheme = self.module.binding.scheme
        return out if scheme is not None and scheme._rest.is_entered else refuse_second_derivatives(out)

    def needs_all_rows(self, rows: RowSet) -> bool:
        """A training BatchNorm: statistics of some rows would differ from those of the batch. And one in eval mode if a
        single row is left: torch 2.13's backward of that is wrong on CPUs for a gradient of strides (C, 1, W·C, C)."""
        batch_norms = batch_norms_of(self.module, self.modules)
        return any(m.training or m.running_mean is None or rows.num_learning == 1 for m in batch_norms)

    def add(
        self,
        residual: Tensor,
        branch: Tensor,
        frozen: Tensor | None = None,
        rows: RowSet | None = None,
        scale: float = 1.0,
        row_scale: Tensor | None = None,
    ) -> Tensor:
        if branch.dtype != residual.dtype and self.module.promotion is not None:
            wide = self.widened(residual, branch.dtype)
            return self.promoted(self._sum(wide, branch, frozen, rows, scale, row_scale), branch.dtype)
        return self._sum(residual, branch, frozen, rows, scale, row_scale)

    def _sum(
        self,
        residual: Tensor,
        branch: Tensor,
        frozen: Tensor | None,
        rows: RowSet | None,
        scale: float,
        row_scale: Tensor | None,
    ) -> Tensor:
        module = self.module
        if frozen is None and rows is None and row_scale is None and _is_plain(module):
            out = plain_add(residual, branch, scale)
            if out is not None:
                return out
        if frozen is None:
            index, factor = None if rows is None else rows.learning, scale if row_scale is None else row_scale
            options = (module.channel_dim, module.activation)
            out = unchecked_add(residual, branch, module.gamma, factor, index, *options)
            if out is not None:
                return out
        operands = Operands(residual, branch, frozen, module.gamma)
        return fused_add("path", operands, self.checked_add(operands, rows, scale, row_scale)).out

    def checked_add(
        self, operands: Operands, rows: RowSet | None, scale: float = 1.0, row_scale: Tensor | None = None
    ) -> Add:
        """How the branch is added. Raises `ValueError` or `TypeError` where its output doesn't fit."""
        module, residual = self.module, operands.residual
        options = (row_scale, module.gamma, module.channel_dim)
        check_residual_add(residual, operands.update, None if rows is None else rows.learning, *options)
        if operands.frozen_update is not None and rows is not None:
            check_residual_add(residual, operands.frozen_update, rows.frozen, *options)
        return Add(rows, scale, row_scale, module.channel_dim, module.activation)

    def masked(self, x: Tensor, decision: Decision) -> Tensor:
        """The branch whole, dropped rows masked."""
        rows = decision.rows
        assert rows is not None
        if rows.num_frozen:
            raise RuntimeError(f"{name_of(self.module)}: {ROWS_OF_BATCH_NORM}")
        row_scale = torch.zeros(len(x), dtype=compute_dtype(x), device=x.device)
        row_scale.index_fill_(0, rows.learning, decision.scale)
        return self.add(self.residual(x), self.learning_branch(x, decision), row_scale=row_scale)

    def planned_in_graph(self, x: Tensor, learning: Tensor, constant: Tensor | None) -> Tensor:
        """Under `torch.compile`, where no plan may be part of the graph: the branch whole, its rows times `learning`
        and, as constants, times `constant`; one of the two is 0."""
        module, residual, branch = self.module, self.residual(x), self.branch(x)
        if constant is not None:
            residual = self.widened(residual, branch.dtype)
            gamma, row_scale = None if module.gamma is None else module.gamma.detach(), self.for_rows(constant, x)
            residual = residual_add(
                residual, branch.detach(), row_scale=row_scale, gamma=gamma, channel_dim=module.channel_dim
            )
        return self.add(residual, branch, row_scale=self.for_rows(learning, x))

    def for_rows(self, scale: Tensor, x: Tensor) -> Tensor:
        """One number, or one for each row: the latter, as the ops take it."""
        return scale.to(compute_dtype(x)).expand(self.batch_size).contiguous()

    def on_rows(self, x: Tensor, decision: Decision) -> Tensor:
        """The branch on learning and on frozen rows: two calls and one add."""
        # A runner takes the norm in, so that it makes one thing of a branch on all rows and on some.
        norm = (
            Norm.of(self.module.norm, x, decision.also_learns) if self.module.binding.branch_runner is None else Norm()
        )
        next_input = norm.next_input(decision.rows, "frozen" if decision.freeze == "branch" else None)
        entered = fused_add("path", norm.operands()._replace(residual=x), next_input=next_input)
        updates = self.updates(decision, entered.next, entered.frozen_next, norm.fused)
        return self.add(self.residual(entered.out), *updates, decision.rows, decision.scale)

    def updates(
        self, decision: Decision, x: Tensor, x_frozen: Tensor | None, normed: bool
    ) -> tuple[Tensor, Tensor | None]:
        """The branch of its input's learning rows, or of all, and of its frozen rows."""
        rows = decision.rows
        if rows is None:
            run = self.learning_branch if decision.learning else self.frozen_branch
            return run(x, decision, None, normed), None
        if x_frozen is not None and parametrize._cache_enabled and any(map(parametrize.is_parametrized, self.modules)):
            raise RuntimeError(
                f"{name_of(self.module)} has parametrized weights, and parametrize.cached() would give its learning "
                "rows the weights that were made for frozen ones, without a gradient: leave cached() out, or take "
                "mode='block'"
            )
        frozen = None if x_frozen is None else self.frozen_branch(x_frozen, decision, rows.frozen, normed)
        return self.learning_branch(x, decision, rows.learning, normed), frozen

    def frozen(self, x: Tensor, decision: Decision) -> Tensor:
        """The branch whole, frozen or, with `freeze="branch"`, bypassed."""
        residual = self.residual(x)
        with self._frozen(decision):
            if decision.freeze == "branch":
                return bypass(residual, lambda: self.add(residual, self.branch(x)), self.module.activation)
            return self.guarded(self.add(residual, self.branch(x)))  # γ is frozen as well

    @contextlib.contextmanager
    def _frozen(self, decision: Decision) -> Iterator[None]:
        modules = self.modules if decision.modules is None else decision.modules
        places = places_of(self.module, modules)
        check_freezable(places)
        with Frozen(places, modules, decision.freeze_bn):
            lean = decision.freeze == "parameters" and save_less_pays(modules)
            with SaveLess() if lean else contextlib.nullcontext():
                yield


def draw_decision(x: Tensor, drop_prob: float, mode: str, scale_by_keep: bool) -> Decision:
    """Ordinary stochastic depth, drawn from torch's global CPU generator; in a graph, from the device's."""
    scale = kept_scale(drop_prob, scale_by_keep)
    device = x.device if torch.compiler.is_compiling() else None
    drawn = torch.rand(x.shape[0] if mode == "sample" else 1, device=device)
    on_host = host_has(drawn)
    if on_host and len(drawn) and drawn.min().item() >= drop_prob:
        return _kept(scale)  # without the time of a comparison
    keep = drawn >= drop_prob
    if not on_host:
        return Decision(row_scale=to_device(keep.to(compute_dtype(x)) * scale, x.device))
    kept = int(keep.sum())
    if kept in (0, len(keep)):
        # As after other libraries' drop-path, every rank has a gradient: DDP and FSDP average or scatter what all have.
        dummy_calls = ("learning",) if kept == 0 and world_size() > 1 else ()
        return Decision(learning=kept > 0, scale=scale, dummy_calls=dummy_calls)
    return Decision(learning=False, rows=row_set(keep, x.device), scale=scale)


@functools.lru_cache(1024)
def _kept(scale: float) -> Decision:
    return Decision(scale=scale)


def _select(argument: Tensor, rows: Tensor) -> Tensor:
    """Its `rows`; of an empty batch, which `run_dummy` asks for a row, zeros, or true where it is a mask."""
    if argument.shape[0] == 0 and len(rows):
        return argument.new_full((len(rows), *argument.shape[1:]), argument.dtype == torch.bool)
    return argument.index_select(0, rows)


def _is_plain(module: PathModule) -> bool:
    return module.gamma is None and module.activation is None
