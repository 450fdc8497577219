"""How many files of the package a call crosses. A newcomer who follows a call reads all of these files."""

import contextlib
import sys
from pathlib import Path

import pytest
import torch

import rdp_kernels as rdp
from rdp_kernels._utils import checks
from rdp_kernels.kernels import dispatch, triton
from tests.conftest import DEVICE

PACKAGE = Path(rdp.__file__).parent
MOST_FILES = 9


def files_crossed(call):
    """The files of the package in which a function runs during `call`. Functions that kernels call don't count: only
    the interpreter runs them in Python."""
    call()  # some work is done once
    files, inside = set(), []

    def on_event(frame, event, _):
        if frame.f_code.co_name.endswith("_kernel") and event in ("call", "return"):
            inside.append(frame) if event == "call" else inside.remove(frame)
        path = Path(frame.f_code.co_filename)
        if event == "call" and not inside and path.is_relative_to(PACKAGE):
            files.add(str(path.relative_to(PACKAGE)))

    sys.setprofile(on_event)
    try:
        call()
    finally:
        sys.setprofile(None)
    return files


def tensor(*shape):
    return torch.randn(shape, device=DEVICE, requires_grad=True)


def residual_add(rows=None, **options):
    residual, branch, gamma = tensor(4, 3, 5), tensor(4 if rows is None else len(rows), 3, 5), tensor(5)
    rows = None if rows is None else torch.tensor(rows, device=DEVICE)
    out = rdp.residual_add(residual, branch, rows=rows, gamma=gamma, **options)
    with torch.autograd.set_multithreading_enabled(False):
        return torch.autograd.grad(out, (residual, branch, gamma), torch.ones_like(out))


def nothing_prepared():
    """Makes calls the first of their kind, where kernels prepare calls."""
    return contextlib.nullcontext() if triton.unavailable() else triton.kernels().nothing_prepared()


CALLS = {
    "all rows": lambda: residual_add(row_scale=torch.tensor([0.0, 2.0, 0.0, 2.0], device=DEVICE)),
    "some rows": lambda: residual_add(rows=[3, 1], row_scale=2.0),
    "relu": lambda: residual_add(activation="relu"),
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("backend", ["triton", "native", "auto"])
def test_a_residual_add_crosses_few_files(backend, name, monkeypatch):
    """Forward and backward together, of a call as there were before. Lists of rows are on a GPU, if Triton gets them: on
    a CPU it is for tests, and their values are checked."""
    if backend != "auto" and rdp.available_backends()[backend] is not None:
        pytest.skip(f"no {backend}")
    with rdp.use_backend(backend), monkeypatch.context() as patch:
        CALLS[name]()
        if backend == "triton":
            patch.setattr(checks, "host_has", lambda tensor: False)
        files = files_crossed(CALLS[name])
    assert "ops/residual_add.py" in files
    assert "kernels/autograd.py" in files
    assert len(files) <= MOST_FILES, sorted(files)


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("backend", ["triton", "auto"])
def test_the_backend_is_resolved_once(backend, name, monkeypatch):
    """At the first call of a kind."""
    if backend != "auto" and rdp.available_backends()[backend] is not None:
        pytest.skip(f"no {backend}")
    resolved = []
    first = dispatch._first
    monkeypatch.setattr(dispatch, "_first", lambda *args: resolved.append(args[0]) or first(*args))
    with rdp.use_backend(backend), nothing_prepared():
        CALLS[name]()
    served_unasked = backend == "auto" and DEVICE == "cpu" and rdp.available_backends()["native"] is None
    assert resolved == ([] if served_unasked else ["residual_add"])


def test_a_norm_that_kernels_lack_is_resolved_once_too(monkeypatch):
    """Torch's norm follows the kernels that compute the rest."""
    if DEVICE != "cpu" or rdp.available_backends()["native"] is not None:
        pytest.skip("about the compiled library")
    resolved = []
    first = dispatch._first
    monkeypatch.setattr(dispatch, "_first", lambda *args: resolved.append(args[0]) or first(*args))
    with rdp.use_backend("native"):
        out, _ = rdp.residual_add_norm(tensor(4, 5), tensor(4, 5), tensor(5), next_rows=torch.tensor([2, 0]))
    assert resolved == ["residual_add_norm"]
    assert type(out.grad_fn).__name__ == "_FusedAddBackward"
