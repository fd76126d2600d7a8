"""The kernels against their reference on real shapes: are they right, and how near do they come to a copy's bandwidth?

    python benchmarks/kernels.py [--layers 8] [--runs 15]

One JSON line a measurement. "dequantize_nf4" lines carry the bytes that must move for one matrix (packed weight in,
bfloat16 out), the time for it, GB/s, and that as a share of a copy measured in the same run. A time is the median over
`runs` of one program that takes `layers` different matrices, divided by their number, so no matrix is found in a cache.
"matmul" lines are a forward and backward product of 8192 tokens with a weight, dense and quantised, in a `lax.scan`
over the stacked weights as in a model: they include what XLA pays to slice a layer out.
"""

import argparse
import functools
import json
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxlora import quant
from jaxlora.kernels import api, nf4

SHAPES = [(4096, 14336), (4096, 4096), (1024, 4096), (14336, 4096), (896, 4864), (100, 70)]
CONFIGS = [
    nf4.Config(block=b, num_warps=w, lookup=k) for k in ("table", "prmt") for b in (256, 512, 1024) for w in (4, 8)
]


def median_seconds(function, *args, runs):
    function = jax.jit(function)
    jax.block_until_ready(function(*args))
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        jax.block_until_ready(function(*args))
        times.append(time.perf_counter() - start)
    return float(np.median(times))


def copy_bandwidth(runs):
    """GB/s of x + 1 over 1 GiB of bfloat16 on a GPU, 16 MiB elsewhere."""
    x = jnp.zeros((1 << 29 if jax.default_backend() == "gpu" else 1 << 23,), jnp.bfloat16)
    return 2 * x.nbytes / median_seconds(lambda x: x + jnp.bfloat16(1), x, runs=runs) / 1e9


def over_layers(function, layers):
    """function of every layer, all results kept. No scan, which would copy each result into the stack."""
    return [function(layer) for layer in layers]


def implementations():
    """(name, config, q -> bfloat16 matrix) of everything that can run here."""
    yield "reference", None, functools.partial(quant.dequantize, dtype=jnp.bfloat16, implementation="reference")
    if jax.default_backend() != "gpu":
        return
    yield "triton", None, functools.partial(quant.dequantize, dtype=jnp.bfloat16, implementation="triton")
    for config in CONFIGS:

        def configured(q, config=config):
            fields = q.codes, q.scales, q.nested_absmax, q.nested_offset
            return nf4.dequantize_nf4(*fields, shape=q.shape, dtype=jnp.bfloat16, config=config)

        yield "triton", config, configured


def check(shape, layers):
    """Values bit for bit, gradients against the dense product; says which implementation ran."""
    for dtype in (jnp.float32, jnp.bfloat16, jnp.float16):
        got = quant.dequantize(layers[0], dtype)
        expected = quant.dequantize(layers[0], dtype, implementation="reference")
        assert jnp.array_equal(got, expected), (shape, dtype)
    one = layers[0]
    dense = quant.dequantize(one, jnp.bfloat16, implementation="reference")
    x = jax.random.normal(jax.random.key(1), (64, shape[1]), jnp.bfloat16)
    loss = lambda x, w: jnp.sin(quant.matmul(x, w).astype(jnp.float32)).sum()
    got, expected = (jax.jit(jax.grad(loss))(x, w).astype(jnp.float32) for w in (one, dense))
    error = float(jnp.abs(got - expected).max() / jnp.abs(expected).max())
    assert error < 2e-2, (shape, error)
    ran = sorted(api.implementations_in(jax.grad(loss), x, one))
    print(json.dumps(dict(op="check", shape=shape, equal=True, gradient_error=error, ran=ran)), flush=True)


def product_and_gradient(x, ws):
    """x through every weight in turn, forward and backward."""

    def step(carry, w):
        y, vjp = jax.vjp(lambda x: quant.matmul(x, w), x)
        return carry + vjp(y)[0], None

    return lax.scan(step, jnp.zeros_like(x), ws)[0]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--runs", type=int, default=15)
    args = parser.parse_args()

    copy = copy_bandwidth(args.runs)
    device = jax.devices()[0].device_kind
    print(json.dumps(dict(op="copy", device=device, jax=jax.__version__, gb_s=round(copy, 1))), flush=True)
    for shape in SHAPES:
        w = 0.02 * jax.random.normal(jax.random.key(0), (args.layers, *shape), jnp.bfloat16)
        q = jax.jit(lambda w: lax.map(quant.quantize, w))(w)
        layers = [jax.tree.map(lambda leaf, i=i: leaf[i], q) for i in range(args.layers)]
        check(shape, layers)
        bytes_each = q.nbytes // args.layers + 2 * shape[0] * shape[1]
        for name, config, function in implementations():
            seconds = median_seconds(functools.partial(over_layers, function), layers, runs=args.runs) / args.layers
            rate = bytes_each / seconds / 1e9
            line = dict(op="dequantize_nf4", implementation=name, config=config and vars(config), shape=shape)
            line |= dict(
                ms=round(seconds * 1e3, 4), bytes=bytes_each, gb_s=round(rate, 1), of_copy=round(rate / copy, 3)
            )
            print(json.dumps(line), flush=True)
        if jax.default_backend() == "gpu":
            x = jax.random.normal(jax.random.key(1), (8192, shape[1]), jnp.bfloat16)
            for name, ws in (("dense", w), ("quantised", q)):
                seconds = median_seconds(product_and_gradient, x, ws, runs=args.runs) / args.layers
                flops = 4 * x.size * shape[0]
                line = dict(op="matmul", weight=name, shape=shape, ms=round(seconds * 1e3, 4))
                print(json.dumps(line | dict(tflop_s=round(flops / seconds / 1e12, 1))), flush=True)


if __name__ == "__main__":
    main()
