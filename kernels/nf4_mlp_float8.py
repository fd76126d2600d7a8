"""The MLP of 33 to 64 tokens with NF4 weights in float8, down(act(gate(x)) * up(x)), in one launch.

The maths and the layout are those of `nf4_matmul_float8`. Between two launches the memory is idle: the last program of
one ends, the first of the next begins, asks for its layer, then for scales and codes, and multiplies when the first of
these have come. Here a program that has stored its tile of the gated product asks for the first two steps of its tile
of the second, which wait for nothing, and only then waits until all tiles of the first are stored (`grid_kernels`): by
a count in memory, which who made x has set to 0 (`Ordered.count`).

All programs must be on the device at once, one to an SM. So there is none for an MLP of more tiles than SMs.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, no_type_check

import jax
import jax.numpy as jnp

from jaxlora.kernels import nf4_lookup, nf4_matmul, nf4_matmul_float8, nf4_matmul_wgmma, reference
from jaxlora.kernels.graph_call import triton_call
from jaxlora.kernels.nf4_matmul_float8_kernel import product_kernels, step_bytes
from jaxlora.kernels.nf4_stream import BARRIERS, MAP, MOST_TOKENS, ROWS_OF_WARP, STEP, grid_kernels
from jaxlora.kernels.ordered import FLOAT8, Ordered, shape_of
from jaxlora.kernels.parts import Parts
from jaxlora.kernels.reference import NF4Fields

NUM_WARPS = 16
ROWS = ROWS_OF_WARP * NUM_WARPS  # of a tile


@functools.cache
@no_type_check  # a type checker's wrapper around the function would hide its source from Triton
def kernel(tokens: int):
    """The Triton function. Built on first use, since the library imports where Triton is not installed."""
    import triton
    import triton.language as tl

    products = product_kernels(tokens, NUM_WARPS)
    table_at, ring_at, asked_layer, begin, asked_tables, put_tables, x_numbers, asked, multiplied, stored = products
    arrive, wait = grid_kernels()
    BARRIERS_AT, BLOCKS_OF_STEP = tl.constexpr(MAP), tl.constexpr(STEP)
    STEP_BYTES = tl.constexpr(step_bytes(tokens))
    OTHER_BARRIERS_AT = tl.constexpr(MAP + BARRIERS)
    WARPS = tl.constexpr(NUM_WARPS)
    THREADS = tl.constexpr(32 * NUM_WARPS)
    synced_assembly = tl.constexpr("bar.sync 0; mov.b32 $0, $1;")

    @triton.jit
    def mlp_nf4_float8(
        x,  # the data of `Ordered`
        x_scales,  # float32 [M]
        nf4,  # uint32 [4], `nf4_lookup.float8_words`
        dynamic_map,  # float32 [256]
        codes0,  # of the gate: uint8 [stack, INNER, COLUMNS / 2]
        absmax0,  # uint8 [stack, INNER, COLUMNS / 64]
        nested_absmax0,  # float32 [stack, ceil(blocks / 256)]
        mean0,  # float32 [stack]
        index0,  # int32 []: which of the stack; unread unless STACKED
        codes1,  # of up
        absmax1,
        nested_absmax1,
        mean1,
        index1,
        codes2,  # of down: [stack, ROWS_OUT, INNER / 2], and so on
        absmax2,
        nested_absmax2,
        mean2,
        index2,
        count,  # uint32 [1]: 0
        inner,  # the data of `Ordered` [M, INNER]
        inner_scales,  # float32, a number of each tile
        out,  # [M, ROWS_OUT] in the results' dtype, or bfloat16 [SPLIT, M, ROWS_OUT]
        new_count,  # where count is
        M: tl.constexpr,
        COLUMNS: tl.constexpr,
        INNER: tl.constexpr,  # whole steps
        ROWS_OUT: tl.constexpr,
        STACKED: tl.constexpr,
        SPLIT: tl.constexpr,  # of down
        ACT: tl.constexpr,
    ):
        ROWS: tl.constexpr = 16 * WARPS
        TILES: tl.constexpr = (2 * INNER + ROWS - 1) // ROWS
        BLOCKS: tl.constexpr = COLUMNS // 64
        STEPS: tl.constexpr = BLOCKS // BLOCKS_OF_STEP
        WHOLE: tl.constexpr = TILES * ROWS == 2 * INNER
        TILES_OUT: tl.constexpr = (ROWS_OUT + ROWS - 1) // ROWS
        BLOCKS_OUT: tl.constexpr = INNER // 64
        STEPS_OUT: tl.constexpr = BLOCKS_OUT // BLOCKS_OF_STEP
        WHOLE_OUT: tl.constexpr = TILES_OUT * ROWS == ROWS_OUT
        GROUP_OUT: tl.constexpr = ROWS // 2 // 64  # blocks of a tile of the gated

        thread = tl.arange(0, THREADS)
        lane = thread % 32
        layers = asked_layer(index0, STACKED), asked_layer(index1, STACKED), asked_layer(index2, STACKED)
        table_of_nf4, map_values, of_token = asked_tables(nf4, dynamic_map, x_scales, thread, THREADS, M, 0)
        program = tl.program_id(0)
        table, ring = table_at(thread), ring_at(thread)
        if program < TILES:
            weights = (
                (codes0, absmax0, nested_absmax0, mean0, layers[0], inner, INNER, 0),
                (codes1, absmax1, nested_absmax1, mean1, layers[1], inner, INNER, TILES),
            )
            barriers = table + BARRIERS_AT
            whole_x = x.to(tl.pointer_type(tl.uint32))
            start, end = program * 0, program * 0 + STEPS
            begin(whole_x, barriers, ring, thread)
            ones = x_numbers(x_scales, start, end, lane, lane % 4, BLOCKS, STEPS, 0)
            rows, above, below, codes = asked(
                weights, program, start, end, ring, thread, 2, BLOCKS, STACKED, WARPS, True, True, WHOLE
            )
            put_tables(table, map_values, of_token, thread, THREADS, 0)
            totals, above_last, below_last = multiplied(
                whole_x, x_scales, ones, above, below, codes, table_of_nf4, start, end, barriers, table, ring, thread,
                BLOCKS, STEPS, 0, True, True, WHOLE,
            )  # fmt: skip
            stored(
                totals, above_last, below_last, rows, rows[3], inner_scales, program, table, thread,
                M, WARPS, 0, ACT, True, True,
            )  # fmt: skip
            arrive(count, thread)
        else:
            put_tables(table, map_values, of_token, thread, THREADS, 0)

        if program < TILES_OUT * SPLIT:
            part, tile = program // TILES_OUT, program % TILES_OUT
            weights_out = ((codes2, absmax2, nested_absmax2, mean2, layers[2], out, ROWS_OUT, 0),)
            start, end = part * STEPS_OUT // SPLIT, (part + 1) * STEPS_OUT // SPLIT
            rows, above, below, codes = asked(
                weights_out, tile, start, end, ring, thread, 1, BLOCKS_OUT, STACKED, WARPS, False, False, WHOLE_OUT
            )
            barriers = table + OTHER_BARRIERS_AT
            part_of_x = inner.to(tl.pointer_type(tl.uint32)) + start * (STEP_BYTES // 4)
            wait(count, TILES, thread)
            begin(part_of_x, barriers, ring, thread)
            tl.inline_asm_elementwise(synced_assembly, "=r,r", [thread], dtype=tl.int32, is_pure=False, pack=1)
            numbers = x_numbers(
                inner_scales, start, end, lane, lane % 4, BLOCKS_OUT, (STEPS_OUT + SPLIT - 1) // SPLIT, GROUP_OUT
            )
            totals, above_last, below_last = multiplied(
                part_of_x, inner_scales, numbers, above, below, codes, table_of_nf4, start, end, barriers, table, ring,
                thread, BLOCKS_OUT, STEPS_OUT // SPLIT, GROUP_OUT, False, False, WHOLE_OUT,
            )  # fmt: skip
            stored(
                totals, above_last, below_last, rows, rows[3] + part * M * ROWS_OUT, inner_scales, tile, table, thread,
                M, WARPS, GROUP_OUT, "", False, ROWS_OUT % 2 == 0,
            )  # fmt: skip

    return mlp_nf4_float8


def mlp_nf4(
    x: jax.Array | Ordered,
    weights: Sequence[NF4Fields],
    *,
    shapes: Sequence[tuple[int, int]],
    act: str,
    sms: int,
    parts: bool = False,
    split: int | None = None,
) -> Any:
    """`reference.mlp_nf4` as a Triton kernel.

    Args:
      x: [M, in], `Ordered` in float8, with a number a token and a count.
      weights: gate, up, down.
      shapes: theirs.
      sms: how many SMs the device has.
      parts: return the bfloat16 sums of each part of k of down, [split, M, out], for what follows to add up.

    Raises:
      NotImplementedError: x is not that, or there are 32 tokens or less, more than `MOST_TOKENS`, or more tiles than
        SMs; or weights are not quantised twice, or their rows no whole steps of 256.
    """
    if not isinstance(x, Ordered) or not x.is_float8 or x.of_tokens is None or x.count is None:
        raise NotImplementedError("the kernel multiplies float8 that a norm has put in order, with a count")
    (inner, columns), other, (rows, down_columns) = shapes
    tokens = x.shape[0]
    if other != (inner, columns) or down_columns != inner:
        raise NotImplementedError(f"the kernel takes a gate and up of one shape and down of their rows, not {shapes}")
    nf4_matmul_wgmma.check(x, weights[:2], shapes[:2], None, act, None)
    nf4_matmul.check(jax.ShapeDtypeStruct((tokens, inner), x.dtype), weights[2:], shapes[2:], MOST_TOKENS)
    if not (nf4_matmul_float8.takes(weights, columns) and nf4_matmul_float8.takes(weights, inner)):
        raise NotImplementedError("the kernel multiplies by whole steps of 256 elements that are quantised twice")
    if tokens <= nf4_matmul_wgmma.MOST_TOKENS_OF_TWO_PROGRAMS:
        raise NotImplementedError(f"{tokens} tokens take two launches")
    split = nf4_matmul_wgmma.heuristics(tokens, [rows], inner).split if split is None else split
    tiles, tiles_out = -(-2 * inner // ROWS), -(-rows // ROWS)
    programs = max(tiles, tiles_out * split)
    if programs > sms:
        raise NotImplementedError(f"the kernel has {programs} programs, which {sms} SMs do not hold at once")

    is_divided = split > 1
    leading, dtype = ((split,), jnp.bfloat16) if is_divided else ((), x.dtype)
    call = functools.partial(
        triton_call,
        kernel=kernel(tokens),
        out_shape=[
            jax.ShapeDtypeStruct(shape_of(tokens, inner, True), FLOAT8),
            jax.ShapeDtypeStruct((tiles,), jnp.float32),
            jax.ShapeDtypeStruct((*leading, tokens, rows), dtype),
            jax.ShapeDtypeStruct((1,), jnp.uint32),
        ],
        input_output_aliases={19: 3},
        grid=(programs,),
        num_warps=NUM_WARPS,
        M=tokens,
        COLUMNS=columns,
        INNER=inner,
        ROWS_OUT=rows,
        STACKED=weights[0].index is not None,
        SPLIT=split,
        ACT=act,
    )

    @jax.custom_batching.sequential_vmap
    def run(x, weights):
        tables = jnp.asarray(nf4_lookup.float8_words()), jnp.asarray(reference.DYNAMIC_MAP)
        _, _, y, _ = call(x.data, x.of_tokens, *tables, *(field for fields in weights for field in fields), x.count)
        return y

    y = run(x, [nf4_matmul.filled(*fields) for fields in weights])
    return Parts(y, x.dtype).sum() if is_divided and not parts else y
