"""Products in float8: a linear layer whose frozen weight and activations are rounded to e4m3 on the way (opt-in).

The tensor cores of Hopper and later multiply float8 at twice the rate of 16 bits, and sum in float32. The maths, for
tokens x [T, in] and a weight W [out, in] with its adapter in it (arXiv:2209.05433 for e4m3, with a scale a token):

    s_t = max |x_t| / 448              X = round(x / s)              X, s:  T rows, a scale each
    w   = max |W| / 224                V = round(W / w)              one scale for the matrix
    y   = s w (X V^T)                                                 sums in float32

and the gradient of x is the same product of dy, a scale a token of its own, with V [in, out]. The two scales multiply
the result, in the kernel that reads it next. So nothing is held from step to step, no range is assumed of x, and a
token of large values costs its neighbours no precision. A float8 has 3 bits behind the leading one: rounding moves a
number by 2.6% at random, which a product over thousands of them averages out.

W is made for each use, as in `quant`: an NF4 weight is dequantised, its adapter added and the sum rounded to float8 by
one kernel, which writes it as [out, in] or as [in, out], since float8 products want what is contracted to lie together.
NF4's largest magnitude is known from its statistics; half of the range is left to what the adapter adds. Gradients of
the adapter are those of `quant.matmul`, from x and dy in 16 bits.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jaxlora import quant
from jaxlora.kernels import api
from jaxlora.kernels.lora import lora_gradients
from jaxlora.quant import FP8_MAX, LowRank, MergedArray, QuantizedArray

DTYPE = jnp.float8_e4m3fn
HEADROOM = 2.0  # of the largest weight, for the adapter; what is beyond it is clipped


def check(matmul_dtype: str, full_finetuning: bool) -> None:
    """Whether a model may multiply so.

    Raises:
      ValueError: the dtype is not "fp8", weights are to learn, or the GPU has no float8.
    """
    if matmul_dtype != "fp8":
        raise ValueError(f"matmul_dtype is {matmul_dtype!r}: it can be 'fp8', or None for products in `dtype`")
    if full_finetuning:
        raise ValueError("matmul_dtype='fp8' takes weights for constants, and full_finetuning=True trains them all")
    device = jax.devices()[0]
    capability = getattr(device, "compute_capability", None)
    if device.platform == "gpu" and capability is not None and float(capability) < 8.9:
        raise ValueError(
            f"matmul_dtype='fp8' needs a GPU of compute capability 8.9 or later, and the {device.device_kind} has "
            f"{capability}"
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Fp8Array:
    """A weight in float8 with its adapter in it, a constant: `codes` [out, in] and `transposed` [in, out] times `scale`
    [] float32. What a layer that uses it often shares, as `quant.MergedArray`."""

    codes: Any
    transposed: Any
    scale: Any

    @property
    def shape(self) -> tuple[int, ...]:
        return self.codes.shape


def round_rows(x: Float[Array, "*batch d"]) -> tuple[Array, Float[Array, "*batch 1"]]:
    """x in float8 and its scales, one for each row, so that the largest of a row is the largest float8."""
    wide = x.astype(jnp.float32)
    scale = jnp.max(jnp.abs(wide), axis=-1, keepdims=True) * (1.0 / FP8_MAX)
    scale = jnp.where(scale > 0.0, scale, 1.0)
    return jnp.clip(wide / scale, -FP8_MAX, FP8_MAX).astype(DTYPE), scale


def round_weight(
    w: Float[Array, "out in"] | QuantizedArray, adapter: LowRank | None, *, transposed: bool
) -> tuple[Array, Float[Array, ""]]:
    """A weight with its adapter in it in float8, [out, in] or [in, out], and its scale."""
    scale = jnp.maximum(_largest(w) * (HEADROOM / FP8_MAX), jnp.finfo(jnp.float32).tiny)
    if isinstance(w, QuantizedArray) and w.scheme == "nf4":
        fields = w.codes, w.scales, w.nested_absmax, w.nested_offset, w.index
        a, b = (None, None) if adapter is None else (adapter.a, adapter.b * adapter.scaling)
        return api.merge_nf4(*fields, a, b, 1.0 / scale, shape=w.shape, dtype=DTYPE, transposed=transposed), scale
    wide = quant.dequantize(w, jnp.float32) if isinstance(w, QuantizedArray) else w.astype(jnp.float32)
    if adapter is not None:
        wide = wide + jnp.matmul(
            (adapter.b * adapter.scaling).astype(jnp.bfloat16),
            adapter.a.astype(jnp.bfloat16),
            preferred_element_type=jnp.float32,
        )
    codes = jnp.clip(wide / scale, -FP8_MAX, FP8_MAX).astype(DTYPE)
    return codes.T if transposed else codes, scale


def _largest(w: Array | QuantizedArray) -> Float[Array, ""]:
    """An upper bound of the magnitudes of one matrix, reached or nearly so, from its statistics where it has some."""
    if not isinstance(w, QuantizedArray):
        return jnp.max(jnp.abs(w)).astype(jnp.float32)
    # Over a whole stack at once, which a loop over layers does once and not for each.
    rest = lambda field: tuple(range(1 if w.index is not None else 0, field.ndim))
    if w.nested_absmax is not None:
        bounds = jnp.max(w.nested_absmax, axis=rest(w.nested_absmax)) + w.nested_offset
    else:
        bounds = jnp.max(jnp.abs(w.scales), axis=rest(w.scales))
        if w.scheme in ("fp8", "fp8_block"):
            bounds = bounds * FP8_MAX
    if w.index is None:
        return bounds
    return jnp.sum(jnp.where(jnp.arange(bounds.shape[0]) == w.index, bounds, 0.0))


def round_both(w: Float[Array, "out in"] | QuantizedArray, adapter: LowRank | None) -> Fp8Array:
    """`round_weight` both ways, for a weight that is used often."""
    (codes, scale), (transposed, _) = (round_weight(w, adapter, transposed=t) for t in (False, True))
    return Fp8Array(codes, transposed, scale)


def matmul(
    x: Float[Array, "*batch in"],
    w: Float[Array, "out in"] | QuantizedArray | MergedArray | Fp8Array,
    adapter: LowRank | None = None,
) -> Float[Array, "*batch out"]:
    """`quant.matmul` in float8, in x's dtype, with w a constant; an `Fp8Array` has the adapter in it.

    Where there are too few tokens for `quant.is_merging_cheaper` it is `quant.matmul`: such a product waits for the
    weight's bytes and not for the tensor cores. So it is under `jax.vmap` over adapters, which share one weight. (In
    generation the card's power may be what 9 to 64 rows wait for: there who makes x may make it float8, see
    `layers.ordered_dtype` and `kernels.nf4_matmul_float8`.)

    Raises:
      TypeError: the inner dimensions differ.
    """
    if x.shape[-1:] != w.shape[1:]:
        raise TypeError(f"fp8.matmul takes x [..., in] and w [out, in], not {list(x.shape)} and {list(w.shape)}")
    if not isinstance(w, Fp8Array):
        if isinstance(w, MergedArray) or not quant.is_merging_cheaper(x.size // x.shape[-1], w.shape):
            return quant.matmul(x, w, adapter)
    if adapter is None:
        return _matmul(x, w)
    return quant.scaled(_matmul_adapted(x, w, *adapter[:3]), adapter.gain)


def _product(x: Array, w: Any, adapter: LowRank | None, transposed: bool) -> Array:
    """x times W^T, or times W if `transposed`, in x's dtype."""
    if isinstance(w, Fp8Array):
        codes, scale = w.transposed if transposed else w.codes, w.scale
    else:
        codes, scale = round_weight(w, adapter, transposed=transposed)
    rows, row_scale = round_rows(x)
    # The sums reach 448^2 times a row's length, which float16 cannot hold.
    out = jnp.float32 if x.dtype == jnp.float16 else x.dtype
    y = lax.dot_general(rows, codes, (((x.ndim - 1,), (1,)), ((), ())), preferred_element_type=out)
    return (y.astype(jnp.float32) * (row_scale * scale)).astype(x.dtype)


@jax.custom_vjp
def _matmul(x: Float[Array, "*batch in"], w: Any) -> Float[Array, "*batch out"]:
    return _product(x, w, None, False)


_matmul.defvjp(lambda x, w: (_matmul(x, w), w), lambda w, dy: (_product(dy, w, None, True), None))


@jax.custom_vjp
def _matmul_adapted(x: Float[Array, "*batch in"], w: Any, a: Array, b: Array, scaling: Array) -> Array:
    return _unless_vmapped(x, w, LowRank(a, b, scaling), False)


def _adapted_forward(x, w, a, b, scaling):
    return _matmul_adapted(x, w, a, b, scaling), (x, w, a, b, scaling)


def _adapted_backward(residuals, dy):
    x, w, a, b, scaling = residuals
    [(da, db, _)] = lora_gradients(x, [dy], [(a, b, scaling)])
    return _unless_vmapped(dy, w, LowRank(a, b, scaling), True), None, da, db, None


_matmul_adapted.defvjp(_adapted_forward, _adapted_backward)


def _unless_vmapped(x: Array, w: Any, adapter: LowRank, transposed: bool) -> Array:
    """`_product`; where adapters are vmapped, the frozen weight's product alone in float8, and thin ones beside it."""

    @jax.custom_batching.custom_vmap
    def product(x, w, adapter):
        return _product(x, w, adapter, transposed)

    @product.def_vmap
    def _(axis_size, in_batched, x, w, adapter):
        def thin(x, w, adapter):
            if isinstance(w, Fp8Array):
                return _product(x, w, None, transposed)
            a, b = (adapter.b.T, adapter.a.T) if transposed else (adapter.a, adapter.b)
            return _product(x, w, None, transposed) + quant.lora_delta(x, a, b, adapter.scaling)

        axes = jax.tree.map(lambda is_batched: 0 if is_batched else None, in_batched)
        return jax.vmap(thin, in_axes=tuple(axes), axis_size=axis_size)(x, w, adapter), True

    return product(x, w, adapter)
