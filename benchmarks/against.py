"""`python -m benchmarks against FOLDER`: the host time of a call in this tree, relative to another tree of the package.

FOLDER is a checkout with its library built, such as a git worktree of an earlier commit. There is one process for each
tree. It times blocks of the calls of `overhead` on one thread, and the two processes take turns. The ratio is the
median of the turns' ratios. Below 1, this tree is faster. Without FOLDER this tree is compared with itself, which shows
how large the noise is.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
PASSES = {"no grad": 200, "forward": 200, "both": 60}
"""The number of calls in a block, for each pass."""


def add_command(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "against", help="host time per call in two trees", description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )  # fmt: skip
    parser.add_argument("folder", type=Path, nargs="?", default=ROOT, help="the other tree; default: this one")
    parser.add_argument("--turns", type=int, default=100, help="turns of each tree; default: 100")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    trees = [options.folder.resolve(), ROOT]
    for tree in trees:
        if not (tree / "rdp_kernels").is_dir():
            print(f"{tree} has no rdp_kernels", file=sys.stderr)
            return 2
    workers = [
        subprocess.Popen(
            [sys.executable, __file__], cwd=tree, env=os.environ | {"PYTHONPATH": str(tree)},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )
        for tree in trees
    ]  # fmt: skip
    for label, worker in zip(("other", "this"), workers, strict=True):
        print(f"{label}: {_ask(worker, 'where')}")
    print(f"{'call':24} {'pass':8} {'other, µs':>10} {'this, µs':>10} {'ratio':>7}")
    for name in _ask(workers[0], "names").split(","):
        for direction in PASSES:
            for worker in workers:
                _ask(worker, f"{name},{direction}")  # the first calls do one-time work
            turns = []
            for turn in range(options.turns):
                order = workers if turn % 2 else workers[::-1]
                taken = {id(worker): float(_ask(worker, f"{name},{direction}")) for worker in order}
                turns.append([taken[id(worker)] for worker in workers])
            other, this = (statistics.median(column) for column in zip(*turns, strict=True))
            ratio = statistics.median(b / a for a, b in turns)
            print(f"{name:24} {direction:8} {other:10.2f} {this:10.2f} {ratio:7.3f}", flush=True)
    for worker in workers:
        worker.communicate()
    return 0


def _ask(worker: subprocess.Popen, question: str) -> str:
    assert worker.stdin is not None
    assert worker.stdout is not None
    print(question, file=worker.stdin, flush=True)
    answer = worker.stdout.readline().strip()
    if not answer:
        raise RuntimeError("a process of the two ended: see its error above")
    return answer


def _work() -> None:
    """Answers questions about the tree that this process imports the package from."""
    import torch

    import rdp_kernels as rdp

    torch.set_num_threads(1)
    calls = {}
    for shape in ((2, 2), (8, 16, 32)):
        rows, size = torch.arange(shape[0] // 2) * 2, "x".join(map(str, shape))
        x, update, gamma = (torch.randn(s, requires_grad=True) for s in (shape, shape, shape[-1:]))
        some, scale = torch.randn(len(rows), *shape[1:], requires_grad=True), torch.tensor([0.0, 2.0] * len(rows))
        scaled = dict(gamma=gamma, row_scale=scale)
        calls |= {
            f"residual_add {size}": (rdp.residual_add, (x, update), scaled, (x, update, gamma)),
            f"relu {size}": (rdp.residual_add, (x, update), scaled | {"activation": "relu"}, (x, update, gamma)),
            f"rows {size}": (
                rdp.residual_add,
                (x, some),
                dict(gamma=gamma, rows=rows, row_scale=2.0),
                (x, some, gamma),
            ),
            f"gather_rows {size}": (rdp.gather_rows, (x, rows), {}, (x,)),
            f"drop_path_add {size}": (rdp.drop_path_add, (x, update, 0.5, True), dict(gamma=gamma), (x, update, gamma)),
        }
    for question in map(str.strip, sys.stdin):
        if question in ("names", "where"):
            print(",".join(calls) if question == "names" else rdp.__file__, flush=True)
            continue
        name, direction = question.split(",")
        function, arguments, options, learning = calls[name]
        with torch.set_grad_enabled(direction != "no grad"):
            dout = torch.ones_like(function(*arguments, **options))
            start = time.perf_counter()
            for _ in range(PASSES[direction]):
                out = function(*arguments, **options)
                if direction == "both":
                    torch.autograd.grad(out, learning, dout)
        print(1e6 * (time.perf_counter() - start) / PASSES[direction], flush=True)


if __name__ == "__main__":
    sys.path[0] = os.getcwd()  # without this, the folder of this file would come first
    _work()
