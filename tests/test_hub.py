"""Models by their id on the hub: what is fetched, what is kept, and what is said when it cannot be had."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from helpers import make_checkpoint, random_ids, randomise_adapters
from hub import Hub, Repo, commit
from huggingface_hub import constants

from jaxlora import FastLanguageModel
from jaxlora.hub import resolve_path

pytestmark = pytest.mark.filterwarnings("ignore:.*has no tokenizer files:UserWarning")

NAME = "house/tiny"


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """The stand-in, as huggingface_hub sees it when HF_ENDPOINT and HF_HUB_CACHE are set before it is imported."""
    with Hub() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.delenv("HF_TOKEN", raising=False)
        yield hub


@pytest.fixture
def folder(tmp_path):
    make_checkpoint("llama", tmp_path / "repo")
    return tmp_path / "repo"


def load(name, **options):
    return FastLanguageModel.from_pretrained(name, **{"dtype": "float32", "load_in_16bit": True, **options})[0]


def logits(model):
    return np.asarray(model(jnp.asarray(random_ids(1, 8))))


def small_files(folder):
    """A repository with nothing that takes time: names are all that `resolve_path` looks at."""
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(bytes(1000))
    return folder


def test_a_model_by_its_id_is_the_one_in_the_folder(hub, folder):
    hub.add(NAME, folder)
    model = load(NAME)
    assert np.array_equal(logits(model), logits(load(folder)))
    assert model.name_or_path == NAME and Path(model.base_folder).name == commit(folder)
    assert hub.fetched() == ["config.json", "generation_config.json", "model.safetensors"]


def test_the_second_load_fetches_nothing(hub, folder):
    hub.add(NAME, folder)
    first = resolve_path(NAME)
    hub.requests.clear()
    assert resolve_path(NAME) == first and hub.fetched() == []
    hub.requests.clear()
    assert resolve_path(NAME, local_files_only=True) == first and hub.requests == []


def test_only_one_copy_of_the_weights_is_fetched(hub, tmp_path):
    make_checkpoint("llama", tmp_path / "repo", max_shard_size="60KB")
    shards = sorted(path.name for path in (tmp_path / "repo").glob("model-*.safetensors"))
    assert len(shards) > 1
    for other in ("pytorch_model.bin", "consolidated.safetensors", "original/model.safetensors", "model.gguf", "a.pth"):
        (tmp_path / "repo" / other).parent.mkdir(exist_ok=True)
        (tmp_path / "repo" / other).write_bytes(b"another copy")
    (tmp_path / "repo" / "original/params.json").write_text("{}")
    (tmp_path / "repo" / "modeling_tiny.py").write_text("raise SystemExit")
    hub.add(NAME, tmp_path / "repo")
    load(NAME)
    others = ["config.json", "generation_config.json", "model.safetensors.index.json"]
    assert hub.fetched() == sorted(shards + others)


def test_a_revision(hub, tmp_path):
    make_checkpoint("llama", tmp_path / "old")
    make_checkpoint("llama", tmp_path / "new", rms_norm_eps=0.5)
    hub.repos[NAME] = Repo(revisions={"main": tmp_path / "new", "v1": tmp_path / "old", "refs/pr/7": tmp_path / "old"})
    old = load(NAME, revision="v1")
    assert old.revision == "v1" and np.array_equal(logits(old), logits(load(tmp_path / "old")))
    assert not np.array_equal(logits(old), logits(load(NAME)))
    for same in ("refs/pr/7", commit(tmp_path / "old")):
        assert resolve_path(NAME, revision=same) == Path(old.base_folder)
    with pytest.raises(FileNotFoundError, match=f"^{NAME} has no revision 'v2': see the branches and tags at http"):
        resolve_path(NAME, revision="v2")


def test_a_push_changes_the_model_and_keeps_the_files_that_it_did_not_touch(hub, folder):
    hub.add(NAME, folder)
    first = resolve_path(NAME)
    hub.requests.clear()
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 3}))
    assert resolve_path(NAME) != first
    assert hub.fetched() == ["generation_config.json"]


def test_the_folder_of_the_cache(hub, tmp_path):
    hub.add(NAME, small_files(tmp_path / "repo"))
    assert resolve_path(NAME, cache_dir=tmp_path / "mine").is_relative_to(tmp_path / "mine")
    with pytest.raises(FileNotFoundError, match="not, or not wholly, in Hugging Face's cache, while local_files_only"):
        resolve_path(NAME, local_files_only=True)  # it looks into the other cache


def test_a_private_repository_and_its_token(hub, tmp_path):
    hub.add(NAME, small_files(tmp_path / "repo"), private="secret")
    missing = f"^{NAME}: no such folder, and no repository of that name on http.*, or a private one: check the spelling"
    for options in ({}, {"token": "another"}, {"token": False}):
        with pytest.raises(FileNotFoundError, match=missing):
            resolve_path(NAME, **options)
    with pytest.raises(FileNotFoundError, match=missing.replace(NAME, "house/tinny")):
        resolve_path("house/tinny", token="secret")
    hub.requests.clear()
    resolve_path(NAME, token="secret")
    assert {request.token for request in hub.requests} == {"secret"}
    with pytest.raises(PermissionError, match=f"^{NAME}: the hub refused the token .status 401.*hf auth login"):
        resolve_path(NAME, token="revoked", cache_dir=tmp_path / "empty")


@pytest.mark.parametrize("token", [None, "somebody"])
def test_a_gated_repository(hub, tmp_path, token):
    hub.add(NAME, small_files(tmp_path / "repo"), gated="accepted")
    message = f"^{NAME} is gated: accept its licence at {hub.endpoint}/{NAME}, and then log in with `hf auth login`, or"
    with pytest.raises(PermissionError, match=message):
        resolve_path(NAME, token=token)
    assert (resolve_path(NAME, token="accepted") / "model.safetensors").exists()


def test_a_download_that_breaks_off_goes_on_where_it_was(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 100)  # what has arrived is kept in chunks of 10 MB
    content = np.random.default_rng(0).bytes(1000)
    (small_files(tmp_path / "repo") / "model.safetensors").write_bytes(content)
    hub.add(NAME, tmp_path / "repo")
    hub.break_off["model.safetensors"] = 2
    assert (resolve_path(NAME) / "model.safetensors").read_bytes() == content
    starts = [r.range for r in hub.requests if r.method == "GET" and r.path.endswith("model.safetensors")]
    assert starts == [None, "bytes=500-", "bytes=700-"]


def test_a_download_that_never_ends_well_keeps_the_complete_files(hub, tmp_path, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    hub.add(NAME, small_files(tmp_path / "repo"))
    (tmp_path / "repo" / "model.safetensors").write_bytes(b"x")  # half of one byte is nothing, so it never goes on
    hub.break_off["model.safetensors"] = 100
    with pytest.raises(ConnectionError, match=f"^{NAME}: the download broke off .*: try again; files that are"):
        resolve_path(NAME)
    hub.break_off.clear()
    hub.requests.clear()
    resolve_path(NAME)
    assert hub.fetched() == ["model.safetensors"]


@pytest.mark.parametrize(
    "file, message",
    [
        ("pytorch_model.bin", "holds pickle weights only .pytorch_model.bin., which can run code when read, and"),
        ("tiny.Q4_0.gguf", "holds GGUF files only .tiny.Q4_0.gguf.: fetch one with `hf download house/tiny tiny.Q4_0"),
        ("README.md", "holds neither model.safetensors nor an index of its parts nor an adapter; it has README.md"),
    ],
)
def test_a_repository_without_weights_that_are_read(hub, tmp_path, file, message):
    small_files(tmp_path / "repo")
    (tmp_path / "repo" / "model.safetensors").rename(tmp_path / "repo" / file)
    hub.add(NAME, tmp_path / "repo")
    with pytest.raises(ValueError, match=f"^{NAME} {message}"):
        resolve_path(NAME)
    assert hub.fetched() == ["config.json"]


def test_an_adapter_by_its_id_finds_its_base_by_its_own(hub, folder, tmp_path):
    hub.add(NAME, folder)
    model = FastLanguageModel.get_peft_model(load(NAME), r=4)
    randomise_adapters(model)
    model.save_pretrained(tmp_path / "adapter")
    (tmp_path / "adapter" / "optimizer.pt").write_bytes(b"not asked for")
    hub.add("house/adapter", tmp_path / "adapter")
    hub.requests.clear()
    again = load("house/adapter")
    assert hub.fetched() == ["adapter_config.json", "adapter_model.safetensors"]  # the base is in the cache
    assert again.name_or_path == NAME and again.lora_config.r == 4
    assert np.array_equal(logits(again), logits(model))


def test_nobody_answers(hub, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(ConnectionError, match=f"^{NAME}: no such folder, not in the cache, and http://127.0.0.1:1"):
        resolve_path(NAME)


def test_the_switches_of_huggingface_hub(hub, folder, tmp_path):
    """From another process, which huggingface_hub reads the environment in when it is imported."""
    hub.add(NAME, folder, private="secret")
    code = f"""
import warnings
from jaxlora import FastLanguageModel
warnings.simplefilter("ignore")
model, _ = FastLanguageModel.from_pretrained("{NAME}", load_in_16bit=True)
print(model.get_nb_trainable_parameters()[1])
"""

    def run(**switches):
        environment = {**os.environ, "HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "home"), **switches}
        return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)

    offline = run(HF_HUB_OFFLINE="1")
    assert f"{NAME}: no such folder, and not, or not wholly, in Hugging Face's cache, while HF_HUB_OFFLINE" in (
        offline.stderr
    )
    assert hub.requests == []
    online = run(HF_HUB_OFFLINE="0", HF_TOKEN="secret")
    assert online.returncode == 0, online.stderr
    assert {request.token for request in hub.requests if NAME in request.path} == {"secret"}
    hub.requests.clear()
    again = run(HF_HUB_OFFLINE="1")
    assert again.stdout == online.stdout and hub.requests == []
