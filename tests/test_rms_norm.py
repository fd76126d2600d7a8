"""The norm of many tokens: what is wrapped around the kernels on any device, and the kernels as near the reference as
rounding allows, forward and backward."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import NamedSharding, PartitionSpec

from jaxlora.kernels import api, rms_norm
from jaxlora.kernels.residual_norm import residual_norm_reference
from jaxlora.sharding import make_mesh

EPS = 1e-5
OFFSETS = [0.0, 1.0]


def operands(key, shape, dtype, layers=3, offset=0.0):
    """x, y, the gradients of the stream and of the norm, a stack of weights."""
    *keys, last = jax.random.split(key, 5)
    arrays = [2 * jax.random.normal(key, shape, jnp.float32).astype(dtype) for key in keys]
    weights = 1 - offset + 0.2 * jax.random.normal(last, (layers, shape[-1]))
    return *arrays, weights.astype(dtype)


def reference(*args, **options):
    return residual_norm_reference(*args, eps=EPS, **options)


def with_gradients(function, x, y, dtotal, dout, weight, index=None):
    """Both results of function(x, y, weight, index), and the gradients of x, y and weight."""
    results, pullback = jax.vjp(lambda x, y, weight: function(x, y, weight, index), x, y, weight)
    return *results, *pullback((dtotal, dout))


def plain(stacked, offset, *without):
    """`rms_norm.with_gradients` of the equations at the head of the module; `without` some of them."""

    def backward(x, dout, weight, index):
        g = dout * (offset + (weight[index] if stacked else weight))
        r = jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + EPS)
        return r * (g - r * r * x * jnp.mean(g * x, axis=-1, keepdims=True))

    def backward_onto(x, dout, dtotal, weight, index):
        return backward(x, dout, weight, index) + dtotal

    def forward(x, weight, index):
        return reference(x, None, weight, index if stacked else None, offset=offset)[1]

    parts = dict(forward=forward, backward=backward, backward_onto=backward_onto)
    parts |= dict.fromkeys(without, unexpected)
    return rms_norm.with_gradients(**parts, stacked=stacked, eps=EPS, offset=offset)


def unexpected(*args):
    raise AssertionError("this was not to be computed")


@pytest.mark.parametrize("offset", OFFSETS)
@pytest.mark.parametrize("stacked", [False, True])
def test_the_gradients_are_the_references(key, stacked, offset):
    x, y, dtotal, dout, weights = operands(key, (2, 5, 24), jnp.float32, offset=offset)
    weight, index = (weights, jnp.int32(1)) if stacked else (weights[1], None)
    normed = plain(stacked, offset)

    def ours(x, y, weight, index):
        return normed(x + y, weight, jnp.int32(0) if index is None else index)

    theirs = functools.partial(reference, offset=offset)
    arrays = x, y, dtotal, dout, weight, index
    for got, wanted in zip(with_gradients(ours, *arrays), with_gradients(theirs, *arrays), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5)


def test_either_result_may_go_unread(key):
    x, _, _, _, weights = operands(key, (5, 24), jnp.float32)
    theirs = lambda x, weight, index: reference(x, None, weight, None)
    # A stream that goes nowhere has no gradient to be added, not even zeros; a norm that is not read has none at all.
    for number, without in ((1, ["backward_onto"]), (0, ["backward", "backward_onto"])):

        def gradients(function, number=number):
            loss = lambda x, weight: jnp.sum(jnp.sin(function(x, weight, jnp.int32(0))[number]))
            return jax.grad(loss, (0, 1))(x, weights[0])

        for ours, others in zip(gradients(plain(False, 0.0, *without)), gradients(theirs), strict=True):
            np.testing.assert_allclose(ours, others, rtol=1e-5, atol=1e-5)


def test_a_weight_that_learns_not_costs_nothing(key):
    x, _, _, _, weights = operands(key, (64, 24), jnp.float32)
    normed = plain(False, 0.0)

    def flops(wanted):
        loss = lambda x, weight: jnp.sum(jnp.sin(normed(x, weight, jnp.int32(0))[1]))
        return jax.jit(jax.grad(loss, wanted)).lower(x, weights[0]).compile().cost_analysis()["flops"]

    assert flops(0) < flops((0, 1))


def test_what_a_policy_saves_is_not_added_up_again(key):
    """The stream keeps its name through the norm: its sum is not computed again, and the gradients stay."""
    x, y, _, _, weights = operands(key, (5, 24), jnp.float32)
    normed = plain(False, 0.0)

    def body(x, y, weight):
        total, out = normed(checkpoint_name(jnp.cos(x) + y, "residual"), weight, jnp.int32(0))
        return jnp.sum(out * out * out * total)

    arrays = x, y, weights[0]
    for names, sums in ((["residual"], 1), ([], 2)):
        policy = jax.checkpoint_policies.save_only_these_names(*names)
        gradients = jax.grad(jax.checkpoint(body, policy=policy), (0, 1, 2))
        for ours, others in zip(gradients(*arrays), jax.grad(body, (0, 1, 2))(*arrays), strict=True):
            np.testing.assert_allclose(ours, others, rtol=1e-5, atol=1e-5)
        assert str(jax.make_jaxpr(gradients)(*arrays)).count(" cos ") == sums


def test_each_device_norms_its_rows(key):
    """What the kernels are wrapped in, around functions that a CPU runs: nothing but a weight is gathered."""
    x, y, _, _, weights = operands(key, (4, 6, 16), jnp.float32)
    mesh = make_mesh(fsdp=2, tensor=2)

    for stacked, weight in ((False, weights[0]), (True, weights)):
        normed = plain(stacked, 0.0)

        def gradient(x, y, weight, normed=normed):
            return jax.grad(lambda x: jnp.sum(jnp.sin(normed(x, weight, jnp.int32(0))[1]) * y))(x)

        split = jax.device_put((x, y), NamedSharding(mesh, PartitionSpec("fsdp", "tensor", None)))
        compiled = jax.jit(gradient).lower(*split, weight).compile()
        assert "all-gather" not in compiled.as_text()
        got = compiled(*split, weight)
        assert got.sharding.is_equivalent_to(split[0].sharding, 3)
        np.testing.assert_allclose(got, gradient(x, y, weight), rtol=1e-5, atol=1e-5)


def test_a_row_that_is_divided_is_gathered(key):
    x, y, _, _, weights = operands(key, (4, 6, 16), jnp.float32)
    normed = plain(False, 0.0)
    divided = jax.device_put(x, NamedSharding(make_mesh(fsdp=2, tensor=2), PartitionSpec("fsdp", None, "tensor")))
    gradient = jax.jit(jax.grad(lambda x: jnp.sum(jnp.sin(normed(x, weights[0], jnp.int32(0))[1]) * y)))
    np.testing.assert_allclose(gradient(divided), gradient(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("axes", [(0, None, None), (0, 0, None), (None, None, 0)], ids=str)
def test_a_batch_is_the_norms_one_by_one(key, axes):
    x, _, dtotal, dout, weights = operands(key, (3, 5, 24), jnp.float32)
    stacked = axes[2] == 0
    normed = plain(stacked, 0.0)
    arrays = x if axes[0] == 0 else x[0], weights if stacked or axes[1] == 0 else weights[0], jnp.arange(3)

    def run(dtotal, dout, x, weight, index):
        results, pullback = jax.vjp(lambda x: normed(x, weight, index), x)
        return *results, *pullback((dtotal, dout))

    if axes[2] is None:
        arrays = *arrays[:2], jnp.int32(0)
    batch = jax.vmap(run, (0, 0, *axes))(dtotal, dout, *arrays)
    at = lambda i: [array if axis is None else array[i] for array, axis in zip(arrays, axes, strict=True)]
    alone = [run(dtotal[i], dout[i], *at(i)) for i in range(3)]
    for got, *wanted in zip(batch, *alone, strict=True):
        np.testing.assert_allclose(got, jnp.stack(wanted), rtol=1e-5, atol=1e-5)


def test_the_kernel_says_why_it_cannot_run(key):
    x, y, _, _, weights = operands(key, (512, 1024), jnp.bfloat16)
    with pytest.raises(NotImplementedError, match="needs an NVIDIA GPU"):
        api.residual_norm(x, y, weights[0], eps=EPS, implementation="triton_many")
    run = functools.partial(rms_norm.residual_norm, eps=EPS)
    with pytest.raises(NotImplementedError, match="not float32"):
        run(x.astype(jnp.float32), None, weights[0], None)
    with pytest.raises(NotImplementedError, match="512 tokens and more, of 513 to 16384 features, not 511 of 1024"):
        run(x[:511], None, weights[0], None)
    with pytest.raises(NotImplementedError, match="not 4096 of 128"):
        run(x.reshape(-1, 128), None, weights[0, :128], None)
    with pytest.raises(NotImplementedError, match=r"a weight \[1024\] or a stack, not \[3, 1024\]"):
        run(x, y, weights, None)


# --- on a GPU ---


@pytest.mark.gpu
@pytest.mark.parametrize("offset", OFFSETS)
@pytest.mark.parametrize("shape", [(1024, 4096), (2, 300, 3072), (513, 777), (600, 5120), (512, 16384)], ids=str)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_triton_equals_the_reference(key, dtype, shape, offset):
    x, y, dtotal, dout, weights = operands(key, shape, dtype, offset=offset)
    eps = float(jnp.finfo(dtype).eps)
    for weight, index in ((weights, jnp.int32(2)), (weights[2], None)):
        arrays = x, y, dtotal, dout, weight, index
        run = functools.partial(with_gradients, functools.partial(api.residual_norm, eps=EPS, offset=offset))
        assert api.implementations_in(run, *arrays) == {"residual_norm.triton_many"}
        ours = jax.jit(run)(*arrays)
        theirs = jax.jit(functools.partial(with_gradients, functools.partial(reference, offset=offset)))(*arrays)
        # Exact but for the sum, which rounds alike.
        total = theirs[0].astype(jnp.float32)
        wide = [array.astype(jnp.float32) for array in (total, 0 * total, dtotal, dout, weight)]
        exact = with_gradients(functools.partial(reference, offset=offset), *wide, index)
        np.testing.assert_array_equal(*(np.asarray(results[0], np.float32) for results in (ours, theirs)))
        assert np.mean(np.asarray(ours[1] != theirs[1])) < 0.01  # the same roundings, of sums in another order
        for got, other, wanted in zip(ours, theirs, exact, strict=True):
            assert got.dtype == dtype and got.shape == other.shape
            error = lambda array: float(jnp.max(jnp.abs(array.astype(jnp.float32) - wanted)))  # noqa: B023
            assert error(got) <= max(1.01 * error(other), 0.51 * eps * float(jnp.max(jnp.abs(wanted))))


@pytest.mark.gpu
def test_the_stream_of_a_norm_alone_may_go_unread(key):
    x, _, _, dout, weights = operands(key, (1024, 2048), jnp.bfloat16)

    def gradient(x, weight, implementation):
        run = functools.partial(api.residual_norm, eps=EPS, implementation=implementation)
        return jax.vjp(lambda x: run(x, None, weight)[1], x)[1](dout)[0]

    compiled = jax.jit(functools.partial(gradient, implementation="triton_many")).lower(x, weights[0]).compile()
    assert compiled.as_text().count('custom_call_target="triton_kernel_call"') == 1  # nothing forward, nothing besides
    ours, theirs = (
        np.asarray(array, np.float64)
        for array in (compiled(x, weights[0]), jax.jit(gradient, static_argnums=2)(x, weights[0], "reference"))
    )
    assert np.linalg.norm(ours - theirs) < 5e-3 * np.linalg.norm(theirs)


@pytest.mark.gpu
def test_a_stream_that_is_read_again_is_not_overwritten(key):
    x, _, dtotal, dout, weights = operands(key, (1024, 2048), jnp.bfloat16)
    run = lambda x, weight: api.residual_norm(x, None, weight, eps=EPS)

    @jax.jit
    def gradient(x, dtotal, dout, weight):
        stream = jnp.sin(dtotal)
        return jax.vjp(lambda x: run(x, weight), x)[1]((stream, dout))[0], stream

    got, stream = gradient(x, dtotal, dout, weights[0])
    np.testing.assert_array_equal(stream, jax.jit(jnp.sin)(dtotal))
    alone = jax.jit(lambda *args: jax.vjp(lambda x: run(x, weights[0]), x)[1](args)[0])(0 * dtotal, dout)
    wanted = alone.astype(jnp.float32) + stream.astype(jnp.float32)
    np.testing.assert_allclose(np.asarray(got, np.float32), wanted, rtol=1e-2, atol=2e-2)
