"""The ranks of test_ddp.py: torchrun starts this file with a folder and, on request, `slow`. It runs each case below on
two ranks and writes what went wrong to `FOLDER/RANK.json`.

Failures are collected rather than raised: if a rank left a case early, the other would wait.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import json
import os
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import rdp_kernels as rdp
from examples.models import ViT
from rdp_kernels.integrations import distributed
from tests.convert import nets as convertible
from tests.nets import INPUTS, NETS

QUICK: dict[str, Callable[[], None]] = {}
SLOW: dict[str, Callable[[], None]] = {}
RANK, WORLD = int(os.environ.get("RANK", 0)), 2
failures: list[str] = []


def expect(truth: bool, what: str) -> None:
    if not truth:
        failures.append(what)


def case(slow=False, **options):
    """Adds a case, named by the function and its options."""

    def add(function):
        name = " ".join([function.__name__, *(f"{k}={v}" for k, v in options.items())])
        (SLOW if slow else QUICK)[name] = functools.partial(function, **options)
        return function

    return add


# Networks


def converted_net() -> nn.Module:
    net = convertible.tokens_net(convertible.Block, convertible.Shared).double()
    rdp.convert(net, 0.5, example_inputs=convertible.tokens(dtype=torch.float64))
    return net


class Narrow(nn.Module):
    """A branch in float32 on a float64 residual."""

    def __init__(self, fn: nn.Module):
        super().__init__()
        self.fn = fn.float()

    def forward(self, x: Tensor) -> Tensor:
        return self.fn(x.float()).double()


def mixed_net() -> nn.Module:
    """Two dtypes, a parameter that the user froze, a channels_last weight."""
    net = NETS["conv"]()
    net.paths[1].shortcut = nn.Conv2d(4, 6, 1, 2).double()  # no BatchNorm: its statistics are a rank's own
    net.paths[2].fn = Narrow(net.paths[2].fn)
    net.paths[0].fn[0].weight.requires_grad_(False)
    net.paths[3].fn.to(memory_format=torch.channels_last)
    return net


BUILD = {**NETS, "converted": converted_net, "mixed": mixed_net}
SHAPES = {**INPUTS, "converted": (6, convertible.DIM), "mixed": INPUTS["conv"]}


class Pair:
    """A net on two ranks, and its copy that a single process trains on the joined batch."""

    def __init__(
        self, net="tokens", mode="block", drop_prob=0.5, sizes=(3, 2), bucket_cap_mb=0.0005, view=False, **rules
    ):
        warnings.filterwarnings("ignore", message="path .* has", category=UserWarning)
        torch.manual_seed(0)
        self.net, self.sizes, self.shape = BUILD[net](), sizes, SHAPES[net]
        self.whole = copy.deepcopy(self.net)
        options = {"drop_prob": drop_prob, "mode": mode, "seed": 3, **rules}
        self.ddp = DistributedDataParallel(
            self.net, find_unused_parameters=True, bucket_cap_mb=bucket_cap_mb, gradient_as_bucket_view=view
        )
        self.scheme = rdp.ResidualDropPath(self.net, **options)
        self.agreement = distributed.register(self.ddp, self.scheme)
        self.one = rdp.ResidualDropPath(self.whole, **options)
        self.optimizers = [
            torch.optim.SGD(n.parameters(), 1e-3, momentum=0.9, weight_decay=0.1) for n in (self.net, self.whole)
        ]
        self.generator = torch.Generator().manual_seed(7)
        self.iterations = 0
        self.tolerance = 1e-5 if net == "mixed" else 1e-10

    def batch(self, sizes=None) -> tuple[Tensor, Tensor]:
        """This rank's part, and all of it."""
        sizes = sizes or self.sizes
        whole = torch.randn(sum(sizes), *self.shape, generator=self.generator, dtype=torch.float64)
        return whole.split(list(sizes))[RANK], whole

    def follow(self, phase: str):
        """The same iteration of the single process."""
        if phase == "reuse":
            return self.one.reuse_iteration()
        keeps = gathered(self.scheme.plan.keep)
        drop_probs, mode = self.scheme.plan.drop_probs, self.scheme.mode
        if mode == "block":
            expect(torch.equal(*keeps), "block masks are identical")
            return self.one.drop_iteration(plan=rdp.PathPlan(keeps[0], drop_probs, mode))
        sizes = [size for sizes in gathered(self.scheme._pairs.open.forwards) for size in sizes]
        sizes = sizes if len(sizes) > WORLD else sum(sizes)
        return self.one.drop_iteration(sizes, plan=rdp.PathPlan(torch.cat(keeps, dim=1), drop_probs, mode))

    def compare(self) -> None:
        """Compares gradients, and weights after an optimizer step; weights without gradient haven't moved."""
        self.iterations += 1
        where = f"iteration {self.iterations} ({self.scheme.phase})"
        grads = [{n: p.grad for n, p in net.named_parameters()} for net in (self.net, self.whole)]
        compare(*grads, where, self.tolerance)
        before = {n: p.detach().clone() for n, p in self.net.named_parameters()}
        for optimizer in self.optimizers:
            optimizer.step()
        for name, p in self.net.named_parameters():
            expect(p.grad is not None or torch.equal(p, before[name]), f"{where}: {name} moves without a gradient")
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)

    def close(self) -> None:
        expect(not self.one.reuse_pending, "a reuse iteration was left out")
        values = [{n: p.detach() for n, p in net.named_parameters()} for net in (self.net, self.whole)]
        compare(*values, "final weights", self.tolerance)


def compare(actual: dict, expected: dict, where: str, tolerance: float = 1e-10) -> None:
    for name, value in expected.items():
        other = actual[name]
        expect((other is None) == (value is None), f"{where}: {name} is {other}, not {value}")
        if other is not None and value is not None:
            error = (other - value).abs().max().item()
            expect(error <= tolerance * max(1.0, value.abs().max().item()), f"{where}: {name} is off by {error:.1e}")


def gathered(value) -> list:
    out = [None] * WORLD
    dist.all_gather_object(out, value)
    return out


# Gradients


@case(net="tokens", mode="block", freeze="parameters")
@case(net="tokens", mode="sample", freeze="branch", view=True)
@case(net="chain", mode="sample", freeze="parameters", drop_prob=0.1, bucket_cap_mb=25)
@case(net="tied", mode="block", freeze="parameters", train_rest=True, view=True)
@case(net="converted", mode="sample", freeze="branch", drop_prob=0.1)
@case(net="mixed", mode="block", freeze="none")
@case(slow=True, net="tokens", mode="block", freeze="parameters", train_rest=True)
@case(slow=True, net="tokens", mode="block", freeze="branch", view=True)
@case(slow=True, net="tokens", mode="block", freeze="branch", train_rest=True)
@case(slow=True, net="tokens", mode="block", freeze="none", bucket_cap_mb=25)
@case(slow=True, net="tokens", mode="sample", freeze="parameters")
@case(slow=True, net="tokens", mode="sample", freeze="parameters", train_rest=True, view=True)
@case(slow=True, net="tokens", mode="sample", freeze="branch", train_rest=True)
@case(slow=True, net="tokens", mode="sample", freeze="none")
@case(slow=True, net="tied", mode="sample", freeze="branch", drop_prob=0.1)
@case(slow=True, net="tied", mode="sample", freeze="parameters", sampling="fixed", view=True)
@case(slow=True, net="converted", mode="block", freeze="parameters", view=True)
@case(slow=True, net="mixed", mode="block", freeze="parameters", view=True)
@case(slow=True, net="mixed", mode="sample", freeze="parameters", drop_prob=0.1)
def equals_one_process(**options) -> None:
    """At least 20 iterations. With p = 0.1 a rank often drops nothing in sample mode, while the other does."""
    pair = Pair(**options)
    nothing_learned = 0
    while pair.iterations < 20:
        x, whole = pair.batch()
        for phase in pair.scheme.iterations(len(x)):
            with pair.follow(phase):
                pair.whole(whole).square().sum().backward()
            (WORLD * pair.ddp(x).square().sum()).backward()
            nothing_learned += phase == "reuse" and not pair.scheme.plan.dropped_paths
            pair.compare()
    pair.close()
    if pair.scheme.mode == "sample" and options.get("drop_prob") == 0.1:
        expect(sum(gathered(nothing_learned)) > 0, "the case that a rank learns nothing came up")


@case(mode="block", together=False)
@case(mode="sample", together=True)
@case(slow=True, mode="sample", together=False)
@case(slow=True, mode="block", together=True)
def several_forwards(mode: str, together: bool) -> None:
    """Micro-batches of an iteration: accumulated with no_sync(), or with one backward for the sum of their losses."""
    pair = Pair("chain", mode, drop_prob=0.3)
    while pair.iterations < 8:
        parts = [pair.batch((2, 1)), pair.batch((1, 2))]
        for phase in pair.scheme.iterations([len(x) for x, _ in parts]):
            with pair.follow(phase):
                # In the order of the joined plan, rank by rank.
                for x in [x for xs in gathered([x for x, _ in parts]) for x in xs]:
                    pair.whole(x).square().sum().backward()
            if together:
                sum(WORLD * pair.ddp(x).square().sum() for x, _ in parts).backward()
            else:
                for last, (x, _) in enumerate(parts):
                    with contextlib.nullcontext() if last else pair.ddp.no_sync():
                        (WORLD * pair.ddp(x).square().sum()).backward()
            pair.compare()
    pair.close()


@case()
def backward_may_come_late() -> None:
    """It runs after its iteration, while the next one is open in which other parameters learn."""
    pair = Pair()
    for _ in range(3):
        x, whole = pair.batch()
        for phase in pair.scheme.iterations():
            pair.net.zero_grad(), pair.whole.zero_grad()
            with pair.follow(phase):
                pair.whole(whole).square().sum().backward()
            loss = WORLD * pair.ddp(x).square().sum()
            if phase == "drop":
                loss.backward()
        with pair.scheme.drop_iteration(plan=rdp.PathPlan(torch.zeros(6, dtype=torch.bool), [0.5] * 6, "block")):
            loss.backward()
        compare(*({n: p.grad for n, p in net.named_parameters()} for net in (pair.net, pair.whole)), "reuse, late")
        pair.scheme.reset()


@case()
def without_an_iteration_all_is_averaged() -> None:
    """Also in eval mode inside an iteration, and after the scheme was removed."""
    pair = Pair()

    def check(where: str) -> None:
        x, whole = pair.batch()
        pair.whole(whole).square().sum().backward()
        (WORLD * pair.ddp(x).square().sum()).backward()
        grads = [{n: p.grad for n, p in net.named_parameters()} for net in (pair.net, pair.whole)]
        compare(*grads, where)
        expect(sum(g is None for g in grads[0].values()) == 0, f"{where}: everything has a gradient")
        pair.net.zero_grad(), pair.whole.zero_grad()

    check("no iteration")
    for _ in pair.scheme.iterations(plan=rdp.PathPlan(torch.tensor([True, False] * 3), [0.5] * 6, "block")):
        pair.net.eval()
        check("eval mode")
        pair.net.train()
        pair.net.paths.eval(), pair.whole.paths.eval()
        if pair.scheme.phase == "drop":
            check("paths in eval mode")
        pair.net.train(), pair.whole.train()
    pair.scheme.remove()
    check("removed")


@case()
def a_part_of_the_model_has_the_scheme() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(NETS["tied"](), nn.Linear(2, 2).double())
    ddp = DistributedDataParallel(net, find_unused_parameters=True)
    scheme = rdp.ResidualDropPath(net[0], 0.5, seed=1)
    distributed.register(ddp, scheme)
    for _ in range(4):
        for _ in scheme.iterations():
            ddp(torch.full((2, 3, 4), 1.0 + RANK, dtype=torch.float64)).square().sum().backward()
            grads = gathered([None if p.grad is None else p.grad.clone() for p in net.parameters()])
            expect(grads[RANK][-1] is not None, "the head outside learns in every iteration")
            for a, b in zip(*grads, strict=True):
                expect(a is b is None or torch.equal(a, b), "the same gradient on both ranks")
            net.zero_grad()


@case(compress=torch.float32, tolerance=1e-6)
@case(slow=True, compress=torch.bfloat16, tolerance=2e-2)
def compressed(compress: torch.dtype, tolerance: float) -> None:
    torch.manual_seed(0)
    net = NETS["tokens"]()
    exact = copy.deepcopy(net)
    both = [DistributedDataParallel(n, find_unused_parameters=True, bucket_cap_mb=0.001) for n in (net, exact)]
    schemes = [rdp.ResidualDropPath(n, 0.5, seed=5) for n in (net, exact)]
    distributed.register(both[0], schemes[0], compress=compress)
    distributed.register(both[1], schemes[1])
    largest = 0.0
    for _ in range(3):
        x = torch.randn(3, *INPUTS["tokens"], generator=torch.Generator().manual_seed(RANK)).double()
        for _ in zip(*(s.iterations() for s in schemes), strict=True):
            for ddp in both:
                ddp(x).square().sum().backward()
            for p, q in zip(net.parameters(), exact.parameters(), strict=True):
                expect((p.grad is None) == (q.grad is None), "None where it should be")
                if q.grad is not None:
                    error = ((p.grad - q.grad).abs().max() / q.grad.abs().max().clamp_min(1e-6)).item()
                    largest = max(largest, error)
            net.zero_grad(), exact.zero_grad()
    expect(1e-12 < largest < tolerance, f"rounded to {compress}: error {largest:.1e}")


@case()
def alternate_follows_the_optimizer() -> None:
    pair = Pair()
    handle = pair.scheme.alternate(pair.optimizers[0])
    while pair.iterations < 20:
        x, whole = pair.batch()
        with pair.follow(pair.scheme.phase):
            pair.whole(whole).square().sum().backward()
        (WORLD * pair.ddp(x).square().sum()).backward()
        pair.compare()
    handle.remove()
    pair.one.reset()
    pair.close()


# Agreement


def disagreement(call: Callable[[], object], *wanted: str) -> None:
    """Every rank gets the same error; it says what is `wanted`."""
    try:
        call()
        message = "no error"
    except RuntimeError as error:
        message = str(error)
    expect(len(set(gathered(message))) == 1, f"not the same on every rank: {message}")
    for part in wanted:
        expect(part in message, f"{part!r} is not in {message!r}")


def small_net(paths: int = 3, hidden: int = 4) -> nn.Sequential:
    def fn() -> nn.Module:
        return nn.Sequential(nn.Linear(4, hidden), nn.Linear(hidden, 4))

    return nn.Sequential(*(rdp.ResidualBranch(fn(), drop_prob=0.25) for _ in range(paths)))


def scheme_of(net: nn.Module, *args, **kwargs) -> rdp.ResidualDropPath:
    """The paths hold their scheme weakly, so that the net keeps it alive."""
    net.scheme = rdp.ResidualDropPath(net, *args, **kwargs)
    return net.scheme


@case()
def disagreement_at_the_start() -> None:
    def start(*args, net=None, **kwargs):
        return lambda: distributed.agree(scheme_of(net or small_net(), *args, **kwargs))

    disagreement(start(0.5, seed=3 + RANK), "ranks disagree: rank 1 has seed 4, rank 0 has 3")
    disagreement(start(0.5 - 0.2 * RANK), "rank 1 has drop_prob of path '0' 0.3, rank 0 has 0.5; ", "'2' 0.3")
    disagreement(start(net=small_net(3 + RANK)), "rank 1 has number of paths 4, rank 0 has 3; rank 1 has path 3 3,")
    disagreement(start(net=small_net(hidden=4 + RANK)), "rank 1 has parameters in path '0' ['[5, 4] float32', ")
    disagreement(start(mode=("block", "sample")[RANK]), "rank 1 has mode sample, rank 0 has block")
    disagreement(start(freeze=("branch", "none")[RANK]), "rank 1 has options Rules(freeze='none'", "freeze='branch'")
    frozen = small_net()
    frozen[1].requires_grad_(not RANK)
    disagreement(start(net=frozen), "parameters in path '1'", "float32 frozen")
    loaded = scheme_of(small_net(), 0.5, seed=2)
    if RANK == 0:
        for _ in range(3):
            list(loaded.iterations())
    disagreement(lambda: distributed.agree(loaded), "rank 1 has plans drawn 0, rank 0 has 3")
    pending = scheme_of(small_net(), seed=2)
    with pending.drop_iteration(plan=plan_of(RANK == 0, False, True)):
        pass
    disagreement(lambda: distributed.agree(pending), "rank 1 has plan that drops paths [0, 1], rank 0 has [1]")
    start(0.5)()


def plan_of(*keep: bool) -> rdp.PathPlan:
    return rdp.PathPlan(torch.tensor(keep), [0.25] * len(keep), "block")


@case()
def disagreement_later() -> None:
    scheme = scheme_of(small_net(), seed=2)
    distributed.agree(scheme)
    list(scheme.iterations())
    disagreement(lambda: list(scheme.iterations(plan=plan_of(True, False, not RANK))), "rank 1 has plan that drops")
    expect(scheme.phase is None and not scheme.reuse_pending, "the refused iteration isn't open")
    list(scheme.iterations())

    if RANK == 1:  # another state than rank 0
        scheme.load_state_dict(scheme_of(small_net(), seed=9).state_dict())
    disagreement(lambda: list(scheme.iterations()), "rank 1 has seed 9, rank 0 has 2; rank 1 has plans drawn 1")
    scheme.load_state_dict(scheme_of(small_net(), seed=9).state_dict())

    with scheme.drop_iteration(plan=plan_of(True, False, True)):
        pass
    if RANK == 1:  # skips the reuse iteration
        scheme._pairs.pending = None
    disagreement(lambda: list(scheme.iterations()), "rank 1 has plans drawn 1, rank 0 has 0")
    expect(scheme.reuse_pending == (RANK == 0), "what was pending stays pending")
    scheme.load_state_dict(scheme_of(small_net(), seed=9).state_dict())

    if RANK == 1:
        scheme.paths[2].module.drop_prob = 0.75
    disagreement(lambda: list(scheme.iterations()), "rank 1 has drop_prob of path '2' 0.75, rank 0 has 0.25")

    for mode, seen in (("block", "no error"), ("sample", "rank 1 has seed 9, rank 0 has 2")):
        lenient = scheme_of(small_net(), seed=2, mode=mode)
        handle = distributed.agree(lenient, every_iteration=False)
        if RANK == 1:
            lenient.seed = 9
        disagreement(lambda lenient=lenient: list(lenient.iterations(2)), seen)
        handle.remove()
        disagreement(lambda lenient=lenient: list(lenient.iterations(2)), "no error")


# Bytes


def collective_bytes(step: Callable[[], object]) -> int:
    """Bytes that `step` sends: the sizes of all tensors that this rank passes to gloo from any caller."""
    sizes = {"float": 4, "int": 4, "unsigned char": 1}
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True, acc_events=True
    ) as profile:
        step()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder, "trace.json")  # profile.events() takes a second
        profile.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    calls = [event["args"] for event in events if event["name"].startswith("gloo:")]
    return sum(
        sizes[dtype] * torch.Size(shape).numel()
        for call in calls
        for shape, dtype in zip(call["Input Dims"], call["Input type"], strict=True)
    )


@case()
def bytes_sent() -> None:
    """A transformer of 24 paths; buckets of 50 kB, which most paths share with others."""
    torch.manual_seed(0)
    net, x = ViT(depth=12, dim=32, drop_prob=0.2), torch.randn(2, 1, 8, 8)
    plain = DistributedDataParallel(copy.deepcopy(net), find_unused_parameters=True, bucket_cap_mb=0.05)
    ddp = DistributedDataParallel(net, find_unused_parameters=True, bucket_cap_mb=0.05)
    scheme = rdp.ResidualDropPath(net, seed=1)
    distributed.register(ddp, scheme)
    total = sum(4 * p.numel() for p in net.parameters())
    scheme_of(plain.module, 0.0)  # nothing is dropped outside of iterations
    whole = collective_bytes(lambda: plain(x).sum().backward())
    expect(total < whole < 1.01 * total, f"plain DDP sends {whole} bytes for {total} of gradients")
    for _ in range(2):
        iterations = scheme.iterations()
        for wanted in ("drop", "reuse"):
            seen = []

            def iterate(iterations=iterations, seen=seen) -> None:  # with the exchange at its start
                seen.append(next(iterations))
                ddp(x).sum().backward()

            sent = collective_bytes(iterate)
            expect(seen == [wanted], f"{seen}, not {wanted}")
            share = sum(4 * p.numel() for p in scheme.learning_parameters()) / total
            expect(share - 0.01 < sent / whole <= share + 0.05, f"{sent} of {whole} bytes, {share:.4f} learns")
            if RANK == 0:
                print(f"{wanted}: {share:.4f} of the parameters learns, {sent / whole:.4f} of the bytes is sent")
            net.zero_grad()
        expect(next(iterations, None) is None, "the pair is over")


# Restart


@case(steps=3)
@case(steps=4)
def restart_on_another_world_size(steps: int) -> None:
    """From two ranks to one and back, also in the middle of a pair: the state doesn't depend on the number of ranks."""
    pair = Pair()

    def train(model: nn.Module, scheme, optimizer, x: Tensor, scale: int) -> None:
        with scheme.reuse_iteration() if scheme.reuse_pending else scheme.drop_iteration():
            (scale * model(x).square().sum()).backward()
            optimizer.step(), optimizer.zero_grad()

    def state(net, optimizer, scheme):
        return copy.deepcopy([part.state_dict() for part in (net, optimizer, scheme)])

    batches = [pair.batch() for _ in range(3 * steps)]
    distributed_part, single_part = (
        (pair.net, pair.optimizers[0], pair.scheme),
        (pair.whole, pair.optimizers[1], pair.one),
    )
    for start in range(0, 3 * steps, steps):
        for mine, whole in batches[start : start + steps]:
            train(pair.ddp, pair.scheme, pair.optimizers[0], mine, WORLD)
            train(pair.whole, pair.one, pair.optimizers[1], whole, 1)
        states = [state(*part) for part in (distributed_part, single_part)]
        expect(states[0][2] == states[1][2], "the scheme's state doesn't depend on the number of ranks")
        for part, values in zip(
            (distributed_part, single_part), reversed(states), strict=True
        ):  # each continues from the other's state
            for where, value in zip(part, values, strict=True):
                where.load_state_dict(value)
    values = [{n: p.detach() for n, p in net.named_parameters()} for net in (pair.net, pair.whole)]
    compare(*values, "final weights")


def main() -> None:
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=20))
    results = {}
    for name, function in (SLOW if "slow" in sys.argv else QUICK).items():
        failures.clear()
        try:
            function()
        except Exception:
            failures.append(traceback.format_exc())
        results[name] = failures[:10]
        (folder / f"{RANK}.json").write_text(json.dumps(results))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
