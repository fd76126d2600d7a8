"""Tiles of tokens: the same function, and less of it at once."""

import chex
import jax
import jax.numpy as jnp
import pytest

from jaxlora import remat


@pytest.mark.parametrize("tile", [7, 8, 24, 100, None])
def test_tiles_change_neither_value_nor_gradient(key, tile):
    x = jax.random.normal(key, (2, 12, 5))
    w = jax.random.normal(jax.random.fold_in(key, 1), (5, 6))

    def f(x, w):
        return jnp.sum(jnp.sin(remat.over_tiles(lambda rows, index: jnp.tanh(rows @ w), x, tile)))

    def plain(x, w):
        return jnp.sum(jnp.sin(jnp.tanh(x @ w)))

    got, wanted = (jax.value_and_grad(g, (0, 1))(x, w) for g in (f, plain))
    chex.assert_trees_all_close(got, wanted, rtol=1e-5, atol=1e-5)


def test_tiles_bound_what_exists_at_once(key):
    x, w = jnp.ones((1, 4096, 8)), jnp.ones((8, 512))

    def temporaries(tile):
        f = lambda x: jnp.sum(remat.over_tiles(lambda rows, index: jnp.tanh(rows @ w) @ w.T, x, tile))
        return jax.jit(jax.grad(f)).lower(x).compile().memory_analysis().temp_size_in_bytes

    assert temporaries(None) > 4096 * 512 * 4
    assert temporaries(256) < 4096 * 512 * 4 / 4


def test_a_tile_knows_its_number(key):
    x = jnp.zeros((2, 6, 1))
    out = remat.over_tiles(lambda rows, index: rows + jnp.asarray(index, jnp.float32), x, 4)
    assert out.reshape(-1).tolist() == [0] * 4 + [1] * 4 + [2] * 4
