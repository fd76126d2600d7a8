"""Mamba-2: the scan in chunks against the recurrence, documents apart, and Falcon-H1's files against transformers."""

import functools
import json

import bitsandbytes.functional
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from helpers import (
    LINEARS,
    load_folder,
    make_checkpoint,
    make_pair,
    random_ids,
    randomise_adapters,
    relative_error,
)

from jaxlora import chunks
from jaxlora.config import LoraConfig, QuantConfig
from jaxlora.converters.export import save_merged, save_model
from jaxlora.converters.huggingface import SafetensorsSource, model_config
from jaxlora.layers import Linear
from jaxlora.lora import add_adapters
from jaxlora.mamba import causal_convolution, segment_runs, ssd_scan
from jaxlora.model import named_nodes
from jaxlora.quant import QuantizedArray


def torch_logits(model, ids):
    with torch.no_grad():
        return model(torch.tensor(ids).long()).logits


def arrays(length):
    """x, dt, rate, key, query and state of the scan: two rows, six heads of 3 in two groups, a state of 5."""
    keys = jax.random.split(jax.random.key(0), 6)
    x = jax.random.normal(keys[0], (2, length, 6, 3))
    dt = jax.nn.softplus(jax.random.normal(keys[1], (2, length, 6)))
    rate = -jnp.exp(jax.random.normal(keys[2], (6,)))
    key, query = (jax.random.normal(k, (2, length, 2, 5)) for k in keys[3:5])
    return x, dt, rate, key, query, jax.random.normal(keys[5], (2, 6, 3, 5))


RUNS = jnp.array([[0] * 5 + [1] + [2] * 7 + [3] * 4, [1] * 3 + [2] * 14], jnp.int32)


def recurrence(x, dt, rate, key, query, runs, state):
    """The two lines of the maths, token by token."""
    key, query = (jnp.repeat(part, x.shape[2] // part.shape[2], axis=2) for part in (key, query))
    out, run = [], jnp.zeros(len(x), jnp.int32)
    for t in range(x.shape[1]):
        state = jnp.where((runs[:, t] == run)[:, None, None, None], state, 0.0)
        added = (dt[:, t, :, None] * x[:, t])[..., None] * key[:, t, :, None]
        state = jnp.exp(rate * dt[:, t])[..., None, None] * state + added
        out.append(jnp.einsum("bhpn,bhn->bhp", state, query[:, t]))
        run = runs[:, t]
    return jnp.stack(out, axis=1), state


@pytest.mark.parametrize("chunk, weights", [(1, 2**26), (4, 2**26), (4, 2 * 2 * 4**2 * 6), (17, 1), (64, 2**26)])
def test_chunks_equal_the_recurrence(chunk, weights, monkeypatch):
    """All five chunks of 4 at once, and two at a time, of which the last group has one of padding alone."""
    monkeypatch.setattr(chunks, "GROUP_NUMBERS", weights)
    values = arrays(17)
    x, dt, rate, key, query, state = values

    def outputs_and_gradients(scan):
        def of(*values):
            y, after = scan(*values)
            return jnp.sum(jnp.sin(y)) + jnp.sum(jnp.cos(after)), (y, after)

        return jax.jit(jax.grad(of, argnums=range(6), has_aux=True))(*values)

    gradients, out = outputs_and_gradients(
        lambda x, dt, rate, key, query, state: ssd_scan(x, dt, rate, key, query, RUNS, state, chunk=chunk)
    )
    expected_gradients, expected = outputs_and_gradients(
        lambda x, dt, rate, key, query, state: recurrence(x, dt, rate, key, query, RUNS, state)
    )
    for found, wanted in zip([*out, *gradients], [*expected, *expected_gradients], strict=True):
        assert relative_error(found, wanted) < 2e-5


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_in_16_bits_only_operands_are_rounded(dtype):
    """Between what is given and a result stand at most eight roundings, of half a unit each: those of two operands of
    each product on the way there and back, and that of a gradient itself. Decays and sums are float32."""
    x, dt, rate, key, query, state = arrays(17)
    low = tuple(part.astype(dtype) for part in (x, key, query))

    def run(scan, x, dt, key, query):
        def of(x, dt, key, query):
            y, after = scan(x, dt, rate, key, query, RUNS, state)
            return jnp.sum(jnp.sin(y)) + jnp.sum(jnp.cos(after)), (y, after)

        gradients, out = jax.jit(jax.grad(of, argnums=range(4), has_aux=True))(x, dt, key, query)
        return *out, *gradients

    found = run(functools.partial(ssd_scan, chunk=4), low[0], dt, *low[1:])
    exact = run(recurrence, *(part.astype(jnp.float32) for part in (low[0], dt, *low[1:])))
    assert [part.dtype for part in found] == [jnp.float32] * 2 + [dtype, jnp.float32, dtype, dtype]
    for one, wanted in zip(found, exact, strict=True):
        assert 1e-6 < relative_error(one.astype(jnp.float32), wanted) < 4 * float(jnp.finfo(dtype).eps)


def test_a_long_decay_is_no_nan():
    x, dt, rate, key, query, state = arrays(17)
    runs = jnp.zeros((2, 17), jnp.int32)
    gradient = jax.grad(lambda dt: jnp.sum(ssd_scan(x, dt, rate, key, query, runs, state, chunk=8)[0]))(100.0 * dt)
    assert np.all(np.isfinite(gradient))


def test_the_convolution_equals_torch_within_a_run():
    x, weight = (
        np.random.default_rng(i).normal(size=s).astype(np.float32) for i, s in enumerate([(2, 17, 6), (6, 1, 4)])
    )
    bias = np.arange(6, dtype=np.float32)
    none = jnp.zeros((2, 3, 6))
    out, after = causal_convolution(jnp.asarray(x), none, jnp.asarray(weight), jnp.asarray(bias), RUNS)
    for row in range(2):
        for run in range(4):
            mine = np.asarray(RUNS[row]) == run
            if mine.any():
                one = torch.nn.functional.conv1d(
                    torch.tensor(x[row : row + 1, mine]).mT,
                    torch.tensor(weight),
                    torch.tensor(bias),
                    padding=3,
                    groups=6,
                )
                assert relative_error(out[row, mine], one[0, :, : mine.sum()].T) < 1e-6
    np.testing.assert_array_equal(after, x[:, -3:])
    # Cut in two, with what the second part needs of the first.
    first, kept = causal_convolution(jnp.asarray(x[:, :7]), none, jnp.asarray(weight), jnp.asarray(bias), RUNS[:, :7])
    second, _ = causal_convolution(
        jnp.asarray(x[:, 7:]), kept, jnp.asarray(weight), jnp.asarray(bias), RUNS[:, 7:] - RUNS[:, 6:7]
    )
    assert relative_error(jnp.concatenate([first, second], axis=1), out) < 1e-6


def test_runs_count_changes():
    ids = jnp.array([[0, 0, 1, 1, 2], [1, 1, 1, 0, 0]], jnp.int32)
    np.testing.assert_array_equal(segment_runs(ids, ids.shape, None), [[0, 0, 1, 1, 2], [0, 0, 0, 1, 1]])
    before = jnp.array([1, 1], jnp.int32)
    np.testing.assert_array_equal(segment_runs(ids, ids.shape, before), [[1, 1, 2, 2, 3], [0, 0, 0, 1, 1]])
    np.testing.assert_array_equal(segment_runs(None, (1, 3), None), [[0, 0, 0]])


@pytest.mark.parametrize(
    "changes",
    [
        dict(mamba_proj_bias=True, time_step_limit=(0.3, 0.9)),
        dict(mamba_norm_before_gate=True, mamba_n_groups=4),
        dict(mamba_d_conv=2, mamba_chunk_size=64),
    ],
    ids=["bias-limit", "norm-first", "two-taps"],
)
def test_logits_with_other_settings_equal_transformers(changes, tmp_path):
    theirs, ours = make_pair("falcon_h1", tmp_path, **changes)
    ids = random_ids(2, 21)
    assert relative_error(ours(jnp.asarray(ids)), torch_logits(theirs, ids)) < 2e-5


def test_mixers_stay_as_they_are_in_4_bits(tmp_path):
    theirs = make_checkpoint("falcon_h1", tmp_path)
    ours = load_folder(tmp_path, quant_config=QuantConfig())
    quantised = []
    with torch.no_grad():
        for linear in named_nodes(ours, Linear):
            if isinstance(linear.node.weight.get_value(), QuantizedArray):
                quantised.append(linear.name.rsplit(".", 1)[-1])
                for one in linear.names():
                    weight = theirs.get_submodule(one).weight
                    codes, state = bitsandbytes.functional.quantize_4bit(
                        weight.contiguous(), blocksize=64, quant_type="nf4", compress_statistics=True
                    )
                    state.shape = torch.Size((1, weight.numel()))  # see tests/test_moe.py
                    weight.copy_(bitsandbytes.functional.dequantize_4bit(codes, state).reshape(weight.shape))
    assert sorted(quantised) == ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    ids = random_ids(2, 14)
    assert relative_error(ours(jnp.asarray(ids)), torch_logits(theirs, ids)) < 1e-4


def test_exports_load_in_transformers(tmp_path):
    theirs = make_checkpoint("falcon_h1", tmp_path / "base")
    ids = random_ids(2, 14)
    ours = load_folder(tmp_path / "base")

    def reloaded(folder):
        return transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")

    save_model(ours, tmp_path / "whole")
    original, written = SafetensorsSource(tmp_path / "base"), SafetensorsSource(tmp_path / "whole")
    assert set(original.names()) == set(written.names())
    assert torch.equal(torch_logits(reloaded(tmp_path / "whole"), ids), torch_logits(theirs, ids))
    add_adapters(ours, LoraConfig(r=3, target_modules=LINEARS), jax.random.key(0))
    randomise_adapters(ours)
    save_merged(ours, tmp_path / "merged", base=tmp_path / "base")
    assert relative_error(ours(jnp.asarray(ids)), torch_logits(reloaded(tmp_path / "merged"), ids)) < 2e-5
    assert relative_error(ours(jnp.asarray(ids)), torch_logits(theirs, ids)) > 1e-2


def test_out_proj_takes_no_adapter_as_in_peft(tmp_path):
    _, model = make_pair("falcon_h1", tmp_path)
    add_adapters(model, LoraConfig(r=2), jax.random.key(0))
    adapted = {x.name.rsplit(".", 1)[-1] for x in named_nodes(model, Linear) if x.node.lora_A is not None}
    assert "in_proj" in adapted and "out_proj" not in adapted
    with pytest.raises(ValueError, match="'out_proj' matches no"):
        add_adapters(model, LoraConfig(r=2, target_modules=["out_proj"]), jax.random.key(0))


def test_heads_that_do_not_fit_are_refused():
    with pytest.raises(
        ValueError, match=r"mamba_d_ssm \(1000\) must be mamba_n_heads \(128\) times mamba_d_head \(7\)"
    ):
        model_config({"model_type": "falcon_h1", "mamba_d_ssm": 1000})


def test_a_merge_in_4_bits_leaves_mixers_as_they_are(tmp_path):
    make_checkpoint("falcon_h1", tmp_path / "base")
    ours = load_folder(tmp_path / "base", quant_config=QuantConfig())
    add_adapters(ours, LoraConfig(r=3, target_modules=LINEARS), jax.random.key(0))
    randomise_adapters(ours)
    save_merged(ours, tmp_path / "merged", base=tmp_path / "base", save_method="merged_4bit")
    written = SafetensorsSource(tmp_path / "merged")
    assert written.shape("model.layers.1.mamba.in_proj.weight") == (92, 48)
    assert written.shape("model.layers.1.self_attn.q_proj.weight")[1] == 1
    skipped = json.loads((tmp_path / "merged" / "config.json").read_text())["quantization_config"][
        "llm_int8_skip_modules"
    ]
    mixers = {f"model.layers.{i}.mamba.{name}_proj" for i in range(3) for name in ("in", "out")}
    assert set(skipped) == {"lm_head", *mixers}
