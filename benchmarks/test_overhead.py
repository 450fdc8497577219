"""The cost of a call under pytest-benchmark: `pytest benchmarks/test_overhead.py --benchmark-only`.

It uses blocks of few calls, to compare commits. `RDP_BENCH=full` uses those of `python -m benchmarks overhead`. It runs
on one thread, as a second one has nothing to do.
"""

from __future__ import annotations

import functools
import itertools
import os

import pytest

from .harness import Case
from .machine import Device, facts, one_thread
from .op_providers import EAGER, OURS, OURS_EAGER, OURS_NATIVE
from .overhead import CALLS, CALLS_A_TURN, FLOOR, PASSES, SHAPES, TURNS, launches, ops, overhead_cases

SIZE = os.environ.get("RDP_BENCH", "tiny")
CPU = Device.of("cpu")
CHOICES = [
    (kind, shape, direction, name)
    for kind, shape, direction in itertools.product(CALLS, SHAPES, PASSES)
    for name in (EAGER, OURS_EAGER, OURS, OURS_NATIVE, *[FLOOR] * (kind is next(iter(CALLS))))
]


@pytest.fixture(autouse=True)
def _threads():
    with one_thread():
        yield


@functools.lru_cache(maxsize=1)  # tests on the same tensors follow each other
def verified(kind: type, shape: tuple[int, ...]) -> dict[str, Case]:
    op = next(op for op in ops(CPU.device) if type(op) is kind and op.setting.shape == shape)
    cases = {case.labels["pass"]: case for case in overhead_cases(op, CALLS_A_TURN[SIZE])}
    for case in cases.values():
        case.verify()
    return cases


def _id(value: object) -> str:
    return getattr(value, "name", "x".join(map(str, value)) if isinstance(value, tuple) else str(value))


@pytest.mark.parametrize(("kind", "shape", "direction", "name"), CHOICES, ids=_id)
def test_call(benchmark, kind, shape, direction, name):
    case = verified(kind, shape)[direction]
    provider = next(p for p in case.providers if p.name == name)
    if provider.unavailable is not None:
        pytest.skip(provider.unavailable)
    benchmark.group = str(case)
    provider.run(0)
    benchmark.extra_info |= (
        facts(CPU) | case.labels | {"provider": name} | launches(provider, CPU.device, CALLS_A_TURN[SIZE])
    )
    turns = itertools.count()
    benchmark.pedantic(provider.run, setup=lambda: ((next(turns),), {}), rounds=TURNS[SIZE])
