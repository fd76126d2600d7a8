"""Adapter files, both ways, against PEFT: the same files, the same logits, the same next tokens."""

import json
import shutil
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import tokenizers
import torch
import transformers
from helpers import FAMILIES, VOCAB, load_folder, make_checkpoint, random_ids, relative_error
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from jaxlora import lora
from jaxlora.config import LoraConfig
from jaxlora.converters import peft as ours
from jaxlora.converters.huggingface import CheckpointError
from jaxlora.layers import Linear
from jaxlora.model import named_nodes

BLOCKS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
IDS = jnp.asarray(random_ids(2, 11))


def adapt(model, config: LoraConfig, seed: int = 0):
    """Adapters with a B that is not zero, so that they do something."""
    lora.add_adapters(model, config, jax.random.key(seed))
    for index, linear in enumerate(lora.adapters(model)):
        b = linear.node.lora_B
        b.set_value(0.1 * jax.random.normal(jax.random.key(100 * seed + index), b.get_value().shape))
    return model


def logits_of(torch_model) -> np.ndarray:
    with torch.no_grad():
        return torch_model(torch.from_numpy(np.array(IDS)).long()).logits.numpy()


def peft_adapter(theirs, folder, **options) -> "peft.PeftModel":
    """An adapter that PEFT makes and saves, with B random."""
    options = {"r": 4, "lora_alpha": 6, "target_modules": list(BLOCKS), "task_type": "CAUSAL_LM"} | options
    model = peft.get_peft_model(theirs, peft.LoraConfig(**options)).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0.0, 0.1, generator=generator)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Setting `save_embedding_layers`", UserWarning)  # with a head as target
        model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_peft_loads_ours(tmp_path, family):
    config = LoraConfig(r=3, lora_alpha=5, use_rslora=True, lora_dropout=0.1)
    make_checkpoint(family, tmp_path / "base")
    model = adapt(load_folder(tmp_path / "base"), config)
    ours.save_adapter(model, tmp_path / "adapter", config=config, base=str(tmp_path / "base"))
    # Nobody says where the base is: the adapter does.
    theirs = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", attn_implementation="eager")
    assert relative_error(model(IDS), logits_of(theirs)) < 1e-5
    assert np.abs(np.asarray(model(IDS)) - logits_of(theirs)).max() < 5e-5

    tokens = theirs.generate(
        input_ids=torch.from_numpy(np.array(IDS)).long(),
        max_new_tokens=8,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    prompt = IDS.shape[1]
    logits = model(jnp.asarray(tokens.numpy(), jnp.int32))
    assert np.array_equal(tokens[:, prompt:], jnp.argmax(logits[:, prompt - 1 : -1], axis=-1))


def test_a_head_and_one_kind_of_module(tmp_path):
    config = LoraConfig(r=2, target_modules=("lm_head", "up_proj"))
    make_checkpoint("llama", tmp_path / "base")
    model = adapt(load_folder(tmp_path / "base"), config)
    ours.save_adapter(model, tmp_path / "adapter", config=config, base=str(tmp_path / "base"))
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert tensors["base_model.model.lm_head.lora_A.weight"].shape == (2, 48)
    assert tensors["base_model.model.lm_head.lora_B.weight"].shape == (VOCAB, 2)
    assert len(tensors) == 2 * (1 + 3)
    theirs = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", attn_implementation="eager")
    assert relative_error(model(IDS), logits_of(theirs)) < 1e-5


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True, "lora_dropout": 0.2, "init_lora_weights": "gaussian"},
        {"target_modules": ["lm_head", "v_proj"]},
        {"target_modules": "all-linear"},
        {"target_modules": r".*\.mlp\.(up|down)_proj"},
    ],
    ids=["plain", "rslora", "head", "all-linear", "pattern"],
)
def test_ours_loads_pefts(tmp_path, options):
    theirs = peft_adapter(make_checkpoint("qwen3-yarn-factor", tmp_path / "base"), tmp_path / "adapter", **options)
    model = load_folder(tmp_path / "base")
    config = ours.load_adapter(model, tmp_path / "adapter")
    assert relative_error(model(IDS), logits_of(theirs)) < 1e-5
    saved = theirs.peft_config["default"]
    assert (config.r, config.lora_alpha, config.lora_dropout) == (saved.r, saved.lora_alpha, saved.lora_dropout)
    counted = sum(parameter.numel() for name, parameter in theirs.named_parameters() if "lora_" in name)
    assert lora.get_nb_trainable_parameters(model)[0] == counted


def test_the_order_of_tensors_and_targets_is_free(tmp_path):
    theirs = peft_adapter(make_checkpoint("llama", tmp_path / "base"), tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    file.unlink()
    # safetensors sorts by itself: the names backwards, in one file by hand.
    header, data = {}, b""
    for name in sorted(tensors, reverse=True):
        raw = tensors[name].numpy().tobytes()
        offsets = [len(data), len(data) + len(raw)]
        header[name] = {"dtype": "F32", "shape": list(tensors[name].shape), "data_offsets": offsets}
        data += raw
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data)
    edit_config(tmp_path / "adapter", target_modules=list(reversed(BLOCKS)))
    model = load_folder(tmp_path / "base")
    ours.load_adapter(model, tmp_path / "adapter")
    assert relative_error(model(IDS), logits_of(theirs)) < 1e-5


def test_a_half_precision_adapter_is_widened(tmp_path):
    peft_adapter(make_checkpoint("llama", tmp_path / "base"), tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    halves = {name: tensor.bfloat16() for name, tensor in load_file(file).items()}
    save_file(halves, file, metadata={"format": "pt"})
    model = load_folder(tmp_path / "base")
    ours.load_adapter(model, tmp_path / "adapter")
    for name, tensor in ours.adapter_tensors(model).items():
        assert tensor.dtype == np.float32
        assert np.array_equal(tensor, halves[name].float().numpy())


@pytest.mark.parametrize("name", ["llama", "qwen3-biases-windows"], ids=["one-run", "two-runs"])
def test_round_trip_is_exact(tmp_path, name):
    config = LoraConfig(r=5, lora_alpha=7, target_modules=("k_proj", "down_proj"))
    make_checkpoint(name, tmp_path / "base")
    model = adapt(load_folder(tmp_path / "base"), config)
    ours.save_adapter(model, tmp_path / "adapter", config=config, base="b")
    again = load_folder(tmp_path / "base")
    loaded = ours.load_adapter(again, tmp_path / "adapter")
    assert (loaded.r, loaded.lora_alpha, set(loaded.target_modules)) == (5, 7, {"k_proj", "down_proj"})
    before, after = ours.adapter_tensors(model), ours.adapter_tensors(again)
    assert list(before) == list(after) and len(before) == 2 * 2 * 3
    assert all(np.array_equal(before[key], after[key]) for key in before)
    assert np.array_equal(model(IDS), again(IDS))
    ours.save_adapter(again, tmp_path / "again", config=loaded, base="b")
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "adapter" / file).read_bytes() == (tmp_path / "again" / file).read_bytes()


def test_the_files(tmp_path, model):
    """The layout, and that PEFT reads the very settings that it would have written for such an adapter."""
    config = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.05, target_modules=("q_proj", "v_proj"))
    adapt(model, config)
    ours.save_adapter(model, tmp_path / "a" / "b", config=config, base="org/name", revision="abc")
    folder = tmp_path / "a" / "b"
    assert sorted(path.name for path in folder.iterdir()) == [
        "README.md", "adapter_config.json", "adapter_model.safetensors",
    ]  # fmt: skip
    text = (folder / "adapter_config.json").read_text()
    assert text == json.dumps(json.loads(text), indent=2, sort_keys=True)
    expected = peft.LoraConfig(
        r=4, lora_alpha=8, lora_dropout=0.05, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM",
        inference_mode=True, base_model_name_or_path="org/name", revision="abc",
    )  # fmt: skip
    read = peft.PeftConfig.from_pretrained(folder)  # a warning would be an error here
    assert read.to_dict() == expected.to_dict()
    assert json.loads(text)["lora_alpha"].__class__ is int
    with safe_open(folder / "adapter_model.safetensors", "np") as file:
        assert file.metadata() == {"format": "pt"}
        assert file.get_slice("base_model.model.model.layers.2.self_attn.q_proj.lora_A.weight").get_dtype() == "F32"
        assert len(list(file.keys())) == 2 * 2 * 3
    card = (folder / "README.md").read_text()
    assert card.startswith("---\nbase_model: org/name\nlibrary_name: peft\n")
    assert "rank 4, alpha 8" in card and "`q_proj`, `v_proj`" in card


def test_targets_are_whole_paths_where_a_last_part_is_not_enough(model):
    """Layers 0 and 1-2 of this model are two stacks: one may be adapted alone."""
    (first, _) = (linear for linear in named_nodes(model, Linear) if linear.name.endswith("q_proj"))
    lora.attach(first.node, jnp.ones((1, 2, 48)), jnp.ones((1, 60, 2)), jnp.ones((1,)), 0.0)
    assert ours.target_modules(model) == ["model.layers.0.self_attn.q_proj"]


@pytest.fixture
def model(tmp_path):
    make_checkpoint("qwen3-biases-windows", tmp_path / "checkpoint")
    return load_folder(tmp_path / "checkpoint")


@pytest.fixture
def adapter(tmp_path):
    """A folder that PEFT made, for a llama of `base`."""
    peft_adapter(make_checkpoint("llama", tmp_path / "base"), tmp_path / "adapter")
    return tmp_path / "adapter"


def edit_config(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_every_unsupported_option_is_named(adapter, tmp_path):
    edit_config(adapter, lora_bias=True, layer_replication=[[0, 2]], new_idea=3)
    with pytest.raises(CheckpointError) as error:
        ours.load_adapter(load_folder(tmp_path / "base"), adapter)
    for part in ("adapter_config.json", "lora_bias=True", "layer_replication=[[0, 2]]", "new_idea=3"):
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"init_lora_weights": "corda"}, "init_lora_weights='corda'"),
        ({"layers_to_transform": [3]}, r"layers_to_transform names \[3\], but the model's layers are 0 to 2"),
        ({"peft_type": "LOHA"}, "peft_type is 'LOHA'"),
        ({"r": 0}, "the rank r must be larger than 0"),
        ({"target_modules": ["q_proj", "query"]}, "'query' matches no linear layer .* q_proj"),
        ({"target_modules": r".*\.query"}, "matches no linear layer"),
        ({"target_modules": None}, "target_modules is empty"),
        ({"target_modules": ["model.layers.3.mlp.up_proj"]}, "'model.layers.3.mlp.up_proj' matches no linear layer"),
    ],
)
def test_settings_that_do_not_work(adapter, tmp_path, changes, message):
    edit_config(adapter, **changes)
    model = load_folder(tmp_path / "base")
    with pytest.raises(CheckpointError, match=f"adapter_config.json: .*{message}"):
        ours.load_adapter(model, adapter)
    assert not lora.adapters(model)


def test_every_tensor_that_does_not_fit_is_named(adapter, tmp_path):
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    prefix = "base_model.model.model.layers"
    del tensors[f"{prefix}.1.mlp.up_proj.lora_A.weight"]
    tensors[f"{prefix}.0.self_attn.q_proj.lora_B.weight"] = torch.ones(7, 4)
    tensors[f"{prefix}.0.self_attn.q_proj.lora_magnitude_vector"] = torch.ones(60)
    save_file(tensors, file)
    with pytest.raises(CheckpointError) as error:
        ours.load_adapter(load_folder(tmp_path / "base"), adapter)
    for part in (
        str(file),
        f"1 missing: {prefix}.1.mlp.up_proj.lora_A.weight",
        f"1 unexpected: {prefix}.0.self_attn.q_proj.lora_magnitude_vector",
        f"1 misshapen: {prefix}.0.self_attn.q_proj.lora_B.weight is [7, 4], expected [60, 4]",
    ):
        assert part in str(error.value)


def test_a_head_of_another_base_is_refused(tmp_path):
    peft_adapter(make_checkpoint("llama", tmp_path / "base"), tmp_path / "adapter", target_modules=["lm_head"])
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors["base_model.model.lm_head.base_layer.weight"] += 1
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match="lm_head.base_layer.weight is not the base model's"):
        ours.load_adapter(load_folder(tmp_path / "base"), tmp_path / "adapter")


def test_missing_and_broken_files(adapter, tmp_path):
    model = load_folder(tmp_path / "base")
    with pytest.raises(CheckpointError, match=r"base/adapter_config.json: cannot be read \(No such file"):
        ours.load_adapter(model, tmp_path / "base")
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    with pytest.raises(CheckpointError, match="adapter_model.safetensors is missing: adapter_model.bin is a pickle"):
        ours.load_adapter(model, adapter)
    (adapter / "adapter_config.json").write_text("{")
    with pytest.raises(CheckpointError, match="adapter_config.json: not JSON"):
        ours.load_adapter(model, adapter)


def test_two_adapters_are_refused(adapter, tmp_path):
    model = load_folder(tmp_path / "base")
    ours.load_adapter(model, adapter)
    with pytest.raises(ValueError, match="already has adapters"):
        ours.load_adapter(model, adapter)


def test_saving_what_is_not_there(tmp_path, model):
    with pytest.raises(ValueError, match="no adapter to save: call FastLanguageModel.get_peft_model"):
        ours.save_adapter(model, tmp_path / "adapter", config=LoraConfig(), base="b")
    adapt(model, LoraConfig(r=4))
    with pytest.raises(ValueError, match="rank 4 and scaling .*4.* the settings say rank 4 and scaling 8.0"):
        ours.save_adapter(model, tmp_path / "adapter", config=LoraConfig(r=4, lora_alpha=32), base="b")
    assert not (tmp_path / "adapter").exists()


class BrokenTokenizer:
    def save_pretrained(self, folder):
        raise RuntimeError("the disk is full")


def test_a_failed_save_changes_nothing(tmp_path, model):
    config = LoraConfig(r=4)
    adapt(model, config)
    folder = tmp_path / "adapter"
    with pytest.raises(RuntimeError, match="the disk is full"):
        ours.save_adapter(model, folder, BrokenTokenizer(), config=config, base="b")
    assert not folder.exists()
    ours.save_adapter(model, folder, config=config, base="b")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(RuntimeError, match="the disk is full"):
        ours.save_adapter(model, folder, BrokenTokenizer(), config=config, base="another")
    assert before == {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_folder_that_cannot_be_written(tmp_path, model):
    config = LoraConfig(r=4)
    adapt(model, config)
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"cannot save there \(.*\): choose a folder.*file/adapter"):
        ours.save_adapter(model, tmp_path / "file" / "adapter", config=config, base="b")


def test_the_base_is_found_by_name_or_beside(tmp_path, adapter):
    edit_config(adapter, base_model_name_or_path=str(tmp_path / "base"))
    assert ours.base_model_name(adapter) == str(tmp_path / "base")
    shutil.move(tmp_path / "base", adapter / "base")
    assert ours.base_model_name(adapter) == str(adapter / "base")  # the adapter names a folder "base" that has moved
    edit_config(adapter, base_model_name_or_path="org/name", revision="abc")
    assert ours.base_model_name(adapter) == "org/name"
    assert ours.base_model_revision(adapter) == "abc"
    edit_config(adapter, base_model_name_or_path=None)
    with pytest.raises(CheckpointError, match="base_model_name_or_path is None"):
        ours.base_model_name(adapter)


def test_the_tokenizer_is_saved(tmp_path, model):
    rules = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<unk>": 0, "a": 1, "b": 2}, unk_token="<unk>"))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=rules, unk_token="<unk>")
    config = LoraConfig(r=4)
    ours.save_adapter(adapt(model, config), tmp_path / "adapter", tokenizer, config=config, base="b")
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "adapter")
    assert again.get_vocab() == tokenizer.get_vocab() and again.unk_token == "<unk>"
