"""Answer many prompts at once: continuous batching (Orca, OSDI 2022) over the slots of one KV cache.

    waiting requests -> prefill: a prompt's keys and values into a free slot -> decode: one token a step for all slots
                            ^                                                      |
                            +------------- a slot whose text ended is free --------+

A slot is a row of the cache, and stands for one sequence: its tokens from place 0 on, as many as it has by now, so
prompts of every length decode side by side; a model with Mamba mixers has a slot for their states too. Prefill takes
all tokens of a prompt but the last, which is the first that decode feeds; so prefill needs no logits, and all drawing
of tokens is in one program.

Decode is a loop on the device that returns to the host when a slot that somebody waits for came free, and after
`STEPS` tokens at the latest. The host keeps what the requests are, in numpy; on the device there is only the cache
(and, where a request has penalties, which tokens each slot has seen). `slots` has the two programs.

What is compiled, and when again:

- Slots, places and prompts come in sizes (`bucket`), so a call seldom brings a new one. The slots are as many as there
  are sequences, or as memory has room for; the places, what the longest request of the call may need.
- Adapters are padded to `max_lora_rank`, so one of another rank, scaling or dropout meets the same program.
- Prefill comes for one prompt, or for a group of up to `PREFILL_TOKENS` tokens.

Nothing is kept between calls but the programs: the weights are those of the model at the call, and the cache is freed
after it, so that training has its memory.

A request gets what it would get alone, in exact arithmetic; in floating point a product over more rows may round its
last bit differently. Of the rope types that look at a length, "dynamic" looks at each request's own, as `generate` does
with one prompt; "longrope" takes its long factors if the model's window reaches beyond the original one.

Shapes: B slots, S places, R prompts of a group, T tokens of one, E stop tokens, K log-probabilities.
"""

from __future__ import annotations

import collections
import itertools
import logging
import os
import time
from collections.abc import Mapping, Sequence
from typing import Any, cast

import jax
import numpy as np
from flax import nnx

from jaxlora import lora
from jaxlora.completion import CompletionOutput, Continuation, RequestOutput
from jaxlora.generate import bucket, model_stop_tokens, model_window
from jaxlora.model import CausalLM
from jaxlora.sampling import Needs, SamplingParams, Wishes
from jaxlora.slots import STEPS, Rows, Serving, decode, empty_slots, prefill

logger = logging.getLogger(__name__)

STEPS_TO_STOP_TEXT = 8  # where it looks for texts, since what follows one was drawn for nothing
MAX_SLOTS = 256
PREFILL_TOKENS = 4096
MIN_PLACES = 256
_GIB = 2**30


class Engine:
    """What `FastLanguageModel.from_pretrained(fast_inference=True)` puts on a model, as `model.engine`.

    tokenizer: one of transformers, or None for token ids only. gpu_memory_utilization: share of the device's memory
    for weights and cache together. cache_dtype: None for the model's. max_lora_rank: the largest rank of an adapter,
    which all are padded to. memory: bytes of the device, see `device_memory`. seed: of the requests that have none.
    """

    def __init__(
        self,
        tokenizer: Any = None,
        *,
        gpu_memory_utilization: float = 0.5,
        cache_dtype: Any = None,
        max_lora_rank: int = 64,
        disable_log_stats: bool = True,
        memory: int | None = None,
        max_slots: int = MAX_SLOTS,
        seed: int = 0,
    ):
        if not 0.0 < gpu_memory_utilization <= 1.0:
            raise ValueError(f"gpu_memory_utilization must be above 0 and at most 1, found {gpu_memory_utilization}")
        if max_lora_rank < 1:
            raise ValueError(f"max_lora_rank must be at least 1, found {max_lora_rank}")
        self.tokenizer, self.utilization, self.cache_dtype = tokenizer, gpu_memory_utilization, cache_dtype
        self.max_lora_rank, self.disable_log_stats, self.max_slots = max_lora_rank, disable_log_stats, max_slots
        self.memory = device_memory() if memory is None else memory
        self.seed, self._seeds_given = seed, itertools.count()

    def cache_bytes(self, model: CausalLM) -> int:
        """Bytes that the cache may take beside the weights of this model.

        Raises:
            ValueError: there is no room for one sequence of the model's whole window.
        """
        weights, window = _weight_bytes(model), model_window(model)
        budget = cache_budget(self.memory, self.utilization, weights)
        sequence = window * self._place_bytes(model) + _state_bytes(model)
        if budget < sequence:
            fp8 = "" if self.cache_dtype is not None else ", float8_kv_cache=True"
            raise ValueError(
                f"gpu_memory_utilization={self.utilization} of {self.memory / _GIB:.2f} GiB leaves "
                f"{budget / _GIB:.2f} GiB for the KV cache beside {weights / _GIB:.2f} GiB of weights, and a sequence "
                f"of {window} tokens takes {sequence / _GIB:.2f} GiB: choose a larger share, a shorter "
                f"max_seq_length{fp8}"
            )
        return budget

    def _place_bytes(self, model: CausalLM) -> int:
        """Bytes of the keys and values of one token."""
        cache = jax.eval_shape(lambda: model.init_cache(1, 1, self.cache_dtype))
        return _bytes((cache.keys, cache.values))

    def generate(
        self, model: CausalLM, prompts: Any, sampling_params: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> list[RequestOutput]:
        """Continue each prompt as its parameters say, in the order that the prompts came in.

        Args:
            model: what goes on, with the weights and the adapter that it has now; dropout is off.
            prompts: one or several, each a text, a list of token ids, or a chat, a list of messages. A text gets the
                tokenizer's special tokens, unless it begins with the BOS token already.
            sampling_params: of all prompts, or of each; None for the defaults.

        Raises:
            ValueError: an empty prompt, an id outside the vocabulary, a prompt and its `max_tokens` beyond the model's
                window, texts where there is no tokenizer, an adapter of a rank above `max_lora_rank`, a number of
                parameters that is not that of the prompts, or no room for the cache.
        """
        start = time.perf_counter()
        read = [self._read(prompt) for prompt in _several(prompts)]
        params = _each(sampling_params, len(read))
        if not read:
            return []
        sequences = self._continuations(model, read, params)
        serving, window = Serving(model, self.max_lora_rank), model_window(model)
        slots, places = cache_shape(
            self.cache_bytes(model) - _adapter_bytes(serving),
            self._place_bytes(model),
            _state_bytes(model),
            len(sequences),
            max(len(s.prompt) + s.most for s in sequences),
            window,
            self.max_slots,
        )
        Batch(
            serving, self.tokenizer, sequences, slots=slots, places=places, reach=window, cache_dtype=self.cache_dtype
        ).run()
        if not self.disable_log_stats:
            self._log(time.perf_counter() - start, sequences, slots, places)
        outputs: list[list[CompletionOutput]] = [[] for _ in read]
        for sequence in sequences:
            outputs[sequence.request].append(sequence.output(self.tokenizer))
        return [
            RequestOutput(prompt=text, prompt_token_ids=ids, outputs=done)
            for (text, ids), done in zip(read, outputs, strict=True)
        ]

    def _read(self, prompt: Any) -> tuple[str | None, list[int]]:
        """A prompt as text, if it is a text or a chat, and as token ids."""
        is_chat = _is_chat(prompt)
        if not isinstance(prompt, str) and not is_chat:
            ids = np.asarray(prompt)
            if ids.ndim != 1 or (ids.size and not np.issubdtype(ids.dtype, np.integer)):
                raise TypeError(f"a prompt must be a text, a list of token ids or a list of messages, found {prompt!r}")
            return None, ids.tolist()
        if self.tokenizer is None:
            raise ValueError("the model has no tokenizer: give prompts as lists of token ids")
        if is_chat:
            prompt = self.tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
        bos = self.tokenizer.bos_token
        special = not is_chat and not (bos and prompt.startswith(bos))
        return prompt, self.tokenizer(prompt, add_special_tokens=special)["input_ids"]

    def _continuations(self, model: CausalLM, read: list, params: Sequence[SamplingParams]) -> list[Continuation]:
        window, size = model_window(model), model.config.vocab_size
        own_stops = model_stop_tokens(model)
        sequences = []
        for i, ((_, ids), p) in enumerate(zip(read, params, strict=True)):
            if not ids:
                raise ValueError(f"prompt {i} is empty: begin it with a token, such as BOS")
            if wrong := [token for token in ids if not 0 <= token < size]:
                raise ValueError(f"prompt {i} has the token {wrong[0]}, and the model's vocabulary has {size} tokens")
            most = window - len(ids) if p.max_tokens is None else p.max_tokens
            if most < 1 or len(ids) + most > window:
                raise ValueError(
                    f"prompt {i} has {len(ids)} tokens and max_tokens is {p.max_tokens}, and the model's window is "
                    f"{window}: ask for at most {max(window - len(ids), 0)} tokens (None for all there is room for), "
                    "shorten the prompt, or load the model with a larger max_seq_length"
                )
            if p.stop and self.tokenizer is None:
                raise ValueError("the model has no tokenizer, so stop cannot be texts: use stop_token_ids")
            if p.logprobs is not None and p.logprobs > size:
                raise ValueError(f"logprobs={p.logprobs}, and the model's vocabulary has {size} tokens")
            stops = tuple(dict.fromkeys((*(() if p.ignore_eos else own_stops), *(p.stop_token_ids or ()))))
            seed = self._next_seed() if p.seed is None else p.seed
            sequences += [
                Continuation(request=i, index=k, prompt=ids, params=p, seed=seed, stops=stops, most=most)
                for k in range(p.n)
            ]
        return sequences

    def _next_seed(self) -> int:
        entropy = np.random.SeedSequence([self.seed, next(self._seeds_given)])
        return int(entropy.generate_state(1)[0])

    def _log(self, seconds: float, sequences: list[Continuation], slots: int, places: int) -> None:
        old, new = (sum(map(len, lists)) for lists in ([s.prompt for s in sequences], [s.tokens for s in sequences]))
        logger.info(
            "%d sequences in %.2f s: %d prompt tokens (%.1f tokens/s), %d new tokens (%.1f tokens/s); %d slots of %d "
            "places", len(sequences), seconds, old, old / seconds, new, new / seconds, slots, places,
        )  # fmt: skip


# ---- prompts ---------------------------------------------------------------------------------------------------------


def _is_chat(prompt: Any) -> bool:
    return isinstance(prompt, list | tuple) and len(prompt) > 0 and isinstance(prompt[0], Mapping)


def _several(prompts: Any) -> list[Any]:
    """A list of prompts, of what may be only one."""
    if isinstance(prompts, str) or _is_chat(prompts):
        return [prompts]
    prompts = list(prompts)
    return [prompts] if prompts and np.ndim(prompts[0]) == 0 and not isinstance(prompts[0], str) else prompts


def _each(params: SamplingParams | Sequence[SamplingParams] | None, prompts: int) -> list[SamplingParams]:
    """The parameters of each prompt."""
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * prompts
    if len(params) != prompts:
        raise ValueError(f"{len(params)} sampling_params for {prompts} prompts: give one for all, or one for each")
    return list(params)


# ---- memory ----------------------------------------------------------------------------------------------------------


def device_memory() -> int:
    """Bytes of the first device that JAX may use; on the CPU, those of the machine."""
    stats = jax.devices()[0].memory_stats() or {}
    return int(stats.get("bytes_limit", os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")))


def cache_budget(memory: int, utilization: float, weights: int) -> int:
    """Bytes for the cache: what the share of the memory leaves beside the weights; 0 if nothing. What the programs
    need while they run comes out of the rest of the memory.

    >>> cache_budget(80 * 2**30, 0.5, 16 * 2**30) // 2**30
    24
    """
    return max(0, int(memory * utilization) - weights)


def cache_shape(
    budget: int,
    place_bytes: int,
    state_bytes: int,
    sequences: int,
    longest: int,
    window: int,
    max_slots: int = MAX_SLOTS,
) -> tuple[int, int]:
    """(slots, places) of the cache for so many sequences, of which the longest may grow to `longest` tokens.

    A slot takes `place_bytes` for each place, and `state_bytes` for the states of mixers. Both results are of sizes
    that come again. At least one slot: `Engine.cache_bytes` sees to it that one fits.

    >>> cache_shape(24 * 2**30, 128 * 1024, 0, sequences=1000, longest=1000, window=8192)  # 131072 bytes a token
    (192, 1024)
    >>> cache_shape(24 * 2**30, 128 * 1024, 0, sequences=3, longest=100, window=8192)
    (4, 256)
    """
    places = min(max(bucket(longest), MIN_PLACES), window)
    room = min(budget // (places * place_bytes + state_bytes), max_slots)
    wanted = sequences if sequences <= 2 else 4 if sequences <= 4 else -(-sequences // 8) * 8
    return max(1, min(wanted, room)), places


def _state_bytes(model: CausalLM) -> int:
    """Bytes of what the mixers of a model keep for a sequence, however long; 0 without mixers."""
    cache = jax.eval_shape(lambda: model.init_cache(1, 1))
    return _bytes((cache.convolutions, cache.states))


def _bytes(arrays: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(arrays))


def _weight_bytes(model: CausalLM) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(model)))


def _adapter_bytes(model: CausalLM) -> int:
    matrices = [m.get_value() for linear in lora.adapters(model) for m in (linear.node.lora_A, linear.node.lora_B)]
    return sum(matrix.nbytes for matrix in matrices)


# ---- the loop on the host --------------------------------------------------------------------------------------------


class Batch:
    """The sequences of one call on their way through the slots."""

    def __init__(
        self,
        model: CausalLM,
        tokenizer: Any,
        sequences: Sequence[Continuation],
        *,
        slots: int,
        places: int,
        reach: int,
        cache_dtype: Any,
    ):
        self.model, self.tokenizer = model, tokenizer
        self.waiting = collections.deque(sequences)
        self.slots: list[Continuation | None] = [None] * slots
        self.needs = Needs.of([s.params for s in sequences])
        longest = max(len(s.stops) for s in sequences)
        self.wishes = Wishes.empty(slots, -(-max(longest, 1) // 4) * 4)
        self.cache, self.seen = empty_slots(
            model, slots=slots, places=places, dtype=cache_dtype, reach=reach, needs=self.needs
        )

    def run(self) -> None:
        """Until every sequence has ended."""
        self.admit()
        while any(self.slots):
            self.decode()
            self.admit()

    def admit(self) -> None:
        """Give waiting sequences the free slots, first come, first served, and read their prompts."""
        places = self.cache.segment_ids.shape[1]
        groups = collections.defaultdict(list)
        for slot, taken in enumerate(self.slots):
            if taken is None and self.waiting:
                sequence = self.slots[slot] = self.waiting.popleft()
                self.wishes.set(
                    slot, sequence.params, most=sequence.most, seed=sequence.seed, completion=sequence.index,
                    stops=sequence.stops,
                )  # fmt: skip
                groups[min(bucket(len(sequence.prompt)), places)].append(slot)
        for length, slots in groups.items():
            whole = max(1, min(PREFILL_TOKENS // length, len(self.slots)))
            for start in range(0, len(slots), whole):
                group = slots[start : start + whole]
                if 2 * len(group) >= whole:
                    self.prefill(group, whole, length)
                else:  # a whole group would be padding for the most part
                    for slot in group:
                        self.prefill([slot], 1, length)

    def prefill(self, slots: Sequence[int], size: int, length: int) -> None:
        """Read the prompts of these slots, as a group of `size` prompts of `length` tokens."""
        ids, (fed, last) = np.zeros((size, length), np.int32), np.zeros((2, size), np.int32)
        to = len(self.slots) + np.arange(size, dtype=np.int32)  # nobody's
        for row, slot in enumerate(slots):
            prompt = cast(Continuation, self.slots[slot]).prompt
            ids[row, length - len(prompt) + 1 :] = prompt[:-1]
            fed[row], last[row], to[row] = len(prompt) - 1, prompt[-1], slot
        self.cache, self.seen = prefill(self.model, self.cache, self.seen, ids, fed, last, to)

    def decode(self) -> None:
        """Let every slot go on for some tokens, take them, and free the slots of sequences that have ended."""
        taken = [(slot, sequence) for slot, sequence in enumerate(self.slots) if sequence is not None]
        rows = Rows(*(np.zeros(len(self.slots), kind) for kind in (np.int32, np.int32, np.int32, bool)))
        for slot, s in taken:
            rows.token[slot] = s.tokens[-1] if s.tokens else s.prompt[-1]
            rows.length[slot] = len(s.prompt) + len(s.tokens) - 1
            rows.drawn[slot], rows.active[slot] = len(s.tokens), True
        limit = STEPS_TO_STOP_TEXT if any(s.params.stop for _, s in taken) else STEPS
        self.cache, self.seen, written = decode(
            self.model, self.cache, self.seen, rows, self.wishes, np.int32(limit), np.bool_(len(self.waiting) > 0),
            needs=self.needs,
        )  # fmt: skip
        written = jax.device_get(written)
        for slot, s in taken:
            count = written.count[slot]
            s.take(jax.tree.map(lambda x, slot=slot, count=count: x[:count, slot], written.drawn), self.tokenizer)
            if s.finish_reason is not None:
                self.slots[slot] = None
