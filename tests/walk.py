"""An adapter of any options, walked once around between PEFT, transformers and here."""

import re
import warnings

import jax.numpy as jnp
import numpy as np
import optax
import peft
import torch
import transformers
from flax import nnx
from helpers import load_folder, make_checkpoint, random_ids
from safetensors.numpy import load_file

from jaxlora import lora
from jaxlora.converters import peft as ours
from jaxlora.converters.export import save_merged
from jaxlora.train import TrainState, make_train_step

BLOCKS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
IDS = random_ids(2, 11)
LEARNING_RATE, STEPS = 3e-3, 4
EPS = 1e-4  # far above the rounding of gradients, which Adam would make whole steps of


def logits_of(model) -> np.ndarray:
    with torch.no_grad():
        return model(torch.from_numpy(IDS).long()).logits.numpy()


def largest_difference(found, expected) -> float:
    return float(np.abs(np.asarray(found) - np.asarray(expected)).max())


def peft_model(theirs, seed=0, **options):
    """PEFT's adapter with everything random that starts as zero, as a one or as a copy."""
    options = {"r": 4, "lora_alpha": 6, "target_modules": BLOCKS, "task_type": "CAUSAL_LM"} | options
    torch.manual_seed(seed)
    model = peft.get_peft_model(theirs, peft.LoraConfig(**options)).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.empty_like(parameter).normal_(0.0, 0.1, generator=generator)
            if "lora_magnitude" in name:
                parameter.mul_(1 + noise)
            elif parameter.requires_grad and not re.search(r"lora_A|lora_embedding_B", name):
                parameter.add_(noise)
    return model


def save_peft(model, folder) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Setting `save_embedding_layers`", UserWarning)
        model.save_pretrained(folder)


def train_peft(model) -> None:
    model.train()
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=LEARNING_RATE, weight_decay=0.1, eps=EPS)
    ids = torch.from_numpy(IDS).long()
    for _ in range(STEPS):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    model.eval()


def train_ours(model, key=None):
    graphdef, trainable, frozen = lora.partition(model)
    optimizer = optax.adamw(LEARNING_RATE, weight_decay=0.1, eps=EPS)
    state, step = TrainState.create(trainable, optimizer, key), make_train_step(graphdef, optimizer)
    batch = {"input_ids": jnp.asarray(IDS), "labels": jnp.asarray(IDS)}
    for _ in range(STEPS):
        state, _ = step(state, frozen, batch)
    nnx.update(model, state.trainable)


def separate_directions(theirs) -> None:
    """Give the weights singular values that lie apart, as a start from the largest of them is otherwise ill-defined:
    two SVDs in float32 agree on a direction up to the rounding error over the gap."""
    with torch.no_grad():
        for name, weight in theirs.named_parameters():
            if "_proj" in name:
                weight.mul_(1.5 * 0.8 ** torch.arange(weight.shape[1]))


def live_tensors(model) -> dict[str, np.ndarray]:
    """The adapters' own matrices, also where others are saved, under PEFT's names."""
    tensors = {}
    for linear in lora.adapters(model):
        for part in ("lora_A", "lora_B"):
            value = np.asarray(getattr(linear.node, part).get_value())
            for i, (name, rank) in enumerate(zip(linear.names(), linear.node.lora_ranks, strict=True)):
                one = value[i] if linear.layers else value
                if rank:
                    one = one[:rank] if part == "lora_A" else one[:, :rank]
                    tensors[f"base_model.model.{name}.{part}.weight"] = one
    return tensors


def walk(name, folder, converted=False, bound=5e-5, **options):
    """Every way that an adapter of these options takes between PEFT and here, with the same logits at each stop.

    `converted`: what is saved here is another form of what PEFT saves. `bound`: of the differences of logits.
    """
    base = folder / "base"
    theirs = make_checkpoint(name, base)
    if converted:
        separate_directions(theirs)
        theirs.save_pretrained(base)
    theirs = peft_model(theirs, **options)
    save_peft(theirs, folder / "theirs")
    model = load_folder(base)
    config = ours.load_adapter(model, folder / "theirs")
    assert largest_difference(model(jnp.asarray(IDS)), logits_of(theirs)) < bound
    assert lora.get_nb_trainable_parameters(model) == theirs.get_nb_trainable_parameters()

    values_of = live_tensors if converted else ours.adapter_tensors
    start = values_of(model)
    train_peft(theirs)
    train_ours(model)
    save_peft(theirs, folder / "trained")
    expected = load_file(folder / "trained" / "adapter_model.safetensors")
    expected = {key: value for key, value in expected.items() if not key.endswith("base_layer.weight")}
    ours.save_adapter(model, folder / "ours", config=config, base=str(base))
    found = values_of(model)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        moved = np.abs(value - start[key]).max()
        assert moved > 0, f"{key} did not learn"
        assert largest_difference(found[key], value) < 1e-2 * moved + 1e-6, key

    logits = model(jnp.asarray(IDS))
    again = peft.AutoPeftModelForCausalLM.from_pretrained(folder / "ours", attn_implementation="eager")
    assert largest_difference(logits, logits_of(again)) < bound
    save_merged(model, folder / "merged", base=base)
    merged = transformers.AutoModelForCausalLM.from_pretrained(folder / "merged", attn_implementation="eager")
    assert largest_difference(logits, logits_of(merged)) < bound
    return model, config
