"""GGUF files of llama models, seen as Hugging Face checkpoints.

A GGUF file holds in one place what a Hugging Face folder spreads over several: weights, config.json,
generation_config.json and the tokenizer. `GGUFSource` gives each back in the Hugging Face form, so that the rest of the
library never learns where a model came from:

    source = GGUFSource("SmolLM2-135M-Instruct.Q4_1.gguf")
    source.read("model.layers.0.self_attn.q_proj.weight")  # float32 [out, in], dequantised, one tensor at a time
    source.config()["rope_theta"], source.tokenizer()("Hello")["input_ids"]

The file is memory-mapped and torch is never imported. Where the original checkpoint, llama.cpp and transformers' own
GGUF reader disagree about a tokenizer, the original wins: its ids are the ones that the weights were trained on.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import ml_dtypes
import numpy as np
from gguf import GGMLQuantizationType as Type
from gguf import TokenType
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

# ---- Names, both ways ------------------------------------------------------------------------------------------------

# (GGUF, Hugging Face); "{}" is the layer's number.
NAMES = (
    ("token_embd.weight", "model.embed_tokens.weight"),
    ("blk.{}.attn_norm.weight", "model.layers.{}.input_layernorm.weight"),
    ("blk.{}.attn_q.weight", "model.layers.{}.self_attn.q_proj.weight"),
    ("blk.{}.attn_k.weight", "model.layers.{}.self_attn.k_proj.weight"),
    ("blk.{}.attn_v.weight", "model.layers.{}.self_attn.v_proj.weight"),
    ("blk.{}.attn_output.weight", "model.layers.{}.self_attn.o_proj.weight"),
    ("blk.{}.ffn_norm.weight", "model.layers.{}.post_attention_layernorm.weight"),
    ("blk.{}.ffn_gate.weight", "model.layers.{}.mlp.gate_proj.weight"),
    ("blk.{}.ffn_up.weight", "model.layers.{}.mlp.up_proj.weight"),
    ("blk.{}.ffn_down.weight", "model.layers.{}.mlp.down_proj.weight"),
    ("output_norm.weight", "model.norm.weight"),
)
OPTIONAL_NAMES = (
    ("output.weight", "lm_head.weight"),  # absent when tied to the embedding
    *((a.replace(".weight", ".bias"), b.replace(".weight", ".bias")) for a, b in NAMES if b.endswith("_proj.weight")),
)
ROPE_FREQS = "rope_freqs.weight"  # no weight of the model: Llama 3's RoPE scaling, baked (see `_llama3_scaling`)

_TO_HF = dict(NAMES + OPTIONAL_NAMES)
_TO_GGUF = {hf: ours for ours, hf in _TO_HF.items()}


def to_hf(name: str) -> str | None:
    """The Hugging Face name of a GGUF tensor, or None if a llama model has no such tensor."""
    return _rename(name, _TO_HF)


def to_gguf(name: str) -> str | None:
    """The GGUF name of a Hugging Face tensor, or None if a llama model has no such tensor."""
    return _rename(name, _TO_GGUF)


def _rename(name: str, table: dict[str, str]) -> str | None:
    layer = re.search(r"\.(\d+)\.", name)
    if layer is None:
        return table.get(name)
    renamed = table.get(name.replace(layer[0], ".{}.", 1))
    return None if renamed is None else renamed.format(layer[1])


# ---- Types -----------------------------------------------------------------------------------------------------------

STORED = {Type.F32: np.dtype(np.float32), Type.F16: np.dtype(np.float16), Type.BF16: np.dtype(ml_dtypes.bfloat16)}
QUANTISED = (Type.Q8_0, Type.Q4_0, Type.Q4_1, Type.Q4_K, Type.Q6_K)  # read as float32


class GGUFSource:
    """The tensors, config and tokenizer of one GGUF file: a `TensorSource`.

    Opening reads the metadata and checks that the file is whole: that every tensor of a llama model is there, in a type
    that can be read.

    Args:
      path: a .gguf file whose `general.architecture` is "llama".

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file is not GGUF, is truncated, is one of several parts, holds another architecture or a mixture
        of experts, lacks a tensor, or has one that is unknown or of an unsupported type. The message names the file,
        what was found, and the mend.
    """

    ARCHITECTURES = ("llama",)

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        self._reader = _open(self.path)
        self._check_kind()
        self._tensors = self._index()

    def __repr__(self) -> str:
        return f"GGUFSource({str(self.path)!r}, {len(self._tensors)} tensors)"

    # ---- Tensors

    def names(self) -> list[str]:
        """The Hugging Face names of all tensors, in the file's order."""
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape that `read` returns: [out, in] for a linear weight. KeyError if there is no such tensor."""
        return tuple(int(n) for n in reversed(self._tensor(name).shape))  # GGUF lists the fastest axis first

    def dtype(self, name: str) -> np.dtype:
        """The dtype that `read` returns: the stored one, float32 if quantised. KeyError if there is no such tensor."""
        return STORED.get(self._tensor(name).tensor_type, np.dtype(np.float32))

    def read(self, name: str) -> np.ndarray:
        """One tensor, dequantised, in Hugging Face's orientation and row order; a fresh array that the caller owns.

        Raises:
          KeyError: there is no such tensor.
        """
        tensor = self._tensor(name)
        if tensor.tensor_type in STORED:
            array = np.array(tensor.data).view(STORED[tensor.tensor_type])  # bfloat16 comes as bytes
        else:
            array = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        if ".q_proj." in name:
            return _unpermute(array, heads=self._integer("attention.head_count"))
        if ".k_proj." in name:
            return _unpermute(array, heads=self._kv_heads())
        return array

    def _tensor(self, name: str) -> gguf.ReaderTensor:
        try:
            return self._tensors[name]
        except KeyError:
            hint = "; its head is tied to model.embed_tokens.weight" if name == "lm_head.weight" else ""
            raise KeyError(f"{self.path}: no tensor {name!r} (in GGUF: {to_gguf(name)!r}){hint}") from None

    def _index(self) -> dict[str, gguf.ReaderTensor]:
        """{Hugging Face name: tensor}, after checking that all of a llama model is there and can be read."""
        readable = [*STORED, *QUANTISED]
        index = {}
        for tensor in self._reader.tensors:
            if tensor.name == ROPE_FREQS:
                continue
            name = to_hf(tensor.name)
            if name is None:
                raise ValueError(f"{self.path}: tensor {tensor.name!r} has no place in a dense llama model")
            if tensor.tensor_type not in readable:
                raise ValueError(
                    f"{self.path}: tensor {tensor.name!r} is of type {tensor.tensor_type.name}; supported are "
                    f"{', '.join(t.name for t in readable)}. Take another file of the model, such as Q4_K_M or Q8_0"
                )
            index[name] = tensor
        layers = range(self._integer("block_count"))
        for ours, hf in NAMES:
            for layer in layers if "{}" in hf else (0,):
                if hf.format(layer) not in index:
                    raise ValueError(
                        f"{self.path}: tensor {ours.format(layer)!r} ({hf.format(layer)}) is missing from a model of "
                        f"{len(layers)} layers; the file is incomplete, download or convert it again"
                    )
        return index

    # ---- Configuration

    def config(self) -> dict[str, Any]:
        """What config.json of a `LlamaForCausalLM` would say.

        Raises:
          ValueError: a setting is missing, or has no equal in a Hugging Face llama (RoPE over a part of the head, RoPE
            scaling of an unknown kind). The message names the key.
        """
        heads = self._integer("attention.head_count")
        rows = self.shape("model.layers.0.self_attn.q_proj.weight")[0]
        head_dim = rows // heads  # the tensor is the truth: hidden_size // heads is not, for some models
        rotated = self._get("llama.rope.dimension_count", head_dim)
        if rows % heads or rotated != head_dim:
            raise ValueError(
                f"{self.path}: llama.rope.dimension_count is {rotated}, but blk.0.attn_q.weight has {rows} rows for "
                f"{heads} heads; a Hugging Face llama rotates the whole head"
            )
        theta = self._number("rope.freq_base", 10000.0)
        dtypes = {self.dtype(name) for name in self.names() if len(self.shape(name)) == 2}
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": self.shape("model.embed_tokens.weight")[0],
            "hidden_size": self._integer("embedding_length"),
            "intermediate_size": self._integer("feed_forward_length"),
            "num_hidden_layers": self._integer("block_count"),
            "num_attention_heads": heads,
            "num_key_value_heads": self._kv_heads(),
            "head_dim": head_dim,
            "hidden_act": "silu",
            "max_position_embeddings": self._integer("context_length"),
            "rms_norm_eps": self._number("attention.layer_norm_rms_epsilon"),
            "rope_theta": theta,
            "rope_scaling": self._rope_scaling(theta, head_dim),
            "attention_bias": any(".self_attn." in name and name.endswith(".bias") for name in self._tensors),
            "mlp_bias": any(".mlp." in name and name.endswith(".bias") for name in self._tensors),
            "tie_word_embeddings": "lm_head.weight" not in self._tensors,
            "bos_token_id": self._get("tokenizer.ggml.bos_token_id"),
            "eos_token_id": self._get("tokenizer.ggml.eos_token_id"),
            "pad_token_id": self._get("tokenizer.ggml.padding_token_id"),
            "torch_dtype": dtypes.pop().name if len(dtypes) == 1 else "float32",
        }

    def generation_config(self) -> dict[str, Any]:
        """What generation_config.json would say: token ids, and the sampling that the file recommends, if any.

        A chat model may end its turn with another token than its text ("<|eot_id|>"): then `eos_token_id` is a list.
        """
        ends = [self._get(f"tokenizer.ggml.{kind}_token_id") for kind in ("eos", "eot", "eom")]
        ends = list(dict.fromkeys(end for end in ends if end is not None))
        config = {
            "bos_token_id": self._get("tokenizer.ggml.bos_token_id"),
            "eos_token_id": ends if len(ends) > 1 else next(iter(ends), None),
            "pad_token_id": self._get("tokenizer.ggml.padding_token_id"),
        }
        for ours, hf in (("temp", "temperature"), ("top_k", "top_k"), ("top_p", "top_p"), ("min_p", "min_p")):
            if (value := self._get(f"general.sampling.{ours}")) is not None:
                config |= {"do_sample": True, hf: value if isinstance(value, int) else _decimal(value)}
        return {key: value for key, value in config.items() if value is not None}

    def _rope_scaling(self, theta: float, head_dim: int) -> dict[str, Any] | None:
        """config.json's `rope_scaling`, or None. Every key under "llama.rope." is understood or refused."""
        keys = (key for key in self._reader.fields if key.startswith("llama.rope."))
        found = {key.removeprefix("llama.rope."): self._get(key) for key in keys}
        for key in ("dimension_count", "freq_base", "scaling.finetuned"):  # read elsewhere; says nothing of the maths
            found.pop(key, None)
        kind = found.pop("scaling.type", "none")
        factor = _decimal(found.pop("scaling.factor", 1.0))
        original = found.pop("scaling.original_context_length", None)
        divisors = next((tensor.data for tensor in self._reader.tensors if tensor.name == ROPE_FREQS), None)
        scaling = None
        if kind == "none" and divisors is not None:
            scaling = _llama3_scaling(divisors, theta, head_dim)
        elif kind == "linear" and divisors is None:
            scaling = {"rope_type": "linear", "factor": factor}
        elif kind == "yarn" and divisors is None and original is not None:
            scaling = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
            for name in ("beta_fast", "beta_slow"):
                if (beta := found.pop(f"scaling.yarn_{name}", None)) is not None:
                    scaling[name] = _decimal(beta)
        plain = kind == "none" and divisors is None
        if found or (scaling is None and not plain):
            raise ValueError(
                f"{self.path}: RoPE scaling has no equal in a Hugging Face llama: llama.rope.scaling.type {kind!r}, "
                f"factor {factor}, original_context_length {original}, tensor {ROPE_FREQS} "
                f"{'absent' if divisors is None else 'present'}, other keys {found}. Supported are 'linear', 'yarn' "
                "with its original context, and the tensor as Llama 3.1 and later have it"
            )
        return scaling

    # ---- Tokenizer

    def tokenizer(self) -> Any:
        """The tokenizer, a `PreTrainedTokenizerFast` with chat template and special tokens; None if the file has none.

        Raises:
          ValueError: a tokenizer model or a pre-tokenizer that is not supported; the message lists those that are.
        """
        kind = self._get("tokenizer.ggml.model", "no_vocab")
        if kind == "no_vocab":
            return None
        tokens = self._get("tokenizer.ggml.tokens")
        types = self._get("tokenizer.ggml.token_type") or [TokenType.NORMAL] * len(tokens)
        merges = [
            (left, right) for left, _, right in (m.partition(" ") for m in self._get("tokenizer.ggml.merges", ()))
        ]
        unknown = self._get("tokenizer.ggml.unknown_token_id")
        if kind == "gpt2":
            pre = self._get("tokenizer.ggml.pre", "default")
            if pre not in PRE_TOKENIZERS:
                raise ValueError(
                    f"{self.path}: tokenizer.ggml.pre is {pre!r}; supported are {', '.join(PRE_TOKENIZERS)}. Take the "
                    "tokenizer from the model's Hugging Face repository instead"
                )
            rules, adds_bos = _byte_level(tokens, merges, PRE_TOKENIZERS[pre]), PRE_TOKENIZERS[pre].adds_bos
        elif kind == "llama":
            merges = merges or _merges_of_scores(tokens, self._get("tokenizer.ggml.scores"), types)
            prefix = self._get("tokenizer.ggml.add_space_prefix", True)
            rules, adds_bos = _sentencepiece(tokens, merges, None if unknown is None else tokens[unknown], prefix), True
        else:
            raise ValueError(
                f"{self.path}: tokenizer.ggml.model is {kind!r}; supported are 'gpt2' and 'llama'. Take the tokenizer "
                "from the model's Hugging Face repository instead"
            )
        whole = (TokenType.CONTROL, TokenType.UNKNOWN, TokenType.USER_DEFINED)  # found in the text before any merging
        rules.add_tokens(
            [
                AddedToken(token, normalized=False, special=type_ != TokenType.USER_DEFINED)
                for token, type_ in zip(tokens, types, strict=True)
                if type_ in whole
            ]
        )
        ids = {name: self._get(f"tokenizer.ggml.{key}_token_id") for name, key in _SPECIAL_TOKENS.items()}
        from transformers import PreTrainedTokenizerFast  # takes a third of a second to import

        return PreTrainedTokenizerFast(
            tokenizer_object=rules,
            chat_template=self._chat_template(),
            add_bos_token=self._get("tokenizer.ggml.add_bos_token", adds_bos),
            add_eos_token=self._get("tokenizer.ggml.add_eos_token", False),
            model_max_length=self._integer("context_length"),
            clean_up_tokenization_spaces=False,
            **{name: tokens[id_] for name, id_ in ids.items() if id_ is not None},
        )

    def _chat_template(self) -> str | dict[str, str] | None:
        default = self._get("tokenizer.chat_template")
        names = self._get("tokenizer.chat_templates", ())
        named = {name: self._get(f"tokenizer.chat_template.{name}") for name in names}
        return {"default": default, **named} if named and default else default

    # ---- Metadata

    def _get(self, key: str, default: Any = None) -> Any:
        field = self._reader.get_field(key)
        return default if field is None else field.contents()

    def _integer(self, key: str) -> int:
        value = self._get(f"llama.{key}")
        if not isinstance(value, int):
            raise ValueError(
                f"{self.path}: metadata llama.{key} is {value!r}, expected one integer; convert the model again with a "
                "current convert_hf_to_gguf.py"
            )
        return value

    def _number(self, key: str, default: float | None = None) -> float:
        value = self._get(f"llama.{key}", default)
        if not isinstance(value, int | float):
            raise ValueError(f"{self.path}: metadata llama.{key} is {value!r}, expected one number")
        return _decimal(value)

    def _kv_heads(self) -> int:
        grouped = self._reader.get_field("llama.attention.head_count_kv") is not None
        return self._integer("attention.head_count_kv" if grouped else "attention.head_count")

    def _check_kind(self) -> None:
        architecture = self._get("general.architecture")
        if architecture not in self.ARCHITECTURES:
            raise ValueError(
                f"{self.path}: general.architecture is {architecture!r}; GGUF import supports "
                f"{', '.join(map(repr, self.ARCHITECTURES))}. Load the model's safetensors checkpoint instead"
            )
        if (parts := self._get("split.count", 1)) > 1:
            raise ValueError(f"{self.path} is one of {parts} parts; join them with llama-gguf-split --merge")
        if (experts := self._get("llama.expert_count", 0)) > 0:
            raise ValueError(f"{self.path}: a mixture of {experts} experts; load the model's safetensors instead")


_SPECIAL_TOKENS = {  # argument of a Hugging Face tokenizer: GGUF's word
    "bos_token": "bos",
    "eos_token": "eos",
    "unk_token": "unknown",
    "pad_token": "padding",
    "sep_token": "seperator",  # sic
    "mask_token": "mask",
}


# ---- Tokenizer rules -------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class PreTokenizer:
    """How a byte-level BPE cuts text before merging: `tokenizer.ggml.pre` names one of these."""

    steps: Sequence[pre_tokenizers.PreTokenizer]
    normalizer: normalizers.Normalizer | None = None
    ignore_merges: bool = False  # a piece that is a token as a whole is taken whole, whatever the merges say
    adds_bos: bool = False  # unless the file says otherwise


def _split(pattern: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Split(Regex(pattern), behavior="isolated")


_CONTRACTIONS = "'s|'t|'re|'ve|'m|'ll|'d"
_GPT2 = rf"{_CONTRACTIONS}| ?\p{{L}}+| ?\p{{N}}+| ?[^\s\p{{L}}\p{{N}}]+|\s+(?!\S)|\s+"
_GPT4 = (  # Llama 3 and Qwen2 differ in how many digits go together
    rf"(?i:{_CONTRACTIONS})|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}%s"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)

PRE_TOKENIZERS = {
    "gpt-2": PreTokenizer([_split(_GPT2), _BYTES]),
    "smollm": PreTokenizer([pre_tokenizers.Digits(individual_digits=True), _split(_GPT2), _BYTES]),
    "llama-bpe": PreTokenizer([_split(_GPT4 % "{1,3}"), _BYTES], ignore_merges=True, adds_bos=True),
    "qwen2": PreTokenizer([_split(_GPT4 % ""), _BYTES], normalizer=normalizers.NFC()),
    # Not a model's own: what llama.cpp applies to a file that names none.
    "default": PreTokenizer([*map(_split, (r"[\p{P}$+<=>^~|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]")), _BYTES]),
}


def _byte_level(tokens: Sequence[str], merges: list[tuple[str, str]], pre: PreTokenizer) -> Tokenizer:
    """GPT-2's kind of BPE: over bytes, each spelled as one printable character."""
    vocabulary = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=pre.ignore_merges))
    if pre.normalizer is not None:
        tokenizer.normalizer = pre.normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(list(pre.steps))
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(
    tokens: Sequence[str], merges: list[tuple[str, str]], unknown: str | None, space_prefix: bool
) -> Tokenizer:
    """SentencePiece's BPE: over characters, spaces written "▁", unknown characters as bytes <0x..>.

    The space in front is put there by the normalizer, before the text's own ones and after every special token, as
    SentencePiece, llama.cpp and Llama 2's tokenizer.json do.
    """
    vocabulary = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    )
    spaces = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces]) if space_prefix else spaces
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if space_prefix else steps)
    return tokenizer


def _merges_of_scores(tokens: Sequence[str], scores: Sequence[float], types: Sequence[int]) -> list[tuple[str, str]]:
    """The merges that scores imply: any two pieces that spell a third, the best-scored third first.

    Among the cuts of one piece, the longer left part comes first, as in Hugging Face's conversion of SentencePiece.
    """
    pieces = {t: s for t, s, type_ in zip(tokens, scores, types, strict=True) if type_ == TokenType.NORMAL}
    cuts = [(t[:i], t[i:]) for t in pieces for i in range(1, len(t)) if t[:i] in pieces and t[i:] in pieces]
    return sorted(cuts, key=lambda cut: (-pieces[cut[0] + cut[1]], -len(cut[0]), -len(cut[1])))


# ---- Details ---------------------------------------------------------------------------------------------------------


def _open(path: Path) -> gguf.GGUFReader:
    """The package's reader, whose errors name neither the file nor the mend."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    with path.open("rb") as file:
        magic = file.read(4)
    if magic != b"GGUF":
        raise ValueError(f"{path} is not a GGUF file: it starts with {magic!r}, expected b'GGUF'")
    try:
        reader = gguf.GGUFReader(path)
    except (ValueError, IndexError, KeyError, OverflowError, UnicodeDecodeError) as error:
        size = path.stat().st_size
        raise ValueError(f"{path} ({size} bytes) is truncated or corrupt ({error}); download it again") from error
    if reader.byte_order != "I":
        raise ValueError(f"{path} has the other byte order than this machine; convert it with gguf_convert_endian.py")
    return reader


def _unpermute(rows: np.ndarray, heads: int) -> np.ndarray:
    """Undo llama.cpp's order of the rows of q_proj and k_proj: [heads * head_dim, ...], same shape out.

    RoPE turns pairs of rows. llama.cpp keeps a pair side by side, Hugging Face keeps it half a head apart.
    """
    return rows.reshape(heads, -1, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def _llama3_scaling(divisors: np.ndarray, theta: float, head_dim: int) -> dict[str, Any] | None:
    """Llama 3's `rope_scaling` from what GGUF stores in its stead: a divisor per frequency, float32 [head_dim / 2].

    Only the largest divisor, `factor`, can be read off. The rest is the same in every published model: it is assumed,
    and the divisors that follow are compared with the file's. None if they differ.
    """
    scaling = {
        "rope_type": "llama3",
        "factor": _decimal(float(divisors.max())),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    frequencies = theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    turns = scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)  # within the original context
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    kept = np.clip((turns - low) / (high - low), 0.0, 1.0)  # the share of a frequency that is not scaled
    expected = 1.0 / ((1.0 - kept) / scaling["factor"] + kept)
    return (
        scaling if divisors.shape == expected.shape and np.allclose(divisors, expected, rtol=1e-4, atol=0.0) else None
    )


def _decimal(value: float) -> float:
    """The decimal that a float32 was written from: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))
