"""A scan over layers whose residuals wait in host memory, and come back a layer before they are needed.

`jax.checkpoint` can offload too, but asks for a layer's values when that layer's turn has come, and waits for them.
Here both passes are scans whose carry holds the values of two layers: while one is at work, those of the layer below
leave for the host, or come back, and since they depend on nothing of that layer, the copy runs beside it. So what layer
i puts out is of layer i - 1, and the last layer's values never leave the device.

A layer is differentiated in the forward pass already, by `jax.vjp` of its checkpointed form. The leaves of the pullback
are then what the backward pass needs: those that are inputs of the layer are there again when its turn comes, and the
rest is what the policy keeps. What every layer reads alike stays on the device; its gradients are added up on the way.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.extend
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class _Recipe:
    """How to make a layer's pullback out of what is there again in the backward pass, and what was kept.

    structure: of the pullback. sources: for each of its leaves the place among the layer's own inputs, or -1 for the
    next of what was kept. learns: which leaves of a layer have a gradient; constant_learns: which of those that all
    layers share.
    """

    structure: Any
    sources: tuple[int, ...]
    learns: tuple[bool, ...]
    constant_learns: tuple[bool, ...]

    def pullback(self, inputs: list, kept: list) -> Callable:
        others = iter(kept)
        return self.structure.unflatten([next(others) if place < 0 else inputs[place] for place in self.sources])


def scan_prefetched(body: Callable, x: Any, layers: Any, keeps: Callable) -> tuple[Any, Any]:
    """`jax.lax.scan(body, x, layers)` that keeps each layer's x, and what else is asked for, in pinned host memory.

    body: (x, layer) -> (x, out). keeps: a policy of `jax.checkpoint`.
    """
    flat, structure = jax.tree.flatten(layers)
    # The layer as a function of all that it reads, with what `body` closes over as its first argument.
    one_layer = jax.tree.map(lambda leaf: jax.typeof(leaf).update(shape=leaf.shape[1:]), flat)
    traced, out_shape = jax.make_jaxpr(lambda x, leaves: body(x, structure.unflatten(leaves)), return_shape=True)(
        x, one_layer
    )

    @functools.partial(jax.checkpoint, policy=keeps, prevent_cse=False)
    def layer_of(constants, x, leaves):
        closed = jax.extend.core.ClosedJaxpr(traced.jaxpr, constants)
        outs = jax.extend.core.jaxpr_as_fun(closed)(*jax.tree.leaves((x, leaves)))
        return jax.tree.unflatten(jax.tree.structure(out_shape), outs)

    @jax.custom_vjp
    def run(x, flat, constants):
        return jax.lax.scan(functools.partial(layer_of, constants), x, flat)

    def forward(x, flat, constants):
        learns, constant_learns = (tuple(leaf.perturbed for leaf in leaves) for leaves in (flat, constants))
        x, flat, constants = jax.tree.map(
            lambda leaf: leaf.value, (x, flat, constants), is_leaf=lambda leaf: hasattr(leaf, "perturbed")
        )
        recipe = None

        def differentiated(x, leaves):
            """What the layer returns, and what is to be kept of it."""
            nonlocal recipe

            def of_learning(x, learning, shared):
                return layer_of(_merge(constant_learns, shared, constants), x, _merge(learns, learning, leaves))

            learning, shared = _select(learns, leaves), _select(constant_learns, constants)
            result, pullback = jax.vjp(of_learning, x, learning, shared)
            residuals, structure = jax.tree.flatten(pullback)
            inputs = jax.tree.leaves((constants, x, leaves))
            places = [next((i for i, one in enumerate(inputs) if one is leaf), -1) for leaf in residuals]
            recipe = _Recipe(structure, tuple(places), learns, constant_learns)
            return result, (x, [leaf for leaf, place in zip(residuals, places, strict=True) if place < 0])

        def step(carry, leaves):
            x, below = carry
            (after, out), kept = differentiated(x, leaves)
            return (after, kept), (_move(below, jax.memory.Space.Host), out)

        nothing = jax.eval_shape(lambda x, flat: differentiated(x, [leaf[0] for leaf in flat])[1], x, flat)
        nothing = jax.tree.map(lambda aval: jnp.zeros(aval.shape, aval.dtype), nothing)
        (last, top), (hosted, outs) = jax.lax.scan(step, (x, nothing), flat)
        return (last, outs), (top, hosted, flat, constants, recipe)

    def backward(residuals, cotangents):
        top, hosted, flat, constants, recipe = residuals
        d_last, d_outs = jax.tree.map(_instantiated, cotangents, is_leaf=_is_symbolic)

        def step(carry, layer):
            dx, d_shared, (x, kept) = carry
            below, leaves, d_out = layer
            below = _move(below, jax.memory.Space.Device)
            pullback = recipe.pullback(jax.tree.leaves((constants, x, leaves)), kept)
            dx, d_learning, more = pullback((dx, d_out))
            return (dx, [jnp.add(*pair) for pair in zip(d_shared, more, strict=True)], below), d_learning

        d_shared = [jnp.zeros_like(leaf) for leaf in _select(recipe.constant_learns, constants)]
        start = (d_last, d_shared, top)
        (dx, d_shared, _), d_learning = jax.lax.scan(step, start, (hosted, flat, d_outs), reverse=True)
        d_constants = _merge(recipe.constant_learns, d_shared, [None] * len(constants))
        return dx, _merge(recipe.learns, d_learning, [None] * len(flat)), d_constants

    run.defvjp(forward, backward, symbolic_zeros=True)
    return run(x, flat, traced.consts)


def _move(tree: Any, space: Any) -> Any:
    return jax.tree.map(lambda leaf: jax.device_put(leaf, space), tree)


def _select(chosen: tuple[bool, ...], leaves: list) -> list:
    return [leaf for leaf, is_chosen in zip(leaves, chosen, strict=True) if is_chosen]


def _merge(chosen: tuple[bool, ...], some: list, others: list) -> list:
    """`others`, with those that are chosen out of `some`."""
    chosen_ones = iter(some)
    return [next(chosen_ones) if is_chosen else other for other, is_chosen in zip(others, chosen, strict=True)]


def _is_symbolic(leaf: Any) -> bool:
    return isinstance(leaf, SymbolicZero)


def _instantiated(cotangent: Any) -> Any:
    return jnp.zeros(cotangent.shape, cotangent.dtype) if _is_symbolic(cotangent) else cotangent
