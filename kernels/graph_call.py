"""`jax_triton.triton_call` for kernels that XLA may put into a CUDA graph.

XLA launches what it can in CUDA graphs, and leaves a graph for a custom call that does not say that it may be captured.
jax-triton 0.3.1 calls kernels by the older of jaxlib's two handlers, which says nothing: every kernel of a decode step
was a launch of its own. The newer one (`TARGET`; jaxlib's `triton_kernels.cc`) does say so, reads the same description
of a kernel, and loads it before the program runs. So this calls that one with what jax-triton writes for the other.
Then a whole decode step is one graph, in which a kernel starts sooner after the last and small ones run side by side.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax

TARGET = "triton_kernel_call_ffi"


def triton_call(
    *arrays: jax.Array,
    kernel: Any,
    out_shape: jax.ShapeDtypeStruct | Sequence[jax.ShapeDtypeStruct],
    input_output_aliases: dict[int, int] | None = None,
    **options: Any,
) -> Any:
    """`jax_triton.triton_call` of arrays alone, with options that are hashable.

    The kernel is compiled for the default device, an NVIDIA GPU, while this is traced. It may not be vmapped.

    Raises:
      ImportError: jax-triton is not installed.
    """
    is_one = not isinstance(out_shape, Sequence)
    outs = [out_shape] if is_one else out_shape
    described = _described(
        tuple((array.shape, array.dtype) for array in arrays),
        tuple((out.shape, out.dtype) for out in outs),
        kernel,
        tuple(sorted((input_output_aliases or {}).items())),
        tuple(sorted(options.items())),
    )
    call = jax.ffi.ffi_call(TARGET, outs, input_output_aliases=input_output_aliases)
    results = call(*arrays, opaque=described)
    return results[0] if is_one else results


@functools.cache
def _described(inputs, outs, kernel, aliases, options) -> bytes:
    """What jaxlib's handlers read: the kernel, compiled, its grid and parameters."""
    import jax_triton

    def call(*arrays):
        return jax_triton.triton_call(
            *arrays,
            kernel=kernel,
            out_shape=[jax.ShapeDtypeStruct(*out) for out in outs],
            input_output_aliases=dict(aliases),
            **dict(options),
        )

    lowered = jax.jit(call).trace(*(jax.ShapeDtypeStruct(*each) for each in inputs)).lower(lowering_platforms=("cuda",))
    calls = [op for op in _operations(lowered.compiler_ir("stablehlo").operation) if op.name == "stablehlo.custom_call"]
    [config] = [op.attributes["backend_config"] for op in calls]
    return config.value_bytes


def _operations(operation):
    """An operation of a program and all that are in it."""
    yield operation
    for region in operation.regions:
        for block in region:
            for inner in block:
                yield from _operations(inner.operation)
