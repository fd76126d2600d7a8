"""Where the milliseconds of a training step go: kernels by kind, from a trace of three steps, one JSON line.

    python benchmarks/profile_step.py 8b-4x2048 full

Kinds are told by kernel name: matmul (cuBLAS, nvjet), attention (cuDNN), dequantise (ours), copy, and what XLA fused.
"""

from __future__ import annotations

import collections
import glob
import gzip
import json
import sys
import tempfile

KINDS = (
    ("dequantise", ("dequantize_nf4",)),
    ("attention", ("fmha", "flash", "sdpa", "cudnn")),
    ("matmul", ("gemm", "nvjet", "cutlass", "cublas", "xmma", "splitk", "dot")),
    ("copy", ("memcpy", "memset", "copy", "dynamic-update", "dynamic_update", "transpose")),
)


def kind_of(name: str) -> str:
    lowered = name.lower()
    return next((kind for kind, marks in KINDS if any(mark in lowered for mark in marks)), "fusion")


def main(arguments: list[str]) -> None:
    import jax

    from jaxlora.bench.shapes import Work
    from jaxlora.bench.step import build

    name, policy = arguments
    run = build(Work.parse(name), policy)
    for _ in range(3):
        run()
    steps = 3
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, create_perfetto_trace=True):
            for _ in range(steps):
                run()
        with gzip.open(glob.glob(f"{folder}/**/perfetto_trace.json.gz", recursive=True)[0]) as file:
            events = json.load(file)["traceEvents"]
    metadata = [event for event in events if event.get("ph") == "M"]
    tracks = {(e.get("pid"), e.get("tid")): e["args"]["name"] for e in metadata if e["name"] == "thread_name"}
    processes = {e.get("pid"): e["args"]["name"] for e in metadata if e["name"] == "process_name"}
    kinds, names = collections.Counter(), collections.Counter()
    for event in events:
        track = tracks.get((event.get("pid"), event.get("tid")), "")
        if event.get("ph") != "X" or "GPU" not in processes.get(event.get("pid"), "") or "Stream" not in track:
            continue
        milliseconds = event["dur"] / 1e3 / steps
        kinds[kind_of(event["name"])] += milliseconds
        names[event["name"]] += milliseconds
    line = dict(work=name, policy=policy, ms={k: round(v, 1) for k, v in kinds.most_common()})
    line["kernels"] = {name[:80]: round(v, 1) for name, v in names.most_common(24)}
    print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
