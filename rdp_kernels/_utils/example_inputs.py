"""Example inputs of a model: a tensor, a tuple of arguments or a dict of keyword arguments."""

from __future__ import annotations

from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor


def arguments_of(example_inputs: Any) -> tuple[tuple, dict[str, Any]]:
    """The positional and the keyword arguments in `example_inputs`."""
    if isinstance(example_inputs, dict):
        return (), example_inputs
    return (example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)), {}


def batch_size_of(example_inputs: Any) -> int:
    """The size of dimension 0 of the first tensor that has one. Raises `ValueError` where there is no sample."""
    tensors = [t for t in pytree.tree_leaves(example_inputs) if isinstance(t, Tensor) and t.dim() > 0]
    if not tensors or tensors[0].shape[0] == 0:
        came = f"one of shape {list(tensors[0].shape)}" if tensors else f"{type(example_inputs).__name__} without one"
        raise ValueError(f"example_inputs must hold a tensor with samples in dimension 0, got {came}")
    return tensors[0].shape[0]


def resized(example_inputs: Any, size: int) -> tuple[tuple, dict[str, Any]]:
    """The arguments with their samples repeated or left out until there are `size`."""
    batch_size = batch_size_of(example_inputs)

    def resize(x: Tensor) -> Tensor:
        has_samples = x.dim() > 0 and x.shape[0] == batch_size
        return x[torch.arange(size, device=x.device) % batch_size] if has_samples else x

    return pytree.tree_map_only(Tensor, resize, arguments_of(example_inputs))


def described(example_inputs: Any) -> str:
    """The dtypes and shapes of the arguments, for messages."""

    def leaf(value: Any) -> str:
        if isinstance(value, Tensor):
            return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
        return type(value).__name__

    args, kwargs = pytree.tree_map(leaf, arguments_of(example_inputs))
    return ", ".join([*map(str, args), *(f"{name}={value}" for name, value in kwargs.items())])


def example_inputs_of(model: Any) -> Any:
    """Makes two samples of the input that the model's own description asks for, else two images of 224 × 224 pixels."""
    parameter = next(model.parameters(), None)
    device = torch.device("cpu") if parameter is None else parameter.device
    dtype = torch.float32 if parameter is None or not parameter.is_floating_point() else parameter.dtype
    config = getattr(model, "config", None)
    if config is not None and hasattr(model, "main_input_name"):  # transformers
        name = model.main_input_name
        size = getattr(config, "image_size", None)
        if name == "pixel_values":
            size = tuple(size) if isinstance(size, (tuple, list)) else (size or 224, size or 224)
            return {name: _images((getattr(config, "num_channels", 3), *size), dtype, device)}
        return {k: v.to(device) for k, v in model.dummy_inputs.items()}
    shape = (getattr(model, "pretrained_cfg", None) or {}).get("input_size", (3, 224, 224))  # timm
    embed = getattr(model, "patch_embed", None)
    size = getattr(embed, "img_size", None) or getattr(model, "image_size", None)  # as built; torchvision's ViT
    if isinstance(size, int):
        size = (size, size)
    shape = (getattr(model, "in_chans", shape[0]), *(size if size is not None else shape[1:]))
    return _images(shape, dtype, device)


def _images(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, *shape, device="cpu", generator=generator).to(device, dtype)
