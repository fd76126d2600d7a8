"""Several adapters of one model: taken off and put on, added up, and trained in a stack."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import peft
import pytest
import transformers
from flax import nnx
from helpers import load_folder, make_checkpoint, random_ids
from walk import BLOCKS, IDS, largest_difference, logits_of, peft_model, save_peft

import jaxlora
from jaxlora import lora
from jaxlora.adapters import weighted_adapter
from jaxlora.config import LoraConfig, QuantConfig
from jaxlora.converters import peft as ours

pytestmark = pytest.mark.filterwarnings("ignore:.*has no tokenizer files:UserWarning")
BATCH = {"input_ids": jnp.asarray(IDS), "labels": jnp.asarray(IDS)}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    make_checkpoint("llama-biases", folder)
    return folder


def optimizer_of(learning_rate):
    # With an eps above the gradients' rounding, which Adam would make whole steps of.
    return optax.inject_hyperparams(optax.adamw)(learning_rate=learning_rate, weight_decay=0.1, eps=1e-3)


def train_alone(model, adapter, learning_rate, batch=BATCH, steps=3):
    jaxlora.put_adapter(model, adapter)
    graphdef, trainable, frozen = jaxlora.partition(model)
    step = jaxlora.make_train_step(graphdef, optimizer_of(learning_rate))
    state = jaxlora.TrainState.create(trainable, optimizer_of(learning_rate))
    losses = []
    for _ in range(steps):
        state, metrics = step(state, frozen, batch)
        losses.append(float(metrics["loss"]))
    nnx.update(model, state.trainable)
    tensors = ours.adapter_tensors(model)
    jaxlora.take_adapter(model, adapter.config)
    return losses, tensors


@pytest.mark.parametrize("name", ["qwen2-windows", "gemma2"])
def test_stacks_of_like_layers_keep_their_own(name, tmp_path):
    """Layers of several runs, or places of a period, are stacks whose modules differ in their layers only."""
    make_checkpoint(name, tmp_path)
    model = load_folder(tmp_path)
    config = LoraConfig(r=2, target_modules=["q_proj", "up_proj"], bias="lora_only", init_lora_weights=False)
    adapter = jaxlora.new_adapter(model, config, jax.random.key(0))
    base = model(jnp.asarray(IDS))
    lora.add_adapters(model, config, jax.random.key(0))
    logits, tensors = model(jnp.asarray(IDS)), ours.adapter_tensors(model)
    assert largest_difference(logits, base) > 1e-2
    jaxlora.take_adapter(model, config)
    np.testing.assert_array_equal(model(jnp.asarray(IDS)), base)
    stack = jaxlora.stack_adapters(model, [adapter])
    for one in (adapter, *stack.unstack(stack.trainable)):
        jaxlora.put_adapter(model, one)
        np.testing.assert_array_equal(model(jnp.asarray(IDS)), logits)
        jax.tree.map(np.testing.assert_array_equal, ours.adapter_tensors(model), tensors)
        jaxlora.take_adapter(model, config)


STACKS = {
    "ranks": [dict(r=2), dict(r=5, lora_alpha=3, use_rslora=True), dict(r=3, rank_pattern={"layers.1.mlp.up_proj": 1})],
    "modules": [dict(r=4), dict(r=2, target_modules=["q_proj", "layers.1.mlp.up_proj"])],
    "dora": [dict(r=2, use_dora=True), dict(r=4, use_dora=True, target_modules=["v_proj", "layers.2.mlp.up_proj"])],
    "copies": [dict(r=n, bias="all", modules_to_save=["lm_head", "layers.1.input_layernorm"]) for n in (2, 3)],
}


@pytest.mark.parametrize("case, quantised", [*((case, False) for case in STACKS), ("ranks", True)])
def test_a_stack_trains_each_as_alone(case, quantised, checkpoint):
    model = load_folder(checkpoint, quant_config=QuantConfig() if quantised else None)
    configs = [LoraConfig(**{"target_modules": BLOCKS, **options}) for options in STACKS[case]]
    adapters = [jaxlora.new_adapter(model, config, jax.random.key(i)) for i, config in enumerate(configs)]
    rates = [3e-3 * (i + 1) for i in range(len(adapters))]
    stack = jaxlora.stack_adapters(model, adapters)
    assert not lora.adapters(model)
    step = jaxlora.make_train_step(stack.graphdef, optimizer_of(1.0))
    step = jax.jit(jax.vmap(step, in_axes=(0, stack.frozen_axes, None)))
    state = jax.vmap(lambda t, rate: jaxlora.TrainState.create(t, optimizer_of(rate)))(
        stack.trainable, jnp.asarray(rates, jnp.float32)
    )
    losses = []
    for _ in range(3):
        state, metrics = step(state, stack.frozen, BATCH)
        losses.append(np.asarray(metrics["loss"]))
    trained = stack.unstack(state.trainable)
    for i, (adapter, rate) in enumerate(zip(adapters, rates, strict=True)):
        alone, tensors = train_alone(model, adapter, rate)
        np.testing.assert_allclose([x[i] for x in losses], alone, rtol=1e-5)
        jaxlora.put_adapter(model, trained[i])
        found = ours.adapter_tensors(model)
        assert lora.get_nb_trainable_parameters(model)[0] == sum(x.size for x in tensors.values())
        jaxlora.take_adapter(model, configs[i])
        assert found.keys() == tensors.keys()
        for name, value in tensors.items():
            assert largest_difference(found[name], value) < 1e-5, name


def test_a_stack_holds_one_base(checkpoint):
    model = load_folder(checkpoint)
    adapters = [jaxlora.new_adapter(model, LoraConfig(r=2), jax.random.key(i)) for i in range(4)]
    stack = jaxlora.stack_adapters(model, adapters)
    base = sum(leaf.size for leaf in jax.tree.leaves(model))
    one = sum(leaf.size for leaf in jax.tree.leaves(adapters[0].modules) if isinstance(leaf, jax.Array))
    held = sum(leaf.size for leaf in jax.tree.leaves((stack.trainable, stack.frozen)))
    # A scale of each rank in place of one for all.
    assert base + 4 * one <= held < base + 4.05 * one


@pytest.mark.parametrize("quantised", [False, True])
def test_a_stack_trains_in_the_memory_of_one_base(quantised, tmp_path):
    """The compiled step of five: its arguments are the base and five states, and no base of any form for each."""
    make_checkpoint("llama", tmp_path, hidden_size=256, intermediate_size=512, head_dim=32, num_attention_heads=8)
    model = load_folder(tmp_path, quant_config=QuantConfig() if quantised else None)
    base = sum(leaf.nbytes for leaf in jax.tree.leaves(model))
    dense = sum(leaf.nbytes for leaf in jax.tree.leaves(load_folder(tmp_path)))
    batch = {"input_ids": jnp.ones((1, 4), jnp.int32), "labels": jnp.ones((1, 4), jnp.int32)}
    memory, states = {}, {}
    for n in (1, 5):
        adapters = [jaxlora.new_adapter(model, LoraConfig(r=2), jax.random.key(i)) for i in range(n)]
        stack, optimizer = jaxlora.stack_adapters(model, adapters), optimizer_of(1e-3)
        step = jax.jit(jax.vmap(jaxlora.make_train_step(stack.graphdef, optimizer), (0, stack.frozen_axes, None)))
        state = jax.vmap(lambda t, optimizer=optimizer: jaxlora.TrainState.create(t, optimizer))(stack.trainable)
        memory[n] = step.lower(state, stack.frozen, batch).compile().memory_analysis()
        states[n] = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    for n in (1, 5):
        assert base + states[n] <= memory[n].argument_size_in_bytes < base + 1.05 * states[n]
    assert memory[5].temp_size_in_bytes - memory[1].temp_size_in_bytes < 4 * 0.1 * dense


def test_each_of_a_stack_may_have_its_own_batch(checkpoint):
    model = load_folder(checkpoint)
    adapters = [jaxlora.new_adapter(model, LoraConfig(r=2), jax.random.key(i)) for i in range(2)]
    stack = jaxlora.stack_adapters(model, adapters)
    ids = jnp.stack([jnp.asarray(random_ids(2, 11, seed=i)) for i in range(2)])
    batch = {"input_ids": ids, "labels": ids}
    step = jaxlora.make_train_step(stack.graphdef, optimizer_of(1e-3))
    step = jax.jit(jax.vmap(step, in_axes=(0, stack.frozen_axes, 0)))
    state = jax.vmap(lambda t: jaxlora.TrainState.create(t, optimizer_of(1e-3)))(stack.trainable)
    _, metrics = step(state, stack.frozen, batch)
    for i in range(2):
        alone, _ = train_alone(model, adapters[i], 1e-3, jax.tree.map(lambda x, i=i: x[i], batch), steps=1)
        assert metrics["loss"][i] == pytest.approx(alone[0], rel=1e-5)


@pytest.mark.parametrize(
    "second, message",
    [
        (dict(lora_dropout=0.1), r"must agree in lora_dropout, found \[0.0, 0.1\]"),
        (dict(use_dora=True), r"must agree in use_dora, found \[False, True\]"),
        (dict(modules_to_save=["lm_head"]), "must agree in modules_to_save"),
    ],
    ids=str,
)  # fmt: skip
def test_adapters_that_cannot_stand_in_one_stack(second, message, checkpoint):
    model = load_folder(checkpoint)
    adapters = [jaxlora.new_adapter(model, LoraConfig(**options), jax.random.key(0)) for options in ({}, second)]
    with pytest.raises(ValueError, match=message):
        jaxlora.stack_adapters(model, adapters)


def test_off_and_on_again(checkpoint):
    model = load_folder(checkpoint)
    plain = model(jnp.asarray(IDS))
    config = LoraConfig(r=3, init_lora_weights=False, bias="all", modules_to_save=["model.norm"], use_dora=True)
    lora.add_adapters(model, config, jax.random.key(0))
    adapted, tensors = model(jnp.asarray(IDS)), ours.adapter_tensors(model)
    adapter = jaxlora.take_adapter(model, config)
    np.testing.assert_array_equal(model(jnp.asarray(IDS)), plain)
    with pytest.raises(ValueError, match="carries no adapter"):
        jaxlora.take_adapter(model, config)
    jaxlora.put_adapter(model, adapter)
    np.testing.assert_array_equal(model(jnp.asarray(IDS)), adapted)
    assert ours.adapter_tensors(model).keys() == tensors.keys()
    with pytest.raises(ValueError, match="carries an adapter: take it off first"):
        jaxlora.put_adapter(model, adapter)


def test_an_adapter_that_changed_its_base_stays(checkpoint):
    model = load_folder(checkpoint)
    with pytest.raises(ValueError, match="'pissa' changed the weights of the base"):
        jaxlora.new_adapter(model, LoraConfig(init_lora_weights="pissa"), jax.random.key(0))
    assert not lora.adapters(model)


@pytest.mark.parametrize(
    "kind, ranks, rank", [("cat", (3, 3), None), ("cat", (3, 5), None), ("svd", (3, 5), 4), ("linear", (3, 3), None)]
)
def test_weighted_sums_equal_pefts(kind, ranks, rank, checkpoint, tmp_path):
    base = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, attn_implementation="eager")
    options = dict(target_modules=["q_proj", "up_proj"], lora_alpha=6)
    for i, r in enumerate(ranks):
        copy = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, attn_implementation="eager")
        save_peft(peft_model(copy, seed=i, r=r, **options), tmp_path / str(i))
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "0", adapter_name="0")
    theirs.load_adapter(tmp_path / "1", "1")
    weights = [0.7, 0.4]
    theirs.add_weighted_adapter(["0", "1"], weights, "sum", combination_type=kind, svd_rank=rank)
    theirs.set_adapter("sum")
    model = load_folder(checkpoint)
    adapters = []
    for i in range(2):
        config = ours.load_adapter(model, tmp_path / str(i))
        adapters.append(jaxlora.take_adapter(model, config))
    combined = weighted_adapter(model, adapters, weights, kind, rank)
    jaxlora.put_adapter(model, combined)
    assert largest_difference(model(jnp.asarray(IDS)), logits_of(theirs)) < 5e-5
    assert {r for x in lora.adapters(model) for r in x.node.lora_ranks} == {
        rank or (sum(ranks) if kind == "cat" else 3)
    }


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(combination_type="ties"), "'ties' is not one of linear, cat, svd"),
        (dict(combination_type="linear"), r'"linear" adds adapters of one rank, found \[2, 3\]'),
        (dict(weights=[1.0]), "2 adapters need as many weights, found 1"),
    ],
    ids=str,
)  # fmt: skip
def test_sums_that_there_are_not(options, message, checkpoint):
    model = load_folder(checkpoint)
    adapters = [jaxlora.new_adapter(model, LoraConfig(r=r), jax.random.key(r)) for r in (2, 3)]
    with pytest.raises(ValueError, match=message):
        weighted_adapter(model, adapters, **{"weights": [1.0, 1.0], **options})


# ---- By name ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def named(checkpoint, tmp_path):
    """Two adapters of PEFT in folders "0" and "1", and PEFT's model with both."""
    options = dict(target_modules=["q_proj", "up_proj"], modules_to_save=["model.norm"])
    for i in range(2):
        base = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, attn_implementation="eager")
        save_peft(peft_model(base, seed=i, r=2 + i, **options), tmp_path / str(i))
    base = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, attn_implementation="eager")
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "0")
    theirs.load_adapter(tmp_path / "1", "other")
    return theirs


def test_adapters_by_name_as_in_peft(named, checkpoint, tmp_path):
    model, _ = jaxlora.FastLanguageModel.from_pretrained(tmp_path / "0", load_in_16bit=True, dtype="float32")
    model.load_adapter(tmp_path / "1", "other")
    assert model.active_adapter == named.active_adapter == "default" and model.adapter_names == ["default", "other"]
    for name in ("default", "other", "default"):
        model.set_adapter(name)
        named.set_adapter(name)
        assert model.active_adapter == name and model.lora_config.r == 2 + (name == "other")
        assert largest_difference(model(jnp.asarray(IDS)), logits_of(named)) < 5e-5
    model.set_adapter("other")
    graphdef, trainable, frozen = jaxlora.partition(model)  # the waiting one is no part of it
    assert sum(x.size for x in jax.tree.leaves(trainable)) == model.get_nb_trainable_parameters()[0]
    state, _ = jaxlora.make_train_step(graphdef, optax.sgd(0.1))(
        jaxlora.TrainState.create(trainable, optax.sgd(0.1)), frozen, BATCH
    )
    nnx.update(model, state.trainable)
    trained = model(jnp.asarray(IDS))
    model.save_pretrained(tmp_path / "trained")
    model.delete_adapter("default")
    assert model.adapter_names == ["other"]
    np.testing.assert_array_equal(model(jnp.asarray(IDS)), trained)
    model.load_adapter(tmp_path / "trained", "again")
    model.delete_adapter("other")
    assert model.active_adapter == "again"
    np.testing.assert_array_equal(model(jnp.asarray(IDS)), trained)
    model.delete_adapter("again")
    assert model.active_adapter is None and model.lora_config is None and not lora.adapters(model)
    model.load_adapter(tmp_path / "0", "first")
    assert model.active_adapter == "first"
    named.set_adapter("default")
    assert largest_difference(model(jnp.asarray(IDS)), logits_of(named)) < 5e-5


def test_a_sum_by_name_and_what_is_refused(checkpoint, tmp_path):
    model, _ = jaxlora.FastLanguageModel.from_pretrained(checkpoint, load_in_16bit=True, dtype="float32")
    plain = model(jnp.asarray(IDS))
    model = jaxlora.FastLanguageModel.get_peft_model(model, r=2, init_lora_weights=False)
    first = model(jnp.asarray(IDS))
    model.add_adapter("other", LoraConfig(r=3, init_lora_weights=False), random_state=1)
    model.add_weighted_adapter(["default", "other"], [1.0, 0.0], "sum", combination_type="cat")
    np.testing.assert_array_equal(model(jnp.asarray(IDS)), first)
    model.set_adapter("sum")
    assert largest_difference(model(jnp.asarray(IDS)), first) < 5e-5 < largest_difference(first, plain)
    with pytest.raises(ValueError, match="there is no adapter 'third': the model has sum, other, default"):
        model.set_adapter("third")
    with pytest.raises(ValueError, match="there is no adapter 'third'"):
        model.add_weighted_adapter(["third"], [1.0], "fourth")
    assert model.active_adapter == "sum"
    with pytest.raises(ValueError, match="there is an adapter 'other' already"):
        model.add_adapter("other", LoraConfig())
    with pytest.raises(ValueError, match="'olora' changed the weights of the base"):
        model.add_adapter("olora", LoraConfig(init_lora_weights="olora"))
    assert model.adapter_names == ["sum", "other", "default"]


def test_a_first_adapter_may_change_the_base_and_then_stays_alone(checkpoint):
    model, _ = jaxlora.FastLanguageModel.from_pretrained(checkpoint, load_in_16bit=True, dtype="float32")
    model.add_adapter("first", LoraConfig(r=2, init_lora_weights="olora"))
    assert model.active_adapter == "first"
    with pytest.raises(ValueError, match="'olora' changed the weights of the base"):
        model.add_adapter("second", LoraConfig(r=2))
    assert model.active_adapter == "first" and model.lora_config.r == 2
