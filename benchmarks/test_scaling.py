"""A pair of iterations by the number of paths, under pytest-benchmark: `pytest benchmarks/test_scaling.py
--benchmark-only`.

It uses few paths, to compare commits. `RDP_BENCH=full` uses the numbers of paths of `python -m benchmarks scaling`. It
runs on one thread, as a second one has nothing to do.
"""

from __future__ import annotations

import functools
import itertools
import os

import pytest

from .cases import MODES
from .harness import Case
from .machine import Device, facts, one_thread
from .scaling import PATHS
from .tiny_paths import BY_HAND, OURS, PLAIN, PLAN, calls_of, path_case

SIZE = os.environ.get("RDP_BENCH", "tiny")
TURNS, COUNTS = {"tiny": 3, "full": 12}[SIZE], PATHS[SIZE]


@pytest.fixture(autouse=True)
def _threads():
    with one_thread():
        yield


@functools.lru_cache(maxsize=1)  # the providers of a case follow each other
def verified(mode: str, paths: int) -> Case:
    case = path_case(mode, paths, TURNS, "cpu")
    case.verify()
    case.warm_up()
    return case


@pytest.mark.parametrize("name", [PLAIN, BY_HAND, PLAN, OURS])
@pytest.mark.parametrize(("mode", "paths"), list(itertools.product(MODES, COUNTS)))
def test_pair(benchmark, mode, paths, name):
    case = verified(mode, paths)
    provider = next(p for p in case.providers if p.name == name)
    benchmark.group = str(case)
    benchmark.extra_info |= facts(Device.of("cpu")) | case.labels | {"provider": name} | calls_of(provider)
    turns = itertools.count()
    benchmark.pedantic(provider.run, setup=lambda: ((next(turns),), {}), rounds=TURNS)
