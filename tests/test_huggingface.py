"""Hugging Face checkpoints: how they are written, how they are broken, and the memory that loading takes."""

import json
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.torch
import torch
import transformers
from helpers import TINY, load_folder, make_checkpoint, make_pair, random_ids, relative_error, smollm2_path, torch_model
from huggingface_hub import split_torch_state_dict_into_shards

from jaxlora.config import QuantConfig
from jaxlora.converters.families import FAMILIES
from jaxlora.converters.gguf import GGUFSource
from jaxlora.converters.huggingface import CheckpointError, SafetensorsSource, load_model, model_config
from jaxlora.model import named_nodes
from jaxlora.quant import QuantizedArray, dequantize, quantize
from jaxlora.variables import BaseParam

DTYPES = {torch.float32: np.float32, torch.bfloat16: jnp.bfloat16, torch.float16: np.float16}


def weights_of(model):
    """Every tensor of a model of ours under its checkpoint name."""
    tensors = {}
    for parameter in named_nodes(model, BaseParam):
        value = parameter.node.get_value()
        value = np.asarray(dequantize(value) if isinstance(value, QuantizedArray) else value)
        tensors.update(zip(parameter.names(), value if parameter.layers else [value], strict=True))
    return tensors


# ---- tensors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_shard_size", ["5GB", "60KB"], ids=["single", "sharded"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["llama-biases", "qwen2-windows"])
def test_every_tensor_arrives(name, dtype, max_shard_size, tmp_path):
    theirs = make_checkpoint(name, tmp_path, dtype, max_shard_size)
    assert (tmp_path / "model.safetensors.index.json").exists() == (max_shard_size == "60KB")
    source = SafetensorsSource(tmp_path)
    assert {source.dtype(tensor) for tensor in source.names()} == {np.dtype(DTYPES[dtype])}
    weights = weights_of(load_folder(tmp_path))
    expected = theirs.state_dict()
    assert set(weights) == set(expected) - ({"lm_head.weight"} if theirs.config.tie_word_embeddings else set())
    for tensor, value in weights.items():
        assert value.dtype == np.float32
        np.testing.assert_array_equal(value, expected[tensor].float().numpy())
        assert source.shape(tensor) == value.shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_block_projections_are_quantised_from_the_files_dtype(dtype, tmp_path):
    theirs = make_checkpoint("qwen3", tmp_path, dtype)
    model = load_folder(tmp_path, jnp.bfloat16, QuantConfig())
    expected = theirs.state_dict()
    quantised = set()
    for parameter in named_nodes(model, BaseParam):
        value = parameter.node.get_value()
        if not isinstance(value, QuantizedArray):
            assert value.dtype == jnp.bfloat16
            continue
        for layer, name in enumerate(parameter.names()):
            quantised.add(name.split(".", 3)[3])
            whole = quantize(jnp.asarray(expected[name].float().numpy()).astype(str(dtype).removeprefix("torch.")))
            for field in ("codes", "scales", "nested_absmax", "nested_offset"):
                np.testing.assert_array_equal(getattr(value, field)[layer], getattr(whole, field))
    attention, mlp = ("q", "k", "v", "o"), ("gate", "up", "down")
    assert quantised == {f"self_attn.{p}_proj.weight" for p in attention} | {f"mlp.{p}_proj.weight" for p in mlp}


def test_computed_buffers_of_old_checkpoints_are_ignored(tmp_path):
    theirs, _ = make_pair("llama", tmp_path)
    tensors = {**theirs.state_dict(), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(5)}
    safetensors.torch.save_file(tensors, tmp_path / "model.safetensors")
    assert len(weights_of(load_folder(tmp_path))) == len(tensors) - 1


def test_a_tied_head_that_is_stored_all_the_same_is_ignored(tmp_path):
    theirs, _ = make_pair("llama-tied", tmp_path)
    tensors = {name: tensor.clone() for name, tensor in theirs.state_dict().items()}
    assert "lm_head.weight" in tensors
    safetensors.torch.save_file(tensors, tmp_path / "model.safetensors")
    ids = random_ids(1, 5)
    with torch.no_grad():
        expected = theirs(torch.tensor(ids).long()).logits
    assert relative_error(load_folder(tmp_path)(jnp.asarray(ids)), expected) < 2e-5


# ---- config.json -----------------------------------------------------------------------------------------------------


def first_of(config, *names):
    return next(value for value in (getattr(config, name, None) for name in names) if value is not None)


def assert_same_settings(ours, theirs):
    """Our `ModelConfig` says what transformers' configuration says, defaults included."""
    theirs.allow_global_per_layer_attribute_access = True  # or it says nothing of what layers have otherwise
    for field in (
        "model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "max_position_embeddings", "tie_word_embeddings",
    ):  # fmt: skip
        if hasattr(theirs, field) and (
            theirs.model_type != "falcon" or field not in ("intermediate_size", "num_key_value_heads")
        ):
            assert getattr(ours, field) == getattr(theirs, field), field
    assert ours.hidden_act == first_of(theirs, "hidden_activation", "activation", "hidden_act")
    assert ours.norm_eps == first_of(theirs, "rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_epsilon")
    assert ours.head_dim == (getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads)
    for field in (
        "num_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob",
        "shared_expert_intermediate_size", "attention_k_eq_v", "num_kv_shared_layers", "use_double_wide_mlp",
        "hidden_size_per_layer_input", "vocab_size_per_layer_input", "final_logit_softcapping",
    ):  # fmt: skip
        if hasattr(theirs, field):
            assert (getattr(ours, field) or None) == (getattr(theirs, field) or None), field
    if hasattr(theirs, "kv_sharing_modes"):
        for i, (layer, mode) in enumerate(zip(ours.layers, theirs.kv_sharing_modes, strict=True)):
            expected = theirs.per_layer_config[i]
            assert (layer.head_dim, layer.num_key_value_heads) == (expected.head_dim, expected.num_key_value_heads)
            assert (layer.reuses_kv is not None) == (mode == "reuse")
            assert layer.stores_kv is None or mode == "store"
    if hasattr(theirs, "mlp_only_layers"):
        step, without = theirs.decoder_sparse_step, theirs.mlp_only_layers
        sparse = [i not in without and (i + 1) % step == 0 for i in range(theirs.num_hidden_layers)]
        assert [layer.sparse for layer in ours.layers] == sparse
    ropes = theirs.rope_parameters
    for layer_type, rope in (("full_attention", ours.rope), ("sliding_attention", ours.sliding_rope or ours.rope)):
        expected = ropes.get(layer_type, ropes)
        assert (rope.rope_type, rope.rope_theta) == (expected["rope_type"], expected["rope_theta"])
        assert rope.partial_rotary_factor == expected.get("partial_rotary_factor", 1.0)
    if getattr(theirs, "layer_types", None) and "hybrid" not in theirs.layer_types:
        assert list(ours.layer_types) == theirs.layer_types
    if "sliding_attention" in ours.layer_types:
        assert ours.sliding_window == theirs.sliding_window


@pytest.mark.parametrize("name", TINY)
def test_config_equals_transformers(name, tmp_path):
    theirs = torch_model(name).config
    theirs.save_pretrained(tmp_path)
    ours = model_config(json.loads((tmp_path / "config.json").read_text()))
    assert_same_settings(ours, theirs)


@pytest.mark.parametrize("name", ["llama-linear", "mistral-yarn", "qwen2", "qwen3-yarn-mscale", "llama-llama3"])
def test_both_forms_of_the_rope_fields_are_one(name):
    config = torch_model(name).config.to_dict()
    rope = config.pop("rope_parameters")
    theta, rope_type = rope.pop("rope_theta"), rope.pop("rope_type")
    scaling = {"rope_type": rope_type, **rope} if rope_type != "default" else None
    older = {**config, "rope_theta": theta, "rope_scaling": scaling}
    oldest = {**config, "rope_theta": theta, "rope_scaling": scaling and {"type": rope_type, **rope}}
    newer = {**config, "rope_parameters": {"rope_type": rope_type, "rope_theta": theta, **rope}}
    assert model_config(older) == model_config(oldest) == model_config(newer)


@pytest.mark.parametrize(
    "model_type", sorted(FAMILIES.keys() - {"gemma3", "gemma4", "qwen3_5", "qwen3_5_moe"})
)  # no own
def test_fields_left_out_have_the_defaults_of_transformers(model_type):
    assert_same_settings(model_config({"model_type": model_type}), transformers.AutoConfig.for_model(model_type))


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(model_type="gpt2"), "model_type 'gpt2' is not supported; supported are cohere, cohere2, falcon"),
        (dict(model_type=None), "model_type None is not supported; supported are cohere"),
        (dict(hidden_act="swishy"), "hidden_act 'swishy' is not supported; supported are silu, gelu"),
        (dict(rope_scaling={"rope_type": "spiral", "factor": 2.0}), "rope_type 'spiral' is not one of default, linear"),
        (dict(rope_scaling={"type": "linear"}), "rope_type 'linear' needs a factor, and none is given"),
        (dict(rope_scaling={"type": "linear", "factor": 0.5}), "rope factor must be at least 1, found 0.5"),
        (dict(num_attention_heads=6, num_key_value_heads=4), r"num_attention_heads \(6\) must be a multiple of"),
        (dict(model_type="qwen2", layer_types=["full_attention"]), "layer_types has 1 entries for 32 layers"),
        (
            dict(model_type="qwen2", num_hidden_layers=1, layer_types=["strided"]),
            "layer type 'strided' is not one of full_attention, sliding_attention",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_config_that_is_not_supported_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        model_config({"model_type": "llama", **changes})


def test_unknown_rope_fields_are_said():
    with pytest.warns(UserWarning, match="rope fields twist are not used by rope_type 'linear'"):
        model_config({"model_type": "llama", "rope_scaling": {"type": "linear", "factor": 2.0, "twist": 1}})


# ---- broken checkpoints ----------------------------------------------------------------------------------------------


def test_all_that_does_not_fit_is_in_one_error(tmp_path):
    theirs, _ = make_pair("llama", tmp_path)
    tensors = theirs.state_dict()
    del tensors["model.layers.1.mlp.up_proj.weight"], tensors["model.norm.weight"]
    tensors["model.layers.0.self_attn.q_proj.weight"] = torch.zeros(60, 47)
    tensors["model.layers.7.extra"] = torch.zeros(2)
    safetensors.torch.save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError) as error:
        load_folder(tmp_path)
    message = str(error.value)
    assert message.startswith("the tensors do not fit a llama model of this config.json. ")
    assert "2 missing: model.layers.1.mlp.up_proj.weight; model.norm.weight" in message
    assert "1 unexpected: model.layers.7.extra" in message
    assert "1 misshapen: model.layers.0.self_attn.q_proj.weight is [60, 47], expected [60, 48]" in message


def test_a_tied_config_over_an_untied_file_without_embeddings_is_refused(tmp_path):
    theirs, _ = make_pair("llama-tied", tmp_path)
    tensors = {n: t.clone() for n, t in theirs.state_dict().items() if n != "model.embed_tokens.weight"}
    safetensors.torch.save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="1 missing: model.embed_tokens.weight"):
        load_folder(tmp_path)


def test_no_such_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere: no such checkpoint folder"):
        SafetensorsSource(tmp_path / "nowhere")


def test_a_folder_that_is_no_checkpoint(tmp_path):
    with pytest.raises(
        CheckpointError, match="is not a checkpoint: neither model.safetensors nor model.safetensors.index"
    ):
        SafetensorsSource(tmp_path)


def test_pickles_are_refused(tmp_path):
    torch.save({"a": torch.zeros(1)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pickle weights only \(pytorch_model.bin\).*refused: convert them"):
        SafetensorsSource(tmp_path)


def test_a_missing_shard_is_named(tmp_path):
    make_checkpoint("llama", tmp_path, max_shard_size="60KB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    shards[1].unlink()
    with pytest.raises(FileNotFoundError, match=f"names shards that are not there: {shards[1].name}: download"):
        SafetensorsSource(tmp_path)


def test_a_tensor_of_the_index_that_no_shard_holds_is_named(tmp_path):
    make_checkpoint("llama", tmp_path, max_shard_size="60KB")
    shard = sorted(tmp_path.glob("model-*.safetensors"))[0]
    tensors = safetensors.torch.load_file(shard)
    lost = sorted(tensors)[0]
    del tensors[lost]
    safetensors.torch.save_file(tensors or {"x": torch.zeros(1)}, shard)
    with pytest.raises(CheckpointError, match=f"1 missing: {re.escape(lost)}"):
        load_folder(tmp_path)


@pytest.mark.parametrize("keep", [0, 4, 100, 0.5, -1])
def test_a_truncated_file_is_named(keep, tmp_path):
    make_checkpoint("llama", tmp_path)
    path = tmp_path / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)] if isinstance(keep, float) else data[:keep])
    with pytest.raises(CheckpointError, match=f"{re.escape(str(path))}: .*download or copy it again"):
        SafetensorsSource(tmp_path)


@pytest.mark.parametrize(
    "header, message",
    [
        (b"{nonsense", "its safetensors header cannot be read"),
        (
            b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}',
            "tensor a of shape .2,. and float32 does not fill",
        ),
        (
            b'{"a": {"dtype": "U3", "shape": [4], "data_offsets": [0, 4]}}',
            "tensor a has dtype U3, which is not supported",
        ),
        (b'{"a": {"dtype": "F32", "shape": [1]}}', "header cannot be read .*data_offsets"),
        (b"[]", "header cannot be read"),
    ],
    ids=["not-json", "sizes", "dtype", "no-offsets", "a-list"],
)
def test_a_broken_header_is_named(header, message, tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 4)
    with pytest.raises(CheckpointError, match=f"{re.escape(str(path))}: .*{message}"):
        SafetensorsSource(tmp_path)


def test_a_broken_index_is_named(tmp_path):
    path = tmp_path / "model.safetensors.index.json"
    for text in ("{broken", '{"metadata": {}}', "[]"):
        path.write_text(text)
        with pytest.raises(CheckpointError, match=f"{re.escape(str(path))}: .*weight_map"):
            SafetensorsSource(tmp_path)


# ---- the real one ----------------------------------------------------------------------------------------------------


def test_smollm2_logits_equal_transformers(tmp_path):
    path = smollm2_path()
    theirs = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name).eval()
    del theirs.config.quantization_config  # it was GGUF, and is dense now
    theirs.hf_quantizer, theirs.is_quantized = None, False
    theirs.save_pretrained(tmp_path, max_shard_size="200MB")
    ids = np.asarray([[1, 4093, 198, 1780, 314, 260, 3575, 282, 4649, 47, 2, 198]], np.int32)
    with torch.no_grad():
        expected = theirs(torch.tensor(ids).long()).logits
    from_safetensors = load_folder(tmp_path)
    source = GGUFSource(path)
    from_gguf = load_model(source, source.config(), dtype=jnp.float32)
    for model in (from_safetensors, from_gguf):
        assert relative_error(model(jnp.asarray(ids)), expected) < 2e-5


# ---- memory ----------------------------------------------------------------------------------------------------------

MEASURE = """
import json, sys, threading, time
from pathlib import Path
import jax, jax.numpy as jnp
jax.config.update("jax_platforms", "cpu")
from flax import nnx
from jaxlora.config import QuantConfig
from jaxlora.converters.huggingface import SafetensorsSource, load_model

def anonymous():
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("RssAnon:")[1].split()[0])

def load(folder):
    hf_config = json.loads((folder / "config.json").read_text())
    source = SafetensorsSource(folder)
    quantised = dict(dtype=jnp.bfloat16, quant_config=QuantConfig(), in_flight=int(sys.argv[3]))
    return source, load_model(source, hf_config, **quantised)

load(Path(sys.argv[1]))  # a tiny one: what JAX itself and its compiler take, once
before, peak, done = anonymous(), 0, threading.Event()

def watch():
    global peak
    while not done.is_set():
        peak = max(peak, anonymous())
        time.sleep(0.003)

thread = threading.Thread(target=watch)
thread.start()
source, model = load(Path(sys.argv[2]))
jax.block_until_ready(nnx.state(model))
done.set()
thread.join()
tensors = sorted(source.dtype(n).itemsize * jnp.size(source.read(n)) for n in source.names())
loaded = sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(model)))
found = dict(growth=peak - before, after=anonymous() - before, loaded=loaded)
print(json.dumps(dict(**found, two_largest=sum(tensors[-2:]), file=sum(tensors))))
"""


def write_large_checkpoint(folder: Path) -> None:
    """A Llama of 1.1 GB in bfloat16, written shard by shard."""
    config = transformers.LlamaConfig(
        hidden_size=1536, intermediate_size=4096, num_hidden_layers=16, num_attention_heads=12, num_key_value_heads=4,
        vocab_size=32_000,
    )  # fmt: skip
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = transformers.LlamaForCausalLM(config).to(torch.bfloat16).state_dict()
    plan = split_torch_state_dict_into_shards(shapes, max_shard_size="200MB")
    for file, names in plan.filename_to_tensors.items():
        tensors = {name: torch.empty(shapes[name].shape, dtype=torch.bfloat16).normal_(0, 0.02) for name in names}
        safetensors.torch.save_file(tensors, folder / file)
    index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def test_loading_in_4bit_takes_the_quantised_model_and_what_is_on_its_way(tmp_path):
    small, large, in_flight = tmp_path / "small", tmp_path / "large", 2**26
    make_checkpoint("llama", small, torch.bfloat16)
    large.mkdir()
    write_large_checkpoint(large)
    command = [sys.executable, "-c", textwrap.dedent(MEASURE), str(small), str(large), str(in_flight)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    print(found)
    assert found["file"] > 1_000_000_000
    assert found["loaded"] < 0.5 * found["file"]
    assert found["growth"] > found["loaded"]  # or the measure sees nothing
    assert found["growth"] < found["loaded"] + found["two_largest"] + 100_000_000
