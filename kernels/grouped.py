"""Products of rows that are sorted into groups, each group with a matrix of its own (arXiv:2211.15841, section 4).

    rows  [n, in]        sorted: the rows of group 0, then those of group 1, ...
    w     [g, ...]       a matrix for each group
    sizes [g]            rows of each group, int32; they add up to n

`grouped_dot` multiplies each row with its group's matrix, `grouped_outer` sums the outer products of the rows of each
group, which is the gradient of the matrices. Both are `lax.ragged_dot_general`, whose sums are float32.

The low-rank update of a group (arXiv:2106.09685, equation 3) is two grouped products, of in x r and r x out:

    delta = scaling * (x A_g^T) B_g^T        A [g, r, in] and B [g, out, r] in float32

As in `lora`, the products run in x's dtype, and the vjp is our own so that the gradients of A and B leave the
accumulator as float32. The residuals are x, A and B.

Under `jax.vmap` the instances run one after the other: `ragged_dot_general` cannot share w between them, and copies of
w, the experts of a model, would not fit.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import sequential_vmap
from jaxtyping import Array, Float, Int


def _ragged(x: Array, w: Array, sizes: Array, contracted: tuple[int, int], groups: list[int], dtype: Any) -> Array:
    numbers = lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(((contracted[0],), (contracted[1],)), ((), ())),
        lhs_ragged_dimensions=[0],
        rhs_group_dimensions=groups,
    )

    @sequential_vmap
    def product(x, w, sizes):
        return lax.ragged_dot_general(x, w, sizes, numbers, preferred_element_type=dtype)

    return product(x, w, sizes)


def grouped_dot(
    x: Float[Array, "n d_in"], w: Float[Array, "g d0 d1"], sizes: Int[Array, " g"], contracted: int, dtype: Any = None
) -> Float[Array, "n d_out"]:
    """Each row times its group's matrix, of which axis 1 or 2 is contracted; in x's dtype unless another is given."""
    return _ragged(x, w, sizes, (1, contracted), [0], dtype)


def grouped_outer(
    x: Float[Array, "n d0"], y: Float[Array, "n d1"], sizes: Int[Array, " g"], dtype: Any = None
) -> Float[Array, "g d0 d1"]:
    """x^T y of the rows of each group; zeros for a group without rows."""
    return _ragged(x, y, sizes, (0, 0), [], dtype)


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
