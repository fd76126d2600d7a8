"""One training step of random weights and tokens, timed: bfloat16, AdamW, and if nothing else is asked for QLoRA's, NF4
with double quantisation, r = 16 on the seven linears of every layer.

`python -m jaxlora.bench.step 8b-4x2048 full 8 [dtype [GiB]]` measures 8 steps in this process and prints a JSON line,
with products in a dtype ("fp8", or "") and so much on the host at most. tok_s:
tokens over the median step, the first two not counted. gib: peak_bytes_in_use of the device, null where it does not
say. temp_gib, args_gib, host_temp_gib: XLA's reckoning of the compiled step.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

from jaxlora import remat
from jaxlora.bench.shapes import ALPHA, RANK, Work, random_model
from jaxlora.config import LoraConfig, QuantConfig

GIB = 2.0**30
NF4 = QuantConfig()
ADAPTERS = LoraConfig(r=RANK, lora_alpha=ALPHA)


def mode_of(policy: str) -> str:
    """ "memory" for a checkpointing policy that keeps no more on the device than a layer's input, else "speed"."""
    kept = remat.POLICIES[policy]
    return "memory" if kept.rematerialise and (kept.on_host or not kept.saved) else "speed"


def build(
    work: Work,
    policy: str,
    facts: dict[str, Any] | None = None,
    matmul_dtype: str | None = None,
    host_gib: float | None = None,
    quant_config: QuantConfig | None = NF4,
    lora_config: LoraConfig = ADAPTERS,
    full_determinism: bool = False,
) -> Callable[[], float]:
    """A function that takes one step and returns its loss; `facts` is filled with what building it measured.

    policy: a value of `use_gradient_checkpointing`. matmul_dtype: as in `from_pretrained`. host_gib: as in `bench`.
    quant_config: of the frozen weights, None for bfloat16. full_determinism: as in `make_train_step`.
    """
    import jax
    import jax.numpy as jnp
    import optax
    from flax import nnx

    from jaxlora import lora
    from jaxlora.remat_auto import choose_policy
    from jaxlora.train import TrainState, make_train_step

    start = time.perf_counter()
    model = random_model(work.shape, quant_config, jnp.bfloat16)
    lora.add_adapters(model, lora_config, jax.random.key(0))
    jax.block_until_ready(nnx.state(model))
    loaded = time.perf_counter()
    model.remat_policy = remat.resolve(policy)
    model.host_bytes = None if host_gib is None else int(host_gib * GIB)
    if matmul_dtype is not None:
        lora.multiply_in(model, matmul_dtype)
    vocabulary = model.config.vocab_size

    graphdef, trainable, frozen = lora.partition(model)
    optimizer = optax.adamw(2e-4)
    state = TrainState.create(trainable, optimizer)
    ids = jax.random.randint(jax.random.key(1), (work.batch, work.sequence), 0, vocabulary, jnp.int32)
    data = {"input_ids": ids, "labels": ids}
    compiling = time.perf_counter()
    if model.remat_policy == remat.AUTO:
        step = choose_policy(model, optimizer, state, data, full_determinism=full_determinism).step
    else:
        step = (
            make_train_step(graphdef, optimizer, full_determinism=full_determinism).lower(state, frozen, data).compile()
        )
    compiled = time.perf_counter()
    if facts is not None:
        analysis = step.memory_analysis()
        facts |= dict(
            policy=model.remat_policy,
            load_s=round(loaded - start, 1),
            compile_s=round(compiled - compiling, 1),
            temp_gib=round(analysis.temp_size_in_bytes / GIB, 2),
            args_gib=round(analysis.argument_size_in_bytes / GIB, 2),
            host_temp_gib=round(getattr(analysis, "host_temp_size_in_bytes", 0) / GIB, 2),
        )
    del trainable, model

    def run() -> float:
        nonlocal state
        state, metrics = step(state, frozen, data)
        return float(metrics["loss"])

    return run


def measure(
    work: Work,
    policy: str,
    steps: int,
    matmul_dtype: str | None = None,
    host_gib: float | None = None,
    quant_config: QuantConfig | None = NF4,
    lora_config: LoraConfig = ADAPTERS,
    full_determinism: bool = False,
) -> dict[str, Any]:
    """The row of a policy, as the head of this module says, its arguments those of `build`. The first two of `steps`,
    at least 3, are not timed."""
    import jax

    facts: dict[str, Any] = {}
    run = build(work, policy, facts, matmul_dtype, host_gib, quant_config, lora_config, full_determinism)
    times, losses = [], []
    for _ in range(steps):
        start = time.perf_counter()
        losses.append(run())
        times.append(time.perf_counter() - start)
    seconds = statistics.median(times[2:])
    peak = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    return dict(
        work=work.name,
        mode=mode_of(facts["policy"]),
        policy=facts.pop("policy"),
        **({} if matmul_dtype is None else dict(matmul_dtype=matmul_dtype)),
        **({} if host_gib is None else dict(host_gib=host_gib)),
        **(dict(full_determinism=True) if full_determinism else {}),
        tok_s=round(work.tokens / seconds),
        gib=None if peak is None else round(peak / GIB, 2),
        ms=round(seconds * 1e3, 1),
        **facts,
        loss_first=round(losses[0], 4),
        loss_last=round(losses[-1], 4),
    )


def main(name: str, policy: str, steps: str, matmul_dtype: str = "", host_gib: str = "") -> None:
    from jaxlora.offload import allow_memory

    allow_memory()
    bound = float(host_gib) if host_gib else None
    print(json.dumps(measure(Work.parse(name), policy, int(steps), matmul_dtype or None, bound)), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
