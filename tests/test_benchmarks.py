import csv
import subprocess
import sys

import pytest


@pytest.mark.slow
def test_step_quick(tmp_path):
    """Budget: 2 minutes. The command verifies, counts and times; what it needs in FLOPs is in the order it must be."""
    path = tmp_path / "step.csv"
    subprocess.run([sys.executable, "-m", "benchmarks.step", "--quick", "--csv", path], check=True)
    rows = list(csv.DictReader(path.read_text().splitlines()))
    for mode in ("block", "sample"):
        flops = {row["provider"]: float(row["gflop_vs_naive"]) for row in rows if row["mode"] == mode}
        assert flops["ours branch-frozen"] < flops["ours exact"] < 0.8 < flops["naive"] == flops["plain"] == 1.0
        assert all(float(row["min_ms"]) <= float(row["median_ms"]) for row in rows)
