"""The script that tests on another torch leaves nothing behind; its last line and exit code say what happened."""

import subprocess
import time
from pathlib import Path

import pytest

from . import versions


def is_alive(pid):
    """False for a zombie."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes() != b""
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("ends", ["wait", "exit 3"])
def test_processes_of_a_step_end_with_it(tmp_path, ends):
    """When the time is over, and when the command ends earlier."""
    error = subprocess.TimeoutExpired if ends == "wait" else subprocess.CalledProcessError
    with pytest.raises(error):
        versions.Steps(2).run("a step", "sh", "-c", f"sleep 300 & echo $! > pid; {ends}", cwd=tmp_path)
    pid = int((tmp_path / "pid").read_text())
    deadline = time.monotonic() + 10
    while is_alive(pid) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not is_alive(pid)


@pytest.mark.parametrize(
    ("error", "code", "waiting", "line"),
    [
        (None, 0, 0, "all was well"),
        (subprocess.CalledProcessError(2, "pytest"), 1, 1, "FAILED, tests ended with 2"),
        (subprocess.TimeoutExpired("pytest", 60), 0, 1, "LEFT OUT, 0.5 minutes were not enough (tests)"),
        (versions.Unavailable("they can't be installed"), 0, 1, "LEFT OUT, they can't be installed"),
    ],
)
def test_last_line_and_exit_code(error, code, waiting, line, monkeypatch, capsys):
    """`waiting`: the exit code without a time limit."""
    folders = []

    def check(args, folder, steps):
        folders.append(folder)
        (folder / "environment").mkdir()
        steps.name = "tests"
        if error is not None:
            raise error

    monkeypatch.setattr(versions, "check", check)
    monkeypatch.setattr(versions.signal, "signal", lambda *_: None)
    assert versions.main(["2.11.0", "--triton", "3.6.0", "--minutes", "0.5"]) == code
    assert capsys.readouterr().out.splitlines()[-1].startswith(f"torch 2.11.0 with triton 3.6.0: {line}")
    if not isinstance(error, subprocess.TimeoutExpired):
        assert versions.main(["2.11.0"]) == waiting
    assert not any(folder.exists() for folder in folders)


@pytest.mark.parametrize(
    ("nvcc", "torchs", "build"),
    [
        (None, "13.0", "cpu"),
        ("Cuda compilation tools, release 13.1, V13.1.80", "13.0", "cuda"),
        ("Cuda compilation tools, release 12.8, V12.8.93", "13.0", "cpu"),
        ("Cuda compilation tools, release 13.1, V13.1.80", "", "cuda"),
        ("no version", "13.0", "cpu"),
        ("no version", "", "cpu"),
    ],
)
def test_cuda_kernels_are_built_where_they_can_be(nvcc, torchs, build, monkeypatch):
    """`torchs`: the CUDA version of the other torch, as its own Python gives it."""

    def run(command, **_):
        answers = {"nvcc": nvcc, "the new one": f"{torchs}\n"}
        return subprocess.CompletedProcess(command, 0, stdout=answers[command[0]])

    monkeypatch.setattr(versions.shutil, "which", lambda name: nvcc and f"/bin/{name}")
    monkeypatch.setattr(versions.subprocess, "run", run)
    assert versions.what_to_build("the new one") == build


def test_installed_packages():
    """The tests need Triton's interpreter, and it fails with numpy 2.4 before 3.7."""
    assert versions.requirements("2.10.0", None, smoke=True) == ["torch==2.10.0", "ninja", "setuptools"]
    for triton, numpy in (("3.6.0", "numpy<2.4"), ("3.7.0", "numpy"), ("3.10.0", "numpy"), (None, "numpy")):
        wanted = versions.requirements("2.11.0", triton, smoke=False)
        assert [name for name in wanted if name.startswith(("torch=", "triton", "numpy"))] == [
            "torch==2.11.0", *([f"triton=={triton}"] if triton else []), numpy,
        ]  # fmt: skip
        assert {"ninja", "setuptools", *versions.TOOLS} <= set(wanted)


def test_the_oldest_torch_is_that_of_setup():
    """The Makefile tests it by name."""
    (oldest,) = [line for line in (versions.ROOT / "setup.py").read_text().splitlines() if "torch>=" in line]
    assert oldest.strip() == 'install_requires=["torch>=2.10"],'
    assert "-m tests.versions 2.10.0 --smoke" in (versions.ROOT / "Makefile").read_text()
