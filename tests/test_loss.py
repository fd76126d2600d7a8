"""The loss against torch's cross entropy, and that the logits and the head's gradient never exist."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from helpers import (
    VOCAB,
    load_folder,
    make_checkpoint,
    peft_parameters,
    peft_twin,
    random_ids,
    randomise_adapters,
    relative_error,
)

from jaxlora.config import LoraConfig
from jaxlora.converters.huggingface import model_config
from jaxlora.kernels.cross_entropy import chunk_length, linear_cross_entropy
from jaxlora.lora import add_adapters, partition
from jaxlora.loss import causal_lm_loss, shift_labels
from jaxlora.model import CausalLM, named_nodes
from jaxlora.variables import LoraParam


def labelled(batch, length, seed=0):
    ids = random_ids(batch, length, seed)
    labels = np.where(np.random.default_rng(seed + 1).random(ids.shape) < 0.3, -100, ids).astype(np.int32)
    return jnp.asarray(ids), jnp.asarray(labels)


@pytest.mark.parametrize("name", ["qwen3", "llama-biases"], ids=["tied", "untied"])
def test_loss_of_a_model_equals_transformers(name, tmp_path):
    theirs = make_checkpoint(name, tmp_path)
    model = load_folder(tmp_path)
    ids, labels = labelled(3, 11)
    expected = theirs(torch.tensor(np.asarray(ids)).long(), labels=torch.tensor(np.asarray(labels)).long()).loss
    total, weight, metrics = jax.jit(causal_lm_loss)(model, {"input_ids": ids, "labels": labels})
    assert int(weight) == np.sum(np.asarray(labels)[:, 1:] != -100)
    assert float(total / weight) == pytest.approx(expected.item(), rel=1e-6)
    assert metrics == {}


def test_loss_and_gradient_with_an_adapter_on_the_head_equal_peft(tmp_path):
    theirs = make_checkpoint("llama", tmp_path)
    model = load_folder(tmp_path)
    config = LoraConfig(r=4, lora_alpha=7, target_modules=("lm_head", "down_proj"))
    add_adapters(model, config, jax.random.key(0))
    randomise_adapters(model)
    twin = peft_twin(theirs, model, config)
    ids, labels = labelled(3, 11)
    loss = twin(torch.tensor(np.asarray(ids)).long(), labels=torch.tensor(np.asarray(labels)).long()).loss
    loss.backward()

    graphdef, trainable, frozen = partition(model)

    @jax.value_and_grad
    def mean_loss(trainable):
        total, weight, _ = causal_lm_loss(nnx.merge(graphdef, trainable, frozen), {"input_ids": ids, "labels": labels})
        return total / weight

    found, gradient = jax.jit(mean_loss)(trainable)
    assert found == pytest.approx(loss.item(), rel=1e-6)
    parameters, seen = peft_parameters(twin), 0
    for linear in named_nodes(nnx.merge(graphdef, gradient, frozen), LoraParam):
        for i, name in enumerate(linear.names()):
            value = linear.node.get_value()
            assert relative_error(value[i] if linear.layers else value, parameters[name].grad) < 1e-5, name
            seen += 1
    assert seen == len(parameters)


def test_logits_with_an_adapter_on_the_head_equal_peft(tmp_path):
    theirs = make_checkpoint("llama", tmp_path)
    model = load_folder(tmp_path)
    config = LoraConfig(r=4, lora_alpha=7, target_modules=("lm_head",))
    add_adapters(model, config, jax.random.key(0))
    randomise_adapters(model)
    ids, _ = labelled(2, 9)
    with torch.no_grad():
        expected = peft_twin(theirs, model, config)(torch.tensor(np.asarray(ids)).long()).logits
    assert relative_error(model(ids), expected) < 2e-5


def test_labels_are_shifted_within_a_segment_only():
    labels = jnp.array([[10, 11, 12, 20, 21, -100, -100], [10, -100, 12, 13, 20, 30, 31]], jnp.int32)
    segments = jnp.array([[1, 1, 1, 2, 2, 0, 0], [1, 1, 1, 1, 2, 3, 3]], jnp.int32)
    x = -100
    np.testing.assert_array_equal(shift_labels(labels, segments), [[11, 12, x, 21, x, x, x], [x, 12, 13, x, x, 31, x]])
    np.testing.assert_array_equal(shift_labels(labels), [[11, 12, 20, 21, x, x, x], [x, 12, 13, 20, 30, 31, x]])


def test_packed_loss_is_the_sum_over_documents(tmp_path):
    make_checkpoint("mistral", tmp_path)
    model = load_folder(tmp_path)
    first, second = labelled(1, 9, 1), labelled(1, 6, 2)
    packed = {
        "input_ids": jnp.concatenate([first[0], second[0]], 1),
        "labels": jnp.concatenate([first[1], second[1]], 1),
        "segment_ids": jnp.array([[1] * 9 + [2] * 6], jnp.int32),
    }
    loss = jax.jit(causal_lm_loss)
    parts = [loss(model, {"input_ids": ids, "labels": labels})[:2] for ids, labels in (first, second)]
    total, weight, _ = loss(model, packed)
    assert float(total) == pytest.approx(sum(float(t) for t, _ in parts), rel=1e-6)
    assert weight == sum(w for _, w in parts)


# ---- what the compiled program holds ---------------------------------------------------------------------------------


def largest_float_buffer(compiled):
    """Elements of the largest floating buffer that a compiled program names."""
    shapes = re.findall(r"\b(?:f32|bf16|f16)\[([\d,]+)\]", compiled.as_text())
    return max(math.prod(int(n) for n in shape.split(",")) for shape in shapes)


def test_the_compiled_kernel_has_no_full_logits():
    tokens, features, vocab, chunk = 1024, 16, 5000, 128

    def loss(hidden, weight, labels, chunk):
        return linear_cross_entropy(hidden, weight, labels, chunk)

    def largest(chunk, learns):
        arguments = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((tokens, features), (vocab, features))]
        labels = jax.ShapeDtypeStruct((tokens,), jnp.int32)
        gradient = jax.jit(jax.grad(loss, argnums=learns), static_argnums=3)
        return largest_float_buffer(gradient.lower(*arguments, labels, chunk).compile())

    for learns in ((0,), (0, 1)):
        assert largest(chunk, learns) <= chunk * vocab
        assert largest(tokens, learns) >= tokens * vocab  # so the measure sees full logits where there are some


def real_vocabulary_step(targets):
    """The gradient of a one-layer model with Llama 3's vocabulary on 2 x 1024 tokens, lowered without any weights."""
    config = model_config(
        dict(model_type="llama", vocab_size=128_256, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
             num_attention_heads=4, num_key_value_heads=2)
    )  # fmt: skip

    def create():
        model = CausalLM(config, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
        add_adapters(model, LoraConfig(r=4, target_modules=targets), jax.random.key(0))
        return model

    graphdef, trainable, frozen = partition(nnx.eval_shape(create))
    ids = jax.ShapeDtypeStruct((2, 1024), jnp.int32)

    def gradient(trainable, frozen, ids):
        batch = {"input_ids": ids, "labels": ids}
        return jax.grad(lambda t: causal_lm_loss(nnx.merge(graphdef, t, frozen), batch)[0])(trainable)

    return jax.jit(gradient).trace(trainable, frozen, ids)


def test_a_step_with_a_real_vocabulary_has_no_full_logits():
    compiled = real_vocabulary_step(("q_proj",)).lower().compile()
    chunk = chunk_length(2048, 128_256)
    assert chunk <= 512
    assert largest_float_buffer(compiled) <= chunk * 128_256


def test_a_frozen_head_gets_no_gradient():
    # A product of the head's shape is its gradient. The jaxpr is what is asked of XLA, before it drops anything.
    def products(targets):
        return re.findall(r":\w+\[(128256,\d+)\] = dot_general", str(real_vocabulary_step(targets).jaxpr))

    assert products(("q_proj",)) == []
    assert products(("q_proj", "lm_head")) != []  # so the pattern sees one where there is one


def test_loss_is_uniform_at_zero_weights(tmp_path):
    make_checkpoint("llama", tmp_path)
    model = load_folder(tmp_path)
    model.lm_head.weight.set_value(jnp.zeros_like(model.lm_head.weight.get_value()))
    ids, _ = labelled(1, 8)
    total, weight, _ = jax.jit(causal_lm_loss)(model, {"input_ids": ids, "labels": ids})
    assert float(total / weight) == pytest.approx(math.log(VOCAB), rel=1e-6)
