"""Converted models under copies, pickles, compilers and checkpoints."""

import copy
import io
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import rdp_kernels as rdp
from examples.libraries import import_torchvision, installed
from rdp_kernels.paths.path import CONVERTED

from . import nets
from .nets import tokens

ROOT = Path(__file__).parents[2]


@pytest.fixture
def model():
    model = nets.tokens_net(nets.Block, nets.Shared, nets.Concat)
    rdp.convert(model, example_inputs=tokens())
    return model


def seeded(model, x):
    torch.manual_seed(3)
    return model(x)


def test_nothing_visible_from_outside_changes(model):
    plain = nets.tokens_net(nets.Block, nets.Shared, nets.Concat)
    assert list(model.state_dict()) == list(plain.state_dict())
    assert [name for name, _ in model.named_modules()] == [name for name, _ in plain.named_modules()]
    assert [type(m).__qualname__ for m in model.modules()] == [type(m).__qualname__ for m in plain.modules()]
    assert isinstance(model.blocks[0], nets.Block)
    assert repr(model) == repr(plain)
    plain.load_state_dict(model.state_dict(), strict=True)
    rdp.revert(model)
    assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]
    assert all(vars(a).keys() == vars(b).keys() for a, b in zip(model.modules(), plain.modules(), strict=True))


def test_conversion_leaves_numbers_modes_and_generators_alone():
    model = nets.image_net()
    model.blocks[1].eval()
    before, modes, state = (
        copy.deepcopy(model.state_dict()),
        [m.training for m in model.modules()],
        torch.get_rng_state(),
    )
    rdp.convert(model, example_inputs=nets.images())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items()), "BatchNorm's too"
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in model.parameters())


def test_copies_are_converted_and_have_no_scheme(model):
    scheme = rdp.ResidualDropPath(model, 0.5)
    expected = seeded(model, tokens())
    copied = copy.deepcopy(model)
    assert torch.equal(seeded(copied, tokens()), expected)
    for block, other in zip(model.blocks, copied.blocks, strict=True):
        assert type(other) is type(block)
        for (_, path), (_, twin) in zip(block.__dict__[CONVERTED], other.__dict__[CONVERTED], strict=True):
            assert twin.block is other
            assert path.binding.scheme is scheme
            assert twin.binding.scheme is None
    with scheme.drop_iteration(plan=rdp.PathPlan(torch.zeros(5, dtype=torch.bool), [0.5] * 5, "block")):
        assert not torch.equal(seeded(copied, tokens()), model(tokens())), "a copy has masks of its own"
    with pytest.raises(RuntimeError, match="a scheme has paths of this model"):
        rdp.revert(model)
    scheme.remove()
    rdp.revert(model)
    rdp.ResidualDropPath(copied, 0.5)


def test_a_pickle_opens_in_another_process(model, tmp_path):
    torch.save(model, tmp_path / "model.pt")
    torch.save(seeded(model, tokens()).detach(), tmp_path / "out.pt")
    script = """
import sys, torch
import rdp_kernels as rdp
model = torch.load(sys.argv[1] + "/model.pt", weights_only=False)
from tests.convert.nets import Block, tokens
torch.manual_seed(3)
assert torch.equal(model(tokens()), torch.load(sys.argv[1] + "/out.pt")), "another output"
assert type(model.blocks[0]) is not Block and isinstance(model.blocks[0], Block)
assert len(rdp.ResidualDropPath(model, 0.5).paths) == 5
torch.save(model, sys.argv[1] + "/again.pt")
rdp.ResidualDropPath(torch.load(sys.argv[1] + "/again.pt", weights_only=False), 0.5)
"""
    done = subprocess.run([sys.executable, "-c", script, tmp_path], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_equal_blocks_share_a_class():
    model = nets.tokens_net(nets.Block, nets.Block)
    rdp.convert(model, example_inputs=tokens())
    assert type(model.blocks[0]) is type(model.blocks[1])
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    assert type(torch.load(buffer, weights_only=False).blocks[0]) is type(model.blocks[0])


@pytest.mark.parametrize("training", [False, True])
def test_each_block_compiles_to_one_graph(model, training):
    model.train(training)
    for module in model.modules():
        if isinstance(module, nets.DropPath):
            module.drop_prob = 0.0
    x = tokens()
    for block in model.blocks:
        torch._dynamo.reset()
        compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), block(x))


def test_compiled_it_drops_whole_rows_at_its_rate():
    block = nets.tokens_net(nets.Concat).blocks[0]
    model = nets.Net(block)
    rdp.convert(model, drop_prob=0.25, example_inputs=tokens())
    torch._dynamo.reset()
    compiled = torch.compile(model.blocks[0], fullgraph=True, backend="aot_eager")
    x = tokens(400)
    half = block.out.weight[:, : nets.DIM]
    rest = compiled(x) - block.out.bias - x @ half.T
    kept = rest.abs().amax((1, 2)) > 1e-5
    branch = block.fn(x) @ block.out.weight[:, nets.DIM :].T
    torch.testing.assert_close(rest[kept], branch[kept] / 0.75, rtol=1e-4, atol=1e-5)
    assert 0.65 < kept.float().mean() < 0.85


def test_export_works_after_revert_and_in_eval(model):
    model.eval()
    expected = model(tokens())
    rdp.revert(model)
    program = torch.export.export(model, (tokens(),))
    torch.testing.assert_close(program.module()(tokens()), expected)


def record_by(name, model):
    if name == "fx":
        return torch.fx.symbolic_trace(model)
    if name == "export":
        return torch.export.export(model, (tokens(),)).module()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*torch.jit", category=DeprecationWarning)
        return torch.jit.script(model) if name == "script" else torch.jit.trace(model, tokens(), check_trace=False)


@pytest.mark.parametrize("name", ["fx", "script", "trace", "export"])
def test_recorded_in_eval_mode_as_the_original(name):
    model = nets.Net(nets.Shared(), nets.Concat(), nets.Between(), nets.Plain())
    for block in model.blocks[:3]:
        block.drop_path = rdp.DropPath(0.2)  # scripts take it
    x, expected = tokens(), model.eval()(tokens())
    rdp.convert(model, drop_prob=0.5, example_inputs=x)
    torch.testing.assert_close(record_by(name, model)(x), expected)


@pytest.mark.parametrize("name", ["fx", "trace"])
def test_recorded_in_training_it_draws_in_the_graph(name):
    model = nets.Net(nets.Shared(), nets.Concat(), nets.Plain())
    rdp.convert(model, drop_prob=0.5, example_inputs=tokens())
    recorded, x = record_by(name, model), tokens(40)
    torch.testing.assert_close(seeded(recorded, x), seeded(model, x))
    scheme = rdp.ResidualDropPath(model)
    pair = scheme.iterations()
    next(pair)
    with pytest.raises(RuntimeError, match="drop iteration that is open"):
        record_by(name, model)


@pytest.mark.skipif(not installed("torchvision"), reason="torchvision is not installed")
def test_torchvisions_feature_extractor():
    """The extractor records the model in both modes, and leaves its mode unchanged."""
    import_torchvision()
    from torchvision.models.feature_extraction import create_feature_extractor

    model, x = nets.Net(nets.Shared(), nets.Concat()), tokens()
    rdp.convert(model, drop_prob=0.5, example_inputs=x)
    extract = create_feature_extractor(model, {"blocks.0": "feature"}, suppress_diff_warning=True)
    assert model.training
    torch.testing.assert_close(extract.eval()(x)["feature"], model.eval().blocks[0](model.stem(x)))
    scheme = rdp.ResidualDropPath(model)
    pair = scheme.iterations()
    next(pair)
    with pytest.raises(RuntimeError, match="drop iteration that is open"):
        create_feature_extractor(model, ["blocks.0"])


def test_fx_knows_no_shapes_to_compare():
    model = nets.Net(nets.Sizes(0.0))
    rdp.convert(model, example_inputs=tokens())
    assert type(model.blocks[0])._rdp_recipe.inputs is not None
    raises = pytest.raises(torch.fx.proxy.TraceError)  # as with the original, which has an `if` over sizes
    with raises, pytest.warns(UserWarning, match="its inputs have no shape while torch.fx records it"):
        record_by("fx", model)


def test_a_script_in_training_is_refused(model):
    with pytest.raises(RuntimeError, match=r"torch.jit.script compiles Block as it was .*rdp.revert\(model\)"):
        record_by("script", model)
    rdp.revert(model)
    model.blocks[1].drop_path = rdp.DropPath(0.2)
    record_by("script", model.blocks[1])


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_gives_the_same_gradients(model, use_reentrant):
    class Checkpointed(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, x):
            x = self.model.stem(x)
            for block in self.model.blocks:
                x = checkpoint(block, x, use_reentrant=use_reentrant)
            return self.model.head(x.mean(1))

    def grads(run):
        model.zero_grad()
        seeded(run, tokens()).sum().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    expected, actual = grads(model), grads(Checkpointed(model))
    assert expected.keys() == actual.keys()
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, msg=name)


def test_functional_call(model):
    parameters = {name: 2 * p.detach() for name, p in model.named_parameters()}
    doubled = copy.deepcopy(model)
    doubled.load_state_dict(parameters)
    torch.manual_seed(3)
    actual = torch.func.functional_call(model, parameters, (tokens(),))
    torch.testing.assert_close(actual, seeded(doubled, tokens()))


def test_autocast(model):
    scheme = rdp.ResidualDropPath(model, 0.5, mode="sample", seed=2)
    for _ in scheme.iterations(6):
        with torch.autocast("cpu", torch.bfloat16):
            out = model(tokens())
        out.float().sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_tensors_beside_the_residual():
    """A bias for all samples is passed on; an argument with a row for each sample is gathered."""
    torch.manual_seed(0)
    block, x = nets.Block(0.4).double(), tokens(dtype=torch.float64)
    bias, context = torch.randn(6, nets.DIM).double(), torch.randn(6, nets.DIM).double()

    class Caller(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = block

        def forward(self, x, bias, context):
            return self.block(x, bias, context=context)

    model = Caller().train()
    original = copy.deepcopy(model)
    # with six samples the bias' rows would look like those of samples
    report = rdp.convert(model, example_inputs=(x[:5], bias, context[:5]))
    assert not report.refused, str(report)
    scheme = rdp.ResidualDropPath(model, 0.4, mode="sample", freeze="none", seed=1)
    with scheme.drop_iteration(6):
        keep = scheme.plan.keep.double() / 0.6
        out = model(x, bias, context)
    for path, factor in zip(("drop_path1", "drop_path2"), keep, strict=True):
        original.block.get_submodule(path).forward = lambda y, factor=factor: y * factor[:, None, None]
    torch.testing.assert_close(out, original(x, bias, context), rtol=1e-12, atol=1e-12)


def test_the_report_is_a_table():
    model = nets.image_net()
    report = rdp.convert(model, example_inputs=nets.images())
    text = str(report)
    for part in ("blocks.0", "Conv", "drop_path", "0.200", "BatchNorm", "2 paths in 2 blocks converted"):
        assert part in text, text
    assert len(report.converted) == 2
    assert report.summary() in text


def test_the_source_is_there_to_read(model):
    import inspect

    recipe = type(model.blocks[1])._rdp_recipe
    assert "run_path(" in recipe.source
    source = inspect.getsource(type(model.blocks[1])._rdp_branches[0])
    assert "self.fn1(" in source, source
