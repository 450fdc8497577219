"""The files of a report, made only from the finished trainings: plots, tables, and one self-contained HTML page."""

from __future__ import annotations

import base64
import csv
import html
import io
import json
from dataclasses import asdict
from typing import Any

import torch

from benchmarks.machine import Device, facts
from examples.digits.analysis import REMOVALS
from examples.digits.data import BATCH_SIZE
from examples.digits.plots import draw_all
from examples.digits.results import findings, milliseconds, seed_milliseconds, summarize
from examples.digits.storage import Folder
from examples.digits.training import WEIGHT_DECAY, Config
from examples.intervals import Estimate
from examples.methods import METHODS, PLAIN

CAPTIONS = {
    "accuracy.png": "Accuracy over the training.",
    "loss.png": "Training loss. Drop iterations and drop-path lack branches, which raises the loss.",
    "cost.png": "A step's cost: FLOPs needed, FLOPs counted by torch's FlopCounterMode, time on this machine.",
    "removed.png": f"Accuracy of the trained network without some branches, averaged over up to {REMOVALS} choices.",
    "similarity.png": "Linear CKA of the residual between all depths, on the test images.",
}


class Report:
    """The report of `config` and the results of every seed."""

    def __init__(self, config: Config, finished: list[dict[str, Any]], steps: int, device: torch.device):
        self.config, self.machine = config, facts(Device.of(device.type))
        self.summaries, self.times = summarize(finished), milliseconds(finished)
        self.seed_times = seed_milliseconds(finished)
        self.test_set = "validation set" if config.validate else "test set"
        self.paths = len(self.summaries[PLAIN].similarity) - 1
        self.findings = findings(self.summaries, self.times, self.paths)
        self.settings = (
            asdict(config)
            | {
                "network": str(config.network),
                "paths": self.paths,
                "optimizer steps": steps,
                "batch size": BATCH_SIZE,
                "optimizer": f"AdamW, weight decay {WEIGHT_DECAY:g}",
                "learning rate": f"{config.network.learning_rate:g}, to 0 along a cosine",
            }
            | {key: self.machine[key] for key in ("device", "threads", "torch", "python")}
        )

    def write(self, folder: Folder) -> None:
        """Returns the files. `results.json` and the plots but `cost.png` depend only on the seeds. Other files have
        times."""
        images = draw_all(self.summaries, self.times, self.test_set)
        methods = {method: asdict(summary) for method, summary in self.summaries.items()}
        folder.write("results.json", _json({"settings": self.settings, "methods": methods}))
        folder.write("results.csv", self._csv().encode())
        for name, image in images.items():
            folder.write(name, image)
        folder.write("report.html", self._html(images).encode())

    def rows(self) -> list[dict[str, str]]:
        """Returns the cells of the table."""
        plain, rows = self.summaries[PLAIN], []
        for method, summary in self.summaries.items():
            row = {"method": method, "accuracy, %": summary.accuracy.percent()}
            for count, values in summary.removed.items():
                row[f"{count} removed"] = Estimate.of(values).percent()
            worst = [losses["reuse"] for losses in summary.worst_losses if "reuse" in losses]
            row |= {
                "worst reuse loss": f"{max(worst):.2f}" if worst else "–",
                "time": f"{self.times[method] / self.times[PLAIN]:.2f}",
                "FLOPs": f"{summary.needed_flops / plain.needed_flops:.2f}",
            }
            rows.append(row)
        return rows

    def _csv(self) -> str:
        """Returns a row for each method and seed with unrounded numbers, for `benchmarks/results/`."""
        rows = []
        for method, summary in self.summaries.items():
            for seed in range(self.config.seeds):
                time, plain_time = (self.seed_times[name][seed] for name in (method, PLAIN))
                flops, plain_flops = (self.summaries[name].seed_needed_flops[seed] for name in (method, PLAIN))
                row: dict[str, Any] = {**self.machine, **asdict(self.config)}
                row |= {"steps": self.settings["optimizer steps"], "paths": self.paths, "method": method, "seed": seed}
                row |= {"accuracy": summary.accuracies[seed]}
                row |= {f"accuracy_without_{count}": values[seed] for count, values in summary.removed.items()}
                row |= {"train_loss": summary.curves[seed][-1]["loss"]}
                row |= {"worst_reuse_loss": summary.worst_losses[seed].get("reuse")}
                row |= {"ms_per_step": time, "time_ratio": time / plain_time}
                row |= {"needed_flops": flops, "needed_ratio": flops / plain_flops}
                rows.append({key: f"{value:.6g}" if isinstance(value, float) else value for key, value in row.items()})
        text = io.StringIO()
        writer = csv.DictWriter(text, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        return text.getvalue()

    def _html(self, images: dict[str, bytes]) -> str:
        intervals = f"mean ± 95 % interval over {self.config.seeds} seeds" if self.config.seeds > 1 else "one seed"
        figures = (
            f'<figure><img alt="{html.escape(CAPTIONS[name])}" '
            f'src="data:image/png;base64,{base64.b64encode(image).decode()}">'
            f"<figcaption>{html.escape(CAPTIONS[name])}</figcaption></figure>"
            for name, image in images.items()
        )
        counted = [
            {
                "method": method,
                "iterations": ", ".join(f"{n} {phase}" for phase, n in summary.iterations[0].items()),
                "ms per step": f"{self.times[method]:.2f}",
                "MFLOPs needed per step": f"{summary.needed_flops / 1e6:.1f}",
                "counted in the first steps": f"{summary.counted_flops / 1e6:.1f}",
                "needed by those": f"{summary.needed_flops_counted_steps / 1e6:.1f}",
            }
            for method, summary in self.summaries.items()
        ]
        return PAGE.format(
            title=f"Handwritten digits: {self.config.network.kind.__name__}, {self.config.mode} mode",
            lead=html.escape(f"{intervals}, {self.settings['optimizer steps']} optimizer steps each, {self.test_set}"),
            findings="".join(f"<li>{html.escape(sentence)}</li>" for sentence in self.findings),
            table=_table(self.rows()),
            figures="".join(figures),
            counted=_table(counted),
            methods=_table([{"method": method, "what it does": what} for method, what in METHODS.items()]),
            settings=_table([{"setting": k, "value": str(v)} for k, v in (self.settings | self.machine).items()]),
        )


def _json(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, indent=1) + "\n").encode()


def _table(rows: list[dict[str, str]]) -> str:
    head = "".join(f"<th>{html.escape(key)}</th>" for key in rows[0])
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(value)}</td>" for value in row.values()) + "</tr>" for row in rows
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #222; }}
table {{ border-collapse: collapse; margin: 1rem 0; display: block; overflow-x: auto; }}
th, td {{ border-bottom: 1px solid #ccc; padding: .3rem .8rem; text-align: left; }}
figure {{ margin: 2rem 0; }} img {{ max-width: 100%; height: auto; }} figcaption {{ color: #555; }}
</style></head><body>
<h1>{title}</h1>
<p>{lead}</p>
<h2>Findings</h2><ul>{findings}</ul>
<h2>Results</h2>{table}
<p>Time and FLOPs per optimizer step are ratios to plain; "removed": accuracy without that many random branches.</p>
{figures}
<h2>Cost per step</h2>{counted}
<h2>Methods</h2>{methods}
<h2>Configuration</h2>{settings}
</body></html>
"""
