"""Products of 9 to 64 tokens with NF4 weights by `wgmma`, for cards of compute capability 9.0, in one Triton kernel.

The maths. Of a row of a weight, with scales s_b of its blocks and table entries e of its codes,

    sum over b of s_b (e_b . x_b),    by    S_b = S_(b-1) s_(b-1) / s_b + e_b . x_b,    whose last is times the last s,

so that S is where the tensor cores add up, float32, and only the table is rounded to x's dtype: the error of a weight
is 8.0e-4 in bfloat16, relative, and 8.4e-5 in float16, where dequantising first has 1.66e-3 and 2.1e-4. For that S is
waited for at every block. A lane multiplies half as many sums as there are tokens, but has only 16 words of a block. So
above 32 tokens, in bfloat16, there is one s for four blocks, the first's, and elements of the other three are
e s_b / s, of which both factors and the product are rounded: 2.1e-3. (In float16 s_b / s may be beyond the range, where
a block is 0.) That is for energy: with 64 tokens an H100 of 700 W is at its limit, and 7% fewer instructions of the
loop were 1.7% less time of a whole decode step, whether or not a warp waits for them.

The layout. A warpgroup, 4 warps, multiplies 64 rows with all tokens by `wgmma.m64nNk16`, whose left operand is the
elements as they were looked up, in registers, and whose right one the tensor cores read out of shared memory by
themselves. So no lane holds x, and a lane has 4 sums a tile of 8 tokens.

Lane 4 g + t has 8 bytes of rows g and g + 8 of its warp's 16: elements 16 t .. 16 t + 15 of a block of 64. Word
2 s + u of them is an operand of product s of four, at its elements 8 u + 2 t and the next. So x is read in that order,
and in that of shared memory (`ordered`): what a program copies at once is in one piece. Who made x may have put it so
(`Ordered`), else XLA does.

The overlap. While the tensor cores multiply one block, the lanes look up the next and begin its products; those of the
block before are waited for only when the block after the next is to be put into their registers, or when sums are to be
multiplied. So the products of a block or two are in flight at most times. The totals are in the same registers in every
statement of assembly (operands that are results as well), so that nothing copies them meanwhile. Warps do not wait for
each other but by barriers in shared memory: one says that a step of x, 4 blocks, has come, another that all warps are
done with it, which a warp says in the step after. So warps drift apart, and while some look up, the tensor cores have
the products of others.

The stream. A step of x is copied by one lane, in bulk, up to two steps ahead; the copying is done by the asynchronous
proxy, in which `wgmma` reads, so no fence is needed. Each lane copies 16 bytes of codes a row to a place of its own in
shared memory, two units of 2 blocks ahead, 32 KB an SM, and its warp reads them, 8 bytes a lane and block.

The start. What little all else waits for is asked for first, else it would come behind all of that: the layer, then
the table of pairs and `dynamic_map`. The first step of x needs no layer, so it is on its way meanwhile, asked for by
the lane that makes the barriers. Then come scales and codes, x's second step, and the table is put into shared memory.

What a block of 256 rows and 64 tokens costs an SM: 512 cycles of tensor cores; of shared memory 256 for lookups, some
220 for x's reading and 64 for its writing, 128 for codes and some 60 for scales; 96 instructions a warp, 385 cycles. An
H100 took 817 when they were 104, by Nsight Compute: shared memory was busy for at most 86% of them, and the ports of
registers, which tensor cores and other instructions share, for 80% by count (`benchmarks/wgmma_beside.py`).

Where tiles are fewer than SMs, k is split among programs, each of which writes its sums (`parts`): in float32, or in
the dtype that who adds them up asks for.

The end. Rows g and g + 8 of a warp are rows 2 g and 2 g + 1 of its 16 of the weight, which a lane stores at once: a
warp stores 16 rows of a token, which lie together. Of a gate they are both row g, of one weight and of the other. Its
result may be `Ordered` for the product that reads it. Then a warp's rows are those of 8 elements that lie together in
that order, and lanes exchange what they have (`movmatrix`), so that a warp stores 128 bytes that lie together.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from jaxlora.kernels import nf4_lookup, nf4_matmul, reference
from jaxlora.kernels.ahead import Ahead, arguments, of_product
from jaxlora.kernels.graph_call import triton_call
from jaxlora.kernels.h100 import SMS
from jaxlora.kernels.nf4_matmul import MOST_WEIGHTS
from jaxlora.kernels.nf4_matmul_wgmma_kernel import kernel
from jaxlora.kernels.nf4_stream import MOST_TOKENS, ROWS_OF_WARP, STEP
from jaxlora.kernels.ordered import FLOAT8, Ordered, in_order, shape_of
from jaxlora.kernels.ordered import STEP as STEP_OF_X
from jaxlora.kernels.parts import Parts
from jaxlora.kernels.reference import InputNorm, NF4Fields, Residual

MOST_TOKENS_OF_TWO_PROGRAMS = 32


@dataclass(frozen=True, kw_only=True)
class Config:
    """How the kernel is laid out on the device; no field changes a result but for the order of its sums.

    Attributes:
      num_warps: warps of a program, each with 16 rows of its tile: 4, 8 or 16: whole warpgroups.
      split: programs among which k is divided.
    """

    num_warps: int = 16
    split: int = 1

    def __post_init__(self):
        if self.num_warps not in (4, 8, 16):
            raise ValueError(f"num_warps must be 4, 8 or 16, not {self.num_warps}")
        if self.split < 1:
            raise ValueError(f"split must be 1 or more, not {self.split}")


def heuristics(tokens: int, rows: Sequence[int], columns: int, is_gated: bool = False) -> Config:
    """The configuration for weights of so many rows each: the split with which the last SM is done first.

    An SM holds 16 warps with up to 128 registers: two programs of 8, which wait for x each on its own, but both copy
    it. More than 32 tokens take all of them. The costs are those of `nf4_matmul_tiles.heuristics`, not measured here.
    """
    num_warps = 8 if tokens <= MOST_TOKENS_OF_TWO_PROGRAMS else 16
    slots = SMS * 16 // num_warps
    while num_warps > 4 and max(rows) <= ROWS_OF_WARP * num_warps // 2:
        num_warps //= 2
    tiles, steps = tiles_of(rows, num_warps), -(-columns // (STEP * reference.NF4_BLOCK))

    def cost(split: int) -> float:
        adding = 0 if split == 1 else 1 + split * sum(rows) / 24000
        return -(-tiles * split // slots) * (-(-steps // split) + 1) + adding

    return Config(num_warps=num_warps, split=1 if is_gated else min(range(1, min(steps, 16) + 1), key=cost))


def begins_with(
    tokens: int, weights: Sequence[NF4Fields], shapes: Sequence[tuple[int, int]], *, is_gated: bool = False
) -> list[Ahead]:
    """What the kernel first reads of weights, for who is before it to fetch; nothing where it is not fetched by lines:
    where rows are not whole steps, or weights not of stacks and quantised twice."""
    rows, columns = [rows for rows, _ in shapes], shapes[0][1]
    is_stacked = all(w.index is not None and w.nested_absmax is not None for w in weights)
    if columns % STEP_OF_X or not is_stacked or any(n * columns // reference.NF4_BLOCK % 128 for n in rows):
        return []
    return of_product(weights, heuristics(tokens, rows, columns, is_gated).split)


def tiles_of(rows: Sequence[int], num_warps: int) -> int:
    """Tiles of weights of so many rows each."""
    return sum(-(-n // (ROWS_OF_WARP * num_warps)) for n in rows)


def check(
    x: Any,
    weights: Sequence[NF4Fields],
    shapes: Sequence[tuple[int, int]],
    norm: InputNorm | None,
    act: str | None,
    residual: Residual | None,
) -> None:
    """Raise NotImplementedError where a kernel of this layout cannot do it: see `matmul_nf4`."""
    if norm is not None or residual is not None:
        raise NotImplementedError("the kernel neither norms nor adds")
    if act is not None and (len(shapes) != 2 or shapes[0] != shapes[1]):
        raise NotImplementedError(
            f"the kernel gates one weight's products by another's of its shape, not {list(shapes)}"
        )
    nf4_matmul.check(x, weights, shapes, MOST_TOKENS)


def launch(
    kernel: Any,
    inputs: Callable[[Ordered], tuple[jax.Array, ...]],
    x: Ordered,
    weights: Sequence[NF4Fields],
    shapes: Sequence[tuple[int, int]],
    config: Config,
    *,
    act: str | None,
    parts: Any,
    ordered: Any,
    of_parts: Any = jnp.float32,
    ahead: Sequence[Ahead] = (),
    **options: Any,
) -> list[Any]:
    """What a kernel of this layout makes of x and weights: the results of `matmul_nf4`.

    Args:
      kernel: the Triton function.
      inputs: its first arguments, those before the weights, of x.
      ordered: the dtype of a gated result as `Ordered`, or None.
      of_parts: the dtype of sums of parts.
      ahead: what to fetch for the kernel after this one.
      **options: its compile-time arguments besides those that all have.
    """
    tokens, columns = x.shape
    rows = [rows for rows, _ in shapes]
    split = 1 if act is not None else min(config.split, -(-columns // (STEP * reference.NF4_BLOCK)))
    if act is None or rows[0] % STEP_OF_X:
        ordered = None
    leading, dtype = ((), x.dtype) if split == 1 else ((split,), jnp.dtype(of_parts))
    padding = [0] * (MOST_WEIGHTS - len(rows))
    outputs = rows if act is None else rows[:1]
    tiles = tiles_of(rows if act is None else [2 * rows[0]], config.num_warps)
    out_shape = [jax.ShapeDtypeStruct((*leading, tokens, n), dtype) for n in outputs]
    if ordered is not None:
        out_shape = [jax.ShapeDtypeStruct(shape_of(tokens, rows[0], ordered == FLOAT8), ordered)]
    if ordered == FLOAT8:
        out_shape += [jax.ShapeDtypeStruct((tiles,), jnp.float32)]
    call = functools.partial(
        triton_call,
        kernel=kernel,
        out_shape=out_shape + [jax.ShapeDtypeStruct((1,), dtype)] * (MOST_WEIGHTS - len(out_shape)),
        grid=(split * tiles,),
        num_warps=config.num_warps,
        M=tokens,
        **{f"ROWS{i}": n for i, n in enumerate([*rows, *padding])},
        WEIGHTS=len(rows),
        COLUMNS=columns,
        STACKED=weights[0][4] is not None,
        WARPS=config.num_warps,
        SPLIT=split,
        ACT=act or "",
        ORDERED=ordered is not None,
        **arguments(ahead)[1],
        **options,
    )

    @jax.custom_batching.sequential_vmap
    def run(x, weights, ahead):
        ys = call(*inputs(x), *(field for fields in weights for field in fields), *arguments(ahead)[0])
        if ordered is not None:
            of_columns = ys[1] if ordered == FLOAT8 else None
            return [Ordered(ys[0], (tokens, rows[0]), x.dtype, of_columns=of_columns)]
        ys = ys[: len(outputs)]
        return ys if split == 1 or parts else [Parts(y, x.dtype).sum() for y in ys]

    some = [nf4_matmul.filled(*fields) for fields in weights]
    return run(x, [*some, *(some[0] for _ in padding)], [*ahead])


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
    """`reference.matmul_nf4` as a Triton kernel: the same arguments.

    Up to three weights are multiplied in one launch. It may be vmapped (which loops) and is not differentiable.

    Args:
      x: [M, in], or that in the order of the product.
      parts: of products whose k is split, return the sums of each part, [split, M, out], for what follows to add up, in
        float32, or in the dtype that this is; a product that is not split is [M, out] in x's dtype all the same.
      ordered: anything but None: return what is gated as `Ordered` of x's dtype, where its elements are whole steps.
      ahead: what to fetch for the kernel after this one (`begins_with`).

    Raises:
      NotImplementedError: as `nf4_matmul.matmul_nf4`, but x may have `MOST_TOKENS` rows; or there is a norm or a
        residual, which are launches of their own for so many tokens; or x is float8.
    """
    check(x, weights, shapes, norm, act, residual)
    x = x if isinstance(x, Ordered) else in_order(x)
    if x.is_float8:
        raise NotImplementedError("the kernel multiplies 16 bits, not float8")
    rows = [rows for rows, _ in shapes]
    config = heuristics(x.shape[0], rows, x.shape[1], is_gated=act is not None) if config is None else config
    return launch(
        kernel(x.dtype, x.shape[0], config.num_warps),
        lambda x: (x.data, jnp.asarray(nf4_lookup.pairs(x.dtype)), jnp.asarray(reference.DYNAMIC_MAP)),
        x,
        weights,
        shapes,
        config,
        act=act,
        parts=parts,
        of_parts=jnp.float32 if isinstance(parts, bool) else parts,
        ordered=None if ordered is None else x.dtype,
        ahead=ahead,
        NESTED=weights[0][2] is not None,
    )
