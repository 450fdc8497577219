"""Loops of other libraries on two ranks: the integrations set up DDP, agreement and reduced communication."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from examples.libraries import installed

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["accelerate", "lightning", "transformers"])
def test_two_ranks_equal_one_process(name, tmp_path):
    """Budget: 60 seconds for each. Weights in float64, to 1e-12; transformers in two runs, of 3 and 6 steps."""
    if not installed(name):
        pytest.skip(f"{name} is not installed")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    worker = str(ROOT / "tests/integrations/loops_worker.py")
    process = subprocess.Popen(
        [*command, worker, name, str(tmp_path)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        printed, _ = process.communicate(timeout=180)
    finally:
        process.terminate()
        process.wait(30)
    assert process.returncode == 0, printed
    assert all(f"rank {rank} is right" in printed for rank in (0, 1))
