"""`python -m benchmarks estimate MODEL`: the cost of drop and reuse iterations on a model, against plain training.

It shows needed FLOPs, the bytes that autograd saves and the time of forward and backward, by rates, mode and freezing,
and gives a recommendation. It calls `ResidualDropPath.estimate` for a model of timm or one of the benchmark's own.
"""

from __future__ import annotations

import argparse
import copy
import difflib
import statistics
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import rdp_kernels as rdp
from examples.libraries import import_torchvision
from rdp_kernels.estimate import Estimate, kept_fractions

from . import command
from .cases import MODES, OWN_FULL, SEED
from .command import shown
from .harness import told
from .library_models import NAMES
from .machine import Device, facts
from .step import probability

BATCH = 8  # timm's models
DROP_PROB = 0.1
TURNS = 12
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}
FREEZES = ("parameters", "branch")


class Unavailable(Exception):
    """The requested model isn't available. The message is for users."""


@dataclass(frozen=True)
class Subject:
    """A model with paths, its plain original, and a batch. A model that was built with paths is its own original."""

    model: nn.Module
    plain: nn.Module
    images: Tensor


def add_command(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "estimate",
        help="the cost of the scheme on a model",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument(
        "model", metavar="MODEL", help=f"{', '.join([*OWN_FULL, *NAMES])}, or a name that timm.create_model takes"
    )
    parser.add_argument(
        "--drop-prob",
        type=probability,
        default=DROP_PROB,
        metavar="P",
        help=f"P(drop) of every path; default: {DROP_PROB}",
    )
    parser.add_argument("--batch", type=command.count, help=f"images; default: {BATCH}; for our networks their own")
    parser.add_argument("--image", type=command.count, metavar="SIDE", help="pixels; default: the model's own")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="default: float32")
    parser.add_argument("--check", action="store_true", help="also measure real iterations, and compare")
    command.add_options(
        parser, f"--check: pairs of each kind; default: {TURNS}", "measure no times; excludes --check", "the same"
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    if not command.has_device(options.device):
        return 2
    if options.check and options.size != "full":
        print("--check compares times, and --quick takes none", file=sys.stderr)
        return 2
    device = Device.of(options.device)
    try:
        subject = subject_of(options, device.device)
    except Unavailable as error:
        print(f"estimate: {error}", file=sys.stderr)
        return 2
    scheme = rdp.ResidualDropPath(subject.model, options.drop_prob)
    estimate = scheme.estimate(subject.images, timed=options.size == "full")
    scheme.remove()
    print(estimate)
    if options.check:
        Console(width=command.WIDTH).print(table_of(list(checked(subject, estimate, options, device))))
    labels = facts(device) | {"model": options.model, "batch": len(subject.images), "dtype": options.dtype}
    plain = {"plain_flops": estimate.plain_flops, "plain_saved_bytes": estimate.plain_saved_bytes}
    rows = [labels | asdict(row) | plain | {"plain_seconds": estimate.plain_seconds} for row in estimate]
    return 0 if command.written(options, rows) else 1


def subject_of(options: argparse.Namespace, device: torch.device) -> Subject:
    """Raises `Unavailable`."""
    dtype = DTYPES[options.dtype]
    if options.model in OWN_FULL:
        config = OWN_FULL[options.model]
        config = replace(config, batch=options.batch or config.batch, image=options.image or config.image, dtype=dtype)
        model = config.network(device).model
        return Subject(model, model, config.data(device)[0])
    model = _from_timm(options.model, options.image).to(device, dtype)
    side = options.image or model.pretrained_cfg["input_size"][-1]
    images = torch.randn(options.batch or BATCH, 3, side, side, device=device).to(dtype)
    plain = copy.deepcopy(model)
    try:
        report = rdp.convert(model, options.drop_prob, example_inputs=images[:2], check=False)
    except ValueError as error:
        raise Unavailable(f"{options.model}: {error}") from error
    if not report.converted:
        raise Unavailable(f"{options.model} has no path that can be converted\n{report}")
    return Subject(model, plain, images)


def _from_timm(name: str, image: int | None) -> nn.Module:
    name = NAMES.get(name, name)
    try:
        import_torchvision()
        import timm
    except ImportError as error:
        raise Unavailable(
            f"{name} is none of {', '.join(OWN_FULL)}, and timm can't be imported: {told(error)}"
        ) from error
    if not timm.is_model(name.partition(".")[0]):
        near = difflib.get_close_matches(name, [*OWN_FULL, *timm.list_models()])
        raise Unavailable(f"unknown model {name!r}" + (f"; near: {', '.join(near)}" if near else ""))
    torch.manual_seed(SEED)
    if image is not None:
        try:
            return timm.create_model(name, img_size=image)
        except TypeError:  # the model takes images of any size
            pass
    return timm.create_model(name)


# The check: real pairs of iterations, timed in turn with plain steps


@dataclass(frozen=True)
class Checked:
    """Ratios to plain training's time of forward and backward. They are medians over pairs on the same plans."""

    mode: str
    freeze: str
    measured: float
    estimated: float
    agreement: float
    """The median of measured / estimated ratio over the pairs."""


def checked(subject: Subject, estimate: Estimate, options: argparse.Namespace, device: Device) -> Iterator[Checked]:
    """Yields a result for each mode and freezing that the scheme supports on this model."""
    turns = options.turns or TURNS
    for mode in MODES:
        for freeze in FREEZES:
            try:
                scheme = rdp.ResidualDropPath(subject.model, options.drop_prob, mode=mode, freeze=freeze, seed=SEED)
            except ValueError:
                continue
            yield _checked(subject, scheme, estimate, turns, device)
            scheme.remove()


def _checked(subject: Subject, scheme: rdp.ResidualDropPath, estimate: Estimate, turns: int, device: Device) -> Checked:
    measured, estimated = [], []
    for turn in range(-1, turns):  # one to warm up
        plan = _plan(scheme, len(subject.images))

        def ours(plan: rdp.PathPlan = plan) -> None:
            for _ in scheme.iterations(plan=plan):
                _step(subject.model, subject.images)

        def plain() -> None:
            for _ in range(2):
                _step(subject.plain, subject.images)

        order = (ours, plain) if turn % 2 else (plain, ours)
        times = {run: device.milliseconds(run) for run in order}
        if turn >= 0:
            measured.append(times[ours] / times[plain])
            estimated.append(_estimated(scheme, estimate, plan))
    agreement = statistics.median(m / e for m, e in zip(measured, estimated, strict=True))
    medians = (statistics.median(ratios) for ratios in (measured, estimated))
    return Checked(scheme.mode, scheme.freeze, *medians, agreement)


def _plan(scheme: rdp.ResidualDropPath, batch: int) -> rdp.PathPlan:
    """Returns the next plan that drops something, so that there are two iterations."""
    while True:
        pair = scheme.iterations(batch)
        next(pair)
        plan = scheme.plan
        pair.close()  # nothing runs
        assert plan is not None
        if plan.dropped_paths:
            return plan


def _estimated(scheme: rdp.ResidualDropPath, estimate: Estimate, plan: rdp.PathPlan) -> float:
    cost, kept = estimate.cost, torch.tensor([kept_fractions(plan)], dtype=torch.float64)
    pair = cost.seconds(cost.drop_shares(cost.computed(kept))) + cost.seconds(cost.reuse_shares(kept, scheme.freeze))
    return (pair / (2 * cost.seconds(cost.plain_shares()))).item()


def _step(model: nn.Module, images: Tensor) -> None:
    model.zero_grad(set_to_none=True)
    model(images).float().sum().backward()


def table_of(rows: list[Checked]) -> Table:
    table = Table(
        title="Time of a pair of iterations, forward and backward, as a ratio to two plain steps; no optimizer"
    )
    for name in ("mode", "freeze", "measured", "estimated", "measured / estimated"):
        table.add_column(name, justify="left" if name in ("mode", "freeze") else "right")
    for row in rows:
        table.add_row(row.mode, row.freeze, *(shown(v, ".3f") for v in (row.measured, row.estimated, row.agreement)))
    return table
