"""Attention of one new token a row, in one Triton kernel that turns q and k by their positions, puts k and v into the
row's place of a stacked cache, and attends over what stands there.

    out[b, n] = softmax over places s <= offset[b] of (q[b, n] . k[b, s, n / g] * scale)  times  v[b, s, n / g]

The maths and the masks are those of `attention`, for one query a row. What is gained: only places that are written are
read, once, for all g query heads of a key head; no layer of the cache is copied out of its stack; no scores are
written; and the cache is updated in place. A row and key head is the work of one program, or of `split` programs that
divide the places and leave float32 parts, which XLA puts together: softmax over places is a sum with weights
exp(max - largest max). The new key and value never come from memory: the first program has them in registers and is the
only one to touch their place, so that no program waits for another. q, k and v may be products that are not added up
yet (`parts.Parts`): a program adds up what it reads of them, and rounds the sums before it turns them.
The result may be `Ordered` for the product that reads it. Where a program is alone on its SM, its warps divide the
places once more (`decode_attention_warps`, which says how).

Layout: q [B, N, H]; k, v [B, K, H], or parts [P, B, ...] of each; keys, values [layers, B, S, K, H]; cos, sin float32
[B, pairs]; segments [B, S], of which a place is seen whose id is that of the token's own place; offset int32 [] or [B].
"""

import functools
from typing import Any, no_type_check

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxlora.kernels import decode_attention_warps as by_warps
from jaxlora.kernels.ahead import line_kernel
from jaxlora.kernels.attention import attention_reference
from jaxlora.kernels.graph_call import triton_call
from jaxlora.kernels.h100 import SMS
from jaxlora.kernels.ordered import STEP, Ordered, padded, shape_of
from jaxlora.kernels.parts import Parts, summed
from jaxlora.kernels.reference import apply_rope

PLACES = 64  # of a tile
WHOLE = 512  # places up to which they are not divided, since putting parts together is one more kernel

Rotary = tuple[Float[Array, "b pairs"], Float[Array, "b pairs"]]
Attended = tuple[Float[Array, "b n h"], Float[Array, "layers b s kv h"], Float[Array, "layers b s kv h"]]


def write_cache(
    stacked: Float[Array, "layers b s kv h"],
    new: Float[Array, "b t kv h"],
    layer: Int[Array, ""],
    offset: Int[Array, "*b"] | int,
) -> Float[Array, "layers b s kv h"]:
    """`new` put into a stacked cache at one layer, from place `offset` on, or each row's `offset`.

    float8 takes what is beyond its range as its largest value, and not as NaN. A place beyond the last of a row's own
    is not written.
    """
    if stacked.dtype.itemsize == 1:
        new = jnp.clip(new, *(jnp.asarray(limit, new.dtype) for limit in _range(stacked.dtype)))
    new = new.astype(stacked.dtype)
    if jnp.ndim(offset) == 0:
        return jax.lax.dynamic_update_slice(stacked, new[None], (layer, 0, offset, 0, 0))
    rows, places = rows_and_places(jnp.asarray(offset), new.shape[1])
    return stacked.at[layer, rows, places].set(new, indices_are_sorted=True, unique_indices=True)


def _range(dtype: Any) -> tuple[float, float]:
    info = jnp.finfo(dtype)
    return float(info.min), float(info.max)


def rows_and_places(offset: Int[Array, " b"], tokens: int) -> tuple[Int[Array, "b 1"], Int[Array, "b t"]]:
    """Indices of the places that T tokens of each row take from its offset on."""
    rows = jnp.arange(offset.shape[0], dtype=jnp.int32)[:, None]
    return rows, offset[:, None] + jnp.arange(tokens, dtype=jnp.int32)


def decode_attention_reference(
    q: Float[Array, "b n h"] | Parts,
    k: Float[Array, "b kv h"] | Parts,
    v: Float[Array, "b kv h"] | Parts,
    keys: Float[Array, "layers b s kv h"],
    values: Float[Array, "layers b s kv h"],
    layer: Int[Array, ""],
    *,
    rotary: Rotary | None = None,
    interleaved: bool = False,
    scale: float,
    offset: Int[Array, "*b"],
    window: int | None = None,
    softcap: float | None = None,
    key_bias: Float[Array, "b n s"] | None = None,
    sinks: Float[Array, " n"] | None = None,
    segments: Int[Array, "b s"],
    ordered: Any = None,
) -> Attended:
    """`apply_rope`, `write_cache` and `attention_reference` for one token a row: the result, and the stacks with the
    token in them. Keys and values of another dtype are cast to q's. Parts of q, k and v are added up first.
    With `ordered` the result may be `Ordered` [B, N H], as a kernel makes it; here it is not."""
    q, k, v = (summed(each)[:, None] for each in (q, k, v))
    if rotary is not None:
        q, k = (apply_rope(each, *(part[:, None] for part in rotary), interleaved=interleaved) for each in (q, k))
    keys, values = write_cache(keys, k, layer, offset), write_cache(values, v, layer, offset)
    k, v = (jax.lax.dynamic_index_in_dim(stack, layer, keepdims=False).astype(q.dtype) for stack in (keys, values))
    own = jnp.take_along_axis(segments, jnp.broadcast_to(offset, q.shape[:1])[:, None], axis=1, mode="clip")
    out = attention_reference(
        q, k, v, scale=scale, window=window, softcap=softcap, key_bias=key_bias, sinks=sinks,
        query_segments=own, key_segments=segments, offset=offset,
    )  # fmt: skip
    return out[:, 0], keys, values


@functools.cache
@no_type_check  # a type checker's wrapper around the function would hide its source from Triton
def _kernel():
    """The Triton function. Built on first use, since the library imports where Triton is not installed."""
    import triton
    import triton.language as tl

    fetch_line = line_kernel()

    @triton.jit
    def fetch(row, places, written, K: tl.constexpr, H: tl.constexpr, TILE: tl.constexpr, LINES: tl.constexpr):
        """Ask for a tile of keys or values to be put into L2, by lines of 128 bytes."""
        number = tl.arange(0, TILE * LINES)
        place, column = places + number // LINES, number % LINES * 64
        pointer = (row + place.to(tl.int64) * (K * H) + column).to(tl.int64)
        fetch_line(pointer, (place < written) & (column < H))

    @triton.jit
    def asked(place, inside, PARTS: tl.constexpr, STRIDE: tl.constexpr):
        """Numbers of q, k or v, or those of each of their parts."""
        each = (tl.load(place, mask=inside, other=0.0),)
        for i in tl.static_range(1, PARTS):
            each = each + (tl.load(place + i * STRIDE, mask=inside, other=0.0),)
        return each

    @triton.jit
    def added(each, dtype: tl.constexpr):
        """Their sum, rounded once, the first part first."""
        x = each[0].to(tl.float32)
        for i in tl.static_range(1, len(each)):
            x += each[i].to(tl.float32)
        return x.to(dtype)

    @triton.jit
    def asked_of_head(
        head, column, inside, cos, sin,
        PAIRS: tl.constexpr, INTERLEAVED: tl.constexpr, PARTS: tl.constexpr, STRIDE: tl.constexpr,
    ):  # fmt: skip
        """What `turned` takes: the numbers of a head or some, those that they are turned with, cosines and sines."""
        x = asked(head + column, inside, PARTS, STRIDE)
        if PAIRS == 0:
            return x, x, 1.0, 0.0
        else:
            if INTERLEAVED:
                pair, partner, is_first = column // 2, column ^ 1, column % 2 == 0
            else:
                is_first = column < PAIRS
                pair = tl.where(is_first, column, column - PAIRS)
                partner = tl.where(is_first, column + PAIRS, column - PAIRS)
            is_turned = column < 2 * PAIRS
            other = asked(head + partner, inside & is_turned, PARTS, STRIDE)
            cosine = tl.load(cos + pair, mask=is_turned, other=1.0)
            sine = tl.load(sin + pair, mask=is_turned, other=0.0)
            return x, other, cosine, tl.where(is_first, -sine, sine)

    @triton.jit
    def turned(x, other, cosine, sine, dtype: tl.constexpr, PAIRS: tl.constexpr):
        """The numbers of a head or some, turned by their row's position."""
        x = added(x, dtype)
        if PAIRS > 0:
            x = (x.to(tl.float32) * cosine + added(other, dtype).to(tl.float32) * sine).to(dtype)
        return x

    @triton.jit
    def capped(scores, SOFTCAP: tl.constexpr):
        """softcap * tanh(scores / softcap), of scores that are times log2(e), and so the result."""
        LOG2E: tl.constexpr = 1.4426950408889634
        if SOFTCAP > 0:
            ratio = scores / (SOFTCAP * LOG2E)
            even = tl.exp2(tl.abs(ratio) * (-2 * LOG2E))  # tanh |r| = (1 - e^-2|r|) / (1 + e^-2|r|)
            scores = SOFTCAP * LOG2E * tl.where(ratio < 0, -1.0, 1.0) * (1.0 - even) / (1.0 + even)
        return scores

    @triton.jit
    def decode_attention(
        q,  # [B, N, H], or float32 or bfloat16 [PARTS, B, N, H]
        k,  # [B, K, H], or parts
        v,
        keys,  # [layers, B, S, K, H]
        values,
        layer,  # int32 []
        cos,  # float32 [B, PAIRS]; unread if PAIRS is 0
        sin,
        offset,  # int32 [B], or [] if ONE_OFFSET
        segments,  # int32 [B, S]
        out,  # [B, N, H], or float32 [SPLIT, B, N, H], or the data of `Ordered` [B, N H]
        largest,  # float32 [SPLIT, B, N]; unwritten if SPLIT is 1
        total,
        new_keys,  # where keys and values are
        new_values,
        B: tl.constexpr,
        N: tl.constexpr,
        S: tl.constexpr,
        K: tl.constexpr,
        H: tl.constexpr,
        ONE_OFFSET: tl.constexpr,
        PAIRS: tl.constexpr,  # of numbers of a head that turn
        INTERLEAVED: tl.constexpr,
        SCALE: tl.constexpr,  # times log2(e)
        SOFTCAP: tl.constexpr,  # 0 for none
        WINDOW: tl.constexpr,  # 0 for none
        PARTS: tl.constexpr,  # of q, k and v; 0 where they are added up already
        SPLIT: tl.constexpr,
        TILE: tl.constexpr,
        ROWS: tl.constexpr,  # query heads of a key head, and at least what a product wants
        WIDTH: tl.constexpr,  # H, up to a power of two
        PADDED: tl.constexpr,  # rows, up to a multiple of 8, of `Ordered`; 0 where out is not that
        FETCHES: tl.constexpr,  # whether the first places are fetched into L2
        LINES: tl.constexpr,  # of 128 bytes, of a head, up to a power of two
    ):
        GROUP: tl.constexpr = N // K
        b, head = tl.program_id(0) // K, tl.program_id(0) % K
        part = tl.program_id(1)
        if not ONE_OFFSET:
            offset += b
        here = tl.load(offset)
        segments += b * S
        segment = tl.load(segments + tl.minimum(here, S - 1))
        start = (tl.load(layer).to(tl.int64) * B + b) * (S * K * H) + head * H
        row, column, place = tl.arange(0, ROWS), tl.arange(0, WIDTH), tl.arange(0, TILE)
        written = tl.minimum(here, S)
        first = 0
        if WINDOW:
            first = tl.maximum(here - (WINDOW - 1), 0) // TILE
        tiles = tl.maximum((written + TILE - 1) // TILE - first, 0)
        each = (tiles + SPLIT - 1) // SPLIT
        low = first + part * each
        high = tl.minimum(low + each, first + tiles)
        if FETCHES:
            # The first places come while q, k and v are put together.
            end = tl.minimum(written, high * TILE)
            fetch(keys + start, low * TILE, end, K, H, TILE, LINES)
            fetch(values + start, low * TILE, end, K, H, TILE, LINES)
        is_head, is_column = row < GROUP, column < H
        heads = b * N + head * GROUP + row
        at = heads[:, None] * H + column[None, :]
        to_store = is_head[:, None] & is_column[None, :]
        cos += b * PAIRS
        sin += b * PAIRS
        # All are asked for before one is used.
        dtype: tl.constexpr = keys.dtype.element_ty
        of_queries: tl.constexpr = B * N * H
        of_keys: tl.constexpr = B * K * H
        from_query, from_key = q + heads[:, None] * H, k + (b * K + head) * H
        x, other, cosine, sine = asked_of_head(
            from_query, column[None, :], to_store, cos, sin, PAIRS, INTERLEAVED, PARTS, of_queries
        )
        key_x, key_other, key_cosine, key_sine = asked_of_head(
            from_key, column, is_column, cos, sin, PAIRS, INTERLEAVED, PARTS, of_keys
        )
        value_x = asked(v + (b * K + head) * H + column, is_column, PARTS, of_keys)
        query = turned(x, other, cosine, sine, dtype, PAIRS)
        own_key = turned(key_x, key_other, key_cosine, key_sine, dtype, PAIRS)
        own_value = added(value_x, dtype)

        # The token itself, which is the first program's. A place beyond the last is neither written nor seen.
        is_own = (part == 0) & (here < S)
        own = start + here.to(tl.int64) * (K * H) + column
        tl.store(new_keys + own, own_key, mask=is_column & is_own)
        tl.store(new_values + own, own_value, mask=is_column & is_own)
        own_score = capped(tl.sum(query.to(tl.float32) * own_key.to(tl.float32)[None, :], 1) * SCALE, SOFTCAP)
        top = tl.where(is_own, own_score, float("-inf"))
        sum_ = tl.where(is_own, tl.full((ROWS,), 1.0, tl.float32), 0.0)
        result = tl.where(is_own, tl.zeros((ROWS, WIDTH), tl.float32) + own_value.to(tl.float32)[None, :], 0.0)

        # Those before it.
        for tile in range(low, high):
            s = tile * TILE + place
            is_seen = tl.load(segments + s, mask=s < written, other=0) == segment
            is_seen = is_seen & (s < written)
            if WINDOW:
                is_seen = is_seen & (here - s < WINDOW)
            address = start + s[:, None].to(tl.int64) * (K * H) + column[None, :]
            inside = (s < written)[:, None] & is_column[None, :]
            key = tl.load(keys + address, mask=inside, other=0.0)
            value = tl.load(values + address, mask=inside, other=0.0)
            score = capped(tl.dot(query, tl.trans(key)) * SCALE, SOFTCAP)
            score = tl.where(is_seen[None, :], score, float("-inf"))
            now = tl.maximum(top, tl.max(score, 1))
            safe = tl.where(now == float("-inf"), 0.0, now)  # a tile in which nothing is seen
            weights = tl.exp2(score - safe[:, None])
            shrink = tl.exp2(top - safe)
            sum_ = sum_ * shrink + tl.sum(weights, 1)
            result = result * shrink[:, None] + tl.dot(weights.to(value.dtype), value)
            top = now

        if SPLIT == 1:
            # A row that is nobody's may see nothing.
            sum_ = tl.where(sum_ > 0.0, sum_, 1.0)
            result = (result / sum_[:, None]).to(out.dtype.element_ty)
            if PADDED:  # 64 elements [t, 2 s + u, h] as [2 s + u, t, h]
                result = tl.permute(tl.reshape(result, (ROWS, WIDTH // 64, 4, 8, 2)), (0, 1, 3, 2, 4))
                result = tl.reshape(result, (ROWS, WIDTH))
                piece = (head * GROUP + row)[:, None] * (H // 8) + (column // 8)[None, :]
                at = piece * (8 * PADDED) + b * 8 + (column % 8)[None, :]
            tl.store(out + at, result, mask=to_store)
        else:
            tl.store(out + part * (B * N * H) + at, result, mask=to_store)
            tl.store(largest + part * (B * N) + heads, top, mask=is_head)
            tl.store(total + part * (B * N) + heads, sum_, mask=is_head)

    return decode_attention


def split_of(rows: int, places: int) -> int:
    """Programs that divide the places, for so many rows times key heads: as many as an H100 has room for, of 128 places
    and more; one for `WHOLE` places and fewer."""
    split = 1
    while places > WHOLE and 2 * split * rows <= SMS and 256 * split <= places and split < 16:
        split *= 2
    return split


def is_by_warps(rows: int, programs: int, group: int, width: int, pairs: int) -> bool:
    """Whether `decode_attention_warps` attends: each program is alone on its SM, and there are no more rows than
    products leave whole and plain, for it reads neither parts nor writes `Ordered`."""
    fits = group <= by_warps.MOST_HEADS and width in by_warps.WIDTHS and pairs % 2 == 0
    return rows <= by_warps.MOST_ROWS and programs <= SMS and fits


def layout(programs: int) -> dict[str, int]:
    """Warps of each of so many programs, and tiles under way. A program alone on its SM fetches ahead; where there are
    several, one computes while others wait, and tiles under way only take the room of more of them.

    On an H100, 190 places: one row of 8 key heads took 6.5 us with 4 warps and 3 tiles, 6.3 with 8 warps, 9.1 with one
    tile; 64 rows 27.7, 26.9, and 23.0 with 4 warps and one tile.
    """
    if programs > 2 * SMS:
        return dict(num_warps=4, num_stages=1)
    return dict(num_warps=8 if programs <= SMS else 4, num_stages=3)


def decode_attention(
    q: Float[Array, "b n h"] | Parts,
    k: Float[Array, "b kv h"] | Parts,
    v: Float[Array, "b kv h"] | Parts,
    keys: Float[Array, "layers b s kv h"],
    values: Float[Array, "layers b s kv h"],
    layer: Int[Array, ""],
    *,
    rotary: Rotary | None = None,
    interleaved: bool = False,
    scale: float,
    offset: Int[Array, "*b"],
    window: int | None = None,
    softcap: float | None = None,
    key_bias: Float[Array, "b n s"] | None = None,
    sinks: Float[Array, " n"] | None = None,
    segments: Int[Array, "b s"],
    ordered: Any = None,
) -> tuple[Any, Float[Array, "layers b s kv h"], Float[Array, "layers b s kv h"]]:
    """`decode_attention_reference` as a Triton kernel. Every query must see at least itself. With `ordered` the result
    is `Ordered` [B, N H] where places are not divided, H is a multiple of 64, and N H one of 256: in q's dtype,
    whichever is named.

    An `offset` for all rows must be a place of the cache: the reference clamps it, and this writes nothing.

    Raises:
      NotImplementedError: jax-triton is not installed, q is none of bfloat16 and float16, k, v or the cache is of
        another dtype, or there is a bias of the keys or a sink.
    """
    if key_bias is not None or sinks is not None:
        raise NotImplementedError("the kernel has no bias of the keys and no sinks")
    if q.dtype not in (jnp.bfloat16, jnp.float16) or {x.dtype for x in (k, v, keys, values)} != {q.dtype}:
        raise NotImplementedError(
            f"the kernel takes bfloat16 or float16, q, k, v and cache alike, not {q.dtype.name} over {keys.dtype.name}"
        )
    try:
        import jax_triton  # noqa: F401
    except ImportError as error:
        raise NotImplementedError(f"the kernel needs jax-triton and triton ({error})") from error

    if len({each.count if isinstance(each, Parts) else 0 for each in (q, k, v)}) > 1:
        q, k, v = (summed(each) for each in (q, k, v))
    parts = q.count if isinstance(q, Parts) else 0
    (batch, heads, width), (_, _, places, kv, _) = q.shape, keys.shape
    split, pairs = split_of(batch * kv, places), 0 if rotary is None else rotary[0].shape[-1]
    part = jax.ShapeDtypeStruct((split, batch, heads), jnp.float32)
    out_dtype = q.dtype if split == 1 else jnp.float32
    is_ordered = ordered is not None and split == 1 and width % 64 == 0 and heads * width % STEP == 0
    out_shape = shape_of(batch, heads * width) if is_ordered else (split, *q.shape)
    shapes = [jax.ShapeDtypeStruct(out_shape, out_dtype), part, part]
    programs, one_offset = batch * kv * split, jnp.ndim(offset) == 0
    options = q.shape, keys.shape, one_offset, pairs, interleaved, scale, softcap, window, split
    if not parts and not is_ordered and is_by_warps(batch, programs, heads // kv, width, pairs):
        kernel = by_warps.kernel(q.dtype, by_warps.NUM_WARPS, heads // kv, width)
        how = dict(num_warps=by_warps.NUM_WARPS, **by_warps.constants(*options))
    else:
        kernel = _kernel()
        how = layout(programs) | constants(*options, parts, padded(batch) if is_ordered else 0)
    call = functools.partial(
        triton_call,
        kernel=kernel,
        out_shape=[*shapes, *(jax.ShapeDtypeStruct(stack.shape, stack.dtype) for stack in (keys, values))],
        input_output_aliases={3: 3, 4: 4},
        grid=(batch * kv, split),
        **how,
    )

    @jax.custom_batching.sequential_vmap
    def run(q, k, v, keys, values, layer, cos, sin, offset, segments):
        out, largest, total, keys, values = call(q, k, v, keys, values, layer, cos, sin, offset, segments)
        if is_ordered:
            return Ordered(out, (batch, heads * width), out.dtype), keys, values
        return out[0] if split == 1 else _together(out, largest, total).astype(keys.dtype), keys, values

    q, k, v = (each.parts if isinstance(each, Parts) else each for each in (q, k, v))
    cos, sin = (q, q) if rotary is None else rotary
    return run(q, k, v, keys, values, layer, cos, sin, jnp.asarray(offset, jnp.int32), segments)


def _together(out: Array, largest: Array, total: Array) -> Array:
    """The parts [split, B, N, H] put together. Sums are written out, so that XLA makes one kernel of them."""
    parts = range(out.shape[0])
    top = jnp.maximum(functools.reduce(jnp.maximum, [largest[i] for i in parts]), -1e30)
    shares = [jnp.exp2(largest[i] - top) for i in parts]  # 0 where a part saw nothing
    weight = functools.reduce(jnp.add, [total[i] * shares[i] for i in parts])[..., None]
    whole = functools.reduce(jnp.add, [out[i] * shares[i][..., None] for i in parts])
    return whole / jnp.where(weight > 0, weight, 1.0)


def constants(
    q_shape, cache_shape, one_offset, pairs, interleaved, scale, softcap, window, split, parts=0, padded=0
) -> dict:
    """The kernel's compile-time arguments; padded: 0, or the rows of `Ordered`."""
    (batch, heads, width), (_, _, places, kv, _) = q_shape, cache_shape
    at_least_16 = lambda n: max(16, 1 << (n - 1).bit_length())
    tile = PLACES if width <= 128 else PLACES // 2  # three of keys and of values are on their way in shared memory
    return dict(
        B=batch, N=heads, S=places, K=kv, H=width, ONE_OFFSET=one_offset, PAIRS=pairs, INTERLEAVED=interleaved,
        SCALE=scale * 1.4426950408889634, SOFTCAP=softcap or 0.0, WINDOW=window or 0, SPLIT=split, TILE=tile,
        PARTS=parts, ROWS=at_least_16(heads // kv), WIDTH=at_least_16(width), PADDED=padded,
        FETCHES=parts > 0, LINES=1 << (-(-width // 64) - 1).bit_length(),
    )  # fmt: skip
