"""Saves what a model holds and the states of the global generators, and restores both after a run or a trace."""

from __future__ import annotations

import contextlib
import random
import sys
from collections import OrderedDict, defaultdict, deque
from collections.abc import Iterator
from types import FunctionType, MethodType, ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

CONTAINERS = (list, dict, set, OrderedDict, defaultdict, deque)
"""The containers that are restored. Derived types aren't, as they may copy and fill in ways of their own."""


def generator_states() -> dict[str, Any]:
    """The states of the global generators of torch, of Python and, if it is imported, of numpy."""
    states: dict[str, Any] = {"torch": torch.get_rng_state(), "random": random.getstate()}
    if torch.cuda.is_initialized():
        states["torch.cuda"] = torch.cuda.get_rng_state_all()
    if "numpy" in sys.modules:
        states["numpy"] = sys.modules["numpy"].random.get_state(legacy=False)
    return states


def set_generator_states(states: dict[str, Any]) -> None:
    torch.set_rng_state(states["torch"])
    random.setstate(states["random"])
    if "torch.cuda" in states:
        torch.cuda.set_rng_state_all(states["torch.cuda"])
    if "numpy" in states:
        sys.modules["numpy"].random.set_state(states["numpy"])


def set_seed(seed: int) -> None:
    """Seeds the global generators. `torch.manual_seed` would also seed a CUDA that isn't initialised yet."""
    seed_torch(seed)
    random.seed(seed)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(seed)


def seed_torch(seed: int) -> None:
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)


def moved_generators(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """The names of the generators whose states differ."""
    return [name for name, state in before.items() if repr_of(state) != repr_of(after[name])]


def repr_of(state: Any) -> Any:
    """A copy of a generator's state that can be compared by `==`."""
    if isinstance(state, Tensor):
        return state.tolist()
    if isinstance(state, dict):
        return {name: repr_of(value) for name, value in state.items()}
    if isinstance(state, (list, tuple)):
        return [repr_of(value) for value in state]
    return state.tobytes() if hasattr(state, "tobytes") else state


@contextlib.contextmanager
def preserved_generators() -> Iterator[None]:
    states = generator_states()
    try:
        yield
    finally:
        set_generator_states(states)


class Snapshot:
    """Saves the attributes of a model's modules and of plain objects in them: the objects themselves, the contents of
    containers, and the numbers in tensors that aren't parameters. Names that begin with `_rdp_` are left out."""

    def __init__(self, model: nn.Module):
        self._attributes: dict[int, tuple[Any, dict[str, Any]]] = {}
        self._containers: dict[int, tuple[Any, Any]] = {}
        self._tensors: dict[int, tuple[Tensor, Tensor]] = {}
        for module in model.modules():
            self._take(module)

    def _take(self, value: Any) -> None:
        if isinstance(value, nn.Module):
            if id(value) not in self._attributes:
                self._attributes[id(value)] = (value, dict(value.__dict__))
                for inner in value.__dict__.values():
                    self._take(inner)
        elif _is_plain(value):  # objects inside are left out, as they may be data sets
            self._attributes.setdefault(id(value), (value, dict(value.__dict__)))
            for inner in value.__dict__.values():
                if type(inner) in CONTAINERS:
                    self._containers.setdefault(id(inner), (inner, inner.copy()))
        elif isinstance(value, Tensor):
            if id(value) not in self._tensors and not isinstance(value, nn.Parameter) and not value.is_meta:
                self._tensors[id(value)] = (value, value.detach().clone())
        elif type(value) in (*CONTAINERS, tuple) and id(value) not in self._containers:
            if type(value) is not tuple:
                self._containers[id(value)] = (value, value.copy())
            for inner in value.values() if isinstance(value, dict) else value:
                self._take(inner)

    def restore(self) -> None:
        for module, attributes in self._attributes.values():
            now = module.__dict__
            for name in [n for n in now if n not in attributes and not n.startswith("_rdp_")]:
                del now[name]
            for name, value in attributes.items():
                if not name.startswith("_rdp_") and now.get(name, self) is not value:
                    now[name] = value
        for container, contents in self._containers.values():
            if items_of(container) != items_of(contents):
                fill(container, contents)
        with torch.no_grad():
            for tensor, copied in self._tensors.values():
                if not torch.equal(tensor.detach(), copied):
                    tensor.copy_(copied)


def _is_plain(value: Any) -> bool:
    """Whether an object keeps everything in its `__dict__`."""
    kind = type(value)
    return kind is SimpleNamespace or (
        kind.__reduce_ex__ is object.__reduce_ex__
        and hasattr(value, "__dict__")
        and not isinstance(value, (type, Tensor, ModuleType, FunctionType, MethodType))
        and kind.__module__.partition(".")[0] not in ("torch", "numpy", "rdp_kernels", "builtins")
    )


def fill(container: Any, contents: Any) -> None:
    """Replaces the contents of a list, dict or set."""
    container.clear()
    (container.extend if isinstance(container, (list, deque)) else container.update)(contents)


def items_of(container: Any) -> list[Any]:
    """The contents of a container, by identity."""
    if isinstance(container, dict):
        return [(name, id(value)) for name, value in container.items()]
    ids = [id(value) for value in container]
    return sorted(ids) if isinstance(container, set) else ids


@contextlib.contextmanager
def preserved(model: nn.Module) -> Iterator[Snapshot]:
    """Restores the contents of the model and the generators at the end."""
    snapshot = Snapshot(model)
    with preserved_generators():
        try:
            yield snapshot
        finally:
            snapshot.restore()
