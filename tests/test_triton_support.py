"""What the Triton kernels refuse: versions whose interpreter fails, and more rows than they can number."""

import importlib.metadata

import pytest
import torch

import rdp_kernels as rdp
from rdp_kernels.kernels import registered
from rdp_kernels.kernels.dispatch import resolve
from rdp_kernels.kernels.spec import Add, NextInput, Operands
from rdp_kernels.kernels.triton import launch, support
from rdp_kernels.kernels.triton.launch import CONFIGS, Tiles

from .conftest import DEVICE, INTERPRETED


@pytest.fixture
def unavailable(monkeypatch):
    """`support.unavailable()` where Triton interprets, as a function of what is installed."""

    def ask(**versions):
        def version(package):
            if package not in versions:
                raise importlib.metadata.PackageNotFoundError(package)
            return versions[package]

        monkeypatch.setenv("TRITON_INTERPRET", "1")
        monkeypatch.setattr(importlib.metadata, "version", version)
        support.unavailable.cache_clear()
        return support.unavailable()

    yield ask
    monkeypatch.undo()
    support.unavailable.cache_clear()


def test_versions_whose_interpreter_fails_are_named(unavailable):
    """Seen with 3.6.0 and numpy 2.4.6; 3.7.0 and 3.8.0 interpret with that one."""
    reason = unavailable(triton="3.6.0", numpy="2.4.6")
    assert reason == "the interpreter of triton 3.6.0 fails with numpy 2.4 or later: pip install 'numpy<2.4'"
    assert unavailable(triton="3.5.1+git1a2b3c", numpy="3.0.0rc1").startswith("the interpreter of triton 3.5.1 fails")
    assert unavailable(triton="3.6.0", numpy="2.3.5") is None
    assert unavailable(triton="3.7.0", numpy="2.4.6") is None
    assert unavailable(triton="3.10.0", numpy="2.4.6") is None
    assert unavailable(numpy="2.4.6") is None, "a triton under another name is given the benefit of the doubt"


def expanded(*shape, device=DEVICE, channels_last=False):
    """A tensor of `shape` whose samples share their memory, so that it takes almost none."""
    sample = torch.zeros(1, *shape[1:], device=device, dtype=torch.bfloat16)
    if channels_last:
        sample = sample.to(memory_format=torch.channels_last)
    return sample.expand(shape)


def case(x, channel_dim=None, norm=None):
    """A call on this residual, with γ and a norm in the given dimensions."""
    gamma = None if channel_dim is None else x.new_ones(x.shape[channel_dim])
    add = Add(channel_dim=-1 if channel_dim is None else channel_dim)
    return Operands(x, x, gamma=gamma), add, None if norm is None else NextInput(norm=norm)


TOO_MANY = {
    "channels_last, fewer channels than columns": case(expanded(2**19, 2, 64, 64, channels_last=True), 1),
    "a row a channel": case(expanded(2**30, 2, 2), 1),
    "tokens": case(expanded(2**30, 2, 2), -1),
    "norm": case(expanded(2**30, 2, 2), norm="layer"),
    "samples of one number": case(expanded(2**31, 1)),
}
FEW_ENOUGH = {
    "channels_last without γ": case(expanded(2**19, 2, 64, 64, channels_last=True)),
    "long rows of channels": case(expanded(2**19, 2, 64, 64), 1),
    "tokens without γ": case(expanded(2**30, 2, 2)),
}


@pytest.mark.parametrize("name", [*TOO_MANY, *FEW_ENOUGH])
def test_rows_are_counted_as_they_are_cut(name):
    """The compiled library numbers rows in 64 bits."""
    operands, add, next_input = (TOO_MANY | FEW_ENOUGH)[name]
    with rdp.use_backend("triton"):
        assert (resolve("op", operands, add, next_input, required=False).library is None) == (name in TOO_MANY)
        if name in TOO_MANY:
            with pytest.raises(
                RuntimeError, match="number up to 2139095040 rows of tiles, and this call has 2147483648"
            ):
                resolve("op", operands, add, next_input)
    if DEVICE == "cpu" and next_input is None and rdp.available_backends()["native"] is None:
        with rdp.use_backend("native"):
            assert resolve("op", operands, add).library == "native"


@pytest.mark.skipif(not INTERPRETED, reason="meta tensors are on no GPU")
def test_a_compiled_graph_refuses_when_it_runs():
    """Nothing reads sizes while the graph is made; the launcher checks them."""
    x = expanded(2**30, 2, 2, device="meta")
    operands, add, _ = case(x, -1)
    with pytest.raises(RuntimeError, match="residual_add_fwd: .* split the batch, or take another backend"):
        registered._forward("triton", *operands, *registered.spell(add, None), False)


@pytest.mark.parametrize("op", CONFIGS)
@pytest.mark.parametrize("width", [1, 2, 64, 384, 1024, 4096, 16384])
def test_the_last_program_stays_below_31_bits(op, width):
    for sums in (False, True):
        for whole_rows, positions in ((False, None), (True, None), (True, 96)):
            device, most = torch.device(DEVICE), launch.MAX_TILE_ROWS // 96 * 96
            tiles = Tiles.of(op, device, most, width, 2, whole_rows, sums, positions=positions)
            assert (tiles.row_blocks * tiles.tiles + 1) * tiles.block_m < 2**31, "rows are looked up one tile ahead"
    with pytest.raises(RuntimeError, match=f"{op}: "):
        Tiles.of(op, torch.device(DEVICE), launch.MAX_TILE_ROWS + 1, width, 2)


@pytest.mark.parametrize("itemsize", [2, 4, 8])
@pytest.mark.parametrize(
    ("num_rows", "width", "channels"),
    [(2**20, 768, None), (2**20, 64, None), (64 * 197, 394752, None), (2**20, 49, 2048), (4096 * 96, 56**2, 96)],
)
def test_partial_sums_are_bounded(num_rows, width, channels, itemsize):
    """For any number of rows, there are at most as many programs that sum as fit an H200, or one for each block of
    columns or channels. Together their tiles are all tiles."""
    device, most = torch.device("meta"), CONFIGS["residual_add_bwd"]["default"][0][1].programs * 132
    tiles = Tiles.of("residual_add_bwd", device, num_rows, width, itemsize, sums=True, channels=channels)
    assert most / 2 < tiles.num_programs <= max(most, tiles.column_blocks)
    blocks = -(-num_rows // tiles.block_m) if channels is None else num_rows // channels
    assert (tiles.row_blocks - 1) * tiles.tiles < blocks <= tiles.row_blocks * tiles.tiles


@pytest.mark.parametrize("itemsize", [2, 4, 8])
@pytest.mark.parametrize(("width", "positions"), [(384, 197), (768, 1), (1024, 49), (2048, 4096), (16384, 197)])
def test_partial_sums_of_a_norm_are_bounded(width, positions, itemsize):
    """As of an add. Samples are cut into tiles one by one where they are long."""
    for op in ("residual_add_norm_bwd", "residual_add_norm_bwd_wide"):
        tiles = Tiles.of(op, torch.device("meta"), 4096 * positions, width, itemsize, True, True, positions=positions)
        assert tiles.num_programs <= 4 * 132
        of_a_sample = -(-positions // tiles.block_m) if tiles.by_sample else positions / tiles.block_m
        assert (tiles.row_blocks - 1) * tiles.tiles < 4096 * of_a_sample <= tiles.row_blocks * tiles.tiles


@pytest.mark.parametrize(
    ("width", "columns"), [(197 * 384, 1024), (32784, 1024), (384, 128), (768, 256), (1000, 1024), (385, 64), (40, 64)]
)
def test_few_columns_are_idle(width, columns):
    """The widest tile of those with at most 3 % of idle columns, or else the one with the fewest."""
    assert Tiles.of("residual_add_fwd", torch.device("meta"), 4096, width, 2).block_n == columns
