"""Flash attention in Mosaic GPU: what it makes of a GPU's program on the CPU, its values on a GPU of 9.0."""

import dataclasses
import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from test_gpu import CONFIG, attend, batch, loss_and_gradients, qkv, tiny

from jaxlora import remat
from jaxlora.kernels import api
from jaxlora.kernels.attention_mosaic import attention_mosaic

BACKWARD = "__cudnn$fmhaSoftmaxBackward"


def out_of(q, k, v):
    return attention_mosaic(q, k, v, scale=0.1)


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """jax asks for cuDNN when it traces; what is lowered for a GPU needs none."""
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91300)
    monkeypatch.setattr(cudnn, "check_compute_capability", lambda _: True)
    monkeypatch.setattr(cudnn, "is_cuda_compute_capability_equal", lambda _: False)


def calls_in(function, *args):
    """The kernels of attention that a program for a GPU calls, in order."""
    text = jax.jit(function).trace(*args).lower(lowering_platforms=("cuda",)).as_text()
    return re.findall(r"custom_call @(mosaic_gpu|__cudnn\$\w+)", text)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_the_pullback_is_cudnns_without_its_forward_pass(dtype, as_on_a_gpu):
    q, k = jax.ShapeDtypeStruct((2, 256, 8, 128), dtype), jax.ShapeDtypeStruct((2, 256, 2, 128), dtype)
    pullback = lambda q, k, v, d_out: jax.vjp(out_of, q, k, v)[1](d_out)
    assert calls_in(pullback, q, k, k, q) == ["mosaic_gpu", BACKWARD]
    gradients = jax.eval_shape(pullback, q, k, k, q)
    assert [(g.shape, g.dtype) for g in gradients] == [(x.shape, dtype) for x in (q, k, k)]


@pytest.mark.parametrize("policy, times", [("projections", 1), ("attention", 1), ("full", 2)])
def test_a_policy_that_keeps_attention_does_not_run_it_again(policy, times, as_on_a_gpu):
    def f(x, w):
        def body(x, w):
            heads = (x @ w).reshape(1, 256, 2, 128)
            return x + out_of(heads, heads, heads).reshape(x.shape), None

        return jnp.sum(remat.scan(body, x, w, policy)[0].astype(jnp.float32))

    x, w = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((256, 256), (1, 256, 256)))
    assert sorted(calls_in(jax.grad(f, 1), x, w)) == [BACKWARD, *["mosaic_gpu"] * times]


def test_it_says_what_it_leaves_to_others():
    q = jnp.ones((1, 128, 2, 128), jnp.bfloat16)
    segments = jnp.ones((1, 128), jnp.int32)
    several: list[dict[str, Any]] = [{"window": 5}, {"softcap": 2.0}, {"query_segments": segments}]
    for options in several:
        with pytest.raises(NotImplementedError, match="no window, softcap, bias, sinks and documents"):
            attention_mosaic(q, q, q, scale=1.0, **options)
    with pytest.raises(NotImplementedError, match="float32"):
        attention_mosaic(*[q.astype(jnp.float32)] * 3, scale=1.0)
    for other in (q[:, :100], q[..., :64]):
        with pytest.raises(NotImplementedError, match=f"found {other.shape[-1]} and {other.shape[1]}"):
            attention_mosaic(other, other, other, scale=1.0)
    for offset, queries in ((3, q), (jnp.zeros((1,), jnp.int32), q), (0, q[:, :1])):
        with pytest.raises(NotImplementedError, match="own places"):
            attention_mosaic(queries, q, q, scale=1.0, offset=offset)
    mesh = jax.sharding.AbstractMesh((2,), ("data",))
    with jax.sharding.use_abstract_mesh(mesh), pytest.raises(NotImplementedError, match="mesh"):
        attention_mosaic(q, q, q, scale=1.0)


@pytest.mark.gpu
@pytest.mark.parametrize("length, name", [(api.LEAST_MOSAIC_ATTENTION, "mosaic"), (2048, "cudnn")])
def test_long_rows_take_it(length, name):
    q, k = (jax.ShapeDtypeStruct((1, length, n, 128), jnp.bfloat16) for n in (4, 2))
    both = lambda *args: jax.vjp(functools.partial(api.attention, scale=0.1), *args[:3])[1](args[3])
    assert api.implementations_in(both, q, k, k, q) == {f"attention.{name}"}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("length", [128, 384, 2048])
@pytest.mark.parametrize("heads, kv_heads", [(8, 2), (6, 6), (4, 1)])
def test_attention_equals_the_reference(key, heads, kv_heads, length, dtype):
    inputs = [x if x.dtype == jnp.float32 else x.astype(dtype) for x in qkv(key, heads, kv_heads, 128, 2, length)]
    run = functools.partial(attend, segments=None, window=None)
    got = jax.jit(functools.partial(run, "mosaic"))(*inputs)
    wanted = jax.jit(functools.partial(run, "reference"))(*[x.astype(jnp.float32) for x in inputs])
    for x, y in zip(got, wanted, strict=True):
        error = jnp.linalg.norm(x.astype(jnp.float32) - y) / jnp.linalg.norm(y)
        assert error < (1e-2 if dtype == jnp.bfloat16 else 2e-3), error  # as cuDNN's own


@pytest.mark.gpu
def test_scores_of_any_size_are_taken(key):
    """The highest score is taken off before the exponential, whichever block it is in."""
    q, k, v, d_out = qkv(key, 4, 2, 128, 1, 512)
    large = jnp.where(jnp.arange(512)[None, :, None, None] % 200 == 150, 300, 1).astype(k.dtype)
    run = functools.partial(attend, segments=None, window=None)
    got = jax.jit(functools.partial(run, "mosaic"))(q, k * large, v, d_out)
    wanted = jax.jit(functools.partial(run, "cudnn"))(q, k * large, v, d_out)
    for x, y in zip(got, wanted, strict=True):
        x, y = x.astype(jnp.float32), y.astype(jnp.float32)
        assert bool(jnp.all(jnp.isfinite(x))) and jnp.linalg.norm(x - y) < 1e-2 * jnp.linalg.norm(y)


@pytest.mark.gpu
def test_what_is_later_changes_nothing(key):
    q, k, v, d_out = qkv(key, 4, 2, 128, 1, 512)
    later = (jnp.arange(512) >= 300)[None, :, None, None]
    run = jax.jit(lambda *args: attend("mosaic", *args, d_out=d_out, segments=None, window=None)[0])
    before, after = run(q, k, v), run(q, *(jnp.where(later, x * 3 + 1, x) for x in (k, v)))
    assert bool(jnp.all(before[:, :300] == after[:, :300])) and not bool(jnp.all(before == after))


@pytest.mark.gpu
def test_it_is_mapped_over_adapters(key):
    inputs = qkv(key, 4, 2, 128, 2, 256)
    run = functools.partial(attend, "mosaic", segments=None, window=None)
    stacked = [jnp.stack([x, x[::-1]]) for x in inputs]
    got = jax.jit(jax.vmap(run))(*stacked)
    for i in range(2):
        for x, y in zip(got, jax.jit(run)(*(x[i] for x in stacked)), strict=True):
            assert jnp.linalg.norm((x[i] - y).astype(jnp.float32)) < 1e-3 * jnp.linalg.norm(y.astype(jnp.float32))


@pytest.mark.gpu
@pytest.mark.parametrize("policy", ["full", "attention", "projections", "offload_residual"])
def test_a_step_runs_it_under_every_kind_of_policy(policy, monkeypatch):
    monkeypatch.setattr(api, "LEAST_MOSAIC_ATTENTION", 512)
    config = dataclasses.replace(CONFIG, head_dim=128, num_hidden_layers=3, layer_types=CONFIG.layer_types[:3])
    rows = {name: value for name, value in batch().items() if name != "segment_ids"}
    results = []
    for name in ("none", policy):
        f, trainable = loss_and_gradients(tiny(jnp.bfloat16, name, config=config), rows)
        assert "attention.mosaic" in api.implementations_in(jax.grad(f), trainable)
        results.append(jax.jit(jax.value_and_grad(f))(trainable))
    for x, y in zip(*map(jax.tree.leaves, results), strict=True):
        x, y = x.astype(jnp.float32), y.astype(jnp.float32)
        assert jnp.linalg.norm(x - y) <= 2e-2 * jnp.linalg.norm(y) + 1e-6
