"""One step on eight devices is the step on one, wherever the weights lie."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from helpers import load_folder, make_checkpoint, make_pair, random_ids, randomise_adapters, relative_error
from jax.sharding import NamedSharding, PartitionSpec

from jaxlora import sharding
from jaxlora.config import LoraConfig, QuantConfig
from jaxlora.converters.huggingface import SafetensorsSource, load_model
from jaxlora.lora import add_adapters, partition
from jaxlora.model import named_nodes
from jaxlora.quant import dequantize, quantize
from jaxlora.train import TrainState, make_train_step

EVEN = dict(
    hidden_size=64, intermediate_size=128, num_attention_heads=8, num_key_value_heads=4, head_dim=16, vocab_size=96
)


def batch_of(rows, length=12, vocab=96):
    ids = jnp.asarray(random_ids(rows, length, vocab=vocab))
    labels = jnp.where(ids % 3 == 0, -100, ids)
    segments = jnp.asarray([[1] * 5 + [2] * (length - 6) + [0]] * rows, jnp.int32)
    return {"input_ids": ids, "labels": labels, "segment_ids": segments}


def two_steps(model, batch, mesh=None):
    graphdef, trainable, frozen = partition(model)
    optimizer = optax.adamw(1e-3, eps=1e-3)  # a larger eps, or Adam would blow up the rounding of tiny gradients
    state = TrainState.create(trainable, optimizer)
    if mesh is not None:
        state, frozen = sharding.shard(state, mesh), sharding.shard(frozen, mesh)
        accumulated = batch["input_ids"].ndim == 3
        batch = jax.device_put(batch, sharding.batch_sharding(mesh, accumulated=accumulated))
    step = make_train_step(graphdef, optimizer, mesh=mesh)
    losses = []
    for _ in range(2):
        state, metrics = step(state, frozen, batch)
        losses.append(float(metrics["loss"]))
    return losses, state


INDIVISIBLE = dict(vocab_size=97, hidden_size=54, num_key_value_heads=3)


@pytest.mark.parametrize(
    "sizes, changes, accumulated, quant_config",
    [
        (dict(data=2, fsdp=4), EVEN, False, None),
        (dict(data=2, fsdp=4), EVEN, False, QuantConfig()),
        (dict(data=2, fsdp=2, tensor=2), EVEN, True, QuantConfig()),
        (dict(fsdp=4, tensor=2), INDIVISIBLE, False, None),
        (dict(fsdp=4, tensor=2), INDIVISIBLE, False, QuantConfig()),
    ],
    ids=["data-fsdp", "data-fsdp-nf4", "data-fsdp-tensor-nf4", "indivisible", "indivisible-nf4"],
)
def test_a_step_on_a_mesh_equals_the_step_on_one_device(sizes, changes, accumulated, quant_config, tmp_path):
    make_checkpoint("llama-biases", tmp_path, **changes)
    model = load_folder(tmp_path, quant_config=quant_config)
    add_adapters(model, LoraConfig(r=4), jax.random.key(0))
    randomise_adapters(model)
    batch = batch_of(16)
    if accumulated:
        batch = {k: v.reshape(2, 8, -1) for k, v in batch.items()}
    losses, state = two_steps(model, batch)
    mesh = sharding.make_mesh(**sizes)
    losses_on_mesh, state_on_mesh = two_steps(model, batch, mesh)
    np.testing.assert_allclose(losses_on_mesh, losses, rtol=1e-5)
    for found, expected in zip(jax.tree.leaves(state_on_mesh.trainable), jax.tree.leaves(state.trainable), strict=True):
        assert len(found.sharding.device_set) == 8
        assert relative_error(found, expected) < 1e-5


def specs(tree):
    return {leaf.sharding.spec if isinstance(leaf, jax.Array) else leaf.spec for leaf in jax.tree.leaves(tree)}


def test_the_table_says_where_a_weight_lies(tmp_path):
    _, model = make_pair("qwen2", tmp_path, **{**EVEN, "head_dim": 8})
    mesh = sharding.make_mesh(fsdp=2, tensor=4)
    sharding.shard(model, mesh)
    found = {p.name: p.node.get_value().sharding.spec for p in named_nodes(model, nnx.Variable)}
    assert found["model.layers.{}.mlp.up_proj.weight"] == PartitionSpec(None, ("tensor", "fsdp"))
    assert found["model.layers.{}.mlp.down_proj.weight"] == PartitionSpec(None, ("fsdp",), ("tensor",))
    assert found["model.layers.{}.self_attn.q_proj.bias"] == PartitionSpec(None, ("tensor",))
    assert found["model.layers.{}.input_layernorm.weight"] == PartitionSpec(None, ("fsdp",))
    assert found["model.embed_tokens.weight"] == found["lm_head.weight"] == PartitionSpec(("tensor",), ("fsdp",))
    up = model.model.layers[0].period[0].mlp.up_proj.weight.get_value()
    assert {shard.data.shape for shard in up.addressable_shards} == {(3, 16, 64)}
    by_columns = jax.ShapeDtypeStruct((3, 12, 64), jnp.float32)  # of which the rows are divided by 4, and not by 8
    assert sharding.variable_sharding(by_columns, ("layers", "mlp", "embed"), mesh).spec == PartitionSpec(
        None, ("tensor",), ("fsdp",)
    )
    no_tensor = {**sharding.DEFAULT_RULES, "mlp": None}
    assert sharding.variable_sharding(up, ("layers", "mlp", "embed"), mesh, no_tensor).spec == PartitionSpec(
        None, None, ("fsdp",)
    )


@pytest.mark.parametrize("rows, columns, spec", [
    (128, 64, PartitionSpec(None, ("tensor", "fsdp"))),  # over both axes of the mesh
    (12, 64, PartitionSpec(None, ("tensor",))),  # rows in 4, but not in 8
    (9, 64, PartitionSpec()),
    (128, 48, PartitionSpec()),  # blocks cross rows
])  # fmt: skip
def test_a_quantised_weight_is_split_by_whole_rows(rows, columns, spec):
    mesh = sharding.make_mesh(fsdp=2, tensor=4)
    weight = quantize(jax.random.normal(jax.random.key(0), (3, rows, columns)))
    places = sharding.variable_sharding(weight, ("layers", "mlp", "embed"), mesh)
    assert places.codes.spec == places.scales.spec == spec
    assert places.nested_absmax.spec == places.nested_offset.spec == PartitionSpec()
    placed = jax.device_put(weight, places)
    unpack = jax.jit(dequantize)
    np.testing.assert_array_equal(unpack(placed), unpack(weight))


@pytest.mark.parametrize("quant_config", [None, QuantConfig()], ids=["dense", "nf4"])
def test_loading_goes_straight_into_the_shards(quant_config, tmp_path):
    make_checkpoint("mistral", tmp_path, **EVEN)
    mesh = sharding.make_mesh(fsdp=4, tensor=2)
    hf_config = json.loads((tmp_path / "config.json").read_text())
    options = dict(dtype=jnp.float32, quant_config=quant_config)
    model = load_model(SafetensorsSource(tmp_path), hf_config, place=sharding.placer(mesh), **options)
    reference = load_model(SafetensorsSource(tmp_path), hf_config, **options)
    expected = jax.tree.leaves(sharding.shardings(model, mesh))
    leaves = jax.tree.leaves(nnx.state(model))
    for leaf, place, value in zip(leaves, expected, jax.tree.leaves(nnx.state(reference)), strict=True):
        assert leaf.sharding.is_equivalent_to(place, leaf.ndim)
        np.testing.assert_array_equal(leaf, value)
    assert sum(leaf.addressable_shards[0].data.nbytes for leaf in leaves) < sum(leaf.nbytes for leaf in leaves) / 5
    ids = jnp.asarray(random_ids(8, 10, vocab=96))
    placed_ids = jax.device_put(ids, sharding.batch_sharding(mesh))
    assert relative_error(model(placed_ids), reference(ids)) < 1e-5


def test_a_whole_training_state_has_shardings(tmp_path):
    _, model = make_pair("llama", tmp_path, **EVEN)
    add_adapters(model, LoraConfig(r=4), jax.random.key(0))
    mesh = sharding.make_mesh(data=2, fsdp=4)
    for optimizer in (optax.adamw(1e-3), optax.adafactor(1e-3, min_dim_size_to_factor=4)):
        state = TrainState.create(partition(model)[1], optimizer)
        places = sharding.shardings(state, mesh)
        assert jax.tree.structure(places) == jax.tree.structure(state)
        assert all(isinstance(place, NamedSharding) for place in jax.tree.leaves(places))
        assert places.step.spec == places.key.spec == PartitionSpec()
        assert PartitionSpec(None, None, ("fsdp",)) in specs(places.trainable)  # A of q_proj: layers, rank, embed
        jax.device_put(state, places)
    adam = sharding.shardings(TrainState.create(partition(model)[1], optax.adamw(1e-3)), mesh)
    assert specs(adam.opt_state[0].mu) == specs(adam.trainable)


def test_bad_meshes_and_rules_are_refused():
    with pytest.raises(ValueError, match="data=3, fsdp=3, tensor=1 takes 9 devices, each size at least 1; there are 8"):
        sharding.make_mesh(data=3, fsdp=3)
    with pytest.raises(ValueError, match="tensor=0"):
        sharding.make_mesh(tensor=0)
    with pytest.raises(ValueError, match="nothing of the axis 'stages'; they have embed, vocab"):
        sharding.variable_sharding(jnp.zeros(4), ("stages",), sharding.make_mesh(fsdp=2))


def test_a_mesh_is_named_by_its_sizes():
    assert dict(sharding.parse_mesh("data=2, fsdp=4").shape) == dict(data=2, fsdp=4, tensor=1)
    for text in ("rows=2", "fsdp=2,fsdp=2", "fsdp=", "fsdp=two", "fsdp=-1", "data=2,"):
        with pytest.raises(ValueError, match="is no mesh: .* is not one of data, fsdp, tensor, once, = a number"):
            sharding.parse_mesh(text)
    with pytest.raises(ValueError, match="a mesh of data=1, fsdp=64, tensor=1 takes 64 devices"):
        sharding.parse_mesh("fsdp=64")


def test_where_arrays_lie_tells_the_mesh():
    mesh, x = sharding.make_mesh(fsdp=2), jnp.arange(4)
    place = sharding.batch_sharding(mesh)
    assert sharding.mesh_of([x]) is None and sharding.mesh_of([x, jax.device_put(x, place)]) == mesh
    assert sharding.batch_parts(mesh) == 2 and sharding.batch_parts(sharding.make_mesh(tensor=2)) == 1
    other = jax.make_mesh((2,), ("x",), devices=jax.devices()[:2])
    elsewhere = jax.device_put(x, NamedSharding(other, PartitionSpec("x")))
    assert sharding.mesh_of([elsewhere]) == other
    with pytest.raises(ValueError, match="arrays lie on .* and .*: put all on one of them"):
        sharding.mesh_of([elsewhere, jax.device_put(x, place)])
