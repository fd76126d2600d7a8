"""Losses for `make_train_step`: `loss(model, batch, key) -> (total, weight, metrics)`.

`total` is a sum and `weight` what it is to be divided by. The step divides once, after the micro-batches and devices
are added up, so that the mean is over tokens whichever way they were cut.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxlora import sharding
from jaxlora.kernels.cross_entropy import IGNORE_INDEX, chunk_length, linear_cross_entropy
from jaxlora.model import CausalLM
from jaxlora.moe import load_balancing_loss

Batch = Mapping[str, Array]


def shift_labels(labels: Int[Array, "b t"], segment_ids: Int[Array, "b t"] | None = None) -> Int[Array, "b t"]:
    """Align [B, T] labels with the position that predicts them: out[:, t] = labels[:, t + 1], -100 at the end.

    Across a border of segments there is nothing to predict: a document's first token is not the last one's next.
    """
    shifted = jnp.pad(labels[:, 1:], ((0, 0), (0, 1)), constant_values=IGNORE_INDEX)
    if segment_ids is not None:
        following = jnp.pad(segment_ids[:, 1:], ((0, 0), (0, 1)))
        shifted = jnp.where(segment_ids == following, shifted, IGNORE_INDEX)
    return shifted


def causal_lm_loss(
    model: CausalLM, batch: Batch, key: Any = None, *, router_aux_loss_coef: float | None = None
) -> tuple[Float[Array, ""], Float[Array, ""], dict[str, Array]]:
    """Next-token cross entropy: (sum over supervised tokens, their number, metrics).

    `batch` has input_ids and labels [B, T] (aligned; shifted here; -100 ignored), and may have positions and
    segment_ids. The full logits never exist: see `kernels.cross_entropy`.

    A model with experts may add `moe.load_balancing_loss` of the batch, times `router_aux_loss_coef`, to the mean loss
    of a token. By default the factor is the model's own, which is 0 unless its config.json says
    `"output_router_logits": true`, as in transformers. The metric "router_aux_loss" is that loss, without the factor.
    """
    segment_ids = batch.get("segment_ids")
    coefficient = model.config.router_aux_loss_coef if router_aux_loss_coef is None else router_aux_loss_coef
    arguments = batch["input_ids"], batch.get("positions"), segment_ids
    load = None
    if coefficient and model.config.num_experts:
        hidden, load = model.hidden_states_and_load(*arguments, key=key)
    else:
        hidden, _ = model.hidden_states(*arguments, key=key)
    labels = shift_labels(batch["labels"], segment_ids).reshape(-1)
    rows, weight = model.head_product(hidden.reshape(-1, hidden.shape[-1]))
    parts = sharding.row_parts(hidden.shape[0])
    weight = sharding.gathered(weight, ("vocab", "embed"))  # once, and not for each chunk
    chunk = chunk_length(rows.shape[0] // parts, weight.shape[0])
    total = linear_cross_entropy(rows, weight, labels, chunk, model.config.final_logit_softcapping, parts)
    tokens = jnp.sum(labels != IGNORE_INDEX).astype(jnp.float32)
    if load is None:
        return cast(Array, total), tokens, {}
    balance = tokens * load_balancing_loss(load)
    return cast(Array, total) + coefficient * balance, tokens, {"router_aux_loss": balance}
