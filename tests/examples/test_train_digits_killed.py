"""The digits example, killed at random moments and resumed in new processes."""

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SEED_DEPENDENT = (
    "results.json",
    "accuracy.png",
    "loss.png",
    "removed.png",
    "similarity.png",
)  # no times in these


def start(out: Path, *options: str, **kwargs) -> subprocess.Popen:
    command = [sys.executable, "-m", "tests.examples.tiny_digits", "--out", str(out), *options]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **kwargs,
    )


def finish(process: subprocess.Popen) -> str:
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, out + err
    return out


def content(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in SEED_DEPENDENT}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "numbers"),
    [
        (("--model", "mlp", "--mode", "sample"), [signal.SIGKILL, signal.SIGTERM]),
        (("--model", "resnet"), [signal.SIGKILL, signal.SIGINT]),
    ],
    ids=["mlp", "resnet"],
)
def test_killed_and_resumed_ends_in_the_same_weights_and_report(options, numbers, tmp_path):
    """Budget: 40 seconds each. The report holds a digest of all final weights, which must be the same to the bit."""
    options = (*options, "--epochs", "1", "--seeds", "2", "--drop-prob", "0.4")
    began = time.monotonic()
    finish(start(tmp_path / "whole", *options))
    duration = time.monotonic() - began

    rng, out, stops = random.Random(options[1]), tmp_path / "killed", 0
    numbers = list(numbers)
    while numbers:
        process = start(out, *options, "--resume")
        time.sleep(rng.uniform(0.3, 0.7) * duration)
        process.send_signal(numbers[0])
        out_text, err = process.communicate(timeout=60)
        if process.returncode == 0:  # it ended before the signal
            if stops:
                break
            shutil.rmtree(out)  # the machine got faster: try again, with an earlier signal
            duration /= 2
            continue
        number = numbers.pop(0)
        assert process.returncode in (-number, 128 + number), out_text + err
        assert process.returncode == -number or "--resume" in out_text, out_text + err
        stops += 1

    process = start(out, "--model", options[1], "--resume")
    while process.poll() is None and not (out / "results.json").exists():
        time.sleep(0.001)
    process.kill()  # while the report is being written, or just after
    process.communicate()
    finish(start(out, "--resume"))
    assert content(out) == content(tmp_path / "whole")
    assert not [file for file in out.iterdir() if file.suffix == ".tmp"]
    methods = json.loads((out / "results.json").read_text())["methods"]
    assert len({digest for method in methods.values() for digest in method["weights_sha256"]}) == 2 * len(methods)


@pytest.mark.slow
def test_no_room_for_the_checkpoint(tmp_path):
    """Budget: 20 seconds. The file system refuses the bytes; the older checkpoint resumes once there is room."""
    options = ("--model", "mlp", "--epochs", "0.5", "--seeds", "1")
    finish(start(tmp_path / "whole", *options))
    limit = 20_000  # the first checkpoint fits, those with weights don't

    process = start(
        tmp_path / "full", *options, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    )
    _, err = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "Traceback" not in err
    assert os.strerror(27) in err  # File too large
    assert "--resume" in err
    assert [file.name for file in (tmp_path / "full").iterdir()] == ["checkpoint.pt"]
    finish(start(tmp_path / "full", "--resume"))
    assert content(tmp_path / "full") == content(tmp_path / "whole")
