"""Whole steps of very long rows, one JSON line a step; the last saves the adapter, from which another run goes on.

    python -P benchmarks/long_context.py 8b-1x131072 [--policy offload_residual] [--steps 4] [--host-gib 80]
                                                     [--adapter FOLDER]

Random NF4 weights, which the same seed draws again, and one row of text with something to learn: 64 random tokens over
and over, so that the loss falls as soon as the model looks back. With `--adapter` the adapter is loaded from the folder
if it holds one (`"resumed": true`) and saved there after the last step, as PEFT files. `seconds` is the time of a
step; compiling is beside it, and the first step of a process waits while the host's memory is pinned, 0.5 s a GiB. What
`--host-gib` leaves no room for on the host stays on the device, which costs no transfers. GiB are the device's peak,
and XLA's reckoning of what is pinned on the host.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", help="SHAPE-1xTOKENS")
    parser.add_argument("--policy", default="offload")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--host-gib", type=float, help="the most to offload; all that may be pinned if not given")
    parser.add_argument("--adapter", type=Path)
    args = parser.parse_args()

    from jaxlora.offload import allow_memory

    allow_memory()
    import jax
    import jax.numpy as jnp
    import optax

    from jaxlora import lora, remat
    from jaxlora.bench.device import commit, versions
    from jaxlora.bench.shapes import ALPHA, RANK, Work, random_model
    from jaxlora.config import LoraConfig, QuantConfig
    from jaxlora.converters.peft import load_adapter, save_adapter
    from jaxlora.train import TrainState, make_train_step

    work = Work.parse(args.work)
    model = random_model(work.shape, QuantConfig(), jnp.bfloat16)
    config = LoraConfig(r=RANK, lora_alpha=ALPHA)
    is_resumed = args.adapter is not None and (args.adapter / "adapter_config.json").exists()
    if is_resumed:
        config = load_adapter(model, args.adapter)
    else:
        lora.add_adapters(model, config, jax.random.key(0))
    model.remat_policy = remat.resolve(args.policy)
    model.host_bytes = None if args.host_gib is None else int(args.host_gib * 2**30)

    graphdef, trainable, frozen = lora.partition(model)
    optimizer = optax.adamw(1e-3)
    state = TrainState.create(trainable, optimizer)
    period = jax.random.randint(jax.random.key(1), (64,), 0, model.config.vocab_size, jnp.int32)
    ids = jnp.resize(period, (work.batch, work.sequence))
    batch = {"input_ids": ids, "labels": ids}
    start = time.perf_counter()
    step = make_train_step(graphdef, optimizer).lower(state, frozen, batch).compile()
    compile_s, analysis = time.perf_counter() - start, step.memory_analysis()
    device = jax.devices()[0]
    facts = dict(op="long_context", work=work.name, policy=args.policy, resumed=is_resumed)
    about = dict(device=device.device_kind, versions=versions(), commit=commit(), date=time.strftime("%Y-%m-%d"))
    for number in range(args.steps):
        start = time.perf_counter()
        state, metrics = step(state, frozen, batch)
        loss = float(metrics["loss"])
        seconds = time.perf_counter() - start
        peak = (device.memory_stats() or {}).get("peak_bytes_in_use")
        row = dict(step=number + 1, loss=round(loss, 4), seconds=round(seconds, 2), tok_s=round(work.tokens / seconds))
        row |= dict(
            gib=peak and round(peak / 2**30, 2), host_temp_gib=round(analysis.host_temp_size_in_bytes / 2**30, 2)
        )
        print(json.dumps(facts | row | dict(compile_s=round(compile_s, 1)) | about), flush=True)
    if args.adapter is not None:
        from flax import nnx

        save_adapter(nnx.merge(graphdef, state.trainable, frozen), args.adapter, config=config, base=work.shape)


if __name__ == "__main__":
    main()
