"""`jaxlora bench`: what a training step takes on this machine, beside Unsloth and PEFT where they are installed."""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxlora import remat
from jaxlora.bench import device, table
from jaxlora.bench.shapes import ALPHA, CONFIGS, RANK, SMALL, Work

_PEERS = Path(__file__).with_name("peers.py")


def bench(
    work: Sequence[str] = ("8b-4x2048",),
    policies: Sequence[str] = ("offload", "full", "projections"),
    steps: int = 8,
    kernels: bool = True,
    matmul_dtype: str | None = None,
    host_gib: float | None = None,
    peers: Sequence[str] = tuple(table.PEERS),
    peer_python: str | None = None,
    output: str = "benchmarks/results",
    commit: str | None = None,
    table_file: str | None = None,
) -> None:
    """Measure QLoRA steps of random weights, and kernels; print tables, and append the rows to files as JSON lines.

    A row has work, mode ("memory" or "speed"), policy, tok_s, gib (the device's peak), mfu (see `bench.shapes`), ms,
    what XLA reckons with, device, date, versions and commit; and unsloth_tok_s, unsloth_gib, peft_tok_s and peft_gib
    where these ran in the same call.

    Args:
        work: steps to measure, SHAPE-BATCHxTOKENS: a shape is "8b", "1b", "7b" (of Qwen2.5), "70b", "135m" or "tiny",
            which needs no GPU.
        policies: values of use_gradient_checkpointing, each measured in a process of its own.
        steps: steps of a measurement, of which the first two are not timed.
        kernels: measure the kernels at the shapes of the work too.
        matmul_dtype: products of our steps, as in from_pretrained: "fp8", by default in bfloat16.
        host_gib: what may lie on the host of what is offloaded; the rest stays on the device, which costs no transfers.
            By default all that may be pinned.
        peers: in what to train the same: "unsloth", and "peft" with bitsandbytes, where they are installed; or "none".
        peer_python: the Python of the environment that they are installed in, by default this one.
        output: folder of the files of rows.
        commit: the commit that is measured, by default that of the checkout.
        table_file: measure nothing, but write the table of the rows in `output` into this Markdown file, between its
            two marks, and draw them in speed.svg beside the rows.

    Raises:
        ValueError: a work, a policy, a dtype, a peer or a number of steps that cannot be, or a shape that needs a GPU
            where there is none.
        RuntimeError: nothing could be measured; says why the last could not.
    """
    folder = Path(output)
    if table_file is not None:
        table.update(Path(table_file), folder)
        print(f"{table_file} and {folder / table.PLOT} have the rows of {folder}")
        return
    works = [Work.parse(name) for name in work]
    for policy in policies:
        remat.resolve(policy)
    chosen = [] if list(peers) == ["none"] else list(peers)
    if unknown := set(chosen) - set(table.PEERS):
        raise ValueError(f"peers {sorted(unknown)}: there are {', '.join(table.PEERS)}, or none")
    if matmul_dtype not in (None, "fp8"):
        raise ValueError(f"matmul_dtype is {matmul_dtype!r}: it can be 'fp8', or None for products in bfloat16")
    if host_gib is not None and host_gib < 0:
        raise ValueError(f"host_gib must be 0 or more, found {host_gib}")
    if steps < 3:
        raise ValueError(f"steps must be at least 3, since the first two are not timed; found {steps}")
    here = _in_a_process("-m", "jaxlora.bench.device")[-1]
    if here["platform"] != "gpu" and (large := [w.name for w in works if w.shape not in SMALL]):
        raise ValueError(
            f"{', '.join(large)} need an NVIDIA GPU, and JAX finds only {here['device']!r} here. With a GPU, install "
            "'jaxlora[cuda12]' or 'jaxlora[cuda13]'; without one, --work tiny-2x64 shows that all runs"
        )
    folder.mkdir(parents=True, exist_ok=True)
    facts = dict(device=here["device"], date=time.strftime("%Y-%m-%d"), versions=device.versions())
    facts["commit"] = commit or device.commit()
    stem = f"{facts['date']}-{device.short_name(here['device'])}"

    rows, failures = [], []
    with tempfile.TemporaryDirectory(prefix="jaxlora-bench-") as scratch:
        beside: dict[str, dict[str, Any]] = {one.name: {} for one in works}
        for shape in dict.fromkeys(one.shape for one in works) if chosen else ():
            same = [one for one in works if one.shape == shape]
            with _said(f"peers of {shape}", failures):
                for name, found in _measure_peers(chosen, same, steps, here, peer_python, Path(scratch)):
                    beside[name] |= found | dict(versions=beside[name].get("versions", {}) | found["versions"])
        for one in works:
            for policy in policies:
                with _said(f"{one.name} {policy}", failures):
                    bound = "" if host_gib is None else str(host_gib)
                    arguments = one.name, policy, str(steps), matmul_dtype or "", bound
                    row = _in_a_process("-m", "jaxlora.bench.step", *arguments)[-1]
                    row = _with_mfu(row, one, here["device"]) | beside[one.name] | facts
                    row["versions"] = {**row["versions"], **beside[one.name].get("versions", {})}
                    rows.append(row)
                    _append(folder / f"{stem}-step.jsonl", row)
    lines = []
    for shape in dict.fromkeys(w.shape for w in works) if kernels else ():
        with _said(f"kernels of {shape}", failures):
            for line in _in_a_process("-m", "jaxlora.bench.kernels", shape):
                lines.append(dict(model=shape) | line | facts)
                _append(folder / f"{stem}-kernels.jsonl", lines[-1])
    if not rows:
        raise RuntimeError(f"nothing was measured. {failures[-1]}")
    print("\n".join([*table.steps(rows), "", *(table.kernels(lines) if lines else []), ""]))
    if rows[0]["mfu"] is None:
        print(f"no MFU: no peak is known of {here['device']!r}")
    if rows[0]["gib"] is None:
        print(f"no GiB: {here['device']!r} does not say its peak memory")
    print(f"the rows are in {folder}, {stem}-*.jsonl")


def _measure_peers(
    chosen: Sequence[str],
    works: Sequence[Work],
    steps: int,
    here: Mapping[str, str],
    python: str | None,
    scratch: Path,
) -> Iterator[tuple[str, dict[str, Any]]]:
    """What the peers that are installed make of works of one shape: a name, {"unsloth_tok_s": ..., "versions": ...}."""
    python = python or sys.executable
    missing = _in_a_process(str(_PEERS), "installed", python=python, cwd=scratch)[-1]
    shape = works[0].shape
    checkpoint = scratch / shape
    for peer in chosen:
        if missing[peer]:
            print(f"{peer} does not run beside: {python} has no {', '.join(missing[peer])}", file=sys.stderr)
            continue
        if not checkpoint.exists():
            _in_a_process("-m", "jaxlora.bench.checkpoints", str(checkpoint), shape, "nf4", cwd=scratch)
        job = dict(
            peer=peer, folder=str(checkpoint), sizes=[(one.batch, one.sequence) for one in works], steps=steps,
            rank=RANK, alpha=ALPHA, vocabulary=CONFIGS[shape]["vocab_size"], gpu=here["platform"] == "gpu",
        )  # fmt: skip
        rows: list[dict[str, Any]] = []
        with _said(f"{shape} in {peer}", []):
            rows = _in_a_process(str(_PEERS), json.dumps(job), python=python, cwd=scratch)
        for one, row in zip(works, rows, strict=False):  # there are none after a failure
            if "error" in row:
                print(f"{one.name} in {peer} failed: {row['error']}", file=sys.stderr, flush=True)
                continue
            found = {f"{peer}_tok_s": row["tok_s"], f"{peer}_gib": row["gib"]}
            yield one.name, found | dict(versions=row["versions"])


def _with_mfu(row: dict[str, Any], work: Work, kind: str) -> dict[str, Any]:
    """The row with "mfu" after "gib": the share of the device's peak, None where that is not known."""
    peak = device.peak_tflop_s(kind)
    mfu = None if peak is None else round(row["tok_s"] * work.flop_per_token() / (peak * 1e12), 3)
    first = {name: row[name] for name in ("work", "mode", "policy", "tok_s", "gib")}
    return first | dict(mfu=mfu) | {name: value for name, value in row.items() if name not in first}


class MeasurementFailed(RuntimeError):
    """A process that measures ended with an error."""


def _in_a_process(*arguments: str, python: str = sys.executable, cwd: Path | None = None) -> list[dict[str, Any]]:
    """The JSON lines that a Python process prints. -P: a script's folder, or the current one, shadows no package."""
    run = subprocess.run([python, "-P", *arguments], capture_output=True, text=True, check=False, cwd=cwd)
    if run.returncode:
        errors = re.findall(r"^[\w.]*(?:Error|Exception|Exit|Interrupt)\b.*", run.stderr, re.MULTILINE)
        last = run.stderr.strip().splitlines()[-1:] or [f"exit code {run.returncode}"]
        raise MeasurementFailed((errors or last)[-1])
    return [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]


@contextlib.contextmanager
def _said(what: str, failures: list[str]) -> Iterator[None]:
    """Say on stderr what is measured and how long it took, or why it could not be, which ends nothing else."""
    start = time.perf_counter()
    try:
        yield
    except MeasurementFailed as error:
        failures.append(f"{what}: {error}")
        print(f"{what} failed: {error}", file=sys.stderr, flush=True)
    else:
        print(f"{what}: measured in {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)


def _append(path: Path, row: Mapping[str, Any]) -> None:
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")
