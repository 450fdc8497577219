"""The costs of a scheme's iterations, averaged over many plans, with a recommendation."""

from __future__ import annotations

import itertools
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .._utils.checks import check_bool
from .._utils.table import table
from ..paths.path import refuse_batch_norm
from ..plan import draw_keep, plan_generator
from .compose import ModelCost

if TYPE_CHECKING:
    from ..scheme.scheme import ResidualDropPath

PLANS = 256  # drawn for each row; a row shows their mean
MODES, FREEZES = ("block", "sample"), ("parameters", "branch", "none")  # the exact and cheapest first
PROBS = (0.1, 0.3, 0.5)  # usual rates, shown beside the scheme's own
PAYS = 0.97
"""If a step costs more than this share of a plain step, the gain can't be told from noise."""
NEAR = 0.03
"""Ratios that differ by at most this much count as equal."""
USUAL = 0.3
"""The rate that is recommended if the model has none."""
WIDTH = 100  # of the notes below the table, in characters
PLAINLY = "Recommendation: plain training, or the scheme for its results only."


@dataclass(frozen=True)
class Row:
    """One row of an `Estimate`, the mean costs of one choice of mode, freezing and rates.

    Costs are means over 256 drawn plans. An iteration in which nothing can learn isn't run, so it isn't counted.

    Attributes:
        mode: the scheme's option, `"block"` or `"sample"`.
        freeze: the scheme's option, `"parameters"`, `"branch"` or `"none"`.
        drop_prob: P(drop), the mean over the paths.
        own_rates: whether the rates are the scheme's own. Otherwise all paths have the same rate.
        drop_flops: FLOPs of a drop iteration. None if the row is refused or no plan has one.
        reuse_flops: FLOPs of a reuse iteration. None if the row is refused or no plan has one.
        flop_ratio: FLOPs of an optimizer step of the scheme (a drop or a reuse iteration), divided by those of a plain
            training step. None if the row is refused.
        drop_saved_bytes: bytes that autograd saves in a drop iteration. None as for `drop_flops`.
        reuse_saved_bytes: bytes that autograd saves in a reuse iteration. None as for `reuse_flops`.
        time_ratio: as `flop_ratio`, for the time of forward and backward. The optimizer's own time isn't included. None
            if the row is refused or time wasn't measured.
        refused: why the scheme refuses this mode on this model. None if it doesn't.

    Example:
        >>> branches = [rdp.ResidualBranch(nn.Linear(8, 8)) for _ in range(4)]
        >>> model = nn.Sequential(*branches)
        >>> scheme = rdp.ResidualDropPath(model, drop_prob=0.5)
        >>> row = scheme.estimate(torch.randn(4, 8), timed=False).rows[0]
        >>> row.mode, row.freeze, row.drop_prob, row.own_rates
        ('block', 'parameters', 0.5, True)
        >>> row.flop_ratio < 1, row.time_ratio
        (True, None)
    """

    mode: str
    freeze: str
    drop_prob: float
    own_rates: bool
    drop_flops: float | None = None
    reuse_flops: float | None = None
    flop_ratio: float | None = None
    drop_saved_bytes: float | None = None
    reuse_saved_bytes: float | None = None
    time_ratio: float | None = None
    refused: str | None = None

    @property
    def ratio(self) -> float:
        """The time ratio if time was measured, else the FLOP ratio. A refused row has none."""
        ratio = self.flop_ratio if self.time_ratio is None else self.time_ratio
        assert ratio is not None
        return ratio


@dataclass(frozen=True)
class Estimate:
    """A table of what a scheme's iterations cost, with a recommendation.

    `ResidualDropPath.estimate` returns it. `str(estimate)` is a table with the recommendation below. Iterating gives
    the rows.

    Attributes:
        rows: a `Row` for each choice of rates, mode and freezing.
        batch_size: the number of samples in the example inputs.
        plain_flops: FLOPs of a plain training step.
        plain_saved_bytes: bytes that autograd saves in a plain training step.
        plain_seconds: seconds of a plain training step without its optimizer. None if time wasn't measured.
        branch_share: the part of the plain step's time that branches take. If time wasn't measured, the part of its
            FLOPs.
        recommendation: a mode and a freezing, with the reason.
        cost: computes the costs of further plans.

    Example:
        >>> branches = [rdp.ResidualBranch(nn.Linear(8, 8)) for _ in range(4)]
        >>> model = nn.Sequential(*branches)
        >>> scheme = rdp.ResidualDropPath(model, drop_prob=0.5)
        >>> estimate = scheme.estimate(torch.randn(4, 8), timed=False)
        >>> len(estimate.rows), estimate.batch_size, estimate.plain_flops
        (18, 4, 5632.0)
        >>> print(estimate.recommendation)
        Recommendation: mode="block", freeze="parameters". A step takes ... of plain training's FLOPs...
    """

    rows: list[Row]
    batch_size: int
    plain_flops: float
    plain_saved_bytes: float
    plain_seconds: float | None
    branch_share: float
    recommendation: str
    cost: ModelCost

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __str__(self) -> str:
        header = ("p", "mode", "freeze", "FLOPs", "time", "drop bytes", "reuse bytes")
        lines = table(header, [self._cells(row) for row in self.rows])
        reasons = dict.fromkeys(row.refused for row in self.rows if row.refused is not None)
        notes = [*(f"refused: {reason}" for reason in reasons), self.plain_step(), self.recommendation]
        return "\n".join([*lines, *(textwrap.fill(note, WIDTH) for note in notes)])

    def plain_step(self) -> str:
        """Describes the costs of a plain training step.

        Returns:
            One sentence.
        """
        seconds = "" if self.plain_seconds is None else f", {1e3 * self.plain_seconds:.3g} ms without its optimizer"
        return (
            f"A plain step at batch {self.batch_size}: {self.plain_flops / 1e9:.4g} GFLOP, "
            f"{self.plain_saved_bytes / 1e6:.4g} MB saved for backward{seconds}; branches take {self.branch_share:.0%} "
            "of it. The table shows ratios to it, so less is cheaper: FLOPs and time of an optimizer step of the "
            "scheme, and the bytes that a drop and a reuse iteration save for backward."
        )

    def _cells(self, row: Row) -> tuple[str, ...]:
        rates = f"{row.drop_prob:.3g}" + (" (own)" if row.own_rates else "")
        if row.refused is not None:
            return (rates, row.mode, row.freeze, "refused", "", "", "")
        saved = (b and b / self.plain_saved_bytes for b in (row.drop_saved_bytes, row.reuse_saved_bytes))
        values = (row.flop_ratio, row.time_ratio, *saved)
        return (rates, row.mode, row.freeze, *("–" if v is None else f"{v:.3f}" for v in values))


def estimate(scheme: ResidualDropPath, example_inputs: Any, timed: bool = True) -> Estimate:
    """Estimates the costs of a scheme's iterations, as `ResidualDropPath.estimate` does.

    It measures a copy of the model, with uncompiled branches. The model, its gradients and torch's generators don't
    change.

    Args:
        scheme: the scheme, without an open iteration.
        example_inputs: a tensor, a tuple of arguments or a dict of keyword arguments, with samples in dimension 0. It
            has the batch size and the device of the training.
        timed: whether to measure seconds too. This takes some tens of training steps. Without it, FLOPs are compared.

    Returns:
        The costs in each mode and freezing, at the scheme's own rates and at 0.1, 0.3 and 0.5.

    Raises:
        RuntimeError: if an iteration is open.
        TypeError: if `timed` isn't a bool.
        ValueError: if the model can't be copied, can't run on `example_inputs`, or recomputes calls of its paths.

    Example:
        >>> from rdp_kernels.estimate import estimate
        >>> branches = [rdp.ResidualBranch(nn.Linear(8, 8)) for _ in range(4)]
        >>> model = nn.Sequential(*branches)
        >>> scheme = rdp.ResidualDropPath(model, drop_prob=0.3)
        >>> costs = estimate(scheme, torch.randn(4, 8), timed=False)
        >>> sorted({row.drop_prob for row in costs})
        [0.1, 0.3, 0.5]
    """
    check_bool("timed", timed)
    if scheme.phase is not None:
        raise RuntimeError(f"estimate() inside an open {scheme.phase} iteration: call it before training")
    cost = ModelCost.of(scheme._rest.model, example_inputs, freeze_bn=scheme._rules.freeze_bn, timed=timed)
    own = [path.drop_prob for path in scheme.paths]
    rates = [(own, True), *(([p] * len(own), False) for p in PROBS if [p] * len(own) != own)]
    rows = []
    for (drop_probs, is_own), mode in itertools.product(rates, MODES):
        kept, mean = _draw(scheme, cost, mode, drop_probs), sum(drop_probs) / len(drop_probs)
        rows += [_row(scheme, cost, Row(mode, freeze, mean, is_own), kept) for freeze in FREEZES]
    shares, share = cost.plain_shares(), cost.branch_share()
    return Estimate(
        rows=rows,
        batch_size=cost.batch_size,
        plain_flops=cost.plain(),
        plain_saved_bytes=cost.saved_bytes(shares).item(),
        plain_seconds=cost.seconds(shares).item() if timed else None,
        branch_share=share,
        recommendation=recommend(rows, share, cost.batch_size),
        cost=cost,
    )


def _row(scheme: ResidualDropPath, cost: ModelCost, row: Row, kept: Tensor) -> Row:
    """Returns `row` with its costs. `kept` is what `_draw` returns."""
    if row.mode == "sample" and row.freeze != "none":
        try:
            refuse_batch_norm(scheme.paths)
        except ValueError as error:
            return replace(row, refused=str(error))
    train_rest = scheme._rules.train_rest
    drop, reuse = cost.drop_shares(cost.computed(kept)), cost.reuse_shares(kept, row.freeze, train_rest)
    trainable = torch.tensor([any(p.requires_grad for p in path.parameters()) for path in scheme.paths])
    can_learn = torch.ones_like(trainable) if row.freeze == "none" or train_rest else trainable
    has_reuse = ((kept < 1) & can_learn).any(dim=1)  # plans with a reuse iteration
    has_drop = ((kept > 0) & trainable).any(dim=1) | ~has_reuse  # plans with a drop iteration
    if any(p.requires_grad for p in scheme._rest.parameters()):
        has_drop = torch.ones_like(has_drop)

    def ratio(total: Any) -> float:
        both = total(drop)[has_drop].sum() + total(reuse)[has_reuse].sum()
        return (both / (int(has_drop.sum()) + int(has_reuse.sum())) / total(cost.plain_shares())).item()

    def mean(costs: Tensor, which: Tensor) -> float | None:
        return costs[which].mean().item() if which.any() else None

    return replace(
        row,
        drop_flops=mean(cost.flops(drop), has_drop),
        reuse_flops=mean(cost.flops(reuse), has_reuse),
        flop_ratio=ratio(cost.flops),
        drop_saved_bytes=mean(cost.saved_bytes(drop), has_drop),
        reuse_saved_bytes=mean(cost.saved_bytes(reuse), has_reuse),
        time_ratio=None if cost.pieces.seconds is None else ratio(cost.seconds),
    )


def _draw(scheme: ResidualDropPath, cost: ModelCost, mode: str, drop_probs: list[float]) -> Tensor:
    """Returns the fractions of the rows that plans keep, float64 `[plans, paths]`. Every call draws the same plans."""
    generator = plan_generator(0, 0)
    whole = [path.index for path in scheme.paths if path.module.mode == "block"]
    options = (mode, scheme.sampling, generator, [cost.batch_size], whole)
    keeps = [draw_keep(drop_probs, *options).view(len(drop_probs), -1) for _ in range(PLANS)]
    return torch.stack(keeps).double().mean(dim=2)


def recommend(rows: list[Row], branch_share: float, batch_size: int) -> str:
    """Recommends a mode and a freezing at the scheme's own rates, with the reason. Every ratio is that of a row."""
    what = "FLOPs" if rows[0].time_ratio is None else "time"
    exact = [row for row in rows if row.freeze == "parameters" and row.refused is None]
    block, *others = [row for row in exact if row.own_rates]  # block mode is never refused
    if block.drop_prob == 0:
        return _for_rates_of_zero([row for row in exact if not row.own_rates], what)
    sample = others[0] if others else None
    chosen = block
    if sample is not None and (sample.ratio < block.ratio - NEAR or sample.ratio < PAYS <= block.ratio):
        chosen = sample
    approximate = min(
        (row for row in rows if row.own_rates and row.freeze == "branch" and row.refused is None),
        key=lambda row: row.ratio,
    )
    if chosen.ratio >= PAYS:
        sentences = [f"{PLAINLY} {_why_not(chosen, branch_share, what)}"]
        more = [r for r in exact if r.mode == chosen.mode and r.drop_prob > chosen.drop_prob and r.ratio < PAYS]
        sentences += [f"At p = {row.drop_prob:.3g} it would take {row.ratio:.2f}." for row in more[:1]]
    else:
        beside = "" if chosen is block else f", in block mode {block.ratio:.2f}"
        sentences = [
            f'Recommendation: mode="{chosen.mode}", freeze="parameters". A step takes {chosen.ratio:.2f} of plain '
            f"training's {what}{beside}; gradients are exact."
        ]
        if sample is None:
            sentences.append("Sample mode is refused, see above.")
        elif chosen is block and sample.ratio <= block.ratio + NEAR:
            sentences.append(
                f"Sample mode, where masks differ from sample to sample, costs about the same: {sample.ratio:.2f}."
            )
        elif chosen is block:
            sentences.append(f"Sample mode takes {sample.ratio:.2f}: {_why_dearer(sample, block, batch_size)}.")
    if approximate.ratio < min(PAYS, chosen.ratio - NEAR):
        sentences.append(
            f'freeze="branch" would take {approximate.ratio:.2f} in {approximate.mode} mode, but its gradients are '
            "approximate."
        )
    return " ".join(sentences)


def _for_rates_of_zero(exact: list[Row], what: str) -> str:
    """The recommendation if the scheme's own rates are 0. `exact` holds the rows of other rates."""
    usual = next(row for row in exact if (row.mode, row.drop_prob) == ("block", USUAL))
    best = usual if usual.ratio < PAYS else min(exact, key=lambda row: row.ratio)
    gain = f"{best.ratio:.2f} of plain training's {what} in {best.mode} mode"
    zero = "The paths' own rates are 0, so nothing is dropped and nothing gained"
    if best.ratio < PAYS:
        return f"Recommendation: give drop_prob. {zero}; at {best.drop_prob:.3g} a step would take {gain}."
    return f"{PLAINLY} {zero}; at {best.drop_prob:.3g}, the best of the rates above, a step would take {gain}."


def _why_dearer(sample: Row, block: Row, batch_size: int) -> str:
    assert sample.flop_ratio is not None
    assert block.flop_ratio is not None
    if sample.ratio - sample.flop_ratio > block.ratio - block.flop_ratio + NEAR:
        return f"at batch {batch_size}, running a branch on a part of the rows costs more than that part of its cost"
    return "hardly any plan begins with paths that are frozen for all samples, which need no backward"


def _why_not(row: Row, branch_share: float, what: str) -> str:
    assert row.flop_ratio is not None
    ratio = f"In {row.mode} mode a step takes {row.ratio:.2f} of plain training's {what}"
    if row.flop_ratio < PAYS:
        return (
            f"{ratio}, though it needs only {row.flop_ratio:.2f} of its FLOPs: other costs of a branch outweigh the "
            "gain. A larger batch or wider branches may help."
        )
    if branch_share < 0.5:
        return f"{ratio}: the branches are only {branch_share:.0%} of a plain step."
    return f"{ratio}: at p = {row.drop_prob:.3g} too little is dropped."
