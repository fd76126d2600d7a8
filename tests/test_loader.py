"""The door: names, modes, windows, and what a checkpoint brings beside its tensors."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from helpers import make_checkpoint, random_ids, randomise_adapters

from jaxlora import FastLanguageModel, QuantizedArray
from jaxlora.converters.huggingface import CheckpointError
from jaxlora.converters.peft import adapter_tensors
from jaxlora.modes import resolve_dtype


@pytest.fixture
def folder(tmp_path):
    make_checkpoint("llama-biases", tmp_path)
    return tmp_path


@pytest.fixture
def load(folder):
    def load(**options):
        with pytest.warns(UserWarning, match="has no tokenizer files: the tokenizer is None"):
            model, tokenizer = FastLanguageModel.from_pretrained(folder, **{"dtype": "float32", **options})
        assert tokenizer is None
        return model

    return load


def quantised(model):
    return isinstance(model.model.layers[0].period[0].mlp.up_proj.weight.get_value(), QuantizedArray)


def test_four_bits_unless_another_mode_is_asked_for(load):
    assert quantised(load()) and quantised(load(load_in_4bit=True))
    assert not quantised(load(load_in_16bit=True)) and not quantised(load(load_in_4bit=False))


def test_two_modes_are_refused(folder):
    with pytest.raises(ValueError, match="load_in_4bit=True and load_in_16bit=True are both given"):
        FastLanguageModel.from_pretrained(folder, load_in_4bit=True, load_in_16bit=True)


@pytest.mark.parametrize("dtype", ["bfloat16", jnp.bfloat16, np.dtype(jnp.bfloat16), torch.bfloat16, "torch.bfloat16"])
def test_a_dtype_by_any_of_its_names(dtype):
    assert resolve_dtype(dtype) == jnp.bfloat16


def test_no_dtype_is_float32_on_the_cpu():
    assert resolve_dtype(None) == jnp.float32


@pytest.mark.parametrize("dtype", ["int8", "float64", "half-precision"])
def test_other_dtypes_are_refused(dtype):
    with pytest.raises(ValueError, match="is not one of float32, bfloat16, float16"):
        resolve_dtype(dtype)


def test_the_window_is_at_most_2048_by_default_and_never_cut_in_silence(load, folder):
    assert load().max_seq_length == 64  # the model's own
    assert load(max_seq_length=48).max_seq_length == 48
    with pytest.raises(ValueError, match="max_seq_length=128 is beyond the model's window of 64 tokens.*rope_scaling"):
        FastLanguageModel.from_pretrained(folder, max_seq_length=128)
    scaled = load(max_seq_length=128, rope_scaling={"rope_type": "linear", "factor": 2.0})
    assert scaled.max_seq_length == 128 and scaled.config.rope.factor == 2.0
    assert scaled.hf_config["rope_parameters"]["rope_type"] == "linear"


def test_stop_tokens_come_from_generation_config(load, folder):
    ids = random_ids(1, 8)
    free = np.asarray(load().generate(ids, max_new_tokens=12))[0, 8:]
    stop = int(free[3])
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [stop, 96], "pad_token_id": 0}))
    model = load()
    assert model.generation_config["eos_token_id"] == [stop, 96]
    first = list(free).index(stop)
    stopped = np.asarray(model.generate(ids, max_new_tokens=12))[0, 8:]
    assert stopped.tolist()[: first + 1] == free.tolist()[: first + 1]
    assert not np.any(stopped[first + 1 :])


def test_adapters_twice(load):
    model = load()
    FastLanguageModel.get_peft_model(model, r=4, target_modules=["q_proj", "v_proj"])
    with pytest.warns(UserWarning, match="already has these LoRA adapters"):
        FastLanguageModel.get_peft_model(model, r=4, target_modules=["v_proj", "q_proj"])
    with pytest.raises(TypeError, match="already has LoRA adapters with other settings"):
        FastLanguageModel.get_peft_model(model, r=8, target_modules=["q_proj", "v_proj"])


def test_the_seed_of_adapters(load):
    tensors = [
        adapter_tensors(FastLanguageModel.get_peft_model(load(), r=4, target_modules=["q_proj"], **options))
        for options in ({}, {"random_state": 3407}, {"random_state": 1})
    ]
    for name, value in tensors[0].items():
        np.testing.assert_array_equal(tensors[1][name], value)
        assert "lora_B" in name or not np.array_equal(tensors[2][name], value)


@pytest.mark.parametrize("r, error", [(0, ValueError), (-3, ValueError), (2.5, TypeError), (True, TypeError)])
def test_ranks_that_are_none(load, r, error):
    with pytest.raises(error, match=f"{r}"):
        FastLanguageModel.get_peft_model(load(), r=r)


@pytest.mark.parametrize("given, policy", [(False, "none"), (True, "full"), ("unsloth", "offload"), ("full", "full")])
def test_gradient_checkpointing_by_any_of_its_names(load, given, policy):
    model = load(load_in_16bit=True)
    FastLanguageModel.get_peft_model(model, r=2, use_gradient_checkpointing=given)
    assert model.remat_policy == policy


def test_nothing_of_that_name(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        FastLanguageModel.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="no such folder, and no Hugging Face id either"):
        FastLanguageModel.from_pretrained("not an id")


def test_files_that_are_no_checkpoint(folder):
    with pytest.raises(CheckpointError, match="only .gguf files are models"):
        FastLanguageModel.from_pretrained(folder / "model.safetensors")
    (folder / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="config.json: not JSON"):
        FastLanguageModel.from_pretrained(folder)
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match="is not a checkpoint: it has no config.json"):
        FastLanguageModel.from_pretrained(folder)


@pytest.mark.parametrize(
    "rope_scaling",
    [
        dict(rope_type="linear", factor=2.0),
        dict(rope_type="dynamic", factor=2.0),
        dict(rope_type="yarn", factor=2.0, original_max_position_embeddings=64),
        dict(
            rope_type="llama3", factor=2.0, low_freq_factor=1.0, high_freq_factor=4.0,
            original_max_position_embeddings=64,
        ),
    ],
    ids=lambda rope: rope["rope_type"],
)  # fmt: skip
@pytest.mark.parametrize("full_finetuning", [False, True])
@pytest.mark.filterwarnings("ignore:.*has no tokenizer files:UserWarning")
def test_the_exported_config_says_what_was_trained(rope_scaling, full_finetuning, folder, tmp_path):
    """A window of 128 in place of 64: transformers computes the same with what is exported, beyond the native one."""
    options = dict(full_finetuning=True) if full_finetuning else dict(load_in_16bit=True)
    model, _ = FastLanguageModel.from_pretrained(
        folder, max_seq_length=128, rope_scaling=rope_scaling, dtype="float32", **options
    )
    if not full_finetuning:
        model = FastLanguageModel.get_peft_model(model, r=4)
        randomise_adapters(model)
    model.save_pretrained_merged(tmp_path / "merged")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", attn_implementation="eager")
    found = theirs.config.rope_parameters
    assert {name: found[name] for name in rope_scaling} == rope_scaling
    assert found["rope_theta"] == model.config.rope.rope_theta
    ids = random_ids(1, 128)
    with torch.no_grad():
        expected = theirs(torch.from_numpy(ids).long()).logits.numpy()
    assert np.abs(np.asarray(model(jnp.asarray(ids))) - expected).max() < 5e-5
    again, _ = FastLanguageModel.from_pretrained(tmp_path / "merged", load_in_16bit=True, dtype="float32")
    assert again.config.rope == model.config.rope
    # Where the original window is named, max_position_embeddings is the new one.
    assert theirs.config.max_position_embeddings == (128 if rope_scaling["rope_type"] == "yarn" else 64)
