"""States of the gated delta rule, chunk after chunk (`jaxlora.delta_net` has the maths and where this stands in it).

With S [N, P] the state before a chunk of c tokens, W [c, N] what its deltas read of a state, Q [c, N] its queries,
K [c, N] its keys times their decay to the chunk's end, U_0 [c, P] the deltas of no state and a what is left of one at
the end:

    U = U_0 - W S        R = Q S        S' = a S + K^T U

and backward, from the gradients of R, of U and of S', where dU is the whole gradient of U:

    dU = gradient of U + K dS'        dS = a dS' - W^T dU + Q^T dR

What else there is to a gradient are products of all chunks at once, which the caller makes of the states S and of dS'.

Why not leave it to XLA: a loop of some ten launches a chunk, which write the states of all heads to memory and read
them again. On an H100 the 32 chunks of a layer of Qwen3.5-9B, 4 x 2048 tokens, take 1.8 ms so, and 0.3 here.

The layout. Columns of a state do not see each other, so a program has `columns` of one head's, in registers from the
first chunk to the last, and goes through memory once. What it multiplies is rounded to 16 bits as `chunks.product`
does; states, sums and what is left of them are float32.
"""

import functools
from dataclasses import dataclass
from typing import Any, no_type_check

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from jaxlora.kernels.nf4_shards import is_on_mesh


@dataclass(frozen=True, kw_only=True)
class Config:
    """columns: of a state, of one program. None changes a result but in the order of its sums."""

    columns: int = 64
    num_warps: int = 4
    num_stages: int = 1


# ---- In jnp ----------------------------------------------------------------------------------------------------------


def _product(spec: str, low: Any, a: Array, b: Array) -> Array:
    precision = jax.lax.Precision.HIGHEST if low == jnp.float32 else None
    return jnp.einsum(spec, a.astype(low), b.astype(low), precision=precision, preferred_element_type=jnp.float32)


def _for_each(query: Array, heads: int) -> Array:
    return jnp.repeat(query, heads // len(query), axis=0)


def delta_states_reference(
    lookups: Float[Array, "k m c n"],
    query: Float[Array, "k q c n"],
    key: Float[Array, "k m c n"],
    fresh: Float32[Array, "k m c p"],
    left: Float32[Array, "k m"],
    state: Float32[Array, "m n p"],
) -> tuple[Float32[Array, "k m c p"], Float32[Array, "k m c p"], Float[Array, "k m n p"], Float32[Array, "m n p"]]:
    """R, U, the states S before each chunk in the dtype of what is multiplied, and the state after the last one.

    m: heads, of all rows. lookups: W. query: Q, each head's for m / q that follow one another. fresh: U_0. state: that
    before the first chunk.
    """
    low = key.dtype

    def after(state, chunk):
        lookups, query, key, fresh, left = chunk
        delta = fresh - _product("min,mnp->mip", low, lookups, state)
        read = _product("min,mnp->mip", low, _for_each(query, len(state)), state)
        added = _product("mjn,mjp->mnp", low, key, delta)
        return left[:, None, None] * state + added, (read, delta, state.astype(low))

    last, (read, delta, states) = jax.lax.scan(after, state, (lookups, query, key, fresh, left))
    return read, delta, states, last


def delta_states_backward_reference(
    lookups: Float[Array, "k m c n"],
    query: Float[Array, "k q c n"],
    key: Float[Array, "k m c n"],
    left: Float32[Array, "k m"],
    of_read: Float32[Array, "k m c p"],
    of_delta: Float32[Array, "k m c p"],
    of_last: Float32[Array, "m n p"],
) -> tuple[Float32[Array, "k m c p"], Float[Array, "k m n p"], Float32[Array, "m n p"]]:
    """dU, which is the gradient of U_0 too, the gradients dS' of the states after each chunk in the dtype of what is
    multiplied, and that of the state before the first."""
    low = key.dtype

    def before(of_state, chunk):
        lookups, query, key, left, of_read, of_delta = chunk
        of_delta = of_delta + _product("mjn,mnp->mjp", low, key, of_state)
        of_before = left[:, None, None] * of_state - _product("min,mip->mnp", low, lookups, of_delta)
        of_before = of_before + _product("min,mip->mnp", low, _for_each(query, len(of_state)), of_read)
        return of_before, (of_delta, of_state.astype(low))

    of_chunks = lookups, query, key, left, of_read, of_delta
    of_first, (of_fresh, of_states) = jax.lax.scan(before, of_last, of_chunks, reverse=True)
    return of_fresh, of_states, of_first


# ---- Triton ----------------------------------------------------------------------------------------------------------


@functools.cache
@no_type_check  # a type checker's wrapper around the function would hide its source from Triton
def _kernels():
    """The Triton functions. Built on first use, since the library imports where Triton is not installed."""
    import triton
    import triton.language as tl

    @triton.jit
    def places(C: tl.constexpr, N: tl.constexpr, P: tl.constexpr, COLUMNS: tl.constexpr):
        """Of what a head has of a chunk, where a program's part of keys, of values and of a state is."""
        column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        row, token = tl.arange(0, N), tl.arange(0, C)
        of_keys = token[:, None] * N + row[None, :]
        return of_keys, token[:, None] * P + column[None, :], row[:, None] * P + column[None, :]

    @triton.jit
    def delta_states(
        lookups,  # [CHUNKS, HEADS, C, N], 16 bits
        query,  # [CHUNKS, HEADS / SHARED, C, N], 16 bits
        key,  # [CHUNKS, HEADS, C, N], 16 bits
        fresh,  # [CHUNKS, HEADS, C, P], float32
        left,  # [CHUNKS, HEADS], float32
        state,  # [HEADS, N, P], float32
        read,  # [CHUNKS, HEADS, C, P], float32
        delta,  # [CHUNKS, HEADS, C, P], float32
        states,  # [CHUNKS, HEADS, N, P], 16 bits
        last,  # [HEADS, N, P], float32
        CHUNKS: tl.constexpr,
        HEADS: tl.constexpr,
        C: tl.constexpr,
        N: tl.constexpr,
        P: tl.constexpr,
        SHARED: tl.constexpr,  # heads that have one head's queries
        COLUMNS: tl.constexpr,
    ):
        head = tl.program_id(0).to(tl.int64)
        of_keys, of_values, of_state = places(C, N, P, COLUMNS)
        s = tl.load(state + head * (N * P) + of_state)
        for chunk in range(CHUNKS):
            at = chunk * HEADS + head
            low = s.to(states.dtype.element_ty)
            tl.store(states + at * (N * P) + of_state, low)
            w = tl.load(lookups + at * (C * N) + of_keys)
            q = tl.load(query + at // SHARED * (C * N) + of_keys)
            u = tl.load(fresh + at * (C * P) + of_values) - tl.dot(w, low)
            tl.store(delta + at * (C * P) + of_values, u)
            tl.store(read + at * (C * P) + of_values, tl.dot(q, low))
            k = tl.load(key + at * (C * N) + of_keys)
            s = tl.dot(tl.trans(k), u.to(k.dtype), acc=tl.load(left + at) * s)
        tl.store(last + head * (N * P) + of_state, s)

    @triton.jit
    def delta_states_backward(
        lookups,  # [CHUNKS, HEADS, C, N], 16 bits
        query,  # [CHUNKS, HEADS / SHARED, C, N], 16 bits
        key,  # [CHUNKS, HEADS, C, N], 16 bits
        left,  # [CHUNKS, HEADS], float32
        of_read,  # [CHUNKS, HEADS, C, P], float32
        of_delta,  # [CHUNKS, HEADS, C, P], float32
        of_last,  # [HEADS, N, P], float32
        of_fresh,  # [CHUNKS, HEADS, C, P], float32
        of_states,  # [CHUNKS, HEADS, N, P], 16 bits
        of_first,  # [HEADS, N, P], float32
        CHUNKS: tl.constexpr,
        HEADS: tl.constexpr,
        C: tl.constexpr,
        N: tl.constexpr,
        P: tl.constexpr,
        SHARED: tl.constexpr,  # heads that have one head's queries
        COLUMNS: tl.constexpr,
    ):
        head = tl.program_id(0).to(tl.int64)
        of_keys, of_values, of_state = places(C, N, P, COLUMNS)
        ds = tl.load(of_last + head * (N * P) + of_state)
        for turn in range(CHUNKS):
            at = (CHUNKS - 1 - turn) * HEADS + head
            low = ds.to(of_states.dtype.element_ty)
            tl.store(of_states + at * (N * P) + of_state, low)
            k = tl.load(key + at * (C * N) + of_keys)
            du = tl.dot(k, low, acc=tl.load(of_delta + at * (C * P) + of_values))
            tl.store(of_fresh + at * (C * P) + of_values, du)
            w = tl.load(lookups + at * (C * N) + of_keys)
            q = tl.load(query + at // SHARED * (C * N) + of_keys)
            dr = tl.load(of_read + at * (C * P) + of_values)
            ds = tl.dot(tl.trans(q), dr.to(q.dtype), acc=tl.load(left + at) * ds)
            ds = tl.dot(tl.trans(w), (-du).to(w.dtype), acc=ds)
        tl.store(of_first + head * (N * P) + of_state, ds)

    return delta_states, delta_states_backward


def delta_states(lookups, query, key, fresh, left, state, *, config: Config | None = None) -> Any:
    """`delta_states_reference` as a Triton kernel. It may be vmapped, which loops, and is not differentiable.

    Raises:
        NotImplementedError: on a mesh; jax-triton is not installed, what is multiplied is not of 16 bits, or c, n and p
            are not powers of two from 16 on, n at most 128.
    """
    like = lambda array, dtype: jax.ShapeDtypeStruct(array.shape, dtype)
    states = jax.ShapeDtypeStruct((key.shape[0], *state.shape), key.dtype)
    outs = like(fresh, jnp.float32), like(fresh, jnp.float32), states, like(state, jnp.float32)
    return _call(0, (lookups, query, key, fresh, left, state), outs, config)


def delta_states_backward(
    lookups, query, key, left, of_read, of_delta, of_last, *, config: Config | None = None
) -> Any:
    """`delta_states_backward_reference` as a Triton kernel, as `delta_states` is one."""
    like = lambda array, dtype: jax.ShapeDtypeStruct(array.shape, dtype)
    states = jax.ShapeDtypeStruct((key.shape[0], *of_last.shape), key.dtype)
    outs = like(of_delta, jnp.float32), states, like(of_last, jnp.float32)
    return _call(1, (lookups, query, key, left, of_read, of_delta, of_last), outs, config)


def _call(which: int, operands: tuple, outs: tuple, config: Config | None) -> Any:
    if is_on_mesh():
        raise NotImplementedError("on a mesh the loop is left to XLA, which divides it")
    query, key, p = *operands[1:3], operands[-1].shape[-1]
    chunks, heads, c, n = key.shape
    if key.dtype not in (jnp.bfloat16, jnp.float16):
        raise NotImplementedError(f"the kernel multiplies bfloat16 or float16, not {key.dtype.name}")
    if any(size < 16 or size & (size - 1) for size in (c, n, p)) or n > 128:
        raise NotImplementedError(
            f"the kernel takes chunks, keys and values of a power of two from 16 on, keys of 128 at most; found {c}, "
            f"{n} and {p}"
        )
    try:
        import jax_triton
    except ImportError as error:
        raise NotImplementedError(f"the kernel needs jax-triton and triton ({error})") from error
    config = Config() if config is None else config
    columns = min(config.columns, p)

    @jax.custom_batching.sequential_vmap
    def run(*operands):
        return tuple(
            jax_triton.triton_call(
                *operands,
                kernel=_kernels()[which],
                out_shape=outs,
                grid=(heads, p // columns),
                num_warps=config.num_warps,
                num_stages=config.num_stages,
                CHUNKS=chunks,
                HEADS=heads,
                C=c,
                N=n,
                P=p,
                SHARED=heads // query.shape[1],
                COLUMNS=columns,
            )
        )

    return run(*operands)
