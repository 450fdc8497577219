"""Prepared calls of Triton: none is used for a call that it doesn't fit. How a call finds its compiled kernel is tested in
`tests/compiled/test_direct_launches.py`.
"""

import importlib
import threading
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction

import numpy as np
import pytest
import torch

import rdp_kernels as rdp
from rdp_kernels._utils import checks
from rdp_kernels.kernels.triton import launchers
from rdp_kernels.kernels.triton.backward import backwards
from rdp_kernels.kernels.triton.forward import forwards
from rdp_kernels.kernels.triton.keys import Cache
from rdp_kernels.kernels.triton.prepared import observed
from tests.conftest import DEVICE, INTERPRETED

from . import ops
from .budget import check
from .cases import Case, as_asked
from .forgotten import SEEN_IN_VALUES, forgotten
from .tiles import cut
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
    """2,200 calls in one process, times RDP_EXAMPLES; 200 on a GPU, which has to compile their kernels. Every other one
    takes its lists of rows as on a GPU, where their values aren't checked and calls of a known kind are checked in
    nothing."""
    host_has = checks.host_has
    for number, (op, case) in enumerate(walk(0, as_asked(2200) if INTERPRETED else 200)):
        monkeypatch.setattr(checks, "host_has", host_has if number % 2 else lambda tensor: False)
        check(case, op)
    assert unchecked["unchecked"] > unchecked["calls"] / 4, "few calls were of a known kind"


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


def test_nothing_prepared_is_kept_for_other_launch_numbers():
    """Also of calls that go without checks, forward and backward."""
    residual, branch = (torch.ones(4, 6, device=DEVICE, requires_grad=True) for _ in range(2))

    def configs():
        seen = []
        with observed(seen.append):
            for _ in range(2):
                rdp.residual_add(residual, branch, row_scale=2.0).sum().backward()
        return {launch.config.max_columns for launch in seen}

    assert configs() == {2048}
    with cut("small"):
        assert configs() == {256}
    assert configs() == {2048}


@pytest.mark.parametrize("eps", [Fraction(1, 2), 0.5, np.float32(0.5)])
def test_eps_of_any_type(eps):
    """Equal numbers are the same in a key, whatever their types are: the first call's number must do for all."""
    x = torch.randn(4, 6, device=DEVICE)
    first, second = (rdp.residual_add_norm(x, x, None, eps=number)[1] for number in (eps, 0.5))
    torch.testing.assert_close(first, torch.nn.functional.layer_norm(2 * x, (6,), eps=0.5))
    assert torch.equal(first, second)


def test_the_cache_is_bounded(monkeypatch):
    """A full cache drops the oldest calls. They are prepared anew."""
    monkeypatch.setattr(Cache, "LARGEST", 8)
    for _ in range(2):
        for width in range(1, 20):
            check(Case((2, width), gamma=True), ops.residual_add)
            assert len(forwards) <= 8
            assert len(backwards) <= 8
    kept = list(forwards)
    check(Case((2, 1), gamma=True), ops.residual_add)
    assert list(forwards) == [*kept[1:], list(forwards)[-1]]


def test_threads():
    """Eight threads alternate between calls while a ninth forgets what was prepared."""
    done, lock = threading.Event(), threading.Lock()

    def forget():
        while not done.wait(0.001):
            launchers._forget()

    def work(number):
        for op, case in walk(number, 25):
            check(case, op)

    def run(launch):
        with lock:  # Triton's interpreter serves one thread at a time
            launch.run()

    with ThreadPoolExecutor(9) as pool, observed(run):
        forgetting = pool.submit(forget)
        try:
            list(pool.map(work, range(8)))
        finally:
            done.set()
        forgetting.result()
