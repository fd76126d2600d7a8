"""The product of up to 64 tokens with an NF4 weight: its layout on the CPU, its values on a GPU."""

import functools
import re

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from test_nf4_matmul import LIMITS, fields_of, operands, relative_error

from jaxlora import quant
from jaxlora.kernels import api, nf4_matmul_tiles
from jaxlora.kernels.nf4_matmul_tiles import Config
from jaxlora.kernels.parts import Parts, summed

DTYPES = [jnp.bfloat16, jnp.float16]


@pytest.mark.parametrize(
    "tokens, shape, dtype, message",
    [
        (9, (96, 128), jnp.float32, "bfloat16 or float16, not float32"),
        (65, (96, 128), jnp.bfloat16, "1 to 64 tokens, not 65"),
        (9, (10, 70), jnp.bfloat16, "whole blocks of 64, not of 70"),
    ],
)
def test_the_kernel_says_why_it_cannot_run(key, tokens, shape, dtype, message):
    x, q = operands(key, tokens, shape, dtype)
    with pytest.raises(NotImplementedError, match=message):
        nf4_matmul_tiles.matmul_nf4(x, [fields_of(q)], shapes=[shape])


def test_it_is_for_a_gpu(key):
    x, q = operands(key, 9, (96, 128), jnp.bfloat16, is_stacked=True)
    with pytest.raises(NotImplementedError, match=r"matmul_nf4 .*triton_tiles: .*GPU"):
        api.matmul_nf4(x, [fields_of(q)], shapes=[q.shape], implementation="triton_tiles")
    assert api.implementations_in(quant.matmul, x, q) == {"merge_nf4.reference"}


@pytest.mark.parametrize("field", [{"num_warps": 16}, {"num_warps": 3}, {"split": 0}, {"ahead": -1}])
def test_a_config_is_checked(field, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # a user's mistake meets our own error
    with pytest.raises(ValueError, match=next(iter(field))):
        Config(**field)


@pytest.mark.parametrize(
    "rows, columns",
    [((14336, 14336), 4096), ((4096, 1024, 1024), 4096), ((4096,), 4096), ((4096,), 14336), ((576, 192, 192), 576)],
)
def test_a_split_fills_the_device_and_leaves_no_part_empty(rows, columns):
    config = nf4_matmul_tiles.heuristics(rows, columns)
    programs = config.split * nf4_matmul_tiles.tiles_of(rows, config.num_warps)
    assert config.split <= -(-columns // 256)
    assert programs <= nf4_matmul_tiles.SMS and (programs >= 96 or config.split >= 3)


def test_rows_that_fill_the_device_are_not_split():
    assert nf4_matmul_tiles.heuristics([28672, 28672], 8192).split == 1


def test_a_small_weight_has_no_idle_warps():
    assert nf4_matmul_tiles.heuristics([40], 64) == Config(num_warps=2)


@pytest.mark.parametrize("tokens", [1, 8, 9, 64])
def test_the_shared_memory_needs_no_asking_for(tokens):
    assert nf4_matmul_tiles.shared_bytes(tokens) <= 48 << 10


@pytest.mark.parametrize("half", range(2))
def test_no_two_lanes_read_x_from_one_bank(half):
    """Eight lanes at a time read 16 bytes each, which must be all 128 of a row of banks; and all pieces are read."""
    lane = np.arange(32)
    group, t = lane // 4, lane % 4
    swap = group % 2 * 16
    read = group * 128 + t * 32 + (swap if half == 0 else 16 - swap)
    assert all({*eight} == {*range(8)} for eight in (read // 16 % 8).reshape(4, 8))
    token, place = np.divmod(np.arange(64), 8)  # as `copy` writes them: of lane t pieces 2 t and 2 t + 1
    written = token * 128 + (place ^ token % 2) * 16
    wanted = [written[8 * g + 2 * i + half] for g, i in zip(group, t, strict=True)]
    np.testing.assert_array_equal(read, wanted)


@pytest.mark.parametrize("width", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_products_of_a_block(dtype, width):
    """The PTX on the 32 lanes of a warp: 32 rows of 64 elements times 8 tokens a tile, by scales, added to totals."""
    dtype, random = jnp.dtype(dtype), np.random.default_rng(0)
    w, x = random.standard_normal((32, 64)).astype(dtype), random.standard_normal((8 * width, 64)).astype(dtype)
    scales, before = random.standard_normal(32), random.standard_normal((32, 8 * width))
    lane = np.arange(32)
    group, t = lane // 4, lane % 4
    # Of row g of some rows lane t has elements 16 t .. 16 t + 15, two a word: [lane, word, 2].
    of_lanes = lambda rows: rows.reshape(8, 4, 8, 2)[group, t]
    row_of, column_of = (lambda i: group + 8 * (i // 2)), (lambda i: 2 * t + i % 2)  # of the four sums of a product
    registers, first = {}, 8 * width
    for i in range(32):
        registers[f"${first + i}"] = of_lanes(w[i // 8 * 8 :][:8])[:, i % 8]
    sums = [(row_of(i % 4) + 16 * (i // 4 % 2), column_of(i % 4) + 8 * (i // 8)) for i in range(8 * width)]
    for i in range(8 * width):
        registers[f"${first + 32 + i}"] = of_lanes(x[i // 8 * 8 :][:8])[:, i % 8]
        registers[f"${first + 36 + 8 * width + i}"] = before[sums[i]]
    for i in range(4):
        registers[f"${first + 32 + 8 * width + i}"] = scales[group + 8 * i]
    for line in nf4_matmul_tiles._products_assembly(dtype, width).splitlines()[1:-1]:
        op, _, names = line.removesuffix(";").partition(" ")
        match op.split(".")[0]:
            case "mov":
                registers[names.split(", ")[0]] = np.zeros(32)
            case "mma":
                d, a, b, c = (group_.split(", ") for group_ in re.findall(r"{([^}]*)}", names))
                left, right = np.zeros((16, 16)), np.zeros((16, 8))
                for half in range(2):
                    for i in range(4):
                        left[group + 8 * (i % 2), 2 * t + half + 8 * (i // 2)] = registers[a[i]][:, half]
                    for i in range(2):
                        right[2 * t + half + 8 * i, group] = registers[b[i]][:, half]
                product = left @ right
                for i in range(4):
                    registers[d[i]] = registers[c[i]] + product[row_of(i), column_of(i)]
            case "fma":
                target, *arguments = names.split(", ")
                one, other, more = (registers[name] for name in arguments)
                registers[target] = one * other + more
    wanted = before + scales[:, None] * (w.astype(np.float64) @ x.astype(np.float64).T)
    for i in range(8 * width):
        np.testing.assert_allclose(registers[f"${i}"], wanted[sums[i]], rtol=1e-9)


# --- on a GPU ---


@pytest.mark.gpu
@pytest.mark.parametrize(
    "dtype, is_stacked, double_quant",
    [(jnp.bfloat16, True, True), (jnp.float16, False, True), (jnp.float16, True, False)],
)
@pytest.mark.parametrize(
    "shape, tokens",
    [
        *(((1024, 4096), tokens) for tokens in (9, 16, 17, 33, 64)),
        *(((100, 64), 9), ((70, 192), 17), ((896, 4864), 24), ((1000, 576), 41), ((4096, 14336), 64)),
    ],
)
def test_triton_is_as_exact_as_the_dtype(key, dtype, shape, tokens, is_stacked, double_quant):
    x, q = operands(key, tokens, shape, dtype, double_quant, is_stacked)
    is_hopper = api.compute_capability() == "9.0"
    preferred = "triton_wgmma" if is_hopper else "triton_tiles"
    assert api.implementations_in(quant.matmul, x, q) == {f"matmul_nf4.{preferred}"}
    product = functools.partial(api.matmul_nf4, shapes=[shape], implementation="triton_tiles")
    run = jax.jit(lambda x, q: product(x, [fields_of(q)])[0])
    y = run(x, q)
    assert y.dtype == dtype and y.shape == (tokens, shape[0])
    assert relative_error(y, x, q) < LIMITS[dtype]
    np.testing.assert_array_equal(y, run(x, q))  # no sum depends on who comes first


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [3, 24, 64])
@pytest.mark.parametrize(
    "layout",
    [dict(num_warps=1, split=3), dict(num_warps=2, ahead=0), dict(num_warps=4, split=100), dict(split=5, ahead=3)],
)
def test_every_configuration_is_right(key, layout, tokens):
    x, q = operands(key, tokens, (904, 4864), jnp.bfloat16, is_stacked=True)
    run = jax.jit(
        lambda x, q: nf4_matmul_tiles.matmul_nf4(x, [fields_of(q)], shapes=[q.shape], config=Config(**layout))
    )
    assert relative_error(run(x, q)[0], x, q) < LIMITS[jnp.bfloat16]


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [(1024, 256, 256), (704, 704), (100, 16, 40)])
def test_weights_that_read_the_same_meet_in_one_launch(key, rows):
    x, _ = operands(key, 17, (16, 1024), jnp.bfloat16)
    weights = [operands(jax.random.fold_in(key, n), 1, (n, 1024), jnp.bfloat16, is_stacked=True)[1] for n in rows]
    run = jax.jit(quant.matmul_each)
    assert run.lower(x, weights).as_text().count("triton_kernel_call") == 1
    for y, q in zip(run(x, weights), weights, strict=True):
        assert relative_error(y, x, q) < LIMITS[jnp.bfloat16]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows, columns", [((1024, 256, 256), 1024), ((100,), 4864), ((14336, 14336), 512)])
def test_parts_are_what_is_added_up(key, dtype, rows, columns):
    x, _ = operands(key, 64, (16, columns), dtype)
    weights = [operands(jax.random.fold_in(key, n), 1, (n, columns), dtype, is_stacked=True)[1] for n in rows]
    run = functools.partial(api.matmul_nf4, shapes=[(n, columns) for n in rows])
    run = functools.partial(run, implementation="triton_tiles")
    fields = [fields_of(q) for q in weights]
    is_split = nf4_matmul_tiles.heuristics(rows, columns).split > 1
    for y, whole in zip(run(x, fields, parts=True), run(x, fields), strict=True):
        assert isinstance(y, Parts) == is_split and y.shape == whole.shape and y.dtype == whole.dtype == dtype
        np.testing.assert_array_equal(summed(y), whole)


@pytest.mark.gpu
def test_adapters_that_are_vmapped_meet_one_weight(key):
    x, q = operands(key, 12, (256, 512), jnp.bfloat16)
    xs = jnp.stack([x, 2 * x, -x])
    got = jax.vmap(lambda x: quant.matmul(x, q))(xs)
    for y, x in zip(got, xs, strict=True):
        assert relative_error(y, x, q) < LIMITS[jnp.bfloat16]
