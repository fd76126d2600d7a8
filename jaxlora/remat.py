"""What a layer keeps for its backward pass, by name. What it does not keep, it computes again.

| policy | kept per layer | bytes per token and layer in 16 bits |
| --- | --- | --- |
| "none" | everything that autodiff asks for | 4 to 6 times "projections" |
| "projections" | results of attention and of q, k, v, gate and up | 2 (2 D + 2 Q + 2 K + 2 F) |
| "attention" | results of attention, and the residual after it | 2 (2 D + Q) |
| "full" | the layer's input | 2 D |
| "offload" | the layer's input, in pinned host memory | 2 D, on the host |
| "offload_attention" | the layer's input and the results of attention, in pinned host memory | 2 (D + Q), on the host |

D is the hidden size, Q and K the widths of the query and key projections, F the MLP's. The results of attention are its
output and, with a flash kernel, the softmax statistics (4 bytes a head and token), so that attention is not run again.

The policies that keep little also cut the MLP into tiles of tokens (`mlp_tile`, arXiv:2506.13996 section 3.1): its
intermediates, the widest arrays of a layer, then exist for one tile at a time. It costs no product more, since the
tile's backward pass computes again what the layer's would have.

`use_gradient_checkpointing` takes these names and the reference's values: False is "none", True is "full", "unsloth" is
"offload". The model marks values with `jax.ad_checkpoint.checkpoint_name`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Literal

import jax

# cuDNN's forward pass, whose outputs are the attention output and the softmax statistics. Only a primitive's name
# reaches the statistics: they live inside the custom vjp that jax wraps around the kernel.
_FLASH = "dot_product_attention_fwd_wrapper"


@dataclasses.dataclass(frozen=True)
class Policy:
    """saved, offloaded: names of values kept on the device or the host. flash: what becomes of a flash kernel's
    results. mlp_tile: tokens of an MLP tile; None for no tiles. rematerialise: False keeps everything."""

    saved: tuple[str, ...] = ()
    offloaded: tuple[str, ...] = ()
    flash: Literal["recompute", "save", "offload"] = "recompute"
    mlp_tile: int | None = None
    rematerialise: bool = True


POLICIES: dict[str, Policy] = {
    "none": Policy(rematerialise=False),
    "projections": Policy(saved=("query", "key", "value", "attention_output", "residual", "gate", "up"), flash="save"),
    "attention": Policy(saved=("attention_output", "residual"), flash="save"),
    "full": Policy(mlp_tile=4096),
    "offload": Policy(offloaded=("layer_input",), mlp_tile=2048),
    "offload_attention": Policy(offloaded=("layer_input", "attention_output"), flash="offload", mlp_tile=2048),
}
# Tokens of a tile where the policy has none and `unsloth_tiled_mlp` asks for tiles.
_ASKED_TILE = 2048
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


def mlp_tile(name: str, asked: bool = False) -> int | None:
    """Tokens of an MLP tile under the policy of this name, None for no tiles; `asked` wants some in any case."""
    return POLICIES[name].mlp_tile or (_ASKED_TILE if asked else None)


def checkpoint(body: Callable, name: str) -> Callable:
    """Wrap the body of a scan over layers so that it keeps what the policy of this name says.

    `prevent_cse=False` is right inside a scan only: the loop itself keeps XLA from undoing the recomputation.

    Raises:
        ValueError: there is no policy of that name.
    """
    if name not in POLICIES:
        raise ValueError(f"remat policy {name!r} is not one of {', '.join(POLICIES)}")
    policy = POLICIES[name]
    if not policy.rematerialise:
        return body
    by_name = jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=list(policy.saved),
        names_which_can_be_offloaded=list(policy.offloaded),
        offload_src="device",
        offload_dst="pinned_host",
    )
    offload = jax.checkpoint_policies.offload_dot_with_no_batch_dims("device", "pinned_host")

    def keep(primitive, *avals, **params):
        if primitive.name == _FLASH and policy.flash == "save":
            return True
        if primitive.name == _FLASH and policy.flash == "offload":
            # The public way to the answer "offload" is the policy that gives it for a product without batch dimensions.
            product = (((0,), (0,)), ((), ()))
            return offload(jax.lax.dot_general_p, *avals, dimension_numbers=product)
        return by_name(primitive, *avals, **params)

    return jax.checkpoint(body, policy=keep, prevent_cse=False)


def over_tiles(function: Callable, x: jax.Array, tile: int | None) -> jax.Array:
    """`function(rows, index)` over x [B, T, D] a tile of tokens at a time, each computed again for its gradient.

    `function` takes [tokens, D] and the tile's number and must treat tokens alike. With no tile, or no more tokens than
    one, it is called once.
    """
    tokens = x.shape[0] * x.shape[1]
    rows = x.reshape(tokens, x.shape[2])
    if tile is None or tokens <= tile:
        return function(rows, 0).reshape(*x.shape[:2], -1)
    count = -(-tokens // tile)
    size = -(-tokens // count)
    padded = jax.numpy.pad(rows, ((0, count * size - tokens), (0, 0))).reshape(count, size, -1)
    one = jax.checkpoint(lambda inputs: function(*inputs), prevent_cse=False)
    out = jax.lax.map(one, (padded, jax.numpy.arange(count)))
    return out.reshape(count * size, -1)[:tokens].reshape(*x.shape[:2], -1)
