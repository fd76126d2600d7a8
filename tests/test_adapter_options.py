"""What learns beside A and B: magnitudes (DoRA), biases, whole modules, embeddings, and heads that are tied to them."""

import copy
import itertools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import transformers
from flax import nnx
from helpers import TINY, load_folder, make_checkpoint, randomise_adapters, torch_model
from walk import BLOCKS, IDS, largest_difference, logits_of, peft_model, save_peft, train_ours, walk

from jaxlora import lora
from jaxlora.config import LoraConfig, QuantConfig
from jaxlora.converters import peft as ours
from jaxlora.converters.export import save_merged
from jaxlora.converters.huggingface import model_config
from jaxlora.kernels.dropout import dropout
from jaxlora.layers import Linear
from jaxlora.loss import causal_lm_loss
from jaxlora.model import CausalLM, named_nodes
from jaxlora.quant import QuantizedArray, dequantize
from jaxlora.variables import Adapted

OPTIONS = {
    "dora": ("llama", dict(use_dora=True)),
    "dora-layers": ("llama-biases", dict(use_dora=True, target_modules=["layers.1.mlp.up_proj", "o_proj"], bias="all")),
    "dora-ranks": ("qwen3", dict(use_dora=True, rank_pattern={r"layers\.1\..*": 2}, use_rslora=True)),
    "bias-all": ("llama-biases", dict(bias="all")),
    "bias-lora_only": ("llama-biases", dict(bias="lora_only", target_modules=["q_proj", "layers.2.mlp.down_proj"])),
    "saved-head": ("llama", dict(modules_to_save=["lm_head", "embed_tokens"])),
    "saved-norms": ("llama", dict(modules_to_save=["layers.1.input_layernorm", "model.norm"])),
    "saved-block": ("llama-biases", dict(modules_to_save=["layers.0.mlp"], target_modules=["q_proj", "v_proj"])),
    "embedding": ("llama", dict(target_modules=["embed_tokens", "q_proj", "lm_head"])),
    "embedding-dora": ("llama", dict(target_modules=["embed_tokens", "k_proj", "lm_head"], use_dora=True)),
    "tied-head": ("llama-tied", dict(target_modules=["lm_head", "q_proj"])),
    "tied-embedding": ("llama-tied", dict(target_modules=["embed_tokens", "q_proj"])),
    "tied-saved-embedding": ("llama-tied", dict(modules_to_save=["embed_tokens"])),
    "tied-saved-head": ("llama-tied", dict(modules_to_save=["lm_head"])),
    "tied-saved-both": ("llama-tied", dict(modules_to_save=["lm_head", "embed_tokens"])),
    "tied-saved-follows": ("llama-tied", dict(modules_to_save=["embed_tokens"], ensure_weight_tying=True)),
    "tied-saved-head-follows": ("llama-tied", dict(modules_to_save=["lm_head"], ensure_weight_tying=True)),
}
# PEFT warns of what a tied head means for other exporters than ours.
pytestmark = pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")


@pytest.mark.parametrize("option", OPTIONS)
def test_options_walk_around(option, tmp_path):
    name, options = OPTIONS[option]
    walk(name, tmp_path, **options)


def test_a_tied_head_follows_the_embeddings_adapter(tmp_path):
    """PEFT trains two there, which share their memory; here it is one, which gets the gradients of both."""
    options = dict(target_modules=["embed_tokens", "q_proj"], ensure_weight_tying=True)
    theirs = peft_model(make_checkpoint("llama-tied", tmp_path / "base"), **options)
    save_peft(theirs, tmp_path / "theirs")
    model = load_folder(tmp_path / "base")
    config = ours.load_adapter(model, tmp_path / "theirs")
    assert largest_difference(model(jnp.asarray(IDS)), logits_of(theirs)) < 5e-5
    before = ours.adapter_tensors(model)
    train_ours(model)
    trained = ours.adapter_tensors(model)
    moved = {key: np.abs(value - before[key]).max() for key, value in trained.items()}
    assert min(moved.values()) > 0
    head, table = "base_model.model.lm_head.lora_A.weight", "base_model.model.model.embed_tokens.lora_embedding_B"
    np.testing.assert_array_equal(trained[head], trained[table].T)
    ours.save_adapter(model, tmp_path / "ours", config=config, base=str(tmp_path / "base"))
    again = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "ours", attn_implementation="eager")
    assert largest_difference(model(jnp.asarray(IDS)), logits_of(again)) < 5e-5
    save_merged(model, tmp_path / "merged", base=tmp_path / "base")
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", attn_implementation="eager")
    assert merged.config.tie_word_embeddings
    assert largest_difference(model(jnp.asarray(IDS)), logits_of(merged)) < 5e-5


def fresh(folder, quant_config=None, **options):
    model = load_folder(folder, quant_config=quant_config)
    lora.add_adapters(model, LoraConfig(**{"target_modules": BLOCKS, "r": 4, **options}), jax.random.key(0))
    return model


@pytest.mark.parametrize(
    "option",
    ["dora-layers", "bias-lora_only", "saved-block", "embedding-dora", "tied-saved-both", "tied-saved-follows"],
)
def test_a_fresh_one_changes_nothing_and_counts_as_pefts(option, tmp_path):
    name, options = OPTIONS[option]
    theirs = peft.get_peft_model(
        make_checkpoint(name, tmp_path), peft.LoraConfig(**{"target_modules": BLOCKS, "r": 4, **options})
    )
    plain, model = load_folder(tmp_path), fresh(tmp_path, **options)
    assert largest_difference(model(jnp.asarray(IDS)), plain(jnp.asarray(IDS))) < 1e-5
    assert lora.get_nb_trainable_parameters(model) == theirs.get_nb_trainable_parameters()
    shapes = {key: value.shape for key, value in ours.adapter_tensors(model).items()}
    state = peft.get_peft_model_state_dict(theirs, save_embedding_layers=False)
    assert shapes == {key: tuple(value.shape) for key, value in state.items()}


@pytest.mark.parametrize("scheme", ["nf4", "int8"])
def test_dora_on_quantised_weights(scheme, tmp_path):
    """Norms of the dequantised weight, and the same logits as the same adapter on that weight unquantised."""
    make_checkpoint("llama", tmp_path)
    model = fresh(tmp_path, QuantConfig(scheme=scheme), use_dora=True)
    dense = fresh(tmp_path)
    for quantised, plain in zip(named_nodes(model, Linear), named_nodes(dense, Linear), strict=True):
        weight = quantised.node.weight.get_value()
        if isinstance(weight, QuantizedArray):
            plain.node.weight.set_value(dequantize(weight, jnp.float32))
    randomise_adapters(model)
    for x, y in zip(lora.adapters(model), lora.adapters(dense), strict=True):
        x.node.lora_magnitude.set_value(x.node.lora_magnitude.get_value() * 1.25)
        for layer in range(x.node.stack):
            merged = next(itertools.islice(lora.layer_adapters(model, x), layer, None)).merge(
                np.asarray(y.node.weight.get_value()[layer])
            )
            y.node.weight.set_value(y.node.weight.get_value().at[layer].set(merged))
        y.node.without_adapter()
    assert largest_difference(model(jnp.asarray(IDS)), dense(jnp.asarray(IDS))) < 5e-5


def test_dora_with_dropout(tmp_path):
    """Without a key nothing is dropped; with one, both products read the dropped input, as in PEFT."""
    make_checkpoint("llama", tmp_path)
    model = fresh(tmp_path, use_dora=True, lora_dropout=0.5)
    linear = next(x.node for x in lora.adapters(model))
    one = jax.tree.map(lambda leaf: leaf[0], linear)
    x, key = jnp.asarray(np.random.default_rng(0).normal(size=(3, linear.in_features)), jnp.float32), jax.random.key(1)
    one.lora_magnitude.set_value(one.lora_magnitude.get_value() * 1.5)
    dropped = dropout(x, 0.5, key)
    expected = x @ one.weight.get_value().T + 0.5 * (dropped @ one.weight.get_value().T)  # B is zero
    np.testing.assert_allclose(one(x, key), expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(one(x), 1.5 * (x @ one.weight.get_value().T), rtol=1e-5, atol=1e-6)


def test_padding_of_magnitudes_and_copies_is_never_seen_and_never_learns(tmp_path):
    make_checkpoint("llama-biases", tmp_path)
    model = fresh(
        tmp_path, use_dora=True, target_modules=["layers.1.mlp.up_proj"], bias="lora_only",
        modules_to_save=["layers.2.input_layernorm"],
    )  # fmt: skip
    up = next(x.node for x in lora.adapters(model))
    norm = model.model.layers[0].period[0].input_layernorm
    before = model(jnp.asarray(IDS))
    for variable, used in ((up.lora_magnitude, 1), (up.trained_bias.value, 1), (norm.trained_weight.value, 2)):
        value = variable.get_value()
        variable.set_value(jnp.full_like(value, 1e3).at[used].set(value[used]))
    np.testing.assert_array_equal(model(jnp.asarray(IDS)), before)
    graphdef, trainable, frozen = lora.partition(model)
    batch = {"input_ids": jnp.asarray(IDS), "labels": jnp.asarray(IDS)}
    nnx.update(model, jax.grad(lambda t: causal_lm_loss(nnx.merge(graphdef, t, frozen), batch)[0])(trainable))
    for variable, used in ((up.lora_magnitude, 1), (up.trained_bias.value, 1), (norm.trained_weight.value, 2)):
        gradient = np.asarray(variable.get_value())
        assert np.any(gradient[used]) and not np.any(np.delete(gradient, used, axis=0))


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(modules_to_save=["lm_head", "score"]), r"modules_to_save: 'score' matches no module .*embed_tokens"),
        (dict(modules_to_save=["q_proj"]), r"q_proj, .*would learn as a whole and has an adapter too"),
        (dict(modules_to_save=["up_proj"], target_modules=["q_proj"]), r"up_proj is quantised, .*load_in_16bit=True"),
        (dict(bias="some"), "bias 'some' is not one of none, all, lora_only"),
        (dict(modules_to_save="lm_head"), "must be a list of names, found the text 'lm_head'"),
        (dict(loftq_config={"loftq_bits": 4}), 'needs init_lora_weights="loftq", found True'),
        (dict(init_lora_weights="loftq", loftq_config={"loftq_bits": 2}), "loftq_bits must be 4 or 8, found 2"),
        (dict(init_lora_weights="loftq", loftq_config={"bits": 4}), "has loftq_bits and loftq_iter, found bits"),
        (dict(init_lora_weights="loftq"), "load the model with load_in_16bit=True"),
    ],
    ids=str,
)  # fmt: skip
def test_options_that_do_not_work(options, message, tmp_path):
    make_checkpoint("llama", tmp_path)
    with pytest.raises((TypeError, ValueError), match=message):
        fresh(tmp_path, QuantConfig(), **options)


def test_tying_what_is_not_tied_warns(tmp_path):
    make_checkpoint("llama", tmp_path)
    with pytest.warns(UserWarning, match="ensure_weight_tying changes nothing: the model's head is not tied"):
        fresh(tmp_path, ensure_weight_tying=True)


# ---- Every family ----------------------------------------------------------------------------------------------------

ONE_OF_EACH = {model_type: name for name, (model_type, _) in reversed(TINY.items())}
COUNTED = {
    "dora-bias": dict(use_dora=True, bias="all"),
    "saved": dict(modules_to_save=["norm", "lm_head"], bias="lora_only"),
    "tables": dict(use_rslora=True, rank_pattern={r".*\.1\..*": 2}),
}


# Biases and norms of routers, experts and mixers.
WITH_MIXERS = ("falcon_h1", "qwen3_5_text", "qwen3_5_moe_text")
UNCOVERED = {("gpt_oss", "dora-bias"), *itertools.product(WITH_MIXERS, ["dora-bias", "saved"])}


@pytest.mark.parametrize("option", COUNTED)
@pytest.mark.parametrize("model_type", ONE_OF_EACH)
def test_counts_of_every_family_equal_pefts(model_type, option):
    """Given the same list of modules: all of the blocks, and for "tables" the embedding and the head."""
    theirs = torch_model(ONE_OF_EACH[model_type])
    hf_config = theirs.config.to_dict()
    model = CausalLM(model_config(hf_config), rngs=nnx.Rngs(0), hf_config=hf_config)
    # PEFT 0.21 makes targets of the experts out of "gate_proj" and its kin in a mixture of experts.
    wanted = "self_attn" if model.config.num_experts else ""
    targets = sorted({name for x in named_nodes(model, Linear) if x.layers for name in x.names() if wanted in name})
    if option == "tables":
        targets += [x.name for x in named_nodes(model, Adapted) if not x.layers]
    options = dict(target_modules=targets, r=3, **copy.deepcopy(COUNTED[option]))  # PEFT adds to patterns
    if (model_type, option) in UNCOVERED:
        with pytest.raises(ValueError, match="which cannot be trained beside adapters here"):
            lora.add_adapters(model, LoraConfig(**options), jax.random.key(0))
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tied heads, and of experts, which are not meant
        theirs = peft.get_peft_model(theirs, peft.LoraConfig(**options))
    lora.add_adapters(model, LoraConfig(**options), jax.random.key(0))
    assert lora.get_nb_trainable_parameters(model) == theirs.get_nb_trainable_parameters()
