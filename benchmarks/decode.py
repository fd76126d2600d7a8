"""Generating at a real model's shape against the bound that reading the weights sets, one JSON line a measurement.

    python benchmarks/decode.py 8b [--weights nf4 bf16] [--batches 1 64] [--prompt 128] [--new 128] [--rank 16]
                                   [--profile] [--peers]

Random weights and prompts, greedy, no stop tokens. A step's time is that of the tokens after the first:
(time of `new` tokens - time of one) / (new - 1), medians of `--runs` calls of `generate`; `first_s` is the time of one
token, the prompt's pass in it. `bytes` are what a step must read once: the layers' weights and the head's, adapters in
16 bits, and keys and values of the places that are written, at the middle of the run; of experts those that rows who
choose at random choose on average. `of_bound` is bytes over the
bandwidth of a copy measured in the same run, over the step's time. `--rank` puts adapters on all linear layers.
`--profile` adds what the device did for a token, by kernel: times a token and milliseconds. While it is traced XLA
may launch kernels one by one that are otherwise launched together as a CUDA graph.

`--peers` runs transformers' `generate` on the same shapes in a process of its own, with bitsandbytes for NF4, if they
are installed: {"implementation": "transformers"}.
"""

from __future__ import annotations

import argparse
import collections
import json
import statistics
import subprocess
import sys
import time

from jaxlora.bench.shapes import CONFIGS, random_model


def report(**line):
    print(json.dumps(line), flush=True)


def seconds_of(generate, new: int, runs: int) -> tuple[float, float]:
    """(time of the first token, time of a later one) of `generate(tokens)`, which returns when they are there."""

    def median(tokens):
        times = []
        for _ in range(runs + 1):
            start = time.perf_counter()
            generate(tokens)
            times.append(time.perf_counter() - start)
        return statistics.median(times[1:])  # the first compiles

    first = median(1)
    return first, (median(new) - first) / (new - 1)


def line_of(args, weights: str, batch: int, implementation: str, first: float, step: float) -> dict:
    return dict(
        op="decode",
        implementation=implementation,
        work=f"{args.shape}-{batch}x{args.prompt}+{args.new}",
        weights=weights,
        matmul_dtype=args.matmul_dtype if implementation == "jaxlora" else None,
        rank=args.rank,
        tok_s=round(batch / step, 1),
        step_ms=round(step * 1e3, 3),
        first_s=round(first, 4),
    )


# ---------------------------------------------------------------------------------------------------------------------
# jaxlora
# ---------------------------------------------------------------------------------------------------------------------


def bytes_of_step(model, batch: int, places: int) -> int:
    """What one token a row must read once."""
    import jax
    from flax import nnx

    from jaxlora.variables import LoraParam

    config = model.config
    chosen = 0.0 if not config.num_experts else 1 - (1 - config.num_experts_per_tok / config.num_experts) ** batch
    total = 0
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        is_table = "embed_tokens" in path and not model.config.tie_word_embeddings
        for leaf in jax.tree.leaves(variable.get_value()):
            size = 2 if issubclass(variable.type, LoraParam) else leaf.dtype.itemsize
            share = chosen if "experts" in path else 1
            total += 0 if is_table else round(share * leaf.size * size)
    return total + 4 * batch * places * config.num_hidden_layers * config.num_key_value_heads * config.head_dim


def profile(generate) -> dict:
    """Of one token: {kernel: [how often, milliseconds]}, and the sums."""
    from decode_kernel import device_events

    tokens, counts, ms = 16, collections.Counter(), collections.Counter()
    for new, sign in ((tokens + 1, 1), (1, -1)):
        for event in device_events(lambda new=new: generate(new)):
            counts[event["name"]] += sign / tokens
            ms[event["name"]] += sign * event["dur"] / 1e3 / tokens
    top = {name[:80]: [round(counts[name], 1), round(value, 4)] for name, value in ms.most_common(30)}
    return dict(kernels_a_token=round(sum(counts.values()), 1), device_ms=round(sum(ms.values()), 3), kernels=top)


def measure(args) -> None:
    import jax
    import numpy as np
    from decode_kernel import copy_gb_s

    from jaxlora import lora
    from jaxlora.config import LoraConfig
    from jaxlora.generate import generate

    copy = copy_gb_s()
    report(op="copy", device=jax.devices()[0].device_kind, jax=jax.__version__, gb_s=round(copy, 1))
    for weights in args.weights:
        model = model_of(args, weights)
        if args.rank:
            lora.add_adapters(model, LoraConfig(r=args.rank), jax.random.key(0))
        for batch in args.batches:
            ids = np.random.default_rng(0).integers(1, model.config.vocab_size, (batch, args.prompt))
            run = lambda new, model=model, ids=ids: generate(model, ids, max_new_tokens=new, eos_token_id=[])
            first, step = seconds_of(run, args.new, args.runs)
            line = line_of(args, weights, batch, "jaxlora", first, step)
            line["bytes"] = bytes_of_step(model, batch, args.prompt + args.new // 2)
            line["of_bound"] = round(line["bytes"] / copy / 1e9 / step, 3)
            if args.profile:
                line |= profile(run)
            report(**line)
        del model


# ---------------------------------------------------------------------------------------------------------------------
# transformers
# ---------------------------------------------------------------------------------------------------------------------


def random_peer(shape: str, weights: str, device: str):
    """A model of transformers with random weights, never more of them in 16 bits than it holds in the end and one."""
    import torch
    import transformers

    config = transformers.AutoConfig.for_model(**CONFIGS[shape])
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    drawn = lambda like: 0.02 * torch.randn(like.shape, dtype=torch.bfloat16, device=device)
    for name, module in [*model.named_modules()]:
        if weights == "nf4" and isinstance(module, torch.nn.Linear) and "lm_head" not in name:
            import bitsandbytes

            options = dict(bias=False, compute_dtype=torch.bfloat16, quant_type="nf4", compress_statistics=True)
            quantized = bitsandbytes.nn.Linear4bit(module.in_features, module.out_features, device="meta", **options)
            quantized.weight = bitsandbytes.nn.Params4bit(
                drawn(module.weight), requires_grad=False, quant_type="nf4", compress_statistics=True
            ).to(device)
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, quantized)
            continue
        for key, parameter in [*module.named_parameters(recurse=False)]:
            value = torch.ones_like(parameter, device=device) if "norm" in name else drawn(parameter)
            setattr(module, key, torch.nn.Parameter(value, requires_grad=False))
    model.tie_weights()
    rotary = type(model.model.rotary_emb)(config=config).to(device)  # its buffers are made, not loaded
    model.model.rotary_emb = rotary
    return model.eval()


def measure_peer(args) -> None:
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    for weights in args.weights:
        model = random_peer(args.shape, weights, device)
        for batch in args.batches:
            ids = torch.randint(1, model.config.vocab_size, (batch, args.prompt), device=device)
            options = dict(do_sample=False, eos_token_id=None, pad_token_id=0, attention_mask=torch.ones_like(ids))

            def run(new, ids=ids, model=model, options=options):
                with torch.inference_mode():
                    return model.generate(ids, max_new_tokens=new, **options).cpu()

            assert run(args.new).shape[1] == args.prompt + args.new
            report(**line_of(args, weights, batch, "transformers", *seconds_of(run, args.new, args.runs)))
        del model


def arguments(description: str) -> argparse.ArgumentParser:
    """A parser of what is generated."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=CONFIGS)
    parser.add_argument("--weights", nargs="+", choices=["nf4", "bf16"], default=["nf4", "bf16"])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 64])
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--new", type=int, default=128, help="2 or more: a step is a later token's")
    parser.add_argument("--matmul-dtype", choices=["fp8"], help="of the blocks' linear layers; 16 bits where not given")
    return parser


def model_of(args, weights: str):
    """The random model."""
    import jax.numpy as jnp

    from jaxlora import lora
    from jaxlora.config import QuantConfig

    model = random_model(args.shape, QuantConfig() if weights == "nf4" else None, jnp.bfloat16)
    if args.matmul_dtype:
        lora.multiply_in(model, args.matmul_dtype)
    return model


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--rank", type=int, default=0)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--peers", action="store_true")
    parser.add_argument("--only-peers", action="store_true")
    args = parser.parse_args()
    if args.only_peers:
        return measure_peer(args)
    if args.peers:
        flags = [f for f in sys.argv[1:] if f not in ("--peers", "--profile")]
        done = subprocess.run([sys.executable, __file__, *flags, "--only-peers"], check=False)
        if done.returncode:
            report(op="decode", implementation="transformers", failed=done.returncode)
    measure(args)


if __name__ == "__main__":
    main()
