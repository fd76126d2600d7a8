"""The products of one layer of an 8B with NF4 weights, for 9 to 64 tokens, as they follow each other in generation: one
JSON line for each dtype, with the microseconds on the device of each product.

    python benchmarks/decode_products.py [--tokens 64] [--dtypes bfloat16 float8] [--layers 8]

A loop over layers, whose weights are read out of stacks that no cache holds; one product waits for the last. Medians
over a pass of three times the layers, traced by the profiler, which is too short for the card to reach its power limit:
what is left out or added shows here to a tenth of a microsecond, and in a whole step only if energy allows.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics

import jax
import jax.numpy as jnp
from decode_kernel import WORKS, device_events, stack_of

from jaxlora import quant
from jaxlora.kernels.ordered import FLOAT8, Ordered, in_order
from jaxlora.kernels.parts import Parts

OF_PRODUCTS = "matmul_nf4"  # what their kernels' names begin with


def inputs(work: str, tokens: int, is_float8: bool) -> Ordered:
    columns = WORKS[work][1]
    x = in_order(jax.random.normal(jax.random.key(1), (tokens, columns), jnp.bfloat16), is_float8)
    if is_float8 and work == "down":  # as the gate makes it
        x = dataclasses.replace(x, of_tokens=None, of_columns=jnp.ones(columns // 128))
    return x


def program(tokens: int, dtype: str, stacks: dict, layers: int):
    """A compiled function of no arguments that goes three times through the layers."""
    is_float8 = dtype == "float8"
    # Who makes what o reads does not make float8.
    xs = {work: inputs(work, tokens, is_float8 and work != "o") for work in WORKS}

    def layer(i, carry, xs, stacks):
        for work in WORKS:
            gated = dict(act="silu", ordered=FLOAT8 if is_float8 else jnp.bfloat16) if work == "gate_up" else {}
            data, carry = jax.lax.optimization_barrier((xs[work].data, carry))
            weights = [stack.at(i % layers) for stack in stacks[work]]
            y = quant.matmul_each(dataclasses.replace(xs[work], data=data), weights, parts=not gated, **gated)[0]
            y = y.data if isinstance(y, Ordered) else y.parts if isinstance(y, Parts) else y
            carry = carry + jax.lax.optimization_barrier(y).ravel()[0].astype(jnp.float32)
        return carry

    def run(xs, stacks):
        return jax.lax.fori_loop(0, 3 * layers, lambda i, carry: layer(i, carry, xs, stacks), jnp.float32(0))

    compiled = jax.jit(run).lower(xs, stacks).compile()
    return lambda: jax.block_until_ready(compiled(xs, stacks))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--dtypes", nargs="+", choices=["bfloat16", "float8"], default=["bfloat16", "float8"])
    parser.add_argument("--layers", type=int, default=8)
    args = parser.parse_args()
    stacks = {work: [stack_of((n, columns), args.layers) for n in rows] for work, (rows, columns) in WORKS.items()}
    for dtype in args.dtypes:
        run = program(args.tokens, dtype, stacks, args.layers)
        run()
        events = [event["dur"] for event in device_events(run) if event["name"].startswith(OF_PRODUCTS)]
        assert len(events) == 3 * args.layers * len(WORKS), len(events)
        us = {w: statistics.median(events[i :: len(WORKS)][args.layers :]) for i, w in enumerate(WORKS)}
        row = dict(op="matmul_nf4", tokens=args.tokens, dtype=dtype, us={w: round(each, 2) for w, each in us.items()})
        print(
            json.dumps(row | dict(layer_us=round(sum(us.values()), 2), device=jax.devices()[0].device_kind)), flush=True
        )


if __name__ == "__main__":
    main()
