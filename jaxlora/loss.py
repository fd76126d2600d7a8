"""Losses for `make_train_step`: `loss(model, batch, key) -> (total, weight, metrics)`.

`total` is a sum and `weight` what it is to be divided by. The step divides once, after the micro-batches and devices
are added up, so that the mean is over tokens whichever way they were cut.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxlora.kernels.cross_entropy import IGNORE_INDEX, chunk_length, linear_cross_entropy
from jaxlora.model import CausalLM

Batch = Mapping[str, Array]


def shift_labels(labels: Array, segment_ids: Array | None = None) -> Array:
    """Align [B, T] labels with the position that predicts them: out[:, t] = labels[:, t + 1], -100 at the end.

    Across a border of segments there is nothing to predict: a document's first token is not the last one's next.
    """
    shifted = jnp.pad(labels[:, 1:], ((0, 0), (0, 1)), constant_values=IGNORE_INDEX)
    if segment_ids is not None:
        following = jnp.pad(segment_ids[:, 1:], ((0, 0), (0, 1)))
        shifted = jnp.where(segment_ids == following, shifted, IGNORE_INDEX)
    return shifted


def causal_lm_loss(
    model: CausalLM, batch: Batch, key: Any = None
) -> tuple[Float[Array, ""], Float[Array, ""], dict[str, Array]]:
    """Next-token cross entropy: (sum over supervised tokens, their number, {}).

    `batch` has input_ids and labels [B, T] (aligned; shifted here; -100 ignored), and may have positions and
    segment_ids. The full logits never exist: see `kernels.cross_entropy`.
    """
    segment_ids = batch.get("segment_ids")
    hidden, _ = model.hidden_states(batch["input_ids"], batch.get("positions"), segment_ids, key=key)
    labels = shift_labels(batch["labels"], segment_ids).reshape(-1)
    rows, weight = model.head_product(hidden.reshape(-1, hidden.shape[-1]))
    chunk = chunk_length(rows.shape[0], weight.shape[0])
    total = linear_cross_entropy(rows, weight, labels, chunk, model.config.final_logit_softcapping)
    return cast(Array, total), jnp.sum(labels != IGNORE_INDEX).astype(jnp.float32), {}
