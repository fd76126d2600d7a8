"""PEFT's options for adapters, each walked once around: PEFT's adapter here, trained in both, saved here, loaded by
PEFT, merged and loaded by transformers."""

import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import peft
import pytest
import torch
import transformers
from flax import nnx
from helpers import load_folder, make_checkpoint, random_ids, randomise_adapters
from safetensors.numpy import load_file

from jaxlora import lora
from jaxlora.config import LoraConfig
from jaxlora.converters import peft as ours
from jaxlora.converters.export import save_merged
from jaxlora.loss import causal_lm_loss
from jaxlora.train import TrainState, make_train_step

BLOCKS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
IDS = random_ids(2, 11)
LEARNING_RATE, STEPS = 3e-3, 4


def logits_of(model) -> np.ndarray:
    with torch.no_grad():
        return model(torch.from_numpy(IDS).long()).logits.numpy()


def largest_difference(found, expected) -> float:
    return float(np.abs(np.asarray(found) - np.asarray(expected)).max())


def peft_model(theirs, seed=0, **options):
    """PEFT's adapter with every lora_B random."""
    options = {"r": 4, "lora_alpha": 6, "target_modules": BLOCKS, "task_type": "CAUSAL_LM"} | options
    model = peft.get_peft_model(theirs, peft.LoraConfig(**options)).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.add_(torch.empty_like(parameter).normal_(0.0, 0.1, generator=generator))
    return model


def save_peft(model, folder) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Setting `save_embedding_layers`", UserWarning)
        model.save_pretrained(folder)


def train_peft(model) -> None:
    model.train()
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=LEARNING_RATE, weight_decay=0.1)
    ids = torch.from_numpy(IDS).long()
    for _ in range(STEPS):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    model.eval()


def train_ours(model, key=None):
    graphdef, trainable, frozen = lora.partition(model)
    optimizer = optax.adamw(LEARNING_RATE, weight_decay=0.1)
    state, step = TrainState.create(trainable, optimizer, key), make_train_step(graphdef, optimizer)
    batch = {"input_ids": jnp.asarray(IDS), "labels": jnp.asarray(IDS)}
    for _ in range(STEPS):
        state, _ = step(state, frozen, batch)
    nnx.update(model, state.trainable)


def walk(name, folder, **options):
    """Every way that an adapter of these options takes between PEFT and here, with the same logits at each stop."""
    base = folder / "base"
    theirs = peft_model(make_checkpoint(name, base), **options)
    save_peft(theirs, folder / "theirs")
    model = load_folder(base)
    config = ours.load_adapter(model, folder / "theirs")
    assert largest_difference(model(jnp.asarray(IDS)), logits_of(theirs)) < 5e-5
    assert lora.get_nb_trainable_parameters(model) == theirs.get_nb_trainable_parameters()

    train_peft(theirs)
    train_ours(model)
    save_peft(theirs, folder / "trained")
    expected = load_file(folder / "trained" / "adapter_model.safetensors")
    ours.save_adapter(model, folder / "ours", config=config, base=str(base))
    found = load_file(folder / "ours" / "adapter_model.safetensors")
    assert found.keys() == expected.keys()
    start = load_file(folder / "theirs" / "adapter_model.safetensors")
    for key, value in expected.items():
        moved = np.abs(value - start[key]).max()
        assert moved > 0, f"{key} did not learn"
        assert largest_difference(found[key], value) < 2e-2 * moved + 1e-6, key

    logits = model(jnp.asarray(IDS))
    again = peft.AutoPeftModelForCausalLM.from_pretrained(folder / "ours", attn_implementation="eager")
    assert largest_difference(logits, logits_of(again)) < 5e-5
    save_merged(model, folder / "merged", base=base, verify=False)
    merged = transformers.AutoModelForCausalLM.from_pretrained(folder / "merged", attn_implementation="eager")
    assert largest_difference(logits, logits_of(merged)) < 5e-5
    return model, config


# ---- Which modules, and with what rank -------------------------------------------------------------------------------

SELECTIONS = {
    "regex": dict(target_modules=r"model\.layers\.[02]\.(mlp\.up_proj|self_attn\.q_proj)"),
    "paths": dict(target_modules=["model.layers.1.mlp.up_proj", "layers.2.mlp.down_proj", "k_proj"]),
    "exclude": dict(target_modules=BLOCKS, exclude_modules=["layers.0.mlp.up_proj", "o_proj"]),
    "exclude-regex": dict(target_modules=["q_proj", "up_proj"], exclude_modules=r".*\.1\..*"),
    "layers": dict(target_modules=["q_proj", "down_proj"], layers_to_transform=[0, 2], layers_pattern="layers"),
    "one-layer": dict(target_modules=["v_proj"], layers_to_transform=1),
    "ranks": dict(
        rank_pattern={"q_proj": 7, r"model\.layers\.1\.mlp\.up_proj": 2, "layers.2.mlp.up_proj": 5},
        alpha_pattern={"q_proj": 3, r"layers\.0\.mlp\..*": 11.5},
        use_rslora=True,
    ),
}


@pytest.mark.parametrize("option", ["regex", "layers", "ranks"])
def test_selections_walk_around(option, tmp_path):
    # Three layers in two runs; in the first model all three are one stack.
    walk("qwen3-biases-windows" if option == "layers" else "llama", tmp_path, **SELECTIONS[option])


@pytest.mark.parametrize("option", SELECTIONS)
def test_fresh_adapters_are_on_pefts_modules(option, tmp_path):
    options = SELECTIONS[option]
    theirs = peft_model(make_checkpoint("llama", tmp_path), **options)
    model = load_folder(tmp_path)
    lora.add_adapters(model, LoraConfig(**{"target_modules": BLOCKS, "r": 4, **options}), jax.random.key(0))
    shapes = {key: value.shape for key, value in ours.adapter_tensors(model).items()}
    state = peft.get_peft_model_state_dict(theirs)
    assert shapes == {key: tuple(value.shape) for key, value in state.items()}
    assert lora.get_nb_trainable_parameters(model) == theirs.get_nb_trainable_parameters()


def test_padding_is_never_seen_and_never_learns(tmp_path):
    make_checkpoint("llama", tmp_path)
    model = load_folder(tmp_path)
    lora.add_adapters(model, LoraConfig(target_modules=BLOCKS, r=4, **SELECTIONS["ranks"]), jax.random.key(0))
    randomise_adapters(model)  # the padding too
    (linear,) = (x for x in lora.adapters(model) if x.name.endswith("up_proj"))
    node = linear.node
    assert node.lora_ranks == (4, 2, 5)
    before, tensors = model(jnp.asarray(IDS)), ours.adapter_tensors(model)
    assert np.any(node.lora_B.get_value()[1, :, 2:])
    for variable, padding in ((node.lora_A, np.s_[1, 2:]), (node.lora_B, np.s_[1, :, 2:])):
        variable.set_value(variable.get_value().at[padding].set(1e3))
    np.testing.assert_array_equal(model(jnp.asarray(IDS)), before)
    graphdef, trainable, frozen = lora.partition(model)
    batch = {"input_ids": jnp.asarray(IDS), "labels": jnp.asarray(IDS)}
    gradient = jax.grad(lambda t: causal_lm_loss(nnx.merge(graphdef, t, frozen), batch)[0])(trainable)
    nnx.update(model, gradient)
    assert not np.any(node.lora_A.get_value()[1, 2:]) and not np.any(node.lora_B.get_value()[1, :, 2:])
    assert np.all(np.any(node.lora_A.get_value()[1, :2], axis=-1))
    assert {key: value.shape for key, value in ours.adapter_tensors(model).items()} == {
        key: value.shape for key, value in tensors.items()
    }


@pytest.mark.parametrize(
    "options, error, message",
    [
        (dict(target_modules="q_proj"), ValueError, "'q_proj' as a regular expression for whole paths matches no"),
        (dict(target_modules="(q_proj"), ValueError, r"target_modules: '\(q_proj' is no regular expression"),
        (dict(target_modules=()), ValueError, "target_modules is empty"),
        (dict(exclude_modules=BLOCKS), ValueError, "leaves no linear layer of this llama model, with exclude_modules="),
        (dict(layers_to_transform=[1, 3]), ValueError, r"layers_to_transform names \[3\], but .* are 0 to 2"),
        (dict(layers_to_transform=[]), ValueError, "layers_to_transform is empty"),
        (dict(layers_to_transform=1, layers_pattern="h"), ValueError, "leaves no linear layer .* layers_pattern='h'"),
        (dict(layers_pattern="layers"), ValueError, "layers_pattern says nothing without layers_to_transform"),
        (dict(target_modules="all-linear", layers_to_transform=1), ValueError, "needs target_modules as a list"),
        (dict(rank_pattern={"q_proj": 0}), ValueError, "the rank of 'q_proj' must be larger than 0, found 0"),
        (dict(rank_pattern={"q_proj": True}), TypeError, "the rank of 'q_proj' must be an integer, found True"),
        (dict(alpha_pattern={"[": 1}), ValueError, r"alpha_pattern: '\[' is no regular expression"),
    ],
    ids=str,
)
def test_selections_that_do_not_work(options, error, message, llama):
    with pytest.raises(error, match=message):
        lora.add_adapters(llama, LoraConfig(**{"target_modules": BLOCKS, **options}), jax.random.key(0))
    assert not lora.adapters(llama)


@pytest.mark.parametrize(
    "options", [dict(exclude_modules=["query"]), dict(rank_pattern={"query": 2}), dict(exclude_modules="q_proj")]
)
def test_what_changes_nothing_is_said(options, llama):
    with pytest.warns(UserWarning, match=re.escape("_proj' matches no" if "q_proj" in str(options) else "'query'")):
        lora.add_adapters(llama, LoraConfig(r=4, **options), jax.random.key(0))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    make_checkpoint("llama", folder)
    return folder


@pytest.fixture
def llama(checkpoint):
    return load_folder(checkpoint)
