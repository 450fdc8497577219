"""Parts of training loops. With each, frozen weights don't move by a bit, and the others move as in the textbook."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

import rdp_kernels as rdp

from ..nets import INPUTS, NETS, Iteration, Net, moving_statistics, textbook, took_part

BATCH = 6
SGD = partial(torch.optim.SGD, lr=0.002, momentum=0.9, weight_decay=0.1)
ADAM = partial(torch.optim.Adam, lr=0.01, weight_decay=0.1)
ADAMW = partial(torch.optim.AdamW, lr=0.01, weight_decay=0.1)


def clip_norm(parameters: Iterable[nn.Parameter]) -> None:
    norm = nn.utils.clip_grad_norm_(parameters, 0.1, error_if_nonfinite=True)
    assert norm > 0.1


def clip_value(parameters: Iterable[nn.Parameter]) -> None:
    nn.utils.clip_grad_value_(parameters, 0.01)


@dataclass
class Row:
    """One loop, with a network that makes it hard."""

    net: str
    mode: str
    freeze: str
    optimizer: Callable[..., torch.optim.Optimizer]
    clip: Callable[[Iterable[nn.Parameter]], None] | None = None
    micro_batches: tuple[int, ...] = (BATCH,)
    checkpointed: str | None = None
    autocast: torch.dtype | None = None
    scaled: bool = False
    train_rest: bool = False


ROWS = {
    # BatchNorm in branches and around them: statistics of frozen modules don't move either
    "momentum, a tensor at a time": Row("batch_norm", "block", "parameters", partial(SGD, foreach=False)),
    "momentum, foreach": Row("conv", "sample", "parameters", partial(SGD, foreach=True)),
    "momentum, fused": Row("batch_norm", "block", "branch", partial(SGD, fused=True)),
    "Adam, foreach": Row("batch_norm", "block", "parameters", partial(ADAM, foreach=True)),
    "Adam, fused": Row("conv", "sample", "branch", partial(ADAM, fused=True)),
    "AdamW, foreach, weights of two paths": Row("tied", "block", "parameters", partial(ADAMW, foreach=True)),
    "AdamW, fused, fused kernels": Row("chain", "sample", "parameters", partial(ADAMW, fused=True)),
    "AMSGrad: one state more": Row("tied", "sample", "branch", partial(ADAM, amsgrad=True)),
    "the rest learns twice": Row("conv", "sample", "parameters", ADAM, train_rest=True),
    "the control: everything learns twice": Row("batch_norm", "block", "none", partial(ADAM, foreach=True)),
    # the norm is that of the learning weights
    "clipped norm": Row("chain", "block", "parameters", partial(SGD, foreach=True), clip=clip_norm),
    "clipped norm, per sample": Row("tokens", "sample", "branch", partial(ADAM, fused=True), clip=clip_norm),
    "clipped values": Row("tied", "block", "branch", SGD, clip=clip_value),
    # several forwards in one iteration
    "micro-batches": Row("batch_norm", "block", "parameters", SGD, micro_batches=(4, 2)),
    "micro-batches per sample": Row("chain", "sample", "parameters", SGD, micro_batches=(3, 1, 2), clip=clip_norm),
    "equal micro-batches": Row("conv", "sample", "branch", ADAM, micro_batches=(3, 3)),
    # recomputed in the backward, with the flags of the forward
    "checkpoint": Row("tokens", "sample", "parameters", ADAMW, checkpointed="non-reentrant"),
    "checkpoint, detached": Row("tied", "block", "branch", SGD, checkpointed="non-reentrant"),
    "reentrant checkpoint": Row("tokens", "block", "parameters", ADAMW, checkpointed="reentrant"),
    "reentrant checkpoint per sample": Row("tied", "sample", "branch", ADAM, checkpointed="reentrant"),
    "checkpointed micro-batches": Row(
        "tokens", "block", "branch", SGD, checkpointed="non-reentrant", micro_batches=(2, 4)
    ),
    # float32 weights; the textbook also runs under autocast and rounds differently in places
    "bf16": Row("batch_norm", "block", "parameters", partial(SGD, foreach=True), autocast=torch.bfloat16),
    "bf16 per sample": Row("tied", "sample", "branch", partial(ADAMW, fused=True), autocast=torch.bfloat16),
    "fp16, scaled": Row(
        "chain", "block", "parameters", partial(ADAM, foreach=True), clip_norm, autocast=torch.float16, scaled=True
    ),
    "fp16, scaled, fused: the optimizer unscales": Row(
        "tokens", "sample", "parameters", partial(ADAMW, fused=True), autocast=torch.float16, scaled=True
    ),
    "fp16, scaled, checkpointed micro-batches": Row(
        "tied", "block", "branch", SGD, clip_value, (4, 2), "non-reentrant", torch.float16, scaled=True
    ),
}  # fmt: skip


class Loop:
    """A row's network in training, and its copy that the textbook trains."""

    def __init__(self, row: Row):
        torch.manual_seed(1)
        self.row, self.twin = row, NETS[row.net]().to(torch.float32 if row.autocast else torch.float64)
        self.net = copy.deepcopy(self.twin)
        if row.checkpointed is not None:
            for path in self.net.paths:  # a checkpoint around each
                path.forward = partial(checkpoint, path.forward, use_reentrant=row.checkpointed == "reentrant")
        self.optimizer = row.optimizer(self.net.parameters())
        options = {k: v for k, v in row.optimizer.keywords.items() if k not in ("foreach", "fused")}
        self.twin_optimizer = row.optimizer.func(self.twin.parameters(), foreach=False, **options)
        make = partial(torch.optim.lr_scheduler.ExponentialLR, gamma=0.9)
        self.schedules = [make(self.optimizer), make(self.twin_optimizer)]
        self.scaler = torch.amp.GradScaler("cpu", init_scale=256.0, enabled=row.scaled)
        self.scheme = rdp.ResidualDropPath(
            self.net, 0.5, mode=row.mode, freeze=row.freeze, train_rest=row.train_rest, seed=5
        )

    def iteration(self) -> Iteration:
        plan, row = self.scheme.plan, self.row
        keep = plan.keep if row.mode == "sample" else plan.keep[:, None].expand(-1, BATCH)
        return Iteration(self.scheme.phase, keep, [0.5] * len(keep), row.freeze, row.train_rest)

    def backward(self, forward: Callable[[], Tensor]) -> None:
        with torch.autocast("cpu", self.row.autocast, enabled=self.row.autocast is not None):
            out = forward()
        self.scaler.scale(out.to(self.net.offset.dtype).square().sum()).backward()

    def step(self, x: Tensor) -> None:
        for part in x.split(self.row.micro_batches):
            part.requires_grad_(self.row.checkpointed == "reentrant")
            self.backward(lambda part=part: self.net(part))
        if self.row.clip is not None:
            self.scaler.unscale_(self.optimizer)
            self.row.clip(self.net.parameters())
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def textbook_step(self, x: Tensor, iteration: Iteration) -> None:
        starts = torch.tensor(self.row.micro_batches).cumsum(0)[:-1].tolist()
        keeps = iteration.keep.tensor_split(starts, dim=1)
        for part, keep in zip(x.split(self.row.micro_batches), keeps, strict=True):
            some = Iteration(iteration.phase, keep, iteration.drop_probs, iteration.freeze, iteration.train_rest)
            self.backward(lambda part=part, some=some: textbook(self.twin, part, some))
        part = took_part(self.twin, iteration)
        for name, p in self.twin.named_parameters():
            p.grad = p.grad / self.scaler.get_scale() if name in part else None
        if self.row.clip is not None:
            self.row.clip(self.twin.parameters())
        self.twin_optimizer.step()


def tensors(net: nn.Module) -> dict[str, Tensor]:
    """Weights and buffers, tied ones once."""
    return dict(net.named_parameters()) | dict(net.named_buffers())


def snapshot(net: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Weights, buffers, and the optimizer's state of each weight."""
    found = {name: value.detach().clone() for name, value in tensors(net).items()}
    for name, p in net.named_parameters():
        found |= {f"{name}: {key}": torch.as_tensor(v).clone() for key, v in optimizer.state.get(p, {}).items()}
    return found


def moved(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    """Names of the tensors that aren't equal to the bit."""
    return {name for name in after if name not in before or not torch.equal(before[name], after[name])}


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")  # torch's RMSNorm under autocast
@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS.keys())
def test_frozen_weights_do_not_move_and_the_others_follow_the_textbook(row):
    loop = Loop(row)
    ever = set()
    for _ in range(4):
        for phase in loop.scheme.iterations(row.micro_batches if row.mode == "sample" else None):
            x, iteration = torch.randn(BATCH, *INPUTS[row.net], dtype=loop.net.offset.dtype), loop.iteration()
            learns = took_part(loop.net, iteration)
            buffers = moving_statistics(loop.net, iteration)
            before = snapshot(loop.net, loop.optimizer)
            loop.step(x)
            loop.textbook_step(x, iteration)

            changed = moved(before, snapshot(loop.net, loop.optimizer))
            assert {name.partition(":")[0] for name in changed} == learns | buffers, phase
            check_equal(loop, learns | buffers)
            ever |= changed
            for module in (loop.net, loop.twin):
                module.zero_grad(set_to_none=True)
            for schedule in loop.schedules:
                schedule.step()
            # The textbook runs dropped branches, and so moves their statistics.
            loop.twin.load_state_dict(loop.net.state_dict() if row.autocast else dict(loop.net.named_buffers()), False)
    assert {name for name in ever if ":" not in name} == set(tensors(loop.net))


def check_equal(loop: Loop, names: set[str]) -> None:
    """Compares weights and buffers `names` after the step; with low precision, the gradients of the weights before
    it."""
    actual, expected = tensors(loop.net), tensors(loop.twin)
    if loop.row.autocast is None:
        for name in names:
            torch.testing.assert_close(
                actual[name], expected[name], rtol=1e-10, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}"
            )
        return
    pairs = list(zip(loop.net.parameters(), loop.twin.parameters(), strict=True))
    assert [p.grad is None for p, _ in pairs] == [q.grad is None for _, q in pairs]
    grad, wanted = (
        torch.cat([p.grad.flatten() for p in side if p.grad is not None]) for side in zip(*pairs, strict=True)
    )
    assert (grad - wanted).norm() <= 0.02 * wanted.norm()


# GradScaler


def overflow(net: nn.Module) -> None:
    for p in net.parameters():
        if p.grad is not None:
            p.grad.view(-1)[0] = torch.inf


@pytest.mark.parametrize("bad", ["drop", "reuse"])
def test_a_step_that_the_scaler_skips_is_lost_and_the_pair_goes_on(bad):
    """As in any loop. Nothing moves in the skipped step, and the other iteration is unaffected."""
    torch.manual_seed(0)
    net, x = NETS["tied"]().float(), torch.randn(4, *INPUTS["tied"])
    optimizer, scaler = SGD(net.parameters()), torch.amp.GradScaler("cpu", init_scale=64.0)
    scheme = rdp.ResidualDropPath(net, seed=1, drop_prob=0.5)
    phases = []
    for phase in scheme.iterations():
        before = snapshot(net, optimizer)
        scaler.scale(net(x).square().sum()).backward()
        if phase == bad:
            overflow(net)
        scaler.step(optimizer)
        scaler.update()
        assert bool(moved(before, snapshot(net, optimizer))) == (phase != bad)
        optimizer.zero_grad()
        phases.append(phase)
    assert phases == ["drop", "reuse"]
    assert scheme.state_dict()["completed"] == {"drop": 1, "reuse": 1}


@pytest.mark.parametrize("options", [{"foreach": True}, {"fused": True}], ids=lambda options: next(iter(options)))
def test_alternate_stays_in_the_iteration_whose_step_the_scaler_skips(options):
    """A fused optimizer's step() is called even then, with a flag to do nothing."""
    torch.manual_seed(0)
    net, x = NETS["tied"]().float(), torch.randn(4, *INPUTS["tied"])
    optimizer, scaler = ADAMW(net.parameters(), **options), torch.amp.GradScaler("cpu", init_scale=64.0)
    scheme = rdp.ResidualDropPath(net, 0.5, seed=1)
    handle = scheme.alternate(optimizer)
    phases, plans = [], []
    for step in range(6):
        phases.append(scheme.phase)
        plans.append(scheme.plan)
        scaler.scale(net(x).square().sum()).backward()
        if step in (1, 2, 4):
            overflow(net)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    handle.remove()
    assert phases == ["drop", "reuse", "reuse", "reuse", "drop", "drop"]
    assert plans[0] == plans[1] == plans[2] == plans[3]
    assert plans[4] == plans[5]


# Several optimizers


def of_branches_and_rest(net: Net) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    branches = list(net.paths.parameters())
    return branches, [p for p in net.parameters() if all(p is not q for q in branches)]


@pytest.mark.parametrize("followed", [0, 1])
def test_alternate_may_follow_any_of_several_optimizers(followed):
    """One for the branches, one for the rest. Each steps as often as the other, as in a loop by hand."""
    torch.manual_seed(0)
    net = NETS["tokens"]()
    twin = copy.deepcopy(net)
    x = torch.randn(5, 4, *INPUTS["tokens"], dtype=torch.float64)
    optimizers, twins = (
        [optimizer(parameters) for optimizer, parameters in zip((ADAMW, SGD), of_branches_and_rest(n), strict=True)]
        for n in (net, twin)
    )
    schemes = [rdp.ResidualDropPath(n, 0.5, seed=4) for n in (net, twin)]
    handle = schemes[0].alternate(optimizers[followed])
    for batch in x:
        for phase in schemes[1].iterations():
            assert schemes[0].phase == phase
            for n, several in ((net, optimizers), (twin, twins)):
                n(batch).square().sum().backward()
                for optimizer in several:
                    optimizer.step()
                    optimizer.zero_grad()
    handle.remove()
    assert not moved(tensors(twin), tensors(net))


def test_several_optimizers_under_one_scaler():
    """`scaler.step` needs a gradient: an optimizer without learning weights skips the iteration."""
    torch.manual_seed(0)
    net, x = NETS["tokens"]().float(), torch.randn(4, *INPUTS["tokens"])
    optimizers = [SGD(parameters) for parameters in of_branches_and_rest(net)]
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    scheme = rdp.ResidualDropPath(net, 0.5, seed=1)
    stepped = []
    for phase in scheme.iterations():
        scaler.scale(net(x).square().sum()).backward()
        for which, optimizer in zip(("branches", "rest"), optimizers, strict=True):
            if any(p.grad is not None for group in optimizer.param_groups for p in group["params"]):
                scaler.step(optimizer)
                stepped.append(f"{phase}: {which}")
            else:
                with pytest.raises(AssertionError, match="No inf checks"):
                    scaler.step(optimizer)
            optimizer.zero_grad()
        scaler.update()
    assert stepped == ["drop: branches", "drop: rest", "reuse: branches"]


# Steps that run the network several times, and steps inside the backward


@pytest.mark.parametrize("mode", ["block", "sample"])
def test_sharpness_aware_minimization(mode):
    """Two passes a step, both with the same masks: in between, weights are moved uphill and back."""
    torch.manual_seed(0)
    net = NETS["tokens"]()
    twin = copy.deepcopy(net)
    optimizers = [SGD(n.parameters()) for n in (net, twin)]
    scheme = rdp.ResidualDropPath(net, 0.5, mode=mode, seed=6)

    def climb(n: nn.Module, way: float, grads: list[Tensor | None]) -> None:
        with torch.no_grad():
            for p, grad in zip(n.parameters(), grads, strict=True):
                if grad is not None:
                    p.add_(grad, alpha=way)

    def step(n: nn.Module, optimizer: torch.optim.Optimizer, loss: Callable[[], Tensor], part: set[str]) -> None:
        def gradient() -> list[Tensor | None]:
            n.zero_grad()
            loss().backward()
            for name, p in n.named_parameters():
                p.grad = p.grad if name in part else None
            return [p.grad for p in n.parameters()]

        grads = gradient()
        climb(n, 0.01, grads)
        gradient()
        climb(n, -0.01, grads)
        optimizer.step()

    for x in torch.randn(4, 4, *INPUTS["tokens"], dtype=torch.float64):
        for phase in scheme.iterations(4):
            keep = scheme.plan.keep if mode == "sample" else scheme.plan.keep[:, None].expand(-1, 4)
            iteration = Iteration(phase, keep, [0.5] * len(keep))
            part = took_part(net, iteration)
            before = snapshot(net, optimizers[0])
            everything = {name for name, _ in net.named_parameters()}
            step(net, optimizers[0], lambda x=x: net(x).square().sum(), everything)
            step(twin, optimizers[1], lambda x=x, i=iteration: textbook(twin, x, i).square().sum(), part)
            frozen = everything - part
            assert not frozen & {name.partition(":")[0] for name in moved(before, snapshot(net, optimizers[0]))}
            for name, value in tensors(net).items():
                torch.testing.assert_close(value, tensors(twin)[name], rtol=1e-10, atol=1e-10)


def test_lbfgs_over_what_learns():
    """Its closure runs the network many times a step. Its history would move weights that have been frozen since, so
    that each iteration has a new optimizer, over `learning_parameters`."""
    torch.manual_seed(0)
    net, x = NETS["tokens"](), torch.randn(8, *INPUTS["tokens"], dtype=torch.float64)
    scheme = rdp.ResidualDropPath(net, 0.5, seed=2)
    for _ in range(3):
        for _ in scheme.iterations():
            learns = scheme.learning_parameters()
            optimizer = torch.optim.LBFGS(learns, lr=0.1, max_iter=5, line_search_fn="strong_wolfe")
            losses = []

            def closure(optimizer=optimizer, losses=losses):
                optimizer.zero_grad()
                loss = net(x).square().mean()
                loss.backward()
                losses.append(loss.item())
                return loss

            before = {name: value.detach().clone() for name, value in tensors(net).items()}
            optimizer.step(closure)
            assert len(losses) > 2
            assert net(x).square().mean() < losses[0]
            names = {name for name, p in net.named_parameters() if any(p is q for q in learns)}
            assert moved(before, tensors(net)) == names


def steps_in_the_backward(net: nn.Module) -> list[nn.Parameter]:
    """Gives each weight its own optimizer, which steps as soon as the gradient is complete and frees it. Returns the
    list to which weights are added when they step."""
    each = {p: ADAM([p]) for p in net.parameters()}
    seen: list[nn.Parameter] = []

    def step(p: nn.Parameter) -> None:
        each[p].step()
        each[p].zero_grad()
        seen.append(p)

    for p in net.parameters():
        p.register_post_accumulate_grad_hook(step)
    return seen


@pytest.mark.parametrize(("mode", "freeze"), [("block", "parameters"), ("block", "branch"), ("sample", "branch")])
def test_an_optimizer_in_the_backward(mode, freeze):
    """A frozen weight gets no gradient, so that its optimizer doesn't run."""
    torch.manual_seed(0)
    net = NETS["conv"]()
    twin = copy.deepcopy(net)
    seen, optimizer = steps_in_the_backward(net), ADAM(twin.parameters())
    schemes = [rdp.ResidualDropPath(n, 0.5, mode=mode, freeze=freeze, seed=3) for n in (net, twin)]
    for x in torch.randn(4, 4, *INPUTS["conv"], dtype=torch.float64):
        for phase, _ in zip(*(scheme.iterations(4) for scheme in schemes), strict=True):
            keep = schemes[0].plan.keep if mode == "sample" else schemes[0].plan.keep[:, None]
            part = took_part(net, Iteration(phase, keep, [0.5] * len(keep)))
            seen.clear()
            before = {name: p.detach().clone() for name, p in net.named_parameters()}
            for n in (net, twin):
                n(x).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            assert {name for name, p in net.named_parameters() if any(p is q for q in seen)} == part
            assert moved(before, dict(net.named_parameters())) == part
            for name, value in tensors(net).items():
                torch.testing.assert_close(value, tensors(twin)[name], rtol=1e-10, atol=1e-10)


def test_an_optimizer_in_the_backward_of_partly_frozen_weights_is_refused_by_torch():
    """Samples for which a weight is frozen still need it when its gradient, from other samples, is complete."""
    net = NETS["conv"]()
    steps_in_the_backward(net)
    scheme = rdp.ResidualDropPath(net, 0.5, mode="sample", seed=3)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        for _ in scheme.iterations(4):
            net(torch.randn(4, *INPUTS["conv"], dtype=torch.float64)).square().sum().backward()
    assert scheme.phase is None


# Averages


@pytest.mark.parametrize("mode", ["block", "sample"])
def test_an_average_of_weights_follows_every_step(mode):
    """An average made inside an iteration is an ordinary model without the scheme, and is updated at every step."""
    torch.manual_seed(0)
    net, x = NETS["conv"](), torch.randn(4, *INPUTS["conv"], dtype=torch.float64)
    scheme, optimizer = rdp.ResidualDropPath(net, 0.5, mode=mode, seed=1), SGD(net.parameters())
    average, expected = None, {}
    for _ in range(3):
        for _ in scheme.iterations(4):
            net(x).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            if average is None:
                average = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=True)
                assert all(p.requires_grad for p in average.parameters())
            average.update_parameters(net)
            for name, value in tensors(net).items():
                blend = 0.5 * expected[name] + 0.5 * value if name in expected else value
                expected[name] = blend.detach().clone()
    for name, value in tensors(average.module).items():
        if value.is_floating_point():  # not BatchNorm's number of batches
            torch.testing.assert_close(value, expected[name], rtol=1e-10, atol=1e-10)
    assert all(m.binding.scheme is None for m in average.modules() if isinstance(m, rdp.ResidualBranch))
