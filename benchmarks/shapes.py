"""Real models' shapes, as config.json fields, and models of random weights in them.

Shared by the benchmarks, so that each row says the same thing by the same name.
"""

from __future__ import annotations

import math
from typing import Any

CONFIGS = {
    "135m": dict(
        model_type="llama", vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
        num_attention_heads=9, num_key_value_heads=3, head_dim=64, max_position_embeddings=8192,
        tie_word_embeddings=True, rope_theta=100000.0, rms_norm_eps=1e-5,
    ),
    "1b": dict(
        model_type="llama", vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16,
        num_attention_heads=32, num_key_value_heads=8, head_dim=64, max_position_embeddings=131072,
        tie_word_embeddings=True, rope_theta=500000.0, rms_norm_eps=1e-5,
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
            return jax.jit(lambda keys: jax.lax.map(one, keys))(jax.random.split(key, value.codes.shape[0]))
        if "norm" in name:
            return jnp.ones(value.shape, value.dtype)
        rows, columns = math.prod(value.shape[:-1]), value.shape[-1]
        parts = math.gcd(rows, 64)
        one = lambda key: drawn(key, rows // parts, columns)
        return jax.jit(lambda keys: jax.lax.map(one, keys).reshape(value.shape))(jax.random.split(key, parts))

    for i, (path, variable) in enumerate(nnx.to_flat_state(state)):
        variable.set_value(fill(jax.random.key(i), ".".join(map(str, path)), variable.get_value()))
    return nnx.merge(graphdef, state)
