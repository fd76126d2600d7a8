"""What a run says while it trains: metrics.jsonl, a progress bar, and loss.png at the end."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

METRICS_FILE, PLOT_FILE = "metrics.jsonl", "loss.png"


class MetricsFile:
    """`metrics.jsonl`: one JSON object a line, in the order of the steps, each there to read when `write` returns.

    Opening it for a run that goes on after `resumed_step` keeps the rows up to that step and drops later ones, which
    the run will write again, and a line that a kill cut short.
    """

    def __init__(self, path: Path, resumed_step: int = 0):
        self.path = path
        kept = [row for row in read_metrics(path) if row["step"] <= resumed_step] if resumed_step else []
        draft = path.with_name(path.name + ".new")  # a kill here leaves the old file
        draft.write_text("".join(json.dumps(row) + "\n" for row in kept))
        os.replace(draft, path)

    def write(self, row: Mapping[str, Any]) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a metrics file, [] if there is none. A last line that is cut short is left out."""
    path = Path(path)
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


class Throughput:
    """Tokens a second from one reading to the next, not counting the time inside `paused()`."""

    def __init__(self):
        self.restart()

    def restart(self) -> None:
        self._tokens, self._start = 0, time.perf_counter()

    def add(self, tokens: int) -> None:
        self._tokens += tokens

    def read(self) -> float | None:
        """Tokens a second since the last reading, None if there were no tokens."""
        seconds = time.perf_counter() - self._start
        rate = self._tokens / seconds if self._tokens else None
        self.restart()
        return rate

    @contextmanager
    def paused(self) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        self._start += time.perf_counter() - begin


def plot_loss(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw "loss" and "eval_loss" over "step". Opens no window and leaves the caller's matplotlib alone."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # half a second to import
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(xlabel="step", ylabel="loss (nats per token)")
    for name, style in (("loss", "-"), ("eval_loss", "o--")):
        points = [(row["step"], row[name]) for row in rows if name in row]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=name, markersize=4)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
