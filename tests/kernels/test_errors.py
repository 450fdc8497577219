"""Calls that kernels don't support, and the choice of a backend: the reason is raised, or logged and another one
runs."""

import importlib.util
import logging
import os
import subprocess
import sys

import pytest
import torch

import rdp_kernels as rdp
from rdp_kernels.kernels import dispatch
from rdp_kernels.kernels.triton import support
from tests.conftest import DEVICE

from .cases import BACKENDS

ROWS = torch.tensor([2, 0])


def x(*shape, **options):
    return torch.randn(shape or (4, 3), device=DEVICE, **options)


class Subclass(torch.Tensor):
    pass


def ops_on(residual):
    """Every public op on a residual, with other operands made for it."""
    rows, branch = ROWS.to(residual.device), torch.zeros_like(residual)
    return {
        "residual_add": lambda: rdp.residual_add(residual, branch),
        "gather_rows": lambda: rdp.gather_rows(residual, rows),
        "residual_add_norm": lambda: rdp.residual_add_norm(residual, branch, None, next_rows=rows)[1],
        "drop_path": lambda: rdp.drop_path(residual, 0.5, training=True),
        "drop_path_add": lambda: rdp.drop_path_add(residual, branch, 0.5, training=True),
    }


UNSERVED = [
    (x().to(torch.float8_e4m3fn), "float32, bfloat16, float16 and float64, not torch.float8_e4m3fn"),
    (x().to("meta"), "the tensors are on meta"),
    (x().as_subclass(Subclass), "Subclass, a subclass of Tensor"),
]


@pytest.mark.parametrize("op", list(ops_on(x())))
@pytest.mark.parametrize(("residual", "reason"), UNSERVED, ids=["dtype", "device", "subclass"])
def test_a_backend_by_name_says_why_not(backend, residual, reason, op):
    with pytest.raises(RuntimeError, match=f"^{op}: backend '{backend}' can't serve this call: .*{reason}"):
        ops_on(residual)[op]()


@pytest.mark.parametrize(
    "call",
    [
        lambda odd: rdp.residual_add(x(), odd),
        lambda odd: rdp.residual_add(x(), x(), gamma=odd[0]),
        lambda odd: rdp.residual_add_norm(x(), x(), odd[0]),
        lambda odd: rdp.residual_add_norm(x(), x(), None, odd[0]),
    ],
    ids=["branch", "gamma", "weight", "bias"],
)
def test_every_operand_is_looked_at(backend, call):
    with pytest.raises(RuntimeError, match="can't serve this call.*float8"):
        call(x().to(torch.float8_e5m2))


def test_torch_func_is_refused(backend):
    """Kernels have no derivatives in a transform; in auto it gets the reference."""

    def loss(residual):
        return rdp.residual_add(residual, residual, row_scale=2.0).square().sum()

    residual = x()
    with pytest.raises(RuntimeError, match=r"torch\.func"):
        torch.func.grad(loss)(residual)
    with rdp.use_backend("auto"):
        torch.testing.assert_close(torch.func.grad(loss)(residual), 18 * residual)


class TestWidestNorm:
    """One kernel holds 16384 channels."""

    RESIDUAL = x(2, 16385)

    def call(self):
        return rdp.residual_add_norm(self.RESIDUAL, self.RESIDUAL, None)

    def test_by_name(self):
        with (
            rdp.use_backend("triton"),
            pytest.raises(RuntimeError, match="residual_add_norm: .*a norm over 16385 channels is wider than 16384"),
        ):
            self.call()

    def test_the_rest_by_name(self, backend):
        assert torch.equal(rdp.residual_add(self.RESIDUAL, self.RESIDUAL), 2 * self.RESIDUAL)

    def test_in_auto(self):
        """It raises no warning: warnings are errors here."""
        with rdp.use_backend("auto"):
            actual = self.call()
        expected = torch.nn.functional.layer_norm(2 * self.RESIDUAL, (16385,), eps=1e-6)
        torch.testing.assert_close(actual[1], expected)

    def test_in_a_chain_of_paths(self, backend):
        """A norm that can't be fused is the module's own; the add is still the kernel's."""
        branch = rdp.ResidualBranch(torch.nn.Tanh(), norm=torch.nn.LayerNorm(16385)).to(DEVICE)
        out = rdp.ResidualSequence(branch)(self.RESIDUAL)
        expected = self.RESIDUAL + torch.nn.functional.layer_norm(self.RESIDUAL, (16385,)).tanh()
        torch.testing.assert_close(out, expected)


def runs_on_kernels(call):
    out = call(x(requires_grad=True))
    return type(out.grad_fn).__name__ == "_FusedAddBackward"


def add(residual):
    return rdp.residual_add(residual, residual)


class TestChoice:
    @pytest.fixture
    def environment(self, monkeypatch):
        """Sets RDP_BACKEND as for a new process."""

        def set_to(name):
            monkeypatch.setenv("RDP_BACKEND", name)
            dispatch._from_environment.cache_clear()

        yield set_to
        monkeypatch.undo()
        dispatch._from_environment.cache_clear()

    def test_by_environment(self, environment):
        for name in BACKENDS:
            environment(name)
            assert runs_on_kernels(add)
            with rdp.use_backend("eager"):
                assert not runs_on_kernels(add)
            environment("eager")
            assert not runs_on_kernels(add)
            with rdp.use_backend(name):
                assert runs_on_kernels(add)
        environment("auto")
        assert runs_on_kernels(add)

    def test_an_unknown_name_in_the_environment(self, environment):
        environment("tritron")
        with pytest.raises(ValueError, match="RDP_BACKEND must be one of .*'triton'.*, got 'tritron'"):
            add(x())

    def test_is_undone_after_an_error(self, backend):
        with pytest.raises(KeyError), rdp.use_backend("eager"):
            raise KeyError
        assert runs_on_kernels(add)

    def test_auto_tells_the_log_once(self, monkeypatch, caplog):
        monkeypatch.setattr(dispatch, "_logged", set())
        residual = x().to("meta")
        with caplog.at_level(logging.DEBUG, logger="rdp_kernels"), rdp.use_backend("auto"):
            for _ in range(2):
                assert add(residual).shape == (4, 3)
                rdp.gather_rows(residual, ROWS.to("meta"))
        told = [
            (record.levelname, record.getMessage()) for record in caplog.records if "'triton'" in record.getMessage()
        ]
        assert len(told) == 2
        for (level, message), op in zip(told, ("residual_add", "gather_rows"), strict=True):
            assert level == "DEBUG"
            assert message.startswith(f"{op}: passing over backend 'triton': the tensors are on meta")

    def test_the_log_is_silent_by_default(self, monkeypatch, caplog):
        monkeypatch.setattr(dispatch, "_logged", set())
        with caplog.at_level(logging.INFO, logger="rdp_kernels"), rdp.use_backend("auto"):
            add(x().to("meta"))
        assert not caplog.records


class TestWithoutTriton:
    @pytest.fixture(autouse=True)
    def _missing(self, monkeypatch):
        find_spec = importlib.util.find_spec
        monkeypatch.setattr(
            importlib.util, "find_spec", lambda name, *rest: None if name == "triton" else find_spec(name, *rest)
        )
        support.unavailable.cache_clear()
        dispatch._why_not_kind.cache_clear()
        yield
        monkeypatch.undo()
        support.unavailable.cache_clear()
        dispatch._why_not_kind.cache_clear()

    def test_says_so(self):
        assert "pip install triton" in rdp.available_backends()["triton"]
        with (
            pytest.raises(RuntimeError, match="'triton' is not available: triton is not installed"),
            rdp.use_backend("triton"),
        ):
            pass

    @pytest.mark.parametrize("op", list(ops_on(x())))
    def test_ops_work(self, op):
        residual = x(requires_grad=True)
        torch.manual_seed(0)
        out = ops_on(residual)[op]()
        out.square().sum().backward()
        with rdp.use_backend("eager"):
            torch.manual_seed(0)
            assert torch.equal(out, ops_on(residual)[op]())
        assert residual.grad.isfinite().all()


# Stands for a machine without triton: importing it fails.
SCRIPT = """
import sys
{hide}
import torch
import rdp_kernels as rdp
assert {loaded} not in sys.modules, "imported"
residual = torch.randn(4, 3, requires_grad=True)
rows = torch.tensor([2, 0])
with rdp.use_backend({backend!r}):
    out, normed = rdp.residual_add_norm(residual, residual, torch.ones(3), next_rows=rows)
    out = rdp.residual_add(out, normed, rows=rows, gamma=torch.ones(3), activation="relu")
    out = rdp.drop_path_add(out, rdp.drop_path(out, 0.5, training=True), 0.5, training=True)
    rdp.gather_rows(out, rows).sum().backward()
    branch = rdp.ResidualBranch(torch.nn.Linear(3, 3), norm=torch.nn.LayerNorm(3), drop_prob=0.5)
    scheme = rdp.ResidualDropPath(branch, 0.5)
    for _ in scheme.iterations(4):
        branch(residual).sum().backward()
assert residual.grad.isfinite().all()
assert {loaded} not in sys.modules, "imported by an op"
assert not torch.cuda.is_initialized()
"""


@pytest.mark.parametrize(
    ("backend", "hidden"), [("eager", False), ("auto", True)], ids=["", "triton can't be imported"]
)
def test_no_op_on_the_cpu_imports_triton(backend, hidden):
    """Nor does it initialise CUDA."""
    hide = "sys.modules['triton'] = None" if hidden else ""
    script = SCRIPT.format(hide=hide, loaded="'triton.language'", backend=backend)
    environment = {name: value for name, value in os.environ.items() if name != "RDP_BACKEND"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("backend", ["auto", "eager", *BACKENDS])
@pytest.mark.parametrize("rows", [None, ROWS.to(DEVICE)])
@pytest.mark.parametrize("scale", [1e39, -1e39])
def test_a_scale_beyond_what_is_computed_in(backend, rows, scale):
    branch, weight = x() if rows is None else x(2, 3), x(3)
    with rdp.use_backend(backend):
        for op in (rdp.residual_add, lambda *args, **options: rdp.residual_add_norm(*args, weight, **options)):
            for dtype in (torch.float32, torch.bfloat16):
                with pytest.raises(ValueError, match=r"row_scale must be finite in torch\.float32, got -?1e\+39"):
                    op(x().to(dtype), branch, rows=rows, row_scale=scale)
        out = rdp.residual_add(x().double(), branch.double(), rows=rows, row_scale=scale)
    assert out.isfinite().all()
    assert out.abs().max() > 1e37
