"""Weight and adapter as one matrix: the values and gradients of two products, in every place where it stands in."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlora import quant
from jaxlora.kernels import api, nf4_merge, nf4_merge16, reference

SCHEMES = ("nf4", "int8", "fp8", "fp8_block")


def operands(key, out=96, d_in=128, rank=4, tokens=128, dtype=jnp.float32, scheme="nf4", stack=()):
    keys = jax.random.split(key, 4)
    x = jax.random.normal(keys[0], (2, tokens // 2, d_in)).astype(dtype)
    q = quant.quantize(0.02 * jax.random.normal(keys[1], (*stack, out, d_in)), scheme=scheme)
    a = jax.random.normal(keys[2], (rank, d_in))
    b = 0.01 * jax.random.normal(keys[3], (out, rank))
    return x, q, quant.LowRank(a, b, jnp.float32(1.7))


def plain(x, q, adapter):
    """The two products in float32, written out."""
    weight = quant.dequantize(q, jnp.float32)
    with jax.default_matmul_precision("highest"):
        return x @ weight.T + adapter.scaling * ((x @ adapter.a.T) @ adapter.b.T)


def value_and_gradients(product, x, q, adapter):
    def loss(x, a, b):
        return jnp.sum(jnp.sin(product(x, q, quant.LowRank(a, b, adapter.scaling)).astype(jnp.float32)))

    return jax.value_and_grad(loss, (0, 1, 2))(x, adapter.a, adapter.b)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("out, d_in, rank", [(96, 128, 4), (70, 70, 16), (33, 192, 1)])
def test_the_merged_product_is_the_two_products(key, scheme, out, d_in, rank):
    x, q, adapter = operands(key, out, d_in, rank, scheme=scheme)
    assert quant.is_merging_cheaper(128, q.shape)
    got = value_and_gradients(quant.matmul, x, q, adapter)
    wanted = value_and_gradients(plain, x, q, adapter)
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        assert g.dtype == jnp.float32
        np.testing.assert_allclose(g, w, rtol=2e-5, atol=2e-5 * float(jnp.abs(w).max()))


def test_it_merges_for_many_tokens_and_multiplies_twice_for_few(key):
    few, q, adapter = operands(key, tokens=2)
    many, _, _ = operands(key, tokens=128)
    ran = lambda x: api.implementations_in(functools.partial(quant.matmul, w=q, adapter=adapter), x)
    assert ran(many) == {"merge_nf4.reference"}
    assert ran(few) == {"dequantize_nf4.reference"}


def test_a_scaling_for_each_rank_leaves_padding_out(key):
    x, q, adapter = operands(key)
    padded = adapter._replace(scaling=jnp.array([1.7, 1.7, 0.0, 0.0]))
    got = value_and_gradients(quant.matmul, x, q, padded)
    short = quant.LowRank(adapter.a[:2], adapter.b[:, :2], adapter.scaling)
    loss, (dx, da, db) = value_and_gradients(plain, x, q, short)
    np.testing.assert_allclose(got[0], loss, rtol=1e-5)
    np.testing.assert_allclose(got[1][0], dx, atol=1e-5)
    assert not got[1][1][2:].any() and not got[1][2][:, 2:].any()
    np.testing.assert_allclose(got[1][1][:2], da, rtol=1e-3, atol=1e-5)


def test_one_of_a_stack_is_read_by_its_index(key):
    x, q, adapter = operands(key, stack=(3,))
    for scheme in SCHEMES:
        q = quant.quantize(0.02 * jax.random.normal(key, (3, 96, 128)), scheme=scheme)
        for i in range(3):
            one = jax.tree.map(lambda leaf, i=i: leaf[i], q)
            np.testing.assert_array_equal(quant.dequantize(q.at(jnp.int32(i))), quant.dequantize(one))
            got = quant.matmul(x, q.at(jnp.int32(i)), adapter)
            np.testing.assert_allclose(got, quant.matmul(x, one, adapter), atol=1e-6)
            taken = q.at(jnp.int32(i)).taken()
            assert all(bool(jnp.all(a == b)) for a, b in zip(jax.tree.leaves(taken), jax.tree.leaves(one), strict=True))
        assert q.at(jnp.int32(0)).leading == () and q.at(jnp.int32(0)).shape == (96, 128)


def test_adapters_that_are_vmapped_share_one_weight(key):
    x, q, adapter = operands(key)
    adapters = quant.LowRank(*(jnp.stack([leaf, 2 * leaf, leaf * 0]) for leaf in adapter[:3]))
    xs = jnp.stack([x, x + 1, x - 1])
    run = jax.vmap(functools.partial(value_and_gradients, quant.matmul), in_axes=(0, None, 0))
    got = run(xs, q, adapters)
    for i in range(3):
        wanted = value_and_gradients(plain, xs[i], q, jax.tree.map(lambda leaf, i=i: leaf[i], adapters))
        for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
            np.testing.assert_allclose(g[i], w, rtol=1e-4, atol=2e-5 * float(jnp.abs(w).max()) + 1e-6)
    ran = api.implementations_in(run, xs, q, adapters)
    assert ran == {"dequantize_nf4.reference"}


def test_a_merged_array_is_a_constant_whose_adapter_learns(key):
    x, q, adapter = operands(key)
    dense = quant.MergedArray(quant.merge(q, adapter, jnp.float32))
    got = value_and_gradients(quant.matmul, x, dense, adapter)
    wanted = value_and_gradients(plain, x, q, adapter)
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(g, w, rtol=2e-5, atol=2e-5 * float(jnp.abs(w).max()))
    with pytest.raises(TypeError, match="the adapter that is in it"):
        quant.matmul(x, dense)


def test_in_16_bits_it_is_as_exact_as_two_products(key):
    """Against float64, with an adapter as small as one step of AdamW makes it, and with one that has learnt."""
    for size in (2e-4, 2e-2):
        x, q, adapter = operands(key, 512, 512, 16, tokens=1024, dtype=jnp.bfloat16)
        adapter = quant.LowRank(adapter.a / 40, jnp.sign(adapter.b) * size, jnp.float32(1.0))
        wide = [np.asarray(leaf, np.float64) for leaf in (x, quant.dequantize(q, jnp.float32), *adapter[:3])]
        truth = wide[0] @ (wide[1] + wide[4] * wide[3] @ wide[2]).T
        merged = quant.matmul(x, q, adapter)
        two = quant.matmul(x, q) + quant.lora_delta(x, *adapter[:3])
        errors = [np.linalg.norm(np.asarray(y, np.float64) - truth) / np.linalg.norm(truth) for y in (merged, two)]
        assert errors[0] < 1.05 * errors[1] < 1e-2, errors


def test_what_the_adapter_adds_is_not_rounded_away(key):
    """The mean of what a small adapter adds to an NF4 weight in bfloat16 is what it should add."""
    _, q, adapter = operands(key, 1024, 1024, 16)
    adapter = quant.LowRank(adapter.a / 55, jnp.sign(adapter.b) * 2e-4, jnp.float32(1.0))
    added = np.asarray(adapter.b @ adapter.a, np.float64)
    before, after = (
        np.asarray(quant.merge(q, adapter._replace(scaling=jnp.float32(s)), jnp.bfloat16), np.float64) for s in (0, 1)
    )
    slope = np.sum((after - before) * added) / np.sum(added * added)
    assert abs(slope - 1.0) < 0.05, slope


# --- what the kernel of 16 bits is for ---


@pytest.mark.parametrize("field, value", [("num_warps", 3), ("num_warps", 16), ("octets", 0), ("programs", 0)])
def test_a_config_is_checked(field, value):
    with pytest.raises(ValueError, match=field):
        nf4_merge16.Config(**{"programs": 1, field: value})


@pytest.mark.parametrize(
    "rank, shape, options, reason",
    [
        (16, (2048, 4096), {"dtype": jnp.float32}, r"writes bfloat16 or float16, \[out, in\], not float32"),
        (16, (2048, 4096), {"transposed": True}, "not transposed bfloat16"),
        (16, (2048, 4096), {"inverse": jnp.float32(1)}, "not scaled bfloat16"),
        (None, (2048, 4096), {}, "1 to 32 ranks, not 0"),
        (33, (2048, 4096), {}, "1 to 32 ranks, not 33"),
        (16, (4096, 4100), {}, "whole blocks of 64, not of 4100"),
        (16, (1 << 19, 4096), {}, "in 32 bits, and there are 2147483648"),
    ],
)
def test_the_kernel_of_16_bits_leaves_the_rest_to_the_other(rank, shape, options, reason):
    def run(codes, a, b):
        return nf4_merge16.merge_nf4(
            codes, codes, None, None, None, a, b, shape=shape, **({"dtype": jnp.bfloat16} | options)
        )

    struct = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    adapter = (None, None) if rank is None else (struct(rank, shape[1]), struct(shape[0], rank))
    with pytest.raises(NotImplementedError, match=reason):
        jax.eval_shape(run, struct(1), *adapter)


# --- on a GPU ---


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(100, 64), (70, 192), (33, 576), (1024, 4096)])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("double_quant", [True, False])
def test_no_config_of_16_bits_changes_a_result(key, shape, dtype, double_quant):
    """Single and stacked, with more programs and fewer than there is work for; and with a B of 0, the weight's bits."""
    configs = [nf4_merge16.Config(programs=programs, num_warps=warps, octets=octets) for programs, warps, octets in
               [(1, 1, 2), (7, 2, 1), (1 << 20, 2, 2), (396, 8, 2), (528, 8, 1)]]  # fmt: skip
    q = jax.lax.map(functools.partial(quant.quantize, double_quant=double_quant), jax.random.normal(key, (3, *shape)))
    stacked = q.codes, q.scales, q.nested_absmax, q.nested_offset, jnp.int32(1)
    one = jax.tree.map(lambda leaf: leaf[1], q)
    single = one.codes, one.scales, one.nested_absmax, one.nested_offset, None
    keys = jax.random.split(key)
    for rank in (1, 16, 23, 32):
        a, b = jax.random.normal(keys[0], (rank, shape[1])) / 8, jax.random.normal(keys[1], (shape[0], rank))
        for factor in (b, 0 * b):
            wanted = reference.merge_nf4(*single, a, factor, shape=shape, dtype=dtype).astype(jnp.float32)
            first = None
            for config in configs:
                for fields in (stacked, single):
                    got = nf4_merge16.merge_nf4(*fields, a, factor, shape=shape, dtype=dtype, config=config)
                    first = got if first is None else first
                    np.testing.assert_array_equal(got.astype(jnp.float32), first.astype(jnp.float32))
            error = float(jnp.abs(first.astype(jnp.float32) - wanted).max() / jnp.abs(wanted).max())
            assert error <= (float(jnp.finfo(dtype).eps) + 4e-6 if factor.any() else 0), (rank, error)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "out, d_in, rank, dtype, name",
    [
        (2048, 4096, 16, jnp.bfloat16, "triton16"),
        (4099, 2112, 32, jnp.float16, "triton16"),
        (2048, 4096, None, jnp.bfloat16, "triton"),
        (2048, 4096, 33, jnp.bfloat16, "triton"),
        (2048, 4096, 16, jnp.float32, "triton"),
        (64, 128, 16, jnp.bfloat16, "triton16"),
    ],
)
def test_each_weight_has_its_kernel(key, out, d_in, rank, dtype, name):
    _, q, adapter = operands(key, out, d_in, rank or 1, stack=(2,))
    a, b = (None, None) if rank is None else adapter[:2]
    fields = q.codes, q.scales, q.nested_absmax, q.nested_offset, jnp.int32(1), a, b
    run = functools.partial(api.merge_nf4, shape=(out, d_in), dtype=dtype)
    assert api.implementations_in(run, *fields) == {f"merge_nf4.{name}"}
    got = run(*fields).astype(jnp.float32)
    wanted = reference.merge_nf4(*fields, shape=(out, d_in), dtype=dtype).astype(jnp.float32)
    error = float(jnp.abs(got - wanted).max() / jnp.abs(wanted).max())
    assert error <= (0 if rank is None else float(jnp.finfo(dtype).eps) + 4e-6), error


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(100, 64), (70, 192), (1024, 4096), (896, 4864)])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_triton_equals_the_reference(key, shape, dtype):
    for rank, double_quant in [(None, True), (None, False), (1, True), (24, False), (112, True), (256, True)]:
        one = functools.partial(quant.quantize, double_quant=double_quant)
        q = jax.lax.map(one, 0.02 * jax.random.normal(key, (3, *shape)))
        a = b = None
        if rank is not None:
            keys = jax.random.split(key)
            a, b = jax.random.normal(keys[0], (rank, shape[1])) / 8, 0.01 * jax.random.normal(keys[1], (shape[0], rank))
        fields = q.codes, q.scales, q.nested_absmax, q.nested_offset, jnp.int32(2), a, b
        got = nf4_merge.merge_nf4(*fields, shape=shape, dtype=dtype).astype(jnp.float32)
        wanted = reference.merge_nf4(*fields, shape=shape, dtype=dtype).astype(jnp.float32)
        if rank is None:
            np.testing.assert_array_equal(got, wanted)
            continue
        # Sums of float32 in another order, and one rounding: a unit in the last place of the dtype, of the largest.
        unit = float(jnp.finfo(dtype).eps) + 2 * rank**0.5 * float(jnp.finfo(jnp.float32).eps)
        error = float(jnp.abs(got - wanted).max() / jnp.abs(wanted).max())
        assert error <= unit, (rank, double_quant, error, unit)


@pytest.mark.gpu
@pytest.mark.parametrize("rank, name", [(16, "triton16"), (40, "triton")])
def test_triton_runs_in_the_merged_product_forward_and_backward(key, rank, name):
    x, q, adapter = operands(key, 1024, 2048, rank, tokens=2048, dtype=jnp.bfloat16)
    run = functools.partial(value_and_gradients, quant.matmul)
    assert api.implementations_in(run, x, q, adapter) == {f"merge_nf4.{name}"}
    got, wanted = run(x, q, adapter), value_and_gradients(plain, x.astype(jnp.float32), q, adapter)
    for g, w in zip(jax.tree.leaves(got[1]), jax.tree.leaves(wanted[1]), strict=True):
        error = jnp.linalg.norm(g.astype(jnp.float32) - w) / jnp.linalg.norm(w)
        assert float(error) < 2e-2, error
