"""Products with NF4 weights for more tokens than a few: `nf4_matmul` with tiles of 256 rows, in one Triton kernel.

The maths and the lookup are those of `nf4_matmul`: a byte of two codes is looked up in a table of pairs that shared
memory holds 32 times, NF4 is rounded to x's dtype, and a block's sum, float32, is multiplied by its scale.

Why another kernel. x no longer fits beside the tensor cores. A program of 16 rows reads all of it, 512 KB for 64 tokens
of 4096 elements, and 1792 such programs read 0.9 GB out of L2: 165 us on an H100, for weights whose bytes take 21. So a
program here has many rows, 32 a warp, and all of its warps go through k together: a block of x, [tokens, 64], comes
into shared memory once for all of them.

The layout. A warp looks up its 32 rows of a block, which are the left operands of `mma.m16n8k16`, 32 registers, and
multiplies them with 8 tokens at a time, which are 8 registers out of shared memory. A row of x's tile is 128 bytes, a
token; lane 4 g + t takes 32 of them, of token 8 j + g, which are the elements 16 t .. 16 t + 15 that it has of the
weight. Its two pieces of 16 bytes change places in every other token, so that no bank is asked twice.

What that costs an SM, for 256 rows, 64 elements and 64 tokens: 512 products on tensor cores (800 to 1000 cycles without
`wgmma`), and of shared memory, which gives 128 bytes a cycle, 512 cycles for x, 256 for lookups and 64 for writing x.
Each would lie under the other, if all went well, which is 35 us for the 28672 rows of an 8B's gate and up; an H100 took
75 (2026-11-26; q, k and v 29, o 18, down 43, with the sums of parts). 16 rows a warp would read x twice as often.

The stream. x's next block is on its way, by asynchronous copies into a second buffer, while this one is multiplied; so
are the codes of the next block, in registers that were just looked up. Neither is far enough ahead for the device's
memory, but enough for L2: there each warp asks for the lines of its codes some steps of 4 blocks before.

Where tiles are fewer than SMs, k is split among programs, each of which writes its sums in float32. What reads the
result next adds them up, where it can (`parts`), and else XLA. No atomics: a result never varies.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, no_type_check

import jax
import jax.numpy as jnp
import numpy as np

from jaxlora.kernels import nf4_lookup, nf4_matmul, reference
from jaxlora.kernels.graph_call import triton_call
from jaxlora.kernels.h100 import SMS
from jaxlora.kernels.nf4_lookup import FACTORS, PAIRS
from jaxlora.kernels.nf4_matmul import MOST_WEIGHTS
from jaxlora.kernels.parts import Parts
from jaxlora.kernels.reference import InputNorm, NF4Fields, Residual

MOST_TOKENS = 64
ROWS_OF_WARP = 32
STEP = 4  # blocks, a line of 128 bytes of codes


@dataclass(frozen=True, kw_only=True)
class Config:
    """How the kernel is laid out on the device; no field changes a result but for the order of its sums.

    Attributes:
      num_warps: warps of a program, each with 32 rows of its tile: 1, 2, 4 or 8.
      split: programs among which k is divided.
      ahead: steps, of 256 elements of k, that codes are fetched into L2 before they are read; 0 for not at all.
    """

    num_warps: int = 8
    split: int = 1
    ahead: int = 2

    def __post_init__(self):
        if self.num_warps not in (1, 2, 4, 8):
            raise ValueError(f"num_warps must be 1, 2, 4 or 8, not {self.num_warps}")
        if self.split < 1:
            raise ValueError(f"split must be 1 or more, not {self.split}")
        if self.ahead < 0:
            raise ValueError(f"ahead must be 0 or more, not {self.ahead}")


def heuristics(rows: Sequence[int], columns: int) -> Config:
    """The configuration for weights of so many rows each: the split with which the last SM is done first.

    By its registers an SM holds one program of 8 warps, at 64 tokens. A program's start (its table, the first loads)
    costs as much as a step, 2 us, and so does the launch that adds up the parts of a split; of these XLA writes and
    reads 64 float32 for each row and part, out of L2.
    """
    num_warps = 8
    while num_warps > 1 and max(rows) <= ROWS_OF_WARP * num_warps // 2:
        num_warps //= 2
    tiles, steps = tiles_of(rows, num_warps), -(-columns // (STEP * reference.NF4_BLOCK))

    def cost(split: int) -> float:
        adding = 0 if split == 1 else 1 + split * sum(rows) / 24000
        return -(-tiles * split // SMS) * (-(-steps // split) + 1) + adding

    return Config(num_warps=num_warps, split=min(range(1, min(steps, 16) + 1), key=cost))


def tiles_of(rows: Sequence[int], num_warps: int) -> int:
    """Tiles of weights of so many rows each."""
    return sum(-(-n // (ROWS_OF_WARP * num_warps)) for n in rows)


def shared_bytes(tokens: int) -> int:
    """The shared memory of a program: the table of pairs, and two blocks of x. What needs no asking for is 48 KB."""
    return PAIRS + 2 * -(-tokens // 8) * 8 * 128


def _products_assembly(dtype: np.dtype, width: int) -> str:
    """PTX for a block of 32 rows and `width` tiles of 8 tokens: totals of each tile, 4 of rows g and g + 8, 4 of
    g + 16 and g + 24; the elements of those rows, 8 words each; x, 8 words a tile; 4 scales; the totals so far.

    Products that follow each other are those of different sums, so that none waits for the one before.
    """
    kind = "bf16" if dtype == jnp.bfloat16 else "f16"
    sums = [(tile, half) for tile in range(width) for half in range(2)]
    rows, x, scales = 8 * width, 8 * width + 32, 16 * width + 32
    before = scales + 4
    lines = [f".reg .f32 d<{8 * width}>;", *(f"mov.f32 d{i}, 0f00000000;" for i in range(8 * width))]
    for step in range(4):
        for tile, half in sums:
            a = ", ".join(f"${rows + 16 * half + i + 2 * step}" for i in (0, 8, 1, 9))
            b = ", ".join(f"${x + 8 * tile + i + 2 * step}" for i in (0, 1))
            d = ", ".join(f"d{8 * tile + 4 * half + i}" for i in range(4))
            lines.append(f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32 {{{d}}}, {{{a}}}, {{{b}}}, {{{d}}};")
    lines += [f"fma.rn.f32 ${i}, d{i}, ${scales + i % 8 // 2}, ${before + i};" for i in range(8 * width)]
    return "{\n" + "\n".join(lines) + "\n}"


@functools.cache
@no_type_check  # a type checker's wrapper around the function would hide its source from Triton
def _kernel(dtype: np.dtype, tokens: int):
    """The Triton function. Built on first use, since the library imports where Triton is not installed."""
    import triton
    import triton.language as tl

    (asked_table, put_table), one_of_stack = nf4_lookup.fill_kernels(), nf4_lookup.stack_kernel()
    lookup_assembly = tl.constexpr(nf4_lookup.lookup_assembly())
    lookup_operands = tl.constexpr(",".join(["=&r"] * 8 + ["r"] * 3))
    one_assembly = tl.constexpr(_products_assembly(dtype, 1))
    one_operands = tl.constexpr(",".join(["=&f"] * 8 + ["r"] * 40 + ["f"] * 12))
    two_assembly = tl.constexpr(_products_assembly(dtype, 2))
    two_operands = tl.constexpr(",".join(["=&f"] * 16 + ["r"] * 48 + ["f"] * 20))
    unit = tl.constexpr(1.0 / FACTORS[dtype.name])
    X_AT = tl.constexpr(PAIRS)
    LANE_ROWS = tl.constexpr(ROWS_OF_WARP // 8)
    BLOCKS_OF_STEP = tl.constexpr(STEP)
    table_assembly = tl.constexpr(
        f"{{ .shared .align 128 .b8 table[{shared_bytes(tokens)}]; mov.u32 $0, table; add.u32 $0, $0, $1; }}"
    )
    # Codes are read once, and must not drive out of the cache what is read by every program or every layer.
    policy_assembly = tl.constexpr("createpolicy.fractional.L2::evict_first.b64 $0, 1.0;")
    ask_assembly = tl.constexpr(
        "{ .reg .pred p; setp.ne.b32 p, $4, 0; mov.b32 $0, 0; mov.b32 $1, 0;"
        " @p ld.global.L2::cache_hint.v2.b32 {$0, $1}, [$2], $3; }"
    )
    prefetch_assembly = tl.constexpr(
        "{ .reg .pred p; setp.ne.b32 p, $2, 0; @p prefetch.global.L2 [$1]; mov.b32 $0, $2; }"
    )
    # A source of 0 bytes fills with zeros.
    copy_assembly = tl.constexpr(
        "{ .reg .pred p; setp.ne.b32 p, $4, 0; @p cp.async.cg.shared.global [$1], [$2], 16, $3; mov.b32 $0, $1; }"
    )
    commit_assembly = tl.constexpr("cp.async.commit_group; mov.b32 $0, $1;")
    # All warps have the block of x that was copied last, and are done with the one before.
    arrived_assembly = tl.constexpr("cp.async.wait_group 0; bar.sync 0; mov.b32 $0, $1;")
    # Nothing is read from memory across the barrier: else the assembler reads all tokens at once, and spills registers.
    read_assembly = tl.constexpr("ld.shared.v4.b32 {$0, $1, $2, $3}, [$8]; ld.shared.v4.b32 {$4, $5, $6, $7}, [$9];")
    read_operands = tl.constexpr(",".join(["=&r"] * 8 + ["r"] * 2))
    from_lane_assembly = tl.constexpr("shfl.sync.idx.b32 $0, $1, $2, 0x1c03, 0xffffffff;")  # among 4 lanes

    @triton.jit
    def table_at(thread):
        """Where the shared memory of the program begins."""
        return tl.inline_asm_elementwise(table_assembly, "=r,r", [thread * 0], dtype=tl.int32, is_pure=False, pack=1)

    @triton.jit
    def weight_at(tile, weights, WEIGHTS: tl.constexpr):
        """(codes, absmax, nested absmax, mean, out, rows) of the weight that a tile is of, and its number in it."""
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
        return (codes, absmax, nested_absmax, mean, out, rows), tile - before

    @triton.jit
    def copy(x, block, buffer, thread, M: tl.constexpr, BLOCKS: tl.constexpr, THREADS: tl.constexpr):
        """Begin to copy a block of x, [tokens, 64], with zeros for tokens and blocks that there are not."""
        TOKENS: tl.constexpr = (M + 7) // 8 * 8
        from_x = x + tl.minimum(block, BLOCKS - 1) * 32
        for i in tl.static_range((8 * TOKENS + THREADS - 1) // THREADS):
            piece = i * THREADS + thread  # of 16 bytes
            token, place = piece // 8, piece % 8
            source = from_x + (tl.minimum(token, M - 1) * (BLOCKS * 32) + place * 4)
            target = buffer + (token * 128 + (place ^ token % 2) * 16)
            tl.inline_asm_elementwise(
                copy_assembly,
                "=r,r,l,r,r",
                [target, source, tl.where((token < M) & (block < BLOCKS), 16, 0), (token < TOKENS).to(tl.int32)],
                dtype=tl.int32,
                is_pure=False,
                pack=1,
            )
        tl.inline_asm_elementwise(commit_assembly, "=r,r", [thread], dtype=tl.int32, is_pure=False, pack=1)

    @triton.jit
    def asked_codes(lane_codes, below, block, policy, BLOCKS: tl.constexpr):
        """Begin to load a lane's 8 bytes of a block of one of its rows; zeros beyond the last one."""
        return tl.inline_asm_elementwise(
            ask_assembly,
            "=&r,=&r,l,l,r",
            [lane_codes + block * 32 + below * (BLOCKS * 32), policy, tl.where(policy * 0 + block < BLOCKS, 1, 0)],
            dtype=(tl.uint32,) * 2,
            is_pure=False,
            pack=1,
        )

    @triton.jit
    def asked_statistics(absmax, nested_absmax, first, below, block, BLOCKS: tl.constexpr, NESTED: tl.constexpr):
        """Begin to load absmax, and nested absmax, of a block of each of a lane's rows."""
        statistics = ()
        for i in tl.static_range(LANE_ROWS):
            at = first * BLOCKS + tl.minimum(block, BLOCKS - 1) + below[i] * BLOCKS
            nested = 0.0
            if NESTED:
                nested = tl.load(nested_absmax + (at >> 8))
            statistics = statistics + ((tl.load(absmax + at), nested),)
        return statistics

    @triton.jit
    def scales_of(statistics, block, mean, dynamic_map, BLOCKS: tl.constexpr, NESTED: tl.constexpr):
        """The scales of a block of each of a lane's rows."""
        scales = ()
        for i in tl.static_range(LANE_ROWS):
            scale, nested = statistics[i]
            if NESTED:
                scale = tl.load(dynamic_map + scale.to(tl.int32)) * nested + mean
            scales = scales + (tl.where(block < BLOCKS, scale, 0.0),)
        return scales

    @triton.jit
    def from_lane(value, lane):
        return tl.inline_asm_elementwise(
            from_lane_assembly, "=f,f,r", [value, lane], dtype=tl.float32, is_pure=True, pack=1
        )

    @triton.jit
    def elements(words, place):
        """The 16 elements whose codes are in two words, as 8 words."""
        return tl.inline_asm_elementwise(
            lookup_assembly,
            lookup_operands,
            [words[0], words[1], place],
            dtype=(tl.uint32,) * 8,
            is_pure=False,
            pack=1,
        )

    @triton.jit
    def tokens_of(place, swap):
        """A lane's 32 bytes of the token of its group, as 8 words."""
        return tl.inline_asm_elementwise(
            read_assembly,
            read_operands,
            [place + swap, place + (16 - swap)],
            dtype=(tl.uint32,) * 8,
            is_pure=False,
            pack=1,
        )

    @triton.jit
    def product_of_one(rows, x, scales, total):
        return tl.inline_asm_elementwise(
            one_assembly, one_operands, rows + x + scales + total, dtype=(tl.float32,) * 8, is_pure=True, pack=1
        )

    @triton.jit
    def products_of_two(rows, x, scales, totals):
        return tl.inline_asm_elementwise(
            two_assembly, two_operands, rows + x + scales + totals, dtype=(tl.float32,) * 16, is_pure=True, pack=1
        )

    @triton.jit
    def matmul_nf4_tiles(
        x,  # [M, COLUMNS]
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
        out0,  # [M, rows] in x's dtype, or float32 [SPLIT, M, rows]
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
        AHEAD: tl.constexpr,
    ):
        THREADS: tl.constexpr = 32 * WARPS
        ROWS: tl.constexpr = 8 * LANE_ROWS * WARPS  # of a tile
        BLOCKS: tl.constexpr = COLUMNS // 64  # of a row
        STEPS: tl.constexpr = (BLOCKS + BLOCKS_OF_STEP - 1) // BLOCKS_OF_STEP
        FIRST: tl.constexpr = (ROWS0 + ROWS - 1) // ROWS  # tiles before those of the second weight
        SECOND: tl.constexpr = FIRST + (ROWS1 + ROWS - 1) // ROWS
        TILES: tl.constexpr = SECOND + (ROWS2 + ROWS - 1) // ROWS
        TOKEN_TILES: tl.constexpr = (M + 7) // 8
        WHOLE: tl.constexpr = TILES * ROWS == ROWS0 + ROWS1 + ROWS2
        PAIRS_OF_TILES: tl.constexpr = TOKEN_TILES // 2
        BUFFER: tl.constexpr = TOKEN_TILES * 1024

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
        part = tl.program_id(0) // TILES
        weight, tile = weight_at(tl.program_id(0) % TILES, weights, WEIGHTS)
        codes, absmax, nested_absmax, mean, out, row_count = weight
        first_row = ROWS * tile + 8 * LANE_ROWS * warp + group
        # A lane's rows: its upper one, and how far the others are below it.
        upper_row = first_row
        if not WHOLE:
            upper_row = tl.minimum(first_row, row_count - 1)
        below = ()
        for i in tl.static_range(LANE_ROWS):
            if WHOLE:
                below = below + (8 * i,)
            else:
                below = below + (tl.minimum(first_row + 8 * i, row_count - 1) - upper_row,)
        lane_codes = codes + (upper_row * (BLOCKS * 32) + t * 8)
        # Lane t fetches row t of the lanes of its group, a line for each step.
        fetched_row = codes + tl.minimum(first_row + 8 * t, row_count - 1) * (BLOCKS * 32)
        start, end = part * STEPS // SPLIT, (part + 1) * STEPS // SPLIT
        x = x.to(tl.pointer_type(tl.uint32))

        table = table_at(thread)
        copy(x, BLOCKS_OF_STEP * start, table + X_AT, thread, M, BLOCKS, THREADS)
        asked = ()
        for i in tl.static_range(LANE_ROWS):
            asked = asked + (asked_codes(lane_codes, below[i], BLOCKS_OF_STEP * start, policy, BLOCKS),)
        first = BLOCKS_OF_STEP * start + t
        statistics = asked_statistics(absmax, nested_absmax, upper_row, below, first, BLOCKS, NESTED)
        for i in tl.static_range(AHEAD):
            tl.inline_asm_elementwise(
                prefetch_assembly,
                "=r,l,r",
                [fetched_row + (start + i) * 128, (start + i + thread * 0 < end).to(tl.int32)],
                dtype=tl.int32,
                is_pure=False,
                pack=1,
            )
        put_table(table, asked_table(nf4, thread, THREADS), thread, THREADS)
        scales = scales_of(statistics, first, mean, dynamic_map, BLOCKS, NESTED)

        place = table + lane * 4
        swap = group % 2 * 16
        x_place = table + (X_AT + group * 128 + t * 32)
        zero = tl.zeros((THREADS,), tl.float32)
        pairs = ((zero,) * 16,) * PAIRS_OF_TILES  # of tiles of 8 tokens: totals
        last = (zero,) * 8
        for step in range(start, end):
            for i in tl.static_range(BLOCKS_OF_STEP):
                block = BLOCKS_OF_STEP * step + i
                tl.inline_asm_elementwise(arrived_assembly, "=r,r", [thread], dtype=tl.int32, is_pure=False, pack=1)
                copy(x, block + 1, table + (X_AT + (i + 1) % 2 * BUFFER), thread, M, BLOCKS, THREADS)
                if i == 0 and AHEAD > 0:
                    tl.inline_asm_elementwise(
                        prefetch_assembly,
                        "=r,l,r",
                        [fetched_row + (step + AHEAD) * 128, (step + AHEAD + thread * 0 < end).to(tl.int32)],
                        dtype=tl.int32,
                        is_pure=False,
                        pack=1,
                    )
                if i == BLOCKS_OF_STEP - 2:
                    first = block + 2 + t  # of the next step
                    statistics = asked_statistics(absmax, nested_absmax, upper_row, below, first, BLOCKS, NESTED)
                lane_i = tl.full((THREADS,), i, tl.int32)
                if i == BLOCKS_OF_STEP - 1:
                    next_scales = scales_of(statistics, first, mean, dynamic_map, BLOCKS, NESTED)
                of_block = ()
                for n in tl.static_range(LANE_ROWS):
                    of_block = of_block + (from_lane(scales[n], lane_i),)
                from_x = x_place + i % 2 * BUFFER
                looked_up, words, before = (), asked, pairs
                asked, pairs = (), ()
                for n in tl.static_range(LANE_ROWS):
                    looked_up = looked_up + elements(words[n], place)
                    asked = asked + (asked_codes(lane_codes, below[n], block + 1, policy, BLOCKS),)
                for n in tl.static_range(PAIRS_OF_TILES):
                    b = tokens_of(from_x + n * 2048, swap) + tokens_of(from_x + (n * 2048 + 1024), swap)
                    pairs = pairs + (products_of_two(looked_up, b, of_block, before[n]),)
                if TOKEN_TILES % 2:
                    last = product_of_one(looked_up, tokens_of(from_x + PAIRS_OF_TILES * 2048, swap), of_block, last)
            scales = next_scales
        # No program ends before the copies that it began.
        tl.inline_asm_elementwise(arrived_assembly, "=r,r", [thread], dtype=tl.int32, is_pure=False, pack=1)

        out += part * M * row_count
        for j in tl.static_range(TOKEN_TILES):
            for i in tl.static_range(8):
                total = last[i]
                if j < 2 * PAIRS_OF_TILES:
                    total = pairs[j // 2][j % 2 * 8 + i]
                n, m = first_row + i // 2 * 8, 8 * j + 2 * t + i % 2
                target = out + (m * row_count + n)
                tl.store(target, (total * unit).to(target.dtype.element_ty), mask=(m < M) & (n < row_count))

    return matmul_nf4_tiles


def matmul_nf4(
    x: jax.Array,
    weights: Sequence[NF4Fields],
    *,
    shapes: Sequence[tuple[int, int]],
    norm: InputNorm | None = None,
    act: str | None = None,
    residual: Residual | None = None,
    parts: Any = False,
    config: Config | None = None,
) -> list[jax.Array]:
    """`reference.matmul_nf4` as a Triton kernel: the same arguments; the results are nearer to the exact ones.

    Up to three weights are multiplied in one launch. It may be vmapped (which loops) and is not differentiable. With
    `parts` products whose k is split are float32 [split, M, out].

    Raises:
      NotImplementedError: as `nf4_matmul.matmul_nf4`, but x may have `MOST_TOKENS` rows; or there is a norm, an
        activation or a residual, which are launches of their own for so many tokens.
    """
    if norm is not None or act is not None or residual is not None:
        raise NotImplementedError("the kernel multiplies and nothing else")
    nf4_matmul.check(x, weights, shapes, MOST_TOKENS)
    tokens, columns = x.shape
    rows = [rows for rows, _ in shapes]
    config = heuristics(rows, columns) if config is None else config
    split = min(config.split, -(-columns // (STEP * reference.NF4_BLOCK)))
    leading, dtype = ((), x.dtype) if split == 1 else ((split,), jnp.dtype(jnp.float32))
    padding = [0] * (MOST_WEIGHTS - len(rows))
    call = functools.partial(
        triton_call,
        kernel=_kernel(x.dtype, tokens),
        out_shape=[jax.ShapeDtypeStruct((*leading, tokens, n), dtype) for n in rows]
        + [jax.ShapeDtypeStruct((1,), dtype) for _ in padding],
        grid=(split * tiles_of(rows, config.num_warps),),
        num_warps=config.num_warps,
        M=tokens,
        **{f"ROWS{i}": n for i, n in enumerate([*rows, *padding])},
        WEIGHTS=len(rows),
        COLUMNS=columns,
        NESTED=weights[0][2] is not None,
        STACKED=weights[0][4] is not None,
        WARPS=config.num_warps,
        SPLIT=split,
        AHEAD=config.ahead,
    )

    @jax.custom_batching.sequential_vmap
    def run(x, weights):
        constants = jnp.asarray(nf4_lookup.pairs(x.dtype)), jnp.asarray(reference.DYNAMIC_MAP)
        ys = call(x, *constants, *(field for fields in weights for field in fields))[: len(rows)]
        return ys if split == 1 or parts else [Parts(y, x.dtype).sum() for y in ys]

    some = [nf4_matmul.filled(*fields) for fields in weights]
    return run(x, [*some, *(some[0] for _ in padding)])
