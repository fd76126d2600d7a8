"""The Triton function of `nf4_matmul_wgmma`, whose head says how it is laid out, and the PTX in it."""

import functools
from typing import no_type_check

import jax.numpy as jnp
import numpy as np

from jaxlora.kernels import ahead, nf4_lookup, reference
from jaxlora.kernels.gated import activation_kernel
from jaxlora.kernels.nf4_lookup import FACTORS, PAIRS
from jaxlora.kernels.nf4_stream import (
    BARRIERS,
    EVICT_FIRST,
    MAP,
    ROWS_OF_WARP,
    STEP,
    memory_kernels,
    result_kernels,
    scale_kernels,
    weight_kernels,
    x_kernels,
)

UNIT = 2  # blocks that are copied at once
STEPS_OF_X = 3  # that shared memory has places for
UNITS_OF_CODES = 2
LEAST_SCALE = 2.0**-84  # what a scale counts as that is nearer to 0, since sums are divided by it


def shared_bytes(tokens: int, num_warps: int) -> tuple[int, int]:
    """The shared memory of a program besides the table of pairs and the barriers: that of x, and all of it."""
    of_x = STEPS_OF_X * STEP * -(-tokens // 8) * 8 * 128
    return of_x, of_x + UNITS_OF_CODES * UNIT * num_warps * ROWS_OF_WARP * reference.NF4_BLOCK // 2


def is_each_rescaled(dtype: np.dtype, tokens: int) -> bool:
    """Whether sums are rescaled for every block, else for each first of a step, by whose scale elements of the other
    three are divided.

    Of a block a lane has 16 words and half as many sums as there are tokens. In float16 a ratio of scales may be beyond
    the range, where a whole block is 0.
    """
    return dtype == jnp.float16 or tokens <= 32


def ptx_of_lookup(dtype: np.dtype, is_scaled: bool) -> str:
    """PTX for 32 elements of a lane, 16 of each of its rows, over their scales: the words $0..$15, from four words of
    codes, $16..$19, two a row, and a lane's place in the table, $20. If `is_scaled`, times ratios of scales, of the
    upper row $21 and of the lower $22, each a number twice."""
    kind = "bf16x2" if dtype == jnp.bfloat16 else "f16x2"
    lines = [".reg .b32 at;"]
    for i in range(16):
        lines += [f"dp4a.u32.u32 at, ${16 + i // 4}, {128 << 8 * (i % 4):#x}, $20;", f"ld.shared.b32 ${i}, [at];"]
    lines += [f"mul.rn.{kind} ${i}, ${i}, ${21 + i // 8};" for i in range(16) if is_scaled]
    return "\n".join(["{", *lines, "}"])


def ptx_of_products(dtype: np.dtype, tiles: int, is_rescaled: bool) -> str:
    """PTX that begins the products of a block of 64 rows of a warpgroup and `tiles` tiles of 8 tokens.

    Results, in the registers of the first arguments: the totals, 4 a tile, two of row g and two of g + 8. Arguments:
    the totals so far; the 16 words of the block; the lower word of the descriptor of its x. Neither totals nor words
    may be touched before the products are waited for. If `is_rescaled`, those before are waited for, and the totals
    multiplied by two more arguments, of row g and of g + 8.
    """
    kind = "bf16" if dtype == jnp.bfloat16 else "f16"
    sums = 4 * tiles
    words, x = 2 * sums, 2 * sums + 16
    d = ", ".join(f"${i}" for i in range(sums))
    lines = [
        ".reg .b64 at64;",
        "bar.warp.sync 0xffffffff;",
        *(["wgmma.wait_group.sync.aligned 0;"] if is_rescaled else []),
        *(f"mul.rn.f32 ${i}, ${i}, ${x + 1 + i // 2 % 2};" for i in range(sums) if is_rescaled),
        "wgmma.fence.sync.aligned;",
    ]
    for step in range(4):
        a = ", ".join(f"${words + i + 2 * step}" for i in (0, 8, 1, 9))
        lines += [
            # The descriptor, in units of 16 bytes: the address, how far it is from 8 elements of k to the next 8, and
            # from 8 tokens to the next 8. No swizzle. An addition of 64 bits takes one instruction, of 32 three.
            f"mov.b64 at64, {{${x}, 8}};",
            f"add.u64 at64, at64, {2 * 8 * tiles * step};",
            f"wgmma.mma_async.sync.aligned.m64n{8 * tiles}k16.f32.{kind}.{kind} {{{d}}}, {{{a}}}, at64, 1, 1, 1, 0;",
        ]
    # Nothing is looked up across the barriers, else the assembler issues the products one by one between lookups.
    return "\n".join(["{", *lines, "wgmma.commit_group.sync.aligned;", "bar.warp.sync 0xffffffff;", "}"])


@functools.cache
@no_type_check  # a type checker's wrapper around the function would hide its source from Triton
def kernel(dtype: np.dtype, tokens: int, num_warps: int):
    """The Triton function. Built on first use, since the library imports where Triton is not installed."""
    import triton
    import triton.language as tl

    narrow = tl.constexpr(tl.bfloat16 if dtype == jnp.bfloat16 else tl.float16)
    activation, fetch = activation_kernel(), ahead.kernel()
    asked_table, put_table = nf4_lookup.fill_kernels()
    EACH = tl.constexpr(is_each_rescaled(dtype, tokens))
    lookup_assembly, scaled_assembly = (tl.constexpr(ptx_of_lookup(dtype, is_scaled)) for is_scaled in (False, True))
    lookup_operands, scaled_operands = (tl.constexpr(",".join(["=&r"] * 16 + ["r"] * n)) for n in (5, 7))
    tiles = -(-tokens // 8)
    sums = 4 * tiles
    products_assembly, rescaled_assembly = (
        tl.constexpr(ptx_of_products(dtype, tiles, is_rescaled)) for is_rescaled in (False, True)
    )
    same_sums = ["=f"] * sums + [str(i) for i in range(sums)]  # results in the registers of the arguments
    products_operands = tl.constexpr(",".join([*same_sums, *["r"] * (16 + 1)]))
    rescaled_operands = tl.constexpr(",".join([*same_sums, *["r"] * (16 + 1), "f", "f"]))
    finish_operands = tl.constexpr(",".join(same_sums))
    totals_dtypes = tl.constexpr((tl.float32,) * sums)
    # Behind a branch of one lane it tells the assembler too that lanes are together again: with EACH that is all.
    former_assembly = tl.constexpr("wgmma.wait_group.sync.aligned 1; mov.b32 $0, $1;")
    finish_assembly = tl.constexpr("wgmma.wait_group.sync.aligned 0;")
    BARRIERS_AT = tl.constexpr(PAIRS + MAP)
    BLOCKS_OF_STEP = tl.constexpr(STEP)
    PLACES = tl.constexpr(STEPS_OF_X)
    step_bytes = STEP * tiles * 1024  # of x
    STEP_BYTES = tl.constexpr(step_bytes)
    ACROSS = tl.constexpr(8 * tiles << 16)  # of a descriptor: from 8 elements of k to the next 8
    of_x, of_all = shared_bytes(tokens, num_warps)
    CODES_AT = tl.constexpr(of_x)  # in the ring
    table_at, ring_at, whole = memory_kernels(PAIRS + MAP + BARRIERS, of_all)
    asked_layer, in_stack, halves_at, next_line = weight_kernels()
    begin, copy, arrived, done = x_kernels(STEPS_OF_X, step_bytes, num_warps)
    put_map, asked_nested, asked_mean, asked_statistics, mapped, from_lane = scale_kernels(PAIRS)
    joined, turned = result_kernels()
    rows_bytes = 16 * 32 * num_warps  # of a unit of half of the rows
    ask_first_assembly, ask_second_assembly = (
        tl.constexpr(
            "{ .reg .pred p; .reg .b64 policy;\n"
            f"setp.gt.s32 p, $4, {UNIT * half};\n"
            f"mov.b64 policy, {EVICT_FIRST:#x};\n"
            + "".join(
                f"@p cp.async.cg.shared.global.L2::cache_hint"
                f" [$1+{(2 * half + row) * rows_bytes}], [${2 + row}+{64 * half}], 16, policy;\n"
                for row in range(2)
            )
            + "cp.async.commit_group; mov.b32 $0, $4; }"
        )
        for half in range(2)
    )
    take_assembly = tl.constexpr(
        f"cp.async.wait_group {UNITS_OF_CODES - 1};\n"
        "bar.warp.sync 0xffffffff;\n"
        + "".join(
            f"ld.shared.v2.b32 {{${2 * i}, ${2 * i + 1}}}, [${8 + i // 2}+{rows_bytes * (i % 2)}];\n" for i in range(4)
        )
        + "bar.warp.sync 0xffffffff;"
    )
    UNIT_OF_TABLE = tl.constexpr(1 / FACTORS[dtype.name])
    LEAST = tl.constexpr(LEAST_SCALE)
    twice_assembly = tl.constexpr(f"cvt.rn.{'bf16x2' if dtype == jnp.bfloat16 else 'f16x2'}.f32 $0, $1, $1;")
    inverse_assembly = tl.constexpr("rcp.approx.ftz.f32 $0, $1;")
    filled_assembly = tl.constexpr("bar.sync 0; mov.b32 $0, $1;")
    ordered_assembly = tl.constexpr("bar.warp.sync 0xffffffff; mov.b32 $0, $1;")
    two = "bf16x2" if dtype == jnp.bfloat16 else "f16x2"
    # Two numbers are rounded at once: what rounds one is of the unit of exponentials, which has enough to do.
    if dtype == jnp.bfloat16:
        to_floats = "shl.b32 $0, word, 16; and.b32 $1, word, 0xffff0000;"
    else:
        to_floats = "mov.b32 {lower, upper}, word; cvt.f32.f16 $0, lower; cvt.f32.f16 $1, upper;"
    round_assembly = tl.constexpr(
        f"{{ .reg .b32 word; .reg .b16 lower, upper; cvt.rn.{two}.f32 word, $3, $2; {to_floats} }}"
    )
    times_assembly = tl.constexpr(
        f"{{ .reg .b32 word; cvt.rn.{two}.f32 $0, $2, $1; cvt.rn.{two}.f32 word, $4, $3; mul.rn.{two} $0, $0, word; }}"
    )

    @triton.jit
    def ask(assembly: tl.constexpr, upper, lower, left, codes):
        """Begin to copy a lane's 16 bytes of the first or second unit of a step of each of its rows to its own place.
        What lies beyond the last block may be anything: there x is zero."""
        tl.inline_asm_elementwise(
            assembly, "=r,r,l,l,r", [codes, upper, lower, left], dtype=tl.int32, is_pure=False, pack=1
        )

    @triton.jit
    def take(first, second):
        """A lane's codes of the unit that was asked for longest ago, of its first block and its second: 2 words of the
        upper row, 2 of the lower."""
        return tl.inline_asm_elementwise(
            take_assembly,
            "=r,=r,=r,=r,=r,=r,=r,=r,r,r",
            [first, second],
            dtype=(tl.uint32,) * 8,
            is_pure=False,
            pack=1,
        )

    @triton.jit
    def scale_of(statistics, mean, NESTED: tl.constexpr):
        """The scale of a block of a row, or what it counts as."""
        scale = statistics[0]
        if NESTED:
            scale = scale * statistics[1] + mean
        return tl.where(tl.abs(scale) < LEAST, LEAST, scale)

    @triton.jit
    def ratios_of(former, scale, t):
        """Of a row, where lane t has the scale of block t of a step: what elements of a block are multiplied by, or
        with EACH the sums before it; what sums before the step are multiplied by; the scale that they are over then,
        which is `former` for the next step, and with EACH one of each lane."""
        first = scale if EACH else from_lane(scale, 0)
        inverse = tl.inline_asm_elementwise(inverse_assembly, "=f,f", [first], dtype=tl.float32, is_pure=True, pack=1)
        if EACH:
            of_sums = from_lane(tl.where(t == 3, former, scale), (t + 3) % 4) * inverse
            ratio = of_sums
        else:
            of_sums = former * inverse
            ratio = tl.inline_asm_elementwise(
                twice_assembly, "=r,f", [scale * inverse], tl.uint32, is_pure=True, pack=1
            )
        return ratio, of_sums, first

    @triton.jit
    def elements(codes, place, ratios, SCALED: tl.constexpr):
        """The elements of a lane's two rows of a block over their scales, 16 words; if SCALED, times a ratio each."""
        return tl.inline_asm_elementwise(
            scaled_assembly if SCALED else lookup_assembly,
            scaled_operands if SCALED else lookup_operands,
            codes + (place,) + ratios,
            dtype=(tl.uint32,) * 16,
            is_pure=False,
            pack=1,
        )

    @triton.jit
    def products(totals, words, x, ratios, RESCALED: tl.constexpr):
        """Begin to add a block's products to the totals, which are right when they are `finished`; if RESCALED, to the
        totals so far, which are waited for, times a ratio for each row. The words may change when the group of products
        is waited for."""
        return tl.inline_asm_elementwise(
            rescaled_assembly if RESCALED else products_assembly,
            rescaled_operands if RESCALED else products_operands,
            totals + words + (x,) + ratios,
            dtype=totals_dtypes,
            is_pure=False,
            pack=1,
        )

    @triton.jit
    def finished(totals):
        """The totals when all products have been added."""
        return tl.inline_asm_elementwise(
            finish_assembly, finish_operands, totals, dtype=totals_dtypes, is_pure=False, pack=1
        )

    @triton.jit
    def gated(gates, ups, ACT: tl.constexpr):
        """Two elements of a gated result, a word."""
        first, second = tl.inline_asm_elementwise(
            round_assembly, "=f,=f,f,f", gates, dtype=(tl.float32, tl.float32), is_pure=True, pack=1
        )
        first, second = activation(first, ACT)[0], activation(second, ACT)[0]
        return tl.inline_asm_elementwise(
            times_assembly, "=&r,f,f,f,f", (first, second) + ups, dtype=tl.uint32, is_pure=True, pack=1
        )

    @triton.jit
    def matmul_nf4_wgmma(
        x,  # the data of `Ordered`
        nf4,  # uint32 [256], `nf4_lookup.pairs`
        dynamic_map,  # float32 [256]
        codes0,  # of the first weight: uint8 [stack, rows, COLUMNS / 2]
        absmax0,  # uint8 or float32 [stack, rows, COLUMNS / 64]
        nested_absmax0,  # float32 [stack, ceil(blocks / 256)]; unread unless NESTED
        mean0,  # float32 [stack]; unread unless NESTED
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
        out0,  # [M, rows] in x's dtype, or float32 [SPLIT, M, rows], or the data of `Ordered`
        out1,
        out2,
        M: tl.constexpr,
        ROWS0: tl.constexpr,
        ROWS1: tl.constexpr,
        ROWS2: tl.constexpr,
        WEIGHTS: tl.constexpr,
        COLUMNS: tl.constexpr,
        NESTED: tl.constexpr,
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
    ):
        THREADS: tl.constexpr = 32 * WARPS
        ROWS: tl.constexpr = 16 * WARPS  # of a tile
        BLOCKS: tl.constexpr = COLUMNS // 64  # of a row
        ROW_NESTED: tl.constexpr = 256 % BLOCKS == 0  # all blocks of a row have one nested absmax
        STEPS: tl.constexpr = (BLOCKS + BLOCKS_OF_STEP - 1) // BLOCKS_OF_STEP
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
        pairs = asked_table(nf4, thread, THREADS)
        map_values = ()
        if NESTED:
            for i in tl.static_range((256 + THREADS - 1) // THREADS):
                map_values = map_values + (tl.load(dynamic_map + (i * THREADS + thread) % 256),)
        part = 0 if SPLIT == 1 else tl.program_id(0) // TILES
        start, end = part * STEPS // SPLIT, (part + 1) * STEPS // SPLIT
        table, ring = table_at(thread), ring_at(thread)
        barriers = table + BARRIERS_AT
        x = x.to(tl.pointer_type(tl.uint32)) + start * (STEP_BYTES // 4)
        begin(x, barriers, ring, thread)

        upper, lower, first_row = halves_at(tl.program_id(0) % TILES, weights, WEIGHTS, ROWS, GATED)
        row_count, out = upper[6], upper[5]
        first_row += 8 * warp + group if GATED else 16 * warp + 2 * group
        second_row = first_row if GATED else first_row + 1
        upper_row, lower_row = first_row, second_row  # that are read
        if ORDERED:  # what is read for the place of a row in that order
            upper_row = first_row // 64 * 64 + first_row % 64 // 8 * 2 + first_row % 8 // 2 * 16 + first_row % 2
            lower_row = upper_row
        if not WHOLE:
            upper_row, lower_row = tl.minimum(upper_row, row_count - 1), tl.minimum(lower_row, row_count - 1)
        upper = in_stack(upper, thread, BLOCKS, STACKED)
        lower = in_stack(lower, thread, BLOCKS, STACKED) if GATED else upper
        block = tl.minimum(BLOCKS_OF_STEP * start + t, BLOCKS - 1)
        upper_at, lower_at = upper_row * BLOCKS + block, lower_row * BLOCKS + block
        upper_last, lower_last = upper_row * BLOCKS + (BLOCKS - 1), lower_row * BLOCKS + (BLOCKS - 1)
        upper_nested, lower_nested = asked_nested(upper, upper_at, NESTED), asked_nested(lower, lower_at, NESTED)
        above_now = asked_statistics(upper, upper_at, upper_nested, NESTED, True)
        below_now = asked_statistics(lower, lower_at, lower_nested, NESTED, True)
        upper_at = tl.minimum(upper_at + BLOCKS_OF_STEP, upper_last)
        lower_at = tl.minimum(lower_at + BLOCKS_OF_STEP, lower_last)
        above = asked_statistics(upper, upper_at, upper_nested, NESTED, ROW_NESTED)
        below = asked_statistics(lower, lower_at, lower_nested, NESTED, ROW_NESTED)
        upper_mean = asked_mean(upper, NESTED)
        lower_mean = asked_mean(lower, NESTED) if GATED else upper_mean

        # Else the assembler would put these loads behind the copies of codes.
        tl.inline_asm_elementwise(ordered_assembly, "=r,r", [thread], dtype=tl.int32, is_pure=False, pack=1)

        # A lane reads 8 bytes of a block, of 64 that lie together. Else rows g and g + 2 would ask for the same banks.
        turned_rows = group // 2 % 2
        codes_at = whole(ring + (CODES_AT + 16 * (thread ^ 2 * turned_rows)), lane)
        first_codes = ring + (CODES_AT + 64 * (thread // 4) + 8 * t + 32 * turned_rows)
        second_codes = first_codes ^ 32
        of_lane = start * 128 + t * 16
        upper_codes = (upper[0] + (upper_row * (BLOCKS * 32) + of_lane)).to(tl.int64)
        lower_codes = (lower[0] + (lower_row * (BLOCKS * 32) + of_lane)).to(tl.int64)
        left = tl.minimum(BLOCKS, BLOCKS_OF_STEP * end) - BLOCKS_OF_STEP * start - t // 2  # blocks to be asked for
        # A part has a step at least; where its blocks are four, none of it has to be asked whether it is there.
        left_now = thread * 0 + BLOCKS_OF_STEP if BLOCKS % BLOCKS_OF_STEP == 0 else left
        ask(ask_first_assembly, upper_codes, lower_codes, left_now, codes_at)
        ask(ask_second_assembly, upper_codes, lower_codes, left_now, codes_at)
        # The second step of x is needed later than all these.
        x += STEP_BYTES // 4
        copy(x, 1, 1, (start + 1 >= end) & (STEPS // SPLIT < 2), barriers, ring, thread)
        x += STEP_BYTES // 4
        put_table(table, pairs, thread, THREADS)
        if NESTED:
            put_map(table, map_values, thread, THREADS)
        tl.inline_asm_elementwise(filled_assembly, "=r,r", [thread], dtype=tl.int32, is_pure=False, pack=1)
        above_now, below_now = mapped(above_now, table, NESTED), mapped(below_now, table, NESTED)
        above_scale, below_scale = scale_of(above_now, upper_mean, NESTED), scale_of(below_now, lower_mean, NESTED)
        # Nothing was added up before: any former scale will do.
        above_ratio, above_sums, above_scale = ratios_of(above_scale, above_scale, t)
        below_ratio, below_sums, below_scale = ratios_of(below_scale, below_scale, t)

        entry = table + lane * 4
        x_at = (ring >> 4) + ACROSS
        unit_codes = take(first_codes, second_codes)
        upper_codes, lower_codes, left = upper_codes + 128, lower_codes + 128, left - BLOCKS_OF_STEP
        ask(ask_first_assembly, upper_codes, lower_codes, left, codes_at)
        words = elements(unit_codes[:4], entry, (), False)
        place, phase = start * 0, start * 0
        free_place, free_phase = place + (PLACES - 1), phase + 1  # of a place that was never used: done with
        totals = (tl.zeros((THREADS,), tl.float32),) * (4 * TOKEN_TILES)
        for step in range(start, end):
            arrived(place, phase, barriers, thread)
            of_x = x_at + (STEP_BYTES // 16) * place
            for i in tl.static_range(BLOCKS_OF_STEP):
                of_block = of_x + i * (STEP_BYTES // BLOCKS_OF_STEP // 16)
                if EACH:
                    above_sums, below_sums = from_lane(above_ratio, i), from_lane(below_ratio, i)
                if EACH or i == 0:
                    totals = products(totals, words, of_block, (above_sums, below_sums), True)
                else:
                    totals = products(totals, words, of_block, (), False)
                if i == 0:  # the last block of the step before is done
                    done(free_place, step, start, barriers, lane)
                    # Of the next step.
                    above_now, below_now = mapped(above, table, NESTED), mapped(below, table, NESTED)
                if i == 1:
                    next_codes = take(first_codes + 32 * THREADS, second_codes + 32 * THREADS)
                    ask(ask_second_assembly, upper_codes, lower_codes, left, codes_at)
                if i == 2:
                    next_above = ratios_of(above_scale, scale_of(above_now, upper_mean, NESTED), t)
                    next_below = ratios_of(below_scale, scale_of(below_now, lower_mean, NESTED), t)
                    upper_at = tl.minimum(upper_at + BLOCKS_OF_STEP, upper_last)
                    lower_at = tl.minimum(lower_at + BLOCKS_OF_STEP, lower_last)
                    above = asked_statistics(upper, upper_at, upper_nested, NESTED, ROW_NESTED)  # of the one after
                    below = asked_statistics(lower, lower_at, lower_nested, NESTED, ROW_NESTED)
                if i == 3:
                    next_codes = take(first_codes, second_codes)
                    upper_codes, lower_codes = next_line(upper_codes), next_line(lower_codes)
                    left -= BLOCKS_OF_STEP
                    ask(ask_first_assembly, upper_codes, lower_codes, left, codes_at)
                    copy(x, free_place, free_phase, step + 2 >= end, barriers, ring, thread)
                    x += STEP_BYTES // 4
                # The next block is looked up: the second of two, or the first of the next two. The block before this is
                # done, and its words are free.
                if not EACH and i < 3:
                    above_times, below_times = from_lane(above_ratio, i + 1), from_lane(below_ratio, i + 1)
                tl.inline_asm_elementwise(former_assembly, "=r,r", [thread], dtype=tl.int32, is_pure=False, pack=1)
                if i % 2 == 1:
                    unit_codes = next_codes
                codes = unit_codes[:4] if i % 2 == 1 else unit_codes[4:]
                if not EACH and i < 3:
                    words = elements(codes, entry, (above_times, below_times), True)
                else:
                    words = elements(codes, entry, (), False)
            above_ratio, above_sums, above_scale = next_above
            below_ratio, below_sums, below_scale = next_below
            free_place, free_phase = place, phase
            place += 1
            phase = tl.where(place == PLACES, 1 - phase, phase)
            place = tl.where(place == PLACES, 0, place)

        totals = finished(totals)
        fetch(ahead0, of_ahead0, thread, THREADS, SPLIT * TILES, AHEAD0)
        fetch(ahead1, of_ahead1, thread, THREADS, SPLIT * TILES, AHEAD1)
        fetch(ahead2, of_ahead2, thread, THREADS, SPLIT * TILES, AHEAD2)
        fetch(ahead3, of_ahead3, thread, THREADS, SPLIT * TILES, AHEAD3)
        fetch(ahead4, of_ahead4, thread, THREADS, SPLIT * TILES, AHEAD4)
        fetch(ahead5, of_ahead5, thread, THREADS, SPLIT * TILES, AHEAD5)
        # The scale that the totals are over, by what they would be multiplied by next.
        above_last = from_lane(above_sums * above_scale, 0) * UNIT_OF_TABLE
        below_last = from_lane(below_sums * below_scale, 0) * UNIT_OF_TABLE
        out += part * M * row_count
        here = first_row < row_count
        for j in tl.static_range(TOKEN_TILES):
            # Of rows, each of two tokens.
            first = totals[4 * j] * above_last, totals[4 * j + 1] * above_last
            second = totals[4 * j + 2] * below_last, totals[4 * j + 3] * below_last
            if GATED:
                word = gated(first, second, ACT)
                first = word.to(tl.uint16).to(narrow, bitcast=True), (word >> 16).to(tl.uint16).to(narrow, bitcast=True)
            if ORDERED:  # all rows are there, and tokens that are not may be anything
                of_warp = out.to(tl.pointer_type(tl.uint32)) + (first_row // 8 * (32 * TOKEN_TILES) + lane)
                tl.store(of_warp + 32 * j, turned(word))
            else:
                for i in tl.static_range(2):
                    target = out + (2 * t * row_count + first_row) + (8 * j + i) * row_count
                    mask = (8 * j + 2 * t + i < M) & here
                    if GATED:
                        tl.store(target, first[i], mask=mask)
                    elif EVEN:
                        word = joined(first[i].to(out.dtype.element_ty), second[i].to(out.dtype.element_ty))
                        tl.store(target.to(tl.pointer_type(word.dtype)), word, mask=mask)
                    else:
                        tl.store(target, first[i].to(out.dtype.element_ty), mask=mask)
                        tl.store(target + 1, second[i].to(out.dtype.element_ty), mask=mask & (second_row < row_count))

    return matmul_nf4_wgmma
