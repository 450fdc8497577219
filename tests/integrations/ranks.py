"""Starts the ranks of a test: real processes that communicate through the loopback interface."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]


@contextlib.contextmanager
def started(command: Sequence[str], **variables: object) -> Iterator[subprocess.Popen]:
    """A process that ends with the block, its output and errors in one pipe. `variables`: of its environment."""
    given = {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **variables}
    environment = {**os.environ, **{name: str(value) for name, value in given.items()}}
    process = subprocess.Popen(
        command, env=environment, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        yield process
    finally:
        process.terminate()  # a launcher then stops its workers
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.communicate(timeout=10)
        process.kill()


def torchrun(script: Path, *arguments: str, ranks: int = 2, options: Sequence[str] = ()) -> list[str]:
    """The command that starts `script` on every rank, at a free port of this machine."""
    here = ["--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", "--local-addr=127.0.0.1"]
    launcher = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={ranks}", *here, *options]
    return [*launcher, str(script), *arguments]
