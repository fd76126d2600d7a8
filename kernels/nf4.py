"""NF4 dequantisation as one Triton kernel: codes and doubly quantised statistics in, 16-bit weights out.

The maths. For element i of the flattened weight, in block b = i // 64,

    absmax[b] = DYNAMIC_MAP[absmax_code[b]] * nested_absmax[b // 256] + offset
    out[i]    = NF4[code[i]] * absmax[b]

in float32, rounded after every operation and at last to the output's dtype, as in `reference.dequantize_nf4`. The two
agree bit for bit, which is why the call turns the contraction of product and sum off.

The layout. Two codes a byte, high nibble first. Read as little-endian 32-bit words, 8 elements a word, element j of a
word sits at bit (4 * j) ^ 4. A lane stores the 8 elements of a word, which all lie in one block: 16 bytes of bfloat16,
and a warp's 32 lanes write 512 consecutive bytes. Sizes that are no multiple of 8 take the same kernel with a byte for
a word, which is slower and never happens in a real model.

The trade. Memory traffic is 0.5 + 1/64 bytes in and 2 bytes out per element, so at the speed of a copy an SM of an H100
or H200 must yield some 7 elements a cycle: it has 18 instructions for each, 4 if they go to the load unit. The lookup
is what counts (instructions are those of sm_90 code from Triton 3.6, all of them counted):
  * "table": NF4 is 64 bytes of global memory, half a line of L1, and its 16 entries lie in 16 banks, so a warp's 32
    lookups are one pass of the load unit. 9 instructions an element, and all of them wait on the cache.
  * "prmt": the table is 16 immediate operands, and byte permutations pick the four bytes of 4 elements at once.
    14 instructions an element, of which none is a load.
Dequantising inside the matrix product would save writing and reading the 2 bytes, and cost the tensor cores their
operand layout; here the weight is written once and cuBLAS multiplies.
"""

import functools
import math
from dataclasses import dataclass
from typing import Literal, no_type_check

import jax
import jax.numpy as jnp

from jaxlora.kernels import reference


@dataclass(frozen=True, kw_only=True)
class Config:
    """How the kernel is laid out on the device; no field changes a result.

    Attributes:
      block: words (of 8 elements) that one program handles; a power of two.
      num_warps: warps that share them; a power of two.
      lookup: where NF4 is held, see the head of this file.
    """

    block: int = 512
    num_warps: int = 4
    lookup: Literal["table", "prmt"] = "table"

    def __post_init__(self):
        for name in ("block", "num_warps"):
            value = getattr(self, name)
            if value < 1 or value & (value - 1):
                raise ValueError(f"{name} must be a power of two, not {value}")
        if self.lookup not in ("table", "prmt"):
            raise ValueError(f"lookup must be 'table' or 'prmt', not {self.lookup!r}")


def heuristics(n: int) -> Config:
    """The configuration for n elements: large tiles where there are enough of them to fill the device."""
    return Config() if n >= 1 << 20 else Config(block=128)


def prmt_assembly() -> str:
    """PTX that turns the 8 codes of word $8 into 8 float32 values $0..$7, in the order of the elements.

    `prmt d, a, b, s` makes byte k of d from nibble k of s: its low 3 bits choose one of the 8 bytes of (a, b). The
    codes of half a word are such a selector, but for their top bit, which chooses between two tables of 8. That gives
    one byte of each of 4 values, and is done for the 4 bytes of a float32; a 4 x 4 transposition then gathers the bytes
    of each value.
    """
    planes = reference.NF4.view("uint8").reshape(16, 4).T.copy().view("<u4")  # [byte of a float, quarter of the table]
    lines = [".reg .b32 half, low, mask, a, b, p<4>, q<4>;"]
    for half in range(2):
        lines += [
            f"shr.u32 half, $8, {16 * half};",
            "and.b32 low, half, 0x7777;",
            "and.b32 mask, half, 0x8888;",
            "shr.u32 mask, mask, 3;",
            "prmt.b32 mask, 0xFF00, 0, mask;",  # 0xFF in every byte whose code is 8 or more
        ]
        for byte, (t0, t1, t2, t3) in enumerate(planes.tolist()):
            lines += [
                f"mov.b32 a, {t0:#010x};",
                f"prmt.b32 a, a, {t1:#010x}, low;",
                f"mov.b32 b, {t2:#010x};",
                f"prmt.b32 b, b, {t3:#010x}, low;",
                f"lop3.b32 p{byte}, mask, b, a, 0xCA;",  # mask ? b : a
            ]
        lines += [
            "prmt.b32 q0, p0, p1, 0x5140;",
            "prmt.b32 q1, p2, p3, 0x5140;",
            "prmt.b32 q2, p0, p1, 0x7362;",
            "prmt.b32 q3, p2, p3, 0x7362;",
        ]
        for k, (a, b, selector) in enumerate([(0, 1, "0x5410"), (0, 1, "0x7632"), (2, 3, "0x5410"), (2, 3, "0x7632")]):
            lines.append(f"prmt.b32 ${4 * half + (k ^ 1)}, q{a}, q{b}, {selector};")  # the high nibble comes first
    return "{\n" + "\n".join(lines) + "\n}"


@functools.cache
@no_type_check  # a type checker's wrapper around the function would hide its source from Triton
def _kernel():
    """The Triton function. Built on first use, since the library imports where Triton is not installed."""
    import triton
    import triton.language as tl

    PRMT_ASSEMBLY = tl.constexpr(prmt_assembly())

    @triton.jit
    def dequantize_nf4(
        index,  # int32 []: which of the stack; unread unless STACKED
        codes,  # uint8 [ceil(N / 2)]
        absmax,  # uint8 or float32 [ceil(N / 64)]
        nested_absmax,  # float32 [ceil(blocks / 256)]; unread unless NESTED
        offset,  # float32 []; unread unless NESTED
        nf4,  # float32 [16]
        dynamic_map,  # float32 [256]
        out,  # [N]
        N: tl.constexpr,
        MATRICES: tl.constexpr,  # codes and statistics are of so many, one after the other
        STACKED: tl.constexpr,  # and there is a stack of those
        NESTED: tl.constexpr,
        WIDE: tl.constexpr,  # a word is 4 bytes, else 1
        PRMT: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        BYTES: tl.constexpr = 4 if WIDE else 1
        EACH: tl.constexpr = 2 * BYTES
        WORDS: tl.constexpr = (N + EACH - 1) // EACH
        tile = tl.program_id(0)
        if MATRICES > 1 or STACKED:
            TILES: tl.constexpr = (WORDS + BLOCK - 1) // BLOCK
            BLOCKS: tl.constexpr = (N + 63) // 64
            matrix = (tile // TILES).to(tl.int64)
            tile = tile % TILES
            out += matrix * N
            if STACKED:
                matrix += tl.load(index).to(tl.int64) * MATRICES
            codes += matrix * ((N + 1) // 2)
            absmax += matrix * BLOCKS
            nested_absmax += matrix * ((BLOCKS + 255) // 256)
            offset += matrix
        word = tile * BLOCK + tl.arange(0, BLOCK)
        inside = word < WORDS

        block = word // (64 // EACH)
        scale = tl.load(absmax + block, mask=inside, other=0)
        if NESTED:
            scale = tl.load(dynamic_map + scale.to(tl.int32))
            scale = scale * tl.load(nested_absmax + block // 256, mask=inside, other=0.0) + tl.load(offset)

        if WIDE:
            codes = codes.to(tl.pointer_type(tl.uint32))
        packed = tl.load(codes + word, mask=inside, other=0).to(tl.uint32)
        element = tl.arange(0, EACH)[None, :]
        if PRMT:
            v0, v1, v2, v3, v4, v5, v6, v7 = tl.inline_asm_elementwise(
                PRMT_ASSEMBLY,
                "=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r",
                [packed],
                dtype=(tl.float32,) * 8,
                is_pure=True,
                pack=1,
            )
            even = tl.join(tl.join(v0, v4), tl.join(v2, v6))  # [BLOCK, bit 2, bit 1] of the element's number
            odd = tl.join(tl.join(v1, v5), tl.join(v3, v7))
            value = tl.reshape(tl.join(even, odd), (BLOCK, EACH))
        else:
            code = (packed[:, None] >> ((4 * element) ^ 4)) & 15
            value = tl.load(nf4 + code)
        value = value * scale[:, None]

        index = word[:, None] * EACH + element
        if N % EACH:
            mask = index < N
        else:
            mask = inside[:, None]
        tl.store(out + index, value.to(out.dtype.element_ty), mask=mask)

    return dequantize_nf4


def dequantize_nf4(
    codes: jax.Array,
    absmax: jax.Array,
    nested_absmax: jax.Array | None = None,
    offset: jax.Array | None = None,
    index: jax.Array | None = None,
    *,
    shape: tuple[int, ...],
    dtype: jax.typing.DTypeLike,
    config: Config | None = None,
) -> jax.Array:
    """`reference.dequantize_nf4` as a Triton kernel: the same arguments, the same result, bit for bit.

    It may be vmapped, which is one launch for all matrices, and is not differentiable: no NF4 code has a gradient, and
    a statistic that should have one can use the reference.

    Raises:
      NotImplementedError: jax-triton is not installed, the dtype is none of float32, bfloat16 and float16, or there are
        2^31 elements or more, of one matrix.
    """
    n = math.prod(shape)
    dtype = jnp.dtype(dtype)
    if dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        raise NotImplementedError(f"the kernel writes float32, bfloat16 or float16, not {dtype.name}")
    if n >= 1 << 31:
        raise NotImplementedError(f"the kernel counts elements in 32 bits, and there are {n}")
    try:
        import jax_triton
    except ImportError as error:
        raise NotImplementedError(f"the kernel needs jax-triton and triton ({error})") from error
    if n == 0:
        return jnp.zeros(shape, dtype)

    wide = n % 8 == 0
    config = heuristics(n) if config is None else config
    is_nested = nested_absmax is not None

    def launch(index, codes, absmax, nested_absmax, offset):
        """[matrices, n], of fields [matrices, ...], or if there is an index [stack, matrices, ...]."""
        matrices = codes.shape[-2]
        return jax_triton.triton_call(
            index,
            codes,
            absmax,
            nested_absmax,
            offset,
            jnp.asarray(reference.NF4),
            jnp.asarray(reference.DYNAMIC_MAP),
            kernel=_kernel(),
            out_shape=jax.ShapeDtypeStruct((matrices, n), dtype),
            grid=(matrices * -(-n // ((8 if wide else 2) * config.block)),),
            num_warps=config.num_warps,
            enable_fp_fusion=False,
            N=n,
            MATRICES=matrices,
            STACKED=codes.ndim == 3,
            NESTED=is_nested,
            WIDE=wide,
            PRMT=config.lookup == "prmt" and wide,
            BLOCK=config.block,
        )

    leading = (1,) if index is None else codes.shape[:2]
    if nested_absmax is None or offset is None:
        nested_absmax, offset = jnp.zeros((*leading, 1), jnp.float32), jnp.zeros(leading, jnp.float32)
    fields = (*(field.reshape(*leading, -1) for field in (codes, absmax, nested_absmax)), offset.reshape(leading))
    if index is not None:
        return jax.custom_batching.sequential_vmap(launch)(index, *fields).reshape(-1, *shape)

    @jax.custom_batching.custom_vmap
    def run(*fields):
        return launch(jnp.int32(0), *fields)

    @run.def_vmap
    def _(axis_size, in_batched, *fields):
        all_of_them = (
            field if is_batched else jnp.broadcast_to(field, (axis_size, *field.shape))
            for field, is_batched in zip(fields, in_batched, strict=True)
        )
        return run(*(field.reshape(-1, *field.shape[2:]) for field in all_of_them)).reshape(axis_size, -1, n), True

    return run(*fields).reshape(shape)
