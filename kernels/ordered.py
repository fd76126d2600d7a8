"""x in the order in which a product of 9 to 64 tokens copies it to shared memory (`nf4_matmul_wgmma`).

Each 256 elements of k, all tokens of them, are one piece, in which what an instruction reads of 8 tokens, 16 bytes of
each, lies together. In 16 bits it is [4 blocks, 8 parts of k, tiles of tokens, 8 tokens, 8 elements]: element 16 t +
4 s + 2 u + h of each 64 of k, a block of NF4, is element 2 t + h of part 2 s + u, so

    element k of token m is at  ((k // 64 * 8 + k // 2 % 8) * T + m) * 8 + k // 16 % 4 * 2 + k % 2,

of T tokens with those that fill the last tile. So the 8 elements of a token that lie together are 8 j .. 8 j + 7 of the
token with each 64 elements [t, 2 s + u, h] read as [2 s + u, t, h], and are put at 8 (j T + m). To put x in this order
is a launch for each product, which who makes x can save: a kernel that is asked for `ordered` may return `Ordered`, and
who asks does nothing with it but multiply.

In float8 it is [4 blocks, 4 parts of k, tiles of tokens, 8 tokens, 16 elements]: element 16 t + 4 s + 2 u + h of 64 is
element 4 t + 2 u + 1 - h of part s, since of the two codes in a byte the first is the upper one. x is the float8 times
a power of 2, which a token has, or some columns that one program made. With such a scale nothing else changes what
x is rounded to, unless that is nearly 0: a row's result does not depend on the rows beside it. The largest is from 4 to
8, for the product adds up in float16, and 8,188 times 8 is less than its largest number. What is less than 2^-6 has
less than 4 significant bits, and what is less than 2^-10 none.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

STEP = 256  # elements of k of a piece
TILE = 8  # tokens
FLOAT8 = np.dtype(jnp.float8_e4m3fn)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Ordered:
    """data: [steps, 4, 8, tiles, 8, 8], or in float8 [steps, 4, 4, tiles, 8, 16]; shape: (*batch, K), that of plain x;
    dtype: that of plain x. Elements that x has not are zero; tokens that it has not may be anything.

    What float8 is times: of_tokens, float32 [tokens], or of_columns, float32 [K / n], where n columns have one each.
    """

    data: Any
    shape: tuple[int, ...] = dataclasses.field(metadata=dict(static=True))
    dtype: Any = dataclasses.field(metadata=dict(static=True))
    of_tokens: Any = None
    of_columns: Any = None

    @property
    def is_float8(self) -> bool:
        return self.data.dtype == FLOAT8

    def reshape(self, *shape: int) -> Ordered:
        """The same of a batch of another shape.

        Raises:
          ValueError: it would take another K, or another number of tokens.
        """
        if shape[-1] != self.shape[-1] or math.prod(shape) != math.prod(self.shape):
            raise ValueError(f"Ordered {list(self.shape)} has tokens of {self.shape[-1]} and cannot be {list(shape)}")
        return dataclasses.replace(self, shape=shape)

    def plain(self) -> Float[Array, "*batch k"]:
        """x."""
        tokens, columns = math.prod(self.shape[:-1]), self.shape[-1]
        if self.is_float8:
            x = self.data.astype(jnp.float32).reshape(-1, 4, padded(tokens), 4, 2, 2)  # 64 of k, s, m, t, u, 1 - h
            x = x[..., ::-1].transpose(2, 0, 3, 1, 4, 5)
        else:
            x = self.data.reshape(-1, 8, padded(tokens), 4, 2)  # 64 of k, 2 s + u, m, t, h
            x = x.transpose(2, 0, 3, 1, 4)
        x = x.reshape(padded(tokens), -1)[:tokens, :columns]
        if self.of_tokens is not None:
            x = x * self.of_tokens[:, None]
        if self.of_columns is not None:
            x = x * jnp.repeat(self.of_columns, columns // self.of_columns.size)
        return x.astype(self.dtype).reshape(self.shape)


def padded(tokens: int) -> int:
    """Tokens with those that fill the last tile."""
    return -(-tokens // TILE) * TILE


def shape_of(tokens: int, columns: int, is_float8: bool = False) -> tuple[int, ...]:
    """That of the data."""
    return -(-columns // STEP), 4, *((4,) if is_float8 else (8,)), padded(tokens) // TILE, TILE, 16 if is_float8 else 8


def in_order(x: Float[Array, "*batch k"], is_float8: bool = False) -> Ordered:
    """x as `Ordered`, with zeros for tokens and elements that there are not; in float8 with a scale a token."""
    shape, columns, dtype = x.shape, x.shape[-1], x.dtype
    x = x.reshape(-1, columns)
    data, scale = shape_of(x.shape[0], columns, is_float8), None
    if is_float8:
        x = x.astype(jnp.float32)
        scale = power_of_two(jnp.max(jnp.abs(x), axis=1))
        x = (x / scale[:, None]).astype(FLOAT8)
    x = jnp.pad(x, ((0, -x.shape[0] % TILE), (0, -columns % STEP)))
    if is_float8:
        x = x.reshape(x.shape[0], -1, 4, 4, 2, 2)[..., ::-1].transpose(1, 3, 0, 2, 4, 5)  # from m, 64 of k, t, s, u, h
    else:
        x = x.reshape(x.shape[0], -1, 4, 8, 2).transpose(1, 3, 0, 2, 4)  # from m, 64 of k, t, 2 s + u, h
    return Ordered(x.reshape(data), shape, dtype, of_tokens=scale)


def power_of_two(largest: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """What numbers up to `largest` are times, once they are from 4 to 8 at most."""
    exponent = jnp.maximum(jnp.frexp(largest)[1], -123)  # largest is less than 2 to that
    return jnp.ldexp(jnp.float32(1.0), exponent - 3)


def plain(x: Any) -> Any:
    """What may be `Ordered`, as it is."""
    return x.plain() if isinstance(x, Ordered) else x
