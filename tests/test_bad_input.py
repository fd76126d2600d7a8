"""What goes wrong at the door, one case at a time: Python gets an error of its kind, and a command line one line."""

import json
import re

import pytest
import safetensors.torch
import torch
from chat import make_chat_checkpoint

from jaxlora import cli
from jaxlora.converters.huggingface import CheckpointError

ROW = {"messages": [{"role": "user", "content": "one two"}, {"role": "assistant", "content": "three"}]}


@pytest.fixture
def folder(tmp_path):
    """A sound checkpoint in "model" and sound rows in "rows.jsonl", for a case to spoil."""
    make_chat_checkpoint(tmp_path / "model")
    (tmp_path / "rows.jsonl").write_text(json.dumps(ROW) + "\n")
    return tmp_path


# Each case spoils the folder, and may return flags to add or to replace.


def missing_directory(folder):
    return {"--model": folder / "nowhere"}


def not_a_checkpoint(folder):
    (folder / "empty").mkdir()
    return {"--model": folder / "empty"}


def truncated_safetensors(folder):
    path = folder / "model" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def a_shard_missing_from_the_index(folder):
    path = folder / "model" / "model.safetensors"
    path.rename(path.with_name("model-00001-of-00002.safetensors"))
    names = {"model.norm.weight": "model-00002-of-00002.safetensors"}
    (folder / "model" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))


def pickle_only(folder):
    (folder / "model" / "model.safetensors").unlink()
    torch.save({"model.norm.weight": torch.ones(48)}, folder / "model" / "pytorch_model.bin")


def change_config(folder, **fields):
    path = folder / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def unknown_model_type(folder):
    change_config(folder, model_type="gpt2")


def wrong_shapes(folder):
    path = folder / "model" / "model.safetensors"
    tensors = safetensors.torch.load_file(path)
    tensors["model.layers.1.mlp.up_proj.weight"] = torch.zeros(80, 47)
    safetensors.torch.save_file(tensors, path)


def rank_0(folder):
    return {"--r": 0}


def rank_of_a_half(folder):
    return {"--r": 2.5}


def unknown_target(folder):
    return {"--target-modules": "qproj"}


def empty_data_set(folder):
    (folder / "rows.jsonl").write_text("\n")


def a_row_with_the_wrong_keys(folder):
    (folder / "rows.jsonl").write_text(json.dumps(ROW) + "\n" + json.dumps({"question": "one", "answer": "two"}) + "\n")


def all_labels_masked(folder):
    row = {"input_ids": [3, 4, 5], "labels": [-100, -100, -100]}
    (folder / "rows.jsonl").write_text(json.dumps(row) + "\n")


def beyond_the_window(folder):
    return {"--max-length": 65}


def output_not_writable(folder):
    (folder / "file").touch()  # no permission stops root, but a file in the way does
    return {"--output": folder / "file" / "out"}


def merged_not_writable(folder):
    (folder / "file").touch()
    return {"--merged": folder / "file" / "merged"}


CASES = {
    missing_directory: (FileNotFoundError, r"nowhere: no such file or folder"),
    not_a_checkpoint: (CheckpointError, r"empty is not a checkpoint: it has no config\.json"),
    truncated_safetensors: (CheckpointError, r"model\.safetensors: .*download or copy it again"),
    a_shard_missing_from_the_index: (FileNotFoundError, r"names shards that are not there: model-00002-of-0"),
    pickle_only: (CheckpointError, r"pickle weights only \(pytorch_model\.bin\).*refused: convert them"),
    unknown_model_type: (ValueError, r"model_type 'gpt2' is not supported; supported are .*llama, .*mistral, .*qwen3"),
    wrong_shapes: (CheckpointError, r"1 misshapen: .*\.1\.mlp\.up_proj\.weight is \[80, 47\], expected \[80, 48\]"),
    rank_0: (ValueError, r"the rank r must be larger than 0, found 0"),
    rank_of_a_half: (ValueError, r"r: expected an integer, found '2\.5'"),
    unknown_target: (ValueError, r"'qproj' matches no linear layer.*names that exist: down_proj, .*q_proj, up_proj"),
    empty_data_set: (ValueError, r"rows\.jsonl: the file has no rows"),
    a_row_with_the_wrong_keys: (ValueError, r"rows\.jsonl:2: found .*\['answer', 'question'\]; expected 'messages'"),
    all_labels_masked: (ValueError, r"no token of the data set is supervised.*labels of -100"),
    beyond_the_window: (ValueError, r"max_length=65 is beyond the model's max_seq_length of 64 tokens: lower it"),
    output_not_writable: (OSError, r"output_dir .*file/out cannot be written to .*choose another folder"),
    merged_not_writable: (OSError, r"cannot save there .*choose a folder that can be written to: .*file/merged"),
}


@pytest.mark.parametrize("spoil", CASES, ids=lambda case: case.__name__)
def test_it_is_said_clearly(spoil, folder, capsys):
    error, message = CASES[spoil]
    flags = {"--model": folder / "model", "--data": folder / "rows.jsonl", "--output": folder / "out"}
    flags |= {"--max-seq-length": 64, "--max-steps": 1, "--r": 4} | (spoil(folder) or {})
    command = ["train", *(str(part) for pair in flags.items() for part in pair)]
    code = cli.main([*command, "--disable-tqdm"])
    *_, line = capsys.readouterr().err.splitlines()
    assert line.startswith("jaxlora train: error: ") and re.search(message, line), line
    assert code == (2 if spoil is rank_of_a_half else 1)  # what argparse would have refused too
    with pytest.raises(error, match=message):
        cli.main([*command, "--debug"])
