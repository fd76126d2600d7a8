"""Tokenizers of checkpoints as they are, repaired; and tokens that are new to a model."""

import json
import logging
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
import transformers
from helpers import VOCAB, make_checkpoint, random_ids, randomise_adapters, relative_error, smollm2_path
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

from jaxlora import FastLanguageModel, sharding
from jaxlora.converters.checkpoint import open_tokenizer
from jaxlora.converters.gguf import GGUFSource
from jaxlora.vocabulary import add_new_tokens, repair_tokenizer, resize_vocabulary

pytestmark = pytest.mark.filterwarnings("ignore:.*has no tokenizer files:UserWarning")

WORDS = ["the", "red", "fox", "x", "y", "z"]


def make_tokenizer(added=(), **special):
    """Six words, then the special tokens in the order given, then the added ones."""
    words = {word: i for i, word in enumerate([*WORDS, "<unk>"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    special = {"eos_token": "</s>", **special}
    made.add_special_tokens({name: token for name, token in special.items() if token is not None})
    made.add_tokens([AddedToken(token, special=True) for token in added])
    return made


def load(folder, **options):
    return FastLanguageModel.from_pretrained(folder, **{"dtype": "float32", "load_in_16bit": True, **options})


def table(model):
    return np.asarray(model.model.embed_tokens.weight.get_value())


# ---- The pad token ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "added, special, expected",
    [
        (["<pad>"], {}, "<pad>"),  # missing
        (["<pad>"], {"pad_token": "</s>"}, "<pad>"),  # the end of a text
        (["<fim_pad>", "[PAD]"], {}, "[PAD]"),  # the order is that of the names, not of the ids
        (["<|reserved_token_0|>", "<|reserved_token_9|>", "<other>"], {}, "<|reserved_token_9|>"),
        (["<|placeholder1|>", "<|finetune_right_pad_id|>"], {}, "<|finetune_right_pad_id|>"),
        (["<|my_padding|>", "keypad", "<other>"], {}, "<|my_padding|>"),
        (["<|endoftext|>", "<|vision_pad|>"], {"eos_token": "<|endoftext|>"}, "<|vision_pad|>"),
        (["keypad"], {"unk_token": "<unk>"}, "<unk>"),
        (["<other>"], {}, "<｜PAD▁TOKEN｜>"),
    ],
)  # fmt: skip
def test_what_stands_in_for_a_pad_token(added, special, expected, caplog):
    caplog.set_level(logging.INFO, "jaxlora.vocabulary")
    tokenizer = make_tokenizer(added, **special)
    repair_tokenizer(tokenizer, {}, rows=50)
    assert tokenizer.pad_token == expected and tokenizer.pad_token_id < 50
    assert tokenizer.padding_side == "left" and f"the pad token is {expected} now" in caplog.text
    batch = tokenizer(["the fox", "the red fox"], padding=True)
    assert batch["input_ids"] == [[tokenizer.pad_token_id, 0, 2], [0, 1, 2]] and batch["attention_mask"][0] == [0, 1, 1]


@pytest.mark.parametrize("pad", ["<|vision_pad|>", "the"])
def test_a_pad_token_of_its_own_stays(pad):
    tokenizer = make_tokenizer(["<pad>"], pad_token=pad)
    repair_tokenizer(tokenizer, {"eos_token_id": [7, tokenizer.pad_token_id]}, rows=50)
    assert tokenizer.pad_token == pad


def test_a_pad_token_that_the_embedding_has_no_row_of():
    tokenizer = make_tokenizer(["<other>", "[PAD]"])
    tokenizer.pad_token = "[PAD]"
    assert tokenizer.pad_token_id == 9
    repair_tokenizer(tokenizer, {"pad_token_id": 3}, rows=9)
    assert tokenizer.pad_token == "x"  # of config.json, the last resort


def test_another_end_of_a_text_is_no_pad_token():
    tokenizer = make_tokenizer(["<pad>", "[MASK]"])
    repair_tokenizer(tokenizer, {"eos_token_id": [7, 8]}, rows=50)
    assert tokenizer.pad_token == "[MASK]"


def test_a_vocabulary_without_a_token_to_spare():
    tokenizer = make_tokenizer([], pad_token="</s>")
    with pytest.warns(UserWarning, match="pad token is '</s>', and its vocabulary has no other token to spare and the"):
        repair_tokenizer(tokenizer, {"pad_token_id": 7}, rows=len(tokenizer))
    assert tokenizer.pad_token == "</s>"


# ---- The generation prompt -------------------------------------------------------------------------------------------

_TURNS = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
_PROMPT = "{% if add_generation_prompt %}<assistant>{% endif %}"


@pytest.mark.parametrize(
    "template, expected",
    [
        (_TURNS, _TURNS + '{% if add_generation_prompt %}{{ "<assistant>" }}{% endif %}'),
        (_TURNS + _PROMPT, _TURNS + _PROMPT),
        # The answer follows the question at once, and nothing opens it.
        ("{% for m in messages %}{{ m.content }} {% endfor %}", "{% for m in messages %}{{ m.content }} {% endfor %}"),
        ("{{ raise_exception('no') }}", "{{ raise_exception('no') }}"),
        (None, None),
    ],
)
def test_a_template_opens_the_turn_of_the_assistant_when_asked_to(template, expected):
    tokenizer = make_tokenizer(["<pad>"])
    tokenizer.chat_template = template
    repair_tokenizer(tokenizer, {}, rows=50)
    assert tokenizer.chat_template == expected
    if template == _TURNS:
        messages = [{"role": "user", "content": "fox"}]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert text == "<user>fox</s><assistant>"


# ---- Through the door ------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    make_checkpoint("llama", tmp_path / "base")
    make_tokenizer(["<|reserved_special_token_0|>"]).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def test_fix_tokenizer(folder):
    model, tokenizer = load(folder)
    assert (tokenizer.pad_token, tokenizer.padding_side) == ("<|reserved_special_token_0|>", "left")
    batch = tokenizer(["the fox", "the red fox"], padding=True, return_tensors="np")
    padded = np.asarray(model.generate(**batch, max_new_tokens=4))
    alone = np.asarray(model.generate(tokenizer(["the fox"], return_tensors="np")["input_ids"], max_new_tokens=4))
    assert padded[0, 1:].tolist() == alone[0].tolist()
    _, as_it_is = load(folder, fix_tokenizer=False)
    assert (as_it_is.pad_token, as_it_is.padding_side) == (None, "right")


def test_a_tokenizer_that_is_code_of_its_own_is_not_run(folder):
    (folder / "tokenization_mine.py").write_text("raise SystemExit('this was run')")
    path = folder / "tokenizer_config.json"
    mine = {"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": ["tokenization_mine.Mine", None]}}
    path.write_text(json.dumps({**json.loads(path.read_text()), **mine}))
    _, tokenizer = load(folder)
    assert tokenizer("the red fox")["input_ids"] == [0, 1, 2]  # out of tokenizer.json
    (folder / "tokenizer.json").unlink()
    with pytest.warns(UserWarning) as warned:
        assert load(folder)[1] is None
    assert "the tokenizer is code of its own (auto_map), which is never run here" in str(warned[0].message)


@pytest.mark.parametrize("model_type", ["llama", "mistral", "gemma2", "qwen2", "qwen3", "falcon"])
@pytest.mark.parametrize("stated", ["PreTrainedTokenizerFast", "TokenizersBackend", None])
def test_a_tokenizer_is_what_transformers_makes_of_it(tmp_path, model_type, stated):
    make_tokenizer(added=["<extra>"], pad_token="<pad>").save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    path = tmp_path / "tokenizer_config.json"
    config = {k: v for k, v in json.loads(path.read_text()).items() if k != "tokenizer_class"}
    path.write_text(json.dumps(config | ({} if stated is None else {"tokenizer_class": stated})))
    ours, theirs = open_tokenizer(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert type(ours) is type(theirs)
    assert ours.special_tokens_map == theirs.special_tokens_map and ours.get_vocab() == theirs.get_vocab()
    text = "the red fox <extra> x</s>"
    assert ours(text)["input_ids"] == theirs(text)["input_ids"]


def test_a_tokenizer_that_is_its_file_alone_takes_no_torch(folder):
    """As most of Llama's do. torch takes seconds, and `AutoTokenizer` imports it wherever it is installed."""
    code = "import sys; from jaxlora import FastLanguageModel as F; F.from_pretrained(sys.argv[1])"
    code += "; print('torch' in sys.modules)"
    run = subprocess.run([sys.executable, "-P", "-c", code, folder], capture_output=True, text=True)
    assert run.stdout == "False\n", run.stderr


def test_the_tokenizer_of_smollm2():
    source = GGUFSource(smollm2_path())
    tokenizer = source.tokenizer()
    repair_tokenizer(tokenizer, source.config(), 49152)
    assert tokenizer.pad_token_id != tokenizer.eos_token_id and tokenizer.pad_token_id < 49152
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert text.endswith("<|im_start|>assistant\n")


# ---- More rows -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "llama-tied"])
def test_more_rows(name, tmp_path):
    theirs = make_checkpoint(name, tmp_path)
    model, _ = load(tmp_path, resize_model_vocab=VOCAB + 400, random_state=1)
    before = theirs.get_input_embeddings().weight.detach().numpy()
    theirs.resize_token_embeddings(VOCAB + 400)
    after = table(model)
    assert model.config.vocab_size == model.hf_config["vocab_size"] == VOCAB + 400
    assert np.array_equal(after[:VOCAB], before)
    head = theirs.get_output_embeddings().weight.detach().numpy()[:VOCAB]
    weight = after if name == "llama-tied" else np.asarray(model.lm_head.weight.get_value())
    for rows, old in ((after, before), (weight, head)):
        new = rows[VOCAB:]
        np.testing.assert_allclose(new, np.broadcast_to(old.mean(0), new.shape), atol=1e-4)
        # 400 draws estimate a standard deviation within 15 per cent, four of its own.
        np.testing.assert_allclose(new.std(0), np.sqrt(1e-9) * old.std(0), rtol=0.15)
    ids = random_ids(2, 9)
    with torch.no_grad():
        expected = theirs(torch.tensor(ids).long()).logits[..., :VOCAB]
    assert relative_error(model(jnp.asarray(ids))[..., :VOCAB], expected) < 5e-5
    again, _ = load(tmp_path, resize_model_vocab=VOCAB + 400, random_state=1)
    other, _ = load(tmp_path, resize_model_vocab=VOCAB + 400, random_state=2)
    assert np.array_equal(table(again), after) and not np.array_equal(table(other), after)


def test_rows_are_not_taken_away(folder):
    with pytest.raises(ValueError, match="resize_model_vocab=90 would cut off rows: the model has 97"):
        load(folder, resize_model_vocab=90)
    model, _ = load(folder, resize_model_vocab=VOCAB)
    assert model.config.vocab_size == VOCAB
    FastLanguageModel.get_peft_model(model, r=2, target_modules=["q_proj"])
    with pytest.raises(ValueError, match="has adapters already: give it new tokens before get_peft_model"):
        resize_vocabulary(model, VOCAB + 1, jax.random.key(0))


def test_inputs_of_layers_get_no_rows(tmp_path):
    make_checkpoint("gemma4_text", tmp_path)
    message = "would need 98 rows of embed_tokens_per_layer, which has 97 and is not made longer"
    with pytest.raises(ValueError, match=message):
        load(tmp_path, resize_model_vocab=VOCAB + 1)


def test_more_rows_where_the_table_lies_elsewhere(tmp_path):
    make_checkpoint("llama", tmp_path, vocab_size=96)
    plain, _ = load(tmp_path, resize_model_vocab=101)
    hosted, _ = load(tmp_path, resize_model_vocab=101, offload_embedding=True)
    sharded, _ = load(tmp_path, resize_model_vocab=101, device_map=sharding.make_mesh(fsdp=2, tensor=2))
    assert hosted.model.embed_tokens.weight.get_value().sharding.memory_kind == "pinned_host"
    assert len(sharded.lm_head.weight.get_value().sharding.device_set) == 4
    for other in (hosted, sharded):
        np.testing.assert_allclose(table(other), table(plain), rtol=1e-5, atol=1e-7)


# ---- New tokens ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "llama-tied"])
@pytest.mark.parametrize("method, share", [("mean", 0.0), ("interpolation", 0.25)])
def test_new_tokens(name, method, share, tmp_path):
    theirs = make_checkpoint(name, tmp_path)
    with torch.no_grad():
        theirs.get_input_embeddings().weight[90:] = 0  # never trained
    theirs.save_pretrained(tmp_path)
    tokenizer = make_tokenizer([f"<extra_{i}>" for i in range(VOCAB - 10)], pad_token="<pad>")
    tokenizer.save_pretrained(tmp_path)
    model, tokenizer = load(tmp_path)
    assert len(tokenizer) == VOCAB - 1  # the first new token has a row to spare, the others have none
    old = [
        theirs.get_input_embeddings().weight.detach().numpy(),
        theirs.get_output_embeddings().weight.detach().numpy(),
    ]
    add_new_tokens(model, tokenizer, ["redfox", "the red", "<tool>"], method, interpolation=0.25)
    ids = tokenizer.convert_tokens_to_ids(["redfox", "the red", "<tool>"])
    assert ids == [VOCAB - 1, VOCAB, VOCAB + 1] and model.config.vocab_size == len(tokenizer) == VOCAB + 2
    assert tokenizer("x the red y")["input_ids"] == [3, VOCAB, 4]
    head = table(model) if name == "llama-tied" else np.asarray(model.lm_head.weight.get_value())
    for new, before in zip((table(model), head), old, strict=True):
        mean = before[:90].mean(0)
        pieces = [before[[6]], before[[0, 1]], before[[6, 6, 6]]]  # 6 is the unknown token; "<", "tool" and ">" are
        expected = [mean + share * (piece.mean(0) - mean) for piece in pieces]
        np.testing.assert_allclose(new[ids], expected, rtol=1e-4, atol=1e-6)
        assert np.array_equal(new[: VOCAB - 1], before[: VOCAB - 1])


def test_new_tokens_that_are_none(folder):
    model, tokenizer = load(folder)
    before = table(model)
    with pytest.warns(UserWarning, match=r"the tokenizer has \['fox'\] already: they are left as they are"):
        add_new_tokens(model, tokenizer, ["fox"])
    assert np.array_equal(table(model), before)
    for tokens, options, message in [
        ([], {}, r"at least one token, found \[\]"),
        ("fox", {}, "a list of at least one token, found 'fox'"),
        (["cat"], {"method": "zeros"}, "method 'zeros' is not"),
        (["cat"], {"interpolation": 1.5}, "interpolation is a share, from 0 to 1; found 1.5"),
    ]:
        with pytest.raises(ValueError, match=message):
            add_new_tokens(model, tokenizer, tokens, **options)


def test_a_fully_trained_model_with_new_tokens_loads_in_transformers(folder, tmp_path):
    model, tokenizer = load(folder, load_in_16bit=False, full_finetuning=True)
    add_new_tokens(model, tokenizer, [f"<tool_{i}>" for i in range(100)])
    model.save_pretrained(tmp_path / "out", tokenizer)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="eager")
    ids = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")("the <tool_99> fox", return_tensors="pt")
    assert theirs.config.vocab_size == len(tokenizer) and ids["input_ids"][0].tolist() == [0, len(tokenizer) - 1, 2]
    with torch.no_grad():
        expected = theirs(**ids).logits
    assert relative_error(model(jnp.asarray(ids["input_ids"].numpy(), jnp.int32)), expected) < 5e-5


@pytest.mark.parametrize("name", ["llama", "llama-tied"])
def test_an_adapter_brings_its_new_tokens_along(name, tmp_path):
    make_checkpoint(name, tmp_path / "base")
    make_tokenizer([f"<extra_{i}>" for i in range(VOCAB - 10)], pad_token="<pad>").save_pretrained(tmp_path / "base")
    model, tokenizer = load(tmp_path / "base")
    add_new_tokens(model, tokenizer, ["<tool>", "<call>", "</call>"])
    FastLanguageModel.get_peft_model(model, r=4, target_modules=["q_proj", "down_proj"])
    tables = {"llama": ("embed_tokens", "lm_head"), "llama-tied": ("embed_tokens",)}[name]
    assert model.lora_config.modules_to_save == tables
    assert model.lora_config.ensure_weight_tying is (name == "llama-tied")
    learning = model.get_nb_trainable_parameters()[0]
    assert learning == sum(4 * sum(p) for p in ((48, 60), (80, 48))) * 3 + len(tables) * (VOCAB + 2) * 48

    randomise_adapters(model)
    for module in (model.model.embed_tokens, model.lm_head)[: len(tables)]:
        copy = module.trained_weight.value
        copy.set_value(copy.get_value() + 0.1 * jax.random.normal(jax.random.key(1), copy.get_value().shape))
    ids = np.concatenate([random_ids(1, 8), [[VOCAB - 1, VOCAB, VOCAB + 1]]], axis=1)
    expected = np.asarray(model(jnp.asarray(ids, jnp.int32)))
    assert expected.shape[-1] == VOCAB + 2

    model.save_pretrained(tmp_path / "adapter", tokenizer)
    again, tokenizer_again = load(tmp_path / "adapter")
    assert again.config.vocab_size == len(tokenizer_again) == VOCAB + 2
    assert relative_error(again(jnp.asarray(ids, jnp.int32)), expected) < 1e-5
    assert again.get_nb_trainable_parameters()[0] == learning
    theirs = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", attn_implementation="eager")
    with torch.no_grad():
        assert relative_error(theirs(torch.tensor(ids).long()).logits, expected) < 5e-5

    report = model.save_pretrained_merged(tmp_path / "merged", tokenizer)
    assert report.export_error < 1e-5 * report.largest_logit
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", attn_implementation="eager")
    assert merged.config.vocab_size == VOCAB + 2 and merged.config.tie_word_embeddings is (name == "llama-tied")
    with torch.no_grad():
        assert relative_error(merged(torch.tensor(ids).long()).logits, expected) < 5e-5


@pytest.mark.parametrize("name", ["llama", "llama-tied"])
def test_an_adapter_of_peft_with_rows_that_do_not_learn_there(name, tmp_path):
    theirs = make_checkpoint(name, tmp_path / "base")
    theirs.name_or_path = theirs.config._name_or_path = str(tmp_path / "base")
    theirs.resize_token_embeddings(VOCAB + 3)
    with torch.no_grad():
        theirs.get_input_embeddings().weight[VOCAB:] += 0.3
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    adapted = peft.get_peft_model(theirs, config)
    with pytest.warns(UserWarning, match="Setting `save_embedding_layers` to `True`"):
        adapted.save_pretrained(tmp_path / "adapter")
    model, _ = load(tmp_path / "adapter")
    ids = np.concatenate([random_ids(1, 8), [[VOCAB, VOCAB + 2]]], axis=1)
    with torch.no_grad():
        assert relative_error(model(jnp.asarray(ids, jnp.int32)), adapted(torch.tensor(ids).long()).logits) < 5e-5
    model.save_pretrained(tmp_path / "again")
    again, _ = load(tmp_path / "again")
    assert np.array_equal(again(jnp.asarray(ids, jnp.int32)), model(jnp.asarray(ids, jnp.int32)))
