"""Shell commands of README.md and docs/: understood up to where they begin to work, and run in small."""

from __future__ import annotations

import argparse
import os
import re
import runpy
import subprocess
import sys
import warnings
from pathlib import Path
from unittest import mock

import torch

from .diagnostics.nets import tiny_vit
from .markdown import ROOT

SMALL = {
    "-m benchmarks gpu": "--tiny --only machine",  # tests/benchmarks/gpu runs all steps
    "-m benchmarks against": "--turns 1",
    "-m benchmarks pages": "",
    "-m benchmarks": "--tiny",
    "-m rdp_kernels.info": "",
    "-m rdp_kernels.diagnostics": "--data digits --batches 1 --batch-size 8 --lesions 1 --samples 1",
    "-m tests.coverage.cost": "",  # takes no options, and minutes: no page has it in a block
    "-m tests.coverage": "-k timm.vision_transformer",
    "-m tests.versions": "--help",  # `make test-all` runs it
    "examples/bytes_lm.py": "--preset quick --seeds 1 --steps 4 --depth 2 --validation-windows 2 --overwrite",
    "examples/dino.py": "--epochs 1 --batch-size 256 --overwrite",
    "examples/finetune_timm.py": "--epochs 1 --batch-size 512 --overwrite",
    "examples/skip_connections.py": "--quick --seeds 2 --depths 4 --steps 100",
    "examples/spiral.py": "--quick --seeds 2 --steps 2 --points 20",
    "examples/train_ddp.py": "--steps 2",
    "examples/train_digits.py": "--epochs 0.05 --seeds 1",
    "examples/train_accelerate.py": "--quick",
    "examples/train_lightning.py": "--quick",
    "examples/train_timm.py": "--quick",
    "examples/train_transformers.py": "--quick",
    "docs/pictures.py": "",
}
"""What makes a command small. An option given twice counts as it was given last."""

WITH_TINY_NETWORKS = {"examples/train_digits.py": "-m tests.examples.tiny_digits"}
"""The same program, with smaller networks than its options can ask for."""

WITHOUT_OUT = {f"examples/train_{stack}.py" for stack in ("accelerate", "lightning", "timm", "transformers")}

WITH_TORCHVISION = """
import runpy, sys
from examples.libraries import import_torchvision
import_torchvision()
sys.argv = sys.argv[2:]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""
"""Runs a module whose name follows `-m`. timm imports torchvision, which may not match torch's build."""

LEFT_OUT = {"--quick", "--pretrained", "--device", "cuda"}
"""They need a network or a GPU, or exclude what makes a command small."""


class Understood(Exception):
    """The options were parsed."""


def understand(words: list[str]) -> None:
    """Fails unless the command's program exists and takes its options."""
    words = without_environment(words)
    if words[0] == "make":
        subprocess.run(["make", "--dry-run", *words[1:]], cwd=ROOT, check=True, capture_output=True)
    elif words[:2] == ["pip", "install"]:
        known_extras = re.findall(
            r'^        "(\w+)": \[', (ROOT / "setup.py").read_text(encoding="utf-8"), re.MULTILINE
        )
        asked = re.findall(r"\[([\w,]+)\]", " ".join(words))
        assert {extra for extras in asked for extra in extras.split(",")} <= set(known_extras), words
    elif words[0] in ("pytest", "jupytext"):
        assert (ROOT / words[-1 if words[0] == "jupytext" else 1]).exists(), words
    else:
        parse(*program_of(words))


def parse(program: str, options: list[str]) -> None:
    """Runs the program until it has parsed its options."""

    def parse_args(parser: argparse.ArgumentParser, *_: object) -> None:
        original(parser, options)
        raise Understood

    original = argparse.ArgumentParser.parse_args
    if not SMALL[key_of(program, options)] and not options:
        return  # it takes none
    with mock.patch.object(argparse.ArgumentParser, "parse_args", parse_args), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # modules that were imported before
        try:
            if program.startswith("-m "):
                runpy.run_module(program[3:], run_name="__main__", alter_sys=True)
            else:
                runpy.run_path(str(ROOT / program), run_name="__main__")
        except Understood:
            return
    raise AssertionError(f"{program} parsed no options")


def program_of(words: list[str]) -> tuple[str, list[str]]:
    """The Python program, as in `SMALL`, and its options."""
    words = without_environment(words)
    if words[0] == "torchrun":
        start = next(index for index, word in enumerate(words) if word.endswith(".py"))
        return words[start], words[start + 1 :]
    assert Path(words[0]).name in ("python", "python3"), words
    return (f"-m {words[2]}", words[3:]) if words[1] == "-m" else (words[1], words[2:])


def without_environment(words: list[str]) -> list[str]:
    return [word for word in words if not re.match(r"[A-Z_]+=", word)]


def key_of(program: str, options: list[str]) -> str:
    longer = f"{program} {options[0]}" if options else program
    return longer if longer in SMALL else program


def run_small(words: list[str], folder: Path) -> None:
    """Runs the command with the options that make it small; what it writes goes to `folder`."""
    words = without_environment(words)
    if words[0] in ("make", "pip", "pytest", "jupytext"):  # run by CI and tests/test_build.py, or not ours
        understand(words)
        return
    program, options = program_of(words)
    small = SMALL[key_of(program, options)].split()
    if small == ["--help"]:
        options = []
    options = [replaced(word, folder) for word in options if word not in LEFT_OUT] + small
    if program.startswith("examples/") and program not in WITHOUT_OUT:
        options += ["--out", str(folder / "run")]
    program = WITH_TINY_NETWORKS.get(program, program)
    launcher = [sys.executable]
    if program == "-m rdp_kernels.diagnostics":
        launcher += ["-c", WITH_TORCHVISION]
    elif words[0] == "torchrun":
        launcher += ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0"]
    command = [*launcher, *program.split(), *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1"}
    ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    assert ran.returncode == 0, f"{' '.join(command)}\n{ran.stdout[-2000:]}\n{ran.stderr[-3000:]}"


def replaced(word: str, folder: Path) -> str:
    """Names in `word` that stand for the reader's own: of folders, files and models."""
    if word.startswith(("report/", "docs/")) or word in ("report", "FILE"):
        return str(folder / word.rpartition("/")[2])
    if word == "last.pt":
        torch.save(tiny_vit().state_dict(), folder / word)
        return str(folder / word)
    own = {"FOLDER": str(ROOT), "MODEL": "vit_tiny_patch16_224", "path/to/images": "digits"}
    return own.get(word, word.replace("my_package.models:make_model", "tests.diagnostics.nets:tiny_vit"))
