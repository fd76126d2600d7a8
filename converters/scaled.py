"""8-bit checkpoints of transformers: weights whose codes have one tensor of scales beside them.

Where a weight X.weight [out, in] of such a checkpoint is quantised, its tensors are

    bitsandbytes int8       X.weight int8,            X.SCB float32 [out], and X.weight_format, a number, 0 for rows
    fbgemm_fp8              X.weight float8_e4m3fn,   X.weight_scale float32 [out, 1]
    fp8, fine-grained       X.weight float8_e4m3fn,   X.weight_scale_inv float32 [ceil(out / 128), ceil(in / 128)]

`QuantizedArray` has the same codes and scales, so nothing is quantised anew. The scales of activations, which fp8
checkpoints may also hold, are not used: the products here are of dequantised weights.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from jaxlora import quant
from jaxlora.config import QuantConfig, QuantScheme
from jaxlora.converters.huggingface import CheckpointError, SafetensorsSource
from jaxlora.quant import FP8_BLOCK, QuantizedArray


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Format:
    """suffix: of the scales' name, in place of "weight"; unused: suffixes of tensors that are left alone."""

    scheme: QuantScheme
    codes: np.dtype
    suffix: str
    unused: tuple[str, ...] = ()

    def scales_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        rows, columns = shape
        return (-(-rows // FP8_BLOCK), -(-columns // FP8_BLOCK)) if self.scheme == "fp8_block" else (rows, 1)


_E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
_FORMATS = {
    "bitsandbytes": _Format(scheme="int8", codes=np.dtype(np.int8), suffix="SCB", unused=("weight_format",)),
    "fbgemm_fp8": _Format(scheme="fp8", codes=_E4M3, suffix="weight_scale", unused=("input_scale_ub",)),
    "fp8": _Format(
        scheme="fp8_block", codes=_E4M3, suffix="weight_scale_inv", unused=("activation_scale", "input_scale")
    ),
}


class ScaledSource:
    """The tensors of an 8-bit checkpoint under the names of the unquantised one: a `TensorSource`.

    The projections of the blocks are read as `QuantizedArray`s, with the stored codes and scales. Any other quantised
    weight (a head, say) is read dequantised, in float32; the rest as it is.

    Args:
        source: the checkpoint's tensors as they are stored.
        quantization_config: of its config.json; `quant_method` is one of the head of this module.

    Raises:
        CheckpointError: another quantisation, or codes and scales that are missing or do not fit each other.
        NotImplementedError: some projections of the blocks are quantised and others are not.
    """

    def __init__(self, source: SafetensorsSource, quantization_config: Mapping[str, Any]):
        self._source, self._format = source, _check_config(quantization_config)
        stored = source.names()
        ends = ("." + self._format.suffix, *("." + unused for unused in self._format.unused))
        self._names = [name for name in stored if not name.endswith(ends)]
        self._quantised = {name for name in self._names if source.dtype(name) == self._format.codes}
        self._check_parts()

    def quant_config(self) -> QuantConfig:
        """How the weights of the blocks are stored."""
        return QuantConfig(scheme=self._format.scheme)

    def names(self) -> list[str]:
        """The names of the weights, without those of their scales."""
        return list(self._names)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._source.shape(name)

    def dtype(self, name: str) -> np.dtype:
        """As stored; that of a quantised weight is float32."""
        return np.dtype(np.float32) if name in self._quantised else self._source.dtype(name)

    def read(self, name: str) -> np.ndarray | QuantizedArray:
        """One weight; see the class."""
        codes = self._source.read(name)
        if name not in self._quantised:
            return codes
        rows, columns = codes.shape
        scales = np.asarray(self._source.read(self._scales(name)), np.float32).reshape(
            self._format.scales_shape(codes.shape)
        )
        array = QuantizedArray(codes, scales, None, None, (rows, columns), self.dtype(name), self._format.scheme)
        return array if _is_in_block(name) else np.asarray(quant.dequantize(jax.tree.map(jnp.asarray, array)))

    def _scales(self, name: str) -> str:
        return name.removesuffix("weight") + self._format.suffix

    def _check_parts(self) -> None:
        stored, problems = set(self._source.names()), []
        for name in sorted(self._quantised):
            scales, shape = self._scales(name), self._source.shape(name)
            if not name.endswith(".weight") or len(shape) != 2:
                problems.append(f"{name} is {self._format.codes} {list(shape)}, and only linear weights can be")
            elif scales not in stored:
                problems.append(f"{scales} is missing")
            else:
                expected, found = self._format.scales_shape(shape), self._source.shape(scales)
                vector = expected[:1] if expected[1:] == (1,) else expected
                if tuple(found) not in (expected, vector) or self._source.dtype(scales) not in _SCALE_DTYPES:
                    problems.append(
                        f"{scales} is {self._source.dtype(scales)} {list(found)}, expected float32 {list(expected)}"
                    )
            layout = f"{name.removesuffix('weight')}weight_format"
            if layout in stored and np.any(self._source.read(layout)):
                problems.append(f"{layout} is not 0: the codes are not in rows")
        if problems:
            raise CheckpointError(
                f"the 8-bit checkpoint is broken: {'; '.join(problems[:8])}{' …' if len(problems) > 8 else ''}. "
                "Download it again, or quantise the model again"
            )
        plain = [
            n for n in self._names if n not in self._quantised and _is_in_block(n) and len(self._source.shape(n)) == 2
        ]
        if plain:
            raise NotImplementedError(
                f"the 8-bit checkpoint leaves {len(plain)} projections unquantised ({', '.join(plain[:4])}, …), and "
                "this version wants whole blocks quantised: load the 16-bit model with load_in_8bit=True or "
                "load_in_fp8=True instead"
            )


_SCALE_DTYPES = (np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16))


def _is_in_block(name: str) -> bool:
    return name.startswith("model.layers.")


def _check_config(config: Mapping[str, Any]) -> _Format:
    method = config.get("quant_method", "bitsandbytes")
    if method not in _FORMATS:
        raise CheckpointError(
            f"config.json: quant_method is {method!r}; supported are {', '.join(map(repr, _FORMATS))}: load the "
            "unquantised model instead"
        )
    block = config.get("weight_block_size", [FP8_BLOCK, FP8_BLOCK])
    if method == "fp8" and list(block or []) != [FP8_BLOCK, FP8_BLOCK]:
        raise CheckpointError(
            f"config.json: weight_block_size is {block}; supported is [{FP8_BLOCK}, {FP8_BLOCK}]: load the unquantised "
            "model instead"
        )
    return _FORMATS[method]
