"""Tiles of tokens: the same function, and less of it at once."""

import chex
import jax
import jax.numpy as jnp
import pytest
from jax._src.ad_checkpoint import saved_residuals
from jax.ad_checkpoint import checkpoint_name

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


@pytest.mark.parametrize("policy", list(remat.POLICIES))
def test_a_scan_under_a_policy_is_the_scan(key, policy):
    """Values and gradients, of arrays that learn and none that do not, beside what a body returns for each layer."""
    w = jax.random.normal(key, (5, 8, 8)) / 3
    constant = jnp.linspace(0.5, 1.5, 5)
    x = jax.random.normal(jax.random.fold_in(key, 1), (4, 8))
    index = jnp.arange(5, dtype=jnp.int32)

    def loss(scan):
        def f(w, x):
            shift = jnp.sum(constant)

            def body(carry, layer):
                (h, nothing), (w, c, i) = carry, layer
                h = checkpoint_name(jnp.tanh(h @ w), "attention_output") * c + shift * i.astype(jnp.float32)
                return (h, nothing), jnp.sum(h * h)

            (h, _), squares = scan(body, (x, None), (w, constant, index))
            return jnp.sum(jnp.sin(h)) + 0.1 * jnp.sum(squares)

        return f

    got = jax.jit(jax.value_and_grad(loss(lambda *a: remat.scan(*a, policy)), (0, 1)))(w, x)
    wanted = jax.jit(jax.value_and_grad(loss(jax.lax.scan), (0, 1)))(w, x)
    chex.assert_trees_all_close(got, wanted, rtol=1e-5, atol=1e-5)
    # Under vmap, as a stack of adapters has it, and where only x learns.
    many = jax.vmap(jax.grad(loss(lambda *a: remat.scan(*a, policy))), in_axes=(0, None))(jnp.stack([w, 2 * w]), x)
    chex.assert_trees_all_close(many[0], wanted[1][0], rtol=1e-4, atol=1e-4)
    only_x = jax.grad(loss(lambda *a: remat.scan(*a, policy)), 1)(w, x)
    chex.assert_trees_all_close(only_x, wanted[1][1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("policy, kept", [("offload", 1), ("offload_attention", 2), ("offload_residual", 3)])
def test_offload_keeps_the_inputs_of_layers_and_what_is_named(key, policy, kept):
    w, x, shift = jax.random.normal(key, (6, 64, 64)) / 8, jnp.ones((128, 64)), jnp.ones((7, 64))

    def f(w):
        def body(h, w):
            h = checkpoint_name(jnp.sin(jnp.tanh(h @ w) @ w), "attention_output")
            h = checkpoint_name(jnp.sin(h @ w), "residual")
            return jnp.tanh(h @ w + shift[3]), None

        return jnp.sum(remat.scan(body, x, w, policy)[0])

    sizes = [aval.size for aval, _ in saved_residuals(f, w) if aval.ndim == 3]
    assert sorted(sizes) == sorted([6 * 64 * 64] + kept * [6 * 128 * 64])


@pytest.mark.parametrize("there", [0, 1, 4, 5, 9])
def test_what_the_host_has_no_room_for_stays_on_the_device(key, there):
    """Of 5 layers, each of which keeps two arrays of [16, 8]: the first ones' lie on the host. Values and gradients."""
    w, x, shift = jax.random.normal(key, (5, 8, 8)) / 3, jnp.ones((16, 8)), jnp.linspace(0.0, 1.0, 8)
    room = there * 2 * x.nbytes + x.nbytes

    def loss(scan):
        def f(w, x, shift):
            def body(h, layer):
                w, i = layer
                h = checkpoint_name(jnp.tanh(h @ w), "attention_output") * i.astype(jnp.float32) + shift
                return jnp.sin(h), jnp.sum(h * h)

            h, squares = scan(body, x, (w, jnp.arange(5, dtype=jnp.int32)))
            return jnp.sum(h) + jnp.sum(jnp.linspace(0.5, 1.0, 5) * squares)

        return f

    ours = loss(lambda *a: remat.scan(*a, "offload_attention", room))
    got, wanted = (jax.jit(jax.value_and_grad(f, (0, 1, 2)))(w, x, shift) for f in (ours, loss(jax.lax.scan)))
    chex.assert_trees_all_close(got, wanted, rtol=1e-5, atol=1e-5)
    many = jax.vmap(jax.grad(ours), in_axes=(0, None, None))(jnp.stack([w, 2 * w]), x, shift)
    chex.assert_trees_all_close(many[0], wanted[1][0], rtol=1e-4, atol=1e-4)

    kept = [aval for aval, _ in saved_residuals(ours, w, x, shift) if aval.shape[1:] == x.shape]
    on_host = [aval.shape[0] for aval in kept if aval.memory_space == jax.memory.Space.Host]
    on_device = [aval.shape[0] for aval in kept if aval.memory_space != jax.memory.Space.Host]
    assert on_host == [min(there, 5)] * 2 and on_device == [5 - there] * 2 * (there < 5)


@pytest.mark.parametrize("policy", list(remat.POLICIES))
def test_what_all_layers_read_gets_the_sum_of_their_gradients(key, policy):
    w, x, shift = jax.random.normal(key, (3, 4, 4)), jnp.ones((2, 4)), jnp.linspace(0.0, 1.0, 4)

    def loss(scan):
        def f(shift, w):
            double = 2.0 * shift
            return jnp.sum(scan(lambda h, w: (jnp.tanh(h @ w) * double, jnp.sum(h)), x, w)[0] ** 2)

        return f

    for which in (0, (0, 1)):
        got = jax.jit(jax.grad(loss(lambda *a: remat.scan(*a, policy)), which))(shift, w)
        wanted = jax.grad(loss(jax.lax.scan), which)(shift, w)
        chex.assert_trees_all_close(got, wanted, rtol=1e-5, atol=1e-5)
