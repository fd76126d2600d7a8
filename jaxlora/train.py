"""The training step: a pure function of (state, frozen, batch), one jit, and the state's buffers donated.

    loss = sum of totals / sum of weights,   state' = optimizer(state, d loss / d trainable)

The model is a graph definition and two trees: `trainable`, which is differentiated, and `frozen`, which is not, so that
no gradient, and no optimizer state, ever exists for a frozen weight.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Bool

from jaxlora import sharding
from jaxlora.loss import Batch, causal_lm_loss
from jaxlora.model import CausalLM

Loss = Callable[[CausalLM, Batch, Any], tuple[Array, Array, dict[str, Array]]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LossScale:
    """What the loss is multiplied by before it is differentiated, so that float16 holds the gradients between layers.

    Of a mean over the tokens of a micro-batch, so that a scale means the same as for torch's GradScaler, whose rule
    this is: halved when a gradient is not finite, and that update is skipped; doubled after 2000 others in a row.
    The gradients that an optimizer sees are not scaled.

    scale: float32 []. finite_steps: int32 [], updates since it last changed.
    """

    scale: Any
    finite_steps: Any

    INTERVAL: ClassVar[int] = 2000

    @classmethod
    def create(cls, scale: float = 2.0**16) -> LossScale:
        """A scale before the first step."""
        return cls(jnp.asarray(scale, jnp.float32), jnp.zeros((), jnp.int32))

    def after(self, is_finite: Bool[Array, ""]) -> LossScale:
        """The scale after a step whose gradients were finite, or were not."""
        steps = jnp.where(is_finite, self.finite_steps + 1, 0)
        grows = steps >= self.INTERVAL
        factor = jnp.where(is_finite, jnp.where(grows, 2.0, 1.0), 0.5).astype(jnp.float32)
        return LossScale(self.scale * factor, jnp.where(grows, 0, steps))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything that a step changes. step: int32 [], the number of steps made. key: the source of dropout.
    loss_scale: a `LossScale` where the model computes in float16, else None.

    As a pytree it may hold other leaves than arrays, such as their shapes or shardings.
    """

    step: Any
    trainable: Any
    opt_state: Any
    key: Any
    loss_scale: Any = None

    @classmethod
    def create(
        cls,
        trainable: nnx.State,
        optimizer: optax.GradientTransformation,
        key: Any = None,
        loss_scale: LossScale | None = None,
    ) -> TrainState:
        """A state before the first step. Copies what it is given: the step donates its state, and the module, whose
        buffers these are, must stay usable."""
        key = jax.random.key(0) if key is None else key
        trainable, key = jax.tree.map(jnp.copy, (trainable, key))
        with jax.numpy_dtype_promotion("standard"):
            return cls(jnp.zeros((), jnp.int32), trainable, optimizer.init(trainable), key, loss_scale)


def make_train_step(
    graphdef: nnx.GraphDef,
    optimizer: optax.GradientTransformation,
    loss: Loss = causal_lm_loss,
    mesh: Mesh | None = None,
    full_determinism: bool = False,
) -> Callable[[TrainState, nnx.State, Batch], tuple[TrainState, dict[str, Array]]]:
    """A compiled `step(state, frozen, batch) -> (state, metrics)` that donates `state`.

    A batch whose `input_ids` are [A, B, T] is A micro-batches: their gradients are added in float32 and divided
    once, by the total weight, so that the result is that of one batch of A * B rows. metrics: "loss", "grad_norm",
    "num_tokens" (the weight), and what the loss returns beside, summed over micro-batches and divided by the weight.
    With a loss scale there is "loss_scale", that of this step, and "grad_norm" is 0 where the update was skipped.

    mesh: what state, frozen and batch lie on (`sharding.shard`, `sharding.batch_sharding`). Without it a step on a mesh
    is right, but XLA may move activations and whole stacks of weights between devices (`sharding.over`).

    full_determinism: on a GPU, compile the step so that each run of it, in this process or another, gives the same
    bits: by XLA's `xla_gpu_deterministic_ops`, and with layers in loops, see `kernels.attention`. It then cannot be
    called within another `jax.jit`. Without it, gradients of attention are added up in an order that varies, and XLA
    chooses between products by timing them.
    """

    def total_of(trainable, frozen, batch, key, scale):
        model = nnx.merge(graphdef, trainable, frozen)
        model.full_determinism = full_determinism
        total, weight, metrics = loss(model, batch, key)
        return total * scale, (total, weight, metrics)

    def gradient(scale, trainable, frozen, batch, key):
        grads, (total, weight, metrics) = jax.grad(total_of, has_aux=True)(trainable, frozen, batch, key, scale)
        return grads, total, weight, metrics

    def step(state: TrainState, frozen: nnx.State, batch: Batch) -> tuple[TrainState, dict[str, Array]]:
        with sharding.over(mesh):
            return step_on_mesh(state, frozen, batch)

    def step_on_mesh(state: TrainState, frozen: nnx.State, batch: Batch) -> tuple[TrainState, dict[str, Array]]:
        key, loss_scale = jax.random.fold_in(state.key, state.step), state.loss_scale
        scale = jnp.ones((), jnp.float32)
        if loss_scale is not None:
            scale = loss_scale.scale / math.prod(batch["input_ids"].shape[-2:])
        scaled = functools.partial(gradient, scale)
        if batch["input_ids"].ndim == 3:
            sums = _accumulate(scaled, state.trainable, frozen, batch, key)
        else:
            sums = scaled(state.trainable, frozen, batch, key)
        grads, total, weight, metrics = sums
        divisor = jnp.maximum(weight, 1.0)  # a batch without a supervised token has loss 0 and no gradient
        grads = jax.tree.map(lambda g: g / (divisor * scale).astype(g.dtype), grads)
        with jax.numpy_dtype_promotion("standard"):  # optax mixes float32 and weak types
            updates, opt_state = optimizer.update(grads, state.opt_state, state.trainable)
            trainable = optax.apply_updates(state.trainable, updates)
            grad_norm = optax.tree.norm(grads)
        metrics = {name: value / divisor for name, value in metrics.items()}
        metrics |= {"loss": total / divisor, "grad_norm": grad_norm, "num_tokens": weight}
        if loss_scale is not None:
            is_finite = jnp.isfinite(grad_norm)
            trainable, opt_state = jax.tree.map(
                functools.partial(jnp.where, is_finite), (trainable, opt_state), (state.trainable, state.opt_state)
            )
            metrics |= {"loss_scale": loss_scale.scale, "grad_norm": jnp.where(is_finite, grad_norm, 0.0)}
            loss_scale = loss_scale.after(is_finite)
        return TrainState(state.step + 1, trainable, opt_state, state.key, loss_scale), metrics

    options: dict[str, Any] | None = {"xla_gpu_deterministic_ops": True} if full_determinism else None
    return jax.jit(step, donate_argnums=0, compiler_options=options)


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
