"""The bytes that ops move, as multiples of what one sample of the stream takes: B samples, K of which have a branch.

What an op *needs* is each needed row of the big tensors once, in the dtype of the stream: read where it is an input,
written where it is a result. Branches are opaque: what one gets is written, what it returns is read. Vectors (γ,
weights, masks, indices) count nothing, nor does the stream's gradient where it is the incoming one.

What *others* move is counted for eager ops by `count_bytes`, and for compiled ones written out here: those are the
bytes of the fewest kernels that their formula can become.
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
    """What each pass reads and writes, in samples or in bytes."""

    forward: float
    backward: float

    def by(self, direction: str) -> float:
        """`"forward"`, `"backward"` or `"both"`."""
        return sum(self) if direction == "both" else getattr(self, direction)

    def times(self, sample_bytes: int) -> Moved:
        return Moved(*(samples * sample_bytes for samples in self))


def dense(batch: int, kept: int, gamma: bool) -> Moved:
    """Forward: the stream, the kept rows of the branch; the sum. Backward: the kept rows of its gradient, and for dγ of
    the branch; the branch's gradient, zeros included."""
    return Moved(batch + kept + batch, kept + kept * gamma + batch)


def unmasked(batch: int) -> Moved:
    """A plain sum. Its gradient is also the branch's."""
    return Moved(batch + batch + batch, 0)


def dense_relu(batch: int, kept: int, gamma: bool) -> Moved:
    """As `dense`; backward every row of the gradient and of the sum, which says where it passes, and dresidual."""
    forward, _ = dense(batch, kept, gamma)
    return Moved(forward, batch + batch + kept * gamma + batch + batch)


def some_rows(batch: int, kept: int, gamma: bool) -> Moved:
    """Forward: the stream, the branch; the sum. Backward: the rows' gradients, for dγ the branch; dbranch."""
    return Moved(batch + kept + batch, kept + kept * gamma + kept)


def compiled_some_rows(batch: int, kept: int, gamma: bool) -> Moved:
    """Forward: the stream is copied, then the rows of the copy read, added to and written. Backward: as needed."""
    return Moved(batch + batch + 3 * kept, some_rows(batch, kept, gamma).backward)


def gather(batch: int, kept: int) -> Moved:
    """Forward: rows read and written. Backward: their gradients; the stream's, zeros included."""
    return Moved(kept + kept, kept + batch)


def compiled_gather(batch: int, kept: int) -> Moved:
    """Backward: zeros, then the rows' gradients added to them."""
    return Moved(kept + kept, batch + 3 * kept)


def chain(batch: int, rows: Sequence[Sequence[int]], gamma: bool) -> Moved:
    """A chain of paths, each on its `rows`: gather, branch, add. The stream between two paths belongs to the chain and
    is updated in place, in the pass that gathers the next rows; only the first sum and, backward, the first gradient
    that differs from the incoming one are written anew.
    """
    counts = [len(r) for r in rows]
    touched = [len({*r, *next_input}) for r, next_input in itertools.pairwise(rows)]
    forward = 2 * counts[0]  # the gather before the first branch
    backward = 2 * counts[-1]  # of the last add: dout of its rows; dbranch
    backward += sum(counts) * gamma  # the branches, for dγ
    for path, count in enumerate(counts):
        last = path == len(counts) - 1
        if path == 0:
            forward += batch + count + batch  # stream, branch; sum
        else:
            forward += (count if last else touched[path]) + count + count
        forward += 0 if last else counts[path + 1]  # the next branch's input
    for path in reversed(range(-1, len(counts) - 1)):  # the add of `path`, if there is one, with the gather of the next
        next_input = counts[path + 1]
        if path == len(counts) - 2:
            backward += batch + next_input + batch  # dout, dnext; the first gradient of its own
        else:
            backward += (next_input if path < 0 else touched[path]) + next_input + next_input
        backward += 0 if path < 0 else counts[path]  # dbranch
    return Moved(forward, backward)


def compiled_chain(batch: int, rows: Sequence[Sequence[int]], gamma: bool) -> Moved:
    """Each gather and each add by itself; the first add copies, and every gather's gradient is added to the stream's as
    a [B, ...] of its own."""
    forward, backward = 0, 0
    for path, count in enumerate(map(len, rows)):
        forward += 2 * count + 3 * count + (2 * batch if path == 0 else 0)
        backward += (2 + gamma) * count + compiled_gather(batch, count).backward + 3 * batch
    return Moved(forward, backward)


def norm(batch: int, kept: int, dbranch: int, next_input: int, gamma: bool) -> Moved:
    """Forward: the stream, the branch; the sum, the `next_input` normed rows. Backward: both gradients, what the norm
    saw, for dγ the branch; the gradients of stream and branch. The norm saw the sum, which is there: a kernel that
    saves a copy of the `next_input` rows besides does more than it needs."""
    forward = batch + kept + batch + next_input
    return Moved(forward, batch + next_input + next_input + kept * gamma + batch + dbranch)


def compiled_norm_rows(batch: int, kept: int, next_input: int, gamma: bool) -> Moved:
    """The add of rows; then the next rows read, normalised and written. Backward the gradient of these is added to
    zeros and then to the sum's."""
    add, scatter = compiled_some_rows(batch, kept, gamma), compiled_gather(batch, next_input).backward
    normed = Moved(2 * next_input, 3 * next_input)  # dnext, what the norm saw; the gradient of that
    return Moved(add.forward + normed.forward, add.backward + normed.backward + scatter + 3 * batch)


# What eager ops move

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
    """Every op reads its tensors, each once, and writes its results; of rows only those."""

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
    """That the eager ops of `run()`, autograd's included, read and write: no kernel of such an op can move less."""
    with _Counter() as counter:
        run()
    return counter.total


def allocates(func: torch._ops.OpOverload) -> bool:
    """Whether an op does nothing else."""
    return func.overloadpacket in _NOTHING


def bytes_of(x: Tensor) -> int:
    """That there are in memory: an expanded dimension counts once."""
    sizes = [size for size, stride in zip(x.shape, x.stride(), strict=True) if stride or size == 0]
    return math.prod(sizes) * x.element_size()


def _tensors(tree: object) -> dict[int, Tensor]:
    return {id(leaf): leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)}
