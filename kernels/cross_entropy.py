"""Cross entropy of a linear head without its logits:  sum over tokens of  logsumexp(h W^T) - (h W^T)[label].

Layout: hidden [N, D], weight [V, D] (a checkpoint's orientation), labels [N] with -100 for tokens that do not count.
The tokens go through in chunks, so that at most `chunk` x V logits exist, in float32, where the full ones of 8,192
tokens over a vocabulary of 128,256 would take 4 GiB. Where each of some devices has a part of the tokens, a chunk takes
as many of each part, so that no token leaves its device.

Traded: the loss is a sum, so its gradient is known up to one factor as soon as it is computed. The forward pass of a
differentiated call therefore makes d(hidden) at once, while a chunk's logits are still there, and the backward pass
only scales it: two products with W instead of the three that recomputing would take. d(weight) is made only where
the head learns (`symbolic_zeros` tells), and accumulates in float32.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

IGNORE_INDEX = -100


def cross_entropy_reference(
    hidden: Float[Array, "n d"], weight: Float[Array, "v d"], labels: Int[Array, " n"], softcap: float | None = None
) -> Float[Array, ""]:
    """The formula of this file's header, with the full logits."""
    logits = _logits(hidden, weight, softcap)
    safe = jnp.where(labels == IGNORE_INDEX, 0, labels)
    picked = jnp.take_along_axis(logits, safe[:, None], axis=1)[:, 0]
    losses = jax.nn.logsumexp(logits, axis=1) - picked
    return jnp.sum(jnp.where(labels == IGNORE_INDEX, 0.0, losses))


def _logits(hidden, weight, softcap):
    logits = jax.lax.dot_general(hidden, weight, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
    return logits if softcap is None else softcap * jnp.tanh(logits / softcap)


def chunk_length(tokens: int, vocab: int, logits_bytes: int = 2**28) -> int:
    """Tokens in a chunk so that its float32 logits stay under `logits_bytes`: a multiple of 128, of like-sized
    chunks."""
    most = max(128, logits_bytes // (4 * vocab) // 128 * 128)
    chunks = -(-tokens // most)
    return min(tokens, -(-tokens // chunks // 128) * 128) if tokens > 128 else tokens


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def linear_cross_entropy(
    hidden: Float[Array, "n d"],
    weight: Float[Array, "v d"],
    labels: Int[Array, " n"],
    chunk: int,
    softcap: float | None = None,
    parts: int = 1,
) -> Float[Array, ""]:
    """Summed loss, float32, `chunk` tokens of each of some equal parts at a time; see `chunk_length`. Gradients flow to
    hidden and weight."""
    return _chunked(hidden, weight, labels, chunk, softcap, parts, False, False)[0]


def _chunked(hidden, weight, labels, chunk, softcap, parts, hidden_learns, weight_learns):
    tokens, features = hidden.shape[0] // parts, hidden.shape[1]
    padding = -tokens % chunk
    rows = jnp.pad(hidden.reshape(parts, tokens, features), ((0, 0), (0, padding), (0, 0)))
    rows = rows.reshape(parts, -1, chunk, features).swapaxes(0, 1).reshape(-1, parts * chunk, features)
    marks = jnp.pad(labels.reshape(parts, tokens), ((0, 0), (0, padding)), constant_values=IGNORE_INDEX)
    marks = marks.reshape(parts, -1, chunk).swapaxes(0, 1).reshape(-1, parts * chunk)

    def one_chunk(carry, inputs):
        total, d_weight = carry
        h, y = inputs
        counts = y != IGNORE_INDEX
        logits = _logits(h, weight, softcap)
        norm = jax.nn.logsumexp(logits, axis=1)
        hit = jnp.arange(weight.shape[0], dtype=y.dtype)[None, :] == y[:, None]  # fuses; a gather would not
        total += jnp.sum(jnp.where(counts, norm - jnp.sum(jnp.where(hit, logits, 0.0), axis=1), 0.0))
        if not (hidden_learns or weight_learns):
            return (total, d_weight), None
        d_logits = jnp.where(counts[:, None], jnp.exp(logits - norm[:, None]) - hit.astype(jnp.float32), 0.0)
        if softcap is not None:
            d_logits *= 1.0 - jnp.square(logits / softcap)
        d_logits = d_logits.astype(h.dtype)
        d_hidden = None
        if hidden_learns:
            d_hidden = jax.lax.dot_general(
                d_logits, weight, (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32
            ).astype(h.dtype)
        if weight_learns:
            d_weight += jax.lax.dot_general(d_logits, h, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32)
        return (total, d_weight), d_hidden

    d_weight = jnp.zeros(weight.shape, jnp.float32) if weight_learns else None
    (total, d_weight), d_hidden = jax.lax.scan(one_chunk, (jnp.zeros((), jnp.float32), d_weight), (rows, marks))
    if d_hidden is not None:
        d_hidden = d_hidden.reshape(-1, parts, chunk, features).swapaxes(0, 1).reshape(parts, -1, features)
        d_hidden = d_hidden[:, :tokens].reshape(hidden.shape)
    return total, d_hidden, d_weight


def _forward(hidden, weight, labels, chunk, softcap, parts):
    arguments = (hidden.value, weight.value, labels.value)
    total, d_hidden, d_weight = _chunked(*arguments, chunk, softcap, parts, hidden.perturbed, weight.perturbed)
    # Empty arrays carry the shapes and dtypes that the backward pass must give back where nothing learns.
    return total, (d_hidden, d_weight, hidden.value[:0], weight.value[:0])


def _backward(chunk, softcap, parts, residuals, d_total):
    d_hidden, d_weight, hidden, weight = residuals

    def scaled(gradient, like):
        if gradient is None:
            return None
        return (gradient.astype(jnp.float32) * d_total).astype(like.dtype)

    return scaled(d_hidden, hidden), scaled(d_weight, weight), None


linear_cross_entropy.defvjp(_forward, _backward, symbolic_zeros=True)
