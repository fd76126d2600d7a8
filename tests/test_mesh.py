"""What devices send each other: a layer's codes, gradients of adapters, and no hidden states but where tensors meet."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import load_folder, make_checkpoint, random_ids, randomise_adapters, relative_error
from jax.sharding import NamedSharding, PartitionSpec

from jaxlora import generate as generating
from jaxlora import quant, remat, sharding
from jaxlora.config import LoraConfig, QuantConfig
from jaxlora.generate import generate
from jaxlora.kernels import api, reference
from jaxlora.kernels.cross_entropy import cross_entropy_reference, linear_cross_entropy
from jaxlora.lora import add_adapters, partition
from jaxlora.train import TrainState, make_train_step

KINDS = "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute"
DTYPES = dict(f32=4, s32=4, u32=4, bf16=2, u8=1, s8=1, pred=1)


def collectives(program):
    """[(kind, dtype, shape of a result, without ones)] of a compiled program; those in a loop once."""
    found = []
    for line in program.as_text().splitlines():
        if match := re.match(rf"\s*(?:ROOT )?\S+ = (.*?) ({'|'.join(KINDS)})(?:-start)?\(", line):
            results = re.findall(r"(\w+)\[([\d,]*)\]\{?", match[1])
            shape = lambda dims: tuple(int(n) for n in dims.split(",") if n not in ("", "1"))
            found += [(match[2], dtype, shape(dims)) for dtype, dims in results]
    assert not {dtype for _, dtype, _ in found} - {*DTYPES}
    return found


def on(mesh, *axes):
    return NamedSharding(mesh, PartitionSpec(*axes))


CUTS = {  # sizes of the mesh; what the codes' rows and columns, and the result's, are divided by
    "fsdp": (dict(fsdp=8), ("fsdp", None), (None, None)),
    "column-parallel": (dict(fsdp=2, tensor=4), (("tensor", "fsdp"), None), ("tensor", None)),
    "row-parallel": (dict(fsdp=2, tensor=2), ("fsdp", "tensor"), (None, "tensor")),
    "rows only": (dict(fsdp=2, tensor=2), (("fsdp", "tensor"), None), (None, "tensor")),
    "nothing": (dict(data=8), (None, None), (None, None)),
    "everything": (dict(data=2, fsdp=2, tensor=2), ("fsdp", "tensor"), ("fsdp", "tensor")),
}


@pytest.mark.parametrize("shape", [(1024, 256), (24, 128)], ids=["groups", "across-groups"])
@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("adapted", [False, True], ids=["plain", "adapted"])
def test_each_device_merges_its_part(cut, shape, adapted, key):
    """Of groups of 256 scales a device has whole ones, or ends amid one. The bits are one device's, to rounding B A."""
    sizes, held, wanted = CUTS[cut]
    mesh, (rows, columns) = sharding.make_mesh(**sizes), shape
    q = quant.quantize(jax.random.normal(key, (3, rows, columns)))
    extra = {}
    if adapted:
        normal = lambda i, *shape: jax.random.normal(jax.random.fold_in(key, i), shape)
        extra = dict(a=normal(1, 4, columns), b=normal(2, rows, 4), gain=normal(3, rows))

    def merge(q, index, extra):
        fields = q.codes, q.scales, q.nested_absmax, q.nested_offset
        return api.merge_nf4(*fields, index, **extra, shape=shape, dtype=jnp.float32)

    expected = merge(q, jnp.int32(1), extra)

    @jax.jit
    def on_mesh(*args):
        with sharding.over(mesh):
            return jax.lax.with_sharding_constraint(merge(*args), on(mesh, *wanted))

    by_row = on(mesh, None, *held)
    places = jax.tree.map(lambda leaf: by_row if leaf.ndim == 3 else on(mesh), q)
    args = jax.device_put(q, places), jnp.int32(1), extra
    found = on_mesh(*args)
    assert found.sharding.is_equivalent_to(on(mesh, *wanted), 2)
    if adapted:
        assert relative_error(found, expected) < 1e-6
    else:
        np.testing.assert_array_equal(found, expected)
    moved = collectives(on_mesh.lower(*args).compile())
    if cut == "rows only":  # the columns that it needs are of other rows: XLA moves codes
        return
    assert all(kind == "all-gather" and dtype == "u8" and len(dims) <= 2 for kind, dtype, dims in moved)
    assert bool(moved) == (cut in ("fsdp", "column-parallel", "row-parallel"))


def test_a_transposed_weight_and_one_without_a_stack(key):
    mesh = sharding.make_mesh(fsdp=2, tensor=4)
    q = quant.quantize(jax.random.normal(key, (64, 128)), double_quant=False)
    placed = jax.device_put(q, sharding.variable_sharding(q, ("mlp", "embed"), mesh))
    dense = quant.dequantize(q, jnp.float32)
    merge = lambda q: api.merge_nf4(q.codes, q.scales, shape=q.shape, dtype=jnp.float32, transposed=True)
    unpack = lambda q: api.dequantize_nf4(q.codes, q.scales, shape=q.shape, dtype=jnp.float32)
    for function, expected, spec in ((merge, dense.T, (None, "tensor")), (unpack, dense, ("tensor", None))):

        @jax.jit
        def on_mesh(q, function=function, spec=spec):
            with sharding.over(mesh):
                return jax.lax.with_sharding_constraint(function(q), on(mesh, *spec))

        np.testing.assert_array_equal(on_mesh(placed), expected)
        assert {kind for kind, *_ in collectives(on_mesh.lower(placed).compile())} == {"all-gather"}


@pytest.mark.parametrize("tile", [5, 8, 24])
def test_a_tile_is_of_each_devices_own_tokens(tile, key):
    mesh = sharding.make_mesh(data=2, fsdp=2)
    x, w = jax.random.normal(key, (8, 12, 16)), jax.random.normal(key, (16, 16))
    ones = jnp.ones(())  # a sum of all tokens would be a collective of its own

    def f(x, parts):
        y, pull = jax.vjp(lambda x: remat.over_tiles(lambda rows, i: jnp.tanh(rows @ w), x, tile, parts), x)
        return y, pull(jnp.cos(y) * ones)[0]

    rows = jax.device_put(x, sharding.batch_sharding(mesh))
    on_mesh = jax.jit(f, static_argnums=1, out_shardings=sharding.batch_sharding(mesh))
    for found, expected in zip(on_mesh(rows, 4), f(x, 1), strict=True):
        assert relative_error(found, expected) < 1e-6
    assert collectives(on_mesh.lower(rows, 4).compile()) == []


@pytest.mark.parametrize("chunk", [5, 8, 24])
def test_a_chunk_of_logits_is_of_each_devices_own_tokens(chunk, key):
    mesh = sharding.make_mesh(data=2, fsdp=2)
    hidden, weight = jax.random.normal(key, (96, 16)), jax.random.normal(jax.random.fold_in(key, 1), (32, 16))
    labels = jnp.asarray(random_ids(1, 96, vocab=32))[0].at[::3].set(-100)
    ours = jax.jit(jax.value_and_grad(lambda *args: linear_cross_entropy(*args, labels, chunk, None, 4)))
    rows = jax.device_put(hidden, on(mesh, ("data", "fsdp")))
    expected = jax.value_and_grad(cross_entropy_reference)(hidden, weight, labels)
    for found, each in zip(ours(rows, weight), expected, strict=True):
        assert relative_error(found, each) < 1e-5
    moved = collectives(ours.lower(rows, weight).compile())
    assert {kind for kind, *_ in moved} == {"all-reduce"} and all(dims == () for *_, dims in moved)


SIZES = dict(
    hidden_size=128, intermediate_size=256, num_attention_heads=4, num_key_value_heads=2, head_dim=32, vocab_size=160
)
ROWS, LENGTH = 8, 256
HIDDEN = ROWS * LENGTH * SIZES["hidden_size"]


def step_of(folder, quant_config, policy, mesh, options=None):
    """(the compiled step, its arguments), on a mesh or, without one, on a device."""
    model = load_folder(folder, quant_config=quant_config)
    add_adapters(model, LoraConfig(r=4, **(options or {})), jax.random.key(0))
    randomise_adapters(model)
    model.remat_policy = policy
    graphdef, trainable, frozen = partition(model)
    optimizer = optax.sgd(0.1)
    state, ids = TrainState.create(trainable, optimizer), jnp.asarray(random_ids(ROWS, LENGTH, vocab=160))
    batch = {"input_ids": ids, "labels": jnp.where(ids % 3 == 0, -100, ids)}
    if mesh is not None:
        state, frozen = sharding.shard(state, mesh), sharding.shard(frozen, mesh)
        batch = jax.device_put(batch, sharding.batch_sharding(mesh))
    args = state, frozen, batch
    return make_train_step(graphdef, optimizer, mesh=mesh).lower(*args).compile(), args


NF4, INT8 = QuantConfig(), QuantConfig(scheme="int8")


@pytest.mark.parametrize("sizes, quant_config, policy, is_tied", [
    (dict(fsdp=2), NF4, "full", False),
    (dict(fsdp=2), NF4, "full", True),
    (dict(fsdp=2), INT8, "full", False),
    (dict(fsdp=2), None, "full", False),
    (dict(fsdp=2), NF4, "offload", False),
    (dict(fsdp=2), NF4, "projections", False),
    (dict(data=2), NF4, "full", False),
    (dict(data=2, fsdp=2), NF4, "none", False),
    (dict(tensor=2), NF4, "full", True),
    (dict(fsdp=2, tensor=2), NF4, "full", False),
    (dict(fsdp=2, tensor=2), None, "full", False),
], ids=lambda value: "-".join(value) if isinstance(value, dict) else str(getattr(value, "scheme", value)))  # fmt: skip
def test_a_step_moves_what_it_must(sizes, quant_config, policy, is_tied, tmp_path):
    make_checkpoint("llama", tmp_path, **SIZES, tie_word_embeddings=is_tied)
    alone, args = step_of(tmp_path, quant_config, policy, None)
    expected, metrics = alone(*args)
    mesh = sharding.make_mesh(**sizes)
    step, args = step_of(tmp_path, quant_config, policy, mesh)
    found, metrics_on_mesh = step(*args)
    np.testing.assert_allclose(metrics_on_mesh["loss"], metrics["loss"], rtol=1e-5)
    for one, other in zip(jax.tree.leaves(found.trainable), jax.tree.leaves(expected.trainable), strict=True):
        assert relative_error(one, other) < 1e-5

    moved = collectives(step)
    rows = math.prod(size for axis, size in sizes.items() if axis != "tensor")
    of_tokens = [(kind, dims) for kind, _, dims in moved if math.prod(dims) >= HIDDEN // rows]
    gathered = {(dtype, dims) for kind, dtype, dims in moved if kind == "all-gather" and len(dims) > 1}
    if "tensor" in sizes:
        # Sums of hidden states: embedding, o_proj and down_proj, o_proj again, gradients by what q, k, v, gate and up
        # read, and the head's. Nothing is gathered, but by the embedding where both of its dimensions are divided.
        assert all(math.prod(dims) == HIDDEN // rows for _, dims in of_tokens)
        assert sum(kind == "all-reduce" for kind, _ in of_tokens) <= 10
        assert sum(kind != "all-reduce" for kind, _ in of_tokens) <= ("fsdp" in sizes)
    else:
        # The embedding's features are divided, and come to whose rows they are.
        assert {kind for kind, _ in of_tokens} <= {"all-to-all"}
    weights = {dims for _, dims in gathered if min(dims) > 3 * 4}  # not those of adapters, of q, k and v together
    if "fsdp" not in sizes:
        assert not weights
    else:
        assert all(len(dims) == 2 for dims in weights if dims != (ROWS, LENGTH)), "of one layer"
    if quant_config is not None and "fsdp" in sizes:
        tables = {dims for dims in weights if dims[0] in (160, 80)} | {(ROWS, LENGTH)}  # those of the vocabulary
        codes = {(dtype, dims) for dtype, dims in gathered if dims in weights - tables}
        assert codes and {dtype for dtype, _ in codes} == {"u8" if quant_config is NF4 else "s8"}


def test_few_tokens_and_norms_of_dora_gather_a_layer(tmp_path):
    make_checkpoint("llama", tmp_path, **SIZES)
    mesh = sharding.make_mesh(fsdp=2)
    alone, args = step_of(tmp_path, NF4, "full", None, dict(use_dora=True))
    expected = alone(*args)[1]
    step, args = step_of(tmp_path, NF4, "full", mesh, dict(use_dora=True))
    np.testing.assert_allclose(step(*args)[1]["loss"], expected["loss"], rtol=1e-5)
    assert all(len(dims) < 3 for kind, dtype, dims in collectives(step) if dtype == "u8")


@pytest.mark.parametrize("sizes", [dict(fsdp=2), dict(data=2, fsdp=2, tensor=2)])
@pytest.mark.parametrize("quant_config", [NF4, None], ids=["nf4", "dense"])
def test_generating_knows_the_mesh_that_the_model_lies_on(sizes, quant_config, tmp_path, monkeypatch):
    """Kernels for few tokens would gather a stack for each layer, so they leave to others what lies on a mesh."""
    make_checkpoint("llama", tmp_path, **SIZES)
    model = load_folder(tmp_path, quant_config=quant_config)
    add_adapters(model, LoraConfig(r=4), jax.random.key(0))
    randomise_adapters(model)
    run = functools.partial(generate, input_ids=random_ids(4, 20, vocab=160), max_new_tokens=12, eos_token_id=[])
    expected = run(model)
    sharding.shard(model, sharding.make_mesh(**sizes))
    seen = []
    for name in ("_prefill", "_decode"):
        real = getattr(generating, name)
        watched = lambda *args, real=real, **kw: (seen.append(jax.sharding.get_abstract_mesh()), real(*args, **kw))[1]
        monkeypatch.setattr(generating, name, watched)
    np.testing.assert_array_equal(run(model), expected)
    assert [dict(mesh.shape) for mesh in seen] == [dict(data=1, fsdp=1, tensor=1) | sizes] * 2


def test_without_a_mesh_nothing_is_asked_of_xla():
    x = jnp.ones((4, 6, 8))
    assert sharding.divided(x, ("batch", None, None)) is x
    assert sharding.row_parts(4) == 1
    with sharding.over(sharding.make_mesh(data=2, fsdp=2)):
        assert sharding.row_parts(4) == 4
        assert sharding.row_parts(6) == 2  # fsdp does not divide what is left
        assert sharding.row_parts(5) == 1
    with jax.set_mesh(sharding.make_mesh(data=2, fsdp=2)):
        assert sharding.row_parts(4) == 4
    with sharding.over(sharding.make_mesh()):
        assert sharding.divided(x, ("batch", None, None)) is x
    with sharding.over(None):
        assert sharding.row_parts(4) == 1
    assert reference.NF4_BLOCK == quant.BLOCK
