"""Products of few rows with NF4 experts, which read the codes of those that have rows."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlora import quant
from jaxlora.kernels import api, grouped_nf4, reference
from jaxlora.kernels.reference import NF4Fields
from jaxlora.moe import grouped_matmul

# (experts, out, in), (contracted dimension), rows of each expert: some have none, one has more than a tile of 16.
CASES = [
    ((4, 192, 128), 2, [3, 0, 20, 1]),
    ((4, 192, 128), 1, [3, 0, 20, 1]),
    ((5, 130, 320), 2, [0, 0, 17, 0, 1]),
    ((5, 130, 320), 1, [0, 0, 17, 0, 1]),
    ((1, 64, 64), 2, [1]),
    ((128, 96, 256), 2, [1 if i % 16 == 3 else 0 for i in range(128)]),
]


def operands(key, shape, contracted, sizes, dtype, double_quant=True):
    """x, the experts of two layers, sizes."""
    keys = jax.random.split(key)
    w = quant.quantize(0.02 * jax.random.normal(keys[0], (2, *shape)), double_quant=double_quant)
    x = jax.random.normal(keys[1], (sum(sizes), shape[contracted])).astype(dtype)
    return x, w, jnp.asarray(sizes, jnp.int32)


def product(x, w, sizes, contracted, implementation=None):
    fields = NF4Fields(w.codes, w.scales, w.nested_absmax, w.nested_offset, w.index)
    return api.grouped_dot_nf4(x, fields, sizes, contracted, shape=w.shape, implementation=implementation)


@pytest.mark.parametrize("shape, contracted, sizes", CASES[:4])
def test_the_reference_multiplies_what_is_dequantised(key, shape, contracted, sizes):
    x, w, sizes = operands(key, shape, contracted, sizes, jnp.bfloat16)
    dense = quant.dequantize(w, jnp.bfloat16)[1]
    expected, first = np.zeros((x.shape[0], shape[3 - contracted]), np.float32), 0
    for matrix, size in zip(np.asarray(dense, np.float32), np.asarray(sizes), strict=True):
        rows = slice(first, first + size)
        expected[rows] = np.asarray(x[rows], np.float32) @ (matrix.T if contracted == 2 else matrix)
        first += size
    for one in (w.at(jnp.int32(1)), jax.tree.map(lambda field: field[1], w)):
        got = np.asarray(product(x, one, sizes, contracted), np.float32)
        np.testing.assert_allclose(got, expected, rtol=2**-8, atol=1e-4)


@pytest.mark.parametrize("is_few", [True, False])
@pytest.mark.parametrize("in_out", [True, False])
def test_few_rows_read_codes_in_both_directions(key, in_out, is_few):
    rows = 4 * 3 if is_few else 4 * 3 + 1
    x, w, sizes = operands(key, (3, 128, 128), 2, [rows, 0, 0], jnp.bfloat16)

    def run(x, w, sizes):
        y, pullback = jax.vjp(lambda x: grouped_matmul(x, w.at(jnp.int32(0)), sizes, in_out=in_out), x)
        return y, pullback(y)

    packed = {"grouped_dot_nf4.reference"}
    assert api.implementations_in(run, x, w, sizes) & packed == (packed if is_few else set())
    dense = quant.dequantize(w, jnp.bfloat16)[0]
    expected = jax.vjp(lambda x: grouped_matmul(x, dense, sizes, in_out=in_out), x)
    found = run(x, w, sizes)
    np.testing.assert_array_equal(found[0], expected[0])
    np.testing.assert_array_equal(found[1], expected[1](found[0]))


@pytest.mark.parametrize("shape, dtype", [((3, 64, 96), jnp.bfloat16), ((3, 64, 128), jnp.float32)])
def test_what_the_kernel_does_not_take_is_dequantised(key, shape, dtype):
    x, w, sizes = operands(key, shape, 2, [1, 0, 2], dtype)
    run = lambda x, w, sizes: grouped_matmul(x, jax.tree.map(lambda field: field[0], w), sizes)
    assert "grouped_dot_nf4.reference" not in api.implementations_in(run, x, w, sizes)
    kernel = functools.partial(grouped_nf4.grouped_dot_nf4, shape=shape[1:])
    fields = NF4Fields(w.codes, w.scales, w.nested_absmax, w.nested_offset, jnp.int32(0))
    with pytest.raises(NotImplementedError, match="whole blocks of 64, and they have 96|not float32"):
        kernel(x, fields, sizes, 2)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("shape, contracted, sizes", CASES)
def test_triton_equals_the_reference(key, shape, contracted, sizes, double_quant, dtype):
    x, w, sizes = operands(key, shape, contracted, sizes, dtype, double_quant)
    for one in (w.at(jnp.int32(1)), jax.tree.map(lambda field: field[1], w)):
        run = jax.jit(functools.partial(product, contracted=contracted))
        assert api.implementations_in(run, x, one, sizes) == {"grouped_dot_nf4.triton"}
        expected = product(x, one, sizes, contracted, "reference").astype(jnp.float32)
        got = run(x, one, sizes).astype(jnp.float32)
        tolerance = 2 * float(jnp.finfo(dtype).eps) * float(jnp.abs(expected).max())
        np.testing.assert_allclose(got, expected, rtol=0, atol=tolerance)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "config", [grouped_nf4.Config(columns=128, inner=64), grouped_nf4.Config(inner=256, num_warps=8)]
)
def test_other_tiles_give_the_same(key, config):
    x, w, sizes = operands(key, (5, 130, 320), 2, [0, 0, 17, 0, 1], jnp.bfloat16)
    fields = NF4Fields(w.codes, w.scales, w.nested_absmax, w.nested_offset, jnp.int32(1))
    expected = reference.grouped_dot_nf4(x, fields, sizes, 2, shape=(130, 320)).astype(jnp.float32)
    got = grouped_nf4.grouped_dot_nf4(x, fields, sizes, 2, shape=(130, 320), config=config).astype(jnp.float32)
    np.testing.assert_allclose(got, expected, rtol=0, atol=2**-6 * float(jnp.abs(expected).max()))
