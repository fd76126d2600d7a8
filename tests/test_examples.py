"""What we show to others runs: the scripts of examples/ and the Python of README.md."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from chat import WORDS, make_chat_checkpoint

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_chat_checkpoint(tmp_path_factory.mktemp("base"))


def run(script, *arguments, cwd):
    """The output of a script, run as somebody would: JAX's own defaults, warnings and all."""
    environ = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUMPY_DTYPE_PROMOTION": "standard"}
    command = [sys.executable, ROOT / "examples" / script, *map(str, arguments)]
    result = subprocess.run(command, cwd=cwd, env=environ, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_research_script_teaches_each_adapter_its_own_language(tmp_path):
    out = run("research.py", "--steps", 30, cwd=tmp_path)
    # r (in + out) of the 7 linears, r = 8: q, o 64+64; k, v 64+32; gate, up, down 64+128; in 2 layers
    assert f"trainable params: {2 * 8 * (2 * 128 + 2 * 96 + 3 * 192):,d} " in out
    (own, others), (others_too, own_too) = [
        [float(x.strip("% ")) for x in line.split()] for line in out.splitlines()[-2:]
    ]
    assert min(own, own_too) > 95 and max(others, others_too) < 10


def test_research_script_takes_a_checkpoint_and_quantises_it(checkpoint, tmp_path):
    out = run("research.py", "--model", checkpoint, "--steps", 12, cwd=tmp_path)
    assert "step   11   by +1:" in out and out.count("%") == 5  # of trainable parameters, and the table


def test_train_script_writes_adapter_merged_model_and_answer(checkpoint, tmp_path):
    out = run(
        "train.py", "--model", checkpoint, "--output", tmp_path, "--max-steps", 2, "--max-seq-length", 256, cwd=tmp_path
    )
    assert "trainable params: " in out
    for file in ("adapter/adapter_model.safetensors", "merged/model.safetensors", "metrics.jsonl", "loss.png"):
        assert (tmp_path / file).stat().st_size > 0


def test_the_python_of_the_readme_runs(checkpoint, tmp_path, monkeypatch, capsys, standard_promotion):
    """All blocks in one namespace, on a tiny checkpoint and for two steps."""
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    assert len(blocks) == 5
    code = "\n".join(blocks)
    for shown, here in {
        '"Qwen/Qwen3-0.6B"': repr(str(checkpoint)),
        "max_seq_length=2048": "max_seq_length=64",
        "max_steps=100": "max_steps=2",
        '"2 + 2?"': '"one two"',
        '"4"': '"three"',
    }.items():
        assert shown in code
        code = code.replace(shown, here)
    names = {}
    exec(compile(code, "README.md", "exec"), names)
    assert names["logits"].shape == (1, 6, len(WORDS))
    assert [1 <= len(answer.outputs[0].token_ids) <= 32 for answer in names["answers"]] == [True, True]
    assert float(names["metrics"]["num_tokens"]) == 5
    for file in ("out/metrics.jsonl", "out/loss.png", "out/checkpoint-2", "adapter/adapter_config.json", "merged"):
        assert (tmp_path / file).exists(), file


def test_what_is_to_be_in_the_readme():
    readme = (ROOT / "README.md").read_text()
    for command in ("make quickstart", "make test", "'.[cuda12]'", "'.[cuda13]'", "pip install .", "jaxlora train "):
        assert command in readme
    assert {"Install", "Five lines", "The same model in JAX", "What works", "Beside Unsloth", "Limits"} <= set(
        re.findall(r"^## (.*)$", readme, re.MULTILINE)
    )


def test_the_files_that_the_readme_links_are_there():
    links = re.findall(r"\]\(([^)#:]+)\)", (ROOT / "README.md").read_text())
    assert len(links) > 5 and all((ROOT / link).exists() for link in links)
