"""Quantised weights: an array that states its invariants, and the one matrix product that takes it or a dense one."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from jaxlora.config import QuantScheme
from jaxlora.kernels import api, reference

Implementation = Literal["triton", "reference"] | None

FP8_BLOCK = 128
FP8_MAX = 448.0  # the largest float8_e4m3fn


@dataclasses.dataclass(frozen=True, eq=False)
class QuantizedArray:
    """A weight matrix, or a stack of them, held in few bits. A pytree; `shape`, `dtype` and `scheme` are static.

    The following always hold, for a matrix of [out, in] elements, n = out * in of them:

    * `shape` is (out, in): that of ONE matrix, whatever the fields are stacked by.
    * Every field has the same leading dimensions, `leading`; () for a single matrix. `lax.scan` and indexing with
      `jax.tree.map` take them off all fields at once, and `shape` stays true.
    * `codes` and `scales` can be sharded by row, unless `codes` is flat. The nested fields are None, or replicated.

    "nf4", 4.127 or 4.5 bits a weight, the fields of bitsandbytes' Linear4bit, element for element:

    * Two codes a byte with the earlier in the high nibble, in row-major order; a scale, the absmax, for 64 consecutive
      elements; a nested absmax for 256 consecutive absmaxes.
    * If in % 64 == 0, no block crosses a row: `codes` is [..., out, in // 2] and `scales` [..., out, in // 64].
      Otherwise they are flat: [..., ceil(n / 2)] and [..., ceil(n / 64)].
    * With double quantisation `scales` is uint8, `nested_absmax` is float32 [..., ceil(blocks / 256)], `nested_offset`
      is float32 [...]. Without it `scales` is float32 and both others are None. Nested blocks run across rows.

    "int8", 8 bits, those of bitsandbytes' Linear8bitLt: `codes` int8 [..., out, in] (its CB); `scales` float32
    [..., out, 1], a row's absmax (its SCB); a weight is code * scale / 127.

    "fp8" and "fp8_block", 8 bits: `codes` float8_e4m3fn [..., out, in]; `scales` float32, [..., out, 1] for a row each,
    or [..., ceil(out / 128), ceil(in / 128)] for a block of 128 x 128 each; a weight is code * scale. These are
    fbgemm's weight_scale and fine-grained fp8's weight_scale_inv.

    Inside a transformation the fields may be tracers, shapes or placeholders, so they are typed Any and nothing is
    checked on construction.

    Attributes:
      codes: uint8, int8 or float8_e4m3fn.
      scales: what codes are multiplied by: float32, or uint8 codes of that.
      nested_absmax: float32; None but with double quantisation.
      nested_offset: float32; None but with double quantisation.
      shape: (out, in).
      dtype: what `dequantize` returns unless told otherwise: the dtype that was quantised.
      scheme: a key of the table of schemes.
    """

    codes: Any
    scales: Any
    nested_absmax: Any
    nested_offset: Any
    shape: tuple[int, int]
    dtype: np.dtype
    scheme: QuantScheme = "nf4"

    @property
    def ndim(self) -> int:
        """Dimensions of one matrix: 2."""
        return len(self.shape)

    @property
    def leading(self) -> tuple[int, ...]:
        """The dimensions that the matrices are stacked by."""
        is_flat = self.scheme == "nf4" and not _by_row(self.shape)
        return self.codes.shape[: -1 if is_flat else -2]

    @property
    def size(self) -> int:
        """Elements of the weight, over the whole stack."""
        return math.prod(self.leading) * math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes that all fields take. Holds for abstract arrays too."""
        return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(self))


jax.tree_util.register_dataclass(
    QuantizedArray,
    data_fields=["codes", "scales", "nested_absmax", "nested_offset"],
    meta_fields=["shape", "dtype", "scheme"],
)


def _by_row(shape: tuple[int, int]) -> bool:
    return shape[-1] % reference.NF4_BLOCK == 0


class _Functions(NamedTuple):
    """A scheme: both functions are of one matrix, without leading dimensions."""

    quantize: Callable[..., QuantizedArray]  # (w, double_quant, dtype)
    dequantize: Callable[..., jax.Array]  # (q, dtype, implementation)


def _quantize_nf4(w: Float[Array, "out in"], double_quant: bool, dtype: np.dtype) -> QuantizedArray:
    codes, absmax = reference.quantize_nf4(w)
    nested_absmax = nested_offset = None
    if double_quant:
        absmax, nested_absmax, nested_offset = reference.quantize_absmax(absmax)
    rows, columns = w.shape
    if _by_row((rows, columns)):
        codes, absmax = codes.reshape(rows, -1), absmax.reshape(rows, -1)
    return QuantizedArray(codes, absmax, nested_absmax, nested_offset, (rows, columns), dtype, "nf4")


def _dequantize_nf4(q: QuantizedArray, dtype: np.dtype, implementation: Implementation) -> Float[Array, "out in"]:
    fields = q.codes, q.scales, q.nested_absmax, q.nested_offset
    return api.dequantize_nf4(*fields, shape=q.shape, dtype=dtype, implementation=implementation)


def _quantize_int8(w: Float[Array, "out in"], double_quant: bool, dtype: np.dtype) -> QuantizedArray:
    rows, columns = w.shape
    w = w.astype(jnp.float16).astype(jnp.float32)  # bitsandbytes quantises float16 and nothing else
    absmax = jnp.max(jnp.abs(w), axis=1, keepdims=True)
    codes = jnp.round(w * (127.0 * (1.0 / jnp.where(absmax > 0, absmax, 1.0)))).astype(jnp.int8)  # rounds as in torch
    return QuantizedArray(codes, absmax, None, None, (rows, columns), dtype, "int8")


def _dequantize_int8(q: QuantizedArray, dtype: np.dtype, implementation: Implementation) -> Float[Array, "out in"]:
    return (q.codes.astype(jnp.float32) * q.scales * jnp.float32(1 / 127)).astype(dtype)


def _quantize_fp8(w: Float[Array, "out in"], double_quant: bool, dtype: np.dtype) -> QuantizedArray:
    rows, columns = w.shape
    w = w.astype(jnp.float32)
    codes, scales = _to_fp8(w, jnp.max(jnp.abs(w), axis=1, keepdims=True))
    return QuantizedArray(codes, scales, None, None, (rows, columns), dtype, "fp8")


def _quantize_fp8_block(w: Float[Array, "out in"], double_quant: bool, dtype: np.dtype) -> QuantizedArray:
    rows, columns = w.shape
    w = jnp.pad(w.astype(jnp.float32), ((0, -rows % FP8_BLOCK), (0, -columns % FP8_BLOCK)))
    blocks = w.reshape(w.shape[0] // FP8_BLOCK, FP8_BLOCK, w.shape[1] // FP8_BLOCK, FP8_BLOCK)
    codes, scales = _to_fp8(blocks, jnp.max(jnp.abs(blocks), axis=(1, 3), keepdims=True))
    return QuantizedArray(
        codes.reshape(w.shape)[:rows, :columns], scales[:, 0, :, 0], None, None, (rows, columns), dtype, "fp8_block"
    )


def _to_fp8(w: Float[Array, "*shape"], absmax: Float[Array, "*ones"]) -> tuple[Array, Array]:
    """(codes, scales), so that the largest weight becomes the largest float8_e4m3fn, 448."""
    # Rounded as in torch, which divides a number by a tensor so, and so to the bit as transformers does.
    inverse = jnp.where(absmax > 0, FP8_MAX * (1.0 / jnp.where(absmax > 0, absmax, 1.0)), 1.0)
    return jnp.clip(w * inverse, -FP8_MAX, FP8_MAX).astype(jnp.float8_e4m3fn), 1.0 / inverse


def _dequantize_fp8(q: QuantizedArray, dtype: np.dtype, implementation: Implementation) -> Float[Array, "out in"]:
    scales = q.scales
    if q.scheme == "fp8_block":
        (rows, columns), (r, c) = q.shape, scales.shape
        wide = jnp.broadcast_to(scales[:, None, :, None], (r, FP8_BLOCK, c, FP8_BLOCK))
        scales = wide.reshape(r * FP8_BLOCK, c * FP8_BLOCK)[:rows, :columns]
    return (q.codes.astype(jnp.float32) * scales).astype(dtype)


_SCHEMES: dict[str, _Functions] = {
    "nf4": _Functions(_quantize_nf4, _dequantize_nf4),
    "int8": _Functions(_quantize_int8, _dequantize_int8),
    "fp8": _Functions(_quantize_fp8, _dequantize_fp8),
    "fp8_block": _Functions(_quantize_fp8_block, _dequantize_fp8),
}


def quantize(
    w: Float[Array, "*leading out in"],
    *,
    scheme: QuantScheme = "nf4",
    double_quant: bool = True,
    dtype: jax.typing.DTypeLike | None = None,
) -> QuantizedArray:
    """Quantise a weight [out, in], or each of a stack [..., out, in]. Can be jitted, and traced by `jax.eval_shape`.

    Args:
      w: float32, bfloat16 or float16.
      scheme: "nf4", "int8", "fp8" or "fp8_block"; see `QuantizedArray`.
      double_quant: for "nf4" only: quantise the blocks' absmaxes to 8 bits as well: 4.127 bits a weight, not 4.5.
      dtype: what it dequantises to; w's own if None.

    Raises:
      ValueError: w has fewer than two dimensions, is empty or is no float; or there is no such scheme.
    """
    if scheme not in _SCHEMES:
        raise ValueError(f"there is no quantisation scheme {scheme!r}: there is {', '.join(_SCHEMES)}")
    if w.ndim < 2 or not w.size or w.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        raise ValueError(f"can quantise float [out, in] or a stack [..., out, in], not {w.dtype.name} {list(w.shape)}")
    dtype = jnp.dtype(w.dtype if dtype is None else dtype)
    function = lambda w: _SCHEMES[scheme].quantize(w, double_quant, dtype)
    for _ in w.shape[:-2]:
        function = jax.vmap(function)
    return function(w)


def dequantize(
    q: QuantizedArray, dtype: jax.typing.DTypeLike | None = None, *, implementation: Implementation = None
) -> Float[Array, "*leading out in"]:
    """The dense weight, with the leading dimensions of `q`, in `dtype` (`q.dtype` if None)."""
    dtype = jnp.dtype(q.dtype if dtype is None else dtype)
    function = lambda q: _SCHEMES[q.scheme].dequantize(q, dtype, implementation)
    for _ in q.leading:
        function = jax.vmap(function)
    return function(q)


def dense(tree: Any, dtype: jax.typing.DTypeLike) -> Any:
    """A tree, such as a module, with every QuantizedArray in it dequantised: constants, which no gradient reaches."""

    def one(leaf):
        return lax.stop_gradient(dequantize(leaf, dtype)) if isinstance(leaf, QuantizedArray) else leaf

    return jax.tree.map(one, tree, is_leaf=lambda leaf: isinstance(leaf, QuantizedArray))


def matmul(x: Float[Array, "*batch in"], w: Float[Array, "out in"] | QuantizedArray) -> Float[Array, "*batch out"]:
    """x @ w.T for a dense or a quantised weight, in x's dtype with float32 sums.

    A dense weight is cast to x's dtype; a quantised one is dequantised to it, whatever its own `dtype`. The quantised
    one is a constant: its gradient is zero, and what the backward pass keeps is its packed form and nothing else,
    neither x nor the dequantised weight. So dx = dy @ dequantize(w) dequantises a second time; keeping the result would
    take all the memory that quantisation saved.

    Raises:
      TypeError: the inner dimensions differ, or the weight is a stack.
    """
    leading = w.leading if isinstance(w, QuantizedArray) else w.shape[:-2]
    if leading or len(w.shape) != 2 or x.shape[-1:] != w.shape[1:]:
        raise TypeError(
            f"matmul takes x [..., in] and w [out, in], not {list(x.shape)} and {[*leading, *w.shape[-2:]]}"
        )
    if isinstance(w, QuantizedArray):
        return _matmul_quantized(x, w)
    return _contract(x, w.astype(x.dtype), 1)


def _contract(x: Array, w: Array, dimension: int) -> Array:
    """Contract the last dimension of x with the given one of a matrix w.

    The result is in x's dtype: the sums are float32 inside the product all the same, and asking for a float32 result
    would write it out whole, twice the bytes, only to be rounded by another kernel.
    """
    return lax.dot_general(x, w, (((x.ndim - 1,), (dimension,)), ((), ())))


@jax.custom_vjp
def _matmul_quantized(x: Float[Array, "*batch in"], w: QuantizedArray) -> Float[Array, "*batch out"]:
    return _contract(x, dequantize(w, x.dtype), 1)


def _matmul_forward(x, w):
    return _matmul_quantized(x, w), w


def _matmul_backward(w, dy):
    return _contract(dy, dequantize(w, dy.dtype), 0), None  # None: a zero for every field of w


_matmul_quantized.defvjp(_matmul_forward, _matmul_backward)
