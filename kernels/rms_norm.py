"""The RMS norm of many tokens (arXiv:1910.07467), as a Triton kernel each way.

    r = 1 / sqrt(mean(x^2) + eps)        out = r x gain
    g = dout gain                        dx = r (g - r^2 x mean(g x)) + dtotal

The statistics and all sums are float32; no residual is kept but x, and r is computed again from it. x goes on as the
residual stream, `total`, and its gradient there, dtotal, is added before dx is rounded, and overwritten by it. A token
is the work of one program, which holds it in registers. A stack of gains is read by index.

The trade. All of it is traffic: forward reads one array and writes one, backward reads three and writes one. XLA sums
in one kernel and multiplies in another, each of which reads everything: 3 arrays where a norm is computed again, 6 to 8
for its gradient. Here the stream's sum x + y stays with XLA, which leaves it to the product that y comes from; and a
gradient dout that is a sum is added up before, mostly by a product as well. Narrow rows are those of attention's
heads, which XLA norms where it turns them; and few tokens are in `kernels.residual_norm`.

Layout: x, dout, dtotal [..., D]; weight [D], or [layers, D] with an index.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, no_type_check

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from jaxlora.kernels.parts import Parts
from jaxlora.kernels.residual_norm import added, residual_norm_reference

LEAST_TOKENS = 512  # below, what counts is launches: XLA makes a sum and its norm in one
LEAST_FEATURES = 513
MOST_FEATURES = 16384


@functools.cache
@no_type_check  # a type checker's wrapper around the function would hide its source from Triton
def _kernels():
    """The Triton functions, (forward, backward). Built on first use: the library imports where Triton is missing."""
    import triton
    import triton.language as tl

    @triton.jit
    def gain_of(weight, index, column, D: tl.constexpr, OFFSET: tl.constexpr, STACKED: tl.constexpr, dtype):
        if STACKED:
            weight += tl.load(index).to(tl.int64) * D
        gain = tl.load(weight + column, mask=column < D, other=0.0)
        if OFFSET == 0.0:
            return gain.to(dtype).to(tl.float32)
        return gain.to(tl.float32) + OFFSET

    @triton.jit
    def rms_norm(
        x,  # [M, D]
        weight,  # [D], or [layers, D]
        index,  # int32 []; unread without STACKED
        out,  # [M, D]
        D: tl.constexpr,
        EPS: tl.constexpr,
        OFFSET: tl.constexpr,
        STACKED: tl.constexpr,
        BLOCK: tl.constexpr,  # D, up to a power of two
    ):
        column = tl.arange(0, BLOCK)
        at = tl.program_id(0).to(tl.int64) * D + column
        narrow = tl.load(x + at, mask=column < D, other=0.0)
        gain = gain_of(weight, index, column, D, OFFSET, STACKED, narrow.dtype)
        wide = narrow.to(tl.float32)
        normed = wide * tl.rsqrt(tl.sum(wide * wide) / D + EPS)
        if OFFSET == 0.0:
            normed = normed.to(narrow.dtype).to(tl.float32)
        tl.store(out + at, (normed * gain).to(narrow.dtype), mask=column < D)

    @triton.jit
    def rms_norm_backward(
        x,  # [M, D]
        dout,  # [M, D]
        dtotal,  # [M, D]; unread without HAS_STREAM
        weight,  # [D], or [layers, D]
        index,  # int32 []; unread without STACKED
        dx,  # [M, D]
        D: tl.constexpr,
        EPS: tl.constexpr,
        OFFSET: tl.constexpr,
        STACKED: tl.constexpr,
        BLOCK: tl.constexpr,  # D, up to a power of two
        HAS_STREAM: tl.constexpr,
    ):
        column = tl.arange(0, BLOCK)
        at = tl.program_id(0).to(tl.int64) * D + column
        narrow = tl.load(x + at, mask=column < D, other=0.0)
        g = tl.load(dout + at, mask=column < D, other=0.0).to(tl.float32)
        if HAS_STREAM:
            stream = tl.load(dtotal + at, mask=column < D, other=0.0)
        g *= gain_of(weight, index, column, D, OFFSET, STACKED, narrow.dtype)
        wide = narrow.to(tl.float32)
        r = tl.rsqrt(tl.sum(wide * wide) / D + EPS)
        gradient = r * (g - wide * (r * r * (tl.sum(g * wide) / D)))
        if HAS_STREAM:
            gradient += stream.to(tl.float32)
        tl.store(dx + at, gradient.to(narrow.dtype), mask=column < D)

    return rms_norm, rms_norm_backward


def constants(features: int, eps: float, offset: float, stacked: bool) -> dict:
    """The compile-time arguments of both kernels."""
    block = 1 << (features - 1).bit_length()
    num_warps = min(max(block // 512, 1), 16)  # 16 elements a thread
    return dict(D=features, EPS=eps, OFFSET=offset, STACKED=stacked, BLOCK=block, num_warps=num_warps)


def by_rows(function: Callable, rows: int, stacked: bool) -> Callable:
    """function(*so many arrays [..., D], weight, index), which treats rows alike, of each device's rows by themselves,
    and of a batch of rows at once. Its result is such an array.

    XLA does not know that of a kernel: it would gather whole arrays on every device first.
    """
    partitioned = custom_partitioning(function)

    def partition(mesh, operands, result):
        spec = (*result.sharding.spec, *[None] * result.ndim)[: result.ndim - 1]
        alike, everywhere = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((*spec, None), ()))
        return mesh, function, alike, (*[alike] * rows, everywhere, everywhere)

    weight = "l i" if stacked else "i"
    rule = f"{', '.join(['... i'] * rows)}, {weight},  -> ... i"
    partitioned.def_partition(partition=partition, sharding_rule=rule)
    batched = jax.custom_batching.custom_vmap(partitioned)

    @batched.def_vmap
    def _(axis_size, in_batched, *arrays):
        if any(in_batched[rows:]):
            one_by_one = jax.custom_batching.sequential_vmap(partitioned)
            return jax.vmap(one_by_one, [0 if is_batched else None for is_batched in in_batched])(*arrays), True
        wide = [
            array if is_batched else jnp.broadcast_to(array, (axis_size, *array.shape))
            for array, is_batched in zip(arrays[:rows], in_batched, strict=False)
        ]
        return batched(*wide, *arrays[rows:]), True

    return batched


def with_gradients(
    forward: Callable, backward: Callable, backward_onto: Callable, *, stacked: bool, eps: float, offset: float
) -> Callable:
    """The function of (x, weight, index) that gives (x, its norm), made of what gives one array of rows:

    Args:
      forward: of (x, weight, index), the norm.
      backward: of (x, dout, weight, index), dx.
      backward_onto: of (x, dout, dtotal, weight, index), dx with dtotal.
      stacked: whether the weight is a stack; else the index says nothing.
      eps, offset: as in `residual_norm_reference`, which gives the weight's gradient.
    """
    forward, backward, backward_onto = (
        by_rows(function, rows, stacked) for rows, function in enumerate((forward, backward, backward_onto), 1)
    )

    @jax.custom_vjp
    def normed(x, weight, index):
        return x, forward(x, weight, index)

    def kept(x, weight, index):
        saved = x.value, weight.value, index.value
        return normed(*saved), saved

    def gradients(saved, cotangents):
        (x, weight, index), (dtotal, dout) = saved, cotangents
        if isinstance(dout, SymbolicZero):
            return None if isinstance(dtotal, SymbolicZero) else dtotal, None, None
        if isinstance(dtotal, SymbolicZero):
            dx = backward(x, dout, weight, index)
        else:
            dx = backward_onto(x, dout, dtotal, weight, index)

        def of_weight(weight):  # most often unused, and then removed
            return residual_norm_reference(x, None, weight, index if stacked else None, eps=eps, offset=offset)[1]

        return dx, *jax.vjp(of_weight, weight)[1](dout), None

    normed.defvjp(kept, gradients, symbolic_zeros=True)
    return normed


def residual_norm(
    x: Float[Array, "*batch d"],
    y: Float[Array, "*batch d"] | Parts | None,
    weight: Float[Array, "..."],
    index: Int[Array, ""] | None,
    *,
    eps: float,
    offset: float = 0.0,
    multiplier: float = 1.0,
    ordered: Any = None,
) -> tuple[Float[Array, "*batch d"], Float[Array, "*batch d"]]:
    """`residual_norm_reference`, its norm and the gradient of that in a Triton kernel each; that of the weight, where
    it is asked for, is the reference's. `ordered` is leave to order the norm, which this does not do.

    Raises:
      NotImplementedError: jax-triton is not installed; x is none of bfloat16 and float16; there are less than
        `LEAST_TOKENS` tokens, less than `LEAST_FEATURES` features or more than `MOST_FEATURES`; or a weight has more
        than one axis.
    """
    features, tokens, stacked = x.shape[-1], math.prod(x.shape[:-1]), index is not None
    if x.dtype not in (jnp.bfloat16, jnp.float16):
        raise NotImplementedError(f"the kernel takes bfloat16 or float16, not {x.dtype.name}")
    if tokens < LEAST_TOKENS or not LEAST_FEATURES <= features <= MOST_FEATURES:
        raise NotImplementedError(
            f"the kernel takes {LEAST_TOKENS} tokens and more, of {LEAST_FEATURES} to {MOST_FEATURES} features, "
            f"not {tokens} of {features}"
        )
    if weight.shape[weight.ndim - 1 :] != (features,) or weight.ndim != 1 + stacked:
        raise NotImplementedError(f"the kernel takes a weight [{features}] or a stack, not {list(weight.shape)}")
    try:
        import jax_triton
    except ImportError as error:
        raise NotImplementedError(f"the kernel needs jax-triton and triton ({error})") from error

    forward_kernel, backward_kernel = _kernels()

    def launch(kernel, operands, **more):
        return jax_triton.triton_call(
            *operands,
            kernel=kernel,
            out_shape=jax.ShapeDtypeStruct(operands[0].shape, operands[0].dtype),
            grid=(operands[0].size // features,),
            **constants(features, eps, offset, stacked),
            **more,
        )

    def forward(x, weight, index):
        return launch(forward_kernel, (x, weight, index))

    def backward(x, dout, weight, index):
        return launch(backward_kernel, (x, dout, dout, weight, index), HAS_STREAM=False)

    def backward_onto(x, dout, dtotal, weight, index):
        over_dtotal = dict(input_output_aliases={2: 0})
        return launch(backward_kernel, (x, dout, dtotal, weight, index), HAS_STREAM=True, **over_dtotal)

    total = x if y is None else added(x, y, multiplier)
    normed = with_gradients(forward, backward, backward_onto, stacked=stacked, eps=eps, offset=offset)
    return normed(total, weight, jnp.int32(0) if index is None else index)
