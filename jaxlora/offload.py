"""How much memory XLA may take of the device and, pinned, of the host; and weights that lie in the latter.

Of such a weight only what is asked for travels to the device.
"""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any

import jax
import jax.experimental.compute_on as computing
import jax.numpy as jnp
from jax.sharding import Sharding, SingleDeviceSharding
from jaxtyping import Array, Float, Int

# A decorator, whose name was compute_on2 before jax 0.11.
_compute_on: Any = getattr(computing, "compute_on2", None) or computing.compute_on

# XLA's own, read when it makes its client. Without it XLA pins 64 GiB at most.
_LIMIT = "XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB"
_SHARE = 0.8
# The same for the device's memory, of which XLA takes 75% without it.
_DEVICE_SHARES = "XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"
_DEVICE_SHARE = 0.9
# When a program seems not to fit, XLA computes values again to make it, and by what it did it takes what lies in pinned
# host memory for the device's. A step that offloads 96 GiB, with 15 on the device, so made norms anew for each product
# that reads them: by compiling, 30 more passes over the hidden state in a layer. This is in percent of the device's
# free memory: no bound. What is computed again is decided by `remat`.
_XLA_FLAGS = "XLA_FLAGS"
_FIT_FLAG, _FIT_PERCENT = "--xla_gpu_memory_limit_slop_factor", 10000
_CGROUP_BOUNDS = tuple(Path("/sys/fs/cgroup") / name for name in ("memory.max", "memory/memory.limit_in_bytes"))


def allow_memory() -> None:
    """Let XLA take 90% of the device's memory, and pin 80% of the host's for what is offloaded, which it then does not
    take for the device's.

    What its variables say, where they are set, stands. They are the process's, and count only before JAX first uses a
    device. The command line calls this.
    """
    os.environ.setdefault(_LIMIT, str(int(_SHARE * _physical_bytes() / 2**30)))
    if not any(name in os.environ for name in _DEVICE_SHARES):  # one is the other's old name, and both are an error
        os.environ[_DEVICE_SHARES[0]] = str(_DEVICE_SHARE)
    flags = os.environ.get(_XLA_FLAGS, "")
    if _FIT_FLAG not in flags:
        os.environ[_XLA_FLAGS] = f"{flags} {_FIT_FLAG}={_FIT_PERCENT}".strip()


def pinned_bytes() -> int | None:
    """How much host memory XLA may pin, or most of what there is if that is less; None where nothing is offloaded to
    memory of its own, as on a CPU."""
    if jax.default_backend() != "gpu":
        return None
    return int(min(float(os.environ.get(_LIMIT, 64)) * 2**30, _SHARE * _physical_bytes()))


def _physical_bytes() -> int:
    """The host's memory, or the bound of the container (cgroup v2, or v1) if that is less."""
    found = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for bound in _CGROUP_BOUNDS:
        if bound.exists() and (text := bound.read_text().strip()).isdecimal():  # "max" is none
            found.append(int(text))
    return min(found)


def pinned_host() -> Sharding:
    """The place of an array in the pinned memory beside the first device."""
    return SingleDeviceSharding(jax.devices()[0], memory_kind="pinned_host")


def take_rows(table: Float[Array, "rows features"], ids: Int[Array, "*batch"]) -> Float[Array, "*batch features"]:
    """table[ids], on the device. Where the table is in host memory, the host picks the rows, and only they travel.

    As for `jnp.take`, the row of an id that there is none of is NaN.
    """
    if jax.typeof(table).memory_space != jax.memory.Space.Host:
        return jnp.take(table, ids, axis=0)
    rows = jax.lax.GatherDimensionNumbers(offset_dims=(ids.ndim,), collapsed_slice_dims=(0,), start_index_map=(0,))

    @functools.partial(_compute_on, compute_type="device_host", out_memory_spaces=jax.memory.Space.Host)
    def taken_there(table, starts):  # plain indexing would mix in constants, which are on the device
        return jax.lax.gather(table, starts, rows, (1, table.shape[1]), mode=jax.lax.GatherScatterMode.CLIP)

    taken = taken_there(table, jax.device_put(ids[..., None], jax.memory.Space.Host))
    taken = jax.device_put(taken, jax.memory.Space.Device)
    return jnp.where(((0 <= ids) & (ids < table.shape[0]))[..., None], taken, jnp.asarray(jnp.nan, table.dtype))
