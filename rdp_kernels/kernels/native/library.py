"""Loads the compiled library once. Where it is missing, everything else works without it."""

from __future__ import annotations

import importlib.metadata
import json
import sys
from pathlib import Path
from urllib.parse import urlparse
from urllib.request import url2pathname

import torch

PACKAGE = Path(__file__).parent.parent.parent
"""Where this package was imported from."""
_HOW_TO_BUILD = "with a C++ compiler: RDP_BUILD=cpu pip install --no-build-isolation . (if it fails, it says why)"
NUM_ARGUMENTS = {
    "native_residual_add": 8,
    "native_residual_add_rows": 9,
    "native_residual_add_backward": 12,
    "native_gather_rows": 2,
    "native_gather_rows_backward": 3,
    "native_has_cuda_kernels_for": 1,
    "native_fused_add": 16,
    "native_fused_add_backward": 23,
}
"""The ops of `csrc/bindings.cpp`. A library with others was built from other sources."""


def _files_in(package: Path) -> list[Path]:
    return sorted(package.glob("_C.*so")) + sorted(package.glob("_C.*pyd"))


def _elsewhere(search: list[str]) -> str:
    """A hint for errors: this checkout, which has no library, hides an installed copy that has one. Else empty."""
    for folder in search:
        package = Path(folder, PACKAGE.name).absolute()
        if _files_in(package):
            return (
                f"the copy installed in {package} has it, but {PACKAGE} was imported: "
                "run from another folder, or build it here "
            )
    return ""


def _editable() -> list[str]:
    """Folders of editable installs, which needn't be on `sys.path`."""
    found = (d.read_text("direct_url.json") for d in importlib.metadata.distributions(name=PACKAGE.name))
    return [url2pathname(urlparse(json.loads(text)["url"]).path) for text in found if text]


def _load() -> str | None:
    """Why there is no library, or None."""
    files = _files_in(PACKAGE)
    if not files:
        return f"it was not built; {_elsewhere([*sys.path, *_editable()])}{_HOW_TO_BUILD}"
    try:
        torch.ops.load_library(str(files[0]))
    except (OSError, RuntimeError) as error:
        reason = str(error).strip().partition("\n")[0]
        return f"{files[0].name} can't be loaded by torch {torch.__version__} ({reason}); build it anew {_HOW_TO_BUILD}"
    for name, count in NUM_ARGUMENTS.items():
        op = getattr(torch.ops.rdp, name, None)
        if op is None or len(op.default._schema.arguments) != count:
            return f"{files[0].name} was built from another version of this package; build it anew {_HOW_TO_BUILD}"
    return None


_reason = _load()


def unavailable() -> str | None:
    """Why no call can be served, or None."""
    return _reason


def has_kernels_for(device: torch.device) -> bool:
    """Whether the CUDA kernels were compiled for this GPU. Asks its driver."""
    return torch.cuda.is_available() and bool(torch.ops.rdp.native_has_cuda_kernels_for(device.index))


def has_cuda() -> bool:
    """Whether the library was built with CUDA kernels."""
    return _reason is None and torch._C._dispatch_has_kernel_for_dispatch_key("rdp::native_fused_add", "CUDA")
