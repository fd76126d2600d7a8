"""Training runs: the same numbers as TRL's, resumed bit for bit, nothing lost silently."""

import dataclasses
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import optax
import pytest
import torch
import transformers
import trl
from helpers import VOCAB, load_folder, make_checkpoint
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers

from jaxlora import lora, sft
from jaxlora.config import LoraConfig
from jaxlora.loader import FastLanguageModel
from jaxlora.optimizer import decay_mask, make_optimizer, make_schedule
from jaxlora.report import Throughput, plot_loss, read_metrics
from jaxlora.sft import SFTConfig, SFTTrainer

TARGETS = ("q_proj", "v_proj", "down_proj")
LETTERS = "abcdefghijklmnopqrstuvwxyz "
ROW_TEXTS = [
    "the quick brown fox", "jumps", "over the lazy dog and the", "cat", "sat on a mat", "ab", "xyzzy plugh", "to be",
    "or not to be that", "is the question",
]  # fmt: skip
TEXTS = [{"text": text} for text in ROW_TEXTS]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """(folder of a random Llama, its transformers model)"""
    folder = tmp_path_factory.mktemp("base")
    return folder, make_checkpoint("llama", folder)


@pytest.fixture(scope="module")
def tokenizer():
    vocabulary = {token: i for i, token in enumerate(["<pad>", "</s>", "<unk>", *LETTERS])}
    tokens = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokens.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokens, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )


def with_adapters(folder, dropout=0.0):
    """The model with adapters whose B is not zero, so that the first gradient reaches A too."""
    model = load_folder(folder)
    config = LoraConfig(r=4, lora_alpha=8, lora_dropout=dropout, target_modules=TARGETS)
    lora.add_adapters(model, config, jax.random.key(1))
    for i, named in enumerate(lora.adapters(model)):
        b = named.node.lora_B
        b.set_value(jax.random.normal(jax.random.key(i), b.get_value().shape) * 0.05)
    return model


def adapter_arrays(model):
    """{"model.layers.0.mlp.down_proj.lora_A": [r, in], ...}"""
    return {
        f"{name}.{part}": np.array(getattr(named.node, part).get_value()[i])
        for named in lora.adapters(model)
        for part in ("lora_A", "lora_B")
        for i, name in enumerate(named.names())
    }


def rows_of_ids(count, seed=0, longest=40):
    rng = np.random.default_rng(seed)
    return [{"input_ids": rng.integers(3, VOCAB, n).tolist()} for n in rng.integers(2, longest, count)]


def train(folder, out, rows, tokenizer=None, eval_dataset=None, resume=None, dropout=0.2, **options):
    """(trainer, its metrics) of a run from the same start. What is not of interest is the same in all tests, shapes
    included, so that they share one compiled step."""
    defaults = dict(
        per_device_train_batch_size=2, pad_to_multiple_of=40, learning_rate=1e-2, lr_scheduler_type="constant",
        logging_steps=1, disable_tqdm=True,
    )  # fmt: skip
    options = defaults | options
    trainer = SFTTrainer(
        model=with_adapters(folder, dropout),
        args=SFTConfig(output_dir=out, **options),
        train_dataset=rows,
        eval_dataset=eval_dataset,
        processing_class=tokenizer,
    )
    trainer.train(resume)
    return trainer, read_metrics(Path(out) / "metrics.jsonl")


def bits(model):
    return {name: array.tobytes() for name, array in adapter_arrays(model).items()}


@pytest.fixture
def unchecked(monkeypatch):
    """As outside the tests, where no wrong type is caught before our own checks."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


# ---------------------------------------------------------------------------------------------------------------
# Options


# Where ours differ from TRL's on purpose.
OWN_DEFAULTS = {
    "output_dir": "trainer_output",  # TRL fills it in later
    "optim": "adamw_torch",  # the fused one is the same arithmetic
    "max_length": None,
    "disable_tqdm": False,
    "pad_to_multiple_of": None,  # TRL: "auto", which is None on every device that this runs on
}


def test_options_have_trls_names_and_defaults():
    theirs = {f.name: f.default for f in dataclasses.fields(trl.SFTConfig)}
    for field in dataclasses.fields(SFTConfig):
        assert field.metadata["help"].endswith("."), field.name
        if field.name == "warmup_ratio":  # transformers had it until 5.0
            continue
        expected = OWN_DEFAULTS.get(field.name, theirs[field.name])
        assert getattr(SFTConfig(), field.name) == getattr(expected, "value", expected), field.name


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(learning_rate="2e-4"), "learning_rate must be float, found '2e-4' .YAML reads 2e-4 as text"),
        (dict(learning_rate=-1e-4), "learning_rate must be at least 0, found -0.0001"),
        (dict(learning_rate=math.nan), "learning_rate must be at least 0, found nan"),
        (dict(adam_beta2=1.0), "adam_beta2 must be at least 0 and below 1, found 1.0"),
        (dict(max_steps=True), "max_steps must be int, found True"),
        (dict(max_steps=0), "nothing to train: max_steps=0"),
        (dict(num_train_epochs=0), "nothing to train"),
        (dict(max_length=1), "max_length must be at least 2"),
        (dict(max_length=12.5), "max_length must be int or None, found 12.5"),
        (dict(save_total_limit=0), "save_total_limit must be at least 1, found 0"),
        (dict(gradient_accumulation_steps=0), "gradient_accumulation_steps must be at least 1"),
        (dict(logging_steps=0), "logging_steps must be larger than 0"),
        (dict(save_steps=2.5), "save_steps must be whole, or below 1 for a part"),
        (dict(warmup_steps=5, warmup_ratio=0.1), "both given"),
        (dict(optim="adamw_8bit"), "optim='adamw_8bit' is not one of adamw_torch, "),
        (dict(lr_scheduler_type="polynomial"), "lr_scheduler_type='polynomial' is not one of linear, cosine, "),
        (dict(packing_strategy="best"), "packing_strategy='best' is not one of bfd, bfd_split, wrapped"),
        (dict(report_to="wandb"), "report_to='wandb' is not one of none"),
    ],
)
def test_a_bad_option_is_named(unchecked, options, message):
    with pytest.raises(ValueError, match=message):
        SFTConfig(**options)


# ---------------------------------------------------------------------------------------------------------------
# Schedules and optimizers, against transformers and torch


@pytest.mark.parametrize("warmup", [0, 3, 10])
@pytest.mark.parametrize("name", ["linear", "cosine", "constant", "constant_with_warmup"])
def test_schedules_are_transformers(name, warmup):
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=3e-4)
    theirs = transformers.get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=10)
    schedule = make_schedule(name, 3e-4, warmup_steps=warmup, total_steps=10)
    for step in range(11):
        expected = theirs.get_last_lr()[0]
        assert float(schedule(step)) == pytest.approx(expected, rel=1e-12, abs=1e-20)
        # cos near pi is known to 1e-7 of the highest rate, not of itself, in float32
        assert float(schedule(jnp.int32(step))) == pytest.approx(expected, rel=1e-6, abs=1e-7 * 3e-4)
        optimizer.step()
        theirs.step()


def test_warmup_may_be_a_part_of_all_steps(base, tmp_path):
    rows = rows_of_ids(20)
    for options in (dict(warmup_steps=0.3), dict(warmup_ratio=0.3), dict(warmup_steps=3)):
        args = SFTConfig(output_dir=tmp_path, max_steps=9, learning_rate=1.0, **options)
        trainer = SFTTrainer(with_adapters(base[0]), args, train_dataset=rows)
        expected = [0, 1 / 3, 2 / 3, 1, 5 / 6]  # ceil(0.3 * 9) = 3
        assert [float(trainer.schedule(t)) for t in range(5)] == pytest.approx(expected)


@pytest.mark.parametrize("name", ["adamw_torch", "sgd"])
@pytest.mark.parametrize("max_grad_norm", [0.5, 0.0])
def test_optimizers_are_torchs(name, max_grad_norm, standard_promotion):
    rng = np.random.default_rng(0)
    start = {"a": rng.normal(size=(3, 4)), "b": rng.normal(size=(5,))}
    start = {k: v.astype(np.float32) for k, v in start.items()}
    theirs = {k: torch.nn.Parameter(torch.tensor(v)) for k, v in start.items()}
    make = {
        "adamw_torch": lambda p: torch.optim.AdamW(p, lr=0.1, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1),
        "sgd": lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=0.1),
    }
    torch_optimizer = make[name](theirs.values())
    scheduler = transformers.get_scheduler("linear", torch_optimizer, num_warmup_steps=2, num_training_steps=8)
    schedule = make_schedule("linear", 0.1, warmup_steps=2, total_steps=8)
    optimizer = make_optimizer(
        name, schedule, weight_decay=0.1, beta1=0.8, beta2=0.95, epsilon=1e-6, max_grad_norm=max_grad_norm
    )
    ours = jax.tree.map(jnp.asarray, start)
    state = optimizer.init(ours)
    for step in range(8):
        # The scale goes up and down over 0.5, so that some steps are clipped and some are not.
        grads = {k: (rng.normal(size=v.shape) * (0.02 if step % 2 else 2)).astype(np.float32) for k, v in start.items()}
        updates, state = optimizer.update(jax.tree.map(jnp.asarray, grads), state, ours)
        ours = optax.apply_updates(ours, updates)
        for k, parameter in theirs.items():
            parameter.grad = torch.tensor(grads[k])
        if max_grad_norm:
            torch.nn.utils.clip_grad_norm_(theirs.values(), max_grad_norm)
        torch_optimizer.step()
        scheduler.step()
        for k in start:
            np.testing.assert_allclose(ours[k], theirs[k].detach().numpy(), rtol=2e-5, atol=2e-6)


def test_lion_is_its_paper(standard_promotion):
    rng = np.random.default_rng(0)
    p, m = rng.normal(size=(3, 4)).astype(np.float32), np.zeros((3, 4), np.float32)
    optimizer = make_optimizer("lion", lambda t: 0.01, weight_decay=0.1, beta1=0.9, beta2=0.99, max_grad_norm=None)
    ours = jnp.asarray(p)
    state = optimizer.init(ours)
    for _ in range(3):  # arXiv:2302.06675, algorithm 2
        g = rng.normal(size=(3, 4)).astype(np.float32)
        p, m = p - 0.01 * (np.sign(0.9 * m + 0.1 * g) + 0.1 * p), 0.99 * m + 0.01 * g
        updates, state = optimizer.update(jnp.asarray(g), state, ours)
        ours = optax.apply_updates(ours, updates)
        np.testing.assert_allclose(ours, p, rtol=1e-6)


def test_weight_decay_is_for_what_it_is_in_transformers():
    config = transformers.Qwen3Config(
        vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=4, attention_bias=True,
    )  # fmt: skip
    model = get_peft_model(
        transformers.Qwen3ForCausalLM(config), PeftLoraConfig(r=2, target_modules="all-linear", bias="all")
    )
    theirs = set(transformers.Trainer.get_decay_parameter_names(None, model))  # ty: ignore
    names = [name for name, _ in model.named_parameters()]
    ours = {name for name in names if decay_mask({name: 0})[name]}
    assert ours == theirs and len(ours) < len(names)
    assert any("lora_A" in name for name in ours)


# ---------------------------------------------------------------------------------------------------------------
# The run, against TRL


def trl_run(theirs, start, out, tokenizer, rows, **options):
    """(metrics by step, adapter by our names) of TRL's trainer with PEFT, on the CPU in float32."""
    from datasets import Dataset

    model = get_peft_model(theirs, PeftLoraConfig(r=4, lora_alpha=8, target_modules=list(TARGETS), lora_dropout=0.0))
    parameters = dict(model.named_parameters())
    home = lambda name: parameters[f"base_model.model.{name}.default.weight"]
    with torch.no_grad():
        for name, array in start.items():
            home(name).copy_(torch.tensor(array))
    args = trl.SFTConfig(
        output_dir=str(out), use_cpu=True, bf16=False, gradient_checkpointing=False, report_to="none",
        disable_tqdm=True, save_strategy="no", train_sampling_strategy="sequential", **options,
    )  # fmt: skip
    trainer = trl.SFTTrainer(model=model, args=args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    trainer.train()
    return trainer.state.log_history[:-1], {name: home(name).detach().numpy() for name in start}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_a_run_is_trls(base, tokenizer, tmp_path):
    options = dict(
        per_device_train_batch_size=2, gradient_accumulation_steps=2, num_train_epochs=3, learning_rate=2e-2,
        lr_scheduler_type="linear", warmup_steps=2, weight_decay=0.1, max_grad_norm=1.0, logging_steps=1, max_length=20,
    )  # fmt: skip
    start = adapter_arrays(with_adapters(base[0]))
    plain = dict(train_sampling_strategy="sequential", save_strategy="no", dropout=0.0)
    trainer, ours = train(base[0], tmp_path / "ours", TEXTS, tokenizer, **plain, **options)
    model = make_checkpoint("llama", tmp_path / "theirs")
    theirs, adapter = trl_run(model, start, tmp_path, tokenizer, TEXTS, **options)
    assert len(ours) == len(theirs) == 9  # 10 rows make 3 updates, the last one of a single micro-batch
    assert max(row["grad_norm"] for row in theirs) > 1.0  # clipped
    for a, b in zip(ours, theirs, strict=True):
        assert a["loss"] == pytest.approx(float(b["loss"]), rel=2e-5)
        assert a["grad_norm"] == pytest.approx(float(b["grad_norm"]), rel=1e-4)
        assert a["learning_rate"] == b["learning_rate"]
        assert a["num_tokens"] == b["num_tokens"]
        if a["step"] % 3 == 0:  # within an epoch TRL counts micro-batches
            assert a["epoch"] == b["epoch"]
    for name, array in adapter_arrays(trainer.model).items():
        np.testing.assert_allclose(array, adapter[name], rtol=0, atol=2e-5, err_msg=name)
        assert np.abs(array - start[name]).max() > 1e-2


def test_packing_changes_nothing_but_the_rows(base, tmp_path):
    rows = rows_of_ids(12, longest=20)
    one_step = dict(max_steps=3, save_strategy="no", train_sampling_strategy="sequential", dropout=0.0)
    padded, a = train(base[0], tmp_path / "a", rows, per_device_train_batch_size=12, **one_step)
    one_step |= dict(packing=True, max_length=64)
    packed, b = train(base[0], tmp_path / "b", rows, per_device_train_batch_size=4, **one_step)
    assert len(packed.train_rows) < len(padded.train_rows) == 12
    assert len(packed.train_rows) <= 4  # one batch, so that both make the same updates
    for x, y in zip(a, b, strict=True):
        assert x["loss"] == pytest.approx(y["loss"], rel=1e-5)
        assert x["num_tokens"] == y["num_tokens"]
    for x, y in zip(adapter_arrays(padded.model).values(), adapter_arrays(packed.model).values(), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-5)


def test_a_tiny_data_set_is_learnt(base, tmp_path):
    few = rows_of_ids(4, longest=12)
    _, rows = train(base[0], tmp_path, few, max_steps=40, save_strategy="no", learning_rate=3e-2, dropout=0.0)
    assert rows[-1]["loss"] < 0.5 * rows[0]["loss"]


# ---------------------------------------------------------------------------------------------------------------
# Resuming


NOISY = dict(
    packing=True, max_length=48, gradient_accumulation_steps=2, weight_decay=0.1, seed=5, lr_scheduler_type="linear",
    learning_rate=1e-2, per_device_train_batch_size=2, max_steps=8,
)  # fmt: skip
TIMES = ("elapsed", "tokens_per_second", "eval_runtime")


def without_times(rows):
    return [{k: v for k, v in row.items() if k not in TIMES} for row in rows]


@pytest.fixture(scope="module")
def straight(base, tmp_path_factory):
    """(trainer, metrics, folder) of eight steps over more than two epochs; steps 3 and 6 are saved between two logs."""
    out = tmp_path_factory.mktemp("straight")
    trainer, rows = train(base[0], out, rows_of_ids(20), logging_steps=4, save_steps=3, **NOISY)
    assert trainer.steps_per_epoch == 3
    return trainer, rows, out


@pytest.mark.parametrize("step", [3, 6])
def test_a_resumed_run_is_the_one_that_never_stopped(base, straight, tmp_path, step):
    trainer, rows, out = straight
    shutil.copytree(out, tmp_path / "out")
    for saved in (6, 8):
        if saved > step:
            shutil.rmtree(tmp_path / "out" / f"checkpoint-{saved}")
    if step == 6:  # killed in the middle of a line
        with (tmp_path / "out" / "metrics.jsonl").open("a") as file:
            file.write('{"step": 8, "epo')
    again, rows_again = train(
        base[0], tmp_path / "out", rows_of_ids(20), resume=True, logging_steps=4, save_steps=3, **NOISY
    )
    assert bits(again.model) == bits(trainer.model)
    assert without_times(rows_again) == without_times(rows)
    states, extras = zip(*(read_checkpoint(t, o) for t, o in ((trainer, out), (again, tmp_path / "out"))), strict=True)
    assert states[0] == states[1]
    assert extras[0] == extras[1] and extras[0]["data"]["epoch"] == 2


def test_auto_is_decided_once_and_a_resumed_run_keeps_it(base, tmp_path, monkeypatch):
    args = dict(max_steps=3, save_strategy="steps", save_steps=2, per_device_train_batch_size=2)
    rows, trained = rows_of_ids(8), {}
    for policy in ("auto", "projections"):
        model = with_adapters(base[0])
        model.remat_policy = policy
        trainer = SFTTrainer(model, SFTConfig(output_dir=tmp_path / policy, **args), train_dataset=rows)
        trainer.train()
        assert model.remat_policy == "projections"  # the CPU does not say what is free
        trained[policy] = bits(model)
    assert trained["auto"] == trained["projections"]

    shutil.rmtree(tmp_path / "auto" / "checkpoint-3")
    model = with_adapters(base[0])
    model.remat_policy = "auto"
    monkeypatch.setattr("jaxlora.sft.choose_policy", None)  # nothing is left to decide
    args = SFTConfig(output_dir=tmp_path / "auto", **args)
    SFTTrainer(model, args, train_dataset=rows).train(resume_from_checkpoint=True)
    assert model.remat_policy == "projections" and bits(model) == trained["auto"]


@pytest.mark.parametrize("policy", ["auto", "projections"])
def test_full_determinism_reaches_the_step(base, tmp_path, monkeypatch, policy):
    model = with_adapters(base[0])
    model.remat_policy = policy
    asked = []

    def remembered(make):
        def made(*args, **kwargs):
            asked.append(kwargs["full_determinism"])
            return make(*args, **kwargs)

        return made

    for name in ("make_train_step", "choose_policy"):
        monkeypatch.setattr(sft, name, remembered(getattr(sft, name)))
    for full_determinism in (False, True):
        args = SFTConfig(output_dir=tmp_path, max_steps=1, save_strategy="no", full_determinism=full_determinism)
        SFTTrainer(model, args, train_dataset=rows_of_ids(8)).train()
    assert asked == [False, True]


def read_checkpoint(trainer, out):
    """The bytes of every array of the last checkpoint, the random key's among them, and its extra without times."""
    from jaxlora import checkpoint
    from jaxlora.train import TrainState

    like = TrainState.create(lora.partition(trainer.model)[1], trainer.optimizer)
    state, extra = checkpoint.restore(out / "checkpoint-8", like)
    extra["tally"].pop("seconds")
    state = dataclasses.replace(state, key=jax.random.key_data(state.key))
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(state)], extra


RUN = """
import sys
sys.path.insert(0, sys.argv[3])
from pathlib import Path
from test_sft import NOISY, rows_of_ids, train
train(sys.argv[1], Path(sys.argv[2]), rows_of_ids(20), resume=True, save_steps=1, logging_steps=4, **NOISY)
"""


@pytest.mark.slow
def test_a_run_that_is_killed_again_and_again_ends_in_the_same_bits(base, straight, tmp_path):
    """SIGKILL as soon as one more checkpoint is there, which is in the middle of whatever comes after it."""
    trainer, rows, out = straight
    command = [sys.executable, "-c", RUN, str(base[0]), str(tmp_path), str(Path(__file__).parent)]
    for kill_at in (2, 5, None):
        child = subprocess.Popen(command, env={**os.environ, "JAX_PLATFORMS": "cpu"}, stderr=subprocess.PIPE)
        while child.poll() is None and not (kill_at and (tmp_path / f"checkpoint-{kill_at}").exists()):
            time.sleep(0.001)
        if kill_at:
            child.kill()
        _, errors = child.communicate()
        assert child.returncode == (-signal.SIGKILL if kill_at else 0), errors.decode()
    assert read_checkpoint(trainer, tmp_path) == read_checkpoint(trainer, out)
    assert without_times(read_metrics(tmp_path / "metrics.jsonl")) == without_times(rows)


def test_the_seed_decides_every_bit(base, straight, tmp_path):
    options = dict(save_strategy="no", **NOISY)
    trainer, rows, _ = straight
    again, rows_again = train(base[0], tmp_path / "a", rows_of_ids(20), **options)
    assert bits(again.model) == bits(trainer.model)  # logging and saving leave no trace
    other, rows_other = train(base[0], tmp_path / "b", rows_of_ids(20), **(options | dict(seed=6, data_seed=5)))
    assert rows_other[0]["num_tokens"] == rows_again[0]["num_tokens"]  # the same rows
    assert rows_other[0]["loss"] != rows_again[0]["loss"]  # and other dropout
    assert bits(other.model) != bits(trainer.model)


def test_a_logged_loss_is_the_mean_over_tokens(base, straight, tmp_path):
    _, rows, _ = straight
    trainer, each = train(base[0], tmp_path, rows_of_ids(20), save_strategy="no", **NOISY)
    batches = trainer._train_batches()
    weights = [int((batch["labels"] != -100).sum()) for batch, _ in zip(batches, range(8), strict=False)]
    assert len(set(weights)) > 1
    for row, part in zip(rows, (slice(0, 4), slice(4, 8)), strict=True):
        expected = np.average([r["loss"] for r in each[part]], weights=weights[part])
        assert row["loss"] == pytest.approx(expected, rel=1e-6)
        assert abs(np.mean([r["loss"] for r in each[part]]) - expected) > 1e-5  # which the mean over steps is not


def test_resuming_from_nothing_starts_afresh_and_says_so(base, tmp_path, caplog):
    train(base[0], tmp_path, rows_of_ids(4), resume=True, max_steps=2)
    assert "has no complete checkpoint: starting afresh" in caplog.text
    train(base[0], tmp_path, rows_of_ids(4), max_steps=1)
    assert "holds checkpoints of an earlier run, the newest checkpoint-2" in caplog.text
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [1]


def test_what_cannot_be_resumed_is_refused(base, straight, tmp_path):
    _, _, out = straight

    def resume(rows, name="checkpoint-3", **options):
        args = SFTConfig(output_dir=tmp_path, **NOISY | options)
        SFTTrainer(with_adapters(base[0], 0.2), args, train_dataset=rows).train(out / name)

    with pytest.raises(ValueError, match="cannot resume the data: the saved run had fingerprint"):
        resume(rows_of_ids(21))
    with pytest.raises(ValueError, match="does not fit this run: its optimizer state differs"):
        resume(rows_of_ids(20), optim="sgd")
    with pytest.raises(FileNotFoundError, match="checkpoint-99: no such checkpoint folder"):
        resume(rows_of_ids(20), "checkpoint-99")


# ---------------------------------------------------------------------------------------------------------------
# What a run leaves behind


def test_the_eval_loss_is_the_mean_over_its_tokens(base, tmp_path):
    held_out = rows_of_ids(5, seed=9)
    trainer, rows = train(
        base[0], tmp_path, rows_of_ids(8), eval_dataset=held_out, max_steps=4, eval_strategy="steps", eval_steps=2,
        save_strategy="no", per_device_eval_batch_size=2,
    )  # fmt: skip
    evaluations = [row for row in rows if "eval_loss" in row]
    assert [row["step"] for row in evaluations] == [2, 4]
    ids = np.zeros((5, 40), np.int32)
    for i, row in enumerate(held_out):
        ids[i, : len(row["input_ids"])] = row["input_ids"]
    log_probs = torch.log_softmax(torch.tensor(np.asarray(trainer.model(jnp.asarray(ids)))).double(), dim=-1).numpy()
    total, count = 0.0, 0
    for i, row in enumerate(held_out):  # what follows a row does not change the logits before it
        for t, token in enumerate(row["input_ids"][1:]):
            total, count = total - log_probs[i, t, token], count + 1
    assert evaluations[-1]["eval_loss"] == pytest.approx(total / count, rel=1e-5)
    assert evaluations[-1]["eval_num_tokens"] == count
    assert trainer.evaluate()["eval_loss"] == evaluations[-1]["eval_loss"]


def test_files_and_lines_of_a_run(base, tokenizer, tmp_path, capsys):
    trainer, rows = train(
        base[0], tmp_path, TEXTS, tokenizer, num_train_epochs=2, logging_steps=3, max_length=20, disable_tqdm=False,
        save_strategy="epoch", save_total_limit=1,
    )  # fmt: skip
    out, bar = capsys.readouterr()
    assert out.splitlines()[0] == (
        "training data: 10 of 10 rows are trained on: 118 tokens, 108 of them supervised; "
        "1 rows were cut to max_length, losing 6 tokens"
    )
    assert "10/10" in bar and f"loss {rows[-1]['loss']:.4f}, " in bar and "tokens/s" in bar
    assert re.search(r"9/10 \[\d\d:\d\d<\d\d:\d\d, ", bar)  # the time that was taken, and the time left
    assert [row["step"] for row in rows] == [3, 6, 9, 10]  # the last step is always there
    assert rows[-1]["num_tokens"] == 2 * 118 and rows[-1]["epoch"] == 2
    assert all(row["tokens_per_second"] > 0 for row in rows)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-10", "loss.png", "metrics.jsonl"]
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_the_model_stays_usable_and_frozen(base, tmp_path):
    trainer, _ = train(base[0], tmp_path, rows_of_ids(4), max_steps=2, save_steps=1)
    _, adapter, rest = lora.partition(trainer.model)
    _, adapter_before, rest_before = lora.partition(with_adapters(base[0]))
    same = lambda x, y: np.array_equal(np.asarray(x), np.asarray(y))
    assert all(jax.tree.leaves(jax.tree.map(same, rest, rest_before)))
    assert not any(jax.tree.leaves(jax.tree.map(same, adapter, adapter_before)))
    assert np.isfinite(np.asarray(trainer.model(jnp.ones((5, 40), jnp.int32)))).all()


def test_each_checkpoint_is_a_peft_adapter(base, tokenizer, tmp_path):
    tokenizer.save_pretrained(base[0])
    model, tokenizer = FastLanguageModel.from_pretrained(base[0], load_in_16bit=True, dtype="float32")
    model = FastLanguageModel.get_peft_model(
        model, r=4, target_modules=TARGETS, lora_dropout=0.2, use_gradient_checkpointing=False
    )
    args = SFTConfig(output_dir=tmp_path / "out", max_steps=2, learning_rate=0.1, disable_tqdm=True)
    trainer = SFTTrainer(model, args, train_dataset=TEXTS, processing_class=tokenizer)
    trainer.train()
    trainer.save_model(tmp_path / "last")
    ids = np.arange(12, dtype=np.int32)[None]
    plain = base[1](torch.tensor(ids).long()).logits.detach().numpy()
    for folder in (tmp_path / "out" / "checkpoint-2", tmp_path / "last"):
        adapted = PeftModel.from_pretrained(make_checkpoint("llama", tmp_path / "base"), folder)
        theirs = adapted(torch.tensor(ids).long()).logits.detach().numpy()
        np.testing.assert_allclose(model(jnp.asarray(ids)), theirs, atol=1e-4)
        assert np.abs(theirs - plain).max() > 0.1
    assert (tmp_path / "out" / "checkpoint-2" / "tokenizer.json").exists()


def test_an_optimizer_of_ones_own(base, tmp_path):
    trainer = SFTTrainer(
        with_adapters(base[0]),
        SFTConfig(output_dir=tmp_path, max_steps=2, logging_steps=1, save_strategy="no", disable_tqdm=True),
        train_dataset=rows_of_ids(4),
        optimizers=(optax.sgd(0.0), None),
    )
    start = bits(trainer.model)
    output = trainer.train()
    assert bits(trainer.model) == start and output.global_step == 2
    assert [row["learning_rate"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [None, None]


def test_speed_does_not_count_pauses(monkeypatch):
    now = iter([0.0, 10.0, 14.0, 20.0, 20.0, 30.0, 30.0])  # made, paused, resumed, read, restarted, read, restarted
    monkeypatch.setattr("time.perf_counter", lambda: next(now))
    speed = Throughput()
    speed.add(160)
    with speed.paused():
        pass
    assert speed.read() == 10.0  # 160 tokens in 20 - 4 seconds
    assert speed.read() is None


def test_a_plot_of_training_and_eval_losses(tmp_path):
    plot_loss(
        [{"step": 1, "loss": 2.0}, {"step": 1, "eval_loss": 2.1}, {"step": 2, "loss": 1.0}], tmp_path / "loss.png"
    )
    assert (tmp_path / "loss.png").stat().st_size > 5000


# ---------------------------------------------------------------------------------------------------------------
# Bad input


def start(base, rows, tokenizer=None, model=None, out=None, **options):
    return SFTTrainer(
        with_adapters(base[0]) if model is None else model,
        SFTConfig(output_dir=out, **options),
        train_dataset=rows,
        processing_class=tokenizer,
    )


def test_bad_data_is_refused(base, tokenizer, tmp_path):
    with pytest.raises(ValueError, match="the data set is empty"):
        start(base, [], tokenizer, out=tmp_path)
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a"}\n{"txt": "b"}\n')
    with pytest.raises(ValueError, match=r"rows\.jsonl:2: found the fields \['txt'\]; expected 'messages', "):
        start(base, path, tokenizer, out=tmp_path)
    with pytest.raises(ValueError, match="no token of the data set is supervised"):
        start(base, [{"input_ids": [3, 4], "labels": [-100, -100]}], out=tmp_path)
    with pytest.raises(ValueError, match=f"training data: token id 97 is beyond the model's vocabulary of {VOCAB}"):
        start(base, [{"input_ids": [3, 97]}], out=tmp_path)


def test_long_rows_are_counted(base, tokenizer, tmp_path, capsys, caplog):
    trainer = start(base, TEXTS, tokenizer, out=tmp_path, max_length=12)
    report = "5 rows were cut to max_length, losing 33 tokens"
    assert report in capsys.readouterr().out and report in caplog.text
    assert trainer.train_rows.length == 12
    with pytest.raises(ValueError, match="max_length=65 is beyond the model's max_seq_length of 64 tokens"):
        start(base, TEXTS, tokenizer, out=tmp_path, max_length=65)


def test_packing_that_splits_loses_no_token(base, tokenizer, tmp_path):
    trainer = start(base, TEXTS, tokenizer, out=tmp_path, max_length=12, packing=True, packing_strategy="bfd_split")
    assert len(trainer.train_rows.examples.input_ids) == sum(len(text) + 1 for text in ROW_TEXTS)


def test_a_folder_that_cannot_be_written_is_found_before_any_work(base, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="output_dir .*file/out cannot be written to .*choose another folder"):
        start(base, [], out=tmp_path / "file" / "out")  # the data, which is empty, was not looked at


def test_a_model_without_adapters_is_refused(base, tmp_path):
    with pytest.raises(ValueError, match="FastLanguageModel.get_peft_model"):
        start(base, rows_of_ids(2), model=load_folder(base[0]), out=tmp_path)


def test_evaluation_without_data_is_refused(base, tmp_path):
    with pytest.raises(ValueError, match="eval_strategy='steps' needs an eval_dataset"):
        start(base, rows_of_ids(2), out=tmp_path, eval_strategy="steps")
    with pytest.raises(ValueError, match="needs an eval_dataset, and the trainer was given none"):
        start(base, rows_of_ids(2), out=tmp_path).evaluate()
