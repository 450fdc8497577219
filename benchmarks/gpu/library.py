"""`python -m benchmarks.gpu.library`: builds the compiled library if there is none for this machine.

A library in the copy of the tree is used as it is, unless this machine has a GPU and the library has no CUDA kernels.
"""

from __future__ import annotations

import os
import subprocess
import sys

import torch

from rdp_kernels.kernels.native.library import has_cuda, unavailable

from ..machine import ROOT


def main() -> int:
    on_gpu = torch.cuda.is_available()
    reason = unavailable() or ("it has no CUDA kernels" if on_gpu and not has_cuda() else None)
    if reason is None:
        print("the library is there" + (", with CUDA kernels" if has_cuda() else ""))
        return 0
    print(f"building: {reason}", flush=True)
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    code = subprocess.run(command, cwd=ROOT, env=os.environ | {"RDP_BUILD": "cuda" if on_gpu else "cpu"}).returncode
    print("the library was built" if code == 0 else "the library couldn't be built")
    return code


if __name__ == "__main__":
    sys.exit(main())
