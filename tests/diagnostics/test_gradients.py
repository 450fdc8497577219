"""Gradient norms against `backward` on the unchanged model, and the recorder against `.grad` in real training loops."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import rdp_kernels as rdp
from examples.models import ViT
from rdp_kernels.diagnostics import GradientNormRecorder, gradient_norms
from rdp_kernels.paths.path import find_path_modules, parameters_of

from .nets import EACH_MODEL, batch_norm_resnet, left_as_it_was, own_vit


def joined_norm(tensors):
    return torch.cat([t.flatten() for t in tensors]).norm().item()


def by_backward(model, images):
    """Norms for each path's parameters and the residuals before the paths, in an own network, by plain `backward`."""
    model.zero_grad()
    x, streams = model.embed(images), []
    for path in model.paths:
        x.retain_grad()
        streams.append(x)
        x = path(x)
    model.classify(x).square().mean().backward()
    parts = [(path.fn, path.norm or nn.Identity()) for path in model.paths]
    own = [[p for part in both for p in part.parameters()] for both in parts]
    gammas = [[] if path.gamma is None else [path.gamma] for path in model.paths]
    norms = [joined_norm([p.grad for p in found + gamma]) for found, gamma in zip(own, gammas, strict=True)]
    model.zero_grad()
    return norms, [stream.grad.norm().item() for stream in streams]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("build", [own_vit, batch_norm_resnet])
def test_norms_are_those_of_backward(build, training):
    """In training mode BatchNorm uses the batch's statistics, so that norms differ. A shortcut doesn't belong to its
    path."""
    model, images = build()
    found = gradient_norms(model, lambda m: m(images).square().mean(), training=training)
    parameters, streams = by_backward(model.train(training), images)
    assert found.names == [f"paths.{i}" for i in range(6)]
    assert found.parameters == pytest.approx(parameters, rel=1e-10)
    assert found.stream == pytest.approx(streams, rel=1e-10)


@EACH_MODEL
@pytest.mark.parametrize("training", [False, True])
def test_the_model_is_left_as_it_was(build, training):
    model, images = build()
    with left_as_it_was(model):
        found = gradient_norms(model, lambda m: m(images).square().mean(), training=training)
        if not training:
            assert found == gradient_norms(model, lambda m: m(images).square().mean())
            assert all(value > 0 for value in found.parameters + found.stream)
    with left_as_it_was(model), pytest.raises(KeyError, match="broken"):
        gradient_norms(model, lambda m: [m(images), torch.rand(1), {}["broken"]], training=training)


def test_a_frozen_stem_and_frozen_paths():
    """The first residual still has a gradient; a path without learning parameters has no gradient of its own."""
    model, images = own_vit()
    whole = gradient_norms(model, lambda m: m(images).square().mean())
    for module in (model.patches, model.paths[2]):
        module.requires_grad_(False)
    model.position.requires_grad_(False)
    part = gradient_norms(model, lambda m: m(images).square().mean())
    assert part.stream == pytest.approx(whole.stream, rel=1e-10)
    assert math.isnan(part.parameters[2])
    assert part.parameters[:2] + part.parameters[3:] == pytest.approx(
        whole.parameters[:2] + whole.parameters[3:], rel=1e-10
    )
    with torch.no_grad():
        assert gradient_norms(model, lambda m: m(images).square().mean()).stream == part.stream


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("shortcut", [nn.Identity, lambda: nn.Linear(4, 4)])
def test_converted_paths_where_nothing_before_them_learns(frozen, shortcut):
    """The residual's gradient is then unknown for a path whose shortcut the block itself computes."""
    model, images = converted_blocks(shortcut())
    x = images.clone().requires_grad_()
    model(x).square().mean().backward()
    found = gradient_norms(model, lambda m: m(images if frozen else x).square().mean())
    if frozen and shortcut is not nn.Identity:
        assert math.isnan(found.stream[0])
    else:
        assert found.stream[0] == pytest.approx(x.grad.norm().item(), rel=1e-10)
    assert found.stream[1] > 0


class Block(nn.Module):
    def __init__(self, shortcut):
        super().__init__()
        self.shortcut, self.fc, self.drop_path = shortcut, nn.Linear(4, 4), rdp.DropPath(0.1)

    def forward(self, x):
        shortcut = x if isinstance(self.shortcut, nn.Identity) else self.shortcut(x)
        return shortcut + self.drop_path(self.fc(x).tanh())


def converted_blocks(shortcut):
    """Two blocks, the first with its own shortcut; in eval mode."""
    model = nn.Sequential(Block(shortcut), Block(nn.Identity())).double().eval()
    images = torch.randn(3, 4, dtype=torch.float64)
    assert len(rdp.convert(model, example_inputs=images).converted) == 2
    return model, images


def test_a_path_called_twice_has_one_norm():
    path = rdp.ResidualBranch(nn.Linear(4, 4)).double()
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.path = path

        def forward(self, x):
            return self.path(self.path(x))

    found = gradient_norms(Twice(), lambda m: m(x).square().sum())
    middle = path(x)
    middle.retain_grad()
    path(middle).square().sum().backward()
    assert found.stream == pytest.approx([joined_norm([x.grad, middle.grad])], rel=1e-10)
    assert found.parameters == pytest.approx([joined_norm([p.grad for p in path.parameters()])], rel=1e-10)


def test_a_loss_that_cannot_be_differentiated_is_refused():
    model, images = own_vit()
    for loss, came in (
        (lambda m: 1.0, "float"),
        (lambda m: m(images), r"shape \[6, 10\]"),
        (lambda m: m(images).sum().detach(), "requires_grad=False"),
    ):
        with pytest.raises(TypeError, match=f"loss must return a scalar tensor .* got .*{came}"):
            gradient_norms(model, loss)


@pytest.mark.parametrize("scheme", ["block", "sample", None])
def test_the_recorder_reads_what_each_step_left(scheme):
    model, images = own_vit()
    paths = rdp.ResidualDropPath(model, 0.5, mode=scheme, seed=3) if scheme else None
    recorder, wanted, dropped = GradientNormRecorder(model), [], []
    labels = torch.arange(6)
    for _ in range(3):
        for phase in ["plain"] if paths is None else paths.iterations(len(images)):
            F.cross_entropy(model(images), labels).backward()
            recorder.record()
            grads = [[p.grad for p in path.parameters() if p.grad is not None] for path in model.paths]
            wanted.append([joined_norm(found) if found else math.nan for found in grads])
            if scheme == "block":
                keep = paths.plan.keep.tolist()
                dropped.append([not kept if phase == "drop" else kept for kept in keep])
            model.zero_grad(set_to_none=True)
    recorder.record(100)
    assert recorder.steps == [*range(len(wanted)), 100]
    wanted = torch.tensor([*wanted, [math.nan] * 6], dtype=torch.float64)
    torch.testing.assert_close(recorder.norms, wanted, rtol=1e-10, atol=0, equal_nan=True)
    if scheme == "block":
        assert recorder.norms[:-1].isnan().tolist() == dropped
        assert any(map(any, dropped))


def test_the_recorder_takes_mixed_dtypes_and_large_gradients():
    model = ViT(dim=12, depth=1, heads=2)
    recorder = GradientNormRecorder(model)
    first, second = model.paths
    first.to(torch.float16)
    first.fn.qkv.weight.grad = torch.full_like(first.fn.qkv.weight, 3e4)  # its norm is too large for float16
    second.fn[0].weight.grad = torch.full_like(second.fn[0].weight, 7.5e17)
    second.fn[0].bias.grad = torch.full_like(second.fn[0].bias, 7.5e17)  # squares overflow float32
    recorder.record()
    wanted = [3e4 * math.sqrt(36 * 12), 7.5e17 * math.sqrt(48 * 13)]
    assert recorder.norms[0].tolist() == pytest.approx(wanted, rel=1e-3)


def test_plots_show_the_norms():
    pytest.importorskip("matplotlib")
    model, images = own_vit()
    norms = gradient_norms(model, lambda m: m(images).square().mean())
    drawn = [list(line.get_ydata()) for line in norms.plot().lines]
    assert drawn == [norms.parameters, norms.stream]
    recorder = GradientNormRecorder(model)
    model(images).square().mean().backward()
    recorder.record(5)
    for parameter in parameters_of(list(find_path_modules(model).values())[2]):
        parameter.grad = None
    recorder.record(9)
    ax = recorder.plot()
    ax.figure.canvas.draw()
    shown = ax.images[0].get_array()
    assert shown.shape == (6, 2)
    assert shown.mask.sum() == 1
    assert shown.mask[2, 1]
    assert shown[0, 0] == pytest.approx(math.log10(recorder.norms[0, 0]))
    assert {text.get_text() for text in ax.get_xticklabels()} >= {"5", "9"}


def test_in_an_iteration_it_is_what_it_is_outside():
    model, images = own_vit()
    scheme = rdp.ResidualDropPath(model, 0.5, seed=1)
    outside = gradient_norms(model, lambda m: m(images).square().sum())
    for phase in scheme.iterations():
        model(images).square().sum().backward()
        assert gradient_norms(model, lambda m: m(images).square().sum()) == outside
        with pytest.raises(RuntimeError, match=f"open {phase} iteration: training must be False"):
            gradient_norms(model, lambda m: m(images).square().sum(), training=True)
