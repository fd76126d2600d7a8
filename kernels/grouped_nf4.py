"""Grouped products of few rows with NF4 experts, as a Triton kernel that dequantises what it multiplies.

The maths is that of `nf4.dequantize_nf4` and then `grouped_triton.grouped_dot`: for rows x [n, inner] sorted by group,
sizes [g] rows each, and a matrix W_g [d0, d1] a group, contracted in its last dimension or in its first,

    out[i] = W_g x[i]  or  W_g^T x[i]        for every row i of group g, each weight rounded to x's dtype

Why another kernel. One token of Qwen3-30B-A3B goes through 8 of 128 experts. To dequantise them all first takes 0.6 GB
of traffic a matrix of a layer, 25 of the 33 ms that a token took on an H100; here a program reads the codes of the one
expert that its rows are of, and experts without rows are not read at all.

The layout. A program has a tile of up to 16 rows of one group, as in `grouped_triton`, and a tile of columns. It walks
along what is contracted: codes of a tile become numbers by permutations of bytes (`nf4.prmt_assembly`), a number times
its block's scale is rounded, and the tensor cores multiply. So a weight is dequantised once for 16 rows, not once for
all: with rows for most experts and many for each, `is_cheaper` says that dequantising first is less work.
"""

import functools
from dataclasses import dataclass
from typing import no_type_check

import jax
import jax.numpy as jnp

from jaxlora.kernels import reference
from jaxlora.kernels.grouped_triton import tile_kernels
from jaxlora.kernels.nf4 import prmt_assembly
from jaxlora.kernels.nf4_shards import is_on_mesh
from jaxlora.kernels.reference import NF4Fields

ROWS = 16  # of a tile, the least that a product of Triton has


@dataclass(frozen=True, kw_only=True)
class Config:
    """The tile of one program: `columns` of the result and `inner` that one step contracts, powers of two; whichever
    lies along the blocks of 64 is 64 at least. None changes a result but in the order of its sums."""

    columns: int = 64
    inner: int = 128
    num_warps: int = 4
    num_stages: int = 3


def is_cheaper(x: jax.Array, shape: tuple[int, int], groups: int) -> bool:
    """Whether the kernel takes x and matrices of a shape, and x has so few rows that it beats dequantising them all.

    On an H100 512 rows over 128 groups, of 768 x 2048 each, took 0.44 of the time (2026-11-27); more were not tried. On
    a mesh the call would gather all layers' experts.
    """
    is_taken = x.dtype in (jnp.bfloat16, jnp.float16) and shape[1] % reference.NF4_BLOCK == 0
    return is_taken and x.shape[0] <= 4 * groups and not is_on_mesh()


@functools.cache
@no_type_check  # a type checker's wrapper around the function would hide its source from Triton
def _kernel():
    """The Triton function. Built on first use, since the library imports where Triton is not installed."""
    import triton
    import triton.language as tl

    group_of, rows_of = tile_kernels()
    lookup_assembly = tl.constexpr(prmt_assembly())
    lookup_operands = tl.constexpr(",".join(["=&r"] * 8 + ["r"]))

    @triton.jit
    def weights_of(
        row, column, codes, absmax, nested_absmax, mean, dynamic_map,
        D0: tl.constexpr, D1: tl.constexpr, TILE0: tl.constexpr, TILE1: tl.constexpr, NESTED: tl.constexpr,
    ):  # fmt: skip
        """A tile [TILE0, TILE1] of one matrix, float32, from its first row and column; zeros where there is none."""
        rows = row + tl.arange(0, TILE0)[:, None]
        word = column // 8 + tl.arange(0, TILE1 // 8)[None, :]
        packed = tl.load(codes + rows * (D1 // 8) + word, mask=(rows < D0) & (word < D1 // 8), other=0)
        block = column // 64 + tl.arange(0, TILE1 // 64)[None, :]
        at = rows * (D1 // 64) + block
        inside = (rows < D0) & (block < D1 // 64)
        scale = tl.load(absmax + at, mask=inside, other=0)
        if NESTED:
            scale = tl.load(dynamic_map + scale.to(tl.int32))
            scale = scale * tl.load(nested_absmax + at // 256, mask=inside, other=0.0) + mean
        scale = tl.where(inside, scale, 0.0)
        # Looked up in registers: what is loaded in a loop Triton copies asynchronously, number by number.
        v0, v1, v2, v3, v4, v5, v6, v7 = tl.inline_asm_elementwise(
            lookup_assembly, lookup_operands, [packed], dtype=(tl.float32,) * 8, is_pure=True, pack=1
        )
        even, odd = tl.join(tl.join(v0, v4), tl.join(v2, v6)), tl.join(tl.join(v1, v5), tl.join(v3, v7))
        value = tl.reshape(tl.join(even, odd), (TILE0, TILE1 // 64, 64)) * scale[:, :, None]
        return tl.reshape(value, (TILE0, TILE1))

    @triton.jit
    def grouped_dot_nf4(
        x,  # [N, INNER]
        index,  # int32 []: which of the stack; unread unless STACKED
        codes,  # uint8 [stack, GROUPS, D0, D1 / 2], read as words
        absmax,  # uint8 or float32 [stack, GROUPS, D0, D1 / 64]
        nested_absmax,  # float32 [stack, GROUPS, ceil(blocks / 256)]; unread unless NESTED
        offset,  # float32 [stack, GROUPS]; unread unless NESTED
        sizes,  # int32 [GROUPS]
        dynamic_map,  # float32 [256]
        out,  # [N, COLUMNS]
        N: tl.constexpr,
        D0: tl.constexpr,
        D1: tl.constexpr,
        GROUPS: tl.constexpr,
        GROUPS_PADDED: tl.constexpr,  # a power of two
        LAST: tl.constexpr,  # whether D1 is contracted, else D0
        STACKED: tl.constexpr,
        NESTED: tl.constexpr,
        TILE_ROWS: tl.constexpr,
        TILE_COLUMNS: tl.constexpr,
        TILE_INNER: tl.constexpr,
    ):
        INNER: tl.constexpr = D1 if LAST else D0
        COLUMNS: tl.constexpr = D0 if LAST else D1
        COLUMN_TILES: tl.constexpr = (COLUMNS + TILE_COLUMNS - 1) // TILE_COLUMNS
        row_tile, first_column = tl.program_id(0) // COLUMN_TILES, tl.program_id(0) % COLUMN_TILES * TILE_COLUMNS

        group, size, tiles = group_of(sizes, row_tile, GROUPS, GROUPS_PADDED, TILE_ROWS)
        if group >= GROUPS:
            return
        row, end = rows_of(row_tile, group, size, tiles, GROUPS_PADDED, TILE_ROWS)

        BLOCKS: tl.constexpr = D0 * D1 // 64
        matrix = group.to(tl.int64)
        if STACKED:
            matrix += tl.load(index).to(tl.int64) * GROUPS
        codes = codes.to(tl.pointer_type(tl.uint32)) + matrix * (D0 * D1 // 8)
        absmax += matrix * BLOCKS
        nested_absmax += matrix * ((BLOCKS + 255) // 256)
        mean = 0.0
        if NESTED:
            mean = tl.load(offset + matrix)
        inner = tl.arange(0, TILE_INNER)
        left = x + row[:, None].to(tl.int64) * INNER + inner[None, :]
        sums = tl.zeros((TILE_ROWS, TILE_COLUMNS), tl.float32)
        for start in range(0, INNER, TILE_INNER):
            # Rows of other groups are read where a tile ends early and are not stored; only the array has an end.
            a = tl.load(left + start, mask=(row[:, None] < N) & (start + inner[None, :] < INNER), other=0.0)
            if LAST:
                w = weights_of(
                    first_column, start, codes, absmax, nested_absmax, mean, dynamic_map,
                    D0, D1, TILE_COLUMNS, TILE_INNER, NESTED,
                )  # fmt: skip
                b = tl.trans(w.to(a.dtype))
            else:
                w = weights_of(
                    start, first_column, codes, absmax, nested_absmax, mean, dynamic_map,
                    D0, D1, TILE_INNER, TILE_COLUMNS, NESTED,
                )  # fmt: skip
                b = w.to(a.dtype)
            sums = tl.dot(a, b, acc=sums)
        column = first_column + tl.arange(0, TILE_COLUMNS)
        places = out + row[:, None].to(tl.int64) * COLUMNS + column[None, :]
        tl.store(places, sums.to(out.dtype.element_ty), mask=(row[:, None] < end) & (column[None, :] < COLUMNS))

    return grouped_dot_nf4


def grouped_dot_nf4(
    x: jax.Array,
    fields: NF4Fields,
    sizes: jax.Array,
    contracted: int,
    *,
    shape: tuple[int, int],
    config: Config | None = None,
) -> jax.Array:
    """`reference.grouped_dot_nf4` as a Triton kernel: the same arguments and, but for the order of sums, the results.

    It may be vmapped (which loops) and is not differentiable.

    Raises:
      NotImplementedError: jax-triton is not installed, x is neither bfloat16 nor float16, blocks cross the rows of a
        matrix, or a matrix has 2^31 elements or more.
    """
    if x.dtype not in (jnp.bfloat16, jnp.float16):
        raise NotImplementedError(f"the kernel multiplies bfloat16 or float16, not {x.dtype.name}")
    d0, d1 = shape
    if d1 % reference.NF4_BLOCK:
        raise NotImplementedError(f"the kernel takes rows of whole blocks of {reference.NF4_BLOCK}, and they have {d1}")
    if d0 * d1 >= 1 << 31:
        raise NotImplementedError(f"the kernel counts a matrix's elements in 32 bits, and there are {d0 * d1}")
    try:
        import jax_triton
    except ImportError as error:
        raise NotImplementedError(f"the kernel needs jax-triton and triton ({error})") from error
    config = Config() if config is None else config
    rows, groups, is_last = x.shape[0], sizes.shape[0], contracted == 2
    columns = d0 if is_last else d1
    # As many tiles as there can be: each group with rows has one that is not full.
    row_tiles = min(rows, groups) + rows // ROWS
    nested = fields.nested_absmax is not None

    @jax.custom_batching.sequential_vmap
    def run(x, index, codes, absmax, nested_absmax, offset, sizes):
        return jax_triton.triton_call(
            x,
            index,
            codes,
            absmax,
            nested_absmax,
            offset,
            sizes.astype(jnp.int32),
            jnp.asarray(reference.DYNAMIC_MAP),
            kernel=_kernel(),
            out_shape=jax.ShapeDtypeStruct((rows, columns), x.dtype),
            grid=(row_tiles * -(-columns // config.columns),),
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            enable_fp_fusion=False,  # scales are rounded as `reference.dequantize_nf4` rounds them
            N=rows,
            D0=d0,
            D1=d1,
            GROUPS=groups,
            GROUPS_PADDED=1 << (groups - 1).bit_length(),
            LAST=is_last,
            STACKED=fields.index is not None,
            NESTED=nested,
            TILE_ROWS=ROWS,
            TILE_COLUMNS=config.columns,
            TILE_INNER=config.inner,
        )

    index = jnp.int32(0) if fields.index is None else fields.index
    unread = jnp.zeros((1,), jnp.float32)
    statistics = (fields.nested_absmax, fields.offset) if nested else (unread, unread)
    return run(x, index, fields.codes, fields.absmax, *statistics, sizes)
