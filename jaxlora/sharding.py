"""Many devices: logical axis -> mesh axis, in one table, and the shardings that follow from it.

The mesh has three axes. "data" splits the batch only. "fsdp" splits the batch and every weight: a device holds a part,
and gathers the rest of a layer when it comes to it. "tensor" splits the heads, the inner dimension of the MLP and the
vocabulary.

A Variable says the logical axes of its dimensions (`axes`), and that is all that the rest of the library knows of
this. XLA puts in the communication, and is told what it would guess wrong: inside of `over(mesh)`, which is the mesh in
the context of JAX and nothing of ours, hidden states stay divided by rows of the batch (`divided`), and a quantised
weight knows how what is made of it lies (`read_divided`), so that a layer's codes are gathered and not its weights.
Without a mesh in the context these functions return what they are given. Rules of one's own say where Variables lie;
activations, and what is made of quantised weights, follow `DEFAULT_RULES`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxlora.kernels.nf4_shards import is_on_mesh
from jaxlora.quant import BLOCK, QuantizedArray

MESH_AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")  # that divide rows of a batch

GATHERED = "fsdp"  # the axis over which a weight is gathered before it is read

Rules = Mapping[str, str | tuple[str, ...] | None]

DEFAULT_RULES: Rules = {
    "embed": "fsdp",
    "vocab": "tensor",
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "experts": None,
    "ssm": None,
    "layers": None,
    "rank": None,
    "head_dim": None,
    "batch": BATCH_AXES,
}


def make_mesh(*, data: int = 1, fsdp: int = 1, tensor: int = 1, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh of these sizes, of the first data * fsdp * tensor of `devices` (by default all of the process's).

    Raises:
        ValueError: a size below 1, or more devices asked for than there are.
    """
    sizes = (data, fsdp, tensor)
    devices = jax.devices() if devices is None else devices
    if min(sizes) < 1 or math.prod(sizes) > len(devices):
        raise ValueError(
            f"a mesh of data={data}, fsdp={fsdp}, tensor={tensor} takes {math.prod(sizes)} devices, each size at least "
            f"1; there are {len(devices)}"
        )
    return jax.make_mesh(
        sizes, MESH_AXES, devices=devices[: math.prod(sizes)], axis_types=(AxisType.Auto,) * len(MESH_AXES)
    )


def parse_mesh(text: str) -> Mesh:
    """The mesh of a text such as "data=2,fsdp=4", as `make_mesh` makes it.

    Raises:
        ValueError: not of that form, an axis that there is not or that is named twice; or as `make_mesh`.
    """
    sizes: dict[str, int] = {}
    for part in text.split(","):
        axis, _, size = (word.strip() for word in part.partition("="))
        if axis not in MESH_AXES or axis in sizes or not size.isdecimal():
            raise ValueError(f"{text!r} is no mesh: {part!r} is not one of {', '.join(MESH_AXES)}, once, = a number")
        sizes[axis] = int(size)
    data, fsdp, tensor = (sizes.get(axis, 1) for axis in MESH_AXES)
    return make_mesh(data=data, fsdp=fsdp, tensor=tensor)


def mesh_of(tree: Any) -> Mesh | None:
    """The mesh of several devices that the arrays of a model, or of a tree, lie on; None where there is none.

    Raises:
        ValueError: they lie on several.
    """
    leaves = jax.tree.leaves(nnx.state(tree) if isinstance(tree, nnx.Module) else tree)
    places = [leaf.sharding for leaf in leaves if isinstance(leaf, jax.Array)]
    meshes = {place.mesh for place in places if isinstance(place, NamedSharding) and isinstance(place.mesh, Mesh)}
    meshes = [mesh for mesh in meshes if mesh.size > 1]
    if len(meshes) > 1:
        raise ValueError(f"arrays lie on {' and '.join(map(str, meshes))}: put all on one of them (`sharding.shard`)")
    return meshes[0] if meshes else None


def batch_parts(mesh: Mesh | None) -> int:
    """Into how many parts a mesh divides a batch."""
    return 1 if mesh is None else math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def batch_sharding(mesh: Mesh, *, accumulated: bool = False) -> NamedSharding:
    """Rows of a batch [B, T], or of micro-batches [A, B, T], split over "data" and "fsdp"; B must be a multiple of
    both together (`batch_parts`)."""
    return NamedSharding(mesh, PartitionSpec(None, BATCH_AXES) if accumulated else PartitionSpec(BATCH_AXES))


def variable_sharding(value: Any, axes: Sequence[str | None], mesh: Mesh, rules: Rules = DEFAULT_RULES) -> Any:
    """The sharding of a Variable's value (an array, a shape, or a `QuantizedArray`), as a tree like the value.

    A dimension that its mesh axis does not divide is whole on every device. A matrix of which "fsdp" is to split the
    columns, and another axis the rows, has its rows split by both where they can be: what is gathered of a layer then
    lies in one piece, where XLA would turn the whole stack in each step. Tables are read by row and stay.

    A quantised matrix is split by rows over "fsdp", whichever of its dimensions that is of. Its columns are split as
    their axis says where they stay whole blocks of 64, else its rows are, by that too; where a block crosses rows (NF4
    with in % 64 != 0) it is not split.

    Raises:
        ValueError: an axis that `rules` does not have.
    """
    unknown = [axis for axis in axes if axis is not None and axis not in rules]
    if unknown:
        raise ValueError(f"the sharding rules say nothing of the axis {unknown[0]!r}; they have {', '.join(rules)}")
    split = [rules[axis] if axis is not None else None for axis in axes]
    if isinstance(value, QuantizedArray):
        *lead, rows, columns = split
        by_row = value.codes.ndim == len(axes)
        matrix = _of_codes(value, rows, columns, mesh) if by_row else []

        def place(leaf, is_by_row):
            return _named(mesh, leaf.shape, [*lead, *matrix] if is_by_row else lead)

        return jax.tree.unflatten(
            jax.tree.structure(value),
            [place(leaf, leaf is value.codes or leaf is value.scales) for leaf in jax.tree.leaves(value)],
        )
    if len(axes) > 1 and split[-1] == GATHERED and axes[-2] != "vocab":
        rows = split[-2]
        if isinstance(rows, str) and not value.shape[-2] % (mesh.shape[rows] * mesh.shape[GATHERED]):
            return _named(mesh, value.shape, [*split[:-2], (rows, GATHERED)])
    return _named(mesh, value.shape, split)


def _of_codes(value: QuantizedArray, rows: Any, columns: Any, mesh: Mesh) -> list[Any]:
    """What rows and columns of codes are split over, of a matrix whose dimensions are split over these."""
    in_blocks = isinstance(columns, str) and not value.shape[1] % (BLOCK * mesh.shape[columns])
    if columns is None or (columns != GATHERED and in_blocks):
        return [rows, columns]
    return [tuple(axis for axis in (rows, columns) if axis is not None), None]


def _named(mesh: Any, shape: tuple[int, ...], split: Sequence[str | tuple[str, ...] | None]) -> NamedSharding:
    """Split dimension i over `split[i]` where that divides it: over as many as do of several mesh axes."""
    used: set[str] = set()
    spec = []
    for size, axes in zip(shape, split, strict=False):
        axes = (axes,) if isinstance(axes, str) else axes or ()
        axes = [axis for axis in axes if axis not in used and mesh.shape[axis] > 1]
        while axes and size % math.prod(mesh.shape[axis] for axis in axes):
            axes.pop()
        used.update(axes)
        spec.append(tuple(axes) or None)
    while spec and spec[-1] is None:
        spec.pop()
    return NamedSharding(mesh, PartitionSpec(*spec))


def shardings(tree: Any, mesh: Mesh, rules: Rules = DEFAULT_RULES) -> Any:
    """A tree like `tree` with a sharding in place of every array: that of its Variable's axes, or none.

    `tree` is a model, one of the states that `partition` returns, or anything made of them: a whole `TrainState`, since
    optax makes its moments in the shape of what it optimises. What is no Variable (a step counter, a key) is on every
    device.
    """
    replicated = NamedSharding(mesh, PartitionSpec())

    def of(node):
        if not isinstance(node, nnx.Variable):
            return replicated
        value, axes = node.get_value(), node.get_metadata().get("axes", ())
        dimensions = len(axes) if isinstance(value, QuantizedArray) else len(value.shape)
        if dimensions != len(axes):  # a statistic of another shape, such as a row's mean
            return node.replace(jax.tree.map(lambda _: replicated, value))
        return node.replace(variable_sharding(value, axes, mesh, rules))

    tree = nnx.state(tree) if isinstance(tree, nnx.Module) else tree
    return jax.tree.map(of, tree, is_leaf=lambda node: isinstance(node, nnx.Variable))


def shard(tree: Any, mesh: Mesh, rules: Rules = DEFAULT_RULES) -> Any:
    """Put a model, in place, or a tree, as a copy, on the devices of a mesh as `shardings` says; returns it."""
    if isinstance(tree, nnx.Module):
        nnx.update(tree, shard(nnx.state(tree), mesh, rules))
        return tree
    return jax.device_put(tree, shardings(tree, mesh, rules))


def placer(mesh: Mesh, rules: Rules = DEFAULT_RULES) -> Callable[[Any, Any], Any]:
    """A `place` for `converters.huggingface.load_model`, which then loads every tensor straight into its shards."""

    def place(parameter: Any, value: Any) -> Any:
        return variable_sharding(value, parameter.node.get_metadata()["axes"], mesh, rules)

    return place


def over(mesh: Mesh | None) -> contextlib.AbstractContextManager:
    """What is traced in this context is for arrays on this mesh; None for one device. `jax.set_mesh` does the same."""
    return contextlib.nullcontext() if mesh is None else jax.sharding.use_abstract_mesh(mesh.abstract_mesh)


def _mesh_in_context() -> Any:
    """The mesh, abstract, or None where there is none of several devices with our axes, which XLA may divide by."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh if is_on_mesh() and mesh.axis_names == MESH_AXES else None


def divided(x: Any, axes: Sequence[str | None]) -> Any:
    """x, an array, held to what `DEFAULT_RULES` say of its logical axes, one for each dimension: a `None` is whole."""
    mesh = _mesh_in_context()
    if mesh is None:
        return x
    split = [None if axis is None else DEFAULT_RULES[axis] for axis in axes]
    return jax.lax.with_sharding_constraint(x, _named(mesh, x.shape, split))


def gathered(x: Any, axes: Sequence[str | None]) -> Any:
    """The same, but whole over "fsdp": a weight where it is read by rows that this divides. It is said of those that
    are read more than once; of others XLA knows it by what reads them, and so does not keep them for a gradient."""
    return divided(x, [None if axis is None or DEFAULT_RULES[axis] == GATHERED else axis for axis in axes])


def row_parts(rows: int) -> int:
    """Into how many parts a batch of so many rows is divided."""
    mesh = _mesh_in_context()
    if mesh is None:
        return 1
    return rows // _named(mesh, (rows,), [DEFAULT_RULES["batch"]]).shard_shape((rows,))[0]


def read_divided(tree: Any) -> Any:
    """A copy of a module whose quantised weights know how what is dequantised of them lies: as a dense weight would,
    but whole over "fsdp", which divides the rows that read it."""
    mesh = _mesh_in_context()
    if mesh is None:
        return tree

    def of(node):
        value = node.get_value() if isinstance(node, nnx.Variable) else None
        if not isinstance(value, QuantizedArray):
            return node
        split = [None if axis is None else DEFAULT_RULES[axis] for axis in node.get_metadata()["axes"][-2:]]
        split = [None if axes == GATHERED else axes for axes in split]
        return node.replace(dataclasses.replace(value, divided=_named(mesh, value.shape, split)))

    return jax.tree.map(of, tree, is_leaf=lambda node: isinstance(node, nnx.Variable))
