"""Supervised fine-tuning: `SFTConfig`, every option of a run with its help text, and `SFTTrainer`, the loop.

    trainer = SFTTrainer(model=model, processing_class=tokenizer, train_dataset="train.jsonl",
                         args=SFTConfig(output_dir="out", max_steps=100))
    trainer.train()                              # out/checkpoint-100, out/metrics.jsonl, out/loss.png

Options have the names and meaning that they have in TRL's `SFTConfig`, and its defaults, except that `max_length` is
the model's window. Losses are means over tokens, whichever way these were cut into micro-batches, batches, or steps
between two logs.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
import tempfile
import time
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import jax
import numpy as np
import optax
from flax import nnx
from tqdm.auto import tqdm

from jaxlora import checkpoint, remat, sharding
from jaxlora.batches import BatchIterator, FixedRows, pack, pad
from jaxlora.lora import partition
from jaxlora.loss import causal_lm_loss
from jaxlora.model import CausalLM
from jaxlora.optimizer import OptimizerName, Schedule, ScheduleName, make_optimizer, make_schedule
from jaxlora.remat_auto import choose_policy
from jaxlora.report import METRICS_FILE, PLOT_FILE, MetricsFile, Throughput, plot_loss, read_metrics
from jaxlora.tokenization import tokenize
from jaxlora.train import LossScale, TrainState, make_train_step

logger = logging.getLogger(__name__)

Interval = Literal["no", "steps", "epoch"]


def _option(default: Any, help: str, **metadata: Any) -> Any:
    """A field of `SFTConfig`. `least` and `below` bound its value: [least, below)."""
    return dataclasses.field(default=default, metadata={"help": help, **metadata})


@dataclasses.dataclass(frozen=True, kw_only=True)
class SFTConfig:
    """The options of a training run; each says in its metadata what it means.

    Raises:
        ValueError: a value of the wrong type, out of its range or not among its choices, or two that contradict.
    """

    output_dir: str | Path = _option("trainer_output", "Folder for checkpoints, metrics.jsonl and loss.png.")

    num_train_epochs: float = _option(3.0, "Passes over the data, unless max_steps says when to stop.", least=0)
    max_steps: int = _option(-1, "Number of optimizer updates; -1 is as many as num_train_epochs makes.", least=-1)
    per_device_train_batch_size: int = _option(
        8, "Rows of a micro-batch on each device (on a mesh, of each part of the batch).", least=1
    )
    gradient_accumulation_steps: int = _option(1, "Micro-batches of one optimizer update.", least=1)
    train_sampling_strategy: Literal["random", "sequential"] = _option(
        "random", "Order of the rows: shuffled anew in each epoch, or as they come."
    )
    dataloader_drop_last: bool = _option(False, "Leave out the rows that do not fill the last update of an epoch.")
    seed: int = _option(42, "Of adapter dropout, and of the order of the rows unless data_seed is given.", least=0)
    data_seed: int | None = _option(None, "Of the order of the rows; by default seed.", least=0)
    full_determinism: bool = _option(False, "On a GPU: the same run gives the same bits, if slower.")

    optim: OptimizerName = _option("adamw_torch", "Optimizer.")
    learning_rate: float = _option(2e-5, "Highest learning rate. Adapters mostly want about 2e-4.", least=0)
    lr_scheduler_type: ScheduleName = _option("linear", "How the learning rate goes on after the warm-up.")
    warmup_steps: float = _option(
        0, "Updates in which the learning rate rises from 0; below 1 a part of all updates.", least=0
    )
    warmup_ratio: float | None = _option(None, "warmup_steps as a part of all updates.", least=0, below=1)
    weight_decay: float = _option(0.0, "Weight decay, of what is no bias and no norm.", least=0)
    adam_beta1: float = _option(0.9, "Decay of the first moment.", least=0, below=1)
    adam_beta2: float = _option(0.999, "Decay of the second moment.", least=0, below=1)
    adam_epsilon: float = _option(1e-8, "Added to the root of the second moment.", least=0)
    max_grad_norm: float | None = _option(1.0, "Longer gradients are cut to this norm; 0 cuts none.", least=0)

    max_length: int | None = _option(
        None, "Most tokens of an example, and tokens of a packed row; by default the model's max_seq_length.", least=2
    )
    truncation_mode: Literal["keep_start", "keep_end", "drop"] = _option(
        "keep_start", "What becomes of a longer example."
    )
    packing: bool = _option(False, "Put several examples into a row. They do not see each other.")
    packing_strategy: Literal["bfd", "bfd_split", "wrapped"] = _option("bfd", "How examples are packed into rows.")
    pad_to_multiple_of: int | None = _option(None, "Without packing: round the length of rows up.", least=1)
    dataset_text_field: str = _option("text", "Field of a row that holds plain text.")
    completion_only_loss: bool | None = _option(
        None, "Train on the completion of prompt-completion rows alone; by default yes if rows are of that kind."
    )
    assistant_only_loss: bool = _option(False, "Train on what the assistant says in conversations alone.")

    logging_steps: float = _option(10, "Log every so many updates; below 1 a part of all updates.", least=0)
    disable_tqdm: bool = _option(False, "Show no progress bar.")
    report_to: Literal["none"] = _option("none", "Services to report to: there are none, read metrics.jsonl.")
    eval_strategy: Interval = _option("no", "When to compute the loss of the eval data set.")
    eval_steps: float | None = _option(
        None, "With eval_strategy='steps': every so many updates, by default logging_steps.", least=0
    )
    per_device_eval_batch_size: int = _option(8, "Rows of a batch of the eval data set on each device.", least=1)
    save_strategy: Interval = _option("steps", "When to save a checkpoint.")
    save_steps: float = _option(
        500, "With save_strategy='steps': every so many updates, and after the last one.", least=0
    )
    save_total_limit: int | None = _option(None, "Checkpoints to keep, the newest; by default all.", least=1)
    resume_from_checkpoint: bool | str | None = _option(
        None, "Go on from this checkpoint folder, or if True from the newest one in output_dir."
    )

    def __post_init__(self):
        types = typing.get_type_hints(type(self))
        for field in dataclasses.fields(self):
            _check_option(field, types[field.name], getattr(self, field.name))
        if self.max_steps == 0 or (self.max_steps < 0 and self.num_train_epochs == 0):
            raise ValueError(
                f"nothing to train: max_steps={self.max_steps}, num_train_epochs={self.num_train_epochs}; "
                "give a positive max_steps, or max_steps=-1 and a positive num_train_epochs"
            )
        if self.warmup_ratio and self.warmup_steps:
            raise ValueError(
                f"warmup_steps={self.warmup_steps} and warmup_ratio={self.warmup_ratio} are both given: choose one"
            )
        for name in ("logging_steps", "eval_steps", "save_steps", "warmup_steps"):
            value = getattr(self, name)
            if value is not None and value >= 1 and value != int(value):
                raise ValueError(f"{name} must be whole, or below 1 for a part of all updates; found {value}")
            if value == 0 and name != "warmup_steps":
                raise ValueError(f"{name} must be larger than 0, found 0")


def _check_option(field: dataclasses.Field, hint: Any, value: Any) -> None:
    if typing.get_origin(hint) is Literal:
        if value not in typing.get_args(hint):
            raise ValueError(f"{field.name}={value!r} is not one of {', '.join(typing.get_args(hint))}")
        return
    allowed = typing.get_args(hint) or (hint,)
    accepted = (*allowed, int) if float in allowed else allowed
    if not isinstance(value, accepted) or (isinstance(value, bool) and bool not in allowed):
        expected = " or ".join("None" if kind is type(None) else kind.__name__ for kind in allowed)
        mend = " (YAML reads 2e-4 as text: write 2.0e-4)" if isinstance(value, str) and float in allowed else ""
        raise ValueError(f"{field.name} must be {expected}, found {value!r}{mend}")
    least, below = field.metadata.get("least", -math.inf), field.metadata.get("below", math.inf)
    if isinstance(value, int | float) and not least <= value < below:  # NaN is refused too
        limit = "" if below == math.inf else f" and below {below}"
        raise ValueError(f"{field.name} must be at least {least}{limit}, found {value}")


class TrainOutput(NamedTuple):
    """What `SFTTrainer.train` returns. training_loss: the mean over all supervised tokens of the run."""

    global_step: int
    training_loss: float
    metrics: dict[str, float]


@dataclasses.dataclass
class Tally:
    """What a run has added up, kept in its checkpoints. Losses are sums over tokens, since the last log and in all.

    num_tokens: tokens read, without padding; seconds: of wall clock, compilation and all.
    """

    num_tokens: int = 0
    seconds: float = 0.0
    loss_since_log: float = 0.0
    weight_since_log: float = 0.0
    loss_in_all: float = 0.0
    weight_in_all: float = 0.0

    def add(self, steps: list[Mapping[str, Any]]) -> None:
        """Add the metrics of some steps, which are on the host."""
        for step in steps:
            loss, weight = float(step["loss"]) * float(step["num_tokens"]), float(step["num_tokens"])
            self.loss_since_log += loss
            self.weight_since_log += weight
            self.loss_in_all += loss
            self.weight_in_all += weight

    def log(self) -> float:
        """The mean loss since this was last called."""
        mean = self.loss_since_log / max(self.weight_since_log, 1.0)
        self.loss_since_log = self.weight_since_log = 0.0
        return mean


class SFTTrainer:
    """Trains a model's adapters on a data set, with the arguments of TRL's trainer of that name.

    A model that lies on a mesh, as `from_pretrained(device_map=...)` puts it, is trained on that mesh. A step then
    takes `per_device_train_batch_size` rows for each part of the batch: as many as "data" and "fsdp" make.

    Args:
        model: with adapters; `train` leaves them trained in it.
        args: options of the run.
        train_dataset: whatever `rows.load_rows` takes: paths, a list of dicts, a `datasets.Dataset`.
        eval_dataset: the same; evaluated as `args.eval_strategy` says.
        processing_class: the tokenizer. None is fine if rows have `input_ids`.
        formatting_func: makes the text of a row from its fields.
        optimizers: an optax optimizer and a schedule, each None for the one that `args` describes. The schedule of an
            optimizer that is given is only used to log its learning rate.

    Raises:
        OSError: `args.output_dir` cannot be written to.
        ValueError: a model without adapters, or on a mesh that `sharding.make_mesh` did not make; a `max_length` beyond
            the model's; or data that cannot be trained on: empty, with other fields, with no supervised token (see
            `tokenization.tokenize`), or ids beyond the vocabulary.
    """

    def __init__(
        self,
        model: CausalLM,
        args: SFTConfig | None = None,
        *,
        train_dataset: Any,
        eval_dataset: Any = None,
        processing_class: Any = None,
        formatting_func: Callable[[Mapping[str, Any]], str] | None = None,
        optimizers: tuple[optax.GradientTransformation | None, Schedule | None] = (None, None),
    ):
        self.model, self.args, self.processing_class = model, args or SFTConfig(), processing_class
        args, self.mesh = self.args, sharding.mesh_of(model)
        if self.mesh is not None:
            if self.mesh.axis_names != sharding.MESH_AXES:
                axes = ", ".join(map(str, self.mesh.axis_names))
                raise ValueError(
                    f"the model lies on a mesh with the axes {axes}, and a trainer can split its batches over one of "
                    "jaxlora.sharding.make_mesh alone"
                )
            sharding.shard(model, self.mesh)  # adapters that were put on it since it was loaded are not there yet
        self.output_dir = Path(args.output_dir).absolute()
        _check_writable(self.output_dir)
        if not jax.tree.leaves(partition(model)[1]):
            raise ValueError(
                "the model has nothing to train: put adapters on it first, with "
                "model = FastLanguageModel.get_peft_model(model), or load it with full_finetuning=True"
            )
        if args.eval_strategy != "no" and eval_dataset is None:
            raise ValueError(f"eval_strategy={args.eval_strategy!r} needs an eval_dataset, and none is given")

        self.max_length = _row_length(model, args.max_length)
        self.train_rows = self._rows(train_dataset, "training data", formatting_func)
        self.eval_rows = None if eval_dataset is None else self._rows(eval_dataset, "eval data", formatting_func)

        self.steps_per_epoch = len(self._train_batches())
        self.total_steps = (
            args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * self.steps_per_epoch)
        )
        self.logging_steps = self._count(args.logging_steps)
        self.eval_steps = self._count(args.logging_steps if args.eval_steps is None else args.eval_steps)
        self.save_steps = self._count(args.save_steps)

        optimizer, self.schedule = optimizers
        if optimizer is None:
            self.schedule = self.schedule or make_schedule(
                args.lr_scheduler_type,
                args.learning_rate,
                warmup_steps=self._count(args.warmup_ratio or args.warmup_steps),
                total_steps=self.total_steps,
            )
            optimizer = make_optimizer(
                args.optim,
                self.schedule,
                weight_decay=args.weight_decay,
                beta1=args.adam_beta1,
                beta2=args.adam_beta2,
                epsilon=args.adam_epsilon,
                max_grad_norm=args.max_grad_norm,
            )
        self.optimizer = optimizer

    def train(self, resume_from_checkpoint: bool | str | Path | None = None) -> TrainOutput:
        """Run to the last step, and leave the trained adapter in the model.

        Args:
            resume_from_checkpoint: a checkpoint folder; True for the newest one in `output_dir`, or to start afresh,
                and say so, if there is none; None for what `args` says. The run goes on bit for bit as if it had
                never stopped.

        Raises:
            FileNotFoundError: no such checkpoint.
            ValueError: the checkpoint is damaged, or of another adapter, optimizer or data.
        """
        args = self.args
        graphdef, trainable, frozen = partition(self.model)
        loss_scale = LossScale.create() if self.model.dtype == np.float16 else None
        state = TrainState.create(trainable, self.optimizer, jax.random.key(args.seed), loss_scale)
        state = state if self.mesh is None else sharding.shard(state, self.mesh)
        batches, tally = self._train_batches(), Tally()
        if (path := self._checkpoint_to_resume(resume_from_checkpoint)) is not None:
            state, extra = checkpoint.restore(path, state)
            if self.model.remat_policy == remat.AUTO:  # as it was decided, whatever is free today
                self.model.remat_policy = extra.get("remat_policy", remat.AUTO)
            batches.set_state(extra["data"])
            tally = Tally(**extra["tally"])
            print(f"resuming from {path}: {int(state.step)} of {self.total_steps} steps are done", flush=True)

        first = int(state.step) + 1
        begin, seconds_before, tokens_before = time.perf_counter(), tally.seconds, tally.num_tokens
        metrics_file = MetricsFile(self.output_dir / METRICS_FILE, resumed_step=first - 1)
        train_step = None
        if self.model.remat_policy != remat.AUTO:
            train_step = make_train_step(
                partition(self.model)[0], self.optimizer, mesh=self.mesh, full_determinism=args.full_determinism
            )
        throughput = Throughput()
        unread = []  # metrics of steps that were not logged yet, on the device

        with tqdm(total=self.total_steps, initial=first - 1, unit="step", disable=args.disable_tqdm) as bar:
            for step in range(first, self.total_steps + 1):
                batch = next(batches)
                placed = self._placed(batch, args.gradient_accumulation_steps > 1)
                if train_step is None:
                    choice = choose_policy(
                        self.model, self.optimizer, state, placed,
                        mesh=self.mesh, full_determinism=args.full_determinism,
                    )  # fmt: skip
                    bar.write(f"gradient checkpointing: {choice.policy!r} ({choice.needed / 2**30:.2f} GiB a step)")
                    graphdef, train_step = partition(self.model)[0], choice.step
                state, metrics = train_step(state, frozen, placed)
                unread.append(metrics)
                tokens = int(np.count_nonzero(batch["segment_ids"]))
                tally.num_tokens += tokens
                throughput.add(tokens)
                if step == first:  # the time to compile is no measure of speed
                    jax.block_until_ready(metrics)
                    throughput.restart()
                bar.update()

                epoch = step / self.steps_per_epoch
                if self._due("steps", self.logging_steps, step):
                    unread = jax.device_get(unread)  # waits for the device
                    tally.add(unread)
                    tally.seconds = seconds_before + time.perf_counter() - begin
                    row = {
                        "step": step,
                        "epoch": epoch,
                        "loss": tally.log(),
                        "grad_norm": float(unread[-1]["grad_norm"]),
                        "learning_rate": None if self.schedule is None else float(self.schedule(step - 1)),
                        "num_tokens": tally.num_tokens,
                        "tokens_per_second": throughput.read(),
                        "elapsed": tally.seconds,
                    }
                    unread = []
                    metrics_file.write(row)
                    _show(bar, row)
                    if not math.isfinite(row["loss"]):
                        logger.warning("step %d: the loss is %s; lower the learning rate", step, row["loss"])
                if self._due(args.eval_strategy, self.eval_steps, step):
                    jax.block_until_ready(state)
                    with throughput.paused():
                        metrics_file.write(
                            {"step": step, "epoch": epoch, **self._evaluate(graphdef, state.trainable, frozen)}
                        )
                if self._due(args.save_strategy, self.save_steps, step):
                    tally.add(jax.device_get(unread))
                    unread = []
                    tally.seconds = seconds_before + time.perf_counter() - begin
                    with throughput.paused():
                        checkpoint.save(
                            self.output_dir,
                            state,
                            extra={
                                "data": batches.get_state(),
                                "tally": dataclasses.asdict(tally),
                                "remat_policy": self.model.remat_policy,
                            },
                            # A module over the state's own buffers, which the next step will give away.
                            write=functools.partial(self._save_adapter, nnx.merge(graphdef, state.trainable, frozen)),
                            save_total_limit=args.save_total_limit,
                        )

        nnx.update(self.model, state.trainable)
        plot_loss(read_metrics(metrics_file.path), self.output_dir / PLOT_FILE)
        runtime = time.perf_counter() - begin
        loss = tally.loss_in_all / max(tally.weight_in_all, 1.0)
        return TrainOutput(
            max(first - 1, self.total_steps),
            loss,
            {
                "train_runtime": runtime,
                "train_loss": loss,
                "train_steps_per_second": max(0, self.total_steps - first + 1) / runtime,
                "train_tokens_per_second": (tally.num_tokens - tokens_before) / runtime,
                "num_tokens": tally.num_tokens,
                "epoch": self.total_steps / self.steps_per_epoch,
            },
        )

    def evaluate(self) -> dict[str, float]:
        """Loss of the model, as it is, on the eval data set.

        Raises:
            ValueError: there is no eval data set.
        """
        return self._evaluate(*partition(self.model))

    def save_model(self, output_dir: str | Path | None = None) -> None:
        """Write the adapter as PEFT files, and the tokenizer, to `output_dir`, by default that of `args`."""
        self._save_adapter(self.model, Path(output_dir or self.output_dir))

    def _save_adapter(self, model: CausalLM, folder: Path) -> None:
        # A bare CausalLM, which research code may have made in memory, has no base model for a PEFT file to name.
        if not hasattr(model, "save_pretrained"):
            return
        saved = cast(Any, model)
        # One base for all the checkpoints of a run, and not one in each.
        shared = {"base_folder": Path(self.args.output_dir) / "base"} if saved.writes_base else {}
        saved.save_pretrained(folder, self.processing_class, **shared)

    def _evaluate(self, graphdef: nnx.GraphDef, trainable: nnx.State, frozen: nnx.State) -> dict[str, float]:
        if self.eval_rows is None:
            raise ValueError("evaluate() needs an eval_dataset, and the trainer was given none")
        begin = time.perf_counter()
        rows = self.args.per_device_eval_batch_size * sharding.batch_parts(self.mesh)
        batches = BatchIterator(self.eval_rows, rows, shuffle=False, epochs=1)
        with sharding.over(self.mesh):
            sums = jax.device_get([_loss(graphdef, trainable, frozen, self._placed(batch)) for batch in batches])
        total, weight = np.sum(np.asarray(sums, np.float64), axis=0)
        return {
            "eval_loss": float(total / max(weight, 1.0)),
            "eval_num_tokens": int(weight),
            "eval_runtime": time.perf_counter() - begin,
        }

    def _placed(self, batch: Mapping[str, np.ndarray], accumulated: bool = False) -> Any:
        """A batch on the device, or each row on those of the mesh that it is for."""
        place = None if self.mesh is None else sharding.batch_sharding(self.mesh, accumulated=accumulated)
        return jax.device_put(dict(batch), place)

    def _rows(self, dataset: Any, name: str, formatting_func: Callable | None) -> FixedRows:
        """Tokenised, packed or padded; says what became of every row."""
        args = self.args
        splits = args.packing and args.packing_strategy != "bfd"  # what is too long for a row goes on in the next
        examples = tokenize(
            dataset,
            self.processing_class,
            max_length=None if splits else self.max_length,
            truncation_mode=args.truncation_mode,
            assistant_only_loss=args.assistant_only_loss,
            completion_only_loss=args.completion_only_loss,
            dataset_text_field=args.dataset_text_field,
            formatting_func=formatting_func,
        )
        print(f"{name}: {examples.report}", flush=True)
        vocabulary = self.model.config.vocab_size
        if (largest := int(examples.input_ids.max())) >= vocabulary:
            raise ValueError(
                f"{name}: token id {largest} is beyond the model's vocabulary of {vocabulary}: "
                "the tokenizer is not this model's"
            )
        pad_token_id = getattr(self.processing_class, "pad_token_id", None) or 0
        if args.packing:
            return pack(examples, self.max_length, args.packing_strategy, pad_token_id=pad_token_id)
        return pad(examples, pad_token_id=pad_token_id, pad_to_multiple_of=args.pad_to_multiple_of)

    def _train_batches(self) -> BatchIterator:
        args = self.args
        accumulation = args.gradient_accumulation_steps
        return BatchIterator(
            self.train_rows,
            args.per_device_train_batch_size * sharding.batch_parts(self.mesh),
            gradient_accumulation_steps=accumulation if accumulation > 1 else None,
            seed=args.seed if args.data_seed is None else args.data_seed,
            shuffle=args.train_sampling_strategy == "random",
            drop_last=args.dataloader_drop_last,
        )

    def _count(self, steps: float) -> int:
        """A number of updates that may be given as a part of all."""
        return int(steps) if steps >= 1 else math.ceil(self.total_steps * steps)

    def _due(self, strategy: str, every: int, step: int) -> bool:
        """Whether to do after this step what is done at "steps", "epoch" or "no". The last step is no exception to "no"
        alone: a run ends with a log and a checkpoint."""
        if strategy == "epoch":
            return step % self.steps_per_epoch == 0 or step == self.total_steps
        return strategy == "steps" and (step % every == 0 or step == self.total_steps)

    def _checkpoint_to_resume(self, wanted: bool | str | Path | None) -> Path | None:
        wanted = self.args.resume_from_checkpoint if wanted is None else wanted
        latest = checkpoint.latest_checkpoint(self.output_dir)
        if wanted is True:
            if latest is None:
                logger.warning(
                    "resume_from_checkpoint=True, but %s has no complete checkpoint: starting afresh", self.output_dir
                )
            return latest
        if wanted:
            return Path(wanted)
        if latest is not None:
            logger.warning(
                "%s holds checkpoints of an earlier run, the newest %s, and this run starts afresh: their files may be "
                "replaced. resume_from_checkpoint=True would go on with it",
                self.output_dir,
                latest.name,
            )
        return None


@functools.partial(jax.jit, static_argnums=0)
def _loss(graphdef, trainable, frozen, batch):
    """Sum of the loss over supervised tokens, and their number. Without dropout."""
    total, weight, _ = causal_lm_loss(nnx.merge(graphdef, trainable, frozen), batch)
    return total, weight


def _check_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(f"output_dir {folder} cannot be written to ({error}): choose another folder") from error


def _row_length(model: CausalLM, max_length: int | None) -> int:
    """The most tokens of a row: `max_length`, or the model's own."""
    window = getattr(model, "max_seq_length", 0) or model.config.max_position_embeddings
    if max_length is not None and max_length > window:
        raise ValueError(
            f"max_length={max_length} is beyond the model's max_seq_length of {window} tokens: lower it, or load the "
            f"model with max_seq_length={max_length}"
        )
    return max_length or window


def _show(bar: tqdm, row: Mapping[str, Any]) -> None:
    """Put loss and speed behind the bar, which shows the time left itself."""
    speed = row["tokens_per_second"]
    bar.set_postfix_str(f"loss {row['loss']:.4f}" + (f", {speed:,.0f} tokens/s" if speed else ""))
