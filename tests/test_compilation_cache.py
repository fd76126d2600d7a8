"""Compiled programs that outlive their process."""

import json
import os
import subprocess
import sys

import jax
import pytest
from chat import make_chat_checkpoint

from jaxlora import cli
from jaxlora.compilation_cache import keep_compiled

# A command line, and how many programs it asked XLA for, and got out of the cache.
COUNT = """
import json, sys
import jax
from jaxlora import cli

counts = {}
jax.monitoring.register_event_listener(lambda event, **_: counts.update({event: counts.get(event, 0) + 1}))
assert cli.main(sys.argv[1:]) == 0
names = ("compile_requests_use_cache", "cache_hits")
print(json.dumps([counts.get(f"/jax/compilation_cache/{name}", 0) for name in names]))
"""


def count(home, *arguments):
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "HOME": str(home)}
    del environment["JAX_COMPILATION_CACHE_DIR"]
    command = [sys.executable, "-P", "-c", COUNT, *map(str, arguments)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def training(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache")
    model, data = make_chat_checkpoint(folder / "model"), folder / "rows.jsonl"
    data.write_text(json.dumps({"text": "one two three four"}) + "\n")
    few = "--max-seq-length 32 --r 4 --max-steps 2 --per-device-train-batch-size 1 --disable-tqdm".split()
    return ["train", "--model", model, "--data", data, "--output", folder / "out", *few]


def test_a_second_process_compiles_nothing(training, tmp_path):
    asked, found = count(tmp_path, *training)
    assert asked > 20 and found < asked
    again, found = count(tmp_path, *training)
    assert again == found > 20
    assert any((tmp_path / ".cache" / "jaxlora" / "compiled").glob("*-cache"))
    assert count(tmp_path, *training, "--compilation-cache", "none")[1] == 0


def test_a_folder_that_jax_was_told_of_stays(tmp_path):
    before = jax.config.jax_compilation_cache_dir
    assert before is not None  # of the tests
    keep_compiled()
    keep_compiled(None)
    assert jax.config.jax_compilation_cache_dir == before


def test_a_folder_that_cannot_be_made_is_one_line(training, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert cli.main([*map(str, training), "--compilation-cache", str(tmp_path / "file" / "cache")]) == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and str(tmp_path / "file" / "cache") in err and "name another, or none" in err
