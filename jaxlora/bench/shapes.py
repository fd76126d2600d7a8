"""Real models' shapes, as config.json fields; what a step of them must compute; and models of random weights in them.

Shared by everything that is measured, so that each row says the same thing by the same name.

FLOP of a token, which is what model FLOPs utilisation (arXiv:2204.02311, appendix B) counts:

    4 W + 6 A + 6 L Q T

W: frozen weights of the linears that a token goes through, the head with them and of experts those that it is given
to: 2 in the forward pass and 2 for the gradient of the input, for the weights have none. A: adapters' weights, 2 more
for their own gradient. L Q T: two products of the attention of L layers, T keys to a query of Q numbers and on average
half of them seen (in a window of w the last w, which is w (1 - w / 2 T) on average), forward and twice that backward.
What a checkpointing policy computes again is not counted, so that one that recomputes less uses the device better. Nor
is what Mamba and linear attention do between their linears.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

CONFIGS = {
    "tiny": dict(
        model_type="llama", vocab_size=512, hidden_size=128, intermediate_size=256, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=32, max_position_embeddings=8192,
        tie_word_embeddings=False, rope_theta=500000.0, rms_norm_eps=1e-5,
    ),
    "135m": dict(
        model_type="llama", vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
        num_attention_heads=9, num_key_value_heads=3, head_dim=64, max_position_embeddings=8192,
        tie_word_embeddings=True, rope_theta=100000.0, rms_norm_eps=1e-5,
    ),
    "falcon-h1-7b": dict(
        model_type="falcon_h1", vocab_size=130048, hidden_size=3072, intermediate_size=12288, num_hidden_layers=44,
        num_attention_heads=12, num_key_value_heads=2, head_dim=128, mamba_d_ssm=3072, mamba_n_heads=24,
        mamba_d_head=128, mamba_d_state=256, mamba_n_groups=1, mamba_chunk_size=256, mamba_d_conv=4,
        mamba_rms_norm=False, attention_bias=False, max_position_embeddings=262144, tie_word_embeddings=False,
        rope_theta=1e11, rms_norm_eps=1e-5,
    ),
    "gpt-oss-20b": dict(
        model_type="gpt_oss", vocab_size=201088, hidden_size=2880, intermediate_size=2880, num_local_experts=32,
        num_experts_per_tok=4, num_hidden_layers=24, num_attention_heads=64, num_key_value_heads=8, head_dim=64,
        sliding_window=128, layer_types=["sliding_attention", "full_attention"] * 12, attention_bias=True,
        swiglu_limit=7.0, max_position_embeddings=131072, tie_word_embeddings=False, rope_theta=150000.0,
        rope_scaling=dict(
            rope_type="yarn", factor=32.0, beta_fast=32.0, beta_slow=1.0, original_max_position_embeddings=4096,
            truncate=False,
        ), rms_norm_eps=1e-5,
    ),
    "qwen3-30b-a3b": dict(
        model_type="qwen3_moe", vocab_size=151936, hidden_size=2048, intermediate_size=6144, moe_intermediate_size=768,
        num_experts=128, num_experts_per_tok=8, norm_topk_prob=True, num_hidden_layers=48, num_attention_heads=32,
        num_key_value_heads=4, head_dim=128, max_position_embeddings=40960, tie_word_embeddings=False,
        rope_theta=1000000.0, rms_norm_eps=1e-6,
    ),
    # The language model. Fields are the defaults of transformers' `Qwen3_5TextConfig`, positions and rope_theta are of
    # pages about the model: its config.json was not read.
    "qwen3.5-9b": dict(
        model_type="qwen3_5_text", vocab_size=248320, hidden_size=4096, intermediate_size=12288, num_hidden_layers=32,
        num_attention_heads=16, num_key_value_heads=4, head_dim=256, linear_num_key_heads=16, linear_num_value_heads=32,
        linear_key_head_dim=128, linear_value_head_dim=128, linear_conv_kernel_dim=4,
        layer_types=["linear_attention", "linear_attention", "linear_attention", "full_attention"] * 8,
        attention_bias=False, max_position_embeddings=262144, tie_word_embeddings=False, rope_theta=1e7,
        partial_rotary_factor=0.25, rms_norm_eps=1e-6,
    ),
    "1b": dict(
        model_type="llama", vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16,
        num_attention_heads=32, num_key_value_heads=8, head_dim=64, max_position_embeddings=131072,
        tie_word_embeddings=True, rope_theta=500000.0, rms_norm_eps=1e-5,
    ),
    "7b": dict(  # Qwen2.5-7B: biases on queries, keys and values
        model_type="qwen2", vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_hidden_layers=28,
        num_attention_heads=28, num_key_value_heads=4, head_dim=128, max_position_embeddings=32768,
        tie_word_embeddings=False, rope_theta=1000000.0, rms_norm_eps=1e-6,
    ),
    "8b": dict(
        model_type="llama", vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=8, head_dim=128, max_position_embeddings=131072,
        tie_word_embeddings=False, rope_theta=500000.0, rms_norm_eps=1e-5,
    ),
    "70b": dict(
        model_type="llama", vocab_size=128256, hidden_size=8192, intermediate_size=28672, num_hidden_layers=80,
        num_attention_heads=64, num_key_value_heads=8, head_dim=128, max_position_embeddings=131072,
        tie_word_embeddings=False, rope_theta=500000.0, rms_norm_eps=1e-5,
    ),
}  # fmt: skip


# Shapes that need no GPU.
SMALL = ("tiny", "135m")
# Rank and alpha of the adapters, on the seven linears of every layer.
RANK, ALPHA = 16, 16


@dataclasses.dataclass(frozen=True)
class Work:
    """A step to measure: a key of `CONFIGS`, and so many rows of so many tokens. Its name is "8b-4x2048"."""

    shape: str
    batch: int
    sequence: int

    @classmethod
    def parse(cls, name: str) -> Work:
        """The work of a name.

        Raises:
            ValueError: there is no such shape, or the name is none.
        """
        shape, _, size = name.rpartition("-")
        batch, _, sequence = size.partition("x")
        if not (batch.isdecimal() and sequence.isdecimal() and int(batch) and int(sequence) > 1):
            raise ValueError(f"work {name!r} is not SHAPE-BATCHxTOKENS, such as 8b-4x2048")
        if shape not in CONFIGS:
            raise ValueError(f"work {name!r}: there is no shape {shape!r}; there are {', '.join(CONFIGS)}")
        return cls(shape, int(batch), int(sequence))

    @property
    def name(self) -> str:
        return f"{self.shape}-{self.batch}x{self.sequence}"

    @property
    def tokens(self) -> int:
        """Tokens of a step."""
        return self.batch * self.sequence

    def flop_per_token(self) -> int:
        """See the head of this module."""
        c: dict[str, Any] = CONFIGS[self.shape]
        q, kinds = c["num_attention_heads"] * c["head_dim"], kinds_of(self.shape)
        adapters = sum(RANK * (rows + columns) for kind in kinds for rows, columns in linears_of(self.shape, kind))
        whole, windowed = (kinds.count(f"{kind}_attention") for kind in ("full", "sliding"))
        seen, window = self.sequence, min(c.get("sliding_window", 0), self.sequence)
        keys = whole * seen + windowed * (2 * window - window**2 // seen)  # twice what is seen on average
        return 4 * weights_of(self.shape) + 6 * adapters + 6 * q * keys


def kinds_of(shape: str) -> list[str]:
    """What each layer attends by, in the words of `layer_types`."""
    c: dict[str, Any] = CONFIGS[shape]
    return c.get("layer_types") or ["full_attention"] * c["num_hidden_layers"]


def linears_of(shape: str, kind: str) -> list[tuple[int, int]]:
    """(in, out) of the linear layers of a layer of a kind, those that get an adapter."""
    c: dict[str, Any] = CONFIGS[shape]
    d, f = c["hidden_size"], c["intermediate_size"]
    mlp = [] if "num_experts_per_tok" in c else [(d, f), (d, f), (f, d)]
    if kind == "linear_attention":  # queries, keys and values; the gate; steps and decays
        keys, values = (c[f"linear_num_{of}_heads"] * c[f"linear_{of}_head_dim"] for of in ("key", "value"))
        heads = c["linear_num_value_heads"]
        return [(d, 2 * keys + values), (d, values), (d, heads), (d, heads), (values, d), *mlp]
    q, k = (c[heads] * c["head_dim"] for heads in ("num_attention_heads", "num_key_value_heads"))
    gated = c["model_type"] == "qwen3_5_text"  # q_proj makes a gate beside each query
    mixer = []
    if "mamba_d_ssm" in c:  # gate and x, B and C, and a step a head
        states = 2 * c["mamba_n_groups"] * c["mamba_d_state"]
        mixer = [(d, 2 * c["mamba_d_ssm"] + states + c["mamba_n_heads"])]
    return [(d, 2 * q if gated else q), (d, k), (d, k), (q, d), *mlp, *mixer]


def weights_of(shape: str) -> int:
    """Elements of the matrices that a token is multiplied by, the head's with them."""
    c: dict[str, Any] = CONFIGS[shape]
    d = c["hidden_size"]
    linears = sum(a * b for kind in kinds_of(shape) for a, b in linears_of(shape, kind))
    others = 0
    if "num_experts_per_tok" in c:
        experts, inner = (
            c.get("num_experts") or c["num_local_experts"],
            c.get("moe_intermediate_size", c["intermediate_size"]),
        )
        others += d * experts + 3 * c["num_experts_per_tok"] * d * inner
    if "mamba_d_ssm" in c:
        others += c["mamba_d_ssm"] * d
    return linears + c["num_hidden_layers"] * others + d * c["vocab_size"]


def random_model(shape: str, quant_config: Any, dtype: Any) -> Any:
    """A model of random weights, drawn and quantised on the device, of each stack one layer at a time.

    Normal, of a standard deviation of 0.02; norms are 1. Never more than a layer's matrix exists in float32, so the
    peak of the device's memory is still that of what is measured.
    """
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from jaxlora import quant
    from jaxlora.converters.huggingface import model_config
    from jaxlora.model import CausalLM

    config = model_config(CONFIGS[shape])
    abstract = nnx.eval_shape(lambda: CausalLM(config, dtype=dtype, quant_config=quant_config, rngs=nnx.Rngs(0)))
    graphdef, state = nnx.split(abstract)

    def drawn(key, rows, columns):
        return (0.02 * jax.random.normal(key, (rows, columns), jnp.float32)).astype(dtype)

    def fill(key, name, value):
        if isinstance(value, quant.QuantizedArray):
            one = lambda key: quant.quantize(drawn(key, *value.shape), scheme=value.scheme, dtype=dtype)
            for _ in value.leading:
                one = functools.partial(jax.lax.map, one)
            return jax.jit(one)(jax.random.split(key, value.leading))
        if "norm" in name:
            return jnp.ones(value.shape, value.dtype)
        rows, columns = math.prod(value.shape[:-1]), value.shape[-1]
        parts = math.gcd(rows, 64)
        one = lambda key: drawn(key, rows // parts, columns)
        return jax.jit(lambda keys: jax.lax.map(one, keys).reshape(value.shape))(jax.random.split(key, parts))

    for i, (path, variable) in enumerate(nnx.to_flat_state(state)):
        variable.set_value(fill(jax.random.key(i), ".".join(map(str, path)), variable.get_value()))
    return nnx.merge(graphdef, state)
