"""The weight of a LoRA layer as one 16-bit matrix, [out, in]: what `nf4_merge.py` computes, laid out for the memory.

The maths is that of `nf4_merge.py`: out = round(NF4[code] * (gain * scale) + B A), sums in float32, rounded once.
Products and sums of scales are rounded one by one, so where B A is 0 and there is no gain the bits are those of
`reference.dequantize_nf4`.

The layout. A warp makes 64 columns, one block of NF4, of 8 rows at a time, as the transposed sum of `mma.m16n8k16`: the
16 rows of a product are columns of the weight, its 8 columns are rows. In it lane 4 g + t holds, of rows 2 t and
2 t + 1, two numbers of each product; four products make the 64 columns. Which column of the weight is which row of a
product is free, as long as A is loaded that way, so lane g takes columns 8 g .. 8 g + 7: of a row it reads one word of
codes, looks up 8 numbers, multiplies them by the row's scale, hands them to the tensor cores as the sum to which B A is
added, rounds what comes back, and writes 16 bytes. No number changes lanes, a load is 4 whole sectors and a store 4
whole lines, of 4 rows. The order of k is free too: lane t takes ranks 4 t .. 4 t + 3 of 16, 8 bytes, of A and of B. A
is read transposed, once for all rows of a program, and stays in registers, hence at most `MOST_RANKS`.

The lookup. NF4 is 64 bytes of shared memory, which lie in 16 banks: a warp's 32 lookups are one pass, whatever the
codes are.

The stream. A warp of a program has its block of columns and goes down the rows, 16 a step. It asks for the codes,
statistics and rows of B of its next step, into registers, before it makes this one. The last step asks for itself once
more: for a row that is the same for all programs they would stand in line at one bank of L2. The tables, which do not
depend on the index of the stack, are asked for first, and the first step before they are filled. Codes are read once,
and are the first to leave L2, where what is written should stay for cuBLAS. No warp waits for another but at the start.

The trade, measured on an H100 on 2026-11-26 (share of the speed of a copy, 2.94 TB/s), the kernel of `nf4_merge.py`
first: 14336 x 4096 with 16 ranks 71.2 us (71%) and 57.1 (88%), with 32 ranks 81.1 (62%) and 60.6 (83%); with 16 ranks
4096 x 4096 23.7 (61%) and 18.6 (77%), 1024 x 4096 7.8 (46%) and 6.9 (52%). Without an adapter this layout took 58.8 us,
and `nf4_merge.py` 53.8 us (94%), which therefore has those. Dead ends: the next step's bytes by asynchronous copies
into shared memory, 67.6 us with 16 ranks (66.5 us without any lookup), and 112.6 us with 64, for `nf4_merge.py`
89.3 us; a program for every 16 rows, 152 us. 8 rows a step or 4 warps a program are within 0.5 us with 16 ranks; with
32 they took 61.9 and 59.3.

Triton does the addresses, on tensors of one element a thread, as in `nf4_matmul.py`.
"""

import functools
from dataclasses import dataclass
from typing import no_type_check

import jax
import jax.numpy as jnp
import numpy as np

from jaxlora.kernels import reference
from jaxlora.kernels.h100 import SMS

MOST_RANKS = 32
MAP_AT = 128  # where DYNAMIC_MAP is in shared memory, behind NF4


@dataclass(frozen=True, kw_only=True)
class Config:
    """How the kernel is laid out on the device; no field changes a result.

    Attributes:
      programs: programs of a launch at most, or one for every `num_warps` blocks of columns if those are more.
      num_warps: warps of a program, each with a block of columns of its own; a power of two, at most 8.
      octets: eights of rows that a warp asks for at once.
    """

    programs: int
    num_warps: int = 8
    octets: int = 2

    def __post_init__(self):
        if self.num_warps not in (1, 2, 4, 8):
            raise ValueError(f"num_warps must be 1, 2, 4 or 8, not {self.num_warps}")
        for name in ("octets", "programs"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or more, not {getattr(self, name)}")


def heuristics(rank: int) -> Config:
    """The configuration for a rank, a multiple of 16: as many programs as an SM's registers hold.

    By the sm_90 code of Triton 3.6 a thread takes 80 for 16 ranks and 128 for 32, as many of them for A as there are
    ranks.
    """
    return Config(programs=(3 if rank == 16 else 2) * SMS)


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
def _kernel(dtype: np.dtype):
    """The Triton function. Built on first use, since the library imports where Triton is not installed."""
    import triton
    import triton.language as tl

    kind = "bf16" if dtype == jnp.bfloat16 else "f16"
    map_at = tl.constexpr(MAP_AT)
    table_assembly = tl.constexpr(
        f"{{ .shared .align 128 .b8 table[{MAP_AT + 256 * 4}]; mov.u32 $0, table; add.u32 $0, $0, $1; }}"
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

    @triton.jit
    def did(assembly: tl.constexpr, place):
        """`place`, after the assembly."""
        return tl.inline_asm_elementwise(assembly, "=r,r", [place], dtype=tl.int32, is_pure=False, pack=1)

    @triton.jit
    def fill(place, value):
        tl.inline_asm_elementwise(fill_assembly, "=r,r,f", [place, value], dtype=tl.int32, is_pure=False, pack=1)

    @triton.jit
    def load_float(place):
        return tl.inline_asm_elementwise(float_assembly, "=f,l", [place], dtype=tl.float32, is_pure=False, pack=1)

    @triton.jit
    def two_words(place):
        return tl.inline_asm_elementwise(
            two_assembly, "=r,=r,l", [place], dtype=(tl.uint32,) * 2, is_pure=False, pack=1
        )

    @triton.jit
    def two_floats(place):
        return tl.inline_asm_elementwise(
            two_assembly, "=f,=f,l", [place], dtype=(tl.float32,) * 2, is_pure=False, pack=1
        )

    @triton.jit
    def ask_row(codes, absmax, nested_absmax, row, block, g, policy, BLOCKS: tl.constexpr, NESTED: tl.constexpr):
        """Begin to load a lane's word of a row, and the statistics of its block."""
        number = row * BLOCKS + block
        word = tl.inline_asm_elementwise(
            codes_assembly, "=r,l,l", [codes + (number * 8 + g), policy], dtype=tl.uint32, is_pure=False, pack=1
        )
        nested = 0.0
        if NESTED:
            nested = load_float(nested_absmax + (number >> 8))
            scale = tl.inline_asm_elementwise(
                byte_assembly, "=r,l", [absmax + number], dtype=tl.int32, is_pure=False, pack=1
            )
        else:
            scale = load_float(absmax + number)
        return word, scale, nested

    @triton.jit
    def ask(
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
                    ask_row(codes, absmax, nested_absmax, upper, block, g, policy, BLOCKS, NESTED),
                    ask_row(codes, absmax, nested_absmax, lower, block, g, policy, BLOCKS, NESTED),
                    factors,
                ),
            )
        return octets

    @triton.jit
    def values(asked_row, gain, mean, table, NESTED: tl.constexpr, GAINED: tl.constexpr):
        """A lane's 8 elements of a row."""
        word, scale, nested = asked_row
        if NESTED:
            place = table + (map_at + scale * 4)
            value = tl.inline_asm_elementwise(read_assembly, "=f,r", [place], dtype=tl.float32, is_pure=False, pack=1)
            scale = tl.inline_asm_elementwise(
                scale_assembly, "=f,f,f,f", [value, nested, mean], dtype=tl.float32, is_pure=True, pack=1
            )
        if GAINED:
            scale = scale * gain
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
    def merge_nf4_16(
        codes,  # uint8 [stack, rows, columns / 2]
        absmax,  # uint8 or float32 [stack, rows, columns / 64]
        nested_absmax,  # float32 [stack, ceil(blocks / 256)]; unread unless NESTED
        mean,  # float32 [stack]; unread unless NESTED
        index,  # int32 []: which of the stack; unread unless STACKED
        a,  # [columns, RANK]
        b,  # [rows, RANK]
        nf4,  # float32 [16]
        dynamic_map,  # float32 [256]
        gain,  # float32 [rows], up to a whole step; unread unless GAINED
        out,  # [rows, columns]
        ROWS: tl.constexpr,
        COLUMNS: tl.constexpr,
        RANK: tl.constexpr,  # a multiple of 16
        NESTED: tl.constexpr,
        STACKED: tl.constexpr,
        GAINED: tl.constexpr,
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
        thread = tl.arange(0, THREADS)
        g, t = thread % 32 // 4, thread % 4
        start = tl.program_id(0) // GROUPS
        last = start + (STEPS - 1 - start) // PROGRAMS * PROGRAMS
        own_block = tl.program_id(0) % GROUPS * WARPS + thread // 32
        block = tl.minimum(own_block, BLOCKS - 1)
        a, b = a.to(tl.pointer_type(tl.uint32)), b.to(tl.pointer_type(tl.uint32))
        policy = tl.inline_asm_elementwise(policy_assembly, "=l,r", [thread], dtype=tl.int64, is_pure=True, pack=1)
        layer = 0
        if STACKED:
            layer = tl.load(index)
        held = ()
        for chunk in tl.static_range(CHUNKS):
            columns = ()
            for i in tl.static_range(8):
                at = (block * 64 + g * 8 + i) * (CHUNKS * 8) + 2 * t
                columns = columns + (two_words(a + (at + 8 * chunk)),)
            held = held + (columns,)
        entry = load_float(nf4 + thread % 16)
        entries = ()
        for i in tl.static_range(256 // THREADS):
            entries = entries + (load_float(dynamic_map + (i * THREADS + thread)),)
        if STACKED:
            layer = layer.to(tl.int64)
            codes += layer * (ROWS * (BLOCKS * 32))
            absmax += layer * (ROWS * BLOCKS)
            nested_absmax += layer * ((ROWS * BLOCKS + 255) // 256)
            mean += layer
        codes = codes.to(tl.pointer_type(tl.uint32))
        following = ask(
            codes, absmax, nested_absmax, b, start * STEP, block, g, t, policy, ROWS, BLOCKS, CHUNKS, OCTETS, NESTED
        )
        offset = 0.0
        if NESTED:
            offset = load_float(mean + thread * 0)
        table = did(table_assembly, thread * 0)
        fill(table + thread % 16 * 4, entry)
        for i in tl.static_range(256 // THREADS):
            fill(table + (map_at + (i * THREADS + thread) * 4), entries[i])
        table = did(filled_assembly, table)
        for step in range(start, STEPS, PROGRAMS):
            # Not asked for a step before: by the sm_90 code a thread would take 95 registers with 16 ranks, not 80.
            gains = ()
            for octet in tl.static_range(OCTETS):
                pair = (1.0, 1.0)
                if GAINED:
                    pair = two_floats(gain + (step * STEP + 8 * octet + 2 * t))
                gains = gains + (pair,)
            current = following
            following = ask(
                codes, absmax, nested_absmax, b, tl.minimum(step + PROGRAMS, last) * STEP, block, g, t, policy,
                ROWS, BLOCKS, CHUNKS, OCTETS, NESTED,
            )  # fmt: skip
            asked = did(asked_assembly, table)
            for octet in tl.static_range(OCTETS):
                upper = values(current[octet][0], gains[octet][0], offset, asked, NESTED, GAINED)
                lower = values(current[octet][1], gains[octet][1], offset, asked, NESTED, GAINED)
                for chunk in tl.static_range(CHUNKS):
                    factors = current[octet][2][chunk]
                    p0, q0, r0, s0 = added(upper, lower, held[chunk], factors, 0)
                    p1, q1, r1, s1 = added(upper, lower, held[chunk], factors, 1)
                    p2, q2, r2, s2 = added(upper, lower, held[chunk], factors, 2)
                    p3, q3, r3, s3 = added(upper, lower, held[chunk], factors, 3)
                    upper, lower = (p0, q0, p1, q1, p2, q2, p3, q3), (r0, s0, r1, s1, r2, s2, r3, s3)
                row = step * STEP + 8 * octet + 2 * t
                place = out + (row * COLUMNS + (block * 64 + g * 8))
                write(upper, place, (row < ROWS) & (own_block < BLOCKS))
                write(lower, place + COLUMNS, (row + 1 < ROWS) & (own_block < BLOCKS))

    return merge_nf4_16


def merge_nf4(
    codes: jax.Array,
    absmax: jax.Array,
    nested_absmax: jax.Array | None,
    offset: jax.Array | None,
    index: jax.Array | None,
    a: jax.Array | None,
    b: jax.Array | None,
    inverse: jax.Array | None = None,
    gain: jax.Array | None = None,
    *,
    shape: tuple[int, int],
    dtype: jax.typing.DTypeLike,
    transposed: bool = False,
    config: Config | None = None,
) -> jax.Array:
    """`nf4_merge.merge_nf4` for bfloat16 and float16, [out, in], with 1 to `MOST_RANKS` ranks.

    It may be vmapped (which loops) and is not differentiable.

    Raises:
      NotImplementedError: jax-triton is not installed; the dtype is another, or there is an `inverse`; the weight is to
        be transposed; there is no adapter or more ranks; rows are not whole blocks (in % 64), or there are 2^31
        elements or more.
    """
    rows, columns = shape
    dtype = jnp.dtype(dtype)
    if dtype not in (jnp.bfloat16, jnp.float16) or inverse is not None or transposed:
        is_so = "scaled " * (inverse is not None) + "transposed " * transposed
        raise NotImplementedError(f"the kernel writes bfloat16 or float16, [out, in], not {is_so}{dtype.name}")
    if a is None or b is None or not 1 <= a.shape[0] <= MOST_RANKS:
        rank = 0 if a is None else a.shape[0]
        raise NotImplementedError(f"the kernel holds 1 to {MOST_RANKS} ranks, not {rank}")
    if columns % reference.NF4_BLOCK:
        raise NotImplementedError(f"the kernel takes rows of whole blocks of 64, not of {columns} elements")
    if rows * columns >= 1 << 31:
        raise NotImplementedError(f"the kernel counts elements in 32 bits, and there are {rows * columns}")
    try:
        import jax_triton
    except ImportError as error:
        raise NotImplementedError(f"the kernel needs jax-triton and triton ({error})") from error

    rank = -(-a.shape[0] // 16) * 16
    config = heuristics(rank) if config is None else config
    groups = -(-columns // reference.NF4_BLOCK // config.num_warps)
    programs = min(max(config.programs // groups, 1), -(-rows // (8 * config.octets)))
    call = functools.partial(
        jax_triton.triton_call,
        kernel=_kernel(dtype),
        out_shape=jax.ShapeDtypeStruct(shape, dtype),
        grid=(groups * programs,),
        num_warps=config.num_warps,
        ROWS=rows,
        COLUMNS=columns,
        RANK=rank,
        NESTED=nested_absmax is not None,
        STACKED=index is not None,
        GAINED=gain is not None,
        WARPS=config.num_warps,
        OCTETS=config.octets,
        PROGRAMS=programs,
    )

    @jax.custom_batching.sequential_vmap
    def run(codes, absmax, nested_absmax, offset, index, a, b, gain):
        tables = jnp.asarray(reference.NF4), jnp.asarray(reference.DYNAMIC_MAP)
        return call(codes, absmax, nested_absmax, offset, index, a, b, *tables, gain)

    if nested_absmax is None:
        nested_absmax = offset = jnp.zeros((1,), jnp.float32)
    index = jnp.zeros((), jnp.int32) if index is None else index
    padding = ((0, 0), (0, rank - a.shape[0]))
    a, b = jnp.pad(a.T.astype(dtype), padding), jnp.pad(b.astype(dtype), padding)
    gain = jnp.zeros((1,), jnp.float32) if gain is None else jnp.pad(gain, (0, -rows % (8 * config.octets)))
    return run(codes, absmax, nested_absmax, offset, index, a, b, gain)
