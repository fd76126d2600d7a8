"""The weight of a LoRA layer as one 16-bit matrix, [out, in]: what `nf4_merge.py` computes, laid out for the memory.

The maths is that of `nf4_merge.py`: out = round(NF4[code] * scale + B A), sums in float32, rounded once; without an
adapter the bits are those of `reference.dequantize_nf4`, so products and sums of scales are rounded one by one.

The layout. A warp makes 64 columns, one block of NF4, of 8 rows at a time, as the transposed sum of `mma.m16n8k16`: its
16 rows are columns of the weight, its 8 columns are rows. In it lane 4 g + t holds, of rows 2 t and 2 t + 1, two numbers
for each product of 16 columns; four products make the 64. Which column is which row of a product is free, as long as A
is loaded that way, so lane g takes columns 8 g .. 8 g + 7: of a row it reads one word of codes, looks up 8 numbers,
multiplies them by the row's scale, hands them to the tensor cores as the sum to which B A is added, rounds what comes
back, and writes 16 bytes. Nothing changes lanes and nothing passes through shared memory: a load is 4 whole sectors and a
store 4 whole lines, of 4 rows. The order of k is free too: lane t takes ranks 4 t .. 4 t + 3, 8 bytes at once, of A
and of B. A is read transposed, once for all rows of a program, and stays in registers, hence at most 64 ranks.

The lookup. NF4 is 64 bytes of shared memory, which lie in 16 banks: a warp's 32 lookups are one pass, whatever the codes
are. In global memory they were one pass too, but of a pipe in which they stand behind loads that miss the cache.

The stream. A warp of a program has its block of columns and goes down the rows. It asks for the codes, absmaxes and
rows of B of its next `8 * octets` rows before it writes those of this one; the first step is asked for before the
tables are filled. Codes are read once, and are the first to leave L2, where what is written should stay for cuBLAS.

Triton does the addresses, on tensors of one element a thread, as in `nf4_matmul.py`.
"""

import functools
from dataclasses import dataclass
from typing import no_type_check

import jax
import jax.numpy as jnp
import numpy as np

from jaxlora.kernels import reference

MOST_RANKS = 64
SMS = 132  # of an H100
TABLES = 128 + 256 * 4  # bytes of shared memory: NF4, and DYNAMIC_MAP at 128


@dataclass(frozen=True, kw_only=True)
class Config:
    """How the kernel is laid out on the device; no field changes a result.

    Attributes:
      num_warps: warps of a program, each with a block of columns of its own; a power of two.
      octets: eights of rows that a warp asks for at once.
      programs: programs of a launch at most, or one for every block of `num_warps` columns.
    """

    num_warps: int = 8
    octets: int = 2
    programs: int = 4 * SMS


def _values_assembly() -> str:
    """PTX for the 8 elements $0..$7 whose codes are in word $8, times the scale $9, with NF4 at $10 in shared memory."""
    lines = [".reg .b32 at;", ".reg .f32 v;"]
    for i in range(8):
        bit = (4 * i) ^ 4
        lines += [
            f"shr.u32 at, $8, {bit - 2};" if bit else "shl.b32 at, $8, 2;",
            "and.b32 at, at, 60;",
            "or.b32 at, at, $10;",
            "ld.shared.f32 v, [at];",
            f"mul.rn.f32 ${i}, v, $9;",
        ]
    return "{\n" + "\n".join(lines) + "\n}"


def _write_assembly(kind: str) -> str:
    """PTX that rounds the 8 elements $1..$8 to 16 bits and writes them at $9 if $10 is not 0."""
    lines = [".reg .pred p;", ".reg .b32 w<4>;"]
    lines += [f"cvt.rn.{kind}x2.f32 w{i}, ${2 * i + 2}, ${2 * i + 1};" for i in range(4)]
    lines += ["setp.ne.b32 p, $10, 0;", "@p st.global.v4.b32 [$9], {w0, w1, w2, w3};", "mov.b32 $0, $10;"]
    return "{\n" + "\n".join(lines) + "\n}"


@functools.cache
@no_type_check  # a type checker's wrapper around the function would hide its source from Triton
def _kernel(dtype: np.dtype):
    """The Triton function. Built on first use, since the library imports where Triton is not installed."""
    import triton
    import triton.language as tl

    kind = "bf16" if dtype == jnp.bfloat16 else "f16"
    table_assembly = tl.constexpr(
        f"{{ .shared .align 128 .b8 table[{TABLES}]; mov.u32 $0, table; add.u32 $0, $0, $1; }}"
    )
    fill_assembly = tl.constexpr("st.shared.f32 [$1], $2; mov.b32 $0, $1;")
    filled_assembly = tl.constexpr("bar.sync 0; mov.b32 $0, $1;")
    read_assembly = tl.constexpr("ld.shared.f32 $0, [$1];")
    policy_assembly = tl.constexpr("createpolicy.fractional.L2::evict_first.b64 $0, 1.0;")
    codes_assembly = tl.constexpr("ld.global.L2::cache_hint.b32 $0, [$1], $2;")
    byte_assembly = tl.constexpr("ld.global.u8 $0, [$1];")
    float_assembly = tl.constexpr("ld.global.f32 $0, [$1];")
    two_assembly = tl.constexpr("ld.global.v2.b32 {$0, $1}, [$2];")
    scale_assembly = tl.constexpr("{ .reg .f32 v; mul.rn.f32 v, $1, $2; add.rn.f32 $0, v, $3; }")
    # Nothing is read from memory across the barrier: else the assembler moves loads down to where they are used.
    asked_assembly = tl.constexpr("bar.warp.sync 0xffffffff; mov.b32 $0, $1;")
    values_assembly = tl.constexpr(_values_assembly())
    values_operands = tl.constexpr(",".join(["=&f"] * 8 + ["r", "f", "r"]))
    product_assembly = tl.constexpr(
        f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32 "
        "{$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, {$10, $11, $12, $13};"
    )
    product_operands = tl.constexpr(",".join(["=f"] * 4 + ["r"] * 6 + ["f"] * 4))
    write_assembly = tl.constexpr(_write_assembly(kind))
    write_operands = tl.constexpr(",".join(["=r"] + ["f"] * 8 + ["l", "r"]))
    MAP_AT = tl.constexpr(128)

    @triton.jit
    def filled_tables(nf4, dynamic_map, thread, THREADS: tl.constexpr):
        table = tl.inline_asm_elementwise(table_assembly, "=r,r", [thread * 0], dtype=tl.int32, is_pure=False, pack=1)
        at = thread % 16
        tl.inline_asm_elementwise(
            fill_assembly, "=r,r,f", [table + at * 4, tl.load(nf4 + at)], dtype=tl.int32, is_pure=False, pack=1
        )
        for i in tl.static_range(256 // THREADS if THREADS < 256 else 1):
            at = (i * THREADS + thread) % 256
            value = tl.load(dynamic_map + at)
            place = table + MAP_AT + at * 4
            tl.inline_asm_elementwise(
                fill_assembly, "=r,r,f", [place, value], dtype=tl.int32, is_pure=False, pack=1
            )
        return tl.inline_asm_elementwise(filled_assembly, "=r,r", [table], dtype=tl.int32, is_pure=False, pack=1)

    @triton.jit
    def two_words(place):
        return tl.inline_asm_elementwise(
            two_assembly, "=r,=r,l", [place], dtype=(tl.uint32,) * 2, is_pure=False, pack=1
        )

    @triton.jit
    def asked_row(codes, absmax, nested_absmax, row, block, g, policy, BLOCKS: tl.constexpr, NESTED: tl.constexpr):
        """Begin to load a lane's word of a row, and the statistics of its block."""
        number = row * BLOCKS + block
        word = tl.inline_asm_elementwise(
            codes_assembly, "=r,l,l", [codes + (number * 8 + g), policy], dtype=tl.uint32, is_pure=False, pack=1
        )
        nested = 0.0
        if NESTED:
            nested = tl.inline_asm_elementwise(
                float_assembly, "=f,l", [nested_absmax + (number >> 8)], dtype=tl.float32, is_pure=False, pack=1
            )
            value = tl.inline_asm_elementwise(
                byte_assembly, "=r,l", [absmax + number], dtype=tl.int32, is_pure=False, pack=1
            )
        else:
            value = tl.inline_asm_elementwise(
                float_assembly, "=f,l", [absmax + number], dtype=tl.float32, is_pure=False, pack=1
            )
        return word, value, nested

    @triton.jit
    def asked(
        codes, absmax, nested_absmax, b, first, block, g, t, policy, ROWS: tl.constexpr, BLOCKS: tl.constexpr,
        CHUNKS: tl.constexpr, OCTETS: tl.constexpr, NESTED: tl.constexpr,
    ):  # fmt: skip
        """Begin to load what a step needs: of each eight rows a lane's rows 2 t and 2 t + 1, and row g of B."""
        octets = ()
        for i in tl.static_range(OCTETS):
            row = first + 8 * i
            upper, lower = tl.minimum(row + 2 * t, ROWS - 1), tl.minimum(row + 2 * t + 1, ROWS - 1)
            own = tl.minimum(row + g, ROWS - 1) * (CHUNKS * 8) + 2 * t
            factors = ()
            for chunk in tl.static_range(CHUNKS):
                factors = factors + (two_words(b + (own + 8 * chunk)),)
            octets = octets + (
                (
                    asked_row(codes, absmax, nested_absmax, upper, block, g, policy, BLOCKS, NESTED),
                    asked_row(codes, absmax, nested_absmax, lower, block, g, policy, BLOCKS, NESTED),
                    factors,
                ),
            )
        return octets

    @triton.jit
    def values_of(asked_row, mean, table, NESTED: tl.constexpr):
        """A lane's 8 elements of a row."""
        word, scale, nested = asked_row
        if NESTED:
            place = table + (MAP_AT + scale * 4)
            value = tl.inline_asm_elementwise(read_assembly, "=f,r", [place], dtype=tl.float32, is_pure=False, pack=1)
            scale = tl.inline_asm_elementwise(
                scale_assembly, "=f,f,f,f", [value, nested, mean], dtype=tl.float32, is_pure=True, pack=1
            )
        return tl.inline_asm_elementwise(
            values_assembly, values_operands, [word, scale, table], dtype=(tl.float32,) * 8, is_pure=False, pack=1
        )

    @triton.jit
    def added(upper, lower, a, b, i: tl.constexpr):
        """Columns 2 i and 2 i + 1 of both rows, with 16 ranks of B A added: (upper, upper, lower, lower)."""
        u0, l0, u1, l1 = tl.inline_asm_elementwise(
            product_assembly,
            product_operands,
            [a[2 * i][0], a[2 * i + 1][0], a[2 * i][1], a[2 * i + 1][1], b[0], b[1]]
            + [upper[2 * i], lower[2 * i], upper[2 * i + 1], lower[2 * i + 1]],
            dtype=(tl.float32,) * 4,
            is_pure=True,
            pack=1,
        )
        return u0, u1, l0, l1

    @triton.jit
    def write(values, place, is_inside):
        # An address among numbers: Triton has no common type of pointers and floats.
        place, is_inside = place.to(tl.int64), is_inside.to(tl.int32)
        tl.inline_asm_elementwise(
            write_assembly, write_operands, values + (place, is_inside), dtype=tl.int32, is_pure=False, pack=1
        )

    @triton.jit
    def merge_nf4(
        codes,  # uint8 [stack, rows, columns / 2]
        absmax,  # uint8 or float32 [stack, rows, columns / 64]
        nested_absmax,  # float32 [stack, ceil(blocks / 256)]; unread unless NESTED
        mean,  # float32 [stack]; unread unless NESTED
        index,  # int32 []: which of the stack; unread unless STACKED
        a,  # [columns, RANK]; unread unless RANK
        b,  # [rows, RANK]
        nf4,  # float32 [16]
        dynamic_map,  # float32 [256]
        out,  # [rows, columns]
        ROWS: tl.constexpr,
        COLUMNS: tl.constexpr,
        RANK: tl.constexpr,  # a multiple of 16; 0 for no adapter
        NESTED: tl.constexpr,
        STACKED: tl.constexpr,
        WARPS: tl.constexpr,
        OCTETS: tl.constexpr,
        PROGRAMS: tl.constexpr,  # that share a group of columns
    ):
        BLOCKS: tl.constexpr = COLUMNS // 64  # of a row
        GROUPS: tl.constexpr = (BLOCKS + WARPS - 1) // WARPS
        CHUNKS: tl.constexpr = RANK // 16
        STEPS: tl.constexpr = (ROWS + 8 * OCTETS - 1) // (8 * OCTETS)
        thread = tl.arange(0, 32 * WARPS)
        g, t = thread % 32 // 4, thread % 4
        start = tl.program_id(0) // GROUPS
        own_block = tl.program_id(0) % GROUPS * WARPS + thread // 32
        block = tl.minimum(own_block, BLOCKS - 1)
        if STACKED:
            layer = tl.load(index).to(tl.int64)
            codes += layer * (ROWS * (BLOCKS * 32))
            absmax += layer * (ROWS * BLOCKS)
            nested_absmax += layer * ((ROWS * BLOCKS + 255) // 256)
            mean += layer
        codes = codes.to(tl.pointer_type(tl.uint32))
        a, b = a.to(tl.pointer_type(tl.uint32)), b.to(tl.pointer_type(tl.uint32))
        policy = tl.inline_asm_elementwise(policy_assembly, "=l,r", [thread], dtype=tl.int64, is_pure=True, pack=1)
        following = asked(
            codes, absmax, nested_absmax, b, start * (8 * OCTETS), block, g, t, policy,
            ROWS, BLOCKS, CHUNKS, OCTETS, NESTED,
        )  # fmt: skip
        offset = 0.0
        if NESTED:
            offset = tl.load(mean + thread * 0)
        held = ()
        for chunk in tl.static_range(CHUNKS):
            columns = ()
            for i in tl.static_range(8):
                at = (block * 64 + g * 8 + i) * (CHUNKS * 8) + 2 * t
                columns = columns + (two_words(a + (at + 8 * chunk)),)
            held = held + (columns,)
        table = filled_tables(nf4, dynamic_map, thread, 32 * WARPS)
        for step in range(start, STEPS, PROGRAMS):
            current = following
            following = asked(
                codes, absmax, nested_absmax, b, (step + PROGRAMS) * (8 * OCTETS), block, g, t, policy,
                ROWS, BLOCKS, CHUNKS, OCTETS, NESTED,
            )  # fmt: skip
            place = tl.inline_asm_elementwise(asked_assembly, "=r,r", [table], dtype=tl.int32, is_pure=False, pack=1)
            for octet in tl.static_range(OCTETS):
                row = step * (8 * OCTETS) + 8 * octet + 2 * t
                upper = values_of(current[octet][0], offset, place, NESTED)
                lower = values_of(current[octet][1], offset, place, NESTED)
                for chunk in tl.static_range(CHUNKS):
                    p0, q0, r0, s0 = added(upper, lower, held[chunk], current[octet][2][chunk], 0)
                    p1, q1, r1, s1 = added(upper, lower, held[chunk], current[octet][2][chunk], 1)
                    p2, q2, r2, s2 = added(upper, lower, held[chunk], current[octet][2][chunk], 2)
                    p3, q3, r3, s3 = added(upper, lower, held[chunk], current[octet][2][chunk], 3)
                    upper, lower = (p0, q0, p1, q1, p2, q2, p3, q3), (r0, s0, r1, s1, r2, s2, r3, s3)
                at = row * COLUMNS + (block * 64 + g * 8)
                write(upper, out + at, (row < ROWS) & (own_block < BLOCKS))
                write(lower, out + (at + COLUMNS), (row + 1 < ROWS) & (own_block < BLOCKS))

    return merge_nf4
