"""`jaxlora train | generate | export | quickstart | bench`.

Each command is a function of the values that were given, and its options are those of the Python API that it calls
(see `options`). Exit codes: 0 it worked, 1 it failed, 2 it was called wrongly. An error is one line on stderr, and
`--debug` shows where it came from.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jaxlora
from jaxlora.bench.command import bench
from jaxlora.compilation_cache import keep_compiled
from jaxlora.converters.export import save_merged
from jaxlora.converters.staging import staged
from jaxlora.generate import generate
from jaxlora.language_model import LanguageModel
from jaxlora.loader import FastLanguageModel
from jaxlora.offload import allow_memory
from jaxlora.options import (
    Option,
    OptionError,
    add_flags,
    argument_docs,
    from_dataclass,
    from_signature,
    gather,
    pick,
    unique,
)
from jaxlora.quickstart import quickstart
from jaxlora.rows import load_rows
from jaxlora.sft import SFTConfig, SFTTrainer

ENGINE = ["fast_inference", "gpu_memory_utilization", "float8_kv_cache", "max_lora_rank", "disable_log_stats"]
LOAD = from_signature(FastLanguageModel.from_pretrained, skip=["model_name", *ENGINE])  # which no command here runs
# The window is an option of loading, a temporary location of nothing, and no text stands for batches.
SKIPPED = ["model", "max_seq_length", "temporary_location", "init_dataset", "eva_config", "corda_config"]
ADAPTER = from_signature(FastLanguageModel.get_peft_model, skip=SKIPPED)
TRAINING = from_dataclass(SFTConfig, skip=["output_dir"])
SAMPLING = from_signature(generate, skip=["model", "input_ids", "attention_mask"])
ADAPTER_FILES = from_signature(LanguageModel.save_pretrained, skip=["self", "save_directory", "tokenizer"])
MERGED_FILES = [
    *from_signature(LanguageModel.save_pretrained_merged, skip=["self", "save_directory", "tokenizer", "save_method"]),
    *from_signature(save_merged, skip=["model", "folder", "tokenizer", "base", "save_method"]),
]
CACHE = from_signature(keep_compiled)
QUICKSTART, BENCH = from_signature(quickstart), from_signature(bench)

MODEL = Option(name="model", annotation=str, help=argument_docs(FastLanguageModel.from_pretrained)["model_name"])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Command:
    """run: a function of the given values, by name. groups: title -> options, as --help shows them."""

    run: Callable[[Mapping[str, Any]], None]
    help: str
    groups: Mapping[str, Sequence[Option]]

    @property
    def options(self) -> list[Option]:
        return unique(option for group in self.groups.values() for option in group)


def train(values: Mapping[str, Any]) -> None:
    """from_pretrained, get_peft_model, SFTTrainer, save_pretrained. An adapter as the model trains on."""
    keep_compiled(**pick(values, CACHE))
    allow_memory()
    config = SFTConfig(output_dir=values["output"], **pick(values, TRAINING))
    if "merged" in values:
        with staged(values["merged"]):  # which writes nothing now, and fails where nothing could be written later
            pass
    rows = load_rows(values["data"])  # what is wrong with it should be said before minutes of loading a model
    eval_rows = load_rows(values["eval_data"]) if "eval_data" in values else None
    load, adapter = pick(values, LOAD), pick(values, ADAPTER)
    if not values.get("full_finetuning"):
        load.pop("qat_scheme", None)  # which is the adapter's then
    model, tokenizer = FastLanguageModel.from_pretrained(values["model"], **load)
    if adapter.get("target_modules") == ["all-linear"]:
        adapter["target_modules"] = "all-linear"
    if (model.lora_config is None and not model.full_finetuning) or adapter:
        model = FastLanguageModel.get_peft_model(model, **adapter)
    model.print_trainable_parameters()
    trainer = SFTTrainer(
        model=model,
        processing_class=tokenizer,
        train_dataset=rows,
        eval_dataset=eval_rows,
        args=config,
    )
    result = trainer.train()
    print(f"{result.global_step} steps, mean loss {result.training_loss:.4f}")
    if eval_rows is not None:
        print(f"loss on the eval data: {trainer.evaluate()['eval_loss']:.4f}")
    model.save_pretrained(values["output"], tokenizer, **pick(values, ADAPTER_FILES))
    print(f"{'model' if model.full_finetuning else 'adapter'} written to {values['output']}")
    if "merged" in values:
        _save_merged(model, values["merged"], tokenizer, pick(values, MERGED_FILES))


def write(values: Mapping[str, Any]) -> None:
    """Print the continuation of each prompt."""
    keep_compiled(**pick(values, CACHE))
    conversations = _conversations(values)
    model, tokenizer = FastLanguageModel.from_pretrained(values["model"], **pick(values, LOAD))
    if tokenizer is None:
        raise ValueError(f"{values['model']} has no tokenizer, so there is nothing to read a prompt with")
    if tokenizer.chat_template is None and "messages" in values:
        raise ValueError(
            f"the tokenizer of {values['model']} has no chat template: give --prompt instead of --messages"
        )
    prompts = [
        tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
        if tokenizer.chat_template is not None
        else tokenizer(messages[0]["content"])["input_ids"]
        for messages in conversations
    ]
    ids = model.generate(prompts, **pick(values, SAMPLING))
    new = ids[:, max(map(len, prompts)) :].tolist()
    print("\n\n".join(text.strip() for text in tokenizer.batch_decode(new, skip_special_tokens=True)))


def _conversations(values: Mapping[str, Any]) -> list[list[dict[str, str]]]:
    if ("prompt" in values) == ("messages" in values):
        raise OptionError("give either --prompt or --messages")
    if "prompt" in values:
        return [[{"role": "user", "content": text}] for text in values["prompt"]]
    path = values["messages"]
    text = sys.stdin.read() if path == "-" else Path(path).read_text()
    try:
        messages = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(messages, list) or not all(
        isinstance(m, dict) and {"role", "content"} <= set(m) for m in messages
    ):
        raise ValueError(f'{path}: expected a list of messages, [{{"role": "user", "content": "..."}}, ...]')
    return [messages]


def export(values: Mapping[str, Any]) -> None:
    """Write the model with its adapter merged, or the adapter alone, in Hugging Face's layout."""
    keep_compiled(**pick(values, CACHE))
    model, tokenizer = FastLanguageModel.from_pretrained(values["model"], **pick(values, LOAD))
    if values.get("save_method") == "lora":
        model.save_pretrained(values["output"], tokenizer, **pick(values, ADAPTER_FILES))
        print(f"adapter written to {values['output']}")
    else:
        _save_merged(model, values["output"], tokenizer, pick(values, MERGED_FILES))


def _save_merged(model: LanguageModel, folder: str, tokenizer: Any, options: Mapping[str, Any]) -> None:
    report = model.save_pretrained_merged(folder, tokenizer, **options)
    print(f"whole model written to {folder}")
    if report is None:  # every weight learnt, so there was nothing to merge
        return
    print(f"{report.merged_modules} weights merged, {', '.join(report.files)}")
    if report.export_error is not None and report.quantisation_gap is not None:
        print(f"largest difference of a logit from the same merge in memory: {report.export_error:.1e} (export error)")
        print(f"and from the live model: {report.quantisation_gap:.1e} (quantisation gap)")


COMMANDS = {
    "train": Command(
        run=train,
        help="fine-tune adapters on a data set",
        groups={
            "what": [
                MODEL,
                Option(
                    name="data", annotation=list[str],
                    help="Files of training rows: .jsonl, .json, .parquet or .txt.",
                ),
                Option(name="output", annotation=str, help="Folder for the adapter, checkpoints and metrics."),
                Option(
                    name="eval_data", annotation=list[str] | None, default=None,
                    help="Files of rows to compute the loss of, in the end and when eval_strategy says.",
                ),
                Option(
                    name="merged", annotation=str | None, default=None,
                    help="Folder for the whole model too, with the adapter merged, in 16 bits.",
                ),
            ],
            "model": LOAD,
            "adapter": ADAPTER,
            "training": TRAINING,
            "files": [*ADAPTER_FILES, *MERGED_FILES],
            "process": CACHE,
        },
    ),
    "generate": Command(
        run=write,
        help="continue prompts",
        groups={
            "what": [
                MODEL,
                Option(
                    name="prompt", annotation=list[str] | None, default=None,
                    help="What the user says; several are answered one by one. If the tokenizer has no chat template, "
                    "a text to continue.",
                ),
                Option(
                    name="messages", annotation=str | None, default=None,
                    help='JSON file of a conversation, [{"role": ..., "content": ...}, ...]; - is the standard input.',
                ),
            ],
            "model": LOAD,
            "sampling": SAMPLING,
            "process": CACHE,
        },
    ),
    "export": Command(
        run=export,
        help="write an adapter or a merged checkpoint",
        groups={
            "what": [
                MODEL,
                Option(name="output", annotation=str, help="Folder to write to."),
                Option(
                    name="save_method", annotation=Literal["merged_16bit", "lora"], default="merged_16bit",
                    help="A whole checkpoint with the adapter merged, or the adapter alone.",
                ),
            ],
            "files": [*ADAPTER_FILES, *MERGED_FILES],
            "model": LOAD,
            "process": CACHE,
        },
    ),
    "quickstart": Command(
        run=lambda values: quickstart(**values),
        help="fine-tune a small model on a small data set, from end to end",
        groups={"options": QUICKSTART},
    ),
    "bench": Command(
        run=lambda values: bench(**values),
        help="time training steps and kernels on this machine, beside Unsloth and PEFT",
        groups={"options": BENCH},
    ),
}  # fmt: skip


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def make_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = _Parser(prog="jaxlora", description=jaxlora.__doc__)
    parser.add_argument("--version", action="version", version=f"jaxlora {jaxlora.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        sub = commands.add_parser(
            name, help=command.help, description=command.help.capitalize() + ".", allow_abbrev=False
        )
        sub.add_argument(
            "--config", metavar="FILE", help="YAML file of options, named as in Python; flags go before it"
        )
        sub.add_argument("--debug", action="store_true", help="show where an error comes from")
        shown: set[str] = set()
        for title, options in command.groups.items():
            new = [option for option in unique(options) if option.name not in shown]
            shown |= {option.name for option in new}
            add_flags(sub.add_argument_group(title), new)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line, by default the process's own, and return the exit code."""
    parser = make_parser()
    args = parser.parse_args(argv)
    name, command = f"jaxlora {args.command}", COMMANDS[args.command]

    def fail(error: BaseException, code: int, hint: str = "") -> int:
        if args.debug:
            raise error
        message = " ".join(str(error).split()) or "no reason given"
        kind = "" if isinstance(error, ValueError | OSError | NotImplementedError) else f"{type(error).__name__}: "
        print(f"{name}: error: {kind}{message}{hint}", file=sys.stderr)
        return code

    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_: print(f"{name}: warning: {message}", file=sys.stderr)
        try:
            command.run(gather(command.options, vars(args), args.config))
        except OptionError as error:
            return fail(error, 2, f" (see {name} --help)")
        except KeyboardInterrupt:
            print(f"{name}: interrupted", file=sys.stderr)
            return 130
        except Exception as error:
            return fail(error, 1)
    return 0
