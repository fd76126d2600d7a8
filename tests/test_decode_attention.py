"""Attention of one token over a stacked cache: the last row of attention over the tokens themselves."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlora.kernels import api, decode_attention
from jaxlora.kernels.attention import attention_reference

LAYERS, LAYER = 3, 1
OPTIONS = [{}, {"window": 5}, {"softcap": 3.0}, {"window": 70, "softcap": 20.0}]


def operands(key, batch, heads, kv, dim, places, dtype=jnp.float32):
    keys = jax.random.split(key, 3)
    normal = lambda key, *shape: jax.random.normal(key, shape).astype(dtype)
    q = normal(keys[0], batch, heads, dim)
    return q, *(normal(key, LAYERS, batch, places, kv, dim) for key in keys[1:]), jnp.int32(LAYER)


def segments_of(batch, places, padding=2):
    """Each row padded on the left by one place more."""
    key_segments = (jnp.arange(places) >= padding + jnp.arange(batch)[:, None]).astype(jnp.int32)
    return dict(query_segments=jnp.ones(batch, jnp.int32), key_segments=key_segments)


def whole(q, keys, values, layer, *, offset, key_segments, query_segments, **options):
    """Of each row by itself, over just what it sees."""
    rows = []
    for b, last in enumerate(np.broadcast_to(np.asarray(offset), q.shape[:1])):
        first = int(np.argmax(np.asarray(key_segments[b]) == 1))
        k, v = (stack[LAYER, b, first : last + 1][None].astype(jnp.float32) for stack in (keys, values))
        query = q[b][None, None].astype(jnp.float32)
        rows.append(attention_reference(query, k, v, offset=int(last) - first, **options)[0, 0])
    return jnp.stack(rows)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("offset", [9, [9, 6]])
def test_the_reference_is_the_last_row_of_attention(key, options, offset):
    arrays = operands(key, 2, 6, 2, 10, 12)
    options = dict(options, scale=0.3, offset=jnp.asarray(offset), **segments_of(2, 12))
    np.testing.assert_allclose(api.decode_attention(*arrays, **options), whole(*arrays, **options), atol=2e-6)


def test_the_kernel_says_why_it_cannot_run(key):
    arrays = operands(key, 2, 6, 2, 16, 12)
    options = dict(scale=0.3, offset=jnp.int32(9), **segments_of(2, 12))
    with pytest.raises(NotImplementedError, match="needs an NVIDIA GPU"):
        api.decode_attention(*arrays, implementation="triton", **options)
    with pytest.raises(NotImplementedError, match="not float32 over float32"):
        decode_attention.decode_attention(*arrays, **options)
    with pytest.raises(NotImplementedError, match="no sinks"):
        decode_attention.decode_attention(*arrays, **options, sinks=jnp.zeros(6))


@pytest.mark.parametrize("rows, places, split", [(8, 256, 2), (8, 4096, 16), (512, 4096, 1), (8, 128, 1), (40, 512, 2)])
def test_how_many_programs_divide_the_places(rows, places, split):
    assert decode_attention.split_of(rows, places) == split


# --- on a GPU ---


@pytest.mark.gpu
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize(
    "batch, heads, kv, dim, places, offset",
    [(1, 32, 8, 128, 512, 300), (2, 9, 3, 64, 256, [255, 40]), (64, 8, 8, 80, 300, 299), (1, 8, 4, 256, 1024, 1000)],
)
def test_triton_equals_attention(key, options, batch, heads, kv, dim, places, offset):
    for dtype, limit in ((jnp.bfloat16, 1e-2), (jnp.float16, 2e-3)):
        arrays = operands(key, batch, heads, kv, dim, places, dtype)
        every = dict(options, scale=dim**-0.5, offset=jnp.asarray(offset), **segments_of(batch, places))
        run = functools.partial(api.decode_attention, **every)
        assert api.implementations_in(run, *arrays) == {"decode_attention.triton"}
        got, wanted = jax.jit(run)(*arrays), whole(*arrays, **every)
        assert got.dtype == dtype
        error = float(jnp.linalg.norm(got.astype(jnp.float32) - wanted) / jnp.linalg.norm(wanted))
        assert error < limit, (dtype, error)


@pytest.mark.gpu
def test_what_is_not_written_is_not_read(key):
    """Numbers beyond a row's offset, were they NaN, change nothing."""
    q, keys, values, layer = operands(key, 1, 8, 2, 64, 512, jnp.bfloat16)
    options = dict(scale=0.1, offset=jnp.int32(130), **segments_of(1, 512))
    run = jax.jit(functools.partial(api.decode_attention, **options))
    beyond = jnp.arange(512)[:, None, None] >= 192  # of the next tile
    spoilt = [jnp.where(beyond, jnp.asarray(jnp.nan, stack.dtype), stack) for stack in (keys, values)]
    np.testing.assert_array_equal(run(q, keys, values, layer), run(q, *spoilt, layer))
