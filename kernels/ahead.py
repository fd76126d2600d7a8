"""What a product fetches into L2 for the kernel after it.

In generation with NF4 weights of 9 to 64 tokens a product begins with all its programs asking for the codes of their
first step at once, 4 MB, and of their second. Nothing is multiplied before the first have come; and the product before
has left the memory idle since its own last step came. So when a program has multiplied, and before it stores, it asks
for its share of those first steps, and of all scales, to be put into L2 (PTX's `prefetch.global.L2`). Nobody waits for
that, and no result depends on it.

A decode step of an 8B with 64 rows in float8 took an H100 3.496 ms, and 3.543 without. To ask when a product begins,
for 6 to 16 MB, made it longer: what the product needs itself came later (2026-11-27, `docs/decisions.md`).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, no_type_check

import jax
import jax.numpy as jnp

MOST = 6
LINE = 128  # bytes, a step of a row's codes


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Ahead:
    """Lines of 128 bytes of all rows of `array[index]`: array [stack, rows, ...], whose rows are whole lines; index
    int32 []. Of a row's lines those with which one of `count` parts begins, alike in length but for one line."""

    array: Any
    index: Any
    count: int = dataclasses.field(metadata=dict(static=True))

    @property
    def constants(self) -> tuple[int, int, int]:
        """Rows, the lines of each, and how many of them."""
        rows, *shape = self.array.shape[1:]
        return rows, math.prod(shape) * self.array.dtype.itemsize // LINE, self.count


def of_product(weights: Sequence[Any], split: int) -> list[Ahead]:
    """What a product begins with of weights, `reference.NF4Fields` that are of stacks: scales, and the first steps of
    `split` parts of its rows, which must be whole steps."""
    found = []
    for w in weights:
        scales = w.absmax.reshape(w.absmax.shape[0], 1, -1)
        lines = scales.shape[-1] * scales.dtype.itemsize // LINE
        found += [Ahead(scales, w.index, lines), Ahead(w.codes, w.index, split)]
    return found


def arguments(ahead: Sequence[Ahead]) -> tuple[list[jax.Array], dict[str, Any]]:
    """The last arrays and compile-time arguments of a kernel that fetches `MOST` at most."""
    padding = MOST - len(ahead)
    arrays = [array for each in ahead for array in (each.array, each.index)] + [jnp.int32(0)] * (2 * padding)
    constants = [each.constants for each in ahead] + [(0, 0, 0)] * padding
    return arrays, {f"AHEAD{i}": constants[i] for i in range(MOST)}


@functools.cache
@no_type_check  # a type checker's wrapper around the function would hide its source from Triton
def line_kernel():
    """The Triton function that fetches lines. Built on first use, since the library imports where Triton is not
    installed."""
    import triton
    import triton.language as tl

    fetch_assembly = tl.constexpr("{ .reg .pred p; setp.ne.b32 p, $2, 0; @p prefetch.global.L2 [$1]; mov.b32 $0, $2; }")

    @triton.jit
    def fetch_line(address, is_there):
        """Ask for the line of 128 bytes at an address, int64, to be put into L2, where it is there."""
        tl.inline_asm_elementwise(
            fetch_assembly, "=r,l,r", [address, is_there.to(tl.int32)], dtype=tl.int32, is_pure=False, pack=1
        )

    return fetch_line


@functools.cache
@no_type_check
def kernel():
    """The Triton function that fetches `Ahead`, built on first use."""
    import triton
    import triton.language as tl

    fetch_line = line_kernel()

    @triton.jit
    def fetch(array, index, thread, THREADS: tl.constexpr, PROGRAMS: tl.constexpr, OF: tl.constexpr):
        """Ask for a program's share of `Ahead`; OF: its constants."""
        ROWS: tl.constexpr = OF[0]
        LINES: tl.constexpr = OF[1]
        COUNT: tl.constexpr = OF[2]
        if ROWS * COUNT > 0:
            first = array.to(tl.int64) + tl.load(index).to(tl.int64) * (ROWS * LINES * 128)
            for i in tl.static_range((ROWS * COUNT + PROGRAMS * THREADS - 1) // (PROGRAMS * THREADS)):
                number = (i * PROGRAMS + tl.program_id(0)) * THREADS + thread
                line = number // ROWS * LINES // COUNT
                place = first + (number % ROWS * LINES + line).to(tl.int64) * 128
                fetch_line(place, number < ROWS * COUNT)

    return fetch
