"""Files, lists and data sets -> rows, each of which knows where it stands.

pyarrow is imported when a Parquet file is read, and no `datasets` at all: a `datasets.Dataset` is a list of rows here.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Row:
    """One record of a data set, and where it stands ("train.jsonl:12"), so that an error can say so."""

    fields: Mapping[str, Any]
    origin: str


def load_rows(source: Any) -> list[Row]:
    """Reads a data set.

    Args:
        source: a path, or a list of paths, to .jsonl, .json (an array, or one object a line), .parquet or .txt (one
            document a file) files; a `datasets.Dataset`; a list or other iterable of dicts. A list of `Row` comes back
            as it is.

    Raises:
        FileNotFoundError: a file is not there.
        ValueError: nothing in it; not JSON; an unknown kind of file. The message names the file and the line.
        TypeError: the source, or one of its rows, is of the wrong type.
    """
    if isinstance(source, str | os.PathLike):
        return _read_file(Path(source))
    if isinstance(source, Mapping):
        raise TypeError(
            "a data set must be a list of rows, one split or a path; found a mapping with the keys"
            f" {sorted(map(str, source))}. Of a DatasetDict pass one split (dataset['train'])."
        )
    if not isinstance(source, Iterable):
        raise TypeError(
            f"a data set must be a path, a list of rows or a datasets.Dataset; found {type(source).__name__}"
        )

    items: Any = source
    if hasattr(source, "with_format"):  # a datasets.Dataset, known by its shape: the package is not a dependency
        items = items.with_format(None)  # plain Python values, whatever framework it was set to
    rows: list[Row] = []
    for i, item in enumerate(items):
        if isinstance(item, str | os.PathLike):
            rows += _read_file(Path(item))
        else:
            rows.append(item if isinstance(item, Row) else _row(item, f"row {i}"))
    if not rows:
        raise ValueError("the data set is empty: it has no rows")
    return rows


def _row(value: Any, origin: str) -> Row:
    if not isinstance(value, Mapping):
        raise TypeError(f"{origin}: a row must be an object with named fields; found {type(value).__name__}")
    return Row(value, origin)


def _read_file(path: Path) -> list[Row]:
    if path.is_dir():
        raise ValueError(f"{path} is a directory; give the list of its files")
    if not path.exists():
        raise FileNotFoundError(
            f"{path}: no such data file; give a local path or, for a data set of the Hub, the result of load_dataset"
        )
    readers = {".jsonl": _read_jsonl, ".json": _read_json, ".parquet": _read_parquet, ".txt": _read_text}
    kind = path.suffix.lower()
    if kind not in readers:
        raise ValueError(f"{path}: unknown kind of data file {kind!r}; expected one of {', '.join(readers)}")
    rows = readers[kind](path)
    if not rows:
        raise ValueError(f"{path}: the file has no rows")
    return rows


def _read_jsonl(path: Path) -> list[Row]:
    rows = []
    with path.open("rb") as file:  # bytes: a line ends at \n alone, and a bad byte is reported with its line
        for number, line in enumerate(file, start=1):
            if line.strip():
                rows.append(_row(parse_json(line, f"{path}:{number}"), f"{path}:{number}"))
    return rows


def _read_json(path: Path) -> list[Row]:
    content = path.read_bytes()
    if not content.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
        return _read_jsonl(path)
    return [_row(value, f"{path}: row {i}") for i, value in enumerate(parse_json(content, str(path)))]


def parse_json(text: bytes, origin: str) -> Any:
    """The value that `text` is; `origin` is where it stands.

    Raises:
        ValueError: it is no JSON, or no UTF-8.
    """
    try:
        return json.loads(text.decode("utf-8-sig"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{origin}: invalid JSON: {error}; expected one complete value") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{origin}: not UTF-8: {error}. Save the file as UTF-8.") from error


def _read_parquet(path: Path) -> list[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        values = pq.read_table(path).to_pylist()
    except pa.ArrowInvalid as error:
        raise ValueError(f"{path}: not a readable Parquet file: {error}") from error
    return [_row(value, f"{path}: row {i}") for i, value in enumerate(values)]


def _read_text(path: Path) -> list[Row]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8: {error}. Save the file as UTF-8.") from error
    return [Row({"text": text}, str(path))] if text.strip() else []
