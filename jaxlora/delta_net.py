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
diagonal. It is solved by substitution. The inverse as a product of powers of L would be products of matrices
throughout, but the powers of L grow like binomials where keys are alike, and cancel.

So work and memory grow with the length, not with its square, and a single token is a chunk of one. Everything in the
scan is float32. The backward pass keeps the states between chunks and computes a chunk again.

Before the scan queries, keys and values go through a short causal convolution over time. Documents in one row do not
see each other, neither through a tap nor through the state: see `mamba`, which has the same two parts.

Shapes: b batch, t tokens, c (i, j) those of a chunk, g heads of queries and keys of n, each shared by r of the h = g r
heads of values of p, w taps of the convolution, and k = 2 g n + h p channels that go through it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from jaxlora.config import LinearAttentionConfig, ModelConfig
from jaxlora.kernels.gated import ACTIVATIONS
from jaxlora.mamba import Convolution, GatedNorm, put_layer

# Plain float32 on a GPU too, where XLA would take float32 products in TF32.
_einsum = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


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

    Queries and keys are used as they are: see `unit`. log_decay: at most 0. runs: never fall along a row. `state` is
    that of run 0: tokens of a later run begin with none.
    """
    b, t, h, p = value.shape
    g, n = key.shape[2:]
    r = h // g
    chunk = min(chunk, t)
    count = -(-t // chunk)

    def chunks(y: Array, heads: tuple[int, ...]) -> Array:
        """[b, t, h, ...] -> [count, b, *heads, c, ...]; a padded token has key and step 0: it changes nothing."""
        y = jnp.pad(y.astype(jnp.float32), ((0, 0), (0, count * chunk - t), *[(0, 0)] * (y.ndim - 2)))
        y = y.reshape(b, count, chunk, *heads, *y.shape[3:])
        return jnp.moveaxis(y, (1, 2), (0, 2 + len(heads)))

    padded_runs = jnp.pad(runs, ((0, 0), (0, count * chunk - t)), mode="edge")
    per_value = (g, r)
    inputs = (
        chunks(query, (g,)),
        chunks(key, (g,)),
        *(chunks(part, per_value) for part in (value, log_decay, step)),
        padded_runs.reshape(b, count, chunk).swapaxes(0, 1),
    )
    causal = jnp.tril(jnp.ones((chunk, chunk), bool))
    earlier = jnp.tril(jnp.ones((chunk, chunk), bool), -1)

    def kept(exponent: Array, where: Array) -> Array:
        return jnp.exp(jnp.where(where, exponent, -jnp.inf))

    def body(carry, inputs):
        state, run = carry  # [b, g, r, n, p], and the run that it is of
        query, key, value, log_decay, step, runs = inputs
        sees = causal & (runs[:, :, None] == runs[:, None, :])
        # s, counted from the start of the chunk or of a run in it, so that not even rounding crosses between runs.
        total = _einsum("bij,bgrj->bgri", sees.astype(jnp.float32), log_decay)
        decays = kept(total[..., :, None] - total[..., None, :], sees[:, None, None])
        from_state = kept(total, (runs == run[:, None])[:, None, None])[..., None]
        # The deltas.
        overlap = _einsum("bgin,bgjn->bgij", key, key)[:, :, None] * decays
        system = jnp.where(earlier, step[..., None] * overlap, 0.0) + jnp.eye(chunk, dtype=jnp.float32)
        missing = value - from_state * _einsum("bgin,bgrnp->bgrip", key, state)
        delta = jax.lax.linalg.triangular_solve(
            system, step[..., None] * missing, left_side=True, lower=True, unit_diagonal=True
        )
        # What is read.
        weights = _einsum("bgin,bgjn->bgij", query, key)[:, :, None] * decays
        y = from_state * _einsum("bgin,bgrnp->bgrip", query, state) + _einsum("bgrij,bgrjp->bgrip", weights, delta)
        # What is handed on.
        last, end = runs[:, -1], total[..., -1]
        to_state = kept(end[..., None] - total, (runs == last[:, None])[:, None, None])
        state = kept(end, (last == run)[:, None, None])[..., None, None] * state
        state = state + _einsum("bgjn,bgrjp->bgrnp", key, to_state[..., None] * delta)
        return (state, last), y

    start = (state.astype(jnp.float32).reshape(b, g, r, n, p), jnp.zeros(b, runs.dtype))
    (state, _), y = jax.lax.scan(jax.checkpoint(body, prevent_cse=False), start, inputs)
    y = jnp.moveaxis(y, (0, 4), (1, 2)).reshape(b, count * chunk, h, p)[:, :t]
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
        """`cache` is (convolution inputs, state, layer) of stacked ones, [repeats, B, w - 1, k] in x's dtype and
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
