"""Run the tests marked `gpu` and write what came of them, as JSON: commit, device, versions, passed, failed, skipped.

    python -P benchmarks/gpu_tests.py COMMIT gpu_tests.json [--limit 300] [pytest arguments, such as -n 8]

A run that reaches the limit, in seconds, is stopped, and the record names the tests that it did not finish. XLA does
not try out which of its products are the fastest here, which takes longer than most tests.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PACKAGES = ("jax", "jaxlib", "jax-triton", "triton", "flax", "optax", "bitsandbytes", "torch", "peft")
LOG = "GPU_TESTS_LOG"  # the file that the plugin below writes


# ---- A plugin of pytest: each test's outcome as a JSON line, when it is known ----------------------------------------


def _write(**line) -> None:
    if LOG in os.environ and "PYTEST_XDIST_WORKER" not in os.environ:
        with open(os.environ[LOG], "a") as file:
            file.write(json.dumps(line) + "\n")


def pytest_runtest_logreport(report) -> None:
    if report.when == "call" or report.outcome != "passed":
        error = report.longreprtext[-1500:] if report.failed else ""
        _write(test=report.nodeid, outcome=report.outcome, seconds=round(report.duration, 1), error=error)
        if report.failed:
            print(f"\n{report.nodeid}\n{error}", flush=True)


def pytest_collection_finish(session) -> None:
    _write(collected=[item.nodeid for item in session.items])


class OfWorkers:
    """What only pytest-xdist calls."""

    def pytest_xdist_node_collection_finished(self, node, ids) -> None:
        _write(collected=list(ids))


def pytest_configure(config) -> None:
    if config.pluginmanager.hasplugin("xdist"):
        config.pluginmanager.register(OfWorkers())


# ---- The run ---------------------------------------------------------------------------------------------------------


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def main(commit: str, target: str, *arguments: str) -> int:
    limit = float("inf")
    if arguments[:1] == ("--limit",):
        limit, arguments = float(arguments[1]), arguments[2:]
    begin = time.perf_counter()
    with tempfile.NamedTemporaryFile(suffix=".jsonl") as log:
        environment = dict(os.environ)
        environment[LOG] = log.name
        paths = [str(Path(__file__).parent), environment.get("PYTHONPATH", "")]
        environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
        environment["XLA_FLAGS"] = f"--xla_gpu_autotune_level=0 {environment.get('XLA_FLAGS', '')}"
        command = [sys.executable, "-P", "-m", "pytest", "-m", "gpu", "-q", "--tb=short"]
        process = subprocess.Popen([*command, "-p", "gpu_tests", *arguments], env=environment, start_new_session=True)
        try:
            code = process.wait(None if limit == float("inf") else limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            code = process.wait()
        lines = [json.loads(line) for line in Path(log.name).read_text().splitlines()]
    seconds = time.perf_counter() - begin
    outcomes = {line["test"]: line["outcome"] for line in lines if "test" in line}
    collected = dict.fromkeys(test for line in lines for test in line.get("collected", ()))
    named = lambda outcome: sorted(test for test, found in outcomes.items() if found == outcome)
    import jax  # after the tests, which want the device for themselves

    record = dict(
        commit=commit,
        device=jax.devices()[0].device_kind,
        date=time.strftime("%Y-%m-%d"),
        versions={package: version(package) for package in PACKAGES},
        collected=len(collected),
        passed=len(named("passed")),
        failed=len(named("failed")),
        skipped=len(named("skipped")),
        failures={line["test"]: line["error"] for line in lines if line.get("outcome") == "failed"},
        skips=named("skipped"),
        unfinished=sorted(set(collected) - set(outcomes)),
        slowest=sorted(((line["seconds"], line["test"]) for line in lines if "test" in line), reverse=True)[:8],
        seconds=round(seconds),
    )
    Path(target).write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps({**record, "slowest": None}))
    return code


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
