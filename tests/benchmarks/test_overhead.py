"""`python -m benchmarks overhead`: its output, the check of every provider, and times per call."""

import csv
import json

import pytest
import torch

import rdp_kernels as rdp
from benchmarks import op_providers, overhead
from benchmarks.__main__ import main
from benchmarks.harness import CheckFailed, Session
from benchmarks.overhead import CALLS, PASSES, DropPathAdd, HostDevice, ResidualAdd, overhead_cases
from rdp_kernels.kernels import dispatch

CPU = torch.device("cpu")
KINDS = pytest.mark.parametrize("kind", CALLS, ids=lambda kind: kind.name)


def op_of(kind):
    return next(op for op in overhead.ops(CPU) if type(op) is kind)


def failures(kind):
    """The result of the case's check, by pass."""
    found = {}
    for case in overhead_cases(op_of(kind), 1):
        try:
            case.verify()
        except CheckFailed as error:
            found[case.labels["pass"]] = str(error)
    return found


@pytest.fixture
def two_threads():
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


def test_on_a_gpu_a_library_without_cuda_is_left_out(monkeypatch):
    """The case's other providers are still measured."""
    monkeypatch.setattr(op_providers, "has_cuda", lambda: False)
    monkeypatch.setattr(rdp, "available_backends", lambda: {"native": None})
    assert op_providers.why_no_native(torch.device("cuda")) == "the compiled library was built without CUDA"
    assert op_providers.why_no_native(CPU) is None


# The command


def test_prints_and_writes_the_same_rows(two_threads, tmp_path, capsys):
    paths = [tmp_path / "overhead.csv", tmp_path / "overhead.json"]
    assert main(["overhead", "--tiny", "--turns", "2", "--csv", str(paths[0]), "--json", str(paths[1])]) == 0
    rows = json.loads(paths[1].read_text())
    as_text = [{key: "" if value is None else str(value) for key, value in row.items()} for row in rows]
    assert as_text == list(csv.DictReader(paths[0].read_text().splitlines()))
    assert len(rows) == 2 * len(PASSES) * (len(CALLS) * 4 + 1)
    assert {row["op"] for row in rows} == {kind.name for kind in CALLS}
    assert {(row["unit"], row["threads"]) for row in rows} == {("call", 1)}
    assert not any(word in key for key in rows[0] for word in ("flop", "gb", "_ms"))
    for row in rows:
        if row["unavailable"]:
            assert (row["turns"], row["p50_us"], row["ratio_rounds"]) == (0, None, None)
        else:
            assert row["turns"] == 2
            assert 0 < row["min_us"] <= row["p50_us"]
    assert all(row["ratio_rounds"] == row["ratio_min"] == 1 for row in rows if row["provider"] == "eager")
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 100
    assert "residual_add 2x2 float32, 1 of 2, γ" in printed
    assert "gather_rows 8x16x32 float32, 4 of 8" in printed
    assert "no ours triton: on the CPU only Triton's interpreter runs the kernels" in printed.replace("\n", " ")
    assert "target" not in printed, "so few calls are no verdict"


def test_ends_with_the_verdicts(monkeypatch, capsys):
    monkeypatch.setattr(overhead, "CALLS", {ResidualAdd: CALLS[ResidualAdd]})
    monkeypatch.setitem(overhead.CALLS_A_TURN, "full", 1)
    assert main(["overhead", "--turns", "1"]) == 0
    assert [line.partition(",")[0] for line in capsys.readouterr().out.splitlines()[-2:]] == ["residual_add 2x2"] * 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")
def test_without_a_gpu_it_says_so(capsys):
    assert main(["overhead", "--device", "cuda"]) == 2
    assert "--device cuda: this machine, or this torch, has no cuda device" in capsys.readouterr().err


@pytest.mark.gpu
def test_on_a_gpu_triton_is_timed(tmp_path):
    out = tmp_path / "overhead.json"
    assert main(["overhead", "--tiny", "--device", "cuda", "--json", str(out)]) == 0
    assert all(not row["unavailable"] for row in json.loads(out.read_text()) if row["provider"] == "ours triton")


# Checks


@KINDS
def test_every_way_is_right(kind):
    assert failures(kind) == {}


@KINDS
@pytest.mark.parametrize(("which", "name"), [(0, "'eager'"), (1, "'ours eager'")])
def test_a_wrong_result_is_caught(kind, which, name, monkeypatch):
    def wrong(op, *inputs):
        calls = list(right(op, *inputs))
        call = calls[which]
        calls[which] = lambda: 1.001 * call()
        return calls

    right = CALLS[kind]
    monkeypatch.setitem(CALLS, kind, wrong)
    found = failures(kind)
    assert set(found) == set(PASSES)
    assert all(f"{name} differs from the float64 reference" in message for message in found.values())


@KINDS
@pytest.mark.parametrize("which", [0, 1])
def test_a_wrong_gradient_is_caught(kind, which, monkeypatch):
    def wrong(op, *inputs):
        calls = list(right(op, *inputs))
        call, last = calls[which], inputs[-1]
        calls[which] = lambda: call() + 0.001 * (last - last.detach()).sum()
        return calls

    right = CALLS[kind]
    monkeypatch.setitem(CALLS, kind, wrong)
    assert set(failures(kind)) == {"both"}


@pytest.mark.skipif(rdp.available_backends()["native"] is not None, reason="the compiled library is not built")
def test_each_backend_is_checked(monkeypatch):
    right = rdp.residual_add

    def wrong_natively(*args, **kwargs):
        out = right(*args, **kwargs)
        return out * 1.001 if dispatch.choice() == "native" else out

    monkeypatch.setattr(rdp, "residual_add", wrong_natively)
    assert all("'ours native' differs" in message for message in failures(ResidualAdd).values())
    assert len(failures(ResidualAdd)) == len(PASSES)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_draws_that_are_all_alike_are_caught(share, monkeypatch):
    monkeypatch.setattr(
        rdp, "drop_path_add", lambda residual, branch, p, training, gamma: residual + share * 2 * branch * gamma
    )
    found = failures(DropPathAdd)
    assert set(found) == set(PASSES)
    assert all("'ours eager' differs from the float64 reference by inf" in message for message in found.values())


def test_a_wrong_provider_is_not_timed_and_others_are(monkeypatch, tmp_path, capsys):
    right = rdp.gather_rows
    monkeypatch.setattr(rdp, "gather_rows", lambda *args: 2 * right(*args))
    out = tmp_path / "overhead.json"
    assert main(["overhead", "--tiny", "--turns", "1", "--json", str(out)]) == 1
    assert capsys.readouterr().err.count("not timed: op gather_rows") == 2 * len(PASSES)
    assert {row["op"] for row in json.loads(out.read_text())} == {kind.name for kind in CALLS} - {"gather_rows"}


# Times


class Clock:
    """A clock that advances only during calls."""

    seconds = 0.0

    def __call__(self):
        return self.seconds

    def slowed(self, call, seconds):
        def slow(*_):
            self.seconds += seconds
            return call()

        return slow


@pytest.mark.parametrize("calls", [1, 7])
def test_times_are_those_of_a_call(calls, monkeypatch):
    clock, right = Clock(), CALLS[ResidualAdd]

    def slowed(op, *inputs):
        eager, ours = right(op, *inputs)
        return clock.slowed(eager, 8e-6), clock.slowed(ours, 2e-6)

    monkeypatch.setitem(CALLS, ResidualAdd, slowed)
    session = Session(HostDevice(CPU, "a CPU", 1, clock), turns=3, flops=False)
    for case in overhead_cases(op_of(ResidualAdd), calls):
        session.measure(case)
    rows = [overhead.per_call(row) for row in session.rows]
    for row in rows:
        if not row["unavailable"]:
            wanted = {"eager": 8.0, "torch.add": 0.0}.get(row["provider"], 2.0)
            assert [row[f"{name}_us"] for name in ("min", "p20", "p50", "p80")] == pytest.approx([wanted] * 4)
            assert [row["ratio_rounds"], row["ratio_min"]] == pytest.approx([wanted / 8] * 2)


def test_on_a_gpu_the_clock_stops_when_the_host_is_done(monkeypatch):
    happened, clock = [], Clock()
    monkeypatch.setattr(torch.cuda, "synchronize", clock.slowed(lambda: happened.append("wait"), 1.0))
    issue = clock.slowed(lambda: happened.append("issue"), 0.25)
    assert HostDevice(torch.device("cuda"), "a GPU", 1, clock).milliseconds(issue) == 250
    assert happened == ["wait", "issue", "wait"]


def test_a_pass_runs_the_right_calls(monkeypatch):
    seen, entered, right, enter = [], [], CALLS[ResidualAdd], rdp.use_backend

    def watched(op, *inputs):
        eager, ours = right(op, *inputs)

        def watching():
            seen.append((torch.is_grad_enabled(), dispatch.choice()))
            return ours()

        return eager, watching

    def counted(name):
        entered.append(name)
        return enter(name)

    monkeypatch.setitem(CALLS, ResidualAdd, watched)
    monkeypatch.setattr(rdp, "use_backend", counted)
    for case in overhead_cases(op_of(ResidualAdd), 4):
        ours = next(provider for provider in case.providers if provider.name == "ours eager")
        seen.clear()
        entered.clear()
        ours.run(0)
        assert seen == [(case.labels["pass"] != "no grad", "eager")] * 4
        assert entered == ["eager"], "once a block: entering costs time"


# Verdicts


def row_of(direction, provider="ours native", op="residual_add", shape="2x2", unavailable="", **more):
    row = {"op": op, "shape": shape, "provider": provider, "pass": direction, "unavailable": unavailable}
    return row | {"ratio_rounds": 9.0, "ratio_min": 9.0, "p50_us": 9.0, "min_us": 9.0} | more


OTHERS = [
    row_of(direction, provider, op, shape)
    for direction in PASSES
    for provider, op, shape in (
        ("eager", "residual_add", "2x2"),
        ("ours eager", "residual_add", "2x2"),
        ("ours native", "residual_add rows", "2x2"),
        ("ours native", "residual_add", "8x16x32"),
    )
]


@pytest.mark.parametrize(
    ("ratio", "microseconds", "verdicts"), [(1.0, 4.0, ("met", "met")), (1.01, 4.01, ("MISSED", "MISSED"))]
)
def test_verdicts(ratio, microseconds, verdicts):
    both = row_of("both", ratio_rounds=ratio, ratio_min=0.9)
    no_grad = row_of("no grad", p50_us=microseconds, min_us=3.5)
    assert list(overhead.verdicts_of([*OTHERS, both, row_of("forward"), no_grad])) == [
        f"residual_add 2x2, forward and backward: {ratio:.2f} (min 0.90) of eager, target 1 of eager: {verdicts[0]}",
        f"residual_add 2x2, a forward without gradients: {microseconds:.2f} (min 3.50) µs, target 4 µs: {verdicts[1]}",
    ]


def test_without_the_compiled_library_the_goals_are_missed():
    missing = [row_of(direction, unavailable="it was not built", p50_us=None, min_us=None) for direction in PASSES]
    first, second = overhead.verdicts_of([*OTHERS, *missing])
    assert first == "residual_add 2x2, forward and backward: not measured, target 1 of eager: MISSED"
    assert second == "residual_add 2x2, a forward without gradients: not measured, target 4 µs: MISSED"
