"""Causal flash attention for cards of compute capability 9.0: a forward pass in Mosaic GPU, and cuDNN's backward pass.

The maths (arXiv:2205.14135, arXiv:2407.08608). A program has 128 queries of a head, and walks over the keys in blocks
of 128. With s the scores of a block in units of log 2, a query keeps the highest m so far, the sum l and the result o:

    m' = max(m, max s),  p = 2^(s - m'),  l' = l 2^(m - m') + sum p,  o' = o 2^(m - m') + p v;   out = o / l.

Scores are multiplied by the scale in float32, where they become exponents, so q is read as it is. Besides the result
there is the logarithm of the sum of exponentials, m ln 2 + ln l, which with it is all that cuDNN's backward pass asks
of a forward pass.

The layout. Two warpgroups have 64 queries each and multiply; a third copies keys and values, two blocks ahead. The
tensor cores are one warpgroup's at a time. In its turn it multiplies a block's p with v and q with the next block's
keys; then it makes p of the scores, while the other one has its turn. Only the last block of a program is masked.
Programs with the most keys come first, so that short ones fill the end, and programs of the same queries are
neighbours, of which those that share key heads find them in the second-level cache.

Beside cuDNN's forward pass on an H100 (8B's heads, 131,072 tokens) it takes 2% more cycles and 8% less energy. That is
long enough for power to set the clock: 1,512 MHz for 1,355, and 8% less time, 2% with the backward pass. In steps of
shorter rows other kernels set the clock, and it gains nothing (`api.LEAST_MOSAIC_ATTENTION`). With heads of 64 it never
does, so these are left to cuDNN.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import Literal
from jaxtyping import Array, Float, Float32, Int

HEAD_DIM = 128
TILE = 128  # queries of a program, and keys of a block
STAGES = 2  # blocks of keys and values that shared memory has places for
LOG2_E = math.log2(math.e)
CUDNN_FORWARD = "dot_product_attention_fwd_wrapper"  # jax's primitive; it has the results of `forward`


def attention_mosaic(
    q: Float[Array, "b t n h"],
    k: Float[Array, "b s kv h"],
    v: Float[Array, "b s kv h"],
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    key_bias: Float[Array, "b n s"] | None = None,
    sinks: Float[Array, " n"] | None = None,
    query_segments: Int[Array, "b t"] | None = None,
    key_segments: Int[Array, "b s"] | None = None,
    offset: int | Int[Array, "*b"] = 0,
) -> Float[Array, "b t n h"]:
    """`attention_reference` for whole causal rows. The result is marked "attention_output" for `jax.checkpoint`, and
    the sums of exponentials "attention_sums".

    Raises:
      NotImplementedError: anything but 16-bit heads of `HEAD_DIM`, a multiple of `TILE` tokens and a plain causal mask;
        or there is a mesh in JAX's context, since the kernel does not say how it is divided.
    """
    if any(option is not None for option in (window, softcap, key_bias, sinks, query_segments, key_segments)):
        raise NotImplementedError("the kernel has no window, softcap, bias, sinks and documents")
    if q.dtype not in (jnp.bfloat16, jnp.float16) or k.dtype != q.dtype or v.dtype != q.dtype:
        raise NotImplementedError(f"the kernel takes bfloat16 or float16, found {q.dtype}, {k.dtype} and {v.dtype}")
    if not isinstance(offset, int) or offset != 0 or q.shape[1] != k.shape[1]:
        raise NotImplementedError("the kernel takes queries that stand at the keys' own places")
    if q.shape[-1] != HEAD_DIM or q.shape[1] % TILE:
        raise NotImplementedError(
            f"the kernel takes heads of {HEAD_DIM} and multiples of {TILE} tokens, found {q.shape[-1]} and {q.shape[1]}"
        )
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty and mesh.size > 1:
        raise NotImplementedError("the kernel cannot be divided over a mesh")
    return _attention(q, k, v, scale)


def forward(
    q: Float[Array, "b t n h"], k: Float[Array, "b t kv h"], v: Float[Array, "b t kv h"], scale: float
) -> tuple[Float[Array, "b t n h"], Float32[Array, "b n t"]]:
    """The result of attention, and the logarithms of its sums of exponentials."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as gpu

    batch, tokens, heads, size = q.shape
    tiles, group, half = tokens // TILE, heads // k.shape[2], TILE // 2
    by_row = gpu.Layout.WGMMA.reduce(1)
    slot_of = lambda index: lax.rem(index, jnp.int32(STAGES))
    across = lambda x, like: lax.broadcast_in_dim(x, like.shape, [0])

    def multiply(tile, wg, query, k_at, v_at, k_here, v_here, k_free, v_free, turn):
        """(out, highest, total) of the 64 queries of a warpgroup."""

        def block(index, carry, is_last=False):
            out, highest, total = carry
            slot = slot_of(index)

            def scores(at):
                gpu.wgmma(at, query, k_at.at[slot].transpose((1, 0)))
                gpu.barrier_arrive(turn.at[1 - wg])
                return at[...]

            s = pl.run_scoped(scores, gpu.ACC((half, TILE), jnp.float32))
            gpu.barrier_arrive(k_free.at[slot])
            if is_last:
                place = lambda axis: gpu.broadcasted_iota(jnp.int32, s.shape, axis, layout=gpu.Layout.WGMMA)
                s = jnp.where(place(0) + wg * half >= place(1), s, -jnp.inf)
            before, highest = highest, jnp.maximum(highest, s.max(axis=1) * (scale * LOG2_E))
            p = jnp.exp2(s * (scale * LOG2_E) - across(highest, s))
            shrink = jnp.exp2(before - highest)
            out *= across(shrink, out)
            total = total * shrink + p.sum(axis=1)
            # All of this is the other one's turn: nothing of it may be left for after the wait.
            out, highest, total, p = lax.optimization_barrier((out, highest, total, p.astype(v.dtype)))
            gpu.barrier_wait(v_here.at[slot])
            gpu.barrier_wait(turn.at[wg])

            def add(at):
                gpu.wgmma(at, p, v_at.at[slot])
                if not is_last:
                    gpu.barrier_wait(k_here.at[slot_of(index + 1)])

            out = pl.run_state(add)(gpu.ACC.init(out))
            gpu.barrier_arrive(v_free.at[slot])
            return out, highest, total

        start = (
            gpu.layout_cast(jnp.zeros((half, size), jnp.float32), gpu.Layout.WGMMA),
            gpu.layout_cast(jnp.full((half,), -jnp.inf, jnp.float32), by_row),
            gpu.layout_cast(jnp.zeros((half,), jnp.float32), by_row),
        )
        gpu.barrier_wait(k_here.at[0])
        pl.when(wg == 1)(lambda: gpu.barrier_wait(turn.at[1]))
        carry = block(tile, lax.fori_loop(jnp.int32(0), tile, block, start), is_last=True)
        pl.when(wg == 0)(lambda: gpu.barrier_arrive(turn.at[1]))
        return carry

    def attend(
        q_ref, k_ref, v_ref, out_ref, sums_ref, q_at, k_at, v_at, out_at, sums_at, q_here, k_here, v_here, k_free,
        v_free, turn,
    ):  # fmt: skip
        row, head, wg = lax.axis_index("rows"), lax.axis_index("heads"), lax.axis_index("wg")
        tile = tiles - 1 - lax.axis_index("tiles")

        @pl.when(wg < 2)
        def _():
            gpu.set_max_registers(232, action="increase")
            own = row, pl.ds(tile * TILE + wg * half, half), head
            gpu.copy_gmem_to_smem(q_ref.at[own], q_at.at[wg], q_here.at[wg])
            gpu.barrier_wait(q_here.at[wg])
            out, highest, total = multiply(tile, wg, q_at.at[wg], k_at, v_at, k_here, v_here, k_free, v_free, turn)
            out_at[wg] = (out * across(1 / total, out)).astype(q.dtype)
            sums_at[wg] = highest * (1 / LOG2_E) + jnp.log(total)
            gpu.commit_smem()
            gpu.copy_smem_to_gmem(out_at.at[wg], out_ref.at[own])
            gpu.copy_smem_to_gmem(sums_at.at[wg], sums_ref.at[row, head, own[1]])
            gpu.wait_smem_to_gmem(0)

        @pl.when(wg == 2)
        def _():
            gpu.set_max_registers(40, action="decrease")

            @pl.loop(0, tile + 1)
            def _(index):
                slot = slot_of(index)
                source = row, pl.ds(index * TILE, TILE), lax.div(head, jnp.int32(group))
                pl.when(index >= STAGES)(lambda: gpu.barrier_wait(k_free.at[slot]))
                gpu.copy_gmem_to_smem(k_ref.at[source], k_at.at[slot], k_here.at[slot])
                pl.when(index >= STAGES)(lambda: gpu.barrier_wait(v_free.at[slot]))
                gpu.copy_gmem_to_smem(v_ref.at[source], v_at.at[slot], v_here.at[slot])

    transforms = gpu.TilingTransform((8, 64)), gpu.SwizzleTransform(128)  # as wgmma reads 16-bit elements
    tiled = lambda count, rows: gpu.SMEM((count, rows, size), q.dtype, transforms=transforms)
    barriers = lambda count, arrivals=1: gpu.Barrier(num_barriers=count, num_arrivals=arrivals)
    return gpu.kernel(
        attend,
        out_type=(jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct((batch, heads, tokens), jnp.float32)),
        scratch_types=[
            tiled(2, half), tiled(STAGES, TILE), tiled(STAGES, TILE), tiled(2, half), gpu.SMEM((2, half), jnp.float32),
            barriers(2), barriers(STAGES), barriers(STAGES), barriers(STAGES, 2), barriers(STAGES, 2), barriers(2),
        ],
        grid=(heads, tiles, batch),
        grid_names=("heads", "tiles", "rows"),
        num_threads=3,
        thread_name="wg",
        kernel_name="attention_mosaic",
        # No memory is both read and written by the same thread, which is what automatic barriers are for.
        compiler_params=gpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True, reduction_scratch_bytes=0),
    )(q, k, v)  # fmt: skip


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _attention(q, k, v, scale):
    return forward(q, k, v, scale)[0]


def _keep(q, k, v, scale):
    out, sums = forward(q, k, v, scale)
    out, sums = checkpoint_name(out, "attention_output"), checkpoint_name(sums, "attention_sums")
    return out, (q, k, v, out, sums)


def _backward(scale, kept, d_out):
    """cuDNN's, which jax.nn offers behind cuDNN's forward pass alone: so its pullback is traced, and in what was traced
    that pass's results are those that were kept."""
    *inputs, out, sums = kept

    def pullback(q, k, v, d_out):
        attention = functools.partial(jax.nn.dot_product_attention, scale=scale, is_causal=True, implementation="cudnn")
        return jax.vjp(attention, q, k, v)[1](d_out)

    traced = jax.make_jaxpr(pullback)(*inputs, d_out)
    jaxpr = traced.jaxpr
    if [equation.primitive.name for equation in jaxpr.eqns].count(CUDNN_FORWARD) != 1:
        raise RuntimeError(
            f"this version of JAX ({jax.__version__}) has no {CUDNN_FORWARD} in cuDNN's attention, whose results are "
            "replaced here. Name another `implementation` of attention, such as 'cudnn', and report it to jaxlora."
        )
    values = dict(zip((*jaxpr.invars, *jaxpr.constvars), (*inputs, d_out, *traced.consts), strict=True))
    value_of = lambda variable: variable.val if isinstance(variable, Literal) else values[variable]
    for equation in jaxpr.eqns:
        made: list = [out, sums]
        if equation.primitive.name != CUDNN_FORWARD:
            results = equation.primitive.bind(*map(value_of, equation.invars), **equation.params)
            made = results if equation.primitive.multiple_results else [results]
        values |= zip(equation.outvars, made, strict=True)
    return tuple(map(value_of, jaxpr.outvars))


_attention.defvjp(_keep, _backward)
