"""Sinks on cuDNN, whose two kernels are played by jnp here: what is made of their results, and what is kept of them."""

import functools

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import relative_error
from jax._src.cudnn import fused_attention_stablehlo as cudnn
from jax.sharding import NamedSharding, PartitionSpec

from jaxlora import lora, remat, sharding
from jaxlora.config import LoraConfig, ModelConfig, RopeConfig
from jaxlora.kernels import api, attention
from jaxlora.kernels.attention import MAX_SEGMENTS, attention_cudnn, attention_reference
from jaxlora.loss import causal_lm_loss
from jaxlora.model import CausalLM

SCALE = 0.3
SINKS = jnp.array([8.0, -30.0, 0.0, 1.5, -2.0, 3.0])
LENGTH = 24
# Three documents and padding at both ends and between, one that fills its row, and none.
PACKED = jnp.array([[0] * 2 + [1] * 7 + [2] * 5 + [0] * 3 + [3] * 4 + [0] * 3, [1] * LENGTH, [0] * LENGTH], jnp.int32)


def wide(x):
    return x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x


def rows_of(q, q_seqlen, q_offsets):
    """[R, T] for a row of cuDNN each: the places of its tokens among all of the batch, and whether there is a token."""
    batch, length, heads, dim = q.shape
    token = jnp.arange(length)
    if q_offsets.size == 0:
        return jnp.arange(batch)[:, None] * length + token, jnp.ones((batch, length), bool)
    lengths, _, offsets, _ = cudnn._fix_seqlen_offsets(q_seqlen, q_seqlen, q_offsets, q_offsets, q, q)
    starts = offsets.ravel()[: lengths.size] // (heads * dim)
    return starts[:, None] + token, token < lengths.ravel()[:, None]


def scores_of(q, k, q_seqlen, q_offsets, scale, window):
    index, real = rows_of(q, q_seqlen, q_offsets)
    take = lambda x: jnp.take(x.reshape(-1, *x.shape[2:]), index, axis=0, mode="clip")
    each = lambda x: jnp.repeat(take(x), q.shape[2] // x.shape[2], axis=2)
    distance = jnp.arange(q.shape[1])[:, None] - jnp.arange(q.shape[1])
    mask = (distance >= 0) & (distance < (window or q.shape[1])) & real[:, None, :] & real[:, :, None]
    scores = jnp.einsum("rtnh,rsnh->rnts", take(q), each(k)) * scale
    return jnp.where(mask[:, None], scores, -jnp.inf), mask[:, None], index, real, take, each


def put(x, index, real, like):
    """Rows of cuDNN where they are of the batch; what is no token's is NaN, for cuDNN writes nothing there."""
    flat = jnp.full((like.shape[0] * like.shape[1], *like.shape[2:]), jnp.nan, like.dtype)
    return flat.at[jnp.where(real, index, flat.shape[0])].set(x, mode="drop").reshape(like.shape)


def forward(
    query, key, value, bias, q_seqlen, kv_seqlen, q_offsets, kv_offsets, page_table_k, page_table_v, scale, seed,
    dropout_rate, variadic_args, mask_type, layout, sliding_window_length, cudnn_version, return_residual,
):  # fmt: skip
    q, k, v = wide(query), wide(key), wide(value)
    scores, mask, index, real, _, each = scores_of(q, k, q_seqlen, q_offsets, scale, sliding_window_length)
    statistics = jax.nn.logsumexp(scores, axis=3, where=mask)
    weights = jnp.where(mask, jnp.exp(scores - statistics[..., None]), 0)
    out = put(jnp.einsum("rnts,rsnh->rtnh", weights, each(v)), index, real, q).astype(query.dtype)
    statistics = jnp.where(real[:, None], statistics, jnp.nan)
    given = query, key, value, bias, q_seqlen, kv_seqlen, q_offsets, kv_offsets, page_table_k, page_table_v
    return (out, statistics), (*given, statistics, out)


def backward(
    scale, seed, dropout_rate, variadic_args, mask_type, layout, sliding_window_length, is_training, return_residual,
    res, grad_output,
):  # fmt: skip
    """Section 3.1.2 of FlashAttention-2, all scores at once: of the output and the logsumexp that it is given."""
    dtype = res[0].dtype
    q, k, v, _, q_seqlen, _, q_offsets, *_, statistics, out = map(wide, res)
    grad_output = wide(grad_output)
    scores, mask, index, real, take, each = scores_of(q, k, q_seqlen, q_offsets, scale, sliding_window_length)
    weights = jnp.where(mask, jnp.exp(scores - statistics[..., None]), 0)
    own = lambda x: jnp.where(real[:, :, None, None], take(x), 0)
    inner = jnp.sum(own(grad_output) * own(out), axis=3).swapaxes(1, 2)[..., None]
    d_scores = weights * (jnp.einsum("rtnh,rsnh->rnts", own(grad_output), each(v)) - inner) * scale
    narrow = lambda x: x.reshape(*x.shape[:2], k.shape[2], -1, x.shape[3]).sum(axis=3)
    dq = jnp.einsum("rnts,rsnh->rtnh", d_scores, each(k))
    dk = narrow(jnp.einsum("rnts,rtnh->rsnh", d_scores, take(q)))
    dv = narrow(jnp.einsum("rnts,rtnh->rsnh", weights, own(grad_output)))
    pairs = zip((dq, dk, dv), (q, k, v), strict=True)
    return *(put(x, index, real, like).astype(dtype) for x, like in pairs), *[None] * 7


@pytest.fixture
def on_hopper(monkeypatch):
    """Lets jax trace calls of cuDNN, which it refuses where there is none."""
    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(cudnn, "check_compute_capability", lambda capability: True)


@pytest.fixture
def played(on_hopper, monkeypatch):
    monkeypatch.setattr(cudnn, "_dot_product_attention_fwd_rule", forward)
    monkeypatch.setattr(cudnn, "_dot_product_attention_bwd_rule", backward)


def normal(key, *shapes):
    keys = jax.random.split(key, len(shapes))
    return [jax.random.normal(each, shape, jnp.float32) for each, shape in zip(keys, shapes, strict=True)]


def with_gradients(attend, q, k, v, sinks, d_out, segments):
    def f(*args):
        out = attend(*args)
        if segments is not None:
            out = jnp.where((segments > 0)[:, :, None, None], out, 0)
        return jnp.sum(out * d_out), out

    (_, out), gradients = jax.value_and_grad(f, (0, 1, 2, 3), has_aux=True)(q, k, v, sinks)
    return out, *gradients


@pytest.mark.parametrize("kv_heads", [6, 2])
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("packed", [False, True], ids=["whole", "packed"])
def test_sinks_of_flash_attention_are_those_of_the_reference(played, key, packed, window, kv_heads):
    """In float32, which `attention_cudnn` refuses: so its own functions are called."""
    shape = (3, LENGTH)
    q, k, v, d_out = normal(key, (*shape, 6, 8), (*shape, kv_heads, 8), (*shape, kv_heads, 8), (*shape, 6, 8))
    segments = PACKED if packed else None
    how = attention._How(SCALE, window, seed=0)
    if packed:
        ours = lambda q, k, v, sinks: attention._cudnn_packed(how, q, k, v, sinks, attention._document_index(PACKED))
    else:
        ours = lambda q, k, v, sinks: attention._cudnn_with_sinks(how, q, k, v, sinks, None)
    theirs = lambda q, k, v, sinks: attention_reference(
        q, k, v, scale=SCALE, window=window, sinks=sinks, query_segments=segments, key_segments=segments
    )
    run = lambda attend: jax.jit(functools.partial(with_gradients, attend, segments=segments))(q, k, v, SINKS, d_out)
    for found, expected in zip(run(ours), run(theirs), strict=True):
        assert relative_error(found, expected) < 2e-6
    out, pull = jax.vjp(jax.jit(ours), q, k, v, SINKS)
    if packed:  # zeros, and nothing of what is sent back to it, in both directions
        padding = (PACKED == 0)[:, :, None, None]
        sent = jnp.where(padding, jnp.nan, d_out)
        for x in (out, *pull(sent)[:3]):
            np.testing.assert_array_equal(jnp.where(padding, x, 0), jnp.zeros_like(x))
        for found, expected in zip(pull(sent), pull(jnp.where(padding, 0, d_out)), strict=True):
            np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("segments", [None, PACKED], ids=["whole", "packed"])
def test_sinks_of_16_bits_learn_in_their_dtype(played, key, segments):
    q, k, v, d_out = (x.astype(jnp.bfloat16) for x in normal(key, *[(3, LENGTH, n, 8) for n in (6, 2, 2, 6)]))
    sinks = SINKS.astype(jnp.bfloat16)
    options = dict(scale=SCALE, query_segments=segments, key_segments=segments)

    def gradients(attend, dtype):
        with_sinks = lambda q, k, v, sinks: attend(q, k, v, sinks=sinks, **options)
        out, pull = jax.vjp(with_sinks, *(x.astype(dtype) for x in (q, k, v, sinks)))
        real = True if segments is None else (segments > 0)[:, :, None, None]
        return [jnp.where(real, out, 0), *pull(jnp.where(real, d_out, 0).astype(dtype))]

    found = gradients(attention_cudnn, jnp.bfloat16)
    assert {x.dtype for x in found} == {jnp.dtype(jnp.bfloat16)}
    for x, expected in zip(found, gradients(attention_reference, jnp.float32), strict=True):
        assert relative_error(x.astype(jnp.float32), expected) < 2e-2


def many_documents(length):
    """Rows of more documents than two rounds take, of as many as one takes, of one, and of none; with padding."""
    each = np.arange(1, length + 1)
    rows = [np.where(each % 5 == 0, 0, each), np.minimum(each, MAX_SEGMENTS), np.ones(length), np.zeros(length)]
    return jnp.asarray(np.stack(rows), jnp.int32)


@pytest.mark.parametrize("window", [None, 3])
def test_rows_of_more_documents_than_there_are_places_for(played, key, window):
    length = 2 * MAX_SEGMENTS + 20
    segments = many_documents(length)
    real = (segments > 0)[:, :, None, None]
    q, k, v, d_out = normal(key, *[(4, length, n, 8) for n in (6, 2, 2, 6)])

    def run(attend, q, k, v, sinks):
        options = dict(scale=SCALE, window=window, query_segments=segments, key_segments=segments)
        return jnp.where(real, attend(q, k, v, sinks=sinks, **options), 0)

    # In float32, which cuDNN itself does not take: its kernels are played.
    cudnns = functools.partial(run, lambda q, k, v, *, scale, window, sinks, query_segments, key_segments: (
        attention._cudnn_in_rounds(
            attention._How(scale, window, seed=0), q, k, v, sinks, attention._document_index(query_segments)
        )
    ))  # fmt: skip
    found, pull = jax.vjp(jax.jit(cudnns), q, k, v, SINKS)
    wanted, wanted_pull = jax.vjp(functools.partial(run, attention_reference), q, k, v, SINKS)
    for one, expected in zip((found, *pull(d_out)), (wanted, *wanted_pull(d_out)), strict=True):
        assert relative_error(one, expected) < 1e-5


@pytest.mark.parametrize("sinks", [None, SINKS], ids=["plain", "sinks"])
def test_rows_of_any_number_of_documents_make_no_scores(on_hopper, key, sinks):
    """Not even in what would run if a row had many: XLA reserves the memory of both."""
    length = 512
    q, k, v = (x.astype(jnp.bfloat16) for x in normal(key, *[(2, length, n, 8) for n in (6, 2, 2)]))
    segments = many_documents(length)[:2]
    attend = functools.partial(
        attention_cudnn, scale=SCALE, sinks=sinks, query_segments=segments, key_segments=segments
    )
    jaxpr = jax.make_jaxpr(jax.grad(lambda q: jnp.sum(attend(q, k, v).astype(jnp.float32))))(q).jaxpr
    statistics = 2 * MAX_SEGMENTS * 6 * length
    assert max(x.aval.size for equation in equations(jaxpr) for x in equation.outvars) == statistics < 2 * 6 * length**2
    assert len([*calls(jaxpr, remat._FLASH)]) == 2 + 1  # the whole at once; in rounds forward, and again backward


@pytest.mark.parametrize("sizes", [dict(data=4), dict(fsdp=2, tensor=2), dict(data=2, fsdp=2)])
def test_each_device_counts_its_own_documents(key, sizes):
    """A device runs cuDNN for its rows, with the documents of these rows alone in the first rows of its statistics."""
    mesh = sharding.make_mesh(**sizes)
    parts = sharding.batch_parts(mesh)
    segments = jnp.concatenate([PACKED, PACKED[::-1], PACKED[:2]])
    batch, heads = segments.shape[0], 4
    index = np.asarray(attention._document_index(segments))
    expected = jax.random.normal(key, (batch, LENGTH, heads))
    counts = index.max(axis=1)
    starts = np.full((batch, MAX_SEGMENTS + 1), -1, np.int32)
    statistics = np.full((parts, batch // parts * MAX_SEGMENTS, heads, LENGTH), np.nan, np.float32)
    for b in range(batch):
        part, first = divmod(b, batch // parts)
        before = counts[part * (batch // parts) : b].sum() if first else 0
        for document in range(1, counts[b] + 1):
            (tokens,) = np.nonzero(index[b] == document)
            starts[b, document - 1] = tokens[0]
            statistics[part, before + document - 1, :, : len(tokens)] = expected[b, tokens].T
    documents = attention._Documents(jnp.asarray(index), jnp.zeros((batch, MAX_SEGMENTS), jnp.int32), starts)
    on = lambda *axes: NamedSharding(mesh, PartitionSpec(*axes))
    rows = ("data", "fsdp")
    statistics = jax.device_put(statistics.reshape(-1, heads, LENGTH), on(rows, "tensor"))
    documents = jax.device_put(documents, on(rows))
    found = jax.jit(attention._of_tokens)(statistics, documents)
    assert found.sharding.is_equivalent_to(on(rows, None, "tensor"), 3)
    np.testing.assert_array_equal(found[index > 0], expected[index > 0])


def equations(jaxpr):
    """Those of all that a program is made of."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            yield from equations(inner)


def calls(jaxpr, name):
    return (equation for equation in equations(jaxpr) if equation.primitive.name == name)


@pytest.mark.parametrize("sinks", [None, SINKS], ids=["plain", "sinks"])
@pytest.mark.parametrize("version, heads", [((0, 10, 2), 6), ((0, 11, 0), 6), ((0, 11, 1), 2), ((0, 12, 0), 2)])
def test_a_jax_that_counts_keys_in_heads_of_queries_gets_as_many(on_hopper, monkeypatch, key, version, heads, sinks):
    """Else it would read documents' keys from wrong places, and say nothing."""
    monkeypatch.setattr(jax, "__version_info__", version)
    q, k, v = (x.astype(jnp.bfloat16) for x in normal(key, *[(3, LENGTH, n, 8) for n in (6, 2, 2)]))
    attend = functools.partial(attention_cudnn, scale=SCALE, sinks=sinks, query_segments=PACKED, key_segments=PACKED)
    found = [
        [x.aval.shape[2] for x in call.invars[:3]]
        for call in calls(jax.make_jaxpr(attend)(q, k, v).jaxpr, remat._FLASH)
    ]
    assert found == [[6, heads, heads]] * 2  # of few documents, and of many


@pytest.mark.parametrize("policy, runs", [("attention", 1), ("projections", 1), ("full", 2)])
@pytest.mark.parametrize("segments", [None, PACKED], ids=["whole", "packed"])
@pytest.mark.parametrize("sinks", [None, SINKS], ids=["plain", "sinks"])
def test_results_of_the_kernel_are_kept_by_its_name(on_hopper, key, sinks, segments, policy, runs):
    q, k, v = (x.astype(jnp.bfloat16) for x in normal(key, *[(3, LENGTH, n, 8) for n in (6, 2, 2)]))

    def layer(q, sinks):
        options = dict(scale=SCALE, sinks=sinks, query_segments=segments, key_segments=segments)
        return jnp.tanh(attention_cudnn(jnp.sin(q), k, v, **options))

    def loss(q, sinks):
        return jnp.sum(jax.checkpoint(layer, policy=remat._keeps(remat.POLICIES[policy]))(q, sinks).astype(jnp.float32))

    jaxpr = jax.make_jaxpr(jax.grad(loss, (0,) if sinks is None else (0, 1)))(q, sinks).jaxpr
    # In rounds, where there are many documents, it runs forward, again if nothing is kept, and again for the gradients.
    is_packed = segments is not None
    assert len([*calls(jaxpr, remat._FLASH)]) == runs + is_packed * (runs + 1)
    assert len([*calls(jaxpr, "dot_product_attention_bwd_wrapper")]) == 1 + is_packed


@pytest.mark.parametrize("policy", ["none", "attention", "projections", "full", "offload", "offload_residual"])
@pytest.mark.parametrize("segments", [None, PACKED], ids=["whole", "packed"])
def test_no_two_backward_passes_of_a_program_are_the_same(on_hopper, monkeypatch, segments, policy):
    """XLA under its deterministic flag would find the graph of the first alone. Two stacks, one of periods of three."""
    monkeypatch.setitem(api._OPS, "attention", {"cudnn": attention_cudnn})
    windows = ["sliding_attention"] * 2 + ["full_attention"]
    config = ModelConfig(
        model_type="llama", vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=7,
        num_attention_heads=2, num_key_value_heads=1, head_dim=8, max_position_embeddings=64, rope=RopeConfig(),
        sliding_window=5, layer_types=(*windows * 2, "full_attention"),
    )  # fmt: skip
    model = CausalLM(config, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    lora.add_adapters(model, LoraConfig(r=2), jax.random.key(0))
    model.remat_policy, model.full_determinism = policy, True
    graphdef, trainable, frozen = lora.partition(model)
    ids = jnp.zeros((3, LENGTH), jnp.int32)
    batch = {"input_ids": ids, "labels": ids} | ({} if segments is None else {"segment_ids": segments})
    loss = lambda trainable: causal_lm_loss(nnx.merge(graphdef, trainable, frozen), batch)[0]
    found = [
        (*(x.aval for x in call.invars), *sorted((name, str(value)) for name, value in call.params.items()))
        for call in calls(jax.make_jaxpr(jax.grad(loss))(trainable).jaxpr, "dot_product_attention_bwd_wrapper")
    ]
    assert len(set(found)) == len(found) == 4 * (1 if segments is None else 2)


@pytest.mark.parametrize("window", [None, 5])
def test_whole_rows_are_what_jax_nn_makes_of_them_but_for_the_seed(on_hopper, key, window):
    q, k, v = (x.astype(jnp.bfloat16) for x in normal(key, *[(3, LENGTH, n, 8) for n in (6, 2, 2)]))
    size = None if window is None else (window - 1, 0)
    theirs = functools.partial(
        jax.nn.dot_product_attention, scale=SCALE, is_causal=True, local_window_size=size, implementation="cudnn"
    )
    ours = functools.partial(attention_cudnn, scale=SCALE, window=window, call=3)

    def found(attend):
        jaxpr = jax.make_jaxpr(jax.grad(lambda *args: jnp.sum(attend(*args).astype(jnp.float32)), (0, 1, 2)))(q, k, v)
        for name in (remat._FLASH, "dot_product_attention_bwd_wrapper"):
            [call] = calls(jaxpr.jaxpr, name)
            options = {name: value for name, value in call.params.items() if name != "seed"}
            yield [x.aval for x in call.invars], options, call.params["seed"]

    for (*one, seed), (*other, _) in zip(found(ours), found(theirs), strict=True):
        assert one == other and seed == 6
