"""Products with NF4 weights for few tokens: y = x W^T, dequantised inside the product, in one Triton kernel.

The maths, for x [M, in] and a weight [out, in] in blocks of 64 elements of a row:

    y[m, n] = sum over blocks b of   scale[n, b] * sum over k in b of   NF4[code[n, k]] * x[m, k]

NF4 is rounded to x's dtype, the products are exact, both sums are float32, and so are the scales: what is rounded is
the table, where dequantising first rounds every weight.

The lookup. At the speed of a copy an SM of an H100 must take 25 weights a cycle, for which it has 5 instructions each,
half of them in the integer unit. A byte holds two codes, and shared memory a table of 256 entries, each the two numbers
of a byte. Every entry is there 32 times, once in each bank, so that a warp's lanes never wait for each other: lane l
reads at 128 * byte + 4 * l. `dp4a` adds up products of bytes, so it makes that address of any byte of a word in one
instruction: two instructions for two weights, and the register that is read is an operand of the tensor cores.

The layout. A warp takes 16 rows of the weight and, a step, 4 blocks of each, and multiplies them with `mma.m16n8k16`,
whose operands it loads straight to the lanes where the tensor cores want them. In it lane 4 g + t holds elements of
rows g and g + 8 of the weight, elements of column g of x^T, and the sums of both rows with columns 2 t and 2 t + 1. The
order of k is free as long as both operands agree on it. A block's sum is multiplied by its scale and added to the
total.

  * Tokens are the columns, 8 a tile. The four lanes of a row share each block: lane t takes 8 bytes of it, elements
    16 t .. 16 t + 15, and another lane's scale.
  * Of one or two tokens that would leave columns empty. So each is four columns, one for each block of a step, and has
    zeros outside its block. Then a lane may take any bytes, 16 in a row twice, and its two sums are those of one block,
    whose scale it read itself.

The stream. At the copy's speed and a latency of 1 us, 23 KB must be on their way to an SM at any time. A warp asks for
the 2 KB of its next step as soon as it has looked up those of this one, into the same registers, so that 16 or 32 warps
have 32 or 64 KB asked for or waiting to be multiplied. (More than that for one warp, in registers or by asynchronous
copies, gains little: the assembler waits for all loads at once, and a ring has no room beside the table.) Programs are
as many as an SM holds at once: each fills its table once and takes every n-th tile of 16 rows, and asks for the first
step of the next tile before it adds up this one. The warps of a program share its rows and divide k. No atomics: a
result never varies.

Triton does the addresses. It holds all values as tensors of one element a thread, whose layout is the only one there is
for such a shape, and inline PTX does what is done across threads.
"""

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import no_type_check

import jax
import jax.numpy as jnp
import numpy as np

from jaxlora.kernels import reference
from jaxlora.kernels.reference import NF4Fields

# What NF4 is multiplied by before it is rounded to 16 bits, and the sum divided by at the end: with these its entries
# lie near numbers of the dtype, and the error of weights that are normally distributed is least. It is 8.0e-4 in
# bfloat16 and 8.4e-5 in float16, relative, where dequantising first has 1.7e-3 and 2.1e-4.
FACTORS = {"bfloat16": 1.43675, "float16": 1.6385}
MOST_TOKENS = 8  # more are `nf4_matmul_tiles`', since here every 16 rows read all of x again
MOST_WEIGHTS = 3
MOST_TOKENS_OF_FOUR_COLUMNS = 2
SMS = 132  # of an H100; elsewhere some have a program more to do than others
# Shared memory, in bytes: the table of pairs, DYNAMIC_MAP behind it, and then what warps leave for each other.
PAIRS = 256 * 32 * 4
MAP = 256 * 4


@dataclass(frozen=True, kw_only=True)
class Config:
    """How the kernel is laid out on the device; no field changes a result but for the order of its sums.

    Attributes:
      num_warps: warps of a program, among which k is divided: 1, 2, 4, 8 or 16.
      depth: steps, of 2 KB, that a warp asks for at once; each takes 16 registers.
      programs: programs of a launch at most.
    """

    num_warps: int = 16
    depth: int = 1
    programs: int = 2 * SMS

    def __post_init__(self):
        if self.num_warps not in (1, 2, 4, 8, 16):
            raise ValueError(f"num_warps must be 1, 2, 4, 8 or 16, not {self.num_warps}")
        for field in ("depth", "programs"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field} must be 1 or more, not {getattr(self, field)}")


def heuristics(tokens: int, tiles: int, columns: int) -> Config:
    """The configuration for so many tokens, tiles of 16 rows, and elements of a row; with it no warp is idle.

    By its registers an SM holds two programs of 16 warps with 64 a thread, as one or two tokens take where rows are
    whole steps, or three of 8 warps with 80; of more tokens two of 8 warps. On an H100, at one token, q, k
    and v of an 8B (384 tiles) took 9.5 us with three programs and 10.3 with two, which some SMs must fill twice; o
    (256) 7.8 and 7.4, gate and up (1792) 28.9 and 27.9, down 17.8 and 17.5.
    """
    config = Config() if tokens <= MOST_TOKENS_OF_FOUR_COLUMNS else Config(num_warps=8)
    if config.programs < tiles <= 3 * SMS:
        config = Config(num_warps=8, programs=3 * SMS)
    num_warps, steps = config.num_warps, -(-columns // (4 * reference.NF4_BLOCK))
    while num_warps > steps:
        num_warps //= 2
    return dataclasses.replace(config, num_warps=num_warps)


def shared_bytes(num_warps: int) -> int:
    """The shared memory of a program. What needs no asking for is 48 KB."""
    return PAIRS + MAP + num_warps * 32 * 16


def pairs(dtype: np.dtype) -> np.ndarray:
    """The two elements of every byte, times the factor of a 16-bit dtype: uint32 [256]. The high nibble comes first."""
    table = (reference.NF4 * np.float32(FACTORS[dtype.name])).astype(dtype).view(np.uint16).astype(np.uint32)
    byte = np.arange(256)
    return table[byte & 15] << 16 | table[byte >> 4]


def _lookup_assembly() -> str:
    """PTX for the codes $8, $9 and a lane's place in the table, $10: their 16 elements, two a register, $0..$7."""
    # Nothing is read from memory across the barrier: else the assembler looks up all of a step at once, and has no
    # registers left.
    lines = [".reg .b32 at;", "bar.warp.sync 0xffffffff;"]
    for i in range(8):
        lines += [f"dp4a.u32.u32 at, ${8 + i // 4}, {128 << 8 * (i % 4):#x}, $10;", f"ld.shared.b32 ${i}, [at];"]
    return "{\n" + "\n".join(lines) + "\n}"


def _product_assembly(dtype: np.dtype) -> str:
    """PTX for 16 elements a lane: totals $0..$3 from rows g $4..$11 and g + 8 $12..$19, x $20..$27, scales $28, $29,
    and the totals so far $30..$33."""
    kind = "bf16" if dtype == jnp.bfloat16 else "f16"
    lines = [".reg .f32 d<4>;", *(f"mov.f32 d{i}, 0f00000000;" for i in range(4))]
    for step in range(4):
        a = ", ".join(f"${i + 2 * step}" for i in (4, 12, 5, 13))
        b = ", ".join(f"${i + 2 * step}" for i in (20, 21))
        lines.append(
            f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32 "
            f"{{d0, d1, d2, d3}}, {{{a}}}, {{{b}}}, {{d0, d1, d2, d3}};"
        )
    lines += [f"fma.rn.f32 ${i}, d{i}, ${28 + i // 2}, ${30 + i};" for i in range(4)]
    return "{\n" + "\n".join(lines) + "\n}"


def _sum_assembly(num_warps: int) -> str:
    """PTX for the sum $0 of the numbers at $1 that are 512 bytes apart, one of each warp."""
    lines = [".reg .f32 a;", "ld.shared.f32 $0, [$1];"]
    for warp in range(1, num_warps):
        lines += [f"ld.shared.f32 a, [$1 + {512 * warp}];", "add.f32 $0, $0, a;"]
    return "{\n" + "\n".join(lines) + "\n}"


@functools.cache
@no_type_check  # a type checker's wrapper around the function would hide its source from Triton
def _kernel(dtype: np.dtype, num_warps: int):
    """The Triton function. Built on first use, since the library imports where Triton is not installed."""
    import triton
    import triton.language as tl

    lookup_assembly = tl.constexpr(_lookup_assembly())
    lookup_operands = tl.constexpr(",".join(["=&r"] * 8 + ["r"] * 3))
    product_assembly = tl.constexpr(_product_assembly(dtype))
    product_operands = tl.constexpr(",".join(["=&f"] * 4 + ["r"] * 24 + ["f"] * 6))
    unit = tl.constexpr(1.0 / FACTORS[dtype.name])
    MAP_AT = tl.constexpr(PAIRS)
    SUMS_AT = tl.constexpr(PAIRS + MAP)
    table_assembly = tl.constexpr(
        f"{{ .shared .align 128 .b8 table[{shared_bytes(num_warps)}]; mov.u32 $0, table; add.u32 $0, $0, $1; }}"
    )
    fill_assembly = tl.constexpr("st.shared.v4.b32 [$1], {$2, $2, $2, $2}; mov.b32 $0, $1;")
    fill_one_assembly = tl.constexpr("st.shared.f32 [$1], $2; mov.b32 $0, $1;")
    filled_assembly = tl.constexpr("bar.sync 0; mov.b32 $0, $1;")
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
    put_assembly = tl.constexpr("bar.sync 0; st.shared.v4.f32 [$1], {$2, $3, $4, $5}; bar.sync 0; mov.b32 $0, $1;")
    sum_assembly = tl.constexpr(_sum_assembly(num_warps))
    other_assembly = tl.constexpr("shfl.sync.bfly.b32 $0, $1, $2, 0x1f, 0xffffffff;")
    scale_assembly = tl.constexpr("shfl.sync.idx.b32 $0, $1, $2, 0x1c03, 0xffffffff;")  # among 4 lanes

    @triton.jit
    def filled_table(nf4, dynamic_map, thread, THREADS: tl.constexpr):
        """Shared memory of the program: 32 copies of each of the pairs, then the map."""
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
        return tl.inline_asm_elementwise(filled_assembly, "=r,r", [table], dtype=tl.int32, is_pure=False, pack=1)

    @triton.jit
    def one_of_stack(
        codes, absmax, nested_absmax, mean, index, out, before: tl.constexpr, ROWS: tl.constexpr, BLOCKS: tl.constexpr,
        NESTED: tl.constexpr, STACKED: tl.constexpr,
    ):  # fmt: skip
        """(codes, absmax, nested absmax, mean, out, rows, tiles before its first) of a weight."""
        if STACKED:
            layer = tl.load(index).to(tl.int64)
            codes += layer * (ROWS * (BLOCKS * 32))
            absmax += layer * (ROWS * BLOCKS)
            nested_absmax += layer * ((ROWS * BLOCKS + 255) // 256)
            mean += layer
        value = 0.0
        if NESTED:
            value = tl.load(mean)
        return codes, absmax, nested_absmax, value, out, ROWS, before

    @triton.jit
    def weight_at(tile, weights, WEIGHTS: tl.constexpr):
        """(codes, absmax, nested absmax, mean, out, rows) of the weight that a tile is of, and the tile's first row."""
        codes, absmax, nested_absmax, mean, out, rows, before = weights[0]
        for i in tl.static_range(1, WEIGHTS):
            is_later = tile >= weights[i][6]
            codes = tl.where(is_later, weights[i][0], codes)
            absmax = tl.where(is_later, weights[i][1], absmax)
            nested_absmax = tl.where(is_later, weights[i][2], nested_absmax)
            mean = tl.where(is_later, weights[i][3], mean)
            out = tl.where(is_later, weights[i][4], out)
            rows = tl.where(is_later, weights[i][5], rows)
            before = tl.where(is_later, weights[i][6], before)
        return (codes, absmax, nested_absmax, mean, out, rows), 16 * (tile - before)

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
        WARPS: tl.constexpr, DEPTH: tl.constexpr, NESTED: tl.constexpr, SPREAD: tl.constexpr,
    ):  # fmt: skip
        """Begin to load what a turn needs: of each step the codes of rows g and g + 8, and their statistics."""
        weight, row = weight_at(tile, weights, WEIGHTS)
        upper = tl.minimum(row + group, weight[5] - 1) * BLOCKS
        lower = tl.minimum(row + 8 + group, weight[5] - 1) * BLOCKS
        upper_row, lower_row = weight[0] + upper * 32, weight[0] + lower * 32
        steps = ()
        for i in tl.static_range(DEPTH):
            first = 4 * (warp + WARPS * (DEPTH * turn + i))
            is_asked = ((tile < TILES) & (first < BLOCKS)).to(tl.int32)
            steps = steps + (
                (
                    asked_codes(upper_row, first, t, policy, is_asked, BLOCKS, SPREAD),
                    asked_codes(lower_row, first, t, policy, is_asked, BLOCKS, SPREAD),
                    asked_statistics(weight[1], weight[2], upper + inside(first + t, BLOCKS), is_asked, NESTED),
                    asked_statistics(weight[1], weight[2], lower + inside(first + t, BLOCKS), is_asked, NESTED),
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
            lookup_assembly,
            lookup_operands,
            [words[2 * i], words[2 * i + 1], place],
            dtype=(tl.uint32,) * 8,
            is_pure=False,
            pack=1,
        )

    @triton.jit
    def operand(place, is_read):
        """32 bytes of x as 8 words, or zeros."""
        a = tl.inline_asm_elementwise(
            x_assembly, x_operands, [place, is_read], dtype=(tl.uint32,) * 4, is_pure=False, pack=1
        )
        b = tl.inline_asm_elementwise(
            x_assembly, x_operands, [place + 4, is_read], dtype=(tl.uint32,) * 4, is_pure=False, pack=1
        )
        return a + b

    @triton.jit
    def product(upper, lower, x, upper_scale, lower_scale, total):
        return tl.inline_asm_elementwise(
            product_assembly,
            product_operands,
            upper + lower + x + (upper_scale, lower_scale) + total,
            dtype=(tl.float32,) * 4,
            is_pure=True,
            pack=1,
        )

    @triton.jit
    def summed(place):
        """The sum over warps of what each has put at its place."""
        return tl.inline_asm_elementwise(sum_assembly, "=&f,r", [place], dtype=tl.float32, is_pure=False, pack=1)

    @triton.jit
    def from_other(value, distance: tl.constexpr):
        return tl.inline_asm_elementwise(
            other_assembly, "=f,f,r", [value, distance], dtype=tl.float32, is_pure=True, pack=1
        )

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
    ):
        THREADS: tl.constexpr = 32 * WARPS
        BLOCKS: tl.constexpr = COLUMNS // 64  # of a row
        TURNS: tl.constexpr = (BLOCKS + 4 * WARPS * DEPTH - 1) // (4 * WARPS * DEPTH)
        FIRST: tl.constexpr = (ROWS0 + 15) // 16  # tiles before those of the second weight
        SECOND: tl.constexpr = FIRST + (ROWS1 + 15) // 16
        TILES: tl.constexpr = SECOND + (ROWS2 + 15) // 16
        COLUMN_TILES: tl.constexpr = 1 if SPREAD else (M + 7) // 8

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
        policy = tl.inline_asm_elementwise(policy_assembly, "=l,r", [thread], dtype=tl.int64, is_pure=True, pack=1)
        start = tl.program_id(0)
        following = asked(
            start, 0, weights, group, t, warp,
            policy, TILES, WEIGHTS, BLOCKS, WARPS, DEPTH, NESTED, SPREAD,
        )  # fmt: skip
        table = filled_table(nf4, dynamic_map, thread, THREADS)
        place = table + lane * 4
        x = x.to(tl.pointer_type(tl.uint32))
        zero = tl.zeros((THREADS,), tl.float32)
        for tile in range(start, TILES, PROGRAMS):
            weight, row = weight_at(tile, weights, WEIGHTS)
            totals = ((zero, zero, zero, zero),) * COLUMN_TILES
            for turn in range(TURNS):
                for depth in tl.static_range(DEPTH):
                    upper, lower, upper_statistics, lower_statistics = following[depth]
                    first = 4 * (warp + WARPS * (DEPTH * turn + depth))
                    upper_scale = scale_of(upper_statistics, first + t < BLOCKS, weight[3], table, NESTED)
                    lower_scale = scale_of(lower_statistics, first + t < BLOCKS, weight[3], table, NESTED)
                    for i in tl.static_range(4):
                        upper_elements, lower_elements = elements(upper, place, i), elements(lower, place, i)
                        sums = totals
                        totals = ()
                        for j in tl.static_range(COLUMN_TILES):
                            if SPREAD:  # column g is token g % 2 in block g / 2
                                block = first + group // 2
                                is_read = (group // 2 == i // 2 * 2 + t // 2) & (group % 2 < M) & (block < BLOCKS)
                                at = group % 2 * (COLUMNS // 2) + block * 32 + (t % 2 * 16 + i % 2 * 8)
                                scales = upper_scale, lower_scale
                            else:
                                block = first + i
                                is_read = (8 * j + group < M) & (block < BLOCKS)
                                at = (8 * j + group) * (COLUMNS // 2) + block * 32 + t * 8
                                lane_i = tl.full((THREADS,), i, tl.int32)
                                scales = from_lane(upper_scale, lane_i), from_lane(lower_scale, lane_i)
                            b = operand(x + at, is_read.to(tl.int32))
                            totals = totals + (product(upper_elements, lower_elements, b, *scales, sums[j]),)
                is_last = turn == TURNS - 1
                following = asked(
                    tl.where(is_last, tile + PROGRAMS, tile), tl.where(is_last, 0, turn + 1), weights, group, t, warp,
                    policy, TILES, WEIGHTS, BLOCKS, WARPS, DEPTH, NESTED, SPREAD,
                )  # fmt: skip
            for j in tl.static_range(COLUMN_TILES):
                tl.inline_asm_elementwise(
                    put_assembly,
                    "=r,r,f,f,f,f",
                    [table + SUMS_AT + 16 * thread] + totals[j],
                    dtype=tl.int32,
                    is_pure=False,
                    pack=1,
                )
                for i in tl.static_range(1 if WARPS >= 4 else 4 // WARPS):
                    number = (i * THREADS + thread) % 128  # of the four sums of each lane
                    value = summed(table + SUMS_AT + 4 * number)
                    n, m = number // 16 + number % 4 // 2 * 8, number % 2
                    if SPREAD:
                        value = value + from_other(value, 4)
                        value = value + from_other(value, 8)
                        is_inside = (number % 16 < 4) & (m < M)
                    else:
                        m = m + 8 * j + number % 16 // 4 * 2
                        is_inside = m < M
                    is_inside = is_inside & (thread < 128) & (row + n < weight[5])
                    target = weight[4] + (m * weight[5] + row + n)
                    tl.store(target, (value * unit).to(target.dtype.element_ty), mask=is_inside)

    return matmul_nf4


def check(x: jax.Array, weights: Sequence[NF4Fields], shapes: Sequence[tuple[int, int]], most_tokens: int) -> None:
    """Raise NotImplementedError where a kernel for so many tokens cannot multiply these, or jax-triton is missing."""
    tokens, columns = x.shape
    if x.dtype not in (jnp.bfloat16, jnp.float16):
        raise NotImplementedError(f"the kernel takes bfloat16 or float16, not {x.dtype.name}")
    if not 0 < tokens <= most_tokens:
        raise NotImplementedError(f"the kernel takes 1 to {most_tokens} tokens, not {tokens}")
    if columns % reference.NF4_BLOCK:
        raise NotImplementedError(f"the kernel takes rows of whole blocks of 64, not of {columns} elements")
    if not 0 < len(weights) <= MOST_WEIGHTS:
        raise NotImplementedError(f"the kernel takes 1 to {MOST_WEIGHTS} weights, not {len(weights)}")
    if max(rows * columns for rows, _ in shapes) >= 1 << 31:
        raise NotImplementedError(f"the kernel counts elements in 32 bits, too few for {list(shapes)}")
    if any(len({fields[i] is None for fields in weights}) > 1 for i in (2, 4)):
        raise NotImplementedError("the kernel takes weights that are all quantised twice or none, all stacked or none")
    try:
        import jax_triton  # noqa: F401
    except ImportError as error:
        raise NotImplementedError(f"the kernel needs jax-triton and triton ({error})") from error


def filled(codes, absmax, nested_absmax, offset, index) -> tuple[jax.Array, ...]:
    """The fields of a weight, with something that is not read for those it does not have."""
    unread = jnp.zeros((1,), jnp.float32)
    return (
        codes,
        absmax,
        unread if nested_absmax is None else nested_absmax,
        unread if offset is None else offset,
        jnp.zeros((), jnp.int32) if index is None else index,
    )


def matmul_nf4(
    x: jax.Array,
    weights: Sequence[NF4Fields],
    *,
    shapes: Sequence[tuple[int, int]],
    config: Config | None = None,
) -> list[jax.Array]:
    """`reference.matmul_nf4` as a Triton kernel: the same arguments; the results are nearer to the exact ones.

    Up to three weights are multiplied in one launch. It may be vmapped (which loops) and is not differentiable.

    Raises:
      NotImplementedError: jax-triton is not installed; x is none of bfloat16 and float16 or has more than `MOST_TOKENS`
        rows; rows of a weight are not whole blocks (in % 64), or it has 2^31 elements or more; there are more than
        three weights, or some are quantised twice or stacked and others are not.
    """
    check(x, weights, shapes, MOST_TOKENS)
    import jax_triton

    tokens, columns = x.shape
    rows = [rows for rows, _ in shapes]
    tiles = sum(-(-n // 16) for n in rows)
    config = heuristics(tokens, tiles, columns) if config is None else config
    padding = [0] * (MOST_WEIGHTS - len(rows))
    call = functools.partial(
        jax_triton.triton_call,
        kernel=_kernel(x.dtype, config.num_warps),
        out_shape=[jax.ShapeDtypeStruct((tokens, max(n, 1)), x.dtype) for n in [*rows, *padding]],
        grid=(min(config.programs, tiles),),
        num_warps=config.num_warps,
        M=tokens,
        **{f"ROWS{i}": n for i, n in enumerate([*rows, *padding])},
        WEIGHTS=len(rows),
        COLUMNS=columns,
        NESTED=weights[0][2] is not None,
        STACKED=weights[0][4] is not None,
        WARPS=config.num_warps,
        DEPTH=config.depth,
        PROGRAMS=config.programs,
        SPREAD=tokens <= MOST_TOKENS_OF_FOUR_COLUMNS,
    )

    @jax.custom_batching.sequential_vmap
    def run(x, weights):
        constants = jnp.asarray(pairs(x.dtype)), jnp.asarray(reference.DYNAMIC_MAP)
        return call(x, *constants, *(field for fields in weights for field in fields))[: len(rows)]

    some = [filled(*fields) for fields in weights]
    return run(x, [*some, *(some[0] for _ in padding)])
