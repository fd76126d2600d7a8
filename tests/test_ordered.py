"""x in the order of the product: there and back, where a decode step asks for it, and that it draws the same."""

import functools
import sys
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import load_folder, make_checkpoint, random_ids, relative_error

from jaxlora import lora, quant
from jaxlora.config import LoraConfig, QuantConfig
from jaxlora.generate import _prefill
from jaxlora.kernels import api, decode_attention, reference, residual_norm
from jaxlora.kernels.ordered import FLOAT8, Ordered, in_order, plain, shape_of
from jaxlora.kernels.parts import Parts

ROWS = 9  # the least that have a kernel which reads it


@pytest.mark.parametrize("shape", [(64, 512), (9, 256), (3, 7, 192), (17, 64)])
def test_there_and_back(key, shape):
    x = jax.random.normal(key, shape).astype(jnp.bfloat16)
    there = jax.jit(in_order)(x)
    assert (
        there.shape == shape and there.dtype == x.dtype and there.data.shape == shape_of(x.size // shape[-1], shape[-1])
    )
    np.testing.assert_array_equal(there.plain(), x)
    np.testing.assert_array_equal(plain(there.reshape(x.size // shape[-1], shape[-1])), x.reshape(-1, shape[-1]))
    assert plain(x) is x


@pytest.mark.parametrize("tokens, columns", [(64, 4096), (9, 512), (41, 768)])
def test_where_an_element_is(tokens, columns):
    x = 1 + np.arange(tokens * columns, dtype=np.float32).reshape(tokens, columns)
    data, padded = np.asarray(in_order(jnp.asarray(x)).data).ravel(), -(-tokens // 8) * 8
    m, k = np.meshgrid(np.arange(tokens), np.arange(columns), indexing="ij")
    np.testing.assert_array_equal(data[((k // 64 * 8 + k // 2 % 8) * padded + m) * 8 + k // 16 % 4 * 2 + k % 2], x)
    assert data.size == padded * columns and (data == 0).sum() == (padded - tokens) * columns


def test_it_stays_of_its_tokens():
    x = in_order(jnp.ones((2, 3, 256), jnp.bfloat16))
    for shape in ((6, 128), (7, 256)):
        with pytest.raises(ValueError, match=r"Ordered \[2, 3, 256\] has tokens of 256 and cannot be"):
            x.reshape(*shape)


@pytest.mark.parametrize("act", [None, "silu"])
def test_products_and_their_gradients_are_those_of_plain_x(key, act):
    keys = jax.random.split(key, 3)
    x = jax.random.normal(keys[0], (ROWS, 192)).astype(jnp.bfloat16)
    weights = [quant.quantize(jax.random.normal(each, (40, 192)).astype(x.dtype)) for each in keys[1:]]
    product = lambda x: sum(jnp.sin(y.astype(jnp.float32)) for y in quant.matmul_each(x, weights, act=act))
    np.testing.assert_array_equal(product(in_order(x)), product(x))
    loss = lambda x: jnp.sum(product(x))
    ours = jax.grad(loss)(in_order(x))
    assert isinstance(ours, Ordered)
    np.testing.assert_array_equal(ours.plain(), jax.grad(loss)(x))


def test_only_whole_steps_of_nf4_on_one_gpu_are_read_so(monkeypatch):
    struct = lambda tokens, columns=512, dtype=jnp.bfloat16: jax.ShapeDtypeStruct((tokens, columns), dtype)
    weight = lambda columns, scheme="nf4": quant.quantize(jnp.ones((64, columns), jnp.bfloat16), scheme=scheme)
    assert not quant.ordered_dtype(struct(16), [weight(512)])  # no GPU
    monkeypatch.setattr(api, "compute_capability", lambda: "9.0")
    monkeypatch.setattr(api, "is_on_gpu", lambda: True)
    monkeypatch.setitem(sys.modules, "jax_triton", ModuleType("jax_triton"))
    assert quant.ordered_dtype(struct(16), [weight(512)]) and quant.ordered_dtype(struct(64), [weight(512)] * 3)
    assert not any(quant.ordered_dtype(struct(tokens), [weight(512)]) for tokens in (8, 65))
    assert not quant.ordered_dtype(struct(16, 320), [weight(320)])
    assert not quant.ordered_dtype(struct(16, dtype=jnp.float32), [weight(512)])
    assert not quant.ordered_dtype(struct(16), [weight(512), weight(512, "int8")])
    assert not quant.ordered_dtype(struct(16), [weight(512), jnp.ones((64, 512))])
    monkeypatch.setattr(api, "compute_capability", lambda: "8.0")
    assert not quant.ordered_dtype(struct(16), [weight(512)])


# ---- where it is asked for -------------------------------------------------------------------------------------------


@pytest.fixture
def asked(monkeypatch):
    """Kernels that make x in that order wherever they are asked to, two take it so. The set of (who, K, dtype)."""
    of = set()

    def made(who, x, ordered):
        if ordered is None:
            return x
        of.add((who, x.shape[-1], jnp.dtype(ordered).name))
        return in_order(x, is_float8=ordered == FLOAT8)

    def norm(x, y, weight, index, *, ordered=None, **options):
        total, out = residual_norm.residual_norm_reference(x, y, weight, index, **options)
        return total, made("norm", out, ordered)

    def matmul_nf4(x, weights, *, shapes, norm=None, act=None, residual=None, parts=False, ordered=None, ahead=()):
        if norm is not None or residual is not None:
            raise NotImplementedError("the kernel neither norms nor adds")
        [y, *more] = reference.matmul_nf4(x, weights, shapes=shapes, act=act)
        return [made("gate", y, ordered), *more]

    def matmul_float8(x, *args, **options):
        if not (isinstance(x, Ordered) and x.is_float8):
            raise NotImplementedError("16 bits are the other's")
        return matmul_nf4(x, *args, **options)

    def attention(*args, ordered=None, **options):
        out, *stacks = decode_attention.decode_attention_reference(*args, **options)
        return made("attention", out if ordered is None else out.reshape(out.shape[0], -1), ordered), *stacks

    monkeypatch.setitem(api._OPS["decode_attention"], "triton", attention)
    monkeypatch.setitem(api._OPS["residual_norm"], "triton", norm)
    monkeypatch.setitem(api._OPS["matmul_nf4"], "triton_wgmma", matmul_nf4)
    monkeypatch.setitem(api._OPS["matmul_nf4"], "triton_float8", matmul_float8)
    monkeypatch.setattr(api, "ordered_dtype", lambda x, weights, *, shapes, float8: FLOAT8 if float8 else x.dtype)
    return of


@pytest.mark.parametrize(
    "name, targets, names",
    [
        ("llama", [], {"norm", "attention", "gate"}),
        ("llama", ["q_proj", "down_proj"], {"norm", "attention"}),  # the norm before the MLP
        ("llama", ["v_proj", "up_proj"], {"attention"}),
        ("llama", ["o_proj"], {"norm", "gate"}),
        ("qwen2", [], {"norm", "attention", "gate"}),
        ("qwen3", [], {"norm", "attention", "gate"}),
        ("phi3", [], {"norm", "attention"}),  # the gate and the other are one product
        ("starcoder2-plain", [], {"attention"}),  # the norms are no kernel's, and there is no gate
        ("glm4-plain", [], set()),  # what o and down make is normed before it is added
    ],
)
def test_a_decode_step_makes_it_and_draws_the_same(name, targets, names, tmp_path, asked, monkeypatch):
    make_checkpoint(name, tmp_path)
    model = load_folder(tmp_path, jnp.bfloat16, quant_config=QuantConfig())
    if targets:
        lora.add_adapters(model, LoraConfig(r=4, target_modules=targets), jax.random.key(1))
    ids = np.maximum(random_ids(ROWS, 6), 3)
    logits, cache = _prefill(model, ids, np.ones_like(ids), places=64)
    arguments = jnp.argmax(logits, axis=-1)[:, None], jnp.full((ROWS, 1), 6)
    run = lambda: model.hidden_states(*arguments, cache=cache)
    asked.clear()
    (got, _), of = run(), set(asked)
    monkeypatch.setattr(api, "ordered_dtype", lambda *args, **kwargs: None)
    np.testing.assert_array_equal(got, run()[0])
    assert {who for who, *_ in of} == names and {dtype for *_, dtype in of} <= {"bfloat16"}


def test_a_decode_step_in_float8_asks_norms_and_gates_for_it(tmp_path, asked, monkeypatch):
    make_checkpoint("llama", tmp_path)
    model = load_folder(tmp_path, jnp.bfloat16, quant_config=QuantConfig())
    ids = np.maximum(random_ids(ROWS, 6), 3)
    logits, cache = _prefill(model, ids, np.ones_like(ids), places=64)
    arguments = jnp.argmax(logits, axis=-1)[:, None], jnp.full((ROWS, 1), 6)
    wanted, _ = model.hidden_states(*arguments, cache=cache)
    asked.clear()
    lora.multiply_in(model, "fp8")
    got, _ = model.hidden_states(*arguments, cache=cache)
    assert {(who, dtype) for who, _, dtype in asked} == {
        ("norm", "float8_e4m3fn"), ("gate", "float8_e4m3fn"), ("attention", "bfloat16"),
    }  # fmt: skip
    assert 1e-3 < relative_error(got, wanted) < 0.1


# ---- on a GPU --------------------------------------------------------------------------------------------------------


def skip_elsewhere():
    if api.compute_capability() != "9.0":
        pytest.skip("wgmma is of compute capability 9.0")


@pytest.mark.gpu
@pytest.mark.parametrize("count", [0, 5])
@pytest.mark.parametrize("tokens, features", [(64, 4096), (9, 256), (17, 768), (33, 5120), (64, 16384)])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_a_norm_makes_it(key, dtype, tokens, features, count):
    keys = jax.random.split(key, 3)
    x, y = (jax.random.normal(each, (tokens, features)).astype(dtype) for each in keys[:2])
    if count:
        y = Parts(jax.random.normal(keys[1], (count, tokens, features)), jnp.dtype(dtype))
    weight = jax.random.normal(keys[2], (2, features)).astype(dtype)
    run = lambda ordered: functools.partial(api.residual_norm, eps=1e-5, ordered=ordered)
    assert api.implementations_in(run(dtype), x, y, weight, jnp.int32(1)) == {"residual_norm.triton"}
    total, out = jax.jit(run(dtype))(x, y, weight, jnp.int32(1))
    wanted = jax.jit(run(None))(x, y, weight, jnp.int32(1))
    assert isinstance(out, Ordered) and out.shape == x.shape
    np.testing.assert_array_equal(total, wanted[0])
    np.testing.assert_array_equal(out.plain(), wanted[1])


@pytest.mark.gpu
def test_a_norm_of_no_whole_steps_stays_plain(key):
    x = jax.random.normal(key, (16, 320)).astype(jnp.bfloat16)
    run = lambda ordered: jax.jit(functools.partial(api.residual_norm, eps=1e-5, ordered=ordered))(x, x, x[0])
    for ours, theirs in zip(run(jnp.bfloat16), run(None), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.gpu
def test_the_gradient_of_such_a_norm_is_that_of_a_plain_one(key):
    x = jax.random.normal(key, (16, 512)).astype(jnp.bfloat16)
    squares = jnp.arange(x.size, dtype=jnp.float32).reshape(x.shape)

    def loss(x, ordered):
        _, out = api.residual_norm(x, x, x[0], eps=1e-5, implementation="triton", ordered=ordered)
        assert isinstance(out, Ordered) == (ordered is not None)
        return jnp.sum(squares * plain(out).astype(jnp.float32) ** 2)

    ours, theirs = (jax.jit(jax.grad(loss), static_argnums=1)(x, ordered) for ordered in (jnp.bfloat16, None))
    np.testing.assert_array_equal(ours, theirs)


@pytest.mark.gpu
@pytest.mark.parametrize("act", ["silu", "gelu_pytorch_tanh"])
@pytest.mark.parametrize("rows, columns, tokens", [(1024, 4096, 64), (256, 192, 9), (768, 576, 41), (14336, 4096, 17)])
def test_a_gate_makes_it(key, rows, columns, tokens, act):
    skip_elsewhere()
    keys = jax.random.split(key, 3)
    x = jax.random.normal(keys[0], (tokens, columns)).astype(jnp.bfloat16)
    weights = [quant.quantize(jax.random.normal(each, (rows, columns)).astype(x.dtype)) for each in keys[1:]]
    run = lambda ordered: jax.jit(lambda x, weights: quant.matmul_each(x, weights, act=act, ordered=ordered)[0])
    assert api.implementations_in(run(jnp.bfloat16), x, weights) == {"matmul_nf4.triton_wgmma"}
    y, wanted = run(jnp.bfloat16)(x, weights), run(None)(x, weights)
    assert isinstance(y, Ordered) and y.shape == wanted.shape
    np.testing.assert_array_equal(y.plain(), wanted)


@pytest.mark.gpu
def test_a_gate_of_no_whole_steps_stays_plain(key):
    skip_elsewhere()
    x = jax.random.normal(key, (16, 256)).astype(jnp.bfloat16)
    q = quant.quantize(jax.random.normal(key, (320, 256)).astype(x.dtype))
    run = lambda ordered: quant.matmul_each(x, [q, q], act="silu", ordered=ordered)[0]
    np.testing.assert_array_equal(run(jnp.bfloat16), run(None))


@pytest.mark.gpu
@pytest.mark.parametrize(
    "batch, heads, kv, dim, places, is_made",
    [
        (64, 32, 8, 128, 256, True),
        (9, 10, 5, 128, 100, True),
        (17, 4, 2, 256, 128, True),
        (9, 9, 3, 128, 64, False),  # no whole steps
        (9, 8, 4, 64, 64, True),
        (12, 4, 2, 192, 64, True),
        (9, 8, 4, 96, 64, False),  # no whole blocks of NF4
        (9, 2, 2, 128, 4096, False),  # places are divided
    ],
)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_attention_makes_it(key, dtype, batch, heads, kv, dim, places, is_made):
    keys = jax.random.split(key, 5)
    shapes = [(batch, heads, dim), (batch, kv, dim), (batch, kv, dim), *[(2, batch, places, kv, dim)] * 2]
    arrays = [jax.random.normal(each, shape).astype(dtype) for each, shape in zip(keys, shapes, strict=True)]
    options = dict(scale=dim**-0.5, offset=jnp.int32(places - 20), segments=jnp.ones((batch, places), jnp.int32))
    run = lambda ordered: functools.partial(api.decode_attention, ordered=ordered, **options)
    assert api.implementations_in(run(dtype), *arrays, jnp.int32(1)) == {"decode_attention.triton"}
    out, *stacks = jax.jit(run(dtype))(*arrays, jnp.int32(1))
    wanted, *others = jax.jit(run(None))(*arrays, jnp.int32(1))
    assert isinstance(out, Ordered) == is_made
    np.testing.assert_array_equal(plain(out).reshape(wanted.shape), wanted)
    for ours, theirs in zip(stacks, others, strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.gpu
@pytest.mark.parametrize("shape, tokens", [((896, 4096), 64), ((100, 256), 9), ((70, 768), 41)])
def test_the_product_reads_it(key, shape, tokens):
    skip_elsewhere()
    x = jax.random.normal(key, (tokens, shape[1])).astype(jnp.bfloat16)
    q = quant.quantize(jax.random.normal(jax.random.fold_in(key, 1), shape).astype(x.dtype))
    run = jax.jit(lambda x, q: quant.matmul_each(x, [q])[0])
    # Tokens that there are not may be anything.
    whole = in_order(x)
    is_there = in_order(jnp.ones_like(x)).data != 0
    spoilt = Ordered(jnp.where(is_there, whole.data, jnp.nan), x.shape, x.dtype)
    assert api.implementations_in(run, spoilt, q) == {"matmul_nf4.triton_wgmma"}
    np.testing.assert_array_equal(run(spoilt, q), run(x, q))
