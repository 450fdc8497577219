"""Models of every kind for diagnostics."""

import pytest
import torch
from torch import Tensor, nn

import rdp_kernels as rdp
from examples.libraries import import_torchvision, installed
from examples.models import ViT


def vit(**options) -> ViT:
    """A `ResidualSequence` whose branches drop values, between others that do: `[B, 1, 4, 4]`."""
    model = ViT(image=4, dim=8, depth=2, heads=2, drop_prob=0.3, **options)
    for path in model.paths:
        path.fn = nn.Sequential(path.fn, nn.Dropout(0.5))
    with torch.no_grad():
        for parameter in model.paths.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def converted(name: str, **options) -> tuple[nn.Module, Tensor]:
    """A small model of timm's in float64, and 5 images."""
    if not installed("timm"):
        pytest.skip("timm is not installed")
    import_torchvision()
    import timm

    model = timm.create_model(name, drop_path_rate=0.2, **options).double()
    images = torch.randn(5, 3, 32, 32, dtype=torch.float64)
    rdp.convert(model, example_inputs=images)
    return model, images


def images(batch: int = 5, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(batch, 1, 4, 4, dtype=dtype)


def states_of(model: ViT, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """The residual before and after each path, and each update, in eval mode, flattened and in float64."""
    model.eval()
    with torch.no_grad():
        stream, added = [model.embed(x)], []
        for path in model.paths:
            update = path.fn(path.norm(stream[-1]))
            added.append(update if path.gamma is None else update * path.gamma)
            stream.append(stream[-1] + added[-1])
    model.train()
    return [t.flatten(1).double() for t in stream], [t.flatten(1).double() for t in added]
