"""Where torch's add promotes dtypes, a converted block's result has torch's dtype and numbers, in any kind of
iteration.

The drop scale is 2, so that masks round nothing, and a kept branch's sum equals the original's to the bit.
"""

import contextlib
import copy
import itertools

import pytest
import torch
from torch import nn
from torch.utils import checkpoint as ckpt

import rdp_kernels as rdp
from examples.libraries import import_torchvision
from rdp_kernels.integrations.compile_whole import compile_whole
from rdp_kernels.paths.call import PathCall
from rdp_kernels.paths.decision import SKIP, Decision
from rdp_kernels.paths.path import paths_of

from . import nets
from .test_exact import masked

DIM, SMALL = nets.DIM, 1e-3


class Conv(nn.Conv2d):
    """Computes in the dtype of its weights, as in models that were cast in part."""

    def forward(self, x):
        return super().forward(x.to(self.weight.dtype))


class Scaled(nn.Module):
    """A float32 γ after a convolution that autocast runs in 16 bits."""

    def __init__(self, drop_prob):
        super().__init__()
        self.conv, self.gamma = Conv(DIM, DIM, 3, padding=1), nn.Parameter(torch.full((DIM, 1, 1), SMALL))
        self.drop_path = nets.DropPath(drop_prob)

    def forward(self, x):
        return x + self.drop_path(self.gamma * self.conv(x))


class Normed(nn.Module):
    """BatchNorm and dropout in the branch, and a ReLU in place after the add."""

    def __init__(self, drop_prob):
        super().__init__()
        self.conv, self.norm, self.drop = Conv(DIM, DIM, 1), nn.BatchNorm2d(DIM), nn.Dropout(0.0)
        self.gamma, self.drop_path = nn.Parameter(torch.rand(DIM, 1, 1)), nets.DropPath(drop_prob)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x):
        return self.act(self.drop_path(self.drop(self.norm(self.conv(x))) * self.gamma) + x)


class Bare(nn.Module):
    """Returns the update: there is no add."""

    def __init__(self, drop_prob):
        super().__init__()
        self.conv, self.drop_path = nn.Conv2d(DIM, DIM, 1), nets.DropPath(drop_prob)

    def forward(self, x):
        return self.drop_path(self.conv(x))


class IntoBranch(Bare):
    """The sum has the update's dtype and is rounded to it once."""

    def forward(self, x):
        out = self.drop_path(self.conv(x))
        out += x
        return out


class IntoResidual(Scaled):
    """The narrower residual keeps its dtype, and so does the tensor that is multiplied in place."""

    def __init__(self, drop_prob):
        super().__init__(drop_prob)
        self.stem = nn.Conv2d(DIM, DIM, 1)

    def forward(self, x):
        x = self.stem(x)
        y = self.conv(x + 1)  # it saves no x
        y *= self.gamma
        x += self.drop_path(self.gamma * y)
        return x


class Widening(nn.Module):
    """A part of the branch computes in float64 by itself."""

    def __init__(self, drop_prob):
        super().__init__()
        self.conv, self.drop_path = nn.Conv2d(DIM, DIM, 1), nets.DropPath(drop_prob)

    def forward(self, x):
        return x + self.drop_path(self.conv(x).double())


class Net(nn.Sequential):
    """A stem, whose output has 16 bits under autocast, and blocks."""

    def __init__(self, *blocks):
        super().__init__(nn.Conv2d(3, DIM, 1), *blocks)


def converted(*blocks, dtype=torch.float32, drop_prob=0.5):
    torch.manual_seed(0)
    original = Net(*(block(drop_prob) for block in blocks)).train().to(dtype)
    for name, parameter in original.named_parameters():
        if name.endswith("gamma"):
            parameter.data = parameter.data.float()
    model = copy.deepcopy(original)
    report = rdp.convert(model, example_inputs=nets.images().to(dtype))
    assert not report.refused, str(report)
    return original, model


def autocast(dtype):
    return torch.autocast("cpu", dtype)


WORLDS = {
    "bf16 autocast": (torch.float32, lambda: autocast(torch.bfloat16)),
    "fp16 autocast": (torch.float32, lambda: autocast(torch.float16)),
    "bf16 weights, float32 gamma": (torch.bfloat16, contextlib.nullcontext),
}
PLANS = {"kept": [1, 1], "dropped": [0, 0], "the first dropped": [0, 1], "the last dropped": [1, 0]}
ROWS = [[1, 0, 1, 1, 0, 0], [0, 0, 1, 0, 1, 1]]


def run(model, x, around):
    """The output, and the gradient at the input, which has the input residual's dtype."""
    x = x.clone().requires_grad_()
    with around():
        out = model(x)
    out.float().square().sum().backward()
    return out.detach(), x.grad


@pytest.mark.parametrize("freeze", ["parameters", "branch"])
@pytest.mark.parametrize("world", WORLDS)
def test_whole_branches_in_both_iterations(world, freeze):
    dtype, around = WORLDS[world]
    x = nets.images().to(dtype)
    for keep in PLANS.values():
        original, model = converted(Scaled, Scaled, dtype=dtype)  # new ones, so that the first call drops branches too
        scheme = rdp.ResidualDropPath(model, 0.5, freeze=freeze)
        plan = rdp.PathPlan(torch.tensor(keep, dtype=torch.bool), [0.5, 0.5], "block")
        for phase in scheme.iterations(plan=plan):
            drops = phase == "drop"
            out, grad = run(model, x, around)
            rows = plan.keep[:, None].expand(-1, len(x)) if drops else torch.ones(2, len(x))
            expected, expected_grad = run(masked(original, scheme, rows, [2.0 if drops else 1.0] * 2), x, around)
            assert out.dtype == expected.dtype == torch.float32
            assert torch.equal(out, expected), (keep, phase)
            if drops or freeze == "parameters":
                torch.testing.assert_close(grad, expected_grad, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("freeze", ["parameters", "branch", "none"])
@pytest.mark.parametrize("world", WORLDS)
def test_some_rows(world, freeze):
    """Kept rows, and learning and frozen rows in one add; BatchNorm on the whole batch with masks, where nothing is
    frozen."""
    dtype, around = WORLDS[world]
    x = nets.images().to(dtype)
    original, model = converted(Scaled, Normed if freeze == "none" else Scaled, dtype=dtype)
    scheme = rdp.ResidualDropPath(model, 0.5, mode="sample", freeze=freeze)
    plan = rdp.PathPlan(torch.tensor(ROWS, dtype=torch.bool), [0.5, 0.5], "sample")
    for phase in scheme.iterations(len(x), plan=plan):
        rows, scale = (plan.keep, 2.0) if phase == "drop" else (torch.ones(2, len(x)), 1.0)
        out, grad = run(model, x, around)
        expected, expected_grad = run(masked(original, scheme, rows, [scale] * 2), x, around)
        torch.testing.assert_close(out, expected, rtol=1e-2, atol=1e-2)
        if phase == "drop" or freeze != "branch":
            torch.testing.assert_close(grad, expected_grad, rtol=5e-2, atol=5e-2)


@pytest.mark.parametrize("block", [Bare, IntoBranch, IntoResidual, Widening])
@pytest.mark.parametrize("keep", [True, False])
def test_a_float32_input_gives_the_originals_dtype_and_numbers(block, keep):
    """Under autocast the result is bfloat16 without an add or with one in place; an add with float64 gives float64."""
    original, model = converted(block)
    scheme = rdp.ResidualDropPath(model, 0.5)
    x, plan = nets.images().repeat(1, 3, 1, 1)[:, :DIM], rdp.PathPlan(torch.tensor([keep]), [0.5], "block")
    for around in (contextlib.nullcontext, lambda: autocast(torch.bfloat16)):
        with scheme.drop_iteration(plan=plan), around():
            out = model[1](x)
        scheme.reset()
        with around():
            expected = masked(original, scheme, plan.keep[:, None].expand(-1, len(x)), [2.0])[1](x)
        assert out.dtype == expected.dtype
        assert torch.equal(out, expected)


def test_weights_that_are_cast_after_the_conversion():
    """A float32 residual needs no probe of a dropped branch, unless a part of it is float64."""
    _, model = converted(Scaled)
    scheme = rdp.ResidualDropPath(model, 0.5)
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        model[1].gamma.data = model[1].gamma.data.to(dtype)
        with scheme.drop_iteration(plan=rdp.PathPlan(torch.zeros(1, dtype=torch.bool), [0.5], "block")):
            assert model(nets.images()).dtype == torch.promote_types(torch.float32, dtype)
        scheme.reset()


def dropped(model, paths=1):
    """An iteration in which no branch runs."""
    scheme = rdp.ResidualDropPath(model, 0.5)
    return scheme.drop_iteration(plan=rdp.PathPlan(torch.zeros(paths, dtype=torch.bool), [0.5] * paths, "block"))


class Restless(nn.Module):
    """Random, and moves a buffer, in any mode."""

    def __init__(self):
        super().__init__()
        self.register_buffer("moved", torch.zeros(()))
        self.modes = []

    def forward(self, x):
        self.moved += 1
        self.modes.append(self.training)
        return nn.functional.dropout(x)


def test_a_dropped_branch_is_probed_once_without_side_effects():
    """In eval mode, as a BatchNorm that ranks share would otherwise wait for the others."""
    _, model = converted(Normed)
    model[1].drop = restless = Restless()
    before = copy.deepcopy(model.state_dict())
    state = torch.get_rng_state()
    with dropped(model), autocast(torch.bfloat16):
        for _ in range(3):
            assert model(nets.images()).dtype == torch.float32
    assert restless.modes == [False]
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(module.training for module in model.modules())


def test_a_dummy_call_for_other_ranks_gives_the_dtype():
    _, model = converted(Scaled)
    path, rows = paths_of(model[1])[0][1], []
    model[1].conv.register_forward_hook(lambda m, args, out: rows.append(len(out)))
    x = torch.randn(4, DIM, 5, 5, dtype=torch.bfloat16)
    with autocast(torch.bfloat16):
        out = PathCall(path, len(x), (), {}).run(x, Decision(SKIP, dummy_calls=("learning",)))
    assert torch.equal(out, x.float())
    assert out.dtype == torch.float32
    assert rows == [1], "on a row of zeros, which other ranks wait for, and no second time alone"


def test_a_probe_leaves_no_weight_without_grad_in_autocasts_cache():
    _, model = converted(Scaled)
    iteration = dropped(model)
    with autocast(torch.bfloat16):
        with iteration:
            model(nets.images())
        model[1].conv(model[0](nets.images())).float().sum().backward()
    assert model[1].conv.weight.grad is not None


def test_float32_probes_no_branch():
    """A float32 residual under autocast doesn't either."""
    _, model = converted(Scaled, Bare)
    calls = []
    for block in list(model)[1:]:
        block.conv.register_forward_hook(lambda m, args, out: calls.append(len(out)))
    with dropped(model, 2):
        model(nets.images())
        with autocast(torch.bfloat16):
            model[1](torch.randn(2, DIM, 4, 4))
    assert not calls


def ops_saved(context, op, *args, **kwargs):
    return (
        ckpt.CheckpointPolicy.MUST_SAVE
        if op == torch.ops.aten.convolution.default
        else ckpt.CheckpointPolicy.PREFER_RECOMPUTE
    )


@pytest.mark.parametrize("kind", ["reentrant", "not reentrant", "selective"])
def test_checkpointing(kind):
    """A selective checkpoint returns the convolutions that it saved in order: a probe must not be among them."""
    options = {"use_reentrant": kind == "reentrant"}
    if kind == "selective":
        options["context_fn"] = lambda: ckpt.create_selective_checkpoint_contexts(ops_saved)
    found = []
    for checkpointed in (False, True):
        _, model = converted(Scaled, Scaled)
        scheme = rdp.ResidualDropPath(model, 0.5)
        x = nets.images().requires_grad_()
        plan = rdp.PathPlan(torch.tensor([False, True]), [0.5, 0.5], "block")
        with scheme.drop_iteration(plan=plan):
            with autocast(torch.bfloat16):
                out = ckpt.checkpoint(model, x, **options) if checkpointed else model(x)
            assert out.dtype == torch.float32
            out.square().sum().backward()
        found.append([out, x.grad, *(p.grad for p in model.parameters() if p.grad is not None)])
    for plain, again in itertools.zip_longest(*found):
        torch.testing.assert_close(again, plain, rtol=0, atol=0)


@pytest.mark.parametrize("how", ["drawn", "the plan as data", "in an iteration"])
def test_compiled(how):
    torch._dynamo.reset()
    original, model = converted(Scaled, Scaled)
    x, around = nets.images(), lambda: autocast(torch.bfloat16)
    expected, grad = run(masked(original, rdp.ResidualDropPath(model), torch.zeros(2, 6), [1.0] * 2), x, around)
    for block in list(model)[1:]:
        block.drop_path.drop_prob = 1.0
    if how == "drawn":
        compiled, iteration = torch.compile(model, fullgraph=True, backend="aot_eager"), contextlib.nullcontext()
    elif how == "in an iteration":
        compiled, iteration = torch.compile(model, backend="aot_eager"), dropped(model, 2)
    else:
        scheme = rdp.ResidualDropPath(model, 0.5, freeze="branch")
        compiled = compile_whole(model, scheme, backend="aot_eager")
        iteration = scheme.drop_iteration(plan=rdp.PathPlan(torch.tensor([False, False]), [0.5, 0.5], "block"))
    with iteration:
        out, actual_grad = run(compiled, x, around)
    assert torch.equal(out, expected)
    assert out.dtype == torch.float32
    torch.testing.assert_close(actual_grad, grad)


def record_by(record, model):
    if record == "fx":
        return torch.fx.symbolic_trace(model)
    return torch.jit.trace(model, nets.images(), check_trace=False)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("record", ["fx", "trace"])
def test_recorded(record):
    original, model = converted(Scaled, Bare, drop_prob=0.0)
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        expected = original(nets.images())
        out = record_by(record, model)(nets.images())
    assert out.dtype == expected.dtype
    assert torch.equal(out, expected)


def test_a_copy_probes_its_own_branch():
    """Copies of one class may be cast apart."""
    _, model = converted(Scaled)
    with dropped(model), autocast(torch.bfloat16):
        assert model(nets.images()).dtype == torch.float32
    copied = copy.deepcopy(model)
    copied[1].gamma.data = copied[1].gamma.data.bfloat16()
    with dropped(copied), autocast(torch.bfloat16):
        assert copied(nets.images()).dtype == torch.bfloat16
    with dropped(model), autocast(torch.bfloat16):
        assert model(nets.images()).dtype == torch.float32


# timm's networks


def convnext():
    from timm.models.convnext import ConvNeXt

    return ConvNeXt(depths=(1, 1, 1, 1), dims=(8, 8, 16, 16), num_classes=3, ls_init_value=1e-6, drop_path_rate=0.1)


def xcit():
    from timm.models.xcit import Xcit

    return Xcit(
        img_size=32, patch_size=8, embed_dim=16, depth=2, num_heads=2, num_classes=3, eta=1e-6, drop_path_rate=0.1,
        cls_attn_layers=1,
    )  # fmt: skip


def vit():
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer(
        32, 16, embed_dim=16, depth=2, num_heads=2, num_classes=3, init_values=1e-6, drop_path_rate=0.1
    )


def swin():
    from timm.models.swin_transformer import SwinTransformer

    return SwinTransformer(
        32, 4, embed_dim=8, depths=(2, 1), num_heads=(1, 2), window_size=4, num_classes=3, drop_path_rate=0.1
    )


def resnet():
    from timm.models.resnet import Bottleneck, ResNet

    return ResNet(Bottleneck, (1, 1, 1, 1), num_classes=3, channels=(8, 8, 8, 8), drop_path_rate=0.1)


@pytest.mark.parametrize("make", [convnext, xcit, vit, swin, resnet])
def test_timm(make):
    """At rate 0, and with every second path dropped: every block's output, in float32 and under autocast."""
    import_torchvision()
    torch.manual_seed(0)
    original, x = make().train(), torch.randn(3, 3, 32, 32)
    model = copy.deepcopy(original)
    rdp.convert(model, example_inputs=x)
    scheme = rdp.ResidualDropPath(model, 0.5)
    count = len(scheme.paths)
    for dtype, keep in itertools.product((None, torch.bfloat16), (torch.ones(count), torch.arange(count) % 2)):
        around = contextlib.nullcontext if dtype is None else lambda dtype=dtype: autocast(dtype)
        keep = keep.bool()
        with scheme.drop_iteration(plan=rdp.PathPlan(keep, [0.5] * count, "block")), around():
            out = outputs(model, scheme, x)
        scheme.reset()
        with around():
            expected = outputs(masked(original, scheme, keep[:, None].expand(-1, 3), [2.0] * count), scheme, x)
        assert out.keys() == expected.keys()
        for name, value in expected.items():
            assert out[name].dtype == value.dtype, name
            assert torch.equal(out[name], value), name


def outputs(model, scheme, x):
    """Of the model and of each block with paths."""
    blocks = {path.name.rpartition(".")[0] for path in scheme.paths}
    found = {}

    def note(name):
        return lambda module, args, out: found.__setitem__(name, out.detach().clone())

    handles = [model.get_submodule(name).register_forward_hook(note(name)) for name in blocks]
    found[""] = model(x).detach()
    for handle in handles:
        handle.remove()
    return found


# Own paths


def test_own_paths_keep_the_residuals_dtype():
    """As documented: a bfloat16 residual loses updates too small for it, and a float32 residual keeps them."""
    branch = rdp.ResidualBranch(nn.Linear(DIM, DIM), gamma=torch.full((DIM,), 1e-6))
    x = torch.randn(4, DIM)
    with autocast(torch.bfloat16):
        assert torch.equal(branch(x.bfloat16()), x.bfloat16())
        assert branch(x).dtype == torch.float32
        assert not torch.equal(branch(x), x)
