"""Quantisation-aware training: rounding as torchao rounds, and a model that computes what is served afterwards."""

import bitsandbytes.functional as bnb
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from helpers import load_folder, make_checkpoint, randomise_adapters
from torchao.quantization.granularity import PerRow
from torchao.quantization.qat import (
    Float8FakeQuantizeConfig,
    Float8FakeQuantizer,
)
from torchao.quantization.qat.fake_quantize_config import Int4WeightFakeQuantizeConfig
from torchao.quantization.qat.fake_quantizer import Int4WeightFakeQuantizer
from walk import IDS, largest_difference, train_ours

from jaxlora import FastLanguageModel, lora
from jaxlora.config import LoraConfig, QuantConfig
from jaxlora.kernels.fake_quant import SCHEMES, fake_quantize_input, fake_quantize_weight
from jaxlora.layers import Linear
from jaxlora.model import named_nodes
from jaxlora.quant import QuantizedArray, dequantize

WIDE = dict(hidden_size=128, intermediate_size=256, head_dim=32, num_attention_heads=4)
pytestmark = pytest.mark.filterwarnings("ignore:.*has no tokenizer files:UserWarning")


def torchaos(scheme):
    """torchao's fake quantiser of weights; bitsandbytes' for int8."""
    if scheme == "int8":
        return lambda w: bnb.int8_vectorwise_dequant(*bnb.int8_vectorwise_quant(w.half())[:2])
    if scheme == "fp8-fp8":
        return Float8FakeQuantizer(Float8FakeQuantizeConfig(torch.float8_e4m3fn, PerRow()))
    inputs = torch.float8_e4m3fn if scheme == "fp8-int4" else torch.bfloat16
    return Int4WeightFakeQuantizer(Int4WeightFakeQuantizeConfig(128, inputs))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_values_are_torchaos(scheme):
    w = np.random.default_rng(0).standard_normal((24, 256)).astype(np.float32)
    w[4, 7] = 50.0
    expected = torchaos(scheme)(torch.from_numpy(w)).numpy()
    found = np.asarray(fake_quantize_weight(jnp.asarray(w), scheme))
    step = np.abs(expected - w).max()
    assert np.mean(np.abs(found - expected) > 1e-5) < 5e-3  # ties, which go to the one side here and to the other there
    assert 1e-3 < step and np.abs(found - w).max() < 1.01 * step
    inputs = torchaos("fp8-fp8")(torch.from_numpy(w)).numpy() if scheme.startswith("fp8") else w
    np.testing.assert_allclose(fake_quantize_input(jnp.asarray(w), scheme), inputs, atol=1e-5)
    for function in (fake_quantize_weight, fake_quantize_input):  # of zeros, torchao's float8 makes NaN
        np.testing.assert_allclose(function(jnp.zeros((2, 256)), scheme), 0.0, atol=1e-5)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_gradient_is_the_identitys(scheme):
    w = jnp.asarray(np.random.default_rng(0).standard_normal((4, 128)), jnp.float32)
    for function in (fake_quantize_weight, fake_quantize_input):
        np.testing.assert_array_equal(jax.grad(lambda w, f=function: jnp.sum(3 * f(w, scheme)))(w), jnp.full_like(w, 3))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wide")
    make_checkpoint("llama-biases", folder, **WIDE)
    return folder


@pytest.mark.parametrize("scheme, use_dora", [*((scheme, False) for scheme in SCHEMES), ("int4", True)])
def test_what_is_served_computes_what_was_trained(scheme, use_dora, checkpoint, tmp_path):
    """Merged (in 32 bit here), and quantised afterwards: the logits of the model that was trained."""
    model, _ = FastLanguageModel.from_pretrained(checkpoint, load_in_16bit=True, dtype="float32")
    model = FastLanguageModel.get_peft_model(
        model, r=4, qat_scheme=scheme, use_dora=use_dora, target_modules="all-linear"
    )
    randomise_adapters(model)
    first = next(x.node for x in lora.adapters(model))
    before = lora.delta_weight(first, 0)
    train_ours(model)
    assert largest_difference(lora.delta_weight(first, 0), before) > 1e-3
    trained = model(jnp.asarray(IDS))
    model.save_pretrained_merged(tmp_path / "merged", verify=False)
    plain = load_folder(tmp_path / "merged")(jnp.asarray(IDS))
    modes = {"int8": {"load_in_8bit": True}, "fp8-fp8": {"load_in_fp8": True}}
    options = {"dtype": "float32", **modes.get(scheme, {"load_in_16bit": True})}
    served, _ = FastLanguageModel.from_pretrained(tmp_path / "merged", **options)
    for linear in (x for x in named_nodes(served, Linear) if x.layers):
        weight = linear.node.weight.get_value()
        if isinstance(weight, QuantizedArray):
            weight = dequantize(weight)
        else:
            # torchao's last bits decide too many ties of fp8-int4.
            rounding = torchaos(scheme) if scheme == "int4" else our_int4
            rounded = [rounding(torch.from_numpy(np.array(layer))).numpy() for layer in weight]
            weight = jnp.asarray(np.stack(rounded))
        linear.node.weight.set_value(weight)
        linear.node.__class__ = RoundsInputs if scheme.startswith("fp8") else Linear
    largest = float(jnp.abs(plain).max())
    whole = largest_difference(plain, trained)
    assert whole > 5e-3 * largest
    # A last bit decides a tie here and there, of a weight or of one input in fp8, which then moves the tokens after it.
    of_tokens = np.sort(np.abs(served(jnp.asarray(IDS)) - trained).max(axis=-1), axis=None)
    assert of_tokens[: of_tokens.size // 2].max() < 1e-3 * largest
    assert of_tokens.max() < 0.2 * whole


def our_int4(w):
    return torch.from_numpy(np.array(fake_quantize_weight(jnp.asarray(w.numpy()), "fp8-int4")))


class RoundsInputs(Linear):
    """What a kernel for float8 does: the input of each token is rounded to float8 before the product."""

    def has_base_product(self, tokens):
        return False

    def _product(self, x, key, base):
        return x_rounded(x) @ self.weight.get_value().T


def x_rounded(x):
    scale = jnp.max(jnp.abs(x), axis=-1, keepdims=True) / 448.0
    return (x / scale).astype(jnp.float8_e4m3fn).astype(x.dtype) * scale


def test_full_finetuning_and_a_quantised_base(checkpoint):
    model, _ = FastLanguageModel.from_pretrained(checkpoint, full_finetuning=True, dtype="float32", qat_scheme="int8")
    before = np.array(model.model.layers[0].period[0].mlp.up_proj.weight.get_value())
    train_ours(model)
    assert np.all(np.any(np.asarray(model.model.layers[0].period[0].mlp.up_proj.weight.get_value()) != before, axis=-1))
    quantised = load_folder(checkpoint, quant_config=QuantConfig())
    lora.prepare_qat(quantised, "int4")
    lora.add_adapters(quantised, LoraConfig(r=2), jax.random.key(0))
    graphdef, trainable, frozen = lora.partition(quantised)
    gradient = jax.grad(lambda t: jnp.sum(nnx.merge(graphdef, t, frozen)(jnp.asarray(IDS)) ** 2))(trainable)
    assert any(np.any(leaf) for leaf in jax.tree.leaves(gradient))


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(qat_scheme="int3"), "qat_scheme 'int3' is not one of int8, int4, fp8-fp8, fp8-int4"),
        (dict(qat_scheme="int8", lora_dropout=0.1), "into which dropout cannot go: pass lora_dropout=0"),
        (dict(finetune_last_n_layers=4), "must be from 1 to the model's 3 layers, found 4"),
        (dict(finetune_last_n_layers=1, layers_to_transform=[0]), "both name layers: choose one"),
    ],
    ids=str,
)
def test_options_that_do_not_work(options, message, checkpoint):
    model, _ = FastLanguageModel.from_pretrained(checkpoint, load_in_16bit=True)
    with pytest.raises(ValueError, match=message):
        FastLanguageModel.get_peft_model(model, **options)
    assert not lora.adapters(model)
    with pytest.raises(ValueError, match="with adapters it goes to get_peft_model"):
        FastLanguageModel.from_pretrained(checkpoint, qat_scheme="int8")


def test_rows_that_are_not_whole_groups(tmp_path):
    make_checkpoint("llama", tmp_path)
    with pytest.raises(ValueError, match="shares a scale among 128 weights of a row, and .* has rows of 80"):
        lora.prepare_qat(load_folder(tmp_path), "int4")


def test_the_last_layers_and_what_changes_nothing(checkpoint):
    model, _ = FastLanguageModel.from_pretrained(checkpoint, load_in_16bit=True, max_seq_length=32)
    with pytest.warns(UserWarning, match="max_seq_length=64 changes nothing here: from_pretrained made it 32"):
        with pytest.warns(UserWarning, match="temporary_location changes nothing"):
            model = FastLanguageModel.get_peft_model(
                model, finetune_last_n_layers=2, max_seq_length=64, temporary_location="buffers"
            )
    assert all(x.node.lora_ranks == (0, 16, 16) for x in lora.adapters(model))
