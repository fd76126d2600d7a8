"""How weights are held and in what dtype a model computes, out of the arguments that ask for it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxlora.config import QuantConfig, QuantScheme


class Mode(NamedTuple):
    """scheme: of a `QuantConfig`, None for unquantised. asked: the argument that said so, "" for the default.
    double_quant: None if nothing was said of it. compute_dtype: that of a quantization_config, or None."""

    scheme: QuantScheme | None
    asked: str
    double_quant: bool | None = None
    compute_dtype: Any = None

    @property
    def quant_config(self) -> QuantConfig | None:
        if self.scheme is None:
            return None
        return QuantConfig(scheme=self.scheme, double_quant=self.double_quant is not False)

    def agrees(self, stored: QuantConfig) -> bool:
        """Whether weights that are stored so are what was asked for."""
        nested = self.double_quant in (None, stored.double_quant)
        return not self.asked or (self.scheme == stored.scheme and nested)


_SCHEMES: dict[str, QuantScheme | None] = {
    "load_in_4bit=True": "nf4", "load_in_8bit=True": "int8", "load_in_fp8=True": "fp8",
    "load_in_fp8='block'": "fp8_block",
}  # fmt: skip


def choose_mode(*, load_in_4bit: bool | None, quantization_config: Any = None, **modes: Any) -> Mode:
    """The one mode that the arguments of `from_pretrained` ask for, 4-bit if they ask for none.

    A quantization_config may stand beside the argument that means the same.

    Raises:
        ValueError: two are asked for, or load_in_fp8 or quantization_config is none of what they can be.
        TypeError: a quantization_config of another kind.
    """
    if modes["load_in_fp8"] not in (False, True, "block"):
        raise ValueError(f'load_in_fp8 must be False, True (rows) or "block", found {modes["load_in_fp8"]!r}')
    asked = [f"{name}={value!r}" for name, value in {"load_in_4bit": load_in_4bit, **modes}.items() if value]
    if len(asked) > 1:
        raise ValueError(f"{' and '.join(asked)} are both given: choose one")
    if quantization_config is not None:
        mode = read_quantization_config(quantization_config)
        if asked and _SCHEMES.get(asked[0]) != mode.scheme:
            raise ValueError(f"{asked[0]} and a quantization_config that says {mode.scheme} are both given: choose one")
        return mode
    if not asked:
        return Mode("nf4", "") if load_in_4bit is None else Mode(None, "load_in_4bit=False")
    return Mode(_SCHEMES.get(asked[0]), asked[0])


# What no mode quantises, by the names that skip lists have for it.
_NEVER_QUANTISED = {
    "lm_head", "embed_tokens", "multi_modal_projector", "merger", "modality_projection", "router", "mlp.gate",
    "per_layer_model_projection", "block_sparse_moe.gate", "mamba", "in_proj_a", "in_proj_b", "conv1d", "audio_tower",
    "vision_tower", "vision_embedder", "vision_model", "visual", "embed_vision", "embed_audio", "score", "classifier",
    "qa_outputs",
}  # fmt: skip
# The fields of a configuration that change what is stored, each with the values that there are here.
_SUPPORTED: dict[str, dict[str, tuple[Any, ...]]] = {
    "nf4": {"bnb_4bit_quant_type": ("nf4",)},
    "int8": {"llm_int8_has_fp16_weight": (False,), "llm_int8_enable_fp32_cpu_offload": (False,)},
    "fp8_block": {"weight_block_size": ((128, 128), [128, 128]), "dequantize": (False,), "scale_fmt": ("float",)},
    "fp8": {},
}


def read_quantization_config(config: Any) -> Mode:
    """The mode of a `quantization_config`: a `QuantConfig`, or one of transformers (bitsandbytes 4-bit of type "nf4" or
    8-bit, fine-grained fp8, fbgemm fp8), as an object or as the dict that config.json has of it.

    Raises:
        ValueError: it asks for what is not here; the message names the field.
        TypeError: it is no configuration.
    """
    if isinstance(config, QuantConfig):
        return Mode(config.scheme, "quantization_config", config.double_quant)
    fields = config.to_dict() if hasattr(config, "to_dict") else config
    if not isinstance(fields, Mapping):
        raise TypeError(
            f"quantization_config is {config!r}; it should be a QuantConfig, one of transformers', or a dict"
        )
    scheme = _scheme(fields)
    defaults = {"bnb_4bit_quant_type": "fp4"}  # of transformers, where a dict leaves them out
    for name, values in _SUPPORTED[scheme].items():
        value = fields.get(name, defaults.get(name, values[0]))
        if value not in values:
            raise ValueError(f"quantization_config: {name} is {value!r}; supported is {values[0]!r}")
    skipped = fields.get("llm_int8_skip_modules") or fields.get("modules_to_not_convert") or []
    if quantised := sorted(set(skipped) - _NEVER_QUANTISED):
        raise ValueError(
            f"quantization_config: it leaves {quantised} unquantised, but every projection of the blocks is held alike "
            "here, and what is none is never quantised: leave these names out"
        )
    if scheme != "nf4":
        return Mode(scheme, "quantization_config")
    nested = bool(fields.get("bnb_4bit_use_double_quant", False))
    return Mode(scheme, "quantization_config", nested, fields.get("bnb_4bit_compute_dtype"))


def _scheme(fields: Mapping[str, Any]) -> QuantScheme:
    method = fields.get("quant_method", "bitsandbytes")
    method = getattr(method, "value", method)  # transformers has an enumeration of them
    if method == "bitsandbytes" and bool(fields.get("load_in_4bit")) != bool(fields.get("load_in_8bit")):
        return "nf4" if fields.get("load_in_4bit") else "int8"
    schemes: dict[str, QuantScheme] = {"fp8": "fp8_block", "fbgemm_fp8": "fp8"}
    if method not in schemes:
        four, eight = (fields.get(name, False) for name in ("load_in_4bit", "load_in_8bit"))
        raise ValueError(
            f"quantization_config: quant_method is {method!r} with load_in_4bit={four} and load_in_8bit={eight}; "
            "supported are 'bitsandbytes' with one of them, 'fp8' and 'fbgemm_fp8'"
        )
    return schemes[method]


def resolve_dtype(dtype: Any) -> jnp.dtype:
    """A jnp or torch dtype, or its name, as a jnp dtype; None is the device's best (see `from_pretrained`)."""
    if dtype is None:
        device = jax.devices()[0]
        if device.platform == "cpu":
            return jnp.dtype(jnp.float32)
        capability = str(getattr(device, "compute_capability", "8.0"))
        return jnp.dtype(jnp.bfloat16 if float(capability) >= 8.0 else jnp.float16)
    name = str(dtype).removeprefix("torch.") if not isinstance(dtype, type) else dtype.__name__
    if name not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"dtype {dtype!r} is not one of float32, bfloat16, float16")
    return jnp.dtype(name)
