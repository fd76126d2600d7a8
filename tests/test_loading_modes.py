"""How `from_pretrained` holds the weights: all of them learning, 8-bit, fp8, float16."""

import json
import re
from types import SimpleNamespace

import bitsandbytes
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import nnx
from helpers import make_checkpoint, random_ids, randomise_adapters, relative_error
from safetensors.torch import load_file, save_file
from transformers.integrations.finegrained_fp8 import Fp8Quantize

from jaxlora import FastLanguageModel, SFTConfig, SFTTrainer, quant
from jaxlora.converters.huggingface import CheckpointError, SafetensorsSource
from jaxlora.converters.peft import load_adapter
from jaxlora.lora import partition, unfreeze
from jaxlora.loss import causal_lm_loss
from jaxlora.model import named_nodes
from jaxlora.modes import choose_mode
from jaxlora.optimizer import make_optimizer
from jaxlora.train import LossScale, TrainState, make_train_step
from jaxlora.variables import BaseParam, TrainableParam

pytestmark = pytest.mark.filterwarnings("ignore:.*has no tokenizer files:UserWarning")


def load(folder, **options):
    return FastLanguageModel.from_pretrained(folder, **{"dtype": "float32", **options})[0]


def batch_of(seed, rows=3, length=12):
    ids = random_ids(rows, length, seed)
    labels = np.where(np.random.default_rng(seed).random(ids.shape) < 0.3, -100, ids).astype(np.int32)
    return {"input_ids": jnp.asarray(ids), "labels": jnp.asarray(labels)}


def train(model, optimizer, batches, **options):
    """Losses, and the model trained in place."""
    graphdef, trainable, frozen = partition(model)
    state = TrainState.create(trainable, optimizer, **options)
    step, losses = make_train_step(graphdef, optimizer), []
    for batch in batches:
        state, metrics = step(state, frozen, batch)
        losses.append(float(metrics["loss"]))
    nnx.update(model, state.trainable)
    return losses, state


def constant(rate):
    return lambda step: rate


def weights(model):
    """Every weight of the checkpoint by its name."""
    found = {}
    for parameter in named_nodes(model, nnx.Variable):
        value = parameter.node.get_value()
        for name, one in zip(parameter.names(), value if parameter.layers else [value], strict=True):
            found[name] = one
    return found


# ---- Full fine-tuning ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama-tied", "qwen3-biases-windows"])
def test_four_steps_on_every_weight_equal_torch(name, tmp_path):
    theirs = make_checkpoint(name, tmp_path).train()
    model = load(tmp_path, full_finetuning=True)
    start = {name: np.asarray(value) for name, value in weights(model).items()}
    # The groups of transformers' Trainer.
    decayed = set(transformers.Trainer.get_decay_parameter_names(None, theirs))
    groups = [
        {"params": [p for n, p in theirs.named_parameters() if (n in decayed) == decays], "weight_decay": decay}
        for decays, decay in ((True, 0.1), (False, 0.0))
    ]
    optimizer = torch.optim.AdamW(groups, lr=3e-3, betas=(0.9, 0.99))
    expected = []
    for seed in range(4):
        batch = {k: torch.tensor(np.asarray(v)).long() for k, v in batch_of(seed).items()}
        loss = theirs(**batch).loss
        expected.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    ours = make_optimizer("adamw", constant(3e-3), weight_decay=0.1, beta2=0.99, max_grad_norm=None)
    losses, _ = train(model, ours, [batch_of(seed) for seed in range(4)])
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    found = weights(model)
    theirs_by_name = dict(theirs.named_parameters())
    assert set(found) == set(theirs_by_name)
    for name, parameter in theirs_by_name.items():
        parameter = parameter.detach().numpy()
        assert relative_error(found[name], parameter) < 1e-4, name
        assert relative_error(found[name] - start[name], parameter - start[name]) < 2e-2, name


@pytest.mark.parametrize("name", ["llama-tied"])
def test_every_weight_learns_and_none_is_quantised(name, tmp_path):
    theirs = make_checkpoint(name, tmp_path)
    model = load(tmp_path, full_finetuning=True)
    assert not list(named_nodes(model, BaseParam)) and model.full_finetuning
    graphdef, trainable, frozen = partition(model)
    assert not jax.tree.leaves(frozen)
    assert {type(v) for v in jax.tree.leaves(trainable, is_leaf=lambda v: isinstance(v, nnx.Variable))} == {
        TrainableParam
    }
    count = sum(p.numel() for p in theirs.parameters())
    assert model.get_nb_trainable_parameters() == (count, count)
    ids = jnp.asarray(random_ids(2, 9))
    with torch.no_grad():
        assert relative_error(model(ids), theirs(torch.tensor(np.asarray(ids)).long()).logits) < 5e-5


def test_get_peft_model_has_no_effect(tmp_path):
    make_checkpoint("llama", tmp_path)
    model = load(tmp_path, full_finetuning=True)
    with pytest.warns(UserWarning, match="full fine-tuning is on, so get_peft_model has no effect"):
        assert FastLanguageModel.get_peft_model(model, r=4) is model
    assert model.lora_config is None and not [p for p in weights(model) if "lora" in p]


def stored_dtypes(folder):
    """{tensor: dtype} of a checkpoint of one file."""
    source = SafetensorsSource(folder)
    return {name: source.dtype(name).name for name in source.names()}


def test_a_run_is_saved_resumed_and_read_by_transformers(tmp_path):
    make_checkpoint("llama-tied", tmp_path / "base")
    rows = [{"input_ids": row.tolist(), "labels": row.tolist()} for row in random_ids(16, 10)]

    def run(folder, **options):
        model = load(tmp_path / "base", full_finetuning=True)
        options = dict(save_steps=2, per_device_train_batch_size=4, learning_rate=1e-3, disable_tqdm=True) | options
        args = SFTConfig(output_dir=tmp_path / folder, **options)
        return model, SFTTrainer(model, args, train_dataset=rows)

    model, trainer = run("whole", max_steps=4)
    before = np.asarray(model.model.norm.weight.get_value(), np.float32)
    trainer.train()
    assert np.any(np.asarray(model.model.norm.weight.get_value(), np.float32) != before)
    resumed, trainer = run("whole", max_steps=4)
    trainer.train(resume_from_checkpoint=tmp_path / "whole" / "checkpoint-2")
    assert all(np.array_equal(value, weights(model)[name]) for name, value in weights(resumed).items())

    ids = jnp.asarray(random_ids(2, 9))
    last = tmp_path / "whole" / "checkpoint-4"
    theirs = transformers.AutoModelForCausalLM.from_pretrained(last, dtype=torch.float32)
    with torch.no_grad():
        expected = theirs(torch.tensor(np.asarray(ids)).long()).logits
    assert relative_error(load(last, load_in_16bit=True)(ids), expected) < 5e-5
    assert relative_error(model(ids), expected) < 5e-5
    model.save_pretrained(tmp_path / "saved")
    for folder in (last, tmp_path / "saved"):
        assert not (folder / "adapter_config.json").exists()
        dtypes = stored_dtypes(folder)
        assert set(dtypes.values()) == {"float32"} and "lm_head.weight" not in dtypes


def test_float32_weights_and_bfloat16_arithmetic(tmp_path):
    make_checkpoint("llama", tmp_path)
    dtypes = {}
    for mixed in (None, False, True):
        model = load(tmp_path, full_finetuning=True, dtype="bfloat16", float32_mixed_precision=mixed)
        assert model.dtype == jnp.bfloat16
        dtypes[mixed] = {str(value.dtype) for value in weights(model).values()}
    assert dtypes == {None: {"bfloat16"}, False: {"bfloat16"}, True: {"float32"}}
    # What float32 weights are for: an update far below a bfloat16's last bit is not lost. The arithmetic is bfloat16's.
    before = np.asarray(model.model.norm.weight.get_value())
    jaxpr = jax.make_jaxpr(lambda ids: model.hidden_states(ids)[0])(jnp.asarray(random_ids(1, 5)))
    assert [out.aval.dtype for out in jaxpr.jaxpr.outvars] == [jnp.bfloat16]
    train(model, make_optimizer("adamw", constant(1e-5)), [batch_of(0)])
    moved = np.abs(np.asarray(model.model.norm.weight.get_value()) - before)
    assert np.all(moved < 2e-5) and np.median(moved) > 5e-6
    model.save_pretrained(tmp_path / "saved")
    model.save_pretrained_merged(tmp_path / "merged")
    assert set(stored_dtypes(tmp_path / "saved").values()) == {"float32"}
    assert set(stored_dtypes(tmp_path / "merged").values()) == {"bfloat16"}
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_full_finetuning_with_what_does_not_go_with_it(tmp_path):
    make_checkpoint("llama", tmp_path / "base")
    base = tmp_path / "base"
    with pytest.raises(ValueError, match="load_in_4bit=True and full_finetuning=True are both given"):
        load(base, full_finetuning=True, load_in_4bit=True)
    with pytest.raises(ValueError, match="float32_mixed_precision is for full_finetuning=True"):
        load(base, float32_mixed_precision=True)
    with pytest.raises(ValueError, match="the updates of float16 weights would be lost"):
        load(base, full_finetuning=True, float32_mixed_precision=False, dtype="float16")
    with pytest.raises(ValueError, match="a quantised model cannot learn as a whole"):
        unfreeze(load(base))
    FastLanguageModel.get_peft_model(load(base), r=4).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match="is an adapter, and full_finetuning=True trains no adapters"):
        load(tmp_path / "adapter", full_finetuning=True)
    with pytest.raises(ValueError, match="has no adapter: save_method must be"):
        load(base, full_finetuning=True).save_pretrained_merged(tmp_path / "merged", save_method="lora")


# ---- int8 and fp8 ----------------------------------------------------------------------------------------------------

MODES = {
    "int8": {"load_in_8bit": True},
    "fp8": {"load_in_fp8": True},
    "fp8_block": {"load_in_fp8": "block"},
}
# Every linear is whole blocks of 128 x 128, since transformers leaves others unquantised.
WIDE = dict(
    hidden_size=128, intermediate_size=256, head_dim=32, num_attention_heads=4, num_key_value_heads=4,
    num_hidden_layers=2,
)  # fmt: skip


def transformers_fp8(w, block):
    """(codes, scales) of a torch weight, by transformers."""
    config = transformers.FineGrainedFP8Config(weight_block_size=block)
    made = Fp8Quantize(SimpleNamespace(quantization_config=config)).convert({"x.weight": w})
    return made["x.weight"], made["x.weight_scale_inv"]


def bytes_of(array):
    return np.asarray(array).view(np.uint8)


def torch_bytes(tensor):
    return tensor.contiguous().view(torch.uint8).numpy()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(96, 128), (10, 70), (1, 33)])
def test_int8_is_bitsandbytes_to_the_bit(shape, dtype):
    w = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    w[0, :3] = torch.tensor([0.0, 3.0, -3.0])
    layer = bitsandbytes.nn.Linear8bitLt(shape[1], shape[0], bias=False, has_fp16_weights=False)
    layer.weight = bitsandbytes.nn.Int8Params(w.clone(), requires_grad=False, has_fp16_weights=False)
    layer = layer.to("cpu")
    ours = jax.jit(lambda w: quant.quantize(w, scheme="int8"))(jnp.asarray(w.float().numpy()).astype(str(dtype)[6:]))
    assert np.array_equal(ours.codes, layer.weight.CB.numpy())
    assert np.array_equal(bytes_of(ours.scales[:, 0]), torch_bytes(layer.weight.SCB))
    expected = bitsandbytes.functional.int8_vectorwise_dequant(layer.weight.CB, layer.weight.SCB)
    assert np.array_equal(quant.dequantize(ours, jnp.float32), expected.numpy())


@pytest.mark.parametrize("scheme, block", [("fp8", (1, 256)), ("fp8_block", (128, 128))])
def test_fp8_is_transformers_to_the_bit(scheme, block):
    w = torch.randn((384, 256), generator=torch.Generator().manual_seed(0)) * torch.logspace(-4, 1, 384)[:, None]
    w[128:256, :128] = 0  # a block of zeros
    codes, scales = transformers_fp8(w, block)
    ours = jax.jit(lambda w: quant.quantize(w, scheme=scheme))(jnp.asarray(w.numpy()))
    assert np.array_equal(bytes_of(ours.codes), torch_bytes(codes))
    assert np.array_equal(ours.scales, scales.numpy())
    wide = scales.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
    assert np.array_equal(quant.dequantize(ours), (codes.float() * wide).numpy())


@pytest.mark.parametrize("scheme", MODES)
@pytest.mark.parametrize("shape", [(96, 128), (130, 257), (3, 33)])
def test_what_eight_bits_lose(scheme, shape, key):
    w = jax.random.normal(key, (2, *shape), jnp.float32).at[0, 0].set(0)  # a row of zeros
    q = jax.jit(lambda w: quant.quantize(w, scheme=scheme, dtype=jnp.bfloat16))(w)
    assert (q.shape, q.leading, q.dtype, q.size) == (shape, (2,), jnp.bfloat16, w.size)
    assert q.nbytes < 1.2 * w.size + 64
    back = quant.dequantize(q, jnp.float32)
    assert not np.any(np.asarray(back[0, 0]))
    # Half a code of a row's largest in int8, which rounds to float16 first; half of the last of four bits in fp8.
    bound = jnp.max(jnp.abs(w), axis=2, keepdims=True) / 254 if scheme == "int8" else jnp.abs(w) / 16
    assert np.all(np.abs(back - w) <= 1.02 * bound + jnp.abs(w) / 2048 + 1e-4)
    for i in range(2):
        np.testing.assert_array_equal(back[i], quant.dequantize(quant.quantize(w[i], scheme=scheme)))


@pytest.mark.parametrize("scheme", MODES)
def test_the_product_keeps_the_packed_weight_and_nothing_else(scheme, key):
    w, x = jax.random.normal(key, (96, 160)), jax.random.normal(key, (5, 160))
    q = quant.quantize(w, scheme=scheme)
    y, pullback = jax.vjp(lambda x: quant.matmul(x, q), x)
    kept = jax.tree.leaves(pullback)
    assert sum(leaf.nbytes for leaf in kept) <= q.nbytes
    dense = quant.dequantize(q)
    np.testing.assert_allclose(y, x @ dense.T, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(pullback(y)[0], y @ dense, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("scheme", MODES)
def test_loading_quantises_and_trains_adapters(scheme, tmp_path):
    theirs = make_checkpoint("llama", tmp_path, **WIDE)
    model = load(tmp_path, **MODES[scheme])
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "proj" in name:
                q = quant.quantize(jnp.asarray(parameter.numpy()), scheme=scheme)
                parameter.copy_(torch.tensor(np.asarray(quant.dequantize(q))))
        ids = jnp.asarray(random_ids(2, 9))
        assert relative_error(model(ids), theirs(torch.tensor(np.asarray(ids)).long()).logits) < 5e-5
    weight = model.model.layers[0].period[0].mlp.up_proj.weight.get_value()
    assert isinstance(weight, quant.QuantizedArray) and weight.scheme == scheme
    assert not isinstance(model.lm_head.weight.get_value(), quant.QuantizedArray)
    FastLanguageModel.get_peft_model(model, r=4, target_modules=["q_proj", "down_proj"])
    losses, _ = train(model, make_optimizer("adamw", constant(1e-2)), [batch_of(0)] * 4)
    assert losses[-1] < losses[0]


def quantised_on_disk(folder, scheme, **fields):
    """The tiny model of `folder`/base as an fp8 checkpoint in `folder`/fp8, with transformers' own codes."""
    model = make_checkpoint("llama", folder / "base", **{**WIDE, **fields})
    tensors = {}
    for name, value in load_file(folder / "base" / "model.safetensors").items():
        tensors[name] = value
        if "proj" in name:
            suffix, block = ("_scale", (1, value.shape[1])) if scheme == "fp8" else ("_scale_inv", (128, 128))
            tensors[name], tensors[name + suffix] = transformers_fp8(value, block)
    config = json.loads((folder / "base" / "config.json").read_text())
    config["quantization_config"] = (
        transformers.FbgemmFp8Config() if scheme == "fp8" else transformers.FineGrainedFP8Config()
    ).to_dict()
    (folder / "fp8").mkdir()
    save_file(tensors, folder / "fp8" / "model.safetensors", metadata={"format": "pt"})
    (folder / "fp8" / "config.json").write_text(json.dumps(config))
    return model


def test_a_fine_grained_fp8_checkpoint(tmp_path):
    quantised_on_disk(tmp_path, "fp8_block")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "fp8", quantization_config=transformers.FineGrainedFP8Config(dequantize=True), dtype=torch.float32
    )
    ids = random_ids(2, 9)
    with torch.no_grad():
        expected = theirs(torch.tensor(ids).long()).logits
    for options in ({}, {"load_in_fp8": "block"}):
        assert relative_error(load(tmp_path / "fp8", **options)(jnp.asarray(ids)), expected) < 5e-5
    here = load(tmp_path / "base", load_in_fp8="block")
    assert np.array_equal(here(jnp.asarray(ids)), load(tmp_path / "fp8")(jnp.asarray(ids)))
    with pytest.raises(ValueError, match="quantised as fp8_block: load it without load_in_4bit=True"):
        load(tmp_path / "fp8", load_in_4bit=True)
    with pytest.raises(ValueError, match="quantised as fp8_block: load it without full_finetuning=True"):
        load(tmp_path / "fp8", full_finetuning=True)


def test_an_fbgemm_fp8_checkpoint(tmp_path):
    quantised_on_disk(tmp_path, "fp8")
    ids = jnp.asarray(random_ids(2, 9))
    expected = load(tmp_path / "base", load_in_fp8=True)(ids)
    assert np.array_equal(load(tmp_path / "fp8")(ids), expected)


def test_an_int8_checkpoint_of_transformers(tmp_path):
    make_checkpoint("llama", tmp_path / "base", **WIDE)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "base",
        quantization_config=transformers.BitsAndBytesConfig(load_in_8bit=True),
        dtype=torch.float16,
        device_map="cpu",
    )
    theirs.save_pretrained(tmp_path / "int8")
    model = load(tmp_path / "int8")
    found = dict(theirs.named_parameters())
    held = model.model.layers[0].period[0].mlp.down_proj.weight.get_value()
    for layer in range(2):
        weight = found[f"model.layers.{layer}.mlp.down_proj.weight"]
        assert np.array_equal(held.codes[layer], weight.data.numpy())
        assert np.array_equal(held.scales[layer, :, 0], weight.SCB.numpy())
    ids = jnp.asarray(random_ids(2, 9))
    # Its other tensors are float16.
    assert relative_error(model(ids), load(tmp_path / "base", load_in_8bit=True)(ids)) < 1e-2
    with pytest.raises(ValueError, match="quantised as int8: load it without load_in_16bit=True"):
        load(tmp_path / "int8", load_in_16bit=True)


def test_broken_eight_bit_checkpoints(tmp_path):
    quantised_on_disk(tmp_path, "fp8_block")
    file, name = tmp_path / "fp8" / "model.safetensors", "model.layers.1.mlp.down_proj.weight"
    whole = load_file(file)
    for change, error, message in [
        ({f"{name}_scale_inv": None}, CheckpointError, f"{name}_scale_inv is missing"),
        ({f"{name}_scale_inv": torch.ones(2, 2)}, CheckpointError, r"float32 \[2, 2\], expected float32 \[1, 2\]"),
        ({name: torch.ones(128, 256)}, NotImplementedError, f"leaves 1 projections unquantised .{name}"),
    ]:
        tensors = {key: value for key, value in {**whole, **change}.items() if value is not None}
        save_file(tensors, file, metadata={"format": "pt"})
        with pytest.raises(error, match=message):
            load(tmp_path / "fp8")
    config = json.loads((tmp_path / "fp8" / "config.json").read_text())
    for quantization, message in [
        ({**config["quantization_config"], "weight_block_size": [64, 64]}, r"weight_block_size is \[64, 64\]"),
        ({"quant_method": "gptq"}, "quant_method is 'gptq'"),
    ]:
        (tmp_path / "fp8" / "config.json").write_text(json.dumps({**config, "quantization_config": quantization}))
        with pytest.raises(CheckpointError, match=message):
            load(tmp_path / "fp8")


def test_two_modes_or_an_unknown_one(tmp_path):
    make_checkpoint("llama", tmp_path)
    with pytest.raises(ValueError, match="load_in_8bit=True and load_in_fp8='block' are both given"):
        load(tmp_path, load_in_8bit=True, load_in_fp8="block")
    with pytest.raises(ValueError, match="load_in_fp8 must be False, True .rows. or .block., found 'rows'"):
        choose_mode(**dict.fromkeys(("load_in_4bit", "load_in_8bit", "load_in_16bit"), False), load_in_fp8="rows")


# ---- float16 ---------------------------------------------------------------------------------------------------------


def with_adapters(folder, dtype):
    model = FastLanguageModel.get_peft_model(load(folder, load_in_16bit=True, dtype=dtype), r=4)
    randomise_adapters(model)
    return model


@pytest.mark.parametrize("full_finetuning", [False, True])
def test_float16_follows_float32(full_finetuning, tmp_path):
    make_checkpoint("llama", tmp_path)
    losses = {}
    for dtype in ("float16", "float32"):
        model = load(tmp_path, full_finetuning=True, dtype=dtype) if full_finetuning else with_adapters(tmp_path, dtype)
        optimizer = make_optimizer("adamw", constant(3e-3))
        # Below the first scale of a run, so that no update is skipped and both runs see the same ones.
        loss_scale = LossScale.create(2.0**8) if dtype == "float16" else None
        losses[dtype], state = train(model, optimizer, [batch_of(s % 2) for s in range(8)], loss_scale=loss_scale)
        assert loss_scale is None or int(state.loss_scale.finite_steps) == 8
        assert {leaf.dtype for leaf in jax.tree.leaves(state.trainable)} == {jnp.dtype(jnp.float32)}
    np.testing.assert_allclose(losses["float16"], losses["float32"], rtol=1e-2)
    assert losses["float16"][-1] < 0.9 * losses["float16"][0]


def test_gradients_that_float16_cannot_hold(tmp_path):
    make_checkpoint("llama", tmp_path)

    def tiny_loss(model, batch, key=None):
        total, weight, metrics = causal_lm_loss(model, batch, key)
        return total * 1e-7, weight, metrics

    def norm(dtype, loss_scale):
        model = with_adapters(tmp_path, dtype)
        graphdef, trainable, frozen = partition(model)
        optimizer = make_optimizer("sgd", constant(1.0), max_grad_norm=None)
        state = TrainState.create(trainable, optimizer, loss_scale=loss_scale)
        return float(make_train_step(graphdef, optimizer, tiny_loss)(state, frozen, batch_of(0))[1]["grad_norm"])

    exact = norm("float32", None)
    assert abs(norm("float16", None) - exact) > 0.1 * exact
    assert abs(norm("float16", LossScale.create(2.0**24)) - exact) < 0.01 * exact


def test_an_overflow_skips_the_update_and_halves_the_scale(tmp_path):
    make_checkpoint("llama", tmp_path)
    graphdef, trainable, frozen = partition(with_adapters(tmp_path, "float16"))
    optimizer = make_optimizer("adamw", constant(1e-3))
    state = TrainState.create(trainable, optimizer, loss_scale=LossScale.create(2.0**40))
    before = jax.tree.map(np.asarray, (state.trainable, state.opt_state))
    step = make_train_step(graphdef, optimizer)
    state, metrics = step(state, frozen, batch_of(0))
    assert np.isfinite(metrics["loss"]) and metrics["grad_norm"] == 0.0 and metrics["loss_scale"] == 2.0**40
    assert state.loss_scale.scale == 2.0**39 and state.step == 1
    jax.tree.map(np.testing.assert_array_equal, before, (state.trainable, state.opt_state))
    for _ in range(40):
        state, metrics = step(state, frozen, batch_of(0))
    assert metrics["grad_norm"] > 0 and int(state.loss_scale.finite_steps) > 0
    grown = LossScale(jnp.float32(4.0), jnp.int32(LossScale.INTERVAL - 1)).after(jnp.asarray(True))
    assert (grown.scale, grown.finite_steps) == (8.0, 0)


def test_the_trainer_scales_the_loss_in_float16(tmp_path):
    make_checkpoint("llama", tmp_path / "base")
    model = with_adapters(tmp_path / "base", "float16")
    rows = [{"input_ids": row.tolist(), "labels": row.tolist()} for row in random_ids(16, 10)]
    options = dict(max_steps=4, logging_steps=1, save_steps=2, per_device_train_batch_size=4, disable_tqdm=True)
    args = SFTConfig(output_dir=tmp_path / "out", learning_rate=1e-3, **options)
    output = SFTTrainer(model, args, train_dataset=rows).train()
    assert np.isfinite(output.training_loss)
    manifest = json.loads((tmp_path / "out" / "checkpoint-4" / "checkpoint.json").read_text())
    assert sum("loss_scale" in name for name in manifest["arrays"]) == 2


# ---- Adapters and their bases ----------------------------------------------------------------------------------------


def adapter_of(folder, base, **options):
    """An adapter in `folder`/adapter, trained on `base`."""
    model = FastLanguageModel.get_peft_model(load(base, **options), r=4, target_modules=["q_proj", "down_proj"])
    randomise_adapters(model)
    model.save_pretrained(folder / "adapter")
    return model


def test_an_adapter_of_a_quantised_base_on_the_original(tmp_path):
    quantised_on_disk(tmp_path, "fp8_block")
    (tmp_path / "fp8").rename(tmp_path / "Base-bnb-4bit")
    (tmp_path / "base").rename(tmp_path / "Base")
    trained = adapter_of(tmp_path, tmp_path / "Base-bnb-4bit")
    ids = jnp.asarray(random_ids(2, 9))
    assert np.array_equal(load(tmp_path / "adapter")(ids), trained(ids))
    with pytest.raises(
        ValueError, match="quantised as fp8_block: load it without load_in_16bit=True, or pass"
    ) as error:
        load(tmp_path / "adapter", load_in_16bit=True)
    (named,) = re.findall("base_model_name_or_path='(.*?)'", str(error.value))
    assert named == str(tmp_path / "Base")
    model = load(tmp_path / "adapter", load_in_16bit=True, base_model_name_or_path=named)
    twin = load(tmp_path / "Base", load_in_16bit=True)
    load_adapter(twin, tmp_path / "adapter")
    assert np.array_equal(model(ids), twin(ids)) and model.name_or_path == named


def test_an_adapter_whose_base_is_elsewhere(tmp_path):
    make_checkpoint("llama", tmp_path / "base")
    trained = adapter_of(tmp_path, tmp_path / "base", load_in_16bit=True)
    (tmp_path / "base").rename(tmp_path / "moved")
    with pytest.raises(FileNotFoundError, match="base model of the adapter .* cannot be had: .*no such file or folder"):
        load(tmp_path / "adapter")
    model = load(tmp_path / "adapter", load_in_16bit=True, base_model_name_or_path=tmp_path / "moved")
    ids = jnp.asarray(random_ids(2, 9))
    assert np.array_equal(model(ids), trained(ids))
    with pytest.raises(ValueError, match="base_model_name_or_path is for adapters, and .* is none"):
        load(tmp_path / "moved", base_model_name_or_path=tmp_path / "adapter")
