"""Real calls of a model's blocks: what each block is called with, at two batch sizes."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from .._utils.example_inputs import batch_size_of, resized
from .._utils.modes import in_eval

BATCH_SIZES = (3, 4)  # different from each other and from most sizes in a model
CONSTANTS = (type(None), bool, str, float, int, torch.dtype, torch.Size, torch.device)


class Refused(Exception):
    """A block, or one of its branches, can't be converted; the message is for users."""


class HoldsPaths(Refused):
    """Its branch holds blocks that are converted already."""


@dataclass(frozen=True)
class Call:
    """The arguments of one call."""

    args: tuple
    kwargs: dict[str, Any]

    def flat(self) -> tuple[list[Any], pytree.TreeSpec]:
        return pytree.tree_flatten((self.args, self.kwargs))

    def map_tensors(self, function: Any) -> Call:
        return Call(*pytree.tree_map_only(Tensor, function, (self.args, self.kwargs)))


def cloned(x: Tensor) -> Tensor:
    return x.detach().clone()


@dataclass(frozen=True)
class Signature:
    """How a block is called: which of its arguments, containers taken apart, are inputs and which are constants.

    A call of another structure or with other constants is not served by what was traced.
    """

    structure: str
    """As `torch.utils._pytree.treespec_dumps` writes it."""
    is_input: tuple[bool, ...]
    constants: tuple[Any, ...]
    """One entry for each argument; None for inputs."""
    is_flat: bool
    """All are positional, and none is a container."""

    @classmethod
    def of(cls, call: Call, integers_are_inputs: bool) -> Signature:
        flat, structure = call.flat()
        for value in flat:
            if not isinstance(value, (Tensor, *CONSTANTS)):
                kind = type(value).__name__
                hint = ": convert and train with use_cache=False" if "Cache" in kind else ""
                raise Refused(f"it is called with {kind}, which is neither a tensor nor a constant{hint}")
        is_input = tuple(isinstance(v, Tensor) or (type(v) is int and integers_are_inputs) for v in flat)
        constants = tuple(None if given else v for v, given in zip(flat, is_input, strict=True))
        is_flat = not call.kwargs and not any(map(_is_container, call.args))
        return cls(pytree.treespec_dumps(structure), is_input, constants, is_flat)

    def inputs_of(self, args: tuple, kwargs: dict[str, Any]) -> list[Any] | None:
        """The inputs among the arguments of a call; None where it is a call of another kind."""
        flat: Any = args
        if kwargs or not self.is_flat or len(args) != len(self.is_input) or any(map(_is_container, args)):
            flat, structure = pytree.tree_flatten((args, kwargs))
            if structure != _loaded(self.structure):  # a torch.Size was recorded as a tuple
                flat, structure = pytree.tree_flatten(pytree.tree_map(_itself, (args, kwargs)))
                if structure != _loaded(self.structure):
                    return None
        inputs = []
        for value, given, constant in zip(flat, self.is_input, self.constants, strict=True):
            if given:
                inputs.append(value)
            elif value is not constant and (type(value) is not type(constant) or value != constant):
                return None
        return inputs

    def call_with(self, inputs: Iterable[Any]) -> tuple[tuple, dict[str, Any]]:
        """Arguments in this structure."""
        values = iter(inputs)
        flat = [next(values) if given else c for given, c in zip(self.is_input, self.constants, strict=True)]
        return pytree.tree_unflatten(flat, _loaded(self.structure))


def _itself(value: Any) -> Any:
    return value


def _is_container(value: Any) -> bool:
    return isinstance(value, (tuple, list, dict))


_structures: dict[str, pytree.TreeSpec] = {}


def _loaded(structure: str) -> pytree.TreeSpec:
    if structure not in _structures:
        _structures[structure] = pytree.treespec_loads(structure)
    return _structures[structure]


def record_calls(
    model: nn.Module, blocks: Iterable[nn.Module], example_inputs: Any
) -> tuple[dict[int, list[Call]], tuple[int, ...]]:
    """The first call of each of `blocks` in an evaluation of the model at two batch sizes, by the block's id; and these
    sizes, `BATCH_SIZES` or, where a sample is several rows, the example's own and twice that.

    The model is put back into the modes it had. Raises `ValueError` where the model doesn't run on the example.
    """
    calls: dict[int, list[Call]] = {}
    seen: set[int] = set()

    def record(block: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if id(block) not in seen:
            seen.add(id(block))
            calls.setdefault(id(block), []).append(Call(args, kwargs).map_tensors(cloned))

    handles = [block.register_forward_pre_hook(record, with_kwargs=True) for block in blocks]
    try:
        with in_eval(model), torch.no_grad(), _quiet(), torch.random.fork_rng(devices=[]):
            batch_size = batch_size_of(example_inputs)
            for sizes in (BATCH_SIZES, (batch_size, 2 * batch_size)):
                try:
                    calls.clear()
                    for size in sizes:
                        seen.clear()
                        args, kwargs = resized(example_inputs, size)
                        model(*args, **kwargs)
                    break
                except Exception as error:
                    if sizes is not BATCH_SIZES:
                        raise ValueError(
                            f"example_inputs: the model can't be called with them ({type(error).__name__}: {error}); "
                            "give a tensor, a tuple of arguments or a dict of keyword arguments, samples in dimension 0"
                        ) from error
    finally:
        for handle in handles:
            handle.remove()
    return {block: found for block, found in calls.items() if len(found) == len(sizes)}, sizes


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
