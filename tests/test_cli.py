"""The command line: every option explained, errors in one line, and each command the same as its Python."""

import dataclasses
import json
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import transformers
import yaml
from chat import make_chat_checkpoint
from safetensors.numpy import load_file

import jaxlora
from jaxlora import FastLanguageModel, SFTConfig, SFTTrainer, cli, options
from jaxlora.options import Option, OptionError


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_chat_checkpoint(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    turns = [("one two", "three"), ("four five", "six"), ("seven eight", "nine"), ("two three", "four")]
    rows = [
        {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]}
        for asked, answer in turns
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


TRAINING = "--max-seq-length 32 --r 4 --max-steps 2 --learning-rate 1e-2 --per-device-train-batch-size 2 --disable-tqdm"
FEW = [*TRAINING.split(), "--assistant-only-loss"]


@pytest.fixture(scope="module")
def trained(checkpoint, data, tmp_path_factory):
    """The folder of a run of `jaxlora train`, with the merged model in "merged"."""
    folder = tmp_path_factory.mktemp("trained")
    command = ["train", "--model", str(checkpoint), "--data", str(data), "--output", str(folder / "out"), *FEW]
    assert cli.main([*command, "--eval-data", str(data), "--merged", str(folder / "merged")]) == 0
    return folder


def fails(capsys, arguments, code):
    """The one line on stderr of a command that fails."""
    try:
        found = cli.main(arguments)
    except SystemExit as exit:
        found = exit.code
    out, err = capsys.readouterr()
    assert found == code, err
    assert err.count("\n") == 1 and err.startswith("jaxlora"), err
    return err


# ---- Options


@pytest.mark.parametrize("name", list(cli.COMMANDS))
def test_help_explains_every_option_and_its_default(name, capsys):
    with pytest.raises(SystemExit) as exit:
        cli.main([name, "--help"])
    assert exit.value.code == 0
    out = capsys.readouterr().out
    shown, unbroken = " ".join(out.split()), "".join(out.split())
    for option in cli.COMMANDS[name].options:
        assert len(option.help) > 8
        assert f"{option.flag} " in shown or f"{option.flag}, " in shown
        assert "".join(option.help.split())[1:] in unbroken, option.name  # the first letter is a capital there
    assert "--config FILE" in shown and "--debug" in shown
    defaults = shown.count("(default: ") + shown.count("(required)")
    assert defaults == len(cli.COMMANDS[name].options)


def test_the_commands_are_listed(capsys):
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert all(f" {name} {command.help}" in shown for name, command in cli.COMMANDS.items())


def test_every_field_of_sftconfig_is_a_flag_of_train():
    names = {option.name for option in cli.COMMANDS["train"].options}
    assert set(SFTConfig.__dataclass_fields__) - {"output_dir"} <= names
    assert {"r", "lora_alpha", "load_in_4bit", "max_seq_length", "use_gradient_checkpointing"} <= names


@dataclass
class Sample:
    rate: float = field(default=0.5, metadata={"help": "A rate."})
    count: int | None = field(default=None, metadata={"help": "A count."})
    either: bool | str = field(default=True, metadata={"help": "A switch or a name."})
    kind: Literal["a", "b"] = field(default="a", metadata={"help": "A kind."})
    names: tuple[str, ...] | str = field(default=("x", "y"), metadata={"help": "Names."})
    scaling: dict | None = field(default=None, metadata={"help": "A mapping."})
    layers: tuple[int | str, ...] | int = field(default=(), metadata={"help": "Layers."})
    anything: Any = field(default=None, metadata={"help": "Anything."})


SAMPLE = {option.name: option for option in options.from_dataclass(Sample)}


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("rate", "1e-4", 1e-4),
        ("rate", "3", 3.0),
        ("count", "3", 3),
        ("count", "none", None),
        ("either", "False", False),
        ("either", "offload", "offload"),
        ("kind", "b", "b"),
        ("scaling", '{"rope_type": "yarn"}', {"rope_type": "yarn"}),
        ("anything", "bfloat16", "bfloat16"),
    ],
)
def test_texts_become_values(name, text, value):
    found = SAMPLE[name].parse(text)
    assert found == value and type(found) is type(value)
    assert SAMPLE[name].check(text) == value  # as a quoted string of a YAML file


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("rate", "fast", "rate: expected a number, found 'fast'"),
        ("count", "1.5", "count: expected an integer or none, found '1.5'"),
        ("kind", "c", "kind: expected one of a, b, found 'c'"),
        ("scaling", "[1]", "scaling: expected a JSON object or none, found '[1]'"),
    ],
)
def test_texts_that_are_no_values(name, text, expected):
    with pytest.raises(OptionError, match="^" + expected.replace("[", r"\[")):
        SAMPLE[name].parse(text)


def test_flags_override_the_file_and_yaml_numbers_are_read(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("rate: 1e-4\ncount: 7\nnames: [p, q]\neither: false\n")  # YAML reads 1e-4 as text
    found = options.gather(list(SAMPLE.values()), {"count": "8", "debug": True}, path)
    assert found == {"rate": 1e-4, "count": 8, "names": ["p", "q"], "either": False}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("counts: 7", "there is no option 'counts'; the nearest is 'count'"),
        ("rate: [1]", "rate: expected a number, found [1]"),
        ("rate: true", "rate: expected a number, found True"),
        ("- rate", "expected names and values of options, found list"),
        ("rate: [", "is not YAML"),
    ],
)
def test_errors_of_a_file_name_it(tmp_path, text, expected):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(OptionError) as error:
        options.gather(list(SAMPLE.values()), {}, path)
    assert str(path) in str(error.value) and expected in str(error.value)


def test_a_list_has_values_of_its_kind():
    given = {"names": ["p", "3"], "layers": ["2", "x"]}
    assert options.gather(list(SAMPLE.values()), given) == {"names": ["p", "3"], "layers": [2, "x"]}


def test_an_option_without_default_must_be_given():
    with pytest.raises(OptionError, match="--model must be given"):
        options.gather([Option(name="model", annotation=str, help="The model.")], {})


# ---- Errors


def test_usage_errors_are_one_line_and_exit_2(capsys, tmp_path):
    assert "invalid choice: 'tarin'" in fails(capsys, ["tarin"], 2)
    assert "--model, --data, --output must be given" in fails(capsys, ["train"], 2)
    assert "unrecognized arguments: --ranks 3" in fails(capsys, ["train", "--ranks", "3"], 2)
    assert "r: expected an integer, found 'two'" in fails(capsys, ["train", "--r", "two"], 2)
    path = tmp_path / "run.yaml"
    path.write_text("learning_rat: 1\n")
    assert "the nearest is 'learning_rate'" in fails(capsys, ["train", "--config", str(path)], 2)
    assert "either --prompt or --messages" in fails(capsys, ["generate", "--model", "x"], 2)


def test_failures_are_one_line_and_exit_1(capsys, checkpoint, data, tmp_path):
    out = ["--output", str(tmp_path / "out")]
    missing = str(tmp_path / "nothing")
    assert missing in fails(capsys, ["train", "--model", missing, "--data", str(data), *out], 1)
    assert missing in fails(capsys, ["train", "--model", str(checkpoint), "--data", missing, *out], 1)
    assert missing in fails(capsys, ["train", "--config", missing], 1)
    assert missing in fails(capsys, ["generate", "--model", missing, "--prompt", "one"], 1)
    assert "has no adapter" in fails(capsys, ["export", "--model", str(checkpoint), *out], 1)
    assert missing in fails(capsys, ["quickstart", "--data", missing], 1)
    assert not (tmp_path / "out" / "adapter_config.json").exists()


def test_debug_shows_where_an_error_comes_from(tmp_path):
    missing = str(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match="nothing"):
        cli.main(["generate", "--debug", "--model", missing, "--prompt", "one"])


def test_the_console_script_and_its_exit_codes(tmp_path):
    script = Path(sys.executable).with_name("jaxlora")
    for arguments, code, text in [
        (["--version"], 0, f"jaxlora {jaxlora.__version__}\n"),
        (["generate", "--model", "nowhere/at/all", "--prompt", "x"], 1, "nowhere/at/all: no such file or folder\n"),
    ]:
        result = subprocess.run([script, *arguments], capture_output=True, text=True, cwd=tmp_path)
        assert result.returncode == code
        assert (result.stdout + result.stderr).endswith(text) and (result.stdout + result.stderr).count("\n") == 1


def test_an_interrupt_is_one_line_and_exit_130(capsys, monkeypatch):
    def interrupted(values):
        raise KeyboardInterrupt

    command = dataclasses.replace(cli.COMMANDS["generate"], run=interrupted)
    monkeypatch.setitem(cli.COMMANDS, "generate", command)
    assert fails(capsys, ["generate", "--model", "x"], 130) == "jaxlora generate: interrupted\n"


# ---- Commands


def test_train_writes_what_the_same_python_writes(checkpoint, data, trained, tmp_path):
    model, tokenizer = FastLanguageModel.from_pretrained(checkpoint, max_seq_length=32)
    model = FastLanguageModel.get_peft_model(model, r=4)
    SFTTrainer(
        model=model,
        processing_class=tokenizer,
        train_dataset=data,
        args=SFTConfig(
            output_dir=tmp_path / "run", max_steps=2, learning_rate=1e-2, per_device_train_batch_size=2,
            disable_tqdm=True, assistant_only_loss=True,
        ),
    ).train()  # fmt: skip
    model.save_pretrained(tmp_path / "adapter")
    expected = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    found = load_file(trained / "out" / "adapter_model.safetensors")
    assert found.keys() == expected.keys()
    assert all(np.array_equal(found[name], expected[name]) for name in found)
    assert any(np.abs(found[name]).max() > 1e-3 for name in found if "lora_B" in name)  # it did learn
    assert {"metrics.jsonl", "loss.png", "tokenizer.json"} <= {path.name for path in (trained / "out").iterdir()}


def test_train_from_a_file_of_options(checkpoint, data, trained, tmp_path):
    path = tmp_path / "run.yaml"
    settings = dict(
        model=str(checkpoint), data=[str(data)], output=str(tmp_path / "out"), max_seq_length=32, r=4, max_steps=7,
        learning_rate="1e-2", per_device_train_batch_size=2, disable_tqdm=True, assistant_only_loss=True,
        target_modules="all-linear",
    )  # fmt: skip
    path.write_text(yaml.safe_dump(settings))
    assert cli.main(["train", "--config", str(path), "--max-steps", "2"]) == 0
    one, other = (load_file(f / "out" / "adapter_model.safetensors") for f in (tmp_path, trained))
    assert all(np.array_equal(one[name], other[name]) for name in one)


def test_train_over_a_mesh_writes_what_one_device_writes(checkpoint, data, trained, tmp_path, capsys):
    command = ["train", "--model", str(checkpoint), "--data", str(data), "--output", str(tmp_path / "out"), *FEW]
    rows = ["--per-device-train-batch-size", "1", "--device-map", "fsdp=2,tensor=2"]
    assert cli.main([*command, *rows, "--merged", str(tmp_path / "merged")]) == 0
    for name in ("out/adapter_model.safetensors", "merged/model.safetensors"):
        ours, theirs = load_file(tmp_path / name), load_file(trained / name)
        assert ours.keys() == theirs.keys()
        for key, value in theirs.items():
            x, y = (x.astype(np.float32) for x in (ours[key], value))
            assert np.linalg.norm(x - y) < 2e-2 * np.linalg.norm(y), (name, key)
    assert "'layers=2' is not one of data, fsdp, tensor" in fails(capsys, [*command, "--device-map", "layers=2"], 1)


def test_an_adapter_goes_on_training(trained, data, tmp_path, capsys):
    command = ["train", "--model", str(trained / "out"), "--data", str(data), "--output", str(tmp_path), *FEW]
    command = [part for part in command if part not in ("--r", "4")]
    assert cli.main(command) == 0
    assert "2 steps, mean loss" in capsys.readouterr().out
    before, after = (load_file(folder / "adapter_model.safetensors") for folder in (trained / "out", tmp_path))
    assert before.keys() == after.keys()
    assert any(not np.array_equal(before[name], after[name]) for name in before)


def continuation(folder, words):
    """What transformers says, greedily, with the folder's own weights."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    messages = [{"role": "user", "content": words}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    new = model.generate(**ids, max_new_tokens=6, do_sample=False)[0, ids["input_ids"].shape[1] :]
    return tokenizer.decode(new, skip_special_tokens=True).strip()


def test_generate_says_what_transformers_says(trained, capsys, tmp_path):
    merged = str(trained / "merged")
    command = ["generate", "--model", merged, "--load-in-16bit", "--max-new-tokens", "6"]
    prompts = ["one two", "four five", "red", "six seven eight", "white nine", "blue ten black"]
    assert cli.main([*command, "--prompt", *prompts]) == 0
    expected = [continuation(merged, prompt) for prompt in prompts]
    assert any(expected)  # a random model may stop at once, but not after every prompt
    assert capsys.readouterr().out.rstrip("\n") == "\n\n".join(expected).rstrip("\n")
    path = tmp_path / "messages.json"
    path.write_text(json.dumps([{"role": "user", "content": prompts[0]}]))
    assert cli.main([*command, "--messages", str(path)]) == 0
    assert capsys.readouterr().out.rstrip("\n") == expected[0]


def test_export_writes_what_train_merged(trained, tmp_path, capsys):
    """From the adapter alone: the base is found by its name, and the files are the same to the byte."""
    assert cli.main(["export", "--model", str(trained / "out"), "--output", str(tmp_path / "merged")]) == 0
    assert "21 weights merged" in capsys.readouterr().out  # 7 linears in each of 3 layers
    one, other = (f / "merged" / "model.safetensors" for f in (trained, tmp_path))
    assert one.read_bytes() == other.read_bytes()
    command = [
        "export",
        "--model",
        str(trained / "out"),
        "--output",
        str(tmp_path / "adapter"),
        "--save-method",
        "lora",
    ]
    assert cli.main(command) == 0
    one, other = (f / "adapter_model.safetensors" for f in (trained / "out", tmp_path / "adapter"))
    assert one.read_bytes() == other.read_bytes()


def test_train_and_export_a_model_of_which_every_weight_learns(checkpoint, data, tmp_path, capsys):
    command = ["train", "--model", str(checkpoint), "--data", str(data), "--output", str(tmp_path / "out"), *FEW]
    command = [part for part in command if part not in ("--r", "4")]
    assert cli.main([*command, "--full-finetuning", "--merged", str(tmp_path / "merged")]) == 0
    assert "trainable%: 100.0000" in capsys.readouterr().out
    base, merged = (load_file(folder / "model.safetensors") for folder in (checkpoint, tmp_path / "merged"))
    assert base.keys() == merged.keys()
    assert all(not np.array_equal(base[name], merged[name]) for name in base if "proj" in name)
