"""One call of an op as data: drawn by hypothesis, or a row of a table."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import reject, settings
from hypothesis import strategies as st

from rdp_kernels.kernels.native.library import has_cuda
from tests.conftest import DEVICE

BACKENDS = ["triton", "native"] if DEVICE == "cpu" else ["triton"]
NUMERICS_BACKENDS = ["triton", "native"] if DEVICE == "cpu" or has_cuda() else ["triton"]
"""All backends must give the same numbers. The compiled library's CUDA kernels support fewer calls and run only drawn
cases; unsupported ones are drawn again."""

VECTORS = ("gamma", "weight", "bias")


@dataclass(frozen=True)
class Case:
    """One call; its values follow from `seed`. Rows are given by number, in the call's order.

    Args:
        shape: of the residual.
        dtypes: of the residual, the branch, γ, and the norm's weight and bias.
        layouts: of the residual, the branch, the incoming gradients, and the vectors; see `values.laid_out`.
        adds, gives_next: whether a branch is added, and whether a next branch gets rows.
        residual: whether there is a residual to add to.
        row_scale: None, a number, or `"tensor"`: some rows are dropped.
        drop_prob: with it, rows are dropped as `drop_path` does.
        num_learning, num_next_learning: how many of the rows learn, the others being frozen; None for all.
        norm, eps, weight, bias, detached: of the next branch.
        wanted: operands that require grad; None for all.
        used: results that get a gradient; None for all.
        spread: of the residual's and the branch's values; small ones let eps matter.
        offset: of the residual's values, in units of the spread.
        in_place: the sum overwrites the residual, and the residual's gradient that of the sum.
        tiles: how kernels cut their work; see `tiles.py`.
    """

    shape: tuple[int, ...]
    dtypes: tuple[str, str, str, str] = ("float32",) * 4
    layouts: tuple[str, str, str, str] = ("dense",) * 4
    adds: bool = True
    gives_next: bool = False
    residual: bool = True
    rows: tuple[int, ...] | None = None
    num_learning: int | None = None
    row_scale: float | str | None = None
    drop_prob: float | None = None
    scale_by_keep: bool = True
    gamma: bool = False
    channel_dim: int = -1
    activation: str | None = None
    next_rows: tuple[int, ...] | None = None
    num_next_learning: int | None = None
    norm: str | None = None
    eps: float = 1e-6
    weight: bool = False
    bias: bool = False
    detached: str | None = None
    wanted: tuple[str, ...] | None = None
    used: tuple[str, ...] | None = None
    spread: float = 1.0
    offset: float = 1.0
    in_place: bool = False
    tiles: str = "tuned"
    seed: int = 0

    @property
    def learning(self) -> tuple[int, ...] | None:
        return None if self.rows is None else self.rows[: self.num_learning]

    @property
    def frozen(self) -> tuple[int, ...]:
        """Whether some of `rows` are frozen."""
        return () if self.rows is None or self.num_learning is None else self.rows[self.num_learning :]

    @property
    def next_parts(self) -> list[tuple[int, ...]]:
        """The next branch's learning rows, and its frozen ones if there are any."""
        rows = tuple(range(self.shape[0])) if self.next_rows is None else self.next_rows
        count = len(rows) if self.num_next_learning is None else self.num_next_learning
        return [rows[:count], rows[count:]] if count < len(rows) else [rows]

    @property
    def operands(self) -> list[str]:
        """Names of the operands that the call has."""
        there = {
            "residual": self.residual,
            "update": self.adds,
            "frozen_update": self.adds and len(self.frozen) > 0,
            "gamma": self.gamma,
            "weight": self.weight,
            "bias": self.bias,
        }
        return [name for name, is_there in there.items() if is_there]

    def dtype_of(self, operand: str) -> torch.dtype:
        of = {"residual": 0, "update": 1, "frozen_update": 1, "gamma": 2, "weight": 3, "bias": 3}
        return getattr(torch, self.dtypes[of[operand]])

    @property
    def residual_dtype(self) -> torch.dtype:
        return self.dtype_of("residual" if self.residual else "update")

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype of arithmetic by the contract."""
        dtypes = {self.dtype_of(name) for name in self.operands}
        return torch.float64 if torch.float64 in dtypes else torch.float32

    def in_float64(self, **changes: Any) -> Case:
        return replace(self, dtypes=("float64",) * 4, **changes)


def as_asked(number: int) -> int:
    """A number of drawn calls, times RDP_EXAMPLES: 1 unless it is set; the Makefile sets it."""
    return max(1, round(number * float(os.environ.get("RDP_EXAMPLES", "1"))))


def examples(number: int) -> settings:
    return settings(max_examples=as_asked(number))


def in_parts(number: int) -> Callable[[Callable], Callable]:
    """`examples` spread over four tests, which processes can share: on a GPU they compile hundreds of kernels.
    Hypothesis is seeded by the test's id, so that each part draws other examples."""
    parts = range(4)
    return lambda test: pytest.mark.parametrize("part", parts)(examples(number // len(parts))(test))


@contextlib.contextmanager
def drawn_again_if_unsupported() -> Iterator[None]:
    """Another case is drawn where the compiled library's CUDA kernels don't support this one."""
    try:
        yield
    except RuntimeError as error:
        if "the CUDA kernels of the compiled library" not in str(error):
            raise
        reject()


# Residual, branch, gamma, weight and bias: alike; narrower and wider ones; as autocast and LayerScale leave them.
DTYPES = [
    *((dtype,) * 4 for dtype in ("float32", "float32", "float64", "bfloat16", "float16")),
    ("float32", "bfloat16", "float32", "float32"),
    ("float32", "float16", "bfloat16", "float16"),
    ("bfloat16", "bfloat16", "float32", "float32"),
    ("bfloat16", "float32", "bfloat16", "bfloat16"),
    ("float16", "float16", "float32", "float32"),
    ("float64", "float32", "float32", "float64"),
    ("float32", "float64", "float32", "float32"),
    ("bfloat16", "bfloat16", "float32", "float64"),
]

_STREAM_LAYOUTS = ["dense", "dense", "dense", "offset", "padded", "strided", "transposed", "channels_last"]
_BRANCH_LAYOUTS = [*_STREAM_LAYOUTS, "expanded"]
_GRADIENT_LAYOUTS = [*_BRANCH_LAYOUTS, "expanded scalar"]

_LAYOUTS = st.tuples(
    st.sampled_from(_STREAM_LAYOUTS),
    st.sampled_from(_BRANCH_LAYOUTS),
    st.sampled_from(_GRADIENT_LAYOUTS),
    st.sampled_from(["dense", "dense", "offset", "strided"]),
)
# Hypothesis prefers ends and short lists; only some cases should be empty tensors.
_BATCH_SIZES = [3, 1, 2, 4, 5, 2, 3, 4, 5, 6, 0]
_MIDDLES = [(), (), (3,), (2,), (5,), (1,), (2, 3), (3, 2), (1, 2), (3, 1), (2, 2), (0,), (2, 0), (2, 1, 3)]
_WIDTHS = {
    "tuned": [1, 2, 3, 5, 7, 13, 16, 33, 64, 197],
    "small": [1, 3, 5, 13, 16, 17, 33, 65, 100],
    "wide": [1, 3, 16, 17, 33],
}
_MOST_ELEMENTS = {"tuned": 3000, "small": 400, "wide": 100}  # programs are interpreted one by one
_NORM_TILES = ("tuned", "tuned", "tuned", "small", "small", "wide")


@st.composite
def _calls(draw: st.DrawFn, least_dims: int = 1, tiles: tuple[str, ...] = ("tuned", "small"), **fixed: Any) -> Case:
    """The fields that all ops have in common; the last dimension is the widest."""
    cut = draw(st.sampled_from(tiles))
    shape = [draw(st.sampled_from(_BATCH_SIZES)), *draw(st.sampled_from(_MIDDLES))]
    if least_dims > 1 or len(shape) > 1 or draw(st.booleans()):
        shape.append(draw(st.sampled_from(_WIDTHS[cut])))
    while math.prod(shape) > _MOST_ELEMENTS[cut] and shape[0] > 1:
        shape[0] -= 1
    return Case(
        shape=tuple(shape),
        dtypes=draw(st.sampled_from(DTYPES)),
        layouts=draw(_LAYOUTS),
        spread=draw(st.sampled_from([1.0, 1.0, 0.01])),
        offset=draw(st.sampled_from([1.0, 0.0, -30.0])),
        tiles=cut,
        seed=draw(st.integers(0, 10**6)),
        **fixed,
    )


def _row_lists(batch_size: int) -> st.SearchStrategy[tuple[int, ...] | None]:
    """None; no row, some rows or all rows in any order."""
    count = st.sampled_from([0, batch_size, *range(batch_size + 1)])
    some = st.tuples(st.permutations(range(batch_size)), count).map(lambda drawn: tuple(drawn[0][: drawn[1]]))
    return st.one_of(st.none(), some, some)


def _subsets(draw: st.DrawFn, names: list[str]) -> tuple[str, ...] | None:
    """None, for all, in half of the draws."""
    if draw(st.booleans()):
        return None
    return tuple(name for name in names if draw(st.sampled_from([True, True, False])))


@st.composite
def residual_adds(draw: st.DrawFn, activations: tuple[str | None, ...] = (None, "relu"), **calls: Any) -> Case:
    case = draw(_calls(**calls))
    dims = len(case.shape)
    gamma = dims > 1 and draw(st.booleans())
    case = replace(
        case,
        rows=draw(_row_lists(case.shape[0])),
        row_scale=draw(st.sampled_from([None, "tensor", "tensor", 1 / 0.7, 0.0])),
        gamma=gamma,
        channel_dim=draw(st.sampled_from([*range(1, dims), *range(-dims + 1, 0)])) if gamma else -1,
        activation=draw(st.sampled_from(activations)),
    )
    return replace(case, wanted=_subsets(draw, case.operands))


@st.composite
def gathers(draw: st.DrawFn) -> Case:
    case = draw(_calls(adds=False, gives_next=True))
    rows = draw(_row_lists(case.shape[0]).filter(lambda rows: rows is not None))
    return replace(case, next_rows=rows, used=("next",))


@st.composite
def residual_add_norms(draw: st.DrawFn) -> Case:
    case = draw(residual_adds(activations=(None,), least_dims=2, tiles=_NORM_TILES))
    case = _with_norm(draw, replace(case, channel_dim=-1, gives_next=True), ("layer", "rms"))
    case = replace(case, next_rows=draw(_row_lists(case.shape[0])))
    used = draw(st.sampled_from([None, None, ("out",), ("next",)]))
    return replace(case, wanted=_subsets(draw, case.operands), used=used)


@st.composite
def drop_paths(draw: st.DrawFn, residual: bool) -> Case:
    case = draw(_calls(residual=residual, drop_prob=draw(st.sampled_from([0.3, 0.6, 0.0, 0.45, 1.0]))))
    gamma = residual and len(case.shape) > 1 and draw(st.booleans())
    case = replace(case, scale_by_keep=draw(st.booleans()), gamma=gamma)
    return replace(case, wanted=_subsets(draw, case.operands))


@st.composite
def joints(draw: st.DrawFn) -> Case:
    """The add of one path and the input of the next, with learning and frozen rows; one of the two may be missing."""
    parts = draw(st.sampled_from(["both", "both", "both", "input", "add"]))
    normed = parts != "add" and draw(st.booleans())
    case = draw(_calls(least_dims=2, tiles=_NORM_TILES if normed else ("tuned", "small")))
    batch_size, dims = case.shape[0], len(case.shape)
    case = replace(case, adds=parts != "input", gives_next=parts != "add")
    if case.adds:
        rows = draw(_row_lists(batch_size))
        case = replace(
            case,
            rows=rows,
            num_learning=None if rows is None else draw(st.integers(0, len(rows))),
            row_scale=draw(st.sampled_from([None, None, 1 / 0.7, 0.0])),
            gamma=draw(st.booleans()),
            channel_dim=-1 if normed else draw(st.sampled_from(range(1, dims))),
            activation=None if case.gives_next else draw(st.sampled_from([None, "relu"])),
        )
    if case.gives_next:
        rows = draw(_row_lists(batch_size))
        if rows is None and not normed:
            rows = tuple(range(batch_size))  # the next input without rows and norm is the residual itself
        count = None if rows is None else draw(st.integers(0, len(rows)))
        detached = draw(st.sampled_from([None, None, "frozen", "all"]))
        case = replace(case, next_rows=rows, num_next_learning=count, detached=detached)
        case = _with_norm(draw, case, ("layer", "rms")) if normed else case
    results = ["out", *(["next", "frozen_next"][: len(case.next_parts)] if case.gives_next else [])]
    return replace(case, wanted=_subsets(draw, case.operands), used=_subsets(draw, results))


def _with_norm(draw: st.DrawFn, case: Case, norms: tuple[str, ...]) -> Case:
    norm = draw(st.sampled_from(norms))
    return replace(
        case,
        norm=norm,
        eps=draw(st.sampled_from([1e-6, 1e-3, 0.5])),
        weight=draw(st.booleans()),
        bias=norm == "layer" and draw(st.booleans()),
    )
