"""What a folder or a file holds, whatever its format: the converter for its weights, its settings, its tokenizer."""

from __future__ import annotations

import dataclasses
import json
import warnings
from pathlib import Path
from typing import Any

from jaxlora.converters.bitsandbytes import BitsandbytesSource
from jaxlora.converters.gguf import GGUFSource
from jaxlora.converters.huggingface import CheckpointError, SafetensorsSource, TensorSource
from jaxlora.converters.mxfp4 import Mxfp4Source, is_mxfp4
from jaxlora.converters.scaled import ScaledSource


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """What a folder or a .gguf file holds; the tokenizer is None where there is none."""

    source: TensorSource
    hf_config: dict
    generation_config: dict
    tokenizer: Any


def open_checkpoint(path: Path) -> Checkpoint:
    """What a folder or a .gguf file holds. Quantised weights are read as they are stored.

    Raises:
        CheckpointError: it is not a checkpoint, or one that cannot be read.
    """
    if path.is_file():
        if path.suffix != ".gguf":
            raise CheckpointError(f"{path} is a file, and only .gguf files are models: name the folder that it lies in")
        gguf = GGUFSource(path)
        return Checkpoint(gguf, gguf.config(), gguf.generation_config(), gguf.tokenizer())
    config_file = path / "config.json"
    if not config_file.exists():
        raise CheckpointError(f"{path} is not a checkpoint: it has no config.json")
    hf_config, generation_config = _read_json(config_file), _read_json(path / "generation_config.json")
    source: TensorSource = SafetensorsSource(path)
    if is_mxfp4(hf_config):
        source = Mxfp4Source(source)
    elif "quantization_config" in hf_config:
        quantization = hf_config["quantization_config"]
        is_scaled = quantization.get("quant_method") in ("fp8", "fbgemm_fp8") or quantization.get("load_in_8bit")
        source = (ScaledSource if is_scaled else BitsandbytesSource)(source, quantization)
    return Checkpoint(source, hf_config, generation_config, open_tokenizer(path))


def _is_generic(folder: Path) -> bool:
    """Whether a folder's tokenizer is tokenizer.json and nothing beside it, of which `AutoTokenizer` makes the same. It
    has its own mind about Qwen's, some of which say so and are not."""
    stated = _read_json(folder / "tokenizer_config.json")
    is_qwen = str(_read_json(folder / "config.json").get("model_type")).startswith("qwen")
    generic = ("PreTrainedTokenizerFast", "TokenizersBackend")
    is_stated = stated.get("tokenizer_class") in generic and "auto_map" not in stated
    return is_stated and not is_qwen and (folder / "tokenizer.json").exists()


def _read_json(path: Path) -> dict:
    """The object in a JSON file; {} if there is no such file."""
    if not path.exists():
        return {}
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise CheckpointError(f"{path}: not JSON ({error}): download or copy it again") from error


def open_tokenizer(folder: Path) -> Any:
    """The tokenizer of a folder; None where there is none, and with a warning where it is code."""
    if not any((folder / name).exists() for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")):
        return None
    from transformers import PreTrainedTokenizerFast  # half a second, which a model without tokenizer saves

    if _is_generic(folder):
        return PreTrainedTokenizerFast.from_pretrained(folder)
    from transformers import AutoTokenizer  # takes torch with it where that is installed, and seconds more

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except ValueError:
        if "auto_map" not in _read_json(folder / "tokenizer_config.json"):
            raise
    if (folder / "tokenizer.json").exists():  # which says all that there is to say of most
        return PreTrainedTokenizerFast.from_pretrained(folder)
    warnings.warn(
        f"{folder}: the tokenizer is code of its own (auto_map), which is never run here: make a tokenizer.json of it, "
        "or pass one that transformers has",
        stacklevel=4,
    )
    return None
