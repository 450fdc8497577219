"""The statements of docs/limits.md beside its code. A change of behaviour must be written there too."""

import io

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import rdp_kernels as rdp

from .convert import nets

DIM = 4
KEPT_FIRST = rdp.PathPlan(torch.tensor([True, False]), [0.5, 0.5], "block")


def net(*fns):
    torch.manual_seed(0)
    fns = fns or [nn.Linear(DIM, DIM) for _ in range(2)]
    return nn.Sequential(nn.Linear(DIM, DIM), *map(rdp.ResidualBranch, fns))


def learned(model, plan, loss, mode="block"):
    """By phase, the names of the parameters that got a gradient."""
    scheme, found = rdp.ResidualDropPath(model, 0.5, mode=mode), {}
    for phase in scheme.iterations(plan=plan):
        loss(model).backward()
        found[phase] = {name for name, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
    return found


def plain(model):
    return model(torch.randn(6, DIM)).square().mean()


def function(x: torch.Tensor):
    y = residual_add(x, x, gamma=x[0])
    y = residual_add_norm(drop_path_add(y, y), y, x[0])[0]
    return gather_rows(y, torch.tensor([0, 2]))


residual_add, residual_add_norm, drop_path_add, gather_rows = (
    rdp.residual_add, rdp.residual_add_norm, rdp.drop_path_add, rdp.gather_rows,
)  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_functions_other_than_drop_path_are_recorded_by_traces_only():
    with pytest.raises(
        TypeError, match="residual must be a tensor, got Proxy of .*use torch.export or torch.jit.trace"
    ):
        torch.fx.symbolic_trace(function)
    with pytest.raises(torch.jit.frontend.NotSupportedError):
        torch.jit.script(function)


wrapped_add = rdp.residual_add
torch.fx.wrap("wrapped_add")


def test_functions_that_fx_wraps():
    x = torch.randn(4, DIM)
    graph = torch.fx.symbolic_trace(lambda x: wrapped_add(x, x[:2], rows=torch.tensor([2, 0])))
    assert torch.equal(graph(x), rdp.residual_add(x, x[:2], rows=torch.tensor([2, 0])))


def dense(x):
    return residual_add(x, x.sin(), row_scale=0.5, gamma=x[0], activation="relu")


def rows(x):
    return residual_add(x, x[:2], rows=torch.tensor([2, 0]), row_scale=1.5, gamma=x[0])


def norm(x):
    return torch.cat(residual_add_norm(x, x.sin(), x[0], next_rows=torch.tensor([2, 0])))


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("backend", ["auto", "eager"])
@pytest.mark.parametrize("traced", [function, dense, rows, norm])
@pytest.mark.parametrize("learns", [False, True])
def test_a_trace_holds_plain_ops_with_their_derivatives(backend, traced, learns):
    """For any number of rows. The trace can also be saved."""
    x, more = torch.randn(4, DIM, requires_grad=learns), torch.randn(6, DIM, requires_grad=True)
    with rdp.use_backend(backend):
        trace = torch.jit.trace(traced, x)
    torch.jit.save(trace, saved := io.BytesIO())
    saved.seek(0)
    results = []
    for call in (trace, torch.jit.load(saved), traced):
        with rdp.use_backend("eager"):
            out = call(more)
            results.append((out, *torch.autograd.grad(out.sin().sum(), more)))
    torch.testing.assert_close(results[0], results[2])
    torch.testing.assert_close(results[1], results[2])
    assert "rdp::" not in str(trace.graph)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_a_trace_on_kernels_by_name_says_why_not():
    for name, reason in rdp.available_backends().items():
        if name != "eager" and reason is None:
            with rdp.use_backend(name), pytest.raises(RuntimeError, match=r"can't serve this call: torch\.jit\.trace"):
                torch.jit.trace(rows, torch.randn(4, DIM))


def test_a_penalty_outside_of_the_model_reaches_frozen_weights():
    found = learned(net(), KEPT_FIRST, lambda m: plain(m) + sum(p.square().sum() for p in m.parameters()))
    assert "1.fn.weight" in found["reuse"]
    assert learned(net(), KEPT_FIRST, plain)["reuse"] == {"2.fn.weight", "2.fn.bias"}


@pytest.mark.parametrize("inside", [True, False])
def test_a_tied_head_belongs_into_the_forward(inside):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.paths = nn.Embedding(5, DIM), net()[1:]

        def forward(self, tokens):
            x = self.paths(self.embedding(tokens))
            return nn.functional.linear(x, self.embedding.weight) if inside else x

    def loss(model):
        x = model(torch.arange(5))
        return (x if inside else nn.functional.linear(x, model.embedding.weight)).square().mean()

    assert ("embedding.weight" in learned(Tied(), KEPT_FIRST, loss)["reuse"]) is not inside


def test_what_a_skipped_branch_left_is_old():
    class Leaves(nn.Linear):
        def forward(self, x):
            self.left = super().forward(x)
            return self.left

    model = net(Leaves(DIM, DIM), Leaves(DIM, DIM))
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        for plan in (rdp.PathPlan(torch.tensor([True, True]), [0.5, 0.5], "block"), KEPT_FIRST):
            learned(model, plan, lambda m: plain(m) + m[2].fn.left.square().mean())


PARAMETRIZED = [
    nn.utils.spectral_norm, nn.utils.weight_norm, parametrizations.spectral_norm, parametrizations.weight_norm,
    parametrizations.orthogonal,
]  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize("parametrized", PARAMETRIZED)
@pytest.mark.parametrize("call", ["model", "functional"])
def test_parametrized_weights_freeze(parametrized, call):
    model, moved = net(*(parametrized(nn.Linear(DIM, DIM)) for _ in range(2))), []
    scheme = rdp.ResidualDropPath(model, 0.5)
    for phase in scheme.iterations(plan=KEPT_FIRST):
        before = {name: buffer.clone() for name, buffer in model.named_buffers()}
        weights = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
        x = torch.randn(6, DIM)
        out = model(x) if call == "model" else torch.func.functional_call(model, weights, (x,))
        out.square().mean().backward()
        found = {
            name
            for name, p in (weights.items() if call == "functional" else model.named_parameters())
            if p.grad is not None
        }
        assert {name[0] for name in found} == ({"0", "1"} if phase == "drop" else {"2"})
        moved = {name[0] for name, buffer in model.named_buffers() if not torch.equal(buffer, before[name])}
        model.zero_grad()
    assert moved == ({"1", "2"} if "spectral" in parametrized.__name__ else set())


def test_a_cached_parametrization_is_refused_in_a_sample_mode_reuse_iteration():
    """Frozen rows come first: learning rows would use the weight that was made for them."""

    def cached(model):
        with parametrize.cached():
            return plain(model)

    plan = rdp.PathPlan(torch.tensor([[True, False] * 3]), [0.5], "sample")
    for loss in (plain, cached):
        model = net(parametrizations.weight_norm(nn.Linear(DIM, DIM)))
        if loss is plain:
            assert "1.fn.parametrizations.weight.original0" in learned(model, plan, loss, "sample")["reuse"]
            continue
        with pytest.raises(RuntimeError, match=r"parametrize.cached\(\) would give"):
            learned(model, plan, loss, "sample")


def test_an_argument_that_a_branch_picks_from_by_its_own_rows():
    class Picks(nn.Module):
        def forward(self, x, table):
            return x + table[: len(x)]

    branch, x, table = rdp.ResidualBranch(Picks()), torch.zeros(3, 1), torch.arange(1.0, 4)[:, None]
    scheme = rdp.ResidualDropPath(branch, 0.5, mode="sample", freeze="none", scale_by_keep=False)
    plan = rdp.PathPlan(torch.tensor([[False, True, True]]), [0.5], "sample")
    for per_sample, seen in (((), [0, 1, 2]), (("table",), [0, 2, 3])):
        branch.per_sample = frozenset(per_sample)
        with scheme.drop_iteration(plan=plan):
            assert branch(x, table=table).flatten().tolist() == seen


def test_hooks_on_the_drop_path_of_a_converted_block():
    """A drop-path with a hook isn't converted. If a hook comes later, the block runs unconverted, with a warning."""
    model, seen = nets.tokens_net(nets.Concat), []
    handle = model.blocks[0].drop_path.register_forward_hook(lambda *_: seen.append("drop-path"))
    (row,) = rdp.convert(model, example_inputs=nets.tokens())
    assert "it has hooks" in row.refused
    handle.remove()
    rdp.convert(model, example_inputs=nets.tokens())
    model.blocks[0].drop_path.register_forward_hook(lambda *_: seen.append("drop-path"))
    seen.clear()
    with pytest.warns(UserWarning, match="it has hooks, which wouldn't run"):
        model(nets.tokens())
    assert seen == ["drop-path"]


class LayerDrop(nn.Module):
    def __init__(self, skipped):
        super().__init__()
        self.stem, self.paths, self.skipped = nn.Linear(DIM, DIM), net()[1:], skipped

    def forward(self, x):
        x = self.stem(x)
        for number, path in enumerate(self.paths):
            x = x if number in self.skipped else path(x)
        return x


def test_layer_drop():
    with pytest.warns(UserWarning, match=r"didn't run path 'paths\.1' in a drop iteration"):
        found = learned(LayerDrop({0}), KEPT_FIRST, plain)
    assert {name[:7] for name in found["reuse"]} == {"paths.2"}
    with pytest.raises(RuntimeError, match="does not require grad"):
        learned(LayerDrop({1}), KEPT_FIRST, plain)

    model = LayerDrop(set())
    scheme = rdp.ResidualDropPath(model, 0.1, mode="sample", sampling="fixed")
    with pytest.raises(RuntimeError, match=r"'paths\.2' ran in 1"), scheme.drop_iteration([6, 6]):
        plain(model)
        model.skipped.add(1)
        plain(model)


def test_dropout_in_a_frozen_branch_stays_on():
    model, seen = net(nn.Sequential(nn.Linear(DIM, DIM), nn.Dropout(0.5)), nn.Linear(DIM, DIM)), []
    model[1].fn.register_forward_hook(lambda module, args, out: seen.append((out == 0).float().mean().item()))
    learned(model, KEPT_FIRST, plain)
    assert all(0 < share < 1 for share in seen)
    assert len(seen) == 2


def test_sync_batch_norm_counts_as_batch_norm():
    branch = rdp.ResidualBranch(nn.SyncBatchNorm(DIM))
    with pytest.raises(ValueError, match="BatchNorm in a branch can't be frozen for some samples"):
        rdp.ResidualDropPath(branch, 0.5, mode="sample")
    rows = []
    branch.fn.forward = lambda x: rows.append(len(x)) or x
    with rdp.ResidualDropPath(branch, 0.5, mode="sample", freeze="none").drop_iteration(
        plan=rdp.PathPlan(torch.tensor([[True, False]]), [0.5], "sample")
    ):
        branch(torch.randn(2, DIM))
    assert rows == [2]
