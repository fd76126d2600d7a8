"""NF4 looked up by bytes: the table that products with few tokens keep in shared memory, and the PTX that reads it.

At the speed of a copy an SM of an H100 must take 25 weights a cycle, for which it has 5 instructions each, half of them
in the integer unit. A byte holds two codes, and shared memory a table of 256 entries, each the two numbers of a byte.
Every entry is there 32 times, once in each bank, so that a warp's lanes never wait for each other: lane l reads at 128
* byte + 4 * l. `dp4a` adds up products of bytes, so it makes that address of any byte of a word in one instruction: two
instructions for two weights, and the register that is read is an operand of the tensor cores.
"""

import functools
from typing import no_type_check

import jax.numpy as jnp
import numpy as np

from jaxlora.kernels import reference

# What NF4 is multiplied by before it is rounded to 16 bits, and the sum divided by at the end: with these its entries
# lie near numbers of the dtype, and the error of weights that are normally distributed is least. It is 8.0e-4 in
# bfloat16 and 8.4e-5 in float16, relative, where dequantising first has 1.7e-3 and 2.1e-4.
FACTORS = {"bfloat16": 1.43675, "float16": 1.6385}
# The same for float8, e4m3, and what a sum is multiplied by: the error is 2.0e-2, where rounding any numbers to float8
# has 2.6e-2.
FLOAT8_FACTOR, FLOAT8_UNIT = 0.86301, 1.14147
PAIRS = 256 * 32 * 4  # bytes of shared memory that the table takes


def pairs(dtype: np.dtype) -> np.ndarray:
    """The two elements of every byte, times the factor of a 16-bit dtype: uint32 [256]. The high nibble comes first."""
    table = (reference.NF4 * np.float32(FACTORS[dtype.name])).astype(dtype).view(np.uint16).astype(np.uint32)
    byte = np.arange(256)
    return table[byte & 15] << 16 | table[byte >> 4]


def float8_table() -> np.ndarray:
    """NF4 times its factor in float8, e4m3: [16]. Its zero is negative, as are all before it."""
    table = (reference.NF4 * np.float32(FLOAT8_FACTOR)).astype(jnp.float8_e4m3fn)
    return np.where(np.arange(16) == 7, -0.0, table).astype(jnp.float8_e4m3fn)


def float8_words() -> np.ndarray:
    """What `prmt` looks NF4 up in: uint32 [4], the 8 even entries and the 8 odd ones.

    Of four codes in a word, `prmt` takes for each a byte of 8 by three bits of a nibble; if the fourth is set it fills
    the result's byte with that byte's sign. So of the upper three bits of a code, and its lowest one, two of them make
    an even or an odd entry and a byte of the sign of both, which is the same of two neighbours. Their exclusive or is
    the entry but for its sign; of a negative one the lower bits are therefore complements here.
    """
    table = float8_table().view(np.uint8)
    table = np.where(table & 0x80, table ^ 0x7F, table).astype(np.uint8)
    return np.concatenate([table[::2], table[1::2]]).view(np.uint32)


def lookup_assembly() -> str:
    """PTX for the codes $8, $9 and a lane's place in the table, $10: their 16 elements, two a register, $0..$7."""
    # Nothing is read from memory across the barrier: else the assembler looks up all of a step at once, and has no
    # registers left.
    lines = [".reg .b32 at;", "bar.warp.sync 0xffffffff;"]
    for i in range(8):
        lines += [f"dp4a.u32.u32 at, ${8 + i // 4}, {128 << 8 * (i % 4):#x}, $10;", f"ld.shared.b32 ${i}, [at];"]
    return "{\n" + "\n".join(lines) + "\n}"


@functools.cache
@no_type_check  # a type checker's wrapper around a function would hide its source from Triton
def layer_kernel():
    """The Triton function that finds a layer's fields in those of its stack. Built on first use, since the library
    imports where Triton is not installed."""
    import triton
    import triton.language as tl

    @triton.jit
    def of_layer(codes, absmax, nested_absmax, mean, layer, rows, BLOCKS: tl.constexpr):
        """Where codes, absmax, nested absmax and mean of a layer begin."""
        layer = layer.to(tl.int64)
        codes += layer * (rows * (BLOCKS * 32))
        absmax += layer * (rows * BLOCKS)
        nested_absmax += layer * ((rows * BLOCKS + 255) // 256)
        return codes, absmax, nested_absmax, mean + layer

    return of_layer


@functools.cache
@no_type_check
def stack_kernel():
    """The Triton function that finds a weight in its stack. Built on first use, as `layer_kernel`."""
    import triton
    import triton.language as tl

    of_layer = layer_kernel()

    @triton.jit
    def one_of_stack(
        codes, absmax, nested_absmax, mean, index, out, before: tl.constexpr, ROWS: tl.constexpr, BLOCKS: tl.constexpr,
        NESTED: tl.constexpr, STACKED: tl.constexpr,
    ):  # fmt: skip
        """(codes, absmax, nested absmax, mean, out, rows, tiles before its first) of a weight."""
        if STACKED:
            codes, absmax, nested_absmax, mean = of_layer(
                codes, absmax, nested_absmax, mean, tl.load(index), ROWS, BLOCKS
            )
        value = 0.0
        if NESTED:
            value = tl.load(mean)
        return codes, absmax, nested_absmax, value, out, ROWS, before

    return one_of_stack


@functools.cache
@no_type_check
def fill_kernels():
    """Two Triton functions: one asks for the table, the other puts it into shared memory. Built on first use, as
    `layer_kernel`."""
    import triton
    import triton.language as tl

    fill_assembly = tl.constexpr("st.shared.v4.b32 [$1], {$2, $2, $2, $2}; mov.b32 $0, $1;")

    @triton.jit
    def asked(nf4, thread, THREADS: tl.constexpr):
        """Begin to load the pairs that a lane is to put: two lanes have the same one where there are 512."""
        LANES: tl.constexpr = (THREADS + 255) // 256  # of a pair
        values = ()
        for i in tl.static_range((256 + THREADS - 1) // THREADS):
            values = values + (tl.load(nf4 + (i * THREADS + thread // LANES)),)
        return values

    @triton.jit
    def put(table, values, thread, THREADS: tl.constexpr):
        """32 copies of each of the pairs that were asked for. The table is at a multiple of 128 bytes."""
        LANES: tl.constexpr = (THREADS + 255) // 256
        STORES: tl.constexpr = 8 // LANES
        # Of eight lanes, which store at once, each stores to other banks.
        first = thread % LANES * STORES + thread // LANES % STORES
        for i in tl.static_range((256 + THREADS - 1) // THREADS):
            place = table + ((i * THREADS + thread // LANES) * 128 + first * 16)
            for j in tl.static_range(STORES):
                tl.inline_asm_elementwise(
                    fill_assembly, "=r,r,r", [place ^ 16 * j, values[i]], dtype=tl.int32, is_pure=False, pack=1
                )

    return asked, put
