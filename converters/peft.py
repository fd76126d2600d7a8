"""LoRA adapters as PEFT keeps them: adapter_config.json and adapter_model.safetensors.

A module's tensors are "base_model.model." + its checkpoint name + ".lora_A.weight" [r, in] and ".lora_B.weight"
[out, r], float32. What PEFT can say in adapter_config.json and this library cannot do is refused when it is read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from jaxlora import lora
from jaxlora.config import LoraConfig
from jaxlora.converters.huggingface import CheckpointError, SafetensorsFile, tensor_problems
from jaxlora.converters.staging import staged
from jaxlora.layers import Linear
from jaxlora.model import CausalLM, Named, named_nodes

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

# What PEFT has written since 0.11, at the values of a plain LoRA. Older versions refuse the fields that came later, and
# newer ones take what is missing for just these values.
_PLAIN: Mapping[str, Any] = {
    "alpha_pattern": {},
    "auto_mapping": None,
    "bias": "none",
    "fan_in_fan_out": False,
    "inference_mode": True,
    "init_lora_weights": True,
    "layer_replication": None,
    "layers_pattern": None,
    "layers_to_transform": None,
    "loftq_config": {},
    "megatron_config": None,
    "megatron_core": "megatron.core",
    "modules_to_save": None,
    "peft_type": "LORA",
    "rank_pattern": {},
    "task_type": "CAUSAL_LM",
    "use_dora": False,
}

# Fields that are read here, and fields that say nothing about what a trained adapter computes.
_OPTIONS = (
    "lora_dropout",
    "use_rslora",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "rank_pattern",
    "alpha_pattern",
)
_READ = {"peft_type", "r", "lora_alpha", "init_lora_weights", *_OPTIONS}
_WITHOUT_EFFECT = {
    "auto_mapping",
    "base_model_name_or_path",
    "corda_config",
    "ensure_weight_tying",
    "eva_config",
    "inference_mode",
    "loftq_config",
    "lora_ga_config",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "task_type",
}
# Initialisations that leave the base alone, and that say nothing about a trained adapter.
_INITIALISATIONS = (True, False, None, "gaussian", "eva", "orthogonal")
# Those that change it, and that can be done again: what pissa_niter_n took out of the base was drawn at random.
_FROM_BASE = ("pissa", "olora")

_CARD = """\
---
{metadata}---

# LoRA adapter

A LoRA adapter (rank {r}, alpha {alpha}) of `{base}`, trained with jaxlora. Its targets are {targets}.

```python
from peft import AutoPeftModelForCausalLM

model = AutoPeftModelForCausalLM.from_pretrained("path/of/this/folder")
```
"""


# ---- Saving ----------------------------------------------------------------------------------------------------------


def save_adapter(
    model: CausalLM,
    folder: str | Path,
    tokenizer: Any = None,
    *,
    config: LoraConfig,
    base: str,
    revision: str | None = None,
) -> None:
    """Write the model's adapters as a folder that PEFT loads, with the tokenizer's files if one is given.

    An adapter whose start was taken out of the base (`init_lora_weights` "pissa" or "olora") is written as a plain one
    of twice the rank for the base as it was, B A - B_0 A_0: PEFT's `path_initial_model_for_weight_conversion`.

    Args:
        model: a model with adapters.
        folder: is made if it is not there. Files of the same names are replaced, all or none.
        tokenizer: one of transformers, or None.
        config: the adapters' settings.
        base: what PEFT is to load the base model from: an id of the hub, or a folder.
        revision: of the base model on the hub.

    Raises:
        ValueError: the model has no adapters, or others than `config` says.
        OSError: the folder cannot be written to.
    """
    config = config.on_plain_base()
    _check_adapters(model, config)
    targets = target_modules(model)
    alpha = int(config.lora_alpha) if config.lora_alpha == int(config.lora_alpha) else config.lora_alpha
    options = {
        **_PLAIN,
        "base_model_name_or_path": base or None,
        "revision": revision,
        "r": config.r,
        "lora_alpha": alpha,
        "lora_dropout": config.lora_dropout,
        "use_rslora": config.use_rslora,
        "target_modules": targets,
        "rank_pattern": dict(config.rank_pattern),
        "alpha_pattern": dict(config.alpha_pattern),
    }
    with staged(folder) as stage:
        save_file(adapter_tensors(model), stage / WEIGHTS, metadata={"format": "pt"})
        (stage / CONFIG).write_text(json.dumps(options, indent=2, sort_keys=True))
        (stage / "README.md").write_text(_model_card(config.r, alpha, base, targets))
        if tokenizer is not None:
            tokenizer.save_pretrained(stage)


def adapter_tensors(model: CausalLM) -> dict[str, np.ndarray]:
    """{PEFT's name: float32 tensor} of all adapters, on the host, for the weights of the checkpoint."""
    tensors = {}
    for linear in lora.adapters(model):
        for adapter in lora.layer_adapters(linear):
            tensors[_key(adapter.name, "lora_A")] = np.ascontiguousarray(adapter.a, np.float32)
            tensors[_key(adapter.name, "lora_B")] = np.ascontiguousarray(adapter.b, np.float32)
    return tensors


def target_modules(model: CausalLM) -> list[str]:
    """What `target_modules` has to say so that PEFT adapts the modules that are adapted here, sorted.

    The last part of a module's path, or the whole path where another module with that last part has no adapter.
    """
    names = {name for linear in named_nodes(model, Linear) for name in linear.names()}
    adapted = {adapter.name for linear in lora.adapters(model) for adapter in lora.layer_adapters(linear)}
    plain = {_last(name) for name in names - adapted}
    return sorted({name if _last(name) in plain else _last(name) for name in adapted})


def _last(name: str) -> str:
    return name.rsplit(".", 1)[-1]


def _key(module: str, part: str) -> str:
    return f"base_model.model.{module}.{part}.weight"


def _check_adapters(model: CausalLM, config: LoraConfig) -> None:
    adapters = lora.adapters(model)
    if not adapters:
        raise ValueError("the model has no adapter to save: call FastLanguageModel.get_peft_model first")
    for adapter in (adapter for linear in adapters for adapter in lora.layer_adapters(linear)):
        rank, scaling = config.rank_of(adapter.name), config.scaling_of(adapter.name)
        if adapter.rank != rank or not np.allclose(adapter.scaling, scaling):
            raise ValueError(
                f"{adapter.name}: its adapter has rank {adapter.rank} and scaling {adapter.scaling}, but the settings "
                f"say rank {rank} and scaling {scaling}: pass the LoraConfig that the adapters were made with"
            )


def _model_card(rank: int, alpha: float, base: str, targets: list[str]) -> str:
    metadata = f"base_model: {base}\n" if base and not Path(base).exists() else ""  # the hub takes ids only
    metadata += "library_name: peft\npipeline_tag: text-generation\ntags:\n- jaxlora\n- lora\n"
    names = ", ".join(f"`{target}`" for target in targets)
    return _CARD.format(metadata=metadata, r=rank, alpha=alpha, base=base or "an unnamed model", targets=names)


# ---- Loading ---------------------------------------------------------------------------------------------------------


def base_model_name(folder: str | Path) -> str:
    """What the adapter's base model is loaded from: an id of the hub or a path.

    An adapter may have its base beside it, in the folder "base". It is found there also after the whole has moved.

    Raises:
        CheckpointError: the adapter names no base.
    """
    folder = Path(folder)
    name = read_options(folder).get("base_model_name_or_path")
    if not name:
        raise CheckpointError(
            f"{folder / CONFIG}: base_model_name_or_path is {name!r}: write the name or the folder of the base model "
            "there"
        )
    beside = folder / "base"
    if Path(name).name == "base" and not Path(name).exists() and (beside / "config.json").exists():
        return str(beside)
    return str(name)


def base_model_revision(folder: str | Path) -> str | None:
    """The revision of the base model on the hub that the adapter names, if any."""
    return read_options(folder).get("revision")


def read_options(folder: str | Path) -> dict[str, Any]:
    """The fields of adapter_config.json.

    Raises:
        CheckpointError: there is none, or it is not JSON.
    """
    path = Path(folder) / CONFIG
    try:
        return json.loads(path.read_text())
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}); an adapter folder has one") from error
    except ValueError as error:
        raise CheckpointError(f"{path}: not JSON ({error})") from error


def load_adapter(model: CausalLM, folder: str | Path) -> LoraConfig:
    """Put an adapter, written by us or by PEFT, on a model, in place; it can be trained on. Returns its settings.

    Raises:
        ValueError: the model has adapters already.
        CheckpointError: the files are missing or broken, the adapter uses what is not supported (the message names all
            such options), or does not fit the model (it lists every missing, unexpected and misshapen tensor).
    """
    folder = Path(folder)
    if lora.adapters(model):
        raise ValueError(f"the model already has adapters, and cannot take those of {folder} too: load the base anew")
    options = read_options(folder)
    targets, config = _read_config(model, options, folder / CONFIG)
    file = _open_weights(folder)

    shapes = {}
    for linear, ranks in targets:
        for name, rank in zip(linear.names(), ranks, strict=True):
            if rank:
                shapes[_key(name, "lora_A")] = (rank, linear.node.in_features)
                shapes[_key(name, "lora_B")] = (linear.node.out_features, rank)
    copies = _check_copies([linear for linear, _ in targets], file)
    found = {name: entry.shape for name, entry in file.entries.items() if name not in copies}
    problems = tensor_problems(shapes, found)
    if problems:
        raise CheckpointError(
            f"{file.path}: the tensors do not fit an adapter of rank {config.r} on {options['target_modules']} of this "
            f"{model.config.model_type} model. {problems}"
        )

    for linear, ranks in targets:
        a = np.zeros((len(ranks), max(ranks), linear.node.in_features), np.float32)
        b = np.zeros((len(ranks), linear.node.out_features, max(ranks)), np.float32)
        for i, (name, rank) in enumerate(zip(linear.names(), ranks, strict=True)):
            if rank:
                a[i, :rank], b[i, :, :rank] = (file.read(_key(name, part)) for part in ("lora_A", "lora_B"))
        if config.changes_base:  # as PEFT does: take the start out of the base again, then put the trained values in
            lora.start_from_base(linear, ranks, config, jax.random.key(0))
            linear.node.lora_A.set_value(jnp.asarray(a if linear.layers else a[0]))
            linear.node.lora_B.set_value(jnp.asarray(b if linear.layers else b[0]))
        else:
            lora.attach_stack(linear, jnp.asarray(a), jnp.asarray(b), config, ranks)
    return config


def _read_config(
    model: CausalLM, options: Mapping[str, Any], path: Path
) -> tuple[list[tuple[Named, tuple[int, ...]]], LoraConfig]:
    """The linears that adapter_config.json names with the ranks of their layers, and its settings as ours."""
    if options.get("peft_type") != "LORA":
        raise CheckpointError(f"{path}: peft_type is {options.get('peft_type')!r}; supported is 'LORA'")
    unsupported = {
        name: value
        for name, value in options.items()
        if name not in _READ | _WITHOUT_EFFECT and value != _PLAIN.get(name) and value not in (None, False, [], {})
    }
    if options.get("init_lora_weights") not in (*_INITIALISATIONS, *_FROM_BASE):
        unsupported["init_lora_weights"] = options["init_lora_weights"]
    if unsupported:
        found = ", ".join(f"{name}={value!r}" for name, value in sorted(unsupported.items()))
        raise CheckpointError(
            f"{path}: the adapter uses {found}, which is not supported: train it without, or merge it into its base "
            "with PEFT and load the result"
        )
    given = {name: options[name] for name in _OPTIONS if options.get(name) not in (None, [], {})}
    try:
        config = LoraConfig(
            r=options.get("r", 8),  # the defaults are PEFT's
            lora_alpha=options.get("lora_alpha", 8),
            init_lora_weights=options["init_lora_weights"] if options.get("init_lora_weights") in _FROM_BASE else True,
            **{"target_modules": (), **given},
        )
        targets = lora.target_ranks(model, config)
        if config.changes_base:
            lora.check_start(config, targets)
        return targets, config
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: {error}") from error


def _check_copies(targets: list[Named], file: SafetensorsFile) -> set[str]:
    """The tensors that are copies of the base's weights: PEFT writes the head's beside an adapter on the head."""
    heads = {f"base_model.model.{linear.name}.base_layer.weight": linear for linear in targets if not linear.layers}
    copies = file.entries.keys() & heads.keys()
    for name in copies:
        weight = np.asarray(heads[name].node.weight.get_value())
        if not np.array_equal(file.read(name).astype(weight.dtype), weight):
            raise CheckpointError(
                f"{file.path}: {name} is not the base model's: its vocabulary was changed or trained, which an adapter "
                "cannot bring along here: merge it into its base with PEFT and load the result"
            )
    return copies


def _open_weights(folder: Path) -> SafetensorsFile:
    path = folder / WEIGHTS
    if not path.exists():
        pickled = (folder / "adapter_model.bin").exists()
        why = "adapter_model.bin is a pickle, which can run code when read: " if pickled else ""
        raise CheckpointError(f"{path} is missing: {why}save the adapter again, with PEFT 0.5 or newer")
    return SafetensorsFile(path)
