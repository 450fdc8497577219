"""DistributedDataParallel on two real ranks, against one process on the joined batch. The cases are in
ddp_worker.py."""

import json
import pickle
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.parallel import DistributedDataParallel

import rdp_kernels as rdp
from rdp_kernels.integrations import distributed

from . import ddp_worker
from .ranks import started, torchrun


def failures_of_ranks(folder, *arguments):
    """The failures of each rank, by case, from two ranks started by torchrun."""
    with started(torchrun(ddp_worker.__file__, str(folder), *arguments)) as process:
        out, _ = process.communicate(timeout=240)
    assert process.returncode == 0, out
    print(out)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    return failures_of_ranks(tmp_path_factory.mktemp("quick"))


@pytest.fixture(scope="module")
def slow(tmp_path_factory):
    return failures_of_ranks(tmp_path_factory.mktemp("slow"), "slow")


@pytest.mark.slow
@pytest.mark.parametrize("name", ddp_worker.QUICK)
def test_on_two_ranks(name, quick):
    """Budget: 40 seconds together."""
    assert [failures[name] for failures in quick] == [[], []]


@pytest.mark.slow
@pytest.mark.parametrize("name", ddp_worker.SLOW)
def test_more_on_two_ranks(name, slow):
    """Budget: 90 seconds together."""
    assert [failures[name] for failures in slow] == [[], []]


@pytest.fixture
def alone(tmp_path):
    """A process group of this process."""
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1, timeout=timedelta(seconds=20))
    yield
    dist.destroy_process_group()


def net():
    return nn.Sequential(nn.Linear(4, 4), *(rdp.ResidualBranch(nn.Linear(4, 4)) for _ in range(3)))


def test_wrong_arguments_are_named(alone):
    model = net()
    scheme, ddp = rdp.ResidualDropPath(model, 0.5), DistributedDataParallel(model, find_unused_parameters=True)
    with pytest.raises(TypeError, match="ddp must be a DistributedDataParallel, got Sequential"):
        distributed.register(model, scheme)
    with pytest.raises(TypeError, match="scheme must be a ResidualDropPath, got float"):
        distributed.register(ddp, 0.5)
    with pytest.raises(ValueError, match=r"find_unused_parameters=True .* got find_unused_parameters=False"):
        distributed.register(DistributedDataParallel(model), scheme)
    with pytest.raises(ValueError, match=r"without static_graph.* got static_graph=True"):
        distributed.register(DistributedDataParallel(model, static_graph=True), scheme)
    other = net()
    with pytest.raises(ValueError, match=r"the model in ddp, which lacks the parameters of path '1'"):
        distributed.register(ddp, rdp.ResidualDropPath(other, 0.5))
    with pytest.raises(TypeError, match="compress must be a floating-point torch.dtype or None, got torch.int8"):
        distributed.register(ddp, scheme, compress=torch.int8)
    with pytest.raises(TypeError, match="every_iteration must be"):
        distributed.register(ddp, scheme, every_iteration=1)
    assert not scheme._on_begin
    ddp.register_comm_hook(None, default_hooks.allreduce_hook)
    with pytest.raises(RuntimeError, match="register_comm_hook"):
        distributed.register(ddp, scheme)
    assert not scheme._on_begin


def test_a_loop_that_starts_twice_registers_twice(alone):
    """Another scheme of the same DDP replaces the earlier one."""
    ddp = DistributedDataParallel(model := net(), find_unused_parameters=True)
    scheme = rdp.ResidualDropPath(model, 0.5)
    for _ in range(2):
        distributed.register(ddp, scheme)
    assert len(scheme._on_begin) == 1
    scheme.remove()
    for keep in ([True, False, True], [False, True, True]):
        scheme = rdp.ResidualDropPath(model, 0.5)
        distributed.register(ddp, scheme)
        with scheme.drop_iteration(plan=rdp.PathPlan(torch.tensor(keep), [0.5] * 3, "block")):
            ddp(torch.randn(2, 4)).sum().backward()
            assert [path.module.fn.weight.grad is not None for path in scheme.paths] == keep
        model.zero_grad()
        scheme.remove()


def test_needs_a_process_group():
    scheme = rdp.ResidualDropPath(model := net(), 0.5)
    with pytest.raises(RuntimeError, match="init_process_group"):
        distributed.agree(scheme)
    assert model[1].binding.scheme is scheme
    assert not scheme._on_begin


def test_a_pickled_ddp_has_no_scheme(alone):
    ddp = DistributedDataParallel(model := net(), find_unused_parameters=True)
    scheme = rdp.ResidualDropPath(model, 0.5)
    distributed.register(ddp, scheme)
    copy = pickle.loads(pickle.dumps(ddp))
    with scheme.drop_iteration(plan=rdp.PathPlan(torch.tensor([False] * 3), [0.5] * 3, "block")), torch.no_grad():
        model(torch.randn(2, 4))
        with torch.enable_grad():
            copy(torch.randn(2, 4)).sum().backward()
    assert all(p.grad is not None for p in copy.parameters())
    assert all(p.grad is None for p in model.parameters())


def test_the_majority_is_right():
    facts = [{"seed": 3, "number": 1}, {"seed": 4, "number": 1}, {"seed": 3, "number": 1}]
    assert distributed.differences([0, 1, 2], facts) == "ranks disagree: rank 1 has seed 4, the other 2 have 3"
    facts = [{"seed": rank} for rank in range(9)]
    message = "rank 5 has seed 1, rank 6 has seed 2, rank 7 has seed 3 and others, rank 4 has 0"
    assert distributed.differences(range(4, 13), facts) == f"ranks disagree: {message}"
    facts = [{f"fact {i}": rank for i in range(5)} for rank in range(2)]
    assert distributed.differences([0, 1], facts).endswith("fact 2 1, rank 0 has 0; and 2 more")
