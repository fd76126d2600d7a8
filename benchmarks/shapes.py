"""Real models' shapes, as config.json fields, and a checkpoint of random weights in them that needs no disk.

Shared by the benchmarks, so that each row says the same thing by the same name.
"""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np

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


class RandomSource:
    """A `TensorSource` of bfloat16 normal weights (standard deviation 0.02; norms are 1), each a slice of one pool.

    Every tensor starts at another place of the pool, so that no two layers are alike, and none is made anew.
    """

    def __init__(self, shapes: dict[str, tuple[int, ...]], seed: int = 0):
        self._shapes = shapes
        largest = max(math.prod(shape) for shape in shapes.values())
        draws = np.random.default_rng(seed).standard_normal(2**24, dtype=np.float32) * 0.02
        self._pool = np.resize(draws.astype(ml_dtypes.bfloat16), largest + 2**20)
        self._starts = {name: i * 4099 % 2**20 for i, name in enumerate(shapes)}

    def names(self) -> list[str]:
        return list(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def dtype(self, name: str) -> np.dtype:
        return np.dtype(ml_dtypes.bfloat16)

    def read(self, name: str) -> np.ndarray:
        shape = self._shapes[name]
        if len(shape) == 1:
            return np.ones(shape, ml_dtypes.bfloat16)
        start = self._starts[name]
        return self._pool[start : start + math.prod(shape)].reshape(shape)
