"""What the engine runs on the device: prefill and decode over the slots of a cache, compiled.

Nothing here is kept: the arrays come in and go out, and the cache is updated in place. See `engine`, which calls these,
for what a slot is.

Shapes: B slots, S places, R prompts of a group, T tokens of one.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Int

from jaxlora import lora
from jaxlora.layers import Linear
from jaxlora.model import CausalLM, KVCache
from jaxlora.moe import ExpertAdapter
from jaxlora.sampling import Drawn, Needs, Seen, Wishes, draw, finished
from jaxlora.variables import Adaptable, Adapted, AdapterScale

STEPS = 32  # the most tokens of one call of `decode`


class Serving(CausalLM):
    """The weights of a model as they are now, in a module that is the same for every adapter on the same modules.

    Every attribute of a module is part of a program's identity, so what a subclass has put on it is left behind, and
    adapters get rank `rank`, a scaling for each of its rows (zeros on the padding), no dropout, and the dtype that they
    are used in. The arrays of the base are shared, not copied.

    Raises:
        ValueError: an adapter has a larger rank.
    """

    def __init__(self, model: CausalLM, rank: int):
        copy = nnx.merge(*nnx.split(model))
        self.config, self.dtype, self.quant_config = copy.config, copy.dtype, None
        self._hf_config, self.remat_policy, self.tiled_mlp, self.host_bytes = "{}", "none", False, None
        self.full_determinism = False
        self.model, self.lm_head, self.ties_adapters = copy.model, copy.lm_head, copy.ties_adapters
        for adapter in lora.adapters(self):
            _pad_adapter(adapter.name, adapter.node, rank, self.dtype)


def _pad_adapter(name: str, module: Adaptable, rank: int, dtype: Any) -> None:
    if max(module.lora_ranks) > rank:
        raise ValueError(
            f"the adapter of {name} has rank {max(module.lora_ranks)}, and the engine was made for ranks up to {rank}: "
            f"load the model with max_lora_rank={max(module.lora_ranks)}"
        )
    a, b, scaling = (v.get_value() for v in (module.lora_A, module.lora_B, module.lora_scaling))
    layers = () if module.stack is None else (module.stack,)
    if scaling.ndim == len(layers):  # one for all ranks
        scaling = jnp.broadcast_to(scaling[..., None], (*layers, a.shape[-2]))
    lead, more = [(0, 0)] * (a.ndim - 2), (0, rank - a.shape[-2])
    a, b = jnp.pad(a, [*lead, more, (0, 0)]), jnp.pad(b, [*lead, (0, 0), more])
    if isinstance(module, ExpertAdapter) or (isinstance(module, Linear) and module.lora_magnitude is None):
        a, b = a.astype(dtype), b.astype(dtype)  # others compute with them in float32
    module.lora_A.set_value(a)
    module.lora_B.set_value(b)
    axes = ("rank",) if module.stack is None else ("layers", "rank")
    module.lora_scaling = AdapterScale(jnp.pad(scaling, [*[(0, 0)] * len(layers), more]), axes=axes)
    module.lora_ranks = (rank,) * len(module.lora_ranks)
    if isinstance(module, Adapted):
        module.lora_start_A = module.lora_start_B = nnx.data(None)
        module.lora_dropout, module.lora_owns_base = 0.0, False


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
    """Where each slot stands, [B] each. token: the one to feed next, int32; length: places filled, int32; drawn: tokens
    drawn so far, int32; active: whether somebody is in it."""

    token: Any
    length: Any
    drawn: Any
    active: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Written:
    """What decode drew, for `STEPS` tokens of which each row has `count` [B]: a `Drawn` with an axis of steps, [STEPS,
    B, ...]."""

    drawn: Drawn
    count: Any


@functools.partial(jax.jit, static_argnames=("slots", "places", "dtype", "reach", "needs"))
def empty_slots(model: CausalLM, *, slots: int, places: int, dtype: Any, reach: int, needs: Needs):
    """The cache, and the tokens seen where penalties need them."""
    cache = dataclasses.replace(model.init_cache(slots, places, dtype), reach=reach)
    cache = dataclasses.replace(cache, length=jnp.zeros(slots, jnp.int32))
    shape = (slots, model.config.vocab_size)
    return cache, Seen(jnp.zeros(shape, bool), jnp.zeros(shape, jnp.int32)) if needs.penalties else None


@functools.partial(jax.jit, donate_argnames=("cache", "seen"))
def prefill(
    model: CausalLM,
    cache: KVCache,
    seen: Seen | None,
    input_ids: Int[Array, "r t"],
    fed: Int[Array, " r"],
    last: Int[Array, " r"],
    slots: Int[Array, " r"],
) -> tuple[KVCache, Seen | None]:
    """Prompts without their last tokens put into the cache at their slots; a slot beyond the last is nobody's.

    The `fed` tokens of a prompt are the last of a row of `input_ids`, so that what a mixer keeps is of the last token;
    in the cache they begin at place 0. `last` tokens are for the penalties alone. Prompts see themselves in the compute
    dtype, and only what comes after sees the cache's.
    """
    places, tokens = cache.segment_ids.shape[1], input_ids.shape[1]
    index = jnp.arange(tokens, dtype=jnp.int32)[None]
    padding = tokens - fed[:, None]
    is_real = index >= padding
    # Padding stands where the last token will, so that the length of the prompt is known.
    positions, mask = jnp.where(is_real, index - padding, fed[:, None]), is_real.astype(jnp.int32)
    part = model.init_cache(input_ids.shape[0], tokens, jax.tree.leaves(cache.keys)[0].dtype)
    segments = jnp.zeros((input_ids.shape[0], places), jnp.int32)
    _, part = model.hidden_states(
        input_ids, positions, mask, cache=dataclasses.replace(part, segment_ids=segments, reach=cache.reach)
    )
    assert part is not None

    from_start = ((index + padding) % tokens)[None, :, :, None, None]

    def put_places(whole, new):
        return whole.at[:, slots, :tokens].set(jnp.take_along_axis(new, from_start, axis=2), mode="drop")

    def put(whole, new):
        return whole.at[:, slots].set(new, mode="drop")

    keys, values = (jax.tree.map(put_places, *pair) for pair in ((cache.keys, part.keys), (cache.values, part.values)))
    convolutions, states = (
        jax.tree.map(put, *pair) for pair in ((cache.convolutions, part.convolutions), (cache.states, part.states))
    )
    segments = segments.at[:, :tokens].set((index < fed[:, None]).astype(jnp.int32))
    segments = cache.segment_ids.at[slots].set(segments, mode="drop")
    if seen is not None:
        ids = jnp.where(is_real, input_ids, last[:, None])
        prompt = seen.prompt.at[slots].set(False, mode="drop").at[slots[:, None], ids].set(True, mode="drop")
        prompt = prompt.at[slots, last].set(True, mode="drop")
        seen = Seen(prompt, seen.new.at[slots].set(0, mode="drop"))
    cache = dataclasses.replace(cache, keys=keys, values=values, convolutions=convolutions, states=states)
    return dataclasses.replace(cache, segment_ids=segments), seen


@functools.partial(jax.jit, static_argnames="needs", donate_argnames=("cache", "seen"))
def decode(
    model: CausalLM,
    cache: KVCache,
    seen: Seen | None,
    rows: Rows,
    wishes: Wishes,
    limit: Int[Array, ""],
    is_awaited: Bool[Array, ""],
    *,
    needs: Needs,
) -> tuple[KVCache, Seen | None, Written]:
    """Up to `limit` tokens of every active row, until one ends if a slot `is_awaited`, and else until all have."""
    size = rows.token.shape[0]
    shapes = jax.eval_shape(
        lambda seen: draw(jnp.zeros((size, model.config.vocab_size), jnp.float32), wishes, rows.drawn, seen, needs),
        seen,
    )
    written = jax.tree.map(lambda x: jnp.zeros((STEPS, *x.shape), x.dtype), shapes)

    def goes_on(state):
        step, _, _, now, _ = state
        has_ended = jnp.any(rows.active & ~now.active)
        return (step < limit) & jnp.any(now.active) & ~(is_awaited & has_ended)

    def step(state):
        index, cache, seen, now, written = state
        at = dataclasses.replace(cache, length=now.length)
        hidden, cache = model.hidden_states(now.token[:, None], now.length[:, None], cache=at)
        assert cache is not None
        drawn = draw(model.head(hidden[:, 0]), wishes, now.drawn, seen, needs)
        one = now.active.astype(jnp.int32)
        if seen is not None:
            seen = Seen(seen.prompt, seen.new.at[jnp.arange(size), drawn.token].add(one))
        now = Rows(drawn.token, now.length + one, now.drawn + one, now.active & ~finished(drawn, wishes, now.drawn))
        written = jax.tree.map(lambda all, x: all.at[index].set(x), written, drawn)
        return index + 1, cache, seen, now, written

    state = (jnp.int32(0), cache, seen, rows, written)
    _, cache, seen, now, written = jax.lax.while_loop(goes_on, step, state)
    return cache, seen, Written(written, now.drawn - rows.drawn)
