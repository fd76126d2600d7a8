"""Checkpoints: the state comes back bit for bit, a kill leaves nothing half, and what does not fit is named."""

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jaxlora import checkpoint
from jaxlora.optimizer import make_optimizer, make_schedule
from jaxlora.train import TrainState
from jaxlora.variables import LoraParam

SCHEDULE = make_schedule("linear", 1e-3, warmup_steps=2, total_steps=10)
ADAMW = make_optimizer("adamw_torch", SCHEDULE)


class Adapter(nnx.Module):
    def __init__(self, rank=4, names=("q_proj", "v_proj"), dtype=jnp.float32):
        keys = jax.random.split(jax.random.key(rank), 2 * len(names))
        for name, a, b in zip(names, keys[::2], keys[1::2], strict=True):
            pair = {"lora_A": (a, (2, rank, 6)), "lora_B": (b, (2, 8, rank))}
            setattr(
                self, name, nnx.Dict({k: LoraParam(jax.random.normal(key, s, dtype)) for k, (key, s) in pair.items()})
            )


def make_state(optimizer=ADAMW, step=0, key=None, **shape):
    state = TrainState.create(nnx.state(Adapter(**shape), nnx.Param), optimizer, key)
    return TrainState(jnp.int32(step), state.trainable, state.opt_state, state.key)


def after_updates(state, steps):
    """The state after some updates by ADAMW, with gradients that are the parameters themselves."""

    @jax.jit
    def update(state):
        with jax.numpy_dtype_promotion("standard"):
            updates, opt_state = ADAMW.update(state.trainable, state.opt_state, state.trainable)
            return TrainState(state.step + 1, optax.apply_updates(state.trainable, updates), opt_state, state.key)

    for _ in range(steps):
        state = update(state)
    return state


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        assert x.dtype == y.dtype and x.shape == y.shape
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


@pytest.mark.parametrize("dtype, impl", [(jnp.float32, "threefry2x32"), (jnp.bfloat16, "rbg")])
def test_a_state_comes_back_bit_for_bit(tmp_path, dtype, impl):
    key = jax.random.key(7, impl=impl)
    state = after_updates(make_state(dtype=dtype, key=key), 3)
    extra = {"data": {"epoch": 1, "index": 5}, "tally": {"loss": 0.1 + 0.2}}
    path = checkpoint.save(tmp_path, state, extra=extra)
    assert path == tmp_path / "checkpoint-3"
    restored, back = checkpoint.restore(path, make_state(dtype=dtype, key=jax.random.key(0, impl=impl)))
    assert_same(restored, state)
    assert back == extra
    assert_same(after_updates(restored, 1), after_updates(state, 1))


def test_restored_arrays_are_placed_like_the_template(tmp_path):
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spread = jax.sharding.NamedSharding(mesh, jax.P("data"))
    place = lambda x: jax.device_put(x, spread) if x.ndim == 3 else x
    checkpoint.save(tmp_path, make_state(step=1), extra={})
    restored, _ = checkpoint.restore(tmp_path / "checkpoint-1", jax.tree.map(place, make_state()))
    assert restored.trainable["q_proj"]["lora_A"].get_value().sharding == spread
    assert_same(restored.trainable, make_state().trainable)


def test_only_what_changes_is_saved(tmp_path):
    path = checkpoint.save(tmp_path, make_state(step=1), extra={})
    names = json.loads((path / "checkpoint.json").read_text())["arrays"]
    assert {n for n in names if n.startswith("trainable.")} == {
        f"trainable.{m}.{p}" for m in ("q_proj", "v_proj") for p in ("lora_A", "lora_B")
    }
    assert names["trainable.q_proj.lora_A"] == "float32[2, 4, 6]"


def test_further_files_lie_beside_the_state(tmp_path):
    path = checkpoint.save(tmp_path, make_state(step=1), extra={}, write=lambda f: (f / "adapter.txt").write_text("A"))
    assert sorted(p.name for p in path.iterdir()) == ["adapter.txt", "checkpoint.json", "state"]


def test_the_newest_are_kept(tmp_path):
    for step in (1, 2, 10, 11):  # 10 comes before 2 in the alphabet
        checkpoint.save(tmp_path, make_state(step=step), extra={}, save_total_limit=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-11"]
    assert checkpoint.latest_checkpoint(tmp_path) == tmp_path / "checkpoint-11"


def test_a_new_run_in_an_old_folder_keeps_its_own(tmp_path):
    checkpoint.save(tmp_path, make_state(step=100), extra={})
    checkpoint.save(tmp_path, make_state(step=5), extra={}, save_total_limit=1)
    assert checkpoint.latest_checkpoint(tmp_path) == tmp_path / "checkpoint-5"
    assert checkpoint.checkpoints(tmp_path) == [tmp_path / "checkpoint-5"]


def test_a_checkpoint_is_replaced_by_one_of_the_same_step(tmp_path):
    for seed in (1, 2):
        checkpoint.save(tmp_path, make_state(step=1, key=jax.random.key(seed)), extra={"seed": seed})
    restored, extra = checkpoint.restore(tmp_path / "checkpoint-1", make_state())
    assert extra == {"seed": 2}
    assert_same(restored.key, jax.random.key(2))
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-1"]


def test_there_is_no_latest_among_none(tmp_path):
    assert checkpoint.latest_checkpoint(tmp_path) is None
    assert checkpoint.latest_checkpoint(tmp_path / "missing") is None
    (tmp_path / "checkpoint-7").mkdir()  # somebody else's
    (tmp_path / "checkpoint-best").mkdir()
    assert checkpoint.latest_checkpoint(tmp_path) is None


KILLED = """
import os, signal, sys
import jax.numpy as jnp
from flax import nnx
from jaxlora import checkpoint
from jaxlora.optimizer import make_optimizer
from jaxlora.train import TrainState
trainable = nnx.state(nnx.Dict(w=nnx.Param(jnp.ones((3, 4)))))
state = TrainState.create(trainable, make_optimizer("sgd", lambda t: 0.1))
at = lambda step: TrainState(jnp.int32(step), state.trainable, state.opt_state, state.key)
kill = lambda folder: os.kill(os.getpid(), signal.SIGKILL)
checkpoint.save(sys.argv[1], at(1), extra={"step": 1})
if sys.argv[2] == "rename":
    checkpoint.Path.rename = lambda path, target: kill(path)
checkpoint.save(sys.argv[1], at(2), extra={"step": 2}, write=kill if sys.argv[2] == "write" else None)
"""


@pytest.mark.parametrize("moment", ["write", "rename"])
def test_a_killed_save_leaves_the_one_before(tmp_path, moment):
    child = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path), moment], env={"JAX_PLATFORMS": "cpu"})
    assert child.returncode == -signal.SIGKILL
    assert len(list(tmp_path.iterdir())) == 2  # the kill did come in the middle
    assert checkpoint.latest_checkpoint(tmp_path) == tmp_path / "checkpoint-1"
    checkpoint.save(tmp_path, make_state(step=3), extra={})  # and the next one tidies up
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-1", "checkpoint-3"]


def test_a_checkpoint_that_is_being_deleted_does_not_look_whole(tmp_path, monkeypatch):
    def killed(path):
        raise KeyboardInterrupt

    checkpoint.save(tmp_path, make_state(step=1), extra={})
    monkeypatch.setattr(shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(tmp_path, make_state(step=2), extra={}, save_total_limit=1)
    assert checkpoint.checkpoints(tmp_path) == [tmp_path / "checkpoint-2"]


MISMATCHES = {
    "rank": (
        dict(rank=8),
        r"adapter differs.*trainable\.q_proj\.lora_A is float32\[2, 4, 6\], here float32\[2, 8, 6\].*same r,",
    ),
    "fewer targets": (
        dict(names=("q_proj",)),
        r"adapter differs, 2 only in the checkpoint: trainable\.v_proj\.lora_A; ",
    ),
    "more targets": (
        dict(names=("q_proj", "v_proj", "o_proj")),
        r"adapter differs, 2 only in this run: trainable\.o_proj\.lora_A; ",
    ),
    "dtype": (dict(dtype=jnp.bfloat16), r"is float32\[2, 4, 6\], here bfloat16\[2, 4, 6\]"),
    "optimizer": (
        dict(optimizer=make_optimizer("lion", SCHEDULE)),
        r"optimizer state differs, .*nu.*same optim",
    ),
    "clipping": (
        dict(optimizer=make_optimizer("adamw", SCHEDULE, max_grad_norm=None)),
        r"optimizer state differs.*max_grad_norm",
    ),
    "key": (dict(key=jax.random.key(0, impl="rbg")), r"state differs.*key is key<fry>\[\], here key<rbg>\[\]"),
}


@pytest.mark.parametrize("here, found", MISMATCHES.values(), ids=MISMATCHES)
def test_what_does_not_fit_is_named(tmp_path, here, found):
    path = checkpoint.save(tmp_path, make_state(step=1), extra={})
    with pytest.raises(ValueError, match=found) as error:
        checkpoint.restore(path, make_state(**here))
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_a_missing_foreign_or_damaged_folder_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such checkpoint folder"):
        checkpoint.restore(tmp_path / "checkpoint-9", make_state())
    (tmp_path / "adapter").mkdir()
    with pytest.raises(ValueError, match="has no readable checkpoint.json"):
        checkpoint.restore(tmp_path / "adapter", make_state())
    path = checkpoint.save(tmp_path, make_state(step=1), extra={})
    for file in Path(path / "state").rglob("*"):
        if file.is_file() and file.stat().st_size > 100:
            file.write_bytes(file.read_bytes()[:50])
    with pytest.raises(ValueError, match="checkpoint-1 is damaged: "):
        checkpoint.restore(path, make_state())
