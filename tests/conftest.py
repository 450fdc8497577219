"""Without a GPU the Triton kernels run interpreted, and Triton must know that before the first one is defined. The
tests in `tests/compiled` compile kernels instead and run in a process of their own: `make test` starts both."""

import gc
import os
from importlib.util import find_spec

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
"""Where the kernels run."""
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
collect_ignore = ["compiled"] if INTERPRETED else []

import pytest  # noqa: E402
from hypothesis import HealthCheck, settings  # noqa: E402

# Shared, noisy machines: no deadline; and the same examples in every run, so that a red test stays red.
settings.register_profile("default", deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
settings.load_profile("default")

# The tensors are tiny: a second thread only waits, and on a busy machine for very long.
torch.set_num_threads(1)


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a GPU"))


def pytest_collection_finish():
    """The collector needn't walk through torch and the tests again and again: its full run takes a second otherwise."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(trylast=True)  # after xdist has sent the report
def pytest_runtest_logreport(report):
    """An illegal access breaks a process's CUDA for good, and the tests after it would fail too. Under xdist the
    process ends and another one takes over; without xdist the session ends."""
    if not report.failed or DEVICE != "cuda":
        return
    in_worker = "PYTEST_XDIST_WORKER" in os.environ
    if not in_worker and hasattr(report, "node"):
        return  # a worker's report, in the process that collects them
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        if in_worker:
            os._exit(1)
        pytest.exit(f"CUDA is broken since {report.nodeid}: {error}", returncode=1)


@pytest.fixture(scope="session", autouse=True)
def _interpreter():
    with pytest.MonkeyPatch.context() as patch:
        if INTERPRETED and find_spec("triton") is not None:
            from .interpreter import improve

            improve(patch)
        yield


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
