"""FSDP2 on two ranks: gradients are those of one process on the joined batch, and only needed weights are sent.

Budget: 40 seconds in all.
"""

import copy
import warnings

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor.debug import CommDebugMode

import rdp_kernels as rdp
from rdp_kernels.integrations import fsdp

from ..convert import nets as convertible
from .processes import run_ranks

pytestmark = pytest.mark.slow

DIM = 8


class Net(nn.Module):
    """`[B, 3]`: with and without norm and gamma; one path's branch holds two units' worth of modules."""

    def __init__(self, chain=False, drop_prob=0.5):
        super().__init__()
        self.stem, self.head = nn.Linear(3, DIM), nn.Sequential(nn.LayerNorm(DIM), nn.Linear(DIM, 2))
        options = {"drop_prob": drop_prob}
        paths = [
            rdp.ResidualBranch(mlp(), norm=nn.LayerNorm(DIM), gamma=torch.rand(DIM) + 0.5, **options),
            rdp.ResidualBranch(mlp(), **options),
            rdp.ResidualBranch(mlp(), norm=nn.RMSNorm(DIM), **options),
            rdp.ResidualBranch(nn.Sequential(mlp(), nn.Tanh()), gamma=torch.rand(DIM), **options),
        ]
        self.paths = (rdp.ResidualSequence if chain else nn.Sequential)(*paths)

    def forward(self, x):
        return self.head(self.paths(self.stem(x)))


def mlp():
    return nn.Sequential(nn.Linear(DIM, 2 * DIM), nn.GELU(), nn.Linear(2 * DIM, DIM))


def make(chain=False, **options):
    torch.manual_seed(0)
    return Net(chain, **options).double()


def shard(net, units):
    """Makes one unit per branch (gathered for every call, or kept for the iteration), per path, or of the whole
    model."""
    mesh = init_device_mesh("cpu", (2,))
    if units.startswith("branches"):
        return fsdp.shard_paths(net, mesh=mesh, **({"reshard_after_forward": False} if "kept" in units else {}))
    if units == "paths":
        for path in net.paths:
            fully_shard(path, mesh=mesh)
    return fully_shard(net, mesh=mesh)


def joined(plan, batch_size):
    """The plan of one process on the batch of all ranks."""
    if plan.mode == "block":
        return plan
    keeps = [torch.empty_like(plan.keep) for _ in range(dist.get_world_size())]
    dist.all_gather(keeps, plan.keep)
    return rdp.PathPlan(torch.cat(keeps, dim=1), plan.drop_probs, "sample")


def grad_of(parameter):
    grad = parameter.grad
    return grad.full_tensor() if hasattr(grad, "full_tensor") else grad


def compare(one, net, what):
    """Asserts that gradients are those of one process, and None where they are None there."""
    for (name, p), q in zip(one.named_parameters(), net.parameters(), strict=True):
        grad = grad_of(q)
        assert (p.grad is None) == (grad is None), (what, name)
        if grad is not None:
            torch.testing.assert_close(grad, p.grad, rtol=1e-10, atol=1e-10, msg=lambda m, n=name: f"{what}, {n}: {m}")
        assert q.requires_grad, (what, name)


def one_process_equals(rank, one, net, inputs, pairs=5, **options):
    """Runs pairs of iterations on both; returns the numbers of reuse iterations, and of paths only other ranks run."""
    options = {"drop_prob": 0.5, "seed": 3, **options}
    lonely = rdp.ResidualDropPath(one, **options)
    scheme = rdp.ResidualDropPath(net, **options)
    fsdp.register(net, scheme)
    reuses = dummy_calls = 0
    for number in range(pairs):
        whole = inputs(number)
        batch = len(whole) // 2
        here = whole[rank * batch : (rank + 1) * batch]
        for phase in scheme.iterations(batch):
            dummy_calls += len(scheme._pairs.open._dummy_calls)
            if phase == "drop":
                alone = lonely.iterations(len(whole), plan=joined(scheme.plan, batch))
            assert next(alone) == phase
            reuses += phase == "reuse"
            net(here).square().mean().backward()
            one(whole).square().mean().backward()
            compare(one, net, f"{phase} iteration of pair {number}")
            one.zero_grad(), net.zero_grad()
        assert next(alone, None) is None
    scheme.remove(), lonely.remove()
    return reuses, dummy_calls


def random_inputs(batch, *shape):
    return lambda number: torch.randn(batch, *shape, generator=torch.Generator().manual_seed(number)).double()


CASES = [
    (units, chain, {"mode": mode, "freeze": freeze, **more})
    for units, chain, mode, freeze, more in [
        ("branches", False, "block", "parameters", {}),
        ("branches", True, "block", "branch", {}),
        ("branches", False, "sample", "parameters", {}),
        ("branches", True, "sample", "branch", {}),
        ("branches", False, "sample", "none", {"train_rest": True}),
        ("branches, kept", False, "sample", "parameters", {}),
        ("branches, kept", False, "block", "none", {}),
        ("paths", False, "block", "parameters", {"train_rest": True}),
        ("paths", False, "sample", "parameters", {"train_rest": True}),
        ("paths", True, "sample", "branch", {}),
        ("model", True, "block", "parameters", {}),
        ("model", False, "block", "branch", {}),
        ("model", True, "sample", "parameters", {}),
    ]
]


def check_cases(rank):
    found = []
    for units, chain, options in CASES:
        net = shard(make(chain), units)
        found.append(one_process_equals(rank, make(chain), net, random_inputs(4, 3), **options))
    return found


def test_gradients_are_those_of_one_process(results):
    """With two samples a rank, one rank often keeps none, or drops none, where the other does."""
    for found in results["check_cases"]:
        for (_, _, options), (reuses, dummy_calls) in zip(CASES, found, strict=True):
            assert reuses > 3
            assert (dummy_calls > 0) == (options["mode"] == "sample")


class Converted(nn.Module):
    """A stem, blocks as libraries write them, and a head. `[B, 5, 8]`."""

    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Linear(DIM, DIM), nn.Linear(DIM, 2)
        self.blocks = nn.Sequential(convertible.Block(), convertible.Block(), convertible.Shared())

    def forward(self, x):
        return self.head(self.blocks(self.stem(x)))


def check_converted(rank):
    inputs, mesh, found = random_inputs(4, 5, DIM), init_device_mesh("cpu", (2,)), []
    for mode, units in (("block", "branches"), ("sample", "branches"), ("block", "blocks"), ("sample", "blocks")):
        torch.manual_seed(0)
        one = Converted().double()
        net = copy.deepcopy(one)
        for model in (one, net):
            assert not rdp.convert(model, 0.5, example_inputs=inputs(0)).refused
        if units == "blocks":
            for block in net.blocks:
                fully_shard(block, mesh=mesh)
        fsdp.shard_paths(net, mesh=mesh) if units == "branches" else fully_shard(net, mesh=mesh)
        found.append(one_process_equals(rank, one, net, inputs, mode=mode))
    return found


def test_converted_models(results):
    for found in results["check_converted"]:
        assert all(reuses > 3 for reuses, _ in found)


class Promoting(nn.Module):
    """After a linear layer under autocast, float32 is added to a bfloat16 residual."""

    def __init__(self):
        super().__init__()
        self.norm, self.fn, self.gamma = nn.LayerNorm(DIM), nn.Linear(DIM, DIM), nn.Parameter(torch.rand(DIM))
        self.drop_path = convertible.DropPath(0.5)

    def forward(self, x):
        return x + self.drop_path(self.gamma * self.fn(self.norm(x)))


def check_dropped_dtypes(rank):
    """A branch that is probed for its dtype is gathered by all ranks at the same time, or by none."""
    found = []
    for mode in ("block", "sample"):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(DIM, DIM), Promoting(), nn.Linear(DIM, DIM), Promoting()).train()
        assert not rdp.convert(net, 0.6, example_inputs=torch.randn(3, DIM)).refused
        scheme = rdp.ResidualDropPath(shard(net, "branches"), mode=mode, seed=3)
        fsdp.register(net, scheme)
        for _ in range(8):
            for _ in scheme.iterations(2):
                with torch.autocast("cpu", torch.bfloat16):
                    out = net(torch.randn(2, DIM))
                assert out.dtype == torch.float32
                out.square().mean().backward()
                net.zero_grad()
        found.append([len(path.module.promotion._known) for path in scheme.paths])
        scheme.remove()
    return found


def test_dtypes_of_dropped_branches(results):
    first, second = results["check_dropped_dtypes"]
    assert first == second
    assert all(map(any, first)), "each mode probes a branch"


def count_messages(rank):
    """For each iteration: phase, learning paths, gathers, scatters."""
    net = shard(make(), "branches")
    scheme = rdp.ResidualDropPath(net, 0.5, seed=4)
    fsdp.register(net, scheme)
    found = []
    for number in range(10):
        for phase in scheme.iterations():
            with CommDebugMode() as counter:
                net(random_inputs(4, 3)(number)).sum().backward()
            counts = {str(op): count for op, count in counter.get_comm_counts().items()}
            learning = [path.index for path in scheme._pairs.open.learning_paths()]
            gathers, scatters = (
                sum(count for op, count in counts.items() if name in op) for name in ("allgather", "reduce_scatter")
            )
            found.append((phase, learning, gathers, scatters))
    return found


def test_dropped_paths_are_not_gathered_and_frozen_ones_not_scattered(results):
    """The rest of the model, including γ, is one more unit; it stays gathered until its backward."""
    found, other = results["count_messages"]
    assert found == other
    assert {phase for phase, *_ in found} == {"drop", "reuse"}
    for phase, learning, gathers, scatters in found:
        if phase == "drop":
            assert (gathers, scatters) == (1 + 2 * len(learning), 1 + len(learning))
        else:  # backward goes down to the first path that learns
            assert gathers - (1 + 4 + 4 - learning[0]) in (0, 1)  # FSDP prefetches the next one down
            assert scatters == len(learning) + any(path in (0, 3) for path in learning)


def check_mixed_precision(rank):
    """bfloat16 in the branches, float32 between them: as one process in bfloat16, to its roundings."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    net, one = make().float(), make().float()
    for path in net.paths:
        fully_shard(path.fn, mp_policy=policy, mesh=init_device_mesh("cpu", (2,)))
    shard(net, "model")
    schemes = [rdp.ResidualDropPath(m, 0.5, seed=3) for m in (one, net)]
    fsdp.register(net, schemes[1])
    worst = 0.0
    for number in range(6):
        x = random_inputs(8, 3)(number).float()
        for _ in zip(*(s.iterations() for s in schemes), strict=True):
            one(x).square().mean().backward()
            out = net(x[4 * rank : 4 * rank + 4])
            assert out.dtype == torch.float32
            out.square().mean().backward()
            for p, q in zip(one.parameters(), net.parameters(), strict=True):
                assert (p.grad is None) == (q.grad is None)
                if p.grad is not None:
                    assert q.grad.dtype == torch.float32
                    worst = max(worst, float((p.grad - q.grad.full_tensor()).norm() / p.grad.norm().clamp(min=1e-3)))
            one.zero_grad(), net.zero_grad()
    return worst


def test_mixed_precision(results):
    assert all(1e-5 < worst < 0.05 for worst in results["check_mixed_precision"])


def check_weights(rank):
    """AdamW on sharded weights, with momentum and decay: frozen weights don't move by one bit."""
    net = shard(make(), "branches")
    scheme = rdp.ResidualDropPath(net, 0.5, seed=3)
    fsdp.register(net, scheme)
    optimizer = torch.optim.AdamW(net.parameters(), 0.1, weight_decay=0.1)
    moved = []
    for number in range(8):
        for _ in scheme.iterations():
            before = [p.detach().full_tensor().clone() for p in net.parameters()]
            net(random_inputs(4, 3)(number + 100 * rank)).square().mean().backward()
            learning = {id(p) for p in scheme.learning_parameters()}
            optimizer.step(), optimizer.zero_grad()
            for p, old in zip(net.parameters(), before, strict=True):
                moved.append(not torch.equal(p.detach().full_tensor(), old))
                assert moved[-1] == (id(p) in learning)
    return sum(moved), len(moved)


def test_frozen_weights_do_not_move(results):
    for moved, total in results["check_weights"]:
        assert 0.3 * total < moved < 0.9 * total


def check_disagreement(rank):
    net = shard(make(), "branches")
    with pytest.raises(RuntimeError, match=r"rank \d has seed \d, rank \d has \d"):
        fsdp.register(net, rdp.ResidualDropPath(net, 0.5, seed=3 + rank))
    scheme = rdp.ResidualDropPath(net, 0.5, seed=3)
    with pytest.raises(TypeError, match="model must be sharded by fully_shard"):
        fsdp.register(make(), scheme)
    return True


def test_ranks_that_disagree_get_an_error(results):
    assert results["check_disagreement"] == [True, True]


def every_rank_has_gradients(rank):
    """Drop-path without a scheme: ranks don't wait for each other for ever, under FSDP or a DDP that expects all
    gradients."""
    found = []
    for kind in ("ddp", "branches", "paths"):
        for chain in (False, True):
            local = make(chain, drop_prob=0.7)
            local.paths[1].fn.insert(1, nn.BatchNorm1d(2 * DIM).double())
            net = copy.deepcopy(local)
            if kind == "ddp":
                wrapped = nn.parallel.DistributedDataParallel(net, broadcast_buffers=False)
            else:
                wrapped = shard(net, kind)
            lonely = 0
            for number in range(5):
                x = random_inputs(2, 3)(10 * number + rank)
                for model in (local, wrapped):
                    torch.manual_seed(10 * number + rank)
                    model(x).square().mean().backward()
                for p, q in zip(local.parameters(), wrapped.parameters(), strict=True):
                    lonely += not p.grad.any()
                    dist.all_reduce(p.grad)
                    torch.testing.assert_close(grad_of(q), p.grad / 2, rtol=1e-10, atol=1e-12)
                local.zero_grad(), wrapped.zero_grad()
            found.append(lonely)
    return found


def test_without_a_scheme_every_rank_has_gradients(results):
    assert all(lonely > 10 for found in results["every_rank_has_gradients"] for lonely in found)


CHECKS = [
    check_cases,
    check_converted,
    check_dropped_dtypes,
    count_messages,
    check_mixed_precision,
    check_weights,
    check_disagreement,
    every_rank_has_gradients,
]


def run_all(rank):
    warnings.simplefilter("ignore")  # FSDP2's own warning about views: a dropped path returns its input
    return {check.__name__: check(rank) for check in CHECKS}


@pytest.fixture(scope="module")
def results():
    """The result of each check on each rank, from one pair of processes."""
    first, second = run_ranks(run_all)
    return {name: [value, second[name]] for name, value in first.items()}
