"""Products with NF4 weights for few tokens: y = x W^T, dequantised inside the product, in one Triton kernel.

The maths, for x [M, in] and a weight [out, in] in blocks of 64 elements of a row:

    y[m, n] = sum over blocks b of   scale[n, b] * sum over k in b of   NF4[code[n, k]] * x[m, k]

NF4 is rounded to x's dtype, the products are exact, both sums are float32, and so are the scales: what is rounded is
the table, where dequantising first rounds every weight. `nf4_lookup` has the table and how it is read.

The layout. A warp takes 16 rows of the weight and, a step, 4 blocks of each, and multiplies them with `mma.m16n8k16`,
whose operands it loads straight to the lanes where the tensor cores want them. In it lane 4 g + t holds elements of
rows g and g + 8 of the weight, elements of column g of x^T, and the sums of both rows with columns 2 t and 2 t + 1. The
order of k is free as long as both operands agree on it. A block's sum is multiplied by its scale and added to the
total.

  * Tokens are the columns, 8 a tile. The four lanes of a row share each block: lane t takes 8 bytes of it, elements
    16 t .. 16 t + 15, and another lane's scale.
  * Of one or two tokens that would leave columns empty. So each is four columns, one for each block of a step, and has
    zeros outside its block. Then a lane may take any bytes, 16 in a row twice, and its two sums are those of one block,
    whose scale it read itself. The four lanes of a row add up what they have before they leave it for other warps.

The stream. At the copy's speed and a latency of 1 us, 23 KB must be on their way to an SM at any time. A warp asks for
the 2 KB of its next step as soon as it has looked up those of this one, into the same registers, so that 16 or 32 warps
have 32 or 64 KB asked for or waiting to be multiplied. (More than that for one warp, in registers or by asynchronous
copies, gains little: the assembler waits for all loads at once, and a ring has no room beside the table.) Programs are
as many as an SM holds at once: each fills its table once and takes every n-th tile of 16 rows, and asks for the first
step of the next tile before it adds up this one. The warps of a program share its rows and divide k. No atomics: a
result never varies.

x. Of one token (two where there is room) each warp copies what it multiplies by in a step, 512 bytes a token, into
shared memory when it asks for the codes. Lanes that read it from global memory between their products waited for it
four times a step: down of an 8B took 16.3 us on an H100, and takes 15.0. Programs ask for their first codes before they
meet at the barrier behind the table.

What stands around a product, in the same launch since one of its own takes 2 us:

  * `act`: of two weights of a shape, act(gate) * up. Rows g of a tile are gate's then, and rows g + 8 the same rows of
    up, so that the epilogue finds a pair two lanes apart.
  * `norm`: every program norms x, of one or two tokens, while its first codes are on their way, and keeps the result in
    shared memory, from where lanes then read their elements.
  * `residual`: the epilogue adds it to what it rounded.

Triton does the addresses. It holds all values as tensors of one element a thread, whose layout is the only one there is
for such a shape, and inline PTX does what is done across threads.
"""

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlora.kernels import nf4_lookup, reference
from jaxlora.kernels.graph_call import triton_call
from jaxlora.kernels.h100 import SMS
from jaxlora.kernels.nf4_matmul_kernel import MOST_TOKENS_OF_FOUR_COLUMNS, kernel, shared_bytes
from jaxlora.kernels.reference import InputNorm, NF4Fields, Residual

MOST_TOKENS = 8  # more are `nf4_matmul_tiles`', since here every 16 rows read all of x again
MOST_WEIGHTS = 3
MOST_SHARED = 48 << 10  # bytes of shared memory that need no asking for


@dataclass(frozen=True, kw_only=True)
class Config:
    """How the kernel is laid out on the device; no field changes a result but for the order of its sums.

    Attributes:
      num_warps: warps of a program, among which k is divided: 1, 2, 4, 8 or 16.
      depth: steps, of 2 KB, that a warp asks for at once; each takes 16 registers.
      programs: programs of a launch at most.
    """

    num_warps: int = 16
    depth: int = 1
    programs: int = 2 * SMS

    def __post_init__(self):
        if self.num_warps not in (1, 2, 4, 8, 16):
            raise ValueError(f"num_warps must be 1, 2, 4, 8 or 16, not {self.num_warps}")
        for field in ("depth", "programs"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field} must be 1 or more, not {getattr(self, field)}")


def heuristics(tokens: int, tiles: int, columns: int, is_gated: bool = False) -> Config:
    """The configuration for so many tokens, tiles of 16 rows, and elements of a row; with it no warp is idle.

    By its registers an SM holds two programs of 16 warps with 64 a thread, as one or two tokens take where rows are
    whole steps, or three of 8 warps with 80; of more tokens two of 8 warps. Three where two would be filled twice and
    three not, where rows are too short for 16 warps, and for a gate, whose epilogue is long and so better hidden by
    two other programs than by one; but not if then the last round of tiles is less than half full. On an H100, at one
    token, q, k and v of an 8B (384 tiles) took 9.5 us with three programs and 10.3 with two, which some SMs must fill
    twice; o (256) 7.8 and 7.4, gate and up (1792) 28.9 and 27.9, down 17.8 and 17.5; with norm and gate in the launch
    gate and up took 24.1 and 24.6, q, k and v 9.3 and 11.3. Short rows, of 1B and 3B, were not timed; that a gate's
    epilogue is what the third program hides was not shown.
    """
    config = Config() if tokens <= MOST_TOKENS_OF_FOUR_COLUMNS else Config(num_warps=8)
    num_warps, steps = config.num_warps, -(-columns // (4 * reference.NF4_BLOCK))
    while num_warps > steps:
        num_warps //= 2
    three = Config(num_warps=min(num_warps, 8), programs=3 * SMS)
    if tokens <= MOST_TOKENS_OF_FOUR_COLUMNS:
        is_short, is_last_full = num_warps == 8, -tiles % three.programs <= three.programs // 2
        if is_short or (is_gated and is_last_full and num_warps > 8):
            return three
    if config.programs < tiles <= three.programs:
        return three
    return dataclasses.replace(config, num_warps=num_warps)


def staged(tokens: int, config: Config) -> int:
    """Elements of x, all tokens, that the warps of a program copy for a step together; 0 where they do not."""
    kept = config.num_warps * config.depth * tokens * 4 * reference.NF4_BLOCK
    fits = shared_bytes(config.num_warps, tokens, kept) <= MOST_SHARED
    return kept if tokens <= MOST_TOKENS_OF_FOUR_COLUMNS and fits else 0


def check(x: Any, weights: Sequence[NF4Fields], shapes: Sequence[tuple[int, int]], most_tokens: int) -> None:
    """Raise NotImplementedError where a kernel for so many tokens cannot multiply these, or jax-triton is missing."""
    tokens, columns = x.shape
    if x.dtype not in (jnp.bfloat16, jnp.float16):
        raise NotImplementedError(f"the kernel takes bfloat16 or float16, not {x.dtype.name}")
    if not 0 < tokens <= most_tokens:
        raise NotImplementedError(f"the kernel takes 1 to {most_tokens} tokens, not {tokens}")
    if columns % reference.NF4_BLOCK:
        raise NotImplementedError(f"the kernel takes rows of whole blocks of 64, not of {columns} elements")
    if not 0 < len(weights) <= MOST_WEIGHTS:
        raise NotImplementedError(f"the kernel takes 1 to {MOST_WEIGHTS} weights, not {len(weights)}")
    if max(rows * columns for rows, _ in shapes) >= 1 << 31:
        raise NotImplementedError(f"the kernel counts elements in 32 bits, too few for {list(shapes)}")
    if any(len({fields[i] is None for fields in weights}) > 1 for i in (2, 4)):
        raise NotImplementedError("the kernel takes weights that are all quantised twice or none, all stacked or none")
    try:
        import jax_triton  # noqa: F401
    except ImportError as error:
        raise NotImplementedError(f"the kernel needs jax-triton and triton ({error})") from error


def _check_around(x: jax.Array, norm: InputNorm | None, residual: Residual | None, num_warps: int) -> None:
    """Raise NotImplementedError where the kernel has no place for x normed, or these are of other dtypes."""
    if norm is not None:
        needed = shared_bytes(num_warps, x.shape[0], x.size)
        if x.shape[0] > MOST_TOKENS_OF_FOUR_COLUMNS or needed > MOST_SHARED:
            raise NotImplementedError(f"the kernel norms x where it has room for it, not for {list(x.shape)}")
        if norm.weight.dtype != x.dtype or norm.weight.ndim != (1 if norm.index is None else 2):
            raise NotImplementedError(
                f"the kernel takes a norm's weight [in] or a stack, of x's dtype {x.dtype.name}, not "
                f"{norm.weight.dtype.name} {list(norm.weight.shape)}"
            )
    if residual is not None and residual.x.dtype != x.dtype:
        raise NotImplementedError(f"the kernel adds {x.dtype.name} to its like, not to {residual.x.dtype.name}")


def filled(codes, absmax, nested_absmax, offset, index) -> tuple[jax.Array, ...]:
    """The fields of a weight, with something that is not read for those it does not have."""
    unread = jnp.zeros((1,), jnp.float32)
    return (
        codes,
        absmax,
        unread if nested_absmax is None else nested_absmax,
        unread if offset is None else offset,
        jnp.zeros((), jnp.int32) if index is None else index,
    )


def matmul_nf4(
    x: jax.Array,
    weights: Sequence[NF4Fields],
    *,
    shapes: Sequence[tuple[int, int]],
    norm: InputNorm | None = None,
    act: str | None = None,
    residual: Residual | None = None,
    config: Config | None = None,
) -> list[jax.Array]:
    """`reference.matmul_nf4` as a Triton kernel: the same arguments; the results are nearer to the exact ones.

    Up to three weights are multiplied in one launch. It may be vmapped (which loops) and is not differentiable.

    Raises:
      NotImplementedError: jax-triton is not installed; x is none of bfloat16 and float16 or has more than `MOST_TOKENS`
        rows; rows of a weight are not whole blocks (in % 64), or it has 2^31 elements or more; there are more than
        three weights, or some are quantised twice or stacked and others are not; there is a norm, and x has more
        rows than two or elements than fit into shared memory (6,656 with 16 warps), or its weight is of another dtype.
    """
    tokens, columns = x.shape
    rows = [rows for rows, _ in shapes]
    tiles = sum(-(-n // 16) for n in rows)
    config = heuristics(tokens, tiles, columns, act is not None) if config is None else config
    _check_around(x, norm, residual, config.num_warps)
    check(x, weights, shapes, MOST_TOKENS)
    kept = x.size if norm is not None else staged(tokens, config)
    padding = [0] * (MOST_WEIGHTS - len(rows))
    outputs = [*rows, *padding] if act is None else [rows[0], 0, 0]
    call = functools.partial(
        triton_call,
        kernel=kernel(x.dtype, config.num_warps, tokens, kept),
        out_shape=[jax.ShapeDtypeStruct((tokens, max(n, 1)), x.dtype) for n in outputs],
        grid=(min(config.programs, tiles if act is None else -(-rows[0] // 8)),),
        num_warps=config.num_warps,
        M=tokens,
        **{f"ROWS{i}": n for i, n in enumerate([*rows, *padding])},
        WEIGHTS=len(rows),
        COLUMNS=columns,
        NESTED=weights[0][2] is not None,
        STACKED=weights[0][4] is not None,
        WARPS=config.num_warps,
        DEPTH=config.depth,
        PROGRAMS=config.programs,
        SPREAD=tokens <= MOST_TOKENS_OF_FOUR_COLUMNS,
        STAGED=norm is None and kept > 0,
        **around(x.dtype, norm, act, residual),
    )

    @jax.custom_batching.sequential_vmap
    def run(x, weights, gain, gain_index, added):
        constants = jnp.asarray(nf4_lookup.pairs(x.dtype)), jnp.asarray(reference.DYNAMIC_MAP)
        fields = (field for fields in weights for field in fields)
        return call(x, *constants, *fields, gain, gain_index, added)[: 1 if act is not None else len(rows)]

    some = [filled(*fields) for fields in weights]
    gain, gain_index = (x, None) if norm is None else (norm.weight, norm.index)
    gain_index = jnp.zeros((), jnp.int32) if gain_index is None else gain_index
    return run(x, [*some, *(some[0] for _ in padding)], gain, gain_index, x if residual is None else residual.x)


def around(dtype: np.dtype, norm: InputNorm | None, act: str | None, residual: Residual | None) -> dict:
    """The kernel's compile-time arguments for what stands around the product."""
    return dict(
        NORM=norm is not None,
        EPS=0.0 if norm is None else norm.eps,
        OFFSET=0.0 if norm is None else norm.offset,
        GAIN_STACKED=norm is not None and norm.index is not None,
        ACT=act or "",
        HAS_RESIDUAL=residual is not None,
        MULTIPLIER=0.0 if residual is None else float(np.asarray(residual.multiplier, dtype)),
    )
