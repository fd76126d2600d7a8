"""The residual stream after one more part, and its RMS norm, in one Triton kernel for few tokens.

    total = x + multiplier * y,    out = total / sqrt(mean(total^2) + eps) * gain

(arXiv:1910.07467), with statistics in float32. The total is rounded to x's dtype once, as XLA does where it fuses
`residual_norm_reference`; what the reference rounds besides is rounded here. A token is the work of one program, which
holds it in registers. A stack of gains is read by index. What XLA does in two or three kernels is little work, so that
for few tokens launching them is what it costs.

y may be a product that is not added up yet (`parts.Parts`): the program adds up its row of the parts first. For 64
tokens of 4096 features, 8 parts in float32 are 8 MB out of L2, 128 KB a program, which an SM reads in some 2000 cycles
if some 40 KB are on their way. ptxas asks for 5 parts before it adds, which with 1024 threads is 80 KB.

The norm may be `Ordered` for the product that reads it: each 64 of its elements change places within the program, and
are stored 16 bytes at a time. In float8 a token has a scale.

Layout: x, y [..., D], or parts [P, ..., D] of y; weight [D], or [layers, D] with an index.
"""

import functools
import math
from typing import Any, no_type_check

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from jaxlora.kernels.graph_call import triton_call
from jaxlora.kernels.ordered import FLOAT8, STEP, Ordered, padded, plain, shape_of
from jaxlora.kernels.parts import Parts, summed

MOST_TOKENS = 64
MOST_FEATURES = 16384


def added(x: Float[Array, "*shape"], y: Float[Array, "*shape"] | Parts, multiplier: float) -> Float[Array, "*shape"]:
    """The residual stream x with one more part, as checkpointing policies know it."""
    return checkpoint_name(x + multiplier * summed(y), "residual")


def residual_norm_reference(
    x: Float[Array, "*batch d"],
    y: Float[Array, "*batch d"] | Parts | None,
    weight: Float[Array, "..."],
    index: Int[Array, ""] | None,
    *,
    eps: float,
    offset: float = 0.0,
    multiplier: float = 1.0,
    ordered: Any = None,
) -> tuple[Float[Array, "*batch d"], Float[Array, "*batch d"]]:
    """(total, out) in x's dtype.

    Args:
      x: the residual stream.
      y: what is added to it, perhaps still in parts; None for nothing.
      weight: of a shape that broadcasts with x; of a stack of such if `index` is given.
      eps: added to the mean square.
      offset: the gain is offset + weight, in float32; with 0 it is the weight, in x's dtype.
      multiplier: of y.
      ordered: of which dtype out may be `Ordered`, as a kernel makes it. Here it is not.
    """
    total = x if y is None else added(x, y, multiplier)
    wide = total.astype(jnp.float32)
    if index is not None:
        weight = jax.lax.dynamic_index_in_dim(weight, index, keepdims=False)
    normed = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    if offset == 0.0:
        return total, normed.astype(x.dtype) * weight.astype(x.dtype)
    return total, (normed * (weight.astype(jnp.float32) + offset)).astype(x.dtype)


@functools.cache
@no_type_check  # a type checker's wrapper around the function would hide its source from Triton
def _kernel():
    """The Triton function. Built on first use, since the library imports where Triton is not installed."""
    import triton
    import triton.language as tl

    @triton.jit
    def residual_norm(
        x,  # [M, D]
        y,  # [M, D], or float32 or bfloat16 [PARTS, M, D]; unread without HAS_PART
        weight,  # [D], or [layers, D]
        index,  # int32 []; unread without STACKED
        total,  # [M, D]; unwritten without HAS_PART
        out,  # [M, D], or the data of `Ordered`
        scales,  # with IS_FLOAT8 what that is times: float32 [M]
        M: tl.constexpr,  # 0 without PARTS
        D: tl.constexpr,
        EPS: tl.constexpr,
        OFFSET: tl.constexpr,
        MULTIPLIER: tl.constexpr,
        HAS_PART: tl.constexpr,
        PARTS: tl.constexpr,  # 0 where y is added up already
        STACKED: tl.constexpr,
        BLOCK: tl.constexpr,  # D, up to a power of two
        PADDED: tl.constexpr,  # tokens, up to a multiple of 8, of `Ordered`; 0 where out is not that
        IS_FLOAT8: tl.constexpr,
    ):
        column = tl.arange(0, BLOCK)
        inside = column < D
        at = tl.program_id(0) * D + column
        if STACKED:
            weight += tl.load(index).to(tl.int64) * D
        gain = tl.load(weight + column, mask=inside, other=0.0)
        narrow = tl.load(x + at, mask=inside, other=0.0)
        if HAS_PART:
            part = tl.load(y + at, mask=inside, other=0.0).to(tl.float32)
            for i in tl.static_range(1, PARTS):
                part += tl.load(y + i * (M * D) + at, mask=inside, other=0.0).to(tl.float32)
            part = part.to(narrow.dtype).to(tl.float32)
            narrow = (narrow.to(tl.float32) + part * MULTIPLIER).to(narrow.dtype)
            tl.store(total + at, narrow, mask=inside)
        wide = narrow.to(tl.float32)
        normed = wide * tl.rsqrt(tl.sum(wide * wide) / D + EPS)
        if OFFSET == 0.0:
            normed = normed.to(narrow.dtype).to(tl.float32) * gain.to(narrow.dtype).to(tl.float32)
        else:
            normed = normed * (gain.to(tl.float32) + OFFSET)
        normed = normed.to(narrow.dtype)
        if IS_FLOAT8:
            # Times 2^(2 - e), of the largest's exponent e.
            wide = normed.to(tl.float32)
            exponent = tl.maximum(tl.max(tl.abs(wide)).to(tl.uint32, bitcast=True) >> 23, 3)
            times, over = (256 - exponent) << 23, (exponent - 2) << 23
            tl.store(scales + tl.program_id(0), over.to(tl.float32, bitcast=True))
            narrow = (wide * times.to(tl.float32, bitcast=True)).to(tl.float8e4nv).to(tl.uint8, bitcast=True)
            first, second = tl.split(tl.reshape(narrow, (BLOCK // 2, 2)))  # 64 [t, s, u, h] as [s, t, u, 1 - h]
            normed = tl.permute(tl.reshape(tl.join(second, first), (BLOCK // 64, 4, 4, 4)), (0, 2, 1, 3))
            normed = tl.reshape(normed, (BLOCK,))
            at = column // 16 * (16 * PADDED) + tl.program_id(0) * 16 + column % 16
            out = out.to(tl.pointer_type(tl.uint8))
        elif PADDED:  # 64 elements [t, 2 s + u, h] as [2 s + u, t, h]
            normed = tl.permute(tl.reshape(normed, (BLOCK // 64, 4, 8, 2)), (0, 2, 1, 3))
            normed = tl.reshape(normed, (BLOCK,))
            at = column // 8 * (8 * PADDED) + tl.program_id(0) * 8 + column % 8
        tl.store(out + at, normed, mask=inside)

    return residual_norm


def residual_norm(
    x: Float[Array, "*batch d"],
    y: Float[Array, "*batch d"] | Parts | None,
    weight: Float[Array, "..."],
    index: Int[Array, ""] | None,
    *,
    eps: float,
    offset: float = 0.0,
    multiplier: float = 1.0,
    ordered: Any = None,
) -> tuple[Float[Array, "*batch d"], Float[Array, "*batch d"] | Ordered]:
    """`residual_norm_reference` as a Triton kernel, whose norm is `Ordered` if it is asked for and D is a multiple of
    256, of x's dtype or of float8. The gradients are the reference's.

    Raises:
      NotImplementedError: jax-triton is not installed; x is none of bfloat16 and float16, or y is of another dtype;
        there are more than `MOST_TOKENS` tokens or `MOST_FEATURES` features; or a weight has more than one axis.
    """
    features, tokens = x.shape[-1], math.prod(x.shape[:-1])
    if x.dtype not in (jnp.bfloat16, jnp.float16) or (y is not None and y.dtype != x.dtype):
        raise NotImplementedError(
            f"the kernel takes bfloat16 or float16, x and y alike, not {x.dtype.name}"
            + ("" if y is None else f" and {y.dtype.name}")
        )
    if not 0 < tokens <= MOST_TOKENS or features > MOST_FEATURES:
        raise NotImplementedError(
            f"the kernel takes 1 to {MOST_TOKENS} tokens of up to {MOST_FEATURES} features, not {tokens} of {features}"
        )
    if weight.shape[weight.ndim - 1 :] != (features,) or weight.ndim != (1 if index is None else 2):
        raise NotImplementedError(f"the kernel takes a weight [{features}] or a stack, not {list(weight.shape)}")
    try:
        import jax_triton  # noqa: F401
    except ImportError as error:
        raise NotImplementedError(f"the kernel needs jax-triton and triton ({error})") from error

    options = dict(eps=eps, offset=offset, multiplier=multiplier)
    is_ordered = ordered is not None and features % STEP == 0
    is_float8 = is_ordered and ordered == FLOAT8
    out = jax.ShapeDtypeStruct(x.shape, x.dtype)
    if is_ordered:
        out = jax.ShapeDtypeStruct(shape_of(tokens, features, is_float8), FLOAT8 if is_float8 else x.dtype)
    more = dict(parts=(y.count, tokens) if isinstance(y, Parts) else (0, 0), padded=padded(tokens) if is_ordered else 0)
    call = functools.partial(
        triton_call,
        kernel=_kernel(),
        out_shape=[
            jax.ShapeDtypeStruct((1,) if y is None else x.shape, x.dtype),
            out,
            jax.ShapeDtypeStruct((tokens if is_float8 else 1,), jnp.float32),
        ],
        grid=(tokens,),
        **constants(features, x.dtype, y is not None, index is not None, is_float8=is_float8, **options, **more),
    )

    @jax.custom_batching.sequential_vmap
    def run(x, y, weight, index):
        added = y.parts if isinstance(y, Parts) else x if y is None else y
        total, out, scales = call(x, added, weight, jnp.int32(0) if index is None else index)
        total = x if y is None else total
        return total, Ordered(out, x.shape, x.dtype, scales if is_float8 else None) if is_ordered else out

    @jax.custom_vjp
    def differentiable(x, y, weight, index):
        return run(x, y, weight, index)

    def backward(saved, cotangents):
        *arrays, index = saved
        dtotal, dout = cotangents
        _, pullback = jax.vjp(lambda *arrays: residual_norm_reference(*arrays, index, **options), *arrays)
        return *pullback((dtotal, plain(dout))), None

    differentiable.defvjp(lambda *arrays: (run(*arrays), arrays), backward)
    return differentiable(x, y, weight, index)


def constants(
    features, dtype, has_part, stacked, eps, offset, multiplier, parts=(0, 0), padded=0, is_float8=False
) -> dict:
    """The kernel's compile-time arguments; parts: how many there are of y, each of so many tokens; padded: 0, or the
    tokens of `Ordered`, which may be float8."""
    block = 1 << (features - 1).bit_length()
    count, tokens = parts
    num_warps = min(max(block // (128 if count else 256), 1), 32 if count else 16)
    return dict(
        M=tokens, D=features, EPS=eps, OFFSET=offset, MULTIPLIER=float(np.asarray(multiplier, dtype)),
        HAS_PART=has_part, PARTS=count, STACKED=stacked, BLOCK=block, PADDED=padded, IS_FLOAT8=is_float8,
        num_warps=num_warps,
    )  # fmt: skip
