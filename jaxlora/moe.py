"""Mixture of experts: a token goes through a few of many MLPs, those that a router gives it to (arXiv:1701.06538).

The maths, for a token x, the router's matrix W [E, D] and experts f_1 ... f_E:

    p = softmax(W x)            over all experts
    C = the k experts of largest p
    y = sum of p_e f_e(x) over e in C,  with the p_e of C made to sum to 1 where `norm_topk_prob` says so

Gemma 4 has x / rms(x) * scale / sqrt(D) in place of the router's x, and a factor on each p_e in the sum.

The layout. N tokens and their choices are N k pairs of a token and an expert. Sorted by expert, the pairs of one expert
are rows that lie together, a group, and a grouped product multiplies each group with a matrix of its own:

    rows  [N k, in]          tokens, repeated k times and sorted
    w     [E, out, in]       or [E, in, out], as the checkpoint has it
    sizes [E]                rows of each group; they add up to N k
    ->    [N k, out]

So the work is that of k experts a token, whatever E is, every shape is static, and no expert is ever too full to take a
token. The rows go there and back by gathers, never by adding into places, so a step gives the same bits each time.

Experts are frozen, dense or quantised, each expert's matrix on its own. Quantised ones are dequantised before the
grouped product and again in its backward pass, which keeps the packed form only, as in `quant.matmul`; for few tokens,
as in generation, a kernel reads the codes of the chosen ones alone (`kernels.grouped_nf4`). Adapters follow
the parameters of transformers, which has gate and up in one, and are two grouped products more (`kernels.grouped`).
The router is a `PlainLinear`: never quantised, no adapter's target.

Nothing so far keeps a router from sending every token to the same experts. The load-balancing loss does
(arXiv:2101.03961, equation 4), of the shares of tokens and of probability that each expert gets over all layers:

    E * sum over e of  share_of_tokens_e * share_of_probability_e
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from jaxlora import quant
from jaxlora.config import ModelConfig, QuantConfig
from jaxlora.kernels.api import gated, grouped_dot, grouped_dot_nf4, grouped_outer
from jaxlora.kernels.grouped import grouped_lora_delta
from jaxlora.kernels.grouped_nf4 import is_cheaper as is_reading_packed_cheaper
from jaxlora.kernels.reference import NF4Fields
from jaxlora.layers import TokenwiseModule
from jaxlora.norms import Identity, rms_normed
from jaxlora.quant import QuantizedArray
from jaxlora.variables import Adaptable, base_param, normal


class Groups(NamedTuple):
    """Rows that are sorted by expert. sizes: rows of each expert [E]; expert: the expert of each row [rows]; int32."""

    sizes: Array
    expert: Array


class RouterLoad(NamedTuple):
    """What routers did with the tokens, summed over layers, float32.

    chosen: how often each expert was chosen [E]; probability: the sum of the probabilities that it got [E]; tokens:
    how many tokens there were [], in each layer anew. Padding is no token.
    """

    chosen: Array
    probability: Array
    tokens: Array


def load_balancing_loss(load: RouterLoad) -> Float[Array, ""]:
    """The loss of this file's header; k if all experts get the same, up to E where k of them get everything."""
    tokens = jnp.maximum(load.tokens, 1.0)
    return load.chosen.size * jnp.sum((load.chosen / tokens) * (load.probability / tokens))


# ---- The grouped product ---------------------------------------------------------------------------------------------


def grouped_matmul(
    x: Float[Array, "rows d_in"],
    w: Float[Array, "experts d0 d1"] | QuantizedArray,
    sizes: Int[Array, " experts"],
    *,
    in_out: bool = False,
) -> Float[Array, "rows d_out"]:
    """Multiply each group of rows with the transpose of its matrix [out, in], or with its matrix [in, out] if `in_out`.

    In x's dtype with float32 sums. A quantised `w` is a constant, as in `quant.matmul`.

    Raises:
      TypeError: the shapes do not fit.
    """
    shape = (*w.leading, *w.shape) if isinstance(w, QuantizedArray) else w.shape
    contracted = 1 if in_out else 2
    if len(shape) != 3 or x.ndim != 2 or shape[contracted] != x.shape[1] or sizes.shape != shape[:1]:
        expected = "[experts, in, out]" if in_out else "[experts, out, in]"
        raise TypeError(
            f"grouped_matmul takes x [rows, in], w {expected} and sizes [experts], not {list(x.shape)}, {list(shape)} "
            f"and {list(sizes.shape)}"
        )
    if isinstance(w, QuantizedArray):
        return _grouped_quantized(contracted, x, w, sizes)
    return _grouped(contracted, x, w.astype(x.dtype), sizes)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _grouped(contracted: int, x: Array, w: Array, sizes: Array) -> Array:
    return grouped_dot(x, w, sizes, contracted)


def _grouped_forward(contracted, x, w, sizes):
    # A frozen w has no gradient, and so no need of x.
    y = grouped_dot(x.value, w.value, sizes.value, contracted)
    return y, (x.value if w.perturbed else None, w.value, sizes.value)


def _grouped_backward(contracted, kept, dy):
    x, w, sizes = kept
    dx = grouped_dot(dy, w, sizes, 3 - contracted)
    if x is None:
        return dx, None, None
    return dx, grouped_outer(dy, x, sizes) if contracted == 2 else grouped_outer(x, dy, sizes), None


_grouped.defvjp(_grouped_forward, _grouped_backward, symbolic_zeros=True)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _grouped_quantized(contracted: int, x: Array, w: QuantizedArray, sizes: Array) -> Array:
    return _quantized_product(contracted, x, w, sizes)


def _quantized_product(contracted: int, x: Array, w: QuantizedArray, sizes: Array) -> Array:
    if w.scheme == "nf4" and is_reading_packed_cheaper(x, w.shape, sizes.size):
        fields = NF4Fields(w.codes, w.scales, w.nested_absmax, w.nested_offset, w.index)
        return grouped_dot_nf4(x, fields, sizes, contracted, shape=w.shape)
    return grouped_dot(x, quant.dequantize(w, x.dtype), sizes, contracted)


def _quantized_forward(contracted, x, w, sizes):
    return _grouped_quantized(contracted, x, w, sizes), (w, sizes)


def _quantized_backward(contracted, kept, dy):
    w, sizes = kept
    dx = _quantized_product(3 - contracted, dy, w, sizes)
    return dx, None, None  # None: a zero for every field of w, and for the sizes, which are integers


_grouped_quantized.defvjp(_quantized_forward, _quantized_backward)


# ---- Modules ---------------------------------------------------------------------------------------------------------


class ExpertLinear(nnx.Module):
    """A linear of every expert, on rows that are sorted by expert: [rows, in] -> [rows, out].

    weight: [stack, E, out, in], or [stack, E, in, out] if `in_out`; bias: [stack, E, out]. A scan slices the stack off
    before the call. `axes` names (out, in).
    """

    def __init__(
        self,
        experts: int,
        in_features: int,
        out_features: int,
        *,
        axes: tuple[str, str],
        dtype: Any,
        rngs: nnx.Rngs,
        bias: bool,
        in_out: bool,
        stack: int,
        quant_config: QuantConfig | None,
    ):
        self.in_features, self.out_features, self.in_out = in_features, out_features, in_out
        self.experts, self.stack, self.axes = experts, stack, axes
        shape, weight_axes = (out_features, in_features), axes
        if in_out:
            shape, weight_axes = shape[::-1], axes[::-1]
        weight = normal(rngs, (stack, experts, *shape), dtype)
        if quant_config is not None:
            weight = quant.quantize(
                weight, scheme=quant_config.scheme, double_quant=quant_config.double_quant, dtype=dtype
            )
        self.weight = base_param(weight, ("layers", "experts", *weight_axes))
        zeros = jnp.zeros((stack, experts, out_features), dtype)
        self.bias = base_param(zeros, ("layers", "experts", axes[0])) if bias else None

    def __call__(self, x: Float[Array, "rows d_in"], groups: Groups) -> Float[Array, "rows d_out"]:
        y = grouped_matmul(x, self.weight.get_value(), groups.sizes, in_out=self.in_out)
        return y if self.bias is None else y + self.bias.get_value().astype(y.dtype)[groups.expert]


class ExpertAdapter(Adaptable):
    """The adapters of all experts on what transformers and PEFT have as one parameter, `gate_up_proj` or `down_proj`.

    Its weight lies in one `ExpertLinear`, or in several whose outputs are the parameter's side by side; it follows the
    parameter whatever the checkpoint's cut. A [stack, E, r, in], B [stack, E, out, r]; in_out: as the weight's.
    """

    def __init__(self, *linears: ExpertLinear):
        first = linears[0]
        self.in_features, self.out_features = first.in_features, sum(linear.out_features for linear in linears)
        self.axes, self.stack, self.experts, self.in_out = first.axes, first.stack, (first.experts,), first.in_out
        self.without_adapter()

    def __call__(self, x: Float[Array, "rows d_in"], groups: Groups) -> Float[Array, "rows d_out"] | None:
        """What the adapter adds to the product; None without one."""
        if self.lora_A is None:
            return None
        a, b, scaling = self.lora_A.get_value(), self.lora_B.get_value(), self.lora_scaling.get_value()
        return grouped_lora_delta(x, a, b, scaling, groups.sizes)


class Experts(nnx.Module):
    """The MLPs of all experts, on rows that are sorted by expert: [rows, D] -> [rows, D]."""

    def __init__(self, config: ModelConfig, make_experts: Callable):
        width, inner, axes = config.hidden_size, config.moe_intermediate_size, ("mlp", "embed")
        self.fused, self.hidden_act = config.fused_experts, config.hidden_act
        self.alpha, self.limit = config.swiglu_alpha, config.swiglu_limit
        if self.fused is not None:
            self.gate_up_proj = make_experts(width, 2 * inner, axes)
        else:
            self.gate_proj, self.up_proj = make_experts(width, inner, axes), make_experts(width, inner, axes)
        self.down_proj = make_experts(inner, width, axes[::-1])
        self.gate_up_lora = ExpertAdapter(*self._gate_up_linears())
        self.down_lora = ExpertAdapter(self.down_proj)

    def _gate_up_linears(self) -> tuple[ExpertLinear, ...]:
        return (self.gate_up_proj,) if self.fused is not None else (self.gate_proj, self.up_proj)

    def linears_of(self, adapter: ExpertAdapter) -> tuple[ExpertLinear, ...]:
        """Where the weight of what an adapter of these experts adapts lies, in the order of its outputs; () if it is
        another's."""
        if adapter is self.gate_up_lora:
            return self._gate_up_linears()
        return (self.down_proj,) if adapter is self.down_lora else ()

    def _gate_up(self, x: Float[Array, "rows d"], groups: Groups) -> tuple[Array, Array]:
        delta = self.gate_up_lora(x, groups)
        if self.fused is None:
            gate, up = self.gate_proj(x, groups), self.up_proj(x, groups)
            if delta is not None:
                of_gate, of_up = jnp.split(delta, 2, axis=-1)
                gate, up = gate + of_gate, up + of_up
        else:
            both = _plus(self.gate_up_proj(x, groups), delta)
            gate, up = (both[:, 0::2], both[:, 1::2]) if self.fused == "interleaved" else jnp.split(both, 2, axis=-1)
        return checkpoint_name(gate, "gate"), checkpoint_name(up, "up")

    def __call__(self, x: Float[Array, "rows d"], groups: Groups) -> Float[Array, "rows d"]:
        gate, up = self._gate_up(x, groups)
        if self.alpha is None or self.limit is None:
            inner = gated(gate, up, self.hidden_act)
        else:
            inner = clamped_swiglu(gate, up, self.alpha, self.limit)
        return _plus(self.down_proj(inner, groups), self.down_lora(inner, groups))


def _plus(y: Array, delta: Array | None) -> Array:
    return y if delta is None else y + delta


def clamped_swiglu(
    gate: Float[Array, "*shape"], up: Float[Array, "*shape"], alpha: float, limit: float
) -> Float[Array, "*shape"]:
    """gpt-oss's gate * sigmoid(alpha gate) * (up + 1), of a gate of at most `limit` and an up within both limits."""
    gate, up = jnp.minimum(gate, limit), jnp.clip(up, -limit, limit)
    return gate * jax.nn.sigmoid(alpha * gate) * (up + 1)


class SparseMLP(TokenwiseModule):
    """The experts that the router chooses for each token, and the shared expert, behind a gate of its own, if any.

    Beside an MLP (`ModelConfig.experts_beside_mlp`) it reads the residual, and the experts have a norm before them.
    `make` builds layers, see `model`.
    """

    def __init__(self, config: ModelConfig, make: Any, shared: nnx.Module | None):
        width = config.hidden_size
        self.num_experts, self.chosen = config.num_experts, config.num_experts_per_tok
        self.normalised, self.eps = config.norm_topk_prob, config.norm_eps
        self.gate = make.plain_linear(width, self.num_experts, (None, "embed"), config.router_bias)
        self.scale = make.zeros((width,), ("embed",)) if config.router_scale else None
        self.per_expert_scale = make.zeros((self.num_experts,), (None,)) if config.router_scale else None
        self.norm = make.norm((width,), ("embed",)) if config.experts_beside_mlp else Identity()
        self.experts = Experts(config, make.experts)
        self.shared_expert: Any = shared
        self.shared_expert_gate: Any = None if shared is None else make.plain_linear(width, 1, (None, "embed"), False)

    def _route(self, rows: Float[Array, "n d"]) -> tuple[Float[Array, "n k"], Int[Array, "n k"], Float[Array, "n e"]]:
        """Weights and indices of each token's experts, and the probabilities of all; float32."""
        if self.scale is not None:
            rows = rms_normed(rows, self.eps) * self.scale.get_value().astype(rows.dtype) * rows.shape[-1] ** -0.5
        probabilities = jax.nn.softmax(self.gate(rows).astype(jnp.float32), axis=-1)
        weights, experts = lax.top_k(probabilities, self.chosen)
        if self.normalised:
            weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
        if self.per_expert_scale is not None:
            weights = weights * self.per_expert_scale.get_value().astype(jnp.float32)[experts]
        return weights, experts, probabilities

    def load(self, x: Float[Array, "b t d"], segment_ids: Int[Array, "b t"] | None) -> RouterLoad:
        """What the router does with these tokens, those of segment 0 left out."""
        _, experts, probabilities = self._route(x.reshape(-1, x.shape[-1]))
        real = jnp.ones(math.prod(x.shape[:2]), bool) if segment_ids is None else segment_ids.reshape(-1) != 0
        real = real.astype(jnp.float32)
        chosen = jnp.sum(jax.nn.one_hot(experts, self.num_experts, dtype=jnp.float32), axis=1)
        return RouterLoad(real @ chosen, real @ probabilities, jnp.sum(real))

    def _forward(self, x: Float[Array, "*batch d"], keys: list) -> Float[Array, "*batch d"]:
        rows = x.reshape(-1, x.shape[-1])
        weights, experts, _ = self._route(rows)
        rows = self.norm(rows)
        pairs = experts.reshape(-1)  # pair i is token i // k's
        order = jnp.argsort(pairs)
        inverse = jnp.argsort(order)
        groups = Groups(jnp.bincount(pairs, length=self.num_experts).astype(jnp.int32), pairs[order])
        out = self.experts(_to_experts(rows, order, inverse), groups)
        out = _from_experts(out, order, inverse).reshape(*weights.shape, -1)
        y = jnp.sum(out.astype(jnp.float32) * weights[..., None], axis=1).astype(x.dtype).reshape(x.shape)
        if self.shared_expert is not None:
            y = y + jax.nn.sigmoid(self.shared_expert_gate(x)) * self.shared_expert(x, keys)
        return y


# Of N tokens and N k pairs, pair i being token i // k's: `order` says which pair each sorted row is, `inverse` which
# row each pair is. By both the way there and the way back only move rows, and so do their gradients, which XLA would
# make scatters of.


@jax.custom_vjp
def _to_experts(rows: Float[Array, "n d"], order: Int[Array, " nk"], inverse: Int[Array, " nk"]) -> Array:
    """The tokens of the sorted pairs, [N k, D]."""
    return _rows_at(rows, order // (order.size // rows.shape[0]))


def _to_experts_backward(kept, gradient):
    inverse, of_tokens = kept
    pairs = _rows_at(gradient, inverse).reshape(of_tokens.shape[0], -1, gradient.shape[-1])
    return jnp.sum(pairs, axis=1, dtype=jnp.float32).astype(gradient.dtype), None, None


_to_experts.defvjp(
    # Of the tokens only how many they are is kept.
    lambda rows, order, inverse: (_to_experts(rows, order, inverse), (inverse, jnp.zeros((rows.shape[0], 0)))),
    _to_experts_backward,
)


@jax.custom_vjp
def _from_experts(rows: Float[Array, "nk d"], order: Int[Array, " nk"], inverse: Int[Array, " nk"]) -> Array:
    """The sorted rows in the order of the pairs."""
    return _rows_at(rows, inverse)


_from_experts.defvjp(
    lambda rows, order, inverse: (_from_experts(rows, order, inverse), order),
    lambda order, gradient: (_rows_at(gradient, order), None, None),
)


def _rows_at(rows: Float[Array, "n d"], places: Int[Array, " m"]) -> Float[Array, "m d"]:
    return rows.at[places].get(mode="promise_in_bounds")
