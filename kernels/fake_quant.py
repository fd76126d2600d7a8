"""Rounding to what a quantised weight or input can hold, for quantisation-aware training.

The gradient is the identity's (the straight-through estimator, arXiv:1308.3432), so that what is rounded learns to be
rounded well. The schemes:

    scheme      weights                                                       inputs
    int8        int8, one scale a row, as `load_in_8bit` holds them           as they are
    int4        4 bits with an offset, 128 of a row share scale and offset    as they are
    fp8-fp8     float8 e4m3, one scale a row, as `load_in_fp8` holds them     float8 e4m3, one scale a token
    fp8-int4    float8 a row, then int4 by 128: largest / 8                   float8 e4m3, one scale a token

All but int8 round as torchao's QAT does. Its int8 divides by largest / 127.5, which puts the largest weight of each row
on a tie between two codes, so that the last bit of a sum decides between them; 127 does not.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

SCHEMES = ("int8", "int4", "fp8-fp8", "fp8-int4")
GROUP = 128
FP8_MAX = 448.0


def fake_quantize_weight(w: Float[Array, "out in"], scheme: str) -> Float[Array, "out in"]:
    """w in its own dtype, with the values that the scheme can hold; for the int4 schemes `in` is whole groups."""
    wide = w.astype(jnp.float32)
    if scheme == "int8":
        held = _int8(wide)
    elif scheme == "int4":
        held = _int4_with_offset(wide)
    else:
        codes, scale = _fp8(wide)
        # In units of the codes, which are exact: many of them lie on ties, for the last bit of a scale to decide.
        held = (_int4(codes) if scheme == "fp8-int4" else codes) * scale
    return _straight_through(w, held)


def fake_quantize_input(x: Float[Array, "*batch in"], scheme: str) -> Float[Array, "*batch in"]:
    """x in its own dtype, with the values that the scheme can hold for each token."""
    if not scheme.startswith("fp8"):
        return x
    codes, scale = _fp8(x.astype(jnp.float32))
    return _straight_through(x, codes * scale)


def _straight_through(x: Array, held: Array) -> Array:
    return x + jax.lax.stop_gradient(held.astype(x.dtype) - x)


def _int8(w: Array) -> Array:
    w = w.astype(jnp.float16).astype(jnp.float32)  # as bitsandbytes does
    largest = _largest(w)
    codes = jnp.round(w * (127.0 * (1.0 / jnp.where(largest > 0, largest, 1.0))))
    return codes * largest * jnp.float32(1 / 127)


def _int4(w: Array) -> Array:
    groups = w.reshape(w.shape[0], -1, GROUP)
    largest = _largest(groups)
    codes = jnp.clip(jnp.round(8 * groups / jnp.where(largest > 0, largest, 1.0)), -8, 7)
    return (codes * (largest / 8)).reshape(w.shape)


def _int4_with_offset(w: Array) -> Array:
    groups = w.reshape(w.shape[0], -1, GROUP)
    low, high = jnp.min(groups, axis=-1, keepdims=True), jnp.max(groups, axis=-1, keepdims=True)
    scale = jnp.maximum(high - low, 1e-6) / 15
    codes = jnp.clip(jnp.round((groups - low) / scale), 0, 15) - 8
    return (codes * scale + (low + scale * 8)).reshape(w.shape)


def _fp8(x: Array) -> tuple[Array, Array]:
    """Codes, in float32, and the scale of each row."""
    scale = jnp.maximum(_largest(x), 1e-12) / FP8_MAX
    return jnp.clip(x / scale, -FP8_MAX, FP8_MAX).astype(jnp.float8_e4m3fn).astype(jnp.float32), scale


def _largest(x: Array) -> Array:
    return jnp.max(jnp.abs(x), axis=-1, keepdims=True)
