"""Products with NF4 weights for few tokens: y = x W^T, dequantised inside the product, in one Triton kernel.

The maths, for x [M, in] and a weight [out, in] in blocks of 64 elements of a row:

    y[m, n] = sum over blocks b of   scale[n, b] * sum over k in b of   NF4[code[n, k]] * x[m, k]

NF4 is rounded to x's dtype, the products are exact, both sums are float32, and so are the scales: what is rounded is
the table, where dequantising first rounds every weight.

The layout. A warp takes 16 rows of the weight and multiplies them with `mma.m16n8k16`, whose operands it loads straight
to the lanes where the tensor cores want them: no shuffling of weights. The order of k within a
product is free as long as both operands agree on it, so lane 4 g + t takes

    of row g and of row g + 8 of the weight    8 bytes, elements 16 t .. 16 t + 15 of a block,
    of row g of x                             32 bytes, the same elements,

and step s of the four of a block multiplies elements 4 s .. 4 s + 3 of all lanes. A block's sum is multiplied by its
scale and added to the total. The warps of a program share its rows and divide k; their totals are added at the end.
`split` programs may divide k further, and leave float32 parts that XLA adds: no atomics, so a result never varies.

Codes come by asynchronous copies into shared memory, some steps ahead, 8 bytes to each lane from where it asked for
them: the assembler moves plain loads down to where their values are used, however early they stand, and of those few
are on their way at a time. So does x, of one or two tokens.

Triton does the addresses, the loads, and the sum over warps. It holds the operands as tensors of one element a thread,
whose layout is the only one there is for such a shape, and inline PTX does what is done across a warp.

The trade. At the speed of a copy an SM of an H100 must take 25 weights a cycle, for which it has 5.2 instructions each,
2.6 of them in the integer unit. The lookup of 8 codes into 4 registers of 2 elements each is
  * "prmt": byte permutations, with the table in immediate operands: 19 integer instructions and 4 floating;
  * "shfl": a warp shuffle is a table of 32 entries, so one for each element: 11 integer and 8 in the load unit, which
    does 32 elements a cycle;
  * "mixed": one word this way, the next one that.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, no_type_check

import jax
import jax.numpy as jnp
import numpy as np

from jaxlora.kernels import reference
from jaxlora.kernels.reference import NF4Fields

LOOKUPS = ("prmt", "shfl", "mixed")
# What NF4 is multiplied by before it is rounded to 16 bits, and the sum divided by at the end: with these its entries
# lie near numbers of the dtype, and the error of weights that are normally distributed is least. It is 8.0e-4 in
# bfloat16 and 8.4e-5 in float16, relative, where dequantising first has 1.7e-3 and 2.1e-4.
FACTORS = {"bfloat16": 1.43675, "float16": 1.6385}
MOST_TOKENS = 64
MOST_WEIGHTS = 3
MOST_TOKENS_IN_RING = 2
RING = 40 << 10  # bytes of shared memory; what needs no asking for is 48 KB, and the sum over warps wants some


@dataclass(frozen=True, kw_only=True)
class Config:
    """How the kernel is laid out on the device; no field changes a result but for the order of its sums.

    Attributes:
      num_warps: warps of a program, among which k is divided; a power of two.
      row_tiles: tiles of 16 rows that a warp takes, 1 or 2: x is read once for all of them.
      split: programs that divide k, each leaving a part of the sum.
      lookup: how codes become numbers, see the head of this file.
      depth: steps, of 2 KB for each warp and row tile, that codes are asked for ahead, where shared memory has room.
    """

    num_warps: int = 4
    row_tiles: int = 1
    split: int = 1
    lookup: Literal["prmt", "shfl", "mixed"] = "mixed"
    depth: int = 2

    def __post_init__(self):
        if self.num_warps < 1 or self.num_warps & (self.num_warps - 1):
            raise ValueError(f"num_warps must be a power of two, not {self.num_warps}")
        if self.row_tiles not in (1, 2):
            raise ValueError(f"row_tiles must be 1 or 2, not {self.row_tiles}")
        if self.split < 1:
            raise ValueError(f"split must be 1 or more, not {self.split}")
        if self.lookup not in LOOKUPS:
            raise ValueError(f"lookup must be one of {', '.join(LOOKUPS)}, not {self.lookup!r}")
        if 2048 * self.num_warps * self.row_tiles > RING:
            raise ValueError(f"{self.num_warps} warps of {self.row_tiles} row tiles take more than {RING} bytes a step")
        if self.depth < 1:
            raise ValueError(f"depth must be 1 or more, not {self.depth}")


@dataclass(frozen=True)
class Ring:
    """The shared memory of a program: `slots` of `slot` bytes, of which `depth` steps' are asked for ahead.

    Codes are read by the lane that asked for them, x by others of its warp, and only of few tokens: of more it would
    take more room than the codes.
    """

    slot: int
    slots: int
    depth: int
    has_x: bool

    @classmethod
    def of(cls, config: Config, tokens: int, columns: int) -> "Ring":
        steps = -(-columns // (256 * config.num_warps * config.split))
        of_codes, of_x = 2048 * config.num_warps * config.row_tiles, 512 * config.num_warps * tokens
        least = min(steps, 2)  # slots
        if least * of_codes > RING:
            raise ValueError(
                f"{config} takes {columns} columns in {steps} steps, and {RING} bytes have no room for two"
            )
        has_x = tokens <= MOST_TOKENS_IN_RING and least * (of_codes + of_x) <= RING
        slot = of_codes + of_x * has_x
        room = RING // slot
        # One slot more than are on their way, so that none is written while it is read; unless there is one for each.
        depth = min(config.depth, steps, room if steps <= room else room - 1)
        return cls(slot, min(depth + 1, steps), depth, has_x)


def heuristics(tokens: int, shape: tuple[int, int]) -> Config:
    """The configuration for so many tokens and a weight [out, in], out being the sum over what shares a launch.

    A program's prologue and its sum over warps cost more than they do for many small programs: so 4 warps, and more
    where there are too few programs to fill an H100, which holds 4 of 8 warps on an SM. Never so many that one is idle.
    An earlier form, which asked for codes too late, took on an H100, at one token: [4096, 4096] 8.5 us with 16 warps,
    9.6 with 8, 11.0 with 4; [14336, 4096] 20.0 with 4, 24.3 with 8; [4096, 14336] 20.6 with 8, 27.0 with 16.
    """
    rows, columns = shape
    programs, steps = -(-rows // 16), columns // (4 * reference.NF4_BLOCK)
    wanted = 16 if programs <= 132 else 8 if programs <= 4 * 132 else 4
    num_warps = 1
    while 2 * num_warps <= min(wanted, steps):
        num_warps *= 2
    return Config(num_warps=num_warps)


def _table(dtype: np.dtype) -> np.ndarray:
    """NF4 times its factor in a 16-bit dtype, as bits: uint16 [16]."""
    return (reference.NF4 * np.float32(FACTORS[dtype.name])).astype(dtype).view(np.uint16)


def _planes(dtype: np.dtype) -> dict[str, tuple[int, int]]:
    """The table as "prmt" has it: magnitudes of codes below 8 ("n", negative) and of the others ("p"), their low bytes
    ("l") and high ones ("h"), four in a word."""
    bits = _table(dtype) & 0x7FFF
    planes = {}
    for side, codes in (("n", bits[:8]), ("p", bits[8:])):
        for byte, values in (("l", codes & 0xFF), ("h", codes >> 8)):
            planes[side + byte] = tuple(values.astype(np.uint8).view("<u4").tolist())
    return planes


def tables(dtype: np.dtype) -> np.ndarray:
    """A lane's registers, uint32 [5, 32]: an entry of the table twice, for "shfl"; and for "prmt" the first words of
    the four planes, whose second words are immediate operands, of which an instruction has one. The latter are the
    same in all lanes, which the compiler must not know, or it copies them out of uniform registers each time."""
    entries = np.tile(_table(dtype).astype(np.uint32), 2)
    firsts = np.array([first for first, _ in _planes(dtype).values()], np.uint32)
    return np.concatenate([[entries << 16 | entries], np.repeat(firsts[:, None], 32, 1)])


def _lookup_prmt(word: str, out: list[str], firsts: tuple[str, ...], dtype: np.dtype) -> list[str]:
    """PTX that turns the 8 codes of a word into 4 registers of 2 elements, in order.

    `prmt d, a, b, s` makes byte k of d from nibble k of s: its low 3 bits choose one of the 8 bytes of (a, b); its top
    bit asks for 8 copies of that byte's sign instead. So four codes are a selector as they are. Two tables of
    magnitudes, for codes below 8, which are negative, and the others; the latter's selector has its top bits flipped.
    The high bytes of magnitudes have no sign: a code of the other table finds 0 there. Its low byte may be 255, which
    makes the number a subnormal: below 2^-125 in bfloat16, and 2^-16 in float16, an eighth of its rounding.
    """
    kind = "bf16x2" if dtype == jnp.bfloat16 else "f16x2"
    minus_one = "0xBF80BF80" if dtype == jnp.bfloat16 else "0xBC00BC00"
    lines = [f"mov.b32 minus, {minus_one};", f"xor.b32 flipped, {word}, 0x88888888;"]
    for half in range(2):
        selectors = {"n": word, "p": "flipped"}
        if half:
            for side, selector in selectors.items():
                lines.append(f"shr.u32 s{side}, {selector}, 16;")
                selectors[side] = f"s{side}"
        for first, (plane, (_, second)) in zip(firsts, _planes(dtype).items(), strict=True):
            lines.append(f"prmt.b32 {plane}, {first}, {second:#010x}, {selectors[plane[0]]};")
        for pair, selector in enumerate(("0x4051", "0x6273")):  # of two codes in a byte the high nibble comes first
            lines += [f"prmt.b32 {side}, {side}l, {side}h, {selector};" for side in ("n", "p")]
            lines.append(f"fma.rn.{kind} {out[2 * half + pair]}, n, minus, p;")
    return lines


def _lookup_shfl(word: str, out: list[str], table: str) -> list[str]:
    """The same by shuffles: lane i holds entry i % 16 of the table in both halves of the register `table`.

    A shuffle reads 5 bits of the index. The fifth, of the next code, does not matter.
    """
    lines = []
    for pair, register in enumerate(out):
        for name, nibble in (("t", 2 * pair + 1), ("u", 2 * pair)):
            lines += [
                f"shr.u32 {name}, {word}, {4 * nibble};",
                f"shfl.sync.idx.b32 {name}, {table}, {name}, 0x1f, 0xffffffff;",
            ]
        lines.append(f"prmt.b32 {register}, t, u, 0x5410;")
    return lines


def _lookup_assembly(lookup: str, dtype: np.dtype) -> str:
    """PTX for the codes $8, $9 and the tables $10 and $11..$14: the 16 elements of a lane, two a register, $0..$7."""
    lines = [".reg .b32 minus, flipped, t, u, n, p, nl, nh, pl, ph, sn, sp;"]
    for i in range(2):
        out = [f"${4 * i + j}" for j in range(4)]
        by_shuffle = lookup == "shfl" or (lookup == "mixed" and i == 1)
        word = f"${8 + i}"
        if by_shuffle:
            lines += _lookup_shfl(word, out, "$10")
        else:
            lines += _lookup_prmt(word, out, ("$11", "$12", "$13", "$14"), dtype)
    return "{\n" + "\n".join(lines) + "\n}"


def _product_assembly(dtype: np.dtype) -> str:
    """PTX for a block: totals $0..$3 from rows g $4..$11 and g + 8 $12..$19, x $20..$27, scales $28, $29, and the
    totals so far $30..$33."""
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


@functools.cache
@no_type_check  # a type checker's wrapper around the function would hide its source from Triton
def _kernel(lookup: str, dtype: np.dtype, ring: int, depth: int):
    """The Triton function. Built on first use, since the library imports where Triton is not installed.

    ring: bytes of shared memory for codes on their way; depth: steps that they are asked for ahead.
    """
    import triton
    import triton.language as tl

    lookup_assembly = tl.constexpr(_lookup_assembly(lookup, dtype))
    lookup_operands = tl.constexpr(",".join(["=&r"] * 8 + ["r"] * 7))
    product_assembly = tl.constexpr(_product_assembly(dtype))
    product_operands = tl.constexpr(",".join(["=&f"] * 4 + ["r"] * 24 + ["f"] * 6))
    unit = tl.constexpr(1.0 / FACTORS[dtype.name])
    ring_assembly = tl.constexpr(f"{{ .shared .align 16 .b8 ring[{ring}]; mov.u32 $0, ring; add.u32 $0, $0, $1; }}")
    copy_assembly = tl.constexpr(
        "cp.async.ca.shared.global.L2::cache_hint.L2::128B [$1], [$2], 8, $3, $4; mov.b32 $0, $1;"
    )
    # Codes are read once, and must not drive out of the cache what is read by every program of every layer.
    policy_assembly = tl.constexpr("createpolicy.fractional.L2::evict_first.b64 $0, 1.0;")
    prefetch_assembly = tl.constexpr("prefetch.global.L2 [$1]; mov.b32 $0, 0;")
    copy_x_assembly = tl.constexpr("cp.async.cg.shared.global [$1], [$2], 16, $3; mov.b32 $0, $1;")
    commit_assembly = tl.constexpr("cp.async.commit_group; mov.b32 $0, $1;")
    wait_assembly = tl.constexpr(f"cp.async.wait_group {depth - 1}; bar.warp.sync 0xffffffff; mov.b32 $0, $1;")
    read_assembly = tl.constexpr("ld.shared.v4.b32 {$0, $1, $2, $3}, [$4];")
    scale_operands = tl.constexpr("=r,r,r")
    scale_assembly = tl.constexpr("shfl.sync.idx.b32 $0, $1, $2, 0x1c03, 0xffffffff;")  # among 4 lanes

    @triton.jit
    def block_of(first, i: tl.constexpr, BLOCKS: tl.constexpr):
        """Block i of four. What lies beyond a row's last block is read there once more, and counts for nothing."""
        if BLOCKS % 4:
            return tl.minimum(first + i, BLOCKS - 1)
        return first + i

    @triton.jit
    def inside(first, BLOCKS: tl.constexpr):
        if BLOCKS % 4:
            return tl.minimum(first, BLOCKS - 1)
        return tl.minimum(first, BLOCKS - 4)

    @triton.jit
    def ordered(assembly: tl.constexpr):
        """An instruction that keeps its place among copies and reads."""
        tl.inline_asm_elementwise(assembly, "=r,r", [0], dtype=tl.int32, is_pure=False, pack=1)

    @triton.jit
    def ask_x(first, target, x, lane, M: tl.constexpr, BLOCKS: tl.constexpr, THREADS: tl.constexpr):
        """Begin to copy four blocks of each token to shared memory, 16 bytes a lane; of what is beyond a row, zeros."""
        size = tl.where(first + lane // 8 < BLOCKS, 16, 0)
        block = tl.minimum(first, BLOCKS - 1) * 16 + tl.where(size > 0, lane, 0) * 2
        for i in tl.static_range(M):
            tl.inline_asm_elementwise(
                copy_x_assembly,
                "=r,r,l,r",
                [target + i * (16 * THREADS), x + (i * BLOCKS * 16 + block), size],
                dtype=tl.int32,
                is_pure=False,
                pack=1,
            )

    @triton.jit
    def taken_x(place):
        """The 32 bytes of shared memory at `place`, as 8 words."""
        a, b, c, d = tl.inline_asm_elementwise(
            read_assembly, "=r,=r,=r,=r,r", [place], dtype=(tl.uint32,) * 4, is_pure=False, pack=1
        )
        e, f, g, h = tl.inline_asm_elementwise(
            read_assembly, "=r,=r,=r,=r,r", [place + 16], dtype=(tl.uint32,) * 4, is_pure=False, pack=1
        )
        return a, b, c, d, e, f, g, h

    @triton.jit
    def ask(first, target, codes, policy, BLOCKS: tl.constexpr, THREADS: tl.constexpr):
        """Begin to copy 8 bytes of each of four blocks of a row to shared memory; of what is beyond the row, zeros."""
        start = inside(first, BLOCKS)
        size = tl.where(first < BLOCKS, 8, 0)
        for i in tl.static_range(4):
            source = codes + block_of(start, i, BLOCKS) * 4
            place = target + (i // 2) * (16 * THREADS) + (i % 2) * 8
            tl.inline_asm_elementwise(
                copy_assembly, "=r,r,l,r,l", [place, source, size, policy], dtype=tl.int32, is_pure=False, pack=1
            )

    @triton.jit
    def taken(place, THREADS: tl.constexpr):
        """What `ask` copied: 2 words of each of four blocks."""
        a, b, c, d = tl.inline_asm_elementwise(
            read_assembly, "=r,=r,=r,=r,r", [place], dtype=(tl.uint32,) * 4, is_pure=False, pack=1
        )
        e, f, g, h = tl.inline_asm_elementwise(
            read_assembly, "=r,=r,=r,=r,r", [place + 16 * THREADS], dtype=(tl.uint32,) * 4, is_pure=False, pack=1
        )
        return (a, b), (c, d), (e, f), (g, h)

    @triton.jit
    def statistics_at(block, is_inside, absmax, nested_absmax, NESTED: tl.constexpr):
        """absmax, and nested absmax, of a block."""
        nested = 0.0
        if NESTED:
            nested = tl.load(nested_absmax + (block >> 8), mask=is_inside)
        return tl.load(absmax + block, mask=is_inside), nested

    @triton.jit
    def scale_of(statistics, is_inside, offset, dynamic_map, NESTED: tl.constexpr):
        scale = statistics[0]
        if NESTED:
            scale = tl.load(dynamic_map + scale.to(tl.int32), mask=is_inside) * statistics[1] + offset
        return tl.where(is_inside, scale, 0.0)

    @triton.jit
    def from_lane(value, lane):
        return tl.inline_asm_elementwise(
            scale_assembly, scale_operands, [value, lane], dtype=tl.float32, is_pure=True, pack=1
        )

    @triton.jit
    def weights(word, tables):
        """The 16 elements whose codes are in 2 words, as 8 words."""
        return tl.inline_asm_elementwise(
            lookup_assembly, lookup_operands, word + tables, dtype=(tl.uint32,) * 8, is_pure=True, pack=1
        )

    @triton.jit
    def operand(pointer):
        """The 32 bytes at each pointer to 8 of them, as 8 words."""
        two = tl.arange(0, 2)[None, :]
        a, b = tl.split(tl.load(pointer[:, None] + two))
        c, d = tl.split(tl.load(pointer[:, None] + 2 + two))
        return (
            a.to(tl.uint32), (a >> 32).to(tl.uint32), b.to(tl.uint32), (b >> 32).to(tl.uint32),
            c.to(tl.uint32), (c >> 32).to(tl.uint32), d.to(tl.uint32), (d >> 32).to(tl.uint32),
        )  # fmt: skip

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
    def add(a0, a1, a2, a3, b0, b1, b2, b3):
        return a0 + b0, a1 + b1, a2 + b2, a3 + b3

    @triton.jit
    def matmul_nf4(
        x,  # [M, COLUMNS]
        nf4,  # uint32 [5, 32], `tables`
        dynamic_map,  # float32 [256]
        codes0,  # of the first weight: uint8 [stack, rows, COLUMNS / 2]
        absmax0,  # uint8 or float32 [stack, rows, COLUMNS / 64]
        nested_absmax0,  # float32 [stack, ceil(blocks / 256)]; unread unless NESTED
        offset0,  # float32 [stack]; unread unless NESTED
        index0,  # int32 []: which of the stack; unread unless STACKED
        codes1,  # of the second, and so on; unread where there are fewer
        absmax1,
        nested_absmax1,
        offset1,
        index1,
        codes2,
        absmax2,
        nested_absmax2,
        offset2,
        index2,
        out0,  # [M, rows], or float32 [SPLIT, M, rows]
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
        SPLIT: tl.constexpr,
        WARPS: tl.constexpr,
        ROW_TILES: tl.constexpr,
        TOKEN_TILES: tl.constexpr,  # of 8
        X_IN_RING: tl.constexpr,
        DEPTH: tl.constexpr,  # steps that codes are asked for ahead
        SLOTS: tl.constexpr,  # of the ring
    ):
        BLOCKS: tl.constexpr = COLUMNS // 64  # of a row
        STEP: tl.constexpr = 4 * WARPS * SPLIT
        STEPS: tl.constexpr = (BLOCKS + STEP - 1) // STEP
        thread = tl.arange(0, 32 * WARPS)
        if NESTED:  # which is looked up by what must come first
            tl.inline_asm_elementwise(
                prefetch_assembly, "=r,l", [dynamic_map + thread % 32 * 8], dtype=tl.int32, is_pure=False, pack=1
            )
        program = tl.program_id(0)
        rows = program * 0 + ROWS0
        codes, absmax, nested_absmax, offset, index, out = codes0, absmax0, nested_absmax0, offset0, index0, out0
        FIRST: tl.constexpr = (ROWS0 + 16 * ROW_TILES - 1) // (16 * ROW_TILES)
        SECOND: tl.constexpr = FIRST + (ROWS1 + 16 * ROW_TILES - 1) // (16 * ROW_TILES)
        if WEIGHTS > 1:
            if tl.program_id(0) >= FIRST:
                codes, absmax, nested_absmax, offset = codes1, absmax1, nested_absmax1, offset1
                index, out = index1, out1
                rows = program * 0 + ROWS1
                program = tl.program_id(0) - FIRST
        if WEIGHTS > 2:
            if tl.program_id(0) >= SECOND:
                codes, absmax, nested_absmax, offset = codes2, absmax2, nested_absmax2, offset2
                index, out = index2, out2
                rows = program * 0 + ROWS2
                program = tl.program_id(0) - SECOND
        if STACKED:
            layer = tl.load(index).to(tl.int64)
            codes += layer * (rows * (BLOCKS * 32))
            absmax += layer * (rows * BLOCKS)
            nested_absmax += layer * ((rows * BLOCKS + 255) // 256)
            offset += layer
        mean = 0.0
        if NESTED:
            mean = tl.load(offset)
        group, t = thread % 32 // 4, thread % 4
        codes = codes.to(tl.pointer_type(tl.uint64)) + t
        x_words = x.to(tl.pointer_type(tl.uint64))
        x = x_words + t * 4
        tables = ()
        for i in tl.static_range(5):
            tables = tables + (tl.load(nf4 + 32 * i + thread % 32),)

        THREADS: tl.constexpr = 32 * WARPS
        X_AT: tl.constexpr = 2 * ROW_TILES * 32 * THREADS  # in a slot
        SLOT: tl.constexpr = X_AT + (M * 16 * THREADS if X_IN_RING else 0)
        policy = tl.inline_asm_elementwise(policy_assembly, "=l,r", [thread], dtype=tl.int64, is_pure=True, pack=1)
        ring = tl.inline_asm_elementwise(ring_assembly, "=&r,r", [thread * 16], dtype=tl.int32, is_pure=False, pack=1)
        first = 4 * (thread // 32 + WARPS * tl.program_id(1))
        starts = ()  # the number of the first block of each row
        for i in tl.static_range(2 * ROW_TILES):
            row = program * (16 * ROW_TILES) + 8 * i + group
            starts = starts + (tl.minimum(row, rows - 1) * BLOCKS,)
        for step in tl.static_range(DEPTH):
            if X_IN_RING:
                target = ring + (step * SLOT + X_AT)
                ask_x(first + step * STEP, target, x_words, thread % 32, M, BLOCKS, THREADS)
            for i in tl.static_range(2 * ROW_TILES):
                target = ring + (step * SLOT + i * 32 * THREADS)
                ask(first + step * STEP, target, codes + starts[i] * 4, policy, BLOCKS, THREADS)
            ordered(commit_assembly)
        statistics = ()
        for i in tl.static_range(2 * ROW_TILES):
            at, is_inside = first + t, first + t < BLOCKS
            statistics = statistics + (statistics_at(starts[i] + at, is_inside, absmax, nested_absmax, NESTED),)
        tokens = ()
        for i in tl.static_range(TOKEN_TILES):
            tokens = tokens + (x + tl.minimum(8 * i + group, M - 1) * (COLUMNS // 4),)
        zero = tl.zeros((32 * WARPS,), tl.float32)
        totals = ((zero, zero, zero, zero),) * (ROW_TILES * TOKEN_TILES)

        # From the lane's own place, where its 16 bytes go, to where its 32 bytes of a block are.
        x_place = tl.minimum(group, M - 1) * (16 * THREADS) + t * 32 - thread % 32 * 16
        full, free = 0, DEPTH % SLOTS  # slots of the ring
        for _ in range(STEPS):
            ordered(wait_assembly)
            current = ()
            for i in tl.static_range(2 * ROW_TILES):
                current = current + (taken(ring + full * SLOT + i * 32 * THREADS, THREADS),)
            scales = ()
            for i in tl.static_range(2 * ROW_TILES):
                scales = scales + (scale_of(statistics[i], first + t < BLOCKS, mean, dynamic_map, NESTED),)
            if DEPTH < STEPS:
                if X_IN_RING:
                    target = ring + free * SLOT + X_AT
                    ask_x(first + DEPTH * STEP, target, x_words, thread % 32, M, BLOCKS, THREADS)
                for i in tl.static_range(2 * ROW_TILES):
                    target = ring + free * SLOT + i * 32 * THREADS
                    ask(first + DEPTH * STEP, target, codes + starts[i] * 4, policy, BLOCKS, THREADS)
            ordered(commit_assembly)
            if STEPS > 1:
                statistics = ()
                for i in tl.static_range(2 * ROW_TILES):
                    at, is_inside = first + STEP + t, first + STEP + t < BLOCKS
                    statistics = statistics + (statistics_at(starts[i] + at, is_inside, absmax, nested_absmax, NESTED),)
            x_here = ring + (full * SLOT + X_AT) + x_place
            full = tl.where(full == SLOTS - 1, 0, full + 1)
            free = tl.where(free == SLOTS - 1, 0, free + 1)
            start = inside(first, BLOCKS)
            for i in tl.static_range(4):
                lane = tl.full((32 * WARPS,), i, tl.int32)
                operands = ()
                if X_IN_RING:
                    operands = operands + (taken_x(x_here + i * 128),)
                for j in tl.static_range(0 if X_IN_RING else TOKEN_TILES):
                    operands = operands + (operand(tokens[j] + block_of(start, i, BLOCKS) * 16),)
                sums = totals
                totals = ()
                for tile in tl.static_range(ROW_TILES):
                    upper = weights(current[2 * tile][i], tables)
                    lower = weights(current[2 * tile + 1][i], tables)
                    upper_scale = from_lane(scales[2 * tile], lane)
                    lower_scale = from_lane(scales[2 * tile + 1], lane)
                    for j in tl.static_range(TOKEN_TILES):
                        total = sums[tile * TOKEN_TILES + j]
                        totals = totals + (product(upper, lower, operands[j], upper_scale, lower_scale, total),)
            first += STEP

        lane = tl.arange(0, 32)
        group, t = lane // 4, lane % 4
        out += tl.program_id(1) * (M * rows)
        for tile in tl.static_range(ROW_TILES):
            row = program * (16 * ROW_TILES) + 16 * tile + group
            for j in tl.static_range(TOKEN_TILES):
                total = totals[tile * TOKEN_TILES + j]
                parts = ()
                for i in tl.static_range(4):
                    parts = parts + (tl.reshape(total[i], (WARPS, 32)),)
                parts = tl.reduce(parts, 0, add)
                for i in tl.static_range(4):
                    m, n = 8 * j + 2 * t + i % 2, row + 8 * (i // 2)
                    tl.store(out + m * rows + n, (parts[i] * unit).to(out.dtype.element_ty), mask=(m < M) & (n < rows))

    return matmul_nf4


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
    tokens, columns = x.shape
    if x.dtype not in (jnp.bfloat16, jnp.float16):
        raise NotImplementedError(f"the kernel takes bfloat16 or float16, not {x.dtype.name}")
    if not 0 < tokens <= MOST_TOKENS:
        raise NotImplementedError(f"the kernel takes 1 to {MOST_TOKENS} tokens, not {tokens}")
    if columns % reference.NF4_BLOCK:
        raise NotImplementedError(f"the kernel takes rows of whole blocks of 64, not of {columns} elements")
    if not 0 < len(weights) <= MOST_WEIGHTS:
        raise NotImplementedError(f"the kernel takes 1 to {MOST_WEIGHTS} weights, not {len(weights)}")
    if max(rows * columns for rows, _ in shapes) >= 1 << 31:
        raise NotImplementedError(f"the kernel counts elements in 32 bits, too few for {list(shapes)}")
    is_nested, is_stacked = ([fields[i] is not None for fields in weights] for i in (2, 4))
    if len({*is_nested}) > 1 or len({*is_stacked}) > 1:
        raise NotImplementedError("the kernel takes weights that are all quantised twice or none, all stacked or none")
    try:
        import jax_triton
    except ImportError as error:
        raise NotImplementedError(f"the kernel needs jax-triton and triton ({error})") from error

    config = heuristics(tokens, (sum(rows for rows, _ in shapes), columns)) if config is None else config
    parts = config.split
    ring = Ring.of(config, tokens, columns)
    rows = [rows for rows, _ in shapes]
    padding = [0] * (MOST_WEIGHTS - len(rows))
    shape_of = lambda n: jax.ShapeDtypeStruct((parts, tokens, n), x.dtype if parts == 1 else jnp.float32)
    call = functools.partial(
        jax_triton.triton_call,
        kernel=_kernel(config.lookup, x.dtype, ring.slots * ring.slot, ring.depth),
        out_shape=[shape_of(n) for n in [*rows, *(1 for _ in padding)]],
        grid=(sum(-(-n // (16 * config.row_tiles)) for n in rows), parts),
        num_warps=config.num_warps,
        M=tokens,
        **{f"ROWS{i}": n for i, n in enumerate([*rows, *padding])},
        WEIGHTS=len(rows),
        COLUMNS=columns,
        NESTED=is_nested[0],
        STACKED=is_stacked[0],
        SPLIT=parts,
        WARPS=config.num_warps,
        ROW_TILES=config.row_tiles,
        TOKEN_TILES=-(-tokens // 8),
        X_IN_RING=ring.has_x,
        DEPTH=ring.depth,
        SLOTS=ring.slots,
    )

    @jax.custom_batching.sequential_vmap
    def run(x, weights):
        constants = jnp.asarray(tables(x.dtype)), jnp.asarray(reference.DYNAMIC_MAP)
        outs = call(x, *constants, *(field for fields in weights for field in fields))[: len(rows)]
        return [out[0] if parts == 1 else jnp.sum(out, axis=0).astype(x.dtype) for out in outs]

    unread = jnp.zeros((1,), jnp.float32)

    def filled(codes, absmax, nested_absmax, offset, index):
        return (
            codes,
            absmax,
            unread if nested_absmax is None else nested_absmax,
            unread if offset is None else offset,
            jnp.zeros((), jnp.int32) if index is None else index,
        )

    some = [filled(*fields) for fields in weights]
    return run(x, [*some, *(some[0] for _ in padding)])
