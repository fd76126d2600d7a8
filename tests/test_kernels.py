"""The ops of the core in plain jnp against torch: values and gradients.  attention, cross entropy, LoRA."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from helpers import relative_error

from jaxlora.kernels.api import attention
from jaxlora.kernels.attention import attention_chunked, attention_cudnn, attention_reference
from jaxlora.kernels.cross_entropy import chunk_length, cross_entropy_reference, linear_cross_entropy
from jaxlora.kernels.lora import lora_delta


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def double(x):
    """A torch leaf in float64."""
    return torch.tensor(np.asarray(x), dtype=torch.float64, requires_grad=True)


# ---- attention -------------------------------------------------------------------------------------------------------


def visible(query_segments, key_segments, t, s, offset, window):
    """[B, T, S]: the rule of the kernel's header, a triple loop."""
    batch = 1 if query_segments is None else len(query_segments)
    out = np.zeros((batch, t, s), bool)
    for b in range(batch):
        for i in range(t):
            for j in range(s):
                distance = offset + i - j
                same = query_segments is None or query_segments[b][i] == key_segments[b][j]
                out[b, i, j] = same and distance >= 0 and (window is None or distance < window)
    return out


@pytest.mark.parametrize("groups", [1, 3, 6])
@pytest.mark.parametrize("window", [None, 1, 4, 100])
@pytest.mark.parametrize("segments", [False, True])
@pytest.mark.parametrize("offset", [0, 5])
def test_attention_equals_torch(groups, window, segments, offset):
    batch, t, heads, dim = 2, 11, 6, 10
    s = t + offset
    kv = heads // groups
    q, k, v = normal(0, batch, t, heads, dim), normal(1, batch, s, kv, dim), normal(2, batch, s, kv, dim)
    dy = normal(3, batch, t, heads, dim)
    key_segments = None
    if segments:
        key_segments = jnp.array([[1] * 6 + [2] * (s - 6), [1] * 3 + [2] * 4 + [0] * (s - 7)], jnp.int32)
    query_segments = key_segments[:, offset:] if segments else None

    arrays = [double(x) for x in (q, k, v)]
    mask = torch.tensor(visible(query_segments, key_segments, t, s, offset, window))[:, None]
    expected = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in arrays), attn_mask=mask, scale=0.3, enable_gqa=True
    ).transpose(1, 2)
    expected.backward(double(dy))

    def ours(q, k, v):
        return attention_reference(
            q, k, v, scale=0.3, window=window, query_segments=query_segments, key_segments=key_segments, offset=offset
        )

    out, vjp = jax.vjp(jax.jit(ours), q, k, v)
    assert relative_error(out, expected.detach()) < 1e-6
    for found, array in zip(vjp(dy), arrays, strict=True):
        assert relative_error(found, array.grad) < 2e-6


@pytest.mark.parametrize("attend", [attention_reference, functools.partial(attention_chunked, chunk=4)])
@pytest.mark.parametrize("with_sinks", [False, True])
def test_attention_with_a_softcap_a_bias_and_sinks_equals_torch(attend, with_sinks):
    q, k, v = normal(0, 2, 11, 6, 10), normal(1, 2, 11, 2, 10), normal(2, 2, 11, 2, 10)
    dy, bias, sinks = normal(3, 2, 11, 6, 10), normal(4, 2, 6, 11), normal(5, 6)
    arrays = [double(x) for x in (q, k, v)]
    heads = [arrays[0], *(x.repeat_interleave(3, dim=2) for x in arrays[1:])]
    scores = 2.0 * torch.tanh(torch.einsum("btnh,bsnh->bnts", *heads[:2]) * 0.7 / 2.0)
    scores = scores + torch.tensor(np.asarray(bias))[:, :, None]
    scores = scores.masked_fill(~torch.tensor(visible(None, None, 11, 11, 0, 5)), -torch.inf)
    if with_sinks:
        arrays.append(double(sinks))
        scores = torch.cat([scores, arrays[3][None, :, None, None].expand(2, 6, 11, 1)], dim=-1)
    expected = torch.einsum("bnts,bsnh->btnh", scores.softmax(-1)[..., :11], heads[2])
    expected.backward(double(dy))

    def ours(q, k, v, *sinks):
        options = dict(sinks=sinks[0]) if sinks else {}
        return attend(q, k, v, scale=0.7, window=5, softcap=2.0, key_bias=bias, **options)

    out, vjp = jax.vjp(jax.jit(ours), q, k, v, *([sinks] if with_sinks else []))
    assert relative_error(out, expected.detach()) < 1e-6
    for found, array in zip(vjp(dy), arrays, strict=True):
        assert relative_error(found, array.grad) < 2e-6


def test_cudnn_leaves_softcaps_and_biases_to_the_others():
    q = jnp.ones((1, 8, 2, 64), jnp.bfloat16)
    for options in (dict(softcap=2.0), dict(key_bias=jnp.zeros((1, 2, 8)))):
        with pytest.raises(NotImplementedError, match="no softcap on the scores and no bias of the keys"):
            attention_cudnn(q, q, q, scale=1.0, **options)
        assert attention(q, q, q, scale=1.0, **options).shape == q.shape


def test_attention_takes_a_traced_offset():
    q, k, v = normal(0, 1, 2, 2, 4), normal(1, 1, 6, 2, 4), normal(2, 1, 6, 2, 4)

    def attend(offset):
        return attention_reference(q, k, v, scale=1.0, offset=offset)

    for offset in (0, 3):
        np.testing.assert_array_equal(jax.jit(attend)(jnp.int32(offset)), jax.jit(lambda o=offset: attend(o))())


def test_attention_computes_its_softmax_in_float32():
    q, k, v = (jnp.asarray(normal(i, 1, 64, 2, 16), jnp.bfloat16) for i in range(3))
    exact = attention_reference(*(x.astype(jnp.float32) for x in (q, k, v)), scale=0.25)
    found = attention_reference(q, k, v, scale=0.25)
    assert found.dtype == jnp.bfloat16
    assert relative_error(found, exact) < 6e-3  # about one rounding of the weights and one of the output


# ---- cross entropy ---------------------------------------------------------------------------------------------------


def torch_cross_entropy(hidden, weight, labels, softcap=None):
    logits = hidden @ weight.T
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return torch.nn.functional.cross_entropy(logits, labels.long(), ignore_index=-100, reduction="sum")


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("chunk", [1, 4, 5, 23, 40])
def test_cross_entropy_equals_torch(chunk, softcap):
    n, d, v = 23, 12, 31  # neither 4 nor 5 divides 23
    hidden, weight = normal(0, n, d), normal(1, v, d)
    labels = np.random.default_rng(2).integers(0, v, n).astype(np.int32)
    labels[[0, 7, 8, 22]] = -100
    labels = jnp.asarray(labels)

    arrays = [double(x) for x in (hidden, weight)]
    expected = torch_cross_entropy(*arrays, torch.tensor(np.asarray(labels)), softcap)
    expected.backward()

    def ours(hidden, weight):
        return linear_cross_entropy(hidden, weight, labels, chunk, softcap)

    assert relative_error(cross_entropy_reference(hidden, weight, labels, softcap), expected.detach()) < 1e-6
    assert relative_error(ours(hidden, weight), expected.detach()) < 1e-6
    total, gradients = jax.jit(jax.value_and_grad(ours, argnums=(0, 1)))(hidden, weight)
    assert relative_error(total, expected.detach()) < 1e-6
    for found, array in zip(gradients, arrays, strict=True):
        assert relative_error(found, array.grad) < 2e-6
    # and each alone, which takes another path than both
    for argument in (0, 1):
        alone = jax.grad(lambda *xs: 3.0 * ours(*xs), argnums=argument)(hidden, weight)
        assert relative_error(alone, 3.0 * arrays[argument].grad) < 2e-6


def test_cross_entropy_of_no_label_is_zero_with_zero_gradient():
    hidden, weight = normal(0, 6, 4), normal(1, 9, 4)
    labels = jnp.full(6, -100, jnp.int32)
    total, gradients = jax.value_and_grad(linear_cross_entropy, argnums=(0, 1))(hidden, weight, labels, 4)
    assert total == 0.0
    assert all(not np.any(g) for g in gradients)


def test_cross_entropy_of_huge_logits_is_finite():
    hidden, weight = 100 * normal(0, 6, 4), 100 * normal(1, 9, 4)
    labels = jnp.arange(6, dtype=jnp.int32)
    expected = torch_cross_entropy(double(hidden), double(weight), torch.tensor(np.asarray(labels)))
    assert relative_error(linear_cross_entropy(hidden, weight, labels, 4), expected.detach()) < 1e-6


@pytest.mark.parametrize("tokens, vocab", [(1, 32_000), (100, 128_256), (8192, 128_256), (32_768, 151_936), (1000, 97)])
def test_chunks_are_alike_and_small(tokens, vocab):
    chunk = chunk_length(tokens, vocab)
    assert 1 <= chunk <= tokens
    assert chunk <= 128 or chunk * vocab * 4 <= 2**28
    wasted = -tokens % chunk
    assert wasted < 128 * -(-tokens // chunk)


# ---- LoRA ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lead", [(7,), (2, 5), (2, 3, 4)])
def test_lora_delta_equals_torch(lead):
    x, a, b, dy = normal(0, *lead, 12), normal(1, 3, 12), normal(2, 9, 3), normal(3, *lead, 9)
    arrays = [double(t) for t in (x, a, b)]
    expected = 0.7 * (arrays[0] @ arrays[1].T) @ arrays[2].T
    expected.backward(double(dy))

    out, vjp = jax.vjp(jax.jit(lora_delta), x, a, b, jnp.float32(0.7))
    assert relative_error(out, expected.detach()) < 1e-6
    *gradients, d_scaling = vjp(dy)
    for found, array in zip(gradients, arrays, strict=True):
        assert relative_error(found, array.grad) < 1e-6
    assert d_scaling == 0.0  # a constant


def test_lora_gradients_are_not_rounded_to_the_compute_dtype():
    x, dy = jnp.asarray(normal(0, 4096, 32), jnp.bfloat16), jnp.asarray(normal(1, 4096, 24), jnp.bfloat16)
    a, b = jnp.asarray(normal(2, 4, 32)), jnp.asarray(normal(3, 24, 4))
    a, b = (m.astype(jnp.bfloat16).astype(jnp.float32) for m in (a, b))  # so that only the gradients are rounded
    scaling = jnp.float32(0.5)

    def plain(x, a, b):
        return (x @ a.astype(x.dtype).T * scaling.astype(x.dtype)) @ b.astype(x.dtype).T

    exact = jax.vjp(plain, x.astype(jnp.float32), a, b)[1](dy.astype(jnp.float32))
    autodiff = jax.vjp(plain, x, a, b)[1](dy)
    ours = jax.vjp(lambda x, a, b: lora_delta(x, a, b, scaling), x, a, b)[1](dy)
    for name, index in (("a", 1), ("b", 2)):
        chex.assert_equal_shape([ours[index], exact[index]])
        assert ours[index].dtype == jnp.float32
        assert not np.array_equal(ours[index], ours[index].astype(jnp.bfloat16).astype(jnp.float32)), name
        assert relative_error(ours[index], exact[index]) < relative_error(autodiff[index], exact[index]), name


# ---- jit -------------------------------------------------------------------------------------------------------------


class TestWithAndWithoutJit(chex.TestCase):
    """Called from the prompt, inside of a program, or with numpy's arrays, an op has the same values and gradients."""

    def same(self, function, *arguments):
        def value_and_vjp(*arguments):
            out, vjp = jax.vjp(function, *arguments)
            return out, vjp(jnp.cos(out))

        found = self.variant(value_and_vjp)(*arguments)
        expected = value_and_vjp(*arguments)
        chex.assert_tree_all_finite(found)
        chex.assert_trees_all_equal_shapes_and_dtypes(found, expected)
        chex.assert_trees_all_close(found, expected, rtol=1e-5, atol=1e-5)

    @chex.variants(with_jit=True, without_jit=True, with_device=True)
    def test_attention(self):
        q, k, v = normal(0, 2, 5, 4, 8), normal(1, 2, 5, 2, 8), normal(2, 2, 5, 2, 8)
        segments = jnp.array([[1, 1, 2, 2, 2], [1, 1, 1, 1, 0]], jnp.int32)
        options = dict(scale=0.3, window=3, query_segments=segments, key_segments=segments)
        self.same(lambda q, k, v: attention(q, k, v, **options), q, k, v)

    @chex.variants(with_jit=True, without_jit=True, with_device=True)
    def test_cross_entropy(self):
        labels = jnp.array([3, -100, 0, 8, 2, 2], jnp.int32)
        self.same(lambda x, w: linear_cross_entropy(x, w, labels, 4), normal(0, 6, 4), normal(1, 9, 4))

    @chex.variants(with_jit=True, without_jit=True, with_device=True)
    def test_lora_delta(self):
        self.same(lora_delta, normal(0, 2, 5, 12), normal(1, 3, 12), normal(2, 9, 3), jnp.float32(0.7))
