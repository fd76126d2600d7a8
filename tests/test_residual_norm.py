"""The residual stream and its norm: what the two lines say, and the kernel as near as rounding allows."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlora.kernels import api, residual_norm
from jaxlora.kernels.parts import Parts

OPTIONS = [{}, {"offset": 1.0}, {"multiplier": 0.22}, {"offset": 1.0, "multiplier": 0.5}]


def operands(key, tokens, features, dtype, layers=3):
    keys = jax.random.split(key, 3)
    x, y = (3 * jax.random.normal(key, (tokens, features), jnp.float32).astype(dtype) for key in keys[:2])
    return x, y, (1 + 0.2 * jax.random.normal(keys[2], (layers, features))).astype(dtype)


def wanted(x, y, weight, *, eps, offset=0.0, multiplier=1.0):
    """In float64."""
    x, y, weight = (np.asarray(array, np.float64) for array in (x, y, weight))
    total = x + multiplier * y
    return total, total / np.sqrt(np.mean(total**2, axis=-1, keepdims=True) + eps) * (offset + weight)


def relative(x, y):
    return float(np.linalg.norm(np.asarray(x, np.float64) - y) / np.linalg.norm(y))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_reference_is_the_two_lines(key, options):
    x, y, weight = operands(key, 5, 24, jnp.float32)
    got = api.residual_norm(x, y, weight, jnp.int32(1), eps=1e-5, **options)
    for ours, theirs in zip(got, wanted(x, y, weight[1], eps=1e-5, **options), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-6)
    alone = api.residual_norm(x, None, weight[1], eps=1e-5, **options)
    assert alone[0] is x
    np.testing.assert_allclose(alone[1], wanted(x, 0 * y, weight[1], eps=1e-5, **options)[1], rtol=1e-6, atol=1e-6)


def test_the_kernel_says_why_it_cannot_run(key):
    x, y, weight = operands(key, 5, 24, jnp.bfloat16)
    with pytest.raises(NotImplementedError, match="needs an NVIDIA GPU"):
        api.residual_norm(x, y, weight[0], eps=1e-5, implementation="triton")
    run = functools.partial(residual_norm.residual_norm, index=None, eps=1e-5)
    with pytest.raises(NotImplementedError, match="not float32 and float32"):
        run(x.astype(jnp.float32), y.astype(jnp.float32), weight[0])
    with pytest.raises(NotImplementedError, match="1 to 64 tokens of up to 16384 features, not 65 of 24"):
        run(jnp.zeros((65, 24), x.dtype), None, weight[0])
    with pytest.raises(NotImplementedError, match=r"a weight \[24\] or a stack, not \[3, 24\]"):
        run(x, y, weight)


# --- on a GPU ---


@pytest.mark.gpu
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("tokens, features", [(1, 4096), (64, 2048), (3, 576), (8, 80), (2, 5120), (1, 16384)])
@pytest.mark.parametrize("dtype, limit", [(jnp.bfloat16, 4e-3), (jnp.float16, 5e-4)])
def test_triton_equals_the_reference(key, dtype, limit, tokens, features, options):
    x, y, weights = operands(key, tokens, features, dtype)
    for part, weight, index in ((y, weights, jnp.int32(2)), (None, weights, jnp.int32(2)), (y, weights[2], None)):
        run = functools.partial(api.residual_norm, eps=1e-5, **options)
        assert api.implementations_in(run, x, part, weight, index) == {"residual_norm.triton"}
        total, out = jax.jit(run)(x, part, weight, index)
        # Rounded once: no further from the exact sum than half a last place, but for that of float32.
        multiplier = float(np.asarray(options.get("multiplier", 1.0), dtype))
        exact = np.asarray(x, np.float64) + (0.0 if part is None else multiplier * np.asarray(part, np.float64))
        np.testing.assert_allclose(np.asarray(total, np.float64), exact, rtol=0.5001 * jnp.finfo(dtype).eps, atol=1e-6)
        exact = wanted(total, 0 * x, weights[2], eps=1e-5, offset=options.get("offset", 0.0))[1]
        assert out.dtype == dtype and relative(out, exact) < limit


@pytest.mark.gpu
@pytest.mark.parametrize("count", [2, 5, 8])
@pytest.mark.parametrize("tokens, features", [(64, 4096), (9, 576), (3, 80), (64, 5120), (10, 16384)])
@pytest.mark.parametrize("dtype, limit", [(jnp.bfloat16, 4e-3), (jnp.float16, 5e-4)])
def test_triton_adds_up_parts(key, dtype, limit, tokens, features, count):
    x, _, weights = operands(key, tokens, features, dtype)
    of_parts = jnp.bfloat16 if count == 5 else jnp.float32
    parts = Parts(jax.random.normal(key, (count, tokens, features), of_parts), jnp.dtype(dtype))
    y = functools.reduce(np.add, np.asarray(parts.parts, np.float32)).astype(dtype)
    for options in OPTIONS:
        run = functools.partial(api.residual_norm, eps=1e-5, **options)
        assert api.implementations_in(run, x, parts, weights, jnp.int32(2)) == {"residual_norm.triton"}
        total, out = jax.jit(run)(x, parts, weights, jnp.int32(2))
        summed, _ = jax.jit(run)(x, jnp.asarray(y), weights, jnp.int32(2))
        np.testing.assert_array_equal(total, summed)  # one order of the sum, rounded where a product is
        exact = wanted(total, 0 * x, weights[2], eps=1e-5, offset=options.get("offset", 0.0))[1]
        assert out.dtype == dtype and relative(out, exact) < limit


@pytest.mark.gpu
def test_the_gradients_are_the_references(key):
    x, y, weights = operands(key, 4, 256, jnp.bfloat16)

    def loss(x, y, weight, implementation):
        total, out = api.residual_norm(x, y, weight, eps=1e-5, implementation=implementation)
        return jnp.sum(jnp.sin(total.astype(jnp.float32)) * out.astype(jnp.float32))

    gradients = (
        jax.jit(jax.grad(loss, (0, 1, 2)), static_argnums=3)(x, y, weights[0], i) for i in ("triton", "reference")
    )
    for ours, theirs in zip(*gradients, strict=True):
        assert relative(ours, np.asarray(theirs, np.float64)) < 1e-2
