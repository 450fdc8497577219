"""The counter itself: it sees wrong traffic, so that the other tests of this folder can fail."""

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.errors import InterpreterError

from benchmarks.kernel_traffic import count_traffic
from rdp_kernels.kernels.triton.launch import LaunchConfig
from rdp_kernels.kernels.triton.prepared import PreparedLaunch
from tests.traffic import needs_interpreter
from tests.traffic.fused_adds import ALL, check

pytestmark = needs_interpreter
FLOAT = 4


@triton.jit
def _copy_kernel(
    out_ptr, x_ptr, size, x_start, LOADS: tl.constexpr, STORES: tl.constexpr, MASKED: tl.constexpr, BLOCK: tl.constexpr
):
    """Each program copies a block of `x` from `x_start` on, with as many loads and stores as asked for."""
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.zeros([BLOCK], tl.float32)
    for _ in range(LOADS):
        if MASKED:
            x = tl.load(x_ptr + x_start + n, mask=n < size, other=0.0).to(tl.float32)
        else:
            x = tl.load(x_ptr + x_start + n).to(tl.float32)
    for _ in range(STORES):
        if MASKED:
            tl.store(out_ptr + n, x, mask=n < size)
        else:
            tl.store(out_ptr + n, x)


@triton.jit
def _add_atomically_kernel(out_ptr, BLOCK: tl.constexpr):
    tl.atomic_add(out_ptr + tl.arange(0, BLOCK), 1.0)


@triton.jit
def _gather_kernel(out_ptr, x_ptr, step, BLOCK: tl.constexpr):
    n = tl.arange(0, BLOCK)
    tl.store(out_ptr + n, tl.load(x_ptr + n * step))


def launch(kernel, programs=1, **arguments):
    with count_traffic() as counted:
        _launch(kernel, programs, **arguments)
    return counted


def _launch(kernel, programs, **arguments):
    prepared = PreparedLaunch(kernel, LaunchConfig(1, 1, 1), torch.device("cpu"))
    prepared(programs, *(arguments[name] for name in kernel.arg_names))


def copy(x, out, size=None, programs=1, x_start=0, loads=1, stores=1, masked=True, block=64):
    return launch(
        _copy_kernel, programs, out_ptr=out, x_ptr=x, size=out.numel() if size is None else size, x_start=x_start,
        LOADS=loads, STORES=stores, MASKED=masked, BLOCK=block,
    )  # fmt: skip


def numbers(accesses):
    return accesses.bytes, accesses.distinct_bytes, accesses.sectors


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_and_sectors(masked, dtype):
    x, out = torch.randn(128).to(dtype), torch.zeros(128, dtype=dtype)
    (record,) = copy(x, out, programs=2, masked=masked).launches
    assert record.kernel == "_copy_kernel"
    size = 128 * dtype.itemsize
    assert numbers(record.tensors["x_ptr"].read) == (size, size, size // 32)
    assert numbers(record.tensors["out_ptr"].written) == (size, size, size // 32)
    assert numbers(record.tensors["x_ptr"].written) == numbers(record.tensors["out_ptr"].read) == (0, 0, 0)
    assert torch.equal(out, x)


def test_the_mask_counts():
    (record,) = copy(torch.randn(128), torch.zeros(128), size=70, programs=2).launches
    read = record.tensors["x_ptr"].read
    assert numbers(read) == (70 * FLOAT, 70 * FLOAT, 9)  # the last of nine sectors for six elements
    assert read.counts.tolist() == [1] * 70 + [0] * 58
    assert read.calls == 2


def test_reading_twice_and_writing_twice_shows():
    counted = copy(torch.randn(64), torch.zeros(64), loads=2)
    assert numbers(counted.launches[0].tensors["x_ptr"].read) == (2 * 64 * FLOAT, 64 * FLOAT, 2 * 8)
    minimum = 2 * 64 * FLOAT
    reads, writes = {"x_ptr": ALL}, {"out_ptr": ALL}
    check(copy(torch.randn(64), torch.zeros(64)), minimum, reads, writes)
    for twice in (dict(loads=2), dict(stores=2)):
        with pytest.raises(AssertionError, match="how often"):
            check(copy(torch.randn(64), torch.zeros(64), **twice), minimum, reads, writes)
    check(counted, minimum + 64 * FLOAT, reads, writes, twice={"x_ptr"})


def test_check_sees_what_is_not_minimal():
    x, out = torch.randn(64), torch.zeros(64)
    reads, writes, minimum = {"x_ptr": ALL}, {"out_ptr": ALL}, 2 * 64 * FLOAT
    with pytest.raises(AssertionError, match="how often"):  # an element too many
        check(copy(x, out), minimum, {"x_ptr": list(range(63))}, writes)
    with pytest.raises(AssertionError, match="how often"):  # one element too few
        check(copy(x, out, size=63), minimum, reads, writes)
    with pytest.raises(AssertionError, match="1.032 × the minimum"):
        check(copy(x, out), minimum - 16, reads, writes)
    with pytest.raises(AssertionError, match="sectors"):  # 64 elements that end in a ninth sector
        check(copy(torch.randn(65), out, x_start=1), minimum, {"x_ptr": list(range(1, 65))}, writes)
    with pytest.raises(AssertionError, match="isn't"):
        check(copy(x, out), minimum, {"y_ptr": ALL}, writes)


def test_a_scattered_load_takes_a_sector_an_element():
    (record,) = launch(_gather_kernel, out_ptr=torch.zeros(16), x_ptr=torch.randn(128), step=8, BLOCK=16).launches
    assert numbers(record.tensors["x_ptr"].read) == (16 * FLOAT, 16 * FLOAT, 16)
    assert numbers(record.tensors["out_ptr"].written) == (16 * FLOAT, 16 * FLOAT, 2)


def test_views():
    """Counts have the tensor's shape for any strides; memory between its elements doesn't count as its own."""
    x = torch.randn(4, 16).t()
    (record,) = copy(x, torch.zeros(64), size=40).launches
    assert record.tensors["x_ptr"].read.counts.tolist() == [[1, 1, int(i < 8), 0] for i in range(16)]
    with pytest.raises(InterpreterError, match="between"):
        copy(torch.randn(4, 32)[:, :16], torch.zeros(64))


def test_one_tensor_as_two_arguments():
    """In place there is one record under both names."""
    x = torch.randn(64)
    counted = copy(x, x)
    (record,) = counted.launches
    assert record.tensors["x_ptr"] is record.tensors["out_ptr"]
    assert sum(accesses.bytes for accesses in counted.big) == 2 * 64 * FLOAT
    with pytest.raises(AssertionError, match="overlap"):
        copy(x[:48], x[16:], size=48)


def test_memory_outside_of_tensors():
    storage = torch.randn(256)
    with pytest.raises(InterpreterError, match="reaches beyond"):
        copy(storage[:32], torch.zeros(64))
    with pytest.raises(InterpreterError, match="reaches below"):
        copy(storage[64:128], torch.zeros(64), x_start=-16)
    with pytest.raises(InterpreterError, match="isn't among"):
        copy(storage[64:128], torch.zeros(64), x_start=64)


def test_small_tensors():
    """Tensors are small by their arguments' names."""
    counted = launch(_gather_kernel, out_ptr=torch.zeros(16), x_ptr=torch.zeros(16), step=1, BLOCK=16)
    (record,) = counted.launches
    assert {*record.big} == {"out_ptr", "x_ptr"}
    assert record.small == {}
    record.tensors["gamma_ptr"] = record.tensors.pop("x_ptr")
    assert ({*record.big}, {*record.small}) == ({"out_ptr"}, {"gamma_ptr"})
    record.kernel = "_sum_partials_kernel"
    assert ({*record.big}, {*record.small}) == (set(), {"out_ptr", "gamma_ptr"})


def test_torch_ops_and_atomics():
    x = torch.randn(8, 8)
    with count_traffic() as counted:
        torch.empty_like(x.t()[1:])
        x[0].zero_()  # a vector
        x.clone().zero_()
    assert counted.torch_ops == ["aten.clone.default", "aten.zero_.default"]
    with pytest.raises(InterpreterError, match="atomics are not counted"):
        launch(_add_atomically_kernel, out_ptr=x, BLOCK=64)


def test_nothing_stays_replaced():
    x, out = torch.randn(64), torch.zeros(64)
    counted = copy(x, out)
    before = counted.launches[0].tensors["x_ptr"].read.bytes
    _launch(_gather_kernel, 1, out_ptr=out, x_ptr=x, step=1, BLOCK=64)
    assert (len(counted.launches), counted.launches[0].tensors["x_ptr"].read.bytes) == (1, before)
