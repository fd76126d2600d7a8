"""Adapters against PEFT: which modules, what counts, where they start, what they compute."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
import transformers
from flax import nnx
from helpers import (
    FAMILIES,
    adapter_matrices,
    load_folder,
    make_checkpoint,
    make_pair,
    peft_parameters,
    peft_twin,
    random_ids,
    randomise_adapters,
    relative_error,
)

from jaxlora.config import LoraConfig, QuantConfig
from jaxlora.converters.huggingface import model_config
from jaxlora.kernels.dropout import dropout
from jaxlora.lora import (
    _drawn,
    adapters,
    add_adapters,
    delta_weight,
    format_trainable_parameters,
    get_nb_trainable_parameters,
    partition,
)
from jaxlora.loss import causal_lm_loss
from jaxlora.model import CausalLM
from jaxlora.variables import LoraParam

SEVEN = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def adapted(model, seed=0, **options):
    config = LoraConfig(**options)
    add_adapters(model, config, jax.random.key(seed))
    return config


def test_models_of_one_shape_share_the_program_that_draws(tmp_path):
    make_checkpoint("llama", tmp_path)
    starts, compiled = [], []
    for seed in (0, 1, 0):
        model = load_folder(tmp_path)
        adapted(model, seed, r=4, target_modules=SEVEN)
        starts.append(jax.tree.leaves(partition(model)[1]))
        compiled.append(_drawn._cache_size())
    assert compiled[1:] == compiled[:1] * 2
    assert any(np.any(one != other) for one, other in zip(starts[0], starts[1], strict=True))
    for one, other in zip(starts[0], starts[2], strict=True):
        np.testing.assert_array_equal(one, other)


# ---- counts ----------------------------------------------------------------------------------------------------------

# name -> (model_type, hidden, intermediate, layers, heads, kv_heads, head_dim, vocab, tied), parameters, r=16 on SEVEN
REAL = {
    "TinyLlama-1.1B": (("llama", 2048, 5632, 22, 32, 4, 64, 32000, False), 1_100_048_384, 12_615_680),
    "Llama-3.2-1B": (("llama", 2048, 8192, 16, 32, 8, 64, 128256, True), 1_235_814_400, 11_272_192),
    "Llama-3.2-3B": (("llama", 3072, 8192, 28, 24, 8, 128, 128256, True), 3_212_749_824, 24_313_856),
    "Llama-2-7B": (("llama", 4096, 11008, 32, 32, 32, 128, 32000, False), 6_738_415_616, 39_976_960),
    "Llama-3.1-8B": (("llama", 4096, 14336, 32, 32, 8, 128, 128256, False), 8_030_261_248, 41_943_040),
    "Llama-3.3-70B": (("llama", 8192, 28672, 80, 64, 8, 128, 128256, False), 70_553_706_496, 207_093_760),
    "Mistral-7B": (("mistral", 4096, 14336, 32, 32, 8, 128, 32000, False), 7_241_732_096, 41_943_040),
    "Qwen2.5-0.5B": (("qwen2", 896, 4864, 24, 14, 2, 64, 151936, True), 494_032_768, 8_798_208),
    "Qwen2.5-7B": (("qwen2", 3584, 18944, 28, 28, 4, 128, 152064, False), 7_615_616_512, 40_370_176),
    "Qwen3-0.6B": (("qwen3", 1024, 3072, 28, 16, 8, 128, 151936, True), 596_049_920, 10_092_544),
    "Qwen3-4B": (("qwen3", 2560, 9728, 36, 32, 8, 128, 151936, True), 4_022_468_096, 33_030_144),
    "Qwen3-8B": (("qwen3", 4096, 12288, 36, 32, 8, 128, 151936, False), 8_190_735_360, 43_646_976),
    "Qwen3-14B": (("qwen3", 5120, 17408, 40, 40, 8, 128, 151936, False), 14_768_307_200, 64_225_280),
}
FIELDS = (
    "model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "vocab_size", "tie_word_embeddings",
)  # fmt: skip


@pytest.mark.parametrize("quant_config", [None, QuantConfig()], ids=["16bit", "4bit"])
@pytest.mark.parametrize("name", REAL)
def test_counts_of_real_models(name, quant_config):
    values, parameters, trainable = REAL[name]
    config = model_config(dict(zip(FIELDS, values, strict=True)))

    def create(r):
        model = CausalLM(config, dtype=jnp.bfloat16, quant_config=quant_config, rngs=nnx.Rngs(0))
        adapted(model, r=r, target_modules=SEVEN)
        return model

    for r in (16, 32):
        expected = trainable * r // 16
        model = nnx.eval_shape(lambda r=r: create(r))
        assert get_nb_trainable_parameters(model) == (expected, parameters + expected)


@pytest.mark.parametrize("four_bit", [False, True], ids=["dense", "4bit"])
@pytest.mark.parametrize("name", ["llama-tied", "qwen2"])
def test_the_printed_line_is_pefts(name, four_bit, tmp_path, capsys):
    make_checkpoint(name, tmp_path)
    options = {}
    if four_bit:
        options["quantization_config"] = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, **options)
    model = load_folder(tmp_path, quant_config=QuantConfig() if four_bit else None)
    config = adapted(model, r=3, target_modules=("q_proj", "up_proj"))
    twin = peft_twin(theirs, model, config)
    capsys.readouterr()
    twin.print_trainable_parameters()
    assert capsys.readouterr().out == format_trainable_parameters(*get_nb_trainable_parameters(model)) + "\n"
    assert twin.get_nb_trainable_parameters() == get_nb_trainable_parameters(model)


# ---- targets ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "targets",
    [
        "all-linear", SEVEN, ("q_proj",), ("mlp.up_proj", "o_proj"), ("self_attn.v_proj", "lm_head"),
        ("up_proj", "up_proj"),
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("name", FAMILIES[:3])
def test_targets_are_those_of_peft(name, targets, tmp_path):
    theirs, model = make_pair(name, tmp_path)
    config = adapted(model, r=2, target_modules=targets)
    twin = peft_twin(theirs, model, config)  # compares the names
    assert len(peft_parameters(twin)) == len(adapter_matrices(model))


def test_unknown_targets_are_named_with_those_that_exist(tmp_path):
    theirs, model = make_pair("llama", tmp_path)
    message = (
        "target_modules: 'proj', 'qproj' matches no linear layer of this llama model. The names that exist: down_proj, "
        "embed_tokens, gate_proj, k_proj, lm_head, o_proj, q_proj, up_proj, v_proj (or 'all-linear')"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        adapted(model, target_modules=("q_proj", "proj", "qproj"))
    assert adapters(model) == []  # nothing was changed
    with pytest.raises(ValueError):  # as in PEFT
        peft.get_peft_model(theirs, peft.LoraConfig(target_modules=["proj"]))


@pytest.mark.parametrize(
    "options, error, message",
    [
        (dict(r=0), ValueError, "the rank r must be larger than 0, found 0"),
        (dict(r=-4), ValueError, "the rank r must be larger than 0, found -4"),
        (dict(r=True), TypeError, "the rank r must be an integer, found True"),
        (dict(r=2.5), TypeError, "2.5"),
        (dict(lora_dropout=1.0), ValueError, r"lora_dropout must lie in \[0, 1\), found 1.0"),
        (dict(target_modules=()), ValueError, "target_modules is empty"),
    ],
    ids=str,
)
def test_bad_options_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        LoraConfig(**options)


# ---- the start -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_adapters_start_as_pefts(dtype, tmp_path):
    _, model = make_pair("llama", tmp_path, dtype)
    adapted(model, r=8)
    for name, matrix in adapter_matrices(model).items():
        assert matrix.dtype == np.float32
        if name.endswith("lora_B"):
            assert not np.any(matrix)
            continue
        bound = matrix.shape[1] ** -0.5  # kaiming_uniform with a = sqrt(5)
        assert 0.95 * bound < np.abs(matrix).max() <= bound
        assert np.std(matrix) == pytest.approx(bound / 3**0.5, rel=0.1)
        assert abs(np.mean(matrix)) < 0.15 * bound


def test_a_start_depends_on_the_key_and_the_name_only(tmp_path):
    def start(name, seed=0, **options):
        _, model = make_pair(name, tmp_path / f"{name}-{seed}-{len(options)}")
        adapted(model, seed, r=4, **options)
        return adapter_matrices(model)

    whole = start("qwen2")
    assert len({matrix.tobytes() for name, matrix in whole.items() if name.endswith("lora_A")}) == len(whole) // 2
    other_runs = start("qwen2-windows")  # the same shapes, stacked in another way
    few = start("qwen2", target_modules=("up_proj", "k_proj"))
    for matrices in (other_runs, few):
        for name, matrix in matrices.items():
            np.testing.assert_array_equal(matrix, whole[name])
    other_key = start("qwen2", seed=1)
    assert not any(np.array_equal(other_key[name], whole[name]) for name in whole if name.endswith("lora_A"))


@pytest.mark.parametrize("quant_config", [None, QuantConfig()], ids=["dense", "nf4"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_fresh_adapter_changes_no_bit(dtype, quant_config, tmp_path):
    make_checkpoint("qwen3", tmp_path)
    model = load_folder(tmp_path, dtype, quant_config)
    ids = jnp.asarray(random_ids(2, 9))
    before = model(ids)
    adapted(model, r=4)
    np.testing.assert_array_equal(model(ids), before)


# ---- what an adapter computes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [dict(r=4, lora_alpha=7), dict(r=5, lora_alpha=0.5, use_rslora=True)], ids=str)
@pytest.mark.parametrize("name", ["llama-biases", "mistral", "qwen2-windows", "qwen3"])
def test_logits_equal_peft(name, options, tmp_path):
    theirs, model = make_pair(name, tmp_path)
    config = adapted(model, **options)
    randomise_adapters(model)
    ids = random_ids(2, 12)
    plain = model(jnp.asarray(ids))
    with torch.no_grad():
        without = theirs(torch.tensor(ids).long()).logits
        expected = peft_twin(theirs, model, config)(torch.tensor(ids).long()).logits
    assert relative_error(plain, expected) < 2e-5
    assert relative_error(plain, without) > 1e-3


def test_scaling():
    assert LoraConfig(r=16, lora_alpha=8).scaling == 0.5
    assert LoraConfig(r=16, lora_alpha=8, use_rslora=True).scaling == 2.0


def test_delta_weight_equals_peft(tmp_path):
    theirs, model = make_pair("qwen2-windows", tmp_path)
    config = adapted(model, r=4, lora_alpha=7, use_rslora=True)
    randomise_adapters(model)
    twin = peft_twin(theirs, model, config)
    for linear in adapters(model):
        for i, name in enumerate(linear.names()):
            module = twin.get_submodule(f"base_model.model.{name}")
            found = delta_weight(linear.node, i if linear.layers else None)
            assert relative_error(found, module.get_delta_weight("default").detach()) < 1e-6


# ---- what learns -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quant_config", [None, QuantConfig()], ids=["dense", "nf4"])
def test_only_adapters_learn(quant_config, tmp_path):
    make_checkpoint("qwen2-windows", tmp_path)
    model = load_folder(tmp_path, quant_config=quant_config)
    adapted(model, r=4)
    randomise_adapters(model)
    graphdef, trainable, frozen = partition(model)
    is_variable = lambda node: isinstance(node, nnx.Variable)
    assert {type(v) for v in jax.tree.leaves(trainable, is_leaf=is_variable)} == {LoraParam}
    assert not any(isinstance(v, nnx.Param) for v in jax.tree.leaves(frozen, is_leaf=is_variable))
    assert sum(leaf.size for leaf in jax.tree.leaves(trainable)) == get_nb_trainable_parameters(model)[0]

    ids = jnp.asarray(random_ids(2, 9))
    np.testing.assert_array_equal(nnx.merge(graphdef, trainable, frozen)(ids), model(ids))
    batch = {"input_ids": ids, "labels": ids}
    gradient = jax.jit(jax.grad(lambda t: causal_lm_loss(nnx.merge(graphdef, t, frozen), batch)[0]))(trainable)
    assert jax.tree.structure(gradient) == jax.tree.structure(trainable)
    assert all(np.any(leaf) for leaf in jax.tree.leaves(gradient))


# ---- dropout ---------------------------------------------------------------------------------------------------------


def test_dropout_keeps_the_mean_and_needs_a_key():
    x = jnp.ones((1000, 500))
    for rate in (0.1, 0.5):
        dropped = dropout(x, rate, jax.random.key(0))
        assert float(dropped.mean()) == pytest.approx(1.0, abs=0.01)
        assert float((dropped == 0).mean()) == pytest.approx(rate, abs=0.01)
        assert set(np.unique(dropped)) == {0.0, np.float32(1.0) / np.float32(1.0 - rate)}
        assert not np.array_equal(dropped, dropout(x, rate, jax.random.key(1)))
        assert dropout(x, rate, None) is x
    assert dropout(x, 0.0, jax.random.key(0)) is x


def test_dropout_acts_on_the_adapter_alone(tmp_path):
    _, model = make_pair("llama", tmp_path)
    ids = jnp.asarray(random_ids(2, 9))
    hidden = jax.jit(lambda model, key: model.hidden_states(ids, key=key)[0])
    base = hidden(model, None)
    adapted(model, r=4, lora_dropout=0.5)
    # B is zero: the adapter adds nothing, dropped or not.
    np.testing.assert_array_equal(hidden(model, jax.random.key(0)), base)
    randomise_adapters(model)
    one, again, other = (hidden(model, jax.random.key(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(one, again)
    assert not np.array_equal(one, other)
    assert not np.array_equal(one, hidden(model, None))
