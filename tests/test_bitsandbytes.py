"""4-bit checkpoints that transformers and bitsandbytes wrote, read here without them."""

import copy
import json
import os
import subprocess
import sys

import bitsandbytes
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from helpers import TINY, load_folder, make_checkpoint, random_ids, torch_model
from safetensors.torch import load_file, save_file

from jaxlora import lora
from jaxlora.config import LoraConfig, QuantConfig
from jaxlora.converters.bitsandbytes import BitsandbytesSource
from jaxlora.converters.export import save_merged
from jaxlora.converters.huggingface import CheckpointError, SafetensorsSource, load_model
from jaxlora.lora_targets import target_ranks
from jaxlora.quant import QuantizedArray, dequantize

IDS = random_ids(2, 13)
PROJECTION = "model.layers.1.mlp.down_proj.weight"


def quantise(folder, double_quant=True, dtype=torch.float32, name="llama", **options):
    """Quantise the tiny model of `folder`/base as users do, save it in `folder`/bnb, and return it."""
    make_checkpoint(name, folder / "base")
    settings = transformers.BitsAndBytesConfig(
        **{
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": double_quant,
            "bnb_4bit_compute_dtype": dtype,
            **options,
        }
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder / "base", quantization_config=settings, dtype=dtype, device_map="cpu"
    )
    model.save_pretrained(folder / "bnb")
    return model


def open_source(folder) -> BitsandbytesSource:
    config = json.loads((folder / "config.json").read_text())
    return BitsandbytesSource(SafetensorsSource(folder), config["quantization_config"])


def load(folder, dtype=jnp.float32):
    source = open_source(folder)
    hf_config = json.loads((folder / "config.json").read_text())
    return load_model(source, hf_config, dtype=dtype, quant_config=source.quant_config())


def dequantised(weight) -> torch.Tensor:
    """What bitsandbytes makes of a quantised weight, as one long row: its CPU kernel (0.50) takes every row to begin a
    block, and returns something else for rows that are not whole blocks of 64."""
    state = copy.copy(weight.quant_state)
    state.shape = torch.Size((1, weight.quant_state.shape.numel()))
    return bitsandbytes.functional.dequantize_4bit(weight.data, state).reshape(weight.quant_state.shape)


def dense(quantised, name="llama"):
    """A torch model with the weights that bitsandbytes dequantises. Its own 4-bit product on the CPU is inexact."""
    weights = {
        key: dequantised(value) if isinstance(value, bitsandbytes.nn.Params4bit) else value.data
        for key, value in quantised.named_parameters(remove_duplicate=False)
    }
    weights |= {key: value for key, value in quantised.named_buffers() if key.endswith("layer_scalar")}
    model = torch_model(name)
    model.load_state_dict({key: value.float() for key, value in weights.items()}, strict=True)
    return model


def logits_of(model) -> np.ndarray:
    with torch.no_grad():
        return model(torch.from_numpy(IDS).long()).logits.numpy()


# Of "llama", no row is whole blocks of 64 elements; of "wide" every one is.
TINY_WIDE = {"hidden_size": 64, "intermediate_size": 192, "head_dim": 32, "num_attention_heads": 4}


@pytest.mark.parametrize("wide", [False, True], ids=["flat", "by-row"])
@pytest.mark.parametrize("double_quant", [True, False], ids=["double", "single"])
def test_logits_and_codes_are_bitsandbytes(tmp_path, monkeypatch, double_quant, wide):
    if wide:
        monkeypatch.setitem(TINY, "llama", ("llama", {**TINY["llama"][1], **TINY_WIDE}))
    theirs = quantise(tmp_path, double_quant)
    source = open_source(tmp_path / "bnb")
    assert source.quant_config() == QuantConfig(double_quant=double_quant)
    model = load(tmp_path / "bnb")
    assert np.abs(np.asarray(model(jnp.asarray(IDS))) - logits_of(dense(theirs))).max() < 1e-4

    weight = theirs.get_parameter(PROJECTION)
    ours = source.read(PROJECTION)
    assert isinstance(ours, QuantizedArray)
    assert ours.shape == source.shape(PROJECTION) == tuple(weight.quant_state.shape)
    assert np.array_equal(ours.codes.reshape(-1), weight.data.numpy().reshape(-1))
    assert np.array_equal(ours.scales.reshape(-1), weight.quant_state.absmax.numpy())
    if double_quant:
        assert np.array_equal(ours.nested_absmax, weight.quant_state.state2.absmax.numpy())
        assert ours.nested_offset == weight.quant_state.offset.numpy()
    held = model.model.layers[0].period[0].mlp.down_proj.weight.get_value()
    assert np.array_equal(held.codes[1].reshape(-1), weight.data.numpy().reshape(-1))


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16], ids=["uint8", "stored-as-bfloat16"])
def test_a_bfloat16_checkpoint(tmp_path, storage):
    """Quantised from bfloat16, and the bytes put into another dtype, as FSDP wants them. The codes are the same."""
    theirs = quantise(tmp_path, dtype=torch.bfloat16, bnb_4bit_quant_storage=storage)
    source = open_source(tmp_path / "bnb")
    ours, weight = source.read(PROJECTION), theirs.get_parameter(PROJECTION)
    assert source.dtype(PROJECTION) == ours.dtype == jnp.bfloat16
    assert np.array_equal(ours.codes.reshape(-1), weight.data.view(torch.uint8).numpy().reshape(-1))
    model = load(tmp_path / "bnb", dtype=jnp.bfloat16)
    held = model.model.layers[0].period[0].mlp.down_proj.weight.get_value()
    assert np.array_equal(np.asarray(dequantize(held)[1], np.float32), dequantised(weight).float().numpy())


def test_quantised_here_or_there_is_the_same(tmp_path):
    """Loading the 16-bit original in 4 bit gives the codes of its bitsandbytes checkpoint."""
    quantise(tmp_path, double_quant=False)
    ours, theirs = load_folder(tmp_path / "base", quant_config=QuantConfig(double_quant=False)), load(tmp_path / "bnb")
    everything = LoraConfig(target_modules="all-linear")
    pairs = zip(target_ranks(ours, everything), target_ranks(theirs, everything), strict=True)
    for (a, _), (b, _) in pairs:
        a, b = a.node.weight.get_value(), b.node.weight.get_value()
        assert np.array_equal(a.codes, b.codes) and np.array_equal(a.scales, b.scales)


def test_a_quantised_head_is_read_dequantised(tmp_path):
    theirs = quantise(tmp_path, llm_int8_skip_modules=["embed_tokens"])
    assert isinstance(theirs.lm_head.weight, bitsandbytes.nn.Params4bit)
    model = load(tmp_path / "bnb")
    assert np.abs(np.asarray(model(jnp.asarray(IDS))) - logits_of(dense(theirs))).max() < 1e-4


# Of Gemma 4 it quantises a linear beside the layers, too, which is in 16 bits here.
@pytest.mark.parametrize("name", ["qwen2-windows", "gemma4_text"])
def test_biases_and_tied_heads(name, tmp_path):
    theirs = quantise(tmp_path, name=name)
    model = load(tmp_path / "bnb")
    reference = dense(theirs, name)
    assert np.abs(np.asarray(model(jnp.asarray(IDS))) - logits_of(reference)).max() < 1e-4


def test_bitsandbytes_and_torch_are_not_imported(tmp_path):
    quantise(tmp_path)
    code = f"""
import sys
from jaxlora.loader import FastLanguageModel
model, _ = FastLanguageModel.from_pretrained({str(tmp_path / "bnb")!r}, max_seq_length=32)
print(model.quant_config.double_quant, [name for name in ("torch", "bitsandbytes") if name in sys.modules])
"""
    environ = {**os.environ, "JAX_PLATFORMS": "cpu"}
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environ, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout == "True []\n"


def test_unquantised_projections_are_refused(tmp_path):
    quantise(tmp_path, llm_int8_skip_modules=["lm_head", "o_proj"])
    with pytest.raises(NotImplementedError, match=r"leaves 3 projections unquantised \(.*0.self_attn.o_proj"):
        open_source(tmp_path / "bnb")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bnb_4bit_quant_type": "fp4"}, "4-bit of type 'fp4'; supported is 4-bit of type 'nf4'"),
        ({"load_in_4bit": False, "load_in_8bit": True}, "is 8-bit; supported"),
        ({"quant_method": "gptq"}, "quant_method is 'gptq'; supported is 'bitsandbytes'"),
    ],
)
def test_other_quantisations_are_refused(tmp_path, options, message):
    make_checkpoint("llama", tmp_path)
    settings = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4", **options}
    with pytest.raises(CheckpointError, match=f"config.json: .*{message}"):
        BitsandbytesSource(SafetensorsSource(tmp_path), settings)


def edit(folder, change):
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def edit_state(folder, **changes):
    def change(tensors):
        name = f"{PROJECTION}.quant_state.bitsandbytes__nf4"
        state = json.loads(bytes(tensors[name].tolist())) | changes
        tensors[name] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)

    edit(folder, change)


@pytest.mark.parametrize(
    "changes", [{"blocksize": 128}, {"nested_blocksize": 128}, {"quant_type": "fp4"}, {"shape": [3]}, {"dtype": "int8"}]
)
def test_states_that_cannot_be_used(tmp_path, changes):
    quantise(tmp_path)
    edit_state(tmp_path / "bnb", **changes)
    with pytest.raises(CheckpointError, match=rf"{PROJECTION}.quant_state.bitsandbytes__nf4 says .*'blocksize': 64"):
        open_source(tmp_path / "bnb")


def test_every_broken_part_is_named(tmp_path):
    quantise(tmp_path)

    def change(tensors):
        del tensors[f"{PROJECTION}.absmax"]
        tensors[f"{PROJECTION}.quant_map"] += 0.01
        tensors[f"{PROJECTION}.nested_quant_map"] = tensors[f"{PROJECTION}.nested_quant_map"].flip(0)
        tensors[f"{PROJECTION}.nested_absmax"] = torch.ones(7)
        tensors[PROJECTION] = tensors[PROJECTION][:-1].clone()

    edit(tmp_path / "bnb", change)
    with pytest.raises(CheckpointError) as error:
        open_source(tmp_path / "bnb")
    for part in (
        f"{PROJECTION}.absmax is missing",
        f"{PROJECTION}.quant_map is not the standard table",
        f"{PROJECTION}.nested_quant_map is not the standard table",
        f"{PROJECTION}.nested_absmax is 28 bytes of float32, expected 4 of float32",
        f"{PROJECTION} is 1919 bytes of uint8, expected 1920",
    ):
        assert part in str(error.value)


def test_a_state_against_config_json(tmp_path):
    quantise(tmp_path, double_quant=False)
    path = tmp_path / "bnb" / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["bnb_4bit_use_double_quant"] = True
    path.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="is not doubly quantised, against config.json"):
        open_source(tmp_path / "bnb")


# ---- Written here ----------------------------------------------------------------------------------------------------


def adapted(folder, **options):
    model = load_folder(folder)
    lora.add_adapters(model, LoraConfig(r=4, init_lora_weights=False, **options), jax.random.key(0))
    return model


@pytest.mark.parametrize("name", ["llama", "qwen2-windows", "llama-tied", "gemma4_text"])
def test_what_is_written_here_loads_there(name, tmp_path):
    """transformers' 4-bit weights of our file are bitsandbytes' of the merged model, and so are its logits."""
    make_checkpoint(name, tmp_path / "base")
    model = adapted(tmp_path / "base")
    report = save_merged(
        model, tmp_path / "four", base=tmp_path / "base", save_method="merged_4bit", max_shard_size="50KB"
    )
    assert len(report.files) > 1 and report.export_error < 1e-5 < 1e-3 < report.quantisation_gap
    save_merged(model, tmp_path / "sixteen", base=tmp_path / "base")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "four", device_map="cpu", dtype=torch.float32)
    settings = transformers.BitsAndBytesConfig(
        **json.loads((tmp_path / "four" / "config.json").read_text())["quantization_config"]
    )
    anew = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "sixteen", quantization_config=settings, device_map="cpu", dtype=torch.float32
    )
    expected = dict(anew.named_parameters())
    for key, weight in theirs.named_parameters():
        assert type(weight) is type(expected[key]), key
        np.testing.assert_array_equal(weight.data.numpy(), expected[key].data.numpy(), err_msg=key)
        if isinstance(weight, bitsandbytes.nn.Params4bit):
            np.testing.assert_allclose(dequantised(weight), dequantised(expected[key]), rtol=1e-6, atol=1e-7)
    found = load(tmp_path / "four")(jnp.asarray(IDS))
    assert np.abs(np.asarray(found) - logits_of(dense(theirs, name))).max() < 1e-4


def test_a_bfloat16_base_is_written_as_such(tmp_path):
    make_checkpoint("llama", tmp_path / "float32").to(torch.bfloat16).save_pretrained(tmp_path / "base")
    model = adapted(tmp_path / "base")
    save_merged(model, tmp_path / "four", base=tmp_path / "base", save_method="merged_4bit")
    source = open_source(tmp_path / "four")
    assert source.dtype(PROJECTION) == source.dtype("lm_head.weight") == jnp.bfloat16
    settings = json.loads((tmp_path / "four" / "config.json").read_text())["quantization_config"]
    assert settings["bnb_4bit_compute_dtype"] == "bfloat16" and settings["llm_int8_skip_modules"] == ["lm_head"]


def test_experts_are_not_written_in_4_bit(tmp_path):
    make_checkpoint("mixtral", tmp_path / "base")
    model = load_folder(tmp_path / "base", quant_config=QuantConfig())
    lora.add_adapters(model, LoraConfig(r=4, target_modules=["q_proj"]), jax.random.key(0))
    with pytest.raises(ValueError, match="experts.* is no linear layer, and bitsandbytes quantises no others"):
        save_merged(model, tmp_path / "four", base=tmp_path / "base", save_method="merged_4bit")
    assert not (tmp_path / "four").exists()
