"""Every kernel, compiled for a table of cases, spills nothing and accesses memory in 16 bytes a thread. The table lists
the exceptions: sizes or addresses that don't divide by 16.

About 0.4 s for a kernel and a target: a minute for what runs by default, two for the rest.
"""

from __future__ import annotations

import pkgutil
import re
from collections.abc import Iterable
from dataclasses import replace
from importlib import import_module

import pytest
import torch
from triton.runtime.jit import JITFunction

import rdp_kernels.kernels.triton
from benchmarks.compiled_code import (
    CUDA,
    TARGETS,
    caught_launches,
    compile_launch,
    read_amd_facts,
)
from rdp_kernels.kernels.triton.launch import CONFIGS

from .cases import Case, after_class_token, channels_last, contiguous, one_element_apart, one_element_on
from .conftest import Read

bf16, fp16, fp32, fp64 = torch.bfloat16, torch.float16, torch.float32, torch.float64

SMALL = frozenset({"gamma", "weight", "bias", "row_scale", "inverse", "next_inverse", "index", "mean", "rstd"})
SMALL |= {"dgamma", "dweight", "dbias"}
"""Arguments with one number for each column, tile row or program: any width of access is right."""
SMALL_OF = {"_sum_partials_kernel": frozenset({"out", "second_out", "third_out"})}
BIG = frozenset({"residual", "update", "frozen_update", "out", "next", "frozen_next", "norm_input"})
BIG |= {"dresidual", "dupdate", "dfrozen_update", "dout", "dnext", "dfrozen_next", "x", "frozen_out"}
EVERYTHING = BIG | {"partials"}
MIXED = dict(rows="mixed", next_rows="mixed")

ADD_CASES = (
    Case("ViT-B", (8, 197, 768), quick=True),
    Case("without gamma a sample is one tile row", (8, 197, 384), fp16, channel_dim=None, rows="some"),
    Case("gamma doesn't learn: no sums", (8, 197, 384), fp32, gamma_learns=False, rows="some", next_rows="some"),
    Case("frozen rows, fp32 gamma", (8, 197, 384), vectors=fp32, **MIXED),
    Case("in place", (8, 197, 384), **MIXED, in_place=True),
    Case("bf16 update, fp32 residual", (8, 197, 384), fp32, update=bf16, rows="some", next_rows="some"),
    Case("fp32 update, bf16 residual", (8, 197, 384), update=fp32, rows="some", next_rows="some"),
    Case("drop path: an update alone", (8, 197, 384), fp32, channel_dim=None, row_scale=True, alone=True),
    Case("ResNet NCHW: gamma a tile row", (8, 64, 28, 28), fp32, channel_dim=1, activation="relu"),
    Case("NCHW with rows", (8, 64, 56, 56), fp16, channel_dim=1, **MIXED),
    Case("channels_last", (8, 256, 14, 14), channel_dim=1, activation="relu", place=(channels_last, channels_last)),
    Case("14 x 14 without gamma", (8, 256, 14, 14), channel_dim=None, activation="relu", row_scale=True),
    Case("views of longer sequences", (8, 196, 384), place=(after_class_token, after_class_token)),
    Case("fp64", (8, 197, 384), fp64, **MIXED),
    Case("gather, list of rows to invert", (8, 197, 384), rows=None, next_rows="mixed", inverted=False, quick=True),
)

NORM_CASES = (
    Case("norm: ViT-B", (8, 197, 768), norm="layer", **MIXED, quick=True),
    Case("norm: in place", (8, 197, 768), norm="layer", **MIXED, row_scale=True, in_place=True),
    Case("norm: fp16, all rows", (8, 197, 768), fp16, norm="layer", next_rows="all"),
    Case("norm: 1280", (8, 33, 1280), norm="layer", **MIXED),
    Case("norm: all rows, fp32 vectors", (8, 197, 384), vectors=fp32, norm="rms", next_rows="all"),
    Case("norm: bf16 update, fp32 residual", (8, 197, 384), fp32, update=bf16, norm="layer", next_rows="some"),
    Case("norm: nothing is added", (8, 197, 768), norm="layer", rows=None, next_rows="mixed"),
    Case("norm: fp64", (8, 197, 384), fp64, norm="layer", **MIXED),
    Case("norm: 64, the smallest tile", (8, 197, 64), fp32, norm="layer", **MIXED),
    Case("norm: 1024 in fp32", (8, 33, 1024), fp32, norm="rms", **MIXED),
    Case("norm: 2048", (8, 33, 2048), norm="layer", **MIXED),
    Case("norm: 2048 in fp32", (8, 33, 2048), fp32, norm="layer", **MIXED),
    Case("norm: 4096, most sums in registers", (8, 33, 4096), fp32, norm="layer", **MIXED),
    Case("norm: 8192, sums in memory", (8, 33, 8192), norm="layer", **MIXED, quick=True),
    Case("norm: 16384, the widest", (8, 33, 16384), fp32, norm="layer", **MIXED),
)

# Triton marks only what divides by 16: these cases run slowly, and spill nothing either.
NARROW_CASES = (
    Case("odd C", (8, 197, 385), **MIXED, narrow=EVERYTHING),
    Case("C of 8 x 9", (8, 197, 72), fp32, narrow=EVERYTHING),
    Case("C of 8 x 125, relu", (8, 197, 1000), fp32, **MIXED, row_scale=True, activation="relu", narrow=EVERYTHING),
    Case("norm: C of 8 x 125", (8, 197, 1000), norm="layer", **MIXED, row_scale=True, narrow=EVERYTHING),
    Case("14 x 14 with gamma, C = 64", (8, 64, 14, 14), channel_dim=1, narrow=BIG),
    Case(
        "only the residual's address is odd",
        (8, 197, 384),
        place=(one_element_on, contiguous),
        narrow=frozenset({"residual"}),
    ),
    Case(
        "only the update's row stride is odd",
        (8, 196, 384),
        place=(contiguous, one_element_apart),
        narrow=frozenset({"update"}),
    ),
    Case("gather, odd C", (8, 197, 385), rows=None, next_rows="mixed", narrow=EVERYTHING),
    Case("norm: odd C", (8, 197, 385), fp16, norm="layer", **MIXED, narrow=EVERYTHING),
    Case("norm: even C", (8, 197, 770), norm="layer", **MIXED, narrow=EVERYTHING),
    Case("norm: 4095", (8, 33, 4095), fp32, norm="layer", **MIXED, narrow=EVERYTHING),
    Case("norm: 5001", (8, 33, 5001), norm="layer", **MIXED, narrow=EVERYTHING),
)
CASES = ADD_CASES + NORM_CASES + NARROW_CASES


def parameters(architectures: Iterable[str]) -> list:
    """The quick cases; the rest, within three minutes, is slow."""
    return [
        pytest.param(case, name, id=f"{name}-{case.why}", marks=[] if case.quick else pytest.mark.slow)
        for name in architectures
        for case in CASES
    ]


@pytest.mark.parametrize(("case", "architecture"), parameters(CUDA))
def test_cuda_code(case: Case, architecture: str, read: Read):
    launches = caught_launches(case.run, architecture)
    for launch, code in zip(launches, read(launches, architecture), strict=True):
        kernel = launch.kernel.__name__
        assert (code.local_bytes, code.local_accesses) == (0, 0), f"{kernel} spills, with {code.registers} registers"

        tensors = {name.removesuffix("_ptr"): x for name, x in launch.arguments.items() if isinstance(x, torch.Tensor)}
        assert code.widths().keys() == tensors.keys(), f"{kernel} gets a tensor that it doesn't use"
        widths = code.widths(but=SMALL_OF.get(kernel, SMALL))
        narrow = {name for name in widths if re.sub("^(second|third)_", "", name) in case.narrow}
        expected = {name: {tensors[name].element_size() if name in narrow else 16} for name in widths}
        for name in BIG & expected.keys() - narrow:
            as_many = {16 * tensors[name].element_size() // case.widest}  # as of the widest tensor in 16 bytes
            expected[name] = as_many if widths[name] == as_many else {16}
        assert widths == expected, kernel

        in_ptx = code.accesses_in_ptx
        lower_half, row_number = {("load", 4)}, {("load", 8)}  # all that is needed of a row's number
        changed = code.accesses.keys() - in_ptx.keys() - lower_half, in_ptx.keys() - code.accesses.keys() - row_number
        assert changed == (set(), set()), f"{kernel}: the assembler changed the width of an access"
        assert all(code.accesses[op, 16] >= in_ptx[op, 16] for op in ("load", "store")), f"{kernel}: it split some"


@pytest.mark.parametrize(("case", "architecture"), parameters(["gfx942"]))
def test_gfx942_code(case: Case, architecture: str):
    for launch in caught_launches(case.run, architecture):
        facts = read_amd_facts(compile_launch(launch, TARGETS[architecture]))
        assert facts["private_segment_fixed_size"] == facts["vgpr_spill_count"] == 0, launch.kernel.__name__
        assert facts["max_flat_workgroup_size"] == 64 * launch.options["num_warps"] <= 1024, launch.kernel.__name__


@pytest.mark.parametrize("architecture", TARGETS)
def test_the_cases_take_every_kernel_and_all_launch_numbers(architecture: str):
    launches = {case: caught_launches(case.run, architecture) for case in CASES}
    quick = {launch.kernel.__name__ for case in CASES if case.quick for launch in launches[case]}
    taken = {(launch.kernel.__name__, launch.config) for case in CASES for launch in launches[case]}
    assert quick == kernels_of_package()
    assert taken == {
        (f"_{op}_kernel", config)
        for op, numbers in CONFIGS.items()
        for _, config in numbers.get(architecture, numbers["default"])
    }


def kernels_of_package() -> set[str]:
    package = rdp_kernels.kernels.triton
    modules = [import_module(f"{package.__name__}.{module.name}") for module in pkgutil.iter_modules(package.__path__)]
    functions = {x.__name__ for module in modules for x in vars(module).values() if isinstance(x, JITFunction)}
    return {name for name in functions if re.fullmatch(r"_\w+_kernel", name)}


def test_a_spill_is_seen(read: Read):
    """With 32 registers a thread can't hold its part of a tile."""
    (case,) = (case for case in NARROW_CASES if case.why == "odd C")
    backward = next(launch for launch in caught_launches(case.run, "sm_90") if "_bwd_" in launch.kernel.__name__)
    (code,) = read([replace(backward, options=backward.options | {"maxnreg": 32})], "sm_90")
    assert code.local_bytes > 0
    assert code.local_accesses > 0
