"""The op cases: every provider of an op is right and needs the stated bytes, and a wrong one is caught."""

import pytest
import torch

from benchmarks import op_bytes, op_cases, op_providers
from benchmarks.harness import CheckFailed
from benchmarks.kernel_traffic import count_traffic
from benchmarks.machine import Device
from benchmarks.op_bytes import Moved, count_bytes
from benchmarks.op_cases import CUDA, FULL, OPS, PASSES, TINY, Setting
from benchmarks.op_dense import ResidualAdd
from benchmarks.op_kinds import CPU
from benchmarks.op_providers import INTERPRETED
from benchmarks.op_sets import Sets, relative_error
from tests.conftest import DEVICE
from tests.traffic import needs_interpreter

SMALL_CACHE = Device(torch.device(DEVICE), "a device", cache_bytes=1 << 12)
ROWS = Setting(op_cases.ROWS, (6, 5, 32), 3)


@pytest.fixture(autouse=True)
def _traced_only(monkeypatch):
    """Compiled formulas are traced and then run eagerly, without inductor's half minute."""
    monkeypatch.setattr(op_providers, "COMPILER", "eager")


def cases_of(setting, passes=PASSES):
    return list(op_cases.op_cases(setting, SMALL_CACHE, passes, interpreted=True))


def id_of(setting):
    return "-".join(map(str, setting.labels.values()))


def test_without_compiled_nothing_is_compiled(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda *_, **__: pytest.fail("it was compiled"))
    (case,) = op_cases.op_cases(ROWS, SMALL_CACHE, ["forward"], compiled=False)
    names = [provider.name for provider in case.providers]
    assert {"eager", "ours eager", "ours triton", "ours native"} <= set(names)
    assert not any("compile" in name for name in names)


@pytest.mark.parametrize("setting", TINY, ids=id_of)
def test_all_providers_are_right_time_and_again(setting):
    """In each pass, on each set of inputs, and without a change to any input."""
    for case in cases_of(setting):
        names = [provider.name for provider in case.available]
        ours = ["eager", OPS[setting.op].compiled, "ours eager", "ours triton", "ours native"]
        drops = setting.op == op_cases.DENSE and setting.kept is not None
        assert names == ours + ["timm", "torchvision"] * drops
        before = [t.clone() for t in case.providers[0].capture.kept]
        for _ in range(2):
            assert case.verify().passed
            case.warm_up()
        assert all(torch.equal(a, b) for a, b in zip(before, case.providers[0].capture.kept, strict=True))
        assert all(provider.needed_bytes == case.providers[0].needed_bytes for provider in case.available)


def test_every_op_is_among_the_tiny_cases_and_the_listed_shapes_are_there():
    assert {setting.op for setting in TINY} == set(OPS) == {setting.op for setting in CUDA}
    assert {setting.op for setting in FULL} == set(OPS) - {op_cases.RELU}
    assert Setting(op_cases.ROWS, (48, 257, 1536), 28, torch.float16) in CUDA
    assert Setting(op_cases.ROWS, (48, 1, 394752), 28, torch.float16) in CUDA
    assert op_cases.settings("cuda", ops=[op_cases.RELU]) == [s for s in CUDA if s.op == op_cases.RELU]
    assert op_cases.settings("cpu") == list(FULL)
    assert op_cases.settings("cuda", "tiny") == op_cases.settings("cpu", "tiny") == list(TINY)


# Bytes

ROW = 5 * 32 * 4  # of TINY in float32; 6 samples
SAMPLE = 8 * 3 * 5 * 4
NEEDED = {
    (op_cases.DENSE, None): (6 + 6 + 6, 0),
    (op_cases.DENSE, 4): (6 + 4 + 6, 4 + 4 + 6),  # bfloat16: rows of half the size
    (op_cases.DENSE, 2): (4 + 2 + 4, 2 + 2 + 4),
    (op_cases.RELU, 2): (4 + 2 + 4, 4 + 4 + 2 + 4 + 4),  # dout, out, branch; dresidual, dbranch
    (op_cases.ROWS, 3): (6 + 3 + 6, 3 + 3 + 3),
    (op_cases.GATHER, 3): (3 + 3, 3 + 6),
    # gather; residual, branch, sum | add: dout, branch, dbranch; gather: dout, dnext, dresidual
    (op_cases.PATH, 3): (6 + (6 + 3 + 6), 9 + (6 + 3 + 6)),
    (op_cases.NORM, 4): (6 + 4 + 6 + 6, 6 + 6 + 6 + 4 + 6 + 6),  # dout, dnext, the sum, branch; dresidual, dbranch
    (op_cases.RMS, None): (6 + 6 + 6 + 6, 6 + 6 + 6 + 6),  # dout, dnext, the sum; one gradient for residual and branch
    (op_cases.NORM_ROWS, 3): (6 + 3 + 6 + 3, 6 + 3 + 3 + 6 + 3),
}


@pytest.mark.parametrize("setting", [s for s in TINY if s.op != op_cases.CHAIN], ids=id_of)
def test_needed_bytes_are_those_of_a_hand_computation(setting):
    size = SAMPLE if len(setting.shape) == 4 else ROW * setting.dtype.itemsize // 4
    op = OPS[setting.op](setting)
    assert op.needed.times(op.sample_bytes) == Moved(*(n * size for n in NEEDED[setting.op, setting.kept]))
    by_pass = {case.labels["pass"]: case.providers[0].needed_bytes for case in cases_of(setting)}
    assert by_pass["both"] == by_pass["forward"] + by_pass["backward"] == sum(op.needed) * size


def test_needed_bytes_of_a_chain():
    rows = [[0, 1], [1, 2, 3], [0, 5]]
    forward = 2 + 2  # gather
    forward += (6 + 2 + 6) + 3  # residual, branch, sum; next
    forward += (5 + 3 + 3) + 2  # rows 1 2 3 and 0 5, branch, rows 1 2 3; next
    forward += 2 + 2 + 2  # rows, branch, rows
    backward = 2 + 2 + 2  # dout, branch, dbranch
    backward += (6 + 2 + 6) + 3 + 3  # dout, dnext, a gradient of its own; branch, dbranch
    backward += (4 + 3 + 3) + 2 + 2  # rows 0 1 and 1 2 3, dnext, rows 1 2 3; branch, dbranch
    backward += 2 + 2 + 2  # rows, dnext, rows
    assert op_bytes.chain(6, rows, gamma=True) == Moved(forward, backward)
    assert op_bytes.chain(6, rows, gamma=False) == Moved(forward, backward - 7)
    assert op_bytes.chain(6, rows[:1], gamma=True) == Moved(4 + 14, 6 + 14)


@needs_interpreter
@pytest.mark.parametrize("setting", TINY, ids=id_of)
def test_the_kernels_move_the_needed_bytes(setting):
    """Bytes counted by the interpreter; extra bytes are known."""
    op = OPS[setting.op](setting)
    sets = Sets(op, 1)
    ours = op_providers.Runner(op_providers.on_backend("triton", op.ours), sets)
    for direction in ("forward", "backward"):
        ours.run("backward", 0)
        with count_traffic() as counted:
            ours.run(direction, 0)
        moved = sum(accesses.bytes for accesses in counted.big) // op.sample_bytes
        besides = 0
        if setting.op == op_cases.NORM_ROWS and direction == "forward":  # a copy of the norm's input, for the backward
            besides = op.kept
        if setting.kept is None and direction == "backward" and op.norm:  # dbranch is written in addition
            besides = op.batch
        assert moved == op.needed.by(direction) + besides, direction


def test_an_eager_fused_add_takes_7_passes_forward_and_8_backward():
    setting = Setting(op_cases.DENSE, (8, 4, 4096), 4)
    eager = op_providers.Runner(ResidualAdd(setting).eager, Sets(ResidualAdd(setting), 1))
    tensor = 8 * 4 * 4096 * 4
    assert eager.count_bytes() == pytest.approx((7 * tensor, 8 * tensor), rel=0.04)  # γ and mask, 3 % of it here


def test_the_eager_chain_is_in_place_like_ours():
    """Each path gathers its rows and multiplies them by γ; the first add copies, and later ones touch only their
    rows."""
    op = OPS[op_cases.CHAIN](Setting(op_cases.CHAIN, (8, 4, 512), 4))
    moved = op_providers.Runner(op.eager, Sets(op, 1)).count_bytes()
    rows = 3 * (2 * 4 + 2 * 4 + 3 * 4) + 2 * 8
    assert moved.forward / op.sample_bytes == pytest.approx(rows, rel=0.05)  # γ
    op = OPS[op_cases.PATH](Setting(op_cases.PATH, (8, 4, 512), 4))
    moved = op_providers.Runner(op.eager, Sets(op, 1)).count_bytes()
    assert moved.forward / op.sample_bytes == pytest.approx(2 * 4 + 2 * 4 + 3 * 4 + 2 * 8, rel=0.05)


def test_bytes_of_eager_ops():
    x, rows, source = torch.randn(8, 4), torch.tensor([1, 2]), torch.randn(2, 4)
    row = 16

    def moves(run):
        return count_bytes(run) / row

    assert moves(lambda: x + x) == 8 + 8, "read once"
    assert moves(lambda: x.add_(1)) == 8 + 8
    assert moves(lambda: x.view(4, 8)[1:].t()) == moves(lambda: torch.empty_like(x)) == 0
    assert moves(lambda: x.new_zeros(8, 4)) == moves(lambda: x.zero_()) == 8
    assert moves(lambda: x[:1].expand(8, 4) + x) == 1 + 8 + 8
    assert moves(lambda: x.clone()) == moves(lambda: x.copy_(torch.empty(8, 4))) == 8 + 8
    assert moves(lambda: x.index_select(0, rows)) == 2 + 2
    assert moves(lambda: x.index_add(0, rows, source)) == 8 + 8 + 3 * 2
    assert moves(lambda: x.index_add_(0, rows, source, alpha=2.0)) == 3 * 2


@pytest.mark.parametrize(
    ("moved", "wanted"),
    [
        (op_bytes.compiled_some_rows(6, 3, True), (6 + 6 + 9, 3 + 3 + 3)),
        (op_bytes.compiled_gather(6, 3), (3 + 3, 6 + 9)),
        (
            op_bytes.compiled_chain(6, [[0], [1, 2]], False),
            ((2 + 3) + (4 + 6) + 12, (2 + 6 + 3 + 18) + (4 + 6 + 6 + 18)),
        ),
        (op_bytes.compiled_norm_rows(6, 3, 2, False), ((6 + 6 + 9) + (2 + 2), 6 + 6 + (6 + 6) + 18)),
    ],
)
def test_bytes_of_compiled_formulas(moved, wanted):
    assert tuple(moved) == wanted


# Errors


def test_a_wrong_provider_is_caught_before_it_is_timed(monkeypatch):
    right = OPS[op_cases.ROWS].ours
    monkeypatch.setattr(OPS[op_cases.ROWS], "ours", lambda self, x, f, g: right(self, x, f.clone().flip(0), g))
    for case in cases_of(ROWS):
        with pytest.raises(CheckFailed, match="'ours eager' differs from the float64 reference by .*, its bound is"):
            case.verify()


def test_one_wrong_gradient_is_caught(monkeypatch):
    class DroppedRow(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.view_as(x)

        @staticmethod
        def backward(ctx, dx):
            return torch.cat([dx[:-1], torch.zeros_like(dx[-1:])])

    right = OPS[op_cases.ROWS].ours
    monkeypatch.setattr(OPS[op_cases.ROWS], "ours", lambda self, x, f, g: right(self, x, DroppedRow.apply(f), g))
    forward, backward, both = cases_of(ROWS)
    assert forward.verify().passed
    for case in (backward, both):
        with pytest.raises(CheckFailed, match="'ours eager' differs"):
            case.verify()


def test_one_that_raises_is_caught(monkeypatch):
    def raises(*_):
        raise RuntimeError("out of resources\nand much more\nof it")

    monkeypatch.setattr(OPS[op_cases.ROWS], "ours", raises)
    with pytest.raises(CheckFailed, match="'ours eager' raises RuntimeError: out of resources and much more$"):
        cases_of(ROWS)[0].verify()


def test_checks_are_of_the_worst_tensor():
    wanted = torch.tensor([1.0, -4.0])
    assert relative_error(torch.tensor([1.0, -4.2]), wanted) == pytest.approx(0.05)
    assert relative_error(torch.ones(0), torch.ones(0)) == 0
    op = ResidualAdd(Setting(op_cases.DENSE, (6, 5, 32), 4))
    sets = Sets(op, 1)
    right = sets.wanted["both"]
    assert sets.check("both", right).error == 0
    assert sets.check("both", right[:-1]).error == float("inf")
    assert not sets.check("forward", right).passed
    for place in range(len(right)):
        for wrong in (torch.nan, torch.inf, right[place].abs().max().item() * 1e-5):
            results = [t.clone() for t in right]
            results[place].view(-1)[-1] += wrong
            check = sets.check("both", tuple(results))
            assert not check.passed
            assert check.bound == pytest.approx(4 * 2**-23 + 2**-23 * 30**0.5)


def test_only_others_may_sum_in_the_dtype_of_the_residual():
    op = OPS[op_cases.NORM](Setting(op_cases.NORM, (6, 5, 32), 4, torch.bfloat16))
    sets = Sets(op, 1)
    out, normed, *grads = sets.wanted["both"]
    *streams, weight, bias, gamma = grads
    rough = (out, normed, *streams, weight * 1.04, bias, gamma)
    assert sets.check("both", rough).passed
    assert not sets.check("both", rough, ours=True).passed
    assert not sets.check("both", (out * 1.04, *rough[1:])).passed


def test_an_unavailable_provider_says_why(monkeypatch):
    (case,) = op_cases.op_cases(ROWS, Device(CPU, "a CPU", 1 << 12), ["both"])
    assert {p.name: p.unavailable for p in case.providers if p.unavailable} == {
        "ours triton": INTERPRETED,
        "xformers": "xformers is not installed",
    }
    monkeypatch.setattr(op_providers, "COMPILER", "no such compiler")
    monkeypatch.setattr(op_providers.rdp, "available_backends", lambda: {"triton": "it has gone"})
    (case,) = cases_of(ROWS, ["both"])
    reasons = {p.name: p.unavailable for p in case.providers if p.unavailable}
    assert "no such compiler" in reasons["compiled index_add"]
    assert reasons["ours triton"] == "it has gone"


# Inputs


def test_no_provider_finds_its_inputs_in_the_cache():
    op = ResidualAdd(Setting(op_cases.DENSE, (6, 5, 32), 4))
    reads = int(op.needed.forward) * op.sample_bytes // 2
    (case, *_) = op_cases.op_cases(op.setting, Device(CPU, "a CPU", cache_bytes=3 * reads))
    capture = case.providers[0].capture
    assert len(capture.runs) == 7
    sets = Sets(op, 3)
    assert [sets.next() for _ in range(7)] == [0, 1, 2, 0, 1, 2, 0], "providers share the sets"
    assert len({sets.inputs[n][0].sum().item() for n in range(3)}) == 3
    (case, *_) = op_cases.op_cases(op.setting, Device(CPU, "a CPU", cache_bytes=1 << 30))
    assert len(case.providers[0].capture.runs) == op_cases.MAX_SETS
