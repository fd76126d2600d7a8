"""Every option of the library that is not a training option, each with one home: frozen, keyword-only dataclasses.

`ModelConfig` says what a decoder computes, in Hugging Face's field names where it has one. Where two families differ,
the difference is a field here; the model never asks for a `model_type`.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, get_args

ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "llama3", "longrope", "proportional")
QuantScheme = Literal["nf4", "int8", "fp8", "fp8_block"]
QUANT_SCHEMES = get_args(QuantScheme)
LAYER_TYPES = ("full_attention", "sliding_attention", "linear_attention")
NORMS = ("rms_norm", "layer_norm")
QK_NORMS = ("head", "per_head", "projection")
BIASES = ("none", "all", "lora_only")
CORDA_METHODS = ("ipm", "kpm")
FUSED_QKV = ("concatenated", "grouped")
FUSED_GATE_UP = ("concatenated", "interleaved")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary position embedding, with Hugging Face's names for the fields of `rope_parameters`.

    `None` means that the rope type does not use the field or computes its default from the others. `interleaved` makes
    pairs of neighbouring entries (2 d, 2 d + 1), as GPT-J does, and not of the halves (d, d + rotary / 2). "longrope"
    divides each frequency by an entry of `short_factor`, or of `long_factor` beyond the original window. "proportional"
    makes pairs of all of a head, of which only the first `partial_rotary_factor` turn.
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
    short_factor: tuple[float, ...] | None = None
    long_factor: tuple[float, ...] | None = None
    interleaved: bool = False

    def __post_init__(self):
        _require(self.rope_type in ROPE_TYPES, f"rope_type {self.rope_type!r} is not one of {', '.join(ROPE_TYPES)}")
        _require(self.factor >= 1.0, f"rope factor must be at least 1, found {self.factor}")
        if self.rope_type == "longrope":
            _require(
                self.short_factor is not None and self.long_factor is not None,
                "rope_type 'longrope' needs short_factor and long_factor",
            )


@dataclass(frozen=True, kw_only=True)
class MambaConfig:
    """A Mamba-2 mixer (`jaxlora.mamba`), with Falcon-H1's names less their `mamba_`.

    d_ssm: n_heads * d_head; n_groups: of heads that share B and C; d_state, d_conv: of the state, and taps of the
    convolution; chunk_size: tokens of the scan's chunks. conv_bias, proj_bias, out_bias: of the convolution, in_proj
    and out_proj. rms_norm: the gate goes with a norm, which comes first with norm_before_gate. time_step_limit: bounds
    of dt. in_multiplier, multipliers: factors on the input, and on the gate, x, B, C and dt.
    """

    d_ssm: int
    n_heads: int
    d_head: int
    n_groups: int
    d_state: int
    d_conv: int
    chunk_size: int
    conv_bias: bool = True
    proj_bias: bool = False
    out_bias: bool = False
    rms_norm: bool = False
    norm_before_gate: bool = True
    time_step_limit: tuple[float, ...] = (0.0, float("inf"))
    in_multiplier: float = 1.0
    multipliers: tuple[float, ...] = (1.0,) * 5

    def __post_init__(self):
        _require(
            self.n_heads * self.d_head == self.d_ssm and self.n_heads % self.n_groups == 0,
            f"mamba_d_ssm ({self.d_ssm}) must be mamba_n_heads ({self.n_heads}) times mamba_d_head ({self.d_head}), "
            f"and mamba_n_groups ({self.n_groups}) must divide mamba_n_heads",
        )

    @property
    def channels(self) -> int:
        """Those of the convolution: x, B and C."""
        return self.d_ssm + 2 * self.n_groups * self.d_state


@dataclass(frozen=True, kw_only=True)
class LinearAttentionConfig:
    """A gated delta rule in place of attention (`jaxlora.delta_net`), with Qwen3.5's names less their `linear_`.

    num_key_heads, key_head_dim: of queries and of keys; num_value_heads, value_head_dim: of values.
    conv_kernel_dim: taps of the convolution; chunk_size: tokens of the scan's chunks.
    """

    num_key_heads: int
    num_value_heads: int
    key_head_dim: int
    value_head_dim: int
    conv_kernel_dim: int
    chunk_size: int = 64

    def __post_init__(self):
        _require(
            self.num_value_heads % self.num_key_heads == 0,
            f"linear_num_value_heads ({self.num_value_heads}) must be a multiple of linear_num_key_heads "
            f"({self.num_key_heads})",
        )

    @property
    def channels(self) -> int:
        """Those of the convolution: queries, keys and values."""
        return 2 * self.num_key_heads * self.key_head_dim + self.num_value_heads * self.value_head_dim


@dataclass(frozen=True, kw_only=True)
class LayerConfig:
    """What one layer does and another may not.

    sliding_window: number of tokens, itself included, that a token attends to; None for all before it. rope: None for
    no positions (NoPE, arXiv:2305.19466). sparse: whether a router chooses among experts where others have an MLP.
    linear: whether it has `ModelConfig.linear_attention` in place of attention. head_dim, num_key_value_heads,
    intermediate_size: as in `ModelConfig`, of this layer.

    k_eq_v: values are what k_proj makes, before keys are normed and turned. stores_kv: the layer's own index, where
    later layers attend to its keys and values too; reuses_kv: the index of the layer whose keys and values it attends
    to, having none of its own.
    """

    sliding_window: int | None
    rope: RopeConfig | None
    sparse: bool = False
    linear: bool = False
    head_dim: int
    num_key_value_heads: int
    intermediate_size: int
    k_eq_v: bool = False
    stores_kv: int | None = None
    reuses_kv: int | None = None


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """What a decoder-only transformer computes.

    Shapes: hidden states are [batch, sequence, hidden_size]; queries have `num_attention_heads` heads of `head_dim`,
    keys and values `num_key_value_heads`. The defaults are a Llama's.

    Attention
      layer_types: each layer's attention, one of `LAYER_TYPES`; sliding_rope: the rope of sliding layers where it is
        not `rope`; nope_layers: indices of layers without rope; alibi: scores get a head's slope times the key's
        position, see `rope.alibi_bias`, before they are multiplied.
      attention_multiplier: what scores are multiplied by; None for head_dim ** -0.5.
      attn_logit_softcapping: scores become cap * tanh(scores / cap).
      attn_output_gate: q_proj makes for each head a query and a gate, whose sigmoid multiplies the head's result.
      attention_sinks: each head has the score of a key that stands for nothing, see `kernels.attention`.
      qk_norm: None, or a norm of queries and keys: "head", over each head with one weight [head_dim]; "per_head", over
        each head with a weight [heads, head_dim]; "projection", over all heads together.
      fused_qkv: None, or one linear `qkv_proj` for queries, keys and values, whose outputs are "concatenated" in this
        order, or "grouped": for each key head its queries, its key, its value.
      global_head_dim, num_global_key_value_heads: of layers without a window, where they are others; attention_k_eq_v:
        those layers take values from k_proj. v_norm: values are divided by the root of their mean square.
      num_kv_shared_layers: so many layers at the end attend to the keys and values of the last layer before them that
        is of their type, and have none; with use_double_wide_mlp their MLP has twice the width.
    MLP
      gated_mlp: down(act(gate(x)) * up(x)), or down(act(up(x))); fused_gate_up: None, or one linear `gate_up_proj` for
        both, whose outputs are "concatenated", or "interleaved": gate, up, gate, up, ...
    Mixture of experts (`jaxlora.moe`)
      num_experts: in each layer, 0 for none; num_experts_per_tok: how many of them a token goes through;
        moe_intermediate_size: their inner width; dense_layers: indices of layers with an MLP all the same.
      norm_topk_prob: the weights of a token's experts sum to 1. router_bias, expert_bias: those have one.
      shared_expert_intermediate_size: inner width of an expert for every token, behind a gate; 0 for none.
      experts_beside_mlp: layers have an MLP and experts, both reading the residual through norms of their own, and each
        normed again before they are added. router_scale: the router reads the residual divided by the root of its mean
        square and of hidden_size, times a scale; and each expert's weight in the sum has one.
      fused_experts: as `fused_gate_up`, of the experts. experts_in_out: the experts' matrices are [in, out].
        swiglu_alpha, swiglu_limit: of `moe.clamped_swiglu`, which experts have in place of an activation; None for
        none.
      router_aux_loss_coef: the factor of the load-balancing loss in `causal_lm_loss`.
    Linear attention
      linear_attention: None, or what layers of type "linear_attention" have in place of attention.
    Mamba
      mamba: None, or a mixer that reads what attention reads, and is added to it; mamba_out_multiplier: its factor.
      attention_in_multiplier, attention_out_multiplier: attention's, on what it reads and adds.
      mlp_multipliers: on the MLP's gate, before its activation, and on what the MLP adds.
    Norms and residuals
      norm: one of `NORMS`; norm_bias: they have a bias; norm_offset: what is added to their weights (Gemma: 1).
      pre_norm, post_norm: attention and MLP have a norm before them, after them.
      parallel_block: attention and MLP read the same input, and both are added at once; num_ln_in_parallel_attn: they
        share a norm (1), or each has its own (2).
      embedding_multiplier, residual_multiplier, logit_scale: factors on the embeddings, on what attention and MLP add
        to the residual, on the logits. final_logit_softcapping: logits become cap * tanh(logits / cap).
      layer_scalar: what a layer puts out is multiplied by a number of its own.
    Per-layer inputs
      hidden_size_per_layer_input: 0, or the width of an embedding that each token has for each layer, see
        `model.Decoder.per_layer_inputs`; vocab_size_per_layer_input: the rows of their table.

    tensor_names: (part of a parameter's path here, what the checkpoint calls it), for `model.named_nodes`.
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
    tie_word_embeddings: bool = False

    layer_types: tuple[str, ...]
    sliding_window: int | None = None
    rope: RopeConfig
    sliding_rope: RopeConfig | None = None
    nope_layers: tuple[int, ...] = ()
    alibi: bool = False
    attention_multiplier: float | None = None
    attn_logit_softcapping: float | None = None
    attn_output_gate: bool = False
    attention_sinks: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    qk_norm: str | None = None
    fused_qkv: str | None = None
    global_head_dim: int | None = None
    num_global_key_value_heads: int | None = None
    attention_k_eq_v: bool = False
    v_norm: bool = False
    num_kv_shared_layers: int = 0
    use_double_wide_mlp: bool = False

    hidden_act: str = "silu"
    mlp_bias: bool = False
    gated_mlp: bool = True
    fused_gate_up: str | None = None

    num_experts: int = 0
    num_experts_per_tok: int = 0
    moe_intermediate_size: int = 0
    dense_layers: tuple[int, ...] = ()
    norm_topk_prob: bool = False
    router_bias: bool = False
    expert_bias: bool = False
    shared_expert_intermediate_size: int = 0
    experts_beside_mlp: bool = False
    router_scale: bool = False
    fused_experts: str | None = None
    experts_in_out: bool = False
    swiglu_alpha: float | None = None
    swiglu_limit: float | None = None
    router_aux_loss_coef: float = 0.0

    linear_attention: LinearAttentionConfig | None = None

    mamba: MambaConfig | None = None
    mamba_out_multiplier: float = 1.0
    attention_in_multiplier: float = 1.0
    attention_out_multiplier: float = 1.0
    mlp_multipliers: tuple[float, float] = (1.0, 1.0)

    norm: str = "rms_norm"
    norm_eps: float = 1e-6
    norm_bias: bool = False
    norm_offset: float = 0.0
    pre_norm: bool = True
    post_norm: bool = False
    parallel_block: bool = False
    num_ln_in_parallel_attn: int = 1
    embedding_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    logit_scale: float = 1.0
    final_logit_softcapping: float | None = None
    layer_scalar: bool = False

    hidden_size_per_layer_input: int = 0
    vocab_size_per_layer_input: int = 0

    tensor_names: tuple[tuple[str, str], ...] = ()

    def __post_init__(self):
        for name in ("num_key_value_heads", "num_global_key_value_heads"):
            heads = getattr(self, name)
            _require(
                heads is None or self.num_attention_heads % heads == 0,
                f"num_attention_heads ({self.num_attention_heads}) must be a multiple of {name} ({heads})",
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
        _require(
            self.linear_attention is not None or "linear_attention" not in self.layer_types,
            "layer_types asks for linear attention, but linear_attention is not set",
        )
        _require(
            set(self.layer_types) != {"linear_attention"},
            "layer_types has linear attention only; at least one layer must attend",
        )
        own = self.num_hidden_layers - self.num_kv_shared_layers
        without = sorted(set(self.layer_types[own:]) - set(self.layer_types[:own]))
        _require(
            own >= 0 and not without,
            f"num_kv_shared_layers ({self.num_kv_shared_layers}) leaves no layer of type {', '.join(without)} whose "
            "keys and values they could share",
        )
        _require(
            self.fused_qkv is None or not (self.num_kv_shared_layers or self.attention_k_eq_v),
            f"num_kv_shared_layers and attention_k_eq_v are for projections apart, and fused_qkv is {self.fused_qkv!r}",
        )
        _require(
            not self.attn_output_gate or self.fused_qkv is None,
            f"attn_output_gate is for a q_proj of its own, and fused_qkv is {self.fused_qkv!r}",
        )
        _require(self.norm in NORMS, f"norm {self.norm!r} is not one of {', '.join(NORMS)}")
        _require(
            self.qk_norm is None or self.qk_norm in QK_NORMS,
            f"qk_norm {self.qk_norm!r} is not None or one of {', '.join(QK_NORMS)}",
        )
        _require(
            self.gated_mlp or not self.fused_gate_up, "fused_gate_up fuses a gate, and gated_mlp says there is none"
        )
        for name in ("fused_gate_up", "fused_experts"):
            value = getattr(self, name)
            _require(
                value is None or value in FUSED_GATE_UP,
                f"{name} {value!r} is not None or one of {', '.join(FUSED_GATE_UP)}",
            )
        _require(
            not self.num_experts or 0 < self.num_experts_per_tok <= self.num_experts,
            f"num_experts_per_tok ({self.num_experts_per_tok}) must lie between 1 and the number of experts "
            f"({self.num_experts})",
        )

    def attention_scale(self, head_dim: int) -> float:
        """What scores are multiplied by."""
        return head_dim**-0.5 if self.attention_multiplier is None else self.attention_multiplier

    def layer(self, index: int) -> LayerConfig:
        """What layer `index` does that another may not."""
        kind = self.layer_types[index]
        sliding, linear = kind == "sliding_attention", kind == "linear_attention"
        rope = self.sliding_rope if sliding and self.sliding_rope is not None else self.rope
        head_dim = (None if sliding else self.global_head_dim) or self.head_dim
        kv_heads = (None if sliding else self.num_global_key_value_heads) or self.num_key_value_heads
        source = self._kv_source(kind) if self.num_kv_shared_layers else None
        reuses = index >= self.num_hidden_layers - self.num_kv_shared_layers
        return LayerConfig(
            sliding_window=self.sliding_window if sliding else None,
            rope=None if linear or index in self.nope_layers else rope,
            sparse=self.num_experts > 0 and index not in self.dense_layers,
            linear=linear,
            head_dim=head_dim,
            num_key_value_heads=kv_heads,
            intermediate_size=self.intermediate_size * (2 if reuses and self.use_double_wide_mlp else 1),
            k_eq_v=self.attention_k_eq_v and not sliding,
            stores_kv=source if index == source else None,
            reuses_kv=source if reuses else None,
        )

    def _kv_source(self, kind: str) -> int:
        """The last layer of this type that has keys and values."""
        own = range(self.num_hidden_layers - self.num_kv_shared_layers)
        return next((i for i in reversed(own) if self.layer_types[i] == kind), -1)

    @property
    def layers(self) -> tuple[LayerConfig, ...]:
        """Every layer's `layer`; like layers are one object, which makes them quick to compare."""
        seen: dict[LayerConfig, LayerConfig] = {}
        return tuple(seen.setdefault(layer, layer) for layer in map(self.layer, range(self.num_hidden_layers)))

    @property
    def ropes(self) -> tuple[tuple[RopeConfig, int], ...]:
        """The distinct ropes of the layers, each with the head dim that it turns."""
        return tuple(dict.fromkeys((layer.rope, layer.head_dim) for layer in self.layers if layer.rope is not None))


@dataclass(frozen=True, kw_only=True)
class QuantConfig:
    """How frozen block projections are stored; `quant.QuantizedArray` says what a scheme is.

    "nf4" is that of QLoRA (arXiv:2305.14314), in blocks of 64, and the only one that `double_quant` is for.
    """

    scheme: QuantScheme = "nf4"
    double_quant: bool = True

    def __post_init__(self):
        _require(
            self.scheme in QUANT_SCHEMES,
            f"quantisation scheme {self.scheme!r} is not one of {', '.join(QUANT_SCHEMES)}",
        )


@dataclass(frozen=True, kw_only=True)
class EvaConfig:
    """How EVA (arXiv:2410.07170) starts adapters from data, with PEFT's names.

    rho: a layer gets at most rho * r directions; 1 leaves every rank as it is. tau: a layer has read enough when its
    directions have a cosine similarity of tau with those of one batch before. use_label_mask: tokens whose label is
    `label_mask_value` do not count. whiten: divide each direction by the root of its singular value.
    adjust_scaling_factors: lora_alpha grows and shrinks with the rank, so that alpha / r stays.

    Raises:
        ValueError: rho below 1, or tau outside (0, 1].
    """

    rho: float = 2.0
    tau: float = 0.99
    use_label_mask: bool = True
    label_mask_value: int = -100
    whiten: bool = False
    adjust_scaling_factors: bool = True

    def __post_init__(self):
        _require(self.rho >= 1.0, f"eva_config: rho must be at least 1, found {self.rho}")
        _require(0.0 < self.tau <= 1.0, f"eva_config: tau must lie in (0, 1], found {self.tau}")


@dataclass(frozen=True, kw_only=True)
class CordaConfig:
    """How CorDA (arXiv:2406.05223) starts adapters from data, with PEFT's names.

    corda_method: "ipm" (instruction-previewed) takes the directions of the weight that matter most to the data,
    "kpm" (knowledge-preserved) those that matter least. covariance_file: where the covariances of the inputs are
    written, and read from if it is there: safetensors, {module: [in, in] float32}. The other fields of PEFT's are
    about its memory and its files: `cache_file` is refused; `verbose`, `use_float16_for_covariance` and
    `prune_temporary_fields` warn that they change nothing, because only one input's covariances exist at a time.

    Raises:
        ValueError: an unknown method, or a `cache_file`.
    """

    cache_file: str | None = None
    covariance_file: str | None = None
    corda_method: str = "ipm"
    verbose: bool = False
    use_float16_for_covariance: bool = False
    prune_temporary_fields: bool = True

    def __post_init__(self):
        _require(
            self.corda_method in CORDA_METHODS,
            f"corda_config: corda_method {self.corda_method!r} is not one of {', '.join(CORDA_METHODS)}",
        )
        _require(
            self.cache_file is None,
            "corda_config: cache_file is a pickle of PEFT's, which is neither read nor written here: keep the "
            "covariances (covariance_file), of which any rank is made in seconds, or save the adapter",
        )
        idle = dict(prune_temporary_fields=True, use_float16_for_covariance=False, verbose=False)
        if named := [name for name, default in idle.items() if getattr(self, name) != default]:
            warnings.warn(f"corda_config: {', '.join(named)} change nothing here", stacklevel=2)


def _settings(cls: type, name: str, given: Any) -> Any:
    """`given` as a `cls`: one already, None for its defaults, a mapping, or PEFT's dataclass of the same fields."""
    if isinstance(given, cls):
        return given
    values = dict(given or {}) if isinstance(given, Mapping | None) else dict(vars(given))
    known = [field.name for field in fields(cls)]
    unknown = sorted(values.keys() - set(known))
    _require(not unknown, f"{name} has {', '.join(known)}, found {', '.join(unknown)}")
    return cls(**values)


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """LoRA options with PEFT's names and meaning (arXiv:2106.09685). A module is meant by its path in the checkpoint.

    `target_modules` is "all-linear", or names that a path equals or ends with, at a dot, or a string that is a regular
    expression for a whole path. `exclude_modules` takes names or an expression in the same way. `layers_to_transform`
    keeps the layers of these indices only; `layers_pattern` names the lists whose numbers count as such, by default
    any. `rank_pattern` and `alpha_pattern` give single modules another `r` or `lora_alpha`: {expression for the end of
    a path: value}, of which the first that matches counts. Mappings are kept as tuples of pairs, so that this hashes.

    `target_parameters` are parameters of experts, as transformers has them: ends of paths such as
    "mlp.experts.gate_up_proj", of which each expert gets an adapter. As in PEFT `exclude_modules` and
    `layers_to_transform` do not act on them; a path may name a layer. `target_modules` may then be empty.

    `init_lora_weights`: True draws A and leaves B zero, False draws both, "gaussian" draws A from a normal
    distribution, "orthogonal" draws B and A so that B A = 0. "pissa" (arXiv:2404.02948), "pissa_niter_n" (by n steps of
    subspace iteration) and "olora" (arXiv:2406.01775) start from the weight's largest directions and take them out of
    the weight. "loftq" (arXiv:2310.08659) quantises the weight and starts from what that lost: `loftq_config` says
    loftq_bits, 4 (NF4) or 8, and loftq_iter, the rounds of quantising what the adapter does not hold. "eva"
    (arXiv:2410.07170) starts from the directions in which the inputs of some data vary most, and gives the layers
    ranks by what theirs explain, so what the data decided comes back as other patterns; see `EvaConfig`. "corda"
    (arXiv:2406.05223) takes directions out of the weight that the data chooses; see `CordaConfig`.

    `use_dora` gives each output a magnitude that learns (arXiv:2402.09353). `bias` says which biases of the checkpoint
    learn too: "none", "lora_only" (those of adapted modules) or "all". `modules_to_save` are modules whose weights
    learn as a whole, in a copy: ends of paths, as in PEFT even without a dot before them. `ensure_weight_tying`: a
    head that is tied to the embedding follows what the embedding learns.

    Raises:
        TypeError: a rank is not an integer.
        ValueError: a rank below 1, `lora_dropout` outside [0, 1), no target at all, an expression that is none, or
            options that contradict each other, or cannot be had with `target_parameters`.
    """

    r: int = 16
    lora_alpha: float = 16
    lora_dropout: float = 0.0
    use_rslora: bool = False
    target_modules: Sequence[str] | str = "all-linear"
    exclude_modules: Sequence[str] | str | None = None
    layers_to_transform: Sequence[int] | int | None = None
    layers_pattern: Sequence[str] | str | None = None
    rank_pattern: Mapping[str, int] | tuple[tuple[str, int], ...] = ()
    alpha_pattern: Mapping[str, float] | tuple[tuple[str, float], ...] = ()
    init_lora_weights: bool | str = True
    loftq_config: Mapping[str, int] | tuple[tuple[str, int], ...] = ()
    eva_config: Any = None  # an EvaConfig, or what can be made one
    corda_config: Any = None
    use_dora: bool = False
    bias: str = "none"
    modules_to_save: Sequence[str] | None = None
    ensure_weight_tying: bool = False
    target_parameters: Sequence[str] | None = None

    def __post_init__(self):
        _check_rank("the rank r", self.r)
        _require(0.0 <= self.lora_dropout < 1.0, f"lora_dropout must lie in [0, 1), found {self.lora_dropout}")
        for name in (
            "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save",
            "target_parameters",
        ):  # fmt: skip
            value = getattr(self, name)
            if isinstance(value, str) and name in ("modules_to_save", "target_parameters"):
                raise TypeError(f"{name} must be a list of names, found the text {value!r}")
            if isinstance(value, str) and name != "layers_pattern":
                _check_expression(name, value)
            elif not isinstance(value, str | int | None):
                object.__setattr__(self, name, tuple(value))
        _require(
            len(self.target_modules) > 0 or bool(self.target_parameters),
            "target_modules is empty: name at least one module, or 'all-linear', or experts in target_parameters",
        )
        for name in ("rank_pattern", "alpha_pattern"):
            value = getattr(self, name)
            pairs = tuple(value.items() if isinstance(value, Mapping) else map(tuple, value))
            for expression, _ in pairs:
                _check_expression(name, expression)
            object.__setattr__(self, name, pairs)
        for expression, rank in self.rank_pattern:
            _check_rank(f"rank_pattern: the rank of {expression!r}", rank)
        self._check_layers()
        self._check_init()
        self._check_parameters()
        _require(self.bias in BIASES, f"bias {self.bias!r} is not one of {', '.join(BIASES)}")

    def _check_init(self) -> None:
        init = self.init_lora_weights
        _require(
            isinstance(init, bool)
            or re.fullmatch(r"gaussian|orthogonal|pissa(_niter_\d+)?|olora|loftq|eva|corda", init) is not None,
            f"init_lora_weights {init!r} is not one of True, False, gaussian, orthogonal, pissa, pissa_niter_<number>, "
            "olora, loftq, eva, corda",
        )
        if init == "orthogonal":
            odd = [rank for rank in (self.r, *dict(self.rank_pattern).values()) if rank % 2]
            _require(not odd, f'init_lora_weights="orthogonal" needs even ranks, found {odd}')
        given = dict(self.loftq_config)
        _require(init == "loftq" or not given, f'loftq_config={given} needs init_lora_weights="loftq", found {init!r}')
        unknown = given.keys() - {"loftq_bits", "loftq_iter"}
        _require(not unknown, f"loftq_config has loftq_bits and loftq_iter, found {', '.join(sorted(unknown))}")
        _require(self.loftq_bits in (4, 8), f"loftq_bits must be 4 or 8, found {self.loftq_bits}")
        _require(self.loftq_iter > 0, f"loftq_iter must be larger than 0, found {self.loftq_iter}")
        object.__setattr__(self, "loftq_config", tuple(sorted(given.items())))
        for name, cls in (("eva", EvaConfig), ("corda", CordaConfig)):
            settings, option = getattr(self, f"{name}_config"), f"{name}_config"
            _require(
                init == name or not settings, f'{option}={settings} needs init_lora_weights="{name}", found {init!r}'
            )
            object.__setattr__(self, option, _settings(cls, option, settings) if init == name else None)

    def _check_parameters(self) -> None:
        if not self.target_parameters:
            return
        _require(
            not self.lora_dropout,
            "target_parameters does not work with lora_dropout, as in PEFT, which adapts a parameter and never sees "
            f"its input: pass lora_dropout=0, found {self.lora_dropout}",
        )
        _require(not self.use_dora, "target_parameters does not work with use_dora=True, as in PEFT: leave out one")
        _require(
            self.init_lora_weights in (True, False, "gaussian"),
            f"target_parameters does not work with init_lora_weights={self.init_lora_weights!r}: experts start as "
            'True, False or "gaussian" says',
        )

    @property
    def loftq_bits(self) -> int:
        return dict(self.loftq_config).get("loftq_bits", 4)

    @property
    def loftq_iter(self) -> int:
        return dict(self.loftq_config).get("loftq_iter", 1)

    @property
    def changes_base(self) -> bool:
        """Whether the initialisation changes the base weights."""
        return self.takes_from_base or self.init_lora_weights == "loftq"

    @property
    def takes_from_base(self) -> bool:
        """Whether the initialisation takes what it starts from out of the base weights."""
        return str(self.init_lora_weights).startswith(("pissa", "olora", "corda"))

    @property
    def needs_data(self) -> bool:
        """Whether the initialisation reads data."""
        return self.init_lora_weights in ("eva", "corda")

    def on_plain_base(self) -> LoraConfig:
        """The settings of the same adapter for a base that nothing was taken out of: twice the rank, same scaling."""
        if not self.takes_from_base:
            return self
        factor = 2**0.5 if self.use_rslora else 2
        return replace(
            self,
            r=2 * self.r,
            lora_alpha=factor * self.lora_alpha,
            rank_pattern={key: 2 * rank for key, rank in dict(self.rank_pattern).items()},
            alpha_pattern={key: factor * alpha for key, alpha in dict(self.alpha_pattern).items()},
            init_lora_weights=True,
            corda_config=None,
        )

    def _check_layers(self) -> None:
        for name in ("layers_to_transform", "layers_pattern"):
            _require(
                getattr(self, name) is None or not isinstance(self.target_modules, str),
                f"{name} needs target_modules as a list of names, found {self.target_modules!r}: say in the "
                "expression which layers it takes, or list the names",
            )
        _require(
            not self.layers_pattern or self.layers_to_transform is not None,
            "layers_pattern says nothing without layers_to_transform: pass the indices too",
        )
        _require(self.layers_to_transform != (), "layers_to_transform is empty: name a layer, or pass None for all")

    @property
    def scaling(self) -> float:
        """alpha / r, or alpha / sqrt(r) for rank-stabilised LoRA (arXiv:2312.03732), where no pattern says else."""
        return self._scaling(self.r, self.lora_alpha)

    def rank_of(self, module: str) -> int:
        """The rank of a module's adapter, if it gets one."""
        return int(_matching(self.rank_pattern, module, self.r))

    def scaling_of(self, module: str) -> float:
        """The factor of a module's adapter, of its own rank and alpha."""
        return self._scaling(self.rank_of(module), self.alpha_of(module))

    def alpha_of(self, module: str) -> float:
        """The alpha of a module's adapter."""
        return float(_matching(self.alpha_pattern, module, self.lora_alpha))

    def _scaling(self, rank: int, alpha: float) -> float:
        return alpha / (rank**0.5 if self.use_rslora else rank)


def _check_rank(what: str, rank: object) -> None:
    if not isinstance(rank, int) or isinstance(rank, bool):
        raise TypeError(f"{what} must be an integer, found {rank!r}")
    _require(rank > 0, f"{what} must be larger than 0, found {rank}")


def _check_expression(name: str, expression: str) -> None:
    try:
        re.compile(expression)
    except re.error as error:
        raise ValueError(f"{name}: {expression!r} is no regular expression ({error})") from error


def _matching(pattern, module: str, default):
    """The value of the first expression that matches the end of a module's path, PEFT's `get_pattern_key`."""
    return next((value for key, value in pattern if re.match(rf"(.*\.)?({key})$", module)), default)
