"""The energy of an operation of `wgmma` by what it multiplies, one JSON line each, on a card of compute capability 9.0.

    python benchmarks/wgmma_energy.py [--seconds 1.3] [--kinds bfloat16 e4m3 s8]

A program an SM multiplies the same operands over and over: of each warpgroup 64 rows in registers, as
`nf4_matmul_wgmma` has its elements, with 64 tokens in shared memory. Rows are numbers of NF4's table as normal weights
have them, tokens are normal. `pj_flop` is over what the card takes when idle, by `energy.Meter`; a multiplication and
an addition are two operations.

A meter of 1.5 seconds is good to 5%, and operands that never change may take less than a stream of them.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from energy import Meter

from jaxlora.kernels import reference
from jaxlora.kernels.h100 import SMS

TURNS, LAUNCHES = 4000, 20
TOKENS, WARPGROUPS = 64, 4
BLOCK = 4  # instructions whose operands differ, after which they come again


class Kind(NamedTuple):
    """An instruction's types (sums, rows, tokens), the k it contracts, registers of sums, what those are in PTX, what
    stands behind its operands; the dtype of an element, and what rows and tokens are multiplied by to fit it."""

    types: str
    k: int
    sums: int
    letter: str
    tail: str
    dtype: Any
    rows: float
    tokens: float


E4M3 = ml_dtypes.float8_e4m3fn
KINDS = {
    "bfloat16": Kind("f32.bf16.bf16", 16, TOKENS // 2, "f32", ", 1, 1, 1, 0", ml_dtypes.bfloat16, 1.4, 1.0),
    "float16": Kind("f32.f16.f16", 16, TOKENS // 2, "f32", ", 1, 1, 1, 0", np.float16, 1.4, 1e-2),
    "float16, sums too": Kind("f16.f16.f16", 16, TOKENS // 4, "b32", ", 1, 1, 1, 0", np.float16, 1.4e-2, 1e-3),
    "e4m3": Kind("f32.e4m3.e4m3", 32, TOKENS // 2, "f32", ", 1, 1, 1", E4M3, 224.0, 100.0),
    "e4m3, sums in float16": Kind("f16.e4m3.e4m3", 32, TOKENS // 4, "b32", ", 1, 1, 1", E4M3, 0.1, 0.1),
    "s8": Kind("s32.s8.s8", 32, TOKENS // 2, "b32", ", 1", np.int8, 127.0, 40.0),
    "s8, tokens of 4 bits": Kind("s32.s8.s8", 32, TOKENS // 2, "b32", ", 1", np.int8, 127.0, 2.5),
}


def operands(kind: Kind) -> jax.Array:
    """Words: those of the tokens, which lie in shared memory first, and those of the rows behind."""
    rng = np.random.default_rng(0)
    weights = rng.standard_normal((1 << 14, reference.NF4_BLOCK))
    edges = (reference.NF4[1:] + reference.NF4[:-1]) / 2
    codes = np.searchsorted(edges, weights / np.abs(weights).max(axis=1, keepdims=True)).ravel()
    values = kind.rows * reference.NF4.astype(np.float64)[codes]
    of_tokens = BLOCK * TOKENS * kind.k
    values[:of_tokens] = kind.tokens * rng.standard_normal(of_tokens)
    if kind.dtype == np.int8:
        values = values.round().clip(-127, 127)
    elif kind.dtype == E4M3:
        values = values.clip(-448, 448)
    return jnp.asarray(values.astype(kind.dtype).view(np.uint32))


def assembly(kind: Kind) -> str:
    """PTX: $0 something of the sums, so that none is left out; $1 the thread; $2 where the operands are."""
    words = BLOCK * TOKENS * 8  # of tokens: 32 bytes a token and instruction
    d = ", ".join(f"d{i}" for i in range(kind.sums))
    turn = ["wgmma.fence.sync.aligned;"]
    for step in range(BLOCK):
        a = ", ".join(f"a{4 * step + i}" for i in range(4))
        turn += [
            f"add.u32 low, place, {step * TOKENS * 2}; mov.b64 y, {{low, 8}};",
            f"wgmma.mma_async.sync.aligned.m64n{TOKENS}k{kind.k}.{kind.types} {{{d}}}, {{{a}}}, y{kind.tail};",
        ]
    turn += ["wgmma.commit_group.sync.aligned;", "wgmma.wait_group.sync.aligned 0;"]
    threads = 128 * WARPGROUPS
    lines = [
        f".reg .pred p; .reg .b64 x, y; .reg .{kind.letter} d<{kind.sums}>;",
        ".reg .b32 low, place, i, at, a<16>, v, sum;",
        f".shared .align 128 .b8 tokens[{4 * words}];",
        "mov.u32 at, tokens; mov.u32 i, $1;",
        "FILL: mul.wide.u32 x, i, 4; add.u64 x, x, $2; ld.global.b32 v, [x];",
        "mad.lo.u32 low, i, 4, at; st.shared.b32 [low], v;",
        f"add.u32 i, i, {threads}; setp.lt.u32 p, i, {words}; @p bra FILL;",
    ]
    for i in range(16):
        lines += [
            f"add.u32 i, $1, {words + i * threads}; mul.wide.u32 x, i, 4; add.u64 x, x, $2; ld.global.b32 a{i}, [x];"
        ]
    lines += [
        "fence.proxy.async; bar.sync 0;",
        f"shr.u32 place, at, 4; or.b32 place, place, {TOKENS << 16:#x};",
        *(f"mov.b32 d{i}, 0;" for i in range(kind.sums)),
        f"mov.u32 i, {TURNS};",
        "LOOP:",
        *turn,
        "sub.u32 i, i, 1; setp.ne.u32 p, i, 0; @p bra LOOP;",
        "mov.b32 sum, 0;",
        *(f"mov.b32 low, d{i}; xor.b32 sum, sum, low;" for i in range(kind.sums)),
        "mov.u32 $0, sum;",
    ]
    return "\n".join(["{", *lines, "}"])


def launch(kind: Kind):
    """A function of the operands: TURNS of BLOCK products of each warpgroup of each SM."""
    import triton
    import triton.language as tl

    text = tl.constexpr(assembly(kind))

    @triton.jit
    def products(operands, out, THREADS: tl.constexpr):
        thread = tl.arange(0, THREADS)
        at = operands.to(tl.int64) + thread.to(tl.int64) * 0
        sums = tl.inline_asm_elementwise(text, "=r,r,l", [thread, at], tl.int32, is_pure=False, pack=1)
        tl.store(out + tl.program_id(0) * THREADS + thread, sums)

    def run(operands):
        import jax_triton

        threads = 128 * WARPGROUPS
        out = jax.ShapeDtypeStruct((SMS * threads,), jnp.int32)
        return jax_triton.triton_call(
            operands, kernel=products, out_shape=out, grid=(SMS,), num_warps=4 * WARPGROUPS, THREADS=threads
        )

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=1.3)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    args = parser.parse_args()
    meter = Meter()
    idle = meter.over(lambda: time.sleep(0.1), 1.0)["watts"]
    for name in args.kinds:
        kind = KINDS[name]
        run, given = jax.jit(launch(kind)), operands(kind)

        def several(run=run, given=given):
            jax.block_until_ready([run(given) for _ in range(LAUNCHES)])

        line = meter.over(several, args.seconds)
        flop = LAUNCHES * SMS * WARPGROUPS * TURNS * BLOCK * 2 * 64 * TOKENS * kind.k
        row = dict(op="energy", work=f"wgmma alone: {name}", tflop_s=round(flop / line["s"] / 1e12, 1))
        row |= dict(watts=round(line["watts"]), mhz=int(line["mhz"]), idle_watts=round(idle))
        print(json.dumps(row | dict(pj_flop=round((line["j"] - idle * line["s"]) / flop * 1e12, 3))), flush=True)


if __name__ == "__main__":
    main()
