"""Does a model learn in float8 what it learns in 16 bits? One curve beside the other, on the same real text.

    python benchmarks/fp8_curve.py MODEL [--steps 500] [--rows 8] [--tokens 1024] [--rank 16]

MODEL is a folder, a .gguf file or an id, such as SmolLM2-135M. It is loaded in NF4 and bfloat16 twice from the same
seed and trained on the same batches, once with `matmul_dtype="fp8"`. The text is the source of Python's standard
library, which every machine has, file after file in the order of their names, each one document of packed rows; the
last 16 rows are held out. One JSON line every 10 steps, with both losses, and a last one with both losses on what was
held out.
"""

import argparse
import json
import sysconfig
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from jaxlora import FastLanguageModel
from jaxlora.lora import partition
from jaxlora.loss import causal_lm_loss
from jaxlora.train import TrainState, make_train_step

HELD_OUT = 16


def packed_rows(tokenizer, count: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids and segment ids [count, length]: documents one after the other, cut where a row ends."""
    ids, segments = [], []
    for number, path in enumerate(sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py")), 1):
        if len(ids) >= count * length:
            break
        if "test" in path.parts or "site-packages" in path.parts:
            continue
        document = tokenizer(path.read_text(errors="ignore"))["input_ids"] + [tokenizer.eos_token_id]
        ids += document
        segments += [number] * len(document)
    if len(ids) < count * length:
        raise SystemExit(f"the standard library has {len(ids)} tokens, and {count * length} are asked for")
    return tuple(np.asarray(x[: count * length], np.int32).reshape(count, length) for x in (ids, segments))


def batch_of(ids: np.ndarray, segments: np.ndarray) -> dict:
    first = np.concatenate([np.full((len(ids), 1), -1), segments[:, :-1]], axis=1) != segments
    labels = np.where(first, -100, ids)  # nothing before a document's first token tells of it
    return {"input_ids": jnp.asarray(ids), "labels": jnp.asarray(labels), "segment_ids": jnp.asarray(segments)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    for name, value in (("steps", 500), ("rows", 8), ("tokens", 1024), ("rank", 16)):
        parser.add_argument(f"--{name}", type=int, default=value)
    args = parser.parse_args()
    runs = {}
    for dtype in (None, "fp8"):
        model, tokenizer = FastLanguageModel.from_pretrained(
            args.model, args.tokens, "bfloat16", load_in_4bit=True, matmul_dtype=dtype
        )
        FastLanguageModel.get_peft_model(model, r=args.rank, lora_alpha=args.rank, use_gradient_checkpointing="full")
        graphdef, trainable, frozen = partition(model)
        optimizer = optax.adamw(optax.cosine_decay_schedule(2e-4, args.steps))
        step, state = make_train_step(graphdef, optimizer), TrainState.create(trainable, optimizer)
        runs[dtype] = [graphdef, step, state, frozen]
    ids, segments = packed_rows(tokenizer, args.steps * args.rows + HELD_OUT, args.tokens)
    print(json.dumps(dict(device=jax.devices()[0].device_kind, jax=jax.__version__, **vars(args))), flush=True)
    sums, begin = dict.fromkeys(runs, 0.0), time.perf_counter()
    for number in range(args.steps):
        rows = slice(number * args.rows, (number + 1) * args.rows)
        batch = batch_of(ids[rows], segments[rows])
        for dtype, run in runs.items():
            run[2], metrics = run[1](run[2], run[3], batch)
            sums[dtype] += float(metrics["loss"])
        if number % 10 == 9:
            losses = {f"loss_{dtype or 'bfloat16'}": round(total / 10, 4) for dtype, total in sums.items()}
            print(json.dumps(dict(step=number + 1, **losses, seconds=round(time.perf_counter() - begin))), flush=True)
            sums = dict.fromkeys(runs, 0.0)
    held_out = batch_of(ids[-HELD_OUT:], segments[-HELD_OUT:])
    ends = {}
    for dtype, (graphdef, _, state, frozen) in runs.items():

        @jax.jit
        def loss(trainable, frozen, graphdef=graphdef):
            total, weight, _ = causal_lm_loss(nnx.merge(graphdef, trainable, frozen), held_out)
            return total / weight

        ends[f"held_out_{dtype or 'bfloat16'}"] = round(float(loss(state.trainable, frozen)), 4)
    print(json.dumps(ends), flush=True)


if __name__ == "__main__":
    main()
