"""Kernels that may be captured in a CUDA graph, lowered for a GPU with a stand-in for jax-triton (not on a CPU)."""

import functools
import re
import sys
from types import ModuleType

import jax
import jax.numpy as jnp
import pytest

from jaxlora.kernels import graph_call

DESCRIPTION = "what jax-triton says of the kernel"


@pytest.fixture
def jax_triton(monkeypatch):
    """A module whose `triton_call` is lowered as jax-triton's is, to a custom call of the older kind; its calls."""
    module, calls = ModuleType("jax_triton"), []

    def triton_call(*arrays, out_shape, input_output_aliases, **options):
        calls.append(options)
        return jax.ffi.ffi_call(
            "triton_kernel_call",
            out_shape,
            input_output_aliases=input_output_aliases,
            custom_call_api_version=2,
            legacy_backend_config=DESCRIPTION,
        )(*arrays)

    module.triton_call = triton_call  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setitem(sys.modules, "jax_triton", module)
    graph_call._described.cache_clear()
    yield calls
    graph_call._described.cache_clear()


def lowered(function, *arrays) -> str:
    return jax.jit(function).trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()


def test_the_description_goes_to_the_handler_that_may_be_captured(jax_triton):
    out = jax.ShapeDtypeStruct((2, 3), jnp.float32)
    call = functools.partial(
        graph_call.triton_call, kernel="kernel", out_shape=[out, out], input_output_aliases={1: 0}, grid=(7,), N=3
    )

    def function(x, y):
        [a, b] = call(x, y)
        [c, _] = call(x, b)
        return a + c

    text = lowered(function, jnp.zeros((4,), jnp.int8), jnp.zeros((2, 3)))
    calls = re.findall(r"custom_call @(\w+)\(", text)
    assert calls == [graph_call.TARGET] * 2
    [first, _] = [line for line in text.splitlines() if "custom_call" in line]
    assert f'opaque = "{DESCRIPTION}"' in first
    assert "output_tuple_indices = [0], operand_index = 1" in first
    assert jax_triton == [dict(kernel="kernel", grid=(7,), N=3)]  # compiled once for both


def test_one_result_is_an_array(jax_triton):
    out = jax.ShapeDtypeStruct((5,), jnp.float16)
    function = functools.partial(graph_call.triton_call, kernel="kernel", out_shape=out)
    result = jax.eval_shape(function, jnp.zeros((2,)))
    assert (result.shape, result.dtype) == (out.shape, out.dtype)
