"""Grouped products as Triton kernels: what a row costs is its own group's matrix, however many groups there are.

The maths is `reference.grouped_dot` and `reference.grouped_outer`: rows sorted by group, sizes [g] rows each,

    dot     out[i] = x[i] W_g       for every row i of group g
    outer   out[g] = sum of x[i] y[i]^T over the rows i of group g

Why not leave it to XLA: on a GPU `ragged_dot` multiplies every row with every group's matrix and drops what is not
asked for. On an H100, 16384 rows over Mixtral's 8 experts took 7.9 times the time of one matrix for all.

The layout of dot. Row tiles do not cross groups, so a group of s rows has ceil(s / TILE_ROWS) of them. How many there
are in all is known on the device only; there are never more than ceil(n / TILE_ROWS) + g, which is the grid, and the
programs that are too many return. Each finds its tile by a cumulative sum over the sizes, which are few enough for the
registers. Programs go down a column of `BAND` row tiles before the next columns, so those that run together share both
operands in L2.

The layout of outer. A program makes one tile of one group's matrix and walks over that group's rows. No two programs
write to one place, so the sums have one order and a step gives the same bits each time.

Only 16-bit operands: with float32 the tensor cores would round, or not be used at all.
"""

import functools
from dataclasses import dataclass
from typing import Any, no_type_check

import jax
import jax.numpy as jnp


@dataclass(frozen=True, kw_only=True)
class Config:
    """The tile of one program, powers of two from 16 on; `inner` is what one step contracts. None changes a result but
    in the order of its sums. `num_stages` tiles of both operands lie in shared memory: 144 KiB by default."""

    rows: int = 128
    columns: int = 256
    inner: int = 64
    num_warps: int = 8
    num_stages: int = 3


BAND = 8
ROOMY = ("8.0", "9.0", "10.0", "10.3")  # compute capabilities with more than 144 KiB of shared memory a program


def heuristics() -> Config:
    """For the default device. On an H100, Mixtral's 16384 rows of 4096 times [14336, 4096] took 2.9 ms
    with tiles of 128 x 256, 3.6 ms with 128 x 128, and a dense product 2.4 ms."""
    capability = getattr(jax.devices()[0], "compute_capability", None)
    return Config() if capability in ROOMY else Config(columns=128)


@functools.cache
@no_type_check  # a type checker's wrapper around the function would hide its source from Triton
def tile_kernels():
    """Two Triton functions, between which a program without a tile returns. Built on first use, since the library
    imports where Triton is not installed."""
    import triton
    import triton.language as tl

    @triton.jit
    def group_of(sizes, tile, GROUPS: tl.constexpr, GROUPS_PADDED: tl.constexpr, TILE_ROWS: tl.constexpr):
        """The group that a tile of rows is of, GROUPS if there is no such tile; and rows and tiles of every group."""
        every = tl.arange(0, GROUPS_PADDED)
        size = tl.load(sizes + every, mask=every < GROUPS, other=0)
        tiles = (size + TILE_ROWS - 1) // TILE_ROWS
        return tl.sum((tl.cumsum(tiles, 0) <= tile).to(tl.int32), 0), size, tiles

    @triton.jit
    def rows_of(tile, group, size, tiles, GROUPS_PADDED: tl.constexpr, TILE_ROWS: tl.constexpr):
        """The rows of a tile, and where its group's end."""
        every = tl.arange(0, GROUPS_PADDED)
        before = every < group
        begin = tl.sum(tl.where(before, size, 0), 0)
        end = begin + tl.sum(tl.where(every == group, size, 0), 0)
        row = begin + (tile - tl.sum(tl.where(before, tiles, 0), 0)) * TILE_ROWS + tl.arange(0, TILE_ROWS)
        return row, end

    return group_of, rows_of


@functools.cache
@no_type_check  # a type checker's wrapper around the function would hide its source from Triton
def _kernels():
    """The Triton functions."""
    import triton
    import triton.language as tl

    group_of, rows_of = tile_kernels()

    @triton.jit
    def grouped_dot(
        x,  # [ROWS, INNER]
        w,  # [GROUPS, COLUMNS, INNER] where LAST, else [GROUPS, INNER, COLUMNS]
        sizes,  # int32 [GROUPS]
        out,  # [ROWS, COLUMNS]
        ROWS: tl.constexpr,
        INNER: tl.constexpr,
        COLUMNS: tl.constexpr,
        GROUPS: tl.constexpr,
        GROUPS_PADDED: tl.constexpr,  # a power of two
        LAST: tl.constexpr,
        BAND: tl.constexpr,
        TILE_ROWS: tl.constexpr,
        TILE_COLUMNS: tl.constexpr,
        TILE_INNER: tl.constexpr,
    ):
        ROW_TILES: tl.constexpr = (ROWS + TILE_ROWS - 1) // TILE_ROWS + GROUPS
        COLUMN_TILES: tl.constexpr = (COLUMNS + TILE_COLUMNS - 1) // TILE_COLUMNS
        first = tl.program_id(0) // (BAND * COLUMN_TILES) * BAND
        height = min(ROW_TILES - first, BAND)
        within = tl.program_id(0) % (BAND * COLUMN_TILES)
        row_tile = first + within % height
        column_tile = within // height

        group, size, tiles = group_of(sizes, row_tile, GROUPS, GROUPS_PADDED, TILE_ROWS)
        if group >= GROUPS:
            return
        row, end = rows_of(row_tile, group, size, tiles, GROUPS_PADDED, TILE_ROWS)
        column = column_tile * TILE_COLUMNS + tl.arange(0, TILE_COLUMNS)
        inner = tl.arange(0, TILE_INNER)

        w += group.to(tl.int64) * (INNER * COLUMNS)
        left = x + row[:, None].to(tl.int64) * INNER + inner[None, :]
        if LAST:
            right = w + column[None, :] * INNER + inner[:, None]
        else:
            right = w + inner[:, None] * COLUMNS + column[None, :]
        sums = tl.zeros((TILE_ROWS, TILE_COLUMNS), tl.float32)
        for start in range(0, INNER, TILE_INNER):
            # Rows of other groups are read where a tile ends early and are not stored; only the array has an end.
            inside_left = row[:, None] < ROWS
            inside_right = column[None, :] < COLUMNS
            if INNER % TILE_INNER:
                inside_left = inside_left & (start + inner[None, :] < INNER)
                inside_right = inside_right & (start + inner[:, None] < INNER)
            sums = tl.dot(
                tl.load(left, mask=inside_left, other=0.0), tl.load(right, mask=inside_right, other=0.0), acc=sums
            )
            left += TILE_INNER
            right += TILE_INNER if LAST else TILE_INNER * COLUMNS
        places = out + row[:, None].to(tl.int64) * COLUMNS + column[None, :]
        tl.store(places, sums.to(out.dtype.element_ty), mask=(row[:, None] < end) & (column[None, :] < COLUMNS))

    @triton.jit
    def grouped_outer(
        x,  # [rows, LEFT]
        y,  # [rows, RIGHT]
        sizes,  # int32 [GROUPS]
        out,  # [GROUPS, LEFT, RIGHT]
        LEFT: tl.constexpr,
        RIGHT: tl.constexpr,
        GROUPS: tl.constexpr,
        GROUPS_PADDED: tl.constexpr,  # a power of two
        TILE_LEFT: tl.constexpr,
        TILE_RIGHT: tl.constexpr,
        TILE_ROWS: tl.constexpr,
    ):
        LEFT_TILES: tl.constexpr = (LEFT + TILE_LEFT - 1) // TILE_LEFT
        RIGHT_TILES: tl.constexpr = (RIGHT + TILE_RIGHT - 1) // TILE_RIGHT
        group = tl.program_id(0) // (LEFT_TILES * RIGHT_TILES)
        tile = tl.program_id(0) % (LEFT_TILES * RIGHT_TILES)
        left = (tile % LEFT_TILES) * TILE_LEFT + tl.arange(0, TILE_LEFT)
        right = (tile // LEFT_TILES) * TILE_RIGHT + tl.arange(0, TILE_RIGHT)

        every = tl.arange(0, GROUPS_PADDED)
        size = tl.load(sizes + every, mask=every < GROUPS, other=0)
        begin = tl.sum(tl.where(every < group, size, 0), 0)
        end = begin + tl.sum(tl.where(every == group, size, 0), 0)
        sums = tl.zeros((TILE_LEFT, TILE_RIGHT), tl.float32)
        for start in range(begin, end, TILE_ROWS):
            row = start + tl.arange(0, TILE_ROWS)
            inside = row < end
            row = row.to(tl.int64)
            a = tl.load(
                x + row[None, :] * LEFT + left[:, None], mask=inside[None, :] & (left[:, None] < LEFT), other=0.0
            )
            b = tl.load(
                y + row[:, None] * RIGHT + right[None, :], mask=inside[:, None] & (right[None, :] < RIGHT), other=0.0
            )
            sums = tl.dot(a, b, acc=sums)
        places = out + group.to(tl.int64) * (LEFT * RIGHT) + left[:, None] * RIGHT + right[None, :]
        tl.store(places, sums.to(out.dtype.element_ty), mask=(left[:, None] < LEFT) & (right[None, :] < RIGHT))

    return grouped_dot, grouped_outer


def grouped_dot(
    x: jax.Array, w: jax.Array, sizes: jax.Array, contracted: int, dtype: Any = None, *, config: Config | None = None
) -> jax.Array:
    """`reference.grouped_dot` as a Triton kernel: the same arguments and, but for the order of sums, the same result.

    It may be vmapped (which loops) and is not differentiable.

    Raises:
      NotImplementedError: jax-triton is not installed, x and w are not both bfloat16 or both float16, or a matrix of w
        has 2^31 elements or more.
    """
    (rows, inner), groups = x.shape, w.shape[0]
    columns = w.shape[3 - contracted]
    _check(x, w)
    if inner * columns >= 1 << 31:
        raise NotImplementedError(f"the kernel counts a matrix's elements in 32 bits, and there are {inner * columns}")
    config = heuristics() if config is None else config
    tile_columns, tile_inner = _fitting(config.columns, columns), _fitting(config.inner, inner)
    row_tiles = -(-rows // config.rows) + groups
    return _call(
        0,
        (x, w, sizes),
        jax.ShapeDtypeStruct((rows, columns), x.dtype if dtype is None else dtype),
        row_tiles * -(-columns // tile_columns),
        config,
        ROWS=rows,
        INNER=inner,
        COLUMNS=columns,
        LAST=contracted == 2,
        BAND=BAND,
        TILE_ROWS=config.rows,
        TILE_COLUMNS=tile_columns,
        TILE_INNER=tile_inner,
    )


def grouped_outer(
    x: jax.Array, y: jax.Array, sizes: jax.Array, dtype: Any = None, *, config: Config | None = None
) -> jax.Array:
    """`reference.grouped_outer` as a Triton kernel: the same arguments and, but for the order of sums, the same result.

    It may be vmapped (which loops) and is not differentiable.

    Raises:
      NotImplementedError: jax-triton is not installed, x and y are not both bfloat16 or both float16, or a matrix of
        the result has 2^31 elements or more.
    """
    left, right, groups = x.shape[1], y.shape[1], sizes.shape[0]
    _check(x, y)
    if left * right >= 1 << 31:
        raise NotImplementedError(f"the kernel counts a matrix's elements in 32 bits, and there are {left * right}")
    config = heuristics() if config is None else config
    tile_left, tile_right = _fitting(config.rows, left), _fitting(config.columns, right)
    return _call(
        1,
        (x, y, sizes),
        jax.ShapeDtypeStruct((groups, left, right), x.dtype if dtype is None else dtype),
        groups * -(-left // tile_left) * -(-right // tile_right),
        config,
        LEFT=left,
        RIGHT=right,
        TILE_LEFT=tile_left,
        TILE_RIGHT=tile_right,
        TILE_ROWS=config.inner,
    )


def _check(x: jax.Array, y: jax.Array) -> None:
    if x.dtype != y.dtype or x.dtype not in (jnp.bfloat16, jnp.float16):
        raise NotImplementedError(f"the kernel multiplies bfloat16 or float16, not {x.dtype.name} with {y.dtype.name}")


def _fitting(tile: int, extent: int) -> int:
    """The tile, or the smallest power of two from 16 on that holds the extent."""
    fitting = 16
    while fitting < min(tile, extent):
        fitting *= 2
    return fitting


def _call(which: int, operands: tuple, out: jax.ShapeDtypeStruct, programs: int, config: Config, **constants) -> Any:
    try:
        import jax_triton
    except ImportError as error:
        raise NotImplementedError(f"the kernel needs jax-triton and triton ({error})") from error
    groups = operands[2].shape[0]

    @jax.custom_batching.sequential_vmap
    def run(x, y, sizes):
        return jax_triton.triton_call(
            x,
            y,
            sizes.astype(jnp.int32),
            kernel=_kernels()[which],
            out_shape=out,
            grid=(programs,),
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            GROUPS=groups,
            GROUPS_PADDED=1 << (groups - 1).bit_length(),
            **constants,
        )

    return run(*operands)
