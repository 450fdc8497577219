"""Exact memory traffic of interpreted Triton kernels: every element that a load or a store touches, mask applied.

The interpreter executes a load or store of a tile as one call with an address and a mask bit for each element. The
addresses tell which argument of the kernel a call belongs to. `tests/traffic` checks that each kernel moves the
minimum, and `python -m benchmarks traffic` prints the counts.

Importing this module imports triton, which interprets only if TRITON_INTERPRET=1 was set before.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from triton.runtime.interpreter import interpreter_builder

from rdp_kernels.kernels.triton.prepared import Launch, observed

SECTOR = 32  # bytes: the smallest piece that a GPU's memory moves

# Not proportional to rows × channels, or smaller than that by a factor of a row's width.
VECTORS = {"gamma_ptr", "weight_ptr", "bias_ptr"}
PARTIALS = {"dgamma_ptr", "dweight_ptr", "dbias_ptr", "partials_ptr"}
INDICES = {"index_ptr", "inverse_ptr", "next_inverse_ptr", "row_scale_ptr"}
SMALL = VECTORS | PARTIALS | INDICES | {"mean_ptr", "rstd_ptr"}
SMALL_KERNELS = {"_sum_partials_kernel", "_invert_rows_kernel"}

_NO_TRAFFIC = {torch.ops.aten.empty, torch.ops.aten.empty_like, torch.ops.aten.new_empty, torch.ops.aten.empty_strided}


class Accesses:
    """All loads of one tensor in one launch, or all stores.

    `calls` is the number of tiles that touch something, over all programs. `sectors` is the number of distinct 32-byte
    sectors that a call touches, summed over calls: contiguous elements of a tile coalesce, and no two calls share a
    sector, as if there were no cache.
    """

    def __init__(self, tensor: Tensor):
        self.tensor, self.calls, self.sectors = tensor, 0, 0
        extent = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)) + 1
        self._counts = np.zeros(extent if tensor.numel() else 0, np.int64)
        self._own = np.zeros(len(self._counts), bool)
        self._in_shape(self._own)[...] = True

    def add(self, addresses: np.ndarray) -> None:
        item = self.tensor.element_size()
        offsets, rest = np.divmod(addresses.astype(np.int64) - self.tensor.data_ptr(), item)
        assert not rest.any(), "a kernel touches parts of elements"
        assert self._own[offsets].all(), "a kernel touches what lies between a tensor's elements"
        np.add.at(self._counts, offsets, 1)
        self.calls += 1
        self.sectors += len(np.unique(addresses // np.uint64(SECTOR)))  # an element never spans two sectors

    @property
    def counts(self) -> np.ndarray:
        """The number of times that each element is touched, in the tensor's shape."""
        return self._in_shape(self._counts)

    def _in_shape(self, flat: np.ndarray) -> np.ndarray:
        strides = [stride * flat.itemsize for stride in self.tensor.stride()]
        return np.lib.stride_tricks.as_strided(flat, self.tensor.shape, strides)

    @property
    def bytes(self) -> int:
        return int(self._counts.sum()) * self.tensor.element_size()

    @property
    def distinct_bytes(self) -> int:
        return int(np.count_nonzero(self._counts)) * self.tensor.element_size()


class Traffic:
    """The accesses of one launch to one tensor. The tensor is kept alive, so that its addresses stay its own."""

    def __init__(self, tensor: Tensor):
        self.read, self.written = Accesses(tensor), Accesses(tensor)
        self.start = tensor.data_ptr()
        self.end = self.start + len(self.read._counts) * tensor.element_size()

    def overlaps(self, start: int, end: int) -> bool:
        return self.start < end and start < self.end


@dataclass
class LaunchTraffic:
    """One launch: `tensors` by argument name. Arguments with the same tensor (in place) share one `Traffic`."""

    kernel: str
    tensors: dict[str, Traffic] = field(default_factory=dict)

    @property
    def big(self) -> dict[str, Traffic]:
        """The tensors with sizes proportional to rows × channels."""
        return {name: traffic for name, traffic in self.tensors.items() if name not in self.small}

    @property
    def small(self) -> dict[str, Traffic]:
        """The tensors that aren't in `big`."""
        if self.kernel in SMALL_KERNELS:
            return self.tensors
        return {name: traffic for name, traffic in self.tensors.items() if name in SMALL}

    def at(self, addresses: np.ndarray) -> Traffic:
        """Returns the traffic of the tensor that contains all of `addresses`."""
        start, end = int(addresses.min()), int(addresses.max()) + 1
        for traffic in self.tensors.values():
            if traffic.overlaps(start, end):
                assert traffic.start <= start, f"{self.kernel} reaches below a tensor"
                assert end <= traffic.end, f"{self.kernel} reaches beyond a tensor"
                return traffic
        raise AssertionError(f"{self.kernel} touches memory that isn't among its arguments")


@dataclass
class Counted:
    """Launches in order, and the torch ops between them. Ops that only allocate, make views, or use no tensor of more
    than one dimension are left out."""

    launches: list[LaunchTraffic] = field(default_factory=list)
    torch_ops: list[str] = field(default_factory=list)

    def __add__(self, other: Counted) -> Counted:
        return Counted(self.launches + other.launches, self.torch_ops + other.torch_ops)

    @property
    def big(self) -> list[Accesses]:
        """The loads and stores of each big tensor of all launches, each once."""
        unique = {id(traffic): traffic for launch in self.launches for traffic in launch.big.values()}
        return [accesses for traffic in unique.values() for accesses in (traffic.read, traffic.written)]


@contextlib.contextmanager
def count_traffic() -> Iterator[Counted]:
    """Counts the launches within the `with` block. Raises if a kernel touches memory other than by loads and stores of
    its arguments' elements."""
    counted, current = Counted(), []
    load, store = interpreter_builder.create_masked_load, interpreter_builder.create_masked_store

    def counted_run(launch: Launch) -> None:
        record = LaunchTraffic(launch.kernel.fn.__name__)
        for name, value in launch.arguments.items():
            if isinstance(value, Tensor):
                record.tensors[name] = _traffic(value, record)
        counted.launches.append(record)
        current[:] = [record]
        try:
            with _disable_current_modes():  # the interpreter copies its arguments with torch ops
                launch.run()
        finally:
            current.clear()

    def addresses_of(pointers, mask):
        return pointers.data[mask.data.astype(bool)]  # the interpreter has masks of integers as well

    def counted_load(pointers, mask, *args):
        addresses = addresses_of(pointers, mask)
        if len(addresses):
            current[0].at(addresses).read.add(addresses)
        return load(pointers, mask, *args)

    def counted_store(pointers, value, mask, *args):
        addresses = addresses_of(pointers, mask)
        if len(addresses):
            current[0].at(addresses).written.add(addresses)
        return store(pointers, value, mask, *args)

    def refused(*_):
        raise NotImplementedError("atomics are not counted")

    class TorchOps(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            tensors = (t for t in tree_leaves((args, kwargs, result)) if isinstance(t, Tensor))
            if not func.is_view and func.overloadpacket not in _NO_TRAFFIC and any(t.dim() > 1 for t in tensors):
                counted.torch_ops.append(str(func))
            return result

    replaced = {
        "create_masked_load": counted_load,
        "create_masked_store": counted_store,
        "create_atomic_rmw": refused,
        "create_atomic_cas": refused,
    }
    with (
        observed(counted_run),
        mock.patch.multiple(interpreter_builder, **replaced),
        TorchOps(),
    ):
        yield counted


def _traffic(tensor: Tensor, launch: LaunchTraffic) -> Traffic:
    """Returns a new `Traffic`, or that of another argument with the same tensor."""
    new = Traffic(tensor)
    for other in launch.tensors.values():
        if new.overlaps(other.start, other.end):
            assert (new.start, new.end) == (other.start, other.end), "arguments overlap in part: accesses are ambiguous"
            return other
    return new
