"""One call of a path: the single place where a residual branch is run, skipped, frozen or detached.

`ResidualBranch` and the paths of converted blocks call `run_path`. It asks the path's binding for a `Decision`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.utils import parametrize

from .._utils.checks import check_batch, check_residual_add
from ..kernels.autograd import fused_add, plain_add, unchecked_add
from ..kernels.eager import residual_add
from ..kernels.recorded import is_recorded
from ..kernels.spec import Add, Operands, RowSet, activated, compute_dtype
from . import freezing, recorded
from .arguments import Args, Kwargs, left_behind
from .binding import STOCHASTIC_DEPTH, PathModule, name_of, not_a_tensor
from .decision import ALL_ROWS, FROZEN, LEARN, ROWS, SKIP, Decision
from .norms import NO_NORM, Norm
from .parts import BranchParts
from .path import ROWS_OF_BATCH_NORM, parts_of


def run_path(module: PathModule, x: Tensor, args: Args, kwargs: Kwargs, residual: Tensor | None = None) -> Tensor:
    """`act(shortcut(x) + row_scale · γ · branch(x))`, with the branch run on the rows that the decision asks for.

    `residual` is the shortcut's output, where that was computed before.
    """
    compiling = torch.compiler.is_compiling()
    if not compiling and is_recorded(x):
        return recorded.run_path(module, x, args, kwargs, residual)
    check_batch("x", x)
    call, binding = PathCall(module, x.shape[0], args, kwargs, residual), module.binding
    if binding.call_override is not None:
        return binding.call_override(call, x)
    if compiling and module.training:
        if binding.graph_mask is not None:
            return call.run_in_graph(x, *binding.graph_mask)
        if binding.decider.phase is None:
            return call.run(x, STOCHASTIC_DEPTH.decide(module, x))
    return call.run(x)


class PathCall:
    """One call of a path with its further arguments. `residual` is the shortcut's output, if that is known already."""

    def __init__(self, module: PathModule, batch_size: int, args: Args, kwargs: Kwargs, residual: Tensor | None = None):
        self.module, self.batch_size, self.args, self.kwargs = module, batch_size, args, kwargs
        self.known_residual = residual
        self._parts: BranchParts | None = None

    @property
    def parts(self) -> BranchParts:
        """The modules of the branch."""
        if self._parts is None:
            self._parts = parts_of(self.module)
        return self._parts

    def run(self, x: Tensor, decision: Decision | None = None) -> Tensor:
        """The path's output. Without a `decision`, the path's decider is asked for one."""
        if decision is None:
            module = self.module
            decision = module.binding.decider.decide(module, x) if module.training else ALL_ROWS
        if not decision.dummy_calls:
            return self.run_here(x, decision)
        # All ranks make these calls in one order, because their collectives wait for each other.
        others = [self.run_dummy(x, decision, learning=False)] if "frozen" in decision.dummy_calls else []
        out = self.run_here(x, decision)
        if "learning" in decision.dummy_calls:
            gamma, update = self.module.gamma, self.run_dummy(x, decision, learning=True)
            others += [update, *([] if gamma is None else [gamma])]
            if decision.kind is SKIP:
                out = self.promoted(out, update.dtype)
        return freezing.touch(out, others)

    def run_dummy(self, x: Tensor, decision: Decision, learning: bool) -> Tensor:
        """Runs the branch on a row of zeros, or on the batch if it has BatchNorm, whose statistics ranks may share."""
        rows = None
        if not self.parts.batch_norms:
            rows = RowSet(torch.zeros(1, dtype=torch.int64, device=x.device), int(learning))
            x = x.new_zeros(1, *x.shape[1:]).requires_grad_(x.requires_grad)
        return (self.learning_branch if learning else self.frozen_branch)(x, decision, rows)

    def run_here(self, x: Tensor, decision: Decision) -> Tensor:
        """The path's output, without the dummy calls."""
        if decision.kind is ROWS:
            assert decision.rows is not None
            return self.run_masked(x, decision) if self.needs_all_rows(decision) else self.run_rows(x, decision)
        if decision.kind is LEARN:
            row_scale = None if decision.row_scale is None else self.for_rows(decision.row_scale, x)
            return self.add(self.residual(x), self.learning_branch(x, decision), None, None, decision.scale, row_scale)
        if decision.kind is FROZEN:
            return self.run_frozen(x, decision)
        residual = self.residual(x) if decision.dummy_calls else self.without_branch(x)
        return activated(residual, self.module.activation)

    def without_branch(self, x: Tensor) -> Tensor:
        """The residual, in the dtype that its sum with the branch would have."""
        residual, promotion = self.residual(x), self.module.promotion
        return residual if promotion is None else residual.to(promotion.without_branch(self, x, residual.dtype))

    def promoted(self, residual: Tensor, update: torch.dtype) -> Tensor:
        """The residual, in the dtype of its sum with an update of dtype `update`."""
        promotion = self.module.promotion
        return residual if promotion is None else residual.to(promotion.of(residual.dtype, update))

    def widened(self, residual: Tensor, update: torch.dtype) -> Tensor:
        """The residual, wide enough for a sum that is cast to its dtype afterwards, so that it is rounded only once."""
        promotion = self.module.promotion
        if promotion is None or update == residual.dtype:
            return residual
        return residual.to(torch.promote_types(residual.dtype, promotion.of(residual.dtype, update)))

    def residual(self, x: Tensor) -> Tensor:
        if self.known_residual is not None:
            return self.known_residual
        if self.module.shortcut is None:
            return x
        out = self.module.shortcut(x)
        if not isinstance(out, Tensor):
            raise not_a_tensor(self.module, "shortcut", out)
        return out

    def branch(self, x: Tensor, rows: RowSet | None = None, normed: bool = False, frozen: bool = False) -> Tensor:
        """The branch on `x`, which holds all rows of the batch, or the learning or `frozen` ones of `rows`. With
        `normed`, x is the norm's output."""
        args, kwargs = self.args, self.kwargs
        if rows is not None and (args or kwargs):
            index = rows.frozen if frozen else rows.learning
            args, kwargs = self.module.map_rows(lambda t: _select(t, index), self.batch_size, args, kwargs)
        runner = self.module.binding.branch_runner
        single = rows is not None and x.shape[0] == 1  # compilers make a separate graph for a single row
        try:
            if runner is None or single or torch.compiler.is_compiling():
                out = self.module.run_branch(x, args, kwargs, normed)
            else:
                out = runner(self.module, x, args, kwargs, normed)
        except (RuntimeError, ValueError, TypeError, IndexError, AssertionError) as error:
            if rows is not None and not isinstance(error, torch.OutOfMemoryError):
                self._check_left_behind(x, args, kwargs, f"raises {type(error).__name__}: {error}", error)
            raise
        if not isinstance(out, Tensor):
            raise not_a_tensor(self.module, "branch", out)
        if rows is not None and (out.dim() == 0 or out.shape[0] != x.shape[0]):
            self._check_left_behind(x, args, kwargs, f"returns shape {list(out.shape)}")
        return out

    def _check_left_behind(
        self, x: Tensor, args: Args, kwargs: Kwargs, what: str, cause: Exception | None = None
    ) -> None:
        """Raises `ValueError` where the branch failed on some rows of x and arguments kept all their rows."""
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
        self, x: Tensor, decision: Decision, rows: RowSet | None = None, normed: bool = False
    ) -> Tensor:
        if not decision.also_learns:
            return self.branch(x, rows, normed)
        with freezing.RequiresGrad(decision.also_learns, True):
            return self.branch(x, rows, normed)

    def frozen_branch(self, x: Tensor, decision: Decision, rows: RowSet | None = None, normed: bool = False) -> Tensor:
        if decision.freeze == "branch":
            with self.frozen(decision), torch.no_grad():
                return self.branch(x, rows, normed, frozen=True)
        with self.frozen(decision):
            out = self.branch(x, rows, normed, frozen=True)
        return self.guarded(out) if torch.is_grad_enabled() else out

    def guarded(self, out: Tensor) -> Tensor:
        """Refuses second derivatives of a frozen call's output, unless the frozen rest around the path does so."""
        return out if self.module.binding.decider.is_in_frozen_rest else freezing.refuse_second_derivatives(out)

    def needs_all_rows(self, decision: Decision) -> bool:
        """Whether a branch with BatchNorm has to run on all rows, because the result on some rows would be wrong.

        In training mode it has to, because the statistics of some rows differ from those of the batch. In eval mode it
        has to for a single row: torch 2.13's backward is then wrong on CPUs for a gradient of strides (C, 1, W·C, C).
        """
        rows = decision.rows
        if rows is None:
            return False
        batch_norms = (decision.parts or self.parts).batch_norms
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
            index, inverse = (None, None) if rows is None else (rows.index, rows.inverse)
            factor, options = scale if row_scale is None else row_scale, (module.channel_dim, module.activation)
            out = unchecked_add(residual, branch, module.gamma, factor, index, *options, inverse)
            if out is not None:
                return out
        operands = Operands(residual, branch, frozen, module.gamma)
        return fused_add("path", operands, self.checked_add(operands, rows, scale, row_scale)).out

    def checked_add(
        self, operands: Operands, rows: RowSet | None, scale: float = 1.0, row_scale: Tensor | None = None
    ) -> Add:
        """Checks how the branch's output is added. Raises `ValueError` or `TypeError` where it doesn't fit."""
        module, residual, frozen = self.module, operands.residual, operands.frozen_update
        num_rows = residual.shape[0] if rows is None else rows.num_learning
        fits = operands.gamma is None and row_scale is None and _fits(residual, operands.update, num_rows)
        if rows is not None and frozen is not None:
            fits = fits and _fits(residual, frozen, rows.num_frozen)
        if not fits:
            options = (row_scale, module.gamma, module.channel_dim)
            check_residual_add(residual, operands.update, None if rows is None else rows.learning, *options)
            if rows is not None and frozen is not None:
                check_residual_add(residual, frozen, rows.frozen, *options)
        return Add(rows, scale, row_scale, module.channel_dim, module.activation)

    def run_masked(self, x: Tensor, decision: Decision) -> Tensor:
        """Runs the branch on all rows, with a factor of 0 for the dropped ones."""
        rows = decision.rows
        assert rows is not None
        if rows.num_frozen:
            raise RuntimeError(f"{name_of(self.module)}: {ROWS_OF_BATCH_NORM}")
        row_scale = torch.zeros(len(x), dtype=compute_dtype(x), device=x.device)
        row_scale.index_fill_(0, rows.learning, decision.scale)
        return self.add(self.residual(x), self.learning_branch(x, decision), row_scale=row_scale)

    def run_in_graph(self, x: Tensor, learning: Tensor, detached: Tensor | None) -> Tensor:
        """Runs the branch on all rows, under `torch.compile`, where no plan may be part of the graph. Its output is
        added times `learning` and, detached, times `detached`; for each row one of the two factors is 0."""
        module, residual, update = self.module, self.residual(x), self.branch(x)
        if detached is not None:
            residual = self.widened(residual, update.dtype)
            gamma, row_scale = None if module.gamma is None else module.gamma.detach(), self.for_rows(detached, x)
            residual = residual_add(
                residual, update.detach(), row_scale=row_scale, gamma=gamma, channel_dim=module.channel_dim
            )
        return self.add(residual, update, row_scale=self.for_rows(learning, x))

    def for_rows(self, scale: Tensor, x: Tensor) -> Tensor:
        """Expands one factor for all rows, or one for each, to `[B]` in the dtype that the ops take."""
        return scale.to(compute_dtype(x)).expand(self.batch_size).contiguous()

    def run_rows(self, x: Tensor, decision: Decision) -> Tensor:
        """Runs the branch on the learning and on the frozen rows: two calls and one add."""
        # A runner runs the norm as well, so that branches on all rows and on some can share a graph.
        fuses = self.module.binding.branch_runner is None
        norm = Norm.of(self.module.norm, x, decision.also_learns) if fuses else NO_NORM
        next_input = norm.next_input(decision.rows, "frozen" if decision.freeze == "branch" else None)
        inputs = fused_add("path", Operands(x, None, None, None, norm.weight, norm.bias), next_input=next_input)
        updates = self.updates(decision, inputs.next, inputs.frozen_next, norm.fused)
        return self.add(self.residual(inputs.out), *updates, decision.rows, decision.scale)

    def updates(
        self, decision: Decision, x: Tensor, x_frozen: Tensor | None, normed: bool
    ) -> tuple[Tensor, Tensor | None]:
        """The branch's outputs on `x`, the rows that learn or all rows, and on `x_frozen`, the frozen ones."""
        rows = decision.rows
        if rows is None:
            run = self.frozen_branch if decision.kind is FROZEN else self.learning_branch
            return run(x, decision, None, normed), None
        if (
            x_frozen is not None
            and parametrize._cache_enabled
            and any(map(parametrize.is_parametrized, self.parts.modules))
        ):
            raise RuntimeError(
                f"{name_of(self.module)} has parametrized weights, and parametrize.cached() would give its learning "
                "rows the weights that were made for frozen ones, without a gradient: leave cached() out, or use "
                "mode='block'"
            )
        frozen = None if x_frozen is None else self.frozen_branch(x_frozen, decision, rows, normed)
        return self.learning_branch(x, decision, rows, normed), frozen

    def run_frozen(self, x: Tensor, decision: Decision) -> Tensor:
        """Runs the branch on all rows, frozen or, with `freeze="branch"`, detached."""
        residual = self.residual(x)
        compute = lambda: self.add(residual, self.branch(x))  # noqa: E731 (γ is frozen as well)
        with self.frozen(decision):
            if decision.freeze == "branch":
                return freezing.add_detached(residual, compute, self.module.activation)
            return self.guarded(compute())

    def frozen(self, decision: Decision) -> freezing.Frozen:
        """Context: the path's parameters and statistics are frozen."""
        parts = decision.parts or self.parts
        refs = parts.parameter_refs() + self.module.own_parameters()
        freezing.check_freezable(refs)
        return freezing.Frozen(refs, parts.layers, decision.freeze_bn, decision.freeze == "parameters")


CallOverride = Callable[[PathCall, Tensor], Tensor]
"""Replaces the whole call: `(call, x) -> output`. Used by `estimate` and `diagnostics`."""


def _select(argument: Tensor, rows: Tensor) -> Tensor:
    """These rows of an argument. An empty batch has no row for `run_dummy`: it gets zeros, or True in a mask."""
    if argument.shape[0] == 0 and len(rows):
        return argument.new_full((len(rows), *argument.shape[1:]), argument.dtype == torch.bool)
    return argument.index_select(0, rows)


def _fits(residual: Tensor, update: object, num_rows: int) -> bool:
    """Whether `update` has this number of rows and passes `check_residual_add`, as most updates do. If not, that
    function finds the error."""
    return (
        type(update) is Tensor
        and update.shape == (num_rows, *residual.shape[1:])
        and update.is_floating_point()
        and residual.is_floating_point()
        and update.device == residual.device
    )


def _is_plain(module: PathModule) -> bool:
    return module.gamma is None and module.activation is None
