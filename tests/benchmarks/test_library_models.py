"""timm's networks in the benchmarks: which drop-path belongs to which path, and messages without timm."""

import pytest
import torch

import rdp_kernels as rdp
from benchmarks import library_models
from benchmarks.cases import CPU, DTYPES, FULL, MODELS, TINY, VERIFIED, draw_plans, step_case
from benchmarks.harness import Session
from benchmarks.machine import Ceilings, Device
from benchmarks.pairs import TRAINERS, DropPath
from benchmarks.step import DEFAULTS, choices_of

LIBRARY = tuple(library_models.NAMES)
needs_timm = pytest.mark.skipif(library_models.missing() is not None, reason="needs timm")


@needs_timm
@pytest.mark.parametrize("model", LIBRARY)
def test_branches_are_the_paths_of_the_converted_network(model):
    """By names and by parameters, as `BRANCHES` and `rdp.convert` are written independently."""
    network = TINY[model].network(CPU)
    names = network.names
    parts = [{id(p) for p in part.parameters} for part in network.branches]
    network.prepare(TINY[model].data(CPU)[0][:2])
    scheme = rdp.ResidualDropPath(network.model, 0.5)
    assert [path.name for path in scheme.paths] == names
    assert [{id(p) for p in path.parameters()} for path in scheme.paths] == parts
    everything = [*network.rest.parameters, *(p for part in network.branches for p in part.parameters)]
    assert sorted(map(id, everything)) == sorted(map(id, network.model.parameters()))


@needs_timm
@pytest.mark.parametrize("model", LIBRARY)
def test_an_end_is_put_to_its_own_branch(model):
    """With end l cut off, no gradient reaches the parameters of branch l, and those of all other branches get one."""
    network = TINY[model].network(CPU)
    images, _ = TINY[model].data(CPU)
    for cut in range(len(network.branches)):
        ends = [torch.detach if branch == cut else torch.clone for branch in range(len(network.branches))]
        network.with_ends(images, ends).square().sum().backward()
        reached = [all(p.grad is not None for p in part.parameters) for part in network.branches]
        assert reached == [branch != cut for branch in range(len(network.branches))]
        assert all(p.grad is None for p in network.branches[cut].parameters)
        network.model.zero_grad()
    with torch.no_grad():
        assert torch.equal(network(images), network.with_ends(images, [torch.clone] * len(network.branches)))


@needs_timm
def test_plain_is_the_network_that_timm_makes():
    torch.manual_seed(0)
    expected = library_models.create("resnet-50", num_classes=10, **library_models.SMALL["resnet-50"])
    network, images = TINY["resnet-50"].network(CPU), TINY["resnet-50"].data(CPU)[0]
    assert network.model.state_dict().keys() == expected.state_dict().keys()
    torch.testing.assert_close(network(images), expected(images))


@needs_timm
def test_vit_small_has_its_real_size():
    model = library_models.create("vit-s")
    assert sum(p.numel() for p in model.parameters()) == 22050664
    assert len(library_models.Library("vit-s", model).branches) == 24


@needs_timm
def test_a_model_is_checked_once(monkeypatch):
    """The self-check of a conversion takes longer than the conversion, and every trainer converts."""
    asked, convert = [], rdp.convert
    monkeypatch.setattr(library_models, "checked", set())
    monkeypatch.setattr(
        rdp, "convert", lambda *args, check, **options: asked.append(check) or convert(*args, **options)
    )
    for model in ("vit-s", "vit-s", "convnext-t", "vit-s"):
        config = TINY[model]
        config.network(CPU).prepare(config.data(CPU)[0][:2])
    assert asked == [True, False, True, False]


@needs_timm
def test_bf16_is_by_autocast():
    """Weights and gradients are float32; results without autocast differ by rounding."""
    gradients = {}
    for name, autocast in DTYPES.items():
        trainer = TINY["vit-s"].trainer(DropPath, "sample", CPU, autocast)
        seen = []
        trainer.network.places[0][0].attn.qkv.register_forward_hook(lambda m, a, out, seen=seen: seen.append(out.dtype))
        next(trainer.pair(draw_plans(len(trainer.network.branches), 6, 1, "sample", 0.5)[0]))
        assert seen == [torch.bfloat16 if autocast else torch.float32]
        gradients[name] = trainer.model.head.weight.grad
    assert {g.dtype for g in gradients.values()} == {torch.float32}
    difference = (gradients["bf16"] - gradients["float32"]).abs().max()
    assert 0 < difference < 0.02 * gradients["float32"].abs().max()


def test_without_timm_rows_say_so(monkeypatch):
    monkeypatch.setattr(library_models, "installed", lambda name: False)
    monkeypatch.setattr(Device, "ceilings", lambda self: Ceilings(1e11, 1e10))
    session = Session(Device.of("cpu"), turns=2)
    session.measure(step_case("tiny", "swin-t", "block", 0.5, turns=2))
    assert [row["provider"] for row in session.rows] == [kind.name for kind in TRAINERS]
    assert {row["unavailable"] for row in session.rows} == {"timm is not installed"}
    assert {row["p50_ms"] for row in session.rows} == {None}
    session.measure(step_case("tiny", "vit", "block", 0.5, turns=2))
    measured = session.rows[-len(TRAINERS) :]
    assert all(row["p50_ms"] > 0 and row.keys() == session.rows[0].keys() for row in measured)


def test_every_model_has_all_sizes():
    assert set(TINY) == set(VERIFIED) == set(FULL["cpu"]) == set(FULL["cuda"]) == set(MODELS)
    assert all(set(models) <= set(MODELS) for models in DEFAULTS.values())
    assert ("vit-b", "block", 0.3) in choices_of("cuda")
    assert choices_of("cpu", ["swin-t"], ["block"]) == [("swin-t", "block", p) for p in (0.1, 0.3, 0.5)]
    assert choices_of("cpu", ["vit-s"]) == [("vit-s", "block", 0.3), ("vit-s", "sample", 0.3)]
    assert choices_of("tiny", ["vit-b"], probs=[0.2]) == [("vit-b", "block", 0.2), ("vit-b", "sample", 0.2)]
