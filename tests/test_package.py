"""How the package is put together: what ships, who imports whom, and the name that we share with another package."""

import ast
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = {"jaxlora": "jaxlora", "jaxlora.kernels": "kernels", "jaxlora.converters": "converters"}
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


def test_kernels_import_nothing_of_the_library():
    kernels = [name for name in MODULES if name.startswith("jaxlora.kernels.")]
    assert kernels
    assert not offenders(kernels, lambda m: m.startswith("jaxlora.") and not m.startswith("jaxlora.kernels."))


def test_the_core_imports_no_converter():
    core = [name for name in MODULES if name.count(".") == 1 and name not in DOOR]
    assert core
    assert not offenders(core, lambda m: m.startswith("jaxlora.converters."))


def test_nothing_imports_torch_or_a_top_level_kernels():
    assert not offenders(MODULES, lambda m: m.startswith(("torch.", "kernels.", "converters.")))


def test_importing_the_library_leaves_torch_alone(tmp_path):
    assert run("import sys, jaxlora; print('torch' in sys.modules)", tmp_path) == "False\n"


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
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))

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
        archive.extractall(tmp_path)
    assert files == {name.replace(".", "/") + ".py" for name in MODULES} | {"jaxlora/py.typed"}

    code = "import jaxlora.kernels, jaxlora.converters; print(jaxlora.__file__, jaxlora.kernels.__path__[0])"
    assert run(code, tmp_path).split() == [f"{tmp_path}/jaxlora/__init__.py", f"{tmp_path}/jaxlora/kernels"]
