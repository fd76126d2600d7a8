"""The Triton function of `nf4_matmul_float8`, whose head says how it is laid out, and the PTX in it."""

import functools
from typing import no_type_check

import numpy as np

from jaxlora.kernels import ahead, reference
from jaxlora.kernels.gated import activation_kernel
from jaxlora.kernels.nf4_lookup import FLOAT8_UNIT
from jaxlora.kernels.nf4_stream import (
    BARRIERS,
    EVICT_FIRST,
    MAP,
    MOST_TOKENS,
    ROWS_OF_WARP,
    STEP,
    memory_kernels,
    result_kernels,
    scale_kernels,
    weight_kernels,
    x_kernels,
)

# What shared memory has places for.
STEPS_OF_X = 3
STEPS_OF_CODES = 2
LEAST_BOUND = 2.0**-84  # what scales are divided by is no less, so that its inverse is a number


def shared_bytes(tokens: int, num_warps: int) -> tuple[int, int]:
    """The shared memory of a program besides `dynamic_map` and the barriers: that of x, and all of it."""
    of_x = STEPS_OF_X * STEP * -(-tokens // 8) * 8 * reference.NF4_BLOCK
    return of_x, of_x + STEPS_OF_CODES * num_warps * ROWS_OF_WARP * STEP * reference.NF4_BLOCK // 2


def ptx_of_lookup() -> str:
    """PTX for 32 elements of a lane, 16 of each of its rows, over their scales: the words $0..$7, from four words of
    codes, $8..$11, two a row, and the table, $12..$15 (`nf4_lookup.float8_words`)."""
    lines = [".reg .b32 right, left, even, odd, one, other;"]
    for i in range(4):
        # A nibble's lower three bits are a code over 2, its upper one whether PRMT is to take a byte of the table or to
        # fill one with that byte's sign.
        lines += [
            f"shr.u32 right, ${8 + i}, 1; shl.b32 left, ${8 + i}, 3;",
            "lop3.b32 even, right, left, 0x77777777, 0xe4;",  # left where the mask is 0
            "lop3.b32 odd, right, left, 0x77777777, 0xb1;",  # not left there
        ]
        for half in range(2):
            lines += ["shr.u32 even, even, 16; shr.u32 odd, odd, 16;"] if half else []
            lines += [
                "prmt.b32 one, $12, $13, even; prmt.b32 other, $14, $15, odd;",
                f"lop3.b32 ${2 * i + half}, one, other, 0x80808080, 0xb4;",  # one ^ other, and the sign of both
            ]
    return "\n".join(["{", *lines, "}"])


def ptx_of_products(tiles: int) -> str:
    """PTX that begins the products of a block of 64 rows of a warpgroup and `tiles` tiles of 8 tokens.

    Results: the sums of the block, two float16 a register, 2 registers a tile, of row g and of g + 8. Arguments: the 8
    words of the block; the lower word of the descriptor of its x. None of these may be touched before `ptx_of_sums`.
    """
    sums = 2 * tiles
    d = ", ".join(f"${i}" for i in range(sums))
    lines = [
        ".reg .b64 at64; .reg .pred added;",
        "bar.warp.sync 0xffffffff;",
        "wgmma.fence.sync.aligned;",
    ]
    for step in range(2):
        a = ", ".join(f"${sums + i + 2 * step}" for i in (0, 4, 1, 5))
        lines += [
            # The descriptor: see `nf4_matmul_wgmma_kernel.ptx_of_products`.
            f"mov.b64 at64, {{${sums + 8}, 8}};",
            f"add.u64 at64, at64, {2 * 8 * tiles * step};",
            f"setp.ne.b32 added, {step}, 0;",
            f"wgmma.mma_async.sync.aligned.m64n{8 * tiles}k32.f16.e4m3.e4m3 {{{d}}}, {{{a}}}, at64, added, 1, 1;",
        ]
    return "\n".join(["{", *lines, "wgmma.commit_group.sync.aligned;", "bar.warp.sync 0xffffffff;", "}"])


def ptx_of_sums(tiles: int) -> str:
    """PTX that adds a block's sums, when they are there, times its scales to the totals, two float16 a register.

    Results, in the registers of the first arguments: the totals. Arguments: the totals so far; the sums; the scales of
    row g and of g + 8, each a number twice.
    """
    count = 2 * tiles
    lines = ["wgmma.wait_group.sync.aligned 0;"]
    lines += [f"fma.rn.f16x2 ${i}, ${2 * count + i}, ${3 * count + i % 2}, ${i};" for i in range(count)]
    return "\n".join(["{", *lines, "}"])


@functools.cache
@no_type_check  # a type checker's wrapper around the function would hide its source from Triton
def kernel(dtype: np.dtype, tokens: int, num_warps: int):
    """The Triton function; dtype: of results. Built on first use, since the library imports where Triton is not
    installed."""
    import triton
    import triton.language as tl

    activation, fetch = activation_kernel(), ahead.kernel()
    tiles = -(-tokens // 8)
    lookup_assembly = tl.constexpr(ptx_of_lookup())
    lookup_operands = tl.constexpr(",".join(["=&r"] * 8 + ["r"] * 8))
    products_assembly, sums_assembly = tl.constexpr(ptx_of_products(tiles)), tl.constexpr(ptx_of_sums(tiles))
    products_operands = tl.constexpr(",".join(["=&r"] * (2 * tiles) + ["r"] * 9))
    same_totals = ["=r"] * (2 * tiles) + [str(i) for i in range(2 * tiles)]
    sums_operands = tl.constexpr(",".join([*same_totals, *["r"] * (2 * tiles + 2)]))
    totals_dtypes = tl.constexpr((tl.uint32,) * (2 * tiles))
    BARRIERS_AT = tl.constexpr(MAP)
    MAXIMA_AT = tl.constexpr(MAP + BARRIERS // 2)  # a number of each warp
    OF_TOKENS_AT = tl.constexpr(MAP + BARRIERS)  # what x of each token is times
    BLOCKS_OF_STEP = tl.constexpr(STEP)
    PLACES = tl.constexpr(STEPS_OF_X)
    step_bytes = STEP * tiles * 512  # of x
    STEP_BYTES = tl.constexpr(step_bytes)
    ACROSS = tl.constexpr(8 * tiles << 16)  # of a descriptor: from 16 elements of k to the next 16
    of_x, of_all = shared_bytes(tokens, num_warps)
    CODES_AT = tl.constexpr(of_x)  # in the ring
    table_at, ring_at, whole = memory_kernels(MAP + BARRIERS + 4 * MOST_TOKENS, of_all)
    asked_layer, in_stack, halves_at, next_line = weight_kernels()
    begin, copy, arrived, done = x_kernels(STEPS_OF_X, step_bytes, num_warps)
    put_map, asked_nested, asked_mean, asked_statistics, mapped, from_lane = scale_kernels(0)
    joined, turned = result_kernels()
    # Rows q and q + 4 of those of a half, of one weight and of the other or of even and odd rows.
    ask_whole_assembly, ask_assembly = (
        tl.constexpr(
            "{ .reg .pred p<4>; .reg .b64 policy;\n"
            "bar.warp.sync 0xffffffff;\n"
            f"mov.b64 policy, {EVICT_FIRST:#x};\n"
            + "".join(f"setp.gt.s32 p{i}, ${6 + i}, 0;\n" for i in range(count))
            + "".join(
                f"@p{i % count} cp.async.cg.shared.global.L2::cache_hint [$1+{512 * i}], [${2 + i}], 16, policy;\n"
                for i in range(4)
            )
            + "cp.async.commit_group; mov.b32 $0, $1; }"
        )
        for count in (1, 4)
    )
    of_block = "ld.shared.v2.b32 {$0, $1}, [$4]; ld.shared.v2.b32 {$2, $3}, [$4+1024];"  # 8 rows of 128 bytes further
    take_assembly = tl.constexpr(of_block)
    take_first_assembly = tl.constexpr(
        f"cp.async.wait_group {STEPS_OF_CODES - 1}; bar.warp.sync 0xffffffff; {of_block}"
    )
    UNIT_OF_TABLE = tl.constexpr(FLOAT8_UNIT)
    LEAST = tl.constexpr(LEAST_BOUND)
    twice_assembly = tl.constexpr("cvt.rn.f16x2.f32 $0, $1, $1;")
    inverse_assembly = tl.constexpr("rcp.approx.ftz.f32 $0, $1;")
    filled_assembly = tl.constexpr("bar.sync 0; mov.b32 $0, $1;")
    ordered_assembly = tl.constexpr("bar.warp.sync 0xffffffff; mov.b32 $0, $1;")
    largest_assembly = tl.constexpr("redux.sync.max.u32 $0, $1, 0xffffffff;")
    put_word_assembly = tl.constexpr("st.shared.b32 [$1], $2; bar.sync 0; mov.b32 $0, $1;")
    get_word_assembly = tl.constexpr("ld.shared.b32 $0, [$1];")
    put_number_assembly = tl.constexpr("st.shared.f32 [$1], $2; mov.b32 $0, $1;")
    get_two_assembly = tl.constexpr("ld.shared.v2.f32 {$0, $1}, [$2];")
    halves_assembly = tl.constexpr("cvt.rn.f16x2.f32 $0, $2, $1;")
    float8_assembly = tl.constexpr("{ .reg .b16 pair; cvt.rn.satfinite.e4m3x2.f16x2 pair, $1; cvt.u32.u16 $0, pair; }")

    @triton.jit
    def rows_read(first, count, GATED: tl.constexpr, ORDERED: tl.constexpr, WHOLE: tl.constexpr):
        """The two rows of weights that are read for place `first` of the result and, but for a gate, the next."""
        upper = first
        if ORDERED:
            upper = first // 64 * 64 + first % 64 // 16 * 4 + first % 16 // 4 * 16 + (first % 4 ^ 1)
        lower = upper if GATED else upper + 1
        if not WHOLE:
            upper, lower = tl.minimum(upper, count - 1), tl.minimum(lower, count - 1)
        return upper, lower

    @triton.jit
    def ask(upper, lower, left, there, codes, FURTHER: tl.constexpr, WHOLE: tl.constexpr):
        """Begin to copy a lane's 16 bytes of a step of each of four rows, of which the warp has read what was in their
        place; of rows that are not there nothing."""
        pointers = upper, upper + FURTHER, lower, lower + FURTHER
        if WHOLE:
            tl.inline_asm_elementwise(
                ask_whole_assembly, "=r,r,l,l,l,l,r", (codes,) + pointers + (left,), tl.int32, is_pure=False, pack=1
            )
        else:
            lefts = left, tl.where(there[0], left, 0), left, tl.where(there[1], left, 0)
            tl.inline_asm_elementwise(
                ask_assembly, "=r,r,l,l,l,l,r,r,r,r", (codes,) + pointers + lefts, tl.int32, is_pure=False, pack=1
            )

    @triton.jit
    def take(place, FIRST_OF_STEP: tl.constexpr):
        """A lane's codes of a block, 2 words of the upper row and 2 of the lower; of the first of a step when all of it
        has come."""
        return tl.inline_asm_elementwise(
            take_first_assembly if FIRST_OF_STEP else take_assembly,
            "=r,=r,=r,=r,r",
            [place],
            dtype=(tl.uint32,) * 4,
            is_pure=False,
            pack=1,
        )

    @triton.jit
    def scale_of(statistics, mean):
        return statistics[0] * statistics[1] + mean

    @triton.jit
    def bound_of(half, row, mean, BLOCKS: tl.constexpr):
        """What no scale of a row is beyond."""
        GROUPS: tl.constexpr = 1 if 256 % BLOCKS == 0 else (BLOCKS + 254) // 256 + 1
        first, last = row * BLOCKS >> 8, row * BLOCKS + (BLOCKS - 1) >> 8
        largest = tl.abs(tl.load(half[2] + first))
        for i in tl.static_range(1, GROUPS):
            largest = tl.maximum(largest, tl.abs(tl.load(half[2] + tl.minimum(first + i, last))))
        return tl.maximum(largest + tl.abs(mean), LEAST)

    @triton.jit
    def twice(value):
        """A number in float16, twice."""
        return tl.inline_asm_elementwise(twice_assembly, "=r,f", [value], tl.uint32, is_pure=True, pack=1)

    @triton.jit
    def inverse_of(value):
        return tl.inline_asm_elementwise(inverse_assembly, "=f,f", [value], dtype=tl.float32, is_pure=True, pack=1)

    @triton.jit
    def largest_of_warp(bits):
        """The largest of the lanes' numbers, uint32."""
        return tl.inline_asm_elementwise(largest_assembly, "=r,r", [bits], dtype=tl.uint32, is_pure=False, pack=1)

    @triton.jit
    def elements(codes, table):
        """The elements of a lane's two rows of a block over their scales, 8 words."""
        return tl.inline_asm_elementwise(
            lookup_assembly, lookup_operands, codes + table, dtype=(tl.uint32,) * 8, is_pure=False, pack=1
        )

    @triton.jit
    def products(words, x):
        """Begin a block's products, whose sums are right when they are `added`."""
        return tl.inline_asm_elementwise(
            products_assembly, products_operands, words + (x,), dtype=totals_dtypes, is_pure=False, pack=1
        )

    @triton.jit
    def added(totals, sums, scales):
        """The totals and a block's sums, which are waited for, times a scale of each row."""
        return tl.inline_asm_elementwise(
            sums_assembly, sums_operands, totals + sums + scales, dtype=totals_dtypes, is_pure=False, pack=1
        )

    @triton.jit
    def of_pair(word):
        """Two float16 in a word as float32."""
        first, second = word.to(tl.uint16), (word >> 16).to(tl.uint16)
        return first.to(tl.float16, bitcast=True).to(tl.float32), second.to(tl.float16, bitcast=True).to(tl.float32)

    @triton.jit
    def matmul_nf4_float8(
        x,  # the data of `Ordered`
        x_scales,  # float32: what that is times, [M], or with X_GROUP [COLUMNS / 64 / X_GROUP]
        nf4,  # uint32 [4], `nf4_lookup.float8_words`
        dynamic_map,  # float32 [256]
        codes0,  # of the first weight: uint8 [stack, rows, COLUMNS / 2]
        absmax0,  # uint8 [stack, rows, COLUMNS / 64]
        nested_absmax0,  # float32 [stack, ceil(blocks / 256)]
        mean0,  # float32 [stack]
        index0,  # int32 []: which of the stack; unread unless STACKED
        codes1,  # of the second, and so on; unread where there are fewer
        absmax1,
        nested_absmax1,
        mean1,
        index1,
        codes2,
        absmax2,
        nested_absmax2,
        mean2,
        index2,
        ahead0,  # what is fetched for the kernel after this one: see `ahead`
        of_ahead0,
        ahead1,
        of_ahead1,
        ahead2,
        of_ahead2,
        ahead3,
        of_ahead3,
        ahead4,
        of_ahead4,
        ahead5,
        of_ahead5,
        out0,  # [M, rows] in the results' dtype, or bfloat16 [SPLIT, M, rows], or the data of `Ordered`
        out1,  # with ORDERED what the data is times: float32, a number of each tile
        out2,
        M: tl.constexpr,
        ROWS0: tl.constexpr,
        ROWS1: tl.constexpr,
        ROWS2: tl.constexpr,
        WEIGHTS: tl.constexpr,
        COLUMNS: tl.constexpr,  # whole steps
        STACKED: tl.constexpr,
        WARPS: tl.constexpr,
        SPLIT: tl.constexpr,
        AHEAD0: tl.constexpr,
        AHEAD1: tl.constexpr,
        AHEAD2: tl.constexpr,
        AHEAD3: tl.constexpr,
        AHEAD4: tl.constexpr,
        AHEAD5: tl.constexpr,
        ACT: tl.constexpr,  # "", or out0 is ACT(x W0^T) * x W1^T
        ORDERED: tl.constexpr,  # whether out0 is `Ordered`, with ACT
        X_GROUP: tl.constexpr,  # blocks that have a scale of x; 0 where tokens have
    ):
        THREADS: tl.constexpr = 32 * WARPS
        ROWS: tl.constexpr = 16 * WARPS  # of a tile
        BLOCKS: tl.constexpr = COLUMNS // 64  # of a row
        ROW_NESTED: tl.constexpr = 256 % BLOCKS == 0  # all blocks of a row have one nested absmax
        STEPS: tl.constexpr = BLOCKS // BLOCKS_OF_STEP
        FIRST: tl.constexpr = (ROWS0 + ROWS - 1) // ROWS  # tiles before those of the second weight
        SECOND: tl.constexpr = FIRST + (ROWS1 + ROWS - 1) // ROWS
        GATED: tl.constexpr = ACT != ""
        TILES: tl.constexpr = (2 * ROWS0 + ROWS - 1) // ROWS if GATED else SECOND + (ROWS2 + ROWS - 1) // ROWS
        TOKEN_TILES: tl.constexpr = (M + 7) // 8
        EVEN: tl.constexpr = (ROWS0 | ROWS1 | ROWS2) % 2 == 0
        WHOLE: tl.constexpr = TILES * ROWS == ROWS0 + ROWS1 + ROWS2

        thread = tl.arange(0, THREADS)
        warp, lane = thread // 32, thread % 32
        group, t = lane // 4, lane % 4
        # What all warps wait for comes first, before any of what is many times as much.
        weights = ((codes0, absmax0, nested_absmax0, mean0, asked_layer(index0, STACKED), out0, ROWS0, 0),)
        if WEIGHTS > 1:
            layer = asked_layer(index1, STACKED)
            weights = weights + ((codes1, absmax1, nested_absmax1, mean1, layer, out1, ROWS1, FIRST),)
        if WEIGHTS > 2:
            layer = asked_layer(index2, STACKED)
            weights = weights + ((codes2, absmax2, nested_absmax2, mean2, layer, out2, ROWS2, SECOND),)
        table_of_nf4, map_values = (), ()
        for i in tl.static_range(4):
            table_of_nf4 = table_of_nf4 + (tl.load(nf4 + (thread * 0 + i)),)
        for i in tl.static_range((256 + THREADS - 1) // THREADS):
            map_values = map_values + (tl.load(dynamic_map + (i * THREADS + thread) % 256),)
        token = thread % 64
        of_token = 1.0
        if X_GROUP == 0:
            of_token = tl.load(x_scales + tl.minimum(token, M - 1))
        part = 0 if SPLIT == 1 else tl.program_id(0) // TILES
        start, end = part * STEPS // SPLIT, (part + 1) * STEPS // SPLIT
        table, ring = table_at(thread), ring_at(thread)
        barriers = table + BARRIERS_AT
        x = x.to(tl.pointer_type(tl.uint32)) + start * (STEP_BYTES // 4)
        begin(x, barriers, ring, thread)

        upper, lower, first_row = halves_at(tl.program_id(0) % TILES, weights, WEIGHTS, ROWS, GATED)
        row_count, out = upper[6], upper[5]
        first_of_warp = first_row + 8 * warp if GATED else first_row + 16 * warp
        first_row = first_of_warp + group if GATED else first_of_warp + 2 * group
        second_row = first_row if GATED else first_row + 1
        upper_row, lower_row = rows_read(first_row, row_count, GATED, ORDERED, WHOLE)
        upper = in_stack(upper, thread, BLOCKS, STACKED)
        lower = in_stack(lower, thread, BLOCKS, STACKED) if GATED else upper
        upper_at = upper_row * BLOCKS + (BLOCKS_OF_STEP * start + t)
        lower_at = lower_row * BLOCKS + (BLOCKS_OF_STEP * start + t)
        # Beyond the last step some block's statistics are read all the same.
        upper_last, lower_last = upper_row * BLOCKS + (BLOCKS - 1), lower_row * BLOCKS + (BLOCKS - 1)
        upper_nested, lower_nested = asked_nested(upper, upper_at, True), asked_nested(lower, lower_at, True)
        above_now = asked_statistics(upper, upper_at, upper_nested, True, True)
        below_now = asked_statistics(lower, lower_at, lower_nested, True, True)
        upper_at = tl.minimum(upper_at + BLOCKS_OF_STEP, upper_last)
        lower_at = tl.minimum(lower_at + BLOCKS_OF_STEP, lower_last)
        above = asked_statistics(upper, upper_at, upper_nested, True, ROW_NESTED)
        below = asked_statistics(lower, lower_at, lower_nested, True, ROW_NESTED)
        upper_mean = asked_mean(upper, True)
        lower_mean = asked_mean(lower, True) if GATED else upper_mean
        of_x, of_x_now, of_x_at, x_unit = 1.0, 1.0, 0, 1.0
        if X_GROUP > 0:
            # Numbers of this part, the largest of which is what the others are over.
            MOST: tl.constexpr = (BLOCKS_OF_STEP // X_GROUP) * ((STEPS + SPLIT - 1) // SPLIT)
            LAST: tl.constexpr = (BLOCKS - 1) // X_GROUP
            first_of_x = BLOCKS_OF_STEP // X_GROUP * start
            last_of_x = BLOCKS_OF_STEP // X_GROUP * end - 1
            for i in tl.static_range((MOST + 31) // 32):
                value = tl.load(x_scales + tl.minimum(first_of_x + 32 * i + lane, last_of_x))
                x_unit = tl.maximum(x_unit, value) if i > 0 else value
            of_x_at = first_of_x + t // X_GROUP
            of_x_now = tl.load(x_scales + of_x_at)
            of_x_at += BLOCKS_OF_STEP // X_GROUP
            of_x = tl.load(x_scales + tl.minimum(of_x_at, LAST))
        upper_bound = bound_of(upper, upper_row, upper_mean, BLOCKS)
        lower_bound = bound_of(lower, lower_row, lower_mean, BLOCKS)

        # Else the assembler would put these loads behind the copies of codes.
        tl.inline_asm_elementwise(ordered_assembly, "=r,r", [thread], dtype=tl.int32, is_pure=False, pack=1)

        # A step of a row is a line of 128 bytes: 8 lanes copy one. Row q has the 32 bytes of block i where the last two
        # bits of q ^ i say, so that 16 lanes, which read four rows at once, read other 8 of 128 bytes each.
        q, piece = lane // 8, lane % 8
        copied = ring + (CODES_AT + 2048 * warp + 128 * q + 16 * (piece ^ 2 * q))
        codes_at, other_codes_at = whole(copied, lane), whole(copied + 64 * THREADS, lane)
        place = ring + (CODES_AT + 2048 * warp + 128 * group + 32 * (group % 4) + 8 * t)
        # Of rows q and q + 4 the places differ by 4 rows or by 8, and then what is read for them.
        first_place = first_of_warp + q if GATED else first_of_warp + 2 * q
        last_place = first_place + 4 if GATED else first_place + 8
        FURTHER: tl.constexpr = (16 if ORDERED else 4 if GATED else 8) * (BLOCKS * 32)
        there = last_place < row_count, (last_place if GATED else last_place + 1) < row_count
        upper_copied, lower_copied = rows_read(first_place, row_count, GATED, ORDERED, WHOLE)
        of_lane = start * 128 + piece * 16
        upper_codes = (upper[0] + (upper_copied * (BLOCKS * 32) + of_lane)).to(tl.int64)
        lower_codes = (lower[0] + (lower_copied * (BLOCKS * 32) + of_lane)).to(tl.int64)
        left = thread * 0 + (end - start)  # steps to be asked for
        ask(upper_codes, lower_codes, left, there, codes_at, FURTHER, WHOLE)
        upper_codes, lower_codes, left = upper_codes + 128, lower_codes + 128, left - 1
        ask(upper_codes, lower_codes, left, there, other_codes_at, FURTHER, WHOLE)
        upper_codes, lower_codes, left = upper_codes + 128, lower_codes + 128, left - 1
        # The second step of x is needed later than all these.
        x += STEP_BYTES // 4
        copy(x, 1, 1, (start + 1 >= end) & (STEPS // SPLIT < 2), barriers, ring, thread)
        x += STEP_BYTES // 4
        put_map(table, map_values, thread, THREADS)
        if X_GROUP == 0:
            number = [table + (OF_TOKENS_AT + 4 * token), of_token]
            tl.inline_asm_elementwise(put_number_assembly, "=r,r,f", number, tl.int32, is_pure=False, pack=1)
        tl.inline_asm_elementwise(filled_assembly, "=r,r", [thread], dtype=tl.int32, is_pure=False, pack=1)
        above_now, below_now = mapped(above_now, table, True), mapped(below_now, table, True)
        above_unit, below_unit = inverse_of(upper_bound), inverse_of(lower_bound)
        if X_GROUP > 0:
            x_unit = largest_of_warp(x_unit.to(tl.uint32, bitcast=True)).to(tl.float32, bitcast=True)
            above_unit, below_unit = above_unit * inverse_of(x_unit), below_unit * inverse_of(x_unit)
        above_scale = twice(scale_of(above_now, upper_mean) * of_x_now * above_unit)
        below_scale = twice(scale_of(below_now, lower_mean) * of_x_now * below_unit)

        x_at = (ring >> 4) + ACROSS
        further = other_codes_at - codes_at  # from the places of one step to those of the other, and back
        words = elements(take(place, True), table_of_nf4)
        x_place, phase = start * 0, start * 0
        free_place, free_phase = x_place + (PLACES - 1), phase + 1  # of a place that was never used: done with
        totals = (tl.zeros((THREADS,), tl.uint32),) * (2 * TOKEN_TILES)
        for step in range(start, end):
            arrived(x_place, phase, barriers, thread)
            x_of_step = x_at + (STEP_BYTES // 16) * x_place
            for i in tl.static_range(BLOCKS_OF_STEP):
                scales = from_lane(above_scale, i), from_lane(below_scale, i)
                sums = products(words, x_of_step + i * (STEP_BYTES // BLOCKS_OF_STEP // 16))
                if i == 0:  # the last block of the step before is done
                    done(free_place, step, start, barriers, lane)
                    # Of the next step.
                    above_now, below_now = mapped(above, table, True), mapped(below, table, True)
                if i == 2:
                    next_above = twice(scale_of(above_now, upper_mean) * of_x * above_unit)
                    next_below = twice(scale_of(below_now, lower_mean) * of_x * below_unit)
                    if X_GROUP > 0:
                        of_x_at += BLOCKS_OF_STEP // X_GROUP
                        of_x = tl.load(x_scales + tl.minimum(of_x_at, LAST))
                    upper_at = tl.minimum(upper_at + BLOCKS_OF_STEP, upper_last)
                    lower_at = tl.minimum(lower_at + BLOCKS_OF_STEP, lower_last)
                    above = asked_statistics(upper, upper_at, upper_nested, True, ROW_NESTED)  # of the one after
                    below = asked_statistics(lower, lower_at, lower_nested, True, ROW_NESTED)
                if i == 3:
                    ask(upper_codes, lower_codes, left, there, codes_at, FURTHER, WHOLE)
                    upper_codes, lower_codes, left = next_line(upper_codes), next_line(lower_codes), left - 1
                    place, codes_at, further = place + further, codes_at + further, -further
                    copy(x, free_place, free_phase, step + 2 >= end, barriers, ring, thread)
                    x += STEP_BYTES // 4
                # The next block is looked up while this one is multiplied.
                words = elements(take(place ^ 32 * ((i + 1) % BLOCKS_OF_STEP), i == 3), table_of_nf4)
                totals = added(totals, sums, scales)
            above_scale, below_scale = next_above, next_below
            free_place, free_phase = x_place, phase
            x_place += 1
            phase = tl.where(x_place == PLACES, 1 - phase, phase)
            x_place = tl.where(x_place == PLACES, 0, x_place)

        fetch(ahead0, of_ahead0, thread, THREADS, SPLIT * TILES, AHEAD0)
        fetch(ahead1, of_ahead1, thread, THREADS, SPLIT * TILES, AHEAD1)
        fetch(ahead2, of_ahead2, thread, THREADS, SPLIT * TILES, AHEAD2)
        fetch(ahead3, of_ahead3, thread, THREADS, SPLIT * TILES, AHEAD3)
        fetch(ahead4, of_ahead4, thread, THREADS, SPLIT * TILES, AHEAD4)
        fetch(ahead5, of_ahead5, thread, THREADS, SPLIT * TILES, AHEAD5)
        # What the totals are over.
        above_last, below_last = upper_bound * (x_unit * UNIT_OF_TABLE), lower_bound * (x_unit * UNIT_OF_TABLE)
        out += part * M * row_count
        here = first_row < row_count
        results, largest = (), thread.to(tl.float32) * 0.0
        for j in tl.static_range(TOKEN_TILES):
            # Of rows, each of two tokens.
            first, second = of_pair(totals[2 * j]), of_pair(totals[2 * j + 1])
            times = 1.0, 1.0
            if X_GROUP == 0:
                two = table + (OF_TOKENS_AT + 32 * j) + 8 * t
                times = tl.inline_asm_elementwise(
                    get_two_assembly, "=f,=f,r", [two], dtype=(tl.float32, tl.float32), is_pure=False, pack=1
                )
            first = first[0] * (above_last * times[0]), first[1] * (above_last * times[1])
            second = second[0] * (below_last * times[0]), second[1] * (below_last * times[1])
            if GATED:
                first = activation(first[0], ACT)[0] * second[0], activation(first[1], ACT)[0] * second[1]
            if ORDERED:
                results = results + first
                for i in tl.static_range(2):
                    largest = tl.where(8 * j + 2 * t + i < M, tl.maximum(largest, tl.abs(first[i])), largest)
            else:
                for i in tl.static_range(2):
                    target = out + (2 * t * row_count + first_row) + (8 * j + i) * row_count
                    mask = (8 * j + 2 * t + i < M) & here
                    if GATED:
                        tl.store(target, first[i].to(out.dtype.element_ty), mask=mask)
                    elif EVEN:
                        word = joined(first[i].to(out.dtype.element_ty), second[i].to(out.dtype.element_ty))
                        tl.store(target.to(tl.pointer_type(word.dtype)), word, mask=mask)
                    else:
                        tl.store(target, first[i].to(out.dtype.element_ty), mask=mask)
                        tl.store(target + 1, second[i].to(out.dtype.element_ty), mask=mask & (second_row < row_count))
        if ORDERED:
            # The exponent of the largest of the program, e: what is stored is times 2^(2 - e), at most 8.
            bits = largest_of_warp(largest.to(tl.uint32, bitcast=True))
            tl.inline_asm_elementwise(
                put_word_assembly, "=r,r,r", [table + MAXIMA_AT + 4 * warp, bits], tl.int32, is_pure=False, pack=1
            )
            bits = tl.inline_asm_elementwise(
                get_word_assembly, "=r,r", [table + MAXIMA_AT + 4 * (lane % WARPS)], tl.uint32, is_pure=False, pack=1
            )
            exponent = tl.maximum(largest_of_warp(bits) >> 23, 3)
            times, over = (256 - exponent) << 23, (exponent - 2) << 23
            times = times.to(tl.float32, bitcast=True)
            of_tile = out1 + (tl.program_id(0) % TILES + thread * 0)
            tl.store(of_tile, over.to(tl.float32, bitcast=True), mask=thread == 0)
            # A lane of the order has two rows of a token, and a warp half of 16 of all tokens.
            at = first_row // 16 * (128 * TOKEN_TILES) + group * 16 + first_row // 8 % 2 * 8 + 2 * t
            bytes_of = out.to(tl.pointer_type(tl.uint8)) + at
            for j in tl.static_range(TOKEN_TILES):
                both = [results[2 * j] * times, results[2 * j + 1] * times]
                word = tl.inline_asm_elementwise(halves_assembly, "=r,f,f", both, tl.uint32, is_pure=True, pack=1)
                pair = tl.inline_asm_elementwise(
                    float8_assembly, "=r,r", [turned(word)], tl.uint32, is_pure=True, pack=1
                )
                tl.store((bytes_of + 128 * j).to(tl.pointer_type(tl.uint16)), pair.to(tl.uint16))

    return matmul_nf4_float8
