"""`python -m benchmarks overhead`: the cost of a call before it computes anything.

This is host time per call in microseconds, on tensors so small that little else is left. Argument checks are part of
it. A turn is a block of calls on one thread, and the providers take turns. Ours enter their backend once for each
block. "no grad" is a forward under torch.no_grad, "forward" is one that autograd records, and "both" is that and the
gradients of all inputs. "torch.add" is the cost of one op of torch. "/eager" is the median of the turns' ratios, and
"min/eager" the ratio of the fastest turns. "launches" is the number of kernels that a call launches. On the CPU "ops"
replace them: the ops that torch dispatches and that compute. A call of our compiled library counts as one. Half of the
rows are dropped. drop_path_add and timm's formula draw them, so that half is the mean.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import rdp_kernels as rdp

from . import command
from .harness import Case, Check, Provider, Row, Session, scaled
from .launches import OPS, count_launches, counted_as
from .machine import Device
from .op_dense import ResidualAdd, ResidualAddRelu
from .op_kinds import Op, Setting, Tensors
from .op_providers import EAGER, OURS, OURS_EAGER, OURS_NATIVE, why_no_native, why_no_triton
from .op_rows import GatherRows, ResidualAddRows
from .op_sets import Sets, check_of_draws
from .pass_tables import Columns, pass_tables

NO_GRAD, FORWARD, BOTH = PASSES = ("no grad", "forward", "both")
SHAPES = ((2, 2), (8, 16, 32))
TURNS = {"full": 30, "quick": 8, "tiny": 3}
CALLS_A_TURN = {"full": 500, "quick": 200, "tiny": 20}
FLOOR = "torch.add"
DROP_PROB = 0.5
MOST_MICROSECONDS, MOST_OF_EAGER = 4.0, 1.0
"""The goals: µs of a forward without gradients, and time of forward and backward relative to eager's."""
Call = Callable[[], Tensor]


class DropPathAdd(ResidualAdd):
    """The add that draws its dropped rows itself."""

    name = "drop_path_add"


class HostDevice(Device):
    """A device timed by the host's clock, until the host has issued all work."""

    def milliseconds(self, run: Callable[[], object]) -> float:
        self._wait()
        start = self.clock()
        run()
        milliseconds = 1e3 * (self.clock() - start)
        self._wait()
        return milliseconds

    def copy_rate(self) -> float:
        """Returns NaN, as this command doesn't report bandwidth."""
        return math.nan

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def add_command(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "overhead", help="host time per call", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    blocks = {size: f"{TURNS[size]} blocks of {calls} calls" for size, calls in CALLS_A_TURN.items()}
    command.add_options(parser, f"turns of each provider; default: {blocks['full']}", blocks["quick"], blocks["tiny"])
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Measures, prints and writes. An interrupt keeps the rows so far."""
    if not command.has_device(options.device):
        return 2
    calls, device = CALLS_A_TURN[options.size], HostDevice.of(options.device)
    makers = [functools.partial(overhead_cases, op, calls) for op in ops(device.device)]
    more = functools.partial(launches, device=device.device, calls=calls)
    turns = options.turns or TURNS[options.size]
    return measure(options, device, turns, makers, len(makers) * len(PASSES), more, tables_of, verdicts_of)


def measure(
    options: argparse.Namespace,
    device: HostDevice,
    turns: int,
    makers: Sequence[command.Makes],
    num_cases: int,
    more: Callable[[Provider], Row],
    tables: Callable[[list[Row]], Iterable[Table]],
    verdicts: Callable[[list[Row]], Iterable[str]],
) -> int:
    """Measures the cases of `makers` on one thread, as a second one has nothing to do. Prints and writes rows per call.
    `more` is `Session`'s."""
    console = Console(width=command.WIDTH)
    rows, code = command.measured(
        console,
        makers,
        num_cases * turns,
        lambda on_round: Session(device, turns, on_round, flops=False, more=more),
        one_threaded=True,
        keep=lambda rows: command.write_rows(options, [per_call(row) for row in rows]),
    )
    rows = [per_call(row) for row in rows]
    if rows:
        console.print(*tables(rows), command.machine_line(rows[0]), *notes_of(rows), sep="\n")
        if options.size == "full":
            console.print(*verdicts(rows), sep="\n")
    return code if command.written(options, rows) else 1


# The calls: the formula, and ours


def _residual_add(op: Op, residual: Tensor, branch: Tensor, gamma: Tensor) -> tuple[Call, Call]:
    row_scale, mask = op.row_scale, op.mask
    return (
        lambda: residual + branch * gamma * mask,
        lambda: rdp.residual_add(residual, branch, gamma=gamma, row_scale=row_scale),
    )


def _residual_add_relu(op: Op, residual: Tensor, branch: Tensor, gamma: Tensor) -> tuple[Call, Call]:
    row_scale, mask = op.row_scale, op.mask
    return (
        lambda: (residual + branch * gamma * mask).relu(),
        lambda: rdp.residual_add(residual, branch, gamma=gamma, row_scale=row_scale, activation="relu"),
    )


def _residual_add_rows(op: Op, residual: Tensor, branch: Tensor, gamma: Tensor) -> tuple[Call, Call]:
    rows, scale = op.rows, op.scale
    return (
        lambda: torch.index_add(residual, 0, rows, branch * gamma, alpha=scale),
        lambda: rdp.residual_add(residual, branch, rows=rows, row_scale=scale, gamma=gamma),
    )


def _gather_rows(op: Op, residual: Tensor) -> tuple[Call, Call]:
    rows = op.rows
    return lambda: residual.index_select(0, rows), lambda: rdp.gather_rows(residual, rows)


def _drop_path_add(op: Op, residual: Tensor, branch: Tensor, gamma: Tensor) -> tuple[Call, Call]:
    return (
        lambda: residual + _timm_drop_path(branch * gamma, DROP_PROB),
        lambda: rdp.drop_path_add(residual, branch, DROP_PROB, True, gamma=gamma),
    )


def _timm_drop_path(x: Tensor, drop_prob: float) -> Tensor:
    """Computes drop-path as timm does in training."""
    keep_prob = 1 - drop_prob
    mask = x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(keep_prob)
    if keep_prob > 0:
        mask.div_(keep_prob)
    return x * mask


CALLS: dict[type[Op], Callable[..., tuple[Call, Call]]] = {
    ResidualAdd: _residual_add,
    ResidualAddRelu: _residual_add_relu,
    ResidualAddRows: _residual_add_rows,
    GatherRows: _gather_rows,
    DropPathAdd: _drop_path_add,
}


def ops(device: torch.device) -> Iterator[Op]:
    for kind, shape in itertools.product(CALLS, SHAPES):
        yield kind(Setting(kind.name, shape, shape[0] // 2, gamma=kind is not GatherRows), device)


# Cases


def overhead_cases(op: Op, calls: int) -> Iterator[Case]:
    """Returns a case for each pass. A turn is `calls` calls."""
    sets = Sets(op, 1)
    eager, ours = CALLS[type(op)](op, *sets.inputs[0])
    for direction in PASSES:
        providers = [provider(EAGER, eager, sets, direction, calls)]
        if type(op) is ResidualAdd:
            plain = Sets(ResidualAdd(Setting(FLOOR, op.setting.shape, None, gamma=False), op.device), 1)
            providers.append(provider(FLOOR, functools.partial(torch.add, *plain.inputs[0]), plain, direction, calls))
        for name, backend, reason in (
            (OURS_EAGER, "eager", None),
            (OURS, "triton", why_no_triton(op.device)),
            (OURS_NATIVE, "native", why_no_native(op.device)),
        ):
            if reason is None:
                providers.append(provider(name, ours, sets, direction, calls, backend))
            else:
                providers.append(Provider.missing(name, reason))
        yield Case(op.setting.labels | {"pass": direction, "calls": calls}, "call", EAGER, providers)


def provider(
    name: str,
    call: Callable[[], Tensor | Tensors],
    sets: Sets,
    direction: str,
    calls: int,
    backend: str = "auto",
    computes: bool = True,
) -> Provider:
    """Returns a provider of one pass of `call`. `backend` is used by our calls. If it computes nothing, as on a
    stand-in for a GPU's driver, the values are checked on the eager backend, and its own results in shapes and
    dtypes."""
    inputs, douts = sets.inputs[0], sets.douts[0]

    def with_gradients() -> tuple:
        out = call()
        return out, torch.autograd.grad(out, inputs, douts)

    once = with_gradients if direction == BOTH else call

    def block(count: int, backend: str = backend) -> object:
        with rdp.use_backend(backend), torch.set_grad_enabled(direction != NO_GRAD):
            for _ in range(count):
                results = once()
        return results

    def verify() -> Check:
        checked, compute = BOTH if direction == BOTH else FORWARD, backend if computes else "eager"
        if isinstance(sets.op, DropPathAdd):
            check = check_of_draws(sets, checked, lambda: _flat(block(1, compute)))
        else:
            check = sets.check(checked, _flat(block(1, compute)))
        alike = are_alike(_flat(block(1)), _flat(block(1, "eager")))
        return check if alike else Check(math.inf, 0.0)

    return Provider(name, lambda turn: block(calls), verify)


def are_alike(found: Iterable[Tensor], wanted: Iterable[Tensor]) -> bool:
    """Returns whether tensors have the same shapes and dtypes."""
    return [(t.shape, t.dtype) for t in found] == [(t.shape, t.dtype) for t in wanted]


def _flat(results: Any) -> Tensors:
    return (results,) if isinstance(results, Tensor) else tuple(t for each in results for t in _flat(each))


def launches(provider: Provider, device: torch.device, calls: int) -> Row:
    """Returns the launches of one of the calls in a turn of `provider`."""
    count = count_launches(lambda: provider.run(0), device)
    return {"launches": count / calls, "launches_are": counted_as(device)}


# Tables


def per_call(row: Row) -> Row:
    """Returns the row with times in microseconds per call, without the columns of FLOPs and bytes."""
    left_out = ("flop", "_gb", "_share", "_ms", "needed", "counted", "launches")
    kept = {key: value for key, value in row.items() if not any(part in key for part in left_out)}
    times = {key.replace("_ms", "_us"): scaled(row[key], 1e3 / row["calls"]) for key in row if key.endswith("_ms")}
    launched = {"launches": row.get("launches"), "launches_are": row.get("launches_are", "")}
    return kept | times | launched


COLUMNS: Columns = {
    "min µs": ("min_us", ".2f"),
    "p50 µs": ("p50_us", ".2f"),
    "/eager": ("ratio_rounds", ".2f"),
    "min/eager": ("ratio_min", ".2f"),
}


def tables_of(rows: list[Row]) -> Iterator[Table]:
    counted = "ops" if any(row["launches_are"] == OPS for row in rows) else "launches"
    return pass_tables(rows, COLUMNS | {counted: ("launches", "g")})


def notes_of(rows: list[Row]) -> Iterator[str]:
    """Yields why providers were not measured."""
    for name, reason in dict.fromkeys((row["provider"], row["unavailable"]) for row in rows if row["unavailable"]):
        yield f"– no {name}: {reason}"


def verdicts_of(rows: list[Row]) -> Iterator[str]:
    """Yields the goals, which apply to the residual add of the smallest tensors by the compiled library."""
    shape = "x".join(map(str, SHAPES[0]))
    about = (ResidualAdd.name, shape, OURS_NATIVE, "")
    of = {r["pass"]: r for r in rows if (r["op"], r["shape"], r["provider"], r["unavailable"]) == about}
    for direction, what, key, key_min, unit, most in (
        (BOTH, "forward and backward", "ratio_rounds", "ratio_min", "of eager", MOST_OF_EAGER),
        (NO_GRAD, "a forward without gradients", "p50_us", "min_us", "µs", MOST_MICROSECONDS),
    ):
        measured, met = "not measured", False
        if direction in of:
            value, lowest = of[direction][key], of[direction][key_min]
            measured, met = f"{value:.2f} (min {lowest:.2f}) {unit}", value <= most
        yield f"{about[0]} {shape}, {what}: {measured}, target {most:g} {unit}: {'met' if met else 'MISSED'}"
