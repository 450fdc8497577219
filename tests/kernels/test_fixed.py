"""The fixed table, on each kernel library: forward and all gradients against float64, twice for equal bits."""

from dataclasses import replace

import pytest
import torch

import rdp_kernels as rdp
from rdp_kernels.kernels.native.library import has_cuda
from rdp_kernels.kernels.spec import Results
from tests.conftest import DEVICE

from . import fixed, ops
from .budget import check

# Compiled kernels are fast enough for larger sizes, and cut only wider rows and larger tensors into pieces.
IN_SMALL = {"triton": (4, 16, 80), "native": (9, 16, 2320)}


@pytest.mark.parametrize("row", [pytest.param(row, id=row.name) for row in fixed.TABLE])
@pytest.mark.parametrize("library", ["triton", "native"])
def test_fixed_row(library, row, record_property):
    if library == "native" and DEVICE == "cuda" and not has_cuda():
        pytest.skip("the compiled library was built without CUDA")
    case = row.case(largest=IN_SMALL[library])
    with rdp.use_backend(library):
        if library == "native" and row.refused and fixed.CUDA_KERNELS:
            with pytest.raises(RuntimeError, match=f"the CUDA kernels of the compiled library .*{row.refused}"):
                check(case, row.op)
            return
        used = check(case, row.op, twice=True)
    assert used.tensor is not None, "nothing was compared"
    record_property("budget_used", used.share)
    record_property("worst", used.tensor)


@pytest.mark.parametrize("tensor", ["out", "dresidual"])
def test_other_bits_in_a_second_run_are_reported(tensor):
    """One unit in the last place is within both budgets, and a race need not change more."""
    calls = []

    def op(operands, case):
        (out, *_), factor = ops.residual_add(operands, case), 1 + torch.finfo(torch.float32).eps * len(calls)
        calls.append(case)
        if tensor == "out":
            return Results(out * factor)
        out.register_hook(lambda gradient: gradient * factor)
        return Results(out)

    with pytest.raises(AssertionError, match=f"^{tensor}: other bits in a second run"):
        test_fixed_row("triton", replace(fixed.TABLE[0], op=op), lambda *_: None)
    assert len(calls) == 2
