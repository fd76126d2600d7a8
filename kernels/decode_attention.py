"""Attention of one new token over a cache, in one Triton kernel that reads the layer's part of the stacked cache.

    out[b, n] = softmax over places s <= offset[b] of (q[b, n] . k[b, s, n / g] * scale)  times  v[b, s, n / g]

The maths and the masks are those of `attention`, for one query a row. What is gained: only places that are written are
read, once, for all g query heads of a key head; no layer of the cache is copied out of its stack; and no scores are
written. A row and key head is the work of one program, or of `split` programs that divide the places and leave float32
parts, which XLA puts together: softmax over places is a sum with weights exp(max - largest max).

Layout: q [B, N, H]; keys, values [layers, B, S, K, H]; query_segments [B]; key_segments [B, S]; offset int32 [B].
"""

import functools
from typing import no_type_check

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxlora.kernels.attention import attention_reference

PLACES = 64  # of a tile


def decode_attention_reference(
    q: Float[Array, "b n h"],
    keys: Float[Array, "layers b s kv h"],
    values: Float[Array, "layers b s kv h"],
    layer: Int[Array, ""],
    *,
    scale: float,
    offset: Int[Array, "*b"],
    window: int | None = None,
    softcap: float | None = None,
    key_bias: Float[Array, "b n s"] | None = None,
    sinks: Float[Array, " n"] | None = None,
    query_segments: Int[Array, " b"],
    key_segments: Int[Array, "b s"],
) -> Float[Array, "b n h"]:
    """`attention_reference` for one query a row. Keys and values of another dtype are cast to q's."""
    k, v = (jax.lax.dynamic_index_in_dim(stack, layer, keepdims=False).astype(q.dtype) for stack in (keys, values))
    return attention_reference(
        q[:, None], k, v, scale=scale, window=window, softcap=softcap, key_bias=key_bias, sinks=sinks,
        query_segments=query_segments[:, None], key_segments=key_segments, offset=offset,
    )[:, 0]  # fmt: skip


@functools.cache
@no_type_check  # a type checker's wrapper around the function would hide its source from Triton
def _kernel():
    """The Triton function. Built on first use, since the library imports where Triton is not installed."""
    import triton
    import triton.language as tl

    @triton.jit
    def decode_attention(
        q,  # [B, N, H]
        keys,  # [layers, B, S, K, H]
        values,
        layer,  # int32 []
        offset,  # int32 [B]
        query_segments,  # int32 [B]
        key_segments,  # int32 [B, S]
        out,  # [B, N, H], or float32 [SPLIT, B, N, H]
        largest,  # float32 [SPLIT, B, N]; unwritten if SPLIT is 1
        total,
        B: tl.constexpr,
        N: tl.constexpr,
        S: tl.constexpr,
        K: tl.constexpr,
        H: tl.constexpr,
        SCALE: tl.constexpr,  # times log2(e)
        SOFTCAP: tl.constexpr,  # 0 for none
        WINDOW: tl.constexpr,  # 0 for none
        SPLIT: tl.constexpr,
        TILE: tl.constexpr,
        ROWS: tl.constexpr,  # query heads of a key head, and at least what a product wants
        WIDTH: tl.constexpr,  # H, up to a power of two
    ):
        LOG2E: tl.constexpr = 1.4426950408889634
        GROUP: tl.constexpr = N // K
        b, head = tl.program_id(0) // K, tl.program_id(0) % K
        part = tl.program_id(1)
        here = tl.load(offset + b)
        segment = tl.load(query_segments + b)
        start = (tl.load(layer).to(tl.int64) * B + b) * (S * K * H) + head * H
        row, column, place = tl.arange(0, ROWS), tl.arange(0, WIDTH), tl.arange(0, TILE)
        is_head, is_column = row < GROUP, column < H
        at = (b * N + head * GROUP + row[:, None]) * H + column[None, :]
        query = tl.load(q + at, mask=is_head[:, None] & is_column[None, :], other=0.0)

        first = 0
        if WINDOW:
            first = tl.maximum(here - (WINDOW - 1), 0) // TILE
        tiles = tl.minimum(here, S - 1) // TILE + 1 - first
        each = (tiles + SPLIT - 1) // SPLIT
        low = first + part * each
        high = tl.minimum(low + each, first + tiles)
        top = tl.full((ROWS,), float("-inf"), tl.float32)
        sum_ = tl.zeros((ROWS,), tl.float32)
        result = tl.zeros((ROWS, WIDTH), tl.float32)
        for tile in range(low, high):
            s = tile * TILE + place
            is_seen = (s <= here) & (tl.load(key_segments + b * S + s, mask=s < S, other=0) == segment)
            if WINDOW:
                is_seen = is_seen & (here - s < WINDOW)
            address = start + s[:, None].to(tl.int64) * (K * H) + column[None, :]
            inside = (s < S)[:, None] & is_column[None, :]
            key = tl.load(keys + address, mask=inside, other=0.0)
            value = tl.load(values + address, mask=inside, other=0.0)
            scores = tl.dot(query, tl.trans(key)) * SCALE
            if SOFTCAP > 0:
                ratio = scores / (SOFTCAP * LOG2E)
                even = tl.exp2(tl.abs(ratio) * (-2 * LOG2E))  # tanh |r| = (1 - e^-2|r|) / (1 + e^-2|r|)
                scores = SOFTCAP * LOG2E * tl.where(ratio < 0, -1.0, 1.0) * (1.0 - even) / (1.0 + even)
            scores = tl.where(is_seen[None, :], scores, float("-inf"))
            now = tl.maximum(top, tl.max(scores, 1))
            safe = tl.where(now == float("-inf"), 0.0, now)  # a tile in which nothing is seen
            weights = tl.exp2(scores - safe[:, None])
            shrink = tl.exp2(top - safe)
            sum_ = sum_ * shrink + tl.sum(weights, 1)
            result = result * shrink[:, None] + tl.dot(weights.to(value.dtype), value)
            top = now

        to_store = is_head[:, None] & is_column[None, :]
        if SPLIT == 1:
            # A row that is nobody's may see nothing.
            sum_ = tl.where(sum_ > 0.0, sum_, 1.0)
            tl.store(out + at, (result / sum_[:, None]).to(out.dtype.element_ty), mask=to_store)
        else:
            tl.store(out + part * (B * N * H) + at, result, mask=to_store)
            heads = part * (B * N) + b * N + head * GROUP + row
            tl.store(largest + heads, top, mask=is_head)
            tl.store(total + heads, sum_, mask=is_head)

    return decode_attention


def split_of(rows: int, places: int) -> int:
    """Programs that divide the places, for so many rows times key heads: as many as an H100 has room for, of 128 places
    and more."""
    split = 1
    while 2 * split * rows <= 132 and 256 * split <= places and split < 16:
        split *= 2
    return split


def decode_attention(
    q: Float[Array, "b n h"],
    keys: Float[Array, "layers b s kv h"],
    values: Float[Array, "layers b s kv h"],
    layer: Int[Array, ""],
    *,
    scale: float,
    offset: Int[Array, "*b"],
    window: int | None = None,
    softcap: float | None = None,
    key_bias: Float[Array, "b n s"] | None = None,
    sinks: Float[Array, " n"] | None = None,
    query_segments: Int[Array, " b"],
    key_segments: Int[Array, "b s"],
) -> Float[Array, "b n h"]:
    """`decode_attention_reference` as a Triton kernel. Every query must see at least itself.

    Raises:
      NotImplementedError: jax-triton is not installed, q is none of bfloat16 and float16, the cache is of another
        dtype, or there is a bias of the keys or a sink.
    """
    if key_bias is not None or sinks is not None:
        raise NotImplementedError("the kernel has no bias of the keys and no sinks")
    if q.dtype not in (jnp.bfloat16, jnp.float16) or keys.dtype != q.dtype or values.dtype != q.dtype:
        raise NotImplementedError(
            f"the kernel takes bfloat16 or float16, q and cache alike, not {q.dtype.name} over {keys.dtype.name}"
        )
    try:
        import jax_triton
    except ImportError as error:
        raise NotImplementedError(f"the kernel needs jax-triton and triton ({error})") from error

    (batch, heads, _), (_, _, places, kv, _) = q.shape, keys.shape
    split = split_of(batch * kv, places)
    part = jax.ShapeDtypeStruct((split, batch, heads), jnp.float32)
    call = functools.partial(
        jax_triton.triton_call,
        kernel=_kernel(),
        out_shape=[jax.ShapeDtypeStruct((split, *q.shape), q.dtype if split == 1 else jnp.float32), part, part],
        grid=(batch * kv, split),
        num_warps=4,
        num_stages=3,
        **constants(q.shape, keys.shape, scale, softcap, window, split),
    )

    @jax.custom_batching.sequential_vmap
    def run(q, keys, values, layer, offset, query_segments, key_segments):
        out, largest, total = call(q, keys, values, layer, offset, query_segments, key_segments)
        if split == 1:
            return out[0]
        share = jnp.exp2(largest - jnp.maximum(jnp.max(largest, axis=0), -1e30))  # 0 where a part saw nothing
        weight = jnp.sum(total * share, axis=0)[..., None]
        return (jnp.sum(out * share[..., None], axis=0) / jnp.where(weight > 0, weight, 1.0)).astype(q.dtype)

    offset = jnp.broadcast_to(jnp.asarray(offset, jnp.int32), (batch,))
    return run(q, keys, values, layer, offset, query_segments, key_segments)


def constants(q_shape, cache_shape, scale, softcap, window, split) -> dict:
    """The kernel's compile-time arguments."""
    (batch, heads, width), (_, _, places, kv, _) = q_shape, cache_shape
    at_least_16 = lambda n: max(16, 1 << (n - 1).bit_length())
    tile = PLACES if width <= 128 else PLACES // 2  # three of keys and of values are on their way in shared memory
    return dict(
        B=batch, N=heads, S=places, K=kv, H=width, SCALE=scale * 1.4426950408889634, SOFTCAP=softcap or 0.0,
        WINDOW=window or 0, SPLIT=split, TILE=tile, ROWS=at_least_16(heads // kv), WIDTH=at_least_16(width),
    )  # fmt: skip
