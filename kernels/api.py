"""The ops, each with several implementations behind one name.

An implementation takes the op's arguments and raises `NotImplementedError("why")` if it cannot take them here. With
`implementation=None` an op runs the first that can, in the order of its table; a name runs that one or raises.

Every implementation runs in `jax.named_scope("<op>.<name>")`, so a profile says which it was, and so do the locations
in the lowered program, which `implementations_in` reads.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int, UInt8

from jaxlora.kernels import decode_attention as decoding
from jaxlora.kernels import delta_states as deltas
from jaxlora.kernels import (
    dense_matmul,
    grouped_nf4,
    grouped_triton,
    nf4,
    nf4_matmul,
    nf4_matmul_float8,
    nf4_matmul_tiles,
    nf4_matmul_wgmma,
    nf4_merge,
    nf4_merge16,
    nf4_shards,
    reference,
    rms_norm,
)
from jaxlora.kernels import dropped_product as dropping
from jaxlora.kernels import gated as gating
from jaxlora.kernels import residual_norm as norm
from jaxlora.kernels.ahead import Ahead
from jaxlora.kernels.attention import attention_chunked, attention_cudnn, attention_reference
from jaxlora.kernels.ordered import FLOAT8, STEP, Ordered, plain
from jaxlora.kernels.parts import Parts


def dispatch(op: str, implementations: Mapping[str, Callable], implementation: str | None, *args, **kwargs) -> Any:
    """Call one of the implementations of an op.

    Args:
      op: the op's name, for the scope and the errors.
      implementations: name -> function, the preferred one first.
      implementation: a name, or None for the first that does not raise NotImplementedError.
      *args, **kwargs: the op's.

    Raises:
      ValueError: there is no implementation of that name.
      NotImplementedError: the one that was named, or every one, cannot run here; the message says why.
    """
    if implementation is not None and implementation not in implementations:
        raise ValueError(f"{op} has no implementation {implementation!r}: it has {', '.join(implementations)}")
    reasons = []
    for name in implementations if implementation is None else (implementation,):
        try:
            with jax.named_scope(f"{op}.{name}"):
                return implementations[name](*args, **kwargs)
        except NotImplementedError as reason:
            reasons.append(f"{name}: {reason}")
    raise NotImplementedError(f"{op} cannot run here. " + "; ".join(reasons))


def implementations_in(function: Callable, *args, **kwargs) -> set[str]:
    """The implementations, as "op.name", that `function(*args, **kwargs)` runs when it is jitted, forward and backward.

    It is traced and lowered and not run, so the arguments may be `jax.ShapeDtypeStruct`s.
    """
    lowered: Any = jax.jit(function).lower(*args, **kwargs).compiler_ir("stablehlo")
    # The values of constants, such as weights that a function closes over, are no program to look through.
    program = lowered.operation.get_asm(enable_debug_info=True, large_elements_limit=16)
    return {f"{op}.{name}" for op, names in _OPS.items() for name in names if re.search(rf"\b{op}\.{name}\b", program)}


def _platform() -> str:
    device = jax.config.jax_default_device  # a device, a platform's name, or None
    return jax.default_backend() if device is None else getattr(device, "platform", device)


def is_on_gpu() -> bool:
    """Whether the default device is an NVIDIA GPU."""
    return _platform() in ("gpu", "cuda")


def on_gpu(function: Callable) -> Callable:
    """`function`, where the default device is an NVIDIA GPU; elsewhere it raises NotImplementedError."""

    def implementation(*args, **kwargs):
        if not is_on_gpu():
            raise NotImplementedError(f"it needs an NVIDIA GPU, and the default device is of platform {_platform()!r}")
        return function(*args, **kwargs)

    return implementation


def compute_capability() -> str | None:
    """Of the default device, as "9.0"; None where it is no NVIDIA GPU."""
    device = jax.config.jax_default_device
    if device is None or isinstance(device, str):
        device = jax.devices(device)[0]
    return getattr(device, "compute_capability", None)


def on_gpu_of(capability: str, function: Callable) -> Callable:
    """`on_gpu(function)`, for devices of one compute capability alone."""

    def implementation(*args, **kwargs):
        if compute_capability() != capability:
            raise NotImplementedError(f"it is for compute capability {capability}, not {compute_capability()}")
        return function(*args, **kwargs)

    return on_gpu(implementation)


def without(option: str, function: Callable) -> Callable:
    """A function that makes nothing of an option of its op: of what is `ahead`, which a product may fetch, of `parts`,
    which it may return, of a `call` of attention."""

    def implementation(*args, **kwargs):
        return function(*args, **{name: value for name, value in kwargs.items() if name != option})

    return implementation


def of_plain(product: Callable) -> Callable:
    """A product that reads x as it is, and returns results so."""

    def implementation(x, *args, ordered: Any = None, **kwargs):
        return product(plain(x), *args, **kwargs)

    return implementation


_OPS: dict[str, dict[str, Callable]] = {
    "dequantize_nf4": {"triton": on_gpu(nf4.dequantize_nf4), "reference": reference.dequantize_nf4},
    "merge_nf4": {
        "triton16": on_gpu(nf4_merge16.merge_nf4),
        "triton": on_gpu(nf4_merge.merge_nf4),
        "reference": reference.merge_nf4,
    },
    "matmul_nf4": {
        "triton": on_gpu(of_plain(without("parts", without("ahead", nf4_matmul.matmul_nf4)))),
        "triton_float8": on_gpu_of("9.0", nf4_matmul_float8.matmul_nf4),
        "triton_wgmma": on_gpu_of("9.0", nf4_matmul_wgmma.matmul_nf4),
        "triton_tiles": on_gpu(of_plain(without("ahead", nf4_matmul_tiles.matmul_nf4))),
        "reference": without("ahead", reference.matmul_nf4),
    },
    "matmul_dense": {"triton": on_gpu(dense_matmul.matmul_dense), "reference": reference.matmul_dense},
    "residual_norm": {
        "triton": on_gpu(norm.residual_norm),
        "triton_many": on_gpu(rms_norm.residual_norm),
        "reference": norm.residual_norm_reference,
    },
    "gated": {"triton": on_gpu(gating.gated), "reference": gating.gated_reference},
    "gated_backward": {"triton": on_gpu(gating.gated_backward), "reference": gating.gated_backward_reference},
    "dropped_product": {
        "triton": on_gpu(dropping.dropped_product),
        "reference": dropping.dropped_product_reference,
    },
    "raised_onto": {"triton": on_gpu(dropping.raised_onto), "reference": dropping.raised_onto_reference},
    "dropped_gradients": {
        "triton": on_gpu(dropping.dropped_gradients),
        "reference": dropping.dropped_gradients_reference,
    },
    "delta_states": {"triton": on_gpu(deltas.delta_states), "reference": deltas.delta_states_reference},
    "delta_states_backward": {
        "triton": on_gpu(deltas.delta_states_backward),
        "reference": deltas.delta_states_backward_reference,
    },
    "grouped_dot": {"triton": on_gpu(grouped_triton.grouped_dot), "reference": reference.grouped_dot},
    "grouped_dot_nf4": {"triton": on_gpu(grouped_nf4.grouped_dot_nf4), "reference": reference.grouped_dot_nf4},
    "grouped_outer": {"triton": on_gpu(grouped_triton.grouped_outer), "reference": reference.grouped_outer},
    "decode_attention": {
        "triton": on_gpu(decoding.decode_attention),
        "reference": decoding.decode_attention_reference,
    },
    "attention": {
        "cudnn": on_gpu(attention_cudnn),
        "chunked": without("call", attention_chunked),
        "reference": without("call", attention_reference),
    },
}

# Queries above which the scores of a whole row are no longer made at once where there is no flash kernel.
LONGEST_REFERENCE_ATTENTION = 1024


def dequantize_nf4(
    codes: UInt8[Array, "..."],
    absmax: Float32[Array, "..."] | UInt8[Array, "..."],
    nested_absmax: Float32[Array, "..."] | None = None,
    offset: Float32[Array, "..."] | None = None,
    index: Int[Array, ""] | None = None,
    *,
    shape: tuple[int, ...],
    dtype: jax.typing.DTypeLike,
    implementation: Literal["triton", "reference"] | None = None,
) -> Float[Array, "..."]:
    """NF4 codes and their statistics -> an array of that shape and dtype, or with an index those of a layer of a stack.
    See `reference.dequantize_nf4`.

    Every implementation gives the same bits.
    """
    args = codes, absmax, nested_absmax, offset, index

    def dequantize(*fields, shape, **more):
        return dispatch("dequantize_nf4", _OPS["dequantize_nf4"], implementation, *fields, shape=shape, dtype=dtype)

    if codes.ndim == len(shape) == 2 and nf4_shards.is_on_mesh():
        of_merging = lambda *args, **more: dequantize(*args[:4], **more)
        return nf4_shards.merge_shards(of_merging, *args, *[None] * 4, shape=shape)
    return dequantize(*args, shape=shape)


def merge_nf4(
    codes: UInt8[Array, "..."],
    absmax: Float32[Array, "..."] | UInt8[Array, "..."],
    nested_absmax: Float32[Array, "..."] | None = None,
    offset: Float32[Array, "..."] | None = None,
    index: Int[Array, ""] | None = None,
    a: Float[Array, "r d_in"] | None = None,
    b: Float[Array, "d_out r"] | None = None,
    inverse: Float32[Array, ""] | None = None,
    gain: Float32[Array, " d_out"] | None = None,
    *,
    shape: tuple[int, int],
    dtype: jax.typing.DTypeLike,
    transposed: bool = False,
    implementation: Literal["triton16", "triton", "reference"] | None = None,
) -> Float[Array, "d0 d1"]:
    """An NF4 weight, perhaps one of a stack, its rows times a gain each, with b a added: [out, in], or [in, out]. See
    `reference.merge_nf4`.

    "triton16" is made for large weights of 16 bits, [out, in], with an adapter of at most `nf4_merge16.MOST_RANKS`.
    """
    args = codes, absmax, nested_absmax, offset, index, a, b, inverse, gain

    def merge(*args, **options):
        return dispatch("merge_nf4", _OPS["merge_nf4"], implementation, *args, dtype=dtype, **options)

    if codes.ndim == 2 + (index is not None) and nf4_shards.is_on_mesh():
        return nf4_shards.merge_shards(merge, *args, shape=shape, transposed=transposed)
    return merge(*args, shape=shape, transposed=transposed)


def matmul_nf4(
    x: Float[Array, "m d_in"] | Ordered,
    weights: Sequence[reference.NF4Fields],
    *,
    shapes: Sequence[tuple[int, int]],
    norm: reference.InputNorm | None = None,
    act: str | None = None,
    residual: reference.Residual | None = None,
    parts: Any = False,
    ordered: Any = None,
    ahead: Sequence[Ahead] = (),
    implementation: Literal["triton", "triton_float8", "triton_wgmma", "triton_tiles", "reference"] | None = None,
) -> list[Any]:
    """x [M, in] times each of some NF4 weights [out, in], perhaps ones of stacks, and what stands around the products:
    a norm of x before, act(gate) * up and a residual stream after. See `reference.matmul_nf4`.

    Made for few tokens: "triton" takes at most `nf4_matmul.MOST_TOKENS`, "triton_tiles" `nf4_matmul_tiles.MOST_TOKENS`,
    and the products alone; "triton_wgmma" as many, and `act`, on compute capability 9.0.
    With `parts` products whose k they divide are `Parts`, of that dtype if it is one; with `ordered`, a dtype, a result
    of "triton_wgmma" with `act` may be `Ordered`, in which that alone reads x without a launch before. "triton_float8"
    takes `Ordered` float8 alone, and with `ordered` float8 makes it. These two fetch what is `ahead` (`begins_with`).
    """
    options = dict(shapes=shapes, norm=norm, act=act, residual=residual, parts=parts, ordered=ordered, ahead=ahead)
    return _in_parts(dispatch("matmul_nf4", _OPS["matmul_nf4"], implementation, x, weights, **options), x.dtype)


def _in_parts(ys: list, dtype: Any) -> list:
    """Products [M, out], or [P, M, out] of which the parts are to be added up, as what says so."""
    return [Parts(y, dtype) if len(y.shape) == 3 else y for y in ys]


def adds_residual(x: Any, weights: Sequence[reference.NF4Fields], *, shapes: Sequence[tuple[int, int]]) -> bool:
    """Whether "triton" of `matmul_nf4` takes these here, x perhaps as a `jax.ShapeDtypeStruct`, with a residual."""
    try:
        on_gpu(nf4_matmul.check)(x, weights, shapes, nf4_matmul.MOST_TOKENS)
    except NotImplementedError:
        return False
    return True


def ordered_dtype(
    x: Any, weights: Sequence[reference.NF4Fields], *, shapes: Sequence[tuple[int, int]], float8: bool = False
) -> Any:
    """The dtype in which who makes x, perhaps a `jax.ShapeDtypeStruct`, may make it `Ordered`, since "triton_wgmma" of
    `matmul_nf4` is what multiplies these here, and in whole steps; else None. With `float8` that dtype, where
    "triton_float8" can.
    """
    tokens, columns = x.shape
    if tokens <= nf4_matmul.MOST_TOKENS or columns % STEP:
        return None
    try:
        on_gpu_of("9.0", nf4_matmul.check)(x, weights, shapes, nf4_matmul_wgmma.MOST_TOKENS)
    except NotImplementedError:
        return None
    return FLOAT8 if float8 and nf4_matmul_float8.takes(weights, columns) else x.dtype


def begins_with(
    tokens: int, weights: Sequence[reference.NF4Fields], *, shapes: Sequence[tuple[int, int]], is_gated: bool = False
) -> list[Ahead]:
    """What `matmul_nf4` of so many tokens first reads of weights, for the product before it to fetch; nothing where
    neither "triton_float8" nor "triton_wgmma" multiplies."""
    x = jax.ShapeDtypeStruct((tokens, shapes[0][1]), jnp.bfloat16)
    if ordered_dtype(x, weights, shapes=shapes, float8=True) is None:
        return []
    return nf4_matmul_wgmma.begins_with(tokens, weights, shapes, is_gated=is_gated)


def matmul_dense(
    x: Float[Array, "m d_in"],
    weights: Sequence[reference.DenseFields],
    *,
    parts: bool = False,
    implementation: Literal["triton", "reference"] | None = None,
) -> list[Any]:
    """x [M, in] times each of some dense weights [out, in], perhaps ones of stacks. See `reference.matmul_dense`.

    Made for few tokens: "triton" takes at most `dense_matmul.MOST_TOKENS`. With `parts` products whose k it divides are
    `Parts`.
    """
    return _in_parts(dispatch("matmul_dense", _OPS["matmul_dense"], implementation, x, weights, parts=parts), x.dtype)


def residual_norm(
    x: Float[Array, "*batch d"],
    y: Float[Array, "*batch d"] | Parts | None,
    weight: Float[Array, "..."],
    index: Int[Array, ""] | None = None,
    *,
    eps: float,
    offset: float = 0.0,
    multiplier: float = 1.0,
    ordered: Any = None,
    implementation: Literal["triton", "triton_many", "reference"] | None = None,
) -> tuple[Float[Array, "*batch d"], Any]:
    """(x + multiplier * y, its RMS norm), or of x alone. See `residual_norm.residual_norm_reference`.

    Made for few tokens is "triton", at most `residual_norm.MOST_TOKENS`; for at least `rms_norm.LEAST_TOKENS`, and
    their gradients, "triton_many". With `ordered`, a dtype, the norm of few tokens may be `Ordered`.
    """
    options = dict(eps=eps, offset=offset, multiplier=multiplier, ordered=ordered)
    return dispatch("residual_norm", _OPS["residual_norm"], implementation, x, y, weight, index, **options)


def gated(
    gate: Float[Array, "*shape"],
    up: Float[Array, "*shape"],
    act: str,
    *,
    implementation: Literal["triton", "reference"] | None = None,
) -> Float[Array, "*shape"]:
    """act(gate) * up. See `gated.gated_reference`."""
    return dispatch("gated", _OPS["gated"], implementation, gate, up, act)


def gated_backward(
    gate: Float[Array, "*shape"],
    up: Float[Array, "*shape"],
    dout: Float[Array, "*shape"],
    act: str,
    *,
    implementation: Literal["triton", "reference"] | None = None,
) -> tuple[Float[Array, "*shape"], Float[Array, "*shape"], Float[Array, "*shape"]]:
    """act(gate) * up, and its gradients by both. See `gated.gated_backward_reference`."""
    return dispatch("gated_backward", _OPS["gated_backward"], implementation, gate, up, dout, act)


def delta_states(
    lookups: Float[Array, "k m c n"],
    query: Float[Array, "k q c n"],
    key: Float[Array, "k m c n"],
    fresh: Float32[Array, "k m c p"],
    left: Float32[Array, "k m"],
    state: Float32[Array, "m n p"],
    *,
    implementation: Literal["triton", "reference"] | None = None,
) -> tuple[Float32[Array, "k m c p"], Float32[Array, "k m c p"], Float[Array, "k m n p"], Float32[Array, "m n p"]]:
    """States of the gated delta rule, chunk after chunk. See `delta_states.delta_states_reference`."""
    return dispatch("delta_states", _OPS["delta_states"], implementation, lookups, query, key, fresh, left, state)


def delta_states_backward(
    lookups: Float[Array, "k m c n"],
    query: Float[Array, "k q c n"],
    key: Float[Array, "k m c n"],
    left: Float32[Array, "k m"],
    of_read: Float32[Array, "k m c p"],
    of_delta: Float32[Array, "k m c p"],
    of_last: Float32[Array, "m n p"],
    *,
    implementation: Literal["triton", "reference"] | None = None,
) -> tuple[Float32[Array, "k m c p"], Float[Array, "k m n p"], Float32[Array, "m n p"]]:
    """Their gradients, chunk before chunk. See `delta_states.delta_states_backward_reference`."""
    operands = lookups, query, key, left, of_read, of_delta, of_last
    return dispatch("delta_states_backward", _OPS["delta_states_backward"], implementation, *operands)


def dropped_product(
    x: Float[Array, "*rows d"],
    bits: UInt8[Array, "*rows bytes"],
    a: Float[Array, "r d"],
    rate: float,
    *,
    implementation: Literal["triton", "reference"] | None = None,
) -> Float32[Array, "*rows r"]:
    """dropout(x) a^T, of the bits of `dropout.kept_bits`. See `dropped_product.dropped_product_reference`."""
    return dispatch("dropped_product", _OPS["dropped_product"], implementation, x, bits, a, rate)


def raised_onto(
    y: Float[Array, "*rows n"],
    z: Float[Array, "*rows r"],
    b: Float[Array, "n r"],
    *,
    implementation: Literal["triton", "reference"] | None = None,
) -> Float[Array, "*rows n"]:
    """y + z b^T, where y lies. See `dropped_product.raised_onto_reference`."""
    return dispatch("raised_onto", _OPS["raised_onto"], implementation, y, z, b)


def dropped_gradients(
    x: Float[Array, "*rows d"],
    bits: UInt8[Array, "*rows bytes"],
    a: Float[Array, "r d"],
    dz: Float[Array, "*rows r"],
    rate: float,
    *,
    implementation: Literal["triton", "reference"] | None = None,
) -> tuple[Float[Array, "*rows d"], Float32[Array, "r d"]]:
    """Its gradients by x and a. See `dropped_product.dropped_gradients_reference`."""
    return dispatch("dropped_gradients", _OPS["dropped_gradients"], implementation, x, bits, a, dz, rate)


def grouped_dot(
    x: Float[Array, "n d_in"],
    w: Float[Array, "g d0 d1"],
    sizes: Int[Array, " g"],
    contracted: int,
    dtype: Any = None,
    *,
    implementation: Literal["triton", "reference"] | None = None,
) -> Float[Array, "n d_out"]:
    """Rows sorted by group, each times its group's matrix. See `reference.grouped_dot`."""
    return dispatch("grouped_dot", _OPS["grouped_dot"], implementation, x, w, sizes, contracted, dtype)


def grouped_dot_nf4(
    x: Float[Array, "n d_in"],
    fields: reference.NF4Fields,
    sizes: Int[Array, " g"],
    contracted: int,
    *,
    shape: tuple[int, int],
    implementation: Literal["triton", "reference"] | None = None,
) -> Float[Array, "n d_out"]:
    """Few rows sorted by group, each times its group's NF4 matrix. See `reference.grouped_dot_nf4`."""
    return dispatch(
        "grouped_dot_nf4", _OPS["grouped_dot_nf4"], implementation, x, fields, sizes, contracted, shape=shape
    )


def grouped_outer(
    x: Float[Array, "n d0"],
    y: Float[Array, "n d1"],
    sizes: Int[Array, " g"],
    dtype: Any = None,
    *,
    implementation: Literal["triton", "reference"] | None = None,
) -> Float[Array, "g d0 d1"]:
    """The sum of the outer products of each group's rows. See `reference.grouped_outer`."""
    return dispatch("grouped_outer", _OPS["grouped_outer"], implementation, x, y, sizes, dtype)


def attention(
    q: Float[Array, "b t n h"],
    k: Float[Array, "b s kv h"],
    v: Float[Array, "b s kv h"],
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    key_bias: Float[Array, "b n s"] | None = None,
    sinks: Float[Array, " n"] | None = None,
    query_segments: Int[Array, "b t"] | None = None,
    key_segments: Int[Array, "b s"] | None = None,
    offset: int | Int[Array, "*b"] = 0,
    call: int = 0,
    implementation: Literal["cudnn", "chunked", "reference"] | None = None,
) -> Float[Array, "b t n h"]:
    """Causal attention, q [B, T, N, H] over k, v [B, S, K, H] -> [B, T, N, H]. See the head of `kernels.attention`.

    `call` changes nothing of the result. Where a program attends more than once and is to run under
    `--xla_gpu_deterministic_ops`, it is to be another number each time (the head of `kernels.attention` says why).

    Without a name it is cuDNN where that serves, else chunks for more than `LONGEST_REFERENCE_ATTENTION` queries.
    """
    table = _OPS["attention"]
    if implementation is None and q.shape[1] <= LONGEST_REFERENCE_ATTENTION:
        table = {name: function for name, function in table.items() if name != "chunked"}
    return dispatch(
        "attention",
        table,
        implementation,
        q,
        k,
        v,
        scale=scale,
        window=window,
        softcap=softcap,
        key_bias=key_bias,
        sinks=sinks,
        query_segments=query_segments,
        key_segments=key_segments,
        offset=offset,
        call=call,
    )


def decode_attention(
    q: Float[Array, "b n h"] | Parts,
    k: Float[Array, "b kv h"] | Parts,
    v: Float[Array, "b kv h"] | Parts,
    keys: Float[Array, "layers b s kv h"],
    values: Float[Array, "layers b s kv h"],
    layer: Int[Array, ""],
    *,
    rotary: decoding.Rotary | None = None,
    interleaved: bool = False,
    scale: float,
    offset: Int[Array, "*b"],
    window: int | None = None,
    softcap: float | None = None,
    key_bias: Float[Array, "b n s"] | None = None,
    sinks: Float[Array, " n"] | None = None,
    segments: Int[Array, "b s"],
    ordered: Any = None,
    implementation: Literal["triton", "reference"] | None = None,
) -> tuple[Any, Float[Array, "layers b s kv h"], Float[Array, "layers b s kv h"]]:
    """Attention of one token a row, [B, N, H], over a layer of a stacked cache, and the stacks with that token's key
    and value. `rotary` turns q and k. With `ordered` the result may be `Ordered` [B, N H]. See
    `kernels.decode_attention`."""
    options = dict(scale=scale, offset=offset, window=window, softcap=softcap, key_bias=key_bias, sinks=sinks)
    options |= dict(rotary=rotary, interleaved=interleaved, segments=segments, ordered=ordered)
    table = _OPS["decode_attention"]
    return dispatch("decode_attention", table, implementation, q, k, v, keys, values, layer, **options)
