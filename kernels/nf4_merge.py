"""The weight of a LoRA layer as one matrix: an NF4 weight dequantised and its adapter added, in one Triton kernel.

The maths, for a weight [out, in] with the adapter B [out, r] and A [r, in], B already scaled:

    out = round(gain * dequantize_nf4(codes, ...) + B A)        sums in float32, rounded once to the output's dtype

so that x W'^T is one product of the tensor cores where x W^T + (x A^T) B^T is three, of which the two thin ones read x
and write a result as large as the layer's. A gain for each row is DoRA's; it multiplies the scale of each block, and B
has it in it already. Rounding W' loses no more than rounding W does, since NF4 times its absmax
lies anywhere between two 16-bit numbers: what B A adds is rounded up as often as down.

The layout. A program makes a tile of `rows` x `columns`. The lookup of a code is `nf4.py`'s "table"; a row starts at a
word of 8 codes, because `in` is a multiple of 64. B A is a product of the tensor cores with r as its inner dimension,
which takes 16 or more: adapters are padded with zeros to a multiple of 16.

The weight may be one of a stack, told by an index in device memory, so that a scan over layers need not copy each
layer's codes out of the stack before the kernel reads them.

Which kernel. Large weights of 16 bits with an adapter of few ranks are made by `nf4_merge16.py`, where B A changes no
layout. This one makes all else: no adapter, more ranks, small weights, float32, float8, a transposed weight.

The trade. The traffic is that of dequantising, 0.516 bytes in and 2 out for an element, and A and B, which are read
again for every row or column of tiles and lie in L2. What is added to it is moving the tile of B A between the layouts
of tensor cores and of stores, through shared memory.
"""

import functools
from dataclasses import dataclass
from typing import no_type_check

import jax
import jax.numpy as jnp

from jaxlora.kernels import reference

INNER = 64  # ranks that a tile multiplies at once


@dataclass(frozen=True, kw_only=True)
class Config:
    """The tile of one program, both powers of two, `columns` a multiple of 64; and its warps. None changes a result."""

    rows: int = 64
    columns: int = 128
    num_warps: int = 4


@functools.cache
@no_type_check  # a type checker's wrapper around the function would hide its source from Triton
def _kernel():
    """The Triton function. Built on first use, since the library imports where Triton is not installed."""
    import triton
    import triton.language as tl

    @triton.jit
    def merge_nf4(
        codes,  # uint8 [stack, rows, columns / 2]
        absmax,  # uint8 or float32 [stack, rows, columns / 64]
        nested_absmax,  # float32 [stack, ceil(blocks / 256)]; unread unless NESTED
        offset,  # float32 [stack]; unread unless NESTED
        index,  # int32 []: which of the stack; unread unless STACKED
        a,  # [RANK, columns], in the dtype of out, or bfloat16 where that is float8
        b,  # [rows, RANK]
        nf4,  # float32 [16]
        dynamic_map,  # float32 [256]
        inverse,  # float32 []; unread unless SCALED
        gain,  # float32 [rows]; unread unless GAINED
        out,  # [rows, columns], or [columns, rows] where TRANSPOSED
        ROWS: tl.constexpr,
        COLUMNS: tl.constexpr,
        RANK: tl.constexpr,  # a multiple of 16; 0 for no adapter
        INNER: tl.constexpr,  # ranks of one product
        NESTED: tl.constexpr,
        STACKED: tl.constexpr,
        PRECISION: tl.constexpr,
        SCALED: tl.constexpr,
        GAINED: tl.constexpr,
        LARGEST: tl.constexpr,  # number of out's dtype
        TRANSPOSED: tl.constexpr,
        TILE_ROWS: tl.constexpr,
        TILE_COLUMNS: tl.constexpr,
    ):
        WORDS: tl.constexpr = COLUMNS // 8  # of a row
        BLOCKS: tl.constexpr = ROWS * COLUMNS // 64  # of a matrix
        TILES: tl.constexpr = (COLUMNS + TILE_COLUMNS - 1) // TILE_COLUMNS
        if STACKED:
            layer = tl.load(index).to(tl.int64)
            codes += layer * (ROWS * WORDS * 4)
            absmax += layer * BLOCKS
            nested_absmax += layer * ((BLOCKS + 255) // 256)
            offset += layer
        first_row = (tl.program_id(0) // TILES) * TILE_ROWS
        first_column = (tl.program_id(0) % TILES) * TILE_COLUMNS
        row = first_row + tl.arange(0, TILE_ROWS)
        word = first_column // 8 + tl.arange(0, TILE_COLUMNS // 8)
        inside = (row[:, None] < ROWS) & (word[None, :] < WORDS)
        word = row[:, None] * WORDS + word[None, :]

        block = word // 8
        scale = tl.load(absmax + block, mask=inside, other=0)
        if NESTED:
            scale = tl.load(dynamic_map + scale.to(tl.int32))
            scale = scale * tl.load(nested_absmax + block // 256, mask=inside, other=0.0) + tl.load(offset)
        if GAINED:
            scale = scale * tl.load(gain + row, mask=row < ROWS, other=0.0)[:, None]
        packed = tl.load(codes.to(tl.pointer_type(tl.uint32)) + word, mask=inside, other=0)
        element = tl.arange(0, 8)[None, None, :]
        value = tl.load(nf4 + ((packed[:, :, None] >> ((4 * element) ^ 4)) & 15)) * scale[:, :, None]
        value = tl.reshape(value, (TILE_ROWS, TILE_COLUMNS))

        column = first_column + tl.arange(0, TILE_COLUMNS)
        if RANK > 0:
            rank = tl.arange(0, INNER)
            for start in range(0, RANK, INNER):
                ranks = start + rank
                left = tl.load(
                    b + row[:, None] * RANK + ranks[None, :],
                    mask=(row[:, None] < ROWS) & (ranks[None, :] < RANK),
                    other=0.0,
                )
                right = tl.load(
                    a + ranks[:, None] * COLUMNS + column[None, :],
                    mask=(ranks[:, None] < RANK) & (column[None, :] < COLUMNS),
                    other=0.0,
                )
                value += tl.dot(left, right, input_precision=PRECISION)
        if SCALED:
            value = tl.minimum(tl.maximum(value * tl.load(inverse), -LARGEST), LARGEST)
        rounded = value.to(out.dtype.element_ty)
        if TRANSPOSED:
            mask = (column[:, None] < COLUMNS) & (row[None, :] < ROWS)
            tl.store(out + column[:, None] * ROWS + row[None, :], tl.trans(rounded), mask=mask)
        else:
            mask = (row[:, None] < ROWS) & (column[None, :] < COLUMNS)
            tl.store(out + row[:, None] * COLUMNS + column[None, :], rounded, mask=mask)

    return merge_nf4


def merge_nf4(
    codes: jax.Array,
    absmax: jax.Array,
    nested_absmax: jax.Array | None,
    offset: jax.Array | None,
    index: jax.Array | None,
    a: jax.Array | None,
    b: jax.Array | None,
    inverse: jax.Array | None = None,
    gain: jax.Array | None = None,
    *,
    shape: tuple[int, int],
    dtype: jax.typing.DTypeLike,
    transposed: bool = False,
    config: Config | None = None,
) -> jax.Array:
    """`reference.merge_nf4` as a Triton kernel: the same arguments, the same result but for the order of the sum B A.

    Without an adapter and a gain the bits are those of `reference.dequantize_nf4`. It may be vmapped (which loops) and
    is not differentiable.

    Raises:
      NotImplementedError: jax-triton is not installed, the dtype is none of float32, bfloat16, float16 and, with an
        `inverse`, float8_e4m3fn, rows are not whole blocks (in % 64), or there are 2^31 elements or more.
    """
    rows, columns = shape
    dtype = jnp.dtype(dtype)
    if dtype not in (jnp.float32, jnp.bfloat16, jnp.float16) and (dtype != jnp.float8_e4m3fn or inverse is None):
        raise NotImplementedError(f"the kernel writes float32, bfloat16, float16 or scaled float8, not {dtype.name}")
    if columns % reference.NF4_BLOCK:
        raise NotImplementedError(f"the kernel takes rows of whole blocks of 64, not of {columns} elements")
    if rows * columns >= 1 << 31:
        raise NotImplementedError(f"the kernel counts elements in 32 bits, and there are {rows * columns}")
    try:
        import jax_triton
    except ImportError as error:
        raise NotImplementedError(f"the kernel needs jax-triton and triton ({error})") from error

    config = Config() if config is None else config
    rank = 0 if a is None else -(-a.shape[-2] // 16) * 16
    inner = 16  # float32 is multiplied without tensor cores, in code that is long enough for 16
    while dtype != jnp.float32 and inner < min(rank, INNER):
        inner *= 2
    call = functools.partial(
        jax_triton.triton_call,
        kernel=_kernel(),
        out_shape=jax.ShapeDtypeStruct(shape[::-1] if transposed else shape, dtype),
        grid=(-(-rows // config.rows) * -(-columns // config.columns),),
        num_warps=config.num_warps,
        enable_fp_fusion=False,
        ROWS=rows,
        COLUMNS=columns,
        RANK=rank,
        INNER=inner,
        NESTED=nested_absmax is not None,
        STACKED=index is not None,
        PRECISION="ieee" if dtype == jnp.float32 else "tf32",
        SCALED=inverse is not None,
        GAINED=gain is not None,
        LARGEST=float(jnp.finfo(dtype).max),
        TRANSPOSED=transposed,
        TILE_ROWS=config.rows,
        TILE_COLUMNS=config.columns,
    )
    factor = reference.factor_dtype(dtype)

    @jax.custom_batching.sequential_vmap
    def run(codes, absmax, nested_absmax, offset, index, a, b, inverse, gain):
        tables = jnp.asarray(reference.NF4), jnp.asarray(reference.DYNAMIC_MAP)
        return call(codes, absmax, nested_absmax, offset, index, a, b, *tables, inverse, gain)

    none = jnp.zeros((1,), jnp.float32)
    if nested_absmax is None:
        nested_absmax, offset = none, none
    index = jnp.zeros((), jnp.int32) if index is None else index
    if a is None or b is None:
        a, b = none.astype(factor), none.astype(factor)
    else:
        padding = rank - a.shape[0]
        a = jnp.pad(a.astype(factor), ((0, padding), (0, 0)))
        b = jnp.pad(b.astype(factor), ((0, 0), (0, padding)))
    inverse, gain = none if inverse is None else inverse, none if gain is None else gain
    return run(codes, absmax, nested_absmax, offset, index, a, b, inverse, gain)
