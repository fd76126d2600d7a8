"""Dropout of what adapters read: the generator beside its authors' answers, and the masks that it draws."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxlora.kernels import dropout as dropping
from jaxlora.kernels.dropout import dropout
from jaxlora.sharding import make_mesh


@pytest.mark.parametrize(
    "counter, seed, expected",
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)  # fmt: skip
def test_philox_gives_its_authors_answers(counter, seed, expected):
    """Those of Random123's `kat_vectors`."""
    words = jax.jit(dropping.philox)(*(tuple(map(np.uint32, parts)) for parts in (counter, seed)))
    assert tuple(map(int, words)) == expected


def kept(key, shape, rate):
    return np.asarray(dropout(jnp.ones(shape), rate, key) != 0)


@pytest.mark.parametrize("rate", [0.05, 0.1, 0.5, 0.9, 1 / 65536, 1 - 1 / 65536])
def test_the_rate_is_exact(key, rate):
    """Of 4 million draws, within 4 standard deviations, and so is each of the 8 places of a block."""
    drop = ~kept(key, (1024, 4096), rate)
    sigma = lambda count: np.sqrt(rate * (1 - rate) / count)
    assert abs(drop.mean() - rate) < 4 * sigma(drop.size)
    assert np.all(np.abs(drop.reshape(-1, 8).mean(0) - rate) < 4 * sigma(drop.size / 8))


def test_entries_rows_and_keys_are_independent(key):
    rate, shape = 0.3, (512, 2048)
    first = kept(key, shape, rate) - (1 - rate)
    others = [kept(other, shape, rate) - (1 - rate) for other in jax.random.split(key, 7)]
    shifted = [np.roll(first, step, axis) for axis in (0, 1) for step in (1, 2, 3, 4, 7, 8, 16, 64)]
    for other in (*others, *shifted):
        correlation = np.mean(first * other) / (rate * (1 - rate))
        assert abs(correlation) < 4.5 / np.sqrt(first.size)


def test_a_row_is_drawn_by_its_number_and_each_entry_by_its_place(key):
    whole = kept(key, (24, 100), 0.4)
    np.testing.assert_array_equal(kept(key, (2, 3, 4, 100), 0.4), whole.reshape(2, 3, 4, 100))
    np.testing.assert_array_equal(kept(key, (7, 50), 0.4), whole[:7, :50])
    np.testing.assert_array_equal(kept(key, (100,), 0.4), whole[0])
    keys = jax.random.split(key, 3)
    each = jax.vmap(lambda key: dropping.kept_bits(key, (5, 9), 0.4))(keys)
    for one, bits in zip(keys, each, strict=True):
        np.testing.assert_array_equal(dropping.kept_bits(one, (5, 9), 0.4), bits)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("shape", [(3, 5, 40), (7, 13)], ids=str)
def test_the_gradient_has_the_mask(key, dtype, shape):
    x, dy = (jax.random.normal(key, shape, jnp.float32).astype(dtype) for key in jax.random.split(key))
    y, pullback = jax.vjp(lambda x: dropout(x, 0.25, key), x)
    is_kept = kept(key, shape, 0.25)
    assert y.dtype == dtype
    np.testing.assert_array_equal(y, jnp.where(is_kept, x / jnp.asarray(0.75, dtype), 0))
    np.testing.assert_array_equal(pullback(dy)[0], jnp.where(is_kept, dy / jnp.asarray(0.75, dtype), 0))
    # What the backward pass keeps is a bit an entry.
    held = [leaf for leaf in jax.tree.leaves(pullback) if getattr(leaf, "size", 0) > 1]
    assert [(leaf.dtype, leaf.shape) for leaf in held] == [(jnp.uint8, (*shape[:-1], -(-shape[-1] // 8)))]


def test_each_device_draws_its_part(key):
    mesh = make_mesh(fsdp=2, tensor=2)
    x = jnp.ones((4, 6, 64))
    split = jax.device_put(x, NamedSharding(mesh, PartitionSpec("fsdp", None, "tensor")))
    run = jax.jit(lambda x: dropout(x, 0.3, key)).lower(split).compile()
    np.testing.assert_array_equal(run(split), dropout(x, 0.3, key))
    assert run(split).sharding == split.sharding
    assert "all-gather" not in run.as_text() and "u8[2,6,4]" in run.as_text()
