"""The low-rank update of LoRA (arXiv:2106.09685, equation 3):  delta = scaling * (x A^T) B^T.

Layout: x [..., in] in the compute dtype, A [r, in] and B [out, r] in float32, as PEFT stores them. The products run
in x's dtype with float32 accumulation, because r is tiny and the tensor cores want 16-bit operands.

Why a vjp of our own: autodiff would round the gradients of A and B to the compute dtype before they reach the float32
parameters. Here dA and dB leave the accumulator as float32. The residuals are x, A and B; z = x A^T costs r columns
and is computed again.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxlora.kernels import api
from jaxlora.kernels.dropout import kept_bits


def _dot(x: Array, w: Array, contract: tuple[int, int], out_dtype) -> Array:
    """Contract axis `contract[0]` of x with `contract[1]` of w: float32 sums, whatever dtype they leave in."""
    dims = (((contract[0],), (contract[1],)), ((), ()))
    return jax.lax.dot_general(x, w, dims, preferred_element_type=out_dtype)


def row_norms(
    weight_a: Float[Array, "r d_out"],
    a: Float[Array, "r d_in"],
    b: Float[Array, "d_out r"],
    scaling: Float[Array, "*per_rank"],
    base_square: Float[Array, " d_out"],
) -> Float[Array, " d_out"]:
    """The norm of each row of W + B' A with B' = scaling B, float32, without that matrix (DoRA, arXiv:2402.09353).

        ||w + b' A||^2 = ||w||^2 + 2 b' . (A w) + b' (A A^T) b'^T

    weight_a is A W^T, which costs r rows of a product with W; base_square is ||w||^2 of each row.
    """
    exact = jax.lax.Precision.HIGHEST
    b = b * scaling
    cross = 2.0 * jnp.sum(b * weight_a.T.astype(b.dtype), axis=-1)
    low = jnp.sum(jnp.matmul(b, jnp.matmul(a, a.T, precision=exact), precision=exact) * b, axis=-1)
    return jnp.sqrt(jnp.maximum(base_square + cross + low, 0.0))


@jax.custom_vjp
def lora_delta(
    x: Float[Array, "*batch d_in"],
    a: Float[Array, "r d_in"],
    b: Float[Array, "d_out r"],
    scaling: Float[Array, "*per_rank"],
) -> Float[Array, "*batch d_out"]:
    """scaling * (x A^T) B^T in x's dtype; gradients of A and B in their own dtype, accumulated in float32.

    The scaling is a constant of the adapter, and gets no gradient. It is a scalar, or [r] with zeros for rows of A and
    columns of B that are padding: those add nothing and get zero as their gradient.
    """
    return _forward(x, a, b, scaling)[0]


def _forward(x, a, b, scaling):
    rows = x.reshape(-1, x.shape[-1])
    z = _dot(rows, a.astype(x.dtype), (1, 1), jnp.float32) * scaling
    y = _dot(z.astype(x.dtype), b.astype(x.dtype), (1, 1), x.dtype)
    return y.reshape(*x.shape[:-1], b.shape[0]), (x, a, b, scaling)


def lora_gradients(
    x: Float[Array, "*batch d_in"],
    dys: Sequence[Float[Array, "*batch _"]],
    adapters: Sequence[tuple[Float[Array, "_ d_in"], Float[Array, "_ _"], Float[Array, "*per_rank"]]],
) -> list[tuple[Float[Array, "_ d_in"], Float[Array, "_ _"], Float[Array, "tokens _"]]]:
    """Of each of some adapters (A, B, scaling) that read the same x, the gradients of A and B, in their dtype, and
    dz = scaling * dy B, of which dx = dz A.

    x is what takes time, and is read twice for all of them: z = x A^T and dA = dz^T x of all are one product each.
    """
    rows, dys = x.reshape(-1, x.shape[-1]), [dy.reshape(-1, dy.shape[-1]) for dy in dys]
    ends = [*itertools.accumulate(a.shape[0] for a, _, _ in adapters)][:-1]
    all_a = jnp.concatenate([a for a, _, _ in adapters])
    zs = jnp.split(_dot(rows, all_a.astype(x.dtype), (1, 1), jnp.float32), ends, axis=1)
    each = [(*of, dy, (z * of[2]).astype(x.dtype)) for of, dy, z in zip(adapters, dys, zs, strict=True)]
    dzs = [(_dot(dy, b.astype(x.dtype), (1, 0), jnp.float32) * s).astype(x.dtype) for _, b, s, dy, _ in each]
    das = jnp.split(_dot(jnp.concatenate(dzs, axis=1), rows, (0, 0), all_a.dtype), ends)
    dbs = [_dot(dy, z, (0, 0), b.dtype) for _, b, _, dy, z in each]
    return [*zip(das, dbs, dzs, strict=True)]


def _backward(residuals, dy):
    x, a, b, scaling = residuals
    [(da, db, dz)] = lora_gradients(x, [dy], [(a, b, scaling)])
    dx = _dot(dz, a.astype(x.dtype), (1, 0), x.dtype).reshape(x.shape)
    return dx, da, db, jnp.zeros_like(scaling)


lora_delta.defvjp(_forward, _backward)


def plus_dropped_delta(
    y: Float[Array, "*batch d_out"],
    x: Float[Array, "*batch d_in"],
    rate: float,
    key: Any,
    a: Float[Array, "r d_in"],
    b: Float[Array, "d_out r"],
    scaling: Float[Array, "*per_rank"],
) -> Float[Array, "*batch d_out"]:
    """y + `lora_delta` of dropout(x, rate, key), which is not written where there is a kernel. The residuals are x,
    bits of the mask, z, A and B."""
    return _plus_dropped_delta(rate, y, x, kept_bits(key, x.shape, rate), a, b, scaling)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _plus_dropped_delta(rate: float, y, x, bits, a, b, scaling):
    return _dropped_forward(rate, y, x, bits, a, b, scaling)[0]


def _dropped_forward(rate, y, x, bits, a, b, scaling):
    z = (api.dropped_product(x, bits, a.astype(x.dtype), rate) * scaling).astype(x.dtype)
    return api.raised_onto(y, z, b.astype(x.dtype)), (x, bits, z, a, b, scaling)


def _dropped_backward(rate, saved, dy):
    x, bits, z, a, b, scaling = saved
    dz = (_dot(dy, b.astype(x.dtype), (dy.ndim - 1, 0), jnp.float32) * scaling).astype(x.dtype)
    dx, da = api.dropped_gradients(x, bits, a.astype(x.dtype), dz, rate)
    db = _dot(dy.reshape(-1, dy.shape[-1]), z.reshape(-1, z.shape[-1]), (0, 0), b.dtype)
    return dy, dx, None, da.astype(a.dtype), db, jnp.zeros_like(scaling)


_plus_dropped_delta.defvjp(_dropped_forward, _dropped_backward)
