"""Grouped products: each row with its own group's matrix, and the gradients of the matrices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlora.kernels import api, grouped_triton
from jaxlora.kernels.grouped import grouped_lora_delta

SIZES = ([5, 0, 9, 2], [16, 0, 0, 0], [0, 0, 1, 15])


def operands(key, sizes, d_in, d_out, contracted=2, dtype=jnp.float32):
    keys = jax.random.split(key)
    shape = (len(sizes), d_out, d_in) if contracted == 2 else (len(sizes), d_in, d_out)
    x = jax.random.normal(keys[0], (sum(sizes), d_in)).astype(dtype)
    return x, (jax.random.normal(keys[1], shape) / d_in**0.5).astype(dtype), jnp.asarray(sizes, jnp.int32)


def one_by_one(x, w, sizes, contracted):
    """Each group's product in float64."""
    ends = np.cumsum(sizes)
    x, w = np.asarray(x, np.float64), np.asarray(w, np.float64)
    parts = [
        x[end - size : end] @ (matrix.T if contracted == 2 else matrix)
        for matrix, size, end in zip(w, np.asarray(sizes), ends, strict=True)
    ]
    return np.concatenate(parts)


def outer_one_by_one(x, y, sizes):
    ends = np.cumsum(sizes)
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    return np.stack([x[e - s : e].T @ y[e - s : e] for s, e in zip(np.asarray(sizes), ends, strict=True)])


@pytest.mark.parametrize("contracted", [1, 2])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_each_row_meets_its_own_groups_matrix(key, sizes, contracted):
    x, w, n = operands(key, sizes, 24, 40, contracted)
    np.testing.assert_allclose(api.grouped_dot(x, w, n, contracted), one_by_one(x, w, sizes, contracted), atol=1e-5)
    y = jnp.asarray(one_by_one(x, w, sizes, contracted), jnp.float32)
    np.testing.assert_allclose(api.grouped_outer(x, y, n), outer_one_by_one(x, y, sizes), atol=1e-4)
    assert api.implementations_in(functools.partial(api.grouped_dot, contracted=contracted), x, w, n) == {
        "grouped_dot.reference"
    }


def test_the_kernel_says_why_it_cannot_run(key):
    x, w, n = operands(key, SIZES[0], 24, 40)
    with pytest.raises(NotImplementedError, match="needs an NVIDIA GPU"):
        api.grouped_dot(x, w, n, 2, implementation="triton")
    with pytest.raises(NotImplementedError, match="multiplies bfloat16 or float16, not float32 with float32"):
        grouped_triton.grouped_dot(x, w, n, 2)
    with pytest.raises(NotImplementedError, match="not bfloat16 with float32"):
        grouped_triton.grouped_outer(x.astype(jnp.bfloat16), x, n)


# --- on a GPU ---

GPU_CASES = [  # sizes, in, out: tiles that end early, empty groups, ranks, many groups
    ([300, 0, 129, 1, 83], 200, 344),
    ([0, 0, 2048, 0], 4096, 1024),
    ([64, 64], 1024, 16),
    ([128, 77, 3], 16, 1024),
    ([17] * 128, 2048, 768),
]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("sizes, d_in, d_out", GPU_CASES, ids=["odd", "one", "rank out", "rank in", "many"])
def test_triton_equals_the_reference(key, sizes, d_in, d_out, dtype):
    for contracted in (1, 2):
        x, w, n = operands(key, sizes, d_in, d_out, contracted, dtype)
        for out_dtype in (None, jnp.float32):
            run = functools.partial(api.grouped_dot, contracted=contracted, dtype=out_dtype)
            assert api.implementations_in(run, x, w, n) == {"grouped_dot.triton"}
            got = jax.jit(run)(x, w, n)
            assert got.dtype == (dtype if out_dtype is None else out_dtype)
            wanted = one_by_one(x, w, sizes, contracted)
            error = np.abs(np.asarray(got, np.float64) - wanted).max() / np.abs(wanted).max()
            assert error < (float(jnp.finfo(dtype).eps) if out_dtype is None else 1e-5), (contracted, error)
    y = jax.random.normal(jax.random.fold_in(key, 1), (x.shape[0], d_out)).astype(dtype)
    run = functools.partial(api.grouped_outer, dtype=jnp.float32)
    assert api.implementations_in(run, x, y, n) == {"grouped_outer.triton"}
    wanted = outer_one_by_one(x, y, sizes)
    np.testing.assert_allclose(jax.jit(run)(x, y, n), wanted, atol=1e-5 * np.abs(wanted).max())


@pytest.mark.gpu
def test_triton_runs_in_an_experts_adapter_forward_and_backward(key):
    sizes = [300, 0, 129, 1, 83]
    x, _, n = operands(key, sizes, 256, 384, dtype=jnp.bfloat16)
    keys = jax.random.split(key)
    a, b = jax.random.normal(keys[0], (5, 16, 256)) / 16, jax.random.normal(keys[1], (5, 384, 16))

    def loss(x, a, b):
        return jnp.sum(jnp.sin(grouped_lora_delta(x, a, b, jnp.float32(0.5), n).astype(jnp.float32)))

    run = jax.value_and_grad(loss, (0, 1, 2))
    assert api.implementations_in(run, x, a, b) == {"grouped_dot.triton", "grouped_outer.triton"}
    got = jax.jit(run)(x, a, b)
    with jax.default_matmul_precision("highest"):
        wanted = jax.jit(run)(x.astype(jnp.float32), a, b)
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        error = jnp.linalg.norm(g.astype(jnp.float32) - w) / jnp.linalg.norm(w)
        assert float(error) < 2e-2, error
