"""The decoder, read downwards, in the checkpoint's names:  CausalLM -> Decoder -> Run -> DecoderLayer -> Attention,
MLP.

Like layers are stacked: a `Run` holds `repeats` times a period of one or more layers, every parameter with a leading
axis of that length, and scans over it. A Llama is one run of period 1; a model whose last layers have a window is
two runs; one that alternates is one run of period 2. So the program's size, and the time to compile it, do not grow
with the depth.

What families do differently is said by `ModelConfig`. Module names are those of Llama's checkpoints (and GLM-4's, where
Llama has none); `config.tensor_names` has what other families call them.

Shapes: B batch, T tokens of this call, S places of the cache, D hidden size, N and K query and key heads, H head dim.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Hashable, Iterator
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from jaxlora import quant, remat
from jaxlora.config import LayerConfig, ModelConfig, QuantConfig
from jaxlora.delta_net import GatedDeltaNet
from jaxlora.kernels import api as kernels
from jaxlora.layers import (
    ACTIVATIONS,
    Embedding,
    Identity,
    Linear,
    Norm,
    PlainLinear,
    TokenwiseModule,
    base_param,
    linear_each,
)
from jaxlora.mamba import Mamba, segment_runs
from jaxlora.moe import ExpertLinear, RouterLoad, SparseMLP
from jaxlora.rope import alibi_bias, apply_rope, rope_tables, segment_positions


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys and values of the tokens seen so far, for every layer. (Any: a transformation may put what it likes in a
    pytree.)

    keys, values: for each run, for each place of its period, [repeats, B, S, K, H]; a narrower dtype than the model
    computes in is cast on reading. convolutions, states: so for mixers, see `mamba.Mamba` and `delta_net`. Where a
    layer has no attention or no mixer, None stands. segment_ids: [B, S] int32, 0 where nothing is. length: int32, the
    number of places filled: one for all rows, whose prompts are padded on the left, or [B], one for each, padded on the
    right. The number 0, not an array, says while tracing that the cache is empty: the first tokens look at themselves
    only.

    reach: given where the rows are requests that know nothing of each other: the most tokens that one may grow to.
    Rope types that look at the length then look at each row's own, and "longrope" at this; see `rope_tables`.
    """

    keys: list[list[Any]]
    values: list[list[Any]]
    convolutions: list[list[Any]]
    states: list[list[Any]]
    segment_ids: Any
    length: Any
    reach: int | None = dataclasses.field(default=None, metadata=dict(static=True))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Context:
    """What every layer of one forward pass shares. rotary: cos and sin [B, T, pairs] of each of `config.ropes`.
    key_bias: None, or what is added to the scores of the keys, [B, N, T or S]. runs: the tokens'
    `mamba.segment_runs`, where there are mixers. with_load: whether layers with experts return their
    `moe.RouterLoad`."""

    rotary: list[tuple[Any, Any]]
    query_segments: Array | None
    key_segments: Array | None
    offset: Array | int
    mlp_tile: int | None = dataclasses.field(default=None, metadata=dict(static=True))
    key_bias: Array | None = None
    runs: Any = None
    with_load: bool = dataclasses.field(default=False, metadata=dict(static=True))

    @property
    def is_prefill(self) -> bool:
        """Whether nothing stands before these tokens, as is known while tracing."""
        return isinstance(self.offset, int)


class Attention(nnx.Module):
    """Grouped-query attention (arXiv:2305.13245) with rotary positions."""

    def __init__(self, config: ModelConfig, layer: LayerConfig, make: _Make):
        make_linear, make_norm = make.linear, make.norm
        width, dim = config.hidden_size, config.head_dim
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, dim
        self.scale, self.softcap = config.attention_scale, config.attn_logit_softcapping
        self.window = layer.sliding_window
        self.rope, self.interleaved = None, False
        if layer.rope is not None:
            self.rope, self.interleaved = config.ropes.index(layer.rope), layer.rope.interleaved
        self.fused_qkv, self.qk_norm, self.output_gate = config.fused_qkv, config.qk_norm, config.attn_output_gate
        if config.fused_qkv is not None:
            self.qkv_proj = make_linear(width, (heads + 2 * kv_heads) * dim, ("heads", "embed"), config.qkv_bias)
        else:
            queries = heads * dim * (2 if config.attn_output_gate else 1)
            self.q_proj = make_linear(width, queries, ("heads", "embed"), config.qkv_bias)
            self.k_proj = make_linear(width, kv_heads * dim, ("kv_heads", "embed"), config.qkv_bias)
            self.v_proj = make_linear(width, kv_heads * dim, ("kv_heads", "embed"), config.qkv_bias)
        self.o_proj = make_linear(heads * dim, width, ("embed", "heads"), config.o_bias)
        self.sinks = make.zeros((heads,), ("heads",)) if config.attention_sinks else None
        self.q_norm, self.k_norm = Identity(), Identity()
        if config.qk_norm == "head":
            self.q_norm, self.k_norm = make_norm((dim,), ("head_dim",)), make_norm((dim,), ("head_dim",))
        elif config.qk_norm == "per_head":
            self.q_norm = make_norm((heads, dim), ("heads", "head_dim"))
            self.k_norm = make_norm((kv_heads, dim), ("kv_heads", "head_dim"))
        elif config.qk_norm == "projection":
            self.q_norm = make_norm((heads * dim,), ("heads",))
            self.k_norm = make_norm((kv_heads * dim,), ("kv_heads",))

    def _project(self, x, keys: list):
        """Queries [B, T, N H], or with gates [B, T, 2 N H], and keys and values [B, T, K H]."""
        if self.fused_qkv == "grouped":
            qkv = self.qkv_proj(x, keys[0]).reshape(*x.shape[:2], self.kv_heads, -1, self.head_dim)
            return [part.reshape(*x.shape[:2], -1) for part in (qkv[..., :-2, :], qkv[..., -2, :], qkv[..., -1, :])]
        if self.fused_qkv == "concatenated":
            n, k = self.heads * self.head_dim, self.kv_heads * self.head_dim
            return jnp.split(self.qkv_proj(x, keys[0]), [n, n + k], axis=-1)
        return linear_each([self.q_proj, self.k_proj, self.v_proj], x, keys[:3])

    def __call__(self, x, context: Context, keys: list, cache=None):
        """x [B, T, D] -> [B, T, D]. `cache` is (keys, values, layer) of stacked caches [repeats, B, S, K, H], and
        returned with this call's tokens written at `context.offset`."""
        b, t, _ = x.shape
        q, k, v = self._project(x, keys)
        gate = None
        if self.output_gate:
            q, gate = jnp.split(q.reshape(b, t, self.heads, 2 * self.head_dim), 2, axis=-1)
            q = q.reshape(b, t, -1)
        if self.qk_norm == "projection":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (y.reshape(b, t, -1, self.head_dim) for y in (q, k, v))
        if self.qk_norm != "projection":
            q, k = self.q_norm(q), self.k_norm(k)
        if self.rope is not None:
            cos, sin = context.rotary[self.rope]
            q, k = (apply_rope(y, cos, sin, interleaved=self.interleaved) for y in (q, k))
        q, k, v = checkpoint_name(q, "query"), checkpoint_name(k, "key"), checkpoint_name(v, "value")
        if cache is not None:
            all_keys, all_values, layer = cache
            all_keys = _write_cache(all_keys, k, layer, context.offset)
            all_values = _write_cache(all_values, v, layer, context.offset)
            cache = (all_keys, all_values, layer)
            if not context.is_prefill and t == 1:
                return self._output(self._decode(q, cache, context), gate, keys[3]), cache
            if not context.is_prefill:
                k = jax.lax.dynamic_index_in_dim(all_keys, layer, keepdims=False).astype(k.dtype)
                v = jax.lax.dynamic_index_in_dim(all_values, layer, keepdims=False).astype(v.dtype)
        out = kernels.attention(
            q,
            k,
            v,
            scale=self.scale,
            window=self.window,
            softcap=self.softcap,
            key_bias=context.key_bias,
            sinks=None if self.sinks is None else self.sinks.get_value(),
            query_segments=context.query_segments,
            key_segments=context.key_segments,
            offset=context.offset,
        )
        return self._output(out, gate, keys[3]), cache

    def _decode(self, q, cache, context: Context):
        """What one token of each row [B, 1, N, H] takes from the cache, which it is in already."""
        assert context.query_segments is not None and context.key_segments is not None
        return kernels.decode_attention(
            q[:, 0],
            *cache,
            scale=self.scale,
            window=self.window,
            softcap=self.softcap,
            key_bias=context.key_bias,
            sinks=None if self.sinks is None else self.sinks.get_value(),
            query_segments=context.query_segments[:, 0],
            key_segments=context.key_segments,
            offset=jnp.asarray(context.offset),
        )[:, None]

    def _output(self, out, gate, key):
        if gate is not None:
            out = out * jax.nn.sigmoid(gate)
        return self.o_proj(out.reshape(*out.shape[:2], self.heads * self.head_dim), key)


def _write_cache(stacked: Array, new: Array, layer: Array, offset: Array | int) -> Array:
    """`new` [B, T, K, H] put into [repeats, B, S, K, H] at one layer, from place `offset` on, or each row's `offset`.

    float8 takes what is beyond its range as its largest value, and not as NaN. A place beyond the last of a row's own
    is not written.
    """
    if stacked.dtype.itemsize == 1:
        new = jnp.clip(new, *(jnp.asarray(limit, new.dtype) for limit in _range(stacked.dtype)))
    new = new.astype(stacked.dtype)
    if jnp.ndim(offset) == 0:
        return jax.lax.dynamic_update_slice(stacked, new[None], (layer, 0, offset, 0, 0))
    rows, places = _rows_and_places(jnp.asarray(offset), new.shape[1])
    return stacked.at[layer, rows, places].set(new, indices_are_sorted=True, unique_indices=True)


def _range(dtype: Any) -> tuple[float, float]:
    info = jnp.finfo(dtype)
    return float(info.min), float(info.max)


def _rows_and_places(offset: Array, tokens: int) -> tuple[Array, Array]:
    """Indices [B, 1] and [B, T] of the places that T tokens of each row take from its offset on."""
    rows = jnp.arange(offset.shape[0], dtype=jnp.int32)[:, None]
    return rows, offset[:, None] + jnp.arange(tokens, dtype=jnp.int32)


class MLP(TokenwiseModule):
    """down(act(gate(x)) * up(x)) (arXiv:2002.05202), or without a gate down(act(up(x)))."""

    def __init__(self, config: ModelConfig, inner: int, make_linear):
        width, axes, bias = config.hidden_size, ("mlp", "embed"), config.mlp_bias
        self.gated, self.fused, self.hidden_act = config.gated_mlp, config.fused_gate_up, config.hidden_act
        self.gate_multiplier, self.multiplier = config.mlp_multipliers
        if self.fused is not None:
            self.gate_up_proj = make_linear(width, 2 * inner, axes, bias)
        else:
            if self.gated:
                self.gate_proj = make_linear(width, inner, axes, bias)
            self.up_proj = make_linear(width, inner, axes, bias)
        self.down_proj = make_linear(inner, width, ("embed", "mlp"), bias)

    def _forward(self, x, keys: list):
        act = ACTIVATIONS[self.hidden_act]
        if not self.gated:
            return self.down_proj(act(checkpoint_name(self.up_proj(x, keys[1]), "up")), keys[2])
        if self.fused is not None:
            gate, up = jnp.split(self.gate_up_proj(x, keys[0]), 2, axis=-1)
        else:
            gate, up = linear_each([self.gate_proj, self.up_proj], x, keys[:2])
        gate, up = checkpoint_name(gate, "gate"), checkpoint_name(up, "up")
        return self.multiplier * self.down_proj(act(self.gate_multiplier * gate) * up, keys[2])


class DecoderLayer(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); with post norms, x + norm(f(norm(x))).

    In a parallel block (PaLM, arXiv:2204.02311 section 2) the MLP reads x too, through attention's norm or its own.
    """

    def __init__(self, config: ModelConfig, layer: LayerConfig, make: _Make):
        def norm(wanted: bool):
            return make.norm((config.hidden_size,), ("embed",)) if wanted else Identity()

        self.parallel, self.multiplier = config.parallel_block, config.residual_multiplier
        self.shared_norm = config.parallel_block and config.num_ln_in_parallel_attn == 1
        self.input_layernorm = norm(config.pre_norm)
        self.attention_multipliers = config.attention_in_multiplier, config.attention_out_multiplier
        self.mamba_multiplier, mamba = config.mamba_out_multiplier, config.mamba
        linear = config.linear_attention if layer.linear else None
        self.self_attn = Attention(config, layer, make) if linear is None else None
        self.linear_attn = None if linear is None else GatedDeltaNet(config, linear, make.linear, make.zeros)
        self.mamba = None if mamba is None else Mamba(config, mamba, make.linear, make.plain_linear, make.zeros)
        self.post_self_attn_layernorm = norm(config.post_norm)
        self.post_attention_layernorm = norm(config.pre_norm and not self.shared_norm)  # it stands before the MLP
        inner = config.shared_expert_intermediate_size
        if layer.sparse:
            shared = MLP(config, inner, make.linear) if inner else None
            self.mlp = SparseMLP(config, make.plain_linear, make.experts, shared)
        else:
            self.mlp = MLP(config, config.intermediate_size, make.linear)
        self.post_mlp_layernorm = norm(config.post_norm)

    def __call__(self, x, context: Context, key=None, cache=None):
        """`cache` is (keys, values, convolutions, states, layer), and the first four are returned."""
        keys = list(jax.random.split(key, 7)) if key is not None else [None] * 7
        normed = self.input_layernorm(x)
        attended, cache = self._mix(normed, context, keys[:4], key, cache)
        residual = checkpoint_name(x + self.multiplier * self.post_self_attn_layernorm(attended), "residual")
        if not self.shared_norm:
            normed = self.post_attention_layernorm(x if self.parallel else residual)
        out = self.mlp(normed, keys[4:], context.mlp_tile)
        load = None
        if context.with_load and isinstance(self.mlp, SparseMLP):
            load = self.mlp.load(normed, context.query_segments)
        return residual + self.multiplier * self.post_mlp_layernorm(out), cache, load

    def _mix(self, x, context: Context, keys: list, key, cache):
        """What a token takes from those before it: by attention, a mixer, or both."""
        of_attention, of_mixer = (None, None) if cache is None else ((*cache[:2], cache[-1]), cache[2:])
        mixer_key = None if key is None else jax.random.fold_in(key, 7)
        if self.linear_attn is not None:
            mixed, of_mixer = self.linear_attn(x, context.runs, mixer_key, of_mixer)
        else:
            assert self.self_attn is not None
            before, after = self.attention_multipliers
            mixed, of_attention = self.self_attn(before * x, context, keys, of_attention)
            mixed = after * mixed
        if self.mamba is not None:
            more, of_mixer = self.mamba(x, context.runs, mixer_key, of_mixer)
            mixed = mixed + self.mamba_multiplier * more
        return mixed, None if of_attention is None or of_mixer is None else (*of_attention[:2], *of_mixer[:2])


class Run(nnx.Module):
    """`repeats` times a period of layers; layer `start + r * period + j` is slice r of `period[j]`."""

    def __init__(self, config: ModelConfig, period: tuple[LayerConfig, ...], start: int, repeats: int, make: _Make):
        self.start, self.repeats = start, repeats
        make = dataclasses.replace(make, stack=repeats)
        self.period = nnx.List([DecoderLayer(config, layer, make) for layer in period])

    def layers_of(self, place: int) -> tuple[int, ...]:
        """The model's layer indices that `period[place]` holds, in the order of its leading axis."""
        return tuple(self.start + r * len(self.period) + place for r in range(self.repeats))

    def __call__(self, x, context: Context, policy: str, key=None, cache=None):
        """x [B, T, D]; `cache` is the run's part of each list of a `KVCache`, or None.

        Returns x, the cache, and the `RouterLoad` of its layers where `context.with_load` and there are experts.
        """

        # Quantised weights stay in their stack, which kernels read by index; the scan slices everything else.
        is_stack = lambda leaf: isinstance(leaf, quant.QuantizedArray) and len(leaf.leading) == 1
        leaves, structure = jax.tree.flatten(self.period, is_leaf=is_stack)
        sliced = [None if is_stack(leaf) else leaf for leaf in leaves]

        def body(carry, layer):
            x, cache = carry
            slices, index, key = layer
            period = structure.unflatten(
                [leaf.at(index) if is_stack(leaf) else part for leaf, part in zip(leaves, slices, strict=True)]
            )
            loads = []
            for place, block in enumerate(period):
                block_key = None if key is None else jax.random.fold_in(key, place)
                if cache is None:
                    x, _, load = block(x, context, block_key)
                else:
                    part = (*(stacked[place] for stacked in cache), index)
                    x, part, load = block(x, context, block_key, part)
                    cache = [
                        [*stacked[:place], new, *stacked[place + 1 :]] for stacked, new in zip(cache, part, strict=True)
                    ]
                loads.append(load)
            return (x, cache), _total_load(loads)

        index = jnp.arange(self.repeats, dtype=jnp.int32)
        keys = None if key is None else jax.vmap(lambda i: jax.random.fold_in(key, i))(index + self.start)
        (x, cache), loads = remat.scan(body, (x, cache), (sliced, index, keys), policy)
        return x, cache, jax.tree.map(lambda each: jnp.sum(each, axis=0), loads)


def _total_load(loads: list[RouterLoad | None]) -> RouterLoad | None:
    """The sum, None being of layers without experts; None for none but those."""
    known = [load for load in loads if load is not None]
    return jax.tree.map(lambda *parts: sum(parts[1:], parts[0]), *known) if known else None


class Decoder(nnx.Module):
    """Embedding, layers, final norm: ids [B, T] -> hidden states [B, T, D]."""

    def __init__(self, config: ModelConfig, make: _Make):
        self.embed_tokens = make.embedding(config.vocab_size, config.hidden_size)
        self.layers = nnx.List(
            [Run(config, period, start, repeats, make) for start, period, repeats in layer_runs(config.layers)]
        )
        self.norm = make.norm((config.hidden_size,), ("embed",))


def layer_runs(layer_types: tuple[Hashable, ...]) -> list[tuple[int, tuple[Any, ...], int]]:
    """Cut a list of layer kinds into runs (start, kinds of one period, repeats) with as few layers to compile as
    possible.

    >>> layer_runs(("full", "full", "full"))
    [(0, ('full',), 3)]
    >>> layer_runs(("full", "full", "window"))
    [(0, ('full',), 2), (2, ('window',), 1)]
    >>> layer_runs(("window", "full", "window", "full", "window"))
    [(0, ('window', 'full'), 2), (4, ('window',), 1)]
    """
    best: list[list] = [[] for _ in range(len(layer_types) + 1)]  # best[i]: the cheapest cut of the layers from i on
    for start in range(len(layer_types) - 1, -1, -1):
        cuts = []
        for period in range(1, len(layer_types) - start + 1):
            kinds, stop = layer_types[start : start + period], start
            while layer_types[stop : stop + period] == kinds:
                stop += period
                cuts.append([(start, kinds, (stop - start) // period), *best[stop]])
        # Of equally cheap cuts, the one of fewer runs, and of those the one whose first run is longest.
        best[start] = min(
            cuts, key=lambda runs: (sum(len(kinds) for _, kinds, _ in runs), len(runs), -len(runs[0][1]) * runs[0][2])
        )
    return best[0]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Make:
    """Builds the layers of one model: what they share is said once. stack: how many of a run each holds, or None."""

    config: ModelConfig
    dtype: Any
    rngs: nnx.Rngs
    quant_config: QuantConfig | None
    stack: int | None = None

    def linear(self, d_in, d_out, axes, bias, quantised=True):
        return Linear(
            d_in, d_out, axes=axes, bias=bias, stack=self.stack, dtype=self.dtype, rngs=self.rngs,
            quant_config=self.quant_config if self.stack is not None and quantised else None,
        )  # fmt: skip

    def experts(self, d_in, d_out, axes):
        return ExpertLinear(
            self.config.num_experts, d_in, d_out, axes=axes, bias=self.config.expert_bias,
            in_out=self.config.experts_in_out, stack=cast(int, self.stack), dtype=self.dtype, rngs=self.rngs,
            quant_config=self.quant_config,
        )  # fmt: skip

    def plain_linear(self, d_in, d_out, axes, bias):
        return PlainLinear(
            d_in, d_out, axes=axes, bias=bias, stack=cast(int, self.stack), dtype=self.dtype, rngs=self.rngs
        )

    def zeros(self, shape, axes):
        lead, lead_axes = ((self.stack,), ("layers",)) if self.stack is not None else ((), ())
        return base_param(jnp.zeros((*lead, *shape), self.dtype), (*lead_axes, *axes))

    def norm(self, shape, axes):
        return Norm(
            shape, axes=axes, kind=self.config.norm, eps=self.config.norm_eps, bias=self.config.norm_bias,
            offset=self.config.norm_offset, dtype=self.dtype, stack=self.stack,
        )  # fmt: skip

    def embedding(self, rows, features):
        return Embedding(rows, features, dtype=self.dtype, rngs=self.rngs)


class CausalLM(nnx.Module):
    """A decoder with a language-model head: ids [B, T] -> logits [B, T, vocab_size] in float32.

    `dtype` is the compute dtype and the dtype of every weight that is not quantised; `quant_config` quantises the
    projections of the blocks, never the embedding, the norms or the head. With random weights from `rngs` this is a
    model to test with; `converters.huggingface` fills an abstract one (`nnx.eval_shape`) from a checkpoint.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        dtype: Any = jnp.float32,
        quant_config: QuantConfig | None = None,
        rngs: nnx.Rngs,
        hf_config: dict | None = None,
    ):
        make = _Make(config=config, dtype=dtype, rngs=rngs, quant_config=quant_config)
        self.config, self.dtype, self.quant_config = config, jnp.dtype(dtype), quant_config
        self._hf_config = json.dumps(hf_config or {})  # text, because a graphdef's attributes must hash
        self.remat_policy, self.tiled_mlp = "none", False
        self.has_new_rows = False  # of the embedding and the head, which the checkpoint has not; see `vocabulary`
        self.model = Decoder(config, make)
        self.ties_adapters = False  # whether a tied head follows the embedding's adapter or copy as well
        self.lm_head = make.linear(config.hidden_size, config.vocab_size, ("vocab", "embed"), False)
        if config.tie_word_embeddings:
            self.lm_head.weight = None

    @property
    def hf_config(self) -> dict:
        """The checkpoint's config.json, untouched; a fresh copy at each call."""
        return json.loads(self._hf_config)

    def __call__(
        self,
        input_ids: Int[Array, "b t"],
        positions: Int[Array, "b t"] | None = None,
        segment_ids: Int[Array, "b t"] | None = None,
    ) -> Float[Array, "b t vocab"]:
        """Logits [B, T, vocab_size], float32. See `hidden_states` for the arguments."""
        return _logits(self, input_ids, positions, segment_ids)

    def hidden_states(
        self,
        input_ids: Int[Array, "b t"],
        positions: Int[Array, "b t"] | None = None,
        segment_ids: Int[Array, "b t"] | None = None,
        *,
        key: Any = None,
        cache: KVCache | None = None,
    ) -> tuple[Float[Array, "b t d"], KVCache | None]:
        """Hidden states after the final norm, [B, T, D] in the compute dtype, and the cache with these tokens in it.

        positions: rotary positions, by default counted from 0 in each segment. segment_ids: a token attends to
        earlier tokens with its own id only; 0 is padding. key: adapter dropout; None for none. cache: places for
        earlier and these tokens.
        """
        hidden, cache, _ = self._hidden_states(input_ids, positions, segment_ids, key, cache, with_load=False)
        return hidden, cache

    def hidden_states_and_load(
        self,
        input_ids: Int[Array, "b t"],
        positions: Int[Array, "b t"] | None = None,
        segment_ids: Int[Array, "b t"] | None = None,
        *,
        key: Any = None,
    ) -> tuple[Float[Array, "b t d"], RouterLoad | None]:
        """`hidden_states` without a cache, and what the routers did; None for a model without experts."""
        hidden, _, load = self._hidden_states(input_ids, positions, segment_ids, key, None, with_load=True)
        return hidden, load

    def _hidden_states(self, input_ids, positions, segment_ids, key, cache, *, with_load: bool):
        if positions is None and cache is not None:
            raise ValueError("with a cache, positions must be given: they go on from the tokens already in it")
        if positions is None and segment_ids is not None:
            positions = segment_positions(segment_ids)
        elif positions is None:
            positions = jnp.broadcast_to(jnp.arange(input_ids.shape[1], dtype=jnp.int32), input_ids.shape)
        head_dim, native = self.config.head_dim, self.config.max_position_embeddings
        alone = cache is not None and cache.reach is not None
        places = None if cache is None else cache.reach or cache.segment_ids.shape[1]
        rotary = [rope_tables(rope, head_dim, native, positions, places, alone) for rope in self.config.ropes]
        tile = remat.mlp_tile(self.remat_policy, self.tiled_mlp)
        filled, context = None, Context(rotary, segment_ids, segment_ids, 0, tile, with_load=with_load)
        if cache is not None:
            segment_ids = jnp.ones_like(input_ids) if segment_ids is None else segment_ids
            if jnp.ndim(cache.length) == 0:
                filled = jax.lax.dynamic_update_slice(cache.segment_ids, segment_ids, (0, cache.length))
            else:
                filled = cache.segment_ids.at[_rows_and_places(cache.length, input_ids.shape[1])].set(segment_ids)
            context = Context(rotary, segment_ids, filled, cache.length)
            if context.is_prefill:
                context = dataclasses.replace(context, key_segments=segment_ids)
        if self.config.alibi:
            keys_at = positions if filled is None or context.is_prefill else segment_positions(filled)
            bias = alibi_bias(keys_at, self.config.num_attention_heads) * self.config.attention_scale
            context = dataclasses.replace(context, key_bias=bias)

        if self.config.mamba is not None or self.config.linear_attention is not None:
            before = None
            if cache is not None and not context.is_prefill:
                last = jnp.broadcast_to(cache.length - 1, input_ids.shape[:1])
                before = jnp.take_along_axis(cache.segment_ids, last[:, None], axis=1)[:, 0]
            context = dataclasses.replace(context, runs=segment_runs(segment_ids, input_ids.shape, before))

        x = self.model.embed_tokens(input_ids).astype(self.dtype) * self.config.embedding_multiplier
        parts = [] if cache is None else [cache.keys, cache.values, cache.convolutions, cache.states]
        loads = []
        for i, run in enumerate(self.model.layers):
            run_cache = None if cache is None else [part[i] for part in parts]
            x, run_cache, load = run(x, context, self.remat_policy if cache is None else "none", key, run_cache)
            loads.append(load)
            if run_cache is not None:
                parts = [[*part[:i], new, *part[i + 1 :]] for part, new in zip(parts, run_cache, strict=True)]
        x = self.model.norm(x)
        if cache is None:
            return x, None, _total_load(loads)
        length = jnp.asarray(cache.length + input_ids.shape[1], jnp.int32)
        keys, values, convolutions, states = parts
        return x, KVCache(keys, values, convolutions, states, filled, length, cache.reach), None

    def head_product(self, hidden: Float[Array, "n d"]) -> tuple[Float[Array, "n e"], Float[Array, "vocab e"]]:
        """Rows and a matrix [vocab, E] whose product is the logits of these hidden states, before their softcap.

        An adapter on the head joins by concatenation: [x, s x A^T] [W, B]^T = x W^T + s (x A^T) B^T. DoRA's gain
        multiplies the rows of [W, B].
        """
        hidden, embedding, head = hidden * self.config.logit_scale, self.model.embed_tokens, self.lm_head
        follows = self.ties_adapters
        weight = head.weight.get_value() if head.weight is not None else embedding.weight.get_value()
        if follows and embedding.trained_weight is not None:
            weight = embedding.trained_weight(weight)
        elif head.trained_weight is not None:
            weight = head.trained_weight(weight)
        weight, adapted = weight.astype(hidden.dtype), embedding if follows else head
        if adapted.lora_A is None:
            return hidden, weight
        a, b, scaling = (v.get_value() for v in (adapted.lora_A, adapted.lora_B, adapted.lora_scaling))
        if follows:
            a, b = b.T, a.T  # a table and its transpose
        low = (hidden @ a.astype(hidden.dtype).T) * scaling.astype(hidden.dtype)
        both = jnp.concatenate([weight, b.astype(hidden.dtype)], axis=1)
        if head.lora_magnitude is not None:
            gain = head.dora_gain(quant.matmul(a.astype(hidden.dtype), weight))
            both = (gain[:, None] * both.astype(gain.dtype)).astype(hidden.dtype)
        return jnp.concatenate([hidden, low], axis=1), both

    def head(self, hidden: Float[Array, "*batch d"]) -> Float[Array, "*batch vocab"]:
        """Logits of hidden states, float32."""
        rows, weight = self.head_product(hidden.reshape(-1, hidden.shape[-1]))
        logits = jnp.einsum("ne,ve->nv", rows, weight, preferred_element_type=jnp.float32)
        cap = self.config.final_logit_softcapping
        if cap is not None:
            logits = cap * jnp.tanh(logits / cap)
        return logits.reshape(*hidden.shape[:-1], -1)

    def init_cache(self, batch: int, length: int, dtype: Any = None) -> KVCache:
        """An empty cache of `length` places a row, in the compute dtype unless another is given."""
        dtype = dtype or self.dtype

        def empty(shape_of: Callable[[DecoderLayer], tuple[int, ...] | None], dtype):
            def of(run, layer):
                shape = shape_of(layer)
                return None if shape is None else jnp.zeros((run.repeats, batch, *shape), dtype)

            return [[of(run, layer) for layer in run.period] for run in self.model.layers]

        heads, dim = self.config.num_key_value_heads, self.config.head_dim
        places = lambda layer: None if layer.self_attn is None else (length, heads, dim)
        mixer = lambda layer: layer.mamba or layer.linear_attn
        convolution = lambda layer: None if mixer(layer) is None else mixer(layer).convolution_shape
        state = lambda layer: None if mixer(layer) is None else mixer(layer).state_shape
        return KVCache(
            keys=empty(places, dtype),
            values=empty(places, dtype),
            convolutions=empty(convolution, self.dtype),
            states=empty(state, jnp.float32),
            segment_ids=jnp.zeros((batch, length), jnp.int32),
            length=0,
        )


@jax.jit
def _logits(model: CausalLM, input_ids, positions, segment_ids):
    # Compiled, so that a call from the prompt costs one program and not one for each scan that it traces anew.
    return model.head(model.hidden_states(input_ids, positions, segment_ids)[0])


@dataclasses.dataclass(frozen=True)
class Named:
    """A parameter or module under its name in the checkpoint.

    name: with "{}" in place of the layer index when `layers` is not empty, and in place of the expert's where
    `experts` is not 0; layers: the model's layer indices that its leading axis holds; experts: how many its second axis
    holds, where the checkpoint has a tensor for each; node: the Variable or Module.
    """

    name: str
    layers: tuple[int, ...]
    node: Any
    experts: int = 0

    def places(self) -> dict[str, tuple[int, ...]]:
        """Where each of the checkpoint's tensors lies in the value: {name: index of its leading axes}."""
        if not self.layers:
            return {self.name: ()}
        if not self.experts:
            return {self.name.format(layer): (i,) for i, layer in enumerate(self.layers)}
        return {
            self.name.format(layer, expert): (i, expert)
            for i, layer in enumerate(self.layers)
            for expert in range(self.experts)
        }

    def names(self) -> tuple[str, ...]:
        """The names of the checkpoint's tensors or modules, in the order of the value's leading axes."""
        return tuple(self.places())


def named_nodes(model: CausalLM, kind: type | tuple[type, ...]) -> Iterator[Named]:
    """Every Variable or Module of this type, or of one of these, in the order of the layers, under its checkpoint name.

    The path model.layers.0.period.0.mlp.up_proj becomes model.layers.{}.mlp.up_proj, and parts of it, one or some in a
    row, what `config.tensor_names` says.
    """
    names = dict(model.config.tensor_names)
    longest_first = sorted(names, key=lambda parts: -parts.count("."))
    known = re.compile(rf"(?<![^.])({'|'.join(map(re.escape, longest_first))})(?![^.])") if names else None

    def checkpoint_name_of(*parts) -> str:
        path = ".".join(map(str, parts))
        return path if known is None else known.sub(lambda match: names[match[0]], path)

    for path, node in nnx.iter_graph(model):
        if not isinstance(node, kind):
            continue
        if path[:2] == ("model", "layers") and len(path) > 4:
            run, place = model.model.layers[cast(int, path[2])], cast(int, path[4])
            name = checkpoint_name_of("model", "layers", "{}", *path[5:])
            experts = model.config.num_experts if name.count("{}") == 2 else 0
            yield Named(name, run.layers_of(place), node, experts)
        else:
            yield Named(checkpoint_name_of(*path), (), node)
