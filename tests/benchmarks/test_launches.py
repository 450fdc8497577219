"""Launches of a call. On the CPU these are the ops that compute, and each can be named."""

from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType

import rdp_kernels as rdp
from benchmarks import launches, overhead
from benchmarks.launches import count_launches
from benchmarks.overhead import BOTH, CALLS, FORWARD, NO_GRAD, overhead_cases

CPU = torch.device("cpu")
needs_library = pytest.mark.skipif(rdp.available_backends()["native"] is not None, reason="it is not built")


def count(run):
    return count_launches(run, CPU)


def test_only_ops_that_compute_count():
    x = torch.randn(4, 4)
    assert count(lambda: x + x) == 1
    assert count(lambda: (x * 2).relu_()) == 2
    assert count(lambda: x.t()[1:].unsqueeze(0).expand(3, 3, 4).detach()) == 0
    assert count(lambda: torch.empty_like(x).new_empty(3)) == 0
    assert count(lambda: torch.zeros(3)) == 1
    assert count(lambda: x.sum().item()) == 1
    leaf = torch.randn(4, 4, requires_grad=True)
    assert count(lambda: (leaf * x).sum().backward()) == 4, "mul, sum; ones for the gradient, mul"


# eager: γ · branch, · mask, + residual; backward · mask, · γ, · branch for dγ and its sum. With relu one more each way.
# rows: γ · branch, index_add; the rows, · scale, · γ, · branch, sum. drop_path_add draws its mask, and divides it.
EAGER = {
    "residual_add": (3, 3 + 4),
    "residual_add relu": (4, 4 + 5),
    "residual_add rows": (2, 2 + 5),
    "gather_rows": (1, 1 + 2),
    "drop_path_add": (5, 5 + 4),
}


def launches_of(kind, provider):
    op = next(op for op in overhead.ops(CPU) if type(op) is kind)
    found = {}
    for case in overhead_cases(op, 3):
        chosen = next(p for p in case.available if p.name == provider)
        chosen.run(0)
        found[case.labels["pass"]] = overhead.launches(chosen, CPU, 3)["launches"]
    return found


@pytest.mark.parametrize("kind", CALLS, ids=lambda kind: kind.name)
def test_ops_of_the_eager_formulas(kind):
    forward, both = EAGER[kind.name]
    assert launches_of(kind, "eager") == {NO_GRAD: forward, FORWARD: forward, BOTH: both}


@needs_library
@pytest.mark.parametrize("kind", CALLS, ids=lambda kind: kind.name)
def test_ours_is_one_op_each_way(kind):
    drawing = 3 if kind.name == "drop_path_add" else 0  # random numbers, comparison, scale
    assert launches_of(kind, "ours native") == {NO_GRAD: drawing + 1, FORWARD: drawing + 1, BOTH: drawing + 2}


def test_rows_say_what_is_counted():
    row = {"calls": 2, "p50_ms": 1.0, "launches": 3.0, "launches_are": "ops"}
    assert overhead.per_call(row) == {"calls": 2, "p50_us": 500.0, "launches": 3.0, "launches_are": "ops"}
    missing = overhead.per_call({"calls": 2, "p50_ms": None})
    assert missing == {"calls": 2, "p50_us": None, "launches": None, "launches_are": ""}


def test_on_a_gpu_kernels_are_counted(monkeypatch):
    """Kernels on the device count; copies and fills of memory don't."""
    ran = []

    class Profiler:
        def __init__(self, activities, acc_events):
            ran.append(tuple(activities))

        def __enter__(self):
            return self

        def __exit__(self, *_):
            ran.append("end")

        def events(self):
            names = (
                ("add", "CUDA"),
                ("mul", "CUDA"),
                ("Memcpy DtoD", "CUDA"),
                ("Memset", "CUDA"),
                ("aten::add", "CPU"),
            )
            return [SimpleNamespace(name=name, device_type=getattr(DeviceType, where)) for name, where in names]

    monkeypatch.setattr(launches, "profile", Profiler)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: ran.append("wait"))
    assert count_launches(lambda: ran.append("run"), torch.device("cuda")) == 2
    assert ran == ["wait", (launches.ProfilerActivity.CUDA,), "run", "wait", "end"]
    assert launches.counted_as(torch.device("cuda")) == "kernels"
