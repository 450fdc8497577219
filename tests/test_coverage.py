"""`python -m tests.coverage`: some of its cases, whether docs/models.md is current, and whether it finds faults.

The run over all classes takes about eight minutes on one core; `docs/models.csv` has its results.
"""

import contextlib
import functools
from pathlib import Path

import pytest
import torch
from torch import nn

import rdp_kernels as rdp
import rdp_kernels.paths.freezing
import rdp_kernels.scheme.iteration
from examples.libraries import installed
from rdp_kernels.kernels.spec import orders_of

from .coverage.found import CHECKS
from .coverage.markdown import render
from .coverage.measure import measure
from .coverage.models import cases
from .coverage.rows import groups, measure_group, read

DOCS = Path(__file__).parent.parent / "docs"

SUBSET = {
    "timm._efficientnet_blocks.EdgeResidual": "residual in some instances only",
    "timm._efficientnet_blocks.InvertedResidual": "BatchNorm in the branch, and the stream itself where it is residual",
    "timm._efficientnet_blocks.MobileAttention": "attention over convolutions",
    "timm._efficientnet_blocks.UniversalInvertedResidual": "children that may be Identity",
    "timm.cait.LayerScaleBlock": "one drop-path for two branches",
    "timm.coat.ParallelBlock": "outputs shared across scales: in part",
    "timm.coat.SerialBlock": "sizes as an argument; weights shared with blocks that aren't converted",
    "timm.convnext.ConvNeXtBlock": "gamma in the middle, [B, C, H, W]",
    "timm.crossvit.CrossAttentionBlock": "the branch takes all tokens, the residual is one of them",
    "timm.davit.ChannelBlock": "a size as an argument",
    "timm.densenet.DenseLayer-plain": "concatenation, no drop-path",
    "timm.edgenext.SplitTransposeBlock": "a drop-path inside of a branch",
    "timm.eva.EvaBlock": "rope, a shared argument",
    "timm.mlp_mixer.MixerBlock": "one drop-path for two branches; tokens are mixed",
    "timm.mobilevit.LinearTransformerBlock": "rows that aren't samples",
    "timm.mvitv2.MultiScaleBlock": "attention that returns a size: in part",
    "timm.rdnet.DenseBlock": "concatenation",
    "timm.res2net.Bottle2neck": "splits and sums inside of the branch",
    "timm.resnet.BasicBlock": "relu after the add",
    "timm.resnet.Bottleneck": "BatchNorm, relu after the add, a shortcut with weights",
    "timm.resnet.Bottleneck-plain": "no drop-path: found by the add",
    "timm.swin_transformer.SwinTransformerBlock": "windows inside of the branch",
    "timm.tnt.Block": "two streams, one with rows that aren't samples",
    "timm.vision_transformer.Block": "class token",
    "timm.vision_transformer.ParallelThingsBlock": "branches that are stacked and summed",
    "timm.vision_transformer_sam.Block": "drop-path per window: in part",
    "timm.xcit.XCABlock": "three branches",
    "torchvision.convnext.CNBlock": "a branch that is one Sequential",
    "torchvision.densenet._DenseLayer-plain": "concatenation of a list",
    "torchvision.efficientnet.MBConv": "in-place activations",
    "torchvision.maxvit.PartitionAttentionLayer": "drop-paths in a Sequential, rows that are windows",
    "torchvision.mvit.MultiscaleBlock": "in part",
    "torchvision.swin_transformer.SwinTransformerBlockV2": "norms after the branch",
    "torchvision.vision_transformer.EncoderBlock-plain": "no drop-path: found by the adds",
}
"""Cases that differ in kind, and what each shows."""


def test_the_page_is_made_of_the_committed_file():
    assert (DOCS / "models.md").read_text(encoding="utf-8") == render(read(DOCS / "models.csv"))


def test_the_committed_file_has_a_row_for_each_case():
    assert [row.id for row in read(DOCS / "models.csv")] == [case.id for group in groups(cases()) for case in group]


@pytest.mark.slow
@pytest.mark.parametrize("case_id", SUBSET)
def test_class(case_id):
    """Keys, evaluation, masks, a pair of iterations and copies. The outcome must be that in docs/models.csv.

    Budget for all: 3 minutes on one core.
    """
    library = case_id.partition(".")[0]
    if not installed(library) or not installed("torchvision"):
        pytest.skip(f"{library} or torchvision is not installed: pip install --no-deps timm torchvision")
    row = _measured(library)[case_id]()
    assert row.failures == ""
    (committed,) = [row for row in read(DOCS / "models.csv") if row.id == case_id]
    assert (row.outcome, row.reasons) == (committed.outcome, committed.reasons)


@functools.cache
def _measured(library):
    """For each case a function that measures its model, once."""
    found = {}
    for group in groups(cases(library)):
        rows = functools.cache(functools.partial(measure_group, group))
        found |= {case.id: lambda i=i, rows=rows: rows()[i] for i, case in enumerate(group)}
    return found


# The measurement finds faults


class DropPath(nn.Module):
    def __init__(self, drop_prob):
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x):
        return x if not self.training else rdp.drop_path(x, self.drop_prob, True)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.fn, self.drop_path = nn.LayerNorm(4), nn.Linear(4, 4), DropPath(0.2)

    def forward(self, x):
        return x + self.drop_path(self.fn(self.norm(x)).tanh())


class BatchNormBlock(Block):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(4)


def _scale_forgotten(monkeypatch):
    monkeypatch.setattr(rdp_kernels.scheme.iteration, "kept_scale", lambda p, scale_by_keep: 1.0)


def _other_rows_kept(monkeypatch):
    monkeypatch.setattr(rdp_kernels.scheme.iteration, "orders_of", lambda learns: orders_of(learns.roll(1, 1)))


def _nothing_frozen(model, monkeypatch):
    monkeypatch.setattr(rdp_kernels.paths.freezing, "Frozen", lambda *_: contextlib.nullcontext())


def _frozen_batch_norm_learns(model, monkeypatch):
    original = rdp_kernels.paths.freezing.Frozen
    monkeypatch.setattr(rdp_kernels.paths.freezing, "Frozen", lambda parameters, *_: original(parameters))


def _after_conversion(change):
    """Breaks a model after its conversion; the conversion's own checks would refuse a model broken before."""

    def break_it(monkeypatch):
        original = rdp.convert

        def convert(model, *args, **kwargs):
            report = original(model, *args, **kwargs)
            change(model, monkeypatch)
            return report

        monkeypatch.setattr(rdp, "convert", convert)

    return break_it


def _weights_move(model, monkeypatch):
    with torch.no_grad():
        model[0].fn.weight.add_(1e-6)


BROKEN = {
    "nothing": (lambda monkeypatch: None, []),
    "scale": (_scale_forgotten, ["masks", "pair"]),
    "rows": (_other_rows_kept, ["masks"]),
    "freezing": (_after_conversion(_nothing_frozen), ["pair"]),
    "BatchNorm": (_after_conversion(_frozen_batch_norm_learns), ["pair"]),
    "evaluation": (_after_conversion(_weights_move), ["eval"]),
    "keys": (
        _after_conversion(lambda model, _: model.register_buffer("more", torch.zeros(1))),
        ["keys", "masks", "pair"],
    ),
    "copies": (_after_conversion(lambda model, _: setattr(model[0], "hook", lambda: None)), ["copies"]),
}


@pytest.mark.parametrize("what", BROKEN)
def test_finds_faults(what, monkeypatch):
    torch.manual_seed(0)
    model = nn.Sequential(Block(), BatchNormBlock(), Block(), nn.Linear(4, 2))
    break_it, seen = BROKEN[what]
    break_it(monkeypatch)
    measured = measure(model, torch.randn(2, 4), torch.randn(4, 4))
    assert len(measured.report.converted) == 3
    assert [name for name in measured.failures if name in CHECKS] == seen, measured.failures
    assert measured.precision == "float64"
    assert 0 <= measured.error <= 1e-9
