"""Prepared calls of Triton: none is used for a call that it doesn't fit. How a call finds its compiled kernel is tested in
`tests/compiled/test_direct_launches.py`.
"""

import importlib

import pytest

import rdp_kernels as rdp
from rdp_kernels._utils import checks
from rdp_kernels.kernels.triton import launchers

from .budget import check
from .forgotten import SEEN_IN_VALUES, forgotten
from .walk import walk


@pytest.fixture(autouse=True)
def _triton():
    with rdp.use_backend("triton"), launchers.nothing_prepared():
        yield


@pytest.fixture
def unchecked(monkeypatch):
    """How many calls of the public ops went without checks."""
    counts = {"calls": 0, "unchecked": 0}

    def counted(attempt):
        def run(*arguments):
            out = attempt(*arguments)
            counts["calls"] += 1
            counts["unchecked"] += out is not None
            return out

        return run

    for op in ("residual_add", "gather_rows", "residual_add_norm"):
        module = importlib.import_module(f"rdp_kernels.ops.{op}")
        (name,) = (name for name in vars(module) if name.startswith("unchecked"))
        monkeypatch.setattr(module, name, counted(getattr(module, name)))
    return counts


def test_calls_that_differ_in_little(unchecked, monkeypatch):
    """2,200 calls in one process. Every other one takes its lists of rows as on a GPU, where their values aren't checked
    and calls of a known kind are checked in nothing."""
    host_has = checks.host_has
    for number, (op, case) in enumerate(walk(0, 2200)):
        monkeypatch.setattr(checks, "host_has", host_has if number % 2 else lambda tensor: False)
        check(case, op)
    assert unchecked["unchecked"] > 400, "few calls were of a known kind"


@pytest.mark.parametrize("pair", SEEN_IN_VALUES, ids=lambda pair: pair.field)
def test_each_field_of_a_key_matters(pair):
    """The pair is right, and wrong with a key that lacks the field. Each call is made twice, as the second one of a kind
    goes without checks."""
    (op, first), (then, second) = pair.calls

    def check_both():
        check(first, op)
        check(first, op)
        check(second, then)
        check(second, then)

    check_both()
    with forgotten(pair.field), pytest.raises((AssertionError, RuntimeError, TypeError)):
        check_both()
