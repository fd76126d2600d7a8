"""Time a QLoRA training step at a real model's shape, with random weights and tokens, one JSON line a measurement.

    python benchmarks/step.py 8b 4x2048 full offload        # shape, batch x sequence, checkpoint policies

Each policy runs in a process of its own, since a device's peak memory is the process's. NF4 with double quantisation,
r = 16 on all seven linears, bfloat16, AdamW. tok_s: batch * sequence over the median step. gib: peak_bytes_in_use.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable


def build(shape: str, batch: int, sequence: int, policy: str, facts: dict | None = None) -> Callable[[], float]:
    """A function that takes one step and returns its loss; `facts` is filled with what building it measured."""
    import jax
    import jax.numpy as jnp
    import optax
    from flax import nnx
    from shapes import random_model

    from jaxlora import lora, remat
    from jaxlora.config import LoraConfig, QuantConfig
    from jaxlora.train import TrainState, make_train_step

    start = time.perf_counter()
    model = random_model(shape, QuantConfig(), jnp.bfloat16)
    lora.add_adapters(model, LoraConfig(r=16, lora_alpha=16), jax.random.key(0))
    jax.block_until_ready(nnx.state(model))
    loaded = time.perf_counter()
    model.remat_policy = remat.resolve(policy)
    config = model.config

    graphdef, trainable, frozen = lora.partition(model)
    optimizer = optax.adamw(2e-4)
    state = TrainState.create(trainable, optimizer)
    del trainable, model
    ids = jax.random.randint(jax.random.key(1), (batch, sequence), 0, config.vocab_size, jnp.int32)
    data = {"input_ids": ids, "labels": ids}
    compiling = time.perf_counter()
    step = make_train_step(graphdef, optimizer).lower(state, frozen, data).compile()
    compiled = time.perf_counter()
    if facts is not None:
        analysis, gib = step.memory_analysis(), 2.0**30
        facts |= dict(
            load_s=round(loaded - start, 1),
            compile_s=round(compiled - compiling, 1),
            temp_gib=round(analysis.temp_size_in_bytes / gib, 2),
            args_gib=round(analysis.argument_size_in_bytes / gib, 2),
            host_temp_gib=round(getattr(analysis, "host_temp_size_in_bytes", 0) / gib, 2),
        )

    def run() -> float:
        nonlocal state
        state, metrics = step(state, frozen, data)
        return float(metrics["loss"])

    return run


def measure(shape: str, batch: int, sequence: int, policy: str, steps: int = 8) -> dict:
    import jax

    facts: dict = {}
    run = build(shape, batch, sequence, policy, facts)
    times, losses = [], []
    for _ in range(steps):
        start = time.perf_counter()
        losses.append(run())
        times.append(time.perf_counter() - start)
    seconds = statistics.median(times[2:])
    device = jax.devices()[0]
    peak = (device.memory_stats() or {}).get("peak_bytes_in_use", 0)
    return dict(
        work=f"{shape}-{batch}x{sequence}",
        policy=policy,
        tok_s=round(batch * sequence / seconds),
        ms=round(seconds * 1e3, 1),
        gib=round(peak / 2.0**30, 2),
        **facts,
        loss_first=round(losses[0], 4),
        loss_last=round(losses[-1], 4),
        device=device.device_kind,
        jax=jax.__version__,
        date=time.strftime("%Y-%m-%d"),
    )


def main(arguments: list[str]) -> None:
    shape, work, *policies = arguments
    batch, sequence = (int(n) for n in work.split("x"))
    if len(policies) == 1:
        print(json.dumps(measure(shape, batch, sequence, policies[0])), flush=True)
        return
    for policy in policies:
        subprocess.run([sys.executable, __file__, shape, work, policy], check=False)


if __name__ == "__main__":
    main(sys.argv[1:])
