"""Models as Hugging Face checkpoints: a base with its adapter merged, a GGUF file's model, or one fully trained.

A merge goes onto the weights of the original checkpoint, not onto their 4-bit form, one tensor at a time:

    W' = (float32(W) + scaling * B A), in W's own dtype, with DoRA its rows scaled to their magnitudes

The original's shards are copied and the bytes of the merged tensors replaced, so that everything else about them is
the original's to the byte. What was written is then read back and run, twice compared:

    export error      against the same merge that never went through a file; anything but rounding is refused
    quantisation gap  against the live model, whose adapter learnt on the quantised weights; reported, and there by
                      design, since the adapter moves to weights that it never saw
"""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import math
import shutil
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from huggingface_hub import split_state_dict_into_shards_factory

from jaxlora import lora
from jaxlora.converters.bitsandbytes import BitsandbytesSource, QuantizingSource, quantization_config, stays_plain
from jaxlora.converters.gguf import GGUFSource
from jaxlora.converters.huggingface import (
    SAFETENSORS_DTYPES,
    CheckpointError,
    SafetensorsSource,
    TensorSource,
    load_model,
)
from jaxlora.converters.mxfp4 import Mxfp4Source, is_mxfp4
from jaxlora.converters.staging import staged
from jaxlora.layers import Linear, PlainLinear
from jaxlora.model import CausalLM, named_nodes
from jaxlora.quant import QuantizedArray
from jaxlora.variables import Adapted, BaseParam, LoraParam, TrainableParam

logger = logging.getLogger(__name__)

_INDEX = "model.safetensors.index.json"
_TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template*",
    "*.model",
)
_FLOATS = ("float32", "bfloat16", "float16")
_METHODS = ("merged_16bit", "merged_4bit", "merged_4bit_forced")  # the last is Unsloth's name for the second
_LARGEST_EXPORT_ERROR = 1e-4  # of the largest logit: far above what the order of float32 sums can do
_CHECKED_TOKENS = 32


@dataclasses.dataclass(frozen=True, kw_only=True)
class MergeReport:
    """What `save_merged` wrote and measured.

    folder, files: where, and the names of the weight files. merged_modules: weights with an adapter in them.
    export_error, quantisation_gap: largest difference of two logits, see the head of this module, and largest_logit to
    hold them against; None if not measured.
    """

    folder: str
    files: tuple[str, ...]
    merged_modules: int
    export_error: float | None
    quantisation_gap: float | None
    largest_logit: float | None


# ---- Sources ---------------------------------------------------------------------------------------------------------


class CastSource:
    """Another source's tensors in one dtype: a `TensorSource`.

    Raises:
        ValueError: a value does not fit the dtype (on `read`), or the dtype is none of float32, bfloat16, float16.
    """

    def __init__(self, source: TensorSource, dtype: str):
        if dtype not in _FLOATS:
            raise ValueError(f"base_dtype {dtype!r} is not one of {', '.join(_FLOATS)}")
        self._source, self._dtype = source, jnp.dtype(dtype)

    def names(self) -> list[str]:
        return self._source.names()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._source.shape(name)

    def dtype(self, name: str) -> np.dtype:
        return self._dtype

    def read(self, name: str) -> np.ndarray:
        return _cast(_read(self._source, name), self._dtype, name)


class MergedSource:
    """A checkpoint's tensors with what a model has learnt put into them: a `TensorSource`.

    Adapters are merged, and copies that learnt stand in for the checkpoint's. A head that was tied, and no longer
    equals the embedding, is one more tensor. `changed` are the names of the checkpoint's tensors that differ; `added`
    of those that it has not; `unties`: whether the head is no longer tied; `fits_shards`: whether every tensor has its
    place in the checkpoint's files, which it has not with more rows for new tokens.

    Raises:
        CheckpointError: a tensor that learnt is missing from the checkpoint, has another shape, or is quantised.
        ValueError: a merged weight is not finite (on `read`).
    """

    def __init__(self, source: TensorSource, model: CausalLM):
        self._source = source
        self._merges = {name: (shape, merge) for name, shape, merge in lora.merges(model)}
        for name, value in lora.trained_copies(model):
            self._merges[name] = value.shape, functools.partial(_instead, value)
        self.added: tuple[str, ...] = ()
        self._tied_to = ""
        if model.lm_head.weight is None:
            self._untie(model)
        self.unties = bool(self.added)
        self.changed = tuple(name for name in self._merges if name not in self.added)
        self._has_new_rows = model.has_new_rows
        self._check()
        self.fits_shards = not self.added and all(self.shape(name) == source.shape(name) for name in self.changed)

    def _untie(self, model: CausalLM) -> None:
        head, embedding = (
            next(f"{x.name}.weight" for x in named_nodes(model, Adapted) if x.node is node)
            for node in (model.lm_head, model.model.embed_tokens)
        )
        if head in self._merges or (embedding in self._merges and not model.ties_adapters):
            table = model.model.embed_tokens.weight.get_value()
            self._merges.setdefault(head, (table.shape, lambda weight: weight))
            self.added, self._tied_to = (head,), embedding

    def _check(self) -> None:
        stored, problems = set(self._source.names()), []
        for name in self.changed:
            shape, _ = self._merges[name]
            if name not in stored:
                problems.append(f"{name} is missing")
            elif tuple(self._source.shape(name)) != shape and not self._gained_rows(name, shape):
                problems.append(f"{name} is {list(self._source.shape(name))}, and what it learnt {list(shape)}")
            elif self._source.dtype(name).name not in _FLOATS:
                problems.append(f"{name} is stored as {self._source.dtype(name)}, which cannot take an adapter")
        if problems:
            raise CheckpointError(
                f"{len(problems)} of {len(self.changed)} adapters do not fit the base checkpoint, and nothing was "
                f"merged: {'; '.join(problems[:8])}{' …' if len(problems) > 8 else ''}. Merge onto the checkpoint that "
                "the adapter was trained on, or its 16-bit original (base=...)"
            )

    def _gained_rows(self, name: str, shape: tuple[int, ...]) -> bool:
        rows, *width = self._source.shape(name)
        return self._has_new_rows and rows < shape[0] and tuple(width) == shape[1:]

    def names(self) -> list[str]:
        return [*self._source.names(), *self.added]

    def _stored(self, name: str) -> str:
        return self._tied_to if name in self.added else name

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._merges[name][0] if name in self._merges else self._source.shape(name))

    def dtype(self, name: str) -> np.dtype:
        return self._source.dtype(self._stored(name))

    def read(self, name: str) -> np.ndarray:
        weight = _read(self._source, self._stored(name))
        if name not in self._merges:
            return weight
        _, merge = self._merges[name]
        return _cast(merge(weight), self.dtype(name), name)


def _instead(value: np.ndarray, weight: np.ndarray) -> np.ndarray:
    return value


class ModelSource:
    """The weights of a model in memory, without adapters, under their checkpoint names: a `TensorSource`."""

    def __init__(self, model: CausalLM):
        self._values = {}
        for parameter in named_nodes(model, nnx.Variable):
            if isinstance(parameter.node, BaseParam | TrainableParam) and not isinstance(parameter.node, LoraParam):
                value = parameter.node.get_value()
                for name, index in parameter.places().items():
                    self._values[name] = (value, index)

    def names(self) -> list[str]:
        return list(self._values)

    def shape(self, name: str) -> tuple[int, ...]:
        value, index = self._values[name]
        shape = (*value.leading, *value.shape) if isinstance(value, QuantizedArray) else value.shape
        return shape[len(index) :]

    def dtype(self, name: str) -> np.dtype:
        return np.dtype(self._values[name][0].dtype)

    def read(self, name: str) -> np.ndarray | QuantizedArray:
        value, index = self._values[name]
        if isinstance(value, QuantizedArray):
            return jax.tree.map(lambda field: field[index], value)
        return np.asarray(value[index])


def _read(source: TensorSource, name: str) -> np.ndarray:
    tensor = source.read(name)
    if isinstance(tensor, jax.Array):
        return np.asarray(tensor)
    if isinstance(tensor, QuantizedArray):
        raise CheckpointError(f"{name} is quantised, and only unquantised tensors are written: pass the 16-bit model")
    return tensor


def _cast(array: np.ndarray, dtype: np.dtype, name: str) -> np.ndarray:
    with np.errstate(over="ignore"):  # what overflows is found on the next line
        array = array.astype(dtype)
    if not np.isfinite(array).all():
        raise ValueError(f"{name} has values that are infinite or no numbers in {dtype}, and was not written")
    return array


# ---- Writing ---------------------------------------------------------------------------------------------------------


def export_base(
    source: GGUFSource, folder: str | Path, *, dtype: str | None = None, max_shard_size: int | str = "5GB"
) -> Path:
    """Write a GGUF file's model as a Hugging Face checkpoint with its tokenizer, and return the folder's absolute path.

    A folder that holds just this already is left as it is.

    Args:
        dtype: "float32", "bfloat16" or "float16"; None keeps what the file has, quantised tensors as float32, which
            takes four bytes a weight and loses nothing.
        max_shard_size: bytes, or a text such as "5GB"; beyond it the weights are cut into several files.

    Raises:
        ValueError: the folder holds other weights, or a value does not fit `dtype`.
        OSError: the folder cannot be written to.
    """
    folder = Path(folder).resolve()
    tensors = source if dtype is None else CastSource(source, dtype)
    if _holds(folder, tensors):
        return folder
    with staged(folder) as stage:
        write_tensors(tensors, stage, max_shard_size)
        _write_json(stage / "config.json", _with_dtype(source.config(), dtype))
        _write_gguf_files(source, stage, None)
    return folder


def save_merged(
    model: CausalLM,
    folder: str | Path,
    tokenizer: Any = None,
    *,
    base: str | Path,
    save_method: str = "merged_16bit",
    base_dtype: str | None = None,
    max_shard_size: int | str = "5GB",
    verify: bool = True,
) -> MergeReport:
    """Write the model with its adapters merged as a Hugging Face checkpoint, and check what was written.

    A tensor keeps the dtype that it has in the base checkpoint, whatever the model computes in; but experts in mxfp4
    become bfloat16 if any has an adapter. Checking reads the checkpoint back in float32, once from the files and once
    merged anew, one after the other: it takes four bytes a weight beside the live model. No file appears in `folder`
    before it has passed.

    Args:
        tokenizer: is saved too; None copies the base's.
        base: the checkpoint to merge onto: a folder of unquantised safetensors, or a .gguf file.
        save_method: "merged_16bit", or "merged_4bit": the projections of the blocks are quantised to NF4 after the
            merge, as transformers and bitsandbytes store them. That rounds what the adapter learnt: the report's
            quantisation gap says how far.
        base_dtype: for a GGUF base only, as for `export_base`.
        max_shard_size: for a GGUF base only, as for `export_base`: bytes, or a text such as "5GB".
        verify: False skips the check and saves its memory.

    Raises:
        ValueError: the model has no adapter, the folder is the base's or holds other weights or an adapter, a merged
            weight is not finite.
        CheckpointError: the base is quantised, or is another model's.
        RuntimeError: what was written does not compute what it should.
        OSError: the folder cannot be written to.
    """
    _check_method(save_method)
    if not lora.adapters(model):
        raise ValueError("the model has no adapter to merge: call FastLanguageModel.get_peft_model first")
    base, folder = Path(base), Path(folder)
    if folder.resolve() == base.resolve():
        raise ValueError(
            f"{folder} is the base checkpoint itself, which a merge leaves as it is: choose another folder"
        )
    opened, hf_config = _open_base(base, base_dtype), dict(model.hf_config)
    source: TensorSource = opened
    if is_mxfp4(hf_config) and any(module.node.experts for module in lora.adapters(model)):
        source = Mxfp4Source(opened)  # what experts learnt does not fit their 4 bits: all become bfloat16
    if source is not opened or not is_mxfp4(hf_config):  # whose experts else stay as they are
        hf_config.pop("quantization_config", None)
    merged = MergedSource(source, model)
    tensors = merged if base_dtype is None else CastSource(merged, base_dtype)
    hf_config = _with_dtype(_untied(hf_config) if merged.unties else hf_config, base_dtype)
    if save_method != "merged_16bit":
        quantised, others = _quantised_names(model)
        hf_config["quantization_config"] = quantization_config(tensors.dtype(quantised[0]).name, others)
        tensors = QuantizingSource(tensors, frozenset(quantised))
    with staged(folder) as stage:
        if isinstance(source, SafetensorsSource) and merged.fits_shards and tensors is merged:
            files = _write_shards(source, merged, stage)
        else:
            files = write_tensors(tensors, stage, max_shard_size)
        if isinstance(opened, SafetensorsSource):
            _copy_files(base, stage, tokenizer)
        else:
            _write_gguf_files(GGUFSource(base), stage, tokenizer)
        _write_json(stage / "config.json", hf_config)
        error, gap, largest = _verify(model, tensors, stage, hf_config) if verify else (None, None, None)
    report = MergeReport(
        folder=str(folder),
        files=tuple(files),
        merged_modules=len(merged.changed) + len(merged.added),
        export_error=error,
        quantisation_gap=gap,
        largest_logit=largest,
    )
    logger.info(
        "%s: merged %d modules onto %s; largest difference of a logit: export error %s, quantisation gap %s, of %s",
        folder, report.merged_modules, base, error, gap, largest,
    )  # fmt: skip
    return report


def save_model(
    model: CausalLM,
    folder: str | Path,
    tokenizer: Any = None,
    *,
    generation_config: Mapping[str, Any] | None = None,
    dtype: Any = None,
    max_shard_size: int | str = "5GB",
) -> Path:
    """Write the weights of a model as they are in memory as a Hugging Face checkpoint; returns the folder.

    Args:
        tokenizer: is saved too.
        generation_config: what generation_config.json holds; none is written if it is empty.
        dtype: of the weights in the file; None keeps the one that they have.
        max_shard_size: bytes, or a text such as "5GB"; beyond it the weights are cut into several files.

    Raises:
        CheckpointError: a weight is quantised.
        ValueError: the folder holds other weights, or a value does not fit `dtype`.
        OSError: the folder cannot be written to.
    """
    folder, source = Path(folder), ModelSource(model)
    (name, *_) = source.names()
    dtype = (source.dtype(name) if dtype is None else jnp.dtype(dtype)).name
    hf_config = {key: value for key, value in model.hf_config.items() if key != "quantization_config"}
    with staged(folder) as stage:
        write_tensors(CastSource(source, dtype), stage, max_shard_size)
        _write_json(stage / "config.json", _with_dtype(hf_config, dtype))
        if generation_config:
            _write_json(stage / "generation_config.json", generation_config)
        if tokenizer is not None:
            tokenizer.save_pretrained(stage)
    return folder


def _check_method(save_method: str) -> None:
    if save_method not in _METHODS:
        raise ValueError(f'save_method {save_method!r} is not one of "merged_16bit", "merged_4bit", "lora"')


def _quantised_names(model: CausalLM) -> tuple[list[str], list[str]]:
    """The names of the linear weights that a 4-bit checkpoint quantises, and of the modules that it leaves alone.

    Raises:
        ValueError: the model has experts, whose weights bitsandbytes leaves as they are.
    """
    linears = list(named_nodes(model, Linear))
    kept = [linear for linear in linears if not linear.layers or stays_plain(f"{linear.name}.weight")]
    quantised = [f"{name}.weight" for linear in linears if linear not in kept for name in linear.names()]
    others = [p.name for p in named_nodes(model, BaseParam) if isinstance(p.node.get_value(), QuantizedArray)]
    if strange := sorted(set(others) - {f"{linear.name}.weight" for linear in linears}):
        raise ValueError(
            f'save_method="merged_4bit": {strange[0]} is no linear layer, and bitsandbytes quantises no others: save '
            'with "merged_16bit"'
        )
    kept += named_nodes(model, PlainLinear)
    return quantised, [name for linear in kept for name in linear.names()]


def _open_base(base: Path, dtype: str | None) -> SafetensorsSource | GGUFSource:
    if base.suffix == ".gguf":
        return GGUFSource(base)
    if dtype is not None:
        raise ValueError(
            f"base_dtype={dtype!r} is for a .gguf base; a tensor merged onto {base} keeps the dtype that it has there"
        )
    config = base / "config.json"
    hf_config = json.loads(config.read_text()) if config.exists() else {}
    if "quantization_config" in hf_config and not is_mxfp4(hf_config):
        raise CheckpointError(
            f"{base} holds quantised weights, and a merge goes onto unquantised ones: pass the 16-bit model that it "
            "was made from as base=..., a folder or an id"
        )
    return SafetensorsSource(base)


def _write_shards(source: SafetensorsSource, merged: MergedSource, stage: Path) -> list[str]:
    """Copy the shards, and replace the bytes of the merged tensors: names, order and offsets stay."""
    files, index = [path.name for path in source.files], source.folder / _INDEX
    _check_folder(stage.parent, [*files, _INDEX] if index.exists() else files)
    if index.exists():
        shutil.copyfile(index, stage / _INDEX)
    for path, shard in source.files.items():
        shutil.copyfile(path, stage / path.name)
        with (stage / path.name).open("r+b") as file:
            for name in shard.entries.keys() & set(merged.changed):
                file.seek(shard.entries[name].start)
                file.write(merged.read(name).tobytes())
    return files


def write_tensors(source: TensorSource, stage: Path, max_shard_size: int | str) -> list[str]:
    """Write safetensors, one tensor in memory at a time, with an index if there is more than one file."""
    sizes = {name: source.dtype(name).itemsize * math.prod(source.shape(name)) for name in source.names()}
    split = split_state_dict_into_shards_factory(
        sizes,
        get_storage_size=lambda size: size,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_size,
    )
    files = list(split.filename_to_tensors)
    _check_folder(stage.parent, [*files, _INDEX] if split.is_sharded else files)
    for file, names in split.filename_to_tensors.items():
        _write_safetensors(source, names, stage / file)
    if split.is_sharded:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": split.tensor_to_filename}
        _write_json(stage / _INDEX, index)
    return files


def _write_safetensors(source: TensorSource, names: Sequence[str], path: Path) -> None:
    tags = {dtype: tag for tag, dtype in SAFETENSORS_DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        start, end = end, end + source.dtype(name).itemsize * math.prod(source.shape(name))
        header[name] = {"dtype": tags[source.dtype(name)], "shape": source.shape(name), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # so that the tensors are aligned
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            file.write(np.ascontiguousarray(_read(source, name)).tobytes())


def _holds(folder: Path, source: TensorSource) -> bool:
    """Whether the folder is a whole checkpoint of just these tensors."""
    if not (folder / "config.json").exists():
        return False
    there = SafetensorsSource(folder)
    return set(there.names()) == set(source.names()) and all(
        there.dtype(name) == source.dtype(name) and np.array_equal(there.read(name), _read(source, name))
        for name in there.names()
    )


def _check_folder(folder: Path, ours: Collection[str]) -> None:
    """Refuse a folder with files that would make something else of the checkpoint: they are the user's to delete."""
    there = {path.name for pattern in ("*.safetensors", _INDEX, "adapter_config.json") for path in folder.glob(pattern)}
    if others := sorted(there.difference(ours)):
        raise ValueError(
            f"{folder} holds {', '.join(others)}, which a checkpoint written there would be read together with: choose "
            "another folder, or delete them"
        )


def _with_dtype(hf_config: Mapping[str, Any], dtype: str | None) -> dict[str, Any]:
    if dtype is None:
        return dict(hf_config)
    return {**{key: value for key, value in hf_config.items() if key != "dtype"}, "torch_dtype": dtype}


def _untied(hf_config: Mapping[str, Any]) -> dict[str, Any]:
    parts = {key: _untied(part) for key, part in hf_config.items() if key == "text_config"}
    return {**hf_config, **parts, "tie_word_embeddings": False}


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def _write_gguf_files(source: GGUFSource, stage: Path, tokenizer: Any) -> None:
    _write_json(stage / "generation_config.json", source.generation_config())
    tokenizer = tokenizer or source.tokenizer()
    if tokenizer is not None:
        tokenizer.save_pretrained(stage)


def _copy_files(base: Path, stage: Path, tokenizer: Any) -> None:
    """What a checkpoint has beside weights and config.json."""
    patterns = ["generation_config.json"]
    if tokenizer is None:
        patterns += _TOKENIZER_FILES
    else:
        tokenizer.save_pretrained(stage)
    for path in {path for pattern in patterns for path in base.glob(pattern) if path.is_file()}:
        shutil.copyfile(path, stage / path.name)


# ---- Checking --------------------------------------------------------------------------------------------------------


def _verify(
    model: CausalLM, merged: TensorSource, folder: Path, hf_config: Mapping[str, Any]
) -> tuple[float, float, float]:
    """(export error, quantisation gap, largest logit) of a checkpoint; one float32 model is alive at a time."""
    ids = (7 * jnp.arange(_CHECKED_TOKENS, dtype=jnp.int32)[None] + 1) % model.config.vocab_size
    written_config = json.loads((folder / "config.json").read_text())
    written = np.asarray(_load(SafetensorsSource(folder), written_config)(ids))
    expected = np.asarray(_load(merged, hf_config)(ids))
    live = np.asarray(model(ids))
    error, gap = (float(np.abs(written - other).max()) for other in (expected, live))
    largest = float(np.abs(expected).max())
    if not error <= _LARGEST_EXPORT_ERROR * largest:  # so that a NaN fails too
        raise RuntimeError(
            f"the merged checkpoint, read back, differs by {error:.3g} in logits up to {largest:.3g} from what it "
            "should compute: nothing was saved. Please report this"
        )
    return error, gap, largest


def _load(source: TensorSource, hf_config: Mapping[str, Any]) -> CausalLM:
    quantization = hf_config.get("quantization_config", {})
    if quantization.get("quant_method") == "bitsandbytes":
        source = BitsandbytesSource(source, quantization)
        return load_model(source, hf_config, dtype=jnp.float32, quant_config=source.quant_config())
    return load_model(Mxfp4Source(source) if is_mxfp4(hf_config) else source, hf_config, dtype=jnp.float32)
