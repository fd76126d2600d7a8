"""Where adapters start: PEFT's `init_lora_weights`, one module at a time.

Most starts leave the model as it is, because B A = 0. PiSSA (arXiv:2404.02948) and OLoRA (arXiv:2406.01775) start from
the directions in which the weight is largest, and take them out of the weight: W = (W - s B A) + s B A. CorDA does so
with directions that data finds (`data_starts`).
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxlora import quant
from jaxlora.config import LoraConfig
from jaxlora.quant import QuantizedArray

_EXACT = jax.lax.Precision.HIGHEST


def draw(kind: bool | str, key: Any, rank: int, in_features: int, out_features: int) -> tuple[Array, Array]:
    """A [rank, in] and B [out, rank], float32, of a start that leaves the base weight alone.

    The bounds of the uniform draws are 1 / sqrt(inputs), torch's for a linear layer.
    """
    shape_a, shape_b = (rank, in_features), (out_features, rank)
    key_b, key_q = jax.random.fold_in(key, 1), jax.random.fold_in(key, 2)
    if kind == "orthogonal":  # the rows of Q are orthonormal: B A = 0.01 Y Q_even Q_odd^T X^T = 0
        q = jnp.linalg.qr(jax.random.normal(key_q, (rank, rank), jnp.float32))[0]
        x = jax.random.normal(key, (in_features, rank // 2), jnp.float32)
        y = jax.random.normal(key_b, (out_features, rank // 2), jnp.float32)
        return jnp.matmul(q[0::2].T, x.T, precision=_EXACT) / 10, jnp.matmul(y, q[1::2], precision=_EXACT) / 10
    if kind == "gaussian":
        return jax.random.normal(key, shape_a, jnp.float32) / rank, jnp.zeros(shape_b, jnp.float32)
    bound = in_features**-0.5
    a = jax.random.uniform(key, shape_a, jnp.float32, -bound, bound)
    if kind is False:
        return a, jax.random.uniform(key_b, shape_b, jnp.float32, -(rank**-0.5), rank**-0.5)
    return a, jnp.zeros(shape_b, jnp.float32)


def draw_experts(
    kind: bool | str, key: Any, experts: int, rank: int, in_features: int, out_features: int
) -> tuple[Array, Array]:
    """A [experts, rank, in] and B [experts, out, rank], float32, of an adapter on all experts: True, False, "gaussian".

    PEFT has one matrix of experts * rank columns for B, whose bound is that of so many inputs.
    """
    a, b = draw(kind, key, experts * rank, in_features, out_features)
    if kind == "gaussian":
        a = a * experts  # `draw` has divided by all columns
    return a.reshape(experts, rank, in_features), jnp.moveaxis(b.reshape(out_features, experts, rank), 0, 1)


def draw_embedding(kind: bool | str, key: Any, rank: int, rows: int, features: int) -> tuple[Array, Array]:
    """A [rank, rows] and B [features, rank], float32, of an embedding's adapter: A zero and B normal, both normal for
    False. The other kinds are for linear layers, and start an embedding like True."""
    key_b = jax.random.fold_in(key, 1)
    a = jax.random.normal(key, (rank, rows), jnp.float32) if kind is False else jnp.zeros((rank, rows), jnp.float32)
    return a, jax.random.normal(key_b, (features, rank), jnp.float32)


def loftq(
    weight: Float[Array, "out in"], rank: int, scaling: float, *, bits: int, rounds: int
) -> tuple[QuantizedArray, tuple[Float[Array, "r in"], Float[Array, "out r"]]]:
    """Q and (A, B) with W close to Q + scaling * B A: `rounds` times Q = quantise(W - s B A), then s B A the best
    approximation of W - Q of this rank (arXiv:2310.08659, algorithm 1). Q is NF4 for 4 bits, int8 for 8."""
    scheme, low = ("nf4" if bits == 4 else "int8"), jnp.zeros((), jnp.float32)
    for _ in range(rounds):
        stored = quant.quantize(weight - low, scheme=scheme, double_quant=False, dtype=jnp.float32)
        u, s, vh = jnp.linalg.svd(weight - quant.dequantize(stored, jnp.float32), full_matrices=False)
        root = jnp.sqrt(s[:rank])
        a, b = root[:, None] * vh[:rank], u[:, :rank] * root
        low = jnp.matmul(b, a, precision=_EXACT)
    return stored, (a * scaling**-0.5, b * scaling**-0.5)


def principal(
    kind: str, key: Any, weight: Float[Array, "out in"], rank: int, scaling: float
) -> tuple[Float[Array, "r in"], Float[Array, "out r"]]:
    """A and B made of the weight's largest directions, float32, for a base weight of W - scaling * B A.

    "pissa": scaling * B A is the best approximation of W of this rank, B and A share its singular values evenly, and
    "pissa_niter_n" finds them by n rounds of subspace iteration (arXiv:0909.4061). "olora": B and A are the first
    columns and rows of W = Q R.

    Raises:
        ValueError: the weight has no so many directions.
    """
    if rank > min(weight.shape):
        raise ValueError(f"a start from the weight cannot have rank {rank}: the weight is {list(weight.shape)}")
    if kind == "olora":
        q, r = jnp.linalg.qr(weight)
        return r[:rank], q[:, :rank]
    if kind == "pissa":
        u, s, vh = jnp.linalg.svd(weight, full_matrices=False)
        u, s, vh = u[:, :rank], s[:rank], vh[:rank]
    else:
        u, s, vh = subspace_svd(key, weight, rank, int(kind.removeprefix("pissa_niter_")))
    root = jnp.sqrt(s / scaling)
    return root[:, None] * vh, u * root


def corda(
    weight: Float[Array, "out in"], covariance: Float[Array, "in in"], rank: int, scaling: float, *, method: str
) -> tuple[Float[Array, "r in"], Float[Array, "out r"]]:
    """A and B of CorDA (arXiv:2406.05223, equations 2 to 6), float32, for a base weight of W - scaling * B A.

    W C = U S V^T, with C the covariance of the inputs, so that W = U S (V^T C^-1), of which "ipm" takes the first r
    terms and "kpm" the last r. C gets 1% of its mean variance on its diagonal, and twice as much until its inverse is
    one.

    Raises:
        ValueError: the covariance is not finite, or zero.
    """
    variance, one = jnp.mean(jnp.diag(covariance)), jnp.eye(covariance.shape[0], dtype=jnp.float32)
    if not bool(jnp.isfinite(variance)) or not float(variance) > 0.0:
        raise ValueError(f"the mean variance of the inputs is {float(variance)}, and must be a number above 0")
    damp, error = 0.01, float("inf")
    while not error < 0.05:
        damped = covariance + damp * variance * one
        inverse = jnp.linalg.inv(damped)
        error = float(jnp.linalg.norm(jnp.matmul(damped, inverse, precision=_EXACT) - one))
        damp = 2 * damp
    u, s, vh = jnp.linalg.svd(jnp.matmul(weight, damped, precision=_EXACT), full_matrices=False)
    chosen = slice(rank) if method == "ipm" else slice(len(s) - rank, None)
    root = jnp.sqrt(s[chosen] / scaling)
    a = jnp.matmul(vh[chosen], inverse, precision=_EXACT)
    return root[:, None] * a, u[:, chosen] * root


def subspace_svd(
    key: Any, weight: Float[Array, "rows columns"], rank: int, rounds: int
) -> tuple[Float[Array, "rows r"], Float[Array, " r"], Float[Array, "r columns"]]:
    """The largest singular values of a matrix and their vectors, about, by subspace iteration (arXiv:0909.4061)."""

    def orthonormal(matrix):
        return jnp.linalg.qr(matrix)[0]

    def product(x, y):
        return jnp.matmul(x, y, precision=_EXACT)

    q = orthonormal(product(weight, jax.random.normal(key, (weight.shape[1], rank), jnp.float32)))
    for _ in range(rounds):
        q = orthonormal(product(weight, orthonormal(product(weight.T, q))))
    u, s, vh = jnp.linalg.svd(product(q.T, weight), full_matrices=False)
    return product(q, u), s, vh


def residual(config: LoraConfig, module: str, weight: Float[Array, "out in"], a: Array, b: Array) -> Array:
    """W - scaling * B A, float32."""
    return weight - config.scaling_of(module) * jnp.matmul(b, a, precision=_EXACT)
