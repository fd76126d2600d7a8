"""The training step: the updates of PEFT and torch's AdamW, and what must change nothing does change nothing."""

import dataclasses
import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax import nnx
from helpers import (
    DENSE,
    FAMILIES,
    HYBRID,
    LINEARS,
    SPARSE,
    VOCAB,
    adapter_matrices,
    load_folder,
    make_checkpoint,
    make_pair,
    marked,
    peft_parameters,
    peft_twin,
    randomise_adapters,
    relative_error,
)

from jaxlora import remat
from jaxlora.config import LoraConfig, QuantConfig
from jaxlora.layers import Linear
from jaxlora.lora import add_adapters, partition
from jaxlora.loss import causal_lm_loss
from jaxlora.model import named_nodes
from jaxlora.quant import QuantizedArray, dequantize
from jaxlora.train import TrainState, make_train_step

LORA = LoraConfig(r=4, lora_alpha=6)
LENGTHS = (9, 4, 7, 12, 5)


def with_adapters(model, config=LORA):
    add_adapters(model, config, jax.random.key(0))
    randomise_adapters(model)
    return model


def documents(seed):
    """(ids, labels) of each document; about a third of the labels, and all of one document's, are masked."""
    rng = np.random.default_rng(seed)
    out = []
    for i, length in enumerate(LENGTHS):
        ids = rng.integers(0, VOCAB, length).astype(np.int32)
        masked = (rng.random(length) < 0.3) | (i == 1)
        out.append((ids, np.where(masked, -100, ids).astype(np.int32)))
    return out


def padded(docs):
    """One document a row: input_ids, labels and segment_ids [documents, longest]."""
    width = max(len(ids) for ids, _ in docs)

    def column(values, fill):
        return jnp.asarray([[*v, *[fill] * (width - len(v))] for v in values], jnp.int32)

    ids, labels = zip(*docs, strict=True)
    return {
        "input_ids": column(ids, 0),
        "labels": column(labels, -100),
        "segment_ids": column([np.ones_like(i) for i in ids], 0),
    }


def packed(docs, rows=2, width=24):
    """The same documents, several a row."""
    batch = {
        "input_ids": np.zeros((rows, width), np.int32),
        "labels": np.full((rows, width), -100, np.int32),
        "segment_ids": np.zeros((rows, width), np.int32),
    }
    used, count = [0] * rows, [0] * rows
    for ids, labels in docs:
        row = next(r for r in range(rows) if used[r] + len(ids) <= width)
        place = slice(used[row], used[row] + len(ids))
        count[row] += 1
        batch["input_ids"][row, place], batch["labels"][row, place] = ids, labels
        batch["segment_ids"][row, place] = count[row]
        used[row] += len(ids)
    assert max(count) > 1
    return jax.tree.map(jnp.asarray, batch)


def train(model, optimizer, batches, loss=causal_lm_loss, key=None):
    """Losses and the state after a step for each batch."""
    graphdef, trainable, frozen = partition(model)
    state = TrainState.create(trainable, optimizer, key)
    step = make_train_step(graphdef, optimizer, loss)
    losses = []
    for batch in batches:
        state, metrics = step(state, frozen, batch)
        losses.append(float(metrics["loss"]))
    return losses, state


# ---- against PEFT ----------------------------------------------------------------------------------------------------


def keep_first():
    """An optimizer's part that changes nothing; its state is (steps, the gradient of the first)."""

    def update(gradient, state, params=None):
        steps, first = state
        return gradient, (steps + 1, jax.tree.map(lambda old, new: jnp.where(steps == 0, new, old), first, gradient))

    return optax.GradientTransformation(lambda params: (jnp.int32(0), jax.tree.map(jnp.zeros_like, params)), update)


@pytest.mark.parametrize(
    "name, layout",
    [
        *itertools.product([*FAMILIES, "qwen2-windows"], [padded, packed]),
        *(pytest.param(name, packed, marks=marks) for name, marks in marked([*DENSE, *SPARSE, *HYBRID])),
    ],
)
def test_four_steps_equal_peft(name, layout, tmp_path):
    # Where logits are scaled down some gradients are 1e-8, mostly rounding, which Adam would blow up to whole steps.
    # Qwen3.5's reach 3, and two float32 programs of theirs are 6e-5 apart, of Gemma 4's experts 5e-5.
    eps = (
        1e-2
        if name.startswith("qwen3_5")
        else 1e-3
        if name.startswith("gemma4")
        else 1e-5
        if name in (*DENSE, *SPARSE, *HYBRID)
        else 1e-8
    )
    config = dataclasses.replace(LORA, target_modules=LINEARS) if name in (*SPARSE, *HYBRID) else LORA
    theirs, ours = make_pair(name, tmp_path)
    with_adapters(ours, config)
    start = adapter_matrices(ours)
    twin = peft_twin(theirs, ours, config).train()
    torch_optimizer = torch.optim.AdamW(
        [p for p in twin.parameters() if p.requires_grad], lr=3e-3, betas=(0.9, 0.99), weight_decay=0.1, eps=eps
    )
    expected, gradients = [], {}
    for seed in range(4):
        batch = {k: torch.tensor(np.asarray(v)).long() for k, v in padded(documents(seed)).items()}
        loss = twin(batch["input_ids"], attention_mask=batch["segment_ids"], labels=batch["labels"]).loss
        expected.append(loss.item())
        torch_optimizer.zero_grad()
        loss.backward()
        gradients = gradients or {k: p.grad.clone() for k, p in peft_parameters(twin).items()}
        torch_optimizer.step()

    optimizer = optax.chain(keep_first(), optax.adamw(3e-3, b1=0.9, b2=0.99, weight_decay=0.1, eps=eps))
    losses, state = train(ours, optimizer, [layout(documents(seed)) for seed in range(4)])
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    assert state.step == 4
    nnx.update(ours, state.opt_state[0][1])
    found = adapter_matrices(ours)
    for name_of_one, gradient in gradients.items():
        assert relative_error(found[name_of_one], gradient) < 1e-4, name_of_one
    nnx.update(ours, state.trainable)
    found = adapter_matrices(ours)
    for name_of_one, parameter in peft_parameters(twin).items():
        assert relative_error(found[name_of_one], parameter.detach()) < 1e-4, name_of_one
        # and the updates themselves, which are a twentieth of the weights
        update = parameter.detach().numpy() - start[name_of_one]
        assert relative_error(found[name_of_one] - start[name_of_one], update) < 5e-3, name_of_one


# ---- micro-batches, donation, an empty batch -------------------------------------------------------------------------


def stacked(batch, parts):
    return {k: v.reshape(parts, -1, *v.shape[1:]) for k, v in batch.items()}


def test_accumulation_equals_one_batch(tmp_path):
    _, model = make_pair("qwen2", tmp_path)
    with_adapters(model)
    whole = padded([*documents(0), documents(1)[0]])  # six rows with unlike numbers of tokens
    optimizer = optax.sgd(1.0)  # so that the update is the gradient
    losses, state = train(model, optimizer, [whole])
    for parts in (1, 3, 6):
        losses_of_parts, state_of_parts = train(model, optimizer, [stacked(whole, parts)])
        np.testing.assert_allclose(losses_of_parts, losses, rtol=1e-6)
        for one, other in zip(jax.tree.leaves(state.trainable), jax.tree.leaves(state_of_parts.trainable), strict=True):
            assert relative_error(other, one) < 1e-5


def test_metrics_are_means_over_tokens_whichever_way_they_are_cut(tmp_path):
    _, model = make_pair("llama", tmp_path)
    with_adapters(model)
    graphdef, trainable, frozen = partition(model)
    batch = padded([*documents(0), documents(1)[0]])
    tokens = sum(int((labels[1:] != -100).sum()) for _, labels in [*documents(0), documents(1)[0]])

    def loss(model, batch, key):
        total, weight, _ = causal_lm_loss(model, batch, key)
        return total, weight, {"twice": 2.0 * total}

    step = make_train_step(graphdef, optax.sgd(0.0), loss)
    for cut in (batch, stacked(batch, 3)):
        _, metrics = step(TrainState.create(trainable, optax.sgd(0.0)), frozen, cut)
        assert set(metrics) == {"loss", "grad_norm", "num_tokens", "twice"}
        assert metrics["num_tokens"] == tokens
        assert float(metrics["twice"]) == pytest.approx(2 * float(metrics["loss"]), rel=1e-6)
        assert metrics["grad_norm"] > 0


def test_the_state_is_donated_and_the_module_is_not(tmp_path):
    _, model = make_pair("llama", tmp_path)
    with_adapters(model)
    graphdef, trainable, frozen = partition(model)
    optimizer = optax.adamw(1e-2)
    state = TrainState.create(trainable, optimizer)
    batch = padded(documents(0))
    before, old_state = model(batch["input_ids"]), jax.tree.map(jnp.copy, state)
    new_state, _ = make_train_step(graphdef, optimizer)(state, frozen, batch)
    chex.assert_trees_all_equal_shapes_and_dtypes(new_state, old_state)  # or there is nothing to donate to
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves((state.trainable, state.opt_state)))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((trainable, frozen, batch)))
    np.testing.assert_array_equal(model(batch["input_ids"]), before)
    nnx.update(model, new_state.trainable)
    assert not np.array_equal(model(batch["input_ids"]), before)


@pytest.mark.parametrize("parts", [None, 2])
def test_a_batch_without_labels_teaches_nothing(parts, tmp_path):
    _, model = make_pair("qwen3", tmp_path)
    with_adapters(model)
    docs = [(ids, np.full_like(labels, -100)) for ids, labels in documents(0)[:4]]
    batch = padded(docs) if parts is None else stacked(padded(docs), parts)
    trainable = partition(model)[1]
    losses, state = train(model, optax.sgd(1.0), [batch])
    assert losses == [0.0]
    chex.assert_trees_all_equal(state.trainable, trainable)


# ---- losses and optimizers -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "optimizer",
    [
        optax.adamw(optax.warmup_cosine_decay_schedule(0.0, 1e-2, 2, 10)),
        optax.chain(optax.clip_by_global_norm(0.5), optax.adamw(5e-3, mu_dtype=jnp.bfloat16)),
        optax.lion(1e-3),
        optax.adafactor(1e-2),
        optax.sgd(0.05, momentum=0.9, nesterov=True),
        optax.MultiSteps(optax.adam(5e-3), every_k_schedule=2).gradient_transformation(),
    ],
    ids=["schedule", "clip", "lion", "adafactor", "momentum", "multisteps"],
)
def test_optax_optimizers_learn(optimizer, tmp_path):
    _, model = make_pair("llama", tmp_path)
    with_adapters(model)
    batch = padded(documents(0))
    losses, state = train(model, optimizer, [batch] * 8)
    assert losses[-1] < 0.98 * losses[0]
    assert {leaf.dtype for leaf in jax.tree.leaves(state.trainable)} == {jnp.dtype(jnp.float32)}


def test_a_loss_of_ones_own(tmp_path):
    _, model = make_pair("llama", tmp_path)
    with_adapters(model)
    batch = {"input_ids": padded(documents(0))["input_ids"]}

    def squared_hidden(model, batch, key):
        hidden, _ = model.hidden_states(batch["input_ids"])
        return jnp.sum(hidden**2), jnp.float32(hidden.shape[0] * hidden.shape[1]), {}

    losses, _ = train(model, optax.adamw(1e-2), [batch] * 3, squared_hidden)
    hidden, _ = model.hidden_states(batch["input_ids"])
    assert losses[0] == pytest.approx(float(jnp.mean(jnp.sum(hidden**2, axis=-1))), rel=1e-5)
    assert losses[2] < losses[0]


# ---- randomness ------------------------------------------------------------------------------------------------------


def test_dropout_comes_from_the_states_key_and_step(tmp_path):
    _, model = make_pair("llama", tmp_path)
    with_adapters(model, LoraConfig(r=4, lora_dropout=0.5))
    batch = padded(documents(0))
    still = optax.sgd(0.0)  # so that only the dropout differs from step to step
    graphdef, trainable, frozen = partition(model)
    step = make_train_step(graphdef, still)

    def losses(seed, batch, steps):
        state, found = TrainState.create(trainable, still, jax.random.key(seed)), []
        for _ in range(steps):
            state, metrics = step(state, frozen, batch)
            found.append(float(metrics["loss"]))
        return found

    first = losses(1, batch, 3)
    assert losses(1, batch, 3) == first
    assert len({*first, *losses(2, batch, 3)}) == 6
    # The two micro-batches drop unlike entries.
    assert losses(1, jax.tree.map(lambda x: jnp.stack([x, x]), batch), 1)[0] not in first


# ---- remat -----------------------------------------------------------------------------------------------------------


def gradients(model, batch, policy):
    model.remat_policy = policy
    graphdef, trainable, frozen = partition(model)

    @jax.jit
    def gradient(trainable, frozen):
        return jax.grad(lambda t: causal_lm_loss(nnx.merge(graphdef, t, frozen), batch, jax.random.key(3))[0])(
            trainable
        )

    return gradient(trainable, frozen)


@pytest.mark.parametrize(
    "name, quant_config, rate",
    [
        ("qwen2-windows", None, 0.0),
        ("llama", QuantConfig(), 0.2),
        ("phi3", None, 0.2),
        ("gemma4_text", QuantConfig(), 0.0),  # masks in its seven layers would be half of what is compiled
    ],
    ids=["dense", "nf4", "fused", "shared"],
)
def test_remat_changes_no_gradient(name, quant_config, rate, tmp_path):
    make_checkpoint(name, tmp_path)
    model = with_adapters(load_folder(tmp_path, quant_config=quant_config), LoraConfig(r=4, lora_dropout=rate))
    batch = packed(documents(0))
    expected = jax.tree.leaves(gradients(model, batch, "none"))
    assert all(np.any(gradient) for gradient in expected)
    for policy in list(remat.POLICIES)[1:]:
        for found, gradient in zip(jax.tree.leaves(gradients(model, batch, policy)), expected, strict=True):
            assert relative_error(found, gradient) < 2e-6, policy


def test_full_determinism_is_the_same_step_compiled_otherwise(tmp_path):
    """Layers in loops, under a compiler's option that only the outermost jit may have."""
    make_checkpoint("qwen2-windows", tmp_path)
    trained, loops = [], []
    for full_determinism in (False, True):
        model = with_adapters(load_folder(tmp_path))
        model.remat_policy = "projections"
        graphdef, trainable, frozen = partition(model)
        optimizer = optax.sgd(0.1)
        state, batch = TrainState.create(trainable, optimizer), packed(documents(0))
        step = make_train_step(graphdef, optimizer, full_determinism=full_determinism)
        loops.append(step.lower(state, frozen, batch).as_text().count("stablehlo.while"))
        if full_determinism:
            with pytest.raises(ValueError, match="compiler_options"):
                jax.jit(functools.partial(step)).lower(state, frozen, batch)
        trained.append(step(state, frozen, batch)[0].trainable)
    assert loops[0] < loops[1]
    for one, other in zip(*map(jax.tree.leaves, trained), strict=True):
        assert relative_error(one, other) < 2e-6


def residuals(model, batch, policy):
    """Shapes and dtypes of what the backward pass of a loss keeps."""
    model.remat_policy = policy
    graphdef, trainable, frozen = partition(model)

    def loss(trainable, frozen):
        return causal_lm_loss(nnx.merge(graphdef, trainable, frozen), batch)[0]

    return jax.tree.leaves(jax.eval_shape(lambda t, f: jax.vjp(lambda t: loss(t, f), t)[1], trainable, frozen))


def test_remat_policies_keep_less(tmp_path):
    _, model = make_pair("llama", tmp_path)
    with_adapters(model)
    size = {
        policy: sum(x.size * x.dtype.itemsize for x in residuals(model, packed(documents(0)), policy))
        for policy in ("none", "attention", "full")
    }
    assert size["full"] < size["attention"] < size["none"]


def test_an_unknown_policy_names_the_known_ones():
    with pytest.raises(ValueError, match=f"'some' is not one of {', '.join(remat.POLICIES)}"):
        remat.scan(lambda x, layer: (x, None), 0, jnp.ones(3), "some")
    names = ", ".join(map(repr, remat.POLICIES))
    with pytest.raises(ValueError, match=f"use_gradient_checkpointing='some' is not one of False, True, .*{names}"):
        remat.resolve("some")
    assert [remat.resolve(v) for v in (False, True, "unsloth", "full")] == ["none", "full", "offload", "full"]


# ---- a quantised base ------------------------------------------------------------------------------------------------


def test_a_quantised_weight_leaves_nothing_dense_behind(tmp_path):
    sizes = dict(hidden_size=64, intermediate_size=192, num_attention_heads=8, head_dim=16)
    make_checkpoint("llama", tmp_path, **sizes)
    batch = {k: v[:, :3] for k, v in padded(documents(0)).items()}

    def dense_weights(quant_config):
        model = with_adapters(load_folder(tmp_path, quant_config=quant_config))
        shapes = {(m.node.out_features, m.node.in_features) for m in named_nodes(model, Linear) if m.layers}
        shapes |= {shape[::-1] for shape in shapes}
        kept = residuals(model, batch, "none")
        return [x.shape for x in kept if jnp.issubdtype(x.dtype, jnp.floating) and x.shape[-2:] in shapes]

    assert len(dense_weights(None)) >= 7  # so the residuals are looked at in the right place
    assert dense_weights(QuantConfig()) == []


def test_a_quantised_model_trains_as_its_dense_image(tmp_path):
    """The gradient with NF4 weights is that of the model whose dense weights are what they dequantise to."""
    make_checkpoint("mistral", tmp_path)
    quantised, dense = (with_adapters(load_folder(tmp_path, quant_config=q)) for q in (QuantConfig(), None))
    weights = {p.name: p.node.weight.get_value() for p in named_nodes(quantised, Linear)}
    for linear in named_nodes(dense, Linear):
        value = weights[linear.name]
        if isinstance(value, QuantizedArray):
            linear.node.weight.set_value(dequantize(value))
    batches = [packed(documents(seed)) for seed in range(2)]
    optimizer = optax.adamw(3e-3, eps=1e-4)  # far above the rounding of gradients
    losses, state = train(quantised, optimizer, batches)
    losses_dense, state_dense = train(dense, optimizer, batches)
    # Here the adapter is added to the weight, there to the product: another order of the same float32 sums.
    np.testing.assert_allclose(losses, losses_dense, rtol=1e-5)
    for one, other in zip(jax.tree.leaves(state.trainable), jax.tree.leaves(state_dense.trainable), strict=True):
        assert relative_error(one, other) < 1e-4


# ---- the functional form ---------------------------------------------------------------------------------------------


def test_two_adapters_at_once_with_vmap(tmp_path):
    _, model = make_pair("qwen2", tmp_path)
    with_adapters(model)
    graphdef, trainable, frozen = partition(model)
    other = jax.tree.map(lambda x: x * 1.5, trainable)
    both = jax.tree.map(lambda *xs: jnp.stack(xs), trainable, other)
    batch = packed(documents(0))

    def loss_and_gradient(trainable):
        return jax.value_and_grad(lambda t: causal_lm_loss(nnx.merge(graphdef, t, frozen), batch)[0])(trainable)

    losses, gradients = jax.jit(jax.vmap(loss_and_gradient))(both)
    for i, one in enumerate((trainable, other)):
        loss, gradient = jax.jit(loss_and_gradient)(one)
        assert losses[i] == pytest.approx(float(loss), rel=1e-6)
        for found, expected in zip(jax.tree.leaves(gradients), jax.tree.leaves(gradient), strict=True):
            assert relative_error(found[i], expected) < 1e-5
    assert losses[0] != losses[1]


def test_a_step_compiles_once(tmp_path):
    _, model = make_pair("llama", tmp_path)
    with_adapters(model)
    graphdef, trainable, frozen = partition(model)
    optimizer = optax.adamw(1e-3)
    step, state = make_train_step(graphdef, optimizer), TrainState.create(trainable, optimizer)
    for seed in range(3):
        state, _ = step(state, frozen, padded(documents(seed)))
    assert step._cache_size() == 1
