"""`nf4_matmul_tiles` with `wgmma`, for cards of compute capability 9.0: the same maths, lookup and split of k.

What differs. A warpgroup, 4 warps, multiplies 64 rows with all tokens by `wgmma.m64nNk16`, whose left operand is the
elements as they were looked up, in registers, and whose right one the tensor cores read out of shared memory by
themselves. So no lane holds x, a lane has 4 sums a tile of 8 tokens, and 16 warps fit an SM: while some wait for their
products, others look up.

The layout. Of rows g and g + 8 of its warp's 16, lane 4 g + t takes elements 16 t .. 16 t + 15 of a block, word 2 s + u
of which is an operand of product s, at its elements 8 u + 2 t and the next. So element 16 t + 4 s + 2 u + h of each
block of x comes to place 16 s + 8 u + 2 t + h, before the kernel. A block of x is [tokens, 64], 128 bytes a token; its
pieces of 16 bytes are where `wgmma`'s swizzle of 128 bytes looks for them: piece p of token m at place p ^ (m % 8).

A program's block of x comes by asynchronous copies while the one before is multiplied. What they write must be made
visible to the asynchronous proxy, in which `wgmma` reads, by each thread before the barrier.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import no_type_check

import jax
import jax.numpy as jnp
import numpy as np

from jaxlora.kernels import nf4_lookup, nf4_matmul, reference
from jaxlora.kernels.nf4_lookup import FACTORS, PAIRS
from jaxlora.kernels.nf4_matmul import MOST_WEIGHTS, SMS
from jaxlora.kernels.reference import NF4Fields

MOST_TOKENS = 64
ROWS_OF_WARP = 16
MOST_TOKENS_OF_TWO_PROGRAMS = 32
STEP = 4  # blocks, a line of 128 bytes of codes


@dataclass(frozen=True, kw_only=True)
class Config:
    """How the kernel is laid out on the device; no field changes a result but for the order of its sums.

    Attributes:
      num_warps: warps of a program, each with 16 rows of its tile: 4, 8 or 16: whole warpgroups.
      split: programs among which k is divided.
      ahead: steps, of 256 elements of k, that codes are fetched into L2 before they are read; 0 for not at all.
    """

    num_warps: int = 16
    split: int = 1
    ahead: int = 2

    def __post_init__(self):
        if self.num_warps not in (4, 8, 16):
            raise ValueError(f"num_warps must be 4, 8 or 16, not {self.num_warps}")
        if self.split < 1:
            raise ValueError(f"split must be 1 or more, not {self.split}")
        if self.ahead < 0:
            raise ValueError(f"ahead must be 0 or more, not {self.ahead}")


def heuristics(tokens: int, rows: Sequence[int], columns: int) -> Config:
    """The configuration for weights of so many rows each: the split with which the last SM is done first.

    An SM holds 16 warps with up to 128 registers: two programs of 8, which wait for x each on its own. More than 32
    tokens take 135 to 144 registers, with which one program of 8 would be alone; one of 16 is given 128, and does with
    a few loads from the stack a step. The costs are those of `nf4_matmul_tiles.heuristics`, not measured here.
    """
    num_warps = 8 if tokens <= MOST_TOKENS_OF_TWO_PROGRAMS else 16
    slots = SMS * 16 // num_warps
    while num_warps > 4 and max(rows) <= ROWS_OF_WARP * num_warps // 2:
        num_warps //= 2
    tiles, steps = tiles_of(rows, num_warps), -(-columns // (STEP * reference.NF4_BLOCK))

    def cost(split: int) -> float:
        adding = 0 if split == 1 else 1 + split * sum(rows) / 24000
        return -(-tiles * split // slots) * (-(-steps // split) + 1) + adding

    return Config(num_warps=num_warps, split=min(range(1, min(steps, 16) + 1), key=cost))


def tiles_of(rows: Sequence[int], num_warps: int) -> int:
    """Tiles of weights of so many rows each."""
    return sum(-(-n // (ROWS_OF_WARP * num_warps)) for n in rows)


def shared_bytes(tokens: int) -> int:
    """The shared memory of a program: the table of pairs, and two blocks of x. What needs no asking for is 48 KB."""
    return PAIRS + 2 * -(-tokens // 8) * 8 * 128


def _products_assembly(dtype: np.dtype, tiles: int) -> str:
    """PTX for a block of 64 rows of a warpgroup and `tiles` tiles of 8 tokens: totals, 4 a tile, two of row g and two
    of g + 8; the elements of those rows, 8 words each; where the block of x is; 2 scales; the totals so far."""
    kind = "bf16" if dtype == jnp.bfloat16 else "f16"
    sums = 4 * tiles
    x, scales, before = sums + 16, sums + 17, sums + 19
    d = ", ".join(f"d{i}" for i in range(sums))
    lines = [
        f".reg .f32 d<{sums}>;",
        ".reg .b64 x, at;",
        ".reg .b32 low;",
        ".reg .pred add;",
        # The descriptor: the address, 1024 bytes between groups of 8 tokens, the swizzle of 128 bytes; all in units of
        # 16 bytes. The distance at bit 16 is not used with that swizzle.
        f"bfe.u32 low, ${x}, 4, 14;",
        "cvt.u64.u32 x, low;",
        f"or.b64 x, x, {1 << 62 | 1024 // 16 << 32 | 1 << 16:#x};",
        *(f"mov.f32 d{i}, 0f00000000;" for i in range(sums)),
        "wgmma.fence.sync.aligned;",
    ]
    for step in range(4):
        a = ", ".join(f"${sums + i + 2 * step}" for i in (0, 8, 1, 9))
        lines += [
            f"add.u64 at, x, {2 * step};",  # 16 elements are 32 bytes
            f"setp.ne.b32 add, {int(step > 0)}, 0;",
            f"wgmma.mma_async.sync.aligned.m64n{8 * tiles}k16.f32.{kind}.{kind} {{{d}}}, {{{a}}}, at, add, 1, 1, 0;",
        ]
    lines += ["wgmma.commit_group.sync.aligned;", "wgmma.wait_group.sync.aligned 0;"]
    lines += [f"fma.rn.f32 ${i}, d{i}, ${scales + i % 4 // 2}, ${before + i};" for i in range(sums)]
    return "{\n" + "\n".join(lines) + "\n}"


@functools.cache
@no_type_check  # a type checker's wrapper around the function would hide its source from Triton
def _kernel(dtype: np.dtype, tokens: int):
    """The Triton function. Built on first use, since the library imports where Triton is not installed."""
    import triton
    import triton.language as tl

    lookup_assembly = tl.constexpr(nf4_lookup.lookup_assembly())
    lookup_operands = tl.constexpr(",".join(["=&r"] * 8 + ["r"] * 3))
    tiles = -(-tokens // 8)
    products_assembly = tl.constexpr(_products_assembly(dtype, tiles))
    products_operands = tl.constexpr(",".join(["=&f"] * (4 * tiles) + ["r"] * 17 + ["f"] * (2 + 4 * tiles)))
    products_dtypes = tl.constexpr((tl.float32,) * (4 * tiles))
    unit = tl.constexpr(1.0 / FACTORS[dtype.name])
    X_AT = tl.constexpr(PAIRS)
    LANE_ROWS = tl.constexpr(ROWS_OF_WARP // 8)
    BLOCKS_OF_STEP = tl.constexpr(STEP)
    table_assembly = tl.constexpr(
        f"{{ .shared .align 1024 .b8 table[{shared_bytes(tokens)}]; mov.u32 $0, table; add.u32 $0, $0, $1; }}"
    )
    fill_assembly = tl.constexpr("st.shared.v4.b32 [$1], {$2, $2, $2, $2}; mov.b32 $0, $1;")
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
    arrived_assembly = tl.constexpr("cp.async.wait_group 0; fence.proxy.async.shared::cta; bar.sync 0; mov.b32 $0, $1;")
    from_lane_assembly = tl.constexpr("shfl.sync.idx.b32 $0, $1, $2, 0x1c03, 0xffffffff;")  # among 4 lanes

    @triton.jit
    def table_at(thread):
        """Where the shared memory of the program begins."""
        return tl.inline_asm_elementwise(table_assembly, "=r,r", [thread * 0], dtype=tl.int32, is_pure=False, pack=1)

    @triton.jit
    def fill(table, nf4, thread, THREADS: tl.constexpr):
        """32 copies of each of the pairs."""
        values = ()
        for i in tl.static_range(2048 // THREADS):
            values = values + (tl.load(nf4 + (i * THREADS + thread) // 8),)
        for i in tl.static_range(2048 // THREADS):
            place = table + (i * THREADS + thread) * 16
            tl.inline_asm_elementwise(
                fill_assembly, "=r,r,r", [place, values[i]], dtype=tl.int32, is_pure=False, pack=1
            )

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
            target = buffer + (token * 128 + (place ^ token % 8) * 16)
            is_written = token < TOKENS
            if M < TOKENS or 8 * TOKENS % THREADS:
                is_there = token < M
                token = tl.minimum(token, M - 1)
            else:
                is_there = token >= 0
            source = from_x + (token * (BLOCKS * 32) + place * 4)
            tl.inline_asm_elementwise(
                copy_assembly,
                "=r,r,l,r,r",
                [target, source, tl.where(is_there & (block < BLOCKS), 16, 0), is_written.to(tl.int32)],
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
    def products(rows, x, scales, totals):
        return tl.inline_asm_elementwise(
            products_assembly,
            products_operands,
            rows + (x,) + scales + totals,
            dtype=products_dtypes,
            is_pure=False,
            pack=1,
        )

    @triton.jit
    def matmul_nf4_wgmma(
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
        # Lanes 0 and 1 of a group fetch its two rows, a line for each step.
        fetched_row = codes + tl.minimum(first_row + 8 * (t % 2), row_count - 1) * (BLOCKS * 32)
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
                [fetched_row + (start + i) * 128, ((t < 2) & (start + i < end)).to(tl.int32)],
                dtype=tl.int32,
                is_pure=False,
                pack=1,
            )
        fill(table, nf4, thread, THREADS)
        scales = scales_of(statistics, first, mean, dynamic_map, BLOCKS, NESTED)

        place = table + lane * 4
        zero = tl.zeros((THREADS,), tl.float32)
        totals = (zero,) * (4 * TOKEN_TILES)
        for step in range(start, end):
            for i in tl.static_range(BLOCKS_OF_STEP):
                block = BLOCKS_OF_STEP * step + i
                tl.inline_asm_elementwise(arrived_assembly, "=r,r", [thread], dtype=tl.int32, is_pure=False, pack=1)
                copy(x, block + 1, table + (X_AT + (i + 1) % 2 * BUFFER), thread, M, BLOCKS, THREADS)
                if i == 0 and AHEAD > 0:
                    tl.inline_asm_elementwise(
                        prefetch_assembly,
                        "=r,l,r",
                        [fetched_row + (step + AHEAD) * 128, ((t < 2) & (step + AHEAD < end)).to(tl.int32)],
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
                looked_up, words = (), asked
                asked = ()
                for n in tl.static_range(LANE_ROWS):
                    looked_up = looked_up + elements(words[n], place)
                    asked = asked + (asked_codes(lane_codes, below[n], block + 1, policy, BLOCKS),)
                totals = products(looked_up, place * 0 + (table + (X_AT + i % 2 * BUFFER)), of_block, totals)
            scales = next_scales
        # No program ends before the copies that it began.
        tl.inline_asm_elementwise(arrived_assembly, "=r,r", [thread], dtype=tl.int32, is_pure=False, pack=1)

        out += part * M * row_count
        for j in tl.static_range(TOKEN_TILES):
            for i in tl.static_range(4):
                total = totals[4 * j + i]
                n, m = first_row + i // 2 * 8, 8 * j + 2 * t + i % 2
                target = out + (m * row_count + n)
                tl.store(target, (total * unit).to(target.dtype.element_ty), mask=(m < M) & (n < row_count))

    return matmul_nf4_wgmma


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
      NotImplementedError: as `nf4_matmul.matmul_nf4`, but x may have `MOST_TOKENS` rows.
    """
    nf4_matmul.check(x, weights, shapes, MOST_TOKENS)
    import jax_triton

    tokens, columns = x.shape
    rows = [rows for rows, _ in shapes]
    config = heuristics(tokens, rows, columns) if config is None else config
    split = min(config.split, -(-columns // (STEP * reference.NF4_BLOCK)))
    leading, dtype = ((), x.dtype) if split == 1 else ((split,), jnp.dtype(jnp.float32))
    padding = [0] * (MOST_WEIGHTS - len(rows))
    call = functools.partial(
        jax_triton.triton_call,
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
        # Of each block the element 16 t + 4 s + 2 u + h comes to 16 s + 8 u + 2 t + h.
        x = x.reshape(tokens, -1, 4, 4, 2, 2).transpose(0, 1, 3, 4, 2, 5).reshape(x.shape)
        constants = jnp.asarray(nf4_lookup.pairs(x.dtype)), jnp.asarray(reference.DYNAMIC_MAP)
        ys = call(x, *constants, *(field for fields in weights for field in fields))[: len(rows)]
        if split == 1:
            return ys
        # Sums written out are loops, which XLA joins for several weights; a reduction is a kernel of its own for each.
        return [functools.reduce(jnp.add, [y[i] for i in range(split)]).astype(x.dtype) for y in ys]

    some = [nf4_matmul.filled(*fields) for fields in weights]
    return run(x, [*some, *(some[0] for _ in padding)])
