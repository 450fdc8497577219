"""Calls that differ from one another in little. If the key of prepared calls lacked something, one of these calls would
be served by what was prepared for another.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch

from rdp_kernels.kernels.spec import Operands, Results

from . import ops
from .budget import Op
from .cases import DTYPES, Case

SHAPES = [(4, 6), (3, 6), (4, 3), (1, 6), (0, 6), (4, 1), (4, 16), (4, 17), (2, 64), (5,), (4, 2, 6), (4, 1, 6), (4, 6, 1), (4, 0, 3), (3, 2, 3, 4), (3, 3, 2, 4), (2, 4, 1, 3), (3, 2, 2, 1)]  # fmt: skip
STREAM_LAYOUTS = ["dense", "dense", "offset", "padded", "strided", "transposed", "channels_last"]
LAYOUTS = [
    STREAM_LAYOUTS,
    [*STREAM_LAYOUTS, "expanded"],
    [*STREAM_LAYOUTS, "expanded", "expanded scalar"],
    ["dense", "dense", "offset", "strided"],
]
OF_ANY = ("shape", "dtypes", "layouts")
OF_ADD = ("rows", "row_scale", "gamma", "channel_dim", "wanted")
OF_NEXT = ("next_rows", "norm", "eps", "weight", "bias", "used")
OF_PATH = (*OF_ADD, *OF_NEXT, "adds", "gives_next", "num_learning", "num_next_learning", "detached")


def without_gradient(op: Op) -> Op:
    @functools.wraps(op)
    def run(operands: Operands, case: Case) -> Results:
        with torch.no_grad():
            return op(operands, case)

    return run


FIELDS: dict[Op, tuple[str, ...]] = {
    ops.residual_add: (*OF_ANY, *OF_ADD, "activation"),
    ops.gather_rows: (*OF_ANY, "next_rows"),
    ops.residual_add_norm: (*OF_ANY, *OF_ADD, *OF_NEXT),
    ops.joint: (*OF_ANY, *OF_PATH, "activation", "residual"),
    ops.in_place: (*OF_ANY, *OF_PATH),
}
"""The fields of a case that may change, by op."""
ONLY_FORWARD = {op: without_gradient(op) for op in FIELDS}


def walk(seed: int, length: int) -> Iterator[tuple[Op, Case]]:
    """Calls of all ops in turn. Each differs from an earlier one of its op in up to two fields, and in its values."""
    rng = random.Random(seed)
    seen = {op: [_fitted(op, Case((4, 6)))] for op in FIELDS}
    for number in range(length):
        op = rng.choice(list(FIELDS))
        case = rng.choice(seen[op][-6:])
        for name in rng.sample(FIELDS[op], rng.choice([0, 0, 1, 1, 2])):
            case = replace(case, **{name: _DRAW[name](rng, case)})
        case = _fitted(op, replace(case, seed=number))
        seen[op].append(case)
        yield ONLY_FORWARD[op] if rng.random() < 0.1 else op, case


def _rows(rng: random.Random, case: Case) -> tuple[int, ...] | None:
    rows = rng.sample(range(case.shape[0]), rng.randint(0, case.shape[0]))
    return rng.choice([None, tuple(rows), tuple(rows)])


def _some_of(*names: str) -> Callable[[random.Random, Case], tuple[str, ...] | None]:
    def draw(rng: random.Random, case: Case) -> tuple[str, ...] | None:
        return rng.choice([None, (), tuple(name for name in names if rng.random() < 0.6)])

    return draw


def _one_of(*values: Any) -> Callable[[random.Random, Case], Any]:
    return lambda rng, case: rng.choice(values)


def _layouts(rng: random.Random, case: Case) -> tuple[str, ...]:
    """With one of the four changed, or with all alike."""
    if rng.random() < 0.25:
        return (rng.choice(STREAM_LAYOUTS),) * 4
    place = rng.randrange(4)
    return (*case.layouts[:place], rng.choice(LAYOUTS[place]), *case.layouts[place + 1 :])


_DRAW: dict[str, Callable[[random.Random, Case], Any]] = {
    "shape": _one_of(*SHAPES),
    "dtypes": _one_of(*DTYPES),
    "layouts": _layouts,
    "adds": _one_of(True, True, False),
    "gives_next": _one_of(True, True, False),
    "residual": _one_of(True, True, False),
    "rows": _rows,
    "num_learning": lambda rng, case: rng.choice([None, rng.randint(0, case.shape[0])]),
    "row_scale": _one_of(None, "tensor", "tensor", 1 / 0.7, 2.0, 0.0, 1.0),
    "gamma": _one_of(True, True, False),
    "channel_dim": lambda rng, case: rng.choice([-1, *range(1, len(case.shape))]),
    "activation": _one_of(None, "relu"),
    "next_rows": _rows,
    "num_next_learning": lambda rng, case: rng.choice([None, rng.randint(0, case.shape[0])]),
    "norm": _one_of("layer", "rms", None),
    "eps": _one_of(1e-6, 1e-3, 0.5),
    "weight": _one_of(True, True, False),
    "bias": _one_of(True, False),
    "detached": _one_of(None, "frozen", "all"),
    "wanted": _some_of(*Operands._fields),
    "used": _some_of("out", "next", "frozen_next"),
}


def _fitted(op: Op, case: Case) -> Case:
    """The case with fields that fit one another, and the op."""
    in_place, of_path = op is ops.in_place, op in (ops.joint, ops.in_place)
    gives_next = case.gives_next if of_path else op is not ops.residual_add
    adds = case.adds or in_place or not gives_next if of_path else op is not ops.gather_rows
    normed = gives_next and (case.norm is not None if of_path else op is ops.residual_add_norm)
    shape = (*case.shape, 7) if normed and len(case.shape) == 1 else case.shape
    residual = op is not ops.joint or case.residual or gives_next or case.rows is not None

    rows = _existing(case.rows, shape[0]) if adds else None
    next_rows = _existing(case.next_rows, shape[0]) if gives_next else None
    if gives_next and not normed and next_rows is None:
        next_rows = tuple(range(shape[0]))
    gamma = adds and case.gamma and len(shape) > 1
    channel_dim = -1 if normed or not gamma or case.channel_dim >= len(shape) else case.channel_dim
    of_residual, of_update, of_gradients, of_vectors = case.layouts
    if in_place:
        of_residual = of_gradients = "dense"
    if of_vectors not in LAYOUTS[3]:
        of_vectors = "dense"
    norm = (case.norm or "layer") if normed else None
    num_learning, num_next_learning = (
        None if which is None or count is None or not of_path else min(count, len(which))
        for which, count in ((rows, case.num_learning), (next_rows, case.num_next_learning))
    )
    results = ("out", "next", "frozen_next")[: 1 + gives_next + of_path]
    used = case.used if case.used is None else tuple(name for name in case.used if name in results)
    case = replace(
        case,
        shape=shape,
        layouts=(of_residual, of_update, of_gradients, of_vectors),
        adds=adds,
        gives_next=gives_next,
        residual=residual,
        rows=rows,
        num_learning=num_learning,
        row_scale=case.row_scale if adds else None,
        gamma=gamma,
        channel_dim=channel_dim,
        activation=case.activation if adds and residual and not gives_next and not in_place else None,
        next_rows=next_rows,
        num_next_learning=num_next_learning,
        norm=norm,
        weight=normed and case.weight,
        bias=norm == "layer" and case.bias,
        detached=case.detached if gives_next and of_path else None,
        in_place=in_place,
        used=("next",) if op is ops.gather_rows else used,
    )
    return case if case.wanted is None else replace(case, wanted=tuple(n for n in case.wanted if n in case.operands))


def _existing(rows: tuple[int, ...] | None, batch_size: int) -> tuple[int, ...] | None:
    return None if rows is None else tuple(row for row in rows if row < batch_size)
