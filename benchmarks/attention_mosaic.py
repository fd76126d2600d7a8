"""Causal flash attention's forward pass in Mosaic GPU, for compute capability 9.0, beside cuDNN's: is it worth a step?

    python benchmarks/attention_mosaic.py [--tokens 8192 131072] [--layers 0] [--seconds 5]

One JSON line each, at 8B's heads. "check": how far results and gradients are from cuDNN's. "attention": milliseconds of
the forward pass, and of it with the backward pass, in turns. "attention_power": what the card does meanwhile, so many
seconds long. With `--layers`, "attention_in_step": seconds of a step of 8B with so many layers and one row of the most
tokens, in turns with cuDNN's.

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

It is not in the library, since no step of real length was faster for it (docs/decisions.md).
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import statistics
import subprocess
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import Literal
from jaxtyping import Array, Float, Float32

TILE = 128  # queries of a program, and keys of a block
STAGES = 2  # blocks of keys and values that shared memory has places for
LOG2_E = math.log2(math.e)
CUDNN_FORWARD = "dot_product_attention_fwd_wrapper"  # jax's primitive; it has the results of `forward`


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
def attention(q, k, v, scale):
    return forward(q, k, v, scale)[0]


def _keep(q, k, v, scale):
    out, sums = forward(q, k, v, scale)
    out, sums = (checkpoint_name(x, "attention_output") for x in (out, sums))  # what policies keep
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
            f"in JAX {jax.__version__} cuDNN's attention has no {CUDNN_FORWARD}, whose results are replaced here"
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


attention.defvjp(_keep, _backward)


# ---- Measuring -------------------------------------------------------------------------------------------------------

HEADS, KEY_HEADS, SIZE = 32, 8, 128
SCALE = SIZE**-0.5
FORMS: dict[str, Callable] = {
    "cudnn": functools.partial(jax.nn.dot_product_attention, scale=SCALE, is_causal=True, implementation="cudnn"),
    "mosaic": lambda q, k, v: attention(q, k, v, SCALE),
}


def report(**line):
    print(json.dumps(line), flush=True)


def inputs(rows: int, tokens: int) -> list[jax.Array]:
    """q, k, v and the gradient of the result."""
    heads = HEADS, KEY_HEADS, KEY_HEADS, HEADS
    keys = jax.random.split(jax.random.key(0), len(heads))
    return [jax.random.normal(key, (rows, tokens, n, SIZE), jnp.bfloat16) for key, n in zip(keys, heads, strict=True)]


def with_gradients(form: Callable) -> Callable:
    def both(q, k, v, d_out):
        out, pullback = jax.vjp(form, q, k, v)
        return out, *pullback(d_out)

    return both


def check() -> None:
    x = inputs(2, 1024)
    got, wanted = (jax.jit(with_gradients(FORMS[name]))(*x) for name in ("mosaic", "cudnn"))
    norm = lambda x: float(jnp.linalg.norm(x.astype(jnp.float32)))
    errors = [norm(x.astype(jnp.float32) - y.astype(jnp.float32)) / norm(y) for x, y in zip(got, wanted, strict=True)]
    report(op="check", errors=errors)
    assert max(errors) < 1e-3, errors


def time_in_turns(programs: dict[str, Callable], x: list[jax.Array], rounds: int = 3, **facts) -> None:
    for program in programs.values():
        jax.block_until_ready(program(*x))
    runs = max(1, 2**18 // x[0].shape[1] // 2)
    for number in range(rounds):
        for name, program in programs.items():
            start = time.perf_counter()
            results = [program(*x) for _ in range(runs)]
            jax.block_until_ready(results[-1])
            ms = (time.perf_counter() - start) / runs * 1e3
            report(op="attention", name=name, tokens=x[0].shape[1], round=number, ms=round(ms, 3), **facts)
            del results


def watched(run: Callable[[], Any]) -> dict[str, int]:
    """What the card does while `run` runs: means of its clock and power, and how warm it is at the end."""
    query = "--query-gpu=clocks.sm,power.draw.instant,temperature.gpu"
    command = ["nvidia-smi", query, "--format=csv,noheader,nounits", "-lms", "100"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as watch:
        run()
        watch.terminate()
        lines = watch.communicate()[0].splitlines()
    seen = [[float(word) for word in line.split(",")] for line in lines if line.count(",") == 2]
    seen = seen[len(seen) // 4 :]  # a clock takes a while to settle
    mean = lambda i: round(statistics.mean(row[i] for row in seen))
    return dict(mhz=mean(0), watts=mean(1), celsius=round(seen[-1][2]))


def measure_power(tokens: int, seconds: float) -> None:
    x = inputs(1, tokens)[:3]
    for name in [*FORMS] * 2:
        program, times = jax.jit(FORMS[name]).lower(*x).compile(), []

        def run(program=program, times=times):
            end = time.perf_counter() + seconds
            while (start := time.perf_counter()) < end:
                jax.block_until_ready(program(*x))
                times.append(time.perf_counter() - start)

        seen = watched(run)
        report(op="attention_power", name=name, tokens=tokens, ms=round(statistics.median(times) * 1e3, 2), **seen)


def measure_steps(tokens: int, layers: int) -> None:
    from jaxlora.bench import shapes
    from jaxlora.bench.step import build
    from jaxlora.kernels import api

    def ours(q, k, v, *, scale, **others):
        offset = others.pop("offset")
        if any(value is not None for value in others.values()) or offset != 0 or q.shape[1] % TILE:
            raise NotImplementedError("the kernel takes plain causal rows")
        return attention(q, k, v, scale)

    table = api._OPS["attention"]
    work, steps = shapes.Work("8b", 1, tokens), {}
    with mock.patch.dict(shapes.CONFIGS["8b"], num_hidden_layers=layers):
        for name in FORMS:
            with mock.patch.dict(api._OPS, attention=table if name == "cudnn" else {"mosaic": ours, **table}):
                steps[name] = build(work, "offload_residual")
            for _ in range(2):
                steps[name]()
    for number in range(3):
        for name, step in steps.items():
            times = []

            def run(step=step, times=times):
                for _ in range(2):
                    start = time.perf_counter()
                    step()
                    times.append(round(time.perf_counter() - start, 4))

            seen = watched(run)
            report(
                op="attention_in_step", name=name, work=work.name, layers=layers, round=number, seconds=times, **seen
            )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192, 131072])
    parser.add_argument("--layers", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=5)
    args = parser.parse_args()
    check()
    for tokens in args.tokens:
        x = inputs(1, tokens)
        time_in_turns({name: jax.jit(form) for name, form in FORMS.items()}, x[:3], gradients=False)
        time_in_turns({name: jax.jit(with_gradients(form)) for name, form in FORMS.items()}, x, gradients=True)
    measure_power(max(args.tokens), args.seconds)
    if args.layers:
        measure_steps(max(args.tokens), args.layers)


if __name__ == "__main__":
    main()
