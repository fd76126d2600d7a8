"""What the assembler makes of a product of 9 to 64 NF4 tokens for an H100, on a machine that has none.

    python benchmarks/sass.py [gate_up:64 o:64 down:64 qkv:64 1000x576:41] [--ptxas PTXAS] [--out FOLDER]

One JSON line each: registers, bytes spilled, instructions, those of the loop and how many of each kind, and whether a
copy of codes has both an address in two parts and a policy, which is an illegal instruction. `--out` keeps the PTX and
the numbered SASS. It wants Triton and jax-triton, whose assembler it uses unless another is named; a driver has one of
its own, which is the newer the driver is. So a change that should cost nothing can be seen to cost nothing.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import json
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp

from jaxlora.kernels import nf4_matmul_float8, nf4_matmul_wgmma
from jaxlora.kernels.ordered import FLOAT8, Ordered, shape_of
from jaxlora.kernels.reference import NF4Fields

WORKS = {
    "qkv": ((4096, 4096), (1024, 4096), (1024, 4096)),
    "o": ((4096, 4096),),
    "gate_up": ((14336, 4096), (14336, 4096)),
    "down": ((4096, 14336),),
}
WORKS_TO_SHOW = [
    "gate_up:64", "down:64", "qkv:64", "o:64", "o:16", "1000x576:41", "gate_up:64:fp8", "down:64:fp8", "gate_up:16:fp8",
    "1000x768:24:fp8", "33x512:20:fp8",
]  # fmt: skip
LAYERS = 32


def program(work: str):
    """(function, its arguments) of "gate_up:64" or "1000x576:41", or in float8 of "gate_up:64:fp8"."""
    name, tokens, *float8 = work.split(":")
    rows, _, columns = name.partition("x")
    shapes = WORKS[name] if name in WORKS else ((int(rows), int(columns)),)
    dtype = FLOAT8 if float8 else jnp.bfloat16
    gated: dict[str, Any] = dict(act="silu", ordered=dtype) if name == "gate_up" else {}

    def product(x, *weights):
        kernel = nf4_matmul_float8 if float8 else nf4_matmul_wgmma
        return kernel.matmul_nf4(x, list(weights), shapes=shapes, parts=True, **gated)

    struct = jax.ShapeDtypeStruct
    weights = [
        NF4Fields(
            struct((LAYERS, out, into // 2), jnp.uint8),
            struct((LAYERS, out, into // 64), jnp.uint8),
            struct((LAYERS, -(-out * into // 64 // 256)), jnp.float32),
            struct((LAYERS,), jnp.float32),
            struct((), jnp.int32),
        )
        for out, into in shapes
    ]
    columns = shapes[0][1]
    x = Ordered(
        struct(shape_of(int(tokens), columns, bool(float8)), dtype), (int(tokens), columns), jnp.dtype(jnp.bfloat16)
    )
    if float8:  # as is made of them: a scale a tile of the gate, or a token
        of_columns = struct((columns // 128,), jnp.float32) if name == "down" else None
        of_tokens = None if name == "down" else struct((int(tokens),), jnp.float32)
        x = dataclasses.replace(x, of_tokens=of_tokens, of_columns=of_columns)
    return product, (x, *weights)


def ptx_of(function, args) -> str:
    """The PTX that jax-triton makes of the one kernel of a program, for compute capability 9.0."""
    import jaxlib.gpu_triton as gpu_triton

    found = []

    class Found(Exception):
        pass

    def compile_ttir(*arguments):
        found.append(compiled(*arguments))
        raise Found

    # What a plugin for GPUs has there, as far as it is asked for before the kernel is compiled.
    plugin = dict(get_compute_capability=lambda _: 90, get_serialized_metadata=None, get_arch_details=lambda _: "")
    with mock.patch.multiple(gpu_triton, create=True, **plugin):
        from jax_triton import triton_lib

        compiled = triton_lib.compile_ttir_to_ptx_inplace
        with mock.patch.object(triton_lib, "compile_ttir_to_ptx_inplace", compile_ttir):
            try:
                jax.jit(function).trace(*args).lower(lowering_platforms=("cuda",))
            except Found:
                pass
    ptx = found[0].binary
    return ptx.decode() if isinstance(ptx, bytes) else ptx


def instructions(cubin: Path, tools: Path) -> list[str]:
    """SASS without predicates' and registers' reuse, branches with the numbers of where they go."""
    text = subprocess.run([tools / "cuobjdump", "-sass", cubin], capture_output=True, text=True, check=True).stdout
    lines = [
        (int(match[1], 16), match[2].replace(".reuse", ""))
        for line in text.splitlines()
        if (match := re.match(r"\s+/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;\s+/\*", line))
    ]
    places = {address: number for number, (address, _) in enumerate(lines)}
    target = lambda match: f"->{places[int(match[1], 16)]}"
    jumps = re.compile(r"0x([0-9a-f]{2,})$")
    return [jumps.sub(target, line) if re.search(r"\b(BRA|BSSY)\b", line) else line for _, line in lines]


def loop_of(lines: list[str]) -> tuple[int, int]:
    """First and last instruction of the smallest loop around all products; (0, -1) where there is none."""
    products = [i for i, line in enumerate(lines) if re.search("[HQ]GMMA", line)]
    jumps = [(int(m[1]), i) for i, line in enumerate(lines) if (m := re.search(r"BRA.*->(\d+)$", line))]
    around = [(first, last) for first, last in jumps if first <= products[0] and products[-1] <= last]
    return min(around, key=lambda loop: loop[1] - loop[0], default=(0, -1))


def kind(line: str) -> str:
    return re.sub(r"^@!?U?P\w+\s+", "", line).split()[0].split(".")[0]


def measure(work: str, ptxas: str | None, out: Path) -> dict[str, Any]:
    import triton.backends.nvidia

    tools = Path(triton.backends.nvidia.__file__).parent / "bin"
    stem = out / work.replace(":", "-")
    ptx, cubin = stem.with_suffix(".ptx"), stem.with_suffix(".cubin")
    ptx.write_text(ptx_of(*program(work)))
    command = [ptxas or tools / "ptxas", "-v", "-arch=sm_90a", ptx, "-o", cubin]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    lines = instructions(cubin, tools)
    stem.with_suffix(".sass").write_text("".join(f"{i} {line}\n" for i, line in enumerate(lines)))
    first, last = loop_of(lines)
    kinds = collections.Counter(map(kind, lines[first : last + 1]))
    copies = [line for line in lines if "LDGSTS" in line]
    return dict(
        op="sass", work=work, registers=int(re.findall(r"Used (\d+) registers", said)[0]),
        spilled=int(re.findall(r"(\d+) bytes spill stores", said)[0]), instructions=len(lines), loop=last - first + 1,
        before=first, kinds=dict(kinds.most_common(12)), illegal=any(re.search(r"\+UR", line) for line in copies),
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("works", nargs="*", default=WORKS_TO_SHOW)
    parser.add_argument("--ptxas")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        out = args.out or Path(scratch)
        out.mkdir(parents=True, exist_ok=True)
        for work in args.works:
            print(json.dumps(measure(work, args.ptxas, out)), flush=True)


if __name__ == "__main__":
    main()
