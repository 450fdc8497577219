"""What only a GPU can show: tensors beyond 2^31 elements, side streams, and a training step that never synchronises."""

import pytest
import torch
from torch import nn

import rdp_kernels as rdp
from examples.models import ViT
from rdp_kernels.kernels.native.library import has_cuda

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
