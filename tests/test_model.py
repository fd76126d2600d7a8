"""The decoder against transformers, and what it promises: packed documents are separate, names are the checkpoint's."""

import doctest
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from helpers import DENSE, FAMILIES, HYBRID, SPARSE, TINY, VOCAB, make_pair, random_ids, relative_error, torch_model

import jaxlora.model
from jaxlora import quant
from jaxlora.config import QuantConfig
from jaxlora.converters.huggingface import SafetensorsSource, model_config, parameter_shapes
from jaxlora.layers import Linear, linear_each
from jaxlora.model import CausalLM, layer_runs, named_nodes
from jaxlora.variables import AdapterScale, BaseParam, LoraParam

# Every family, the windows, and two runs of layers. "dynamic" is left out where documents are packed: its frequencies
# depend on the longest document of a batch, in transformers too.
PACKED = [*FAMILIES, "qwen2-windows", "qwen3-biases-windows", "llama-llama3", "falcon-rw", *HYBRID]


def torch_logits(model, ids, **arguments):
    with torch.no_grad():
        return model(torch.tensor(np.asarray(ids)).long(), **arguments).logits.numpy()


@pytest.mark.parametrize("name", TINY)
def test_logits_equal_transformers(name, tmp_path):
    theirs, ours = make_pair(name, tmp_path)
    # 40 is longer than every window, and than the native length of the scaled ones; one token is for each family once.
    for length in (1, 40) if name in (*FAMILIES, *DENSE, *SPARSE, *HYBRID) else (40,):
        ids = random_ids(2, length)
        logits = ours(jnp.asarray(ids))
        assert logits.dtype == jnp.float32
        assert relative_error(logits, torch_logits(theirs, ids)) < 2e-5


def test_gradients_are_added_up_from_the_last(key):
    first, second, third, fourth = terms = [*jax.random.normal(key, (4, 7, 33))]
    np.testing.assert_array_equal(quant.added_up(terms), first + (second + (third + fourth)))
    assert np.any((first + second) + (third + fourth) != first + (second + (third + fourth)))  # else it says nothing


@pytest.mark.parametrize("is_tile", [False, True])
def test_adapters_that_read_the_same_are_learned_as_each_by_itself(key, is_tile):
    linears = []
    for out, rank in ((64, 4), (16, 2), (32, 4)):
        linear = Linear(
            48, out, axes=("mlp", "embed"), dtype=jnp.float32, rngs=nnx.Rngs(out), bias=True, quant_config=QuantConfig()
        )
        a, b = (jax.random.normal(key, shape, jnp.float32) for shape in ((rank, 48), (out, rank)))
        linear.lora_A, linear.lora_B, linear.lora_scaling = LoraParam(a), LoraParam(b), AdapterScale(jnp.float32(0.5))
        linear.bias.set_value(jax.random.normal(key, (out,), jnp.float32))
        linears.append(linear.dense(jnp.float32, 96) if is_tile else linear)
    assert all(linear.is_merged(96) for linear in linears)
    structure, learning, frozen = nnx.split(linears, nnx.Param, ...)
    x = jax.random.normal(key, (2, 48, 48), jnp.float32)
    dys = [jax.random.normal(key, (2, 48, out), jnp.float32) for out in (64, 16, 32)]

    def run(function):
        return jax.vjp(lambda learning, x: function(nnx.merge(structure, learning, frozen), x), learning, x)

    ys, pullback = run(lambda linears, x: linear_each(linears, x, [None] * 3))
    apart, apart_pullback = run(lambda linears, x: [linear(x) for linear in linears])
    found, wanted = jax.tree.leaves((ys, pullback(dys))), jax.tree.leaves((apart, apart_pullback(dys)))
    for ours, theirs in zip(found, wanted, strict=True):
        assert jnp.any(ours != 0.0)
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-4)
    # Two products read x for all, where there were two for each.
    products = lambda pullback: jax.jit(pullback).lower(dys).as_text().count("stablehlo.dot_general")
    assert products(pullback) == products(apart_pullback) - 4


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_at_given_positions_equal_transformers(name, tmp_path):
    theirs, ours = make_pair(name, tmp_path)
    ids, positions = random_ids(2, 12), np.stack([np.arange(7, 19), np.arange(3, 39, 3)]).astype(np.int32)
    mask = np.tril(np.ones((12, 12), bool))
    if theirs.config.get_text_config().to_dict().get("sliding_window") and name == "mistral":
        mask &= ~np.tril(np.ones((12, 12), bool), -theirs.config.sliding_window)
    # A mask of our own, because transformers takes positions that start again or jump for packed documents.
    mask = torch.where(torch.tensor(mask), 0.0, torch.finfo(torch.float32).min).expand(2, 1, 12, 12)
    expected = torch_logits(theirs, ids, position_ids=torch.tensor(positions).long(), attention_mask=mask)
    found = ours(jnp.asarray(ids), jnp.asarray(positions))
    assert relative_error(found, expected) < 2e-5
    assert relative_error(ours(jnp.asarray(ids)), expected) > 1e-3  # positions mattered


@pytest.mark.parametrize("name", [*PACKED, *DENSE, *SPARSE])
def test_packed_documents_are_separate_documents(name, tmp_path):
    theirs, ours = make_pair(name, tmp_path)
    lengths = (7, 1, 12, 9)
    documents = [random_ids(1, length, seed=length) for length in lengths]
    ids = np.concatenate([*documents, np.zeros((1, 3), np.int32)], axis=1)
    segments = np.concatenate([np.full((1, n), i + 1, np.int32) for i, n in enumerate(lengths)] + [ids[:, -3:] * 0], 1)
    packed = ours(jnp.asarray(ids), segment_ids=jnp.asarray(segments))
    assert np.all(np.isfinite(packed))
    for i, document in enumerate(documents):
        assert relative_error(packed[:, segments[0] == i + 1], torch_logits(theirs, document)) < 2e-5


@pytest.mark.parametrize("name", PACKED)
def test_a_document_changes_nothing_of_its_neighbour(name, tmp_path):
    _, model = make_pair(name, tmp_path)
    segments = jnp.array([[1] * 11 + [2] * 9 + [1] * 4 + [0] * 2], jnp.int32)  # an id that comes back, too
    mine = segments == 2
    ids = jnp.asarray(random_ids(1, 26))
    changed = jnp.where(mine, ids, (ids + 5) % VOCAB)
    graphdef, weights = nnx.split(model)
    cotangent = jax.random.normal(jax.random.key(1), (1, 26, VOCAB)) * mine[..., None].astype(jnp.float32)

    @jax.jit
    def logits_and_gradient(weights, ids):
        def of(weights):
            logits = nnx.merge(graphdef, weights)(ids, segment_ids=segments)
            return jnp.sum(logits * cotangent), logits

        return jax.grad(of, has_aux=True)(weights)

    (gradient, logits), (gradient_2, logits_2) = (
        logits_and_gradient(weights, ids),
        logits_and_gradient(weights, changed),
    )
    np.testing.assert_array_equal(logits[mine], logits_2[mine])
    assert not np.array_equal(logits[~mine], logits_2[~mine])
    jax.tree.map(np.testing.assert_array_equal, gradient, gradient_2)
    assert all(np.any(leaf) for leaf in jax.tree.leaves(gradient))


@pytest.mark.parametrize("name", ["llama-biases", "qwen2-windows"])
def test_jit_changes_nothing(name, tmp_path):
    _, model = make_pair(name, tmp_path)
    ids = jnp.asarray(random_ids(2, 9))
    graphdef, state = nnx.split(model)
    compiled = jax.jit(lambda state, ids: nnx.merge(graphdef, state)(ids))(state, ids)
    np.testing.assert_array_equal(model(ids), compiled)
    np.testing.assert_array_equal(nnx.jit(lambda model, ids: model(ids))(model, ids), compiled)
    with jax.disable_jit():
        assert relative_error(model(ids), compiled) < 2e-6


@pytest.mark.parametrize("name", FAMILIES)
def test_bfloat16_is_near_float32(name, tmp_path):
    theirs, model = make_pair(name, tmp_path, dtype=jnp.bfloat16)
    assert {p.node.get_value().dtype for p in named_nodes(model, nnx.Variable)} == {jnp.dtype(jnp.bfloat16)}
    ids = random_ids(2, 20)
    logits = model(jnp.asarray(ids))
    assert logits.dtype == jnp.float32
    assert model.hidden_states(jnp.asarray(ids))[0].dtype == jnp.bfloat16
    assert relative_error(logits, torch_logits(theirs, ids)) < 5e-2


@pytest.mark.parametrize(
    "name",
    ["mistral", "qwen2-windows", "qwen3", "llama-tied", "falcon_h1", "falcon_h1-plain", "qwen3_5_text", "mixtral"],
)
def test_tokens_through_a_cache_equal_the_whole(name, tmp_path):
    _, model = make_pair(name, tmp_path)
    ids = jnp.asarray(random_ids(2, 12))
    whole, _ = model.hidden_states(ids)
    cache, parts = model.init_cache(2, 15), []
    for start, stop in ((0, 5), (5, 6), (6, 7), (7, 12)):
        positions = jnp.broadcast_to(jnp.arange(start, stop, dtype=jnp.int32), (2, stop - start))
        part, cache = model.hidden_states(ids[:, start:stop], positions, cache=cache)
        parts.append(part)
    assert relative_error(jnp.concatenate(parts, axis=1), whole) < 1e-5


def test_a_cache_needs_positions(tmp_path):
    _, model = make_pair("llama", tmp_path)
    with pytest.raises(ValueError, match="with a cache, positions must be given"):
        model.hidden_states(jnp.zeros((1, 2), jnp.int32), cache=model.init_cache(1, 4))


@pytest.mark.parametrize("quant_config", [None, QuantConfig()])
def test_an_abstract_model_takes_no_memory(quant_config):
    config = model_config(
        dict(
            model_type="llama", hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64,
            num_key_value_heads=8, vocab_size=128256,
        )
    )  # fmt: skip
    model = nnx.eval_shape(lambda: CausalLM(config, dtype=jnp.bfloat16, quant_config=quant_config, rngs=nnx.Rngs(0)))
    leaves = jax.tree.leaves(nnx.state(model))
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves)
    elements = sum(p.node.get_value().size for p in named_nodes(model, BaseParam))
    assert elements == 70_553_706_496  # Llama-3.1-70B


@pytest.mark.parametrize("name", TINY)
def test_parameter_names_and_shapes_are_the_checkpoints(name, tmp_path):
    _, ours = make_pair(name, tmp_path)
    source = SafetensorsSource(tmp_path)
    found = [(one, shape) for parameter, shape in parameter_shapes(ours) for one in parameter.names()]
    assert dict(found) == {one: source.shape(one) for one in source.names()}
    assert len(found) == len(dict(found))


@pytest.mark.parametrize("name", ["qwen2-windows", "qwen3-biases-windows"])
def test_every_parameter_says_its_axes(name, tmp_path):
    _, model = make_pair(name, tmp_path)
    for parameter in named_nodes(model, nnx.Variable):
        axes = parameter.node.get_metadata()["axes"]
        assert len(axes) == parameter.node.get_value().ndim, parameter.name
        assert (axes[0] == "layers") == bool(parameter.layers)


def test_windows_split_the_layers_into_runs():
    configs = {name: model_config(torch_model(name).config.to_dict()) for name in ("qwen2-windows", "mistral")}
    full, sliding = "full_attention", "sliding_attention"
    assert layer_runs(configs["qwen2-windows"].layer_types) == [(0, (full,), 2), (2, (sliding,), 1)]
    assert layer_runs(configs["mistral"].layer_types) == [(0, (sliding,), 3)]


def test_doctests():
    failed, attempted = doctest.testmod(jaxlora.model)
    assert attempted and not failed


def unrolled(runs):
    return tuple(kind for _, kinds, repeats in runs for _ in range(repeats) for kind in kinds)


def fewest_compiled_layers(pattern):
    """Try every way to cut the pattern; a part costs the length of its smallest period."""

    def cost(part):
        return next(p for p in range(1, len(part) + 1) if len(part) % p == 0 and part[:p] * (len(part) // p) == part)

    best = len(pattern)
    for cuts in itertools.product([False, True], repeat=len(pattern) - 1):
        edges = [0, *(i + 1 for i, cut in enumerate(cuts) if cut), len(pattern)]
        best = min(best, sum(cost(pattern[a:b]) for a, b in itertools.pairwise(edges)))
    return best


@pytest.mark.parametrize("kinds, longest", [("ab", 8), ("abc", 6)])
def test_runs_of_every_short_pattern(kinds, longest):
    for length in range(1, longest + 1):
        for pattern in itertools.product(kinds, repeat=length):
            runs = layer_runs(pattern)
            assert unrolled(runs) == pattern
            starts = np.cumsum([0, *(len(period) * repeats for _, period, repeats in runs)])[:-1]
            assert [start for start, _, _ in runs] == list(starts)
            assert sum(len(period) for _, period, _ in runs) == fewest_compiled_layers(pattern), pattern


def test_alternating_layers_are_one_run(tmp_path):
    layer_types = ["sliding_attention", "full_attention"] * 2
    theirs, ours = make_pair(
        "qwen3", tmp_path, num_hidden_layers=4, layer_types=layer_types, use_sliding_window=True, sliding_window=3,
        max_window_layers=0,
    )  # fmt: skip
    (run,) = ours.model.layers
    assert (len(run.period), run.repeats) == (2, 2)
    ids = random_ids(2, 15)
    assert relative_error(ours(jnp.asarray(ids)), torch_logits(theirs, ids)) < 2e-5
    assert {n for p in named_nodes(ours, nnx.Variable) for n in p.names()} == set(theirs.state_dict()) - {
        "lm_head.weight"
    }


def test_hf_config_is_a_fresh_copy(tmp_path):
    theirs, ours = make_pair("llama", tmp_path)
    ours.hf_config["vocab_size"] = 1
    assert ours.hf_config["vocab_size"] == VOCAB == theirs.config.vocab_size
