import functools

import pytest
import torch
from hypothesis import assume

import rdp_kernels as rdp

from .budget import check
from .cases import BACKENDS, NUMERICS_BACKENDS, drawn_again_if_unsupported


@pytest.fixture(params=BACKENDS)
def backend(request):
    """Every op in the test runs on this backend, or raises."""
    with rdp.use_backend(request.param):
        yield request.param


@pytest.fixture(params=NUMERICS_BACKENDS)
def numerics_backend(request):
    """The same, for calls that this backend may not support; `drawn_again_if_unsupported` leaves those out."""
    with rdp.use_backend(request.param):
        yield request.param


@pytest.fixture
def check_new():
    """`check` for cases that weren't drawn before: many draws lead to the same case."""
    passed = set()

    def check_new(case, op):
        assume(case not in passed)
        with drawn_again_if_unsupported():
            check(case, op)
        passed.add(case)

    return check_new


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch):
    """Uninitialised memory from torch holds NaN, or a number that no row has, so that unwritten elements show."""
    for name in ("empty", "empty_like", "empty_strided"):
        monkeypatch.setattr(torch, name, _with_poison(getattr(torch, name)))
    for name in ("new_empty", "new_empty_strided"):
        monkeypatch.setattr(torch.Tensor, name, _with_poison(getattr(torch.Tensor, name)))


def _with_poison(make):
    @functools.wraps(make)
    def poisoned(*args, **kwargs):
        made = make(*args, **kwargs)
        if made.dtype.is_floating_point or made.dtype.is_complex:
            made.detach().fill_(torch.nan)
        elif made.dtype != torch.bool:
            made.fill_(torch.iinfo(made.dtype).max // 2)
        return made

    return poisoned
