"""A scan over layers whose residuals wait in host memory, and come back a layer before they are needed.

`jax.checkpoint` can offload too, but asks for a layer's values when that layer's turn has come, and waits for them.
Here both passes are scans whose carry holds the values of two layers: while one is at work, those of the layer below
leave for the host, or come back, and since they depend on nothing of that layer, the copy runs beside it. So what layer
i puts out is of layer i - 1, and the last layer's values never leave the device.

Nothing else in a layer may be left to the copy engine meanwhile. XLA has it copy whatever is a slice of a stack and no
more, and such a copy waits for the one to the host, and the layer for it: a layer's norm weights cost 2.6 ms so, on an
H100 at 8192 tokens. Hence `_row`, and the mask of `remat.over_tiles`.

A layer is differentiated in the forward pass already, by `jax.vjp` of its checkpointed form. The leaves of the pullback
are then what the backward pass needs: those that are inputs of the layer are there again when its turn comes, and the
rest is what the policy keeps.
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
    next of what was kept. learns: which leaves of a layer have a gradient.
    """

    structure: Any
    sources: tuple[int, ...]
    learns: tuple[bool, ...]

    def pullback(self, inputs: list, kept: list) -> Callable:
        others = iter(kept)
        return self.structure.unflatten([next(others) if place < 0 else inputs[place] for place in self.sources])


def scan_prefetched(body: Callable, x: Any, layers: Any, keeps: Callable) -> tuple[Any, Any]:
    """`jax.lax.scan(body, x, layers)` that keeps each layer's x, and what else is asked for, in pinned host memory.

    body: (x, layer) -> (x, out). keeps: a policy of `jax.checkpoint`.

    Raises:
        TypeError: `body` closes over an array that has a gradient.
    """
    flat, structure = jax.tree.flatten(layers)
    count = flat[0].shape[0]
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
        def step(carry, _):
            x, i = carry
            x, out = layer_of(constants, x, [_row(leaf, i) for leaf in flat])
            return (x, i + 1), out

        (x, _), outs = jax.lax.scan(step, (x, jnp.int32(0)), length=count)
        return x, outs

    def forward(x, flat, constants):
        learns = tuple(leaf.perturbed for leaf in flat)
        if any(leaf.perturbed for leaf in constants):
            raise TypeError("the body of scan_prefetched closes over an array that learns: pass it with the layers")
        x, flat, constants = jax.tree.map(
            lambda leaf: leaf.value, (x, flat, constants), is_leaf=lambda leaf: hasattr(leaf, "perturbed")
        )
        recipe = None

        def differentiated(x, leaves):
            """What the layer returns, and what is to be kept of it."""
            nonlocal recipe
            of_learning = lambda x, learning: layer_of(constants, x, merge(learning, leaves))
            merge = functools.partial(_merge, learns)
            result, pullback = jax.vjp(of_learning, x, _select(learns, leaves))
            residuals, structure = jax.tree.flatten(pullback)
            inputs = jax.tree.leaves((constants, x, leaves))
            places = [next((i for i, one in enumerate(inputs) if one is leaf), -1) for leaf in residuals]
            recipe = _Recipe(structure, tuple(places), learns)
            return result, (x, [leaf for leaf, place in zip(residuals, places, strict=True) if place < 0])

        def step(carry, _):
            x, below, i = carry
            (after, out), kept = differentiated(x, [_row(leaf, i) for leaf in flat])
            return (after, kept, i + 1), (_move(below, jax.memory.Space.Host), out)

        nothing = jax.eval_shape(lambda x, flat: differentiated(x, [leaf[0] for leaf in flat])[1], x, flat)
        nothing = jax.tree.map(lambda aval: jnp.zeros(aval.shape, aval.dtype), nothing)
        (last, top, _), (hosted, outs) = jax.lax.scan(step, (x, nothing, jnp.int32(0)), length=count)
        return (last, outs), (top, hosted, flat, constants, recipe)

    def backward(residuals, cotangents):
        top, hosted, flat, constants, recipe = residuals
        d_last, d_outs = jax.tree.map(_instantiated, cotangents, is_leaf=_is_symbolic)

        def step(carry, layer):
            dx, (x, kept), i = carry
            below, d_out = layer
            below = _move(below, jax.memory.Space.Device)
            leaves = [_row(leaf, i) for leaf in flat]
            dx, d_learning = recipe.pullback(jax.tree.leaves((constants, x, leaves)), kept)((dx, d_out))
            return (dx, below, i - 1), d_learning

        carry = d_last, top, jnp.int32(count - 1)
        (dx, _, _), d_learning = jax.lax.scan(step, carry, (hosted, d_outs), reverse=True)
        return dx, _merge(recipe.learns, d_learning, [None] * len(flat)), None

    run.defvjp(forward, backward, symbolic_zeros=True)
    return run(x, flat, traced.consts)


def _row(stack: jax.Array, i: jax.Array) -> jax.Array:
    """stack[i]; of a stack of vectors or of integers by a kernel, a masked sum, which is as fast for so few numbers.

    Slices of anything larger, and of float32 numbers, are fused with what is computed from them.
    """
    is_vector = stack.ndim == 2 and jnp.issubdtype(stack.dtype, jnp.floating)
    if not is_vector and not (stack.ndim == 1 and jnp.issubdtype(stack.dtype, jnp.integer)):
        return jax.lax.dynamic_index_in_dim(stack, i, keepdims=False)
    is_chosen = jnp.arange(stack.shape[0]).reshape(-1, *[1] * (stack.ndim - 1)) == i
    return jnp.sum(jnp.where(is_chosen, stack, jnp.zeros((), stack.dtype)), axis=0, dtype=stack.dtype)


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
