"""What every test runs under, settled before JAX starts and before jaxlora is first imported.

On the CPU by default, as eight devices: a test that wants a mesh makes one, and the others run on the first device.
`pytest -m gpu` leaves the platform alone and insists on a GPU.
"""

import os
import re

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"  # torch; two workers with a pool each would fight for the cores

import jax
import jaxlib
import jaxtyping
import pytest

jaxtyping.install_import_hook("jaxlora", "checked.checked")
# A script run by a test starts JAX itself. It inherits the environment, not this configuration.
os.environ["JAX_NUMPY_DTYPE_PROMOTION"] = "strict"
jax.config.update("jax_numpy_dtype_promotion", "strict")


# Most of a test's time is XLA's, which compiles a program to run it once: these take two thirds of that time away.
# Another choice of XLA_FLAGS comes first, and a script run by a test inherits this one.
QUICK_TO_COMPILE = "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"
if jaxlib.version.__version_info__ < (0, 11):  # later ones do not know it, and an unknown flag ends the process
    QUICK_TO_COMPILE += " --xla_cpu_use_fusion_emitters=false"


def wants_gpu(config: pytest.Config) -> bool:
    return re.search(r"(?<!not )\bgpu\b", config.option.markexpr) is not None


def pytest_configure(config):
    if wants_gpu(config):
        if jax.default_backend() != "gpu":
            pytest.exit(f"-m gpu was asked for, and JAX runs on the {jax.default_backend()}", returncode=1)
        return
    os.environ.setdefault("XLA_FLAGS", QUICK_TO_COMPILE)
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)
    # A second run compiles little. The size limit is what makes JAX lock the folder, which the workers share.
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(config.cache.mkdir("jax"))  # of commands that tests run, too
    jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
    jax.config.update("jax_compilation_cache_max_size", 2**30)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


# Files of a minute and more of processor time, each of which one worker runs from end to end: they come first, so that
# no worker ends with one alone while the other has nothing left.
LONGEST_FIRST = [
    "test_quickstart", "test_engine", "test_train", "test_model", "test_moe", "test_generate", "test_adapter_options",
    "test_adapter_sets", "test_adapters", "test_nf4", "test_huggingface", "test_loading_modes", "test_lora",
    "test_bitsandbytes", "test_examples", "test_bench",
]  # fmt: skip


def pytest_collection_modifyitems(config, items):
    place = {name: i for i, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(place)))
    if not wants_gpu(config):
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs -m gpu"))


@pytest.fixture(autouse=True, scope="module")
def no_programs_are_left():
    """Each compiled program holds memory maps, of which Linux gives a process 65,530: a worker that kept the programs
    of all its files was aborted."""
    yield
    jax.clear_caches()


@pytest.fixture
def key():
    return jax.random.key(0)


@pytest.fixture
def standard_promotion():
    """For a test that runs third-party code, such as a bare optax update, which mixes dtypes."""
    with jax.numpy_dtype_promotion("standard"):
        yield
