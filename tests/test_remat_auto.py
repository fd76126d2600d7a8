"""The fastest policy that fits: chosen by what compiled steps take."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx

from jaxlora import lora, offload, remat, remat_auto, sharding
from jaxlora.config import LoraConfig, ModelConfig, RopeConfig
from jaxlora.model import CausalLM
from jaxlora.train import TrainState

CONFIG = ModelConfig(
    model_type="llama", vocab_size=64, hidden_size=64, intermediate_size=256, num_hidden_layers=6,
    num_attention_heads=4, num_key_value_heads=2, head_dim=16, max_position_embeddings=512, rope=RopeConfig(),
    layer_types=("full_attention",) * 6,
)  # fmt: skip


@pytest.fixture(scope="module")
def parts():
    model = CausalLM(CONFIG, rngs=nnx.Rngs(0))
    lora.add_adapters(model, LoraConfig(r=4), jax.random.key(0))
    model.remat_policy = remat.resolve("auto")
    optimizer = optax.adamw(1e-3)
    ids = jnp.ones((2, 256), jnp.int32)
    return model, optimizer, {"input_ids": ids, "labels": ids}


def choose(parts, free, free_on_host=None):
    model, optimizer, batch = parts
    state = TrainState.create(lora.partition(model)[1], optimizer)
    return remat_auto.choose_policy(model, optimizer, state, batch, free=free, free_on_host=free_on_host)


def test_the_fastest_that_fits_is_taken_and_its_step_runs(parts):
    model, optimizer, batch = parts
    roomy = choose(parts, None)
    assert roomy.policy == model.remat_policy == "projections" and list(roomy.tried) == ["projections"]
    tight = choose(parts, roomy.needed - 1)
    assert tight.policy == model.remat_policy != "projections"
    assert tight.needed <= tight.free < tight.tried["projections"]
    # Either compiled step trains, and gives the same.
    frozen = lora.partition(model)[2]
    fresh = lambda: TrainState.create(lora.partition(model)[1], optimizer)
    losses = [float(choice.step(fresh(), frozen, batch)[1]["loss"]) for choice in (roomy, tight)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_what_cannot_fit_is_not_compiled(parts):
    tokens = 512
    kept = {name: tokens * remat_auto.kept_bytes(name, CONFIG, 4) for name in remat_auto.ORDER}
    assert kept["projections"] == tokens * 6 * 4 * (2 * 64 + 2 * 64 + 2 * 32 + 2 * 256)
    choice = choose(parts, None)
    assert kept["projections"] < choice.needed
    with pytest.raises(MemoryError, match="no checkpointing policy fits: .* 512 tokens.*shorter"):
        choose(parts, 1000)
    assert parts[0].remat_policy == "auto"


def test_on_a_mesh_a_device_needs_room_for_its_own_rows(parts, monkeypatch):
    model, optimizer, batch = parts
    mesh = sharding.make_mesh(data=2)
    batch = jax.device_put(batch, sharding.batch_sharding(mesh))
    free = int(0.7 * choose(parts, None).needed)
    # As if so much were kept that it fits half of the rows alone, which one device is not even to compile.
    monkeypatch.setattr(remat_auto, "kept_bytes", lambda *_: int(1.5 * free) // 512)
    with pytest.raises(MemoryError):
        choose(parts, free, 0)
    on_mesh = jax.tree.map(jnp.copy, sharding.shard(nnx.state(model), mesh))
    model = nnx.merge(nnx.graphdef(model), on_mesh)
    state = sharding.shard(TrainState.create(lora.partition(model)[1], optimizer), mesh)
    choice = remat_auto.choose_policy(model, optimizer, state, batch, mesh=mesh, free=free)
    assert choice.policy == "projections" and choice.needed <= free
    losses = [float(c.step(s, lora.partition(m)[2], b)[1]["loss"]) for c, s, m, b in (
        (choice, state, model, batch),
        (choose(parts, None), TrainState.create(lora.partition(parts[0])[1], optimizer), parts[0], parts[2]),
    )]  # fmt: skip
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_little_memory_of_the_host_leaves_out_what_is_kept_there(parts, monkeypatch):
    tokens = 512
    kept = {name: tokens * remat_auto.kept_bytes(name, CONFIG, 4) for name in remat_auto.ORDER}
    assert kept["offload"] < kept["offload_attention"] < kept["offload_residual"] == kept["attention"]
    with monkeypatch.context() as patch:
        patch.setattr(remat_auto, "ORDER", ("full",))
        enough = choose(parts, None).needed
    assert choose(parts, enough, 0).policy == "full"
    tried = choose(parts, enough, kept["offload"]).tried
    assert "offload" in tried and not {"offload_residual", "offload_attention"} & set(tried)


def test_offload_fills_the_host_and_then_the_device(parts, monkeypatch):
    """Half of the layers' inputs on each: a step that fits, and trains as ever."""
    model, optimizer, batch = parts
    monkeypatch.setattr(remat_auto, "ORDER", ("offload",))
    kept = 512 * remat_auto.kept_bytes("offload", CONFIG, 4)
    fresh = lambda: TrainState.create(lora.partition(model)[1], optimizer)
    losses = []
    for room in (kept, kept // 2):
        choice = choose(parts, 10**9, room)
        assert choice.policy == "offload" and model.host_bytes == room
        losses.append(float(choice.step(fresh(), lora.partition(model)[2], batch)[1]["loss"]))
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    model.host_bytes = None


def test_every_policy_but_none_is_tried():
    assert set(remat_auto.ORDER) == set(remat.POLICIES) - {"none"}


def test_undecided_it_computes_as_full(parts):
    model, _, batch = parts
    model.remat_policy = remat.AUTO
    assert remat.mlp_tile("auto") == remat.mlp_tile("full")
    logits = model(batch["input_ids"])
    model.remat_policy = "full"
    assert bool(jnp.all(logits == model(batch["input_ids"])))


@pytest.mark.parametrize("name", ["XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"])
def test_xla_may_take_most_of_the_device_unless_told_otherwise(monkeypatch, name):
    names = "XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"
    for each in names:
        monkeypatch.setenv(each, "unset")  # so that it is as it was afterwards
        monkeypatch.delenv(each)
    monkeypatch.setenv("XLA_FLAGS", "")
    monkeypatch.setenv(name, "0.5")
    offload.allow_memory()
    assert [os.environ.get(each) for each in names] == ["0.5" if each == name else None for each in names]
    monkeypatch.delenv(name)
    offload.allow_memory()
    assert [os.environ.get(each) for each in names] == ["0.9", None]


def test_xla_counts_no_host_memory_as_the_devices_unless_told_otherwise(monkeypatch):
    """XLA reads its flags when it makes its client, and ends the process over one that it does not know."""
    monkeypatch.setenv("XLA_CLIENT_MEM_FRACTION", "0.5")
    monkeypatch.setenv("XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB", "7")
    flag = "--xla_gpu_memory_limit_slop_factor"
    for before, after in (
        (None, f"{flag}=10000"),
        ("--xla_dump_to=/x", f"--xla_dump_to=/x {flag}=10000"),
        (f"{flag}=95", f"{flag}=95"),
    ):
        monkeypatch.setenv("XLA_FLAGS", "")
        if before is None:
            monkeypatch.delenv("XLA_FLAGS")
        else:
            monkeypatch.setenv("XLA_FLAGS", before)
        offload.allow_memory()
        offload.allow_memory()
        assert os.environ["XLA_FLAGS"] == after
    program = "from jaxlora import offload; offload.allow_memory(); import jax; print(jax.numpy.ones(3).sum())"
    monkeypatch.delenv("XLA_FLAGS")
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.returncode == 0 and run.stdout.strip() == "3.0", run.stderr


def test_xla_may_pin_most_of_the_host_unless_told_otherwise(monkeypatch):
    name = "XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB"
    monkeypatch.setenv("XLA_CLIENT_MEM_FRACTION", "0.5")
    monkeypatch.setenv("XLA_FLAGS", "")
    monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(offload, "_CGROUP_BOUNDS", ())
    offload.allow_memory()
    gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    assert 0.8 * gib - 1 <= int(os.environ[name]) <= 0.8 * gib
    monkeypatch.setenv(name, "7")
    offload.allow_memory()
    assert os.environ[name] == "7"
    assert offload.pinned_bytes() is None  # on a CPU


@pytest.mark.parametrize("text, gib", [("8589934592", 6), ("max", None), ("9223372036854771712", None)])
def test_a_container_may_have_less(monkeypatch, tmp_path, text, gib):
    """Bounds as cgroup v2 and v1 write them, and none."""
    name = "XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB"
    (tmp_path / "memory.max").write_text(text + "\n")
    monkeypatch.setattr(offload, "_CGROUP_BOUNDS", (tmp_path / "none", tmp_path / "memory.max"))
    monkeypatch.setenv("XLA_CLIENT_MEM_FRACTION", "0.5")
    monkeypatch.setenv("XLA_FLAGS", "")
    monkeypatch.delenv(name, raising=False)
    offload.allow_memory()
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    assert int(os.environ[name]) == (gib or int(0.8 * physical))
