"""Causal attention over grouped heads, documents and windows:  out = softmax(q k^T * scale + mask) v.

Layout: q [B, T, N, H]; k, v [B, S, K, H], with N a multiple of K: query head n reads key head n // (N / K). Query t
stands at index `offset + t` of the keys. It sees key s when s <= offset + t, when they carry the same segment id,
and, with a window w, when offset + t - s < w. The softmax is float32.

Traded: this form keeps the [B, N, T, S] scores, which a flash kernel does not. It is the specification, and what the
CPU runs.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def attention_mask(
    query_segments: Int[Array, "b t"] | None,
    key_segments: Int[Array, "b s"] | None,
    lengths: tuple[int, int],
    offset: int | Int[Array, ""] = 0,
    window: int | None = None,
) -> Bool[Array, "b_or_1 t s"]:
    """Which query sees which key; `lengths` is (T, S)."""
    query = (jnp.arange(lengths[0], dtype=jnp.int32) + offset)[:, None]
    key = jnp.arange(lengths[1], dtype=jnp.int32)[None, :]
    mask = key <= query
    if window is not None:
        mask &= query - key < window
    mask = mask[None]
    if query_segments is not None and key_segments is not None:
        mask = mask & (query_segments[:, :, None] == key_segments[:, None, :])
    return mask


def attention_reference(
    q: Float[Array, "b t n h"],
    k: Float[Array, "b s kv h"],
    v: Float[Array, "b s kv h"],
    *,
    scale: float,
    window: int | None = None,
    query_segments: Int[Array, "b t"] | None = None,
    key_segments: Int[Array, "b s"] | None = None,
    offset: int | Int[Array, ""] = 0,
) -> Float[Array, "b t n h"]:
    """The formula of this file's header, in plain jnp. Every query must see at least itself."""
    b, t, n, h = q.shape
    kv = k.shape[2]
    grouped = q.reshape(b, t, kv, n // kv, h)
    scores = jnp.einsum("btkgh,bskh->bkgts", grouped, k, preferred_element_type=jnp.float32) * scale
    mask = attention_mask(query_segments, key_segments, (t, k.shape[1]), offset, window)
    scores = jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    out = jnp.einsum("bkgts,bskh->btkgh", weights, v, preferred_element_type=jnp.float32)
    return out.reshape(b, t, n, h).astype(q.dtype)
