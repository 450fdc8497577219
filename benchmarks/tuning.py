"""The search for launch numbers: which candidates there are, on what they are tried, and the table as source.

Candidates and works are searched with whatever `time` they are given; on a GPU that is `tune.flushed_time`.
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

from rdp_kernels.kernels.triton.launch import CONFIGS, Launch, LaunchConfig, architecture

from .harness import told
from .op_sets import relative_error

Results = tuple[Tensor, ...]
Time = Callable[[list[Launch]], float]
WORTH = 0.98  # of the present numbers' time: what is less of a gain is noise
TILES = (8, 16, 32, 64)  # for each program, where it sums over them
THREADS = 32  # of a warp
SAME = 1e-5  # of results in float32: sums over rows are cut differently


@dataclass(frozen=True)
class Work:
    """Something that launches a kernel.

    Args:
        op: the kernel's name in `CONFIGS`.
        width: of the tiles that it is cut into, by which the table is looked up.
        kernels: whose launches are timed: where a sum has two stages, both.
        run: returns results, among them all that the kernel writes.
    """

    op: str
    width: int
    run: Callable[[], Results]
    kernels: tuple[str, ...] = ()

    def is_timed(self, launch: Launch) -> bool:
        return launch.kernel.fn.__name__ in {f"_{name}_kernel" for name in (self.op, *self.kernels)}


@dataclass(frozen=True)
class Tuned:
    """The numbers of one op up to a width, and their time as a ratio to that of the present ones."""

    op: str
    largest: int
    config: LaunchConfig
    ratio: float
    tried: int


class WrongResult(Exception):
    """A candidate changes what is computed."""


def tune(
    op: str, works: Iterable[Work], device: torch.device, time: Time, tell: Callable[[str], None] = print
) -> list[Tuned]:
    """The best candidate for each width class of the present table that a work falls in.

    Raises `WrongResult` where a candidate's results differ from those of the present numbers. One that can't be
    launched, for want of registers or shared memory, is passed over.
    """
    return [_best(op, *group, device, time, tell) for group in _groups(op, works, device)]


def compile_candidates(op: str, works: Iterable[Work], device: torch.device) -> None:
    """Has Triton compile what `tune` is going to launch, and launches none of it. What can't be compiled is passed
    over: `tune` will tell. The variants of `TILES` need no kernels of their own: none is specialized for `tiles`."""

    def compiled(launch: Launch, _: torch.device) -> None:
        with contextlib.suppress(Exception):
            if launch.grid[0]:
                launch.kernel.warmup(grid=launch.grid, **launch.arguments, **launch.options)

    for largest, present, group in _groups(op, works, device):
        for config, work in itertools.product((present, *candidates(op, present)), group):
            with using(op, largest, config, device), mock.patch.object(Launch, "run", compiled):
                work.run()


def _groups(op: str, works: Iterable[Work], device: torch.device) -> list[tuple[int, LaunchConfig, list[Work]]]:
    """For each width class of the present table that a work falls in: its largest width, its numbers, the works."""
    table = _table(op, device)
    groups: dict[int, list[Work]] = {}
    for work in works:
        groups.setdefault(_class_of(work.width, table), []).append(work)
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
        for tiles in TILES:
            try_out(replace(best, tiles=tiles))
    return Tuned(op, largest, best, best_ratio, len(seen))


def candidates(op: str, present: LaunchConfig) -> Iterator[LaunchConfig]:
    """The grid of tiles and warps in the place of the present ones; 8 to 64 elements a thread. Kernels that need whole
    rows keep tiles that hold them."""
    sizes, columns = (1024, 2048, 4096, 8192), (512, 1024, 2048, 4096)
    if op in ("residual_add_norm_fwd", "residual_add_norm_bwd"):
        sizes, columns = tuple(present.max_columns * rows for rows in (1, 2, 4)), (present.max_columns,)
    elif op == "sum_partials":
        columns = (64, 128, 256)
    for tile, width, warps in itertools.product(sizes, columns, (4, 8, 16)):
        one_row = op != "residual_add_norm_bwd_wide" or tile == width  # that kernel's tiles
        if width <= tile and one_row and 8 <= tile // (THREADS * warps) <= 64:
            yield replace(present, tile=tile, max_columns=width, num_warps=warps)


def table_source(tuned: Iterable[Tuned], device: torch.device, comment: str = "") -> str:
    """Python source of `{op: {architecture: widths}}`: what belongs into `CONFIGS` beside each op's `"default"`."""
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
    """Launches within take `config` for this op up to a width."""
    widths = tuple((width, config if width == largest else other) for width, other in _table(op, device))
    with mock.patch.dict(CONFIGS[op], {architecture(device): widths}):
        yield


def _table(op: str, device: torch.device) -> tuple[tuple[int, LaunchConfig], ...]:
    return CONFIGS[op].get(architecture(device)) or CONFIGS[op]["default"]


def _class_of(width: int, table: Iterable[tuple[int, LaunchConfig]]) -> int:
    widths = [largest for largest, _ in table]
    return next((largest for largest in widths if width <= largest), widths[-1])


def _launches(work: Work, op: str, largest: int, config: LaunchConfig, device: torch.device) -> list[Launch]:
    """Those of `work` that are timed, each run once."""
    launches, run = [], Launch.run

    def recorded(launch: Launch, on: torch.device) -> None:
        launches.append(launch)
        run(launch, on)

    with using(op, largest, config, device), mock.patch.object(Launch, "run", recorded):
        work.run()
    return [launch for launch in launches if work.is_timed(launch)]


def _effect(works: list[Work], op: str, largest: int, config: LaunchConfig, device: torch.device) -> tuple:
    """What the numbers come to, without running it: grids, compile-time arguments and options."""
    effects = []

    def noted(launch: Launch, _: torch.device) -> None:
        numbers = [(name, value) for name, value in launch.arguments.items() if isinstance(value, int)]
        effects.append((launch.kernel.fn.__name__, launch.grid, *numbers, *launch.options.items()))

    with using(op, largest, config, device), mock.patch.object(Launch, "run", noted):
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
