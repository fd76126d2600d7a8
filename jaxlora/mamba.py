"""Mamba-2: a state that every token decays and adds to (state space duality, arXiv:2405.21060).

The maths, of one head with values x_t [P], keys B_t and queries C_t [N], a step dt_t > 0 and a rate A < 0:

    S_t = exp(A dt_t) S_(t-1) + dt_t x_t B_t^T        [P, N]
    y_t = S_t C_t + D x_t

Written out, y_t is attention without a softmax, whose weights decay: with s_t = sum over r <= t of A dt_r,

    y_t = sum over r <= t of  exp(s_t - s_r) (C_t . B_r) dt_r x_r  +  D x_t

A chunk of tokens is computed in this form, a few products of matrices; what stands before the chunk is in the state:

    y_t += exp(s_t) S C_t                         S of the token before the chunk, s counted from the chunk's start
    S    = exp(s_end) S + sum over r of exp(s_end - s_r) dt_r x_r B_r^T

So work and memory grow with the length, not with its square, and a single token is a chunk of one. All chunks of a
*group* are computed at once, each product one launch for all of them; only their states come one after the other (see
`chunks`). How many chunks a group has is bounded by the weights between its tokens.

Sums, decays and states are float32. What is multiplied is rounded to x's dtype, in both directions, as in the makers'
kernels (`_chunk_scan_fwd` of mamba-ssm): B, C and x have it anyway, and weights, decays of B and states are rounded to
it. In float32, and of a single token, nothing is. The backward pass keeps the states between groups and computes a
group again.

Before the scan x, B and C go through a short causal convolution over time, each channel on its own.

Documents in one row do not see each other: tokens are numbered by the *run* of equal segment ids that they stand in,
and neither a convolution's tap nor the state crosses from one run to the next.

Shapes: b batch, t tokens, k chunks of a group, c tokens of a chunk, h heads of p, g groups of heads that share B and C,
n state, w taps of the convolution, and h p + 2 g n channels that go through it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxlora import chunks
from jaxlora.config import MambaConfig, ModelConfig
from jaxlora.kernels.gated import ACTIVATIONS

# ---- The scan --------------------------------------------------------------------------------------------------------


def ssd_scan(
    x: Float[Array, "b t h p"],
    dt: Float[Array, "b t h"],
    rate: Float[Array, " h"],
    key: Float[Array, "b t g n"],
    query: Float[Array, "b t g n"],
    runs: Int[Array, "b t"],
    state: Float[Array, "b h p n"],
    *,
    chunk: int,
) -> tuple[Float[Array, "b t h p"], Float[Array, "b h p n"]]:
    """y without its D x, and the state after the last token, both float32; `chunk` tokens at a time.

    runs: never fall along a row. `state` is that of run 0: tokens of a later run begin with none.
    """
    b, t, h, p = x.shape
    g, n = key.shape[2:]
    chunk = min(chunk, t)
    cut = chunks.Cut.of(t, chunk, b * chunk * chunk * h)  # the weights
    low = x.dtype if t > 1 else jnp.float32  # one token is no matrix
    product = functools.partial(chunks.product, dtype=low)

    def grouped(y: Array) -> Array:
        """[b, t, ...] -> [groups, b, k, c, ...]; a padded token has dt = 0, which decays nothing and adds nothing."""
        return cut.tokens(y).swapaxes(0, 1)

    heads = (g, h // g)  # a key head and those of its query heads
    dt = dt.astype(jnp.float32)
    steps = (
        grouped(x.reshape(b, t, *heads, p)),
        grouped(key),
        grouped(query),
        grouped(dt.reshape(b, t, *heads)),
        grouped((dt * rate).reshape(b, t, *heads)),
        cut.runs(runs).swapaxes(0, 1),
    )
    causal = jnp.tril(jnp.ones((chunk, chunk), bool))

    def body(carry, step):
        state, run = carry
        x, key, query, dt, decay, runs = step
        sees = causal & (runs[..., :, None] == runs[..., None, :])
        # s, counted from the start of the chunk or of a run in it, so that not even rounding crosses between runs.
        total = product("bkij,bkjgh->bkigh", dtype=jnp.float32, a=sees.astype(jnp.float32), b=decay)
        first_runs = jnp.concatenate([run[:, None], runs[:, :-1, -1]], axis=1)  # of the state before a chunk
        last_runs, end = runs[..., -1], total[:, :, -1]
        # Within a chunk: from token j to token i.
        by_token = jnp.moveaxis(total, 2, -1)
        decays = chunks.kept(by_token[..., :, None] - by_token[..., None, :], sees[:, :, None, None])
        scores = product("bkign,bkjgn->bkgij", a=query, b=key)
        weights = scores[:, :, :, None] * decays * jnp.moveaxis(dt, 2, -1)[..., None, :]
        y = product("bkghij,bkjghp->bkighp", a=weights, b=x)
        # What it adds to the state, and what is left of the state before it.
        to_state = chunks.kept(end[:, :, None] - total, (runs == last_runs[..., None])[..., None, None]) * dt
        added = product("bkjgn,bkjghp->bkghpn", a=key, b=to_state[..., None] * x.astype(jnp.float32))
        left = chunks.kept(end, (last_runs == first_runs)[..., None, None])

        def after(state, one):
            left, added = one
            return left[..., None, None] * state + added, state

        state, before = jax.lax.scan(after, state, (left.swapaxes(0, 1), added.swapaxes(0, 1)))
        # From before a chunk, for the tokens that go on with its run.
        from_state = chunks.kept(total, (runs == first_runs[..., None])[..., None, None])
        y = y + from_state[..., None] * product("bkign,kbghpn->bkighp", a=query, b=before)
        return (state, last_runs[:, -1]), y

    start = state.astype(jnp.float32).reshape(b, *heads, p, n), jnp.zeros(b, runs.dtype)
    (state, _), y = jax.lax.scan(jax.checkpoint(body, prevent_cse=False), start, steps)
    return y.swapaxes(0, 1).reshape(b, -1, h, p)[:, :t], state.reshape(b, h, p, n)


def causal_convolution(
    x: Float[Array, "b t k"],
    before: Float[Array, "b w_less_1 k"],
    weight: Float[Array, "k 1 w"],
    bias: Float[Array, " k"] | None,
    runs: Int[Array, "b t"],
) -> tuple[Float[Array, "b t k"], Float[Array, "b w_less_1 k"]]:
    """A filter over time for each channel, and the inputs that the next token needs.

    out_t = sum over l < w of weight[w - 1 - l] x_(t-l) + bias, of tokens of t's own run; `before` are those of run 0
    that stand before the row, zero where there are none.
    """
    t, taps = x.shape[1], weight.shape[-1]
    x = jnp.concatenate([before.astype(x.dtype), x], axis=1)
    runs = jnp.pad(runs, ((0, 0), (taps - 1, 0)))
    zero = jnp.zeros((), x.dtype)
    out = jnp.zeros((), x.dtype) if bias is None else bias.astype(x.dtype)
    for tap in range(taps):
        inside = (runs[:, tap : tap + t] == runs[:, taps - 1 :])[..., None]
        out = out + jnp.where(inside, x[:, tap : tap + t], zero) * weight[:, 0, tap].astype(x.dtype)
    after = jnp.where((runs[:, t:] == runs[:, -1:])[..., None], x[:, t:], zero)
    return out, after


def segment_runs(
    segment_ids: Int[Array, "b t"] | None, shape: tuple[int, int], before: Int[Array, " b"] | None
) -> Int[Array, "b t"]:
    """The number of changes of the segment id up to each token, the first one's from `before` among them.

    Without segment ids there is one run, 0. `before` is None where nothing stands before.
    """
    if segment_ids is None:
        return jnp.zeros(shape, jnp.int32)
    first = segment_ids[:, :1] if before is None else before[:, None]
    changes = jnp.diff(segment_ids, axis=1, prepend=first) != 0
    return jnp.cumsum(changes, axis=1, dtype=jnp.int32)


# ---- Modules ---------------------------------------------------------------------------------------------------------


class Convolution(nnx.Module):
    """weight [*stack, k, 1, w] and perhaps bias [*stack, k] of `causal_convolution`."""

    def __init__(self, channels: int, taps: int, bias: bool, make_param: Callable):
        self.weight = make_param((channels, 1, taps), ("ssm", None, None))
        self.bias = make_param((channels,), ("ssm",)) if bias else None

    def __call__(self, x: Float[Array, "b t k"], before: Float[Array, "b w k"], runs: Int[Array, "b t"]):
        bias = None if self.bias is None else self.bias.get_value()
        return causal_convolution(x, before, self.weight.get_value(), bias, runs)


class GatedNorm(nnx.Module):
    """An rms_norm of each group of features, times silu(gate) before or after it; float32."""

    def __init__(self, features: int, groups: int, eps: float, norm_first: bool, make_param: Callable):
        self.groups, self.eps, self.norm_first = groups, eps, norm_first
        self.weight = make_param((features,), ("ssm",))

    def __call__(self, x: Float[Array, "b t d"], gate: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        gate = jax.nn.silu(gate.astype(jnp.float32))
        x = x.astype(jnp.float32)
        x = x if self.norm_first else x * gate
        groups = x.reshape(*x.shape[:2], self.groups, -1)
        groups = groups * jax.lax.rsqrt(jnp.mean(groups * groups, axis=-1, keepdims=True) + self.eps)
        x = groups.reshape(x.shape) * self.weight.get_value().astype(jnp.float32)
        return x * gate if self.norm_first else x


class Mamba(nnx.Module):
    """The mixer: projection, convolution, scan, gate, projection. [B, T, D] -> [B, T, D].

    in_proj makes, side by side: the gate [h p], then x [h p], B [g n] and C [g n], which are convolved, and dt [h].
    """

    def __init__(
        self, config: ModelConfig, mamba: MambaConfig, make_linear: Callable, make_plain: Callable, make_param: Callable
    ):
        self.mamba, inner, width = mamba, mamba.d_ssm, config.hidden_size
        self.act = config.hidden_act
        outputs = inner + mamba.channels + mamba.n_heads
        self.in_proj = make_linear(width, outputs, ("ssm", "embed"), mamba.proj_bias, quantised=False)
        self.conv1d = Convolution(mamba.channels, mamba.d_conv, mamba.conv_bias, make_param)
        self.A_log, self.D, self.dt_bias = (make_param((mamba.n_heads,), ("ssm",)) for _ in range(3))
        norm = (inner, mamba.n_groups, config.norm_eps, mamba.norm_before_gate, make_param)
        self.norm = GatedNorm(*norm) if mamba.rms_norm else None
        self.out_proj = make_plain(inner, width, ("embed", "ssm"), mamba.out_bias)
        # What a cache has of each row.
        self.convolution_shape = (mamba.d_conv - 1, mamba.channels)
        self.state_shape = (mamba.n_heads, mamba.d_head, mamba.d_state)

    def __call__(self, x, runs: Int[Array, "b t"], key, cache=None):
        """`cache` is (convolution inputs, state, layer) of stacked ones, [repeats, B, w - 1, k] in x's dtype and
        [repeats, B, h, p, n] float32, and returned as this call's last token leaves them."""
        mamba, (b, t, _) = self.mamba, x.shape
        inner, shared = mamba.d_ssm, mamba.n_groups * mamba.d_state
        multipliers = np.repeat(mamba.multipliers, [inner, inner, shared, shared, mamba.n_heads]).astype(x.dtype)
        projected = self.in_proj(x * mamba.in_multiplier, key) * multipliers
        gate, convolved, dt = jnp.split(projected, [inner, inner + mamba.channels], axis=-1)
        if cache is None:
            before = jnp.zeros((b, *self.convolution_shape), x.dtype)
            state = jnp.zeros((b, *self.state_shape), jnp.float32)
        else:
            before, state = (jax.lax.dynamic_index_in_dim(part, cache[2], keepdims=False) for part in cache[:2])
        convolved, before = self.conv1d(convolved, before, runs)
        value, keys, queries = jnp.split(ACTIVATIONS[self.act](convolved), [inner, inner + shared], axis=-1)
        value = value.reshape(b, t, mamba.n_heads, mamba.d_head)
        keys, queries = (part.reshape(b, t, mamba.n_groups, mamba.d_state) for part in (keys, queries))
        dt_bias, a_log, skip = (v.get_value().astype(jnp.float32) for v in (self.dt_bias, self.A_log, self.D))
        dt = jnp.clip(jax.nn.softplus(dt.astype(jnp.float32) + dt_bias), *mamba.time_step_limit)
        y, state = ssd_scan(value, dt, -jnp.exp(a_log), keys, queries, runs, state, chunk=mamba.chunk_size)
        y = (y + skip[:, None] * value.astype(jnp.float32)).reshape(b, t, inner)
        y = self.norm(y, gate) if self.norm is not None else y * jax.nn.silu(gate.astype(jnp.float32))
        if cache is not None:
            cache = (put_layer(cache[0], before, cache[2]), put_layer(cache[1], state, cache[2]), cache[2])
        return self.out_proj(y.astype(x.dtype)), cache


def put_layer(stacked: Float[Array, "*all"], new: Float[Array, "*one"], layer: Int[Array, ""]) -> Float[Array, "*all"]:
    """`new` in the place of one layer of a stacked cache, in its dtype."""
    return jax.lax.dynamic_update_index_in_dim(stacked, new.astype(stacked.dtype), layer, 0)
