"""The costs from `scheme.estimate` are those counted in real iterations, and the estimate changes nothing."""

import copy
import dataclasses
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import rdp_kernels as rdp
from examples.libraries import import_torchvision, installed
from examples.models import Attention, ResNet, ViT, mlp
from rdp_kernels.estimate import ModelCost, Row, kept_fractions
from rdp_kernels.estimate.meters import Flops
from rdp_kernels.estimate.report import NEAR, PAYS, recommend

from .test_cost import saved_bytes

DROP_PROB = 0.4
SAMPLES = 6


def timm_model(name, **options):
    if not installed("timm"):
        pytest.skip("timm is not installed")
    if installed("torchvision"):
        import_torchvision()
    import timm

    model = timm.create_model(name, **options)
    assert rdp.convert(model, DROP_PROB, example_inputs=torch.randn(2, 3, 32, 32), check=False).converted
    return model


def transformers_vit():
    if not installed("transformers"):
        pytest.skip("transformers is not installed")
    if installed("torchvision"):
        import_torchvision()  # transformers imports it where it is
    import transformers

    options = dict(image_size=32, patch_size=16, hidden_size=16, num_hidden_layers=2, num_attention_heads=2)
    model = transformers.ViTModel(transformers.ViTConfig(**options, intermediate_size=32))
    assert rdp.convert(model, DROP_PROB, example_inputs=torch.randn(2, 3, 32, 32), check=False).converted
    return model


class Towers(nn.Module):
    """Has what a chain of equal paths lacks: an activation between two paths that both use its output, two branches on
    one tensor, a shared path, an argument, several outputs."""

    def __init__(self, dim=12):
        super().__init__()
        self.embed, self.between = nn.Linear(3, dim), nn.Linear(dim, dim)
        self.first = rdp.ResidualBranch(mlp(dim), activation="relu")
        self.shared = rdp.ResidualBranch(Attention(dim, 3), norm=nn.LayerNorm(dim), gamma=torch.ones(dim))
        self.given = rdp.ResidualBranch(Times(dim), per_sample=["factor"], norm=nn.LayerNorm(dim))
        self.head, self.unused = nn.Linear(dim, 2), rdp.ResidualBranch(mlp(dim))

    def forward(self, x):
        x = self.first(self.embed(x))
        y = self.shared(self.between(x).relu())
        z = self.given(self.shared(y), factor=x)
        return {"logits": self.head(z), "features": [y.mean(dim=1)]}


class Times(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.linear = nn.Linear(dim, dim)

    def forward(self, x, factor):
        return self.linear(x) * factor


NETS = {
    "ViT": (lambda: ViT(dim=16, depth=3, heads=2, layer_scale=0.5), (1, 8, 8)),
    "ResNet": (lambda: ResNet(widths=(4, 8)), (1, 8, 8)),
    "towers": (Towers, (4, 3)),
    "transformers ViT": (transformers_vit, (3, 32, 32)),
    "timm ViT": (
        lambda: timm_model("vit_tiny_patch16_224", img_size=32, embed_dim=16, depth=3, num_heads=2),
        (3, 32, 32),
    ),
    "timm ResNet": (lambda: timm_model("resnet18", layers=(1, 1, 2, 1), channels=(4, 8, 8, 12)), (3, 32, 32)),
    "timm ResNetV2": (lambda: timm_model("resnetv2_50", layers=(1, 1, 1), channels=(16, 32, 32)), (3, 32, 32)),
    "timm ConvNeXt": (lambda: timm_model("convnext_atto", depths=(1, 1, 2, 1), dims=(8, 12, 16, 20)), (3, 32, 32)),
    "timm Swin": (
        lambda: timm_model(
            "swin_tiny_patch4_window7_224", img_size=32, window_size=4, embed_dim=12, depths=(2, 2), num_heads=(2, 2)
        ),
        (3, 32, 32),
    ),
}


def total(out):
    if isinstance(out, dict):
        return sum(total(value) for value in out.values())
    return sum(map(total, out)) if isinstance(out, list) else out.sum()


def counted(model, x):
    """FLOPs of an iteration's forward and backward, and the bytes that it saves between them."""
    with saved_bytes(model) as saved:
        model(x)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # else none are counted on CPUs
        loss = total(model(x))
        if loss.requires_grad:
            loss.backward()
    model.zero_grad()
    return counter.get_total_flops(), saved()


def compare(model, x, mode, options, cost, phases=("drop", "reuse")):
    """Compares `cost` with the counts of a pair of iterations. Saved bytes leave out the indices of rows, two for each
    path and sample: they matter only beside branches as small as these."""
    scheme = rdp.ResidualDropPath(model, DROP_PROB, mode=mode, **options)
    freeze, train_rest = options.get("freeze", "parameters"), options.get("train_rest", False)
    path, sample = torch.arange(len(scheme.paths))[:, None], torch.arange(len(x))
    keep = (path % 2 == 0) if mode == "block" else (path % 3 == 0) | (path % 3 == 1) & (sample % 3 > 0)
    if mode == "sample":
        keep[[p.index for p in scheme.paths if p.module.mode == "block"][:1]] = False  # its rows are not the samples
        keep[[p.index for p in scheme.paths if p.module.mode == "block"][1:]] = True
    ran = []
    for phase in scheme.iterations(plan=rdp.PathPlan(keep[:, 0] if mode == "block" else keep, [0.5] * len(keep), mode)):
        kept = torch.tensor([kept_fractions(scheme.plan)], dtype=torch.float64)
        shares = (
            cost.drop_shares(cost.computed(kept)) if phase == "drop" else cost.reuse_shares(kept, freeze, train_rest)
        )
        flops, saved = counted(model, x)
        assert cost.flops(shares).item() == pytest.approx(flops, rel=1e-9), phase
        indices = 0 if mode == "block" else 16 * keep.numel()
        assert cost.saved_bytes(shares).item() == pytest.approx(saved, rel=1e-9, abs=indices), phase
        ran.append(phase)
    assert ran == list(phases)
    scheme.remove()


OPTIONS = [
    {},
    {"freeze": "branch"},
    {"freeze": "none"},
    {"train_rest": True},
]


QUICK = ("ViT", "ResNet", "towers", "timm ConvNeXt")


@pytest.mark.filterwarnings("ignore:ResidualDropPath. the model didn't run path 'unused'")
@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in NETS]
)
def test_costs_are_those_of_real_iterations(name):
    """Budget: 10 seconds."""
    make, shape = NETS[name]
    model, x = make(), torch.randn(SAMPLES, *shape)
    cost = ModelCost.of(model, x)
    batch_norm = any(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    for options in OPTIONS:
        compare(model, x, "block", options, cost)
        if "train_rest" not in options and (not batch_norm or options == {"freeze": "none"}):
            compare(model, x, "sample", options, cost)


@pytest.mark.parametrize("frozen", ["patches", "first blocks", "all but a path", "head"])
def test_frozen_parameters_neither_learn_nor_want_gradients(frozen):
    model, x = ViT(dim=16, depth=3, heads=2), torch.randn(SAMPLES, 1, 8, 8)
    first = [model.patches, *list(model.paths)[:3]]
    for module in {"patches": [model.patches], "first blocks": first, "head": [model.head]}.get(frozen, [model]):
        module.requires_grad_(False)
    model.position.requires_grad_(False)
    if frozen == "all but a path":
        model.paths[3].requires_grad_(True)
    cost = ModelCost.of(model, x)
    phases = ("reuse",) if frozen == "all but a path" else ("drop", "reuse")  # the plan drops that one
    for options in OPTIONS:
        compare(model, x, "block", options, cost, phases)


@pytest.mark.parametrize("freeze_bn", ["running", False])  # True: above
def test_other_kinds_of_frozen_batch_norm(freeze_bn):
    model, x = ResNet(widths=(4, 8)), torch.randn(SAMPLES, 1, 8, 8)
    cost = ModelCost.of(model, x, freeze_bn=freeze_bn)
    for options in OPTIONS:
        compare(model, x, "block", {"freeze_bn": freeze_bn, **options}, cost)
    frozen = cost.reuse_shares(torch.ones(1, cost.pieces.num_paths, dtype=torch.float64), train_rest=True)
    by_batch = ModelCost.of(model, x).saved_bytes(frozen)
    if freeze_bn == "running":
        assert cost.saved_bytes(frozen) < by_batch, "it saves no input"
    else:
        assert cost.saved_bytes(frozen) == by_batch


def test_rows_are_means_over_the_schemes_plans():
    """At rates of 0 and 1 there is one plan."""
    model, x = ViT(dim=16, depth=2, heads=2), torch.randn(SAMPLES, 1, 8, 8)
    for path, rate in zip(model.paths, (1.0, 0.0, 0.0, 1.0), strict=True):
        path.drop_prob = rate
    scheme = rdp.ResidualDropPath(model)
    rows = {(row.mode, row.freeze): row for row in scheme.estimate(x, timed=False) if row.own_rates}
    assert {row.drop_prob for row in rows.values()} == {0.5}
    scheme.remove()
    for freeze in ("parameters", "branch", "none"):
        scheme = rdp.ResidualDropPath(model, freeze=freeze)
        real = {phase: counted(model, x) for phase in scheme.iterations()}
        scheme.remove()
        for mode in ("block", "sample"):
            row = rows[mode, freeze]
            assert (row.drop_flops, row.reuse_flops) == (real["drop"][0], real["reuse"][0])
            assert (row.drop_saved_bytes, row.reuse_saved_bytes) == (real["drop"][1], real["reuse"][1])
            plain = ModelCost.of(model, x).plain()
            assert row.flop_ratio == pytest.approx((row.drop_flops + row.reuse_flops) / (2 * plain), rel=1e-12)


def test_pairs_without_a_reuse_iteration_are_one_step():
    """One path, dropped every other time: of three steps two train the whole model, and one trains the rest alone."""
    model, x = ViT(dim=16, depth=1, heads=2), torch.randn(SAMPLES, 1, 8, 8)
    model.paths = rdp.ResidualSequence(model.paths[0])
    scheme = rdp.ResidualDropPath(model, 0.5, sampling="fixed", freeze="none")
    row = next(row for row in scheme.estimate(x, timed=False) if row.freeze == "none")
    cost = ModelCost.of(model, x)
    dropped = 2 * (1 - (row.drop_flops - cost.drop([0.0])) / (cost.plain() - cost.drop([0.0]))) / 2
    assert 0.4 < dropped < 0.6
    steps = 1 + dropped
    assert row.flop_ratio == pytest.approx((row.drop_flops + dropped * cost.plain()) / (steps * cost.plain()), rel=1e-9)


def test_nothing_changes():
    model, x = ResNet(widths=(4, 8)), torch.randn(SAMPLES, 1, 8, 8)
    model(x).sum().backward()
    model.stem.eval()
    model.head = nn.Sequential(nn.Dropout(0.5), model.head)
    scheme = rdp.ResidualDropPath(model, DROP_PROB)
    runner = model.paths[0].binding.branch_runner = lambda path_module, x, args, kwargs, normed: path_module.run_branch(
        x, args, kwargs
    )

    def state():
        modules = [(m.training, len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
        tensors = [t.clone() for t in model.state_dict().values()]
        grads = [p.grad.clone() for p in model.parameters()]
        flags = [p.requires_grad for p in model.parameters()]
        slots = [(path.binding.scheme, path.binding.branch_runner, path.binding.call_override) for path in model.paths]
        return modules, flags, slots, scheme.state_dict(), [*tensors, *grads, x, torch.get_rng_state()]

    before, given = state(), x.clone()
    first = scheme.estimate(x, timed=False)
    after = state()
    assert before[:-1] == after[:-1]
    assert all(torch.equal(a, b) for a, b in zip(before[-1], after[-1], strict=True))
    assert torch.equal(x, given)
    assert model.paths[0].binding.branch_runner is runner
    assert first.rows == scheme.estimate(x, timed=False).rows, "the same plans every time"


def test_in_eval_mode_training_is_estimated():
    model, x = ViT(dim=16, depth=1, heads=2), torch.randn(SAMPLES, 1, 8, 8)
    scheme = rdp.ResidualDropPath(model, DROP_PROB)
    wanted = scheme.estimate(x, timed=False).rows
    model.eval()
    with torch.no_grad():
        assert scheme.estimate(x, timed=False).rows == wanted
    assert not model.training


def test_times_are_measured_on_request():
    model, x = ViT(dim=8, depth=1, heads=2), torch.randn(2, 1, 8, 8)
    scheme = rdp.ResidualDropPath(model, DROP_PROB)
    timed, untimed = scheme.estimate(x), scheme.estimate({"images": x}, timed=False)
    assert timed.plain_seconds > 0
    assert untimed.plain_seconds is None
    assert all(row.time_ratio > 0 for row in timed)
    assert all(row.time_ratio is None for row in untimed)
    assert [dataclasses.replace(row, time_ratio=None) for row in timed] == untimed.rows
    assert 0 < timed.branch_share < 1


def test_it_reads_as_a_table():
    model, x = ResNet(widths=(4, 8)), torch.randn(SAMPLES, 1, 8, 8)
    text = str(rdp.ResidualDropPath(model, 0.5).estimate(x, timed=False))
    assert "0.5 (own)" in text
    assert text.count("refused: path 'paths.0': BatchNorm in a branch can't be frozen") == 1
    assert "A plain step at batch 6" in text
    assert 'Recommendation: mode="block", freeze="parameters"' in text


def test_batch_norm_in_sample_mode_is_refused_with_the_reason():
    rows = rdp.ResidualDropPath(ResNet(widths=(4, 8)), 0.5).estimate(torch.randn(4, 1, 8, 8), timed=False).rows
    refused = {(row.mode, row.freeze) for row in rows if row.refused}
    assert refused == {("sample", "parameters"), ("sample", "branch")}
    assert all("statistics are those of the whole batch" in row.refused for row in rows if row.refused)
    assert all(row.flop_ratio is None for row in rows if row.refused)


class Uncopyable(nn.Module):
    def __init__(self):
        super().__init__()
        self.path, self.lines = rdp.ResidualBranch(nn.Linear(4, 4)), iter([])
        self.lines = (line for line in "ab")

    def forward(self, x):
        return self.path(x)


class Checkpointed(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.path = nn.Linear(4, 4), rdp.ResidualBranch(nn.Linear(4, 4))

    def forward(self, x):
        return checkpoint(self.path, self.stem(x), use_reentrant=False)


class Idle(nn.Module):
    def __init__(self):
        super().__init__()
        self.path = rdp.ResidualBranch(nn.Linear(4, 4))

    def forward(self, x):
        return x


class Picky(nn.Module):
    def __init__(self):
        super().__init__()
        self.path = rdp.ResidualBranch(nn.Linear(3, 3))

    def forward(self, x, times):
        assert x.shape[1] == 3, "only 3 channels"
        return times * self.path(x)


@pytest.mark.parametrize(
    ("model", "inputs", "message"),
    [
        (Uncopyable(), torch.randn(2, 4), "model can't be copied"),
        (Checkpointed(), torch.randn(2, 4), "recomputes calls of its paths"),
        (Idle(), torch.randn(2, 4), "calls none of its paths"),
        (ViT(), torch.randn(2, 5), r"example_inputs: the model can't be run on float32 \[2, 5\]: \w+: "),
        (
            ViT(),
            {"pictures": torch.randn(2, 1)},
            r"run on pictures=float32 \[2, 1\]: .*unexpected keyword argument 'pict",
        ),
        (Picky(), (torch.randn(2, 4), 1), r"run on float32 \[2, 4\], int: AssertionError: only 3 channels"),
        (ViT(), 3, "must hold a tensor with samples in dimension 0, got int without one"),
        (ViT(), torch.randn(0, 1, 8, 8), r"samples in dimension 0, got one of shape \[0, 1, 8, 8\]"),
    ],
)
def test_models_that_cannot_be_measured_are_refused(model, inputs, message):
    scheme = rdp.ResidualDropPath(model, DROP_PROB)
    with pytest.raises(ValueError, match=message):
        scheme.estimate(inputs, timed=False)
    assert next(scheme.iterations()) in ("drop", "reuse"), "the scheme still works"


def test_inside_an_iteration_is_refused():
    scheme = rdp.ResidualDropPath(ViT(), DROP_PROB)
    open_iteration = scheme.iterations()
    next(open_iteration)
    with pytest.raises(RuntimeError, match="inside an open drop iteration"):
        scheme.estimate(torch.randn(2, 1, 8, 8))
    with pytest.raises(TypeError, match="timed"):
        scheme.estimate(torch.randn(2, 1, 8, 8), timed=1)


# The recommendation, from rows


def row_of(mode, freeze, ratio, p=0.2, flops=0.7, own=True):
    if ratio is None:
        return Row(mode, freeze, p, own_rates=own, refused="BatchNorm")
    return Row(mode, freeze, p, own_rates=own, flop_ratio=flops, time_ratio=ratio)


def rows_of(block, sample, branch, p=0.2, flops=0.7, sample_flops=None, sample_branch=None, others=((0.3, 0.99),)):
    """Rows with the ratios of the scheme's own rates, and of the exact rows at further rates."""
    return [
        row_of("block", "parameters", block, p, flops),
        row_of("block", "branch", branch, p, flops),
        row_of("sample", "parameters", sample, p, sample_flops or flops),
        row_of("sample", "branch", sample and (sample_branch or branch), p, flops),
        *(row_of(mode, "parameters", ratio, rate, own=False) for rate, ratio in others for mode in ("block", "sample")),
    ]


PLAINLY = "Recommendation: plain training"
RECOMMENDATIONS = {
    "sample mode costs the same": (
        rows_of(0.72, 0.74, 0.62), 0.9, ['mode="block"', "costs about the same: 0.74", "take 0.62 in block mode"], [],
    ),
    "fewer rows save no time": (
        rows_of(0.72, 0.9, 0.71), 0.9, ['mode="block"', "takes 0.90: at batch 8, running a branch"], ['freeze="branch"'],
    ),
    "no prefix": (rows_of(0.72, 0.9, 0.71, sample_flops=0.88), 0.9, ["takes 0.90: hardly any plan"], []),
    "sample mode is cheaper": (
        rows_of(0.8, 0.7, 0.62), 0.9, ['mode="sample"', "0.70 of plain training's time, in block mode 0.80"], [],
    ),
    "detaching is cheaper than block mode, not than sample mode": (
        rows_of(0.8, 0.7, 0.71), 0.9, ['mode="sample"'], ['freeze="branch"'],
    ),
    "detaching is cheapest in sample mode": (
        rows_of(0.72, 0.74, 0.65, sample_branch=0.6), 0.9, ['mode="block"', "take 0.60 in sample mode"], ["0.65"],
    ),
    "only sample mode gains": (
        rows_of(0.98, 0.96, 0.95), 0.9, ['mode="sample"', "takes 0.96", "block mode 0.98"], ["plain training, or"],
    ),
    "refused": (rows_of(0.72, None, 0.71), 0.9, ['mode="block"', "Sample mode is refused"], ["about the same"]),
    "costs beside the FLOPs": (
        rows_of(1.1, 1.3, 1.0), 0.9, [PLAINLY, "block mode a step takes 1.10", "only 0.70 of its FLOPs"], ["mode=", "freeze="],
    ),
    "the cheaper of two that don't pay": (
        rows_of(1.3, 1.1, 1.2), 0.9, [PLAINLY, "In sample mode a step takes 1.10"], ["mode=", "freeze=", "1.30"],
    ),
    "nothing exact pays, detaching does": (
        rows_of(1.1, 1.3, 0.8), 0.9, [PLAINLY, 'freeze="branch" would take 0.80 in block mode, but its'], ["mode="],
    ),
    "few branches": (
        rows_of(0.98, None, 0.97, flops=0.98), 0.1, [PLAINLY, "only 10% of a plain step"], ["mode="],
    ),
    "few are dropped": (
        rows_of(0.99, 0.99, 0.99, p=0.01, flops=0.99, others=((0.1, 0.98), (0.3, 0.72))), 0.9,
        [PLAINLY, "too little is dropped", "At p = 0.3 it would take 0.72"], ["p = 0.1 "],
    ),
    "no rates": (
        rows_of(1, 1, 1, p=0, flops=1, others=((0.1, 0.8), (0.3, 0.72), (0.5, 0.6))), 0.9,
        ["give drop_prob", "at 0.3 a step would take 0.72 of plain training's time in block mode"], ["plain training, or"],
    ),
    "no rates, and only another one gains": (
        rows_of(1, 1, 1, p=0, flops=1, others=((0.1, 1.2), (0.3, 1.0), (0.5, 0.9))), 0.9,
        ["give drop_prob", "at 0.5 a step would take 0.90"], ["plain training, or"],
    ),
    "no rates, and none would gain": (
        rows_of(1, 1, 1, p=0, flops=1, others=((0.1, 1.3), (0.3, 1.2), (0.5, 1.1))), 0.9,
        [PLAINLY, "at 0.5, the best of the rates above, a step would take 1.10"], ["give drop_prob"],
    ),
}  # fmt: skip


@pytest.mark.parametrize(("rows", "share", "says", "never"), RECOMMENDATIONS.values(), ids=RECOMMENDATIONS)
def test_recommendations(rows, share, says, never):
    text = recommend(rows, share, batch_size=8)
    assert all(part in text for part in says), text
    assert not any(part in text for part in never), text


@pytest.mark.parametrize("seed", range(20))
def test_the_recommendation_agrees_with_its_rows(seed):
    """On made-up costs: every ratio is a row's, the recommendation saves cost, and no exact row is much cheaper."""
    random = torch.Generator().manual_seed(seed)
    ratios = (0.5 + 0.8 * torch.rand(2000, 4, generator=random)).tolist()
    for block, sample, branch, sample_branch in ratios:
        sample = None if sample > 1.2 else sample
        rows = rows_of(block, sample, branch, sample_branch=sample_branch)
        text = recommend(rows, 0.9, 8)
        told = {float(number) for number in re.findall(r"take[sn]? (\d\.\d\d)", text)}
        assert told <= {round(row.ratio, 2) for row in rows if row.refused is None}
        chosen = re.search(r'mode="(\w+)"', text)
        exact = {
            row.mode: row.ratio for row in rows if row.own_rates and row.freeze == "parameters" and not row.refused
        }
        assert (chosen is None) == (min(exact.values()) >= PAYS)
        if chosen is not None:
            assert exact[chosen[1]] < PAYS
            assert exact[chosen[1]] <= min(exact.values()) + NEAR


def test_drop_iterations_that_are_not_run_cost_nothing():
    """With adapters only, a plan that drops them all has a reuse iteration and no drop iteration."""
    model, x = ViT(dim=16, depth=2, heads=2), torch.randn(SAMPLES, 1, 8, 8)
    plain, _ = counted(model, x)
    model.requires_grad_(False)
    model.paths[1].requires_grad_(True)
    for path, rate in zip(model.paths, (0.0, 1.0, 0.0, 0.0), strict=True):
        path.drop_prob = rate
    scheme = rdp.ResidualDropPath(model)
    row = next(row for row in scheme.estimate(x, timed=False) if row.own_rates and row.freeze == "parameters")
    real = {phase: counted(model, x)[0] for phase in scheme.iterations()}
    assert (row.drop_flops, row.reuse_flops) == (None, real["reuse"])
    assert real.keys() == {"reuse"}
    assert row.flop_ratio == pytest.approx(real["reuse"] / row_of_plain(scheme, x), rel=1e-12)
    assert plain > row_of_plain(scheme, x), "plain training trains the adapters alone too"


def row_of_plain(scheme, x):
    return scheme.estimate(x, timed=False).plain_flops


def test_rates_of_zero_are_reported():
    with pytest.warns(UserWarning, match="drop_prob is 0"):
        scheme = rdp.ResidualDropPath(ViT(dim=8, depth=1))
    estimate = scheme.estimate(torch.randn(2, 1, 8, 8), timed=False)
    own = [row for row in estimate if row.own_rates]
    assert all((row.flop_ratio, row.reuse_flops) == (1, None) for row in own)
    assert "give drop_prob" in estimate.recommendation
    assert f"{next(row.flop_ratio for row in estimate if row.drop_prob == 0.3):.2f}" in estimate.recommendation


def test_copies_of_the_model_have_no_call_override():
    model = ViT(dim=8, depth=1)
    model.paths[0].binding.call_override = lambda call, x: x
    assert copy.deepcopy(model).paths[0].binding.call_override is None


def test_attention_counts_as_the_two_matmuls_that_it_is():
    """Torch's own counter doesn't count attention on CPUs."""
    q = torch.randn(2, 3, 5, 8, requires_grad=True)
    with Flops(q.device) as flops:
        out = F.scaled_dot_product_attention(q, q, q)
        forward = flops.read()
        out.sum().backward()
    assert forward == 2 * 2 * 2 * 3 * 5 * 5 * 8  # multiply and add; scores and values; batch, heads, tokens, width
    assert flops.read() == 3 * forward
