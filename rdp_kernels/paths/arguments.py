"""The arguments that branches take besides x, and the errors about arguments and outputs that don't fit."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch.utils._pytree as pytree
from torch import Tensor, nn

Args = tuple[Any, ...]
Kwargs = dict[str, Any]
_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
_BY_NAME = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


class Takes(NamedTuple):
    """What a forward takes besides x."""

    positional: tuple[str, ...]
    by_name: tuple[str, ...]
    any_positional: bool
    any_by_name: bool


def taken_by(module: nn.Module) -> Takes:
    """What the forward of `module` takes now. For the wrappers of `torch.compile` and of checkpointing, it is what the
    wrapped module takes; for any other wrapper, it is what the wrapper's own forward takes."""
    while (inner := next((getattr(module, n) for n in _WRAPPED if hasattr(module, n)), None)) is not None:
        module = inner
    if "forward" in module.__dict__ or getattr(type(module), "forward", None) is None:
        return _signature(module.forward, 1)  # scripted, compiled, or wrapped by another library's hooks
    return _of_class(type(module))


_WRAPPED = ("_orig_mod", "_checkpoint_wrapped_module")
_known: dict[type, Takes] = {}


def _of_class(kind: type[nn.Module]) -> Takes:
    if kind not in _known:
        _known[kind] = _signature(kind.forward, 2)
    return _known[kind]


def _signature(forward: Callable[..., Any], before: int) -> Takes:
    """`before` is the number of leading parameters that are left out: x, or self and x."""
    try:
        parameters = list(inspect.signature(forward).parameters.values())
    except ValueError:  # torch.jit.trace makes forwards without a signature
        return Takes((), (), True, True)
    positional = [p.name for p in parameters if p.kind in _POSITIONAL]
    by_name = [p.name for p in parameters if p.kind in _BY_NAME and p.name not in positional[:before]]
    kinds = [p.kind for p in parameters]
    return Takes(
        tuple(positional[before:]),
        tuple(by_name),
        inspect.Parameter.VAR_POSITIONAL in kinds,
        inspect.Parameter.VAR_KEYWORD in kinds,
    )


for _asked_in_graphs in (_of_class, _signature):  # torch.compile takes their results for constants
    _asked_in_graphs._dynamo_marked_constant = True  # type: ignore[union-attr]


def for_each(paths: Iterable[Any], args: Args, kwargs: Kwargs) -> list[Kwargs]:
    """The keyword arguments for each path: those that its branch takes by name.

    Raises `TypeError` for one that no branch takes, and for positional arguments that not every branch takes.
    """
    taken = [path.takes() for path in paths]
    for number, takes in enumerate(taken):
        if len(args) > len(takes.positional) and not takes.any_positional:
            raise TypeError(
                f"branch {number} of the sequence takes {len(takes.positional)} positional arguments after x, got "
                f"{len(args)}: pass by name the arguments that not every branch takes"
            )
    if any(takes.any_by_name for takes in taken):
        unknown = []
    else:
        unknown = [name for name in kwargs if not any(name in takes.by_name for takes in taken)]
    if unknown and taken:
        names = sorted({name for takes in taken for name in takes.by_name})
        raise TypeError(f"no branch of the sequence takes {', '.join(map(repr, unknown))}; the names taken are {names}")
    return [
        kwargs if takes.any_by_name else {name: v for name, v in kwargs.items() if name in takes.by_name}
        for takes in taken
    ]


def left_behind(
    batch_size: int, args: Args, kwargs: Kwargs, of_rows: tuple[Args, Kwargs], takes: Takes
) -> list[str | int]:
    """The arguments, by name or else by position, that hold a tensor of `batch_size` rows and are unchanged in
    `of_rows`, the arguments that the branch got with only some rows of x."""
    positions = [takes.positional[i] if i < len(takes.positional) else i for i in range(len(args))]
    given = [*zip(positions, args, of_rows[0], strict=True), *((k, v, of_rows[1][k]) for k, v in kwargs.items())]
    return [name for name, before, after in given if before is after and _has_rows(before, batch_size)]


def _has_rows(value: Any, count: int) -> bool:
    return any(isinstance(t, Tensor) and t.dim() > 0 and t.shape[0] == count for t in pytree.tree_leaves(value))
