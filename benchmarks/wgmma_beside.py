"""What the tensor cores of an H100 leave room for: instructions of two warpgroups, alone and beside two more.

    python -P benchmarks/wgmma_beside.py

One JSON line each. First `wgmma.m64nNk16` alone: cycles of each, of 1, 2 and 4 warpgroups, with the left operand in
registers ("rs") or in shared memory ("ss"). Then each instruction: a warp's cycles for one, with two warps a scheduler,
so 2 is one a cycle; `alone`, and `other` where the two more do wgmma, whose cycles are there too (`ideal`: alone).
"""

from __future__ import annotations

import functools
import json
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

WARPS = 16
COUNT = 16  # instructions of a turn: one of each register, since of what is overwritten the assembler does nothing
TURNS = 800

# Of register r of 16, float f of 16, and constants k0, k1, g0 that the assembler does not know.
INSTRUCTIONS = {
    "hfma2.bf16": "fma.rn.bf16x2 {r}, {r}, k0, k1;",
    "hmul2.bf16": "mul.rn.bf16x2 {r}, {r}, k0;",
    "hfma2.f16": "fma.rn.f16x2 {r}, {r}, k0, k1;",
    "ffma": "fma.rn.f32 {f}, {f}, g0, g1;",
    "fmul": "mul.rn.f32 {f}, {f}, g0;",
    "dp4a": "dp4a.u32.u32 {r}, {r}, k0, k1;",
    "imad": "mad.lo.u32 {r}, {r}, k0, k1;",
    "lop3": "lop3.b32 {r}, {r}, k0, k1, 0x6a;",
    "prmt": "prmt.b32 {r}, {r}, k0, k1;",
    "shf": "shf.l.wrap.b32 {r}, {r}, k0, 7;",
    "lds": "ld.volatile.shared.b32 {r}, [at+{line}];",
    "cvt": "cvt.rn.bf16x2.f32 {r}, {f}, g0; mov.b32 {f}, {r};",
    "shfl": "shfl.sync.idx.b32 {r}, {r}, 3, 0x1c03, 0xffffffff;",
    "sts": "st.volatile.shared.b32 [at+{line}], {r};",
}


def assembly(left: str, n: int, products: int, op: str | None, split: int) -> str:
    """PTX: warpgroups below `split` do so many groups of four products, the others `op`; $0 is a thread's cycles."""
    sums = ", ".join(f"d{i}" for i in range(n // 2))
    group = ["wgmma.fence.sync.aligned;"]
    for step in range(4):
        a, last = ("{" + ", ".join(f"a{4 * step + i}" for i in range(4)) + "}", "0") if left == "rs" else ("x", "0, 0")
        group += [
            f"add.u32 low, place, {8 * step}; mov.b64 y, {{low, 8}};",
            f"wgmma.mma_async.sync.aligned.m64n{n}k16.f32.bf16.bf16 {{{sums}}}, {a}, y, 1, 1, 1, {last};",
        ]
    group += ["wgmma.commit_group.sync.aligned;", "wgmma.wait_group.sync.aligned 0;"]
    turn = [
        INSTRUCTIONS[op].format(r=f"r{i % 16}", f=f"f{i % 16}", line=i % 16 * 128) for i in range(COUNT if op else 0)
    ]

    def loop(name: str, turns: int, lines: list[str]) -> list[str]:
        if not turns or not lines:
            return []
        return [f"mov.u32 i, {turns};", f"{name}:", *lines, "sub.u32 i, i, 1; setp.ne.u32 p, i, 0;", f"@p bra {name};"]

    registers = [f"r{i}" for i in range(16)]
    lines = [
        ".reg .pred p, q; .reg .b64 x, y; .reg .f32 d<128>, f<16>, g0, g1;",
        ".reg .b32 low, place, i, at, k0, k1, begin, end, group, a<16>, r<16>, sum; .shared .b8 near[41088];",
        "mov.u32 at, near; add.u32 at, at, 127; and.b32 at, at, 0xffffff80;",
        "shr.u32 place, at, 4; or.b32 place, place, 0x400000; mov.b64 x, {place, 8};",
        "and.b32 low, $1, 31; mad.lo.u32 at, low, 4, at; shr.u32 group, $1, 7;",
        "mov.b32 k0, 0x3f803f80; mov.b32 k1, 0x00010001; mov.f32 g0, 0f3f800000; mov.f32 g1, 0f3a000000;",
        *(f"st.volatile.shared.b32 [at+{128 * i}], {name};" for i, name in enumerate(("k0", "k1", "g0", "g1"))),
        "bar.sync 0;",
        *(f"ld.volatile.shared.b32 {name}, [at+{128 * i}];" for i, name in enumerate(("k0", "k1", "g0", "g1"))),
        *(f"ld.volatile.shared.b32 a{i}, [at+{128 * i}]; and.b32 a{i}, a{i}, 0x3fff3fff;" for i in range(16)),
        *(f"mov.b32 d{i}, 0f00000000;" for i in range(n // 2)),
        *(f"add.u32 r{i}, $1, {i}; cvt.rn.f32.u32 f{i}, r{i};" for i in range(16)),
        f"bar.sync 0; mov.u32 begin, %clock; setp.ge.u32 q, group, {split};",
        "@q bra OTHER;",
        *loop("PRODUCTS", products, group),
        "bra END;",
        "OTHER:",
        *loop("TURNS", TURNS, turn),
        "END: mov.u32 end, %clock; sub.u32 $0, end, begin; mov.b32 sum, 0;",
        *(f"xor.b32 sum, sum, {name};" for name in registers),
        *(
            f"mov.b32 low, {name}{i}; xor.b32 sum, sum, low;"
            for name, m in (("f", 16), ("d", n // 2))
            for i in range(m)
        ),
        "setp.eq.u32 p, sum, 0x12345; @p mov.u32 $0, 0;",  # so that all is asked for
    ]
    return "\n".join(["{", *lines, "}"])


def cycles(*args) -> list[int]:
    """Of the first thread of each of the four warpgroups, at the second run."""
    import jax_triton
    import triton
    import triton.language as tl

    text = tl.constexpr(assembly(*args))

    @triton.jit
    def probe(out):
        thread = tl.arange(0, 512)
        tl.store(out + thread, tl.inline_asm_elementwise(text, "=r,r", [thread], tl.int32, is_pure=False, pack=1))

    shape = jax.ShapeDtypeStruct((32 * WARPS,), jnp.int32)
    run = jax.jit(functools.partial(jax_triton.triton_call, kernel=probe, out_shape=shape, grid=(1,), num_warps=WARPS))
    jax.block_until_ready(run())
    return [int(n) for n in np.asarray(run())[::128]]


def main() -> None:
    from jaxlora.bench.device import commit, versions

    facts = dict(
        device=jax.devices()[0].device_kind, date=time.strftime("%Y-%m-%d"), versions=versions(), commit=commit()
    )
    for left, n in (("rs", 64), ("ss", 64), ("rs", 128), ("rs", 32)):
        groups = 400 * 64 // n
        for warpgroups in (1, 2, 4):
            each = [c / groups / 4 for c in cycles(left, n, groups, None, warpgroups)[:warpgroups]]
            row = dict(op="wgmma alone", wgmma=left, n=n, wgs=warpgroups, cycles_per_wgmma=each)
            print(json.dumps(row | facts), flush=True)
    for op in INSTRUCTIONS:
        alone = cycles("rs", 64, 0, op, 2)[3] / TURNS / COUNT
        row: dict[str, Any] = dict(op="beside wgmma", instruction=op, alone=round(alone, 3))
        for left, n in (("rs", 64), ("ss", 64), ("rs", 128)):
            groups = int(alone * TURNS * COUNT / (4 * n)) + 1  # about as long
            both = cycles(left, n, groups, op, 2)
            row[f"{left}{n}"] = dict(
                other=round(both[3] / TURNS / COUNT, 3), wgmma=round(both[0] / groups / 4, 1), ideal=n
            )
        print(json.dumps(row | facts), flush=True)


if __name__ == "__main__":
    main()
