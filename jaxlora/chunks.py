"""What scans over time that go chunk by chunk have in common (`mamba`, `delta_net`).

A row of tokens is cut into chunks, and chunks into *groups*. All chunks of a group are computed at once, each product
one launch for all of them, and groups come one after the other. What is multiplied is rounded to the model's dtype, in
both directions; sums are float32.

Shapes: b batch, t tokens, k chunks of a group, c tokens of a chunk.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

# Of a group's largest arrays, which each scan counts for itself: 256 MiB in float32.
GROUP_NUMBERS = 2**26


@dataclasses.dataclass(frozen=True)
class Cut:
    """How rows of so many tokens are cut: `groups` groups of `count` chunks of `size` tokens, padded at the end."""

    length: int
    size: int
    count: int
    groups: int

    @classmethod
    def of(cls, length: int, size: int, numbers: int) -> Cut:
        """As many chunks to a group as `GROUP_NUMBERS` has room for, of so many numbers each, or one."""
        chunks = -(-length // size)
        groups = -(-chunks // max(1, GROUP_NUMBERS // numbers))
        return cls(length, size, -(-chunks // groups), groups)

    @property
    def padding(self) -> int:
        """Tokens that are put after a row."""
        return self.groups * self.count * self.size - self.length

    def tokens(self, y: Shaped[Array, "b t *each"]) -> Shaped[Array, "b groups k c *each"]:
        """What tokens have; 0 of those that are put after them."""
        y = jnp.pad(y, ((0, 0), (0, self.padding), *[(0, 0)] * (y.ndim - 2)))
        return y.reshape(y.shape[0], self.groups, self.count, self.size, *y.shape[2:])

    def runs(self, runs: Int[Array, "b t"]) -> Int[Array, "b groups k c"]:
        """Tokens that are put after a row go on with its last run."""
        runs = jnp.pad(runs, ((0, 0), (0, self.padding)), mode="edge")
        return runs.reshape(-1, self.groups, self.count, self.size)


def kept(exponent: Float[Array, "*all"], where: Bool[Array, "*mask"]) -> Float[Array, "*out"]:
    """exp, and 0 elsewhere, of which no gradient is NaN."""
    return jnp.exp(jnp.where(where, exponent, -jnp.inf))


def product(spec: str, dtype: Any, a: Float[Array, "*a"], b: Float[Array, "*b"]) -> Float[Array, "*out"]:
    """An einsum whose operands, and in the backward pass the result's gradient, are rounded to a dtype; float32.

    Float32 is not rounded: on a GPU XLA would else multiply it in TF32.
    """
    return cast(Array, _product(spec, dtype, a, b))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _product(spec, dtype, a, b):
    precision = jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None
    return jnp.einsum(spec, a.astype(dtype), b.astype(dtype), precision=precision, preferred_element_type=jnp.float32)


def _product_forward(spec, dtype, a, b):
    # Empty arrays say of which dtype the gradients are.
    kept = a.astype(dtype), b.astype(dtype), jnp.zeros((0,), a.dtype), jnp.zeros((0,), b.dtype)
    return _product(spec, dtype, a, b), kept


def _product_backward(spec, dtype, kept, gradient):
    a, b, like_a, like_b = kept
    operands, result = spec.split("->")
    left, right = operands.split(",")
    da = product(f"{result},{right}->{left}", dtype, gradient, b)
    db = product(f"{left},{result}->{right}", dtype, a, gradient)
    return da.astype(like_a.dtype), db.astype(like_b.dtype)


_product.defvjp(_product_forward, _product_backward)
