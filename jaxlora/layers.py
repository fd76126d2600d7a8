"""The layers of a decoder. Parameters keep the checkpoint's names and orientation: a linear weight is [out, in].

The maths of LoRA is `Linear.__call__`: the frozen base, scaling * (x A^T) B^T, DoRA's gain on both, the bias.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from jaxlora import fp8, quant, remat, sharding
from jaxlora.config import QuantConfig
from jaxlora.kernels import api as kernels
from jaxlora.kernels.dense_matmul import MOST_TOKENS
from jaxlora.kernels.dropout import dropout
from jaxlora.kernels.fake_quant import fake_quantize_input, fake_quantize_weight
from jaxlora.kernels.lora import lora_delta, plus_dropped_delta, row_norms
from jaxlora.kernels.ordered import Ordered, plain
from jaxlora.kernels.parts import Parts
from jaxlora.kernels.reference import InputNorm, Residual
from jaxlora.kernels.residual_norm import added
from jaxlora.kernels.rms_norm import LEAST_TOKENS
from jaxlora.offload import take_rows


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


class Linear(Adapted):
    """y = x W^T + b + scaling * (dropout(x) A^T) B^T, with W frozen, dense or quantised, and A, B the adapter if any.

    With DoRA both products are multiplied by `dora_gain`, which a merged weight has in it. `qat_scheme` is None, or
    says what the merged weight and x are rounded to on the way (`kernels.fake_quant`). `matmul_dtype` is None, or "fp8"
    for products in float8 (`fp8.matmul`). Shapes: x [..., in] -> [..., out] in x's dtype.
    """

    qat_scheme: str | None
    matmul_dtype: str | None

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
        weight = normal(rngs, (*lead, out_features, in_features), dtype)
        if quant_config is not None:
            weight = quant.quantize(
                weight, scheme=quant_config.scheme, double_quant=quant_config.double_quant, dtype=dtype
            )
        self.weight = base_param(weight, (*lead_axes, *axes))
        self.bias = base_param(jnp.zeros((*lead, out_features), dtype), (*lead_axes, axes[0])) if bias else None
        self.qat_scheme = self.matmul_dtype = None
        self.without_adapter()
        self.without_copies()

    def __call__(
        self, x: Float[Array, "*batch d_in"], key: Any = None, base: Float[Array, "*batch d_out"] | None = None
    ) -> Float[Array, "*batch d_out"]:
        """base: x W^T where it is known already, see `linear_each`."""
        y = self._product(x, key, base) if self.qat_scheme is None else self._rounded_product(x, self.qat_scheme)
        return self.biased(y)

    def biased(self, y: Float[Array, "*batch d_out"]) -> Float[Array, "*batch d_out"]:
        return y if self.bias is None else y + self.current_bias().astype(y.dtype)

    def has_base_product(self, tokens: int) -> bool:
        """Whether so many tokens are multiplied by the weight itself, and the adapter's part, if any, is added."""
        if self.qat_scheme is not None or self.lora_magnitude is not None:
            return False
        weight = self.weight.get_value()
        if isinstance(weight, fp8.Fp8Array) or (
            self.matmul_dtype is not None and quant.is_merging_cheaper(tokens, weight.shape)
        ):
            return False
        if isinstance(weight, quant.QuantizedArray):
            return self.lora_A is None or not quant.is_merging_cheaper(tokens, weight.shape)
        return not isinstance(weight, quant.MergedArray)

    @property
    def has_plain_adapter(self) -> bool:
        """Whether there is an adapter, without dropout."""
        return self.lora_A is not None and self.lora_dropout == 0.0

    @property
    def is_adapted_product(self) -> bool:
        """Whether it is linear in x, and its adapter's gradient is made of x."""
        return self.is_dropping_product and self.lora_dropout == 0.0

    @property
    def is_dropping_product(self) -> bool:
        """Whether it `is_adapted_product`, but for a dropout of what an adapter without DoRA reads."""
        is_ours = self.lora_A is not None and self.qat_scheme is None and self.matmul_dtype is None
        return is_ours and (self.lora_magnitude is None or self.lora_dropout == 0.0)

    def is_merged(self, tokens: int) -> bool:
        """Whether so many tokens are multiplied by a weight with the adapter in it, and that is all but a bias."""
        weight = self.weight.get_value()
        if not self.is_adapted_product or self.trained_weight is not None:
            return False
        is_quantized = isinstance(weight, quant.QuantizedArray) and quant.is_merging_cheaper(tokens, weight.shape)
        return is_quantized or isinstance(weight, quant.MergedArray)

    def is_product(self, tokens: int) -> bool:
        """Whether for so many tokens the result is x W^T and reads x for nothing else."""
        return self.has_base_product(tokens) and self.lora_A is None and self.trained_weight is None

    def adds_residual(self, x: Float[Array, "*batch d_in"] | Ordered | jax.ShapeDtypeStruct) -> bool:
        """Whether `onto` adds in the launch of the product. Of x only shape and dtype matter."""
        tokens = math.prod(x.shape[:-1])
        if not self.is_product(tokens) or self.bias is not None:
            return False
        return quant.adds_residual(jax.ShapeDtypeStruct((tokens, self.in_features), x.dtype), self.weight.get_value())

    def onto(
        self,
        stream: Float[Array, "*batch d_out"],
        x: Float[Array, "*batch d_in"] | Ordered,
        multiplier: float,
        key: Any = None,
    ) -> Float[Array, "*batch d_out"] | Unsummed:
        """stream + multiplier * self(x), where a kernel adds while it multiplies (`adds_residual`); else `Unsummed`."""
        if not self.adds_residual(x):
            [y] = linear_each([self], x, [key], parts=True)
            return Unsummed(stream, y)
        return quant.matmul_each(x, [self.weight.get_value()], residual=Residual(stream, multiplier))[0]

    def stacked(self) -> Linear:
        """A copy whose weight, where it is dense and one of a stack, is to be read by index (`quant.StackedArray`)."""
        weight = self.weight.get_value()
        is_plain = self.trained_weight is None and self.qat_scheme is None and self.matmul_dtype is None
        if self.stack is None or not is_plain or isinstance(weight, quant.QuantizedArray):
            return self
        copy = jax.tree.map(lambda leaf: leaf, self)
        copy.weight.set_value(quant.StackedArray(weight))
        return copy

    def _product(self, x: Array, key: Any, base: Array | None) -> Array:
        weight = self.current_weight()
        # A copy of the weight learns, and float8 products take the weight for a constant.
        matmul = quant.matmul if self.matmul_dtype is None or self.trained_weight is not None else fp8.matmul
        if self.lora_A is None:
            return matmul(x, weight) if base is None else base
        linear = self.with_norms(x.dtype)
        adapter = linear.low_rank()
        if base is None and not self._is_dropping(key):
            return linear.gained(matmul(x, weight, adapter))
        if self.lora_magnitude is None:
            return self._plus_delta(matmul(x, weight) if base is None else base, x, key)
        gain = self.dora_gain(linear.lora_norms.get_value())
        dropped = dropout(x, self.lora_dropout, key)
        parts = matmul(x, weight), matmul(dropped, weight), lora_delta(dropped, *adapter[:3])
        y, extra, delta = (part.astype(jnp.float32) for part in parts)  # a gain is near 1
        return (y + (gain - 1.0) * extra + gain * delta).astype(x.dtype)

    def low_rank(self) -> quant.LowRank:
        """Its adapter, with DoRA's gain, as a constant, of a copy that knows its norms (`with_norms`)."""
        gain = None if self.lora_norms is None else jax.lax.stop_gradient(self.dora_gain(self.lora_norms.get_value()))
        return quant.LowRank(self.lora_A.get_value(), self.lora_B.get_value(), self.lora_scaling.get_value(), gain)

    def with_norms(self, dtype: Any) -> Linear:
        """With DoRA a copy that knows its `dora_norms`; else itself. dtype: what A is multiplied by the weight in."""
        if not self.wants_norms:
            return self
        return self.knowing(self.dora_norms(quant.matmul(self.lora_A.get_value().astype(dtype), self.current_weight())))

    @property
    def wants_norms(self) -> bool:
        """Whether its products need `dora_norms` that it does not know."""
        return self.lora_magnitude is not None and self.lora_norms is None and self.qat_scheme is None

    def knowing(self, norms: Float[Array, "*stack d_out"]) -> Linear:
        """A copy that knows these `dora_norms`."""
        copy = jax.tree.map(lambda leaf: leaf, self)
        copy.lora_norms = nnx.data(AdapterConstant(norms))
        return copy

    def gained(self, y: Float[Array, "*batch d_out"]) -> Float[Array, "*batch d_out"]:
        """A product of `low_rank`, with the gradient of DoRA's magnitudes, of a copy that knows its norms. That reads
        the product, so it has a name, such as "mlp_to_embed" (see `remat`)."""
        if self.lora_norms is None:
            return y
        y = checkpoint_name(y, f"{self.axes[1]}_to_{self.axes[0]}")
        return quant.with_gain(y, self.dora_gain(self.lora_norms.get_value()))

    def times_adapted(self, x: Float[Array, "*batch d_in"], key: Any) -> Float[Array, "*batch d_out"]:
        """The product alone, where it `is_dropping_product`."""
        if self._is_dropping(key):
            return self._plus_delta(quant.matmul(x, self.current_weight()), x, key)
        return quant.matmul(x, self.current_weight(), self.low_rank())

    def _is_dropping(self, key: Any) -> bool:
        return self.lora_dropout > 0.0 and key is not None

    def _plus_delta(self, y: Float[Array, "*batch d_out"], x: Float[Array, "*batch d_in"], key: Any) -> Array:
        a, b, scaling, _ = self.low_rank()
        if self._is_dropping(key):
            return plus_dropped_delta(y, x, self.lora_dropout, key, a, b, scaling)
        return y + lora_delta(x, a, b, scaling)

    def dense(self, dtype: Any, tokens: int) -> Linear:
        """A copy for so many tokens, some at a time: its weight is a dense constant, perhaps with the adapter in it."""
        copy = jax.tree.map(lambda leaf: leaf, self.with_norms(dtype))
        weight = self.weight.get_value()
        if not isinstance(weight, quant.QuantizedArray):
            if isinstance(weight, jax.Array):
                copy.weight.set_value(sharding.gathered(weight, self.axes))
            return copy
        is_many, is_plain = quant.is_merging_cheaper(tokens, weight.shape), self.lora_magnitude is None
        if self.matmul_dtype is not None and is_many and is_plain and (self.has_plain_adapter or self.lora_A is None):
            adapter = None if self.lora_A is None else jax.lax.stop_gradient(self.low_rank())
            dense = fp8.round_both(weight, adapter)
        elif self.is_adapted_product and is_many:
            dense = quant.MergedArray(quant.merge(weight, jax.lax.stop_gradient(copy.low_rank()), dtype))
        else:
            dense = quant.dequantize(weight, dtype)
        copy.weight.set_value(dense)
        return copy

    def _rounded_product(self, x: Array, scheme: str) -> Array:
        return quant.matmul(fake_quantize_input(x, scheme), fake_quantize_weight(self._merged(x.dtype), scheme))

    def _merged(self, dtype: Any) -> Float[Array, "d_out d_in"]:
        """The weight with its adapter in it, of one layer, as it would be exported in this dtype."""
        weight = self.current_weight()
        if isinstance(weight, quant.QuantizedArray):
            weight = jax.lax.stop_gradient(quant.dequantize(weight, jnp.float32))
        if self.lora_A is None:
            return weight.astype(dtype)
        a, b, scaling = self.lora_A.get_value(), self.lora_B.get_value(), self.lora_scaling.get_value()
        merged = weight.astype(jnp.float32) + jnp.matmul(b * scaling, a)
        if self.lora_magnitude is not None:
            merged = self.dora_gain(self.dora_norms(quant.matmul(a, weight)))[:, None] * merged
        return merged.astype(dtype)


def linear_each(
    linears: list, x: Float[Array, "*batch d_in"] | Ordered | Unnormed, keys: list, parts: bool = False
) -> list[Any]:
    """[linear(x, key), ...]: what reads the same x. Few tokens meet their weights in one launch, see
    `quant.matmul_each`, and are normed in it if they are `Unnormed`; many tokens are read by the gradients of all their
    adapters together. With `parts`, for those who add them up, results that are products and nothing else may be
    `Parts`."""
    read, norm = read_by(linears, x)
    tokens = math.prod(read.shape[:-1])
    bases: list[Any] = [None] * len(linears)
    if all(linear.has_base_product(tokens) for linear in linears):
        parts = parts and norm is None and all(linear.is_product(tokens) and linear.bias is None for linear in linears)
        bases = quant.matmul_each(read, [linear.current_weight() for linear in linears], norm=norm, parts=parts)
        if parts:
            return bases
    read = plain(read)
    if all(linear.is_merged(tokens) for linear in linears):
        linears = [linear.with_norms(read.dtype) for linear in linears]
        weights, adapters = zip(*((linear.weight.get_value(), linear.low_rank()) for linear in linears), strict=True)
        ys = quant.matmul_merged(read, weights, adapters)
        return [linear.biased(linear.gained(y)) for linear, y in zip(linears, ys, strict=True)]
    # The same array for all: by that `layer_inputs` knows what they have in common.
    return [linear(read, key, base) for linear, key, base in zip(linears, keys, bases, strict=True)]


def gated_linear(
    gate: Linear, up: Linear, x: Float[Array, "*batch d_in"] | Ordered | Unnormed, act: str, keys: list, ordered: bool
) -> Any:
    """act(gate(x)) * up(x). Few tokens take one launch for all of it, the norm too if they are `Unnormed`, where there
    is a kernel. With `ordered` it may be `Ordered`."""
    tokens = math.prod(x.shape[:-1])
    if gate.bias is up.bias is None and gate.is_product(tokens) and up.is_product(tokens):
        read, norm = read_by([gate, up], x)
        return quant.matmul_each(
            read, [gate.weight.get_value(), up.weight.get_value()], norm=norm, act=act, ordered=ordered
        )[0]
    left, right = linear_each([gate, up], x, keys)
    return kernels.gated(left, right, act)


def of_gate(
    linear: Any, gate: Float[Array, "*batch d_in"], up: Float[Array, "*batch d_in"], act: str, key: Any
) -> Float[Array, "*batch d_out"]:
    """linear(act(gate) * up, key), of any number of tokens.

    What the linear reads is not kept. The gradient of an adapter reads it again, and then it is made with the gate's
    gradients, by one kernel where there is one.
    """
    if not linear.is_dropping_product:
        # Where it is rounded to float8 XLA may make it where it looks for the scales: those steps were measured so.
        implementation = None if linear.matmul_dtype is None else "reference"
        return linear(kernels.gated(gate, up, act, implementation=implementation), key)
    linear = linear.with_norms(gate.dtype)
    structure, learning, frozen = nnx.split(linear, nnx.Param, ...)
    return linear.biased(linear.gained(_of_gate(act, structure, gate, up, learning, frozen, key)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _of_gate(act: str, structure: nnx.GraphDef, gate, up, learning: nnx.State, frozen: nnx.State, key):
    return nnx.merge(structure, learning, frozen).times_adapted(kernels.gated(gate, up, act), key)


def _of_gate_forward(act, structure, *args):
    return _of_gate(act, structure, *args), args


def _of_gate_backward(act, structure, saved, dy):
    gate, up, learning, frozen, key = saved

    def product(learning, h):
        return nnx.merge(structure, learning, frozen).times_adapted(h, key)

    # A linear's gradient by what it reads is the same for whatever it reads, for one mask.
    dh = jax.vjp(functools.partial(product, learning), jnp.zeros_like(gate))[1](dy)[0]
    h, dgate, dup = kernels.gated_backward(gate, up, dh, act)
    d_learning = jax.vjp(lambda learning: product(learning, h), learning)[1](dy)[0]
    return dgate, dup, d_learning, None, None  # None: a zero, for what is constant


_of_gate.defvjp(_of_gate_forward, _of_gate_backward)


def read_ordered(linears: list, x: Float[Array, "*batch d"]) -> bool:
    """Whether linears that read the same, of as many tokens as x and of its dtype, do it in one launch that takes it as
    `Ordered`, and read it for nothing else."""
    tokens = math.prod(x.shape[:-1])
    read = jax.ShapeDtypeStruct((tokens, linears[0].in_features), x.dtype)
    are_products = all(linear.is_product(tokens) for linear in linears)
    return are_products and quant.reads_ordered(read, [linear.weight.get_value() for linear in linears])


class PlainLinear(nnx.Module):
    """y = x W^T + b, for what is never quantised and no adapter's target: routers, gates, Mamba's last projection.

    Shapes: x [..., in] -> [..., out] in x's dtype; `stack` layers on a leading axis. `axes` names (out, in).
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        axes: tuple[str | None, str | None],
        dtype: Any,
        rngs: nnx.Rngs,
        bias: bool,
        stack: int,
    ):
        self.weight = base_param(normal(rngs, (stack, out_features, in_features), dtype), ("layers", *axes))
        self.bias = base_param(jnp.zeros((stack, out_features), dtype), ("layers", axes[0])) if bias else None

    def __call__(self, x: Float[Array, "*batch d_in"]) -> Float[Array, "*batch d_out"]:
        y = quant.matmul(x, self.weight.get_value())
        return y if self.bias is None else y + self.bias.get_value().astype(y.dtype)


class Embedding(Adapted):
    """Rows of a table: ids [...] -> [..., features].

    Its adapter is that of a linear layer that reads one-hot rows, W^T = table: row i gets scaling * B A_i, with A
    [r, num_embeddings] and B [features, r].
    """

    def __init__(self, num_embeddings: int, features: int, *, dtype: Any, rngs: nnx.Rngs):
        self.in_features, self.out_features, self.axes = num_embeddings, features, ("embed", "vocab")
        self.stack = self.bias = None
        self.weight = base_param(normal(rngs, (num_embeddings, features), dtype), ("vocab", "embed"))
        self.without_adapter()
        self.without_copies()

    def __call__(self, ids: Int[Array, "*batch"]) -> Float[Array, "*batch features"]:
        weight = self.current_weight()
        rows = take_rows(weight, ids)
        if self.lora_A is None:
            return rows
        a, b, scaling = self.lora_A.get_value(), self.lora_B.get_value(), self.lora_scaling.get_value()
        delta = jnp.matmul(jnp.take(a.T, ids, axis=0) * scaling, b.T)
        out = rows.astype(jnp.float32) + delta
        if self.lora_magnitude is not None:
            out = self.dora_gain(self.dora_norms(jnp.matmul(a, weight.astype(a.dtype)))) * out
        return out.astype(rows.dtype)


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
        ordered: bool = False,
    ) -> tuple[Float[Array, "*batch features"], Any]:
        """(x + multiplier * y, the norm of that), where y is None (x, its norm). Few tokens take one launch for it, and
        with `ordered` the norm may be `Ordered`."""
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


class TokenwiseModule(nnx.Module):
    """A module that treats tokens alike, and so can take them a tile at a time: a subclass has `_forward(x, keys)`."""

    def __call__(self, x: Float[Array, "*batch d"], keys: list, tile: int | None = None) -> Float[Array, "*batch d"]:
        """x [B, T, D] -> [B, T, D]; `tile` tokens of a device at a time if given, see `remat`."""
        parts = sharding.row_parts(x.shape[0])
        if tile is None or x.shape[0] * x.shape[1] <= parts * tile:
            return self._forward(x, keys)
        dense = _dense(self, x.dtype, x.shape[0] * x.shape[1])  # once for all tiles

        def one_tile(rows, index):
            return dense._forward(rows, [None if key is None else jax.random.fold_in(key, index) for key in keys])

        return remat.over_tiles(one_tile, x, tile, parts)

    def _forward(self, x: Any, keys: list) -> Any:
        raise NotImplementedError


def _dense(module: nnx.Module, dtype: Any, tokens: int) -> Any:
    """A copy whose quantised weights are dense constants, see `Linear.dense`."""

    def one(leaf):
        if isinstance(leaf, Linear):
            return leaf.dense(dtype, tokens)
        return quant.dequantize(leaf, dtype) if isinstance(leaf, quant.QuantizedArray) else leaf

    return jax.tree.map(one, module, is_leaf=lambda leaf: isinstance(leaf, Linear | quant.QuantizedArray))


def with_norms(module: Any, layers: int, dtype: Any) -> Any:
    """A copy, of a module that is a stack of so many layers, whose linears with DoRA know their `dora_norms`: those
    depend on no token, and so neither a tile nor what is computed again makes them anew."""
    leaves, structure = jax.tree.flatten(module, is_leaf=lambda leaf: isinstance(leaf, Linear))
    wanting = [leaf for leaf in leaves if isinstance(leaf, Linear) and leaf.wants_norms]

    def of_layer(index):
        def one(linear):
            weight, a = linear.weight.get_value(), linear.lora_A.get_value()[index].astype(dtype)
            return quant.matmul(a, weight.at(index) if isinstance(weight, quant.QuantizedArray) else weight[index])

        return [one(linear) for linear in wanting]

    if not wanting:
        return module
    products = jax.lax.stop_gradient(jax.lax.map(of_layer, jnp.arange(layers, dtype=jnp.int32)))
    known = iter(linear.knowing(linear.dora_norms(y)) for linear, y in zip(wanting, products, strict=True))
    return structure.unflatten([next(known) if any(leaf is one for one in wanting) else leaf for leaf in leaves])


def read_by_index(module: Any, x: Float[Array, "*batch d"]) -> Any:
    """A copy whose dense weights of stacks are read by index (`Linear.stacked`), where x is few tokens of 16 bits: for
    these there is a kernel that does it. Else the module itself."""
    if x.dtype.itemsize != 2 or x.size // x.shape[-1] > MOST_TOKENS:
        return module
    one = lambda leaf: leaf.stacked() if isinstance(leaf, Linear) else leaf
    return jax.tree.map(one, module, is_leaf=lambda leaf: isinstance(leaf, Linear))


class Identity(nnx.Module):
    """What stands where a family has no norm."""

    def __call__(self, x: Float[Array, ...]) -> Float[Array, ...]:
        return x

    def after(self, x, y, multiplier: float = 1.0, ordered: bool = False):
        """(x + multiplier * y) twice, as `Norm.after`."""
        x = x if y is None else added(x, y, multiplier)
        return x, x


class Unsummed(NamedTuple):
    """The residual stream x + multiplier * y, [B, T, D] each, where a layer leaves the sum to the norm that reads it
    next: few tokens get both in one launch. y may be `Parts`."""

    x: Any
    y: Any


class Unnormed(NamedTuple):
    """What a norm makes of the residual stream x, [B, T, D], where it is left to the products that read it: few tokens
    get both in one launch."""

    x: Any
    norm: Norm

    @property
    def shape(self) -> tuple[int, ...]:
        return self.x.shape

    def normed(self) -> Float[Array, "*batch d"]:
        return self.norm(self.x)

    def is_read_by_products(self, linears: list) -> bool:
        """Whether nothing but products reads it, and they know such norms."""
        tokens = math.prod(self.shape[:-1])
        return self.norm.is_read_by_index and all(linear.is_product(tokens) for linear in linears)


def read_by(linears: list, x: Float[Array, "*batch d"] | Ordered | Unnormed) -> tuple[Any, InputNorm | None]:
    """What products read of x, and the norm that is left to them."""
    if not isinstance(x, Unnormed):
        return x, None
    return (x.x, x.norm.of_products()) if x.is_read_by_products(linears) else (x.normed(), None)


def summed_and_normed(x: Any, norm: Norm | Identity, multiplier: float, ordered: bool = False) -> tuple[Array, Any]:
    """The residual stream, which may be `Unsummed`, and what the norm makes of it; with `ordered` that may be
    `Ordered`."""
    return norm.after(*(x if isinstance(x, Unsummed) else (x, None)), multiplier, ordered)


def summed_and_unnormed(x: Any, norm: Norm | Identity, multiplier: float, linears: list) -> tuple[Any, Any]:
    """The same, where `linear_each` or `gated_linear` of some linears reads the second, and norms it if the sum is
    there already."""
    if isinstance(x, Unsummed) or isinstance(norm, Identity):
        ordered = isinstance(x, Unsummed) and read_ordered(linears, x.x)
        return summed_and_normed(x, norm, multiplier, ordered)
    return x, Unnormed(x, norm)
