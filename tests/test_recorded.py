"""Drop-paths and branches recorded by `torch.fx`, `torch.jit` and `torch.export`."""

import io
import warnings

import pytest
import torch
from torch import fx, nn

import rdp_kernels as rdp
from examples.libraries import import_torchvision, installed

DIM = 6


@pytest.fixture(autouse=True)
def _no_word_of_deprecation():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*torch.jit", category=DeprecationWarning)
        yield


class Block(nn.Module):
    """A residual block in the usual way."""

    def __init__(self, drop_path):
        super().__init__()
        self.fn, self.drop_path = nn.Linear(DIM, DIM), drop_path

    def forward(self, x):
        return x + self.drop_path(self.fn(x))


def net(**options):
    """A network that uses every option of a branch."""
    torch.manual_seed(0)
    return nn.Sequential(
        rdp.ResidualBranch(nn.Linear(DIM, DIM), norm=nn.LayerNorm(DIM), gamma=torch.rand(DIM), **options),
        rdp.ResidualBranch(nn.Linear(DIM, DIM), shortcut=nn.Linear(DIM, DIM), activation="relu", **options),
        rdp.ResidualSequence(
            rdp.ResidualBranch(nn.Linear(DIM, DIM), norm=nn.RMSNorm(DIM), **options),
            rdp.ResidualBranch(nn.Linear(DIM, DIM), **options),
        ),
    )


def script(model, x):
    return torch.jit.script(model)


def trace(model, x):
    return torch.jit.trace(model, x, check_trace=False)


def symbolic_trace(model, x):
    return fx.symbolic_trace(model)


def export(model, x):
    return torch.export.export(model, (x,)).module()


RECORDERS = pytest.mark.parametrize("record", [symbolic_trace, trace, script, export])
OF_BRANCHES = pytest.mark.parametrize("record", [symbolic_trace, trace, export])


def seeded(function, *args):
    torch.manual_seed(3)
    return function(*args)


@RECORDERS
@pytest.mark.parametrize("training", [True, False])
def test_drop_path(record, training):
    """Its draws too are those of an ordinary call."""
    model, x = Block(rdp.DropPath(0.5)).train(training), torch.randn(50, 3, DIM)
    recorded = record(model, x)
    torch.testing.assert_close(seeded(recorded, x), seeded(model, x))
    if training:
        dropped = (seeded(recorded, x) == x).all(dim=(1, 2))
        assert 0 < int(dropped.sum()) < 50


@pytest.mark.parametrize("record", [symbolic_trace, trace, script])
def test_a_recorded_drop_path_doesnt_read_dropped_rows(record):
    recorded = record(nn.Sequential(rdp.DropPath(0.5)).train(), torch.ones(50, 3))
    x = torch.full((50, 3), torch.nan, requires_grad=True)
    out = recorded(x)
    dropped = (out == 0).all(dim=1)
    assert 0 < int(dropped.sum()) < 50
    out[dropped].sum().backward()
    assert torch.equal(x.grad, torch.zeros_like(x))


@pytest.mark.parametrize("record", [symbolic_trace, trace, script])
@pytest.mark.parametrize(("drop_prob", "scale_by_keep"), [(0.0, True), (0.5, False), (1.0, True)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_recorded_drop_path_at_any_rate(record, drop_prob, scale_by_keep, dtype):
    model, x = nn.Sequential(rdp.DropPath(drop_prob, scale_by_keep)), torch.randn(20, 3, dtype=dtype)
    out = seeded(record(model, x), x)
    assert torch.equal(out, seeded(model, x))
    assert out.dtype == dtype


def test_a_script_follows_train_and_eval_and_needs_none_of_this_package():
    scripted = torch.jit.script(Block(rdp.DropPath(1.0)))
    file = io.BytesIO()
    torch.jit.save(scripted, file)
    assert b"rdp::" not in file.getvalue()
    x = torch.randn(4, DIM)
    assert torch.equal(scripted(x), x)
    torch.testing.assert_close(scripted.eval()(x), x + scripted.fn(x))


def test_the_function_in_a_script():
    @torch.jit.script
    def function(x: torch.Tensor, training: bool):
        return rdp_drop_path(x, 0.5, training)

    x = torch.randn(20, 3)
    assert torch.equal(seeded(function, x, True), seeded(rdp.drop_path, x, 0.5, True))
    assert torch.equal(function(x, False), x)


rdp_drop_path = rdp.drop_path  # scripts look up names here


@OF_BRANCHES
def test_branches_in_eval_mode(record):
    model, x = net(drop_prob=0.5).eval(), torch.randn(5, 3, DIM)
    torch.testing.assert_close(record(model, x)(x), model(x))


@pytest.mark.parametrize("record", [symbolic_trace, trace])
@pytest.mark.parametrize("mode", ["sample", "block"])
def test_branches_in_training_draw_in_the_graph(record, mode):
    model, x = net(drop_prob=0.5, mode=mode), torch.randn(50, 3, DIM)
    recorded = record(model, x)
    for seed in range(4):
        torch.manual_seed(seed)
        actual = recorded(x)
        torch.manual_seed(seed)
        torch.testing.assert_close(actual, model(x))


@pytest.mark.parametrize("record", [symbolic_trace, trace])
@pytest.mark.parametrize("channel_dim", [1, -3])
def test_gamma_along_any_dimension(record, channel_dim):
    branch = rdp.ResidualBranch(nn.Conv2d(DIM, DIM, 1), gamma=torch.rand(DIM), channel_dim=channel_dim)
    model, x = nn.Sequential(branch), torch.randn(2, DIM, 4, 5)
    torch.testing.assert_close(record(model, x)(x), model(x))


@pytest.mark.parametrize("record", [symbolic_trace, trace])
def test_the_residuals_dtype_stays(record):
    model, x = nn.Sequential(rdp.ResidualBranch(nn.Identity(), gamma=torch.rand(DIM))), torch.randn(2, DIM).bfloat16()
    out = record(model, x)(x)
    assert torch.equal(out, model(x))
    assert out.dtype == torch.bfloat16


@pytest.mark.parametrize("record", [symbolic_trace, trace])
def test_an_open_iteration_is_refused_and_a_scheme_is_not(record):
    model, x = net(), torch.randn(4, 3, DIM)
    scheme = rdp.ResidualDropPath(model, 0.5)
    next(pair := scheme.iterations())
    with pytest.raises(RuntimeError, match="can't record the drop iteration that is open"):
        record(model, x)
    torch.testing.assert_close(record(model.eval(), x)(x), model(x))
    pair.close()
    torch.testing.assert_close(record(model.train(), x)(x), model(x))


@pytest.mark.parametrize("model", [net()[0], net()[2]], ids=["branch", "sequence"])
def test_models_that_cant_be_recorded_say_so(model):
    name = type(model).__name__
    with pytest.raises(RuntimeError, match=f"can't compile {name}.*torch.export"):
        torch.jit.script(nn.Sequential(model))
    with pytest.raises(TypeError, match=rf"can't record {name} by itself.*torch.nn.Sequential\(it\)"):
        fx.symbolic_trace(model)
    fx.symbolic_trace(nn.Sequential(model))


@pytest.mark.skipif(not installed("torchvision"), reason="torchvision is not installed")
@pytest.mark.parametrize(
    ("build", "name"), [(lambda: Block(rdp.DropPath(0.5)), "fn"), (lambda: net(drop_prob=0.5), "0.fn")]
)
@pytest.mark.parametrize("training", [True, False])
def test_torchvisions_feature_extractor(build, name, training):
    """The extractor records a model in both modes."""
    import_torchvision()
    from torchvision.models.feature_extraction import create_feature_extractor

    model, x, seen = build().train(training), torch.randn(4, 3, DIM), []
    extract = create_feature_extractor(model, {name: "feature"}, suppress_diff_warning=True)
    assert model.training == extract.training == training
    model.get_submodule(name).register_forward_hook(lambda module, args, out: seen.append(out))
    model.eval()(x)
    torch.testing.assert_close(extract(x)["feature"], seen[-1])
