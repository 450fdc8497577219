"""The bytes that ops move, in units of the bytes of one sample of the residual. K of the B samples have a branch.

An op *needs* each needed row of the big tensors once, in the dtype of the residual: inputs are read, results are
written. Branches are opaque: the input of a branch is written, its update is read. Vectors (γ, weights, masks, indices)
count nothing. The residual's gradient counts nothing if it is the incoming gradient itself.

The bytes that *other* providers move are counted by `count_bytes` for eager ops. For compiled ops they are modelled
here: the bytes of the fewest kernels that the formula can be compiled to.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten


class Moved(NamedTuple):
    """The amount that each pass reads and writes, in samples or in bytes."""

    forward: float
    backward: float

    def by(self, direction: str) -> float:
        """`direction` is `"forward"`, `"backward"` or `"both"`."""
        return sum(self) if direction == "both" else getattr(self, direction)

    def times(self, sample_bytes: int) -> Moved:
        return Moved(*(samples * sample_bytes for samples in self))


def dense(batch: int, kept: int, gamma: bool) -> Moved:
    """Forward reads residual and the kept rows of update, and writes the sum. Backward reads the kept rows of dout, and
    of update for dγ, and writes dupdate with its zeros."""
    return Moved(batch + kept + batch, kept + kept * gamma + batch)


def unmasked(batch: int) -> Moved:
    """A plain sum. The incoming gradient is also the update's."""
    return Moved(batch + batch + batch, 0)


def dense_relu(batch: int, kept: int, gamma: bool) -> Moved:
    """As `dense`. Backward reads every row of dout and of the sum (for the ReLU's mask), and writes dresidual too."""
    forward, _ = dense(batch, kept, gamma)
    return Moved(forward, batch + batch + kept * gamma + batch + batch)


def some_rows(batch: int, kept: int, gamma: bool) -> Moved:
    """Forward reads residual and update, and writes the sum. Backward reads these rows of dout, and update for dγ, and
    writes dupdate."""
    return Moved(batch + kept + batch, kept + kept * gamma + kept)


def compiled_some_rows(batch: int, kept: int, gamma: bool) -> Moved:
    """Forward copies the residual, then reads rows of the copy, adds to them and writes them. Backward is as needed."""
    return Moved(batch + batch + 3 * kept, some_rows(batch, kept, gamma).backward)


def gather(batch: int, kept: int) -> Moved:
    """Forward reads and writes the rows. Backward reads their gradients, and writes the residual's with its zeros."""
    return Moved(kept + kept, kept + batch)


def compiled_gather(batch: int, kept: int) -> Moved:
    """Backward writes zeros, then adds the rows' gradients to them."""
    return Moved(kept + kept, batch + 3 * kept)


def chain(batch: int, rows: Sequence[Sequence[int]], gamma: bool) -> Moved:
    """A chain of paths, each on its `rows`: gather, branch, add. The residual between two paths belongs to the chain.
    It is updated in place, in the pass that gathers the next rows. Only the first sum is a new tensor and, in the
    backward, the first gradient that differs from the incoming one.
    """
    counts = [len(r) for r in rows]
    touched = [len({*r, *next_input}) for r, next_input in itertools.pairwise(rows)]
    forward = 2 * counts[0]  # the gather before the first branch
    backward = 2 * counts[-1]  # the last add: dout of its rows; dupdate
    backward += sum(counts) * gamma  # updates, for dγ
    for path, count in enumerate(counts):
        last = path == len(counts) - 1
        if path == 0:
            forward += batch + count + batch  # residual, update; sum
        else:
            forward += (count if last else touched[path]) + count + count
        forward += 0 if last else counts[path + 1]  # the next branch's input
    for path in reversed(range(-1, len(counts) - 1)):  # the add of `path`, if any, with the gather of the next
        next_input = counts[path + 1]
        if path == len(counts) - 2:
            backward += batch + next_input + batch  # dout, dnext; the first new gradient
        else:
            backward += (next_input if path < 0 else touched[path]) + next_input + next_input
        backward += 0 if path < 0 else counts[path]  # dupdate
    return Moved(forward, backward)


def compiled_chain(batch: int, rows: Sequence[Sequence[int]], gamma: bool) -> Moved:
    """Every gather and every add is separate. The first add copies, and each gather's gradient is a [B, ...] tensor
    that is added to the residual's gradient."""
    forward, backward = 0, 0
    for path, count in enumerate(map(len, rows)):
        forward += 2 * count + 3 * count + (2 * batch if path == 0 else 0)
        backward += (2 + gamma) * count + compiled_gather(batch, count).backward + 3 * batch
    return Moved(forward, backward)


def norm(batch: int, kept: int, dbranch: int, next_input: int, gamma: bool) -> Moved:
    """Forward reads residual and update, and writes the sum and the `next_input` normed rows. Backward reads both
    gradients, the norm's input, and update for dγ, and writes dresidual and dupdate. The norm's input is the sum, which
    exists already: a kernel that saves a copy of its `next_input` rows moves more than it needs."""
    forward = batch + kept + batch + next_input
    return Moved(forward, batch + next_input + next_input + kept * gamma + batch + dbranch)


def compiled_norm_rows(batch: int, kept: int, next_input: int, gamma: bool) -> Moved:
    """Adds the rows; then reads, normalises and writes the next rows. In the backward their gradient is added to zeros
    and then to the sum's gradient."""
    add, scatter = compiled_some_rows(batch, kept, gamma), compiled_gather(batch, next_input).backward
    normed = Moved(2 * next_input, 3 * next_input)  # dnext, the norm's input; the gradient of that input
    return Moved(add.forward + normed.forward, add.backward + normed.backward + scatter + 3 * batch)


# The bytes of eager ops

_WRITES_ONLY = {
    *(aten.zeros, aten.zeros_like, aten.new_zeros, aten.ones, aten.ones_like, aten.new_ones, aten.full, aten.full_like),
    *(aten.new_full, aten.fill_, aten.zero_),
}
_NOTHING = {aten.empty, aten.empty_like, aten.new_empty, aten.empty_strided, aten.new_empty_strided}
_BY_ROWS: dict[Any, Callable[..., int]] = {
    aten.index_select: lambda x, dim, index: 2 * bytes_of(x) * len(index) // max(x.shape[dim], 1),
    aten.index_add_: lambda x, dim, index, source, **_: 3 * bytes_of(source),
    aten.index_add: lambda x, dim, index, source, **_: 2 * bytes_of(x) + 3 * bytes_of(source),  # a copy, then the rows
    aten.copy_: lambda x, source, *_: bytes_of(x) + bytes_of(source),
}


class _Counter(TorchDispatchMode):
    """Counts one read of each tensor of an op and one write of each result. Ops on rows touch only these rows."""

    total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        results = func(*args, **(kwargs or {}))
        packet = func.overloadpacket
        if packet in _BY_ROWS:
            self.total += _BY_ROWS[packet](*args, **(kwargs or {}))
        elif not func.is_view and not allocates(func):
            read = {} if packet in _WRITES_ONLY else _tensors((args, kwargs))
            self.total += sum(map(bytes_of, (*read.values(), *_tensors(results).values())))
        return results


def count_bytes(run: Callable[[], object]) -> int:
    """Counts the bytes that the eager ops of `run()` read and write, autograd's included. Kernels of these ops can't
    move less."""
    with _Counter() as counter:
        run()
    return counter.total


def allocates(func: torch._ops.OpOverload) -> bool:
    """Returns whether an op only allocates."""
    return func.overloadpacket in _NOTHING


def bytes_of(x: Tensor) -> int:
    """Returns the bytes of a tensor in memory. An expanded dimension counts once."""
    sizes = [size for size, stride in zip(x.shape, x.stride(), strict=True) if stride or size == 0]
    return math.prod(sizes) * x.element_size()


def _tensors(tree: object) -> dict[int, Tensor]:
    return {id(leaf): leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)}
