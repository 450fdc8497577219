"""`python -m benchmarks expected`: its arithmetic on cases computed by hand, the committed table, and the expected shares
beside measured ones."""

import pytest

from benchmarks import expected, pages
from benchmarks.compiled_shares import GPUS
from benchmarks.gpu import shares
from benchmarks.op_cases import CUDA
from benchmarks.op_providers import EAGER, OURS
from benchmarks.output import read_csv, write_csv

from .commands import run_command

H200 = GPUS["sm_90"]


@pytest.mark.parametrize(
    ("warps", "registers", "shared", "programs"),
    [
        (4, 32, 0, 16),  # 64 warps
        (1, 32, 0, 32),  # 32 programs
        (4, 104, 0, 4),  # 65536 / (4 · 32 · 104) = 4.9
        (4, 73, 0, 6),  # the registers of a warp round up to 10 · 256: 65536 / (4 · 2560) = 6.4, not 7.01
        (8, 128, 8192, 2),  # 65536 / (8 · 32 · 128)
        (4, 32, 56 << 10, 4),  # 228 / (56 + 1)
    ],
)
def test_programs_that_fit(warps, registers, shared, programs):
    assert H200.fitting(warps, registers, shared) == programs


def test_speed_by_bytes_in_flight():
    """Little's law holds, with a latency that rises from the idle one to the busy one in proportion to the speed."""
    needed = 4.3e12 * 1.5e-6 / 132
    assert H200.speed(needed) == pytest.approx(1)
    assert H200.speed(3 * needed) == H200.speed(0) == 1, "without loads there is nothing to wait for"
    half = 4.3e12 / 2 * (0.35e-6 + 1.5e-6) / 2 / 132
    assert H200.speed(half) == pytest.approx(0.5)
    assert H200.speed(1) == pytest.approx(132 / 0.35e-6 / 4.3e12, rel=1e-3)


def test_waves():
    needed = H200.in_flight
    assert H200.share_of_copy(3.0, needed) == pytest.approx(1)
    assert H200.share_of_copy(2.5, 2 * needed) == pytest.approx(1), "half of the programs are enough"
    half = H200.speed(needed / 2)
    assert H200.share_of_copy(2.5, needed) == pytest.approx(2.5 / (2 + 0.5 / half))
    assert H200.share_of_copy(0.5, needed) == pytest.approx(half), "a single wave that doesn't fill the GPU"


# The committed table


def test_each_call_has_its_kernels():
    rows = read_csv(pages.RESULTS / "expected-sm_90.csv")
    labels = ("op", "shape", "dtype", "kept", "gamma")
    calls = {tuple(str(setting.labels[name]) for name in labels) for setting in expected.SETTINGS}
    assert {row["shape"].rpartition("x")[2] for row in rows} == {"384", "768", "1024", "1536", "4096"}
    assert {tuple(row[name] for name in labels) for row in rows} == calls
    for call in calls:
        kernels = {(row["pass"], row["kernel"]) for row in rows if tuple(row[name] for name in labels) == call}
        assert {direction for direction, _ in kernels} == {"forward", "backward"}
        assert ("backward", "sum_partials") in kernels or call[0] == expected.GATHER
    assert all(0 < float(row["expected_share"]) <= 1 for row in rows)


def test_nothing_looks_measured():
    """Until there are rows of an H200. Then the share of a pass stands beside its largest launch."""
    (page,) = (page.read_text(encoding="utf-8") for page in pages.PAGES if page.name == "performance.md")
    section = page.partition("## What to expect on a GPU, from compiled code")[2].partition("\n## ")[0]
    assert "**The table below is expected, not measured.**" in " ".join(section.split())
    rows = read_csv(pages.RESULTS / "expected-sm_90.csv")
    make = pages.TABLES["expected"][1]
    text = make(rows, [])
    assert "| expected share of a copy | measured |" in text
    assert "Expected on an H200, not measured" in text
    assert all(line.endswith("| – |") for line in text.splitlines() if line.startswith("| residual_add |"))

    facts = {"device": "NVIDIA H200", "threads": "1", "torch": "2.11", "commit": "abc", "date": "2027-01-01"}
    (setting,) = (s for s in CUDA if (s.op, s.shape, s.kept, s.gamma) == ("residual_add", (128, 197, 768), 102, True))
    call = {name: str(value) for name, value in setting.labels.items()}
    measured = facts | call | {"pass": "backward", "provider": OURS, "copy_share": "0.625"}
    other = measured | {"provider": EAGER, "copy_share": "0.111"}
    text = make(rows, [measured, other])
    filled = [line for line in text.splitlines() if line.endswith("% |")]
    assert len(filled) == 1
    assert "| backward | `residual_add_bwd` |" in filled[0]
    assert filled[0].endswith("| 62% |")
    assert "Measured: a whole pass, NVIDIA H200" in text


# Beside measured shares


def launch(direction, size, share):
    return CUDA[1].labels | {"pass": direction, "bytes": size, "expected_share": share}


LAUNCHES = [launch("forward", 900, 0.9), launch("backward", 600, 0.5), launch("backward", 60, 0.1)]


def measured_row(**columns):
    return CUDA[1].labels | {"pass": "forward", "provider": OURS, "copy_share": 0.45} | columns


def test_a_column_beside_the_measured_shares(tmp_path, monkeypatch, capsys):
    """Launches of a pass come one after the other: 600 bytes at half of a copy's speed and 60 at a tenth take the time
    of 1200 and 600."""
    file = tmp_path / "ops-h200.csv"
    rows = [
        measured_row(),
        measured_row(**{"pass": "backward", "copy_share": None}),
        measured_row(**{"pass": "both", "copy_share": 0.5}),
        measured_row(provider=EAGER),
        measured_row(op="another"),
    ]
    write_csv(file, rows)
    asked = []
    monkeypatch.setattr(expected, "expected_rows", lambda settings: asked.extend(settings) or LAUNCHES)
    assert shares.main([str(file)]) == 0
    assert asked == [CUDA[1]], "only what was measured"
    found = [float(row["expected_share"] or 0) for row in read_csv(file)]
    assert found == pytest.approx([0.9, 660 / 1800, 1560 / 2800, 0, 0], abs=1e-3)
    printed = capsys.readouterr().out
    assert "128 kept, forward: 45% of a copy measured, 90% expected" in printed
    assert "128 kept, backward: – of a copy measured, 37% expected" in printed
    assert printed.endswith("measured / expected share of a copy: 0.70 (0.50 to 0.90)\n")


def test_without_figures_or_measured_shares_the_file_stays(tmp_path, monkeypatch, capsys):
    file = tmp_path / "ops-h200.csv"
    for row, words in ((measured_row(), expected.UNKNOWN), (measured_row(copy_share=None), "no share of ours")):
        write_csv(file, [row])
        before = file.read_bytes()
        monkeypatch.setattr(expected, "expected_rows", lambda settings: [])
        assert shares.main([str(file)]) == 0
        assert words in capsys.readouterr().out
        assert file.read_bytes() == before


@pytest.mark.slow
def test_the_command(tmp_path, capsys):
    """Compiles two kernels. Budget: half a minute."""
    assert run_command(expected, "--tiny", "--csv", tmp_path / "expected.csv") == 0
    rows = read_csv(tmp_path / "expected.csv")
    assert rows[0].keys() == read_csv(pages.RESULTS / "expected-sm_90.csv")[0].keys()
    assert rows[0]["kernel"] == "residual_add_fwd"
    assert "nothing is measured" in capsys.readouterr().out
