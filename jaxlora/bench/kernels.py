"""The kernels at a real model's shape against their reference: are they right, and how near do they come to the device?

`python -m jaxlora.bench.kernels 8b` prints a JSON line for each, after one of what they are measured by: "copy", the
GB/s of a copy, and "product", the TFLOP/s of a large bfloat16 product. A row has

    op, implementation, shape, ms    shape: of the weight, or of the queries
    gb_s, of_copy                    where bytes bound it: those that must move, and the share of the copy
    tflop_s, of_product              where products bound it: FLOP that must be, and the share of the product

A time is the median over `runs` of one program that takes `LAYERS` different matrices, divided by their number, so that
none is found in a cache. "matmul_nf4" and "matmul_dense" are products with one token. "matmul" is the product of a
weight with a step's tokens, its gradient, and the adapter's part where there is one, in a `lax.scan` over the stacked
weights as in a model.
"""

from __future__ import annotations

import functools
import json
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxlora import quant
from jaxlora.bench.shapes import CONFIGS, RANK, kinds_of, linears_of
from jaxlora.kernels import api
from jaxlora.kernels.cross_entropy import chunk_length, linear_cross_entropy
from jaxlora.kernels.reference import DenseFields, NF4Fields
from jaxlora.quant import LowRank, QuantizedArray

LAYERS = 8


def median_seconds(function: Callable, *args: Any, runs: int) -> float:
    """Seconds of one call of the jitted function, the median over `runs` after one to compile it."""
    function = jax.jit(function)
    jax.block_until_ready(function(*args))
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        jax.block_until_ready(function(*args))
        times.append(time.perf_counter() - start)
    return float(np.median(times))


def is_on_gpu() -> bool:
    return jax.default_backend() == "gpu"


def copy_gb_s(runs: int) -> float:
    """GB/s of x + 1 over 1 GiB of bfloat16 on a GPU, 16 MiB elsewhere."""
    x = jnp.zeros((1 << 29 if is_on_gpu() else 1 << 23,), jnp.bfloat16)
    return 2 * x.nbytes / median_seconds(lambda x: x + jnp.bfloat16(1), x, runs=runs) / 1e9


def product_tflop_s(runs: int) -> float:
    """TFLOP/s of a square bfloat16 product of 8192 on a GPU, 256 elsewhere."""
    n = 8192 if is_on_gpu() else 256
    x = jax.random.normal(jax.random.key(0), (n, n), jnp.bfloat16)
    return 2 * n**3 / median_seconds(jnp.matmul, x, x, runs=runs) / 1e12


def over_layers(function: Callable, layers: list[Any]) -> list[Any]:
    """`function` of every layer, all results kept. No scan, which would copy each result into the stack."""
    return [function(layer) for layer in layers]


def stacked_nf4(shape: tuple[int, int], layers: int) -> tuple[jax.Array, QuantizedArray, list[QuantizedArray]]:
    """Random weights [layers, out, in], the same quantised, and its layers apart."""
    w = 0.02 * jax.random.normal(jax.random.key(0), (layers, *shape), jnp.bfloat16)
    q = jax.jit(lambda w: lax.map(quant.quantize, w))(w)
    return w, q, [jax.tree.map(lambda leaf, i=i: leaf[i], q) for i in range(layers)]


def check(one: QuantizedArray) -> None:
    """Dequantised values bit for bit, merged ones and gradients within bfloat16 of the dense product's.

    Raises:
        AssertionError: they differ.
    """
    for dtype in (jnp.float32, jnp.bfloat16, jnp.float16):
        expected = quant.dequantize(one, dtype, implementation="reference")
        assert jnp.array_equal(quant.dequantize(one, dtype), expected), (one.shape, dtype)
    x = jax.random.normal(jax.random.key(1), (64, one.shape[1]), jnp.bfloat16)
    adapter = low_rank(one.shape)
    dense = quant.dequantize(one, jnp.float32, implementation="reference") + adapter.scaling * adapter.b @ adapter.a
    assert _distance(quant.merge(one, adapter, jnp.bfloat16), dense) < 1e-2, one.shape

    def loss(x, w, adapter=None):
        return jnp.sin(quant.matmul(x, w, adapter).astype(jnp.float32)).sum()

    got = jax.jit(jax.grad(loss))(x, one, adapter)
    expected = jax.jit(jax.grad(loss))(x, dense.astype(jnp.bfloat16))
    assert _distance(got, expected) < 5e-2, one.shape


def _distance(got: jax.Array, expected: jax.Array) -> float:
    expected = expected.astype(jnp.float32)
    return float(jnp.abs(got.astype(jnp.float32) - expected).max() / jnp.abs(expected).max())


def low_rank(shape: tuple[int, int]) -> LowRank:
    """A random adapter of a weight [out, in]."""
    a = 0.02 * jax.random.normal(jax.random.key(2), (RANK, shape[1]), jnp.float32)
    b = 0.02 * jax.random.normal(jax.random.key(3), (shape[0], RANK), jnp.float32)
    return LowRank(a, b, jnp.float32(1))


def product_and_gradients(x: jax.Array, ws: Any, adapter: LowRank | None) -> Any:
    """x through every weight in turn, forward and backward."""

    def step(carry, w):
        y, vjp = jax.vjp(lambda x, adapter: quant.matmul(x, w, adapter), x, adapter)
        dx, d_adapter = vjp(y)
        return (carry[0] + dx, jax.tree.map(jnp.add, carry[1], d_adapter)), None

    return lax.scan(step, (jnp.zeros_like(x), jax.tree.map(jnp.zeros_like, adapter)), ws)[0]


def packed_products(q: QuantizedArray, x: jax.Array) -> list[jax.Array]:
    """x times each weight of a stack, as they are packed."""
    ys = []
    for i in range(LAYERS):
        w = q.at(jnp.int32(i))
        fields = NF4Fields(w.codes, w.scales, w.nested_absmax, w.nested_offset, w.index)
        ys += api.matmul_nf4(x, [fields], shapes=[w.shape])
    return ys


def dense_products(w: jax.Array, x: jax.Array) -> list[jax.Array]:
    """x times each weight of a stack, as they lie in it."""
    return [y for i in range(LAYERS) for y in api.matmul_dense(x, [DenseFields(w, jnp.int32(i))])]


def linears(shape: str) -> list[tuple[int, int]]:
    """The shapes [out, in] of a model's linears, each once."""
    kinds = dict.fromkeys(kinds_of(shape))
    return list(dict.fromkeys((rows, columns) for kind in kinds for columns, rows in linears_of(shape, kind)))


def measure(shape: str, runs: int) -> Iterator[dict[str, Any]]:
    """The rows of a shape of `CONFIGS`; see the head of this module."""
    copy, product = copy_gb_s(runs), product_tflop_s(runs)
    yield dict(op="copy", gb_s=round(copy, 1))
    yield dict(op="product", tflop_s=round(product, 3))

    def row(op: str, dims: tuple[int, ...], function: Callable, *args: Any, bytes=0, flop=0, each=1) -> dict[str, Any]:
        seconds = median_seconds(function, *args, runs=runs) / each
        ran = [name.partition(".")[2] for name in api.implementations_in(function, *args) if name.startswith(op + ".")]
        line = dict(op=op, implementation="+".join(sorted(ran)) or None, shape=list(dims), ms=round(seconds * 1e3, 4))
        if bytes:
            return line | dict(gb_s=round(bytes / seconds / 1e9, 1), of_copy=round(bytes / seconds / 1e9 / copy, 3))
        rate = flop / seconds / 1e12
        return line | dict(tflop_s=round(rate, 3), of_product=round(rate / product, 3))

    tokens = 8192 if is_on_gpu() else 64
    for dims in linears(shape):
        w, q, layers = stacked_nf4(dims, LAYERS)
        adapter = low_rank(dims)
        check(layers[0])
        moved = q.nbytes // LAYERS + 2 * dims[0] * dims[1]
        for implementation in ("reference", None):
            function = functools.partial(quant.dequantize, dtype=jnp.bfloat16, implementation=implementation)
            function = functools.partial(over_layers, function)
            yield row("dequantize_nf4", dims, function, layers, bytes=moved, each=LAYERS)
            if not is_on_gpu():
                break  # it would be the reference once more

        def merged(q, adapter):
            return over_layers(lambda i: quant.merge(q.at(jnp.int32(i)), adapter, jnp.bfloat16), list(range(LAYERS)))

        yield row("merge_nf4", dims, merged, q, adapter, bytes=moved, each=LAYERS)
        token = jax.random.normal(jax.random.key(1), (1, dims[1]), jnp.bfloat16)
        yield row("matmul_nf4", dims, packed_products, q, token, bytes=q.nbytes // LAYERS, each=LAYERS)
        yield row("matmul_dense", dims, dense_products, w, token, bytes=w.nbytes // LAYERS, each=LAYERS)
        x = jax.random.normal(jax.random.key(1), (tokens, dims[1]), jnp.bfloat16)
        flop = 4 * tokens * dims[0] * dims[1]
        for kind, ws, part in (("dense", w, None), ("nf4", q, None), ("nf4 + adapter", q, adapter)):
            line = row("matmul", dims, product_and_gradients, x, ws, part, flop=flop, each=LAYERS)
            yield line | dict(implementation=kind)

    c: dict[str, Any] = CONFIGS[shape]
    heads, keys, size = c["num_attention_heads"], c["num_key_value_heads"], c["head_dim"]
    q, k, v = (jax.random.normal(jax.random.key(n), (1, tokens, n, size), jnp.bfloat16) for n in (heads, keys, keys))
    attention = functools.partial(api.attention, scale=size**-0.5)
    both = lambda *args: jax.vjp(attention, *args)[1](args[0])
    yield row("attention", q.shape, attention, q, k, v, flop=2 * tokens**2 * heads * size)
    yield row("attention", q.shape, both, q, k, v, flop=6 * tokens**2 * heads * size) | dict(gradients=True)

    d, vocabulary = c["hidden_size"], c["vocab_size"]
    hidden = jax.random.normal(jax.random.key(0), (tokens, d), jnp.bfloat16)
    head = 0.02 * jax.random.normal(jax.random.key(1), (vocabulary, d), jnp.bfloat16)
    labels = jax.random.randint(jax.random.key(2), (tokens,), 0, vocabulary, jnp.int32)
    loss = lambda *args: linear_cross_entropy(*args, chunk_length(tokens, vocabulary))
    flop = 4 * tokens * d * vocabulary
    line = row("cross_entropy", (tokens, d), jax.grad(loss), hidden, head, labels, flop=flop)
    yield line | dict(gradients=True)


def main(shape: str, runs: str = "15") -> None:
    for line in measure(shape, int(runs)):
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
