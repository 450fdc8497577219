"""The step cases: correct providers pass verification, and wrong ones fail."""

import math
from dataclasses import replace

import pytest
import torch
from torch.nn.modules.batchnorm import _BatchNorm

from benchmarks import library_models, pairs
from benchmarks.cases import BOUND, CPU, MODES, TINY, config_of, draw_plans, step_case, verify
from benchmarks.harness import CheckFailed
from benchmarks.machine import Device
from benchmarks.parts import Part, left_alone, parts_of
from benchmarks.textbook import largest_difference
from benchmarks.traffic import Traffic
from examples.models import ResNet, ViT
from rdp_kernels.scheme import iteration

OURS = ("naive", "ours exact", "ours branch-frozen")


OWN = ("vit", "resnet")
NEEDS_TIMM = pytest.mark.skipif(library_models.missing() is not None, reason="needs timm")
LIBRARY = [
    pytest.param(model, marks=NEEDS_TIMM)
    for model in ("vit-s", "convnext-t", "swin-t", "resnet-50")  # vit-b is vit-s here
]
QUICK_ONES = [("vit-s", "sample"), ("swin-t", "sample"), ("resnet-50", "block")]


@pytest.mark.parametrize(
    ("model", "mode"),
    [
        *((model, mode) for model in OWN for mode in MODES),
        *(pytest.param(model, mode, marks=NEEDS_TIMM) for model, mode in QUICK_ONES),
    ],
)
def test_providers_are_right_and_ours_do_what_is_needed(model, mode):
    case = step_case("tiny", model, mode, 0.5, turns=2)
    assert case.verify().passed
    counted = case.count_flop(2)
    for provider in case.available:
        needed = counted[provider.name] if provider.minimal else None
        assert needed is None or provider.needed_flop == pytest.approx(needed, rel=1e-9)
        assert provider.needed_flop <= counted[provider.name]
        assert (provider.needed_bytes is not None) == (model in OWN)
    if "ours exact" in counted:
        assert counted["ours branch-frozen"] < counted["ours exact"] < 0.9 * counted["naive"]
        assert counted["naive"] == counted["drop-path"] == counted["plain"]
    missing = {provider.name for provider in case.providers if provider.unavailable}
    assert missing == (set(OURS) if (model, mode) in (("resnet", "sample"), ("resnet-50", "sample")) else set())


@pytest.mark.slow
@NEEDS_TIMM
@pytest.mark.parametrize(
    ("model", "mode"), [("vit-s", "block"), ("convnext-t", "block"), ("convnext-t", "sample"), ("swin-t", "block")]
)
def test_providers_of_other_modes(model, mode):
    """Budget: 10 seconds in all."""
    test_providers_are_right_and_ours_do_what_is_needed(model, mode)


@pytest.mark.parametrize("freeze", ["none", "branch"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("model", ["vit", LIBRARY[0]])
def test_freezing_the_wrong_things_is_caught(model, mode, freeze, monkeypatch):
    right = pairs.Exact.__init__

    def wrong(self, *args):
        monkeypatch.setattr(type(self), "freeze", freeze)
        right(self, *args)
        monkeypatch.setattr(type(self), "freeze", "parameters")

    monkeypatch.setattr(pairs.Exact, "__init__", wrong)
    check = verify(pairs.Exact, model, mode, 0.5)
    assert check.error > 1e-4
    assert math.isinf(check.error) == (freeze == "none"), "the rest learns too"


@pytest.mark.parametrize("model", [*OWN, LIBRARY[0], LIBRARY[-1]])
def test_a_naive_pair_that_forgets_the_rest_is_caught(model, monkeypatch):
    assert verify(pairs.Naive, model, "block", 0.5).error <= BOUND
    right = pairs.Naive.__init__

    def wrong(self, *args):
        right(self, *args)
        self.network.rest = Part([], [])

    monkeypatch.setattr(pairs.Naive, "__init__", wrong)
    assert math.isinf(verify(pairs.Naive, model, "block", 0.5).error)
    with pytest.raises(CheckFailed, match="'naive' differs from the float64 reference by inf"):
        step_case("tiny", model, "block", 0.5, turns=1).verify()


@pytest.mark.parametrize("model", ["resnet", LIBRARY[-1]])
def test_frozen_batch_norm_is_checked(model, monkeypatch):
    forward = pairs.Exact.pair

    def thawed(self, plan):
        self.scheme._rest._freeze_bn = False  # the shortcuts' BatchNorms collect statistics in the reuse iteration
        return forward(self, plan)

    monkeypatch.setattr(pairs.Exact, "pair", thawed)
    assert verify(pairs.Exact, model, "block", 0.5).error > 1e-4


def test_flops_that_are_not_needed_are_caught(monkeypatch):
    monkeypatch.setattr(pairs.Exact, "needs", classmethod(lambda cls, per, kept: per.drop(kept) + per.plain()))
    with pytest.raises(CheckFailed, match="'ours exact' does .* FLOPs, it needs"):
        step_case("tiny", "vit", "block", 0.5, turns=1).count_flop(1)


def test_a_wrong_scale_is_caught(monkeypatch):
    monkeypatch.setattr(iteration, "kept_scale", lambda *_: 1.0)
    assert verify(pairs.Exact, "vit", "block", 0.3).error > 1e-4
    assert verify(pairs.DropPath, "vit", "block", 0.3).passed


@pytest.mark.parametrize("mode", MODES)
def test_every_timed_plan_drops_something(mode):
    plans = draw_plans(4, 8, 6, mode, 0.05)
    assert len(plans) == 6
    assert all(plan.dropped_paths for plan in plans)
    assert plans == draw_plans(4, 8, 6, mode, 0.05)


def test_on_a_gpu_turns_take_images_that_left_the_cache(monkeypatch):
    config, made = TINY["vit"], type(TINY["vit"]).data
    monkeypatch.setattr(type(config), "data", lambda self, device, number=0: made(self, CPU, number))
    one = config.data(CPU)[0].nbytes
    batches = config.batches(Device(torch.device("cuda"), "a GPU", cache_bytes=3 * one))
    assert len(batches) == 7
    assert len({images.sum().item() for images, _ in batches}) == 7
    assert len(config.batches(Device(CPU, "a CPU", cache_bytes=3 * one))) == 1


def test_parts_are_all_of_the_network_once():
    for model in (ViT(layer_scale=0.1, depth=2), ResNet()):
        branches, rest = parts_of(model)
        everything = [p for part in (*branches, rest) for p in part.parameters]
        assert sorted(map(id, everything)) == sorted(map(id, model.parameters()))
        norms = [m for part in (*branches, rest) for m in part.batch_norms]
        assert sorted(map(id, norms)) == sorted(id(m) for m in model.modules() if isinstance(m, _BatchNorm))
    shortcuts = [p for path in model.paths if path.shortcut is not None for p in path.shortcut.parameters()]
    assert len(shortcuts) == 6
    assert {id(p) for p in shortcuts} <= {id(p) for p in rest.parameters}


def test_left_alone_puts_batch_norm_back_and_drops_gradients():
    model = ResNet(widths=(4,), blocks=2)
    branches, rest = parts_of(model)
    with left_alone([rest]):
        before = {name: buffer.clone() for name, buffer in model.named_buffers()}
        model(torch.randn(3, 1, 8, 8)).sum().backward()
    moved = {name for name, buffer in model.named_buffers() if not torch.equal(buffer, before[name])}
    assert moved == {name for name in before if name.startswith("paths")}
    assert all(m.training and m.track_running_stats for part in (*branches, rest) for m in part.batch_norms)
    assert all(p.grad is None for p in rest.parameters)
    assert all(p.grad is not None for p in branches[0].parameters)


def test_traffic_of_two_paths_is_that_of_a_hand_computation():
    traffic = Traffic(branches=[10, 20], streams=[3, 5], rest=7)
    # rest: forward and backward, and 8 for learning; a branch likewise, and the residual read and written twice
    assert traffic.plain() == 7 * 10 + (10 * 10 + 4 * 3) + (20 * 10 + 4 * 5)
    assert traffic.drop([0.0, 1.0]) == 7 * 10 + (20 * 10 + 4 * 5)
    # path 0 learns, path 1 is frozen: the backward reads its weights and residual, unless it is detached
    assert traffic.reuse([0.0, 1.0]) == 7 + (10 * 10 + 4 * 3) + (20 * 2 + 4 * 5)
    assert traffic.reuse([0.0, 1.0], "branch") == 7 + (10 * 10 + 4 * 3) + (20 + 2 * 5)
    # the frozen prefix has no backward
    assert traffic.reuse([1.0, 0.0]) == 7 + (10 + 2 * 3) + (20 * 10 + 4 * 5)


def test_traffic_counts_bytes_of_the_model():
    model, batch = TINY["vit"].network(CPU).model, TINY["vit"].data(CPU)[0]
    traffic = Traffic.of(model, batch)
    assert sum(traffic.branches) + traffic.rest == sum(p.nbytes for p in model.parameters())
    assert traffic.streams == [8 * 16 * 64 * 4] * 8


def test_a_difference_is_infinite_or_nan_where_it_must_be():
    zero, nan = {"a": torch.zeros(2)}, {"a": torch.tensor([0.0, math.nan])}
    assert largest_difference([zero], [{"a": torch.tensor([0.5, -2.0])}]) == 2
    assert largest_difference([zero], [{}]) == math.inf
    assert math.isnan(largest_difference([zero, nan], [zero, zero]))


def test_a_quick_run_has_half_of_the_images_of_a_full_one():
    sizes = (("full", None), ("quick", None), ("quick", 3))
    full, quick, given = (config_of(size, "vit", Device.of("cpu"), batch) for size, batch in sizes)
    assert quick == replace(full, batch=full.batch // 2)
    assert given == replace(full, batch=3)
