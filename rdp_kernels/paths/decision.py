"""The `Decision` about one call of a path."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from ..kernels.spec import RowSet
from .freezing import FreezeBN, ParameterRef


class Kind(enum.Enum):
    """What a call does with its branch."""

    SKIP = "skip"
    """The branch doesn't run."""
    LEARN = "learn"
    """It runs on all rows, and its weights get gradients."""
    FROZEN = "frozen"
    """It runs on all rows, and its weights get no gradients."""
    ROWS = "rows"
    """It runs on `Decision.rows`. Its weights get gradients from those that learn, and none from those that don't."""


SKIP, LEARN, FROZEN, ROWS = Kind  # reading an attribute of an enum's class runs Python code before Python 3.12


@dataclass(frozen=True)
class Decision:
    """How one call of a path is run.

    Args:
        kind: what the call does with its branch.
        rows: for `ROWS`, the rows that learn and those that are frozen.
        scale: the factor of rows that learn.
        freeze, freeze_bn: as in `ResidualDropPath`.
        modules: the modules of the branch, where they were looked up before.
        also_learns: parameters of this path that the frozen rest shares. They learn inside the branch's call.
        row_scale: for `LEARN`, a factor for each row, or one for all. It is given where the host doesn't know which
            factors are 0, so that the branch runs on all rows.
        dummy_calls: `"learning"`, `"frozen"`: the calls of the branch that other ranks make on rows of their own, and
            that this rank has no rows for.
    """

    kind: Kind = LEARN
    rows: RowSet | None = None
    scale: float = 1.0
    freeze: str = "parameters"
    freeze_bn: FreezeBN = True
    modules: Sequence[nn.Module] | None = None
    also_learns: tuple[ParameterRef, ...] = ()
    row_scale: Tensor | None = None
    dummy_calls: tuple[str, ...] = ()


ALL_ROWS = Decision()
