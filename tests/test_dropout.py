"""Dropout of what adapters read: the generator beside its authors' answers, and the masks that it draws."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxlora.kernels import api
from jaxlora.kernels import dropout as dropping
from jaxlora.kernels import dropped_product as products
from jaxlora.kernels.dropout import dropout
from jaxlora.kernels.lora import lora_delta, plus_dropped_delta
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
    assert "all-gather" not in text(run) and "u8[2,6,4]" in text(run)


def adapter_of(key, d_in, d_out, r):
    a, b = jax.random.normal(key, (r, d_in), jnp.float32), jax.random.normal(key, (d_out, r), jnp.float32)
    return a / d_in**0.5, b, jnp.float32(0.5)


@pytest.mark.parametrize("shape", [(3, 5, 40), (7, 13)], ids=str)
def test_an_adapter_of_what_is_dropped_has_its_gradients(key, shape):
    x = jax.random.normal(key, shape, jnp.float32)
    adapter, dy = adapter_of(key, shape[-1], 24, 4), jax.random.normal(key, (*shape[:-1], 24))
    base = jax.random.normal(key, dy.shape)
    apart = lambda base, x, *adapter: base + lora_delta(dropout(x, 0.25, key), *adapter)
    ours = lambda base, x, *adapter: plus_dropped_delta(base, x, 0.25, key, *adapter)
    y, pullback = jax.vjp(ours, base, x, *adapter)
    expected, expected_pullback = jax.vjp(apart, base, x, *adapter)
    np.testing.assert_allclose(y, expected, rtol=1e-6, atol=1e-6)
    for ours, theirs in zip(pullback(dy), expected_pullback(dy), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def operands(key, shape, r, dtype):
    """x, bits, a, dz."""
    arrays = (shape, (r, shape[-1]), (*shape[:-1], r))
    x, a, dz = (
        jax.random.normal(key, of, jnp.float32).astype(dtype)
        for key, of in zip(jax.random.split(key, 3), arrays, strict=True)
    )
    return x, dropping.kept_bits(key, shape, 0.3), a, dz


@pytest.mark.parametrize("columns", [64, 56])  # those of a device are whole blocks of the mask, or none
def test_each_device_multiplies_its_part(key, columns):
    """What the kernels are wrapped in, around the reference: rows and columns may be divided, and nothing is
    gathered."""
    product = products.sharded_product(lambda *args: products.dropped_product_reference(*args, 0.3))
    back = products.sharded_back(lambda *args: products.dropped_back_reference(*args, 0.3))
    outer = products.sharded_outer(lambda *args: products.dropped_outer_reference(*args, 0.3))
    all_three = lambda x, bits, a, dz: (product(x, bits, a), back(bits, a, dz), outer(x, bits, dz))
    whole = operands(key, (4, 6, columns), 8, jnp.float32)
    x, bits, a, dz = whole
    expected = products.dropped_product_reference(x, bits, a, 0.3), *products.dropped_gradients_reference(*whole, 0.3)
    mesh = make_mesh(fsdp=2, tensor=2)
    for spec in (("fsdp", None, None), ("fsdp", None, "tensor"), (None, "tensor", "fsdp"), (("fsdp", "tensor"),), ()):
        split = jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))
        run = jax.jit(all_three).lower(split, *whole[1:]).compile()
        if columns == 64:
            assert "all-gather" not in text(run)
        for ours, theirs in zip(run(split, *whole[1:]), expected, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("columns", [64, 6])
def test_each_device_adds_to_its_part(key, columns):
    y, z, b = (jax.random.normal(key, shape) for shape in ((4, 6, columns), (4, 6, 8), (columns, 8)))
    raised = products.sharded_raise(products.raised_onto_reference)
    mesh = make_mesh(fsdp=2, tensor=2)
    for spec in (("fsdp", None, None), ("fsdp", None, "tensor"), (None, "tensor", "fsdp"), (("fsdp", "tensor"),), ()):
        split = jax.device_put(y, NamedSharding(mesh, PartitionSpec(*spec)))
        run = jax.jit(raised).lower(split, z, b).compile()
        assert "all-gather" not in text(run)
        np.testing.assert_allclose(run(split, z, b), products.raised_onto_reference(y, z, b), rtol=1e-5, atol=1e-5)


def test_what_is_raised_is_rounded_once(key):
    y, z, b = (jax.random.normal(key, shape).astype(jnp.bfloat16) for shape in ((5, 40), (5, 4), (40, 4)))
    exact = y.astype(jnp.float32) + z.astype(jnp.float32) @ b.astype(jnp.float32).T
    np.testing.assert_array_equal(products.raised_onto_reference(y, z, b), exact.astype(jnp.bfloat16))


def text(compiled) -> str:
    return compiled.as_text() or ""


def test_adapters_side_by_side(key):
    """Under `jax.vmap` the kernels are the reference."""
    x, bits, a, _ = operands(key, (5, 40), 4, jnp.bfloat16)
    unwanted = lambda x, bits, a: jnp.full((5, 4), jnp.nan)
    reference = functools.partial(products.dropped_product_reference, rate=0.3)
    many = jnp.stack([a, -a])
    found = jax.vmap(products._unless_vmapped(unwanted, reference), in_axes=(None, None, 0))(x, bits, many)
    for ours, one in zip(found, many, strict=True):
        np.testing.assert_array_equal(ours, reference(x, bits, one))


def test_the_kernels_say_why_they_cannot_run(key):
    x, bits, a, dz = operands(key, (5, 24), 4, jnp.bfloat16)
    with pytest.raises(NotImplementedError, match="needs an NVIDIA GPU"):
        api.dropped_product(x, bits, a, 0.5, implementation="triton")
    with pytest.raises(NotImplementedError, match="needs an NVIDIA GPU"):
        api.dropped_gradients(x, bits, a, dz, 0.5, implementation="triton")
    with pytest.raises(NotImplementedError, match="needs an NVIDIA GPU"):
        api.raised_onto(x, dz, a.T, implementation="triton")
    with pytest.raises(NotImplementedError, match="not float32 and bfloat16"):
        products.raised_onto(x.astype(jnp.float32), dz, a.T)
    with pytest.raises(NotImplementedError, match="not bfloat16 and float32"):
        products.dropped_product(x, bits, a.astype(jnp.float32), 0.5)
    with pytest.raises(NotImplementedError, match="at most 128 ranks, not 129"):
        products.dropped_product(x, bits, jnp.ones((129, 24), jnp.bfloat16), 0.5)


# --- on a GPU ---


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(3, 2048), (2, 5, 776), (1, 3), (2048, 14336), (33, 1100), (1100, 300)], ids=str)
@pytest.mark.parametrize("r", [1, 16, 40, 128])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_triton_is_the_reference(key, dtype, r, shape):
    def run(x, bits, a, dz, implementation=None):
        z = api.dropped_product(x, bits, a, 0.3, implementation=implementation)
        return z, *api.dropped_gradients(x, bits, a, dz, 0.3, implementation=implementation)

    narrow = operands(key, shape, r, dtype)
    assert api.implementations_in(run, *narrow) == {"dropped_product.triton", "dropped_gradients.triton"}
    wide = [array.astype(jnp.float32) if array.dtype == dtype else array for array in narrow]
    with jax.default_matmul_precision("highest"):
        expected = jax.jit(functools.partial(run, implementation="reference"))(*wide)
    found = jax.jit(run)(*narrow)
    assert [array.dtype for array in found] == [jnp.float32, dtype, jnp.float32]
    # The operands are the same numbers in float32: what differs is the order of sums, and that dx is rounded.
    for ours, theirs, summed in zip(found, expected, (shape[-1], r, np.prod(shape[:-1])), strict=True):
        eps = 1e-5 if ours.dtype == jnp.float32 else float(jnp.finfo(dtype).eps)
        np.testing.assert_allclose(np.asarray(ours, np.float32), theirs, rtol=eps, atol=1e-5 * summed**0.5)
    for ours, again in zip(found, jax.jit(run)(*narrow), strict=True):
        np.testing.assert_array_equal(ours, again)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(3, 2048), (2, 5, 776), (1, 3), (2048, 14336), (33, 1100)], ids=str)
@pytest.mark.parametrize("r", [1, 16, 40, 128])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_triton_adds_where_it_lies(key, dtype, r, shape):
    y, _, b, z = operands(key, shape, r, dtype)
    b = b.T
    assert api.implementations_in(api.raised_onto, y, z, b) == {"raised_onto.triton"}
    with jax.default_matmul_precision("highest"):
        expected = products.raised_onto_reference(
            2 * y.astype(jnp.float32), z.astype(jnp.float32), b.astype(jnp.float32)
        )
    run = jax.jit(lambda y, z, b: api.raised_onto(2 * y, z, b))  # of what nobody else reads
    assert "copy(" not in text(run.lower(y, z, b).compile())
    eps = float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(np.asarray(run(y, z, b), np.float32), expected, rtol=eps, atol=eps * r**0.5)
    np.testing.assert_array_equal(jax.jit(api.raised_onto)(2 * y, z, b), run(y, z, b))


@pytest.mark.gpu
def test_the_gpu_draws_the_bits_of_the_cpu():
    draw = jax.jit(lambda: dropping.kept_bits(jax.random.key(3), (64, 1000), 0.1))
    drawn = np.asarray(draw())
    with jax.default_device(jax.devices("cpu")[0]):
        np.testing.assert_array_equal(drawn, draw())
