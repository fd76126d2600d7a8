"""DoRA's gain: in a merged weight, with the gradient of the magnitudes made of what a product returned."""

import dataclasses
import functools
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax._src.ad_checkpoint import saved_residuals
from jax.ad_checkpoint import checkpoint_name

from jaxlora import lora, quant, remat
from jaxlora.config import LoraConfig, QuantConfig, QuantScheme
from jaxlora.converters.huggingface import model_config
from jaxlora.kernels import api, nf4_merge, nf4_merge16, reference
from jaxlora.layers import Linear, linear_each, of_gate
from jaxlora.loss import causal_lm_loss
from jaxlora.model import CausalLM
from jaxlora.variables import AdapterScale, BaseSquare, LoraParam


def operands(key, scheme: QuantScheme = "nf4", out=96, d_in=128, tokens=128, dtype=jnp.float32):
    keys = jax.random.split(key, 5)
    x = jax.random.normal(keys[0], (2, tokens // 2, d_in)).astype(dtype)
    q = quant.quantize(0.02 * jax.random.normal(keys[1], (out, d_in)), scheme=scheme)
    a, b = jax.random.normal(keys[2], (4, d_in)), 0.01 * jax.random.normal(keys[3], (out, 4))
    return x, q, quant.LowRank(a, b, jnp.float32(1.7), 1.0 + 0.3 * jax.random.normal(keys[4], (out,)))


def written_out(x, q, adapter):
    """gain * (x W^T + scaling (x A^T) B^T) in float32."""
    weight = quant.dequantize(q, jnp.float32)
    with jax.default_matmul_precision("highest"):
        return adapter.gain * (x @ weight.T + adapter.scaling * ((x @ adapter.a.T) @ adapter.b.T))


def ours(x, q, adapter, product=quant.matmul):
    return quant.with_gain(product(x, q, adapter._replace(gain=jax.lax.stop_gradient(adapter.gain))), adapter.gain)


def value_and_gradients(product, x, q, adapter):
    def loss(x, a, b, gain):
        return jnp.sum(jnp.sin(product(x, q, quant.LowRank(a, b, adapter.scaling, gain)).astype(jnp.float32)))

    return jax.value_and_grad(loss, (0, 1, 2, 3))(x, adapter.a, adapter.b, adapter.gain)


def assert_close(got, wanted, tolerance=2e-5):
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        assert jnp.any(w != 0.0)
        np.testing.assert_allclose(g, w, rtol=tolerance, atol=tolerance * float(jnp.abs(w).max()))


@pytest.mark.parametrize("scheme", ["nf4", "int8", "fp8", "fp8_block"])
@pytest.mark.parametrize("tokens", [2, 128])  # added to the product, and merged into the weight
def test_a_gain_multiplies_the_whole_product(key, scheme, tokens):
    x, q, adapter = operands(key, scheme, tokens=tokens)
    wanted = value_and_gradients(written_out, x, q, adapter)
    assert_close(value_and_gradients(ours, x, q, adapter), wanted)
    merged = quant.MergedArray(quant.merge(q, adapter, jnp.float32))
    assert_close(value_and_gradients(lambda x, q, adapter: ours(x, merged, adapter), x, q, adapter), wanted)


def test_a_gain_costs_no_product_and_no_pass_over_the_tokens(key):
    """Beside the gradients without it there is one sum, and the weight is made as often."""
    x, q, adapter = operands(key)
    program = lambda product: jax.jit(functools.partial(value_and_gradients, product)).lower(x, q, adapter).as_text()
    with_it = program(ours)
    without = program(lambda x, q, adapter: quant.matmul(x, q, adapter._replace(gain=None)))
    assert with_it.count("stablehlo.dot_general") == without.count("stablehlo.dot_general")
    wide = [line for line in with_it.splitlines() if "stablehlo.multiply" in line and "2x64x96xf32" in line]
    assert len(wide) == len([line for line in without.splitlines() if "multiply" in line and "2x64x96xf32" in line]) + 1


def test_gains_of_adapters_that_are_vmapped(key):
    x, q, adapter = operands(key)
    adapters = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf, 0.5 * leaf]), adapter)
    got = jax.vmap(functools.partial(value_and_gradients, ours), in_axes=(None, None, 0))(x, q, adapters)
    for i in range(3):
        one = jax.tree.map(lambda leaf, i=i: leaf[i], adapters)
        assert_close(jax.tree.map(lambda leaf, i=i: leaf[i], got), value_and_gradients(written_out, x, q, one), 1e-4)


def dora(key, out, d_in, axes, scheme: QuantScheme | None = "nf4", bias=True, dtype=jnp.float32):
    linear = Linear(
        d_in, out, axes=axes, dtype=dtype, rngs=nnx.Rngs(out), bias=bias,
        quant_config=None if scheme is None else QuantConfig(scheme=scheme),
    )  # fmt: skip
    a, b = jax.random.normal(key, (4, d_in)) / 8, 0.02 * jax.random.normal(key, (out, 4))
    linear.lora_A, linear.lora_B, linear.lora_scaling = LoraParam(a), LoraParam(b), AdapterScale(jnp.float32(0.5))
    linear.lora_ranks = (4,)
    weight = linear.weight.get_value()
    weight = weight if scheme is None else quant.dequantize(weight, jnp.float32)
    square = jnp.sum(weight.astype(jnp.float32) ** 2, axis=1)
    linear.lora_base_square = BaseSquare(square)
    linear.lora_magnitude = LoraParam(jnp.sqrt(square) * (1.0 + 0.2 * jax.random.normal(key, (out,))))
    return linear


def elementwise(linear, x):
    """PEFT's DoRA, in float32: the norm is a constant."""
    weight = linear.weight.get_value()
    weight = quant.dequantize(weight, jnp.float32) if isinstance(weight, quant.QuantizedArray) else weight
    a, b = linear.lora_A.get_value(), linear.lora_B.get_value()
    with jax.default_matmul_precision("highest"):
        norms = jax.lax.stop_gradient(jnp.linalg.norm(weight + 0.5 * b @ a, axis=1))
        y = x @ weight.T + 0.5 * ((x @ a.T) @ b.T)
    y = linear.lora_magnitude.get_value() / norms * y
    return y if linear.bias is None else y + linear.bias.get_value()


def pulled_back(function, linears, *args):
    structure, learning, frozen = nnx.split(linears, nnx.Param, ...)
    out, pullback = jax.vjp(
        lambda learning, *args: function(nnx.merge(structure, learning, frozen), *args), learning, *args
    )
    return out, pullback(jax.tree.map(lambda leaf: jnp.cos(3.0 * leaf), out))


@pytest.mark.parametrize("scheme", ["nf4", "int8", None])
@pytest.mark.parametrize("tokens", [3, 200])
@pytest.mark.parametrize("is_tile", [False, True])
def test_a_linear_is_pefts(key, scheme, tokens, is_tile):
    """By itself, beside others that read the same, and behind a gate; in tiles the gain is in a constant weight."""
    linears = [dora(key, out, 128, ("heads", "embed"), scheme) for out in (64, 32)]
    if is_tile:
        linears = [linear.dense(jnp.float32, tokens) for linear in linears]
    x, gate = (jax.random.normal(k, (tokens, 128), jnp.float32) for k in jax.random.split(key))
    each = lambda linears, x: [elementwise(linear, x) for linear in linears]
    originals = [dora(key, out, 128, ("heads", "embed"), scheme) for out in (64, 32)]
    wanted = pulled_back(each, originals, x)
    for found in (
        pulled_back(lambda linears, x: [linear(x) for linear in linears], linears, x),
        pulled_back(lambda linears, x: linear_each(linears, x, [None] * 2), linears, x),
    ):
        assert len(jax.tree.leaves(found)) == len(jax.tree.leaves(wanted))
        assert_close(found, wanted, 1e-4)
    wanted = pulled_back(
        lambda linear, gate, up: elementwise(linear, api.gated(gate, up, "silu")), originals[0], gate, x
    )
    found = pulled_back(lambda linear, gate, up: of_gate(linear, gate, up, "silu", None), linears[0], gate, x)
    assert_close(found, wanted, 1e-4)


@pytest.mark.parametrize("scheme", ["nf4", None])
def test_a_magnitude_of_zero_has_its_gradient(key, scheme):
    linear = dora(key, 64, 128, ("heads", "embed"), scheme, bias=False)
    linear.lora_magnitude.set_value(linear.lora_magnitude.get_value().at[5].set(0.0))
    x = jax.random.normal(key, (200, 128), jnp.float32)
    dy = jax.random.normal(key, (200, 64), jnp.float32)
    structure, learning, frozen = nnx.split(linear, nnx.Param, ...)

    def gradient(function):
        loss = lambda learning: jnp.sum(dy * function(nnx.merge(structure, learning, frozen), x))
        return jax.grad(loss)(learning)

    found, wanted = gradient(lambda linear, x: linear(x)), gradient(elementwise)
    found, wanted = found["lora_magnitude"].get_value(), wanted["lora_magnitude"].get_value()
    assert abs(wanted[5]) > 1.0
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-3)


# ---- A whole model ---------------------------------------------------------------------------------------------------

CONFIG = model_config(
    dict(
        model_type="llama", vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=2048, rms_norm_eps=1e-6,
        tie_word_embeddings=False,
    )
)  # fmt: skip


def model_of(policy, dtype=jnp.float32, config=CONFIG):
    model = CausalLM(config, dtype=dtype, quant_config=QuantConfig(), rngs=nnx.Rngs(0))
    lora.add_adapters(model, LoraConfig(r=4, use_dora=True, init_lora_weights=False), jax.random.key(1))
    for adapter in lora.adapters(model):
        magnitude = adapter.node.lora_magnitude
        magnitude.set_value(magnitude.get_value() * 1.1)
    model.remat_policy = policy
    return model


def gradients_of(model, batch):
    graphdef, trainable, frozen = lora.partition(model)
    return jax.value_and_grad(lambda t: causal_lm_loss(nnx.merge(graphdef, t, frozen), batch)[0]), trainable


def batch_of(rows, tokens):
    ids = jax.random.randint(jax.random.key(2), (rows, tokens), 0, 64)
    return {"input_ids": ids, "labels": ids}


@pytest.mark.parametrize("policy", [policy for policy in remat.POLICIES if policy != "none"])
def test_every_policy_gives_the_same_gradients(policy):
    """Of more tokens than a tile of those on the host has."""
    batch = batch_of(4, 520)
    results = []
    for name in ("none", policy):
        function, trainable = gradients_of(model_of(name), batch)
        results.append(jax.jit(function)(trainable))
    found, wanted = results
    assert_close(found, wanted, 1e-3)


def test_a_layer_that_keeps_its_product_does_not_make_it_again(key):
    """Products of a step beside those of a plain adapter: the same but for the norms, which are made once."""

    def products(policy, use_dora):
        model = CausalLM(CONFIG, dtype=jnp.float32, quant_config=QuantConfig(), rngs=nnx.Rngs(0))
        lora.add_adapters(model, LoraConfig(r=4, use_dora=use_dora), jax.random.key(1))
        model.remat_policy = policy
        function, trainable = gradients_of(model, batch_of(2, 128))
        text = cast(str, jax.jit(function).lower(trainable).compile().as_text())
        # Merges are made for each pass, but XLA may find two to be the same.
        return sum(" dot(" in line and "merge_nf4" not in line for line in text.splitlines())

    of_norms = 3 * 7  # A W^T, and A A^T and its product with B
    for policy in ("none", "projections", "attention", "offload", "offload_attention", "offload_residual"):
        assert products(policy, True) == products(policy, False) + of_norms, policy
    assert products("full", True) == products("full", False) + of_norms + 1


@pytest.mark.parametrize("there", [2, 3, 6, 9])
def test_the_product_is_kept_where_all_have_room(key, there):
    """Of 3 layers, whose input and product are 2 arrays of [16, 8] each; there: how many the host has room for."""
    w, x = jax.random.normal(key, (3, 8, 8)) / 3, jnp.ones((16, 8))

    def f(w, x):
        def body(h, w):
            return jnp.sin(checkpoint_name(jnp.tanh(h @ w) @ w, "mlp_to_embed")) + h, None

        return jnp.sum(remat.scan(body, x, w, "offload", there * x.nbytes)[0])

    residuals = cast(Any, saved_residuals(f, w, x))
    kept = [aval for aval, _ in residuals if aval.shape[1:] == x.shape]
    on_host = [aval.shape[0] for aval in kept if aval.memory_space == jax.memory.Space.Host]
    assert on_host == ([3, 3] if there >= 6 else [min(there, 3)])


# ---- On a GPU --------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(100, 64), (71, 192), (33, 576), (1024, 4096)])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("double_quant", [True, False])
def test_the_kernels_multiply_rows_by_their_gain(key, shape, dtype, double_quant):
    q = jax.lax.map(functools.partial(quant.quantize, double_quant=double_quant), jax.random.normal(key, (3, *shape)))
    stacked = q.codes, q.scales, q.nested_absmax, q.nested_offset, jnp.int32(1)
    one = jax.tree.map(lambda leaf: leaf[1], q)
    single = one.codes, one.scales, one.nested_absmax, one.nested_offset, None
    keys = jax.random.split(key, 3)
    gain = 1.0 + 0.3 * jax.random.normal(keys[2], (shape[0],))
    for rank in (1, 16, 32, 40):
        a, b = jax.random.normal(keys[0], (rank, shape[1])) / 8, jax.random.normal(keys[1], (shape[0], rank))
        wanted = reference.merge_nf4(*single, a, b, None, gain, shape=shape, dtype=dtype).astype(jnp.float32)
        for kernel in (nf4_merge, nf4_merge16)[: 2 if rank <= nf4_merge16.MOST_RANKS else 1]:
            for fields in (stacked, single):
                got = kernel.merge_nf4(*fields, a, b, None, gain, shape=shape, dtype=dtype).astype(jnp.float32)
                error = float(jnp.abs(got - wanted).max() / jnp.abs(wanted).max())
                assert error <= float(jnp.finfo(dtype).eps) + 4e-6, (kernel.__name__, rank, error)


@pytest.mark.gpu
@pytest.mark.parametrize("rank, name", [(16, "triton16"), (40, "triton")])
def test_a_gain_runs_in_the_merge_forward_and_backward(key, rank, name):
    x, q, adapter = operands(key, "nf4", 1024, 2048, 2048, jnp.bfloat16)
    keys = jax.random.split(key)
    a, b = jax.random.normal(keys[0], (rank, 2048)), 0.002 * jax.random.normal(keys[1], (1024, rank))
    adapter = adapter._replace(a=a, b=b)
    run = functools.partial(value_and_gradients, ours)
    assert api.implementations_in(run, x, q, adapter) == {f"merge_nf4.{name}"}
    got, wanted = run(x, q, adapter), value_and_gradients(written_out, x.astype(jnp.float32), q, adapter)
    for g, w in zip(jax.tree.leaves(got[1]), jax.tree.leaves(wanted[1]), strict=True):
        # In bfloat16 the reference misses the gradients of B and of the gain by 2e-2.
        assert float(jnp.linalg.norm(g.astype(jnp.float32) - w) / jnp.linalg.norm(w)) < 3e-2


def widened(model):
    """The model with what its weights of 16 bits and codes say, computing in float32."""

    def wide(leaf):
        if isinstance(leaf, quant.QuantizedArray):
            return dataclasses.replace(leaf, dtype=jnp.dtype(jnp.float32))
        return leaf.astype(jnp.float32) if leaf.dtype == jnp.bfloat16 else leaf

    graphdef, state = nnx.split(model)
    return nnx.merge(graphdef, jax.tree.map(wide, state, is_leaf=lambda leaf: isinstance(leaf, quant.QuantizedArray)))


@pytest.mark.gpu
@pytest.mark.parametrize("policy", ["offload", "projections", "full"])
def test_a_step_on_a_gpu_is_that_of_float32(policy):
    batch = batch_of(4, 520)
    function, trainable = gradients_of(model_of(policy, jnp.bfloat16), batch)
    ran = api.implementations_in(function, trainable)
    assert "merge_nf4.triton16" in ran and not {"merge_nf4.reference", "dequantize_nf4.reference"} & ran
    loss, found = jax.jit(function)(trainable)
    with jax.default_matmul_precision("highest"):
        exact, trainable = gradients_of(widened(model_of("none", jnp.bfloat16)), batch)
        expected, wanted = jax.jit(exact)(trainable)
    assert abs(float(loss - expected)) < 5e-4 * float(expected)
    norm = lambda tree: sum(float(jnp.sum(leaf.astype(jnp.float32) ** 2)) for leaf in jax.tree.leaves(tree)) ** 0.5
    # The reference in bfloat16 misses them by 4e-2.
    assert norm(jax.tree.map(jnp.subtract, found, wanted)) < 6e-2 * norm(wanted)
