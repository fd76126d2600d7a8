"""The grouped product of `jaxlora.moe` on real shapes: does a token cost what its experts cost, or what all cost?

    python benchmarks/experts.py [--tokens 8192] [--runs 15]

One JSON line a measurement, of one linear of one layer, forward and the gradient of its input, in bfloat16:

    dense      one matrix, for as many rows: the least that the grouped product can take
    grouped    the same rows over all experts, evenly or all of them to one; `of_dense` is its time over dense's. Work
               on every expert for every row would make it near the number of experts
    loop       each expert's product with as many rows as it would get evenly, one after the other
    quantised  grouped, of NF4 experts, which are dequantised twice
    thin       a product with r = 16 columns and its transpose's, dense: what an adapter on one matrix takes
    adapter    `grouped_lora_delta`, an adapter an expert, with the gradients of x, A and B; `of_dense` is over thin
"""

import argparse
import json

import jax
import jax.numpy as jnp
from jax import lax

from jaxlora import quant
from jaxlora.bench.kernels import median_seconds
from jaxlora.kernels.grouped import grouped_lora_delta
from jaxlora.kernels.lora import lora_delta
from jaxlora.moe import grouped_matmul

# (experts, of a token, in, out): gate or up, and down.
SHAPES = {
    "Mixtral-8x7B": [(8, 2, 4096, 14336), (8, 2, 14336, 4096)],
    "Qwen3-30B-A3B": [(128, 8, 2048, 768), (128, 8, 768, 2048)],
    "gpt-oss-20b": [(32, 4, 2880, 5760), (32, 4, 2880, 2880)],
}
RANK = 16


def both_ways(product):
    """A function of x that runs the product and its gradient with respect to x."""

    def run(x, *arguments):
        y, pullback = jax.vjp(lambda x: product(x, *arguments), x)
        return y, pullback(y)[0]

    return run


def with_gradients(delta):
    """A function of x, A and B that runs the delta and all of its gradients."""

    def run(x, a, b, *arguments):
        y, pullback = jax.vjp(lambda x, a, b: delta(x, a, b, jnp.float32(1.0), *arguments), x, a, b)
        return y, pullback(y)

    return run


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--runs", type=int, default=15)
    args = parser.parse_args()
    print(json.dumps(dict(device=jax.devices()[0].device_kind, jax=jax.__version__)), flush=True)
    for name, shapes in SHAPES.items():
        for experts, chosen, d_in, d_out in shapes:
            rows = args.tokens * chosen
            x = jax.random.normal(jax.random.key(0), (rows, d_in), jnp.bfloat16)
            w = 0.02 * jax.random.normal(jax.random.key(1), (experts, d_out, d_in), jnp.bfloat16)
            even = jnp.full(experts, rows // experts, jnp.int32)
            one = jnp.zeros(experts, jnp.int32).at[0].set(rows)
            q = jax.jit(lambda w: lax.map(quant.quantize, w))(w)

            def loop(x, w, experts=experts, d_in=d_in, d_out=d_out):
                parts = x.reshape(experts, -1, d_in)
                return lax.map(lambda pair: quant.matmul(*pair), (parts, w)).reshape(-1, d_out)

            seconds = {
                "dense": median_seconds(both_ways(quant.matmul), x, w[0], runs=args.runs),
                "grouped": median_seconds(both_ways(grouped_matmul), x, w, even, runs=args.runs),
                "grouped, one expert": median_seconds(both_ways(grouped_matmul), x, w, one, runs=args.runs),
                "loop": median_seconds(both_ways(loop), x, w, runs=args.runs),
                "quantised": median_seconds(both_ways(grouped_matmul), x, q, even, runs=args.runs),
            }
            a = jax.random.normal(jax.random.key(2), (experts, RANK, d_in))
            b = jax.random.normal(jax.random.key(3), (experts, d_out, RANK))
            thin = {
                "thin": median_seconds(with_gradients(lora_delta), x, a[0], b[0], runs=args.runs),
                "adapter": median_seconds(with_gradients(grouped_lora_delta), x, a, b, even, runs=args.runs),
            }
            for kind, taken in thin.items():
                line = dict(model=name, experts=experts, chosen=chosen, shape=[d_out, d_in], rows=rows, kind=kind)
                print(
                    json.dumps(line | dict(ms=round(taken * 1e3, 3), of_dense=round(taken / thin["thin"], 2))),
                    flush=True,
                )
            for kind, taken in seconds.items():
                line = dict(model=name, experts=experts, chosen=chosen, shape=[d_out, d_in], rows=rows, kind=kind)
                line |= dict(ms=round(taken * 1e3, 3), of_dense=round(taken / seconds["dense"], 2))
                print(json.dumps(line | dict(tflop_s=round(4 * rows * d_in * d_out / taken / 1e12, 1))), flush=True)


if __name__ == "__main__":
    main()
