"""Every op of the library in plain `jax.numpy`: the specification that the kernels are tested against.

Raw arrays in, raw arrays out; no padding asked of the caller, no layout tricks, every function can be jitted.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.custom_batching import sequential_vmap
from jaxtyping import Array, Float, Float32, Int, UInt8

from jaxlora.kernels.gated import gated_reference
from jaxlora.kernels.ordered import Ordered, plain
from jaxlora.kernels.residual_norm import residual_norm_reference

# ---------------------------------------------------------------------------------------------------------------------
# NF4 with double quantisation
#
# A weight is flattened row by row and cut into blocks of 64 elements (a block runs on into the next row, the last one
# may be short). A block keeps its largest magnitude, `absmax`, and for every element the 4-bit index of the entry of
# `NF4` nearest to element / absmax: Dettmers et al. 2023, "QLoRA", section 3. Double quantisation then stores `absmax`
# itself in 8 bits: less their mean, in blocks of 256, as indices into `DYNAMIC_MAP`.
#
# The arithmetic is that of bitsandbytes 0.50 on the CPU, to the last bit, so that a weight quantised here is the weight
# that QLoRA in PyTorch would have trained on. XLA gives less than IEEE 754 in three places, and each has its own mend:
#   * division is off by up to 2 ulp on NVIDIA GPUs (div.full)         -> `_divide`
#   * subnormal numbers are flushed to zero on the CPU                 -> `_lift`, and magnitudes compared as integers
#   * a product and a sum are contracted to one rounding (both)        -> the clip in `dequantize_absmax`
# ---------------------------------------------------------------------------------------------------------------------

NF4_BLOCK = 64
"""Elements that share one absmax."""

ABSMAX_BLOCK = 256
"""Absmaxes that share one nested absmax."""

# The quantiles of a normal distribution scaled to [-1, 1], with an exact zero: QLoRA, appendix E.
NF4 = np.array(
    [
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
        -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
        0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
        0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ],
    np.float32,
)  # fmt: skip


class NF4Fields(NamedTuple):
    """The arrays of an NF4 weight [out, in], or with an index of a stack of them, as `merge_nf4` takes them.

    codes: uint8; absmax: float32, or uint8 with double quantisation, and then nested_absmax and offset are float32,
    else None; index: int32 [], or None.
    """

    codes: Any
    absmax: Any
    nested_absmax: Any
    offset: Any
    index: Any


class DenseFields(NamedTuple):
    """The array of a dense weight [out, in], or with an index, int32 [], of a stack of them [layers, out, in]."""

    weight: Any
    index: Any


_NF4_BOUNDS = (NF4[:-1] + NF4[1:]) / 2
_ABSMAX_FLOOR = np.float32(1e-38)  # what bitsandbytes divides by when a block is all zero; subnormal


def dynamic_map() -> np.ndarray:
    """The signed 8-bit dynamic data type, float32 [256], ascending.

    Dettmers et al. 2021, "8-bit Optimizers via Block-wise Quantization", section 1.3: beside the sign, a run of zero
    bits is a decimal exponent, a one ends it, and the bits that are left are a linear fraction. So decade 10^(e-6), for
    e = 0..6, holds 2^e magnitudes: the midpoints of 2^e equal cells of [0.1, 1]. Zero and one join them.
    """
    values = [0.0, 1.0]
    for exponent in range(7):
        cells = 2**exponent
        # A float32 step, counted from the nearer end, and every edge rounded once: as torch.linspace has it with FMA.
        step = np.float64((np.float32(1) - np.float32(0.1)) / np.float32(cells))
        i = np.arange(cells + 1)
        edges = np.where(2 * i < cells, np.float32(0.1) + step * i, 1 - step * (cells - i)).astype(np.float32)
        fractions = (edges[:-1] + edges[1:]) / np.float32(2)
        magnitudes = np.float32(10.0 ** (exponent - 6)) * fractions
        values += [*magnitudes, *-magnitudes]
    return np.sort(np.array(values, np.float32))


DYNAMIC_MAP = dynamic_map()


def _dynamic_thresholds() -> np.ndarray:
    """The least float32 in [-1, 1] that gets each of the codes 1..255, [255]: code(v) = number of thresholds <= v.

    bitsandbytes does not search for the nearest entry. It rounds v to one of 65536 equidistant bins and looks up a code
    that was chosen for the middle of the bin. That map ascends, so 255 thresholds say the same; they are found by
    bisection over the bit patterns of [0, 2], since v + 1 is rounded to float32 first.
    """
    last_bin = np.float32(65535)
    centres = np.float32(-1) + np.arange(65536, dtype=np.float32) * np.float32(2) / last_bin
    midpoints = np.float32(0.5) * (DYNAMIC_MAP[:-1] + DYNAMIC_MAP[1:])
    first_bin = np.searchsorted(centres, midpoints, side="right")  # the first centre beyond each midpoint

    def bin_of(v: np.ndarray) -> np.ndarray:
        half = (v + np.float32(1)) * np.float32(0.5)
        fused = (half.astype(np.float64) * 65535 + 0.5).astype(np.float32)  # a multiply-add with one rounding
        return np.trunc(fused)

    def float_at(rank: np.ndarray) -> np.ndarray:  # the floats in order: ranks are bit patterns, negative ones mirrored
        magnitude = np.abs(rank).astype(np.uint32).view(np.float32)
        return np.where(rank < 0, -magnitude, magnitude)

    one = int(np.float32(1).view(np.uint32))
    low, high = np.full(255, -one, np.int64), np.full(255, one, np.int64)
    while (low < high).any():
        middle = (low + high) // 2
        reached = bin_of(float_at(middle)) >= first_bin
        low, high = np.where(reached, low, middle + 1), np.where(reached, middle, high)
    return float_at(low)


_DYNAMIC_THRESHOLDS = _dynamic_thresholds()


def _bits(x: Float32[Array, "..."]) -> Array:
    return lax.bitcast_convert_type(x, jnp.int32)


def _float(bits: Array) -> Float32[Array, "..."]:
    return lax.bitcast_convert_type(bits, jnp.float32)


def _divide(a: Float32[Array, "..."], b: Float32[Array, "..."]) -> Float32[Array, "..."]:
    """a / b, correctly rounded on every platform, for positive normal a and b with a normal quotient.

    The platform's division gives a quotient of the significands that may be some units off; the remainder, which is
    small and therefore exact in wrapping 32-bit integers, says by how many.
    """
    (m, d) = ((_bits(x) & 0x7FFFFF) | 0x800000 for x in (a, b))  # significands, 2^23 <= m, d < 2^24
    exponent = (_bits(a) >> 23) - (_bits(b) >> 23)
    shift = jnp.where(m >= d, 23, 24)  # so that 2^23 <= quotient <= 2^24
    unit = jnp.where(m >= d, jnp.float32(2**-23), jnp.float32(2**-24))
    quotient = (m.astype(jnp.float32) / d.astype(jnp.float32) / unit).astype(jnp.int32)
    rest = (m << shift) - quotient * d
    quotient += rest // d
    quotient += (2 * (rest % d) > d).astype(jnp.int32)  # a tie cannot happen: it would need a 25-bit significand
    return quotient.astype(jnp.float32) * unit * _float((exponent + 127) << 23)


def _lift(x: Float32[Array, "..."]) -> Float32[Array, "..."]:
    """x * 2^64, exact for |x| < 2^63 and for subnormal x even where the platform reads those as zero."""
    magnitude = _bits(x) & 0x7FFFFFFF
    subnormal = magnitude.astype(jnp.float32) * jnp.float32(2.0 ** (64 - 149))
    lifted = jnp.where(_bits(x) < 0, -subnormal, subnormal)
    return jnp.where(magnitude < 0x00800000, lifted, x * jnp.float32(2.0**64))


def _mean(x: Float32[Array, " n"]) -> Float32[Array, ""]:
    """The mean of non-negative numbers, within an ulp whatever order the platform adds in.

    Every addition also yields its exact error (Knuth's two-sum), and the errors are summed beside.
    """

    def add(left, right):
        a, b = left[0], right[0]
        total = a + b
        part = total - a
        return total, left[1] + right[1] + ((a - (total - part)) + (b - part))

    zero = jnp.float32(0)
    total, error = lax.reduce((x, jnp.zeros_like(x)), (zero, zero), add, (0,))
    total = total + error
    mean = _divide(jnp.where(total > 0, total, jnp.float32(1)), jnp.float32(x.size))
    return jnp.where(total > 0, mean, total)


def _blocks(x: Array, size: int) -> Array:
    """A flat array as [blocks, size]; the last block is filled up with zeros."""
    return jnp.pad(x, (0, -x.size % size)).reshape(-1, size)


def quantize_nf4(w: Float[Array, "..."]) -> tuple[UInt8[Array, " bytes"], Float32[Array, " blocks"]]:
    """Quantise a float32, bfloat16 or float16 array of n elements to NF4.

    Returns:
      codes: uint8 [ceil(n / 2)], two elements a byte, the earlier one in the high nibble. If n is odd, the last low
        nibble is the code of zero.
      absmax: float32 [ceil(n / 64)], the largest magnitude of each block.

    Both equal `bitsandbytes.functional.quantize_4bit(w, blocksize=64, quant_type="nf4")` on the CPU bit for bit, for
    finite w of magnitudes below 2^126.
    """
    n = w.size
    x = _blocks(w.astype(jnp.float32).reshape(-1), NF4_BLOCK)
    absmax = _float(jnp.max(_bits(x) & 0x7FFFFFFF, axis=-1))  # magnitudes order as their bit patterns do

    small = (_bits(absmax) < _bits(jnp.float32(2.0**-60)))[:, None]
    x = jnp.where(small, _lift(x), x)
    floor = jnp.float32(math.ldexp(float(_ABSMAX_FLOOR), 64))
    peak = jnp.where(small, jnp.maximum(_lift(absmax)[:, None], floor), absmax[:, None])
    scaled = x * _divide(jnp.ones_like(peak), peak)
    if n % NF4_BLOCK:  # bitsandbytes divides a short block, and floors its absmax, where it multiplies whole ones
        # What is below 2^-20 of the peak has the code of zero, whatever it is exactly.
        magnitude = jnp.maximum(jnp.abs(x[-1]), peak[-1] * jnp.float32(2**-20))
        scaled = scaled.at[-1].set(jnp.sign(x[-1]) * _divide(magnitude, jnp.broadcast_to(peak[-1], magnitude.shape)))
        absmax = _float(_bits(absmax).at[-1].max(int(_ABSMAX_FLOOR.view(np.int32))))

    # The nearest entry; halfway between two of them, the lower one.
    nibbles = functools.reduce(jnp.add, ((scaled > bound).astype(jnp.uint8) for bound in _NF4_BOUNDS)).reshape(-1, 2)
    codes = (nibbles[:, 0] << 4) | nibbles[:, 1]
    return codes[: -(-n // 2)], absmax


def quantize_absmax(
    absmax: Float32[Array, " blocks"], offset: Float32[Array, ""] | None = None
) -> tuple[UInt8[Array, " blocks"], Float32[Array, " nested_blocks"], Float32[Array, ""]]:
    """Quantise the absmaxes of one weight to 8 bits: QLoRA's double quantisation.

    Args:
      absmax: float32 [b].
      offset: what is subtracted first; the mean if None. (bitsandbytes' own mean depends on the number of its threads,
        by an ulp or two. Given its offset, codes and nested absmax equal bitsandbytes' on the CPU bit for bit, unless
        every absmax is subnormal. Its CUDA kernel rounds otherwise near the midpoints of the map.)

    Returns:
      codes: uint8 [b], indices into `DYNAMIC_MAP`; 0 throughout a block of zeros.
      nested_absmax: float32 [ceil(b / 256)].
      offset: float32 scalar.
    """
    offset = _mean(absmax) if offset is None else offset
    x = _blocks(absmax - offset, ABSMAX_BLOCK)
    nested_absmax = jnp.max(jnp.abs(x), axis=-1)
    some = nested_absmax[:, None] > 0
    peak = jnp.where(some, nested_absmax[:, None], jnp.float32(1))
    scaled = x * _divide(jnp.ones_like(peak), peak)
    codes = jnp.searchsorted(jnp.asarray(_DYNAMIC_THRESHOLDS), scaled, side="right").astype(jnp.uint8)
    codes = jnp.where(some, codes, jnp.uint8(0))
    return codes.reshape(-1)[: absmax.size], nested_absmax, offset


def dequantize_absmax(
    codes: UInt8[Array, "..."], nested_absmax: Float32[Array, " nested_blocks"], offset: Float32[Array, ""]
) -> Float32[Array, " blocks"]:
    """Undo `quantize_absmax`: float32 [b], b the number of codes. Equals bitsandbytes' bit for bit."""
    scale = nested_absmax[:, None]
    x = jnp.asarray(DYNAMIC_MAP)[_blocks(codes.reshape(-1), ABSMAX_BLOCK).astype(jnp.int32)] * scale
    # The clip changes no value, the map being within [-1, 1]. It stands between the product and the sum, so that no
    # compiler contracts them to one rounding (an optimisation barrier does not prevent it).
    x = jnp.clip(x, -scale, scale)
    return x.reshape(-1)[: codes.size] + offset


def dequantize_nf4(
    codes: UInt8[Array, "..."],
    absmax: Float32[Array, "..."] | UInt8[Array, "..."],
    nested_absmax: Float32[Array, "..."] | None = None,
    offset: Float32[Array, "..."] | None = None,
    index: Int[Array, ""] | None = None,
    *,
    shape: tuple[int, ...],
    dtype: jax.typing.DTypeLike,
) -> Float[Array, "..."]:
    """Undo `quantize_nf4`, and `quantize_absmax` where that was used.

    Args:
      codes: uint8, ceil(n / 2) of them in any shape, where n = prod(shape).
      absmax: ceil(n / 64) of them in any shape; float32, or uint8 if `nested_absmax` and `offset` are given.
      nested_absmax: float32 [ceil(ceil(n / 64) / 256)].
      offset: float32 scalar.
      index: int32 scalar or None. With an index all these are of a stack of many matrices each, [stack, matrices, ...],
        of which it says one: the experts of a layer, say.
      shape: the shape of the result, of one matrix: with an index the result is [matrices, *shape].
      dtype: its dtype.

    Returns:
      The array of that shape, or arrays of it: NF4[code] * absmax in float32, rounded once to `dtype`. It equals
      bitsandbytes' bit for bit (a result that is subnormal in float32 may be zero).
    """
    if index is not None:
        fields = jax.tree.map(
            lambda field: lax.dynamic_index_in_dim(field, index, keepdims=False), (codes, absmax, nested_absmax, offset)
        )
        return jax.vmap(functools.partial(dequantize_nf4, shape=shape, dtype=dtype))(*fields)
    n = math.prod(shape)
    if nested_absmax is not None and offset is not None:
        absmax = dequantize_absmax(absmax, nested_absmax, offset)
    codes = codes.reshape(-1)
    nibbles = jnp.stack([codes >> 4, codes & 15], axis=-1).reshape(-1)
    x = jnp.asarray(NF4)[_blocks(nibbles, NF4_BLOCK).astype(jnp.int32)] * absmax.reshape(-1, 1)
    return x.reshape(-1)[:n].reshape(shape).astype(dtype)


def merge_nf4(
    codes: UInt8[Array, "..."],
    absmax: Float32[Array, "..."] | UInt8[Array, "..."],
    nested_absmax: Float32[Array, "..."] | None,
    offset: Float32[Array, "..."] | None,
    index: Int[Array, ""] | None,
    a: Float[Array, "r d_in"] | None,
    b: Float[Array, "d_out r"] | None,
    inverse: Float32[Array, ""] | None = None,
    gain: Float32[Array, " d_out"] | None = None,
    *,
    shape: tuple[int, int],
    dtype: jax.typing.DTypeLike,
    transposed: bool = False,
) -> Float[Array, "d0 d1"]:
    """A weight of NF4 with a low-rank update: gain * dequantize_nf4(...) + b a, a gain for each row, summed in float32
    and rounded once to `dtype`.

    Args:
      codes, absmax, nested_absmax, offset: as for `dequantize_nf4`; of a stack of weights if `index` is given.
      index: which weight of the stack; None where there is no stack.
      a, b: rounded to `dtype`, or bfloat16 for float8, before they are multiplied. None for no update.
      inverse: what the sum is multiplied by before it is rounded; for float8, whose largest number it stays within.
      gain: what each row of the weight is multiplied by, before b a is added; None for 1.
      shape: (out, in).
      dtype: the result's.
      transposed: whether the result is [in, out].
    """
    fields = codes, absmax, nested_absmax, offset
    if index is not None:
        fields = [None if field is None else lax.dynamic_index_in_dim(field, index, keepdims=False) for field in fields]
    weight = dequantize_nf4(*fields, shape=shape, dtype=jnp.float32)
    if gain is not None:
        weight = gain[:, None] * weight
    if a is not None and b is not None:
        exact = lax.Precision.HIGHEST if dtype == jnp.float32 else None
        factor = factor_dtype(dtype)
        low_rank = jnp.matmul(b.astype(factor), a.astype(factor), precision=exact, preferred_element_type=jnp.float32)
        weight = weight + low_rank
    if inverse is not None:
        largest = float(jnp.finfo(dtype).max)
        weight = jnp.clip(weight * inverse, -largest, largest)
    weight = weight.astype(dtype)
    return weight.T if transposed else weight


def factor_dtype(dtype: jax.typing.DTypeLike) -> jnp.dtype:
    """The dtype in which the factors of a low-rank update are multiplied whose sum is rounded to `dtype`."""
    return jnp.dtype(jnp.bfloat16 if jnp.dtype(dtype).itemsize == 1 else dtype)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class InputNorm:
    """An RMS norm of what a product reads, as `residual_norm_reference` has it: weight [in], or with an index, int32
    [], a stack of such."""

    weight: Any
    index: Any
    eps: float = dataclasses.field(metadata=dict(static=True))
    offset: float = dataclasses.field(default=0.0, metadata=dict(static=True))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Residual:
    """What a product y [M, out] is added to, x + multiplier * y."""

    x: Any
    multiplier: float = dataclasses.field(default=1.0, metadata=dict(static=True))


def matmul_nf4(
    x: Float[Array, "m d_in"] | Ordered,
    weights: Sequence[NF4Fields],
    *,
    shapes: Sequence[tuple[int, int]],
    norm: InputNorm | None = None,
    act: str | None = None,
    residual: Residual | None = None,
    parts: Any = False,
    ordered: Any = None,
) -> list[Float[Array, "m _"]]:
    """x W^T for each of some NF4 weights: in x's dtype, the weights too, with sums in float32.

    Args:
      x: float32, bfloat16 or float16; [M, in] or `Ordered`.
      weights, shapes: the fields of each, and its (out, in).
      norm: of x, before it is multiplied; None for none.
      act: a key of `gated.ACTIVATIONS`: the result is one, act(x W0^T) * x W1^T, for two weights; None for none.
      residual: what the result, of one weight or with `act`, is added to; None for nothing.
      parts: whether a product may be float32 [P, M, out], parts that are to be added up (`parts.Parts`), which a kernel
        leaves that divides k; or the dtype of which they may be. There are none here.
      ordered: of which dtype a result with `act` may be `Ordered`, as a kernel makes it. Here it is not.
    """
    x = plain(x)
    if norm is not None:
        _, x = residual_norm_reference(x, None, norm.weight, norm.index, eps=norm.eps, offset=norm.offset)
    ys = _matmul_nf4(x, weights, shapes)
    if act is not None:
        ys = [gated_reference(*ys, act)]
    return ys if residual is None else [residual.x + residual.multiplier * ys[0]]


def _matmul_nf4(x: Array, weights: Sequence[NF4Fields], shapes: Sequence[tuple[int, int]]) -> list[Array]:
    dense = [
        merge_nf4(*fields, None, None, shape=shape, dtype=x.dtype)
        for fields, shape in zip(weights, shapes, strict=True)
    ]
    return [lax.dot_general(x, weight, (((1,), (1,)), ((), ()))) for weight in dense]


def matmul_dense(
    x: Float[Array, "m d_in"], weights: Sequence[DenseFields], *, parts: bool = False
) -> list[Float[Array, "m _"]]:
    """x W^T for each of some dense weights: in x's dtype, the weights too, with sums in float32.

    Args:
      x: float32, bfloat16 or float16.
      weights: each with its index, None for a single matrix.
      parts: as in `matmul_nf4`.
    """

    def times(weight, index):
        if index is not None:
            weight = lax.dynamic_index_in_dim(weight, index, keepdims=False)
        return lax.dot_general(x, weight.astype(x.dtype), (((1,), (1,)), ((), ())))

    return [times(*fields) for fields in weights]


# ---------------------------------------------------------------------------------------------------------------------
# Products of rows that are sorted into groups, each group with a matrix of its own (arXiv:2211.15841, section 4)
#
# Under `jax.vmap` the instances run one after the other: `ragged_dot_general` cannot share w between them, and copies
# of w, the experts of a model, would not fit.
# ---------------------------------------------------------------------------------------------------------------------


def _ragged(x: Array, w: Array, sizes: Array, contracted: tuple[int, int], groups: list[int], dtype: Any) -> Array:
    numbers = lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(((contracted[0],), (contracted[1],)), ((), ())),
        lhs_ragged_dimensions=[0],
        rhs_group_dimensions=groups,
    )

    @sequential_vmap
    def product(x, w, sizes):
        return lax.ragged_dot_general(x, w, sizes, numbers, preferred_element_type=dtype)

    return product(x, w, sizes)


def grouped_dot(
    x: Float[Array, "n d_in"], w: Float[Array, "g d0 d1"], sizes: Int[Array, " g"], contracted: int, dtype: Any = None
) -> Float[Array, "n d_out"]:
    """Each row times its group's matrix, of which axis 1 or 2 is contracted; in x's dtype unless another is given.

    The rows are sorted by group, `sizes` of them each, which add up to n. The sums are float32.
    """
    return _ragged(x, w, sizes, (1, contracted), [0], dtype)


def grouped_dot_nf4(
    x: Float[Array, "n d_in"], fields: NF4Fields, sizes: Int[Array, " g"], contracted: int, *, shape: tuple[int, int]
) -> Float[Array, "n d_out"]:
    """`grouped_dot` with NF4 matrices of a shape each, rounded to x's dtype. Their fields are [g, ...], with an index
    [stack, g, ...]."""
    dequantize = functools.partial(dequantize_nf4, shape=shape, dtype=x.dtype)
    w = dequantize(*fields) if fields.index is not None else jax.vmap(dequantize)(*fields)
    return grouped_dot(x, w, sizes, contracted)


def grouped_outer(
    x: Float[Array, "n d0"], y: Float[Array, "n d1"], sizes: Int[Array, " g"], dtype: Any = None
) -> Float[Array, "g d0 d1"]:
    """x^T y of the rows of each group; zeros for a group without rows. The sums are float32."""
    return _ragged(x, y, sizes, (0, 0), [], dtype)


# ---------------------------------------------------------------------------------------------------------------------
# Rotary positions (RoFormer, arXiv:2104.09864)
# ---------------------------------------------------------------------------------------------------------------------


def apply_rope(
    x: Float[Array, "b t heads head_dim"],
    cos: Float[Array, "b t pairs"],
    sin: Float[Array, "b t pairs"],
    *,
    interleaved: bool = False,
) -> Float[Array, "b t heads head_dim"]:
    """Turn the first 2 * pairs entries of each head; the rest passes through."""
    pairs = cos.shape[-1]
    cos, sin = cos[:, :, None], sin[:, :, None]
    rotary, rest = jnp.split(x, [2 * pairs], axis=-1)
    rotary = rotary.astype(jnp.float32)
    first, second = (rotary[..., 0::2], rotary[..., 1::2]) if interleaved else jnp.split(rotary, 2, axis=-1)
    turned = first * cos - second * sin, second * cos + first * sin
    together = jnp.stack(turned, axis=-1).reshape(rotary.shape) if interleaved else jnp.concatenate(turned, axis=-1)
    return jnp.concatenate([together.astype(x.dtype), rest], axis=-1)
