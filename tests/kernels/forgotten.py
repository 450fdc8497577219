"""What every field of a key is for: pairs of calls that only this field tells apart."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple
from unittest import mock

from rdp_kernels.kernels.buffers import Context
from rdp_kernels.kernels.triton import launchers
from rdp_kernels.kernels.triton.keys import (
    AddKey,
    BackwardKey,
    Cache,
    ForwardKey,
    Kind,
    NextKey,
    named,
    named_add,
    named_backward,
    named_forward,
)

from . import ops
from .budget import Op
from .cases import Case
from .walk import without_gradient


class ShortBackwardKey(NamedTuple):
    """As `short.residual_add_backward` makes it."""

    dout: Kind
    add: AddKey
    out: Kind | None
    wants_update: bool
    update_dtype: Any


NAMED = (ForwardKey, BackwardKey, ShortBackwardKey, AddKey, NextKey, Kind)


def named_key(key: tuple) -> ForwardKey | BackwardKey | ShortBackwardKey:
    """A key of any of the caches: they begin with a number, a context, and a tuple."""
    if isinstance(key[0], int):
        return named_forward(key)
    if isinstance(key[0], Context):
        return named_backward(key)
    dout, add, out, *further = key
    return ShortBackwardKey(named(dout), named_add(add), named(out), *further)


def without(field: str, key: Any) -> Any:
    if type(key) in NAMED:
        return tuple(None if name == field else without(field, value) for name, value in key._asdict().items())
    return tuple(without(field, value) for value in key) if type(key) is tuple else key


@contextlib.contextmanager
def forgotten(field: str) -> Iterator[None]:
    """Within the `with` block calls that differ in this field alone share what is prepared."""

    def shortened(method: Any) -> Any:
        return lambda cache, key, *value: method(cache, without(field, named_key(key)), *value)

    with (
        launchers.nothing_prepared(),
        mock.patch.object(Cache, "get", shortened(Cache.get)),
        mock.patch.object(Cache, "add", shortened(Cache.add)),
    ):
        yield


@dataclass(frozen=True)
class Pair:
    """Two calls. `changes` make the second case of the first, `then` is its op if that is another one."""

    field: str
    op: Op
    first: Case
    changes: dict[str, Any] = field(default_factory=dict)
    then: Op | None = None

    @property
    def calls(self) -> tuple[tuple[Op, Case], tuple[Op, Case]]:
        return (self.op, self.first), (self.then or self.op, replace(self.first, **self.changes))


def _padded(*places: int) -> dict[str, Any]:
    return {"layouts": tuple("padded" if place in places else "dense" for place in range(4))}


ADD = Case((4, 6))
MIXED = Case((4, 6), rows=(3, 0, 2, 1), num_learning=4)
NORM = Case((4, 6), gives_next=True, norm="layer", weight=True, bias=True)
ONLY_NORM = replace(NORM, adds=False)
STRIDED_VECTORS = {"layouts": ("dense", "dense", "dense", "strided")}
MISALIGNED = {"layouts": ("offset", "dense", "dense", "dense")}

# The first call is the smaller one where sizes differ, so that the wrong one stays within its tensors.
SEEN_IN_VALUES = [
    Pair("batch_size", ops.residual_add, Case((3, 6)), {"shape": (4, 6)}),
    Pair("strides", ops.residual_add, ADD, _padded(0, 1)),
    Pair("dtype", ops.residual_add, ADD, {"dtypes": ("float64",) * 4}),
    Pair("shape", ops.residual_add, replace(ADD, shape=(4, 3), **_padded(0, 1)), {"shape": (4, 6), **_padded()}),
    Pair("residual", ops.residual_add, ADD, _padded(0)),
    Pair("update", ops.residual_add, ADD, _padded(1)),
    Pair("frozen_update", ops.joint, MIXED, {"num_learning": 2}),
    Pair("gamma", ops.residual_add, replace(ADD, gamma=True), STRIDED_VECTORS),
    Pair("row_scale", ops.residual_add, replace(ADD, row_scale="tensor"), STRIDED_VECTORS),
    Pair("add", ops.residual_add, ADD, {"activation": "relu"}),
    Pair("scale", ops.residual_add, replace(ADD, row_scale=0.0), {"row_scale": 1 / 0.7}),
    Pair("channel_dim", ops.residual_add, Case((2, 3, 3), gamma=True, channel_dim=1), {"channel_dim": 2}),
    Pair("activation", ops.residual_add, ADD, {"activation": "relu"}),
    Pair("next", ops.residual_add_norm, NORM, {"eps": 0.5}),
    Pair("has_rows", ops.residual_add_norm, NORM, {"next_rows": (2, 0)}),
    Pair("norm", ops.residual_add_norm, replace(NORM, bias=False), {"norm": "rms"}),
    Pair("eps", ops.residual_add_norm, NORM, {"eps": 0.5}),
    Pair("weight", ops.residual_add_norm, replace(NORM, bias=False), STRIDED_VECTORS),
    Pair("bias", ops.residual_add_norm, replace(NORM, weight=False), STRIDED_VECTORS),
    Pair("in_place", ops.joint, ADD, {"in_place": True}, ops.in_place),
    Pair("context", ops.joint, Case((3, 6)), {"shape": (4, 6)}),
    Pair("gradients", ops.residual_add_norm, replace(NORM, wanted=("residual",), used=("out",)), {"used": None}),
    Pair("results", ops.joint, ONLY_NORM, _padded(0)),
    Pair("wanted", ops.residual_add_norm, replace(NORM, wanted=("residual",)), {"wanted": None}),
    Pair("dout", ops.residual_add, Case((4, 3), row_scale=1 / 0.7), {"shape": (4, 6)}),
    Pair("wants_update", ops.residual_add, replace(ADD, gamma=True, wanted=("gamma",)), {"wanted": None}),
    Pair("update_dtype", ops.residual_add, replace(ADD, dtypes=("float32", "bfloat16", "float32", "float32"), row_scale=1 / 0.7), {"dtypes": ("float32",) * 4}),
]  # fmt: skip
"""With the field forgotten the second call gives wrong numbers."""

SEEN_BY_THE_COMPILER = [
    Pair("misaligned_by", ops.residual_add, ADD, MISALIGNED),
    Pair("misaligned_by", ops.gather_rows, replace(ADD, adds=False, gives_next=True, next_rows=(2,)), MISALIGNED),
    Pair("dtype", ops.residual_add, ADD, {"dtypes": ("bfloat16",) * 4}),
    Pair("gamma", ops.residual_add, ADD, {"gamma": True}),
    Pair("row_scale", ops.residual_add, ADD, {"row_scale": "tensor"}),
    Pair("frozen_update", ops.joint, MIXED, {"num_learning": 2}),
    Pair("has_rows", ops.residual_add, ADD, {"rows": (2, 0)}),
    Pair("has_rows", ops.residual_add_norm, NORM, {"next_rows": (2, 0)}),
    Pair("has_frozen", ops.joint, replace(NORM, next_rows=(2, 0, 1), wanted=()), {"num_next_learning": 2}),
    Pair("weight", ops.residual_add_norm, replace(NORM, bias=False), {"weight": False}),
    Pair("bias", ops.residual_add_norm, NORM, {"bias": False}),
    Pair("saves", without_gradient(ops.residual_add_norm), NORM, {}, ops.residual_add_norm),
    Pair("gradients", ops.residual_add_norm, NORM, {"used": ("next",)}),
]
"""With the field forgotten the second call launches a kernel that was compiled for other arguments."""
