"""Examines the residual paths of a model: what each path adds and learns, and what happens without it.

MODEL is the name of a timm model, or package.module:factory. The factory is called without arguments. It returns
a model with paths, or a model in which rdp_kernels.convert finds residual paths. The command prints a table of
the paths. With --out it writes all results, with figures.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from ._report import Report, measure, prepare
from ._subject import FEWEST, Problem, build_model, ensure_paths, load_checkpoint, load_data


def at_least(minimum: int) -> Callable[[str], int]:
    def count(text: str) -> int:
        if not text.isdecimal() or int(text) < minimum:
            raise argparse.ArgumentTypeError(f"must be an integer, at least {minimum}, got {text!r}")
        return int(text)

    return count


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m rdp_kernels.diagnostics",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("model", metavar="MODEL", help="vit_tiny_patch16_224, or package.module:factory")
    add("--checkpoint", type=Path, metavar="FILE", help="a state_dict, or a dict with one as state_dict or model")
    add("--pretrained", action="store_true", help="load timm's pretrained weights")
    add("--classes", type=at_least(1), help="number of classes of a timm model; default: its own")
    add("--data", default="random", metavar="random|digits|FOLDER", help="FOLDER holds CLASS/*.jpg; default: random")
    add("--batch-size", type=at_least(FEWEST), default=16, metavar="N", help="images in a batch; default: 16")
    add("--batches", type=at_least(1), default=2, metavar="N", help="number of batches; default: 2")
    add("--image-size", type=at_least(1), metavar="SIDE", help="height and width in pixels; default: the model's own")
    add("--lesions", type=at_least(0), default=8, metavar="N", help="random sets of removed paths by size; default: 8")
    add("--samples", type=at_least(0), default=2, metavar="N", help="random sets for effective depth; default: 2")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    add("--out", type=Path, metavar="FOLDER", help="folder for report.json, report.md and figures; default: none")
    add("--seed", type=int, default=0, help="for new weights, images and random choices; default: 0")
    return parser


def look(options: argparse.Namespace) -> Report:
    """Builds the model, loads the data and measures. Raises `Problem`."""
    try:
        device = torch.device(options.device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise Problem(f"argument --device: {options.device}: {str(error).splitlines()[0]}") from error
    torch.manual_seed(options.seed)
    model = build_model(options.model, pretrained=options.pretrained, classes=options.classes, side=options.image_size)
    if options.checkpoint is not None:
        load_checkpoint(model, options.checkpoint)
    sizes = options.image_size, options.batch_size, options.batches
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    data = load_data(model, options.data, *sizes, options.seed).to(device, dtype)
    model.to(device)
    notes = []
    if ":" not in options.model and not options.pretrained and options.checkpoint is None:
        notes.append("The weights are untrained. Trained ones (--pretrained, --checkpoint) tell more.")
    if (converted := ensure_paths(model, data.images[0])) is not None:
        notes.append(f"{converted} by rdp_kernels.convert.")
    return measure(model, data, lesions=options.lesions, samples=options.samples, seed=options.seed, notes=notes)


def main(argv: Sequence[str] | None = None) -> int:
    options = build_parser().parse_args(argv)
    try:
        if options.out is not None:
            prepare(options.out)
        report = look(options)
        print(report.text())
        if options.out is not None:
            report.write(options.out, options.model, vars(options))
            print(f"Report: {options.out / 'report.md'}")
    except Problem as problem:
        print(f"diagnostics: error: {problem}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130  # as a shell reports an interrupt
    return 0


if __name__ == "__main__":
    sys.exit(main())
