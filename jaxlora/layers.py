"""The layers of a decoder. Parameters keep the checkpoint's names and orientation: a linear weight is [out, in].

The maths of LoRA is `Linear.__call__`, three lines: the frozen base, its bias, and scaling * (x A^T) B^T.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxlora import quant
from jaxlora.config import QuantConfig
from jaxlora.kernels.lora import lora_delta
from jaxlora.offload import take_rows


class BaseParam(nnx.Variable):
    """A weight of the checkpoint that does not learn: an array or a `QuantizedArray`."""


class TrainableParam(nnx.Param):
    """A weight of the checkpoint that learns."""


class LoraParam(TrainableParam):
    """A matrix of an adapter: A [r, in] or B [out, r], float32."""


class AdapterConstant(nnx.Variable):
    """Part of an adapter that neither learns nor counts."""


class AdapterStart(AdapterConstant):
    """A or B at the start, [*stack, r, in] or [*stack, out, r], whose product was taken out of the base weight."""


class AdapterScale(AdapterConstant):
    """The factor alpha / r of an adapter, per layer.

    [*stack], or [*stack, r] where layers of a stack differ in rank: the factor, and zero for what is padding.
    """


ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_pytorch_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
}


def _normal(rngs: nnx.Rngs, shape: tuple[int, ...], dtype) -> Array:
    return (jax.random.normal(rngs.params(), shape, jnp.float32) * 0.02).astype(dtype)


def base_param(value: Any, axes: tuple[str | None, ...]) -> BaseParam:
    """A frozen parameter with its logical axis names, one for each dimension."""
    return BaseParam(value, axes=axes)


class Linear(nnx.Module):
    """y = x W^T + b + scaling * (dropout(x) A^T) B^T, with W frozen, dense or quantised, and A, B the adapter if any.

    Shapes: x [..., in] -> [..., out] in x's dtype. `stack` is the number of layers held on a leading axis, which a scan
    slices off before the call; None for a linear that is no part of a stack. `axes` names (out, in).
    """

    lora_A: Any  # a LoraParam, or None where there is no adapter; so the next, and an AdapterScale
    lora_B: Any
    lora_scaling: Any
    lora_ranks: tuple[int, ...]

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        axes: tuple[str, str],
        dtype: Any,
        rngs: nnx.Rngs,
        bias: bool = False,
        stack: int | None = None,
        quant_config: QuantConfig | None = None,
    ):
        self.in_features, self.out_features, self.stack, self.axes = in_features, out_features, stack, axes
        lead, lead_axes = ((stack,), ("layers",)) if stack is not None else ((), ())
        weight = _normal(rngs, (*lead, out_features, in_features), dtype)
        if quant_config is not None:
            weight = quant.quantize(
                weight, scheme=quant_config.scheme, double_quant=quant_config.double_quant, dtype=dtype
            )
        self.weight = base_param(weight, (*lead_axes, *axes))
        self.bias = base_param(jnp.zeros((*lead, out_features), dtype), (*lead_axes, axes[0])) if bias else None
        self.lora_A = self.lora_B = self.lora_scaling = nnx.data(None)
        self.lora_start_A = self.lora_start_B = nnx.data(None)
        self.lora_dropout, self.lora_ranks = 0.0, ()

    def __call__(self, x: Float[Array, "*batch d_in"], key: Any = None) -> Float[Array, "*batch d_out"]:
        y = quant.matmul(x, self.weight.get_value())
        if self.bias is not None:
            y = y + self.bias.get_value().astype(y.dtype)
        if self.lora_A is not None:
            dropped = dropout(x, self.lora_dropout, key)
            y = y + lora_delta(dropped, self.lora_A.get_value(), self.lora_B.get_value(), self.lora_scaling.get_value())
        return y


def dropout(x: Float[Array, "*shape"], rate: float, key: Any) -> Float[Array, "*shape"]:
    """Zero each entry with probability `rate` and scale the rest by 1 / (1 - rate). No key means no dropout."""
    if rate == 0.0 or key is None:
        return x
    keep = jax.random.bernoulli(key, 1.0 - rate, x.shape)
    return jnp.where(keep, x / jnp.asarray(1.0 - rate, x.dtype), jnp.zeros((), x.dtype))


class Embedding(nnx.Module):
    """Rows of a table: ids [...] -> [..., features]."""

    def __init__(self, num_embeddings: int, features: int, *, dtype: Any, rngs: nnx.Rngs):
        self.weight = base_param(_normal(rngs, (num_embeddings, features), dtype), ("vocab", "embed"))

    def __call__(self, ids: Int[Array, "*batch"]) -> Float[Array, "*batch features"]:
        return take_rows(self.weight.get_value(), ids)


class Norm(nnx.Module):
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
        self.kind, self.eps, self.offset = kind, eps, offset
        self.weight = base_param(jnp.full((*lead, *shape), 1.0 - offset, dtype), (*lead_axes, *axes))
        self.bias = base_param(jnp.zeros((*lead, *shape), dtype), (*lead_axes, *axes)) if bias else None

    def __call__(self, x: Float[Array, "*batch features"]) -> Float[Array, "*batch features"]:
        wide, weight = x.astype(jnp.float32), self.weight.get_value()
        if self.kind == "layer_norm":
            wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
        normed = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        if self.kind == "rms_norm" and self.offset == 0.0 and self.bias is None:
            return normed.astype(x.dtype) * weight.astype(x.dtype)
        out = normed * (weight.astype(jnp.float32) + self.offset)
        if self.bias is not None:
            out = out + self.bias.get_value().astype(jnp.float32)
        return out.astype(x.dtype)


class Identity(nnx.Module):
    """What stands where a family has no norm."""

    def __call__(self, x: Array) -> Array:
        return x
