"""Every option of the library that is not a training option, each with one home: frozen, keyword-only dataclasses.

`ModelConfig` says what a decoder computes, in Hugging Face's field names, and nothing about where its weights lie.
Where two families differ, the difference is a field here; the model never asks for a `model_type`.
"""

from __future__ import annotations

from dataclasses import dataclass

ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "llama3")
LAYER_TYPES = ("full_attention", "sliding_attention")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary position embedding, with Hugging Face's names for the fields of `rope_parameters`.

    `None` means that the rope type does not use the field or computes its default from the others.
    """

    rope_type: str = "default"
    rope_theta: float = 10_000.0
    partial_rotary_factor: float = 1.0
    factor: float = 1.0
    original_max_position_embeddings: int | None = None
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0

    def __post_init__(self):
        _require(self.rope_type in ROPE_TYPES, f"rope_type {self.rope_type!r} is not one of {', '.join(ROPE_TYPES)}")
        _require(self.factor >= 1.0, f"rope factor must be at least 1, found {self.factor}")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """What a decoder-only transformer computes.

    Shapes: hidden states are [batch, sequence, hidden_size]; queries have `num_attention_heads` heads of `head_dim`,
    keys and values `num_key_value_heads`. `layer_types` names each layer's attention, one of `LAYER_TYPES`.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rope: RopeConfig
    layer_types: tuple[str, ...]
    sliding_window: int | None = None
    hidden_act: str = "silu"
    rms_norm_eps: float = 1e-6
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    tie_word_embeddings: bool = False

    def __post_init__(self):
        _require(
            self.num_attention_heads % self.num_key_value_heads == 0,
            f"num_attention_heads ({self.num_attention_heads}) must be a multiple of "
            f"num_key_value_heads ({self.num_key_value_heads})",
        )
        _require(
            len(self.layer_types) == self.num_hidden_layers,
            f"layer_types has {len(self.layer_types)} entries for {self.num_hidden_layers} layers",
        )
        for kind in self.layer_types:
            _require(kind in LAYER_TYPES, f"layer type {kind!r} is not one of {', '.join(LAYER_TYPES)}")
        _require(
            self.sliding_window is not None or "sliding_attention" not in self.layer_types,
            "layer_types asks for sliding attention, but sliding_window is not set",
        )

    def window(self, layer_type: str) -> int | None:
        """Number of tokens, itself included, that a token of this kind of layer attends to; None for all before it."""
        return self.sliding_window if layer_type == "sliding_attention" else None


@dataclass(frozen=True, kw_only=True)
class QuantConfig:
    """How frozen block projections are stored: NF4 in blocks of 64, double quantised (QLoRA, arXiv:2305.14314)."""

    scheme: str = "nf4"
    double_quant: bool = True

    def __post_init__(self):
        _require(self.scheme == "nf4", f"quantisation scheme {self.scheme!r} is not one of nf4")


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """LoRA options with PEFT's names and meaning (arXiv:2106.09685).

    `target_modules` is "all-linear" or names that a module's path equals or ends with, at a dot.

    Raises:
        TypeError: `r` is not an integer.
        ValueError: `r` below 1, `lora_dropout` outside [0, 1), or no target at all.
    """

    r: int = 16
    lora_alpha: float = 16
    lora_dropout: float = 0.0
    use_rslora: bool = False
    target_modules: tuple[str, ...] | str = "all-linear"

    def __post_init__(self):
        if not isinstance(self.r, int) or isinstance(self.r, bool):
            raise TypeError(f"the rank r must be an integer, found {self.r!r}")
        _require(self.r > 0, f"the rank r must be larger than 0, found {self.r}")
        _require(0.0 <= self.lora_dropout < 1.0, f"lora_dropout must lie in [0, 1), found {self.lora_dropout}")
        if isinstance(self.target_modules, str):
            _require(
                self.target_modules == "all-linear",
                f"target_modules {self.target_modules!r} is a string other than 'all-linear': pass a list of names",
            )
        else:
            object.__setattr__(self, "target_modules", tuple(self.target_modules))
            _require(len(self.target_modules) > 0, "target_modules is empty: name at least one module, or 'all-linear'")

    @property
    def scaling(self) -> float:
        """alpha / r, or alpha / sqrt(r) for rank-stabilised LoRA (arXiv:2312.03732)."""
        return self.lora_alpha / (self.r**0.5 if self.use_rslora else self.r)
