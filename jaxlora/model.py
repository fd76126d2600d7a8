"""The decoder, read downwards, in the checkpoint's names:  CausalLM -> Decoder -> Run -> DecoderLayer -> Attention,
MLP.

Like layers are stacked: a `Run` holds `repeats` times a period of one or more layers, every parameter with a leading
axis of that length, and scans over it. A Llama is one run of period 1; a model whose last layers have a window is
two runs; one that alternates is one run of period 2. So the program's size, and the time to compile it, do not grow
with the depth. A layer whose keys and values later layers attend to (Gemma 4) has no like; what it stores goes on to
the runs after it in `Context`.

What families do differently is said by `ModelConfig`. Module names are those of Llama's checkpoints (and GLM-4's, where
Llama has none); `config.tensor_names` has what other families call them.

Shapes: B batch, T tokens of this call, S places of the cache, D hidden size, N and K query and key heads, H head dim.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Callable, Hashable, Iterator
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from jaxlora import quant, remat, sharding
from jaxlora.attention import Attention, Context
from jaxlora.config import LayerConfig, ModelConfig, QuantConfig
from jaxlora.delta_net import GatedDeltaNet
from jaxlora.kernels import api as kernels
from jaxlora.kernels.decode_attention import rows_and_places
from jaxlora.kernels.gated import ACTIVATIONS
from jaxlora.kernels.residual_norm import added
from jaxlora.layers import (
    Embedding,
    Linear,
    PlainLinear,
    TokenwiseModule,
    Unsummed,
    begins_with,
    gated_linear,
    linear_each,
    of_gate,
    ordered_dtype,
    read_by_index,
    summed_and_normed,
    summed_and_unnormed,
    with_norms,
)
from jaxlora.mamba import Mamba, segment_runs
from jaxlora.moe import ExpertLinear, RouterLoad, SparseMLP
from jaxlora.norms import Identity, Norm
from jaxlora.offload import pinned_bytes
from jaxlora.rope import alibi_bias, rope_tables, segment_positions
from jaxlora.variables import Buffer, base_param


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


class Aside(NamedTuple):
    """What a layer gives beside its result. load: its `RouterLoad`; stored_kv: what it adds to `Context.stored_kv`."""

    load: RouterLoad | None
    stored_kv: dict[int, Any]


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
        if not self.gated:
            return self.multiplier * self.down_proj(self._inner(x, keys), keys[2])
        return self.multiplier * of_gate(self.down_proj, *self._gate_and_up(x, keys), self.hidden_act, keys[2])

    def onto(self, stream, x, multiplier: float, keys: list, ahead: list):
        """stream + multiplier * self(x) of few tokens, or `Unsummed`. x may be `Unnormed`, or `Ordered`;
        `multiplier` of the MLP is not of this. The last product may fetch what is `ahead`."""
        if self.gates_in_launch:
            ordered, down = ordered_dtype([self.down_proj], stream), begins_with([self.down_proj], _tokens(stream))
            h = gated_linear(self.gate_proj, self.up_proj, x, self.hidden_act, keys[:2], ordered, down)
        else:
            h = self._inner(x, keys)
        return self.down_proj.onto(stream, h, multiplier, keys[2], ahead)

    @property
    def gates_in_launch(self) -> bool:
        """Whether one launch may make the gated product of few tokens."""
        return self.gated and self.fused is None and self.gate_multiplier == 1.0

    @property
    def projections(self) -> list:
        """The linears that read x."""
        if self.fused is not None:
            return [self.gate_up_proj]
        return [self.gate_proj, self.up_proj] if self.gated else [self.up_proj]

    def _gate_and_up(self, x, keys: list):
        """What the gate makes of x, and what it is multiplied by. x may be `Unnormed`, or `Ordered`."""
        if self.fused is not None:
            gate, up = jnp.split(linear_each(self.projections, x, keys[:1])[0], 2, axis=-1)
        else:
            gate, up = linear_each(self.projections, x, keys[:2])
        gate, up = _by_features(gate), _by_features(up)
        return self.gate_multiplier * checkpoint_name(gate, "gate"), checkpoint_name(up, "up")

    def _inner(self, x, keys: list):
        """What `down_proj` reads. x may be `Unnormed`, or `Ordered`."""
        if self.gated:
            return kernels.gated(*self._gate_and_up(x, keys), self.hidden_act)
        [up] = linear_each(self.projections, x, keys[1:2])
        return ACTIVATIONS[self.hidden_act](checkpoint_name(_by_features(up), "up"))


class DecoderLayer(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); with post norms, x + norm(f(norm(x))).

    In a parallel block (PaLM, arXiv:2204.02311 section 2) the MLP reads x too, through attention's norm or its own.
    Experts beside the MLP read the residual. At the end a token's per-layer input may be added, through a gate that
    reads what the layer has made so far.
    """

    def __init__(self, config: ModelConfig, layer: LayerConfig, make: _Make, follows_itself: bool):
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
        self.follows_itself = follows_itself  # in a stack: the next layer is the next of each weight's
        self.post_self_attn_layernorm = norm(config.post_norm)
        self.post_attention_layernorm = norm(config.pre_norm and not self.shared_norm)  # it stands before the MLP
        inner, beside = config.shared_expert_intermediate_size, layer.sparse and config.experts_beside_mlp
        if layer.sparse and not beside:
            self.mlp: Any = SparseMLP(config, make, MLP(config, inner, make.linear) if inner else None)
        else:
            self.mlp = MLP(config, layer.intermediate_size, make.linear)
        self.sparse_mlp: Any = SparseMLP(config, make, None) if beside else None
        if beside:
            self.post_feedforward_layernorm_1, self.post_feedforward_layernorm_2 = norm(True), norm(True)
        self.post_mlp_layernorm = norm(config.post_norm)
        width, inner = config.hidden_size, config.hidden_size_per_layer_input
        self.per_layer_act = config.hidden_act if inner else None
        if inner:
            self.per_layer_input_gate = make.linear(width, inner, ("mlp", "embed"), False)
            self.per_layer_projection = make.linear(inner, width, ("embed", "mlp"), False)
            self.post_per_layer_input_norm = norm(True)
        self.layer_scalar = make.buffer((1,)) if config.layer_scalar else None
        multipliers = *self.attention_multipliers, self.mlp.multiplier if isinstance(self.mlp, MLP) else None
        # x + attention(norm(x)), then x + mlp(norm(x)), and nothing else.
        self.is_plain = (
            self.self_attn is not None and mamba is None and multipliers == (1.0, 1.0, 1.0) and not beside
            and config.pre_norm and not config.post_norm and not config.parallel_block
            and not inner and not config.layer_scalar
        )  # fmt: skip

    def leaves_sum(self, x, context: Context) -> bool:
        """Whether a call with the residual stream x returns `Unsummed`."""
        if not context.one_token or self.per_layer_act is not None or self.layer_scalar is not None:
            return False
        return not (self.is_plain and self.mlp.down_proj.adds_residual(x))

    def left(self, x):
        """What it then leaves to be added to x, `Unsummed.y`, as `jax.ShapeDtypeStruct`s; weights may be such, too."""
        if not self.is_plain:
            return jax.ShapeDtypeStruct(x.shape, x.dtype)

        def onto(norm, mlp, x):
            stream, normed = summed_and_unnormed(Unsummed(x, x), norm, self.multiplier, mlp.projections)
            return mlp.onto(stream, normed, self.multiplier, [None] * 3, [])

        return cast(Any, jax.eval_shape(onto, self.post_attention_layernorm, self.mlp, x)).y

    def __call__(self, x, context: Context, key=None, cache=None, per_layer_input=None):
        """x [B, T, D] -> [B, T, D], either perhaps `Unsummed`. `cache` is (keys, values, convolutions, states, layer),
        and the first four are returned; then an `Aside`. per_layer_input: this layer's [B, T, P], where the model has
        such."""
        keys = list(jax.random.split(key, 7)) if key is not None else [None] * 7
        if context.one_token and self.is_plain:
            return self._one_token(x, context, keys, cache)
        x, normed = summed_and_normed(x, self.input_layernorm, self.multiplier)
        attended, cache, stored = self._mix(normed, context, keys[:4], key, cache)
        attended = self.post_self_attn_layernorm(attended)
        if self.parallel:
            residual = added(x, attended, self.multiplier)
            normed = normed if self.shared_norm else self.post_attention_layernorm(x)
        else:
            residual, normed = self.post_attention_layernorm.after(x, _by_rows(attended), self.multiplier)
        out = self.mlp(normed, keys[4:], context.mlp_tile)
        sparse, read = (self.mlp, normed) if self.sparse_mlp is None else (self.sparse_mlp, residual)
        if self.sparse_mlp is not None:
            routed = self.sparse_mlp(residual, keys[4:], context.mlp_tile)
            out = self.post_feedforward_layernorm_1(out) + self.post_feedforward_layernorm_2(routed)
        load = None
        if context.with_load and isinstance(sparse, SparseMLP):
            load = sparse.load(read, context.query_segments)
        out = self.post_mlp_layernorm(out)
        if self.leaves_sum(residual, context):
            return Unsummed(residual, out), cache, Aside(load, stored)
        x = _by_rows(residual + self.multiplier * _by_rows(out))
        if self.per_layer_act is not None:
            x = x + self._of_layer(x, per_layer_input, key)
        if self.layer_scalar is not None:
            x = x * self.layer_scalar.get_value().astype(x.dtype)
        return x, cache, Aside(load, stored)

    def _one_token(self, x, context: Context, keys: list, cache):
        """A call of a layer that `is_plain` with one token of each row: products norm what they read, and add to the
        residual stream, where there are kernels that do."""
        attention = cast(Attention, self.self_attn)
        x, normed = summed_and_unnormed(x, self.input_layernorm, self.multiplier, attention.projections)
        ordered = ordered_dtype([attention.o_proj], x, float8=False)
        mixed, of_attention, stored = attention.mixed(normed, context, keys[:4], (*cache[:2], cache[-1]), ordered)
        tokens = _tokens(x)
        ahead = begins_with(self.mlp.projections, tokens, self.mlp.gates_in_launch)
        x = attention.o_proj.onto(x, mixed, self.multiplier, keys[3], ahead)
        x, normed = summed_and_unnormed(x, self.post_attention_layernorm, self.multiplier, self.mlp.projections)
        ahead = begins_with(attention.projections, tokens, is_following=True) if self.follows_itself else []
        x = self.mlp.onto(x, normed, self.multiplier, keys[4:], ahead)
        return x, (*cast(tuple, of_attention)[:2], *cache[2:4]), Aside(None, stored)

    def _of_layer(self, x, per_layer_input, key):
        """The token's embedding for this layer, gated by x and projected: [B, T, P] -> [B, T, D]."""
        gate_key, key = (None, None) if key is None else (jax.random.fold_in(key, i) for i in (8, 9))
        gate = ACTIVATIONS[cast(str, self.per_layer_act)](self.per_layer_input_gate(x, gate_key))
        return self.post_per_layer_input_norm(self.per_layer_projection(gate * per_layer_input, key))

    def _mix(self, x, context: Context, keys: list, key, cache):
        """What a token takes from those before it: by attention, a mixer, or both."""
        of_attention, of_mixer = (None, None) if cache is None else ((*cache[:2], cache[-1]), cache[2:])
        stored: dict[int, Any] = {}
        mixer_key = None if key is None else jax.random.fold_in(key, 7)
        if self.linear_attn is not None:
            mixed, of_mixer = self.linear_attn(x, context.runs, mixer_key, of_mixer)
        else:
            assert self.self_attn is not None
            before, after = self.attention_multipliers
            mixed, of_attention, stored = self.self_attn(before * x, context, keys, of_attention)
            mixed = after * mixed
        if self.mamba is not None:
            more, of_mixer = self.mamba(x, context.runs, mixer_key, of_mixer)
            mixed = mixed + self.mamba_multiplier * more
        cache = None if of_attention is None or of_mixer is None else (*of_attention[:2], *of_mixer[:2])
        return mixed, cache, stored


class Run(nnx.Module):
    """`repeats` times a period of layers; layer `start + r * period + j` is slice r of `period[j]`."""

    def __init__(self, config: ModelConfig, period: tuple[LayerConfig, ...], start: int, repeats: int, make: _Make):
        self.start, self.repeats = start, repeats
        make = dataclasses.replace(make, stack=repeats)
        self.period = nnx.List([DecoderLayer(config, layer, make, len(period) == 1) for layer in period])

    def layers_of(self, place: int) -> tuple[int, ...]:
        """The model's layer indices that `period[place]` holds, in the order of its leading axis."""
        return tuple(self.start + r * len(self.period) + place for r in range(self.repeats))

    @property
    def depth(self) -> int:
        """Layers."""
        return self.repeats * len(self.period)

    def __call__(self, x, context: Context, policy: str, key=None, cache=None, per_layer_inputs=None):
        """x [B, T, D]; `cache` is the run's part of each list of a `KVCache`, or None; per_layer_inputs: None, or those
        of all of the model's layers, [layers, B, T, P].

        Returns x, the cache, and an `Aside`, with the `RouterLoad` of all layers where `context.with_load` and there
        are experts.
        """

        # What kernels read by index stays in its stack; the scan slices everything else. Norms are read so with a cache
        # only, and dense weights of 16 bits with few tokens besides, which is what their kernels are for. Experts are
        # where no mesh divides them: there a kernel would gather the whole stack.
        def is_stack(leaf):
            if isinstance(leaf, Norm):
                return cache is not None and leaf.is_read_by_index
            if isinstance(leaf, quant.QuantizedArray):
                is_of_experts = len(leaf.leading) == 2 and leaf.scheme == "nf4" and not sharding.is_on_mesh()
                return len(leaf.leading) == 1 or is_of_experts
            return isinstance(leaf, quant.StackedArray)

        period = sharding.read_divided(self.period)
        if cache is None:
            period = with_norms(period, self.repeats, x.dtype)
        else:
            period = read_by_index(period, jax.tree.leaves(x)[0])
        leaves, structure = jax.tree.flatten(period, is_leaf=is_stack)
        sliced = [None if is_stack(leaf) else leaf for leaf in leaves]

        def at(index, slices):
            return structure.unflatten(
                [leaf.at(index) if is_stack(leaf) else part for leaf, part in zip(leaves, slices, strict=True)]
            )

        def body(carry, layer):
            x, cache, counter = carry
            slices, index, key, inputs = layer
            index = index if counter is None else counter
            period = at(index, slices)
            x, cache, aside = self.once(period, x, context, index, key, cache, inputs)
            return (x, cache, None if counter is None else counter + 1), aside

        if context.one_token:
            first = jax.eval_shape(lambda leaves: jax.tree.map(lambda leaf: leaf[0], leaves), sliced)
            x = _as_left(x, at(jnp.int32(0), first)[-1], context)
        # With a cache the index is carried, which XLA makes the loop's own counter: one out of `layers` is copied at
        # each step for the kernels that read it. Without a cache a carry may be kept of each layer.
        counter = None if cache is None else jnp.int32(0)
        index = jnp.arange(self.repeats, dtype=jnp.int32)
        keys = None if key is None else jax.vmap(lambda i: jax.random.fold_in(key, i))(index + self.start)
        layers = (sliced, index, keys, self.inputs_of(per_layer_inputs))
        # Kernels that read by index are the same for all layers, and so are quickly compiled one after the other. Then
        # the index is a constant, and counting no launch of its own.
        unroll = context.one_token and all(part is None for part in sliced) and kernels.is_on_gpu()
        room = None if context.host_bytes is None else context.host_bytes * self.depth
        (x, cache, _), aside = remat.scan(
            body, (x, cache, counter), layers, policy, room, unroll=unroll, in_loop=context.in_loops
        )
        return x, cache, self.whole(aside)

    def whole(self, each: Aside) -> Aside:
        """What all repeats give, of what each gave, stacked. A layer that stores keys and values has no like, and so
        is in a run without repeats."""
        load = jax.tree.map(lambda part: jnp.sum(part, axis=0), each.load)
        return Aside(load, jax.tree.map(lambda part: part[0], each.stored_kv))

    def inputs_of(self, per_layer_inputs):
        """Those of all layers, [layers, ...], as [repeats, period, ...] of this run's; None stays None."""
        if per_layer_inputs is None:
            return None
        own = per_layer_inputs[self.start : self.start + self.repeats * len(self.period)]
        return own.reshape(self.repeats, len(self.period), *own.shape[1:])

    def once(self, period, x, context: Context, index=None, key=None, cache=None, per_layer_inputs=None):
        """One repeat, of a period that holds slice `index`; per_layer_inputs: [period, B, T, P]."""
        loads, stored = [], {}
        for place, block in enumerate(period):
            block_key = None if key is None else jax.random.fold_in(key, place)
            part = None if cache is None else (*(stacked[place] for stacked in cache), index)
            inputs = None if per_layer_inputs is None else per_layer_inputs[place]
            context = dataclasses.replace(context, layer=self.start + place)
            x, part, aside = block(x, context, block_key, part, inputs)
            if cache is not None:
                cache = [
                    [*stacked[:place], new, *stacked[place + 1 :]] for stacked, new in zip(cache, part, strict=True)
                ]
            if aside.stored_kv:
                stored |= aside.stored_kv
                context = dataclasses.replace(context, stored_kv=context.stored_kv | aside.stored_kv)
            loads.append(aside.load)
        return x, cache, Aside(_total_load(loads), stored)


def _tokens(x: Any) -> int:
    return math.prod(x.shape[:-1])


def _by_rows(x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
    """Hidden states, which on a mesh are divided by rows of the batch and nothing else."""
    return sharding.divided(x, ("batch", None, None))


def _by_features(x: Float[Array, "*batch f"]) -> Float[Array, "*batch f"]:
    """What the MLP's first products make of hidden states, or of a tile of them."""
    return sharding.divided(x, ("batch", *[None] * (x.ndim - 2), "mlp"))


def _as_left(x, last: DecoderLayer, context: Context):
    """The residual stream, `Unsummed` or not as the last layer leaves it, so that a scan can carry it."""
    stream = x.x if isinstance(x, Unsummed) else x
    leaves_sum = last.leaves_sum(stream, context)
    left = last.left(stream) if leaves_sum else None
    if isinstance(x, Unsummed):
        stream, part = x
        if leaves_sum and jax.eval_shape(lambda: part) == left:
            return x
        x = added(stream, part, last.multiplier)
    return Unsummed(x, jax.tree.map(lambda part: jnp.zeros(part.shape, part.dtype), left)) if leaves_sum else x


def _total_load(loads: list[RouterLoad | None]) -> RouterLoad | None:
    """The sum, None being of layers without experts; None for none but those."""
    known = [load for load in loads if load is not None]
    return jax.tree.map(lambda *parts: sum(parts[1:], parts[0]), *known) if known else None


class Decoder(nnx.Module):
    """Embedding, layers, final norm: ids [B, T] -> hidden states [B, T, D]."""

    def __init__(self, config: ModelConfig, make: _Make):
        width, layers, inner = config.hidden_size, config.num_hidden_layers, config.hidden_size_per_layer_input
        self.embed_tokens = make.embedding(config.vocab_size, width)
        rows = config.vocab_size_per_layer_input
        self.embed_tokens_per_layer: Any = make.embedding(rows, layers * inner) if inner else None
        if inner:
            self.per_layer_model_projection = make.linear(width, layers * inner, ("mlp", "embed"), False)
            self.per_layer_projection_norm = make.norm((inner,), ("mlp",))
        self.layers = nnx.List(
            [Run(config, period, start, repeats, make) for start, period, repeats in layer_runs(config.layers)]
        )
        self.norm = make.norm((config.hidden_size,), ("embed",))

    def per_layer_inputs(self, input_ids, x, key=None):
        """What each layer adds of each token, [layers, B, T, P], or None: a row of a table of its own (Gemma 3n's
        per-layer embeddings) and a part of the token's embedding x [B, T, D], at equal weight."""
        if self.embed_tokens_per_layer is None:
            return None
        inner = self.per_layer_projection_norm.weight.get_value().shape[-1]
        shape = (*x.shape[:2], -1, inner)
        key = None if key is None else jax.random.fold_in(key, 0x7FFFFFFF)  # no layer's
        projected = (self.per_layer_model_projection(x, key) * x.shape[-1] ** -0.5).reshape(shape)
        looked_up = (self.embed_tokens_per_layer(input_ids).astype(x.dtype) * inner**0.5).reshape(shape)
        return jnp.moveaxis((self.per_layer_projection_norm(projected) + looked_up) * 2**-0.5, 2, 0)


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

    def buffer(self, shape):
        return Buffer(jnp.ones((cast(int, self.stack), *shape), self.dtype), axes=("layers", *[None] * len(shape)))

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
        self.host_bytes: int | None = None  # of pinned memory for what is offloaded; None for what XLA may pin
        self.full_determinism = False  # whether a step is to be compiled so; `make_train_step` says it
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
        native = self.config.max_position_embeddings
        alone = cache is not None and cache.reach is not None
        places = None if cache is None else cache.reach or cache.segment_ids.shape[1]
        rotary = [rope_tables(rope, dim, native, positions, places, alone) for rope, dim in self.config.ropes]
        tile = remat.mlp_tile(self.remat_policy, self.tiled_mlp)
        filled = None
        context = Context(
            rotary, segment_ids, segment_ids, 0, tile, with_load=with_load, in_loops=self.full_determinism
        )
        pinned = pinned_bytes() if self.host_bytes is None else self.host_bytes
        if pinned is not None:
            context = dataclasses.replace(context, host_bytes=pinned // self.config.num_hidden_layers)
        if cache is not None:
            segment_ids = jnp.ones_like(input_ids) if segment_ids is None else segment_ids
            if jnp.ndim(cache.length) == 0:
                filled = jax.lax.dynamic_update_slice(cache.segment_ids, segment_ids, (0, cache.length))
            else:
                filled = cache.segment_ids.at[rows_and_places(cache.length, input_ids.shape[1])].set(segment_ids)
            context = Context(rotary, segment_ids, filled, cache.length)
            if context.is_prefill:
                context = dataclasses.replace(context, key_segments=segment_ids)
            else:
                context = dataclasses.replace(context, one_token=input_ids.shape[1] == 1)
        if self.config.alibi:
            keys_at = positions if filled is None or context.is_prefill else segment_positions(filled)
            scale = self.config.attention_scale(self.config.head_dim)
            bias = alibi_bias(keys_at, self.config.num_attention_heads) * scale
            context = dataclasses.replace(context, key_bias=bias)

        if self.config.mamba is not None or self.config.linear_attention is not None:
            before = None
            if cache is not None and not context.is_prefill:
                last = jnp.broadcast_to(cache.length - 1, input_ids.shape[:1])
                before = jnp.take_along_axis(cache.segment_ids, last[:, None], axis=1)[:, 0]
            context = dataclasses.replace(context, runs=segment_runs(segment_ids, input_ids.shape, before))

        x = _by_rows(self.model.embed_tokens(input_ids).astype(self.dtype) * self.config.embedding_multiplier)
        per_layer_inputs = self.model.per_layer_inputs(input_ids, x, key)
        parts = [] if cache is None else [cache.keys, cache.values, cache.convolutions, cache.states]
        loads = []
        for i, run in enumerate(self.model.layers):
            run_cache = None if cache is None else [part[i] for part in parts]
            policy = self.remat_policy if cache is None else "none"
            x, run_cache, aside = run(x, context, policy, key, run_cache, per_layer_inputs)
            loads.append(aside.load)
            if aside.stored_kv:
                context = dataclasses.replace(context, stored_kv=context.stored_kv | aside.stored_kv)
            if run_cache is not None:
                parts = [[*part[:i], new, *part[i + 1 :]] for part, new in zip(parts, run_cache, strict=True)]
        _, x = summed_and_normed(x, self.model.norm, self.config.residual_multiplier)
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
            gain = head.dora_gain(head.dora_norms(quant.matmul(a.astype(hidden.dtype), weight)))
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

        def places(layer):
            attention = layer.self_attn
            if attention is None or attention.reuses_kv is not None:
                return None
            return length, attention.kv_heads, attention.head_dim

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
