"""An NF4 weight on a mesh, of which each device holds a part: dequantised or merged by each device for itself.

A kernel is a custom call, of which XLA does not know what it needs: it gathers whole operands, and the operand here is
a stack of all layers. So the call says itself what is to be done. Codes [layers, out, in / 2] and scales lie divided by
rows and perhaps by columns, each device

    takes the layer's part out of its own part of the stack,
    gathers, 4 bits a weight, what the result is not divided by ("fsdp"), and nothing of what it is ("tensor"),
    and makes its part of the result, with its part of the adapter, of the gain.

How the result is divided, XLA says, by what it is told of it (`quant.QuantizedArray.divided`). Where nothing is to be
gathered the kernel reads the stack by its index, as on one device.

Nested absmaxes are whole on every device, for 256 blocks each that run across rows. Whose rows are whole groups of 256
takes its own; else the scales are made float32 before the kernel, which costs 1/8 of the codes in traffic. So it is
for columns ("tensor" of the projections that read what is divided), of which the layer's codes are copied out of the
stack besides.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from jaxlora.kernels import reference

OPERANDS = "codes", "absmax", "nested_absmax", "offset", "index", "a", "b", "inverse", "gain"
GROUP = reference.ABSMAX_BLOCK  # blocks of a nested absmax


def is_on_mesh() -> bool:
    """Whether what is traced is for a mesh of several devices, which XLA divides arrays over."""
    mesh = jax.sharding.get_abstract_mesh()
    return not mesh.empty and mesh.size > 1 and all(kind == AxisType.Auto for kind in mesh.axis_types)


def merge_shards(
    merge: Callable, *operands: Array | None, shape: tuple[int, int], transposed: bool = False
) -> Float[Array, "d0 d1"]:
    """merge(*operands, shape=shape, transposed=transposed), of each device's shard by itself.

    Args:
      merge: as `reference.merge_nf4`, but for the dtype; called with a shape of its own for a shard.
      operands: those of `OPERANDS`, codes and scales by rows.
      shape: (out, in).
      transposed: as in `reference.merge_nf4`.
    """
    given = {name: value for name, value in zip(OPERANDS, operands, strict=True) if value is not None}

    def call(shape, **arrays):
        return merge(*(arrays.get(name) for name in OPERANDS), shape=shape, transposed=transposed)

    # Jitted, since `custom_partitioning` takes no function with constants, and here they are tables.
    partitioned = custom_partitioning(jax.jit(lambda *arrays: call(shape, **dict(zip(given, arrays, strict=True)))))

    def partition(mesh, avals, result):
        cut = _Cut.of(mesh, dict(zip(given, avals, strict=True)), result, shape, transposed)

        def local(*arrays):
            return call(cut.shape, **cut.taken(dict(zip(given, arrays, strict=True))))

        out = (cut.columns, cut.rows) if transposed else (cut.rows, cut.columns)
        place = lambda axes: NamedSharding(mesh, PartitionSpec(*(each or None for each in axes)))
        needed = [cut.needed(name, aval.ndim) for name, aval in zip(given, avals, strict=True)]
        return mesh, local, place(out), tuple(map(place, needed))

    stack = "l " if "index" in given else ""
    rules = dict(
        codes=f"{stack}o p", absmax=f"{stack}o q", nested_absmax=f"{stack}n", offset=stack.strip(), index="",
        a="r v", b="u r", inverse="", gain="u",
    )  # fmt: skip
    # The rows of the codes and of the result are no common factor: what is gathered of them is left to `partition`.
    rule = f"{', '.join(rules[name] for name in given)} -> {'v u' if transposed else 'u v'}"
    partitioned.def_partition(partition=partition, sharding_rule=rule)
    return jax.custom_batching.sequential_vmap(partitioned)(*given.values())


@dataclasses.dataclass(frozen=True)
class _Cut:
    """What a device has and makes.

    rows, columns: names of the mesh axes that divide those of the result; held_rows, held_columns: of the codes, which
    are these and perhaps more. whole: (out, in), of all devices together.
    """

    mesh: Any
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    held_rows: tuple[str, ...]
    held_columns: tuple[str, ...]
    whole: tuple[int, int]

    @property
    def shape(self) -> tuple[int, int]:
        """That of a device's part of the result, but for being transposed."""
        return self.whole[0] // _count(self.mesh, self.rows), self.whole[1] // _count(self.mesh, self.columns)

    @classmethod
    def of(cls, mesh, avals: dict[str, Any], result: Any, shape: tuple[int, int], transposed: bool) -> "_Cut":
        # A row is cut between blocks.
        units = (shape[0], shape[1] // reference.NF4_BLOCK if shape[1] % reference.NF4_BLOCK == 0 else 1)
        wanted = _axes(result)[:: -1 if transposed else 1]
        wanted = [axes if unit % _count(mesh, axes) == 0 else () for axes, unit in zip(wanted, units, strict=True)]
        held = [
            axes if axes[: len(own)] == own and unit % _count(mesh, axes) == 0 else own
            for axes, own, unit in zip(_axes(avals["codes"])[-2:], wanted, units, strict=True)
        ]
        used = [axis for axes in held for axis in axes]
        if len({*used}) < len(used):
            held = wanted
        return cls(mesh, wanted[0], wanted[1], held[0], held[1], shape)

    def needed(self, name: str, ndim: int) -> tuple:
        """What a device must hold of an operand: the axes of its dimensions."""
        if name in ("codes", "absmax"):
            return (*[None] * (ndim - 2), self.held_rows, self.held_columns)
        return dict(a=(None, self.columns), b=(self.rows, None), gain=(self.rows,)).get(name, ())

    def taken(self, arrays: dict[str, Array]) -> dict[str, Array]:
        """The operands of a device's part of the result, of the parts that it holds."""
        more_rows, more_columns = self.held_rows[len(self.rows) :], self.held_columns[len(self.columns) :]
        arrays = dict(arrays)
        blocks = self.shape[0] * self.whole[1] // reference.NF4_BLOCK  # that its rows are of, on all devices
        is_nested, is_part = "nested_absmax" in arrays, bool(self.rows or self.columns)
        is_expanded = is_nested and is_part and (bool(self.columns) or blocks % GROUP != 0)
        if more_rows or more_columns or is_expanded:
            index = arrays.pop("index", None)
            for name in OPERANDS[:4] if index is not None else ():
                if name in arrays:
                    arrays[name] = lax.dynamic_index_in_dim(arrays[name], index, keepdims=False)
        for name in ("codes", "absmax"):
            for axis, axes in enumerate((more_rows, more_columns)):
                if axes:
                    arrays[name] = lax.all_gather(arrays[name], axes, axis=axis, tiled=True)
        if is_expanded:
            arrays["absmax"] = self._expanded(arrays["absmax"], arrays.pop("nested_absmax"), arrays.pop("offset"))
        elif is_nested and is_part:
            nested, size = arrays["nested_absmax"], blocks // GROUP
            start = lax.axis_index(self.rows) * size
            arrays["nested_absmax"] = lax.dynamic_slice_in_dim(nested, start, size, axis=nested.ndim - 1)
        return arrays

    def _expanded(self, absmax: Array, nested: Array, offset: Array) -> Array:
        """Scales [rows, blocks] in float32, as `reference.dequantize_absmax` makes them, of a part of the matrix."""
        rows, columns = absmax.shape
        row = jnp.arange(rows) + (lax.axis_index(self.rows) * rows if self.rows else 0)
        column = jnp.arange(columns) + (lax.axis_index(self.columns) * columns if self.columns else 0)
        block = row[:, None] * (self.whole[1] // reference.NF4_BLOCK) + column[None, :]
        scale = nested[block // GROUP]
        return jnp.clip(jnp.asarray(reference.DYNAMIC_MAP)[absmax.astype(jnp.int32)] * scale, -scale, scale) + offset


def _count(mesh: Any, axes: tuple[str, ...]) -> int:
    return math.prod(mesh.shape[axis] for axis in axes)


def _axes(aval: Any) -> list[tuple[str, ...]]:
    """The mesh axes of each dimension of what has a sharding."""
    spec = (*aval.sharding.spec, *[None] * aval.ndim)[: aval.ndim]
    return [(axes,) if isinstance(axes, str) else tuple(axes or ()) for axes in spec]
