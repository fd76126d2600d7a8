"""The configurations of the NF4 kernel against each other, on real and odd shapes. `jaxlora bench` has what is used.

    python benchmarks/kernels.py [--layers 8] [--runs 15]

One JSON line a measurement: the bytes that must move for one matrix (packed weight in, bfloat16 out), the time for it,
GB/s, and that as a share of a copy measured in the same run.
"""

import argparse
import functools
import json

import jax
import jax.numpy as jnp

from jaxlora import quant
from jaxlora.bench.kernels import check, copy_gb_s, is_on_gpu, median_seconds, over_layers, stacked_nf4
from jaxlora.kernels import nf4

SHAPES = [(4096, 14336), (4096, 4096), (1024, 4096), (14336, 4096), (896, 4864), (100, 70)]
CONFIGS = [
    nf4.Config(block=b, num_warps=w, lookup=k) for k in ("table", "prmt") for b in (256, 512, 1024) for w in (4, 8)
]


def implementations():
    """(name, config, q -> bfloat16 matrix) of everything that can run here."""
    yield "reference", None, functools.partial(quant.dequantize, dtype=jnp.bfloat16, implementation="reference")
    if not is_on_gpu():
        return
    yield "triton", None, functools.partial(quant.dequantize, dtype=jnp.bfloat16, implementation="triton")
    for config in CONFIGS:

        def configured(q, config=config):
            fields = q.codes, q.scales, q.nested_absmax, q.nested_offset
            return nf4.dequantize_nf4(*fields, shape=q.shape, dtype=jnp.bfloat16, config=config)

        yield "triton", config, configured


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--runs", type=int, default=15)
    args = parser.parse_args()

    copy = copy_gb_s(args.runs)
    device = jax.devices()[0].device_kind
    print(json.dumps(dict(op="copy", device=device, jax=jax.__version__, gb_s=round(copy, 1))), flush=True)
    for shape in SHAPES:
        _, q, layers = stacked_nf4(shape, args.layers)
        check(layers[0])
        moved = q.nbytes // args.layers + 2 * shape[0] * shape[1]
        for name, config, function in implementations():
            seconds = median_seconds(functools.partial(over_layers, function), layers, runs=args.runs) / args.layers
            rate = moved / seconds / 1e9
            line = dict(op="dequantize_nf4", implementation=name, config=config and vars(config), shape=shape)
            line |= dict(ms=round(seconds * 1e3, 4), bytes=moved, gb_s=round(rate, 1), of_copy=round(rate / copy, 3))
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
