"""A wrong call after right ones of the same kind: it is refused with the same words as a first call, though calls of a
known kind aren't checked."""

import contextlib
import math
from functools import partial

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad

import rdp_kernels as rdp
from rdp_kernels._utils import checks
from rdp_kernels.kernels.triton import launchers
from rdp_kernels.kernels.triton.prepared import observed
from tests.conftest import DEVICE

OPS = [rdp.residual_add, rdp.residual_add_norm, rdp.gather_rows]


def tensor(*shape, **options):
    return torch.ones(shape, device=DEVICE, **options)


def rows(*numbers, **options):
    return torch.tensor(numbers, device=DEVICE, **options)


def right(op, **changes):
    """Arguments that fit, but for the changes."""
    arguments = {"residual": tensor(4, 3, 8, requires_grad=True), "rows": rows(2, 0)}
    if op is not rdp.gather_rows:
        arguments |= {"branch": tensor(2, 3, 8), "row_scale": tensor(2), "gamma": tensor(8, requires_grad=True)}
    if op is rdp.residual_add_norm:
        arguments |= {"weight": tensor(8), "bias": tensor(8), "next_rows": rows(1), "norm": "layer", "eps": 1e-6}
    return arguments | changes


def elsewhere(*shape, **options):
    return torch.ones(shape, device="meta", **options)


WRONG_ROWS = {
    "more than the branch": {"rows": rows(2, 0, 1)},
    "int32": {"rows": rows(2, 0, dtype=torch.int32)},
    "of two dimensions": {"rows": rows((2, 0))},
    "without dimensions": {"rows": rows(2, 0)[0]},
    "a list": {"rows": [2, 0]},
    "on another device": {"rows": elsewhere(2, dtype=torch.int64)},
}
WRONG_ADDS = {
    "a row too many in the branch": {"branch": tensor(3, 3, 8)},
    "a row too many in row_scale": {"row_scale": tensor(3)},
    "a branch of another width": {"branch": tensor(2, 3, 7)},
    "a branch that would broadcast": {"branch": tensor(2, 1, 8)},
    "a branch of fewer dimensions": {"branch": tensor(2, 24)},
    "a branch without dimensions": {"branch": tensor()},
    "a branch of integers": {"branch": tensor(2, 3, 8, dtype=torch.int64)},
    "a branch on another device": {"branch": elsewhere(2, 3, 8)},
    "no branch": {"branch": None},
    "a learned row_scale": {"row_scale": tensor(2, requires_grad=True)},
    "a row_scale of NaN": {"row_scale": math.nan},
    "a row_scale of Inf": {"row_scale": math.inf},
    "a row_scale beyond float32": {"row_scale": 1e39},
    "a row_scale of float64": {"row_scale": tensor(2, dtype=torch.float64)},
    "a row_scale without dimensions": {"row_scale": tensor()},
    "a row_scale of two dimensions": {"row_scale": tensor(2, 1)},
    "a row_scale on another device": {"row_scale": elsewhere(2)},
    "a text as row_scale": {"row_scale": "2"},
    "True as row_scale": {"row_scale": True},
    "a gamma of another width": {"gamma": tensor(7)},
    "a gamma of two dimensions": {"gamma": tensor(1, 8)},
    "a gamma of integers": {"gamma": tensor(8, dtype=torch.int64)},
    "a gamma on another device": {"gamma": elsewhere(8)},
    "a number as gamma": {"gamma": 1.0},
    "a residual of integers": {"residual": tensor(4, 3, 8, dtype=torch.int64)},
    "a residual without dimensions": {"residual": tensor()},
    "a residual on another device": {"residual": elsewhere(4, 3, 8)},
}
WRONG_OPTIONS = {
    "channel_dim of the rows": {"channel_dim": 0},
    "channel_dim beyond the dimensions": {"channel_dim": 3},
    "channel_dim of another width": {"channel_dim": 1},
    "channel_dim as a float": {"channel_dim": -1.0},
    "channel_dim as a text": {"channel_dim": "-1"},
    "an unknown activation": {"activation": "gelu"},
    "a list as activation": {"activation": ["relu"]},
}
WRONG_NORMS = {
    "next_rows of int32": {"next_rows": rows(1, dtype=torch.int32)},
    "a list as next_rows": {"next_rows": [1]},
    "a weight of another width": {"weight": tensor(7)},
    "a weight of integers": {"weight": tensor(8, dtype=torch.int64)},
    "a weight on another device": {"weight": elsewhere(8)},
    "a bias of another width": {"bias": tensor(9)},
    "a bias for a norm without": {"norm": "rms"},
    "an unknown norm": {"norm": "batch"},
    "a list as norm": {"norm": ["layer"]},
    "no norm": {"norm": None},
    "eps of NaN": {"eps": math.nan},
    "eps below zero": {"eps": -1e-6},
    "eps of Inf": {"eps": math.inf},
    "a text as eps": {"eps": "1e-6"},
    "a tensor as eps": {"eps": tensor(1)},
    "True as eps": {"eps": True},
}
WRONG = [
    *((op, *item) for op in (rdp.residual_add, rdp.residual_add_norm) for item in (WRONG_ROWS | WRONG_ADDS).items()),
    *((rdp.residual_add, *item) for item in WRONG_OPTIONS.items()),
    *((rdp.residual_add_norm, *item) for item in WRONG_NORMS.items()),
    *((rdp.gather_rows, *item) for item in WRONG_ROWS.items() if item[0] != "more than the branch"),
]


def refusal(call):
    """The words with which a call is refused."""
    with pytest.raises((TypeError, ValueError, RuntimeError)) as caught:
        call()
    return f"{caught.type.__name__}: {caught.value}"


@pytest.fixture(params=[True, False], ids=["values of rows are checked", "values of rows aren't checked"])
def _host_has_rows(request, monkeypatch):
    """As on the CPU, and as on a GPU."""
    if not request.param:
        monkeypatch.setattr(checks, "host_has", lambda tensor: False)


@contextlib.contextmanager
def known(op):
    """Within the `with` block the right call is of a kind that is known, with a gradient and without."""
    with launchers.nothing_prepared():
        for _ in range(2):
            op(**right(op))
            with torch.no_grad():
                op(**right(op))
        yield


@pytest.mark.parametrize(("op", "what", "changes"), WRONG, ids=lambda value: getattr(value, "__name__", None))
def test_wrong_arguments(backend, op, what, changes, monkeypatch):
    """The eager reference always checks arguments: its words are the right ones."""
    call = partial(op, **right(op, **changes))
    with rdp.use_backend("eager"):
        wanted = refusal(call)
    with known(op):
        for recording in (True, False):
            with torch.set_grad_enabled(recording), monkeypatch.context() as patch:
                assert refusal(call) == wanted
                patch.setattr(checks, "host_has", lambda tensor: False)
                assert refusal(call) == wanted


class Subclass(torch.Tensor):
    pass


FLOATS = [
    (op, name) for op in OPS for name, value in right(op).items() if torch.is_tensor(value) and "rows" not in name
]


@pytest.mark.usefixtures("_host_has_rows")
@pytest.mark.parametrize(("op", "name"), FLOATS, ids=lambda value: getattr(value, "__name__", value))
def test_subclasses_of_tensor(backend, op, name):
    arguments = right(op)
    with known(op), pytest.raises(RuntimeError, match="Subclass, a subclass of Tensor"):
        op(**arguments | {name: arguments[name].detach().as_subclass(Subclass)})


def dual_numbers(call, residual):
    with forward_ad.dual_level():
        return call(residual=forward_ad.make_dual(residual.detach(), residual.detach()))


TRANSFORMS = {
    "vmap": lambda call, residual: torch.vmap(lambda x: call(residual=x))(residual.detach()[None]),
    "grad": lambda call, residual: torch.func.grad(lambda x: call(residual=x).sum())(residual.detach()),
    "dual numbers": dual_numbers,
    "fake tensors": lambda call, residual: call(residual=FakeTensorMode().from_tensor(residual.detach())),
    "jit.trace": lambda call, residual: torch.jit.trace(lambda x: call(residual=x), residual.detach()),
}


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")  # values of rows are checked
@pytest.mark.usefixtures("_host_has_rows")
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
@pytest.mark.parametrize("op", [rdp.residual_add, rdp.gather_rows])
def test_transforms(backend, op, transform):
    arguments = {name: value.detach() for name, value in right(op).items()}
    residual = arguments.pop("residual")
    with known(op), pytest.raises(RuntimeError, match="can't serve this call"):
        transform(partial(op, **arguments), residual)


@pytest.mark.usefixtures("_host_has_rows")
@pytest.mark.parametrize("op", OPS)
def test_another_backend_is_taken_at_once(op):
    seen = []
    call = partial(op, **right(op))
    with rdp.use_backend("triton"), known(op), observed(seen.append):
        call()
        number = len(seen)
        assert number > 0
        with rdp.use_backend("eager"):
            call()
        with rdp.use_backend("native"):
            call()
        assert len(seen) == number
        call()
        assert len(seen) == 2 * number
