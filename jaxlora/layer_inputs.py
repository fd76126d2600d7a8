"""What linear layers read: a model is run over batches, and every input is folded into a state of its own.

`fold` is one compiled program a shape of batch. In it the model's runs are replaced by `_Watched` ones, which scan the
same layers with a `_Tap` before each linear that is asked for; the model outside stays as it is. A state lies in the
carry of the scan, so that it exists once.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from jaxlora.attention import Context
from jaxlora.layers import Linear
from jaxlora.model import CausalLM, Named, Run

_HEAD = "lm_head"


@dataclasses.dataclass(frozen=True)
class LayerInput:
    """An input, of as many layers as the stack of its readers has (1 for the head's). path: of the first reader, from
    `model.layers` on; readers: the linears that read this very array, in the order in which
    they do."""

    path: str
    readers: tuple[Named, ...]

    @property
    def features(self) -> int:
        return self.readers[0].node.in_features

    @property
    def depth(self) -> int:
        return self.readers[0].node.stack or 1


def layer_inputs(model: CausalLM, linears: Sequence[Named]) -> list[LayerInput]:
    """The inputs that these linears read: q_proj, k_proj and v_proj have one in common, and so have gate and up."""
    paths = {id(node): ".".join(map(str, path)) for path, node in nnx.iter_graph(model) if isinstance(node, Linear)}
    named = {
        paths[id(linear.node)].removeprefix("model.layers.").replace(".period.", "."): linear for linear in linears
    }
    shared: dict[int, list[str]] = {}
    kept: list[Any] = []

    def note(path: str, x: Any) -> None:
        shared.setdefault(id(x), []).append(path)
        kept.append(x)  # so that no other array gets its id

    def look(model):
        for path in _beside_layers(named):
            _tap(model.model, [_last(path)], functools.partial(note, path))
        model.model.layers = [_Watched(run, str(i), list(named), note) for i, run in enumerate(model.model.layers)]
        return model.hidden_states(jnp.zeros((1, 2), jnp.int32))[0]

    jax.eval_shape(look, model)
    groups = [*shared.values(), *([[_HEAD]] if _HEAD in named else [])]
    return [LayerInput(group[0], tuple(named[path] for path in group)) for group in groups]


def batches(dataset: Iterable[Any], label_mask: int | None = None) -> Iterator[dict[str, Any]]:
    """Batches of the caller's as `fold` wants them: input_ids, positions and segment_ids (the last two may be None),
    and counts, bool [B, T], which says of each token whether it is looked at.

    Args:
        label_mask: tokens with this label are not counted; None counts all but padding.

    Raises:
        TypeError: one is no mapping with `input_ids`.
        ValueError: arrays of other shapes than [B, T], or not of one shape.
    """
    for index, given in enumerate(dataset):
        if not isinstance(given, Mapping) or "input_ids" not in given:
            found = sorted(map(str, given)) if isinstance(given, Mapping) else type(given).__name__
            raise TypeError(
                f"init_dataset: batch {index} must be a dict with input_ids [B, T], found {found}: tokenise the rows, "
                "and batch them"
            )
        names = ("input_ids", "labels", "attention_mask", "segment_ids", "positions")
        arrays = {name: np.asarray(given[name]) for name in names if given.get(name) is not None}
        shape = arrays["input_ids"].shape
        if len(shape) != 2 or any(array.shape != shape for array in arrays.values()):
            shapes = {name: list(array.shape) for name, array in arrays.items()}
            raise ValueError(f"init_dataset: the arrays of batch {index} must be [B, T] alike, found {shapes}")
        segments = arrays.get("segment_ids", arrays.get("attention_mask"))
        counts = np.ones(shape, bool) if segments is None else segments > 0
        if label_mask is not None and "labels" in arrays:
            counts &= arrays["labels"] != label_mask
        ids, positions = arrays["input_ids"], arrays.get("positions")
        yield {
            "input_ids": jnp.asarray(ids, jnp.int32),
            "positions": None if positions is None else jnp.asarray(positions, jnp.int32),
            "segment_ids": None if segments is None else jnp.asarray(segments, jnp.int32),
            "counts": jnp.asarray(counts),
        }


@functools.partial(jax.jit, static_argnames=("update",), donate_argnames=("states",))
def fold(
    model: CausalLM, batch: Mapping[str, Any], states: dict[str, Any], slots: dict[str, Any], update: Callable
) -> dict[str, Any]:
    """The states after one more batch: update(state, x [B, T, in], counts [B, T]) of each layer that has a slot.

    Args:
        states: {path of a `LayerInput`: pytree of arrays [slots, ...]}, which are donated.
        slots: {path: int32 [depth]}, the slot of each layer, or -1 for a layer that is not looked at.
        update: a function of a module, since programs are kept by it.
    """
    counts, inputs = batch["counts"], {}
    for path in _beside_layers(states):
        _tap(model.model, [_last(path)], functools.partial(inputs.__setitem__, path))
    runs = [_Watched(run, str(i), list(states)) for i, run in enumerate(model.model.layers)]
    for run in runs:
        run.states, run.slots = ({p: tree[p] for p in run.paths} for tree in (states, slots))
        run.update = lambda state, slot, x: _update_slot(update, state, slot, x, counts)
    model.remat_policy, model.tiled_mlp, model.model.layers = "none", False, cast(Any, runs)
    hidden, _ = model.hidden_states(batch["input_ids"], batch["positions"], batch["segment_ids"])
    found = {path: state for run in runs for path, state in run.states.items()}
    for path, value in inputs.items():
        found[path] = _update_slot(update, states[path], slots[path][0], value, counts)
    if _HEAD in states:
        found[_HEAD] = _update_slot(update, states[_HEAD], slots[_HEAD][0], hidden, counts)
    return found


def _beside_layers(paths: Iterable[str]) -> list[str]:
    """Those of the decoder's own linears."""
    return [path for path in paths if not path.split(".")[0].isdecimal() and path != _HEAD]


def _last(path: str) -> str:
    return path.rsplit(".", 1)[-1]


def _update_slot(update: Callable, state: Any, slot: Array, x: Float[Array, "b t d"], counts: Array) -> Any:
    at = jnp.maximum(slot, 0)
    one = jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, at, keepdims=False), state)
    one = jax.lax.cond(slot >= 0, update, lambda one, *_: one, one, x, counts)
    return jax.tree.map(lambda leaf, new: jax.lax.dynamic_update_index_in_dim(leaf, new, at, 0), state, one)


class _Watched:
    """Stands in for a `model.Run` for one forward pass. paths: of the linears of this run that are looked at, each
    "run.place.name"; note: called with each path and its input while tracing."""

    def __init__(self, run: Run, index: str, paths: Sequence[str], note: Callable | None = None):
        self.run, self.note = run, note
        self.paths = [path for path in paths if path.split(".")[0] == index]
        self.states: dict[str, Any] = {}
        self.slots: dict[str, Any] = {}
        self.update: Callable = lambda state, slot, x: state

    def __call__(
        self, x: Array, context: Context, policy: str, key: Any = None, cache: Any = None, per_layer_inputs: Any = None
    ):
        def body(carry, layer):
            x, states = carry
            period, slots, own = layer
            inputs: dict[str, Any] = {}
            for path in self.paths:
                _, place, *names = path.split(".")
                _tap(period[int(place)], names, functools.partial(inputs.__setitem__, path))
            x, _, aside = self.run.once(period, x, context, per_layer_inputs=own)
            for path, value in inputs.items():
                if self.note is not None:
                    self.note(path, value)
            states = states | {
                path: self.update(states[path], slots[path], value) for path, value in inputs.items() if path in states
            }
            return (x, states), aside

        layers = (self.run.period, self.slots, self.run.inputs_of(per_layer_inputs))
        (x, self.states), aside = jax.lax.scan(body, (x, self.states), layers)
        return x, None, self.run.whole(aside)


def _tap(block: nnx.Module, names: Sequence[str], see: Callable) -> None:
    """Put a `_Tap` before a linear of a block that is a copy, made for one trace."""
    *parents, last = names
    owner = functools.reduce(getattr, parents, block)
    setattr(owner, last, _Tap(getattr(owner, last), see))


class _Tap:
    is_dropping_product = False  # so that `layers.of_gate` calls it

    def __init__(self, linear: Linear, see: Callable):
        self.linear, self.see, self.matmul_dtype = linear, see, linear.matmul_dtype

    def has_base_product(self, tokens: int) -> bool:
        return False  # so that `layers.linear_each` calls it

    is_merged = has_base_product

    def __call__(self, x: Array, key: Any = None, base: None = None) -> Array:
        self.see(x)
        return self.linear(x, key, base)
