"""Products in float8: what they compute, beside numpy's float64, and a model that trains with them."""

import functools
import re
import warnings

import chex
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from helpers import make_checkpoint, random_ids

from jaxlora import FastLanguageModel, fp8, lora, quant
from jaxlora.kernels import api, reference
from jaxlora.train import TrainState, make_train_step

SCHEMES = ("nf4", "int8", "fp8", "fp8_block", None)


def operands(key, tokens=160, d_in=128, d_out=192, rank=4, scheme="nf4", dtype=jnp.float32):
    keys = jax.random.split(key, 4)
    x = jax.random.normal(keys[0], (2, tokens // 2, d_in)) * jnp.exp(
        2 * jax.random.normal(keys[3], (2, tokens // 2, 1))
    )
    w = 0.02 * jax.random.normal(keys[1], (d_out, d_in))
    w = w if scheme is None else quant.quantize(w, scheme=scheme)
    a, b = jax.random.normal(keys[2], (rank, d_in)), 0.01 * jax.random.normal(keys[3], (d_out, rank))
    return x.astype(dtype), w, quant.LowRank(a, b, jnp.float32(0.7))


def dense(w):
    return quant.dequantize(w, jnp.float32) if isinstance(w, quant.QuantizedArray) else w


def rounded_rows(x):
    """x rounded to float8 as its header says, in float64."""
    x = np.asarray(x, np.float32)
    scale = np.abs(x).max(axis=-1, keepdims=True) * np.float32(1 / 448)
    return (x / scale).astype(ml_dtypes.float8_e4m3fn).astype(np.float64) * scale


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_product_is_that_of_rounded_operands(key, scheme):
    x, w, adapter = operands(key, scheme=scheme)
    for low_rank in (None, adapter):
        codes, scale = fp8.round_weight(w, low_rank, transposed=False)
        merged = np.asarray(dense(w), np.float64)
        if low_rank is not None:
            b, a = (np.asarray(m.astype(jnp.bfloat16), np.float64) for m in (adapter.b * adapter.scaling, adapter.a))
            merged = merged + b @ a
        held = np.asarray(codes, np.float64) * float(scale)
        # Half a unit: of a number's 3 bits, or of the smallest numbers.
        assert np.all(np.abs(held - merged) <= np.abs(merged) * (1 / 16 + 1e-5) + 2.0**-10 * float(scale))
        transposed, _ = fp8.round_weight(w, low_rank, transposed=True)
        np.testing.assert_array_equal(np.asarray(transposed, np.float32).T, np.asarray(codes, np.float32))

        y, pullback = jax.vjp(lambda x: fp8.matmul(x, w, low_rank), x)  # noqa: B023 (called in this turn)
        np.testing.assert_allclose(y, rounded_rows(x) @ held.T, atol=2e-5 * np.abs(y).max())
        dy = jax.random.normal(jax.random.fold_in(key, 1), y.shape)
        dx = rounded_rows(dy) @ held
        np.testing.assert_allclose(pullback(dy)[0], dx, atol=2e-5 * np.abs(dx).max())
        exact = np.asarray(x, np.float64) @ merged.T
        assert np.linalg.norm(y - exact) < 0.05 * np.linalg.norm(exact)


def test_an_adapters_gradients_are_those_of_16_bits(key):
    x, w, adapter = operands(key)

    def gradients(matmul):
        return jax.grad(lambda a, b: jnp.sum(matmul(x, w, quant.LowRank(a, b, adapter.scaling))), (0, 1))

    got, wanted = (gradients(matmul)(adapter.a, adapter.b) for matmul in (fp8.matmul, quant.matmul))
    chex.assert_trees_all_equal(got, wanted)


def test_a_weight_that_is_used_often_is_rounded_once(key):
    x, w, adapter = operands(key)
    shared = fp8.round_both(w, adapter)
    run = lambda w: jax.value_and_grad(lambda x, a: jnp.sum(jnp.sin(fp8.matmul(x, w, adapter._replace(a=a)))), (0, 1))
    chex.assert_trees_all_close(run(shared)(x, adapter.a), run(w)(x, adapter.a), rtol=1e-6)


def test_a_stack_is_read_by_its_index_and_its_own_scale(key):
    x, _, adapter = operands(key)
    sizes = jnp.array([1.0, 30.0, 0.2])[:, None, None]
    for scheme in SCHEMES[:-1]:
        q = quant.quantize(sizes * 0.02 * jax.random.normal(key, (3, 192, 128)), scheme=scheme)
        for i in range(3):
            one = jax.tree.map(lambda leaf, i=i: leaf[i], q)
            found = fp8.round_weight(q.at(jnp.int32(i)), adapter, transposed=False)
            chex.assert_trees_all_equal(*(jax.tree.map(lambda v: v.astype(jnp.float32), t) for t in (
                found, fp8.round_weight(one, adapter, transposed=False)
            )))  # fmt: skip
            largest = float(jnp.abs(dense(one)).max())
            assert largest <= float(found[1]) * 448 / fp8.HEADROOM * 1.0001 < 1.1 * largest


def test_few_tokens_are_multiplied_in_16_bits(key):
    few, w, adapter = operands(key, tokens=4)
    np.testing.assert_array_equal(fp8.matmul(few, w, adapter), quant.matmul(few, w, adapter))


def test_rows_of_zeros_and_of_large_numbers(key):
    x, w, adapter = operands(key)
    x = x.at[0, 0].set(0.0).at[0, 1].multiply(1e20).at[0, 2].multiply(1e-20)
    y = np.asarray(fp8.matmul(x, w, adapter))
    assert not y[0, 0].any() and np.all(np.isfinite(y))
    held = np.asarray(fp8.round_weight(w, adapter, transposed=False)[0], np.float64)
    held = held * float(fp8.round_weight(w, adapter, transposed=False)[1])
    for row in (1, 2):
        wanted = np.asarray(x[0, row], np.float64) @ held.T
        assert np.linalg.norm(y[0, row] - wanted) < 0.05 * np.linalg.norm(wanted)


def test_adapters_that_are_vmapped_share_one_weight(key):
    x, w, adapter = operands(key)
    adapters = quant.LowRank(*(jnp.stack([leaf, 2 * leaf]) for leaf in adapter[:2]), jnp.array([0.7, 0.7]))

    def run(matmul, x, a, b, scaling):
        y = matmul(x, w, quant.LowRank(a, b, scaling))
        return jnp.sum(y * jnp.cos(jnp.arange(y.size)).reshape(y.shape)), y

    def gradients(matmul):
        return jax.value_and_grad(functools.partial(run, matmul), (0, 1, 2), has_aux=True)

    (_, y), (dx, *got) = jax.vmap(gradients(fp8.matmul), in_axes=(None, 0, 0, 0))(x, *adapters[:3])
    for i in range(2):
        (_, exact), (exact_dx, *wanted) = gradients(quant.matmul)(x, adapters.a[i], adapters.b[i], adapter.scaling)
        chex.assert_trees_all_close([g[i] for g in got], wanted, rtol=1e-5, atol=1e-3)
        for found, truth in ((y[i], exact), (dx[i], exact_dx)):
            assert np.linalg.norm(found - truth) < 0.05 * np.linalg.norm(truth)


def load(folder, **kwargs):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*has no tokenizer files")
        return FastLanguageModel.from_pretrained(folder, **kwargs)[0]


def test_a_model_learns_in_float8_as_it_does_in_16_bits(tmp_path):
    make_checkpoint("llama", tmp_path, hidden_size=96, intermediate_size=192, num_hidden_layers=2)
    ids = jnp.tile(jnp.asarray(random_ids(4, 8)), (1, 16))
    rows, curves, ran = {"input_ids": ids, "labels": ids}, {}, {}
    for policy in ("none", "unsloth"):
        for dtype in (None, "fp8"):
            model = load(tmp_path, matmul_dtype=dtype, use_gradient_checkpointing=policy, load_in_4bit=True)
            FastLanguageModel.get_peft_model(model, r=8, use_gradient_checkpointing=policy)
            graphdef, trainable, frozen = lora.partition(model)
            optimizer = optax.adamw(1e-2)
            step, state = make_train_step(graphdef, optimizer), TrainState.create(trainable, optimizer)
            ran[dtype] = "f8E4M3FN" in step.lower(state, frozen, rows).as_text()
            losses = []
            for _ in range(30):
                state, metrics = step(state, frozen, rows)
                losses.append(float(metrics["loss"]))
            curves[dtype] = np.array(losses)
        assert ran == {None: False, "fp8": True}
        assert curves["fp8"][-1] < curves["fp8"][0] - 1.0
        np.testing.assert_allclose(curves["fp8"], curves[None], atol=0.15)


def test_what_cannot_multiply_in_float8_says_so(tmp_path):
    make_checkpoint("llama", tmp_path)
    with pytest.raises(ValueError, match="matmul_dtype is 'int4': it can be 'fp8', or None"):
        load(tmp_path, matmul_dtype="int4")
    with pytest.raises(ValueError, match="full_finetuning=True trains them all"):
        load(tmp_path, matmul_dtype="fp8", full_finetuning=True)
    model = load(tmp_path, matmul_dtype="fp8")
    assert model.lm_head.matmul_dtype is None
    with pytest.raises(ValueError, match="loaded with matmul_dtype='fp8', which rounds them otherwise"):
        FastLanguageModel.get_peft_model(model, qat_scheme="int8")


# --- on a GPU ---


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(100, 64), (1024, 4096), (896, 4864)])
def test_triton_rounds_to_float8_as_the_reference_does(key, shape):
    q = jax.lax.map(quant.quantize, 0.02 * jax.random.normal(key, (3, *shape)))
    a, b = jax.random.normal(key, (16, shape[1])) / 8, 0.01 * jax.random.normal(key, (shape[0], 16))
    fields = q.codes, q.scales, q.nested_absmax, q.nested_offset, jnp.int32(2)
    for low_rank in ((None, None), (a, b)):
        for transposed in (False, True):
            options = dict(shape=shape, dtype=fp8.DTYPE, transposed=transposed)
            args = (*fields, *low_rank, jnp.float32(2400.0))
            got = api.merge_nf4(*args, **options, implementation="triton").astype(jnp.float32)
            wanted = reference.merge_nf4(*args, **options).astype(jnp.float32)
            assert got.shape == (shape[::-1] if transposed else shape)
            if low_rank[0] is None:
                np.testing.assert_array_equal(got, wanted)
            else:  # sums in another order fall on the other side of a tie now and then
                assert float(jnp.mean(got != wanted)) < 1e-3
                np.testing.assert_allclose(got, wanted, rtol=0.13, atol=2**-9)


@pytest.mark.gpu
def test_the_tensor_cores_multiply_float8(key):
    x, w, adapter = operands(key, 8192, 2048, 4096, 16, dtype=jnp.bfloat16)
    run = jax.jit(jax.value_and_grad(lambda x: jnp.sum(fp8.matmul(x, w, adapter).astype(jnp.float32) ** 2)))
    text = run.lower(x).compile().as_text()
    # Forward and backward, by cuBLAS, or by XLA's own kernel where it may not try out which is faster (`gpu_tests.py`).
    assert text.count("matmul$f8") + len(re.findall(r"\((?:[\w.]+: f8e4m3fn\[[\d,]+\](?:, )?){2}\) -> bf16", text)) >= 2
    got, exact = (fn(x, w, adapter).astype(jnp.float32) for fn in (fp8.matmul, quant.matmul))
    assert float(jnp.linalg.norm(got - exact) / jnp.linalg.norm(exact)) < 0.05
