"""Times of the device alone: turns captured in a CUDA graph, so that nothing of the host is between the kernels."""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .harness import Capture, Provider, Row, told
from .machine import Device

MIN_RUNS = 24  # of a graph: its own launch, some microseconds, is shared by all of them
Results = tuple[Tensor, ...]


def device_time(device: Device, provider: Provider, repeats: int) -> Row:
    """The median over `repeats` replays, in milliseconds a turn, or the reason why there is none.

    Each turn of a replay has inputs that left the cache, and results of its own. Before timing one replay, into results
    that were overwritten with NaN, has to pass the provider's check.
    """
    if device.device.type != "cuda" or provider.capture is None:
        return {"device_ms": None, "no_device_ms": ""}
    try:
        milliseconds = _replay_time(device, provider.capture, repeats)
    except Exception as error:
        # ending a capture that broke raises once more, and says less
        return {"device_ms": None, "no_device_ms": told(error.__context__ or error)}
    return {"device_ms": milliseconds, "no_device_ms": ""}


def _replay_time(device: Device, capture: Capture, repeats: int) -> float:
    sweeps = -(-MIN_RUNS // len(capture.runs))
    replay, results = captured(list(capture.runs) * sweeps, keep=2 * len(capture.runs))
    verify_replay(replay, results[-len(capture.runs)], capture)
    times = [device.milliseconds(replay) for _ in range(repeats)]
    return statistics.median(times) / (sweeps * len(capture.runs))


def captured(runs: Sequence[Callable[[], Results]], keep: int) -> tuple[Callable[[], None], list[Results]]:
    """What replays `runs`, and the results of the last `keep` of them. Memory of earlier results is used again: by then
    it has left the cache."""
    graph = torch.cuda.CUDAGraph()
    results: deque[Results] = deque(maxlen=keep)
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        for run in runs:
            results.append(run())
    return graph.replay, list(results)


def verify_replay(replay: Callable[[], None], results: Results, capture: Capture) -> None:
    """Raises `RuntimeError` where a replay doesn't write the right `results`, those of the first run."""
    inputs = {t.untyped_storage().data_ptr() for t in capture.kept}
    with torch.no_grad():
        for result in results:
            if result.untyped_storage().data_ptr() not in inputs:
                result.fill_(torch.nan)
    replay()
    check = capture.check(results)
    if not check.passed:
        raise RuntimeError(f"its replay differs from the float64 reference by {check.error:.1e}")
