"""Parts of a product: added up as they are read they are what the product would have been, and a decode step asks for
them where nothing but a sum reads them."""

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import load_folder, make_checkpoint, random_ids

from jaxlora import lora, quant
from jaxlora.config import LoraConfig, QuantConfig
from jaxlora.generate import _prefill
from jaxlora.kernels import api, reference
from jaxlora.kernels.parts import Parts, cotangent, summed

ROWS = 9  # the least that have a kernel which divides k


def parts_of(key, count, *shape, dtype=jnp.bfloat16):
    return Parts(jax.random.normal(key, (count, *shape)), jnp.dtype(dtype))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_the_sum_is_rounded_once_and_taken_in_order(key, dtype):
    parts = parts_of(key, 5, 3, 7, dtype=dtype)
    wanted = functools.reduce(np.add, np.asarray(parts.parts)).astype(dtype)
    np.testing.assert_array_equal(parts.sum(), wanted)
    assert parts.shape == (3, 7) and parts.sum().dtype == parts.dtype == dtype
    np.testing.assert_array_equal(parts.reshape(7, -1).sum(), wanted.reshape(7, 3))
    same = jax.jit(lambda parts: parts)(parts)
    assert same.dtype == dtype and summed(same).shape == (3, 7) and summed(wanted) is wanted


def test_the_cotangent_of_a_sum_is_that_of_each_part(key):
    parts = parts_of(key, 4, 3)
    dy = jax.grad(lambda parts: jnp.sum(jnp.sin(parts.sum().astype(jnp.float32))))(parts)
    np.testing.assert_array_equal(cotangent(dy), jnp.cos(parts.sum().astype(jnp.float32)).astype(jnp.bfloat16))


@pytest.mark.parametrize("options", [{}, {"multiplier": 0.22, "offset": 1.0}], ids=str)
def test_a_norm_adds_up_what_it_reads(key, options):
    y = parts_of(key, 5, 3, 24)
    x, weight = (jax.random.normal(key, shape).astype(y.dtype) for shape in ((3, 24), (24,)))
    run = functools.partial(api.residual_norm, eps=1e-5, **options)
    for ours, theirs in zip(run(x, y, weight), run(x, y.sum(), weight), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("which", [(0, 1, 2), (0,), (1, 2)])
def test_attention_adds_up_what_it_reads(key, which):
    keys = jax.random.split(key, 5)
    q, k, v = (parts_of(one, 2, 3, heads, 16) for one, heads in zip(keys, (6, 2, 2), strict=False))
    cache = [jax.random.normal(one, (2, 3, 12, 2, 16)).astype(q.dtype) for one in keys[3:]]
    angles = jnp.arange(3.0)[:, None] + jnp.arange(8.0)
    options = dict(rotary=(jnp.cos(angles), jnp.sin(angles)), scale=0.3, offset=jnp.int32(9))
    options["segments"] = jnp.ones((3, 12), jnp.int32)
    mixed = [each if i in which else each.sum() for i, each in enumerate((q, k, v))]
    got = api.decode_attention(*mixed, *cache, jnp.int32(1), **options)
    wanted = api.decode_attention(q.sum(), k.sum(), v.sum(), *cache, jnp.int32(1), **options)
    for ours, theirs in zip(got, wanted, strict=True):
        np.testing.assert_array_equal(ours, theirs)


# ---- where they are asked for ----------------------------------------------------------------------------------------


def divided(x, dense, parts):
    """What a kernel leaves that divides k among three programs."""
    each = []
    for w in dense:
        cuts = zip(*(jnp.array_split(array.astype(jnp.float32), 3, axis=1) for array in (x, w)), strict=True)
        each.append(jnp.stack([part @ of_w.T for part, of_w in cuts]))
    return each if parts else [Parts(y, x.dtype).sum() for y in each]


@pytest.fixture
def asked(monkeypatch):
    """The kernels that divide k, in numpy's words. `asked.of` gets the shapes of the products that were asked for in
    parts; with `asked.allowed` False they are added up at once, as if nobody had asked."""
    record = SimpleNamespace(of=set(), allowed=True)

    def noted(shapes, parts):
        if parts:
            record.of.add(tuple(map(tuple, shapes)))
        return parts and record.allowed

    def matmul_nf4(x, weights, *, shapes, norm=None, act=None, residual=None, parts=False, ordered=None, ahead=()):
        if norm is not None or act is not None or residual is not None:
            raise NotImplementedError("the kernel multiplies and nothing else")
        each = zip(weights, shapes, strict=True)
        dense = [reference.merge_nf4(*w, None, None, shape=shape, dtype=x.dtype) for w, shape in each]
        return divided(x, dense, noted(shapes, parts))

    def matmul_dense(x, weights, *, parts=False):
        dense = [w if i is None else w[i] for w, i in weights]
        return divided(x, dense, noted([w.shape for w in dense], parts))

    monkeypatch.setitem(api._OPS["matmul_nf4"], "triton_tiles", matmul_nf4)
    monkeypatch.setitem(api._OPS["matmul_dense"], "triton", matmul_dense)
    return record


def products(model):
    """The shapes of each product of a layer that may stay in parts, by name."""
    layer = model.model.layers[0].period[0]
    shape = lambda linear: (linear.out_features, linear.in_features)
    attention = layer.self_attn
    of = {"o": (shape(attention.o_proj),), "down": (shape(layer.mlp.down_proj),)}
    if attention.fused_qkv is None:
        of["qkv"] = tuple(shape(linear) for linear in (attention.q_proj, attention.k_proj, attention.v_proj))
    return of


@pytest.mark.parametrize("quant_config", [QuantConfig(), None], ids=["nf4", "dense"])
@pytest.mark.parametrize(
    "name, targets, names",
    [
        ("llama", [], {"qkv", "o", "down"}),
        ("llama", ["q_proj", "down_proj"], {"o"}),
        ("qwen2", [], {"o", "down"}),  # q, k and v have biases
        ("qwen3", [], {"o", "down"}),  # q and k are normed
        ("phi3", [], {"o", "down"}),  # q, k and v are one product
        ("starcoder2-plain", [], {"qkv", "o", "down"}),  # the norms are no kernel's
        ("glm4-plain", [], {"qkv"}),  # what o and down make is normed before it is added
    ],
)
def test_a_decode_step_reads_parts_and_draws_the_same(name, targets, names, quant_config, tmp_path, asked):
    make_checkpoint(name, tmp_path)
    model = load_folder(tmp_path, jnp.bfloat16, quant_config=quant_config)
    if targets:
        lora.add_adapters(model, LoraConfig(r=4, target_modules=targets), jax.random.key(1))
    ids = np.maximum(random_ids(ROWS, 6), 3)
    logits, cache = _prefill(model, ids, np.ones_like(ids), places=64)
    arguments = jnp.argmax(logits, axis=-1)[:, None], jnp.full((ROWS, 1), 6)

    def run():
        hidden, after = model.hidden_states(*arguments, cache=cache)
        return hidden, after.keys, after.values

    asked.of.clear()
    got, of = run(), set(asked.of)
    asked.allowed = False
    for ours, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(run()), strict=True):
        ours, theirs = np.asarray(ours, np.float32), np.asarray(theirs, np.float32)
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=0.01 * np.abs(theirs).max())
    assert of == {products(model)[each] for each in names}


@pytest.mark.parametrize(
    "name, gates",
    [
        ("llama", True),
        ("phi3", False),  # the gate and the other are one product
        ("starcoder2-plain", False),  # there is no gate
    ],
)
def test_the_gate_is_made_by_the_products_where_a_kernel_does(name, gates, tmp_path, monkeypatch):
    make_checkpoint(name, tmp_path)
    model = load_folder(tmp_path, jnp.bfloat16, quant_config=QuantConfig())
    ids = np.maximum(random_ids(ROWS, 6), 3)
    logits, cache = _prefill(model, ids, np.ones_like(ids), places=64)
    arguments = jnp.argmax(logits, axis=-1)[:, None], jnp.full((ROWS, 1), 6)
    wanted, _ = model.hidden_states(*arguments, cache=cache)
    of = set()

    def matmul_nf4(x, weights, *, shapes, norm=None, act=None, residual=None, parts=False, ordered=None, ahead=()):
        if norm is not None or residual is not None:
            raise NotImplementedError("the kernel neither norms nor adds")
        of.add((act, tuple(map(tuple, shapes))))
        return reference.matmul_nf4(x, weights, shapes=shapes, act=act)

    monkeypatch.setitem(api._OPS["matmul_nf4"], "triton_wgmma", matmul_nf4)
    got, _ = model.hidden_states(*arguments, cache=cache)
    mlp = model.model.layers[0].period[0].mlp
    gated = ("silu", ((mlp.down_proj.in_features, mlp.down_proj.out_features),) * 2)
    assert {product for product in of if product[0]} == ({gated} if gates else set()) and len(of) > 1
    got, wanted = np.asarray(got, np.float32), np.asarray(wanted, np.float32)
    np.testing.assert_allclose(got, wanted, rtol=0, atol=0.02 * np.abs(wanted).max())


@pytest.mark.parametrize("quant_config", [QuantConfig(), None], ids=["nf4", "dense"])
def test_gradients_of_parts_are_those_of_the_product(key, quant_config, asked):
    of_w, of_x = jax.random.split(key)
    w, x = (jax.random.normal(k, (n, 64)).astype(jnp.bfloat16) for k, n in ((of_w, 40), (of_x, ROWS)))
    weight = quant.StackedArray(w[None]).at(jnp.int32(0)) if quant_config is None else quant.quantize(w)

    def loss(x, parts):
        [y] = quant.matmul_each(x, [weight], parts=parts)
        assert isinstance(y, Parts) == parts
        return jnp.sum(jnp.sin(summed(y).astype(jnp.float32)))

    ours, theirs = (jax.grad(loss)(x, parts).astype(jnp.float32) for parts in (True, False))
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=0.02 * float(jnp.abs(theirs).max()))
