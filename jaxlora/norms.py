"""Norms over features, and what stands where a family has none."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxlora.kernels import api as kernels
from jaxlora.kernels.parts import Parts
from jaxlora.kernels.reference import InputNorm
from jaxlora.kernels.residual_norm import added
from jaxlora.kernels.rms_norm import LEAST_TOKENS
from jaxlora.variables import Weighted, base_param


class Norm(Weighted):
    """A norm over the last axis, the statistics in float32:  normalised * (offset + weight) + bias.

    "rms_norm" divides by the root of the mean square (arXiv:1910.07467), "layer_norm" by the standard deviation after
    taking off the mean (arXiv:1607.06450). `shape` is the weight's: [features], or more axes that broadcast, such as
    [heads, head_dim]. An rms_norm without offset rounds to x's dtype before it multiplies, as Llama does.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        *,
        kind: str,
        eps: float,
        dtype: Any,
        axes: tuple[str, ...],
        bias: bool = False,
        offset: float = 0.0,
        stack: int | None = None,
    ):
        lead, lead_axes = ((stack,), ("layers",)) if stack is not None else ((), ())
        self.kind, self.eps, self.offset, self.stack = kind, eps, offset, stack
        self.weight = base_param(jnp.full((*lead, *shape), 1.0 - offset, dtype), (*lead_axes, *axes))
        self.bias = base_param(jnp.zeros((*lead, *shape), dtype), (*lead_axes, *axes)) if bias else None
        self.index = nnx.data(None)  # which of a stack, see `at`
        self.read_in: str | None = None  # the `matmul_dtype` of the products that read the result
        self.without_copies()

    @property
    def is_read_by_index(self) -> bool:
        """Whether it is a stack whose weights kernels read by index (`at`), and which so need not be sliced."""
        plain = self.trained_weight is None and self.trained_bias is None
        return self.stack is not None and plain and self._is_rms_norm

    @property
    def _is_rms_norm(self) -> bool:
        return self.kind == "rms_norm" and self.bias is None

    def at(self, index: Any) -> Norm:
        """One of a stack of norms, without copying its weight."""
        copy = jax.tree.map(lambda leaf: leaf, self)
        copy.index = nnx.data(index)
        return copy

    def of_products(self) -> InputNorm:
        """An rms_norm as the products that read its result take it (`quant.matmul_each`)."""
        return InputNorm(self.current_weight(), self.index, self.eps, self.offset)

    def __call__(self, x: Float[Array, "*batch features"]) -> Float[Array, "*batch features"]:
        return self.after(x, None)[1]

    def after(
        self,
        x: Float[Array, "*batch features"],
        y: Float[Array, "*batch features"] | Parts | None,
        multiplier: float = 1.0,
        ordered: Any = None,
    ) -> tuple[Float[Array, "*batch features"], Any]:
        """(x + multiplier * y, the norm of that), where y is None (x, its norm). Few tokens take one launch for it, and
        with `ordered`, a dtype, the norm may be `Ordered`."""
        if self._is_rms_norm:
            options: dict[str, Any] = dict(eps=self.eps, offset=self.offset, multiplier=multiplier, ordered=ordered)
            if self.read_in is not None and math.prod(x.shape[:-1]) >= LEAST_TOKENS:
                options["implementation"] = "reference"  # XLA norms where it looks for the scales, and where it rounds
            return kernels.residual_norm(x, y, self.current_weight(), self.index, **options)
        x = x if y is None else added(x, y, multiplier)
        wide, weight = x.astype(jnp.float32), self.current_weight()
        if self.kind == "layer_norm":
            wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
        normed = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        out = normed * (weight.astype(jnp.float32) + self.offset)
        if self.bias is not None:
            out = out + self.current_bias().astype(jnp.float32)
        return x, out.astype(x.dtype)


def rms_normed(x: Float[Array, "*batch features"], eps: float) -> Float[Array, "*batch features"]:
    """x over the root of the mean square of its last axis, the statistics in float32: a `Norm` without a weight."""
    wide = x.astype(jnp.float32)
    return (wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)).astype(x.dtype)


class Identity(nnx.Module):
    """What stands where a family has no norm."""

    def __call__(self, x: Float[Array, ...]) -> Float[Array, ...]:
        return x

    def after(self, x, y, multiplier: float = 1.0, ordered: Any = None):
        """(x + multiplier * y) twice, as `Norm.after`."""
        x = x if y is None else added(x, y, multiplier)
        return x, x
