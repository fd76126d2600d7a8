"""What a measurement ran on: the device, its peak, the versions, the commit.

`python -m jaxlora.bench.device` prints the device as JSON, for a process that must not take it for itself.
"""

from __future__ import annotations

import importlib.metadata
import json
import re
import subprocess
from pathlib import Path

PACKAGES = ("jax", "jaxlib", "jax-triton", "triton", "flax", "optax")

# Dense bfloat16 TFLOP/s with float32 sums of the makers' data sheets, by part of jax's device kind; the first counts.
PEAKS = {
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H200 NVL": 835.0,
    "H100": 989.0,
    "H200": 989.0,
    "GH200": 989.0,
    "A100": 312.0,
    "L40S": 362.0,
    "RTX 4090": 165.0,
}


def peak_tflop_s(device_kind: str) -> float | None:
    """Dense bfloat16 TFLOP/s of a device; None where none is stated here."""
    return next((peak for part, peak in PEAKS.items() if part in device_kind), None)


def short_name(device_kind: str) -> str:
    """A device kind as part of a file's name: "h100", or of an unknown one all that it says."""
    part = next((part for part in PEAKS if part in device_kind), device_kind)
    return re.sub(r"[^a-z0-9]+", "-", part.lower()).strip("-")


def versions(*packages: str) -> dict[str, str]:
    """The versions of the packages that are installed, by default of those that a step runs on."""
    found = {}
    for package in packages or PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str | None:
    """The commit of the checkout that this file lies in, "-dirty" with changes; None outside of one."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=7", "--exclude=*"]
    try:
        run = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return run.stdout.strip() if run.returncode == 0 else None


def main() -> None:
    import jax

    device = jax.devices()[0]
    print(json.dumps(dict(device=device.device_kind, platform=device.platform)))


if __name__ == "__main__":
    main()
