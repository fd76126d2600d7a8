"""States of the gated delta rule, in Qwen3.5-9B's shape, against what a copy of their bytes takes. JSON lines.

    python benchmarks/delta_states.py [--rows 4] [--tokens 2048] [--configs]

Forward and backward, in bfloat16, of the chunks that are computed at once, over all of the tokens: `ms` is the time on
the device, `bytes` what is read and written once, `of_copy` their share of the bandwidth of a copy measured in the same
run, `error` the largest difference from the reference's float32 results over their largest number.
"""

from __future__ import annotations

import argparse
import functools
import json

import jax
import jax.numpy as jnp
from decode_kernel import copy_gb_s, device_microseconds

from jaxlora import chunks
from jaxlora.kernels import api, delta_states

HEADS, SHARED, KEYS, VALUES, CHUNK = 32, 2, 128, 128, 64


def inputs(rows: int, count: int) -> dict:
    keys = jax.random.split(jax.random.key(0), 8)
    m = rows * HEADS
    drawn = lambda key, *shape, dtype=jnp.float32: 0.1 * jax.random.normal(key, shape, dtype)
    lookups, key = (drawn(each, count, m, CHUNK, KEYS, dtype=jnp.bfloat16) for each in keys[:2])
    query = drawn(keys[7], count, m // SHARED, CHUNK, KEYS, dtype=jnp.bfloat16)
    left = jax.random.uniform(keys[2], (count, m), jnp.float32)
    state = drawn(keys[3], m, KEYS, VALUES)
    of_values = [drawn(key, count, m, CHUNK, VALUES) for key in keys[4:7]]
    forward = lookups, query, key, of_values[0], left, state
    backward = lookups, query, key, left, of_values[1], of_values[2], state
    return {"delta_states": forward, "delta_states_backward": backward}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--configs", action="store_true", help="not only the default one")
    args = parser.parse_args()
    m = args.rows * HEADS
    numbers = 4 * m * max(CHUNK * CHUNK, CHUNK * (KEYS + VALUES), KEYS * VALUES)
    cut = chunks.Cut.of(args.tokens, CHUNK, numbers)
    copy = copy_gb_s()
    print(json.dumps(dict(op="copy", device=jax.devices()[0].device_kind, jax=jax.__version__, gb_s=round(copy, 1))))
    configs = [delta_states.Config()]
    if args.configs:
        tiles = [(64, 4, 2), (64, 4, 3), (32, 4, 2), (32, 4, 3), (64, 8, 2), (128, 8, 2), (32, 2, 2)]
        configs += [delta_states.Config(columns=c, num_warps=w, num_stages=s) for c, w, s in tiles]
    for op, arrays in inputs(args.rows, cut.count).items():
        reference = jax.jit(functools.partial(getattr(api, op), implementation="reference"))
        jobs = [("reference", None, reference)]
        jobs += [
            ("triton", each, jax.jit(functools.partial(getattr(delta_states, op), config=each))) for each in configs
        ]
        expected = reference(*arrays)
        moved = sum(array.nbytes for array in jax.tree.leaves((arrays, expected))) * cut.groups
        for name, config, program in jobs:
            found = program(*arrays)
            difference = lambda a, b: jnp.max(jnp.abs(a.astype(jnp.float32) - b.astype(jnp.float32)))
            errors = [float(difference(a, b) / jnp.max(jnp.abs(b))) for a, b in zip(found, expected, strict=True)]
            ms = min(device_microseconds([(program, arrays)] * 5)) * cut.groups / 1e3
            line = dict(op=op, implementation=name, config=config and vars(config), rows=args.rows, tokens=args.tokens)
            line |= dict(chunks=cut.count, groups=cut.groups, ms=round(ms, 3), bytes=moved)
            print(json.dumps(line | dict(of_copy=round(moved / copy / 1e6 / ms, 3), error=max(errors))), flush=True)


if __name__ == "__main__":
    main()
