"""The script that tests on another torch: nothing of it stays, and its last line and exit code say what happened."""

import subprocess
import time
from pathlib import Path

import pytest

from . import versions


def is_alive(pid):
    """Not for one that nobody has reaped yet."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes() != b""
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("ends", ["wait", "exit 3"])
def test_what_a_step_started_ends_with_it(tmp_path, ends):
    """When its time is over, and where its command ends before."""
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
def test_what_it_says(error, code, waiting, line, monkeypatch, capsys):
    """`waiting`: the exit code where somebody does, without a limit."""
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


def test_the_oldest_torch_is_that_of_setup():
    """The Makefile tests it by name."""
    (oldest,) = [line for line in (versions.ROOT / "setup.py").read_text().splitlines() if "torch>=" in line]
    assert oldest.strip() == 'install_requires=["torch>=2.10"],'
    assert "-m tests.versions 2.10.0 --smoke" in (versions.ROOT / "Makefile").read_text()
