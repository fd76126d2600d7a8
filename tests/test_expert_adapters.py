"""Adapters on experts (`target_parameters`), against PEFT on the models of transformers."""

import dataclasses
import json
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import safetensors.torch
import torch
import transformers
from flax import nnx
from helpers import (
    SPARSE,
    load_folder,
    make_checkpoint,
    mxfp4_checkpoint,
    random_ids,
    randomise_adapters,
    relative_error,
    scatters,
    through_bitsandbytes,
)
from safetensors.numpy import load_file
from walk import IDS, largest_difference, logits_of, peft_model, save_peft, walk

from jaxlora import (
    FastLanguageModel,
    SamplingParams,
    lora,
    new_adapter,
    put_adapter,
    quant,
    sharding,
    stack_adapters,
    take_adapter,
)
from jaxlora.config import LoraConfig, QuantConfig
from jaxlora.converters import peft as ours
from jaxlora.converters.huggingface import CheckpointError, SafetensorsSource
from jaxlora.kernels.grouped import grouped_lora_delta
from jaxlora.kernels.lora import lora_delta
from jaxlora.layers import Linear
from jaxlora.lora import add_adapters, partition
from jaxlora.loss import causal_lm_loss
from jaxlora.model import named_nodes
from jaxlora.moe import ExpertLinear

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]


# ---- Around between PEFT, transformers and here ----------------------------------------------------------------------


@pytest.mark.parametrize("name", SPARSE)
def test_adapters_on_experts_walk_around(name, tmp_path):
    # The tiny Qwen3.5 has logits up to 10, of which 2e-5 is what is asked without adapters.
    bound = 2e-4 if name.startswith("qwen3_5") else 5e-5
    model, config = walk(name, tmp_path, bound=bound, target_modules=ATTENTION, target_parameters=EXPERTS)
    assert set(config.target_parameters or ()) == set(EXPERTS)
    written = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    assert set(written["target_parameters"]) == set(EXPERTS)
    # A merge changes what the adapters are on, under the names and in the cut of the original.
    base, merged = SafetensorsSource(tmp_path / "base"), SafetensorsSource(tmp_path / "merged")
    assert set(base.names()) == set(merged.names())
    changed = {one for one in base.names() if not np.array_equal(base.read(one), merged.read(one))}
    experts = {one for linear in named_nodes(model, ExpertLinear) for one in named_weights(model, linear.node)}
    attention = {f"{x.name.format(i)}.weight" for x in lora.adapters(model) for i in x.layers if "attn" in x.name}
    assert changed == experts | attention


def named_weights(model, linear):
    """The names of the checkpoint's tensors that an `ExpertLinear` holds."""
    return next(p.names() for p in named_nodes(model, nnx.Variable) if p.node is linear.weight)


# PEFT looks for these among modules only, but heeds them.
pattern_warning = pytest.mark.filterwarnings(
    "ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning"
)

SELECTIONS = {
    "experts-alone": dict(target_modules=[], target_parameters=EXPERTS[1:]),
    "gate-and-up": dict(target_modules=["q_proj"], target_parameters=["mlp.experts.gate_up_proj"], use_rslora=True),
    "paths": dict(
        target_modules=["q_proj"],
        target_parameters=["model.layers.2.mlp.experts.down_proj", "gate_up_proj"],
        rank_pattern={r"layers\.2\..*gate_up_proj": 6, "experts.down_proj": 2},
        alpha_pattern={"gate_up_proj": 11.5},
    ),
}


@pattern_warning
@pytest.mark.parametrize("option", SELECTIONS)
def test_selections_of_parameters_walk_around(option, tmp_path):
    walk("mixtral", tmp_path, **SELECTIONS[option])


@pytest.mark.parametrize("name", [one for one in SPARSE if one != "mixtral"])
@pattern_warning
@pytest.mark.parametrize("option", SELECTIONS)
def test_fresh_adapters_are_on_pefts_parameters(option, name, tmp_path):
    path = {"granitemoe": "block_sparse_moe.experts", "gemma4_text-experts": "experts"}.get(name, "mlp.experts")
    options = dict(SELECTIONS[option])
    options["target_parameters"] = [one.replace("mlp.experts", path) for one in options["target_parameters"]]
    theirs = peft_model(make_checkpoint(name, tmp_path), **options)
    model = load_folder(tmp_path)
    add_adapters(model, LoraConfig(r=4, **options), jax.random.key(0))
    shapes = {key: value.shape for key, value in ours.adapter_tensors(model).items()}
    state = peft.get_peft_model_state_dict(theirs)
    assert shapes == {key: tuple(value.shape) for key, value in state.items()}
    assert lora.get_nb_trainable_parameters(model) == theirs.get_nb_trainable_parameters()


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe-plain"])
def test_what_peft_makes_of_modules_that_were_experts(name, tmp_path):
    """Each expert was a linear in transformers 4. PEFT takes these names for the parameters, gate_up_proj at twice the
    rank, and says so in adapter_config.json."""
    theirs = make_checkpoint(name, tmp_path / "base")
    modules = ["w1", "w2", "w3"] if name == "mixtral" else ["gate_proj", "up_proj", "down_proj"]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The following .*_pattern keys", RuntimeWarning)
        theirs = peft_model(theirs, target_modules=["q_proj", *modules])
    save_peft(theirs, tmp_path / "adapter")
    model = load_folder(tmp_path / "base")
    config = ours.load_adapter(model, tmp_path / "adapter")
    ranks = {x.name.rsplit(".", 1)[-1]: max(x.node.lora_ranks) for x in lora.adapters(model)}
    assert ranks == {"q_proj": 4, "gate_up_proj": 8, "down_proj": 4}
    assert set(config.target_parameters or ()) == {"gate_up_proj", "down_proj"}
    assert largest_difference(model(jnp.asarray(IDS)), logits_of(theirs)) < 5e-5


@pytest.mark.parametrize("kind", [True, False, "gaussian"])
def test_experts_start_as_pefts(kind, tmp_path):
    theirs = make_checkpoint("qwen3_moe", tmp_path)
    model = load_folder(tmp_path)
    options = dict(r=8, target_modules=[], target_parameters=EXPERTS, init_lora_weights=kind)
    before = model(jnp.asarray(IDS))
    add_adapters(model, LoraConfig(**options), jax.random.key(0))
    assert (largest_difference(model(jnp.asarray(IDS)), before) == 0.0) == (kind is not False)
    tensors = ours.adapter_tensors(model)
    torch.manual_seed(0)
    state = peft.get_peft_model_state_dict(peft.get_peft_model(theirs, peft.LoraConfig(**options)))
    for key, expected in state.items():
        found = tensors[key]
        assert found.std() == pytest.approx(float(expected.std()), rel=0.1, abs=1e-9)
        if kind != "gaussian" and found.any():  # uniform, up to a bound
            assert np.abs(found).max() == pytest.approx(float(expected.abs().max()), rel=0.05)


@pytest.mark.parametrize("inner", [80, 48])
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_files_of_older_versions_of_peft(name, inner, tmp_path):
    """Before 0.19.1 an expert's delta was [in, out] = (B_e A_e)^T whatever its parameter's orientation."""
    theirs = make_checkpoint(name, tmp_path / "base", intermediate_size=inner)  # 48: of down_proj inputs and outputs
    tensors, generator = {}, torch.Generator().manual_seed(0)
    for path, module in theirs.named_modules():
        if path.endswith("experts"):
            for parameter, wrapper in (("gate_up_proj", "experts.base_layer"), ("down_proj", "experts")):
                weight = module.get_parameter(parameter)
                experts, d0, d1 = weight.shape
                shapes = (experts * 3, d0), (d1, 3 * experts)
                a, b = (torch.empty(shape).normal_(0.0, 0.1, generator=generator) for shape in shapes)
                parts = b.reshape(d1, 3, experts), a.reshape(experts, 3, d0)
                weight.data += 2.0 * torch.einsum("ore,eri->eio", *parts)
                prefix = f"base_model.model.{path.removesuffix('experts')}{wrapper}"
                tensors |= {f"{prefix}.lora_A.weight": a, f"{prefix}.lora_B.weight": b}
    (tmp_path / "adapter").mkdir()
    safetensors.torch.save_file(tensors, tmp_path / "adapter" / "adapter_model.safetensors")
    options = dict(peft_type="LORA", r=3, lora_alpha=6, target_modules=[], target_parameters=EXPERTS)
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(options | dict(peft_version="0.18.2.dev0")))
    model = load_folder(tmp_path / "base")
    config = ours.load_adapter(model, tmp_path / "adapter")
    logits = model(jnp.asarray(IDS))
    assert largest_difference(logits, logits_of(theirs)) < 5e-5
    ours.save_adapter(model, tmp_path / "ours", config=config, base=str(tmp_path / "base"))
    newer = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "ours", attn_implementation="eager")
    assert largest_difference(logits, logits_of(newer)) < 5e-5
    again = load_folder(tmp_path / "base")
    ours.load_adapter(again, tmp_path / "ours")
    np.testing.assert_array_equal(again(jnp.asarray(IDS)), logits)
    path.write_text(json.dumps(options))
    if inner == 48 and name == "mixtral":
        with pytest.raises(CheckpointError, match="adapter_config.json: .* are as many, 48, and without peft_version"):
            ours.load_adapter(load_folder(tmp_path / "base"), tmp_path / "adapter")
    else:
        ours.load_adapter(load_folder(tmp_path / "base"), tmp_path / "adapter")


# ---- Computing -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("padded", [False, True])
def test_each_group_has_its_own_low_rank_update(dtype, padded):
    sizes, r = np.array([4, 0, 5, 1, 0], np.int32), 3
    keys = jax.random.split(jax.random.key(0), 4)
    x, dy = (jax.random.normal(k, (10, n)).astype(dtype) for k, n in zip(keys[:2], (16, 24), strict=True))
    a, b = jax.random.normal(keys[2], (5, r, 16)), jax.random.normal(keys[3], (5, 24, r))
    scaling = jnp.array([0.7, 0.7, 0.0]) if padded else jnp.float32(0.7)
    groups = np.split(np.arange(10), np.cumsum(sizes)[:-1])

    @jax.jit
    def both(x, a, b, dy):
        y, pullback = jax.vjp(lambda x, a, b: grouped_lora_delta(x, a, b, scaling, jnp.asarray(sizes)), x, a, b)
        return y, *pullback(dy)

    @jax.jit
    def one_by_one(x, a, b, dy):
        parts = [jax.vjp(lambda x, a, b: lora_delta(x, a, b, scaling), x[g], a[e], b[e]) for e, g in enumerate(groups)]
        pulled = [pullback(dy[g]) for (_, pullback), g in zip(parts, groups, strict=True)]
        of_x, of_a, of_b = zip(*pulled, strict=True)
        return jnp.concatenate([y for y, _ in parts]), jnp.concatenate(of_x), jnp.stack(of_a), jnp.stack(of_b)

    found, expected = both(x, a, b, dy), one_by_one(x, a, b, dy)
    assert [one.dtype for one in found] == [dtype, dtype, jnp.float32, jnp.float32]
    for one, other in zip(found, expected, strict=True):
        assert relative_error(one, other) < (1e-6 if dtype == jnp.float32 else 1e-2)
    _, _, of_a, of_b = found
    assert not np.any(of_a[1]) and not np.any(of_b[4])  # experts without a row
    if padded:
        assert not np.any(of_a[:, 2]) and not np.any(of_b[:, :, 2])


def adapted(folder, name="mixtral", quant_config=None, dtype=jnp.float32, **options):
    model = load_folder(folder, dtype, quant_config)
    options = {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj"], "target_parameters": EXPERTS} | options
    config = LoraConfig(**options)
    add_adapters(model, config, jax.random.key(0))
    randomise_adapters(model)
    return model, config


def gradient_of(model):
    graphdef, trainable, frozen = partition(model)
    batch = {"input_ids": jnp.asarray(IDS), "labels": jnp.asarray(IDS)}
    return jax.jit(jax.grad(lambda t: causal_lm_loss(nnx.merge(graphdef, t, frozen), batch)[0]))(trainable)


def test_checkpointing_and_16_bit_experts_change_nothing_but_rounding(tmp_path):
    make_checkpoint("gpt_oss-plain", tmp_path)  # each token goes to all experts, so that rounding changes no choice
    model, _ = adapted(tmp_path)
    expected = gradient_of(model)
    for policy in ("full", "projections"):
        model.remat_policy = policy
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-4, atol=2e-5), gradient_of(model), expected)
    narrow, _ = adapted(tmp_path, dtype=jnp.bfloat16)
    for found, wanted in zip(jax.tree.leaves(gradient_of(narrow)), jax.tree.leaves(expected), strict=True):
        assert found.dtype == jnp.float32
        assert np.linalg.norm(found - wanted) < 0.1 * np.linalg.norm(wanted)


def test_gradients_of_adapters_are_never_added_in_places(tmp_path):
    make_checkpoint("mixtral", tmp_path)
    model, _ = adapted(tmp_path, target_modules=[])
    graphdef, trainable, frozen = partition(model)

    def loss(trainable):
        hidden, _ = nnx.merge(graphdef, trainable, frozen).hidden_states(jnp.asarray(IDS))
        return jnp.sum(hidden**2)

    wide = lambda program: [one for one in scatters(program.jaxpr) if one.invars[0].aval.shape[-1] in (48, 80)]
    assert not wide(jax.make_jaxpr(jax.grad(loss))(trainable))
    assert wide(jax.make_jaxpr(jax.grad(lambda x: jnp.sum(x[jnp.zeros(2, int)] ** 2)))(jnp.ones((6, 48))))


@pytest.mark.parametrize("name", SPARSE)
def test_adapters_on_nf4_experts_equal_pefts_on_dequantised_ones(name, tmp_path):
    theirs = make_checkpoint(name, tmp_path / "base")
    model, config = adapted(tmp_path / "base", quant_config=QuantConfig(), target_modules=ATTENTION)
    fused = model.config.fused_experts is not None
    with torch.no_grad():
        for module in theirs.modules():
            if type(module).__name__.endswith("Experts"):
                for weight in module.gate_up_proj:
                    for part in [weight] if fused else weight.chunk(2):
                        part.copy_(through_bitsandbytes(part))
                for weight in module.down_proj:
                    weight.copy_(through_bitsandbytes(weight))
        for linear in named_nodes(model, Linear):
            is_quantised = isinstance(linear.node.weight.get_value(), quant.QuantizedArray) if linear.layers else False
            for one in linear.names() if is_quantised else ():
                weight = theirs.get_submodule(one).weight
                weight.copy_(through_bitsandbytes(weight))
    ours.save_adapter(model, tmp_path / "adapter", config=config, base=str(tmp_path / "base"))
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter", is_trainable=True)
    assert relative_error(model(jnp.asarray(IDS)), logits_of(theirs)) < 1e-4

    theirs(torch.tensor(IDS).long(), labels=torch.tensor(IDS).long()).loss.backward()
    tokens = (IDS.shape[1] - 1) * IDS.shape[0]
    nnx.update(model, jax.tree.map(lambda x: x / tokens, gradient_of(model)))
    found = ours.adapter_tensors(model)
    expected = {k.replace(".default", ""): p.grad for k, p in theirs.named_parameters() if p.requires_grad}
    assert found.keys() == expected.keys()
    for key, gradient in expected.items():
        assert relative_error(found[key], gradient) < 1e-4, key


# ---- Many adapters ---------------------------------------------------------------------------------------------------


def test_adapters_on_experts_come_off_and_go_on(tmp_path):
    make_checkpoint("qwen2_moe", tmp_path)
    model, config = adapted(tmp_path)
    before, tensors = model(jnp.asarray(IDS)), ours.adapter_tensors(model)
    adapter = take_adapter(model, config)
    assert not lora.adapters(model)
    assert largest_difference(model(jnp.asarray(IDS)), before) > 1e-2
    put_adapter(model, adapter)
    np.testing.assert_array_equal(model(jnp.asarray(IDS)), before)
    jax.tree.map(np.testing.assert_array_equal, ours.adapter_tensors(model), tensors)


def test_a_stack_of_adapters_on_experts_computes_as_each_alone(tmp_path):
    make_checkpoint("mixtral", tmp_path)
    model = load_folder(tmp_path)
    options = dict(target_modules=["q_proj"], init_lora_weights=False)
    configs = [
        LoraConfig(r=2, target_parameters=EXPERTS, **options),
        LoraConfig(r=4, lora_alpha=3, target_parameters=EXPERTS[:1], **options),
    ]
    adapters = [new_adapter(model, config, jax.random.key(i)) for i, config in enumerate(configs)]
    stack = stack_adapters(model, adapters)
    batch = {"input_ids": jnp.asarray(IDS), "labels": jnp.asarray(IDS)}

    def loss(trainable, frozen):
        return causal_lm_loss(nnx.merge(stack.graphdef, trainable, frozen), batch)[0]

    values, gradients = jax.jit(jax.vmap(jax.value_and_grad(loss), in_axes=(0, stack.frozen_axes)))(
        stack.trainable, stack.frozen
    )
    for adapter, value, learnt in zip(adapters, values, stack.unstack(gradients), strict=True):
        put_adapter(model, adapter)
        graphdef, trainable, frozen = partition(model)
        alone = lambda t, g=graphdef, f=frozen: causal_lm_loss(nnx.merge(g, t, f), batch)[0]
        expected, gradient = jax.jit(jax.value_and_grad(alone))(trainable)
        assert relative_error(value, expected) < 1e-5
        nnx.update(model, gradient)
        wanted = ours.adapter_tensors(model)
        take_adapter(model, adapter.config)
        put_adapter(model, learnt)
        found = ours.adapter_tensors(model)
        take_adapter(model, adapter.config)
        assert found.keys() == wanted.keys()
        for key, value in wanted.items():
            assert relative_error(found[key], value) < 1e-4, key


# ---- The door --------------------------------------------------------------------------------------------------------

load = dict(load_in_16bit=True, dtype="float32", use_gradient_checkpointing=False)


@pytest.mark.filterwarnings("ignore:.*has no tokenizer files:UserWarning")
def test_through_the_door(tmp_path, capsys):
    make_checkpoint("mixtral", tmp_path / "base")
    model, _ = FastLanguageModel.from_pretrained(tmp_path / "base", **load)
    parameters = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    # The default target_modules name gate_proj and its kin, which here are the experts' own.
    model = FastLanguageModel.get_peft_model(model, r=3, target_parameters=parameters)
    randomise_adapters(model)
    model.print_trainable_parameters()
    per_expert = (48 + 160) + (80 + 48)
    attention = (48 + 60) + 2 * (48 + 20) + (60 + 48)
    assert f"trainable params: {3 * 3 * (5 * per_expert + attention):,d} ||" in capsys.readouterr().out
    with pytest.warns(UserWarning, match="already has these LoRA adapters"):
        FastLanguageModel.get_peft_model(model, r=3, target_parameters=["experts.down_proj", "gate_up_proj"])
    with pytest.raises(TypeError, match="with other settings"):
        FastLanguageModel.get_peft_model(model, r=3, target_parameters=parameters[:1])
    model.save_pretrained(tmp_path / "adapter")
    again, _ = FastLanguageModel.from_pretrained(tmp_path / "adapter", **load)
    logits = model(jnp.asarray(IDS))
    np.testing.assert_array_equal(again(jnp.asarray(IDS)), logits)
    theirs = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", attn_implementation="eager")
    assert largest_difference(logits, logits_of(theirs)) < 5e-5
    again.load_adapter(tmp_path / "adapter", "second")
    again.set_adapter("second")
    np.testing.assert_array_equal(again(jnp.asarray(IDS)), logits)
    with pytest.raises(ValueError, match="an adapter with target_parameters cannot be added"):
        again.add_weighted_adapter(["default", "second"], [0.5, 0.5], "sum")
    report = again.save_pretrained_merged(tmp_path / "merged")
    assert report is not None and report.merged_modules == 3 * (4 + 5 * 3)
    quantised, _ = FastLanguageModel.from_pretrained(tmp_path / "adapter", load_in_4bit=True, dtype="float32")
    report = quantised.save_pretrained_merged(tmp_path / "again")
    assert report is not None and report.quantisation_gap is not None and report.quantisation_gap > 1e-3
    for name in SafetensorsSource(tmp_path / "merged").names():
        one, other = (SafetensorsSource(tmp_path / folder).read(name) for folder in ("merged", "again"))
        np.testing.assert_array_equal(one, other)


@pytest.mark.filterwarnings("ignore:.*has no tokenizer files:UserWarning")
def test_the_engine_takes_adapters_on_experts(tmp_path):
    make_checkpoint("granitemoe", tmp_path / "base")
    model, _ = FastLanguageModel.from_pretrained(tmp_path / "base", fast_inference=True, max_lora_rank=4, **load)
    model = FastLanguageModel.get_peft_model(model, r=3, target_modules=["q_proj"], target_parameters=EXPERTS)
    randomise_adapters(model)
    prompt = random_ids(1, 7)[0].tolist()
    (answer,) = model.fast_generate([prompt], SamplingParams(temperature=0.0, max_tokens=9))
    expected = model.generate([prompt], max_new_tokens=9)
    assert list(answer.outputs[0].token_ids) == expected[0, 7:].tolist()


def test_an_mxfp4_base_becomes_bfloat16_under_adapters_on_experts(tmp_path):
    theirs = mxfp4_checkpoint(tmp_path / "base")
    with pytest.warns(UserWarning, match="has no tokenizer files"):
        model, _ = FastLanguageModel.from_pretrained(tmp_path / "base", **load)
    model = FastLanguageModel.get_peft_model(model, r=3, target_modules=[], target_parameters=EXPERTS)
    randomise_adapters(model)
    model.save_pretrained_merged(tmp_path / "merged")
    merged = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "merged", dtype=torch.float32, attn_implementation="eager"
    )
    assert relative_error(model(jnp.asarray(IDS)), logits_of(merged)) < 2e-2  # the weights are rounded to bfloat16
    assert relative_error(model(jnp.asarray(IDS)), logits_of(theirs)) > 5e-2


def test_a_mesh_splits_adapters_on_experts(tmp_path):
    make_checkpoint("mixtral", tmp_path)
    model, _ = adapted(tmp_path)
    (node,) = (x.node for x in lora.adapters(model) if x.name.endswith("gate_up_proj"))
    mesh = sharding.make_mesh(fsdp=2, tensor=2)
    specs = [
        sharding.variable_sharding(v.get_value(), v.get_metadata()["axes"], mesh).spec
        for v in (node.lora_A, node.lora_B)
    ]
    assert specs == [jax.P(None, None, None, "fsdp"), jax.P(None, None, "tensor")]


# ---- What is refused -------------------------------------------------------------------------------------------------


def test_parameters_that_are_not_there(tmp_path):
    make_checkpoint("granitemoe", tmp_path / "experts")
    make_checkpoint("llama", tmp_path / "dense")
    model = load_folder(tmp_path / "experts")
    known = r"block_sparse_moe.experts.down_proj, block_sparse_moe.experts.gate_up_proj"
    for target, message in (
        ("mlp.experts.gate_up_proj", f"'mlp.experts.gate_up_proj' matches no parameter.* {known}"),
        (
            "q_proj.weight",
            f"matches model.layers.0.self_attn.q_proj.weight, which is no parameter of experts.* {known}",
        ),
        ("router.layer.weight", f"router.layer.weight, which is no parameter of experts.* {known}"),
    ):
        with pytest.raises(ValueError, match=message):
            add_adapters(model, LoraConfig(target_modules=[], target_parameters=[target]), jax.random.key(0))
    with pytest.raises(ValueError, match="matches no parameter. Those of this llama model.*: none"):
        config = LoraConfig(target_parameters=EXPERTS)
        add_adapters(load_folder(tmp_path / "dense"), config, jax.random.key(0))
    with pytest.raises(ValueError, match="'gate_proj' matches no linear layer of this granitemoe"):
        add_adapters(model, LoraConfig(target_modules=["q_proj", "gate_proj"]), jax.random.key(0))
    with pytest.raises(ValueError, match="'qproj' matches no linear layer of this granitemoe"):
        add_adapters(model, LoraConfig(target_modules=["qproj"], target_parameters=EXPERTS), jax.random.key(0))
    assert not lora.adapters(model)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(lora_dropout=0.1), "target_parameters does not work with lora_dropout.*found 0.1"),
        (dict(use_dora=True), "target_parameters does not work with use_dora=True"),
        (dict(init_lora_weights="pissa"), "does not work with init_lora_weights='pissa'"),
        (dict(init_lora_weights="orthogonal", r=4), "does not work with init_lora_weights='orthogonal'"),
    ],
)
def test_what_peft_refuses_is_refused(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        LoraConfig(target_modules=[], target_parameters=EXPERTS, **options)
    theirs = make_checkpoint("qwen3_moe", tmp_path)
    with pytest.raises((ValueError, AttributeError)):
        peft.get_peft_model(theirs, peft.LoraConfig(target_modules=[], target_parameters=EXPERTS, **options))


def test_a_text_is_no_list_of_parameters():
    with pytest.raises(TypeError, match="target_parameters must be a list of names"):
        LoraConfig(target_parameters="experts.down_proj")
    with pytest.raises(ValueError, match="or experts in target_parameters"):
        LoraConfig(target_modules=[])


def test_layers_to_transform_does_not_act_on_parameters(tmp_path):
    options = dict(target_modules=["q_proj"], target_parameters=EXPERTS, layers_to_transform=[1])
    theirs = peft_model(make_checkpoint("qwen3_moe", tmp_path), **options)
    model = load_folder(tmp_path)
    with pytest.warns(UserWarning, match="layers_to_transform does not act on target_parameters"):
        add_adapters(model, LoraConfig(r=4, **options), jax.random.key(0))
    assert ours.adapter_tensors(model).keys() == peft.get_peft_model_state_dict(theirs).keys()


def test_files_that_do_not_fit(tmp_path):
    make_checkpoint("mixtral", tmp_path / "base")
    model, config = adapted(tmp_path / "base")
    with pytest.raises(ValueError, match="has adapters, and the settings say target_parameters=..experts.down"):
        other = dataclasses.replace(config, target_parameters=EXPERTS[1:])
        ours.save_adapter(model, tmp_path / "none", config=other, base="")
    ours.save_adapter(model, tmp_path / "adapter", config=config, base="")
    path = tmp_path / "adapter" / "adapter_config.json"
    options = json.loads(path.read_text())
    for change, message in (
        (dict(r=4), r"experts.lora_A.weight is \[15, 80\], expected \[20, 80\]"),
        (dict(target_parameters=["experts.gate_up_proj"]), "unexpected: .*mlp.experts.base_layer.lora_A.weight"),
        (dict(target_parameters=["experts.w1"]), "'experts.w1' matches no parameter"),
        (dict(lora_dropout=0.1), "does not work with lora_dropout"),
    ):
        path.write_text(json.dumps(options | change))
        with pytest.raises(CheckpointError, match=message):
            ours.load_adapter(load_folder(tmp_path / "base"), tmp_path / "adapter")
    assert load_file(tmp_path / "adapter" / "adapter_model.safetensors")
