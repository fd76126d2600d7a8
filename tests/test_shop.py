"""The quickstart's data set: reproducible, held out in earnest, and not to be won by a constant."""

import importlib.util
import json
import re
from pathlib import Path

import pytest

SHOP = Path(__file__).parents[1] / "examples" / "shop"


def load(name):
    spec = importlib.util.spec_from_file_location(f"shop_{name}", SHOP / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


make_rows, scorer = load("make_rows"), load("score")


def read(name):
    return [json.loads(line) for line in (SHOP / f"{name}.jsonl").read_text().splitlines()]


def answers(rows):
    return [json.loads(row["messages"][-1]["content"]) for row in rows]


train, heldout = read("train"), read("heldout")


def test_the_generator_writes_the_committed_files():
    for name, rows in zip(("train", "heldout"), make_rows.make_rows(), strict=True):
        assert (SHOP / f"{name}.jsonl").read_text() == make_rows.to_jsonl(rows)


def test_size_and_form():
    assert (len(train), len(heldout)) == (320, 40)
    for row in train + heldout:
        assert [message["role"] for message in row["messages"]] == ["system", "user", "assistant"]
        assert sum(len(message["content"]) for message in row["messages"]) < 300


def test_the_answer_copies_the_request():
    for row in train + heldout:
        request, answer = row["messages"][1]["content"], json.loads(row["messages"][2]["content"])
        assert list(answer) == ["action", "order", "item"]
        assert answer["action"] in make_rows.WORDINGS
        assert request.count(answer["order"]) == 1 and request.count(answer["item"]) == 1


def test_actions_are_even():
    for rows in (train, heldout):
        actions = [answer["action"] for answer in answers(rows)]
        counts = [actions.count(action) for action in make_rows.WORDINGS]
        assert max(counts) - min(counts) <= 1


@pytest.mark.parametrize("field", ["order", "item"])
def test_no_two_rows_share_an_order_or_an_item(field):
    values = [answer[field] for answer in answers(train + heldout)]
    assert len(set(values)) == len(values)


def words_of(wording):
    return sorted(re.findall(r"[a-z]+", wording.format(order="", item="").lower()))


def test_wordings_are_many_and_distinct():
    wordings = [wording for part in make_rows.WORDINGS.values() for wording in part]
    assert len(wordings) == 84 and len({str(words_of(wording)) for wording in wordings}) > 80
    assert all(wording.count("{order}") == wording.count("{item}") == 1 for wording in wordings)


def test_half_of_the_held_out_wordings_are_new():
    """Counted on rows without a slip of the finger, which would hide the wording."""

    def shows(row, wording):
        request, answer = row["messages"][1]["content"].lower().replace("#", ""), answers([row])[0]
        return wording.format(**answer).lower() in request

    new = [w for wordings in make_rows.WORDINGS.values() for w in wordings[-make_rows.UNSEEN :]]
    assert not any(shows(row, wording) for row in train for wording in new)
    assert sum(any(shows(row, wording) for wording in new) for row in heldout) >= 15


def test_no_constant_answer_wins():
    def of_constant(row):
        return scorer.score([row["messages"][-1]["content"]] * len(heldout), heldout)

    assert max(map(of_constant, train)) == 0
    assert max(map(of_constant, heldout)) == 1 / len(heldout)


def test_score():
    right = [row["messages"][-1]["content"] for row in heldout]
    assert scorer.score(right, heldout) == 1
    spaced = [json.dumps(json.loads(reply), indent=1) + "\n" for reply in right]
    assert scorer.score(spaced, heldout) == 1
    assert scorer.score(["", "{}", *right[2:]], heldout) == 38 / 40

    answer = {"action": "return", "order": "A-1", "item": "blue kettle"}
    wanted = json.dumps(answer)
    for wrong in ({**answer, "order": "A-2"}, {**answer, "item": "kettle"}, {**answer, "more": 1}, [answer], None):
        assert not scorer.is_right(json.dumps(wrong), wanted)
    assert not scorer.is_right("Here it is: " + wanted, wanted)
