"""What a model holds and the global generators' states, to be put back after its forward was run or traced."""

from __future__ import annotations

import contextlib
import random
import sys
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

CONTAINERS = (list, dict, set, OrderedDict, defaultdict, deque)
"""What is put back: these types, not what is derived from them, which may copy and fill in ways of its own."""


def generator_states() -> dict[str, Any]:
    """Of torch's, Python's and, where it is imported, numpy's global generators."""
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


def moved_generators(states: dict[str, Any]) -> list[str]:
    """Those that were drawn from since `states` were taken."""
    now = generator_states()
    return [name for name, state in states.items() if repr_of(state) != repr_of(now[name])]


def repr_of(state: Any) -> Any:
    """Something that `==` compares."""
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
    """The attributes of all modules of a model: which objects they are, what is in containers, numbers in tensors.

    Names that begin with `_rdp_` are left out.
    """

    def __init__(self, model: nn.Module):
        self._attributes: dict[int, tuple[nn.Module, dict[str, Any]]] = {}
        self._containers: dict[int, tuple[Any, Any]] = {}
        self._tensors: dict[Any, Tensor] = {}
        self._written: dict[Any, Tensor] = {}
        for module in model.modules():
            self._take(module)

    def _take(self, value: Any) -> None:
        if isinstance(value, nn.Module):
            if id(value) not in self._attributes:
                self._attributes[id(value)] = (value, dict(value.__dict__))
                for inner in value.__dict__.values():
                    self._take(inner)
        elif isinstance(value, Tensor):
            self._tensors.setdefault(storage_of(value), value)
        elif type(value) in (*CONTAINERS, tuple) and id(value) not in self._containers:
            if type(value) is not tuple:
                self._containers[id(value)] = (value, value.copy())
            for inner in value.values() if isinstance(value, dict) else value:
                self._take(inner)

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Keeps the numbers of tensors that are written to meanwhile."""
        with _Writes(self._keep):
            yield

    def _keep(self, written: Tensor) -> None:
        place = storage_of(written)
        if place in self._tensors and place not in self._written:
            self._written[place] = self._tensors[place].detach().clone()

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
            for place, contents in self._written.items():
                self._tensors[place].copy_(contents)


class _Writes(TorchDispatchMode):
    """Calls `before` with every tensor that an operation is about to write to."""

    def __init__(self, before: Callable[[Tensor], None]):
        super().__init__()
        self._before = before

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func._schema.is_mutable:
            named = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | kwargs
            for argument in func._schema.arguments:
                if argument.alias_info is not None and argument.alias_info.is_write:
                    for tensor in pytree.tree_leaves(named.get(argument.name)):
                        if isinstance(tensor, Tensor):
                            self._before(tensor)
        return func(*args, **kwargs)


def storage_of(tensor: Tensor) -> Any:
    try:
        return tensor.untyped_storage()._cdata
    except (RuntimeError, NotImplementedError):  # a wrapper without one
        return id(tensor)


def fill(container: Any, contents: Any) -> None:
    """Gives a list, dict or set these contents."""
    container.clear()
    (container.extend if isinstance(container, (list, deque)) else container.update)(contents)


def items_of(container: Any) -> list[Any]:
    """What is in it, by identity."""
    if isinstance(container, dict):
        return [(name, id(value)) for name, value in container.items()]
    ids = [id(value) for value in container]
    return sorted(ids) if isinstance(container, set) else ids


@contextlib.contextmanager
def preserved(model: nn.Module) -> Iterator[Snapshot]:
    """Puts back what the model holds, and the generators."""
    snapshot = Snapshot(model)
    with preserved_generators():
        try:
            yield snapshot
        finally:
            snapshot.restore()
