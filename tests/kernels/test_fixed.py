"""The fixed table, on each kernel library: forward and all gradients against float64, twice for equal bits."""

import pytest

import rdp_kernels as rdp
from rdp_kernels._native.library import has_cuda
from tests.conftest import DEVICE

from . import fixed
from .budget import check

# Compiled kernels go through more in the time, and cut only wider rows and larger tensors into pieces.
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
