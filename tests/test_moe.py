"""Mixture of experts: the grouped product, what routers do, and experts in 4 bits, against transformers."""

import copy
import functools
import json
import operator
import re

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
import transformers
from flax import nnx
from helpers import (
    LINEARS,
    SPARSE,
    load_folder,
    make_checkpoint,
    make_pair,
    mxfp4_checkpoint,
    random_ids,
    randomise_adapters,
    relative_error,
    scatters,
    through_bitsandbytes,
)
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from jaxlora import FastLanguageModel, remat
from jaxlora.config import LoraConfig, QuantConfig
from jaxlora.converters.bitsandbytes import BitsandbytesSource, QuantizingSource, quantization_config
from jaxlora.converters.export import save_merged, save_model
from jaxlora.converters.huggingface import CheckpointError, SafetensorsSource, load_model, model_config
from jaxlora.converters.mxfp4 import Mxfp4Source
from jaxlora.layers import Linear
from jaxlora.lora import add_adapters, partition, unfreeze
from jaxlora.loss import causal_lm_loss
from jaxlora.model import named_nodes
from jaxlora.moe import ExpertLinear, RouterLoad, SparseMLP, grouped_matmul, load_balancing_loss
from jaxlora.quant import QuantizedArray, dequantize, quantize

LORA = LoraConfig(r=3, lora_alpha=5, target_modules=LINEARS)


in_nf4 = jax.jit(quantize)


def torch_logits(model, ids):
    with torch.no_grad():
        return model(torch.tensor(ids).long()).logits


# ---- The grouped product ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("in_out", [False, True])
@pytest.mark.parametrize("quantised", [False, True])
def test_each_group_meets_its_own_matrix(in_out, quantised):
    sizes = np.array([4, 0, 5, 1, 0], np.int32)
    keys = jax.random.split(jax.random.key(0), 3)
    x, dy = jax.random.normal(keys[0], (10, 64)), jax.random.normal(keys[1], (10, 24))
    w = jax.random.normal(keys[2], (5, 64, 24) if in_out else (5, 24, 64))
    stored = in_nf4(w) if quantised else w
    dense = np.asarray(jax.jit(dequantize)(stored) if isinstance(stored, QuantizedArray) else w)
    dense = dense if in_out else dense.swapaxes(1, 2)
    groups = np.split(np.arange(10), np.cumsum(sizes)[:-1])
    expected = np.concatenate([np.asarray(x)[rows] @ dense[e] for e, rows in enumerate(groups)])
    expected_dx = np.concatenate([np.asarray(dy)[rows] @ dense[e].T for e, rows in enumerate(groups)])

    @jax.jit
    def both(x, stored):
        y, pullback = jax.vjp(lambda x: grouped_matmul(x, stored, jnp.asarray(sizes), in_out=in_out), x)
        return y, *pullback(dy)

    y, dx = both(x, stored)
    assert relative_error(y, expected) < 1e-6
    assert relative_error(dx, expected_dx) < 1e-6
    assert both(x.astype(jnp.float32), stored)[0].dtype == jnp.float32


def test_a_quantised_product_keeps_the_packed_form_only():
    w, sizes = in_nf4(jnp.ones((3, 128, 64))), jnp.array([2, 1, 1], jnp.int32)
    _, pullback = jax.vjp(lambda x: grouped_matmul(x, w, sizes), jnp.ones((4, 64)))
    kept = sum(leaf.nbytes for leaf in jax.tree.leaves(pullback))
    assert kept <= w.nbytes + sizes.nbytes < 3 * 128 * 64


def test_each_expert_is_quantised_on_its_own():
    w = jax.random.normal(jax.random.key(0), (2, 3, 8, 80))  # 80: blocks cross rows
    stored = in_nf4(w)
    assert stored.leading == (2, 3)
    for place in np.ndindex(2, 3):
        one = jax.tree.map(operator.itemgetter(place), stored)
        jax.tree.map(np.testing.assert_array_equal, one, in_nf4(w[place]))


def test_shapes_that_do_not_fit_are_refused():
    x, sizes = jnp.ones((4, 8)), jnp.array([2, 2], jnp.int32)
    with pytest.raises(TypeError, match=r"w \[experts, out, in\] .* not \[4, 8\], \[2, 8, 5\] and \[2\]"):
        grouped_matmul(x, jnp.ones((2, 8, 5)), sizes)
    with pytest.raises(TypeError, match=r"w \[experts, in, out\] .* not \[4, 8\], \[2, 5, 8\] and \[2\]"):
        grouped_matmul(x, jnp.ones((2, 5, 8)), sizes, in_out=True)


# ---- The router ------------------------------------------------------------------------------------------------------


def first_sparse(model):
    """A layer's experts, as a scan hands them out."""
    block = next(block.mlp for run in model.model.layers for block in run.period if isinstance(block.mlp, SparseMLP))
    graphdef, state = nnx.split(block)
    return nnx.merge(graphdef, jax.tree.map(lambda leaf: leaf[0], state))


def test_a_token_does_not_depend_on_the_others(tmp_path):
    mlp = first_sparse(make_pair("qwen2_moe", tmp_path)[1])
    x = jax.random.normal(jax.random.key(0), (2, 9, 48))
    forward = jax.jit(lambda x: mlp(x, [None] * 3))
    whole = forward(x)
    for row in range(2):
        for token in range(9):
            one = forward(x[row : row + 1, token : token + 1])
            assert relative_error(one[0, 0], whole[row, token]) < 1e-5


def test_gradients_are_moved_and_never_added_in_places(tmp_path):
    """Adding into places that collide, a GPU does in any order."""
    mlp = first_sparse(make_pair("mixtral", tmp_path)[1])
    gradient = jax.grad(lambda x: jnp.sum(mlp(x, [None] * 3) ** 2))
    program = jax.make_jaxpr(gradient)(jnp.ones((1, 6, 48)))
    wide = lambda program: [one for one in scatters(program.jaxpr) if one.invars[0].aval.shape[-1] == 48]
    assert not wide(program)
    assert wide(jax.make_jaxpr(jax.grad(lambda x: jnp.sum(x[jnp.zeros(2, int)] ** 2)))(jnp.ones((6, 48))))


def test_tiles_of_tokens_and_kept_projections_give_the_same_gradients(tmp_path, monkeypatch):
    _, model = make_pair("qwen2_moe", tmp_path)
    add_adapters(model, LORA, jax.random.key(0))
    randomise_adapters(model)
    graphdef, trainable, frozen = partition(model)
    batch = {name: jnp.asarray(random_ids(2, 20)) for name in ("input_ids", "labels")}

    def gradient(graphdef):
        return jax.jit(jax.grad(lambda t: causal_lm_loss(nnx.merge(graphdef, t, frozen), batch)[0]))(trainable)

    expected = gradient(graphdef)
    monkeypatch.setitem(remat.POLICIES, "full", remat.Policy(mlp_tile=7))  # smaller than the batch
    for policy in ("full", "projections"):
        model.remat_policy = policy
        found = gradient(partition(model)[0])
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5), found, expected)


def test_load_balancing_loss_at_its_ends():
    tokens = jnp.float32(10)
    even = RouterLoad(jnp.full(4, 5.0), jnp.full(4, 2.5), tokens)  # two experts a token
    one = RouterLoad(jnp.array([10.0, 10.0, 0.0, 0.0]), jnp.array([5.0, 5.0, 0.0, 0.0]), tokens)
    assert load_balancing_loss(even) == 2.0
    assert load_balancing_loss(one) == 4.0


@pytest.mark.parametrize("name", [name for name in SPARSE if name != "gemma4_text-experts"])  # which has none there
def test_the_loss_with_load_balancing_equals_transformers(name, tmp_path):
    theirs, _ = make_pair(name, tmp_path, output_router_logits=True, router_aux_loss_coef=0.3)
    ours = load_folder(tmp_path)
    assert ours.config.router_aux_loss_coef == 0.3
    ids, mask = random_ids(3, 15), np.ones((3, 15), np.int32)
    mask[1, 9:] = mask[2, 4:] = 0
    labels = np.where(mask == 1, ids, -100)
    arguments = dict(attention_mask=torch.tensor(mask), labels=torch.tensor(labels).long())
    expected = theirs(torch.tensor(ids).long(), output_router_logits=True, **arguments)
    plain = theirs(torch.tensor(ids).long(), output_router_logits=False, **arguments)
    batch = dict(input_ids=jnp.asarray(ids), labels=jnp.asarray(labels), segment_ids=jnp.asarray(mask))

    # The gradient of a router, through both parts of the loss.
    unfreeze(ours)
    graphdef, trainable, frozen = partition(ours)

    def loss(trainable, coefficient):
        model = nnx.merge(graphdef, trainable, frozen)
        total, weight, metrics = causal_lm_loss(model, batch, router_aux_loss_coef=coefficient)
        return total / weight, (metrics, weight)

    (found, (metrics, weight)), gradient = jax.jit(jax.value_and_grad(lambda t: loss(t, None), has_aux=True))(trainable)
    assert relative_error(found, expected.loss.item()) < 1e-5
    assert relative_error(metrics["router_aux_loss"] / weight, expected.aux_loss.item()) < 1e-5
    without, (metrics, _) = jax.jit(lambda t: loss(t, 0.0))(trainable)
    assert relative_error(without, plain.loss.item()) < 1e-5
    assert metrics == {}
    expected.loss.backward()
    nnx.update(ours, gradient)
    routers = [p for p in named_nodes(ours, nnx.Variable) if _own_name(p).endswith(".mlp.gate.weight")]
    assert routers
    modules = [m for m in theirs.modules() if type(m).__name__.endswith("TopKRouter")]
    found_gradients = {}
    for parameter in routers:
        for index, layer in enumerate(parameter.layers):
            found_gradients[layer] = parameter.node.get_value()[index]
    for layer, module in zip(sorted(found_gradients), modules, strict=True):
        assert relative_error(found_gradients[layer], module.weight.grad) < 1e-4


def test_the_load_of_experts_beside_an_mlp(tmp_path):
    """transformers gives Gemma 4 no such loss; this is Mixtral's, of Gemma 4's probabilities."""
    theirs, ours = make_pair("gemma4_text-experts", tmp_path)
    ids, mask = random_ids(3, 15), np.ones((3, 15), np.int32)
    mask[1, 9:] = mask[2, 4:] = 0
    with torch.no_grad():
        arguments = dict(attention_mask=torch.tensor(mask), output_router_logits=True)
        found = theirs(torch.tensor(ids).long(), **arguments).router_logits
    scores = tuple(torch.log(probabilities) for probabilities in found)
    expected = load_balancing_loss_func(scores, 6, 3, torch.tensor(mask))
    _, load = ours.hidden_states_and_load(jnp.asarray(ids), segment_ids=jnp.asarray(mask))
    assert relative_error(load_balancing_loss(load), expected.item()) < 1e-5


def _own_name(parameter):
    """A parameter's name with the router called as in Qwen's files."""
    return re.sub(r"\.(router\.layer|router)\.", ".gate.", parameter.name.replace("block_sparse_moe", "mlp"))


def test_a_model_without_experts_has_no_load(tmp_path):
    _, model = make_pair("llama", tmp_path)
    ids = jnp.asarray(random_ids(1, 5))
    hidden, load = model.hidden_states_and_load(ids)
    assert load is None
    np.testing.assert_array_equal(hidden, model.hidden_states(ids)[0])


# ---- Files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SPARSE)
def test_experts_in_4_bits_are_those_of_bitsandbytes(name, tmp_path):
    theirs = make_checkpoint(name, tmp_path)
    ours = load_folder(tmp_path, quant_config=QuantConfig())
    experts = [e.node.weight.get_value() for e in named_nodes(ours, ExpertLinear)]
    assert experts and all(isinstance(weight, QuantizedArray) for weight in experts)
    before = copy.deepcopy(theirs)
    fused = ours.config.fused_experts is not None
    with torch.no_grad():
        for module in theirs.modules():
            if type(module).__name__.endswith("Experts"):
                for weight in module.gate_up_proj:
                    for part in [weight] if fused else weight.chunk(2):
                        part.copy_(through_bitsandbytes(part))
                for weight in module.down_proj:
                    weight.copy_(through_bitsandbytes(weight))
        for linear in named_nodes(ours, Linear):
            weight = linear.node.weight  # None for a tied head
            held_in_4_bits = weight is not None and isinstance(weight.get_value(), QuantizedArray)
            for one in linear.names() if held_in_4_bits else ():
                weight = theirs.get_submodule(one).weight
                weight.copy_(through_bitsandbytes(weight))
    ids = random_ids(2, 14)
    logits = ours(jnp.asarray(ids))
    assert relative_error(logits, torch_logits(theirs, ids)) < 1e-4
    assert relative_error(logits, torch_logits(before, ids)) > 1e-3


@pytest.mark.parametrize("name", SPARSE)
def test_exports_load_in_transformers_under_the_names_of_the_original(name, tmp_path):
    theirs = make_checkpoint(name, tmp_path / "base")
    ids = random_ids(2, 14)
    ours = load_folder(tmp_path / "base")

    def reloaded(folder):
        return transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")

    save_model(ours, tmp_path / "whole")
    original, written = SafetensorsSource(tmp_path / "base"), SafetensorsSource(tmp_path / "whole")
    assert set(original.names()) == set(written.names())
    for one in original.names():
        np.testing.assert_array_equal(original.read(one), written.read(one))
    assert torch.equal(torch_logits(reloaded(tmp_path / "whole"), ids), torch_logits(theirs, ids))

    add_adapters(ours, LORA, jax.random.key(0))
    randomise_adapters(ours)
    report = save_merged(ours, tmp_path / "merged", base=tmp_path / "base")
    assert report.merged_modules == sum(len(linear.names()) for linear in named_nodes(ours, Linear) if linear.layers)
    assert relative_error(ours(jnp.asarray(ids)), torch_logits(reloaded(tmp_path / "merged"), ids)) < 2e-5
    assert relative_error(ours(jnp.asarray(ids)), torch_logits(theirs, ids)) > 1e-2


def write_in_4_bits(base, folder, quantised):
    """A checkpoint of `base` as transformers 4 wrote it in 4 bits, when each expert was a linear."""
    folder.mkdir()
    source = QuantizingSource(SafetensorsSource(base), quantised)
    arrays = {name: np.ascontiguousarray(source.read(name)) for name in source.names()}
    safetensors.numpy.save_file(arrays, folder / "model.safetensors")
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"] = quantization_config("float32", [])
    (folder / "config.json").write_text(json.dumps(config))
    return BitsandbytesSource(SafetensorsSource(folder), config["quantization_config"]), config


def test_4_bit_checkpoints_of_single_experts_are_read_as_they_are(tmp_path):
    make_checkpoint("qwen2_moe", tmp_path / "base")
    expected = load_folder(tmp_path / "base", quant_config=QuantConfig())
    projections = [n for n in SafetensorsSource(tmp_path / "base").names() if n.endswith("_proj.weight")]
    source, config = write_in_4_bits(tmp_path / "base", tmp_path / "four", projections)
    found = load_model(source, config, dtype=jnp.float32, quant_config=source.quant_config())
    jax.tree.map(np.testing.assert_array_equal, nnx.state(found), nnx.state(expected))
    # Some files have the routers in 4 bits, too, which are dequantised.
    routers = [n for n in SafetensorsSource(tmp_path / "base").names() if n.endswith("mlp.gate.weight")]
    source, config = write_in_4_bits(tmp_path / "base", tmp_path / "all", [*projections, *routers])
    found = load_model(source, config, dtype=jnp.float32, quant_config=source.quant_config())
    for parameter in named_nodes(found, nnx.Variable):
        if parameter.name.endswith(".mlp.gate.weight"):
            exact = np.stack([SafetensorsSource(tmp_path / "base").read(name) for name in parameter.names()])
            assert 1e-3 < relative_error(parameter.node.get_value(), exact) < 0.2
    # What leaves the experts as they are, as transformers 5 does, is another model than the one with all in 4 bits.
    with pytest.raises(NotImplementedError, match="leaves 36 projections unquantised .*experts"):
        write_in_4_bits(tmp_path / "base", tmp_path / "some", [n for n in projections if "experts." not in n])


def test_all_linears_are_neither_routers_nor_experts(tmp_path):
    _, model = make_pair("qwen2_moe", tmp_path)
    add_adapters(model, LoraConfig(r=2), jax.random.key(0))
    adapted = {
        x.name.rsplit(".", 2)[-2] + "." + x.name.rsplit(".", 1)[-1] for x in named_nodes(model, Linear) if x.layers
    }
    assert {name.split(".")[0] for name in adapted} == {"self_attn", "mlp", "shared_expert"}
    with pytest.raises(ValueError, match="'shared_expert_gate' matches no linear layer"):
        add_adapters(model, LoraConfig(r=2, target_modules=["shared_expert_gate"]), jax.random.key(0))


def test_every_expert_must_be_there(tmp_path):
    make_checkpoint("mixtral", tmp_path, num_local_experts=5)
    path = tmp_path / "config.json"
    path.write_text(path.read_text().replace('"num_local_experts": 5', '"num_local_experts": 6'))
    with pytest.raises(ValueError, match=r"9 missing: model.layers.0.block_sparse_moe.experts.5.w1.weight"):
        load_folder(tmp_path)


def test_more_experts_a_token_than_there_are_are_refused():
    with pytest.raises(
        ValueError, match=r"num_experts_per_tok \(9\) must lie between 1 and the number of experts \(8\)"
    ):
        model_config({"model_type": "mixtral", "num_experts_per_tok": 9})


# ---- mxfp4 -----------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*has no tokenizer files:UserWarning")
def test_an_mxfp4_checkpoint_is_what_transformers_makes_of_it(tmp_path):
    theirs = mxfp4_checkpoint(tmp_path / "base")
    load = functools.partial(FastLanguageModel.from_pretrained, dtype="float32", use_gradient_checkpointing=False)
    ours, _ = load(tmp_path / "base", load_in_16bit=True)
    weights = theirs.state_dict()
    for linear in named_nodes(ours, ExpertLinear):
        name = linear.name.format(*linear.layers[:1])
        np.testing.assert_array_equal(linear.node.weight.get_value()[0], weights[name])
    ids = random_ids(2, 14)
    assert relative_error(ours(jnp.asarray(ids)), torch_logits(theirs, ids)) < 2e-5
    quantised, _ = load(tmp_path / "base")
    assert all(isinstance(e.node.weight.get_value(), QuantizedArray) for e in named_nodes(quantised, ExpertLinear))

    # A merge leaves the experts' bytes alone.
    ours = FastLanguageModel.get_peft_model(ours, r=3, target_modules=["q_proj", "o_proj"])
    randomise_adapters(ours)
    ours.save_pretrained_merged(tmp_path / "merged")
    base, merged = SafetensorsSource(tmp_path / "base"), SafetensorsSource(tmp_path / "merged")
    changed = {name for name in base.names() if not np.array_equal(base.read(name), merged.read(name))}
    assert changed == {f"model.layers.{i}.self_attn.{p}_proj.weight" for i in range(3) for p in "qo"}
    again, _ = load(tmp_path / "merged", load_in_16bit=True)
    assert relative_error(again(jnp.asarray(ids)), ours(jnp.asarray(ids))) < 2e-2  # the merged weights are bfloat16
    assert relative_error(again(jnp.asarray(ids)), torch_logits(theirs, ids)) > 5e-2


def test_mxfp4_with_a_part_missing(tmp_path):
    mxfp4_checkpoint(tmp_path)
    tensors = safetensors.torch.load_file(tmp_path / "model.safetensors")
    name = "model.layers.1.mlp.experts.down_proj_scales"
    whole = tensors.pop(name)
    for change, message in (
        ({}, "down_proj_blocks is there and .*down_proj_scales is not: download"),
        (
            {name: whole[:, :1].contiguous()},
            r"blocks is \[5, 64, 1, 16\] and .*_scales \[5, 1, 1\], expected",
        ),
    ):
        safetensors.torch.save_file(tensors | change, tmp_path / "model.safetensors")
        with pytest.raises(CheckpointError, match=message):
            Mxfp4Source(SafetensorsSource(tmp_path))
