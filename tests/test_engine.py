"""The engine against `generate`, which is tested against transformers, and the drawing of tokens against transformers
and numpy."""

import dataclasses
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
import torch
import transformers
from flax import nnx
from helpers import VOCAB, load_folder, make_checkpoint, random_ids, randomise_adapters, smollm2_path

from jaxlora import FastLanguageModel, SamplingParams, lora
from jaxlora.config import LoraConfig, QuantConfig
from jaxlora.engine import Engine, cache_budget, cache_shape
from jaxlora.generate import Sampling, bucket, filter_scores, generate
from jaxlora.sampling import Needs, Seen, Wishes, draw, filtered, penalised
from jaxlora.slots import Rows, Serving, decode, empty_slots, prefill

LENGTHS = (3, 10, 6, 1, 20, 33, 7)
PROMPTS = [random_ids(1, n, seed=n)[0].tolist() for n in LENGTHS]
FEW = PROMPTS[:5]  # that all pad to one size
NEW = 25
GREEDY = SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True)


def tiny(name, folder, dtype=jnp.float32, **changes):
    make_checkpoint(name, folder, **changes)
    model = load_folder(folder, dtype)
    model.max_seq_length = 64
    return model


def alone(model, prompt, new=NEW):
    """What `generate` goes on with."""
    return np.asarray(generate(model, [prompt], max_new_tokens=new, eos_token_id=[]))[0, len(prompt) :].tolist()


def tokens(outputs):
    return [output.token_ids for request in outputs for output in request.outputs]


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return tiny("llama", tmp_path_factory.mktemp("llama"))


# ---- greedy, against generate ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "llama",
        "mistral",  # a window
        "gemma2",  # softcaps, a window in every other layer
        "gemma3_text",  # two ropes
        "falcon-rw",  # ALiBi
        "llama-dynamic",  # a rope that looks at the length
        "falcon_h1",  # Mamba's states beside keys and values
        "qwen3_5_text",  # states in some layers, keys and values in others
        "gpt_oss",  # experts, and sinks beside the scores
        "gemma4_text",  # keys and values that layers share, heads of two sizes, inputs of every layer
        pytest.param("phi3-longrope", marks=pytest.mark.slow),
        pytest.param("cohere2", marks=pytest.mark.slow),  # layers without rope
        pytest.param("qwen2-windows", marks=pytest.mark.slow),
    ],
)
def test_every_request_gets_what_it_gets_alone(name, tmp_path):
    model = tiny(name, tmp_path)
    expected = [alone(model, prompt) for prompt in FEW]
    outputs = Engine(max_slots=3).generate(model, FEW, GREEDY)
    assert tokens(outputs) == expected
    assert [output.prompt_token_ids for output in outputs] == FEW
    assert tokens(Engine(max_slots=3).generate(model, FEW[::-1], GREEDY)) == expected[::-1]


def test_requests_of_every_length_share_the_slots(llama):
    new = [1, 25, 4, 40, 31, 9, 2]
    params = [dataclasses.replace(GREEDY, max_tokens=n) for n in new]
    outputs = Engine(max_slots=2).generate(llama, PROMPTS, params)
    for prompt, n, output in zip(PROMPTS, new, outputs, strict=True):
        (completion,) = output.outputs
        assert completion.token_ids == alone(llama, prompt, n)
        assert (completion.finish_reason, completion.stop_reason) == ("length", None)


def test_the_whole_window_is_used(llama):
    output = Engine().generate(llama, [PROMPTS[0], PROMPTS[4]], dataclasses.replace(GREEDY, max_tokens=None))
    assert tokens(output) == [alone(llama, PROMPTS[0], 61), alone(llama, PROMPTS[4], 44)]


def test_bfloat16_tokens_are_likely_by_teacher_forcing(tmp_path):
    model = tiny("llama", tmp_path, jnp.bfloat16)
    for prompt, new in zip(FEW[:3], tokens(Engine(max_slots=2).generate(model, FEW[:3], GREEDY)), strict=True):
        logits = np.asarray(model(jnp.asarray([prompt + new])))[0, len(prompt) - 1 : -1]
        # A token may lose to one that bfloat16 cannot tell from it, no more.
        assert (logits.max(-1) - logits[np.arange(NEW), new]).max() < 0.02 * np.abs(logits).max()


def test_quantised_weights(tmp_path):
    make_checkpoint("qwen3", tmp_path)
    model = load_folder(tmp_path, quant_config=QuantConfig())
    expected = [alone(model, prompt) for prompt in FEW]
    assert tokens(Engine(max_slots=3).generate(model, FEW, GREEDY)) == expected


def test_stops(llama):
    free = alone(llama, PROMPTS[1])
    stop = free[8]
    end = free.index(stop) + 1
    llama.generation_config = {"eos_token_id": stop}
    try:
        engine = Engine()

        def ask(**options):
            params = SamplingParams(temperature=0, max_tokens=NEW, **options)
            (completion,) = engine.generate(llama, PROMPTS[1], params)[0].outputs
            return completion.token_ids, completion.finish_reason, completion.stop_reason

        assert ask() == (free[:end], "stop", None)
        assert ask(ignore_eos=True) == (free, "length", None)
        assert ask(ignore_eos=True, stop_token_ids=[stop]) == (free[:end], "stop", stop)
        # Before min_tokens the stop token is ruled out, so the text goes another way there.
        found, *_ = ask(min_tokens=end + 3)
        assert stop not in found[: end + 3] and len(found) >= end + 3
        assert found[: end - 1] == free[: end - 1]
    finally:
        del llama.generation_config


# ---- drawing ---------------------------------------------------------------------------------------------------------

WISHES = [
    dict(),
    dict(temperature=0.0),
    dict(temperature=0.7),
    dict(top_k=5),
    dict(top_k=1000),
    dict(top_p=0.8),
    dict(top_p=0.0),
    dict(min_p=0.2),
    dict(temperature=2.5, top_k=20, top_p=0.6),
    dict(temperature=1.5, top_k=40, top_p=0.9, min_p=0.05),
]


def wishes_of(options, stops=4):
    wishes = Wishes.empty(len(options), stops)
    for row, option in enumerate(options):
        wishes.set(row, SamplingParams(**option), most=99, seed=row, completion=0, stops=())
    return jax.tree.map(jnp.asarray, wishes)


def test_filters_of_rows_equal_those_of_generate(key):
    rows = [option for option in WISHES if option.get("temperature") != 0.0]
    logits = jax.random.normal(key, (len(rows), 301)) * 3
    wishes = wishes_of(rows)
    found = filtered(logits / wishes.temperature[:, None], wishes)
    for row, options in enumerate(rows):
        sampling = {k: v if k == "top_k" else jnp.float32(v) for k, v in {"temperature": 1.0, **options}.items()}
        expected = filter_scores(logits[row : row + 1], Sampling(key=key, **sampling))[0]
        np.testing.assert_array_equal(np.isfinite(found[row]), np.isfinite(expected))
        np.testing.assert_allclose(found[row], expected, rtol=1e-6)


@pytest.mark.parametrize("options", [dict(temperature=1.7), WISHES[-1]], ids=str)
def test_draws_have_the_filtered_distribution(options, key):
    logits = jax.random.normal(key, (1, 50)) * 2
    rows = 4000
    wishes = wishes_of([options] * rows)
    needs = Needs.of([SamplingParams(**options)])
    drawn = draw(jnp.broadcast_to(logits, (rows, 50)), wishes, jnp.zeros(rows, jnp.int32), None, needs)
    scores = filtered(logits / wishes.temperature[:1, None], jax.tree.map(lambda x: x[:1], wishes))
    expected = np.asarray(jax.nn.softmax(scores[0].astype(jnp.float32))).astype(np.float64) * rows
    observed = np.bincount(drawn.token, minlength=50)
    assert not observed[expected == 0].any()
    kept = expected > 5
    observed, expected = (
        np.append(observed[kept], observed[~kept].sum()),
        np.append(expected[kept], expected[~kept].sum()),
    )
    observed, expected = observed[expected > 0], expected[expected > 0]
    assert scipy.stats.chisquare(observed, expected * observed.sum() / expected.sum()).pvalue > 0.01


def test_repetition_penalty_equals_transformers_and_the_others_their_formula(key):
    logits = np.array(jax.random.normal(key, (2, VOCAB)) * 3)
    prompt, new = random_ids(2, 5), np.array([[4, 4, 9, 4], [7, 8, 8, 1]])
    seen = Seen(
        jnp.zeros((2, VOCAB), bool).at[jnp.arange(2)[:, None], prompt].set(True),
        jnp.asarray(np.stack([np.bincount(row, minlength=VOCAB) for row in new]), jnp.int32),
    )
    wishes = wishes_of([dict(repetition_penalty=1.7), dict(repetition_penalty=1.7)])
    processor = transformers.RepetitionPenaltyLogitsProcessor(1.7)
    expected = processor(torch.as_tensor(np.concatenate([prompt, new], 1)).long(), torch.tensor(logits)).numpy()
    np.testing.assert_allclose(penalised(jnp.asarray(logits), seen, wishes), expected, rtol=1e-6)
    wishes = wishes_of([dict(presence_penalty=0.5), dict(frequency_penalty=-0.3)])
    expected = logits.copy()
    expected[0, [4, 9]] -= 0.5
    expected[1, 7], expected[1, 8], expected[1, 1] = logits[1, 7] + 0.3, logits[1, 8] + 0.6, logits[1, 1] + 0.3
    np.testing.assert_allclose(penalised(jnp.asarray(logits), seen, wishes), expected, rtol=1e-6)


def test_penalties_see_the_prompt_and_the_completion_of_their_slot_only(llama):
    params = dataclasses.replace(GREEDY, repetition_penalty=1.3, frequency_penalty=0.7, presence_penalty=0.4)
    outputs = Engine(max_slots=2).generate(llama, FEW[:4], params)
    for prompt, new in zip(FEW[:4], tokens(outputs), strict=True):
        logits = np.array(llama(jnp.asarray([prompt + new])))[0, len(prompt) - 1 : -1]
        for i, row in enumerate(logits):
            count = np.bincount(new[:i], minlength=VOCAB)
            seen = (count > 0) | np.isin(np.arange(VOCAB), prompt)
            row = np.where(seen, np.where(row > 0, row / 1.3, row * 1.3), row) - 0.7 * count - 0.4 * (count > 0)
            assert row[new[i]] > row.max() - 1e-4


def test_a_sampled_request_is_the_same_alone_and_among_others(llama):
    sampled = SamplingParams(temperature=2.0, top_p=0.95, seed=7, max_tokens=NEW, ignore_eos=True)
    params = [
        GREEDY,
        sampled,
        dataclasses.replace(sampled, seed=9, frequency_penalty=1.0, top_p=1.0),
        dataclasses.replace(sampled, temperature=0.5, min_p=0.1, logprobs=2),
        dataclasses.replace(sampled, max_tokens=5, min_tokens=4, stop_token_ids=list(range(40))),
    ]
    own = [tokens(Engine().generate(llama, *one))[0] for one in zip(FEW, params, strict=True)]
    assert len(own[4]) in (4, 5)
    for order in ([0, 1, 2, 3, 4], [4, 2, 0, 3, 1]):
        outputs = Engine(max_slots=3).generate(llama, [FEW[i] for i in order], [params[i] for i in order])
        assert tokens(outputs) == [own[i] for i in order]


def test_completions_of_one_prompt_differ_and_seeds_can_be_left_out(llama):
    params = SamplingParams(n=4, temperature=2.0, seed=3, max_tokens=NEW, ignore_eos=True)
    (output,) = Engine().generate(llama, PROMPTS[1], params)
    assert [completion.index for completion in output.outputs] == [0, 1, 2, 3]
    found = tokens([output])
    assert len(set(map(tuple, found))) == 4
    assert tokens(Engine(max_slots=1).generate(llama, PROMPTS[1], params)) == found
    assert tokens(Engine().generate(llama, PROMPTS[1], dataclasses.replace(params, n=1))) == found[:1]
    engine, free = Engine(), dataclasses.replace(params, n=1, seed=None)
    first, second = (tokens(engine.generate(llama, [PROMPTS[1]] * 2, free)) for _ in range(2))
    assert len(set(map(tuple, first + second))) == 4
    assert tokens(Engine().generate(llama, [PROMPTS[1]] * 2, free)) == first


def test_logprobs_are_those_of_the_model(llama):
    params = [dataclasses.replace(GREEDY, logprobs=count, temperature=1.5, seed=1) for count in (0, 2, 5)]
    for prompt, param, output in zip(PROMPTS, params, Engine().generate(llama, PROMPTS[:3], params), strict=False):
        (completion,) = output.outputs
        logits = llama(jnp.asarray([prompt + completion.token_ids]))[0, len(prompt) - 1 : -1]
        expected = np.asarray(jax.nn.log_softmax(logits))
        total = 0.0
        for found, token, row in zip(completion.logprobs, completion.token_ids, expected, strict=True):
            likeliest = np.argsort(-row)[: param.logprobs].tolist()
            assert set(found) == {token, *likeliest}
            for other, entry in found.items():
                assert entry.logprob == pytest.approx(row[other], abs=2e-5)
                assert entry.rank == 1 + (row > row[other]).sum()
            total += found[token].logprob
        assert completion.cumulative_logprob == pytest.approx(total, rel=1e-6)


# ---- the cache -------------------------------------------------------------------------------------------------------


def test_sizes_from_memory():
    gib = 2**30
    assert cache_budget(80 * gib, 0.5, 16 * gib) == 24 * gib
    assert cache_budget(8 * gib, 0.5, 6 * gib) == 0
    # Llama 3.1 8B in bfloat16: 2 x 32 layers x 8 heads x 128 x 2 bytes = 128 KiB a token.
    place = 2 * 32 * 8 * 128 * 2
    assert place == 128 * 1024
    assert cache_shape(24 * gib, place, 0, sequences=1000, longest=1000, window=8192) == (192, 1024)
    assert cache_shape(24 * gib, place // 2, 0, sequences=1000, longest=1000, window=8192) == (256, 1024)  # float8
    assert cache_shape(24 * gib, place, 0, sequences=1000, longest=8000, window=8192) == (24, 8192)
    assert cache_shape(24 * gib, place, 0, sequences=3, longest=100, window=8192) == (4, 256)
    assert cache_shape(24 * gib, place, 0, sequences=9, longest=300, window=310) == (16, 310)
    # Mixers' states of 128 MiB a sequence are as much as its 1024 places.
    assert cache_shape(24 * gib, place, 128 * 2**20, sequences=1000, longest=1000, window=8192) == (96, 1024)
    assert cache_shape(1 * gib, place, 0, sequences=9, longest=8000, window=8192) == (1, 8192)


def test_a_sequence_takes_its_keys_values_and_states(tmp_path):
    model = tiny("falcon_h1", tmp_path)
    mamba, layers = model.config.mamba, model.config.num_hidden_layers
    state = mamba.n_heads * mamba.d_head * mamba.d_state + (mamba.d_conv - 1) * mamba.channels
    place = 2 * model.config.num_key_value_heads * model.config.head_dim
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(model)))
    one = 4 * layers * (64 * place + state)  # a window of 64 tokens, in float32
    assert Engine(memory=weights + one, gpu_memory_utilization=1.0).cache_bytes(model) == one
    with pytest.raises(ValueError, match="a sequence of 64 tokens takes"):
        Engine(memory=weights + one - 1, gpu_memory_utilization=1.0).cache_bytes(model)


def test_only_layers_that_attend_have_keys_and_values(tmp_path):
    model = tiny("qwen3_5_text", tmp_path)
    linear, layers = model.config.linear_attention, model.config.layers
    state = linear.num_value_heads * linear.key_head_dim * linear.value_head_dim
    state += (linear.conv_kernel_dim - 1) * linear.channels
    place = 2 * model.config.num_key_value_heads * model.config.head_dim
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(model)))
    one = 4 * (64 * place + 4 * state)
    assert [layer.linear for layer in layers] == [True, True, False, True, True]
    assert Engine(memory=weights + one, gpu_memory_utilization=1.0).cache_bytes(model) == one


def test_buckets_are_few_and_waste_little():
    sizes = [bucket(n) for n in range(1, 4097)]
    assert sizes[:32] == [32] * 32 and bucket(65) == 80 and bucket(128) == 128
    assert all(n <= size < 1.25 * n for n, size in enumerate(sizes, 1) if n >= 32)
    assert len(set(sizes)) == 1 + 4 * 7


def test_the_cache_is_updated_in_place(tmp_path):
    model = Serving(tiny("mistral", tmp_path, num_hidden_layers=16), 8)
    needs = Needs.of([GREEDY])
    cache, seen = empty_slots(model, slots=4, places=4096, dtype=None, reach=4096, needs=needs)
    size = sum(a.nbytes for a in jax.tree.leaves((cache.keys, cache.values)))
    ids, fed, slots = np.zeros((2, 32), np.int32), np.full(2, 9, np.int32), np.array([3, 9], np.int32)
    last = np.zeros(2, np.int32)
    rows = Rows(*(np.zeros(4, kind) for kind in (np.int32, np.int32, np.int32, bool)))
    arguments = (rows, Wishes.empty(4, 4), np.int32(9), np.bool_(True))
    for lowered in (
        prefill.lower(model, cache, seen, ids, fed, last, slots),
        decode.lower(model, cache, seen, *arguments, needs=needs),
    ):
        memory = lowered.compile().memory_analysis()
        assert memory.alias_size_in_bytes >= size
        assert memory.temp_size_in_bytes < size / 2


def test_float8_cache_stays_near(llama):
    """e4m3 keeps 3 bits after the leading one: keys and values are off by at most 1/16 of themselves."""
    params = dataclasses.replace(GREEDY, max_tokens=1, logprobs=VOCAB)

    def logprobs(dtype):
        outputs = Engine(cache_dtype=dtype).generate(llama, PROMPTS, params)
        return np.array([[o.outputs[0].logprobs[0][t].logprob for t in range(VOCAB)] for o in outputs])

    exact, near = logprobs(None), logprobs(jnp.float8_e4m3fn)
    spread = exact.max(1) - exact.min(1)
    error = np.abs(exact - near).max(1) / spread
    assert error[3] == 0.0 or error[3] < 0.05  # a prompt of one token sees itself only
    assert 1e-3 < error.max() < 0.05


def test_float8_keys_beyond_its_range_are_not_nan(tmp_path):
    model = tiny("qwen2", tmp_path)
    bias = model.model.layers[0].period[0].self_attn.k_proj.bias
    bias.set_value(bias.get_value() + 3000.0)
    outputs = Engine(cache_dtype=jnp.float8_e4m3fn).generate(model, PROMPTS[:2], GREEDY)
    assert np.isfinite([output.outputs[0].cumulative_logprob for output in outputs]).all()


# ---- programs, adapters and weights ----------------------------------------------------------------------------------


def compiled():
    return decode._cache_size(), prefill._cache_size()


def test_adapters_are_swapped_without_compiling(tmp_path, key):
    model = tiny("qwen3", tmp_path)
    engine = Engine(max_lora_rank=16, max_slots=4)

    def adapted(i, **options):
        copy = nnx.merge(*nnx.split(model))
        lora.add_adapters(copy, LoraConfig(target_modules=("q_proj", "down_proj"), **options), key)
        randomise_adapters(copy, i)
        return copy

    models = [
        adapted(1, r=4),
        adapted(2, r=16, lora_alpha=3, lora_dropout=0.5),
        adapted(3, r=2, rank_pattern={"layers.1.self_attn.q_proj": 7}, use_rslora=True),
    ]
    programs = []
    for adapter in models:
        expected = [alone(adapter, prompt) for prompt in FEW[:2]]
        assert tokens(engine.generate(adapter, FEW[:2], GREEDY)) == expected
        programs.append(compiled())
    assert programs[0] == programs[1] == programs[2]
    with pytest.raises(ValueError, match=r"down_proj has rank 17, .* up to 16: load the model with max_lora_rank=17"):
        engine.generate(adapted(4, r=17), PROMPTS, GREEDY)


@pytest.mark.parametrize("tied", [False, True])
def test_whatever_learns_goes_on(tied, tmp_path, key):
    """Magnitudes, or an adapter on a tied head with that on the embedding; and a copy of a norm."""
    model = tiny("llama-tied", tmp_path)
    config = LoraConfig(
        r=3, target_modules=("q_proj", "down_proj", "embed_tokens"), modules_to_save=("input_layernorm",),
        use_dora=not tied, ensure_weight_tying=tied,
    )  # fmt: skip
    lora.add_adapters(model, config, key)
    plain = alone(model, FEW[1])
    randomise_adapters(model)
    copy = model.model.layers[0].period[0].input_layernorm.trained_weight.value
    copy.set_value(copy.get_value() * 1.3)
    expected = [alone(model, prompt) for prompt in FEW[:2]]
    assert tokens(Engine(max_lora_rank=8).generate(model, FEW[:2], GREEDY)) == expected
    assert expected[1] != plain


def test_the_weights_are_those_of_the_call(tmp_path, key):
    model = tiny("llama", tmp_path)
    lora.add_adapters(model, LoraConfig(r=4), key)
    engine = Engine()
    before = tokens(engine.generate(model, PROMPTS, GREEDY))
    programs, state = compiled(), jax.tree.map(np.asarray, nnx.state(model))
    randomise_adapters(model)  # as a step of training would
    after = tokens(engine.generate(model, PROMPTS, GREEDY))
    assert compiled() == programs
    assert before != after
    assert after[:2] == [alone(model, prompt) for prompt in PROMPTS[:2]]
    nnx.update(model, state)
    assert tokens(engine.generate(model, PROMPTS, GREEDY)) == before


def test_like_calls_meet_the_same_programs(llama):
    engine = Engine()
    params = SamplingParams(seed=1, top_p=0.9, max_tokens=20)
    engine.generate(llama, PROMPTS[:5], params)
    programs = compiled()
    engine.generate(
        llama, PROMPTS[1:7], dataclasses.replace(params, seed=4, top_k=9, max_tokens=12, stop_token_ids=[5])
    )
    assert decode._cache_size() == programs[0]


# ---- the door --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def smollm2():
    return FastLanguageModel.from_pretrained(
        smollm2_path(), max_seq_length=1024, dtype="float32", load_in_16bit=True, fast_inference=True
    )


QUESTIONS = (
    "Give me a recipe for pancakes.",
    "What is the capital of France?",
    "Write a Python function that reverses a string, and explain each of its lines to a beginner.",
    "Hi",
    "Translate to French: the weather is nice today, and we are going to the beach with our friends.",
)
CHATS = [[{"role": "user", "content": question}] for question in QUESTIONS]


def test_smollm2_equals_generate(smollm2):
    model, tokenizer = smollm2
    outputs = model.fast_generate(CHATS, SamplingParams(temperature=0, max_tokens=24))
    for chat, output in zip(CHATS, outputs, strict=True):
        prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"]
        assert output.prompt_token_ids == prompt
        assert tokenizer(output.prompt, add_special_tokens=False)["input_ids"] == prompt
        ids = np.asarray(model.generate([prompt], max_new_tokens=24))[0, len(prompt) :].tolist()
        (completion,) = output.outputs
        assert completion.token_ids == ids
        assert completion.text == tokenizer.decode(ids, skip_special_tokens=True)
        assert completion.finish_reason == ("stop" if ids[-1] in (0, 2) else "length")


def test_smollm2_with_a_float8_cache_begins_alike(smollm2):
    """Log-probabilities are off by up to 0.9 there, 0.03 of their range; of the likeliest token, by far less."""
    model, tokenizer = smollm2
    params = SamplingParams(temperature=0, max_tokens=1, logprobs=2)
    near, exact = (
        [output.outputs[0] for output in engine.generate(model, CHATS, params)]
        for engine in (Engine(tokenizer, cache_dtype=jnp.float8_e4m3fn), model.engine)
    )
    sure = 0
    for a, b in zip(near, exact, strict=True):
        first, second = sorted((entry.logprob for entry in b.logprobs[0].values()), reverse=True)
        assert a.cumulative_logprob == pytest.approx(b.cumulative_logprob, abs=0.35)
        if first - second > 0.3:  # the others are near ties, which a bfloat16 cache can turn too
            sure += 1
            assert a.token_ids == b.token_ids
    assert sure >= 3


def test_smollm2_stop_texts(smollm2):
    model, tokenizer = smollm2
    free = SamplingParams(temperature=0, max_tokens=24)
    (full,) = model.fast_generate(CHATS[1], free)[0].outputs
    stop = full.text[12:15]  # within tokens and across them
    place = full.text.index(stop)

    def ask(**options):
        (completion,) = model.fast_generate(CHATS[1], dataclasses.replace(free, **options))[0].outputs
        return completion

    found = ask(stop=[stop, "never"])
    assert (found.text, found.finish_reason, found.stop_reason) == (full.text[:place], "stop", stop)
    count = len(found.token_ids)
    assert found.token_ids == full.token_ids[:count]
    assert stop in tokenizer.decode(found.token_ids) and stop not in tokenizer.decode(found.token_ids[:-1])
    assert ask(stop=stop, include_stop_str_in_output=True).text == full.text[: place + 3]
    assert ask(stop=stop, min_tokens=count + 1).text == full.text
    # A token that stops is no part of the text either, unless it is asked for.
    token = full.token_ids[3]
    assert ask(stop_token_ids=[token]).text == tokenizer.decode(full.token_ids[:3])
    assert ask(stop_token_ids=[token], include_stop_str_in_output=True).text == tokenizer.decode(full.token_ids[:4])


def test_kinds_of_prompts(smollm2):
    model, tokenizer = smollm2
    params = SamplingParams(temperature=0, max_tokens=3)
    ids = tokenizer(QUESTIONS[0])["input_ids"]
    (text,) = model.fast_generate(QUESTIONS[0], params)
    assert (text.prompt, text.prompt_token_ids) == (QUESTIONS[0], ids)
    for same in (ids, np.array(ids), np.array([ids]), [ids], [np.array(ids)], [QUESTIONS[0]]):
        (output,) = model.fast_generate(same, params)
        assert output.prompt_token_ids == ids and output.outputs == text.outputs
    (chat,) = model.fast_generate(CHATS[0], params)
    (rendered,) = model.fast_generate([chat.prompt], params)  # which begins with the BOS token already
    assert rendered == chat
    assert model.fast_generate([], params) == []


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    make_checkpoint("llama", folder)
    return folder


def load(folder, **options):
    with pytest.warns(UserWarning, match="has no tokenizer files"):
        model, _ = FastLanguageModel.from_pretrained(folder, load_in_16bit=True, dtype="float32", **options)
    return model


def test_an_adapter_of_a_folder_goes_on_in_this_call_only(folder, tmp_path):
    model = load(folder, fast_inference=True)
    base = tokens(model.fast_generate(FEW, GREEDY))
    other = FastLanguageModel.get_peft_model(load(folder), r=3)
    randomise_adapters(other, 1)
    other.save_pretrained(tmp_path)
    expected = [alone(other, prompt) for prompt in FEW]
    assert tokens(model.fast_generate(FEW, GREEDY, lora_request=tmp_path)) == expected
    assert tokens(model.fast_generate(FEW, GREEDY)) == base != expected
    FastLanguageModel.get_peft_model(model, r=5)
    randomise_adapters(model, 2)
    own = tokens(model.fast_generate(FEW, GREEDY))
    assert tokens(model.fast_generate(FEW, GREEDY, lora_request=str(tmp_path))) == expected
    model.load_adapter(tmp_path, "other")
    assert tokens(model.fast_generate(FEW, GREEDY)) == own != base
    model.set_adapter("other")
    assert tokens(model.fast_generate(FEW, GREEDY)) == expected
    model.set_adapter("default")
    assert tokens(model.fast_generate(FEW, GREEDY)) == own
    started = FastLanguageModel.get_peft_model(load(folder, fast_inference=True), r=3, init_lora_weights="pissa")
    with pytest.raises(ValueError, match="'pissa'.* has changed those: load the base anew"):
        started.fast_generate(PROMPTS, GREEDY, lora_request=tmp_path)


def test_a_model_with_an_engine_trains(folder):
    model = FastLanguageModel.get_peft_model(load(folder, fast_inference=True), r=4)
    graphdef, trainable, frozen = lora.partition(model)
    ids = jnp.asarray(random_ids(1, 8))

    @jax.jit
    def loss(trainable):
        return nnx.merge(graphdef, trainable, frozen)(ids).mean()

    assert np.isfinite(jax.tree.leaves(jax.grad(loss)(trainable))[0]).all()


def test_the_arguments_reach_the_engine(folder):
    model = load(folder, fast_inference=True, float8_kv_cache=True, max_lora_rank=3, gpu_memory_utilization=0.25)
    engine = model.engine
    assert (engine.cache_dtype, engine.max_lora_rank, engine.utilization) == (jnp.float8_e4m3fn, 3, 0.25)
    place = 2 * 3 * 2 * 10  # keys and values of 3 layers, 2 heads of 10, a byte each
    assert engine._place_bytes(model) == place
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(model)))
    assert engine.cache_bytes(model) == int(0.25 * engine.memory) - weights


def test_a_line_of_throughput_unless_it_is_silenced(llama, caplog):
    params = dataclasses.replace(GREEDY, max_tokens=4)
    with caplog.at_level(logging.INFO, "jaxlora.engine"):
        Engine().generate(llama, PROMPTS[:2], params)
        assert not caplog.messages
        Engine(disable_log_stats=False).generate(llama, PROMPTS[:2], params)
    (line,) = caplog.messages
    assert line.startswith("2 sequences in ")
    assert "13 prompt tokens" in line and "8 new tokens" in line and line.endswith("2 slots of 64 places")


@pytest.mark.parametrize(
    ("prompts", "params", "error", "message"),
    [
        (
            [[1] * 60],
            dict(max_tokens=5),
            ValueError,
            "prompt 0 has 60 tokens and max_tokens is 5, .* window is 64: .* 4",
        ),
        ([[1], [1] * 64], dict(max_tokens=None), ValueError, "prompt 1 has 64 tokens .* at most 0 tokens"),
        ([[1], []], {}, ValueError, "prompt 1 is empty"),
        ([[1, VOCAB]], {}, ValueError, f"prompt 0 has the token {VOCAB}, .* {VOCAB} tokens"),
        ([[0.5]], {}, TypeError, "a text, a list of token ids or a list of messages"),
        (["text"], {}, ValueError, "no tokenizer: give prompts as lists of token ids"),
        ([[1]], dict(stop="a"), ValueError, "no tokenizer, so stop cannot be texts"),
        ([[1]], dict(logprobs=VOCAB + 1), ValueError, f"logprobs={VOCAB + 1}"),
    ],
)
def test_bad_requests(prompts, params, error, message, llama):
    with pytest.raises(error, match=message):
        Engine().generate(llama, prompts, SamplingParams(**params))


def test_parameters_for_each_prompt_or_for_all(llama):
    with pytest.raises(ValueError, match="2 sampling_params for 3 prompts"):
        Engine().generate(llama, PROMPTS[:3], [GREEDY] * 2)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (dict(temperature=-1.0), ValueError, "temperature must be at least 0.0, found -1.0"),
        (dict(temperature=float("nan")), ValueError, "temperature"),
        (dict(top_p=1.5), ValueError, r"top_p must be in \[0.0, 1.0\], found 1.5"),
        (dict(top_k=-2), ValueError, "top_k must be at least -1"),
        (dict(n=0), ValueError, "n must be at least 1"),
        (dict(max_tokens=0), ValueError, "max_tokens must be at least 1"),
        (dict(max_tokens=4, min_tokens=5), ValueError, "min_tokens=5 is more than max_tokens=4"),
        (dict(seed=-1), ValueError, "seed"),
        (dict(repetition_penalty=0.0), ValueError, "repetition_penalty must be above 0"),
        (dict(stop=[""]), ValueError, "stop must be texts"),
        (dict(best_of=3), TypeError, "best_of"),
    ],
)
def test_bad_parameters(options, error, message):
    with pytest.raises(error, match=message):
        SamplingParams(**options)


def test_no_room_is_said_when_the_model_is_loaded(folder):
    with pytest.raises(
        ValueError, match=r"gpu_memory_utilization=1e-07 of .* choose a larger share, .*float8_kv_cache"
    ):
        load(folder, fast_inference=True, gpu_memory_utilization=1e-7)
    for share in (0.0, 1.5):
        with pytest.raises(ValueError, match=f"gpu_memory_utilization must be above 0 and at most 1, found {share}"):
            Engine(gpu_memory_utilization=share)
    with pytest.raises(ValueError, match="max_lora_rank must be at least 1, found 0"):
        Engine(max_lora_rank=0)


def test_fast_generate_needs_the_engine(folder):
    with pytest.raises(ValueError, match="load the model with fast_inference=True"):
        load(folder).fast_generate(PROMPTS, GREEDY)
    with pytest.warns(UserWarning, match="do nothing without fast_inference=True"):
        load(folder, max_lora_rank=8)
