"""Tensors on their way to the device: read and sent by threads while earlier ones are still being quantised.

A disk, the bus and the device then work at the same time, and a load takes as long as the slowest of them. What is on
its way is bounded in bytes, since JAX would run ahead, and tensors that are yet to be quantised would pile up on the
host and the device.
"""

from __future__ import annotations

import collections
import math
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import jax

if TYPE_CHECKING:
    from jaxlora.converters.huggingface import TensorSource

# Threads on a GPU, where one alone would wait for the disk, then for the bus, in turn. Elsewhere nothing has to be
# sent, and the heap of each thread would keep what it has freed.
READERS = 4
IN_FLIGHT = 2**29


class ReadAhead:
    """The tensors of `names`, in their order, on the default device. Used in a `with` block, at whose end all stops.

    `next()` gives one; once its use is dispatched, `used(result)` says what will be there when it is no longer needed.
    """

    def __init__(self, source: TensorSource, names: Iterable[str], in_flight: int = IN_FLIGHT):
        """in_flight: most bytes, of the unquantised tensors, between being read and being used up; one larger tensor
        goes by itself."""
        self._source, self._in_flight, self._bytes = source, in_flight, 0
        self._names: Iterator[str] = iter(names)
        self._waiting = next(self._names, None)
        self._coming: collections.deque[tuple[int, Future]] = collections.deque()
        self._in_use: collections.deque[tuple[int, Any]] = collections.deque()
        self._taken = 0
        self._device = jax.config.jax_default_device  # of this thread: `jax.default_device` holds for one alone
        readers = READERS if jax.default_backend() == "gpu" else 1
        self._pool = ThreadPoolExecutor(readers, thread_name_prefix="read-ahead")

    def __enter__(self) -> ReadAhead:
        return self

    def __exit__(self, *_: Any) -> None:
        self._pool.shutdown(cancel_futures=True)

    def next(self) -> Any:
        """The next tensor: a `jax.Array` or a `QuantizedArray` of them."""
        self._submit()
        self._taken, future = self._coming.popleft()
        return future.result()

    def used(self, result: Any) -> None:
        """What was last taken has been used up when `result`, a tree of arrays that nobody donates, is ready."""
        self._in_use.append((self._taken, result))

    def _submit(self) -> None:
        """Start to read what there is room for; wait for room only if there is nothing to give."""
        while self._waiting is not None:
            size = self._source.dtype(self._waiting).itemsize * math.prod(self._source.shape(self._waiting))
            while self._in_use and (self._bytes + size > self._in_flight) and self._is_free_or_must_be():
                freed, result = self._in_use.popleft()
                jax.block_until_ready(result)
                self._bytes -= freed
            if self._bytes and self._bytes + size > self._in_flight:
                return
            self._coming.append((size, self._pool.submit(self._read, self._waiting)))
            self._bytes += size
            self._waiting = next(self._names, None)

    def _is_free_or_must_be(self) -> bool:
        return not self._coming or all(leaf.is_ready() for leaf in jax.tree.leaves(self._in_use[0][1]))

    def _read(self, name: str) -> Any:
        with jax.default_device(self._device):
            return jax.block_until_ready(jax.device_put(self._source.read(name)))
