"""4-bit checkpoints of transformers and bitsandbytes, read and written without either.

Where a weight X of such a checkpoint is quantised, its tensors are

    X                               uint8, two codes a byte; in whatever shape and dtype the bytes were put
    X.absmax                        float32, or uint8 with double quantisation
    X.quant_map                     float32 [16], the NF4 table
    X.nested_absmax, X.nested_quant_map                 float32, with double quantisation only
    X.quant_state.bitsandbytes__nf4                     the bytes of a JSON object: shape, dtype, block sizes, offset

`QuantizedArray` has the same fields, so codes and statistics are used as they are stored: nothing is quantised anew.
"""

from __future__ import annotations

import fnmatch
import json
import math
import re
from collections.abc import Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from jaxlora import quant
from jaxlora.config import QuantConfig
from jaxlora.converters.huggingface import CheckpointError, TensorSource
from jaxlora.kernels.reference import ABSMAX_BLOCK, DYNAMIC_MAP, NF4, NF4_BLOCK
from jaxlora.quant import QuantizedArray

_STATE = re.compile(r"(.+)\.quant_state\.bitsandbytes__(\w+)")
_PLAIN_PARTS = ("absmax", "quant_map")
_NESTED_PARTS = ("nested_absmax", "nested_quant_map")
_STATE_PART = "quant_state.bitsandbytes__nf4"
_DTYPES = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}


class BitsandbytesSource:
    """The tensors of a 4-bit checkpoint under the names of the unquantised one: a `TensorSource`.

    The projections of the blocks are read as `QuantizedArray`s, with the stored codes and statistics. Any other
    quantised weight (a head, say) is read dequantised, which is exact; the rest as it is.

    Args:
        source: the checkpoint's tensors as they are stored.
        quantization_config: of its config.json.

    Raises:
        CheckpointError: a quantisation other than NF4 in blocks of 64, parts of a quantised weight that are missing or
            do not fit each other.
        NotImplementedError: some projections of the blocks are quantised and others are not.
    """

    def __init__(self, source: TensorSource, quantization_config: Mapping[str, Any]):
        self._source = source
        self._config = _check_config(quantization_config)
        stored = source.names()
        self._states = {}
        parts = set()
        for name in stored:
            if match := _STATE.fullmatch(name):
                weight, kind = match.groups()
                if kind != "nf4":
                    raise CheckpointError(f"{weight} is stored as {kind}; supported is nf4: quantise the model again")
                self._states[weight] = _read_state(source, name)
                parts.update({name, *(f"{weight}.{part}" for part in _PLAIN_PARTS + _NESTED_PARTS)})
        self._names = [name for name in stored if name not in parts]
        self._check_parts()
        self._check_blocks()

    def quant_config(self) -> QuantConfig:
        """How the weights of the blocks are stored."""
        return self._config

    def names(self) -> list[str]:
        """The names of the weights, without those of their statistics."""
        return list(self._names)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape before quantisation: [out, in] for a linear weight."""
        return tuple(self._states[name]["shape"]) if name in self._states else self._source.shape(name)

    def dtype(self, name: str) -> np.dtype:
        """The dtype before quantisation."""
        return _DTYPES[self._states[name]["dtype"]] if name in self._states else self._source.dtype(name)

    def read(self, name: str) -> np.ndarray | QuantizedArray:
        """One weight; see the class."""
        if name not in self._states:
            return self._source.read(name)
        array = self._read_quantised(name)
        return array if _is_in_block(name) else np.asarray(quant.dequantize(jax.tree.map(jnp.asarray, array)))

    def _read_quantised(self, name: str) -> QuantizedArray:
        state, (rows, columns) = self._states[name], self.shape(name)
        codes, absmax = self._source.read(name).reshape(-1).view(np.uint8), self._source.read(f"{name}.absmax")
        if columns % NF4_BLOCK == 0:
            codes, absmax = codes.reshape(rows, -1), absmax.reshape(rows, -1)
        nested_absmax = nested_offset = None
        if self._config.double_quant:
            nested_absmax = self._source.read(f"{name}.nested_absmax")
            nested_offset = np.asarray(state["nested_offset"], np.float32)
        return QuantizedArray(codes, absmax, nested_absmax, nested_offset, (rows, columns), self.dtype(name), "nf4")

    def _check_parts(self) -> None:
        """Compare every part of every quantised weight with what its shape demands, and the tables with ours."""
        nested = self._config.double_quant
        stored, problems = set(self._source.names()), []
        for weight, state in self._states.items():
            count = math.prod(state["shape"])
            blocks = -(-count // NF4_BLOCK)
            expected = {
                weight: (-(-count // 2), None),
                f"{weight}.absmax": (blocks * (1 if nested else 4), np.uint8 if nested else np.float32),
                f"{weight}.quant_map": (NF4.nbytes, np.float32),
            }
            if nested:
                expected[f"{weight}.nested_absmax"] = (-(-blocks // ABSMAX_BLOCK) * 4, np.float32)
                expected[f"{weight}.nested_quant_map"] = (DYNAMIC_MAP.nbytes, np.float32)
            for part, (size, dtype) in expected.items():
                if part not in stored:
                    problems.append(f"{part} is missing")
                    continue
                found = self._source.dtype(part)
                size_found = found.itemsize * math.prod(self._source.shape(part))
                if size_found != size or (dtype is not None and found != dtype):
                    problems.append(f"{part} is {size_found} bytes of {found}, expected {size} of {np.dtype(dtype)}")
                elif part.endswith("quant_map"):
                    # Made anew wherever a model is quantised, so that the last bit differs from machine to machine.
                    table = DYNAMIC_MAP if part.endswith("nested_quant_map") else NF4
                    if not np.allclose(self._source.read(part), table, rtol=0, atol=1e-6):
                        problems.append(f"{part} is not the standard table of bitsandbytes")
            if nested != ("nested_offset" in state):
                problems.append(f"{weight} is {'not ' if nested else ''}doubly quantised, against config.json")
        if problems:
            raise CheckpointError(
                f"the 4-bit checkpoint is broken: {'; '.join(problems[:8])}{' …' if len(problems) > 8 else ''}. "
                "Download it again, or quantise the model again"
            )

    def _check_blocks(self) -> None:
        plain = [n for n in self._names if n not in self._states and _is_in_block(n) and len(self.shape(n)) > 1]
        if plain:
            # To quantise them here would change what the checkpoint computes; the layers of a stack are all of a kind.
            raise NotImplementedError(
                f"the 4-bit checkpoint leaves {len(plain)} projections unquantised ({', '.join(plain[:4])}, …), and "
                "this version wants whole blocks quantised: load the 16-bit model with load_in_4bit=True instead"
            )


# ---- Writing ---------------------------------------------------------------------------------------------------------


_quantize = jax.jit(quant.quantize)  # one program for each shape of weight


class QuantizingSource:
    """The tensors of a 4-bit checkpoint of another source's weights: a `TensorSource` of what is stored.

    `quantised` are the names of the weights that are quantised, [out, in], from the dtype that they have; the rest is
    as it is. One quantised weight is held at a time, while its parts are read one after the other.
    """

    def __init__(self, source: TensorSource, quantised: Collection[str]):
        self._source = source
        self._held: tuple[str, QuantizedArray | None] = ("", None)
        self._parts: dict[str, tuple[str, str]] = {}
        for name in source.names():
            self._parts[name] = name, "codes" if name in quantised else ""
            if name in quantised:
                self._parts |= {f"{name}.{part}": (name, part) for part in (*_PLAIN_PARTS, *_NESTED_PARTS, _STATE_PART)}

    def names(self) -> list[str]:
        return list(self._parts)

    def shape(self, name: str) -> tuple[int, ...]:
        weight, part = self._parts[name]
        if not part:
            return self._source.shape(name)
        count = math.prod(self._source.shape(weight))
        blocks = -(-count // NF4_BLOCK)
        return {
            "codes": (-(-count // 2), 1),
            "absmax": (blocks,),
            "nested_absmax": (-(-blocks // ABSMAX_BLOCK),),
            "quant_map": NF4.shape,
            "nested_quant_map": DYNAMIC_MAP.shape,
            _STATE_PART: (len(self._state(weight, 0.0)),),
        }[part]

    def dtype(self, name: str) -> np.dtype:
        _, part = self._parts[name]
        if not part:
            return self._source.dtype(name)
        return np.dtype(np.uint8 if part in ("codes", "absmax", _STATE_PART) else np.float32)

    def read(self, name: str) -> np.ndarray:
        weight, part = self._parts[name]
        if part in ("quant_map", "nested_quant_map"):
            return np.asarray(NF4 if part == "quant_map" else DYNAMIC_MAP)
        if not part:
            return np.asarray(self._source.read(name))
        held, array = self._held
        if held != weight or array is None:
            array = _quantize(self._source.read(weight))
            self._held = weight, array
        if part == _STATE_PART:
            return np.frombuffer(self._state(weight, float(array.nested_offset)), np.uint8)
        fields = {"codes": array.codes, "absmax": array.scales, "nested_absmax": array.nested_absmax}
        return np.asarray(fields[part]).reshape(self.shape(name))

    def _state(self, weight: str, offset: float) -> bytes:
        """bitsandbytes' JSON, filled up to one length for every offset, so that sizes are known before quantising."""
        state = {
            "quant_type": "nf4",
            "blocksize": NF4_BLOCK,
            "dtype": self._source.dtype(weight).name,
            "shape": list(self._source.shape(weight)),
            "nested_blocksize": ABSMAX_BLOCK,
            "nested_dtype": "float32",
            "nested_offset": offset,
        }
        number = len(repr(offset))
        return json.dumps(state).encode() + b" " * (32 - number)


def quantization_config(compute_dtype: str, skipped: Collection[str]) -> dict[str, Any]:
    """What config.json says of such a checkpoint. skipped: names of the linear layers that are not quantised."""
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_compute_dtype": compute_dtype,
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": sorted(skipped),
        "llm_int8_threshold": 6.0,
    }


# Where a model of ours is never quantised, whatever the file is: see `layers.PlainLinear` and the mixers.
_PLAIN = (
    "*.gate.weight", "*.router.weight", "*.router.*.weight", "*.shared_expert_gate.weight", "*.mamba.*",
    "*.in_proj_a.weight", "*.in_proj_b.weight", "*.conv1d.weight",
)  # fmt: skip
# A block of the language model, with images beside it or not.
_BLOCK = re.compile(r"(model\.|language_model\.)+layers\.")


def stays_plain(name: str) -> bool:
    """Whether this is the name of a tensor of a block that a model of ours never quantises."""
    return any(fnmatch.fnmatch(name, pattern) for pattern in _PLAIN)


def _is_in_block(name: str) -> bool:
    """Whether this is the name of something in a block that a model of ours quantises, if it is a matrix."""
    return _BLOCK.match(name) is not None and not stays_plain(name)


def _check_config(config: Mapping[str, Any]) -> QuantConfig:
    method = config.get("quant_method", "bitsandbytes")
    if method != "bitsandbytes":
        raise CheckpointError(
            f"config.json: quant_method is {method!r}; supported is 'bitsandbytes' (NF4): load the unquantised model "
            "instead"
        )
    four_bit = config.get("load_in_4bit", config.get("_load_in_4bit", False))
    kind = config.get("bnb_4bit_quant_type", "fp4")  # transformers' default
    if not four_bit or kind != "nf4":
        found = f"4-bit of type {kind!r}" if four_bit else "8-bit"
        raise CheckpointError(
            f"config.json: quantization_config is {found}; supported is 4-bit of type 'nf4': load the unquantised "
            "model instead"
        )
    return QuantConfig(scheme="nf4", double_quant=bool(config.get("bnb_4bit_use_double_quant", False)))


def _read_state(source: TensorSource, name: str) -> dict[str, Any]:
    try:
        state = json.loads(np.asarray(source.read(name)).tobytes())
    except ValueError as error:
        raise CheckpointError(f"{name} is not JSON ({error}): download the checkpoint again") from error
    expected = {"quant_type": "nf4", "blocksize": NF4_BLOCK}
    if "nested_offset" in state:
        expected["nested_blocksize"] = ABSMAX_BLOCK
    wrong = {key: state.get(key) for key, value in expected.items() if state.get(key) != value}
    if wrong or state.get("dtype") not in _DTYPES or len(state.get("shape") or ()) != 2:
        raise CheckpointError(
            f"{name} says {state}; supported is {expected} with a dtype of {', '.join(_DTYPES)} and a shape [out, in]: "
            "load the unquantised model instead"
        )
    return state
