"""The product of few tokens with an NF4 weight: is it right, and how near does it come to reading the weight once?

    python benchmarks/decode_kernel.py [--tokens 1 8 64 16] [--runs 10] [--all]

One JSON line a measurement. "check" lines have the relative error against the exact product, of each variant and of
dequantising first. "matmul_nf4" lines have a variant's time for one product of `tokens` with the weight: `us` by the
clock, which includes what the host takes to launch it; `device_us` by the profiler; and the packed bytes over that time
as a share of a copy measured in the same run. `of_separate` is its speed over that of dequantising and multiplying,
`of_dense` over the product with a bfloat16 weight. A time is that of one program that takes many matrices, divided by
their number, so that none is found in a cache.
"""

import argparse
import functools
import glob
import gzip
import json
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxlora import quant
from jaxlora.kernels import nf4_matmul
from jaxlora.kernels.nf4_matmul import Config

SHAPES = [(4096, 4096), (14336, 4096), (4096, 14336), (1024, 4096)]  # (out, in)
CONFIGS = [
    Config(lookup="mixed", num_warps=8),
    Config(lookup="prmt", num_warps=8),
    Config(lookup="shfl", num_warps=8),
    Config(lookup="mixed", num_warps=4),
    Config(lookup="mixed", num_warps=16),
    Config(lookup="mixed", num_warps=8, row_tiles=2),
]
MORE_CONFIGS = [
    Config(lookup=lookup, num_warps=warps, row_tiles=tiles, split=split)
    for lookup in nf4_matmul.LOOKUPS
    for warps in (2, 4, 8, 16)
    for tiles in (1, 2)
    for split in (1, 2, 4)
]
# What real models have beside whole tiles: (out, in), tokens, dtype, double quantisation, stacked, configuration.
CHECKS = [
    ((100, 64), 3, jnp.bfloat16, True, False, Config(num_warps=1)),
    ((70, 192), 7, jnp.float16, False, True, Config(num_warps=2, lookup="prmt")),
    ((896, 4864), 9, jnp.float16, True, True, Config(num_warps=4, lookup="shfl", row_tiles=2)),
    ((896, 896), 33, jnp.bfloat16, True, True, Config(num_warps=4, split=3)),
    ((576, 1536), 64, jnp.bfloat16, False, False, Config(num_warps=8, row_tiles=2, lookup="prmt")),
]


def report(**line):
    print(json.dumps(line), flush=True)


def stack_of(shape, layers, double_quant=True):
    keys = jax.random.split(jax.random.key(0), layers)
    draw = lambda key: 0.02 * jax.random.normal(key, shape, jnp.float32)
    return jax.jit(lambda keys: lax.map(lambda key: quant.quantize(draw(key), double_quant=double_quant), keys))(keys)


def fused(x, q, config):
    fields = q.codes, q.scales, q.nested_absmax, q.nested_offset, q.index
    return nf4_matmul.matmul_nf4(x, *fields, shape=q.shape, config=config)


def separate(x, q):
    return lax.dot_general(x, quant.dequantize(q, x.dtype), (((1,), (1,)), ((), ())))


def error_of(y, x, q):
    exact = np.asarray(x, np.float64) @ np.asarray(quant.dequantize(q, jnp.float32), np.float64).T
    return float(np.linalg.norm(np.asarray(y, np.float64) - exact) / np.linalg.norm(exact))


def check(name, x, q, config, limit):
    y = jax.jit(functools.partial(fused, config=config))(x, q)
    error, of_separate = error_of(y, x, q), error_of(jax.jit(separate)(x, q), x, q)
    right = bool(error < limit)
    line = dict(op="check", work=name, config=vars(config), right=right, error=error, error_of_separate=of_separate)
    report(**line)
    return right


def check_odd_shapes():
    for shape, tokens, dtype, double_quant, is_stacked, config in CHECKS:
        q = stack_of(shape, 3, double_quant)
        q = q.at(jnp.int32(2)) if is_stacked else jax.tree.map(lambda leaf: leaf[1], q)
        x = jax.random.normal(jax.random.key(1), (tokens, shape[1])).astype(dtype)
        limit = 4e-3 if dtype == jnp.bfloat16 else 5e-4
        check(f"{tokens} x {list(shape)} {jnp.dtype(dtype).name}", x, q, config, limit)


def over_layers(product, layers, x, w):
    """The product with every layer of a stack, all results kept."""
    return [product(x, w.at(jnp.int32(i)) if isinstance(w, quant.QuantizedArray) else w[i]) for i in range(layers)]


def median_seconds(program, args, runs):
    jax.block_until_ready(program(*args))
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        jax.block_until_ready(program(*args))
        times.append(time.perf_counter() - start)
    return float(np.median(times))


def kernel_durations(programs):
    """Microseconds of every run of our kernel on the device, in order, over one run of each (program, args)."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, create_perfetto_trace=True):
            for program, args in programs:
                jax.block_until_ready(program(*args))
        with gzip.open(glob.glob(f"{folder}/**/perfetto_trace.json.gz", recursive=True)[0]) as file:
            events = json.load(file)["traceEvents"]
    metadata = [event for event in events if event.get("ph") == "M"]
    tracks = {(e.get("pid"), e.get("tid")): e["args"]["name"] for e in metadata if e["name"] == "thread_name"}
    on_device = lambda e: "Stream" in tracks.get((e.get("pid"), e.get("tid")), "")
    ours = [e for e in events if e.get("ph") == "X" and "matmul_nf4" in e["name"] and on_device(e)]
    return [e["dur"] for e in sorted(ours, key=lambda e: e["ts"])]


def measure(shape, tokens, configs, runs, copy):
    packed = stack_of(shape, 1).nbytes
    layers = int(np.clip(160e6 / packed, 4, 32))
    q = stack_of(shape, layers)
    keys = jax.random.split(jax.random.key(2), layers)
    dense = [0.02 * jax.random.normal(key, shape, jnp.bfloat16) for key in keys]
    x = jax.random.normal(jax.random.key(1), (tokens, shape[1]), jnp.bfloat16)
    work = f"{tokens} x {list(shape)}"

    multiply = lambda x, w: lax.dot_general(x, w, (((1,), (1,)), ((), ())))
    jobs = [("separate", None, separate, q), ("dense", None, multiply, dense)]
    jobs += [("triton", config, functools.partial(fused, config=config), q) for config in configs]

    def compiled(job):
        return jax.jit(functools.partial(over_layers, job[2], layers)).lower(x, job[3]).compile()

    with ThreadPoolExecutor(12) as pool:
        programs = list(pool.map(compiled, jobs))
    us = {}
    lines = []
    for (name, config, _, w), program in zip(jobs, programs, strict=True):
        us[name] = median_seconds(program, (x, w), runs) / layers * 1e6
        line = dict(op="matmul_nf4", implementation=name, work=work, config=config and vars(config))
        line["us"] = round(us[name], 2)
        if name == "triton":
            line |= dict(of_separate=round(us["separate"] / us[name], 2), of_dense=round(us["dense"] / us[name], 2))
            line["error"] = error_of(program(x, w)[0], x, q.at(jnp.int32(0)))
            line["right"] = line["error"] < 4e-3
        lines.append(line)
    durations = kernel_durations([(program, (x, q)) for program in programs[2:]])
    if len(durations) == layers * len(configs):
        for line, part in zip(lines[2:], np.reshape(durations, (-1, layers)), strict=True):
            device_us = float(np.median(part))
            rate = packed / device_us / 1e3
            line |= dict(device_us=round(device_us, 2), gb_s=round(rate, 1), of_copy=round(rate / copy, 3))
    else:
        report(op="profile", work=work, kernels=len(durations), expected=layers * len(configs))
    for line in lines:
        report(**line)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 8, 64, 16])
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--all", action="store_true", help="every configuration there is")
    args = parser.parse_args()

    x = jnp.zeros((1 << 29,), jnp.bfloat16)
    add = jax.jit(lambda x: x + jnp.bfloat16(1))
    copy = 2 * x.nbytes / median_seconds(add, (x,), args.runs) / 1e9
    del x
    report(op="copy", device=jax.devices()[0].device_kind, jax=jax.__version__, gb_s=round(copy, 1))
    check_odd_shapes()
    for tokens in args.tokens:
        for shape in SHAPES:
            measure(shape, tokens, MORE_CONFIGS if args.all else CONFIGS, args.runs, copy)


if __name__ == "__main__":
    main()
