import pytest

from rdp_kernels.kernels.triton import launch, launchers
from tests.traffic.fused_adds import SMALL_TILES


@pytest.fixture(params=[None, SMALL_TILES], ids=["", "small"])
def tiles(request, monkeypatch):
    """Tiles of every kernel; None: those of the table."""
    with launchers.nothing_prepared(), monkeypatch.context() as patch:
        if request.param is not None:
            patch.setattr(launch, "CONFIGS", {op: {"default": ((2**31, request.param),)} for op in launch.CONFIGS})
        yield
