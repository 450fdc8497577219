"""The op cases. Each is one pass of an op on tensors of one shape, by every provider."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator

import torch

from .harness import Case
from .machine import Device
from .op_dense import ResidualAdd, ResidualAddNorm, ResidualAddRelu, ResidualAddRMSNorm
from .op_kinds import Op, Setting
from .op_providers import EAGER, ways_of
from .op_rows import Chain, GatherRows, Path, ResidualAddNormRows, ResidualAddRows
from .op_sets import Sets

PASSES = ("forward", "backward", "both")
DENSE, RELU, NORM, RMS = (op.name for op in (ResidualAdd, ResidualAddRelu, ResidualAddNorm, ResidualAddRMSNorm))
ROWS, GATHER, PATH, CHAIN, NORM_ROWS = (
    op.name for op in (ResidualAddRows, GatherRows, Path, Chain, ResidualAddNormRows)
)
OPS: dict[str, type[Op]] = {
    op.name: op
    for op in (
        ResidualAdd,
        ResidualAddRelu,
        ResidualAddRows,
        GatherRows,
        Path,
        Chain,
        ResidualAddNorm,
        ResidualAddRMSNorm,
        ResidualAddNormRows,
    )
}
MAX_SETS = 32  # for inputs so small that more sets would fit into the cache too
BF16, FP16 = torch.bfloat16, torch.float16

VIT_B, VIT_S, LONG, XFORMERS = (128, 197, 768), (64, 197, 384), (32, 256, 1024), (48, 257, 1536)
LLAMA = (8, 2048, 2048)
RESNET = (64, 256, 56, 56)
CUDA = (
    Setting(DENSE, VIT_B, None, BF16, gamma=False),  # a plain sum, whose backward computes nothing
    Setting(DENSE, VIT_B, 128, BF16),
    Setting(DENSE, VIT_B, 102, BF16),
    Setting(DENSE, VIT_B, 64, BF16),
    Setting(DENSE, VIT_B, 64, BF16, gamma=False),
    Setting(DENSE, VIT_S, 51),
    Setting(DENSE, RESNET, 51, BF16),
    Setting(DENSE, RESNET, 51, BF16, channels_last=True),  # ConvNeXt
    Setting(RELU, RESNET, 51, BF16, gamma=False),  # ResNet
    Setting(ROWS, VIT_B, 102, BF16),
    Setting(ROWS, VIT_B, 64, BF16),
    Setting(ROWS, VIT_S, 32),
    Setting(ROWS, XFORMERS, 28, FP16, gamma=False),  # xFormers' own benchmark
    Setting(ROWS, XFORMERS, 28, FP16),
    Setting(ROWS, (48, 1, 394752), 28, FP16),
    Setting(GATHER, VIT_B, 64, BF16, gamma=False),
    Setting(GATHER, XFORMERS, 28, FP16, gamma=False),
    Setting(PATH, VIT_B, 64, BF16),
    Setting(PATH, VIT_S, 32),
    Setting(PATH, XFORMERS, 28, FP16),
    Setting(CHAIN, VIT_B, 102, BF16),
    Setting(CHAIN, VIT_B, 64, BF16),
    Setting(NORM, VIT_B, 102, BF16),
    Setting(NORM, VIT_S, 51),
    Setting(NORM, LONG, 26, BF16),
    Setting(RMS, LLAMA, None, BF16, gamma=False),  # a language model's block, Liger's use case
    Setting(RMS, LLAMA, 6, BF16),
    Setting(NORM_ROWS, VIT_B, 64, BF16),
)
TOKENS, WIDE, SHORT = (32, 197, 384), (8, 257, 1536), (64, 50, 768)
FULL = (
    *(Setting(DENSE, TOKENS, kept) for kept in (32, 26, 16)),
    *(Setting(DENSE, WIDE, kept) for kept in (8, 6, 4)),
    *(Setting(DENSE, SHORT, kept) for kept in (64, 51, 32)),
    *(Setting(DENSE, shape, kept, BF16) for shape, kept in ((TOKENS, 26), (WIDE, 6), (SHORT, 51))),
    Setting(DENSE, (65536, 8), 32768),  # many samples of a few elements, each with a scale: here ours is slow
    Setting(DENSE, (16384, 64), 8192),
    Setting(ROWS, TOKENS, 16),
    Setting(ROWS, WIDE, 5),
    Setting(GATHER, WIDE, 5, gamma=False),
    Setting(PATH, TOKENS, 16),
    Setting(CHAIN, TOKENS, 16),
    Setting(NORM, SHORT, 51),
    Setting(RMS, SHORT, None, gamma=False),
    Setting(NORM_ROWS, SHORT, 32),
)
TINY = (6, 5, 32)
TINY = (
    Setting(DENSE, TINY, None, gamma=False),
    Setting(DENSE, TINY, 4, BF16),
    Setting(DENSE, (4, 8, 3, 5), 2, channels_last=True),
    Setting(RELU, (4, 8, 3, 5), 2),
    Setting(ROWS, TINY, 3, FP16),
    Setting(GATHER, TINY, 3, gamma=False),
    Setting(PATH, TINY, 3),
    Setting(CHAIN, TINY, 3),
    Setting(NORM, TINY, 4),
    Setting(RMS, TINY, None, gamma=False),
    Setting(NORM_ROWS, TINY, 3, gamma=False),
)


QUICK = {
    "cpu": (
        Setting(DENSE, TOKENS, 26),
        Setting(DENSE, TOKENS, 26, BF16),
        Setting(ROWS, TOKENS, 16),
        Setting(PATH, TOKENS, 16),
        Setting(NORM, SHORT, 51),
    ),
    "cuda": (
        Setting(DENSE, VIT_S, 51),
        Setting(ROWS, VIT_S, 32),
        Setting(PATH, VIT_S, 32),
        Setting(CHAIN, VIT_B, 64, BF16),
        Setting(NORM, VIT_S, 51),
    ),
}


def settings(device: str, size: str = "full", ops: Container[str] = tuple(OPS)) -> list[Setting]:
    """Returns the settings that are measured on `"cpu"` or `"cuda"`."""
    every = CUDA if device == "cuda" else FULL
    chosen = {"tiny": TINY, "quick": QUICK[device], "full": every}[size]
    return [setting for setting in chosen if setting.op in ops]


def op_cases(
    setting: Setting,
    device: Device,
    passes: Iterable[str] = PASSES,
    interpreted: bool = False,
    compiled: bool = True,
) -> Iterator[Case]:
    """Returns a case for each pass, on the same tensors.

    Args:
        interpreted: whether ours may use interpreted kernels, for verification without timing.
        compiled: whether to include the formula compiled by torch.
    """
    op = OPS[setting.op](setting, device.device)
    needed = op.needed.times(op.sample_bytes)
    sets = Sets(op, min(device.input_sets(int(needed.forward) // 2), MAX_SETS))  # about half of the bytes are read
    ways = ways_of(op, sets, interpreted, compiled)
    for direction in passes:
        providers = [way.provider(direction, needed) for way in ways]
        yield Case(setting.labels | {"pass": direction}, direction, EAGER, providers)
