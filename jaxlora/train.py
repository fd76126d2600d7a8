"""The training step: a pure function of (state, frozen, batch), one jit, and the state's buffers donated.

    loss = sum of totals / sum of weights,   state' = optimizer(state, d loss / d trainable)

The model is a graph definition and two trees: `trainable`, which is differentiated, and `frozen`, which is not, so that
no gradient, and no optimizer state, ever exists for a frozen weight.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array

from jaxlora.loss import Batch, causal_lm_loss
from jaxlora.model import CausalLM

Loss = Callable[[CausalLM, Batch, Any], tuple[Array, Array, dict[str, Array]]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything that a step changes. step: int32 [], the number of updates made. key: the source of dropout.

    As a pytree it may hold other leaves than arrays, such as their shapes or shardings.
    """

    step: Any
    trainable: Any
    opt_state: Any
    key: Any

    @classmethod
    def create(cls, trainable: nnx.State, optimizer: optax.GradientTransformation, key: Any = None) -> TrainState:
        """A state before the first step. Copies what it is given: the step donates its state, and the module, whose
        buffers these are, must stay usable."""
        key = jax.random.key(0) if key is None else key
        trainable, key = jax.tree.map(jnp.copy, (trainable, key))
        with jax.numpy_dtype_promotion("standard"):
            return cls(jnp.zeros((), jnp.int32), trainable, optimizer.init(trainable), key)


def make_train_step(
    graphdef: nnx.GraphDef, optimizer: optax.GradientTransformation, loss: Loss = causal_lm_loss
) -> Callable[[TrainState, nnx.State, Batch], tuple[TrainState, dict[str, Array]]]:
    """A compiled `step(state, frozen, batch) -> (state, metrics)` that donates `state`.

    A batch whose `input_ids` are [A, B, T] is A micro-batches: their gradients are added in float32 and divided
    once, by the total weight, so that the result is that of one batch of A * B rows. metrics: "loss", "grad_norm",
    "num_tokens" (the weight), and what the loss returns beside, summed over micro-batches and divided by the weight.
    """

    def total_of(trainable, frozen, batch, key):
        total, weight, metrics = loss(nnx.merge(graphdef, trainable, frozen), batch, key)
        return total, (weight, metrics)

    def gradient(trainable, frozen, batch, key):
        (total, (weight, metrics)), grads = jax.value_and_grad(total_of, has_aux=True)(trainable, frozen, batch, key)
        return grads, total, weight, metrics

    def step(state: TrainState, frozen: nnx.State, batch: Batch) -> tuple[TrainState, dict[str, Array]]:
        key = jax.random.fold_in(state.key, state.step)
        if batch["input_ids"].ndim == 3:
            sums = _accumulate(gradient, state.trainable, frozen, batch, key)
        else:
            sums = gradient(state.trainable, frozen, batch, key)
        grads, total, weight, metrics = sums
        divisor = jnp.maximum(weight, 1.0)  # a batch without a supervised token has loss 0 and no gradient
        grads = jax.tree.map(lambda g: g / divisor.astype(g.dtype), grads)
        with jax.numpy_dtype_promotion("standard"):  # optax mixes float32 and weak types
            updates, opt_state = optimizer.update(grads, state.opt_state, state.trainable)
            trainable = optax.apply_updates(state.trainable, updates)
            grad_norm = optax.tree.norm(grads)
        metrics = {name: value / divisor for name, value in metrics.items()}
        metrics |= {"loss": total / divisor, "grad_norm": grad_norm, "num_tokens": weight}
        return TrainState(state.step + 1, trainable, opt_state, state.key), metrics

    return jax.jit(step, donate_argnums=0)


def _accumulate(gradient, trainable, frozen, batch, key):
    """Add up `gradient` over the leading axis of the batch."""

    def body(sums, micro):
        index, batch = micro
        new = gradient(trainable, frozen, batch, jax.random.fold_in(key, index))
        return jax.tree.map(jnp.add, sums, new), None

    count = batch["input_ids"].shape[0]
    shapes = jax.eval_shape(gradient, trainable, frozen, jax.tree.map(lambda x: x[0], dict(batch)), key)
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    sums, _ = jax.lax.scan(body, zeros, (jnp.arange(count, dtype=jnp.int32), dict(batch)))
    return sums
