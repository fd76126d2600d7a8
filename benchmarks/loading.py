"""How fast a bfloat16 checkpoint becomes an NF4 model, beside what disk and bus can do, and what the host holds of it.

    python benchmarks/loading.py [8b] [--folder /tmp/jaxlora-loading] [--keep]

Makes the checkpoint (16 GB of random weights for 8b, not timed) and prints one JSON line: a load from a cold page cache
and one from a warm one, each in a process of its own, in seconds and GB/s of the files; `again_s` is the same load once
more in the warm process, with nothing left to compile. rss_anon_gib is the most anonymous memory that the process held
beyond what it had before loading, which is what is not page cache. Beside them, in the same run, GB/s of

    read_cold, read_warm        plain reads of the files with four threads
    pinned, pageable            one 1 GiB array to the device, from pinned and from ordinary host memory
    sent                        the files to the device through `ReadAhead`, not quantised, page cache warm
    quantised                   quantising what is on the device already, in GB/s of bfloat16
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from jaxlora.bench.checkpoints import evict
from jaxlora.bench.device import commit, versions

CHUNK = 64 << 20
GIB = 2.0**30


def seconds_of(function: Callable[[], Any]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def read_plainly(folder: Path) -> None:
    def read(path: Path, start: int) -> None:
        buffer = bytearray(CHUNK)
        with path.open("rb", buffering=0) as file:
            file.seek(start)
            file.readinto(buffer)

    pieces = [(p, start) for p in folder.glob("*.safetensors") for start in range(0, p.stat().st_size, CHUNK)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda piece: read(*piece), pieces))


def anonymous_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("RssAnon:")[1].split()[0])


def measure_load(folder: Path) -> dict[str, float]:
    """A load in this process, as `from_pretrained` does it, and the peak of what it held."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from jaxlora.config import QuantConfig
    from jaxlora.converters.huggingface import SafetensorsSource, load_model

    hf_config = json.loads((folder / "config.json").read_text())

    def load() -> None:
        model = load_model(SafetensorsSource(folder), hf_config, dtype=jnp.bfloat16, quant_config=QuantConfig())
        jax.block_until_ready(nnx.state(model))

    jax.block_until_ready(jnp.zeros(()))  # the device's start is not loading
    before, peak, done = anonymous_bytes(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.005):
            peak = max(peak, anonymous_bytes())

    thread = threading.Thread(target=watch)
    thread.start()
    seconds = seconds_of(load)
    done.set()
    thread.join()
    return dict(s=seconds, rss_anon_gib=(peak - before) / GIB, again_s=seconds_of(load))


def measure_bus(folder: Path) -> dict[str, float]:
    """GB/s to the device, and of quantising there."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from jaxlora import offload, quant
    from jaxlora.converters.huggingface import SafetensorsSource
    from jaxlora.converters.read_ahead import ReadAhead

    device, is_gpu = jax.devices()[0], jax.default_backend() == "gpu"
    host = np.ones(2**29 if is_gpu else 2**25, np.float16)

    def rate(function: Callable[[], Any], nbytes: int) -> float:
        wait = lambda: jax.block_until_ready(function())
        wait()
        return nbytes / min(seconds_of(wait) for _ in range(3)) / 1e9

    found = dict(pageable=rate(lambda: jax.device_put(host, device), host.nbytes))
    if is_gpu:
        pinned = jax.device_put(host, offload.pinned_host())
        there = jax.sharding.SingleDeviceSharding(device)
        found["pinned"] = rate(lambda: jax.device_put(pinned, there), host.nbytes)
    source = SafetensorsSource(folder)

    def send() -> None:
        with ReadAhead(source, source.names()) as tensors:
            for _ in source.names():
                tensors.used(tensors.next())

    found["sent"] = size_of(folder) / seconds_of(send) / 1e9
    name = max((n for n in source.names() if ".layers." in n), key=lambda n: np.prod(source.shape(n)))
    weight = jnp.asarray(source.read(name))
    quantise = jax.jit(quant.quantize)
    found["quantised"] = rate(lambda: quantise(weight), weight.nbytes)
    return found


def in_a_process(what: str, folder: Path) -> dict[str, float]:
    command = [sys.executable, "-P", __file__, "--only", what, "--folder", str(folder)]
    run = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(run.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", nargs="?", default="8b")
    parser.add_argument("--folder", type=Path, default=Path("/tmp/jaxlora-loading"))
    parser.add_argument("--keep", action="store_true", help="leave the checkpoint where it is")
    parser.add_argument("--only", choices=["load", "bus"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only:
        print(json.dumps(dict(load=measure_load, bus=measure_bus)[args.only](args.folder)))
        return
    folder = args.folder / args.shape
    if not (folder / "config.json").exists():
        module = [sys.executable, "-P", "-m", "jaxlora.bench.checkpoints"]
        subprocess.run([*module, str(folder), args.shape, "bfloat16"], check=True)
    device = subprocess.run(
        [sys.executable, "-P", "-m", "jaxlora.bench.device"], stdout=subprocess.PIPE, text=True, check=True
    )
    size = size_of(folder)
    row: dict[str, Any] = dict(op="load", shape=args.shape, gb=round(size / 1e9, 2))
    evict(folder)
    read = dict(read_cold=size / seconds_of(lambda: read_plainly(folder)) / 1e9)
    read["read_warm"] = size / seconds_of(lambda: read_plainly(folder)) / 1e9
    evict(folder)
    for state in ("cold", "warm"):
        for name, value in in_a_process("load", folder).items():
            row[f"{state}_{name}"] = round(value, 2)
        row[f"{state}_gb_s"] = round(size / row[f"{state}_s"] / 1e9, 2)
    row["again_gb_s"] = round(size / row["warm_again_s"] / 1e9, 2)
    row["bandwidth_gb_s"] = {name: round(value, 2) for name, value in (read | in_a_process("bus", folder)).items()}
    row |= dict(device=json.loads(device.stdout)["device"], versions=versions(), commit=commit())
    print(json.dumps(row | dict(date=time.strftime("%Y-%m-%d"))), flush=True)
    if not args.keep:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
