"""Where the energy of generating goes, by the card's own meter, one JSON line a measurement.

    python benchmarks/energy.py 8b [--weights nf4 bf16] [--batches 1 64] [--prompt 128] [--new 128] [--seconds 3]

A card that has reached its power limit lowers its clock, and then a step takes as long as its energy does at that
limit, however its kernels wait for each other. So beside the time that reading takes there is one of energy:

    floor = (bytes * pj_byte + flops * pj_flop) / (limit - idle)

of a step's bytes, each read once, and of its products, with what a byte and an operation cost here: "read" adds up 1
GiB, "matmul" multiplies 8192 x 8192 normally distributed numbers in bfloat16, each over what the card takes when idle.
Nothing else that a step does is in it: no lookups, no scales, nothing that is read twice.

"decode" lines have a step's joules, milliseconds and watts while steps follow each other for some seconds, `of_floor`,
and `rested_ms`: a step's milliseconds within the first tokens after a second of rest. `mhz` is the clock between two
calls, as NVML tells it: within one it may be lower. The models are `decode.py`'s: random weights and prompts, greedy.
"""

from __future__ import annotations

import ctypes
import json
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from decode import arguments, bytes_of_step, model_of

from jaxlora.bench.shapes import weights_of
from jaxlora.generate import generate

SM_CLOCK = 1  # NVML_CLOCK_SM


class Meter:
    """The energy and clock of the first GPU, as the driver's library (NVML) tells them."""

    def __init__(self):
        self.nvml, self.device = ctypes.CDLL("libnvidia-ml.so.1"), ctypes.c_void_p()
        self._ask("nvmlInit_v2")
        self._ask("nvmlDeviceGetHandleByIndex_v2", 0, ctypes.byref(self.device))

    def _ask(self, name: str, *args) -> None:
        code = getattr(self.nvml, name)(*args)
        if code:
            raise RuntimeError(f"{name} of NVML returned {code}, not 0")

    def _number(self, name: str, kind: type, *args) -> int:
        value = kind()
        self._ask(name, self.device, *args, ctypes.byref(value))
        return value.value

    def joules(self) -> float:
        """Since the driver was loaded."""
        return self._number("nvmlDeviceGetTotalEnergyConsumption", ctypes.c_ulonglong) / 1e3

    def mhz(self) -> int:
        return self._number("nvmlDeviceGetClockInfo", ctypes.c_uint, SM_CLOCK)

    def limit(self) -> float:
        """Watts."""
        return self._number("nvmlDeviceGetEnforcedPowerLimit", ctypes.c_uint) / 1e3

    def over(self, run: Callable[[], object], seconds: float) -> dict[str, float]:
        """Of runs that follow each other: seconds and joules of one, watts, and the clock after one. Those of the first
        second, in which it settles, are not counted."""
        start = time.perf_counter()
        while time.perf_counter() - start < 1.0:
            run()
        count, clocks, before, start = 0, [], self.joules(), time.perf_counter()
        while time.perf_counter() - start < seconds:
            run()
            clocks.append(self.mhz())
            count += 1
        elapsed, joules = time.perf_counter() - start, self.joules() - before
        return dict(s=elapsed / count, j=joules / count, watts=joules / elapsed, mhz=statistics.mean(clocks))


def report(**line) -> None:
    digits = lambda value: float(f"{value:.4g}") if isinstance(value, float) else value
    print(json.dumps({key: digits(value) for key, value in line.items()}), flush=True)


def costs(meter: Meter, seconds: float) -> dict[str, float]:
    """(idle watts, pJ a byte, pJ an operation), reported."""
    time.sleep(1.0)
    idle = meter.over(lambda: time.sleep(0.1), seconds)["watts"]
    report(op="energy", work="idle", watts=idle, limit=meter.limit(), device=jax.devices()[0].device_kind)
    found: dict[str, float] = dict(idle=idle)
    numbers = jax.random.bits(jax.random.key(0), (1 << 28,), jnp.uint32)
    square = jax.random.normal(jax.random.key(1), (8192, 8192), jnp.bfloat16)
    for work, key, unit, program, array, amount in (
        ("read", "byte", "gb_s", lambda x: jnp.sum(x), numbers, numbers.nbytes),
        ("matmul", "flop", "gflop_s", lambda x: x @ x, square, 2 * square.shape[0] ** 3),
    ):
        compiled = jax.jit(program).lower(array).compile()

        def several(compiled=compiled, array=array):
            return jax.block_until_ready([compiled(array) for _ in range(20)])

        line = meter.over(several, seconds)
        found[key] = (line["j"] - idle * line["s"]) / 20 / amount
        rate = {unit: amount * 20 / line["s"] / 1e9}
        report(op="energy", work=work, watts=line["watts"], mhz=line["mhz"], **rate, **{f"pj_{key}": found[key] * 1e12})
    return found


def rested(run: Callable[[int], object]) -> float:
    """Seconds of a step within the first tokens after a second of rest."""
    few, steps = 33, []
    for _ in range(4):
        times = []
        for new in (1, few):
            time.sleep(1.0)
            start = time.perf_counter()
            run(new)
            times.append(time.perf_counter() - start)
        steps.append((times[1] - times[0]) / (few - 1))
    return statistics.median(steps[1:])  # the first compiles


def measure(args, meter: Meter, cost: dict[str, float], model, weights: str, batch: int) -> None:
    idle = cost["idle"]
    ids = np.random.default_rng(0).integers(1, model.config.vocab_size, (batch, args.prompt))
    run = lambda new: generate(model, ids, max_new_tokens=new, eos_token_id=[])
    first, whole = meter.over(lambda: run(1), args.seconds), meter.over(lambda: run(args.new), args.seconds)
    step, joules = ((whole[key] - first[key]) / (args.new - 1) for key in ("s", "j"))
    size, flops = bytes_of_step(model, batch, args.prompt + args.new // 2), 2 * batch * weights_of(args.shape)
    floor = (size * cost["byte"] + flops * cost["flop"]) / (meter.limit() - idle)
    report(
        op="energy", work=f"decode {args.shape}-{batch}x{args.prompt}+{args.new}", weights=weights,
        matmul_dtype=args.matmul_dtype, j=joules,
        ms=step * 1e3, watts=joules / step, mhz=whole["mhz"], bytes=size, flops=flops, bytes_j=size * cost["byte"],
        flops_j=flops * cost["flop"], idle_j=idle * step, floor_ms=floor * 1e3, of_floor=floor / step,
        rested_ms=rested(run) * 1e3,
    )  # fmt: skip


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--seconds", type=float, default=3.0)
    args = parser.parse_args()
    meter = Meter()
    cost = costs(meter, args.seconds)
    for weights in args.weights:
        model = model_of(args, weights)
        for batch in args.batches:
            measure(args, meter, cost, model, weights, batch)
        del model


if __name__ == "__main__":
    main()
