"""Checkpoints of random weights in real models' shapes, for what has to be read from disk.

`python -m jaxlora.bench.checkpoints FOLDER 8b nf4` writes one as transformers and bitsandbytes do (or "bfloat16"), with
a small tokenizer. Quantising takes the device, hence a process of its own.
"""

from __future__ import annotations

import functools
import json
import os
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jaxlora.bench.shapes import CONFIGS
from jaxlora.converters.bitsandbytes import QuantizingSource, quantization_config
from jaxlora.converters.export import write_tensors
from jaxlora.converters.staging import staged

_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


class RandomSource:
    """A Llama's tensors in bfloat16: a `TensorSource`. Norms are 1, the rest normal, of a standard deviation of 0.02.

    Tensors repeat the numbers of one pool of 32 MiB, since nothing that is timed depends on them, and drawing 16 GB of
    them takes minutes.
    """

    def __init__(self, config: dict[str, Any]):
        d, f, vocabulary = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
        q, k = (config[heads] * config["head_dim"] for heads in ("num_attention_heads", "num_key_value_heads"))
        attention = dict(q_proj=(q, d), k_proj=(k, d), v_proj=(k, d), o_proj=(d, q))
        mlp = dict(gate_proj=(f, d), up_proj=(f, d), down_proj=(d, f))
        self.linears: list[str] = []
        self._shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, d)}
        for layer in range(config["num_hidden_layers"]):
            block = f"model.layers.{layer}."
            for part, shapes in (("self_attn.", attention), ("mlp.", mlp)):
                named = {f"{block}{part}{name}.weight": shape for name, shape in shapes.items()}
                self.linears += named
                self._shapes |= named
            self._shapes |= {f"{block}{norm}_layernorm.weight": (d,) for norm in ("input", "post_attention")}
        self._shapes["model.norm.weight"] = (d,)
        if not config["tie_word_embeddings"]:
            self._shapes["lm_head.weight"] = (vocabulary, d)
        self._of_shape = functools.cache(self._draw)

    def _draw(self, shape: tuple[int, ...]) -> np.ndarray:
        if len(shape) == 1:
            return np.ones(shape, _BFLOAT16)
        pool = 0.02 * np.random.default_rng(0).standard_normal(2**24, np.float32)
        return np.resize(pool.astype(_BFLOAT16), shape)

    def names(self) -> list[str]:
        return list(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def dtype(self, name: str) -> np.dtype:
        return _BFLOAT16

    def read(self, name: str) -> np.ndarray:
        return self._of_shape(self._shapes[name])


def write_checkpoint(folder: Path, shape: str, scheme: str) -> None:
    """Write a checkpoint of a shape of `CONFIGS` into a folder; scheme is "nf4" or "bfloat16"."""
    about = dict(architectures=["LlamaForCausalLM"], torch_dtype="bfloat16", hidden_act="silu")
    config: dict[str, Any] = CONFIGS[shape] | about
    source: Any = RandomSource(config)
    if scheme == "nf4":
        source = QuantizingSource(source, source.linears)
        config["quantization_config"] = quantization_config("bfloat16", ["lm_head"])
    with staged(folder) as stage:
        write_tensors(source, stage, "5GB")
        _write_tokenizer(stage)
        (stage / "config.json").write_text(json.dumps(config, indent=2))


def _write_tokenizer(folder: Path) -> None:
    """A tokenizer of bytes, with the special tokens that trainers ask for."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<|begin_of_text|>", "<|end_of_text|>", "<|finetune_right_pad_id|>"]
    alphabet = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    rules = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(alphabet)}, merges=[]))
    rules.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    rules.decoder = decoders.ByteLevel()
    bos, eos, pad = special
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=rules, bos_token=bos, eos_token=eos, pad_token=pad)
    tokenizer.save_pretrained(folder)


def evict(folder: Path) -> None:
    """Take a checkpoint out of the page cache, so that it comes from the disk."""
    os.sync()
    for path in folder.glob("*.safetensors"):
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def main(folder: str, shape: str, scheme: str) -> None:
    write_checkpoint(Path(folder), shape, scheme)


if __name__ == "__main__":
    main(*sys.argv[1:])
