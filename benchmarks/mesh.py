"""A training step on several GPUs of one host, beside the step of one, one JSON line each.

    python -P benchmarks/mesh.py 8b-4x2048 data=2 fsdp=2 tensor=2 [--policy full] [--steps 5]

Random NF4 weights. The work is one device's: data and fsdp take as many rows more as they divide the batch by, tensor
takes the same rows on more devices. tok_s: tokens over the median step, the first two not counted; losses: those of the
first three steps. moved_mib: what the compiled step's collectives return on a device, by kind, loops counted as often
as they turn. temp_gib and args_gib: XLA's reckoning, of a device.
"""

from __future__ import annotations

import argparse
import collections
import json
import math
import re
import statistics
import time
from typing import Any

WIDTHS = dict(f32=4, s32=4, u32=4, bf16=2, f16=2, u8=1, s8=1, pred=1)
COLLECTIVE = re.compile(
    r"\s*(?:ROOT )?%?\S+ = (.*?) "
    r"(all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute|while|conditional|call|async)(-start)?\("
)


def moved(program: str) -> dict[str, float]:
    """MiB of results of each kind of collective in a step, of a compiled program's text."""
    bodies: dict[str, list[str]] = {}
    entry = name = ""
    for line in program.splitlines():
        if head := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{", line):
            name = head[2]
            bodies[name], entry = [], name if head[1] else entry
        elif name:
            bodies[name].append(line)
    total: collections.Counter[str] = collections.Counter()

    def walk(name: str, times: int) -> None:
        for line in bodies.get(name, ()):
            found = COLLECTIVE.match(line)
            if found is None:
                continue
            result, kind, begins = found.groups()
            if kind == "while":
                turns = re.search(r'known_trip_count":\{"n":"(\d+)"', line)
                body = re.search(r"body=%?([\w.\-]+)", line)
                walk(body[1] if body else "", times * (int(turns[1]) if turns else 1))
            elif kind in ("conditional", "call", "async"):
                for called in re.findall(r"(?:to_apply|calls)=%?([\w.\-]+)", line):
                    walk(called, times)
            else:
                arrays = re.findall(rf"\b({'|'.join(WIDTHS)})\[([\d,]*)\]", result)
                if begins and kind != "all-reduce":  # operands, then results
                    arrays = arrays[len(arrays) // 2 :]
                sizes = (WIDTHS[dtype] * math.prod(int(n) for n in shape.split(",") if n) for dtype, shape in arrays)
                total[kind] += times * sum(sizes)

    walk(entry, 1)
    return {kind: round(size / 2**20, 1) for kind, size in total.items()}


def sizes_of(mesh: str) -> dict[str, int]:
    """The sizes that "fsdp=2,tensor=2" says.

    Raises:
      argparse.ArgumentTypeError: it says something else.
    """
    pairs = [part.partition("=") for part in mesh.split(",")]
    if not all(axis in ("data", "fsdp", "tensor") and size.isdecimal() for axis, _, size in pairs):
        raise argparse.ArgumentTypeError(f"{mesh!r} is not such as data=2 or fsdp=2,tensor=2")
    return {axis: int(size) for axis, _, size in pairs}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", help="SHAPE-BATCHxTOKENS")
    parser.add_argument(
        "meshes", nargs="+", type=sizes_of, help="data=N, fsdp=N or tensor=N, or several with a comma between"
    )
    parser.add_argument("--policy", default="full")
    parser.add_argument("--steps", type=int, default=5)
    args = parser.parse_args()

    from jaxlora.offload import allow_memory

    allow_memory()
    import jax
    import jax.numpy as jnp
    import optax
    from flax import nnx

    from jaxlora import lora, sharding
    from jaxlora.bench.device import commit, versions
    from jaxlora.bench.shapes import Work, random_model
    from jaxlora.bench.step import ADAPTERS, GIB, NF4
    from jaxlora.train import TrainState, make_train_step

    work = Work.parse(args.work)
    facts = dict(
        device=jax.devices()[0].device_kind, date=time.strftime("%Y-%m-%d"), versions=versions(), commit=commit()
    )
    model = random_model(work.shape, NF4, jnp.bfloat16)
    lora.add_adapters(model, ADAPTERS, jax.random.key(0))
    jax.block_until_ready(nnx.state(model))
    model.remat_policy = args.policy

    def row_of(sizes: dict[str, int]) -> dict[str, Any]:
        rows = work.batch * sizes.get("data", 1) * sizes.get("fsdp", 1)
        ids = jax.random.randint(jax.random.key(1), (rows, work.sequence), 0, model.config.vocab_size, jnp.int32)
        graphdef, trainable, frozen = lora.partition(model)
        optimizer = optax.adamw(2e-4)
        state, batch, mesh = TrainState.create(trainable, optimizer), {"input_ids": ids, "labels": ids}, None
        if sizes:
            data, fsdp, tensor = (sizes.get(axis, 1) for axis in sharding.MESH_AXES)
            mesh = sharding.make_mesh(data=data, fsdp=fsdp, tensor=tensor)
            state, frozen = sharding.shard(state, mesh), sharding.shard(frozen, mesh)
            batch = jax.device_put(batch, sharding.batch_sharding(mesh))
        step = make_train_step(graphdef, optimizer, mesh=mesh).lower(state, frozen, batch).compile()
        analysis, losses, seconds = step.memory_analysis(), [], []
        for _ in range(args.steps):
            began = time.perf_counter()
            state, metrics = step(state, frozen, batch)
            losses.append(round(float(metrics["loss"]), 4))
            seconds.append(time.perf_counter() - began)
        median = statistics.median(seconds[2:])
        return dict(
            rows=rows,
            losses=losses[:3],
            ms=round(1e3 * median, 1),
            tok_s=round(ids.size / median),
            args_gib=round(analysis.argument_size_in_bytes / GIB, 2),
            temp_gib=round(analysis.temp_size_in_bytes / GIB, 2),
            moved_mib=moved(step.as_text() or ""),
        )

    for sizes in ({}, *args.meshes):
        mesh = ",".join(f"{axis}={size}" for axis, size in sizes.items()) or "one device"
        row = dict(op="mesh", work=args.work, policy=args.policy, mesh=mesh)
        print(json.dumps(row | row_of(sizes) | facts), flush=True)


if __name__ == "__main__":
    main()
