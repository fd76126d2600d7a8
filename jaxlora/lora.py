"""Adapters: put them on a model, split what learns from what is frozen, count, and add them into the weights.

`lora_targets` says which modules a config means, `lora_init` where an adapter starts.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import operator
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from jaxlora import data_starts, lora_init, quant
from jaxlora.config import LoraConfig
from jaxlora.kernels.fake_quant import GROUP, SCHEMES
from jaxlora.kernels.lora import row_norms
from jaxlora.layers import Embedding, Linear
from jaxlora.lora_targets import copied, target_ranks
from jaxlora.model import CausalLM, Named, named_nodes
from jaxlora.moe import ExpertAdapter, Experts
from jaxlora.norms import Norm
from jaxlora.quant import QuantizedArray
from jaxlora.variables import (
    Adaptable,
    Adapted,
    AdapterConstant,
    AdapterScale,
    AdapterStart,
    BaseParam,
    BaseSquare,
    Buffer,
    Copy,
    LoraParam,
    TrainableParam,
    Weighted,
)


def add_adapters(model: CausalLM, config: LoraConfig, key: Any, init_dataset: Any = None) -> LoraConfig:
    """Put fresh adapters on the model's modules, in place, all float32, as `config` says, and copies that learn.

    Each matrix is drawn from `key` folded with its checkpoint name, so that it does not depend on how layers are
    stacked or which others are targets.

    Args:
        init_dataset: what "eva" and "corda" start from, batches of tokens; see `FastLanguageModel.get_peft_model`.

    Returns:
        The settings of the adapters that are there: `config`, but for "eva", whose data chooses the ranks.

    Raises:
        TypeError: "pissa", "corda" or "loftq" on a quantised weight, as in PEFT.
        ValueError: see `lora_targets`; a start from the weight of a rank that the weight has not; a start from data
            without data, and see `data_starts`.
    """
    targets, copies = target_ranks(model, config), list(copied(model, config))
    check_start(config, targets)
    data_starts.check_dataset(config, init_dataset)
    starts: Any = {}
    if config.init_lora_weights == "corda":
        starts = data_starts.corda(model, targets, config, init_dataset)
    elif config.init_lora_weights == "eva":
        assert init_dataset is not None
        config, starts = data_starts.eva(model, targets, config, init_dataset)
        targets = target_ranks(model, config)
    from_base = [config.changes_base and not isinstance(target.node, Embedding) for target, _ in targets]
    plans = (
        Drawing.of(target, ranks, config)
        for (target, ranks), is_from_base in zip(targets, from_base, strict=True)
        if not is_from_base
    )
    matrices = iter(_drawn(key, tuple(plans)))
    for (target, ranks), is_from_base in zip(targets, from_base, strict=True):
        if is_from_base:
            start_from_base(model, target, ranks, config, key, starts)
            continue
        a, b = next(matrices)
        for i, name in enumerate(target.names()):
            if name in starts:
                a = a.at[i, : ranks[i]].set(starts[name])
        attach_stack(model, target, a, b, config, ranks)
    for copy in copies:
        add_copy(model, copy.module, copy.part, copy.layers)
    tie_adapters(model, config)
    return config


def tie_adapters(model: CausalLM, config: LoraConfig) -> None:
    """Let a tied head follow what its embedding learns, if `config` says so."""
    model.ties_adapters = config.ensure_weight_tying and model.lm_head.weight is None


def _shapes(module: Adaptable | Drawing, ranks: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shapes of A and B with a leading axis of layers, at the largest of their ranks."""
    lead, rank = (len(ranks), *module.experts), max(ranks)
    return (*lead, rank, module.in_features), (*lead, module.out_features, rank)


@dataclasses.dataclass(frozen=True)
class Drawing:
    """What a stack's A and B are drawn by: the checkpoint names of its layers and their ranks, `init_lora_weights`, and
    of the module its shape and kind."""

    names: tuple[str, ...]
    ranks: tuple[int, ...]
    kind: bool | str
    experts: tuple[int, ...]
    in_features: int
    out_features: int
    is_embedding: bool

    @classmethod
    def of(cls, target: Named, ranks: tuple[int, ...], config: LoraConfig) -> Drawing:
        node: Adaptable = target.node
        shape = tuple(node.experts), node.in_features, node.out_features
        return cls(tuple(target.names()), tuple(ranks), config.init_lora_weights, *shape, isinstance(node, Embedding))

    def draw(self, key: Any, *, rank: int) -> tuple[jax.Array, jax.Array]:
        """A and B of one layer."""
        if self.experts:
            count = math.prod(self.experts)
            return lora_init.draw_experts(self.kind, key, count, rank, self.in_features, self.out_features)
        draw = lora_init.draw_embedding if self.is_embedding else lora_init.draw
        return draw(self.kind, key, rank, self.in_features, self.out_features)


# One program for all, since a few dozen small ones take seconds to compile, and kept for the next model of the shape.
@functools.partial(jax.jit, static_argnames="drawings")
def _drawn(key: Any, drawings: tuple[Drawing, ...]) -> list[tuple[jax.Array, jax.Array]]:
    """A and B of each with a leading axis of layers, drawn for each layer at its rank, and zero beyond it."""
    matrices = []
    for each in drawings:
        a, b = (jnp.zeros(shape, jnp.float32) for shape in _shapes(each, each.ranks))
        keys = _keys(key, each.names)
        for rank in sorted(set(each.ranks) - {0}):
            layers = jnp.asarray([i for i, other in enumerate(each.ranks) if other == rank])
            new_a, new_b = jax.vmap(functools.partial(each.draw, rank=rank))(keys[layers])
            a, b = a.at[layers, ..., :rank, :].set(new_a), b.at[layers, ..., :rank].set(new_b)
        matrices.append((a, b))
    return matrices


def _keys(key: Any, names: Sequence[str]) -> jax.Array:
    marks = jnp.asarray([zlib.crc32(name.encode()) for name in names], jnp.uint32)
    return jax.vmap(jax.random.fold_in, (None, 0))(key, marks)


def attach_stack(model: CausalLM, target: Named, a, b, config: LoraConfig, ranks: tuple[int, ...]) -> None:
    """`attach` of matrices that have a leading axis even if the module is no stack; with DoRA, magnitudes that leave
    the model as it is when B A = 0."""
    module: Adaptable = target.node
    scaling = jnp.asarray([config.scaling_of(name) for name in target.names()], jnp.float32)
    parts = (a, b, scaling) if target.layers else (a[0], b[0], scaling[0])
    attach(module, *parts, config.lora_dropout, ranks)
    if config.use_dora and isinstance(module, Adapted):
        square, norms = _row_norms(model, module)
        axes = (*(("layers",) if target.layers else ()), module.axes[0])
        module.lora_base_square = BaseSquare(square, axes=axes)
        module.lora_magnitude = LoraParam(norms, axes=axes)


def _row_norms(model: CausalLM, module: Adapted) -> tuple[jax.Array, jax.Array]:
    """||w||^2 and ||w + scaling b A|| of each output, [*stack, out], from one layer's float32 weight at a time."""

    def one(layer: int | None):
        weight = float_weight(model, module, layer)
        a, b, scaling = (_of_layer(v.get_value(), layer) for v in (module.lora_A, module.lora_B, module.lora_scaling))
        square = jnp.sum(weight * weight, axis=-1)
        product = jnp.matmul(a, weight.T, precision=jax.lax.Precision.HIGHEST)
        return square, row_norms(product, a, b, scaling, square)

    if module.stack is None:
        return one(None)
    squares, norms = zip(*(one(layer) for layer in range(module.stack)), strict=True)
    return jnp.stack(squares), jnp.stack(norms)


def float_weight(model: CausalLM, module: Adapted, layer: int | None) -> Float[Array, "out in"]:
    """The weight that an adapter of this module adds to, of one layer: [out, in] in float32. A tied head's, and an
    embedding's, are made of the table."""
    owner = model.model.embed_tokens if module.weight is None else module
    weight = _of_layer(owner.weight.get_value(), layer)
    weight = quant.dequantize(weight, jnp.float32) if isinstance(weight, QuantizedArray) else weight
    return (weight.T if isinstance(module, Embedding) else weight).astype(jnp.float32)


def _of_layer(value: Any, layer: int | None) -> Any:
    return value if layer is None else jax.tree.map(operator.itemgetter(layer), value)


def add_copy(model: CausalLM, module: Named, part: str, layers: tuple[bool, ...]) -> None:
    """Let a copy of a module's weight or bias learn in its place, see `variables.Copy`."""
    node: Weighted = module.node
    base = model.model.embed_tokens.weight if getattr(node, part) is None else getattr(node, part)
    setattr(node, f"trained_{part}", Copy(base.get_value(), base.get_metadata()["axes"], layers))


def check_start(config: LoraConfig, targets: list[tuple[Named, tuple[int, ...]]]) -> None:
    """Refuse a start from the weights that these weights do not allow, before anything is changed."""
    init = config.init_lora_weights
    for target, ranks in targets if config.changes_base else ():
        module = target.node
        if isinstance(module, Embedding):
            continue
        if module.weight is None:
            raise ValueError(
                f"init_lora_weights={init!r} changes the weight that it starts from, and {target.name} is tied to the "
                "embedding, which must not change with it: leave it out of target_modules"
            )
        if isinstance(module.weight.get_value(), QuantizedArray) and init != "olora":
            raise TypeError(
                f"init_lora_weights={init!r} needs the weights in float32, float16 or bfloat16, and {target.name} is "
                "quantised: load the model with load_in_16bit=True, or use 'olora', which quantises what is left of "
                "the weight anew"
            )
        if max(ranks) > min(module.in_features, module.out_features):
            raise ValueError(
                f"init_lora_weights={init!r} takes as many directions out of {target.name} as the rank says, "
                f"{max(ranks)}, but it is [{module.out_features}, {module.in_features}]"
            )


def start_from_base(
    model: CausalLM,
    target: Named,
    ranks: tuple[int, ...],
    config: LoraConfig,
    key: Any,
    starts: Mapping[str, tuple[Any, Any]] | None = None,
) -> None:
    """An adapter made of the weight, which changes: see `lora_init.principal` and `lora_init.loftq`.

    starts: {module: (A, B)} that are to be taken out of the weights, where they are known already.
    """
    linear: Adapted = target.node
    a = np.zeros((len(ranks), max(ranks), linear.in_features), np.float32)
    b = np.zeros((len(ranks), linear.out_features, max(ranks)), np.float32)
    stored, keys, layers = linear.weight.get_value(), _keys(key, target.names()), []
    for i, (name, rank) in enumerate(zip(target.names(), ranks, strict=True)):
        one = _of_layer(stored, i if target.layers else None)
        if rank:
            weight = quant.dequantize(one, jnp.float32) if isinstance(one, QuantizedArray) else one.astype(jnp.float32)
            scaling = config.scaling_of(name)
            if config.takes_from_base:
                known = (starts or {}).get(name)
                low = known or lora_init.principal(str(config.init_lora_weights), keys[i], weight, rank, scaling)
                one = _stored_like(one, lora_init.residual(config, name, weight, *low))
            else:
                rest, low = lora_init.loftq(weight, rank, scaling, bits=config.loftq_bits, rounds=config.loftq_iter)
                rest = dataclasses.replace(rest, dtype=one.dtype)
                # Layers of one stack are stored alike.
                one = rest if all(ranks) else quant.dequantize(rest, one.dtype)
            a[i, :rank], b[i, :, :rank] = low
        layers.append(one)
    linear.weight.set_value(jax.tree.map(lambda *x: jnp.stack(x), *layers) if target.layers else layers[0])
    attach_stack(model, target, jnp.asarray(a), jnp.asarray(b), config, ranks)
    linear.lora_owns_base = not config.takes_from_base
    if config.takes_from_base:
        linear.lora_start_A = AdapterStart(jnp.copy(linear.lora_A.get_value()), axes=linear.lora_A.axes)
        linear.lora_start_B = AdapterStart(jnp.copy(linear.lora_B.get_value()), axes=linear.lora_B.axes)


def _stored_like(weight: Any, new: jax.Array) -> Any:
    """A float32 matrix in the dtype, or quantised as, another weight."""
    if not isinstance(weight, QuantizedArray):
        return new.astype(weight.dtype)
    nested = weight.nested_absmax is not None
    return quant.quantize(new, scheme=weight.scheme, double_quant=nested, dtype=weight.dtype)


def attach(module: Adaptable, a, b, scaling, dropout: float, ranks: tuple[int, ...] | None = None) -> None:
    """Give a module its adapter: a [*stack, *experts, r, in], b [*stack, *experts, out, r], scaling [*stack].

    `ranks` are those of the layers, 0 for a layer without adapter; by default r for all. A layer of a lower rank uses
    its first rows of A and columns of B, and the rest is padding: the scaling becomes [*stack, r], with zeros there,
    so that nothing which stands in the padding is seen or ever learns.
    """
    lead = ("layers",) if module.stack is not None else ()
    out_axis, in_axis = module.axes
    r = a.shape[-2]
    ranks = (r,) * (module.stack or 1) if ranks is None else ranks
    padded = set(ranks) != {r}
    if padded:
        scaling = jnp.where(jnp.arange(r) < jnp.asarray(ranks)[:, None], scaling[:, None], jnp.zeros((), jnp.float32))
    of_experts = ("experts",) * len(module.experts)
    module.lora_A = LoraParam(a, axes=(*lead, *of_experts, "rank", in_axis))
    module.lora_B = LoraParam(b, axes=(*lead, *of_experts, out_axis, "rank"))
    module.lora_scaling = AdapterScale(scaling, axes=(*lead, "rank") if padded else lead)
    module.lora_ranks = ranks
    if isinstance(module, Adapted):  # experts have none
        module.lora_dropout = dropout


def attach_named(
    model: CausalLM,
    target: Named,
    ranks: tuple[int, ...],
    config: LoraConfig,
    read: Callable[[str], Sequence[np.ndarray]],
) -> None:
    """Give a module the adapter that `read` has for each of its names: A [*experts, r, in], B [*experts, out, r] and,
    with DoRA, the magnitudes [out]. A base that the adapter's start changed is changed in the same way again, as PEFT
    does."""
    node = target.node
    values = [np.zeros(shape, np.float32) for shape in _shapes(node, ranks)]
    values.append(np.ones((len(ranks), node.out_features), np.float32))
    for i, (name, rank) in enumerate(zip(target.names(), ranks, strict=True)):
        if rank:
            places = (values[0][i, ..., :rank, :], values[1][i, ..., :rank], values[2][i])
            for place, value in zip(places, read(name), strict=False):
                place[...] = value
    a, b, magnitude = (jnp.asarray(value) for value in values)
    if config.changes_base and not isinstance(node, Embedding):
        start_from_base(model, target, ranks, config, jax.random.key(0))
        node.lora_A.set_value(a if target.layers else a[0])
        node.lora_B.set_value(b if target.layers else b[0])
    else:
        attach_stack(model, target, a, b, config, ranks)
    if config.use_dora:
        node.lora_magnitude.set_value(magnitude if target.layers else magnitude[0])


# ---- What is there ---------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerAdapter:
    """The adapter of one module, without padding, on the host, float32: a [*experts, r, in], b [*experts, out, r],
    magnitude None or [out].

    name: the module's path in the checkpoint, or that of the experts' parameter in transformers. It is meant for the
    checkpoint's own weight: where a start was taken out of that, it is [A; A_0] and [B, -B_0], of twice the rank, as
    PEFT converts such adapters. is_table: whether the weight is an embedding, [in, out]. base: None, or what gives the
    weight [out, in] that stands here in place of the checkpoint's (LoftQ's).
    """

    name: str
    a: np.ndarray
    b: np.ndarray
    magnitude: np.ndarray | None
    scaling: float
    is_table: bool = False
    base: Callable[[], jax.Array] | None = None

    @property
    def rank(self) -> int:
        return self.a.shape[-2]

    @property
    def weight_shape(self) -> tuple[int, int]:
        """That of the weight in the checkpoint."""
        shape = (self.b.shape[0], self.a.shape[1])
        return shape[::-1] if self.is_table else shape

    def merge(self, weight: np.ndarray) -> np.ndarray:
        """W + scaling * B A, float32, of the checkpoint's weight, in its orientation; with DoRA each output of it
        scaled to its magnitude."""
        weight = weight.T if self.is_table else weight
        if self.base is not None:
            weight = np.asarray(self.base())
        merged = weight.astype(np.float32) + self.scaling * (self.b @ self.a)
        if self.magnitude is not None:
            merged *= (self.magnitude / np.linalg.norm(merged, axis=1))[:, None]
        return merged.T if self.is_table else merged


def layer_adapters(model: CausalLM, target: Named) -> Iterator[LayerAdapter]:
    """The adapters of a module, one for each layer that has one."""
    node: Adaptable = target.node
    parts = [node.lora_A, node.lora_B, node.lora_scaling]
    parts += [node.lora_magnitude, node.lora_start_A, node.lora_start_B] if isinstance(node, Adapted) else [None] * 3
    a, b, scaling, magnitude, start_a, start_b = (
        None if part is None else np.asarray(part.get_value()) if target.layers else np.asarray(part.get_value())[None]
        for part in parts
    )
    assert a is not None and b is not None and scaling is not None
    for i, (name, rank) in enumerate(zip(target.names(), node.lora_ranks, strict=True)):
        if rank:
            low_a, low_b = a[i, ..., :rank, :], b[i, ..., :rank]
            if start_a is not None and start_b is not None:
                low_a = np.concatenate([low_a, start_a[i, :rank]])
                low_b = np.concatenate([low_b, -start_b[i, :, :rank]], axis=1)
            layer = i if target.layers else None
            yield LayerAdapter(
                name=name,
                a=low_a,
                b=low_b,
                magnitude=None if magnitude is None else magnitude[i],
                scaling=float(scaling[i] if scaling.ndim == 1 else scaling[i, 0]),
                is_table=isinstance(node, Embedding),
                base=functools.partial(float_weight, model, node, layer)
                if isinstance(node, Adapted) and node.lora_owns_base
                else None,
            )


def adapters(model: CausalLM) -> list[Named]:
    """The modules, and parameters of experts, that carry an adapter."""
    return [module for module in named_nodes(model, Adaptable) if module.node.lora_A is not None]


def remove_adapters(model: CausalLM) -> None:
    """Take adapters and copies off a model, in place: what stays is the base."""
    for module in list(named_nodes(model, (Weighted, Adaptable))):
        if isinstance(module.node, Weighted):
            module.node.without_copies()
        if isinstance(module.node, Adaptable):
            module.node.without_adapter()
    model.ties_adapters = False


Merge = Callable[[np.ndarray], np.ndarray]


def merges(model: CausalLM) -> Iterator[tuple[str, tuple[int, ...], Merge]]:
    """(name, shape, what puts the adapter into it) of every weight of the checkpoint that has an adapter."""
    for target in adapters(model):
        for adapter in layer_adapters(model, target):
            if isinstance(target.node, ExpertAdapter):
                yield from _expert_merges(model, target, adapter)
            else:
                yield f"{adapter.name}.weight", adapter.weight_shape, adapter.merge


def _expert_merges(
    model: CausalLM, target: Named, adapter: LayerAdapter
) -> Iterator[tuple[str, tuple[int, ...], Merge]]:
    """One for each tensor that the checkpoint has of one layer's parameter: for gate and up, an expert, or all."""
    owners = (owner.node.linears_of(target.node) for owner in named_nodes(model, Experts))
    linears, named = next(filter(None, owners)), {id(p.node): p for p in named_nodes(model, BaseParam)}
    layer, start = target.names().index(adapter.name), 0
    for linear in linears:
        rows = slice(start, start + linear.out_features)
        start = rows.stop
        for name, (index, *expert) in named[id(linear.weight)].places().items():
            if index == layer:
                a, b = adapter.a[tuple(expert)], adapter.b[(*expert, ..., rows, slice(None))]
                shape = (*a.shape[:-2], *((a.shape[-1], b.shape[-2]) if linear.in_out else (b.shape[-2], a.shape[-1])))
                yield name, shape, functools.partial(_merge_experts, a, b, adapter.scaling, linear.in_out)


def _merge_experts(a: np.ndarray, b: np.ndarray, scaling: float, in_out: bool, weight: np.ndarray) -> np.ndarray:
    delta = scaling * (b @ a)
    return weight.astype(np.float32) + (delta.swapaxes(-1, -2) if in_out else delta)


def trained_copies(model: CausalLM) -> Iterator[tuple[str, np.ndarray]]:
    """(checkpoint name, value) of every weight and bias of which a copy learns, float32 on the host."""
    for module in named_nodes(model, Weighted):
        for part in ("weight", "bias"):
            copy = getattr(module.node, f"trained_{part}")
            if copy is not None:
                value = np.asarray(copy.value.get_value())
                for i, (name, learns) in enumerate(zip(module.names(), copy.layers, strict=True)):
                    if learns:
                        yield f"{name}.{part}", value[i] if module.layers else value


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
    frozen = [
        (module, name, variable)
        for module, attributes in modules
        for name, variable in attributes.items()
        if isinstance(variable, BaseParam) and not isinstance(variable, Buffer)
    ]
    if any(isinstance(v.get_value(), QuantizedArray) for _, _, v in frozen):
        raise ValueError("a quantised model cannot learn as a whole: load it with full_finetuning=True")
    for module, name, variable in frozen:
        setattr(module, name, TrainableParam(variable.get_value(), axes=variable.get_metadata()["axes"]))


def multiply_in(model: CausalLM, matmul_dtype: str) -> None:
    """Let every linear of the blocks compute its products in another dtype, in place; see `fp8`. The head does not."""
    for linear in named_nodes(model, Linear):
        if linear.node.stack is not None:
            linear.node.matmul_dtype = matmul_dtype
    for norm in named_nodes(model, Norm):
        if norm.node.stack is not None:
            norm.node.read_in = matmul_dtype


def prepare_qat(model: CausalLM, scheme: str, lora_dropout: float = 0.0) -> None:
    """Let every linear of the blocks compute with what a scheme of `kernels.fake_quant` can hold, in place: its input,
    and its weight with the adapter merged. The head and the embedding stay as they are.

    Raises:
        ValueError: an unknown scheme, experts, a dropout of adapters, which cannot be merged, or a weight whose rows
            are not whole groups.
    """
    if scheme not in SCHEMES:
        raise ValueError(f"qat_scheme {scheme!r} is not one of {', '.join(SCHEMES)}")
    if model.config.num_experts:
        raise ValueError("qat_scheme: the experts of a mixture are not rounded, so this model cannot be trained for it")
    if lora_dropout:
        raise ValueError("qat_scheme rounds the merged weight, into which dropout cannot go: pass lora_dropout=0")
    linears = [linear for linear in named_nodes(model, Linear) if linear.layers]
    for linear in linears:
        if scheme.endswith("int4") and linear.node.in_features % GROUP:
            raise ValueError(
                f"qat_scheme {scheme!r} shares a scale among {GROUP} weights of a row, and {linear.name} has rows of "
                f"{linear.node.in_features}: use int8 or fp8-fp8"
            )
    for linear in linears:
        if linear.node.matmul_dtype is not None:
            raise ValueError(
                f"qat_scheme {scheme!r} rounds weights and inputs to what it will hold, and the model was loaded with "
                f"matmul_dtype={linear.node.matmul_dtype!r}, which rounds them otherwise: load it without"
            )
        linear.node.qat_scheme = scheme


def _size(value: Any) -> int:
    """Number of weights that a Variable's value stands for: a quantised array counts as what it dequantises to."""
    if isinstance(value, QuantizedArray):
        return value.size
    return value.size


def _padding(module: Adaptable) -> int:
    """Number of entries of an adapter that stand in no layer's."""
    r = module.lora_A.get_value().shape[-2]
    padding = sum(r - rank for rank in module.lora_ranks) * (module.in_features + module.out_features)
    padding *= math.prod(module.experts)
    has_magnitude = isinstance(module, Adapted) and module.lora_magnitude is not None
    return padding + (module.lora_ranks.count(0) * module.out_features if has_magnitude else 0)


def get_nb_trainable_parameters(model: CausalLM) -> tuple[int, int]:
    """(trainable, all) as PEFT counts them: adapters and copies are part of "all", a tied head is counted once, and a
    bias that learns is not counted beside its copy."""
    padding = sum(_padding(module.node) for module in adapters(model))
    trainable = sum(_size(p.node.get_value()) for p in named_nodes(model, nnx.Param)) - padding
    frozen = sum(
        _size(p.node.get_value())
        for p in named_nodes(model, nnx.Variable)
        if not isinstance(p.node, nnx.Param | AdapterConstant | Buffer)
    )
    for module in named_nodes(model, Weighted):
        copies = {part: getattr(module.node, f"trained_{part}") for part in ("weight", "bias")}
        for copy in copies.values():
            if copy is not None:
                size = copy.value.get_value().size // len(copy.layers)
                trainable -= size * copy.layers.count(False)
                saved = copies["weight"].layers if copies["weight"] is not None else (False,) * len(copy.layers)
                frozen -= size * sum(learns and not whole for learns, whole in zip(copy.layers, saved, strict=True))
    return trainable, trainable + frozen


def format_trainable_parameters(trainable: int, total: int) -> str:
    """PEFT's line.

    >>> format_trainable_parameters(41_943_040, 8_072_204_288)
    'trainable params: 41,943,040 || all params: 8,072,204,288 || trainable%: 0.5196'
    """
    return f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {100 * trainable / total:.4f}"


def delta_weight(module: Adapted, layer: int | None = None) -> Float[Array, "out in"]:
    """scaling * B A of one layer, [out, in] in float32: what the adapter adds to the weight, before DoRA's gain."""
    a, b, scaling = (_of_layer(v.get_value(), layer) for v in (module.lora_A, module.lora_B, module.lora_scaling))
    return jnp.matmul(b * scaling, a, precision=jax.lax.Precision.HIGHEST)
