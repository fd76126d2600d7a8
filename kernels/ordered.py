"""x in the order in which a product of 9 to 64 tokens copies it to shared memory (`nf4_matmul_wgmma`).

Each 256 elements of k, all tokens of them, are one piece [4 blocks, 8 parts of k, tiles of tokens, 8 tokens, 8
elements]. Element 16 t + 4 s + 2 u + h of each 64 of k, a block of NF4, is element 2 t + h of part 2 s + u:

    element k of token m is at  ((k // 64 * 8 + k // 2 % 8) * T + m) * 8 + k // 16 % 4 * 2 + k % 2,

of T tokens with those that fill the last tile. So the 8 elements of a token that lie together are 8 j .. 8 j + 7 of the
token with each 64 elements [t, 2 s + u, h] read as [2 s + u, t, h], and are put at 8 (j T + m). To put x in this order
is a launch for each product, which who makes x can save: a kernel that is asked for `ordered` may return `Ordered`, and
who asks does nothing with it but multiply.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

STEP = 256  # elements of k of a piece
TILE = 8  # tokens


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Ordered:
    """data: [steps, 4, 8, tiles, 8, 8]; shape: (*batch, K), that of plain x. Elements that x has not are zero; tokens
    that it has not may be anything."""

    data: Any
    shape: tuple[int, ...] = dataclasses.field(metadata=dict(static=True))

    @property
    def dtype(self) -> Any:
        return self.data.dtype

    def reshape(self, *shape: int) -> Ordered:
        """The same of a batch of another shape.

        Raises:
          ValueError: it would take another K, or another number of tokens.
        """
        if shape[-1] != self.shape[-1] or math.prod(shape) != math.prod(self.shape):
            raise ValueError(f"Ordered {list(self.shape)} has tokens of {self.shape[-1]} and cannot be {list(shape)}")
        return Ordered(self.data, shape)

    def plain(self) -> Float[Array, "*batch k"]:
        """x."""
        tokens, columns = math.prod(self.shape[:-1]), self.shape[-1]
        x = self.data.reshape(-1, 8, padded(tokens), 4, 2)  # 64 of k, 2 s + u, m, t, h
        x = x.transpose(2, 0, 3, 1, 4).reshape(padded(tokens), -1)
        return x[:tokens, :columns].reshape(self.shape)


def padded(tokens: int) -> int:
    """Tokens with those that fill the last tile."""
    return -(-tokens // TILE) * TILE


def shape_of(tokens: int, columns: int) -> tuple[int, ...]:
    """That of the data."""
    return -(-columns // STEP), 4, 8, padded(tokens) // TILE, TILE, 8


def in_order(x: Float[Array, "*batch k"]) -> Ordered:
    """x as `Ordered`, with zeros for tokens and elements that there are not."""
    shape, columns = x.shape, x.shape[-1]
    x = x.reshape(-1, columns)
    data = shape_of(x.shape[0], columns)
    x = jnp.pad(x, ((0, -x.shape[0] % TILE), (0, -columns % STEP)))
    x = x.reshape(x.shape[0], -1, 4, 8, 2)  # m, 64 of k, t, 2 s + u, h
    return Ordered(x.transpose(1, 3, 0, 2, 4).reshape(data), shape)


def plain(x: Any) -> Any:
    """What may be `Ordered`, as it is."""
    return x.plain() if isinstance(x, Ordered) else x
