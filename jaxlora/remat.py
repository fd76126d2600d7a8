"""What a layer keeps for its backward pass, by name. What it does not keep, it computes again.

| policy | kept per layer | bytes per token and layer in 16 bits |
| --- | --- | --- |
| "none" | everything that autodiff asks for | 4 to 6 times "projections" |
| "projections" | results of attention and of q, k, v, gate and up | 2 (2 D + 2 Q + 2 K + 2 F) |
| "attention" | results of attention, and the residual after it | 2 (2 D + Q) |
| "full" | the layer's input | 2 D |
| "offload" | the layer's input, in pinned host memory | 2 D, on the host |
| "offload_attention" | the layer's input and the results of attention, in pinned host memory | 2 (D + Q), on the host |
| "offload_residual" | these and the residual after attention, in pinned host memory | 2 (2 D + Q), on the host |

D is the hidden size, Q and K the widths of the query and key projections, F the MLP's. The results of attention are its
output and, with a flash kernel, the softmax statistics (4 bytes a head and token), so that attention is not run again.
What is for the host stays on the device, of the last layers, as far as the host's pinned memory has no room for it.

The gradient of DoRA's magnitudes reads what each linear returns. A linear that writes to the residual stream returns
what nothing else in a backward pass reads, and would be computed again for that alone: all but "full" keep it too, 2 D
of `down_proj` and, where the residual is kept, 2 D of `o_proj`; on the host only if all of that has room there.
"projections" keeps what every linear returns, which is 2 (Q + K) more, where it is not what is kept anyway.

The policies that keep little also cut the MLP into tiles of tokens (`mlp_tile`, arXiv:2506.13996 section 3.1): its
intermediates, the widest arrays of a layer, then exist for one tile at a time. It costs no product more, since the
tile's backward pass computes again what the layer's would have.

`use_gradient_checkpointing` takes these names and the reference's values: False is "none", True is "full", "unsloth" is
"offload". "auto" is decided for a batch, by `remat_auto`. The model marks values with
`jax.ad_checkpoint.checkpoint_name`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, cast

import jax

from jaxlora.prefetch import scan_prefetched

# cuDNN's forward pass, whose outputs are the attention output and the softmax statistics. Only a primitive's name
# reaches the statistics: they live inside the custom vjp that jax wraps around the kernel.
_FLASH = "dot_product_attention_fwd_wrapper"


@dataclasses.dataclass(frozen=True)
class Policy:
    """saved: names of values that are kept. saved_with_room: names of more, kept where the host has room for those of
    all layers; only with `on_host`. flash: whether a flash kernel's results are kept. on_host: whether what is kept,
    the layer's input with it, lies in pinned host memory. unrolled: layers one after the other in the program and not
    in a loop, which would copy what is kept into a stack and out again; the program takes longer to compile. mlp_tile:
    tokens of an MLP tile; None for no tiles. rematerialise: False keeps everything."""

    saved: tuple[str, ...] = ()
    saved_with_room: tuple[str, ...] = ()
    flash: bool = False
    on_host: bool = False
    unrolled: bool = False
    mlp_tile: int | None = None
    rematerialise: bool = True


# What linears with DoRA return, by the axes that they read and write.
_OF_MLP, _OF_ATTENTION = "mlp_to_embed", "heads_to_embed"
_OF_LAYER = _OF_MLP, _OF_ATTENTION, "embed_to_heads", "embed_to_kv_heads", "embed_to_mlp"

POLICIES: dict[str, Policy] = {
    "none": Policy(rematerialise=False),
    "projections": Policy(
        saved=("query", "key", "value", "attention_output", "residual", "gate", "up", *_OF_LAYER),
        flash=True,
        unrolled=True,
    ),
    "attention": Policy(saved=("attention_output", "residual", _OF_MLP, _OF_ATTENTION), flash=True),
    "full": Policy(mlp_tile=4096),
    "offload": Policy(saved_with_room=(_OF_MLP,), on_host=True, mlp_tile=2048),
    "offload_attention": Policy(
        saved=("attention_output",), saved_with_room=(_OF_MLP,), flash=True, on_host=True, mlp_tile=2048
    ),
    "offload_residual": Policy(
        saved=("attention_output", "residual"),
        saved_with_room=(_OF_MLP, _OF_ATTENTION),
        flash=True,
        on_host=True,
        mlp_tile=2048,
    ),
}
# Tokens of a tile where the policy has none and `unsloth_tiled_mlp` asks for tiles.
_ASKED_TILE = 2048
_ALIASES = {False: "none", True: "full", "unsloth": "offload"}
# Not decided yet: `remat_auto.choose_policy` does, and `SFTTrainer` calls it. Until then it is "full".
AUTO = "auto"


def resolve(use_gradient_checkpointing: bool | str) -> str:
    """The policy's name for a value of `use_gradient_checkpointing`, or "auto".

    Raises:
        ValueError: neither a policy nor one of False, True, "unsloth", "auto".
    """
    name = cast(str, _ALIASES.get(use_gradient_checkpointing, use_gradient_checkpointing))
    if name != AUTO and name not in POLICIES:
        raise ValueError(
            f"use_gradient_checkpointing={use_gradient_checkpointing!r} is not one of False, True, 'unsloth', 'auto', "
            + ", ".join(map(repr, POLICIES))
        )
    return name


def _policy(name: str) -> Policy:
    if name != AUTO and name not in POLICIES:
        raise ValueError(f"remat policy {name!r} is not one of {', '.join(POLICIES)}, {AUTO}")
    return POLICIES["full" if name == AUTO else name]


def mlp_tile(name: str, asked: bool = False) -> int | None:
    """Tokens of an MLP tile under the policy of this name, None for no tiles; `asked` wants some in any case."""
    return _policy(name).mlp_tile or (_ASKED_TILE if asked else None)


def _checkpointed(body: Callable, policy: Policy) -> Callable:
    if not policy.rematerialise:
        return body
    # Right inside a scan only: the loop itself keeps XLA from undoing the recomputation.
    return jax.checkpoint(body, policy=_keeps(policy), prevent_cse=False)


def _keeps(policy: Policy, with_room: bool = False) -> Callable:
    """The policy as `jax.checkpoint` wants it: is the result of this primitive kept?"""
    by_name = jax.checkpoint_policies.save_only_these_names(*policy.saved, *(policy.saved_with_room * with_room))

    def keep(primitive, *avals, **params):
        return (policy.flash and primitive.name == _FLASH) or by_name(primitive, *avals, **params)

    return keep


def scan(
    body: Callable,
    x: Any,
    layers: Any,
    name: str,
    host_bytes: int | None = None,
    unroll: bool = False,
    in_loop: bool = False,
) -> tuple[Any, Any]:
    """`jax.lax.scan(body, x, layers)` over layers, keeping for the backward pass what the policy of this name says.

    body: (x, layer) -> (x, out). It may close over what every layer reads. host_bytes: the most that may be kept in
    host memory, None for no bound; a policy that keeps more there keeps the rest, of the last layers, on the device.
    unroll: write every layer out; only where the policy asks for no host memory. in_loop: write none out, even where
    the policy would.

    Raises:
        ValueError: there is no policy of that name.
    """
    policy = _policy(name)
    if policy.on_host:
        return scan_prefetched(body, x, layers, [_keeps(policy, True), _keeps(policy)], host_bytes)
    if policy.unrolled and not in_loop:
        outs, body = [], jax.checkpoint(body, policy=_keeps(policy))
        for layer in range(jax.tree.leaves(layers)[0].shape[0]):
            x, out = body(x, jax.tree.map(lambda leaf, layer=layer: leaf[layer], layers))
            outs.append(out)
        return x, jax.tree.map(lambda *parts: jax.numpy.stack(parts), *outs)
    return jax.lax.scan(_checkpointed(body, policy), x, layers, unroll=unroll or 1)


def over_tiles(function: Callable, x: jax.Array, tile: int | None, parts: int = 1) -> jax.Array:
    """`function(rows, index)` over x [B, T, D] a tile of tokens at a time, each computed again for its gradient.

    `function` takes [tokens, D] and the tile's number and must treat tokens alike. With no tile, or no more tokens than
    one, it is called once. Where devices have a part of the batch each (`sharding.row_parts`), a tile is so many tokens
    of each part, so that no token leaves its device.
    """
    tokens = x.shape[0] * x.shape[1] // parts  # of a part
    if tile is None or tokens <= tile:
        return function(x.reshape(parts * tokens, x.shape[2]), 0).reshape(*x.shape[:2], -1)
    count = -(-tokens // tile)
    size = -(-tokens // count)
    padded = jax.numpy.pad(x.reshape(parts, tokens, -1), ((0, 0), (0, count * size - tokens), (0, 0)))
    tiles = padded.reshape(parts, count, size, -1).swapaxes(0, 1).reshape(count, parts * size, -1)

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def one(inputs):
        # Masking the padding, of which there is mostly none, makes slicing a tile the work of a kernel. The copy engine
        # would do it otherwise, when it has done what it may be at, and that is offloading (see `prefetch`).
        rows, index = inputs
        is_token = jax.numpy.tile(index * size + jax.numpy.arange(size) < tokens, parts)[:, None]
        masked = lambda rows: jax.numpy.where(is_token, rows, jax.numpy.zeros((), rows.dtype))
        return masked(function(masked(rows), index))

    out = jax.lax.map(one, (tiles, jax.numpy.arange(count)))
    out = out.reshape(count, parts, size, -1).swapaxes(0, 1).reshape(parts, count * size, -1)
    return out[:, :tokens].reshape(*x.shape[:2], -1)
