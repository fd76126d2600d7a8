"""`use_gradient_checkpointing="auto"`: the fastest checkpointing policy whose step fits the device, not guessed.

Policies are tried from the fastest to the leanest. One whose kept values alone exceed what is free, on the device or of
the host's pinned memory, is passed over, by the table in `remat`; but "offload" may fill both. Of the others XLA says,
once it has compiled the step, how many bytes it takes beside its arguments, and the first that fits is taken. Compiling
is what the first step would have cost anyway, and with a compilation cache the policies that did not fit cost nothing
the second time.

The order is that of steps of an 8B model measured on an H100 and, for "attention", on an H200 (`benchmarks/results`):
what was kept on the host cost less than to compute it again. "full", which computes everything again, comes last, for
hosts with little memory.
"""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

import jax
import optax
from jax.sharding import Mesh

from jaxlora import remat
from jaxlora.config import LayerConfig, ModelConfig
from jaxlora.lora import partition
from jaxlora.loss import Batch, causal_lm_loss
from jaxlora.model import CausalLM
from jaxlora.offload import pinned_bytes
from jaxlora.train import Loss, TrainState, make_train_step

logger = logging.getLogger(__name__)

# From the fastest on.
ORDER = ("projections", "attention", "offload_residual", "offload_attention", "offload", "full")
# What is left free, since memory is never free in one piece.
_RESERVE = 0.04


@dataclasses.dataclass(frozen=True)
class Choice:
    """policy: its name. step: the compiled step. needed: the bytes that it takes beside its arguments. free: the bytes
    that there were. tried: what each policy that was considered needs, compiled or, where that was enough to pass it
    over, at the least."""

    policy: str
    step: Any
    needed: int
    free: int | None
    tried: dict[str, int]


def choose_policy(
    model: CausalLM,
    optimizer: optax.GradientTransformation,
    state: TrainState,
    batch: Batch,
    loss: Loss = causal_lm_loss,
    *,
    mesh: Mesh | None = None,
    full_determinism: bool = False,
    free: int | None = None,
    free_on_host: int | None = None,
) -> Choice:
    """Decide the policy of a model that is on the device with its state, for batches of this shape, and set it.

    mesh, full_determinism: as in `make_train_step`; each device of a mesh must have as much room. free: bytes that a
    step may take beside its arguments on a device; by default what the first device has left, or no bound where it does
    not say. free_on_host: the same of pinned host memory, for all devices; the model keeps to it from then on.

    Raises:
        MemoryError: no policy fits; the message says what the leanest needs.
    """
    free = free_bytes() if free is None else free
    if free_on_host is None:
        free_on_host = pinned_bytes()
    else:
        model.host_bytes = free_on_host
    tokens = batch["input_ids"].shape[-2] * batch["input_ids"].shape[-1]
    tried: dict[str, int] = {}
    devices = 1 if mesh is None else mesh.size
    for policy in ORDER:
        least = tokens * kept_bytes(policy, model.config, model.dtype.itemsize)
        is_on_host = remat.POLICIES[policy].on_host
        least //= 1 if is_on_host else devices
        room = free_on_host if is_on_host else free
        if policy == "offload" and room and free is not None:
            room += devices * free
        if room is not None and least > room:
            if not is_on_host:
                tried[policy] = least
            continue
        model.remat_policy = policy
        graphdef, _, frozen = partition(model)
        step = make_train_step(graphdef, optimizer, loss, mesh, full_determinism).lower(state, frozen, batch).compile()
        tried[policy] = needed = _step_bytes(step)
        if free is None or needed <= free:
            bound = "" if free is None else f" of {free / 2**30:.2f} GiB that are free"
            logger.info("gradient checkpointing is %r: a step takes %.2f GiB%s", policy, needed / 2**30, bound)
            return Choice(policy, step, needed, free, tried)
    model.remat_policy = remat.AUTO
    leanest = min(tried, key=lambda policy: tried[policy])
    raise MemoryError(
        f"no checkpointing policy fits: {leanest!r} takes {tried[leanest] / 2**30:.2f} GiB beside the weights for "
        f"{tokens} tokens, and {(free or 0) / 2**30:.2f} GiB are free; make rows shorter or batches smaller"
    )


def kept_bytes(policy: str, config: ModelConfig, itemsize: int) -> int:
    """The bytes that a policy keeps for each token over all layers, wherever: the table in `remat`."""
    return itemsize * sum(_kept_width(policy, config, layer) for layer in config.layers)


def _kept_width(policy: str, config: ModelConfig, layer: LayerConfig) -> int:
    d, q = config.hidden_size, config.num_attention_heads * layer.head_dim
    k = layer.num_key_value_heads * layer.head_dim if layer.reuses_kv is None else 0
    return {
        "projections": 2 * d + 2 * q + 2 * k + 2 * layer.intermediate_size,
        "attention": 2 * d + q,
        "offload_residual": 2 * d + q,
        "offload_attention": d + q,
        "offload": d,
        "full": d,
    }[policy]


def free_bytes() -> int | None:
    """What the first device has left, less a reserve; None where it does not say, such as on the CPU."""
    stats = jax.local_devices()[0].memory_stats()
    if not stats or "bytes_limit" not in stats:
        return None
    return int(stats["bytes_limit"] * (1 - _RESERVE)) - stats["bytes_in_use"]


def _step_bytes(step: Any) -> int:
    analysis = step.memory_analysis()
    return analysis.temp_size_in_bytes + analysis.output_size_in_bytes - analysis.alias_size_in_bytes
