"""What only a GPU can show: which kernels run in a real step, that documents do not leak, that offload is exact."""

import dataclasses
import functools
import os
import re
import subprocess
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jaxlora import SamplingParams, lora
from jaxlora.config import LoraConfig, ModelConfig, QuantConfig, RopeConfig
from jaxlora.engine import Engine
from jaxlora.generate import _decode, _prefill, generate
from jaxlora.kernels import api
from jaxlora.kernels.attention import MAX_SEGMENTS
from jaxlora.loss import causal_lm_loss
from jaxlora.model import CausalLM
from jaxlora.offload import pinned_host, take_rows
from jaxlora.train import TrainState, make_train_step

pytestmark = pytest.mark.gpu


def segments_of(*rows):
    """Segment ids [B, T] of rows of document lengths; the rest of a row is padding."""
    longest = 512
    ids = np.zeros((len(rows), longest), np.int32)
    for row, lengths in zip(ids, rows, strict=True):
        ends = np.cumsum(lengths)
        for number, (start, end) in enumerate(zip(ends - lengths, ends, strict=True)):
            row[start:end] = number + 1
    return jnp.asarray(ids)


PACKED = segments_of([100, 300, 1, 80], [512])


def attend(implementation, q, k, v, d_out, sinks=None, *, segments, window):
    """The output, and the gradients of q, k, v and of the sinks, if any."""
    given = (q, k, v) if sinks is None else (q, k, v, sinks)

    def f(q, k, v, sinks=None):
        out = api.attention(
            q, k, v, scale=q.shape[-1] ** -0.5, window=window, sinks=sinks, query_segments=segments,
            key_segments=segments, implementation=implementation,
        )  # fmt: skip
        if segments is not None:  # what padding attends to is nobody's business
            out = jnp.where((segments > 0)[:, :, None, None], out, jnp.zeros((), out.dtype))
        return jnp.sum(out.astype(jnp.float32) * d_out), out

    (_, out), gradients = jax.value_and_grad(f, tuple(range(len(given))), has_aux=True)(*given)
    return out, *gradients


def sinks_of(heads, dtype=jnp.bfloat16):
    """Of each head, from one that takes next to all attention to one that takes nothing."""
    return jnp.resize(jnp.array([8.0, -30.0, 0.0, 2.5, -3.0, 5.0, 1.0], dtype), heads)


def with_sinks_of(q, k, v, d_out, dtype=jnp.bfloat16):
    """Inputs of `attend`. Values and what is sent back have a mean: a sink's gradient would be a sum of random signs
    else, of which rounding leaves few digits."""
    return [q, k, v + 0.5, d_out + 0.5, sinks_of(q.shape[2], dtype)]


def qkv(key, heads, kv_heads, dim, batch=2, length=512):
    shapes = [(batch, length, n, dim) for n in (heads, kv_heads, kv_heads, heads)]
    draws = [jax.random.normal(k, s, jnp.float32) for k, s in zip(jax.random.split(key, 4), shapes, strict=True)]
    return [x.astype(jnp.bfloat16) for x in draws[:3]] + [draws[3]]


@pytest.mark.parametrize("window", [None, 70])
@pytest.mark.parametrize("segments", [None, PACKED], ids=["whole", "packed"])
@pytest.mark.parametrize("heads, kv_heads, dim", [(8, 2, 64), (6, 2, 128), (2, 1, 256), (4, 4, 96)])
@pytest.mark.parametrize("with_sinks", [False, True], ids=["plain", "sinks"])
def test_cudnn_attention_equals_the_reference(key, with_sinks, heads, kv_heads, dim, segments, window):
    inputs = qkv(key, heads, kv_heads, dim)
    inputs = with_sinks_of(*inputs) if with_sinks else inputs
    equals_the_reference(inputs, segments, window)


# Rows of three, of none and of one document: cuDNN numbers them through the batch.
UNEVEN = segments_of([200, 1, 250], [], [500])


@pytest.mark.parametrize("window", [None, 128])
@pytest.mark.parametrize("segments", [None, UNEVEN], ids=["whole", "packed"])
@pytest.mark.parametrize("heads, kv_heads", [(64, 8), (8, 1)])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32], ids=["bf16", "f32"])
def test_sinks_with_heads_of_gpt_oss(key, dtype, heads, kv_heads, segments, window):
    inputs = with_sinks_of(*qkv(key, heads, kv_heads, 64, batch=3), dtype)
    equals_the_reference(inputs, segments, window)


def equals_the_reference(inputs, segments, window):
    run = functools.partial(attend, segments=segments, window=window)
    assert api.implementations_in(functools.partial(run, None), *inputs) >= {"attention.cudnn"}
    got = jax.jit(functools.partial(run, "cudnn"))(*inputs)
    wide = [x.astype(jnp.float32) for x in inputs]
    wanted = jax.jit(functools.partial(run, "reference"))(*wide)
    for x, y in zip(got, wanted, strict=True):
        error = jnp.linalg.norm(x.astype(jnp.float32) - y) / jnp.linalg.norm(y)
        assert error < 1e-2, error  # bfloat16 in and out: 2^-8 an element


@pytest.mark.parametrize("sinks", [None, sinks_of(4)], ids=["plain", "sinks"])
def test_no_document_leaks_into_another(key, sinks):
    q, k, v, d_out = qkv(key, 4, 2, 64)
    document = (PACKED == 2)[:, :, None, None]

    def run(q, k, v):
        return jax.jit(functools.partial(attend, "cudnn", segments=PACKED, window=None))(q, k, v, d_out, sinks)[:4]

    before = run(q, k, v)
    changed = [jnp.where(document, x * 3 + 1, x) for x in (q, k, v)]
    after = run(*changed)
    for x, y in zip(before, after, strict=True):
        outside = ~document & (PACKED > 0)[:, :, None, None]
        assert bool(jnp.all(jnp.where(outside, x == y, True)))
        assert not bool(jnp.all(x == y))


@pytest.mark.parametrize("sinks", [[], [sinks_of(4)]], ids=["plain", "sinks"])
def test_rows_of_more_documents_than_cudnn_has_places_for(key, sinks):
    segments = segments_of([10] * (MAX_SEGMENTS + 5), [400])
    inputs = qkv(key, 4, 2, 64) + sinks
    got = jax.jit(functools.partial(attend, "cudnn", segments=segments, window=None))(*inputs)
    wanted = jax.jit(functools.partial(attend, "reference", segments=segments, window=None))(*inputs)
    for x, y in zip(got, wanted, strict=True):
        chex.assert_trees_all_close(x.astype(jnp.float32), y.astype(jnp.float32), atol=0.1, rtol=2e-2)


@pytest.mark.parametrize("segments", [None, UNEVEN], ids=["whole", "packed"])
@pytest.mark.parametrize("window", [None, 128])
def test_padding_gets_zeros_and_gives_none_with_sinks(key, segments, window):
    """And nothing is NaN, whatever lay in the memory that cuDNN leaves as it was."""
    q, k, v, d_out = qkv(key, 8, 1, 64, batch=3)
    sent = d_out if segments is None else jnp.where((segments > 0)[:, :, None, None], d_out, jnp.nan)

    @jax.jit
    def run(q, k, v, sinks, sent):
        options = dict(window=window, query_segments=segments, key_segments=segments, implementation="cudnn")
        attention = functools.partial(api.attention, scale=0.125, **options)
        out, pull = jax.vjp(lambda q, k, v, sinks: attention(q, k, v, sinks=sinks), q, k, v, sinks)
        return out, *pull(sent.astype(out.dtype))

    for x in run(q, k, v, sinks_of(8), sent):
        assert bool(jnp.all(jnp.isfinite(x)))
        if segments is not None and x.ndim == 4:
            assert not bool(jnp.any(jnp.where((segments == 0)[:, :, None, None], x, jnp.zeros((), x.dtype))))


CONFIG = ModelConfig(
    model_type="llama", vocab_size=512, hidden_size=256, intermediate_size=512, num_hidden_layers=6,
    num_attention_heads=4, num_key_value_heads=2, head_dim=64, max_position_embeddings=1024, rope=RopeConfig(),
    layer_types=("full_attention",) * 6,
)  # fmt: skip


def tiny(dtype, policy, quant_config=None, config=CONFIG):
    model = CausalLM(config, dtype=dtype, quant_config=quant_config, rngs=nnx.Rngs(0))
    lora.add_adapters(model, LoraConfig(r=8), jax.random.key(1))
    for adapter in lora.adapters(model):  # a B of zeros would give A no gradient
        b = adapter.node.lora_B
        b.set_value(jax.random.normal(jax.random.key(2), b.get_value().shape) * 0.02)
    model.remat_policy = policy
    return model


def batch(length=512):
    # Eight tokens over and over: something to learn, which random tokens are not.
    ids = jnp.tile(jax.random.randint(jax.random.key(3), (2, 8), 0, CONFIG.vocab_size, jnp.int32), (1, length // 8))
    segments = PACKED[:, :length]
    # What padding attends to is nobody's business, so nobody asks what comes after it.
    return {"input_ids": ids, "labels": jnp.where(segments > 0, ids, -100), "segment_ids": segments}


def loss_and_gradients(model, data):
    graphdef, trainable, frozen = lora.partition(model)

    def f(trainable):
        total, weight, _ = causal_lm_loss(nnx.merge(graphdef, trainable, frozen), data)
        return total / weight

    return f, trainable


@pytest.mark.parametrize(
    "policy", ["projections", "attention", "full", "offload", "offload_attention", "offload_residual"]
)
def test_remat_and_offload_change_no_gradient(policy):
    # jaxlib 0.11.0 read offloaded residuals of a scan in the wrong order (openxla/xla 46231): each layer differs here.
    results = []
    for name in ("none", policy):
        f, trainable = loss_and_gradients(tiny(jnp.float32, name), batch())
        with jax.default_matmul_precision("highest"):
            results.append(jax.jit(jax.value_and_grad(f))(trainable))
    chex.assert_trees_all_close(*results, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("layers", [0, 2, 5])
def test_layers_that_the_host_has_no_room_for_stay_on_the_device(layers):
    kept = 2 * 512 * CONFIG.hidden_size * 4  # bytes of a layer's input
    results, on_host = [], 0
    for name, room in (("none", None), ("offload", layers * kept + CONFIG.num_hidden_layers)):
        model = tiny(jnp.float32, name)
        model.host_bytes = room
        f, trainable = loss_and_gradients(model, batch())
        with jax.default_matmul_precision("highest"):
            compiled = jax.jit(jax.value_and_grad(f)).lower(trainable).compile()
        results.append(compiled(trainable))
        on_host = compiled.memory_analysis().host_temp_size_in_bytes
    chex.assert_trees_all_close(*results, rtol=1e-4, atol=1e-6)
    assert layers * kept <= on_host < (layers + 1) * kept


def test_offload_moves_the_residuals_to_the_host():
    sizes = {}
    for policy in ("full", "offload"):
        f, trainable = loss_and_gradients(tiny(jnp.bfloat16, policy), batch())
        analysis = jax.jit(jax.grad(f)).lower(trainable).compile().memory_analysis()
        sizes[policy] = (analysis.temp_size_in_bytes, analysis.host_temp_size_in_bytes)
    kept = 2 * 512 * CONFIG.hidden_size * 2 * CONFIG.num_hidden_layers
    assert sizes["offload"][1] >= kept and sizes["full"][1] == 0
    assert sizes["offload"][0] < sizes["full"][0]


def test_a_step_runs_the_gpu_kernels_and_learns():
    model = tiny(jnp.bfloat16, "full", QuantConfig())
    f, trainable = loss_and_gradients(model, batch())
    ran = api.implementations_in(jax.grad(f), trainable)
    assert {"merge_nf4.triton16", "attention.cudnn", "gated.triton", "gated_backward.triton"} <= ran
    assert not {"merge_nf4.reference", "dequantize_nf4.reference"} & ran

    graphdef, trainable, frozen = lora.partition(model)
    optimizer = optax.adamw(1e-2)
    step, state = make_train_step(graphdef, optimizer), TrainState.create(trainable, optimizer)
    losses = []
    for _ in range(20):
        state, metrics = step(state, frozen, batch())
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0] - 0.5, losses


WIDE = dataclasses.replace(
    CONFIG, layer_types=CONFIG.layer_types[:3], hidden_size=1024, num_attention_heads=16, num_key_value_heads=8,
    num_hidden_layers=3,
)  # fmt: skip


@pytest.mark.parametrize("policy", ["none", "full", "offload_residual"])
def test_many_tokens_are_normed_by_kernels(policy):
    def gradients(policy, dtype):
        f, trainable = loss_and_gradients(tiny(dtype, policy, config=WIDE), batch())
        norms = {name for name in api.implementations_in(jax.grad(f), trainable) if "norm" in name}
        assert norms == {"residual_norm.triton_many" if dtype == jnp.bfloat16 else "residual_norm.reference"}
        compiled = jax.jit(jax.grad(f)).lower(trainable).compile()
        # Nothing is left of the weights' gradients, which nobody asks for.
        assert not re.search(r"residual_norm\.triton_many[^\n]*reduce_sum", compiled.as_text())
        return np.concatenate([np.ravel(np.asarray(x, np.float64)) for x in jax.tree.leaves(compiled(trainable))])

    with jax.default_device(jax.devices("cpu")[0]):  # where float32 is exact, and soon compiled
        exact = gradients("none", jnp.float32)
    assert np.linalg.norm(gradients(policy, jnp.bfloat16) - exact) < 2e-2 * np.linalg.norm(exact)


def test_norms_of_float8_products_are_left_to_xla():
    """Which rounds in the same kernels; but the last norm, which the head reads, is not."""
    model = tiny(jnp.bfloat16, "full", config=WIDE)
    lora.multiply_in(model, "fp8")
    ran = api.implementations_in(lambda model, ids: model(ids), model, batch()["input_ids"])
    assert {"residual_norm.reference", "residual_norm.triton_many"} <= ran


REPEAT = """
import jax, optax, sys
sys.path.insert(0, "tests")
from test_gpu import *
import hashlib
windows = dict(sliding_window=100, layer_types=("sliding_attention", "sliding_attention", "full_attention") * 2)
alternating = dataclasses.replace(CONFIG, **windows)
for policy, config in (("none", CONFIG), ("projections", CONFIG), ("full", alternating), ("offload", CONFIG)):
    model = tiny(jnp.bfloat16, policy, QuantConfig(), config)
    graphdef, trainable, frozen = lora.partition(model)
    optimizer = optax.adamw(1e-2)
    step = make_train_step(graphdef, optimizer, full_determinism=True)
    for data in (batch(), {name: value for name, value in batch().items() if name != "segment_ids"}):
        state = TrainState.create(jax.tree.map(jnp.copy, trainable), optimizer)
        for _ in range(5):
            state, metrics = step(state, frozen, data)
        bits = b"".join(np.asarray(x).tobytes() for x in jax.tree.leaves(state.trainable))
        print(policy, float(metrics["loss"]), hashlib.sha256(bits).hexdigest())
"""


def test_the_same_run_gives_the_same_bits_with_full_determinism():
    """In two processes, side by side, which choose products for themselves."""
    environment = dict(os.environ, XLA_FLAGS="", XLA_PYTHON_CLIENT_PREALLOCATE="false")
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    runs = [subprocess.Popen([sys.executable, "-c", REPEAT], env=environment, **pipes) for _ in range(2)]
    (one, errors), (other, _) = [run.communicate() for run in runs]
    assert runs[0].returncode == 0, errors[-2000:]
    assert one == other and len(one.splitlines()) == 8


def test_the_host_looks_up_rows_of_an_offloaded_table(key):
    table = jax.random.normal(key, (50_000, 2048)).astype(jnp.bfloat16)
    hosted = jax.device_put(table, pinned_host())
    ids = jax.random.randint(key, (2, 512), 0, 50_000, jnp.int32)
    compiled = jax.jit(take_rows).lower(hosted, ids).compile()
    rows = compiled(hosted, ids)
    assert rows.sharding.memory_kind == "device"
    chex.assert_trees_all_equal(rows, table[ids])
    assert compiled.memory_analysis().temp_size_in_bytes < table.nbytes / 4  # the table does not travel


@pytest.mark.parametrize("rank", [0, 8])
@pytest.mark.parametrize("quant_config", [QuantConfig(), None])
def test_decoding_by_kernels_draws_what_one_pass_would(quant_config, rank):
    """Each token is one of those that a pass over the finished text finds likeliest, but for the rounding of logits."""
    model = CausalLM(CONFIG, dtype=jnp.bfloat16, quant_config=quant_config, rngs=nnx.Rngs(0))
    if rank:
        lora.add_adapters(model, LoraConfig(r=rank), jax.random.key(1))
        for adapter in lora.adapters(model):
            adapter.node.lora_B.set_value(0.02 * jax.random.normal(jax.random.key(2), adapter.node.lora_B.shape))
    prompts = np.random.default_rng(0).integers(3, 512, (3, 50))
    mask = np.arange(50) >= np.array([0, 7, 20])[:, None]

    logits, cache = _prefill(model, np.where(mask, prompts, 0), mask.astype(np.int32), places=512)
    arguments = logits, jnp.asarray(mask.sum(axis=1), jnp.int32), jnp.int32(2), jnp.zeros(0, jnp.int32), jnp.int32(0)
    ran = api.implementations_in(functools.partial(_decode, sampling=None), model, cache, *arguments)
    always = {"decode_attention.triton", "residual_norm.triton", "gated.triton"}
    if quant_config and not rank:
        always -= {"gated.triton"}  # it is inside the product
    assert ran == always | {"matmul_nf4.triton" if quant_config else "matmul_dense.triton"}

    ids = generate(model, prompts, attention_mask=mask, max_new_tokens=40, eos_token_id=[])
    segments = jnp.pad(jnp.asarray(mask, jnp.int32), ((0, 0), (0, 40)), constant_values=1)
    scores = jax.jit(lambda model, ids, segments: model(ids, segment_ids=segments))(model, ids, segments)[:, 49:-1]
    drawn = jnp.take_along_axis(scores, ids[:, 50:, None], axis=2)[..., 0]
    spread = float(jnp.std(scores))
    assert float(jnp.max(jnp.max(scores, axis=2) - drawn)) < 0.1 * spread
    assert float(jnp.mean(jnp.argmax(scores, axis=2) == ids[:, 50:])) > 0.9


@pytest.mark.parametrize("quant_config", [QuantConfig(), None], ids=["nf4", "dense"])
def test_many_rows_add_up_no_parts_by_themselves(quant_config):
    """Eight launches a layer, or seven; and each token is one of those that a pass over the finished text finds
    likeliest."""
    # Keys are 256 wide: XLA splits the head, which is 512 wide, too, and may add that up.
    widths = dict(hidden_size=1024, intermediate_size=8192, num_attention_heads=8, num_key_value_heads=2, head_dim=128)
    config = dataclasses.replace(CONFIG, **widths)
    model = CausalLM(config, dtype=jnp.bfloat16, quant_config=quant_config, rngs=nnx.Rngs(0))
    prompts = np.random.default_rng(0).integers(3, 512, (64, 50))
    logits, cache = _prefill(model, prompts, np.ones_like(prompts), places=128)
    arguments = logits, jnp.full(64, 50, jnp.int32), jnp.int32(2), jnp.zeros(0, jnp.int32), jnp.int32(0)
    ran = api.implementations_in(functools.partial(_decode, sampling=None), model, cache, *arguments)
    gates = quant_config is not None and api.compute_capability() == "9.0"  # in the product's launch
    products = {"matmul_dense.triton" if quant_config is None else "matmul_nf4.triton_tiles", "gated.triton"}
    assert ran == {"decode_attention.triton", "residual_norm.triton"} | (
        {"matmul_nf4.triton_wgmma"} if gates else products
    )
    program = _decode.lower(model, cache, *arguments, sampling=None).compile().as_text()
    # A norm; q, k, v; attention; o; a norm; gate and up; what they gate, or not; down. And the last norm.
    launches = 7 if gates else 8
    assert program.count('custom_call_target="triton_kernel_call_ffi"') == launches * config.num_hidden_layers + 1
    if gates:  # nor does XLA put x into the order of the products
        assert not re.search(r"^ *%?\S*transpose\S* = bf16\[", program, re.MULTILINE)
    assert re.search(r" = \(f32\[\d+,64,1024\].* custom-call\(", program)  # there are parts
    fusions = re.findall(r"^%fused\S* \((.*)\) -> ", program, re.MULTILINE)
    assert fusions and not [fusion for fusion in fusions if re.search(r"f32\[\d+,64,(1,)?(1024|256)\]", fusion)]

    ids = generate(model, prompts, max_new_tokens=40, eos_token_id=[])
    scores = jax.jit(lambda model, ids: model(ids))(model, ids)[:, 49:-1]
    drawn = jnp.take_along_axis(scores, ids[:, 50:, None], axis=2)[..., 0]
    assert float(jnp.max(jnp.max(scores, axis=2) - drawn)) < 0.1 * float(jnp.std(scores))
    assert float(jnp.mean(jnp.argmax(scores, axis=2) == ids[:, 50:])) > 0.9


def test_a_row_takes_five_launches_a_layer():
    model = CausalLM(CONFIG, dtype=jnp.bfloat16, quant_config=QuantConfig(), rngs=nnx.Rngs(0))
    prompt = np.random.default_rng(0).integers(3, 512, (1, 50))
    logits, cache = _prefill(model, prompt, np.ones_like(prompt), places=512)
    arguments = logits, jnp.full(1, 50, jnp.int32), jnp.int32(9), jnp.zeros(0, jnp.int32), jnp.int32(0)
    program = _decode.lower(model, cache, *arguments, sampling=None).compile().as_text()
    # q, k, v; attention; o; gate and up; down. And the last norm.
    assert program.count('custom_call_target="triton_kernel_call_ffi"') == 5 * CONFIG.num_hidden_layers + 1
    found = generate(model, prompt, max_new_tokens=40, eos_token_id=[])
    scores = model(found)[:, 49:-1]
    drawn = jnp.take_along_axis(scores, found[:, 50:, None], axis=2)[..., 0]
    assert float(jnp.max(jnp.max(scores, axis=2) - drawn)) < 0.1 * float(jnp.std(scores))


def test_the_engine_draws_what_generate_does():
    """Greedy, of float32: requests that share slots get the tokens that each gets alone."""
    model = tiny(jnp.float32, "none")
    prompts = [np.random.default_rng(n).integers(3, 512, n).tolist() for n in (3, 40, 17, 9, 1)]
    params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
    with jax.default_matmul_precision("highest"):
        outputs = Engine(max_slots=2).generate(model, prompts, params)
        for prompt, request in zip(prompts, outputs, strict=True):
            alone = np.asarray(generate(model, [prompt], max_new_tokens=24, eos_token_id=[]))[0, len(prompt) :]
            assert request.outputs[0].token_ids == alone.tolist()
