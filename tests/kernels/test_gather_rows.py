import pytest
import torch
from hypothesis import given

from rdp_kernels.kernels.spec import NextInput, Operands, RowSet
from rdp_kernels.kernels.triton import kernels
from rdp_kernels.kernels.triton.forward import inversion
from tests.conftest import DEVICE

from . import ops
from .budget import check
from .cases import Case, gathers, in_parts
from .values import operands_of


@in_parts(200)
@given(case=gathers())
def test_against_float64(numerics_backend, check_new, part, case):
    check_new(case, ops.gather_rows)


@pytest.mark.parametrize("width", [1, 3, 13, 64, 197, 257, 1000, 5000])
def test_widths(backend, width):
    check(Case((4, width), adds=False, gives_next=True, next_rows=(3, 0, 1), layouts=("offset",) * 4), ops.gather_rows)


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
def test_bits_are_copied(backend, dtype):
    """Infinities, NaN, numbers below the normal ones, and the sign of zero."""
    special = torch.tensor(
        [torch.inf, -torch.inf, torch.nan, -0.0, torch.finfo(getattr(torch, dtype)).smallest_normal / 4]
    )
    case = Case((3, 5), (dtype,) * 4, adds=False, gives_next=True, next_rows=(2, 1))
    operands = operands_of(case)
    operands = operands._replace(residual=special.to(operands.residual).repeat(3, 1))
    gathered = ops.gather_rows(operands, case).next
    bits = {"float64": torch.int64, "float32": torch.int32}.get(dtype, torch.int16)
    assert torch.equal(gathered.view(bits), operands.residual[1:].view(bits))


OUT_OF_RANGE = torch.tensor([2, 3, -1, 2**40, 0], device=DEVICE)


def test_triton_gathers_no_row_out_of_range():
    memory = torch.zeros(9, 4, device=DEVICE)
    memory[3:6] = torch.arange(12.0, device=DEVICE).view(3, 4)
    x = memory[3:6]
    gathered = kernels().fused_add_fwd(Operands(x), None, NextInput(RowSet(OUT_OF_RANGE, 5)))[0].next
    assert torch.equal(gathered[[0, 4]], x[[2, 0]])
    assert gathered[1:4].isnan().all(), "uninitialised rows, which hold NaN in tests"


def test_triton_inverts_no_row_out_of_range():
    memory = torch.full((9,), 7, device=DEVICE)
    launch, tiles = inversion(3, memory.device)
    launch(1, memory[3:6], OUT_OF_RANGE, 3, 5, tiles.block_m, tiles.block_n)
    assert memory.tolist() == [7, 7, 7, 4, 5, 0, 7, 7, 7]
