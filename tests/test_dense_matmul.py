"""The product of few tokens with a dense weight that stays in its stack: the product itself, and where it stands in."""

import functools

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from flax import nnx

from jaxlora import layers, lora, quant
from jaxlora.config import LoraConfig, ModelConfig, RopeConfig
from jaxlora.generate import generate
from jaxlora.kernels import api, dense_matmul
from jaxlora.kernels.dense_matmul import Config
from jaxlora.kernels.parts import Parts
from jaxlora.kernels.reference import DenseFields
from jaxlora.model import CausalLM
from jaxlora.quant import LowRank, StackedArray

# The largest relative error: that of rounding the result, 0.42 of the dtype's unit on average, and some room.
LIMITS = {jnp.bfloat16: 2.5e-3, jnp.float16: 3.2e-4}


def operands(key, tokens, rows, columns, dtype, is_stacked=True):
    """x [tokens, columns] and some weights: the last of a stack of three each, or single ones."""
    keys = jax.random.split(key, len(rows) + 1)
    x = jax.random.normal(keys[0], (tokens, columns)).astype(dtype)
    stacks = [0.02 * jax.random.normal(k, (3, n, columns)) for k, n in zip(keys[1:], rows, strict=True)]
    stacks = [stack.astype(dtype) for stack in stacks]
    return x, [DenseFields(stack, jnp.int32(2)) if is_stacked else DenseFields(stack[2], None) for stack in stacks]


def stacked(fields):
    return StackedArray(fields.weight).at(fields.index)


def taken(fields):
    return fields.weight if fields.index is None else fields.weight[fields.index]


def times(x, w):
    return jax.lax.dot_general(x, w, (((1,), (1,)), ((), ())))


def relative_error(y, x, fields):
    exact = np.asarray(x, np.float64) @ np.asarray(taken(fields), np.float64).T
    return float(np.linalg.norm(np.asarray(y, np.float64) - exact) / np.linalg.norm(exact))


@pytest.mark.parametrize("is_stacked", [False, True])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_reference_is_the_product_with_each_weight(key, dtype, is_stacked):
    x, weights = operands(key, 3, (96, 10), 70, dtype, is_stacked)
    for y, fields in zip(api.matmul_dense(x, weights), weights, strict=True):
        assert y.dtype == dtype
        np.testing.assert_array_equal(y, times(x, taken(fields)))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_weight_of_a_stack_is_multiplied_as_the_weight_alone(key, dtype):
    x, weights = operands(key, 3, (96, 32, 40), 64, dtype)
    some, alone = [stacked(w) for w in weights], [taken(w) for w in weights]
    a, b = jax.random.normal(key, (4, 64)), jax.random.normal(key, (96, 4))
    adapter = LowRank(a, b, jnp.float32(0.5))
    assert api.implementations_in(quant.matmul, x, some[0]) == {"matmul_dense.reference"}
    np.testing.assert_array_equal(quant.matmul(x, some[0]), quant.matmul(x, alone[0]))
    np.testing.assert_array_equal(quant.matmul(x, some[0], adapter), quant.matmul(x, alone[0], adapter))
    for got, wanted in zip(quant.matmul_each(x, some), quant.matmul_each(x, alone), strict=True):
        np.testing.assert_array_equal(got, wanted)
    mixed = quant.matmul_each(x, [some[0], alone[1]])
    np.testing.assert_array_equal(mixed[1], quant.matmul(x, alone[1]))
    batch = quant.matmul(x[None], some[0])
    np.testing.assert_array_equal(batch[0], quant.matmul(x, alone[0]))


def test_what_does_not_fit_is_refused(key):
    x, [fields] = operands(key, 3, (96,), 64, jnp.bfloat16)
    with pytest.raises(TypeError, match=r"x \[..., in\] and w \[out, in\], not \[3, 56\] and \[96, 64\]"):
        quant.matmul(x[:, :56], stacked(fields))


def test_the_kernel_says_why_it_cannot_run(key):
    x, [w] = operands(key, 3, (96,), 64, jnp.bfloat16)
    _, [single] = operands(key, 3, (96,), 64, jnp.bfloat16, is_stacked=False)
    _, [half] = operands(key, 3, (96,), 64, jnp.float16)
    narrow, [odd] = operands(key, 3, (96,), 70, jnp.bfloat16)
    with pytest.raises(NotImplementedError, match=r"matmul_dense .*triton: .*GPU"):
        api.matmul_dense(x, [w], implementation="triton")
    huge = DenseFields(jax.ShapeDtypeStruct((3, 1 << 25, 64), x.dtype), w.index)
    for tokens, weights, message in [
        (x.astype(jnp.float32), [w], "bfloat16 or float16, all alike, not bfloat16, float32"),
        (x, [half], "all alike, not bfloat16, float16"),
        (jnp.zeros((65, 64), x.dtype), [w], "1 to 64 tokens, not 65"),
        (narrow, [odd], "whole 16 bytes, not of 70 elements"),
        (x, [w] * 4, "1 to 3 weights, not 4"),
        (x, [w, single], "all stacked or none"),
        (x, [huge], "32 bits, and there are 2147483648"),
    ]:
        with pytest.raises(NotImplementedError, match=message):
            dense_matmul.matmul_dense(tokens, weights)


@pytest.mark.parametrize(
    "field",
    [{"rows": 24}, {"rows": 8}, {"inner": 8}, {"inner": 96}, {"num_warps": 3}, {"split": 0}, {"num_stages": 0}],
)
def test_a_config_is_checked(field, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # a user's mistake meets our own error
    with pytest.raises(ValueError, match=next(iter(field))):
        Config(**field)


@pytest.mark.parametrize("tokens", [1, 2, 16, 17, 32, 33, 64])
@pytest.mark.parametrize("columns", [8, 64, 576, 4096, 14336])
@pytest.mark.parametrize("rows", [(64,), (4096,), (4096, 1024, 1024), (14336, 14336), (128256,)])
def test_configurations_fit_the_device_and_the_weight(tokens, rows, columns, monkeypatch):
    for room in (99 << 10, 160 << 10):
        monkeypatch.setattr(dense_matmul, "_shared_of_a_program", lambda room=room: room)
        config = dense_matmul.heuristics(tokens, rows, columns)
        assert dense_matmul.shared_bytes(config, tokens) <= room
        assert config.inner < 2 * max(columns, 9)  # no step is all padding
        programs = sum(-(-n // config.rows) for n in rows) * config.split
        assert programs <= 2 * dense_matmul.SMS or config.split == 1
        # No program has nothing to do.
        assert (config.split - 1) * -(-columns // (config.inner * config.split)) * config.inner < columns


# --- in a model ---


CONFIG = ModelConfig(
    model_type="llama", vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=3,
    num_attention_heads=4, num_key_value_heads=2, head_dim=16, max_position_embeddings=256, rope=RopeConfig(),
    layer_types=("full_attention",) * 3,
)  # fmt: skip


def model_of(dtype=jnp.bfloat16, **adapter):
    model = CausalLM(CONFIG, dtype=dtype, rngs=nnx.Rngs(0))
    if adapter:
        lora.add_adapters(model, LoraConfig(**adapter), jax.random.key(1))
        for each in lora.adapters(model):
            each.node.lora_B.set_value(0.1 * jax.random.normal(jax.random.key(2), each.node.lora_B.shape))
    return model


def one_step(model, ids):
    """The hidden states of tokens [B, T] after ten others, from a cache."""
    cache = model.init_cache(ids.shape[0], 10 + ids.shape[1])
    before = jnp.ones((ids.shape[0], 10), jnp.int32)
    at = lambda start, length: jnp.broadcast_to(start + jnp.arange(length, dtype=jnp.int32), (ids.shape[0], length))
    _, cache = model.hidden_states(before, at(0, 10), cache=cache)
    return model.hidden_states(ids, at(10, ids.shape[1]), cache=cache)[0]


ADAPTERS = [{}, dict(r=4), dict(r=4, use_dora=True), dict(r=4, modules_to_save=["lm_head"])]


@pytest.mark.parametrize("adapter", ADAPTERS, ids=str)
def test_decoding_reads_dense_weights_by_index(adapter, monkeypatch):
    model, ids = model_of(**adapter), jnp.arange(3, dtype=jnp.int32)[:, None]
    run = lambda model, ids: one_step(model, ids)
    assert "matmul_dense.reference" in api.implementations_in(run, model, ids)
    got = jax.jit(run)(model, ids)
    monkeypatch.setattr(layers, "MOST_TOKENS", 0)
    sliced = lambda model, ids: one_step(model, ids)
    assert "matmul_dense.reference" not in api.implementations_in(sliced, model, ids)
    np.testing.assert_array_equal(got, jax.jit(sliced)(model, ids))


def test_more_tokens_float32_and_training_slice_as_ever():
    ran = lambda function, *args: any("matmul_dense" in name for name in api.implementations_in(function, *args))
    ids = jnp.zeros((13, 5), jnp.int32)  # 65 tokens
    step = lambda model, ids: one_step(model, ids)
    assert not ran(step, model_of(), ids)
    assert ran(step, model_of(), ids[:12])
    assert not ran(step, model_of(jnp.float32), ids[:1])
    model = model_of(r=4)
    graphdef, trainable, frozen = lora.partition(model)
    loss = lambda trainable: jnp.sum(nnx.merge(graphdef, trainable, frozen)(ids[:1]))
    assert not ran(jax.grad(loss), trainable)


def test_whole_texts_are_those_of_sliced_weights(monkeypatch):
    prompts = np.random.default_rng(0).integers(3, 97, (3, 9))
    got = generate(model_of(r=4), prompts, max_new_tokens=8, eos_token_id=[])
    monkeypatch.setattr(layers, "MOST_TOKENS", 0)
    jax.clear_caches()
    np.testing.assert_array_equal(got, generate(model_of(r=4), prompts, max_new_tokens=8, eos_token_id=[]))


# --- on a GPU ---


@pytest.mark.gpu
@pytest.mark.parametrize("dtype, is_stacked", [(jnp.bfloat16, True), (jnp.float16, True), (jnp.bfloat16, False)])
@pytest.mark.parametrize(
    "rows, columns, tokens",
    [
        *(((1024,), 4096, tokens) for tokens in (1, 2, 8, 17, 33, 64)),
        *(((100,), 72, 1), ((100,), 72, 5), ((70,), 200, 17), ((70,), 8, 3), ((896,), 4864, 64), ((4096,), 14336, 64)),
        *(((1024, 256, 256), 1024, tokens) for tokens in (1, 9, 64)),
        *(((100, 16, 40), 136, tokens) for tokens in (1, 20, 64)),
        *(((14336, 14336), 512, tokens) for tokens in (1, 16, 64)),
    ],
)
def test_triton_is_as_exact_as_the_dtype(key, rows, columns, tokens, dtype, is_stacked):
    x, weights = operands(key, tokens, rows, columns, dtype, is_stacked)
    run = jax.jit(lambda x, weights: api.matmul_dense(x, weights, implementation="triton"))
    assert run.lower(x, weights).as_text().count("triton_kernel_call") == 1
    ys = run(x, weights)
    for y, fields in zip(ys, weights, strict=True):
        assert y.dtype == dtype and y.shape == (tokens, taken(fields).shape[0])
        assert relative_error(y, x, fields) < LIMITS[dtype]
    for y, again in zip(ys, run(x, weights), strict=True):
        np.testing.assert_array_equal(y, again)  # no sum depends on who comes first


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 9, 64])
@pytest.mark.parametrize(
    "layout",
    [
        dict(num_warps=1, num_stages=1),
        dict(rows=32, inner=128, num_warps=8, num_stages=3),
        dict(rows=64, inner=128, split=3, num_stages=2),
        dict(rows=128, inner=64, split=5),
    ],
)
def test_every_configuration_is_right(key, layout, tokens):
    x, weights = operands(key, tokens, (904, 40), 4864, jnp.bfloat16)
    ys = dense_matmul.matmul_dense(x, weights, config=Config(**layout))
    for y, fields in zip(ys, weights, strict=True):
        assert relative_error(y, x, fields) < LIMITS[jnp.bfloat16]


@pytest.mark.gpu
def test_weights_of_stacks_take_the_kernel_and_their_gradients_are_those_of_the_product(key):
    x, weights = operands(key, 8, (256, 128), 512, jnp.bfloat16)
    product = lambda x, stacks: quant.matmul_each(x, [StackedArray(stack).at(jnp.int32(2)) for stack in stacks])
    plain = lambda x, stacks: [times(x, stack[2]) for stack in stacks]
    stacks = [w.weight for w in weights]
    assert api.implementations_in(product, x, stacks) == {"matmul_dense.triton"}
    loss = lambda function: lambda *args: sum(jnp.sum(jnp.sin(y.astype(jnp.float32))) for y in function(*args))
    got = jax.jit(jax.grad(loss(product), (0, 1)))(x, stacks)
    wanted = jax.jit(jax.grad(loss(plain), (0, 1)))(x, stacks)
    for ours, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        theirs = theirs.astype(jnp.float32)
        assert float(jnp.linalg.norm(ours.astype(jnp.float32) - theirs)) < 1e-2 * float(jnp.linalg.norm(theirs))


@pytest.mark.gpu
@pytest.mark.parametrize("batch, has_kernel", [(3, True), (30, False)])
def test_tokens_that_are_vmapped_meet_one_weight(key, batch, has_kernel):
    _, [fields] = operands(key, 3, (256,), 512, jnp.bfloat16)
    xs = jax.random.normal(key, (batch, 3, 512)).astype(jnp.bfloat16)
    run = jax.jit(jax.vmap(functools.partial(quant.matmul, w=stacked(fields))))
    program = run.lower(xs).as_text()
    assert program.count("triton_kernel_call") == has_kernel and "while" not in program
    for y, x in zip(run(xs), xs, strict=True):
        assert relative_error(y, x, fields) < LIMITS[jnp.bfloat16]


@pytest.mark.gpu
def test_parts_are_what_is_added_up(key):
    x, weights = operands(key, 16, (256,), 4096, jnp.bfloat16)
    config = Config(rows=128, inner=64, split=4)
    run = lambda x, **options: dense_matmul.matmul_dense(x, weights, config=config, **options)[0]
    y = run(x, parts=True)
    assert y.shape == (4, 16, 256) and y.dtype == jnp.float32
    np.testing.assert_array_equal(Parts(y, x.dtype).sum(), run(x))
    [y] = api.matmul_dense(jnp.tile(x, (4, 1)), weights, parts=True)  # divided by its own lights
    assert isinstance(y, Parts) and y.shape == (64, 256)
    assert relative_error(y.sum()[:16], x, weights[0]) < LIMITS[jnp.bfloat16]

    loss = lambda y: jnp.sum(jnp.sin(y.astype(jnp.float32)))
    gradient = jax.grad(lambda x: loss(Parts(run(x, parts=True), x.dtype).sum()))(x)
    np.testing.assert_array_equal(gradient, jax.grad(lambda x: loss(run(x)))(x))
    together = jax.vmap(lambda x: run(x, parts=True))(x.reshape(2, 8, -1))
    assert together.shape == (2, 4, 8, 256)
    for y, some in zip(together, x.reshape(2, 8, -1), strict=True):
        assert relative_error(Parts(y, x.dtype).sum(), some, weights[0]) < LIMITS[jnp.bfloat16]


@pytest.mark.gpu
def test_weights_that_are_vmapped_are_multiplied_each_with_its_own(key):
    x, [fields] = operands(key, 3, (256,), 512, jnp.bfloat16)
    stacks = jnp.stack([fields.weight, -fields.weight])
    ys = jax.vmap(lambda stack: quant.matmul(x, StackedArray(stack).at(jnp.int32(2))))(stacks)
    for y, sign in zip(ys, (1, -1), strict=True):
        assert relative_error(sign * y, x, fields) < LIMITS[jnp.bfloat16]
