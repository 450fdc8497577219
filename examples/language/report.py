"""The files of a run and the table on the screen, made only from the finished trainings."""

from __future__ import annotations

import csv
import io
from typing import Any

import torch

from benchmarks.machine import Device, facts
from examples.digits.results import Estimate
from examples.digits.storage import Folder
from examples.language.data import Text
from examples.language.experiment import final_loss
from examples.methods import PLAIN

CURVES = ("step", "flops", "seconds", "training_loss", "validation_loss")


class Report:
    """The report of `finished`: results of trainings, as returned by `Training.result`."""

    def __init__(self, options: dict[str, Any], finished: list[dict[str, Any]], text: Text, device: torch.device):
        self.options, self.finished, self.text = options, finished, text
        self.machine = facts(Device.of(device.type))
        self.by_method: dict[str, list[dict[str, Any]]] = {}
        for result in finished:
            self.by_method.setdefault(result["method"], []).append(result)

    def write(self, folder: Folder) -> None:
        from examples.language.plots import draw_losses

        folder.write("results.csv", _csv(self._rows()))
        folder.write("curves.csv", _csv(self._curves()))
        folder.write("loss.png", draw_losses(self.by_method))

    def _curves(self) -> list[dict[str, Any]]:
        """Returns a row for each evaluation."""
        run = self.machine | {"bytes": len(self.text.train), "equal": self.options["equal"]}
        points = [(result, point) for result in self.finished for point in result["curve"]]
        return [{**run, "method": result["method"], "seed": result["seed"], **point} for result, point in points]

    def _rows(self) -> list[dict[str, Any]]:
        """Returns a row for each training. Losses are in bits per byte; `flops` are its needed FLOPs in total."""
        settings = {name: value for name, value in self.options.items() if name != "method"}
        settings |= {"text": self.text.sha256[:12], "bytes": len(self.text.train)}
        rows = []
        for result in self.finished:
            row = {"method": result["method"], "seed": result["seed"]}
            row |= {key: result["curve"][-1][key] for key in ("validation_loss", "training_loss")}
            row["training_loss_at_inference"] = result["training_loss_at_inference"]
            row |= {f"validation_loss_without_{count}": loss for count, loss in result["without"].items()}
            row |= {"optimizer_steps": result["steps"], "reuse_steps": result["phases"].get("reuse", 0)}
            row |= {key: result["curve"][-1][key] for key in ("flops", "seconds")}
            rows.append({**row, "weights_sha256": result["weights_sha256"][:16], **settings, **self.machine})
        return rows

    def table(self) -> Any:
        """Returns a rich table of means with 95 % intervals over seeds, and differences to plain in pairs of the same
        seed."""
        from rich.table import Table

        removed = list(self.finished[0]["without"])
        table = Table(
            title=f"Bits per byte of held-out source files, equal {self.options['equal']}",
            caption=f"Mean ± 95 % interval over {self.options['seeds']} seeds; differences to plain in pairs of the "
            "same seed. Without k: without k random paths. FLOPs (needed) and time of the whole training: plain = 1.",
        )
        for heading in ("method", "steps", "loss", "− plain", *(f"without {k}" for k in removed), "FLOPs", "time"):
            table.add_column(heading, justify="left" if heading == "method" else "right")
        plain = self.by_method.get(PLAIN)
        for method, results in self.by_method.items():
            losses = [final_loss(result) for result in results]
            steps = sorted({result["steps"] for result in results})
            cells = ["–".join(map(str, dict.fromkeys((steps[0], steps[-1])))), _shown(losses)]
            if plain is None or method == PLAIN:
                cells.append("")
            else:
                cells.append(_shown([a - final_loss(b) for a, b in zip(losses, plain, strict=True)], "+"))
            cells += [_shown([result["without"][count] for result in results]) for count in removed]
            for key in ("flops", "seconds"):
                cells.append("" if plain is None else f"{_total(results, key) / _total(plain, key):.2f}")
            table.add_row(method, *cells)
        return table


def _shown(values: list[float], sign: str = "") -> str:
    estimate = Estimate.of(values)
    spread = "" if estimate.half_width is None else f" ± {estimate.half_width:.3f}"
    return f"{estimate.mean:{sign}.3f}{spread}"


def _total(results: list[dict[str, Any]], key: str) -> float:
    return sum(result["curve"][-1][key] for result in results)


def _csv(rows: list[dict[str, Any]]) -> bytes:
    rows = [{key: f"{value:.6g}" if isinstance(value, float) else value for key, value in row.items()} for row in rows]
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0])
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()
