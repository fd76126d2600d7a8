"""Examples -> packed or padded batches of one fixed shape.

    for batch in BatchIterator(pack(examples, 2048), batch_size=4, seed=0, epochs=1):
        ...                                     # input_ids, labels, positions, segment_ids: int32 [4, 2048]

The strategies are TRL's, and no packing lets a document see, or predict, another one.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_left, insort
from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np

from jaxlora.tokenization import IGNORE, Examples

PADDING_ROW = -1  # an index of FixedRows.batch that stands for a row of padding
PACKING_STRATEGIES = ("bfd", "bfd_split", "wrapped")


@dataclass(frozen=True, eq=False)
class FixedRows:
    """A plan of which documents share which row. Rows are only written out a batch at a time.

    Attributes:
        examples: the documents.
        documents: int64 [documents]: row `i` holds `documents[offsets[i]:offsets[i + 1]]`, in this order.
        offsets: int64 [rows + 1].
        length: T, the tokens of a row; no row's documents have more.
        pad_token_id: what stands after them.
    """

    examples: Examples
    documents: np.ndarray
    offsets: np.ndarray
    length: int
    pad_token_id: int = 0

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def density(self) -> float:
        """The part of all tokens that is not padding."""
        return len(self.examples.input_ids) / (len(self) * self.length)

    @cached_property
    def fingerprint(self) -> str:
        """Of every token, label and place: a run must only be resumed on the very same rows."""
        digest = hashlib.blake2b(repr((self.length, self.pad_token_id)).encode(), digest_size=8)
        examples = self.examples
        for array in (examples.input_ids, examples.labels, examples.offsets, self.documents, self.offsets):
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()

    def batch(self, indices: Sequence[int] | np.ndarray) -> dict[str, np.ndarray]:
        """These rows as `input_ids`, `labels`, `positions` and `segment_ids`, int32 [len(indices), length] each.

        Segments count from 1 in each row and positions from 0 in each document; padding has segment 0, position 0,
        label -100. The index `PADDING_ROW` gives a row of nothing else.
        """
        shape = (len(indices), self.length)
        input_ids = np.full(shape, self.pad_token_id, np.int32)
        labels = np.full(shape, IGNORE, np.int32)
        positions, segment_ids = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
        for b, row in enumerate(indices):
            if row == PADDING_ROW:
                continue
            t = 0
            for segment, document in enumerate(self.documents[self.offsets[row] : self.offsets[row + 1]], start=1):
                ids, own_labels = self.examples[document]
                place = np.s_[b, t : t + len(ids)]
                input_ids[place], labels[place] = ids, own_labels
                positions[place], segment_ids[place] = np.arange(len(ids)), segment
                t += len(ids)
        return {"input_ids": input_ids, "labels": labels, "positions": positions, "segment_ids": segment_ids}


def pad(
    examples: Examples,
    max_length: int | Literal["longest"] = "longest",
    *,
    pad_token_id: int,
    pad_to_multiple_of: int | None = None,
) -> FixedRows:
    """One document a row, padded on the right.

    Args:
        examples: the documents.
        max_length: the length of every row, or "longest": that of the longest document of the whole data set, so that
            one compiled step serves all batches.
        pad_token_id: what to pad with.
        pad_to_multiple_of: rounds the length up.

    Raises:
        ValueError: a document is longer than `max_length`.
    """
    length = int(examples.lengths.max()) if max_length == "longest" else max_length
    length += -length % (pad_to_multiple_of or 1)
    _check_fits(examples, length)
    n = len(examples)
    return FixedRows(examples, np.arange(n), np.arange(n + 1), length, pad_token_id)


def pack(examples: Examples, max_length: int, strategy: str = "bfd", *, pad_token_id: int = 0) -> FixedRows:
    """Puts several documents in each row of `max_length` tokens.

    Args:
        examples: the documents.
        max_length: T.
        strategy: "bfd", best fit decreasing, the longest document first into the fullest row that has room for it:
            documents stay whole and little is padded. "bfd_split" first cuts the documents that are longer than a row.
            "wrapped" fills every row but the last by cutting wherever a row ends. A piece that was cut off is a
            document of its own, so its first token is not predicted.
        pad_token_id: what stands in the tokens left over.

    Raises:
        ValueError: an unknown strategy; with "bfd", a document longer than `max_length`.
    """
    if strategy not in PACKING_STRATEGIES:
        raise ValueError(f"packing strategy must be one of {PACKING_STRATEGIES}; found {strategy!r}")
    if max_length < 2:
        raise ValueError(f"max_length must be at least 2 (one token to read, one to predict); found {max_length}")
    if strategy == "wrapped":
        examples = examples.cut(np.arange(0, examples.offsets[-1], max_length))
        row_of_document = examples.offsets[:-1] // max_length
        offsets = np.searchsorted(row_of_document, np.arange(row_of_document[-1] + 2))
        return FixedRows(examples, np.arange(len(examples)), offsets, max_length, pad_token_id)

    if strategy == "bfd_split":
        bounds = zip(examples.offsets[:-1], examples.offsets[1:], strict=True)
        examples = examples.cut(np.concatenate([np.arange(start, stop, max_length) for start, stop in bounds]))
    _check_fits(examples, max_length)
    rows = _best_fit_decreasing(examples.lengths, max_length)
    offsets = np.cumsum([0, *map(len, rows)])
    return FixedRows(examples, np.concatenate(rows), offsets, max_length, pad_token_id)


def _best_fit_decreasing(lengths: np.ndarray, capacity: int) -> list[list[int]]:
    """Which items share a bin. O(n log n): the distinct free spaces are a sorted list, the best fit a bisection."""
    bins: list[list[int]] = []
    spaces: list[int] = []  # the distinct free spaces of the open bins, ascending
    bins_with: dict[int, deque[list[int]]] = defaultdict(deque)
    for item in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[item])
        i = bisect_left(spaces, length)
        if i == len(spaces):
            chosen, space = [], capacity
            bins.append(chosen)
        else:
            space = spaces[i]
            chosen = bins_with[space].popleft()
            if not bins_with[space]:
                del spaces[i]
        chosen.append(item)
        space -= length
        if space:
            if not bins_with[space]:
                insort(spaces, space)
            bins_with[space].append(chosen)
    return bins


def _check_fits(examples: Examples, length: int) -> None:
    lengths = examples.lengths
    if (lengths > length).any():
        worst = int(lengths.argmax())
        raise ValueError(
            f"{int((lengths > length).sum())} documents are longer than the row of {length} tokens (document"
            f" {worst} has {lengths[worst]}): tokenize with max_length={length}, or pack with strategy='bfd_split'"
        )


class BatchIterator:
    """Batches of one shape, in an order that `seed` alone decides, resumable after any of them.

    Each item is a dict of int32 arrays [B, T] (`FixedRows.batch`), or [A, B, T] when `gradient_accumulation_steps` is
    given. `len()` is the number of steps of an epoch; iterating goes on through `epochs` of them from wherever it
    stands, without end when that is None.

    Args:
        rows: from `pack` or `pad`.
        batch_size: B.
        gradient_accumulation_steps: A, the micro-batches of a step; None for no such axis.
        seed: of the shuffling; every epoch has an order of its own.
        shuffle: False keeps the order of `rows`.
        drop_last: leave out the rows that do not fill a last batch. Otherwise rows of padding, which no loss counts,
            complete it, so that shapes stay fixed.
        epochs: when to stop; None is never.

    Raises:
        ValueError: fewer rows than one batch takes and `drop_last`; a size below 1.
    """

    def __init__(
        self,
        rows: FixedRows,
        batch_size: int,
        *,
        gradient_accumulation_steps: int | None = None,
        seed: int = 0,
        shuffle: bool = True,
        drop_last: bool = False,
        epochs: int | None = None,
    ) -> None:
        accumulation = 1 if gradient_accumulation_steps is None else gradient_accumulation_steps
        if batch_size < 1 or accumulation < 1:
            raise ValueError(
                "batch_size and gradient_accumulation_steps must be at least 1; found"
                f" {batch_size} and {gradient_accumulation_steps}"
            )
        self.rows = rows
        self.rows_per_step = batch_size * accumulation
        self.leading_shape = (batch_size,) if gradient_accumulation_steps is None else (accumulation, batch_size)
        self.seed, self.shuffle, self.drop_last, self.epochs = seed, shuffle, drop_last, epochs
        self.epoch = 0  # of the next batch
        self.index = 0  # of the next batch within its epoch
        self._order: tuple[int, np.ndarray] | None = None
        if not len(self):
            raise ValueError(
                f"{len(rows)} rows do not fill one step of {self.rows_per_step}: lower batch_size or"
                " gradient_accumulation_steps, or set drop_last=False"
            )

    def __len__(self) -> int:
        whole, rest = divmod(len(self.rows), self.rows_per_step)
        return whole + (rest > 0 and not self.drop_last)

    def __iter__(self) -> BatchIterator:
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        if self.epochs is not None and self.epoch >= self.epochs:
            raise StopIteration
        start = self.index * self.rows_per_step
        indices = self.order(self.epoch)[start : start + self.rows_per_step]
        missing = self.rows_per_step - len(indices)
        batch = self.rows.batch(np.pad(indices, (0, missing), constant_values=PADDING_ROW))
        self.index += 1
        if self.index == len(self):
            self.epoch, self.index = self.epoch + 1, 0
        return {name: array.reshape(*self.leading_shape, self.rows.length) for name, array in batch.items()}

    def order(self, epoch: int) -> np.ndarray:
        """int64 [rows]: the order of the rows in an epoch."""
        if self._order is None or self._order[0] != epoch:
            order = np.arange(len(self.rows))
            if self.shuffle:
                # Philox's raw bits are the same in every numpy; the streams of Generator's methods may change.
                order = np.argsort(np.random.Philox(key=[self.seed, epoch]).random_raw(len(order)), kind="stable")
            self._order = epoch, order
        return self._order[1]

    def get_state(self) -> dict[str, Any]:
        """Where the next batch stands, and of which data: JSON-able."""
        return {"epoch": self.epoch, "index": self.index, **self._identity()}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Continues exactly where `get_state` was called.

        Raises:
            ValueError: the state is of other rows or of another order, so no place in it means anything here.
        """
        here = self._identity()
        if differ := [f"{key} {state.get(key)!r}, now {here[key]!r}" for key in here if state.get(key) != here[key]]:
            raise ValueError(
                f"cannot resume the data: the saved run had {'; '.join(differ)}. Use the same data and settings, or"
                " start a new run."
            )
        self.epoch, self.index = int(state["epoch"]), int(state["index"])

    def _identity(self) -> dict[str, Any]:
        return {
            "seed": self.seed,
            "shuffle": self.shuffle,
            "drop_last": self.drop_last,
            "rows_per_step": self.rows_per_step,
            "fingerprint": self.rows.fingerprint,
        }
