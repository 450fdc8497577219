"""The example for several processes loses nothing when one process, or all, are killed."""

import json
import os
import random
import signal
import socket
import sys
import time
from pathlib import Path

import pytest
import torch

from examples import train_ddp
from examples.digits.storage import Folder
from tests.integrations.ranks import started, torchrun

SCRIPT = Path(train_ddp.__file__)
LIMIT = 120  # seconds, so that nothing hangs


def content(folder: Path) -> tuple[dict, dict]:
    state = Folder(folder).load_checkpoint(torch.device("cpu"))
    return json.loads((folder / "results.json").read_text()), state


def assert_same(actual, expected, where="") -> None:
    """Asserts equality to the bit."""
    assert type(actual) is type(expected), where
    if isinstance(expected, torch.Tensor):
        assert torch.equal(actual, expected), where
    elif isinstance(expected, (dict, list, tuple)):
        assert len(actual) == len(expected), where
        for key in expected if isinstance(expected, dict) else range(len(expected)):
            assert_same(actual[key], expected[key], f"{where}.{key}")
    else:
        assert actual == expected, where


def refused(argv: list[str], capsys) -> str:
    assert train_ddp.main(argv) == 2
    message = capsys.readouterr().err
    assert message.startswith("train_ddp.py: error: ")
    assert message.count("\n") == 1, "one line"
    return message


# One process


def stop_after(saves: int, monkeypatch) -> None:
    """Stops the run, as Ctrl-C does, after so many checkpoints."""
    save, calls = Folder.save_checkpoint, []

    def save_and_stop(folder, state):
        save(folder, state)
        calls.append(state)
        if len(calls) == saves:
            raise KeyboardInterrupt

    monkeypatch.setattr(Folder, "save_checkpoint", save_and_stop)


TINY = ("--steps", "7", "--save-every", "1", "--drop-prob", "0.4")


@pytest.mark.parametrize("saves", [3, 4])
def test_goes_on_to_the_bit(saves, tmp_path, monkeypatch):
    """Between two pairs of iterations, and in the middle of one."""
    assert train_ddp.main([*TINY, "--out", str(tmp_path / "whole")]) == 0
    with monkeypatch.context() as patch:
        stop_after(saves, patch)
        assert train_ddp.main([*TINY, "--out", str(tmp_path / "parts")]) == 130
    state = Folder(tmp_path / "parts").load_checkpoint(torch.device("cpu"))
    assert (state["progress"]["steps"], state["scheme"]["phase"]) == (saves, ("drop", "reuse")[saves % 2])
    assert train_ddp.main(["--resume", "--out", str(tmp_path / "parts")]) == 0
    assert_same(content(tmp_path / "parts"), content(tmp_path / "whole"))
    assert content(tmp_path / "whole")[0]["batches"] == 4, "both iterations of a pair see the same batch"


def test_wrong_input_gets_one_line(tmp_path, capsys, monkeypatch):
    out = ["--out", str(tmp_path / "run")]
    assert "argument --drop-prob: must be in [0, 1], got 1.5" in refused(["--drop-prob", "1.5", *out], capsys)
    assert "argument --save-every: must be in [1, " in refused(["--save-every", "0", *out], capsys)
    assert not (tmp_path / "run").exists()
    with monkeypatch.context() as patch:
        stop_after(2, patch)
        train_ddp.main([*TINY, *out])
    capsys.readouterr()
    assert "holds a run: give --resume" in refused([*TINY, *out], capsys)
    message = refused([*TINY, *out, "--seed", "1", "--resume"], capsys)
    assert "argument --seed: the run in" in message
    assert "has 0, got 1" in message
    monkeypatch.setattr(train_ddp, "WORLD", 3)
    assert "64 images can't be shared evenly by 3 processes" in refused([*TINY, "--out", str(tmp_path)], capsys)
    Folder(tmp_path).save_checkpoint({"config": {}})
    assert "the run of another example" in refused(["--resume", "--out", str(tmp_path)], capsys)


@pytest.mark.parametrize(
    ("gpus", "rank", "processes", "expected"),
    [
        (0, 1, 2, ("cpu", "gloo")),
        (1, 1, 2, ("cuda:0", "gloo")),
        (2, 1, 2, ("cuda:1", "nccl")),
        (8, 0, 1, ("cuda:0", "nccl")),
    ],
)
def test_processes_may_share_a_gpu(gpus, rank, processes, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setenv("LOCAL_RANK", str(rank))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    device, backend = train_ddp.place()
    assert (str(device), backend) == expected


# Two processes, killed

RUN = ("--steps", "100", "--save-every", "5")  # saves in the middle of pairs too


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """The folder of an uninterrupted run on two processes."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    run(torchrun(SCRIPT, *RUN, "--out", str(folder)))
    return folder


def run(command: list[str]) -> None:
    with started(command) as process:
        out, _ = process.communicate(timeout=LIMIT)
    assert process.returncode == 0, out


def ranks_of(launcher: int) -> dict[int, int]:
    """Process ids of the launcher's workers, by rank."""
    found = {}
    for pid in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split():
        variables = dict(v.partition("=")[::2] for v in Path(f"/proc/{pid}/environ").read_text().split("\0"))
        if "LOCAL_RANK" in variables:
            found[int(variables["RANK"])] = int(pid)
    return found


def wait_for_checkpoints(folder: Path, number: int) -> bool:
    """Waits until so many more checkpoints were written; False if the run ends before."""
    file, seen, deadline = folder / "checkpoint.pt", set(), time.monotonic() + LIMIT
    while len(seen) < number + 1:
        assert time.monotonic() < deadline, "no progress"
        if file.exists():
            seen.add(file.stat().st_mtime_ns)
        if (folder / "results.json").exists():
            return False
        time.sleep(0.001)
    return True


@pytest.mark.slow
def test_a_killed_rank_is_restarted_by_the_launcher(whole, tmp_path):
    """Budget: 90 seconds. SIGKILL for one of the ranks, at random moments; `torchrun --max-restarts` does the rest."""
    rng, folder, killed = random.Random(0), tmp_path / "run", []
    command = torchrun(SCRIPT, *RUN, "--out", str(folder), options=["--max-restarts=9"])
    with started(command, TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1) as launcher:
        for rank in (1, 0, 1):
            if wait_for_checkpoints(folder, rng.randint(1, 6)):
                time.sleep(rng.uniform(0, 0.05))
                os.kill(ranks_of(launcher.pid)[rank], signal.SIGKILL)
                killed.append(rank)
        out, _ = launcher.communicate(timeout=LIMIT)
    assert launcher.returncode == 0, out
    assert len(killed) == 3, "the run was over too soon"
    assert_same(content(folder), content(whole))


@pytest.mark.slow
def test_a_killed_rank_ends_the_run_and_it_can_be_resumed(whole, tmp_path):
    """Budget: 90 seconds. Without restarts the launcher ends with an error; another launcher resumes the run."""
    folder = tmp_path / "run"
    with started(torchrun(SCRIPT, *RUN, "--out", str(folder))) as launcher:
        assert wait_for_checkpoints(folder, 3)
        os.kill(ranks_of(launcher.pid)[0], signal.SIGKILL)
        launcher.communicate(timeout=LIMIT)
    assert launcher.returncode != 0
    run(torchrun(SCRIPT, "--resume", "--out", str(folder)))
    assert_same(content(folder), content(whole))


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1])
def test_without_a_launcher_the_other_rank_gets_an_error(killed, tmp_path):
    """Budget: 60 seconds each. The other rank ends itself, as it can't reach the one that died."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    meeting = {"WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    folder = tmp_path / "run"
    command = [sys.executable, str(SCRIPT), *RUN, "--out", str(folder)]
    with started(command, RANK=0, **meeting) as first, started(command, RANK=1, **meeting) as second:
        assert wait_for_checkpoints(folder, 3)
        ranks = [first, second]
        ranks[killed].kill()
        out, _ = ranks[1 - killed].communicate(timeout=LIMIT)
    assert ranks[1 - killed].returncode == 1
    assert "RuntimeError" in out
