"""What a conversion knows of a block, in plain types: enough to make the class again in another process."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from .calls import Signature
from .guards import Guard


@dataclass(frozen=True)
class PathSpec:
    """One path of a block. A branch takes `x`, with the norm at its head applied, then what `kinds` describes."""

    name: str
    drop_path: str | None
    """The module that says how often it is dropped; None where there is none."""
    mode: str
    kinds: tuple[str, ...]
    """Of the further inputs: "row", they have a row for each of x; "shared", they are handed on as they are."""
    modules: tuple[str, ...]
    parameters: tuple[str, ...]
    """Those of the branch that belong to none of its modules."""
    norm: str | None
    zeros: tuple[int | None, ...] | None
    """There is no residual but zeros: their shape behind dimension 0, None for a size that is x's; else None."""
    sum_dtype: str
    """Whose dtype the sum has: "both" of them promoted, the "branch"'s or the "residual"'s."""
    dtype: torch.dtype | None
    """The branch's, where all that it was computed from had it; else None."""
    batch_norm: bool
    foreign_rows: bool
    """Rows are not samples: windows, patches."""
    dims: int
    """Of what is dropped."""

    def __deepcopy__(self, memo: object) -> PathSpec:
        return self


@dataclass(frozen=True)
class Recipe:
    """A converted class but for its base."""

    source: str
    names: tuple[tuple[str, tuple[str, str]], ...]
    """The source's globals: where each is imported from."""
    signature: Signature
    guards: tuple[Guard, ...]
    inputs: tuple[Any, ...] | None
    """Of each input what decided something (`Trace.inputs`); None where no input did."""
    sets: tuple[tuple[str, Any], ...]
    """Attributes that every forward sets on the block, to constants."""
    paths: tuple[PathSpec, ...]

    def __deepcopy__(self, memo: object) -> Recipe:
        return self
