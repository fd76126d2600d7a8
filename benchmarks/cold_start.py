"""From the start of a process to the end of its first training step, from an NF4 checkpoint on disk, by part.

    python benchmarks/cold_start.py [8b-4x2048] [--policy offload] [--folder /tmp/jaxlora-cold-start] [--keep]

Makes the checkpoint (5.6 GB of random weights for 8b, not timed) and runs three processes, each of which prints a JSON
line: with an empty cache of compiled programs, with the full one, and with the full one and the checkpoint in the page
cache. `total_s` is from the start of the process. `programs` is how many XLA was asked for in each part, and `compiled`
how many of them were not in the cache.
"""

from __future__ import annotations

import time

BEGIN = time.time()

import argparse  # noqa: E402
import contextlib  # noqa: E402
import json  # noqa: E402
import shutil  # noqa: E402
import subprocess  # noqa: E402
import sys  # noqa: E402
import tempfile  # noqa: E402
from pathlib import Path  # noqa: E402


def first_step(folder: Path, name: str, policy: str, cache: str, state: str, started: float) -> None:
    """Everything up to the first step in this process, whose parent started it at `started`."""
    parts = {"python_s": round(BEGIN - started, 2)}
    programs, compiled, counts = {}, {}, {}

    @contextlib.contextmanager
    def part(title):
        start, before = time.perf_counter(), dict(counts)
        yield
        parts[f"{title}_s"] = round(time.perf_counter() - start, 2)
        new = {event: number - before.get(event, 0) for event, number in counts.items()}
        if asked := new.get("/jax/compilation_cache/compile_requests_use_cache"):
            programs[title] = asked
            compiled[title] = asked - new.get("/jax/compilation_cache/cache_hits", 0)

    with part("imports"):
        import jax
        import jax.numpy as jnp
        import optax
        from flax import nnx

        from jaxlora import FastLanguageModel, TrainState, make_train_step, partition
        from jaxlora.bench.device import commit, versions
        from jaxlora.bench.shapes import ALPHA, RANK, Work
        from jaxlora.compilation_cache import keep_compiled
    jax.monitoring.register_event_listener(lambda event, **_: counts.update({event: counts.get(event, 0) + 1}))
    keep_compiled(cache)
    work = Work.parse(name)
    with part("device"):
        device = jax.devices()[0]
    with part("load"):
        model, _ = FastLanguageModel.from_pretrained(folder, max_seq_length=work.sequence)
        jax.block_until_ready(nnx.state(model))
    with part("adapters"):
        options = dict(r=RANK, lora_alpha=ALPHA, use_gradient_checkpointing=policy)
        model = FastLanguageModel.get_peft_model(model, **options)
        jax.block_until_ready(nnx.state(model))
    with part("state"):
        graphdef, trainable, frozen = partition(model)
        optimizer = optax.adamw(2e-4)
        train_state = TrainState.create(trainable, optimizer)
        ids = jax.random.randint(jax.random.key(1), (work.batch, work.sequence), 0, model.config.vocab_size, jnp.int32)
        batch = jax.block_until_ready({"input_ids": ids, "labels": ids})
    with part("trace"):
        lowered = make_train_step(graphdef, optimizer).lower(train_state, frozen, batch)
    with part("compile"):
        step = lowered.compile()
    with part("step"):
        train_state, metrics = step(train_state, frozen, batch)
        loss = float(metrics["loss"])
    total = round(time.time() - started, 2)
    row = dict(op="cold_start", work=name, policy=policy, state=state, total_s=total, **parts, loss=round(loss, 4))
    row |= dict(programs=programs, compiled=compiled, device=device.device_kind, versions=versions(), commit=commit())
    print(json.dumps(row | dict(date=time.strftime("%Y-%m-%d"))), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", nargs="?", default="8b-4x2048")
    parser.add_argument("--policy", default="offload")
    parser.add_argument("--folder", type=Path, default=Path("/tmp/jaxlora-cold-start"))
    parser.add_argument("--keep", action="store_true", help="leave the checkpoint where it is")
    parser.add_argument("--only", nargs=3, metavar=("CACHE", "STATE", "STARTED"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    folder = args.folder / args.work.partition("-")[0]
    if args.only:
        cache, state, started = args.only
        first_step(folder, args.work, args.policy, cache, state, float(started))
        return
    if not (folder / "config.json").exists():
        module = [sys.executable, "-P", "-m", "jaxlora.bench.checkpoints"]
        subprocess.run([*module, str(folder), folder.name, "nf4"], check=True)
    from jaxlora.bench.checkpoints import evict

    with tempfile.TemporaryDirectory() as cache:
        for state in ("cold", "warm programs", "warm programs and files"):
            if state != "warm programs and files":
                evict(folder)
            again = [sys.executable, "-P", __file__, *sys.argv[1:], "--only", cache, state]
            subprocess.run([*again, str(time.time())], check=True)
    if not args.keep:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
