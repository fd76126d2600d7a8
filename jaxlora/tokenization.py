"""Rows -> tokenised examples: which tokens a model reads, and which of them it is to predict.

    examples = tokenize(load_rows("train.jsonl"), tokenizer, max_length=2048)
    print(examples.report)

The options mean what they mean in TRL's `SFTConfig`, so a data set trains on the same tokens here and there. Two things
differ, on purpose: nothing is cut or left out without being counted in a `TokenizationReport`, and assistant-only loss
works with templates that have no `{% generation %}`.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from jaxlora.rows import Row, load_rows, parse_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

IGNORE = -100  # the label that no loss counts: Hugging Face's convention
TRUNCATION_MODES = ("keep_start", "keep_end", "drop")


@dataclass(frozen=True, kw_only=True)
class TokenizationReport:
    """What became of each row: `rows == examples + dropped_rows + masked_rows`."""

    rows: int
    examples: int  # rows that are trained on
    tokens: int  # in those examples
    supervised_tokens: int  # of those tokens, the ones that the loss counts
    truncated_rows: int = 0  # rows cut to max_length, those then left out as masked included
    truncated_tokens: int = 0  # tokens lost by cutting
    dropped_rows: int = 0  # longer than max_length, left out by truncation_mode="drop"
    dropped_tokens: int = 0
    masked_rows: int = 0  # left out: no supervised token
    masked_by_truncation: int = 0  # of those, the rows that had one before they were cut
    diverging_prompts: int = 0  # the prompt's tokens are not a prefix of the tokens of prompt + completion

    @property
    def warnings(self) -> tuple[str, ...]:
        """One sentence for each thing that the user should know, none when all is well."""
        found = []
        if self.truncated_rows:
            found.append(f"{self.truncated_rows} rows were cut to max_length, losing {self.truncated_tokens} tokens")
        if self.dropped_rows:
            found.append(f"{self.dropped_rows} rows ({self.dropped_tokens} tokens) over max_length were left out")
        if self.masked_rows:
            found.append(
                f"{self.masked_rows} rows were left out because they have no supervised token"
                + (f", {self.masked_by_truncation} of them after truncation" if self.masked_by_truncation else "")
            )
        if self.diverging_prompts:
            found.append(
                f"in {self.diverging_prompts} rows the tokens of the prompt are not a prefix of those of prompt +"
                " completion, so the loss starts where they diverge; end prompts on a token boundary, or use a chat"
                " template that renders a prompt alike with and without its completion"
            )
        return tuple(found)

    def __str__(self) -> str:
        head = (
            f"{self.examples} of {self.rows} rows are trained on: {self.tokens} tokens,"
            f" {self.supervised_tokens} of them supervised"
        )
        return "; ".join((head, *self.warnings))


@dataclass(frozen=True, eq=False)
class Examples:
    """Tokenised documents, laid end to end.

    Document `i` is `[offsets[i], offsets[i + 1])` of the flat arrays. A label stands under its own token (the loss
    shifts), so the label of a document's first token could only be predicted from the document before it: it is always
    -100.

    Attributes:
        input_ids: int32 [tokens].
        labels: int32 [tokens], -100 where the loss does not count.
        offsets: int64 [documents + 1], strictly increasing: no document is empty.
        report: how `tokenize` arrived at them; None when made by hand.
    """

    input_ids: np.ndarray
    labels: np.ndarray
    offsets: np.ndarray
    report: TokenizationReport | None = None

    def __post_init__(self) -> None:
        if len(self.offsets) < 2 or not (np.diff(self.offsets) > 0).all():
            raise ValueError("Examples need at least one document, and none that is empty")
        labels = self.labels.copy()
        labels[self.offsets[:-1]] = IGNORE
        object.__setattr__(self, "labels", labels)

    @classmethod
    def from_lists(cls, input_ids: Sequence[Any], labels: Sequence[Any] | None = None) -> Examples:
        """From one sequence of token ids for each document and, unless every token is supervised, one of labels."""
        labels = input_ids if labels is None else labels
        lengths = [len(ids) for ids in input_ids]
        if [len(l) for l in labels] != lengths:
            raise ValueError("every document needs as many labels as input_ids")
        flat = [np.concatenate([np.zeros(0, np.int32), *map(_int32, arrays)]) for arrays in (input_ids, labels)]
        return cls(*flat, offsets=np.cumsum([0, *lengths], dtype=np.int64))

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, i: int | np.integer) -> tuple[np.ndarray, np.ndarray]:
        """The `(input_ids, labels)` of one document, int32 [length] each."""
        if not 0 <= i < len(self):
            raise IndexError(i)
        span = slice(self.offsets[i], self.offsets[i + 1])
        return self.input_ids[span], self.labels[span]

    @property
    def lengths(self) -> np.ndarray:
        """int64 [documents]."""
        return np.diff(self.offsets)

    def cut(self, at: np.ndarray) -> Examples:
        """The same tokens with further document boundaries at these positions of the flat arrays."""
        return dataclasses.replace(self, offsets=np.union1d(self.offsets, at))


def _int32(values: Any) -> np.ndarray:
    return np.asarray(values, dtype=np.int32)


def tokenize(
    rows: Any,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    max_length: int | None,
    truncation_mode: str = "keep_start",
    assistant_only_loss: bool = False,
    completion_only_loss: bool | None = None,
    dataset_text_field: str = "text",
    formatting_func: Callable[[Mapping[str, Any]], str] | None = None,
) -> Examples:
    """Tokenises rows and decides which tokens the loss counts, as TRL's `SFTTrainer` does.

    A row is of the first of these kinds that its keys fit; a field that is None counts as absent:

    - `input_ids`, with optional `labels`, or else optional `assistant_masks` and `completion_mask` (0 or 1 a token);
    - `prompt` and `completion`, both strings (the EOS token is appended unless the text ends with it) or both lists of
      messages;
    - `messages`, or `conversations`, with `role` and `content` (ShareGPT's `from` and `value` are renamed);
    - `dataset_text_field`: a string, to which EOS is appended unless it ends with it.

    Rows of messages may carry `tools` (a list or its JSON) and `chat_template_kwargs`.

    Args:
        rows: whatever `load_rows` takes.
        tokenizer: may be None when every row has `input_ids`.
        max_length: the most tokens of an example; None keeps all, as packing with "bfd_split" or "wrapped" wants.
        truncation_mode: which end of a longer row to keep, or "drop" to leave the row out.
        assistant_only_loss: count only what the assistant says, its end-of-turn token included. The template's own
            `{% generation %}` decides; without it the turns are found by rendering the conversation prefix by prefix.
        completion_only_loss: count only the completion of prompt/completion rows. None means yes for those rows.
        dataset_text_field: the field of plain text.
        formatting_func: makes the text of a row that is not tokenised yet from its fields.

    Returns:
        `Examples` with a report. What the report warns of is logged too.

    Raises:
        ValueError: a row with the wrong fields, or a template that cannot say where the assistant's turns are (both
            name the row); or no row has a supervised token.
        TypeError: a field of the wrong type.
    """
    if truncation_mode not in TRUNCATION_MODES:
        raise ValueError(f"truncation_mode must be one of {TRUNCATION_MODES}; found {truncation_mode!r}")
    if max_length is not None and max_length < 2:
        raise ValueError(f"max_length must be at least 2 (one token to read, one to predict); found {max_length}")
    if formatting_func is not None and completion_only_loss:
        raise ValueError(
            "formatting_func makes plain text, which has no completion: format the rows yourself, or leave out"
            " completion_only_loss=True"
        )
    reader = _RowReader(tokenizer, assistant_only_loss, completion_only_loss, dataset_text_field, formatting_func)
    rows = load_rows(rows)

    all_ids: list[np.ndarray] = []
    all_labels: list[np.ndarray] = []
    counts: dict[str, int] = defaultdict(int)
    for ids, labels, diverges in reader.encode(rows):
        counts["diverging_prompts"] += diverges
        was_supervised = bool((labels[1:] != IGNORE).any())
        if max_length is not None and (lost := len(ids) - max_length) > 0:
            if truncation_mode == "drop":
                counts["dropped_rows"] += 1
                counts["dropped_tokens"] += len(ids)
                continue
            counts["truncated_rows"] += 1
            counts["truncated_tokens"] += lost
            kept = slice(max_length) if truncation_mode == "keep_start" else slice(-max_length, None)
            ids, labels = ids[kept], labels[kept]
        if not (labels[1:] != IGNORE).any():  # nothing comes before the first token, so it is never predicted
            counts["masked_rows"] += 1
            counts["masked_by_truncation"] += was_supervised
            continue
        all_ids.append(ids)
        all_labels.append(labels)

    if not all_ids:
        raise ValueError(_nothing_supervised(len(rows), counts, max_length, assistant_only_loss))
    examples = Examples.from_lists(all_ids, all_labels)
    report = TokenizationReport(
        rows=len(rows),
        examples=len(examples),
        tokens=len(examples.input_ids),
        supervised_tokens=int((examples.labels != IGNORE).sum()),
        **counts,
    )
    for warning in report.warnings:
        logger.warning(warning)
    return dataclasses.replace(examples, report=report)


def _nothing_supervised(rows: int, counts: Mapping[str, int], max_length: int | None, assistant_only_loss: bool) -> str:
    dropped, cut = counts.get("dropped_rows", 0), counts.get("masked_by_truncation", 0)
    masked = counts.get("masked_rows", 0) - cut
    reasons = []
    if dropped:
        reasons.append(f"{dropped} are longer than max_length={max_length}: raise max_length, or truncate them")
    if cut:
        reasons.append(
            f"{cut} lost all their supervised tokens when cut to max_length={max_length}: raise max_length, or use"
            " truncation_mode='keep_end'"
        )
    if masked and assistant_only_loss:
        reasons.append(
            f"{masked} have no assistant turn that the chat template marks: check the roles of the messages and the"
            " {% generation %} of the template, or set assistant_only_loss=False"
        )
    elif masked:
        reasons.append(
            f"{masked} have only labels of -100, an empty completion or fewer than two tokens: check the fields, or set"
            " completion_only_loss=False"
        )
    return f"no token of the data set is supervised, so there is nothing to train on. Of {rows} rows " + "; ".join(
        reasons
    )


@dataclass(frozen=True)
class _Document:
    """A row as the text that is tokenised and what decides its labels."""

    text: str
    add_special_tokens: bool  # a chat template writes its own
    prompt: str | None = None  # count only what follows the prompt
    turns: Sequence[tuple[int, int]] | None = None  # count only these ranges of characters


_Encoded = tuple[np.ndarray, np.ndarray, bool]  # input_ids, labels, whether the prompt's tokens are no prefix


@dataclass(frozen=True)
class _RowReader:
    tokenizer: PreTrainedTokenizerBase | None
    assistant_only_loss: bool
    completion_only_loss: bool | None
    text_field: str
    formatting_func: Callable[[Mapping[str, Any]], str] | None

    def encode(self, rows: Sequence[Row], chunk: int = 1000) -> Iterator[_Encoded]:
        """Yields one triple a row, in order. Chunks feed the tokenizer's threads and bound the memory in flight."""
        for start in range(0, len(rows), chunk):
            read = [self.read(row) for row in rows[start : start + chunk]]
            encoded = {i: item for i, item in enumerate(read) if isinstance(item, tuple)}
            for special in (True, False):
                of_kind = {
                    i: d for i, d in enumerate(read) if isinstance(d, _Document) and d.add_special_tokens == special
                }
                encoded.update(zip(of_kind, self.encode_documents(list(of_kind.values()), special), strict=True))
            yield from (encoded[i] for i in range(len(read)))

    def encode_documents(self, documents: Sequence[_Document], add_special_tokens: bool) -> Iterator[_Encoded]:
        if not documents:
            return

        def call(texts: list[str], **options: Any) -> Any:
            # verbose=False: its complaint about long texts is our report's business
            return cast(Any, self.tokenizer)(texts, add_special_tokens=add_special_tokens, verbose=False, **options)

        with_turns = any(d.turns is not None for d in documents)
        full = call([d.text for d in documents], return_offsets_mapping=with_turns)
        prompts = [d.prompt for d in documents if d.prompt is not None]
        prompt_ids = iter(call(prompts)["input_ids"] if prompts else ())
        for i, document in enumerate(documents):
            ids = _int32(full["input_ids"][i])
            counted = np.ones(len(ids), bool)
            diverges = False
            if document.prompt is not None:
                prompt = _int32(next(prompt_ids))
                n = _common_prefix(prompt, ids)
                counted[:n] = False
                diverges = n < len(prompt)
            if document.turns is not None:
                counted &= _tokens_within(document.turns, full["offset_mapping"][i])
            yield ids, np.where(counted, ids, np.int32(IGNORE)), diverges

    def read(self, row: Row) -> _Document | _Encoded:
        fields = {key: value for key, value in row.fields.items() if value is not None}
        if "conversations" in fields and "messages" not in fields:
            fields["messages"] = fields["conversations"]
        tokenized = "input_ids" in fields
        if self.formatting_func is not None and not tokenized:
            fields = {self.text_field: self.formatting_func(row.fields)}
        pair = "prompt" in fields and "completion" in fields
        chat = "messages" in fields and not pair

        if not (tokenized or pair or chat or self.text_field in fields):
            raise ValueError(
                f"{row.origin}: found the fields {sorted(row.fields)}; expected 'messages', 'prompt' and 'completion',"
                f" {self.text_field!r} or 'input_ids'. Rename the fields, name the one of plain text with"
                " dataset_text_field, or pass a formatting_func."
            )
        if self.completion_only_loss and not tokenized and not pair:
            raise ValueError(
                f"{row.origin}: completion_only_loss=True needs 'prompt' and 'completion'; found {sorted(row.fields)}."
                " For the replies of a conversation use assistant_only_loss=True."
            )
        if tokenized:
            return self.read_tokens(fields, row.origin)
        if self.tokenizer is None:
            raise ValueError(
                f"{row.origin}: there is no tokenizer, so rows need 'input_ids'; found {sorted(row.fields)}"
            )
        if pair and not isinstance(fields["prompt"], str):
            return self.read_chat(fields, row.origin, "prompt", "completion")
        if chat:
            return self.read_chat(fields, row.origin, "messages")
        if self.assistant_only_loss:
            raise ValueError(
                f"{row.origin}: assistant_only_loss=True needs a conversation; found plain text in"
                f" {sorted(row.fields)}. Give 'messages', or set assistant_only_loss=False."
            )
        if pair:
            prompt = _string(fields, "prompt", row.origin)
            text = prompt + self.with_eos(_string(fields, "completion", row.origin))
            return _Document(text, add_special_tokens=True, prompt=prompt if self.masks_prompts else None)
        return _Document(self.with_eos(_string(fields, self.text_field, row.origin)), add_special_tokens=True)

    @property
    def masks_prompts(self) -> bool:
        return self.completion_only_loss is not False

    def with_eos(self, text: str) -> str:
        eos = cast(Any, self.tokenizer).eos_token
        if eos is None:
            raise ValueError("the tokenizer has no EOS token to end a document with: set tokenizer.eos_token")
        return text if text.endswith(eos) else text + eos

    def read_tokens(self, fields: Mapping[str, Any], origin: str) -> _Encoded:
        columns = {}
        for key in ("input_ids", "labels", "assistant_masks", "completion_mask"):
            if key in fields:
                values = np.asarray(fields[key])
                if values.ndim != 1 or (values.size and values.dtype.kind not in "iub"):
                    raise TypeError(
                        f"{origin}: {key!r} must be a list of integers; found {values.dtype} {values.shape}"
                    )
                columns[key] = values.astype(np.int32)
        ids = columns["input_ids"]
        if wrong := {key: len(values) for key, values in columns.items() if len(values) != len(ids)}:
            raise ValueError(f"{origin}: 'input_ids' has {len(ids)} tokens, but {wrong}: one value a token is needed")
        if ids.size and ids.min() < 0:
            raise ValueError(f"{origin}: 'input_ids' holds {ids.min()}; token ids are never negative (pad later)")
        if "labels" in columns:
            return ids, columns["labels"], False
        masks = []
        for wanted, key, always in (
            (self.assistant_only_loss, "assistant_masks", True),
            (self.completion_only_loss, "completion_mask", False),  # TRL heeds it only when it was asked for
        ):
            if wanted and key not in columns:
                raise ValueError(
                    f"{origin}: tokenised rows need {key!r} or 'labels', to say which tokens count; found"
                    f" {sorted(fields)}"
                )
            if key in columns and (wanted or always):
                masks.append(columns[key] != 0)
        return ids, np.where(np.logical_and.reduce(masks, axis=0), ids, np.int32(IGNORE)), False

    def read_chat(self, fields: Mapping[str, Any], origin: str, *keys: str) -> _Document:
        parts = [_messages(fields[key], f"{origin}: {key!r}") for key in keys]
        tools = fields.get("tools")
        tools = parse_json(tools.encode(), f"{origin}: 'tools'") if isinstance(tools, str) else tools
        chat = _Chat(self.tokenizer, tools, fields.get("chat_template_kwargs", {}), origin)

        messages = [message for part in parts for message in part]
        prompt = chat.render(parts[0], add_generation_prompt=True) if len(parts) == 2 and self.masks_prompts else None
        text, turns = chat.assistant_turns(messages) if self.assistant_only_loss else (chat.render(messages), None)
        return _Document(text, add_special_tokens=False, prompt=prompt, turns=turns)


def _string(fields: Mapping[str, Any], key: str, origin: str) -> str:
    if not isinstance(fields[key], str):
        raise TypeError(f"{origin}: {key!r} must be a string; found {type(fields[key]).__name__}")
    return fields[key]


def _messages(value: Any, origin: str) -> list[dict[str, Any]]:
    """Checked messages in `role`/`content` form. Arrow fills absent keys with None, which templates trip over."""
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise TypeError(f"{origin} must be a non-empty list of messages; found {value!r:.80}")
    messages = []
    for i, message in enumerate(value):
        if not isinstance(message, Mapping):
            raise TypeError(f"{origin}[{i}] must be a message with 'role' and 'content'; found {message!r:.80}")
        known = {key: item for key, item in message.items() if item is not None}
        if "from" in known:
            speaker = known.pop("from")
            known["role"] = {"human": "user", "gpt": "assistant"}.get(speaker, speaker)
        if "value" in known:
            known["content"] = known.pop("value")
        if "role" not in known:
            raise ValueError(f"{origin}[{i}] has the keys {sorted(message)}; expected 'role' and 'content'")
        messages.append(known)
    return messages


@dataclass(frozen=True)
class _Chat:
    """Renders the conversations of one row."""

    tokenizer: Any
    tools: Any
    template_kwargs: Mapping[str, Any]
    origin: str

    @property
    def template(self) -> str:
        try:
            return self.tokenizer.get_chat_template(None, self.tools)
        except ValueError as error:
            raise ValueError(
                f"{self.origin}: a conversation needs a chat template and the tokenizer has none: set"
                " tokenizer.chat_template, or give rows of plain text"
            ) from error

    def render(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> str:
        return self._render(messages, **options)[0]

    def _render(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> tuple[str, list[tuple[int, int]]]:
        from transformers.utils.chat_template_utils import render_jinja_template

        # What apply_chat_template does, except that it keeps the character ranges of {% generation %} to itself.
        render = cast(Any, render_jinja_template)
        variables = {**self.tokenizer.special_tokens_map, **self.template_kwargs}
        template = self.template
        try:
            texts, turns = render([list(messages)], tools=self.tools, chat_template=template, **options, **variables)
        except Exception as error:  # a template raises what it likes
            raise ValueError(
                f"{self.origin}: the chat template refused messages of the roles"
                f" {[message['role'] for message in messages]}: {error}"
            ) from error
        return texts[0], turns[0] if turns else []

    def assistant_turns(self, messages: Sequence[Mapping[str, Any]]) -> tuple[str, list[tuple[int, int]]]:
        """The conversation's text, and the range of characters of each thing that the assistant wrote."""
        if not self.tokenizer.is_fast:
            raise ValueError(
                "assistant_only_loss=True needs a fast tokenizer, which knows where its tokens stand in the text; found"
                f" {type(self.tokenizer).__name__}"
            )
        if re.search(r"\{%-?\s*generation\s*-?%\}", self.template):
            return self._render(messages, return_assistant_tokens_mask=True)
        # A turn begins where the prompt for it ends and goes as far as the conversation up to it does, so it holds the
        # end-of-turn token and whatever else (ChatML's newline) the template writes before the next header.
        text, turns = self.render(messages), []
        for i, message in enumerate(messages):
            if message["role"] == "assistant":
                if i == 0:
                    raise ValueError(f"{self.origin}: the first message is the assistant's; {_NO_TURNS}")
                before = self.render(messages[:i], add_generation_prompt=True)
                after = text if i + 1 == len(messages) else self.render(messages[: i + 1])
                if not text.startswith(after):  # Phi-3 ends every conversation, not every turn, with EOS
                    after = after.removesuffix(self.tokenizer.eos_token or "")
                for prefix in (before, after):
                    if not text.startswith(prefix):
                        n = len(os.path.commonprefix([text, prefix]))
                        raise ValueError(
                            f"{self.origin}: up to message {i} the chat template writes {prefix[n : n + 40]!r} where"
                            f" the whole conversation has {text[n : n + 40]!r}; {_NO_TURNS}"
                        )
                turns.append((len(before), len(after)))
        return text, turns


_NO_TURNS = (
    "so assistant_only_loss=True cannot tell where its turns begin and end. Use a chat template with {% generation %} "
    "around the assistant's text (trl.chat_template_utils.get_training_chat_template has some), or rows of 'prompt' and"
    " 'completion'."
)


def _common_prefix(a: np.ndarray, b: np.ndarray) -> int:
    n = min(len(a), len(b))
    differ = np.flatnonzero(a[:n] != b[:n])
    return int(differ[0]) if differ.size else n


def _tokens_within(spans: Iterable[tuple[int, int]], offsets: Sequence[tuple[int, int]]) -> np.ndarray:
    """bool [tokens]: the tokens with a character within a span, those that straddle its edge included."""
    begin, end = np.asarray(offsets, np.int64).reshape(-1, 2).T
    end = np.maximum(end, begin + 1)  # a token whose spaces were trimmed away still stands somewhere
    within = np.zeros(len(begin), bool)
    for start, stop in spans:
        within |= (begin < stop) & (end > start)
    return within
