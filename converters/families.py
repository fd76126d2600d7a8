"""config.json -> `ModelConfig`: every supported `model_type` is one row of `FAMILIES`."""

from __future__ import annotations

import dataclasses
import fnmatch
import warnings
from collections.abc import Callable, Collection, Mapping
from operator import itemgetter
from typing import Any

from jaxlora.config import LinearAttentionConfig, MambaConfig, ModelConfig, RopeConfig
from jaxlora.kernels.gated import ACTIVATIONS

Json = Mapping[str, Any]


class CheckpointError(ValueError):
    """A checkpoint that cannot be read as it is; the message names the file, what was found, and the mend."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """What a checkpoint of some layout has otherwise than its family's row says."""

    fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    tensor_names: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """How a model_type's config.json and tensors are read.

    fields: `ModelConfig` fields that differ from a Llama's: a value, or a function that finds it in config.json (with
    `defaults` filled in). defaults: what transformers assumes for fields that a config.json leaves out.
    tensor_names: {part of a parameter's path in `jaxlora.model`: what checkpoints of the family call it}, or a function
    that finds it in config.json. layouts: of families whose checkpoints come in several, {pattern of a tensor's name:
    what else is said of a checkpoint that has such a tensor}. ignored: patterns of tensors that are there and not read.
    text_config: the language model's fields lie under this name in config.json. adapted_by_path: PEFT is told what to
    adapt by whole paths, since it stops at modules of the towers that are called alike.
    """

    fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    defaults: Json = dataclasses.field(default_factory=dict)
    tensor_names: Mapping[str, str] | Callable[[Json], Mapping[str, str]] = dataclasses.field(default_factory=dict)
    layouts: Mapping[str, Layout] = dataclasses.field(default_factory=dict)
    ignored: tuple[str, ...] = ()
    text_config: bool = False
    adapted_by_path: bool = False


# ---- Rope ------------------------------------------------------------------------------------------------------------


def rope_config(hf: Json) -> RopeConfig:
    """The rope fields of a config.json in its older (`rope_theta`, `rope_scaling`) or newer form (`rope_parameters`).

    Raises:
        CheckpointError: an unknown rope type, or one without the fields that it needs.
    """
    rope = dict(hf.get("rope_parameters") or hf.get("rope_scaling") or {})
    rope_type = rope.pop("rope_type", None) or rope.pop("type", None) or "default"
    rope.pop("type", None)
    if "short_factor" in rope and rope_type in ("su", "yarn"):  # what the first Phi-3 files call it
        rope_type = "longrope"
    fields = {field.name for field in dataclasses.fields(RopeConfig)} - {"rope_type", "interleaved"}
    unknown = sorted(set(rope) - fields)
    if unknown:
        warnings.warn(
            f"config.json: rope fields {', '.join(unknown)} are not used by rope_type {rope_type!r}", stacklevel=3
        )
    known = {name: value for name, value in rope.items() if name in fields and value is not None}
    known |= {name: tuple(value) for name, value in known.items() if isinstance(value, list)}
    known.setdefault("rope_theta", hf.get("rope_theta") or 10_000.0)
    known.setdefault("partial_rotary_factor", hf.get("partial_rotary_factor") or 1.0)
    original = hf.get("original_max_position_embeddings") or known.get("original_max_position_embeddings")
    known["original_max_position_embeddings"] = original
    if rope_type == "default":
        known.pop("factor", None)
    if rope_type in ("yarn", "longrope") and "factor" not in known and original:
        known["factor"] = hf["max_position_embeddings"] / original
    elif rope_type not in ("default", "proportional") and "factor" not in known:
        raise CheckpointError(f"config.json: rope_type {rope_type!r} needs a factor, and none is given")
    try:
        return RopeConfig(rope_type=rope_type, **known)
    except ValueError as error:
        raise CheckpointError(f"config.json: {error}") from error


def _interleaved_rope(hf: Json) -> RopeConfig:
    return dataclasses.replace(rope_config(hf), interleaved=True)


def _global_rope(hf: Json) -> RopeConfig:
    rope = hf.get("rope_parameters") or {}
    return rope_config({**hf, "rope_parameters": rope.get("full_attention", rope)})


def _local_rope(hf: Json) -> RopeConfig:
    rope = (hf.get("rope_parameters") or {}).get("sliding_attention")
    return rope_config({**hf, "rope_parameters": rope, "rope_scaling": None, "rope_theta": hf["rope_local_base_freq"]})


def _text_rope(hf: Json) -> RopeConfig:
    """Of a model of text and images, whose sections of a head turn by three positions that text has equal."""
    rope = hf.get("rope_parameters") or {}
    return rope_config({**hf, "rope_parameters": {k: v for k, v in rope.items() if not k.startswith("mrope_")}})


# ---- Which layers have other heads -----------------------------------------------------------------------------------


def _of_full_layers(name: str, published: Callable[[Json], int | None]) -> Callable[[Json], int | None]:
    """What layers of full attention have of a field in place of its value, or None: in `per_layer_config`, as
    transformers writes it, or as published files have it."""

    def read(hf: Json) -> int | None:
        if "per_layer_config" not in hf:
            return published(hf)
        layers = {int(index): dict(fields) for index, fields in (hf["per_layer_config"] or {}).items()}
        found = [layers.pop(i, {}) for i, kind in enumerate(_last_is_full(hf)) if kind == "full_attention"]
        if any(layers.values()) or any(one != found[0] or one.keys() - _BY_LAYER for one in found):
            raise CheckpointError(
                f"config.json: per_layer_config may say {' and '.join(sorted(_BY_LAYER))} of all layers of full "
                f"attention alike, and of no others, found {hf['per_layer_config']}"
            )
        return found[0].get(name)

    return read


_BY_LAYER = {"head_dim", "num_key_value_heads"}


# ---- Which layers slide, and which have no positions -----------------------------------------------------------------


def _layer_types(slides: Callable[[Json, int], bool]) -> Callable[[Json], tuple[str, ...]]:
    """`layer_types` as config.json gives it, or else by a rule for each layer."""

    def read(hf: Json) -> tuple[str, ...]:
        if hf.get("layer_types") is not None:
            return tuple(hf["layer_types"])
        kinds = ("full_attention", "sliding_attention")
        return tuple(kinds[bool(slides(hf, i))] for i in range(hf["num_hidden_layers"]))

    return read


def _full(hf: Json) -> tuple[str, ...]:
    return ("full_attention",) * hf["num_hidden_layers"]


def _sliding(hf: Json) -> tuple[str, ...]:
    kind = "full_attention" if hf["sliding_window"] is None else "sliding_attention"
    return (kind,) * hf["num_hidden_layers"]


_upper_slide = _layer_types(
    lambda hf, i: hf["use_sliding_window"] and hf["sliding_window"] is not None and i >= hf["max_window_layers"]
)
_pattern = _layer_types(lambda hf, i: (i + 1) % hf["sliding_window_pattern"] != 0)
_nope_slide = _layer_types(
    lambda hf, i: hf["use_sliding_window"] and hf["sliding_window"] is not None and i in _nope_layers(hf)
)


def _full_at_intervals(hf: Json) -> tuple[str, ...]:
    if hf["layer_types"] is not None:
        return tuple(hf["layer_types"])
    interval = hf["full_attention_interval"]
    return tuple("linear_attention" if (i + 1) % interval else "full_attention" for i in range(hf["num_hidden_layers"]))


def _last_is_full(hf: Json) -> tuple[str, ...]:
    """Gemma 4's, whose last layer has no window, whatever is said of it."""
    if hf.get("use_bidirectional_attention") == "all":
        raise CheckpointError("config.json: use_bidirectional_attention 'all' is not supported: tokens look back only")
    return (*_pattern(hf)[:-1], "full_attention")


def _nope_layers(hf: Json) -> tuple[int, ...]:
    layers = range(hf["num_hidden_layers"])
    given = hf["no_rope_layers"]  # 1 for a layer that has rope
    if given is not None:
        return tuple(i for i in layers if not given[i])
    return tuple(i for i in layers if (i + 1) % hf["no_rope_layer_interval"] == 0)


def _full_are_nope(hf: Json) -> tuple[int, ...]:
    return tuple(i for i, kind in enumerate(_pattern(hf)) if kind == "full_attention")


# ---- Which layers have experts, and how many ------------------------------------------------------------------------


def _num_experts(hf: Json) -> int:
    return hf.get("num_local_experts") or hf["num_experts"]


def _dense_layers(hf: Json) -> tuple[int, ...]:
    without = hf["mlp_only_layers"] or ()
    layers = range(hf["num_hidden_layers"])
    return tuple(i for i in layers if i in without or (i + 1) % hf["decoder_sparse_step"])


def _linear_attention(hf: Json) -> LinearAttentionConfig:
    same = ("num_key_heads", "num_value_heads", "key_head_dim", "value_head_dim", "conv_kernel_dim")
    return LinearAttentionConfig(**{name: hf[f"linear_{name}"] for name in same})


def _mamba(hf: Json) -> MambaConfig:
    inner = hf["mamba_d_ssm"] or hf["mamba_expand"] * hf["hidden_size"]
    limit = hf["time_step_limit"] or (0.0, float("inf"))
    same = ("n_heads", "n_groups", "d_state", "d_conv", "chunk_size", "conv_bias", "proj_bias", "rms_norm")
    return MambaConfig(
        d_ssm=inner,
        d_head=inner // hf["mamba_n_heads"] if hf["mamba_d_head"] == "auto" else hf["mamba_d_head"],
        out_bias=hf["projectors_bias"],
        norm_before_gate=hf["mamba_norm_before_gate"],
        # JSON has no infinity, and transformers writes an object in its place.
        time_step_limit=tuple(float(x["__float__"] if isinstance(x, Mapping) else x) for x in limit),
        in_multiplier=hf["ssm_in_multiplier"],
        multipliers=tuple(hf["ssm_multipliers"] or (1.0,) * 5),
        **{name: hf[f"mamba_{name}"] for name in same},
    )


def _router_aux_loss_coef(hf: Json) -> float:
    return hf["router_aux_loss_coef"] if hf["output_router_logits"] else 0.0


# ---- The table -------------------------------------------------------------------------------------------------------


def _same(*names: str) -> dict[str, Callable[[Json], Any]]:
    """`ModelConfig` fields that config.json has under the same name."""
    return {name: itemgetter(name) for name in names}


# What every family reads, unless its row says otherwise.
_FIELDS: Mapping[str, Any] = {
    **_same(
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "max_position_embeddings",
        "tie_word_embeddings",
        "hidden_act",
    ),
    "num_key_value_heads": lambda hf: hf["num_key_value_heads"] or hf["num_attention_heads"],
    "head_dim": lambda hf: hf["head_dim"] or hf["hidden_size"] // hf["num_attention_heads"],
    "norm_eps": itemgetter("rms_norm_eps"),
    "rope": rope_config,
    "layer_types": _full,
    "sliding_window": itemgetter("sliding_window"),
}
_DEFAULTS: Json = {
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "head_dim": None,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "use_sliding_window": False,
    "sliding_window": None,
}

_OF_TEXT_AND_IMAGES = {"model": "model.language_model"}
# A text model that was taken out of one of text and images keeps its names, when transformers writes it.
_TAKEN_OUT = {"model.language_model.*": Layout(tensor_names=_OF_TEXT_AND_IMAGES)}
# What transformers has as parameters, and PEFT's adapters are named after, whatever the checkpoint's cut.
_PARAMETERS_OF_EXPERTS = {"gate_up_lora": "gate_up_proj", "down_lora": "down_proj"}

_ATTENTION_BIAS = {"qkv_bias": itemgetter("attention_bias"), "o_bias": itemgetter("attention_bias")}

_GEMMA = {
    **_ATTENTION_BIAS,
    "norm_offset": 1.0,
    "embedding_multiplier": lambda hf: hf["hidden_size"] ** 0.5,
}
_GEMMA_2 = {
    **_GEMMA,
    **_same("attn_logit_softcapping", "final_logit_softcapping"),
    "hidden_act": itemgetter("hidden_activation"),
    "attention_multiplier": lambda hf: hf["query_pre_attn_scalar"] ** -0.5,
    "layer_types": _pattern,
    "post_norm": True,
}
_GEMMA_2_NAMES = {
    "post_self_attn_layernorm": "post_attention_layernorm",
    "post_attention_layernorm": "pre_feedforward_layernorm",
    "post_mlp_layernorm": "post_feedforward_layernorm",
}
_GEMMA_2_DEFAULTS = {
    "vocab_size": 256000,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "sliding_window_pattern": 2,
    "final_logit_softcapping": 30.0,
    "attn_logit_softcapping": 50.0,
}

_GEMMA_3 = {
    **_GEMMA_2,
    "attn_logit_softcapping": None,  # config.json has the field, transformers does not read it
    "qk_norm": "head",
    "rope": _global_rope,
    "sliding_rope": _local_rope,
}
_GEMMA_3_DEFAULTS = {
    **_GEMMA_2_DEFAULTS,
    "vocab_size": 262208,
    "max_position_embeddings": 131072,
    "rope_theta": 1_000_000.0,
    "rope_local_base_freq": 10_000.0,
    "sliding_window_pattern": 6,
    "final_logit_softcapping": None,
}

_GEMMA_4 = {
    **_ATTENTION_BIAS,
    **_same(
        "final_logit_softcapping",
        "attention_k_eq_v",
        "num_kv_shared_layers",
        "use_double_wide_mlp",
        "hidden_size_per_layer_input",
        "vocab_size_per_layer_input",
    ),
    "embedding_multiplier": lambda hf: hf["hidden_size"] ** 0.5,
    "hidden_act": itemgetter("hidden_activation"),
    "attention_multiplier": 1.0,
    "layer_types": _last_is_full,
    "global_head_dim": _of_full_layers("head_dim", itemgetter("global_head_dim")),
    "num_global_key_value_heads": _of_full_layers(
        "num_key_value_heads", lambda hf: hf["num_global_key_value_heads"] if hf["attention_k_eq_v"] else None
    ),
    "layer_scalar": True,
    "post_norm": True,
    "qk_norm": "head",
    "v_norm": True,
    "rope": _global_rope,
    "sliding_rope": _local_rope,
    "num_experts": lambda hf: hf["num_experts"] if hf["enable_moe_block"] else 0,
    "num_experts_per_tok": lambda hf: hf["top_k_experts"] if hf["enable_moe_block"] else 0,
    "moe_intermediate_size": lambda hf: hf["moe_intermediate_size"] if hf["enable_moe_block"] else 0,
    "norm_topk_prob": True,
    "experts_beside_mlp": True,
    "router_scale": True,
    "fused_experts": "concatenated",
}
_GEMMA_4_DEFAULTS = {
    "vocab_size": 262144,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 30,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "global_head_dim": 512,
    "num_global_key_value_heads": None,
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 131072,
    "tie_word_embeddings": True,
    "rope_parameters": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
        "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1_000_000.0},
    },
    "rope_local_base_freq": 10_000.0,
    "sliding_window": 512,
    "sliding_window_pattern": 6,
    "final_logit_softcapping": None,
    "vocab_size_per_layer_input": 262144,
    "hidden_size_per_layer_input": 256,
    "attention_k_eq_v": False,
    "num_kv_shared_layers": 0,
    "use_double_wide_mlp": False,
    "enable_moe_block": False,
}
_GEMMA_4_NAMES = {
    **_GEMMA_2_NAMES,
    "sparse_mlp.gate": "router.proj",
    "sparse_mlp.scale": "router.scale",
    "sparse_mlp.per_expert_scale": "router.per_expert_scale",
    "sparse_mlp.norm": "pre_feedforward_layernorm_2",
    **{f"sparse_mlp.experts.{ours}": f"experts.{theirs}" for ours, theirs in _PARAMETERS_OF_EXPERTS.items()},
    **{f"sparse_mlp.experts.{name}.weight": f"experts.{name}" for name in _PARAMETERS_OF_EXPERTS.values()},
}
# The towers, and keys and values of layers that use those of others, which published files have all the same.
_GEMMA_4_IGNORED = (
    *(f"model.{tower}.*" for tower in ("vision_tower", "audio_tower", "embed_vision", "embed_audio")),
    *(f"*.self_attn.{name}.*" for name in ("k_proj", "v_proj", "k_norm", "v_norm")),
)

_COHERE = {
    **_ATTENTION_BIAS,
    **_same("logit_scale"),
    "norm": "layer_norm",
    "norm_eps": itemgetter("layer_norm_eps"),
    "parallel_block": True,
    "rope": _interleaved_rope,
}
_COHERE_DEFAULTS = {
    "vocab_size": 256000,
    "hidden_size": 8192,
    "intermediate_size": 22528,
    "num_hidden_layers": 40,
    "num_attention_heads": 64,
    "max_position_embeddings": 8192,
    "layer_norm_eps": 1e-5,
    "logit_scale": 0.0625,
    "tie_word_embeddings": True,
}

_GRANITE = {
    **_ATTENTION_BIAS,
    **_same("attention_multiplier", "embedding_multiplier", "residual_multiplier"),
    "logit_scale": lambda hf: 1 / hf["logits_scaling"],
}
_GRANITE_DEFAULTS = {
    "vocab_size": 32000,
    "intermediate_size": 11008,
    "max_position_embeddings": 2048,
    "attention_multiplier": 1.0,
    "embedding_multiplier": 1.0,
    "residual_multiplier": 1.0,
    "logits_scaling": 1.0,
}

_QWEN_3_5 = {
    **_ATTENTION_BIAS,
    "attn_output_gate": True,
    "layer_types": _full_at_intervals,
    "linear_attention": _linear_attention,
    "norm_offset": 1.0,
    "qk_norm": "head",
    "rope": _text_rope,
}
_QWEN_3_5_DEFAULTS = {
    "vocab_size": 248320,
    "intermediate_size": 12288,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "max_position_embeddings": 32768,
    "partial_rotary_factor": 0.25,
    "layer_types": None,
    "full_attention_interval": 4,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_conv_kernel_dim": 4,
}
# Prediction of the tokens after the next, which is a model of its own, and the vision tower.
_QWEN_3_5_IGNORED = ("mtp.*", "model.visual.*")

_EXPERTS = {
    **_same("num_experts_per_tok"),
    "num_experts": _num_experts,
    "moe_intermediate_size": itemgetter("intermediate_size"),
    "norm_topk_prob": True,
    "router_aux_loss_coef": _router_aux_loss_coef,
}
_QWEN_EXPERTS = {
    **_EXPERTS,
    **_same("moe_intermediate_size", "norm_topk_prob"),
    "dense_layers": _dense_layers,
}
_EXPERTS_DEFAULTS = {
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "output_router_logits": False,
    "router_aux_loss_coef": 0.001,
    "norm_topk_prob": False,
    "decoder_sparse_step": 1,
    "mlp_only_layers": None,
}
_EXPERT_PARAMETERS = {f"experts.{ours}": f"experts.{theirs}" for ours, theirs in _PARAMETERS_OF_EXPERTS.items()}
_ONE_FILE_ENTRY_AN_EXPERT = {"experts": "experts.{}", **_EXPERT_PARAMETERS}

_QWEN_3_5_MOE = {
    **_QWEN_3_5,
    **_EXPERTS,
    **_same("moe_intermediate_size", "shared_expert_intermediate_size"),
    "fused_experts": "concatenated",
}
_QWEN_3_5_MOE_DEFAULTS = {
    **_QWEN_3_5_DEFAULTS,
    **_EXPERTS_DEFAULTS,
    "hidden_size": 2048,
    "intermediate_size": 0,  # no layer has an MLP
    "num_hidden_layers": 40,
    "num_key_value_heads": 2,
    "num_experts": 256,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 512,
    "shared_expert_intermediate_size": 512,
}
_EXPERTS_WITHOUT_WEIGHT = {
    **_EXPERT_PARAMETERS,
    **{f"experts.{name}.weight": f"experts.{name}" for name in ("gate_up_proj", "down_proj")},
}
_QWEN_3_5_MOE_LAYOUTS = {
    **_TAKEN_OUT,
    # As transformers writes them, where published files have the experts of a layer in one tensor.
    "*.mlp.experts.0.*": Layout(
        fields={"fused_experts": None},
        tensor_names={**_ONE_FILE_ENTRY_AN_EXPERT, "experts.down_proj.weight": "experts.{}.down_proj.weight"},
    ),
}


def _falcon_parallel(hf: Json) -> bool:
    return hf["new_decoder_architecture"] or hf["parallel_attn"]


def _falcon_norms(hf: Json) -> int:
    return 1 if not hf["new_decoder_architecture"] else hf["num_ln_in_parallel_attn"] or 2


def _falcon_kv_heads(hf: Json) -> int:
    if not hf["new_decoder_architecture"] and hf["multi_query"]:
        return 1
    return hf["num_kv_heads"] or hf["num_attention_heads"]


def _falcon_names(hf: Json) -> dict[str, str]:
    two = {"input_layernorm": "ln_attn", "post_attention_layernorm": "ln_mlp"}
    return {
        "model": "transformer",
        "embed_tokens": "word_embeddings",
        "layers": "h",
        "norm": "ln_f",
        "self_attn": "self_attention",
        "qkv_proj": "query_key_value",
        "o_proj": "dense",
        "up_proj": "dense_h_to_4h",
        "down_proj": "dense_4h_to_h",
        **(two if _falcon_norms(hf) == 2 else {}),
    }


FAMILIES: Mapping[str, Family] = {
    "llama": Family(
        fields={**_ATTENTION_BIAS, **_same("mlp_bias")},
        defaults={"vocab_size": 32000, "intermediate_size": 11008, "max_position_embeddings": 2048},
    ),
    "mistral": Family(
        fields={"layer_types": _sliding},
        defaults={
            "vocab_size": 32000,
            "intermediate_size": 14336,
            "num_key_value_heads": 8,
            "max_position_embeddings": 131072,
            "sliding_window": 4096,
        },
    ),
    "qwen2": Family(
        fields={"qkv_bias": True, "layer_types": _upper_slide},
        defaults={
            "vocab_size": 151936,
            "intermediate_size": 22016,
            "num_key_value_heads": 32,
            "max_position_embeddings": 32768,
            "sliding_window": 4096,
            "max_window_layers": 28,
        },
    ),
    "qwen3": Family(
        fields={**_ATTENTION_BIAS, "qk_norm": "head", "layer_types": _upper_slide},
        defaults={
            "vocab_size": 151936,
            "intermediate_size": 22016,
            "num_key_value_heads": 32,
            "head_dim": 128,
            "max_position_embeddings": 32768,
            "sliding_window": 4096,
            "max_window_layers": 28,
        },
    ),
    "qwen3_5_text": Family(
        fields=_QWEN_3_5, defaults=_QWEN_3_5_DEFAULTS, layouts=_TAKEN_OUT, ignored=_QWEN_3_5_IGNORED
    ),
    "qwen3_5": Family(
        fields=_QWEN_3_5,
        defaults=_QWEN_3_5_DEFAULTS,
        tensor_names=_OF_TEXT_AND_IMAGES,
        ignored=_QWEN_3_5_IGNORED,
        text_config=True,
    ),
    "qwen3_5_moe_text": Family(
        fields=_QWEN_3_5_MOE,
        defaults=_QWEN_3_5_MOE_DEFAULTS,
        tensor_names=_EXPERTS_WITHOUT_WEIGHT,
        layouts=_QWEN_3_5_MOE_LAYOUTS,
        ignored=_QWEN_3_5_IGNORED,
    ),
    "qwen3_5_moe": Family(
        fields=_QWEN_3_5_MOE,
        defaults=_QWEN_3_5_MOE_DEFAULTS,
        tensor_names={**_OF_TEXT_AND_IMAGES, **_EXPERTS_WITHOUT_WEIGHT},
        layouts=_QWEN_3_5_MOE_LAYOUTS,
        ignored=_QWEN_3_5_IGNORED,
        text_config=True,
    ),
    "gemma": Family(
        # The first files say "gelu" and mean its approximation, as transformers knows too.
        fields={
            **_GEMMA,
            "hidden_act": lambda hf: {"gelu": "gelu_pytorch_tanh"}.get(hf["hidden_act"], hf["hidden_act"]),
        },
        defaults={
            "vocab_size": 256000,
            "hidden_size": 3072,
            "intermediate_size": 24576,
            "num_hidden_layers": 28,
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
            "head_dim": 256,
            "hidden_act": "gelu_pytorch_tanh",
            "max_position_embeddings": 8192,
            "tie_word_embeddings": True,
        },
    ),
    "gemma2": Family(fields=_GEMMA_2, defaults=_GEMMA_2_DEFAULTS, tensor_names=_GEMMA_2_NAMES),
    "gemma3_text": Family(fields=_GEMMA_3, defaults=_GEMMA_3_DEFAULTS, tensor_names=_GEMMA_2_NAMES),
    "gemma3": Family(
        fields=_GEMMA_3,
        defaults=_GEMMA_3_DEFAULTS,
        tensor_names={**_GEMMA_2_NAMES, "model": "language_model.model", "lm_head": "language_model.lm_head"},
        ignored=("vision_tower.*", "multi_modal_projector.*"),
        text_config=True,
    ),
    "gemma4_text": Family(
        fields=_GEMMA_4,
        defaults=_GEMMA_4_DEFAULTS,
        tensor_names=_GEMMA_4_NAMES,
        layouts=_TAKEN_OUT,
        ignored=_GEMMA_4_IGNORED,
    ),
    "gemma4": Family(
        fields=_GEMMA_4,
        defaults=_GEMMA_4_DEFAULTS,
        tensor_names={**_GEMMA_4_NAMES, **_OF_TEXT_AND_IMAGES},
        ignored=_GEMMA_4_IGNORED,
        text_config=True,
        adapted_by_path=True,
    ),
    "granite": Family(fields={**_GRANITE, **_same("mlp_bias")}, defaults=_GRANITE_DEFAULTS),
    "olmo2": Family(
        fields={**_ATTENTION_BIAS, "qk_norm": "projection", "pre_norm": False, "post_norm": True},
        defaults={
            "vocab_size": 50304,
            "intermediate_size": 11008,
            "max_position_embeddings": 2048,
            "rms_norm_eps": 1e-5,
        },
        tensor_names={
            "post_self_attn_layernorm": "post_attention_layernorm",
            "post_mlp_layernorm": "post_feedforward_layernorm",
        },
    ),
    "smollm3": Family(
        fields={**_ATTENTION_BIAS, **_same("mlp_bias"), "layer_types": _nope_slide, "nope_layers": _nope_layers},
        defaults={
            "vocab_size": 128256,
            "hidden_size": 2048,
            "intermediate_size": 11008,
            "num_hidden_layers": 36,
            "num_attention_heads": 16,
            "num_key_value_heads": 4,
            "max_position_embeddings": 32768,
            "tie_word_embeddings": True,
            "rope_theta": 2_000_000.0,
            "no_rope_layers": None,
            "no_rope_layer_interval": 4,
        },
    ),
    "cohere": Family(
        fields={**_COHERE, "qk_norm": lambda hf: "per_head" if hf["use_qk_norm"] else None},
        defaults={**_COHERE_DEFAULTS, "rope_theta": 500_000.0, "use_qk_norm": False},
    ),
    "cohere2": Family(
        fields={**_COHERE, "layer_types": _pattern, "nope_layers": _full_are_nope},
        defaults={**_COHERE_DEFAULTS, "sliding_window": 4096, "sliding_window_pattern": 4},
    ),
    "phi3": Family(
        fields={"layer_types": _sliding, "fused_qkv": "concatenated", "fused_gate_up": "concatenated"},
        defaults={
            "vocab_size": 32064,
            "hidden_size": 3072,
            "intermediate_size": 8192,
            "max_position_embeddings": 4096,
            "original_max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
        },
    ),
    "starcoder2": Family(
        fields={
            **{field: itemgetter("use_bias") for field in ("qkv_bias", "o_bias", "mlp_bias")},
            "layer_types": _sliding,
            "norm": "layer_norm",
            "norm_bias": True,
            "norm_eps": itemgetter("norm_epsilon"),
            "gated_mlp": False,
        },
        defaults={
            "vocab_size": 49152,
            "hidden_size": 3072,
            "intermediate_size": 12288,
            "num_hidden_layers": 30,
            "num_attention_heads": 24,
            "num_key_value_heads": 2,
            "hidden_act": "gelu_pytorch_tanh",
            "max_position_embeddings": 4096,
            "norm_epsilon": 1e-5,
            "use_bias": True,
            "tie_word_embeddings": True,
        },
        tensor_names={"up_proj": "c_fc", "down_proj": "c_proj"},
    ),
    "glm": Family(
        fields={"qkv_bias": itemgetter("attention_bias"), "rope": _interleaved_rope, "fused_gate_up": "concatenated"},
        defaults={
            "vocab_size": 151552,
            "intermediate_size": 13696,
            "num_hidden_layers": 40,
            "num_key_value_heads": 2,
            "head_dim": 128,
            "max_position_embeddings": 131072,
            "rms_norm_eps": 1.5625e-7,
            "partial_rotary_factor": 0.5,
            "attention_bias": True,
        },
    ),
    "glm4": Family(
        fields={
            "qkv_bias": itemgetter("attention_bias"),
            "rope": _interleaved_rope,
            "post_norm": True,
            "fused_gate_up": "concatenated",
        },
        defaults={
            "vocab_size": 151552,
            "intermediate_size": 13696,
            "num_hidden_layers": 40,
            "num_key_value_heads": 2,
            "head_dim": 128,
            "max_position_embeddings": 131072,
            "rms_norm_eps": 1.5625e-7,
            "partial_rotary_factor": 0.5,
            "attention_bias": True,
        },
    ),
    "seed_oss": Family(
        fields={
            "qkv_bias": itemgetter("attention_bias"),
            "o_bias": itemgetter("attention_out_bias"),
            **_same("mlp_bias"),
        },
        defaults={
            "vocab_size": 155136,
            "intermediate_size": 27648,
            "num_hidden_layers": 64,
            "num_attention_heads": 80,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "max_position_embeddings": 524288,
            "attention_bias": True,
            "attention_out_bias": False,
        },
    ),
    "falcon": Family(
        fields={
            **{field: itemgetter("bias") for field in ("qkv_bias", "o_bias", "mlp_bias")},
            "intermediate_size": lambda hf: hf["ffn_hidden_size"] or 4 * hf["hidden_size"],
            "num_key_value_heads": _falcon_kv_heads,
            "alibi": itemgetter("alibi"),
            "nope_layers": lambda hf: tuple(range(hf["num_hidden_layers"])) if hf["alibi"] else (),
            "fused_qkv": "grouped",
            "gated_mlp": False,
            "hidden_act": itemgetter("activation"),
            "norm": "layer_norm",
            "norm_bias": True,
            "norm_eps": itemgetter("layer_norm_epsilon"),
            "parallel_block": _falcon_parallel,
            "num_ln_in_parallel_attn": _falcon_norms,
        },
        defaults={
            "vocab_size": 65024,
            "hidden_size": 4544,
            "num_attention_heads": 71,
            "num_kv_heads": None,
            "ffn_hidden_size": None,
            "max_position_embeddings": 2048,
            "activation": "gelu",
            "layer_norm_epsilon": 1e-5,
            "tie_word_embeddings": True,
            "alibi": False,
            "bias": False,
            "multi_query": True,
            "parallel_attn": True,
            "new_decoder_architecture": False,
            "num_ln_in_parallel_attn": None,
        },
        tensor_names=_falcon_names,
    ),
    "mixtral": Family(
        fields={**_EXPERTS, "layer_types": _sliding},
        defaults={
            **_EXPERTS_DEFAULTS,
            "vocab_size": 32000,
            "intermediate_size": 14336,
            "num_key_value_heads": 8,
            "max_position_embeddings": 131072,
            "rms_norm_eps": 1e-5,
            "rope_theta": 1_000_000.0,
        },
        tensor_names={
            **_ONE_FILE_ENTRY_AN_EXPERT,
            **{f"mlp.{ours}": f"mlp.{theirs}" for ours, theirs in _EXPERT_PARAMETERS.items()},
            "mlp": "block_sparse_moe",
            "gate_proj": "w1",
            "up_proj": "w3",
            "down_proj": "w2",
        },
    ),
    "qwen2_moe": Family(
        fields={
            **_QWEN_EXPERTS,
            **_same("qkv_bias", "shared_expert_intermediate_size"),
            "layer_types": _layer_types(
                lambda hf, i: hf["use_sliding_window"] and i % 2 == 0 and i < hf["max_window_layers"]
            ),
        },
        defaults={
            **_EXPERTS_DEFAULTS,
            "vocab_size": 151936,
            "hidden_size": 2048,
            "intermediate_size": 5632,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
            "max_position_embeddings": 32768,
            "sliding_window": 4096,
            "max_window_layers": 28,
            "qkv_bias": True,
            "num_experts": 60,
            "num_experts_per_tok": 4,
            "moe_intermediate_size": 1408,
            "shared_expert_intermediate_size": 5632,
        },
        tensor_names=_ONE_FILE_ENTRY_AN_EXPERT,
    ),
    "qwen3_moe": Family(
        fields={
            **_QWEN_EXPERTS,
            **_ATTENTION_BIAS,
            "qk_norm": "head",
            "layer_types": lambda hf: _sliding(hf) if hf["use_sliding_window"] else _full(hf),
        },
        defaults={
            **_EXPERTS_DEFAULTS,
            "vocab_size": 151936,
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "num_hidden_layers": 24,
            "num_key_value_heads": 4,
            "max_position_embeddings": 32768,
            "sliding_window": 4096,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 768,
        },
        tensor_names=_ONE_FILE_ENTRY_AN_EXPERT,
    ),
    "gpt_oss": Family(
        fields={
            **_EXPERTS,
            **_ATTENTION_BIAS,
            **_same("swiglu_alpha", "swiglu_limit"),
            "layer_types": _layer_types(lambda hf, i: i % 2 == 0),
            "attention_sinks": True,
            "fused_experts": "interleaved",
            "router_bias": True,
            "expert_bias": True,
            "experts_in_out": True,
        },
        defaults={
            **_EXPERTS_DEFAULTS,
            "vocab_size": 201088,
            "hidden_size": 2880,
            "intermediate_size": 2880,
            "num_hidden_layers": 36,
            "num_attention_heads": 64,
            "num_key_value_heads": 8,
            "head_dim": 64,
            "max_position_embeddings": 131072,
            "rms_norm_eps": 1e-5,
            "rope_theta": 150_000.0,
            "rope_scaling": {
                "rope_type": "yarn",
                "factor": 32.0,
                "original_max_position_embeddings": 4096,
                "truncate": False,
            },
            "sliding_window": 128,
            "attention_bias": True,
            "num_experts": 128,
            "num_experts_per_tok": 4,
            "swiglu_alpha": 1.702,
            "swiglu_limit": 7.0,
        },
        tensor_names={
            **_EXPERT_PARAMETERS,
            "gate": "router",
            "gate_up_proj.weight": "gate_up_proj",
            "gate_up_proj.bias": "gate_up_proj_bias",
            "down_proj.weight": "down_proj",
            "down_proj.bias": "down_proj_bias",
        },
    ),
    "falcon_h1": Family(
        fields={
            **_ATTENTION_BIAS,
            **_same("mlp_bias", "embedding_multiplier", "attention_in_multiplier", "attention_out_multiplier"),
            "logit_scale": itemgetter("lm_head_multiplier"),
            "attention_multiplier": lambda hf: hf["key_multiplier"] * _FIELDS["head_dim"](hf) ** -0.5,
            "mlp_multipliers": lambda hf: tuple(hf["mlp_multipliers"] or (1.0, 1.0)),
            "mamba": _mamba,
            "mamba_out_multiplier": itemgetter("ssm_out_multiplier"),
        },
        defaults={
            "vocab_size": 128000,
            "intermediate_size": 14336,
            "num_key_value_heads": 8,
            "max_position_embeddings": 8192,
            "rms_norm_eps": 1e-5,
            "embedding_multiplier": 1.0,
            "lm_head_multiplier": 1.0,
            "mlp_multipliers": None,
            "key_multiplier": 1.0,
            "attention_in_multiplier": 1.0,
            "attention_out_multiplier": 1.0,
            "ssm_multipliers": None,
            "ssm_in_multiplier": 1.0,
            "ssm_out_multiplier": 1.0,
            "mamba_d_ssm": 1024,
            "mamba_n_heads": 128,
            "mamba_d_head": "auto",
            "mamba_n_groups": 1,
            "mamba_d_state": 256,
            "mamba_d_conv": 4,
            "mamba_expand": 2,
            "mamba_chunk_size": 256,
            "mamba_conv_bias": True,
            "mamba_proj_bias": False,
            "projectors_bias": False,
            "mamba_rms_norm": False,
            "mamba_norm_before_gate": True,
            "time_step_limit": None,
        },
        tensor_names={
            "mlp": "feed_forward",
            "post_attention_layernorm": "pre_ff_layernorm",
            "model.norm": "model.final_layernorm",
        },
    ),
    "granitemoe": Family(
        fields={**_GRANITE, **_EXPERTS, "fused_experts": "concatenated"},
        defaults={**_GRANITE_DEFAULTS, **_EXPERTS_DEFAULTS},
        tensor_names={
            **_EXPERT_PARAMETERS,
            "mlp": "block_sparse_moe",
            "experts.gate_up_proj": "input_linear",
            "experts.down_proj": "output_linear",
            "gate": "router.layer",
        },
    ),
    "ministral": Family(
        fields={"layer_types": _layer_types(lambda hf, i: hf["sliding_window"] is not None)},
        defaults={
            "vocab_size": 32000,
            "intermediate_size": 14336,
            "num_key_value_heads": 8,
            "max_position_embeddings": 131072,
            "sliding_window": 4096,
        },
    ),
}


def model_config(hf_config: Json, tensors: Collection[str] = ()) -> ModelConfig:
    """Read a config.json. `tensors`: the names of the checkpoint's, which say how it is laid out.

    Raises:
        CheckpointError: no or an unknown `model_type`, rope type or activation; names the ones supported.
    """
    model_type = hf_config.get("model_type")
    family = FAMILIES.get(str(model_type))
    if family is None:
        raise CheckpointError(
            f"config.json: model_type {model_type!r} is not supported; supported are {', '.join(sorted(FAMILIES))}"
        )
    given = hf_config
    if family.text_config:
        tied = {k: v for k, v in hf_config.items() if k == "tie_word_embeddings"}
        given = {**tied, **(hf_config.get("text_config") or {})}
    hf = {**_DEFAULTS, **family.defaults, **given}
    rows = {**_FIELDS, **family.fields}
    fields: dict[str, Any] = {name: value(hf) if callable(value) else value for name, value in rows.items()}
    if fields["hidden_act"] not in ACTIVATIONS:
        raise CheckpointError(
            f"config.json: hidden_act {fields['hidden_act']!r} is not supported; supported are {', '.join(ACTIVATIONS)}"
        )
    if "sliding_attention" not in fields["layer_types"]:
        fields["sliding_window"] = None
    names = dict(family.tensor_names(hf) if callable(family.tensor_names) else family.tensor_names)
    for pattern, layout in family.layouts.items():
        if fnmatch.filter(tensors, pattern):
            fields |= layout.fields
            names |= layout.tensor_names
    return ModelConfig(model_type=str(model_type), tensor_names=tuple(names.items()), **fields)
