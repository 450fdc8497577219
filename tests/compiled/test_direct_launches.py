"""Direct launches: a kernel that is known is launched without Triton's look for it. It must be the kernel that Triton would
find. A stand-in takes the place of a GPU's driver, so that launches run nothing.
"""

import logging
import sys
import threading
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

import rdp_kernels as rdp
from benchmarks.gpu import stand_in
from rdp_kernels._utils import checks
from rdp_kernels.kernels import dispatch
from rdp_kernels.kernels.triton import launch, launchers
from rdp_kernels.kernels.triton.prepared import PreparedLaunch
from tests.kernels.budget import gradients
from tests.kernels.forgotten import SEEN_BY_THE_COMPILER, forgotten
from tests.kernels.values import douts_of, operands_of
from tests.kernels.walk import walk

MODULES = [module for name, module in sys.modules.items() if name.startswith("rdp_kernels.kernels.triton.")]
KERNELS = [value for module in MODULES for value in vars(module).values() if isinstance(value, JITFunction)]


class Compiled:
    """A compiled kernel, as far as launches know one. It isn't compiled, which would take a second."""

    function, packed_metadata = 0, ()

    def __init__(self, launched):
        self._launched = launched

    def launch_metadata(self, *_):
        return {}

    def run(self, _x, _y, _z, _stream, _function, _metadata, launch_metadata, *_):
        self._launched[threading.get_ident()].append((self, launch_metadata is None))


@pytest.fixture
def stand_in_driver(monkeypatch):
    """Calls on CPU tensors go to Triton, as on a GPU. Afterwards everything is as before."""
    for module, name in ((checks, "host_has"), (launch, "architecture"), (driver, "_active")):
        monkeypatch.setattr(module, name, getattr(module, name))
    monkeypatch.setitem(dispatch._LIBRARIES, "triton", dispatch._LIBRARIES["triton"])
    monkeypatch.setattr(PreparedLaunch, "direct", True)
    stand_in.set_up_launches()
    for kernel in KERNELS:
        monkeypatch.setattr(kernel, "device_caches", defaultdict(kernel.create_binder))
    with rdp.use_backend("triton"), launchers.nothing_prepared():
        yield


@pytest.fixture
def launched(stand_in_driver, monkeypatch):
    """By thread: pairs of a compiled kernel that was launched, and whether that was directly."""
    done = defaultdict(list)

    def compiled(kernel, key, signature, device, *_, **__):
        return kernel.device_caches[device][0].setdefault(key, Compiled(done))

    monkeypatch.setattr(JITFunction, "_do_compile", compiled)
    return done


@pytest.fixture
def verified(launched, monkeypatch):
    """Each launch is compared with an ordinary one. The fixture counts direct launches."""
    counts = SimpleNamespace(direct=0, ordinary=0)
    launches = PreparedLaunch.__call__

    def verify(self, num_programs, *arguments):
        launches(self, num_programs, *arguments)
        new = launched.pop(threading.get_ident(), [])
        if num_programs == 0:
            assert not new
            return
        ((kernel, direct),) = new
        assert kernel is self.kernel.run(*arguments, grid=(num_programs,), warmup=True, **self.options)
        counts.direct += direct
        counts.ordinary += not direct

    monkeypatch.setattr(PreparedLaunch, "__call__", verify)
    return counts


def run(op, case):
    """Forward and backward."""
    operands = operands_of(case)
    results = op(operands, case)
    gradients(results, operands, douts_of(case, results))


def test_the_kernel_is_the_one_that_triton_would_find(verified):
    for op, case in walk(0, 2200):
        run(op, case)
    assert verified.direct > verified.ordinary


@pytest.mark.parametrize("pair", SEEN_BY_THE_COMPILER, ids=lambda pair: pair.field)
def test_each_field_of_a_key_matters(verified, pair):
    """With a key that lacks the field, the second call of the pair launches the first one's kernel."""

    for op, case in pair.calls:
        run(op, case)
    with forgotten(pair.field), pytest.raises(AssertionError):
        for op, case in pair.calls:
            run(op, case)


@pytest.mark.parametrize("target", [GPUTarget("cuda", 90, 32), GPUTarget("hip", "gfx942", 64)], ids=lambda t: t.backend)
def test_as_many_rows_as_go_beyond_2_gigabytes(verified, monkeypatch, target):
    """On AMD GPUs Triton tells them from fewer rows. Nothing touches these tensors, so they take no memory."""
    monkeypatch.setattr(driver.active, "get_current_target", lambda: target)
    if target.backend == "hip":
        monkeypatch.setattr(torch.version, "hip", "6.4")
        monkeypatch.setattr(launch, "architecture", lambda device: target.arch)
    x = torch.empty(4, 2**28)
    for number in (1, 3, 1, 3):
        rdp.residual_add(x, x[:number], rows=torch.arange(number))
        rdp.gather_rows(x, torch.arange(number))
    assert (verified.direct > 0) == (target.backend == "cuda")


def test_a_direct_launch_is_given_what_an_ordinary_one_is(launched, monkeypatch):
    """The same grid, function and arguments, and the CUDA stream that is current at the call."""
    given, current = [], [5]
    monkeypatch.setattr(Compiled, "run", lambda kernel, *launch: given.append(launch))
    monkeypatch.setattr(driver.active, "get_current_stream", lambda device: current[0])
    residual, update, gamma = torch.empty(4, 3, 6), torch.empty(4, 3, 6), torch.empty(6)
    for stream in (5, 5, 6):
        current[0] = stream
        rdp.residual_add(residual, update, gamma=gamma)
    ordinary, *direct = given
    assert [each[3] for each in given] == [5, 5, 6]
    assert [each[6] for each in direct] == [None, None], "no metadata for hooks: these are direct"
    for each in direct:
        assert (each[:3], each[4:6]) == (ordinary[:3], ordinary[4:6])
        assert len(each) == len(ordinary)
        for mine, tritons in zip(each[10:], ordinary[10:], strict=True):  # after the new result
            assert mine is tritons or mine == tritons


def test_threads(verified):
    """Eight threads alternate between calls while a ninth forgets what was prepared."""
    done = threading.Event()

    def forget():
        while not done.wait(0.001):
            launchers._forget()

    def work(number):
        for op, case in walk(number, 100):
            run(op, case)

    with ThreadPoolExecutor(9) as pool:
        forgetting = pool.submit(forget)
        try:
            list(pool.map(work, range(8)))
        finally:
            done.set()
        forgetting.result()
    assert verified.direct > 0


def add():
    return rdp.residual_add(torch.ones(4, 8), torch.ones(4, 8), row_scale=2.0)


def gather():
    return rdp.gather_rows(torch.ones(4, 8), torch.tensor([1]))


def launches_of(call, launched):
    """Whether the launches of a call are direct."""
    launched.clear()
    call()
    return [direct for _, direct in launched[threading.get_ident()]]


@pytest.mark.parametrize("form", ["chain", "function"])
@pytest.mark.parametrize("name", ["launch_enter_hook", "launch_exit_hook"])
def test_hooks_of_launches(launched, monkeypatch, name, form):
    """Set when a kernel is known already. They see each launch, which is an ordinary one then."""
    assert [launches_of(add, launched) for _ in range(2)] == [[False], [True]]
    hook = lambda metadata: None  # noqa: E731
    with monkeypatch.context() as patch:
        if form == "function":
            patch.setattr(knobs.runtime, name, hook)
        else:
            getattr(knobs.runtime, name).add(hook)
        try:
            assert [launches_of(add, launched) for _ in range(2)] == [[False], [False]]
        finally:
            if form == "chain":
                getattr(knobs.runtime, name).remove(hook)
    assert launches_of(add, launched) == [True]


def test_hooks_of_a_kernel(launched):
    """They get the arguments of each launch."""
    from rdp_kernels.kernels.triton.residual_add import _residual_add_fwd_kernel as kernel

    seen = []
    assert [launches_of(add, launched) for _ in range(2)] == [[False], [True]]
    kernel.add_pre_run_hook(lambda *arguments, **_: seen.append(len(arguments)))
    try:
        assert launches_of(add, launched) == [False]
    finally:
        kernel.pre_run_hooks.clear()
    assert seen == [len(kernel.arg_names)]
    assert launches_of(add, launched) == [True]


@pytest.mark.parametrize("name", ["run", "function", "packed_metadata"])
def test_without_a_private_name_launches_are_ordinary(launched, monkeypatch, caplog, name):
    """A Triton whose compiled kernels have no such attribute. One warning says so, for all kernels."""
    run = JITFunction.run

    def run_and_return_less(self, *arguments, **options):
        kernel = run(self, *arguments, **options)
        names = {"run", "function", "packed_metadata"} - {name}
        return SimpleNamespace(**{name: getattr(kernel, name) for name in names})

    monkeypatch.setattr(JITFunction, "run", run_and_return_less)
    with caplog.at_level(logging.WARNING, logger="rdp_kernels"):
        assert [launches_of(call, launched) for call in (add, gather, add, gather)] == [[False]] * 4
    (warning,) = caplog.messages
    assert f"'{name}'" in warning


def test_a_kernel_that_triton_compiles(stand_in_driver, monkeypatch):
    """The installed Triton has the private names: its own compiled kernel is launched directly. Budget: 5 seconds."""
    direct = []
    monkeypatch.setattr(stand_in.Launches, "__call__", lambda self, *arguments: direct.append(arguments[6] is None))
    add()
    add()
    assert direct == [False, True]


# Launches


def tensors(*names, **shapes):
    """Operands of `residual_add_norm`; those that are named learn."""
    shapes = {"residual": (8, 4, 16), "branch": (8, 4, 16), "gamma": (16,), "weight": (16,), "bias": (16,)} | shapes
    return {name: torch.zeros(shape, requires_grad=name in names) for name, shape in shapes.items()}


def of_add(*learn, gamma=True, **options):
    made = tensors(*learn, **({"branch": (2, 4, 16)} if "rows" in options else {}))
    vector = made["gamma"] if gamma else None
    return lambda: rdp.residual_add(made["residual"], made["branch"], gamma=vector, **options)


def of_add_norm(*learn, **options):
    made = tensors(*learn, **({"branch": (2, 4, 16)} if "rows" in options else {}))
    return lambda: rdp.residual_add_norm(**made, **options)[1]


def of_gather():
    return lambda: rdp.gather_rows(tensors("residual")["residual"], ROWS)


ROWS = torch.tensor([5, 0])
PATH = ("residual", "branch")
ALL = (*PATH, "gamma", "weight", "bias")
LAUNCHES = {
    # a call; launches of its forward and of its backward
    "add": (of_add(*PATH, "gamma"), 1, 2),
    "add, γ frozen": (of_add(*PATH), 1, 1),
    "add, only γ learns": (of_add("gamma"), 1, 2),
    "add without γ": (of_add(*PATH, gamma=False), 1, 0),
    "add with a scale": (of_add(*PATH, gamma=False, row_scale=2.0), 1, 1),
    "add with row_scale": (of_add(*PATH, "gamma", row_scale=torch.ones(8)), 1, 2),
    "add and relu": (of_add(*PATH, gamma=False, activation="relu"), 1, 1),
    "rows": (of_add(*PATH, "gamma", rows=ROWS), 2, 2),
    "rows, γ frozen": (of_add(*PATH, rows=ROWS), 2, 1),
    "gather": (of_gather(), 1, 2),
    "norm": (of_add_norm(*ALL), 1, 2),
    "rms": (lambda: rdp.residual_add_norm(**tensors(*ALL) | {"bias": None}, norm="rms")[1], 1, 2),
    "norm, vectors frozen": (of_add_norm(*PATH), 1, 1),
    "norm, only γ learns": (of_add_norm(*PATH, "gamma"), 1, 2),
    "norm of some rows": (of_add_norm(*ALL, rows=ROWS, next_rows=ROWS), 3, 2),
}


@pytest.mark.parametrize(("call", "forward", "backward"), LAUNCHES.values(), ids=LAUNCHES)
def test_launches(launched, call, forward, backward):
    """Of a call of a known kind. Lists of rows are inverted once, in the forward."""
    call().sum().backward()
    for _ in range(2):
        launched.clear()
        out = call()
        assert len(launched[threading.get_ident()]) == forward
        out.sum().backward()
        assert len(launched[threading.get_ident()]) == forward + backward
        with torch.no_grad():
            assert len(launches_of(call, launched)) == forward
