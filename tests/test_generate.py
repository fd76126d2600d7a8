"""Generation against transformers, PEFT and the model's own logits, token for token in float32."""

import collections
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import scipy.stats
import torch
import transformers
from flax import nnx
from helpers import (
    TINY,
    VOCAB,
    load_folder,
    make_checkpoint,
    make_pair,
    marked,
    random_ids,
    relative_error,
    smollm2_path,
)

from jaxlora import lora, quant
from jaxlora.config import LoraConfig, QuantConfig
from jaxlora.converters.gguf import GGUFSource
from jaxlora.converters.huggingface import SafetensorsSource, load_model
from jaxlora.generate import Sampling, _decode, _positive, _prefill, filter_scores, generate
from jaxlora.kernels import api
from jaxlora.model import CausalLM

LENGTHS = (3, 10, 6)  # of the prompts in a batch
NEW = 30


def left_padded(lengths=LENGTHS, seed=0):
    """Random prompts of no special tokens, padded with 1, as ids and mask [len(lengths), longest]."""
    ids = np.maximum(random_ids(len(lengths), max(lengths), seed), 3)
    mask = (np.arange(max(lengths)) >= max(lengths) - np.asarray(lengths)[:, None]).astype(np.int32)
    return np.where(mask, ids, 1), mask


def reference(theirs, ids, mask=None, **options):
    """What transformers generates greedily."""
    mask = np.ones_like(ids) if mask is None else mask
    options = {"pad_token_id": 1, "max_new_tokens": NEW, **options}
    with torch.no_grad():
        out = theirs.generate(
            torch.as_tensor(ids), attention_mask=torch.as_tensor(mask), do_sample=False, **options
        )  # fmt: skip
    return out.numpy()


def with_window(model, window=64):
    """The tiny models' window, where the native one is shorter and dynamic scaling reaches beyond it."""
    model.max_seq_length = window
    return model


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return make_pair("llama", tmp_path_factory.mktemp("llama"))


# ---- against the references ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [pytest.param(name, marks=marks) for name, marks in marked(TINY)])
def test_greedy_tokens_equal_transformers_and_teacher_forcing(name, tmp_path):
    theirs, model = make_pair(name, tmp_path)
    ids, mask = left_padded()
    options = dict(max_new_tokens=NEW, eos_token_id=VOCAB, pad_token_id=1)
    found = generate(with_window(model), ids, attention_mask=mask, **options)
    assert found.dtype == jnp.int32
    assert found.shape == (3, 10 + NEW)
    if model.config.rope.rope_type != "longrope":  # which transformers begins with short factors, and we with long ones
        # The stop token is never drawn, so every row is as long as it can be.
        np.testing.assert_array_equal(found, reference(theirs, ids, mask, eos_token_id=VOCAB))
    if model.config.rope.rope_type != "dynamic":  # whose cached keys keep older frequencies
        segments = np.pad(mask, ((0, 0), (0, NEW)), constant_values=1)
        logits = np.asarray(model(found, segment_ids=jnp.asarray(segments)))
        np.testing.assert_array_equal(found[:, 10:], logits[:, 9:-1].argmax(-1))


def test_stop_tokens_and_padding_equal_transformers(llama):
    theirs, model = llama
    ids, mask = left_padded()
    free = reference(theirs, ids, mask, eos_token_id=VOCAB)[:, 10:]
    stops = [int(free[0, 4]), int(free[1, 12])]
    for eos in (stops, stops[0]):
        expected = reference(theirs, ids, mask, eos_token_id=eos)
        found = generate(model, ids, attention_mask=mask, max_new_tokens=NEW, eos_token_id=eos, pad_token_id=1)
        np.testing.assert_array_equal(found, expected)
    assert (np.asarray(found)[0, 15:] == 1).all()


def test_ends_with_the_longest_row(llama):
    _, model = llama
    ids = random_ids(1, 5)
    free = np.asarray(generate(model, ids, max_new_tokens=NEW, eos_token_id=[]))
    stop = int(free[0, 5 + 7])
    first = int(np.flatnonzero(free[0, 5:] == stop)[0])
    np.testing.assert_array_equal(generate(model, ids, max_new_tokens=NEW, eos_token_id=stop), free[:, : 5 + first + 1])
    np.testing.assert_array_equal(generate(model, ids, max_new_tokens=1, eos_token_id=[]), free[:, :6])


def test_special_tokens_come_from_the_model(tmp_path):
    theirs = make_checkpoint("llama", tmp_path)
    ids, mask = left_padded()
    free = reference(theirs, ids, mask, eos_token_id=VOCAB)[:, 10:]
    theirs.config.eos_token_id, theirs.config.pad_token_id = [int(free[0, 4]), int(free[2, 9])], 1
    theirs.config.save_pretrained(tmp_path)
    model = load_folder(tmp_path)
    expected = reference(theirs, ids, mask, eos_token_id=theirs.config.eos_token_id)
    np.testing.assert_array_equal(generate(model, ids, attention_mask=mask, max_new_tokens=NEW), expected)
    # The pad token of the model marks padding where there is no mask, as in transformers.
    np.testing.assert_array_equal(generate(model, ids, max_new_tokens=NEW), expected)


def test_adapters_equal_peft(tmp_path, key):
    theirs, model = make_pair("qwen2", tmp_path)
    lora.add_adapters(model, LoraConfig(r=4, lora_alpha=24), key)
    wrapped = peft.get_peft_model(theirs, peft.LoraConfig(r=4, lora_alpha=24, target_modules="all-linear"))
    modules = dict(wrapped.named_modules())
    ids, mask = left_padded()
    plain = np.asarray(generate(model, ids, attention_mask=mask, max_new_tokens=NEW, eos_token_id=[], pad_token_id=1))
    for i, adapter in enumerate(lora.adapters(model)):
        linear = adapter.node
        shape = linear.lora_B.get_value().shape
        linear.lora_B.set_value(jax.random.normal(jax.random.fold_in(key, i), shape) * 0.1)
        for layer, name in enumerate(adapter.names()):
            module = modules[f"base_model.model.{name}"]
            for which in ("lora_A", "lora_B"):
                value = np.array(getattr(linear, which).get_value()[layer])
                getattr(module, which)["default"].weight.data = torch.as_tensor(value)
    expected = reference(wrapped, ids, mask, eos_token_id=VOCAB)
    found = generate(model, ids, attention_mask=mask, max_new_tokens=NEW, eos_token_id=[], pad_token_id=1)
    np.testing.assert_array_equal(found, expected)
    assert (np.asarray(found) != plain).any()


def test_quantised_model_equals_its_own_teacher_forcing(tmp_path):
    make_checkpoint("qwen3", tmp_path)
    model = load_folder(tmp_path, quant_config=QuantConfig())
    ids = random_ids(2, 7)
    out = np.asarray(generate(model, ids, max_new_tokens=NEW, eos_token_id=[]))
    logits = np.asarray(model(jnp.asarray(out)))
    np.testing.assert_array_equal(out[:, 7:], logits[:, 6:-1].argmax(-1))
    dense = generate(load_folder(tmp_path), ids, max_new_tokens=NEW, eos_token_id=[])
    assert (np.asarray(dense) != out).any()


@pytest.mark.parametrize(
    "name, launches",  # of a layer: that add to the stream, that norm what they read, that have a gate inside
    [("llama", (2, 2, 1)), ("qwen2", (2, 2, 1)), ("phi3", (2, 2, 0)), ("gemma2", (0, 0, 0))],
)
def test_products_that_norm_and_add_decode_the_same(name, launches, tmp_path, monkeypatch):
    """Kernels do it on a GPU. Here the path is walked step by step."""
    make_checkpoint(name, tmp_path)
    model = load_folder(tmp_path, quant_config=QuantConfig())
    ids, mask = left_padded()
    logits, cache = _prefill(model, ids, mask, places=64)
    arguments = jnp.argmax(logits, axis=-1)[:, None], jnp.asarray(mask.sum(axis=1))[:, None]
    wanted, _ = model.hidden_states(*arguments, cache=cache)

    monkeypatch.setattr(api, "adds_residual", lambda *args, **kwargs: True)
    monkeypatch.setattr(api, "is_on_gpu", lambda: True)
    monkeypatch.setattr(api, "matmul_nf4", raises_not_implemented)
    around = collections.Counter()
    plain = quant.matmul_each

    def counted(x, weights, **options):
        around.update(key for key, option in options.items() if option is not None)
        return plain(x, weights, **options)

    monkeypatch.setattr(quant, "matmul_each", counted)
    got, _ = model.hidden_states(*arguments, cache=cache)
    assert tuple(around[key] for key in ("residual", "norm", "act")) == launches
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5)


def raises_not_implemented(*args, **kwargs):
    raise NotImplementedError


def test_bfloat16_tokens_are_likely_by_teacher_forcing(tmp_path):
    make_checkpoint("mistral", tmp_path)
    model = load_folder(tmp_path, jnp.bfloat16)
    out = np.asarray(generate(model, random_ids(3, 9), max_new_tokens=NEW, eos_token_id=[]))
    logits = np.asarray(model(jnp.asarray(out)))[:, 8:-1]
    chosen = np.take_along_axis(logits, out[:, 9:, None], axis=2)[..., 0]
    # A token may lose to one that bfloat16 cannot tell from it, no more.
    assert (logits.max(-1) - chosen).max() < 0.02 * np.abs(logits).max()


# ---- the real SmolLM2-135M-Instruct ----------------------------------------------------------------------------------

QUESTIONS = (
    "Give me a recipe for pancakes.",
    "What is the capital of France?",
    "Write a Python function that reverses a string, and explain each of its lines to a beginner.",
    "Hi",
    "Translate to French: the weather is nice today, and we are going to the beach with our friends.",
)


@pytest.fixture(scope="module")
def smollm2():
    source = GGUFSource(smollm2_path())
    path = smollm2_path()
    theirs = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    model = load_model(source, source.config(), dtype=jnp.float32)
    tokenizer = source.tokenizer()
    chats = [[{"role": "user", "content": question}] for question in QUESTIONS]
    prompts = tokenizer.apply_chat_template(chats, add_generation_prompt=True)["input_ids"]
    return theirs.eval(), model, tokenizer, prompts


def test_smollm2_logits_equal_transformers(smollm2):
    theirs, model, _, prompts = smollm2
    ids = np.asarray([prompts[2]], np.int32)
    with torch.no_grad():
        expected = theirs(torch.as_tensor(ids)).logits.numpy()
    assert relative_error(model(jnp.asarray(ids)), expected) < 1e-4


@pytest.fixture(scope="module")
def greedy(smollm2):
    """64 tokens after each of the five prompts in one batch, padded on the left."""
    _, model, tokenizer, prompts = smollm2
    encoding = tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="np")
    return encoding, np.asarray(generate(model, encoding, max_new_tokens=64))


def test_smollm2_greedy_tokens_equal_transformers(smollm2, greedy):
    theirs, _, _, prompts = smollm2
    encoding, batched = greedy
    expected = reference(
        theirs, encoding["input_ids"], encoding["attention_mask"], max_new_tokens=64, pad_token_id=2
    )  # fmt: skip
    assert len(prompts) == 5 and expected.shape[1] == encoding["input_ids"].shape[1] + 64
    np.testing.assert_array_equal(batched, expected)


@pytest.mark.slow
def test_smollm2_greedy_tokens_of_each_prompt_alone_equal_transformers(smollm2, greedy):
    theirs, model, _, prompts = smollm2
    for row, prompt in zip(greedy[1], prompts, strict=True):
        expected = reference(theirs, np.asarray([prompt]), max_new_tokens=64, pad_token_id=2)[0]
        np.testing.assert_array_equal(generate(model, [prompt], max_new_tokens=64)[0], expected)
        start = len(row) - 64 - len(prompt)
        np.testing.assert_array_equal(row[start : start + len(expected)], expected)
        assert (row[start + len(expected) :] == 2).all()


# ---- sampling --------------------------------------------------------------------------------------------------------

FILTERS = [
    dict(temperature=0.7),
    dict(top_k=5),
    dict(top_k=1000),
    dict(top_p=0.8),
    dict(top_p=0.0),
    dict(min_p=0.2),
    dict(temperature=2.5, top_k=20, top_p=0.6),
    dict(temperature=1.5, top_k=40, top_p=0.9, min_p=0.05),
]


def warped(logits, temperature=1.0, top_k=None, top_p=None, min_p=None):
    """transformers' own warpers, in the order of its `generate`."""
    config = transformers.GenerationConfig(
        do_sample=True, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p
    )
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
            bos_token_id=None, eos_token_id=None,
        )
    )  # fmt: skip
    processors = model._get_logits_processor(
        config, input_ids_seq_length=1, encoder_input_ids=None, prefix_allowed_tokens_fn=None, device="cpu"
    )
    scores = torch.tensor(np.array(logits))
    return np.asarray(processors(torch.zeros(len(logits), 1, dtype=torch.long), scores))


def sampling_of(key, temperature=1.0, top_k=None, top_p=None, min_p=None):
    def scalar(x):
        return None if x is None else jnp.float32(x)

    return Sampling(key=key, temperature=scalar(temperature), top_k=top_k, top_p=scalar(top_p), min_p=scalar(min_p))


@pytest.mark.parametrize("options", FILTERS, ids=str)
def test_filters_equal_transformers(options, key):
    logits = jax.random.normal(key, (16, 301)) * 3
    found, expected = np.asarray(filter_scores(logits, sampling_of(key, **options))), warped(logits, **options)
    np.testing.assert_array_equal(np.isfinite(found), np.isfinite(expected))
    kept = np.isfinite(expected)
    np.testing.assert_allclose(found[kept], expected[kept], rtol=1e-6)


def chi_square(observed, probabilities):
    """The p-value of counts against probabilities, rare outcomes taken together."""
    assert not observed[probabilities == 0].any()
    expected = probabilities * observed.sum()
    rare = expected < 5
    if expected[rare].sum() > 0:
        observed = np.append(observed[~rare], observed[rare].sum())
        expected = np.append(expected[~rare], expected[rare].sum())
    else:
        observed, expected = observed[~rare], expected[~rare]
    return scipy.stats.chisquare(observed, expected).pvalue


@pytest.mark.parametrize("options", [dict(), dict(temperature=1.7), FILTERS[-2], FILTERS[-1]], ids=str)
def test_draws_have_the_filtered_distribution(options, llama):
    _, model = llama
    prompt = random_ids(1, 4)
    # Logits that a temperature can flatten, so that many tokens have a chance.
    logits = np.asarray(model(jnp.asarray(prompt)))[0, -1]
    options = {**options, "temperature": options.get("temperature", 1.0) * 0.5 * float(logits.std())}
    scores = torch.tensor(warped(logits[None], **options)[0])
    draws = [
        generate(model, np.repeat(prompt, 256, 0), max_new_tokens=1, do_sample=True, seed=seed, **options)[:, -1]
        for seed in range(8)
    ]
    observed = np.bincount(np.concatenate(draws), minlength=VOCAB)
    probabilities = torch.softmax(scores.double(), -1).numpy()
    assert np.count_nonzero(probabilities) > 4
    assert chi_square(observed, probabilities) > 0.01


def test_draws_of_rows_and_steps_are_independent(tmp_path):
    make_checkpoint("llama", tmp_path)
    model = load_folder(tmp_path)
    model.lm_head.weight.set_value(jnp.zeros_like(model.lm_head.weight.get_value()))  # every token equally likely
    out = np.asarray(generate(model, random_ids(64, 4), max_new_tokens=48, do_sample=True, eos_token_id=[]))[:, 4:]
    assert scipy.stats.chisquare(np.bincount(out.ravel(), minlength=VOCAB)).pvalue > 0.01
    for pairs in (out[1:] == out[:-1], out[:, 1:] == out[:, :-1]):
        assert scipy.stats.binomtest(int(pairs.sum()), pairs.size, 1 / VOCAB).pvalue > 0.01


def test_top_k_of_one_is_greedy(llama):
    _, model = llama
    ids, mask = left_padded()
    greedy = generate(model, ids, attention_mask=mask, max_new_tokens=NEW)
    drawn = generate(model, ids, attention_mask=mask, max_new_tokens=NEW, do_sample=True, top_k=1, temperature=3.0)
    np.testing.assert_array_equal(drawn, greedy)


def test_a_row_draws_the_same_beside_other_rows_and_padding(llama):
    _, model = llama
    options = dict(do_sample=True, temperature=2.0, max_new_tokens=NEW, eos_token_id=[])
    prompts = [random_ids(1, n, seed=n)[0].tolist() for n in LENGTHS]
    together = np.asarray(generate(model, prompts, seed=5, **options))
    np.testing.assert_array_equal(generate(model, prompts, seed=5, **options), together)
    np.testing.assert_array_equal(generate(model, prompts, seed=jax.random.key(5), **options), together)
    np.testing.assert_array_equal(generate(model, prompts[:1], seed=5, **options)[0], together[0, 7:])
    assert (np.asarray(generate(model, prompts, seed=6, **options)) != together).any(axis=1).all()


# ---- programs --------------------------------------------------------------------------------------------------------


def test_programs_are_reused(tmp_path):
    traced = []

    class Counted(CausalLM):
        def hidden_states(self, input_ids, *args, **kwargs):
            traced.append(input_ids.shape)
            return super().hidden_states(input_ids, *args, **kwargs)

    theirs = make_checkpoint("llama", tmp_path, max_position_embeddings=512)
    model = load_model(SafetensorsSource(tmp_path), theirs.config.to_dict(), dtype=jnp.float32, cls=Counted)
    generate(model, random_ids(1, 30), max_new_tokens=20, do_sample=True, top_p=0.9)
    assert traced[0] == (1, 32)
    assert set(traced[1:]) == {(1, 1)}
    traced.clear()
    generate(model, random_ids(1, 27), max_new_tokens=12, do_sample=True, top_p=0.5, temperature=0.3, seed=9)
    assert traced == []
    generate(model, random_ids(1, 70), max_new_tokens=12, do_sample=True, top_p=0.5)
    assert traced == [(1, 80)]  # a longer prompt, the same loop


def test_steps_that_come_too_late_change_nothing(llama):
    """A row that ends between two of the loop's questions, and a number of tokens that is no multiple of its steps."""
    _, model = llama
    ids = random_ids(2, 6)
    free = np.asarray(generate(model, ids, max_new_tokens=NEW, eos_token_id=[]))[:, 6:]
    for limit, stops in ((NEW, []), (NEW, [int(free[0, 4]), int(free[1, 9])]), (6, []), (1, [])):
        found = []
        for at_once in (1, 4, 8):
            logits, cache = _prefill(model, ids, np.ones_like(ids), places=256)
            tokens, new, _ = _decode(
                model, cache, logits, np.full(2, 6, np.int32), jnp.int32(limit), np.asarray(stops, np.int32),
                jnp.int32(1), None, at_once=at_once,
            )  # fmt: skip
            found.append(np.asarray(tokens)[:, 6 : 6 + int(new)])
        assert found[0].shape[1] == limit or stops
        np.testing.assert_array_equal(found[1], found[0])
        np.testing.assert_array_equal(found[2], found[0])


@pytest.mark.parametrize("at_once", [1, 8])
def test_decoding_updates_the_cache_in_place(tmp_path, at_once):
    make_checkpoint("mistral", tmp_path, num_hidden_layers=16)
    model = load_folder(tmp_path)
    ids = jnp.ones((2, 64), jnp.int32)
    logits, cache = _prefill(model, ids, ids, places=4096)
    size = sum(a.nbytes for a in jax.tree.leaves((cache.keys, cache.values)))
    arguments = (jnp.full(2, 64), jnp.int32(9), jnp.zeros(1, jnp.int32), jnp.int32(0), None)
    memory = _decode.lower(model, cache, logits, *arguments, at_once=at_once).compile().memory_analysis()
    assert memory.alias_size_in_bytes >= size
    assert memory.temp_size_in_bytes < size / 2


def test_prefill_makes_logits_of_the_last_token_only(llama):
    _, model = llama
    text = _prefill.lower(model, jnp.ones((2, 64), jnp.int32), jnp.ones((2, 64), jnp.int32), places=256).as_text()
    assert f"tensor<2x{VOCAB}xf32>" in text
    assert f"2x64x{VOCAB}" not in text and f"128x{VOCAB}" not in text


def test_the_model_stays_usable(llama):
    _, model = llama
    before = jax.tree.map(np.asarray, nnx.state(model))
    ids = random_ids(1, 5)
    first, second = generate(model, ids, max_new_tokens=4), generate(model, jnp.asarray(ids), max_new_tokens=4)
    np.testing.assert_array_equal(first, second)
    jax.tree.map(np.testing.assert_array_equal, nnx.state(model), before)


# ---- inputs ----------------------------------------------------------------------------------------------------------


def test_every_kind_of_input_gives_the_same_tokens(llama):
    _, model = llama
    ids, mask = left_padded()
    options = dict(max_new_tokens=5, eos_token_id=[], pad_token_id=1)
    expected = generate(model, ids, attention_mask=mask, **options)
    rows = [row[keep == 1].tolist() for row, keep in zip(ids, mask, strict=True)]
    encoding = transformers.BatchEncoding({"input_ids": ids, "attention_mask": mask})
    np.testing.assert_array_equal(generate(model, rows, **options), expected)
    np.testing.assert_array_equal(generate(model, encoding, **options), expected)
    np.testing.assert_array_equal(generate(model, **encoding, **options), expected)
    np.testing.assert_array_equal(
        generate(model, torch.as_tensor(ids), attention_mask=torch.as_tensor(mask), **options), expected
    )


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (dict(input_ids=[1, 2, 3]), ValueError, r"found shape \[3\]: for one prompt, pass \[ids\]"),
        (dict(input_ids=[]), ValueError, "shape"),
        (dict(input_ids=[[1], []]), ValueError, "row 1 of input_ids is an empty prompt"),
        (dict(input_ids=np.zeros((2, 0), np.int32)), ValueError, "empty prompt"),
        (dict(input_ids=[[0.5]]), TypeError, "must be integers, found float64"),
        (dict(input_ids=[[1, 2]], attention_mask=[[1, 0]]), ValueError, 'row 0 .* padding_side="left"'),
        (dict(input_ids=[[1, 2, 3]], attention_mask=[[1, 0, 1]]), ValueError, "padding must stand on the left"),
        (dict(input_ids=np.array([[5, 1], [5, 5]]), pad_token_id=1), ValueError, "padding must stand on the left"),
        (dict(input_ids=[[1, 2]], attention_mask=[[0, 0]]), ValueError, "empty prompt"),
        (dict(input_ids=[[1, 2]], attention_mask=[[1]]), ValueError, r"shape \[1, 1\], input_ids \[1, 2\]"),
        (dict(input_ids=[[1, 2], [1]], attention_mask=[[1, 1], [1, 1]]), ValueError, "leave attention_mask out"),
        (dict(input_ids=[[1, VOCAB]]), ValueError, rf"input_ids\[0, 1\] is {VOCAB}.*{VOCAB} tokens"),
        (dict(input_ids=[[-1]]), ValueError, "vocabulary"),
        (dict(input_ids=[[1] * 60], max_new_tokens=5), ValueError, "are 65 tokens, .* window is 64: .* at most 4 new"),
        (dict(input_ids=[[1]], max_new_tokens=0), ValueError, "max_new_tokens must be at least 1, found 0"),
        (dict(input_ids=[[1]], do_sample=True, temperature=0.0), ValueError, "temperature must be above 0, found 0.0"),
        (dict(input_ids=[[1]], do_sample=True, top_k=0), ValueError, "top_k must be at least 1, found 0"),
        (dict(input_ids=[[1]], do_sample=True, top_p=1.5), ValueError, r"top_p must lie in \[0, 1\], found 1.5"),
        (dict(input_ids=[[1]], temperature=0.7), UserWarning, "do nothing without do_sample=True"),
    ],
)
def test_bad_arguments(arguments, error, message, llama):
    _, model = llama
    with pytest.raises(error, match=message):
        generate(model, **{"max_new_tokens": 2, **arguments})


def test_whole_numbers_only():  # `generate` itself has its annotations checked here, and elsewhere not
    with pytest.raises(TypeError, match="max_new_tokens must be an integer, found 2.0"):
        _positive("max_new_tokens", 2.0)


def test_the_window_counts_tokens_and_not_padding(llama):
    _, model = llama
    ids, mask = np.ones((1, 100), np.int32), np.ones((1, 100), np.int32)
    mask[:, :70] = 0
    assert generate(model, ids, attention_mask=mask, max_new_tokens=34, eos_token_id=[]).shape == (1, 134)


def test_no_warning_without_a_reason(llama):
    _, model = llama
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        generate(model, [[1, 2]], max_new_tokens=2, do_sample=True, temperature=0.7)
