"""The low-rank update of rows that are sorted into groups, each group with an adapter of its own (an expert's).

    rows  [n, in]        sorted: the rows of group 0, then those of group 1, ...
    sizes [g]            rows of each group, int32; they add up to n

It is two grouped products (`api.grouped_dot`), of in x r and r x out, for a row of group g (arXiv:2106.09685,
equation 3):

    delta = scaling * (x A_g^T) B_g^T        A [g, r, in] and B [g, out, r] in float32

As in `lora`, the products run in x's dtype, and the vjp is our own so that the gradients of A and B, which are
`api.grouped_outer`, leave the accumulator as float32. The residuals are x, A and B.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxlora.kernels.api import grouped_dot, grouped_outer


@jax.custom_vjp
def grouped_lora_delta(
    x: Float[Array, "n d_in"],
    a: Float[Array, "g r d_in"],
    b: Float[Array, "g d_out r"],
    scaling: Float[Array, "*per_rank"],
    sizes: Int[Array, " g"],
) -> Float[Array, "n d_out"]:
    """scaling * (x A_g^T) B_g^T in x's dtype; gradients of A and B in their own dtype, accumulated in float32.

    The scaling is a constant: a scalar, or [r] with zeros for padding, see `lora.lora_delta`.
    """
    return _forward(x, a, b, scaling, sizes)[0]


def _low(x, a, scaling, sizes):
    return (grouped_dot(x, a.astype(x.dtype), sizes, 2, jnp.float32) * scaling).astype(x.dtype)


def _forward(x, a, b, scaling, sizes):
    delta = grouped_dot(_low(x, a, scaling, sizes), b.astype(x.dtype), sizes, 2, x.dtype)
    return delta, (x, a, b, scaling, sizes)


def _backward(residuals, dy):
    x, a, b, scaling, sizes = residuals
    dz = (grouped_dot(dy, b.astype(x.dtype), sizes, 1, jnp.float32) * scaling).astype(x.dtype)
    da = grouped_outer(dz, x, sizes, a.dtype)
    db = grouped_outer(dy, _low(x, a, scaling, sizes), sizes, b.dtype)
    dx = grouped_dot(dz, a.astype(x.dtype), sizes, 1, x.dtype)
    return dx, da, db, jnp.zeros_like(scaling), None


grouped_lora_delta.defvjp(_forward, _backward)
