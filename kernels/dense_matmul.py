"""Products with dense 16-bit weights for few tokens: y = x W^T, with W read out of its stack, in one Triton kernel.

The maths is `reference.matmul_dense`: x [M, in], a weight [out, in], or [layers, out, in] and an index on the device,

    y[m, n] = sum over k of W[n, k] * x[m, k]        products exact, sums in float32, rounded once

Why not leave it to XLA: in a scan over layers it copies each layer's weight out of the stack before cuBLAS reads it,
three times the bytes, and for few tokens bytes are the time.

The layout. A program makes `rows` rows of the result for all tokens. It walks along k in steps of `inner` elements, and
some steps' tiles of the weight and of x are in shared memory, or on their way to it by asynchronous copies.

  * Many tokens: the tile is the left operand of the tensor cores and x^T the right one, its tokens padded to 16, 32 or
    64 columns. With 64 rows and more it is fed to them out of shared memory (wgmma on sm_90), with fewer by registers.
  * One token: the tile is multiplied by x and added to as many float32 sums, which are added up at the end. That takes
    four instructions an element, a quarter of what an SM has time for.

The trade. A copy of 2.95 TB/s with a latency of a microsecond wants 23 KB on their way to each of 132 SMs, and more as
memory becomes busy: 64 KB is aimed at. Every program reads all of x again, out of L2, and M tokens are M / rows of the
weight's bytes: 64 tokens want 64 rows at least, or L2 is busier than memory. Where that leaves too few programs,
`split` of them share a tile and divide k. Each writes its part of the sum in float32. What reads the result next adds
the parts up, where it can (`parts`); else XLA does, which is one more launch for each weight. They are 4 * split * M /
in of the weight's bytes more. Programs that run at once share the memory's speed, so it does not matter that some SMs
have one more, as long as none waits for another to end.
"""

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import no_type_check

import jax
import jax.numpy as jnp

from jaxlora.kernels import reference
from jaxlora.kernels.graph_call import triton_call
from jaxlora.kernels.grouped_triton import ROOMY
from jaxlora.kernels.h100 import SMS
from jaxlora.kernels.parts import Parts, cotangent
from jaxlora.kernels.reference import DenseFields

MOST_TOKENS = 64
MOST_WEIGHTS = 3
SHARED = 225 << 10  # bytes of an SM of an H100
MOST_STAGES = 6
MOST_PARTS = 8


@dataclass(frozen=True, kw_only=True)
class Config:
    """How the kernel is laid out on the device; no field changes a result but for the order of its sums.

    Attributes:
      rows: rows of the weight that a program multiplies, a power of two, 16 or more.
      inner: elements of each that a step multiplies, a power of two, 16 or more.
      split: programs that divide k between them.
      num_warps: warps of a program, a power of two.
      num_stages: steps whose tiles are in shared memory at once.
    """

    rows: int = 16
    inner: int = 256
    split: int = 1
    num_warps: int = 4
    num_stages: int = 5

    def __post_init__(self):
        for field in ("rows", "inner", "num_warps"):
            value, least = getattr(self, field), 1 if field == "num_warps" else 16
            if value < least or value & (value - 1):
                raise ValueError(f"{field} must be a power of two, {least} or more, not {value}")
        for field in ("split", "num_stages"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field} must be 1 or more, not {getattr(self, field)}")


def heuristics(tokens: int, rows: Sequence[int], columns: int) -> Config:
    """The configuration for so many tokens and weights of `rows` rows each, of `columns` elements.

    All programs should run at once, on an H100: two an SM, or one. In the matrices of an 8B, of more than one token:

      * gate and up, 28672 rows: 224 tiles of 128.
      * q, k and v, 6144 rows: 192 of 32, or of many tokens 96 of 64, which is enough if each has 64 KB under way.
      * o and down, 4096 rows: 128 of 32, or of many tokens 32 of 128 whose k is divided among 8.

    Of a copy's speed on an H100 (2026-11-26), q/k/v, o, gate/up, down: 85, 83, 101, 97% with one token, and with 64 84,
    57, 90, 77%, the sums of parts included. 2 to 63 tokens were not measured.
    """
    tiles_of = lambda n: sum(-(-count // n) for count in rows)
    if tokens == 1:
        config = Config()
    elif tiles_of(128) >= 128:
        config = Config(rows=128, inner=64)
    elif tokens <= 32:
        config = Config(rows=32, inner=256)
    elif tiles_of(64) >= 80:
        config = Config(rows=64, inner=128)
    else:
        config = Config(rows=128, inner=64, split=2 * SMS // tiles_of(128))
    inner = config.inner
    while inner > 16 and inner >= 2 * columns:
        inner //= 2
    steps = -(-columns // inner)
    split = min(config.split, MOST_PARTS, max(steps // MOST_STAGES, 1))
    split = -(-steps // -(-steps // split))  # none that has nothing to do
    config = dataclasses.replace(config, inner=inner, split=split)
    if tokens == 1:
        return config
    programs = tiles_of(config.rows) * config.split
    room = min(SHARED // min(-(-programs // SMS), 2), _shared_of_a_program())
    stages = MOST_STAGES
    while stages > 2 and shared_bytes(dataclasses.replace(config, num_stages=stages), tokens) > room:
        stages -= 1
    return dataclasses.replace(config, num_stages=stages)


def shared_bytes(config: Config, tokens: int) -> int:
    """The shared memory of a program: the tiles of its stages. Only wgmma reads the last one while more are copied."""
    tiles = config.num_stages if tokens > 1 and config.rows >= 64 else max(config.num_stages - 1, 1)
    return 2 * tiles * config.inner * (config.rows + padded(tokens))


def _shared_of_a_program() -> int:
    """What a program of the default device may take of shared memory."""
    return (160 if getattr(jax.devices()[0], "compute_capability", None) in ROOMY else 99) << 10


def padded(tokens: int) -> int:
    """Columns that the tensor cores multiply; 1 stands for sums without them."""
    return 1 if tokens == 1 else max(16, 1 << (tokens - 1).bit_length())


@functools.cache
@no_type_check  # a type checker's wrapper around the function would hide its source from Triton
def _kernel():
    """The Triton function. Built on first use, since the library imports where Triton is not installed."""
    import triton
    import triton.language as tl

    @triton.jit
    def dense_matmul(
        x,  # [M, COLUMNS]
        w0,  # [ROWS0, COLUMNS], or a stack of them
        index0,  # int32 []: which of the stack; unread unless STACKED
        w1,  # these and the next are unread with fewer than three weights
        index1,
        w2,
        index2,
        out0,  # [M, ROWS0] in x's dtype, or float32 [SPLIT, M, ROWS0]
        out1,
        out2,
        M: tl.constexpr,
        ROWS0: tl.constexpr,
        ROWS1: tl.constexpr,
        ROWS2: tl.constexpr,
        WEIGHTS: tl.constexpr,
        COLUMNS: tl.constexpr,
        STACKED: tl.constexpr,
        TOKENS: tl.constexpr,  # M, padded for the tensor cores; 1 for sums without them
        TILE_ROWS: tl.constexpr,
        TILE_INNER: tl.constexpr,
        STEPS: tl.constexpr,  # of one program
        SPLIT: tl.constexpr,
        STAGES: tl.constexpr,
    ):
        FIRST: tl.constexpr = (ROWS0 + TILE_ROWS - 1) // TILE_ROWS  # tiles before those of the second weight
        SECOND: tl.constexpr = FIRST + (ROWS1 + TILE_ROWS - 1) // TILE_ROWS
        IS_EVEN: tl.constexpr = STEPS * SPLIT * TILE_INNER == COLUMNS
        tile = tl.program_id(0)
        part = tl.program_id(1)
        w, index, out, rows = w0, index0, out0, ROWS0
        if WEIGHTS > 1:
            if tile >= FIRST:
                w, index, out, rows = w1, index1, out1, ROWS1
                if WEIGHTS > 2:
                    if tile >= SECOND:
                        w, index, out, rows = w2, index2, out2, ROWS2
                        tile -= SECOND - FIRST
                tile -= FIRST
        if STACKED:
            w += tl.load(index).to(tl.int64) * rows * COLUMNS
        row = tile * TILE_ROWS + tl.arange(0, TILE_ROWS)
        token = tl.arange(0, TOKENS)
        # Past the last row the last is read once more, and not stored.
        from_row = w + tl.minimum(row, rows - 1)[:, None] * COLUMNS
        from_token = x + token[:, None] * COLUMNS
        inner = part * (STEPS * TILE_INNER) + tl.arange(0, TILE_INNER)[None, :]
        if TOKENS == 1:
            sums = tl.zeros((TILE_ROWS, TILE_INNER), tl.float32)
        else:
            sums = tl.zeros((TILE_ROWS, TOKENS), tl.float32)
        for step in tl.range(0, STEPS, num_stages=STAGES):
            k = inner + step * TILE_INNER
            if IS_EVEN:
                left = tl.load(from_row + k)
            else:
                left = tl.load(from_row + k, mask=k < COLUMNS, other=0.0)
            if TOKENS == M:
                is_read = k < COLUMNS
            else:
                is_read = (token[:, None] < M) & (k < COLUMNS)
            if IS_EVEN and TOKENS == M:
                right = tl.load(from_token + k)
            else:
                right = tl.load(from_token + k, mask=is_read, other=0.0)
            if TOKENS == 1:
                sums += left.to(tl.float32) * right.to(tl.float32)
            else:
                sums = tl.dot(left, tl.trans(right), acc=sums)
        out += part * (M * rows)
        if TOKENS == 1:
            tl.store(out + row, tl.sum(sums, axis=1).to(out.dtype.element_ty), mask=row < rows)
        else:
            is_inside = (row[:, None] < rows) & (token[None, :] < M)
            tl.store(out + token[None, :] * rows + row[:, None], sums.to(out.dtype.element_ty), mask=is_inside)

    return dense_matmul


def matmul_dense(
    x: jax.Array, weights: Sequence[DenseFields], *, parts: bool = False, config: Config | None = None
) -> list[jax.Array]:
    """`reference.matmul_dense` as a Triton kernel: the same arguments and, but for the order of sums, the same results.

    Up to three weights are multiplied in one launch. Under `jax.vmap` over x alone tokens are multiplied together; the
    gradients are the reference's. With `parts` products whose k is split are float32 [split, M, out].

    Raises:
      NotImplementedError: jax-triton is not installed; x and the weights are not all bfloat16 or all float16; x has
        more than `MOST_TOKENS` rows; rows of a weight are not whole 16 bytes (in % 8), or it has 2^31 elements or more;
        there are more than three weights, or some are stacked and others are not.
    """
    tokens, columns = x.shape
    names = {x.dtype.name, *(w.dtype.name for w, _ in weights)}
    if len(names) > 1 or x.dtype not in (jnp.bfloat16, jnp.float16):
        raise NotImplementedError(f"the kernel takes bfloat16 or float16, all alike, not {', '.join(sorted(names))}")
    if not 0 < tokens <= MOST_TOKENS:
        raise NotImplementedError(f"the kernel takes 1 to {MOST_TOKENS} tokens, not {tokens}")
    if columns % 8:
        raise NotImplementedError(f"the kernel takes rows of whole 16 bytes, not of {columns} elements")
    if not 0 < len(weights) <= MOST_WEIGHTS:
        raise NotImplementedError(f"the kernel takes 1 to {MOST_WEIGHTS} weights, not {len(weights)}")
    rows = [w.shape[-2] for w, _ in weights]
    if max(rows) * columns >= 1 << 31:
        raise NotImplementedError(f"the kernel counts elements in 32 bits, and there are {max(rows) * columns}")
    is_stacked = [index is not None for _, index in weights]
    if len({*is_stacked}) > 1:
        raise NotImplementedError("the kernel takes weights that are all stacked or none")
    try:
        import jax_triton  # noqa: F401
    except ImportError as error:
        raise NotImplementedError(f"the kernel needs jax-triton and triton ({error})") from error

    config = heuristics(tokens, rows, columns) if config is None else config
    steps = -(-columns // (config.inner * config.split))
    is_split = config.split > 1
    widths = [*rows, *[0] * (MOST_WEIGHTS - len(rows))]
    dtype = jnp.float32 if is_split else x.dtype
    shape_of = lambda n: (config.split, tokens, n) if is_split else (tokens, n)
    call = functools.partial(
        triton_call,
        kernel=_kernel(),
        out_shape=[jax.ShapeDtypeStruct(shape_of(n) if n else (1,), dtype) for n in widths],
        grid=(sum(-(-n // config.rows) for n in rows), config.split),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        M=tokens,
        **{f"ROWS{i}": n for i, n in enumerate(widths)},
        WEIGHTS=len(rows),
        COLUMNS=columns,
        STACKED=is_stacked[0],
        TOKENS=padded(tokens),
        TILE_ROWS=config.rows,
        TILE_INNER=config.inner,
        STEPS=steps,
        SPLIT=config.split,
        STAGES=config.num_stages,
    )  # fmt: skip

    @jax.custom_batching.custom_vmap
    def run(x, weights):
        some = [(w, jnp.int32(0) if index is None else index) for w, index in weights]
        some += [some[0]] * (MOST_WEIGHTS - len(some))
        outs = call(x, *(field for fields in some for field in fields))[: len(rows)]
        return outs if not is_split or parts else [Parts(out, x.dtype).sum() for out in outs]

    @run.def_vmap
    def _(axis_size, in_batched, x, weights):
        x_is_batched, are_batched = in_batched
        if not x_is_batched or any(jax.tree.leaves(are_batched)):
            axes = jax.tree.map(lambda is_batched: 0 if is_batched else None, in_batched)
            ys = jax.vmap(reference.matmul_dense, in_axes=tuple(axes), axis_size=axis_size)(x, weights)
        else:  # more tokens of the same weights
            together = x.reshape(-1, columns)
            product = matmul_dense if len(together) <= MOST_TOKENS else reference.matmul_dense
            ys = [y.reshape(axis_size, tokens, -1) for y in product(together, weights)]
        if is_split and parts:  # of which one is all of it
            ys = [jnp.pad(y.astype(dtype)[:, None], ((0, 0), (0, config.split - 1), (0, 0), (0, 0))) for y in ys]
        return ys, [True] * len(ys)

    @jax.custom_vjp
    def differentiable(x, weights):
        return run(x, weights)

    def backward(saved, cotangents):
        x, weights = saved
        indices = [index for _, index in weights]

        def product(x, stacks):
            return reference.matmul_dense(x, [DenseFields(*pair) for pair in zip(stacks, indices, strict=True)])

        _, pullback = jax.vjp(product, x, [w for w, _ in weights])
        if is_split and parts:
            cotangents = [cotangent(Parts(dy, x.dtype)) for dy in cotangents]
        dx, stacks = pullback(cotangents)
        return dx, [DenseFields(dw, None) for dw in stacks]

    differentiable.defvjp(lambda x, weights: (run(x, weights), (x, weights)), backward)
    return differentiable(x, [*weights])
