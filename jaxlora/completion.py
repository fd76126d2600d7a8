"""A continuation of a prompt: while it grows, and as it is handed back, with vLLM's names."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from jaxlora.sampling import Drawn, SamplingParams


@dataclasses.dataclass(frozen=True, kw_only=True)
class Logprob:
    """logprob: natural logarithm of a token's probability by the model. rank: among all tokens, 1 for the likeliest."""

    logprob: float
    rank: int
    decoded_token: str | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompletionOutput:
    """One continuation of a prompt.

    token_ids: what was drawn, the stop token included. text: those as text, without what ended it. finish_reason:
    "stop", or "length" for `max_tokens`; stop_reason: the stop token or text that it was, None for the model's own.
    cumulative_logprob: the sum over token_ids. logprobs: for each token {token: Logprob}, where they were asked for.
    """

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float
    logprobs: list[dict[int, Logprob]] | None
    finish_reason: str
    stop_reason: int | str | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class RequestOutput:
    """A prompt, as text if it came as text or as a chat, and its continuations."""

    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]


@dataclasses.dataclass(kw_only=True)
class Continuation:
    """One continuation of one prompt, in the making.

    request: the prompt's index; index: its own among the `n` of the request; stops: the tokens that end it; most: how
    many it may have. What decode adds, an entry for each token: tokens, logprobs, ranks, and tops, ids and
    log-probabilities of the likeliest.
    """

    request: int
    index: int
    prompt: list[int]
    params: SamplingParams
    seed: int
    stops: tuple[int, ...]
    most: int
    tokens: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[float] = dataclasses.field(default_factory=list)
    ranks: list[int] = dataclasses.field(default_factory=list)
    tops: list[tuple[np.ndarray, np.ndarray]] = dataclasses.field(default_factory=list)
    text: str = ""
    finish_reason: str | None = None
    stop_reason: int | str | None = None

    def take(self, drawn: Drawn, tokenizer: Any) -> None:
        """Add what was drawn, arrays of one entry a token. Of those only the last can be a stop token, but a stop text
        may have come before, and what follows it is dropped."""
        before = len(self.tokens)
        self.tokens += drawn.token.tolist()
        self.logprobs += drawn.logprob.tolist()
        self.ranks += drawn.rank.tolist()
        self.tops += zip(drawn.top_ids, drawn.top_logprobs, strict=True)
        is_stop = self.tokens[-1] in self.stops
        if self._end_at_text(before, len(self.tokens) - is_stop, tokenizer):
            return
        if is_stop:
            self.finish_reason = "stop"
            self.stop_reason = self.tokens[-1] if self.tokens[-1] in (self.params.stop_token_ids or ()) else None
        elif len(self.tokens) >= self.most:
            self.finish_reason = "length"
        if self.finish_reason is not None and tokenizer is not None:
            hides_stop = is_stop and not self.params.include_stop_str_in_output
            self.text = self._decoded(len(self.tokens) - hides_stop, tokenizer)

    def _end_at_text(self, before: int, count: int, tokenizer: Any) -> bool:
        """End with the first of the tokens from number `before` to `count` that completes a stop text, if one does."""
        if not self.params.stop or self._stop_text(count, tokenizer) is None:
            return False
        for size in range(max(before, self.params.min_tokens) + 1, count + 1):
            if (found := self._stop_text(size, tokenizer)) is not None:
                place, stop = found
                end = place + len(stop) if self.params.include_stop_str_in_output else place
                self.text = self._decoded(size, tokenizer)[:end]
                self.finish_reason, self.stop_reason = "stop", stop
                for entries in (self.tokens, self.logprobs, self.ranks, self.tops):
                    del entries[size:]
                return True
        return False

    def _stop_text(self, count: int, tokenizer: Any) -> tuple[int, str] | None:
        """Where in the text of `count` tokens the first stop text begins, and which; what lies whole within the first
        `min_tokens` does not count."""
        text, early = self._decoded(count, tokenizer), self._decoded(self.params.min_tokens, tokenizer)
        places = [(text.find(stop, max(0, len(early) - len(stop) + 1)), stop) for stop in self.params.stop or ()]
        return min((found for found in places if found[0] >= 0), default=None)

    def _decoded(self, count: int, tokenizer: Any) -> str:
        return tokenizer.decode(self.tokens[:count], skip_special_tokens=self.params.skip_special_tokens)

    def output(self, tokenizer: Any) -> CompletionOutput:
        """What is handed back, once it has ended."""
        assert self.finish_reason is not None
        logprobs = None
        if self.params.logprobs is not None:
            logprobs = [self._logprobs(place, tokenizer) for place in range(len(self.tokens))]
        return CompletionOutput(
            index=self.index, text=self.text, token_ids=self.tokens, cumulative_logprob=float(np.sum(self.logprobs)),
            logprobs=logprobs, finish_reason=self.finish_reason, stop_reason=self.stop_reason,
        )  # fmt: skip

    def _logprobs(self, place: int, tokenizer: Any) -> dict[int, Logprob]:
        """The likeliest tokens of one place, as many as were asked for, and the drawn one."""
        count = self.params.logprobs
        ids, values = (entries[:count].tolist() for entries in self.tops[place])
        found = [*zip(ids, values, range(1, len(ids) + 1), strict=True)]
        found += [(self.tokens[place], self.logprobs[place], self.ranks[place])]
        text = {} if tokenizer is None else {token: tokenizer.decode([token]) for token, _, _ in found}
        return {t: Logprob(logprob=value, rank=rank, decoded_token=text.get(t)) for t, value, rank in found}
