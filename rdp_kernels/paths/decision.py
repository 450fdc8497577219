"""The `Decision` about one call of a path."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from torch import Tensor

from ..kernels.spec import RowSet
from .freezing import FreezeBN, ParameterRef
from .parts import BranchParts


class Kind(enum.Enum):
    """What a call does with its branch. `SKIP`: the branch doesn't run. `LEARN`, `FROZEN`: it runs on all rows, which
    learn or are frozen. `ROWS`: it runs on the rows `Decision.rows`, a part of which may be frozen."""

    SKIP, LEARN, FROZEN, ROWS = range(4)


SKIP, LEARN, FROZEN, ROWS = Kind  # reading an attribute of an enum's class runs Python code before Python 3.12


@dataclass(slots=True)  # creating frozen dataclasses takes four times as long
class Decision:
    """How one call of a path is run.

    Args:
        kind: what the call does with its branch.
        rows: for `ROWS`, the rows that learn and those that are frozen.
        scale: the factor of rows that learn.
        freeze, freeze_bn: as in `ResidualDropPath`.
        parts: the modules of the branch, where the iteration has looked them up.
        also_learns: parameters of this path that the frozen rest shares. They learn inside the branch's call.
        row_scale: for `LEARN`, a factor for each row or one for all, where the host doesn't know which are 0.
        dummy_calls: `"learning"`, `"frozen"`: calls that other ranks make on rows of theirs, and that this rank has no
            rows for.
    """

    kind: Kind = LEARN
    rows: RowSet | None = None
    scale: float = 1.0
    freeze: str = "parameters"
    freeze_bn: FreezeBN = True
    parts: BranchParts | None = None
    also_learns: tuple[ParameterRef, ...] = ()
    row_scale: Tensor | None = None
    dummy_calls: tuple[str, ...] = ()


ALL_ROWS = Decision()
