"""Dropout (Srivastava et al. 2014):  y = x / (1 - rate) where an entry is kept, which it is with probability 1 - rate.

What is kept is drawn by Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"): 128 bits of
an entry's place and a key, and of nothing else, so that any device draws any part of a mask and finds the same. A block
serves 8 entries of a row with 16 bits each, and the rate is exact to 2^-16.

The trade. Drawing takes more instructions than the memory takes time for what is dropped, so it is done once for all
that reads the mask, and the mask is written, at a bit an entry: 9 instructions of a GPU an entry, where `jax.random`
draws a block of Threefry2x32-20 for each. (With that, and what was dropped written, a step of an 8B took 815 ms,
not 670.) The backward pass keeps bits, not a byte an entry, and draws them again where layers are computed again.

Layout: bit j of byte i of a row says whether entry 8 i + j is kept.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, UInt8, UInt32

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
