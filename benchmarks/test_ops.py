"""The op cases under pytest-benchmark: `pytest benchmarks/test_ops.py --benchmark-only`.

It uses tiny tensors, to compare commits. `RDP_BENCH=full` uses those of `python -m benchmarks ops`.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import os

import pytest

from .harness import Case
from .machine import Device, facts, one_thread
from .op_cases import OPS, PASSES, Setting, op_cases, settings
from .op_others import OTHERS
from .op_providers import EAGER, OURS, OURS_EAGER, OURS_NATIVE

SIZE = os.environ.get("RDP_BENCH", "tiny")
TURNS = {"tiny": 3, "full": 12}[SIZE]
CHOICES = [
    (setting, direction, name)
    for setting, direction in itertools.product(settings("cpu", SIZE), PASSES)
    for name in (
        EAGER,
        OPS[setting.op].compiled,
        OURS_EAGER,
        OURS,
        OURS_NATIVE,
        *(other.library for other in OTHERS.get(setting.op, ()) if other.serves(setting)),
    )
]


@pytest.fixture(autouse=True)
def _threads():
    with one_thread() if SIZE == "tiny" else contextlib.nullcontext():
        yield


@functools.lru_cache(maxsize=1)  # tests on the same tensors follow each other; only these tensors stay in memory
def verified(setting: Setting) -> dict[str, Case]:
    cases = {case.labels["pass"]: case for case in op_cases(setting, Device.of("cpu"))}
    for case in cases.values():
        case.verify()
    return cases


def _id(value: object) -> str:
    return "-".join(map(str, value.labels.values())) if isinstance(value, Setting) else str(value)


@pytest.mark.parametrize(("setting", "direction", "name"), CHOICES, ids=_id)
def test_op(benchmark, setting, direction, name):
    case = verified(setting)[direction]
    provider = next(p for p in case.providers if p.name == name)
    if provider.unavailable is not None:
        pytest.skip(provider.unavailable)
    benchmark.group = str(case)
    needed = {"needed_gb": provider.needed_bytes * 1e-9}
    benchmark.extra_info |= facts(Device.of("cpu")) | case.labels | {"provider": name} | needed
    turns = itertools.count()
    benchmark.pedantic(provider.run, setup=lambda: ((next(turns),), {}), rounds=TURNS)
