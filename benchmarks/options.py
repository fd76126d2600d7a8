"""A training step with each kind of frozen weights, each option of adapters, and full determinism, beside QLoRA's own.

    python -P benchmarks/options.py 8b-4x2048 [--policies offload projections] [--steps 6] [--only int8 dora ...]

One JSON line each. Random weights, each measurement in a process of its own, as `jaxlora bench` makes them: the columns
are its rows', and `of_nf4` is the tokens a second over those of the plain NF4 step with the same policy, in the same
call. "bias" is for shapes that have some ("7b").
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
import time
from typing import Any

from jaxlora.bench.shapes import CONFIGS, Work
from jaxlora.bench.step import ADAPTERS, NF4, measure

# name: what differs from the plain step.
OPTIONS: dict[str, dict[str, Any]] = {
    "nf4": {},
    "nf4, absmax in float32": dict(quant_config=dict(double_quant=False)),
    "int8": dict(quant_config=dict(scheme="int8")),
    "fp8": dict(quant_config=dict(scheme="fp8")),
    "fp8_block": dict(quant_config=dict(scheme="fp8_block")),
    "bfloat16": dict(quant_config=None),
    "dropout": dict(lora_config=dict(lora_dropout=0.1)),
    "dora": dict(lora_config=dict(use_dora=True)),
    "rslora": dict(lora_config=dict(use_rslora=True)),
    "r=64": dict(lora_config=dict(r=64)),
    "bias": dict(lora_config=dict(bias="all")),
    "experts": dict(lora_config=dict(target_parameters=("mlp.experts.gate_up_proj", "mlp.experts.down_proj"))),
    "full_determinism": dict(full_determinism=True),
    "dora, dropout, int8": dict(quant_config=dict(scheme="int8"), lora_config=dict(use_dora=True, lora_dropout=0.1)),
}


def row_of(work: str, policy: str, steps: int, option: str) -> dict[str, Any]:
    """The row of an option, measured in this process.

    Raises:
      ValueError: biases are to learn, and the shape has none.
    """
    from jaxlora.offload import allow_memory

    allow_memory()
    import jax

    changes, shape = OPTIONS[option], Work.parse(work).shape
    if "bias" in changes.get("lora_config", {}) and not has_biases(shape):
        raise ValueError(f"{option!r} needs a shape with biases, such as 7b, and {shape} has none")
    quant = changes.get("quant_config", {})
    row = measure(
        Work.parse(work),
        policy,
        steps,
        quant_config=None if quant is None else dataclasses.replace(NF4, **quant),
        lora_config=dataclasses.replace(ADAPTERS, **changes.get("lora_config", {})),
        full_determinism=changes.get("full_determinism", False),
    )
    return dict(op="option", option=option) | row | dict(device=jax.devices()[0].device_kind)


def has_biases(shape: str) -> bool:
    """Whether a model of the shape has a bias that could learn."""
    from flax import nnx

    from jaxlora.converters.huggingface import model_config
    from jaxlora.model import CausalLM

    model = nnx.eval_shape(lambda: CausalLM(model_config(CONFIGS[shape]), rngs=nnx.Rngs(0)))
    return any(path[-1] == "bias" for path, _ in nnx.to_flat_state(nnx.state(model)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", help="SHAPE-BATCHxTOKENS")
    parser.add_argument("--policies", nargs="+", default=["offload"])
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--only", nargs="+", choices=OPTIONS, default=list(OPTIONS))
    parser.add_argument("--here", action="store_true", help="the one option of --only in this process")
    args = parser.parse_args()
    if args.here:
        print(json.dumps(row_of(args.work, args.policies[0], args.steps, args.only[0])))
        return

    from jaxlora.bench.device import commit, versions  # in the processes that measure JAX has the device for itself

    facts = dict(date=time.strftime("%Y-%m-%d"), versions=versions(), commit=commit())
    for policy in args.policies:
        plain = None
        for option in dict.fromkeys(["nf4", *args.only]):
            command = [sys.executable, "-P", __file__, args.work, "--policies", policy, "--steps", str(args.steps)]
            run = subprocess.run([*command, "--only", option, "--here"], capture_output=True, text=True, check=False)
            if run.returncode:
                last = (run.stderr.strip().splitlines() or [f"exit code {run.returncode}"])[-1]
                print(json.dumps(dict(op="option", option=option, policy=policy, error=last[:300])), flush=True)
                continue
            row = json.loads(run.stdout.splitlines()[-1])
            plain = row["tok_s"] if option == "nf4" else plain
            row["of_nf4"] = None if plain is None else round(row["tok_s"] / plain, 3)
            print(json.dumps(row | facts), flush=True)


if __name__ == "__main__":
    main()
