"""What only a GPU can show: tensors beyond 2^31 elements, streams, devices and CUDA graphs, and a training step that never
synchronises."""

import contextlib
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

import rdp_kernels as rdp
from examples.models import ViT
from rdp_kernels.kernels.native.library import has_cuda
from rdp_kernels.kernels.triton import launchers

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True, params=["triton", "native"])
def _kernels(request):
    if request.param == "native" and not has_cuda():
        pytest.skip("the compiled library was built without CUDA")
    torch.cuda.empty_cache()  # the tests ask the driver for free memory, and the allocator's cache isn't free there
    with rdp.use_backend(request.param):
        yield


def numbered(rows, width, device="cuda"):
    """bf16 `[len(rows), width]`. Every element depends on its row's number and its column. Elements are whole numbers
    below 64, so that short sums are exact. Numbers are reduced before the cast to bf16, which would round large ones to
    multiples of 64. They are reduced modulo 61, so that rows that lie a power of 2 apart differ."""
    number = torch.arange(rows.start, rows.stop, device=device).remainder_(61).bfloat16()
    x = torch.arange(width, device=device, dtype=torch.int32).remainder_(97).bfloat16().repeat(len(rows), 1)
    return x.add_(number[:, None]).remainder_(64)


@pytest.mark.parametrize(("num_rows", "width"), [(3, 2**30 + 48), (2**16 + 1, 2**15 + 16)])
def test_tensors_beyond_32_bits(num_rows, width):
    """Few long rows, and many: offsets within a row and between rows pass 2^31."""
    if torch.cuda.mem_get_info()[0] < 14 * num_rows * width:
        pytest.skip("needs room for seven bf16 tensors of the size")
    residual = numbered(range(num_rows), width)
    branch = 2 * residual  # the sum with the opposite row of the residual itself would be nearly the same in all rows
    rows = torch.arange(num_rows, device="cuda").flip(0)
    out = rdp.residual_add(residual, branch, rows=rows)
    gathered = rdp.gather_rows(out, rows[:2])
    for row in {0, 1, num_rows // 2, num_rows - 1}:
        assert torch.equal(out[row], residual[row] + branch[num_rows - 1 - row])
    assert torch.equal(gathered[0], out[-1])
    assert torch.equal(gathered[1], out[-2])


def test_norm_beyond_32_bits():
    batch, tokens, dim = 3, 2**20 + 1, 1024
    if torch.cuda.mem_get_info()[0] < 12 * batch * tokens * dim:
        pytest.skip("needs room for six bf16 tensors of the size")
    residual = numbered(range(batch * tokens), dim).view(batch, tokens, dim)
    weight = torch.rand(dim, device="cuda", dtype=torch.bfloat16)
    out, normed = rdp.residual_add_norm(residual, residual, weight, norm="rms")
    last = (slice(-1, None), slice(-5, None))
    assert torch.equal(out[last], 2 * residual[last])
    expected = nn.functional.rms_norm(out[last].float(), (dim,), weight.float(), 1e-6).bfloat16()
    torch.testing.assert_close(normed[last], expected)


def test_side_streams():
    """Kernels run on the current stream, after the work queued on it, and don't wait for the default stream."""
    x, update = torch.zeros(64, 4096, device="cuda"), torch.ones(64, 4096, device="cuda")
    rdp.residual_add(x, update)  # compiles
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        update.fill_(3.0)
        out = rdp.residual_add(x, update, row_scale=2.0)
    torch.cuda.current_stream().wait_stream(stream)
    assert torch.equal(out, torch.full_like(out, 6.0))


def operands(device="cuda"):
    """Leaves: residual, branch, γ, the norm's weight and bias."""
    shapes = (8, 16, 96), (4, 16, 96), (96,), (96,), (96,)
    return [torch.randn(shape, device=device, requires_grad=True) for shape in shapes]


def results_of(operands, rows, row_scale):
    """Results and gradients of all ops."""
    residual, branch, gamma, weight, bias = operands
    out = rdp.residual_add(residual, branch, rows=rows, row_scale=row_scale, gamma=gamma)
    out, normed = rdp.residual_add_norm(out, out, weight, bias, row_scale=0.5, next_rows=rows)
    picked = rdp.gather_rows(out, rows)
    loss = normed.square().sum() + (picked * normed.detach()).sum()
    return out, normed, picked, *torch.autograd.grad(loss, operands)


def expected(*arguments):
    with rdp.use_backend("eager"):
        return results_of(*arguments)


def rows_and_scale(device="cuda"):
    return torch.randperm(8, device=device)[:4], torch.rand(4, device=device) + 0.5


def assert_close(results, wanted):
    for result, other in zip(results, wanted, strict=True):
        torch.testing.assert_close(result, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("known", [True, False])
def test_a_captured_call_follows_its_arguments(known):
    """In a CUDA graph, of a call that was made before, and of one of a new kind whose kernels are compiled."""
    arguments = operands(), *rows_and_scale()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            results_of(*arguments)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with contextlib.nullcontext() if known else launchers.nothing_prepared(), torch.cuda.graph(graph):
        results = results_of(*arguments)
    for _ in range(3):
        with torch.no_grad():
            for tensor, other in zip((*arguments[0], *arguments[1:]), (*operands(), *rows_and_scale()), strict=True):
                tensor.copy_(other)
        graph.replay()
        assert_close(results, expected(*arguments))


def test_two_streams_in_turn():
    """A call of a known kind runs on the stream of the moment, forward and backward."""
    streams = [torch.cuda.Stream() for _ in range(2)]
    arguments = [(operands(), *rows_and_scale()) for _ in range(6)]
    wanted = [expected(*each) for each in arguments]
    late = [
        ([torch.zeros_like(t, requires_grad=True) for t in ts], rows.clone(), scale) for ts, rows, scale in arguments
    ]
    results_of(*late[0])
    torch.cuda.synchronize()
    results = []
    for number, (given, to) in enumerate(zip(arguments, late, strict=True)):
        with torch.cuda.stream(streams[number % 2]):
            torch.cuda._sleep(20_000_000)
            with torch.no_grad():
                for leaf, value in zip(to[0], given[0], strict=True):
                    leaf.copy_(value)
            results.append(results_of(*to))
    torch.cuda.synchronize()
    for result, other in zip(results, wanted, strict=True):
        assert_close(result, other)


def test_threads_with_streams_of_their_own():
    """Autograd runs each backward in its own thread for the device, on the stream of its forward."""
    arguments = [(operands(), *rows_and_scale()) for _ in range(8)]
    wanted = [expected(*each) for each in arguments]
    results_of(*arguments[0])  # compiles
    torch.cuda.synchronize()

    def work(each):
        with torch.cuda.stream(torch.cuda.Stream()):
            results = [results_of(*each) for _ in range(5)]
        torch.cuda.synchronize()
        return results

    with launchers.nothing_prepared(), ThreadPoolExecutor(8) as pool:
        for results, other in zip(pool.map(work, arguments), wanted, strict=True):
            for result in results:
                assert_close(result, other)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_devices_in_turn():
    """Calls on another device than the current one, of the same shapes."""
    for _ in range(3):
        for device in ("cuda:0", "cuda:1"):
            arguments = operands(device), *rows_and_scale(device)
            results = results_of(*arguments)
            assert {result.device for result in results} == {torch.device(device)}
            assert_close(results, expected(*arguments))


@pytest.mark.parametrize(("mode", "freeze"), [("block", "branch"), ("sample", "parameters")])
def test_a_training_step_never_synchronises(mode, freeze):
    model = ViT(8, 2, 3, 7, 32, 4, 2).cuda()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scheme = rdp.ResidualDropPath(model, 0.5, mode=mode, freeze=freeze, sampling="fixed", seed=0)
    images, labels = torch.randn(16, 3, 8, 8, device="cuda"), torch.randint(7, (16,), device="cuda")
    try:
        for pair in range(6):
            if pair == 3:  # by now every kernel is compiled, and the optimizer has its state
                torch.cuda.set_sync_debug_mode("error")
            for _ in scheme.iterations(len(images)):
                nn.functional.cross_entropy(model(images), labels).backward()
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")
