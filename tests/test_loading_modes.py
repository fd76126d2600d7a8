"""How `from_pretrained` holds the weights: all of them learning, 8-bit, fp8, float16."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import nnx
from helpers import make_checkpoint, random_ids, relative_error

from jaxlora import FastLanguageModel, SFTConfig, SFTTrainer
from jaxlora.converters.huggingface import SafetensorsSource
from jaxlora.layers import BaseParam, TrainableParam
from jaxlora.lora import partition, unfreeze
from jaxlora.model import named_nodes
from jaxlora.optimizer import make_optimizer
from jaxlora.train import TrainState, make_train_step

pytestmark = pytest.mark.filterwarnings("ignore:.*has no tokenizer files:UserWarning")


def load(folder, **options):
    return FastLanguageModel.from_pretrained(folder, **{"dtype": "float32", **options})[0]


def batch_of(seed, rows=3, length=12):
    ids = random_ids(rows, length, seed)
    labels = np.where(np.random.default_rng(seed).random(ids.shape) < 0.3, -100, ids).astype(np.int32)
    return {"input_ids": jnp.asarray(ids), "labels": jnp.asarray(labels)}


def train(model, optimizer, batches, **options):
    """Losses, and the model trained in place."""
    graphdef, trainable, frozen = partition(model)
    state = TrainState.create(trainable, optimizer, **options)
    step, losses = make_train_step(graphdef, optimizer), []
    for batch in batches:
        state, metrics = step(state, frozen, batch)
        losses.append(float(metrics["loss"]))
    nnx.update(model, state.trainable)
    return losses, state


def constant(rate):
    return lambda step: rate


def weights(model):
    """Every weight of the checkpoint by its name."""
    found = {}
    for parameter in named_nodes(model, nnx.Variable):
        value = parameter.node.get_value()
        for name, one in zip(parameter.names(), value if parameter.layers else [value], strict=True):
            found[name] = one
    return found


# ---- Full fine-tuning ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama-tied", "qwen3-biases-windows"])
def test_four_steps_on_every_weight_equal_torch(name, tmp_path):
    theirs = make_checkpoint(name, tmp_path).train()
    model = load(tmp_path, full_finetuning=True)
    start = {name: np.asarray(value) for name, value in weights(model).items()}
    # The groups of transformers' Trainer.
    decayed = set(transformers.Trainer.get_decay_parameter_names(None, theirs))
    groups = [
        {"params": [p for n, p in theirs.named_parameters() if (n in decayed) == decays], "weight_decay": decay}
        for decays, decay in ((True, 0.1), (False, 0.0))
    ]
    optimizer = torch.optim.AdamW(groups, lr=3e-3, betas=(0.9, 0.99))
    expected = []
    for seed in range(4):
        batch = {k: torch.tensor(np.asarray(v)).long() for k, v in batch_of(seed).items()}
        loss = theirs(**batch).loss
        expected.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    ours = make_optimizer("adamw", constant(3e-3), weight_decay=0.1, beta2=0.99, max_grad_norm=None)
    losses, _ = train(model, ours, [batch_of(seed) for seed in range(4)])
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    found = weights(model)
    theirs_by_name = dict(theirs.named_parameters())
    assert set(found) == set(theirs_by_name)
    for name, parameter in theirs_by_name.items():
        parameter = parameter.detach().numpy()
        assert relative_error(found[name], parameter) < 1e-4, name
        assert relative_error(found[name] - start[name], parameter - start[name]) < 2e-2, name


@pytest.mark.parametrize("name", ["llama-tied"])
def test_every_weight_learns_and_none_is_quantised(name, tmp_path):
    theirs = make_checkpoint(name, tmp_path)
    model = load(tmp_path, full_finetuning=True)
    assert not list(named_nodes(model, BaseParam)) and model.full_finetuning
    graphdef, trainable, frozen = partition(model)
    assert not jax.tree.leaves(frozen)
    assert {type(v) for v in jax.tree.leaves(trainable, is_leaf=lambda v: isinstance(v, nnx.Variable))} == {
        TrainableParam
    }
    count = sum(p.numel() for p in theirs.parameters())
    assert model.get_nb_trainable_parameters() == (count, count)
    ids = jnp.asarray(random_ids(2, 9))
    with torch.no_grad():
        assert relative_error(model(ids), theirs(torch.tensor(np.asarray(ids)).long()).logits) < 5e-5


def test_get_peft_model_has_no_effect(tmp_path):
    make_checkpoint("llama", tmp_path)
    model = load(tmp_path, full_finetuning=True)
    with pytest.warns(UserWarning, match="full fine-tuning is on, so get_peft_model has no effect"):
        assert FastLanguageModel.get_peft_model(model, r=4) is model
    assert model.lora_config is None and not [p for p in weights(model) if "lora" in p]


def stored_dtypes(folder):
    """{tensor: dtype} of a checkpoint of one file."""
    source = SafetensorsSource(folder)
    return {name: source.dtype(name).name for name in source.names()}


def test_a_run_is_saved_resumed_and_read_by_transformers(tmp_path):
    make_checkpoint("llama-tied", tmp_path / "base")
    rows = [{"input_ids": row.tolist(), "labels": row.tolist()} for row in random_ids(16, 10)]

    def run(folder, **options):
        model = load(tmp_path / "base", full_finetuning=True)
        options = dict(save_steps=2, per_device_train_batch_size=4, learning_rate=1e-3, disable_tqdm=True) | options
        args = SFTConfig(output_dir=tmp_path / folder, **options)
        return model, SFTTrainer(model, args, train_dataset=rows)

    model, trainer = run("whole", max_steps=4)
    before = np.asarray(model.model.norm.weight.get_value(), np.float32)
    trainer.train()
    assert np.any(np.asarray(model.model.norm.weight.get_value(), np.float32) != before)
    resumed, trainer = run("whole", max_steps=4)
    trainer.train(resume_from_checkpoint=tmp_path / "whole" / "checkpoint-2")
    assert all(np.array_equal(value, weights(model)[name]) for name, value in weights(resumed).items())

    ids = jnp.asarray(random_ids(2, 9))
    last = tmp_path / "whole" / "checkpoint-4"
    theirs = transformers.AutoModelForCausalLM.from_pretrained(last, dtype=torch.float32)
    with torch.no_grad():
        expected = theirs(torch.tensor(np.asarray(ids)).long()).logits
    assert relative_error(load(last, load_in_16bit=True)(ids), expected) < 5e-5
    assert relative_error(model(ids), expected) < 5e-5
    model.save_pretrained(tmp_path / "saved")
    for folder in (last, tmp_path / "saved"):
        assert not (folder / "adapter_config.json").exists()
        dtypes = stored_dtypes(folder)
        assert set(dtypes.values()) == {"float32"} and "lm_head.weight" not in dtypes


def test_float32_weights_and_bfloat16_arithmetic(tmp_path):
    make_checkpoint("llama", tmp_path)
    dtypes = {}
    for mixed in (None, False, True):
        model = load(tmp_path, full_finetuning=True, dtype="bfloat16", float32_mixed_precision=mixed)
        assert model.dtype == jnp.bfloat16
        dtypes[mixed] = {str(value.dtype) for value in weights(model).values()}
    assert dtypes == {None: {"bfloat16"}, False: {"bfloat16"}, True: {"float32"}}
    # What float32 weights are for: an update far below a bfloat16's last bit is not lost. The arithmetic is bfloat16's.
    before = np.asarray(model.model.norm.weight.get_value())
    jaxpr = jax.make_jaxpr(lambda ids: model.hidden_states(ids)[0])(jnp.asarray(random_ids(1, 5)))
    assert [out.aval.dtype for out in jaxpr.jaxpr.outvars] == [jnp.bfloat16]
    train(model, make_optimizer("adamw", constant(1e-5)), [batch_of(0)])
    moved = np.abs(np.asarray(model.model.norm.weight.get_value()) - before)
    assert np.all(moved < 2e-5) and np.median(moved) > 5e-6
    model.save_pretrained(tmp_path / "saved")
    model.save_pretrained_merged(tmp_path / "merged")
    assert set(stored_dtypes(tmp_path / "saved").values()) == {"float32"}
    assert set(stored_dtypes(tmp_path / "merged").values()) == {"bfloat16"}
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_full_finetuning_with_what_does_not_go_with_it(tmp_path):
    make_checkpoint("llama", tmp_path / "base")
    base = tmp_path / "base"
    with pytest.raises(ValueError, match="load_in_4bit=True and full_finetuning=True are both given"):
        load(base, full_finetuning=True, load_in_4bit=True)
    with pytest.raises(ValueError, match="float32_mixed_precision is for full_finetuning=True"):
        load(base, float32_mixed_precision=True)
    with pytest.raises(ValueError, match="the updates of float16 weights would be lost"):
        load(base, full_finetuning=True, float32_mixed_precision=False, dtype="float16")
    with pytest.raises(ValueError, match="a quantised model cannot learn as a whole"):
        unfreeze(load(base))
    FastLanguageModel.get_peft_model(load(base), r=4).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match="is an adapter, and full_finetuning=True trains no adapters"):
        load(tmp_path / "adapter", full_finetuning=True)
    with pytest.raises(ValueError, match="has no adapter: save_method must be"):
        load(base, full_finetuning=True).save_pretrained_merged(tmp_path / "merged", save_method="lora")
