"""The product of few tokens with an NF4 weight: against the exact one, in every place where it stands in."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from jaxlora import quant
from jaxlora.kernels import api, nf4_lookup, nf4_matmul, reference
from jaxlora.kernels.gated import ACTIVATIONS
from jaxlora.kernels.h100 import SMS
from jaxlora.kernels.nf4_matmul import Config
from jaxlora.kernels.nf4_matmul_kernel import _put_joined_assembly, shared_bytes
from jaxlora.kernels.reference import InputNorm, Residual

# The largest relative error: the rounding of NF4 and that of the result, which is a third of the dtype's unit.
LIMITS = {jnp.bfloat16: 3e-3, jnp.float16: 4e-4}


def operands(key, tokens, shape, dtype, double_quant=True, is_stacked=False):
    keys = jax.random.split(key)
    one = functools.partial(quant.quantize, double_quant=double_quant)
    q = jax.lax.map(one, 0.02 * jax.random.normal(keys[0], (3, *shape)))
    q = q.at(jnp.int32(2)) if is_stacked else jax.tree.map(lambda leaf: leaf[1], q)
    return jax.random.normal(keys[1], (tokens, shape[1])).astype(dtype), q


def fields_of(q):
    return reference.NF4Fields(q.codes, q.scales, q.nested_absmax, q.nested_offset, q.index)


def times(x, w):
    return jax.lax.dot_general(x, w, (((1,), (1,)), ((), ())))


def relative_error(y, x, q):
    dense = np.asarray(quant.dequantize(q.taken(), jnp.float32, implementation="reference"), np.float64)
    exact = np.asarray(x, np.float64) @ dense.T
    return float(np.linalg.norm(np.asarray(y, np.float64) - exact) / np.linalg.norm(exact))


@pytest.mark.parametrize("is_stacked", [False, True])
@pytest.mark.parametrize("shape", [(96, 128), (10, 70)])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_reference_is_the_product_with_the_dense_weight(key, dtype, shape, is_stacked):
    x, q = operands(key, 3, shape, dtype, is_stacked=is_stacked)
    [got] = api.matmul_nf4(x, [fields_of(q)], shapes=[shape])
    wanted = times(x, quant.dequantize(q, dtype))
    assert got.dtype == dtype
    np.testing.assert_array_equal(got, wanted)


def test_on_the_cpu_few_tokens_take_the_path_of_many(key):
    x, q = operands(key, 3, (96, 128), jnp.bfloat16, is_stacked=True)
    assert api.implementations_in(quant.matmul, x, q) == {"merge_nf4.reference"}
    np.testing.assert_array_equal(quant.matmul(x, q), times(x, quant.dequantize(q, x.dtype)))
    with pytest.raises(NotImplementedError, match=r"matmul_nf4 .*triton: .*GPU"):
        api.matmul_nf4(x, [fields_of(q)], shapes=[q.shape], implementation="triton")


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_each_of_some_weights_is_multiplied_as_alone(key, dtype):
    x, q = operands(key, 3, (96, 128), dtype)
    _, other = operands(jax.random.fold_in(key, 1), 3, (32, 128), dtype)
    weights = [q, other]
    got, pullback = jax.vjp(lambda x: quant.matmul_each(x, weights), x)
    wanted, pullback_alone = jax.vjp(lambda x: [quant.matmul(x, w) for w in weights], x)
    for y, alone in zip(got, wanted, strict=True):
        np.testing.assert_array_equal(y, alone)
    np.testing.assert_array_equal(pullback(got)[0], pullback_alone(wanted)[0])
    mixed = quant.matmul_each(x, [q, quant.dequantize(other, dtype)])
    np.testing.assert_array_equal(mixed[1], wanted[1])


@pytest.mark.parametrize(
    "tokens, shape, dtype, message",
    [
        (3, (96, 128), jnp.float32, "bfloat16 or float16, not float32"),
        (9, (96, 128), jnp.bfloat16, "1 to 8 tokens, not 9"),
        (3, (10, 70), jnp.bfloat16, "whole blocks of 64, not of 70"),
    ],
)
def test_the_kernel_says_why_it_cannot_run(key, tokens, shape, dtype, message):
    x, q = operands(key, tokens, shape, dtype)
    with pytest.raises(NotImplementedError, match=message):
        nf4_matmul.matmul_nf4(x, [fields_of(q)], shapes=[shape])


def test_the_kernel_takes_few_weights_and_all_of_a_kind(key):
    x, q = operands(key, 3, (96, 128), jnp.bfloat16)
    _, single = operands(key, 3, (96, 128), jnp.bfloat16, double_quant=False)
    _, stacked = operands(key, 3, (96, 128), jnp.bfloat16, is_stacked=True)
    for weights, message in [([q] * 4, "1 to 3 weights, not 4"), ([q, single], "twice"), ([q, stacked], "stacked")]:
        with pytest.raises(NotImplementedError, match=message):
            nf4_matmul.matmul_nf4(x, [*map(fields_of, weights)], shapes=[(96, 128)] * len(weights))


@pytest.mark.parametrize("field", [{"num_warps": 3}, {"num_warps": 32}, {"depth": 0}, {"programs": 0}])
def test_a_config_is_checked(field, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # a user's mistake meets our own error
    with pytest.raises(ValueError, match=next(iter(field))):
        Config(**field)


@pytest.mark.parametrize("tokens", [1, 2, 3, 8])
@pytest.mark.parametrize("columns", [64, 576, 1536, 4096, 4864, 14336])
@pytest.mark.parametrize("tiles", [1, 256, 384, 1792])
def test_no_warp_of_a_configuration_is_idle(tokens, columns, tiles):
    config = nf4_matmul.heuristics(tokens, tiles, columns)
    assert config.num_warps == 1 or 256 * (config.num_warps - 1) < columns
    assert 512 * config.num_warps > columns or config.num_warps >= 8


@pytest.mark.parametrize(
    "tokens, tiles, columns, is_gated, warps, programs",
    [
        (1, 1792, 4096, True, 8, 3 * SMS),  # gate and up of an 8B
        (1, 1792, 4096, False, 16, 2 * SMS),
        (1, 384, 4096, False, 8, 3 * SMS),  # its q, k and v
        (1, 256, 14336, False, 16, 2 * SMS),  # its down
        (2, 3584, 8192, True, 16, 2 * SMS),  # of a 70B, whose last round would be 20 tiles of 396
        (1, 1024, 2048, True, 8, 3 * SMS),  # of a 1B, whose rows are 8 steps
        (8, 1792, 4096, True, 8, 2 * SMS),
    ],
)
def test_programs_of_an_sm(tokens, tiles, columns, is_gated, warps, programs):
    config = nf4_matmul.heuristics(tokens, tiles, columns, is_gated)
    assert (config.num_warps, config.programs) == (warps, programs)


@pytest.mark.parametrize("num_warps", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("tokens, normed", [(1, 0), (1, 6656), (2, 6656), (8, 0)])
def test_the_shared_memory_needs_no_asking_for(num_warps, tokens, normed):
    if tokens > 2 and num_warps == 16:
        num_warps = nf4_matmul.heuristics(tokens, 1792, 1 << 20).num_warps
    assert shared_bytes(num_warps, tokens, normed) <= nf4_matmul.MOST_SHARED


@pytest.mark.parametrize(
    "tokens, num_warps, depth, kept",
    [(1, 16, 1, 4096), (1, 8, 2, 4096), (2, 8, 1, 4096), (1, 16, 2, 0), (2, 16, 1, 0), (3, 8, 1, 0)],
)
def test_x_is_staged_where_there_is_room(tokens, num_warps, depth, kept):
    """16,384 bytes are too many beside the table of 16 warps, and three tokens fill columns of their own."""
    assert nf4_matmul.staged(tokens, nf4_matmul.Config(num_warps=num_warps, depth=depth)) == kept


# --- what stands around a product ---


def surroundings(key, tokens, columns, rows, dtype, norm, act, residual):
    """The options of `quant.matmul_each`: a stack of gains, a gate, a residual stream."""
    keys = jax.random.split(key)
    gains = (1 + 0.3 * jax.random.normal(keys[0], (3, columns))).astype(dtype)
    options = {"norm": InputNorm(gains, jnp.int32(1), 1e-5, 1.0 if norm == "offset" else 0.0) if norm else None}
    options["act"] = act
    stream = jax.random.normal(keys[1], (tokens, rows)).astype(dtype)
    return options | {"residual": Residual(stream, 0.5) if residual else None}


def exact_around(x, weights, norm, act, residual):
    """In float64, of the dense weights."""
    f64 = lambda array: np.asarray(array, np.float64)
    x = f64(x)
    if norm is not None:
        gain = norm.offset + f64(norm.weight[1])
        x = x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + norm.eps) * gain
    ys = [x @ f64(quant.dequantize(w.taken(), jnp.float32, implementation="reference")).T for w in weights]
    if act is not None:
        ys = [f64(ACTIVATIONS[act](jnp.asarray(ys[0], jnp.float32))) * ys[1]]
    return ys if residual is None else [f64(residual.x) + residual.multiplier * ys[0]]


AROUND = [
    ("gain", None, False),
    ("offset", "silu", False),
    ("gain", "gelu", True),
    (None, "gelu_pytorch_tanh", False),
    (None, "relu", True),
    (None, None, True),
]


@pytest.mark.parametrize("norm, act, residual", AROUND)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_what_stands_around_a_product_is_what_the_steps_make(key, dtype, norm, act, residual):
    x, gate = operands(key, 3, (96, 128), dtype, is_stacked=True)
    _, up = operands(jax.random.fold_in(key, 1), 3, (96, 128), dtype, is_stacked=True)
    weights = [gate, up] if act else [gate]
    around = surroundings(key, 3, 128, 96, dtype, norm, act, residual)
    wanted = exact_around(x, weights, **around)
    reference_ = api.matmul_nf4(x, [*map(fields_of, weights)], shapes=[w.shape for w in weights], **around)
    for got in (reference_, quant.matmul_each(x, weights, **around)):
        for y, exact in zip(got, wanted, strict=True):
            assert y.dtype == dtype
            error = np.linalg.norm(np.asarray(y, np.float64) - exact) / np.linalg.norm(exact)
            assert error < (1e-6 if dtype == jnp.float32 else 1e-2)


def test_dense_weights_of_what_stands_around_have_gradients(key):
    x, gate = operands(key, 3, (96, 128), jnp.float32)
    gate = quant.dequantize(gate)
    around = surroundings(key, 3, 128, 96, jnp.float32, "gain", "silu", True)
    norm, residual = around["norm"], around["residual"]

    def at_once(gate):
        return quant.matmul_each(x, [gate, 2 * gate], norm=norm, act="silu", residual=residual)[0]

    def steps(gate):
        wide = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + norm.eps) * norm.weight[1]
        return residual.x + residual.multiplier * jax.nn.silu(times(wide, gate)) * times(wide, 2 * gate)

    got, wanted = (jax.vjp(f, gate)[1](jnp.ones((3, 96)))[0] for f in (at_once, steps))
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-4)


def test_what_stands_around_a_product_has_the_gradients_of_the_steps(key):
    x, gate = operands(key, 3, (96, 128), jnp.float32)
    _, up = operands(jax.random.fold_in(key, 1), 3, (96, 128), jnp.float32)
    around = surroundings(key, 3, 128, 96, jnp.float32, "gain", "silu", True)

    def at_once(x, gains, stream):
        norm, residual = (
            dataclasses.replace(around["norm"], weight=gains),
            dataclasses.replace(around["residual"], x=stream),
        )
        return quant.matmul_each(x, [gate, up], norm=norm, act="silu", residual=residual)[0]

    def steps(x, gains, stream):
        wide = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-5) * gains[1]
        a, b = (times(wide, quant.dequantize(w)) for w in (gate, up))
        return stream + 0.5 * jax.nn.silu(a) * b

    arguments = x, around["norm"].weight, around["residual"].x
    for got, wanted in zip(*(jax.vjp(f, *arguments)[1](jnp.ones((3, 96))) for f in (at_once, steps)), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5)


def test_the_kernel_says_what_it_cannot_put_around_a_product(key):
    def run(tokens, columns, weight=jnp.bfloat16, stream=jnp.bfloat16):
        x, q = operands(key, tokens, (32, columns), jnp.bfloat16)
        norm, residual = InputNorm(jnp.ones(columns, weight), None, 1e-5), Residual(jnp.ones((tokens, 32), stream))
        nf4_matmul.matmul_nf4(x, [fields_of(q)], shapes=[q.shape], norm=norm, residual=residual)

    for arguments, message in [
        ((3, 128), r"room for it, not for \[3, 128\]"),
        ((2, 4096), r"room for it, not for \[2, 4096\]"),
        ((1, 128, jnp.float32), r"x's dtype bfloat16, not float32"),
        ((1, 128, jnp.bfloat16, jnp.float32), "not to float32"),
    ]:
        with pytest.raises(NotImplementedError, match=message):
            run(*arguments)


# --- the PTX, interpreted on 32 lanes ---


@pytest.mark.parametrize("tokens", [1, 2])
def test_four_lanes_leave_one_sum_each(tokens):
    """Lane 4 g + t leaves the sum over its four lanes of row g + 8 (t / 2) and token t % 2."""
    kept = 2 if tokens == 1 else 4
    values = np.random.default_rng(0).standard_normal((kept, 32)).astype(np.float32)
    lane = np.arange(32)
    registers = {f"${2 + i}": value for i, value in enumerate(values)}
    registers[f"${2 + kept}"] = lane % 4
    for line in _put_joined_assembly(tokens).splitlines()[1:-1]:
        op, names = line.removesuffix(";").split(" ", 1)
        target, *arguments = names.split(", ")
        if op.startswith((".reg", "bar")):
            continue
        if target == "$0":
            continue  # something for Triton to return
        values_of = [registers[name] if name in registers else int(name, 0) for name in arguments]
        match op:
            case "mov.b32" | "mov.f32":
                registers[target] = values_of[0]
            case "and.b32":
                registers[target] = values_of[0] & values_of[1]
            case "setp.ne.b32":
                registers[target] = values_of[0] != values_of[1]
            case "selp.f32":
                registers[target] = np.where(values_of[2], values_of[0], values_of[1])
            case "shfl.sync.bfly.b32":
                registers[target] = values_of[0][lane ^ values_of[1]]
            case "add.f32":
                registers[target] = values_of[0] + values_of[1]
            case "st.shared.f32":
                left = values_of[0]
            case unknown:
                raise AssertionError(unknown)
    sums = values.reshape(kept, 8, 4).sum(axis=2)  # [kept, g]
    t = lane % 4
    wanted = sums[t // 2 if tokens == 1 else t, lane // 4]
    np.testing.assert_allclose(left, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_the_lookup_of_every_byte_in_every_place(dtype):
    """Two instructions a byte, from a table that starts anywhere; no two lanes read from one bank of shared memory."""
    dtype, start, lane = jnp.dtype(dtype), 0x400, np.arange(32)
    memory = {start + 128 * byte + 4 * i: pair for byte, pair in enumerate(nf4_lookup.pairs(dtype)) for i in lane}
    bytes_of_lane = np.random.default_rng(0).permuted(np.tile(np.arange(256), (8, 1)), axis=1).reshape(8, 8, 32)
    for codes in bytes_of_lane:  # [8 bytes, 32 lanes]
        registers = {f"${8 + i}": np.ascontiguousarray(codes[4 * i : 4 * i + 4].T) for i in range(2)}
        registers["$10"] = start + 4 * lane
        for line in nf4_lookup.lookup_assembly().splitlines()[3:-1]:
            op, names = line.removesuffix(";").split(" ", 1)
            target, *arguments = names.split(", ")
            match op, arguments:
                case "dp4a.u32.u32", [word, factors, sum_]:
                    factors = np.array([int(factors, 16)], np.uint32).view(np.uint8).astype(int)
                    registers[target] = registers[word] @ factors + registers[sum_]
                case "ld.shared.b32", [place]:
                    at = registers[place.strip("[]")]
                    assert sorted(at // 4 % 32) == [*range(32)]
                    registers[target] = np.array([memory[i] for i in at], np.uint32)
                case unknown:
                    raise AssertionError(unknown)
        got = np.stack([registers[f"${i}"] for i in range(8)]).view(np.uint16).reshape(8, 32, 2).view(dtype)
        table = (reference.NF4 * np.float32(nf4_lookup.FACTORS[dtype.name])).astype(dtype)
        wanted = np.stack([table[codes >> 4], table[codes & 15]], axis=-1)  # the high nibble comes first
        np.testing.assert_array_equal(got, wanted)


# --- on a GPU ---


@pytest.mark.gpu
@pytest.mark.parametrize(
    "dtype, is_stacked, double_quant",
    [(jnp.bfloat16, True, True), (jnp.float16, False, True), (jnp.float16, True, False)],
)
@pytest.mark.parametrize(
    "shape, tokens",
    [
        *(((1024, 4096), tokens) for tokens in (1, 2, 3, 8)),
        *(((100, 64), 3), ((100, 64), 1), ((70, 192), 7), ((70, 192), 2), ((896, 4864), 8), ((4096, 14336), 1)),
    ],
)
def test_triton_is_as_exact_as_the_dtype(key, dtype, shape, tokens, is_stacked, double_quant):
    x, q = operands(key, tokens, shape, dtype, double_quant, is_stacked)
    assert api.implementations_in(quant.matmul, x, q) == {"matmul_nf4.triton"}
    y = jax.jit(quant.matmul)(x, q)
    assert y.dtype == dtype and y.shape == (tokens, shape[0])
    assert relative_error(y, x, q) < LIMITS[dtype]
    np.testing.assert_array_equal(y, jax.jit(quant.matmul)(x, q))  # no sum depends on who comes first


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 2, 8])
@pytest.mark.parametrize(
    "layout",
    [dict(num_warps=1), dict(num_warps=4, depth=3), dict(num_warps=8, depth=2, programs=5), dict(num_warps=16)],
)
def test_every_configuration_is_right(key, layout, tokens):
    x, q = operands(key, tokens, (904, 4864), jnp.bfloat16, is_stacked=True)
    [y] = nf4_matmul.matmul_nf4(x, [fields_of(q)], shapes=[q.shape], config=Config(**layout))
    assert relative_error(y, x, q) < LIMITS[jnp.bfloat16]


@pytest.mark.gpu
def test_triton_runs_forward_and_the_backward_pass_dequantises(key):
    x, q = operands(key, 8, (1024, 4096), jnp.bfloat16)
    product = lambda x: jax.vjp(lambda x: quant.matmul(x, q), x)
    run = lambda x: (product(x)[0], product(x)[1](jnp.ones((8, 1024), x.dtype)))
    assert api.implementations_in(run, x) == {"matmul_nf4.triton", "dequantize_nf4.triton"}
    y, (dx,) = run(x)
    assert relative_error(y, x, q) < LIMITS[jnp.bfloat16]
    wanted = jnp.sum(quant.dequantize(q, jnp.float32), axis=0)
    assert float(jnp.linalg.norm(dx[0].astype(jnp.float32) - wanted) / jnp.linalg.norm(wanted)) < 1e-2


@pytest.mark.gpu
def test_adapters_that_are_vmapped_meet_one_weight(key):
    x, q = operands(key, 3, (256, 512), jnp.bfloat16)
    xs = jnp.stack([x, 2 * x, -x])
    got = jax.vmap(lambda x: quant.matmul(x, q))(xs)
    for y, x in zip(got, xs, strict=True):
        assert relative_error(y, x, q) < LIMITS[jnp.bfloat16]


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [(1024, 256, 256), (704, 704), (100, 16, 40)])
@pytest.mark.parametrize("tokens", [1, 7])
def test_weights_that_read_the_same_meet_in_one_launch(key, rows, tokens):
    x, _ = operands(key, tokens, (16, 1024), jnp.bfloat16)
    weights = [operands(jax.random.fold_in(key, n), 1, (n, 1024), jnp.bfloat16, is_stacked=True)[1] for n in rows]
    run = jax.jit(quant.matmul_each)
    program = run.lower(x, weights).as_text()
    assert program.count("triton_kernel_call") == 1
    for y, q in zip(run(x, weights), weights, strict=True):
        assert relative_error(y, x, q) < LIMITS[jnp.bfloat16]


@pytest.mark.gpu
@pytest.mark.parametrize("norm, act, residual", AROUND)
@pytest.mark.parametrize(
    "dtype, tokens, shape",
    [
        *((jnp.bfloat16, *case) for case in ((1, (1024, 4096)), (2, (1024, 2048)), (2, (128, 4096)), (8, (904, 4864)))),
        *((jnp.float16, *case) for case in ((1, (104, 4864)), (2, (44, 576)), (3, (100, 1024)))),
    ],
)
def test_triton_does_what_stands_around_a_product(key, dtype, tokens, shape, norm, act, residual):
    x, gate = operands(key, tokens, shape, dtype, is_stacked=True)
    _, up = operands(jax.random.fold_in(key, 1), tokens, shape, dtype, is_stacked=True)
    weights = [gate, up] if act else [gate]
    around = surroundings(key, tokens, shape[1], shape[0], dtype, norm, act, residual)
    run = functools.partial(quant.matmul_each, act=around.pop("act"))
    is_normed_before = norm is not None and (tokens > 2 or tokens * shape[1] > 6656)
    ran = {"matmul_nf4.triton", *(["residual_norm.triton"] if is_normed_before else [])}
    assert api.implementations_in(run, x, weights, **around) == ran
    got = jax.jit(run)(x, weights, **around)
    for y, exact in zip(got, exact_around(x, weights, act=act, **around), strict=True):
        assert y.dtype == dtype and y.shape == (tokens, shape[0])
        error = np.linalg.norm(np.asarray(y, np.float64) - exact) / np.linalg.norm(exact)
        assert error < 3 * LIMITS[dtype]  # x and both products are rounded besides
    np.testing.assert_array_equal(got[0], jax.jit(run)(x, weights, **around)[0])


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 8])
def test_a_gate_inside_is_the_gate_behind_to_the_bit(key, tokens):
    x, gate = operands(key, tokens, (1024, 4096), jnp.bfloat16, is_stacked=True)
    _, up = operands(jax.random.fold_in(key, 1), tokens, (1024, 4096), jnp.bfloat16, is_stacked=True)
    [inside] = jax.jit(functools.partial(quant.matmul_each, act="silu"))(x, [gate, up])
    behind = jax.jit(lambda x, weights: api.gated(*quant.matmul_each(x, weights), "silu"))(x, [gate, up])
    np.testing.assert_array_equal(inside, behind)
