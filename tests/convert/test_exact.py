"""Converted blocks against the original blocks with the masks of a plan, in float64."""

import copy
import itertools

import pytest
import torch
from torch import nn

import rdp_kernels as rdp
from rdp_kernels.convert.libraries import is_drop_path

from . import nets

NETS = {block.__name__: (lambda block=block: nets.tokens_net(block, block), nets.tokens) for block in nets.TOKENS}
NETS["Conv"] = (nets.image_net, nets.images)
MODES = [("block", "parameters"), ("block", "branch"), ("sample", "parameters"), ("sample", "none")]


def masked(model, scheme, keep, scales):
    """A copy of the original in which the call of every drop-path multiplies by its path's mask and scale."""
    model = copy.deepcopy(model)
    factors = {}
    for path, row, scale in zip(scheme.paths, keep, scales, strict=True):
        name = path.name.rpartition(".")[0] + "." + path.module.spec.drop_path
        factors.setdefault(name, []).append(row.double() * scale)
    for name, given in factors.items():
        assert is_drop_path(name.rpartition(".")[2], model.get_submodule(name))
        turns = itertools.cycle(given)

        def forward(x, turns=turns):
            factor = next(turns)
            factor = factor.repeat_interleave(len(x) // len(factor))  # windows of a sample are neighbours
            return x * factor.reshape(-1, *[1] * (x.dim() - 1)).to(x.dtype)

        model.get_submodule(name).forward = forward
    return model


def eval_batch_norms(model):
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()


def gradients(model, x):
    model.zero_grad(set_to_none=True)
    loss = model(x).square().sum()
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(("mode", "freeze"), MODES)
@pytest.mark.parametrize("name", NETS)
def test_two_iterations_equal_the_textbook(name, mode, freeze):
    make, data = NETS[name]
    original = make().double()
    eval_batch_norms(original)
    x = data(dtype=torch.float64)
    model = copy.deepcopy(original)
    report = rdp.convert(model, example_inputs=x)
    assert not report.refused, str(report)
    whole = any(row.foreign_rows for row in report)
    if mode == "sample" and freeze == "parameters" and name == "Conv":
        with pytest.raises(ValueError, match="BatchNorm"):
            rdp.ResidualDropPath(model, 0.4, mode=mode)
        return
    scheme = rdp.ResidualDropPath(model, 0.4, mode=mode, freeze=freeze, seed=3)
    for step in range(3):
        for phase in scheme.iterations(len(x)):
            keep = scheme.plan.keep if mode == "sample" else scheme.plan.keep[:, None].expand(-1, len(x))
            ones = torch.ones_like(keep)
            loss, grads = gradients(model, x)
            if phase == "drop":
                expected_loss, expected = gradients(masked(original, scheme, keep, [1 / 0.6] * len(keep)), x)
                torch.testing.assert_close(loss, expected_loss, rtol=1e-10, atol=1e-10)
                assert_close_or_absent(grads, expected, keep, scheme)
                continue
            expected_loss, expected = gradients(masked(original, scheme, ones, [1.0] * len(keep)), x)
            torch.testing.assert_close(loss, expected_loss, rtol=1e-10, atol=1e-10)
            if freeze == "none":
                assert_close_or_absent(grads, expected, ones, scheme)
            elif freeze == "parameters" and (mode == "block" or whole):
                assert set(grads) == learning_names(model, scheme, ~keep)
                for key, value in grads.items():
                    torch.testing.assert_close(value, expected[key], rtol=1e-10, atol=1e-10, msg=f"{step} {key}")


def learning_names(model, scheme, dropped):
    learning = {id(p) for path, row in zip(scheme.paths, dropped, strict=True) if row.any() for p in path.parameters()}
    return {name for name, p in model.named_parameters() if id(p) in learning}


def assert_close_or_absent(grads, expected, keep, scheme):
    """A path that no sample keeps has no gradients where the textbook's are zeros."""
    for key, value in expected.items():
        if key in grads:
            torch.testing.assert_close(grads[key], value, rtol=1e-10, atol=1e-10, msg=key)
        else:
            assert not value.any()
    assert set(grads) <= set(expected)


@pytest.mark.parametrize("name", NETS)
def test_alone_it_is_ordinary_stochastic_depth(name):
    """At rate 0 the forward is the original's; at rate 1 − ε no branch runs or gets a gradient."""
    make, data = NETS[name]
    original, x = make().double(), data(dtype=torch.float64)
    eval_batch_norms(original)
    model = copy.deepcopy(original)
    rdp.convert(model, example_inputs=x)
    for module in (*model.modules(), *original.modules()):
        if isinstance(module, nets.DropPath):
            module.drop_prob = 0.0
    torch.testing.assert_close(model(x), original(x), rtol=1e-12, atol=1e-12)
    assert torch.equal(model.eval()(x), original.eval()(x)), "bitwise in eval mode"


def test_dropped_branches_are_not_computed():
    model = nets.tokens_net(nets.Block, nets.Concat)
    rdp.convert(model, example_inputs=nets.tokens())
    seen = []
    for name, module in model.named_modules():
        if name.endswith(("mlp", "fn", "proj")):
            module.register_forward_hook(lambda m, a, out: seen.append(len(out)))
    scheme = rdp.ResidualDropPath(model, 0.5, mode="sample", freeze="none")
    keep = torch.tensor([[1, 0, 1, 0, 0, 0], [0] * 6, [0, 0, 0, 0, 1, 1]], dtype=torch.bool)
    with scheme.drop_iteration(6, plan=rdp.PathPlan(keep, [0.5] * 3, "sample")):
        model(nets.tokens())
    assert seen == [2, 2]


def test_a_block_that_returns_its_input_survives_what_works_in_place_behind_it():
    """ReLU in place must not change the input of a block whose branch was dropped: the user may have kept it."""
    model = nets.image_net()
    rdp.convert(model, example_inputs=nets.images())
    scheme = rdp.ResidualDropPath(model, 0.5)
    features = []
    model.stem.register_forward_hook(lambda m, a, out: features.append((out, out.detach().clone())))
    with scheme.drop_iteration(plan=rdp.PathPlan(torch.tensor([False, False]), [0.5, 0.5], "block")):
        model(nets.images()).sum().backward()
    kept, copied = features[0]
    assert torch.equal(kept, copied)


def test_without_drop_path_the_graph_tells_where_a_branch_is():
    model, x = nets.tokens_net(nets.Plain, nets.Plain), nets.tokens()
    expected = model(x)
    assert not rdp.convert(model, example_inputs=x).rows
    report = rdp.convert(model, drop_prob=0.3, example_inputs=x)
    assert [(row.block, row.name) for row in report] == [
        ("blocks.0", "add_fn"), ("blocks.0", "add_proj"), ("blocks.1", "add_fn"), ("blocks.1", "add_proj"),
    ]  # fmt: skip
    scheme = rdp.ResidualDropPath(model)
    assert [path.drop_prob for path in scheme.paths] == [0.3] * 4
    with scheme.drop_iteration(plan=rdp.PathPlan(torch.ones(4, dtype=torch.bool), [0.0] * 4, "block")):
        torch.testing.assert_close(model(x), expected)
    blocks = model.blocks
    with scheme.drop_iteration(plan=rdp.PathPlan(torch.tensor([True, False, False, False]), [0.5] * 4, "block")):
        stem = model.stem(x)
        branch = blocks[0].fn(blocks[0].norm(stem))
        torch.testing.assert_close(blocks[1](blocks[0](stem)), stem + 2 * branch)


def test_branches_that_end_in_the_same_module_are_paths_of_their_own():
    """transformers' ViT has one Dropout for both of its branches."""

    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention, self.mlp = nn.Linear(nets.DIM, nets.DIM), nets.mlp()
            self.dropout = nn.Dropout(0.0)

        def forward(self, x):
            x = self.dropout(self.attention(x)) + x
            return self.dropout(self.mlp(x)) + x

    model, x = nets.tokens_net(Layer, Layer), nets.tokens()
    report = rdp.convert(model, drop_prob=0.5, example_inputs=x)
    assert [row.name for row in report] == ["add_dropout", "add_dropout:1"] * 2
    scheme = rdp.ResidualDropPath(model)
    assert len(scheme.paths) == 4
    with scheme.drop_iteration(plan=rdp.PathPlan(torch.tensor([True, False] * 2), [0.5] * 4, "block")):
        stem = model.stem(x)
        out = model.blocks[0](stem)
        torch.testing.assert_close(out, stem + 2 * model.blocks[0].attention(stem))
        torch.testing.assert_close(model.blocks[1](out), out + 2 * model.blocks[1].attention(out))


def test_blocks_of_dinov2_at_each_of_their_rates():
    x = nets.tokens()
    model = nets.tokens_net(nets.DinoBlock(0.0), nets.DinoBlock(0.0))
    expected = model(x)
    report = rdp.convert(model, drop_prob=0.3, strict=True, example_inputs=x)
    assert [row.name for row in report] == ["add_attn", "add_mlp"] * 2
    scheme = rdp.ResidualDropPath(model)
    with scheme.drop_iteration(plan=rdp.PathPlan(torch.ones(4, dtype=torch.bool), [0.0] * 4, "block")):
        torch.testing.assert_close(model(x), expected)
    model = nets.tokens_net(nets.DinoBlock(0.05))
    report = rdp.convert(model, strict=True, example_inputs=x)
    assert [row.name for row in report] == ["drop_path1", "drop_path1:1"]
    model = nets.tokens_net(nets.DinoBlock(0.3))
    report = rdp.convert(model, example_inputs=x)
    assert all("depends on" in row.refused or "can't be traced" in row.refused for row in report), str(report)
    assert len(report.refused) == 2
