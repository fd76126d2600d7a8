"""A norm of 33 to 64 tokens and the products with NF4 weights in float8 that read it, in one launch: of an attention
its queries, keys and values, and of an MLP down(act(gate(x)) * up(x)).

The maths is that of `residual_norm`, of a residual stream to which the parts of the product before are added, and of
`nf4_matmul_float8`. As launches of their own these would each begin with an idle memory: the last program of one ends,
the first of the next begins, asks for its layer, then for scales and codes, and multiplies when the first have come.
Here a program norms a token, if there is one for it, asks for the first two steps of its tile, and only then waits until
all tokens are normed. (To ask first took longer: what the norm reads came behind all that.) When it has stored its tile of an MLP's gated product it asks for the first two steps of
its tile of down, and only then waits for the other tiles (`grid_kernels`). It waits by counts in memory, which who made
the parts has set to 0 (`Parts.counts`).

All programs must be on the device at once, one to an SM. So there is none for more tiles than SMs.

The norm. A token is the work of one program, whose thread has 8 elements at a time, those that lie together in float8's
order (`ordered`): 4 and the 4 that are 16 further. Sums over threads go by shuffles and the table's memory, since what
Triton would take for them is where codes are on their way to.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, no_type_check

import jax
import jax.numpy as jnp
import numpy as np

from jaxlora.kernels import nf4_lookup, nf4_matmul, nf4_matmul_float8, nf4_matmul_wgmma, reference
from jaxlora.kernels.graph_call import triton_call
from jaxlora.kernels.nf4_matmul_float8_kernel import MAXIMA_AT, OF_TOKENS_AT, product_kernels, step_bytes
from jaxlora.kernels.nf4_stream import BARRIERS, MAP, ROWS_OF_WARP, STEP, grid_kernels
from jaxlora.kernels.ordered import FLOAT8, padded, shape_of
from jaxlora.kernels.parts import COUNTS, Parts
from jaxlora.kernels.reference import InputNorm, NF4Fields

NUM_WARPS = 16
ROWS = ROWS_OF_WARP * NUM_WARPS  # of a tile


@functools.cache
@no_type_check  # a type checker's wrapper around a function would hide its source from Triton
def norm_kernel():
    """The Triton function of a program's norm. Built on first use, since the library imports where Triton is not
    installed."""
    import triton
    import triton.language as tl

    WARPS = tl.constexpr(NUM_WARPS)
    THREADS = tl.constexpr(32 * NUM_WARPS)
    SUMS = tl.constexpr(OF_TOKENS_AT)  # a number of each warp; what tokens' scales are put into later
    MAXIMA = tl.constexpr(MAXIMA_AT)
    shuffled = "".join(
        f"shfl.sync.bfly.b32 other, $0, {by}, 0x1f, 0xffffffff; add.f32 $0, $0, other;\n" for by in (16, 8, 4, 2, 1)
    )
    # A sum over lanes; then over warps, of which every second half of lanes has the same numbers.
    sum_assembly = tl.constexpr(f"{{ .reg .f32 other; mov.f32 $0, $1;\n{shuffled} }}")
    put_assembly = tl.constexpr("st.shared.b32 [$1], $2; bar.sync 0; mov.b32 $0, $1;")
    get_assembly = tl.constexpr("ld.shared.b32 $0, [$1];")
    largest_assembly = tl.constexpr("redux.sync.max.u32 $0, $1, 0xffffffff;")
    float8_assembly = tl.constexpr(  # of two codes in a byte, as of two elements here, the second is the lower one
        "{ .reg .b16 lower, upper; cvt.rn.satfinite.e4m3x2.f32 lower, $1, $2;"
        " cvt.rn.satfinite.e4m3x2.f32 upper, $3, $4; mov.b32 $0, {lower, upper}; }"
    )

    @triton.jit
    def of_bits(bits, I: tl.constexpr):
        """Number I of four bfloat16."""
        return ((bits >> (16 * I)).to(tl.uint32) << 16).to(tl.float32, bitcast=True)

    @triton.jit
    def four(pointer, inside):
        """Four numbers that lie together, float32, of bfloat16 or float32."""
        wide = pointer.to(tl.pointer_type(tl.uint64))
        first = tl.load(wide, mask=inside, other=0)
        if pointer.dtype.element_ty == tl.float32:
            second = tl.load(wide + 1, mask=inside, other=0)
            return (
                first.to(tl.uint32).to(tl.float32, bitcast=True),
                (first >> 32).to(tl.uint32).to(tl.float32, bitcast=True),
                second.to(tl.uint32).to(tl.float32, bitcast=True),
                (second >> 32).to(tl.uint32).to(tl.float32, bitcast=True),
            )
        else:
            return of_bits(first, 0), of_bits(first, 1), of_bits(first, 2), of_bits(first, 3)

    @triton.jit
    def bits_of(value):
        """A number in bfloat16, as the lower bits of a word of 64."""
        return value.to(tl.bfloat16).to(tl.uint16, bitcast=True).to(tl.uint64)

    @triton.jit
    def over_warps(value, at, table, thread):
        """What all warps have of a number of each."""
        tl.inline_asm_elementwise(
            put_assembly, "=r,r,r", [table + at + 4 * (thread // 32), value], tl.int32, is_pure=False, pack=1
        )
        return tl.inline_asm_elementwise(
            get_assembly, "=r,r", [table + at + 4 * (thread % WARPS)], tl.uint32, is_pure=False, pack=1
        )

    @triton.jit
    def norm(
        token, stream, parts, gain, index, total, x, x_scales, table, thread,
        M: tl.constexpr, D: tl.constexpr, EPS: tl.constexpr, OFFSET: tl.constexpr, MULTIPLIER: tl.constexpr,
        PARTS: tl.constexpr, GAIN_STACKED: tl.constexpr, PADDED: tl.constexpr,
    ):  # fmt: skip
        """Norm a token: see `residual_norm`."""
        PIECES: tl.constexpr = (D // 8 + THREADS - 1) // THREADS  # of 8 elements, of a thread
        if GAIN_STACKED:
            gain += tl.load(index).to(tl.int64) * D
        numbers, gains = (), ()
        squares = thread.to(tl.float32) * 0.0
        for i in tl.static_range(2 * PIECES):
            piece = i // 2 * THREADS + thread
            inside = piece < D // 8
            column = piece // 8 * 64 + piece % 2 * 32 + i % 2 * 16 + piece % 8 // 2 * 4
            here = token * D + column
            gains = gains + four(gain + column, inside)
            narrow = four(stream + here, inside)
            added = four(parts + here, inside)
            for j in tl.static_range(1, PARTS):
                more = four(parts + (j * (M * D) + here), inside)
                added = added[0] + more[0], added[1] + more[1], added[2] + more[2], added[3] + more[3]
            word, each = thread.to(tl.uint64) * 0, ()
            for j in tl.static_range(4):
                part = added[j].to(tl.bfloat16).to(tl.float32)
                number = (narrow[j] + part * MULTIPLIER).to(tl.bfloat16).to(tl.float32)
                squares += number * number
                word |= bits_of(number) << (16 * j)
                each = each + (number,)
            tl.store((total + here).to(tl.pointer_type(tl.uint64)), word, mask=inside)
            numbers = numbers + each
        squares = tl.inline_asm_elementwise(sum_assembly, "=&f,f", [squares], tl.float32, is_pure=False, pack=1)
        squares = over_warps(squares.to(tl.uint32, bitcast=True), SUMS, table, thread).to(tl.float32, bitcast=True)
        squares = tl.inline_asm_elementwise(sum_assembly, "=&f,f", [squares], tl.float32, is_pure=False, pack=1)
        factor = tl.rsqrt(squares / (32 // WARPS * D) + EPS)
        normed, largest = (), thread.to(tl.float32) * 0.0
        for i in tl.static_range(8 * PIECES):
            number = numbers[i] * factor
            if OFFSET == 0.0:
                number = number.to(tl.bfloat16).to(tl.float32) * gains[i]
            else:
                number = number * (gains[i] + OFFSET)
            number = number.to(tl.bfloat16).to(tl.float32)
            normed = normed + (number,)
            largest = tl.maximum(largest, tl.abs(number))
        bits = tl.inline_asm_elementwise(
            largest_assembly, "=r,r", [largest.to(tl.uint32, bitcast=True)], tl.uint32, is_pure=False, pack=1
        )
        bits = over_warps(bits, MAXIMA, table, thread)
        bits = tl.inline_asm_elementwise(largest_assembly, "=r,r", [bits], tl.uint32, is_pure=False, pack=1)
        # Times 2^(2 - e), of the largest's exponent e.
        exponent = tl.maximum(bits >> 23, 3)
        times, over = (256 - exponent) << 23, (exponent - 2) << 23
        times = times.to(tl.float32, bitcast=True)
        tl.store(x_scales + (token + thread * 0), over.to(tl.float32, bitcast=True), mask=thread == 0)
        for i in tl.static_range(PIECES):
            piece = i * THREADS + thread
            word = thread.to(tl.uint64) * 0
            for j in tl.static_range(2):
                four_of = ()
                for k in tl.static_range(4):
                    four_of = four_of + (normed[8 * i + 4 * j + k] * times,)
                half = tl.inline_asm_elementwise(
                    float8_assembly, "=r,f,f,f,f", four_of, tl.uint32, is_pure=True, pack=1
                )
                word |= half.to(tl.uint64) << (32 * j)
            at = (piece // 2 * PADDED + token) * 16 + piece % 2 * 8
            tl.store((x.to(tl.pointer_type(tl.uint8)) + at).to(tl.pointer_type(tl.uint64)), word, mask=piece < D // 8)

    return norm


@functools.cache
@no_type_check
def kernel(tokens: int):
    """The Triton function, built on first use."""
    import triton
    import triton.language as tl

    products = product_kernels(tokens, NUM_WARPS)
    table_at, ring_at, asked_layer, begin, begin_with, asked_tables, put_tables, *rest = products
    x_numbers, asked, multiplied, stored = rest
    arrive, wait = grid_kernels()
    norm = norm_kernel()
    BARRIERS_AT, BLOCKS_OF_STEP = tl.constexpr(MAP), tl.constexpr(STEP)
    STEP_BYTES = tl.constexpr(step_bytes(tokens))
    OTHER_BARRIERS_AT = tl.constexpr(MAP + BARRIERS)
    OF_TOKENS = tl.constexpr(OF_TOKENS_AT)
    WARPS = tl.constexpr(NUM_WARPS)
    THREADS = tl.constexpr(32 * NUM_WARPS)
    OF_TOKENS_BYTES = tl.constexpr(-(-tokens // 4) * 16)
    synced_assembly = tl.constexpr("bar.sync 0; mov.b32 $0, $1;")

    @triton.jit
    def normed_nf4_float8(
        stream,  # bfloat16 [M, COLUMNS]
        parts,  # float32 or bfloat16 [PARTS, M, COLUMNS]
        gain,  # bfloat16 [COLUMNS], or [layers, COLUMNS]
        gain_index,  # int32 []; unread without GAIN_STACKED
        nf4,  # uint32 [4], `nf4_lookup.float8_words`
        dynamic_map,  # float32 [256]
        codes0,  # of the first weight, or the gate: uint8 [stack, rows, columns / 2]
        absmax0,  # uint8 [stack, rows, columns / 64]
        nested_absmax0,  # float32 [stack, ceil(blocks / 256)]
        mean0,  # float32 [stack]
        index0,  # int32 []: which of the stack; unread unless STACKED
        codes1,  # of the second, or up; unread where there are fewer
        absmax1,
        nested_absmax1,
        mean1,
        index1,
        codes2,  # of the third, or down
        absmax2,
        nested_absmax2,
        mean2,
        index2,
        counts,  # uint32 [2]: 0
        total,  # bfloat16 [M, COLUMNS]
        x,  # the data of `Ordered`, normed
        x_scales,  # float32 [M], up to a multiple of 4
        out0,  # bfloat16 [M, rows], or [SPLIT, M, rows]; of down with ACT
        out1,
        out2,
        inner,  # with ACT the data of `Ordered` [M, ROWS0]
        inner_scales,  # and float32, a number of each tile
        new_counts,  # where counts are
        next_counts,  # uint32 [2], which become 0
        M: tl.constexpr,
        COLUMNS: tl.constexpr,  # whole steps
        ROWS0: tl.constexpr,
        ROWS1: tl.constexpr,
        ROWS2: tl.constexpr,
        WEIGHTS: tl.constexpr,
        STACKED: tl.constexpr,
        SPLIT: tl.constexpr,  # of down with ACT
        ACT: tl.constexpr,  # "", or out0 is that of ACT(x W0^T) * x W1^T times W2^T
        EPS: tl.constexpr,
        OFFSET: tl.constexpr,
        MULTIPLIER: tl.constexpr,
        PARTS: tl.constexpr,
        GAIN_STACKED: tl.constexpr,
        PADDED: tl.constexpr,
    ):
        ROWS: tl.constexpr = 16 * WARPS
        GATED: tl.constexpr = ACT != ""
        BLOCKS: tl.constexpr = COLUMNS // 64
        STEPS: tl.constexpr = BLOCKS // BLOCKS_OF_STEP
        FIRST: tl.constexpr = (ROWS0 + ROWS - 1) // ROWS
        SECOND: tl.constexpr = FIRST + (ROWS1 + ROWS - 1) // ROWS
        TILES: tl.constexpr = 2 * ROWS0 // ROWS if GATED else SECOND + (ROWS2 + ROWS - 1) // ROWS
        PARTS_OF_K: tl.constexpr = 1 if GATED else SPLIT
        PROGRAMS: tl.constexpr = TILES * PARTS_OF_K  # of the products that read the norm, which norm
        WHOLE: tl.constexpr = GATED or TILES * ROWS == ROWS0 + ROWS1 + ROWS2
        EVEN: tl.constexpr = (ROWS0 | ROWS1 | ROWS2) % 2 == 0
        TILES_OUT: tl.constexpr = (ROWS2 + ROWS - 1) // ROWS
        BLOCKS_OUT: tl.constexpr = ROWS0 // 64
        STEPS_OUT: tl.constexpr = BLOCKS_OUT // BLOCKS_OF_STEP
        WHOLE_OUT: tl.constexpr = TILES_OUT * ROWS == ROWS2
        GROUP_OUT: tl.constexpr = ROWS // 2 // 64  # blocks of a tile of the gated

        thread = tl.arange(0, THREADS)
        lane = thread % 32
        first_out = inner if GATED else out0
        second_out = inner if GATED else out1
        weights = ((codes0, absmax0, nested_absmax0, mean0, asked_layer(index0, STACKED), first_out, ROWS0, 0),)
        if WEIGHTS > 1:
            layer = asked_layer(index1, STACKED)
            weights = weights + ((codes1, absmax1, nested_absmax1, mean1, layer, second_out, ROWS1, FIRST),)
        layer_out = asked_layer(index2, STACKED)
        if WEIGHTS > 2 and not GATED:
            weights = weights + ((codes2, absmax2, nested_absmax2, mean2, layer_out, out2, ROWS2, SECOND),)
        table_of_nf4, map_values, _ = asked_tables(nf4, dynamic_map, x_scales, thread, THREADS, M, 1)
        program = tl.program_id(0)
        table, ring = table_at(thread), ring_at(thread)
        tl.store(next_counts + thread, thread * 0, mask=(thread < 2) & (program == 0))
        if program < PROGRAMS:
            part, tile = program // TILES, program % TILES
            start, end = part * STEPS // PARTS_OF_K, (part + 1) * STEPS // PARTS_OF_K
            for i in tl.static_range((M + PROGRAMS - 1) // PROGRAMS):
                if i * PROGRAMS + program < M:
                    norm(
                        i * PROGRAMS + program, stream, parts, gain, gain_index, total, x, x_scales, table, thread,
                        M, COLUMNS, EPS, OFFSET, MULTIPLIER, PARTS, GAIN_STACKED, PADDED,
                    )  # fmt: skip
            if program < M:
                arrive(counts, thread)
            rows, above, below, codes = asked(
                weights, tile, start, end, ring, thread, 2 if GATED else WEIGHTS, BLOCKS, STACKED, WARPS, GATED, GATED,
                WHOLE,
            )  # fmt: skip
            put_tables(table, map_values, 1.0, thread, THREADS, 1)
            barriers = table + BARRIERS_AT
            of_x = x.to(tl.pointer_type(tl.uint32)) + start * (STEP_BYTES // 4)
            wait(counts, tl.minimum(M, PROGRAMS), thread)
            begin_with(of_x, barriers, ring, x_scales, table + OF_TOKENS, OF_TOKENS_BYTES, thread)
            ones = x_numbers(x_scales, start, end, lane, lane % 4, BLOCKS, STEPS, 0)
            totals, above_last, below_last = multiplied(
                of_x, x_scales, ones, above, below, codes, table_of_nf4, start, end, barriers, table, ring, thread,
                BLOCKS, STEPS // PARTS_OF_K, 0, GATED, GATED, WHOLE,
            )  # fmt: skip
            out = rows[3] + part * M * rows[2]
            stored(
                totals, above_last, below_last, rows, out, inner_scales, tile, table, thread,
                M, WARPS, 0, ACT, GATED, EVEN,
            )  # fmt: skip
            if GATED:
                arrive(counts + 1, thread)
        else:
            put_tables(table, map_values, 1.0, thread, THREADS, 1)

        if GATED:
            if program < TILES_OUT * SPLIT:
                part, tile = program // TILES_OUT, program % TILES_OUT
                weights_out = ((codes2, absmax2, nested_absmax2, mean2, layer_out, out0, ROWS2, 0),)
                start, end = part * STEPS_OUT // SPLIT, (part + 1) * STEPS_OUT // SPLIT
                rows, above, below, codes = asked(
                    weights_out, tile, start, end, ring, thread, 1, BLOCKS_OUT, STACKED, WARPS, False, False, WHOLE_OUT
                )
                barriers = table + OTHER_BARRIERS_AT
                of_x = inner.to(tl.pointer_type(tl.uint32)) + start * (STEP_BYTES // 4)
                wait(counts + 1, TILES, thread)
                begin(of_x, barriers, ring, thread)
                tl.inline_asm_elementwise(synced_assembly, "=r,r", [thread], dtype=tl.int32, is_pure=False, pack=1)
                numbers = x_numbers(
                    inner_scales, start, end, lane, lane % 4, BLOCKS_OUT, (STEPS_OUT + SPLIT - 1) // SPLIT, GROUP_OUT
                )
                totals, above_last, below_last = multiplied(
                    of_x, inner_scales, numbers, above, below, codes, table_of_nf4, start, end, barriers, table, ring,
                    thread, BLOCKS_OUT, STEPS_OUT // SPLIT, GROUP_OUT, False, False, WHOLE_OUT,
                )  # fmt: skip
                stored(
                    totals, above_last, below_last, rows, rows[3] + part * M * ROWS2, inner_scales, tile, table, thread,
                    M, WARPS, GROUP_OUT, "", False, ROWS2 % 2 == 0,
                )  # fmt: skip

    return normed_nf4_float8


def normed_nf4(
    x: jax.Array,
    y: Any,
    norm: InputNorm,
    weights: Sequence[NF4Fields],
    *,
    shapes: Sequence[tuple[int, int]],
    sms: int,
    act: str | None = None,
    multiplier: float = 1.0,
    split: int | None = None,
) -> tuple[jax.Array, list[Any]]:
    """`reference.normed_nf4` as a Triton kernel, whose results are arrays, or `Parts` of bfloat16.

    Args:
      x: bfloat16 [M, in].
      y: `Parts` of that shape, with counts.
      norm, weights, shapes, act, multiplier: as there.
      sms: how many SMs the device has.
      split: among how many programs k is divided, with `act` that of down; None for as many as there is room for.

    Raises:
      NotImplementedError: x or y is not that; there are 32 tokens or less, more than `MOST_TOKENS`, or more tiles than
        SMs; weights are not quantised twice, or their rows no whole steps of 256; or jax-triton is not installed.
    """
    if x.dtype != jnp.bfloat16 or not isinstance(y, Parts) or y.counts is None or y.dtype != x.dtype:
        raise NotImplementedError("the kernel adds parts with counts to a residual stream in bfloat16")
    tokens, columns = x.shape
    nf4_matmul.check(x, weights, shapes if act is None else shapes[:2], nf4_matmul_wgmma.MOST_TOKENS)
    if act is not None:
        (inner, _), other, (rows_out, down_columns) = shapes
        if other != shapes[0] or down_columns != inner or inner % 256:
            raise NotImplementedError(
                f"the kernel takes a gate and up of one shape and down of their rows, not {shapes}"
            )
    if tokens <= nf4_matmul_wgmma.MOST_TOKENS_OF_TWO_PROGRAMS:
        raise NotImplementedError(f"{tokens} tokens take launches of their own")
    if not nf4_matmul_float8.takes(weights, columns):
        raise NotImplementedError("the kernel multiplies by whole steps of 256 elements that are quantised twice")
    if norm.weight.dtype != x.dtype or norm.weight.ndim != (1 if norm.index is None else 2):
        raise NotImplementedError(f"the kernel takes a norm's weight [in] or a stack, of x's dtype, not {norm.weight}")
    rows = [rows for rows, _ in shapes]
    if act is None:
        split = nf4_matmul_wgmma.heuristics(tokens, rows, columns).split if split is None else split
        tiles = nf4_matmul_wgmma.tiles_of(rows, NUM_WARPS)
        programs = tiles * split
    else:
        split = nf4_matmul_wgmma.heuristics(tokens, rows[2:], rows[0]).split if split is None else split
        tiles = 2 * rows[0] // ROWS
        programs = max(tiles, -(-rows[2] // ROWS) * split)
    if programs > sms:
        raise NotImplementedError(f"the kernel has {programs} programs, which {sms} SMs do not hold at once")

    leading, outputs = () if split == 1 else (split,), rows if act is None else rows[2:]
    struct = jax.ShapeDtypeStruct
    outs = [struct((*leading, tokens, n), x.dtype) for n in outputs]
    call = functools.partial(
        triton_call,
        kernel=kernel(tokens),
        out_shape=[
            struct(x.shape, x.dtype),
            struct(shape_of(tokens, columns, True), FLOAT8),
            struct((-(-tokens // 4) * 4,), jnp.float32),
            *outs,
            *[struct((1,), x.dtype)] * (3 - len(outs)),
            struct((1,) if act is None else shape_of(tokens, rows[0], True), FLOAT8),
            struct((1 if act is None else tiles,), jnp.float32),
            struct((COUNTS,), jnp.uint32),
            struct((COUNTS,), jnp.uint32),
        ],
        input_output_aliases={21: 8},
        grid=(programs,),
        num_warps=NUM_WARPS,
        M=tokens,
        COLUMNS=columns,
        **{f"ROWS{i}": n for i, n in enumerate([*rows, *[0] * (3 - len(rows))])},
        WEIGHTS=len(rows),
        STACKED=weights[0].index is not None,
        SPLIT=split,
        ACT=act or "",
        EPS=norm.eps,
        OFFSET=norm.offset,
        MULTIPLIER=float(np.asarray(multiplier, x.dtype)),
        PARTS=y.count,
        GAIN_STACKED=norm.index is not None,
        PADDED=padded(tokens),
    )

    @jax.custom_batching.sequential_vmap
    def run(x, y, gain, index, weights):
        tables = jnp.asarray(nf4_lookup.float8_words()), jnp.asarray(reference.DYNAMIC_MAP)
        index = jnp.int32(0) if index is None else index
        fields = [field for weight in weights for field in weight]
        total, _, _, *ys, _, _, _, counts = call(x, y.parts, gain, index, *tables, *fields, y.counts)
        return total, ys[: len(outs)], counts

    some = [nf4_matmul.filled(*fields) for fields in weights]
    total, ys, counts = run(x, y, norm.weight, norm.index, [*some, *[some[0]] * (3 - len(some))])
    return total, ys if split == 1 else [Parts(y, x.dtype, counts if act is not None else None) for y in ys]
