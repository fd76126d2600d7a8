"""What single families do, and the shapes of real models: no memory is taken, and every count is the published one."""

import copy
import dataclasses
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
import transformers
from flax import nnx
from helpers import (
    DENSE,
    HYBRID,
    SPARSE,
    TINY,
    adapter_matrices,
    load_folder,
    make_checkpoint,
    marked,
    random_ids,
    randomise_adapters,
    relative_error,
)
from helpers import FAMILIES as FIRST
from safetensors.torch import load_file, save_file

from jaxlora.config import LoraConfig, QuantConfig
from jaxlora.converters.export import save_merged, save_model
from jaxlora.converters.families import FAMILIES
from jaxlora.converters.huggingface import CheckpointError, SafetensorsSource, model_config, parameter_shapes
from jaxlora.converters.peft import load_adapter, save_adapter
from jaxlora.layers import Linear
from jaxlora.loader import _with_rope_scaling as with_rope_scaling
from jaxlora.lora import add_adapters, delta_weight
from jaxlora.model import CausalLM, named_nodes
from jaxlora.quant import dequantize

# The largest model of each family, and how many weights its makers say it has; embeddings that are tied count once.
#
# Where the figures are from, beyond each model's config.json on the Hugging Face hub:
#   safetensors.total of the hub's API       Llama-3.3-70B, Qwen3-235B-A22B, Mixtral-8x7B, Qwen3.5-27B, Qwen3.5-35B-A3B,
#                                            Gemma 4 26B-A4B and 31B
#   headers of the safetensors files         Gemma 4 E2B and E4B
#   "params" of keras-hub's presets          Qwen1.5-MoE-A2.7B, Mixtral-8x7B, Qwen3-235B-A22B, Gemma 3 27B
#   general.parameter_count of GGUF files    Qwen3-30B-A3B, gpt-oss-20b and -120b (the hub's total counts packed bytes)
#   granite-guardian-3.2-3b-a800m's          granite-3.1-3b-a800m, of the same shape
# Falcon-H1's makers state 34B and 0.5B, no exact numbers: the fields are those of the published config.json, among
# them mamba_rms_norm (34B true, 0.5B false), and the numbers follow.
REAL = {
    "Llama-3.3-70B": (
        dict(model_type="llama", vocab_size=128256, hidden_size=8192, intermediate_size=28672, num_hidden_layers=80,
             num_attention_heads=64, num_key_value_heads=8),
        70_553_706_496,
    ),
    "Qwen3-32B": (
        dict(model_type="qwen3", vocab_size=151936, hidden_size=5120, intermediate_size=25600, num_hidden_layers=64,
             num_attention_heads=64, num_key_value_heads=8, head_dim=128),
        32_762_123_264,
    ),
    "gemma-7b": (dict(model_type="gemma"), 8_537_680_896),
    "gemma-2-27b": (
        dict(model_type="gemma2", hidden_size=4608, intermediate_size=36864, num_hidden_layers=46,
             num_attention_heads=32, num_key_value_heads=16, head_dim=128, query_pre_attn_scalar=144),
        27_227_128_320,
    ),
    # Less the vision tower's 416,866,032 and its projector's 6,194,304, as transformers makes them.
    "gemma-3-27b, text": (
        dict(model_type="gemma3_text", hidden_size=5376, intermediate_size=21504, num_hidden_layers=62,
             num_attention_heads=32, num_key_value_heads=16, head_dim=128, query_pre_attn_scalar=168),
        27_432_406_640 - 416_866_032 - 6_194_304,
    ),
    "granite-3.1-8b": (
        dict(model_type="granite", vocab_size=49155, intermediate_size=12800, num_hidden_layers=40,
             num_key_value_heads=8, tie_word_embeddings=True),
        8_170_848_256,
    ),
    "OLMo-2-32B": (
        dict(model_type="olmo2", vocab_size=100352, hidden_size=5120, intermediate_size=27648, num_hidden_layers=64,
             num_attention_heads=40, num_key_value_heads=8),
        32_234_279_936,
    ),
    "SmolLM3-3B": (dict(model_type="smollm3"), 3_075_098_624),
    "c4ai-command-r-v01": (dict(model_type="cohere"), 34_980_831_232),
    "c4ai-command-r-plus": (
        dict(model_type="cohere", hidden_size=12288, intermediate_size=33792, num_hidden_layers=64,
             num_attention_heads=96, num_key_value_heads=8, use_qk_norm=True),
        103_810_674_688,
    ),
    "c4ai-command-a": (
        dict(model_type="cohere2", hidden_size=12288, intermediate_size=36864, num_hidden_layers=64,
             num_attention_heads=96, num_key_value_heads=8),
        111_057_580_032,
    ),
    "Phi-3-medium": (
        dict(model_type="phi3", hidden_size=5120, intermediate_size=17920, num_hidden_layers=40,
             num_attention_heads=40, num_key_value_heads=10),
        13_960_238_080,
    ),
    "starcoder2-15b": (
        dict(model_type="starcoder2", hidden_size=6144, intermediate_size=24576, num_hidden_layers=40,
             num_attention_heads=48, num_key_value_heads=4, tie_word_embeddings=False),
        15_957_889_024,
    ),
    "glm-4-9b-chat-hf": (dict(model_type="glm"), 9_399_951_360),
    "GLM-4-32B-0414": (
        dict(model_type="glm4", hidden_size=6144, intermediate_size=23040, num_hidden_layers=61,
             num_attention_heads=48, attention_bias=False),
        32_566_081_536,
    ),
    "Seed-OSS-36B": (dict(model_type="seed_oss", hidden_size=5120), 36_151_104_512),
    "falcon-7b": (dict(model_type="falcon"), 6_921_720_704),
    "falcon-40b": (
        dict(
            model_type="falcon",
            hidden_size=8192,
            num_hidden_layers=60,
            num_attention_heads=128,
            num_kv_heads=8,
            new_decoder_architecture=True,
        ),
        41_303_293_952,
    ),
    "Ministral-8B": (
        dict(model_type="ministral", vocab_size=131072, intermediate_size=12288, num_hidden_layers=36, head_dim=128),
        8_019_808_256,
    ),
    "Mixtral-8x7B": (dict(model_type="mixtral"), 46_702_792_704),
    "Mixtral-8x22B-Instruct": (  # whose vocabulary is the base model's and 768 control tokens
        dict(model_type="mixtral", vocab_size=32768, hidden_size=6144, intermediate_size=16384, num_hidden_layers=56,
             num_attention_heads=48),
        140_630_071_296,
    ),
    "Qwen1.5-MoE-A2.7B": (dict(model_type="qwen2_moe"), 14_315_784_192),
    "Qwen3-30B-A3B": (
        dict(model_type="qwen3_moe", num_hidden_layers=48, head_dim=128), 30_532_122_624,
    ),
    "Qwen3-235B-A22B": (
        dict(model_type="qwen3_moe", hidden_size=4096, num_hidden_layers=94, num_attention_heads=64, head_dim=128,
             moe_intermediate_size=1536),
        235_093_634_560,
    ),
    "gpt-oss-20b": (dict(model_type="gpt_oss", num_hidden_layers=24, num_local_experts=32), 20_914_757_184),
    "gpt-oss-120b": (dict(model_type="gpt_oss"), 116_829_156_672),
    "Falcon-H1-34B": (
        dict(model_type="falcon_h1", vocab_size=261120, hidden_size=5120, intermediate_size=21504,
             num_hidden_layers=72, num_attention_heads=20, num_key_value_heads=4, head_dim=128, mamba_d_ssm=4096,
             mamba_n_heads=32, mamba_d_head=128, mamba_n_groups=2, mamba_d_state=256, mamba_rms_norm=True),
        33_642_516_224,
    ),
    "Falcon-H1-0.5B": (
        dict(model_type="falcon_h1", vocab_size=32784, hidden_size=1024, intermediate_size=2048,
             num_hidden_layers=36, num_attention_heads=8, num_key_value_heads=2, head_dim=64, mamba_d_ssm=1536,
             mamba_n_heads=24, mamba_d_head=64, mamba_d_state=128),
        521_411_104,
    ),
    # Less the vision tower's 460,730,096 and 424,699,392 for the prediction of the tokens after the next: a layer, a
    # projection of twice the width, three norms.
    "Qwen3.5-27B, text": (
        dict(model_type="qwen3_5_text", hidden_size=5120, intermediate_size=17408, num_hidden_layers=64,
             num_attention_heads=24, linear_num_value_heads=48),
        27_781_427_952 - 460_730_096 - 424_699_392,
    ),
    # Less 446,571,248 and 844,640,768 in the same way.
    "Qwen3.5-35B-A3B, text": (
        dict(model_type="qwen3_5_moe_text"), 35_951_822_704 - 446_571_248 - 844_640_768,
    ),
    # Less the vision tower and its projector.
    "gemma-4-31B, text": (
        dict(model_type="gemma4_text", hidden_size=5376, intermediate_size=21504, num_hidden_layers=60,
             num_attention_heads=32, num_key_value_heads=16, num_global_key_value_heads=4, attention_k_eq_v=True,
             hidden_size_per_layer_input=0, sliding_window=1024, final_logit_softcapping=30.0),
        31_273_088_876 - 569_550_384 - 6_193_152,
    ),
    "gemma-4-26B-A4B, text": (
        dict(model_type="gemma4_text", hidden_size=2816, intermediate_size=2112, num_hidden_layers=30,
             num_attention_heads=16, num_key_value_heads=8, num_global_key_value_heads=2, attention_k_eq_v=True,
             hidden_size_per_layer_input=0, enable_moe_block=True, num_experts=128, top_k_experts=8,
             moe_intermediate_size=704, sliding_window=1024, final_logit_softcapping=30.0),
        25_805_936_206 - 569_550_384 - 3_244_032,
    ),
    # Less towers and projectors for images and sound, and less the keys and values that the files have of layers which
    # use those of others: (2 * heads * head_dim * hidden + head_dim) for each of 16 + 4 layers, and of 15 + 3.
    "gemma-4-E2B, text": (
        dict(model_type="gemma4_text", hidden_size=1536, intermediate_size=6144, num_hidden_layers=35,
             num_attention_heads=8, num_key_value_heads=1, num_kv_shared_layers=20, use_double_wide_mlp=True,
             layer_types=(["sliding_attention"] * 4 + ["full_attention"]) * 7, final_logit_softcapping=30.0),
        5_123_178_979 - 475_729_088 - 18_880_512,
    ),
    "gemma-4-E4B, text": (
        dict(model_type="gemma4_text", hidden_size=2560, intermediate_size=10240, num_hidden_layers=42,
             num_attention_heads=8, num_key_value_heads=2, num_kv_shared_layers=18, final_logit_softcapping=30.0),
        7_996_157_418 - 478_088_384 - 55_055_616,
    ),
    "granite-3.1-3b-a800m": (
        dict(model_type="granitemoe", vocab_size=49155, hidden_size=1536, intermediate_size=512, num_hidden_layers=32,
             num_attention_heads=24, num_key_value_heads=8, num_local_experts=40, num_experts_per_tok=8,
             tie_word_embeddings=True),
        3_298_793_472,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REAL)
def test_real_shapes_have_the_published_number_of_weights(name):
    fields, published = REAL[name]
    config = model_config(fields)
    model = nnx.eval_shape(lambda: CausalLM(config, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)))
    found = {name: shape for parameter, shape in parameter_shapes(model) for name in parameter.names()}
    assert sum(int(np.prod(shape)) for shape in found.values()) == published
    with torch.device("meta"):
        theirs = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**fields))
    expected = {name: tuple(value.shape) for name, value in theirs.state_dict().items()}
    if config.tie_word_embeddings:
        del expected["lm_head.weight"]
    if config.num_experts:  # which it holds together, where its files have them apart
        assert sum(np.prod(shape) for shape in found.values()) == sum(np.prod(shape) for shape in expected.values())
        found, expected = ({n: s for n, s in x.items() if "mlp" not in n and "moe" not in n} for x in (found, expected))
    assert found == expected


IN_OTHERS = ("gemma3", "gemma4", "qwen3_5", "qwen3_5_moe")  # text models in those of text and images


def test_every_family_has_a_tiny_model_and_a_real_one():
    assert {fields["model_type"] for fields, _ in REAL.values()} >= FAMILIES.keys() - {"mistral", "qwen2", *IN_OTHERS}
    tiny = {name.split("-")[0] for name in (*DENSE, *SPARSE, *HYBRID)}
    assert {*tiny, "llama", "mistral", "qwen2", "qwen3", *IN_OTHERS} == FAMILIES.keys()


def test_the_tables_have_every_family_and_every_number():
    root = Path(__file__).parents[1]
    readme, table = (root / "README.md").read_text(), (root / "docs" / "families.md").read_text()
    for model_type in FAMILIES:
        assert f"`{model_type}`" in readme and f"`{model_type}`" in table, model_type
    counts = {f"{count:,}" for _, count in REAL.values()}
    named = re.findall(r"\d{1,3}(?:,\d{3}){3}", table)
    assert len(named) == len(set(named)) and set(named) <= counts


@jax.jit
def dequantized(stack):
    return jax.vmap(lambda weight: dequantize(weight, jnp.float32))(stack)


@pytest.mark.parametrize("name", [pytest.param(name, marks=marks) for name, marks in marked([*FIRST, *DENSE])])
def test_exported_merged_and_quantised_weights_in_transformers(name, tmp_path):
    """An export is what was read, tensor by tensor; a merged one loads and computes the same; so does the base with our
    NF4 weights, dequantised, in it."""
    theirs = make_checkpoint(name, tmp_path / "base")
    ids = random_ids(2, 14)
    quantised = load_folder(tmp_path / "base", quant_config=QuantConfig())
    ours = load_folder(tmp_path / "base")
    save_model(ours, tmp_path / "whole")
    original, written = SafetensorsSource(tmp_path / "base"), SafetensorsSource(tmp_path / "whole")
    assert set(original.names()) == set(written.names())
    for one in original.names():
        np.testing.assert_array_equal(original.read(one), written.read(one))
    add_adapters(ours, LoraConfig(r=3, lora_alpha=5), jax.random.key(0))
    randomise_adapters(ours)
    report = save_merged(ours, tmp_path / "merged", base=tmp_path / "base", verify=False)
    assert len(adapter_matrices(ours)) == 2 * report.merged_modules

    def logits_of(model):
        with torch.no_grad():
            return model(torch.tensor(ids).long()).logits

    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", attn_implementation="eager")
    assert relative_error(ours(jnp.asarray(ids)), logits_of(merged)) < 2e-5
    whole = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "whole", attn_implementation=theirs.config._attn_implementation
    )
    assert torch.equal(logits_of(whole), logits_of(theirs))

    weights, changed = theirs.state_dict(), merged.state_dict()
    for linear in named_nodes(ours, Linear):
        for i, module in enumerate(linear.names()):
            if linear.layers:
                difference = changed[f"{module}.weight"] - weights[f"{module}.weight"]
                assert relative_error(delta_weight(linear.node, i), difference) < 1e-4
    with torch.no_grad():
        for linear in named_nodes(quantised, Linear):
            if linear.layers:
                dense = dequantized(linear.node.weight.get_value())
                for module, weight in zip(linear.names(), dense, strict=True):
                    theirs.get_submodule(module).weight.copy_(torch.tensor(np.asarray(weight)))
    assert relative_error(quantised(jnp.asarray(ids)), logits_of(theirs)) < 1e-4


def test_gemma3_in_the_form_of_its_published_files():
    """sliding_window_pattern, rope_theta and rope_local_base_freq, where newer files have layer_types and two ropes."""
    published = dict(
        model_type="gemma3_text", num_hidden_layers=12, rope_theta=500_000.0, rope_local_base_freq=7_000.0,
        rope_scaling={"rope_type": "linear", "factor": 8.0}, sliding_window_pattern=6, sliding_window=512,
    )  # fmt: skip
    theirs = transformers.AutoConfig.for_model(**published)
    found = model_config(published)
    assert found == model_config(theirs.to_dict())
    assert found.layer(4).rope == found.sliding_rope != found.rope == found.layer(5).rope
    assert (found.rope.factor, found.rope.rope_theta, found.sliding_rope.rope_theta) == (8.0, 500_000.0, 7_000.0)
    assert [layer.sliding_window for layer in found.layers] == ([512] * 5 + [None]) * 2


def test_longrope_by_its_older_names():
    rope = dict(type="longrope", short_factor=[1.0] * 48, long_factor=[2.0] * 48)
    config = dict(model_type="phi3", max_position_embeddings=131072, rope_scaling=rope)
    found = model_config(config)
    assert found == model_config(transformers.AutoConfig.for_model(**config).to_dict())
    assert (found.rope.rope_type, found.rope.factor, found.rope.long_factor) == ("longrope", 32.0, (2.0,) * 48)
    for older in ("su", "yarn"):
        assert model_config({**config, "rope_scaling": {**rope, "type": older}}) == found


def test_layers_without_positions(tmp_path):
    make_checkpoint("smollm3", tmp_path)
    model = load_folder(tmp_path)
    assert [layer.rope is None for layer in model.config.layers] == [False, True, False]
    assert [layer.self_attn.rope for run in model.model.layers for layer in run.period] == [0, None, 0]


def gemma3(folder):
    """A tiny Gemma 3 with its vision tower, random throughout, as transformers writes it."""
    text = dict(TINY["gemma3_text"][1], tie_word_embeddings=True)
    vision = dict(
        hidden_size=16, intermediate_size=20, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
    )
    config = transformers.Gemma3Config(
        text_config=copy.deepcopy(text), vision_config=vision, mm_tokens_per_image=1, image_token_index=5,
        boi_token_index=6, eoi_token_index=7,
    )  # fmt: skip
    config._attn_implementation = "eager"
    model = transformers.Gemma3ForConditionalGeneration(config)
    with torch.no_grad():
        for i, parameter in enumerate(model.parameters()):
            parameter.normal_(0.0, 0.2, generator=torch.Generator().manual_seed(i))
    model.save_pretrained(folder)
    return model.eval()


def qwen3_5(folder, name):
    """A tiny Qwen3.5 with its vision tower, random throughout, in the names and layout of the published files."""
    vision = dict(
        depth=1, hidden_size=16, intermediate_size=20, num_heads=2, patch_size=4, out_hidden_size=48,
        num_position_embeddings=16,
    )  # fmt: skip
    text = {"model_type": f"{name}_text", **copy.deepcopy(TINY[f"{name}_text"][1])}
    config = transformers.AutoConfig.for_model(
        name, text_config=text, vision_config=vision, image_token_id=5, video_token_id=6, vision_start_token_id=7,
        vision_end_token_id=4,
    )  # fmt: skip
    config._attn_implementation = "eager"
    model = transformers.AutoModelForImageTextToText.from_config(config)
    with torch.no_grad():
        for i, (path, parameter) in enumerate(model.named_parameters()):
            parameter.normal_(0.2 if "norm" in path else 0.0, 0.2, generator=torch.Generator().manual_seed(i))
    model.save_pretrained(folder)
    # As they are, where save_pretrained would write each expert on its own, and with what is never read.
    tensors = {path: tensor.contiguous() for path, tensor in model.state_dict().items()}
    save_file({**tensors, "mtp.fc.weight": torch.ones(48, 96)}, folder / "model.safetensors")
    return model.eval()


@pytest.mark.parametrize("name", ["qwen3_5", "qwen3_5_moe"])
def test_the_text_part_of_qwen3_5(name, tmp_path):
    theirs, ours = qwen3_5(tmp_path / "base", name), load_folder(tmp_path / "base")
    ids = random_ids(2, 14)
    ids = np.where(ids < 8, 8, ids)  # no image tokens

    def logits_of(model):
        with torch.no_grad():
            return model(torch.tensor(ids).long()).logits

    assert relative_error(ours(jnp.asarray(ids)), logits_of(theirs)) < 2e-5
    linears = ["q_proj", "o_proj", "in_proj_qkv", "in_proj_a", "out_proj"]  # which the experts and the tower have not
    config = LoraConfig(r=3, lora_alpha=5, target_modules=linears)
    add_adapters(ours, config, jax.random.key(0))
    randomise_adapters(ours)
    save_adapter(ours, tmp_path / "adapter", config=config, base=str(tmp_path / "base"))
    save_merged(ours, tmp_path / "merged", base=tmp_path / "base")
    expected = ours(jnp.asarray(ids))
    adapted = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter")
    assert relative_error(expected, logits_of(adapted)) < 2e-5
    before, after = (SafetensorsSource(tmp_path / folder) for folder in ("base", "merged"))
    assert set(before.names()) == set(after.names())
    changed = {one for one in before.names() if not np.array_equal(before.read(one), after.read(one))}
    assert {one.split(".")[-2] for one in changed} == set(linears)
    # An adapter that PEFT made on the text alone.
    alone = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", attn_implementation="eager")
    alone = peft.get_peft_model(alone, peft.LoraConfig(r=3, target_modules=linears, init_lora_weights=False))
    alone.save_pretrained(tmp_path / "alone")
    again = load_folder(tmp_path / "base")
    load_adapter(again, tmp_path / "alone")
    assert relative_error(again(jnp.asarray(ids)), logits_of(alone)) < 2e-5
    for family in (transformers.AutoModelForCausalLM, transformers.AutoModelForImageTextToText):
        merged = family.from_pretrained(tmp_path / "merged", attn_implementation="eager")
        assert relative_error(expected, logits_of(merged)) < 2e-5
        # What is written again, each expert on its own and perhaps without the tower, is read again.
        merged.save_pretrained(tmp_path / family.__name__)
        assert relative_error(load_folder(tmp_path / family.__name__)(jnp.asarray(ids)), expected) < 2e-5


def test_the_text_part_of_gemma3(tmp_path):
    theirs, ours = gemma3(tmp_path / "base"), load_folder(tmp_path / "base")
    ids = random_ids(2, 14)
    ids = np.where(ids < 8, 8, ids)  # no image tokens

    def logits_of(model):
        with torch.no_grad():
            return model(torch.tensor(ids).long()).logits

    assert relative_error(ours(jnp.asarray(ids)), logits_of(theirs)) < 2e-5
    config = LoraConfig(r=3, lora_alpha=5)
    add_adapters(ours, config, jax.random.key(0))
    randomise_adapters(ours)
    save_adapter(ours, tmp_path / "adapter", config=config, base=str(tmp_path / "base"))
    before = {name: value.clone() for name, value in theirs.state_dict().items()}
    # The vision tower has projections of the same names, on which PEFT then puts adapters that do nothing.
    with pytest.warns(UserWarning, match="vision_tower"):
        adapted = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter")
    assert relative_error(ours(jnp.asarray(ids)), logits_of(adapted)) < 2e-5
    save_merged(ours, tmp_path / "merged", base=tmp_path / "base")
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", attn_implementation="eager")
    assert relative_error(ours(jnp.asarray(ids)), logits_of(merged)) < 2e-5
    after = merged.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before if "vision" in name or "projector" in name)


def gemma4(folder):
    """A tiny Gemma 4 with its towers, random throughout, and as in published files with keys and values of layers that
    use those of others."""
    text = {"model_type": "gemma4_text", **copy.deepcopy(TINY["gemma4_text"][1]), "pad_token_id": 0}
    vision = dict(
        hidden_size=16, intermediate_size=20, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        head_dim=8, patch_size=4, position_embedding_size=16, pooling_kernel_size=1,
    )  # fmt: skip
    audio = dict(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, subsampling_conv_channels=[8, 4],
        output_proj_dims=16,
    )  # fmt: skip
    ids = dict(image_token_id=5, video_token_id=6, audio_token_id=7, boi_token_id=4, eoi_token_id=3, boa_token_id=2)
    config = transformers.AutoConfig.for_model(
        "gemma4", text_config=text, vision_config=vision, audio_config=audio, **ids
    )
    config._attn_implementation = "eager"
    model = transformers.AutoModelForImageTextToText.from_config(config)
    with torch.no_grad():
        for i, (path, parameter) in enumerate(model.named_parameters()):
            parameter.normal_(1.0 if "norm" in path else 0.0, 0.2, generator=torch.Generator().manual_seed(i))
    model.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    idle = {f"model.language_model.layers.6.self_attn.{name}_proj.weight": torch.ones(3, 48) for name in "kv"}
    save_file({**tensors, **idle}, folder / "model.safetensors", metadata={"format": "pt"})
    return model.eval()


def test_the_text_part_of_gemma4(tmp_path):
    theirs, ours = gemma4(tmp_path / "base"), load_folder(tmp_path / "base")
    ids = random_ids(2, 14)
    ids = np.where(ids < 8, 8, ids)  # no image tokens

    def logits_of(model):
        with torch.no_grad():
            return model(torch.tensor(ids).long()).logits

    assert relative_error(ours(jnp.asarray(ids)), logits_of(theirs)) < 2e-5
    config = LoraConfig(r=3, lora_alpha=5)
    add_adapters(ours, config, jax.random.key(0))
    randomise_adapters(ours)
    save_adapter(ours, tmp_path / "adapter", config=config, base=str(tmp_path / "base"))
    # PEFT cannot adapt the towers' projections, which have the same names, so the adapter says whose it means.
    adapted = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter")
    assert relative_error(ours(jnp.asarray(ids)), logits_of(adapted)) < 2e-5
    again = load_folder(tmp_path / "base")
    load_adapter(again, tmp_path / "adapter")
    np.testing.assert_array_equal(again(jnp.asarray(ids)), ours(jnp.asarray(ids)))
    save_merged(ours, tmp_path / "merged", base=tmp_path / "base")
    before, after = (SafetensorsSource(tmp_path / folder) for folder in ("base", "merged"))
    assert set(before.names()) == set(after.names())
    changed = {one for one in before.names() if not np.array_equal(before.read(one), after.read(one))}
    assert len(changed) == 7 * 7 + 3 + 2 + 1 and all("language_model" in one for one in changed)
    for family in (transformers.AutoModelForCausalLM, transformers.AutoModelForImageTextToText):
        merged = family.from_pretrained(tmp_path / "merged", attn_implementation="eager")
        assert relative_error(ours(jnp.asarray(ids)), logits_of(merged)) < 2e-5
        # What is written again, perhaps without the towers, is read again.
        merged.save_pretrained(tmp_path / family.__name__)
        assert relative_error(load_folder(tmp_path / family.__name__)(jnp.asarray(ids)), logits_of(merged)) < 2e-5


def test_layers_may_differ_by_their_type_only():
    fields = dict(model_type="gemma4_text", num_hidden_layers=2, layer_types=["sliding_attention", "full_attention"])
    assert model_config({**fields, "per_layer_config": {"1": {"head_dim": 64}}}).layer(1).head_dim == 64
    assert model_config({**fields, "per_layer_config": {}}).layer(1).head_dim == 256
    for wrong in ({"0": {"head_dim": 64}}, {"1": {"hidden_size": 64}}):
        with pytest.raises(CheckpointError, match="per_layer_config may say head_dim and num_key_value_heads of all"):
            model_config({**fields, "per_layer_config": wrong})
    with pytest.raises(CheckpointError, match="use_bidirectional_attention 'all' is not supported"):
        model_config({**fields, "use_bidirectional_attention": "all"})
    with pytest.raises(ValueError, match="leaves no layer of type full_attention whose keys and values"):
        model_config({**fields, "num_kv_shared_layers": 1})


def test_another_rope_scaling_keeps_what_is_not_scaled():
    published = {
        "phi3": dict(rope_parameters=dict(rope_type="default", rope_theta=7_000.0, partial_rotary_factor=0.75)),
        "gemma3_text": dict(rope_theta=500_000.0, rope_local_base_freq=7_000.0),
        "gemma3": dict(text_config=dict(rope_parameters=dict(full_attention=dict(rope_theta=500_000.0)))),
        "qwen3_5_text": dict(rope_parameters=dict(rope_theta=7_000.0, mrope_section=[11, 11, 10])),
        "qwen3_5": dict(text_config=dict(rope_parameters=dict(rope_theta=7_000.0, partial_rotary_factor=0.25))),
        "smollm3": {},
        "gemma4_text": dict(per_layer_config={}),
        "gemma4": dict(text_config=dict(global_head_dim=96)),
    }
    for model_type, fields in published.items():
        before = model_config(dict(model_type=model_type, **fields))
        scaled = with_rope_scaling(dict(model_type=model_type, **fields), dict(rope_type="linear", factor=3.0))
        after = model_config(scaled)
        kept = "proportional" if before.rope.rope_type == "proportional" else "linear"
        rope = dataclasses.replace(before.rope, rope_type=kept, factor=3.0)
        assert after == dataclasses.replace(before, rope=rope), model_type
    with pytest.raises(ValueError, match="this model's rope_type is 'proportional', which only takes a factor"):
        with_rope_scaling(dict(model_type="gemma4_text"), dict(rope_type="yarn", factor=3.0))
