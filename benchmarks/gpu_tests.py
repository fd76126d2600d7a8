"""Run the tests marked `gpu` and write what came of them, as JSON: commit, device, versions, passed, failed, skipped.

python benchmarks/gpu_tests.py COMMIT gpu_tests.json [pytest arguments]
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree

from jaxlora.bench.device import PACKAGES, versions


def main(commit: str, target: str, *arguments: str) -> int:
    begin = time.perf_counter()
    with tempfile.NamedTemporaryFile(suffix=".xml") as report:
        command = ["pytest", "-m", "gpu", "-q", "--tb=short", "-p", "no:cacheprovider", f"--junitxml={report.name}"]
        code = subprocess.run([sys.executable, "-P", "-m", *command, *arguments], check=False).returncode
        cases = list(ElementTree.parse(report.name).getroot().iter("testcase"))
    seconds = time.perf_counter() - begin
    kinds = {kind: [c for c in cases if c.find(kind) is not None] for kind in ("failure", "error", "skipped")}
    failed = kinds["failure"] + kinds["error"]
    import jax  # after the tests, which want the device for themselves

    record = dict(
        commit=commit,
        device=jax.devices()[0].device_kind,
        date=time.strftime("%Y-%m-%d"),
        versions=versions(*PACKAGES, "bitsandbytes"),
        passed=len(cases) - len(failed) - len(kinds["skipped"]),
        failed=len(failed),
        skipped=len(kinds["skipped"]),
        failures=[f"{c.get('classname')}::{c.get('name')}" for c in failed],
        skips=sorted({(c.find("skipped").get("message") or "")[:200] for c in kinds["skipped"]}),
        seconds=round(seconds),
    )
    with open(target, "w") as file:
        json.dump(record, file, indent=2)
        file.write("\n")
    print(json.dumps(record))
    return code


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
