"""Adapters: put them on a model, split what learns from what is frozen, count, and add them into the weights."""

from __future__ import annotations

import zlib
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxlora.config import LoraConfig
from jaxlora.layers import AdapterScale, BaseParam, Linear, LoraParam, TrainableParam
from jaxlora.model import CausalLM, Named, named_nodes
from jaxlora.quant import QuantizedArray


def target_linears(model: CausalLM, target_modules: tuple[str, ...] | str) -> list[Named]:
    """The linears that a list of targets names, PEFT's way: a target is a module's path or a suffix of it at a dot.

    "all-linear" is every linear of the blocks, not the head. A target such as "model.layers.3.mlp.up_proj" names one
    layer of a stack, which needs adapters of unequal layers.

    Raises:
        ValueError: a target matches nothing; names every target that exists.
    """
    linears = list(named_nodes(model, Linear))
    if target_modules == "all-linear":
        return [linear for linear in linears if linear.layers]

    def matches(linear: Named, target: str) -> bool:
        return any(name == target or name.endswith("." + target) for name in linear.names())

    unmatched = [t for t in target_modules if not any(matches(linear, t) for linear in linears)]
    if unmatched:
        known = sorted({linear.name.rsplit(".", 1)[-1] for linear in linears})
        raise ValueError(
            f"target_modules: {', '.join(map(repr, unmatched))} matches no linear layer of this "
            f"{model.config.model_type} model. The names that exist: {', '.join(known)} (or 'all-linear')"
        )
    chosen = [linear for linear in linears if any(matches(linear, t) for t in target_modules)]
    for linear in chosen:
        partly = [n for n in linear.names() if not any(n == t or n.endswith("." + t) for t in target_modules)]
        if partly:
            raise NotImplementedError(
                f"target_modules names {linear.name} for some layers and not for others ({partly[0]} is left out): "
                "adapters on single layers are not supported yet; name the module without its layer"
            )
    return chosen


def add_adapters(model: CausalLM, config: LoraConfig, key: Any) -> None:
    """Put fresh adapters on the model's linears, in place: A uniform in +-1/sqrt(in), B zero, both float32.

    The bound is kaiming_uniform with a = sqrt(5), PEFT's initialisation. Each matrix is drawn from `key` folded with
    its checkpoint name, so that it does not depend on how layers are stacked or which others are targets.
    """
    for target in target_linears(model, config.target_modules):
        linear: Linear = target.node
        bound = linear.in_features**-0.5
        keys = jnp.stack([jax.random.fold_in(key, zlib.crc32(name.encode())) for name in target.names()])

        def draw(k, linear=linear, bound=bound):
            return jax.random.uniform(k, (config.r, linear.in_features), jnp.float32, -bound, bound)

        a = jax.vmap(draw)(keys)
        b = jnp.zeros((len(target.names()), linear.out_features, config.r), jnp.float32)
        scaling = jnp.full((len(target.names()),), config.scaling, jnp.float32)
        if not target.layers:
            a, b, scaling = a[0], b[0], scaling[0]
        attach(linear, a, b, scaling, config.lora_dropout)


def attach(linear: Linear, a, b, scaling, dropout: float) -> None:
    """Give a linear its adapter: a [*stack, r, in], b [*stack, out, r], scaling [*stack]."""
    lead = ("layers",) if linear.stack is not None else ()
    out_axis, in_axis = linear.axes
    linear.lora_A = LoraParam(a, axes=(*lead, "rank", in_axis))
    linear.lora_B = LoraParam(b, axes=(*lead, out_axis, "rank"))
    linear.lora_scaling = AdapterScale(scaling, axes=lead)
    linear.lora_dropout = dropout


def adapters(model: CausalLM) -> list[Named]:
    """The linears that carry an adapter."""
    return [linear for linear in named_nodes(model, Linear) if linear.node.lora_A is not None]


def partition(model: nnx.Module) -> tuple[nnx.GraphDef, nnx.State, nnx.State]:
    """Split a model in three: (graphdef, trainable, frozen). `nnx.merge` of the three is the model again.

        {"q_proj": {"weight": BaseParam, "lora_A": LoraParam, "lora_B": LoraParam}}
        -> trainable {"q_proj": {"lora_A", "lora_B"}},  frozen {"q_proj": {"weight"}}

    `trainable` holds just what learns, and is what to differentiate and to hand to an optimizer.
    """
    return nnx.split(model, nnx.Param, ...)


def unfreeze(model: CausalLM) -> None:
    """Let every weight of the checkpoint learn, in place: each BaseParam becomes a TrainableParam of the same value.

    A head that is tied to the embedding stays tied, since it has no parameter of its own.

    Raises:
        ValueError: a weight is quantised, and its codes cannot learn.
    """
    # Whole, before anything changes: a Variable that is replaced below must not be met again.
    modules = [(module, vars(module)) for _, module in nnx.iter_graph(model) if isinstance(module, nnx.Module)]
    frozen = [(m, name, v) for m, attributes in modules for name, v in attributes.items() if isinstance(v, BaseParam)]
    if any(isinstance(v.get_value(), QuantizedArray) for _, _, v in frozen):
        raise ValueError("a quantised model cannot learn as a whole: load it with full_finetuning=True")
    for module, name, variable in frozen:
        setattr(module, name, TrainableParam(variable.get_value(), axes=variable.get_metadata()["axes"]))


def _size(value: Any) -> int:
    """Number of weights that a Variable's value stands for: a quantised array counts as what it dequantises to."""
    if isinstance(value, QuantizedArray):
        return value.size
    return value.size


def get_nb_trainable_parameters(model: CausalLM) -> tuple[int, int]:
    """(trainable, all) as PEFT counts them: adapters are part of "all", and a tied head is counted once."""
    trainable = sum(_size(p.node.get_value()) for p in named_nodes(model, nnx.Param))
    frozen = sum(
        _size(p.node.get_value())
        for p in named_nodes(model, nnx.Variable)
        if not isinstance(p.node, nnx.Param | AdapterScale)
    )
    return trainable, trainable + frozen


def format_trainable_parameters(trainable: int, total: int) -> str:
    """PEFT's line.

    >>> format_trainable_parameters(41_943_040, 8_072_204_288)
    'trainable params: 41,943,040 || all params: 8,072,204,288 || trainable%: 0.5196'
    """
    return f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {100 * trainable / total:.4f}"


def delta_weight(linear: Linear, layer: int | None = None) -> jax.Array:
    """scaling * B A of one layer, [out, in] in float32: what the adapter adds to the weight."""
    a, b, scaling = (v.get_value() for v in (linear.lora_A, linear.lora_B, linear.lora_scaling))
    if layer is not None:
        a, b, scaling = a[layer], b[layer], scaling[layer]
    return scaling * jnp.matmul(b, a, precision=jax.lax.Precision.HIGHEST)
