"""The Triton function of `nf4_matmul`, whose head says how it is laid out, and the PTX in it."""

import functools
from typing import no_type_check

import jax.numpy as jnp
import numpy as np

from jaxlora.kernels.gated import activation_kernel
from jaxlora.kernels.nf4_lookup import FACTORS, PAIRS, lookup_assembly, stack_kernel

MOST_TOKENS_OF_FOUR_COLUMNS = 2
# Shared memory, in bytes: the table of pairs, DYNAMIC_MAP behind it, what warps leave for each other, and x: all of it
# if it is normed here, or what each warp multiplies by in its turn.
MAP = 256 * 4


def _warp_sums(tokens: int) -> int:
    """Bytes that a warp leaves of a tile: four sums a lane, or one of the four lanes of a row together."""
    return 32 * (4 if tokens <= MOST_TOKENS_OF_FOUR_COLUMNS else 16)


def shared_bytes(num_warps: int, tokens: int, kept: int = 0) -> int:
    """The shared memory of a program; kept: elements of x, all tokens, that are there at once."""
    return PAIRS + MAP + num_warps * _warp_sums(tokens) + 2 * kept


def _kept(tokens: int) -> tuple[int, ...]:
    """Which of the four sums of a lane are any token's: of rows g and g + 8, columns 2 t and 2 t + 1 each."""
    return (0, 2) if tokens == 1 else (0, 1, 2, 3)


def _product_assembly(dtype: np.dtype, tokens: int) -> str:
    """PTX for 16 elements a lane: the totals that are `_kept`, from rows g, rows g + 8, x (8 registers each), the
    scales of both rows, and the totals so far."""
    kind = "bf16" if dtype == jnp.bfloat16 else "f16"
    kept = _kept(tokens)
    upper, lower, x, scales, before = (len(kept) + i for i in (0, 8, 16, 24, 26))
    lines = [".reg .f32 d<4>;", *(f"mov.f32 d{i}, 0f00000000;" for i in range(4))]
    for step in range(4):
        a = ", ".join(f"${i + 2 * step}" for i in (upper, lower, upper + 1, lower + 1))
        b = ", ".join(f"${i + 2 * step}" for i in (x, x + 1))
        lines.append(
            f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32 "
            f"{{d0, d1, d2, d3}}, {{{a}}}, {{{b}}}, {{d0, d1, d2, d3}};"
        )
    lines += [f"fma.rn.f32 ${n}, d{i}, ${scales + i // 2}, ${before + n};" for n, i in enumerate(kept)]
    return "{\n" + "\n".join(lines) + "\n}"


def _sum_assembly(num_warps: int, distance: int) -> str:
    """PTX for the sum $0 of the numbers at $1 that are so many bytes apart, one of each warp, if $2 is not 0."""
    lines = [".reg .f32 a;", ".reg .pred p;", "setp.ne.b32 p, $2, 0;", "mov.f32 $0, 0f00000000;"]
    lines.append("@p ld.shared.f32 $0, [$1];")
    for warp in range(1, num_warps):
        lines += [f"@p ld.shared.f32 a, [$1 + {distance * warp}];", "@p add.f32 $0, $0, a;"]
    return "{\n" + "\n".join(lines) + "\n}"


def _put_joined_assembly(tokens: int) -> str:
    """PTX that adds up a lane's totals, $2 and on, over the four lanes of a row, and puts at $1 the one that is of row
    g or g + 8 as bit 1, and of a token as bit 0, of the lane t says, the last argument."""
    kept = _kept(tokens)
    lines = [".reg .pred p;", ".reg .f32 give, got;", f".reg .b32 bit, t;\nmov.b32 t, ${2 + len(kept)};"]
    lines += [f".reg .f32 v{i};\nmov.f32 v{i}, ${2 + i};" for i in range(len(kept))]

    def join(first: str, second: str, bit: int) -> list[str]:
        """Of two lanes whose numbers differ in a bit, the one keeps the first and the other the second."""
        return [
            f"and.b32 bit, t, {bit};",
            "setp.ne.b32 p, bit, 0;",
            f"selp.f32 give, {first}, {second}, p;",
            f"selp.f32 {first}, {second}, {first}, p;",
            f"shfl.sync.bfly.b32 got, give, {bit}, 0x1f, 0xffffffff;",
            f"add.f32 {first}, {first}, got;",
        ]

    if tokens == 1:
        lines += join("v0", "v1", 2)
        lines += ["shfl.sync.bfly.b32 got, v0, 1, 0x1f, 0xffffffff;", "add.f32 v0, v0, got;"]
    else:
        lines += join("v0", "v1", 1) + join("v2", "v3", 1) + join("v0", "v2", 2)
    lines += ["bar.sync 0;", "st.shared.f32 [$1], v0;", "bar.sync 0;", "mov.b32 $0, $1;"]
    return "{\n" + "\n".join(lines) + "\n}"


@functools.cache
@no_type_check  # a type checker's wrapper around the function would hide its source from Triton
def kernel(dtype: np.dtype, num_warps: int, tokens: int, kept: int = 0):
    """The Triton function. Built on first use, since the library imports where Triton is not installed."""
    import triton
    import triton.language as tl

    activation, one_of_stack = activation_kernel(), stack_kernel()
    SUMS = len(_kept(tokens))  # of a lane
    narrow = tl.constexpr(tl.bfloat16 if dtype == jnp.bfloat16 else tl.float16)
    table_lookup = tl.constexpr(lookup_assembly())
    lookup_operands = tl.constexpr(",".join(["=&r"] * 8 + ["r"] * 3))
    product_assembly = tl.constexpr(_product_assembly(dtype, tokens))
    product_operands = tl.constexpr(",".join(["=&f"] * SUMS + ["r"] * 24 + ["f"] * (2 + SUMS)))
    unit = tl.constexpr(1.0 / FACTORS[dtype.name])
    MAP_AT = tl.constexpr(PAIRS)
    SUMS_AT = tl.constexpr(PAIRS + MAP)
    X_AT = tl.constexpr(shared_bytes(num_warps, tokens))
    table_assembly = tl.constexpr(
        f"{{ .shared .align 128 .b8 table[{shared_bytes(num_warps, tokens, kept)}];"
        " mov.u32 $0, table; add.u32 $0, $0, $1; }"
    )
    fill_assembly = tl.constexpr("st.shared.v4.b32 [$1], {$2, $2, $2, $2}; mov.b32 $0, $1;")
    fill_one_assembly = tl.constexpr("st.shared.f32 [$1], $2; mov.b32 $0, $1;")
    barrier_assembly = tl.constexpr("bar.sync 0; mov.b32 $0, $1;")
    read_assembly = tl.constexpr("ld.shared.f32 $0, [$1];")
    # Codes are read once, and must not drive out of the cache what is read by every program or every layer; the same
    # for L1 (no_allocate) cost 3%. What is not asked for is left as it was: its scale is 0.
    policy_assembly = tl.constexpr("createpolicy.fractional.L2::evict_first.b64 $0, 1.0;")
    load = "ld.global.L2::cache_hint"
    ask_two_assembly = tl.constexpr(f"{{ .reg .pred p; setp.ne.b32 p, $4, 0; @p {load}.v2.b32 {{$0, $1}}, [$2], $3; }}")
    ask_four_assembly = tl.constexpr(
        f"{{ .reg .pred p; setp.ne.b32 p, $6, 0; @p {load}.v4.b32 {{$0, $1, $2, $3}}, [$4], $5; }}"
    )
    ask_byte_assembly = tl.constexpr("{ .reg .pred p; setp.ne.b32 p, $2, 0; mov.b32 $0, 0; @p ld.global.u8 $0, [$1]; }")
    ask_float_assembly = tl.constexpr(
        "{ .reg .pred p; setp.ne.b32 p, $2, 0; mov.f32 $0, 0f00000000; @p ld.global.f32 $0, [$1]; }"
    )
    x_operands = tl.constexpr("=&r,=&r,=&r,=&r,l,r")
    x_assembly = tl.constexpr(
        "{ .reg .pred p; setp.ne.b32 p, $5, 0; mov.b32 $0, 0; mov.b32 $1, 0; mov.b32 $2, 0; mov.b32 $3, 0;"
        " @p ld.global.v4.b32 {$0, $1, $2, $3}, [$4]; }"
    )
    shared_x_assembly = tl.constexpr(
        "{ .reg .pred p; setp.ne.b32 p, $5, 0; mov.b32 $0, 0; mov.b32 $1, 0; mov.b32 $2, 0; mov.b32 $3, 0;"
        " @p ld.shared.v4.b32 {$0, $1, $2, $3}, [$4]; }"
    )
    keep_x_assembly = tl.constexpr(
        "{ .reg .pred p; setp.ne.b32 p, $6, 0; @p st.shared.v4.b32 [$1], {$2, $3, $4, $5}; mov.b32 $0, $1; }"
    )
    copy_assembly = tl.constexpr(
        "{ .reg .pred p; setp.ne.b32 p, $3, 0; @p cp.async.ca.shared.global [$1], [$2], 16; mov.b32 $0, $1; }"
    )
    # Nothing is read from memory across a barrier: else the assembler asks for half of the codes when x is normed.
    copied_assembly = tl.constexpr("bar.warp.sync 0xffffffff; cp.async.wait_all; mov.b32 $0, $1;")
    # All lanes see what any of a warp has copied, and have read what was there before.
    copied_by_warp_assembly = tl.constexpr("cp.async.wait_all; bar.warp.sync 0xffffffff; mov.b32 $0, $1;")
    put_joined_assembly = tl.constexpr(_put_joined_assembly(tokens))
    put_joined_operands = tl.constexpr(",".join(["=r", "r", *["f"] * SUMS, "r"]))
    put_assembly = tl.constexpr("bar.sync 0; st.shared.v4.f32 [$1], {$2, $3, $4, $5}; bar.sync 0; mov.b32 $0, $1;")
    sum_assembly = tl.constexpr(_sum_assembly(num_warps, _warp_sums(tokens)))
    square_sum_assembly = tl.constexpr(_sum_assembly(num_warps, 4))
    other_assembly = tl.constexpr("shfl.sync.bfly.b32 $0, $1, $2, 0x1f, 0xffffffff;")
    scale_assembly = tl.constexpr("shfl.sync.idx.b32 $0, $1, $2, 0x1c03, 0xffffffff;")  # among 4 lanes

    @triton.jit
    def filled_table(nf4, dynamic_map, thread, THREADS: tl.constexpr):
        """Shared memory of the program: 32 copies of each of the pairs, then the map. `barrier` makes them seen."""
        table = tl.inline_asm_elementwise(table_assembly, "=r,r", [thread * 0], dtype=tl.int32, is_pure=False, pack=1)
        values = ()
        for i in tl.static_range(2048 // THREADS):
            values = values + (tl.load(nf4 + (i * THREADS + thread) // 8),)
        for i in tl.static_range(256 // THREADS if THREADS < 256 else 1):
            at = (i * THREADS + thread) % 256
            value = tl.load(dynamic_map + at)
            place = table + MAP_AT + at * 4
            tl.inline_asm_elementwise(
                fill_one_assembly, "=r,r,f", [place, value], dtype=tl.int32, is_pure=False, pack=1
            )
        for i in tl.static_range(2048 // THREADS):
            place = table + (i * THREADS + thread) * 16
            tl.inline_asm_elementwise(
                fill_assembly, "=r,r,r", [place, values[i]], dtype=tl.int32, is_pure=False, pack=1
            )
        return table

    @triton.jit
    def barrier(table):
        return tl.inline_asm_elementwise(barrier_assembly, "=r,r", [table], dtype=tl.int32, is_pure=False, pack=1)

    @triton.jit
    def halves_at(tile, weights, WEIGHTS: tl.constexpr, GATED: tl.constexpr):
        """(codes, absmax, nested absmax, mean, out, rows) of the weight that rows g of a tile are of, and of that of
        rows g + 8; and the first row of each."""
        if GATED:
            return weights[0], weights[1], 8 * tile, 8 * tile
        weight = weights[0]
        for i in tl.static_range(1, WEIGHTS):
            is_later = tile >= weights[i][6]
            chosen = ()
            for j in tl.static_range(7):
                chosen = chosen + (tl.where(is_later, weights[i][j], weight[j]),)
            weight = chosen
        return weight, weight, 16 * (tile - weight[6]), 16 * (tile - weight[6]) + 8

    @triton.jit
    def inside(block, BLOCKS: tl.constexpr):
        """A block of a row; for what is beyond its last one, that, where four blocks may be partly beyond."""
        if BLOCKS % 4:
            return tl.minimum(block, BLOCKS - 1)
        return block

    @triton.jit
    def asked_codes(row, first, t, policy, is_asked, BLOCKS: tl.constexpr, SPREAD: tl.constexpr):
        """Begin to load a lane's 32 bytes of four blocks of a row: 8 words, in the order in which they are used."""
        words = ()
        if SPREAD:
            for i in tl.static_range(2):
                place = row + (inside(first + 2 * i + t // 2, BLOCKS) * 32 + t % 2 * 16)
                words = words + tl.inline_asm_elementwise(
                    ask_four_assembly,
                    "=r,=r,=r,=r,l,l,r",
                    [place, policy, is_asked],
                    dtype=(tl.uint32,) * 4,
                    is_pure=False,
                    pack=1,
                )
        else:
            for i in tl.static_range(4):
                place = row + (inside(first + i, BLOCKS) * 32 + t * 8)
                words = words + tl.inline_asm_elementwise(
                    ask_two_assembly,
                    "=r,=r,l,l,r",
                    [place, policy, is_asked],
                    dtype=(tl.uint32,) * 2,
                    is_pure=False,
                    pack=1,
                )
        return words

    @triton.jit
    def asked_statistics(absmax, nested_absmax, block, is_asked, NESTED: tl.constexpr):
        """Begin to load absmax, and nested absmax, of a block."""
        nested = 0.0
        if NESTED:
            place = nested_absmax + (block >> 8)
            nested = tl.inline_asm_elementwise(
                ask_float_assembly, "=f,l,r", [place, is_asked], dtype=tl.float32, is_pure=False, pack=1
            )
            value = tl.inline_asm_elementwise(
                ask_byte_assembly, "=r,l,r", [absmax + block, is_asked], dtype=tl.int32, is_pure=False, pack=1
            )
        else:
            value = tl.inline_asm_elementwise(
                ask_float_assembly, "=f,l,r", [absmax + block, is_asked], dtype=tl.float32, is_pure=False, pack=1
            )
        return value, nested

    @triton.jit
    def asked(
        tile, turn, weights, group, t, warp, policy, TILES: tl.constexpr, WEIGHTS: tl.constexpr, BLOCKS: tl.constexpr,
        WARPS: tl.constexpr, DEPTH: tl.constexpr, NESTED: tl.constexpr, SPREAD: tl.constexpr, GATED: tl.constexpr,
    ):  # fmt: skip
        """Begin to load what a turn needs: of each step the codes of rows g and g + 8, and their statistics."""
        above, below, row, lower_row = halves_at(tile, weights, WEIGHTS, GATED)
        upper = tl.minimum(row + group, above[5] - 1) * BLOCKS
        lower = tl.minimum(lower_row + group, below[5] - 1) * BLOCKS
        upper_codes, lower_codes = above[0] + upper * 32, below[0] + lower * 32
        steps = ()
        for i in tl.static_range(DEPTH):
            first = 4 * (warp + WARPS * (DEPTH * turn + i))
            is_asked = ((tile < TILES) & (first < BLOCKS)).to(tl.int32)
            steps = steps + (
                (
                    asked_codes(upper_codes, first, t, policy, is_asked, BLOCKS, SPREAD),
                    asked_codes(lower_codes, first, t, policy, is_asked, BLOCKS, SPREAD),
                    asked_statistics(above[1], above[2], upper + inside(first + t, BLOCKS), is_asked, NESTED),
                    asked_statistics(below[1], below[2], lower + inside(first + t, BLOCKS), is_asked, NESTED),
                ),
            )
        return steps

    @triton.jit
    def scale_of(statistics, is_inside, mean, table, NESTED: tl.constexpr):
        scale = statistics[0]
        if NESTED:
            place = table + (MAP_AT + scale * 4)
            value = tl.inline_asm_elementwise(read_assembly, "=f,r", [place], dtype=tl.float32, is_pure=True, pack=1)
            scale = value * statistics[1] + mean
        return tl.where(is_inside, scale, 0.0)

    @triton.jit
    def from_lane(value, lane):
        return tl.inline_asm_elementwise(
            scale_assembly, "=f,f,r", [value, lane], dtype=tl.float32, is_pure=True, pack=1
        )

    @triton.jit
    def elements(words, place, i: tl.constexpr):
        """The 16 elements whose codes are in words 2 i and 2 i + 1, as 8 words."""
        return tl.inline_asm_elementwise(
            table_lookup,
            lookup_operands,
            [words[2 * i], words[2 * i + 1], place],
            dtype=(tl.uint32,) * 8,
            is_pure=False,
            pack=1,
        )

    @triton.jit
    def asked_x(place, is_read):
        """16 bytes of x as 4 words, or zeros."""
        return tl.inline_asm_elementwise(
            x_assembly, x_operands, [place, is_read], dtype=(tl.uint32,) * 4, is_pure=False, pack=1
        )

    @triton.jit
    def shared_x(place, is_read):
        return tl.inline_asm_elementwise(
            shared_x_assembly,
            "=&r,=&r,=&r,=&r,r,r",
            [place, is_read],
            dtype=(tl.uint32,) * 4,
            is_pure=False,
            pack=1,
        )

    @triton.jit
    def operand(x, table, at, is_read, KEPT: tl.constexpr):
        """32 bytes of x from word `at` on, of all or of what is kept, as 8 words, or zeros."""
        is_read = is_read.to(tl.int32)
        if KEPT:
            place = table + (X_AT + 4 * at)
            return shared_x(place, is_read) + shared_x(place + 16, is_read)
        return asked_x(x + at, is_read) + asked_x(x + (at + 4), is_read)

    @triton.jit
    def keep(
        x, table, turn, warp, lane, M: tl.constexpr, COLUMNS: tl.constexpr, WARPS: tl.constexpr, DEPTH: tl.constexpr
    ):
        """Begin to copy what a warp multiplies by in a turn: of each step and token 512 bytes, 16 a lane."""
        for i in tl.static_range(DEPTH):
            vector = 32 * (warp + WARPS * (DEPTH * turn + i)) + lane  # of 8 elements
            for m in tl.static_range(M):
                tl.inline_asm_elementwise(
                    copy_assembly,
                    "=r,r,l,r",
                    [
                        table + (X_AT + 512 * ((warp * DEPTH + i) * M + m) + 16 * lane),
                        x + (m * (COLUMNS // 2) + 4 * vector),
                        (vector < COLUMNS // 8).to(tl.int32),
                    ],
                    dtype=tl.int32,
                    is_pure=False,
                    pack=1,
                )

    @triton.jit
    def numbers(word):
        """Both numbers of a word, float32."""
        low = (word & 0xFFFF).to(tl.uint16).to(narrow, bitcast=True).to(tl.float32)
        return low, (word >> 16).to(tl.uint16).to(narrow, bitcast=True).to(tl.float32)

    @triton.jit
    def word_of(low, high):
        low = low.to(narrow).to(tl.uint16, bitcast=True).to(tl.uint32)
        return low | high.to(narrow).to(tl.uint16, bitcast=True).to(tl.uint32) << 16

    @triton.jit
    def gained(normed, gain, OFFSET: tl.constexpr):
        if OFFSET == 0.0:
            return normed.to(narrow).to(tl.float32) * gain
        return normed * (gain + OFFSET)

    @triton.jit
    def asked_rows(x, thread, M: tl.constexpr, COLUMNS: tl.constexpr, THREADS: tl.constexpr):
        """Begin to load all of x: for every 16 bytes of a row, those of each token."""
        rows = ()
        for i in tl.static_range((COLUMNS // 8 + THREADS - 1) // THREADS):
            vector = i * THREADS + thread
            of_tokens = ()
            for m in tl.static_range(M):
                at = m * (COLUMNS // 2) + 4 * vector
                of_tokens = of_tokens + (asked_x(x + at, (vector < COLUMNS // 8).to(tl.int32)),)
            rows = rows + (of_tokens,)
        return rows

    @triton.jit
    def copy_gain(gain, table, thread, COLUMNS: tl.constexpr, THREADS: tl.constexpr):
        """Begin to copy the norm's weight to where x will be. Only the thread that copied 16 bytes may read them."""
        for i in tl.static_range((COLUMNS // 8 + THREADS - 1) // THREADS):
            vector = i * THREADS + thread
            is_read = (vector < COLUMNS // 8).to(tl.int32)
            tl.inline_asm_elementwise(
                copy_assembly,
                "=r,r,l,r",
                [table + (X_AT + 16 * vector), gain + 4 * vector, is_read],
                dtype=tl.int32,
                is_pure=False,
                pack=1,
            )

    @triton.jit
    def put_squares(rows, table, thread, M: tl.constexpr, VECTORS: tl.constexpr, WARPS: tl.constexpr):
        """Leave a warp's sum of the squares of each token for the others."""
        for m in tl.static_range(M):
            square = tl.zeros((32 * WARPS,), tl.float32)
            for i in tl.static_range(VECTORS):
                for j in tl.static_range(4):
                    low, high = numbers(rows[i][m][j])
                    square += low * low + high * high
            for distance in tl.static_range(5):
                square = square + from_other(square, 1 << distance)
            place = table + (SUMS_AT + 4 * (m * WARPS + thread // 32))
            tl.inline_asm_elementwise(
                fill_one_assembly, "=r,r,f", [place, square], dtype=tl.int32, is_pure=False, pack=1
            )

    @triton.jit
    def keep_normed(
        rows, table, thread, M: tl.constexpr, COLUMNS: tl.constexpr, WARPS: tl.constexpr, EPS: tl.constexpr,
        OFFSET: tl.constexpr,
    ):  # fmt: skip
        """Put the rows, normed, where `operand` reads them."""
        table = tl.inline_asm_elementwise(copied_assembly, "=r,r", [table], dtype=tl.int32, is_pure=False, pack=1)
        scales = ()
        for m in tl.static_range(M):
            total = summed(table + (SUMS_AT + 4 * m * WARPS), thread >= 0, square_sum_assembly)
            scales = scales + (tl.rsqrt(total / COLUMNS + EPS),)
        for i in tl.static_range((COLUMNS // 8 + 32 * WARPS - 1) // (32 * WARPS)):
            vector = i * 32 * WARPS + thread
            is_read = (vector < COLUMNS // 8).to(tl.int32)
            gain = shared_x(table + (X_AT + 16 * vector), is_read)
            for m in tl.static_range(M):
                words = ()
                for j in tl.static_range(4):
                    low, high = numbers(rows[i][m][j])
                    low_gain, high_gain = numbers(gain[j])
                    low, high = gained(low * scales[m], low_gain, OFFSET), gained(high * scales[m], high_gain, OFFSET)
                    words = words + (word_of(low, high),)
                tl.inline_asm_elementwise(
                    keep_x_assembly,
                    "=r,r,r,r,r,r,r",
                    (table + (X_AT + m * (2 * COLUMNS) + 16 * vector),) + words + (is_read,),
                    dtype=tl.int32,
                    is_pure=False,
                    pack=1,
                )
        return barrier(table)

    @triton.jit
    def product(upper, lower, x, upper_scale, lower_scale, total):
        return tl.inline_asm_elementwise(
            product_assembly,
            product_operands,
            upper + lower + x + (upper_scale, lower_scale) + total,
            dtype=(tl.float32,) * len(total),
            is_pure=True,
            pack=1,
        )

    @triton.jit
    def summed(place, is_summed, assembly: tl.constexpr):
        """The sum over warps of what each has put at its place, or zero."""
        return tl.inline_asm_elementwise(
            assembly, "=&f,r,r", [place, is_summed.to(tl.int32)], dtype=tl.float32, is_pure=False, pack=1
        )

    @triton.jit
    def from_other(value, distance: tl.constexpr):
        return tl.inline_asm_elementwise(
            other_assembly, "=f,f,r", [value, distance], dtype=tl.float32, is_pure=True, pack=1
        )

    @triton.jit
    def owned(number, thread, row, lower_row, rows, M: tl.constexpr, SPREAD: tl.constexpr, GATED: tl.constexpr):
        """(token, row of the weight, whether this thread stores) of a warp's sum of that number: bit 0 says which of
        two tokens it is of, bit 1 whether it is of rows g + 8."""
        m, is_lower = number % 2, number % 4 >= 2
        g = number // 4
        if not SPREAD:
            m, g = m + g % 4 * 2, g // 4
        n = g + tl.where(is_lower, lower_row, row)
        is_own = (thread < (32 if SPREAD else 128)) & (m < M) & (n < rows)
        return m, n, is_own & (is_lower == 0) if GATED else is_own

    @triton.jit
    def matmul_nf4(
        x,  # [M, COLUMNS]
        nf4,  # uint32 [256], `pairs`
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
        gain,  # [COLUMNS], or a stack of such if GAIN_STACKED; this and the next unread unless NORM
        gain_index,  # int32 []
        residual,  # [M, ROWS0]; unread unless HAS_RESIDUAL
        out0,  # [M, rows]
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
        DEPTH: tl.constexpr,  # steps that a warp takes in one turn
        PROGRAMS: tl.constexpr,
        SPREAD: tl.constexpr,  # a token is four columns of a product
        STAGED: tl.constexpr,  # each warp keeps what it multiplies by in its turn
        NORM: tl.constexpr,  # x is normed first
        EPS: tl.constexpr,
        OFFSET: tl.constexpr,
        GAIN_STACKED: tl.constexpr,
        ACT: tl.constexpr,  # "", or out0 is ACT(x W0^T) * x W1^T
        HAS_RESIDUAL: tl.constexpr,  # out0 is residual + MULTIPLIER * x W0^T
        MULTIPLIER: tl.constexpr,
    ):
        THREADS: tl.constexpr = 32 * WARPS
        BLOCKS: tl.constexpr = COLUMNS // 64  # of a row
        TURNS: tl.constexpr = (BLOCKS + 4 * WARPS * DEPTH - 1) // (4 * WARPS * DEPTH)
        FIRST: tl.constexpr = (ROWS0 + 15) // 16  # tiles before those of the second weight
        SECOND: tl.constexpr = FIRST + (ROWS1 + 15) // 16
        GATED: tl.constexpr = ACT != ""
        TILES: tl.constexpr = (ROWS0 + 7) // 8 if GATED else SECOND + (ROWS2 + 15) // 16
        OF_WARP: tl.constexpr = 32 if SPREAD else 128  # of a tile that a warp leaves

        thread = tl.arange(0, THREADS)
        warp, lane = thread // 32, thread % 32
        group, t = lane // 4, lane % 4
        weights = (
            one_of_stack(codes0, absmax0, nested_absmax0, mean0, index0, out0, 0, ROWS0, BLOCKS, NESTED, STACKED),
        )
        if WEIGHTS > 1:
            weights = weights + (
                one_of_stack(
                    codes1, absmax1, nested_absmax1, mean1, index1, out1, FIRST, ROWS1, BLOCKS, NESTED, STACKED
                ),
            )
        if WEIGHTS > 2:
            weights = weights + (
                one_of_stack(
                    codes2, absmax2, nested_absmax2, mean2, index2, out2, SECOND, ROWS2, BLOCKS, NESTED, STACKED
                ),
            )
        x = x.to(tl.pointer_type(tl.uint32))
        rows = ()
        if NORM:
            rows = asked_rows(x, thread, M, COLUMNS, THREADS)
        # Before the first codes are asked for: the assembler waits for all that it has loaded at once.
        table = filled_table(nf4, dynamic_map, thread, THREADS)
        if STAGED:
            keep(x, table, 0, warp, lane, M, COLUMNS, WARPS, DEPTH)
        if NORM:
            if GAIN_STACKED:
                gain += tl.load(gain_index).to(tl.int64) * COLUMNS
            copy_gain(gain.to(tl.pointer_type(tl.uint32)), table, thread, COLUMNS, THREADS)
            put_squares(rows, table, thread, M, (COLUMNS // 8 + THREADS - 1) // THREADS, WARPS)
            table = barrier(table)
        policy = tl.inline_asm_elementwise(policy_assembly, "=l,r", [thread], dtype=tl.int64, is_pure=True, pack=1)
        start = tl.program_id(0)
        following = asked(
            start, 0, weights, group, t, warp,
            policy, TILES, WEIGHTS, BLOCKS, WARPS, DEPTH, NESTED, SPREAD, GATED,
        )  # fmt: skip
        table = keep_normed(rows, table, thread, M, COLUMNS, WARPS, EPS, OFFSET) if NORM else barrier(table)
        place = table + lane * 4
        zero = tl.zeros((THREADS,), tl.float32)
        for tile in range(start, TILES, PROGRAMS):
            above, below, row, lower_row = halves_at(tile, weights, WEIGHTS, GATED)
            total = zero, zero
            if M > 1:
                total = total + total
            befores = ()
            if HAS_RESIDUAL:
                for i in tl.static_range((OF_WARP + THREADS - 1) // THREADS):
                    number = (i * THREADS + thread) % OF_WARP
                    m, n, is_own = owned(number, thread, row, lower_row, above[5], M, SPREAD, GATED)
                    befores = befores + (tl.load(residual + (m * ROWS0 + n), mask=is_own, other=0.0),)
            for turn in range(TURNS):
                if STAGED:
                    table = tl.inline_asm_elementwise(
                        copied_by_warp_assembly, "=r,r", [table], dtype=tl.int32, is_pure=False, pack=1
                    )
                for depth in tl.static_range(DEPTH):
                    upper, lower, upper_statistics, lower_statistics = following[depth]
                    first = 4 * (warp + WARPS * (DEPTH * turn + depth))
                    upper_scale = scale_of(upper_statistics, first + t < BLOCKS, above[3], table, NESTED)
                    lower_scale = scale_of(lower_statistics, first + t < BLOCKS, below[3], table, NESTED)
                    for i in tl.static_range(4):
                        upper_elements, lower_elements = elements(upper, place, i), elements(lower, place, i)
                        if SPREAD:  # column g is token g % 2 in block g / 2
                            block = first + group // 2
                            is_read = (group // 2 == i // 2 * 2 + t // 2) & (group % 2 < M) & (block < BLOCKS)
                            at = t % 2 * 16 + i % 2 * 8
                            if STAGED:
                                at += 128 * ((warp * DEPTH + depth) * M + group % 2) + group // 2 * 32
                            else:
                                at += group % 2 * (COLUMNS // 2) + block * 32
                            scales = upper_scale, lower_scale
                        else:
                            block = first + i
                            is_read = (group < M) & (block < BLOCKS)
                            at = group * (COLUMNS // 2) + block * 32 + t * 8
                            lane_i = tl.full((THREADS,), i, tl.int32)
                            scales = from_lane(upper_scale, lane_i), from_lane(lower_scale, lane_i)
                        b = operand(x, table, at, is_read, NORM or STAGED)
                        total = product(upper_elements, lower_elements, b, *scales, total)
                is_last = turn == TURNS - 1
                if STAGED and TURNS > 1:
                    keep(x, table, tl.where(is_last, 0, turn + 1), warp, lane, M, COLUMNS, WARPS, DEPTH)
                following = asked(
                    tl.where(is_last, tile + PROGRAMS, tile), tl.where(is_last, 0, turn + 1), weights, group, t, warp,
                    policy, TILES, WEIGHTS, BLOCKS, WARPS, DEPTH, NESTED, SPREAD, GATED,
                )  # fmt: skip
            if SPREAD:
                tl.inline_asm_elementwise(
                    put_joined_assembly,
                    put_joined_operands,
                    (table + SUMS_AT + 4 * thread,) + total + (t,),
                    dtype=tl.int32,
                    is_pure=False,
                    pack=1,
                )
            else:
                tl.inline_asm_elementwise(
                    put_assembly,
                    "=r,r,f,f,f,f",
                    (table + SUMS_AT + 16 * thread,) + total,
                    dtype=tl.int32,
                    is_pure=False,
                    pack=1,
                )
            for i in tl.static_range((OF_WARP + THREADS - 1) // THREADS):
                number = (i * THREADS + thread) % OF_WARP
                m, n, is_own = owned(number, thread, row, lower_row, above[5], M, SPREAD, GATED)
                value = summed(table + SUMS_AT + 4 * number, thread < OF_WARP, sum_assembly) * unit
                if GATED:
                    value = value.to(narrow).to(tl.float32)
                    up = from_other(value, 2)
                    value = activation(value, ACT)[0].to(narrow).to(tl.float32) * up
                if HAS_RESIDUAL:
                    value = befores[i].to(tl.float32) + value.to(narrow).to(tl.float32) * MULTIPLIER
                target = above[4] + (m * above[5] + n)
                tl.store(target, value.to(target.dtype.element_ty), mask=is_own)

    return matmul_nf4
