"""Data: what TRL would train on, and nothing lost on the way."""

import json
import tempfile
import time
import warnings

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from jaxlora.batches import BatchIterator, _best_fit_decreasing, pack, pad
from jaxlora.rows import Row, load_rows
from jaxlora.tokenization import IGNORE, Examples, tokenize

SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}"
    "{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
GENERATION = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>\n' }}"
    "{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|bos|>"]
WORDS = "the sky is blue because air scatters short waves more than long ones and we see what arrives".split()


def make_tokenizer(chat_template: str | None, *, bos: bool = False) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([" ".join(WORDS), "system\nuser\nassistant\nYou are a helpful assistant"], trainer)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<|bos|> $A", special_tokens=[("<|bos|>", 3)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        bos_token="<|bos|>",
        chat_template=chat_template,
    )


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer(SMOLLM2)


def sentence(rng: np.random.Generator, most: int = 12) -> str:
    return " ".join(rng.choice(WORDS, rng.integers(1, most)))


def conversation(rng: np.random.Generator, turns: int) -> list[dict[str, str]]:
    roles = ("user", "assistant")
    # contents that begin or end in white space try the edges of the spans
    return [{"role": roles[i % 2], "content": f"\n {sentence(rng)} é🙂 "[i % 3 :]} for i in range(2 * turns)]


def supervised_text(examples: Examples, i: int, tokenizer) -> str:
    ids, labels = examples[i]
    return tokenizer.decode(ids[labels != IGNORE])


def lists(examples: Examples) -> list[tuple[list[int], list[int]]]:
    return [tuple(array.tolist() for array in examples[i]) for i in range(len(examples))]


# --- reading ----------------------------------------------------------------------------------------------------------


def test_every_file_kind_reads_the_same_rows(tmp_path):
    rows = [{"text": f"row {i}"} for i in range(3)]
    (tmp_path / "a.jsonl").write_text("\n\n".join(map(json.dumps, rows)), encoding="utf-8-sig")
    (tmp_path / "b.json").write_text(json.dumps(rows, indent=1))
    (tmp_path / "c.json").write_text("\n".join(map(json.dumps, rows)))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "d.parquet")
    for name in ("a.jsonl", "b.json", "c.json", "d.parquet"):
        assert [row.fields for row in load_rows(tmp_path / name)] == rows, name
    assert [row.origin for row in load_rows(tmp_path / "a.jsonl")] == [f"{tmp_path}/a.jsonl:{n}" for n in (1, 3, 5)]
    (tmp_path / "e.txt").write_text("one document\nof two lines")
    both = load_rows([tmp_path / "b.json", str(tmp_path / "e.txt")])
    assert len(both) == 4 and both[-1] == Row({"text": "one document\nof two lines"}, str(tmp_path / "e.txt"))
    assert load_rows(both) == both


def test_hf_dataset_reads_as_plain_values():
    from datasets import Dataset

    rows = [{"input_ids": [1, 2, 3]}, {"input_ids": [4, 5]}]
    dataset = Dataset.from_list(rows).with_format("numpy")
    assert [(row.fields, row.origin) for row in load_rows(dataset)] == [(rows[0], "row 0"), (rows[1], "row 1")]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": "x"}\n{"text": \n', r"a\.jsonl:2: invalid JSON"),
        ("a.jsonl", '{"text": "x"}\n\n["x"]\n', r"a\.jsonl:3: a row must be an object .* found list"),
        ("a.jsonl", "\n", r"a\.jsonl: the file has no rows"),
        ("a.json", "[{]", r"a\.json: invalid JSON"),
        ("a.csv", "text\nx", r"a\.csv: unknown kind of data file '\.csv'; expected one of \.jsonl"),
        ("a.parquet", "x", r"a\.parquet: not a readable Parquet file"),
    ],
)
def test_bad_files_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises((ValueError, TypeError), match=message):
        load_rows(tmp_path / name)


def test_bad_sources_are_named(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "x"}\n{"text": "\xff"}\n')
    with pytest.raises(ValueError, match=r"a\.jsonl:2: not UTF-8"):
        load_rows(tmp_path / "a.jsonl")
    with pytest.raises(FileNotFoundError, match=r"no\.jsonl: no such data file"):
        load_rows(tmp_path / "no.jsonl")
    with pytest.raises(ValueError, match="the data set is empty"):
        load_rows([])
    with pytest.raises(TypeError, match=r"keys \['test', 'train'\]. Of a DatasetDict pass one split"):
        load_rows({"train": [], "test": []})
    with pytest.raises(TypeError, match="found int"):
        load_rows(3)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "x", "answer": "y"}, r":2: found the fields \['answer', 'question'\]; expected 'messages'"),
        ({"prompt": "x"}, r":2: found the fields \['prompt'\]"),
        ({"text": None}, r":2: found the fields \['text'\]"),
        ({"text": 3}, ":2: 'text' must be a string; found int"),
        ({"prompt": "x", "completion": [{"role": "assistant", "content": "y"}]}, ":2: 'completion' must be a string"),
        ({"messages": []}, ":2: 'messages' must be a non-empty list"),
        ({"messages": [{"content": "x"}]}, r":2: 'messages'\[0\] has the keys \['content'\]"),
        ({"messages": ["x"]}, r":2: 'messages'\[0\] must be a message"),
        ({"input_ids": [1, 2], "labels": [1]}, r":2: 'input_ids' has 2 tokens, but \{'labels': 1\}"),
        ({"input_ids": [1.5]}, ":2: 'input_ids' must be a list of integers; found float64"),
        ({"input_ids": [-1, 2]}, ":2: 'input_ids' holds -1"),
        ({"messages": [{"role": "user", "content": "x"}], "tools": "["}, ":2: 'tools': invalid JSON"),
        ({"messages": [{"role": "user"}]}, r":2: the chat template refused messages of the roles \['user'\]"),
    ],
)
def test_bad_rows_are_named_with_file_and_line(tmp_path, tokenizer, row, message):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"text": "fine"}) + "\n" + json.dumps(row) + "\n")
    with pytest.raises((ValueError, TypeError), match=r"rows\.jsonl" + message):
        tokenize(path, tokenizer, max_length=64)


def test_options_that_do_not_fit_the_rows_are_refused(tokenizer):
    with pytest.raises(ValueError, match="row 0: assistant_only_loss=True needs a conversation"):
        tokenize([{"text": "x"}], tokenizer, max_length=9, assistant_only_loss=True)
    with pytest.raises(ValueError, match="row 0: completion_only_loss=True needs 'prompt' and 'completion'"):
        tokenize([{"text": "x"}], tokenizer, max_length=9, completion_only_loss=True)
    for option, mask in (("assistant_only_loss", "assistant_masks"), ("completion_only_loss", "completion_mask")):
        with pytest.raises(ValueError, match=f"row 0: tokenised rows need '{mask}' or 'labels'"):
            tokenize([{"input_ids": [1, 2]}], tokenizer, max_length=9, **{option: True})
    with pytest.raises(ValueError, match="truncation_mode must be one of"):
        tokenize([{"text": "x"}], tokenizer, max_length=9, truncation_mode="middle")
    with pytest.raises(ValueError, match="the tokenizer has none: set tokenizer.chat_template"):
        tokenize([{"messages": [{"role": "user", "content": "x"}]}], make_tokenizer(None), max_length=9)
    with pytest.raises(ValueError, match="there is no tokenizer, so rows need 'input_ids'"):
        tokenize([{"text": "x"}], None, max_length=9)
    with pytest.raises(ValueError, match="formatting_func makes plain text"):
        tokenize([{"a": "x"}], tokenizer, max_length=9, formatting_func=str, completion_only_loss=True)


# --- the same tokens and labels as TRL --------------------------------------------------------------------------------


def trl_trainer(rows, tokenizer, **options):
    from datasets import Dataset, disable_progress_bars
    from transformers import LlamaConfig, LlamaForCausalLM

    disable_progress_bars()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TRL's and torch's own
        from trl import SFTConfig, SFTTrainer

        config = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=1,
        )
        args = SFTConfig(output_dir=tempfile.gettempdir(), report_to=[], use_cpu=True, bf16=False, **options)
        return SFTTrainer(
            model=LlamaForCausalLM(config), args=args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer
        )


def trl_lists(rows, tokenizer, **options):
    """What TRL trains on, with the label of the first token masked: nothing predicts it there either."""
    prepared = trl_trainer(rows, tokenizer, **options).train_dataset
    return [(row["input_ids"], [IGNORE, *row["labels"][1:]]) for row in prepared]


def text_rows(rng):
    return [{"text": sentence(rng) + "<|im_end|>" * (i % 3 == 0)} for i in range(30)]


def pair_rows(rng):
    return [{"prompt": sentence(rng), "completion": " " * (i % 2) + sentence(rng)} for i in range(30)]


def chat_rows(rng):
    return [{"messages": conversation(rng, 1 + i % 3)} for i in range(30)]


def chat_pair_rows(rng):
    return [{"prompt": (m := conversation(rng, 2))[:3], "completion": m[3:]} for _ in range(30)]


@pytest.mark.parametrize(
    ("make_rows", "options"),
    [
        (text_rows, {}),
        (text_rows, {"bos": True}),
        (pair_rows, {}),
        (pair_rows, {"bos": True, "completion_only_loss": False}),
        (pair_rows, {"max_length": 9}),
        (pair_rows, {"max_length": 9, "truncation_mode": "keep_end"}),
        (chat_rows, {}),
        (chat_rows, {"assistant_only_loss": True}),
        (chat_rows, {"assistant_only_loss": True, "max_length": 40}),
        (chat_pair_rows, {}),
        (chat_pair_rows, {"completion_only_loss": False}),
        (chat_pair_rows, {"assistant_only_loss": True}),
        (chat_pair_rows, {"assistant_only_loss": True, "completion_only_loss": False}),
    ],
)
def test_tokens_and_labels_are_trls(make_rows, options):
    options = {"max_length": 1024, **options}
    tokenizer = make_tokenizer(GENERATION, bos=options.pop("bos", False))
    rows = make_rows(np.random.default_rng(0))
    assert lists(tokenize(rows, tokenizer, **options)) == trl_lists(rows, tokenizer, **options)


def test_tokenised_rows_are_trls(tokenizer):
    rng = np.random.default_rng(0)
    rows = []
    for n in range(3, 20):
        ids = rng.integers(4, 99, n).tolist()
        rows.append({"input_ids": ids, "labels": [IGNORE, *ids[1:]]})
    assert lists(tokenize(rows, None, max_length=12)) == trl_lists(rows, tokenizer, max_length=12)
    masked = [
        {"input_ids": row["input_ids"], "completion_mask": [0, 0] + [1] * (len(row["input_ids"]) - 2)} for row in rows
    ]
    for options in ({}, {"completion_only_loss": True}):
        ours = tokenize(masked, None, max_length=12, **options)
        assert lists(ours) == trl_lists(masked, tokenizer, max_length=12, **options)


@pytest.mark.parametrize(("family", "turns"), [("qwen3", 1), ("llama3", 3), ("phi3", 3), ("gemma", 3)])
def test_turns_found_without_generation_are_those_of_trls_training_template(family, turns):
    """TRL ships pairs of templates, as released and with {% generation %}: the first must give the second's mask."""
    from importlib.resources import files

    folder = files("trl") / "chat_templates"
    released, training = (folder / f"{family}{kind}.jinja" for kind in ("", "_training"))
    rng = np.random.default_rng(0)
    rows = [{"messages": conversation(rng, turns)} for _ in range(20)]
    ours, theirs = (
        tokenize(rows, make_tokenizer(template.read_text()), max_length=None, assistant_only_loss=True)
        for template in (released, training)
    )
    assert "generation" not in released.read_text().replace("add_generation_prompt", "")
    assert lists(ours) == lists(theirs)


def test_smollm2_template_trains_on_replies_alone(tokenizer):
    messages = [
        {"role": "user", "content": "why blue"},
        {"role": "assistant", "content": "air scatters"},
        {"role": "user", "content": "and red"},
        {"role": "assistant", "content": " long waves "},
    ]
    examples = tokenize([{"messages": messages}], tokenizer, max_length=512, assistant_only_loss=True)
    assert supervised_text(examples, 0, tokenizer) == "air scatters<|im_end|>\n long waves <|im_end|>\n"
    assert tokenizer.decode(examples[0][0]).startswith(
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM"
    )
    with_generation = tokenize(
        [{"messages": [{"role": "system", "content": "x"}, *messages]}],
        make_tokenizer(GENERATION),
        max_length=512,
        assistant_only_loss=True,
    )
    assert supervised_text(with_generation, 0, tokenizer) == supervised_text(examples, 0, tokenizer)


def test_a_template_that_rewrites_earlier_turns_is_refused():
    only_last = "{% for m in messages %}[{{ m.role }}]{% if loop.last %}<think>{% endif %}{{ m.content }}{% endfor %}"
    turns = conversation(np.random.default_rng(0), 2)
    tokenizer = make_tokenizer(only_last + "{% if add_generation_prompt %}[assistant]{% endif %}")
    with pytest.raises(ValueError, match=r"row 0: up to message 1 the chat template writes '<think>.*generation"):
        tokenize([{"messages": turns}], tokenizer, max_length=None, assistant_only_loss=True)
    with pytest.raises(ValueError, match="row 0: the first message is the assistant's"):
        tokenize([{"messages": turns[1:]}], make_tokenizer(SMOLLM2), max_length=None, assistant_only_loss=True)


def test_sharegpt_and_formatting_func(tokenizer):
    messages = [{"role": "user", "content": "why"}, {"role": "assistant", "content": "because"}]
    sharegpt = [{"from": "human", "value": "why"}, {"from": "gpt", "value": "because", "weight": None}]
    rows = [{"messages": messages}, {"conversations": sharegpt}, {"messages": None, "conversations": messages}]
    first, *others = lists(tokenize(rows, tokenizer, max_length=None))
    assert others == [first, first]
    formatted = tokenize(
        [{"a": "the", "b": " sky"}], tokenizer, max_length=None, formatting_func=lambda r: r["a"] + r["b"]
    )
    assert lists(formatted) == lists(
        tokenize([{"body": "the sky"}], tokenizer, max_length=None, dataset_text_field="body")
    )


def test_kinds_may_be_mixed_and_keep_their_order(tokenizer):
    rng = np.random.default_rng(0)
    kinds = [text_rows(rng), pair_rows(rng), chat_rows(rng), chat_pair_rows(rng), [{"input_ids": [5, 6, 7]}]]
    rows = [row for rows in kinds for row in rows]
    rows = [rows[i] for i in rng.permutation(len(rows))] * 10  # more than one chunk
    alone = [lists(tokenize([row], tokenizer, max_length=None))[0] for row in rows[: len(rows) // 10]]
    assert lists(tokenize(rows, tokenizer, max_length=None)) == alone * 10


# --- nothing is lost silently -----------------------------------------------------------------------------------------


def test_the_report_counts_every_row_and_token(caplog):
    rows = [
        {"input_ids": [1, 2, 3]},
        {"input_ids": [1, 2, 3, 4, 5, 6]},  # two tokens too long
        {"input_ids": [1, 2, 3, 4, 5], "labels": [IGNORE] * 4 + [5]},  # its only label is cut away
        {"input_ids": [1, 2], "labels": [1, IGNORE]},  # a label that nothing could predict
        {"input_ids": [7]},
        {"input_ids": []},
    ]
    examples = tokenize(rows, None, max_length=4)
    report = examples.report
    assert report is not None and lists(examples) == [([1, 2, 3], [-100, 2, 3]), ([1, 2, 3, 4], [-100, 2, 3, 4])]
    assert (report.rows, report.examples, report.tokens, report.supervised_tokens) == (6, 2, 7, 5)
    assert (report.truncated_rows, report.truncated_tokens, report.dropped_rows) == (2, 3, 0)
    assert (report.masked_rows, report.masked_by_truncation) == (4, 1)
    assert caplog.messages == list(report.warnings) and len(report.warnings) == 2
    assert str(report).startswith("2 of 6 rows are trained on: 7 tokens, 5 of them supervised; 2 rows were cut")

    report = tokenize(rows, None, max_length=4, truncation_mode="drop").report
    assert report is not None and (report.examples, report.dropped_rows, report.dropped_tokens) == (1, 2, 11)
    assert report.rows == report.examples + report.dropped_rows + report.masked_rows

    report = tokenize(rows, None, max_length=4, truncation_mode="keep_end").report
    assert report is not None and (report.examples, report.masked_by_truncation) == (3, 0)


def test_a_data_set_without_supervision_is_an_error(tokenizer):
    user = [{"messages": [{"role": "user", "content": "x"}]}]
    with pytest.raises(ValueError, match="1 have no assistant turn that the chat template marks: check the roles"):
        tokenize(user, tokenizer, max_length=99, assistant_only_loss=True)
    with pytest.raises(ValueError, match="1 lost all their supervised tokens when cut to max_length=3: raise"):
        tokenize([{"prompt": "the sky is blue", "completion": " and"}], tokenizer, max_length=3)
    with pytest.raises(ValueError, match="2 are longer than max_length=2"):
        tokenize([{"text": "the sky is"}] * 2, tokenizer, max_length=2, truncation_mode="drop")
    with pytest.raises(ValueError, match="1 have only labels of -100"):
        tokenize([{"input_ids": [1, 2], "labels": [IGNORE, IGNORE]}], None, max_length=None)


def test_a_prompt_that_is_no_prefix_is_counted():
    tokenizer = make_tokenizer(None)
    rows = [{"prompt": "the sky is bl", "completion": "ue"}, {"prompt": "the sky", "completion": " is blue"}]
    report = tokenize(rows, tokenizer, max_length=None).report
    assert report is not None and report.diverging_prompts == 1 and "in 1 rows the tokens of the prompt" in str(report)


# --- packing ----------------------------------------------------------------------------------------------------------


def random_examples(n: int, most: int, seed: int = 0) -> Examples:
    rng = np.random.default_rng(seed)
    ids = [rng.integers(1, 1000, rng.integers(2, most + 1)) for _ in range(n)]
    return Examples.from_lists(ids, [np.where(rng.random(len(i)) < 0.3, IGNORE, i) for i in ids])


@pytest.mark.parametrize("strategy", ["bfd", "bfd_split"])
def test_packing_is_trls_and_so_are_its_batches(tokenizer, strategy):
    examples = random_examples(300, 64 if strategy == "bfd" else 200)
    given = [{"input_ids": ids, "labels": labels} for ids, labels in lists(examples)]
    # max_length None: our rows come tokenised, and TRL is to pack what pack() is given
    trainer = trl_trainer(given, tokenizer, max_length=64, packing=True, packing_strategy=strategy)
    theirs = trainer.train_dataset
    rows = pack(examples, 64, strategy, pad_token_id=7)
    batch = rows.batch(np.arange(len(rows)))
    assert len(rows) == len(theirs)
    for i, row in enumerate(theirs):
        n = len(row["input_ids"])
        collated = {
            key: value[0].tolist() for key, value in trainer.data_collator([row]).items() if np.ndim(value) == 2
        }
        assert batch["input_ids"][i, :n].tolist() == collated["input_ids"]
        assert batch["labels"][i, :n].tolist() == collated["labels"]
        assert batch["positions"][i, :n].tolist() == collated["position_ids"]
        assert (batch["segment_ids"][i, :n] - 1).tolist() == collated["seq_idx"]
        for key, filler in (("input_ids", 7), ("labels", IGNORE), ("positions", 0), ("segment_ids", 0)):
            assert (batch[key][i, n:] == filler).all()


@pytest.mark.parametrize("strategy", ["bfd", "bfd_split", "wrapped"])
def test_packing_keeps_every_token_and_predicts_within_documents(strategy):
    examples = random_examples(200, 64 if strategy == "bfd" else 300)
    rows = pack(examples, 64, strategy)
    batch = rows.batch(range(len(rows)))
    real = batch["segment_ids"] > 0
    assert {key: (array.shape, array.dtype) for key, array in batch.items()} == dict.fromkeys(
        ("input_ids", "labels", "positions", "segment_ids"), ((len(rows), 64), np.dtype(np.int32))
    )
    assert sorted(batch["input_ids"][real]) == sorted(examples.input_ids)
    assert rows.density == real.mean() > 0.9
    starts = (batch["positions"] == 0) & real
    assert (batch["labels"][starts] == IGNORE).all()
    assert (np.diff(batch["segment_ids"], axis=1, prepend=0)[starts] == 1).all()
    kept = batch["labels"][real & ~starts] != IGNORE
    assert kept.sum() <= (examples.labels != IGNORE).sum()
    if strategy == "bfd":
        assert kept.sum() == (examples.labels != IGNORE).sum()
    if strategy == "wrapped":
        np.testing.assert_array_equal(batch["input_ids"][real], examples.input_ids)
        assert real[:-1].all()


def test_packing_a_hundred_thousand_documents_takes_no_quadratic_time():
    lengths = np.random.default_rng(0).integers(2, 60_000, 100_000)
    start = time.perf_counter()
    rows = _best_fit_decreasing(lengths, 131_072)
    assert time.perf_counter() - start < 10  # a fifth of a second when idle; a quadratic search takes minutes
    assert sum(map(len, rows)) == 100_000 and len(rows) < 1.01 * lengths.sum() / 131_072


def test_a_document_longer_than_its_row_is_refused():
    examples = Examples.from_lists([[1, 2], [1, 2, 3, 4, 5]])
    for plan in (lambda: pack(examples, 4), lambda: pad(examples, 4, pad_token_id=0)):
        with pytest.raises(ValueError, match=r"1 documents are longer than the row of 4 tokens \(document 1 has 5\)"):
            plan()
    with pytest.raises(ValueError, match="packing strategy must be one of"):
        pack(examples, 8, "ffd")
    with pytest.raises(ValueError, match="none that is empty"):
        Examples.from_lists([[1], []])


def test_padding():
    examples = Examples.from_lists([[5, 6, 7], [8, 9]], [[5, -100, 7], [8, 9]])
    batch = pad(examples, pad_token_id=1, pad_to_multiple_of=4).batch([1, 0, -1])
    assert batch["input_ids"].tolist() == [[8, 9, 1, 1], [5, 6, 7, 1], [1, 1, 1, 1]]
    assert batch["labels"].tolist() == [[-100, 9, -100, -100], [-100, -100, 7, -100], [-100] * 4]
    assert batch["positions"].tolist() == [[0, 1, 0, 0], [0, 1, 2, 0], [0] * 4]
    assert batch["segment_ids"].tolist() == [[1, 1, 0, 0], [1, 1, 1, 0], [0] * 4]
    assert pad(examples, pad_token_id=1).length == 3 and pad(examples, 6, pad_token_id=1).length == 6


# --- batches ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rows():
    return pad(Examples.from_lists([[i, i] for i in range(1, 11)]), pad_token_id=0)


def first_ids(batches) -> list[list[int]]:
    return [batch["input_ids"][..., 0].ravel().tolist() for batch in batches]


def test_every_row_once_an_epoch_in_an_order_that_the_seed_decides(rows):
    batches = first_ids(BatchIterator(rows, 4, seed=3, epochs=2))
    assert [len(batch) for batch in batches] == [4] * 6
    first, second = batches[:3], batches[3:]
    assert sorted(sum(first, [])) == sorted(sum(second, [])) == [0, 0, *range(1, 11)]
    assert first != second
    assert batches == first_ids(BatchIterator(rows, 4, seed=3, epochs=2))
    assert batches != first_ids(BatchIterator(rows, 4, seed=4, epochs=2))
    # the very order, so that a change of numpy or of platform that moves it is noticed
    assert BatchIterator(rows, 4, seed=3).order(0).tolist() == [6, 1, 8, 5, 2, 7, 9, 4, 3, 0]
    assert sum(first_ids(BatchIterator(rows, 4, shuffle=False, epochs=1)), []) == [*range(1, 11), 0, 0]


def test_last_batch_and_accumulation(rows):
    filled = list(BatchIterator(rows, 4, epochs=1))[-1]
    assert filled["labels"][2:].tolist() == [[-100, -100]] * 2 and not filled["segment_ids"][2:].any()
    dropping = BatchIterator(rows, 4, drop_last=True, epochs=1)
    assert len(dropping) == len(list(dropping)) == 2
    accumulating = BatchIterator(rows, 2, gradient_accumulation_steps=3, seed=5, epochs=1)
    shapes = [{array.shape for array in batch.values()} for batch in accumulating]
    assert shapes == [{(3, 2, 2)}] * 2
    accumulating = BatchIterator(rows, 2, gradient_accumulation_steps=3, seed=5, epochs=1)
    assert first_ids(accumulating) == first_ids(BatchIterator(rows, 6, seed=5, epochs=1))
    assert next(BatchIterator(rows, 2, gradient_accumulation_steps=1))["labels"].shape == (1, 2, 2)
    with pytest.raises(ValueError, match="10 rows do not fill one step of 12"):
        BatchIterator(rows, 4, gradient_accumulation_steps=3, drop_last=True)
    with pytest.raises(ValueError, match="must be at least 1; found 0"):
        BatchIterator(rows, 0)


@pytest.mark.parametrize("steps", range(7))
def test_resume_is_exact(rows, steps):
    whole = first_ids(BatchIterator(rows, 4, seed=1, epochs=2))
    started = BatchIterator(rows, 4, seed=1, epochs=2)
    for _ in range(steps):
        next(started)
    resumed = BatchIterator(rows, 4, seed=1, epochs=2)
    resumed.set_state(json.loads(json.dumps(started.get_state())))
    assert first_ids(resumed) == whole[steps:]


def test_resume_on_other_data_is_refused(rows):
    state = BatchIterator(rows, 4, seed=1).get_state()
    with pytest.raises(ValueError, match="saved run had seed 1, now 2; rows_per_step 4, now 8"):
        BatchIterator(rows, 8, seed=2).set_state(state)
    others = pad(Examples.from_lists([[i, i + 1] for i in range(1, 11)]), pad_token_id=0)
    with pytest.raises(ValueError, match="fingerprint"):
        BatchIterator(others, 4, seed=1).set_state(state)
