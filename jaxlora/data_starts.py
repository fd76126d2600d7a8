"""Where adapters start when data decides: EVA (arXiv:2410.07170) and CorDA (arXiv:2406.05223), as PEFT has them.

EVA follows the principal components of what each layer reads, batch by batch, until they settle. A takes the foremost
of them, B is zero, and the ranks go where a direction explains most. CorDA sums up the covariances of what each layer
reads, and splits the weight by the directions that they make large or small; `lora_init.corda` has its maths.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from jaxlora import lora_init
from jaxlora.config import CordaConfig, EvaConfig, LoraConfig
from jaxlora.layer_inputs import LayerInput, batches, fold, layer_inputs
from jaxlora.layers import Linear
from jaxlora.model import CausalLM, Named

Targets = list[tuple[Named, tuple[int, ...]]]

_PASSES = 100  # over the data, after which EVA has not settled
_COVARIANCES = 4 * 2**30  # bytes of covariances that exist at a time


def check_dataset(config: LoraConfig, dataset: Any) -> None:
    """Refuse a start from data without data, and data without such a start.

    Raises:
        TypeError: what is given cannot be iterated over.
        ValueError: there is none, or none is wanted.
    """
    init = config.init_lora_weights
    if not config.needs_data:
        if dataset is not None:
            raise ValueError(f'init_dataset is read by init_lora_weights="eva" and "corda" only, found {init!r}')
        return
    file = config.corda_config.covariance_file if isinstance(config.corda_config, CordaConfig) else None
    if dataset is None and not (file and Path(file).exists()):
        raise ValueError(
            f"init_lora_weights={init!r} starts from data: pass init_dataset, batches of tokens that the model is run "
            "over: [{'input_ids': [B, T], ...}, ...]"
        )
    if dataset is not None and not isinstance(dataset, Iterable):
        raise TypeError(f"init_dataset must be batches to iterate over, found {type(dataset).__name__}")


# ---- EVA -------------------------------------------------------------------------------------------------------------


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Components:
    """The principal components of the rows that were read, by incremental PCA: the foremost n of [rows, d].

    mean: [d]; count: of rows; total: the sum of their squared distances from the mean; singular: [n]; directions
    [n, d]; cosines: [n], of each direction with the one before the last batch, -1 before there was one.
    """

    mean: Any
    count: Any
    total: Any
    singular: Any
    directions: Any
    cosines: Any


def no_components(slots: int, n: int, features: int) -> Components:
    """Of no rows, `slots` times."""

    def zeros(*shape):
        return jnp.zeros((slots, *shape), jnp.float32)

    return Components(zeros(features), zeros(), zeros(), zeros(n), zeros(n, features), zeros(n) - 1.0)


def add_rows(state: Components, x: Float[Array, "b t d"], counts: Bool[Array, "b t"]) -> Components:
    """The components with those rows of x that count; as they were if these are fewer than n."""
    n, d = state.directions.shape
    rows, weight = x.reshape(-1, d).astype(jnp.float32), counts.reshape(-1, 1).astype(jnp.float32)
    new = jnp.sum(weight)
    total_count = jnp.maximum(state.count + new, 1.0)
    mean = jnp.sum(rows * weight, axis=0) / jnp.maximum(new, 1.0)
    centred, shift = (rows - mean) * weight, state.mean - mean
    spread = state.count * new / total_count  # of both means around the common one
    matrix = jnp.concatenate(
        [state.singular[:, None] * state.directions, centred, jnp.sqrt(spread) * shift[None]], axis=0
    )
    sought = min(2 * n + 16, *matrix.shape)
    _, s, vh = lora_init.subspace_svd(jax.random.key(0), matrix, sought, rounds=12)  # near enough to exact
    s, vh = s[:n], vh[:n]
    largest = jnp.take_along_axis(vh, jnp.argmax(jnp.abs(vh), axis=1, keepdims=True), axis=1)
    vh = vh * jnp.where(largest < 0, -1.0, 1.0)  # a direction has no sign, and so gets one
    cosines = jnp.sum(vh * state.directions, axis=1) / jnp.maximum(jnp.linalg.norm(state.directions, axis=1), 1e-8)
    updated = Components(
        mean=mean + shift * state.count / total_count,
        count=state.count + new,
        total=state.total + jnp.sum(centred * centred) + spread * jnp.sum(shift * shift),
        singular=s,
        directions=vh,
        cosines=jnp.where(state.count > 0, cosines, -1.0),
    )
    return jax.tree.map(lambda after, before: jnp.where(new >= n, after, before), updated, state)


@dataclasses.dataclass
class _Place:
    """One layer of one input. names, ranks: of its readers; limit: the most directions that one of them may get;
    needed: those that the first of them is getting."""

    source: LayerInput
    layer: int
    names: list[str]
    ranks: list[int]
    limit: int
    needed: int


def eva(
    model: CausalLM, targets: Targets, config: LoraConfig, dataset: Iterable[Any]
) -> tuple[LoraConfig, dict[str, np.ndarray]]:
    """The settings with the ranks that the data chose, and {module: A [rank, in]} of each linear that got any.

    Raises:
        TypeError, ValueError: see `layer_inputs.batches`; no batch at all, none with as many tokens that count as there
            are directions, or directions that do not settle.
    """
    settings = config.eva_config
    assert isinstance(settings, EvaConfig)
    places = _places(model, targets, settings.rho)
    sizes = {}
    for place in places:
        sizes[place.source.path] = max(place.limit, sizes.get(place.source.path, 0))
    sources = {place.source.path: place.source for place in places}
    states = {path: no_components(s.depth, sizes[path], s.features) for path, s in sources.items()}
    seen = {path: _small_parts(state) for path, state in states.items()}
    budget, chosen = sum(sum(place.ranks) for place in places), {}
    data = _Passes(dataset, settings.label_mask_value if settings.use_label_mask else None)
    for batch in data:
        slots = {path: np.full(source.depth, -1, np.int32) for path, source in sources.items()}
        for place in places:
            if not np.all(seen[place.source.path].cosines[place.layer][: place.needed] >= settings.tau):
                slots[place.source.path][place.layer] = place.layer
        if not any(np.any(layers >= 0) for layers in slots.values()):
            break
        data.check(max(sizes.values()))
        states = fold(model, batch, states, {path: jnp.asarray(s) for path, s in slots.items()}, add_rows)
        seen = {path: _small_parts(state) for path, state in states.items()}
        if all(seen[place.source.path].count[place.layer] for place in places):
            chosen = _distribute(places, seen, budget)
    starts = {}
    for target, _ in targets:
        if not isinstance(target.node, Linear):
            warnings.warn(f"{target.name} reads no vectors, and starts as with init_lora_weights=True", stacklevel=4)
    for place in places:
        state = states[place.source.path]
        directions = np.asarray(state.directions[place.layer])
        if settings.whiten:
            directions = directions / np.sqrt(np.asarray(state.singular[place.layer]))[:, None]
        starts |= {name: directions[: chosen[name]] for name in place.names if chosen[name]}
    return _with_ranks(config, targets, chosen), starts


def _places(model: CausalLM, targets: Targets, rho: float) -> list[_Place]:
    linears = [target for target, _ in targets if isinstance(target.node, Linear)]
    ranks = {name: rank for target, found in targets for name, rank in zip(target.names(), found, strict=True)}
    places = []
    for source in layer_inputs(model, linears):
        for layer in range(source.depth):
            names = [name for name in (reader.names()[layer] for reader in source.readers) if ranks[name]]
            if names:
                limit = min(source.features, max(round(ranks[name] * rho) for name in names))
                places.append(_Place(source, layer, names, [ranks[name] for name in names], limit, limit))
    indices = {id(place): _depth(place) for place in places}
    return sorted(places, key=lambda place: indices[id(place)])


def _depth(place: _Place) -> int:
    """The layer of the model; the head comes last."""
    layers = place.source.readers[0].layers
    return layers[place.layer] if layers else 2**31


def _small_parts(state: Components) -> Components:
    """What the host looks at after each batch."""
    small = jax.device_get((state.count, state.total, state.singular, state.cosines))
    count, total, singular, cosines = small
    return dataclasses.replace(state, count=count, total=total, singular=singular, cosines=cosines)


def _distribute(places: list[_Place], seen: Mapping[str, Components], budget: int) -> dict[str, int]:
    """{module: rank}: the `budget` directions that explain the largest part of what varies in their layers' inputs."""
    names, shares = [], []
    for place in places:
        state = seen[place.source.path]
        share = state.singular[place.layer, : place.limit] ** 2 / max(float(state.total[place.layer]), 1e-30)
        names += [name for name in place.names for _ in share]
        shares += [share] * len(place.names)
    order = np.argsort(-np.concatenate(shares), kind="stable")[:budget]
    counts = Counter(names[i] for i in order)
    for place in places:
        # The first reader gets the most, as its directions are those that are watched until they settle.
        first, *others = place.names
        for other in others:
            if counts[other] > counts[first]:
                counts[first], counts[other] = counts[other], counts[first]
        place.needed = counts[first]
    return {name: counts[name] for place in places for name in place.names}


def _with_ranks(config: LoraConfig, targets: Targets, chosen: Mapping[str, int]) -> LoraConfig:
    """The settings that name each module, with the rank that it got and the alpha that goes with it."""
    assert isinstance(config.eva_config, EvaConfig)
    ranks, alphas = {}, {}
    for target, found in targets:
        for name, before in zip(target.names(), found, strict=True):
            rank, alpha = chosen.get(name, before), config.alpha_of(name)
            if rank:
                ranks[name] = rank
                alphas[name] = alpha * rank / before if config.eva_config.adjust_scaling_factors else alpha
    return dataclasses.replace(
        config, target_modules=tuple(ranks), exclude_modules=None, layers_to_transform=None, layers_pattern=None,
        rank_pattern={name: rank for name, rank in ranks.items() if rank != config.r},
        alpha_pattern={name: alpha for name, alpha in alphas.items() if alpha != config.lora_alpha},
    )  # fmt: skip


class _Passes:
    """The batches, again and again; one that can be iterated over once is kept."""

    def __init__(self, dataset: Iterable[Any], label_mask: int | None):
        self.dataset, self.label_mask, self.passes, self.largest = dataset, label_mask, 0, 0

    def __iter__(self) -> Iterator[Any]:
        again = list(self.dataset) if iter(self.dataset) is self.dataset else self.dataset
        while self.passes < _PASSES:
            read = 0
            for batch in batches(again, self.label_mask):
                read, self.largest = read + 1, max(self.largest, int(np.sum(batch["counts"])))
                yield batch
            if not read:
                raise ValueError("init_dataset is empty: it has no batch")
            self.passes += 1
        raise ValueError(
            f"init_dataset: the directions have not settled after {_PASSES} passes: pass more data, or a lower tau in "
            "eva_config"
        )

    def check(self, wanted: int) -> None:
        """Refuse to go on where every batch was too small."""
        if self.passes and self.largest < wanted:
            raise ValueError(
                f"init_dataset: no batch has the {wanted} tokens that count, of which {wanted} directions could be "
                f"made (the largest has {self.largest}): pass larger batches, a smaller r or rho, or "
                "use_label_mask=False in eva_config"
            )


# ---- CorDA -----------------------------------------------------------------------------------------------------------


def add_covariance(state: tuple, x: Float[Array, "b t d"], counts: Bool[Array, "b t"]) -> tuple:
    """(sum of the covariances of rows [d, d], number of rows) with those of x: each row is a sample, over its largest
    entry; tokens that do not count are left out, and so are rows that have no other."""
    total, number = state
    x, counts = x.astype(jnp.float32), counts[..., None]
    largest = jnp.abs(jnp.max(jnp.where(counts, x, -jnp.inf), axis=(1, 2), keepdims=True))
    x = jnp.where(counts, x / largest, 0.0)
    covariance = jnp.einsum("btd,bte->de", x, x, precision=jax.lax.Precision.HIGHEST)
    return total + covariance, number + jnp.sum(jnp.any(counts, axis=(1, 2)).astype(jnp.float32))


def corda(
    model: CausalLM, targets: Targets, config: LoraConfig, dataset: Iterable[Any] | None
) -> dict[str, tuple[Array, Array]]:
    """{module: (A [rank, in], B [out, rank])} of each linear; see `lora_init.corda`.

    Raises:
        TypeError, ValueError: see `layer_inputs.batches`; no batch at all, inputs that are not finite or all zero, or a
            covariance file that does not fit.
    """
    settings = config.corda_config
    assert isinstance(settings, CordaConfig)
    linears = [(target, ranks) for target, ranks in targets if isinstance(target.node, Linear)]
    file = Path(settings.covariance_file) if settings.covariance_file else None
    if file is not None and file.exists():
        found: Iterable = _read_covariances(file, linears)
    else:
        assert dataset is not None
        found = _covariances(model, linears, list(dataset))
    places = {name: (target, i) for target, _ in linears for i, name in enumerate(target.names())}
    starts, kept = {}, {}
    for name, covariance in found:
        target, i = places[name]
        weight = target.node.weight.get_value()
        weight = (weight[i] if target.layers else weight).astype(jnp.float32)
        rank, scaling = config.rank_of(name), config.scaling_of(name)
        try:
            starts[name] = lora_init.corda(weight, jnp.asarray(covariance), rank, scaling, method=settings.corda_method)
        except ValueError as error:
            raise ValueError(f"init_dataset, as {name} reads it: {error}") from error
        if file is not None:
            kept[name] = np.asarray(covariance)
    if file is not None and not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file(kept, file)
    return starts


def _covariances(model: CausalLM, linears: Targets, dataset: list[Any]) -> Iterator[tuple[str, Array]]:
    """(module, mean covariance [in, in]) of each, a few layers at a time: a pass over the data for as many as fit."""
    if not dataset:
        raise ValueError("init_dataset is empty: it has no batch")
    ranks = {name: rank for target, found in linears for name, rank in zip(target.names(), found, strict=True)}
    for source in layer_inputs(model, [target for target, _ in linears]):
        named = [
            [name for name in layer if ranks[name]] for layer in zip(*(r.names() for r in source.readers), strict=True)
        ]
        wanted = [layer for layer, names in enumerate(named) if names]
        d = source.features
        size = max(1, _COVARIANCES // (4 * d * d))
        for part in (wanted[i : i + size] for i in range(0, len(wanted), size)):
            slots = np.full(source.depth, -1, np.int32)
            slots[part] = np.arange(len(part))
            states: Any = {source.path: (jnp.zeros((len(part), d, d), jnp.float32), jnp.zeros(len(part), jnp.float32))}
            for batch in batches(dataset):
                states = fold(model, batch, states, {source.path: jnp.asarray(slots)}, add_covariance)
            totals, numbers = states[source.path]
            for slot, layer in enumerate(part):
                for name in named[layer]:
                    yield name, totals[slot] / numbers[slot]


def _read_covariances(file: Path, linears: Targets) -> Iterator[tuple[str, np.ndarray]]:
    wanted = {
        name: (target.node.in_features,) * 2
        for target, ranks in linears
        for name, rank in zip(target.names(), ranks, strict=True)
        if rank
    }
    try:
        found = load_file(file)
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(
            f"corda_config: covariance_file {file} is no safetensors file ({error}): PEFT's are pickles, which are not "
            "read; delete it, and it is made anew"
        ) from error
    for name, shape in wanted.items():
        if name not in found or found[name].shape != shape:
            what = f"{list(found[name].shape)}" if name in found else "nothing"
            raise ValueError(
                f"corda_config: covariance_file {file} has {what} for {name}, expected {list(shape)}: it was made for "
                "another model or other targets; delete it, and it is made anew"
            )
        yield name, found[name]
