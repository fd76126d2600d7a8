"""Time a QLoRA training step at a real model's shape, with random weights and tokens, one JSON line a measurement.

    python benchmarks/step.py 8b 4x2048 full offload        # shape, batch x sequence, checkpoint policies

Each policy runs in a process of its own, since a device's peak memory is the process's. NF4 with double quantisation, r = 16 on
all seven linears, bfloat16, AdamW. tok_s: batch * sequence over the median step. gib: the device's peak_bytes_in_use.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time


def measure(shape: str, batch: int, sequence: int, policy: str, steps: int = 8) -> dict:
    import jax
    import jax.numpy as jnp
    import optax
    from shapes import CONFIGS, RandomSource

    import jaxlora
    from jaxlora import lora, remat
    from jaxlora.config import LoraConfig, QuantConfig
    from jaxlora.converters.huggingface import load_model, model_config, parameter_shapes
    from jaxlora.model import CausalLM

    config = model_config(CONFIGS[shape])
    build = dict(dtype=jnp.bfloat16, quant_config=QuantConfig(), config=config)
    from flax import nnx

    abstract = nnx.eval_shape(lambda: CausalLM(config, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)))
    source = RandomSource({name: shape for p, shape in parameter_shapes(abstract) for name in p.names()})
    start = time.perf_counter()
    model = load_model(source, CONFIGS[shape], **build)
    lora.add_adapters(model, LoraConfig(r=16, lora_alpha=16), jax.random.key(0))
    jax.block_until_ready(nnx.state(model))
    load_s = time.perf_counter() - start
    model.remat_policy = remat.resolve(policy)

    graphdef, trainable, frozen = jaxlora.partition(model)
    optimizer = optax.adamw(2e-4)
    step = jaxlora.make_train_step(graphdef, optimizer)
    state = jaxlora.TrainState.create(trainable, optimizer)
    del trainable, model
    ids = jax.random.randint(jax.random.key(1), (batch, sequence), 0, config.vocab_size, jnp.int32)
    data = {"input_ids": ids, "labels": ids}
    start = time.perf_counter()
    compiled = step.lower(state, frozen, data).compile()
    compile_s = time.perf_counter() - start
    analysis = compiled.memory_analysis()
    times, losses = [], []
    for _ in range(steps):
        start = time.perf_counter()
        state, metrics = compiled(state, frozen, data)
        losses.append(float(metrics["loss"]))
        times.append(time.perf_counter() - start)
    seconds = statistics.median(times[2:])
    device = jax.devices()[0]
    stats = device.memory_stats() or {}
    gib = 2.0**30
    return dict(
        work=f"{shape}-{batch}x{sequence}", policy=policy, tok_s=round(batch * sequence / seconds),
        ms=round(seconds * 1e3, 1), gib=round(stats.get("peak_bytes_in_use", 0) / gib, 2),
        temp_gib=round(analysis.temp_size_in_bytes / gib, 2), args_gib=round(analysis.argument_size_in_bytes / gib, 2),
        host_temp_gib=round(getattr(analysis, "host_temp_size_in_bytes", 0) / gib, 2), load_s=round(load_s, 1),
        compile_s=round(compile_s, 1), loss_first=round(losses[0], 4), loss_last=round(losses[-1], 4),
        device=device.device_kind, jax=jax.__version__, date=time.strftime("%Y-%m-%d"),
    )  # fmt: skip


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
