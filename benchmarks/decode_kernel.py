"""Products of few tokens with NF4 weights: are they right, and how near do they come to reading the weights once?

    python benchmarks/decode_kernel.py [--tokens 1 8 64] [--works qkv o gate_up down] [--no-checks] [--all]

One JSON line a measurement. "check" lines have the relative error against the exact product, of a variant and of
dequantising first. "matmul_nf4" lines have the time on the device, by the profiler, of one product of `tokens` with the
weights of `work`, which read the same x; and their packed bytes over that time as a share of a copy measured so in the
same run. `of_separate` is the speed over that of dequantising and multiplying, `of_dense` over the product with
bfloat16 weights. A time is that of one program that takes many matrices, divided by their number, so that none is found
in a cache. `us` is the same by the clock: it has what the host takes to launch the program and to hand out its results.
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
from jaxlora.kernels import nf4_matmul, nf4_matmul_tiles
from jaxlora.kernels.nf4_matmul import Config
from jaxlora.kernels.reference import NF4Fields

# Of Llama-3.1-8B: the rows of the weights that read the same, and their columns.
WORKS = {
    "qkv": ((4096, 1024, 1024), 4096),
    "o": ((4096,), 4096),
    "gate_up": ((14336, 14336), 4096),
    "down": ((4096,), 14336),
}
CONFIGS = {
    1: [
        Config(num_warps=16),
        Config(num_warps=8, depth=2),
        Config(num_warps=8, programs=3 * nf4_matmul.SMS),
        Config(num_warps=16, depth=2, programs=nf4_matmul.SMS),
    ],
    8: [Config(num_warps=8), Config(num_warps=8, depth=2)],
    64: [nf4_matmul_tiles.Config(split=split, ahead=ahead) for split in (1, 4, 8) for ahead in (0, 2)],
}
MORE_CONFIGS = [
    Config(num_warps=warps, depth=depth, programs=programs * nf4_matmul.SMS)
    for warps in (4, 8, 16)
    for depth in (1, 2)
    for programs in (1, 2, 3, 4)
]
# What real models have beside whole tiles: (out, in), tokens, dtype, double quantisation, stacked, configuration.
CHECKS = [
    ((100, 64), 3, jnp.bfloat16, True, False, Config(num_warps=1)),
    ((70, 192), 7, jnp.float16, False, True, Config(num_warps=2)),
    ((896, 4864), 8, jnp.float16, True, True, Config(num_warps=4, depth=2)),
    ((896, 4864), 1, jnp.bfloat16, True, True, Config(num_warps=16)),
    ((1000, 576), 2, jnp.float16, True, True, Config(num_warps=4, depth=2)),
    ((896, 896), 33, jnp.bfloat16, True, True, nf4_matmul_tiles.Config(num_warps=4, split=2)),
    ((576, 1536), 64, jnp.bfloat16, False, False, nf4_matmul_tiles.Config(split=3)),
]


def report(**line):
    print(json.dumps(line), flush=True)


def stack_of(shape, layers, double_quant=True):
    keys = jax.random.split(jax.random.key(0), layers)
    draw = lambda key: 0.02 * jax.random.normal(key, shape, jnp.float32)
    return jax.jit(lambda keys: lax.map(lambda key: quant.quantize(draw(key), double_quant=double_quant), keys))(keys)


def fused(x, weights, config):
    fields = [NF4Fields(q.codes, q.scales, q.nested_absmax, q.nested_offset, q.index) for q in weights]
    kernel = nf4_matmul if x.shape[0] <= nf4_matmul.MOST_TOKENS else nf4_matmul_tiles
    return kernel.matmul_nf4(x, fields, shapes=[q.shape for q in weights], config=config)


def multiplied(x, weights):
    return [lax.dot_general(x, w, (((1,), (1,)), ((), ()))) for w in weights]


def separate(x, weights):
    return multiplied(x, [quant.dequantize(q, x.dtype) for q in weights])


def error_of(y, x, q):
    exact = np.asarray(x, np.float64) @ np.asarray(quant.dequantize(q, jnp.float32), np.float64).T
    return float(np.linalg.norm(np.asarray(y, np.float64) - exact) / np.linalg.norm(exact))


def check(name, x, q, config, limit):
    [y], [other] = jax.jit(functools.partial(fused, config=config))(x, [q]), jax.jit(separate)(x, [q])
    error, of_separate = error_of(y, x, q), error_of(other, x, q)
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


def over_layers(product, layers, x, stacks):
    """The products with every layer of some stacks, all results kept."""
    return [product(x, [w.at(jnp.int32(i)) if is_quantized(w) else w[i] for w in stacks]) for i in range(layers)]


def is_quantized(w):
    return isinstance(w, quant.QuantizedArray)


def median_seconds(program, args, runs):
    jax.block_until_ready(program(*args))
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        jax.block_until_ready(program(*args))
        times.append(time.perf_counter() - start)
    return float(np.median(times))


def device_events(function):
    """What the device did while the function ran, by the profiler, in order: [{"name", "ts", "dur"}, ...]."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, create_perfetto_trace=True):
            function()
        with gzip.open(glob.glob(f"{folder}/**/perfetto_trace.json.gz", recursive=True)[0]) as file:
            events = json.load(file)["traceEvents"]
    metadata = [event for event in events if event.get("ph") == "M"]
    tracks = {(e.get("pid"), e.get("tid")): e["args"]["name"] for e in metadata if e["name"] == "thread_name"}
    on_device = lambda e: e.get("ph") == "X" and "Stream" in tracks.get((e.get("pid"), e.get("tid")), "")
    return sorted(filter(on_device, events), key=lambda e: e["ts"])


def device_microseconds(programs):
    """What each (program, args) keeps the device busy for, each run once; told apart by the pauses between them."""

    def run():
        for program, args in programs:
            time.sleep(0.01)
            jax.block_until_ready(program(*args))

    groups, end = [], -np.inf
    for event in device_events(run):
        if event["ts"] - end > 3000:
            groups.append(0.0)
        groups[-1] += event["dur"]
        end = max(end, event["ts"] + event["dur"])
    return groups if len(groups) == len(programs) else [float("nan")] * len(programs)


def copy_gb_s():
    x = jnp.zeros((1 << 30,), jnp.bfloat16)
    add = jax.jit(lambda x: x + jnp.bfloat16(1))
    jax.block_until_ready(add(x))
    return 2 * x.nbytes / min(device_microseconds([(add, (x,))] * 3)) / 1e3


def jobs_of(work, tokens, configs):
    """(line, layers, bytes a layer, program not compiled yet, its arguments) of each variant of a work."""
    rows, columns = WORKS[work]
    shapes = [(n, columns) for n in rows]
    packed = sum(jax.eval_shape(functools.partial(stack_of, shape, 1)).nbytes for shape in shapes)
    layers = int(np.clip(160e6 / packed, 4, 32))
    stacks = [stack_of(shape, layers) for shape in shapes]
    drawn = lambda shape: jax.jit(lambda: 0.02 * jax.random.normal(jax.random.key(2), shape, jnp.bfloat16))()
    dense = [[drawn(shape) for _ in range(layers)] for shape in shapes]
    x = jax.random.normal(jax.random.key(1), (tokens, columns), jnp.bfloat16)
    variants = [("separate", None, separate, stacks), ("dense", None, multiplied, dense)]
    variants += [("triton", config, functools.partial(fused, config=config), stacks) for config in configs]
    for name, config, product, weights in variants:
        line = dict(op="matmul_nf4", implementation=name, work=work, tokens=tokens, config=config and vars(config))
        yield line, layers, packed, jax.jit(functools.partial(over_layers, product, layers)), (x, weights)


def measure(work, tokens, configs, copy, runs):
    jobs = list(jobs_of(work, tokens, configs))
    with ThreadPoolExecutor(12) as pool:
        programs = list(pool.map(lambda job: job[3].lower(*job[4]).compile(), jobs))
    clock = [median_seconds(program, job[4], runs) for program, job in zip(programs, jobs, strict=True)]
    device = device_microseconds([(program, job[4]) for program, job in zip(programs, jobs, strict=True)])
    times = {}
    for (line, layers, packed, _, (x, weights)), program, seconds, busy in zip(
        jobs, programs, clock, device, strict=True
    ):
        device_us = times[line["implementation"]] = busy / layers
        line |= dict(us=round(seconds / layers * 1e6, 1), device_us=round(device_us, 2))
        if line["implementation"] == "triton":
            rate = packed / device_us / 1e3
            line |= dict(
                of_separate=round(times["separate"] / device_us, 2), of_dense=round(times["dense"] / device_us, 2)
            )
            line |= dict(gb_s=round(rate, 1), of_copy=round(rate / copy, 3))
            ys = program(x, weights)[-1]
            error = max(error_of(y, x, w.at(jnp.int32(layers - 1))) for y, w in zip(ys, weights, strict=True))
            line |= dict(error=error, right=error < 4e-3)
        report(**line)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--works", nargs="+", default=[*WORKS])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--no-checks", action="store_true")
    parser.add_argument("--all", action="store_true", help="every configuration there is")
    args = parser.parse_args()

    copy = copy_gb_s()
    report(op="copy", device=jax.devices()[0].device_kind, jax=jax.__version__, gb_s=round(copy, 1))
    if not args.no_checks:
        check_odd_shapes()
    for tokens in args.tokens:
        few = tokens <= nf4_matmul.MOST_TOKENS
        configs = MORE_CONFIGS if args.all and few else CONFIGS.get(tokens, CONFIGS[8 if few else 64])
        for work in args.works:
            measure(work, tokens, configs, copy, args.runs)


if __name__ == "__main__":
    main()
