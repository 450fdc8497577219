"""Real processes of a gloo group on this machine."""

from __future__ import annotations

import datetime
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

SECONDS = 150
"""Seconds until a group of processes is stopped."""


def run_ranks(worker: Callable[..., Any], *args: Any, world_size: int = 2) -> list[Any]:
    """The result of `worker(rank, *args)` in each process. No process is alive when this returns.

    Raises `AssertionError` with the tracebacks where one failed, and `TimeoutError`.
    """
    context = mp.get_context("spawn")
    results = context.Queue()
    store = dist.TCPStore("127.0.0.1", 0, world_size, is_master=True, wait_for_workers=False)
    ranks = [
        context.Process(target=_run, args=(rank, world_size, store.port, results, worker, args), daemon=True)
        for rank in range(world_size)
    ]
    try:
        for process in ranks:
            process.start()
        found = dict(results.get(timeout=SECONDS) for _ in ranks)
    except Exception as error:
        raise TimeoutError(f"ranks didn't answer within {SECONDS} s: {[p.exitcode for p in ranks]}") from error
    finally:
        for process in ranks:
            process.kill() if process.exitcode is None and sys.exc_info()[0] is not None else None
            process.join(10)
            process.kill()
    failures = [f"rank {rank}: {result}" for rank, (ok, result) in sorted(found.items()) if not ok]
    assert not failures, "\n".join(failures)
    return [found[rank][1] for rank in range(world_size)]


def _run(rank: int, world_size: int, port: int, results: Any, worker: Callable[..., Any], args: tuple) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    try:
        store = dist.TCPStore("127.0.0.1", port, world_size, is_master=False)
        timeout = datetime.timedelta(seconds=SECONDS)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=timeout)
        results.put((rank, (True, worker(rank, *args))))
        dist.barrier()  # no process leaves while others still communicate
        dist.destroy_process_group()
    except Exception:
        results.put((rank, (False, traceback.format_exc())))
