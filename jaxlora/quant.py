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

from jaxlora.kernels import api, reference

Scheme = Literal["nf4"]
Implementation = Literal["triton", "reference"] | None


@dataclasses.dataclass(frozen=True, eq=False)
class QuantizedArray:
    """A weight matrix, or a stack of them, held in few bits. A pytree; `shape`, `dtype` and `scheme` are static.

    The following always hold, for a matrix of [out, in] elements, n = out * in of them:

    * `shape` is (out, in): that of ONE matrix, whatever the fields are stacked by.
    * Every field has the same leading dimensions, `leading`; () for a single matrix. `lax.scan` and indexing with
      `jax.tree.map` take them off all fields at once, and `shape` stays true.
    * The fields are those of bitsandbytes, element for element: two codes a byte with the earlier in the high nibble,
      in row-major order; an absmax for 64 consecutive elements; a nested absmax for 256 consecutive absmaxes.
    * If in % 64 == 0, no block crosses a row: `codes` is [..., out, in // 2] and `absmax` [..., out, in // 64], so both
      can be sharded by row. Otherwise they are flat: [..., ceil(n / 2)] and [..., ceil(n / 64)].
    * With double quantisation `absmax` is uint8, `nested_absmax` is float32 [..., ceil(blocks / 256)], `nested_offset`
      is float32 [...]. Without it `absmax` is float32 and both others are None. Nested blocks run across rows, so
      `nested_absmax` (4 bytes for 16384 weights) is replicated where the others are sharded.

    Inside a transformation the fields may be tracers, shapes or placeholders, so they are typed Any and nothing is
    checked on construction.

    Attributes:
      codes: uint8.
      absmax: uint8 or float32.
      nested_absmax: float32 or None.
      nested_offset: float32 or None.
      shape: (out, in).
      dtype: what `dequantize` returns unless told otherwise: the dtype that was quantised.
      scheme: a key of the table of schemes.
    """

    codes: Any
    absmax: Any
    nested_absmax: Any
    nested_offset: Any
    shape: tuple[int, int]
    dtype: np.dtype
    scheme: Scheme = "nf4"

    @property
    def ndim(self) -> int:
        """Dimensions of one matrix: 2."""
        return len(self.shape)

    @property
    def leading(self) -> tuple[int, ...]:
        """The dimensions that the matrices are stacked by."""
        return self.codes.shape[: -2 if _by_row(self.shape) else -1]

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
    data_fields=["codes", "absmax", "nested_absmax", "nested_offset"],
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
    fields = q.codes, q.absmax, q.nested_absmax, q.nested_offset
    return api.dequantize_nf4(*fields, shape=q.shape, dtype=dtype, implementation=implementation)


_SCHEMES: dict[str, _Functions] = {
    "nf4": _Functions(_quantize_nf4, _dequantize_nf4),
}


def quantize(
    w: Float[Array, "*layers out in"],
    *,
    scheme: Scheme = "nf4",
    double_quant: bool = True,
    dtype: jax.typing.DTypeLike | None = None,
) -> QuantizedArray:
    """Quantise a weight [out, in], or each of a stack [layers, out, in]. Can be jitted, and traced by `jax.eval_shape`.

    Args:
      w: float32, bfloat16 or float16.
      scheme: "nf4".
      double_quant: quantise the blocks' absmaxes to 8 bits as well: 4.127 bits a weight in place of 4.5.
      dtype: what it dequantises to; w's own if None.

    Raises:
      ValueError: w has neither two dimensions nor three, is empty or is no float; or there is no such scheme.
    """
    if scheme not in _SCHEMES:
        raise ValueError(f"there is no quantisation scheme {scheme!r}: there is {', '.join(_SCHEMES)}")
    if w.ndim not in (2, 3) or not w.size or w.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        raise ValueError(f"can quantise float [out, in] or [layers, out, in], not {w.dtype.name} {list(w.shape)}")
    dtype = jnp.dtype(w.dtype if dtype is None else dtype)
    one = lambda w: _SCHEMES[scheme].quantize(w, double_quant, dtype)
    return one(w) if w.ndim == 2 else jax.vmap(one)(w)


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
