"""Products of 9 to 64 tokens in float8 with NF4 weights: their PTX and order on the CPU, all of it on a GPU of 9.0."""

import functools
import re
import sys
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_nf4_matmul import fields_of, operands

from jaxlora import quant
from jaxlora.kernels import api, nf4_lookup, nf4_matmul_float8, nf4_matmul_float8_kernel, reference
from jaxlora.kernels.gated import ACTIVATIONS
from jaxlora.kernels.nf4_matmul_wgmma import Config
from jaxlora.kernels.ordered import FLOAT8, Ordered, in_order, power_of_two, shape_of
from jaxlora.kernels.parts import Parts

# ---- the order and what is rounded -----------------------------------------------------------------------------------


def rounded(x):
    """x [tokens, k] in float8 and back, with a power of 2 a row."""
    scale = np.exp2(np.floor(np.log2(np.abs(x).max(-1, keepdims=True))) - 2)
    return (x / scale).astype(np.dtype(FLOAT8)).astype(np.float32) * scale


def powers(key, shape, most):
    """Of 2, float32."""
    return jnp.exp2(jax.random.randint(key, shape, -most, most + 1).astype(jnp.float32))


@pytest.mark.parametrize("shape", [(64, 512), (9, 256), (17, 768)])
def test_there_and_back(key, shape):
    x = jax.random.normal(key, shape) * jnp.exp2(jnp.arange(shape[0], dtype=jnp.float32) - 9.0)[:, None]
    there = jax.jit(functools.partial(in_order, is_float8=True))(x)
    assert there.is_float8 and there.shape == shape and there.dtype == x.dtype
    assert there.data.shape == shape_of(*shape, True) and there.data.size == -(-shape[0] // 8) * 8 * shape[1]
    largest = np.abs(np.asarray(there.data, np.float32)).max()
    assert 4 <= largest <= 8
    np.testing.assert_array_equal(there.plain(), rounded(np.asarray(x)))
    np.testing.assert_array_equal(there.reshape(1, *shape).plain()[0], there.plain())


def test_where_an_element_is():
    x = np.arange(16 * 512, dtype=np.float32).reshape(16, 512) % 13 - 6
    data = np.asarray(in_order(jnp.asarray(x), is_float8=True).data, np.float32).ravel()
    m, k = np.meshgrid(np.arange(16), np.arange(512), indexing="ij")
    place = ((k // 64 * 4 + k // 4 % 4) * 16 + m) * 16 + k // 16 % 4 * 4 + (k % 4 ^ 1)
    np.testing.assert_array_equal(data[place], x)


def test_scales_of_columns(key):
    x = jax.random.normal(key, (9, 1024))
    whole = in_order(x, is_float8=True)
    plain = Ordered(whole.data, x.shape, x.dtype).plain()
    by_columns = Ordered(whole.data, x.shape, x.dtype, None, jnp.exp2(jnp.arange(8, dtype=jnp.float32)))
    np.testing.assert_array_equal(by_columns.plain(), plain * 2.0 ** (np.arange(1024) // 128))


@pytest.mark.parametrize("largest", [0.0, 1e-38, 1.0, 1.5, 7.99, 3e38])
def test_the_largest_is_from_4_to_8(largest):
    scale = float(power_of_two(jnp.float32(largest)))
    assert np.log2(scale) == int(np.log2(scale)) and largest / scale < 8
    if 1e-30 < largest < 1e38:
        assert largest / scale >= 4


def test_the_error_of_the_table(key):
    w = np.random.default_rng(0).standard_normal((4096, 64))
    w /= np.abs(w).max(axis=1, keepdims=True)
    codes = np.searchsorted((reference.NF4[1:] + reference.NF4[:-1]) / 2, w.ravel())
    table, exact = nf4_lookup.float8_table().astype(np.float64) * nf4_lookup.FLOAT8_UNIT, reference.NF4
    error = np.linalg.norm(table[codes] - exact[codes]) / np.linalg.norm(exact[codes])
    assert 0.019 < error < 0.020
    assert np.abs(nf4_lookup.float8_table().astype(np.float32)).max() == 0.875  # by which sums of blocks are bounded


# ---- the PTX ---------------------------------------------------------------------------------------------------------


def prmt(low, high, selector):
    """PTX's, of arrays of words."""
    table = np.stack([low >> np.uint32(8 * i) & np.uint32(255) for i in range(4)])
    table = np.concatenate([table, np.stack([high >> np.uint32(8 * i) & np.uint32(255) for i in range(4)])])
    out = np.zeros_like(selector)
    for i in range(4):
        nibble = selector >> np.uint32(4 * i) & np.uint32(15)
        byte = np.take_along_axis(table, (nibble & np.uint32(7))[None].astype(int), 0)[0]
        byte = np.where(nibble & np.uint32(8), np.where(byte & np.uint32(128), 255, 0), byte).astype(np.uint32)
        out |= byte << np.uint32(8 * i)
    return out


def lop3(a, b, c, table):
    out = np.zeros_like(a)
    for i in range(8):
        if table >> i & 1:
            of = [x if i >> bit & 1 else ~x for x, bit in ((a, 2), (b, 1), (c, 0))]
            out |= of[0] & of[1] & of[2]
    return out


def test_the_elements_of_a_block():
    """The PTX on a warp: 16 elements of each of two rows."""
    codes = np.random.default_rng(0).integers(0, 1 << 32, (4, 32), np.uint32)
    registers: dict[str, Any] = {f"${8 + i}": codes[i] for i in range(4)}
    registers |= {f"${12 + i}": np.full(32, word) for i, word in enumerate(nf4_lookup.float8_words())}
    value = lambda name: registers[name] if name in registers else np.full(32, int(name, 0), np.uint32)
    text = nf4_matmul_float8_kernel.ptx_of_lookup().strip("{}\n").replace("\n", " ")
    for line in filter(None, map(str.strip, text.split(";"))):
        op, _, names = line.partition(" ")
        target, *arguments = names.split(", ")
        match op:
            case "shr.u32":
                registers[target] = value(arguments[0]) >> np.uint32(int(arguments[1]))
            case "shl.b32":
                registers[target] = value(arguments[0]) << np.uint32(int(arguments[1]))
            case "lop3.b32":
                registers[target] = lop3(*map(value, arguments[:3]), int(arguments[3], 0))
            case "prmt.b32":
                registers[target] = prmt(*map(value, arguments))
            case _:
                assert op == ".reg", line
    elements = np.stack([codes >> np.uint32(4 * (i ^ 1)) & np.uint32(15) for i in range(8)])  # [8, word, lane]
    wanted = nf4_lookup.float8_table()[elements].transpose(1, 2, 0).reshape(4, 32, 2, 4)
    for i in range(8):
        got = registers[f"${i}"].view(FLOAT8).reshape(32, 4).astype(np.float32)
        np.testing.assert_array_equal(got[:, [1, 0, 3, 2]], wanted[i // 2, :, i % 2].astype(np.float32))


@pytest.mark.parametrize("tiles", [2, 8])
def test_the_products_of_a_block(tiles):
    """The PTX on a warpgroup, and the second block of x in its order: 64 rows times all tokens, and what is added."""
    random, tokens = np.random.default_rng(0), 8 * tiles
    w = random.standard_normal((64, 64)).astype(np.dtype(FLOAT8))
    x = random.standard_normal((tokens, 256)).astype(np.float32)
    x[:, 0] = 7.0  # so that nothing is multiplied
    x = x.astype(np.dtype(FLOAT8)).astype(np.float32)
    image = np.asarray(in_order(jnp.asarray(x), is_float8=True).data)[0, 1].ravel()
    thread = np.arange(128)
    t, upper = thread % 4, thread // 32 * 16 + thread % 32 // 4
    n = 2 * tiles
    memory, buffer = np.zeros(1 << 14, np.dtype(FLOAT8)), 2048
    memory[buffer:][: image.size] = image
    registers: dict[str, Any] = {}
    for i in range(8):  # lane t has elements 16 t .. 16 t + 15, of two codes in a byte the second first
        registers[f"${n + i}"] = w[upper + i // 4 * 8].reshape(128, 4, 4, 4)[thread, t, i % 4][:, [1, 0, 3, 2]]
    registers[f"${n + 8}"] = buffer // 16 | tokens << 16
    value = lambda name: registers[name] if name in registers else int(name, 0)
    for line in nf4_matmul_float8_kernel.ptx_of_products(tiles).splitlines()[1:-1]:
        op, _, names = line.removesuffix(";").partition(" ")
        target, *arguments = names.split(", ")
        match op:
            case "mov.b64":
                first, last = (value(a.strip("{}")) for a in arguments)
                registers[target] = first | last << 32
            case "add.u64":
                registers[target] = value(arguments[0]) + value(arguments[1])
            case "setp.ne.b32":
                registers[target] = value(arguments[0]) != value(arguments[1])
            case _ if op.startswith("wgmma.mma_async"):
                assert f".m64n{tokens}k32.f16.e4m3.e4m3" in op
                d, a = (group_.split(", ") for group_ in re.findall(r"{([^}]*)}", names))
                at, added, *flags = names.rpartition("}, ")[2].split(", ")
                assert flags == ["1", "1"]
                left, descriptor = np.zeros((64, 32)), registers[at]
                for i in range(4):
                    for byte in range(4):
                        left[upper + 8 * (i % 2), 4 * t + byte + 16 * (i // 2)] = registers[a[i]][:, byte]
                assert descriptor >> 62 == 0  # no swizzle
                m, k = np.arange(tokens)[:, None], np.arange(32)
                start, across, down = ((descriptor >> shift & 0x3FFF) << 4 for shift in (0, 16, 32))
                right = memory[start + m // 8 * down + m % 8 * 16 + k // 16 * across + k % 16].astype(np.float64)
                product = left @ right.T
                for i in range(n):
                    place = upper + 8 * (i % 2), 2 * t + 8 * (i // 2)
                    pair = np.stack([product[place], product[place[0], place[1] + 1]])
                    registers[d[i]] = pair + (registers[d[i]] if registers[added] else 0.0)
    wanted = w.astype(np.float64) @ x[:, 64:128].astype(np.float64).T
    for i in range(n):
        for half in range(2):
            place = upper + 8 * (i % 2), 2 * t + 8 * (i // 2) + half
            np.testing.assert_allclose(registers[f"${i}"][half], wanted[place], rtol=1e-9, atol=1e-12)
    lines = nf4_matmul_float8_kernel.ptx_of_sums(tiles).splitlines()[1:-1]
    assert lines[0] == "wgmma.wait_group.sync.aligned 0;"
    assert lines[1:] == [f"fma.rn.f16x2 ${i}, ${2 * n + i}, ${3 * n + i % 2}, ${i};" for i in range(n)]


def test_it_says_why_not(key, monkeypatch):
    monkeypatch.setitem(sys.modules, "jax_triton", ModuleType("jax_triton"))
    _, q = operands(key, 9, (64, 192), jnp.bfloat16)
    x = in_order(jnp.ones((9, 192), jnp.bfloat16), is_float8=True)
    with pytest.raises(NotImplementedError, match="by whole steps of 256 elements that are quantised twice"):
        nf4_matmul_float8.matmul_nf4(x, [fields_of(q)], shapes=[q.shape])
    _, q = operands(key, 9, (64, 512), jnp.bfloat16, double_quant=False)
    x = in_order(jnp.ones((9, 512), jnp.bfloat16), is_float8=True)
    with pytest.raises(NotImplementedError, match="by whole steps of 256 elements that are quantised twice"):
        nf4_matmul_float8.matmul_nf4(x, [fields_of(q)], shapes=[q.shape])


# ---- on a GPU --------------------------------------------------------------------------------------------------------


def skip_elsewhere():
    if api.compute_capability() != "9.0":
        pytest.skip("wgmma is of compute capability 9.0")


def weight_of(q):
    """What the product multiplies by, float64."""
    dense = np.asarray(quant.dequantize(q.taken(), jnp.float32, implementation="reference"), np.float64)
    # The scales, of what the same codes' table makes of them.
    codes = np.asarray(q.taken().codes)
    each = np.stack([codes >> 4, codes & 15], -1).reshape(dense.shape)
    table = nf4_lookup.float8_table().astype(np.float64) * nf4_lookup.FLOAT8_UNIT
    exact = reference.NF4.astype(np.float64)
    largest = np.abs(dense).reshape(dense.shape[0], -1, 64).max(-1)
    place = np.abs(exact[each]).reshape(dense.shape[0], -1, 64).max(-1)
    scales = np.divide(largest, place, out=np.zeros_like(largest), where=place > 0)
    return table[each] * np.repeat(scales, 64, axis=1)


def error_of(y, x, q):
    wanted = np.asarray(x, np.float64) @ weight_of(q).T
    return np.linalg.norm(np.asarray(y, np.float64) - wanted) / np.linalg.norm(wanted)


def exact(x: Ordered):
    """x as the product reads it, float32."""
    return Ordered(x.data, x.shape, jnp.dtype(jnp.float32), x.of_tokens, x.of_columns).plain()


@pytest.mark.gpu
@pytest.mark.parametrize("layout", [None, dict(num_warps=4, split=3), dict(num_warps=8)])
@pytest.mark.parametrize("dtype, is_stacked", [(jnp.bfloat16, True), (jnp.float16, False)])
@pytest.mark.parametrize("shape, tokens", [((1024, 4096), 16), ((100, 256), 9), ((1000, 768), 41), ((4096, 14336), 64)])
def test_the_product(key, shape, tokens, is_stacked, dtype, layout):
    skip_elsewhere()
    x, q = operands(key, tokens, shape, dtype, True, is_stacked)
    read = in_order(x, is_float8=True)
    run = jax.jit(lambda x, q: quant.matmul_each(x, [q])[0])
    assert api.implementations_in(run, read, q) == {"matmul_nf4.triton_float8"}
    if layout:
        product = functools.partial(nf4_matmul_float8.matmul_nf4, shapes=[shape], config=Config(**layout))
        run = jax.jit(lambda x, q: product(x, [fields_of(q)])[0])
    y = run(read, q)
    assert y.dtype == dtype and y.shape == (tokens, shape[0])
    assert error_of(y, exact(read), q) < 3e-3
    np.testing.assert_array_equal(y, run(read, q))


@pytest.mark.gpu
def test_the_product_of_scales_of_columns(key):
    skip_elsewhere()
    x, q = operands(key, 33, (512, 2048), jnp.bfloat16, is_stacked=True)
    whole = in_order(x, is_float8=True)
    for count in (16, 32):
        by_columns = Ordered(whole.data, x.shape, x.dtype, None, powers(key, (count,), 9))
        [y] = jax.jit(lambda x, q: quant.matmul_each(x, [q]))(by_columns, q)
        assert error_of(y, exact(by_columns), q) < 3e-3


@pytest.mark.gpu
def test_the_parts_are_those_of_the_sum(key):
    skip_elsewhere()
    x, q = operands(key, 33, (1024, 4096), jnp.bfloat16, is_stacked=True)
    x = in_order(x, is_float8=True)
    product = functools.partial(nf4_matmul_float8.matmul_nf4, shapes=[q.shape], config=Config(split=4))
    run = jax.jit(lambda x, q, parts: product(x, [fields_of(q)], parts=parts)[0], static_argnums=2)
    parts = run(x, q, True)
    assert parts.dtype == jnp.bfloat16 and parts.shape == (4, 33, 1024)
    wanted = functools.reduce(jnp.add, [*parts.astype(jnp.float32)])
    np.testing.assert_array_equal(run(x, q, False), wanted.astype(x.dtype))


@pytest.mark.gpu
@pytest.mark.parametrize("is_float8", [True, False])
def test_what_is_fetched_changes_nothing(key, is_float8):
    skip_elsewhere()
    x, q = operands(key, 64, (1024, 4096), jnp.bfloat16, is_stacked=True)
    read = in_order(x, is_float8=is_float8)
    weights = [operands(key, 9, (rows, 4096), jnp.bfloat16, is_stacked=True)[1] for rows in (1024, 256)]
    ahead = quant.begins_with(64, weights)
    assert [each.constants[2] for each in ahead] == [512, 16, 128, 16]  # lines of scales, and parts of rows
    run = jax.jit(lambda x, q, ahead: quant.matmul_each(x, [q], ahead=ahead)[0])
    np.testing.assert_array_equal(run(read, q, ahead), run(read, q, []))


@pytest.mark.gpu
def test_a_row_does_not_depend_on_others(key):
    skip_elsewhere()
    x, q = operands(key, 16, (512, 1024), jnp.bfloat16, is_stacked=True)
    run = jax.jit(lambda x, q: quant.matmul_each(in_order(x, is_float8=True), [q])[0])
    np.testing.assert_array_equal(run(x, q)[:8], run(x.at[8:].multiply(100.0), q)[:8])


@pytest.mark.gpu
def test_blocks_of_zeros_and_scales_far_apart(key):
    skip_elsewhere()
    x, _ = operands(key, 64, (64, 1024), jnp.bfloat16)
    w = 0.02 * jax.random.normal(key, (64, 16, 64))
    sizes = jnp.ones((64, 16)).at[:32, 4].set(0.0).at[8:24, 7].set(0.0).at[:16, :3].set(0.0).at[20:, 15].set(0.0)
    sizes = sizes.at[48].set(0.0).at[50:60, 8].set(1e-5).at[56:, 9].set(1e3)
    q = quant.quantize((w * sizes[..., None]).reshape(64, 1024))
    read = in_order(x, is_float8=True)
    y = jax.jit(lambda x, q: quant.matmul_each(x, [q])[0])(read, q)
    assert np.isfinite(np.asarray(y, np.float32)).all()
    assert error_of(y, exact(read), q) < 3e-3
    nothing = quant.quantize(jnp.zeros((64, 1024)))
    assert not np.asarray(jax.jit(lambda x, q: quant.matmul_each(x, [q])[0])(read, nothing)).any()


@pytest.mark.gpu
@pytest.mark.parametrize("act", ["silu", "gelu_pytorch_tanh"])
@pytest.mark.parametrize("rows, columns, tokens", [(1024, 4096, 64), (256, 256, 9), (768, 768, 41), (14336, 4096, 17)])
def test_a_gate_makes_it(key, rows, columns, tokens, act):
    skip_elsewhere()
    keys = jax.random.split(key, 3)
    x = in_order(jax.random.normal(keys[0], (tokens, columns)).astype(jnp.bfloat16), is_float8=True)
    weights = [quant.quantize(0.03 * jax.random.normal(each, (rows, columns)).astype(x.dtype)) for each in keys[1:]]
    run = lambda ordered: jax.jit(lambda x, weights: quant.matmul_each(x, weights, act=act, ordered=ordered)[0])
    assert api.implementations_in(run(FLOAT8), x, weights) == {"matmul_nf4.triton_float8"}
    y, plain = run(FLOAT8)(x, weights), run(None)(x, weights)
    assert isinstance(y, Ordered) and y.is_float8 and y.shape == (tokens, rows) and y.dtype == jnp.bfloat16
    gate, up = (np.asarray(exact(x), np.float64) @ weight_of(w).T for w in weights)
    wanted = np.asarray(ACTIVATIONS[act](jnp.asarray(gate, jnp.float32))) * up
    error = lambda got: np.linalg.norm(np.asarray(got, np.float64) - wanted) / np.linalg.norm(wanted)
    assert plain.dtype == jnp.bfloat16 and error(plain) < 3e-3
    got = np.asarray(exact(y), np.float64)
    assert 0.01 < error(got) < 0.03  # rounded once more, at random
    # The same sums, once rounded to bfloat16 and once to float8.
    scale = np.repeat(np.asarray(y.of_columns), rows // y.of_columns.size)
    of_bfloat16 = 2.0**-8 * np.abs(np.asarray(plain, np.float64))
    largest = (np.abs(np.asarray(plain, np.float64)) + of_bfloat16) / scale
    unit = np.exp2(np.maximum(np.floor(np.log2(np.maximum(largest, 1e-30))), -6.0) - 3)  # of the last bit
    assert (np.abs(got - np.asarray(plain, np.float64)) <= 0.5 * unit * scale + of_bfloat16).all()


@pytest.mark.gpu
def test_a_gate_of_16_bits_stays_that(key):
    skip_elsewhere()
    x = jax.random.normal(key, (16, 256)).astype(jnp.bfloat16)
    q = quant.quantize(jax.random.normal(key, (256, 256)).astype(x.dtype))
    run = jax.jit(lambda x, q, ordered: quant.matmul_each(x, [q, q], act="silu", ordered=ordered)[0], static_argnums=2)
    y = run(x, q, FLOAT8)
    assert isinstance(y, Ordered) and not y.is_float8
    np.testing.assert_array_equal(y.plain(), run(x, q, None))


@pytest.mark.gpu
@pytest.mark.parametrize("count", [0, 5])
@pytest.mark.parametrize("tokens, features", [(64, 4096), (9, 256), (17, 768), (33, 5120), (64, 16384)])
def test_a_norm_makes_it(key, tokens, features, count):
    keys = jax.random.split(key, 3)
    x, y = (jax.random.normal(each, (tokens, features)).astype(jnp.bfloat16) for each in keys[:2])
    if count:
        y = Parts(jax.random.normal(keys[1], (count, tokens, features)), jnp.dtype(jnp.bfloat16))
    weight = jax.random.normal(keys[2], (2, features)).astype(jnp.bfloat16)
    run = lambda ordered: functools.partial(api.residual_norm, eps=1e-5, ordered=ordered)
    assert api.implementations_in(run(FLOAT8), x, y, weight, jnp.int32(1)) == {"residual_norm.triton"}
    total, out = jax.jit(run(FLOAT8))(x, y, weight, jnp.int32(1))
    wanted = jax.jit(run(None))(x, y, weight, jnp.int32(1))
    assert isinstance(out, Ordered) and out.is_float8 and out.shape == x.shape
    np.testing.assert_array_equal(total, wanted[0])
    np.testing.assert_array_equal(exact(out), rounded(np.asarray(wanted[1], np.float32)))
