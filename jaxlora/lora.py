"""Adapters: put them on a model, split what learns from what is frozen, count, and add them into the weights."""

from __future__ import annotations

import dataclasses
import operator
import re
import warnings
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxlora import lora_init, quant
from jaxlora.config import LoraConfig
from jaxlora.layers import AdapterConstant, AdapterScale, AdapterStart, BaseParam, Linear, LoraParam, TrainableParam
from jaxlora.model import CausalLM, Named, named_nodes
from jaxlora.quant import QuantizedArray


def is_target(config: LoraConfig, module: str) -> bool:
    """Whether a config means the module of this path, PEFT's way. "all-linear" is the caller's to spell out."""
    targets, excluded = config.target_modules, config.exclude_modules
    if excluded and (re.fullmatch(excluded, module) if isinstance(excluded, str) else _names(excluded, module)):
        return False
    if isinstance(targets, str):
        return re.fullmatch(targets, module) is not None
    if module in targets:  # a whole path, to which layers_to_transform has nothing to add
        return True
    return _names(targets, module) and _is_layer(config, module)


def _names(targets: Sequence[str], module: str) -> bool:
    return any(module == target or module.endswith("." + target) for target in targets)


def _is_layer(config: LoraConfig, module: str) -> bool:
    indices, patterns = config.layers_to_transform, config.layers_pattern
    if indices is None:
        return True
    patterns = (patterns,) if isinstance(patterns, str) else patterns or (r"[^.]*",)
    found = next(filter(None, (re.match(rf"(?:^|.*?\.){pattern}\.(\d+)\.", module) for pattern in patterns)), None)
    return found is not None and int(found[1]) in ((indices,) if isinstance(indices, int) else indices)


def target_ranks(model: CausalLM, config: LoraConfig) -> list[tuple[Named, tuple[int, ...]]]:
    """The linears that get an adapter, each with the rank of every layer of its stack: 0 where a layer gets none.

    "all-linear" is every linear of the blocks, not the head. A linear that is no stack has one rank.

    Raises:
        ValueError: a target, or all of them together, matches nothing (names every target that exists), or a layer
            that the model has not.
    """
    linears = list(named_nodes(model, Linear))
    if config.target_modules == "all-linear":
        blocks = tuple(sorted({linear.name.rsplit(".", 1)[-1] for linear in linears if linear.layers}))
        linears, config = [x for x in linears if x.layers], dataclasses.replace(config, target_modules=blocks)
    _check_targets(model, config)
    chosen = [
        (linear, tuple(config.rank_of(name) if is_target(config, name) else 0 for name in linear.names()))
        for linear in linears
    ]
    chosen = [(linear, ranks) for linear, ranks in chosen if any(ranks)]
    if not chosen:
        raise ValueError(
            f"target_modules {config.target_modules!r} leaves no linear layer of this {model.config.model_type} model, "
            f"with exclude_modules={config.exclude_modules!r}, layers_to_transform={config.layers_to_transform!r} and "
            f"layers_pattern={config.layers_pattern!r}"
        )
    return chosen


def _check_targets(model: CausalLM, config: LoraConfig) -> None:
    linears = list(named_nodes(model, Linear))
    names = [name for linear in linears for name in linear.names()]
    if isinstance(config.target_modules, str):
        pattern = config.target_modules
        matched = any(re.fullmatch(pattern, name) for name in names)
        unmatched, kind = ([] if matched else [pattern]), " as a regular expression for whole paths"
    else:
        unmatched, kind = [t for t in config.target_modules if not any(_names([t], name) for name in names)], ""
    if unmatched:
        known = sorted({linear.name.rsplit(".", 1)[-1] for linear in linears})
        raise ValueError(
            f"target_modules: {', '.join(map(repr, unmatched))}{kind} matches no linear layer of this "
            f"{model.config.model_type} model. The names that exist: {', '.join(known)} (or 'all-linear')"
        )
    indices, depth = config.layers_to_transform, model.config.num_hidden_layers
    indices = (indices,) if isinstance(indices, int) else indices or ()
    if beyond := [index for index in indices if not 0 <= index < depth]:
        raise ValueError(f"layers_to_transform names {beyond}, but the model's layers are 0 to {depth - 1}")
    _warn_of_idle_options(config, names)


def _warn_of_idle_options(config: LoraConfig, names: Sequence[str]) -> None:
    """Say what has no effect, as PEFT does for exclude_modules."""
    excluded = config.exclude_modules
    idle = [("exclude_modules", x) for x in ((excluded,) if isinstance(excluded, str) else excluded or ())]
    if isinstance(excluded, str):
        idle = [] if any(re.fullmatch(excluded, name) for name in names) else idle
    else:
        idle = [(option, x) for option, x in idle if not any(_names([x], name) for name in names)]
    for option in ("rank_pattern", "alpha_pattern"):
        for expression, _ in getattr(config, option):
            if not any(re.match(rf"(.*\.)?({expression})$", name) for name in names):
                idle.append((option, expression))
    for option, expression in idle:
        warnings.warn(f"{option}: {expression!r} matches no linear layer, and changes nothing", stacklevel=2)


def add_adapters(model: CausalLM, config: LoraConfig, key: Any) -> None:
    """Put fresh adapters on the model's linears, in place, both matrices float32, as `config.init_lora_weights` says.

    Each matrix is drawn from `key` folded with its checkpoint name, so that it does not depend on how layers are
    stacked or which others are targets.

    Raises:
        TypeError: "pissa" on a quantised weight, as in PEFT.
        ValueError: see `target_ranks`, and a start from the weight of a rank that the weight has not.
    """
    targets = target_ranks(model, config)
    if config.changes_base:
        check_start(config, targets)
    for target, ranks in targets:
        if config.changes_base:
            start_from_base(target, ranks, config, key)
            continue
        linear: Linear = target.node
        r = max(ranks)
        a = jnp.zeros((len(ranks), r, linear.in_features), jnp.float32)
        b = jnp.zeros((len(ranks), linear.out_features, r), jnp.float32)
        keys = _keys(key, target)
        for rank in sorted(set(ranks) - {0}):
            layers = jnp.asarray([i for i, other in enumerate(ranks) if other == rank])
            drawn = jax.vmap(
                lambda k, rank=rank, linear=linear: lora_init.draw(
                    config.init_lora_weights, k, rank, linear.in_features, linear.out_features
                )
            )(keys[layers])
            a, b = a.at[layers, :rank].set(drawn[0]), b.at[layers, :, :rank].set(drawn[1])
        attach_stack(target, a, b, config, ranks)


def _keys(key: Any, target: Named) -> jax.Array:
    return jnp.stack([jax.random.fold_in(key, zlib.crc32(name.encode())) for name in target.names()])


def attach_stack(target: Named, a, b, config: LoraConfig, ranks: tuple[int, ...]) -> None:
    """`attach` of matrices that have a leading axis even if the linear is no stack."""
    scaling = jnp.asarray([config.scaling_of(name) for name in target.names()], jnp.float32)
    parts = (a, b, scaling) if target.layers else (a[0], b[0], scaling[0])
    attach(target.node, *parts, config.lora_dropout, ranks)


def check_start(config: LoraConfig, targets: list[tuple[Named, tuple[int, ...]]]) -> None:
    """Refuse a start from the weights that these weights do not allow, before anything is changed."""
    for target, ranks in targets:
        linear = target.node
        if isinstance(linear.weight.get_value(), QuantizedArray) and config.init_lora_weights != "olora":
            raise TypeError(
                f"init_lora_weights={config.init_lora_weights!r} needs the weights in float32, float16 or bfloat16, "
                f"and {target.name} is quantised: load the model with load_in_16bit=True, or use 'olora', which "
                "quantises what is left of the weight anew"
            )
        if max(ranks) > min(linear.in_features, linear.out_features):
            raise ValueError(
                f"init_lora_weights={config.init_lora_weights!r} takes as many directions out of {target.name} as the "
                f"rank says, {max(ranks)}, but it is [{linear.out_features}, {linear.in_features}]"
            )


def start_from_base(target: Named, ranks: tuple[int, ...], config: LoraConfig, key: Any) -> None:
    """Adapters made of the weight's largest directions, which are taken out of the weight: `lora_init.principal`."""
    linear: Linear = target.node
    a = np.zeros((len(ranks), max(ranks), linear.in_features), np.float32)
    b = np.zeros((len(ranks), linear.out_features, max(ranks)), np.float32)
    stored, keys, layers = linear.weight.get_value(), _keys(key, target), []
    for i, (name, rank) in enumerate(zip(target.names(), ranks, strict=True)):
        one = jax.tree.map(operator.itemgetter(i), stored) if target.layers else stored
        if rank:
            weight = quant.dequantize(one, jnp.float32) if isinstance(one, QuantizedArray) else one.astype(jnp.float32)
            scaling = config.scaling_of(name)
            low = lora_init.principal(str(config.init_lora_weights), keys[i], weight, rank, scaling)
            rest = lora_init.residual(config, name, weight, *low)
            one = _stored_like(one, rest)
            a[i, :rank], b[i, :, :rank] = low
        layers.append(one)
    linear.weight.set_value(jax.tree.map(lambda *x: jnp.stack(x), *layers) if target.layers else layers[0])
    attach_stack(target, jnp.asarray(a), jnp.asarray(b), config, ranks)
    linear.lora_start_A = AdapterStart(jnp.copy(linear.lora_A.get_value()), axes=linear.lora_A.axes)
    linear.lora_start_B = AdapterStart(jnp.copy(linear.lora_B.get_value()), axes=linear.lora_B.axes)


def _stored_like(weight: Any, new: jax.Array) -> Any:
    """A float32 matrix in the dtype, or quantised as, another weight."""
    if not isinstance(weight, QuantizedArray):
        return new.astype(weight.dtype)
    nested = weight.nested_absmax is not None
    return quant.quantize(new, scheme=weight.scheme, double_quant=nested, dtype=weight.dtype)


def attach(linear: Linear, a, b, scaling, dropout: float, ranks: tuple[int, ...] | None = None) -> None:
    """Give a linear its adapter: a [*stack, r, in], b [*stack, out, r], scaling [*stack].

    `ranks` are those of the layers, 0 for a layer without adapter; by default r for all. A layer of a lower rank uses
    its first rows of A and columns of B, and the rest is padding: the scaling becomes [*stack, r], with zeros there,
    so that nothing which stands in the padding is seen or ever learns.
    """
    lead = ("layers",) if linear.stack is not None else ()
    out_axis, in_axis = linear.axes
    r = a.shape[-2]
    ranks = (r,) * (linear.stack or 1) if ranks is None else ranks
    padded = set(ranks) != {r}
    if padded:
        scaling = jnp.where(jnp.arange(r) < jnp.asarray(ranks)[:, None], scaling[:, None], jnp.zeros((), jnp.float32))
    linear.lora_A = LoraParam(a, axes=(*lead, "rank", in_axis))
    linear.lora_B = LoraParam(b, axes=(*lead, out_axis, "rank"))
    linear.lora_scaling = AdapterScale(scaling, axes=(*lead, "rank") if padded else lead)
    linear.lora_dropout, linear.lora_ranks = dropout, ranks


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerAdapter:
    """The adapter of one module, without padding, on the host: a [r, in], b [out, r], float32.

    name: the module's path in the checkpoint. It is meant for the checkpoint's own weight: where a start was taken out
    of that, it is [A; A_0] and [B, -B_0], of twice the rank, as PEFT converts such adapters.
    """

    name: str
    a: np.ndarray
    b: np.ndarray
    scaling: float

    @property
    def rank(self) -> int:
        return self.a.shape[0]


def layer_adapters(linear: Named) -> Iterator[LayerAdapter]:
    """The adapters of a linear, one for each layer that has one."""
    node = linear.node
    a, b, scaling = (np.asarray(v.get_value()) for v in (node.lora_A, node.lora_B, node.lora_scaling))
    start = None
    if node.lora_start_A is not None:
        start = [np.asarray(v.get_value()) for v in (node.lora_start_A, node.lora_start_B)]
    if not linear.layers:
        a, b, scaling = a[None], b[None], scaling[None]
        start = None if start is None else [part[None] for part in start]
    for i, (name, rank) in enumerate(zip(linear.names(), node.lora_ranks, strict=True)):
        if rank:
            factor = float(scaling[i] if scaling.ndim == 1 else scaling[i, 0])
            parts = [(a[i, :rank], b[i, :, :rank])]
            if start is not None:
                parts.append((start[0][i, :rank], -start[1][i, :, :rank]))
            yield LayerAdapter(
                name=name,
                a=np.concatenate([part[0] for part in parts]),
                b=np.concatenate([part[1] for part in parts], axis=1),
                scaling=factor,
            )


def adapters(model: CausalLM) -> list[Named]:
    """The linears that carry an adapter."""
    return [linear for linear in named_nodes(model, Linear) if linear.node.lora_A is not None]


def partition(model: nnx.Module) -> tuple[nnx.GraphDef, nnx.State, nnx.State]:
    """Split a model in three: (graphdef, trainable, frozen). `nnx.merge` of the three is the model again.

        {"q_proj": {"weight": BaseParam, "lora_A": LoraParam, "lora_B": LoraParam}}
        -> trainable {"q_proj": {"lora_A", "lora_B"}},  frozen {"q_proj": {"weight"}}

    `trainable` holds just what learns, and is what to differentiate and to hand to an optimizer.
    """
    graphdef, trainable, frozen = nnx.split(model, nnx.Param, ...)
    return graphdef, trainable, frozen


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


def _padding(linear: Linear) -> int:
    """Number of entries of A and B that stand in no layer's adapter."""
    r = linear.lora_A.get_value().shape[-2]
    return sum(r - rank for rank in linear.lora_ranks) * (linear.in_features + linear.out_features)


def get_nb_trainable_parameters(model: CausalLM) -> tuple[int, int]:
    """(trainable, all) as PEFT counts them: adapters are part of "all", and a tied head is counted once."""
    padding = sum(_padding(linear.node) for linear in adapters(model))
    trainable = sum(_size(p.node.get_value()) for p in named_nodes(model, nnx.Param)) - padding
    frozen = sum(
        _size(p.node.get_value())
        for p in named_nodes(model, nnx.Variable)
        if not isinstance(p.node, nnx.Param | AdapterConstant)
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
    return jnp.matmul(b * scaling, a, precision=jax.lax.Precision.HIGHEST)
