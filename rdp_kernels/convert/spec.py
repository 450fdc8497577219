"""The results of a block's conversion, in plain types from which another process can make the class again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from .calls import Signature
from .guards import Guard


@dataclass(frozen=True)
class PathSpec:
    """One path of a block. A branch takes `x`, with the norm at its head applied, then the inputs that `kinds`
    describes."""

    name: str
    drop_path: str | None
    """The name of the path's drop-path; None if there is none."""
    mode: str
    kinds: tuple[str, ...]
    """For each further input, "row" if it has a row for each row of x, or "shared" if it is passed as it is."""
    modules: tuple[str, ...]
    parameters: tuple[str, ...]
    """The parameters of the branch that belong to none of its modules."""
    norm: str | None
    zeros: tuple[int | None, ...] | None
    """If zeros replace the residual, their shape after dimension 0, with None for a size of x; else None."""
    sum_dtype: str
    """The dtype of the sum: that of the "branch", that of the "residual", or that of "both" promoted."""
    dtype: torch.dtype | None
    """The one dtype of all tensors that the branch takes, owns and returns; None if they differ."""
    batch_norm: bool
    foreign_rows: bool
    """Whether rows aren't samples but windows or patches."""
    dims: int
    """The number of dimensions of the tensor that is dropped."""

    def __deepcopy__(self, memo: object) -> PathSpec:
        return self


@dataclass(frozen=True)
class Recipe:
    """Everything about a converted class except its base."""

    source: str
    names: tuple[tuple[str, tuple[str, str]], ...]
    """The globals of the source, each with the Python module and the name that it is imported by."""
    signature: Signature
    guards: tuple[Guard, ...]
    inputs: tuple[Any, ...] | None
    """The `inputs` of `Trace`."""
    sets: tuple[tuple[str, Any], ...]
    """Attributes that every forward sets on the block, with their constant values."""
    paths: tuple[PathSpec, ...]

    def __deepcopy__(self, memo: object) -> Recipe:
        return self
