"""How PEFT keeps adapters on parameters of experts (`target_parameters`).

Of E experts A is one matrix [E r, in], with the rows of an expert together, and B is [out, r E], with the columns of a
rank together. They are named after the module that has the parameter, since PEFT wraps that: once for each parameter,
so that what it wrapped first is the ".base_layer" of the other.

Before 0.19.1 PEFT took every parameter for [E, in, out]. Most are [E, out, in], so A was [E r, out] and B [in, r E]
there; gpt-oss's are what it took them for.
"""

from __future__ import annotations

import re
from collections.abc import Collection

import numpy as np
from jaxtyping import Float

from jaxlora.converters.huggingface import CheckpointError
from jaxlora.moe import ExpertAdapter

LAYOUT_VERSION = "0.19.1"  # of PEFT, and what files of ours say, so that one can tell

_WRAPPED = ("gate_up_proj", "down_proj")  # in the order of transformers' modules, which is PEFT's


def wrapper_name(parameter: str, adapted: Collection[str]) -> str:
    """The path of the wrapper around the module of a parameter; `adapted` are the paths of all that have adapters."""
    module, own = parameter.rsplit(".", 1)
    later = _WRAPPED[_WRAPPED.index(own) + 1 :]
    return module + ".base_layer" * sum(f"{module}.{other}" in adapted for other in later)


def pack(
    a: Float[np.ndarray, "e r d_in"], b: Float[np.ndarray, "e d_out r"]
) -> tuple[Float[np.ndarray, "er d_in"], Float[np.ndarray, "d_out re"]]:
    """A and B of each expert as PEFT keeps them."""
    experts, out, rank = b.shape
    return a.reshape(experts * rank, -1), b.transpose(1, 2, 0).reshape(out, rank * experts)


def unpack(
    a: Float[np.ndarray, "er a_in"], b: Float[np.ndarray, "b_out re"], experts: int, *, older: bool = False
) -> tuple[Float[np.ndarray, "e r d_in"], Float[np.ndarray, "e d_out r"]]:
    """The inverse of `pack`; `older`: of the layout before 0.19.1, in which A and B have changed places."""
    of_a, of_b = a.reshape(experts, -1, a.shape[1]), b.reshape(b.shape[0], -1, experts).transpose(2, 0, 1)
    return (of_b.swapaxes(1, 2), of_a.swapaxes(1, 2)) if older else (of_a, of_b)


def sizes(node: ExpertAdapter, rank: int, *, older: bool) -> tuple[tuple[int, int], tuple[int, int]]:
    """The shapes of A and B in a file."""
    (experts,) = node.experts
    d_in, d_out = (node.out_features, node.in_features) if older else (node.in_features, node.out_features)
    return (experts * rank, d_in), (d_out, experts * rank)


def is_older(node: ExpertAdapter, shape: tuple[int, ...] | None, peft_version: str | None) -> bool:
    """Whether an adapter was written by a PEFT before 0.19.1. shape: that of A in the file; None if it is missing.

    Raises:
        CheckpointError: inputs and outputs are as many, so that only the version can tell, and there is none.
    """
    if node.in_out or shape is None:
        return False
    if node.in_features != node.out_features:
        return shape[-1] == node.out_features
    if peft_version is None:
        raise CheckpointError(
            f"the experts' inputs and outputs are as many, {node.in_features}, and without peft_version nothing says "
            f"which of A and B is which: write the version of PEFT that saved the adapter there ({LAYOUT_VERSION!r} if "
            'it was another program, "0.17.0" if it was a PEFT that wrote none)'
        )
    return _number(peft_version) < _number(LAYOUT_VERSION)


def _number(version: str) -> list[int]:
    return [int(part) for part in re.findall(r"\d+", version)[:3]]
