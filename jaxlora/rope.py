"""Positions: rotary embedding (RoFormer, arXiv:2104.09864) with the ways to stretch it, and ALiBi.

Pair d of a head, made of its entries d and d + rotary / 2 (or 2 d and 2 d + 1: `interleaved`), turns by the angle
`position * inv_freq[d]`. Every rope type is a way to compute `inv_freq`; "dynamic" and "longrope" also look at the
longest position in the batch. Frequencies and angles are float32, since bfloat16 cannot count to 257.

The last bit of a frequency is an angle of 1e-4 at position 1500, and of 1e-2 at 131072. So frequencies that are known
while tracing are made by numpy, in transformers' order, of powers that are rounded once: nearly all have its last bit.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxlora.config import RopeConfig
from jaxlora.kernels.reference import apply_rope as apply_rope


def _wavelengths(theta: float, dim: int) -> np.ndarray:
    """Positions for a radian, theta^(2 d / dim), float32."""
    exponents = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
    return np.power(np.float64(theta), exponents.astype(np.float64)).astype(np.float32)


def _default(theta: float, dim: int) -> np.ndarray:
    return np.float32(1.0) / _wavelengths(theta, dim)


def _dynamic(rope: RopeConfig, dim: int, native: int, length: Array) -> Array:
    """NTK-aware scaling with the base grown just enough for the longest position, never below the native window."""
    length = jnp.maximum(length, native).astype(jnp.float32)
    grown = rope.rope_theta * ((rope.factor * length / native) - (rope.factor - 1.0)) ** (dim / (dim - 2))
    return 1.0 / (grown ** (jnp.arange(0, dim, 2, dtype=jnp.float32) / dim))


def _proportional(rope: RopeConfig, head_dim: int) -> np.ndarray:
    """Gemma 4: frequencies as if all of a head turned, of which those after the first part are 0."""
    inv_freq = _default(rope.rope_theta, head_dim)
    turning = int(rope.partial_rotary_factor * head_dim // 2)
    return np.where(np.arange(head_dim // 2) < turning, inv_freq, np.float32(0.0)) / np.float32(rope.factor)


def _llama3(rope: RopeConfig, dim: int, native: int) -> np.ndarray:
    """Llama 3.1: long wavelengths are divided by the factor, short ones kept, those between interpolated."""
    inv_freq = _default(rope.rope_theta, dim)
    original = rope.original_max_position_embeddings or native
    wavelengths = 1 / inv_freq * (2 * math.pi)  # torch divides a number by a tensor so, and rounds twice
    turns = 1 / wavelengths * original  # how often the pair turns within the original window
    smooth = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    between = (1 - smooth) * inv_freq / rope.factor + smooth * inv_freq
    return np.where(smooth < 0.0, inv_freq / rope.factor, np.where(smooth > 1.0, inv_freq, between))


def _yarn(rope: RopeConfig, dim: int, native: int) -> np.ndarray:
    """YaRN (arXiv:2309.00071), section 3.2: a ramp over the pairs from kept to divided frequencies."""
    original = rope.original_max_position_embeddings or native

    def pair_that_turns(times: float) -> float:
        return dim * math.log(original / (times * 2 * math.pi)) / (2 * math.log(rope.rope_theta))

    low, high = pair_that_turns(rope.beta_fast), pair_that_turns(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    ramp = (np.arange(dim // 2, dtype=np.float32) - low) / (high - low if high != low else 0.001)
    kept = 1 - np.clip(ramp, 0.0, 1.0).astype(np.float32)
    wavelengths = _wavelengths(rope.rope_theta, dim)
    return 1 / (rope.factor * wavelengths) * (1 - kept) + 1 / wavelengths * kept


def _yarn_attention_factor(rope: RopeConfig) -> float:
    def mscale(weight: float) -> float:
        return 1.0 if rope.factor <= 1.0 else 0.1 * weight * math.log(rope.factor) + 1.0

    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return mscale(rope.mscale) / mscale(rope.mscale_all_dim)
    return mscale(1.0)


def _longrope(rope: RopeConfig, dim: int, native: int, length: Array) -> Array:
    """LongRoPE (arXiv:2402.13753): a divisor for each pair, of one list within the original window, else of another."""
    wavelengths = _wavelengths(rope.rope_theta, dim)
    long, short = (
        jnp.asarray(1 / (np.asarray(factors, np.float32) * wavelengths))
        for factors in (rope.long_factor, rope.short_factor)
    )
    return jnp.where(length > (rope.original_max_position_embeddings or native), long, short)


def _longrope_attention_factor(rope: RopeConfig, native: int) -> float:
    if rope.attention_factor is not None:
        return rope.attention_factor
    original = rope.original_max_position_embeddings or native
    return 1.0 if rope.factor <= 1.0 else math.sqrt(1 + math.log(rope.factor) / math.log(original))


def rope_frequencies(
    rope: RopeConfig, head_dim: int, max_position_embeddings: int, length: int | Int[Array, "*each"]
) -> tuple[Float[Array, "*rows pairs"], float]:
    """Frequencies [rotary / 2] in radians per position, and the factor on cos and sin.

    `length` is the longest position in the batch plus one, or of each row, [B, 1, 1] for frequencies [B, 1, pairs];
    only "dynamic" and "longrope" read it.
    """
    dim = int(head_dim * rope.partial_rotary_factor)
    if rope.rope_type == "dynamic":
        return _dynamic(rope, dim, max_position_embeddings, jnp.asarray(length)), 1.0
    if rope.rope_type == "proportional":
        return jnp.asarray(_proportional(rope, head_dim)), 1.0
    if rope.rope_type == "llama3":
        return jnp.asarray(_llama3(rope, dim, max_position_embeddings)), 1.0
    if rope.rope_type == "yarn":
        return jnp.asarray(_yarn(rope, dim, max_position_embeddings)), _yarn_attention_factor(rope)
    if rope.rope_type == "longrope":
        frequencies = _longrope(rope, dim, max_position_embeddings, jnp.asarray(length))
        return frequencies, _longrope_attention_factor(rope, max_position_embeddings)
    return jnp.asarray(
        _default(rope.rope_theta, dim) / np.float32(rope.factor)
    ), 1.0  # "default" has factor 1, "linear" its own


def rope_tables(
    rope: RopeConfig,
    head_dim: int,
    max_position_embeddings: int,
    positions: Int[Array, "b t"],
    cache_length: int | None = None,
    alone: bool = False,
) -> tuple[Float[Array, "b t pairs"], Float[Array, "b t pairs"]]:
    """cos and sin [B, T, rotary / 2] in float32 at these positions.

    With a cache of `cache_length` places, "longrope" chooses its list by what the cache can hold, so that all of its
    keys have the same frequencies. "dynamic" looks at the longest position of the batch, or of each row `alone`.
    """
    length = jnp.max(positions, axis=1)[:, None, None] + 1 if alone else jnp.max(positions) + 1
    if cache_length is not None and rope.rope_type == "longrope":
        length = cache_length
    inv_freq, factor = rope_frequencies(rope, head_dim, max_position_embeddings, length)
    angles = positions[..., None].astype(jnp.float32) * inv_freq
    return jnp.cos(angles) * factor, jnp.sin(angles) * factor


def alibi_bias(positions: Int[Array, "b s"], heads: int) -> Float[Array, "b n s"]:
    """What ALiBi (arXiv:2108.12409) adds to every query's score of the keys at these positions, float32.

    A head's slope times the key's position; the query's is a constant of the softmax. Slopes are a geometric series
    from 2^(-8 / n) on for the largest power of two n among the heads, and every other entry of the series of 2 n for
    the rest. Slopes, positions and their products are rounded to bfloat16, since that is how Falcon was trained.
    """
    power = 2 ** math.floor(math.log2(heads))
    slopes = [2 ** (-8 * (i + 1) / power) for i in range(power)]
    slopes += [2 ** (-4 * (2 * i + 1) / power) for i in range(heads - power)]
    rounded = jax.lax.reduce_precision(jnp.asarray(slopes, jnp.float32), 8, 7)
    places = jax.lax.reduce_precision(positions.astype(jnp.float32), 8, 7)
    return jax.lax.reduce_precision(rounded[None, :, None] * places[:, None, :], 8, 7)


def segment_positions(segment_ids: Int[Array, "b t"]) -> Int[Array, "b t"]:
    """Positions that start again at 0 wherever the segment id changes."""
    index = jnp.broadcast_to(jnp.arange(segment_ids.shape[1], dtype=jnp.int32), segment_ids.shape)
    starts = jnp.concatenate(
        [jnp.ones_like(segment_ids[:, :1], dtype=bool), segment_ids[:, 1:] != segment_ids[:, :-1]], axis=1
    )
    return index - jax.lax.cummax(jnp.where(starts, index, 0), axis=1)
