"""A case is a block class, a small model that has it, and inputs. Tables are data; models are built on demand."""

from __future__ import annotations

import importlib
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from examples.libraries import LIBRARIES, resolve

BATCH = 2
DROP_PROB = 0.2

Inputs = Tensor | dict[str, Tensor]
"""A model's only argument, or its keyword arguments."""


class Call:
    """A call as data: `Call("timm.create_model", "test_vit", depth=2)()` makes the model, its arguments first."""

    def __init__(self, target: str, *args: Any, **kwargs: Any):
        self.target, self.args, self.kwargs = target, args, kwargs

    def __call__(self) -> Any:
        args, kwargs = _made(self.args), _made(self.kwargs)
        return resolve(self.target)(*args, **kwargs)

    def __repr__(self) -> str:
        arguments = [*map(repr, self.args), *(f"{name}={value!r}" for name, value in self.kwargs.items())]
        return f"{self.target}({', '.join(arguments)})"


class Ref(Call):
    """An object as data, by its qualified name, for arguments that are classes."""

    def __call__(self) -> Any:
        return resolve(self.target)


def _made(value: Any) -> Any:
    """`value` with the calls in it made."""
    if isinstance(value, Call):
        return value()
    if isinstance(value, list | tuple):
        return type(value)(map(_made, value))
    if isinstance(value, dict):
        return {name: _made(item) for name, item in value.items()}
    return value


@dataclass(frozen=True)
class Tokens:
    """Token ids below `below`, `[batch, *shape]`: int64."""

    shape: tuple[int, ...]
    below: int = 16

    def draw(self, batch: int, generator: torch.Generator) -> Tensor:
        return torch.randint(self.below, (batch, *self.shape), generator=generator)


@dataclass(frozen=True)
class Frames:
    """`[batch * count, *shape]`: a sample is `count` frames, one after the other."""

    count: int
    shape: tuple[int, ...]

    def draw(self, batch: int, generator: torch.Generator) -> Tensor:
        return torch.randn(batch * self.count, *self.shape, generator=generator)


Shape = int | tuple[int, ...] | Tokens | Frames
"""Shape of one sample; n is a square image (3, n, n)."""


@dataclass(frozen=True, eq=False)
class Case:
    """
    One block class and the model that shows it. Cases that share a model share its `build` object.

    `block_class` is the qualified name of the class that owns the drop-path or, where `drop_path` is False, could own
    one. `fill` names the children that are Identity in the library's model and become drop-paths of rate `DROP_PROB`:
    in classes that can hold a drop-path but to which the library's own models give none.
    """

    library: str
    block_class: str
    build: Call
    inputs: Shape | Mapping[str, Shape]
    drop_path: bool = True
    fill: tuple[str, ...] = ()

    @property
    def id(self) -> str:
        """A unique name for tests: `timm.resnet.Bottleneck`, `timm.resnet.Bottleneck-plain`."""
        *_, file, name = self.block_class.split(".")
        return f"{self.library}.{file.removeprefix('modeling_')}.{name}{'' if self.drop_path else '-plain'}"

    def example_inputs(self, batch: int = BATCH) -> Inputs:
        """Inputs of `batch` samples, float32 or int64, the same in every process."""
        generator = torch.Generator().manual_seed(zlib.crc32(self.block_class.encode()))
        if isinstance(self.inputs, Mapping):
            return {name: _draw(shape, batch, generator) for name, shape in self.inputs.items()}
        return _draw(self.inputs, batch, generator)

    def make(self, seed: int = 0) -> tuple[nn.Module, Inputs]:
        """The model with random weights, in train mode, and inputs of two samples."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = self.build()
            if self.fill:
                self._fill(model)
            _spread(model)
        return model.train(), self.example_inputs()

    def blocks(self, model: nn.Module) -> list[tuple[str, nn.Module]]:
        """The instances of the block class in `model`, with their names."""
        kind = resolve(self.block_class)
        return [(name, module) for name, module in model.named_modules() if type(module) is kind]

    def _fill(self, model: nn.Module) -> None:
        for _, block in self.blocks(model):
            for name in self.fill:
                if not isinstance(block.get_submodule(name), nn.Identity):
                    raise ValueError(f"{self.block_class}.{name} is no Identity: this case needs no fill")
                setattr(block, name, _drop_path_of(type(block))(DROP_PROB))


def _drop_path_of(block_class: type) -> type[nn.Module]:
    """The `*DropPath` that the file of `block_class` uses."""
    names = vars(importlib.import_module(block_class.__module__))
    return next(kind for name, kind in names.items() if name.endswith("DropPath"))


def _spread(model: nn.Module) -> None:
    """
    Noise on constant parameters, and on the running statistics of batch norm.

    Libraries begin with gammas, last norms or heads of 0 or 1e-5, which would hide a wrong branch.
    """
    with torch.no_grad():
        for parameter in model.parameters():
            if (
                parameter.numel()
                and parameter.is_floating_point()
                and bool((parameter == parameter.flatten()[0]).all())
            ):
                parameter.add_(0.2 * torch.randn_like(parameter))
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.8, 1.2)


def _draw(shape: Shape, batch: int, generator: torch.Generator) -> Tensor:
    if isinstance(shape, Tokens | Frames):
        return shape.draw(batch, generator)
    if isinstance(shape, int):
        shape = (3, shape, shape)
    return torch.randn(batch, *shape, generator=generator)


def cases(library: str | None = None, drop_path: bool | None = None) -> list[Case]:
    """The cases of `library` (of all three), with or without a drop-path (both)."""
    if library is not None and library not in LIBRARIES:
        raise ValueError(f"library is one of {', '.join(LIBRARIES)}, not {library!r}")
    found = [case for name in (LIBRARIES if library is None else (library,)) for case in _table(name)]
    return [case for case in found if drop_path is None or case.drop_path == drop_path]


def _table(library: str) -> Iterator[Case]:
    yield from importlib.import_module(f"{__package__}.{library}_cases").CASES
