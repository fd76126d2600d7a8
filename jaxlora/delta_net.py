"""Gated delta rule: a state that every token decays, corrects and reads (arXiv:2412.06464).

The maths, of one head with a unit key k_t [N] and query q_t [N], a value v_t [P], a decay a_t in (0, 1] and a step
b_t in (0, 1):

    S_t = a_t S_(t-1) + b_t k_t (v_t - a_t S_(t-1)^T k_t)^T        [N, P]
    y_t = S_t^T q_t

The state is a table from keys to values. A token looks up what the table has for its key and writes, not its value, but
the step times what that lacks (the delta); so a key that comes again is written over and not added to.

Written out, with s_t = sum over r <= t of log a_r and u_t the deltas that are written:

    u_t = b_t (v_t - exp(s_t) S^T k_t - sum over r < t of  exp(s_t - s_r) (k_t . k_r) u_r)
    y_t = exp(s_t) S^T q_t            + sum over r <= t of exp(s_t - s_r) (q_t . k_r) u_r
    S'  = exp(s_end) S                + sum over r of      exp(s_end - s_r) k_r u_r^T

with S the state of the token before a chunk, and s counted from the chunk's start. The first line is a triangular
system for the chunk's deltas: (I + L) U = b (V - exp(s) K S), where L has b_t exp(s_t - s_r) (k_t . k_r) below its
diagonal. The state enters it linearly, so that it is solved without one, of all chunks of a *group* at once (`chunks`):

    U = U_0 - W S,    U_0 = T b V,    W = T b exp(s) K,    T = (I + L)^-1

as in the WY form of arXiv:2412.06464. Only S, and with it W S and Q S, come chunk after chunk (`_states`); on a GPU in
one kernel (`kernels/delta_states.py`).

T is found by substitution of blocks, products throughout (`inverse`):

    [I + A       ]^-1   [  A'       ]
    [  C    I + B]    = [-B' C A'  B']        A' = (I + A)^-1, B' = (I + B)^-1

from blocks of one number up. No number on the way is above 1: T_tr is the delta that t writes where r has written a 1
and nobody else anything, a step times what the state has for a unit key, which no token between makes more; so are A'
and B', and -C A' is the same where nobody writes but in A. T as a product of powers of L would be as many products, but
the powers grow like binomials where keys are alike, and cancel.

So work and memory grow with the length, not with its square, and a single token is a chunk of one. Sums, decays, states
and T's making are float32. What is multiplied is rounded to the model's dtype in both directions, T too, as in the
makers' kernels (flash-linear-attention). In float32, and of a single token, nothing is. Where a chunk's keys are all
alike, steps near 1 and decays none, deltas of the whole chunk cancel, and so the roundings of 64 of them add up. The
backward pass keeps the states between groups and computes a group again.

Before the scan queries, keys and values go through a short causal convolution over time. Documents in one row do not
see each other, neither through a tap nor through the state: see `mamba`, which has the same two parts.

Shapes: b batch, t tokens, k chunks of a group, c (i, j) tokens of a chunk, g heads of queries and keys of n, each
shared by r of the h = g r heads of values of p, w taps of the convolution, and 2 g n + h p channels that go through it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from jaxlora import chunks
from jaxlora.config import LinearAttentionConfig, ModelConfig
from jaxlora.kernels import api as kernels
from jaxlora.kernels.gated import ACTIVATIONS
from jaxlora.mamba import Convolution, GatedNorm, put_layer

# ---- The triangular system -------------------------------------------------------------------------------------------

# Products of smaller blocks are written out: a library's are made for larger ones, and there are many of these.
_WRITTEN_OUT = 8


def _block_product(a: Array, b: Array) -> Array:
    """a b of many small squares, in float32."""
    size = a.shape[-1]
    if size > _WRITTEN_OUT:
        return chunks.product("...im,...mj->...ij", jnp.float32, a, b)
    return sum((a[..., m : m + 1] * b[..., m : m + 1, :] for m in range(1, size)), a[..., :1] * b[..., :1, :])


def inverse(below: Float[Array, "*batch c c"]) -> Float[Array, "*batch c c"]:
    """(I + L)^-1 of a matrix L that is 0 on its diagonal and above, by substitution of blocks; c is a power of two."""
    size = below.shape[-1]
    if size == 1:
        return jnp.ones_like(below)
    half = size // 2
    of_blocks = inverse(jnp.stack([below[..., :half, :half], below[..., half:, half:]], axis=-3))
    first, second = of_blocks[..., 0, :, :], of_blocks[..., 1, :, :]
    corner = -_block_product(second, _block_product(below[..., half:, :half], first))
    upper = jnp.concatenate([first, jnp.zeros_like(first)], axis=-1)
    return jnp.concatenate([upper, jnp.concatenate([corner, second], axis=-1)], axis=-2)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _solve(low: Any, below: Array, right: Array) -> Array:
    """(I + L)^-1 R. The gradient of L is made of what is solved for, and goes through no inverse."""
    return _solve_forward(low, below, right)[0]


def _solve_forward(low, below, right):
    size = below.shape[-1]
    if size == 1:  # a single token
        solution, inverted = right, jnp.ones_like(below)
    else:
        padding = (1 << (size - 1).bit_length()) - size
        padded = jnp.pad(below, [(0, 0)] * (below.ndim - 2) + [(0, padding)] * 2)
        inverted = inverse(padded)[..., :size, :size].astype(low)
        solution = chunks.product("...ij,...jm->...im", low, inverted, right)
    return solution, (inverted, solution.astype(low))


def _solve_backward(low, residuals, gradient):
    inverted, solution = residuals
    of_right = chunks.product("...ij,...im->...jm", low, inverted, gradient)
    return -jnp.tril(chunks.product("...im,...jm->...ij", low, of_right, solution), -1), of_right


_solve.defvjp(_solve_forward, _solve_backward)

# ---- The states ------------------------------------------------------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _states(
    low: Any, lookups: Array, query: Array, key: Array, fresh: Array, left: Array, state: Array
) -> tuple[Array, Array, Array]:
    """Chunk after chunk: what queries read of the state before it [k, m, c, p], its deltas, and the last state.

    lookups [k, m, c, n]: W; query [k, m / r, c, n]; key [k, m, c, n]: times the decay to the chunk's end; fresh
    [k, m, c, p]: deltas of no state; left [k, m]: what is left of a state; m: heads of all rows. The gradients of what
    is multiplied with the states are products of all chunks at once.
    """
    return _states_forward(low, lookups, query, key, fresh, left, state)[0]


def _states_forward(low, lookups, query, key, fresh, left, state):
    lookups, query, key = (part.astype(low) for part in (lookups, query, key))
    read, delta, states, last = kernels.delta_states(lookups, query, key, fresh, left, state)
    return (read, delta, last), (lookups, query, key, left, states, delta)


def _states_backward(low, residuals, gradients):
    lookups, query, key, left, states, delta = residuals
    of_read, of_delta, of_last = gradients
    of_fresh, of_states, of_state = kernels.delta_states_backward(lookups, query, key, left, of_read, of_delta, of_last)
    of_lookups = -chunks.product("kmip,kmnp->kmin", low, of_fresh, states)
    shared = lambda part: part.reshape(*query.shape[:2], -1, *part.shape[2:])
    of_query = chunks.product("kgrip,kgrnp->kgin", low, shared(of_read), shared(states))
    of_key = chunks.product("kmjp,kmnp->kmjn", low, delta, of_states)
    of_left = jnp.sum(of_states.astype(jnp.float32) * states.astype(jnp.float32), axis=(-2, -1))
    return of_lookups, of_query, of_key, of_fresh, of_left, of_state


_states.defvjp(_states_forward, _states_backward)

# ---- The scan --------------------------------------------------------------------------------------------------------


def gated_delta_scan(
    query: Float[Array, "b t g n"],
    key: Float[Array, "b t g n"],
    value: Float[Array, "b t h p"],
    log_decay: Float[Array, "b t h"],
    step: Float[Array, "b t h"],
    runs: Int[Array, "b t"],
    state: Float[Array, "b h n p"],
    *,
    chunk: int,
) -> tuple[Float[Array, "b t h p"], Float[Array, "b h n p"]]:
    """y, and the state after the last token, both float32; `chunk` tokens at a time.

    Queries and keys are used as they are, but rounded to the dtype of `value`: see `unit`. log_decay: at most 0. runs:
    never fall along a row. `state` is that of run 0: tokens of a later run begin with none.
    """
    b, t, h, p = value.shape
    g, n = key.shape[2:]
    heads = (g, h // g)  # a key head and those of its value heads
    chunk = min(chunk, t)
    # What is solved for and with, what reads and what is read are as large together as the largest four times.
    cut = chunks.Cut.of(t, chunk, 4 * b * h * max(chunk * chunk, chunk * (n + p), n * p))
    low = value.dtype if t > 1 else jnp.float32  # one token is no matrix
    product = functools.partial(chunks.product, dtype=low)

    def grouped(y: Array, heads: tuple[int, ...]) -> Array:
        """[b, t, h, ...] -> [groups, k, b, *heads, c, ...]; a padded token has key and step 0: it changes nothing."""
        y = cut.tokens(y)
        y = y.reshape(*y.shape[:4], *heads, *y.shape[5:])
        return jnp.moveaxis(y, (0, 3), (2, 3 + len(heads)))

    inputs = (
        grouped(query.astype(low), heads[:1]),
        grouped(key.astype(low), heads[:1]),
        grouped(value, heads),
        *(grouped(part.astype(jnp.float32), heads) for part in (log_decay, step)),
        jnp.moveaxis(cut.runs(runs), 0, 2),
    )
    causal = jnp.tril(jnp.ones((chunk, chunk), bool))

    def body(carry, inputs):
        state, run = carry  # [m, n, p], of all heads of all rows, and the run that it is of
        query, key, value, log_decay, step, runs = inputs
        query, key, value = (part.astype(jnp.float32) for part in (query, key, value))  # as are sums of gradients
        sees = causal & (runs[..., :, None] == runs[..., None, :])
        # s, counted from the start of the chunk or of a run in it, so that not even rounding crosses between runs.
        total = product("kbij,kbgrj->kbgri", dtype=jnp.float32, a=sees.astype(jnp.float32), b=log_decay)
        first_runs = jnp.concatenate([run[None], runs[:-1, :, -1]])  # of the state before a chunk
        last_runs, end = runs[..., -1], total[..., -1]
        per_head = (slice(None), slice(None), None, None)
        decays = chunks.kept(total[..., :, None] - total[..., None, :], sees[per_head])
        from_state = chunks.kept(total, (runs == first_runs[..., None])[per_head])[..., None]
        to_state = chunks.kept(end[..., None] - total, (runs == last_runs[..., None])[per_head])[..., None]
        left = chunks.kept(end, (last_runs == first_runs)[per_head])
        # The deltas of no state, and W.
        keys, step = key[:, :, :, None], step[..., None]
        overlap = product("kbgin,kbgjn->kbgij", a=key, b=key)[:, :, :, None]
        right = jnp.concatenate([step * from_state * keys, step * value], axis=-1)
        solution = cast(Array, _solve(low, jnp.tril(step * overlap * decays, -1), right))
        # Those of the states.
        flat = lambda part: part.reshape(len(part), b * h, *part.shape[4:])
        states = _states(
            low, flat(solution[..., :n]), query.reshape(-1, b * g, *query.shape[3:]), flat(to_state * keys),
            flat(solution[..., n:]), flat(left), state,
        )  # fmt: skip
        read, delta, state = cast(tuple[Array, Array, Array], states)
        read, delta = (part.reshape(solution[..., n:].shape) for part in (read, delta))
        # What is read.
        weights = product("kbgin,kbgjn->kbgij", a=query, b=key)[:, :, :, None] * decays
        y = from_state * read + product("kbgrij,kbgrjp->kbgrip", a=weights, b=delta)
        return (state, last_runs[-1]), y

    start = (state.astype(jnp.float32).reshape(b * h, n, p), jnp.zeros(b, runs.dtype))
    (state, _), y = jax.lax.scan(jax.checkpoint(body, prevent_cse=False), start, inputs)
    y = jnp.moveaxis(y, (2, 5), (0, 3)).reshape(b, -1, h, p)[:, :t]
    return y, state.reshape(b, h, n, p)


def unit(x: Float[Array, "*batch n"]) -> Float[Array, "*batch n"]:
    """x over its length, float32; 1e-6 is added to the square, so that nothing stays nothing."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True) + 1e-6)


class GatedDeltaNet(nnx.Module):
    """Projections, convolution, scan, gated norm, projection. [B, T, D] -> [B, T, D].

    in_proj_qkv makes queries [g n], keys [g n] and values [h p], in_proj_z the gate [h p], in_proj_b and in_proj_a
    what steps and decays are made of [h]; these two are never quantised.
    """

    def __init__(self, config: ModelConfig, linear: LinearAttentionConfig, make_linear: Callable, make_param: Callable):
        self.linear, width = linear, config.hidden_size
        self.act = config.hidden_act
        h, values = linear.num_value_heads, linear.num_value_heads * linear.value_head_dim
        self.in_proj_qkv = make_linear(width, linear.channels, ("ssm", "embed"), False)
        self.in_proj_z = make_linear(width, values, ("ssm", "embed"), False)
        self.in_proj_b, self.in_proj_a = (
            make_linear(width, h, ("ssm", "embed"), False, quantised=False) for _ in range(2)
        )
        self.conv1d = Convolution(linear.channels, linear.conv_kernel_dim, False, make_param)
        self.A_log, self.dt_bias = (make_param((h,), ("ssm",)) for _ in range(2))
        self.norm = GatedNorm(linear.value_head_dim, 1, config.norm_eps, True, make_param)
        self.out_proj = make_linear(values, width, ("embed", "ssm"), False)
        # What a cache has of each row.
        self.convolution_shape = (linear.conv_kernel_dim - 1, linear.channels)
        self.state_shape = (h, linear.key_head_dim, linear.value_head_dim)

    def __call__(self, x, runs: Int[Array, "b t"], key, cache=None):
        """`cache` is (convolution inputs, state, layer) of stacked ones, [repeats, B, w - 1, channels] in x's dtype and
        [repeats, B, h, n, p] float32, and returned as this call's last token leaves them."""
        linear, (b, t, _) = self.linear, x.shape
        g, n, h, p = linear.num_key_heads, linear.key_head_dim, linear.num_value_heads, linear.value_head_dim
        keys = [None] * 5 if key is None else list(jax.random.split(key, 5))
        if cache is None:
            before = jnp.zeros((b, *self.convolution_shape), x.dtype)
            state = jnp.zeros((b, *self.state_shape), jnp.float32)
        else:
            before, state = (jax.lax.dynamic_index_in_dim(part, cache[2], keepdims=False) for part in cache[:2])
        qkv = checkpoint_name(self.in_proj_qkv(x, keys[0]), "query")
        qkv, before = self.conv1d(qkv, before, runs)
        query, key_, value = jnp.split(ACTIVATIONS[self.act](qkv), [g * n, 2 * g * n], axis=-1)
        query, key_ = (unit(part.reshape(b, t, g, n)) for part in (query, key_))
        gate = checkpoint_name(self.in_proj_z(x, keys[1]), "gate")
        step = jax.nn.sigmoid(self.in_proj_b(x, keys[2]).astype(jnp.float32))
        rate, dt_bias = (v.get_value().astype(jnp.float32) for v in (self.A_log, self.dt_bias))
        log_decay = -jnp.exp(rate) * jax.nn.softplus(self.in_proj_a(x, keys[3]).astype(jnp.float32) + dt_bias)
        y, state = gated_delta_scan(
            query * n**-0.5, key_, value.reshape(b, t, h, p), log_decay, step, runs, state, chunk=linear.chunk_size
        )
        y = checkpoint_name(y.astype(x.dtype), "attention_output")
        y = self.norm(y.reshape(b, t * h, p), gate.reshape(b, t * h, p)).reshape(b, t, h * p)
        if cache is not None:
            cache = (put_layer(cache[0], before, cache[2]), put_layer(cache[1], state, cache[2]), cache[2])
        return self.out_proj(y.astype(x.dtype), keys[4]), cache
