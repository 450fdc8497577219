"""Tensors that autograd saves may come back in another place of memory, or with other strides: its hooks decide that."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks

from rdp_kernels._utils import checks

from . import ops
from .budget import check
from .cases import Case
from .values import laid_out

TOKENS = Case((4, 3, 6), gamma=True)
IMAGES = Case((4, 3, 2, 6), layouts=("channels_last",) * 3 + ("dense",), gamma=True, channel_dim=1)
NORM = Case((4, 3, 6), gamma=True, gives_next=True, norm="layer", weight=True, bias=True)
CALLS = {
    "all rows": (ops.residual_add, TOKENS),
    "rows alone": (ops.residual_add, Case((4, 3, 6), rows=(2, 0), row_scale=1 / 0.7)),
    "some rows": (ops.residual_add, replace(TOKENS, rows=(2, 0), row_scale="tensor")),
    "relu": (ops.residual_add, replace(TOKENS, rows=(2, 0), activation="relu")),
    "images": (ops.residual_add, IMAGES),
    "relu on images": (ops.residual_add, replace(IMAGES, activation="relu")),
    "gather": (ops.gather_rows, replace(TOKENS, gamma=False, adds=False, gives_next=True, next_rows=(3, 1))),
    "norm": (ops.residual_add_norm, NORM),
    "norm of some rows": (ops.residual_add_norm, replace(NORM, rows=(2, 0), next_rows=(0, 3))),
    "rms": (ops.residual_add_norm, replace(NORM, norm="rms", bias=False)),
    "mixed rows": (ops.joint, replace(NORM, rows=(2, 0, 3), num_learning=1, next_rows=(0, 3, 1), num_next_learning=2)),
}  # fmt: skip
HOOKS = {
    "on the CPU": save_on_cpu,
    "at an odd address": lambda: saved_tensors_hooks(lambda t: t, partial(laid_out, layout="offset")),
    "every other element": lambda: saved_tensors_hooks(lambda t: t, partial(laid_out, layout="strided")),
    "contiguous": lambda: saved_tensors_hooks(lambda t: t, torch.Tensor.contiguous),
    "transposed": lambda: saved_tensors_hooks(lambda t: t, partial(laid_out, layout="transposed")),
    "channels last": lambda: saved_tensors_hooks(lambda t: t, partial(laid_out, layout="channels_last")),
}


@pytest.mark.parametrize("hooks", HOOKS.values(), ids=HOOKS)
@pytest.mark.parametrize(("op", "case"), CALLS.values(), ids=CALLS)
def test_against_float64(numerics_backend, op, case, hooks, monkeypatch):
    """The first call, one of a kind that is known, and one without hooks, which finds what was prepared for the others.
    Values of rows aren't checked, as on a GPU, so that a known kind isn't checked at all."""
    if numerics_backend == "native" and case.norm is not None and hooks is HOOKS["every other element"]:
        pytest.skip("torch's own norm reads wrong statistics then")
    monkeypatch.setattr(checks, "host_has", lambda tensor: False)

    def within_hooks(operands, case):
        with hooks():
            return op(operands, case)

    check(case, within_hooks)
    check(case, within_hooks)
    check(case, op)
