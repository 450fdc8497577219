"""Other libraries' functions: they get the arguments that they take, are verified like all providers, and have a reason
where they can't run. xFormers, flash-attn and Liger are stand-ins with their signatures, in plain torch."""

import math
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace

import pytest
import torch

from benchmarks import op_cases, op_others, op_providers
from benchmarks.machine import Device
from benchmarks.op_cases import CUDA, OPS, PASSES, TINY, Setting
from benchmarks.op_kinds import CPU
from benchmarks.op_others import OTHERS, others_of
from benchmarks.op_sets import DRAWS, Sets
from examples.libraries import resolve

A_CPU = Device(CPU, "a CPU", cache_bytes=1 << 12)
SHAPE = (6, 5, 32)
DENSE, WITHOUT_GAMMA = Setting(op_cases.DENSE, SHAPE, 4), Setting(op_cases.DENSE, SHAPE, 2, gamma=False)
ROWS, NORM = Setting(op_cases.ROWS, SHAPE, 3), Setting(op_cases.NORM, SHAPE, 4)
RMS, MASKED_RMS = Setting(op_cases.RMS, SHAPE, None, gamma=False), Setting(op_cases.RMS, SHAPE, 4)


@pytest.fixture(autouse=True)
def _anywhere(monkeypatch):
    monkeypatch.setattr(op_providers, "COMPILER", "eager")
    monkeypatch.setattr(op_others, "NEED_CUDA", ())


def providers_of(setting, name, passes=PASSES):
    cases = op_cases.op_cases(setting, A_CPU, passes)
    return {case.labels["pass"]: next(p for p in case.providers if p.name == name) for case in cases}


def passes_in(setting, name):
    """The passes in which that provider is right, or the single reason why it is unavailable."""
    providers = providers_of(setting, name)
    reasons = {provider.unavailable for provider in providers.values()}
    return [d for d, p in providers.items() if p.verify().passed] if reasons == {None} else reasons


@pytest.fixture
def install(monkeypatch):
    def install(name, function):
        """Installs a stand-in as `package.module.function`."""
        path, _, attribute = name.rpartition(".")
        parts = path.split(".")
        modules = [".".join(parts[: n + 1]) for n in range(len(parts))]
        for module in modules:
            made = sys.modules.get(module) or ModuleType(module)
            made.__spec__ = ModuleSpec(module, None)
            monkeypatch.setitem(sys.modules, module, made)
        setattr(sys.modules[path], attribute, function)

    return install


# Stand-ins


def scaled_index_add(x, index, source, scaling=None, alpha=1.0):
    """In place on [B, M, D]."""
    assert x.dim() == source.dim() == 3
    return x.index_add_(0, index, source if scaling is None else source * scaling, alpha=alpha)


def index_select_cat(sources, indices):
    """Rows of [B, N], flattened."""
    assert all(source.dim() == 2 for source in sources)
    return torch.cat([s[i].flatten() for s, i in zip(sources, indices, strict=True)])


def layer_norm_fn(
    x, weight, bias, residual=None, x1=None, weight1=None, bias1=None, eps=1e-6, dropout_p=0.0, rowscale=None,
    prenorm=False, residual_in_fp32=False, zero_centered_weight=False, is_rms_norm=False, return_dropout_mask=False,
    out_dtype=None, out=None, residual_out=None,
):  # fmt: skip
    """A scale for each row of [..., C]; returns the norm first."""
    assert x.shape == residual.shape
    if rowscale is not None:
        assert rowscale.dtype == torch.float32
        assert rowscale.shape == (x[..., 0].numel(),)
        x = x * rowscale.view(*x.shape[:-1], 1).to(x.dtype)
    summed = x + residual
    if is_rms_norm:
        normed = torch.nn.functional.rms_norm(summed, x.shape[-1:], weight, eps)
    else:
        normed = torch.nn.functional.layer_norm(summed, x.shape[-1:], weight, bias, eps)
    return (normed, summed) if prenorm else normed


class FusedAddRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, residual, weight, eps, in_place):
        ctx.save_for_backward(x + residual, weight)
        ctx.eps, ctx.in_place = eps, in_place
        return torch.nn.functional.rms_norm(x + residual, x.shape[-1:], weight, eps), x + residual

    @staticmethod
    def backward(ctx, dnormed, dsummed):
        with torch.enable_grad():
            summed, weight = (t.detach().requires_grad_() for t in ctx.saved_tensors)
            normed = torch.nn.functional.rms_norm(summed, summed.shape[-1:], weight, ctx.eps)
        dx, dweight = torch.autograd.grad(normed, (summed, weight), dnormed)
        dx = dnormed.copy_(dx + dsummed) if ctx.in_place else dx + dsummed
        return dx, dx, dweight, None, None


def liger_fused_add_rms_norm(X, R, W, eps, offset=0.0, casting_mode="llama", in_place=True):
    """Overwrites the incoming gradient with its own if it may; returns the norm first."""
    return FusedAddRMSNorm.apply(X, R, W, eps, in_place)


XFORMERS = {"xformers.ops.scaled_index_add": scaled_index_add, "xformers.ops.index_select_cat": index_select_cat}
FLASH_ATTN = {"flash_attn.ops.triton.layer_norm.layer_norm_fn": layer_norm_fn}
LIGER = {"liger_kernel.transformers.functional.liger_fused_add_rms_norm": liger_fused_add_rms_norm}
STAND_INS = {"xformers": XFORMERS, "flash-attn": FLASH_ATTN, "liger": LIGER}
CASES = [
    *(("xformers", s) for s in (ROWS, *(q for q in TINY if q.op in (op_cases.GATHER, op_cases.PATH, op_cases.CHAIN)))),
    *(("flash-attn", s) for s in (NORM, Setting(op_cases.NORM, SHAPE, 6, gamma=False), RMS, MASKED_RMS)),
    ("liger", RMS),
    *((name, s) for name in ("timm", "torchvision") for s in (DENSE, WITHOUT_GAMMA)),
    *((name, Setting(op_cases.DENSE, (4, 8, 3, 5), 2, channels_last=True)) for name in ("timm", "torchvision")),
]


@pytest.mark.parametrize(("name", "setting"), CASES, ids=str)
def test_each_gets_the_arguments_that_it_takes(name, setting, install):
    for path, function in STAND_INS.get(name, {}).items():
        install(path, function)
    assert passes_in(setting, name) == list(PASSES)
    for provider in providers_of(setting, name).values():
        before = [t.clone() for t in provider.capture.kept]
        for turn in range(2):
            provider.run(turn)
        assert all(torch.equal(a, b) for a, b in zip(before, provider.capture.kept, strict=True)), "inputs as they were"
        assert provider.capture.check(provider.capture.runs[0]()).passed, "a replay is checked in the same way"


def wrong(function, place, factor):
    """`function` with an error in one of its results."""

    def off(*args, **kwargs):
        results = function(*args, **kwargs)
        if not isinstance(results, tuple):
            return results * factor
        return tuple(r * factor if n == place else r for n, r in enumerate(results))

    return off


@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize(("name", "setting"), [case for case in CASES if case[0] in STAND_INS], ids=str)
def test_a_wrong_one_is_not_timed(name, setting, place, install):
    for path, function in STAND_INS[name].items():
        install(path, wrong(function, place, 1.001))
    (reason,) = passes_in(setting, name)
    assert reason.startswith("differs from the float64 reference by 1.")


def test_gradients_that_are_written_over_are_caught(install):
    """Liger does so by default: the next turn would get a wrong gradient."""
    for path, function in LIGER.items():
        install(path, lambda *args, in_place, function=function: function(*args, in_place=True))
    (reason,) = passes_in(RMS, "liger")
    assert "differs" in reason


# Masks that libraries draw


def drop_path(share=None, scale=None, whole=False):
    """Stands for timm's module, with the given faults: another scale, or the same draw every time."""

    class DropPath(torch.nn.Module):
        def __init__(self, drop_prob):
            super().__init__()
            self.keep = 1 - drop_prob

        def forward(self, x):
            if share is not None:
                return x * share / self.keep
            mask = x.new_empty(1 if whole else len(x), *[1] * (x.dim() - 1)).bernoulli_(self.keep)
            return x * mask * (1 / self.keep if scale is None else scale)

    return DropPath


@pytest.mark.parametrize(
    "options", [{"scale": 1.0}, {"scale": 1.501}, {"share": 0}, {"share": 1}, {"whole": True}], ids=str
)
def test_a_wrong_draw_is_not_timed(options, monkeypatch):
    resolve("timm.layers.DropPath")  # imports it
    monkeypatch.setattr(sys.modules["timm.layers"], "DropPath", drop_path())
    assert passes_in(DENSE, "timm") == list(PASSES), "the stand-in itself is right"
    monkeypatch.setattr(sys.modules["timm.layers"], "DropPath", drop_path(**options))
    (reason,) = passes_in(DENSE, "timm")
    assert reason.startswith("differs from the float64 reference by inf" if "scale" not in options else "differs")


def test_draws_are_read_off_the_rows_that_changed():
    op = OPS[DENSE.op](DENSE)
    sets, rows = Sets(op, 1), torch.tensor([0, 3])
    residual, branch, gamma = sets.inputs[0]
    out = residual.detach().clone()
    out[rows] += 1.5 * (branch * gamma)[rows].detach()
    assert sets.as_drawn("forward", (out,)).op.rows.tolist() == rows.tolist()
    dbranch = torch.zeros(SHAPE)
    dbranch[rows, 2, 7] = 1e-9
    assert sets.as_drawn("backward", (residual, dbranch, gamma)).op.rows.tolist() == rows.tolist()
    wanted = sets.wanted["forward"][0]
    assert sets.as_drawn("forward", (out,)).check("forward", (out,)).passed
    assert not sets.check("forward", (out,)).passed, "the drawn rows aren't the op's own"
    assert sets.wanted["forward"][0] is wanted, "the op's own rows stay"


def test_masks_are_drawn_anew_at_the_rate_of_the_op():
    provider = providers_of(Setting(op_cases.DENSE, (1000, 2, 2), 300), "torchvision", ["forward"])["forward"]
    torch.manual_seed(0)
    residual = provider.capture.kept[0]
    changed = [(provider.capture.runs[0]()[0] != residual).flatten(1).any(1) for _ in range(DRAWS)]
    assert not torch.equal(changed[0], changed[1])
    deviation = math.sqrt(0.3 * 0.7 / (1000 * DRAWS))
    assert torch.stack(changed).double().mean().item() == pytest.approx(0.3, abs=4 * deviation)


def test_bytes_of_drawn_masks_are_eagers():
    """Eager multiplies by an existing mask; the masks are small beside the residual."""
    setting = Setting(op_cases.DENSE, (8, 4, 4096), 4)
    (case,) = op_cases.op_cases(setting, A_CPU, ["both"])
    moved = {p.name: p.columns["moved_gb"] for p in case.available}
    assert moved["timm"] == pytest.approx(moved["eager"], rel=1e-3)
    assert moved["torchvision"] == pytest.approx(moved["eager"], rel=1e-3)


# Unavailable providers


def test_which_providers_support_a_setting():
    def serving(setting):
        return [other.library for other in others_of(SimpleNamespace(name=setting.op, setting=setting))]

    assert serving(DENSE) == ["timm", "torchvision"]
    assert serving(Setting(op_cases.DENSE, SHAPE, 6)) == [], "at rate 0 a drop-path is nothing"
    assert serving(Setting(op_cases.DENSE, SHAPE, None)) == []
    assert serving(RMS) == ["flash-attn", "liger"]
    assert serving(MASKED_RMS) == ["flash-attn"]
    for settings in (CUDA, TINY):
        names = {name for setting in settings for name in serving(setting)}
        assert names == {"timm", "torchvision", *STAND_INS} == {o.library for os in OTHERS.values() for o in os}


def test_a_provider_that_needs_a_gpu_says_so(install, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(op_providers, "COMPILER", "eager")
    assert passes_in(RMS, "liger") == {"liger is not installed"}
    for stand_ins in (FLASH_ATTN, XFORMERS):
        for path, function in stand_ins.items():
            install(path, function)
    assert passes_in(RMS, "flash-attn") == {"flash-attn needs a CUDA device"}
    assert passes_in(ROWS, "xformers") == {"xformers needs a CUDA device"}


def test_one_that_breaks_is_unavailable_and_says_why(install):
    for path in XFORMERS:
        install(path, lambda *_: 1 / 0)
    assert passes_in(ROWS, "xformers") == {"ZeroDivisionError: division by zero"}
