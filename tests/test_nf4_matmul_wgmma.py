"""The product of up to 64 tokens with an NF4 weight by `wgmma`: its layout on the CPU, its values on a GPU of 9.0."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_nf4_matmul import LIMITS, fields_of, operands, relative_error

from jaxlora.kernels import nf4_matmul_wgmma
from jaxlora.kernels.nf4_matmul_wgmma import Config

DTYPES = [jnp.bfloat16, jnp.float16]


@pytest.mark.parametrize("tokens", [9, 64])
def test_the_shared_memory_needs_no_asking_for(tokens):
    assert nf4_matmul_wgmma.shared_bytes(tokens) <= 48 << 10


@pytest.mark.parametrize("tokens", [16, 64])
@pytest.mark.parametrize("rows, columns", [((14336, 14336), 4096), ((4096, 1024, 1024), 4096), ((4096,), 14336)])
def test_a_split_fills_the_device_and_leaves_no_part_empty(tokens, rows, columns):
    config = nf4_matmul_wgmma.heuristics(tokens, rows, columns)
    programs = config.split * nf4_matmul_wgmma.tiles_of(rows, config.num_warps)
    slots = nf4_matmul_wgmma.SMS * 16 // config.num_warps
    assert config.split <= -(-columns // 256) and 0.7 * slots <= programs <= slots


@pytest.mark.parametrize("tiles", [2, 8])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_products_of_a_block(dtype, tiles):
    """The PTX on a warpgroup, and x where `copy` puts it: 64 rows of 64 elements times all tokens, by scales."""
    dtype, random, tokens = jnp.dtype(dtype), np.random.default_rng(0), 8 * tiles
    w, x = random.standard_normal((64, 64)).astype(dtype), random.standard_normal((tokens, 64)).astype(dtype)
    scales, before = random.standard_normal(64), random.standard_normal((64, tokens))
    permuted = x.reshape(tokens, 4, 4, 2, 2).transpose(0, 2, 3, 1, 4).reshape(tokens, 64)  # t, s, u, h -> s, u, t, h
    token, piece = np.divmod(np.arange(8 * tokens), 8)
    memory, buffer = np.zeros((1 << 14) // 2, dtype), 2048
    for i in range(8):
        memory[(buffer + token * 128 + (piece ^ token % 8) * 16) // 2 + i] = permuted[token, 8 * piece + i]
    thread = np.arange(128)
    t, upper = thread % 4, thread // 32 * 16 + thread % 32 // 4
    n = 4 * tiles
    places = [(upper + 8 * (i // 2 % 2), 2 * t + i % 2 + 8 * (i // 4)) for i in range(n)]
    registers: dict[str, Any] = {f"${n + 19 + i}": before[places[i]] for i in range(n)}
    for i in range(16):
        registers[f"${n + i}"] = w[upper + i // 8 * 8].reshape(128, 4, 8, 2)[thread, t, i % 8]
    registers[f"${n + 16}"] = buffer
    registers |= {f"${n + 17 + i}": scales[upper + 8 * i] for i in range(2)}
    value = lambda name: registers[name] if name in registers else int(name, 0)
    for line in nf4_matmul_wgmma._products_assembly(dtype, tiles).splitlines()[1:-1]:
        op, _, names = line.removesuffix(";").partition(" ")
        target, *arguments = names.split(", ")
        match op:
            case "mov.f32":
                registers[target] = np.zeros(128)
            case "bfe.u32":
                registers[target] = value(arguments[0]) >> int(arguments[1]) & (1 << int(arguments[2])) - 1
            case "cvt.u64.u32":
                registers[target] = value(arguments[0])
            case "or.b64":
                registers[target] = value(arguments[0]) | value(arguments[1])
            case "add.u64":
                registers[target] = value(arguments[0]) + value(arguments[1])
            case "setp.ne.b32":
                registers[target] = value(arguments[0]) != value(arguments[1])
            case "fma.rn.f32":
                one, other, more = map(value, arguments)
                registers[target] = one * other + more
            case _ if op.startswith("wgmma.mma_async"):
                assert f".m64n{tokens}k16." in op
                d, a = (group_.split(", ") for group_ in re.findall(r"{([^}]*)}", names))
                at, add, *flags = names.rpartition("}, ")[2].split(", ")
                assert flags == ["1", "1", "0"]  # neither negated, x by its rows
                left, descriptor = np.zeros((64, 16)), registers[at]
                for half in range(2):
                    for i in range(4):
                        left[upper + 8 * (i % 2), 2 * t + half + 8 * (i // 2)] = registers[a[i]][:, half]
                assert descriptor >> 62 == 1  # the swizzle of 128 bytes: of address bits 4 to 6 by bits 7 to 9
                m, k = np.arange(tokens)[:, None], np.arange(16)
                start, groups = (descriptor & 0x3FFF) << 4, (descriptor >> 32 & 0x3FFF) << 4
                address = start + m // 8 * groups + m % 8 * 128 + 2 * k
                right = memory[(address ^ (address >> 7 & 7) << 4) // 2].astype(np.float64)
                product = left @ right.T
                for i in range(n):
                    registers[d[i]] = registers[d[i]] * registers[add] + product[places[i]]
    wanted = before + scales[:, None] * (w.astype(np.float64) @ x.astype(np.float64).T)
    for i in range(n):
        np.testing.assert_allclose(registers[f"${i}"], wanted[places[i]], rtol=1e-9)


# --- on a GPU ---


@pytest.mark.gpu
@pytest.mark.parametrize("layout", [None, dict(num_warps=4, split=3), dict(num_warps=16, ahead=0)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape, tokens",
    [((1024, 4096), 16), ((100, 64), 9), ((70, 192), 17), ((896, 4864), 24), ((1000, 576), 41), ((4096, 14336), 64)],
)
def test_it_is_as_exact_as_the_dtype(key, dtype, shape, tokens, layout):
    if jax.devices()[0].compute_capability != "9.0":
        pytest.skip("wgmma is of compute capability 9.0")
    x, q = operands(key, tokens, shape, dtype, is_stacked=True)
    config = layout and Config(**layout)
    run = jax.jit(lambda x, q: nf4_matmul_wgmma.matmul_nf4(x, [fields_of(q)], shapes=[q.shape], config=config)[0])
    y = run(x, q)
    assert y.dtype == dtype and y.shape == (tokens, shape[0])
    assert relative_error(y, x, q) < LIMITS[dtype]
    np.testing.assert_array_equal(y, run(x, q))
