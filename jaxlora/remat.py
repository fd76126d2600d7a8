"""What a layer keeps for its backward pass, by name.

| policy | kept per layer | bytes per token and layer, bf16 |
| --- | --- | --- |
| "none" | everything that autodiff asks for | the most |
| "attention" | the input, the attention output, the residual after it | 2 * (2 * hidden + heads * head_dim) |
| "full" | the layer's input | 2 * hidden |
| "offload" | the layer's input, in pinned host memory | 2 * hidden, on the host |

`use_gradient_checkpointing` takes these names and the reference's values: False is "none", True is "full", "unsloth" is
"offload". Values are marked in the model with `jax.ad_checkpoint.checkpoint_name`: `layer_input`, `attention_output`,
`residual`.
"""

from __future__ import annotations

from collections.abc import Callable

import jax

POLICIES = ("none", "attention", "full", "offload")
_ALIASES = {False: "none", True: "full", "unsloth": "offload"}


def resolve(use_gradient_checkpointing: bool | str) -> str:
    """The policy's name for a value of `use_gradient_checkpointing`.

    Raises:
        ValueError: neither a policy nor one of False, True, "unsloth".
    """
    name = _ALIASES.get(use_gradient_checkpointing, use_gradient_checkpointing)
    if name not in POLICIES:
        raise ValueError(
            f"use_gradient_checkpointing={use_gradient_checkpointing!r} is not one of False, True, 'unsloth', "
            + ", ".join(map(repr, POLICIES))
        )
    return name


def checkpoint(body: Callable, policy: str) -> Callable:
    """Wrap the body of a scan over layers so that it keeps what `policy` names.

    `prevent_cse=False` is right inside a scan only: the loop itself keeps XLA from undoing the recomputation.
    """
    saved = jax.checkpoint_policies
    if policy == "none":
        return body
    if policy == "attention":
        keep = saved.save_only_these_names("attention_output", "residual")
    elif policy == "full":
        keep = saved.nothing_saveable
    elif policy == "offload":
        keep = saved.save_and_offload_only_these_names(
            names_which_can_be_saved=[],
            names_which_can_be_offloaded=["layer_input"],
            offload_src="device",
            offload_dst="pinned_host",
        )
    else:
        raise ValueError(f"remat policy {policy!r} is not one of {', '.join(POLICIES)}")
    return jax.checkpoint(body, policy=keep, prevent_cse=False)
