"""Hugging Face checkpoints: safetensors -> model, one tensor at a time (config.json is read in `families`).

A tensor's expected shape comes from the abstract model, so a checkpoint that does not fit is reported whole (missing,
unexpected and misshapen tensors in one error) before anything is read.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import functools
import json
import math
import mmap
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import nnx

from jaxlora import quant
from jaxlora.config import ModelConfig, QuantConfig
from jaxlora.converters.families import FAMILIES, CheckpointError, model_config
from jaxlora.converters.read_ahead import IN_FLIGHT, ReadAhead
from jaxlora.model import CausalLM, Named, named_nodes
from jaxlora.quant import QuantizedArray

Model = TypeVar("Model", bound=CausalLM)


@runtime_checkable
class TensorSource(Protocol):
    """Tensors by their Hugging Face names, in Hugging Face's orientation, read one at a time."""

    def names(self) -> list[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def dtype(self, name: str) -> np.dtype: ...

    def read(self, name: str) -> np.ndarray | jax.Array | QuantizedArray: ...


SAFETENSORS_DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}


@dataclasses.dataclass(frozen=True)
class _Entry:
    file: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    start: int


class SafetensorsFile:
    """The tensors of one .safetensors file, as views of a memory map: reading costs page cache, no heap.

    The `safetensors` package gives no bfloat16 to numpy, hence a reader of the format's few lines: eight bytes of
    header length, a JSON header, the bytes.

    Raises:
        CheckpointError: the file is cut short, or is no safetensors file.
    """

    def __init__(self, path: Path):
        self.path = path
        size = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            length = int.from_bytes(prefix, "little")
            if len(prefix) < 8 or length > size - 8:
                raise CheckpointError(
                    f"{path}: not a whole safetensors file ({size:,} bytes, header said to be {length:,}): "
                    "download or copy it again"
                )
            try:
                header = json.loads(file.read(length))
                self.metadata: dict[str, str] = header.pop("__metadata__", {})
                tensors = [(n, t["dtype"], tuple(t["shape"]), *t["data_offsets"]) for n, t in header.items()]
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise CheckpointError(
                    f"{path}: its safetensors header cannot be read ({error!r}): download or copy it again"
                ) from error
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self.header_length = 8 + length
        self.entries: dict[str, _Entry] = {}
        for name, stored, shape, start, end in tensors:
            dtype = SAFETENSORS_DTYPES.get(stored)
            if dtype is None:
                raise CheckpointError(f"{path}: tensor {name} has dtype {stored}, which is not supported")
            if self.header_length + end > size:
                raise CheckpointError(
                    f"{path}: truncated: tensor {name} ends at byte {self.header_length + end:,}, the file at "
                    f"{size:,}: download or copy it again"
                )
            if end - start != dtype.itemsize * math.prod(shape):
                raise CheckpointError(f"{path}: tensor {name} of shape {shape} and {dtype} does not fill its bytes")
            self.entries[name] = _Entry(path, dtype, shape, self.header_length + start)

    def read(self, name: str) -> np.ndarray:
        """The tensor as a read-only view of the file. The disk starts on all of it: left to page faults, it reads a few
        pages at a time, a quarter as fast."""
        entry = self.entries[name]
        count = math.prod(entry.shape)
        if hasattr(mmap, "MADV_WILLNEED") and count:
            start = entry.start - entry.start % mmap.PAGESIZE
            self._map.madvise(mmap.MADV_WILLNEED, start, entry.start - start + count * entry.dtype.itemsize)
        return np.frombuffer(self._map, entry.dtype, count, entry.start).reshape(entry.shape)


class SafetensorsSource:
    """The tensors of a checkpoint folder: model.safetensors, or the shards that model.safetensors.index.json names.

    Raises:
        FileNotFoundError: no such folder, or a shard of the index is missing.
        CheckpointError: the folder holds no safetensors (pickle files are refused), or a file is broken.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise FileNotFoundError(f"{self.folder}: no such checkpoint folder")
        self.files = {path: SafetensorsFile(path) for path in self._paths()}
        self._home = {name: file for file in self.files.values() for name in file.entries}

    def _paths(self) -> list[Path]:
        index, single = self.folder / "model.safetensors.index.json", self.folder / "model.safetensors"
        if index.exists():
            try:
                shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise CheckpointError(
                    f"{index}: should be JSON with a weight_map from tensors to files ({error!r}): download it again"
                ) from error
            missing = [shard for shard in shards if not (self.folder / shard).exists()]
            if missing:
                raise FileNotFoundError(
                    f"{index} names shards that are not there: {', '.join(missing)}: download the missing files"
                )
            return [self.folder / shard for shard in shards]
        if single.exists():
            return [single]
        pickles = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in self.folder.glob(pattern))
        if pickles:
            raise CheckpointError(
                f"{self.folder} holds pickle weights only ({', '.join(pickles[:3])}), which can run code when read, "
                "and are refused: convert them to safetensors, or take a revision of the repository that has them"
            )
        raise CheckpointError(
            f"{self.folder} is not a checkpoint: neither model.safetensors nor model.safetensors.index.json is there"
        )

    def names(self) -> list[str]:
        return list(self._home)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._home[name].entries[name].shape

    def dtype(self, name: str) -> np.dtype:
        return self._home[name].entries[name].dtype

    def read(self, name: str) -> np.ndarray:
        return self._home[name].read(name)


# ---------------------------------------------------------------------------------------------------------------
# loading

# Tensors that some checkpoints carry and no model needs: buffers that are computed.
_IGNORED = ("*.rotary_emb.inv_freq", "*.masked_bias", "*.attn.bias")


def parameter_shapes(model: CausalLM) -> Iterator[tuple[Named, tuple[int, ...]]]:
    """Every parameter of the (abstract) model with the shape of one checkpoint tensor."""
    for parameter in named_nodes(model, nnx.Variable):
        value = parameter.node.get_value()
        if isinstance(value, QuantizedArray):
            shape = (*value.leading, *value.shape)
        else:
            shape = value.shape
        stacked = len(next(iter(parameter.places().values())))  # axes that the checkpoint's tensors lack
        yield parameter, tuple(shape[stacked:])


def check_tensors(model: CausalLM, source: TensorSource) -> None:
    """Compare names and shapes of a checkpoint with a model's.

    Raises:
        CheckpointError: lists every tensor that is missing, unexpected or misshapen.
    """
    expected = {name: shape for parameter, shape in parameter_shapes(model) for name in parameter.names()}
    ignored = (*_IGNORED, *FAMILIES[model.config.model_type].ignored)
    if model.config.tie_word_embeddings:
        ignored = (*ignored, "lm_head.weight", "*.lm_head.weight")
    found = {
        name: tuple(source.shape(name))
        for name in source.names()
        if name in expected or not any(fnmatch.fnmatch(name, pattern) for pattern in ignored)
    }
    problems = tensor_problems(expected, found)
    if problems:
        raise CheckpointError(
            f"the tensors do not fit a {model.config.model_type} model of this config.json. {problems}"
        )


def tensor_problems(expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]) -> str:
    """What is wrong with the tensors found, {name: shape}: "", or the missing, unexpected and misshapen ones."""
    missing, unexpected = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    misshapen = [
        f"{name} is {list(found[name])}, expected {list(shape)}"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    return " | ".join(
        f"{len(names)} {kind}: {'; '.join(names[:8])}{' …' if len(names) > 8 else ''}"
        for kind, names in (("missing", missing), ("unexpected", unexpected), ("misshapen", misshapen))
        if names
    )


def load_model(
    source: TensorSource,
    hf_config: Mapping[str, Any],
    *,
    dtype: Any,
    quant_config: QuantConfig | None = None,
    config: ModelConfig | None = None,
    place: Callable[[Named, Any], Any] | None = None,
    cls: type[Model] = CausalLM,
    in_flight: int = IN_FLIGHT,
) -> Model:
    """Build a model and fill it from `source`, one tensor after the other.

    Weights become `dtype`; block projections are quantised on the device as they arrive, from the dtype that they
    have in the file. At no time is there more of the unquantised model than `in_flight` bytes, or one tensor; see
    `read_ahead`. `place` gives the sharding of a parameter's value (a tree of shardings like it), by default the first
    device.

    Raises:
        CheckpointError: see `check_tensors`.
    """
    config = config or model_config(hf_config, source.names())
    model = nnx.eval_shape(
        lambda: cls(config, dtype=dtype, quant_config=quant_config, rngs=nnx.Rngs(0), hf_config=dict(hf_config))
    )
    check_tensors(model, source)
    parameters = list(named_nodes(model, nnx.Variable))
    with ReadAhead(source, (name for parameter in parameters for name in parameter.places()), in_flight) as tensors:
        for parameter in parameters:
            abstract = parameter.node.get_value()
            shardings = place(parameter, abstract) if place else None
            if parameter.layers:
                value = _empty(abstract, shardings)
                for index in parameter.places().values():
                    value, done = _store(value, tensors.next(), index)
                    tensors.used(done)
            else:
                value = _like(abstract, tensors.next())
                tensors.used(value)
            if shardings is not None:
                value = jax.device_put(value, shardings)  # moves nothing, except a tensor that is not one of a stack
            parameter.node.set_value(value)
    jax.block_until_ready(nnx.state(model))
    return model


def _empty(abstract: Any, shardings: Any) -> Any:
    leaves, treedef = jax.tree.flatten(abstract)
    places = [None] * len(leaves) if shardings is None else treedef.flatten_up_to(shardings)
    return treedef.unflatten([jnp.zeros(a.shape, a.dtype, device=p) for a, p in zip(leaves, places, strict=True)])


def _like(target: Any, tensor: Any) -> Any:
    """`tensor` quantised, or cast, as `target` is."""
    if isinstance(tensor, QuantizedArray):
        tensor = dataclasses.replace(tensor, dtype=target.dtype)  # the checkpoint's dtype gives way to the model's
    elif isinstance(target, QuantizedArray):
        tensor = quant.quantize(
            tensor, scheme=target.scheme, double_quant=target.nested_absmax is not None, dtype=target.dtype
        )
    return jax.tree.map(lambda old, new: new.astype(old.dtype), target, tensor)


@functools.partial(jax.jit, donate_argnums=0)
def _store(target, tensor, index):
    """`target` with `tensor` at `index` of its leading axes, and a flag that is there when that is done: `target`'s
    buffers are given up for the result's, and so are the result's for the next."""

    def put(old, new):
        start = (*index, *[0] * new.ndim)
        return jax.lax.dynamic_update_slice(old, new[(None,) * len(index)], start)

    return jax.tree.map(put, target, _like(target, tensor)), jnp.ones((), jnp.bool_)
