"""A scan over layers whose residuals wait in host memory, and come back a layer before they are needed.

`jax.checkpoint` can offload too, but asks for a layer's values when that layer's turn has come, and waits for them.
Here the backward pass is a scan whose carry holds the values of two layers: while one is at work, those of the layer
below come back, and since they depend on nothing of that layer, the copy runs beside it. In the forward pass a value
leaves when it is there, beside the rest of its layer, and the last layer's stay on the device as well, but for its x:
carried to the next turn x would be copied in each, and from the host it is there again before the loss is. Where the
host has no room for all layers, those of the last ones stay on the device, which needs them first.

Nothing else in a layer may be left to the copy engine meanwhile. XLA has it copy whatever is a slice of a stack and no
more, and such a copy waits for the one to the host, and the layer for it: a layer's norm weights cost 2.6 ms so, on an
H100 at 8192 tokens. Hence `_row`, and the mask of `remat.over_tiles`.

A layer is differentiated in the forward pass already, by `jax.vjp` of its checkpointed form. The leaves of the pullback
are then what the backward pass needs: those that are inputs of the layer are there again when its turn comes, and the
rest is what the policy keeps. What every layer reads alike stays on the device; its gradients are added up on the way.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.extend
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.interpreters import batching, mlir


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


def scan_prefetched(
    body: Callable, x: Any, layers: Any, choices: Sequence[Callable], host_bytes: int | None = None
) -> tuple[Any, Any]:
    """`jax.lax.scan(body, x, layers)` that keeps each layer's x, and what else is asked for, in pinned host memory.

    body: (x, layer) -> (x, out). choices: policies of `jax.checkpoint`, from the one that keeps most on; the first is
    taken of which all layers have room, or else the last. host_bytes: the most that may lie there, None for no bound;
    what is beyond it stays on the device.
    """
    flat, structure = jax.tree.flatten(layers)
    count = flat[0].shape[0]
    # The layer as a function of all that it reads, with what `body` closes over as its first argument.
    one_layer = jax.tree.map(lambda leaf: jax.typeof(leaf).update(shape=leaf.shape[1:]), flat)
    traced, out_shape = jax.make_jaxpr(lambda x, leaves: body(x, structure.unflatten(leaves)), return_shape=True)(
        x, one_layer
    )

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
        learns, constant_learns = (tuple(leaf.perturbed for leaf in leaves) for leaves in (flat, constants))
        x, flat, constants = jax.tree.map(
            lambda leaf: leaf.value, (x, flat, constants), is_leaf=lambda leaf: hasattr(leaf, "perturbed")
        )
        recipe, keeps = None, choices[0]

        def differentiated(x, leaves):
            """What the layer returns, and what is to be kept of it: x, and the rest."""
            nonlocal recipe

            def of_learning(x, learning, shared):
                layer = jax.checkpoint(layer_of, policy=keeps, prevent_cse=False)
                return layer(_merge(constant_learns, shared, constants), x, _merge(learns, learning, leaves))

            learning, shared = _select(learns, leaves), _select(constant_learns, constants)
            result, pullback = jax.vjp(of_learning, x, learning, shared)
            residuals, structure = jax.tree.flatten(pullback)
            inputs = jax.tree.leaves((constants, x, leaves))
            places = [next((i for i, one in enumerate(inputs) if one is leaf), -1) for leaf in residuals]
            recipe = _Recipe(structure, tuple(places), learns, constant_learns)
            return result, (x, [leaf for leaf, place in zip(residuals, places, strict=True) if place < 0])

        def leaving(carry, _):
            x, _, i = carry
            (after, out), (x, rest) = differentiated(x, [_row(leaf, i) for leaf in flat])
            return (after, rest, i + 1), (_move((x, rest), jax.memory.Space.Host), out)

        def staying(carry, _):
            x, i = carry
            (after, out), kept = differentiated(x, [_row(leaf, i) for leaf in flat])
            return (after, i + 1), (kept, out)

        for one in choices:
            keeps = one
            shapes = jax.eval_shape(lambda x, flat: differentiated(x, [leaf[0] for leaf in flat])[1], x, flat)
            there = count if host_bytes is None else min(count, host_bytes // _bytes_of(shapes))
            if there == count:
                break
        nothing = jax.tree.map(lambda aval: jnp.zeros(aval.shape, aval.dtype), shapes[1])
        (last, top, i), (hosted, outs) = jax.lax.scan(leaving, (x, nothing, jnp.int32(0)), length=there)
        here = None
        if there < count:
            (last, _), (here, more) = jax.lax.scan(staying, (last, i), length=count - there)
            outs = jax.tree.map(lambda *parts: jnp.concatenate(parts), outs, more)
        return (last, outs), (top, hosted, here, flat, constants, recipe)

    def backward(residuals, cotangents):
        top, hosted, here, flat, constants, recipe = residuals
        there = jax.tree.leaves(hosted)[0].shape[0]
        d_last, d_outs = jax.tree.map(_instantiated, cotangents, is_leaf=_is_symbolic)

        def pulled_back(i, dx, d_shared, values, d_learning):
            x, kept = values
            leaves = [_row(leaf, i) for leaf in flat]
            pullback = recipe.pullback(jax.tree.leaves((constants, x, leaves)), kept)
            dx, d_layer, more = pullback((dx, _indexed(d_outs, i)))
            d_shared = [jnp.add(*pair) for pair in zip(d_shared, more, strict=True)]
            d_learning = [_update_p.bind(s, g, i, axis=0) for s, g in zip(d_learning, d_layer, strict=True)]
            return dx, d_shared, d_learning

        def of_stayed(carry):
            """The pullback of layer count - 1 - j."""
            j, dx, d_shared, d_learning = carry
            i = count - 1 - j
            return j + 1, *pulled_back(i, dx, d_shared, _indexed(here, i - there), d_learning)

        def of_left(carry):
            """The pullback of layer there - 1 - j, and meanwhile the values of the one below, or of layer 0 again."""
            j, dx, d_shared, values, d_learning = carry
            below = _move(_indexed(hosted, there - 2 - j), jax.memory.Space.Device)
            dx, d_shared, d_learning = pulled_back(there - 1 - j, dx, d_shared, values, d_learning)
            return j + 1, dx, d_shared, below, d_learning

        zeros = lambda leaves: [jnp.zeros_like(leaf) for leaf in leaves]
        d_shared, d_learning = zeros(_select(recipe.constant_learns, constants)), zeros(_select(recipe.learns, flat))
        if there:
            top = _move(_indexed(hosted[0], jnp.int32(there - 1)), jax.memory.Space.Device), top
        dx = d_last
        # Loops of their own, not scans: see `_index_p`.
        if here is not None:
            start = (jnp.int32(0), dx, d_shared, d_learning)
            _, dx, d_shared, d_learning = jax.lax.while_loop(lambda carry: carry[0] < count - there, of_stayed, start)
        if there:
            start = (jnp.int32(0), dx, d_shared, top, d_learning)
            _, dx, d_shared, _, d_learning = jax.lax.while_loop(lambda carry: carry[0] < there, of_left, start)
        d_constants = _merge(recipe.constant_learns, d_shared, [None] * len(constants))
        return dx, _merge(recipe.learns, d_learning, [None] * len(flat)), d_constants

    run.defvjp(forward, backward, symbolic_zeros=True)
    return run(x, flat, traced.consts)


# `lax.dynamic_index_in_dim` and `dynamic_update_index_in_dim`, which stay themselves under vmap, where jax's become a
# gather, which nothing can do in host memory, and a scatter. They have no gradient. An index before the first is the
# first, as in XLA.
#
# Why not a scan: XLA leaves a slice of host memory to the copy engine only where its index is a plain function of the
# loop's own counter, which a scan keeps to itself. Of an index that is carried beside it, and of the maximum of one and
# zero, a kernel read the host's memory, and the layer waited.
_index_p = jax.extend.core.Primitive("index_in_dim")
_update_p = jax.extend.core.Primitive("update_index_in_dim")


def _indexed(tree: Any, i: jax.Array) -> Any:
    return jax.tree.map(lambda stack: _index_p.bind(stack, i, axis=0), tree)


def _index(stack: jax.Array, i: jax.Array, *, axis: int) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(stack, i, axis, keepdims=False, allow_negative_indices=False)


def _update(stack: jax.Array, value: jax.Array, i: jax.Array, *, axis: int) -> jax.Array:
    return jax.lax.dynamic_update_index_in_dim(stack, value, i, axis, allow_negative_indices=False)


def _batched_index(operands: tuple, dims: tuple, *, axis: int) -> tuple[jax.Array, int]:
    (stack, i), (dim, i_dim) = operands, dims
    assert i_dim is None, "a layer's number is the same for all that are vmapped"
    # Either the batch stands before the axis, or the axis, once it is gone, before the batch.
    before = dim <= axis
    return _index_p.bind(stack, i, axis=axis + before), dim - (not before)


def _batched_update(operands: tuple, dims: tuple, *, axis: int) -> tuple[jax.Array, int]:
    (stack, value, i), (stack_dim, value_dim, i_dim) = operands, dims
    assert i_dim is None, "a layer's number is the same for all that are vmapped"
    size = stack.shape[stack_dim] if stack_dim is not None else value.shape[value_dim]

    def in_front(x, dim):
        return jnp.broadcast_to(x, (size, *x.shape)) if dim is None else jnp.moveaxis(x, dim, 0)

    return _update_p.bind(in_front(stack, stack_dim), in_front(value, value_dim), i, axis=axis + 1), 0


_index_p.def_impl(_index)
_index_p.def_abstract_eval(lambda stack, i, axis: stack.update(shape=stack.shape[:axis] + stack.shape[axis + 1 :]))
_update_p.def_impl(_update)
_update_p.def_abstract_eval(lambda stack, value, i, axis: stack)
for primitive, function, batched in ((_index_p, _index, _batched_index), (_update_p, _update, _batched_update)):
    mlir.register_lowering(primitive, mlir.lower_fun(function, multiple_results=False))
    batching.primitive_batchers[primitive] = batched


def _row(stack: jax.Array, i: jax.Array) -> jax.Array:
    """stack[i]; of a stack of vectors or of integers by a kernel, a masked sum, which is as fast for so few numbers.

    Slices of anything larger, and of float32 numbers, are fused with what is computed from them.
    """
    is_vector = stack.ndim == 2 and jnp.issubdtype(stack.dtype, jnp.floating)
    if not is_vector and not (stack.ndim == 1 and jnp.issubdtype(stack.dtype, jnp.integer)):
        return jax.lax.dynamic_index_in_dim(stack, i, keepdims=False)
    is_chosen = jnp.arange(stack.shape[0]).reshape(-1, *[1] * (stack.ndim - 1)) == i
    return jnp.sum(jnp.where(is_chosen, stack, jnp.zeros((), stack.dtype)), axis=0, dtype=stack.dtype)


def _bytes_of(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


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
