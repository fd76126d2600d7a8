"""The step that `bench.step` measures, in Unsloth or in transformers with PEFT and bitsandbytes.

A script, which runs by its path in the environment where these are installed. It imports nothing of the library, and
the library does not import it: this is the one file that knows torch. Its argument is a JSON object

    peer        "unsloth" or "peft"
    folder      an NF4 checkpoint
    sizes       [[batch, sequence], ...]: the model is loaded once for all of them
    vocabulary, steps, rank, alpha
    gpu         whether to insist on one

and it prints a line for each size: size, tok_s, gib (the peak of what torch has allocated), the losses, the versions;
or size and error. With the argument "installed" it prints {peer: packages that are missing} instead. Each peer trains
as its makers say: Unsloth with its own checkpointing, PEFT with transformers', both under bfloat16 autocast with
the 8-bit AdamW of bitsandbytes, which keeps 2 bytes for each weight that learns where optax keeps 8.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import statistics
import sys
import time

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PACKAGES = {"peft": ["torch", "transformers", "peft", "bitsandbytes"]}
PACKAGES["unsloth"] = [*PACKAGES["peft"], "unsloth"]


def unsloth_model(job, dtype):
    from unsloth import FastLanguageModel  # pyright: ignore[reportMissingImports]

    longest = max(sequence for _, sequence in job["sizes"])
    model, _ = FastLanguageModel.from_pretrained(
        model_name=job["folder"], max_seq_length=longest, dtype=dtype, load_in_4bit=True,
        use_exact_model_name=True, local_files_only=True, use_gradient_checkpointing="unsloth",
    )  # fmt: skip
    model = FastLanguageModel.get_peft_model(
        model, r=job["rank"], lora_alpha=job["alpha"], lora_dropout=0, bias="none", target_modules=LINEARS,
        use_gradient_checkpointing="unsloth", random_state=3407, max_seq_length=longest,
    )  # fmt: skip
    return FastLanguageModel.for_training(model, use_gradient_checkpointing="unsloth") or model


def peft_model(job, dtype):
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(
        job["folder"], dtype=dtype, device_map={"": device}, attn_implementation="sdpa"
    )
    model.config.use_cache = False
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    config = LoraConfig(
        r=job["rank"], lora_alpha=job["alpha"], lora_dropout=0.0, bias="none", target_modules=LINEARS,
        task_type="CAUSAL_LM",
    )  # fmt: skip
    model = get_peft_model(model, config)
    model.enable_input_require_grads()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    return model


def missing():
    """{peer: its packages that are not installed}."""
    return {peer: [name for name in names if not importlib.util.find_spec(name)] for peer, names in PACKAGES.items()}


def main(job):
    peer = job["peer"]
    if peer == "unsloth":
        import unsloth  # noqa: F401  # pyright: ignore[reportMissingImports]  # first: it patches the others
    import torch

    if job["gpu"] and not torch.cuda.is_available():
        raise RuntimeError(f"torch {torch.__version__} finds no GPU")
    model = {"unsloth": unsloth_model, "peft": peft_model}[peer](job, torch.bfloat16)
    if "Linear4bit" not in {type(module).__name__ for module in model.modules()}:
        raise RuntimeError(f"{peer} did not load the checkpoint in 4 bits")
    model.train()
    for batch, sequence in job["sizes"]:
        try:
            found = measure(model, batch, sequence, job)
        except RuntimeError as error:  # out of memory, say, which ends no other size
            found = dict(error=f"{type(error).__name__}: {error}".splitlines()[0])
            model.zero_grad(set_to_none=True)
        versions = {name: importlib.metadata.version(name) for name in PACKAGES[peer]}
        print(json.dumps(dict(size=[batch, sequence], **found, versions=versions)), flush=True)


def measure(model, batch, sequence, job):
    """tok_s over the median step, the first two not counted, gib and losses."""
    import torch

    is_gpu = torch.cuda.is_available()
    device = "cuda" if is_gpu else "cpu"
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if is_gpu:
        from bitsandbytes.optim import AdamW8bit  # pyright: ignore[reportPrivateImportUsage]

        optimizer = AdamW8bit(trained, lr=2e-4)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    else:
        optimizer = torch.optim.AdamW(trained, lr=2e-4)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, job["vocabulary"], (batch, sequence), generator=generator).to(device)

    times, losses = [], []
    for _ in range(job["steps"]):
        start = time.perf_counter()
        with torch.autocast(device, dtype=torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())  # waits for the step
        if is_gpu:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return dict(
        tok_s=round(ids.numel() / statistics.median(times[2:])),
        gib=round(torch.cuda.max_memory_allocated() / 2**30, 2) if is_gpu else None,
        loss_first=round(losses[0], 4),
        loss_last=round(losses[-1], 4),
    )


if __name__ == "__main__":
    os.environ |= dict(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", UNSLOTH_DISABLE_STATISTICS="1")
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    if sys.argv[1] == "installed":
        print(json.dumps(missing()))
    else:
        main(json.loads(sys.argv[1]))
