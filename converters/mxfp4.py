"""mxfp4 checkpoints (gpt-oss): experts in 4-bit floats, dequantised as they are read.

The OCP Microscaling formats, section 5.3: 32 consecutive elements of a row share a power of two, 2^(s - 127), and each
is one of the 16 values of `E2M1`, two to a byte with the earlier in the low nibble. A weight X [experts, in, out] of
the unquantised checkpoint is stored by rows of its transpose, as

    X_blocks  uint8 [experts, out, in / 32, 16]         X_scales  uint8 [experts, out, in / 32]

bfloat16 holds every value exactly. The rest of such a checkpoint is not quantised.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jaxtyping import Array, Float, UInt8

from jaxlora.converters.huggingface import CheckpointError, TensorSource
from jaxlora.quant import QuantizedArray

E2M1 = np.array([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], np.float32)
E2M1 = np.concatenate([E2M1, -E2M1])


@jax.jit
def dequantize_mxfp4(
    blocks: UInt8[Array, "experts rows groups 16"], scales: UInt8[Array, "experts rows groups"]
) -> Float[Array, "experts columns rows"]:
    """Codes and exponents of matrices by rows -> the transposed matrices, bfloat16."""

    def one(expert):
        blocks, scales = expert
        nibbles = jnp.stack([blocks & 15, blocks >> 4], axis=-1).astype(jnp.int32)  # [rows, groups, 16, 2]
        # A float32's bits with this exponent and no fraction are the power of two.
        power = jax.lax.bitcast_convert_type(scales.astype(jnp.int32) << 23, jnp.float32)
        values = jnp.asarray(E2M1)[nibbles] * power[..., None, None]
        return values.reshape(blocks.shape[0], -1).T.astype(jnp.bfloat16)

    return jax.lax.map(one, (blocks, scales))  # an expert at a time, for the memory of what stands between


class Mxfp4Source:
    """The tensors of an mxfp4 checkpoint under the names of the unquantised one: a `TensorSource`.

    Raises:
        CheckpointError: blocks without scales or the other way round, or of shapes that do not fit each other.
    """

    def __init__(self, source: TensorSource):
        self._source = source
        stored = {name.removesuffix("_blocks") for name in source.names() if name.endswith("_blocks")}
        scales = {name.removesuffix("_scales") for name in source.names() if name.endswith("_scales")}
        for name in sorted(stored ^ scales):
            there, missing = ("blocks", "scales") if name in stored else ("scales", "blocks")
            raise CheckpointError(f"{name}_{there} is there and {name}_{missing} is not: download the checkpoint again")
        self._quantised = stored
        for name in stored:
            blocks, scale = source.shape(f"{name}_blocks"), source.shape(f"{name}_scales")
            if len(blocks) != 4 or blocks[3] != 16 or blocks[:3] != scale:
                raise CheckpointError(
                    f"{name}_blocks is {list(blocks)} and {name}_scales {list(scale)}, expected [experts, rows, "
                    "groups, 16] and [experts, rows, groups]: this is not mxfp4 as gpt-oss has it"
                )

    def names(self) -> list[str]:
        names = (name.removesuffix("_blocks").removesuffix("_scales") for name in self._source.names())
        return list(dict.fromkeys(names))

    def shape(self, name: str) -> tuple[int, ...]:
        if name not in self._quantised:
            return self._source.shape(name)
        experts, rows, groups, _ = self._source.shape(f"{name}_blocks")
        return experts, 32 * groups, rows

    def dtype(self, name: str) -> np.dtype:
        return np.dtype(ml_dtypes.bfloat16) if name in self._quantised else self._source.dtype(name)

    def read(self, name: str) -> np.ndarray | jax.Array | QuantizedArray:
        if name not in self._quantised:
            return self._source.read(name)
        blocks, scales = (jnp.asarray(self._source.read(f"{name}_{part}")) for part in ("blocks", "scales"))
        return dequantize_mxfp4(blocks, scales)


def is_mxfp4(hf_config: Mapping[str, Any]) -> bool:
    """Whether a config.json says that its checkpoint is one."""
    return (hf_config.get("quantization_config") or {}).get("quant_method") == "mxfp4"
