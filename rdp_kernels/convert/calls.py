"""Runs a model on an example at two batch sizes, and records the arguments of each block."""

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

BATCH_SIZES = (3, 4)  # different from each other and from most other sizes in a model
CONSTANTS = (type(None), bool, str, float, int, torch.dtype, torch.Size, torch.device)


class Refused(Exception):
    """A block, or one of its branches, can't be converted; the message is for users."""


class HoldsPaths(Refused):
    """A branch can't be converted because it holds blocks that are converted already."""


@dataclass(frozen=True)
class BlockCall:
    """The arguments of one call."""

    args: tuple
    kwargs: dict[str, Any]

    def flat(self) -> tuple[list[Any], pytree.TreeSpec]:
        return pytree.tree_flatten((self.args, self.kwargs))

    def map_tensors(self, function: Any) -> BlockCall:
        return BlockCall(*pytree.tree_map_only(Tensor, function, (self.args, self.kwargs)))


def cloned(x: Tensor) -> Tensor:
    return x.detach().clone()


@dataclass(frozen=True)
class Signature:
    """How a block is called: which of its arguments are inputs and which are constants, containers taken apart.

    A trace doesn't hold for calls with another structure or with other constants.
    """

    structure: str
    """The structure of the arguments, written by `torch.utils._pytree.treespec_dumps`."""
    is_input: tuple[bool, ...]
    constants: tuple[Any, ...]
    """One entry for each argument; None for inputs."""
    is_flat: bool
    """Whether all arguments are positional and none is a container."""

    @classmethod
    def of(cls, call: BlockCall, integers_are_inputs: bool) -> Signature:
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
        """The inputs among the arguments of a call; None if its structure or its constants differ."""
        flat: Any = args
        if kwargs or not self.is_flat or len(args) != len(self.is_input) or any(map(_is_container, args)):
            flat, structure = pytree.tree_flatten((args, kwargs))
            if structure != _loaded(self.structure):  # a torch.Size was recorded as a tuple
                flat, structure = pytree.tree_flatten(pytree.tree_map(lambda value: value, (args, kwargs)))
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
        """The arguments and keyword arguments of a call with these inputs."""
        values = iter(inputs)
        flat = [next(values) if given else c for given, c in zip(self.is_input, self.constants, strict=True)]
        return pytree.tree_unflatten(flat, _loaded(self.structure))


def _is_container(value: Any) -> bool:
    return isinstance(value, (tuple, list, dict))


_structures: dict[str, pytree.TreeSpec] = {}


def _loaded(structure: str) -> pytree.TreeSpec:
    if structure not in _structures:
        _structures[structure] = pytree.treespec_loads(structure)
    return _structures[structure]


def record_calls(
    model: nn.Module, blocks: Iterable[nn.Module], example_inputs: Any
) -> tuple[dict[int, list[BlockCall]], tuple[int, ...]]:
    """Runs the model in eval mode at two batch sizes. Returns the first call of each of `blocks` at each size, by the
    block's id, and the two sizes.

    The sizes are `BATCH_SIZES`. If the model doesn't run at these, for example because a sample has several rows, they
    are the example's own size and twice that. Raises `ValueError` if the model doesn't run on the example.
    """
    calls: dict[int, list[BlockCall]] = {}
    seen: set[int] = set()

    def record(block: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if id(block) not in seen:
            seen.add(id(block))
            calls.setdefault(id(block), []).append(BlockCall(args, kwargs).map_tensors(cloned))

    handles = [block.register_forward_pre_hook(record, with_kwargs=True) for block in blocks]
    try:
        with in_eval(model), torch.no_grad(), quiet(), torch.random.fork_rng(devices=[]):
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
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
