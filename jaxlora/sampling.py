"""What a request asks of its text, with vLLM's names, and how the next token of many requests is drawn at once.

Every wish is an array with an entry for each row, so requests of different wishes share one compiled step. A wish that
is not made changes nothing, to the last bit, so that a request beside others gets what it gets alone:

    logits -> stop tokens ruled out before `min_tokens` -> penalties -> likeliest token, if the temperature is 0
                                                                    -> / temperature -> top_k, top_p, min_p -> draw

The filters and their order are those of `generate.filter_scores`, which are transformers'. A row's draws come from its
own seed, the number of the completion and the number of tokens drawn so far, and so from nothing that its neighbours
do.

Shapes: B rows, V vocabulary, E stop tokens, K log-probabilities asked for.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

_LIMITS = {  # (least, most), both allowed
    "n": (1, None),
    "temperature": (0.0, None),
    "top_p": (0.0, 1.0),
    "top_k": (-1, None),
    "min_p": (0.0, 1.0),
    "seed": (0, 2**32 - 1),
    "max_tokens": (1, None),
    "min_tokens": (0, None),
    "presence_penalty": (-2.0, 2.0),
    "frequency_penalty": (-2.0, 2.0),
    "logprobs": (0, None),
}
_WHOLE = ("n", "top_k", "seed", "max_tokens", "min_tokens", "logprobs")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How one request goes on, with vLLM's names, defaults and meaning.

    n: number of completions. temperature: 0 takes the likeliest token. top_k: 0 or -1 for all. top_p, min_p: as in
    `generate`. seed: of this request's draws; None takes another at each request, in a fixed order.

    stop: texts that end a completion, and are cut off unless `include_stop_str_in_output`. stop_token_ids: tokens that
    do, beside the model's own, which `ignore_eos` switches off. max_tokens: the most new tokens; None for what the
    window has room for. min_tokens: nothing ends a completion before so many.

    repetition_penalty: logits of tokens that are in the prompt or the completion are divided by it if positive, else
    multiplied (arXiv:1909.05858, section 4.1). presence_penalty, frequency_penalty: taken off the logits of tokens in
    the completion, once, or for each time.

    logprobs: as many log-probabilities a token, and the drawn token's; before penalties, temperature and filters.
    skip_special_tokens: leave them out of the text.

    Raises:
        TypeError: not a number where one is expected, or not a whole one.
        ValueError: out of range; the message names the range.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: Sequence[str] | str | None = ()
    stop_token_ids: Sequence[int] | None = ()
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logprobs: int | None = None
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False

    def __post_init__(self):
        for name in _WHOLE:
            value = getattr(self, name)
            if value is not None or name not in ("seed", "max_tokens", "logprobs"):
                object.__setattr__(self, name, _whole(name, value))
        for name, (least, most) in _LIMITS.items():
            value = getattr(self, name)
            if value is not None and not (value >= least and (most is None or value <= most)):
                raise ValueError(f"{name} must be {_range(least, most)}, found {value}")
        if not self.repetition_penalty > 0.0:
            raise ValueError(f"repetition_penalty must be above 0, found {self.repetition_penalty}")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens={self.min_tokens} is more than max_tokens={self.max_tokens}")
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        if not all(isinstance(text, str) and text for text in stop):
            raise ValueError(f"stop must be texts of at least one character, found {self.stop!r}")
        object.__setattr__(self, "stop", stop)
        ids = tuple(_whole("stop_token_ids", token) for token in self.stop_token_ids or ())
        object.__setattr__(self, "stop_token_ids", ids)


def _whole(name: str, value: Any) -> int:
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, found {value!r}") from None


def _range(least: float, most: float | None) -> str:
    return f"at least {least}" if most is None else f"in [{least}, {most}]"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Needs:
    """What the program must be able to do for the requests of one call; each is another program.

    draws: some temperature is above 0. filters: some draw has a top_k, top_p or min_p. penalties: some request has one.
    logprobs: the most that are asked for.
    """

    draws: bool
    filters: bool
    penalties: bool
    logprobs: int

    @classmethod
    def of(cls, params: Sequence[SamplingParams]) -> Needs:
        return cls(
            draws=any(p.temperature > 0 for p in params),
            filters=any(p.temperature > 0 and (p.top_k > 0 or p.top_p < 1 or p.min_p > 0) for p in params),
            penalties=any(
                p.repetition_penalty != 1 or p.presence_penalty != 0 or p.frequency_penalty != 0 for p in params
            ),
            logprobs=max((p.logprobs or 0 for p in params), default=0),
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Wishes:
    """`SamplingParams` of B rows. float32 [B]: temperature, top_p, min_p, repetition, presence, frequency; int32 [B]:
    top_k, least, most (tokens); uint32 [B]: seed, completion; stops: int32 [B, E], -1 where there are fewer."""

    temperature: Any
    top_p: Any
    min_p: Any
    top_k: Any
    repetition: Any
    presence: Any
    frequency: Any
    least: Any
    most: Any
    seed: Any
    completion: Any
    stops: Any

    @classmethod
    def empty(cls, rows: int, stops: int) -> Wishes:
        """Rows on the host that wish for nothing."""
        floats = ("temperature", "top_p", "min_p", "repetition", "presence", "frequency")
        whole, bits = ("top_k", "least", "most"), ("seed", "completion")
        return cls(
            **{name: np.zeros(rows, np.float32) for name in floats},
            **{name: np.zeros(rows, np.int32) for name in whole},
            **{name: np.zeros(rows, np.uint32) for name in bits},
            stops=np.full((rows, stops), -1, np.int32),
        )

    def set(self, row: int, params: SamplingParams, *, most: int, seed: int, completion: int, stops: Sequence[int]):
        """Write one request's wishes into a row of arrays on the host."""
        self.temperature[row], self.top_k[row] = params.temperature, max(params.top_k, 0)
        self.top_p[row], self.min_p[row] = params.top_p, params.min_p
        self.repetition[row], self.presence[row] = params.repetition_penalty, params.presence_penalty
        self.frequency[row], self.least[row], self.most[row] = params.frequency_penalty, params.min_tokens, most
        self.seed[row], self.completion[row] = seed, completion
        self.stops[row] = -1
        self.stops[row, : len(stops)] = stops


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Seen:
    """The tokens of each row. prompt: bool [B, V], whether one is in the prompt; new: int32 [B, V], how often it was
    drawn."""

    prompt: Any
    new: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Drawn:
    """token: int32 [B]. logprob: float32 [B], the token's by the model alone, and rank: int32 [B], 1 for the likeliest.
    top_ids, top_logprobs: [B, K], the likeliest tokens."""

    token: Any
    logprob: Any
    rank: Any
    top_ids: Any
    top_logprobs: Any


def draw(
    logits: Float[Array, "b v"], wishes: Wishes, drawn: Int[Array, " b"], seen: Seen | None, needs: Needs
) -> Drawn:
    """The next token of every row, of which `drawn` were drawn before; see the head of this file."""
    scores = without_stops(logits, wishes, drawn)
    if needs.penalties:
        assert seen is not None
        scores = penalised(scores, seen, wishes)
    token = jnp.argmax(scores, axis=-1).astype(jnp.int32)
    if needs.draws:
        is_drawn = wishes.temperature > 0
        scores = scores / jnp.where(is_drawn, wishes.temperature, 1.0)[:, None]
        if needs.filters:
            scores = filtered(scores, wishes)
        sampled = jax.vmap(jax.random.categorical)(_keys(wishes, drawn), scores).astype(jnp.int32)
        token = jnp.where(is_drawn, sampled, token)
    logprobs = jax.nn.log_softmax(logits, axis=-1)
    logprob = jnp.take_along_axis(logprobs, token[:, None], axis=-1)
    rank = 1 + jnp.sum(logprobs > logprob, axis=-1, dtype=jnp.int32)
    top_logprobs, top_ids = jax.lax.top_k(logprobs, needs.logprobs)
    return Drawn(token, logprob[:, 0], rank, top_ids, top_logprobs)


def _keys(wishes: Wishes, drawn: Int[Array, " b"]) -> Array:
    def key(seed, completion, drawn):
        return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), completion), drawn)

    return jax.vmap(key)(wishes.seed, wishes.completion, drawn)


def without_stops(logits: Float[Array, "b v"], wishes: Wishes, drawn: Int[Array, " b"]) -> Float[Array, "b v"]:
    """-inf at the stop tokens of rows that have not drawn `min_tokens` yet."""
    rows = jnp.arange(logits.shape[0], dtype=jnp.int32)[:, None]
    is_early = (drawn < wishes.least)[:, None]
    beyond = logits.shape[1]  # where nothing is, so that nothing is written
    stops = jnp.where(is_early & (wishes.stops >= 0), wishes.stops, beyond)
    return logits.at[rows, stops].set(-jnp.inf, mode="drop")


def penalised(scores: Float[Array, "b v"], seen: Seen, wishes: Wishes) -> Float[Array, "b v"]:
    """Scores after the three penalties of `SamplingParams`."""
    factor = jnp.where(seen.prompt | (seen.new > 0), wishes.repetition[:, None], 1.0)
    scores = jnp.where(scores > 0, scores / factor, scores * factor)
    scores = scores - wishes.frequency[:, None] * seen.new.astype(jnp.float32)
    return scores - wishes.presence[:, None] * (seen.new > 0).astype(jnp.float32)


def filtered(scores: Float[Array, "b v"], wishes: Wishes) -> Float[Array, "b v"]:
    """Scores, -inf where a token is ruled out: `generate.filter_scores` with a `top_k`, `top_p`, `min_p` for each row.

    The largest of the thresholds that the three set is found on the sorted scores, and applied once.
    """
    size = scores.shape[1]
    ordered = jnp.sort(scores, axis=1, descending=True)
    last = jnp.where(wishes.top_k > 0, jnp.minimum(wishes.top_k, size), size) - 1
    threshold = jnp.take_along_axis(ordered, last[:, None], axis=1)
    ordered = jnp.where(ordered < threshold, -jnp.inf, ordered)
    probabilities = jax.nn.softmax(ordered, axis=1)
    before = jnp.cumsum(probabilities, axis=1) - probabilities  # of the tokens likelier than each
    inside = (before < wishes.top_p[:, None]) | (wishes.top_p >= 1.0)[:, None]
    inside = inside.at[:, 0].set(True) & (ordered > -jnp.inf)
    threshold = jnp.min(ordered, axis=1, where=inside, initial=jnp.inf, keepdims=True)
    threshold = jnp.maximum(threshold, ordered[:, :1] + jnp.log(wishes.min_p)[:, None])
    return jnp.where(scores < threshold, -jnp.inf, scores)


def finished(drawn: Drawn, wishes: Wishes, before: Int[Array, " b"]) -> Bool[Array, " b"]:
    """Whether a row's text ends with the token just drawn, its number `before` + 1."""
    return jnp.any(drawn.token[:, None] == wishes.stops, axis=1) | (before + 1 >= wishes.most)
