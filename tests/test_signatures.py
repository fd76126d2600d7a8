"""The two signatures that users of Unsloth have in their fingers: nothing of them is missing, and nothing unread."""

import ast
import inspect
import re
import textwrap
from pathlib import Path

import pytest

from jaxlora import FastLanguageModel

# Names and defaults of Unsloth's `FastLanguageModel` in August 2026, with the options that its **kwargs hand on.
FROM_PRETRAINED = {
    "model_name": "unsloth/Llama-3.2-1B-Instruct",
    "max_seq_length": 2048,
    "dtype": None,
    "load_in_4bit": True,
    "load_in_8bit": False,
    "load_in_16bit": False,
    "load_in_fp8": False,
    "full_finetuning": False,
    "token": None,
    "device_map": "sequential",
    "rope_scaling": None,
    "fix_tokenizer": True,
    "trust_remote_code": False,
    "use_gradient_checkpointing": "unsloth",
    "resize_model_vocab": None,
    "revision": None,
    "use_exact_model_name": False,
    "offload_embedding": False,
    "float32_mixed_precision": None,
    "fast_inference": False,
    "gpu_memory_utilization": 0.5,
    "float8_kv_cache": False,
    "random_state": 3407,
    "max_lora_rank": 64,
    "disable_log_stats": True,
    "qat_scheme": None,
    "unsloth_tiled_mlp": False,
    "text_only": False,
    "quantization_config": None,
    "cache_dir": None,
    "local_files_only": False,
}
GET_PEFT_MODEL = {
    "r": 16,
    "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "lora_alpha": 16,
    "lora_dropout": 0.0,
    "bias": "none",
    "layers_to_transform": None,
    "layers_pattern": None,
    "finetune_last_n_layers": None,
    "use_gradient_checkpointing": "unsloth",
    "random_state": 3407,
    "max_seq_length": 2048,
    "use_rslora": False,
    "modules_to_save": None,
    "init_lora_weights": True,
    "loftq_config": {},
    "temporary_location": "_unsloth_temporary_saved_buffers",
    "qat_scheme": None,
    "target_parameters": None,
    "ensure_weight_tying": False,
    "use_dora": False,
    "rank_pattern": {},
    "alpha_pattern": {},
    "exclude_modules": None,
}
# What is being added. Nothing else may be missing, and what is there may not stay here.
TO_COME = {
    "from_pretrained": set(),
    "get_peft_model": set(),
}
# Defaults that are others here, on purpose: docs/arguments.md says why. (No mapping is {} here, so None stands for it.)
OTHER_DEFAULTS = {
    "from_pretrained": {"model_name": inspect.Parameter.empty, "max_seq_length": None, "load_in_4bit": None},
    "get_peft_model": {
        "loftq_config": None,
        "rank_pattern": None,
        "alpha_pattern": None,
        "max_seq_length": None,
        "temporary_location": None,
    },  # fmt: skip
}

REFERENCES = {"from_pretrained": FROM_PRETRAINED, "get_peft_model": GET_PEFT_MODEL}
SKIPPED = {"model", "unknown"}  # what is worked on, and **unknown, which is refused


def parameters(name):
    """{name: default} of one of our functions."""
    signature = inspect.signature(getattr(FastLanguageModel, name))
    return {p.name: p.default for p in signature.parameters.values() if p.name not in SKIPPED}


def plain(value):
    return list(value) if isinstance(value, tuple) else value


@pytest.mark.parametrize("name", REFERENCES)
def test_no_argument_is_missing(name):
    ours, reference, to_come = parameters(name), REFERENCES[name], TO_COME[name]
    assert set(reference) - set(ours) == to_come
    expected = {**reference, **OTHER_DEFAULTS[name]}
    found = {argument: plain(default) for argument, default in ours.items() if argument in reference}
    assert found == {argument: expected[argument] for argument in found}


@pytest.mark.parametrize("name", REFERENCES)
def test_no_argument_is_unread(name):
    source = textwrap.dedent(inspect.getsource(getattr(FastLanguageModel, name)))
    (function,) = ast.parse(source).body
    read = {node.id for node in ast.walk(ast.Module(function.body, [])) if isinstance(node, ast.Name)}
    assert set(parameters(name)) - read == set()


# ---- docs/arguments.md -----------------------------------------------------------------------------------------------

PROSE = {"the seven projections of a block": GET_PEFT_MODEL["target_modules"], "none": inspect.Parameter.empty}


def table(name):
    """[(argument, default)] of the table under the function's heading."""
    text = (Path(__file__).parents[1] / "docs" / "arguments.md").read_text()
    section = text.split(f"## `FastLanguageModel.{name}`\n")[1].split("\n## ")[0]
    rows = re.findall(r"^\| `(\w+)` \| (.*?) \|", section, re.MULTILINE)
    return [(name, PROSE[text] if text in PROSE else ast.literal_eval(text.strip("`"))) for name, text in rows]


@pytest.mark.parametrize("name", REFERENCES)
def test_the_table_is_the_signature(name):
    rows = table(name)
    assert len(rows) == len(dict(rows))
    assert dict(rows) == {argument: plain(default) for argument, default in parameters(name).items()}


def test_every_argument_is_explained_where_it_is():
    for name in REFERENCES:
        documented = inspect.getdoc(getattr(FastLanguageModel, name)) or ""
        missing = [argument for argument in parameters(name) if not re.search(rf"^ +{argument}: ", documented, re.M)]
        assert not missing
