import pytest

from rdp_kernels.kernels.triton import launch
from tests.traffic.fused_adds import SMALL_TILES


@pytest.fixture(params=[None, SMALL_TILES], ids=["", "small"])
def tiles(request, monkeypatch):
    """Those of every kernel; None: as the table has them."""
    if request.param is not None:
        monkeypatch.setattr(launch, "CONFIGS", {op: {"default": ((2**31, request.param),)} for op in launch.CONFIGS})
