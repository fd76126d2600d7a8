"""Kernels of inline PTX, run by an interpreter on the CPU (`ptx`) where jax-triton can compile them."""

import collections
import functools

import jax
import jax.numpy as jnp
import numpy as np
import ptx
import pytest
from flax import nnx
from test_float8_few import error_of, exact, powers, rounded, weight_of
from test_nf4_matmul import LIMITS, fields_of, operands, relative_error

from jaxlora import quant
from jaxlora.config import ModelConfig, QuantConfig, RopeConfig
from jaxlora.kernels import api, graph_call, nf4_matmul_float8, nf4_matmul_wgmma
from jaxlora.kernels.ahead import of_product
from jaxlora.kernels.nf4_matmul_wgmma import Config
from jaxlora.kernels.ordered import FLOAT8, Ordered, in_order
from jaxlora.kernels.parts import Parts, summed
from jaxlora.kernels.residual_norm import residual_norm
from jaxlora.layers import Linear
from jaxlora.lora import multiply_in, named_nodes
from jaxlora.model import CausalLM


@pytest.fixture(autouse=True)
def needs_triton():
    for name in ("triton", "jaxlib.gpu_triton"):
        pytest.importorskip(name)
    if jax.default_backend() != "cpu":
        pytest.skip("a GPU runs them by itself")


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    "shape, tokens, layout",
    [((100, 256), 9, {}), ((128, 1792), 16, dict(num_warps=4)), ((120, 2048), 41, dict(num_warps=8, split=3))],
)
def test_the_product_in_float8(key, shape, tokens, layout, seed):
    x, q = operands(key, tokens, shape, jnp.bfloat16, True, seed != 1)
    x = in_order(x, is_float8=True)
    if seed == 2:
        x = Ordered(x.data, x.shape, x.dtype, None, powers(key, (shape[1] // 64,), 9))
    with ptx.emulated(seed):
        [y] = nf4_matmul_float8.matmul_nf4(
            x, [fields_of(q)], shapes=[shape], config=Config(**layout) if layout else None
        )
        y = np.asarray(y)
    assert error_of(y, exact(x), q) < 3e-3


def test_several_weights(key):
    shapes = [(rows, 512) for rows in (100, 36, 9)]
    weights = [operands(jax.random.fold_in(key, rows), 9, (rows, columns), jnp.bfloat16)[1] for rows, columns in shapes]
    x = in_order(operands(key, 9, shapes[0], jnp.bfloat16)[0], is_float8=True)
    with ptx.emulated():
        ys = nf4_matmul_float8.matmul_nf4(x, [fields_of(q) for q in weights], shapes=shapes, config=Config(split=2))
        ys = [np.asarray(y) for y in ys]
    assert all(error_of(y, exact(x), q) < 3e-3 for y, q in zip(ys, weights, strict=True))


@pytest.mark.parametrize("num_warps", [4, 16])
def test_from_a_norm_to_a_gate(key, num_warps):
    keys = jax.random.split(key, 4)
    x, y = (jax.random.normal(each, (13, 512)).astype(jnp.bfloat16) for each in keys[:2])
    y = y if num_warps == 4 else Parts(jax.random.normal(keys[1], (3, 13, 512), jnp.bfloat16), y.dtype)
    gain = jnp.ones((512,), jnp.bfloat16)
    weights = [quant.quantize(0.03 * jax.random.normal(each, (256, 512)).astype(x.dtype)) for each in keys[2:]]
    config = Config(num_warps=num_warps)
    with ptx.emulated():
        total, plain = residual_norm(x, y, gain, None, eps=1e-5)
        plain = np.asarray(plain, np.float32)
        np.testing.assert_array_equal(total, x + summed(y))
        _, normed = residual_norm(x, y, gain, None, eps=1e-5, ordered=FLOAT8)
        np.testing.assert_array_equal(exact(normed), rounded(plain))
        [gated] = nf4_matmul_float8.matmul_nf4(
            normed, [fields_of(q) for q in weights], shapes=[(256, 512)] * 2, act="silu", ordered=FLOAT8, config=config
        )
        got = np.asarray(exact(gated))
    gate, up = (np.asarray(exact(normed), np.float64) @ weight_of(w).T for w in weights)
    wanted = np.asarray(jax.nn.silu(gate)) * up
    assert 0.01 < np.linalg.norm(got - wanted) / np.linalg.norm(wanted) < 0.03


@pytest.mark.parametrize("split", [1, 2, 4])
def test_lines_that_are_fetched(key, split):
    """Each once: those of scales, and where a part of a row's codes begins."""
    x, q = operands(key, 9, (128, 1024), jnp.bfloat16, True, True)
    _, other = operands(key, 9, (192, 1024), jnp.bfloat16, True, True)
    read, found = in_order(x, is_float8=True), []

    def check(launched):
        found.append(collections.Counter(launched.fetched))

    with ptx.emulated(check=check):
        [y] = nf4_matmul_float8.matmul_nf4(
            read, [fields_of(q)], shapes=[q.shape], ahead=of_product([fields_of(other)], split)
        )
        assert error_of(np.asarray(y), exact(read), q) < 3e-3
    scales, codes = np.arange(2 * 192 * 16, 3 * 192 * 16, 128), 2 * 192 * 512
    starts = [codes + 512 * row + 128 * (i * 4 // split) for row in range(192) for i in range(split)]
    [lines] = found
    assert set(lines.values()) == {1}
    assert sorted(at for _, at in lines) == sorted([*map(int, scales), *starts])
    assert len({name for name, _ in lines}) == 2


def test_the_product_in_16_bits(key):
    for dtype in (jnp.bfloat16, jnp.float16):
        x, q = operands(key, 41, (100, 576), dtype, is_stacked=True)
        with ptx.emulated():
            [y] = nf4_matmul_wgmma.matmul_nf4(x, [fields_of(q)], shapes=[q.shape])
            y = np.asarray(y)
        assert relative_error(y, x, q) < LIMITS[dtype]


def test_what_a_program_must_not_do():
    """A read of what a bulk copy has not brought yet, of what another lane's copy has, and outside of an array."""
    head = """.version 8.7
.visible .entry wrong(.param .u64 of)
{ .reg .b64 %rd<3>; .reg .b32 %r<9>; .reg .pred %p<2>; .shared .align 128 .b8 at[1024];
ld.param.b64 %rd1, [of]; mov.u32 %r1, %tid.x; shl.b32 %r2, %r1, 2; mov.u32 %r3, at; add.s32 %r4, %r3, %r2; """
    run = lambda body: ptx.launch(ptx.Program(head + body + " ret; }"), [np.zeros(64, np.uint32)], [], (1,), 1, 0, 0)
    run("ld.global.b32 %r5, [%rd1];")
    with pytest.raises(ptx.Wrong, match="which has 256"):
        run("ld.global.b32 %r5, [%rd1+256];")
    copied = "cp.async.ca.shared.global [%r4], [%rd1], 4; cp.async.commit_group; cp.async.wait_group 0;"
    run(copied + "ld.shared.b32 %r5, [%r4];")
    run(copied + "bar.warp.sync 0xffffffff; ld.shared.b32 %r5, [%r3];")
    with pytest.raises(ptx.Wrong, match="not there yet"):
        run(copied + "ld.shared.b32 %r5, [%r3];")
    with pytest.raises(ptx.Wrong, match="not there yet"):
        run(copied.replace("wait_group 0", "wait_group 1") + "ld.shared.b32 %r5, [%r4];")
    bulk = """setp.ne.b32 %p1, %r1, 0; @%p1 bra END; mbarrier.init.shared::cta.b64 [%r3+512], 1;
mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r3+512], 128;
cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r3], [%rd1], 128, [%r3+512];
END: bar.warp.sync 0xffffffff; """
    wait = "W: mbarrier.try_wait.parity.shared::cta.b64 %p1, [%r3+512], 0; @!%p1 bra W;"
    run(bulk + wait + "ld.shared.b32 %r5, [%r4];")
    with pytest.raises(ptx.Wrong, match="not there yet"):
        run(bulk + "ld.shared.b32 %r5, [%r4];" + wait)


@pytest.mark.parametrize("matmul_dtype, least, most", [(None, 0.0, 1e-2), ("fp8", 1e-2, 4e-2)])
def test_a_step_of_generation(monkeypatch, key, matmul_dtype, least, most):
    """Of a model with two layers, whose products and norms are the kernels: what their references make of it."""
    config = ModelConfig(
        model_type="llama", vocab_size=64, hidden_size=256, intermediate_size=512, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=64, max_position_embeddings=64, rope=RopeConfig(),
        layer_types=("full_attention",) * 2,
    )  # fmt: skip
    model = CausalLM(config, dtype=jnp.bfloat16, quant_config=QuantConfig(), rngs=nnx.Rngs(0))
    ids = jax.random.randint(key, (10, 5), 0, 64)
    places = jnp.broadcast_to(jnp.arange(5), ids.shape)
    _, cache = model.hidden_states(ids, places, cache=model.init_cache(10, 64))
    token = ids[:, :1]
    step = jax.jit(lambda model, token, cache: model.hidden_states(token, jnp.full_like(token, 5), cache=cache)[0])
    wanted = np.asarray(step(model, token, cache), np.float32)
    if matmul_dtype:
        multiply_in(model, matmul_dtype)
    names = []
    attend = {"reference": api._OPS["decode_attention"]["reference"]}  # whose kernel is no inline PTX
    monkeypatch.setitem(api._OPS, "decode_attention", attend)
    monkeypatch.setattr(api, "is_on_gpu", lambda: True)
    monkeypatch.setattr(api, "compute_capability", lambda: "9.0")
    step = jax.jit(lambda model, token, cache: model.hidden_states(token, jnp.full_like(token, 5), cache=cache)[0])
    with ptx.emulated(check=lambda launched: names.append(launched.name)):
        got = np.asarray(step(model, token, cache), np.float32)
    products = 4 if matmul_dtype is None else 1
    of_float8 = ["matmul_nf4_float8"] * (2 * (4 - products))
    assert sorted(names) == sorted([*of_float8, *["matmul_nf4_wgmma"] * (2 * products), *["residual_norm"] * 5])
    error = np.linalg.norm(got - wanted) / np.linalg.norm(wanted)
    assert least < error < most


@pytest.mark.parametrize("matmul_dtype, product", [(None, "matmul_nf4_wgmma"), ("fp8", "matmul_nf4_float8")])
def test_which_kernels_a_step_of_generation_is(monkeypatch, matmul_dtype, product):
    """Traced as for an H100, of an 8B with two layers; nothing runs."""
    launched = []

    def described(inputs, outs, kernel, aliases, options):
        launched.append((kernel.fn.__name__, dict(options)))
        return b""

    monkeypatch.setattr(api, "is_on_gpu", lambda: True)
    monkeypatch.setattr(api, "compute_capability", lambda: "9.0")
    monkeypatch.setattr(graph_call, "_described", described)
    config = ModelConfig(
        model_type="llama", vocab_size=512, hidden_size=4096, intermediate_size=14336, num_hidden_layers=2,
        num_attention_heads=32, num_key_value_heads=8, head_dim=128, max_position_embeddings=1024, rope=RopeConfig(),
        layer_types=("full_attention",) * 2,
    )  # fmt: skip
    make = lambda: CausalLM(config, dtype=jnp.bfloat16, quant_config=QuantConfig(), rngs=nnx.Rngs(0))
    model = nnx.eval_shape(make)
    for linear in named_nodes(model, Linear):
        if linear.node.stack is not None:
            linear.node.matmul_dtype = matmul_dtype
    token = jax.ShapeDtypeStruct((64, 1), jnp.int32)
    cache = jax.eval_shape(lambda: model.init_cache(64, 256))
    step = lambda model, token, cache: model.hidden_states(token, token, cache=cache)
    with ptx.compiler():
        hidden, _ = jax.eval_shape(step, model, token, cache)
    assert hidden.shape == (64, 1, 4096)
    # What the next product in float8 begins with is fetched: scales, and a step of each part of a row.
    fetched = [[options[f"AHEAD{i}"] for i in range(6)] for name, options in launched[-8:] if "matmul" in name]

    def of(rows, columns, split):
        lines = rows * columns // 64 // 128
        return [(1, lines, lines), (rows, columns // 256, split)]

    none = [(0, 0, 0)]
    up, down, following = of(14336, 4096, 1), of(4096, 14336, 8), of(4096, 4096, 4) + 2 * of(1024, 4096, 4)
    wanted = [none * 6, up * 2 + none * 2, down + none * 4, following]
    assert fetched == (wanted if matmul_dtype else [none * 6] * 4)
    names = [name for name, options in launched]
    layer = ["residual_norm", product, "decode_attention", "matmul_nf4_wgmma", "residual_norm", product, product]
    assert names[-len(layer) - 1 :] == [*layer, "residual_norm"]
    assert [options["SPLIT"] for name, options in launched[-len(layer) :] if "matmul" in name] == [4, 8, 1, 8]


@pytest.mark.parametrize("shape", [(8, 128, 64, 128, 128, 2), (2, 3, 16, 16, 16, 1)])
def test_states_of_the_delta_rule_are_compiled(monkeypatch, shape):
    """For an H100, of Qwen3.5-9B's shape too, both ways in a kernel each; nothing runs."""
    with ptx.compiler():
        import jax_triton

    found, triton_call = [], jax_triton.triton_call

    def described(*arrays, kernel, out_shape, **options):
        of = tuple(tuple((each.shape, each.dtype) for each in some) for some in (arrays, out_shape))
        with monkeypatch.context() as patch:
            patch.setattr(jax_triton, "triton_call", triton_call)
            text, shared = ptx.text_of(kernel, *of, tuple(sorted(options.items())))
        assert "mma" in text
        found.append((kernel.fn.__name__, shared))
        return [jnp.zeros(out.shape, out.dtype) for out in out_shape]

    monkeypatch.setattr(api, "is_on_gpu", lambda: True)
    monkeypatch.setattr(jax_triton, "triton_call", described)
    chunks, heads, c, n, p, shared = shape
    low = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    wide = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    lookups, query, key = low(chunks, heads, c, n), low(chunks, heads // shared, c, n), low(chunks, heads, c, n)
    values, left, state = wide(chunks, heads, c, p), wide(chunks, heads), wide(heads, n, p)
    with ptx.compiler():
        jax.eval_shape(
            functools.partial(api.delta_states, implementation="triton"), lookups, query, key, values, left, state
        )
        jax.eval_shape(
            functools.partial(api.delta_states_backward, implementation="triton"),
            lookups,
            query,
            key,
            left,
            values,
            values,
            state,
        )
    names, shared_bytes = zip(*found, strict=True)
    assert names == ("delta_states", "delta_states_backward")
    assert max(shared_bytes) < 227 * 1024 / 2  # two programs an SM, of which one reads while the other multiplies
