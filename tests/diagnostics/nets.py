"""Small models for diagnostics, in float64, with different weights in each path; and a check that nothing changes."""

import contextlib

import pytest
import torch
from torch import nn

import rdp_kernels as rdp
from examples.libraries import import_torchvision, installed
from examples.models import ResNet, ViT
from rdp_kernels.paths.path import find_path_modules


def own_vit():
    model = ViT(dim=12, depth=3, heads=2, layer_scale=1.0)
    for path in model.paths:
        nn.init.uniform_(path.gamma, 0.5, 1.5)
    return model.double(), torch.randn(6, 1, 8, 8, dtype=torch.float64)


def batch_norm_resnet():
    model = ResNet(widths=(4, 6), blocks=3).double()
    images = torch.randn(6, 1, 8, 8, dtype=torch.float64)
    model(images)  # running statistics
    return model, images


def converted_timm():
    if not installed("timm"):
        pytest.skip("timm is not installed")
    import_torchvision()
    import timm

    model = timm.create_model("test_vit", img_size=32, num_classes=10, drop_path_rate=0.3).double()
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    rdp.convert(model, example_inputs=images, check=False)
    return model, images


def scheme_between_iterations():
    model, images = own_vit()
    model.scheme = rdp.ResidualDropPath(model, 0.5, seed=1)  # kept alive by the model
    for _ in model.scheme.iterations():
        model(images).square().sum().backward()
    return model, images


MODELS = [own_vit, batch_norm_resnet, converted_timm, scheme_between_iterations]
EACH_MODEL = pytest.mark.parametrize("build", MODELS, ids=[build.__name__ for build in MODELS])


@contextlib.contextmanager
def left_as_it_was(model):
    """Checks that a block doesn't change modes, weights, statistics, gradients, flags, random states and overrides. It
    starts with modes and gradients that differ between modules."""
    parts = list(model.modules())
    parts[-1].eval()
    parameters = list(model.parameters())
    for number, parameter in enumerate(parameters):
        parameter.grad = None if number % 2 else torch.full_like(parameter, number)
    path_modules = find_path_modules(model).values()
    override = next(iter(path_modules)).binding.call_override = lambda call, x: call.run(x)

    def state():
        return [
            [module.training for module in parts],
            [value.clone() for value in model.state_dict().values()],
            [None if p.grad is None else p.grad.clone() for p in parameters],
            [p.requires_grad for p in parameters],
            torch.get_rng_state(),
        ]

    before, grads = state(), [p.grad for p in parameters]
    yield
    torch.testing.assert_close(state(), before, rtol=0, atol=0)
    assert all(p.grad is grad for p, grad in zip(parameters, grads, strict=True))
    assert [module.binding.call_override for module in path_modules] == [override] + [None] * (len(path_modules) - 1)
    next(iter(path_modules)).binding.call_override = None


# Factories for the command


def tiny_vit():
    return ViT(dim=8, depth=1, heads=2)


def wide_vit():
    return ViT(channels=3, classes=2, dim=8, depth=1, heads=2)


def one_path():
    return ResNet(widths=(4,), blocks=1)


class Unconverted(nn.Module):
    """A residual network without paths; `image_size` is the size that it declares."""

    image_size = 6

    def __init__(self):
        super().__init__()
        self.stem, self.block, self.head = nn.Conv2d(3, 4, 1), Block(), nn.Linear(4, 3)

    def forward(self, x):
        return {"logits": self.head(self.block(self.stem(x)).mean(dim=(2, 3)))}


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x):
        return x + self.conv(x).relu()


def no_paths():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))


def zero_head():
    model = tiny_vit()
    nn.init.zeros_(model.head.weight)
    return model


def no_module():
    return 3


def broken():
    raise OSError("no weights\nhere")
