"""The thin products of LoRA with inputs that are dropped, and their gradients, as Triton kernels.

    z = dropout(x) A^T        y + z B^T        dx = dropout(dz A)        dA = dz^T dropout(x)

Dropout zeroes what the mask does not keep and divides by 1 - rate (`kernels.dropout`), and is the same each time.

The trade. All of it is traffic, over x: each kernel reads the mask at a bit an entry, and reads or writes one array as
wide as x. Made by XLA, what is dropped is written for cuBLAS to read, and what is to be dropped for XLA, 3 passes each.
Entries are scaled as their sum, in float32, and not rounded. And z B^T is added to the base's product y where y lies, 2
passes, where XLA writes it and then adds, 4.

A program of z has some rows and some columns, one of dA some columns and some rows: what either sums over is divided so
that there are programs for all of the device, and XLA adds up the parts, in one order.

Layout: x, dx [..., D], y [..., N] and dz [..., r] in 16 bits, bits [..., ceil(D / 8)], A [r, D], B [N, r]; z [..., r]
and dA in float32, z in 16 bits where it is multiplied by B.
"""

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any, no_type_check

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Float32, UInt8

from jaxlora.kernels.dropout import PER_BLOCK, kept

ROWS, STEP, COLUMNS = 32, 128, 1024  # of z: of a program, of a step of it, and of all its steps
TOKENS, OUTER_STEP, OUTER_COLUMNS = 512, 64, 128  # of dA: of a program, of a step of it; columns of a program
BACK_ROWS, BACK_COLUMNS = 64, 128  # of dx, and of y
NUM_WARPS, NUM_STAGES = 4, 3
MOST_RANKS = 128


def dropped_product_reference(
    x: Float[Array, "*rows d"], bits: UInt8[Array, "*rows bytes"], a: Float[Array, "r d"], rate: float
) -> Float32[Array, "*rows r"]:
    """dropout(x) a^T with the mask that `kept_bits` gives, in float32."""
    return _sums(kept(x, bits, rate), a, (x.ndim - 1,), (1,))


def raised_onto_reference(
    y: Float[Array, "*rows n"], z: Float[Array, "*rows r"], b: Float[Array, "n r"]
) -> Float[Array, "*rows n"]:
    """y + z b^T in y's dtype, added up in float32 and rounded once."""
    return (y.astype(jnp.float32) + _sums(z, b, (z.ndim - 1,), (1,))).astype(y.dtype)


def dropped_gradients_reference(
    x: Float[Array, "*rows d"],
    bits: UInt8[Array, "*rows bytes"],
    a: Float[Array, "r d"],
    dz: Float[Array, "*rows r"],
    rate: float,
) -> tuple[Float[Array, "*rows d"], Float32[Array, "r d"]]:
    """The gradients of `dropped_product_reference` by x, in x's dtype, and by a, in float32."""
    return dropped_back_reference(bits, a, dz.astype(x.dtype), rate), dropped_outer_reference(x, bits, dz, rate)


def dropped_back_reference(
    bits: UInt8[Array, "*rows bytes"], a: Float[Array, "r d"], dz: Float[Array, "*rows r"], rate: float
) -> Float[Array, "*rows d"]:
    """dropout(dz a), in dz's dtype."""
    dims = (((dz.ndim - 1,), (0,)), ((), ()))
    return kept(lax.dot_general(dz, a, dims, preferred_element_type=dz.dtype), bits, rate)


def dropped_outer_reference(
    x: Float[Array, "*rows d"], bits: UInt8[Array, "*rows bytes"], dz: Float[Array, "*rows r"], rate: float
) -> Float32[Array, "r d"]:
    """dz^T dropout(x), in float32."""
    rows = tuple(range(x.ndim - 1))
    return _sums(dz, kept(x, bits, rate), rows, rows)


def _sums(x: Array, y: Array, of_x: tuple[int, ...], of_y: tuple[int, ...]) -> Array:
    return lax.dot_general(x, y, ((of_x, of_y), ((), ())), preferred_element_type=jnp.float32)


@functools.cache
@no_type_check  # a type checker's wrapper around the function would hide its source from Triton
def _kernels():
    """The Triton functions of (z, dx, dA, y), built on first use: the library imports where Triton is missing."""
    import triton
    import triton.language as tl

    @triton.jit
    def load_kept(bits, row, byte, M: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
        """Whether entries of rows [ROWS, 1] and bytes [1, COLUMNS / 8] are kept, [ROWS, COLUMNS]."""
        BYTES: tl.constexpr = (D + 7) // 8
        packed = tl.load(bits + row * BYTES + byte, mask=(row < M) & (byte < BYTES), other=0)
        return ((packed[:, :, None] >> tl.arange(0, 8)[None, None, :]) & 1).reshape(ROWS, COLUMNS) != 0

    @triton.jit
    def dropped_product(
        x,  # [M, D]
        bits,  # uint8 [M, ceil(D / 8)]
        a,  # [R, D]
        out,  # float32 [ceil(D / COLUMNS), M, R]
        M: tl.constexpr,
        D: tl.constexpr,
        R: tl.constexpr,
        RANKS: tl.constexpr,  # R, up to a power of two of at least 16
        SCALE: tl.constexpr,
        ROWS: tl.constexpr,
        STEP: tl.constexpr,
        COLUMNS: tl.constexpr,
    ):
        row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
        part = tl.program_id(1)
        rank = tl.arange(0, RANKS)[:, None]
        total = tl.zeros((ROWS, RANKS), tl.float32)
        for step in range(0, COLUMNS, STEP):
            start = part * COLUMNS + step
            at = start + tl.arange(0, STEP)[None, :]
            values = tl.load(x + row * D + at, mask=(row < M) & (at < D), other=0.0)
            is_kept = load_kept(bits, row, start // 8 + tl.arange(0, STEP // 8)[None, :], M, D, ROWS, STEP)
            of_a = tl.load(a + rank * D + at, mask=(rank < R) & (at < D), other=0.0)
            dropped = tl.where(is_kept, values, tl.zeros_like(values))
            total = tl.dot(dropped, tl.trans(of_a), total)
        rank = tl.arange(0, RANKS)[None, :]
        tl.store(out + (part.to(tl.int64) * M + row) * R + rank, total * SCALE, mask=(row < M) & (rank < R))

    @triton.jit
    def dropped_back(
        bits,  # uint8 [M, ceil(D / 8)]
        a,  # [R, D]
        dz,  # [M, R]
        dx,  # [M, D]
        M: tl.constexpr,
        D: tl.constexpr,
        R: tl.constexpr,
        RANKS: tl.constexpr,
        SCALE: tl.constexpr,
        ROWS: tl.constexpr,
        COLUMNS: tl.constexpr,
    ):
        row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
        start = tl.program_id(1) * COLUMNS
        at = start + tl.arange(0, COLUMNS)[None, :]
        rank = tl.arange(0, RANKS)
        of_z = tl.load(dz + row * R + rank[None, :], mask=(row < M) & (rank[None, :] < R), other=0.0)
        of_a = tl.load(a + rank[:, None] * D + at, mask=(rank[:, None] < R) & (at < D), other=0.0)
        is_kept = load_kept(bits, row, start // 8 + tl.arange(0, COLUMNS // 8)[None, :], M, D, ROWS, COLUMNS)
        gradient = tl.where(is_kept, tl.dot(of_z, of_a) * SCALE, 0.0)
        tl.store(dx + row * D + at, gradient.to(of_z.dtype), mask=(row < M) & (at < D))

    @triton.jit
    def dropped_outer(
        x,  # [M, D]
        bits,  # uint8 [M, ceil(D / 8)]
        dz,  # [M, R]
        out,  # float32 [ceil(M / TOKENS), R, D]
        M: tl.constexpr,
        D: tl.constexpr,
        R: tl.constexpr,
        RANKS: tl.constexpr,
        SCALE: tl.constexpr,
        TOKENS: tl.constexpr,
        STEP: tl.constexpr,
        COLUMNS: tl.constexpr,
    ):
        start, part = tl.program_id(0) * COLUMNS, tl.program_id(1).to(tl.int64)
        at = start + tl.arange(0, COLUMNS)[None, :]
        byte = start // 8 + tl.arange(0, COLUMNS // 8)[None, :]
        rank = tl.arange(0, RANKS)
        total = tl.zeros((RANKS, COLUMNS), tl.float32)
        for step in range(0, TOKENS, STEP):
            row = part * TOKENS + step + tl.arange(0, STEP)[:, None]
            values = tl.load(x + row * D + at, mask=(row < M) & (at < D), other=0.0)
            is_kept = load_kept(bits, row, byte, M, D, STEP, COLUMNS)
            of_z = tl.load(dz + row * R + rank[None, :], mask=(row < M) & (rank[None, :] < R), other=0.0)
            dropped = tl.where(is_kept, values, tl.zeros_like(values))
            total = tl.dot(tl.trans(of_z), dropped, total)
        rank = rank[:, None]
        tl.store(out + (part * R + rank) * D + at, total * SCALE, mask=(rank < R) & (at < D))

    @triton.jit
    def raised_onto(
        y,  # [M, N]
        z,  # [M, R]
        b,  # [N, R]
        out,  # [M, N], y itself
        M: tl.constexpr,
        N: tl.constexpr,
        R: tl.constexpr,
        RANKS: tl.constexpr,
        ROWS: tl.constexpr,
        COLUMNS: tl.constexpr,
    ):
        row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
        at = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        rank = tl.arange(0, RANKS)[None, :]
        is_there = (row < M) & (at[None, :] < N)
        base = tl.load(y + row * N + at[None, :], mask=is_there, other=0.0)
        of_z = tl.load(z + row * R + rank, mask=(row < M) & (rank < R), other=0.0)
        of_b = tl.load(b + at[:, None] * R + rank, mask=(at[:, None] < N) & (rank < R), other=0.0)
        total = tl.dot(of_z, tl.trans(of_b), base.to(tl.float32))
        tl.store(out + row * N + at[None, :], total.to(base.dtype), mask=is_there)

    return dropped_product, dropped_back, dropped_outer, raised_onto


def constants(tokens: int, features: int, ranks: int, rate: float) -> dict[str, Any]:
    """The compile-time arguments that all kernels have."""
    return dict(M=tokens, D=features, R=ranks, RANKS=_padded(ranks), SCALE=1.0 / (1.0 - rate))


def _padded(ranks: int) -> int:
    return max(16, 1 << (ranks - 1).bit_length())


PRODUCT = dict(ROWS=ROWS, STEP=STEP, COLUMNS=COLUMNS)
BACK = dict(ROWS=BACK_ROWS, COLUMNS=BACK_COLUMNS)
OUTER = dict(TOKENS=TOKENS, STEP=OUTER_STEP, COLUMNS=OUTER_COLUMNS)


def _spec(x: Any) -> tuple[list, Any]:
    """What the rows and what the columns of an operand are divided by."""
    *rows, columns = (*x.sharding.spec, *[None] * x.ndim)[: x.ndim]
    # Else a byte of bits would be of two devices.
    return rows, None if x.sharding.shard_shape(x.shape)[-1] % PER_BLOCK else columns


def _summed(x: Array, axes: Any) -> Array:
    """The sum over mesh axes, any of them perhaps a tuple, or None."""
    names = [axis if isinstance(axis, tuple) else (axis,) for axis in axes if axis is not None]
    return lax.psum(x, tuple(itertools.chain(*names))) if names else x


def sharded_product(product: Callable) -> Callable:
    """product(x [*rows, d], bits [*rows, bytes], a [r, d]) -> [*rows, r], of each device's part of x by itself.

    XLA does not know that of a kernel: it would gather whole arrays on every device first.
    """
    partitioned = custom_partitioning(product)

    def partition(mesh, operands, result):
        rows, columns = _spec(operands[0])
        of = lambda *axes: NamedSharding(mesh, PartitionSpec(*axes))
        one = lambda *args: _summed(product(*args), [columns])
        return mesh, one, of(*rows, None), (of(*rows, columns), of(*rows, columns), of(None, columns))

    partitioned.def_partition(partition=partition, sharding_rule="... i, ... j, r i -> ... r")
    return partitioned


def sharded_back(back: Callable) -> Callable:
    """back(bits, a, dz [*rows, r]) -> dx [*rows, d], of each device's part of x by itself, as `sharded_product`."""
    partitioned = custom_partitioning(back)

    def partition(mesh, operands, result):
        rows, columns = _spec(result)
        of = lambda *axes: NamedSharding(mesh, PartitionSpec(*axes))
        return mesh, back, of(*rows, columns), (of(*rows, columns), of(None, columns), of(*rows, None))

    partitioned.def_partition(partition=partition, sharding_rule="... j, r i, ... r -> ... i")
    return partitioned


def sharded_outer(outer: Callable) -> Callable:
    """outer(x, bits, dz) -> da [r, d], of each device's part of x by itself, as `sharded_product`."""
    partitioned = custom_partitioning(outer)

    def partition(mesh, operands, result):
        rows, columns = _spec(operands[0])
        of = lambda *axes: NamedSharding(mesh, PartitionSpec(*axes))
        one = lambda *args: _summed(outer(*args), rows)
        return mesh, one, of(None, columns), (of(*rows, columns), of(*rows, columns), of(*rows, None))

    partitioned.def_partition(partition=partition, sharding_rule="... i, ... j, ... r -> r i")
    return partitioned


def sharded_raise(raised: Callable) -> Callable:
    """raised(y [*rows, n], z [*rows, r], b [n, r]) -> [*rows, n], of each device's part of y by itself, as
    `sharded_product`."""
    partitioned = custom_partitioning(raised)

    def partition(mesh, operands, result):
        *rows, columns = (*result.sharding.spec, *[None] * result.ndim)[: result.ndim]
        of = lambda *axes: NamedSharding(mesh, PartitionSpec(*axes))
        whole = of(*rows, columns)
        return mesh, raised, whole, (whole, of(*rows, None), of(columns, None))

    partitioned.def_partition(partition=partition, sharding_rule="... n, ... r, n r -> ... n")
    return partitioned


def _launch(kernel: Callable, *arrays: Array, out_shape: Any, grid: tuple[int, int], **metaparameters) -> Array:
    import jax_triton

    options = dict(kernel=kernel, grid=grid, num_warps=NUM_WARPS, num_stages=NUM_STAGES)
    return jax_triton.triton_call(*arrays, out_shape=[out_shape], **options, **metaparameters)[0]


def _checked(x: Array, a: Array) -> None:
    """
    Raises:
      NotImplementedError: jax-triton is not installed; x and a are not both bfloat16 or both float16; or a has more
        than `MOST_RANKS` rows.
    """
    if x.dtype.name not in ("bfloat16", "float16") or a.dtype != x.dtype:
        raise NotImplementedError(f"the kernel takes bfloat16 or float16, not {x.dtype.name} and {a.dtype.name}")
    if a.shape[0] > MOST_RANKS:
        raise NotImplementedError(f"the kernel takes at most {MOST_RANKS} ranks, not {a.shape[0]}")
    try:
        import jax_triton  # noqa: F401
    except ImportError as error:
        raise NotImplementedError(f"the kernel needs jax-triton and triton ({error})") from error


def _unless_vmapped(kernel: Callable, reference: Callable) -> Callable:
    function = jax.custom_batching.custom_vmap(kernel)

    @function.def_vmap
    def _(axis_size, in_batched, *args):
        axes = tuple(0 if is_batched else None for is_batched in in_batched)
        outs = jax.vmap(reference, in_axes=axes, axis_size=axis_size)(*args)
        return outs, jax.tree.map(lambda _: True, outs)

    return function


def dropped_product(
    x: Float[Array, "*rows d"], bits: UInt8[Array, "*rows bytes"], a: Float[Array, "r d"], rate: float
) -> Float32[Array, "*rows r"]:
    """`dropped_product_reference` as a kernel; as itself under `jax.vmap`.

    Raises:
      NotImplementedError: see `_checked`.
    """
    _checked(x, a)

    def launch(x, bits, a):
        tokens, parts = math.prod(x.shape[:-1]), -(-x.shape[-1] // COLUMNS)
        sums = _launch(
            _kernels()[0],
            x.reshape(tokens, -1),
            bits.reshape(tokens, -1),
            a,
            out_shape=jax.ShapeDtypeStruct((parts, tokens, a.shape[0]), jnp.float32),
            grid=(-(-tokens // ROWS), parts),
            **constants(tokens, x.shape[-1], a.shape[0], rate),
            **PRODUCT,
        )
        return jnp.sum(sums, 0).reshape(*x.shape[:-1], a.shape[0])

    reference = functools.partial(dropped_product_reference, rate=rate)
    return _unless_vmapped(sharded_product(launch), reference)(x, bits, a)


def dropped_gradients(
    x: Float[Array, "*rows d"],
    bits: UInt8[Array, "*rows bytes"],
    a: Float[Array, "r d"],
    dz: Float[Array, "*rows r"],
    rate: float,
) -> tuple[Float[Array, "*rows d"], Float32[Array, "r d"]]:
    """`dropped_gradients_reference` as two kernels; as itself under `jax.vmap`.

    Raises:
      NotImplementedError: see `_checked`.
    """
    _checked(x, a)

    def back(bits, a, dz):
        tokens, features = math.prod(bits.shape[:-1]), a.shape[1]
        dx = _launch(
            _kernels()[1],
            bits.reshape(tokens, -1),
            a,
            dz.reshape(tokens, -1),
            out_shape=jax.ShapeDtypeStruct((tokens, features), dz.dtype),
            grid=(-(-tokens // BACK_ROWS), -(-features // BACK_COLUMNS)),
            **constants(tokens, features, a.shape[0], rate),
            **BACK,
        )
        return dx.reshape(*bits.shape[:-1], features)

    def outer(x, bits, dz):
        tokens, features, ranks = math.prod(x.shape[:-1]), x.shape[-1], dz.shape[-1]
        parts = -(-tokens // TOKENS)
        da = _launch(
            _kernels()[2],
            x.reshape(tokens, -1),
            bits.reshape(tokens, -1),
            dz.reshape(tokens, -1),
            out_shape=jax.ShapeDtypeStruct((parts, ranks, features), jnp.float32),
            grid=(-(-features // OUTER_COLUMNS), parts),
            **constants(tokens, features, ranks, rate),
            **OUTER,
        )
        return jnp.sum(da, 0)

    dz = dz.astype(x.dtype)
    dx = _unless_vmapped(sharded_back(back), functools.partial(dropped_back_reference, rate=rate))(bits, a, dz)
    da = _unless_vmapped(sharded_outer(outer), functools.partial(dropped_outer_reference, rate=rate))(x, bits, dz)
    return dx, da


def raised_onto(
    y: Float[Array, "*rows n"], z: Float[Array, "*rows r"], b: Float[Array, "n r"]
) -> Float[Array, "*rows n"]:
    """`raised_onto_reference` as a kernel, which writes where y lies; as itself under `jax.vmap`.

    Raises:
      NotImplementedError: see `_checked`, of y and z with b's transpose.
    """
    for array in (y, z):
        _checked(array, b.T)

    def launch(y, z, b):
        tokens, (features, ranks) = math.prod(y.shape[:-1]), b.shape
        out = _launch(
            _kernels()[3],
            y.reshape(tokens, -1),
            z.reshape(tokens, -1),
            b,
            out_shape=jax.ShapeDtypeStruct((tokens, features), y.dtype),
            grid=(-(-tokens // BACK_ROWS), -(-features // BACK_COLUMNS)),
            input_output_aliases={0: 0},
            M=tokens,
            N=features,
            R=ranks,
            RANKS=_padded(ranks),
            **BACK,
        )
        return out.reshape(y.shape)

    return _unless_vmapped(sharded_raise(launch), raised_onto_reference)(y, z, b)
