"""The harness with providers that do nothing: checks before timing, their order, and the fields of a row."""

import math
from dataclasses import replace

import pytest
import torch

from benchmarks import harness, machine
from benchmarks.harness import SUMMARY, Case, Check, CheckFailed, Provider, Session, summary, told, turn_order
from benchmarks.machine import Ceilings, Device

FIELDS = {
    *("device", "threads", "torch", "triton", "python", "commit", "date", "ceiling_gflops", "ceiling_gbs", "unit"),
    *("provider", "turns", "min_ms", "p20_ms", "p50_ms", "p80_ms", "ratio_p50", "ratio_min", "ratio_rounds"),
    *("needed_gflop", "counted_gflop", "needed_gb", "needed_ratio", "counted_ratio", "flop_share", "byte_share"),
    "unavailable",
}


class FakeClock:
    """A clock that advances only when a provider says so."""

    now = 0.0

    def __call__(self) -> float:
        return self.now

    def passes(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock():
    return FakeClock()


@pytest.fixture
def session(clock, monkeypatch):
    monkeypatch.setattr(Device, "ceilings", lambda self: Ceilings(flops=100e9, bytes=10e9))

    def session(turns, **options):
        return Session(Device(torch.device("cpu"), "a device", 1 << 20, clock), turns, **options)

    return session


def provider(name, run=lambda turn: None, error=0.0, **needed):
    return Provider(name, run, lambda: Check(error, 1e-10), **needed)


def case_of(*providers):
    return Case({"model": "m", "p": 0.5}, "turn", providers[0].name, list(providers))


@pytest.mark.parametrize("error", [2e-10, math.inf, math.nan])
def test_a_provider_that_fails_its_check_is_never_run(error, session):
    ran = []
    right = provider("right", ran.append)
    wrong = provider("wrong", ran.append, error)
    with pytest.raises(CheckFailed, match=rf"model m, p 0.5: 'wrong' .* by {error:.1e}, its bound is 1.0e-10"):
        session(3).measure(case_of(right, wrong))
    assert not ran


def test_a_provider_that_raises_in_its_check_is_never_run(session):
    ran = []

    def raises():
        raise ValueError("first line\n\n  second\nthird")

    with pytest.raises(CheckFailed, match="model m, p 0.5: 'wrong' raises ValueError: first line second$"):
        session(3).measure(case_of(provider("right", ran.append), Provider("wrong", ran.append, raises)))
    assert not ran


def test_without_flops_nothing_is_counted_but_everything_warmed_up(session, clock, monkeypatch):
    ran = []
    monkeypatch.setattr(Device, "copy_rate", lambda self: 10e9)

    def run(turn):
        ran.append(turn)
        clock.passes(0.2)

    running = session(2, flops=False)
    running.measure(case_of(provider("A", run, needed_bytes=1e9), provider("B", run)))
    assert ran == [0, 0, 0, 0, 1, 1], "each provider warms up, and has two turns"
    a, b = running.rows
    assert a["counted_gflop"] is a["flop_share"] is a["counted_ratio"] is None
    assert a["ceiling_gbs"] == 10
    assert a["byte_share"] == pytest.approx(1 / 0.2 / 10)
    assert b["byte_share"] is None


def test_more_columns(session, clock):
    def run(turn):
        clock.passes(0.1)

    case = case_of(
        provider("A", run, columns={"moved": 3}), provider("B", run), Provider.missing("C", "no such device")
    )
    asked = []
    running = session(2, more=lambda provider: asked.append((provider.name, clock.now)) or {"alone": provider.name})
    running.measure(case)
    assert [(row.get("moved"), row.get("alone")) for row in running.rows] == [(3, "A"), (None, "B"), (None, None)]
    assert [name for name, _ in asked] == ["A", "B"]
    assert min(now for _, now in asked) == pytest.approx(0.6), "after the rounds"


def test_an_exception_in_one_line():
    assert told(ValueError("wrong")) == "ValueError: wrong"
    assert told(KeyboardInterrupt()) == "KeyboardInterrupt"


def test_more_flops_than_needed_fail_before_timing(session):
    a = torch.randn(4, 4)
    honest = provider("honest", lambda turn: a @ a, needed_flop=128, minimal=True)
    assert case_of(honest).count_flop(2) == {"honest": 128}
    wasteful = provider("wasteful", lambda turn: a @ a @ a, needed_flop=128, minimal=True)
    running = session(2)
    with pytest.raises(CheckFailed, match="'wasteful' does 256 FLOPs, it needs 128"):
        running.measure(case_of(wasteful))
    assert running.rows == []


def test_on_a_gpu_other_flops_are_reported_and_the_case_is_measured(monkeypatch, capsys):
    """A GPU's attention kernels count FLOPs differently from the matmuls that needed FLOPs consist of."""
    a = torch.randn(4, 4)
    wasteful = provider("wasteful", lambda turn: a @ a @ a, needed_flop=128, minimal=True)
    assert case_of(wasteful).count_flop(1, torch.device("cuda")) == {"wasteful": 256}
    assert "warning: model m, p 0.5: 'wasteful' does 256 FLOPs, it needs 128" in capsys.readouterr().err


def test_flops_that_change_are_averaged_over_the_turns():
    a = torch.randn(4, 4)
    changing = provider("changing", lambda turn: [a @ a for _ in range(turn)], needed_flop=128, minimal=True)
    assert case_of(changing).count_flop(3) == {"changing": 128}
    with pytest.raises(CheckFailed, match="'changing' does 64 FLOPs, it needs 128"):
        case_of(replace(changing, period=2)).count_flop(3)
    ran = []
    steady = provider("steady", lambda turn: (a @ a, ran.append(turn)), needed_flop=128, minimal=True, period=1)
    assert case_of(steady).count_flop(3) == {"steady": 128}
    assert ran == [0]


def test_a_compiled_provider_is_run_once_and_not_counted():
    ran = []
    compiled = provider("compiled", ran.append, compiled=True)
    assert case_of(compiled).count_flop(3) == {}
    assert ran == [0]


def test_providers_take_turns_in_changing_order(session, clock):
    ran, rounds = [], []

    def take(name, turn):
        ran.append((name, turn))
        clock.passes(1)

    providers = [provider(name, lambda turn, name=name: take(name, turn)) for name in "ABC"]
    running = session(4, on_round=lambda: rounds.append(len(ran)))
    running.measure(case_of(*providers))
    counted, timed = ran[:3], ran[3:]
    assert counted == [("A", 0), ("B", 0), ("C", 0)]
    assert rounds == [6, 9, 12, 15]
    for turn, a_round in enumerate(zip(*[iter(timed)] * 3, strict=True)):
        assert sorted(a_round) == [(name, turn) for name in "ABC"]


def test_no_provider_is_always_first_or_behind_the_same_one():
    providers = [provider(name) for name in "ABC"]
    orders = ["".join(p.name for p in turn_order(providers, turn)) for turn in range(6)]
    assert orders == ["ABC", "ACB", "CAB", "CBA", "BCA", "BAC"]


def test_summary_is_that_of_a_hand_computation():
    got = summary([4.0, 1.0, 3.0, 2.0, 10.0], [2.0, 1.0, 1.0, 4.0, 5.0])
    # sorted: 1 2 3 4 10; the p-quantile lies at position 4p: 0.8, 2, 3.2. Ratios of rounds: 2, 1, 3, 0.5, 2.
    wanted = [1.0, 1.8, 3.0, 5.2, 3.0 / 2.0, 1.0, 2.0]
    assert list(got) == list(SUMMARY)
    assert list(got.values()) == pytest.approx(wanted)


def test_rows_have_every_field_and_the_clocks_times(session, clock):
    base = provider("base", lambda turn: clock.passes(0.2), needed_flop=8e9, needed_bytes=1e9)
    fast = provider("fast", lambda turn: clock.passes(0.05), needed_flop=2e9)
    running = session(3)
    running.measure(case_of(base, fast, Provider.missing("absent", "no such device")))
    rows = {row["provider"]: row for row in running.rows}
    assert list(rows) == ["base", "fast", "absent"]
    assert all(row.keys() == FIELDS | {"model", "p"} for row in rows.values())
    fast, absent = rows["fast"], rows["absent"]
    assert (fast["device"], fast["model"], fast["unit"], fast["turns"]) == ("a device", "m", "turn", 3)
    assert [fast["p50_ms"], fast["min_ms"]] == pytest.approx([50] * 2)
    assert [fast["ratio_p50"], fast["ratio_min"], fast["ratio_rounds"]] == pytest.approx([0.25] * 3)
    assert fast["needed_ratio"] == 0.25
    assert fast["flop_share"] == pytest.approx(2e9 / 0.05 / 100e9)
    assert fast["byte_share"] is None
    assert rows["base"]["byte_share"] == pytest.approx(1e9 / 0.2 / 10e9)
    assert (absent["turns"], absent["p50_ms"], absent["unavailable"]) == (0, None, "no such device")


def test_an_interrupt_keeps_complete_rounds(session, clock):
    def run(turn):
        clock.passes(1)
        if clock.now > 5:  # counting takes 2 seconds, the first round 2
            raise KeyboardInterrupt

    running = session(9)
    with pytest.raises(KeyboardInterrupt):
        running.measure(case_of(provider("A", run), provider("B", run)))
    assert [(row["provider"], row["turns"]) for row in running.rows] == [("A", 1), ("B", 1)]


def test_shares_are_of_the_highest_ceilings(session, clock, monkeypatch):
    monkeypatch.setattr(harness, "CEILINGS_EVERY", 0)
    running = session(1)
    case = case_of(provider("A", lambda turn: clock.passes(1), needed_flop=1e9, needed_bytes=1e9))
    for flops, by in ((50e9, 20e9), (200e9, 5e9)):
        monkeypatch.setattr(Device, "ceilings", lambda self, flops=flops, by=by: Ceilings(flops, by))
        running.measure(case)
    assert [row["flop_share"] for row in running.rows] == pytest.approx([1 / 200] * 2)
    assert [row["byte_share"] for row in running.rows] == pytest.approx([1 / 20] * 2)


def test_ceilings_are_not_measured_for_every_case(session, clock, monkeypatch):
    measured = []
    monkeypatch.setattr(Device, "ceilings", lambda self: measured.append(1) or Ceilings(100e9, 10e9))
    running, case = session(1), case_of(provider("A", lambda turn: clock.passes(1)))
    for _ in range(3):
        running.measure(case)
    assert len(measured) == 1
    monkeypatch.setattr(harness, "CEILINGS_EVERY", 0)
    running.measure(case)
    assert len(measured) == 2


def test_the_baseline_must_be_there():
    with pytest.raises(ValueError, match="baseline must be one of the available providers"):
        Case({}, "turn", "A", [Provider.missing("A", "no such device"), provider("B")])


@pytest.mark.parametrize(("bytes_of_one", "sets"), [(1, 2001), (999, 3), (1000, 3), (1001, 2), (2000, 2), (2001, 1)])
def test_input_sets_exceed_twice_the_cache(bytes_of_one, sets):
    assert Device(torch.device("cpu"), "", cache_bytes=1000).input_sets(bytes_of_one) == sets
    assert sets * bytes_of_one > 2000 >= (sets - 1) * bytes_of_one


def test_ceilings_are_measured(monkeypatch):
    monkeypatch.setattr(machine, "MATMUL_SIZES", {"cpu": (64, 128)})
    ceilings = Device(torch.device("cpu"), "", cache_bytes=1 << 16).ceilings()
    assert 1e8 < ceilings.flops < 1e16
    assert 1e7 < ceilings.bytes < 1e14


def test_without_git_there_is_no_commit(monkeypatch):
    monkeypatch.setenv("PATH", "/nonexistent")
    device = Device(torch.device("cpu"), "a CPU", cache_bytes=1)
    assert machine.facts(device)["commit"] == ""
    monkeypatch.setenv("RDP_COMMIT", "abc1234")
    assert machine.facts(device)["commit"] == "abc1234", "a copy of the tree says so"
