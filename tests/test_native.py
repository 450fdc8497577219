"""The compiled library's own ops, called directly; and that threads and instruction sets don't change their results."""

import os
import subprocess
import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import rdp_kernels as rdp
from rdp_kernels.kernels.layout import Layout
from rdp_kernels.kernels.native import library, support
from rdp_kernels.kernels.spec import Operands

from .kernels import ops
from .kernels.budget import check
from .kernels.cases import Case

OPS = torch.ops.rdp
B, T, C = 4, 3, 5
X, BRANCH, GAMMA = torch.randn(B, T, C), torch.randn(B, T, C), torch.randn(C)
SCALE, ROWS = torch.tensor([1.5, 0.0, 2.0, 1.0]), torch.tensor([2, 0])


def fused_add(residual=X, branch=BRANCH, frozen=None, gamma=GAMMA, rows=None, inverse=None, num_learning=-1, row_scale=None,
         channel_dim=-1, gathers=False, next_rows=None, next_inverse=None, num_next_learning=-1, out=None):  # fmt: skip
    return OPS.native_fused_add(residual, branch, frozen, gamma, rows, inverse, num_learning, row_scale, 1.0, channel_dim, 0,
                           gathers, next_rows, next_inverse, num_next_learning, out)  # fmt: skip


def fused_add_backward(dout=X, dnext=None, dfrozen_next=None, branch=BRANCH, gamma=GAMMA, out=None, rows=None, inverse=None,
                  num_learning=-1, row_scale=None, channel_dim=-1, next_rows=None, next_inverse=None, num_next_learning=-1, batch_size=B,
                  gamma_dtype=torch.float32, dresidual=None, wants_residual=True):  # fmt: skip
    return OPS.native_fused_add_backward(dout, dnext, dfrozen_next, branch, gamma, out, rows, inverse, num_learning, row_scale, 1.0,
                                    channel_dim, int(out is not None), next_rows, next_inverse, num_next_learning, batch_size, False, wants_residual,
                                    torch.float32, None, gamma_dtype, dresidual)  # fmt: skip


STRIDED, TRANSPOSED = torch.randn(B, T, 2 * C)[:, :, ::2], torch.randn(B, C, T).transpose(1, 2)
BAD = {
    "int": (lambda: fused_add(residual=X.long()), "residual must be float32, float64, bfloat16 or float16, got Long"),
    "complex branch": (lambda: fused_add(branch=BRANCH.cfloat()), "branch must be float32"),
    "nothing": (lambda: fused_add(residual=None, branch=None, gamma=None), "no tensor arguments"),
    "no dimension": (lambda: fused_add(residual=torch.tensor(1.0)), "residual must have 1 to 16 dimensions, got 0"),
    "17 dimensions": (lambda: fused_add(residual=torch.ones([1] * 17)), "residual must have 1 to 16 dimensions, got 17"),
    "rank": (lambda: fused_add(branch=BRANCH[0]), r"branch must have shape \[4, 3, 5\], got \[3, 5\]"),
    "batch": (lambda: fused_add(branch=BRANCH[:3]), r"branch must have shape \[4, 3, 5\], got \[3, 3, 5\]"),
    "channels": (lambda: fused_add(branch=BRANCH[:, :, :4]), r"branch must have shape \[4, 3, 5\], got \[4, 3, 4\]"),
    "strided": (lambda: fused_add(residual=STRIDED), "residual must be contiguous"),
    "strided branch": (lambda: fused_add(branch=STRIDED), "branch must be contiguous"),
    "another order": (lambda: fused_add(branch=TRANSPOSED), "branch must be contiguous, or each of its samples in the order"),
    "expanded": (lambda: fused_add(branch=BRANCH[:, :1].expand(B, T, C)), "branch must be contiguous"),
    "γ's size": (lambda: fused_add(gamma=torch.ones(C + 1)), r"gamma must have shape \[5\], got \[6\]"),
    "γ's rank": (lambda: fused_add(gamma=torch.ones(1, C)), r"gamma must have shape \[5\], got \[1, 5\]"),
    "γ's stride": (lambda: fused_add(gamma=torch.ones(2 * C)[::2]), "gamma must be contiguous, got stride 2"),
    "batch as channels": (lambda: fused_add(channel_dim=0), "channel_dim must name a dimension of the residual behind its rows"),
    "no such channels": (lambda: fused_add(channel_dim=3), "channel_dim must name a dimension.*got 3 for 3 dimensions"),
    "far channels": (lambda: fused_add(channel_dim=-(2**62)), "channel_dim must name a dimension"),
    "scales": (lambda: fused_add(row_scale=SCALE[:3]), r"row_scale must have shape \[4\], got \[3\]"),
    "scales of rows": (lambda: fused_add(branch=BRANCH[:2], rows=ROWS, row_scale=SCALE), r"row_scale must have shape \[2\]"),
    "narrow scales": (lambda: fused_add(row_scale=SCALE.half()), "row_scale must be float32"),
    "wide scales": (lambda: fused_add(row_scale=SCALE.double()), "row_scale must be float32, or float64 where the residual is"),
    "too far": (lambda: fused_add(branch=BRANCH[:2], rows=torch.tensor([0, 4])), r"rows must be in \[0, 4\), got 4"),
    "negative": (lambda: fused_add(branch=BRANCH[:2], rows=torch.tensor([0, -1])), r"rows must be in \[0, 4\), got -1"),
    "very far": (lambda: fused_add(branch=BRANCH[:2], rows=torch.tensor([0, 2**62])), r"rows must be in \[0, 4\)"),
    "twice": (lambda: fused_add(branch=BRANCH[:2], rows=torch.tensor([1, 1])), "rows must not repeat a row, got 1 twice"),
    "int32": (lambda: fused_add(branch=BRANCH[:2], rows=ROWS.int()), "rows must be an int64 tensor.*got Int"),
    "2-d rows": (lambda: fused_add(branch=BRANCH[:2], rows=ROWS[None]), r"rows must be an int64 tensor.*shape \[1, 2\]"),
    "strided rows": (lambda: fused_add(branch=BRANCH[:2], rows=torch.tensor([0, 9, 2])[::2]), "rows must be contiguous"),
    "inverse": (lambda: fused_add(branch=BRANCH[:2], rows=ROWS, inverse=ROWS), "the inverse of rows must have 4 elements, got 2"),
    "inverse's dtype": (lambda: fused_add(branch=BRANCH[:2], rows=ROWS, inverse=SCALE), "the inverse of rows must be an int64"),
    "inverse alone": (lambda: fused_add(inverse=ROWS), "rows must be given where their inverse is"),
    "next inverse": (lambda: fused_add(gathers=True, next_rows=ROWS, next_inverse=ROWS), "the inverse of next_rows must have 4"),
    "backward's inverse": (lambda: fused_add_backward(branch=BRANCH[:2], rows=ROWS, inverse=ROWS), "the inverse of rows must have"),
    "learning": (lambda: fused_add(branch=BRANCH[:2], rows=ROWS, num_learning=3), "learning rows must be at most 2, got 3"),
    "frozen": (lambda: fused_add(branch=BRANCH[:1], frozen=BRANCH, rows=ROWS, num_learning=1), r"frozen must have shape \[1, 3"),
    "no frozen": (lambda: fused_add(branch=BRANCH[:1], rows=ROWS, num_learning=1), "frozen must be given where rows are frozen"),
    "next rows": (lambda: fused_add(gathers=True, next_rows=torch.tensor([7])), r"next_rows must be in \[0, 4\), got 7"),
    "γ alone": (lambda: fused_add(branch=None), "branch must be given where"),
    "out's shape": (lambda: fused_add(out=torch.empty(B, T, C + 1)), "out must have shape"),
    "out's dtype": (lambda: fused_add(out=torch.empty(B, T, C).half()), "out must have the dtype of the residual"),
    "out's strides": (lambda: fused_add(out=torch.empty(B, C, T).transpose(1, 2)), "out must be contiguous"),
    "no gradient": (lambda: fused_add_backward(dout=None), "dout, dnext or dfrozen_next must be given"),
    "its batch": (lambda: fused_add_backward(batch_size=3), r"dout must have shape \[3, 3, 5\], got \[4, 3, 5\]"),
    "negative batch": (lambda: fused_add_backward(batch_size=-1), "batch_size must be at least 0, got -1"),
    "dγ without branch": (lambda: fused_add_backward(branch=None), "branch must be given where the gradient of gamma"),
    "dnext": (lambda: fused_add_backward(dnext=X, next_rows=ROWS), r"dnext must have shape \[2, 3, 5\], got \[4, 3, 5\]"),
    "dnext's dtype": (lambda: fused_add_backward(dnext=X.half()), "must have the dtype of dout"),
    "dresidual": (lambda: fused_add_backward(dresidual=torch.empty(B)), "dresidual must have shape"),
    "dγ's dtype": (lambda: fused_add_backward(gamma_dtype=torch.int32), "gamma must be float32.*got Int"),
    "strided dout": (lambda: fused_add_backward(dout=STRIDED), "dout must be contiguous"),
    "gather, no rows": (lambda: OPS.native_gather_rows_backward(X, torch.tensor([0.0]), B), "rows must be an int64 tensor"),
    "gathered": (lambda: OPS.native_gather_rows_backward(X[:2], torch.tensor([3, 9]), B), r"rows must be in \[0, 4\)"),
    "a gradient for γ": (lambda: OPS.native_residual_add_backward(X, BRANCH), "gamma must be given where its gradient"),
    "a number's gradient": (lambda: OPS.native_residual_add_backward(torch.tensor(1.0)), "dout must have its rows"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_raise(name):
    """Without the public ops' checks too, nothing outside a tensor is read or written."""
    call, reason = BAD[name]
    with pytest.raises(RuntimeError, match=reason):
        call()


def test_a_library_of_another_version_is_not_used(monkeypatch):
    ops = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("rdp::native_")}
    assert {f"rdp::{name}" for name in library.NUM_ARGUMENTS} == ops
    for changed in ({"native_gather_rows": 3}, {"native_scatter_rows": 2}):
        monkeypatch.setattr(library, "NUM_ARGUMENTS", library.NUM_ARGUMENTS | changed)
        assert "was built from another version of this package; build it anew" in library._load()


def test_other_devices_raise():
    with pytest.raises(NotImplementedError):
        fused_add(residual=X.to("meta"), branch=BRANCH.to("meta"), gamma=None)
    with pytest.raises((RuntimeError, NotImplementedError)):
        fused_add(branch=BRANCH.to("meta"))


@pytest.mark.parametrize("shape", [(0,), (0, 3), (4, 0), (0, 0), (2, 0, 3), (2, 3, 0), (3, 1, 1, 0)])
def test_sizes_of_zero_are_valid(shape):
    x = torch.randn(shape)
    gamma = torch.randn(shape[1]) if len(shape) > 1 else None
    assert OPS.native_residual_add(x, x, gamma, None, None, 1.0, 1 if len(shape) > 1 else -1).shape == x.shape
    rows = torch.arange(shape[0])[:1]
    assert OPS.native_gather_rows(x, rows).shape == (len(rows), *shape[1:])
    assert OPS.native_gather_rows_backward(x[: len(rows)], rows, shape[0]).shape == x.shape
    if gamma is not None:
        _, dbranch, dgamma = OPS.native_residual_add_backward(x, x, gamma, channel_dim=1)
        assert dbranch.shape == x.shape
        assert torch.equal(dgamma, torch.zeros_like(gamma))


NONE = 2**40
"""The place of a sample without a row: any number out of range."""


@pytest.mark.parametrize("none", [2, -1, NONE, -(2**63)])
def test_a_given_inverse_is_read(none):
    """Places out of range mean no row. The list itself then gives the number of rows only."""
    inverse, elsewhere = torch.tensor([1, none, 0, none]), torch.tensor([3, 1])
    out, gathered, _ = fused_add(
        branch=BRANCH[:2], rows=elsewhere, inverse=inverse, gathers=True, next_rows=ROWS, next_inverse=inverse
    )
    expected = X.clone()
    expected[ROWS] += GAMMA * BRANCH[:2]
    torch.testing.assert_close(out, expected)
    assert torch.equal(gathered, out[ROWS])
    given = fused_add_backward(branch=BRANCH[:2], rows=elsewhere, inverse=inverse, dnext=X[:2], next_rows=elsewhere,
                               next_inverse=inverse)  # fmt: skip
    made = fused_add_backward(branch=BRANCH[:2], rows=ROWS, dnext=X[:2], next_rows=ROWS)
    for ours, theirs in zip(given, made, strict=True):
        assert ours is theirs is None or torch.equal(ours, theirs)


def test_any_inverse_stays_within_the_tensors():
    """Samples may share a row, and rows may be missing: nothing outside is touched, as sanitizers show."""
    for inverse in (torch.zeros(B, dtype=torch.int64), torch.full((B,), NONE), torch.tensor([-NONE, 1, 1, 2])):
        for num_learning in (0, 1, 2):
            parts = dict(branch=BRANCH[:num_learning], rows=ROWS, inverse=inverse, num_learning=num_learning)
            fused_add(frozen=BRANCH[num_learning:2], gathers=True, next_rows=ROWS, next_inverse=inverse, **parts)
            fused_add_backward(dnext=X[:2], next_rows=ROWS, next_inverse=inverse, **parts)


class _Ops(TorchDispatchMode):
    """Records the names of the ops that Python calls."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("options", [{}, {"row_scale": 2.0}, {"rows": ROWS}], ids=str)
def test_each_way_is_one_op(options):
    branch = BRANCH[: len(options["rows"])] if "rows" in options else BRANCH
    leaves = [t.clone().requires_grad_() for t in (X, branch, GAMMA)]
    with rdp.use_backend("native"), _Ops() as forward:
        out = rdp.residual_add(*leaves[:2], gamma=leaves[2], **options)
    with _Ops() as backward:
        torch.autograd.grad(out, leaves, X)
    assert forward.names == ["rdp::native_residual_add_rows" if "rows" in options else "rdp::native_residual_add"]
    assert backward.names == ["rdp::native_residual_add_backward"]


class TestDirect:
    """The direct way from the public ops to the library, and the calls that don't take it."""

    @pytest.mark.parametrize(
        "change",
        [
            pytest.param({"row_scale": torch.ones(B, requires_grad=True)}, id="row_scale learns"),
            pytest.param({"row_scale": float("nan")}, id="NaN"),
            pytest.param({"row_scale": float("inf")}, id="infinite"),
            pytest.param({"row_scale": True}, id="a bool"),
            pytest.param({"row_scale": "2"}, id="a string"),
            pytest.param({"activation": "gelu"}, id="activation"),
            pytest.param({"channel_dim": True}, id="channel_dim a bool"),
            pytest.param({"channel_dim": 0}, id="channel_dim"),
            pytest.param({"gamma": torch.ones(C, dtype=torch.int64)}, id="gamma of integers"),
            pytest.param({"gamma": [1.0] * C}, id="gamma a list"),
            pytest.param({"rows": torch.tensor([0, 1, 2, 4])}, id="rows too far"),
            pytest.param({"rows": [0, 1, 2, 3]}, id="rows a list"),
            pytest.param({"branch": BRANCH[:2]}, id="a short branch"),
            pytest.param({"branch": 1.0}, id="branch a number"),
            pytest.param({"residual": X.tolist()}, id="residual a list"),
            pytest.param({"residual": X.int()}, id="residual of integers"),
        ],
    )
    def test_the_errors_are_those_of_every_backend(self, change):
        arguments = {"residual": X, "branch": BRANCH, "gamma": GAMMA} | change
        said = []
        for backend in ("eager", "native"):
            with rdp.use_backend(backend), pytest.raises((TypeError, ValueError)) as caught:
                rdp.residual_add(arguments["residual"], arguments["branch"], **{
                    name: value for name, value in arguments.items() if name not in ("residual", "branch")
                })  # fmt: skip
            said.append((type(caught.value), str(caught.value)))
        assert said[0] == said[1]
        assert next(iter(change)) in said[0][1]

    def test_integers_are_numbers(self):
        with rdp.use_backend("native"):
            torch.testing.assert_close(rdp.residual_add(X, BRANCH, row_scale=2), X + 2 * BRANCH)

    def test_strided_tensors_are_copied(self):
        with rdp.use_backend("native"):
            out = rdp.residual_add(
                STRIDED, TRANSPOSED, gamma=torch.ones(2 * C)[::2], rows=torch.arange(2 * B)[::2] // 2
            )
        torch.testing.assert_close(out, STRIDED + TRANSPOSED)

    def test_a_gradient_in_another_layout(self):
        """The residual is in channels last and its gradient isn't, and the other way round."""
        for ours, theirs in (
            (torch.channels_last, torch.contiguous_format),
            (torch.contiguous_format, torch.channels_last),
        ):
            x = torch.randn(2, 3, 4, 5).contiguous(memory_format=ours).requires_grad_()
            branch, gamma = torch.randn_like(x).requires_grad_(), torch.rand(3, requires_grad=True)
            dout = torch.randn(2, 3, 4, 5).contiguous(memory_format=theirs)
            leaves = (x, branch, gamma)
            with rdp.use_backend("native"):
                out = rdp.residual_add(x, branch, gamma=gamma, channel_dim=1, activation="relu")
            actual = torch.autograd.grad(out, leaves, dout)
            expected = torch.autograd.grad((x + branch * gamma.view(3, 1, 1)).relu(), leaves, dout)
            torch.testing.assert_close(actual, expected)
            assert Layout.of(actual[1]) == Layout.of(x)


LARGE = {
    "items that begin within a sample": Case((9, 61, 203), rows=(8, 0, 3, 5), gamma=True),
    "rows dropped": Case((9, 61, 203), row_scale="tensor", gamma=True, activation="relu"),
    "images": Case((9, 37, 11, 19), row_scale="tensor", gamma=True, channel_dim=1),
    "wide images": Case((2, 3, 70000), row_scale=1 / 0.7, gamma=True, channel_dim=1),
    "wide rows": Case((3, 70001), row_scale="tensor", gamma=True),
    "without γ": Case((3, 7, 11003), row_scale="tensor"),
    "short samples": Case((30011, 3), gamma=True),
    "short samples apart": Case((30011, 3), layouts=("padded", "dense", "padded", "dense"), gamma=True),
    "16 bits": Case((9, 61, 203), ("bfloat16",) * 4, rows=(8, 0, 3, 5), gamma=True),
}


@pytest.mark.parametrize("name", LARGE)
def test_several_work_items(name):
    """A work item has 65,536 elements; the cases that hypothesis draws fit in one."""
    with rdp.use_backend("native"):
        check(LARGE[name], ops.residual_add)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("used", [("next",), ("frozen_next",), ("out", "next")])
def test_a_gradient_from_the_next_rows_alone(dtype, used):
    """Where that gradient is converted, its buffer stays in use: the branch is read after it, for dγ."""
    rows = dict(rows=(4, 0, 3), num_learning=2, next_rows=(1, 4, 3, 0), num_next_learning=3)
    case = Case((5, 2, 7), (dtype,) * 4, gamma=True, row_scale=1 / 0.7, gives_next=True, used=used, **rows)
    with rdp.use_backend("native"):
        check(case, ops.joint)


def test_a_gradient_without_rows_says_nothing_of_their_order():
    layouts = ("dense", "dense", "channels_last", "dense")
    case = Case((3, 2, 3, 2), layouts=layouts, gamma=True, gives_next=True, used=("next",), next_rows=())
    with rdp.use_backend("native"):
        check(case, ops.joint)


def test_any_number_of_threads_gives_the_same_bits():
    """Sums too, in both layouts; 8 threads on any machine."""
    torch.manual_seed(0)
    tokens, images = torch.randn(9, 61, 203), torch.randn(9, 37, 11, 17)
    found = []
    try:
        for threads in (1, 2, 8):
            torch.set_num_threads(threads)
            results = []
            for x, channel_dim in ((tokens, -1), (images, 1)):
                for dtype in (torch.float32, torch.bfloat16):
                    gamma = torch.linspace(0.5, 2, x.shape[channel_dim])
                    leaves = [t.to(dtype, copy=True).requires_grad_() for t in (x, x.flip(0), gamma)]
                    scale = torch.tensor([1.3, 0.0, 1.3, 1.3, 0.0, 1.3, 1.3, 1.3, 0.0])
                    with rdp.use_backend("native"):
                        out = rdp.residual_add(*leaves[:2], gamma=leaves[2], row_scale=scale, channel_dim=channel_dim)
                        results += [out, *torch.autograd.grad(out, leaves, torch.ones_like(out) / 3)]
            found.append(results)
    finally:
        torch.set_num_threads(1)
    for others in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], others, strict=True))


SCRIPT = """
import hashlib, torch, rdp_kernels as rdp
from rdp_kernels.kernels.native import library
assert library.unavailable() is None
torch.manual_seed(0)
digest = hashlib.sha256()

def told(*tensors):
    for t in tensors:
        digest.update(t.contiguous().view(torch.uint8).numpy().tobytes())

def drawn(shape):  # torch's own normal numbers depend on the instruction set
    return torch.randint(-9999, 9999, shape) / 3000

zeros = torch.zeros
with rdp.use_backend("native"):
    bits = torch.arange(-2**15, 2**15, dtype=torch.int32).to(torch.int16)
    for dtype in (torch.float16, torch.bfloat16):
        every = bits.view(dtype)
        wide = rdp.residual_add(zeros(2**16), every)  # to float32
        assert torch.equal(wide.nan_to_num(7), every.float().nan_to_num(7)), dtype
        same = rdp.residual_add(every, zeros(2**16))  # and back
        assert torch.equal(same.isnan(), every.isnan()), dtype
        assert torch.equal(same.float().nan_to_num(7), every.float().nan_to_num(7)), dtype
        told(wide.nan_to_num(7), same.float().nan_to_num(7))
        # every kind of float32: halfway between two of dtype, a little beside, below the normal ones, too large
        ends = torch.tensor([0, 1, 2**12 - 1, 2**12, 2**12 + 1, 2**13 - 1, 2**15 - 1, 2**15, 2**15 + 1, 2**16 - 1])
        numbers = ((bits.int()[:, None] << 16) | ends.int()[None]).flatten().view(torch.float32)
        numbers = torch.cat([numbers, torch.randint(-2**31, 2**31, (10**5,)).int().view(torch.float32)])
        ours = rdp.residual_add(zeros(len(numbers), dtype=dtype), numbers)
        torchs = numbers.to(dtype)
        assert torch.equal(ours.isnan(), torchs.isnan()), dtype
        assert torch.equal(ours.float().nan_to_num(7), torchs.float().nan_to_num(7)), dtype
        told(ours.float().nan_to_num(7))
    for shape, channel_dim in (((5, 7, 203), -1), ((5, 37, 3, 7), 1), ((5, 3000), -1)):
        for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
            x, branch, dout = (drawn(shape).to(dtype).requires_grad_() for _ in range(3))
            gamma = drawn((shape[channel_dim],)).to(dtype).requires_grad_()
            scale = torch.tensor([1.5, 0, 1.5, 1.5, 1.5])
            out = rdp.residual_add(x, branch, gamma=gamma, row_scale=scale, channel_dim=channel_dim, activation="relu")
            told(out.detach(), *torch.autograd.grad(out, (x, branch, gamma), dout))
print(digest.hexdigest())
"""


@pytest.mark.slow
def test_instruction_sets_give_the_same_bits():
    """Budget: 30 seconds. Every number of 16 bits, each way of rounding to one, and sums are those of torch, on this
    machine and as if it could do less. Torch's own variable sets that."""
    digests = {}
    for capability in ("default", "avx2", "avx512"):
        environment = os.environ | {"ATEN_CPU_CAPABILITY": capability, "OMP_NUM_THREADS": "1"}
        done = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        digests[capability] = done.stdout
    assert len(set(digests.values())) == 1, digests


FLOAT32, BFLOAT16, FLOAT64 = torch.float32, torch.bfloat16, torch.float64


class TestWhyNotOnGPUs:
    """The rule for CUDA kernels, which a machine without a GPU doesn't ask."""

    @pytest.fixture(autouse=True)
    def _built_for_this_gpu(self, monkeypatch):
        monkeypatch.setattr(support, "has_cuda", lambda: True)
        monkeypatch.setattr(support, "has_kernels_for", lambda device: True)

    @staticmethod
    def why_not(*dtypes, **others):
        return support.why_not_kind(torch.device("cuda", 0), Operands(*dtypes, **others))

    def test_without_cuda(self, monkeypatch):
        monkeypatch.setattr(support, "has_cuda", lambda: False)
        assert "built without CUDA" in self.why_not(FLOAT32)

    def test_another_architecture(self, monkeypatch):
        monkeypatch.setattr(support, "has_kernels_for", lambda device: False)
        assert "weren't built for cuda:0" in self.why_not(FLOAT32)

    @pytest.mark.parametrize(
        "served",
        [
            Operands(FLOAT32),
            Operands(FLOAT32, BFLOAT16, BFLOAT16, FLOAT32),
            Operands(BFLOAT16, BFLOAT16, gamma=FLOAT32),
            Operands(update=torch.float16),
            Operands(FLOAT32, FLOAT32, weight=FLOAT64),  # of the norm, which torch computes
        ],
    )
    def test_serves_unasked(self, served):
        assert self.why_not(*served) is None

    @pytest.mark.parametrize(
        ("refused", "reason"),
        [
            (Operands(FLOAT64), "float64"),
            (Operands(update=FLOAT64), "float64"),
            (Operands(FLOAT32, FLOAT32, gamma=FLOAT64), "float64"),
            (Operands(FLOAT32, BFLOAT16, FLOAT32), "frozen rows of the learning rows' dtype"),
            (Operands(BFLOAT16, FLOAT32), "a branch of the residual's dtype"),
            (Operands(torch.float16, BFLOAT16), "a branch of the residual's dtype"),
            (Operands(torch.int32), "not torch.int32"),
        ],
    )
    def test_refuses(self, refused, reason):
        assert reason in self.why_not(*refused)
