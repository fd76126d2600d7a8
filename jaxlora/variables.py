"""What a parameter is: kinds of variables, and what modules with weights, copies that learn or adapters have in common.

Kinds say who learns: an optimizer takes `TrainableParam`, and a checkpoint of adapters is made of `LoraParam` and the
constants that go with it. All else is frozen.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxlora.kernels.lora import row_norms


class BaseParam(nnx.Variable):
    """A weight of the checkpoint that does not learn: an array or a `QuantizedArray`."""


class TrainableParam(nnx.Param):
    """A weight of the checkpoint that learns."""


class LoraParam(TrainableParam):
    """Part of an adapter, float32: A [r, in], B [out, r], or DoRA's magnitudes [out]."""


class AdapterConstant(nnx.Variable):
    """Part of an adapter that neither learns nor counts."""


class AdapterStart(AdapterConstant):
    """A or B at the start, [*stack, r, in] or [*stack, out, r], whose product was taken out of the base weight."""


class AdapterScale(AdapterConstant):
    """The factor alpha / r of an adapter, per layer.

    [*stack], or [*stack, r] where layers of a stack differ in rank: the factor, and zero for what is padding.
    """


class BaseSquare(AdapterConstant):
    """The squared norm of each output's weights, [*stack, out] float32, of which DoRA needs no more of the base."""


class LayerMask(AdapterConstant):
    """Which layers of a stack use their `Copy`, [stack] bool."""


def normal(rngs: nnx.Rngs, shape: tuple[int, ...], dtype: Any) -> Float[Array, ...]:
    """Random weights of a standard deviation of 0.02."""
    return (jax.random.normal(rngs.params(), shape, jnp.float32) * 0.02).astype(dtype)


class Buffer(BaseParam):
    """A value of the checkpoint that is no parameter in transformers: it neither learns nor counts."""


def base_param(value: Any, axes: tuple[str | None, ...]) -> BaseParam:
    """A frozen parameter with its logical axis names, one for each dimension."""
    return BaseParam(value, axes=axes)


class Copy(nnx.Module):
    """A copy of a checkpoint's weight that learns in its place, float32: PEFT's `modules_to_save`, or a bias.

    `layers` says of each layer of a stack whether its copy is used. The others are padding, which is masked.
    """

    def __init__(self, base: Float[Array, "*shape"], axes: tuple[str | None, ...], layers: tuple[bool, ...]):
        self.layers = layers
        self.value = TrainableParam(base.astype(jnp.float32), axes=axes)
        self.mask = nnx.data(None if all(layers) else LayerMask(jnp.asarray(layers), axes=("layers",)))

    def __call__(self, base: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        """What stands in for `base`, of one layer."""
        value = self.value.get_value()
        return value if self.mask is None else jnp.where(self.mask.get_value(), value, base.astype(jnp.float32))


class Weighted(nnx.Module):
    """A module with a weight of the checkpoint, or none where it is tied, and perhaps a bias.

    stack: the number of layers held on a leading axis, which a scan slices off before the call; None for a module that
    is no part of a stack.
    """

    weight: Any
    bias: Any
    stack: int | None
    trained_weight: Any  # a `Copy`, or None
    trained_bias: Any

    def without_copies(self) -> None:
        self.trained_weight = self.trained_bias = nnx.data(None)

    def current_weight(self) -> Any:
        """The weight that the module computes with, of one layer: the copy that learns, or the checkpoint's."""
        value = self.weight.get_value()
        return value if self.trained_weight is None else self.trained_weight(value)

    def current_bias(self) -> Any:
        value = self.bias.get_value()
        return value if self.trained_bias is None else self.trained_bias(value)


class Adaptable(nnx.Module):
    """What may carry an adapter: A [*stack, *experts, r, in], B [*stack, *experts, out, r].

    stack: as in `Weighted`. experts: (), or (E,) for E adapters of one rank side by side. `axes` names (out, in),
    `lora_ranks` the rank of each layer of the stack.
    """

    in_features: int
    out_features: int
    axes: tuple[str, str]
    stack: int | None
    experts: tuple[int, ...] = ()
    lora_A: Any  # a LoraParam, or None where there is no adapter; so the next
    lora_B: Any
    lora_scaling: Any  # an AdapterScale
    lora_ranks: tuple[int, ...]

    def without_adapter(self) -> None:
        self.lora_A = self.lora_B = self.lora_scaling = nnx.data(None)
        self.lora_ranks = ()


class Adapted(Adaptable, Weighted):
    """A module with a weight that may carry an adapter, with DoRA's magnitudes [*stack, out]."""

    lora_magnitude: Any  # or None without DoRA; and a BaseSquare
    lora_base_square: Any
    lora_norms: Any  # an AdapterConstant, the `dora_norms`, of a copy that knows them; else None
    lora_start_A: Any  # an AdapterStart, or None where the base is what it was
    lora_start_B: Any
    lora_owns_base: bool  # whether the weight is not the checkpoint's any more, but one that goes with the adapter
    lora_dropout: float

    def without_adapter(self) -> None:
        super().without_adapter()
        self.lora_magnitude = self.lora_base_square = self.lora_norms = nnx.data(None)
        self.lora_start_A = self.lora_start_B = nnx.data(None)
        self.lora_dropout, self.lora_owns_base = 0.0, False

    def dora_norms(self, weight_a: Float[Array, "*stack r d_out"]) -> Float[Array, "*stack d_out"]:
        """||W + scaling B A|| of each output, which counts as a constant (arXiv:2402.09353, section 4.3).

        weight_a: A W^T, of one layer, or of each of the stack.
        """
        norms = row_norms if weight_a.ndim == 2 else jax.vmap(row_norms)
        parts = self.lora_A, self.lora_B, self.lora_scaling, self.lora_base_square
        return jax.lax.stop_gradient(norms(weight_a, *(part.get_value() for part in parts)))

    def dora_gain(self, norms: Float[Array, " d_out"]) -> Float[Array, " d_out"]:
        """DoRA's factor on each output (arXiv:2402.09353, equation 5), m / ||W + scaling B A||, of one layer."""
        gain, scaling = self.lora_magnitude.get_value() / norms, self.lora_scaling.get_value()
        # An output of magnitude 0 is as good as 0, and its gradient is made of it (`quant.with_gain`).
        gain = gain + jnp.where(gain == 0.0, _LEAST_GAIN, 0.0)
        # A layer of the stack that has no adapter has no scaling but zeros.
        return gain if scaling.ndim == 0 else jnp.where(jnp.any(scaling != 0.0), gain, jnp.ones((), gain.dtype))


_LEAST_GAIN = 2.0**-64
