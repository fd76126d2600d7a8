"""Attention of one token over a stacked cache: the last row of attention over the tokens themselves, which the cache
holds afterwards."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlora.kernels import api, decode_attention
from jaxlora.kernels.attention import attention_reference
from jaxlora.kernels.parts import Parts
from jaxlora.kernels.reference import apply_rope

LAYERS, LAYER = 3, 1
OPTIONS = [{}, {"window": 5}, {"softcap": 3.0}, {"window": 70, "softcap": 20.0}]


def operands(key, batch, heads, kv, dim, places, dtype=jnp.float32):
    """q, k, v, and a cache."""
    keys = jax.random.split(key, 5)
    normal = lambda key, *shape: jax.random.normal(key, shape).astype(dtype)
    one = [normal(key, batch, n, dim) for key, n in zip(keys, (heads, kv, kv), strict=False)]
    return *one, *(normal(key, LAYERS, batch, places, kv, dim) for key in keys[3:]), jnp.int32(LAYER)


def segments_of(batch, places, padding=2):
    """Each row padded on the left by one place more."""
    return (jnp.arange(places) >= padding + jnp.arange(batch)[:, None]).astype(jnp.int32)


def rotary_of(batch, pairs):
    angles = 3.0 * jnp.arange(batch, dtype=jnp.float32)[:, None] + jnp.linspace(0.1, 5.0, pairs)
    return jnp.cos(angles), jnp.sin(angles)


def whole(q, k, v, keys, values, layer, *, offset, segments, rotary=None, interleaved=False, **options):
    """Of each row by itself, over just what it sees, in float32; and the rows' new keys, in their dtype."""
    if rotary is not None:
        turn = lambda x: apply_rope(x[:, None], *(part[:, None] for part in rotary), interleaved=interleaved)[:, 0]
        q, k = turn(q), turn(k)
    rows = []
    for b, last in enumerate(np.broadcast_to(np.asarray(offset), q.shape[:1])):
        first = int(np.argmax(np.asarray(segments[b]) == 1))
        pairs = ((keys, k), (values, v))
        seen = [jnp.concatenate([stack[LAYER, b, first:last], new[b][None]])[None] for stack, new in pairs]
        wide = [x.astype(jnp.float32) for x in (q[b][None, None], *seen)]
        rows.append(attention_reference(*wide, offset=int(last) - first, **options)[0, 0])
    return jnp.stack(rows), k


def check_cache(before, after, new, offset, tolerance=0.0):
    """`after` is `before` with the rows of `new` at their places, where the row has such a place."""
    before, after, new = (np.array(x, np.float32) for x in (before, after, new))
    for b, last in enumerate(np.broadcast_to(np.asarray(offset), new.shape[:1])):
        if last < before.shape[2]:
            np.testing.assert_allclose(after[LAYER, b, last], new[b], atol=tolerance, rtol=tolerance)
            before[LAYER, b, last] = after[LAYER, b, last]
    np.testing.assert_array_equal(before, after)


@pytest.mark.parametrize("pairs, interleaved", [(0, False), (5, False), (3, True)])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("offset", [9, [9, 6]])
def test_the_reference_is_the_last_row_of_attention(key, options, offset, pairs, interleaved):
    arrays = operands(key, 2, 6, 2, 10, 12)
    rotary = rotary_of(2, pairs) if pairs else None
    turns = dict(rotary=rotary, interleaved=interleaved)
    options = dict(options, scale=0.3, offset=jnp.asarray(offset), segments=segments_of(2, 12), **turns)
    out, keys, values = api.decode_attention(*arrays, **options)
    wanted, new_keys = whole(*arrays, **options)
    np.testing.assert_allclose(out, wanted, atol=2e-6)
    check_cache(arrays[3], keys, new_keys, offset)
    check_cache(arrays[4], values, arrays[2], offset)


def test_a_place_beyond_the_last_is_not_written(key):
    arrays = operands(key, 2, 6, 2, 10, 12)
    offset = jnp.asarray([12, 5])
    _, keys, values = api.decode_attention(*arrays, scale=0.3, offset=offset, segments=segments_of(2, 12))
    check_cache(arrays[3], keys, arrays[1], offset)
    check_cache(arrays[4], values, arrays[2], offset)


def test_the_kernel_says_why_it_cannot_run(key):
    arrays = operands(key, 2, 6, 2, 16, 12)
    options = dict(scale=0.3, offset=jnp.int32(9), segments=segments_of(2, 12))
    with pytest.raises(NotImplementedError, match="needs an NVIDIA GPU"):
        api.decode_attention(*arrays, implementation="triton", **options)
    with pytest.raises(NotImplementedError, match="not float32 over float32"):
        decode_attention.decode_attention(*arrays, **options)
    with pytest.raises(NotImplementedError, match="no sinks"):
        decode_attention.decode_attention(*arrays, **options, sinks=jnp.zeros(6))


@pytest.mark.parametrize(
    "rows, places, split", [(8, 512, 1), (8, 4096, 16), (512, 4096, 1), (8, 768, 4), (40, 1024, 2)]
)
def test_how_many_programs_divide_the_places(rows, places, split):
    assert decode_attention.split_of(rows, places) == split


@pytest.mark.parametrize(
    "rows, programs, group, width, pairs, by_warps",
    [
        (1, 8, 4, 128, 64, True),
        (8, 64, 4, 64, 32, True),
        (1, 128, 8, 128, 0, True),
        (9, 72, 4, 128, 64, False),
        (8, 256, 1, 128, 64, False),
        (1, 1, 9, 128, 64, False),
        (1, 8, 4, 256, 64, False),
        (1, 8, 4, 80, 10, False),
        (1, 8, 4, 64, 5, False),
    ],
)
def test_where_warps_have_places_of_their_own(rows, programs, group, width, pairs, by_warps):
    assert decode_attention.is_by_warps(rows, programs, group, width, pairs) == by_warps


def test_parts_are_put_together_as_if_there_were_one(key):
    """A softmax over [4, 50] places, of which the last part sees none."""
    scores, values = jax.random.normal(key, (4, 50)).at[3].set(-jnp.inf), jax.random.normal(key, (4, 50, 8))
    largest = jnp.max(scores, axis=1)
    weights = jnp.exp2(scores - jnp.where(largest == -jnp.inf, 0.0, largest)[:, None])
    out = jnp.einsum("ps,psh->ph", weights, values)[:, None, None]
    together = decode_attention._together(out, largest[:, None, None], jnp.sum(weights, axis=1)[:, None, None])
    wanted = jax.nn.softmax(scores.reshape(-1) * np.log(2)) @ values.reshape(-1, 8)
    np.testing.assert_allclose(together[0, 0], wanted, rtol=1e-5, atol=1e-6)


# --- on a GPU ---


@pytest.mark.gpu
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize(
    "batch, heads, kv, dim, places, offset, pairs, interleaved",
    [
        (1, 32, 8, 128, 512, 300, 64, False),
        (2, 9, 3, 64, 256, [255, 40], 32, False),
        (3, 8, 4, 128, 256, [256, 0, 64], 64, False),
        (16, 8, 8, 80, 300, 299, 10, True),
        (1, 8, 4, 256, 1024, 1000, 0, False),
        (2, 8, 2, 64, 4096, [4000, 130], 16, False),
        (1, 32, 8, 128, 512, 511, 32, True),
        (8, 16, 2, 128, 300, [256, 0, 64, 299, 300, 255, 257, 31], 0, False),
        (1, 7, 1, 64, 8192, 8000, 32, False),
        (12, 32, 8, 128, 512, 300, 64, False),
    ],
)
def test_triton_equals_attention(key, options, batch, heads, kv, dim, places, offset, pairs, interleaved):
    turns = dict(rotary=rotary_of(batch, pairs) if pairs else None, interleaved=interleaved)
    offset, segments = np.asarray(offset), segments_of(batch, places, padding=0)
    is_inside = np.broadcast_to(offset, (batch,)) < places
    for dtype, limit in ((jnp.bfloat16, 1e-2), (jnp.float16, 2e-3)):
        arrays = operands(key, batch, heads, kv, dim, places, dtype)
        every = dict(options, scale=dim**-0.5, offset=jnp.asarray(offset), **turns)
        # Past its own place a row has nothing yet.
        is_past = jnp.arange(places) <= jnp.broadcast_to(offset, (batch,))[:, None]
        every["segments"] = jnp.where(is_past, segments, 0)
        every["segments"] = every["segments"].at[:, 0].set(jnp.where(offset == 0, 1, every["segments"][:, 0]))
        run = functools.partial(api.decode_attention, **every)
        assert api.implementations_in(run, *arrays) == {"decode_attention.triton"}
        out, keys, values = jax.jit(run)(*arrays)
        wanted, new_keys = whole(*arrays, **every)
        assert out.dtype == dtype and bool(jnp.all(jnp.isfinite(out)))
        wanted, out = np.asarray(wanted)[is_inside], np.asarray(out, np.float32)[is_inside]
        error = np.linalg.norm(out - wanted) / np.linalg.norm(wanted)
        assert error < limit, (dtype, error)
        check_cache(arrays[3], keys, new_keys, offset, tolerance=float(jnp.finfo(dtype).eps))
        check_cache(arrays[4], values, arrays[2], offset)


@pytest.mark.gpu
@pytest.mark.parametrize("count", [2, 5, 8])
@pytest.mark.parametrize(
    "batch, heads, kv, dim, places, offset, pairs, interleaved",
    [
        (64, 32, 8, 128, 256, 190, 64, False),
        (9, 9, 3, 64, 256, [255, 40, 3, 3, 3, 7, 200, 0, 256], 32, False),
        (10, 8, 8, 80, 300, 299, 10, True),
        (12, 8, 4, 48, 100, 60, 0, False),
        (9, 8, 2, 64, 4096, 4000, 16, False),
    ],
)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_triton_adds_up_parts(key, dtype, batch, heads, kv, dim, places, offset, pairs, interleaved, count):
    *_, keys, values, layer = operands(key, batch, heads, kv, dim, places, dtype)
    keys_of = jax.random.split(jax.random.key(7), 3)
    shapes = [(count, batch, n, dim) for n in (heads, kv, kv)]
    normal = functools.partial(jax.random.normal, dtype=jnp.bfloat16 if count == 5 else jnp.float32)
    parts = [Parts(normal(k, shape), jnp.dtype(dtype)) for k, shape in zip(keys_of, shapes, strict=True)]
    sums = [jnp.asarray(functools.reduce(np.add, np.asarray(each.parts, np.float32)).astype(dtype)) for each in parts]
    turns = dict(rotary=rotary_of(batch, pairs) if pairs else None, interleaved=interleaved)
    is_past = jnp.arange(places) <= jnp.broadcast_to(jnp.asarray(offset), (batch,))[:, None]
    options = dict(scale=dim**-0.5, offset=jnp.asarray(offset), segments=is_past.astype(jnp.int32), **turns)
    run = functools.partial(api.decode_attention, **options)
    assert api.implementations_in(run, *parts, keys, values, layer) == {"decode_attention.triton"}
    got = jax.jit(run)(*parts, keys, values, layer)
    for ours, theirs in zip(got, jax.jit(run)(*sums, keys, values, layer), strict=True):
        np.testing.assert_array_equal(ours, theirs)  # one order of the sums, rounded before they are turned
    wanted = jax.jit(functools.partial(run, implementation="reference"))(*sums, keys, values, layer)[0]
    is_inside = np.broadcast_to(np.asarray(offset), (batch,)) < places
    wanted, out = (np.asarray(x, np.float32)[is_inside] for x in (wanted, got[0]))
    limit = {jnp.bfloat16: 1e-2, jnp.float16: 2e-3}[dtype]
    assert np.linalg.norm(out - wanted) < limit * np.linalg.norm(wanted)


@pytest.mark.gpu
@pytest.mark.parametrize("which", [(0,), (1, 2)])
def test_parts_of_some_are_added_up_before(key, which):
    q, k, v, keys, values, layer = operands(key, 9, 8, 2, 64, 128, jnp.bfloat16)
    options = dict(scale=0.1, offset=jnp.int32(100), segments=segments_of(9, 128))
    run = jax.jit(functools.partial(api.decode_attention, implementation="triton", **options))
    halves = lambda x: Parts(jnp.stack([0.5 * x.astype(jnp.float32)] * 2), x.dtype)
    mixed = [halves(x) if i in which else x for i, x in enumerate((q, k, v))]
    for ours, theirs in zip(run(*mixed, keys, values, layer), run(q, k, v, keys, values, layer), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.gpu
def test_what_is_not_written_is_not_read(key):
    """Numbers from a row's place on, were they NaN, change nothing."""
    q, k, v, keys, values, layer = operands(key, 1, 8, 2, 64, 1024, jnp.bfloat16)
    options = dict(scale=0.1, offset=jnp.int32(130), segments=segments_of(1, 1024))
    run = jax.jit(functools.partial(api.decode_attention, **options))
    beyond = jnp.arange(1024)[:, None, None] >= 130
    spoilt = [jnp.where(beyond, jnp.asarray(jnp.nan, stack.dtype), stack) for stack in (keys, values)]
    np.testing.assert_array_equal(run(q, k, v, keys, values, layer)[0], run(q, k, v, *spoilt, layer)[0])


@pytest.mark.gpu
def test_a_loop_updates_its_cache_in_place(key):
    """What a donated cache needs beside itself is less than one of its stacks."""
    q, k, v, keys, values, layer = operands(key, 1, 8, 2, 64, 1024, jnp.bfloat16)

    def loop(keys, values):
        def step(place, state):
            options = dict(scale=0.1, offset=place, segments=segments_of(1, 1024))
            out, *stacks = api.decode_attention(q, k, v, *state[1:], layer, **options)
            return state[0] + out, *stacks

        return jax.lax.fori_loop(100, 110, step, (jnp.zeros_like(q), keys, values))

    compiled = jax.jit(loop, donate_argnums=(0, 1)).lower(keys, values).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < keys.nbytes
