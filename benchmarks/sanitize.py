"""`python -m benchmarks sanitize`: runs the fixed table of kernel tests under NVIDIA's compute-sanitizer, on a GPU.

memcheck finds accesses out of bounds, racecheck finds races in shared memory, and initcheck finds reads of memory that
was never written.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys

import torch

from rdp_kernels.kernels.triton.launch import CONFIGS

from .command import NO_GPU
from .machine import ROOT

TOOLS = ("memcheck", "racecheck", "initcheck")
TESTS = "tests/kernels/test_fixed.py"  # all of tests/kernels would compile over a thousand kernels


def add_command(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("sanitize", help="the fixed table under compute-sanitizer", description=__doc__)
    parser.add_argument("--tool", nargs="+", choices=TOOLS, default=TOOLS, help=f"default: {' '.join(TOOLS)}")
    parser.add_argument("--tests", nargs="+", default=[TESTS], metavar="PATH", help=f"default: {TESTS}")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Returns 1 if a tool finds something or a test fails."""
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None or not torch.cuda.is_available():
        reason = NO_GPU if sanitizer else "compute-sanitizer isn't on the PATH; it comes with the CUDA toolkit"
        print(f"can't sanitize: {reason}", file=sys.stderr)
        return 2
    failed = []
    for tool in options.tool:
        print(f"== {tool}", flush=True)
        command = [sanitizer, "--tool", tool, "--error-exitcode", "1", *filters(tool)]
        # go on after warnings and some failures: this takes minutes, and should report as much as it can
        command += [sys.executable, "-m", "pytest", "-W", "default", "--maxfail=5", *options.tests]
        # torch's allocator would hide accesses out of bounds, as it gives out pieces of large blocks
        environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "TRITON_INTERPRET": "0"}
        if subprocess.run(command, env=environment, cwd=ROOT).returncode:
            failed.append(tool)
    print(f"failed: {', '.join(failed)}" if failed else "nothing found")
    return 1 if failed else 0


def filters(tool: str) -> list[str]:
    """Returns options that check only our kernels, to save time. initcheck must see torch's kernels too, as they write
    the inputs of ours."""
    if tool == "initcheck":
        return []
    return [part for op in CONFIGS for part in ("--kernel-name", f"kernel_substring=_{op}_kernel")]
