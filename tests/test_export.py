"""Merged checkpoints and exported bases, as transformers and PEFT load them; and the door that leads there."""

import json
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import peft
import pytest
import torch
import transformers
from helpers import make_checkpoint, random_ids, relative_error, smollm2_path
from safetensors.torch import load_file
from test_gguf import tensors as gguf_tensors
from test_gguf import write as write_gguf

from jaxlora import lora
from jaxlora.converters.export import CastSource, export_base
from jaxlora.converters.gguf import GGUFSource
from jaxlora.converters.huggingface import CheckpointError, SafetensorsFile
from jaxlora.language_model import LanguageModel
from jaxlora.loader import FastLanguageModel
from jaxlora.train import TrainState, make_train_step

IDS = jnp.asarray(random_ids(2, 11))
INDEX = "model.safetensors.index.json"


def load(path, **options) -> LanguageModel:
    options = {"max_seq_length": 32, "dtype": "float32", "use_gradient_checkpointing": False} | options
    with pytest.warns(UserWarning, match="has no tokenizer files"):
        return FastLanguageModel.from_pretrained(path, **options)[0]


def adapt(model: LanguageModel, scale: float = 0.1, **options) -> LanguageModel:
    """Adapters with a B that is not zero."""
    options = {"r": 4, "lora_alpha": 6, "use_gradient_checkpointing": False} | options
    FastLanguageModel.get_peft_model(model, **options)
    for index, linear in enumerate(lora.adapters(model)):
        b = linear.node.lora_B
        b.set_value(scale * jax.random.normal(jax.random.key(index), b.get_value().shape))
    return model


def logits_of(torch_model, ids=IDS) -> np.ndarray:
    with torch.no_grad():
        return torch_model(torch.from_numpy(np.array(ids)).long()).logits.float().numpy()


def load_torch(path, **options):
    return transformers.AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager", **options).eval()


def peft_merge(base, adapter):
    """The adapter that was saved, merged by PEFT onto the same base."""
    return peft.PeftModel.from_pretrained(load_torch(base), adapter).merge_and_unload()


# ---- Merging onto safetensors ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("llama", {"load_in_16bit": True}),
        ("llama", {}),
        ("qwen2-windows", {"load_in_16bit": True}),  # tied, biases, two runs
        ("qwen3-yarn-factor", {"use_rslora": True, "target_modules": ["lm_head", "o_proj"]}),
    ],
    ids=["llama", "llama-4bit", "qwen2-tied", "qwen3-head"],
)
def test_merged_is_what_peft_merges(tmp_path, name, options):
    make_checkpoint(name, tmp_path / "base")
    adapters = {key: options[key] for key in options.keys() - {"load_in_16bit"}}
    model = adapt(load(tmp_path / "base", load_in_16bit=options.get("load_in_16bit", False)), **adapters)
    model.save_pretrained(tmp_path / "adapter")
    report = model.save_pretrained_merged(tmp_path / "merged")
    theirs = peft_merge(tmp_path / "base", tmp_path / "adapter")
    ours = load_torch(tmp_path / "merged")
    assert relative_error(logits_of(ours), logits_of(theirs)) < 1e-5
    for (key, a), b in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-6), key
    # The gap is there where the adapter sat on quantised weights, and nowhere else.
    assert report.export_error == 0.0
    assert report.merged_modules == sum(len(linear.names()) for linear in lora.adapters(model))
    assert (report.quantisation_gap < 1e-4) == bool(options.get("load_in_16bit"))


def test_shards_keep_all_but_the_merged_bytes(tmp_path):
    make_checkpoint("llama", tmp_path / "base", torch.bfloat16, max_shard_size="20KB")
    model = adapt(load_16bit(tmp_path / "base"), target_modules=["v_proj", "gate_proj"])
    (tmp_path / "base" / "tokenizer_config.json").write_text("{}")
    (tmp_path / "base" / "README.md").touch()
    report = model.save_pretrained_merged(tmp_path / "merged")

    base, merged = tmp_path / "base", tmp_path / "merged"
    shards = sorted(path.name for path in base.glob("*.safetensors"))
    assert len(shards) > 3 and sorted(report.files) == shards
    assert sorted(path.name for path in merged.iterdir()) == sorted(
        ["config.json", "generation_config.json", INDEX, "tokenizer_config.json", *shards]
    )
    for file in (INDEX, "generation_config.json", "tokenizer_config.json"):
        assert (merged / file).read_bytes() == (base / file).read_bytes()
    assert json.loads((merged / "config.json").read_text()) == json.loads((base / "config.json").read_text())

    changed = 0
    for shard in shards:
        before, after = SafetensorsFile(base / shard), SafetensorsFile(merged / shard)
        header = slice(before.header_length)
        assert (base / shard).read_bytes()[header] == (merged / shard).read_bytes()[header]
        assert (base / shard).stat().st_size == (merged / shard).stat().st_size
        for name in before.entries:
            same = np.array_equal(before.read(name).view(np.uint16), after.read(name).view(np.uint16))
            assert same == ("v_proj" not in name and "gate_proj" not in name), name
            changed += not same
    assert changed == report.merged_modules == 2 * 3


def load_16bit(path, **options):
    return load(path, load_in_16bit=True, **options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_merged_tensor_keeps_its_dtype(tmp_path, dtype):
    """... and is the float32 sum, rounded once: within half a unit of the last place of PEFT's, unrounded."""
    make_checkpoint("llama-tied", tmp_path / "base", dtype)
    model = adapt(load_16bit(tmp_path / "base"))
    model.save_pretrained(tmp_path / "adapter")
    report = model.save_pretrained_merged(tmp_path / "merged")
    assert report.export_error == 0.0
    exact = peft.PeftModel.from_pretrained(load_torch(tmp_path / "base", dtype=torch.float32), tmp_path / "adapter")
    exact = exact.merge_and_unload().state_dict()
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    assert "lm_head.weight" not in merged
    half_unit = torch.finfo(dtype).eps / 2
    for name, tensor in merged.items():
        assert tensor.dtype == dtype
        bound = half_unit * exact[name].abs() + 1e-6
        assert ((tensor.float() - exact[name]).abs() <= bound).all(), name
    assert load_torch(tmp_path / "merged").dtype == dtype


def test_the_merged_folder_loads_back(tmp_path):
    make_checkpoint("llama", tmp_path / "base")
    model = adapt(load_16bit(tmp_path / "base"))
    model.save_pretrained_merged(tmp_path / "merged")
    again = load_16bit(tmp_path / "merged")
    assert relative_error(again(IDS), model(IDS)) < 1e-5
    assert again.lora_config is None and not lora.adapters(again)
    # A second save replaces the first; and a merged model is a base like any other.
    model.save_pretrained_merged(tmp_path / "merged", verify=False)
    assert relative_error(load_16bit(tmp_path / "merged")(IDS), model(IDS)) < 1e-5


def test_the_report_without_checking(tmp_path):
    make_checkpoint("llama", tmp_path / "base")
    report = adapt(load(tmp_path / "base")).save_pretrained_merged(tmp_path / "merged", verify=False)
    assert (report.export_error, report.quantisation_gap, report.largest_logit) == (None, None, None)
    assert (report.merged_modules, report.files) == (7 * 3, ("model.safetensors",))


def test_the_gap_is_that_of_the_logits(tmp_path):
    make_checkpoint("llama", tmp_path / "base")
    model = adapt(load(tmp_path / "base"))
    report = model.save_pretrained_merged(tmp_path / "merged")
    ids = (7 * jnp.arange(32, dtype=jnp.int32)[None] + 1) % 97
    merged = logits_of(load_torch(tmp_path / "merged"), ids)
    assert report.quantisation_gap == pytest.approx(np.abs(merged - model(ids)).max(), rel=1e-4)
    assert report.largest_logit == pytest.approx(np.abs(merged).max(), rel=1e-4)
    assert report.quantisation_gap > 0.01


def test_what_is_read_back_must_be_right(tmp_path, monkeypatch):
    """A disk that loses a write is found out, and nothing is left behind."""
    make_checkpoint("llama", tmp_path / "base")
    model = adapt(load_16bit(tmp_path / "base"))
    whole = shutil.copyfile

    def lossy(source, destination):
        whole(source, destination)
        if destination.suffix == ".safetensors":
            entry = SafetensorsFile(destination).entries["model.norm.weight"]
            with destination.open("r+b") as file:
                file.seek(entry.start)
                file.write(bytes(64))

    monkeypatch.setattr(shutil, "copyfile", lossy)
    with pytest.raises(RuntimeError, match="read back, differs by .* nothing was saved"):
        model.save_pretrained_merged(tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


# ---- Refusals --------------------------------------------------------------------------------------------------------


def test_merges_that_cannot_be(tmp_path):
    make_checkpoint("llama", tmp_path / "base")
    model = load_16bit(tmp_path / "base")
    with pytest.raises(ValueError, match="no adapter to merge: call FastLanguageModel.get_peft_model"):
        model.save_pretrained_merged(tmp_path / "merged")
    adapt(model)
    with pytest.raises(ValueError, match='\'gguf\' is not one of "merged_16bit", "merged_4bit", "lora"'):
        model.save_pretrained_merged(tmp_path / "merged", save_method="gguf")
    with pytest.raises(ValueError, match="is the base checkpoint itself"):
        model.save_pretrained_merged(tmp_path / "base")
    with pytest.raises(ValueError, match="base_dtype='float16' is for a .gguf base"):
        model.save_pretrained_merged(tmp_path / "merged", base_dtype="float16")
    with pytest.raises(ValueError, match="base_folder and base_dtype are for a GGUF base"):
        model.save_pretrained(tmp_path / "merged", base_dtype="float16")
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("file", ["adapter_config.json", "model-00001-of-00002.safetensors", INDEX])
def test_folders_that_would_be_misread(tmp_path, file):
    make_checkpoint("llama", tmp_path / "base")
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / file).touch()
    with pytest.raises(ValueError, match=f"merged holds {file}, which .* choose another folder, or delete them"):
        adapt(load_16bit(tmp_path / "base")).save_pretrained_merged(tmp_path / "merged")
    assert [path.name for path in (tmp_path / "merged").iterdir()] == [file]


def test_another_models_base(tmp_path):
    make_checkpoint("llama", tmp_path / "base")
    make_checkpoint("llama", tmp_path / "shallow", num_hidden_layers=2)
    make_checkpoint("llama", tmp_path / "wide", intermediate_size=96)
    model = adapt(load_16bit(tmp_path / "base"), target_modules=["up_proj"])
    with pytest.raises(CheckpointError, match=r"1 of 3 adapters .*layers.2.mlp.up_proj.weight is missing"):
        model.save_pretrained_merged(tmp_path / "merged", base=tmp_path / "shallow")
    with pytest.raises(
        CheckpointError, match=r"3 of 3 adapters .*up_proj.weight is \[96, 48\], and what it learnt \[80, 48\]"
    ):
        model.save_pretrained_merged(tmp_path / "merged", base=tmp_path / "wide")


def test_values_that_do_not_fit(tmp_path):
    make_checkpoint("llama", tmp_path / "base", torch.float16)
    model = adapt(load_16bit(tmp_path / "base"), scale=1e6)
    with pytest.raises(ValueError, match="_proj.weight has values that are infinite or no numbers in float16"):
        model.save_pretrained_merged(tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_a_4bit_base_needs_its_original(tmp_path):
    make_checkpoint("llama", tmp_path / "base")
    settings = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    quantised = load_torch(tmp_path / "base", quantization_config=settings, device_map="cpu", dtype=torch.float32)
    quantised.save_pretrained(tmp_path / "bnb")
    with pytest.raises(ValueError, match="holds weights quantised as nf4: load it without load_in_16bit=True"):
        FastLanguageModel.from_pretrained(tmp_path / "bnb", max_seq_length=32, load_in_16bit=True)
    model = adapt(load(tmp_path / "bnb"))
    with pytest.raises(CheckpointError, match="bnb holds quantised weights, .* pass the 16-bit model .* as base="):
        model.save_pretrained_merged(tmp_path / "merged")
    report = model.save_pretrained_merged(tmp_path / "merged", base=tmp_path / "base")
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())
    assert report.export_error == 0.0 and report.quantisation_gap > 0.01
    # The same adapter on the unquantised model is the merged one.
    model.save_pretrained(tmp_path / "adapter")
    theirs = peft_merge(tmp_path / "base", tmp_path / "adapter")
    assert relative_error(logits_of(load_torch(tmp_path / "merged")), logits_of(theirs)) < 1e-5


# ---- Adapters through the door ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"load_in_16bit": True}], ids=["4bit", "16bit"])
def test_an_adapter_folder_loads_and_trains_on(tmp_path, monkeypatch, options):
    make_checkpoint("llama", tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    model = adapt(load("base", **options))  # a relative path, which the adapter must not keep
    assert model.save_pretrained_merged("adapter", save_method="lora") is None
    monkeypatch.chdir("/")
    again = load(tmp_path / "adapter", **options)
    assert again.name_or_path == str(tmp_path / "base")
    assert np.array_equal(again(IDS), model(IDS))

    # The same call as at first changes nothing, in whatever order PEFT's list comes back; another one is refused.
    with pytest.warns(UserWarning, match="already has these LoRA adapters"):
        FastLanguageModel.get_peft_model(again, r=4, lora_alpha=6)
    with pytest.raises(TypeError, match="already has LoRA adapters with other settings"):
        FastLanguageModel.get_peft_model(again, r=8, lora_alpha=6)

    graphdef, trainable, frozen = lora.partition(again)
    assert sum(x.size for x in jax.tree.leaves(trainable)) == again.get_nb_trainable_parameters()[0] > 0
    optimizer = optax.sgd(0.1)
    step = make_train_step(graphdef, optimizer)
    state, first = step(TrainState.create(trainable, optimizer), frozen, {"input_ids": IDS, "labels": IDS})
    for _ in range(5):
        state, last = step(state, frozen, {"input_ids": IDS, "labels": IDS})
    assert last["loss"] < first["loss"]


# ---- GGUF bases ------------------------------------------------------------------------------------------------------


def small_gguf(path, change=lambda array: 0.1 * array):
    return write_gguf(path, {name: change(array) for name, array in gguf_tensors().items()})


GGUF_IDS = jnp.asarray(random_ids(2, 11, vocab=24))


@pytest.fixture
def gguf_model(tmp_path):
    small_gguf(tmp_path / "model.gguf")
    return adapt(load(tmp_path / "model.gguf", load_in_16bit=True), scale=0.02)


def test_the_base_of_a_gguf_file_is_written_beside_the_adapter(tmp_path, gguf_model):
    folder = tmp_path / "adapter"
    gguf_model.save_pretrained(folder)
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == str(folder / "base")
    theirs = peft.AutoPeftModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    assert relative_error(logits_of(theirs, GGUF_IDS), gguf_model(GGUF_IDS)) < 1e-5
    # Our own way back takes the exported base; also after the folder has moved as a whole.
    folder.rename(tmp_path / "moved")
    again = load(tmp_path / "moved", load_in_16bit=True)
    assert again.base_folder == str(tmp_path / "moved" / "base")
    assert np.array_equal(again(GGUF_IDS), gguf_model(GGUF_IDS))


def test_one_exported_base_serves_many_adapters(tmp_path, gguf_model):
    for name in ("first", "second"):
        gguf_model.save_pretrained(tmp_path / name, base_folder=tmp_path / "base", base_dtype="bfloat16")
        config = json.loads((tmp_path / name / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == str(tmp_path / "base")
        assert not (tmp_path / name / "base").exists()
        weights = (tmp_path / "base" / "model.safetensors").stat()
        if name == "first":
            written = weights.st_ino, weights.st_mtime_ns
    assert written == (weights.st_ino, weights.st_mtime_ns)
    with pytest.raises(NotADirectoryError, match="cannot save there"):
        gguf_model.save_pretrained(tmp_path / "third", base_folder=tmp_path / "model.gguf" / "base")


@pytest.mark.parametrize("dtype", [None, "bfloat16", "float16"])
def test_exported_bases_load_in_transformers(tmp_path, dtype):
    source = GGUFSource(small_gguf(tmp_path / "model.gguf"))
    assert export_base(source, tmp_path / "base", dtype=dtype, max_shard_size="500KB") == tmp_path / "base"
    model = load_torch(tmp_path / "base")
    assert str(model.dtype) == f"torch.{dtype or 'float32'}"
    assert model.state_dict().keys() - {"lm_head.weight"} == set(source.names())
    for name, tensor in model.state_dict().items():
        if name != "lm_head.weight":
            assert np.array_equal(tensor.float(), source.read(name).astype(dtype or np.float32).astype(np.float32))
    files = sorted(path.name for path in (tmp_path / "base").glob("*.safetensors"))
    assert len(files) > 1
    index = json.loads((tmp_path / "base" / INDEX).read_text())
    assert sorted(set(index["weight_map"].values())) == files
    size = sum(tensor.numel() for name, tensor in model.state_dict().items() if name != "lm_head.weight")
    assert index["metadata"]["total_size"] == size * (2 if dtype else 4)
    # What is there is no other model's: it is neither kept nor written over.
    another = GGUFSource(small_gguf(tmp_path / "another.gguf", lambda array: array + 1))
    with pytest.raises(ValueError, match=f"base holds .*{INDEX}.* choose another folder"):
        export_base(another, tmp_path / "base", dtype=dtype)


def test_bases_that_do_not_fit(tmp_path):
    source = GGUFSource(small_gguf(tmp_path / "model.gguf", lambda array: 1e5 * array))
    with pytest.raises(ValueError, match="token_embd|embed_tokens.weight has values that are infinite .* in float16"):
        export_base(source, tmp_path / "base", dtype="float16")
    assert not (tmp_path / "base").exists()
    with pytest.raises(ValueError, match="base_dtype 'int8' is not one of float32, bfloat16, float16"):
        export_base(source, tmp_path / "base", dtype="int8")


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_a_gguf_base_is_merged(tmp_path, gguf_model, dtype):
    report = gguf_model.save_pretrained_merged(tmp_path / "merged", base_dtype=dtype, max_shard_size="500KB")
    assert len(report.files) > 1 and report.merged_modules == 7 * 2 and report.export_error == 0.0
    gguf_model.save_pretrained(tmp_path / "adapter")
    exact = peft_merge(tmp_path / "adapter" / "base", tmp_path / "adapter").state_dict()
    ours = load_torch(tmp_path / "merged")
    assert str(ours.dtype) == f"torch.{dtype or 'float32'}"
    for name, tensor in ours.state_dict().items():
        bound = (2**-8 if dtype else 0) * exact[name].abs() + 1e-6  # rounded once, after the sum
        assert ((tensor.float() - exact[name]).abs() <= bound).all(), name


def test_casting_is_numpys(tmp_path):
    source = GGUFSource(small_gguf(tmp_path / "model.gguf"))
    cast, name = CastSource(source, "bfloat16"), "model.norm.weight"
    assert cast.dtype(name) == ml_dtypes.bfloat16 and cast.shape(name) == source.shape(name)
    assert np.array_equal(cast.read(name), source.read(name).astype(ml_dtypes.bfloat16))


@pytest.mark.slow
def test_smollm2_goes_to_peft_and_transformers(tmp_path):
    """The real model from its GGUF file: adapter on NF4, PEFT files, merge, and a chat that survives the way."""
    model, tokenizer = FastLanguageModel.from_pretrained(
        smollm2_path(), max_seq_length=128, dtype="float32", use_gradient_checkpointing=False
    )
    adapt(model, scale=0.002, target_modules=["q_proj", "v_proj", "down_proj"])
    model.save_pretrained(tmp_path / "adapter", tokenizer)
    report = model.save_pretrained_merged(tmp_path / "merged", tokenizer)
    assert report.export_error == 0.0 and report.merged_modules == 3 * 30
    assert 0.1 < report.quantisation_gap / report.largest_logit < 1  # what NF4 costs a small model on no language

    chat = [{"role": "user", "content": "What is the capital of France?"}]
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "merged")
    ids = theirs.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    assert ids == tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    ids = np.array([ids], np.int32)

    merged = load_torch(tmp_path / "merged")
    with_adapter = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", attn_implementation="eager")
    expected = logits_of(with_adapter, ids)
    assert relative_error(logits_of(merged, ids), expected) < 1e-4
    # The live model differs by its base's quantisation, and agrees in what it says next.
    live = np.asarray(model(jnp.asarray(ids)))
    assert relative_error(live, expected) > 1e-3
    assert live[0, -1].argmax() == expected[0, -1].argmax()
