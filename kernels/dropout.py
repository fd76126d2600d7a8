"""Dropout (Srivastava et al. 2014):  y = x / (1 - rate) where an entry is kept, which it is with probability 1 - rate.

What is kept is drawn by Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"): 128 bits of
an entry's place and a key, and of nothing else, so that any device draws any part of a mask and finds the same. A block
serves 8 entries of a row with 16 bits each, and the rate is exact to 2^-16.

The trade. Drawing takes more instructions than the memory takes time for what is dropped, so it is done once for all
that reads the mask, and the mask is written, at a bit an entry: a step of an 8B drew for 110 ms when each entry had a
block of Threefry2x32-20 of its own. The backward pass keeps bits, not a byte an entry, and draws them again where
layers are computed again.

An adapter of what is dropped reads it for the thin product with A alone, on the way forward: a kernel reads x and the
bits for that, and writes nothing of x. XLA wrote what was dropped, and read it: 3 passes over x where this is one.

Layout: bit j of byte i of a row says whether entry 8 i + j is kept.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, no_type_check

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Float32, UInt8, UInt32

ROUNDS = 10
_MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
_KEY_STEPS = 0x9E3779B9, 0xBB67AE85
PER_BLOCK = 8  # entries


def philox(
    counter: tuple[UInt32[Array, "*shape"], UInt32[Array, "*shape"], UInt32[Array, "*shape"], UInt32[Array, "*shape"]],
    key: tuple[UInt32[Array, ""], UInt32[Array, ""]],
) -> tuple[UInt32[Array, "*shape"], UInt32[Array, "*shape"], UInt32[Array, "*shape"], UInt32[Array, "*shape"]]:
    """Philox4x32-10: four random words of each counter of four words, with a key of two."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(ROUNDS):
        high0, low0 = _product(c0, _MULTIPLIERS[0])
        high1, low1 = _product(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = k0 + np.uint32(_KEY_STEPS[0]), k1 + np.uint32(_KEY_STEPS[1])
    return c0, c1, c2, c3


def _product(a: UInt32[Array, "*shape"], b: int) -> tuple[UInt32[Array, "*shape"], UInt32[Array, "*shape"]]:
    """The upper and the lower word of a b.

    It is one instruction of a GPU, if it says so as a product of 64 bits. `lax.mulhi` says so too, but jax 0.10 cannot
    compile it where arrays are sharded.
    """
    with jax.enable_x64(True):
        wide = lax.convert_element_type(a, jnp.uint64) * np.uint64(b)
        high = lax.convert_element_type(lax.shift_right_logical(wide, np.uint64(32)), jnp.uint32)
        return high, lax.convert_element_type(wide, jnp.uint32)


def kept_bits(key: Any, shape: tuple[int, ...], rate: float) -> UInt8[Array, "*rows bytes"]:
    """Which entries of an array [*rows, d] are kept, [*rows, ceil(d / 8)]; see the head of this module.

    Args:
      key: a key of `jax.random`; the same one gives the same bits, for [tokens, d] as for [batch, time, d].
    """
    *rows, features = shape
    blocks = -(-features // PER_BLOCK)
    at = (*rows, blocks)
    row = jnp.zeros(at, jnp.uint32)
    for dimension in range(len(rows)):
        stride = np.uint32(math.prod(rows[dimension + 1 :]))
        row = row + lax.broadcasted_iota(jnp.uint32, at, dimension) * stride
    none = jnp.zeros(at, jnp.uint32)
    k0, k1 = jax.random.bits(key, (2,), jnp.uint32)
    words = philox((lax.broadcasted_iota(jnp.uint32, at, len(rows)), row, none, none), (k0, k1))
    least = np.uint32(round(rate * 2**16) << 16)
    byte = none
    for i, word in enumerate(words):
        for j, high in enumerate((word << np.uint32(16), word)):  # of which the upper 16 bits count
            byte = byte | ((high >= least).astype(jnp.uint32) << np.uint32(2 * i + j))
    # Else XLA would draw for each entry that it reads, 8 times as often.
    return lax.optimization_barrier(byte.astype(jnp.uint8))


def kept(x: Float[Array, "*rows d"], bits: UInt8[Array, "*rows bytes"], rate: float) -> Float[Array, "*rows d"]:
    """x with the entries that are kept scaled by 1 / (1 - rate), and zero elsewhere."""
    at = (*bits.shape, PER_BLOCK)
    each = (bits[..., None] >> lax.broadcasted_iota(jnp.uint8, at, bits.ndim)) & np.uint8(1)
    is_kept = each.reshape(*bits.shape[:-1], bits.shape[-1] * PER_BLOCK)[..., : x.shape[-1]] != 0
    return jnp.where(is_kept, x / jnp.asarray(1.0 - rate, x.dtype), jnp.zeros((), x.dtype))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _dropped(x: Float[Array, "*rows d"], bits: UInt8[Array, "*rows bytes"], rate: float) -> Float[Array, "*rows d"]:
    return kept(x, bits, rate)


_dropped.defvjp(lambda x, bits, rate: (kept(x, bits, rate), bits), lambda rate, bits, dy: (kept(dy, bits, rate), None))


def dropout(x: Float[Array, "*rows d"], rate: float, key: Any) -> Float[Array, "*rows d"]:
    """Zero each entry with probability `rate` and scale the rest by 1 / (1 - rate). No key means no dropout."""
    if rate == 0.0 or key is None:
        return x
    return _dropped(x, kept_bits(key, x.shape, rate), rate)


# --- the product with what is dropped ---

ROWS, STEP, COLUMNS = 32, 128, 1024  # of x: of a program, of a step of it, and of all its steps
NUM_WARPS, NUM_STAGES = 4, 3
MOST_RANKS = 128


def dropped_product_reference(
    x: Float[Array, "*rows d"], bits: UInt8[Array, "*rows bytes"], a: Float[Array, "r d"], rate: float
) -> Float32[Array, "*rows r"]:
    """dropout(x) a^T with the mask that `kept_bits` gives, in float32."""
    dims = (((x.ndim - 1,), (1,)), ((), ()))
    return lax.dot_general(kept(x, bits, rate), a, dims, preferred_element_type=jnp.float32)


@functools.cache
@no_type_check  # a type checker's wrapper around the function would hide its source from Triton
def _kernel():
    """The Triton function, built on first use: the library imports where Triton is missing."""
    import triton
    import triton.language as tl

    @triton.jit
    def dropped_product(
        x,  # [M, D]
        bits,  # uint8 [M, ceil(D / 8)]
        a,  # [R, D]
        out,  # float32 [ceil(D / COLUMNS), M, R]
        M: tl.constexpr,
        D: tl.constexpr,
        R: tl.constexpr,
        RANKS: tl.constexpr,  # R, up to a power of two of at least 16
        SCALE: tl.constexpr,
        ROWS: tl.constexpr,
        STEP: tl.constexpr,
        COLUMNS: tl.constexpr,
    ):
        BYTES: tl.constexpr = (D + 7) // 8
        row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
        part = tl.program_id(1)
        rank = tl.arange(0, RANKS)[:, None]
        column = part * COLUMNS + tl.arange(0, STEP)[None, :]
        byte = part * (COLUMNS // 8) + tl.arange(0, STEP // 8)[None, :]
        place = tl.arange(0, 8)[None, None, :]
        total = tl.zeros((ROWS, RANKS), tl.float32)
        for step in range(0, COLUMNS, STEP):
            at, at_byte = column + step, byte + step // 8
            values = tl.load(x + row * D + at, mask=(row < M) & (at < D), other=0.0)
            packed = tl.load(bits + row * BYTES + at_byte, mask=(row < M) & (at_byte < BYTES), other=0)
            is_kept = ((packed[:, :, None] >> place) & 1).reshape(ROWS, STEP) != 0
            of_a = tl.load(a + rank * D + at, mask=(rank < R) & (at < D), other=0.0)
            dropped = tl.where(is_kept, values, tl.zeros_like(values))
            total = tl.dot(dropped, tl.trans(of_a), total)
        to = out + (part.to(tl.int64) * M + row) * R + tl.arange(0, RANKS)[None, :]
        tl.store(to, total * SCALE, mask=(row < M) & (tl.arange(0, RANKS)[None, :] < R))

    return dropped_product


def constants(tokens: int, features: int, ranks: int, rate: float) -> dict[str, Any]:
    """The compile-time arguments of the kernel."""
    return dict(
        M=tokens, D=features, R=ranks, RANKS=max(16, 1 << (ranks - 1).bit_length()), SCALE=1.0 / (1.0 - rate),
        ROWS=ROWS, STEP=STEP, COLUMNS=COLUMNS,
    )  # fmt: skip


def sharded(product: Callable) -> Callable:
    """product(x [*rows, d], bits [*rows, bytes], a [r, d]) -> [*rows, r], of each device's part of x by itself: rows
    where those are divided, and sums of columns added up where these are."""
    partitioned = custom_partitioning(product)

    def partition(mesh, operands, result):
        x = operands[0]
        *rows, columns = (*x.sharding.spec, *[None] * x.ndim)[: x.ndim]
        if x.sharding.shard_shape(x.shape)[-1] % PER_BLOCK:  # a byte of bits would be of two devices
            columns = None
        alike, of_a = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((*rows, columns), (None, columns)))

        def one(x, bits, a):
            part = product(x, bits, a)
            return part if columns is None else lax.psum(part, columns)

        return mesh, one, NamedSharding(mesh, PartitionSpec(*rows, None)), (alike, alike, of_a)

    partitioned.def_partition(partition=partition, sharding_rule="... i, ... j, r i -> ... r")
    return partitioned


def dropped_product(
    x: Float[Array, "*rows d"], bits: UInt8[Array, "*rows bytes"], a: Float[Array, "r d"], rate: float
) -> Float32[Array, "*rows r"]:
    """`dropped_product_reference` as a Triton kernel that writes nothing of x; dropped entries are scaled as their sum.

    Raises:
      NotImplementedError: jax-triton is not installed; x and a are not both bfloat16 or both float16; or a has more
        than `MOST_RANKS` rows.
    """
    if x.dtype.name not in ("bfloat16", "float16") or a.dtype != x.dtype:
        raise NotImplementedError(f"the kernel takes bfloat16 or float16, not {x.dtype.name} and {a.dtype.name}")
    if a.shape[0] > MOST_RANKS:
        raise NotImplementedError(f"the kernel takes at most {MOST_RANKS} ranks, not {a.shape[0]}")
    try:
        import jax_triton
    except ImportError as error:
        raise NotImplementedError(f"the kernel needs jax-triton and triton ({error})") from error

    def launch(x, bits, a):
        tokens, parts = math.prod(x.shape[:-1]), -(-x.shape[-1] // COLUMNS)
        [sums] = jax_triton.triton_call(
            x.reshape(tokens, -1),
            bits.reshape(tokens, -1),
            a,
            kernel=_kernel(),
            out_shape=[jax.ShapeDtypeStruct((parts, tokens, a.shape[0]), jnp.float32)],
            grid=(-(-tokens // ROWS), parts),
            num_warps=NUM_WARPS,
            num_stages=NUM_STAGES,
            **constants(tokens, x.shape[-1], a.shape[0], rate),
        )
        return jnp.sum(sums, 0).reshape(*x.shape[:-1], a.shape[0])

    product = jax.custom_batching.custom_vmap(sharded(launch))

    @product.def_vmap
    def _(axis_size, in_batched, *args):
        axes = tuple(0 if is_batched else None for is_batched in in_batched)
        reference = functools.partial(dropped_product_reference, rate=rate)
        return jax.vmap(reference, in_axes=axes, axis_size=axis_size)(*args), True

    return product(x, bits, a)
