"""Times of the device alone: turns are captured in a CUDA graph, so that the host does nothing between kernels."""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .harness import Capture, Provider, Row, told
from .machine import Device

MIN_RUNS = 24  # runs in a graph; they share its launch of some microseconds
Results = tuple[Tensor, ...]


def device_time(device: Device, provider: Provider, repeats: int) -> Row:
    """Measures the median over `repeats` replays in milliseconds per turn, or gives the reason why there is none.

    The inputs of each turn have left the cache, and each turn has its own results. Before timing, the results are
    filled with NaN, and one replay must pass the provider's check.
    """
    if device.device.type != "cuda" or provider.capture is None:
        return {"device_ms": None, "no_device_ms": ""}
    try:
        milliseconds = _replay_time(device, provider.capture, repeats)
    except Exception as error:
        # ending a broken capture raises again with a less useful message
        return {"device_ms": None, "no_device_ms": told(error.__context__ or error)}
    return {"device_ms": milliseconds, "no_device_ms": ""}


def _replay_time(device: Device, capture: Capture, repeats: int) -> float:
    sweeps = -(-MIN_RUNS // len(capture.runs))
    replay, results = captured(list(capture.runs) * sweeps, keep=2 * len(capture.runs))
    verify_replay(replay, results[-len(capture.runs)], capture)
    times = [device.milliseconds(replay) for _ in range(repeats)]
    return statistics.median(times) / (sweeps * len(capture.runs))


def captured(runs: Sequence[Callable[[], Results]], keep: int) -> tuple[Callable[[], None], list[Results]]:
    """Returns a function that replays `runs`, and the results of the last `keep` of them. The memory of earlier results
    is reused after it has left the cache."""
    graph = torch.cuda.CUDAGraph()
    results: deque[Results] = deque(maxlen=keep)
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        for run in runs:
            results.append(run())
    return graph.replay, list(results)


def verify_replay(replay: Callable[[], None], results: Results, capture: Capture) -> None:
    """Raises `RuntimeError` if a replay writes wrong `results`. They are those of the first run."""
    inputs = {t.untyped_storage().data_ptr() for t in capture.kept}
    with torch.no_grad():
        for result in results:
            if result.untyped_storage().data_ptr() not in inputs:
                result.fill_(torch.nan)
    replay()
    check = capture.check(results)
    if not check.passed:
        raise RuntimeError(f"its replay differs from the float64 reference by {check.error:.1e}")
