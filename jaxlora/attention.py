"""Attention over grouped heads, and what the layers of one forward pass share.

Shapes: B batch, T tokens of this call, S places of the cache, D hidden size, N and K query and key heads, H head dim.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from jaxlora import sharding
from jaxlora.config import LayerConfig, ModelConfig
from jaxlora.kernels import api as kernels
from jaxlora.kernels.decode_attention import write_cache
from jaxlora.kernels.ordered import Ordered
from jaxlora.layers import linear_each
from jaxlora.norms import Identity, rms_normed
from jaxlora.rope import apply_rope


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Context:
    """What every layer of one forward pass shares. rotary: cos and sin [B, T, pairs] of each of `config.ropes`.
    key_bias: None, or what is added to the scores of the keys, [B, N, T or S]. runs: the tokens'
    `mamba.segment_runs`, where there are mixers. with_load: whether layers with experts return their
    `moe.RouterLoad`. stored_kv: the keys and values [B, T or S, K, H] of layers that later ones attend to, by their
    index. host_bytes: of pinned memory for what is offloaded of a layer, None for no bound. one_token: whether this is
    one token of each row, which go on from a cache, so that launches are what a layer saves. layer: the index of the
    layer, or of the first of those that a loop goes through. in_loops: whether layers that are alike are to be in a
    loop, so that no two calls of attention in the program have the same `layer`."""

    rotary: list[tuple[Any, Any]]
    query_segments: Array | None
    key_segments: Array | None
    offset: Array | int
    mlp_tile: int | None = dataclasses.field(default=None, metadata=dict(static=True))
    key_bias: Array | None = None
    runs: Any = None
    with_load: bool = dataclasses.field(default=False, metadata=dict(static=True))
    stored_kv: dict[int, Any] = dataclasses.field(default_factory=dict)
    host_bytes: int | None = dataclasses.field(default=None, metadata=dict(static=True))
    one_token: bool = dataclasses.field(default=False, metadata=dict(static=True))
    layer: int = dataclasses.field(default=0, metadata=dict(static=True))
    in_loops: bool = dataclasses.field(default=False, metadata=dict(static=True))

    @property
    def is_prefill(self) -> bool:
        """Whether nothing stands before these tokens, as is known while tracing."""
        return isinstance(self.offset, int)


class Attention(nnx.Module):
    """Grouped-query attention (arXiv:2305.13245) with rotary positions, over its own keys and values or those of an
    earlier layer (arXiv:2405.12981)."""

    def __init__(self, config: ModelConfig, layer: LayerConfig, make: Any):
        make_linear, make_norm = make.linear, make.norm
        width, dim = config.hidden_size, layer.head_dim
        heads, kv_heads = config.num_attention_heads, layer.num_key_value_heads
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, dim
        self.scale, self.softcap = config.attention_scale(dim), config.attn_logit_softcapping
        self.window = layer.sliding_window
        self.rope, self.interleaved = None, False
        if layer.rope is not None:
            self.rope, self.interleaved = config.ropes.index((layer.rope, dim)), layer.rope.interleaved
        self.fused_qkv, self.qk_norm, self.output_gate = config.fused_qkv, config.qk_norm, config.attn_output_gate
        self.stores_kv, self.reuses_kv = layer.stores_kv, layer.reuses_kv
        self.v_norm_eps = config.norm_eps if config.v_norm else None
        if config.fused_qkv is not None:
            self.qkv_proj = make_linear(width, (heads + 2 * kv_heads) * dim, ("heads", "embed"), config.qkv_bias)
        else:
            queries = heads * dim * (2 if config.attn_output_gate else 1)
            self.q_proj = make_linear(width, queries, ("heads", "embed"), config.qkv_bias)
            has_k = layer.reuses_kv is None
            of_keys = lambda: make_linear(width, kv_heads * dim, ("kv_heads", "embed"), config.qkv_bias)
            self.k_proj = of_keys() if has_k else None
            self.v_proj = of_keys() if has_k and not layer.k_eq_v else None
        self.o_proj = make_linear(heads * dim, width, ("embed", "heads"), config.o_bias)
        self.sinks = make.zeros((heads,), ("heads",)) if config.attention_sinks else None
        self.q_norm, self.k_norm = Identity(), Identity()
        if config.qk_norm == "head":
            self.q_norm = make_norm((dim,), ("head_dim",))
            self.k_norm = make_norm((dim,), ("head_dim",))
        elif config.qk_norm == "per_head":
            self.q_norm = make_norm((heads, dim), ("heads", "head_dim"))
            self.k_norm = make_norm((kv_heads, dim), ("kv_heads", "head_dim"))
        elif config.qk_norm == "projection":
            self.q_norm = make_norm((heads * dim,), ("heads",))
            self.k_norm = make_norm((kv_heads * dim,), ("kv_heads",))
        if layer.reuses_kv is not None:
            self.k_norm = Identity()

    @property
    def projections(self) -> list:
        """The linears that read x."""
        if self.fused_qkv is not None:
            return [self.qkv_proj]
        return [each for each in (self.q_proj, self.k_proj, self.v_proj) if each is not None]

    def _project(self, x, keys: list, parts: bool = False):
        """Queries [B, T, N H], or with gates [B, T, 2 N H], and keys and values [B, T, K H], or None. With `parts` they
        may be `Parts`."""
        if self.fused_qkv == "grouped":
            [qkv] = linear_each(self.projections, x, keys[:1])
            qkv = qkv.reshape(*qkv.shape[:2], self.kv_heads, -1, self.head_dim)
            return [part.reshape(*qkv.shape[:2], -1) for part in (qkv[..., :-2, :], qkv[..., -2, :], qkv[..., -1, :])]
        if self.fused_qkv == "concatenated":
            n, k = self.heads * self.head_dim, self.kv_heads * self.head_dim
            return jnp.split(linear_each(self.projections, x, keys[:1])[0], [n, n + k], axis=-1)
        q, *rest = linear_each(self.projections, x, keys[: len(self.projections)], parts)
        return (q, *rest, *rest) if len(rest) == 1 else (q, *(rest or (None, None)))

    def _normed(self, y, norm):
        """Queries or keys [B, T, N H] -> [B, T, N, H]. `Parts` stay such, where there is no norm."""
        y = norm(y) if self.qk_norm == "projection" else y
        y = y.reshape(*y.shape[:2], -1, self.head_dim)
        return y if self.qk_norm == "projection" else norm(y)

    def _placed(self, y, norm, context: Context):
        """Queries or keys [B, T, N H] -> [B, T, N, H], normed, and turned by their positions."""
        y = self._normed(y, norm)
        if self.rope is None:
            return y
        return apply_rope(y, *context.rotary[self.rope], interleaved=self.interleaved)

    def _values(self, v):
        v = v.reshape(*v.shape[:2], -1, self.head_dim)
        return v if self.v_norm_eps is None else rms_normed(v, self.v_norm_eps)

    def _keys_and_values(self, k, v, context: Context):
        """This call's, [B, T, K H] each -> [B, T, K, H] each."""
        k, v = (_by_heads(each, "kv_heads") for each in (self._placed(k, self.k_norm, context), self._values(v)))
        return checkpoint_name(k, "key"), checkpoint_name(v, "value")

    def __call__(self, x, context: Context, keys: list, cache=None):
        """x [B, T, D] -> [B, T, D]. `cache` is (keys, values, layer) of stacked caches [repeats, B, S, K, H], and
        returned with this call's tokens written at `context.offset`. Last comes what `Context.stored_kv` gets."""
        mixed, cache, stored = self.mixed(x, context, keys, cache)
        return self.o_proj(mixed, keys[3]), cache, stored

    def mixed(self, x, context: Context, keys: list, cache=None, ordered: Any = None):
        """What `o_proj` reads, [B, T, N H], and the rest of what a call returns. x may be `Unnormed`, or `Ordered`; so
        may with `ordered`, a dtype, what is returned."""
        decodes = cache is not None and context.one_token and self._decodes(context)
        q, k, v = self._project(x, keys, parts=decodes and self._leaves_as_projected)
        b, t, _ = q.shape
        gate = None
        if self.output_gate:
            q, gate = jnp.split(q.reshape(b, t, self.heads, 2 * self.head_dim), 2, axis=-1)
            q = q.reshape(b, t, -1)
        if decodes:
            out, cache = self._decode(q, k, v, cache, context, None if gate is not None else ordered)
            stored = {}
        else:
            out, cache, stored = self._attend(q, k, v, cache, context)
        if gate is not None:
            out = out * jax.nn.sigmoid(gate)
        return out.reshape(b, t, self.heads * self.head_dim), cache, stored

    def _attend(self, q, k, v, cache, context: Context):
        """What many tokens take from each other and from the cache, [B, T, N, H], the cache with them, and what
        `Context.stored_kv` gets."""
        q = checkpoint_name(_by_heads(self._placed(q, self.q_norm, context), "heads"), "query")
        if self.reuses_kv is not None:
            k, v = context.stored_kv[self.reuses_kv]
        else:
            k, v = self._keys_and_values(k, v, context)
            if cache is not None:
                all_keys, all_values, layer = cache
                all_keys = write_cache(all_keys, k, layer, context.offset)
                cache = all_keys, write_cache(all_values, v, layer, context.offset), layer
                if not context.is_prefill:
                    stacks = all_keys, cache[1]
                    k, v = (jax.lax.dynamic_index_in_dim(s, layer, keepdims=False).astype(k.dtype) for s in stacks)
        out = kernels.attention(
            q,
            k,
            v,
            query_segments=context.query_segments,
            key_segments=context.key_segments,
            offset=context.offset,
            call=context.layer,
            **self._options(context),
        )
        return out, cache, {} if self.stores_kv is None else {self.stores_kv: (k, v)}

    def _decodes(self, context: Context) -> bool:
        """Whether one token of each row attends to a cache of this layer's own, and nothing else does."""
        return not context.is_prefill and self.reuses_kv is None and self.stores_kv is None

    @property
    def _leaves_as_projected(self) -> bool:
        """Whether nothing but `decode_attention` reads the projections of one token."""
        return self.qk_norm is None and self.v_norm_eps is None and not self.output_gate

    def _decode(self, q, k, v, cache, context: Context, ordered: Any) -> tuple[Any, Any]:
        """`_attend` for one token of each row, in one kernel where there is one; perhaps `Ordered` [B, N H]."""
        assert context.key_segments is not None
        cos_and_sin = None if self.rope is None else context.rotary[self.rope]
        each = self._normed(q, self.q_norm), self._normed(k, self.k_norm), self._values(v)
        out, *written = kernels.decode_attention(
            *(one.reshape(one.shape[0], -1, self.head_dim) for one in each),
            *cache,
            rotary=cos_and_sin and (cos_and_sin[0][:, 0], cos_and_sin[1][:, 0]),
            interleaved=self.interleaved,
            segments=context.key_segments,
            offset=jnp.asarray(context.offset),
            ordered=ordered,
            **self._options(context),
        )
        return out if isinstance(out, Ordered) else out[:, None], (*written, cache[2])

    def _options(self, context: Context) -> dict[str, Any]:
        return dict(
            scale=self.scale,
            window=self.window,
            softcap=self.softcap,
            key_bias=context.key_bias,
            sinks=None if self.sinks is None else self.sinks.get_value(),
        )


def _by_heads(x: Float[Array, "b t n h"], heads: str) -> Float[Array, "b t n h"]:
    """Queries, keys or values, which on a mesh are divided by rows of the batch and by heads."""
    return sharding.divided(x, ("batch", None, heads, None))
