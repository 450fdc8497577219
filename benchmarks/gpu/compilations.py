"""`python -m benchmarks gpu --count`: the number of kernels that Triton would compile for each step, without a GPU.

Triton compiles a kernel in most of a second, which is most of a step's time in a visit of minutes. A kernel is compiled
again for other dtypes, tile sizes and absent operands, and for strides and widths that are divisible by 16 or not. More
rows need no other kernel. So all calls have their real width, with few rows, layers and patches.

`--compile STEP` compiles the kernels of a step for an H200 in an empty cache, and prints how long that takes.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from unittest import mock

import torch

from ..machine import ROOT

BEFORE_DRAWN = 250
"""The largest number of kernels that may be requested before the drawn tests."""
ROWS, LAYERS, IMAGE = 16, 2, 64


def count(steps: Sequence[str]) -> int:
    """Prints the number of kernels that each step requests, and how many of them no earlier step requested."""
    command = [sys.executable, "-m", "benchmarks.gpu.compilations"]
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    result = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    if result.returncode:
        return 1
    asked, seen = json.loads(result.stdout), set()
    print(f"{'step':10}{'kernels':>9}{'new':>6}")
    for step in steps:
        if step in asked:
            print(f"{step:10}{len(asked[step]):9}{len(set(asked[step]) - seen):6}")
            seen |= set(asked[step])
        else:
            print(f"{step:10}{'-':>9}{'-':>6}  not counted")
    print(f"{len(seen)} distinct kernels before the drawn tests; at most {BEFORE_DRAWN} are meant to be")
    return 0 if len(seen) <= BEFORE_DRAWN else 1


def compile_all(step: str) -> int:
    """Compiles the kernels of a step one after the other in a new process, whose cache is empty."""
    command = [sys.executable, "-m", "benchmarks.gpu.compilations", step]
    with tempfile.TemporaryDirectory() as cache:
        environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": cache}
        return subprocess.run(command, cwd=ROOT, env=environment).returncode


def print_compile_time(step: str) -> None:
    """Prints the number of kernels, and the seconds that compiling takes the processor, the assembler included."""
    from .stand_in import set_up_launches

    set_up_launches()
    import triton.compiler

    import rdp_kernels as rdp

    seconds, compile_one = [], triton.compiler.compile

    def timed(*arguments: object, **options: object) -> object:
        start = processor_time()
        compiled = compile_one(*arguments, **options)
        seconds.append(processor_time() - start)
        return compiled

    with rdp.use_backend("triton"), mock.patch.object(triton.compiler, "compile", timed):
        for work in WORKS[step]():
            work()
    print(f"{step}: {len(seconds)} kernels, {sum(seconds):.1f} s of processor time")


def processor_time() -> float:
    """Returns the seconds that this process and those that it waited for have used."""
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def main() -> None:
    """Prints the kernels of each step as JSON, or the compile time of one step."""
    if len(sys.argv) > 1:
        print_compile_time(sys.argv[1])
        return
    from .stand_in import set_up

    asked = set_up()
    import rdp_kernels as rdp

    found: dict[str, list[str]] = {}
    with rdp.use_backend("triton"):
        for step, works in WORKS.items():
            asked.clear()
            for work in works():
                work()
            found[step] = sorted(asked)
    found["shares"] = found["ops"]  # the same calls, whose code it reads
    found["memory"] = found["step"]  # the same iterations
    json.dump(found, sys.stdout)


Works = Iterator[Callable[[], object]]


def table() -> Works:
    from tests.kernels import fixed
    from tests.kernels.budget import gradients
    from tests.kernels.values import douts_of, operands_of

    def run(row: fixed.Row) -> None:
        case = row.case(small=False)
        operands = operands_of(case)
        results = row.op(operands, case)
        gradients(results, operands, douts_of(case, results))

    for row in fixed.TABLE:
        yield partial(run, replace(row, shape=(min(row.shape[0], ROWS), *row.shape[1:])))


def beyond() -> Works:
    """The ops of `tests/test_gpu.py`, and its training step."""
    import rdp_kernels as rdp
    from examples.models import ViT

    bf16, rows = torch.bfloat16, torch.arange(3).flip(0)

    def long_rows(num_rows: int, width: int) -> None:
        x = torch.empty(num_rows, width, dtype=bf16)  # untouched memory isn't allocated
        out = rdp.residual_add(x, x, rows=rows if num_rows == 3 else torch.arange(num_rows))
        rdp.gather_rows(out, rows[:2])

    def norm() -> None:
        x = torch.empty(3, 1025, 1024, dtype=bf16)
        rdp.residual_add_norm(x, x, torch.empty(1024, dtype=bf16), norm="rms")

    def training(mode: str, freeze: str) -> None:
        model = ViT(8, 2, 3, 7, 32, 4, 2)
        scheme = rdp.ResidualDropPath(model, 0.5, mode=mode, freeze=freeze, sampling="fixed", seed=0)
        for _ in scheme.iterations(16):
            model(torch.randn(16, 3, 8, 8)).sum().backward()

    yield partial(long_rows, 3, 2**30 + 48)
    yield partial(long_rows, 2**10 + 1, 2**15 + 16)
    yield norm
    yield lambda: rdp.residual_add(torch.empty(64, 4096), torch.empty(64, 4096))
    yield lambda: rdp.residual_add(torch.empty(64, 4096), torch.empty(64, 4096), row_scale=2.0)
    yield partial(training, "block", "branch")
    yield partial(training, "sample", "parameters")


def host() -> Works:
    from .. import host

    driver = host.Driver(host.HostDevice.of("cpu"), {"triton": None, "native": "not counted"}, launched=lambda: 0)
    cases = [case for op in host.ops(driver.device, "quick") for case in host.op_cases(op, 1, driver)]
    cases += [host.path_case(name, mode, phase, 1, driver) for name, mode, phase in host.paths("quick")]
    for case in cases:
        yield from (partial(each.run, 0) for each in case.available if each.name == host.OURS)


def ops(size: str = "full") -> Works:
    from ..op_cases import OPS, settings

    for setting in settings("cuda", size):
        batch, *sample = setting.shape
        few = min(batch, ROWS)
        kept = None if setting.kept is None else max(setting.kept * few // batch, 1)
        op = OPS[setting.op](replace(setting, shape=(few, *sample), kept=kept))
        inputs = op.inputs(0)
        yield partial(_both_ways, partial(op.ours, *inputs), inputs)


def step() -> Works:
    from .. import drop_path
    from ..cases import LIBRARY_CUDA, draw_plans, verify
    from ..library_models import checked, library, missing
    from ..pairs import BranchFrozen, Exact
    from .steps import TIMM

    if missing() is not None:
        return
    checked.update(TIMM[1:])  # nothing is computed, so every check would fail
    cpu = torch.device("cpu")
    for model in TIMM[1:]:
        config = replace(
            LIBRARY_CUDA[model],
            build=partial(library, model, depth=LAYERS, img_size=IMAGE),
            batch=ROWS // 4,
            image=IMAGE,
        )
        for kind in (Exact, BranchFrozen):
            for mode in ("block", "sample"):
                trainer = config.trainer(kind, mode, cpu, autocast=True)
                (plan,) = draw_plans(2 * LAYERS, config.batch, 1, mode, 0.3)
                yield partial(trainer.train, plan)
                yield partial(verify, kind, model, mode, 0.3)
        ours = drop_path.Ours(config.network(cpu), *config.data(cpu), drop_path.DROP_PROB, autocast=True)
        yield ours.train
        yield partial(drop_path.verify_drawn, drop_path.Ours, model)


WORKS: dict[str, Callable[[], Works]] = {
    "table": table,
    "beyond": beyond,
    "host": host,
    "ops": ops,
    "step": step,
    "compiled": partial(ops, "quick"),
}
"""Step → function that requests its kernels. The other steps request none."""


def _both_ways(compute: Callable[[], tuple[torch.Tensor, ...]], inputs: tuple[torch.Tensor, ...]) -> None:
    outs = compute()
    torch.autograd.grad(outs, inputs, [torch.empty_like(out) for out in outs])
    with torch.no_grad():
        compute()


if __name__ == "__main__":
    main()
