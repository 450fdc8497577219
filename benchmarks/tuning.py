"""The search for launch numbers: the candidates, the search over works, and the table as source code.

The search times launches with `time`; on a GPU this is `tune.flushed_time`.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import statistics
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from unittest import mock

import torch
from torch import Tensor

from rdp_kernels.kernels.triton.launch import CONFIGS, LaunchConfig, architecture
from rdp_kernels.kernels.triton.launchers import nothing_prepared
from rdp_kernels.kernels.triton.prepared import Launch, observed

from .harness import told
from .op_sets import relative_error

Results = tuple[Tensor, ...]
Time = Callable[[list[Launch]], float]
WORTH = 0.98  # relative to the present numbers' time; smaller gains are noise
PROGRAMS = (1, 2, 4, 8)  # for each multiprocessor, for kernels that sum over tiles
STAGES = (1, 2, 3)  # tiles in flight, for the kernel whose loads are pipelined
WARPS = (2, 4, 8, 16)
THREADS = 32  # per warp
SAME = 1e-5  # tolerance in float32: sums over rows are split differently


@dataclass(frozen=True)
class Work:
    """A function that launches a kernel.

    Args:
        op: the kernel's name in `CONFIGS`.
        row_bytes: the bytes of a row of the data that is cut into tiles. The table is looked up by it.
        kernels: further kernels whose launches are timed, if a sum has two stages.
        run: returns results. They must include everything that the kernel writes.
    """

    op: str
    row_bytes: int
    run: Callable[[], Results]
    kernels: tuple[str, ...] = ()

    def is_timed(self, launch: Launch) -> bool:
        return launch.kernel.fn.__name__ in {f"_{name}_kernel" for name in (self.op, *self.kernels)}


@dataclass(frozen=True)
class Tuned:
    """The best numbers of one op for rows of up to `largest` bytes, and their time relative to the present numbers'."""

    op: str
    largest: int
    config: LaunchConfig
    ratio: float
    tried: int


class WrongResult(Exception):
    """A candidate gives other results than the present numbers."""


def tune(
    op: str, works: Iterable[Work], device: torch.device, time: Time, tell: Callable[[str], None] = print
) -> list[Tuned]:
    """Returns the best candidate for each width class of the present table that has a work.

    Raises `WrongResult` if a candidate's results differ from those of the present numbers. Candidates that can't be
    launched, because they need too many registers or too much shared memory, are skipped.
    """
    return [_best(op, *group, device, time, tell) for group in _groups(op, works, device)]


def compile_candidates(op: str, works: Iterable[Work], device: torch.device) -> None:
    """Has Triton compile the kernels of all candidates without launching them. Kernels that can't be compiled are
    skipped, and `tune` reports them. `tune` itself compiles the variants of `PROGRAMS`: they depend on the best one."""

    def compiled(launch: Launch) -> None:
        with contextlib.suppress(Exception):
            launch.kernel.warmup(grid=launch.grid, **launch.arguments, **launch.options)

    for largest, present, group in _groups(op, works, device):
        for config, work in itertools.product((present, *candidates(op, present)), group):
            with using(op, largest, config, device), observed(compiled):
                work.run()


def _groups(op: str, works: Iterable[Work], device: torch.device) -> list[tuple[int, LaunchConfig, list[Work]]]:
    """Returns (most bytes of a row, present numbers, works) for each width class of the present table that has a
    work."""
    table = _table(op, device)
    groups: dict[int, list[Work]] = {}
    for work in works:
        groups.setdefault(_class_of(work.row_bytes, table), []).append(work)
    return [(largest, dict(table)[largest], groups[largest]) for largest in sorted(groups)]


def _best(
    op: str,
    largest: int,
    present: LaunchConfig,
    works: list[Work],
    device: torch.device,
    time: Time,
    tell: Callable[[str], None],
) -> Tuned:
    wanted = [work.run() for work in works]
    base = [time(_launches(work, op, largest, present, device)) for work in works]
    best, best_ratio = present, 1.0
    seen = {_effect(works, op, largest, present, device)}

    def try_out(config: LaunchConfig) -> None:
        nonlocal best, best_ratio
        effect = _effect(works, op, largest, config, device)
        if effect in seen:
            return
        seen.add(effect)
        try:
            _verify(works, wanted, op, largest, config, device)
            times = [time(_launches(work, op, largest, config, device)) for work in works]
        except WrongResult:
            raise
        except Exception as error:
            tell(f"{op} {config}: {told(error)}")
            return
        ratio = math.exp(statistics.fmean(math.log(t / b) for t, b in zip(times, base, strict=True)))
        if ratio < min(best_ratio, WORTH):
            best, best_ratio = config, ratio

    for config in candidates(op, present):
        try_out(config)
    if present.tiles > 1:
        for programs in PROGRAMS:
            try_out(replace(best, programs=programs))
    return Tuned(op, largest, best, best_ratio, len(seen))


def candidates(op: str, present: LaunchConfig) -> Iterator[LaunchConfig]:
    """Yields a grid of tiles, warps and stages with 16 to 128 bytes per thread. A tile of a kernel that needs whole
    rows holds at least one, even if it is larger than `tile`. Where a kernel sums, programs with more warps are fewer,
    so that a thread may have about as many registers as at present."""
    sizes, columns, stages = (2048, 4096, 8192, 16384), (1024, 2048, 4096, 8192), (present.num_stages,)
    whole_rows = op in ("residual_add_norm_fwd", "residual_add_norm_bwd")
    if whole_rows:
        smallest = min(present.tile, present.max_columns)
        sizes, columns = (smallest, 2 * smallest, 4 * smallest), (present.max_columns,)
    elif op == "sum_partials":
        columns = (64, 128, 256)
    if op == "residual_add_norm_bwd":
        stages = STAGES
    for tile, width, warps, ahead in itertools.product(sizes, columns, WARPS, stages):
        threads = THREADS * warps
        if (width <= tile or whole_rows) and 16 * threads <= tile and max(tile, width) <= 128 * threads:
            config = replace(present, tile=tile, max_columns=width, num_warps=warps, num_stages=ahead)
            if present.tiles > 1:
                config = replace(config, programs=max(present.programs * present.num_warps // warps, 1))
            yield config


def table_source(tuned: Iterable[Tuned], device: torch.device, comment: str = "") -> str:
    """Returns Python source of `{op: {architecture: widths}}`, to paste into `CONFIGS` beside each op's `"default"`."""
    by_op: dict[str, list[Tuned]] = {}
    for each in tuned:
        by_op.setdefault(each.op, []).append(each)
    lines = [f"# {comment}"] if comment else []
    lines.append("{")
    for op, found in by_op.items():
        table = dict(_table(op, device)) | {each.largest: each.config for each in found}
        lines += [f'    "{op}": {{', f'        "{architecture(device)}": (']
        lines += [f"            ({largest}, {config!r})," for largest, config in sorted(table.items())]
        lines += ["        ),", "    },"]
    return "\n".join([*lines, "}"])


@contextlib.contextmanager
def using(op: str, largest: int, config: LaunchConfig, device: torch.device) -> Iterator[None]:
    """Launches within the `with` block use `config` for this op, in the width class up to `largest` bytes."""
    widths = tuple((most, config if most == largest else other) for most, other in _table(op, device))
    with nothing_prepared(), mock.patch.dict(CONFIGS[op], {architecture(device): widths}):
        yield


def _table(op: str, device: torch.device) -> tuple[tuple[int, LaunchConfig], ...]:
    return CONFIGS[op].get(architecture(device)) or CONFIGS[op]["default"]


def _class_of(row_bytes: int, table: Iterable[tuple[int, LaunchConfig]]) -> int:
    widths = [largest for largest, _ in table]
    return next((largest for largest in widths if row_bytes <= largest), widths[-1])


def _launches(work: Work, op: str, largest: int, config: LaunchConfig, device: torch.device) -> list[Launch]:
    """Runs `work` once, and returns its timed launches."""
    launches = []

    def recorded(launch: Launch) -> None:
        launches.append(launch)
        launch.run()

    with using(op, largest, config, device), observed(recorded):
        work.run()
    return [launch for launch in launches if work.is_timed(launch)]


def _effect(works: list[Work], op: str, largest: int, config: LaunchConfig, device: torch.device) -> tuple:
    """Returns the grids, compile-time arguments and options that the numbers lead to, without launching kernels."""
    effects = []

    def noted(launch: Launch) -> None:
        numbers = [(name, value) for name, value in launch.arguments.items() if isinstance(value, int)]
        effects.append((launch.kernel.fn.__name__, launch.grid, *numbers, *launch.options.items()))

    with using(op, largest, config, device), observed(noted):
        for work in works:
            work.run()
    return tuple(effects)


def _verify(
    works: list[Work], wanted: list[Results], op: str, largest: int, config: LaunchConfig, device: torch.device
) -> None:
    for work, results in zip(works, wanted, strict=True):
        with using(op, largest, config, device):
            got = work.run()
        for new, result in zip(got, results, strict=True):
            error = relative_error(new, result)
            if not error <= max(SAME, 2 * torch.finfo(result.dtype).eps):
                raise WrongResult(f"{op} with {config} differs from the present numbers' results by {error:.1e}")
