"""Adapters apart from their model: taken off and put on, added up, and stacked to train many at once.

An `Adapter` is everything that `lora.add_adapters` hangs on modules, under the modules' names in the checkpoint. A
model carries one; the others wait beside it and cost only their own size.

A stack of N adapters is one adapter whose every array has a leading axis [N], over one frozen base:

    stack = jaxlora.stack_adapters(model, [adapter, other])
    step = jaxlora.make_train_step(stack.graphdef, optimizer)
    step = jax.jit(jax.vmap(step, in_axes=(0, stack.frozen_axes, None)), donate_argnums=0)   # None: the same batch
    state = jax.vmap(lambda t: jaxlora.TrainState.create(t, optimizer))(stack.trainable)
    state, metrics = step(state, stack.frozen, batch)                                       # metrics["loss"] is [N]
    adapter, other = stack.unstack(state.trainable)
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxlora import lora
from jaxlora.config import LoraConfig
from jaxlora.lora_targets import target_ranks
from jaxlora.model import CausalLM, Named, named_nodes
from jaxlora.variables import (
    Adaptable,
    Adapted,
    AdapterConstant,
    AdapterScale,
    BaseSquare,
    Copy,
    LayerMask,
    LoraParam,
    Weighted,
)

_COPY_FIELDS = ("trained_weight", "trained_bias")
_ADAPTER_FIELDS = ("lora_A", "lora_B", "lora_scaling", "lora_ranks")
_MODULE_FIELDS = (
    "lora_magnitude",
    "lora_base_square",
    "lora_start_A",
    "lora_start_B",
    "lora_dropout",
    "lora_owns_base",
)
_CARRIERS = (Weighted, Adaptable)
COMBINATIONS = ("linear", "cat", "svd")


@dataclasses.dataclass(frozen=True, eq=False)
class Adapter:
    """An adapter without its model. modules: {checkpoint name: {field of the module: value}}, a stack of layers being
    under its first layer's name."""

    config: LoraConfig
    modules: Mapping[str, Mapping[str, Any]]


def _fields(node: Any) -> tuple[str, ...]:
    """What an adapter may hang on this module."""
    kinds = ((Weighted, _COPY_FIELDS), (Adaptable, _ADAPTER_FIELDS), (Adapted, _MODULE_FIELDS))
    return tuple(name for kind, names in kinds if isinstance(node, kind) for name in names)


def _by_name(model: CausalLM) -> dict[str, Named]:
    """What may carry a part of an adapter, under the names of `Adapter.modules`. Not `Named.name`, which stacks of like
    layers share."""
    return {module.names()[0]: module for module in named_nodes(model, _CARRIERS)}


class Shelf:
    """The adapters of a model by their names. Only the active one is on the model; the others are here.

    Part of the model as a plain object, so that no program takes the waiting adapters as arguments.
    """

    def __init__(self):
        self.active: str | None = None
        self.waiting: dict[str, Adapter] = {}


# ---- On and off ------------------------------------------------------------------------------------------------------


def new_adapter(model: CausalLM, config: LoraConfig, key: Any, init_dataset: Any = None) -> Adapter:
    """A fresh adapter for a model, which stays as it is; see `lora.add_adapters`.

    Raises:
        ValueError: see `lora.add_adapters`; the model carries an adapter, or the start would change its weights.
    """
    if lora.adapters(model):
        raise ValueError("the model carries an adapter: take it off first (jaxlora.take_adapter)")
    check_shares_base(config)
    return take_adapter(model, lora.add_adapters(model, config, key, init_dataset))


def take_adapter(model: CausalLM, config: LoraConfig) -> Adapter:
    """Take the adapter off a model, in place: what stays is the base.

    Raises:
        ValueError: the model carries none, or one that changed the base's weights.
    """
    if not lora.adapters(model):
        raise ValueError("the model carries no adapter")
    check_shares_base(config)
    modules = {}
    for key, module in _by_name(model).items():
        values = {name: getattr(module.node, name) for name in _fields(module.node)}
        if any(values.get(name) is not None for name in ("lora_A", *_COPY_FIELDS)):
            modules[key] = values
    lora.remove_adapters(model)
    return Adapter(config, modules)


def put_adapter(model: CausalLM, adapter: Adapter) -> None:
    """Put an adapter on a model, in place.

    Raises:
        ValueError: the model carries one already, or has no such modules.
    """
    if lora.adapters(model):
        raise ValueError("the model carries an adapter: take it off first (jaxlora.take_adapter)")
    nodes = _by_name(model)
    if missing := sorted(adapter.modules.keys() - nodes.keys()):
        raise ValueError(f"the adapter is another model's: this one has no {', '.join(missing[:4])}")
    for name, fields in adapter.modules.items():
        for field, value in fields.items():
            setattr(nodes[name].node, field, nnx.data(value) if value is None else value)
    lora.tie_adapters(model, adapter.config)


def check_shares_base(config: LoraConfig) -> None:
    """Refuse an adapter that others cannot stand beside.

    Raises:
        ValueError: its start changed the weights of the base.
    """
    if config.changes_base:
        raise ValueError(
            f"init_lora_weights={config.init_lora_weights!r} changed the weights of the base, which adapters share: "
            "save it with save_pretrained, which writes a plain adapter of it (but for 'loftq'), and load that"
        )


# ---- Sums ------------------------------------------------------------------------------------------------------------


def weighted_adapter(
    model: CausalLM,
    adapters: Sequence[Adapter],
    weights: Sequence[float],
    combination_type: str = "svd",
    svd_rank: int | None = None,
) -> Adapter:
    """One adapter of several: sum of weight * scaling * B A, as PEFT's `add_weighted_adapter` makes it.

    Args:
        combination_type: "cat" puts the matrices side by side, which is exact, of the sum of their ranks. "svd" takes
            the best approximation of `svd_rank`, by default the largest rank among them. "linear" adds up A and B
            themselves, for adapters of the same rank that came from the same start.

    Raises:
        ValueError: an unknown combination, "linear" with different ranks, an adapter with DoRA, or with copies that
            learn, of which there is no sum, or one on experts.
    """
    if combination_type not in COMBINATIONS:
        raise ValueError(f"combination_type {combination_type!r} is not one of {', '.join(COMBINATIONS)}")
    if len(adapters) != len(weights) or not adapters:
        raise ValueError(f"{len(adapters)} adapters need as many weights, found {len(weights)}")
    for adapter in adapters:
        if adapter.config.use_dora or adapter.config.bias != "none" or adapter.config.modules_to_save:
            raise ValueError("an adapter with use_dora, bias or modules_to_save cannot be added to another")
        if adapter.config.target_parameters:
            raise ValueError("an adapter with target_parameters cannot be added to another, as in PEFT")
    parts: dict[str, list[tuple[float, lora.LayerAdapter]]] = {}
    for adapter, weight in zip(adapters, weights, strict=True):
        put_adapter(model, adapter)
        for module in lora.adapters(model):
            for one in lora.layer_adapters(model, module):
                parts.setdefault(one.name, []).append((float(weight), one))
        take_adapter(model, adapter.config)
    combined = {name: _combine(found, combination_type, svd_rank) for name, found in parts.items()}
    ranks = {name: a.shape[0] for name, (a, _) in combined.items()}
    rank = max(ranks.values())
    first = adapters[0].config
    config = dataclasses.replace(
        first, r=rank, lora_alpha=rank, use_rslora=False, target_modules=tuple(sorted(ranks)), exclude_modules=None,
        layers_to_transform=None, layers_pattern=None, init_lora_weights=True,
        rank_pattern={name: r for name, r in ranks.items() if r != rank},
        alpha_pattern={name: r for name, r in ranks.items() if r != rank},
    )  # fmt: skip
    for target, found in target_ranks(model, config):
        lora.attach_named(model, target, found, config, combined.__getitem__)
    return take_adapter(model, config)


def _combine(
    parts: list[tuple[float, lora.LayerAdapter]], combination_type: str, svd_rank: int | None
) -> tuple[np.ndarray, np.ndarray]:
    """A and B of one module, whose scaling is 1."""
    factors = [weight * one.scaling for weight, one in parts]
    if combination_type == "linear":
        if len({one.rank for _, one in parts}) > 1:
            ranks = sorted({one.rank for _, one in parts})
            raise ValueError(
                f'{parts[0][1].name}: combination_type "linear" adds adapters of one rank, found {ranks}: use "cat" or '
                '"svd"'
            )
        roots = [abs(factor) ** 0.5 for factor in factors]
        a = sum(root * one.a for root, (_, one) in zip(roots, parts, strict=True))
        signed = zip(roots, factors, parts, strict=True)
        b = sum(np.copysign(root, factor) * one.b for root, factor, (_, one) in signed)
    else:
        a = np.concatenate([one.a for _, one in parts])
        b = np.concatenate([factor * one.b for factor, (_, one) in zip(factors, parts, strict=True)], axis=1)
        if combination_type == "svd":
            rank = max(one.rank for _, one in parts) if svd_rank is None else svd_rank
            u, s, vh = np.linalg.svd(b @ a, full_matrices=False)
            a, b = vh[:rank], u[:, :rank] * s[:rank]
    return np.asarray(a, np.float32), np.asarray(b, np.float32)


# ---- Stacks ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class AdapterStack:
    """N adapters over one base, as a graph definition and two pytrees.

    trainable: every array [N, ...]. frozen: the base, and what is constant about the adapters, [N, ...]. frozen_axes:
    the axis of N in `frozen`, 0 or None, for `jax.vmap`.
    """

    graphdef: nnx.GraphDef
    trainable: nnx.State
    frozen: nnx.State
    frozen_axes: nnx.State
    adapters: tuple[Adapter, ...]

    def unstack(self, trainable: nnx.State) -> list[Adapter]:
        """The adapters, each with its own rank again, of trained parameters [N, ...]."""
        found = []
        for index, adapter in enumerate(self.adapters):
            model = nnx.merge(self.graphdef, jax.tree.map(operator.itemgetter(index), trainable), self.frozen)
            nodes = _by_name(model)
            found.append(
                Adapter(
                    adapter.config,
                    {name: _cut(nodes[name].node, fields) for name, fields in adapter.modules.items()},
                )
            )
        return found


def stack_adapters(model: CausalLM, adapters: Sequence[Adapter]) -> AdapterStack:
    """Stack adapters of one model, to train or to run them in one `jax.vmap`; see the head of this module.

    Smaller ranks are padded to the largest, and a module that has no adapter in one of them gets one of rank 0: padding
    is multiplied by zero, so that it changes nothing and never learns. The model stays as it is, without an adapter.

    Raises:
        ValueError: no adapter, or adapters that differ in dropout, DoRA, biases, `modules_to_save` or
            `ensure_weight_tying`, for which one program cannot stand.
    """
    if not adapters:
        raise ValueError("there is no adapter to stack")
    for name in ("lora_dropout", "use_dora", "bias", "modules_to_save", "ensure_weight_tying"):
        values = [getattr(adapter.config, name) for adapter in adapters]
        if any(value != values[0] for value in values):
            raise ValueError(f"adapters of one stack must agree in {name}, found {values}")
    nodes = _by_name(model)
    names = list(dict.fromkeys(name for adapter in adapters for name in adapter.modules))
    modules = {name: _stack(nodes[name], [adapter.modules.get(name) for adapter in adapters]) for name in names}
    put_adapter(model, Adapter(adapters[0].config, modules))
    try:
        graphdef, trainable, constants, base = nnx.split(model, nnx.Param, AdapterConstant, ...)
    finally:
        take_adapter(model, adapters[0].config)
    axes = nnx.merge_state(jax.tree.map(lambda _: 0, constants), jax.tree.map(lambda _: None, base))
    return AdapterStack(graphdef, trainable, nnx.merge_state(constants, base), axes, tuple(adapters))


def _stack(module: Named, adapters: list[Mapping[str, Any] | None]) -> dict[str, Any]:
    """The fields of one module with those of all adapters in them; None is an adapter that has none there."""
    node: Adaptable = module.node
    copies = [field for field in _fields(node) if field in _COPY_FIELDS]
    fields: dict[str, Any] = {
        field: _stack_copies(module.name, field, [(adapter or {}).get(field) for adapter in adapters])
        for field in copies
    }
    present = [adapter for adapter in adapters if adapter is not None and adapter.get("lora_A") is not None]
    if not present:
        return fields
    lead, r = (() if node.stack is None else (node.stack,)), max(x["lora_A"].get_value().shape[-2] for x in present)
    adapters = [x if x is not None and x.get("lora_A") is not None else None for x in adapters]

    def padded(adapter, field, shape):
        if adapter is None:
            return jnp.zeros(shape, jnp.float32)
        value = adapter[field].get_value()
        if field == "lora_scaling" and value.ndim == len(lead):  # one for all ranks
            value = jnp.broadcast_to(value[..., None], (*lead, adapter["lora_A"].get_value().shape[-2]))
        return jnp.pad(value, [(0, wanted - found) for wanted, found in zip(shape, value.shape, strict=True)])

    def stacked(field, shape):
        return jnp.stack([padded(adapter, field, shape) for adapter in adapters])

    first, layers = present[0], (() if node.stack is None else ("layers",))
    ranks = [(0,) * (node.stack or 1) if x is None else x["lora_ranks"] for x in adapters]
    fields |= dict(first) | {field: fields[field] for field in copies}
    for name, shape in (("lora_A", (r, node.in_features)), ("lora_B", (node.out_features, r))):
        fields[name] = LoraParam(stacked(name, (*lead, *node.experts, *shape)), axes=(None, *first[name].axes))
    fields["lora_scaling"] = AdapterScale(stacked("lora_scaling", (*lead, r)), axes=(None, *layers, "rank"))
    fields["lora_ranks"] = tuple(map(max, zip(*ranks, strict=True)))
    if first.get("lora_magnitude") is not None:
        square = first["lora_base_square"]
        magnitudes = [(square if x is None else x["lora_magnitude"]).get_value() for x in adapters]
        fields["lora_magnitude"] = LoraParam(jnp.stack(magnitudes), axes=(None, *first["lora_magnitude"].axes))
        fields["lora_base_square"] = BaseSquare(
            jnp.stack([square.get_value()] * len(adapters)), axes=(None, *square.axes)
        )
    return fields


def _stack_copies(name: str, field: str, copies: list[Copy | None]) -> Copy | None:
    given = [copy for copy in copies if copy is not None]
    if not given:
        return None
    if len(given) < len(copies) or any(copy.layers != given[0].layers for copy in given):
        raise ValueError(f"adapters of one stack must learn the same copies, and not all learn {name}'s {field[8:]}")
    values = jnp.stack([copy.value.get_value() for copy in given])
    stacked = Copy(values, (None, *given[0].value.axes), given[0].layers)
    if stacked.mask is not None:
        mask = jnp.broadcast_to(jnp.asarray(given[0].layers), (len(given), len(given[0].layers)))
        stacked.mask = LayerMask(mask, axes=(None, "layers"))
    return stacked


def _cut(node: Any, fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of one adapter with what a module of the stack has learnt in them, without the stack's padding."""
    found = dict(fields)
    if fields.get("lora_A") is not None:
        r = fields["lora_A"].get_value().shape[-2]
        learnt = {
            "lora_A": node.lora_A.get_value()[..., :r, :],
            "lora_B": node.lora_B.get_value()[..., :r],
        }
        if fields.get("lora_magnitude") is not None:
            learnt["lora_magnitude"] = node.lora_magnitude.get_value()
        found |= {field: LoraParam(value, axes=fields[field].axes) for field, value in learnt.items()}
    for field in _COPY_FIELDS:
        if fields.get(field) is not None:
            found[field] = nnx.clone(fields[field])
            found[field].value.set_value(getattr(node, field).value.get_value())
    return found
