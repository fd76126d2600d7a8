"""Activations, and what an MLP's gate makes of it (arXiv:2002.05202), the latter as a Triton kernel each way.

    h = act(gate) * up        dgate = dh * up * act'(gate)        dup = dh * act(gate)

An activation is computed in float32 and rounded once, as in torch; so are its derivative and every product. In 16 bits
each operation of an exponential or a tanh would round.

The trade. All of it is traffic: forward reads two arrays and writes one, backward reads three and writes two. XLA makes
two to four kernels of the backward pass, since each of its results goes to a product of its own: by their times, a tile
of an MLP moved 17 arrays, where these move 8. A step of an 8B spends as long on that as on dequantising its weights.
Where h is computed again for the product that reads it, the backward pass writes it as well, for it has read all that h
is made of: 6 arrays, not 5 and 3.
"""

import functools
from collections.abc import Callable
from typing import no_type_check

import jax
import jax.numpy as jnp
from jax.experimental.custom_partitioning import custom_partitioning
from jaxtyping import Array, Float

from jaxlora.kernels.graph_call import triton_call

BLOCK = 2048  # elements of a program
FEW = 64  # tokens of a decode step
NUM_WARPS = 4


def _in_float32(function: Callable) -> Callable:
    return lambda x: function(x.astype(jnp.float32)).astype(x.dtype)


ACTIVATIONS: dict[str, Callable] = {
    "silu": _in_float32(jax.nn.silu),
    "gelu": _in_float32(functools.partial(jax.nn.gelu, approximate=False)),
    "gelu_pytorch_tanh": _in_float32(functools.partial(jax.nn.gelu, approximate=True)),
    "relu": jax.nn.relu,
}


def gated_reference(gate: Float[Array, "*shape"], up: Float[Array, "*shape"], act: str) -> Float[Array, "*shape"]:
    """act(gate) * up, in their dtype.

    Args:
      gate, up: of one shape and dtype.
      act: a key of `ACTIVATIONS`.
    """
    return ACTIVATIONS[act](gate) * up


def gated_backward_reference(
    gate: Float[Array, "*shape"], up: Float[Array, "*shape"], dout: Float[Array, "*shape"], act: str
) -> tuple[Float[Array, "*shape"], Float[Array, "*shape"], Float[Array, "*shape"]]:
    """(act(gate) * up, its gradients by gate and by up), in their dtype.

    Args:
      gate, up, dout: of one shape and dtype. dout: the gradient by the first.
      act: a key of `ACTIVATIONS`.
    """
    out, pullback = jax.vjp(functools.partial(gated_reference, act=act), gate, up)
    return out, *pullback(dout)


@functools.cache
@no_type_check  # a type checker's wrapper around the function would hide its source from Triton
def activation_kernel():
    """The Triton function of an activation and its derivative. Built on first use, as `_kernels`."""
    import triton
    import triton.language as tl

    @triton.jit
    def activation(x, ACT: tl.constexpr):
        """(act(x), act'(x)) of float32."""
        if ACT == "silu":
            s = tl.sigmoid(x)
            return x * s, s * (1.0 + x * (1.0 - s))
        if ACT == "gelu":
            cdf = 0.5 + 0.5 * tl.erf(x * 0.7071067811865476)
            return x * cdf, cdf + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
        if ACT == "gelu_pytorch_tanh":  # 0.5 (1 + tanh(z)) is sigmoid(2 z)
            s = tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
            return x * s, s + x * s * (1.0 - s) * 1.5957691216057308 * (1.0 + 0.134145 * x * x)
        positive = (x > 0.0).to(tl.float32)
        return x * positive, positive

    return activation


@functools.cache
@no_type_check  # a type checker's wrapper around the function would hide its source from Triton
def _kernels():
    """The Triton functions (forward, backward, backward and forward), built on first use: the library imports where
    Triton is missing."""
    import triton
    import triton.language as tl

    activation = activation_kernel()

    @triton.jit
    def places(count, BLOCK: tl.constexpr):
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        return at, at < count

    @triton.jit
    def gated(gate, up, out, COUNT: tl.constexpr, ACT: tl.constexpr, BLOCK: tl.constexpr):
        at, inside = places(COUNT, BLOCK)
        u = tl.load(up + at, mask=inside)
        value, _ = activation(tl.load(gate + at, mask=inside).to(tl.float32), ACT)
        tl.store(out + at, (value.to(u.dtype).to(tl.float32) * u.to(tl.float32)).to(u.dtype), mask=inside)

    @triton.jit
    def gradients(gate, up, dout, at, inside, ACT: tl.constexpr):
        """(act(gate) * up, dgate, dup)."""
        u = tl.load(up + at, mask=inside)
        d = tl.load(dout + at, mask=inside).to(tl.float32)
        value, slope = activation(tl.load(gate + at, mask=inside).to(tl.float32), ACT)
        value = value.to(u.dtype).to(tl.float32)
        wide = u.to(tl.float32)
        dvalue = (d * wide).to(u.dtype).to(tl.float32)
        return (value * wide).to(u.dtype), (dvalue * slope).to(u.dtype), (d * value).to(u.dtype)

    @triton.jit
    def gated_backward(gate, up, dout, dgate, dup, COUNT: tl.constexpr, ACT: tl.constexpr, BLOCK: tl.constexpr):
        at, inside = places(COUNT, BLOCK)
        _, by_gate, by_up = gradients(gate, up, dout, at, inside, ACT)
        tl.store(dgate + at, by_gate, mask=inside)
        tl.store(dup + at, by_up, mask=inside)

    @triton.jit
    def gated_both(gate, up, dout, out, dgate, dup, COUNT: tl.constexpr, ACT: tl.constexpr, BLOCK: tl.constexpr):
        at, inside = places(COUNT, BLOCK)
        product, by_gate, by_up = gradients(gate, up, dout, at, inside, ACT)
        tl.store(out + at, product, mask=inside)
        tl.store(dgate + at, by_gate, mask=inside)
        tl.store(dup + at, by_up, mask=inside)

    return gated, gated_backward, gated_both


def sharded_alike(function: Callable, inputs: int, outputs: int) -> Callable:
    """An elementwise function of so many arrays of one shape, with so many results, of each device's shard by itself.

    XLA does not know that of a kernel: it would gather whole arrays on every device first.
    """
    partitioned = custom_partitioning(function)

    def partition(mesh, operands, results):
        sharding = results[0].sharding
        return mesh, function, (sharding,) * outputs, (sharding,) * inputs

    rule = f"{', '.join(['... i'] * inputs)} -> {', '.join(['... i'] * outputs)}"
    partitioned.def_partition(partition=partition, sharding_rule=rule)
    return partitioned


def _checked(*arrays: Float[Array, "*shape"]) -> None:
    """Refuse what the kernels do not take.

    Raises:
      NotImplementedError: jax-triton is not installed, or the arrays are not all bfloat16 or all float16.
    """
    names = [array.dtype.name for array in arrays]
    if names[0] not in ("bfloat16", "float16") or len({*names}) > 1:
        raise NotImplementedError(f"the kernel takes bfloat16 or float16, gate and up alike, not {' and '.join(names)}")
    try:
        import jax_triton  # noqa: F401
    except ImportError as error:
        raise NotImplementedError(f"the kernel needs jax-triton and triton ({error})") from error


def _launcher(kernel: Callable, act: str, inputs: int, outputs: int) -> Callable:
    """The kernel as a function of so many arrays with so many results."""
    import jax_triton

    def launch(*arrays):
        like = jax.ShapeDtypeStruct(arrays[0].shape, arrays[0].dtype)
        # In training it is called as it was measured: by itself, between what is copied meanwhile.
        is_few = like.size <= FEW * like.shape[-1]
        outs = (triton_call if is_few else jax_triton.triton_call)(
            *arrays,
            kernel=kernel,
            out_shape=[like] * outputs,
            grid=(-(-like.size // BLOCK),),
            num_warps=NUM_WARPS,
            COUNT=like.size,
            ACT=act,
            BLOCK=BLOCK,
        )
        return tuple(outs)

    batched = jax.custom_batching.custom_vmap(sharded_alike(launch, inputs, outputs))

    @batched.def_vmap
    def _(axis_size, in_batched, *arrays):
        wide = [
            array if is_batched else jnp.broadcast_to(array, (axis_size, *array.shape))
            for array, is_batched in zip(arrays, in_batched, strict=True)
        ]
        return batched(*wide), (True,) * outputs

    return batched


def gated(gate: Float[Array, "*shape"], up: Float[Array, "*shape"], act: str) -> Float[Array, "*shape"]:
    """`gated_reference` and its gradients, each as a Triton kernel, with the roundings of the reference.

    Raises:
      NotImplementedError: jax-triton is not installed, or the arrays are not both bfloat16 or both float16.
    """
    _checked(gate, up)
    forward_kernel, backward_kernel, _ = _kernels()
    forward, backward = _launcher(forward_kernel, act, 2, 1), _launcher(backward_kernel, act, 3, 2)

    @jax.custom_vjp
    def product(gate, up):
        return forward(gate, up)[0]

    product.defvjp(lambda gate, up: (product(gate, up), (gate, up)), lambda saved, dout: backward(*saved, dout))
    return product(gate, up)


def gated_backward(
    gate: Float[Array, "*shape"], up: Float[Array, "*shape"], dout: Float[Array, "*shape"], act: str
) -> tuple[Float[Array, "*shape"], Float[Array, "*shape"], Float[Array, "*shape"]]:
    """`gated_backward_reference` as one Triton kernel, with its roundings.

    Raises:
      NotImplementedError: jax-triton is not installed, or the arrays are not all bfloat16 or all float16.
    """
    _checked(gate, up, dout)
    return _launcher(_kernels()[2], act, 3, 3)(gate, up, dout)
