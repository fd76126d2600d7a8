"""Scores replies to the shop's requests: a reply is right when it is the wanted JSON object, field for field."""

import json
from collections.abc import Iterable


def is_right(reply: str, wanted: str) -> bool:
    try:
        return json.loads(reply) == json.loads(wanted)
    except json.JSONDecodeError:
        return False


def score(replies: Iterable[str], rows: Iterable[dict]) -> float:
    """The share of right replies; a row's last message is the wanted one."""
    marks = [is_right(reply, row["messages"][-1]["content"]) for reply, row in zip(replies, rows, strict=True)]
    return sum(marks) / len(marks)
