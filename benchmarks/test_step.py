"""The step cases under pytest-benchmark: `pytest benchmarks --benchmark-only`.

It uses tiny networks, to compare commits. `RDP_BENCH=full` uses those of the README. pytest-benchmark times one
provider after the other. On a noisy machine `python -m benchmarks step` is steadier, because its providers take turns.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import os

import pytest

from .cases import step_case
from .harness import Case, scaled
from .machine import Device, facts, one_thread
from .pairs import TRAINERS
from .step import choices_of

SIZE = os.environ.get("RDP_BENCH", "tiny")
TURNS = {"tiny": 3, "full": 12}[SIZE]
CASES = choices_of({"tiny": "tiny", "full": "cpu"}[SIZE])


@pytest.fixture(autouse=True)
def _threads():
    with one_thread() if SIZE == "tiny" else contextlib.nullcontext():
        yield


@functools.lru_cache(maxsize=1)  # the providers of a case follow each other; only its networks stay in memory
def verified(model: str, mode: str, drop_prob: float) -> Case:
    case = step_case(SIZE, model, mode, drop_prob, TURNS)
    if case.available:
        case.verify()
        case.count_flop(TURNS)
    return case


@pytest.mark.parametrize("name", [trainer.name for trainer in TRAINERS])
@pytest.mark.parametrize("choice", CASES, ids=lambda choice: "-".join(map(str, choice)))
def test_step(benchmark, choice, name):
    case = verified(*choice)
    provider = next(p for p in case.providers if p.name == name)
    if provider.unavailable is not None:
        pytest.skip(provider.unavailable)
    benchmark.group = str(case)
    needed = {"needed_gflop": scaled(provider.needed_flop, 1e-9)}
    benchmark.extra_info |= facts(Device.of("cpu")) | case.labels | {"provider": name} | needed
    turns = itertools.count()
    benchmark.pedantic(provider.run, setup=lambda: ((next(turns),), {}), rounds=TURNS)
