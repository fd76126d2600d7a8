"""Training runs over a mesh: one device's numbers, resumed bit for bit."""

import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import make_checkpoint
from test_sft import TARGETS, adapter_arrays, bits, rows_of_ids, with_adapters, without_times

from jaxlora import lora
from jaxlora.loader import FastLanguageModel
from jaxlora.report import read_metrics
from jaxlora.sft import SFTConfig, SFTTrainer


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The folder of a random Llama."""
    folder = tmp_path_factory.mktemp("base")
    make_checkpoint("llama", folder)
    return folder


def on_mesh(folder, out, device_map, rows, resume=None, policy=False, **options):
    """(trainer, its metrics) of a run of a model as a user loads it."""
    with pytest.warns(UserWarning, match="has no tokenizer files"):
        model, _ = FastLanguageModel.from_pretrained(
            folder, load_in_4bit=True, dtype=jnp.float32, device_map=device_map
        )
    model = FastLanguageModel.get_peft_model(
        model, r=4, lora_alpha=8, target_modules=TARGETS, random_state=1, use_gradient_checkpointing=policy
    )
    options = dict(
        max_steps=4, learning_rate=1e-2, lr_scheduler_type="constant", logging_steps=1, disable_tqdm=True,
        pad_to_multiple_of=40, save_steps=2, eval_strategy="steps", eval_steps=2,
    ) | options  # fmt: skip
    args = SFTConfig(output_dir=out, **options)
    trainer = SFTTrainer(model, args, train_dataset=rows, eval_dataset=rows_of_ids(5, seed=1))
    trainer.train(resume)
    return trainer, read_metrics(Path(out) / "metrics.jsonl")


@pytest.mark.parametrize("device_map, rows, accumulation", [
    ("data=2,fsdp=2", 2, 1), ("fsdp=2,tensor=2", 2, 2), ("tensor=2", 4, 1),
])  # fmt: skip
def test_a_run_on_a_mesh_is_that_of_one_device(base, tmp_path, device_map, rows, accumulation):
    parts = 1 if device_map == "tensor=2" else 4 if "data" in device_map else 2
    data, common = rows_of_ids(20), dict(gradient_accumulation_steps=accumulation)
    few = dict(per_device_train_batch_size=rows, per_device_eval_batch_size=2)
    many = dict(per_device_train_batch_size=rows * parts, per_device_eval_batch_size=2 * parts)
    alone, expected = on_mesh(base, tmp_path / "alone", None, data, **many, **common)
    trainer, found = on_mesh(base, tmp_path / "mesh", device_map, data, **few, **common)
    assert alone.mesh is None and trainer.mesh is not None and len(trainer._train_batches()) == alone.steps_per_epoch
    places = {len(leaf.sharding.device_set) for leaf in jax.tree.leaves(lora.partition(trainer.model)[1:])}
    assert places == {trainer.mesh.size}
    assert len(found) == len(expected) == 6  # four steps and two evaluations
    for row, wanted in zip(found, expected, strict=True):
        for name in {"loss", "eval_loss", "grad_norm"} & {*wanted}:
            assert row[name] == pytest.approx(wanted[name], rel=2e-5), (name, row)
        for name in {"num_tokens", "eval_num_tokens", "epoch"} & {*wanted}:
            assert row[name] == wanted[name]
    for x, y in zip(adapter_arrays(trainer.model).values(), adapter_arrays(alone.model).values(), strict=True):
        np.testing.assert_allclose(x, y, atol=2e-4)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(alone.evaluate()["eval_loss"], rel=2e-5)


def test_a_mesh_of_ones_own_is_refused(base, tmp_path):
    model = with_adapters(base)
    place = jax.NamedSharding(jax.make_mesh((2,), ("x",), devices=jax.devices()[:2]), jax.P())
    nnx.update(model, jax.device_put(nnx.state(model), place))
    with pytest.raises(ValueError, match="a mesh with the axes x, and .* of jaxlora.sharding.make_mesh alone"):
        SFTTrainer(model, SFTConfig(output_dir=tmp_path), train_dataset=rows_of_ids(4))


def test_a_run_on_a_mesh_is_resumed_with_the_same_bits(base, tmp_path):
    common = dict(device_map="data=2,fsdp=2", rows=rows_of_ids(20), per_device_train_batch_size=1, policy="auto")
    whole, expected = on_mesh(base, tmp_path, **common)
    assert whole.model.remat_policy == "projections"  # a CPU does not say what is free
    shutil.rmtree(tmp_path / "checkpoint-4")
    again, found = on_mesh(base, tmp_path, resume=True, **common)
    assert without_times(found) == without_times(expected)
    assert bits(again.model) == bits(whole.model)
    # The adapter beside the state is what any device loads.
    with pytest.warns(UserWarning, match="has no tokenizer files"):
        model, _ = FastLanguageModel.from_pretrained(tmp_path / "checkpoint-4", dtype=jnp.float32)
    assert bits(model) == bits(whole.model)


def test_new_adapters_on_a_mesh_generate_before_they_are_trained(base):
    with pytest.warns(UserWarning, match="has no tokenizer files"):
        models = [
            FastLanguageModel.from_pretrained(base, dtype=jnp.float32, device_map=place)[0]
            for place in (None, "fsdp=2,tensor=2")
        ]
    models = [FastLanguageModel.get_peft_model(model, r=4, random_state=1) for model in models]
    prompts = [[5, 6, 7], [8, 9]]
    one, other = (model.generate(prompts, max_new_tokens=6, eos_token_id=[]) for model in models)
    np.testing.assert_array_equal(one, other)
