"""Rows of measurements -> Markdown tables, and a plot."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from jaxlora.bench import device
from jaxlora.bench.shapes import CONFIGS, Work

PLOT = "speed.svg"
PANELS = 4  # in a line
# What `update` writes stands between these lines.
BEGIN, END = "<!-- made by `jaxlora bench --table-file` -->", "<!-- end of what it made -->"
PEERS = {"unsloth": "Unsloth", "peft": "PEFT + bitsandbytes"}

Row = dict[str, Any]


def read(folder: Path) -> list[Row]:
    """The rows of steps in a folder, the oldest first.

    Raises:
        FileNotFoundError: there are none.
        ValueError: a line that is not JSON.
    """
    rows = []
    for path in sorted(folder.glob("*step.jsonl")):
        for number, line in enumerate(path.read_text().splitlines(), 1):
            try:
                rows.append(json.loads(line))
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: not JSON ({error})") from error
    if not rows:
        raise FileNotFoundError(f"{folder} has no *step.jsonl with rows: `jaxlora bench` makes them")
    return sorted(rows, key=lambda row: row["date"])


def standing(rows: Iterable[Row]) -> list[Row]:
    """Of each device, work, policy, dtype of products and bound of the host the newest row, of those with a peer beside
    them if there are any, the larger shapes and the smaller works first. Rows without a mode, or with a "superseded"
    that says by what, are of forms of the code that are no more."""
    rows = sorted(rows, key=lambda row: any(f"{peer}_tok_s" in row for peer in PEERS))
    newest = {
        (row["device"], row["work"], _policy(row)): row for row in rows if "mode" in row and not row.get("superseded")
    }

    def place(row: Row) -> tuple:
        work = Work.parse(row["work"])
        return row["device"], -list(CONFIGS).index(work.shape), work.tokens, work.sequence, row["tok_s"]

    return sorted(newest.values(), key=place)


def steps(rows: Sequence[Row]) -> list[str]:
    """The lines of a Markdown table of steps, with the columns of those peers that ran beside one."""
    peers = [peer for peer in PEERS if any(f"{peer}_tok_s" in row for row in rows)]
    titles = ["work", "`use_gradient_checkpointing`", "tokens/s", "MFU", "GiB"]
    titles += [f"{PEERS[peer]} in the same run" for peer in peers]
    cells = []
    for row in rows:
        tok_s, gib = row["tok_s"], row.get("gib")
        line = [row["work"], _policy(row), f"{tok_s:,}", _mfu(row), "" if gib is None else f"{gib:.1f}"]
        for peer in peers:
            theirs, their_gib = row.get(f"{peer}_tok_s"), row.get(f"{peer}_gib")
            text = "" if theirs is None else f"{theirs:,}: {tok_s / theirs:.2f}x"
            if gib and their_gib:
                text += f", {their_gib:.1f} GiB: {gib / their_gib:.2f}x"
            line.append(text)
        measured = f"{row['date']}, {row['commit']}" if row.get("commit") else row["date"]
        cells.append([*line, row["device"].removeprefix("NVIDIA "), measured])
    return _markdown([*titles, "on", "measured"], cells)


def _policy(row: Row) -> str:
    """The policy of a row in quotes, with what its products are in where that is not bfloat16, and the bound of what
    may lie on the host where there was one."""
    dtype, host = row.get("matmul_dtype"), row.get("host_gib")
    bound = "" if host is None else f", at most {host:g} GiB on the host"
    return f'"{row["policy"]}"' + (f", {dtype}" if dtype else "") + bound


def _mfu(row: Row) -> str:
    peak = device.peak_tflop_s(row["device"])
    return "" if peak is None else f"{row['tok_s'] * Work.parse(row['work']).flop_per_token() / (peak * 1e12):.0%}"


def kernels(rows: Sequence[Row]) -> list[str]:
    """The lines of a Markdown table of kernels, with what they are measured by in its first lines."""
    cells = []
    for row in rows:
        name = row["op"] + (" with gradients" if row.get("gradients") else "")
        rate = f"{row['gb_s']:,} GB/s" if "gb_s" in row else f"{row['tflop_s']:,} TFLOP/s"
        share = next((f"{row[of]:.0%} of {of[3:]}" for of in ("of_copy", "of_product") if of in row), "")
        size = "x".join(map(str, row.get("shape", [])))
        cells.append([name, row.get("implementation") or "", size, str(row.get("ms", "")), rate, share])
    return _markdown(["kernel", "implementation", "shape", "ms", "rate", "share"], cells)


def _markdown(titles: Sequence[str], cells: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(line)} |" for line in (titles, ["---"] * len(titles), *cells)]


def update(document: Path, folder: Path) -> None:
    """Write the table of a folder's rows into a Markdown file, between the lines `BEGIN` and `END`, and draw the plot.

    Raises:
        FileNotFoundError: there is no such file, or the folder has no rows.
        ValueError: the file has not both lines, or no row stands.
    """
    text = document.read_text()
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(END) < text.index(BEGIN):
        raise ValueError(f"{document}: the table goes between a line {BEGIN!r} and a line {END!r}, and it has not both")
    rows = standing(read(folder))
    if not rows:
        raise ValueError(f"{folder}: no row has a mode and is not superseded")
    plot(rows, folder / PLOT)
    image = f"![Tokens a second over peak memory]({os.path.relpath(folder / PLOT, document.parent)})"
    before, after = text[: text.index(BEGIN) + len(BEGIN)], text[text.index(END) :]
    document.write_text("\n".join([before, "", *steps(rows), "", image, "", after]))


def plot(rows: Sequence[Row], path: Path) -> None:
    """Draw tokens a second over peak memory as SVG, a panel for each work, ours and the peers'. The same rows give the
    same file."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    drawn = [row for row in rows if row.get("gib") is not None]
    panels = list(dict.fromkeys((row["work"], row["device"]) for row in drawn))
    if not panels:
        raise ValueError("no row says its peak memory, so there is nothing to draw")
    height, width = -(-len(panels) // PANELS), min(len(panels), PANELS)
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "jaxlora"}):
        figure = Figure(figsize=(4.2 * width, 3.4 * height), layout="constrained")
        FigureCanvasSVG(figure)
        places = figure.subplots(height, width, squeeze=False).flat
        for axes in places[len(panels) :]:
            axes.remove()
        for axes, (work, kind) in zip(places, panels, strict=False):
            points: dict[str, tuple[float, float]] = {}
            for row in (row for row in drawn if (row["work"], row["device"]) == (work, kind)):
                points[_policy(row)] = row["gib"], row["tok_s"]
                for peer, name in PEERS.items():
                    if row.get(f"{peer}_gib") is not None:
                        points[name] = row[f"{peer}_gib"], row[f"{peer}_tok_s"]
            for name, point in points.items():
                axes.plot(*point, "s" if name in PEERS.values() else "o", label=name)
            axes.set(title=f"{work}, {kind.removeprefix('NVIDIA ')}", xlabel="peak GiB", ylabel="tokens/s")
            axes.title.set_fontsize(9)
            axes.set_xlim(0, 1.1 * max(gib for gib, _ in points.values()))
            axes.set_ylim(0, 1.1 * max(tok_s for _, tok_s in points.values()))
            axes.grid(alpha=0.3)
            axes.legend(loc="lower right", fontsize=8)
        figure.savefig(path, metadata={"Date": None})
