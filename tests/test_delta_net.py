"""The gated delta rule: the scan in chunks against the recurrence, and Qwen3.5's files against transformers."""

import functools
import json

import bitsandbytes.functional
import jax
import jax.extend
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
from transformers.models.qwen3_5.modeling_qwen3_5 import torch_chunk_gated_delta_rule

from jaxlora import chunks, delta_net
from jaxlora.config import LoraConfig, QuantConfig
from jaxlora.converters.bitsandbytes import BitsandbytesSource
from jaxlora.converters.export import save_merged, save_model
from jaxlora.converters.huggingface import SafetensorsSource, load_model, model_config
from jaxlora.delta_net import gated_delta_scan, unit
from jaxlora.kernels import api, delta_states
from jaxlora.layers import Linear
from jaxlora.lora import add_adapters
from jaxlora.model import named_nodes
from jaxlora.quant import QuantizedArray


def torch_logits(model, ids):
    with torch.no_grad():
        return model(torch.tensor(ids).long()).logits


def arrays(length, rate=0.5, seed=0):
    """Query, key, value, log_decay, step and state of the scan: two rows, four heads of 3 over two of 5."""
    keys = jax.random.split(jax.random.key(seed), 6)
    query, key = (unit(jax.random.normal(k, (2, length, 2, 5))) for k in keys[:2])
    value = jax.random.normal(keys[2], (2, length, 4, 3))
    log_decay = -rate * jax.nn.softplus(jax.random.normal(keys[3], (2, length, 4)))
    step = jax.nn.sigmoid(jax.random.normal(keys[4], (2, length, 4)))
    return query, key, value, log_decay, step, jax.random.normal(keys[5], (2, 4, 5, 3))


RUNS = jnp.array([[0] * 5 + [1] + [2] * 7 + [3] * 4, [1] * 3 + [2] * 14], jnp.int32)


def recurrence(query, key, value, log_decay, step, runs, state):
    """The two lines of the maths, token by token."""
    query, key = (jnp.repeat(part, value.shape[2] // part.shape[2], axis=2) for part in (query, key))
    out, run = [], jnp.zeros(len(value), jnp.int32)
    for t in range(value.shape[1]):
        state = jnp.where((runs[:, t] == run)[:, None, None, None], state, 0.0)
        state = jnp.exp(log_decay[:, t])[..., None, None] * state
        missing = value[:, t] - jnp.einsum("bhnp,bhn->bhp", state, key[:, t])
        state = state + key[:, t, :, :, None] * (step[:, t, :, None] * missing)[:, :, None]
        out.append(jnp.einsum("bhnp,bhn->bhp", state, query[:, t]))
        run = runs[:, t]
    return jnp.stack(out, axis=1), state


@pytest.mark.parametrize(
    "chunk, numbers", [(1, 2**26), (4, 2**26), (4, 2 * 4 * 2 * 4 * 4 * (5 + 3)), (17, 1), (64, 2**26)]
)
def test_chunks_equal_the_recurrence(chunk, numbers, monkeypatch):
    """All five chunks of 4 at once, and two at a time, of which the last group has one of padding alone."""
    monkeypatch.setattr(chunks, "GROUP_NUMBERS", numbers)
    values = arrays(17)

    def outputs_and_gradients(scan):
        def of(*values):
            y, after = scan(*values)
            return jnp.sum(jnp.sin(y)) + jnp.sum(jnp.cos(after)), (y, after)

        return jax.jit(jax.grad(of, argnums=range(6), has_aux=True))(*values)

    gradients, out = outputs_and_gradients(lambda *values: gated_delta_scan(*values[:5], RUNS, values[5], chunk=chunk))
    expected_gradients, expected = outputs_and_gradients(lambda *values: recurrence(*values[:5], RUNS, values[5]))
    for found, wanted in zip([*out, *gradients], [*expected, *expected_gradients], strict=True):
        assert relative_error(found, wanted) < 2e-5


def test_chunks_equal_those_of_transformers():
    """Over chunks of 64 and a decay so slow that the state of the first reaches the last."""
    query, key, value, log_decay, step, state = arrays(200, rate=0.003)
    found, after = gated_delta_scan(
        query * 5**-0.5, key, value, log_decay, step, jnp.zeros((2, 200), jnp.int32), state, chunk=64
    )
    theirs = [torch.tensor(np.asarray(x)) for x in (query, key, value, log_decay, step)]
    expected, expected_after = torch_chunk_gated_delta_rule(
        *theirs, initial_state=torch.tensor(np.asarray(state)), output_final_state=True
    )
    assert relative_error(found, expected) < 1e-5
    assert relative_error(after, expected_after) < 1e-5
    without, _ = gated_delta_scan(
        query * 5**-0.5, key, value, log_decay, step, jnp.zeros((2, 200), jnp.int32), 0 * state, chunk=64
    )
    assert relative_error(found[:, 64:], without[:, 64:]) > 1e-2


def test_keys_that_are_alike_are_solved_for_exactly():
    """What substitution is for: the powers of the system's matrix grow to 1e17 here."""
    length = 64
    key = jnp.broadcast_to(unit(jnp.ones(5)), (2, length, 2, 5))
    query, _, value, log_decay, _, state = arrays(length)
    step = jnp.full((2, length, 4), 0.99)
    runs = jnp.zeros((2, length), jnp.int32)
    found = gated_delta_scan(query, key, value, 0 * log_decay, step, runs, state, chunk=64)
    expected = recurrence(query, key, value, 0 * log_decay, step, runs, state)
    for one, other in zip(found, expected, strict=True):
        assert relative_error(one, other) < 1e-5


def test_the_inverse_by_blocks_is_that_of_float64():
    """Of keys that are alike, and of one matrix that a chunk of odd length would be padded to."""
    noise = np.random.default_rng(0).normal(size=(3, 64, 5)) * np.array([0.0, 0.1, 1.0])[:, None, None]
    key = np.asarray(unit(jnp.asarray(1.0 + noise)))
    below = np.tril(0.99 * key @ key.mT, -1)
    below[2, 50:] = 0.0
    found = delta_net.inverse(jnp.asarray(below))
    expected = np.linalg.inv(np.eye(64) + below.astype(np.float64))
    assert np.abs(expected).max() == 1.0
    assert np.abs(found - expected).max() < 16 * np.finfo(np.float32).eps


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_in_16_bits_only_operands_are_rounded(dtype):
    """Some sixteen roundings stand between what is given and a result: those of two operands of
    each product (what is solved for, a state, deltas, what is read) there and back, and that of a gradient itself.
    Decays, the inverse and sums are float32."""
    query, key, value, log_decay, step, state = arrays(17)
    low = tuple(part.astype(dtype) for part in (query, key, value))

    def run(scan, *values):
        def of(*values):
            y, after = scan(*values, RUNS, state)
            return jnp.sum(jnp.sin(y)) + jnp.sum(jnp.cos(after)), (y, after)

        gradients, out = jax.jit(jax.grad(of, argnums=range(5), has_aux=True))(*values)
        return *out, *gradients

    found = run(functools.partial(gated_delta_scan, chunk=4), *low, log_decay, step)
    exact = run(recurrence, *(part.astype(jnp.float32) for part in low), log_decay, step)
    assert [part.dtype for part in found] == [jnp.float32] * 2 + [dtype] * 3 + [jnp.float32] * 2
    for one, wanted in zip(found, exact, strict=True):
        assert 1e-6 < relative_error(one.astype(jnp.float32), wanted) < 4 * float(jnp.finfo(dtype).eps)


def test_in_16_bits_keys_that_are_alike_add_a_chunk_of_roundings():
    """Half a unit for each of the 64 deltas whose sum a token reads, where powers of the system's matrix overflow."""
    length = 128
    key = jnp.broadcast_to(unit(jnp.ones(5)), (2, length, 2, 5)).astype(jnp.bfloat16)
    query, _, value, log_decay, _, state = arrays(length)
    query, value = query.astype(jnp.bfloat16), value.astype(jnp.bfloat16)
    step = jnp.full((2, length, 4), 0.99)
    runs = jnp.zeros((2, length), jnp.int32)
    found = gated_delta_scan(query, key, value, 0 * log_decay, step, runs, state, chunk=64)
    exact = (part.astype(jnp.float32) for part in (query, key, value))
    expected = recurrence(*exact, 0 * log_decay, step, runs, state)
    for one, other in zip(found, expected, strict=True):
        assert relative_error(one, other) < 64 * float(jnp.finfo(jnp.bfloat16).eps) / 2


def test_a_single_token_is_not_rounded():
    query, key, value, log_decay, step, state = arrays(1)
    value = value.astype(jnp.bfloat16)
    runs = jnp.zeros((2, 1), jnp.int32)
    found = gated_delta_scan(query, key, value, log_decay, step, runs, state, chunk=64)
    expected = recurrence(query, key, value.astype(jnp.float32), log_decay, step, runs, state)
    for one, other in zip(found, expected, strict=True):
        assert relative_error(one, other) < 1e-6


def products(jaxpr, times=1):
    """How often each product of matrices in a program runs."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            yield times
        turns = equation.params["length"] if equation.primitive.name == "scan" else 1
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            yield from products(inner, times * turns)


def test_only_states_are_made_chunk_after_chunk():
    """Of 40 chunks three products each on the way there, of which the way back computes two again, for nobody wants
    what queries read, and three of its own."""
    query, key, value, log_decay, step, state = arrays(40 * 8)
    runs = jnp.zeros((2, 40 * 8), jnp.int32)

    def scan(query, key, value):
        return jnp.sum(gated_delta_scan(query, key, value, log_decay, step, runs, state, chunk=8)[0])

    there = list(products(jax.make_jaxpr(scan)(query, key, value).jaxpr))
    back = list(products(jax.make_jaxpr(jax.grad(scan, argnums=range(3)))(query, key, value).jaxpr))
    assert set(there + back) == {1, 40} and there.count(40) == 3 and back.count(40) == 3 + 2 + 3


def test_a_long_decay_and_no_key_are_no_nan():
    query, _, value, log_decay, step, state = arrays(17)
    runs = jnp.zeros((2, 17), jnp.int32)

    def total(key, log_decay):
        return jnp.sum(gated_delta_scan(query, unit(key), value, log_decay, step, runs, state, chunk=8)[0])

    for gradient in jax.grad(total, argnums=(0, 1))(jnp.zeros((2, 17, 2, 5)), 100.0 * log_decay):
        assert np.all(np.isfinite(gradient))


@pytest.mark.parametrize(
    "changes",
    [
        dict(linear_conv_kernel_dim=1, linear_num_key_heads=6),
        dict(linear_value_head_dim=20, linear_num_key_heads=1, attention_bias=False),
        dict(layer_types=["full_attention", "linear_attention"], num_hidden_layers=2, linear_conv_kernel_dim=5),
    ],
    ids=["one-tap", "wide-values", "attention-first"],
)
def test_logits_with_other_settings_equal_transformers(changes, tmp_path):
    theirs, ours = make_pair("qwen3_5_text", tmp_path, **changes)
    ids = random_ids(2, 21)
    assert relative_error(ours(jnp.asarray(ids)), torch_logits(theirs, ids)) < 2e-5


def test_logits_beyond_a_chunk_equal_transformers(tmp_path):
    """Of slow decays, so that a chunk needs the state of the one before."""
    theirs = make_checkpoint("qwen3_5_text", tmp_path)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "A_log" in name:
                parameter.sub_(5.0)
    theirs.save_pretrained(tmp_path)
    ours = load_folder(tmp_path)
    ids = random_ids(2, 150)
    found, expected = ours(jnp.asarray(ids)), torch_logits(theirs, ids)
    assert relative_error(found, expected) < 4e-5  # twice as far as what transformers' own two ways are apart
    # The first token is seen by the last through two linear layers alone, the attention's window being all.
    changed = np.concatenate([(ids[:, :1] + 1) % 97, ids[:, 1:]], axis=1)
    assert relative_error(ours(jnp.asarray(changed))[:, -1], found[:, -1]) > 1e-4


def quantised_in_transformers(theirs, ours):
    """bitsandbytes' dequantised NF4 in every matrix of `theirs` that `ours` quantises; their names' last parts."""
    quantised = set()
    with torch.no_grad():
        for linear in named_nodes(ours, Linear):
            if isinstance(linear.node.weight.get_value(), QuantizedArray):
                quantised.add(linear.name.rsplit(".", 1)[-1])
                for one in linear.names():
                    weight = theirs.get_submodule(one).weight
                    codes, state = bitsandbytes.functional.quantize_4bit(
                        weight.contiguous(), blocksize=64, quant_type="nf4", compress_statistics=True
                    )
                    state.shape = torch.Size((1, weight.numel()))  # see tests/test_moe.py
                    weight.copy_(bitsandbytes.functional.dequantize_4bit(codes, state).reshape(weight.shape))
    return quantised


def test_all_but_steps_and_decays_is_held_in_4_bits(tmp_path):
    theirs = make_checkpoint("qwen3_5_text", tmp_path)
    ours = load_folder(tmp_path, quant_config=QuantConfig())
    assert quantised_in_transformers(theirs, ours) == {
        "down_proj", "gate_proj", "in_proj_qkv", "in_proj_z", "k_proj", "o_proj", "out_proj", "q_proj", "up_proj",
        "v_proj",
    }  # fmt: skip
    ids = random_ids(2, 14)
    assert relative_error(ours(jnp.asarray(ids)), torch_logits(theirs, ids)) < 1e-4


def reloaded(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")


@pytest.mark.parametrize("name", ["qwen3_5_text", "qwen3_5_text-tied"])
def test_exports_load_in_transformers(name, tmp_path):
    theirs = make_checkpoint(name, tmp_path / "base")
    ids = random_ids(2, 14)
    ours = load_folder(tmp_path / "base")
    save_model(ours, tmp_path / "whole")
    original, written = SafetensorsSource(tmp_path / "base"), SafetensorsSource(tmp_path / "whole")
    assert set(original.names()) == set(written.names())
    assert torch.equal(torch_logits(reloaded(tmp_path / "whole"), ids), torch_logits(theirs, ids))
    add_adapters(ours, LoraConfig(r=3, target_modules=LINEARS), jax.random.key(0))
    randomise_adapters(ours)
    save_merged(ours, tmp_path / "merged", base=tmp_path / "base")
    assert relative_error(ours(jnp.asarray(ids)), torch_logits(reloaded(tmp_path / "merged"), ids)) < 2e-5
    assert relative_error(ours(jnp.asarray(ids)), torch_logits(theirs, ids)) > 1e-2


def test_every_linear_takes_an_adapter(tmp_path):
    _, model = make_pair("qwen3_5_text", tmp_path)
    add_adapters(model, LoraConfig(r=2), jax.random.key(0))
    adapted = {x.name.rsplit(".", 1)[-1] for x in named_nodes(model, Linear) if x.node.lora_A is not None}
    assert {f"in_proj_{part}" for part in ("qkv", "z", "a", "b")} | {"out_proj"} <= adapted


def test_a_merge_in_4_bits_is_read_again(tmp_path):
    make_checkpoint("qwen3_5_text", tmp_path / "base")
    ours = load_folder(tmp_path / "base", quant_config=QuantConfig())
    add_adapters(ours, LoraConfig(r=3, target_modules=LINEARS), jax.random.key(0))
    randomise_adapters(ours)
    save_merged(ours, tmp_path / "merged", base=tmp_path / "base", save_method="merged_4bit")
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    plain = {f"model.layers.{i}.linear_attn.in_proj_{name}" for i in (0, 1, 3, 4) for name in "ab"}
    assert set(config["quantization_config"]["llm_int8_skip_modules"]) == {"lm_head", *plain}
    source = BitsandbytesSource(SafetensorsSource(tmp_path / "merged"), config["quantization_config"])
    again = load_model(source, config, dtype=jnp.float32, quant_config=source.quant_config())
    assert np.all(np.isfinite(again(jnp.asarray(random_ids(2, 14)))))


def test_heads_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"linear_num_value_heads \(10\) must be a multiple of linear_num_key_heads"):
        model_config({"model_type": "qwen3_5_text", "linear_num_value_heads": 10})
    with pytest.raises(ValueError, match="layer_types asks for linear attention, but linear_attention is not set"):
        model_config({"model_type": "qwen2", "num_hidden_layers": 1, "layer_types": ["linear_attention"]})
    with pytest.raises(ValueError, match="at least one layer must attend"):
        model_config({"model_type": "qwen3_5_text", "num_hidden_layers": 1, "layer_types": ["linear_attention"]})


# ---- The kernels of states -------------------------------------------------------------------------------------------


def of_states(dtype, count, heads, c, n, p, shared=1):
    """What `delta_states` is given, and `delta_states_backward`."""
    keys = jax.random.split(jax.random.key(0), 8)
    drawn = lambda key, *shape: jax.random.normal(key, shape) * n**-0.5
    lookups, key = (drawn(each, count, heads, c, n).astype(dtype) for each in keys[:2])
    query = drawn(keys[7], count, heads // shared, c, n).astype(dtype)
    left, state = jax.random.uniform(keys[2], (count, heads)), jax.random.normal(keys[3], (heads, n, p))
    fresh, of_read, of_delta = (jax.random.normal(each, (count, heads, c, p)) for each in keys[4:7])
    return (lookups, query, key, fresh, left, state), (lookups, query, key, left, of_read, of_delta, state)


SHAPES_OF_STATES = [(8, 6, 64, 128, 128, 3), (3, 2, 64, 128, 256), (1, 5, 16, 16, 16), (5, 3, 32, 64, 32)]


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("shape", SHAPES_OF_STATES)
def test_the_reference_of_states_is_its_lines(shape, dtype):
    """Written out with sums in float64, and nothing rounded but what is multiplied. One unit, because what is rounded
    after another sum is now and then rounded the other way: it is 0.68 of one at most."""
    low = lambda x: np.asarray(jnp.asarray(x, jnp.float32).astype(dtype).astype(jnp.float32), np.float64)
    forward, backward = of_states(dtype, *shape)
    exact = lambda operands: [np.asarray(x.astype(jnp.float32), np.float64) for x in operands]
    (w, q, k, fresh, left, s), turned = exact(forward), lambda x: x.transpose(0, 2, 1)
    q = np.repeat(q, len(s) // q.shape[1], axis=1)
    of_chunks = []
    for i in range(len(w)):
        u = fresh[i] - w[i] @ low(s)
        of_chunks.append((q[i] @ low(s), u, low(s)))
        s = left[i][:, None, None] * s + turned(k[i]) @ low(u)
    wanted = [*map(np.stack, zip(*of_chunks, strict=True)), s]
    *_, dr, du, ds = exact(backward)
    of_chunks = []
    for i in reversed(range(len(w))):
        u = du[i] + k[i] @ low(ds)
        of_chunks.insert(0, (u, low(ds)))
        ds = left[i][:, None, None] * ds - turned(w[i]) @ low(u) + turned(q[i]) @ low(dr[i])
    wanted += [*map(np.stack, zip(*of_chunks, strict=True)), ds]
    found = [
        *jax.jit(delta_states.delta_states_reference)(*forward),
        *jax.jit(delta_states.delta_states_backward_reference)(*backward),
    ]
    for one, other in zip(found, wanted, strict=True):
        assert relative_error(one.astype(jnp.float32), other) < jnp.finfo(dtype).eps


def test_what_the_kernels_of_states_do_not_take_is_said():
    forward, _ = of_states(jnp.bfloat16, 2, 3, 24, 16, 16)
    with pytest.raises(NotImplementedError, match="a power of two from 16 on.*24, 16 and 16"):
        delta_states.delta_states(*forward)
    forward, _ = of_states(jnp.float32, 2, 3, 16, 16, 16)
    with pytest.raises(NotImplementedError, match="not float32"):
        delta_states.delta_states(*forward)
    forward, _ = of_states(jnp.bfloat16, 2, 3, 16, 16, 16)
    with jax.set_mesh(jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))):
        with pytest.raises(NotImplementedError, match="on a mesh"):
            delta_states.delta_states(*forward)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("shape", SHAPES_OF_STATES)
def test_the_kernels_of_states_equal_their_reference(shape, dtype):
    """To a unit, as that equals other sums of its own lines (`test_the_reference_of_states_is_its_lines`)."""
    for op, operands in zip(("delta_states", "delta_states_backward"), of_states(dtype, *shape), strict=True):
        run = functools.partial(getattr(api, op), implementation="triton")
        found = jax.jit(run)(*operands)
        expected = jax.jit(functools.partial(getattr(api, op), implementation="reference"))(*operands)
        for one, other in zip(found, expected, strict=True):
            assert one.dtype == other.dtype and one.shape == other.shape
            assert relative_error(one.astype(jnp.float32), other.astype(jnp.float32)) < jnp.finfo(dtype).eps
        twice = jax.jit(jax.vmap(run))(*(jnp.stack([each, 0.5 * each]) for each in operands))
        for one, other in zip(found, twice, strict=True):
            np.testing.assert_array_equal(one, other[0])


@pytest.mark.gpu
def test_a_scan_in_16_bits_is_the_kernels(key):
    """And its gradients are the reference's, in float32 of the same rounded numbers, but for roundings."""
    keys = jax.random.split(key, 5)
    shape = (2, 300, 4, 128)
    query, key_ = (unit(jax.random.normal(k, (2, 300, 2, 128))).astype(jnp.bfloat16) for k in keys[:2])
    value, d_out = (jax.random.normal(k, shape).astype(jnp.bfloat16) for k in keys[2:4])
    log_decay, step = -0.1 * jnp.ones(shape[:3]), jax.nn.sigmoid(jax.random.normal(keys[4], shape[:3]))
    runs = jnp.where(jnp.arange(300) < 130, 0, 1) + jnp.zeros((2, 1), jnp.int32)

    def gradients(dtype):
        def of(query, key, value, log_decay, step):
            state = jnp.zeros((2, 4, 128, 128))
            y, _ = gated_delta_scan(query, key, value, log_decay, step, runs, state, chunk=64)
            return jnp.sum(y * d_out.astype(jnp.float32)), y

        given = (*(part.astype(dtype) for part in (query, key_, value)), log_decay, step)
        run = jax.grad(of, range(5), has_aux=True)
        return run, given

    run, given = gradients(jnp.bfloat16)
    ran = {name for name in api.implementations_in(run, *given) if name.startswith("delta_states")}
    assert ran == {"delta_states.triton", "delta_states_backward.triton"}
    found = jax.jit(run)(*given)
    run, given = gradients(jnp.float32)
    expected = jax.jit(run)(*given)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert relative_error(one.astype(jnp.float32), other) < 2e-2
