"""Continue prompts:  prefill (read the prompts into a KV cache) -> decode (write one token a step until all rows end).

Each of the two is one compiled program, and the decoding loop never comes back to the host. Programs are reused from
call to call: prompts are padded on the left to a size that `bucket` knows, the cache to a multiple of `CACHE_BUCKET`
places, and every option but `top_k` and the batch size is an argument. Padding is masked out, so it changes no logits
but in their last bits.

Rotary scaling of the type "dynamic" grows its frequencies with the longest position of the batch, whereas keys that are
already in the cache keep the frequencies they were written with. That is what transformers does, and it means that
beyond the native window generating differs slightly from one pass over the finished text. "longrope" takes its long
factors from the first token on if the cache reaches beyond the original window; transformers computes all keys anew
where the text crosses it.

Shapes: B rows, T prompt tokens, S places of the cache, V vocabulary, E stop tokens.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key, Shaped

from jaxlora import sharding
from jaxlora.layers import Linear
from jaxlora.model import CausalLM, KVCache

CACHE_BUCKET = 256
# On a GPU: each time the loop asks whether to go on, the device is idle until the host has heard and launched more.
STEPS_AT_ONCE = 8


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How to draw a token. `top_k` is part of the program, the rest are its arguments, float32 scalars; None leaves a
    filter out.

    key: the seed, folded with the number of tokens drawn so far and with the row, so that a row's draws do not depend
    on the rows beside it, nor on the length of its padding.
    """

    key: Any
    temperature: Any
    top_k: int | None = dataclasses.field(default=None, metadata={"static": True})
    top_p: Any = None
    min_p: Any = None


def generate(
    model: CausalLM,
    input_ids: Any,
    *,
    attention_mask: Any = None,
    max_new_tokens: int = 128,
    do_sample: bool = False,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    seed: int | Key[Array, ""] = 0,
    eos_token_id: int | Sequence[int] | None = None,
    pad_token_id: int | None = None,
) -> Int[Array, "b total"]:
    """Continue each prompt until a stop token or `max_new_tokens`, with transformers' names and meaning.

        model.generate(**tokenizer(prompts, padding=True, padding_side="left", return_tensors="np"), max_new_tokens=64)

    Adapters act as they do in `model(...)`, without dropout.

    Args:
        input_ids: [B, T] integers; or a list of lists, which may differ in length; or a mapping that holds `input_ids`
            and maybe `attention_mask`, such as a tokenizer returns.
        attention_mask: [B, T], 0 on padding, which must stand on the left. By default all tokens count, except a run of
            pad tokens at either end of a row, where the pad token is not also a stop token.
        max_new_tokens: the most tokens that a row goes on for.
        do_sample: draw from the distribution; False takes the likeliest token.
        temperature, top_k, top_p, min_p: applied in this order; see `filter_scores`.
        seed: an integer or a JAX key. The same seed draws the same tokens.
        eos_token_id: stop token or tokens, by default the model's; an empty list for none.
        pad_token_id: what follows a stop token in a row, by default the model's, or else the first stop token.

    Returns:
        [B, T + new] int32: the prompts as they came (ragged ones padded on the left) and the new tokens, as many as
        the longest row has. A row that ended earlier goes on with pad tokens.

    Raises:
        ValueError: an empty prompt, padding on the right, an id outside the vocabulary, a prompt that leaves no room
            for `max_new_tokens` in the model's window, or an option outside its range.
        TypeError: `input_ids` are not integers, or `max_new_tokens` or `top_k` is not one.
    """
    max_new_tokens = _positive("max_new_tokens", max_new_tokens)
    if isinstance(input_ids, Mapping):
        attention_mask = input_ids.get("attention_mask") if attention_mask is None else attention_mask
        input_ids = input_ids["input_ids"]
    own_pad = _model_token(model, "pad_token_id") if pad_token_id is None else pad_token_id
    own_eos = model_stop_tokens(model)
    eos = own_eos if eos_token_id is None else _stop_tokens(eos_token_id)
    pad = own_pad if own_pad is not None else next(iter(eos), 0)

    ids, mask = _prompts(input_ids, attention_mask, fill=pad, padding=None if own_pad in own_eos + eos else own_pad)
    _check_ids(ids, mask, model.config.vocab_size)
    _check_window(model, int(mask.sum(axis=1).max()), max_new_tokens)
    sampling = _sampling(do_sample, temperature, top_k, top_p, min_p, seed)

    batch, length = ids.shape
    places = bucket(length)
    left = ((0, 0), (places - length, 0))
    padded, mask = np.pad(np.where(mask, ids, 0), left), np.pad(mask, left)
    at_once = STEPS_AT_ONCE if jax.default_backend() == "gpu" else 1
    room = _round_up(places + max_new_tokens + at_once - 1, CACHE_BUCKET)
    with sharding.over(sharding.mesh_of(model)):
        logits, cache = _prefill(model, padded, mask, places=room)
        tokens, new, _ = _decode(
            model, cache, logits, mask.sum(axis=1, dtype=np.int32), jnp.int32(max_new_tokens),
            np.asarray(eos, np.int32), jnp.int32(pad), sampling, at_once=at_once,
        )  # fmt: skip
    # Put together on the host: slicing on the device would compile once for every length.
    return jnp.asarray(np.concatenate([ids, np.asarray(tokens)[:, places : places + int(new)]], axis=1))


@functools.partial(jax.jit, static_argnames="places")
def _prefill(
    model: CausalLM, input_ids: Int[Array, "b t"], mask: Int[Array, "b t"], *, places: int
) -> tuple[Float[Array, "b v"], KVCache]:
    """Logits [B, V] of the token after each prompt, and a cache of `places` that holds the prompts."""
    positions = jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0)
    cache = model.init_cache(input_ids.shape[0], places)
    hidden, cache = model.hidden_states(input_ids, positions, mask, cache=cache)
    assert cache is not None
    return model.head(hidden[:, -1]), cache


@functools.partial(jax.jit, static_argnames="at_once", donate_argnames="cache")
def _decode(
    model: CausalLM,
    cache: KVCache,
    logits: Float[Array, "b v"],
    position: Int[Array, " b"],
    max_new_tokens: Int[Array, ""],
    eos: Int[Array, " e"],
    pad: Int[Array, ""],
    sampling: Sampling | None,
    *,
    at_once: int = 1,
) -> tuple[Int[Array, "b s"], Int[Array, ""], KVCache]:
    """Tokens [B, S], of which the new ones begin at the cache's length; how many are new; and the cache.

    `logits` are the first new token's, `position` its rotary position. The token buffer is laid out as the cache is: a
    token stands at the place that its keys will take, once it has been fed back. The cache is returned because its
    buffers are then updated in place from the first step on. Whether all rows have ended is asked every `at_once`
    steps, and the cache must have places for the steps that come too late.
    """
    model = _with_narrow_adapters(model)
    start = jnp.asarray(cache.length)
    rows = jnp.arange(logits.shape[0], dtype=jnp.uint32)

    def choose(logits, drawn, finished):
        if sampling is None:
            token = jnp.argmax(logits, axis=-1)
        else:
            step_key = jax.random.fold_in(sampling.key, drawn)
            keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(step_key, rows)
            token = jax.vmap(jax.random.categorical)(keys, filter_scores(logits, sampling))
        token = jnp.where(finished, pad, token.astype(jnp.int32))
        return token, finished | jnp.any(token[:, None] == eos, axis=1)

    def write(tokens, token, place):
        return jax.lax.dynamic_update_slice(tokens, token[:, None], (0, place))

    def unfinished(state):
        *_, finished, new = state
        return (new < max_new_tokens) & ~jnp.all(finished)

    def step(state):
        cache, tokens, token, finished, new = state
        new = new + unfinished(state).astype(jnp.int32)
        # Told from the cache's length, and not counted beside it: on a GPU a sum of its own is a launch.
        positions = position + (cache.length - start)
        hidden, cache = model.hidden_states(token[:, None], positions[:, None], cache=cache)
        assert cache is not None
        token, finished = choose(model.head(hidden[:, 0]), cache.length - start, finished)
        return cache, write(tokens, token, cache.length), token, finished, new

    def steps(state):
        return jax.lax.fori_loop(0, at_once, lambda _, state: step(state), state)

    token, finished = choose(logits, jnp.int32(0), jnp.zeros(rows.shape, bool))
    tokens = write(jnp.zeros_like(cache.segment_ids), token, start)
    state = (cache, tokens, token, finished, jnp.int32(1))
    cache, tokens, *_, new = jax.lax.while_loop(unfinished, step if at_once == 1 else steps, state)
    return tokens, new, cache


def _with_narrow_adapters(model: CausalLM) -> CausalLM:
    """The same with A and B in the dtype that they are multiplied in: cast once, and not for each token."""

    def one(leaf):
        if not isinstance(leaf, Linear) or leaf.lora_A is None:
            return leaf
        if leaf.lora_magnitude is not None or leaf.qat_scheme is not None:  # these compute with them in float32
            return leaf
        copy = jax.tree.map(lambda value: value, leaf)
        for parameter in (copy.lora_A, copy.lora_B):
            parameter.set_value(parameter.get_value().astype(model.dtype))
        return copy

    return jax.tree.map(one, model, is_leaf=lambda leaf: isinstance(leaf, Linear))


def filter_scores(logits: Float[Array, "b v"], sampling: Sampling) -> Float[Array, "b v"]:
    """Scores to draw from by softmax, -inf where a token is ruled out: transformers' warpers, in their order.

    The logits over the temperature; the `top_k` largest scores; the smallest set of likeliest tokens with `top_p` of
    what is left; tokens with at least `min_p` of the likeliest one's probability. Tokens that tie with the last one
    kept are kept as well (in top_p, transformers keeps some of them, by the order of its sort).
    """
    scores = logits / sampling.temperature
    if sampling.top_k is not None:
        largest, _ = jax.lax.top_k(scores, min(sampling.top_k, scores.shape[1]))
        scores = _from(scores, largest[:, -1:])
    if sampling.top_p is not None:
        ordered = jnp.sort(scores, axis=1)
        inside = jnp.cumsum(jax.nn.softmax(ordered, axis=1), axis=1) > 1.0 - sampling.top_p
        inside = inside.at[:, -1].set(True)
        scores = _from(scores, jnp.min(ordered, axis=1, where=inside, initial=jnp.inf, keepdims=True))
    if sampling.min_p is not None:
        scores = _from(scores, jnp.max(scores, axis=1, keepdims=True) + jnp.log(sampling.min_p))
    return scores


def _from(scores: Float[Array, "b v"], threshold: Float[Array, "b 1"]) -> Float[Array, "b v"]:
    return jnp.where(scores < threshold, -jnp.inf, scores)


# ----------------------------------------------------------------------------------------------------------------
# arguments


def bucket(n: int) -> int:
    """The size that n tokens are padded to: 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, ...

    Four sizes to a doubling: few programs, and from 32 tokens on less than a fifth of a size is padding.
    """
    return max(32, _round_up(n, max(8, 2 ** ((n - 1).bit_length() - 3))))


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def _positive(name: str, value: Any) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, found {value!r}") from None
    if number < 1:
        raise ValueError(f"{name} must be at least 1, found {number}")
    return number


def _model_token(model: CausalLM, name: str) -> Any:
    """A special token by the model's generation settings, where it has some, or else by its config.json."""
    settings = getattr(model, "generation_config", None) or {}
    return settings[name] if settings.get(name) is not None else model.hf_config.get(name)


def model_stop_tokens(model: CausalLM) -> tuple[int, ...]:
    """The tokens that end a text of this model, by its generation settings or its config.json."""
    return _stop_tokens(_model_token(model, "eos_token_id"))


def _stop_tokens(eos: int | Iterable[int] | None) -> tuple[int, ...]:
    if eos is None:
        return ()
    return tuple(int(e) for e in eos) if isinstance(eos, Iterable) else (int(eos),)


def _prompts(
    input_ids: Any, attention_mask: Any, *, fill: int, padding: int | None
) -> tuple[Shaped[np.ndarray, "b t"], Shaped[np.ndarray, "b t"]]:
    """The prompts as int32 ids and mask [B, T]. Ragged rows are filled up; `padding` is what counts as padding in an
    array that comes without a mask."""
    if isinstance(input_ids, list | tuple) and all(isinstance(row, list | tuple) for row in input_ids):
        longest = max((len(row) for row in input_ids), default=0)
        if attention_mask is None:
            attention_mask = [[0] * (longest - len(row)) + [1] * len(row) for row in input_ids]
        elif any(len(row) < longest for row in input_ids):
            raise ValueError("input_ids are rows of unequal length, which are padded here: leave attention_mask out")
        input_ids = [[fill] * (longest - len(row)) + list(row) for row in input_ids]
    ids = np.asarray(input_ids)
    if ids.ndim != 2:
        raise ValueError(
            f"input_ids must be [batch, tokens], found shape {list(ids.shape)}: for one prompt, pass [ids]"
        )
    if 0 in ids.shape:
        raise ValueError(
            f"input_ids of shape {list(ids.shape)} hold an empty prompt: begin it with a token, such as BOS"
        )
    if not np.issubdtype(ids.dtype, np.integer):
        raise TypeError(f"input_ids must be integers, found {ids.dtype}")
    if attention_mask is None:
        mask = _without_outer(ids, padding) if padding is not None else np.ones(ids.shape, bool)
    else:
        mask = np.asarray(attention_mask) != 0
    if mask.shape != ids.shape:
        raise ValueError(f"attention_mask has shape {list(mask.shape)}, input_ids {list(ids.shape)}")
    for row in np.flatnonzero(~mask.any(axis=1)):
        raise ValueError(f"row {row} of input_ids is an empty prompt: begin it with a token, such as BOS")
    for row in np.flatnonzero((mask[:, :-1] & ~mask[:, 1:]).any(axis=1)):
        raise ValueError(
            f"row {row} of input_ids has padding after its first token, and padding must stand on the left: tokenize "
            'with padding_side="left", or pass a list of unpadded lists'
        )
    return ids.astype(np.int32), mask.astype(np.int32)


def _without_outer(ids: np.ndarray, padding: int) -> np.ndarray:
    """False on the pad tokens before the first and after the last other token of each row."""
    real = ids != padding
    return np.logical_or.accumulate(real, axis=1) & np.logical_or.accumulate(real[:, ::-1], axis=1)[:, ::-1]


def _check_ids(ids: np.ndarray, mask: np.ndarray, vocab_size: int) -> None:
    for row, column in np.argwhere(((ids < 0) | (ids >= vocab_size)) & (mask != 0)):
        raise ValueError(
            f"input_ids[{row}, {column}] is {ids[row, column]}, and the model's vocabulary has {vocab_size} tokens: "
            "is this the model's own tokenizer?"
        )


def model_window(model: CausalLM) -> int:
    """The most tokens that a prompt and its continuation may have together."""
    return getattr(model, "max_seq_length", 0) or model.config.max_position_embeddings


def _check_window(model: CausalLM, longest: int, max_new_tokens: int) -> None:
    window = model_window(model)
    if longest + max_new_tokens > window:
        raise ValueError(
            f"a prompt of {longest} tokens and max_new_tokens={max_new_tokens} are {longest + max_new_tokens} tokens, "
            f"and the model's window is {window}: ask for at most {max(window - longest, 0)} new tokens, shorten the "
            "prompt, or load the model with a larger max_seq_length"
        )


def _sampling(do_sample, temperature, top_k, top_p, min_p, seed) -> Sampling | None:
    if not do_sample:
        if temperature != 1.0 or top_k is not None or top_p is not None or min_p is not None:
            warnings.warn(
                "temperature, top_k, top_p and min_p do nothing without do_sample=True", UserWarning, stacklevel=3
            )
        return None
    if not temperature > 0.0:
        raise ValueError(f"temperature must be above 0, found {temperature}: for the likeliest token, do_sample=False")
    for name, share in (("top_p", top_p), ("min_p", min_p)):
        if share is not None and not 0.0 <= share <= 1.0:
            raise ValueError(f"{name} must lie in [0, 1], found {share}")
    return Sampling(
        key=jax.random.key(seed) if isinstance(seed, int | np.integer) else seed,
        temperature=jnp.float32(temperature),
        top_k=None if top_k is None else _positive("top_k", top_k),
        top_p=None if top_p is None else jnp.float32(top_p),
        min_p=None if min_p is None else jnp.float32(min_p),
    )
