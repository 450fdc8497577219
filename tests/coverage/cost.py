"""`python -m tests.coverage.cost`: the time to convert ViT-B, and the cost of a converted branch in a tiny ViT.

The models take turns; a branch's cost is the difference of the medians (of the fastest turns), over the branches.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable

import torch
from torch import nn

import rdp_kernels as rdp
from examples.libraries import import_torchvision

TURNS, CALLS, DEPTH = 15, 30, 12


def conversion() -> None:
    import timm

    model = timm.create_model("vit_base_patch16_224", drop_path_rate=0.1)
    for check in (False, True):
        began = time.perf_counter()
        report = rdp.convert(model, check=check)
        print(f"ViT-B, check={check}: {time.perf_counter() - began:.1f} s, {report.summary()}")
        rdp.revert(model)


def overhead(rate: float) -> None:
    import timm

    shape = dict(img_size=16, depth=DEPTH, embed_dim=16, num_heads=2)
    plain = timm.create_model("vit_tiny_patch16_224", drop_path_rate=0.0, **shape)
    for block in plain.blocks:
        for name in ("drop_path1", "drop_path2"):
            setattr(block, name, timm.layers.DropPath(rate) if rate else nn.Identity())
    converted = copy.deepcopy(plain)
    rdp.convert(converted)
    x = torch.randn(1, 3, 16, 16)
    for training, backward in ((False, False), (True, False), (True, True)):
        plain.train(training)
        converted.train(training)
        times: dict[nn.Module, list[float]] = {plain: [], converted: []}
        with torch.set_grad_enabled(training):
            for _ in range(TURNS):
                for model, found in times.items():
                    found.append(_microseconds(lambda model=model, backward=backward: _run(model, x, backward)))
        ours, theirs = times[converted], times[plain]
        what = "forward and backward" if backward else "forward in training" if training else "evaluation"
        by_median = (statistics.median(ours) - statistics.median(theirs)) / (2 * DEPTH)
        by_min = (min(ours) - min(theirs)) / (2 * DEPTH)
        print(f"{what}, p = {rate}: {by_median:.1f} µs a branch (fastest turns: {by_min:.1f} µs)")


def _run(model: nn.Module, x: torch.Tensor, backward: bool) -> None:
    out = model(x)
    if backward:
        out.sum().backward()


def _microseconds(run: Callable[[], None]) -> float:
    began = time.perf_counter()
    for _ in range(CALLS):
        run()
    return (time.perf_counter() - began) / CALLS * 1e6


if __name__ == "__main__":
    import_torchvision()
    conversion()
    torch.set_num_threads(1)
    for rate in (0.0, 1e-6):  # all rows are kept; with a rate both sides would draw and scale
        overhead(rate)
