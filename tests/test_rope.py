"""Rotary embeddings against transformers, for every rope type."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from helpers import TINY, relative_error, torch_model
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from jaxlora.config import ROPE_TYPES, RopeConfig
from jaxlora.converters.huggingface import model_config
from jaxlora.rope import apply_rope, rope_frequencies, rope_tables, segment_positions

ORIGINAL = dict(original_max_position_embeddings=256)
ROPES = {
    "default": dict(rope_type="default"),
    "linear": dict(rope_type="linear", factor=2.5),
    "dynamic": dict(rope_type="dynamic", factor=2.0),
    "llama3.1": dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, **ORIGINAL),
    "llama3.2": dict(rope_type="llama3", factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0, **ORIGINAL),
    "yarn": dict(rope_type="yarn", factor=4.0, **ORIGINAL),
    "yarn-betas": dict(rope_type="yarn", factor=4.0, beta_fast=16.0, beta_slow=3.0, **ORIGINAL),
    "yarn-not-truncated": dict(rope_type="yarn", factor=4.0, truncate=False, **ORIGINAL),
    "yarn-attention-factor": dict(rope_type="yarn", factor=4.0, attention_factor=0.8, **ORIGINAL),
    "yarn-mscale": dict(rope_type="yarn", factor=40.0, mscale=1.0, mscale_all_dim=0.707, **ORIGINAL),
    "yarn-mscale-zero": dict(rope_type="yarn", factor=40.0, mscale=0.0, mscale_all_dim=0.707, **ORIGINAL),
    "longrope": dict(rope_type="longrope", factor=4.0, **ORIGINAL),
    "longrope-attention-factor": dict(rope_type="longrope", factor=4.0, attention_factor=1.5, **ORIGINAL),
    "yarn-narrow": dict(rope_type="yarn", factor=4.0, beta_fast=1.0, beta_slow=1.0, **ORIGINAL),
}


def configs(rope, head_dim, theta=10_000.0):
    """The same model as transformers' configuration and as ours."""
    if rope["rope_type"] == "longrope":
        pairs = np.arange(head_dim // 2)
        rope = dict(rope, short_factor=(1 + pairs / 50).tolist(), long_factor=(1.5 + pairs / 7).tolist())
    fields = dict(
        vocab_size=8, hidden_size=4 * head_dim, intermediate_size=8, num_hidden_layers=1, num_attention_heads=4,
        head_dim=head_dim, max_position_embeddings=512, rope_parameters=dict(rope, rope_theta=theta),
    )  # fmt: skip
    theirs = transformers.LlamaConfig(**fields)
    return theirs, model_config({"model_type": "llama", **fields})


@pytest.mark.parametrize("name", ROPES)
@pytest.mark.parametrize("head_dim", [8, 64, 128])
@pytest.mark.parametrize("theta", [10_000.0, 500_000.0])
@pytest.mark.parametrize("length", [300, 512, 1500])
def test_tables_equal_transformers(name, head_dim, theta, length):
    theirs, ours = configs(ROPES[name], head_dim, theta)
    positions = np.arange(length, dtype=np.int32)[None]
    cos, sin = LlamaRotaryEmbedding(theirs)(torch.zeros(1), torch.tensor(positions).long())
    found = rope_tables(ours.rope, ours.head_dim, ours.max_position_embeddings, jnp.asarray(positions))
    for table, expected in zip(found, (cos, sin), strict=True):
        assert table.dtype == jnp.float32
        # The frequencies of "dynamic" are made while the program runs, and their last bit is 1e-4 of an angle of 1500.
        atol = 2.5e-7 * length if name == "dynamic" and length > 512 else 1e-5
        np.testing.assert_allclose(table, expected[..., : head_dim // 2], atol=atol, rtol=0)


YARN = dict(rope_type="yarn", factor=4.0, rope_theta=10_000.0, original_max_position_embeddings=64)
LLAMA3 = dict(
    rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, rope_theta=500_000.0,
    original_max_position_embeddings=64,
)  # fmt: skip
FACTORS = dict(short_factor=[1.0 + i / 20 for i in range(16)], long_factor=[1.5 + i / 3 for i in range(16)])


@pytest.mark.parametrize(
    "name, ropes",
    [
        ("gemma3_text", dict(full_attention=YARN, sliding_attention=dict(rope_type="default", rope_theta=7_000.0))),
        ("gemma3_text", dict(full_attention=LLAMA3, sliding_attention=dict(YARN, factor=2.0))),
        ("glm", dict(YARN, partial_rotary_factor=0.6)),
        ("phi3", dict(YARN, rope_type="longrope", partial_rotary_factor=0.4, **FACTORS)),
    ],
)
def test_types_of_layers_and_parts_of_heads_equal_transformers(name, ropes):
    """At positions up to 1500, of a native window of 64."""
    theirs = torch_model(name, rope_parameters=ropes, head_dim=80, hidden_size=480)
    ours = model_config(theirs.config.to_dict())
    positions = np.arange(1500, dtype=np.int32)[None]
    for rope, layer_type in ((ours.rope, "full_attention"), (ours.sliding_rope, "sliding_attention")):
        if rope is not None:
            options = dict(layer_type=layer_type) if name == "gemma3_text" else {}
            expected = theirs.model.rotary_emb(torch.zeros(1), torch.tensor(positions).long(), **options)
            found = rope_tables(rope, ours.head_dim, ours.max_position_embeddings, jnp.asarray(positions))
            pairs = int(80 * rope.partial_rotary_factor) // 2
            for table, other in zip(found, expected, strict=True):
                assert table.shape == (1, 1500, pairs)
                np.testing.assert_allclose(table, other[..., :pairs], atol=1e-5, rtol=0)
    assert (ours.sliding_rope is None) == (name != "gemma3_text")


@pytest.mark.parametrize("name", [n for n in ROPES if n != "dynamic"])
def test_frequencies_equal_transformers(name):
    theirs, ours = configs(ROPES[name], 128, 500_000.0)
    reference = LlamaRotaryEmbedding(theirs)
    found, factor = rope_frequencies(ours.rope, 128, 512, 7)
    np.testing.assert_allclose(found, reference.inv_freq, rtol=1e-6)
    assert factor == pytest.approx(reference.attention_scaling, rel=1e-7)


def test_dynamic_scaling_leaves_the_native_window_alone():
    _, ours = configs(ROPES["dynamic"], 64)
    _, default = configs(ROPES["default"], 64)
    short = rope_frequencies(ours.rope, 64, 512, 512)[0]
    np.testing.assert_array_equal(short, rope_frequencies(default.rope, 64, 512, 512)[0])
    assert np.all(rope_frequencies(ours.rope, 64, 512, 513)[0][1:] < short[1:])


def test_every_rope_type_has_a_tiny_model():
    types = {model_config(torch_model(name).config.to_dict()).rope.rope_type for name in TINY}
    assert types == set(ROPE_TYPES)


def test_apply_rope_equals_transformers():
    theirs, ours = configs(ROPES["default"], 10)
    positions = np.array([[3, 0, 7, 100, 2], [9, 8, 7, 6, 5]], np.int32)
    x = np.random.default_rng(0).standard_normal((2, 5, 4, 10)).astype(np.float32)
    cos, sin = LlamaRotaryEmbedding(theirs)(torch.zeros(1), torch.tensor(positions).long())
    expected, _ = apply_rotary_pos_emb(torch.tensor(x), torch.tensor(x), cos, sin, unsqueeze_dim=2)
    found = apply_rope(jnp.asarray(x), *rope_tables(ours.rope, 10, 512, jnp.asarray(positions)))
    assert relative_error(found, expected) < 1e-5


def test_a_partial_rotary_factor_turns_the_first_entries_only():
    whole, part = RopeConfig(), RopeConfig(partial_rotary_factor=0.5)
    positions = jnp.arange(6, dtype=jnp.int32)[None]
    x = jnp.asarray(np.random.default_rng(0).standard_normal((1, 6, 2, 16)), jnp.float32)
    turned = apply_rope(x, *rope_tables(part, 16, 64, positions))
    np.testing.assert_array_equal(turned[..., 8:], x[..., 8:])
    np.testing.assert_array_equal(turned[..., :8], apply_rope(x[..., :8], *rope_tables(whole, 8, 64, positions)))


def test_turning_keeps_the_dtype_and_computes_in_float32():
    tables = rope_tables(RopeConfig(), 16, 64, jnp.arange(300, dtype=jnp.int32)[None])
    x = jnp.asarray(np.random.default_rng(0).standard_normal((1, 300, 2, 16)), jnp.bfloat16)
    found = apply_rope(x, *tables)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_array_equal(found, apply_rope(x.astype(jnp.float32), *tables).astype(jnp.bfloat16))


def test_positions_count_from_zero_in_each_segment():
    segments = np.array([[1, 1, 1, 2, 2, 0, 0], [1, 2, 3, 3, 3, 3, 0], [0, 0, 1, 1, 1, 2, 2]], np.int32)
    expected = [[0, 1, 2, 0, 1, 0, 1], [0, 0, 0, 1, 2, 3, 0], [0, 1, 0, 1, 2, 0, 1]]
    np.testing.assert_array_equal(segment_positions(jnp.asarray(segments)), expected)
