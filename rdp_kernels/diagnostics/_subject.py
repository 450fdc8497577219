"""What the command examines: a model with paths, and images. Libraries are imported only when they are needed."""

from __future__ import annotations

import difflib
import pickle
import pkgutil
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._utils.example_inputs import example_inputs_of
from ..convert import convert
from ..paths.path import find_path_modules
from ..plan import plan_generator

FEWEST = 4  # images in a batch, as unbiased CKA needs


class Problem(Exception):
    """An error that the user can fix. The message says how, in one line."""


def told(error: BaseException) -> str:
    """Describes an exception in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"


# The model


def build_model(name: str, *, pretrained: bool, classes: int | None, side: int | None) -> nn.Module:
    """Builds a timm model, or calls `package.module:factory`. Raises `Problem`."""
    if not re.fullmatch(r"[\w.]+:[\w.]+", name):
        return _from_timm(name, pretrained, {"num_classes": classes, "img_size": side})
    if pretrained or classes is not None:
        raise Problem("arguments --pretrained and --classes: only for timm models; the factory has to handle them")
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        model: Any = pkgutil.resolve_name(name)()
    except Exception as error:  # a factory is the user's code
        raise Problem(f"argument MODEL: {name} can't be built: {told(error)}") from error
    if not isinstance(model, nn.Module):
        raise Problem(f"argument MODEL: {name}() must return a torch.nn.Module, got {type(model).__name__}")
    return model


def _from_timm(name: str, pretrained: bool, options: dict[str, Any]) -> nn.Module:
    try:
        import timm
    except (ImportError, RuntimeError) as error:  # a torchvision that was built for another torch lacks its own ops
        advice = "install timm to name its models, or give package.module:factory"
        raise Problem(f"argument MODEL: {name!r}: timm can't be imported ({told(error)}); {advice}") from error
    if not timm.is_model(name.partition(".")[0]) and not re.match("hf[-_]hub:", name):
        near = difflib.get_close_matches(name, timm.list_models(), n=3)
        similar = f"similar: {', '.join(near) or 'none'}; other models are given as package.module:factory"
        raise Problem(f"argument MODEL: timm has no {name!r}; {similar}")
    options = {key: value for key, value in options.items() if value is not None}
    try:
        while True:
            try:
                return timm.create_model(name, pretrained=pretrained, **options)
            except TypeError as error:  # a model that takes images of any size has no img_size
                if "'img_size'" not in str(error) or options.pop("img_size", None) is None:
                    raise
    except Exception as error:  # timm's models, file systems and networks may raise any exception
        raise Problem(f"argument MODEL: {name}{' --pretrained' * pretrained} can't be built: {told(error)}") from error


def load_checkpoint(model: nn.Module, file: Path) -> None:
    """Loads a `state_dict`, or a dict with one under "state_dict", "model" or "model_ema". Raises `Problem`."""
    try:
        saved = torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, EOFError, RuntimeError, ValueError, KeyError, pickle.UnpicklingError) as error:
        raise Problem(f"argument --checkpoint: can't read {file}: {told(error)}") from error
    weights = saved
    if isinstance(saved, Mapping) and not any(isinstance(value, Tensor) for value in saved.values()):
        weights = next((saved[key] for key in ("state_dict", "model", "model_ema") if key in saved), None)
    if not isinstance(weights, Mapping):
        came = f"a dict with {sorted(map(str, saved))[:5]}" if isinstance(saved, Mapping) else type(saved).__name__
        raise Problem(f"argument --checkpoint: {file} must hold a state_dict, got {came}")
    own = model.state_dict()
    wrong = {
        "missing": [key for key in own if key not in weights],
        "unexpected": [str(key) for key in weights if key not in own],
        "of another shape": [k for k, v in own.items() if k in weights and _shape(weights[k]) != _shape(v)],
    }
    if any(wrong.values()):
        named = [f"{len(keys)} {what} ({', '.join(keys[:3])}, …)" for what, keys in wrong.items() if keys]
        raise Problem(f"argument --checkpoint: the keys of {file} aren't the model's: {'; '.join(named)}")
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise Problem(f"argument --checkpoint: {file}: {told(error)}") from error


def _shape(value: object) -> object:
    return getattr(value, "shape", None)


def ensure_paths(model: nn.Module, images: Tensor) -> str | None:
    """Converts a model without paths and returns a summary, or None for one with paths. Raises `Problem`."""
    try:
        with torch.no_grad():
            output_of(model.eval()(images))
    except Exception as error:  # the user's model
        shape = list(images.shape[1:])
        raise Problem(f"the model can't run on images of shape {shape}: {told(error)}; try --image-size") from error
    try:
        find_path_modules(model)
    except ValueError as without_paths:
        if "has no paths" not in str(without_paths):
            raise Problem(f"argument MODEL: {without_paths}") from without_paths
    else:
        return None
    try:
        report = convert(model, 0.0, example_inputs=images[:2])
    except (ValueError, TypeError) as error:
        raise Problem(f"argument MODEL: {error}") from error
    if not report.converted:
        reasons = sorted({row.refused for row in report.refused if row.refused})
        raise Problem(f"argument MODEL: no residual path was found in it; {'; '.join(reasons) or 'nothing is added'}")
    return report.summary()


def output_of(output: Any) -> Tensor:
    """Returns the tensor in a model's output: its logits, or else the first one."""
    if isinstance(output, Mapping):
        output = output.get("logits", next(iter(output.values()), None))
    elif isinstance(output, tuple | list) and output:
        output = output[0]
    if not isinstance(output, Tensor):
        raise TypeError(f"the model must return a tensor, got {type(output).__name__}")
    return output


# The data


@dataclass(frozen=True)
class Data:
    """Batches of images `[B, C, H, W]`, their labels `[B]`, the number of classes, and notes for the report."""

    images: list[Tensor]
    labels: list[Tensor] | None
    classes: int | None
    notes: list[str]

    def to(self, device: torch.device, dtype: torch.dtype) -> Data:
        images = [batch.to(device, dtype) for batch in self.images]
        return replace(self, images=images, labels=self.labels and [batch.to(device) for batch in self.labels])


def load_data(model: nn.Module, name: str, side: int | None, batch_size: int, batches: int, seed: int) -> Data:
    """Loads `random`, `digits` or a folder of class folders. Raises `Problem`."""
    shape, generator, count = image_shape(model, name, side), plan_generator(seed, 0), batch_size * batches
    if name == "random":
        images = torch.randn(count, *shape, generator=generator)
        note = (
            "The images are random numbers. They say little about an untrained network, and don't show what a trained "
            "one does with images like those it was trained on (--data)."
        )
        return Data([*images.split(batch_size)], None, None, [note])
    if name == "digits":
        images, labels, classes = _digits(shape, count, generator)
    else:
        images, labels, classes = _folder(model, Path(name), shape, count, generator)
    starts = [start for start in range(0, len(images), batch_size) if len(images) - start >= FEWEST]
    if not starts:
        raise Problem(f"argument --data: {name} must hold at least {FEWEST} images, got {len(images)}")
    image_batches, label_batches = ([t[i : i + batch_size] for i in starts] for t in (images, labels))
    return Data(image_batches, label_batches, classes, [])


def image_shape(model: nn.Module, data: str, side: int | None) -> tuple[int, int, int]:
    """Returns channels, height and width that the model declares, else those of its first convolution and the data."""
    example = example_inputs_of(model)
    if not isinstance(example, Tensor) and "pixel_values" not in example:
        raise Problem(f"argument MODEL: it must take images, but declares that it takes {', '.join(example)}")
    channels, *size = (example if isinstance(example, Tensor) else example["pixel_values"]).shape[1:]
    if not any(hasattr(model, name) for name in ("pretrained_cfg", "config", "patch_embed", "image_size")):
        convolution = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
        channels, size = (1, [8, 8]) if data == "digits" else (3, size)
        channels = channels if convolution is None else convolution.in_channels
    height, width = (side, side) if side else size
    return channels, height, width


def _digits(shape: tuple[int, int, int], count: int, generator: torch.Generator) -> tuple[Tensor, Tensor, int]:
    """Returns random digits in [−1, 1].

    They are from the quarter that scikit-learn's stratified split with random_state=0 holds out.
    """
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise Problem(f"argument --data: digits needs scikit-learn ({told(error)})") from error
    pixels, labels = load_digits(return_X_y=True)
    images = (pixels.reshape(-1, 1, 8, 8) / 8 - 1).astype("float32")
    _, images, _, labels = train_test_split(images, labels, test_size=0.25, stratify=labels, random_state=0)
    chosen = torch.randperm(len(labels), generator=generator)[:count]
    images = torch.from_numpy(images)[chosen]
    if tuple(images.shape[2:]) != shape[1:]:
        images = F.interpolate(images, shape[1:], mode="bilinear")
    return images.expand(-1, shape[0], -1, -1), torch.from_numpy(labels)[chosen], 10


def _folder(
    model: nn.Module, folder: Path, shape: tuple[int, int, int], count: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, int]:
    """Returns random images of a folder.

    For timm models they are transformed as in evaluation. For others they are scaled to [−1, 1].
    """
    try:
        from torchvision import transforms
        from torchvision.datasets import ImageFolder
    except (ImportError, RuntimeError) as error:
        raise Problem(f"argument --data: a folder needs torchvision: {told(error)}") from error
    if getattr(model, "pretrained_cfg", None) and shape[0] == 3:
        from timm.data import create_transform, resolve_data_config

        transform = create_transform(**resolve_data_config({"input_size": shape}, model=model))
    else:
        grey = [transforms.Grayscale()] if shape[0] == 1 else []
        crop = [transforms.Resize(min(shape[1:])), transforms.CenterCrop(shape[1:])]
        scale = [transforms.ToTensor(), transforms.Normalize([0.5] * shape[0], [0.5] * shape[0])]
        transform = transforms.Compose([*grey, *crop, *scale])
    try:
        found = ImageFolder(str(folder), transform)
        chosen = torch.randperm(len(found), generator=generator)[:count].tolist()
        pairs = [found[i] for i in chosen]
    except (OSError, RuntimeError) as error:
        raise Problem(f"argument --data: must be random, digits or a folder of class folders: {told(error)}") from error
    return torch.stack([image for image, _ in pairs]), torch.tensor([label for _, label in pairs]), len(found.classes)
