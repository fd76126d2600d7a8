"""A product that is not added up yet.

Where a product of few tokens has fewer tiles than the device has SMs, its kernel divides k among programs, and each of
them leaves its own sum, in float32 (`nf4_matmul_tiles`, `dense_matmul`) or, where x is float8, in bfloat16
(`nf4_matmul_float8`). To add these up is a launch for each result, which reads little and takes as long as a small
product. What reads the result next can add up as it reads:

    sum over p of parts[p], in float32, the first part first, rounded once to the dtype of the product

which is what the product would have returned. Who asks for parts adds them up and does nothing else with one of them.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Parts:
    """parts: float32 or bfloat16 [P, *shape], whose sum over P is a product of that shape; dtype: what it is rounded
    to."""

    parts: Any
    dtype: Any = dataclasses.field(metadata=dict(static=True))

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the product."""
        return self.parts.shape[1:]

    @property
    def count(self) -> int:
        return self.parts.shape[0]

    def reshape(self, *shape: int) -> Parts:
        """The same parts of a product of another shape."""
        return Parts(self.parts.reshape(self.count, *shape), self.dtype)

    def sum(self) -> Float[Array, "*shape"]:
        """The product. Sums written out are loops, which XLA joins for several products; a reduction is a kernel of its
        own for each."""
        each = [self.parts[i].astype(jnp.float32) for i in range(self.count)]
        return functools.reduce(jnp.add, each).astype(self.dtype)


def summed(y: Any) -> Any:
    """What may be `Parts`, added up."""
    return y.sum() if isinstance(y, Parts) else y


def cotangent(dy: Any) -> Any:
    """The cotangent of a product, of that of what may be `Parts`: that of each part, since they are only added up."""
    return dy.parts[0].astype(dy.dtype) if isinstance(dy, Parts) else dy
