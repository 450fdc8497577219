import subprocess
import sys

import torch

import rdp_kernels as rdp
from rdp_kernels._native.library import has_cuda
from rdp_kernels.info import describe


def test_describe():
    text = describe()
    assert f"rdp_kernels  {rdp.__version__}" in text
    assert torch.__version__ in text
    for name, reason in rdp.available_backends().items():
        assert any(line.startswith(name) and (reason or "available") in line for line in text.splitlines())
    assert ("native       available, for CPUs and CUDA" in text) == has_cuda()


def test_command_and_import_cost_nothing():
    """Importing asks no GPU and imports no triton; the command prints the report."""
    script = (
        "import sys, torch, rdp_kernels; assert 'triton' not in sys.modules; assert not torch.cuda.is_initialized()"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
    shown = subprocess.run([sys.executable, "-m", "rdp_kernels.info"], check=True, capture_output=True, text=True)
    assert "eager        available" in shown.stdout
