"""Products of 9 to 64 tokens in float8 with NF4 weights by `wgmma`, for cards of compute capability 9.0.

The maths. As `nf4_matmul_wgmma`'s, with table entries e and x rounded to float8 (e4m3), whose products take the tensor
cores half the energy and time of 16 bits: of a row with scales s_b, none of which is beyond u,

    y = u sum over b of (s_b / u) (e_b . x_b)

A block's products are added up in float16 by the tensor cores, and the blocks by the lanes, two numbers an instruction,
half as many as in float32. Blocks are 64 elements, entries at most 0.875 and x at most 8, so that a block's sum is at
most 448; all sums stay below float16's largest number for rows of 8,192 elements at least (for longer ones, unless
nearly all products are as large as they can be and of one sign), and their rounding, 2^-11, is a hundredth of float8's.
u is of a row: the sum of the largest of its nested absmaxes and the mean, so weights must be quantised twice.

The error of a weight is that of the table, 2.0e-2 (`nf4_lookup.FLOAT8_FACTOR`), and that of x is 2.6e-2. x has a power
of 2 a token, which results are times, or one for some columns each, which a product that was gated has made: then s_b
is times that, and u times their largest.

The elements. Of four codes of 16 bits two PRMT and a LOP3 make a register, after five instructions for eight codes that
turn each nibble by a bit (`nf4_lookup.float8_words`). That is 6 instructions for 4 elements where reading pairs from
shared memory would be 5. But a loop of products with such lookups (5.5 instructions) took 8% less of an H100's energy
and 11% less time than one that reads pairs; no table has to be put into shared memory before the first product; and
shared memory is left to x and codes.

The layout is that of `nf4_matmul_wgmma`, but for the order of x (`ordered`) and the stream of codes: a step of a row is
a line of 128 bytes, which 8 lanes copy at once, two steps ahead. By halves of lines, as there, the memory was what a
program waited for: gate and up of an 8B took 33.1 us on an H100, and took 27.8 by lines. (In bfloat16 they made no
difference.) Where k is split, parts are in bfloat16.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxlora.kernels import nf4_lookup, nf4_matmul_wgmma, reference
from jaxlora.kernels.ahead import Ahead
from jaxlora.kernels.nf4_matmul_float8_kernel import kernel
from jaxlora.kernels.nf4_matmul_wgmma import Config
from jaxlora.kernels.nf4_stream import ROWS_OF_WARP
from jaxlora.kernels.ordered import FLOAT8, STEP, Ordered
from jaxlora.kernels.reference import NF4_BLOCK, InputNorm, NF4Fields, Residual


def takes(weights: Sequence[NF4Fields], columns: int) -> bool:
    """Whether float8 x may be multiplied by weights of so many columns."""
    return columns % STEP == 0 and all(fields.nested_absmax is not None for fields in weights)


def matmul_nf4(
    x: jax.Array | Ordered,
    weights: Sequence[NF4Fields],
    *,
    shapes: Sequence[tuple[int, int]],
    norm: InputNorm | None = None,
    act: str | None = None,
    residual: Residual | None = None,
    parts: Any = False,
    ordered: Any = None,
    ahead: Sequence[Ahead] = (),
    config: Config | None = None,
) -> list[Any]:
    """`nf4_matmul_wgmma.matmul_nf4` of float8 x: the same arguments and results, in the dtype that x says.

    Args:
      x: [M, in], `Ordered` in float8.
      ordered: float8, in which to return what is gated as `Ordered`, where its elements are whole steps; else None.

    Raises:
      NotImplementedError: as `nf4_matmul_wgmma.matmul_nf4`; or x is not float8, or has scales of other than 64, 128 or
        256 columns; or weights are not quantised twice, or their rows no whole steps of 256.
    """
    if not isinstance(x, Ordered) or not x.is_float8:
        raise NotImplementedError("the kernel multiplies float8 that is in its order")
    nf4_matmul_wgmma.check(x, weights, shapes, norm, act, residual)
    tokens, columns = x.shape
    if not takes(weights, columns):
        raise NotImplementedError("the kernel multiplies by whole steps of 256 elements that are quantised twice")
    rows = [rows for rows, _ in shapes]
    if config is None:
        config = nf4_matmul_wgmma.heuristics(tokens, rows, columns, is_gated=act is not None)
    if act is not None and ordered == FLOAT8:
        # The order changes places among 64 elements, which must have one scale and so be one program's.
        config = dataclasses.replace(config, num_warps=max(config.num_warps, 2 * NF4_BLOCK // ROWS_OF_WARP))
    if x.of_columns is not None and columns // x.of_columns.size not in (NF4_BLOCK, 2 * NF4_BLOCK, STEP):
        raise NotImplementedError(f"the kernel takes a scale of 64, 128 or 256 columns, not {x.of_columns.size} in all")

    def inputs(x):
        scales = x.of_tokens if x.of_columns is None else x.of_columns
        return x.data, scales, jnp.asarray(nf4_lookup.float8_words()), jnp.asarray(reference.DYNAMIC_MAP)

    return nf4_matmul_wgmma.launch(
        kernel(x.dtype, tokens, config.num_warps),
        inputs,
        x,
        weights,
        shapes,
        config,
        act=act,
        parts=parts,
        ordered=FLOAT8 if ordered == FLOAT8 else None,
        of_parts=jnp.bfloat16,
        ahead=ahead,
        X_GROUP=0 if x.of_columns is None else columns // x.of_columns.size // NF4_BLOCK,
    )
