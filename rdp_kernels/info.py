"""`python -m rdp_kernels.info` prints the place, versions, devices, and which backends are missing and why."""

from __future__ import annotations

import importlib.metadata
import platform

import torch

from . import __version__, available_backends
from .kernels.native.library import PACKAGE, has_cuda


def describe() -> str:
    """The report as text, one fact per line."""
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = "not installed"
    lines = [
        f"rdp_kernels  {__version__}, imported from {PACKAGE}",
        f"python       {platform.python_version()} on {platform.system()} {platform.machine()}",
        f"torch        {torch.__version__}, CUDA {torch.version.cuda or 'none'}, {torch.get_num_threads()} threads",
        f"triton       {triton}",
    ]
    devices = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    lines += [f"device {index}     {name}" for index, name in enumerate(devices)] or ["devices      CPU only"]
    for name, reason in available_backends().items():
        lines.append(f"{name:12} {'available' if reason is None else 'missing: ' + reason}")
        if name == "native" and reason is None:
            lines[-1] += ", for CPUs and CUDA" if has_cuda() else ", for CPUs (built without CUDA)"
        if name == "triton" and reason is not None and not devices:
            lines[-1] += " (only a GPU needs it)"
    return "\n".join(lines)


if __name__ == "__main__":
    print(describe())
