"""The product of up to 64 tokens with an NF4 weight by `wgmma`: its layout on the CPU, its values on a GPU of 9.0."""

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_nf4_matmul import LIMITS, fields_of, operands, relative_error

from jaxlora import quant
from jaxlora.kernels import api, nf4_lookup, nf4_matmul_wgmma, nf4_matmul_wgmma_kernel, reference
from jaxlora.kernels.gated import ACTIVATIONS
from jaxlora.kernels.nf4_matmul_wgmma import Config
from jaxlora.kernels.ordered import in_order
from jaxlora.kernels.reference import Residual

DTYPES = [jnp.bfloat16, jnp.float16]


@pytest.mark.parametrize("tokens, programs", [(9, 2), (32, 2), (33, 1), (64, 1)])
def test_an_sm_has_the_shared_memory(tokens, programs):
    _, ring = nf4_matmul_wgmma_kernel.shared_bytes(tokens, 16 // programs)
    asked = max(1 << 16, 1 << (ring - 1).bit_length())
    assert programs * (asked + nf4_lookup.PAIRS + 128 + 1024) <= 228 << 10


@pytest.mark.parametrize("tokens", [16, 64])
@pytest.mark.parametrize("rows, columns", [((14336, 14336), 4096), ((4096, 1024, 1024), 4096), ((4096,), 14336)])
def test_a_split_fills_the_device_and_leaves_no_part_empty(tokens, rows, columns):
    config = nf4_matmul_wgmma.heuristics(tokens, rows, columns)
    programs = config.split * nf4_matmul_wgmma.tiles_of(rows, config.num_warps)
    slots = nf4_matmul_wgmma.SMS * 16 // config.num_warps
    assert config.split <= -(-columns // 256) and 0.7 * slots <= programs <= slots


def test_a_gate_is_not_split():
    assert nf4_matmul_wgmma.heuristics(64, [4096, 4096], 4096, is_gated=True).split == 1


def test_it_says_why_not(key):
    x, q = operands(key, 9, (64, 64), jnp.bfloat16)
    other = operands(key, 9, (32, 64), jnp.bfloat16)[1]
    with pytest.raises(NotImplementedError, match="takes 1 to 64 tokens, not 65"):
        nf4_matmul_wgmma.matmul_nf4(jnp.zeros((65, 64), x.dtype), [fields_of(q)], shapes=[q.shape])
    with pytest.raises(NotImplementedError, match="neither norms nor adds"):
        nf4_matmul_wgmma.matmul_nf4(x, [fields_of(q)], shapes=[q.shape], residual=Residual(x, 1.0))
    with pytest.raises(NotImplementedError, match=r"another's of its shape, not \[\(64, 64\), \(32, 64\)\]"):
        weights, shapes = [fields_of(q), fields_of(other)], [q.shape, other.shape]
        nf4_matmul_wgmma.matmul_nf4(x, weights, shapes=shapes, act="silu")
    with pytest.raises(NotImplementedError, match="triton_wgmma: it .*compute capability 9.0|triton_wgmma: .*GPU"):
        api.matmul_nf4(x, [fields_of(q)], shapes=[q.shape], implementation="triton_wgmma")


def test_x_is_made_a_multiple_of_a_step_and_of_eight_tokens():
    x = 1 + jnp.arange(11 * 192, dtype=jnp.float32).reshape(11, 192)
    got = np.asarray(in_order(x).data)
    assert got.shape == (1, 4, 8, 2, 8, 8)
    t, s, u, h = 2, 3, 1, 1
    assert got[0, 1, 2 * s + u, 1, 2, 2 * t + h] == x[10, 64 + 16 * t + 4 * s + 2 * u + h]
    assert got[0, 2, 2 * s + u, 0, 7, h] == x[7, 128 + 4 * s + 2 * u + h]
    assert sorted(got.ravel()) == sorted([*np.asarray(x).ravel(), *[0.0] * (16 * 256 - 11 * 192)])


@pytest.mark.parametrize("is_rescaled", [False, True])
@pytest.mark.parametrize("tiles", [2, 8])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_products_of_a_block(dtype, tiles, is_rescaled):
    """The PTX on a warpgroup, and the second block of x in its order: 64 rows times all tokens."""
    dtype, random, tokens = jnp.dtype(dtype), np.random.default_rng(0), 8 * tiles
    w, x = random.standard_normal((64, 64)).astype(dtype), random.standard_normal((tokens, 128)).astype(dtype)
    before, ratios = random.standard_normal((64, tokens)), random.uniform(0.5, 2.0, 64)
    image = np.asarray(in_order(jnp.asarray(x)).data)[0, 1].ravel()
    thread = np.arange(128)
    t, upper = thread % 4, thread // 32 * 16 + thread % 32 // 4
    n = 4 * tiles
    places = [(upper + 8 * (i // 2 % 2), 2 * t + i % 2 + 8 * (i // 4)) for i in range(n)]
    memory, buffer = np.zeros((1 << 14) // 2, dtype), 2048
    memory[buffer // 2 :][: image.size] = image
    registers: dict[str, Any] = {f"${i}": before[places[i]] for i in range(n)}
    for i in range(16):  # lane t has elements 16 t .. 16 t + 15
        registers[f"${2 * n + i}"] = w[upper + i // 8 * 8].reshape(128, 4, 8, 2)[thread, t, i % 8]
    registers[f"${2 * n + 16}"] = buffer // 16 | tokens << 16  # the distance between 8 elements of k and the next
    registers |= {f"${2 * n + 17}": ratios[upper], f"${2 * n + 18}": ratios[upper + 8]}
    waited = []
    value = lambda name: registers[name] if name in registers else int(name, 0)
    for line in nf4_matmul_wgmma_kernel.ptx_of_products(dtype, tiles, is_rescaled).splitlines()[1:-1]:
        op, _, names = line.removesuffix(";").partition(" ")
        target, *arguments = names.split(", ")
        match op:
            case "mov.b64":
                first_word, last_word = (value(a.strip("{}")) for a in arguments)
                registers[target] = first_word | last_word << 32
            case "add.u64":
                registers[target] = value(arguments[0]) + value(arguments[1])
            case "wgmma.wait_group.sync.aligned":
                waited.append(target)
            case "mul.rn.f32":
                assert waited == ["0"]  # the totals are there
                registers[target] = value(arguments[0]) * value(arguments[1])
            case _ if op.startswith("wgmma.mma_async"):
                assert f".m64n{tokens}k16." in op
                d, a = (group_.split(", ") for group_ in re.findall(r"{([^}]*)}", names))
                at, *flags = names.rpartition("}, ")[2].split(", ")
                assert flags == ["1", "1", "1", "0"]  # added, neither negated, x by its rows
                left, descriptor = np.zeros((64, 16)), registers[at]
                for half in range(2):
                    for i in range(4):
                        left[upper + 8 * (i % 2), 2 * t + half + 8 * (i // 2)] = registers[a[i]][:, half]
                assert descriptor >> 62 == 0  # no swizzle
                m, k = np.arange(tokens)[:, None], np.arange(16)
                start, across, down = ((descriptor >> shift & 0x3FFF) << 4 for shift in (0, 16, 32))
                address = start + m // 8 * down + m % 8 * 16 + k // 8 * across + k % 8 * 2
                right = memory[address // 2].astype(np.float64)
                product = left @ right.T
                for i in range(n):
                    registers[d[i]] = registers[d[i]] + product[places[i]]
    kept = before * ratios[:, None] if is_rescaled else before
    wanted = kept + w.astype(np.float64) @ x[:, 64:].astype(np.float64).T
    for i in range(n):
        np.testing.assert_allclose(registers[f"${i}"], wanted[places[i]], rtol=1e-9)


@pytest.mark.parametrize("is_scaled", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_elements_of_a_block(dtype, is_scaled):
    """The PTX on a warp: 16 elements of each of two rows, perhaps times a number of the row."""
    dtype, random = jnp.dtype(dtype), np.random.default_rng(0)
    codes, place = random.integers(0, 1 << 32, (4, 32), np.uint32), 4 * np.arange(32)
    ratios = random.uniform(0.5, 2.0, (2, 32)).astype(dtype)
    table = nf4_lookup.pairs(dtype).view(dtype).reshape(256, 2)
    registers: dict[str, Any] = {f"${16 + i}": codes[i] for i in range(4)} | {"$20": place}
    registers |= {f"${21 + i}": np.stack([ratios[i]] * 2, 1) for i in range(2) if is_scaled}
    value = lambda name: registers[name] if name in registers else int(name, 0)
    for line in nf4_matmul_wgmma_kernel.ptx_of_lookup(dtype, is_scaled).splitlines()[1:-1]:
        op, _, names = line.removesuffix(";").partition(" ")
        target, *arguments = names.split(", ")
        match op.partition(".")[0]:
            case "dp4a":
                one, other, more = map(value, arguments)
                registers[target] = sum((one >> 8 * i & 255) * (other >> 8 * i & 255) for i in range(4)) + more
            case "ld":
                at = registers[arguments[0].strip("[]")]
                np.testing.assert_array_equal(at % 128, place)  # every lane in its bank
                registers[target] = table[at // 128]
            case "mul":
                one, other = (np.asarray(value(a), np.float32) for a in arguments)
                registers[target] = (one * other).astype(dtype)
            case _:
                assert op == ".reg", line
    for i in range(16):
        wanted = table[codes[i // 4] >> np.uint32(8 * (i % 4)) & np.uint32(255)].astype(np.float32)
        if is_scaled:
            wanted = (wanted * ratios[i // 8].astype(np.float32)[:, None]).astype(dtype)
        np.testing.assert_array_equal(registers[f"${i}"].astype(np.float32), wanted.astype(np.float32))


@pytest.mark.parametrize(
    "dtype, tokens, error", [(jnp.bfloat16, 32, 8.5e-4), (jnp.float16, 64, 9e-5), (jnp.bfloat16, 64, 2.2e-3)]
)
def test_what_is_rounded_of_a_weight(dtype, tokens, error):
    """The head's maths in numpy: sums over a scale are the product, and the error of a weight is what is said there.
    The kernel is held to `LIMITS` on a GPU, which have the result's rounding in them."""
    dtype, random, factor = jnp.dtype(dtype), np.random.default_rng(0), nf4_lookup.FACTORS[jnp.dtype(dtype).name]
    rounded = lambda a: a.astype(np.float32).astype(dtype).astype(np.float64)
    w, x = random.standard_normal((500, 16, 64)), random.standard_normal((16, 64))
    scales = np.abs(w).max(-1, keepdims=True)
    codes = np.abs((w / scales)[..., None] - reference.NF4).argmin(-1)
    units = scales if nf4_matmul_wgmma_kernel.is_each_rescaled(dtype, tokens) else np.repeat(scales[:, ::4], 4, 1)
    elements = rounded(rounded(reference.NF4 * factor)[codes] * rounded(scales / units))
    sums = np.zeros(500)
    for block in range(16):
        if block:
            sums *= (units[:, block - 1] / units[:, block])[:, 0]
        sums += elements[:, block] @ x[block]
    weights, exact = elements * units / factor, reference.NF4.astype(np.float64)[codes] * scales
    np.testing.assert_allclose(
        sums * units[:, -1, 0] / factor, np.einsum("rbk,bk->r", weights, x), rtol=1e-9, atol=1e-9
    )
    assert error / 1.1 < np.linalg.norm(weights - exact) / np.linalg.norm(exact) < error


# --- on a GPU ---


def skip_elsewhere():
    if api.compute_capability() != "9.0":
        pytest.skip("wgmma is of compute capability 9.0")


@pytest.mark.gpu
@pytest.mark.parametrize("layout", [None, dict(num_warps=4, split=3), dict(num_warps=8)])
@pytest.mark.parametrize(
    "dtype, is_stacked, double_quant",
    [(jnp.bfloat16, True, True), (jnp.float16, False, True), (jnp.float16, True, False)],
)
@pytest.mark.parametrize(
    "shape, tokens",
    [
        ((1024, 4096), 16),
        ((100, 64), 9),
        ((70, 192), 17),
        ((33, 576), 20),
        ((896, 4864), 24),
        ((1000, 576), 41),
        ((4096, 14336), 64),
    ],
)
def test_it_is_as_exact_as_the_dtype(key, dtype, shape, tokens, is_stacked, double_quant, layout):
    skip_elsewhere()
    x, q = operands(key, tokens, shape, dtype, double_quant, is_stacked)
    assert api.implementations_in(quant.matmul, x, q) == {"matmul_nf4.triton_wgmma"}
    run = jax.jit(quant.matmul)
    if layout:
        product = functools.partial(nf4_matmul_wgmma.matmul_nf4, shapes=[shape], config=Config(**layout))
        run = jax.jit(lambda x, q: product(x, [fields_of(q)])[0])
    y = run(x, q)
    assert y.dtype == dtype and y.shape == (tokens, shape[0])
    assert relative_error(y, x, q) < LIMITS[dtype]
    np.testing.assert_array_equal(y, run(x, q))


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [16, 64])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("double_quant", [True, False])
def test_blocks_of_zeros_and_scales_far_apart(key, dtype, tokens, double_quant):
    """Sums and elements are divided by scales, of which some are 0, or a hundred thousandth of their neighbours."""
    skip_elsewhere()
    x, _ = operands(key, tokens, (64, 1024), dtype)
    w = 0.02 * jax.random.normal(key, (64, 16, 64))
    sizes = jnp.ones((64, 16)).at[:32, 4].set(0.0).at[8:24, 7].set(0.0).at[:16, :3].set(0.0).at[20:, 15].set(0.0)
    sizes = sizes.at[48].set(0.0).at[50:60, 8].set(1e-5).at[56:, 9].set(1e3)
    q = quant.quantize((w * sizes[..., None]).reshape(64, 1024), double_quant=double_quant)
    assert api.implementations_in(quant.matmul, x, q) == {"matmul_nf4.triton_wgmma"}
    y = np.asarray(jax.jit(quant.matmul)(x, q), np.float64)
    dense = np.asarray(quant.dequantize(q, jnp.float32, implementation="reference"), np.float64)
    wanted = np.asarray(x, np.float64) @ dense.T
    for row in range(64):  # else the largest would hide the others; the error of one is no mean of many
        size = np.linalg.norm(wanted[:, row])
        assert np.linalg.norm(y[:, row] - wanted[:, row]) <= 2 * LIMITS[dtype] * size


@pytest.mark.gpu
@pytest.mark.parametrize("act", sorted(ACTIVATIONS))
@pytest.mark.parametrize("shape, tokens", [((704, 896), 17), ((70, 576), 64)])
def test_the_gate_is_made_in_the_launch(key, shape, tokens, act):
    skip_elsewhere()
    x, gate = operands(key, tokens, shape, jnp.bfloat16, is_stacked=True)
    up = operands(jax.random.fold_in(key, 1), 1, shape, jnp.bfloat16, is_stacked=True)[1]
    run = jax.jit(lambda x, *weights: quant.matmul_each(x, weights, act=act)[0])
    assert api.implementations_in(run, x, gate, up) == {"matmul_nf4.triton_wgmma"}
    wanted = ACTIVATIONS[act](quant.matmul(x, gate)) * quant.matmul(x, up)
    got = np.asarray(run(x, gate, up), np.float32)
    np.testing.assert_allclose(got, np.asarray(wanted, np.float32), rtol=2**-6, atol=1e-6)


@pytest.mark.gpu
def test_the_parts_are_those_of_the_sum(key):
    skip_elsewhere()
    x, q = operands(key, 33, (1024, 4096), jnp.bfloat16, is_stacked=True)
    product = functools.partial(nf4_matmul_wgmma.matmul_nf4, shapes=[q.shape], config=Config(split=4))
    run = jax.jit(lambda x, q, parts: product(x, [fields_of(q)], parts=parts)[0], static_argnums=2)
    parts = run(x, q, True)
    assert parts.dtype == jnp.float32 and parts.shape == (4, 33, 1024)
    np.testing.assert_array_equal(run(x, q, False), functools.reduce(jnp.add, [*parts]).astype(x.dtype))
