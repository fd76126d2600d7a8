"""Quantised weights: an array that states its invariants, and the one matrix product that takes it or a dense one.

The product may take a LoRA adapter as well. Over a quantised weight it is then one product with W' = W + scaling B A,
made anew for each use like W itself, wherever that costs less than the two thin products and the sum; see `matmul`.
For few tokens W itself is not made: an NF4 weight is read once and multiplied in one kernel, where there is one. Nor is
a dense weight of a stack copied out of it (`StackedArray`).
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from jaxlora.config import QuantScheme
from jaxlora.kernels import api, nf4_matmul, nf4_matmul_tiles, reference
from jaxlora.kernels.ahead import Ahead
from jaxlora.kernels.lora import lora_delta, lora_gradients
from jaxlora.kernels.ordered import Ordered, in_order, plain
from jaxlora.kernels.parts import cotangent
from jaxlora.kernels.reference import DenseFields, InputNorm, NF4Fields, Residual

Implementation = Literal["triton", "reference"] | None

BLOCK = reference.NF4_BLOCK  # columns of a row that a device holds are whole blocks of so many
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

    With an `index` it stands for one matrix of a stack, or for the matrices of one layer of a stack of many (experts),
    and holds the fields of all: what a scan over layers passes on, so that nothing is copied out of the stack before a
    kernel reads it.

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
      index: int32 [], or None.
      divided: None, or the sharding on a mesh of what is dequantised or merged, of one matrix; see
        `sharding.read_divided`.
    """

    codes: Any
    scales: Any
    nested_absmax: Any
    nested_offset: Any
    shape: tuple[int, int]
    dtype: np.dtype
    scheme: QuantScheme = "nf4"
    index: Any = None
    divided: NamedSharding | None = None

    @property
    def ndim(self) -> int:
        """Dimensions of one matrix: 2."""
        return len(self.shape)

    @property
    def leading(self) -> tuple[int, ...]:
        """The dimensions that the matrices are stacked by, less that of the index."""
        is_flat = self.scheme == "nf4" and not _by_row(self.shape)
        return self.codes.shape[0 if self.index is None else 1 : -1 if is_flat else -2]

    @property
    def size(self) -> int:
        """Elements of the weight, over the whole stack."""
        return math.prod(self.leading) * math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes that all fields take. Holds for abstract arrays too."""
        return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(self))

    def at(self, index: Any) -> "QuantizedArray":
        """One matrix of a stack [n, out, in], or those of a layer of [n, m, out, in], without copying them."""
        return dataclasses.replace(self, index=index)

    def following(self) -> "QuantizedArray":
        """The next of the stack; the last where this is."""
        return self.at(jnp.minimum(self.index + 1, self.codes.shape[0] - 1))

    def taken(self) -> "QuantizedArray":
        """The same without an index: that matrix alone, or those of that layer, copied out of the stack."""
        if self.index is None:
            return self
        take = lambda field: lax.dynamic_index_in_dim(field, self.index, keepdims=False)
        return jax.tree.map(take, dataclasses.replace(self, index=None))


jax.tree_util.register_dataclass(
    QuantizedArray,
    data_fields=["codes", "scales", "nested_absmax", "nested_offset", "index"],
    meta_fields=["shape", "dtype", "scheme", "divided"],
)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MergedArray:
    """A dense weight [out, in] with an adapter in it already, a constant: what layers that use it often share."""

    weight: Any

    @property
    def shape(self) -> tuple[int, ...]:
        return self.weight.shape


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StackedArray:
    """One dense weight [out, in] of a stack [layers, out, in], told by an index, int32 [] (None before it is told).

    It is what a scan over layers hands on for few tokens, so that nothing is copied out of the stack before a kernel
    reads it.
    """

    stack: Any
    index: Any = None

    @property
    def shape(self) -> tuple[int, ...]:
        return self.stack.shape[1:]

    def at(self, index: Any) -> "StackedArray":
        """One matrix of the stack, without copying it."""
        return dataclasses.replace(self, index=index)


class LowRank(NamedTuple):
    """What an adapter makes of a weight, W + scaling * b a: a [r, in], b [out, r], scaling [] or [r], float32.

    With DoRA each output of it is multiplied by its gain, float32 [out], which products take for a constant: see
    `with_gain`.
    """

    a: Any
    b: Any
    scaling: Any
    gain: Any = None

    @property
    def gained_b(self) -> Float[Array, "d_out r"]:
        """b, of which the rows are multiplied by their gain."""
        return self.b if self.gain is None else self.gain[:, None] * self.b


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
    if q.index is None:
        return api.dequantize_nf4(*fields, shape=q.shape, dtype=dtype, implementation=implementation)
    return api.merge_nf4(*fields, q.index, shape=q.shape, dtype=dtype, implementation=implementation)


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
    if q.scheme != "nf4":
        q = _gathered(q.taken())
    if q.index is not None and q.leading:  # one launch reads them all out of the stack
        fields = q.codes, q.scales, q.nested_absmax, q.nested_offset, q.index
        return api.dequantize_nf4(*fields, shape=q.shape, dtype=dtype, implementation=implementation)
    function = lambda q: _on_mesh(_SCHEMES[q.scheme].dequantize(q, dtype, implementation), q)
    for _ in q.leading:
        function = jax.vmap(function)
    return function(q)


def _on_mesh(weight: Float[Array, "out in"], q: QuantizedArray) -> Float[Array, "out in"]:
    """A weight that was made of q, as q says that it lies on a mesh."""
    return weight if q.divided is None else lax.with_sharding_constraint(weight, q.divided)


def _gathered(q: QuantizedArray) -> QuantizedArray:
    """The same with codes and scales where what is made of them lies: what is sent is 8 bits a weight and not more."""
    if q.divided is None or q.leading:
        return q
    rows, columns = (*q.divided.spec, None, None)[:2]
    # Scales of a row are of its devices; those of blocks are few.
    of_scales = PartitionSpec(rows) if q.scales.shape[0] == q.shape[0] else PartitionSpec()
    return dataclasses.replace(
        q,
        codes=lax.with_sharding_constraint(q.codes, NamedSharding(q.divided.mesh, PartitionSpec(rows, columns))),
        scales=lax.with_sharding_constraint(q.scales, NamedSharding(q.divided.mesh, of_scales)),
    )


def merge(q: QuantizedArray, adapter: LowRank, dtype: jax.typing.DTypeLike) -> Float[Array, "out in"]:
    """The dense weight with the adapter in it, gain * (W + scaling B A): summed in float32, rounded once to `dtype`."""
    a, b, gain = adapter.a, adapter.gained_b * adapter.scaling, adapter.gain
    if q.scheme == "nf4":
        fields = q.codes, q.scales, q.nested_absmax, q.nested_offset
        return _on_mesh(api.merge_nf4(*fields, q.index, a, b, None, gain, shape=q.shape, dtype=dtype), q)
    weight = dequantize(q, jnp.float32)
    weight = weight if gain is None else gain[:, None] * weight
    # Placed as well: else XLA would add part by part, and gather the dense sum.
    update = _on_mesh(_contract(b.astype(dtype), a.astype(dtype), 0, jnp.float32), q)
    return _on_mesh((weight + update).astype(dtype), q)


def scaled(y: Float[Array, "*batch d_out"], gain: Float[Array, " d_out"] | None) -> Float[Array, "*batch d_out"]:
    """gain * y, multiplied in float32, in y's dtype."""
    return y if gain is None else (gain * y.astype(jnp.float32)).astype(y.dtype)


@jax.custom_vjp
def with_gain(y: Float[Array, "*batch d_out"], gain: Float[Array, " d_out"]) -> Float[Array, "*batch d_out"]:
    """y, which was made with a gain of each output that counted as a constant: the same, with the gradient of the gain.

    y = gain * y0, so it is the sum of dy * y0, or dy * y / gain: one reading of what is there, and no product.
    """
    return y


def _with_gain_backward(saved, dy):
    y, gain = saved
    tokens = tuple(range(y.ndim - 1))
    return dy, jnp.sum(dy.astype(jnp.float32) * y.astype(jnp.float32), axis=tokens) / gain


with_gain.defvjp(lambda y, gain: (y, (y, gain)), _with_gain_backward)


def is_merging_cheaper(tokens: int, shape: tuple[int, ...]) -> bool:
    """Whether B A, out * in * r, costs no more than the thin products of so many tokens, tokens * (in + out) * r."""
    return tokens * (shape[0] + shape[1]) >= shape[0] * shape[1]


def matmul(
    x: Float[Array, "*batch in"],
    w: Float[Array, "out in"] | QuantizedArray | MergedArray | StackedArray,
    adapter: LowRank | None = None,
) -> Float[Array, "*batch out"]:
    """x @ (gain * (w + scaling b a)).T for a dense or a quantised weight, in x's dtype with float32 sums.

    A dense weight is cast to x's dtype; a quantised one is dequantised to it, whatever its own `dtype`. The quantised
    one is a constant: its gradient is zero, and what the backward pass keeps of it is its packed form and nothing else.
    So dx = dy @ dequantize(w) dequantises a second time; keeping the result would take all the memory that
    quantisation saved. Few 16-bit tokens are multiplied by an NF4 weight in one kernel on a GPU (`kernels.nf4_matmul`,
    `kernels.nf4_matmul_tiles`, `kernels.nf4_matmul_wgmma`), the first two of which round no weight.

    With an adapter, a dense weight is multiplied by itself and the adapter's product is added: what b a adds to a
    16-bit weight is mostly less than half of its last place, and would be rounded away. A quantised weight lies
    anywhere between two 16-bit numbers, so there the adapter is added to the weight (`merge`), where
    `is_merging_cheaper`: x is read once and the result is written once. Either way gradients of a and b are those of
    the two thin products, summed in float32. Under `jax.vmap` over adapters the thin products are used, since one
    weight then serves them all.

    Raises:
      TypeError: the inner dimensions differ, or the weight is a stack.
    """
    leading = w.leading if isinstance(w, QuantizedArray) else w.shape[:-2]
    if leading or len(w.shape) != 2 or x.shape[-1:] != w.shape[1:]:
        raise TypeError(
            f"matmul takes x [..., in] and w [out, in], not {list(x.shape)} and {[*leading, *w.shape[-2:]]}"
        )
    if isinstance(w, MergedArray):
        if adapter is None:
            raise TypeError(
                "matmul takes a MergedArray with the adapter that is in it, which its gradients are made of"
            )
        return matmul_merged(x, [w], [adapter])[0]
    if adapter is not None:
        if isinstance(w, QuantizedArray) and is_merging_cheaper(x.size // x.shape[-1], w.shape):
            return matmul_merged(x, [w], [adapter])[0]
        return scaled(matmul(x, w) + lora_delta(x, *adapter[:3]), adapter.gain)
    if isinstance(w, QuantizedArray):
        return cast(list, _matmul_quantized(False, x, (w,), []))[0]
    if isinstance(w, StackedArray):
        return _matmul_stacked(False, x, (w,))[0]
    return _contract(x, w.astype(x.dtype), 1)


def _contract(x: Array, w: Array, dimension: int, dtype: Any = None) -> Array:
    """Contract the last dimension of x with the given one of a matrix w.

    The result is in x's dtype unless another is given: the sums are float32 inside the product all the same, and asking
    for a float32 result would write it out whole, twice the bytes, only to be rounded by another kernel.
    """
    return lax.dot_general(x, w, (((x.ndim - 1,), (dimension,)), ((), ())), preferred_element_type=dtype)


def matmul_each(
    x: Float[Array, "*batch in"] | Ordered,
    weights: Sequence[Float[Array, "_ in"] | QuantizedArray | StackedArray],
    *,
    norm: InputNorm | None = None,
    act: str | None = None,
    residual: Residual | None = None,
    parts: Any = False,
    ordered: Any = None,
    ahead: Sequence[Ahead] = (),
) -> list[Any]:
    """`matmul(x, w)` for each of some weights, which few tokens multiply in one launch if all are NF4, or of stacks.

    Where there is a kernel for it the same launch norms x, makes one result of a gate's and another product, act(gate)
    * up, and adds one result to a residual stream. See `reference.matmul_nf4`. With `parts`, for those who add them up,
    products alone may be `Parts`, of that dtype if it is one. x may be `Ordered` where they read it so
    (`ordered_dtype`), and with `ordered`, a dtype, what is gated. A kernel may fetch what is `ahead` for
    the product after it (`begins_with`).
    """
    if norm is not None or act is not None or residual is not None:
        if all(isinstance(w, QuantizedArray) for w in weights):
            return _matmul_around(act, ordered, x, tuple(weights), norm, residual, [*ahead])
        return _around(act, matmul_each(x if norm is None else _normed(x, norm), weights), residual)
    is_few = x.dtype.itemsize == 2 and math.prod(x.shape[:-1]) <= nf4_matmul_tiles.MOST_TOKENS
    if is_few and all(isinstance(w, QuantizedArray) for w in weights):
        return cast(list, _matmul_quantized(parts, x, tuple(weights), [*ahead]))
    read = plain(x)
    if all(isinstance(w, StackedArray) for w in weights):
        return _matmul_stacked(bool(parts), read, tuple(weights))
    return [matmul(read, w) for w in weights]


def adds_residual(x: jax.ShapeDtypeStruct, w: Any) -> bool:
    """Whether a kernel multiplies x [tokens, in] by a weight and adds to a residual stream (`matmul_each`)."""
    return _meet_few([w]) and api.adds_residual(x, [fields_of(w)], shapes=[w.shape])


def ordered_dtype(x: jax.ShapeDtypeStruct, weights: Sequence[Any], float8: bool = False) -> Any:
    """The dtype in which a kernel that multiplies x [tokens, in] by some weights (`matmul_each`) reads x as `Ordered`,
    with `float8` that where it can; None if it does not."""
    if not _meet_few(weights):
        return None
    return api.ordered_dtype(x, [*map(fields_of, weights)], shapes=[w.shape for w in weights], float8=float8)


def begins_with(tokens: int, weights: Sequence[Any], is_gated: bool = False) -> list[Ahead]:
    """What a kernel that multiplies so many tokens by some weights, or gates, reads first of them (`matmul_each`)."""
    if not _meet_few(weights):
        return []
    return api.begins_with(tokens, [*map(fields_of, weights)], shapes=[w.shape for w in weights], is_gated=is_gated)


def _meet_few(weights: Sequence[Any]) -> bool:
    """Whether few tokens may be multiplied by these in a kernel. On a mesh it would gather the stacks of all layers."""
    return all(isinstance(w, QuantizedArray) and w.scheme == "nf4" and w.divided is None for w in weights)


def fields_of(w: QuantizedArray) -> NF4Fields:
    return NF4Fields(w.codes, w.scales, w.nested_absmax, w.nested_offset, w.index)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _matmul_around(
    act: str | None,
    ordered: Any,
    x,
    weights: tuple,
    norm: InputNorm | None,
    residual: Residual | None,
    ahead: list[Ahead],
) -> list[Any]:
    """`matmul_each` of quantised weights with what stands around the products."""
    if _meet_few(weights):
        flat = lambda array: array.reshape(math.prod(array.shape[:-1]), array.shape[-1])
        options: dict[str, Any] = dict(norm=norm, act=act, ordered=ordered, ahead=ahead)
        options["residual"] = residual and dataclasses.replace(residual, x=flat(residual.x))
        fields, shapes = [*map(fields_of, weights)], [w.shape for w in weights]
        is_few = math.prod(x.shape[:-1]) <= nf4_matmul.MOST_TOKENS
        names = ("triton", "triton_float8", "triton_wgmma") if is_few else ("triton_float8", "triton_wgmma")
        for name in names:
            try:
                ys = api.matmul_nf4(flat(x), fields, shapes=shapes, implementation=name, **options)
                return [y.reshape(*x.shape[:-1], y.shape[-1]) for y in ys]
            except NotImplementedError:  # more tokens than it norms or is for, no GPU, float32
                pass
    if norm is not None:
        return _matmul_around(act, ordered, _normed(x, norm), weights, None, residual, ahead)
    return _around(act, matmul_each(x, weights, ahead=ahead), residual)


def _normed(x, norm: InputNorm):
    return api.residual_norm(x, None, norm.weight, norm.index, eps=norm.eps, offset=norm.offset)[1]


def _around(act: str | None, ys: list, residual: Residual | None) -> list:
    ys = ys if act is None else [api.gated(ys[0], ys[1], act)]
    return ys if residual is None else [residual.x + residual.multiplier * ys[0]]


def _matmul_around_backward(act, ordered, saved, dys):
    x, weights, norm, residual, _ = saved
    with_array = lambda part, name, array: part and dataclasses.replace(part, **{name: array})

    def step_by_step(x, gain, stream):
        x = x if norm is None else _normed(x, with_array(norm, "weight", gain))
        return _around(act, matmul_each(x, weights), with_array(residual, "x", stream))

    _, pullback = jax.vjp(step_by_step, x, norm and norm.weight, residual and residual.x)
    dx, dgain, dstream = pullback([*map(plain, dys)])
    dnorm = norm and dataclasses.replace(norm, weight=dgain, index=None)  # None: a zero, for what is constant
    return dx, None, dnorm, with_array(residual, "x", dstream), None


_matmul_around.defvjp(lambda act, ordered, *args: (_matmul_around(act, ordered, *args), args), _matmul_around_backward)


def _matmul_stacked(parts: bool, x: Float[Array, "*batch in"], weights: tuple) -> list[Any]:
    """x times each of some dense weights of stacks; three of them at most in one launch."""
    fields = [DenseFields(w.stack, w.index) for w in weights]
    ys = api.matmul_dense(x.reshape(-1, x.shape[-1]), fields, parts=parts)
    return [y.reshape(*x.shape[:-1], -1) for y in ys]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _matmul_quantized(
    parts: Any, x: Float[Array, "*batch in"] | Ordered, weights: tuple, ahead: list[Ahead]
) -> list[Any]:
    rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    if _meet_few(weights):
        fields = [*map(fields_of, weights)]
        is_few = rows.shape[0] <= nf4_matmul.MOST_TOKENS
        for name in ("triton",) if is_few else ("triton_float8", "triton_wgmma", "triton_tiles"):
            try:
                options: dict[str, Any] = dict(parts=parts, ahead=ahead, implementation=name)
                ys = api.matmul_nf4(rows, fields, shapes=[w.shape for w in weights], **options)
                return [y.reshape(*x.shape[:-1], -1) for y in ys]
            except NotImplementedError:  # more tokens than it is for, no such GPU, float32: as for any scheme
                pass
    read = plain(x)
    return [_contract(read, dequantize(w, x.dtype), 1) for w in weights]


def _matmul_forward(parts, x, weights, ahead):
    return _matmul_quantized(parts, x, weights, ahead), (weights, x if isinstance(x, Ordered) else None)


def _matmul_backward(parts, saved, dys):
    weights, x = saved
    each = zip(weights, map(cotangent, dys), strict=True)
    terms = [_contract(dy, dequantize(w, dy.dtype), 0) for w, dy in each]
    dx = sum(terms[1:], terms[0])
    return dx if x is None else in_order(dx), None, None  # None: a zero for every field of the weights


_matmul_quantized.defvjp(_matmul_forward, _matmul_backward)


def matmul_merged(
    x: Float[Array, "*batch in"], weights: Sequence[QuantizedArray | MergedArray], adapters: Sequence[LowRank]
) -> list[Float[Array, "*batch _"]]:
    """`matmul(x, w, adapter)` for each of some weights with the adapter in them: `MergedArray`s, or quantised ones to
    which it is added. The gradients of all adapters read x together."""
    return _matmul_merged(x, tuple(weights), tuple(adapters))


@jax.custom_vjp
def _matmul_merged(x: Float[Array, "*batch in"], weights: tuple, adapters: tuple[LowRank, ...]) -> list:
    return [_times_merged(1, x, w, adapter) for w, adapter in zip(weights, adapters, strict=True)]


def _matmul_merged_forward(*args):
    return _matmul_merged(*args), args


def _matmul_merged_backward(saved, dys):
    x, weights, adapters = saved
    dx = added_up([_times_merged(0, dy, *of) for dy, *of in zip(dys, weights, adapters, strict=True)])
    gradients = lora_gradients(x, dys, [(adapter.a, adapter.gained_b, adapter.scaling) for adapter in adapters])
    each = [(da, adapter._replace(b=db).gained_b) for adapter, (da, db, _) in zip(adapters, gradients, strict=True)]
    return dx, None, tuple(LowRank(da, db, None, None) for da, db in each)  # None: a zero, for what is constant


_matmul_merged.defvjp(_matmul_merged_forward, _matmul_merged_backward)


def added_up(gradients: Sequence[Float[Array, "*shape"]]) -> Float[Array, "*shape"]:
    """The sum, from the last to the first, each added to the sum so far: XLA has a product add to what it makes the
    first operand of a sum, and cannot have one add to two sums."""
    total = gradients[-1]
    for gradient in gradients[-2::-1]:
        total = gradient + total
    return total


def _times_merged(dimension: int, x: Array, w: QuantizedArray | MergedArray, adapter: LowRank) -> Array:
    """x contracted with the given dimension of W + scaling B A; as thin products where adapters are vmapped."""

    @jax.custom_batching.custom_vmap
    def product(x, w, adapter):
        weight = w.weight if isinstance(w, MergedArray) else merge(w, adapter, x.dtype)
        return _contract(x, weight, dimension)

    @product.def_vmap
    def _(axis_size, in_batched, x, w, adapter):
        def thin(x, w, adapter):
            if isinstance(w, MergedArray):
                return _contract(x, w.weight, dimension)
            a, b, before, after = adapter.a, adapter.b, None, adapter.gain
            if dimension == 0:
                a, b, before, after = b.T, a.T, after, before
            x = scaled(x, before)
            y = _contract(x, dequantize(w, x.dtype), dimension) + lora_delta(x, a, b, adapter.scaling)
            return scaled(y, after)

        axes = jax.tree.map(lambda is_batched: 0 if is_batched else None, in_batched)
        return jax.vmap(thin, in_axes=tuple(axes), axis_size=axis_size)(x, w, adapter), True

    return product(x, w, adapter)
