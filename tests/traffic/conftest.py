import pytest

from rdp_kernels.kernels.triton import launch
from tests.traffic.fused_adds import SMALL_TILES


@pytest.fixture(params=[None, SMALL_TILES], ids=["", "small"])
def tiles(request, monkeypatch):
    """Tiles of every kernel; None: those of the table."""
    if request.param is not None:
        monkeypatch.setattr(launch, "CONFIGS", {op: {"default": ((2**31, request.param),)} for op in launch.CONFIGS})
