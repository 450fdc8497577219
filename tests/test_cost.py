"""What an iteration costs, counted exactly: FLOPs of matmuls, bytes that autograd saves, calls of branches."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import rdp_kernels as rdp
from examples.models import Attention, ViT
from rdp_kernels.plan import draw_block_keep, draw_sample_keep

BATCH, SIDE, PATCH, CHANNELS, CLASSES = 5, 8, 2, 3, 7
DIM, HEADS, DEPTH = 12, 3, 6
TOKENS, HIDDEN, PATHS = (SIDE // PATCH) ** 2, 4 * DIM, 2 * DEPTH
FLOAT, INDEX = 4, 8  # bytes


# What is needed, in plain arithmetic


@dataclass(frozen=True)
class Matmul:
    """`forward`: FLOPs for one sample. Backward in multiples of it: `dgrad` towards inputs, `wgrad` towards weights."""

    forward: int
    dgrad: int
    wgrad: int


PATCHES = [Matmul(2 * TOKENS * (CHANNELS * PATCH * PATCH) * DIM, dgrad=0, wgrad=1)]  # images don't require grad
ATTENTION = [
    Matmul(2 * TOKENS * DIM * (3 * DIM), dgrad=1, wgrad=1),  # qkv
    Matmul(2 * HEADS * TOKENS * (DIM // HEADS) * TOKENS, dgrad=2, wgrad=0),  # q @ k.mT
    Matmul(2 * HEADS * TOKENS * TOKENS * (DIM // HEADS), dgrad=2, wgrad=0),  # weights @ v
    Matmul(2 * TOKENS * DIM * DIM, dgrad=1, wgrad=1),  # proj
]
MLP = [
    Matmul(2 * TOKENS * DIM * HIDDEN, dgrad=1, wgrad=1),  # fc1
    Matmul(2 * TOKENS * HIDDEN * DIM, dgrad=1, wgrad=1),  # fc2
]
HEAD = [Matmul(2 * DIM * CLASSES, dgrad=1, wgrad=1)]


def flops(matmuls: list[Matmul], samples: int, dgrad: bool, wgrad: bool) -> int:
    return samples * sum(m.forward * (1 + m.dgrad * dgrad + m.wgrad * wgrad) for m in matmuls)


def needed_drop(kept: list[int]) -> int:
    """FLOPs of a drop iteration in which path l runs on `kept[l]` samples."""
    total = flops(PATCHES, BATCH, dgrad=True, wgrad=True) + flops(HEAD, BATCH, dgrad=True, wgrad=True)
    for path, rows in enumerate(kept):
        total += flops(MLP if path % 2 else ATTENTION, rows, dgrad=True, wgrad=True)
    return total


def needed_reuse(kept: list[int], freeze: str, train_rest: bool) -> int:
    """FLOPs of its reuse iteration: path l learns on `BATCH - kept[l]` samples and is frozen on the others."""
    rest_learns = train_rest or freeze == "none"
    total = flops(PATCHES, BATCH, dgrad=True, wgrad=rest_learns)
    something_learned = rest_learns  # up to here: the paths after it pass gradients back
    for path, rows in enumerate(kept):
        matmuls = MLP if path % 2 else ATTENTION
        frozen = 0 if freeze == "none" else rows
        total += flops(matmuls, BATCH - frozen, dgrad=True, wgrad=True)  # dgrad always: the leading norm learns
        total += flops(matmuls, frozen, dgrad=something_learned and freeze != "branch", wgrad=False)
        something_learned |= frozen < BATCH
    return total + flops(HEAD, BATCH, dgrad=something_learned, wgrad=rest_learns)


# What is counted


def vit() -> ViT:
    return ViT(SIDE, PATCH, CHANNELS, CLASSES, DIM, DEPTH, HEADS)


def counted(model: nn.Module) -> int:
    with FlopCounterMode(display=False) as counter:
        model(torch.randn(BATCH, CHANNELS, SIDE, SIDE)).sum().backward()
    return counter.get_total_flops()


def plan_of(keep: Tensor) -> rdp.PathPlan:
    return rdp.PathPlan(keep, [0.5] * len(keep), "block" if keep.dim() == 1 else "sample")


def kept_rows(keep: Tensor) -> list[int]:
    return (keep * BATCH if keep.dim() == 1 else keep.sum(dim=1)).tolist()


def _block_plans() -> dict[str, Tensor]:
    path = torch.arange(PATHS)
    generator = torch.Generator().manual_seed(1)
    return {
        "nothing dropped": path >= 0,
        "everything dropped": path < 0,
        "only the last dropped": path < PATHS - 1,
        "only the first dropped": path > 0,
        "first half dropped": path >= PATHS // 2,
        "attention dropped": path % 2 == 1,
        "drawn, 0.1": draw_block_keep([0.1] * PATHS, "bernoulli", generator),
        "drawn, 0.5": draw_block_keep([0.5] * PATHS, "fixed", generator),
    }


def _sample_plans() -> dict[str, Tensor]:
    path, sample = torch.arange(PATHS)[:, None], torch.arange(BATCH)
    generator = torch.Generator().manual_seed(2)
    return {
        "nothing dropped": (path >= 0).expand(PATHS, BATCH),
        "everything dropped": (path < 0).expand(PATHS, BATCH),
        "one sample dropped, in the last path": (path < PATHS - 1) | (sample != 3),
        "one sample dropped, in path 5": (path != 5) | (sample != 0),
        "one sample kept, in path 4": (path == 4) & (sample == 2),
        "paths in turn mixed, kept, dropped": torch.where(path % 3 == 0, sample % 2 == 0, path % 3 == 1),
        "drawn, 0.1": draw_sample_keep([0.1] * PATHS, BATCH, "bernoulli", generator),
        "drawn, 0.5": draw_sample_keep([0.5] * PATHS, BATCH, "fixed", generator),
    }


PLANS = [
    pytest.param(keep, id=f"{mode}: {name}")
    for mode, plans in (("block", _block_plans()), ("sample", _sample_plans()))
    for name, keep in plans.items()
]
OPTIONS = [(freeze, train_rest) for freeze in ("parameters", "branch", "none") for train_rest in (False, True)]


def test_plain_training_costs_three_units_a_matmul():
    assert counted(vit()) == needed_drop([BATCH] * PATHS)


@pytest.mark.parametrize("keep", PLANS)
def test_iterations_cost_what_is_needed(keep):
    for freeze, train_rest in OPTIONS:
        model = vit()
        scheme = rdp.ResidualDropPath(model, 0.5, mode=plan_of(keep).mode, freeze=freeze, train_rest=train_rest)
        costs = {phase: counted(model) for phase in scheme.iterations(plan=plan_of(keep))}
        needed = {"drop": needed_drop(kept_rows(keep))}
        if not keep.all():
            needed["reuse"] = needed_reuse(kept_rows(keep), freeze, train_rest)
        assert costs == needed, (freeze, train_rest)


@pytest.mark.parametrize(
    ("mode", "freeze", "expected"),
    [
        ("block", "parameters", (0.76, 0.72, 0.66)),
        ("sample", "parameters", (0.80, 0.73, 0.67)),
        ("block", "branch", (0.66, 0.62, 0.58)),
    ],
)
def test_mean_cost_of_a_step_is_the_designs(mode, freeze, expected):
    """Equal paths of weight matmuls and no rest: the mean step of 2000 drawn pairs over a plain step of 3 units."""
    generator = torch.Generator().manual_seed(0)
    paths, samples = 24, 1 if mode == "block" else 64
    for drop_prob, wanted in zip((0.1, 0.3, 0.5), expected, strict=True):
        if mode == "block":
            draws = [draw_block_keep([drop_prob] * paths, "bernoulli", generator)[:, None] for _ in range(2000)]
        else:
            draws = [draw_sample_keep([drop_prob] * paths, samples, "bernoulli", generator) for _ in range(2000)]
        units, steps = _units_and_steps(torch.stack(draws).float().mean(dim=2), freeze)
        assert units / (steps * 3 * paths) == pytest.approx(wanted, abs=0.01)


def _units_and_steps(kept: Tensor, freeze: str) -> tuple[float, int]:
    """Units that drop and reuse iterations need together, and how many iterations there are; `kept`: [plans, paths]."""
    dropped = 1 - kept
    learns_by = dropped.cumsum(dim=1)
    earlier_learns = (learns_by - dropped > 1e-6).float()
    reuses = learns_by[:, -1] > 0
    frozen = kept if freeze == "branch" else kept * (1 + earlier_learns)
    units = 3 * kept.sum() + (3 * dropped + frozen).sum(dim=1)[reuses].sum()
    return units.item(), len(kept) + int(reuses.sum())


# Which branches are called, on how many rows, and how


@dataclass(frozen=True)
class Call:
    rows: int
    learns: bool
    recorded: bool = True


def record_calls(model: ViT) -> list[set[Call]]:
    """The calls of each path, all different. The lists fill as the model runs."""
    calls: list[set[Call]] = [set() for _ in model.paths]

    def hook_of(seen: set[Call]) -> Callable:
        def hook(fn: nn.Module, inputs: tuple[Tensor, ...], _: Tensor) -> None:
            (learns,) = {p.requires_grad for p in fn.parameters()}
            call = Call(len(inputs[0]), learns, torch.is_grad_enabled())
            assert call not in seen
            seen.add(call)

        return hook

    for seen, path in zip(calls, model.paths, strict=True):
        path.fn.register_forward_hook(hook_of(seen))
    return calls


@pytest.mark.parametrize("freeze", ["parameters", "branch", "none"])
@pytest.mark.parametrize("keep", PLANS)
def test_branches_run_on_the_rows_of_the_plan_only(keep, freeze):
    model = vit()
    scheme = rdp.ResidualDropPath(model, 0.5, mode=plan_of(keep).mode, freeze=freeze)
    for phase in scheme.iterations(plan=plan_of(keep)):
        calls = record_calls(model)
        model(torch.randn(BATCH, CHANNELS, SIDE, SIDE)).sum().backward()
        for path, (seen, kept) in enumerate(zip(calls, kept_rows(keep), strict=True)):
            if phase == "drop":
                wanted = {Call(kept, learns=True)}
            elif freeze == "none":
                wanted = {Call(BATCH, learns=True)}
            else:
                wanted = {Call(BATCH - kept, learns=True), Call(kept, learns=False, recorded=freeze != "branch")}
            assert seen == {call for call in wanted if call.rows}, (phase, path)
        for path in model.paths:
            path.fn._forward_hooks.clear()


# What autograd saves


@contextlib.contextmanager
def saved_bytes(*models: nn.Module) -> Iterator[Callable[[], int]]:
    """Bytes of the storages that autograd saves inside the block, each counted once, without parameters and buffers."""
    own = {t.untyped_storage().data_ptr() for m in models for t in (*m.parameters(), *m.buffers())}
    saved: dict[int, torch.UntypedStorage] = {}  # keeps them, so that no address is used twice

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield lambda: sum(storage.nbytes() for storage in saved.values())


def saved_in_reuse(
    branch: rdp.ResidualBranch, x: Tensor, keep: Tensor, freeze: str, freeze_bn: bool | str = True
) -> int:
    """Bytes that a reuse iteration saves in `branch`, which is path 0 of two, on a residual that requires grad."""
    model = rdp.ResidualSequence(branch, rdp.ResidualBranch(nn.Linear(1, 1)))
    options = {"freeze": freeze, "freeze_bn": freeze_bn}
    scheme = rdp.ResidualDropPath(model, 0.5, mode=plan_of(keep).mode, train_rest=True, **options)
    for phase in scheme.iterations(plan=plan_of(keep)):
        with saved_bytes(model) as saved:
            out = branch(x.clone().requires_grad_())
        if phase == "reuse":
            assert out.requires_grad
            return saved()
    raise AssertionError("no reuse iteration")


LEARNING, FROZEN = torch.tensor([False, False]), torch.tensor([True, False])
TOKEN_STREAM = torch.zeros(BATCH, TOKENS, DIM)
MEAN_RSTD = 2
# Floats per token that a branch saves in any case, and those that only its weights' gradients need.
ATTENTION_DGRAD = DIM + MEAN_RSTD + 3 * DIM + HEADS * TOKENS  # the norm's input, q, k and v, the softmax
ATTENTION_WGRAD = DIM + DIM  # inputs of qkv and proj
MLP_DGRAD = DIM + MEAN_RSTD + HIDDEN  # the norm's and GELU's inputs
MLP_WGRAD = DIM + HIDDEN  # inputs of fc1 and fc2


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(DIM, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, DIM))


@pytest.mark.parametrize(
    ("fn", "dgrad", "wgrad"),
    [
        pytest.param(lambda: Attention(DIM, HEADS), ATTENTION_DGRAD, ATTENTION_WGRAD, id="attention"),
        pytest.param(mlp, MLP_DGRAD, MLP_WGRAD, id="mlp"),
    ],
)
def test_a_frozen_branch_saves_what_its_dgrad_needs(fn, dgrad, wgrad):
    branch = rdp.ResidualBranch(fn(), norm=nn.LayerNorm(DIM))
    for keep, freeze, floats in (
        (LEARNING, "parameters", dgrad + wgrad),
        (FROZEN, "parameters", dgrad),
        (LEARNING, "branch", dgrad + wgrad),
        (FROZEN, "branch", 0),
    ):
        assert saved_in_reuse(branch, TOKEN_STREAM, keep, freeze) == BATCH * TOKENS * floats * FLOAT, freeze


@pytest.mark.parametrize("freeze", ["parameters", "branch"])
@pytest.mark.parametrize("backend", ["eager", "auto"])
def test_frozen_rows_save_what_their_dgrad_needs(backend, freeze):
    """The add saves the plan's own rows besides, and no copy of them."""
    keep = torch.ones(2, BATCH, dtype=torch.bool)
    keep[0, [1, 4]], keep[1] = False, False
    learning, frozen = 2, BATCH - 2
    indices = 2 * keep.numel()  # the plan's rows and their inverse, one buffer: the gather and the add save views of it
    floats = TOKENS * (learning * (MLP_DGRAD + MLP_WGRAD) + (frozen * MLP_DGRAD if freeze == "parameters" else 0))
    branch = rdp.ResidualBranch(mlp(), norm=nn.LayerNorm(DIM))
    with rdp.use_backend(backend):
        assert saved_in_reuse(branch, TOKEN_STREAM, keep, freeze) == floats * FLOAT + indices * INDEX


@pytest.mark.parametrize(
    ("freeze_bn", "residuals", "vectors"),
    [
        (True, 3, 2 * MEAN_RSTD),  # both BatchNorms' inputs, with means and rstds, and the ReLU's output
        ("running", 1, 2),  # the ReLU's output, and a factor a channel for each BatchNorm
        (False, 3, 2 * MEAN_RSTD),
    ],
)
def test_a_frozen_conv_branch_saves_no_input_of_a_conv(freeze_bn, residuals, vectors):
    def conv() -> list[nn.Module]:
        return [nn.Conv2d(DIM, DIM, 3, padding=1, bias=False), nn.BatchNorm2d(DIM)]

    x = torch.randn(BATCH, DIM, SIDE, SIDE)
    branch = rdp.ResidualBranch(nn.Sequential(*conv(), nn.ReLU(), *conv()), channel_dim=1)
    # Learning: both convolutions' and both BatchNorms' inputs (conv 2's is the ReLU's output), means and rstds.
    wanted = (4 * x.numel() + 2 * MEAN_RSTD * DIM) * FLOAT
    assert saved_in_reuse(branch, x, LEARNING, "parameters", freeze_bn) == wanted
    wanted = (residuals * x.numel() + vectors * DIM) * FLOAT
    assert saved_in_reuse(branch, x, FROZEN, "parameters", freeze_bn) == wanted
    assert saved_in_reuse(branch, x, FROZEN, "branch", freeze_bn) == 0


@pytest.mark.parametrize("freeze", ["parameters", "branch"])
def test_the_frozen_prefix_saves_nothing(freeze):
    """Only the last path, an MLP, learns: only this path and the final norm's dgrad save anything."""
    model, images = vit(), torch.randn(BATCH, CHANNELS, SIDE, SIDE)
    keep = torch.arange(PATHS) < PATHS - 1
    scheme = rdp.ResidualDropPath(model, 0.5, freeze=freeze)
    for phase in scheme.iterations(plan=plan_of(keep)):
        with saved_bytes(model) as saved:
            model(images)
        if phase == "reuse":
            assert saved() == BATCH * TOKENS * (MLP_DGRAD + MLP_WGRAD + DIM + MEAN_RSTD) * FLOAT
    assert saved() == _saved_by_last_path_alone(model)


def _saved_by_last_path_alone(model: ViT) -> int:
    last, x = model.paths[-1], torch.randn(BATCH, TOKENS, DIM)
    model.norm.requires_grad_(False)
    model.head.requires_grad_(False)
    with saved_bytes(model) as saved:
        model.head(model.norm(x + last.fn(last.norm(x))).mean(dim=1))
    return saved()
