"""The layers of a decoder. Parameters keep the checkpoint's names and orientation: a linear weight is [out, in].

The maths of LoRA is `Linear.__call__`: the frozen base, scaling * (x A^T) B^T, DoRA's gain on both, the bias.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from jaxlora import fp8, quant, remat, sharding
from jaxlora.config import QuantConfig
from jaxlora.kernels import api as kernels
from jaxlora.kernels.ahead import Ahead
from jaxlora.kernels.dense_matmul import MOST_TOKENS
from jaxlora.kernels.dropout import dropout
from jaxlora.kernels.fake_quant import fake_quantize_input, fake_quantize_weight
from jaxlora.kernels.lora import lora_delta, plus_dropped_delta
from jaxlora.kernels.ordered import Ordered, plain
from jaxlora.kernels.reference import InputNorm, Residual
from jaxlora.norms import Identity, Norm
from jaxlora.offload import take_rows
from jaxlora.variables import Adapted, AdapterConstant, base_param, normal


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
        ahead: Sequence[Ahead] = (),
    ) -> Float[Array, "*batch d_out"] | Unsummed:
        """stream + multiplier * self(x), where a kernel adds while it multiplies (`adds_residual`); else `Unsummed`,
        and the product may fetch what is `ahead`."""
        if not self.adds_residual(x):
            [y] = linear_each([self], x, [key], parts=True, ahead=ahead)
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
    linears: list,
    x: Float[Array, "*batch d_in"] | Ordered | Unnormed,
    keys: list,
    parts: bool = False,
    ahead: Sequence[Ahead] = (),
) -> list[Any]:
    """[linear(x, key), ...]: what reads the same x. Few tokens meet their weights in one launch, see
    `quant.matmul_each`, and are normed in it if they are `Unnormed`; many tokens are read by the gradients of all their
    adapters together. With `parts`, for those who add them up, results that are products and nothing else may be
    `Parts`. Products of few tokens may fetch what is `ahead`."""
    read, norm = read_by(linears, x)
    tokens = math.prod(read.shape[:-1])
    bases: list[Any] = [None] * len(linears)
    if all(linear.has_base_product(tokens) for linear in linears):
        parts = parts and norm is None and all(linear.is_product(tokens) and linear.bias is None for linear in linears)
        # Where x is rounded to float8, what parts lose in 16 bits is little beside that.
        in_float8 = all(linear.matmul_dtype is not None for linear in linears)
        of_parts: Any = jnp.dtype(jnp.bfloat16) if parts and in_float8 else parts
        weights = [linear.current_weight() for linear in linears]
        bases = quant.matmul_each(read, weights, norm=norm, parts=of_parts, ahead=ahead)
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
    gate: Linear,
    up: Linear,
    x: Float[Array, "*batch d_in"] | Ordered | Unnormed,
    act: str,
    keys: list,
    ordered: Any,
    ahead: Sequence[Ahead] = (),
) -> Any:
    """act(gate(x)) * up(x). Few tokens take one launch for all of it, the norm too if they are `Unnormed`, where there
    is a kernel, which may fetch what is `ahead`. With `ordered`, a dtype, it may be `Ordered`."""
    tokens = math.prod(x.shape[:-1])
    if gate.bias is up.bias is None and gate.is_product(tokens) and up.is_product(tokens):
        read, norm = read_by([gate, up], x)
        weights = [gate.weight.get_value(), up.weight.get_value()]
        return quant.matmul_each(read, weights, norm=norm, act=act, ordered=ordered, ahead=ahead)[0]
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


def ordered_dtype(linears: list, x: Float[Array, "*batch d"], float8: bool = True) -> Any:
    """The dtype in which linears that read the same, of as many tokens as x and of its dtype, take it as `Ordered`, in
    one launch, and read it for nothing else; None if they do not. It is float8 where all multiply in that, and `float8`
    says that who makes it can."""
    tokens = math.prod(x.shape[:-1])
    if not all(linear.is_product(tokens) for linear in linears):
        return None
    read = jax.ShapeDtypeStruct((tokens, linears[0].in_features), x.dtype)
    float8 = float8 and all(linear.matmul_dtype is not None for linear in linears)
    return quant.ordered_dtype(read, [linear.weight.get_value() for linear in linears], float8)


def begins_with(linears: list, tokens: int, is_gated: bool = False, is_following: bool = False) -> list[Ahead]:
    """What products of so many tokens in float8 with linears that read the same, or a gate of two, first read, for who
    is before them to fetch; or, of linears that are of stacks, what those after them read. Products in 16 bits wait for
    the card's power limit, and were no faster for it."""
    if not all(linear.is_product(tokens) and linear.matmul_dtype is not None for linear in linears):
        return []
    weights = [linear.weight.get_value() for linear in linears]
    if is_following:
        if not all(isinstance(w, quant.QuantizedArray) and w.index is not None for w in weights):
            return []
        weights = [w.following() for w in weights]
    return quant.begins_with(tokens, weights, is_gated)


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


def summed_and_normed(x: Any, norm: Norm | Identity, multiplier: float, ordered: Any = None) -> tuple[Array, Any]:
    """The residual stream, which may be `Unsummed`, and what the norm makes of it; with `ordered`, a dtype, that may be
    `Ordered`."""
    return norm.after(*(x if isinstance(x, Unsummed) else (x, None)), multiplier, ordered)


def summed_and_unnormed(x: Any, norm: Norm | Identity, multiplier: float, linears: list) -> tuple[Any, Any]:
    """The same, where `linear_each` or `gated_linear` of some linears reads the second, and norms it if the sum is
    there already."""
    if isinstance(x, Unsummed) or isinstance(norm, Identity):
        ordered = ordered_dtype(linears, x.x) if isinstance(x, Unsummed) else None
        return summed_and_normed(x, norm, multiplier, ordered)
    return x, Unnormed(x, norm)
