"""The search for launch numbers, with interpreted kernels and made-up times; and the commands that need a GPU."""

import os
import re
import subprocess
import sys
import types
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch

from benchmarks import sanitize, tune, tuning
from benchmarks.__main__ import main
from benchmarks.machine import ROOT, Device
from benchmarks.tuning import PROGRAMS, Tuned, Work, WrongResult, candidates, table_source
from benchmarks.tuning_works import SETTINGS, works_of
from rdp_kernels.kernels.triton import launch
from rdp_kernels.kernels.triton.launch import CONFIGS, LaunchConfig, architecture, row_bytes
from rdp_kernels.kernels.triton.prepared import PreparedLaunch
from tests.conftest import DEVICE

ON = torch.device(DEVICE)
WITHOUT_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")
TINY_SHAPES = {
    "residual_add_fwd": ((4, 5, 32), (3, 4, 5, 6), (3, 1, 200)),
    "residual_add_bwd": ((4, 80, 32), (3, 4, 5, 6)),
    "residual_add_norm_fwd": ((3, 2, 32), (2, 1, 1500)),
    "residual_add_norm_bwd": ((4, 20, 32),),
    "residual_add_norm_bwd_wide": ((2, 1, 4100),),
    "gather_rows": ((4, 5, 32),),
    "sum_partials": ((4, 5, 32),),
    "invert_rows": ((4, 5, 32),),
}
TINY = {op: tuple((shape, torch.float32) for shape in shapes) for op, shapes in TINY_SHAPES.items()}
SMALL = (((4, 5, 32), torch.bfloat16),)


def small_and_few(launches):
    """A made-up time by which large tiles, many warps, many programs and many stages are slow."""
    assert launches
    configs = [launch.config for launch in launches]
    return sum(c.tile + 1000 * c.num_warps + (c.programs - 1) + (c.num_stages - 1) for c in configs)


@pytest.mark.parametrize("op", [op for op in TINY if op != "residual_add_norm_bwd_wide"])
def test_finds_the_fastest(op, monkeypatch):
    before = {name: dict(table) for name, table in CONFIGS.items()}
    columns = {"residual_add_norm_fwd": 8192, "residual_add_norm_bwd": 4096}.get(op, 16384)
    tiles, programs = (2, 4) if op.endswith("bwd") else (1, 1)
    stages = 3 if op == "residual_add_norm_bwd" else 1
    slow = LaunchConfig(16384, columns, num_warps=16, num_stages=stages, tiles=tiles, programs=programs)
    monkeypatch.setitem(CONFIGS, op, {"default": ((2**31, slow),)})
    monkeypatch.setattr(launch, "multiprocessors", lambda device: 1)  # so that few rows show the number of programs
    (tuned,) = tuning.tune(op, works_of(op, ON, TINY[op]), ON, small_and_few)
    assert (tuned.op, tuned.largest) == (op, 2**31)
    assert tuned.config.num_warps == 2
    assert tuned.config.tile == min(config.tile for config in candidates(op, slow))
    assert (tuned.config.programs, tuned.config.num_stages, tuned.config.tiles) == (1, 1, tiles)
    assert tuned.ratio < 0.6
    assert tuned.tried > 1
    assert CONFIGS[op] == {"default": ((2**31, slow),)}, "the table is as it was"
    assert all(CONFIGS[name] == table for name, table in before.items() if name != op)


def test_every_kernel_has_works_that_run_it_with_the_numbers_of_their_class():
    assert set(SETTINGS) == set(TINY) == set(CONFIGS)
    for op, settings in TINY.items():
        table = dict(CONFIGS[op]["default"])
        for work in works_of(op, ON, settings):
            largest = tuning._class_of(work.row_bytes, table.items())
            tried = replace(table[largest], num_warps=1)
            launches = tuning._launches(work, op, largest, tried, ON)
            assert (f"_{op}_kernel", tried) in {(launch.kernel.fn.__name__, launch.config) for launch in launches}
            assert all(torch.isfinite(result).all() for result in work.run())


@pytest.mark.parametrize("op", ["residual_add_norm_fwd", "residual_add_norm_bwd"])
def test_every_width_class_of_the_norms_has_a_work(op):
    table = CONFIGS[op]["default"]
    sizes = [row_bytes(shape[-1], dtype.itemsize) for shape, dtype in SETTINGS[op]]
    assert {tuning._class_of(size, table) for size in sizes} == {largest for largest, _ in table}


def test_each_width_class_is_searched_on_works_of_its_own():
    def run():
        return (torch.ones(1),)

    works = [Work("residual_add_norm_fwd", row_bytes, run) for row_bytes in (100, 2049, 8192, 16384, 20000)]
    found = tuning.tune("residual_add_norm_fwd", works, ON, lambda launches: 1.0)
    table = CONFIGS["residual_add_norm_fwd"]["default"]
    assert [(tuned.largest, tuned.config) for tuned in found] == list(table)
    assert {tuned.ratio for tuned in found} == {1.0}
    assert {tuned.tried for tuned in found} == {1}, "all have the same effect: none"


def test_small_gains_are_noise():
    present = CONFIGS["gather_rows"]["default"][0][1]

    for gain, changes in ((0.99, False), (0.97, True)):
        time = lambda launches, gain=gain: 1.0 if launches[0].config == present else gain  # noqa: E731
        (tuned,) = tuning.tune("gather_rows", works_of("gather_rows", ON, SMALL), ON, time)
        assert (tuned.config != present) == changes


def test_a_candidate_that_changes_results_is_refused():
    def run():
        table = CONFIGS["gather_rows"]
        (_, config), *_ = table.get(architecture(ON), table["default"])
        for work in honest:
            work.run()
        return (torch.ones(3) * (1.01 if config.num_warps == 16 else 1.0),)

    honest = works_of("gather_rows", ON, SMALL)
    dishonest = [Work("gather_rows", 640, run)]
    with pytest.raises(WrongResult, match=r"gather_rows with LaunchConfig\(.*num_warps=16.* by 1.0e-02"):
        tuning.tune("gather_rows", dishonest, ON, lambda launches: 1.0)


def test_a_candidate_that_cannot_be_launched_is_passed_over():
    told = []

    def time(launches):
        if launches[0].config.num_warps == 8:
            raise RuntimeError("out of resource: registers")
        return 0.5 if launches[0].config.num_warps == 16 else 1.0

    (tuned,) = tuning.tune("gather_rows", works_of("gather_rows", ON, SMALL), ON, time, told.append)
    assert tuned.config.num_warps == 16
    assert told
    assert all("num_warps=8" in line and "out of resource: registers" in line for line in told)


@pytest.mark.parametrize("op", CONFIGS)
def test_candidates_fit_their_kernel(op):
    for largest, present in CONFIGS[op]["default"]:
        grid = list(candidates(op, present))
        assert len(set(grid)) == len(grid) > 2
        assert present in grid
        for config in grid:
            threads = 32 * config.num_warps
            assert 16 * threads <= config.tile <= max(config.tile, config.max_columns) <= 128 * threads
            if op in ("residual_add_norm_fwd", "residual_add_norm_bwd"):
                assert config.max_columns >= largest, "a tile holds whole rows"
            else:
                assert config.max_columns <= config.tile
            warps = config.num_warps * config.programs
            assert config.programs == 1 or warps <= present.num_warps * present.programs, "registers for all warps"
            assert config.programs == 1 or present.tiles > 1, "only programs that sum are counted"
        stages = {config.num_stages for config in grid}
        assert stages == ({1, 2, 3} if op == "residual_add_norm_bwd" else {1}), "no other kernel is pipelined"


def test_the_source_evaluates_to_what_was_found():
    found = [
        Tuned("residual_add_fwd", 2**31, LaunchConfig(4096, 1024, 8), 0.9, 5),
        Tuned("residual_add_norm_bwd", 2048, LaunchConfig(4096, 2048, 4, tiles=16), 0.8, 9),
        Tuned("residual_add_norm_bwd", 8192, LaunchConfig(16384, 8192, 16, 2, 8, 3), 0.7, 9),
    ]
    source = table_source(found, ON, "a GPU")
    assert source.startswith("# a GPU\n{")
    table, name = eval(source, {"LaunchConfig": LaunchConfig}), architecture(ON)
    others = dict(CONFIGS["residual_add_norm_bwd"]["default"])
    assert table == {
        "residual_add_fwd": {name: ((2**31, LaunchConfig(4096, 1024, 8)),)},
        "residual_add_norm_bwd": {name: tuple((others | {2048: found[1].config, 8192: found[2].config}).items())},
    }
    assert [largest for largest, _ in table["residual_add_norm_bwd"][name]] == sorted(others)
    assert eval(table_source([], ON), {}) == {}


def test_the_search_goes_on_after_a_wrong_result(monkeypatch, capsys):
    def tuned(op, works, device, time, tell):
        if op == "residual_add_fwd":
            raise WrongResult("it differs")
        if op == "sum_partials":
            raise KeyboardInterrupt
        return [Tuned(op, 2**31, LaunchConfig(1024, 1024, 4), 0.5, 7)]

    monkeypatch.setattr(tune, "tune", tuned)
    monkeypatch.setattr(tune, "works_of", lambda op, device: [])
    found, code = tune.search(["residual_add_fwd", "gather_rows"], ON, small_and_few)
    assert ([each.op for each in found], code) == (["gather_rows"], 1)
    assert "not tuned: it differs" in capsys.readouterr().err
    found, code = tune.search(["gather_rows", "sum_partials", "invert_rows"], ON, small_and_few)
    assert ([each.op for each in found], code) == (["gather_rows"], 130)


def test_tune_prints_the_table(monkeypatch, capsys):
    """The whole command, with the CPU in place of a GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(Device, "of", lambda kind: Device(ON, "a GPU", 1))
    monkeypatch.setattr(tune, "flushed_time", lambda device: small_and_few)
    monkeypatch.setattr(tune, "works_of", lambda op, device: works_of(op, device, TINY[op]))
    assert main(["tune", "--op", "gather_rows", "invert_rows"]) == 0
    printed = capsys.readouterr()
    table = eval(printed.out, {"LaunchConfig": LaunchConfig})
    assert list(table) == ["gather_rows", "invert_rows"]
    ((largest, found),) = table["gather_rows"][architecture(ON)]
    assert (largest, found.tile, found.num_warps) == (2**31, 2048, 2), "the fastest by the made-up time"
    assert re.search(r"# a GPU, .*torch \d.*triton \d", printed.out)
    (_, present), *_ = CONFIGS["gather_rows"]["default"]
    faster = (2048 + 2000) / (present.tile + 1000 * present.num_warps)
    assert re.search(rf"gather_rows up to 2147483648 bytes: {faster:.3f} × the present time, of \d+: ", printed.err)


@WITHOUT_GPU
@pytest.mark.parametrize("options", [[], ["--device", "cuda"], ["--op", "gather_rows"]])
def test_without_a_gpu_tune_says_so(options, capsys):
    assert main(["tune", *options]) == 2
    assert "tune needs a GPU" in capsys.readouterr().err


@pytest.mark.gpu
def test_on_a_gpu_times_are_of_the_device(capsys):
    time = tune.flushed_time(Device.of("cuda"))
    (tuned,) = tuning.tune("gather_rows", works_of("gather_rows", ON, (((64, 64, 256), torch.bfloat16),)), ON, time)
    assert 0 < tuned.ratio <= 1


AHEAD_AND_SEARCHED = """
import torch
from benchmarks.gpu.stand_in import set_up
asked = set_up()
from benchmarks import tuning
from benchmarks.tuning_works import works_of
tuning.relative_error = lambda *_: 0.0  # nothing is computed
cpu = torch.device("cpu")
for op, shape in (("residual_add_bwd", (4, 80, 384)), ("residual_add_norm_fwd", (4, 80, 384)), ("gather_rows", (4, 80, 384))):
    works = works_of(op, cpu, ((shape, torch.bfloat16),))
    asked.clear()
    tuning.compile_candidates(op, works, cpu)
    ahead = set(asked)
    asked.clear()
    tuning.tune(op, works, cpu, lambda launches: 1.0)
    print(op, len(ahead), len(ahead - asked), len(asked - ahead))
"""


def test_a_shape_that_cannot_be_compiled_ahead_is_reported_and_others_are_compiled(monkeypatch, capsys):
    compiled = []

    def compile_one(op, setting):
        if setting == SETTINGS[op][0]:
            raise RuntimeError("out of memory")
        compiled.append((op, setting))

    monkeypatch.setattr(tune, "_compile", compile_one)
    monkeypatch.setattr(tune, "ProcessPoolExecutor", lambda processes, context: ThreadPoolExecutor(processes))
    tune.compile_ahead(["residual_add_fwd", "gather_rows"], 3)
    assert set(compiled) == {(op, s) for op in ("residual_add_fwd", "gather_rows") for s in SETTINGS[op][1:]}
    assert (
        "not compiled ahead: gather_rows [128, 197, 768] torch.bfloat16: RuntimeError: out of memory"
        in capsys.readouterr().err
    )


def test_every_candidate_is_compiled_and_none_is_launched():
    """On stand-ins. Candidates that can't be compiled, and empty grids, which are never launched, are skipped."""
    compiled, launched = [], []

    class Kernel:
        arg_names = ("tile",)

        def warmup(self, grid, **numbers):
            if numbers["num_warps"] == 16:
                raise RuntimeError("out of resource: registers")
            compiled.append((*grid, numbers["tile"], numbers["num_warps"]))

        def __getitem__(self, grid):
            launched.append(grid)

    def run():
        (_, config), *_ = CONFIGS["gather_rows"][architecture(ON)]
        for grid in (0, 7):
            PreparedLaunch(Kernel(), config, ON)(grid, config.tile)
        return ()

    tuning.compile_candidates("gather_rows", [Work("gather_rows", 640, run)], ON)
    (_, present), *_ = CONFIGS["gather_rows"]["default"]
    wanted = [(7, c.tile, c.num_warps) for c in (present, *candidates("gather_rows", present)) if c.num_warps != 16]
    assert compiled == wanted
    assert len(set(wanted)) > 3
    assert not launched


@pytest.mark.slow
def test_kernels_compiled_ahead_are_those_that_the_search_launches():
    """But for other numbers of programs, where a kernel sums. Budget: 20 seconds."""
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    output = subprocess.run([sys.executable, "-c", AHEAD_AND_SEARCHED], env=environment, capture_output=True, text=True)
    assert output.returncode == 0, output.stderr
    found = [line.split() for line in output.stdout.splitlines()]
    assert [op for op, *_ in found] == ["residual_add_bwd", "residual_add_norm_fwd", "gather_rows"]
    for op, *counts in found:
        ahead, in_vain, new = map(int, counts)
        assert ahead > 3
        assert in_vain == 0
        assert (0 < new <= len(PROGRAMS)) if op == "residual_add_bwd" else new == 0


# Sanitize


@pytest.fixture
def runs(monkeypatch):
    """A machine with a GPU and a compute-sanitizer in which initcheck finds something."""
    found = []

    def run(command, **how):
        found.append((command, how["env"]))
        return subprocess.CompletedProcess(command, int("initcheck" in command))

    monkeypatch.setattr(sanitize, "shutil", types.SimpleNamespace(which=lambda name: f"/bin/{name}"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(sanitize.subprocess, "run", run)
    return found


def test_sanitize_runs_every_tool_over_the_fixed_table(runs, capsys):
    assert main(["sanitize"]) == 1
    assert capsys.readouterr().out.endswith("failed: initcheck\n")
    tools = [command[command.index("--tool") + 1] for command, _ in runs]
    assert tools == ["memcheck", "racecheck", "initcheck"]
    for command, environment in runs:
        assert command[0] == "/bin/compute-sanitizer"
        assert command[command.index("--error-exitcode") + 1] != "0"
        assert command[-1] == "tests/kernels/test_fixed.py"
        assert command[-4:-2] == ["-W", "default"], "a GPU's first warning must not end it"
        assert "--maxfail=5" in command
        assert "-x" not in command
        assert (ROOT / command[-1]).exists()
        assert environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] == "1"
    memcheck, _, initcheck = (command for command, _ in runs)
    assert "kernel_substring=_residual_add_fwd_kernel" in memcheck
    assert not any("kernel" in part for part in initcheck[:-1]), "torch's kernels write what ours read"
    assert main(["sanitize", "--tool", "memcheck", "--tests", "tests/gpu"]) == 0
    assert runs[-1][0][-1] == "tests/gpu"


def test_sanitize_says_what_is_missing(runs, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["sanitize"]) == 2
    assert "can't sanitize: this machine, or this torch, has no cuda device" in capsys.readouterr().err
    monkeypatch.setattr(sanitize, "shutil", types.SimpleNamespace(which=lambda name: None))
    assert main(["sanitize"]) == 2
    assert "compute-sanitizer isn't on the PATH" in capsys.readouterr().err
    assert not runs
