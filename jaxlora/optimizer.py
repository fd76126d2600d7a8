"""Optimizers and learning-rate schedules by the names of `transformers.TrainingArguments`, and with their arithmetic.

update t = 0, 1, ...:   clip the gradient's norm,   then e.g. AdamW with learning rate schedule(t)
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax

ScheduleName = Literal["linear", "cosine", "constant", "constant_with_warmup"]
OptimizerName = Literal["adamw_torch", "adamw_torch_fused", "adamw", "lion_32bit", "lion", "sgd"]

# What transformers' `Trainer.get_decay_parameter_names` leaves out. Told by name and not by rank, since the biases of
# stacked layers have two axes.
_UNDECAYED = re.compile(r"bias|layernorm|rmsnorm|(?:^|\.)norm(?:$|\.)|_norm(?:$|\.)")

Schedule = Callable[[Any], Any]


def make_schedule(name: ScheduleName, learning_rate: float, *, warmup_steps: int, total_steps: int) -> Schedule:
    """`schedule(t)`, the learning rate of the update after `t` others: a traced scalar of one, or a float of a number.

    The first update of a warm-up has rate 0, as in transformers, and the update after the last one would have rate 0
    where the schedule decays. "constant" knows no warm-up.
    """
    warmup_steps = 0 if name == "constant" else warmup_steps
    decay_steps = max(1, total_steps - warmup_steps)

    def schedule(t):
        # On the host in float64, so that a log says 0.0002 and not 0.00019999999494757503.
        xp, t = (jnp, t.astype(jnp.float32)) if isinstance(t, jax.Array) else (np, np.float64(t))
        warm = t / max(1, warmup_steps)
        if name == "linear":
            rest = xp.maximum(0.0, (total_steps - t) / decay_steps)
        elif name == "cosine":
            rest = xp.maximum(0.0, 0.5 * (1.0 + xp.cos(np.pi * (t - warmup_steps) / decay_steps)))
        else:
            rest = xp.ones_like(t)
        return learning_rate * xp.where(t < warmup_steps, warm, rest)

    return schedule


def decay_mask(params: Any) -> Any:
    """A tree of bools: which parameters weight decay applies to. Not biases and norms; adapter matrices, yes."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: _UNDECAYED.search(jax.tree_util.keystr(path, simple=True, separator=".").lower()) is None,
        params,
    )


def make_optimizer(
    name: OptimizerName,
    schedule: Schedule,
    *,
    weight_decay: float = 0.0,
    beta1: float = 0.9,
    beta2: float = 0.999,
    epsilon: float = 1e-8,
    max_grad_norm: float | None = 1.0,
) -> optax.GradientTransformation:
    """An optimizer whose updates are torch's: bias-corrected, with decoupled weight decay (coupled for "sgd").

    `max_grad_norm` of None or 0 clips nothing.

    Raises:
        ValueError: an unknown name.
    """
    if name in ("adamw_torch", "adamw_torch_fused", "adamw"):
        rule = optax.adamw(schedule, beta1, beta2, epsilon, weight_decay=weight_decay, mask=decay_mask)
    elif name in ("lion_32bit", "lion"):
        rule = optax.lion(schedule, beta1, beta2, weight_decay=weight_decay, mask=decay_mask)
    elif name == "sgd":
        rule = optax.chain(optax.add_decayed_weights(weight_decay, decay_mask), optax.sgd(schedule))
    else:
        raise ValueError(f"optim {name!r} is not one of {', '.join(get_args(OptimizerName))}")
    return optax.chain(optax.clip_by_global_norm(max_grad_norm), rule) if max_grad_norm else rule
