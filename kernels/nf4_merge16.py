"""The weight of a LoRA layer as one 16-bit matrix, [out, in]: what `nf4_merge.py` computes, laid out for the memory.

The maths is that of `nf4_merge.py`: out = round(NF4[code] * scale + B A), sums in float32, rounded once; without an
adapter the bits are those of `reference.dequantize_nf4`, so products and sums of scales are rounded one by one.

The layout. A warp makes 64 columns, one block of NF4, of 8 rows at a time, as the transposed sum of `mma.m16n8k16`:
the 16 rows of a product are columns of the weight, its 8 columns are rows. In it lane 4 g + t holds, of two rows, two
numbers of each product; four products make the 64 columns. Which column of the weight is which row of a product is
free, as long as A is loaded that way, so lane g takes columns 8 g .. 8 g + 7: of a row it reads one word of codes,
looks up 8 numbers, multiplies them by the row's scale, hands them to the tensor cores as the sum to which B A is added,
rounds what comes back, and writes 16 bytes. No number changes lanes, and a store is 4 whole lines, of 4 rows. The order
of k is free too: lane t takes ranks 4 t .. 4 t + 3 of 16, 8 bytes, of A and of B. A is read transposed, once for all
rows of a program, and stays in registers, hence at most 64 ranks.

The lookup. NF4 is 64 bytes of shared memory, which lie in 16 banks: a warp's 32 lookups are one pass, whatever the
codes are. By the sm_90 code of Triton 3.6 an element takes 7 instructions, of the 24 that an SM of an H100 has for it
at the speed of a copy.

The stream. A warp of a program has its block of columns and goes down the rows, 16 or 32 a step. Codes, statistics and
rows of B of its next step come by asynchronous copies into shared memory while it makes this one: in registers they
would be waited for too early, since the assembler has six scoreboards for all loads, lookups among them. A lane works
out the scale of one row, and the others ask it. The first step is asked for before the tables are filled. Codes are
read once, and are the first to leave L2, where what is written should stay for cuBLAS. No warp waits for another.

Triton does the addresses, on tensors of one element a thread, as in `nf4_matmul.py`.
"""

import dataclasses
import functools
from dataclasses import dataclass
from typing import no_type_check

import jax
import jax.numpy as jnp
import numpy as np

from jaxlora.kernels import reference

MOST_RANKS = 64
SMS = 132  # of an H100
# Shared memory, in bytes: NF4, DYNAMIC_MAP, and then for each warp two stages of a step.
MAP_AT = 128
TABLES = MAP_AT + 256 * 4


@dataclass(frozen=True, kw_only=True)
class Config:
    """How the kernel is laid out on the device; no field changes a result.

    Attributes:
      num_warps: warps of a program, each with a block of columns of its own; a power of two.
      octets: eights of rows that a warp asks for at once, 2 or 4.
      programs: programs of a launch at most, or one for every `num_warps` blocks of columns if those are more.
    """

    num_warps: int = 8
    octets: int = 2
    programs: int = 4 * SMS

    def __post_init__(self):
        if self.num_warps not in (1, 2, 4, 8):
            raise ValueError(f"num_warps must be 1, 2, 4 or 8, not {self.num_warps}")
        if self.octets not in (2, 4):
            raise ValueError(f"octets must be 2 or 4, not {self.octets}")
        if self.programs < 1:
            raise ValueError(f"programs must be 1 or more, not {self.programs}")


def heuristics(rank: int, blocks: int) -> Config:
    """The configuration for a rank, a multiple of 16, and so many blocks of a row.

    Where there is an adapter, as many programs as an SM's registers hold: a thread takes 76 for 16 ranks and 128 for
    64, as many of them for A as there are ranks. Without one it takes 40, and four programs have by count 20 KB on
    their way to an SM. None of this has been tuned on a device.
    """
    config = Config() if rank == 0 else Config(programs=3 * SMS) if rank == 16 else Config(num_warps=4)
    num_warps = config.num_warps
    while num_warps > blocks:
        num_warps //= 2
    return dataclasses.replace(config, num_warps=num_warps)


def stage_bytes(rank: int, octets: int) -> int:
    """What a warp's step takes of shared memory: of each row 32 bytes of codes, 2 x 4 of statistics, and of B."""
    return 8 * octets * (32 + 8 + 2 * rank)


def shared_bytes(rank: int, octets: int, num_warps: int) -> int:
    """The shared memory of a program. What needs no asking for is 48 KB."""
    return TABLES + num_warps * 2 * stage_bytes(rank, octets)


def _values_assembly() -> str:
    """PTX for the 8 elements $0..$7 whose codes are in word $8, times the scale $9. NF4 is at $10 in shared memory."""
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
def _kernel(dtype: np.dtype, shared: int):
    """The Triton function. Built on first use, since the library imports where Triton is not installed."""
    import triton
    import triton.language as tl

    kind = "bf16" if dtype == jnp.bfloat16 else "f16"
    map_at, tables_bytes = tl.constexpr(MAP_AT), tl.constexpr(TABLES)
    table_assembly = tl.constexpr(
        f"{{ .shared .align 128 .b8 table[{shared}]; mov.u32 $0, table; add.u32 $0, $0, $1; }}"
    )
    fill_assembly = tl.constexpr("st.shared.f32 [$1], $2; mov.b32 $0, $1;")
    filled_assembly = tl.constexpr("bar.sync 0; mov.b32 $0, $1;")
    policy_assembly = tl.constexpr("createpolicy.fractional.L2::evict_first.b64 $0, 1.0;")
    copy_codes_assembly = tl.constexpr("cp.async.cg.shared.global.L2::cache_hint [$1], [$2], 16, $3; mov.b32 $0, $1;")
    copy_16_assembly = tl.constexpr("cp.async.cg.shared.global [$1], [$2], 16; mov.b32 $0, $1;")
    copy_4_assembly = tl.constexpr("cp.async.ca.shared.global [$1], [$2], 4; mov.b32 $0, $1;")
    # Lanes read what others have copied: nothing is overwritten before all have read it, or read before it is there.
    free_assembly = tl.constexpr("bar.warp.sync 0xffffffff; mov.b32 $0, $1;")
    asked_assembly = tl.constexpr("cp.async.commit_group; mov.b32 $0, $1;")
    arrived_assembly = tl.constexpr("cp.async.wait_group 1; bar.warp.sync 0xffffffff; mov.b32 $0, $1;")
    read_assembly = tl.constexpr("ld.shared.b32 $0, [$1];")
    read_two_assembly = tl.constexpr("ld.shared.v2.b32 {$0, $1}, [$2];")
    load_two_assembly = tl.constexpr("ld.global.v2.b32 {$0, $1}, [$2];")
    scale_assembly = tl.constexpr("{ .reg .f32 v; mul.rn.f32 v, $1, $2; add.rn.f32 $0, v, $3; }")
    from_assembly = tl.constexpr("shfl.sync.idx.b32 $0, $1, $2, 0x1f, 0xffffffff;")
    values_assembly = tl.constexpr(_values_assembly())
    values_operands = tl.constexpr(",".join(["=&f"] * 8 + ["r", "f", "r"]))
    product_assembly = tl.constexpr(
        f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32 "
        "{$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, {$10, $11, $12, $13};"
    )
    product_operands = tl.constexpr(",".join(["=f"] * 4 + ["r"] * 6 + ["f"] * 4))
    write_assembly = tl.constexpr(_write_assembly(kind))
    write_operands = tl.constexpr(",".join(["=r"] + ["f"] * 8 + ["l", "r"]))

    @triton.jit
    def did(assembly: tl.constexpr, place):
        """`place`, after the assembly."""
        return tl.inline_asm_elementwise(assembly, "=r,r", [place], dtype=tl.int32, is_pure=False, pack=1)

    @triton.jit
    def fill(place, value):
        tl.inline_asm_elementwise(fill_assembly, "=r,r,f", [place, value], dtype=tl.int32, is_pure=False, pack=1)

    @triton.jit
    def copy(assembly: tl.constexpr, place, source):
        source = source.to(tl.int64)
        tl.inline_asm_elementwise(assembly, "=r,r,l", [place, source], dtype=tl.int32, is_pure=False, pack=1)

    @triton.jit
    def read(place, dtype: tl.constexpr):
        value = tl.inline_asm_elementwise(read_assembly, "=r,r", [place], dtype=tl.int32, is_pure=False, pack=1)
        return value.to(dtype, bitcast=True)

    @triton.jit
    def two(assembly: tl.constexpr, kind: tl.constexpr, place):
        """Two words at a place."""
        return tl.inline_asm_elementwise(
            assembly, "=r,=r," + kind, [place], dtype=(tl.uint32,) * 2, is_pure=False, pack=1
        )

    @triton.jit
    def ask(
        stage, codes, absmax, nested_absmax, b, first, block, lane, policy, ROWS: tl.constexpr, BLOCKS: tl.constexpr,
        CHUNKS: tl.constexpr, OCTETS: tl.constexpr, NESTED: tl.constexpr,
    ):  # fmt: skip
        """Begin to copy what a step needs: of each row a block's codes and statistics, and the row of B."""
        STEP: tl.constexpr = 8 * OCTETS
        for i in tl.static_range(OCTETS // 2):
            row = i * 16 + lane // 2
            source = codes + ((tl.minimum(first + row, ROWS - 1) * BLOCKS + block) * 32 + lane % 2 * 16)
            tl.inline_asm_elementwise(
                copy_codes_assembly,
                "=r,r,l,l",
                [stage + (i * 512 + lane * 16), source.to(tl.int64), policy],
                dtype=tl.int32,
                is_pure=False,
                pack=1,
            )
        number = tl.minimum(first + lane % STEP, ROWS - 1) * BLOCKS + block
        place = stage + (STEP * 32 + lane % STEP * 4)
        source = absmax + number
        if NESTED:
            copy(copy_4_assembly, place + STEP * 4, nested_absmax + (number >> 8))
            source = source.to(tl.int64) & -4  # the word in which the byte is
        copy(copy_4_assembly, place, source)
        for i in tl.static_range(CHUNKS * OCTETS // 2):
            piece = i * 32 + lane
            row, part = piece // (2 * CHUNKS), piece % (2 * CHUNKS)
            # Row 4 i + t of eight is column 2 t + i of a product, and lies in that order, 16 ranks by 16 ranks.
            slot = row // 8 * 8 + row % 4 * 2 + row % 8 // 4
            place = stage + (STEP * 40 + part // 2 * (STEP * 32) + slot * 32 + part % 2 * 16)
            copy(copy_16_assembly, place, b + (tl.minimum(first + row, ROWS - 1) * (CHUNKS * 8) + part * 4))
        did(asked_assembly, stage)

    @triton.jit
    def own_scale(
        stage, absmax, first, block, lane, mean, table, ROWS: tl.constexpr, BLOCKS: tl.constexpr,
        OCTETS: tl.constexpr, NESTED: tl.constexpr,
    ):  # fmt: skip
        """The scale of the step's row that has the lane's number."""
        STEP: tl.constexpr = 8 * OCTETS
        place = stage + (STEP * 32 + lane % STEP * 4)
        if NESTED:
            number = tl.minimum(first + lane % STEP, ROWS - 1) * BLOCKS + block
            byte = ((absmax + number).to(tl.int64) & 3).to(tl.int32)
            code = (read(place, tl.int32) >> (8 * byte)) & 255
            value, nested = read(table + (map_at + code * 4), tl.float32), read(place + STEP * 4, tl.float32)
            return tl.inline_asm_elementwise(
                scale_assembly, "=f,f,f,f", [value, nested, mean], dtype=tl.float32, is_pure=True, pack=1
            )
        return read(place, tl.float32)

    @triton.jit
    def values(word, scale, source, table):
        """The 8 elements of a word of codes, with the scale that lane `source` has."""
        scale = tl.inline_asm_elementwise(
            from_assembly, "=f,f,r", [scale, source], dtype=tl.float32, is_pure=False, pack=1
        )
        return tl.inline_asm_elementwise(
            values_assembly, values_operands, [word, scale, table], dtype=(tl.float32,) * 8, is_pure=False, pack=1
        )

    @triton.jit
    def added(upper, lower, a, b, i: tl.constexpr):
        """Columns 2 i and 2 i + 1 of two rows, with 16 ranks of B A added: (upper, upper, lower, lower)."""
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
        # The address as a number: Triton has no common type of pointers and floats.
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
        THREADS: tl.constexpr = 32 * WARPS
        BLOCKS: tl.constexpr = COLUMNS // 64  # of a row
        GROUPS: tl.constexpr = (BLOCKS + WARPS - 1) // WARPS
        CHUNKS: tl.constexpr = RANK // 16
        STEP: tl.constexpr = 8 * OCTETS
        STEPS: tl.constexpr = (ROWS + STEP - 1) // STEP
        STAGE: tl.constexpr = STEP * (40 + 2 * RANK)
        thread = tl.arange(0, THREADS)
        warp, lane = thread // 32, thread % 32
        g, t = lane // 4, lane % 4
        start = tl.program_id(0) // GROUPS
        own_block = tl.program_id(0) % GROUPS * WARPS + warp
        block = tl.minimum(own_block, BLOCKS - 1)
        if STACKED:
            layer = tl.load(index).to(tl.int64)
            codes += layer * (ROWS * (BLOCKS * 32))
            absmax += layer * (ROWS * BLOCKS)
            nested_absmax += layer * ((ROWS * BLOCKS + 255) // 256)
            mean += layer
        a, b = a.to(tl.pointer_type(tl.uint32)), b.to(tl.pointer_type(tl.uint32))
        policy = tl.inline_asm_elementwise(policy_assembly, "=l,r", [thread], dtype=tl.int64, is_pure=True, pack=1)
        table = did(table_assembly, thread * 0)
        here = table + (tables_bytes + warp * (2 * STAGE))
        there = here + STAGE
        ask(
            here, codes, absmax, nested_absmax, b, start * STEP, block, lane, policy,
            ROWS, BLOCKS, CHUNKS, OCTETS, NESTED,
        )  # fmt: skip
        offset = 0.0
        if NESTED:
            offset = tl.load(mean)
        held = ()  # of A^T
        for chunk in tl.static_range(CHUNKS):
            columns = ()
            for i in tl.static_range(8):
                at = (block * 64 + g * 8 + i) * (CHUNKS * 8) + (chunk * 8 + 2 * t)
                columns = columns + (two(load_two_assembly, "l", a + at),)
            held = held + (columns,)
        fill(table + thread % 16 * 4, tl.load(nf4 + thread % 16))
        for i in tl.static_range(256 // THREADS if THREADS < 256 else 1):
            at = (i * THREADS + thread) % 256
            fill(table + (map_at + at * 4), tl.load(dynamic_map + at))
        table = did(filled_assembly, table)
        for step in range(start, STEPS, PROGRAMS):
            there = did(free_assembly, there)
            ask(
                there, codes, absmax, nested_absmax, b, (step + PROGRAMS) * STEP, block, lane, policy,
                ROWS, BLOCKS, CHUNKS, OCTETS, NESTED,
            )  # fmt: skip
            here = did(arrived_assembly, here)
            scale = own_scale(here, absmax, step * STEP, block, lane, offset, table, ROWS, BLOCKS, OCTETS, NESTED)
            for octet in tl.static_range(OCTETS):
                row = 8 * octet + t  # and the one 4 below
                upper = values(read(here + (row * 32 + g * 4), tl.int32), scale, row, table)
                lower = values(read(here + ((row + 4) * 32 + g * 4), tl.int32), scale, row + 4, table)
                for chunk in tl.static_range(CHUNKS):
                    factors = two(read_two_assembly, "r", here + (STEP * (40 + chunk * 32) + octet * 256 + lane * 8))
                    p0, q0, r0, s0 = added(upper, lower, held[chunk], factors, 0)
                    p1, q1, r1, s1 = added(upper, lower, held[chunk], factors, 1)
                    p2, q2, r2, s2 = added(upper, lower, held[chunk], factors, 2)
                    p3, q3, r3, s3 = added(upper, lower, held[chunk], factors, 3)
                    upper, lower = (p0, q0, p1, q1, p2, q2, p3, q3), (r0, s0, r1, s1, r2, s2, r3, s3)
                row += step * STEP
                place = out + (row * COLUMNS + (block * 64 + g * 8))
                write(upper, place, (row < ROWS) & (own_block < BLOCKS))
                write(lower, place + 4 * COLUMNS, (row + 4 < ROWS) & (own_block < BLOCKS))
            here, there = there, here

    return merge_nf4


def merge_nf4(
    codes: jax.Array,
    absmax: jax.Array,
    nested_absmax: jax.Array | None,
    offset: jax.Array | None,
    index: jax.Array | None,
    a: jax.Array | None,
    b: jax.Array | None,
    *,
    shape: tuple[int, int],
    dtype: jax.typing.DTypeLike,
    config: Config | None = None,
) -> jax.Array:
    """`nf4_merge.merge_nf4`, which calls it, for bfloat16 and float16, [out, in], and ranks up to `MOST_RANKS`.

    Raises:
      NotImplementedError: jax-triton is not installed, the dtype or rank is another, rows are not whole blocks
        (in % 64), or there are 2^31 elements or more.
      ValueError: the configuration takes more than 48 KB of shared memory.
    """
    rows, columns = shape
    dtype = jnp.dtype(dtype)
    rank = 0 if a is None else -(-a.shape[-2] // 16) * 16
    if dtype not in (jnp.bfloat16, jnp.float16):
        raise NotImplementedError(f"the kernel writes bfloat16 or float16, not {dtype.name}")
    if rank > MOST_RANKS:
        raise NotImplementedError(f"the kernel holds at most {MOST_RANKS} ranks, not {rank}")
    if columns % reference.NF4_BLOCK:
        raise NotImplementedError(f"the kernel takes rows of whole blocks of 64, not of {columns} elements")
    if rows * columns >= 1 << 31:
        raise NotImplementedError(f"the kernel counts elements in 32 bits, and there are {rows * columns}")
    try:
        import jax_triton
    except ImportError as error:
        raise NotImplementedError(f"the kernel needs jax-triton and triton ({error})") from error

    blocks = columns // reference.NF4_BLOCK
    config = heuristics(rank, blocks) if config is None else config
    shared = shared_bytes(rank, config.octets, config.num_warps)
    if shared > 48 << 10:
        raise ValueError(f"{config} takes {shared} bytes of shared memory for {rank} ranks, of 49152: take fewer warps")
    groups = -(-blocks // config.num_warps)
    programs = min(max(config.programs // groups, 1), -(-rows // (8 * config.octets)))
    call = functools.partial(
        jax_triton.triton_call,
        kernel=_kernel(dtype, shared),
        out_shape=jax.ShapeDtypeStruct(shape, dtype),
        grid=(groups * programs,),
        num_warps=config.num_warps,
        ROWS=rows,
        COLUMNS=columns,
        RANK=rank,
        NESTED=nested_absmax is not None,
        STACKED=index is not None,
        WARPS=config.num_warps,
        OCTETS=config.octets,
        PROGRAMS=programs,
    )

    @jax.custom_batching.sequential_vmap
    def run(codes, absmax, nested_absmax, offset, index, a, b):
        return call(
            codes, absmax, nested_absmax, offset, index, a, b,
            jnp.asarray(reference.NF4), jnp.asarray(reference.DYNAMIC_MAP),
        )  # fmt: skip

    none = jnp.zeros((1,), jnp.float32)
    if nested_absmax is None:
        nested_absmax, offset = none, none
    index = jnp.zeros((), jnp.int32) if index is None else index
    if a is None or b is None:
        a, b = none.astype(dtype), none.astype(dtype)
    else:
        padding = ((0, 0), (0, rank - a.shape[0]))
        a, b = jnp.pad(a.T.astype(dtype), padding), jnp.pad(b.astype(dtype), padding)
    return run(codes, absmax, nested_absmax, offset, index, a, b)
