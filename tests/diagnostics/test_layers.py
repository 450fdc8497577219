"""Heatmaps over depth: entries equal the values of `similarity.py` for their layers."""

import math

import matplotlib
import pytest
import torch
from torch import nn

import rdp_kernels as rdp
from rdp_kernels.diagnostics import (
    LayerSimilarity,
    MinibatchCKA,
    branch_sizes,
    cosine_similarity,
    feature_distributions,
    layer_similarity,
)
from rdp_kernels.diagnostics.similarity import heatmap_rebound

from ..nets import conv_net
from .models import converted, images, states_of, vit

matplotlib.use("Agg")

EXACT = {"rtol": 1e-10, "atol": 1e-10}
PATHS = tuple(f"paths.{index}" for index in range(4))


@pytest.mark.parametrize("of", ["stream", "branch"])
def test_cka_of_every_pair_of_layers(of):
    model = vit(layer_scale=0.5).double()
    batches = [images(6, torch.float64), images(4, torch.float64)]
    found = layer_similarity(model, batches, of=of)
    expected = MinibatchCKA()
    for batch in batches:
        expected.update(states_of(model, batch)[of == "branch"])
    torch.testing.assert_close(found.matrix, expected.value(), **EXACT)
    assert found.labels == found.other_labels == (PATHS if of == "branch" else ("input", *PATHS))
    assert (found.of, found.metric, found.num_samples) == (of, "cka", 10)
    assert found.rebound == heatmap_rebound(found.matrix).item()


@pytest.mark.parametrize("of", ["stream", "branch"])
def test_cosine_of_every_pair_of_layers(of):
    """A mean over samples in any batches; a batch may have a single sample."""
    model, x = vit(layer_scale=0.5).double(), images(6, torch.float64)
    found = layer_similarity(model, list(x.split([3, 2, 1])), of=of, metric="cosine")
    layers = states_of(model, x)[of == "branch"]
    expected = torch.stack([torch.stack([cosine_similarity(a, b) for b in layers]) for a in layers])
    torch.testing.assert_close(found.matrix, expected, **EXACT)
    assert found.num_samples == 6


@pytest.mark.parametrize("metric", ["cka", "cosine"])
def test_two_models(metric):
    """The models differ in depth. Rows are the first one's layers, columns the second's."""
    model, other = vit().double(), vit().double()
    other.paths = rdp.ResidualSequence(*other.paths[:3])
    x = images(7, torch.float64)
    found = layer_similarity(model, x, metric=metric, other=other)
    rows, columns = states_of(model, x)[0], states_of(other, x)[0]
    for i, a in enumerate(rows):
        for j, b in enumerate(columns):
            cka = MinibatchCKA()
            cka.update([a], [b])
            expected = cka.value()[0, 0] if metric == "cka" else cosine_similarity(a, b)
            torch.testing.assert_close(found.matrix[i, j], expected, **EXACT)
    assert found.labels == ("input", *PATHS)
    assert found.other_labels == ("input", *PATHS[:3])
    with pytest.raises(ValueError, match=r"\[5, 4\]"):
        _ = found.rebound
    itself = layer_similarity(model, x, metric=metric, other=model)
    torch.testing.assert_close(itself.matrix, layer_similarity(model, x, metric=metric).matrix, **EXACT)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("metric", ["cka", "cosine"])
def test_narrow_models_are_compared_in_float64(dtype, metric):
    """The features are rounded and the arithmetic isn't: CKA with itself is 1 to more digits than they have."""
    model, x = vit(), images(6)
    wide = layer_similarity(model, x, metric=metric).matrix
    narrow = layer_similarity(model.to(dtype), x.to(dtype), metric=metric).matrix
    assert narrow.dtype == torch.float64
    torch.testing.assert_close(narrow.diagonal(), torch.ones(5, dtype=torch.float64), **EXACT)
    torch.testing.assert_close(narrow, wide, rtol=0, atol=0.05)
    assert not torch.equal(narrow, wide)


def test_stages_of_a_cnn():
    """CKA compares features of any sizes, cosine only features of equal size; here there are two stages."""
    model, x = conv_net(), torch.randn(6, 2, 5, 5, dtype=torch.float64)
    assert layer_similarity(model, x).matrix.isfinite().all()
    found = layer_similarity(model, x, metric="cosine")
    stage = torch.tensor([0, 0, 1, 1, 1])
    assert torch.equal(found.matrix.isfinite(), stage[:, None] == stage)
    second = found.matrix[2:, 2:]
    assert found.rebound == heatmap_rebound(second).item()


def test_a_path_that_is_called_twice_is_two_layers():
    path = rdp.ResidualBranch(nn.Linear(3, 3))

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.input = path

        def forward(self, x):
            return self.input(self.input(x))

    model, x = Twice().double(), torch.randn(8, 3, dtype=torch.float64)
    found = layer_similarity(model, x, metric="cosine")
    assert found.labels == ("input", "input#2", "input#3")
    once = path(x)
    torch.testing.assert_close(found.matrix[0, 2], cosine_similarity(x, path(once)), **EXACT)
    assert layer_similarity(model, x, metric="cosine", of="branch").labels == ("input", "input#2")


def test_later_changes_in_place_are_not_seen():
    """The model later writes to the residual in place."""

    class InPlace(nn.Module):
        def __init__(self):
            super().__init__()
            self.path = rdp.ResidualBranch(nn.Linear(3, 3))

        def forward(self, x):
            return self.path(x).zero_()

    model, x = InPlace().double(), torch.randn(8, 3, dtype=torch.float64)
    for metric in ("cka", "cosine"):
        assert layer_similarity(model, x, metric=metric).matrix[0, 1] != 0


def test_swin_of_timm():
    """Its attention's paths are `[B, H, W, C]`, its MLPs' `[B, H·W, C]`: the same features."""
    options = {"img_size": 32, "patch_size": 4, "window_size": 4, "embed_dim": 8, "depths": (1, 1), "num_heads": (1, 1)}
    model, x = converted("swin_tiny_patch4_window7_224", **options)
    found = layer_similarity(model, x)
    assert found.matrix.isfinite().all()
    assert found.labels[:2] == ("input", "layers.0.blocks.0.drop_path1")
    assert len(found.labels) == 5
    cosine = layer_similarity(model, x, metric="cosine").matrix
    stage = torch.tensor([0, 0, 0, 1, 1])
    assert torch.equal(cosine.isfinite(), stage[:, None] == stage)


class Windows(nn.Module):
    """Paths on samples and on twice as many halves of them."""

    def __init__(self):
        super().__init__()
        self.whole = rdp.ResidualBranch(nn.Linear(6, 6))
        self.halves = nn.ModuleList(rdp.ResidualBranch(nn.Linear(3, 3), mode="block") for _ in range(2))

    def forward(self, x):
        x = self.whole(x).reshape(-1, 3)
        for path in self.halves:
            x = path(x)
        return x.reshape(-1, 6)


@pytest.mark.parametrize("metric", ["cka", "cosine"])
def test_rows_that_are_not_samples_are_compared_among_themselves(metric):
    found = layer_similarity(Windows(), torch.randn(5, 6), metric=metric)
    kind = torch.tensor([0, 0, 1, 1])
    assert torch.equal(found.matrix.isfinite(), kind[:, None] == kind)
    torch.testing.assert_close(found.matrix.diagonal(), torch.ones(4, dtype=torch.float64), **EXACT)
    assert found.num_samples == 5


def test_batches_come_in_many_forms():
    """A tensor, a tuple of arguments, a mapping; several of them, or one that comes from an iterator."""
    model, x = vit(), images(6)
    expected = layer_similarity(model, x).matrix
    for batches in ([x], [(x,)], {"images": x}, [{"images": x}], iter([[x]])):
        assert torch.equal(layer_similarity(model, batches).matrix, expected)


@pytest.mark.parametrize("look", [layer_similarity, branch_sizes, feature_distributions])
def test_a_bar_is_drawn_for_those_who_want_one(look, capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich draws on what isn't a terminal
    name = look.__name__.replace("_", " ")
    for progress in (None, False, True):
        look(vit(), [images(5)] * 2, progress=progress)
        assert (name in capsys.readouterr().err) == (progress is True)


@pytest.mark.parametrize(
    ("batches", "options", "message"),
    [
        ([], {}, "batches must hold at least one batch"),
        (images(3), {}, "at least 4 samples in each batch, got 3"),
        ([images(5), images(2)], {}, "at least 4 samples in each batch, got 2"),
        (images(5), {"of": "layers"}, "of must be one of 'stream', 'branch', got 'layers'"),
        (images(5), {"metric": "cca"}, "metric must be one of 'cka', 'cosine', got 'cca'"),
        (images(5), {"other": nn.Linear(2, 2)}, "model has no paths"),
    ],
)
def test_refuses(batches, options, message):
    with pytest.raises(ValueError, match=message):
        layer_similarity(vit(), batches, **options)


def test_a_model_that_goes_elsewhere_is_refused():
    class Sometimes(nn.Module):
        def __init__(self):
            super().__init__()
            self.paths = nn.ModuleList(rdp.ResidualBranch(nn.Linear(3, 3)) for _ in range(2))

        def forward(self, x):
            for path in self.paths[: len(x) - 4]:
                x = path(x)
            return x

    with pytest.raises(ValueError, match="calls none of its paths"):
        layer_similarity(Sometimes(), torch.randn(4, 3))
    with pytest.raises(ValueError, match=r"same paths on every batch, got .*'paths.1'.* after .*'paths.0'"):
        layer_similarity(Sometimes(), [torch.randn(5, 3), torch.randn(6, 3)])


def test_a_heatmap_is_drawn():
    from matplotlib.figure import Figure

    matrix = torch.tensor([[1, 0.42, math.nan], [0.42, 1, 0.5]], dtype=torch.float64)
    found = LayerSimilarity(matrix, ("a", "b"), ("c", "d", "e"), "cosine", "branch", 7)
    ax = Figure().subplots()
    assert found.plot(ax) is ax
    assert [label.get_text() for label in ax.get_xticklabels()] == ["c", "d", "e"]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["a", "b"]
    image = ax.get_images()[0]
    assert image.get_array().mask.tolist() == [[False, False, True], [False, False, False]]
    assert image.get_clim() == (0.4, 1)
    assert image.colorbar.ax.get_ylabel() == "mean cosine similarity, of the branch"


def test_a_heatmap_makes_its_own_axes_and_leaves_out_labels_without_room():
    import matplotlib.pyplot as plt

    labels = tuple(f"path {index}" for index in range(70))
    found = LayerSimilarity(torch.eye(70, dtype=torch.float64), labels, labels, "cka", "stream", 7)
    ax = found.plot()
    try:
        assert [label.get_text() for label in ax.get_xticklabels()] == list(labels[::4])
        assert ax.get_xticks().tolist() == list(range(0, 70, 4))
        ax.figure.canvas.draw()
    finally:
        plt.close(ax.figure)
